"""What each metric says of pictures whose answer is known, and why where it cannot run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from sdcompress import registry
from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.errors import InputError
from sdcompress.evaluation import metrics
from sdcompress.evaluation.images import psnr
from sdcompress.evaluation.metrics import Batch, Distance, Drift, Score, load_metric, metric_names
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.models.mini_sd2 import WEIGHTS
from sdcompress.models.mini_sd2.scenes import render, sample_prompts

torch = pytest.importorskip("torch")
SETTINGS = QualitySettings(
    prompts=("a red cat", "a cat"), steps=2, guidance=2, metrics=("psnr",), clip="mini-sd2"
)


@pytest.fixture(scope="module")
def mini() -> Bundle:
    return Bundle.of_source(WEIGHTS, SourceRecord(id="mini-sd2", kind="mini-sd2"))


def batch(images: np.ndarray, *prompts: str, **settings: object) -> Batch:
    return Batch(images.astype(np.uint8), prompts, SETTINGS.model_copy(update=settings))


def drift(name: str) -> Drift:
    metric = load_metric(name)
    assert isinstance(metric, Drift)
    return metric


def score(name: str, made: Batch) -> np.ndarray:
    metric = load_metric(name)
    assert isinstance(metric, Score)
    return metric.score(made)


@pytest.mark.parametrize("name", metric_names())
def test_every_metric_keeps_the_contract(name: str, tiny_source: Bundle) -> None:
    metric = load_metric(name)
    assert isinstance(metric, (Drift, Score, Distance))
    assert metric.unit
    assert metric.better in ("higher", "lower")
    assert not isinstance(metric, Distance) or metric.better == "lower"
    assert len(registry.summary(metrics.FOLDER, name)) in range(20, 90)
    why = replace(metric, packages={"nowhere_to_be_found": "pip install x"}).missing()
    assert why == "install it with `pip install x`"
    given = SETTINGS.model_copy(update={"clip": "/no/such/clip"})
    reason = metric.why_not(given, tiny_source)
    assert reason is None or re.search("pass |install |pixels only", reason), reason


def test_all_kinds_of_metrics_are_there() -> None:
    names = "clip_distance clip_score inception_fid lpips prompt_accuracy psnr ssim"
    assert metric_names() == names.split()


def test_listing_them_says_what_is_missing_and_imports_nothing_heavy() -> None:
    code = """
