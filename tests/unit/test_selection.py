"""Fast selection on a CPU is what a stable sort gives, for all types, ties, signs and slices."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcompress import bits, patterns, selection
from sdcompress.criteria import LayerStats, load_criterion
from sdcompress.measure import anonymous_bytes
from sdcompress.patterns import UNSTRUCTURED, Pattern, grouped, keep_mask, violations
from sdcompress.prune import record_tensor

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "SLICE", 40)  # so that every tensor here is several slices


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, coarse: bool) -> torch.Tensor:
    """Normal numbers; coarse ones have many ties, among them -0.0 and +0.0."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (numbers.mul(2).round().div(2) if coarse else numbers).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.sampled_from([(6, 16), (3, 48), (5, 8, 3, 3), (2, 16, 2, 1), (16,), (1, 4)]),
    pattern=st.sampled_from([UNSTRUCTURED, Pattern(2, 4), Pattern(1, 4), Pattern(3, 4)]),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    coarse=st.booleans(),
)
def test_fast_is_plain(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    pattern: Pattern,
    seed: int,
    share: float,
    coarse: bool,
) -> None:
    if len(shape) == 1:
        pattern = UNSTRUCTURED
    scores = draw(shape, dtype, seed, coarse)
    zeros = int(share * scores.numel())
    fast = keep_mask(scores, pattern, zeros, "tensor")
    assert torch.equal(fast, patterns._keep_by_sorting(scores, pattern, zeros))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS[:3]),
    pattern=st.sampled_from([UNSTRUCTURED, Pattern(2, 4)]),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
)
def test_arrays_are_pruned_as_tensors_are(
    dtype: torch.dtype, pattern: Pattern, seed: int, share: float
) -> None:
    weight = draw((5, 8, 3, 3), dtype, seed, coarse=True)
    array = as_array(weight)
    score = load_criterion("magnitude").score
    assert score is not None
    zeros = int(share * weight.numel())
    of = [
        patterns.keep_masks(
            lambda n=n: (score(p, LayerStats()) for p in bits.slices(n)), pattern, zeros
        )
        for n in (weight, array)
    ]
    tensors, arrays = (np.concatenate(list(masks)) for masks in of)
    assert tensors.tolist() == arrays.tolist()
    assert record_tensor(array, "F", pruned=True) == record_tensor(weight, "F", pruned=True)


def as_array(tensor: torch.Tensor) -> bits.Array:
    """In memory of its own, as `read_array` gives it."""
    name = bits.type_name(tensor)
    numpy_type = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return bits.bits(tensor).copy().view(numpy_type).reshape(tuple(tensor.shape))


