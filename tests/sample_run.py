"""The directory of a finished run with made-up figures, for tests of the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdcompress.build_report import BuildReport, Component, Runtime
from sdcompress.bundle import Manifest, SourceRecord, seal
from sdcompress.evaluation.images import save
from sdcompress.measure import Comparison, compare, family_confidence
from sdcompress.plan import LayerPlan, SparsityPlan, account
from sdcompress.results import (
    Control,
    Engine,
    Environment,
    Measure,
    Results,
    Series,
    Setup,
    SparseKernels,
)
from sdcompress.structure import RECORD, BlockRecord, ComponentStructure

ROUNDS = (10.0, 10.1, 9.9, 10.2, 9.8, 10.0, 10.1, 9.9, 10.05, 9.95)
SHIFTED = (10.1, 9.9, 10.0, 9.9, 10.1, 9.9, 10.0, 10.0, 9.95, 10.05)
STAGES = ("picture", "text_encoder", "unet_step", "vae_decoder", "load", "peak_memory")


def sample_plan() -> SparsityPlan:
    layers = [
        LayerPlan(
            component="unet",
            name=f"down_blocks.{i}.attn.to_q.weight",
            kind="linear",
            shape=(64, 64 * (i + 1)),
            dtype="F16",
            rule=0,
            criterion="magnitude",
            pattern="unstructured",
            axis=1,
            asked=0.5,
            sparsity=0.5,
            zeros=64 * 32 * (i + 1),
        )
        for i in range(4)
    ]
    skipped = LayerPlan(
        component="unet",
        name="conv_in.weight",
        kind="conv",
        shape=(64, 4, 3, 3),
        dtype="F16",
        skipped_because="no rule matches",
    )
    return SparsityPlan(layers=(skipped, *layers), parameters={"unet": 50_000, "vae": 10_000})


def sample_structure(budget: Mapping[str, float] | None = None) -> ComponentStructure:
    """Of six blocks: half the neurons of one, a head of another, all but the last are narrower."""
    asked = None if budget else 0.25
    blocks = {
        "down_blocks.0.attentions.0.transformer_blocks.0.ff": ("neurons", 1, 256, 128),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1": ("heads", 16, 64, 48),
        "down_blocks.0.resnets.0": ("channels", 2, 64, 40),
        "mid_block.resnets.0": ("channels", 4, 128, 100),
        "up_blocks.0.attentions.0.transformer_blocks.0.ff": ("neurons", 1, 512, 500),
        "up_blocks.0.resnets.0": ("channels", 2, 64, 64),
    }
    return ComponentStructure(
        budget=dict(budget) if budget else None,
        parameters_dense=50_000,
        parameters=37_000,
        macs_dense=2_000_000,
        macs=1_400_000,
        latency=0.748 if budget and "latency" in budget else None,
        latency_table="0" * 64 if budget and "latency" in budget else None,
        blocks={
            name: BlockRecord.model_validate(
                {"kind": kind, "unit": unit, "width": width, "kept": kept, "asked": asked}
                | {"criterion": "magnitude", "removed": ""}
            )
            for name, (kind, unit, width, kept) in blocks.items()
        },
    )


def sample_results(
    sparse: Sequence[float] = SHIFTED, control: Sequence[float] = SHIFTED, model: str = "mini-sd2"
) -> Results:
    family = family_confidence(len(STAGES))

    def measure(name: str) -> Measure:
        against_itself = compare(ROUNDS, control, confidence=family)
        return Measure(
            unit="bytes" if name == "peak_memory" else "ms",
            dense=series(ROUNDS),
            sparse=series(sparse),
            control=series(control),
            sparse_to_dense=compare(ROUNDS, sparse, control=against_itself),
            control_to_dense=against_itself,
        )

    measures = {name: measure(name) for name in STAGES}
    differs = tuple(n for n, m in measures.items() if m.control_to_dense.verdict != "no difference")
    engine = Engine(
        digest="0" * 64,
        backend="onnxruntime",
        providers={"unet": "CPUExecutionProvider"},
        options={"provider": "cpu"},
        dtype="fp32",
        bytes=1_234_567,
        sparse_kernels=SparseKernels(used=0, of=4, how="zeros are multiplied like other numbers"),
    )
    return Results(
        model=model,
        recipe="demo",
        measures=measures,
        control=Control(trustworthy=not differs, differs=differs, confidence=family),
        engines={"dense": engine, "sparse": engine},
        setup=Setup(
            rounds=len(ROUNDS),
            iterations={"picture": 2},
            warm_up=2,
            steps=20,
            guidance=7.5,
            height=64,
            width=64,
            seed=0,
            prompt="a red circle",
            memory="peak anonymous memory",
            command="sdcompress bench engine/dense engine/sparse -o results.json",
        ),
        environment=Environment(
            machine="x86_64",
            processor="a processor",
            cores=2,
            memory_bytes=8_000_000_000,
            governor=None,
            load_before=0.1,
            system="Linux",
            python="3.11",
            versions={"onnxruntime": "1.31"},
        ),
        sparsity=account(sample_plan()),
    )


def build_report(limits: Mapping[str, Mapping[str, int | None]]) -> BuildReport:
    """Of a build that says nothing but with what its components were built in the end."""
    unknown = dict.fromkeys(
        ("layers_eligible", "layers_sparse", "log_generation", "tactics", "fused_attention",
         "context_bytes", "context_from", "peak_build_bytes", "flag_changed_plan",
         "workspace_mb", "optimization_level")
    )  # fmt: skip
    none = dict.fromkeys(("sparse_tactics", "ladder", "warnings", "missing"), ())
    known = {"plan_bytes": 1, "plan_sha256": "a", "seconds": 1.0}
    return BuildReport(
        backend="tensorrt",
        runtime=Runtime(module="tensorrt", version="10.3.0", os="Linux", machine="aarch64"),
        options={},
        components={
            name: Component.model_validate({**unknown, **none, **known, **one})
            for name, one in limits.items()
        },
    )


def series(rounds: Sequence[float]) -> Series:
    return Series(p50=10.0, p95=10.2, p99=10.3, iterations=20, rounds=tuple(rounds))


def comparison(ratio: float, low: float, high: float) -> Comparison:
    verdict = "no difference" if low <= 1 <= high else "lower" if ratio < 1 else "higher"
    return Comparison.model_validate(
        {"ratio": ratio, "low": low, "high": high, "confidence": 0.95, "verdict": verdict}
    )


def make_run(
    directory: Path,
    results: Results | None = None,
    prompts: Sequence[str] = ("a large red circle", "a small blue square"),
    structure: Mapping[str, ComponentStructure] | None = None,
) -> Path:
    """Write a run directory; pictures are noise, and the sparse ones a little noisier."""
    rng = np.random.default_rng(0)
    dense = rng.integers(0, 240, (len(prompts), 64, 64, 3)).astype(np.uint8)
    seeds = list(range(len(prompts)))
    for name, pixels in (("dense", dense), ("sparse", dense + np.uint8(3))):
        pictures = [Image.fromarray(p) for p in pixels]
        save(pictures, directory / "images" / name, prompts, seeds, steps=20, guidance=7.5)
    (directory / "pruned").mkdir()
    model = results.model if results else "mini-sd2"
    manifest = Manifest(
        stage="pruned",
        parent=None,
        source=SourceRecord(id=model, kind="directory", licence="apache-2.0"),
        recipe={"name": "demo"},
        tools={"sdcompress": "0.1.0"},
        plan=sample_plan(),
        details={RECORD: {c: r.model_dump(mode="json") for c, r in (structure or {}).items()}},
    )
    seal(directory / "pruned", manifest)
    (directory / "recipe.yaml").write_text("name: demo\n")
    checks = [{"name": "zeros", "passed": True, "detail": "4 tensors, every position"}]
    (directory / "verify.json").write_text(json.dumps({"checks": checks}))
    if results:
        (directory / "results.json").write_text(results.model_dump_json())
    return directory
