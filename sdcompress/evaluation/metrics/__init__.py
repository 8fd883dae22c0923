"""What can be measured on pictures. The file name is the registry: one file, one metric.

A file defines `METRIC`, which is one of three kinds. A `Drift` compares each picture with the dense
model's of the same seed; a `Score` judges each picture beside its prompt; a `Distance` compares the
distributions of two sets of pictures by their features. What a limit means follows from the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sdcompress import registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdcompress.bundle import Bundle
    from sdcompress.evaluation.quality import QualitySettings
    from sdcompress.evaluation.statistics import Gaussian

    Images = NDArray[np.uint8]
    Floats = NDArray[np.float64]

FOLDER = "evaluation/metrics"
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Pictures of one model, uint8 [n, H, W, 3], and the prompts they were made from."""

    images: Images
    prompts: Sequence[str]
    settings: QualitySettings
    _kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What several metrics need of these pictures, computed for the first of them."""
        if name not in self._kept:
            self._kept[name] = compute()
        value: T = self._kept[name]
        return value


def _possible(settings: QualitySettings, dense: Bundle) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What every kind states.

    packages: module → what to install where it is missing. possible: why the metric cannot run on
    these pictures, and what to pass; None if it can.
    """

    unit: str
    better: Literal["higher", "lower"]
    packages: Mapping[str, str] = field(default_factory=dict)
    possible: Callable[[QualitySettings, Bundle], str | None] = _possible

    def missing(self) -> str | None:
        """What has to be installed before this can run, in one sentence; None if nothing."""
        absent = [fix for module, fix in self.packages.items() if find_spec(module) is None]
        return f"install it with `{absent[0]}`" if absent else None

    def why_not(self, settings: QualitySettings, dense: Bundle) -> str | None:
        """What to install or pass before this can run, in one sentence; None if it can."""
        return self.missing() or self.possible(settings, dense)


@dataclass(frozen=True, kw_only=True)
class Drift(Metric):
    """between: pictures, and the dense model's of the same seeds → one value each [n]."""

    between: Callable[[Batch, Batch], Floats]


@dataclass(frozen=True, kw_only=True)
class Score(Metric):
    """score: pictures → one value each [n]."""

    score: Callable[[Batch], Floats]


@dataclass(frozen=True, kw_only=True)
class Distance(Metric):
    """features: pictures → [n, d]. reference: what sets are compared with; the dense set if None.

    `reference` takes the settings and a folder in which it can keep what is slow to compute.
    """

    features: Callable[[Batch], Floats]
    reference: Callable[[QualitySettings, Path], Gaussian] | None = None


@lru_cache
def load_metric(name: str) -> Drift | Score | Distance:
    """The metric of one file. The caller has checked the name against `metric_names`."""
    metric: Drift | Score | Distance = registry.load(FOLDER, name).METRIC
    return metric


def metric_names() -> list[str]:
    return registry.names(FOLDER)
