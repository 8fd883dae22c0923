"""Runs a stage again and again and kills it with SIGKILL at seeded moments.

    python -m tests.integration.killed STAGE MODEL OUT KILLS

Goes on until KILLS attempts have died before they had finished, for at most four times as many
attempts, and prints a JSON line: how many died. Fails with an assertion where a killed attempt left
anything but the old state or the new one, or where the next attempt ends in other bytes than an
undisturbed one. Attempts are forked, so that the kill strikes the stage's work and not the imports
before it; the moment is drawn from the time the attempt before took, since a machine that is busy
with other work is not equally fast for long.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from export.to_onnx import export_bundle
from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.prune import prune
from sdcompress.recipe import Recipe
from tests.conftest import TWO_TO_FOUR

SEED = 20


def _stages(name: str, model: Path) -> list[Callable[[Path], Bundle]]:
    """One that is killed, and one whose result it is to replace."""
    source = Bundle.of_source(model, SourceRecord(id="tiny-sd", kind="directory"))
    if name == "prune":
        recipes = (Recipe.model_validate({**TWO_TO_FOUR, "name": n}) for n in ("new", "old"))
        return [partial(prune, source, recipe, replace=True) for recipe in recipes]
    export = partial(export_bundle, source, components=("text_encoder",), replace=True)
    return [partial(export, dtype="fp32"), partial(export, dtype="fp16")]


def _fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def main(name: str, model: Path, out: Path, kills: int) -> None:
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    stage, other = _stages(name, model)
    old = other(out / "old").digest
    stage(out / "warm-up")
    start = time.perf_counter()
    reference = stage(out / "reference").digest
    duration = time.perf_counter() - start
    moments = random.Random(SEED)
    target = out / "target"
    died = 0
    assert reference != old
    for number in range(4 * kills):
        if target.exists():
            shutil.rmtree(target)
            shutil.copytree(out / "old", target)
        pid = _fork(lambda: stage(target))
        time.sleep(moments.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert status in (0, signal.SIGKILL)
        died += status == signal.SIGKILL
        if target.exists():
            bundle = Bundle.open(target)
            bundle.check_files()
            assert bundle.digest in (old, reference)
        else:
            assert number == 0  # before which there was none
        start = time.perf_counter()
        _, status = os.waitpid(_fork(lambda: stage(target)), 0)
        duration = time.perf_counter() - start
        assert status == 0
        assert Bundle.open(target).digest == reference
        left = sorted(p.name for p in out.iterdir())
        assert left == ["old", "reference", "target", "warm-up"], left
        if died == kills:
            break
    print(json.dumps({"died": died}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
