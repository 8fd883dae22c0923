"""Dense against sparse: latency, memory, size and load time of two engines, and a control.

Each round starts three fresh processes in random order: the dense engine, the sparse engine and
the dense engine again. See `sdcompress.measure` for how the figures are compared.

Memory is reported for both residencies: measured in every round for the one asked for, and for the
other in one process of each engine that makes a single picture and times nothing.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from export.backends import load_backend
from export.comparison import kept_in_fp32, make_control, make_measures, narrowed_components
from export.device.telemetry import Telemetry as Readings
from export.pipeline import Geometry, check_sizes, tokenize
from export.residency import Residency
from export.specs import COMPONENTS
from sdcompress.build_report import BuildReport
from sdcompress.bundle import Bundle, runtime_versions, tool_versions
from sdcompress.errors import InputError, UsageError
from sdcompress.measure import Watcher, run_rounds, run_worker
from sdcompress.plan import account
from sdcompress.results import (
    DeviceMemory,
    Engine,
    Environment,
    Results,
    Setup,
    SparseKernels,
    Telemetry,
)

WORKER = "export.bench_worker"
# Share of the time budget of one process; the rest of it goes into starting and loading.
SHARES = {"picture": 0.4, "text_encoder": 0.15, "unet_step": 0.3, "vae_decoder": 0.15}
PROMPT = "a large red circle left of a small blue square on a white background"
MEMORY = "peak anonymous memory of the process tree, mapped files not counted"
# What both engines must have in common, of the details of their manifests.
SAME = (
    *("backend", "providers", "options", "dtype", "opset", "target", "sizes"),
    "upcast_attention",
)
OTHER: dict[Residency, Residency] = {"resident": "sequential", "sequential": "resident"}
PLAN = "engine.plan"
CPU = "CPUExecutionProvider"  # the one provider that is no accelerator


def bench(
    dense: Bundle,
    sparse: Bundle,
    *,
    rounds: int = 10,
    steps: int = 20,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    prompt: str = PROMPT,
    seed: int = 0,
    residency: Residency = "resident",
    budget: float = 1.2,
    timeout: float | None = None,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Measure two engine bundles against each other.

    `budget` is about how many seconds one process spends on timed work; slow engines take longer,
    as everything is timed at least once. With `residency` "sequential" the time of a picture holds
    that of loading each component. `progress(done, total)` counts the processes of the rounds.

    Raises:
        UsageError: fewer than 2 rounds, a size that does not fit, engines that cannot run here, or
            that cannot be compared because model, backend, options or precision differ or they
            are swapped.
        VerificationError: an engine's files are not those of its manifest.
        SdcompressError: a measuring process failed, was killed, or gave NaN.
    """
    if rounds < 2:
        raise UsageError(f"{rounds} rounds give no interval; give at least 2, better 10 or more")
    _check_comparable(dense, sparse)
    for engine in (dense, sparse):
        details = engine.manifest.details
        if why := load_backend(details["backend"]).why_not_run(details):
            raise UsageError(f"{engine.path}: cannot run here: {why}")
    request: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "height": height,
        "width": width,
        "prompt": prompt,
        "seed": seed,
        "residency": residency,
    }
    contestants = {"dense": dense, "sparse": sparse, "control": dense}
    jobs = {name: {**_job(b, **request), "name": name} for name, b in contestants.items()}
    here = environment(busy_cores())
    with ExitStack() as stack:
        watch = _watcher(stack) if jobs["dense"]["on_gpu"] else None
        plan = _how_often(jobs, budget, timeout)
        for job in jobs.values():
            job.update(plan)
        answers = run_rounds(
            WORKER, jobs, rounds=rounds, seed=seed, timeout=timeout, watch=watch, progress=progress
        )
        others = {
            name: run_worker(
                WORKER,
                {**jobs[name], "residency": OTHER[residency], "iterations": {}},
                timeout=timeout,
                watch=watch,
            )
            for name in ("dense", "sparse")
        }
    measures = make_measures(answers)
    latents = jobs["dense"]["latent_shape"]
    scale = Geometry.read(dense.path).scale
    manifest = sparse.manifest
    return Results(
        model=manifest.source.id,
        recipe=(manifest.recipe or {}).get("name"),
        measures=measures,
        control=make_control(measures),
        engines={
            "dense": _engine(
                dense, {residency: answers["dense"], OTHER[residency]: [others["dense"]]}
            ),
            "sparse": _engine(
                sparse, {residency: answers["sparse"], OTHER[residency]: [others["sparse"]]}
            ),
        },
        setup=Setup(
            rounds=rounds,
            iterations=plan["iterations"],
            warm_up=plan["warm_up"],
            steps=steps,
            guidance=guidance,
            height=latents[1] * scale,
            width=latents[2] * scale,
            seed=seed,
            prompt=prompt,
            memory=MEMORY,
            command=command,
            residency=residency,
            timer=answers["dense"][0]["timer"],
        ),
        environment=here,
        sparsity=account(manifest.plan) if manifest.plan else None,
        telemetry=_telemetry(answers),
    )


