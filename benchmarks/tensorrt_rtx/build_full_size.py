"""What TensorRT-RTX makes of a full-size Stable Diffusion 2, built ahead of time without a GPU.

    python benchmarks/full_size/make_model.py MODEL
    sdcompress prune MODEL --recipe sd2-2to4 -o PRUNED && sdcompress export PRUNED -o ONNX
    python benchmarks/tensorrt_rtx/build_full_size.py ONNX --sm 8.6 --sm 8.9 --sm 12.0 [--work DIR]

Every component is built through the backend, for each compute capability, with SPARSE_WEIGHTS and
without. Engines are removed once their report is read. Writes `results.json` and `results.csv`
beside this file.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

from export.backends import load_backend
from export.bench import environment
from sdcompress.build_report import BuildReport
from sdcompress.bundle import Bundle, write_json

COLUMNS = (
    "sm",
    "sparse_flag",
    "component",
    "seconds",
    "peak_build_bytes",
    "plan_bytes",
    "context_bytes",
    "tactics",
    "fused_attention",
    "layers_sparse",
    "flag_changed_plan",
    "plan_sha256",
)


def build(source: Bundle, work: Path, sm: str, sparse: bool) -> list[dict[str, Any]]:
    """One row a component."""
    options = {"compute_capability": sm, "sparse": "on" if sparse else "off"}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "engine"
        load_backend("tensorrt_rtx").build(source, out, options=options)
        report = BuildReport.read(out)
    assert report is not None
    return [
        {"sm": sm, "sparse_flag": sparse, "component": component}
        | {name: value for name, value in part.model_dump().items() if name in COLUMNS}
        for component, part in report.components.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--sm", action="append", metavar="MAJOR.MINOR", help="default: 8.9")
    parser.add_argument("--work", type=Path, help="where engines are built, 6 GB")
    args = parser.parse_args()

    source = Bundle.open(args.onnx, stages=("onnx",))
    plan = source.manifest.plan
    rows = []
    for sm in args.sm or ["8.9"]:
        for sparse in (True, False):
            rows += build(source, args.work or Path(tempfile.gettempdir()), sm, sparse)
            for row in rows[-3:]:
                print(", ".join(f"{name} {row[name]}" for name in COLUMNS[:-1]), flush=True)
    here = Path(__file__).parent
    write_json(
        here / "results.json",
        {
            "builds": rows,
            "environment": environment().model_dump(mode="json"),
            "pruned_layers": sum(layer.pruned for layer in plan.layers) if plan else 0,
            "recipe": (source.manifest.recipe or {}).get("name"),
        },
    )
    with (here / "results.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
