"""`sdcompress bench`: two engines against each other, and a control."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.commands._common import (
    GUIDANCE,
    Finite,
    counted_progress,
    emit,
    json_option,
    residency_option,
)
from sdcompress.results import Results

if TYPE_CHECKING:
    from export.residency import Residency

Output = Results


@click.command()
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("sparse", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The results.json."
)
@click.option("--rounds", type=click.IntRange(min=2), default=10, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps of the whole picture.")
@click.option("--guidance", type=GUIDANCE, help="Guidance scale; 1 or less runs one branch.")
@click.option("--height", type=click.IntRange(min=8), help="Pixels.")
@click.option("--width", type=click.IntRange(min=8), help="Pixels.")
@click.option(
    "--budget",
    type=Finite(min=0, min_open=True),
    default=1.2,
    show_default=True,
    help="Seconds of timed work in each process.",
)
@residency_option
@json_option
def command(
    dense: Path,
    sparse: Path,
    output: Path,
    rounds: int,
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    budget: float,
    residency: Residency,
    as_json: bool,
) -> None:
    """Measure the engine SPARSE against the engine DENSE: latency, memory, size, load time.

    Each runs in fresh processes, in turn, and the dense engine runs against itself as a control.
    Memory is reported for both residencies.

    \b
    Example:
      sdcompress bench out/engine/dense out/engine/sparse -o results.json
    """
    from export.bench import bench
    from export.run import command_line
    from sdcompress.bundle import Bundle, refuse_existing, write_text
    from sdcompress.models.defaults import sampling_defaults

    refuse_existing(output)
    dense_engine, sparse_engine = (Bundle.open(p, stages=("engine",)) for p in (dense, sparse))
    asked = {"steps": steps, "guidance": guidance, "height": height, "width": width}
    defaults = sampling_defaults(dense_engine)
    sampling: dict[str, Any] = {k: defaults[k] if v is None else v for k, v in asked.items()}
    output.parent.mkdir(parents=True, exist_ok=True)  # now, and not when all is measured
    with counted_progress("measuring") as progress:
        results = bench(
            dense_engine,
            sparse_engine,
            rounds=rounds,
            budget=budget,
            residency=residency,
            command=command_line(sys.argv[1:]),
            progress=progress,
            **sampling,
        )
    write_text(output, results.model_dump_json(indent=1) + "\n")

    from sdcompress.commands._tables import print_measures

    emit(results, as_json, lambda console: print_measures(console, results))