def ddim_steps(scheduler_folder: Path, steps: int) -> list[dict[str, float]]:
    """Timestep, a and b of `steps` DDIM updates x ← a·x + b·prediction, noisiest first.

    The update is linear in both arguments, so diffusers itself gives a and b: its step on (x=1,
    prediction=0) and on (x=0, prediction=1). Betas, spacing and epsilon or v-prediction come from
    the model's own scheduler config; only the update rule is always DDIM's, as it needs no torch.
    """
    import torch
    from diffusers import DDIMScheduler

    from sdcompress.evaluation.images import load_scheduler

    config = {**load_scheduler(scheduler_folder).config, "clip_sample": False}
    scheduler = DDIMScheduler.from_config({**config, "thresholding": False})
    scheduler.set_timesteps(steps)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return [
        {
            "timestep": float(t),
            "a": float(scheduler.step(zero, t, one).prev_sample),
            "b": float(scheduler.step(one, t, zero).prev_sample),
        }
        for t in scheduler.timesteps
    ]


def busy_cores(seconds: float = 1.0) -> float | None:
    """How many cores were at work over the next `seconds`; None where /proc does not tell.

    Not the load average: that still remembers the stages which ran before this one.
    """

    def ticks() -> tuple[int, int]:  # idle (and waiting for the disk), all
        fields = [int(x) for x in (_text(Path("/proc/stat")) or "").split("\n")[0].split()[1:9]]
        return sum(fields[3:5]), sum(fields)

    idle, total = ticks()
    time.sleep(seconds)
    idle, total = (after - before for after, before in zip(ticks(), (idle, total), strict=True))
    return (1 - idle / total) * (os.cpu_count() or 1) if total else None


def environment(load_before: float | None = None) -> Environment:
    """What this machine is; `load_before` is the number of busy cores before measuring."""
    return Environment(
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        load_before=load_before,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={**tool_versions(), **runtime_versions()},
        accelerator=_accelerator(),
    )


def _job(
    engine: Bundle,
    *,
    steps: int,
    guidance: float,
    height: int | None,
    width: int | None,
    prompt: str,
    seed: int,
    residency: Residency,
) -> dict[str, Any]:
    geometry = Geometry.read(engine.path)
    shape = geometry.latent_shape(height, width)
    details = engine.manifest.details
    check_sizes(details, geometry, guidance, shape[1] * geometry.scale, shape[2] * geometry.scale)
    prompts = ["", prompt] if guidance > 1 else [prompt]
    return {
        "engine": str(engine.path.resolve()),
        "details": details,
        "on_gpu": set(details["providers"].values()) != {CPU},
        "residency": residency,
        "steps": ddim_steps(engine.path / "scheduler", steps),
        "guidance": guidance,
        "token_ids": tokenize(engine.path, prompts).tolist(),
        "latent_shape": shape,
        "scaling_factor": geometry.scaling_factor,
        "seed": seed,
        "warm_up": 0,
        "iterations": dict.fromkeys(SHARES, 1),
    }


def _how_often(
    jobs: Mapping[str, dict[str, Any]], budget: float, timeout: float | None
) -> dict[str, Any]:
    """Iterations of each stage and warm-ups in a process, the same for all; by an uncounted trial.

    The trial runs both engines, so that the files of both are in the page cache from then on. A
    picture is always painted before anything is timed; slow engines get no more warm-up than that.
    """
    trials = [run_worker(WORKER, jobs[name], timeout=timeout) for name in ("sparse", "dense")]
    slowest = {stage: max(trial[stage][0] for trial in trials) for stage in SHARES}
    milliseconds = budget * 1000
    return {
        "warm_up": min(2, int(milliseconds / slowest["picture"])),
        "iterations": {
            stage: max(1, min(50, round(milliseconds * share / slowest[stage])))
            for stage, share in SHARES.items()
        },
    }


