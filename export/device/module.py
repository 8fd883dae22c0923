"""The first way: through the Python module `tensorrt` or `tensorrt_rtx`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .build import LOG, PLAN, Say, Settings
from .builder import Progress, Request, build_in_process
from .process import command_of, run_job
from .telemetry import Watch

SAY_EVERY_S = 15


class ModuleRoute:
    """`compute_capability` is the GPU's here, or with `ahead` that of another one to build for."""

    def __init__(
        self,
        module: str,
        version: str,
        compute_capability: str,
        *,
        device: str,
        ahead: bool = False,
        say: Say = lambda what: None,
    ) -> None:
        self._say = say
        self._module, self._version = module, version
        self._compute_capability, self._device, self._ahead = compute_capability, device, ahead

    def identity(self) -> Mapping[str, str]:
        return {
            "module": self._module,
            "version": self._version,
            "compute_capability": self._compute_capability,
        }

    def build(
        self, onnx: Path, folder: Path, shapes: Mapping[str, Any], settings: Settings
    ) -> dict[str, Any]:
        rtx = self._module == "tensorrt_rtx"
        request = Request(
            module=self._module,
            onnx=str(onnx),
            plan=str(folder / PLAN),
            log=str(folder / LOG),
            shapes={name: tuple(shape) for name, shape in shapes.items()},
            timing_cache=None if rtx else str(folder.parent),  # it times nothing ahead of time
            device=self._device,
            compute_capability=self._compute_capability if self._ahead else None,
            inspect=not self._ahead,
            workspace_mb=settings["workspace_mb"],
            optimization_level=settings["optimization_level"],
        )
        return build_in_process(request, command_of("builder"), self._progress())

    def _progress(self) -> Progress:
        """Says every now and then how far a build is, so that it does not look frozen."""
        last = time.monotonic()

        def tell(phase: str, done: int, steps: int) -> None:
            nonlocal last
            if time.monotonic() - last >= SAY_EVERY_S:
                last = time.monotonic()
                self._say(f"  {phase}: {done} of {steps}")

        return tell

    def errors(self, engine: Mapping[str, Any]) -> dict[str, float]:
        job = {"job": "check", "engine": engine, "module": self._module, "cuda_graph": False}
        errors: dict[str, float] = run_job({**job, "name": engine["name"]})["errors"]
        return errors

    def measure(self, job: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        return run_job({**job, "job": "measure", "module": self._module}, watch=watch)