def test_a_record_is_of_the_whole_tensor_however_it_is_cut() -> None:
    weight = draw((7, 13), torch.float16, 3, coarse=True)  # slices of 39 numbers: no whole bytes
    zero = (weight == 0).numpy()
    record = record_tensor(weight, "F16", pruned=True)
    assert record.zeros == int(zero.sum()) > 0
    assert record.zero_mask_blake3 == blake3(np.packbits(zero).data).hexdigest()
    assert record.blake3 == blake3(weight.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("m", range(1, 17))
def test_any_n_of_m_is_plain(m: int) -> None:
    scores = draw((3, m * 3, 2, 2), torch.float16, m, coarse=True)
    for n in range(1, m + 1):
        plain = patterns._keep_by_sorting(scores, Pattern(n, m), 0)
        assert torch.equal(keep_mask(scores, Pattern(n, m), 0, "tensor"), plain)


@settings(max_examples=100, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    coarse=st.booleans(),
    sampled=st.integers(1, 3),
)
def test_cuts_of_several_are_those_of_their_concatenation(
    dtypes: list[torch.dtype], seed: int, share: float, coarse: bool, sampled: int
) -> None:
    parts = [draw((3, 30 + 9 * i), dtype, seed + i, coarse) for i, dtype in enumerate(dtypes)]
    whole = torch.cat([part.float().reshape(-1) for part in parts])
    zeros = int(share * len(whole))
    expected = np.ones(len(whole), bool)
    expected[torch.argsort(whole, stable=True)[:zeros].numpy()] = False
    scores = [partial(bits.slices, part) for part in parts]
    samples = [(part.numel(), partial(bits.slices, part[:sampled])) for part in parts]
    for some in (None, samples):  # a third of each says little, or all: that has to be seen
        cuts = selection.find_cuts(scores, zeros, some)
        kept = (cut.keep(bits.slices(part)) for cut, part in zip(cuts, parts, strict=True))
        got = [mask for masks in kept for mask in masks]
        assert np.concatenate(got).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_samples_spare_counting_what_is_far_from_the_cut(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [draw((40, 50), dtype, seed, coarse=False).abs() * (1 + seed) for seed in range(3)]
    counted: list[int] = []
    count = np.bincount
    monkeypatch.setattr(np, "bincount", lambda n: counted.append(len(n)) or count(n))

    def cuts(samples: list[selection.Sample] | None) -> tuple[list[selection.Cut], int]:
        counted.clear()
        found = selection.find_cuts([partial(bits.slices, part) for part in parts], 3000, samples)
        return found, sum(counted)

    plain, all_of_them = cuts(None)
    monkeypatch.setattr(selection, "_MARGIN", 0.1)  # so small a sample is not exact
    sixths = [(p.numel(), partial(bits.slices, p.reshape(-1)[::6].clone())) for p in parts]
    honest, few = cuts(sixths)
    misleading = [(p.numel(), partial(bits.slices, p.reshape(-1)[:3] + 100)) for p in parts]
    misled, more = cuts(misleading)
    assert plain == honest == misled
    assert few < 0.6 * all_of_them < all_of_them < more


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sample_that_misleads_costs_a_walk_and_no_more(dtype: torch.dtype) -> None:
    """The numbers that are sampled are the highest here, where the cut is not."""
    honest = draw((4000,), dtype, 0, coarse=False).abs()
    misleading = honest.clone()
    misleading[:: selection._EVERY] += 10
    walks = 0

    def scores(of: torch.Tensor) -> list[torch.Tensor]:
        nonlocal walks
        walks += 1
        return [of]  # one slice, so that what is sampled is known

    for numbers, most in ((honest, 2), (misleading, 4)):
        walks = 0
        (cut,) = selection.find_cuts([partial(scores, numbers)], 2000)
        assert walks <= most
        (keep,) = cut.keep([numbers])
        plain = patterns._keep_by_sorting(numbers[None], UNSTRUCTURED, 2000)[0]
        assert keep.tolist() == plain.tolist()
    assert walks > 2


def test_infinities_are_the_lowest_and_the_highest() -> None:
    scores = torch.tensor([[1.0, -float("inf"), 2.0, float("inf")]], dtype=torch.float16)
    assert keep_mask(scores, UNSTRUCTURED, 1, "tensor").int().tolist() == [[1, 0, 1, 1]]
    assert keep_mask(scores, UNSTRUCTURED, 3, "tensor").int().tolist() == [[0, 0, 0, 1]]


def test_scores_are_left_as_they_are() -> None:
    scores = torch.tensor([[-1.0, 2.0, -0.0, 3.0]])
    keep_mask(scores, UNSTRUCTURED, 2, "tensor")
    keep_mask(scores, Pattern(2, 4), 2, "tensor")
    assert (
        scores.view(torch.int32).tolist()
        == torch.tensor([[-1, 2, -0.0, 3]]).view(torch.int32).tolist()
    )


def test_no_more_than_a_slice_of_scores_is_asked_for_at_a_time() -> None:
    weight = torch.arange(400.0).reshape(20, 20)
    alive, most = 0, 0

    def scores() -> Iterator[torch.Tensor]:
        nonlocal alive, most
        for part in bits.slices(weight):
            alive += part.numel()
            most = max(most, alive)
            yield part.abs()
            alive -= part.numel()

    (cut,) = selection.find_cuts([scores], 150)
    assert sum(int(mask.sum()) for mask in cut.keep(scores())) == 250
    assert most == 40


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(6, 16), (5, 8, 3, 3), (2, 32, 1, 1)]),
    n=st.integers(1, 4),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_violations_are_counted_group_by_group(
    shape: tuple[int, ...], n: int, dtype: torch.dtype, seed: int
) -> None:
    weight = draw(shape, dtype, seed, coarse=True)
    pattern = Pattern(n, 4)
    plain = int(((grouped(weight, pattern) != 0).sum(-1) > n).sum())
    assert violations(weight, pattern) == plain


