"""Measure the shipped weights: `python benchmarks/mini_sd2/evaluate.py`.

Writes results.json and grid.png beside itself. `--tune` compares guidance scales and schedulers
on the validation combinations instead and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from math import sqrt
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from clip import tokenize
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPModel
from unet import generate
from vae import round_trip, to_tensor

from sdcompress.models.mini_sd2 import DEFAULT_GUIDANCE, DEFAULT_STEPS, WEIGHTS
from sdcompress.models.mini_sd2.oracle import matches, read_scene
from sdcompress.models.mini_sd2.scenes import Image, Scene, render, sample_prompts, sample_scenes

HERE = Path(__file__).parent


def wilson(right: int, n: int) -> dict[str, float | int]:
    """A share with its 95 % interval (Wilson 1927), which stays inside 0..1."""
    z, p = 1.959964, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {
        "right": right,
        "n": n,
        "share": round(p, 4),
        "low": round(middle - half, 4),
        "high": round(middle + half, 4),
    }


def judge(scenes: list[Scene], pictures: Image) -> dict[str, float | int]:
    """How many pictures show everything their scene states."""
    right = sum(matches(s, read_scene(p)) for s, p in zip(scenes, pictures, strict=True))
    return wilson(right, len(scenes))


def mistakes(scenes: list[Scene], pictures: Image) -> dict[str, int]:
    """What is wrong in the pictures that are not right; one picture can count several times."""
    found: Counter[str] = Counter()
    for scene, picture in zip(scenes, pictures, strict=True):
        reading = read_scene(picture)
        if matches(scene, reading):
            continue
        if reading is None:
            found["unreadable"] += 1
            continue
        if reading.background != scene.background:
            found["background"] += 1
        if len(reading.things) != len(scene.things):
            found["number"] += 1
            continue
        # Compare with the order that agrees with the stated relation, if either does.
        if scene.relation not in (reading.relation, reading.converse().relation):
            found["relation"] += 1
        elif scene.relation != reading.relation:
            reading = reading.converse()
        for stated, read in zip(scene.things, reading.things, strict=True):
            for attribute in ("colour", "shape", "size"):
                found[attribute] += getattr(stated, attribute) != getattr(read, attribute)
    return {k: v for k, v in sorted(found.items()) if v}


def check_oracle(pipe: StableDiffusionPipeline, n: int, seed: int) -> dict[str, object]:
    """The oracle on pictures whose content is known, trained and held-out combinations alike."""
    report: dict[str, object] = {}
    for split in ("train", "heldout"):
        scenes = sample_scenes(n, None, split, seed)  # type: ignore[arg-type]
        pictures = render(scenes, seed)
        report[f"rendered_{split}"] = judge(scenes, pictures)
        report[f"round_trip_{split}"] = judge(scenes, round_trip(pipe.vae, pictures))
        report[f"shuffled_{split}"] = judge(scenes[1:] + scenes[:1], pictures)
    return report


def prompt_accuracies(
    pipe: StableDiffusionPipeline, n: int, seed: int, splits: tuple[str, ...]
) -> tuple[dict[str, object], dict[str, Image]]:
    """Accuracy by split and number of objects, with what went wrong; and the pictures."""
    report: dict[str, object] = {}
    kept: dict[str, Image] = {}
    for split in splits:
        for objects in (1, 2):
            prompts = sample_prompts(n, objects, split, seed)  # type: ignore[arg-type]
            scenes = [s for s, _ in prompts]
            texts = [t for _, t in prompts]
            started = time.perf_counter()
            pictures = generate(pipe, texts, seed, DEFAULT_STEPS, DEFAULT_GUIDANCE)
            name = f"{split}_{objects}"
            kept[name] = pictures
            report[name] = {
                **judge(scenes, pictures),
                "mistakes": mistakes(scenes, pictures),
                "shuffled": judge(scenes[1:] + scenes[:1], pictures)["share"],
                "seconds_per_picture": round((time.perf_counter() - started) / n, 3),
            }
            print(name, report[name], flush=True)
    return report, kept


@torch.no_grad()
def check_clip(
    clip: CLIPModel, pipe: StableDiffusionPipeline, n: int, seed: int
) -> dict[str, float]:
    """The small CLIP on rendered scenes: mean cosine of right and wrong pairs, and retrieval."""
    prompts = sample_prompts(n, None, "heldout", seed)
    pixels = to_tensor(render([s for s, _ in prompts], seed))
    out = clip(input_ids=tokenize(pipe.tokenizer, [t for _, t in prompts]), pixel_values=pixels)
    cosine = out.text_embeds @ out.image_embeds.t()
    wrong = cosine[~torch.eye(n, dtype=torch.bool)]
    return {
        "cosine_right": round(float(cosine.diagonal().mean()), 4),
        "cosine_wrong": round(float(wrong.mean()), 4),
        f"retrieval_among_{n}": round(
            float((cosine.argmax(1) == torch.arange(n)).float().mean()), 4
        ),
    }


def grid(pictures: Image, columns: int = 8) -> PIL.Image.Image:
    """Pictures in rows, with a line of two pixels between them."""
    rows = len(pictures) // columns
    framed = np.pad(
        pictures[: rows * columns], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255
    )
    side = framed.shape[1]
    tiles = framed.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    return PIL.Image.fromarray(tiles.reshape(rows * side, columns * side, 3))


def tune(pipe: StableDiffusionPipeline, n: int, seed: int) -> None:
    """Print accuracy on the validation combinations for ways of sampling."""
    for scheduler in (DDIMScheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        for steps in (10, 20):
            for guidance in (1.5, 2.5, 4.0, 6.0):
                shares = []
                for objects in (1, 2):
                    prompts = sample_prompts(n, objects, "validation", seed)
                    pictures = generate(pipe, [t for _, t in prompts], seed, steps, guidance)
                    shares.append(judge([s for s, _ in prompts], pictures)["share"])
                print(scheduler.__name__, steps, guidance, *shares, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--prompts", type=int, default=400, help="a split and number of objects")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--training", type=Path, help="training.json of train.py, to include")
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.tune:
        return tune(pipe, args.prompts, args.seed)
    path = HERE / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    training = json.loads(args.training.read_text()) if args.training else before.get("training")
    accuracy, pictures = prompt_accuracies(pipe, args.prompts, args.seed, ("train", "heldout"))
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip", torch_dtype=torch.float32)
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    report = {
        "training": training,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in modules.items()},
        "clip_parameters": clip.num_parameters(),
        "bytes": sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()),
        "sampling": {
            "scheduler": type(pipe.scheduler).__name__,
            "steps": DEFAULT_STEPS,
            "guidance": DEFAULT_GUIDANCE,
            "seed": args.seed,
        },
        "oracle": check_oracle(pipe, 1000, args.seed),
        "prompt_accuracy": accuracy,
        "clip": check_clip(clip, pipe, 100, args.seed),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
    sheet = np.concatenate([pictures["heldout_1"][:16], pictures["heldout_2"][:48]])
    grid(sheet).save(HERE / "grid.png", optimize=True)


if __name__ == "__main__":
    main()
