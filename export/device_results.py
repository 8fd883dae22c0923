"""What a device measured, read back. It comes from another machine: nothing is believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from export.comparison import TIMED, make_control, make_measures
from export.specs import COMPONENTS
from sdcompress.bundle import to_json
from sdcompress.errors import InputError
from sdcompress.plan import Accounting
from sdcompress.recipe import describe_first
from sdcompress.results import (
    DeviceMemory,
    Engine,
    Environment,
    Results,
    Setup,
    SparseKernels,
    Telemetry,
)

TWINS: tuple[Literal["dense", "sparse"], ...] = ("dense", "sparse")
LARGEST = 64 << 20  # bytes
# Of golden outputs: export.parity's bound for fp16, and for fp32 graphs too, because GPUs multiply
# those in TF32, which rounds like fp16.
TOLERANCE = 2e-2

_Text = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Known = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=1 << 50)]
_Times = Annotated[tuple[_Positive, ...], Field(min_length=1, max_length=100_000)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Lenient(BaseModel):
    """What is copied for people only; fields of other versions are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Memory(_Record):
    weights: _Count
    context: _Count
    peak: int = Field(gt=-(1 << 50), lt=1 << 50)


class _Answer(_Record):
    picture: _Times
    text_encoder: _Times
    unet_step: _Times
    vae_decoder: _Times
    load: _Times | None = None
    device_memory: _Memory | None = None
    peak_anonymous_bytes: _Count = 0


class _Seen(_Record):
    process: _Count
    contestant: Literal["dense", "sparse", "control"]
    sm_clock_mhz: _Known | None
    memory_clock_mhz: _Known | None
    temperature_c: float | None = Field(allow_inf_nan=False)
    power_w: _Known | None
    used_bytes: _Known | None


class _Facts(_Lenient):
    plan_bytes: _Count
    plan_sha256: _Digest
    layers_eligible: _Count | None
    layers_sparse: _Count | None
    log_generation: _Text | None
    sparse_tactics: tuple[_Text, ...]
    workspace_mb: _Count | None
    optimization_level: _Count | None


class _Check(_Record):
    twin: Literal["dense", "sparse"]
    component: _Name
    plan: _Digest
    error: _Known
    tolerance: _Known


class _Subject(_Lenient):
    model: _Text
    recipe: _Text | None
    dtype: _Text
    steps: int = Field(ge=1, lt=100_000)
    guidance: float = Field(allow_inf_nan=False)
    height: _Count
    width: _Count
    pruned_layers: _Count
    sparsity: Accounting | None


class _Setup(_Lenient):
    rounds: int = Field(ge=1, le=10_000)
    seed: int
    residency: Literal["resident", "sequential"]
    cuda_graph: bool
    timer: _Text
    telemetry_from: Literal["NVML", "tegrastats", "none"]
    command: _Text


class _Gpu(_Lenient):
    name: _Text
    compute_capability: _Name
    driver: _Name
    cuda: _Name


class _Environment(_Lenient):
    machine: _Text
    processor: _Text
    cores: _Count
    memory_bytes: _Count
    system: _Text
    python: _Text
    module: Literal["tensorrt", "tensorrt_rtx", "trtexec"]
    version: _Name
    gpu: _Gpu | None


_Answers = Annotated[tuple[_Answer, ...], Field(max_length=10_000)]
_Residency = Literal["resident", "sequential"]
_Twin = Literal["dense", "sparse"]


class _DeviceResults(_Lenient):
    """The results.json of the script; what it must have and may be, and nothing is assumed."""

    kind: Literal["device"]
    version: Literal[1]
    bundle: _Digest
    subject: _Subject
    target: _Name
    engines: dict[_Twin, dict[_Name, _Facts]]
    checks: tuple[_Check, ...]
    answers: dict[Literal["dense", "sparse", "control"], _Answers]
    telemetry: Annotated[tuple[_Seen, ...], Field(max_length=30_000)]
    iterations: dict[_Name, _Count]
    warm_up: _Count
    other_residency: dict[_Twin, _Answer | None]
    setup: _Setup
    environment: _Environment


def is_device_results(path: Path) -> bool:
    """Whether the file says that a device's script has written it; False for anything else."""
    try:
        if path.stat().st_size > LARGEST:
            return False
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == "device"


