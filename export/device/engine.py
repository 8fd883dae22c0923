"""A plan file, loaded and run: the same code for every TensorRT from 10.3 on and TensorRT-RTX."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cuda import Cuda
from .errors import DeviceError

Shape = tuple[int, ...]
# Of TensorRT's types those that our components have at their borders.
DTYPES = {"HALF": "float16", "FLOAT": "float32", "INT32": "int32", "INT64": "int64"}
ITEM_BYTES = {"float16": 2, "float32": 4, "int32": 4, "int64": 8}


class Engine:
    """A loaded plan with its own stream and device buffers; close it, or use it in a `with` block.

    `inputs` and `outputs`: name → (dtype, shape), with -1 where the plan leaves a size free.
    `memory`: bytes of `weights` (the plan; less what is streamed) and of `context`.
    """

    def __init__(
        self,
        trt: Any,
        plan: Path,
        *,
        sha256: str,
        cuda: Cuda | None = None,
        cuda_graph: bool = False,
        built_for: str = "",
        weight_budget: int | None = None,
        allow_host_code: bool = False,
        log: Callable[[str, str], None] | None = None,
    ) -> None:
        """Load the plan; nothing of it is looked at before its digest is right.

        `built_for` tells where the plan is from if it does not load here, such as "TensorRT 10.3.0
        on compute capability 8.7". `weight_budget` bytes stay on the GPU of a plan built for
        weight streaming. `allow_host_code`: version compatible plans bring code of their own and
        load only with it. `log(severity, message)` hears what TensorRT says.

        Raises:
            DeviceError: the digest differs (exit code 3), the plan is for another version or GPU,
                or there is no GPU or too little memory.
        """
        self.gpu_milliseconds: float | None = None
        self._path, self._cuda_graph, self._graph = plan, cuda_graph, 0
        self._buffers: dict[str, tuple[int, int]] = {}  # name → address, bytes
        self._shapes: dict[str, Shape] | None = None  # those given, that the buffers are for
        self._events: tuple[int, ...] = ()
        self._stream = 0
        self._context: Any = None
        self._config: Any = None
        self._cache: Any = None
        self._cache_file: Path | None = None
        # TensorRT-RTX compiles kernels when a plan is first run here, and can keep them.
        if hasattr(getattr(trt, "IRuntimeConfig", None), "create_runtime_cache"):
            name = f"{trt.__name__}-{trt.__version__}-{sha256[:16]}.cache"
            self._cache_file = _cache_home() / name
        self._says = _make_logger(trt, log)
        with _checked(plan, sha256) as content:
            self._cuda = cuda or Cuda.load()
            self._runtime = _started(trt, self._says)
            if allow_host_code:
                self._runtime.engine_host_code_allowed = True
            self._engine: Any = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            came = f"; it was built for {built_for}" if built_for else ""
            raise DeviceError(
                f"{plan}: cannot be loaded by {trt.__name__} {trt.__version__} on "
                f"{self._cuda.name} (compute capability {self._cuda.compute_capability})"
                f"{self._says.reason()}{came}; a plan runs only with the version and the kind of "
                "GPU it was built for: build it again for this one"
            )
        try:
            if weight_budget is not None:
                self._engine.weight_streaming_budget_v2 = weight_budget
            self._context = self._create_context(trt)
            self._prepare(trt, weight_budget)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(
        self, feeds: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None
    ) -> dict[str, bytearray]:
        """Inputs in (bytes-like, C order, right dtype), outputs out; sets `gpu_milliseconds`.

        `shapes` are needed for inputs with free sizes only.

        Raises:
            DeviceError: missing or unknown inputs, wrong sizes, or the GPU failed.
        """
        self.upload(feeds, shapes)
        self.launch()
        self.wait()
        return self.read()

    def upload(self, feeds: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> None:
        """Put inputs in place; they stay there for any number of launches."""
        if set(feeds) != set(self.inputs):
            raise DeviceError(
                f"{self._path}: takes {', '.join(self.inputs)}, got {', '.join(feeds) or 'nothing'}"
            )
        asked = {name: tuple(shape) for name, shape in (shapes or {}).items()}
        if asked != self._shapes:
            self._shapes = None
            self._set_shapes(asked)
            self._shapes = asked
        for name, data in feeds.items():
            address, nbytes = self._buffers[name]
            if memoryview(data).nbytes != nbytes:
                raise DeviceError(
                    f"{self._path}: {name} takes {nbytes} bytes ({self.inputs[name][0]} "
                    f"{list(self.shape(name))}), got {memoryview(data).nbytes}"
                )
            self._cuda.upload(address, data, self._stream)

    def launch(self) -> None:
        """Put one inference on the stream, between two events, and return at once."""
        if self._cuda_graph and not self._graph:
            self._graph = self._record_graph()
        start, end = self._events
        self._cuda.record(start, self._stream)
        if self._graph:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._enqueue()
        self._cuda.record(end, self._stream)

    def wait(self) -> float:
        """Wait for the last launch; returns its milliseconds on the GPU, copies left out."""
        self._cuda.synchronize(self._stream)
        self.gpu_milliseconds = self._cuda.elapsed_ms(*self._events)
        return self.gpu_milliseconds

    def read(self) -> dict[str, bytearray]:
        return {
            name: self._cuda.download(*self._buffers[name], self._stream) for name in self.outputs
        }

    def close(self) -> None:
        """Give everything back; a second call does nothing. Keeps a runtime cache for next time."""
        if self._cache_file and self._cache is not None:
            _save_cache(self._cache_file, self._cache)
        if self._graph:
            self._cuda.destroy_graph(self._graph)
        self._release_buffers()
        for event in self._events:
            self._cuda.destroy_event(event)
        if self._stream:
            self._cuda.destroy_stream(self._stream)
        self._graph, self._events, self._stream = 0, (), 0
        # In this order: a context must not outlive its engine, nor that its runtime.
        self._context = None
        self._config = self._cache = None
        self._engine = None
        self._runtime = None

    def _create_context(self, trt: Any) -> Any:
        if self._cache_file:
            self._config = self._engine.create_runtime_config()
            self._cache = self._config.create_runtime_cache()
            if self._cache_file.is_file():
                self._cache.deserialize(self._cache_file.read_bytes())  # it refuses what is stale
            self._config.set_runtime_cache(self._cache)
            # Its plans may allocate while they run, which no capture of ours survives.
            if self._cuda_graph and hasattr(self._config, "cuda_graph_strategy"):
                self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                self._cuda_graph = False
            context = self._engine.create_execution_context(self._config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            free, total = (x >> 20 for x in self._cuda.mem_get_info())
            needed = self._engine.device_memory_size_v2 >> 20
            raise DeviceError(
                f"{self._path}: TensorRT could not make room to run it{self._says.reason()}: needs "
                f"{needed} MiB beside its weights, {free} of {total} MiB are free; close other "
                "programs, or use --residency sequential or smaller pictures"
            )
        return context

    def _prepare(self, trt: Any, weight_budget: int | None) -> None:
        engine = self._engine
        self.inputs: dict[str, tuple[str, Shape]] = {}
        self.outputs: dict[str, tuple[str, Shape]] = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype = engine.get_tensor_dtype(name).name
            if dtype not in DTYPES:
                raise DeviceError(
                    f"{self._path}: {name} is of type {dtype}, expected {', '.join(DTYPES)}; "
                    "export and build the model again"
                )
            takes = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if takes else self.outputs)[name] = (
                DTYPES[dtype],
                tuple(engine.get_tensor_shape(name)),
            )
        weights = self._path.stat().st_size
        if weight_budget is not None:
            weights -= max(0, engine.streamable_weights_size - weight_budget)
        self.memory = {"weights": weights, "context": int(engine.device_memory_size_v2)}
        self._stream = self._cuda.stream()
        self._events = (self._cuda.event(), self._cuda.event())
        if all(size >= 0 for _, shape in self.inputs.values() for size in shape):
            self._allocate()
            self._shapes = {}

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Take the inputs' sizes and the first profile that allows them."""
        free = {name for name, (_, shape) in self.inputs.items() if -1 in shape}
        if missing := sorted(free - set(shapes)):
            raise DeviceError(f"{self._path}: {missing[0]} has free sizes; give its shape")
        fitting = [
            p for p in range(self._engine.num_optimization_profiles) if self._fits(shapes, p)
        ]
        if not fitting:
            wanted = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
            raise DeviceError(
                f"{self._path}: built for other sizes than {wanted}; build it again for these"
            )
        if self._context.active_optimization_profile != fitting[0]:
            self._context.set_optimization_profile_async(fitting[0], self._stream)
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        self._allocate()

    def _fits(self, shapes: Mapping[str, Shape], profile: int) -> bool:
        for name, shape in shapes.items():
            low, _, high = (
                tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, profile)
            )
            if len(shape) != len(low):
                return False
            if not all(a <= x <= b for a, x, b in zip(low, shape, high, strict=True)):
                return False
        return True

    def _allocate(self) -> None:
        self._release_buffers()
        if self._graph:  # it holds the old addresses
            self._cuda.destroy_graph(self._graph)
            self._graph = 0
        for name, (dtype, _) in {**self.inputs, **self.outputs}.items():
            shape = self.shape(name)
            if -1 in shape:
                raise DeviceError(f"{self._path}: the size of {name} depends on its contents")
            nbytes = math.prod(shape) * ITEM_BYTES[dtype]
            self._buffers[name] = (self._cuda.malloc(nbytes), nbytes)
            self._context.set_tensor_address(name, self._buffers[name][0])

    def _release_buffers(self) -> None:
        for address, _ in self._buffers.values():
            self._cuda.free(address)
        self._buffers = {}

    def shape(self, name: str) -> Shape:
        """Of an input or output as it is now; free sizes are known once inputs were given."""
        return tuple(self._context.get_tensor_shape(name))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise DeviceError(f"{self._path}: TensorRT could not run it{self._says.reason()}")

    def _record_graph(self) -> int:
        self._enqueue()  # what is done once only must not become part of the graph
        self._cuda.synchronize(self._stream)
        with self._cuda.capture(self._stream) as made:
            self._enqueue()
        return made[0]


