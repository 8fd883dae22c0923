"""What is measured: the points, their order, and the one protocol they all share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from sdcompress.bundle import Bundle, to_json, tool_versions
from sdcompress.evaluation.quality import QualitySettings, default_settings
from sdcompress.models.sources import resolve
from sdcompress.recipe import Recipe

MODEL = "mini-sd2"
STEPS = 10  # the same accuracy as with 20, at half the time
METRICS = ("prompt_accuracy", "clip_score", "clip_distance", "psnr")
CALIBRATION = {"count": 64, "steps": STEPS, "seed": 0}
COMPONENTS = {
    "unet": ("unet",),
    "text_encoder": ("text_encoder",),
    "both": ("text_encoder", "unet"),
}
TWO_FOUR = "2:4"
SPARSITIES = ("60%", "50%", "70%", "40%", "30%")
PEERS = {"modelopt sparse_magnitude": "sparse_magnitude", "modelopt sparsegpt": "sparsegpt"}
# Criteria as OBS-Diff has them calibrated: part after part, each on what became of those before.
PACKAGES = 4
IN_PACKAGES = {
    f"{name}, {PACKAGES} packages": name for name in ("obs_diff", "sparsegpt", "obs_refit")
}
JUDGED = (TWO_FOUR, "60%")  # where verdicts are given
ON_SHARED = ("magnitude", "sparsegpt", "obs_diff")  # of our criteria, those like the peer's
Layers = Mapping[str, Sequence[str]]  # component → names of layers


class Point(NamedTuple):
    """`pattern` is 2:4 or a percentage. `shared`: only in the layers that ModelOpt prunes too."""

    method: str
    components: str
    pattern: str
    shared: bool = False

    @property
    def name(self) -> str:
        """For files."""
        words = (self.components, self.pattern, self.method, "shared" if self.shared else "")
        text = "-".join(filter(None, words))
        return text.translate({ord(":"): "to", ord(" "): "-", ord("%"): None, ord(","): None})

    def __str__(self) -> str:
        shared = ", shared layers" if self.shared else ""
        return f"{self.components} {self.pattern} {self.method}{shared}"


def all_points(
    criteria: Sequence[str], ours: Layers, peers: Mapping[str, Layers] | None = None
) -> list[Point]:
    """Every point once, the most telling first.

    `ours` are the layers that our criteria prune, `peers` those of each mode of ModelOpt; where
    they differ, methods that can be compared on the shared ones are.
    """
    shared = shared_layers(ours, peers or {})
    found: list[Point] = []
    for components, pattern in _settings():
        found += [Point(method, components, pattern) for method in criteria]
        if pattern in JUDGED:
            found += [
                Point(method, components, pattern)
                for method, criterion in IN_PACKAGES.items()
                if criterion in criteria
            ]
        if pattern != TWO_FOUR or not peers:
            continue
        found += [Point(peer, components, pattern) for peer in peers]
        whole = {**{name: ours for name in ON_SHARED if name in criteria}, **peers}
        found += [
            Point(method, components, pattern, shared=True)
            for method, layers in whole.items()
            if any(set(layers[c]) != set(shared[c]) for c in COMPONENTS[components])
        ]
    return found


def shared_layers(ours: Layers, peers: Mapping[str, Layers]) -> dict[str, list[str]]:
    """What all prune."""
    return {
        component: [n for n in names if all(n in layers[component] for layers in peers.values())]
        for component, names in ours.items()
    }


def _settings() -> list[tuple[str, str]]:
    """Component set and pattern; 2:4 and 60 % of the UNet come first."""
    rest = product(COMPONENTS, (TWO_FOUR, *SPARSITIES))
    return list(dict.fromkeys([("unet", TWO_FOUR), ("unet", "60%"), *rest]))


def sparsity(pattern: str) -> float:
    """Of the weights of a layer."""
    return 0.5 if pattern == TWO_FOUR else int(pattern.removesuffix("%")) / 100


def recipe(point: Point, shared: Layers) -> Recipe:
    """How a criterion's point is pruned: every Linear and Conv, or a rule for each shared layer."""
    criterion = IN_PACKAGES.get(point.method, point.method)
    packages = PACKAGES if point.method in IN_PACKAGES else 1
    rule: dict[str, Any] = {"scope": "all", "criterion": criterion}
    if point.pattern == TWO_FOUR:
        rule["pattern"] = TWO_FOUR
    else:
        rule["sparsity"] = sparsity(point.pattern)
    prune = {}
    for component in COMPONENTS[point.components]:
        names = shared[component] if point.shared else ["*"]
        prune[component] = {"rules": [{**rule, "layers": name} for name in names]}
    calibration = {**CALIBRATION, "packages": packages}
    return Recipe.model_validate({"name": "point", "prune": prune, "calibration": calibration})


@lru_cache
def dense_model() -> Bundle:
    found = resolve(MODEL)
    return Bundle.of_source(found.directory, found.source)


@lru_cache
def settings(samples: int) -> QualitySettings:
    return default_settings(dense_model(), samples, steps=STEPS, metrics=METRICS)


def protocol(samples: int) -> str:
    """A digest of all that an answer depends on, but for its point and the code of sdcompress."""
    made_of = {
        "dense": dense_model().digest,
        "settings": settings(samples).model_dump(mode="json"),
        "calibration": CALIBRATION,
        "tools": tool_versions(),
    }
    return hashlib.sha256(to_json(made_of).encode()).hexdigest()[:16]
