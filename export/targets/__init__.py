"""The devices engines are made for: one YAML file each, or a file of the user's own.

Light: no torch, no onnx, no tensorrt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from export.specs import OPSET
from sdcompress.errors import UsageError
from sdcompress.recipe import describe_first, read_yaml

SHIPPED = Path(__file__).parent
FIRST_JETPACK = "6.1"
FIRST_TENSORRT = "10.3"
# What the ahead-of-time builder of TensorRT-RTX 1.7 offers; no Jetson is among them.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
FIRST_SPARSE_CAPABILITY = (8, 0)

_VERSION = r"^\d+(\.\d+)*$"


class Target(BaseModel):
    """A device, and what may be asked of it.

    `compute_capability` is CUDA's ("8.7"). `memory_gb` is the data sheet's figure; `shared_memory`
    means that the operating system and the CPU live in it too. `tensorrt_min` and `tensorrt_max`
    are the oldest and the newest TensorRT that serve the device ("10" as the newest means any
    10.x); they speak of the backend `tensorrt`. `jetpack` is the oldest JetPack. `opset_max` is
    the newest ONNX opset `tensorrt_min` reads. `workspace_mb` (MiB), `residency` and `resolution`
    (pixels) are what we suggest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = Field(min_length=1)
    platform: Literal["jetson", "rtx"]
    compute_capability: str = Field(pattern=r"^\d+\.\d$")
    memory_gb: float = Field(gt=0, allow_inf_nan=False)
    shared_memory: bool
    backends: tuple[Literal["tensorrt", "tensorrt_rtx"], ...] = Field(min_length=1, strict=False)
    tensorrt_min: str = Field(pattern=_VERSION)
    tensorrt_max: str | None = Field(default=None, pattern=_VERSION)
    jetpack: str | None = Field(default=None, pattern=_VERSION)
    opset_max: int
    sparse_tensor_cores: bool
    workspace_mb: int = Field(gt=0)
    residency: Literal["resident", "sequential"]
    resolution: int = Field(ge=8, multiple_of=8)

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """8.7 without quotes is a number to YAML; it has one decimal, so that nothing is lost."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(float(value))
        return value

    @property
    def capability(self) -> tuple[int, ...]:
        """The compute capability as numbers, such as (8, 7)."""
        return _numbers(self.compute_capability)

    @property
    def summary(self) -> str:
        """The device in one line."""
        newest = f"to {self.tensorrt_max}.x" if self.tensorrt_max else "or newer"
        parts = [
            f"SM {self.compute_capability}",
            f"TensorRT {self.tensorrt_min} {newest}",
            f"engines by {' or '.join(self.backends)}",
        ]
        if self.jetpack:
            parts.insert(1, f"JetPack {self.jetpack} or newer")
        return f"{self.title}: {', '.join(parts)}"

    def accepts(self, tensorrt: str) -> bool:
        """Whether this version of TensorRT ("10.3.0.30") serves the device."""
        found = _numbers(tensorrt)
        newest = _numbers(self.tensorrt_max) if self.tensorrt_max else found
        return _numbers(self.tensorrt_min) <= found and found[: len(newest)] <= newest

    @model_validator(mode="after")
    def _served(self) -> Target:
        """Refuse what no engine can be built for, and what contradicts itself."""
        if self.jetpack and _numbers(self.jetpack) < _numbers(FIRST_JETPACK):
            raise ValueError(
                f"JetPack {self.jetpack} is too old, its TensorRT cannot read opset {OPSET}; "
                f"upgrade the device to JetPack {FIRST_JETPACK} or newer"
            )
        if _numbers(self.tensorrt_min) < _numbers(FIRST_TENSORRT):
            upgrade = f"TensorRT {FIRST_TENSORRT} or newer"
            if self.platform == "jetson":
                upgrade = f"JetPack {FIRST_JETPACK} or newer, which brings {upgrade}"
            raise ValueError(f"TensorRT {self.tensorrt_min} is too old; upgrade to {upgrade}")
        if self.tensorrt_max and not self.accepts(self.tensorrt_min):
            raise ValueError(
                f"tensorrt_max {self.tensorrt_max} is older than tensorrt_min {self.tensorrt_min}; "
                "correct one of them"
            )
        if self.opset_max < OPSET:
            raise ValueError(
                f"the graphs have opset {OPSET}, the device's TensorRT reads up to "
                f"{self.opset_max}; upgrade its TensorRT"
            )
        if "tensorrt_rtx" in self.backends and self.compute_capability not in RTX_CAPABILITIES:
            raise ValueError(
                f"TensorRT-RTX builds for compute capability {', '.join(RTX_CAPABILITIES)}, found "
                f"{self.compute_capability}; leave tensorrt_rtx out of 'backends'"
            )
        if self.sparse_tensor_cores and self.capability < FIRST_SPARSE_CAPABILITY:
            raise ValueError(
                f"sparse tensor cores came with compute capability 8.0, found "
                f"{self.compute_capability}; set 'sparse_tensor_cores: false'"
            )
        return self


def names() -> list[str]:
    """The devices that are shipped."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_target(name_or_path: str) -> Target:
    """Load a shipped device by name, or any YAML file by path.

    Raises:
        UsageError: there is no such device, the file is not valid, the device is too old, or its
            name is that of a shipped one and the rest is not.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = SHIPPED / f"{name_or_path}.yaml"
        if name_or_path not in names():
            raise UsageError(
                f"no target {name_or_path!r}: expected a YAML file or one of {', '.join(names())}"
            )
    data = read_yaml(path, "'name', 'compute_capability' and the rest of a target")
    try:
        target = Target.model_validate(data)
    except ValidationError as e:
        raise UsageError(f"{path}: {describe_first(e, 'target')}") from e
    # Results name a target by its name, which must mean one device.
    if path.parent != SHIPPED and target.name in names() and target != load_target(target.name):
        raise UsageError(
            f"{path}: name: {target.name!r} is a device that comes with sdcompress, and this is "
            "another; give it a name of its own"
        )
    return target


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
