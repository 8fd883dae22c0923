"""Narrower blocks on the command line: budgets, tables, what is told and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sdcompress
from sdcompress.bundle import Bundle, Manifest, SourceRecord, seal
from sdcompress.commands import cli
from sdcompress.commands._structure import with_budgets, with_tables
from sdcompress.errors import InputError, UsageError
from sdcompress.latency import LatencyTable
from sdcompress.recipe import Recipe
from sdcompress.structure import read_record
from tests.narrowed import blocks_of, narrow_bundle, thinned

FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
WEIGHTS: dict[str, Any] = {"rules": [{"scope": "linear", "pattern": "2:4"}]}
HALF: dict[str, Any] = {"structure": {"rules": [{"ratio": 0.5}]}}


def recipe(prune: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.model_validate({"name": "blocks", "prune": prune, **more})


def write(tmp_path: Path, prune: dict[str, Any], **more: Any) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "blocks", "prune": prune, **more}))
    return file


def run(*arguments: object) -> None:
    cli.main([str(a) for a in arguments], standalone_mode=False)


def make_table(model: Path, component: str = "unet", **more: Any) -> LatencyTable:
    """Each block takes as many seconds as it has channels, all other things together 100."""
    blocks = {
        b.name: {b.unit: float(b.unit), b.width: float(b.width)}
        for b in blocks_of(model)[component]
    }
    total = 100.0 + sum(max(times.values()) for times in blocks.values())
    given: dict[str, Any] = {
        "component": component,
        "machine": "one",
        "backend": "onnxruntime",
        "options": {},
        "shapes": {},
        "rounds": 1,
        "total": total,
        "blocks": blocks,
        **more,
    }
    return LatencyTable(**given)


def structures(made: Recipe) -> dict[str, Any]:
    return {
        component: section.structure.model_dump(exclude_defaults=True)
        for component, section in made.prune.items()
        if section.structure
    }


@pytest.mark.parametrize(
    ("prune", "budgets", "expected"),
    [
        ({"unet": WEIGHTS}, ["macs=0.7"], {"unet": {"budget": {"macs": 0.7}}}),
        # The component that the recipe makes narrower, and not the UNet.
        ({"text_encoder": HALF}, ["params=.5"], {"text_encoder": {"budget": {"params": 0.5}}}),
        (
            {"text_encoder": HALF, "unet": HALF},
            ["latency=0.75"],
            {c: {"budget": {"latency": 0.75}} for c in ("text_encoder", "unet")},
        ),
        (
            {"text_encoder": HALF},
            ["unet:macs=0.7", "text_encoder:params=0.8"],
            {
                "text_encoder": {"budget": {"params": 0.8}},
                "unet": {"budget": {"macs": 0.7}},
            },
        ),
        # Rules stay, but for their ratios; a table stays where latency is what counts.
        (
            {
                "unet": {
                    "structure": {
                        "budget": {"latency": 0.9},
                        "table": "a.json",
                        "rules": [{"kind": "heads", "multiple": 16}],
                    }
                }
            },
            ["latency=0.8"],
            {
                "unet": {
                    "budget": {"latency": 0.8},
                    "table": "a.json",
                    "rules": ({"kind": "heads", "multiple": 16},),
                }
            },
        ),
        (
            {"unet": {"structure": {"budget": {"latency": 0.9}, "table": "a.json"}}},
            ["macs=0.8"],
            {"unet": {"budget": {"macs": 0.8}}},
        ),
        ({"unet": HALF}, [], {"unet": {"rules": ({"ratio": 0.5},)}}),
    ],
)
def test_budgets(prune: dict[str, Any], budgets: list[str], expected: dict[str, Any]) -> None:
    made = with_budgets(recipe(prune), budgets)
    found = structures(made)
    for structure in found.values():
        if structure.get("rules") in (({},), ()):
            del structure["rules"]
    assert found == expected
    Recipe.model_validate(made.model_dump(mode="json"))
    assert made.prune.keys() >= prune.keys()
    if "rules" in prune.get("unet", {}):
        assert made.prune["unet"].rules == recipe(prune).prune["unet"].rules


FORM = r"expected \[COMPONENT:\]macs\|params\|latency=SHARE, such as macs=0.7"


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("nonsense", FORM),
        ("macs", FORM),
        ("macs = 0.7", FORM),
        ("", FORM),
        ("macs=", "macs: expected a number, found ''"),
        ("macs=70%", "macs: expected a number, found '70%'"),
        ("macs=2", "macs: expected less than 1, found '2'"),
        ("macs=0", "macs: expected more than 0, found '0'"),
        ("macs=nan", "macs: expected a finite number, found 'nan'"),
        ("flops=0.7", "expected one of macs, params, latency, found 'flops'"),
        ("unet2:macs=0.7", "expected a component among text_encoder, unet, vae, found 'unet2'"),
        (":macs=0.7", "expected a component among text_encoder, unet, vae, found ''"),
        ("params=0.5", "unet has one already, macs=0.7; give one"),
    ],
)
def test_what_is_no_budget(budget: str, line: str) -> None:
    before = ["macs=0.7"] if "already" in line else []
    with pytest.raises(UsageError, match=f"^--budget {budget}: {line}"):
        with_budgets(recipe({"unet": WEIGHTS}), [*before, budget])


@pytest.mark.parametrize(
    ("prune", "tables", "line"),
    [
        ({"unet": HALF}, ["unet"], "is of unet, which has no budget of latency; add --budget unet"),
        ({"text_encoder": HALF}, ["unet"], "which has no budget of latency"),
        ({"unet": {"structure": {"budget": {"macs": 0.7}}}}, ["unet"], "has no budget of latency"),
        ({"unet": {"structure": {"budget": {"latency": 0.7}}}}, ["unet", "unet"], "as is another"),
        ({"unet": {"structure": {"budget": {"latency": 0.7}}}}, ["no table"], "expected a latency"),
        ({"unet": {"structure": {"budget": {"latency": 0.7}}}}, ["nowhere"], "No such file"),
    ],
)
def test_tables_that_nothing_asks_for(
    prune: dict[str, Any], tables: list[str], line: str, tiny_sd: Path, tmp_path: Path
) -> None:
    (tmp_path / "unet").write_text(make_table(tiny_sd).model_dump_json())
    (tmp_path / "no table").write_text('{"name": "recipe"}')
    with pytest.raises(UsageError, match=line):
        with_tables(recipe(prune), [str(tmp_path / table) for table in tables])


def test_a_table_comes_before_the_recipes_own(tiny_sd: Path, tmp_path: Path) -> None:
    file, table = tmp_path / "unet.json", make_table(tiny_sd)
    file.write_text(table.model_dump_json())
    latency = {"structure": {"budget": {"latency": 0.7}, "table": "elsewhere.json"}}
    made, tables = with_tables(recipe({"unet": latency}), [str(file)])
    assert tables == {"unet": table}
    assert made.prune["unet"].structure
    assert made.prune["unet"].structure.table is None


def test_what_is_pruned_within_a_budget(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = write(tmp_path, {"unet": WEIGHTS})
    run("prune", tiny_sd, "--recipe", file, "--budget", "macs=0.7", "-o", out, "--json")
    told = json.loads(capsys.readouterr().out)
    found = told["structure"]["unet"]
    assert found["budget"] == {"macs": 0.7}
    assert 0.68 < found["macs"] / found["macs_dense"] <= 0.7
    unet = told["accounting"]["components"]["unet"]
    assert unet["parameters"] == found["parameters"]
    assert unet["removed"] == found["parameters_dense"] - found["parameters"] > 0
    assert unet["of_layers_pruned"] == 0.5
    assert read_record(Bundle.open(out).manifest.details)["unet"].macs == found["macs"]
    run("prune", out, "--recipe", file, "-o", tmp_path / "again")
    said = capsys.readouterr().out
    assert "sparsity of what is left" in said
    assert "macs 0.7" in said
    assert f"{unet['removed']:,}" in said


def test_latencies_are_measured_once(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export.latency

    asked: list[Any] = []

    def measure(source: Bundle, component: str, **how: Any) -> LatencyTable:
        asked.append((component, how["dtype"], how["backend"], how["sizes"].guided))
        how["progress"]("measuring blocks", 1, 1)
        return make_table(source.path, component)

    monkeypatch.setattr(export.latency, "measure_latency", measure)
    monkeypatch.setenv("SDCOMPRESS_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path, {"unet": HALF}, export={"dtype": "fp32"}, sampling={"guidance": 0})
    budget = ("--budget", "latency=0.8")
    for name, more in (("one", ()), ("two", ()), ("three", ["--fresh"])):
        run("prune", tiny_sd, "--recipe", file, *budget, "-o", tmp_path / name, *more)
    assert asked == [("unet", "fp32", "onnxruntime", False)] * 2
    record = read_record(Bundle.open(tmp_path / "two").manifest.details)["unet"]
    assert record.latency is not None
    assert 0.7 < record.latency <= 0.8
    assert record.latency_table == make_table(tiny_sd).sha256
    given = tmp_path / "table.json"
    given.write_text(make_table(tiny_sd, machine="another").model_dump_json())
    run("prune", tiny_sd, "--recipe", file, *budget, "--table", given, "-o", tmp_path / "four")
    assert len(asked) == 2
    record = read_record(Bundle.open(tmp_path / "four").manifest.details)["unet"]
    assert record.latency_table == make_table(tiny_sd, machine="another").sha256


def planned(tiny_sd: Path, file: Path, *more: object, capsys: pytest.CaptureFixture[str]) -> Any:
    run("plan", file, "--model", tiny_sd, "--json", *more)
    return json.loads(capsys.readouterr().out)


def test_plan_shows_what_is_asked_and_what_that_comes_to(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [
        {"ratio": 0.3, "multiple": 8, "refit": True},
        {"blocks": "mid_block.*", "keep": "dense", "reason": "the middle"},
        {"blocks": "*.attn1", "ratio": 0.2, "multiple": 32},
    ]
    file = write(tmp_path, {"unet": {"structure": {"rules": rules}, **WEIGHTS}})
    made = planned(tiny_sd, file, capsys=capsys)
    blocks = {block["name"]: block for block in made["structure"]["unet"]["blocks"]}
    assert blocks[FF] == {
        "name": FF,
        "kind": "neurons",
        "unit": 1,
        "width": 128,
        "multiple": 8,
        "criterion": "magnitude",
        "refit": True,
        "asked": 0.3,
        "kept": 88,  # 89.6, and the nearest multiple of 8
        "skipped_because": None,
    }
    assert blocks[ATTENTION]["skipped_because"] == "no narrower width is a multiple of 32"
    assert blocks["mid_block.resnets.0"]["kept"] == 64
    assert "the middle" in blocks["mid_block.resnets.0"]["skipped_because"]
    layers = {p["name"]: p for p in made["plan"]["layers"]}
    assert layers[f"{FF}.net.2.weight"]["shape"] == [32, 88]
    found = made["structure"]["unet"]
    assert found["parameters"] == made["accounting"]["components"]["unet"]["parameters"]
    assert found["macs"] < found["macs_dense"]
    # What is foreseen is what comes.
    run("prune", tiny_sd, "--recipe", file, "-o", tmp_path / "out", "--calibration-count", 1)
    record = read_record(Bundle.open(tmp_path / "out").manifest.details)["unet"]
    assert {n: b.kept for n, b in record.blocks.items()} == {
        n: b["kept"] for n, b in blocks.items()
    }
    assert (record.macs, record.parameters) == (found["macs"], found["parameters"])
    capsys.readouterr()
    run("plan", file, "--model", tiny_sd)
    said = capsys.readouterr().out
    assert "88 (31.2% go)" in said
    assert "magnitude, refit" in said
    assert f"{found['macs_dense']:,} → {found['macs']:,}" in said


def test_plan_says_how_far_a_budget_could_go(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, {"unet": WEIGHTS})
    made = planned(tiny_sd, file, "--budget", "macs=0.7", capsys=capsys)["structure"]["unet"]
    assert (made["budget"], made["macs"], made["parameters"]) == ({"macs": 0.7}, None, None)
    assert {block["kept"] for block in made["blocks"]} == {None}
    closest = made["closest"]
    assert 0.2 < closest < 0.5
    below = f"macs={closest - 0.01:.4f}"
    with pytest.raises(UsageError, match=f"cannot be met: .* {closest:.2f}.* of it is left"):
        run("plan", file, "--model", tiny_sd, "--budget", below)
    table = tmp_path / "table.json"
    table.write_text(make_table(tiny_sd).model_dump_json())
    latency = ("--budget", "latency=0.7")
    made = planned(tiny_sd, file, *latency, "--table", table, capsys=capsys)["structure"]["unet"]
    assert made["closest"] < 0.7
    run("plan", file, "--model", tiny_sd, *latency)
    said = capsys.readouterr().out
    assert "a budget of 70.0% of its latency; how far that could go, a --table tells" in said
    assert "by budget, in steps of 16" in said  # of heads
    assert "unet: shapes before its budget is spent" in said


def structure(**given: Any) -> dict[str, Any]:
    return {"unet": {"structure": given}}


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "nothing left": (structure(rules=[{"ratio": 0.9}]), [], "leaves nothing of .*2 heads"),
    "out of reach": (structure(budget={"macs": 0.05}), [], "cannot be met: .* is left; ask"),
    "no score": (structure(rules=[{"ratio": 0.5, "criterion": "sparsegpt"}]), [], "no score"),
    "no such criterion": (structure(rules=[{"ratio": 0.5, "criterion": "x"}]), [], "found 'x'"),
    "no such kind": (structure(rules=[{"ratio": 0.5, "kind": "filters"}]), [], "found 'filters'"),
    "no such block": (structure(rules=[{"ratio": 0.5, "blocks": "*.x"}]), [], "matches none of"),
    "no such width": (structure(rules=[{"ratio": 0.5, "multiple": 256}]), [], "lower 'multiple'"),
    "ratio and budget": (structure(budget={"macs": 0.7}, **HALF["structure"]), [], "leave out 'ra"),
    "neither": (structure(), [], "expected a 'ratio' in every rule, or one 'budget'"),
    "two budgets": (structure(budget={"macs": 0.7, "params": 0.7}), [], "found macs, params"),
    "a ratio of all": (structure(rules=[{"ratio": 1.0}]), [], "expected less than 1, found 1.0"),
    "no reason": (structure(rules=[{"keep": "dense"}]), [], "needs a 'reason'"),
    "a table for macs": (structure(budget={"macs": 0.7}, table="t"), [], "'table' belongs to"),
    "no such table": (structure(budget={"latency": 0.7}, table="nowhere"), [], "No such file"),
    "only rounds": (structure(budget={"macs": 0.7}), ["--rounds", "2"], "prune single weights"),
    "prompts": (structure(budget={"macs": 0.7}), ["--calibration-count", "2"], "looks at"),
    "obs": ({"unet": {"rules": [{"criterion": "obs", "sparsity": 0.5}]}}, [], "use obs_refit"),
    "nonsense": ({"unet": WEIGHTS}, ["--budget", "much"], "expected .COMPONENT"),
    "no latency": ({"unet": WEIGHTS}, ["--table", "t"], "expected a latency table, found No such"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_is_written(
    case: str, tiny_sd: Path, tmp_path: Path
) -> None:
    prune, options, line = REFUSED[case]
    file = write(tmp_path, prune)
    with pytest.raises(UsageError, match=line) as refused:
        run("prune", tiny_sd, "--recipe", file, "-o", tmp_path / "out", *options)
    assert "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_tables_of_others_and_backends_that_cannot_be_timed(tiny_sd: Path, tmp_path: Path) -> None:
    file, table, out = write(tmp_path, {"unet": WEIGHTS}), tmp_path / "table.json", tmp_path / "out"
    blocks = {f"x.{name}": times for name, times in make_table(tiny_sd).blocks.items()}
    table.write_text(make_table(tiny_sd, blocks=blocks).model_dump_json())
    asked = ["prune", tiny_sd, "--recipe", file, "--budget", "latency=0.7", "-o", out]
    with pytest.raises(UsageError, match="no such block; measure one of this model"):
        run(*asked, "--table", table)
    table.write_text(make_table(tiny_sd).model_dump_json())
    with pytest.raises(UsageError, match="cannot be met"):
        run(*asked[:-3], "latency=0.1", "-o", out, "--table", table)
    write(tmp_path, {"unet": WEIGHTS}, engine={"backend": "tensorrt_rtx"})
    with pytest.raises(UsageError, match="cannot time its blocks"):
        run(*asked)
    assert not out.exists()


@pytest.fixture(scope="module")
def narrow(tiny_sd: Path, tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("narrow") / "bundle"
    return narrow_bundle(tiny_source, out, thinned(tiny_sd, "unet", "text_encoder"))


def test_what_is_narrow_already(narrow: Bundle, tmp_path: Path) -> None:
    file = write(tmp_path, {"unet": WEIGHTS})
    for arguments in (
        ["prune", narrow.path, "--recipe", file, "--budget", "macs=0.7", "-o", tmp_path / "out"],
        ["plan", file, "--model", narrow.path, "--budget", "macs=0.7"],
    ):
        with pytest.raises(UsageError, match="found 20 that were made narrower before; structure"):
            run(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_narrower_bundle_is_a_pipeline(narrow: Bundle) -> None:
    pipeline = sdcompress.load(narrow.path, dtype="bf16")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert narrow.manifest.plan
    count = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    assert count == narrow.manifest.plan.parameters["unet"]
    assert str(pipeline.unet.dtype) == "torch.bfloat16"


def test_what_cannot_be_loaded(narrow: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype: expected one of fp32, fp16, bf16, found 'int8'"):
        sdcompress.load(str(narrow.path), dtype="int8")
    with pytest.raises(InputError, match="no such file or directory"):
        sdcompress.load(tmp_path / "nowhere")
    source = SourceRecord(id="a", kind="directory")
    seal(tmp_path, Manifest(stage="onnx", parent=None, source=source, tools={}))
    with pytest.raises(InputError, match="found onnx; give the bundle it was made from"):
        sdcompress.load(tmp_path)


def test_the_package_itself_is_light() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'diffusers'}"
    code = f"import sys, sdcompress; print(sdcompress.load.__name__, {heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "load set()\n"
