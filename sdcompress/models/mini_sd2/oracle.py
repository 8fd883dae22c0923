"""Read a scene back from a picture: colour by segmentation, shape and size by geometry.

Nothing here is trained. The thresholds were fixed on rendered scenes and their autoencoder round
trips, before the first picture was generated from a prompt. Reading is strict: a picture with a
blot too many, a colour between two names or an outline that fits no shape is not read at all.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sdcompress.models.mini_sd2.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    Image,
    Scene,
    Thing,
    coverage,
)

# Euclidean RGB distances, 0..441. The two nearest colours that can meet lie 93 apart.
BACKGROUND_TOLERANCE = 40.0  # of the border's median from the background's nominal colour
FOREGROUND = 40.0  # of a pixel from the background, to belong to an object
COLOUR_TOLERANCE = 60.0  # of an object's interior from the colour's nominal value
MIN_AREA = 16  # pixels; smaller blots are noise (the smallest object has about 90)
MIN_OVERLAP = 0.70  # intersection over union with the best ideal outline
MIN_DISTANCE = 16.0  # pixels between the centres of two objects, along the relation's axis

_HALF = 17
_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)

Floats = NDArray[np.float32]


@lru_cache(maxsize=1)
def _outlines() -> tuple[list[tuple[str, str]], Floats]:
    """Names (shape, size) and masks (names, shifts, 35, 35) of every ideal outline."""
    axis = np.arange(-_HALF, _HALF + 1, dtype=np.float32)
    shifts = np.asarray(_SHIFTS, np.float32)
    names = [(shape, size) for shape in SHAPES for size in SIZES]
    masks = [
        [
            coverage(shape, SIZES[size], axis[None, :] - dx, axis[:, None] - dy)
            for dx in shifts
            for dy in shifts
        ]
        for shape, size in names
    ]
    return names, np.asarray(masks, np.float32)


def _nearest(
    colour: Floats, palette: dict[str, tuple[int, int, int]], tolerance: float
) -> str | None:
    distances = {
        name: float(np.linalg.norm(colour - np.asarray(value, np.float32)))
        for name, value in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= tolerance else None


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Split a mask into its 4-connected parts by spreading the largest label until it stops."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        p = np.pad(labels, 1)
        spread = np.maximum.reduce([labels, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])
        spread[~mask] = 0
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its eight-neighbourhood."""
    p = np.pad(mask, 1)
    rows = p[:-2] | p[1:-1] | p[2:]
    grown: NDArray[np.bool_] = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return grown


def _read_thing(
    pixels: Floats, background: Floats, part: NDArray[np.bool_]
) -> tuple[Thing, float, float] | None:
    """One object and its centre (x, y), or None if its colour or outline fits no name."""
    away = np.linalg.norm(pixels - background, axis=-1)
    inside = part & (away >= 0.75 * np.quantile(away[part], 0.9))
    colour = np.median(pixels[inside], axis=0).astype(np.float32)
    name = _nearest(colour, COLOURS, COLOUR_TOLERANCE)
    if name is None:
        return None
    # A pixel on the edge is a blend of object and background; its share of object is its place
    # on the line between the two colours.
    line = colour - background
    alpha = np.clip((pixels - background) @ line / (line @ line), 0, 1) * _grow(part)
    ys, xs = np.nonzero(alpha >= 0.5)
    if not len(xs):
        return None
    x, y = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
    left, top = int(x), int(y)
    window = np.pad(alpha, _HALF)[top : top + 2 * _HALF + 1, left : left + 2 * _HALF + 1]
    names, outlines = _outlines()
    overlap = np.minimum(window, outlines).sum((-2, -1)) / np.maximum(window, outlines).sum(
        (-2, -1)
    )
    best = overlap.max(axis=1)
    # What lies outside the window must count against the fit, too.
    if best.max() < MIN_OVERLAP or window.sum() < 0.95 * alpha.sum():
        return None
    shape, size = names[int(best.argmax())]
    return Thing(name, shape, size), float(x), float(y)


def read_scene(image: Image) -> Scene | None:
    """Read a uint8 (64, 64, 3) picture; None if it shows no scene of this world."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 ({SIZE}, {SIZE}, 3), got {image.dtype} {image.shape}")
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0).astype(np.float32)
    name = _nearest(background, BACKGROUNDS, BACKGROUND_TOLERANCE)
    if name is None:
        return None
    foreground = np.linalg.norm(pixels - background, axis=-1) > FOREGROUND
    parts = [part for part in _components(foreground) if part.sum() >= MIN_AREA]
    if len(parts) not in (1, 2):
        return None
    read = [found for part in parts if (found := _read_thing(pixels, background, part))]
    if len(read) != len(parts):
        return None
    if len(read) == 1:
        return Scene((read[0][0],), None, name)
    (first, x1, y1), (second, x2, y2) = read
    across, down = x1 - x2, y1 - y2
    if max(abs(across), abs(down)) < MIN_DISTANCE or min(abs(across), abs(down)) > 8:
        return None
    for relation, (dx, dy) in RELATIONS.items():
        if across * dx + down * dy >= MIN_DISTANCE:
            return Scene((first, second), relation, name)
    return None


def matches(scene: Scene, reading: Scene | None) -> bool:
    """Whether everything `scene` states is what was read; either object may be named first."""
    return reading is not None and reading in (scene, scene.converse())
