"""The oracle reads rendered scenes back, and reads nothing that is not there."""

from __future__ import annotations

import numpy as np
import pytest

from sdcompress.models.mini_sd2.oracle import matches, read_scene
from sdcompress.models.mini_sd2.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    render,
    sample_scenes,
)


@pytest.fixture(scope="module")
def known() -> tuple[list[Scene], list[Scene | None]]:
    scenes = sample_scenes(300, None, "train", 5) + sample_scenes(300, None, "heldout", 5)
    return scenes, [read_scene(p) for p in render(scenes, 5)]


def test_reads_rendered_scenes(known: tuple[list[Scene], list[Scene | None]]) -> None:
    scenes, readings = known
    assert np.mean([matches(s, r) for s, r in zip(scenes, readings, strict=True)]) >= 0.99


def test_other_prompts_do_not_match(known: tuple[list[Scene], list[Scene | None]]) -> None:
    scenes, readings = known
    others = scenes[1:] + scenes[:1]
    assert np.mean([matches(s, r) for s, r in zip(others, readings, strict=True)]) <= 0.10


def test_reads_every_single_thing() -> None:
    scenes = [
        Scene((Thing(colour, shape, size),), None, background)
        for colour in COLOURS
        for shape in SHAPES
        for size in SIZES
        for background in BACKGROUNDS
    ]
    wrong = [s for s, p in zip(scenes, render(scenes, None), strict=True) if read_scene(p) != s]
    assert not wrong


def test_noise_and_blur_of_a_decoder_do_not_matter() -> None:
    scenes = sample_scenes(100, None, "train", 6)
    pictures = render(scenes, 6).astype(np.float32)
    blurred = (pictures + np.roll(pictures, 1, 1) + np.roll(pictures, -1, 1)) / 3
    noisy = blurred + np.random.default_rng(0).normal(0, 5, blurred.shape)
    seen = np.clip(noisy, 0, 255).astype(np.uint8)
    assert np.mean([matches(s, read_scene(p)) for s, p in zip(scenes, seen, strict=True)]) >= 0.97


@pytest.mark.parametrize("seed", range(3))
def test_reads_nothing_in_noise_or_in_an_empty_picture(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert read_scene(noise) is None
    assert read_scene(np.full((64, 64, 3), 245, np.uint8)) is None


def test_one_attribute_wrong_is_no_match() -> None:
    red = Thing("red", "cross", "small")
    scene = Scene((red, Thing("blue", "bar", "large")), "above", "grey")
    reading = read_scene(render([scene], None)[0])
    assert matches(scene, reading)
    assert matches(scene.converse(), reading)
    for other in (
        Scene((red, Thing("blue", "bar", "small")), "above", "grey"),
        Scene((red, Thing("blue", "square", "large")), "above", "grey"),
        Scene((red, Thing("cyan", "bar", "large")), "above", "grey"),
        Scene(scene.things, "below", "grey"),
        Scene(scene.things, "left of", "grey"),
        Scene(scene.things, "above", "black"),
        Scene((red,), None, "grey"),
    ):
        assert not matches(other, reading)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        read_scene(np.zeros((64, 64, 3), np.float32))  # type: ignore[arg-type]
