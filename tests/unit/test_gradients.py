"""Gradients are those of the loss that models learn by, one sample after the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdcompress.bundle import Bundle
from sdcompress.calibrate import Calibrator, _gradients
from sdcompress.calibrate._layers import find_module
from sdcompress.criteria import GRADIENTS
from sdcompress.errors import InputError, UsageError
from sdcompress.models.denoising import seeded
from sdcompress.recipe import Calibration

TEXT = "text_model.encoder.layers.1.mlp.fc2.weight"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
CONV = "down_blocks.0.downsamplers.0.conv.weight"
WANTED = {"text_encoder": {TEXT: GRADIENTS}, "unet": {LINEAR: GRADIENTS, CONV: GRADIENTS}}
PROMPTS = ("a red cat", "at", "a cat at a red cat")
ASKED = Calibration(prompts=PROMPTS, seed=5, steps=2)
QUARTER = 250  # of the thousand timesteps


def _weights(calibrator: Calibrator) -> list[Any]:
    modules = [(c, name) for c, layers in WANTED.items() for name in layers]
    return [find_module(getattr(calibrator.pipeline, c), name).weight for c, name in modules]


def _found(statistics: Any) -> list[dict[str, Tensor]]:
    """The statistics of the wanted layers in the order of `_weights`."""
    return [statistics[c][name] for c, layers in WANTED.items() for name in layers]


def _painted(calibrator: Calibrator, place: int) -> Tensor:
    """The latents of one prompt's picture, painted alone."""
    pipeline, asked = calibrator.pipeline, calibrator.asked
    latents: Tensor = pipeline(
        [asked.prompts[place]],
        generator=torch.Generator().manual_seed(asked.seed + place),
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        output_type="latent",
    ).images
    return latents


def _draw(seed: int, place: int, level: int) -> tuple[int, bool, Tensor]:
    """The timestep of a sample, whether its caption is left out, and its noise."""
    generator = seeded(seed, "gradients", place, level)
    timestep = int((level + float(torch.rand(1, generator=generator))) * QUARTER)
    empty = float(torch.rand(1, generator=generator)) < 0.1
    return timestep, empty, torch.randn(1, 4, 8, 8, generator=generator)


def _loss(pipeline: Any, latent: Tensor, caption: str, place: int, level: int) -> Tensor:
    """The denoising loss of one sample from its definition, in the precision of the latent."""
    timestep, empty, noise = _draw(ASKED.seed, place, level)
    noise = noise.to(latent)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    power = float(np.cumprod(1 - betas)[timestep])
    noisy = power**0.5 * latent + (1 - power) ** 0.5 * noise
    target = noise
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        target = power**0.5 * noise - (1 - power) ** 0.5 * latent
    tokens = pipeline.tokenizer(
        "" if empty else caption, padding="max_length", max_length=77, return_tensors="pt"
    )
    text = pipeline.text_encoder(tokens.input_ids)[0].to(latent)
    predicted: Tensor = pipeline.unet(noisy, timestep, text).sample
    return ((predicted - target) ** 2).mean()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_means_over_all_samples(tiny_source: Bundle, kind: str) -> None:
    calibrator = Calibrator(tiny_source, ASKED)
    pipeline = calibrator.pipeline
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type=kind
    )
    seen: list[tuple[int, int]] = []
    found = _found(calibrator.record(WANTED, progress=_into(seen)))
    assert seen == [(done, 12) for done in range(1, 13)]

    weights = [weight.requires_grad_() for weight in _weights(calibrator)]
    samples: list[list[Tensor]] = [[], [], []]
    for place, caption in enumerate(PROMPTS):
        latent = _painted(calibrator, place)
        for level in range(4):
            loss = _loss(pipeline, latent, caption, place, level)
            for kept, g in zip(samples, torch.autograd.grad(loss, weights), strict=True):
                kept.append(g.double())
    for statistics, weight, kept in zip(found, weights, samples, strict=True):
        g = torch.stack(kept)
        expected = {"grad_mean": g.mean(0), "grad_abs": g.abs().mean(0), "grad_sq": (g * g).mean(0)}
        assert set(statistics) == set(expected)
        for name, value in expected.items():
            assert statistics[name].shape == weight.shape
            assert statistics[name].dtype == torch.float64
            scale = float(value.abs().max())
            assert scale > 0
            torch.testing.assert_close(statistics[name], value, rtol=1e-3, atol=1e-4 * scale)


