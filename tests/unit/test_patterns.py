"""Literal oracles for the one place that knows groups and axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcompress.errors import UsageError
from sdcompress.patterns import (
    UNSTRUCTURED,
    Pattern,
    Select,
    fits,
    from_columns,
    keep_mask,
    parse_pattern,
    planned_zeros,
    violations,
    zeros_for,
)

TWO_OF_FOUR = Pattern(2, 4)


def test_rows_share_what_does_not_divide() -> None:
    scores = torch.arange(12.0).reshape(3, 4).flip(1)
    assert keep_mask(scores, UNSTRUCTURED, 5, "row").int().tolist() == [
        [1, 1, 1, 0],  # 5 = 1 + 2 + 2
        [1, 1, 0, 0],
        [1, 1, 0, 0],
    ]


def test_rows_give_no_less_where_more_go() -> None:
    scores = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    dropped = torch.zeros(5, 4, dtype=torch.bool)
    for zeros in range(21):
        now = ~keep_mask(scores, UNSTRUCTURED, zeros, "row")
        assert int(now.sum()) == zeros
        assert not bool((dropped & ~now).any())
        dropped = now


def test_unstructured_drops_the_lowest_of_the_whole_tensor() -> None:
    scores = torch.tensor([[1.0, 8.0, 3.0, 6.0], [5.0, 4.0, 7.0, 2.0]])
    keep = keep_mask(scores, UNSTRUCTURED, 4, "tensor")
    assert keep.int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_rows_compete_among_themselves() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]])
    keep = keep_mask(scores, UNSTRUCTURED, 4, "row")
    assert keep.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]


def test_two_of_four_of_a_linear_runs_along_the_inputs() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]])
    keep = keep_mask(scores, TWO_OF_FOUR, 4, "tensor")
    assert keep.int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


def test_two_of_four_of_a_conv_runs_along_the_channels_of_each_kernel_position() -> None:
    # One output channel, 4 input channels, a 3×3 kernel. At position (r, s) channel c scores
    # (c + 3r + s) mod 4, so that each position drops another pair of channels.
    scores = torch.tensor(
        [[[[(c + 3 * r + s) % 4 for s in range(3)] for r in range(3)] for c in range(4)]]
    )
    keep = keep_mask(scores.float(), TWO_OF_FOUR, 18, "tensor")
    assert keep[0, :, 0, 0].int().tolist() == [0, 0, 1, 1]
    assert keep[0, :, 0, 1].int().tolist() == [0, 1, 1, 0]
    assert keep[0, :, 0, 2].int().tolist() == [1, 1, 0, 0]
    assert keep[0, :, 1, 0].int().tolist() == [1, 0, 0, 1]
    assert violations(keep, TWO_OF_FOUR) == 0


def test_a_conv_grouped_on_the_flattened_axis_is_caught() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 16, 3, 3)
    flat = keep_mask(weight.abs().reshape(8, -1), TWO_OF_FOUR, 576, "tensor").reshape(weight.shape)
    assert int((flat == 0).sum()) == 576  # exactly half, and yet
    assert violations(weight * flat, TWO_OF_FOUR) > 0


def test_ties_go_to_the_lower_index() -> None:
    ones = torch.ones(2, 4)
    assert keep_mask(ones, UNSTRUCTURED, 3, "tensor").int().tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert keep_mask(ones, UNSTRUCTURED, 4, "row").int().tolist() == [[0, 0, 1, 1]] * 2
    assert keep_mask(ones, TWO_OF_FOUR, 4, "tensor").int().tolist() == [[0, 0, 1, 1]] * 2


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0, 1),
    conv=st.booleans(),
)
def test_the_count_of_zeros_is_exact_in_every_type(
    dtype: torch.dtype, seed: int, sparsity: float, conv: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 8, 3, 3) if conv else (6, 8)
    weight = torch.randn(shape, generator=generator).to(dtype)
    zeros = zeros_for(sparsity, weight.numel())
    keep = keep_mask(weight.abs(), UNSTRUCTURED, zeros, "tensor")
    assert int((~keep).sum()) == zeros
    if 0 < zeros < weight.numel():
        assert weight[~keep].abs().max() <= weight[keep].abs().min()


@pytest.mark.parametrize("m", range(1, 17))
def test_any_n_of_m(m: int) -> None:
    torch.manual_seed(m)
    weight = torch.randn(3, m * 2, 2, 2)
    for n in range(1, m + 1):
        pattern = Pattern(n, m)
        zeros = planned_zeros(pattern, tuple(weight.shape), 0.0)
        keep = keep_mask(weight.abs(), pattern, zeros, "tensor")
        assert int((~keep).sum()) == zeros == weight.numel() * (m - n) // m
        assert violations(weight * keep, pattern) == 0
        if n < m:
            assert violations(weight, pattern) == weight.numel() // m


def test_zeros_are_shared_out_before_anything_is_chosen() -> None:
    """As many go in each eight columns as first scores say; which, only the last ones decide."""
    first = torch.tensor([[float(i) for i in range(16)], [5.5, 20, 20, 20, 20, 20, 20, 20] * 2])
    select = Select(UNSTRUCTURED, (2, 16), 8)
    select.plan(first)  # the lowest 8 are 0 to 5 and both 5.5
    scores = torch.tensor([[9.0, 9, 9, 9, 9, 9, 9, 8], [1.0, 2, 3, 4, 5, 9, 6, 9]])
    keep = torch.cat([select(scores, 0), select(scores, 8)], 1)
    assert keep.int().tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_zeros_that_nobody_planned_are_shared_out_evenly() -> None:
    select = Select(UNSTRUCTURED, (4, 16), 32)
    scores = torch.arange(32.0).reshape(4, 8)
    assert (~select(scores, 0)).sum(1).tolist() == [8, 8, 0, 0]
    assert (~select(scores, 8)).sum(1).tolist() == [8, 8, 0, 0]


def test_columns_of_a_conv_are_chosen_along_its_channels() -> None:
    """Four channels at each of 2×1 positions: columns 0 to 3 are the first position's."""
    select = Select(TWO_OF_FOUR, (1, 4, 2, 1), 4)
    assert select.width == 4
    assert select(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 0).int().tolist() == [[1, 1, 0, 0]]
    gone = torch.zeros(1, 4, 2, 1, dtype=torch.bool)
    gone[0, 2, 1, 0] = True  # the third channel of the second position
    select = Select(TWO_OF_FOUR, (1, 4, 2, 1), 4, gone)
    scores = torch.tensor([[1.0, 3.0, 9.0, 2.0]])
    assert select(scores, 0).int().tolist() == [[0, 1, 1, 0]]
    assert select(scores, 4).int().tolist() == [[0, 1, 0, 1]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0, 1), before=st.floats(0, 1))
