"""The diffusion loss: what is drawn against the formula by hand, and on what it depends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.errors import InputError, UsageError
from sdcompress.models.captioned import load_picture
from sdcompress.recipe import Tune
from sdcompress.tuning import finetune
from sdcompress.tuning._job import Job, load_models
from sdcompress.tuning.finetune import Pictures, diffusion_loss

CAPTIONS = ("a red cat", "at sea", "a cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(path / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(CAPTIONS)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def students(tiny_sd: Path) -> dict[str, Any]:
    return load_models(tiny_sd, "cpu")


@pytest.fixture
def job(tiny_source: Bundle, students: dict[str, Any], folder: Path) -> Job:
    other: Any = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    return Job(
        Tune(method="finetune", images=str(folder), batch=4, seed=11),
        parent=tiny_source,
        dense=tiny_source,
        plan=other,
        components=("unet",),
        students=dict(students),
        layers={},
        masks={},
        accelerator=other,
    )


def with_scheduler(job: Job, directory: Path, **changes: Any) -> Job:
    """The job, its dense model with another scheduler's settings."""
    shutil.copytree(job.dense.path, directory)
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    job.dense = Bundle.of_source(directory, SourceRecord(id="tiny", kind="directory"))
    return job


def signal_and_noise(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1 − ᾱ_t) of the tiny model's schedule, by hand."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.from_numpy(np.cumprod(1 - betas)).float()[timesteps].reshape(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def test_noisy_latents_of_pictures_and_the_noise_as_target(job: Job, folder: Path) -> None:
    from diffusers import AutoencoderKL

    batch = Pictures(job).draw(0, range(3))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (3, 77),
        "timesteps": (3,),
        "noisy": (3, 4, 8, 8),
        "target": (3, 4, 8, 8),
    }
    signal, sigma = signal_and_noise(batch["timesteps"])
    latents = (batch["noisy"] - sigma * batch["target"]) / signal
    # The first three samples are the three pictures, in some order.
    vae = AutoencoderKL.from_pretrained(job.dense.path / "vae")
    loaded = torch.stack([load_picture(folder / f"{i}.png", 16, 16) for i in range(3)])
    with torch.no_grad():
        posterior = vae.encode(loaded).latent_dist
    scale = vae.config.scaling_factor
    used = set()
    for latent in latents:
        away = (latent - posterior.mean * scale) / (posterior.std * scale)
        spread = away.flatten(1).std(1)
        used.add(int(spread.argmin()))
        assert 0.8 < float(spread.min()) < 1.2  # a standard normal draw around its mean
    assert used == {0, 1, 2}


