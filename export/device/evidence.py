"""What a build really did, from TensorRT's verbose log and from the engine inspector.

A flag proves nothing: sparse kernels count when the log says that layers chose sparse tactics, or
when the name of a tactic says so. Lines are recognised wherever they stand in a line, so that the
logs of the Python API and of `trtexec --verbose` can be read alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

WARNINGS_KEPT = 20

_ELIGIBLE_8 = re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)")
_CHOSEN_8 = re.compile(
    r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)"
)
_ELIGIBLE_10 = re.compile(r"\(Sparsity\) Found (\d+) layer\(?s?\)? eligible to use sparse tactics")
_CHOSEN_10 = re.compile(r"\(Sparsity\) Chose (\d+) layer\(?s?\)? using sparse tactics")
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+)")
_PERSISTENT = re.compile(r"Total Device Persistent Memory: (\d+)")
# DETAILED verbosity lists the engine's layers at the end of the log, one a line.
_LAYER = re.compile(r"^Name: .*\bLayerType: ")
_TACTIC = re.compile(r"\bTacticName: ([^,\]}]*)")
_SPARSE_TACTIC = re.compile(r"spars|spmma|sp_gemm", re.IGNORECASE)
_STUB = re.compile("stub", re.IGNORECASE)  # stands for what TensorRT-RTX chooses later
_FUSED_ATTENTION = re.compile(r"mha|flash_?att", re.IGNORECASE)
_WARNING = re.compile(r"^\[WARNING\] (.*)|\[W\] (?:\[TRT\] )?(.*)")

# TensorRT leaves out tactics that do not fit the workspace, which is the limit we set, and those
# for which the device has no memory, which nobody wants. Both are told in the same words.
_REQUEST = re.compile(r"Tactic Device request: (\d+)MB Available: (\d+)MB")
_SKIPPED = re.compile(r"Skipping tactic .*\binsuff?icient memory on requested size of (\d+)")
_WORKSPACE = re.compile(
    r"do not have sufficient workspace memory|insufficient workspace|within workspace limit",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|OUT_OF_MEMORY|MEM_ALLOC_FAILED|bad_alloc"
    r"|cudaErrorMemoryAllocation|Cannot allocate memory"
    r"|Requested amount of GPU memory .*could not be allocated"
    r"|NvMapMemAlloc.*error 12|\boom error\b",
    re.IGNORECASE,
)


@dataclass
class LogFacts:
    """What a log says. None: it does not say.

    `out_of_memory`: lines that tell of memory the device did not have; `over_workspace`: how many
    tactics were left out, and builds given up, because of the workspace limit alone.
    `tactics`: the names of all tactics, where the log lists the engine's layers; "" where a layer
    has none. Memory in bytes.
    """

    generation: str | None = None
    eligible: int | None = None
    chosen: int | None = None
    activation_bytes: int | None = None
    persistent_bytes: int | None = None
    tactics: list[str] | None = None
    out_of_memory: list[str] = field(default_factory=list)
    over_workspace: int = 0
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def context_bytes(self) -> int | None:
        """Memory of an execution context as far as the log tells."""
        if self.activation_bytes is None:
            return None
        return self.activation_bytes + (self.persistent_bytes or 0)


def read_log(lines: Iterable[str], workspace_mb: int | None = None) -> LogFacts:
    """The facts of one build's log, read line by line; of repeated statements the last counts.

    `workspace_mb` (MiB) is the limit the build was given; None leaves all memory to TensorRT, and
    whatever did not fit then did not fit the device.
    """
    facts = LogFacts()
    for raw in lines:
        line = raw.rstrip("\n")
        if _LAYER.search(line):
            tactic = _TACTIC.search(line)
            if facts.tactics is None:
                facts.tactics = []
            facts.tactics.append(tactic[1].strip() if tactic else "")
            continue
        if line.endswith("Layers:"):
            facts.tactics = None  # of another pass
        elif "(Sparsity)" in line:
            _read_sparsity(line, facts)
        elif match := _ACTIVATION.search(line):  # one for each profile; a context holds the largest
            facts.activation_bytes = max(int(match[1]), facts.activation_bytes or 0)
        elif match := _PERSISTENT.search(line):
            facts.persistent_bytes = max(int(match[1]), facts.persistent_bytes or 0)
        _read_memory(line, workspace_mb, facts)
        if match := _WARNING.search(line):
            warning = match[1] or match[2]
            if warning not in facts.warnings and len(facts.warnings) < WARNINGS_KEPT:
                facts.warnings.append(warning)
        elif line.startswith(("[ERROR] ", "[INTERNAL_ERROR] ")):
            facts.errors = [*facts.errors[-9:], line.partition("] ")[2]]
    return facts


def _read_sparsity(line: str, facts: LogFacts) -> None:
    if match := _ELIGIBLE_10.search(line):
        facts.generation, facts.eligible = "10.x", int(match[1])
    elif match := _CHOSEN_10.search(line):
        facts.generation, facts.chosen = "10.x", int(match[1])
    elif match := _ELIGIBLE_8.search(line):
        facts.generation, facts.eligible = "8.x", _count(match[1])
    elif match := _CHOSEN_8.search(line):
        facts.generation, facts.chosen = "8.x", _count(match[1])


def _count(names: str) -> int:
    return len([name for name in names.split(", ") if name.strip()])


def _read_memory(line: str, workspace_mb: int | None, facts: LogFacts) -> None:
    if match := _REQUEST.search(line):
        # Where only the limit stands in the way, the limit is what is available.
        ours = workspace_mb is not None and int(match[2]) >= workspace_mb
    elif match := _SKIPPED.search(line):
        # TensorRT 8 writes "insuficient" and counts MiB, later ones count bytes.
        size = int(match[1]) << 20 if "insuficient" in line else int(match[1])
        ours = workspace_mb is not None and size > workspace_mb << 20
    elif _WORKSPACE.search(line):
        ours = True
    elif _MEMORY.search(line):
        ours = False
    else:
        return
    if ours:
        facts.over_workspace += 1
    else:
        facts.out_of_memory = [*facts.out_of_memory[-9:], line]


def sparse_tactics(names: Iterable[str]) -> list[str]:
    """Those tactics whose names say that they use sparse tensor cores."""
    return [name for name in names if _SPARSE_TACTIC.search(name)]


def fused_attention(names: Iterable[str]) -> int:
    """How many tactics compute a whole attention, scores to weighted values, in one kernel."""
    return sum(bool(_FUSED_ATTENTION.search(name)) for name in names)


def inspector_tactics(text: str) -> list[str] | None:
    """The tactic name of each layer in the engine inspector's JSON, "" where there is none.

    None if the engine was built without DETAILED verbosity and layers are no more than names.
    """
    layers = json.loads(text).get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        return None
    return [str(layer.get("TacticName", "")) for layer in layers]


@dataclass
class Evidence:
    """What is known of one built component; the fields of `sdcompress.build_report.Component`."""

    layers_eligible: int | None
    layers_sparse: int | None
    log_generation: str | None
    tactics: int | None
    sparse_tactics: list[str]
    fused_attention: int | None
    context_bytes: int | None
    context_from: str | None
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def weigh(facts: LogFacts, inspected: list[str] | None, engine_context: int | None) -> Evidence:
    """Put the log and the loaded engine together; the engine is believed where it speaks.

    `inspected` are its tactic names and `engine_context` the bytes its context needs; both None
    where it could not be loaded, as when building ahead of time.
    """
    tactics = inspected if inspected is not None else facts.tactics
    named = sorted(sparse_tactics(tactics)) if tactics else []
    layers_sparse = facts.chosen
    # Names of tactics show what is there; that none shows is only proof where all have names.
    if named or (inspected and all(name and not _STUB.search(name) for name in inspected)):
        layers_sparse = len(named)
    warnings = list(facts.warnings)
    if facts.over_workspace:
        warnings.append(
            f"{facts.over_workspace} lines tell of tactics left out because of the workspace limit"
        )
    return Evidence(
        layers_eligible=facts.eligible,
        layers_sparse=layers_sparse,
        log_generation=facts.generation,
        tactics=len(tactics) if tactics is not None else None,
        sparse_tactics=sorted(set(named)),
        fused_attention=fused_attention(tactics) if tactics is not None else None,
        context_bytes=engine_context if engine_context is not None else facts.context_bytes,
        context_from="engine"
        if engine_context is not None
        else "log"
        if facts.context_bytes is not None
        else None,
        warnings=warnings,
    )
