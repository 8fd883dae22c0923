"""What benchmarks/full_size does apart from measuring at full size."""

from __future__ import annotations

import csv
import io
import json
import math
import mmap
import resource
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.full_size import cold, make_model, measure, peers, report, scale
from benchmarks.full_size.contestants import (
    COLD,
    CP,
    HASHLIB,
    KNOWN,
    PRUNED,
    SHA256SUM,
    Contestant,
    Limit,
    Settings,
    contestants,
)
from sdcompress.catalog import read_catalog
from sdcompress.models.checks import check_sd2_like
from sdcompress.models.sd2 import tensor_shapes
from sdcompress.plan import make_plan
from sdcompress.recipe import load_recipe
from tests import tiny_sd

RECIPES = measure.HERE / "recipes"


# The model.


def configs() -> dict[str, dict[str, Any]]:
    made = make_model.sized_configs("10M")
    made["unet"] |= {**tiny_sd.UNET, "_class_name": "UNet2DConditionModel"}
    made["text_encoder"] |= {**tiny_sd.TEXT_ENCODER, "vocab_size": 100}
    made["vae"] |= {**tiny_sd.VAE, "_class_name": "AutoencoderKL"}
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same tiny model in one file a component, and in three."""
    made = {shards: tmp_path_factory.mktemp(f"model-{shards}") for shards in (1, 3)}
    for shards, path in made.items():
        make_model.write_model(path, configs(), torch.float16, shards=shards)
    return made


def test_shards_hold_the_same_tensors(models: dict[int, Path]) -> None:
    for component in ("unet", "text_encoder"):
        (whole,) = models[1].glob(f"{component}/*.safetensors")
        shards = sorted(models[3].glob(f"{component}/*.safetensors"))
        assert [file.name.rpartition("-0000")[2] for file in shards] == ["3.safetensors"] * 3
        tensors = load_file(whole)
        found = {name: t for file in shards for name, t in load_file(file).items()}
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        (index,) = models[3].glob(f"{component}/*.safetensors.index.json")
        assert index.name == f"{whole.name}.index.json"
        assert json.loads(index.read_text())["metadata"] == {
            "total_size": sum(t.nbytes for t in tensors.values())
        }
    check_sd2_like(models[3])
    assert len(list(models[3].glob("vae/*.safetensors"))) == 1


def test_diffusers_loads_the_shards(models: dict[int, Path]) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    for loader, component in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        one, three = (
            loader.from_pretrained(models[shards] / component).state_dict() for shards in (1, 3)
        )
        assert one.keys() == three.keys()
        assert all(torch.equal(one[name], three[name]) for name in one)


def test_values_depend_on_name_and_seed_alone() -> None:
    first = make_model.draw("unet.conv1.weight", (64, 8, 3, 3), seed=0)
    assert torch.equal(first, make_model.draw("unet.conv1.weight", (64, 8, 3, 3), seed=0))
    assert not torch.equal(first, make_model.draw("unet.conv1.weight", (64, 8, 3, 3), seed=1))
    assert not torch.equal(first, make_model.draw("unet.conv2.weight", (64, 8, 3, 3), seed=0))


def test_scales_and_tails() -> None:
    shape, spread = (2000, 500), make_model.ROW_SPREAD
    drawn = make_model.draw("mid_block.resnets.0.conv1.weight", shape, seed=0)
    rows = drawn.std(1)
    assert rows.log().std().item() == pytest.approx(math.hypot(spread, 0.03), abs=0.01)
    assert rows.median().item() * math.sqrt(500) == pytest.approx(1.85, rel=0.35)  # its layer's
    kurtosis = ((drawn / rows[:, None]) ** 4).mean().item()
    assert kurtosis == pytest.approx(3.85, abs=0.15)
    norm = make_model.draw("norm1.weight", (10_000,), seed=0)
    assert (norm.mean().item(), norm.std().item()) == pytest.approx((0.95, 0.06), abs=0.003)


def test_cuts_are_even_and_none_is_empty() -> None:
    shapes = {f"t{i}": (10,) for i in range(10)}
    assert [len(part) for part in make_model.cut(shapes, 4)] == [3, 2, 3, 2]
    assert make_model.cut({"one": (5,)}, 4) == [{"one": (5,)}]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("10M", 9_568_516),
        ("30M", 28_254_532),
        ("100M", 104_396_292),
        ("300M", 301_127_940),
        ("1G", 1_008_153_540),
        ("2G", 2_030_534_084),
    ],
)
def test_sizes(size: str, expected: int) -> None:
    made = make_model.sized_configs(size)
    assert made["unet"]["cross_attention_dim"] == made["text_encoder"]["hidden_size"]
    shapes = [tensor_shapes(c, made[c]) for c in ("unet", "text_encoder")]
    found = sum(math.prod(shape) for part in shapes for shape in part.values())
    assert found == pytest.approx(expected, abs=1000)


def test_the_real_size_is_checked() -> None:
    make_model.check_published(dict(make_model.PARAMETERS))
    with pytest.raises(SystemExit, match="unet: expected 865910724, found 1"):
        make_model.check_published({**make_model.PARAMETERS, "unet": 1})


# One process.


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_a_cold_process(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(3_000_000))
    code = (
        "import os, time; text = open(os.environ['WHERE'], 'rb').read(); held = bytearray(50 << 20)"
        "; open(os.environ['WHERE'] + '2', 'wb').write(text[:2000000])"
        "; time.sleep(0.4); print('more'); print('{\"tensors\": 3}')"
    )
    found = cold.run_cold(python(code), environment={"WHERE": str(file)})
    assert found["outcome"] == cold.OK
    assert found["said"] == {"tensors": 3}
    assert found["seconds"] >= 0.4
    assert 0 < found["cpu_seconds"] < found["seconds"]
    assert found["peak_bytes"] > 50 << 20
    assert 3_000_000 <= found["read_bytes"] < 4_000_000
    assert 2_000_000 <= found["written_bytes"] < 2_001_000


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise MemoryError", "out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory"),
        ("import sys; sys.exit('no such file')", "failed: no such file"),
        ("import time; time.sleep(60)", "stopped after 0.5 s"),
        ('print(\'{"outcome": "stopped after 3 s"}\')', "stopped after 3 s"),
    ],
)
def test_outcomes(code: str, expected: str) -> None:
    timeout = 0.5 if "sleep" in code else None
    assert cold.run_cold(python(code), timeout=timeout)["outcome"] == expected


# What is measured.


def test_contestants(tiny_sd: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    found = {c.name: c for c in contestants(tiny_sd, tmp_path, Settings(modelopt=site))}
    assert found["modelopt, 2:4"].environment["PYTHONPATH"] == str(site)
    assert "PYTHONPATH" not in found["kthvalue by layer"].environment
    assert found[PRUNED].asked == Limit(CP, 4, 1e9)
    for one in found.values():
        assert one.asked is None or one.asked.of in found
        assert not (one.peer and one.kept)
        for path in one.reads:  # is there, or somebody makes it and leaves it
            assert path.exists() or any(c.kept and path in c.makes for c in found.values())
    assert found[KNOWN].command == found[COLD].command
    assert set(found[COLD].makes) - set(found[KNOWN].makes) == {tmp_path / "cache"}


@pytest.mark.parametrize("recipe", ["uniform", "global", "two_four"])
def test_recipes_prune_every_linear_and_conv_by_half(recipe: str, tiny_sd: Path) -> None:
    catalog = read_catalog(tiny_sd)
    plan = make_plan(load_recipe(str(RECIPES / f"{recipe}.yaml")), catalog)
    wanted = {
        (layer.component, layer.name)
        for layer in catalog.layers
        if layer.component != "vae" and layer.kind in ("linear", "conv")
    }
    pruned = {(p.component, p.name): p for p in plan.layers if p.sparsity}
    assert set(pruned) == wanted
    assert {p.asked or p.sparsity for p in pruned.values()} == {0.5}


def test_the_recipe_of_narrower_blocks() -> None:
    recipe = load_recipe(str(RECIPES / "structure.yaml"))
    assert recipe.prune["unet"].structure
    assert recipe.prune["unet"].structure.budget
    assert recipe.prune["unet"].structure.budget.macs == 0.8
    assert {file.stem for file in RECIPES.iterdir()} == {
        *("uniform", "global", "two_four", "structure"),
    }


# Going on, and the report.


def stand_ins(work: Path) -> list[Contestant]:
    """`made` leaves a folder that `reader` needs; each says in a file that it ran."""
    log = f"open(r'{work}/log', 'a').write"

    def one(name: str, code: str = "pass", **more: Any) -> Contestant:
        return Contestant(
            name, "base", tuple(python(f"import os; {log}('{name} '); {code}")), **more
        )

    made = work / "made"
    return [
        one(CP),
        one("maker", f"os.mkdir(r'{made}')", makes=(made,), kept=True),
        one("reader", f"os.listdir(r'{made}')", reads=(made,), asked=Limit(CP, 1000)),
        one("passing", f"open(r'{work}/gone', 'x')", makes=(work / "gone",), slow=True),
        one("peer", "raise MemoryError", peer=True, slow=True),
    ]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sd: Path) -> list[str]:
    """Arguments of measure.py, whose contestants are stand-ins."""
    monkeypatch.setattr(measure, "contestants", lambda model, work, settings: stand_ins(work))
    monkeypatch.setattr(measure, "busy_cores", lambda seconds: 0.0)
    monkeypatch.setattr(measure, "claim", int)
    return [str(tiny_sd), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]


def test_a_run_goes_on_where_it_was(stand_in: list[str], tmp_path: Path) -> None:
    work = tmp_path / "w"
    assert measure.main([*stand_in, "--rounds", "1"]) == 0
    # What writes is first, what is slow last.
    assert (work / "log").read_text() == "maker cp reader passing peer "
    assert not (work / "gone").exists()
    # As a killed run leaves it: an answer short, and outputs that are not complete.
    (work / "gone").touch()
    (work / "answers" / "reader" / "00.json").unlink()
    (work / ".made.complete").unlink()
    (work / "log").unlink()
    measure.main([*stand_in, "--rounds", "1"])
    assert (work / "log").read_text() == "maker reader "
    (work / "log").unlink()
    (work / "answers" / "passing" / "00.json").unlink()
    measure.main([*stand_in, "--rounds", "1"])
    assert (work / "log").read_text() == "passing "
    (work / "log").unlink()
    measure.main([*stand_in, "--rounds", "2", "--no-peers"])
    assert (work / "log").read_text() == "maker cp reader "  # the slow one has its one round
    measure.main([*stand_in, "--rounds", "3", "--report"])
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [(r["command"], r["rounds"]) for r in results["commands"]] == [
        *(("cp", 2), ("maker", 2), ("reader", 2), ("passing", 1), ("peer", 1)),
    ]
    (work / "protocol.json").write_text("{}")
    with pytest.raises(SystemExit, match="another model or version"):
        measure.main([*stand_in])


def test_memory_is_claimed_but_for_what_is_to_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=3000 * mmap.PAGESIZE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert cold.claim(4000 * mmap.PAGESIZE) == mmap.PAGESIZE
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert cold.claim(1000 * mmap.PAGESIZE) == 2000 * mmap.PAGESIZE
    touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert touched >= 2000 // 16  # a fault may bring several pages


def test_one_of_ours_that_fails_ends_the_run(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Contestant("broken", "base", tuple(python("raise SystemExit('no')")))
    monkeypatch.setattr(measure, "contestants", lambda model, work, settings: [broken])
    with pytest.raises(SystemExit, match="broken: failed: no"):
        measure.main([*stand_in])
    assert not list((tmp_path / "w" / "answers").glob("*/*"))


def answer(seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "outcome": "ok", "seconds": seconds, "cpu_seconds": 2 * seconds, "peak_bytes": 500_000_000,
        "read_bytes": 2_400_000_000, "written_bytes": 1_000_000, "said": {"bundle": "/here"},
        "busy_cores": 0.1, **more,
    }  # fmt: skip


def test_the_table(tmp_path: Path) -> None:
    everything = stand_ins(tmp_path)
    everything[1] = replace(everything[1], asked=Limit(CP, 4, 1e9))
    everything[2] = replace(everything[2], asked=Limit("maker", 1, 1e8))
    answers = {
        CP: [answer(2.0), answer(1.0), answer(4.0)],
        "maker": [answer(8.0)],
        "reader": [answer(6.0)],
        "peer": [answer(90.0, outcome="stopped after 90 s", said={"done": 5, "tensors": 7})],
    }
    rows = report.make_rows(answers, everything)
    by_name = {row["command"]: row for row in rows}
    assert (by_name[CP]["seconds"], by_name[CP]["lowest"], by_name[CP]["highest"]) == (2, 1, 4)
    assert (by_name["maker"]["ratio"], by_name["maker"]["reached"]) == (4, True)
    assert (by_name["reader"]["ratio"], by_name["reader"]["reached"]) == (0.75, False)  # memory
    assert by_name["peer"]["times_cp"] is None
    assert "/here" not in json.dumps(rows)
    table = report.as_table(rows, everything)
    assert table[3] == "| cp | 2.00 [1.00, 4.00] | 4.0 | 1.00 | 500 | 2400 | 1 | 3 |  |"
    assert "≤ 4 × cp, 1 GB: 4.00, reached" in table[4]
    assert "≤ 1 × maker, 0.1 GB: 0.75, **not reached**" in table[5]
    assert table[6].startswith("| *peer* | stopped after 90 s: 5 of 7 tensors | ")
    read = list(csv.DictReader(io.StringIO(report.as_csv(rows))))
    assert [row["command"] for row in read] == [CP, "maker", "reader", "peer"]


def test_a_digest_is_compared_with_both() -> None:
    verify = Contestant("verify", "verify", (), asked=Limit(SHA256SUM, 2))
    answers = {SHA256SUM: [answer(10.0)], HASHLIB: [answer(2.0)], "verify": [answer(5.0)]}
    everything = [Contestant(name, "base", ()) for name in (SHA256SUM, HASHLIB)] + [verify]
    table = report.as_table(report.make_rows(answers, everything), everything)
    assert table[-1].endswith("| ≤ 2 × sha256sum: 0.50, reached; 2.50 × hashlib, one thread |")


def test_what_polygraphy_prints() -> None:
    lines = [
        "[I] Found: 3 weight tensor(s) eligible for pruning.",
        "[I] Found sparse tensor: val_1",
        "[W] Found non-sparse tensor: conv.weight",
    ]
    assert peers.read_polygraphy(lines) == {
        "tensors": 3, "done": 2, "names": ["val_1", "conv.weight"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["m", "--work", "w", "--rounds", "0"], "at least 1"),
        (["m", "--work", "w", "--part", "half"], "invalid choice"),
        (["m"], "--work"),
    ],
)
def test_wrong_arguments(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        measure.arguments(argv)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


# Scale.


def test_a_straight_line_and_its_worst_residual() -> None:
    line = scale.straight([1, 2, 4, 8], [3 + 2 * x for x in (1, 2, 4, 8)])
    assert line == pytest.approx((3, 2, 0), abs=1e-9)
    bent = scale.straight([1, 2, 4, 8], [x**2 for x in (1, 2, 4, 8)])
    assert bent.worst > 0.3


def test_rows_lines_and_plot(tmp_path: Path) -> None:
    for size, count in (("10M", 10e6), ("100M", 100e6), ("1G", 1e9)):
        outputs = scale.place_of(tmp_path, size, 1) / "outputs"
        for step in scale.STEPS:
            folder = outputs / "answers" / step
            folder.mkdir(parents=True)
            one = answer(1 + count / 1e9 * 5, peak_bytes=2e8 + count / 5)
            (folder / "00.json").write_text(json.dumps(one))
        counts = {"unet": count - 1e6, "text_encoder": 1e6, "vae": 5}
        (outputs / "protocol.json").write_text(json.dumps({"parameters": counts}))
    out = tmp_path / "out"
    scale.main(["--work", str(tmp_path), "--out", str(out), "--report"])
    found = json.loads((out / "scale.json").read_text())["lines"][PRUNED]
    assert found["seconds"] == pytest.approx({"a": 1, "b": 5, "worst": 0}, abs=1e-3)
    assert found["peak_mb"]["b"] == pytest.approx(200)  # MB for 10⁹: 0.2 bytes a parameter
    read = csv.DictReader(io.StringIO((out / "scale.csv").read_text()))
    assert len(list(read)) == 3 * len(scale.STEPS)
    svg = (out / "scale.svg").read_text()
    assert svg.startswith("<?xml")
    assert "export, graph known" in svg
    assert "the weights themselves" in svg
