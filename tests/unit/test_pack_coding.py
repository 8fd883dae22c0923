"""Chunks of numbers come back bit for bit, near their entropy, and lies in them are found."""

from __future__ import annotations

import math
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sdcompress.packing import coding
from sdcompress.packing.coding import (
    BITS,
    GROUPS,
    PLAIN,
    VALUE_GAPS,
    ZERO_GAPS,
    CodingError,
    decode,
    encode_guessing,
    encode_numbers,
    encode_plain,
)

Weights = NDArray[np.float16]


def gaussian(*shape: int, seed: int = 0) -> Weights:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float16)


def two_of_four(weights: Weights, axis: int) -> Weights:
    """The two smallest of every four along `axis` set to zero."""
    moved = np.moveaxis(weights, axis, -1).copy()
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    np.put_along_axis(groups, np.abs(groups).argsort(-1)[..., :2], 0, -1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(moved.shape), -1, axis))


def smallest_dropped(weights: Weights, share: float) -> Weights:
    flat = weights.reshape(-1).copy()
    flat[np.abs(flat).argsort(kind="stable")[: round(share * flat.size)]] = 0
    return flat.reshape(weights.shape)


def entropy(symbols: NDArray[Any]) -> float:
    """Bits of all the symbols together."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def bound(weights: Weights, mask_bits: float | None = None) -> float:
    """Bytes by the order-0 entropy of the mask, the high bytes and the low bytes."""
    words = weights.view(np.uint16).reshape(-1)
    values = words[words != 0]
    mask = entropy(words != 0) if mask_bits is None else mask_bits
    return (mask + entropy(values >> 8) + entropy(values & 255)) / 8


LAYERS = [(320, 320, 3, 3), (1280, 1280), (640, 2560), (1280, 640, 1, 1)]


@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_unstructured_zeros_are_within_1_percent_of_the_entropy(shape: tuple[int, ...]) -> None:
    weights = smallest_dropped(gaussian(*shape), 0.385)
    coded = encode_numbers(weights.tobytes(), 2)
    assert coded.payload[0] == BITS
    assert bound(weights) <= len(coded.payload) <= 1.01 * bound(weights)
    assert coded.entropy == pytest.approx(8 * bound(weights))
    assert decode(coded.payload, weights.nbytes).tobytes() == weights.tobytes()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_two_of_four_is_within_1_percent_of_the_entropy(shape: tuple[int, ...], axis: int) -> None:
    weights = two_of_four(gaussian(*shape), axis)
    strides = sorted({math.prod(shape[1:]), math.prod(shape[2:])})
    coded = encode_numbers(weights.tobytes(), 2, strides)
    kind, _, stride, mask_bytes = struct.unpack_from("<BBII", coded.payload)
    assert (kind, stride) == (GROUPS, math.prod(shape[axis + 1 :]))
    log2_6 = weights.size // 4 * math.log2(6)
    assert mask_bytes * 8 <= 1.002 * log2_6
    assert bound(weights, log2_6) <= len(coded.payload) <= 1.01 * bound(weights, log2_6)
    assert coded.entropy == pytest.approx(8 * bound(weights, log2_6), rel=1e-4)
    assert decode(coded.payload, weights.nbytes).tobytes() == weights.tobytes()


def test_groups_with_fewer_values_stay_groups() -> None:
    weights = two_of_four(gaussian(256, 256), 1)
    weights[:3, :8] = 0
    coded = encode_numbers(weights.tobytes(), 2)
    assert coded.payload[0] == GROUPS
    assert decode(coded.payload, weights.nbytes).tobytes() == weights.tobytes()


@pytest.mark.parametrize(
    ("share", "kind", "most"),
    [
        (0.0, ZERO_GAPS, 1.01),
        (0.001, ZERO_GAPS, 1.01),
        (0.1, ZERO_GAPS, 1.01),
        (0.3, BITS, 1.01),
        (0.7, BITS, 1.01),
        (0.9, VALUE_GAPS, 1.01),
        (0.97, VALUE_GAPS, 1.02),
    ],
)
def test_any_share_of_zeros_is_coded_near_its_entropy(share: float, kind: int, most: float) -> None:
    weights = gaussian(1 << 18)
    weights[np.random.default_rng(1).permutation(weights.size)[: round(share * weights.size)]] = 0
    coded = encode_numbers(weights.tobytes(), 2)
    assert coded.payload[0] == kind
    assert len(coded.payload) <= most * bound(weights)
    assert decode(coded.payload, weights.nbytes).tobytes() == weights.tobytes()


def test_single_precision_is_coded_in_four_planes() -> None:
    weights = np.random.default_rng(0).standard_normal(1 << 17).astype(np.float32)
    planes = weights.view(np.uint8).reshape(-1, 4).T
    coded = encode_numbers(weights.tobytes(), 4)
    assert len(coded.payload) * 8 <= 1.01 * sum(entropy(p) for p in planes)
    assert decode(coded.payload, weights.nbytes).tobytes() == weights.tobytes()


def test_minus_zero_is_a_value() -> None:
    weights = gaussian(4096)
    weights[::2] = 0
    weights[::4] = -0.0
    coded = encode_numbers(weights.tobytes(), 2)
    back = np.frombuffer(decode(coded.payload, 8192).tobytes(), np.float16)
    assert np.signbit(back[0])
    assert not np.signbit(back[2])
    assert back.tobytes() == weights.tobytes()


def test_gaps_are_counted_in_255s() -> None:
    gaps = coding._to_gaps(np.array([0, 3, 600]))
    assert gaps.tolist() == [0, 2, 255, 255, 86]
    mask = coding._from_gaps(gaps, 601, True)
    assert np.flatnonzero(mask).tolist() == [0, 3, 600]
    assert np.flatnonzero(~coding._from_gaps(gaps, 601, False)).tolist() == [0, 3, 600]
    assert not coding._from_gaps(gaps[:0], 9, True).any()
    with pytest.raises(CodingError, match="outside"):
        coding._from_gaps(gaps, 600, True)


def test_ranks_of_17_groups_are_44_bits() -> None:
    ranks = np.array([0] * 16 + [1] + [1] + [0] * 16, np.uint8)
    packed = coding._pack_ranks(ranks)
    assert int.from_bytes(packed.tobytes(), "little") == 1 + (6**16 << 44)
    assert coding._unpack_places(packed, 34).tolist() == [3] * 16 + [5] * 2 + [3] * 16
    every = np.random.default_rng(0).integers(0, 6, 999).astype(np.uint8)
    places = coding._unpack_places(coding._pack_ranks(every), 999)
    assert places.tolist() == [[3, 5, 6, 9, 10, 12][rank] for rank in every]
    assert coding._pack_ranks(np.full(35, 5, np.uint8)).nbytes == 22
    with pytest.raises(CodingError, match="no pattern"):
        coding._unpack_places(np.full(11, 255, np.uint8), 34)


def test_places_of_groups_along_both_axes() -> None:
    places = np.array([0b0011, 0b1100], np.uint8)
    assert coding._from_places(places, 1).astype(int).tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    across = coding._from_places(places, 2)  # 4 × 2, a group a column
    assert across.astype(int).tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert coding._to_ranks(across, 2).tolist() == [0, 5]


def chunk(kind: int, width: int, stride: int, *streams: bytes) -> bytes:
    frames = [zstandard.ZstdCompressor().compress(s) if s else b"" for s in streams]
    lengths = struct.pack(f"<{len(frames)}I", *map(len, frames))
    return struct.pack("<BBI", kind, width, stride) + lengths + b"".join(frames)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (chunk(PLAIN, 1, 0, b"hello"), b"hello"),
        (chunk(BITS, 2, 0, b"\x05", b"\x01\x02", b"\x30\x40"), b"\x01\x30\0\0\x02\x40\0\0"),
        (chunk(ZERO_GAPS, 1, 0, b"\x01", b"abc"), b"a\0bc"),
        (chunk(VALUE_GAPS, 1, 0, b"\x01", b"a"), b"\0a\0\0"),
        (chunk(VALUE_GAPS, 2, 0, b"", b"", b""), b"\0\0\0\0"),
        (chunk(GROUPS, 1, 1, b"\x05" + b"\0" * 10, b"ab"), None),
        (chunk(GROUPS, 1, 1, (5 * 6**16).to_bytes(11, "little"), b"ab"), b"\0\0ab"),
    ],
    ids=["plain", "bits", "zero gaps", "value gaps", "no values", "last group", "first group"],
)
def test_the_format_read_from_bytes_written_by_hand(payload: bytes, expected: bytes | None) -> None:
    if expected is None:  # 5 in the last place of 17: the first group is of rank 0
        assert decode(payload, 4).tobytes() == b"ab\0\0"
    else:
        assert decode(payload, len(expected)).tobytes() == expected


def test_noise_and_crumbs_never_grow_much() -> None:
    for size in (1, 2, 7, 100, 4096, 100_000):
        data = np.random.default_rng(size).bytes(size)
        for coded in (encode_plain(data), encode_numbers(data, 1), encode_guessing(data)):
            assert len(coded.payload) <= size + size // 64 + 32
            assert decode(coded.payload, size).tobytes() == data


def test_bytes_of_an_engine_are_guessed_to_be_numbers() -> None:
    halves = gaussian(1 << 16).tobytes()
    assert len(encode_guessing(halves).payload) < 0.86 * len(halves)
    singles = np.random.default_rng(0).standard_normal(1 << 15).astype(np.float32).tobytes()
    assert len(encode_guessing(singles).payload) < 0.86 * len(singles)
    text = b"a line of text that comes again\n" * 999
    assert encode_guessing(text).payload[0] == PLAIN


def test_zeros_are_not_stored_in_less_than_a_1024th() -> None:
    coded = encode_numbers(bytes(1 << 20), 2)
    assert len(coded.payload) == 1024
    assert decode(coded.payload, 1 << 20).tobytes() == bytes(1 << 20)
    with pytest.raises(CodingError, match="longer or shorter"):
        decode(coded.payload[:-1] + b"\1", 1 << 20)


@given(
    width=st.sampled_from([1, 2, 4, 8]),
    stride=st.sampled_from([1, 2, 3, 9]),
    blocks=st.integers(1, 40),
    extra=st.integers(0, 3),
    zeros=st.sampled_from(["none", "all", "some", "most", "2:4"]),
    seed=st.integers(0, 99),
)
def test_whatever_goes_in_comes_out(
    width: int, stride: int, blocks: int, extra: int, zeros: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = 4 * stride * blocks + extra
    numbers = rng.integers(0, 256, (n, width), np.uint8)
    if zeros == "2:4":
        groups = numbers[: n - extra].reshape(-1, 4, stride, width)
        groups[:, rng.permutation(4)[:2]] = 0
    else:
        share = {"none": 0, "all": 1, "some": 0.5, "most": 0.9}[zeros]
        numbers[rng.random(n) < share] = 0
    data = numbers.tobytes()
    coded = encode_numbers(data, width, (1, stride))
    assert decode(coded.payload, len(data)).tobytes() == data


_SAMPLES = [
    encode_numbers(two_of_four(gaussian(64, 64), 1).tobytes(), 2).payload,
    encode_numbers(smallest_dropped(gaussian(64, 64), 0.5).tobytes(), 2).payload,
    encode_numbers(smallest_dropped(gaussian(64, 64), 0.1).tobytes(), 2).payload,
    encode_numbers(smallest_dropped(gaussian(64, 64), 0.9).tobytes(), 2).payload,
    encode_plain(b"0123456789abcdef" * 512).payload,
]


@settings(max_examples=400)
@given(
    payload=st.sampled_from(_SAMPLES),
    edits=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 255)), max_size=3),
    cut=st.integers(0, 9999),
    nbytes=st.sampled_from([1, 2, 4, 8190, 8192, 8200, 1 << 20]),
)
def test_a_damaged_chunk_is_refused_or_has_the_size_asked_for(
    payload: bytes,
    edits: list[tuple[int, int]],
    flips: list[tuple[int, int]],
    cut: int,
    nbytes: int,
) -> None:
    damaged = bytearray(payload[:cut])
    for place, value in edits:  # the head, where kinds and lengths are
        damaged[place : place + 1] = bytes([value])
    for place, flip in flips:
        if damaged:
            damaged[place % len(damaged)] ^= flip
    size = None
    with suppress(CodingError):
        size = len(decode(bytes(damaged), nbytes))
    assert size in (None, nbytes)


BOMB = bytes(1 << 26)


@pytest.mark.parametrize(
    "payload",
    [
        chunk(PLAIN, 1, 0, BOMB),
        chunk(BITS, 2, 0, BOMB, b"a", b"b"),
        chunk(ZERO_GAPS, 2, 0, b"\x01", BOMB, b"b"),
        chunk(VALUE_GAPS, 2, 0, BOMB, b"", b""),
        chunk(GROUPS, 2, 1, BOMB, b"a", b"b"),
    ],
    ids=["plain", "bits", "zero gaps", "value gaps", "groups"],
)
def test_a_bomb_is_not_unfolded(payload: bytes) -> None:
    nbytes = min(len(payload) * 1024, 8 << 20) // 8 * 8  # the most that its length allows
    tracemalloc.start()
    try:
        with pytest.raises(CodingError, match="states 67108864 bytes"):
            decode(payload, nbytes)
        # ZERO_GAPS gets as far as its planes, with a mask of all its numbers in memory.
        assert tracemalloc.get_traced_memory()[1] < 3 * nbytes < len(BOMB)
    finally:
        tracemalloc.stop()
