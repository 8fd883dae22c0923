"""Run one command of sdcompress and count what it costs; for `test_costs.py`.

    python costs.py ARGUMENTS OF SDCOMPRESS...

The last line on stdout is JSON: bytes read and written through system calls, how far anonymous
memory rose above what it was after the imports, and how many tensors of weight files, and bytes of
them, were in memory at once.
"""

from __future__ import annotations

import json
import os
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

from sdcompress import bits
from sdcompress.commands import main
from sdcompress.measure import PeakMemory, anonymous_bytes

# What commands import late: reading these is no cost of a model's.
LATE = (
    "torch",
    "onnx",
    "export.to_onnx",
    "export.verify",
    "sdcompress.packing",
    "sdcompress.rounds",
)


class Held:
    """Memory for tensors (`bits.Buffers`) that nobody has let go of."""

    def __init__(self) -> None:
        self.count = self.bytes = self.most = self.most_bytes = 0
        self._fresh = bits._fresh
        bits._fresh = self.fresh

    def fresh(self, nbytes: int) -> Any:
        array = self._fresh(nbytes)
        self.count, self.bytes = self.count + 1, self.bytes + array.nbytes
        self.most = max(self.most, self.count)
        self.most_bytes = max(self.most_bytes, self.bytes)
        weakref.finalize(array, self.let_go, array.nbytes)
        return array

    def let_go(self, nbytes: int) -> None:
        self.count, self.bytes = self.count - 1, self.bytes - nbytes


def traffic() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # bounds count threads
    for name in LATE:
        import_module(name)
    held, before = Held(), traffic()
    start = anonymous_bytes(os.getpid())
    memory = PeakMemory(os.getpid(), every=0.005)
    try:
        with memory:
            main()
    finally:
        after = traffic()
        costs = {
            "read": after["rchar"] - before["rchar"],
            "written": after["wchar"] - before["wchar"],
            "rise": memory.peak - start,
            "tensors": held.most,
            "tensor_bytes": held.most_bytes,
        }
        print(json.dumps(costs))