def test_a_gradient_is_the_slope_of_the_loss(
    tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample, against differences of the loss along a random direction.

    The UNet takes them in fp64; transformers' CLIP knows fp32 only.
    """
    monkeypatch.setattr(_gradients, "LEVELS", 1)
    monkeypatch.setitem(globals(), "QUARTER", 1000)
    calibrator = Calibrator(tiny_source, ASKED.model_copy(update={"prompts": PROMPTS[:1]}))
    found = _found(calibrator.record(WANTED))
    latent = _painted(calibrator, 0).double()
    calibrator.pipeline.unet.double()
    generator = torch.Generator().manual_seed(0)
    for statistics, weight in zip(found, _weights(calibrator), strict=True):
        g = statistics["grad_mean"]
        assert torch.equal(statistics["grad_abs"], g.abs())
        assert torch.equal(statistics["grad_sq"], g * g)
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for step in (3e-4, -6e-4):
                weight += step * direction
                losses.append(float(_loss(calibrator.pipeline, latent, PROMPTS[0], 0, 0)))
            weight += 3e-4 * direction
        slope = (losses[0] - losses[1]) / 6e-4
        assert abs(slope) > 1e-5
        assert float((g * direction).sum()) == pytest.approx(slope, rel=2e-3)


def test_every_sample_is_drawn_anew(tiny_source: Bundle) -> None:
    """A timestep from each quarter, noise of its own, and one caption in ten left out."""
    asked = ASKED.model_copy(update={"prompts": ("at",) * 8})
    calibrator = Calibrator(tiny_source, asked)
    calls: list[tuple[Tensor, int]] = []

    def remember(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            calls.append((args[0].detach().clone(), int(args[1])))

    told: list[str] = []
    encode = calibrator.pipeline.encode_prompt

    def listen(prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        told.extend(prompts)
        return encode(prompts, *args, **kwargs)

    hook = calibrator.pipeline.unet.register_forward_pre_hook(remember)
    calibrator.record({"unet": {CONV: frozenset({"grad_mean"})}})
    hook.remove()
    calibrator.pipeline.encode_prompt = listen
    calibrator.record({"unet": {CONV: frozenset({"grad_mean"})}})
    draws = [_draw(5, place, level) for place in range(8) for level in range(4)]
    assert [t for _, t in calls] == [t for t, _, _ in draws]
    assert [t // QUARTER for _, t in calls] == [0, 1, 2, 3] * 8
    assert len({t for _, t in calls}) > 24
    assert len({round(float(noisy.sum()), 4) for noisy, _ in calls}) == 32
    assert told == ["" if empty else "at" for _, empty, _ in draws]
    assert 0 < told.count("") < 8
    many = [_draw(5, place, level)[1] for place in range(250) for level in range(4)]
    assert 75 < sum(many) < 125


def test_batches_change_nothing(tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    one = _found(Calibrator(tiny_source, ASKED).record(WANTED))
    again = _found(Calibrator(tiny_source, ASKED).record(WANTED))
    monkeypatch.setattr(_gradients, "BATCH", 1)
    other = _found(Calibrator(tiny_source, ASKED).record(WANTED))
    for a, b, c in zip(one, again, other, strict=True):
        for name in GRADIENTS:
            assert torch.equal(a[name], b[name])
            scale = float(a[name].abs().max())
            torch.testing.assert_close(a[name], c[name], rtol=1e-3, atol=1e-4 * scale)


def test_processes_share_the_pictures(tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives its part of the means, and nothing where there are more of them than batches."""
    calibrator = Calibrator(tiny_source, ASKED)
    whole = _found(calibrator.record(WANTED))
    for batch, expected in ((8, [12, 0]), (1, [8, 4]), (1, [4, 4, 4, 0])):
        monkeypatch.setattr(_gradients, "BATCH", batch)
        parts, samples = [], []
        for index in range(len(expected)):
            state = SimpleNamespace(process_index=index, num_processes=len(expected))
            monkeypatch.setattr(_gradients, "processes", lambda state=state: state)
            seen: list[tuple[int, int]] = []
            parts.append(_found(calibrator.record(WANTED, progress=_into(seen))))
            samples.append(len(seen))
        assert samples == expected
        for i, statistics in enumerate(whole):
            for name, value in statistics.items():
                total = torch.stack([found[i][name] for found in parts]).sum(0)
                scale = float(value.abs().max())
                torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-12 * scale)