def test_what_is_gone_goes_first_and_counts(seed: int, sparsity: float, before: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5, 2, 2)
    gone = torch.rand(shape, generator=generator) < before
    zeros = zeros_for(sparsity, gone.numel())
    select = Select(UNSTRUCTURED, shape, zeros, gone)
    if seed % 2:
        select.plan(torch.rand(3, 20, generator=generator))
    parts = [select(torch.rand(3, w, generator=generator), i) for i, w in ((0, 8), (8, 8), (16, 4))]
    keep = from_columns(torch.cat(parts, 1), shape)
    assert not keep[gone].any()
    assert int((~keep).sum()) == max(zeros, int(gone.sum()))


def test_minus_zero_is_a_zero() -> None:
    weight = torch.tensor([[-0.0, 0.0, 1.0, 2.0]])
    assert violations(weight, TWO_OF_FOUR) == 0
    assert keep_mask(weight, UNSTRUCTURED, 1, "tensor").int().tolist() == [[0, 1, 1, 1]]


def test_rounding_is_half_up() -> None:
    assert [zeros_for(0.5, n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert zeros_for(0.0, 9) == 0
    assert zeros_for(1.0, 9) == 9


def test_what_does_not_fit_is_said() -> None:
    assert fits(TWO_OF_FOUR, (8, 6)) == "6 input channels are not divisible by 4"
    assert fits(TWO_OF_FOUR, (6, 8, 3, 3)) is None
    assert fits(UNSTRUCTURED, (8, 6)) is None


@pytest.mark.parametrize("text", ["2/4", "4:2", "0:4", "2:17", "2:4 ", "structured", "", "02:004"])
def test_bad_patterns_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected 'unstructured' or N:M"):
        parse_pattern(text)


def test_patterns_read_back_as_written() -> None:
    for text in ("unstructured", "2:4", "1:1", "7:16"):
        assert str(parse_pattern(text)) == text
