"""Points as tasks of a Ray cluster: many machines, any of which may go away.

Answers come back as data, and the driver alone writes them. A worker that sees the sweep's folder
and the model where the driver has them works there; to the others both are sent, once a machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdcompress.bundle import Bundle, locked, sha256_file, staging
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.pictures import dense_pictures
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.parallel import limit
from sdcompress.recipe import Recipe
from sdcompress.sweep.points import PointResult, failed_point, point_digest, try_point

RETRIES = 4  # of a task whose worker died
TOKEN = ".sweep"


class Place(NamedTuple):
    """Where the driver has things; `token` is what a worker finds in the folder if it sees it."""

    dense: Bundle
    work: Path
    token: str


def run_on_ray(
    recipes: Sequence[Recipe],
    dense: Bundle,
    settings: QualitySettings,
    work: Path,
    *,
    address: str,
    jobs: int = 1,
) -> Iterator[PointResult]:
    """The answers, as they come in, of a cluster at `address` ("auto", HOST:PORT or ray://…).

    `jobs` points are measured at the same time on each machine or, where there are any, each GPU.

    Raises:
        UsageError: Ray is not installed.
        InputError: there is no cluster at this address.
    """
    try:
        import ray
    except ImportError as e:
        raise UsageError("--ray needs Ray; pip install 'sdcompress[ray]'") from e
    import logging
    import uuid

    token = uuid.uuid4().hex
    (work / TOKEN).write_text(token)
    place = Place(dense, work.resolve(), token)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as e:  # ConnectionError, ValueError, RuntimeError, by the form of the address
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"{address}: expected a Ray cluster, found none ({reason:.200}); start one with "
            "`ray start --head`, or leave out --ray"
        ) from e
    try:
        share = _share(ray, jobs)
        task = ray.remote(max_retries=RETRIES, **share)(measure)
        sent: dict[str, Any] | None = None
        waiting = {task.remote(place, r, settings, share["num_cpus"], None): r for r in recipes}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            recipe = waiting.pop(done)
            try:
                answer = ray.get(done)
            except ray.exceptions.RayError as e:
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
                yield failed_point(dense, recipe, settings, f"Ray: {reason:.300}")
                continue
            if answer is None:
                sent = sent or {n: ray.put(_bytes(f)) for n, f in _needed(place, settings).items()}
                again = task.remote(place, recipe, settings, share["num_cpus"], sent)
                waiting[again] = recipe
                continue
            result = PointResult.model_validate_json(answer)
            if result.digest != point_digest(dense, recipe, settings):
                reason = result.failed or (
                    "its worker has other versions of torch and the like than this machine, or "
                    "other files where the settings name some"
                )
                result = failed_point(dense, recipe, settings, reason)
            yield result
        if sent:
            _clean(ray, place)
    finally:
        ray.shutdown()
        (work / TOKEN).unlink(missing_ok=True)


def measure(
    place: Place,
    recipe: Recipe,
    settings: QualitySettings,
    threads: int,
    sent: dict[str, Any] | None,
) -> str | None:
    """One task: the answer as JSON, or None where nothing is seen and nothing was sent."""
    import torch

    torch.set_num_threads(threads)
    limit(threads)
    dense, work = place.dense, place.work
    if not _visible(place):
        if sent is None:
            return None
        folder = _unpacked(place, sent)
        work = folder / "work"
        dense = Bundle(folder / "model", dense.manifest, dense.digest)
    return try_point(dense, recipe, settings, work).model_dump_json()


def _share(ray: Any, jobs: int) -> dict[str, Any]:
    """What one task asks for, so that `jobs` of them fill the smallest machine or a GPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU") for node in nodes):
        return {"num_cpus": 1, "num_gpus": 1 / jobs}
    fewest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
    return {"num_cpus": max(1, fewest // jobs)}


def _visible(place: Place) -> bool:
    """Whether this machine sees the driver's folder and, byte for byte, its model."""
    if place.token not in _SEEN:
        _SEEN[place.token] = _sees(place)
    return _SEEN[place.token]


_SEEN: dict[str, bool] = {}  # by token: a worker asks for every task, and models are large


def _sees(place: Place) -> bool:
    try:
        return (place.work / TOKEN).read_text() == place.token and all(
            (place.dense.path / name).stat().st_size == record.size
            and sha256_file(place.dense.path / name) == record.sha256
            for name, record in place.dense.manifest.files.items()
        )
    except OSError:
        return False


def _needed(place: Place, settings: QualitySettings) -> dict[str, Path]:
    """What a worker that sees nothing needs, by its place there."""
    files = {f"model/{name}": place.dense.path / name for name in place.dense.manifest.files}
    for pictures in dense_pictures(place.dense, settings, place.work):
        for file in pictures.folder.iterdir():
            files[f"work/{file.relative_to(place.work).as_posix()}"] = file
    return files


def _bytes(file: Path) -> Any:
    """A file's bytes as an array that Ray copies into its store without another copy."""
    import numpy as np

    return np.fromfile(file, np.uint8)


def _folder(place: Place) -> Path:
    return Path(tempfile.gettempdir()) / f"sdcompress-sweep-{place.token}"


def _unpacked(place: Place, sent: dict[str, Any]) -> Path:
    """What was sent, as files of this machine; written once, by whoever comes first."""
    import ray

    folder = _folder(place)
    folder.mkdir(exist_ok=True)
    files = folder / "files"
    with locked(folder):
        if not files.is_dir():
            with staging(files) as made:
                for name, reference in sent.items():
                    file = made / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(ray.get(reference))
    return files


def _clean(ray: Any, place: Place) -> None:
    """Remove from every machine what was sent to it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tasks = [
        ray.remote(num_cpus=0)(_remove)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(place)
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=60)


def _remove(place: Place) -> None:
    import shutil

    shutil.rmtree(_folder(place), ignore_errors=True)
