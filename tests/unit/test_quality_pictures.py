"""Pictures for measuring: the same ones however they were batched, interrupted or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.evaluation import pictures as module
from sdcompress.evaluation.images import generate_from_weights
from sdcompress.evaluation.pictures import Pictures, make
from sdcompress.evaluation.quality import QualitySettings

pytest.importorskip("torch")
PROMPTS = ("a red cat", "a cat", "red", "at", "a red at")
SETTINGS = QualitySettings(
    prompts=PROMPTS, seed=7, steps=2, guidance=3.0, batch=2, metrics=("psnr",)
)


def ignore(more: int) -> None:
    pass


def source(path: Path) -> Bundle:
    return Bundle.of_source(path, SourceRecord(id=path.name, kind="directory"))


def with_scheduler(tiny_sd: Path, target: Path, name: str) -> Path:
    """The tiny pipeline with another scheduler."""
    shutil.copytree(tiny_sd, target)
    for file, key in (("model_index.json", "scheduler"), ("scheduler/scheduler_config.json", None)):
        config = json.loads((target / file).read_text())
        if key:
            config[key] = ["diffusers", name]
        else:
            config["_class_name"] = name
        (target / file).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_picture_does_not_depend_on_its_batch(
    scheduler: str, tiny_sd: Path, tmp_path: Path
) -> None:
    model = with_scheduler(tiny_sd, tmp_path / "model", scheduler)
    made = Pictures.of(source(model), SETTINGS, tmp_path)
    make([made], ignore)
    single = generate_from_weights(model, PROMPTS, range(7, 12), steps=2, guidance=3.0)
    together = made.read(range(5)).astype(int)
    alone = np.stack([np.asarray(picture) for picture in single]).astype(int)
    assert np.abs(together - alone).max() <= 1
    assert len(np.unique(together.reshape(5, -1), axis=0)) == 5


def test_what_is_missing_broken_or_foreign_is_made_again(
    tiny_source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Pictures.of(tiny_source, SETTINGS, tmp_path)
    counted: list[int] = []
    make([made], counted.append)
    assert counted == [0, 2, 2, 1]
    assert made.folder.parent == tmp_path / "pictures"
    assert sorted(f.name for f in made.folder.iterdir()) == [
        *(f"0000{i}.png" for i in range(5)),
        "prompts.json",
    ]
    described = json.loads((made.folder / "prompts.json").read_text())
    assert described["bundle"] == tiny_source.digest
    assert described["pictures"][1] == {"file": "00001.png", "prompt": "a cat", "seed": 8}
    before = [made.file(i).read_bytes() for i in range(5)]

    again: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_pipeline", None)  # not needed when all are there
        make([made], again.append)
    assert again == [5]

    made.file(0).unlink()
    made.file(3).write_bytes(before[3][:-30])
    (made.folder / ".00002.png.partial-1").write_bytes(b"left by a killed process")
    batches: list[range] = []
    make_batch = module._make_batch

    def note(pipeline: Any, pictures: Pictures, batch: range) -> None:
        batches.append(batch)
        make_batch(pipeline, pictures, batch)

    monkeypatch.setattr(module, "_make_batch", note)
    make([made], ignore)
    assert batches == [range(2), range(2, 4)]
    assert [made.file(i).read_bytes() for i in range(5)] == before
    assert not list(made.folder.glob(".*"))

    shutil.copy(made.file(1), made.file(4))  # a whole picture, of another prompt
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(made.file(2))  # nobody knows whose
    make([made], ignore)
    assert [made.file(i).read_bytes() for i in range(5)] == before


@pytest.mark.parametrize("position", [40, 200, -40])
def test_a_changed_byte_is_noticed(tiny_source: Bundle, tmp_path: Path, position: int) -> None:
    made = Pictures.of(tiny_source, SETTINGS, tmp_path)
    made.folder.mkdir(parents=True)
    made.write(0, np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8))
    assert made.is_made(0)
    content = bytearray(made.file(0).read_bytes())
    content[position] ^= 1
    made.file(0).write_bytes(content)
    assert not made.is_made(0)


def test_folders_are_named_after_what_decides_the_pictures(
    tiny_source: Bundle, pruned: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(bundle: Bundle = tiny_source, **changes: object) -> Path:
        return Pictures.of(bundle, SETTINGS.model_copy(update=changes), tmp_path).folder

    assert folder(metrics=("ssim",), clip="x") == folder()
    others = [{"seed": 8}, {"steps": 3}, {"guidance": 2.0}, {"batch": 3}, {"dtype": "bf16"}]
    others += [{"prompts": PROMPTS[:2]}, {"height": 32}]
    folders = {folder(), folder(pruned), *(folder(**changes) for changes in others)}
    assert len(folders) == len(others) + 2
    monkeypatch.setattr(
        module, "processes", lambda: SimpleNamespace(device=SimpleNamespace(type="cuda"))
    )
    assert folder() not in folders  # it rounds otherwise
    assert folder(pruned).name.startswith(f"pruned-{pruned.digest[:8]}-seed7-")


def test_pictures_that_are_not_finite_are_kept_black(tiny_sd: Path, tmp_path: Path) -> None:
    model = tmp_path / "broken"
    shutil.copytree(tiny_sd, model)
    file = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"] = np.full_like(tensors["conv_out.bias"], np.nan)
    save_file(tensors, file)
    made = Pictures.of(source(model), SETTINGS, tmp_path)
    make([made], ignore)
    assert not made.read(range(5)).any()
    assert all(map(made.is_made, range(5)))


def test_half_precision_makes_nearly_the_same(tiny_source: Bundle, tmp_path: Path) -> None:
    full = Pictures.of(tiny_source, SETTINGS, tmp_path)
    half = Pictures.of(tiny_source, SETTINGS.model_copy(update={"dtype": "bf16"}), tmp_path)
    make([full], ignore)
    make([half], ignore)
    difference = np.abs(full.read(range(5)).astype(int) - half.read(range(5)))
    assert 0 < difference.mean() < 8
