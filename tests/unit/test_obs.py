"""Optimal brain surgery against its closed form, against magnitude, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcompress.criteria import LayerStats, _obs, load_criterion
from sdcompress.errors import InputError
from sdcompress.patterns import (
    UNSTRUCTURED,
    Pattern,
    Select,
    as_columns,
    from_columns,
    keep_mask,
    planned_zeros,
    violations,
    zeros_for,
)

ONE_OF_TWO, TWO_OF_FOUR = Pattern(1, 2), Pattern(2, 4)


def _solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern = TWO_OF_FOUR,
    sparsity: float = 0.5,
    gone: torch.Tensor | None = None,
    *,
    refit: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(weight.shape)
    zeros = planned_zeros(pattern, shape, sparsity)
    return _obs.solve(weight, hessian, Select(pattern, shape, zeros, gone), refit=refit)


def _correlated(columns: int, seed: int = 0) -> torch.Tensor:
    """Σ x xᵀ of inputs that share a few causes."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(columns // 4, 200, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns // 4, generator=generator, dtype=torch.float64)
    own = torch.randn(columns, 200, generator=generator, dtype=torch.float64)
    x = mix @ causes + 0.3 * own
    return x @ x.T


def _error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    d = as_columns(weight - other).double()
    return float(((d @ hessian) * d).sum())


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


def test_a_linear_by_hand() -> None:
    """Inputs apart from each other: |w| counts times the norm of its input, and nothing moves."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    mask, new = _solve(weight, torch.tensor([16.0, 1.0, 1.0, 1.0]).double().diag())
    assert mask.int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]  # 4 2 3 4; 16 3 2 1
    assert new.tolist() == [[1, 0, 0, 4], [4, 3, 0, 0]]


def test_what_stays_makes_up_for_what_goes_by_hand() -> None:
    """H + 1 % = [[2.02, 1], [1, 2.02]]: the first costs less, and leaves 1 / 2.02 to the second;
    or the second costs less, 1 · (2.02 - 1 / 2.02), and leaves as much to the first."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    mask, new = _solve(torch.tensor([[1.0, 2.0], [4.0, 1.0]]), hessian, ONE_OF_TWO)
    assert mask.int().tolist() == [[0, 1], [1, 0]]
    assert new[0].tolist() == pytest.approx([0.0, 2.4950495])
    assert new[1].tolist() == pytest.approx([4.4950495, 0.0])


def test_a_conv_by_hand() -> None:
    """At position (r, s) the inputs of channels r + s and r + s + 1 (mod 4) are three times as
    large; all weights are alike."""
    squares = torch.ones(9, 4, dtype=torch.float64)
    expected = torch.zeros(1, 4, 3, 3, dtype=torch.bool)
    for r in range(3):
        for s in range(3):
            for channel in ((r + s) % 4, (r + s + 1) % 4):
                squares[3 * r + s, channel] = 9.0
                expected[0, channel, r, s] = True
    weight = torch.full((1, 4, 3, 3), 0.5)
    for hessian in (squares.flatten().diag(), torch.stack([block.diag() for block in squares])):
        mask, new = _solve(weight, hessian)
        assert torch.equal(mask, expected)
        assert torch.equal(new, 0.5 * expected)