@contextmanager
def _checked(path: Path, sha256: str) -> Iterator[memoryview]:
    """The bytes of a file whose digest is right, mapped: they take no memory of the process."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:  # ValueError: an empty file cannot be mapped
        raise DeviceError(f"{path}: cannot be read ({e}); build the engine again") from e
    with content, memoryview(content) as view:
        if hashlib.sha256(view).hexdigest() != sha256:
            raise DeviceError(
                f"{path}: is not the plan that was built (its sha256 differs), so it was not "
                "loaded; build the engine again",
                exit_code=3,
            )
        yield view


def _make_logger(trt: Any, log: Callable[[str, str], None] | None) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, which TensorRT's calls answer with None or False only."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(" ".join(msg.split()))
            if log:
                log(severity.name, msg)

        def reason(self) -> str:
            return f" ({self.errors[-1][:300]})" if self.errors else ""

    return Logger()


def _started(trt: Any, logger: Any) -> Any:
    try:
        runtime = trt.Runtime(logger)
    except (TypeError, RuntimeError) as e:  # the bindings' answer to a null pointer
        raise DeviceError(f"{trt.__name__} cannot start{logger.reason() or f' ({e})'}") from e
    return runtime


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sdcompress"


def _save_cache(file: Path, cache: Any) -> None:
    """Best effort: the cache saves a minute at the next start, and nothing depends on it."""
    work = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        work.write_bytes(memoryview(cache.serialize()))
        os.replace(work, file)
    except (OSError, TypeError):
        work.unlink(missing_ok=True)
