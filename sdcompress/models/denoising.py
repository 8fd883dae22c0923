"""What a diffusion model learns from: noised latents, and what it is to make of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdcompress.errors import InputError

if TYPE_CHECKING:
    from torch import Generator, Tensor

# One caption in ten is left empty, so that the model goes on knowing the unconditional noise that
# classifier-free guidance starts from (Ho & Salimans 2022, arXiv 2207.12598).
EMPTY = 0.1


def seeded(*parts: object) -> Generator:
    """A CPU generator that is a function of `parts`, such as (seed, "noise", step, index)."""
    import torch

    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def training_scheduler(config: Mapping[str, Any], instead: str) -> Any:
    """diffusers' DDPMScheduler for the noise that a model with this scheduler config was taught on.

    Raises:
        InputError: the model predicts neither noise nor velocity; `instead` says what to do then.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(config)
    if (kind := scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
        raise InputError(
            f"expected a scheduler that predicts epsilon or v_prediction, found {kind}; {instead}"
        )
    return scheduler


def noised(
    scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents √ᾱ_t·z + √(1−ᾱ_t)·ε and what the model should predict of them, [n, c, h, w].

    That is ε (Ho et al. 2020, arXiv 2006.11239), or for a model that predicts velocity
    √ᾱ_t·ε − √(1−ᾱ_t)·z (Salimans & Ho 2022, arXiv 2202.00512). `timesteps` are [n].
    """
    noisy: Tensor = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    return noisy, noise


def native_size(unet_config: Any, vae_config: Any) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a model is made for."""
    side = unet_config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    factor = 2 ** (len(vae_config.block_out_channels) - 1)
    return height * factor, width * factor
