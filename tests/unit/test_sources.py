"""Every kind of model source, and what is refused and how it is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcompress.bundle import Bundle, SourceRecord, seal
from sdcompress.cache import cache_folder
from sdcompress.catalog import weight_files
from sdcompress.errors import InputError, UsageError
from sdcompress.models import sources
from sdcompress.models.checks import check_sd2_like
from tests.tiny_sd import make_tiny_sd

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny-sd"))


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# What resolves -----------------------------------------------------------------------------------


def test_a_directory(tiny: Path, tmp_path: Path) -> None:
    found = sources.resolve(str(tiny), cache=tmp_path / "cache")
    assert found.directory == tiny
    assert found.source == SourceRecord(id="tiny-sd", kind="directory", licence="apache-2.0")
    assert not (tmp_path / "cache").exists()


def test_a_bundle_keeps_its_origin(tiny: Path) -> None:
    made = Bundle.of_source(tiny, SourceRecord(id="mini-sd2", kind="mini-sd2", licence="x"))
    seal(tiny, made.manifest)
    assert sources.resolve(str(tiny)).source == made.manifest.source


def test_an_onnx_bundle_is_no_model(tiny: Path) -> None:
    made = Bundle.of_source(tiny, SourceRecord(id="mini-sd2", kind="mini-sd2"))
    seal(tiny, made.manifest.model_copy(update={"stage": "onnx"}))
    with pytest.raises(InputError, match="found onnx; give the bundle it was made from"):
        sources.resolve(str(tiny))


def test_mini_sd2_comes_from_the_package(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_mini_sd2", lambda: original)
    assert sources.resolve("mini-sd2").source.kind == "mini-sd2"


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SDCOMPRESS_CACHE", raising=False)
    assert cache_folder() == tmp_path / "sdcompress"
    monkeypatch.setenv("SDCOMPRESS_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")


# Weight variants ---------------------------------------------------------------------------------

LISTING = [
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]


@pytest.mark.parametrize(
    ("variant", "unet"),
    [(None, ""), ("fp16", ".fp16"), ("non_ema", ".non_ema"), ("bf16", "")],
)
def test_which_weight_files_are_taken(variant: str | None, unet: str) -> None:
    assert sources.choose_weights(LISTING, variant) == {
        UNET_FILE: f"unet/diffusion_pytorch_model{unet}.safetensors",
        "vae/diffusion_pytorch_model.safetensors": "vae/diffusion_pytorch_model.fp16.safetensors",
    }


def test_shards_of_a_variant_are_chosen_with_their_index() -> None:
    listing = [
        "unet/m.fp16-00001-of-00002.safetensors",
        "unet/m.fp16-00002-of-00002.safetensors",
        "unet/m.safetensors.index.fp16.json",
    ]
    assert sources.choose_weights(listing, None) == {
        "unet/m-00001-of-00002.safetensors": listing[0],
        "unet/m-00002-of-00002.safetensors": listing[1],
        "unet/m.safetensors.index.json": listing[2],
    }


def test_a_variant_is_linked_under_plain_names(tiny: Path, tmp_path: Path) -> None:
    file = tiny / UNET_FILE
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = sources.resolve(str(tiny), cache=tmp_path / "cache", variant="fp16")
    assert [f.name for f in sorted((found.directory / "unet").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert load_file(found.directory / UNET_FILE)["conv_in.weight"].dtype == torch.float16
    assert sources.resolve(str(tiny), cache=tmp_path / "cache").directory == tiny
    assert found.source.licence == "apache-2.0"


def shard(component: Path, infix: str = "") -> Path:
    """Split a component's weights in two files and an index; returns the index."""
    file = component / "diffusion_pytorch_model.safetensors"
    tensors = list(load_file(file).items())
    half, weight_map = len(tensors) // 2, {}
    for i, part in enumerate((tensors[:half], tensors[half:]), 1):
        name = f"diffusion_pytorch_model{infix}-0000{i}-of-00002.safetensors"
        save_file(dict(part), component / name)
        weight_map |= dict.fromkeys(dict(part), name)
    index = component / f"diffusion_pytorch_model.safetensors.index{infix}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    file.unlink()
    return index


def test_sharded_weights(tiny: Path) -> None:
    shard(tiny / "unet")
    assert sources.resolve(str(tiny)).directory == tiny


def test_a_sharded_variant_loads_under_plain_names(tiny: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    shard(tiny / "unet", ".fp16")
    found = sources.resolve(str(tiny), cache=tmp_path / "cache")
    model = UNet2DConditionModel.from_pretrained(found.directory / "unet", local_files_only=True)
    assert model.config.in_channels == 4


def test_plain_weights_win_over_the_shards_of_a_variant(tiny: Path) -> None:
    plain = (tiny / UNET_FILE).read_bytes()
    shard(tiny / "unet", ".fp16")
    (tiny / UNET_FILE).write_bytes(plain)
    assert weight_files(tiny / "unet") == [tiny / UNET_FILE]
    assert sources.resolve(str(tiny)).directory == tiny
    shard(tiny / "unet")
    assert [f.name for f in weight_files(tiny / "unet")] == [
        f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]


def test_what_is_fetched_from_a_hub() -> None:
    listing = [
        ".gitattributes", "LICENSE.md", "README.md", "model_index.json", "picture.png",
        "v2-1_512.safetensors", "v2-1_512.ckpt", "scheduler/scheduler_config.json",
        "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/diffusion_pytorch_model.bin",
        *LISTING,
    ]  # fmt: skip
    assert sources.hub_files(listing, "fp16") == [
        "LICENSE.md",
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]


# Licences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: openrail++\ntags: [x]\n---\n# Model"}, "openrail++"),
        ({"README.md": "---\nlicense: other\nlicense_name: mine\n---\n"}, "mine"),
        ({"README.md": "# no front matter"}, None),
        ({"LICENSE": "\nMIT License\n\nCopyright"}, "MIT License"),
        ({"README.md": "# x", "LICENSE.md": "Apache"}, "Apache"),
    ],
)
def test_licence(tmp_path: Path, files: dict[str, str], licence: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "other.txt").write_text("license: no")
    assert sources.licence_of(tmp_path) == licence
    assert {f.name for f in sources.carried_files(tmp_path)} == set(files)


