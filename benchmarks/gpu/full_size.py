"""Dense against 2:4 on a GPU, at the exact size of Stable Diffusion 2, through torch.

    python benchmarks/gpu/full_size.py --work DIR [--rounds 10] [--batch 2 8] [--pixels 512 768]

Makes the model with seeded weights, prunes it 2:4, exports both and takes them to the backend
torch_cuda, all kept in DIR. Then every round runs dense, sparse, and dense again, in random turn,
each in a fresh process, at each size. The UNet's batch is given: with guidance, 2 is one picture
at a time. Components are timed by CUDA events. Writes `<card>.json` and `<card>.csv`.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.backends.torch_cuda import BACKEND
from export.bench import environment
from export.comparison import make_control, make_measures
from export.device.telemetry import Telemetry
from export.specs import COMPONENTS, Sizes
from sdcompress.bundle import Bundle, SourceRecord, write_json
from sdcompress.measure import run_rounds
from sdcompress.recipe import load_recipe
from sdcompress.results import Measure

WORKER = "benchmarks.gpu.worker"
MAKE_MODEL = Path(__file__).parents[1] / "full_size" / "make_model.py"
RECIPE = "sd2-2to4"
WARM_UP, ITERATIONS = 5, 30
COLUMNS = ("card", "pixels", "batch", "what", "unit", "dense", "sparse", "ratio", "low", "high")
MEMORY_KINDS = ("weights", "context")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where model and engines are kept")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=_even, nargs="+", default=[2, 8], help="of the UNet")
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds: one round gives no interval; give at least 2, better 10 or more")
    return args


def _even(text: str) -> int:
    if not text.isdecimal() or int(text) < 2 or int(text) % 2:
        raise argparse.ArgumentTypeError(
            f"{text}: give an even number, as guidance runs two branches for each picture"
        )
    return int(text)


def engines(work: Path) -> dict[str, Bundle]:
    """The engines "dense" and "sparse"; what an earlier run has made is taken up."""
    from export.to_onnx import export_bundle
    from sdcompress.prune import prune

    model = work / "model"
    if not model.exists():
        subprocess.run([sys.executable, str(MAKE_MODEL), str(model)], check=True)
    source = Bundle.of_source(model, SourceRecord(id="sd2-base, seeded weights", kind="directory"))
    pruned = work / "pruned"
    if not pruned.exists():
        prune(source, load_recipe(RECIPE), pruned)
    made = {}
    for twin, weights in {"dense": source, "sparse": Bundle.open(pruned)}.items():
        onnx, engine = work / "onnx" / twin, work / "engine" / twin
        if not onnx.exists():
            export_bundle(weights, onnx, dtype="fp16")
        if not engine.exists():
            BACKEND.build(Bundle.open(onnx), engine)
        made[twin] = Bundle.open(engine)
    return made


def job(engine: Bundle, pixels: int, batch: int) -> dict[str, Any]:
    """What the worker is asked to do; half of the UNet's `batch` are pictures."""
    return {
        "engine": str(engine.path.resolve()),
        "details": engine.manifest.details,
        "sizes": asdict(Sizes(images=batch // 2, height=pixels, width=pixels)),
        "warm_up": WARM_UP,
        "iterations": ITERATIONS,
    }


def table(
    card: str,
    pixels: int,
    batch: int,
    measures: Mapping[str, Measure],
    memory: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Rows of the CSV for one size: milliseconds of each component, then megabytes.

    `memory` is what the worker said of "dense" and "sparse". Weights and context are of each
    component, the peak of all together. Ratios are sparse ÷ dense; memory has no interval.
    """
    same: dict[str, Any] = {"card": card, "pixels": pixels, "batch": batch}
    rows = []
    for name, m in measures.items():
        ratio = m.sparse_to_dense
        rows.append(
            {
                **same,
                "what": name,
                "unit": "ms",
                "dense": round(m.dense.median, 3),
                "sparse": round(m.sparse.median, 3),
                "ratio": round(ratio.ratio, 4),
                "low": round(ratio.low, 4),
                "high": round(ratio.high, 4),
            }
        )
    taken = {
        f"{kind} of {c}": [memory[twin][c][kind] for twin in ("dense", "sparse")]
        for c in COMPONENTS
        for kind in MEMORY_KINDS
    }
    peaks = [memory[twin]["peak"] for twin in ("dense", "sparse")]
    if None not in peaks:
        taken["peak of all"] = peaks
    for name, (dense, sparse) in taken.items():
        rows.append(
            {
                **same,
                "what": name,
                "unit": "MB",
                "dense": round(dense / 1e6, 1),
                "sparse": round(sparse / 1e6, 1),
                "ratio": round(sparse / dense, 4) if dense else "",
                "low": "",
                "high": "",
            }
        )
    return rows


def write_csv(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def file_name(card: str) -> str:
    """ "NVIDIA GeForce RTX 4090" → "nvidia-geforce-rtx-4090"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def main() -> None:
    args = arguments()
    if why := BACKEND.available():
        raise SystemExit(f"this benchmark needs an NVIDIA GPU: {why}")
    import torch

    card = torch.cuda.get_device_name()
    twins = engines(args.work)
    for engine in twins.values():
        if why := BACKEND.why_not_run(engine.manifest.details):
            raise SystemExit(why)
    contestants = {**twins, "control": twins["dense"]}
    here = environment()
    rows: list[dict[str, Any]] = []
    sizes = []
    with Telemetry() as telemetry:
        for pixels in args.pixels:
            for batch in args.batch:
                answers = run_rounds(
                    WORKER,
                    {
                        name: {**job(engine, pixels, batch), "name": name}
                        for name, engine in contestants.items()
                    },
                    rounds=args.rounds,
                    watch=lambda: telemetry.watch(),
                )
                for answer in (a for some in answers.values() for a in some):
                    answer["peak_anonymous_bytes"] = 0  # of the host, and not asked for
                measures = make_measures(answers, COMPONENTS)
                memory = {twin: answers[twin][0]["memory"] for twin in twins}
                rows += table(card, pixels, batch, measures, memory)
                sizes.append(
                    {
                        "pixels": pixels,
                        "batch": batch,
                        "measures": {k: m.model_dump(mode="json") for k, m in measures.items()},
                        "control": make_control(measures).model_dump(mode="json"),
                        "memory": memory,
                        "telemetry": {k: [a["telemetry"] for a in v] for k, v in answers.items()},
                    }
                )
                print(f"{pixels} pixels, batch {batch}: done", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "recipe": RECIPE,
        "rounds": args.rounds,
        "iterations": ITERATIONS,
        "sparse_kernels": twins["sparse"].manifest.details["sparse_kernels"],
        "environment": here.model_dump(mode="json"),
        "sizes": sizes,
    }
    write_json(args.out / f"{file_name(card)}.json", facts)
    write_csv(args.out / f"{file_name(card)}.csv", rows)


if __name__ == "__main__":
    main()
