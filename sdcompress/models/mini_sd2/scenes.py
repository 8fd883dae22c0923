"""The world mini-sd2 was trained on: scenes, their captions, and the renderer.

A scene is one or two coloured shapes on a plain background. Everything a caption says about a
scene (shape, colour and size of each object, relation, background) can be read back from the
picture by `oracle.py`, so whether a generated picture follows its prompt is a fact, not a taste.

All positions and lengths are in pixels of the 64 x 64 picture; x grows to the right, y downwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "bar")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 40),
    "green": (30, 150, 50),
    "cyan": (0, 205, 225),
    "blue": (30, 60, 220),
    "purple": (120, 30, 160),
    "pink": (255, 120, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (135, 135, 135),
    "black": (15, 15, 15),
    "beige": (225, 205, 165),
}
# Diameter of the circle; the other shapes are scaled from it in `coverage`.
SIZES: dict[str, float] = {"small": 16.0, "large": 23.0}
# Relation of the first object to the second -> unit vector from the centre to the first.
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Two objects lie this far from the centre, so that the largest two keep a gap of several pixels.
OFFSET = 17
JITTER = 1

# Combinations no network saw in training (VAE and CLIP included). Each shape appears once.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("green", "circle"),
        ("purple", "square"),
        ("cyan", "triangle"),
        ("orange", "cross"),
        ("pink", "bar"),
    }
)
# Also absent from training; used to choose steps and guidance, so that HELD_OUT stays a test.
VALIDATION: frozenset[tuple[str, str]] = frozenset(
    {("red", "circle"), ("yellow", "square"), ("blue", "bar")}
)

Split = Literal["train", "validation", "heldout"]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """One object: a key of COLOURS, a member of SHAPES, a key of SIZES."""

    colour: str
    shape: str
    size: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object (relation None), or two, the first standing in `relation` to the second."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def converse(self) -> Scene:
        """The same picture told from the other object."""
        if self.relation is None:
            return self
        return Scene(self.things[::-1], CONVERSE[self.relation], self.background)


PHRASINGS = (
    "{what} on a {bg} background",
    "on a {bg} background, {what}",
    "a picture of {what} on {bg}",
    "{what}, {bg} background",
    "on {bg}: {what}",
)


def caption(scene: Scene, phrasing: int = 0) -> str:
    """Put `scene` into words. `phrasing` counts the PHRASINGS, then those of the converse."""
    if (phrasing // len(PHRASINGS)) % 2:
        scene = scene.converse()
    what = f" {scene.relation} ".join(map(str, scene.things))
    return PHRASINGS[phrasing % len(PHRASINGS)].format(what=what, bg=scene.background)


def read_caption(text: str) -> Scene | None:
    """The scene a caption describes, in any of its phrasings; None if it is no such caption."""
    clean = " ".join(text.lower().split())
    return next((s for pattern in _phrasings() if (s := _match(pattern, clean))), None)


@lru_cache(maxsize=1)
def _phrasings() -> list[re.Pattern[str]]:
    def one_of(names: Iterable[str]) -> str:
        return f"({'|'.join(names)})"

    thing = f"a {one_of(SIZES)} {one_of(COLOURS)} {one_of(SHAPES)}"
    what = f"{thing}(?: {one_of(RELATIONS)} {thing})?"
    background = f"(?P<background>{'|'.join(BACKGROUNDS)})"
    return [re.compile(p.format(what=what, bg=background)) for p in PHRASINGS]


def _match(pattern: re.Pattern[str], text: str) -> Scene | None:
    match = pattern.fullmatch(text)
    if match is None:
        return None
    background = match["background"]
    groups = [g for i, g in enumerate(match.groups(), 1) if i != pattern.groupindex["background"]]
    size, colour, shape, relation, *second = groups
    things = (Thing(colour, shape, size),)
    if relation is None:
        return Scene(things, None, background)
    size, colour, shape = second
    return Scene((*things, Thing(colour, shape, size)), relation, background)


def words() -> list[str]:
    """Every word a caption can contain, sorted; each is one token of the tokenizer."""
    found: set[str] = set()
    for text in PHRASINGS:
        found |= set(text.format(what="a", bg="a").replace(",", " ").replace(":", " ").split())
    for group in (SHAPES, COLOURS, BACKGROUNDS, SIZES, RELATIONS):
        for name in group:
            found |= set(name.split())
    return sorted(found)


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to: `heldout` wins over `validation`, both over `train`."""
    pairs = {(t.colour, t.shape) for t in scene.things}
    if pairs & HELD_OUT:
        return "heldout"
    return "validation" if pairs & VALIDATION else "train"


