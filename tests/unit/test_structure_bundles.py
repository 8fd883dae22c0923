"""Narrower bundles in the hands of all that works on weights: painting, calibrating, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcompress.bundle import Bundle
from sdcompress.calibrate import Calibrator, Losses, collect
from sdcompress.catalog import read_catalog, read_config, weight_files
from sdcompress.errors import InputError
from sdcompress.evaluation.images import denoise, generate_from_weights, load_pipeline
from sdcompress.evaluation.quality import QualitySettings, evaluate
from sdcompress.macs import Sizes, component_macs
from sdcompress.models import modules
from sdcompress.models.sources import resolve
from sdcompress.packing import pack, unpack
from sdcompress.recipe import Calibration
from sdcompress.search.cost import picture_macs
from tests.narrowed import blocks_of, narrow_bundle, thinned

COMPONENTS = ("text_encoder", "unet", "vae")
ASKED = Calibration(prompts=("a red cat", "at"), seed=5, steps=2, guidance=7.5)
PICTURES = QualitySettings(prompts=("a red cat", "a cat"), steps=2, guidance=7.5, metrics=("psnr",))


@pytest.fixture(scope="module")
def narrow(tiny_sd: Path, tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half of every block of every component is gone."""
    out = tmp_path_factory.mktemp("narrow") / "bundle"
    return narrow_bundle(tiny_source, out, thinned(tiny_sd, *COMPONENTS))


def test_the_pipeline_is_made_of_the_narrower_modules(
    narrow: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = load_pipeline(narrow.path)
    for component in COMPONENTS:
        module, files = getattr(pipeline, component), weight_files(narrow.path / component)
        state = {k: v for file in files for k, v in load_file(file).items()}
        assert not module.training
        loaded = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
        for name, value in state.items():
            assert loaded[name.removeprefix("text_model.")].equal(value)
    capsys.readouterr()
    assert load_pipeline(narrow.path, "bf16").unet.dtype == torch.bfloat16
    assert capsys.readouterr().err == ""


def test_it_paints_at_any_size_and_each_picture_by_itself(narrow: Bundle) -> None:
    settings: dict[str, Any] = {"steps": 2, "guidance": 7.5}
    (first, second) = generate_from_weights(narrow.path, ["a red cat", "at"], [1, 2], **settings)
    assert first.size == (16, 16)
    assert first.tobytes() != second.tobytes()
    pipeline = load_pipeline(narrow.path)
    both = denoise(pipeline, ["a red cat", "at"], [1, 2], height=24, width=8, **settings)
    (alone,) = denoise(pipeline, ["at"], [2], height=24, width=8, **settings)
    assert both.shape == (2, 3, 24, 8)
    torch.testing.assert_close(torch.tensor(both[1]), torch.tensor(alone), rtol=0, atol=1e-5)


def test_it_is_evaluated_against_the_dense_model(
    narrow: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    quality = evaluate(narrow, tiny_source, PICTURES, work=tmp_path)
    assert quality.warnings == ()
    assert 3 < quality.metrics["psnr"].model.value < 60


def test_calibration_sees_the_narrower_layers(narrow: Bundle) -> None:
    """The inputs of every consumer, as wide as what is left of its block; gradients likewise."""
    shapes = {c: read_catalog(narrow.path).shapes(c) for c in COMPONENTS}
    consumers = {
        component: [b.consumer for b in blocks if "encoder.down" not in b.name]
        for component, blocks in blocks_of(narrow.path).items()
    }
    names = frozenset({"input_sq_norm", "hessian"})
    wanted = {
        component: {
            name: names if component == "vae" else names | {"grad_sq"}
            for name in layers
            if component != "vae" or name.startswith("decoder.")
        }
        for component, layers in consumers.items()
    }
    found = collect(narrow, wanted, ASKED)
    for component, layers in wanted.items():
        assert len(layers) > 2
        for name in layers:
            statistics, shape = found[component][name], shapes[component][name]
            assert statistics["input_sq_norm"].shape == (1, *shape[1:])
            columns = shape[1] * (9 if len(shape) == 4 else 1)
            assert statistics["hessian"].shape == (columns, columns)
            if component != "vae":
                assert statistics["grad_sq"].shape == shape
                assert float(statistics["grad_sq"].sum()) > 0


def test_a_narrower_layer_is_replaced_and_its_loss_measured(narrow: Bundle) -> None:
    calibrator = Calibrator(narrow, ASKED)
    losses = Losses(calibrator)
    name = "mid_block.resnets.0.conv2.weight"
    weight = load_file(weight_files(narrow.path / "unet")[0])[name]
    assert losses.of("unet", name, weight) == 0.0
    assert losses.of("unet", name, torch.zeros_like(weight)) > 1e-4


def test_macs_of_a_picture_are_those_of_the_shapes(narrow: Bundle, tiny_source: Bundle) -> None:
    settings = QualitySettings(prompts=("a", "b"), steps=3, guidance=7.5, metrics=("psnr",))
    for bundle in (narrow, tiny_source):
        catalog, sizes = read_catalog(bundle.path), Sizes.of_model(bundle.path)
        macs = picture_macs(bundle.path, settings)
        for component, times in (("text_encoder", 2), ("unet", 6), ("vae", 1)):
            config = read_config(bundle.path / component)
            by_shape = component_macs(component, catalog.shapes(component), config, sizes)
            assert macs[component].total == times * sum(by_shape.values())


def test_it_is_packed_and_comes_back(narrow: Bundle, tmp_path: Path) -> None:
    packed = pack(narrow, tmp_path / "model.sdz")
    assert packed.digest == narrow.digest
    back = unpack(tmp_path / "model.sdz", tmp_path / "back")
    assert back.digest == narrow.digest
    back.check_files()
    assert modules.is_narrow(back.path / "vae")


def test_as_a_model_it_is_found_and_checked(narrow: Bundle) -> None:
    found = resolve(str(narrow.path))
    assert found.directory == narrow.path
    assert found.source == narrow.manifest.source


def test_a_lora_fits_what_is_as_wide_as_ever(narrow: Bundle, tmp_path: Path) -> None:
    def lora(layer: str, inputs: int, outputs: int) -> str:
        name = f"unet.mid_block.attentions.0.{layer}"
        file = tmp_path / f"{layer}.safetensors"
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(2, inputs, generator=generator)
        up = torch.randn(outputs, 2, generator=generator)
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)
        return str(file)

    cache = tmp_path / "cache"
    merged = resolve(str(narrow.path), loras=[lora("proj_in", 64, 64)], cache=cache).directory
    assert read_config(merged / "unet") == read_config(narrow.path / "unet")
    name = "mid_block.attentions.0.proj_in.weight"
    state = {
        k: load_file(weight_files(p / "unet")[0])[name]
        for k, p in {"before": narrow.path, "after": merged}.items()
    }
    assert float((state["after"] - state["before"]).abs().max()) > 0.1
    assert len(generate_from_weights(merged, ["at"], [0], steps=1)) == 1
    neurons = lora("transformer_blocks.0.ff.net.2", 256, 64)
    with pytest.raises(InputError, match="this model has lost blocks, merge the LoRA into the one"):
        resolve(str(narrow.path), loras=[neurons], cache=cache)
