"""Blocks that become narrower: what is chosen, what a budget buys, what is written."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdcompress.bundle import Bundle
from sdcompress.catalog import read_catalog
from sdcompress.errors import InputError, UsageError
from sdcompress.latency import LatencyTable
from sdcompress.macs import Sizes, component_macs
from sdcompress.recipe import Recipe, StructureRule
from sdcompress.shrink import _narrowing, check, narrowed, needs_tables, shrink
from sdcompress.shrink._budget import Costs, closest, spend
from sdcompress.shrink._plan import Fate
from sdcompress.structure import KEY, Block, Part, from_ranges, read_record

FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RESNET = "mid_block.resnets.0"


def asked(structure: dict[str, Any], component: str = "unet", **more: Any) -> Recipe:
    section = {"structure": structure}
    return Recipe.model_validate({"name": "narrow", "prune": {component: section}, **more})


def ratio(ratio: float, **rule: Any) -> Recipe:
    return asked({"rules": [{"ratio": ratio, **rule}]})


def weights(bundle: Path, component: str = "unet") -> dict[str, torch.Tensor]:
    (file,) = (bundle / component).glob("*.safetensors")
    return load_file(file)


def block(name: str, units: int) -> Block:
    return Block("unet", name, "neurons", units, units, 1, (Part(f"{name}.weight", 1),))


def fate(name: str, units: int, **rule: Any) -> Fate:
    return Fate(block(name, units), StructureRule(multiple=1, **rule), None)


def test_a_budget_is_spent_where_it_costs_least() -> None:
    # Against trying everything: three blocks of unlike prices and losses, one with a jump.
    fates = [fate("a", 6, max_ratio=0.9), fate("b", 5, max_ratio=0.9), fate("c", 4, max_ratio=0.6)]
    price = {"a": 1.0, "b": 2.5, "c": 4.0}
    jump = {"a": 0.0, "b": 3.0, "c": 0.0}  # of a block that is whole: its time falls at once

    def of(block: Block, units: int) -> float:
        return price[block.name] * units + (jump[block.name] if units == block.units else 0.0)

    losses = {
        fates[0].block: [0.0, 0.1, 0.3, 0.8, 1.5, 2.9, 9.0],
        fates[1].block: [0.0, 0.6, 0.7, 0.9, 4.0, 9.0],
        fates[2].block: [0.0, 0.2, 2.0, 5.0, 9.0],
    }
    total = 10.0 + sum(of(f.block, f.block.units) for f in fates)
    costs = Costs("latency", total, of)
    for share in (0.95, 0.8, 0.7, 0.6, 0.5):
        found = spend(costs, share, fates, losses)
        assert costs.left(found) <= share
        possible = [
            (sum(losses[f.block][f.block.units - n] for f, n in zip(fates, kept, strict=True)))
            for kept in itertools.product(*(f.choices() for f in fates))
            if costs.left(dict(zip((f.block for f in fates), kept, strict=True))) <= share - 1e-4
        ]
        lost = sum(losses[f.block][f.block.units - found[f.block]] for f in fates)
        assert lost == pytest.approx(min(possible))
    assert closest(costs, fates) == pytest.approx((10 + 1 + 2.5 + 8) / total)
    assert spend(costs, closest(costs, fates), fates, losses) == {
        f.block: min(f.choices()) for f in fates
    }


def test_widths_are_rounded_to_what_the_target_wants(tiny_source: Bundle) -> None:
    catalog = read_catalog(tiny_source.path)
    planned = {f.block.name: f for f in check(ratio(0.3), catalog)["unet"]}
    assert (planned[FF].block.width, planned[FF].kept) == (128, 88)  # 89.6, in eights
    # Two heads of 16: one may go or none, and 1.4 is nearer to one.
    assert (planned[ATTENTION].block.units, planned[ATTENTION].kept) == (2, 1)
    assert (planned[RESNET].block.unit, planned[RESNET].kept) == (8, 6)  # 5.6 groups of 8 channels
    finer = {f.block.name: f for f in check(ratio(0.3, multiple=1), catalog)["unet"]}
    assert finer[FF].kept == 90
    coarser = {f.block.name: f for f in check(ratio(0.3, multiple=48), catalog)["unet"]}
    assert coarser[FF].kept == 96
    assert coarser[ATTENTION].skipped_because == "no narrower width is a multiple of 48"
    shapes = narrowed(catalog, check(ratio(0.3), catalog)).shapes("unet")
    assert shapes[f"{FF}.net.0.proj.weight"] == (176, 32)
    assert shapes[f"{FF}.net.2.weight"] == (32, 88)
    assert shapes[f"{RESNET}.conv2.weight"] == (64, 48, 3, 3)


def test_what_goes_is_what_has_the_least_magnitude(tiny_source: Bundle, tmp_path: Path) -> None:
    bundle = shrink(tiny_source, ratio(0.5, kind="neurons"), tmp_path / "narrow")
    dense, narrow = weights(tiny_source.path), weights(bundle.path)
    first, second = f"{FF}.net.0.proj.weight", f"{FF}.net.2.weight"
    magnitude = (
        dense[first][:128].abs().sum(1)
        + dense[first][128:].abs().sum(1)
        + dense[second].abs().sum(0)
    )
    kept = magnitude.topk(64).indices.sort().values
    assert torch.equal(narrow[second], dense[second][:, kept])
    assert torch.equal(narrow[first], dense[first][torch.cat([kept, kept + 128])])
    bias = first.replace("weight", "bias")
    assert torch.equal(narrow[bias], dense[bias][torch.cat([kept, kept + 128])])
    record = read_record(bundle.manifest.details)["unet"]
    removed = list(from_ranges(record.blocks[FF].removed))
    assert removed == sorted(set(range(128)) - set(kept.tolist()))
    assert (record.blocks[FF].kept, record.blocks[FF].asked) == (64, 0.5)
    assert record.blocks[ATTENTION].removed == ""
    config = json.loads((bundle.path / "unet/config.json").read_text())
    assert config[KEY][FF] == 64
    assert RESNET not in config[KEY]
    assert record.parameters == sum(t.numel() for t in narrow.values())
    assert bundle.manifest.parent == tiny_source.digest
    assert bundle.manifest.plan
    assert bundle.manifest.plan.removed == {"unet": record.parameters_dense - record.parameters}
    shapes = {n: t.shape for n, t in bundle.manifest.tensors["unet"].items()}
    assert shapes == {n: tuple(t.shape) for n, t in narrow.items()}
    assert set(bundle.manifest.tensors) == {"text_encoder", "unet", "vae"}
    bundle.check_files()


@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_budget_holds_and_is_used_up(what: str, tiny_source: Bundle, tmp_path: Path) -> None:
    rule = {"multiple": 1}
    bundle = shrink(tiny_source, asked({"budget": {what: 0.7}, "rules": [rule]}), tmp_path / "n")
    record = read_record(bundle.manifest.details)["unet"]
    catalog = read_catalog(bundle.path)
    config = json.loads((bundle.path / "unet/config.json").read_text())
    sizes = Sizes.of_model(bundle.path)
    counted = sum(component_macs("unet", catalog.shapes("unet"), config, sizes).values())
    assert record.macs == counted
    assert record.parameters == sum(t.numel() for t in weights(bundle.path).values())
    shares = {
        "macs": record.macs / record.macs_dense,
        "params": record.parameters / record.parameters_dense,
    }
    assert 0.69 < shares[what] <= 0.7
    assert record.budget == {what: 0.7}
    assert all(b.kept * 4 >= b.width for b in record.blocks.values())  # max_ratio is 0.75


def test_a_budget_of_latency_goes_by_the_table(tiny_source: Bundle, tmp_path: Path) -> None:
    catalog = read_catalog(tiny_source.path)
    recipe = asked({"budget": {"latency": 0.8}})
    blocks = [f.block for f in check(recipe, catalog)["unet"]]
    # Only feed-forwards take time, and no block but the first saves any by being narrower.
    times = {
        b.name: {b.unit: 0.0 if b.name == FF else 1.0, b.width: 4.0 if b.name == FF else 1.0}
        for b in blocks
    }
    table = LatencyTable(
        component="unet", machine="one", backend="onnxruntime", options={}, shapes={}, rounds=1,
        total=4.0 + 16.0, blocks=times,
    )  # fmt: skip
    assert needs_tables(recipe) == ["unet"]
    with pytest.raises(UsageError, match="sdcompress latency"):
        shrink(tiny_source, recipe, tmp_path / "none")
    with pytest.raises(UsageError, match=r"latency 0.8 cannot be met.* 0.849 of it is left"):
        shrink(tiny_source, recipe, tmp_path / "none", tables={"unet": table})
    assert not (tmp_path / "none").exists()
    less = asked({"budget": {"latency": 0.9}})
    bundle = shrink(tiny_source, less, tmp_path / "narrow", tables={"unet": table})
    record = read_record(bundle.manifest.details)["unet"]
    assert {n for n, b in record.blocks.items() if b.removed} == {FF}
    assert record.blocks[FF].kept == 64
    assert record.latency == pytest.approx(0.9, abs=2e-3)
    assert record.latency_table == table.sha256
    other = table.model_copy(update={"component": "vae"})
    with pytest.raises(UsageError, match="found one of vae"):
        shrink(tiny_source, less, tmp_path / "other", tables={"unet": other})


def test_obs_makes_up_for_what_goes(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = ratio(0.5, kind="neurons", criterion="obs").model_copy(
        update={"calibration": Recipe.model_fields["calibration"].default.model_copy(
            update={"prompts": ("a red cat", "a cat at a cat"), "steps": 2}
        )}
    )  # fmt: skip
    bundle = shrink(tiny_source, recipe, tmp_path / "obs")
    record = read_record(bundle.manifest.details)["unet"].blocks[FF]
    dense, narrow = weights(tiny_source.path), weights(bundle.path)
    kept = sorted(set(range(128)) - set(from_ranges(record.removed)))
    second, first = f"{FF}.net.2.weight", f"{FF}.net.0.proj.weight"
    assert torch.equal(narrow[first], dense[first][[*kept, *(k + 128 for k in kept)]])
    assert narrow[second].shape == dense[second][:, kept].shape
    assert not torch.equal(narrow[second], dense[second][:, kept])
    assert bundle.manifest.recipe is not None
    assert bundle.manifest.recipe["calibration"]["count"] == 2


def test_obs_takes_as_much_as_a_ratio_asks(tiny_source: Bundle, tmp_path: Path) -> None:
    calibration = {"prompts": ["a red cat"], "steps": 1}
    structure = {"rules": [{"ratio": 0.9, "criterion": "obs", "kind": "neurons"}]}
    bundle = shrink(tiny_source, asked(structure, calibration=calibration), tmp_path / "obs")
    assert weights(bundle.path)[f"{FF}.net.2.weight"].shape == (32, 16)  # 12.8 in eights
    assert read_record(bundle.manifest.details)["unet"].blocks[FF].kept == 16


def test_the_closest_that_a_refusal_names_can_be_reached(
    tiny_source: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be met") as refused:
        shrink(tiny_source, asked({"budget": {"macs": 0.1}}), tmp_path / "no")
    said = re.search(r"gone, ([\d.]+) of it is left", str(refused.value))
    assert said
    closest = asked({"budget": {"macs": float(said[1])}})
    record = read_record(shrink(tiny_source, closest, tmp_path / "n").manifest.details)["unet"]
    assert float(said[1]) - 0.001 < record.macs / record.macs_dense <= float(said[1])


def test_a_table_of_another_model_is_refused(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = asked({"budget": {"latency": 0.9}})
    blocks = [f.block for f in check(recipe, read_catalog(tiny_source.path))["unet"]]
    wider = {b.name: {b.unit: 0.0, 10 * b.width: 1.0} for b in blocks}
    table = LatencyTable(
        component="unet", machine="one", backend="onnxruntime", options={}, shapes={}, rounds=1,
        total=20.0, blocks=wider,
    )  # fmt: skip
    with pytest.raises(UsageError, match="measure one of this model"):
        shrink(tiny_source, recipe, tmp_path / "narrow", tables={"unet": table})


def test_pruned_weights_are_not_forgotten(pruned: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'structure' and 'rules' into one recipe"):
        shrink(pruned, ratio(0.5), tmp_path / "narrow")


def test_shards_stay_shards(tiny_sd: Path, tmp_path: Path) -> None:
    import shutil

    from diffusers import UNet2DConditionModel

    from sdcompress.bundle import SourceRecord

    model = tmp_path / "sharded"
    shutil.copytree(tiny_sd, model)
    shutil.rmtree(model / "unet")
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    unet.save_pretrained(model / "unet", max_shard_size="400KB")
    source = Bundle.of_source(model, SourceRecord(id="sharded", kind="directory"))
    bundle = shrink(source, ratio(0.5), tmp_path / "narrow")
    index = json.loads(next((bundle.path / "unet").glob("*.index.json")).read_text())
    files = sorted((bundle.path / "unet").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_the_same_bytes_again(tiny_source: Bundle, tmp_path: Path) -> None:
    recipe = asked({"budget": {"macs": 0.8}, "rules": [{"criterion": "random"}]}, seed=3)
    first = shrink(tiny_source, recipe, tmp_path / "one")
    second = shrink(tiny_source, recipe, tmp_path / "two")
    assert first.digest == second.digest
    third = shrink(tiny_source, recipe.model_copy(update={"seed": 4}), tmp_path / "three")
    assert third.digest != first.digest


def refusals() -> list[Any]:
    neurons = {"kind": "neurons"}
    return [
        pytest.param(
            {"rules": [{"ratio": 0.99, "kind": "heads"}]}, "leaves nothing of .*attn1 .2 heads",
            id="nothing left",
        ),
        pytest.param({"budget": {"macs": 0.2}}, r"macs 0.2 cannot be met: .* is left; ask",
                     id="a budget beyond reach"),
        pytest.param({"budget": {"macs": 0.7}, "rules": [{**neurons, "criterion": "taylor"},
                      {"kind": "channels"}]}, "magnitude and taylor count in different units",
                     id="units"),
        pytest.param({"rules": [{"ratio": 0.5, "criterion": "sparsegpt"}]}, "gives no score",
                     id="no score"),
        pytest.param({"rules": [{"ratio": 0.5, "blocks": "nothing.*"}]}, "matches none of the",
                     id="no block"),
        pytest.param({"rules": [{"ratio": 0.5, **neurons, "blocks": "*.attn1"}]},
                     "kind neurons matches none", id="no block of this kind"),
    ]  # fmt: skip


@pytest.mark.parametrize(("structure", "line"), refusals())
def test_what_cannot_be_done_is_refused_beforehand(
    structure: dict[str, Any], line: str, tiny_source: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=line):
        shrink(tiny_source, asked(structure), tmp_path / "narrow")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_narrow_already_is_refused(tiny_source: Bundle, tmp_path: Path) -> None:
    narrow = shrink(tiny_source, ratio(0.5), tmp_path / "narrow")
    with pytest.raises(UsageError, match="made narrower before; structure the model"):
        shrink(narrow, ratio(0.5), tmp_path / "again")


def test_nothing_is_left_of_a_call_that_fails(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise InputError("the disk is on fire")

    monkeypatch.setattr(_narrowing, "write_narrow", broken)
    with pytest.raises(InputError, match="on fire"):
        shrink(tiny_source, ratio(0.5), tmp_path / "narrow")
    assert not list(tmp_path.iterdir())
