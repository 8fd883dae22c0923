"""What units are worth: by hand, and against what `structure.cut` takes away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcompress.catalog import read_catalog
from sdcompress.criteria import STATISTICS, LayerStats, load_criterion
from sdcompress.errors import UsageError
from sdcompress.plan import make_plan
from sdcompress.recipe import Recipe
from sdcompress.registry import names
from sdcompress.shrink._importance import (
    Removal,
    order_by_score,
    refuse,
    scored_parts,
    unit_scores,
    wanted,
)
from sdcompress.structure import Block, channels_of, cut, find_blocks

Shapes = dict[str, tuple[int, ...]]

GEGLU: Shapes = {
    "t.ff.net.0.proj.weight": (16, 2),
    "t.ff.net.0.proj.bias": (16,),
    "t.ff.net.2.weight": (2, 8),
    "t.ff.net.2.bias": (2,),
}
HEADS: Shapes = {
    "a.self_attn.q_proj.weight": (12, 12),
    "a.self_attn.q_proj.bias": (12,),
    "a.self_attn.k_proj.weight": (12, 12),
    "a.self_attn.v_proj.weight": (12, 12),
    "a.self_attn.out_proj.weight": (12, 12),
}
CHANNELS: Shapes = {
    "mid_block.resnets.0.norm1.weight": (6,),
    "mid_block.resnets.0.conv1.weight": (8, 6, 3, 3),
    "mid_block.resnets.0.conv1.bias": (8,),
    "mid_block.resnets.0.time_emb_proj.weight": (8, 5),
    "mid_block.resnets.0.norm2.weight": (8,),
    "mid_block.resnets.0.norm2.bias": (8,),
    "mid_block.resnets.0.conv2.weight": (8, 8, 3, 3),
}
BLOCKS: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "neurons": (GEGLU, {}),
    "heads": (HEADS, {"hidden_size": 12, "num_attention_heads": 4}),
    "channels": (CHANNELS, {"norm_num_groups": 4}),
}
SCORING = [name for name in names("criteria") if load_criterion(name).score]


def _block(kind: str) -> Block:
    shapes, config = BLOCKS[kind]
    (block,) = find_blocks("text_encoder" if kind == "heads" else "unet", shapes, config)
    return block


def _weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _stats(weights: Mapping[str, torch.Tensor]) -> dict[str, LayerStats]:
    """Of each, everything that a score can ask for."""
    generator = torch.Generator().manual_seed(1)
    stats = {}
    for number, (name, weight) in enumerate(weights.items()):
        shapes = {
            s: weight.shape if s.startswith("grad") else (1, *weight.shape[1:])
            for s in sorted(STATISTICS)
            if not s.endswith("hessian")
        }
        rand = {s: torch.rand(shape, generator=generator).double() for s, shape in shapes.items()}
        stats[name] = LayerStats(number, rand)
    return stats


def test_both_halves_of_a_geglu_and_what_takes_them_count_by_hand() -> None:
    block, weights = _block("neurons"), {n: torch.zeros(s) for n, s in GEGLU.items()}
    weights["t.ff.net.0.proj.weight"][3] = torch.tensor([1.0, -2.0])  # neuron 3, values
    weights["t.ff.net.0.proj.weight"][8 + 3] = torch.tensor([0.0, 4.0])  # its gate
    weights["t.ff.net.0.proj.weight"][8 + 7, 0] = -16.0  # the gate of neuron 7
    weights["t.ff.net.2.weight"][:, 3] = torch.tensor([8.0, -32.0])
    weights["t.ff.net.2.weight"][1, 0] = 64.0
    weights["t.ff.net.0.proj.bias"] += 100
    weights["t.ff.net.2.bias"] += 100
    stats = dict.fromkeys(weights, LayerStats())
    scores = unit_scores(block, "magnitude", weights, stats)
    assert scores.dtype == torch.float64
    assert scores.tolist() == [64, 0, 0, 47, 0, 0, 0, 16]


def test_a_score_looks_at_the_statistics_of_each_layer_by_hand() -> None:
    block, weights = _block("neurons"), {n: torch.ones(s) for n, s in GEGLU.items()}
    norms = {
        "t.ff.net.0.proj.weight": torch.tensor([[1.0, 9.0]]).double(),
        "t.ff.net.2.weight": torch.tensor([[4.0, 1, 1, 1, 1, 1, 1, 25]]).double(),
    }
    stats = {n: LayerStats(recorded={"input_sq_norm": x}) for n, x in norms.items()}
    # Values and gate: 1 + 3 each; behind them two outputs, times 2, 1 and 5.
    scores = unit_scores(block, "wanda", weights, stats)
    assert scores.tolist() == [12, 10, 10, 10, 10, 10, 10, 18]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("criterion", SCORING)
def test_a_unit_is_worth_what_goes_with_it(criterion: str, kind: str) -> None:
    """The scores of everything, less those of what is left without the unit."""
    block, weights = _block(kind), _weights(BLOCKS[kind][0])
    stats = _stats(weights)
    score = load_criterion(criterion).score
    assert score
    expected = []
    for unit in range(block.units):
        left = channels_of(block, [u for u in range(block.units) if u != unit])
        lost = 0.0
        for part in block.parts:
            if weights[part.tensor].ndim > 1:
                scores = score(weights[part.tensor], stats[part.tensor]).double()
                lost += float(scores.sum() - cut(scores, part, left, block.width).sum())
        expected.append(lost)
    assert len(expected) == {"neurons": 8, "heads": 4, "channels": 4}[kind]
    found = unit_scores(block, criterion, weights, stats)
    assert found.tolist() == pytest.approx(expected)
    assert len(set(found.tolist())) == block.units


def test_biases_and_norms_are_no_weights() -> None:
    assert [
        part.tensor.removeprefix("mid_block.resnets.0.")
        for part in scored_parts(_block("channels"))
    ] == [
        "conv1.weight",
        "time_emb_proj.weight",
        "conv2.weight",
    ]


def test_what_has_to_be_recorded() -> None:
    neurons, heads, channels = map(_block, BLOCKS)
    ff, attention = "t.ff.net.{}.weight".format, "a.self_attn.{}_proj.weight".format
    norm = frozenset({"input_sq_norm"})
    assert wanted([(neurons, "wanda"), (heads, "random"), (channels, "magnitude")]) == {
        "unet": {ff("0.proj"): norm, ff("2"): norm}
    }
    assert wanted([(neurons, "obs"), (heads, "fisher")]) == {
        "unet": {ff("2"): {"hessian"}},
        "text_encoder": {attention(x): {"grad_sq"} for x in ("q", "k", "v", "out")},
    }
    assert wanted([]) == {}


def test_the_lowest_go_first_and_of_equals_the_first() -> None:
    removal = order_by_score(torch.tensor([2.0, 0.5, 4.0, 0.5]).double())
    assert removal == Removal((1, 3, 0, 2), (0, 0.5, 1, 3, 7))
    assert [removal.kept(n, 4) for n in (4, 3, 1)] == [(0, 1, 2, 3), (0, 2, 3), (2,)]


def test_single_weights_are_not_judged_as_groups_are(tiny_sd: Path) -> None:
    rules = [{"sparsity": 0.5}, {"criterion": "obs", "sparsity": 0.5}]
    recipe = Recipe.model_validate({"name": "r", "prune": {"unet": {"rules": rules}}})
    with pytest.raises(UsageError, match="unet, rule 2: obs judges .*; use obs_refit") as refused:
        make_plan(recipe, read_catalog(tiny_sd))
    assert "\n" not in str(refused.value)


def test_what_gives_no_score_is_refused() -> None:
    refused = {name for name in names("criteria") if refuse(name)}
    assert refused == {"sparsegpt", "obs_diff", "obs_refit"}
    problem = refuse("sparsegpt")
    assert problem
    assert problem.startswith("sparsegpt gives no score that could be summed over a group; use obs")
    assert "\n" not in problem