def sample_scenes(n: int, objects: int | None, split: Split, seed: int) -> list[Scene]:
    """Draw `n` scenes with 1 or 2 objects (None: one third have one object), always the same.

    In the splits `validation` and `heldout` every scene has at least one object of that split's
    combinations; its partner, if any, is of a trained combination.
    """
    rng = np.random.default_rng([seed, objects or 0, len(split)])
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    trained = [p for p in pairs if p not in HELD_OUT | VALIDATION]
    own = {"train": trained, "validation": sorted(VALIDATION), "heldout": sorted(HELD_OUT)}[split]

    def thing(choice: list[tuple[str, str]]) -> Thing:
        colour, shape = choice[rng.integers(len(choice))]
        return Thing(colour, shape, tuple(SIZES)[rng.integers(len(SIZES))])

    scenes = []
    for _ in range(n):
        background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        count = objects or (1 if rng.random() < 1 / 3 else 2)
        first = thing(own)
        if count == 1:
            scenes.append(Scene((first,), None, background))
            continue
        # Two objects never share a colour: the oracle tells them apart by place alone, people
        # and the text encoder by colour.
        second = thing([p for p in trained if p[0] != first.colour])
        scene = Scene((first, second), tuple(RELATIONS)[rng.integers(4)], background)
        scenes.append(scene.converse() if rng.random() < 0.5 else scene)
    return scenes


def sample_prompts(n: int, objects: int | None, split: Split, seed: int) -> list[tuple[Scene, str]]:
    """Scenes of `sample_scenes`, each with a caption in a phrasing drawn from the seed."""
    rng = np.random.default_rng([seed, 7])
    scenes = sample_scenes(n, objects, split, seed)
    return [(s, caption(s, int(rng.integers(2 * len(PHRASINGS))))) for s in scenes]


def coverage(
    shape: str, size: float, x: NDArray[np.float32], y: NDArray[np.float32]
) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, 0..1.

    `x`, `y`: pixel centres relative to the shape's centre (any broadcastable shapes). `size`: the
    diameter of the circle. Uses the signed distance to the outline, which is exact enough for
    anti-aliasing and needs no supersampling.
    """
    r = size / 2
    distance: NDArray[np.floating[Any]]

    def box(half_width: float, half_height: float) -> NDArray[np.float32]:
        return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)

    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - r
    elif shape == "square":
        distance = box(0.92 * r, 0.92 * r)
    elif shape == "bar":
        distance = box(1.08 * r, 0.42 * r)
    elif shape == "cross":
        distance = np.minimum(box(1.08 * r, 0.36 * r), box(0.36 * r, 1.08 * r))
    elif shape == "triangle":
        # Apex on top; the sides fall 2 for every 1 across, so base and height are equal.
        h = 1.08 * r
        distance = np.maximum(y - h, (2 * np.abs(x) - y - h) / np.float32(5**0.5))
    else:
        raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def render(scenes: list[Scene], seed: int | None = 0) -> Image:
    """Draw scenes as uint8 (n, 64, 64, 3). `seed` jitters positions by a pixel; None: no jitter."""
    n = len(scenes)
    rng = np.random.default_rng(seed)
    jitter = np.zeros((n, 2, 2), int)
    if seed is not None:
        jitter = rng.integers(-JITTER, JITTER + 1, (n, 2, 2))
    axis = np.arange(SIZE, dtype=np.float32) + 0.5 - SIZE / 2
    out = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i, scene in enumerate(scenes):
        picture = np.empty((SIZE, SIZE, 3), np.float32)
        picture[:] = BACKGROUNDS[scene.background]
        for j, thing in enumerate(scene.things):
            dx, dy = RELATIONS[scene.relation] if scene.relation else (0, 0)
            sign = 1 - 2 * j
            x = axis[None, :] - np.float32(sign * dx * OFFSET + jitter[i, j, 0])
            y = axis[:, None] - np.float32(sign * dy * OFFSET + jitter[i, j, 1])
            alpha = coverage(thing.shape, SIZES[thing.size], x, y)[..., None]
            picture += alpha * (np.array(COLOURS[thing.colour], np.float32) - picture)
        out[i] = np.rint(picture).astype(np.uint8)
    return out
