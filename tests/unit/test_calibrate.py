"""Statistics are those of the pictures people get: the same noise, steps and branches, summed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import unfold
from torch.nn.modules.module import register_module_forward_hook

from sdcompress import calibrate
from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.calibrate import _trajectories, collect, complete
from sdcompress.calibrate._inputs import Inputs
from sdcompress.criteria import LayerStats
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.images import generate_from_weights
from sdcompress.models.prompts import CAPTIONS, read_prompts
from sdcompress.recipe import Calibration

MOMENTS = frozenset({"input_sq_norm", "input_mean", "input_var"})
TEXT = "text_model.encoder.layers.1.mlp.fc2.weight"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
CONV = "down_blocks.0.downsamplers.0.conv.weight"
WANTED = {"text_encoder": {TEXT: MOMENTS}, "unet": {LINEAR: MOMENTS, CONV: MOMENTS}}
PROMPTS = ("a red cat", "at", "a cat at a red cat")


def _plain(name: str) -> str:
    """Transformers 5 writes and loads the text encoder without this prefix."""
    return name.removeprefix("text_model.")


def _moments(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics of [inputs, places]."""
    x = x.double()
    return {
        "input_sq_norm": (x * x).sum(1),
        "input_mean": x.mean(1),
        "input_var": x.var(1, correction=0),
    }


