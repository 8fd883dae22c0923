"""All engines of a bundle, one process each; those that are finished are kept and used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .contents import TWINS, Contents, sha256_file, write_json
from .errors import DeviceError

PLAN, LOG, RECORD = "engine.plan", "build.log", "build.json"
Settings = dict[str, int | None]
Say = Callable[[str], None]


class Route(Protocol):
    """A way to build and run engines: through a Python module, or through trtexec."""

    def identity(self) -> Mapping[str, str]:
        """What plans depend on, besides what they are made from."""

    def build(
        self, onnx: Path, folder: Path, shapes: Mapping[str, Any], settings: Settings
    ) -> dict[str, Any]:
        """Write PLAN and LOG into `folder`; the facts are those of `builder.build_in_process`."""

    def errors(self, engine: Mapping[str, Any]) -> dict[str, float]:
        """Run on the golden inputs; the relative error of each output."""

    def measure(self, job: Mapping[str, Any], watch: Any) -> dict[str, Any]:
        """Time the engines of one twin, see `worker.measure`."""


@dataclass(frozen=True)
class Built:
    """One finished engine, and what its build told."""

    plan: Path
    facts: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        return str(self.facts["plan_sha256"])

    @property
    def settings(self) -> Settings:
        """With what it was built in the end: out of memory, a build asks for less and less."""
        return {key: self.facts[key] for key in ("workspace_mb", "optimization_level")}


Engines = dict[str, dict[str, Built]]  # twin → component → engine


def build_all(
    contents: Contents, route: Route, work: Path, settings: Settings, say: Say
) -> Engines:
    """Build what is not there yet.

    Both twins of a component get the same settings: if one of them had to do with less memory, the
    other is built like it.

    Raises:
        DeviceError: an engine could not be built; finished ones stay for the next try.
    """
    engines: Engines = {twin: {} for twin in TWINS}
    for component in contents.components:
        wanted, built = settings, dict[str, Built]()
        while len(built) < len(TWINS) or any(one.settings != wanted for one in built.values()):
            for twin in TWINS:
                if twin not in built or built[twin].settings != wanted:
                    built[twin] = _build(contents, route, work, component, twin, wanted, say)
                    wanted = built[twin].settings
        for twin in TWINS:
            engines[twin][component] = built[twin]
    return engines


def find_all(contents: Contents, route: Route, work: Path, settings: Settings) -> Engines:
    """The engines of an earlier `build_all`; raises DeviceError where one is missing."""

    def refuse(what: str) -> None:  # which is announced before anything is done
        raise DeviceError(f"there is no finished engine: {what}; run it with --only build first")

    return build_all(contents, route, work, settings, refuse)


def evidence(engines: Engines) -> list[str]:
    """What TensorRT made of the zeros, for reading on the device."""
    lines = []
    for name, built in engines["sparse"].items():
        used, eligible = (built.facts[key] for key in ("layers_sparse", "layers_eligible"))
        if built.sha256 == engines["dense"][name].sha256:
            lines.append(f"{name}: the sparse plan is byte-identical to the dense one")
        elif used is None:
            lines.append(f"{name}: TensorRT does not say which layers use sparse kernels")
        else:
            of = "" if eligible is None else f" of {eligible} eligible"
            lines.append(f"{name}: {used}{of} layers use sparse kernels")
    return lines


def _build(
    contents: Contents,
    route: Route,
    work: Path,
    component: str,
    twin: str,
    settings: Settings,
    say: Say,
) -> Built:
    described = contents.components[component]
    shapes = {tensor["name"]: tensor["shape"] for tensor in described["inputs"]}
    made_from = {
        "onnx": contents.onnx_digest(component, twin),
        "shapes": shapes,
        "settings": settings,
        **route.identity(),
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = work / "engines" / f"{component}-{key[:16]}"
    if facts := _finished(folder):
        return Built(folder / PLAN, facts)
    say(f"building {twin} {component}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    onnx = (contents.root / described["twins"][twin]["onnx"]).resolve()
    facts = route.build(onnx, folder.resolve(), shapes, settings)
    write_json(folder / RECORD, facts)
    return Built(folder / PLAN, facts)


def _finished(folder: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads((folder / RECORD).read_text())
        return facts if sha256_file(folder / PLAN) == facts["plan_sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
