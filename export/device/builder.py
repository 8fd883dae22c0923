"""The one builder: an ONNX file in, a plan out, for every TensorRT from 10.3 on and TensorRT-RTX.

It asks the module what it can do and never goes by a version number. What is asked for and not
there is an error; only the means of watching a build (progress, timing cache, detailed layer
names, loading the result to look into it) may be missing, and the report then says so.

Each build is a process of its own, so that one that runs out of memory takes nobody along:

    build(trt, request)                          in this process
    run_in_process(request, argv_prefix)         starts `*argv_prefix REQUEST RESULT`
    build_in_process(request, argv_prefix)       likewise, and goes down the ladder below

`argv_prefix` is `process.command_of("builder")`, which runs `main` with the two paths.

The ladder: on running out of memory, or where TensorRT left out tactics for lack of it, the build
is repeated with half the workspace, a quarter of it, then one and two levels of optimisation less.
If that is not enough, `OutOfMemoryError` tells the caller, who alone can say whether pictures may
be smaller: all components must agree on that.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import DeviceError
from .evidence import LogFacts, inspector_tactics, read_log, weigh

PROGRESS = "\x1eprogress "  # begins the lines of the child's output that tell how far it is
SAMPLE_EVERY_S = 0.05
DEFAULT_LEVEL = 3  # TensorRT's own
FIRST_WORKSPACE_MB = 1024  # of the ladder, where TensorRT was left to take all there is
FIRST_VERSION = (10, 3)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input -> its smallest, usual and largest shape
Progress = Callable[[str, int, int], None]  # a phase, steps done, steps in all


@dataclass(frozen=True)
class Request:
    """What to build. Paths are absolute; `plan` and `log` are written, `log` is appended to.

    `shapes` pins each input to one shape; with `profiles` instead the inputs are free within
    them. `workspace_mb` in MiB; None leaves it, like `optimization_level`, to TensorRT.
    `timing_cache` is a folder. `device` names the GPU in the timing cache's file name.
    `compute_capability`, such as "8.9", is for modules that build for another GPU than this one's.
    `inspect`: load the plan once it is built, to ask it for its tactics and its memory.
    `refit_from`: build nothing, take this plan, whose sha256 is `refit_sha256`, and give it the
    weights of `onnx`.
    """

    module: str
    onnx: str
    plan: str
    log: str
    shapes: Shapes = field(default_factory=dict)
    profiles: tuple[Profile, ...] = ()
    sparse: bool = True
    workspace_mb: int | None = None
    optimization_level: int | None = None
    timing_cache: str | None = None
    device: str = "gpu"
    compute_capability: str | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None
    refit: bool = False
    strip: bool = False
    weight_streaming: bool = False
    inspect: bool = True
    check_flag: bool = False
    refit_from: str | None = None
    refit_sha256: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Request:
        data = json.loads(text)
        data["shapes"] = {name: tuple(shape) for name, shape in data["shapes"].items()}
        data["profiles"] = tuple(
            {name: tuple(tuple(shape) for shape in three) for name, three in profile.items()}
            for profile in data["profiles"]
        )
        return cls(**data)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class OutOfMemoryError(DeviceError):
    """The device had too little memory: a smaller build may succeed."""


def build(trt: Any, request: Request, progress: Progress | None = None) -> dict[str, Any]:
    """Build or refit one plan in this process; returns the facts for the report.

    Raises:
        OutOfMemoryError: too little memory, or tactics were left out for lack of it.
        DeviceError: anything else, in one line.
    """
    if request.strip and request.sparse:
        raise DeviceError(
            "a stripped plan is built without looking at weights, so it has no sparse kernels; "
            "set sparse: off, or strip: false"
        )
    check_version(request.module, str(trt.__version__))
    start, log_start = time.monotonic(), _size(request.log)
    work = _refit if request.refit_from else _build
    with _Log(request.log) as log, _inside(Path(request.onnx).parent):
        try:
            made = work(trt, request, log, progress)
        except (AttributeError, TypeError) as error:
            raise _not_ours(trt, request, log, error) from error
        except MemoryError as error:
            raise OutOfMemoryError("the build ran out of memory") from error
    seconds = round(time.monotonic() - start, 3)
    facts = _facts(request, log_start, made.log_end)
    if facts.out_of_memory:
        raise OutOfMemoryError(
            f"TensorRT left out tactics for lack of memory: {_plain(facts.out_of_memory[-1])}"
        )
    evidence = weigh(facts, made.tactics, made.context_bytes).as_dict()
    evidence["warnings"] += log.warnings
    return {
        "plan_bytes": made.size,
        "plan_sha256": made.sha256,
        "seconds": seconds,
        "missing": made.missing,
        **evidence,
    }


def check_version(module: str, version: str) -> None:
    """Refuse the generations that cannot read the graphs.

    Raises:
        DeviceError: which names the upgrade.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if module == "tensorrt" and numbers < FIRST_VERSION:
        raise DeviceError(
            f"TensorRT {version} is too old, its parser does not read opset 18; upgrade to "
            "TensorRT 10.3 or newer, on a Jetson to JetPack 6.1 or newer"
        )