def _into(seen: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda *now: seen.append(now)


def test_only_what_is_asked_is_recorded_and_nothing_stays_behind(tiny_source: Bundle) -> None:
    calibrator = Calibrator(tiny_source, ASKED.model_copy(update={"prompts": ("at",)}))
    learning: list[set[str]] = []
    models = (calibrator.pipeline.unet, calibrator.pipeline.text_encoder)

    def look(*_: Any) -> None:
        named = [pair for model in models for pair in model.named_parameters()]
        learning.append({name for name, p in named if p.requires_grad})

    hook = calibrator.pipeline.unet.register_forward_hook(look)
    found = calibrator.record({"unet": {CONV: frozenset({"grad_sq"})}})
    hook.remove()
    assert learning[0] == {CONV}
    assert list(found) == ["unet"]
    assert list(found["unet"]) == [CONV]
    assert list(found["unet"][CONV]) == ["grad_sq"]
    for model in models:
        for parameter in model.parameters():
            assert parameter.grad is None
            assert not parameter.requires_grad
            assert not parameter._post_accumulate_grad_hooks


def test_later_packages_learn_on_the_same_pictures(
    tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of the model as it was, though their gradients are of the pruned one."""
    calibrator = Calibrator(tiny_source, ASKED)
    painted: list[range] = []
    paint = _gradients._paint

    def count(one: Any, part: Any, places: range) -> Tensor:
        painted.append(places)
        return paint(one, part, places)

    monkeypatch.setattr(_gradients, "_paint", count)
    first = calibrator.record(WANTED)["unet"][CONV]["grad_abs"]
    assert torch.equal(calibrator.record(WANTED)["unet"][CONV]["grad_abs"], first)
    calibrator.replace("unet", LINEAR, torch.zeros(32, 32))
    assert not torch.equal(calibrator.record(WANTED)["unet"][CONV]["grad_abs"], first)
    assert painted == [range(3)]
    other = Calibrator(tiny_source, ASKED)
    _gradients.prepare(other)
    assert painted == [range(3)] * 2
    other.replace("unet", LINEAR, torch.zeros(32, 32))
    pruned = other.record(WANTED)["unet"][CONV]["grad_abs"]
    assert torch.equal(calibrator.record(WANTED)["unet"][CONV]["grad_abs"], pruned)
    assert painted == [range(3)] * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures with captions."""
    rows = []
    for i, caption in enumerate(("one", "two", "three", "four")):
        levels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_gradients_on_pictures_of_ones_own(tiny_source: Bundle, folder: Path) -> None:
    asked = ASKED.model_copy(update={"images": str(folder)})
    calibrator = Calibrator(tiny_source, asked)
    pipeline = calibrator.pipeline
    chosen = _gradients._choose(calibrator.asked)
    order = [3, 0, 1]  # three prompts, so three of the four; which ones the seed says
    assert [picture.caption for picture in chosen] == [
        ("one", "two", "three", "four")[i] for i in order
    ]
    found = calibrator.record(WANTED)["text_encoder"][TEXT]["grad_mean"]
    weight = find_module(pipeline.text_encoder, TEXT).weight.requires_grad_()
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    for place, picture in enumerate(chosen):
        values = np.asarray(Image.open(folder / f"{order[place]}.png"), np.float32) / 127.5 - 1
        with torch.no_grad():
            posterior = pipeline.vae.encode(torch.from_numpy(values).permute(2, 0, 1)[None])
        latent = posterior.latent_dist.mean * pipeline.vae.config.scaling_factor
        for level in range(4):
            loss = _loss(pipeline, latent, picture.caption, place, level)
            expected += torch.autograd.grad(loss, weight)[0] / 12
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    many = asked.model_copy(update={"prompts": ("at",) * 9})
    assert sorted(p.caption for p in _gradients._choose(many)) == ["four", "one", "three", "two"]


def test_pictures_that_cannot_be_learnt_from_are_refused(
    tiny_source: Bundle, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, broken := tmp_path / "broken")
    (broken / "1.png").write_bytes(b"")
    calibrator = Calibrator(tiny_source, ASKED.model_copy(update={"images": str(broken)}))
    with pytest.raises(InputError, match=r"1 broken \(1.png\); mend the folder \("):
        calibrator.record(WANTED)
    calibrator = Calibrator(tiny_source, ASKED.model_copy(update={"images": str(tmp_path / "no")}))
    with pytest.raises(UsageError, match="expected a folder of pictures, found none"):
        calibrator.record(WANTED)


def test_what_has_no_gradient_is_refused(tiny_source: Bundle) -> None:
    calibrator = Calibrator(tiny_source, ASKED.model_copy(update={"prompts": ("at",)}))
    with pytest.raises(UsageError, match="vae: expected a criterion without gradients"):
        calibrator.record({"vae": {"decoder.conv_in.weight": GRADIENTS}})
    with pytest.raises(InputError, match=r"nowhere.weight: the loaded model has no such layer"):
        calibrator.record({"unet": {"nowhere.weight": GRADIENTS}})
    calibrator.pipeline.unet.beside = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"unet/beside.weight: expected activations, found none"):
        calibrator.record({"unet": {"beside.weight": GRADIENTS}})
    pipeline = calibrator.pipeline
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type="sample"
    )
    with pytest.raises(InputError, match=r"found sample; choose a criterion that needs no grad"):
        calibrator.record(WANTED)


def test_gradients_nobody_can_count_with_are_refused(tiny_source: Bundle) -> None:
    calibrator = Calibrator(tiny_source, ASKED.model_copy(update={"prompts": ("at",)}))
    weight = find_module(calibrator.pipeline.unet, CONV).weight
    with torch.no_grad():
        weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=f"unet/{CONV}: expected finite gradients, found NaN"):
        calibrator.record({"unet": {CONV: GRADIENTS}})
    assert weight.grad is None
    assert not weight.requires_grad
