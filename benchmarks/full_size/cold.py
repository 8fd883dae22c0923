"""One cold process: what it took, from its start until its files are on the disk."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from sdcompress.measure import PeakMemory

ROOT = Path(__file__).parents[2]
EVERY_S = 0.1  # reading the page tables of gigabytes takes milliseconds
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "memoryerror")
OK, NO_MEMORY = "ok", "out of memory"


def run_cold(
    command: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run a command, then `sync`.

    Returns `seconds` of both, `cpu_seconds` (user and system, of it and its children), `peak_bytes`
    (anonymous, of the process tree), `read_bytes` and `written_bytes` (by system calls; what is
    read through mapped files does not count), `outcome` (`OK`, `NO_MEMORY`, "stopped after N s", or
    "failed: " and its last line) and `said`, the JSON object that it printed last, if any.
    """
    os.sync()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        before, start = os.times(), time.perf_counter()
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=out,
            stderr=errors,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        expire = threading.Timer(timeout, stop) if timeout else None
        if expire:
            expire.start()
        try:
            with PeakMemory(process.pid, every=EVERY_S) as memory:
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                moved = _moved(process.pid)  # a zombie still knows
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            if expire:
                expire.cancel()
            code = process.wait()
        os.sync()
        seconds, after = time.perf_counter() - start, os.times()
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read())
    used = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    said = last_json(texts[0])
    outcome = f"stopped after {timeout:g} s" if late.is_set() else outcome_of(code, texts)
    return {
        "outcome": said.pop("outcome", outcome) if outcome == OK else outcome,
        "seconds": seconds,
        "cpu_seconds": used,
        "peak_bytes": memory.peak,
        "read_bytes": moved.get("rchar", 0),
        "written_bytes": moved.get("wchar", 0),
        "said": said,
    }


def _moved(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}


def last_json(text: str) -> dict[str, Any]:
    """The JSON object at the end of what was printed, on one line or as the whole; else empty."""
    for candidate in (text, text.strip().rpartition("\n")[2]):
        try:
            found = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def outcome_of(code: int, texts: Sequence[str]) -> str:
    """In words. The kernel kills what takes more memory than there is."""
    if code == 0:
        return OK
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if code == -signal.SIGKILL or any(w in line.lower() for line in lines for w in OUT_OF_MEMORY):
        return NO_MEMORY
    return f"failed: {lines[-1] if lines else f'exit code {code}'}"


def warm(paths: Iterable[Path]) -> None:
    """Bring the files, or all files of the directories, into the page cache."""
    buffer = bytearray(1 << 22)
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                with file.open("rb", buffering=0) as f:
                    while f.readinto(buffer):
                        pass


def claim(leave: int = 1_500_000_000) -> int:
    """Touch all memory that nobody needs, but `leave` bytes, and let it go again; returns how many.

    The host of a virtual machine gives a page when it is first touched, which takes longer than to
    copy it, and takes back what lay free: a copy would cost up to five times as much, or not, for
    what went on before it.
    """
    pages: int = max(1, (psutil.virtual_memory().available - leave) // mmap.PAGESIZE)
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        memory[:: mmap.PAGESIZE] = b"\1" * pages
    return pages * mmap.PAGESIZE
