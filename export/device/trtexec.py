"""The second way: only `trtexec`, which every TensorRT installation has.

Its inference times are read from --exportTimes and its outputs from --exportOutput.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .build import LOG, PLAN, Settings
from .contents import sha256_file
from .errors import DeviceError
from .evidence import read_log, weigh
from .golden import relative_error, unpack
from .telemetry import Watch
from .worker import STAGES

WARM_UP_MS = 200
_VERSION = re.compile(r"\[TensorRT v(\d+)\]")
_LOADED = re.compile(r"Engine (?:deserialized|loaded) in ([0-9.eE+-]+) sec")


class TrtexecRoute:
    """`root` is the bundle's directory: names given to trtexec are relative to it.

    (Its lists are cut at commas and colons, which paths of other people's may hold.)
    """

    def __init__(self, program: str, root: Path) -> None:
        """Ask trtexec for its version and what it can do."""
        self._program, self._root = program, root.resolve()
        try:
            done = subprocess.run(
                [program, "--help"], capture_output=True, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.SubprocessError) as e:
            raise DeviceError(
                f"{program}: cannot be run ({e}); on a Jetson it is "
                "/usr/src/tensorrt/bin/trtexec, part of libnvinfer-bin"
            ) from e
        self._help = done.stdout + done.stderr
        found = _VERSION.search(self._help)
        if not found:
            raise DeviceError(f"{program}: does not say its version, so it may be no trtexec")
        self.version = _dotted(found[1])

    def identity(self) -> Mapping[str, str]:
        return {"module": "trtexec", "version": self.version}

    def build(
        self, onnx: Path, folder: Path, shapes: Mapping[str, Any], settings: Settings
    ) -> dict[str, Any]:
        started = time.monotonic()
        partial = folder / f"{PLAN}.partial"
        arguments = [
            f"--onnx={onnx}",
            f"--saveEngine={partial}",
            "--sparsity=enable",
            f"--timingCacheFile={folder.parent / f'trtexec-{self.version}.cache'}",
            *self._shapes(shapes),
            *self._known("--stronglyTyped", "--profilingVerbosity=detailed", "--skipInference"),
            "--verbose",
        ]
        if settings["workspace_mb"] is not None:
            arguments.append(f"--memPoolSize=workspace:{settings['workspace_mb']}M")
        if settings["optimization_level"] is not None:
            arguments.append(f"--builderOptimizationLevel={settings['optimization_level']}")
        text = self._run(f"building {onnx.parent.name}", arguments, folder / LOG)
        facts = read_log(text.splitlines(), settings["workspace_mb"])
        if facts.out_of_memory:
            raise DeviceError(
                f"{onnx.parent.name}: trtexec ran short of memory "
                f"({facts.out_of_memory[-1]:.200}); close other programs, or use a smaller "
                "--workspace"
            )
        if not partial.is_file():
            raise DeviceError(f"{onnx.parent.name}: trtexec wrote no engine; see {folder / LOG}")
        partial.replace(folder / PLAN)
        return {
            "plan_bytes": (folder / PLAN).stat().st_size,
            "plan_sha256": sha256_file(folder / PLAN),
            "seconds": round(time.monotonic() - started, 3),
            "missing": [],
            **weigh(facts, None, None).as_dict(),
            **settings,
            "ladder": [],
            "flag_changed_plan": None,
        }

    def errors(self, engine: Mapping[str, Any]) -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="sdcompress-") as scratch:
            output = Path(scratch, "output.json")
            self._infer(engine, [f"--exportOutput={output}", "--iterations=1", "--warmUp=0"])
            found = {one["name"]: one["values"] for one in _read(output)}
        errors = {}
        for tensor in engine["outputs"]:
            if tensor["name"] not in found:
                raise DeviceError(f"{engine['name']}: trtexec exported no {tensor['name']}")
            expected = unpack(Path(tensor["file"]).read_bytes(), tensor["dtype"])
            errors[tensor["name"]] = relative_error(found[tensor["name"]], expected)
        return errors

    def measure(self, job: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        """One run of trtexec for each component; a picture is added up from their medians.

        Raises:
            DeviceError: engines are asked to be held together, or trtexec failed.
        """
        if job["residency"] == "resident":
            raise DeviceError("trtexec holds one engine at a time")
        result: dict[str, Any] = {}
        picture = load = 0.0
        watch.start_timing()
        for engine in job["engines"]:
            stage = STAGES[engine["component"]]
            with tempfile.TemporaryDirectory(prefix="sdcompress-") as scratch:
                file = Path(scratch, "times.json")
                arguments = [
                    f"--exportTimes={file}",
                    f"--iterations={job['iterations'][stage]}",
                    f"--warmUp={WARM_UP_MS if job['warm_up'] else 0}",
                    *(["--useCudaGraph"] if job["cuda_graph"] else []),
                ]
                text = self._infer(engine, arguments)
                times = [float(one["computeMs"]) for one in _read(file)]
            if job["cuda_graph"] and "--useCudaGraph flag has been ignored" in text:
                raise DeviceError(
                    f"{engine['name']}: trtexec cannot run it as a CUDA graph; leave out "
                    "--cuda-graph"
                )
            if not times:
                raise DeviceError(f"{engine['name']}: trtexec exported no times")
            result[stage] = times
            picture += engine["calls"] * sorted(times)[len(times) // 2]
            loaded = _LOADED.search(text)
            load = load + float(loaded[1]) * 1000 if loaded else float("nan")
        result["picture"] = [picture]
        return {**result, "peak_anonymous_bytes": 0, **({"load": [load]} if load > 0 else {})}

    def _infer(self, engine: Mapping[str, Any], arguments: Sequence[str]) -> str:
        if sha256_file(Path(engine["plan"])) != engine["sha256"]:
            raise DeviceError(
                f"{engine['plan']}: is not the plan that was built (its sha256 differs), so it was "
                "not loaded; build it again",
                exit_code=3,
            )
        files = {t["name"]: Path(t["file"]).resolve() for t in engine["inputs"]}
        names = (f"{name}:{file.relative_to(self._root)}" for name, file in files.items())
        return self._run(
            f"running {engine['name']}",
            [
                f"--loadEngine={engine['plan']}",
                *self._shapes({t["name"]: t["shape"] for t in engine["inputs"]}),
                f"--loadInputs={','.join(names)}",
                "--duration=0",
                *arguments,
            ],
        )

    def _run(self, what: str, arguments: Sequence[str], log: Path | None = None) -> str:
        done = subprocess.run(
            [self._program, *arguments],
            cwd=self._root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if log:
            log.write_text(done.stdout)
        if done.returncode != 0:
            said = [line for line in done.stdout.splitlines() if "[E]" in line]
            reason = said[-1].partition("[E]")[2].strip() if said else f"code {done.returncode}"
            raise DeviceError(f"{what}: trtexec failed ({reason:.300})")
        return done.stdout

    def _shapes(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Scalars are left out: their shape is never free."""
        sized = [f"{name}:{'x'.join(map(str, s))}" for name, s in shapes.items() if s]
        return [f"--shapes={','.join(sized)}"]

    def _known(self, *options: str) -> list[str]:
        return [option for option in options if option.partition("=")[0] in self._help]


def _dotted(digits: str) -> str:
    """ "100300" → "10.3.0"; until TensorRT 9 it was "8503"."""
    number = int(digits)
    if number >= 100000:
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return f"{number // 1000}.{number // 100 % 10}.{number % 100}"


def _read(file: Path) -> list[dict[str, Any]]:
    """The JSON trtexec writes; C++ spells what is no number "nan" and "inf"."""
    try:
        text = file.read_text()
        text = re.sub(r"(?<![\w\"])-?nan\b", "NaN", text)
        text = re.sub(r"(?<![\w\"])(-?)inf\b", r"\1Infinity", text)
        found: list[dict[str, Any]] = json.loads(text)
        return found
    except (OSError, ValueError) as e:
        raise DeviceError(f"trtexec's {file.name} cannot be read ({e})") from e