import sys
from sdcompress.commands import cli
cli.main(["list", "metrics", "--json"], standalone_mode=False)
heavy = {"torch", "numpy", "transformers", "torchmetrics", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    items = {item["name"]: item for item in json.loads(done.stdout)["items"]}
    assert list(items) == metric_names()
    assert items["psnr"]["problem"] is None
    for name in ("lpips", "inception_fid"):
        assert items[name]["problem"] == load_metric(name).missing()


# Drifts ---------------------------------------------------------------------------------------


def noisy(seed: int, n: int = 3, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def test_psnr_of_known_errors() -> None:
    dense = np.full((4, 8, 8, 3), 100)
    made = dense + np.array([0, 1, 10, 100]).reshape(4, 1, 1, 1)
    values = drift("psnr").between(batch(made), batch(dense))
    # 20·log10(255 / error); identical pictures have the cap.
    np.testing.assert_allclose(values, [100.0, 48.1308, 28.1308, 8.1308], atol=1e-4)


def test_psnr_is_that_of_two_pictures() -> None:
    a, b = noisy(0), noisy(1)
    values = drift("psnr").between(batch(a), batch(b))
    single = [psnr(Image.fromarray(x), Image.fromarray(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(values, single)


def test_ssim_of_identical_inverted_and_shifted_pictures() -> None:
    ssim = drift("ssim").between
    a = noisy(0)
    np.testing.assert_allclose(ssim(batch(a), batch(a)), 1, atol=1e-6)
    assert (ssim(batch(255 - a), batch(a)) < -0.5).all()
    # Of flat pictures only the luminance is left: (2ab + c) / (a² + b² + c), c = (0.01·255)².
    flat = np.ones((1, 16, 16, 3))
    expected = (2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2)
    # Variances are differences of large numbers, in fp32.
    np.testing.assert_allclose(ssim(batch(100 * flat), batch(150 * flat)), expected, atol=5e-4)
    assert len(ssim(batch(a[:1]), batch(a[:1]))) == 1


@pytest.fixture
def untrained_alexnet(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """torchmetrics' LPIPS with a seeded AlexNet in the place of torchvision's."""
    from torch.nn import Conv2d, MaxPool2d, ReLU, Sequential

    from sdcompress.evaluation.metrics import lpips

    torchmetrics = pytest.importorskip("torchmetrics")
    import torchmetrics.functional.image.lpips as functional
    import torchmetrics.image.lpip as modular

    def features(net: str, pretrained: bool = False) -> Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Sequential(
                *(Conv2d(3, 64, 11, 4, 2), ReLU(), MaxPool2d(3, 2)),
                *(Conv2d(64, 192, 5, padding=2), ReLU(), MaxPool2d(3, 2)),
                *(Conv2d(192, 384, 3, padding=1), ReLU(), Conv2d(384, 256, 3, padding=1), ReLU()),
                *(Conv2d(256, 256, 3, padding=1), ReLU()),
            )

    monkeypatch.setattr(functional, "_get_tv_model_features", features)
    monkeypatch.setattr(modular, "_TORCHVISION_AVAILABLE", True)
    lpips._network.cache_clear()
    yield torchmetrics
    lpips._network.cache_clear()


def test_lpips_of_nearer_pictures_is_less(untrained_alexnet: ModuleType) -> None:
    a, noise = noisy(0, 2) // 2, noisy(1, 2)
    between = drift("lpips").between
    same, near, far = (between(batch(a + share * noise), batch(a)) for share in (0, 0.1, 0.5))
    np.testing.assert_allclose(same, 0, atol=1e-7)
    assert same.shape == near.shape == far.shape == (2,)
    assert (near > 0).all()
    assert (far > near).all()


def test_lpips_says_what_it_lacks(tiny_source: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdcompress.evaluation.metrics import lpips

    metric = load_metric("lpips")
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "torchvision" else name)
    assert metric.missing() == "install it with `pip install 'sdcompress[lpips]'`"
    monkeypatch.setattr(metrics, "find_spec", lambda name: name)
    why = metric.why_not(SETTINGS, tiny_source)  # 16 pixels
    assert why == "needs 64 pixels a side, found 16; pass --height and --width"
    large = SETTINGS.model_copy(update={"height": 64, "width": 64})

    def fail() -> None:
        raise InputError("lpips: torchvision cannot fetch the weights of AlexNet; choose others")

    monkeypatch.setattr(lpips, "_network", fail)  # before pictures are made, not after
    assert (metric.why_not(large, tiny_source) or "").startswith("torchvision cannot fetch")
    monkeypatch.setattr(lpips, "_network", lambda: None)
    assert metric.why_not(large, tiny_source) is None


# CLIP -----------------------------------------------------------------------------------------


def test_clip_prefers_the_right_caption_and_is_a_cosine() -> None:
    prompts = sample_prompts(8, None, "train", 9)
    pictures = render([scene for scene, _ in prompts], 9)
    texts = [text for _, text in prompts]
    right = batch(pictures, *texts)
    wrong = batch(pictures, *texts[1:], texts[0])
    assert (score("clip_score", right) > score("clip_score", wrong)).mean() >= 7 / 8

    from transformers import CLIPModel, CLIPProcessor

    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(WEIGHTS / "clip", use_fast=False)
    inputs = processor(text=texts, images=list(pictures), padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip(**inputs)
        cosines = (out.logits_per_image / clip.logit_scale.exp()).diagonal().numpy()
    np.testing.assert_allclose(score("clip_score", right), cosines, atol=1e-5)


def test_clip_embeds_a_batch_of_pictures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdcompress.evaluation.metrics import _clip

    calls = []
    embed = _clip._embed_images
    monkeypatch.setattr(_clip, "_embed_images", lambda b: calls.append(b) or embed(b))
    made = batch(noisy(0, 2), "a cat", "a red cat")
    metric = load_metric("clip_distance")
    assert isinstance(metric, Distance)
    assert metric.features(made).shape == (2, 64)
    score("clip_score", made)
    assert len(calls) == 1


def test_a_long_prompt_is_cut_for_clip() -> None:
    made = batch(noisy(0, 1), "a large red circle " * 40)
    assert np.isfinite(score("clip_score", made)).all()


def test_a_long_prompt_is_cut_though_the_tokenizer_does_not_know_where(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(WEIGHTS / "clip", clip)
    config = json.loads((clip / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (clip / "tokenizer_config.json").write_text(json.dumps(config))
    made = noisy(0, 1), "a large red circle " * 40
    found = score("clip_score", batch(*made, clip=str(clip)))
    np.testing.assert_array_equal(found, score("clip_score", batch(*made)))


def test_a_clip_that_cannot_be_had(tmp_path: Path, tiny_source: Bundle) -> None:
    metric = load_metric("clip_score")
    (tmp_path / "config.json").write_text("{}")
    for name, expected in ((str(tmp_path), "not a CLIPModel"), ("/no/such", "no such directory")):
        why = metric.why_not(SETTINGS.model_copy(update={"clip": name}), tiny_source)
        assert why is not None
        assert why.startswith(f"--clip {name}: {expected}")
        assert "pass" in why


def test_a_clip_is_fetched_once_and_without_what_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    from sdcompress.evaluation.metrics._clip import _directory

    asked = []

    class Info:
        sha = "c0ffee"
        siblings = tuple(
            type("Sibling", (), {"rfilename": f}) for f in ("pytorch_model.bin", "tf.h5")
        )

    def download(name: str, **how: object) -> str:
        if how.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing there")
        asked.append((name, how))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name: Info)
    assert _directory("someone/clip") == tmp_path
    patterns = ["*.json", "*.txt", "pytorch_model.bin"]
    assert asked == [("someone/clip", {"revision": "c0ffee", "allow_patterns": patterns})]


# The oracle -----------------------------------------------------------------------------------


def test_prompt_accuracy_counts_pictures_that_show_their_prompt() -> None:
    prompts = sample_prompts(6, None, "heldout", 1)
    pictures = render([scene for scene, _ in prompts], 1)
    texts = [text for _, text in prompts]
    assert score("prompt_accuracy", batch(pictures, *texts)).tolist() == [1.0] * 6
    pictures[2] = 0
    swapped = [texts[1], texts[0], *texts[2:]]
    expected = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert score("prompt_accuracy", batch(pictures, *swapped)).tolist() == expected


def test_prompt_accuracy_names_the_first_prompt_it_cannot_judge(mini: Bundle) -> None:
    metric = load_metric("prompt_accuracy")
    caption = "a small red circle on a white background"
    settings = SETTINGS.model_copy(update={"prompts": (caption, "an owl", "a dog")})
    why = metric.why_not(settings, mini)
    assert why == "reads mini-sd2's scenes only, and 'an owl' describes none; pass other --prompts"
    fitting = settings.model_copy(update={"prompts": (caption, caption)})
    assert metric.why_not(fitting, mini) is None
    why = metric.why_not(fitting.model_copy(update={"width": 128}), mini)
    assert why == "reads pictures of 64×64 pixels only, found 128×64"


# Inception ------------------------------------------------------------------------------------


def test_the_inception_network_is_torchmetrics_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdcompress.evaluation.metrics import inception_fid

    fid = pytest.importorskip("torchmetrics.image.fid")
    made = {}

    class Network(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, name: str, **how: object) -> None:
            super().__init__()
            made.update(how, name=name)
            if how["feature_extractor_weights_path"] == "broken":
                raise RuntimeError("not a zip file")

    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Network)
    load = inception_fid._network.__wrapped__
    assert isinstance(load("weights.pth"), Network)
    assert made["features_list"] == ["2048"]
    assert made["feature_extractor_weights_path"] == "weights.pth"
    with pytest.raises(InputError, match="from broken .not a zip file.; pass --inception-weights"):
        load("broken")


def test_inception_fid_says_what_to_pass(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress.evaluation.metrics import inception_fid

    metric = load_metric("inception_fid")
    monkeypatch.setattr(metrics, "find_spec", lambda name: name)
    why = metric.why_not(SETTINGS, tiny_source)
    assert why == "compares with real images: pass --real-images DIR or --real-statistics FILE"
    np.savez(tmp_path / "coco.npz", mu=np.zeros(3), sigma=np.eye(3))
    given = SETTINGS.model_copy(update={"real_statistics": str(tmp_path / "coco.npz")})

    def fail(weights: str | None) -> None:
        raise InputError("the Inception network cannot be loaded; pass --inception-weights FILE")

    # All of it before pictures are made, which takes hours.
    monkeypatch.setattr(inception_fid, "_network", fail)
    assert "pass --inception-weights" in (metric.why_not(given, tiny_source) or "")
    monkeypatch.setattr(inception_fid, "_network", lambda weights: None)
    assert metric.why_not(given, tiny_source) is None
    for name, message in (
        ("real_statistics", "none: expected an .npz"),
        ("real_images", "none: expected a folder of images, found 0"),
    ):
        wrong = SETTINGS.model_copy(update={name: str(tmp_path / "none")})
        assert message in (metric.why_not(wrong, tiny_source) or "")


def test_statistics_of_a_folder_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress.evaluation.metrics import inception_fid

    sizes = []

    def network(weights: str | None) -> object:
        return lambda pixels: sizes.append(tuple(pixels.shape)) or pixels.double().mean((2, 3))

    monkeypatch.setattr(inception_fid, "_network", network)
    folder = tmp_path / "real"
    (folder / "more").mkdir(parents=True)
    pictures = [noisy(i, 1, 8 + 8 * (i % 2))[0] for i in range(7)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / ("more" if i % 3 else ".") / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    settings = SETTINGS.model_copy(update={"real_images": str(folder), "batch": 2})
    reference = load_metric("inception_fid").reference  # type: ignore[union-attr]
    assert reference is not None
    found = reference(settings, tmp_path / "work")
    means = np.array([p.mean((0, 1)) for p in pictures])
    np.testing.assert_allclose(found.mean, means.mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(means.T))
    assert found.count == 7
    assert sorted(sizes) == [(1, 3, 16, 16), (2, 3, 8, 8), (2, 3, 8, 8), (2, 3, 16, 16)]
    again = reference(settings, tmp_path / "work")
    assert len(sizes) == 4
    np.testing.assert_array_equal(again.covariance, found.covariance)
    assert again.count == 7
    Image.fromarray(pictures[0][::-1]).save(folder / "0.png")
    reference(settings, tmp_path / "work")
    assert len(sizes) == 8
    weights = tmp_path / "weights.pth"
    for count, data in ((12, b"one"), (12, b"one"), (16, b"two")):  # under the same name
        weights.write_bytes(data)
        given = settings.model_copy(update={"inception_weights": str(weights)})
        reference(given, tmp_path / "work")
        assert len(sizes) == count

    (folder / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="1.jpg: a broken image"):
        reference(settings, tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    empty = settings.model_copy(update={"real_images": str(tmp_path / "empty")})
    with pytest.raises(InputError, match="expected a folder of images, found 0"):
        reference(empty, tmp_path)


def test_real_images_of_many_sizes_are_held_a_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress.evaluation.metrics import inception_fid

    for i in range(12):
        Image.fromarray(noisy(i, 1, 8 + i // 3)[0]).save(tmp_path / f"{i % 3}-{i}.png")
    read: list[Path] = []
    pixels = inception_fid._pixels
    monkeypatch.setattr(inception_fid, "_pixels", lambda f: read.append(f) or pixels(f))
    shapes = []
    for found in inception_fid._same_sizes(sorted(tmp_path.iterdir()), 2):
        shapes.append(found.shape[:2])
        assert len(read) == sum(n for n, _ in shapes)
    assert shapes == [(n, side) for side in (8, 9, 10, 11) for n in (2, 1)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "expected an .npz with the arrays mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"found \(3,\) and \(2, 2\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "NaN or infinity"),
        (None, "expected an .npz"),
    ],
)
def test_statistics_that_are_none(
    tmp_path: Path, arrays: dict[str, np.ndarray] | None, message: str
) -> None:
    from sdcompress.evaluation.metrics.inception_fid import read_statistics

    file = tmp_path / "statistics.npz"
    if arrays is None:
        file.write_bytes(b"PK no zip")
    else:
        np.savez(file, **arrays)
    with pytest.raises(InputError, match=message):
        read_statistics(file)
