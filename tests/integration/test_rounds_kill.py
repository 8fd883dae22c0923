"""Pruning in rounds that is killed goes on from the last round that was finished.

The test runs this file as a program of its own:

    python -m tests.integration.test_rounds_kill MODEL OUT

It kills calls with SIGKILL, some at what they are just doing, some after a while, and fails with an
assertion where anything but the old state or the new one is left, where a finished step is done
again, or where the next call ends in other bytes than an undisturbed one. Calls are forked, so that
a kill strikes the work and not the imports before it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import accelerate
import torch

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.prune import prune
from sdcompress.recipe import Recipe
from sdcompress.rounds import prune_in_rounds
from sdcompress.tuning._job import load_models
from tests.integration.killed import _fork

TUNE = {
    "steps": 2,
    "batch": 2,
    "sampling_steps": 2,
    "checkpoint_every": 1,
    "prompts": ["a red cat", "a cat"],
}
RECIPE = Recipe.model_validate(
    {
        "name": "rounds",
        "calibration": {"count": 2, "steps": 2},
        "schedule": {"rounds": 3, "tune": TUNE},
        "prune": {
            "text_encoder": {"rules": [{"criterion": "wanda", "sparsity": 0.5}]},
            "unet": {"rules": [{"scope": "linear", "pattern": "2:4"}]},
        },
    }
)
PHASES = [
    f"round {number} of 3: {what}"
    for number in (1, 2, 3)
    for what in ("calibrating", "pruning", "tuning")
][:-1]
SEED = 5


def test_rounds_outlive_sigkill(tiny_sd: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.test_rounds_kill", tiny_sd, tmp_path]
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"by event": 4, "by time": 4}


def main(model: Path, out: Path) -> None:
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    source = Bundle.of_source(model, SourceRecord(id="tiny-sd", kind="directory"))
    target, heard = out / "target", out / "heard"  # a line for each time that progress is told
    # What is imported here no call has to import. A gradient would start threads.
    old = prune(source, RECIPE, target).digest
    accelerate.Accelerator(cpu=True)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    load_models(model, "cpu")

    def call(kill_at: int | None = None) -> None:
        with heard.open("w", buffering=1) as f:
            lines = itertools.count()

            def progress(what: str, done: int, total: int) -> None:
                f.write(f"{what}\n")
                if next(lines) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            prune_in_rounds(source, RECIPE, target, replace=True, progress=progress)

    def finish() -> str:
        """The digest of what a call makes that is left alone."""
        _, status = os.waitpid(_fork(call), 0)
        assert status == 0
        bundle = Bundle.open(target)
        bundle.check_files()
        return bundle.digest

    start = time.perf_counter()
    reference = finish()
    duration = time.perf_counter() - start
    events = heard.read_text().splitlines()
    assert list(dict.fromkeys(events)) == PHASES

    killed = {"by event": 0, "by time": 0}
    for phase in (PHASES[i] for i in (1, 2, 4, 7)):
        shutil.rmtree(target)
        middle = events.index(phase) + events.count(phase) // 2
        _, status = os.waitpid(_fork(partial(call, middle)), 0)
        assert status == signal.SIGKILL
        killed["by event"] += 1
        assert not target.exists()
        assert finish() == reference
        # What a round has recorded goes with it; all that was finished before stays.
        first = PHASES.index(phase.replace("pruning", "calibrating"))
        again = list(dict.fromkeys(heard.read_text().splitlines()))
        assert again == PHASES[first:], (phase, again)

    moments = random.Random(SEED)
    assert prune(source, RECIPE, target, replace=True).digest == old != reference
    for _ in range(12):
        pid = _fork(call)
        time.sleep(moments.uniform(0, duration / 2))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert status in (0, signal.SIGKILL)
        if status == 0:  # those before had left it little, or the machine is less busy now
            duration /= 2
        killed["by time"] += status == signal.SIGKILL
        bundle = Bundle.open(target)
        bundle.check_files()
        assert bundle.digest in (old, reference)  # several halves may come to a whole
        if killed["by time"] == 4:
            break
    assert finish() == reference
    assert sorted(p.name for p in out.iterdir()) == ["heard", "target"]
    print(json.dumps(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
