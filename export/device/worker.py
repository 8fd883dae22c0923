"""The jobs that run in processes of their own. A job is JSON in, JSON out."""

from __future__ import annotations

import importlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .cuda import Cuda
from .engine import Engine
from .errors import DeviceError
from .golden import relative_error, unpack
from .process import QUIET

Job = Mapping[str, Any]
# What the figures of a component are called.
STAGES = {"text_encoder": "text_encoder", "unet": "unet_step", "vae_decoder": "vae_decoder"}


def main(arguments: Sequence[str]) -> int:
    """QUESTION ANSWER: do the job in one file; the answer, or the error, goes to the other."""
    question, answer = arguments
    job = json.loads(Path(question).read_text())
    try:
        result = JOBS[job["job"]](job)
    except DeviceError as e:
        result = {"error": str(e), "exit_code": e.exit_code}
    Path(answer).write_text(json.dumps(result))
    return 0


def load_tensorrt(name: str) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`; raises DeviceError with how to get it here."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        if name == "tensorrt_rtx":
            how = "`pip install tensorrt-rtx`"
        elif platform.machine() == "aarch64":
            how = (
                "on a Jetson `sudo apt install nvidia-jetpack` brings it for the system's python3 "
                "(a virtual environment needs --system-site-packages)"
            )
        else:
            how = (
                "install TensorRT 10.3 or newer with its Python wheel, or `pip install "
                "tensorrt-rtx` and add --module tensorrt_rtx"
            )
        raise DeviceError(
            f"the Python module {name} cannot be imported ({e}); {how}; or use the other path: "
            "--trtexec /usr/src/tensorrt/bin/trtexec"
        ) from e


def probe(job: Job) -> dict[str, Any]:
    """What is here: version of the module and, unless `gpu` is false, the facts of the GPU."""
    facts: dict[str, Any] = {}
    if job["module"]:
        facts["version"] = load_tensorrt(job["module"]).__version__
    if job["gpu"]:
        cuda = Cuda.load()
        free, total = cuda.mem_get_info()
        facts["gpu"] = {
            "name": cuda.name,
            "compute_capability": cuda.compute_capability,
            "free": free,
            "total": total,
            "pci_bus_id": cuda.pci_bus_id,
            "driver": cuda.driver_version,
            "cuda": cuda.runtime_version,
        }
    return facts


def check(job: Job) -> dict[str, Any]:
    """Run one engine on the golden inputs; `errors`: relative error of each output."""
    with _open(job, job["engine"]) as engine:
        found = engine.run(_feeds(job["engine"]))
    errors = {}
    for tensor in job["engine"]["outputs"]:
        if tensor["name"] not in found:
            raise DeviceError(f"{job['engine']['plan']}: gives no {tensor['name']}; build it again")
        expected = Path(tensor["file"]).read_bytes()
        dtype = engine.outputs[tensor["name"]][0]
        errors[tensor["name"]] = relative_error(
            unpack(found[tensor["name"]], dtype), unpack(expected, tensor["dtype"])
        )
    return {"errors": errors}


def measure(job: Job) -> dict[str, Any]:
    """Time the engines of one twin; see `_resident` and `_sequential`. All times in ms.

    `load`: all engines, from the digest to the first inference; then a list of each stage's times
    between CUDA events, and of whole pictures (every component as often as a picture calls it, one
    after the other, without guidance and scheduler) by the wall clock.
    """
    return _resident(job) if job["residency"] == "resident" else _sequential(job)


def _resident(job: Job) -> dict[str, Any]:
    memory = _Memory()
    load = 0.0
    with ExitStack() as stack:
        engines = []
        for described in job["engines"]:
            engine, milliseconds = _ready(job, described, memory)
            engines.append(stack.enter_context(engine))
            load += milliseconds
        for _ in range(job["warm_up"]):
            _picture(job["engines"], engines)
        memory.look()
        print(QUIET, flush=True)
        result: dict[str, Any] = {"load": [load]}
        for described, engine in zip(job["engines"], engines, strict=True):
            result[STAGES[described["component"]]] = _times(job, described, engine)
        result["picture"] = [
            _picture(job["engines"], engines) for _ in range(job["iterations"]["picture"])
        ]
        memory.look()
        held = [engine.memory for engine in engines]
    return {**result, "device_memory": memory.summary(held, sum)}


def _sequential(job: Job) -> dict[str, Any]:
    """One engine at a time, each loaded twice: for memory and load time, then for the clock.

    A picture is the sum of what its components take; loading is told apart.
    """
    memory = _Memory()
    load, held = 0.0, []
    for described in job["engines"]:
        engine, milliseconds = _ready(job, described, memory)
        load += milliseconds
        held.append(engine.memory)
        engine.close()
    print(QUIET, flush=True)
    result: dict[str, Any] = {"load": [load]}
    pictures = [0.0] * job["iterations"]["picture"]
    for described in job["engines"]:
        engine, _ = _ready(job, described, memory)
        with engine:
            for _ in range(job["warm_up"]):
                _picture([described], [engine])
            result[STAGES[described["component"]]] = _times(job, described, engine)
            pictures = [whole + _picture([described], [engine]) for whole in pictures]
            memory.look()
    return {**result, "picture": pictures, "device_memory": memory.summary(held, max)}


class _Memory:
    """The lowest free memory seen, against what was free before anything was loaded."""

    def __init__(self) -> None:
        self.cuda = Cuda.load()
        self._before = self._lowest = self.cuda.mem_get_info()[0]

    def look(self) -> None:
        self._lowest = min(self._lowest, self.cuda.mem_get_info()[0])

    def summary(self, held: Sequence[Mapping[str, int]], together: Any) -> dict[str, int]:
        """Bytes; `together` says how those of the components add up."""
        weights, context = (together(m[part] for m in held) for part in ("weights", "context"))
        return {"weights": weights, "context": context, "peak": self._before - self._lowest}


def _ready(job: Job, described: Job, memory: _Memory) -> tuple[Engine, float]:
    """An engine that has run once, and the milliseconds that took."""
    started = time.perf_counter()
    engine = _open(job, described, memory.cuda)
    engine.run(_feeds(described))
    milliseconds = (time.perf_counter() - started) * 1000
    memory.look()
    return engine, milliseconds


def _open(job: Job, described: Job, cuda: Cuda | None = None) -> Engine:
    return Engine(
        load_tensorrt(job["module"]),
        Path(described["plan"]),
        sha256=described["sha256"],
        cuda=cuda,
        cuda_graph=job["cuda_graph"],
        built_for=described["built_for"],
    )


def _feeds(described: Job) -> dict[str, bytes]:
    return {tensor["name"]: Path(tensor["file"]).read_bytes() for tensor in described["inputs"]}


def _times(job: Job, described: Job, engine: Engine) -> list[float]:
    times = []
    for _ in range(job["iterations"][STAGES[described["component"]]]):
        engine.launch()
        times.append(engine.wait())
    return times


def _picture(described: Sequence[Job], engines: Sequence[Engine]) -> float:
    started = time.perf_counter()
    for one, engine in zip(described, engines, strict=True):
        for _ in range(one["calls"]):
            engine.launch()
        engine.wait()
    return (time.perf_counter() - started) * 1000


JOBS = {"probe": probe, "check": check, "measure": measure}
