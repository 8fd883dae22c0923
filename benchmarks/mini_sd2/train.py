"""Train mini-sd2 from nothing.

    torchrun --nproc-per-node 2 benchmarks/mini_sd2/train.py --work DIR

Stages: tokenizer, autoencoder, latents, UNet with text encoder, CLIP, weights. Each leaves its
result in DIR; run the command again after a kill and it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from clip import train_clip
from fit import rank, world
from package import write_weights
from tokens import build_tokenizer
from unet import SCENES, build_pipeline, cache_latents, train_unet
from vae import train_vae

from sdcompress.models.mini_sd2 import WEIGHTS
from sdcompress.models.mini_sd2.scenes import sample_scenes, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(hours=1))
        torch.set_num_threads(1)
    work, seed = args.work, args.seed
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer(words(), work / f"tokenizer-{rank()}")
    vae, vae_report = train_vae(work, seed)
    vae.requires_grad_(False)

    # Every rank encodes its share of the scenes and trains on that share alone.
    share = SCENES // world()
    first = rank() * share
    latents = cache_latents(vae, work, seed, first, first + share)
    deviation = latents.std()
    if dist.is_initialized():
        dist.all_reduce(deviation)
    scale = round(float(world() / deviation), 4)
    vae.register_to_config(scaling_factor=scale)
    scenes = sample_scenes(SCENES, None, "train", seed)[first : first + share]
    denoiser, unet_report = train_unet(work, seed, vae, tokenizer, latents * scale, scenes)
    clip, clip_report = train_clip(work, seed, tokenizer, denoiser.text)

    if rank() == 0:
        size = write_weights(build_pipeline(vae, denoiser, tokenizer), clip, args.out)
        report = {"vae": vae_report, "clip": clip_report, "unet": unet_report, "bytes": size}
        report.update(seed=seed, scaling_factor=scale, scenes=SCENES, ranks=world())
        (work / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
