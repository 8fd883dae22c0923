"""DSnoT exchanges the weights a hand would, never to a larger expected error, zeros kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdcompress.bundle import Bundle
from sdcompress.patterns import UNSTRUCTURED, Pattern, grouped, violations
from sdcompress.prune import prune
from sdcompress.recipe import Recipe, Tune
from sdcompress.tuning import tune
from sdcompress.tuning.dsnot import exchange, expected_square_error

UNET = "unet/diffusion_pytorch_model.safetensors"


def _rows(*rows: list[float]) -> torch.Tensor:
    return grouped(torch.tensor(rows, dtype=torch.float64), UNSTRUCTURED)


def test_an_exchange_worked_out_by_hand() -> None:
    # The two weights that are gone leave an error of 2·1 + 1·3 = 5. Coming back, the first takes
    # 2 off it at a variance of 1, the second 3 at a variance of 3: the first is the better deal.
    # Of those that stay, losing -1 takes 1·1 off, losing -3 takes 3·0.5 off, and losing 4 would add
    # to the error; -3 is worth least: |w|·‖x‖ is 3·1, for -1 it is 1·4.
    dense = _rows([2, 1, -1, -3, 4])
    keep = torch.tensor([[[False, False, True, True, True]]])
    mean, var = _rows([1, 3, 1, 0.5, 1]), _rows([1, 3, 1, 1, 1])
    sq_norm = _rows([4, 4, 16, 1, 1])
    weight, mask = exchange(dense * keep, dense, keep, mean, var, sq_norm, cycles=1)
    assert weight.tolist() == [[[2, 0, -1, 0, 4]]]
    assert mask.tolist() == [[[True, False, True, False, True]]]
    # 5² + 2²·1 + 1²·3 = 32 before; (3 - 1.5)² + 1²·3 + 3²·1 = 14.25 after.
    assert expected_square_error(dense * keep, dense, mean, var).tolist() == [32]
    assert expected_square_error(weight, dense, mean, var).tolist() == [14.25]


def test_no_exchange_where_it_would_cost_more_than_it_brings() -> None:
    # Bringing 1 back for -1 would take the error from 1 to -1, and the spread stays the same.
    dense, keep = _rows([1, -1]), torch.tensor([[[False, True]]])
    one = _rows([1, 1])
    weight, mask = exchange(dense * keep, dense, keep, one, one, one, cycles=9)
    assert weight.tolist() == [[[0, -1]]]
    assert torch.equal(mask, keep)


def test_with_groups_both_weights_lie_in_one() -> None:
    # Error 2 + 2; the second group holds nothing to give up for its 2, the first does.
    dense = torch.tensor([[[2.0, -1.0], [2.0, 5.0]]], dtype=torch.float64)
    keep = torch.tensor([[[False, True], [False, True]]])
    one = torch.ones(1, 2, 2, dtype=torch.float64)
    var = torch.tensor([[[1.0, 1.0], [0.1, 1.0]]], dtype=torch.float64)
    weight, mask = exchange(dense * keep, dense, keep, one, var, one, cycles=9)
    assert weight.tolist() == [[[2, 0], [0, 5]]]
    assert mask.tolist() == [[[True, False], [False, True]]]


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Pattern(2, 4), Pattern(1, 8)])
@pytest.mark.parametrize("tuned", [False, True])
def test_the_expected_error_never_grows(pattern: Pattern, tuned: bool) -> None:
    draw = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return grouped(torch.randn(shape, generator=draw, dtype=torch.float64), pattern)

    dense = some(24, 32, 3, 3)
    keep = (
        dense.abs() > 0.8
        if pattern.n is None
        else dense.abs() >= dense.abs().topk(pattern.n).values[..., -1:]
    )
    weight = (dense + (0.1 * some(24, 32, 3, 3) if tuned else 0)) * keep
    mean, var = some(1, 32, 3, 3), some(1, 32, 3, 3) ** 2
    sq_norm = 100 * (var + mean**2)
    zeros = (~keep).sum(-1)
    errors = [expected_square_error(weight, dense, mean, var)]
    for cycles in (1, 2, 5, 50):
        after, mask = exchange(weight, dense, keep, mean, var, sq_norm, cycles=cycles)
        errors.append(expected_square_error(after, dense, mean, var))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-12)).all())
        assert torch.equal((~mask).sum(-1), zeros)  # in each row, and in each group of N:M
        assert torch.equal(after != 0, mask)
        assert torch.equal(after[mask & ~keep], dense[mask & ~keep])
        stayed = mask & keep  # or left and came back
        assert bool(((after == weight) | (after == dense))[stayed].all())
    assert float(errors[-1].sum()) < 0.8 * float(errors[0].sum())


def test_a_tuned_bundle_keeps_its_zeros_and_gets_dense_values_back(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    rules = [{"scope": "linear", "sparsity": 0.5}, {"scope": "conv", "pattern": "2:4"}]
    recipe = Recipe.model_validate({"name": "r", "prune": {"unet": {"rules": rules}}})
    parent = prune(tiny_source, recipe, tmp_path / "p")
    settings = Tune(method="dsnot", prompts=("a red cat", "at"), sampling_steps=2, cycles=3)
    bundle = tune(parent, settings, tmp_path / "t", dense=tiny_source)
    dense, before, after = (load_file(b.path / UNET) for b in (tiny_source, parent, bundle))
    assert bundle.manifest.plan
    moved = 0
    for layer in bundle.manifest.plan.of("unet"):
        old, new, original = (weights[layer.name] for weights in (before, after, dense))
        if not layer.pruned:
            assert torch.equal(old, new)
            continue
        rows = [(w == 0).flatten(1).sum(1) for w in (old, new)]
        assert torch.equal(*rows)
        if layer.pattern == "2:4":
            assert violations(new, Pattern(2, 4)) == 0
        assert torch.equal(new[new != 0], original[new != 0])
        moved += int(((new != 0) & (old == 0)).sum())
    details = bundle.manifest.details
    assert 0 < moved == details["swaps"]
    error = details["expected_square_error"]
    assert error["after"] < error["before"]