# What is refused ---------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return change


def config(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda model: change_json(model / name, **changes)


def pickled_unet(model: Path) -> None:
    file = model / UNET_FILE
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def truncated(model: Path) -> None:
    with (model / UNET_FILE).open("r+b") as f:
        f.truncate((model / UNET_FILE).stat().st_size // 2)


def missing_shard(model: Path) -> None:
    shard(model / "unet")
    (model / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def empty_index(model: Path) -> None:
    shard(model / "unet").write_text('{"weight_map": {}}')


def lying_index(model: Path) -> None:
    index = shard(model / "unet")
    data = json.loads(index.read_text())
    data["weight_map"]["conv_out.weight"] = data["weight_map"]["conv_in.weight"]
    data["weight_map"]["conv_in.weight"] = "diffusion_pytorch_model-00002-of-00002.safetensors"
    index.write_text(json.dumps(data))


def other_weights(model: Path) -> None:
    file = model / UNET_FILE
    tensors = load_file(file)
    tensors["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(tensors, file)


def broken_json(model: Path) -> None:
    (model / "unet/config.json").write_text("{")


BAD = [
    (remove("model_index.json"), "expected a diffusers directory with model_index.json, found"),
    (remove("vae"), "model_index.json names vae, found no such directory"),
    (remove("tokenizer"), "model_index.json names tokenizer, found no such directory"),
    (remove("unet/config.json"), "unet/config.json: expected this file"),
    (remove(UNET_FILE), "expected safetensors weights, found config.json"),
    (broken_json, "config.json: expected a JSON object"),
    (pickled_unet, "found pickled ones.*--allow-pickle"),
    (truncated, "truncated or corrupt"),
    (missing_shard, "the index names .*00002.* which is missing"),
    (empty_index, "index.json: names no shards"),
    (lying_index, "it and the shards disagree about conv_"),
    (other_weights, r"expected a first UNet layer of \[32, 4\] .* found \[32, 9\]"),
    (config("unet/config.json", in_channels=9), "9 input channels, an inpainting model"),
    (config("unet/config.json", in_channels=5), "5 input channels, a depth-to-image model"),
    (config("unet/config.json", in_channels=7), "7 input channels, an upscaler"),
    (config("unet/config.json", addition_embed_type="text_time"), "additional conditioning"),
    (config("unet/config.json", cross_attention_dim=48), "belong to different models"),
    (config("vae/config.json", latent_channels=16), "a VAE of 16 latent channels"),
    (
        config("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "found Stable Diffusion XL",
    ),
    (
        config("model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
        "found Stable Diffusion XL",
    ),
    (
        config("model_index.json", unet=["diffusers", "SD3Transformer2DModel"]),
        "found SD3Transformer2DModel as its unet",
    ),
    (config("model_index.json", vae=[None, None]), "without vae"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_an_unusable_directory_is_named_in_one_line(
    tiny: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(tiny)
    with pytest.raises(InputError, match=message) as caught:
        sources.resolve(str(tiny))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_in_a_directory_is_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "v2-1.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"give .*v2-1\.safetensors"):
        sources.resolve(str(tmp_path))


@pytest.mark.parametrize(
    "model",
    ["no-such-model", "./no/such/dir", "/nowhere/x", "a/b.safetensors", "a/b/c", "x/y.ckpt"],
)
def test_what_is_nothing_at_all(model: str) -> None:
    with pytest.raises(InputError, match="no such file or directory; expected mini-sd2"):
        sources.resolve(model)


def test_allowed_pickled_weights_become_safetensors(tiny: Path, tmp_path: Path) -> None:
    expected = load_file(tiny / UNET_FILE)
    pickled_unet(tiny)
    found = sources.resolve(str(tiny), cache=tmp_path / "cache", allow_pickle=True)
    tensors = load_file(found.directory / UNET_FILE)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not list(found.directory.rglob("*.bin"))
    assert found.source.id == "tiny-sd"
    check_sd2_like(found.directory)


def test_what_unpickles_to_no_weights(tiny: Path, tmp_path: Path) -> None:
    (tiny / UNET_FILE).unlink()
    torch.save({"note": "hello"}, tiny / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="found no tensors in it"):
        sources.resolve(str(tiny), cache=tmp_path / "cache", allow_pickle=True)
    (tiny / "unet/diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(InputError, match="cannot be unpickled"):
        sources.resolve(str(tiny), cache=tmp_path / "cache", allow_pickle=True)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["mini-sd2", "directory"])
def test_a_config_is_for_single_files_only(kind: str, tiny_sd: Path) -> None:
    model = "mini-sd2" if kind == "mini-sd2" else str(tiny_sd)
    with pytest.raises(UsageError, match="leave --config out"):
        sources.resolve(model, config="sd2-base")