def _not_ours(trt: Any, request: Request, log: _Log, error: Exception) -> DeviceError:
    """A name or an argument the module does not know, or an object it could not make."""
    title = f"{request.module} {trt.__version__}"
    said = _plain(log.errors[-1]) if log.errors else None
    log.write("ERROR", "".join(traceback.format_exception(error)))
    if said:
        return DeviceError(f"{title} failed ({said}); see {log.path}")
    return DeviceError(
        f"{title} is not one this builder knows ({_plain(error)}); use TensorRT 10.3 to 11 or a "
        "current TensorRT-RTX"
    )


@dataclass
class _Made:
    """A plan that was written, where the log of its build ends, and what loading it told."""

    size: int
    sha256: str
    log_end: int
    missing: list[str]
    tactics: list[str] | None = None
    context_bytes: int | None = None


def _build(trt: Any, request: Request, log: _Log, progress: Progress | None) -> _Made:
    missing: list[str] = []
    log.attach(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(_network_flags(trt))
    parser = _parse(trt, network, request, log)
    config = builder.create_builder_config()
    _set_shapes(builder, network, config, request)
    _set_flags(trt, config, request)
    _set_limits(trt, config, request)
    _set_hardware(trt, config, request, log)
    try:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    except AttributeError:
        missing.append("detailed layer names")
    monitor = _monitor(trt, config, progress, missing)
    cache = _TimingCache(config, trt, request, log, missing)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failure(request, log)
    made = _save(plan, request, missing)
    cache.save(missing)
    del plan, cache, config, parser, network, builder, monitor
    if request.inspect:
        _inspect(trt, request, log, made)
    return made


def _network_flags(trt: Any) -> int:
    """Types are what the graph says. From TensorRT 11 on that is the only way there is.

    Raises:
        DeviceError: a module with weak typing that cannot do without.
    """
    if not hasattr(trt.BuilderFlag, "FP16"):  # the flags of weak typing are gone
        return 0
    try:
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    except AttributeError as error:
        raise DeviceError(
            f"this TensorRT ({trt.__version__}) cannot build strongly typed networks; "
            "upgrade to TensorRT 10.3 or newer (JetPack 6.1 or newer)"
        ) from error


def _parse(trt: Any, network: Any, request: Request, log: _Log) -> Any:
    """The parser, which owns the weights the network refers to."""
    model = Path(request.onnx)
    if not model.is_file():
        raise DeviceError(f"{model}: there is no such file; copy the whole bundle again")
    parser = trt.OnnxParser(network, log.logger)
    # By name alone, so that the log names no folder of this machine.
    if not parser.parse_from_file(model.name):
        raise _parser_failure(parser, model, log)
    return parser


def _parser_failure(parser: Any, model: Path, log: _Log) -> DeviceError:
    if missing := next((e for e in log.errors if "Failed to open file" in e), None):
        name = Path(missing.rpartition(":")[2].strip()).name
        return DeviceError(f"{model}: its data file {name} is missing; copy the whole folder again")
    if _facts_of(log.errors).out_of_memory:
        return OutOfMemoryError(f"{model}: TensorRT ran out of memory while reading it")
    if not parser.num_errors:
        return DeviceError(f"{model}: TensorRT cannot read it and gives no reason; see {log.path}")
    error = parser.get_error(parser.num_errors - 1)
    node = f" at node {error.node_name()} ({error.node_operator()})" if error.node_name() else ""
    return DeviceError(
        f"{model}: TensorRT cannot read it{node}: {_plain(error.desc())}; "
        "export it again, or use a newer TensorRT"
    )


def _set_shapes(builder: Any, network: Any, config: Any, request: Request) -> None:
    inputs = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        inputs[tensor.name] = tensor
    asked = [request.shapes] if request.shapes else request.profiles
    for shapes in asked:
        if unknown := sorted(set(shapes) - set(inputs)):
            raise DeviceError(
                f"{request.onnx}: has no input {unknown[0]!r}, only {', '.join(sorted(inputs))}"
            )
    for name, shape in request.shapes.items():
        if shape:  # a scalar has none to choose
            inputs[name].shape = shape
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            if low:
                profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(profile)


def _set_flags(trt: Any, config: Any, request: Request) -> None:
    """REFIT and not its variants where weights will change: REFIT_IDENTICAL promises that they do
    not, and REFIT_INDIVIDUAL wants a list of names to gain nothing, as every weight may change.
    A stripped plan gets the very weights back that it was built with, so it can be IDENTICAL.
    """
    wanted = {
        "SPARSE_WEIGHTS": request.sparse,
        "VERSION_COMPATIBLE": request.version_compatible,
        "REFIT": request.refit,
        "REFIT_IDENTICAL": request.strip and not request.refit,
        "STRIP_PLAN": request.strip,
        "WEIGHT_STREAMING": request.weight_streaming,
    }
    for name, set_it in wanted.items():
        if set_it:
            flag = getattr(trt.BuilderFlag, name, None)
            if flag is None:
                raise _lacks(trt, request, f"BuilderFlag.{name}")
            config.set_flag(flag)


def _set_limits(trt: Any, config: Any, request: Request) -> None:
    if request.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mb << 20)
    if request.optimization_level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise _lacks(trt, request, "builder optimisation levels")
        config.builder_optimization_level = request.optimization_level


