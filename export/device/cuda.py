"""The part of the CUDA runtime that running an engine needs, through ctypes.

Pointers, streams, events and graphs are plain integers, which is what TensorRT takes.
"""

from __future__ import annotations

import ctypes
import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .errors import DeviceError

# Newest first: the unversioned name exists only where the development files are installed.
LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
# Where the pip packages put it, below each directory of packages.
WHEELS = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib")

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_NON_BLOCKING = 1  # a stream that does not wait for the default one
_CAPTURE_THREAD_LOCAL = 1
_MAJOR, _MINOR = 75, 76  # cudaDeviceAttr
_OUT_OF_MEMORY = 2
# cudaDeviceProp has grown with every version, but has always begun with the name.
_PROPERTIES_BYTES, _NAME_BYTES = 1 << 14, 256

_HINTS = {
    _OUT_OF_MEMORY: "close other programs, or use --residency sequential or smaller pictures",
    3: "the driver could not be started; restart the machine",
    35: "there is no NVIDIA driver here, or one older than this CUDA runtime; install or update it",
    100: "no NVIDIA GPU is visible here; check nvidia-smi, CUDA_VISIBLE_DEVICES and, in a "
    "container, the NVIDIA runtime",
    304: "the driver could not be reached; in a container, use the NVIDIA runtime",
    802: "the driver is still starting; try again",
    803: "the driver's kernel and user parts differ; restart the machine",
    804: "this GPU does not run a newer CUDA on an older driver; update the driver",
}


class Cuda:
    """The first GPU. Every method raises DeviceError with CUDA's own words if a call fails.

    Asking for facts starts nothing on the GPU: that would take memory from what is built meanwhile.
    """

    def __init__(self, library: Any) -> None:
        """`library` is libcudart as ctypes loads it, or a stand-in with the same functions."""
        self._library = library
        self._on_the_way: dict[int, list[bytes]] = {}
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))

    @classmethod
    def load(cls) -> Cuda:
        """Find libcudart and a GPU.

        Raises:
            DeviceError: no CUDA runtime, no GPU, or a driver that does not fit.
        """
        return cls(_load_library())

    @property
    def compute_capability(self) -> str:
        return f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"

    @property
    def name(self) -> str:
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, 0)
        return properties.raw[:_NAME_BYTES].split(b"\0")[0].decode(errors="replace")

    @property
    def pci_bus_id(self) -> str | None:
        """The card's name in NVML, such as "0000:01:00.0"; None for a GPU that is on no bus."""
        name = ctypes.create_string_buffer(32)
        with suppress(DeviceError):
            self._call("cudaDeviceGetPCIBusId", name, len(name), 0)
        return name.value.decode(errors="replace") or None

    @property
    def driver_version(self) -> str:
        """The newest CUDA the driver runs, such as "12.6"."""
        return self._version("cudaDriverGetVersion")

    @property
    def runtime_version(self) -> str:
        return self._version("cudaRuntimeGetVersion")

    def mem_get_info(self) -> tuple[int, int]:
        """Free and total memory of the GPU, bytes. On a Jetson this is the system's memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def malloc(self, nbytes: int) -> int:
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, nbytes)))
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(pointer))

    def upload(self, pointer: int, data: Any, stream: int) -> None:
        """Copy a bytes-like object to the GPU; the object may be changed as soon as it returns."""
        raw = memoryview(data).tobytes()
        self._on_the_way.setdefault(stream, []).append(raw)  # kept until the copy is surely done
        self._copy(ctypes.c_void_p(pointer), raw, len(raw), _TO_DEVICE, stream)

    def download(self, pointer: int, nbytes: int, stream: int) -> bytearray:
        """Copy from the GPU, waiting for the stream."""
        data = bytearray(nbytes)
        if nbytes:
            target = (ctypes.c_char * nbytes).from_buffer(data)
            self._copy(target, ctypes.c_void_p(pointer), nbytes, _TO_HOST, stream)
        self.synchronize(stream)
        return data

    def stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        return stream.value or 0

    def synchronize(self, stream: int) -> None:
        """Wait for all work on the stream; errors of that work surface here."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))
        self._on_the_way.pop(stream, None)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def event(self) -> int:
        event = ctypes.c_void_p()
        self._call("cudaEventCreate", ctypes.byref(event))
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events, to about half a microsecond."""
        self._call("cudaEventSynchronize", ctypes.c_void_p(end))
        milliseconds = ctypes.c_float()
        self._call(
            "cudaEventElapsedTime",
            ctypes.byref(milliseconds),
            ctypes.c_void_p(start),
            ctypes.c_void_p(end),
        )
        return milliseconds.value

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    @contextmanager
    def capture(self, stream: int) -> Iterator[list[int]]:
        """Record what the block puts on the stream; the list then holds an executable graph."""
        made: list[int] = []
        graph = ctypes.c_void_p()
        mode = ctypes.c_int(_CAPTURE_THREAD_LOCAL)
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), mode)
        try:
            yield made
        except BaseException:  # ends the capture; what the block raised is the better message
            self._library.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
            raise
        self._call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        executable = ctypes.c_void_p()
        try:
            # cudaGraphInstantiate itself takes other arguments in CUDA 11 than since.
            self._call(
                "cudaGraphInstantiateWithFlags",
                ctypes.byref(executable),
                graph,
                ctypes.c_ulonglong(0),
            )
        finally:
            self._call("cudaGraphDestroy", graph)
        made.append(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    def _copy(self, target: Any, source: Any, nbytes: int, kind: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            target,
            source,
            ctypes.c_size_t(nbytes),
            ctypes.c_int(kind),
            ctypes.c_void_p(stream),
        )

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return value.value

    def _version(self, function: str) -> str:
        value = ctypes.c_int()
        self._call(function, ctypes.byref(value))
        return f"{value.value // 1000}.{value.value % 1000 // 10}"

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise DeviceError(
                f"this CUDA runtime has no {name}; install CUDA 12 or newer"
            ) from None
        code = function(*arguments)
        if code == 0:
            return
        text = self._library.cudaGetErrorString(code) or b"unknown error"
        self._library.cudaGetLastError()  # so that the next call is not blamed for this one
        hint = f"; {_HINTS[code]}" if code in _HINTS else ""
        raise DeviceError(f"{text.decode(errors='replace')} ({name}, code {code}){hint}")


def _load_library() -> Any:
    folders = [f"{path}/{wheel}" for path in sys.path for wheel in WHEELS]
    wheels = [file for folder in folders for file in sorted(glob.glob(f"{folder}/libcudart.so*"))]
    for name in (*LIBRARIES, *wheels):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError(
        "the CUDA runtime (libcudart) was not found; on a Jetson it comes with JetPack "
        "(`sudo apt install nvidia-jetpack`), elsewhere with CUDA or "
        "`pip install nvidia-cuda-runtime`; LD_LIBRARY_PATH names other places"
    )
