"""Hessians: the order of their columns, their sums, the weights of steps, and what they weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sdcompress.bundle import Bundle
from sdcompress.calibrate import Calibrator, _hessians, _trajectories, collect
from sdcompress.calibrate._hessians import step_weight
from sdcompress.calibrate._inputs import Inputs
from sdcompress.calibrate._packages import packages, statistics_bytes
from sdcompress.criteria import _obs
from sdcompress.errors import InputError
from sdcompress.patterns import UNSTRUCTURED, Pattern, Select, as_columns
from sdcompress.recipe import Calibration

HESSIAN = frozenset({"hessian"})
BOTH = frozenset({"hessian", "step_hessian"})
TEXT = "text_model.encoder.layers.1.mlp.fc1.weight"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
CONV = "down_blocks.0.downsamplers.0.conv.weight"
PROMPTS = ("a red cat", "at", "a cat at a red cat")


def _hessian(layer: Any, *batches: torch.Tensor, **settings: Any) -> torch.Tensor:
    one = Inputs(layer, HESSIAN, **settings)
    handle = layer.register_forward_hook(one.add)
    for batch in batches:
        layer(batch)
    handle.remove()
    one.check("layer")
    return one.statistics(HESSIAN)["hessian"]


def test_a_linear_by_hand() -> None:
    found = _hessian(nn.Linear(2, 3), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    assert found.dtype == torch.float64
    assert found.tolist() == [[10, 14], [14, 20]]  # (1, 2) and (3, 4)


def test_a_conv_by_hand() -> None:
    """Two channels under a kernel of 1×2: channels come first, then the kernel's positions."""
    image = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    found = _hessian(nn.Conv2d(2, 1, (1, 2)), image)
    column = torch.tensor([1.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    assert torch.equal(found, torch.outer(column, column))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 3), bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(4, 6, 3, padding="same", bias=False),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Linear(5, 3, bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [2**24, 200])
def test_weights_times_hessian_are_outputs_squared(
    layer: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W H Wᵀ = Σ y yᵀ for y = W x, however the inputs were cut up."""
    monkeypatch.setattr(_hessians, "_CHUNK", chunk)
    monkeypatch.setattr(_hessians, "_PANEL", 7)
    linear = isinstance(layer, nn.Linear)
    batches = [torch.randn((n, 7, 5) if linear else (n, 4, 9, 8)) for n in (2, 3)]
    hessian = _hessian(layer, *batches)
    weight = as_columns(layer.weight).detach().double()
    outputs = [layer(batch).detach().double() for batch in batches]
    squares = [y.flatten(0, -2).T if linear else y.transpose(0, 1).flatten(1) for y in outputs]
    expected = sum(y @ y.T for y in squares)
    torch.testing.assert_close(weight @ hessian @ weight.T, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hessian, hessian.T)


def test_a_large_conv_has_one_block_for_each_position() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    batch = torch.randn(2, 4, 5, 5)
    whole = _hessian(layer, batch, max_hessian=36)
    blocks = _hessian(layer, batch, max_hessian=35)
    assert whole.shape == (36, 36)
    assert blocks.shape == (9, 4, 4)
    for position, block in enumerate(blocks):
        part = slice(4 * position, 4 * position + 4)
        torch.testing.assert_close(block, whole[part, part], rtol=1e-5, atol=1e-5)
    assert _hessian(nn.Linear(40, 2), torch.ones(1, 40), max_hessian=35).shape == (40, 40)
    one = _hessian(nn.Conv2d(4, 6, 1), batch, max_hessian=3)
    assert one.shape == (4, 4), "a kernel of one position has nothing to cut"


def test_steps_weigh_less_and_less() -> None:
    weights = [step_weight(i, 4) for i in range(4)]
    assert weights == pytest.approx([1.2, 1.11699250, 1.0, 0.8])  # 0.8 + 0.4 ln(4 - i) / ln 4
    assert step_weight(4, 4) == pytest.approx(0.8)
    assert step_weight(0, 1) == 1.0


def test_each_step_of_a_picture_has_its_weight(
    tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every batch anew; the text encoder runs once a picture and has one weight."""
    monkeypatch.setattr(_trajectories, "BATCH", 2)
    calibrator = Calibrator(tiny_source, Calibration(prompts=PROMPTS, steps=3))
    wanted = {"text_encoder": {TEXT: BOTH}, "unet": {LINEAR: BOTH, CONV: BOTH}}
    found = calibrator.record(wanted)
    inputs: list[torch.Tensor] = []
    module = calibrator.pipeline.unet.get_submodule(LINEAR.removesuffix(".weight"))
    handle = module.register_forward_hook(lambda _, args, __: inputs.append(args[0].double()))
    calibrator.record({"unet": {CONV: frozenset({"input_mean"})}})
    handle.remove()
    squares = [x.flatten(0, -2).T @ x.flatten(0, -2) for x in inputs]
    assert len(squares) == 6  # three steps of the first two pictures, then of the third
    linear = found["unet"][LINEAR]
    torch.testing.assert_close(linear["hessian"], sum(squares), rtol=1e-4, atol=1e-4)
    weights = [1.2, 0.8 + 0.4 * 0.63092975, 0.8] * 2  # ln 2 / ln 3
    expected = sum(w * s for w, s in zip(weights, squares, strict=True))
    torch.testing.assert_close(linear["step_hessian"], expected, rtol=1e-4, atol=1e-4)
    text = found["text_encoder"][TEXT]
    assert torch.equal(text["hessian"], text["step_hessian"])
    assert not torch.equal(linear["hessian"], linear["step_hessian"])


def test_batches_change_nothing(tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Calibration(prompts=PROMPTS, steps=2)
    wanted = {"unet": {LINEAR: BOTH, CONV: BOTH}}
    one = collect(tiny_source, wanted, asked)["unet"]
    monkeypatch.setattr(_trajectories, "BATCH", 1)
    other = collect(tiny_source, wanted, asked)["unet"]
    for layer, statistics in one.items():
        for name, value in statistics.items():
            # Entries off the diagonal are what is left of sums of both signs.
            atol = 1e-5 * float(value.diagonal().max())
            torch.testing.assert_close(value, other[layer][name], rtol=0, atol=atol)
        shape = (32, 32, 3, 3) if layer == CONV else (32, 32)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for pattern in (Pattern(2, 4), UNSTRUCTURED):
            masks = [
                _obs.solve(weight, h, Select(pattern, shape, weight.numel() // 2))[0]
                for h in (statistics["hessian"], other[layer]["hessian"])
            ]
            assert int((masks[0] != masks[1]).sum()) <= 1  # of 1024 and 9216


def test_a_conv_with_groups_is_refused_in_one_line(tiny_source: Bundle) -> None:
    calibrator = Calibrator(tiny_source, Calibration(prompts=("at",), steps=1))
    conv = nn.Conv2d(32, 32, 3, groups=2)
    calibrator.pipeline.unet.down_blocks[0].downsamplers[0].conv = conv
    with pytest.raises(InputError, match=f"unet/{CONV}: expected a Conv without groups, found 2"):
        calibrator.record({"unet": {CONV: HESSIAN}})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_nobody_can_count_with_is_refused(bad: float) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(InputError, match="layer: expected finite activations"):
        _hessian(layer, torch.tensor([[1.0, bad, 2.0]]))


def test_bytes_of_statistics() -> None:
    moments = {"input_sq_norm", "input_mean"}
    assert statistics_bytes((6, 4), moments, 10) == 2 * 4 * 8
    assert statistics_bytes((6, 4, 3, 3), {"hessian"}, 36) == 36 * 36 * 8
    assert statistics_bytes((6, 4, 3, 3), BOTH, 35) == 2 * 9 * 4 * 4 * 8
    assert statistics_bytes((6, 40), {"hessian"}, 35) == 40 * 40 * 8  # never in blocks
    assert statistics_bytes((6, 4, 3, 3), {"grad_sq"}, 10) == 6 * 36 * 8
    assert statistics_bytes((6, 4), (), 10) == 0


def test_packages_follow_the_model() -> None:
    in_order = [
        ("text_encoder", "text_model.encoder.layers.2.mlp.fc1.weight"),
        ("text_encoder", "text_model.encoder.layers.10.self_attn.q_proj.weight"),
        ("unet", "conv_in.weight"),
        ("unet", "time_embedding.linear_1.weight"),
        ("unet", "down_blocks.0.resnets.0.conv1.weight"),
        ("unet", "down_blocks.0.attentions.0.proj_in.weight"),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"),
        ("unet", "down_blocks.0.attentions.0.proj_out.weight"),
        ("unet", "down_blocks.0.resnets.1.conv1.weight"),
        ("unet", "down_blocks.0.downsamplers.0.conv.weight"),
        ("unet", "down_blocks.1.resnets.0.conv1.weight"),
        ("unet", "mid_block.resnets.0.conv1.weight"),
        ("unet", "mid_block.attentions.0.proj_in.weight"),
        ("unet", "mid_block.resnets.1.conv1.weight"),
        ("unet", "up_blocks.0.resnets.0.conv1.weight"),
        ("unet", "conv_out.weight"),
        ("vae", "post_quant_conv.weight"),
        ("vae", "decoder.conv_in.weight"),
    ]
    (found,) = packages([(*layer, 1) for layer in sorted(in_order)], 1)
    assert [layer[:2] for layer in found] == in_order


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([1, 1, 1, 1, 1, 1], 3, [2, 2, 2]),
        ([8, 1, 1, 1, 1, 4], 3, [1, 4, 1]),
        ([1, 9, 1, 1], 2, [2, 2]),
        ([5, 5], 4, [1, 1]),
        ([0, 0, 0, 7], 2, [3, 1]),
        ([3], 1, [1]),
        ([], 2, []),
    ],
)
def test_packages_are_about_equal_and_none_is_empty(
    sizes: list[int], count: int, expected: list[int]
) -> None:
    layers = [("unet", f"up_blocks.{i}.weight", size) for i, size in enumerate(sizes)]
    cut = packages(layers, count)
    assert [len(package) for package in cut] == expected
    assert [layer for package in cut for layer in package] == layers
