"""What the packs in a run's directory take to ship, beside the files that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdcompress.bundle import MANIFEST, Bundle
from sdcompress.errors import InputError

SUFFIX = ".sdz"
LABELS = {
    "pruned": "Pruned weights",
    "tuned": "Tuned weights",
    "onnx/dense": "ONNX, dense",
    "onnx/sparse": "ONNX, sparse",
    "engine/dense": "Engine, dense",
    "engine/sparse": "Engine, sparse",
}
DENSE = "Dense weights"


@dataclass(frozen=True)
class Shipped:
    """A pack. `what` of the run is in it; None: something else, of this `stage`.

    `weights`: the bytes of each file with tensors, as it is and packed.
    """

    file: str
    stage: str
    what: str | None
    original: int
    packed: int
    weights: dict[str, tuple[int, int]]


def read_packs(run: Path) -> tuple[list[Shipped], list[str]]:
    """The packs of a run, the largest first, and what is wrong with those that cannot be read.

    Only their indexes and manifests are read.
    """
    files = sorted(run.glob(f"*{SUFFIX}"))
    known = dict(_bundles(run)) if files else {}
    found, damaged = list[Shipped](), list[str]()
    for file in files:
        try:
            found.append(_shipped(file, known))
        except InputError as e:
            damaged.append(str(e).replace(f"{run}/", ""))
    return sorted(found, key=lambda pack: -pack.packed), damaged


def _shipped(file: Path, known: dict[str, str]) -> Shipped:
    from sdcompress.packing import Pack

    with Pack(file) as pack:
        _, manifest = pack.read_manifest()
        index = pack.index
    return Shipped(
        file=file.name,
        stage=manifest.stage,
        what=known.get(index.bundle),
        original=sum(f.size for f in index.files),
        packed=file.stat().st_size,
        weights={
            f.name: (f.size, sum(sum(part.stored) for part in f.parts))
            for f in index.files
            if any(part.tensor for part in f.parts)
        },
    )


def _bundles(run: Path) -> Iterator[tuple[str, str]]:
    """The digest of each bundle of the run, and of the dense model it began with, → what it is."""
    for name, label in LABELS.items():
        if (run / name / MANIFEST).exists():
            bundle = Bundle.open(run / name)
            yield bundle.digest, label
            if name == "pruned" and bundle.manifest.parent:
                yield bundle.manifest.parent, DENSE
