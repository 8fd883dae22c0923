"""An engine paints the pictures diffusers paints with the same weights, prompts and seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.backends import Runner, open_component
from export.pipeline import Geometry, check_sizes, generate, tokenize
from export.specs import COMPONENTS
from sdcompress.bundle import Bundle
from sdcompress.errors import UsageError, VerificationError
from sdcompress.evaluation.images import generate_from_weights, psnr, save, to_picture

PROMPTS = ("a red cat", "a cat")
SEEDS = (1, 2)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
def test_an_engine_paints_what_diffusers_paints(
    engine: Bundle, tiny_sd: Path, guidance: float
) -> None:
    ours = generate(engine.path, PROMPTS, SEEDS, steps=3, guidance=guidance)
    theirs = generate_from_weights(tiny_sd, PROMPTS, SEEDS, steps=3, guidance=guidance)
    for a, b in zip(ours, theirs, strict=True):
        assert a.size == (16, 16)
        assert (psnr(a, b) or 100) >= 60


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "leading"},
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    ],
    ids=lambda config: config["_class_name"],
)
def test_every_scheduler_of_a_model_is_served(
    engine: Bundle, tiny_sd: Path, tmp_path: Path, scheduler: dict[str, Any]
) -> None:
    folders = []
    for source in (engine.path, tiny_sd):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **scheduler}))
        index = folder / "model_index.json"
        named = {
            **json.loads(index.read_text()),
            "scheduler": ["diffusers", scheduler["_class_name"]],
        }
        index.write_text(json.dumps(named))
        folders.append(folder)
    ours = generate(folders[0], PROMPTS[:1], SEEDS[:1], steps=2, guidance=1.0)
    theirs = generate_from_weights(folders[1], PROMPTS[:1], SEEDS[:1], steps=2, guidance=1.0)
    assert (psnr(ours[0], theirs[0]) or 100) >= 60


def test_a_picture_does_not_depend_on_its_neighbours(engine: Bundle) -> None:
    both = generate(engine.path, PROMPTS, SEEDS, steps=2)
    alone = generate(engine.path, PROMPTS[1:], SEEDS[1:], steps=2)
    assert psnr(both[1], alone[0]) is None


def test_one_component_at_a_time_gives_the_same_pictures(
    engine: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Loud(Recorded):
        log = events

    monkeypatch.setattr(
        "export.pipeline.open_component", lambda p, c: Loud(open_component(p, c), c)
    )
    resident = generate(engine.path, PROMPTS, SEEDS, steps=2)
    loaded, closed = [f"load {c}" for c in COMPONENTS], [f"close {c}" for c in COMPONENTS]
    assert events == loaded + closed[::-1]
    events.clear()
    sequential = generate(engine.path, PROMPTS, SEEDS, steps=2, residency="sequential")
    assert events == [event for pair in zip(loaded, closed, strict=True) for event in pair]
    for a, b in zip(resident, sequential, strict=True):
        assert a.tobytes() == b.tobytes()


def test_prompt_seed_and_negative_prompt_matter(engine: Bundle) -> None:
    def one(prompt: str = "a cat", seed: int = 0, **more: Any) -> Any:
        return generate(engine.path, [prompt], [seed], steps=2, **more)[0]

    reference = one()
    assert psnr(reference, one()) is None
    for other in (one(prompt="zzz"), one(seed=1), one(negative_prompt="zzz")):
        assert psnr(reference, other) is not None


def test_sizes_other_than_the_default(engine: Bundle, tiny_sd: Path) -> None:
    size = {"height": 24, "width": 32}
    ours = generate(engine.path, PROMPTS[:1], SEEDS[:1], steps=2, **size)
    theirs = generate_from_weights(tiny_sd, PROMPTS[:1], SEEDS[:1], steps=2, **size)
    assert ours[0].size == (32, 24)
    assert (psnr(ours[0], theirs[0]) or 100) >= 60


@pytest.mark.parametrize("height", [-4, 0, 17])
def test_sizes_that_do_not_fit_are_refused(engine: Bundle, height: int) -> None:
    with pytest.raises(UsageError, match="multiple of 4"):
        generate(engine.path, PROMPTS, SEEDS, height=height)


FIXED = {"images": 1, "guided": True, "height": None, "width": 24}


def test_an_engine_of_fixed_shapes_takes_only_those(engine: Bundle) -> None:
    geometry = Geometry.read(engine.path)
    check_sizes({}, geometry, 1.0, 40, 40)
    check_sizes({"sizes": None}, geometry, 1.0, 40, 40)
    check_sizes({"sizes": FIXED}, geometry, 7.5, 16, 24)
    with pytest.raises(UsageError) as caught:
        check_sizes({"sizes": FIXED}, geometry, 1.0, 32, 24)
    assert str(caught.value) == (
        "the engine was built for 1 picture at once of 16×24 pixels with guidance, asked is 1 "
        "picture at once of 32×24 pixels without guidance; build it again with --height 32 "
        "--width 24 --no-guidance, or ask for what it was built for"
    )
    with pytest.raises(
        UsageError, match="4 pictures at once .* --height 16 --width 24 --guidance,"
    ):
        check_sizes({"sizes": {**FIXED, "images": 4}}, geometry, 7.5, 16, 24)


def test_an_engine_that_cannot_run_here_is_refused(
    engine: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.backends.onnxruntime import OnnxRuntimeBackend

    monkeypatch.setattr(OnnxRuntimeBackend, "why_not_run", lambda *_: "no such GPU; get one")
    with pytest.raises(UsageError, match="cannot run here: no such GPU; get one"):
        generate(engine.path, PROMPTS[:1], SEEDS[:1], steps=1)


@pytest.mark.parametrize(
    ("prompts", "seeds", "steps"), [((), (), 2), (("a",), (1, 2), 2), (("a",), (1,), 0)]
)
def test_requests_that_make_no_picture_are_refused(
    engine: Bundle, prompts: tuple[str, ...], seeds: tuple[int, ...], steps: int
) -> None:
    with pytest.raises(UsageError):
        generate(engine.path, prompts, seeds, steps=steps)


def test_progress_counts_pictures(engine: Bundle) -> None:
    seen: list[tuple[int, int]] = []
    generate(engine.path, PROMPTS, SEEDS, steps=1, progress=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]


def test_a_prompt_that_is_too_long_is_cut_and_said(engine: Bundle) -> None:
    with pytest.warns(UserWarning, match="is cut off"):
        ids = tokenize(engine.path, ["cat " * 100])
    assert ids.shape == (1, 77)


def test_geometry(engine: Bundle) -> None:
    geometry = Geometry.read(engine.path)
    assert geometry.latent_shape(None, None) == (4, 8, 8)
    assert geometry.latent_shape(32, 16) == (4, 16, 8)


class Recorded(Runner):
    """A component that notes when it is loaded and closed."""

    log: list[str]

    def __init__(self, runner: Runner, name: str) -> None:
        self._runner, self._name = runner, name

    def load(self) -> None:
        self.log.append(f"load {self._name}")
        self._runner.load()
        self.inputs, self.outputs = self._runner.inputs, self._runner.outputs

    def close(self) -> None:
        self.log.append(f"close {self._name}")
        self._runner.close()

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._runner.infer(feeds)


class Poisoned(Runner):
    """A UNet whose second answer is NaN."""

    def __init__(self, unet: Runner) -> None:
        self._unet, self._calls = unet, 0

    def load(self) -> None:
        self._unet.load()
        self.inputs, self.outputs = self._unet.inputs, self._unet.outputs

    def close(self) -> None:
        self._unet.close()

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._calls += 1
        factor = np.nan if self._calls == 2 else 1
        return {name: factor * value for name, value in self._unet.infer(feeds).items()}


def test_nan_names_the_component_and_the_step(
    engine: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_poisoned(path: Path, component: str) -> Runner:
        runner = open_component(path, component)
        return Poisoned(runner) if component == "unet" else runner

    monkeypatch.setattr("export.pipeline.open_component", open_poisoned)
    with pytest.raises(VerificationError, match="unet: gave NaN or infinity at step 2 of 3"):
        generate(engine.path, PROMPTS[:1], SEEDS[:1], steps=3)


def test_a_black_picture_is_an_error() -> None:
    with pytest.raises(VerificationError, match="black all over.*overflow.*--calibrate") as caught:
        to_picture(np.full((3, 4, 4), -1.0))
    assert caught.value.exit_code == 3
    almost = np.full((3, 4, 4), -1.0)
    almost[0, 0, 0] = -0.99
    assert np.asarray(to_picture(almost)).sum() == 1


def test_psnr() -> None:
    a, b = (to_picture(np.full((3, 4, 4), v)) for v in (1.0, 0.0))
    assert psnr(a, a) is None
    assert psnr(a, b) == pytest.approx(20 * np.log10(255 / 127))
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(a, a.resize((2, 2)))


def test_saved_pictures_say_what_they_show(tmp_path: Path) -> None:
    save([to_picture(np.ones((3, 4, 4)))], tmp_path / "images", ["a cat"], [5], steps=3)
    listed = json.loads((tmp_path / "images" / "prompts.json").read_text())
    assert listed["pictures"] == [{"file": "00.png", "prompt": "a cat", "seed": 5}]
    assert listed["settings"] == {"steps": 3}
    assert (tmp_path / "images" / "00.png").exists()
