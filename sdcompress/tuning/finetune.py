"""Finetune: the diffusion loss on pictures with captions, under fixed masks. Needs a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.errors import InputError
from sdcompress.tuning._images import Captioned, load_picture, picture_at, read_folder
from sdcompress.tuning._job import Job, seeded
from sdcompress.tuning._loop import Loss, fit

if TYPE_CHECKING:
    from torch import Tensor

# One caption in ten is left empty, so that the model goes on knowing the unconditional noise that
# classifier-free guidance starts from (Ho & Salimans 2022, arXiv 2207.12598).
EMPTY = 0.1
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
    al. 2022, arXiv 2112.10752). The target is ε, or for a model that predicts velocity
    √ᾱ_t·ε − √(1−ᾱ_t)·z (Salimans & Ho 2022, arXiv 2202.00512).
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
        from diffusers import AutoencoderKL, DDPMScheduler

        self._job = job
        model = job.dense.path
        self._scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
        if (kind := self._scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise InputError(
                f"{model}: expected a scheduler that predicts epsilon or v_prediction, found "
                f"{kind}; tune this model with distill"
            )
        self._pictures = _read_folder(job)
        self._vae = AutoencoderKL.from_pretrained(model / "vae").float()
        self._vae.requires_grad_(False).eval().to(job.accelerator.device)
        unet: Any = job.students["unet"]
        side = unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self._size = (height * factor, width * factor)
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
        scheduler = self._scheduler
        velocity = scheduler.config.prediction_type == "v_prediction"
        return {
            "input_ids": input_ids,
            "timesteps": timesteps,
            "noisy": scheduler.add_noise(latents, noise, timesteps),
            "target": scheduler.get_velocity(latents, noise, timesteps) if velocity else noise,
        }

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


def _read_folder(job: Job) -> tuple[Captioned, ...]:
    settings = job.settings
    assert settings.images is not None
    with warnings.catch_warnings():
        if not job.accelerator.is_main_process:
            warnings.simplefilter("ignore")  # one of the processes says it
        return read_folder(
            Path(settings.images),
            skip=settings.broken_images == "skip",
            progress=lambda done, total: job.progress("checking pictures", done, total),
        )
