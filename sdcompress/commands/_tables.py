"""Tables that more than one command prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from sdcompress.commands._common import size
from sdcompress.plan import Accounting, ComponentSparsity, account
from sdcompress.results import Measure, Results, SparseKernels

RESULTS = "results.json"

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sdcompress.build_report import BuildReport
    from sdcompress.structure import ComponentStructure


def accounting_table(accounting: Accounting) -> Table:
    """The four sparsities, a row each component, then together and the whole pipeline.

    Where blocks are made narrower, what went with them stands beside what is left.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    narrower = accounting.pipeline.removed != 0
    headings = ("asked", "of the layers pruned", "really zero")
    title = "sparsity of what is left" if narrower else "sparsity"
    table = Table("", "parameters", title=title, box=SIMPLE_HEAD)
    for heading in (*(("removed before",) if narrower else ()), *headings):
        table.add_column(heading)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, s: ComponentSparsity) -> None:
        removed = "by budget" if s.removed is None else f"{s.removed:,}"
        percentages = (f"{p:.1%}" for p in (s.asked, s.of_layers_pruned, s.of_component))
        table.add_row(name, f"{s.parameters:,}", *((removed,) if narrower else ()), *percentages)

    for name, sparsity in accounting.components.items():
        row(name, sparsity)
    table.add_section()
    row("components pruned, together", accounting.together)
    row("whole pipeline", accounting.pipeline)
    return table


def structure_table(structures: Mapping[str, ComponentStructure]) -> Table:
    """What became of the blocks of each component, a row each kind, and what that saves."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    headings = ("blocks", "narrower", "channels left", "parameters left", "MACs left", "budget")
    table = Table("", *headings, title="blocks", box=SIMPLE_HEAD)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for component, s in structures.items():
        for kind in dict.fromkeys(block.kind for block in s.blocks.values()):
            blocks = [block for block in s.blocks.values() if block.kind == kind]
            width, kept = sum(b.width for b in blocks), sum(b.kept for b in blocks)
            narrower = sum(b.kept < b.width for b in blocks)
            left = f"{kept:,} of {width:,} ({kept / width:.1%})"
            table.add_row(f"{component}, {kind}", str(len(blocks)), str(narrower), left)
        shares = (s.parameters / s.parameters_dense, s.macs / s.macs_dense)
        asked = [f"{what} {share:g}" for what, share in (s.budget or {}).items()]
        if s.latency is not None:
            asked.append(f"{s.latency:.3f} by the table")
        percentages = (f"{share:.1%}" for share in shares)
        table.add_row(component, "", "", "", *percentages, ", ".join(asked))
        table.add_section()
    return table


def measures_table(results: Results) -> Table:
    """Dense against sparse: medians, the ratio with its interval, and what that says."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    s = results.setup
    title = f"{s.width}×{s.height} pixels, {s.steps} steps, medians of {s.rounds} rounds"
    table = Table("", "dense", "sparse", "sparse ÷ dense", "says", title=title, box=SIMPLE_HEAD)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, m in results.measures.items():
        c = m.sparse_to_dense
        ratio = f"{c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}]"
        dense, sparse = (_quantity(median(x.rounds), m) for x in (m.dense, m.sparse))
        says = c.verdict + (" (within the control)" if c.within_control else "")
        table.add_row(name.replace("_", " "), dense, sparse, ratio, says)
    sizes = [results.engines[twin].bytes for twin in ("dense", "sparse")]
    size_ratio = f"{sizes[1] / sizes[0]:.3f}" if sizes[0] else "–"
    table.add_row("engine files", size(sizes[0]), size(sizes[1]), size_ratio, "")
    return table


def print_measures(console: Console, results: Results) -> None:
    """The table of figures, and whether they can be trusted."""
    console.print(measures_table(results))
    if not results.control.trustworthy:
        differs = ", ".join(name.replace("_", " ") for name in results.control.differs)
        console.print(
            f"do not trust these figures: the dense engine differed from itself ({differs}); "
            "measure again on a quiet machine"
        )


def build_table(report: BuildReport) -> Table:
    """What the engine builder did, a row each component; "–" where nothing tells."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    headings = ("sparse layers", "eligible", "fused attention", "plan", "context", "seconds")
    table = Table(
        "", *headings, title=f"{report.backend} {report.runtime.version}", box=SIMPLE_HEAD
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, c in report.components.items():
        counts = (c.layers_sparse, c.layers_eligible, c.fused_attention)
        table.add_row(
            name,
            *("–" if n is None else str(n) for n in counts),
            size(c.plan_bytes),
            "–" if c.context_bytes is None else size(c.context_bytes),
            f"{c.seconds:.1f}",
        )
    return table


def print_outcome(console: Console, run: Path, page: Path) -> None:
    """What `run` ends with: the sparsities, what was built, the figures, and where the page is."""
    from export.device_bundle import is_device_results, read_results
    from sdcompress.build_report import BuildReport
    from sdcompress.bundle import Bundle
    from sdcompress.report import not_measured
    from sdcompress.structure import read_record

    results, engine = run / RESULTS, Bundle.open(run / "engine" / "sparse")
    if structures := read_record(engine.manifest.details):
        console.print(structure_table(structures))
    if plan := engine.manifest.plan:
        console.print(accounting_table(account(plan)))
    if report := BuildReport.read(engine.path):
        console.print(build_table(report))
    kernels = SparseKernels.model_validate(engine.manifest.details["sparse_kernels"])
    used = "an unknown number" if kernels.used is None else kernels.used
    if results.exists():
        of_device = is_device_results(results)
        print_measures(console, read_results(results) if of_device else Results.read(results))
    else:
        console.print(f"not measured here: {not_measured(run)}")
    console.print(f"sparse kernels used: {used} of {kernels.of} layers ({kernels.how})")
    if (device := run / "device.tar").exists():
        console.print(f"for the device: {device}")
    console.print(f"page: {page}")


def _quantity(value: float, measure: Measure) -> str:
    return size(round(value)) if measure.unit == "bytes" else f"{value:.1f} ms"
