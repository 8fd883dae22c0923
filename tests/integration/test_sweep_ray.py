"""Points as tasks of a local Ray cluster of two nodes, with a worker killed in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdcompress.bundle import Bundle
from sdcompress.errors import InputError
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.sweep import on_ray
from sdcompress.sweep.grid import grid
from sdcompress.sweep.run import sweep

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'sdcompress[ray]'")

SETTINGS = QualitySettings(
    prompts=("a red cat", "a cat"), steps=2, guidance=2.0, batch=2, metrics=("psnr",)
)
POINTS = grid(["text_encoder", "unet"], ["magnitude"], ["unstructured"], [0.3, 0.6])
KEEP = {"psnr": 20.0}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        store = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        cluster = Cluster(
            initialize_head=True, head_node_args={**store, "include_dashboard": False}
        )
        try:
            cluster.add_node(**store)
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    out = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a task has
    try:
        sweep(tiny_source, POINTS, SETTINGS, out, keep=KEEP)
    finally:
        torch.set_num_threads(threads)
    return out


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))


def _kill_one_worker(killed: list[int], stop: threading.Event) -> None:
    """SIGKILL the first of our own processes that is seen measuring a point."""
    while not stop.wait(0.05):
        try:
            for pid in _descendants(os.getpid()):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::measure"):
                    time.sleep(1)  # into its work
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
        except OSError:
            continue


def test_a_killed_worker_changes_nothing(
    address: str, tiny_source: Bundle, undisturbed: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=_kill_one_worker, args=(killed, stop))
    killer.start()
    try:
        found = sweep(tiny_source, POINTS, SETTINGS, tmp_path, keep=KEEP, address=address)
    finally:
        stop.set()
        killer.join()
    assert len(killed) == 1
    assert [row.failed for row in found.points] == [None] * 4
    assert (tmp_path / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()
    assert not (tmp_path / on_ray.TOKEN).exists()


def test_workers_that_see_nothing_are_sent_everything(
    address: str,
    tiny_source: Bundle,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = Path.write_text

    def elsewhere(path: Path, text: str, *rest: Any, **more: Any) -> int:
        """The token names another folder than this one, as on a machine that shares nothing."""
        return written(path, "another" if path.name == on_ray.TOKEN else text, *rest, **more)

    monkeypatch.setattr(Path, "write_text", elsewhere)
    sweep(tiny_source, POINTS[1:2], SETTINGS, tmp_path, keep=KEEP, address=address)
    own = sorted(p.name for p in (tmp_path / "points").iterdir())
    assert len(own) == 1
    same = undisturbed / "points" / own[0]
    assert (tmp_path / "points" / own[0]).read_bytes() == same.read_bytes()
    # Pictures of the point were made where the worker was, and nothing is left there.
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert not list(Path(on_ray.tempfile.gettempdir()).glob("sdcompress-sweep-*"))


def test_no_cluster_is_one_clear_line(tiny_source: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Ray cluster, found none .*ray start --head"):
        sweep(tiny_source, POINTS[:1], SETTINGS, tmp_path, keep=KEEP, address="nowhere")
