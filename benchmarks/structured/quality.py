"""One point of the quality: narrow, prune, tune, paint, measure."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from benchmarks.criteria.one_point import Answer, judge
from benchmarks.criteria.points import dense_model
from benchmarks.structured.points import TUNE, Point, recipe
from sdcompress.bundle import Bundle, write_json
from sdcompress.plan import account
from sdcompress.rounds import prune_in_rounds
from sdcompress.structure import read_record
from sdcompress.tuning import tune


def answer_file(work: Path, point: Point) -> Path:
    return work / "points" / f"{point.name}.json"


def measure_point(point: Point, table: Path, work: Path, samples: int) -> Answer:
    """Its models are removed when it is measured; until then a point goes on where it was."""
    dense, folder = dense_model(), work / "models" / point.name
    folder.mkdir(parents=True, exist_ok=True)
    pruned, tuned, start = folder / "pruned", folder / "tuned", time.process_time()
    if not pruned.exists():
        prune_in_rounds(dense, recipe(point, table), pruned)
    model, took = Bundle.open(pruned), {"make": time.process_time() - start}
    if point.tuned:
        if not tuned.exists():
            tune(model, TUNE, tuned, dense=dense)
        model, took["tune"] = Bundle.open(tuned), time.process_time() - start - took["make"]
    assert model.manifest.plan
    (record,) = read_record(model.manifest.details).values()
    answer = {
        "point": point._asdict(),
        "parameters": record.parameters / record.parameters_dense,
        "macs": record.macs / record.macs_dense,
        "latency": record.latency,
        "zeros": account(model.manifest.plan).components["unet"].of_component,
        **judge(model, work, samples),
    }
    answer["cpu_seconds"] = {**{k: round(v, 2) for k, v in took.items()}, **answer["cpu_seconds"]}
    answer_file(work, point).parent.mkdir(exist_ok=True)
    write_json(answer_file(work, point), answer)
    shutil.rmtree(folder)
    return answer
