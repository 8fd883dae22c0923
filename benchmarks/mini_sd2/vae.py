"""Stage 1: the autoencoder, 64 x 64 x 3 pixels to 8 x 8 x 4 latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from fit import draw, fit, world
from torch import Tensor

from sdcompress.models.mini_sd2.scenes import Image, Scene, render, sample_scenes

STEPS = 1500
HORIZON = 2600
COOLDOWN = 500
BATCH = 32
LEARNING_RATE = 2e-3


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """An untrained autoencoder. The first level is narrow because it costs nearly everything."""
    widths = (16, 32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def to_tensor(images: Image) -> Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_images(tensor: Tensor) -> Image:
    """The inverse of `to_tensor`, rounded and clipped."""
    values = tensor.float().add(1).mul(127.5).round().clamp(0, 255).byte()
    return values.permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: Image, batch: int = 64) -> Image:
    """Encode to the mean of the posterior and decode again."""
    parts = []
    for start in range(0, len(images), batch):
        latents = vae.encode(to_tensor(images[start : start + batch])).latent_dist.mode()
        parts.append(to_images(vae.decode(latents).sample))
    return np.concatenate(parts)


def read_accuracy(images: Image, scenes: list[Scene]) -> float:
    """The share of images in which the oracle reads everything the scene says."""
    from sdcompress.models.mini_sd2.oracle import matches, read_scene

    return float(np.mean([matches(s, read_scene(i)) for s, i in zip(scenes, images, strict=True)]))


def train_vae(work: Path, seed: int) -> tuple[AutoencoderKL, dict[str, float]]:
    """Train on scenes drawn afresh for every batch, or load the finished training."""
    torch.manual_seed(seed)
    vae = build_vae()

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        own = draw(seed, step)
        x = to_tensor(render(sample_scenes(BATCH // world(), None, "train", own), own))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            y = vae.decode(mean + noise * torch.exp(0.5 * logvar)).sample.float()
        # The background fills most of a picture and is easy: objects weigh more.
        weight = 1 + 3 * ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.02).float()
        error = (y - x).abs()
        pixels = ((error + error**2) * weight).mean()
        edges = ((y - x).diff(dim=2).abs().mean() + (y - x).diff(dim=3).abs().mean()) / 2
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        mse = (error.detach() ** 2).mean()
        return {"loss": pixels + edges + 1e-4 * kl, "mse": mse, "kl": kl.detach()}

    def hook(step: int) -> None:
        scores = []
        for split in ("train", "validation"):
            scenes = sample_scenes(200, None, split, 10_000)  # type: ignore[arg-type]
            scores.append(read_accuracy(round_trip(vae, render(scenes, 1)), scenes))
        with (work / "vae.log").open("a") as stream:
            stream.write(f"vae {step} round trip train={scores[0]:.3f} val={scores[1]:.3f}\n")

    report = fit(
        "vae", vae, loss_fn, steps=STEPS, lr=LEARNING_RATE, work=work, seed=seed,
        horizon=HORIZON, cooldown=COOLDOWN, weight_decay=1e-4, ema_decay=0.995,
        save_every=200, hook=hook, hook_every=400,
    )  # fmt: skip
    return vae, report
