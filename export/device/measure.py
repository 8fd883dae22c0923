"""Dense against sparse: fresh processes, in shuffled turn, with the dense engines once more.

What comes out are the raw answers of each process; the host compares them, with the functions it
uses for its own measurements.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .build import Built, Route
from .contents import TWINS, Contents
from .errors import DeviceError
from .golden import verdict
from .telemetry import Telemetry

CONTESTANTS = {"dense": "dense", "sparse": "sparse", "control": "dense"}
# Share of the time budget of one process.
SHARES = {"picture": 0.4, "text_encoder": 0.15, "unet_step": 0.3, "vae_decoder": 0.15}
MOST_ITERATIONS = 200
TIMED = ("picture", "text_encoder", "unet_step", "vae_decoder", "load")

OTHER = {"resident": "sequential", "sequential": "resident"}

Answer = dict[str, Any]


def describe(
    contents: Contents, twin: str, built: Mapping[str, Built], built_for: str
) -> list[dict[str, Any]]:
    """The engines of a twin as jobs know them, in the order of a picture."""

    def placed(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{**tensor, "file": str(contents.root / tensor["file"])} for tensor in tensors]

    return [
        {
            "name": f"{twin} {name}",
            "component": name,
            "calls": component["calls"],
            "plan": str(built[name].plan),
            "sha256": built[name].sha256,
            "built_for": built_for,
            "inputs": placed(component["inputs"]),
            "outputs": placed(component["twins"][twin]["outputs"]),
        }
        for name, component in contents.components.items()
    ]


def check_all(
    contents: Contents, route: Route, described: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Compare every engine with the golden outputs.

    Raises:
        DeviceError: with exit code 3, if one gives NaN or differs more than the stated bound.
    """
    checks: list[dict[str, Any]] = []
    for twin in TWINS:
        for engine in described[twin]:
            errors = route.errors(engine)
            passed, words = verdict(engine["name"], errors, contents.tolerance)
            if not passed:
                raise DeviceError(
                    f"{words}; nothing was measured: export with dtype fp32, or prune less",
                    exit_code=3,
                )
            checks.append(
                {
                    "twin": twin,
                    "component": engine["component"],
                    "plan": engine["sha256"],
                    "error": max(errors.values()),
                    "tolerance": contents.tolerance,
                }
            )
    return checks


def measure_all(
    route: Route,
    described: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    rounds: int,
    seed: int,
    budget: float,
    residency: str,
    cuda_graph: bool,
    telemetry: Telemetry,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """`answers` of each contestant in round order, `telemetry` of each process, and of each twin
    one answer in the `other_residency`, for its memory; None if it does not run that way.

    An uncounted trial of both twins fills caches and says how often to repeat within `budget`
    seconds a process.
    """
    once: dict[str, Any] = {
        "residency": residency,
        "cuda_graph": cuda_graph,
        "warm_up": 0,
        "iterations": dict.fromkeys(SHARES, 1),
    }

    def run(twin: str, how: Mapping[str, Any]) -> tuple[Answer, dict[str, Any]]:
        with telemetry.watch() as watch:
            job = {**how, "engines": described[twin], "name": f"measuring {twin}"}
            answer = route.measure(job, watch)
        return answer, watch.summary()

    say("trying both once")
    trials = {twin: run(twin, once)[0] for twin in ("sparse", "dense")}
    job = {**once, "warm_up": 1, "iterations": _iterations(trials.values(), budget)}
    answers: dict[str, list[Answer]] = {name: [] for name in CONTESTANTS}
    seen: list[dict[str, Any]] = []
    shuffler = random.Random(seed)
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        for name in shuffler.sample(list(CONTESTANTS), len(CONTESTANTS)):
            answer, summary = run(CONTESTANTS[name], job)
            answers[name].append(answer)
            seen.append({"process": len(seen), "contestant": name, **summary})
    other: dict[str, Answer | None] = {}
    for twin in TWINS:
        try:
            other[twin] = run(twin, {**once, "residency": OTHER[residency]})[0]
        except DeviceError as e:  # all at once need not fit where one at a time does
            say(f"{twin} cannot be held {OTHER[residency]}: {e}")
            other[twin] = None
    return {
        "answers": answers,
        "other_residency": other,
        "telemetry": seen,
        "iterations": job["iterations"],
        "warm_up": job["warm_up"],
    }


def _iterations(trials: Any, budget: float) -> dict[str, int]:
    slowest: dict[str, float] = {}
    for trial in trials:
        for stage in SHARES:
            slowest[stage] = max(slowest.get(stage, 0), statistics.median(trial[stage]))
    return {
        stage: max(1, min(MOST_ITERATIONS, round(budget * 1000 * share / slowest[stage])))
        if slowest[stage]
        else MOST_ITERATIONS
        for stage, share in SHARES.items()
    }


def table(answers: Mapping[str, Sequence[Answer]]) -> list[str]:
    """Medians over rounds, for reading on the device; the host's report has the intervals."""
    lines = [f"{'ms':14}{'dense':>10}{'sparse':>10}{'ratio':>8}{'control':>9}"]
    for stage in TIMED:
        if any(stage not in answer for one in answers.values() for answer in one):
            continue
        dense, sparse, control = (
            statistics.median(statistics.median(answer[stage]) for answer in answers[name])
            for name in CONTESTANTS
        )
        ratio, again = (f"{x / dense:.3f}" if dense else "-" for x in (sparse, control))
        lines.append(f"{stage:14}{dense:10.2f}{sparse:10.2f}{ratio:>8}{again:>9}")
    return lines
