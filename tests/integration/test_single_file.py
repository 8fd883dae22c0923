"""Importing single-file checkpoints, held against diffusers' own loader.

The model has the real one's blocks, layers and so tensor names; only its widths are tiny.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcompress.errors import InputError, UsageError
from sdcompress.models import checkpoint, sources
from sdcompress.models.checks import check_sd2_like
from sdcompress.models.sd2 import component_configs, tensor_shapes
from sdcompress.safetensors_io import read_header
from tests.ldm import write_single_file
from tests.tiny_sd import make_tiny_sd

REAL_BLOCKS = {
    "unet": {
        "layers_per_block": 2,
        "block_out_channels": (32, 64, 96, 96),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": [2, 4, 4, 4],
    },
    "text_encoder": {"num_hidden_layers": 23},
    "vae": {
        "layers_per_block": 2,
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "model", **REAL_BLOCKS)


def configs_of(model: Path) -> dict[str, dict]:
    names = {"scheduler": "scheduler_config.json"}
    return {
        part: json.loads((model / part / names.get(part, "config.json")).read_text())
        for part in ("unet", "text_encoder", "vae", "scheduler")
    }


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}:{name.removeprefix('text_model.')}": tensor
        for file in model.glob("*/*.safetensors")
        for name, tensor in load_file(file).items()
        if not name.endswith("position_ids")
    }


@pytest.mark.parametrize(
    ("prefix", "dtype"),
    [
        ("cond_stage_model.model.", torch.float16),
        ("cond_stage_model.model.", torch.bfloat16),
        ("conditioner.embedders.0.model.", torch.float32),
    ],
)
def test_every_tensor_comes_back_bit_for_bit(
    tmp_path: Path, prefix: str, dtype: torch.dtype
) -> None:
    model = make_tiny_sd(tmp_path / "model", dtype=dtype, **REAL_BLOCKS)
    file = write_single_file(model, tmp_path / "one.safetensors", text_prefix=prefix)
    imported = tmp_path / "imported"
    imported.mkdir()
    checkpoint.import_checkpoint(read_header(file), configs_of(model), imported)
    expected, found = weights(model), weights(imported)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor), name
    check_sd2_like(imported)


def test_the_names_are_those_of_the_real_model(tiny: Path) -> None:
    for part, config in component_configs("sd2-base").items():
        if part != "scheduler":
            found = {name for name in weights(tiny) if name.startswith(f"{part}:")}
            names = (name.removeprefix("text_model.") for name in tensor_shapes(part, config))
            assert found == {f"{part}:{name}" for name in names}


def test_diffusers_reads_the_same_model_from_the_same_file(tiny: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    file = write_single_file(tiny, tmp_path / "one.safetensors")
    imported = tmp_path / "imported"
    imported.mkdir()
    checkpoint.import_checkpoint(read_header(file), configs_of(tiny), imported)
    theirs = StableDiffusionPipeline.from_single_file(
        file, config=str(tiny), local_files_only=True, safety_checker=None
    )
    ours = StableDiffusionPipeline.from_pretrained(imported, local_files_only=True)
    for part in ("unet", "text_encoder", "vae"):
        expected, found = (getattr(p, part).state_dict() for p in (theirs, ours))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), part


def test_an_import_is_made_once_and_described(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.models.sd2.component_configs", lambda name: configs_of(tiny))
    metadata = {"modelspec.architecture": "stable-diffusion-v2-512", "modelspec.license": "MIT"}
    file = write_single_file(tiny, tmp_path / "mine.safetensors", metadata=metadata)
    cache = tmp_path / "cache"
    first = sources.resolve(str(file), cache=cache)
    made = first.directory.stat().st_mtime_ns
    second = sources.resolve(str(file), cache=cache)
    assert second == first
    assert second.directory.stat().st_mtime_ns == made
    assert first.source.kind == "single-file"
    assert first.source.id == "mine.safetensors"
    assert str(first.source.revision).startswith("sha256:")
    assert first.source.licence == "MIT"
    assert [f.name for f in sources.carried_files(first.directory)] == ["README.md"]
    # another reading of the same weights is another import
    assert sources.resolve(str(file), cache=cache, config="sd2-768").directory != first.directory


@pytest.mark.parametrize(
    ("metadata", "asked", "expected"),
    [
        ({}, "sd-turbo", "sd-turbo"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "sd2-768"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, None, "sd2-base"),
        ({"modelspec.prediction_type": "v"}, None, "sd2-768"),
        ({"modelspec.prediction_type": "epsilon"}, "sd2-768", "sd2-768"),
    ],
)
def test_which_model_it_is(
    tmp_path: Path, metadata: dict[str, str], asked: str | None, expected: str
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=metadata)
    assert checkpoint.config_name(read_header(tmp_path / "x.safetensors"), asked) == expected


def test_weights_alone_cannot_tell(tiny: Path, tmp_path: Path) -> None:
    file = write_single_file(tiny, tmp_path / "one.safetensors")
    with pytest.raises(UsageError, match=r"--config NAME .*sd2-base.*sd2-768.*sd-turbo"):
        sources.resolve(str(file), cache=tmp_path / "cache")
    with pytest.raises(UsageError, match="sdxl: not a Stable Diffusion 2 configuration"):
        sources.resolve(str(file), cache=tmp_path / "cache", config="sdxl")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"conditioner.embedders.1.model.ln_final.weight": (8,)}, "found Stable Diffusion XL"),
        ({"cond_stage_model.transformer.x": (8,)}, "found Stable Diffusion 1"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "9 input channels"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 5, 3, 3)}, "5 input channels"),
        ({"lora_unet_down.lora_up.weight": (8, 8)}, "use --lora FILE:scale"),
        ({"something.else": (8,)}, "a file of other contents"),
    ],
)
def test_other_models_are_named(
    tmp_path: Path, keys: dict[str, tuple[int, ...]], message: str
) -> None:
    file = tmp_path / "other.safetensors"
    save_file({k: torch.zeros(shape) for k, shape in keys.items()}, file)
    with pytest.raises(InputError, match=message):
        sources.resolve(str(file), cache=tmp_path / "cache", config="sd2-base")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_pickled_checkpoints_are_refused_unless_allowed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcompress.models.sd2.component_configs", lambda name: configs_of(tiny))
    safe = write_single_file(tiny, tmp_path / "one.safetensors")
    pickled = tmp_path / "one.ckpt"
    torch.save({"state_dict": load_file(safe), "global_step": 1}, pickled)
    with pytest.raises(InputError, match=r"expected a safetensors checkpoint.*--allow-pickle"):
        sources.resolve(str(pickled), cache=tmp_path / "cache", config="sd2-base")
    found = sources.resolve(
        str(pickled), cache=tmp_path / "cache", config="sd2-base", allow_pickle=True
    )
    expected = weights(tiny)
    assert all(torch.equal(t, expected[name]) for name, t in weights(found.directory).items())
