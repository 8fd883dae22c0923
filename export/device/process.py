"""Jobs in processes of their own: memory comes back whole, and a killed job is no crash of ours."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DeviceError
from .telemetry import Watch

QUIET = "memory settled"  # a job prints it when from then on it only repeats what it has done
SAMPLE_EVERY_S = 0.02

# The directory that holds this package, or the one file that is the whole script.
HOME = Path(__file__).parents[(__package__ or "").count(".") + 1]
_START = """\
import sys
sys.path[:] = [sys.argv[1], *filter(None, sys.path)]
import importlib
sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
"""


def command_of(module: str) -> list[str]:
    """How to run `main(arguments)` of a module of this package in a fresh process.

    Nothing in the current directory is imported there, and `python -I` stays what it is.
    """
    isolated = ["-I"] if sys.flags.isolated else []
    return [sys.executable, *isolated, "-c", _START, str(HOME), f"{__package__}.{module}"]


def run_job(
    job: Mapping[str, Any], *, watch: Watch | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """Run a job of `worker.JOBS` in a fresh process; its answer and `peak_anonymous_bytes`.

    `watch` learns the process, and when loading is over.

    Raises:
        DeviceError: what the job raised, or that it was killed or took over `timeout` seconds.
    """
    name = str(job.get("name", job["job"]))
    with tempfile.TemporaryDirectory(prefix="sdcompress-") as scratch:
        question, answer, words = (Path(scratch, n) for n in ("job", "answer", "stderr"))
        question.write_text(json.dumps(job))
        command = [*command_of("worker"), str(question), str(answer)]
        started = time.monotonic()
        with (
            words.open("wb") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            expire = threading.Timer(timeout, process.kill) if timeout else None
            if expire:
                expire.start()
            if watch:
                watch.pid = process.pid
            try:
                with _Peak(process.pid) as peak:
                    for line in process.stdout or ():
                        if line.strip() == QUIET:
                            peak.stop()
                            if watch:
                                watch.start_timing()
                code = process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                if expire:
                    expire.cancel()
        if answer.exists():
            result: dict[str, Any] = json.loads(answer.read_text())
            if "error" in result:
                raise DeviceError(result["error"], exit_code=result["exit_code"])
            return {**result, "peak_anonymous_bytes": peak.bytes}
        late = timeout is not None and time.monotonic() - started >= timeout
        raise DeviceError(f"{name}: {_why(code, timeout if late else None, words)}")


class _Peak:
    """The peak of a process's anonymous memory, sampled; 0 where the system does not tell."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._file = Path(f"/proc/{pid}/smaps_rollup")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            self.bytes = max(self.bytes, self._now())
            if stopping:
                return
            self._stop.wait(SAMPLE_EVERY_S)

    def _now(self) -> int:
        try:
            lines = self._file.read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def _why(code: int, timeout: float | None, words: Path) -> str:
    if timeout is not None:
        return f"took more than {timeout:g} s and was stopped"
    lines = [line.strip() for line in words.read_text(errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "it wrote no message")
    if code < 0:
        by = signal.Signals(-code).name
        hint = "; most likely memory ran out" if by == "SIGKILL" else ""
        return f"was killed by {by}{hint} ({last:.300})"
    return f"failed with exit code {code}: {last:.300}"
