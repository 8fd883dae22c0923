"""How latencies are measured: what is timed at which widths, by hand-made clocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export import latency
from export.run import STAGES, WEIGHTS, Workspace, as_engines
from export.specs import Sizes
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_catalog, read_config
from sdcompress.errors import UsageError
from sdcompress.latency import LatencyTable, read_table
from sdcompress.recipe import Recipe
from sdcompress.structure import Block, find_blocks

UNET = {"batch": 2, "height": 8, "width": 8, "tokens": 77}


def kinds_of(model: Path, component: str, exported: str) -> list[latency._Kind]:
    config = read_config(model / component)
    blocks = find_blocks(component, read_catalog(model).shapes(component), config)
    return latency._kinds(exported, config, blocks, UNET)


def block(kind: Any, width: int, unit: int) -> Block:
    return Block("unet", "b", kind, width, width, unit, ())


@pytest.mark.parametrize(
    ("kind", "width", "unit", "widths"),
    [
        ("neurons", 5120, 1, [5120, 4480, 3840, 3200, 2560, 1920, 1280, 1]),
        ("heads", 320, 64, [320, 256, 192, 128, 64]),
        # Whole groups of ten in multiples of eight: forty at a time.
        ("channels", 320, 10, [320, 280, 240, 200, 160, 120, 80, 10]),
        ("heads", 32, 16, [32, 16]),
    ],
)
def test_widths_are_multiples_and_the_narrowest(
    kind: str, width: int, unit: int, widths: list[int]
) -> None:
    assert latency._Kind(block(kind, width, unit), nn.Identity(), (), {}).widths == widths


def test_blocks_that_are_alike_are_measured_once(tiny_sd: Path) -> None:
    kinds = kinds_of(tiny_sd, "unet", "unet")
    names = [name for kind in kinds for name in kind.names]
    config = read_config(tiny_sd / "unet")
    blocks = find_blocks("unet", read_catalog(tiny_sd).shapes("unet"), config)
    assert sorted(names) == sorted(b.name for b in blocks)
    assert len(kinds) < len(blocks)
    of = {name: kind for kind in kinds for name in kind.names}
    first = of["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert [t.shape for t in first.args] == [(2, 64, 32)]
    assert first.kwargs["encoder_hidden_states"].shape == (2, 77, 32)
    assert [tuple(t.shape) for t in first.inputs("fp32")] == [(2, 64, 32), (2, 77, 32)]
    assert of["up_blocks.1.resnets.0"] is not of["up_blocks.1.resnets.1"]  # other skips
    resnet = of["mid_block.resnets.1"]
    assert "mid_block.resnets.0" in resnet.names
    assert [tuple(t.shape) for t in resnet.inputs("fp16")] == [(2, 64, 4, 4), (2, 128)]


def test_a_part_is_the_block_at_its_width_and_always_the_same(tiny_sd: Path) -> None:
    for kind in kinds_of(tiny_sd, "unet", "unet"):
        narrowest = kind.part(kind.widths[-1], "fp32")
        out = narrowest(*kind.inputs("fp32"))
        assert out.shape[:2] == kind.part(kind.widths[0], "fp32")(*kind.inputs("fp32")).shape[:2]
        assert torch.equal(out, kind.part(kind.widths[-1], "fp32")(*kind.inputs("fp32")))
        block = kind.block
        assert block.consumer.removeprefix(block.name + ".") in dict(
            narrowest.block.named_parameters()
        )
        consumer = narrowest.block.get_parameter(block.consumer.removeprefix(block.name + "."))
        assert consumer.shape[1] == kind.widths[-1]
    assert {p.dtype for p in kind.part(kind.widths[0], "fp16").parameters()} == {torch.float16}


def test_an_encoder_takes_no_time_where_pictures_are_painted(tiny_sd: Path) -> None:
    names = {name for kind in kinds_of(tiny_sd, "vae", "vae_decoder") for name in kind.names}
    assert names
    assert all(name.startswith("decoder.") for name in names)


def clock(times: list[float], told: list[str], name: str) -> Callable[[], float]:
    def run() -> float:
        told.append(name)
        return times.pop(0) if len(times) > 1 else times[0]

    return run


def test_a_fast_whole_runs_before_each_block_and_leaves_its_caches() -> None:
    told: list[str] = []
    whole = clock([0.01], told, "W")
    narrow, wide = clock([0.001], told, "n"), clock([0.005, 0.004, 0.003, 0.002], told, "w")
    turns = latency._in_turn(whole, 0.01, [[wide, narrow]], rounds=1, budget=0.0)
    assert "".join(told[:4]) == "wwnn"  # how long each takes
    assert "".join(told[4:]) in ("wWnw" + "nWnn", "nWnn" + "wWnw")
    assert turns == [[(0.01, 0.002)], [(0.01, 0.001)]]


def test_a_slow_whole_runs_in_the_first_and_the_last_round() -> None:
    told: list[str] = []
    whole = clock([9.0, 8.0], told, "W")
    a, b = clock([1.0, 3.0, 2.0, 4.0], told, "a"), clock([4.0, 5.0], told, "b")
    turns = latency._in_turn(whole, 9.0, [[a], [b]], rounds=3, budget=1000.0)
    assert told[:2] == ["a", "b"]
    rounds = ["".join(told[2:5]), "".join(told[5:7]), "".join(told[7:])]
    assert [sorted(one) for one in rounds] == [["W", "a", "b"], ["a", "b"], ["W", "a", "b"]]
    assert rounds[0][0] == rounds[2][0] == "W"
    assert turns == [
        [(9.0, 3.0), (9.0, 2.0), (8.0, 4.0)],
        [(9.0, 5.0), (9.0, 5.0), (8.0, 5.0)],
    ]


def test_fast_components_get_more_rounds_but_not_without_end() -> None:
    run = clock([0.001], [], "x")
    (turns,) = latency._in_turn(run, 0.001, [[run]], rounds=2, budget=0.041)
    assert len(turns) == 10  # of four milliseconds each
    (turns,) = latency._in_turn(run, 0.001, [[run]], rounds=2, budget=10.0)
    assert len(turns) == latency.MOST_ROUNDS


def test_kinds_are_held_as_memory_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        latency._Kind(block("neurons", 64, 8), nn.Linear(100, 1, bias=False), (), {})
        for _ in range(5)
    ]
    widths = [64, 56, 48, 40, 32, 24, 16, 8]
    assert kinds[0].widths == widths
    each = 4 * 100 * sum(widths) / 64  # bytes
    monkeypatch.setattr(latency, "ROOM", 2.5 * each)
    assert [len(group) for group in latency._groups(kinds, "fp32")] == [2, 2, 1]
    assert [len(group) for group in latency._groups(kinds, "fp16")] == [5]
    monkeypatch.setattr(latency, "ROOM", 0)
    assert [len(group) for group in latency._groups(kinds, "fp32")] == [1] * 5


def test_what_runs_on_cuda_is_clocked_there(tiny_sd: Path) -> None:
    details = {"options": {"cuda_graph": False}}
    kind = kinds_of(tiny_sd, "unet", "unet")[0]
    with latency._torch_cuda(kind, "fp32", details, "unet", device="cpu") as runs:
        assert len(runs) == len(kind.widths)
        assert all(0 < one() < 1 for one in runs)  # no events on a CPU, so by the host's clock
    assert latency._seconds(lambda: None, lambda: 250.0) == 0.25


def test_backends_that_cannot_are_refused(tiny_source: Bundle) -> None:
    with pytest.raises(UsageError, match="tensorrt_rtx: builds a component as a whole") as caught:
        latency.measure_latency(tiny_source, "unet", backend="tensorrt_rtx")
    assert "macs" in str(caught.value)
    with pytest.raises(UsageError, match="no backend is called 'x'"):
        latency.measure_latency(tiny_source, "unet", backend="x")
    with pytest.raises(UsageError, match="onnxruntime option 'threads'"):
        latency.measure_latency(tiny_source, "unet", options={"threads": 0})


BUDGET = {"structure": {"budget": {"latency": 0.75}}}


def test_a_run_measures_what_its_budgets_need(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the same engines; other options measure again, a component that needs none goes."""
    from export.run import _tables

    asked: list[tuple[str, Any]] = []

    def measure(source: Bundle, component: str, **how: Any) -> LatencyTable:
        asked.append((component, how["options"]))
        return LatencyTable(
            component=component,
            machine="m",
            backend=how["backend"],
            options=how["options"],
            shapes={},
            rounds=1,
            total=float(len(asked)),
            blocks={},
        )

    monkeypatch.setattr(latency, "measure_latency", measure)

    def tables(components: tuple[str, ...], **options: int) -> dict[str, float]:
        recipe = Recipe.model_validate(
            {
                "name": "n",
                "prune": dict.fromkeys(components, BUDGET),
                "engine": {"options": options},
            }
        )
        with Workspace.open(tmp_path / "run") as place:
            quiet: Any = lambda *_: None  # noqa: E731
            found = _tables(place, tiny_source, recipe, quiet, quiet)
            assert {p.name for p in place.path.glob("latency-*")} == {
                f"latency-{c}.json" for c in components
            }
        return {component: table.total for component, table in found.items()}

    assert tables(("unet", "text_encoder")) == {"text_encoder": 1.0, "unet": 2.0}
    assert tables(("unet", "text_encoder")) == {"text_encoder": 1.0, "unet": 2.0}
    assert tables(("unet",)) == {"unet": 2.0}
    assert tables(("unet",), threads=1) == {"unet": 3.0}
    assert [component for component, _ in asked] == ["text_encoder", "unet", "unet"]
    assert read_table(tmp_path / "run" / "latency-unet.json").options == {"threads": 1}


def test_engines_and_their_latency_are_of_one_kind(tiny_source: Bundle) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "n",
            "prune": {"unet": BUDGET},
            "engine": {"backend": "torch_cuda", "options": {"sparse": "off"}},
            "sampling": {"guidance": 1.0, "height": 32},
        }
    )
    assert as_engines(recipe, tiny_source) == {
        "backend": "torch_cuda",
        "options": {"sparse": "off"},
        "sizes": Sizes(1, False, 32, None),
        "dtype": "fp16",
    }
    assert STAGES[:3] == WEIGHTS[:3] == ("latency/text_encoder", "latency/unet", "latency/vae")