@pytest.mark.parametrize("refit", [False, True], ids=["published", "refit"])
@pytest.mark.parametrize("shape", [(6, 16), (6, 8, 3, 3)], ids=str)
def test_with_inputs_all_alike_it_is_magnitude(shape: tuple[int, ...], refit: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    columns = weight[0].numel()
    for pattern in (TWO_OF_FOUR, UNSTRUCTURED):
        mask, new = _solve(
            weight, 3.0 * torch.eye(columns, dtype=torch.float64), pattern, refit=refit
        )
        assert torch.equal(mask, keep_mask(weight.abs(), pattern, weight.numel() // 2, "tensor"))
        torch.testing.assert_close(new, weight * mask, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, UNSTRUCTURED], ids=str)
def test_what_stays_is_the_least_squares_optimum(pattern: Pattern) -> None:
    """Of each output alone, over the inputs that it keeps, in closed form."""
    hessian = _correlated(16)
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    mask, new = _solve(weight, hessian, pattern)
    assert int((~mask).sum()) == 40
    damped = _damped(hessian)
    for row, kept, found in zip(weight.double(), mask, new, strict=True):
        best = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ row)
        torch.testing.assert_close(found[kept].double(), best, rtol=1e-3, atol=1e-4)
        assert torch.equal(found[~kept], torch.zeros(int((~kept).sum())))


def test_from_left_to_right_it_is_the_sequential_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each weight that goes costs w² / [H⁻¹]_jj, and its update is column j of H⁻¹, over the
    inputs that are not yet settled; blocks of columns change nothing."""
    monkeypatch.setattr(_obs, "_BLOCK", 4)
    hessian, columns = _damped(_correlated(20)), 20
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(columns, 3, generator=generator, dtype=torch.float64)
    chosen = torch.rand(columns, 3, generator=generator) < 0.5

    class Given:
        width = 2
        scores = torch.zeros(columns, 3, dtype=torch.float64)

        def __call__(self, scores: torch.Tensor, first: int) -> torch.Tensor:
            self.scores[first : first + 2] = scores.T
            return chosen[first : first + 2].T

    given_, found, keep = Given(), dense.clone(), torch.empty_like(chosen)
    _obs._drop(found, keep, _obs._inverse_factor(hessian), given_, 0)  # type: ignore[arg-type]
    expected = dense.clone()
    for j in range(columns):
        inverse = torch.linalg.inv(hessian[j:, j:])
        cost = expected[j] ** 2 / inverse[0, 0]
        if j % 2 == 0:  # the scores of both columns are taken before either goes
            torch.testing.assert_close(given_.scores[j] ** 2, cost)
        gone = ~chosen[j]
        expected[j:, gone] -= torch.outer(inverse[:, 0] / inverse[0, 0], expected[j, gone])
    assert torch.equal(keep, chosen)
    torch.testing.assert_close(found, expected.masked_fill(~chosen, 0.0))


@pytest.mark.parametrize(("pattern", "sparsity"), [(TWO_OF_FOUR, 0.5), (UNSTRUCTURED, 0.6)])
@pytest.mark.parametrize("shape", [(8, 32), (8, 8, 2, 2)], ids=str)
def test_it_errs_far_less_than_magnitude(
    shape: tuple[int, ...], pattern: Pattern, sparsity: float
) -> None:
    hessian = _correlated(32)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    mask, new = _solve(weight, hessian, pattern, sparsity)
    simple = weight * keep_mask(weight.abs(), pattern, int((~mask).sum()), "tensor")
    assert _error(weight, new, hessian) < 0.3 * _error(weight, simple, hessian)


def test_blocks_are_solved_apart() -> None:
    """[positions, C, C] is as good as one Hessian with nothing between the positions."""
    blocks = torch.stack([_correlated(8, seed) for seed in range(4)])
    together = torch.zeros(4, 8, 4, 8, dtype=torch.float64)
    together[range(4), :, range(4), :] = blocks
    together = together.reshape(32, 32)
    weight = torch.randn(5, 8, 2, 2, generator=torch.Generator().manual_seed(4))
    for pattern in (TWO_OF_FOUR, UNSTRUCTURED):
        mask, new = _solve(weight, blocks, pattern)
        whole_mask, whole = _solve(weight, together, pattern)
        assert torch.equal(mask, whole_mask)
        torch.testing.assert_close(new, whole, rtol=1e-3, atol=1e-4)


def test_as_published_every_block_of_128_columns_gives_its_share() -> None:
    weight = torch.randn(4, 320, generator=torch.Generator().manual_seed(7))
    weight[:, :128] *= 1e-3  # all of them would go, if the blocks competed
    mask, _ = _solve(weight, torch.eye(320).double(), UNSTRUCTURED, 0.55, refit=False)
    zeros = [int((~block).sum()) for block in torch.split(mask, 128, 1)]
    assert sum(zeros) == 704
    assert zeros == pytest.approx([281.6, 281.6, 140.8], abs=1)  # 55 % of each
    mask, _ = _solve(weight, torch.eye(320).double(), UNSTRUCTURED, 0.55)
    assert not mask[:, :128].any()


def test_every_block_gives_its_share_in_a_later_round_too() -> None:
    gone = torch.zeros(8, 256, dtype=torch.bool)
    gone[:2, :128] = gone[6:, 128:] = True  # where in the columns they are gone, does not matter
    select = Select(UNSTRUCTURED, (8, 256), 1024, gone)
    kept = [select(torch.rand(8, 128), first) for first in (0, 128)]
    assert [int((~keep).sum()) for keep in kept] == [512, 512]
    assert not (torch.cat(kept, 1) & gone).any()


def test_a_block_that_has_lost_more_than_its_share_leaves_less_to_others() -> None:
    gone = torch.zeros(8, 384, dtype=torch.bool)
    gone[:, :128] = gone[0, 256:] = True
    select = Select(UNSTRUCTURED, (8, 384), 1200, gone)
    kept = [select(torch.rand(8, 128), first) for first in (0, 128, 256)]
    assert [int((~keep).sum()) for keep in kept] == [1024, 0, 176]
    assert not (torch.cat(kept, 1) & gone).any()


def test_the_refit_errs_less() -> None:
    hessian = _correlated(64)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(8))
    plain, better = (_solve(weight, hessian, refit=refit)[1] for refit in (False, True))
    assert torch.equal(plain == 0, better == 0)  # the same choice
    assert _error(weight, better, hessian) < 0.8 * _error(weight, plain, hessian)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0, 1),
    conv=st.booleans(),
    nm=st.booleans(),
    again=st.booleans(),
    refit=st.booleans(),
)
def test_counts_are_exact_and_what_was_gone_stays_gone(
    seed: int, sparsity: float, conv: bool, nm: bool, again: bool, refit: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 8, 2, 1) if conv else (3, 12)
    weight = torch.randn(shape, generator=generator)
    hessian = _correlated(weight[0].numel(), seed)
    pattern = Pattern(2, 4) if nm else UNSTRUCTURED
    zeros = planned_zeros(pattern, shape, sparsity)
    gone = None
    if again:  # half of what is to go went before
        earlier = Pattern(3, 4) if nm else UNSTRUCTURED
        gone = ~keep_mask(weight.abs(), earlier, zeros // 2, "tensor")
        weight = weight.masked_fill(gone, 0.0)
    mask, new = _solve(weight, hessian, pattern, sparsity, gone, refit=refit)
    assert mask.shape == new.shape == weight.shape
    assert mask.dtype == torch.bool
    assert new.dtype == torch.float32
    assert int((~mask).sum()) == zeros
    assert not new[~mask].any()
    assert not torch.signbit(new[~mask]).any()
    assert violations(new, pattern) == 0
    if gone is not None:
        assert not mask[gone].any()
    if zeros == 0:
        torch.testing.assert_close(new, weight)


def test_zeros_go_where_they_cost_least() -> None:
    """Without a pattern a column may lose everything or nothing; none has to give its share."""
    squares = torch.tensor([1e-4] * 16 + [1.0] * 16, dtype=torch.float64)
    weight = torch.rand(4, 32, generator=torch.Generator().manual_seed(5)) + 0.5
    mask, _ = _solve(weight, squares.diag(), UNSTRUCTURED)
    assert mask[:, 16:].all()
    assert not mask[:, :16].any()


def test_few_inputs_and_unseen_ones_are_damped() -> None:
    """Two samples of eight inputs make H singular; an input that is always 0 goes first."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x[5] = 0.0
    weight = torch.full((2, 8), 0.5)
    weight[:, 5] = 100.0
    mask, new = _solve(weight, x @ x.T, UNSTRUCTURED, 0.125)
    assert (~mask).sum().item() == 2
    assert new.isfinite().all()
    unseen = torch.ones(8, dtype=torch.float64)
    unseen[5] = 0.0
    mask, new = _solve(torch.full((2, 8), 0.5), unseen.diag(), UNSTRUCTURED, 0.125)
    assert mask.int().tolist() == [[1, 1, 1, 1, 1, 0, 1, 1]] * 2


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(4, 4), "not all 0, found 0.0"),
        (torch.full((4, 4), float("nan")), "found nan"),
        (torch.full((4, 4), float("inf")), "found inf"),
        (torch.tensor([4.0, -1.0, 1.0, 1.0]).diag(), "without negative eigenvalues"),
    ],
    ids=["zero", "nan", "inf", "negative"],
)
def test_hessians_that_mean_nothing_are_refused(hessian: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        _solve(torch.ones(2, 4), hessian.double())
    assert "\n" not in str(refused.value)


def test_each_criterion_takes_its_own_hessian() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    early = torch.tensor([25.0, 1.0, 1.0, 1.0]).double().diag()
    even = torch.eye(4, dtype=torch.float64)
    stats = LayerStats(recorded={"hessian": even, "step_hessian": early})
    for name, expected in (("sparsegpt", [0, 0, 1, 1]), ("obs_diff", [1, 0, 0, 1])):
        criterion = load_criterion(name)
        assert criterion.solve
        mask, _ = criterion.solve(weight, stats, Select(TWO_OF_FOUR, (1, 4), 2))
        assert mask.int().tolist() == [expected]
    assert load_criterion("obs_refit").needs == {"hessian"}
    assert load_criterion("sparsegpt").needs == {"hessian"}
    assert load_criterion("obs_diff").needs == {"step_hessian"}


def test_the_columns_are_those_of_the_groups() -> None:
    weight = torch.randn(2, 4, 3, 3)
    columns = as_columns(weight)
    assert torch.equal(columns[0, :5], torch.cat([weight[0, :, 0, 0], weight[0, :1, 0, 1]]))
    assert torch.equal(from_columns(columns, (2, 4, 3, 3)), weight)
    assert zeros_for(0.5, columns.numel()) == 36