def test_violations_are_counted_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has no bits that numpy could look at; here a tensor that says it is on one."""
    weight = draw((4, 8, 3, 3), torch.float16, 0, coarse=True)
    expected = violations(weight, Pattern(2, 4))
    with pytest.raises(TypeError, match="meta"):
        selection.groups_above(weight.to("meta"), 2, 4)
    monkeypatch.setattr(selection, "groups_above", None)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("meta"))
    assert violations(weight, Pattern(2, 4)) == expected > 0


def test_groups_do_not_run_over_rows() -> None:
    with pytest.raises(ValueError, match="6 input channels are not divisible by 4"):
        violations(torch.ones(2, 6), Pattern(2, 4))


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_zeroed_is_plus_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([-1.5, 2.5, -0.0, 3.5], dtype=dtype)
    assert bits.is_zero(weight).tolist() == [False, False, True, False]
    bits.zero_out(weight, np.array([False, True, False, True]))
    assert weight.tolist() == [0.0, 2.5, 0.0, 3.5]
    assert bits.bits(weight)[[0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_is_found_anywhere(dtype: torch.dtype) -> None:
    tensor = torch.zeros(7, 13).to(dtype)
    assert bits.all_finite(tensor)
    for where in (0, 45, 90):
        bad = tensor.float()
        bad.view(-1)[where] = float("nan")
        assert not bits.all_finite(bad.to(dtype))
    assert bits.all_finite(torch.arange(9))
    assert bits.all_finite(torch.zeros(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinity_is_found_with_either_sign(dtype: torch.dtype) -> None:
    for sign in (1, -1):
        tensor = torch.zeros(200, dtype=dtype)
        tensor[150] = sign * float("inf")
        assert not bits.all_finite(tensor)


def test_slices_are_whole_rows_and_all_of_them() -> None:
    tensor = torch.arange(6 * 15.0).reshape(6, 15)
    parts = list(bits.slices(tensor))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat(parts), tensor)
    assert [len(part) for part in bits.slices(torch.zeros(3, 100))] == [1, 1, 1]
    assert [len(part) for part in bits.slices(torch.zeros(90))] == [40, 40, 10]
    assert list(bits.slices(torch.zeros(0, 4))) == []


def test_samples_are_rows_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = list(bits.samples_of((1024, 1024)))
    assert matrix == [range(first, first + 4) for first in (0, 256, 512, 768)]
    large = list(bits.samples_of((8192, 8192)))
    assert sum(map(len, large)) == 8192 // bits._ONE_IN
    assert large[-1].start > 7900
    assert list(bits.samples_of((3, 10_000))) == [range(i, i + 1) for i in range(3)]
    monkeypatch.setattr(bits, "_SAMPLE", 20)
    assert [len(part) for part in bits.samples_of((90,))] == [20, 20, 20, 20, 2]
    assert list(bits.samples_of((0, 4))) == []


def test_threads_of_torch_are_one_each_and_then_what_they_were() -> None:
    before = torch.get_num_threads()
    ready = threading.Barrier(2)

    def job() -> int:
        ready.wait(timeout=10)
        return torch.get_num_threads()

    assert list(bits.tensors_in_order([job, job], threads=2)) == [1, 1]
    assert list(bits.tensors_in_order([torch.get_num_threads], threads=1)) == [before]
    assert torch.get_num_threads() == before
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]


def test_jobs_have_memory_of_their_own_and_no_more_than_twice_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bits, "GROUP", 100)
    sizes = [70, 70, 300, 10, 10, 10, 10, 500, 0, 400, 90, 60, 1, 500, 500] * 5
    made = []
    fresh = bits._fresh
    monkeypatch.setattr(bits, "_fresh", lambda n: made.append(n) or fresh(n))

    def job(number: int, memory: bits.Array) -> bits.Array:
        memory[:] = number
        return memory

    jobs = [(size, partial(job, i % 256)) for i, size in enumerate(sizes)]
    for i, found in enumerate(bits.in_memory(jobs, threads=2)):
        assert found.tolist() == [i % 256] * sizes[i]  # nobody else has written there yet
    groups = bits._grouped((size, size) for size in sizes)
    assert made == [2 * max(bits.room(n for n, _ in group) for group in groups)]
    assert list(bits.in_memory([])) == []


@given(st.lists(st.integers(0, 2500), max_size=60), st.data())
def test_a_ring_gives_no_byte_twice_and_whatever_fits_when_it_is_empty(
    sizes: list[int], data: st.DataObject
) -> None:
    ring = bits.Ring(3200)
    taken: list[tuple[bits.Array, int]] = []

    def give_back() -> None:
        piece, number = taken.pop(0)
        assert piece.tolist() == [number] * len(piece)
        ring.give_back()

    for number, size in enumerate(sizes):
        while (piece := ring.take(size)) is None:
            give_back()  # fails where there is none
        assert len(piece) == size
        assert piece.ctypes.data % bits._LINE == 0
        piece[:] = number
        taken.append((piece, number))
        for _ in range(data.draw(st.integers(0, len(taken)))):
            give_back()
    while taken:
        give_back()
    assert ring.take(3200) is not None


def test_a_ring_holds_several_pieces_at_once() -> None:
    ring = bits.Ring(128)
    first, second = ring.take(64), ring.take(64)
    assert first is not None
    assert second is not None
    assert ring.take(64) is None
    ring.give_back()
    assert ring.take(64) is not None
    ready = threading.Barrier(2)
    jobs = [(bits.GROUP, lambda memory: ready.wait(timeout=10))] * 4
    assert len(list(bits.in_memory(jobs, threads=2))) == 4


def test_buffers_are_lent_again() -> None:
    buffers = bits.Buffers()
    with buffers.lent(10) as first, buffers.lent(20) as second:
        assert first is not second
    assert buffers.take(20) is second
    assert len(buffers.take(20)) == 20  # the smaller one is gone


def test_pieces_of_memory_do_not_overlap() -> None:
    memory = np.zeros(bits.room([3, 0, 64, 65]), np.uint8)
    parts = bits.pieces(memory, [3, 0, 64, 65])
    assert [len(part) for part in parts] == [3, 0, 64, 65]
    for number, part in enumerate(parts):
        part += number + 1
    assert np.count_nonzero(memory) == 132
    assert memory.max() == 4


def test_small_tensors_are_done_together_and_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "GROUP", 10)
    sizes = [1, 9, 10, 25, 3, 3]  # four groups: 1 + 9, 10, 25, and what is left
    jobs = [lambda i=i: (i, threading.get_ident()) for i in range(6)]
    found = list(bits.tensors_in_order(jobs, threads=4, sizes=sizes))
    assert [i for i, _ in found] == list(range(6))
    assert found[0][1] == found[1][1]
    assert found[4][1] == found[5][1]
    assert [len(g) for g in bits._grouped(zip(sizes, jobs, strict=True))] == [2, 1, 1, 2]


def test_memory_of_buffers_counts_and_goes_back_to_the_system() -> None:
    size, about = 64 << 20, 60 << 20
    before = anonymous_bytes(os.getpid())
    buffer = bits.Buffers().take(size)
    buffer[:] = 1
    held = anonymous_bytes(os.getpid())
    del buffer
    assert held - before > about  # what is shared would not be seen by those who measure memory
    assert held - anonymous_bytes(os.getpid()) > about
