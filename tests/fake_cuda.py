"""A stand-in for libcudart on host memory, so that fake engines really move bytes.

`fake_cuda()` is the real `Cuda` on top of it: what the tests run is our own use of the C interface,
and the stand-in holds it to what C would need (a pointer passed as a plain int would lose half).
"""

# ruff: noqa: N802  (the names are C's)

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.device.cuda import Cuda

OK, INVALID, OUT_OF_MEMORY, NO_DEVICE = 0, 1, 2, 100
WORDS = {
    INVALID: b"invalid argument",
    OUT_OF_MEMORY: b"out of memory",
    35: b"CUDA driver version is insufficient for CUDA runtime version",
    NO_DEVICE: b"no CUDA-capable device is detected",
}


class FakeLibrary:
    """libcudart with one GPU. Work runs at once, or when its graph is launched if it is captured.

    `failing` maps a function to the code it answers. `clock_ms` is the GPU's time: `enqueue` moves
    it on, or with `real_time` the wall clock does.
    """

    def __init__(
        self,
        *,
        compute_capability: str = "8.7",
        memory: int = 8 << 30,
        devices: int = 1,
        failing: dict[str, int] | None = None,
        real_time: bool = False,
    ) -> None:
        self.memory = memory
        self.devices = devices
        self.real_time = real_time
        self.clock_ms = 0.0
        self.allocated: dict[int, Any] = {}
        self.alive: set[int] = set()  # streams, events, graphs
        self.peak = 0
        self._major, self._minor = (int(x) for x in compute_capability.split("."))
        self._recording: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._events: dict[int, float] = {}
        self._next = 0x1000
        # A function, not a method: ctypes lets its users set the type of its answer.
        self.cudaGetErrorString: Any = lambda code: WORDS.get(code, b"unrecognized error code")
        for function, code in (failing or {}).items():
            setattr(self, function, lambda *arguments, code=code: code)

    def enqueue(self, work: Callable[[], None], milliseconds: float = 1.0) -> None:
        """What a kernel does: `work`, and time passing."""

        def step() -> None:
            work()
            self.clock_ms += milliseconds

        if self._recording is None:
            step()
        else:
            self._recording.append(step)

    @property
    def used(self) -> int:
        return sum(len(buffer) for buffer in self.allocated.values())

    # The C functions.

    def cudaGetLastError(self) -> int:
        return OK

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return OK if self.devices else NO_DEVICE

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = {75: self._major, 76: self._minor}[attribute]
        return OK

    def cudaGetDeviceProperties(self, properties: Any, device: int) -> int:
        properties[:9] = b"Fake GPU\0"
        return OK

    def cudaDeviceGetPCIBusId(self, name: Any, length: int, device: int) -> int:
        name.value = b"0000:01:00.0"
        return OK

    def cudaDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12060
        return OK

    def cudaRuntimeGetVersion(self, version: Any) -> int:
        version._obj.value = 12060
        return OK

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.memory - self.used, self.memory
        return OK

    def cudaMalloc(self, pointer: Any, nbytes: Any) -> int:
        assert isinstance(nbytes, ctypes.c_size_t)
        if self.used + nbytes.value > self.memory:
            return OUT_OF_MEMORY
        buffer = ctypes.create_string_buffer(nbytes.value)
        address = ctypes.addressof(buffer)
        self.allocated[address] = buffer
        self.peak = max(self.peak, self.used)
        pointer._obj.value = address
        return OK

    def cudaFree(self, pointer: Any) -> int:
        return OK if self.allocated.pop(_address(pointer), None) is not None else INVALID

    def cudaMemcpyAsync(self, target: Any, source: Any, nbytes: Any, kind: Any, stream: Any) -> int:
        assert isinstance(nbytes, ctypes.c_size_t)
        assert _address(stream) in self.alive
        assert kind.value in (1, 2)
        device = _address(target if kind.value == 1 else source)
        if device not in self.allocated or nbytes.value > len(self.allocated[device]):
            return INVALID
        ctypes.memmove(target, source, nbytes.value)
        return OK

    def cudaStreamCreateWithFlags(self, stream: Any, flags: Any) -> int:
        assert isinstance(flags, ctypes.c_uint)
        stream._obj.value = self._new()
        return OK

    def cudaStreamSynchronize(self, stream: Any) -> int:
        return OK if _address(stream) in self.alive and self._recording is None else INVALID

    def cudaStreamDestroy(self, stream: Any) -> int:
        return self._drop(stream)

    def cudaEventCreate(self, event: Any) -> int:
        event._obj.value = self._new()
        return OK

    def cudaEventRecord(self, event: Any, stream: Any) -> int:
        assert {_address(event), _address(stream)} <= self.alive
        self._events[_address(event)] = (
            time.perf_counter() * 1000 if self.real_time else self.clock_ms
        )
        return OK

    def cudaEventSynchronize(self, event: Any) -> int:
        return OK if _address(event) in self._events else INVALID

    def cudaEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:
        assert isinstance(milliseconds._obj, ctypes.c_float)
        milliseconds._obj.value = self._events[_address(end)] - self._events[_address(start)]
        return OK

    def cudaEventDestroy(self, event: Any) -> int:
        return self._drop(event)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> int:
        assert isinstance(mode, ctypes.c_int)
        self._recording = []
        return OK if _address(stream) in self.alive else INVALID

    def cudaStreamEndCapture(self, stream: Any, graph: Any) -> int:
        graph._obj.value = self._new()
        self._graphs[graph._obj.value], self._recording = self._recording or [], None
        return OK

    def cudaGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        assert isinstance(flags, ctypes.c_ulonglong)
        executable._obj.value = self._new()
        self._graphs[executable._obj.value] = self._graphs[_address(graph)]
        return OK

    def cudaGraphDestroy(self, graph: Any) -> int:
        return self._drop(graph)

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> int:
        assert {_address(graph), _address(stream)} <= self.alive
        for step in self._graphs[_address(graph)]:
            step()
        return OK

    def cudaGraphExecDestroy(self, graph: Any) -> int:
        return self._drop(graph)

    def _new(self) -> int:
        self._next += 0x100
        self.alive.add(self._next)
        return self._next

    def _drop(self, handle: Any) -> int:
        if _address(handle) not in self.alive:
            return INVALID
        self.alive.discard(_address(handle))
        return OK


def fake_cuda(**how: Any) -> tuple[Cuda, FakeLibrary]:
    """A GPU in host memory, and what stands behind it; arguments are those of FakeLibrary."""
    library = FakeLibrary(**how)
    return Cuda(library), library


def install(folder: Path, **how: Any) -> None:
    """Let every Python started with `folder` on its path find this in place of libcudart.

    There is no NVML then either. `how` must be JSON.
    """
    (folder / "sitecustomize.py").write_text(
        "import ctypes, json, sys\n"
        f"sys.path.append({str(Path(__file__).parents[1])!r})\n"
        "real = ctypes.CDLL\n"
        "def load(name, *arguments, **more):\n"
        "    if 'libcudart' in str(name):\n"
        "        from tests.fake_cuda import FakeLibrary\n"
        f"        return FakeLibrary(**json.loads({json.dumps(how)!r}))\n"
        "    if 'nvidia-ml' in str(name):\n"
        "        raise OSError(name)\n"
        "    return real(name, *arguments, **more)\n"
        "ctypes.CDLL = load\n"
    )


def _address(pointer: Any) -> int:
    assert isinstance(pointer, ctypes.c_void_p), f"C would take {pointer!r} for a 32-bit int"
    return pointer.value or 0
