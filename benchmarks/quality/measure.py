"""What pruning costs mini-sd2, what tuning regains, and where quality falls off.

    python benchmarks/quality/measure.py --work DIR

Runs the commands a user would run, on held-out prompts that no network saw in training:

1. the UNet in 2:4 (every Linear and Conv, magnitude), before and after `tune --method distill`;
2. sweeps of the text encoder and of the UNet, magnitude and Wanda, with their cliffs.

A stopped run goes on where it was. Writes results.json, text_encoder.csv, unet.csv and both plots
beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from export.bench import environment
from sdcompress.bundle import write_json
from sdcompress.evaluation.quality import MetricResult, Quality
from sdcompress.evaluation.statistics import mean_interval
from sdcompress.sweep.points import read_point

HERE = Path(__file__).parent
SDCOMPRESS = [sys.executable, "-m", "sdcompress"]
SAMPLES = 400
ENOUGH = 0.05  # a wider half-width decides nothing
TO_REGAIN = 0.95  # of the dense prompt accuracy
TUNING_MINUTES = 10.0
ACCURACY = "prompt_accuracy"
# What `tune` is told besides its defaults.
TUNE = ("--steps", "600", "--learning-rate", "1e-3", "--warmup", "20")
SWEEPS = {
    "text_encoder": "0.5,0.6,0.7,0.75,0.8,0.85,0.9,0.95",
    "unet": "0.1,0.2,0.3,0.4,0.5,0.6,0.7",
}
RECIPE = """\
name: unet-2to4
prune:
  unet:
    rules:
      - {scope: all, criterion: magnitude, pattern: "2:4"}
"""


def run(*arguments: object) -> None:
    command = [*SDCOMPRESS, *map(str, arguments)]
    print("$ sdcompress", *command[3:], flush=True)
    subprocess.run(command, check=True)


def recovery(work: Path) -> dict[str, Any]:
    """Dense, 2:4 as pruned, and 2:4 tuned."""
    recipe = work / "unet-2to4.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    pruned, tuned, clock = work / "pruned", work / "tuned", work / "tune-seconds.json"
    if not pruned.exists():
        run("prune", "mini-sd2", "--recipe", recipe, "-o", pruned)
    if not tuned.exists():
        start = time.perf_counter()
        run("tune", pruned, "-o", tuned, *TUNE)
        write_json(clock, {"seconds": round(time.perf_counter() - start, 1)})
    minutes = json.loads(clock.read_text())["seconds"] / 60
    found: dict[str, Any] = {"tune": ["--method", "distill", *TUNE], "minutes": round(minutes, 2)}
    for name, bundle in (("pruned", pruned), ("tuned", tuned)):
        file = work / f"{name}.json"
        if not file.exists():
            keep = ("--keep-images", work / "pictures")
            run("eval", bundle, "--against", "mini-sd2", "--samples", SAMPLES, "-o", file, *keep)
        quality = Quality.model_validate_json(file.read_text())
        found[name] = {metric: _figures(result) for metric, result in quality.metrics.items()}
    dense, regained = (found["tuned"][ACCURACY][k] for k in ("dense", "model"))
    ratio = [round(regained[k] / dense["value"], 4) for k in ("value", "low", "high")]
    found["regained"] = dict(zip(("value", "low", "high"), ratio, strict=True))
    wide = (regained["high"] - regained["low"]) / 2 > ENOUGH
    reached = ratio[0] >= TO_REGAIN and minutes <= TUNING_MINUTES
    found["verdict"] = "inconclusive" if wide else "reached" if reached else "not reached"
    return found


def sweeps(work: Path) -> dict[str, Any]:
    """Where each component falls off, and magnitude beside Wanda at every sparsity."""
    found: dict[str, Any] = {}
    for component, sparsities in SWEEPS.items():
        out = work / component
        run(
            *("sweep", "mini-sd2", "-o", out, "--component", component),
            *("--criterion", "magnitude,wanda", "--sparsity", sparsities, "--samples", SAMPLES),
            *("--keep", f"{ACCURACY}=0.95", "--keep", "clip_score=0.98"),
        )
        for kind in ("csv", "svg"):
            source = {"csv": "results.csv", "svg": "plot.svg"}[kind]
            shutil.copyfile(out / source, HERE / f"{component}.{kind}")
        sweep = json.loads((out / "sweep.json").read_text())
        found[component] = {"cliffs": sweep["cliffs"], "magnitude_minus_wanda": _duel(out, sweep)}
    return found


def _duel(out: Path, sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompt accuracy of magnitude minus Wanda at each sparsity, paired by prompt."""
    values: dict[float, dict[str, tuple[float, ...]]] = {}
    for entry in sweep["points"]:
        (part,) = entry["point"]["parts"].values()
        scores = values.setdefault(part["sparsity"], {})
        point = read_point(out, entry["digest"])  # sweep.json has no values of single prompts
        assert point
        assert point.quality
        scores[part["criterion"]] = point.quality.metrics[ACCURACY].values
    rows = []
    for sparsity, scores in sorted(values.items()):
        value, low, high = mean_interval(np.subtract(scores["magnitude"], scores["wanda"]))
        better = "magnitude" if low > 0 else "wanda" if high < 0 else "neither"
        if better == "neither" and (high - low) / 2 > ENOUGH:
            better = "inconclusive"
        figures = {"value": value, "low": low, "high": high}
        row = {name: round(x, 4) for name, x in figures.items()}
        rows.append({"sparsity": sparsity, **row, "better": better})
    return rows


def _figures(result: MetricResult) -> dict[str, Any]:
    figures = result.model_dump(exclude={"values", "dense_values", "metric"}, exclude_none=True)
    return {
        k: {e: round(x, 5) for e, x in v.items()} if isinstance(v, dict) else v
        for k, v in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="bundles, pictures and points")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    results = {
        "samples": SAMPLES,
        "recovery": recovery(work),
        "sweeps": sweeps(work),
        "environment": environment().model_dump(mode="json"),
    }
    write_json(HERE / "results.json", results)


if __name__ == "__main__":
    main()
