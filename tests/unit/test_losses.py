"""What a layer's weight does to the noise prediction, on a tiny pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from sdcompress.bundle import Bundle
from sdcompress.calibrate import Calibrator
from sdcompress.calibrate._layers import find_module
from sdcompress.calibrate._losses import Losses, middles
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.images import initial_latents
from sdcompress.recipe import Calibration

UNET, TEXT = "down_blocks.0.resnets.0.conv1.weight", "text_model.encoder.layers.1.mlp.fc1.weight"
PROMPTS = ("a red cat", "a cat at a cat")
SETTINGS = Calibration(prompts=PROMPTS, steps=3, guidance=2.0, seed=5)


@pytest.fixture(scope="module")
def calibrator(tiny_source: Bundle) -> Calibrator:
    return Calibrator(tiny_source, SETTINGS)


@pytest.fixture(scope="module")
def losses(calibrator: Calibrator) -> Losses:
    return Losses(calibrator)


def _weight(calibrator: Calibrator, component: str, layer: str) -> Tensor:
    weight: Tensor = find_module(getattr(calibrator.pipeline, component), layer).weight
    return weight.detach().clone()


def _by_hand(source: Bundle, change: Any) -> float:
    """The loss by a loop of our own over the two prompts' trajectories, from fresh modules."""
    dense = StableDiffusionPipeline.from_pretrained(source.path, safety_checker=None)
    other = StableDiffusionPipeline.from_pretrained(source.path, safety_checker=None)
    change(other)
    scheduler: Any = DDIMScheduler.from_config(dense.scheduler.config)
    scheduler.set_timesteps(3)
    latents = torch.cat(
        [initial_latents(torch.Generator().manual_seed(5 + i), (4, 8, 8)) for i in range(2)]
    )

    def told(pipeline: Any) -> Tensor:
        tokens = pipeline.tokenizer(
            ["", "", *PROMPTS], padding="max_length", max_length=77, return_tensors="pt"
        )
        states: Tensor = pipeline.text_encoder(tokens.input_ids)[0]
        return states

    error = norm = 0.0
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = torch.cat([latents, latents])
            expected = dense.unet(both, t, encoder_hidden_states=told(dense)).sample
            found = other.unet(both, t, encoder_hidden_states=told(other)).sample
            error += float((found - expected).double().square().sum())
            norm += float(expected.double().square().sum())
            empty, full = expected.chunk(2)
            guided = empty + 2.0 * (full - empty)
            latents = scheduler.step(guided, t, latents).prev_sample
    return error / norm


@pytest.mark.parametrize(("component", "layer"), [("unet", UNET), ("text_encoder", TEXT)])
def test_the_loss_is_the_relative_error_of_the_prediction(
    tiny_source: Bundle, calibrator: Calibrator, losses: Losses, component: str, layer: str
) -> None:
    weight = _weight(calibrator, component, layer)
    half = weight.masked_fill(weight.abs() < weight.abs().median(), 0.0)

    def change(pipeline: Any) -> None:
        with torch.no_grad():
            find_module(getattr(pipeline, component), layer).weight.copy_(half)

    found = losses.of(component, layer, half)
    assert found == pytest.approx(_by_hand(tiny_source, change), rel=1e-3)
    assert found > 1e-9


@pytest.mark.parametrize(("component", "layer"), [("unet", UNET), ("text_encoder", TEXT)])
def test_the_weight_is_put_back(
    calibrator: Calibrator, losses: Losses, component: str, layer: str
) -> None:
    weight = _weight(calibrator, component, layer)
    worse = losses.of(component, layer, torch.zeros_like(weight))
    assert torch.equal(_weight(calibrator, component, layer), weight)
    assert losses.of(component, layer, weight) == 0 < worse


def test_the_weight_is_put_back_where_it_breaks_the_model(
    calibrator: Calibrator, losses: Losses
) -> None:
    weight = _weight(calibrator, "unet", UNET)
    with pytest.raises(InputError, match=f"unet/{UNET}: expected a finite prediction"):
        losses.of("unet", UNET, weight * float("nan"))
    assert torch.equal(_weight(calibrator, "unet", UNET), weight)


def test_without_guidance_there_is_one_branch(tiny_source: Bundle) -> None:
    settings = SETTINGS.model_copy(update={"guidance": 1.0, "steps": 1, "prompts": ("a cat",)})
    calibrator = Calibrator(tiny_source, settings)
    losses = Losses(calibrator)
    weight = _weight(calibrator, "text_encoder", TEXT)
    assert losses.of("text_encoder", TEXT, weight) == 0
    assert losses.of("text_encoder", TEXT, 0 * weight) > 0


def test_layers_that_no_prediction_shows_are_refused(losses: Losses) -> None:
    with pytest.raises(UsageError, match=r"vae/decoder.conv_in.weight: expected a layer of unet"):
        losses.of("vae", "decoder.conv_in.weight", torch.zeros(1))
    with pytest.raises(InputError, match="unet/nowhere.weight|nowhere.weight: the loaded model"):
        losses.of("unet", "nowhere.weight", torch.zeros(1))


def test_a_layer_that_is_not_used_is_refused(calibrator: Calibrator, losses: Losses) -> None:
    calibrator.pipeline.unet.register_module("idle", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="unet/idle.weight: expected activations, found none"):
        losses.of("unet", "idle.weight", torch.zeros(2, 2))


def test_a_model_that_predicts_nan_is_refused(tiny_source: Bundle) -> None:
    calibrator = Calibrator(tiny_source, SETTINGS.model_copy(update={"steps": 1}))
    weight = _weight(calibrator, "unet", UNET)
    calibrator.replace("unet", UNET, weight * float("nan"))
    with pytest.raises(InputError, match="unet: expected finite predictions, found NaN"):
        Losses(calibrator)


def test_a_few_are_chosen_from_the_middles() -> None:
    assert middles(20, 4) == [2, 7, 12, 17]
    assert middles(128, 8) == [8, 24, 40, 56, 72, 88, 104, 120]
    assert middles(3, 4) == [0, 1, 2]
    assert middles(1, 4) == [0]
    assert middles(5, 4) == [0, 1, 3, 4]