def _spread_out(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What each weight of a row is multiplied with, [inputs, places]; for Conv by unfolding."""
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2).T
    windows = unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return windows.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_the_activations_are_those_of_the_pictures(tiny_source: Bundle, guidance: float) -> None:
    """Recorded a second time, one picture after the other, by whatever multiplies the weights."""
    asked = Calibration(prompts=PROMPTS, seed=5, steps=3, guidance=guidance)
    found = collect(tiny_source, WANTED, asked)
    files = {c: load_file(next((tiny_source.path / c).glob("*.safetensors"))) for c in WANTED}
    weights = {c: {_plain(name): w for name, w in file.items()} for c, file in files.items()}
    inputs: dict[str, list[torch.Tensor]] = {TEXT: [], LINEAR: [], CONV: []}

    def record(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            for component, layers in WANTED.items():
                for name in layers:
                    if torch.equal(module.weight, weights[component][_plain(name)]):
                        inputs[name].append(_spread_out(module, args[0]))

    handle = register_module_forward_hook(record)
    try:
        generate_from_weights(
            tiny_source.path, PROMPTS, [5, 6, 7], steps=3, guidance=guidance, height=16, width=16
        )
    finally:
        handle.remove()
    branches = 2 if guidance > 1 else 1
    assert len(inputs[CONV]) == 9  # three pictures of three steps, with both branches in one batch
    assert inputs[TEXT][0].shape[1] == 77
    assert inputs[CONV][0].shape[1] == branches * 4 * 4
    for component, layers in WANTED.items():
        for name in layers:
            shape = (1, *weights[component][_plain(name)].shape[1:])
            for statistic, expected in _moments(torch.cat(inputs[name], 1)).items():
                value = found[component][name][statistic]
                assert value.shape == shape
                assert value.dtype == torch.float64
                torch.testing.assert_close(
                    value, expected.reshape(shape), rtol=1e-4, atol=1e-7, msg=f"{name} {statistic}"
                )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 3)),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Linear(5, 3),
    ],
    ids=str,
)
def test_sums_are_those_of_what_every_weight_meets(layer: Any) -> None:
    linear = isinstance(layer, nn.Linear)
    batches = [torch.randn((n, 7, 5) if linear else (n, 4, 9, 8)) for n in (2, 3)]
    one = Inputs(layer, MOMENTS)
    layer.register_forward_hook(one.add)
    for batch in batches:
        layer(batch)
    found = one.statistics(MOMENTS)
    met = torch.cat([_spread_out(layer, batch) for batch in batches], 1)
    groups = 1 if linear else layer.groups
    for name, expected in _moments(met).items():
        # [C·R·S] → one row for each output: those of a group share its channels.
        rows = expected.reshape(groups, *layer.weight.shape[1:]).repeat_interleave(
            layer.weight.shape[0] // groups, 0
        )
        torch.testing.assert_close(found[name].expand_as(layer.weight), rows, rtol=1e-5, atol=1e-6)


def test_padding_by_name_and_around_the_edge() -> None:
    same, by_number = nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 3, padding=1)
    around = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    x = torch.randn(1, 2, 4, 4)
    found = []
    for layer in (same, by_number, around):
        one = Inputs(layer, frozenset({"input_sq_norm"}))
        layer.register_forward_hook(one.add)
        layer(x)
        found.append(one.statistics(frozenset({"input_sq_norm"}))["input_sq_norm"])
    assert torch.equal(found[0], found[1])
    whole = (x.double() ** 2).sum((0, 2, 3))[:, None, None].expand(2, 3, 3)
    torch.testing.assert_close(found[2], whole[None], rtol=1e-6, atol=0)


def test_only_what_is_asked_is_recorded(
    tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is denoised for the text encoder alone, and the means need no squares."""
    from diffusers import UNet2DConditionModel

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the UNet ran")

    monkeypatch.setattr(UNet2DConditionModel, "forward", refuse)
    seen: list[tuple[int, int]] = []
    found = collect(
        tiny_source,
        {"text_encoder": {TEXT: frozenset({"input_mean"})}},
        Calibration(count=10, steps=2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert list(found) == ["text_encoder"]
    assert list(found["text_encoder"][TEXT]) == ["input_mean"]
    assert seen == [(8, 10), (10, 10)]


def test_batches_change_nothing(tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Calibration(prompts=PROMPTS, steps=2)
    seen: list[tuple[int, int]] = []
    one = collect(tiny_source, WANTED, asked, progress=lambda *now: seen.append(now))
    again = collect(tiny_source, WANTED, asked)
    monkeypatch.setattr(_trajectories, "BATCH", 1)
    other = collect(tiny_source, WANTED, asked)
    assert seen == [(3, 6), (6, 6)]
    for component, layers in WANTED.items():
        for name in layers:
            for statistic, value in one[component][name].items():
                assert torch.equal(value, again[component][name][statistic])
                torch.testing.assert_close(
                    value, other[component][name][statistic], rtol=1e-4, atol=1e-7
                )


def test_the_decoder_of_the_vae_can_be_recorded_and_its_encoder_not(
    tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Calibration(prompts=("at",), steps=1)
    name = "decoder.conv_in.weight"
    found = collect(tiny_source, {"vae": {name: frozenset({"input_mean"})}}, asked)
    assert found["vae"][name]["input_mean"].shape == (1, 4, 3, 3)
    monkeypatch.setattr(calibrate, "load_pipeline", None)  # known before anything slow
    with pytest.raises(InputError, match=r"vae/encoder.conv_in.weight: expected layers that paint"):
        collect(tiny_source, {"vae": {"encoder.conv_in.weight": MOMENTS}}, asked)


def test_what_nobody_chose_is_the_models_own(tiny_source: Bundle) -> None:
    whole = complete(tiny_source, Calibration(count=3))
    captions = read_prompts(CAPTIONS["learning"])
    assert whole == Calibration(prompts=captions[:3], count=3, steps=25, guidance=7.5)
    assert complete(tiny_source, whole) == whole
    mine = Calibration(prompts=("at",), steps=2, guidance=0.0)
    assert complete(tiny_source, mine) == mine.model_copy(update={"count": 1})


def test_captions_all_differ_and_are_plain_sentences() -> None:
    captions = read_prompts(CAPTIONS["learning"])
    assert len({c.casefold() for c in captions}) == len(captions) == 128
    assert all(c.isascii() and c.endswith(".") and len(c) < 80 for c in captions)


def test_no_prompts_are_refused(tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "prompts_for", lambda *_: ())
    monkeypatch.setattr(calibrate, "complete", lambda *_: Calibration(steps=1, guidance=1.0))
    with pytest.raises(UsageError, match="0 prompts"):
        collect(tiny_source, WANTED, Calibration())


def test_a_layer_the_model_lacks_is_refused(tiny_source: Bundle) -> None:
    wanted = {"unet": {"nowhere.weight": MOMENTS}}
    with pytest.raises(InputError, match="nowhere.weight: the loaded model has no such layer"):
        collect(tiny_source, wanted, Calibration(prompts=("at",), steps=1))


def test_activations_nobody_can_count_with_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    file = broken / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    last = next(name for name in weights if name.endswith("final_layer_norm.bias"))
    weights[last][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    source = Bundle.of_source(broken, SourceRecord(id="broken", kind="directory"))
    with pytest.raises(InputError, match=f"unet/{LINEAR}: expected finite activations"):
        collect(source, WANTED, Calibration(prompts=("at",), steps=1))


def test_a_criterion_gets_no_more_than_it_names() -> None:
    stats = LayerStats(recorded={"input_mean": torch.ones(1, 2)})
    assert torch.equal(stats.input_mean, torch.ones(1, 2))
    with pytest.raises(TypeError, match="name it in `needs`"):
        _ = stats.input_var
