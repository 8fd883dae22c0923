"""From the answers of measuring processes to the compared figures of `results.json`.

Used for what `export.bench` measures on this machine and for what a device brings back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from export.specs import MODEL_OF
from sdcompress.bundle import Bundle
from sdcompress.measure import compare, family_confidence, median_of, percentile
from sdcompress.results import Control, Measure, Series
from sdcompress.structure import read_record

# In the order of the page: what a user waits for, then its parts.
TIMED = ("picture", "text_encoder", "unet_step", "vae_decoder", "load")
PEAK = "peak_memory"

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def narrowed_components(bundle: Bundle) -> set[str]:
    """The exported components of which blocks have become narrower, so that they are other graphs
    than those of their dense twin.
    """
    record = read_record(bundle.manifest.details)
    narrower = {m for m, r in record.items() if any(b.kept < b.width for b in r.blocks.values())}
    return {component for component, model in MODEL_OF.items() if model in narrower}


def kept_in_fp32(bundle: Bundle, components: Collection[str]) -> dict[str, list[str]]:
    """Of these components, the layers that are computed in fp32 to keep numbers in range."""
    kept = bundle.manifest.details.get("kept_fp32", {})
    return {component: layers for component, layers in kept.items() if component in components}


def make_measures(answers: Answers, timed: Sequence[str] = TIMED) -> dict[str, Measure]:
    """Compare the answers of "dense", "sparse" and "control", one answer a process in round order.

    An answer holds for each of `timed` its milliseconds, one number or a list, and
    `peak_anonymous_bytes`, which is left out of the figures where it is not known everywhere.
    """
    keys: dict[str, tuple[str, Any]] = {name: (name, "ms") for name in timed}
    if all(a.get("peak_anonymous_bytes", 0) > 0 for one in answers.values() for a in one):
        keys[PEAK] = ("peak_anonymous_bytes", "bytes")
    family = family_confidence(len(keys))
    measures = {}
    for name, (key, unit) in keys.items():
        series = {contestant: make_series(one, key) for contestant, one in answers.items()}
        dense, sparse, control = (series[c].rounds for c in ("dense", "sparse", "control"))
        against_itself = compare(dense, control, confidence=family)
        measures[name] = Measure(
            unit=unit,
            **series,
            sparse_to_dense=compare(dense, sparse, control=against_itself),
            control_to_dense=against_itself,
        )
    return measures


def make_series(answers: Sequence[Mapping[str, Any]], key: str) -> Series:
    """One figure of one contestant over all its processes."""
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


def make_control(measures: Mapping[str, Measure]) -> Control:
    """Whether the dense engine came out the same as itself in every figure."""
    differs = tuple(
        name for name, m in measures.items() if m.control_to_dense.verdict != "no difference"
    )
    return Control(
        trustworthy=not differs, differs=differs, confidence=family_confidence(len(measures))
    )
