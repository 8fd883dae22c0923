"""LoRA files merged before pruning: the sum is computed by hand and compared bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcompress.errors import InputError, UsageError
from sdcompress.models import lora, sources
from tests.tiny_sd import make_tiny_sd

UNET_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYER = "text_model.encoder.layers.1.self_attn.v_proj"
CONV_LAYER = "down_blocks.0.resnets.0.conv1"
RANK = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "model", dtype=torch.float16)


def pair(seed: int, out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up [out, rank] and down [rank, inner]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(out, RANK, generator=generator) * 0.1,
        torch.randn(RANK, inner, generator=generator) * 0.1,
    )


def diffusers_file(file: Path) -> Path:
    unet_up, unet_down = pair(1, 32, 32)
    text_up, text_down = pair(2, 32, 32)
    tensors = {
        f"unet.{UNET_LAYER}.lora_A.weight": unet_down,
        f"unet.{UNET_LAYER}.lora_B.weight": unet_up,
        f"text_encoder.{TEXT_LAYER}.lora_A.weight": text_down,
        f"text_encoder.{TEXT_LAYER}.lora_B.weight": text_up,
    }
    save_file(tensors, file)
    return file


def kohya_file(file: Path, alpha: float = 2.0) -> Path:
    """As the most common trainer writes them, with an alpha and a convolution."""
    unet_up, unet_down = pair(1, 32, 32)
    text_up, text_down = pair(2, 32, 32)
    conv_up, conv_down = pair(3, 32, 32 * 9)
    tensors = {}
    for name, up, down in (
        (f"lora_unet_{UNET_LAYER.replace('.', '_')}", unet_up, unet_down),
        (f"lora_te_{TEXT_LAYER.replace('.', '_')}", text_up, text_down),
        (
            f"lora_unet_{CONV_LAYER.replace('.', '_')}",
            conv_up.reshape(32, RANK, 1, 1),
            conv_down.reshape(RANK, 32, 3, 3),
        ),
    ):
        tensors[f"{name}.lora_up.weight"] = up.clone()
        tensors[f"{name}.lora_down.weight"] = down.clone()
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


def weights(model: Path, component: str) -> dict[str, torch.Tensor]:
    (file,) = (model / component).glob("*.safetensors")
    return load_file(file)


def changed(model: Path, merged: Path) -> set[str]:
    return {
        f"{component}.{name}"
        for component in ("unet", "text_encoder", "vae")
        for name, tensor in weights(model, component).items()
        if not torch.equal(tensor, weights(merged, component)[name])
    }


def expected(weight: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    up, down = pair(seed, weight.shape[0], weight[0].numel())
    return (weight.float() + scale * (up @ down).reshape(weight.shape)).half()


def test_a_diffusers_lora_is_added_and_nothing_else_changes(tiny: Path, tmp_path: Path) -> None:
    file = diffusers_file(tmp_path / "style.safetensors")
    found = sources.resolve(str(tiny), loras=[f"{file}:0.5"], cache=tmp_path / "cache")
    assert changed(tiny, found.directory) == {
        f"unet.{UNET_LAYER}.weight",
        f"text_encoder.{TEXT_LAYER}.weight",
    }
    for component, layer, seed in (("unet", UNET_LAYER, 1), ("text_encoder", TEXT_LAYER, 2)):
        before = weights(tiny, component)[f"{layer}.weight"]
        after = weights(found.directory, component)[f"{layer}.weight"]
        assert after.dtype == torch.float16
        torch.testing.assert_close(after, expected(before, seed, 0.5), rtol=0, atol=0)
    (record,) = found.source.loras
    assert record.startswith("style.safetensors@sha256:")
    assert record.endswith(":0.5")
    assert found.source.licence == "apache-2.0"
    assert (found.directory / "LICENSE").samefile(tiny / "LICENSE")
    again = sources.resolve(str(tiny), loras=[f"{file}:0.5"], cache=tmp_path / "cache")
    assert again == found
    other = sources.resolve(str(tiny), loras=[f"{file}:0.25"], cache=tmp_path / "cache")
    assert other.directory != found.directory


def test_a_kohya_lora_with_alpha_and_a_convolution(tiny: Path, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "kohya.safetensors")
    found = sources.resolve(str(tiny), loras=[str(file)], cache=tmp_path / "cache")
    for component, layer, seed in (
        ("unet", UNET_LAYER, 1),
        ("unet", CONV_LAYER, 3),
        ("text_encoder", TEXT_LAYER, 2),
    ):
        before = weights(tiny, component)[f"{layer}.weight"]
        after = weights(found.directory, component)[f"{layer}.weight"]
        # alpha / rank = 2 / 4
        torch.testing.assert_close(after, expected(before, seed, 0.5), rtol=0, atol=0)


def test_two_loras_add_up(tiny: Path, tmp_path: Path) -> None:
    one, two = diffusers_file(tmp_path / "1.safetensors"), kohya_file(tmp_path / "2.safetensors")
    found = sources.resolve(str(tiny), loras=[f"{one}:0.5", f"{two}:-1"], cache=tmp_path / "cache")
    # 0.5 − 1 · 2/4 = 0: the second takes the first away again, up to one rounding
    before = weights(tiny, "unet")[f"{UNET_LAYER}.weight"]
    after = weights(found.directory, "unet")[f"{UNET_LAYER}.weight"]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-6)
    assert len(found.source.loras) == 2


def test_a_lora_for_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    up, down = pair(1, 64, 64)
    file = tmp_path / "big.safetensors"
    save_file(
        {f"unet.{UNET_LAYER}.lora_A.weight": down, f"unet.{UNET_LAYER}.lora_B.weight": up}, file
    )
    with pytest.raises(InputError, match="is 64×64 and the weight 32×32") as caught:
        sources.resolve(str(tiny), loras=[f"{file}:1"], cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name", ["unet.nowhere.to_q", "lora_unet_nowhere_to_q", "lora_te2_x", "transformer.blocks.0.q"]
)
def test_a_lora_for_other_layers_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    up, down = pair(1, 32, 32)
    file = tmp_path / "other.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    with pytest.raises(InputError, match=r"the model has nothing that .* could change"):
        sources.resolve(str(tiny), loras=[str(file)], cache=tmp_path / "cache")


SPELLINGS = [
    ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", UNET_LAYER),
    ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", UNET_LAYER),
    ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", UNET_LAYER),
    ("{}.lora_A.weight", "{}.lora_B.weight", UNET_LAYER),
    (
        "unet.{}_lora.down.weight",
        "unet.{}_lora.up.weight",
        UNET_LAYER.replace(".to_q", ".processor.to_q"),
    ),
    (
        "unet.{}_lora.down.weight",
        "unet.{}_lora.up.weight",
        UNET_LAYER.replace(".to_q", ".processor.to_out"),
    ),
    (
        "text_encoder.{}_lora.down.weight",
        "text_encoder.{}_lora.up.weight",
        TEXT_LAYER.replace("v_proj", "to_v"),
    ),
    (
        "text_encoder.{}_lora.down.weight",
        "text_encoder.{}_lora.up.weight",
        TEXT_LAYER.replace("v_proj", "to_out"),
    ),
    (
        "text_encoder.{}.lora_linear_layer.down.weight",
        "text_encoder.{}.lora_linear_layer.up.weight",
        TEXT_LAYER,
    ),
    # transformers 5 has dropped the prefix
    (
        "text_encoder.{}.lora_A.weight",
        "text_encoder.{}.lora_B.weight",
        TEXT_LAYER.removeprefix("text_model."),
    ),
]


@pytest.mark.parametrize(("down_name", "up_name", "layer"), SPELLINGS)
def test_every_spelling_means_one_layer(
    tiny: Path, tmp_path: Path, down_name: str, up_name: str, layer: str
) -> None:
    up, down = pair(1, 32, 32)
    file = tmp_path / "a.safetensors"
    save_file({down_name.format(layer): down, up_name.format(layer): up}, file)
    found = sources.resolve(str(tiny), loras=[str(file)], cache=tmp_path / "cache")
    component = "text_encoder" if layer.startswith(("text_model", "encoder")) else "unet"
    module = layer.replace(".processor", "")
    if component == "text_encoder":
        module = f"text_model.{module.removeprefix('text_model.')}".replace("to_v", "v_proj")
    module = module.replace("to_out", "out_proj" if component == "text_encoder" else "to_out.0")
    assert changed(tiny, found.directory) == {f"{component}.{module}.weight"}
    before = weights(tiny, component)[f"{module}.weight"]
    after = weights(found.directory, component)[f"{module}.weight"]
    assert torch.equal(after, expected(before, 1, 1.0))


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"unet.lora_alpha": 8}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.25),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_peft_settings_in_the_file(
    tiny: Path, tmp_path: Path, settings: dict[str, object], factor: float
) -> None:
    up, down = pair(1, 32, 32)
    tensors = {f"unet.{UNET_LAYER}.lora_A.weight": down, f"unet.{UNET_LAYER}.lora_B.weight": up}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    found = sources.resolve(str(tiny), loras=[str(file)], cache=tmp_path / "cache")
    before = weights(tiny, "unet")[f"{UNET_LAYER}.weight"]
    after = weights(found.directory, "unet")[f"{UNET_LAYER}.weight"]
    torch.testing.assert_close(after, expected(before, 1, factor), rtol=1e-3, atol=1e-6)


def test_diffusers_makes_the_same_sum(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="diffusers needs peft to load a LoRA")
    from diffusers import StableDiffusionPipeline

    up, down = pair(1, 32, 32)
    conv_up, conv_down = pair(3, 32, 32 * 9)
    tensors = {
        f"unet.{UNET_LAYER}.lora_A.weight": down,
        f"unet.{UNET_LAYER}.lora_B.weight": up,
        f"unet.{CONV_LAYER}.lora_A.weight": conv_down.reshape(RANK, 32, 3, 3),
        f"unet.{CONV_LAYER}.lora_B.weight": conv_up.reshape(32, RANK, 1, 1),
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    found = sources.resolve(str(tiny), loras=[f"{file}:0.7"], cache=tmp_path / "cache")
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny, torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.load_lora_weights(tensors)
    pipeline.fuse_lora(components=["unet"], lora_scale=0.7)
    pipeline.unload_lora_weights()
    for name, tensor in pipeline.unet.state_dict().items():
        ours = weights(found.directory, "unet")[name]
        torch.testing.assert_close(ours, tensor.half(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa, LoKr, DoRA and textual inversion are not read"),
        ("lora_unet_x.dora_scale", "LoHa, LoKr, DoRA and textual inversion are not read"),
        (f"unet.{UNET_LAYER}.lora_A.weight", "only half of the change to unet"),
    ],
)
def test_other_kinds_are_named(tiny: Path, tmp_path: Path, key: str, message: str) -> None:
    file = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(4, 32)}, file)
    with pytest.raises(InputError, match=message):
        sources.resolve(str(tiny), loras=[str(file)], cache=tmp_path / "cache")


def test_what_is_no_lora(tiny: Path, tmp_path: Path) -> None:
    file = diffusers_file(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="expected FILE:scale with a number"):
        lora.parse_lora(f"{file}:much")
    with pytest.raises(UsageError, match="expected FILE:scale with a number"):
        lora.parse_lora(f"{file}:inf")
    with pytest.raises(InputError, match="no such LoRA file"):
        lora.parse_lora(f"{tmp_path}/none.safetensors:1")
    pickled = tmp_path / "a.bin"
    torch.save(load_file(file), pickled)
    with pytest.raises(InputError, match="--allow-pickle"):
        lora.parse_lora(f"{pickled}:1")
    assert lora.parse_lora(f"{pickled}:1", allow_pickle=True).scale == 1.0
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="expected a safetensors file"):
        sources.resolve(
            str(tiny), loras=[f"{tmp_path}/cut.safetensors:1"], cache=tmp_path / "cache"
        )
