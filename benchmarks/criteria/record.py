"""What one criterion costs: record all it needs of both components, then prune both in 2:4.

    python benchmarks/criteria/record.py obs_diff OUT

In a process of its own, for its peak of memory. Writes OUT/statistics.pt, which the points of this
criterion share, and OUT/cost.json.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.criteria.points import TWO_FOUR, Point, dense_model, recipe
from sdcompress.bundle import staging, write_json

STATISTICS, COST = "statistics.pt", "cost.json"


def main(criterion: str, out: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline  # noqa: F401  # not what a criterion costs

    from sdcompress.prune import prune, record

    dense, how = dense_model(), recipe(Point(criterion, "both", TWO_FOUR), {})
    with staging(out, replace=True) as work, tempfile.TemporaryDirectory() as place:
        before, times = _peak_mib(), [_now()]
        statistics = record(dense, how)
        times.append(_now())
        prune(dense, how, Path(place) / "pruned", statistics=statistics)
        times.append(_now())
        peak = _peak_mib()
        torch.save(statistics, work / STATISTICS)
        size = sum(t.nbytes for c in statistics.values() for s in c.values() for t in s.values())
        record_took, prune_took = (
            {kind: round(b[kind] - a[kind], 2) for kind in a} for a, b in pairwise(times)
        )
        write_json(
            work / COST,
            {
                "record": record_took,
                "prune": prune_took,
                "statistics_mib": round(size / 2**20, 2),
                "peak_mib": round(peak),
                "peak_before_mib": round(before),
            },
        )


def _now() -> dict[str, float]:
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def _peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