def _check_comparable(dense: Bundle, sparse: Bundle) -> None:
    for bundle in (dense, sparse):
        bundle.check_files()  # the results name an engine by its digest, so it must be that engine
        if bundle.manifest.stage != "engine":
            raise InputError(
                f"{bundle.path}: expected an engine, found a bundle of stage "
                f"{bundle.manifest.stage}; run `sdcompress build` on it"
            )
        if missing := [c for c in COMPONENTS if not (bundle.path / c).is_dir()]:
            raise InputError(f"{bundle.path}: has no {missing[0]}; export the model again")
    narrower = [narrowed_components(x) for x in (dense, sparse)]
    alike = {*COMPONENTS}.difference(*narrower)  # other graphs keep what their own numbers need
    facts = [(fact, *(x.manifest.details.get(fact) for x in (dense, sparse))) for fact in SAME]
    facts.append(("kept_fp32", *(kept_in_fp32(x, alike) for x in (dense, sparse))))
    for fact, a, b in facts:
        if a != b:
            raise UsageError(
                f"the engines differ in {fact} ({a} and {b}), so nothing could be put down to "
                "sparsity; build both with the same settings"
            )
    _check_limits(dense, sparse)
    sources = [(x.manifest.source.id, x.manifest.source.revision) for x in (dense, sparse)]
    if sources[0] != sources[1]:
        a, b = (f"{name}@{revision}" if revision else name for name, revision in sources)
        raise UsageError(
            f"the engines come from different models ({a} and {b}), so nothing could be put down "
            "to sparsity; build both from the same model"
        )
    a, b = (_planned_zeros(x) for x in (dense, sparse))
    if a > b:
        raise UsageError(
            f"{dense.path} is given as the dense engine and has {a:,} zeros planned, "
            f"{sparse.path} has {b:,}; swap the two"
        )
    if first := sorted(narrower[0] - narrower[1]):
        raise UsageError(
            f"{dense.path} is given as the dense engine and its {first[0]} has lost blocks that "
            f"{sparse.path} has; swap the two"
        )


def _check_limits(dense: Bundle, sparse: Bundle) -> None:
    """The same options are not enough: out of memory, a build goes on with less."""
    reports = [BuildReport.read(bundle.path) for bundle in (dense, sparse)]
    if reports[0] is None or reports[1] is None:
        return
    apart, lowest = reports[0].limits_apart(reports[1])
    if apart:
        a, b = (report.components[apart[0]].limits for report in reports if report)
        options = " ".join(f"--option {name}={limit}" for name, limit in lowest.items())
        raise UsageError(
            f"{apart[0]}: one build ran out of memory and went on with less than the other "
            f"({a} and {b}), so nothing could be put down to sparsity; build both with {options}"
        )


def _planned_zeros(bundle: Bundle) -> int:
    return sum(p.zeros or 0 for p in bundle.manifest.plan.layers) if bundle.manifest.plan else 0


def _engine(engine: Bundle, answers: Mapping[Residency, Sequence[Mapping[str, Any]]]) -> Engine:
    """`answers` of the processes of this engine, by residency."""
    details, files = engine.manifest.details, engine.manifest.files
    return Engine(
        digest=engine.digest,
        backend=details["backend"],
        providers=details["providers"],
        options=details["options"],
        dtype=str(details.get("dtype", "unknown")),
        bytes=sum(
            record.size for name, record in files.items() if name.split("/")[0] in COMPONENTS
        ),
        sparse_kernels=SparseKernels.model_validate(details["sparse_kernels"]),
        peak_memory={
            residency: int(median(a["peak_anonymous_bytes"] for a in some))
            for residency, some in answers.items()
            if all(a["peak_anonymous_bytes"] for a in some)
        },
        device_memory=_device_memory(answers["resident"]),
        device_memory_sequential=_device_memory(answers["sequential"]),
        plans={c: files[f"{c}/{PLAN}"].sha256 for c in COMPONENTS if f"{c}/{PLAN}" in files},
    )


def _device_memory(answers: Sequence[Mapping[str, Any]]) -> DeviceMemory | None:
    """The median over processes of each figure; None where the engine runs on the CPU."""
    held = [dict(a["device_memory"]) for a in answers if a["device_memory"]]
    for memory, answer in zip(held, answers, strict=False):
        if used := answer.get("telemetry", {}).get("used_bytes"):
            memory["process"] = used
    if not held:
        return None
    names = {name for memory in held for name in memory}
    return DeviceMemory(**{n: int(median(m[n] for m in held if n in m)) for n in names})


def _watcher(stack: ExitStack) -> Watcher:
    readings = stack.enter_context(Readings())
    return lambda: readings.watch()


def _telemetry(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[Telemetry, ...]:
    """What was read beside each process, in the order they ran; nothing where nothing was."""
    fields = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")
    seen = [
        Telemetry(process=a["process"], contestant=name, **{f: a["telemetry"][f] for f in fields})
        for name, some in answers.items()
        for a in some
        if any(a.get("telemetry", {}).get(f) is not None for f in fields)
    ]
    return tuple(sorted(seen, key=lambda one: one.process))


def machine() -> dict[str, str | int]:
    """What figures hold for, besides the software: kind of machine, processor, cores."""
    facts = {"machine": platform.machine(), "processor": _processor()}
    return {**facts, "cores": os.cpu_count() or 1}


def _processor() -> str:
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _accelerator() -> str | None:
    import shutil
    import subprocess

    if not (tool := shutil.which("nvidia-smi")):
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):  # it hangs where the driver does
        return None
    return answer.stdout.strip() or None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
