"""One point: make its model, paint with it, measure the pictures, keep the figures only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.criteria.modelopt_peer import WEIGHTS
from benchmarks.criteria.points import (
    COMPONENTS,
    IN_PACKAGES,
    PEERS,
    Layers,
    Point,
    dense_model,
    recipe,
    settings,
)
from benchmarks.criteria.record import STATISTICS
from sdcompress.bundle import Bundle, write_json
from sdcompress.catalog import read_catalog
from sdcompress.evaluation.metrics import Batch, Distance, Drift, Score, load_metric
from sdcompress.evaluation.pictures import Pictures, dense_pictures, make
from sdcompress.evaluation.statistics import frechet_distance, gaussian, resamplings
from sdcompress.models.sources import resolve
from sdcompress.plan import account

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Answer = dict[str, Any]
DENSE = "dense.json"


class Seen(NamedTuple):
    """Pictures [n, H, W, 3], the scores of each, and its features [n, d]."""

    images: NDArray[np.uint8]
    scores: dict[str, Floats]
    features: Floats


def criterion_folder(work: Path, criterion: str) -> Path:
    return work / "criteria" / criterion


def peer_folder(work: Path, peer: str) -> Path:
    return work / "modelopt" / PEERS[peer]


def point_file(work: Path, point: Point) -> Path:
    return work / "points" / f"{point.name}.json"


def paint_dense(work: Path, samples: int, which: int) -> None:
    """The dense model's pictures: 0 at the seeds of all points, 1 at those of the floor."""
    make([dense_pictures(dense_model(), settings(samples), work)[which]], _ignore)


def measure_dense(work: Path, samples: int) -> Answer:
    """The dense model itself as an answer: its scores, and what other seeds change."""
    dense, floor = _references(work, samples)
    answer = {
        "scores": {name: values.tolist() for name, values in dense.scores.items()},
        "floor": {
            "scores": {name: values.tolist() for name, values in floor.scores.items()},
            "drift": _drifts(floor, dense, samples),
            "distances": distances(floor.features, dense.features),
        },
    }
    write_json(work / DENSE, answer)
    return answer


def measure_point(point: Point, shared: Layers, work: Path, samples: int) -> Answer:
    """Make it, paint, measure; the model and its pictures are removed afterwards."""
    start = time.process_time()
    folder = work / "models" / point.name
    ours = point.method not in PEERS
    model, sparsity = (prune_ours if ours else assemble_peer)(point, shared, work, folder)
    took = {"make": round(time.process_time() - start, 2)}
    answer = {"point": point._asdict(), "sparsity": sparsity, **judge(model, work, samples)}
    answer["cpu_seconds"] = {**took, **answer["cpu_seconds"]}
    point_file(work, point).parent.mkdir(exist_ok=True)
    write_json(point_file(work, point), answer)
    shutil.rmtree(folder)
    return answer


def judge(model: Bundle, work: Path, samples: int) -> Answer:
    """Paint and measure a model; its pictures are removed afterwards."""
    dense, _ = _references(work, samples)
    times = [time.process_time()]
    pictures = Pictures.of(model, settings(samples), work)
    make([pictures], _ignore)
    times.append(time.process_time())
    seen = look(pictures)
    answer = {
        "scores": {name: values.tolist() for name, values in seen.scores.items()},
        "drift": _drifts(seen, dense, samples),
        "distances": distances(seen.features, dense.features),
    }
    times.append(time.process_time())
    spans = zip(("paint", "measure"), times, times[1:], strict=False)
    answer["cpu_seconds"] = {what: round(b - a, 2) for what, a, b in spans}
    shutil.rmtree(pictures.folder, ignore_errors=True)  # two points can be the same model
    return answer


def prune_ours(
    point: Point, shared: Layers, work: Path, out: Path
) -> tuple[Bundle, dict[str, float]]:
    import torch

    from sdcompress.prune import prune

    file = criterion_folder(work, point.method) / STATISTICS
    statistics = None if point.method in IN_PACKAGES else torch.load(file, mmap=True)
    model = prune(dense_model(), recipe(point, shared), out, replace=True, statistics=statistics)
    assert model.manifest.plan
    total = account(model.manifest.plan).together
    return model, {
        "of_layers_pruned": total.of_layers_pruned,
        "of_components": total.of_component,
    }


def assemble_peer(
    point: Point, shared: Layers, work: Path, out: Path
) -> tuple[Bundle, dict[str, float]]:
    """The dense directory with the layers that ModelOpt has pruned in it."""
    from safetensors.torch import load_file, save_file

    dense = dense_model()
    catalog = read_catalog(dense.path)
    pruned = load_file(peer_folder(work, point.method) / WEIGHTS)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(dense.path, out)
    zeros = weights = 0
    for component in COMPONENTS[point.components]:
        for header in catalog.headers[component]:
            tensors = load_file(header.path)
            for name in tensors:
                if point.shared and name not in shared[component]:
                    continue
                if (weight := pruned.get(f"{component}/{name}")) is not None:
                    tensors[name] = weight.to(tensors[name].dtype)
                    zeros += int((weight == 0).sum())
                    weights += weight.numel()
            save_file(tensors, out / header.path.relative_to(dense.path), header.metadata)
    found = resolve(str(out))
    total = sum(catalog.parameters[c] for c in COMPONENTS[point.components])
    sparsity = {"of_layers_pruned": zeros / weights, "of_components": zeros / total}
    return Bundle.of_source(found.directory, found.source), sparsity


@lru_cache(maxsize=1)  # a worker looks at them once
def _references(work: Path, samples: int) -> tuple[Seen, Seen]:
    same, others = dense_pictures(dense_model(), settings(samples), work)
    return look(same), look(others)


def look(pictures: Pictures) -> Seen:
    """Everything that metrics ask of one set of pictures alone."""
    asked = pictures.settings
    metrics = {name: load_metric(name) for name in asked.metrics}
    images, features = [], []
    scores: dict[str, list[Floats]] = {n: [] for n, m in metrics.items() if isinstance(m, Score)}
    for indices in pictures.batches():
        batch = Batch(pictures.read(indices), [asked.prompts[i] for i in indices], asked)
        images.append(batch.images)
        for name, metric in metrics.items():
            if isinstance(metric, Score):
                scores[name].append(metric.score(batch))
            elif isinstance(metric, Distance):
                features.append(metric.features(batch))
    together = {name: np.concatenate(parts) for name, parts in scores.items()}
    return Seen(np.concatenate(images), together, np.concatenate(features))


def _drifts(seen: Seen, dense: Seen, samples: int) -> dict[str, list[float]]:
    asked = settings(samples)
    made, held_against = (Batch(s.images, asked.prompts, asked) for s in (seen, dense))
    metrics = ((name, load_metric(name)) for name in asked.metrics)
    return {n: m.between(made, held_against).tolist() for n, m in metrics if isinstance(m, Drift)}


def distances(features: Floats, dense: Floats) -> list[float]:
    """The Fréchet distance, first of the sets as they are, then of each resample of the prompts."""
    draws: Iterable[Floats | None] = (None, *resamplings(*features.shape))
    return [frechet_distance(gaussian(features, times), gaussian(dense, times)) for times in draws]


def _ignore(more: int) -> None:
    pass
