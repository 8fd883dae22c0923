"""How fast a UNet with narrower blocks is: the dense one against two budgets, in turn.

A table of latencies is measured, spent by `--budget latency=0.75`, and put beside what
`--budget macs=0.7` makes; then fresh processes time one denoising step of each, dense twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.structured import engine as engine_module
from benchmarks.structured.engine import BACKEND, open_weights
from benchmarks.structured.worker import UNET
from export.bench import busy_cores, environment
from export.comparison import make_control, make_measures
from sdcompress.bundle import Bundle, write_json, write_text
from sdcompress.catalog import read_catalog, read_config
from sdcompress.latency import LatencyTable, read_table
from sdcompress.macs import Sizes, block_macs, component_macs
from sdcompress.measure import run_worker, turns
from sdcompress.results import Measure
from sdcompress.structure import ComponentStructure, find_blocks, level_of, read_record

WORKER = "benchmarks.structured.worker"
ROOT = Path(__file__).parents[2]
MAKE_MODEL = ROOT / "benchmarks" / "full_size" / "make_model.py"
SDCOMPRESS = [sys.executable, "-m", "sdcompress"]
OWN = "engine_memory"
BATCH = 2  # with guidance, of one picture
BUDGETS = {"latency": 0.75, "macs": 0.7}
FOLLOWED = 0.8  # of the time that its MACs promise to save, what a kind of block saves at least
RECIPE = """\
name: {what}-{share:g}
prune:
  unet:
    structure:
      budget: {{{what}: {share:g}}}
      rules:
        - {{criterion: magnitude}}
