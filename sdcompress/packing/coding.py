"""One chunk of numbers ↔ bytes: where the zeros are, then the other values in byte planes.

A zero is a number whose bits are all 0; -0.0 is a value like any other. The values keep their
order, and their first bytes, second bytes and so on are coded apart: the high byte of a float
(sign, exponent) is far from uniform, the low one is noise. Each stream is one zstd frame, with the
search for repeats all but switched off: what is left is Huffman coding with a table for every 128
KiB. Weights hold no repeats but those of chance, and coding these costs more than it brings: the
high bytes of normally distributed fp32 numbers take 12 % more than their entropy at zstd's level 1,
and 2 % without repeats.

The positions of the zeros are coded in whichever of these ways suits the chunk:

* `BITS`: eight positions a byte, then zstd. Huffman rounds each symbol to whole bits; with eight
  positions a symbol that costs 0.4 % of the mask's order-0 entropy at 38.5 % zeros.
* `ZERO_GAPS`, `VALUE_GAPS`: where one kind is rare a byte of eight positions is so often the same
  that rounding costs much. Then the distances from one of that kind to the next are coded, a byte
  each (255: none in the next 255 positions): 1 to 1.5 % above the entropy of the mask.
* `GROUPS`: 2:4 along any axis. The two places of four are one of 6 patterns, and 17 groups are a
  number below 6^17 < 2^44: two of these are 11 bytes, 0.13 % above log2 6 bits a group. A group
  with fewer values has zeros among its two coded values, which costs a little and loses nothing.
  Its four numbers lie `stride` apart: 1 along the last axis, the product of the later axes' sizes
  along any other.

The bytes: kind, width of a number (1, 2, 4 or 8 bytes), stride (u32), the lengths (u32) of the
streams (the mask, the planes from the low byte up; of `PLAIN` just one), the streams, and zero
bytes up to 1/1024 of the chunk, so that no file can claim much more than it holds.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

_NO_REPEATS = zstandard.ZstdCompressionParameters(
    compression_level=1, window_log=17, hash_log=6, min_match=7, strategy=zstandard.STRATEGY_FAST
)
MAX_RATIO = 1024  # raw bytes to one stored
PLAIN, BITS, ZERO_GAPS, VALUE_GAPS, GROUPS = range(5)
_HEADER = struct.Struct("<BBI")
_TYPES = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}
_RARE = 0.2  # of all positions: below it, gaps are shorter than bits

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Words = NDArray[Any]  # unsigned integers of the chunk's width


class CodingError(ValueError):
    """The bytes are no chunk of the size that was expected."""


@dataclass(frozen=True)
class Encoded:
    """`entropy`: the order-0 entropy of mask and byte planes in bits; None where none is defined.

    A mask of groups counts log2 6 bits a group, any other the entropy of its share of zeros.
    """

    payload: bytes
    entropy: float | None = None


def encode_plain(data: bytes, level: int = 1) -> Encoded:
    """Any bytes, through zstd as they are."""
    return Encoded(_join(PLAIN, 1, 0, [_deflate(data, level)], len(data)))


def encode_numbers(data: bytes, width: int, strides: Iterable[int] = (1,)) -> Encoded:
    """Numbers of `width` bytes; `strides` are the distances between the four numbers of a group
    of a 2:4 pattern that may be present."""
    words = np.frombuffer(data, _TYPES[width])
    nonzero = words != 0
    count = int(np.count_nonzero(nonzero))
    stride, ranks = _two_of_four(nonzero, count, width, strides)
    if stride:
        kind, positions, entropy = GROUPS, _pack_ranks(ranks), len(ranks) * math.log2(6)
        nonzero = _from_places(_PLACES.take(ranks), stride)
    else:
        kind, positions = _ungrouped(nonzero, count)
        entropy = len(words) * _binary_entropy(count / len(words))
    values = words if nonzero.all() else np.compress(nonzero, words)
    planes = _to_planes(values)
    streams = [_deflate(s.data, None) for s in (positions, *planes)]
    payload = _join(kind, width, stride, streams, len(data))
    if len(payload) > len(data):  # noise, or so few numbers that the lengths weigh more
        payload = encode_plain(data).payload
    return Encoded(payload, entropy + sum(_entropy(p) for p in planes))


def encode_guessing(data: bytes) -> Encoded:
    """Bytes of which nothing is known: as they are, or as numbers of 2 or 4 bytes if shorter.

    What fills an engine's plan are weights.
    """
    tries = [encode_numbers(data, width) for width in (2, 4) if len(data) % width == 0]
    return Encoded(min((e.payload for e in (encode_plain(data), *tries)), key=len))


def decode(payload: bytes, nbytes: int) -> Bytes:
    """The `nbytes` bytes of a chunk. Memory is a small multiple of `nbytes`, whatever it says.

    Raises:
        CodingError: the bytes are no chunk, or not one of this size.
    """
    kind, width, stride, streams = _split(payload, nbytes)
    if kind == PLAIN:
        return _inflate(streams[0], nbytes)
    n = nbytes // width
    if kind == BITS:
        bits = _inflate(streams[0], -(-n // 8))
        keep = np.unpackbits(bits, count=n, bitorder="little").view(np.bool_)
    elif kind == GROUPS:
        places = _unpack_places(_inflate(streams[0], _ranks_bytes(n // 4)), n // 4)
        keep = _from_places(places, stride)
    else:
        keep = _from_gaps(_inflate(streams[0], n, exact=False), n, kind == VALUE_GAPS)
    count = int(np.count_nonzero(keep))
    values = words = _from_planes([_inflate(stream, count) for stream in streams[1:]])
    if count < n:
        words = np.zeros(n, values.dtype)
        words[np.flatnonzero(keep)] = values
    return words.view(np.uint8)


# Byte planes


def _to_planes(words: Words) -> list[Bytes]:
    """The first (low) bytes of the numbers, their second bytes and so on."""
    return [(words >> 8 * i).astype(np.uint8) for i in range(words.itemsize)]


def _from_planes(planes: Sequence[Bytes]) -> Words:
    """The numbers whose bytes are in `planes`, the low ones first."""
    *lower, top = planes
    words = top.astype(_TYPES[len(planes)])
    for plane in reversed(lower):  # shifted and added, which is faster than writing every nth byte
        words <<= 8
        words |= plane
    return words


# Frames and streams


def _deflate(data: bytes | memoryview, level: int | None) -> bytes:
    """One zstd frame that states its size; nothing at all for nothing. No level: no repeats."""
    if not data:
        return b""
    if level is None:
        return zstandard.ZstdCompressor(compression_params=_NO_REPEATS).compress(data)
    return zstandard.ZstdCompressor(level=level).compress(data)


def _inflate(frame: memoryview, size: int, *, exact: bool = True) -> Bytes:
    """The bytes of a frame: `size` of them, or at most that many if not `exact`."""
    if not frame:
        if exact and size:
            raise CodingError("a stream is missing")
        return np.empty(0, np.uint8)
    try:
        # Before anything is allocated: the library trusts the size that a frame states.
        stated = zstandard.frame_content_size(frame)
        if not 0 < stated <= size or (exact and stated != size):
            raise CodingError(f"a stream states {stated} bytes where {size} were expected")
        data = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=stated, allow_extra_data=False
        )
    except zstandard.ZstdError as e:
        raise CodingError("a stream is corrupt") from e
    if len(data) != stated:
        raise CodingError("a stream is corrupt")
    return np.frombuffer(data, np.uint8)


def _join(kind: int, width: int, stride: int, streams: Sequence[bytes], nbytes: int) -> bytes:
    lengths = struct.pack(f"<{len(streams)}I", *(len(s) for s in streams))
    payload = b"".join([_HEADER.pack(kind, width, stride), lengths, *streams])
    return payload.ljust(-(-nbytes // MAX_RATIO), b"\0")


def _split(payload: bytes, nbytes: int) -> tuple[int, int, int, list[memoryview]]:
    view = memoryview(payload)
    if len(payload) < _HEADER.size:
        raise CodingError("a chunk is too short")
    kind, width, stride = _HEADER.unpack_from(payload)
    if kind > GROUPS or width not in _TYPES or nbytes % width:
        raise CodingError("a chunk is of no known kind")
    if kind == GROUPS and (not stride or nbytes % (4 * stride * width)):
        raise CodingError("a chunk does not consist of groups")
    count = 1 if kind == PLAIN else 1 + width
    start = _HEADER.size + 4 * count
    if len(payload) < start:
        raise CodingError("a chunk is too short")
    streams = []
    for length in struct.unpack_from(f"<{count}I", payload, _HEADER.size):
        streams.append(view[start : start + length])
        start += length
    expected = max(start, -(-nbytes // MAX_RATIO))
    if len(payload) != expected or payload.count(0, start) != expected - start:
        raise CodingError("a chunk is longer or shorter than its streams")
    return kind, width, stride, streams


# Zeros anywhere


def _ungrouped(nonzero: Mask, count: int) -> tuple[int, Bytes]:
    rare = _RARE * len(nonzero)
    if len(nonzero) - count < rare:
        return ZERO_GAPS, _to_gaps(np.flatnonzero(~nonzero))
    if count < rare:
        return VALUE_GAPS, _to_gaps(np.flatnonzero(nonzero))
    return BITS, np.packbits(nonzero, bitorder="little")


def _to_gaps(positions: NDArray[np.int64]) -> Bytes:
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    out = np.full(ends[-1] if len(ends) else 0, 255, np.uint8)
    out[ends - 1] = gaps % 255
    return out


def _from_gaps(gaps: Bytes, n: int, kind: bool) -> Mask:
    """`n` places that are not `kind`, and `kind` at the positions that the gaps lead to."""
    ends = gaps != 255
    positions = np.cumsum(gaps + ends.astype(np.int64))[ends] - 1
    if len(positions) and positions[-1] >= n:
        raise CodingError("a zero lies outside its chunk")
    mask = np.full(n, not kind)
    mask[positions] = kind
    return mask


# Zeros in groups of four

# The places of two values of four, by rank.
_PLACES = np.array([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], np.uint8)
_NONE = 255
# The places of at most two values → the first rank that has them all.
_RANKS = np.array(
    [next((i for i, p in enumerate(_PLACES) if p & b == b), _NONE) for b in range(16)], np.uint8
)
_DIGITS, _BITS = 17, 44  # 6^17 < 2^44
# 17 = 1 + 4 · 4: all but the first are looked up in fours.
_FOUND = np.dtype([("first", np.uint8), ("others", "<u4", 4)])
_FOURTH = np.uint64(6**4)
_PLACES_OF_FOUR = np.array(list(product(_PLACES, repeat=4)), np.uint8).view("<u4").reshape(-1)


def _two_of_four(
    nonzero: Mask, count: int, width: int, strides: Iterable[int]
) -> tuple[int, Bytes]:
    """The stride at which no group of four holds more than two values, and the groups' ranks; 0 if
    there is none, or telling the zeros apart one by one is shorter."""
    n = len(nonzero)
    bits = n / 4 * math.log2(6) + max(n // 2 - count, 0) * 8 * width
    if 2 * count <= n and bits <= n * _binary_entropy(count / n):
        for stride in strides:
            if n % (4 * stride) == 0:
                # One block first: in most tensors that is enough to see that there are no groups.
                for part in (nonzero[: 4 * stride], nonzero):
                    ranks = _to_ranks(part, stride)
                    if ranks.max() == _NONE:
                        break
                else:
                    return stride, ranks
    return 0, np.empty(0, np.uint8)


def _to_ranks(mask: Mask, stride: int) -> Bytes:
    blocks = mask.view(f"V{stride}").reshape(-1, 4)
    first, *others = (column.copy().view(np.uint8) for column in blocks.T)
    for place, column in enumerate(others, 1):
        first |= column << place
    return _RANKS.take(first)


def _from_places(places: Bytes, stride: int) -> Mask:
    """The two places of each group of four, as bits → the mask of the numbers."""
    rows = places.view(f"V{stride}")  # moved as a whole: byte by byte takes twice as long
    blocks = np.empty((len(rows), 4), rows.dtype)
    for place in range(4):
        blocks[:, place] = (places >> place & 1).view(rows.dtype)
    return blocks.reshape(-1).view(np.bool_)


def _ranks_bytes(groups: int) -> int:
    return -(-groups // (2 * _DIGITS)) * 11


def _pack_ranks(ranks: Bytes) -> Bytes:
    """17 ranks to a number of 44 bits, two numbers to 11 bytes."""
    digits = np.zeros((-(-len(ranks) // (2 * _DIGITS)) * 2, _DIGITS), np.uint8)
    digits.reshape(-1)[: len(ranks)] = ranks
    numbers = np.zeros(len(digits), np.uint64)
    for digit in np.ascontiguousarray(digits.T):
        numbers = numbers * np.uint64(6) + digit
    pairs = np.empty((len(digits) // 2, 2), "<u8")
    first, second = numbers[0::2], numbers[1::2]
    pairs[:, 0] = first | second << np.uint64(_BITS)
    pairs[:, 1] = second >> np.uint64(64 - _BITS)
    return np.ascontiguousarray(pairs.view(np.uint8)[:, :11]).reshape(-1)


def _unpack_places(data: Bytes, count: int) -> Bytes:
    """The places of values, by the ranks of `count` groups."""
    pairs = np.zeros((len(data) // 11, 16), np.uint8)
    pairs[:, :11] = data.reshape(-1, 11)
    low, high = np.ascontiguousarray(pairs.view("<u8").T)
    numbers = np.empty(2 * len(low), np.uint64)
    numbers[0::2] = low & np.uint64((1 << _BITS) - 1)
    numbers[1::2] = low >> np.uint64(_BITS) | high << np.uint64(64 - _BITS)
    if len(numbers) and numbers.max() >= 6**_DIGITS:
        raise CodingError("a group has no pattern")
    found = np.empty(len(numbers), _FOUND)
    for i in reversed(range(4)):
        rest = numbers // _FOURTH
        found["others"][:, i] = _PLACES_OF_FOUR.take((numbers - rest * _FOURTH).view(np.int64))
        numbers = rest
    found["first"] = _PLACES.take(numbers.view(np.int64))
    return found.view(np.uint8)[:count]


# Entropy


def _binary_entropy(p: float) -> float:
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def _entropy(plane: Bytes) -> float:
    """Bits of all its bytes together, from how often each value occurs."""
    # Counted two at a time, which takes two thirds of the time.
    pairs = np.bincount(plane[: len(plane) // 2 * 2].view("<u2"), minlength=1 << 16)
    counts = pairs.reshape(256, 256).sum(0) + pairs.reshape(256, 256).sum(1)
    counts += np.bincount(plane[len(plane) // 2 * 2 :], minlength=256)
    counts = counts[counts > 0]
    return float((counts * np.log2(len(plane) / counts)).sum())
