"""Finetune: the diffusion loss on pictures with captions, under fixed masks. Needs a folder."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.evaluation.images import load_scheduler
from sdcompress.models import modules
from sdcompress.models.captioned import Captioned, load_picture, read_folder
from sdcompress.models.denoising import EMPTY, native_size, noised, seeded, training_scheduler
from sdcompress.tuning._job import Job
from sdcompress.tuning._loop import Loss, fit

if TYPE_CHECKING:
    from torch import Tensor

CACHE_BYTES = 2**30  # of encoded pictures; those beyond it are encoded again


def tune(job: Job) -> None:
    """Train on the pictures of `settings.images`.

    Raises:
        UsageError: there is no such folder.
        InputError: the folder, the VAE or the scheduler cannot be learnt from; see `read_folder`.
    """
    fit(job, diffusion_loss(job), Pictures(job))


def diffusion_loss(job: Job) -> Loss:
    """The loss on what `Pictures` draws:

    E ‖target − unet(√ᾱ_t·z + √(1−ᾱ_t)·ε, t, text)‖² over pictures z, noise ε and timesteps t, all
    weighted alike (Ho et al. 2020, arXiv 2006.11239, equation 14; in a VAE's latents: Rombach et
    al. 2022, arXiv 2112.10752). For the target see `models.denoising.noised`.
    """
    from torch.nn.functional import mse_loss

    def loss(batch: dict[str, Tensor]) -> Tensor:
        text = job.students["text_encoder"](batch["input_ids"])[0]
        predicted = job.students["unet"](batch["noisy"], batch["timesteps"], text).sample
        return mse_loss(predicted.float(), batch["target"])

    return loss


class Pictures:
    """Noised latents of pictures, with their captions; see `_loop.Samples`.

    All that is random in a sample (timestep, noise, whether its caption is left out, and where in
    the VAE's posterior its latents lie) is a function of the seed, the step and the index.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        model = job.dense.path
        self._scheduler = training_scheduler(
            load_scheduler(model / "scheduler").config, "tune this model with distill"
        )
        self._pictures = _read_folder(job)
        self._vae: Any = modules.load(model / "vae", "vae").float().requires_grad_(False)
        self._vae.to(job.accelerator.device)
        unet: Any = job.students["unet"]
        self._size = native_size(unet.config, self._vae.config)
        self._posteriors: dict[int, tuple[Tensor, Tensor]] = {}
        self._cached = 0

    def draw(self, step: int, indices: range) -> dict[str, Tensor]:
        """`input_ids` [n, tokens], `timesteps` [n], and `noisy` and `target` [n, channels, h, w].

        A picture and a random number at a time, so that nothing depends on who shares a batch.
        """
        import torch

        ids, timesteps, latents, noise = [], [], [], []
        for index in indices:
            settings = self._job.settings
            which = picture_at(step * settings.batch + index, len(self._pictures), settings.seed)
            generator = seeded(settings.seed, "finetune", step, index)
            steps = self._scheduler.config.num_train_timesteps
            timesteps.append(torch.randint(steps, (1,), generator=generator))
            empty = bool(torch.rand(1, generator=generator) < EMPTY)
            ids.append(self._tokens("" if empty else self._pictures[which].caption))
            mean, std = self._posterior(which)
            latents.append(mean + std * torch.randn(mean.shape, generator=generator))
            noise.append(torch.randn(mean.shape, generator=generator))
        return self._noised(
            *(torch.cat(parts).to(self._job.accelerator.device) for parts in (ids, timesteps)),
            *(torch.stack(parts).to(self._job.accelerator.device) for parts in (latents, noise)),
        )

    def state(self) -> dict[int, Any]:
        return {}

    def restore(self, state: dict[int, Any]) -> None:
        pass

    def _noised(
        self, input_ids: Tensor, timesteps: Tensor, latents: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        noisy, target = noised(self._scheduler, latents, noise, timesteps)
        return {"input_ids": input_ids, "timesteps": timesteps, "noisy": noisy, "target": target}

    def _tokens(self, caption: str) -> Tensor:
        tokenizer = self._job.tokenizer
        ids: Tensor = tokenizer(
            caption,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    def _posterior(self, which: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a picture's scaled latents, [channels, h, w] on the CPU.

        Kept for the next time it comes while there is room.
        """
        import torch

        if (known := self._posteriors.get(which)) is not None:
            return known
        picture = load_picture(self._pictures[which].file, *self._size)
        device = self._vae.device
        # Encoded once, so encoded well, whatever precision the steps are computed in.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            latent = self._vae.encode(picture[None].to(device)).latent_dist
        scale = self._vae.config.scaling_factor
        mean, std = ((part[0] * scale).cpu() for part in (latent.mean, latent.std))
        if self._cached + (nbytes := mean.nbytes + std.nbytes) <= CACHE_BYTES:
            self._posteriors[which] = mean, std
            self._cached += nbytes
        return mean, std


def picture_at(position: int, count: int, seed: int) -> int:
    """Which of `count` pictures comes at a position (0, 1, … over all steps) of training.

    Each comes once before any comes again, in another order every time; the order is a function of
    the seed, so a process can begin anywhere.
    """
    return _order(position // count, count, seed)[position % count]


@lru_cache(maxsize=2)
def _order(epoch: int, count: int, seed: int) -> list[int]:
    import torch

    order: list[int] = torch.randperm(count, generator=seeded(seed, "order", epoch)).tolist()
    return order


def _read_folder(job: Job) -> tuple[Captioned, ...]:
    settings = job.settings
    assert settings.images is not None
    with warnings.catch_warnings():
        if not job.accelerator.is_main_process:
            warnings.simplefilter("ignore")  # one of the processes says it
        skip = settings.broken_images == "skip"
        return read_folder(
            Path(settings.images),
            skip=skip,
            remedy="mend the folder" + ("" if skip else " or say --broken-images skip"),
            progress=lambda done, total: job.progress("checking pictures", done, total),
        )