"""


@dataclass(frozen=True)
class Part:
    """One geometry: in each of `rounds`, each engine runs `iterations` times after `warm_up`.

    `options` are the backend's.
    """

    name: str
    options: dict[str, Any]
    rounds: int
    warm_up: int
    iterations: int


PARTS = {
    # So small that a second thread brings little, and waits for others more than it works.
    "mini": Part("mini", {"provider": "cpu", "threads": 1}, rounds=20, warm_up=20, iterations=200),
    "full": Part("full", {"provider": "cpu"}, rounds=7, warm_up=0, iterations=2),
}


@dataclass(frozen=True)
class Kind:
    """Blocks of one kind on one level of the UNet, dense and with the widths that were chosen.

    `macs` and `milliseconds` are of all of them, of one sample and of one run in that order.
    """

    kind: str
    level: int
    blocks: int
    kept: float
    macs: tuple[float, float]
    milliseconds: tuple[float, float]

    @property
    def saved(self) -> tuple[float, float]:
        """The share of its MACs and of its time that is gone."""
        macs, time = (1 - after / before for before, after in (self.macs, self.milliseconds))
        return macs, time

    @property
    def followed(self) -> bool:
        macs, time = self.saved
        return time >= FOLLOWED * macs


def measure(part: Part, work: Path, model: str | None, rounds: int | None) -> None:
    """Everything that `work` has no answer of. `model` is for the full size, made if None."""
    work.mkdir(parents=True, exist_ok=True)
    model = model_of(part, work, model)
    measure_table(part, work, model)
    for what, share in BUDGETS.items():
        if not (work / "pruned" / what).exists():
            recipe = work / f"{what}.yaml"
            write_text(recipe, RECIPE.format(what=what, share=share))
            table = ["--table", table_of(work)] if what == "latency" else []
            narrow = work / "pruned" / what
            run([*SDCOMPRESS, "prune", model, "--recipe", recipe, *table, "-o", narrow])
    for name in ("dense", *BUDGETS):
        if not (out := engine_of(work, name)).exists():
            out.parent.mkdir(exist_ok=True)
            weights = model if name == "dense" else work / "pruned" / name
            run(
                [
                    sys.executable,
                    "-m",
                    engine_module.__name__,
                    weights,
                    out,
                    json.dumps(part.options),
                ]
            )
    wanted, jobs = rounds or part.rounds, make_jobs(part, work)
    for number, order in enumerate(turns(list(jobs), wanted)):
        file = round_file(work, number)
        if file.exists():
            continue
        busy = busy_cores()
        answers = {name: run_worker(WORKER, jobs[name]) for name in order}
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"busy_cores": busy, "order": order, "answers": answers})
        print(f"{part.name}: round {number + 1} of {wanted}; {in_a_line(answers)}", flush=True)


def model_of(part: Part, work: Path, given: str | None) -> str:
    """What `prune` and `latency` take; remembered, so that a run that goes on knows it."""
    if part.name == "mini":
        return "mini-sd2"
    file = work / "model.json"
    if not given and file.exists():
        given = json.loads(file.read_text())
    if not given:
        given = str(work / "model")
        if not Path(given).exists():
            run([sys.executable, MAKE_MODEL, given])
    given = str(Path(given).resolve())
    write_json(file, given)
    return given


def measure_table(part: Part, work: Path, model: str) -> LatencyTable:
    """The table of this machine, measured unless it is there."""
    if not table_of(work).exists():
        work.mkdir(parents=True, exist_ok=True)
        options = [f"--option={key}={value}" for key, value in part.options.items()]
        how = ["--component", UNET, "--backend", BACKEND, *options, "--guidance"]
        run([*SDCOMPRESS, "latency", model, *how, "-o", table_of(work)])
    return read_table(table_of(work))


def table_of(work: Path) -> Path:
    return work / "table.json"


def engine_of(work: Path, name: str) -> Path:
    return work / "engine" / name


def round_file(work: Path, number: int) -> Path:
    return work / "rounds" / f"{number:02}.json"


def run(command: Sequence[object]) -> None:
    print("$", *command[1:], flush=True)
    subprocess.run([*map(str, command)], check=True, cwd=ROOT)


def make_jobs(part: Part, work: Path) -> dict[str, dict[str, Any]]:
    """The dense engine runs twice, the second time as a control."""
    jobs = {}
    for name in ("dense", *BUDGETS, "control"):
        found = Bundle.open(engine_of(work, "dense" if name == "control" else name))
        jobs[name] = {
            "name": name,
            "engine": str(found.path.resolve()),
            "details": found.manifest.details,
            "batch": BATCH,
            "warm_up": part.warm_up,
            "iterations": part.iterations,
        }
    return jobs


def in_a_line(answers: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {min(a[UNET]):.1f} ms" for name, a in sorted(answers.items()))


def results(part: Part, work: Path) -> dict[str, Any] | None:
    """What has been measured so far, for JSON; None before the second round."""
    files = sorted((work / "rounds").glob("*.json"))
    if len(files) < 2:
        return None
    rounds = [json.loads(file.read_text()) for file in files]
    answers = {name: [r["answers"][name] for r in rounds] for name in rounds[0]["answers"]}
    model, table = model_of(part, work, None), read_table(table_of(work))
    dense = engine_bytes(work, "dense")
    found: dict[str, Any] = {
        "rounds": len(rounds),
        "iterations": part.iterations,
        "batch": BATCH,
        "backend": BACKEND,
        "options": part.options,
        "busy_cores": [r["busy_cores"] for r in rounds],
        "table": {
            "sha256": table.sha256,
            "shapes": table.shapes,
            "milliseconds": table.total * 1000,
            "rounds": table.rounds,
        },
        "engine_bytes": {"dense": dense},
        "budgets": {},
        "environment": environment().model_dump(mode="json"),
    }
    for what, share in BUDGETS.items():
        measures = compared(answers, what)
        record = read_record(Bundle.open(work / "pruned" / what).manifest.details)[UNET]
        found["control"] = make_control({UNET: measures[UNET]}).model_dump(mode="json")
        found["engine_bytes"][what] = engine_bytes(work, what)
        kinds, rest = by_kind(model, table, record)
        found["budgets"][what] = {
            "asked": share,
            "measures": {k: m.model_dump(mode="json") for k, m in measures.items()},
            "engine_size": engine_bytes(work, what) / dense,
            "parameters": record.parameters / record.parameters_dense,
            "macs": record.macs / record.macs_dense,
            "foretold": foretold(table, record),
            "kinds": [{**asdict(k), "saved": k.saved, "followed": k.followed} for k in kinds],
            "rest": rest,
        }
    return found


def compared(answers: Mapping[str, Sequence[Mapping[str, Any]]], what: str) -> dict[str, Measure]:
    """One step, peak memory, and that without what the runtime takes for itself, of one budget
    against the dense engine.
    """
    three = {
        name: [{**a, OWN: a["peak_anonymous_bytes"] - a["before_bytes"]} for a in answers[key]]
        for name, key in (("dense", "dense"), ("sparse", what), ("control", "control"))
    }
    measures = make_measures(three, (UNET, OWN))
    return {**measures, OWN: measures[OWN].model_copy(update={"unit": "bytes"})}


def engine_bytes(work: Path, name: str) -> int:
    files = (engine_of(work, name) / UNET).glob("model.onnx*")
    return sum(file.stat().st_size for file in files)


def foretold(table: LatencyTable, record: ComponentStructure) -> float:
    """What the table says of these widths, as a share of dense."""
    saved = sum(
        table.seconds(name, b.width) - table.seconds(name, b.kept)
        for name, b in record.blocks.items()
    )
    return 1 - saved / table.total


def by_kind(
    model: str, table: LatencyTable, record: ComponentStructure
) -> tuple[list[Kind], dict[str, float]]:
    """MACs and the table's times by kind and level, and those of all that is no part of a block."""
    config, shapes, sizes = _geometry(model)
    macs = component_macs(UNET, shapes, config, sizes)
    levels = len(config["block_out_channels"])
    groups: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for block in find_blocks(UNET, shapes, config):
        kept, all_macs = record.blocks[block.name].kept, float(block_macs(block, macs))
        times = (table.seconds(block.name, width) * 1000 for width in (block.width, kept))
        one = (block.width, kept, all_macs, all_macs * kept / block.width, *times)
        groups.setdefault((block.kind, level_of(block.name, levels)), []).append(one)
    kinds = []
    for (kind, level), blocks in sorted(groups.items()):
        width, kept, m0, m1, t0, t1 = (sum(column) for column in zip(*blocks, strict=True))
        kinds.append(Kind(kind, level, len(blocks), kept / width, (m0, m1), (t0, t1)))
    rest = {
        "macs": sum(macs.values()) - sum(k.macs[0] for k in kinds),
        "milliseconds": table.total * 1000 - sum(k.milliseconds[0] for k in kinds),
    }
    return kinds, rest


@lru_cache
def _geometry(model: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], Sizes]:
    path = open_weights(model).path
    return read_config(path / UNET), read_catalog(path).shapes(UNET), Sizes.of_model(path)
