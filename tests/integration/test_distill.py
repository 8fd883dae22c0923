"""What distill learns from: trajectories that can be taken up again, and shared out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdcompress.recipe import Tune
from sdcompress.tuning import _accelerator
from sdcompress.tuning._job import Job, load_models
from sdcompress.tuning.distill import Trajectories, _text_error, relative_error
from tests.tiny_sd import SCHEDULER

SCHEDULERS = [
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
]


def test_relative_error_is_of_each_sample_by_itself() -> None:
    dense = torch.tensor([[[3.0, 4.0]], [[0.0, 0.5]]])
    student = torch.tensor([[[3.0, 3.0]], [[0.0, 0.0]]])
    assert float(relative_error(student, dense)) == pytest.approx((1 / 25 + 1) / 2)
    assert float(relative_error(dense, dense)) == 0


def test_half_of_the_text_error_is_the_empty_prompt_s() -> None:
    dense = torch.ones(4, 1, 2)  # the empty prompt and three others, of one token each
    student = dense.clone()
    student[0] = 0  # error 1
    student[1] = 3  # error 4
    assert float(_text_error(student, dense, guided=True)) == pytest.approx((1 + 4 / 3) / 2)
    assert float(_text_error(student, dense, guided=False)) == pytest.approx(5 / 4)


@pytest.fixture(scope="module")
def models(tiny_sd: Path) -> dict[str, torch.nn.Module]:
    return load_models(tiny_sd, "cpu")


@pytest.fixture
def job(tiny_sd: Path, models: dict[str, torch.nn.Module], tmp_path: Path) -> Job:
    return _job(tiny_sd, models, tmp_path, "DDIMScheduler")


def _job(
    tiny_sd: Path, models: dict[str, torch.nn.Module], folder: Path, scheduler: str, **more: Any
) -> Job:
    (folder / "scheduler").mkdir(parents=True)
    config = {**SCHEDULER, "_class_name": scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    settings = Tune(batch=4, sampling_steps=4, guidance=3.0, prompts=("a red cat", "red"), **more)
    parent: Any = SimpleNamespace(path=tiny_sd)
    dense: Any = SimpleNamespace(path=folder)
    plan: Any = None
    job = Job(settings, parent, dense, plan, ("unet",), models, {}, {}, _accelerator(settings))
    job.__dict__["teachers"] = models
    return job


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_pool_taken_up_again_goes_on_the_same(
    tiny_sd: Path, models: dict[str, torch.nn.Module], tmp_path: Path, scheduler: str
) -> None:
    first = Trajectories(_job(tiny_sd, models, tmp_path / "a", scheduler))
    for step in range(3):
        first.draw(step, range(4))
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = Trajectories(_job(tiny_sd, models, tmp_path / "b", scheduler))
    second.restore(torch.load(file, weights_only=True))
    for step in range(3, 9):  # past the end of every trajectory
        expected, found = first.draw(step, range(4)), second.draw(step, range(4))
        for name in ("latents", "times", "prompts"):
            assert torch.equal(expected[name], found[name]), (step, name)


def test_samples_do_not_depend_on_who_draws_them(
    tiny_sd: Path, models: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    whole = Trajectories(_job(tiny_sd, models, tmp_path / "a", "DDIMScheduler"))
    left = Trajectories(_job(tiny_sd, models, tmp_path / "b", "DDIMScheduler"))
    right = Trajectories(_job(tiny_sd, models, tmp_path / "c", "DDIMScheduler"))
    for step in range(8):
        together = whole.draw(step, range(4))["latents"]
        halves = [left.draw(step, range(2)), right.draw(step, range(2, 4))]
        apart = torch.cat([half["latents"][:2] for half in halves])
        assert torch.allclose(together[:4], apart, rtol=1e-4, atol=1e-5)


def test_the_slots_come_to_be_spread_over_all_steps(job: Job) -> None:
    pool = Trajectories(job)
    times = [pool.draw(step, range(4))["times"][:4].tolist() for step in range(12)]
    assert len(set(times[0])) == 1  # all begin with the noisiest
    assert all(len(set(row)) == 4 for row in times[4:])
    # Slot 3 is never broken off: from noise to picture, and anew.
    mine = [row[3] for row in times]
    assert mine[:4] == sorted(mine[:4], reverse=True)
    assert mine[4:8] == mine[:4]


def test_the_trajectory_is_the_dense_model_s_own_picture(
    job: Job, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driven to its end, a slot has the latents that diffusers' own pipeline ends with."""
    from diffusers import StableDiffusionPipeline

    pool = Trajectories(job)
    noise = pool.draw(0, range(3, 4))["latents"][:1].clone()
    for step in range(1, 4):
        pool.draw(step, range(3, 4))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        "red", latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="latent"
    ).images
    assert torch.allclose(pool._slots[3].latents, latents, rtol=1e-3, atol=1e-4)


def test_without_guidance_there_is_one_half(
    tiny_sd: Path, models: dict[str, torch.nn.Module], tmp_path: Path
) -> None:
    job = _job(tiny_sd, models, tmp_path / "a", "DDIMScheduler")
    job.settings = job.settings.model_copy(update={"guidance": 0.0})
    batch = Trajectories(job).draw(0, range(4))
    assert len(batch["latents"]) == len(batch["prompts"]) == len(batch["targets"][0]) == 4
