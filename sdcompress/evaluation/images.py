"""Pictures from weights, and what every way of making pictures here shares.

The same prompt, seed and settings start from the same latents whether the model runs in torch or
as an engine, so that two pictures differ by the models only.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.catalog import COMPONENTS
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.models import modules

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Generator, Tensor

PROMPTS = "prompts.json"
OVERFLOW_FIX = (
    "in fp16 mostly an overflow, export with --upcast-attention on, with --calibrate or as fp32; "
    "in fp32 the weights are broken, prune less"
)


def generate_from_weights(
    model: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[Image]:
    """One picture for each prompt and its seed, by diffusers, in fp32 on the CPU.

    `model` is a directory in diffusers' layout, so any source, pruned or tuned bundle. Takes and
    means the same as `export.pipeline.generate`.
    """
    check_request(prompts, seeds, steps)
    height, width = picture_size(model, height, width)

    import numpy as np

    pipeline = load_pipeline(model)
    pictures = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        (output,) = denoise(
            pipeline,
            [prompt],
            [seed],
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
        )
        if not np.isfinite(output).all():
            raise VerificationError(f"{model}: the picture of {prompt!r} is NaN; prune less")
        pictures.append(to_picture(output))
        if progress:
            progress(i + 1, len(prompts))
    return pictures


def picture_size(model: Path, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels of what a diffusers directory makes; its native size for None.

    Raises:
        UsageError: the model cannot make pictures of this size.
    """
    unet, vae = (_config(model / c / "config.json") for c in ("unet", "vae"))
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    # diffusers' UNet, unlike an exported graph, pads what cannot be halved; its pipeline wants 8s.
    return fitting_size(height, width, unet["sample_size"] * scale, math.lcm(8, scale))


def load_pipeline(model: Path, dtype: str = "fp32", device: Any = "cpu") -> Any:
    """The diffusers pipeline of a directory, without its safety checker and progress bars.

    Components of which blocks have become narrower are built as their configs say. `dtype` is fp32,
    fp16 or bf16.
    """
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    narrow = {
        # Not by diffusers' own `to`, which warns of what must stay fp32: nothing here.
        component: torch.nn.Module.to(modules.load(model / component, component), kinds[dtype])
        for component in COMPONENTS
        if modules.is_narrow(model / component)
    }
    with warnings.catch_warnings():
        # diffusers calls the argument `dtype` from 0.42 on and takes either.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipeline = StableDiffusionPipeline.from_pretrained(
            model,
            torch_dtype=kinds[dtype],
            safety_checker=None,
            requires_safety_checker=False,
            local_files_only=True,
            **narrow,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def denoise(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    height: int,
    width: int,
    negative_prompt: str = "",
) -> NDArray[Any]:
    """Pictures [n, 3, height, width] in -1..1 in one batch, not finite where the model overflows.

    Each picture has a generator of its own, for its latents and for the noise that some schedulers
    add at every step, so that it does not depend on the batch it is in.
    """
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scale = pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, height // scale, width // scale)
    latents = torch.cat([initial_latents(generator, shape) for generator in generators])
    pictures = pipeline(
        list(prompts),
        negative_prompt=[negative_prompt] * len(prompts),
        latents=latents.to(pipeline.unet.dtype),
        generator=generators,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        output_type="pt",
    ).images
    values: NDArray[Any] = pictures.float().cpu().numpy() * 2 - 1
    return values


def fitting_size(
    height: int | None, width: int | None, default: int, multiple: int
) -> tuple[int, int]:
    """Height and width in pixels, `default` where None; raises UsageError for what does not fit."""
    sides = (default if height is None else height, default if width is None else width)
    for name, side in zip(("height", "width"), sides, strict=True):
        if side <= 0 or side % multiple:
            raise UsageError(
                f"{name} {side} does not fit this model; give a multiple of {multiple}"
            )
    return sides


def initial_latents(generator: Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal latents [1, *shape] in fp32, drawn on the CPU as diffusers draws them."""
    import torch

    return torch.randn((1, *shape), generator=generator, dtype=torch.float32)


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a pipeline directory, whichever class its config names."""
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _config(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: missing or unreadable; download the model again") from e


def step_arguments(scheduler: Any, generator: Generator) -> dict[str, Any]:
    """What this scheduler's `step` takes besides the three arguments all have in common."""
    accepted = inspect.signature(scheduler.step).parameters
    possible = {"eta": 0.0, "generator": generator}
    return {name: value for name, value in possible.items() if name in accepted}


def to_picture(values: NDArray[Any]) -> Image:
    """A picture from [3, H, W] in -1..1.

    Raises:
        VerificationError: it is black all over, which no prompt gives and an overflow does.
    """
    from PIL import Image

    levels = to_levels(values)
    if not levels.any():
        raise VerificationError(
            f"expected a picture, found one that is black all over: {OVERFLOW_FIX}"
        )
    return Image.fromarray(levels)


def to_levels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Levels [H, W, 3] from finite values [3, H, W] in -1..1."""
    import numpy as np

    levels = np.round((np.asarray(values, np.float32) / 2 + 0.5).clip(0, 1) * 255)
    return levels.astype(np.uint8).transpose(1, 2, 0)


def psnr(reference: Image, other: Image) -> float | None:
    """Peak signal-to-noise ratio of two pictures of 8 bits in dB; None where they are identical."""
    import numpy as np

    a, b = (np.asarray(image.convert("RGB"), np.float64) for image in (reference, other))
    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape} and {b.shape} cannot be compared")
    error = float(np.mean((a - b) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else None


def save(
    pictures: Sequence[Image],
    directory: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **settings: Any,
) -> None:
    """Write 00.png, 01.png, … and `prompts.json`, which says what each of them shows."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        file = f"{i:02d}.png"
        picture.save(directory / file)
        entries.append({"file": file, "prompt": prompt, "seed": seed})
    text = json.dumps({"pictures": entries, "settings": settings}, indent=1, sort_keys=True)
    (directory / PROMPTS).write_text(text + "\n", encoding="utf-8")


def check_request(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> None:
    """Raise UsageError for what no model could make pictures of."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise UsageError(f"prompt {prompt!r} is not valid text; write it in UTF-8") from e
    if len(prompts) != len(seeds) or not prompts:
        raise UsageError(
            f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt"
        )
    if steps < 1:
        raise UsageError(f"{steps} steps make no picture; give at least 1")
