"""What `build_report.json` holds: what an engine builder really did, component by component.

None means that nothing tells. Sizes are in bytes unless the name ends in `_mb`, which are MiB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdcompress.errors import InputError

BUILD_REPORT = "build_report.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Runtime(_Record):
    """What built the plans, and what they run on."""

    module: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    compute_capability: str | None = None
    os: str
    machine: str


class Step(_Record):
    """A build that ran out of memory, and was followed by one that asked for less."""

    workspace_mb: int | None
    optimization_level: int | None
    failed: str


class Component(_Record):
    """One plan file and how it came about."""

    plan_bytes: int
    plan_sha256: str
    seconds: float = Field(description="of the build that succeeded, or of the refit")
    layers_eligible: int | None = Field(description="layers that could use sparse tactics")
    layers_sparse: int | None = Field(description="layers that use sparse tactics")
    log_generation: Literal["8.x", "10.x"] | None = Field(
        description="whose wording told of sparse tactics in the verbose log"
    )
    tactics: int | None = Field(description="layers of the engine whose tactics are listed")
    sparse_tactics: tuple[str, ...] = Field(description="tactics whose names prove sparse kernels")
    fused_attention: int | None = Field(description="attentions computed by one kernel each")
    context_bytes: int | None
    context_from: Literal["engine", "log"] | None
    peak_build_bytes: int | None = Field(
        description="anonymous memory of the build's process, sampled"
    )
    workspace_mb: int | None = Field(description="limit finally used; None left it to TensorRT")
    optimization_level: int | None = Field(
        description="finally used; None left it to TensorRT, which then takes 3"
    )
    ladder: tuple[Step, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...] = Field(description="what this version has no means to tell or do")
    flag_changed_plan: bool | None = Field(
        description="whether SPARSE_WEIGHTS changed the plan's bytes; None if not looked at, or "
        "if two builds alike give other bytes"
    )

    @property
    def limits(self) -> dict[str, int | None]:
        """What memory was left to the build, by the names of the options that set it."""
        return {
            "workspace_mb": self.workspace_mb,
            "optimization_level": self.optimization_level,
        }


class BuildReport(_Record):
    """The whole of build_report.json; `options` are those used, with nothing left to choose."""

    schema_version: Literal[1] = 1
    backend: str
    runtime: Runtime
    target: str | None = None
    options: dict[str, object]
    components: dict[str, Component]

    def limits_apart(self, other: BuildReport) -> tuple[list[str], dict[str, int]]:
        """The components that were built within other limits than in `other`, and the lower limits.

        Builds that run out of memory go on with less. Both can be built with the lower limits.
        """
        pairs = {
            name: (part.limits, other.components[name].limits)
            for name, part in self.components.items()
            if name in other.components and part.limits != other.components[name].limits
        }
        lowest: dict[str, int] = {}
        for limits in (one for pair in pairs.values() for one in pair):
            for name, limit in limits.items():
                if limit is not None:
                    lowest[name] = min(limit, lowest.get(name, limit))
        return list(pairs), lowest

    @classmethod
    def read(cls, engine: Path) -> BuildReport | None:
        """Of an engine bundle; None where its backend writes none.

        Raises:
            InputError: it is not a report of this version.
        """
        file = engine / BUILD_REPORT
        if not file.is_file():
            return None
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise InputError(
                f"{file}: not a build report of schema version 1 ({where}: {first['msg']}); "
                "build the engine again"
            ) from error
