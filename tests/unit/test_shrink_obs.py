"""Optimal brain surgery on groups, against brute force and against the inputs themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from sdcompress.errors import InputError
from sdcompress.patterns import as_columns
from sdcompress.shrink import _obs
from sdcompress.shrink._importance import Removal

# Weight's shape, channels in a unit, whether the Hessian has one block for each position.
CASES = {
    "linear": ((5, 12), 1, False),
    "linear, units of 3": ((5, 12), 3, False),
    "conv": ((4, 6, 3, 3), 2, False),
    "conv, one channel a unit": ((4, 6, 3, 3), 1, False),
    "conv, by position": ((4, 6, 3, 3), 2, True),
    "conv, by position, one channel a unit": ((4, 6, 3, 3), 1, True),
}
every_case = pytest.mark.parametrize(("shape", "unit", "by_position"), CASES.values(), ids=CASES)


def _weight(shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _correlated(columns: int) -> torch.Tensor:
    """Σ x xᵀ of inputs that share a few causes."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(columns // 4, 400, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns // 4, generator=generator, dtype=torch.float64)
    own = torch.randn(columns, 400, generator=generator, dtype=torch.float64)
    x = mix @ causes + 0.3 * own
    return x @ x.T


def _hessian(shape: Sequence[int], by_position: bool) -> torch.Tensor:
    channels = shape[1]
    whole = _correlated(torch.Size(shape[1:]).numel())
    if not by_position:
        return whole
    spots = range(0, len(whole), channels)
    return torch.stack([whole[i : i + channels, i : i + channels] for i in spots])


def _whole(hessian: torch.Tensor) -> torch.Tensor:
    """[columns, columns] of either form, with its 1 %."""
    whole = hessian
    if hessian.ndim == 3:
        count, size, _ = hessian.shape
        whole = torch.zeros(count, size, count, size).double()
        whole[range(count), :, range(count)] = hessian
        whole = whole.reshape(count * size, count * size)
    return whole + 0.01 * whole.diagonal().mean() * torch.eye(len(whole)).double()


