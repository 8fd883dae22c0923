"""Settings, limits and the whole evaluation of a tiny pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation import metrics
from sdcompress.evaluation import quality as quality_module
from sdcompress.evaluation.images import generate_from_weights, psnr
from sdcompress.evaluation.metrics import inception_fid
from sdcompress.evaluation.presets import RAMESH_ZHAO, preset_settings, read_captions
from sdcompress.evaluation.quality import (
    Estimate,
    MetricResult,
    Quality,
    QualitySettings,
    default_settings,
    evaluate,
    holds,
    margin,
    unavailable,
)
from sdcompress.models.mini_sd2 import WEIGHTS
from tests.tiny_sd import make_tiny_sd

pytest.importorskip("torch")
PROMPTS = ("a red cat", "a cat", "red", "at", "a red at", "cat")
SETTINGS = QualitySettings(
    prompts=PROMPTS, steps=2, guidance=3.0, batch=4, metrics=("psnr", "clip_score"), clip="mini-sd2"
)


@pytest.fixture(scope="module")
def mini() -> Bundle:
    return Bundle.of_source(WEIGHTS, SourceRecord(id="mini-sd2", kind="mini-sd2"))


# Settings -------------------------------------------------------------------------------------


def test_settings_of_mini_sd2(mini: Bundle) -> None:
    settings = default_settings(mini, 10)
    assert len(set(settings.prompts)) == 10
    assert (settings.steps, settings.guidance, settings.clip) == (20, 2.0, "mini-sd2")
    assert {"psnr", "clip_score", "clip_distance", "prompt_accuracy"} <= set(settings.metrics)
    assert not set(settings.metrics) & set(unavailable(settings, mini))
    assert "inception_fid" in unavailable(settings, mini)
    assert len(default_settings(mini, metrics=["psnr"]).prompts) == 400


def test_settings_of_another_model(tiny_source: Bundle) -> None:
    settings = default_settings(
        tiny_source, 3, prompts=PROMPTS, metrics=["ssim"], steps=4, guidance=None, seed=3
    )
    assert settings.prompts == PROMPTS[:3]
    assert (settings.steps, settings.guidance, settings.seed) == (4, 7.5, 3)
    assert settings.clip == "openai/clip-vit-base-patch32"
    assert settings.metrics == ("ssim",)
    assert default_settings(tiny_source, prompts=PROMPTS, metrics=["ssim"]).prompts == PROMPTS


@pytest.mark.parametrize(
    ("samples", "given", "message"),
    [
        (1, {}, "1 samples have no spread"),
        (7, {"prompts": PROMPTS}, "7 samples need as many prompts, found 6"),
        (None, {"prompts": ["one"]}, "2 samples need as many prompts, found 1"),
        (2, {"metrics": ["psnr", "pnsr"]}, "no metric 'pnsr'; there are clip_distance, "),
        (2, {"prompts": ["a", "\udcff"]}, "not valid text"),
        (2, {"prompts": PROMPTS, "steps": 0}, "0 steps"),
    ],
)
def test_what_cannot_be_measured(
    mini: Bundle, samples: int | None, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        default_settings(mini, samples, **{"metrics": ["psnr"], **given})


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "m", "--against", "m"],
        ["sweep", "m", "-o", "o"],
        ["search", "m", "-o", "o", "--keep", "psnr=1"],
    ],
)
def test_numbers_that_no_picture_has_are_refused_where_they_are_typed(command: list[str]) -> None:
    from click import BadParameter

    from sdcompress.commands import cli

    for option, number in (("--seed", 1 << 33), ("--steps", 1001)):
        with pytest.raises(BadParameter, match="not in the range"):
            cli.main([*command, option, str(number)], standalone_mode=False)


def test_pictures_of_a_few_prompts_over_again_are_no_sample_of_prompts(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    assert quality_module._repeated(("a", "b", "a")) == ()  # as it comes in random draws
    settings = SETTINGS.model_copy(update={"prompts": PROMPTS[:2] * 2, "metrics": ("psnr",)})
    found = evaluate(tiny_source, tiny_source, settings, work=tmp_path).metrics["psnr"]
    assert found.warnings == (
        "4 pictures of 2 prompts: the interval takes each for one of its own and is too narrow for "
        "other prompts; pass --prompts with 4",
    )


# The study's protocol -------------------------------------------------------------------------


def coco(path: Path, count: int) -> Path:
    captions = [{"id": i, "image_id": i, "caption": f"picture\n {i} "} for i in range(count)]
    path.write_text(json.dumps({"annotations": captions[::-1], "images": []}))
    return path


def test_captions_from_either_kind_of_file(tmp_path: Path) -> None:
    assert read_captions(coco(tmp_path / "c.json", 3)) == ("picture 0", "picture 1", "picture 2")
    (tmp_path / "c.txt").write_text("one\n\n two \n")
    assert read_captions(tmp_path / "c.txt") == ("one", "two")
    (tmp_path / "bad.json").write_text('{"annotations": [{"id": 1}]}')
    (tmp_path / "none.json").write_text('{"annotations": []}')
    messages = {
        "bad.json": "KeyError: 'caption'",
        "none.json": "found none",
        "gone.json": "FileNotFoundError",
        "gone.txt": "gone.txt: expected a text file",
    }
    for name, message in messages.items():
        with pytest.raises(UsageError, match=message):
            read_captions(tmp_path / name)


def test_the_protocol_of_the_study(tiny_source: Bundle, tmp_path: Path) -> None:
    captions = read_captions(coco(tmp_path / "captions.json", 10_500))
    settings = preset_settings(
        RAMESH_ZHAO, tiny_source, None, prompts=captions, real_statistics="coco.npz", seed=0
    )
    assert len(set(settings.prompts)) == 10_000
    assert set(settings.prompts) < set(captions)
    assert settings.prompts[:2] != captions[:2]
    assert set(settings.metrics) == {"clip_score", "inception_fid"}
    assert (settings.clip, settings.dtype) == ("openai/clip-vit-base-patch32", "fp16")
    again = preset_settings(
        RAMESH_ZHAO, tiny_source, 20, prompts=captions, real_images="coco", seed=1, dtype="fp32"
    )
    assert len(again.prompts) == 20
    assert again.prompts != settings.prompts[:20]
    assert again.dtype == "fp32"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": None, "real_images": "x"}, "pass --prompts FILE"),
        ({"prompts": PROMPTS}, "--real-images DIR or --real-statistics FILE"),
        ({"prompts": PROMPTS, "real_images": "x"}, "needs 10000 captions, found 6"),
    ],
)
def test_the_protocol_says_what_it_needs(
    tiny_source: Bundle, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        preset_settings(RAMESH_ZHAO, tiny_source, None, **given)


# Limits ---------------------------------------------------------------------------------------


def result(metric: str, model: float, **others: float) -> MetricResult:
    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=value, high=value)

    kind = metrics.load_metric(metric)
    return MetricResult(
        metric=metric,
        unit=kind.unit,
        better=kind.better,
        model=estimate(model),
        samples=2,
        **{name: estimate(value) for name, value in others.items()},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("found", "limit", "expected"),
    [
        (result("clip_score", 0.30, dense=0.32, floor=0.0), 0.9, 0.0375),
        (result("prompt_accuracy", 0.5, dense=1.0), 0.9, -0.4),
        (result("psnr", 22.0, floor=9.0), 20, 2.0),
        (result("ssim", 0.7, floor=0.1), 0.8, -0.1),
        (result("lpips", 0.1, floor=0.7), 0.3, 0.2),
        (result("clip_distance", 3.0, floor=2.0), 2.0, 0.5),
        (result("inception_fid", 30.0, dense=18.0, floor=20.0), 1.1, -0.4),
    ],
)
def test_what_a_limit_means(found: MetricResult, limit: float, expected: float) -> None:
    assert margin(found, limit) == pytest.approx(expected)
    assert holds(found, limit) == (expected > 0)


def test_a_limit_in_proportion_to_nothing() -> None:
    with pytest.raises(UsageError, match="found 0.0; choose another metric"):
        holds(result("prompt_accuracy", 0.0, dense=0.0), 0.9)
    assert holds(result("psnr", 20.0), 20.0)


# The whole ------------------------------------------------------------------------------------


def test_a_model_against_the_dense_one(tiny_sd: Path, tiny_source: Bundle, tmp_path: Path) -> None:
    other = make_tiny_sd(tmp_path / "other", seed=1)
    model = Bundle.of_source(other, SourceRecord(id="other", kind="directory"))
    progress: list[tuple[int, int]] = []
    quality = evaluate(
        model,
        tiny_source,
        SETTINGS,
        work=tmp_path / "work",
        unable={"lpips": "install it"},
        progress=lambda done, total: progress.append((done, total)),
    )
    assert (quality.model, quality.dense) == (model.digest, tiny_source.digest)
    assert quality.unavailable == {"lpips": "install it"}
    assert progress[-1] == (24, 24)
    assert progress == sorted(progress)

    how = {"steps": 2, "guidance": 3.0}
    made = generate_from_weights(other, PROMPTS, range(6), **how)  # type: ignore[arg-type]
    dense = generate_from_weights(tiny_sd, PROMPTS, range(6), **how)  # type: ignore[arg-type]
    floor = generate_from_weights(tiny_sd, PROMPTS, range(6, 12), **how)  # type: ignore[arg-type]
    drift = quality.metrics["psnr"]
    expected = [psnr(a, b) for a, b in zip(made, dense, strict=True)]
    assert drift.values == pytest.approx(expected, abs=0.05)
    assert drift.model.value == pytest.approx(np.mean(drift.values))
    assert drift.model.low <= drift.model.value <= drift.model.high
    assert drift.floor is not None
    apart = [psnr(a, b) for a, b in zip(floor, dense, strict=True)]
    assert drift.floor.value == pytest.approx(np.mean(apart), abs=0.05)  # type: ignore[arg-type]
    assert drift.dense is drift.difference is None

    score = quality.metrics["clip_score"]
    assert score.dense is not None
    assert score.difference is not None
    assert score.difference.value == pytest.approx(
        np.mean(np.subtract(score.values, score.dense_values))
    )
    assert score.model.value - score.dense.value == pytest.approx(score.difference.value)
    assert Quality.model_validate_json(quality.model_dump_json()) == quality

    again = evaluate(model, tiny_source, SETTINGS, work=tmp_path / "work")
    assert again.metrics == quality.metrics


def test_the_dense_model_against_itself(tiny_source: Bundle, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"metrics": ("psnr", "ssim", "clip_distance")})
    quality = evaluate(tiny_source, tiny_source, settings, work=tmp_path)
    assert quality.metrics["psnr"].values == (100.0,) * 6
    assert quality.metrics["ssim"].model.value == pytest.approx(1)
    distance = quality.metrics["clip_distance"]
    assert distance.model.value == pytest.approx(0, abs=1e-9)
    assert distance.floor is not None
    assert distance.floor.value > distance.floor.low >= 0
    assert distance.values == ()
    assert "more than 64 samples" in distance.warnings[0]
    assert len(list((tmp_path / "pictures").iterdir())) == 2  # these seeds and the others


def test_pictures_of_a_model_pruned_too_far_are_counted(
    tiny_sd: Path, tiny_source: Bundle, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    file = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"] = np.full_like(tensors["conv_out.bias"], np.inf)
    save_file(tensors, file)
    model = Bundle.of_source(broken, SourceRecord(id="broken", kind="directory"))
    quality = evaluate(model, tiny_source, SETTINGS, work=tmp_path / "work")
    assert quality.warnings == (
        "the model comes from broken, the dense one from tiny-sd: they may be unrelated",
        "6 of 6 pictures of the model are black all over or not finite",
    )
    assert quality.metrics["psnr"].model.value < 15


def test_a_score_without_any_spread_says_what_it_can_mean(
    tiny_source: Bundle, pruned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = metrics.Score(
        unit="share", better="higher", score=lambda batch: np.ones(len(batch.images))
    )
    monkeypatch.setattr(quality_module, "load_metric", lambda name: same)
    settings = SETTINGS.model_copy(update={"metrics": ("prompt_accuracy",)})
    quality = evaluate(pruned, tiny_source, settings, work=tmp_path)
    found = quality.metrics["prompt_accuracy"]
    assert found.difference == Estimate(value=0, low=0, high=0)
    assert found.warnings == (
        "all 6 values are equal, so resampling shows no spread; at 95 % confidence less than 50.0% "
        "of such pictures differ",
    )
    assert quality.warnings == ()


def test_fid_is_of_both_models_to_the_real_images(
    tiny_source: Bundle, pruned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        inception_fid, "_network", lambda weights: lambda x: x.double().mean((2, 3))
    )
    monkeypatch.setattr(metrics, "find_spec", lambda name: name)
    real = tmp_path / "real"
    real.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(real / f"{i}.png")
    settings = SETTINGS.model_copy(update={"metrics": ("inception_fid",), "real_images": str(real)})
    fid = evaluate(pruned, tiny_source, settings, work=tmp_path / "work").metrics["inception_fid"]
    assert fid.dense is not None
    assert fid.floor is not None
    assert fid.difference is not None
    assert fid.difference.value == pytest.approx(fid.model.value - fid.dense.value)
    assert fid.difference.low < fid.difference.value < fid.difference.high
    assert 0 < fid.dense.value != fid.floor.value
    assert fid.warnings == (
        "3 samples for 3 features: their covariance is not of full rank and the distance is mostly "
        "chance; it needs more than 3 samples",
    )

    np.savez(tmp_path / "wide.npz", mu=np.zeros(4), sigma=np.eye(4))
    wide = settings.model_copy(
        update={"real_images": None, "real_statistics": str(tmp_path / "wide.npz")}
    )
    with pytest.raises(InputError, match="have 4 features, the network 3"):
        evaluate(pruned, tiny_source, wide, work=tmp_path / "work")


def test_what_is_refused_before_any_picture_is_made(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if "torch_f" in name else name)
    wanted = SETTINGS.model_copy(update={"metrics": ("psnr", "inception_fid")})
    with pytest.raises(UsageError, match=r"inception_fid: install it with .*sdcompress\[fid\]"):
        evaluate(tiny_source, tiny_source, wanted, work=tmp_path / "work")
    larger = make_tiny_sd(tmp_path / "larger", unet={"sample_size": 16})
    model = Bundle.of_source(larger, SourceRecord(id="larger", kind="directory"))
    with pytest.raises(UsageError, match=r"32, 32.*16, 16.*cannot be compared"):
        evaluate(model, tiny_source, SETTINGS, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