def _set_hardware(trt: Any, config: Any, request: Request, log: _Log) -> None:
    if request.hardware_compatible:
        level = getattr(
            getattr(trt, "HardwareCompatibilityLevel", None), request.hardware_compatible, None
        )
        if level is None or not hasattr(config, "hardware_compatibility_level"):
            raise _lacks(trt, request, f"hardware compatibility {request.hardware_compatible}")
        warned = len(log.warnings_seen)
        config.hardware_compatibility_level = level
        if any("unsupported" in w for w in log.warnings_seen[warned:]):
            raise _lacks(trt, request, f"hardware compatibility {request.hardware_compatible}")
    if not request.compute_capability:
        return
    if not hasattr(config, "num_compute_capabilities"):
        raise _lacks(trt, request, "building for another GPU than the one that is here")
    name = "SM" + request.compute_capability.replace(".", "")
    capability = getattr(trt.ComputeCapability, name, None)
    if capability is None:
        there = [m[2:] for m in trt.ComputeCapability.__members__ if m.startswith("SM")]
        offered = ", ".join(f"{digits[:-1]}.{digits[-1]}" for digits in there)
        raise DeviceError(
            f"{request.module} {trt.__version__} does not build for compute capability "
            f"{request.compute_capability}; it builds for {offered}"
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(capability, 0):
        raise DeviceError(
            f"{request.module} {trt.__version__} refused compute capability "
            f"{request.compute_capability}; see {log.path}"
        )


def _lacks(trt: Any, request: Request, what: str) -> DeviceError:
    return DeviceError(
        f"{request.module} {trt.__version__} has no {what}; leave that option out, "
        "or use another version"
    )


def _failure(request: Request, log: _Log) -> DeviceError:
    """Why there is no plan, by the errors in the log."""
    last = _plain(log.errors[-1]) if log.errors else "it gives no reason"
    facts = _facts_of(log.errors)
    if facts.out_of_memory:
        return OutOfMemoryError(f"TensorRT ran out of memory: {_plain(facts.out_of_memory[-1])}")
    if facts.over_workspace:
        return DeviceError(
            f"{request.onnx}: no tactic fits the workspace of {request.workspace_mb} MB; "
            "raise workspace_mb"
        )
    return DeviceError(f"{request.onnx}: TensorRT could not build it: {last}; see {log.path}")


def _save(plan: Any, request: Request, missing: list[str]) -> _Made:
    """Write the plan beside its place and rename it."""
    view = memoryview(plan)
    work = Path(f"{request.plan}.partial")
    try:
        with work.open("wb") as file:
            file.write(view)
        work.replace(request.plan)
    finally:
        work.unlink(missing_ok=True)
    return _Made(view.nbytes, hashlib.sha256(view).hexdigest(), _size(request.log), missing)


def _inspect(trt: Any, request: Request, log: _Log, made: _Made) -> None:
    """Load the plan just written and ask it for its tactics and its memory."""
    errors = len(log.errors)
    try:
        with _mapped(Path(request.plan)) as plan:
            engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
    except AttributeError:
        raise
    except Exception as error:  # the bindings raise classes of their own, all from Exception
        log.warnings.append(f"the engine could not be loaded to look into it ({_plain(error)})")
        return
    if engine is None:
        why = _plain(log.errors[-1]) if len(log.errors) > errors else "no reason was given"
        log.warnings.append(f"the engine could not be loaded to look into it ({why})")
        del log.errors[errors:]
        return
    try:
        made.context_bytes = int(engine.device_memory_size_v2)
    except AttributeError:
        made.missing.append("the engine's context memory")
    try:
        inspector = engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    except AttributeError:
        made.missing.append("the engine inspector")
    else:
        made.tactics = inspector_tactics(text)


def _refit(trt: Any, request: Request, log: _Log, progress: Progress | None) -> _Made:
    """Give a plan the weights of another ONNX file of the same structure."""
    assert request.refit_from is not None
    source = Path(request.refit_from)
    log.attach(trt)
    with _mapped(source) as plan:
        if hashlib.sha256(plan).hexdigest() != request.refit_sha256:
            raise DeviceError(
                f"{source}: is not the plan its manifest describes; build it again", exit_code=3
            )
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise _failure(request, log)
    if not engine.refittable:
        raise DeviceError(f"{source}: was not built to be refitted; build it with refit: true")
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    model = Path(request.onnx)
    if not parser.refit_from_file(model.name):
        raise _parser_failure(parser, model, log)
    if left := refitter.get_missing_weights():
        raise DeviceError(f"{model}: has no weights for {left[0]!r} of the engine; build it anew")
    if not refitter.refit_cuda_engine():
        raise _failure(request, log)
    return _save(engine.serialize(), request, [])


class _Log:
    """The whole verbose log, written as it comes; the few lines that errors quote, in memory."""

    logger: Any  # what TensorRT writes to, once attached

    def __init__(self, path: str) -> None:
        self.path = path
        self.errors: list[str] = []
        self.warnings_seen: list[str] = []
        self.warnings: list[str] = []  # our own, for the report

    def __enter__(self) -> _Log:
        # Line by line: when the system kills the process, the last line says where it was.
        self._file = open(self.path, "a", buffering=1, encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, severity: str, message: str) -> None:
        self._file.write(f"[{severity}] {message}\n")
        if severity == "WARNING":
            self.warnings_seen = [*self.warnings_seen[-20:], message]
        elif severity.endswith("ERROR"):
            self.errors = [*self.errors[-20:], message]

    def attach(self, trt: Any) -> None:
        """Make the logger that TensorRT calls; the base class must be there to be called at all."""
        base, outer = trt.ILogger, self
        _need(base, "log")

        class Logger(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                outer.write(severity.name, msg)

        self.logger = Logger()


def _need(base: Any, *methods: str) -> None:
    """AttributeError unless `base` calls all these methods of a class derived from it."""
    for method in methods:
        getattr(base, method)


def _monitor(trt: Any, config: Any, progress: Progress | None, missing: list[str]) -> Any:
    """Tell `progress` how far the build is; returns what must be kept alive until it ends."""
    if progress is None:
        return None
    try:
        base: Any = trt.IProgressMonitor
        _need(base, "phase_start", "step_complete", "phase_finish")
        _need(config, "progress_monitor")
    except AttributeError:
        missing.append("the progress monitor")
        return None
    tell = progress

    class Monitor(base):  # type: ignore[misc]
        """Called from TensorRT's own threads, which no exception may reach."""

        def __init__(self) -> None:
            base.__init__(self)
            self.steps: dict[str, int] = {}
            self.heard = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.step_complete(phase_name, -1)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """False, which stops the build, once nobody listens any more."""
            try:
                tell(phase_name, step + 1, self.steps.get(phase_name, 0))
            except OSError:
                self.heard = False
            return self.heard

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


class _TimingCache:
    """How long each tactic took, kept over builds: one file for each TensorRT and GPU."""

    def __init__(
        self, config: Any, trt: Any, request: Request, log: _Log, missing: list[str]
    ) -> None:
        self._path: Path | None = None
        self._config = config
        if not request.timing_cache:
            return
        if hasattr(config, "num_compute_capabilities"):
            raise _lacks(trt, request, "timing cache, because it times nothing while building")
        device = "".join(c if c.isalnum() or c in "._-" else "-" for c in request.device)
        path = Path(request.timing_cache) / f"{request.module}-{trt.__version__}-{device}.cache"
        try:
            stored = path.read_bytes() if path.is_file() else b""
            _need(config, "get_timing_cache")
            if not self._set(stored):
                log.warnings.append(f"the timing cache {path.name} did not fit and was begun anew")
                self._set(b"")
        except AttributeError:
            missing.append("the timing cache")
            return
        self._path = path

    def _set(self, stored: bytes) -> bool:
        cache = self._config.create_timing_cache(stored)
        return cache is not None and bool(self._config.set_timing_cache(cache, False))

    def save(self, missing: list[str]) -> None:
        if self._path is None:
            return
        try:
            measured = memoryview(self._config.get_timing_cache().serialize())
        except AttributeError:
            missing.append("the timing cache")
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Two builds may end at once: each writes a file of its own and the last one stays.
        work = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        try:
            work.write_bytes(measured)
            work.replace(self._path)
        finally:
            work.unlink(missing_ok=True)


def _facts(request: Request, start: int, end: int) -> LogFacts:
    """What the log says between two places in it."""

    def lines() -> Iterator[str]:
        with open(request.log, "rb") as file:
            file.seek(start)
            while file.tell() < end:
                yield file.readline().decode("utf-8", errors="replace")

    return read_log(lines(), request.workspace_mb)


def _facts_of(errors: Sequence[str]) -> LogFacts:
    return read_log(f"[ERROR] {error}" for error in errors)


def _size(path: str) -> int:
    return Path(path).stat().st_size if Path(path).is_file() else 0


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, which take no memory of the process."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        yield view


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    if folder.is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _plain(text: object) -> str:
    """The first line of what a library said, short enough for an error of one line."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    line = (lines or ["no text"])[0]
    return line if len(line) <= 300 else line[:297] + "..."


# The process of one build, and the one that starts it.


def main(argv: Sequence[str]) -> int:
    """REQUEST.json RESULT.json: build in this process and write what came of it."""
    request = Request.from_json(Path(argv[0]).read_text(encoding="utf-8"))
    result: dict[str, Any]
    try:
        trt = importlib.import_module(request.module)
        result = {"done": build(trt, request, _tell)}
    except DeviceError as error:
        memory = isinstance(error, OutOfMemoryError)
        result = {"error": str(error), "memory": memory, "exit_code": error.exit_code}
    except ImportError as error:
        result = {"error": f"{request.module} cannot be imported ({error})", "exit_code": 1}
    work = Path(f"{argv[1]}.partial")
    work.write_text(json.dumps(result), encoding="utf-8")
    work.replace(argv[1])
    return 0


def _tell(phase: str, done: int, steps: int) -> None:
    print(f"{PROGRESS}{done} {steps} {phase}", flush=True)


def run_in_process(
    request: Request, argv_prefix: Sequence[str], progress: Progress | None = None
) -> dict[str, Any]:
    """One build in a process of its own; its facts and `peak_build_bytes`.

    The peak is of anonymous memory, sampled; the GPU's own memory is not in it. What the process
    and the driver print goes into the log.

    Raises:
        OutOfMemoryError: it said so, or the system killed it.
        DeviceError: anything else, in one line.
    """
    with tempfile.TemporaryDirectory(prefix="sdcompress-build-") as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(request.to_json(), encoding="utf-8")
        command = [*argv_prefix, str(asked), str(answer)]
        # The child finds the modules that this process finds.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        env = {**os.environ, "PYTHONPATH": paths}
        with (
            open(request.log, "ab", buffering=0) as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env) as child,
        ):
            try:
                with _peak_memory(child.pid) as peak:
                    for line in child.stdout or ():
                        _relay(line, log, progress)
                    code = child.wait()
            finally:
                child.kill()  # does nothing to one that has ended
        result = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else None
    if code == -signal.SIGKILL:
        raise OutOfMemoryError("the build was killed, as systems do when memory runs out")
    if result is None:
        raise DeviceError(f"the build {_how_it_ended(code)}; its last words are in {request.log}")
    if "error" in result:
        kind = OutOfMemoryError if result.get("memory") else DeviceError
        raise kind(result["error"], exit_code=result["exit_code"])
    return {**result["done"], "peak_build_bytes": max(peak) or None}


def _relay(line: bytes, log: Any, progress: Progress | None) -> None:
    text = line.decode("utf-8", errors="replace")
    if not text.startswith(PROGRESS):
        log.write(line)
    elif progress:
        done, steps, phase = text.removeprefix(PROGRESS).rstrip("\n").split(" ", 2)
        progress(phase, int(done), int(steps))


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


@contextlib.contextmanager
def _peak_memory(pid: int) -> Iterator[list[int]]:
    """Bytes of anonymous memory of a process, every now and then; mapped files left out."""
    samples, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_EVERY_S):
            with contextlib.suppress(OSError, KeyError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                kib = dict(line.split(":", 1) for line in lines)
                anonymous = (kib[name].split()[0] for name in ("RssAnon", "RssShmem"))
                samples.append(1024 * sum(map(int, anonymous)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Step:
    """One rung of the ladder that was tried and why it was left."""

    workspace_mb: int | None
    optimization_level: int | None
    failed: str


def ladder(request: Request) -> Iterator[Request]:
    """The request, and what to try after each time memory ran out; every rung keeps the last's."""
    yield request
    first = request.workspace_mb // 2 if request.workspace_mb else FIRST_WORKSPACE_MB
    for workspace in (first, first // 2):
        request = replace(request, workspace_mb=max(1, workspace))
        yield request
    level = DEFAULT_LEVEL if request.optimization_level is None else request.optimization_level
    for lower in range(level - 1, max(level - 3, -1), -1):
        request = replace(request, optimization_level=lower)
        yield request


def build_in_process(
    request: Request, argv_prefix: Sequence[str], progress: Progress | None = None
) -> dict[str, Any]:
    """Build one component, going down the ladder while memory runs out; returns its facts.

    They are the fields of `sdcompress.build_report.Component`: those of `build`, with
    `peak_build_bytes`, `workspace_mb` and `optimization_level` as finally used, `ladder` (the steps
    left behind), and `flag_changed_plan` if `check_flag` asks for it: whether building without
    SPARSE_WEIGHTS gives other bytes (see `_flag_changes_plan`).

    Raises:
        OutOfMemoryError: memory ran out on every rung. No plan is left then.
        DeviceError: the build failed for another reason.
    """
    Path(request.log).unlink(missing_ok=True)
    steps: list[Step] = []
    for rung in ladder(request):
        try:
            made = run_in_process(rung, argv_prefix, progress)
        except OutOfMemoryError as error:
            steps.append(Step(rung.workspace_mb, rung.optimization_level, str(error)))
            Path(rung.plan).unlink(missing_ok=True)
            continue
        changed = _flag_changes_plan(rung, argv_prefix, made) if rung.check_flag else None
        return {
            **made,
            "workspace_mb": rung.workspace_mb,
            "optimization_level": rung.optimization_level,
            "ladder": [asdict(step) for step in steps],
            "flag_changed_plan": changed,
        }
    raise OutOfMemoryError(
        f"{request.onnx}: out of memory on each of {len(steps)} attempts, the last with "
        f"workspace {steps[-1].workspace_mb} MB and optimisation level "
        f"{steps[-1].optimization_level} ({steps[-1].failed}); free memory or build for smaller "
        "pictures"
    )


def _flag_changes_plan(
    request: Request, argv_prefix: Sequence[str], made: dict[str, Any]
) -> bool | None:
    """Whether SPARSE_WEIGHTS changes the plan's bytes: build again without the flag.

    Builds alike need not give the same bytes: TensorRT-RTX writes a text encoder's two outputs in
    one order or the other. So where two builds differ more follow, in turn, until one with and one
    without the flag are the same. None if they never are and builds alike differ, too.
    """
    if not request.sparse:
        return None
    digests: dict[bool, set[str]] = {True: {made["plan_sha256"]}, False: set()}
    for sparse in (False, True, False, True, False):
        with tempfile.TemporaryDirectory(prefix="sdcompress-flag-") as folder:
            again = replace(
                request,
                sparse=sparse,
                inspect=False,
                plan=str(Path(folder) / "plan"),
                log=str(Path(folder) / "log"),
            )
            digests[sparse].add(run_in_process(again, argv_prefix)["plan_sha256"])
        if digests[True] & digests[False]:
            return False
    return True if len(digests[True]) == len(digests[False]) == 1 else None
