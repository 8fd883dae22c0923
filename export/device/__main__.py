"""Build both twins on this device, check them, measure them: the script of a device bundle."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import preflight
from .build import Engines, Route, Settings, build_all, evidence, find_all
from .contents import MANIFEST, TWINS, Contents, write_json
from .errors import DeviceError
from .measure import check_all, describe, measure_all, table
from .module import ModuleRoute
from .process import run_job
from .telemetry import Telemetry
from .trtexec import TrtexecRoute

KIND, VERSION = "device", 1  # of results.json
CHECKS = "checks.json"
TIMERS = {
    True: "CUDA events; a picture: wall clock over text encoder, steps x UNet and decoder",
    False: "trtexec's GPU compute time; a picture: text encoder + steps x UNet + decoder, added up",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 not possible, 2 usage, 3 a check failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.compute_capability and (options.only != "build" or options.trtexec):
        parser.error("--compute-capability builds ahead through the module: add --only build")
    if options.trtexec and options.residency == "resident":
        parser.error("trtexec holds one engine at a time: leave out --residency")
    try:
        _run(options)
    except DeviceError as e:
        _complain(str(e))
        return e.exit_code
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(
            f"sdcompress_device: {where}{e.strerror}; check space and permissions", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        _complain("interrupted; finished engines are kept")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdcompress_device.pyz",
        description="Build the dense and the sparse engines of this bundle on this device, compare "
        "them with what the host computed, and measure one against the other. Finished engines are "
        "kept: the same command goes on where it was interrupted.",
    )
    add = parser.add_argument
    add("--root", type=Path, default=_here(), help="where the tar was unpacked")
    add("--work", type=Path, help="where engines and logs go (default: ROOT/work)")
    add("-o", "--output", type=Path, default=Path("results.json"), help="default: results.json")
    add("--only", choices=("build", "check", "measure"), help="do no more than this")
    add("--rounds", type=_rounds, default=10, help="processes of each contestant (default: 10)")
    add("--budget", type=_seconds, default=4.0, help="seconds of timed work a process (default: 4)")
    add("--seed", type=int, default=0, help="of the order in which processes take turns")
    add(
        "--residency",
        choices=("resident", "sequential"),
        help="hold all engines at once, or one at a time (default: as the target suggests)",
    )
    add("--cuda-graph", action="store_true", help="launch each inference as one CUDA graph")
    add("--workspace", type=_positive, metavar="MIB", help="of the builder (default: the target's)")
    add("--level", type=int, choices=range(6), help="builder optimisation level (TensorRT's: 3)")
    add(
        "--module",
        choices=("tensorrt", "tensorrt_rtx"),
        help="what builds and runs (default: of those that serve the target the first installed)",
    )
    add("--trtexec", metavar="PATH", help="use this trtexec instead of the Python module")
    add("--compute-capability", metavar="8.9", help="build without the GPU; with --only build")
    add("--no-memory-check", action="store_true", help="try it even if memory seems too little")
    return parser


def _run(options: argparse.Namespace) -> None:
    contents = Contents(options.root)
    target = contents.target
    preflight.check_system(target)
    if options.only in (None, "measure"):
        preflight.check_output(options.output)
    _say("checking digests")
    contents.check()
    work = (options.work or options.root / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    route, facts = _route(contents, options)
    settings: Settings = {
        "workspace_mb": options.workspace or target["workspace_mb"],
        "optimization_level": options.level,
    }
    try:
        engines = find_all(contents, route, work, settings)
    except DeviceError:
        if options.only in ("check", "measure"):
            raise
        if not options.no_memory_check:
            preflight.check_memory(contents, facts["gpu"], preflight.available_memory())
        preflight.check_disk(contents, work)
        engines = build_all(contents, route, work, settings, _say)
    if options.only == "build":
        for twin in TWINS:
            for name, built in engines[twin].items():
                print(f"{twin:8}{name:14}{built.facts['plan_bytes'] >> 20:8} MiB  {built.plan}")
        print("\n".join(evidence(engines)))
        return
    identity = route.identity()
    built_for = f"{identity['module']} {identity['version']}"
    if capability := identity.get("compute_capability"):
        built_for += f" on compute capability {capability}"
    described = {twin: describe(contents, twin, engines[twin], built_for) for twin in TWINS}
    checks = _checks(contents, route, described, work, again=options.only != "measure")
    if options.only == "check":
        for one in checks:
            print(f"{one['twin']:8}{one['component']:14}differs by {one['error']:.1e}")
        return
    residency = options.residency or target["residency"]
    if options.trtexec:
        residency = "sequential"
    with Telemetry((facts.get("gpu") or {}).get("pci_bus_id")) as telemetry:
        measured = measure_all(
            route,
            described,
            rounds=options.rounds,
            seed=options.seed,
            budget=options.budget,
            residency=residency,
            cuda_graph=options.cuda_graph,
            telemetry=telemetry,
            say=_say,
        )
    results = {
        "kind": KIND,
        "version": VERSION,
        "bundle": contents.sha256,
        "subject": contents.subject,
        "target": target["name"],
        "engines": {twin: _engines(engines, twin) for twin in TWINS},
        "checks": checks,
        **measured,
        "setup": {
            "rounds": options.rounds,
            "seed": options.seed,
            "residency": residency,
            "cuda_graph": options.cuda_graph,
            "timer": TIMERS[options.trtexec is None],
            "telemetry_from": telemetry.how,
            "command": " ".join(["sdcompress_device.pyz", *sys.argv[1:]]),
        },
        "environment": {**preflight.machine(), **facts, **identity},
    }
    write_json(options.output, results)
    print("\n".join([*table(measured["answers"]), *evidence(engines)]))
    print(f"{options.output}: take it to the host, for `sdcompress report` and `sdcompress gate`")


def _route(contents: Contents, options: argparse.Namespace) -> tuple[Route, dict[str, Any]]:
    """The way engines are built and run here, and the facts of the GPU if there is one."""
    target = contents.target
    if options.trtexec:
        trtexec = TrtexecRoute(options.trtexec, contents.root)
        preflight.check_version(target, "tensorrt", trtexec.version)
        try:
            gpu = run_job({"job": "probe", "module": None, "gpu": True})["gpu"]
        except DeviceError as e:  # trtexec alone is enough
            _say(f"the GPU could not be asked ({e})")
            return trtexec, {"gpu": None}
        preflight.check_gpu(target, gpu)
        return trtexec, {"gpu": gpu}
    ahead: str | None = options.compute_capability
    if ahead and ahead != target["compute_capability"]:
        raise DeviceError(
            f"the bundle is for {target['title']} (compute capability "
            f"{target['compute_capability']}), found --compute-capability {ahead}; make a bundle "
            "for that device with `sdcompress device --target …`",
            exit_code=2,
        )
    name: str = options.module or _installed(target["backends"])
    found = run_job({"job": "probe", "module": name, "gpu": not ahead})
    preflight.check_version(target, name, found["version"])
    if ahead:
        return ModuleRoute(name, found["version"], ahead, device="ahead", ahead=True, say=_say), {
            "gpu": None
        }
    gpu = found["gpu"]
    preflight.check_gpu(target, gpu)
    capability, device = gpu["compute_capability"], gpu["name"]
    return ModuleRoute(name, found["version"], capability, device=device, say=_say), {"gpu": gpu}


def _installed(modules: Sequence[str]) -> str:
    """The first of these that can be imported; where none can, the first, which says how to get it.

    They are looked for and not loaded: their libraries must not stay in this process.
    """
    return next((name for name in modules if find_spec(name)), modules[0])


def _checks(
    contents: Contents, route: Route, described: Mapping[str, Any], work: Path, *, again: bool
) -> list[dict[str, Any]]:
    """The comparison with the golden outputs, or that of an earlier call for the same plans."""
    plans = [engine["sha256"] for twin in TWINS for engine in described[twin]]
    file = work / CHECKS
    if not again:
        try:
            kept: list[dict[str, Any]] = json.loads(file.read_text())
            if [one["plan"] for one in kept] == plans:
                return kept
        except (OSError, ValueError, KeyError, TypeError):
            pass
    _say("comparing with the golden outputs")
    checks = check_all(contents, route, described)
    write_json(file, checks)
    return checks


def _engines(engines: Engines, twin: str) -> dict[str, Any]:
    return {name: dict(built.facts) for name, built in engines[twin].items()}


def _here() -> Path:
    """The directory of the script; where that is no device bundle, the current one."""
    beside = Path(os.path.abspath(sys.argv[0])).parent
    return beside if (beside / MANIFEST).is_file() else Path()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, found {text}")
    return number


def _rounds(text: str) -> int:
    if (number := _positive(text)) < 2:
        raise argparse.ArgumentTypeError("1 round gives no interval; give 2 or more, better 10")
    return number


def _complain(why: str) -> None:
    print(f"sdcompress_device: {why}", file=sys.stderr)


def _say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