def read_results(path: Path) -> Results:
    """What a device measured, compared like what this machine measures.

    Raises:
        InputError: not a complete results.json of a device, or one that contradicts itself.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise _refusal(path, f"larger than {LARGEST >> 20} MiB")
        found = _DeviceResults.model_validate_json(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); copy it from the device") from e
    except ValidationError as e:
        raise _refusal(path, _printable(describe_first(e, "the document"))) from e
    for why in _contradictions(found):
        raise _refusal(path, why)
    try:
        return _results(found)
    except ValidationError as e:  # each figure is possible, and what they give is not
        raise _refusal(path, _printable(describe_first(e, "the document"))) from e


def _refusal(path: Path, why: str) -> InputError:
    return InputError(f"{path}: not the complete results of a device ({why}); copy it again")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _contradictions(found: _DeviceResults) -> Iterator[str]:
    if set(found.answers) != {"dense", "sparse", "control"}:
        yield "answers of dense, sparse and control are needed"
        return
    if {len(one) for one in found.answers.values()} != {found.setup.rounds}:
        yield f"there are not {found.setup.rounds} rounds of each contestant"
    for twin in TWINS:
        components = found.engines.get(twin, {})
        if set(components) != set(COMPONENTS):
            yield f"the {twin} engines are not {', '.join(COMPONENTS)}"
        checked = {c.component: c for c in found.checks if c.twin == twin}
        for name, facts in components.items():
            one = checked.get(name)
            if one is None or one.plan != facts.plan_sha256:
                yield f"{twin} {name} was not compared with the golden outputs"
            elif one.error > min(one.tolerance, TOLERANCE):
                yield f"{twin} {name} differs from the golden outputs by {one.error:.1e}"
    for name, dense in found.engines.get("dense", {}).items():
        sparse = found.engines.get("sparse", {}).get(name, dense)
        limits = [(e.workspace_mb, e.optimization_level) for e in (dense, sparse)]
        if limits[0] != limits[1]:
            yield f"the two {name} were built within different limits"


def _results(found: _DeviceResults) -> Results:
    answers: dict[str, list[dict[str, Any]]] = {
        name: [a.model_dump(mode="json", exclude_none=True) for a in one]
        for name, one in found.answers.items()
    }
    timed = [t for t in TIMED if all(t in a for one in answers.values() for a in one)]
    measures = make_measures(answers, timed)
    subject, setup, here = found.subject, found.setup, found.environment
    return Results(
        model=subject.model,
        recipe=subject.recipe,
        measures=measures,
        control=make_control(measures),
        engines={twin: _engine(found, twin) for twin in TWINS},
        setup=Setup(
            rounds=setup.rounds,
            iterations=found.iterations,
            warm_up=found.warm_up,
            steps=subject.steps,
            guidance=subject.guidance,
            height=subject.height,
            width=subject.width,
            seed=setup.seed,
            prompt="(seeded inputs of the device bundle)",
            memory="anonymous memory of the measured process (smaps_rollup); on the GPU: "
            "cudaMemGetInfo below the level before anything was loaded",
            command=setup.command,
            residency=setup.residency,
            timer=setup.timer,
        ),
        environment=Environment(
            machine=here.machine,
            processor=here.processor,
            cores=here.cores,
            memory_bytes=here.memory_bytes,
            governor=None,
            load_before=None,
            system=here.system,
            python=here.python,
            versions={
                here.module: here.version,
                **({"cuda": here.gpu.cuda, "driver": here.gpu.driver} if here.gpu else {}),
            },
            accelerator=f"{here.gpu.name}, compute capability {here.gpu.compute_capability}"
            if here.gpu
            else found.target,
        ),
        sparsity=subject.sparsity,
        telemetry=tuple(
            Telemetry.model_validate(seen.model_dump(exclude={"used_bytes"}))
            for seen in found.telemetry
        ),
    )


def _engine(found: _DeviceResults, twin: _Twin) -> Engine:
    components, here = found.engines[twin], found.environment
    plans = {name: facts.plan_sha256 for name, facts in components.items()}
    title = "TensorRT-RTX" if here.module == "tensorrt_rtx" else "TensorRT"
    provider = f"{title} {here.version}"
    if here.gpu:
        provider += f" SM{here.gpu.compute_capability.replace('.', '')}"
    held = _held(found, twin)
    host = {r: _median([a.peak_anonymous_bytes for a in some]) for r, some in held.items()}
    used: dict[_Residency, list[float]] = {"resident": [], "sequential": []}
    used[found.setup.residency] = [
        seen.used_bytes
        for seen in found.telemetry
        if seen.contestant == twin and seen.used_bytes is not None
    ]
    return Engine(
        digest=hashlib.sha256(to_json(plans).encode()).hexdigest(),
        backend=here.module,
        providers=dict.fromkeys(components, provider),
        options={
            "cuda_graph": found.setup.cuda_graph,
            "workspace_mb": {n: f.workspace_mb for n, f in components.items()},
            "optimization_level": {n: f.optimization_level for n, f in components.items()},
        },
        dtype=found.subject.dtype,
        bytes=sum(facts.plan_bytes for facts in components.values()),
        sparse_kernels=_kernels(found, twin),
        peak_memory={r: peak for r, peak in host.items() if peak},
        device_memory=_device_memory(held["resident"], used["resident"]),
        device_memory_sequential=_device_memory(held["sequential"], used["sequential"]),
        plans=plans,
    )


def _held(found: _DeviceResults, twin: _Twin) -> dict[_Residency, Sequence[_Answer]]:
    """The answers of a twin by how its engines were held."""
    one = found.other_residency.get(twin)
    other: _Residency = "sequential" if found.setup.residency == "resident" else "resident"
    return {found.setup.residency: found.answers[twin], other: [one] if one else []}


def _device_memory(answers: Sequence[_Answer], used: Sequence[float] = ()) -> DeviceMemory | None:
    """Medians over processes; `used` is what the driver counted for them."""
    told = [answer.device_memory for answer in answers if answer.device_memory]
    if not told and not used:
        return None
    return DeviceMemory(
        weights=_median([one.weights for one in told]),
        context=_median([one.context for one in told]),
        peak=_median([max(0, one.peak) for one in told]),
        process=_median(used),
    )


def _median(values: Sequence[float]) -> int | None:
    return int(median(values)) if values else None


def _kernels(found: _DeviceResults, twin: _Twin) -> SparseKernels:
    facts = found.engines[twin].values()
    used = [one.layers_sparse for one in facts]
    eligible = [one.layers_eligible for one in facts if one.layers_eligible is not None]
    if None in used:
        how = "TensorRT's log does not say which layers use sparse kernels"
    elif any(one.sparse_tactics for one in facts) or not all(one.log_generation for one in facts):
        how = "names of the engine's tactics"
    else:
        how = "TensorRT's verbose log"
    pruned = found.subject.pruned_layers if twin == "sparse" else 0
    return SparseKernels(
        used=None if None in used else sum(one for one in used if one is not None),
        of=sum(eligible) if eligible else pruned,
        how=how,
    )