def test_velocity_is_the_target_where_the_model_predicts_it(job: Job, tmp_path: Path) -> None:
    plain = Pictures(job).draw(5, range(4))
    batch = Pictures(with_scheduler(job, tmp_path / "v", prediction_type="v_prediction")).draw(
        5, range(4)
    )
    noise = plain["target"]
    signal, sigma = signal_and_noise(batch["timesteps"])
    latents = (batch["noisy"] - sigma * noise) / signal
    assert torch.equal(batch["noisy"], plain["noisy"])
    expected = signal * noise - sigma * latents
    torch.testing.assert_close(batch["target"], expected, atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_mean_squared_error_of_the_prediction(job: Job) -> None:
    pictures, loss = Pictures(job), diffusion_loss(job)
    batch = pictures.draw(0, range(4))
    unet, text_encoder = job.students["unet"], job.students["text_encoder"]
    with torch.no_grad():
        value = loss(batch)
        errors = []
        for i in range(4):
            text = text_encoder(batch["input_ids"][i : i + 1]).last_hidden_state
            predicted = unet(batch["noisy"][i : i + 1], batch["timesteps"][i], text).sample
            errors.append(float((predicted[0] - batch["target"][i]).square().mean()))
    assert float(value) == pytest.approx(sum(errors) / 4, rel=1e-4)


def test_samples_depend_on_seed_step_and_index_only(job: Job) -> None:
    pictures = Pictures(job)
    whole = pictures.draw(7, range(4))
    again = Pictures(job)
    again.draw(2, range(1, 3))
    parts = [again.draw(7, range(2, 4)), again.draw(7, range(0, 2))]
    for key, value in whole.items():
        assert torch.equal(torch.cat([parts[1][key], parts[0][key]]), value)
    assert not torch.equal(pictures.draw(8, range(4))["target"], whole["target"])
    assert len(set(whole["timesteps"].tolist())) > 1
    job.settings = job.settings.model_copy(update={"seed": 12})
    assert not torch.equal(Pictures(job).draw(7, range(4))["target"], whole["target"])
    assert pictures.state() == {}


def test_one_caption_in_ten_is_left_out(job: Job) -> None:
    pictures = Pictures(job)
    ids = torch.cat([pictures.draw(step, range(4))["input_ids"] for step in range(150)])
    tokenizer = job.tokenizer
    known = tokenizer(["", *CAPTIONS], padding="max_length", max_length=77, return_tensors="pt")
    counts = [int((ids == text).all(1).sum()) for text in known.input_ids]
    assert sum(counts) == 600
    assert counts[0] == pytest.approx(60, abs=20)
    assert counts[1:] == pytest.approx([180] * 3, abs=12)


def test_what_is_encoded_is_kept_while_there_is_room(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def counted(file: Path, height: int, width: int) -> Tensor:
        loads.append(file.name)
        return load_picture(file, height, width)

    monkeypatch.setattr(finetune, "load_picture", counted)
    roomy, full = Pictures(job), Pictures(job)
    kept = [roomy.draw(step, range(4)) for step in range(3)]
    assert sorted(loads) == ["0.png", "1.png", "2.png"]
    one = 2 * 4 * 8 * 8 * 4  # bytes of a mean and a standard deviation
    monkeypatch.setattr(finetune, "CACHE_BYTES", one)
    loads.clear()
    anew = [full.draw(step, range(4)) for step in range(3)]
    assert len(loads) == 1 + 8  # the first is kept, the other two come four times each
    for a, b in zip(kept, anew, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_size_is_the_models(job: Job) -> None:
    job.students["unet"] = SimpleNamespace(config=SimpleNamespace(sample_size=[8, 12]))
    assert Pictures(job).draw(0, range(1))["noisy"].shape == (1, 4, 8, 12)


def test_says_what_is_missing(job: Job, tmp_path: Path) -> None:
    plain = job.settings
    job.settings = plain.model_copy(update={"images": str(tmp_path / "nowhere")})
    with pytest.raises(UsageError, match="expected a folder of pictures, found none"):
        finetune.tune(job)
    job.settings = plain.model_copy(update={"images": str(tmp_path)})
    with pytest.raises(InputError, match=r"expected metadata\.jsonl"):
        finetune.tune(job)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(InputError, match=r"1 missing .*; mend the folder or say --broken-images"):
        finetune.tune(job)
    job.settings = job.settings.model_copy(update={"broken_images": "skip"})
    with pytest.raises(InputError, match=r"1 missing .*; mend the folder \("):
        finetune.tune(job)
    job.settings = plain
    with pytest.raises(InputError, match="expected a scheduler that predicts .* found sample"):
        Pictures(with_scheduler(job, tmp_path / "x0", prediction_type="sample"))


def test_only_the_main_process_says_what_is_left_out(
    job: Job, folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p" / "1.png").write_bytes(b"")
    update = {"images": str(tmp_path / "p"), "broken_images": "skip"}
    job.settings = job.settings.model_copy(update=update)
    job.accelerator.is_main_process = False
    Pictures(job)
    assert not recwarn.list
    job.accelerator.is_main_process = True
    with pytest.warns(UserWarning, match=r"1 of 3 .* 1 broken \(1\.png\); they are left out"):
        assert Pictures(job).draw(0, range(4))["noisy"].shape[0] == 4