def _least(weight: torch.Tensor, whole: torch.Tensor, channels: Sequence[int]) -> float:
    """The share of tr(W H Wᵀ) that cannot but go where only these channels stay: in closed form,
    the Schur complement of what stays."""
    columns = as_columns(weight).double()
    stays = torch.zeros(weight.shape[1], dtype=torch.bool)
    stays[list(channels)] = True
    stays = stays.repeat(columns.shape[1] // len(stays))
    gone = columns[:, ~stays]
    schur = (
        whole[~stays][:, ~stays]
        - whole[~stays][:, stays]
        @ torch.linalg.inv(whole[stays][:, stays])
        @ whole[stays][:, ~stays]
    )
    return float((gone @ schur * gone).sum() / (columns @ whole * columns).sum())


def _channels(units: Sequence[int], unit: int) -> list[int]:
    return [u * unit + i for u in units for i in range(unit)]


def _columns(shape: Sequence[int], channels: Sequence[int]) -> torch.Tensor:
    """Where a weight's columns of these input channels are."""
    marked = torch.zeros(tuple(shape))
    marked[:, list(channels)] = 1
    return as_columns(marked)[0].nonzero().squeeze(1)


def _groups(shape: Sequence[int], unit: int) -> list[torch.Tensor]:
    return [_columns(shape, _channels([u], unit)) for u in range(shape[1] // unit)]


@every_case
@pytest.mark.parametrize("lazy", [1, 4, 1000])
def test_each_group_is_the_one_that_costs_least(
    shape: Sequence[int],
    unit: int,
    by_position: bool,
    lazy: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that are left are tried, each by a least-squares problem of its own."""
    monkeypatch.setattr(_obs, "_LAZY", lazy)
    weight, hessian = _weight(shape), _hessian(shape, by_position)
    whole, left = _whole(hessian), list(range(shape[1] // unit))
    found = _obs.order(weight, hessian, _groups(shape, unit), len(left))
    for step, chosen in enumerate(found.order, 1):
        tried = {
            group: _least(weight, whole, _channels([g for g in left if g != group], unit))
            for group in left
        }
        assert chosen == min(tried, key=tried.__getitem__)
        assert found.losses[step] == pytest.approx(tried[chosen], rel=1e-9)
        left.remove(chosen)
    assert found.losses[0] == 0
    assert found.losses[-1] == pytest.approx(1)


def test_no_more_go_than_may() -> None:
    weight, hessian = _weight((5, 12)), _correlated(12)
    groups = _groups(weight.shape, 1)
    everything = _obs.order(weight, hessian, groups, 12)
    some = _obs.order(weight, hessian, groups, 7)
    assert some.order == everything.order[:7]
    assert some.losses == everything.losses[:8]
    assert _obs.order(weight, hessian, groups, 0) == Removal((), (0.0,))


def test_by_hand() -> None:
    """H + 1 % is [[2.02, 1], [1, 2.02]]; without the first input the layer loses
    1² · (2.02 - 1 / 2.02) of 2.02 + 2 · 2 · 1 + 4 · 2.02, and the second takes over 1 / 2.02."""
    weight = torch.tensor([[1.0, 2.0]])
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    found = _obs.order(weight, hessian, _groups((1, 2), 1), 2)
    assert found.order == (0, 1)
    assert found.losses == pytest.approx((0, 1.5249505 / 14.1, 1))
    assert _obs.refit(weight, hessian, torch.tensor([1])).tolist() == [[pytest.approx(2.4950495)]]


def test_one_of_two_inputs_that_are_the_same_costs_next_to_nothing() -> None:
    """However large its weight is: the other can do all it did."""
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).double()
    x = torch.cat([x, x[1:2]])
    weight = torch.tensor([[1.0, 5.0, 1.0, 5.0], [1.0, 7.0, -1.0, 6.0]])
    found = _obs.order(weight, x @ x.T, _groups((2, 4), 1), 2)
    assert found.order[0] in (1, 3)
    assert found.losses[1] < 0.006  # the damping's; 5² + 6² of 276 are its weights' alone
    kept = _obs.refit(weight, x @ x.T, torch.tensor([0, 1, 2]))
    expected = torch.tensor([[1.0, 10.0, 1.0], [1.0, 13.0, -1.0]]).double()
    torch.testing.assert_close(kept, expected, rtol=0.02, atol=0.05)


def test_where_all_weights_are_zero_nothing_is_lost() -> None:
    found = _obs.order(torch.zeros(5, 8), _correlated(8), _groups((5, 8), 2), 3)
    assert found.losses == (0, 0, 0, 0)


def test_an_input_that_is_always_zero_goes_first() -> None:
    hessian = _correlated(8)
    hessian[5], hessian[:, 5] = 0, 0
    assert _obs.order(_weight((5, 8)), hessian, _groups((5, 8), 1), 1).order == (5,)


@every_case
def test_the_refit_loses_what_was_foretold(
    shape: Sequence[int], unit: int, by_position: bool
) -> None:
    weight, hessian = _weight(shape), _hessian(shape, by_position)
    groups = _groups(shape, unit)
    found = _obs.order(weight, hessian, groups, len(groups) // 2)
    channels = _channels(sorted(set(range(len(groups))) - set(found.order)), unit)
    new = _obs.refit(weight, hessian, _columns(shape, channels))
    assert new.shape == (shape[0], len(channels), *shape[2:])
    assert new.dtype == torch.float64
    padded = torch.zeros(shape, dtype=torch.float64)
    padded[:, channels] = new
    columns, whole = as_columns(weight).double(), _whole(hessian)
    error = columns - as_columns(padded)
    share = (error @ whole * error).sum() / (columns @ whole * columns).sum()
    assert float(share) == pytest.approx(found.losses[-1], rel=1e-9)


def test_a_linear_is_fitted_to_its_outputs() -> None:
    """Least squares on the inputs themselves, the damping as a few inputs more."""
    x = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).double()
    x[3] += x[0] - x[5]
    weight, kept = _weight((4, 8)), [0, 2, 5, 6]
    damping = (0.01 * (x**2).sum(1).mean()).sqrt() * torch.eye(8).double()
    inputs = torch.cat([x, damping], 1)
    outputs = weight.double() @ inputs
    best = torch.linalg.lstsq(inputs[kept].T, outputs.T).solution.T
    torch.testing.assert_close(_obs.refit(weight, x @ x.T, torch.tensor(kept)), best)


def test_a_conv_is_fitted_to_its_outputs() -> None:
    """Channel 2 is the sum of 0 and 3; without it a Conv can put out what it did, and does."""
    pictures = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    pictures[:, 2] = pictures[:, 0] + pictures[:, 3]
    weight, kept = _weight((5, 4, 3, 3)).double(), [0, 1, 3]
    unfolded = (
        F.unfold(pictures, 3, padding=1).reshape(8, 4, 9, 36).movedim(1, 2).reshape(8, 36, 36)
    )
    x = unfolded.movedim(1, 0).flatten(1)
    dense = F.conv2d(pictures, weight, padding=1)
    by_position = torch.stack([x[i : i + 4] @ x[i : i + 4].T for i in range(0, 36, 4)])
    for hessian in (x @ x.T, by_position):
        narrow = _obs.refit(weight, hessian, _columns(weight.shape, kept))
        refitted = F.conv2d(pictures[:, kept], narrow, padding=1)
        cut = F.conv2d(pictures[:, kept], weight[:, kept], padding=1)
        assert float((refitted - dense).norm() / dense.norm()) < 0.02  # the damping's
        assert float((cut - dense).norm() / dense.norm()) > 0.2
        assert _obs.order(weight, hessian, _groups(weight.shape, 1), 1).order[0] in (0, 2, 3)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(4, 4), "not all 0, found 0.0"),
        (torch.full((4, 4), float("nan")), "found nan"),
        (torch.tensor([4.0, -1.0, 1.0, 1.0]).diag(), "without negative eigenvalues"),
    ],
    ids=["zero", "nan", "negative"],
)
def test_hessians_that_mean_nothing_are_refused(hessian: torch.Tensor, message: str) -> None:
    groups = _groups((2, 4), 1)
    for run in (
        lambda: _obs.order(torch.ones(2, 4), hessian.double(), groups, 2),
        lambda: _obs.refit(torch.ones(2, 4), hessian.double(), torch.tensor([0, 1])),
    ):
        with pytest.raises(InputError, match=message) as refused:
            run()
        assert "\n" not in str(refused.value)


def test_weights_that_mean_nothing_are_refused() -> None:
    weight, hessian = torch.tensor([[1.0, float("inf"), 1.0]]), torch.eye(3).double()
    with pytest.raises(InputError, match="finite losses"):
        _obs.order(weight, hessian, _groups((1, 3), 1), 2)
    with pytest.raises(InputError, match="finite weights"):
        _obs.refit(weight, hessian, torch.tensor([0, 1]))
