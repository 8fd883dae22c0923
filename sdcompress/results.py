"""What `results.json` holds: everything measured and everything needed to trust or repeat it.

Times are in milliseconds, memory and sizes in bytes. Ratios are sparse ÷ dense throughout: 0.8
means that the sparse engine takes 80 % of the dense one's time or memory.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    computed_field,
    model_validator,
)

from sdcompress.errors import InputError
from sdcompress.measure import Comparison
from sdcompress.plan import Accounting

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Known = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Series(_Record):
    """One figure of one contestant: percentiles over all iterations, and one median a process.

    `median` is the median over processes, and is what ratios are made of.
    """

    p50: _Positive
    p95: _Positive
    p99: _Positive
    iterations: int = Field(ge=1, description="iterations of all processes together")
    rounds: tuple[_Positive, ...] = Field(
        min_length=1, description="the median of each process, in round order"
    )

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


class Measure(_Record):
    """One figure of the dense engine, the sparse engine, and the dense engine once more."""

    unit: Literal["ms", "bytes"]
    dense: Series
    sparse: Series
    control: Series
    sparse_to_dense: Comparison
    control_to_dense: Comparison


class SparseKernels(_Record):
    """How many operations run on kernels that skip zeros, of how many, and how that is known."""

    used: _Count | None = Field(description="None where the backend does not tell")
    of: _Count
    how: str


class DeviceMemory(_Record):
    """Memory on an accelerator, bytes: the peak is above the level before the engine was loaded."""

    weights: _Count | None = None
    context: _Count | None = None
    peak: _Count | None = None
    process: _Count | None = Field(default=None, description="as the driver counts it (NVML)")


class Telemetry(_Record):
    """The accelerator beside one process: medians of what was read while it was timed.

    None where the device does not tell. `process` is the place in the order of all processes.
    """

    process: int
    contestant: str
    sm_clock_mhz: _Known | None = None
    memory_clock_mhz: _Known | None = None
    temperature_c: _Finite | None = None
    power_w: _Known | None = None


class Engine(_Record):
    """One of the two engines that were compared.

    `peak_memory`: of the process, by residency, in the host's memory; `device_memory_sequential`:
    of the accelerator, with one component loaded at a time. `plans`: sha256 of each
    component's plan file, where the backend builds such files.
    """

    digest: str
    backend: str
    providers: dict[str, str]
    options: dict[str, object]
    dtype: str
    bytes: _Count
    sparse_kernels: SparseKernels
    peak_memory: dict[Literal["resident", "sequential"], _Count] = {}
    device_memory: DeviceMemory | None = None
    device_memory_sequential: DeviceMemory | None = None
    plans: dict[str, str] = {}


class Setup(_Record):
    """How it was measured; `iterations` of each stage in a process, after `warm_up` of each."""

    rounds: int = Field(ge=1)
    iterations: dict[str, _Count]
    warm_up: _Count
    steps: _Count
    guidance: _Finite
    height: _Count
    width: _Count
    seed: int
    prompt: str
    memory: str
    command: str
    residency: Literal["resident", "sequential"] = "resident"
    timer: str = Field(default="wall clock", description="what timed the components")


class Control(_Record):
    """The dense engine against itself; if it differs, nothing else here can be trusted."""

    trustworthy: bool
    differs: tuple[str, ...]
    confidence: float = Field(gt=0, lt=1)


class Environment(_Record):
    """The machine and the software; figures hold for these."""

    machine: str
    processor: str
    cores: _Count
    memory_bytes: _Count
    governor: str | None
    load_before: _Known | None
    system: str
    python: str
    versions: dict[str, str]
    accelerator: str | None = None


class Check(_Record):
    """One thing that was looked at. `tensors` names those that failed, a few of them."""

    name: str
    passed: bool
    detail: str
    tensors: tuple[str, ...] = ()
    tolerance: float | None = None


class VerifyReport(_Record):
    """All checks of one bundle, named by its digest; `passed` if every one did."""

    bundle: str
    stage: str
    checks: tuple[Check, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


class Results(_Record):
    """The whole of results.json."""

    schema_version: Literal[1] = 1
    model: str
    recipe: str | None = None
    measures: dict[str, Measure]
    control: Control
    engines: dict[Literal["dense", "sparse"], Engine]
    setup: Setup
    environment: Environment
    sparsity: Accounting | None = None
    telemetry: tuple[Telemetry, ...] = ()
    quality: dict[str, _Finite] = Field(
        default={},
        description="sparse against dense pictures: psnr, median in dB, 100 where identical",
    )

    @model_validator(mode="after")
    def _both_engines(self) -> Results:
        if missing := {"dense", "sparse"} - set(self.engines):
            raise ValueError(f"engines: {' and '.join(sorted(missing))} missing")
        return self

    @property
    def plans_identical(self) -> bool | None:
        """Whether both engines are the same bytes; None where the backend has no plan files."""
        dense, sparse = (self.engines[twin].plans for twin in ("dense", "sparse"))
        return dense == sparse if dense and sparse else None

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises InputError where the file is missing or is not a results.json of this version."""
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); `sdcompress bench` makes it"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            why = first["msg"].removeprefix("Value error, ")
            raise InputError(
                f"{path}: not a results.json of schema version 1 ({where}: {why}); "
                "make it again with `sdcompress bench`"
            ) from error
