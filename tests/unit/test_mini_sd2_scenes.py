"""The scenes mini-sd2 was trained on: captions, splits, tokenizer, renderer."""

from __future__ import annotations

import numpy as np
import pytest

from sdcompress.models.mini_sd2 import WEIGHTS
from sdcompress.models.mini_sd2.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PHRASINGS,
    VALIDATION,
    Scene,
    Thing,
    caption,
    coverage,
    read_caption,
    render,
    sample_prompts,
    sample_scenes,
    split_of,
    words,
)

PAIR = Scene(
    (Thing("red", "circle", "large"), Thing("blue", "square", "small")), "left of", "white"
)


def test_captions_are_these() -> None:
    assert caption(PAIR) == "a large red circle left of a small blue square on a white background"
    assert (
        caption(PAIR, 5) == "a small blue square right of a large red circle on a white background"
    )
    single = Scene((Thing("pink", "bar", "small"),), None, "black")
    assert caption(single, 4) == "on black: a small pink bar"
    assert caption(single, 9) == caption(single, 4)


def test_converse_twice_is_the_same_scene() -> None:
    assert PAIR.converse() != PAIR
    assert PAIR.converse().converse() == PAIR


def test_sampling_repeats_for_a_seed_and_differs_between_seeds() -> None:
    assert sample_prompts(50, None, "train", 3) == sample_prompts(50, None, "train", 3)
    assert sample_prompts(50, None, "train", 3) != sample_prompts(50, None, "train", 4)


@pytest.mark.parametrize("objects", [None, 1, 2])
def test_splits_share_no_combination(objects: int | None) -> None:
    for scene in sample_scenes(500, objects, "train", 0):
        pairs = {(t.colour, t.shape) for t in scene.things}
        assert not pairs & (HELD_OUT | VALIDATION)
    for split in ("validation", "heldout"):
        for scene in sample_scenes(200, objects, split, 0):
            assert split_of(scene) == split


def test_training_still_shows_every_colour_and_every_shape_often() -> None:
    assert not HELD_OUT & VALIDATION
    absent = HELD_OUT | VALIDATION
    assert all(sum(c == colour for c, _ in absent) <= 1 for colour in COLOURS)
    assert all(sum(s == shape for _, s in absent) <= 2 for _, shape in absent)


def test_objects_of_a_pair_differ_in_colour() -> None:
    for scene in sample_scenes(300, 2, "heldout", 0):
        assert scene.things[0].colour != scene.things[1].colour


def test_each_word_is_one_token_and_any_text_encodes() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    for word in words():
        assert len(tokenizer(word).input_ids) == 3, word
    for phrasing in range(2 * len(PHRASINGS)):
        text = caption(PAIR, phrasing)
        spaced = text.replace(",", " ,").replace(":", " :").split()
        ids = tokenizer(text).input_ids
        assert len(ids) == len(spaced) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(ids[1:-1]).split() == spaced
    for text in ("", "An astronaut, riding a horse!", "Grüße 日本 🦊 \x00"):
        assert all(0 <= i < len(tokenizer) for i in tokenizer(text).input_ids)


def test_render_places_things_where_the_caption_says() -> None:
    (picture,) = render([PAIR], seed=None)
    assert tuple(picture[0, 0]) == BACKGROUNDS["white"]
    assert tuple(picture[32, 15]) == COLOURS["red"]
    assert tuple(picture[32, 49]) == COLOURS["blue"]
    (mirrored,) = render([PAIR.converse()], seed=None)
    assert np.array_equal(picture, mirrored)


def test_render_depends_on_the_seed_alone() -> None:
    scenes = sample_scenes(10, None, "train", 0)
    assert np.array_equal(render(scenes, 1), render(scenes, 1))
    assert not np.array_equal(render(scenes, 1), render(scenes, 2))


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of circle"):
        coverage("star", 10, np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_captions_are_read_back_in_every_phrasing() -> None:
    for scene in sample_scenes(60, None, "train", 4) + sample_scenes(30, None, "heldout", 4):
        for phrasing in range(len(PHRASINGS)):
            assert read_caption(caption(scene, phrasing)) == scene
        assert read_caption(caption(scene, len(PHRASINGS))) == scene.converse()
    assert read_caption("  A Large RED circle\non a white background ") == Scene(
        (Thing("red", "circle", "large"),), None, "white"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "an owl",
        "a large red circle",
        "a large mauve circle on a white background",
        "a large red circle on a white background, please",
        "a large red circle near a small blue square on a white background",
        "a large red circle left of a small blue square left of a small pink bar on white",
    ],
)
def test_what_is_no_caption(text: str) -> None:
    assert read_caption(text) is None
