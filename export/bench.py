"""Dense against sparse: latency, memory, size and load time of two engines, and a control.

Each round starts three fresh processes in random order: the dense engine, the sparse engine and
the dense engine again. See `sdcompress.measure` for how the figures are compared.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.pipeline import Geometry, tokenize
from export.specs import COMPONENTS
from sdcompress.bundle import Bundle, runtime_versions, tool_versions
from sdcompress.errors import InputError, UsageError
from sdcompress.measure import (
    compare,
    family_confidence,
    median_of,
    percentile,
    run_rounds,
    run_worker,
)
from sdcompress.plan import account
from sdcompress.results import (
    Control,
    DeviceMemory,
    Engine,
    Environment,
    Measure,
    Results,
    Series,
    Setup,
    SparseKernels,
)

WORKER = "export.bench_worker"
# In the order of the page: what a user waits for, then its parts.
TIMED = ("picture", "text_encoder", "unet_step", "vae_decoder", "load")
PEAK = "peak_memory"
# Share of the time budget of one process; the rest of it goes into starting and loading.
SHARES = {"picture": 0.4, "text_encoder": 0.15, "unet_step": 0.3, "vae_decoder": 0.15}
PROMPT = "a large red circle left of a small blue square on a white background"
MEMORY = "peak anonymous memory of the process tree (smaps_rollup), mapped files not counted"


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
    budget: float = 1.2,
    timeout: float | None = None,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Measure two engine bundles against each other.

    `budget` is about how many seconds one process spends on timed work; slow engines take longer,
    as everything is timed at least once. `progress(done, total)` counts processes.

    Raises:
        UsageError: fewer than 2 rounds, a size that does not fit, or engines that cannot be
            compared because model, backend, options or precision differ or they are swapped.
        VerificationError: an engine's files are not those of its manifest.
        SdcompressError: a measuring process failed, was killed, or gave NaN.
    """
    if rounds < 2:
        raise UsageError(f"{rounds} rounds give no interval; give at least 2, better 10 or more")
    _check_comparable(dense, sparse)
    here = environment(busy_cores())
    jobs = {
        name: {**_job(engine, steps, guidance, height, width, prompt, seed), "name": name}
        for name, engine in (("dense", dense), ("sparse", sparse), ("control", dense))
    }
    plan = _how_often(jobs, budget, timeout)
    for job in jobs.values():
        job.update(plan)
    answers = run_rounds(WORKER, jobs, rounds=rounds, seed=seed, timeout=timeout, progress=progress)
    measures = _measures(answers)
    latents = jobs["dense"]["latent_shape"]
    scale = Geometry.read(dense.path).scale
    manifest = sparse.manifest
    return Results(
        model=manifest.source.id,
        recipe=(manifest.recipe or {}).get("name"),
        measures=measures,
        control=_control(measures),
        engines={
            "dense": _engine(dense, answers["dense"]),
            "sparse": _engine(sparse, answers["sparse"]),
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
        ),
        environment=here,
        sparsity=account(manifest.plan) if manifest.plan else None,
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
    steps: int,
    guidance: float,
    height: int | None,
    width: int | None,
    prompt: str,
    seed: int,
) -> dict[str, Any]:
    geometry = Geometry.read(engine.path)
    prompts = ["", prompt] if guidance > 1 else [prompt]
    return {
        "engine": str(engine.path.resolve()),
        "details": engine.manifest.details,
        "steps": ddim_steps(engine.path / "scheduler", steps),
        "guidance": guidance,
        "token_ids": tokenize(engine.path, prompts).tolist(),
        "latent_shape": geometry.latent_shape(height, width),
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


def _measures(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Measure]:
    keys: dict[str, tuple[str, Any]] = {name: (name, "ms") for name in TIMED}
    if all(a["peak_anonymous_bytes"] > 0 for one in answers.values() for a in one):
        keys[PEAK] = ("peak_anonymous_bytes", "bytes")
    family = family_confidence(len(keys))
    measures = {}
    for name, (key, unit) in keys.items():
        series = {contestant: _series(one, key) for contestant, one in answers.items()}
        dense, sparse, control = (series[c].rounds for c in ("dense", "sparse", "control"))
        against_itself = compare(dense, control, confidence=family)
        measures[name] = Measure(
            unit=unit,
            **series,
            sparse_to_dense=compare(dense, sparse, control=against_itself),
            control_to_dense=against_itself,
        )
    return measures


def _series(answers: Sequence[Mapping[str, Any]], key: str) -> Series:
    pooled: list[float] = []
    for answer in answers:
        value = answer[key]
        pooled += value if isinstance(value, list) else [float(value)]
    return Series(
        p50=percentile(pooled, 50),
        p95=percentile(pooled, 95),
        p99=percentile(pooled, 99),
        iterations=len(pooled),
        rounds=tuple(median_of(answers, key)),
    )


def _control(measures: Mapping[str, Measure]) -> Control:
    differs = tuple(
        name for name, m in measures.items() if m.control_to_dense.verdict != "no difference"
    )
    return Control(
        trustworthy=not differs, differs=differs, confidence=family_confidence(len(measures))
    )


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
    for fact in ("backend", "providers", "options", "dtype"):
        a, b = (x.manifest.details.get(fact) for x in (dense, sparse))
        if a != b:
            raise UsageError(
                f"the engines differ in {fact} ({a} and {b}), so nothing could be put down to "
                "sparsity; build both with the same settings"
            )
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


def _planned_zeros(bundle: Bundle) -> int:
    return sum(p.zeros or 0 for p in bundle.manifest.plan.layers) if bundle.manifest.plan else 0


def _engine(engine: Bundle, answers: Sequence[Mapping[str, Any]]) -> Engine:
    details = engine.manifest.details
    memory = answers[0].get("device_memory")
    return Engine(
        digest=engine.digest,
        backend=details["backend"],
        providers=details["providers"],
        options=details["options"],
        dtype=str(details.get("dtype", "unknown")),
        bytes=sum(
            record.size
            for name, record in engine.manifest.files.items()
            if name.split("/")[0] in COMPONENTS
        ),
        sparse_kernels=SparseKernels.model_validate(details["sparse_kernels"]),
        device_memory=DeviceMemory.model_validate(memory) if memory else None,
    )


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
