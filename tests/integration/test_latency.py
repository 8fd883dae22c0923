"""Latency tables measured for real, and what a budget makes of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export import latency
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_catalog, read_config
from sdcompress.commands import cli
from sdcompress.latency import read_table
from sdcompress.models import modules
from sdcompress.structure import find_blocks, read_record
from tests.narrowed import blocks_of

TEXT = {"batch": 2, "height": 8, "width": 8, "tokens": 77}


@pytest.fixture(scope="module")
def table(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("latency") / "text.json"
    arguments = ["latency", tiny_sd, "--component", "text_encoder", "--rounds", 2]
    done = CliRunner().invoke(cli, [*map(str, arguments), "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert "can become narrower" in done.output
    return file


def test_a_table_holds_every_block_at_all_its_widths(table: Path, tiny_sd: Path) -> None:
    found, blocks = read_table(table), blocks_of(tiny_sd)["text_encoder"]
    assert list(found.blocks) == [block.name for block in blocks]
    widths = {"neurons": [128, 112, 96, 80, 64, 48, 32, 1], "heads": [32, 24, 16, 8]}
    assert [list(found.blocks[block.name]) for block in blocks] == [
        widths[block.kind] for block in blocks
    ]
    assert (found.component, found.backend) == ("text_encoder", "onnxruntime")
    assert 2 <= found.rounds <= latency.MOST_ROUNDS
    assert found.shapes == {"input_ids": (2, 77)}
    assert found.options["provider"] == "auto"
    assert "cores" in found.machine
    assert all(0 < t < 1 for times in found.blocks.values() for t in times.values())
    mlp = next(block.name for block in blocks if block.kind == "neurons")
    assert found.seconds(mlp, 1) < found.seconds(mlp, 128) < found.total


def test_a_budget_of_latency_is_met_by_the_table(
    table: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    found = read_table(table)
    # What the machine measures is its own; the rest of this needs times one can rely on.
    by_hand = found.model_copy(
        update={
            "total": 100.0,
            "blocks": {
                name: {width: 20.0 * width / max(times) for width in times}
                for name, times in found.blocks.items()
            },
        }
    )
    steady = tmp_path / "steady.json"
    steady.write_text(by_hand.model_dump_json())
    recipe = tmp_path / "recipe.yaml"
    rules = [{"criterion": "magnitude", "multiple": 1}]
    structure = {"budget": {"latency": 0.7}, "table": str(steady), "rules": rules}
    prune = {"text_encoder": {"structure": structure}}
    recipe.write_text(json.dumps({"name": "fast", "prune": prune}))
    arguments = ["prune", tiny_sd, "--recipe", recipe, "-o", tmp_path / "out"]
    done = CliRunner().invoke(cli, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    record = read_record(Bundle.open(tmp_path / "out").manifest.details)["text_encoder"]
    left = 20 + sum(20 * block.kept / block.width for block in record.blocks.values())
    assert left <= 70
    assert left > 60  # no more goes than must
    assert record.latency == pytest.approx(left / 100)
    assert record.latency_table == by_hand.sha256
    narrow = modules.load(tmp_path / "out" / "text_encoder", "text_encoder")
    assert sum(p.numel() for p in narrow.parameters()) == record.parameters


@pytest.mark.parametrize(
    ("component", "exported", "kinds"),
    [("unet", "unet", {"neurons", "heads", "channels"}), ("text_encoder", "text_encoder", set())],
)
def test_what_is_timed_computes_what_the_block_does(
    tiny_sd: Path,
    monkeypatch: pytest.MonkeyPatch,
    component: str,
    exported: str,
    kinds: set[str],
) -> None:
    """Every session belongs to its own width, and takes the inputs in their order."""

    def result(run: Callable[[], dict[str, np.ndarray]], clock: object = None) -> np.ndarray:
        (output,) = run().values()
        return output

    monkeypatch.setattr(latency, "_seconds", result)
    config = read_config(tiny_sd / component)
    blocks = find_blocks(component, read_catalog(tiny_sd).shapes(component), config)
    found = latency._kinds(exported, config, blocks, TEXT)
    attn2 = next((k for k in found if "attn2" in k.block.name), None)
    several = [attn2] if attn2 else []
    for kind in kinds or {"neurons", "heads"}:
        several.append(next(k for k in found if k.block.kind == kind))
    details = {"options": {}, "providers": {exported: "CPUExecutionProvider"}}
    for kind in several:
        inputs = kind.inputs("fp32")
        with latency._onnxruntime(kind, "fp32", details, exported) as runs:
            outputs = [run() for run in runs]
        with torch.inference_mode():
            expected = [part(*inputs).numpy() for part in kind.parts("fp32")]
        for ours, theirs in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        assert not np.allclose(expected[0], expected[-1], atol=1e-2)
