"""Gradients of the denoising loss, a picture at a noise level at a time.

The loss is the one that models are trained by (see `models.denoising`): of latents with fresh
seeded noise, against that noise or velocity. Against what the dense model itself predicts it would
be zero, and so would all gradients be. The latents are those of the pictures in `images`, or those
that the model paints from the prompts as it does everywhere else here.

All that is random in a sample is a function of the seed, the picture and the level, and the sums
are in fp64, so that neither batches nor processes matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.calibrate._layers import find_module, unused
from sdcompress.calibrate._trajectories import BATCH, exact
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.images import initial_latents
from sdcompress.evaluation.processes import processes
from sdcompress.models.captioned import load_picture, read_folder
from sdcompress.models.denoising import EMPTY, native_size, noised, seeded, training_scheduler
from sdcompress.recipe import Calibration

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sdcompress.calibrate import Calibrator, Counted, Statistics, Wanted

LEVELS = 4  # noise levels that each picture is looked at, one in each quarter of the timesteps
REACHED = frozenset({"text_encoder", "unet"})


@dataclass(frozen=True)
class _Picture:
    """What is to be seen, and where the picture lies that shows it, if it has not to be painted."""

    caption: str
    file: Path | None = None


@dataclass
class Pictures:
    """What to take gradients on, and by place in it the latents [1, c, h, w] that are made."""

    chosen: tuple[_Picture, ...]
    latents: dict[int, Tensor] = field(default_factory=dict)


def check(wanted: Wanted) -> None:
    """Raise UsageError for layers that the denoising loss does not reach; it needs no model."""
    if beyond := sorted(wanted.keys() - REACHED):
        raise UsageError(
            f"{beyond[0]}: expected a criterion without gradients, found one that needs those of "
            "the denoising loss, which only text_encoder and unet have; use magnitude or wanda"
        )


def record(calibrator: Calibrator, wanted: Wanted, progress: Counted) -> Statistics:
    """Sum up the gradients of the wanted layers, shaped as their weights: `Calibrator.record`.

    There are LEVELS samples of each prompt's picture, or of as many pictures of `images` as there
    are prompts (all of them, where there are fewer). Processes take turns at batches of pictures;
    one that gets none adds nothing. `progress` counts the samples of this process.

    Raises:
        UsageError: a layer of the VAE is wanted, or there is no folder of this name.
        InputError: a gradient is NaN or infinite or there is none, or the scheduler or the folder
            cannot be learnt from.
    """
    pipeline, asked = calibrator.pipeline, calibrator.asked
    check(wanted)
    scheduler = training_scheduler(
        pipeline.scheduler.config, "choose a criterion that needs no gradients"
    )
    pictures, mine = _share(calibrator)
    total = LEVELS * sum(map(len, mine))
    done = 0
    with _summing(pipeline, wanted) as sums, exact():
        for place, latent, caption in _make(calibrator, pictures, mine):
            for level in range(LEVELS):
                sample = seeded(asked.seed, "gradients", place, level)
                value: Any = loss(pipeline, scheduler, latent, caption, level, sample)
                if value.requires_grad:  # else no wanted layer was used, as `_Sums.check` says
                    value.backward()
                done += 1
                progress(done, total)
            for one in sums.values():
                one.check()
    found: Statistics = {component: {} for component in wanted}
    for component, layer in list(sums):
        one = sums.pop((component, layer))  # or all sums were there twice
        found[component][layer] = one.statistics(LEVELS * len(pictures.chosen))
    return found


def prepare(calibrator: Calibrator) -> None:
    """Make the latents of `calibrator.pictures` now, which else waits for the first `record`.

    For whoever replaces weights before that: the pictures are to be those of the dense model.
    """
    with exact():
        for _ in _make(calibrator, *_share(calibrator)):
            pass


def loss(
    pipeline: Any, scheduler: Any, latent: Tensor, caption: str, level: int, sample: Generator
) -> Tensor:
    """The mean squared error of what the UNet predicts of one noised latent [1, c, h, w].

    The timestep is drawn evenly from the `level`th part of LEVELS; see `models.denoising` for the
    rest. Everything is drawn from `sample`.
    """
    import torch
    from torch.nn.functional import mse_loss

    steps = scheduler.config.num_train_timesteps
    part = (level + float(torch.rand(1, generator=sample))) / LEVELS
    timestep = torch.tensor([int(part * steps)], device=latent.device)
    told = "" if bool(torch.rand(1, generator=sample) < EMPTY) else caption
    noise = initial_latents(sample, latent.shape[1:]).to(latent)
    noisy, target = noised(scheduler, latent, noise, timestep)
    text, _ = pipeline.encode_prompt([told], latent.device, 1, False)
    return mse_loss(pipeline.unet(noisy, timestep, text).sample, target)


def _choose(asked: Calibration) -> tuple[_Picture, ...]:
    """What to take gradients on: the prompts, or as many pictures from all over the folder."""
    import torch

    if asked.images is None:
        return tuple(_Picture(prompt) for prompt in asked.prompts)
    found = read_folder(Path(asked.images))
    order = torch.randperm(len(found), generator=seeded(asked.seed, "pictures")).tolist()
    chosen = [found[i] for i in order[: len(asked.prompts)]]
    return tuple(_Picture(one.caption, one.file) for one in chosen)


def _share(calibrator: Calibrator) -> tuple[Pictures, list[range]]:
    """The pictures, and the places of those that are this process's, in batches."""
    pictures = calibrator.pictures
    if pictures is None:
        pictures = calibrator.pictures = Pictures(_choose(calibrator.asked))
    state, places = processes(), range(len(pictures.chosen))
    starts = places[::BATCH][state.process_index :: state.num_processes]
    return pictures, [places[start : start + BATCH] for start in starts]


def _make(
    calibrator: Calibrator, pictures: Pictures, mine: Sequence[range]
) -> Iterator[tuple[int, Tensor, str]]:
    """The place, the latents [1, c, h, w] and the caption of every picture of `mine`.

    The latents are made once, by the model as it was: later packages of layers find it pruned.
    """
    for places in mine:
        if places[0] not in pictures.latents:
            make = _paint if calibrator.asked.images is None else _encode
            made = make(calibrator, [pictures.chosen[place] for place in places], places).cpu()
            pictures.latents |= {place: z[None] for place, z in zip(places, made, strict=True)}
        for place in places:
            latent = pictures.latents[place].to(calibrator.pipeline.device)
            yield place, latent, pictures.chosen[place].caption


def _paint(calibrator: Calibrator, part: Sequence[_Picture], places: range) -> Tensor:
    """The latents [n, c, h, w] that the model paints from captions, as `_trajectories` does."""
    import torch

    pipeline, asked = calibrator.pipeline, calibrator.asked
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    generators = [torch.Generator().manual_seed(asked.seed + place) for place in places]
    latents: Tensor = pipeline(
        [picture.caption for picture in part],
        latents=torch.cat([initial_latents(g, shape) for g in generators]),
        generator=generators,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        output_type="latent",
    ).images
    return latents


def _encode(calibrator: Calibrator, part: Sequence[_Picture], places: range) -> Tensor:
    """The latents [n, c, h, w] of pictures in files: the mean that the VAE gives, scaled."""
    import torch

    vae = calibrator.pipeline.vae
    size = native_size(calibrator.pipeline.unet.config, vae.config)
    latents = []
    for picture in part:
        assert picture.file is not None
        values = load_picture(picture.file, *size)[None].to(vae.device)
        with torch.no_grad():
            latents.append(vae.encode(values).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(latents)


class _Sums:
    """Sums over the gradients of one weight. They are taken as they come and then dropped, so that
    those of the whole model are never there at once."""

    def __init__(self, name: str, weight: Any, names: frozenset[str]) -> None:
        import torch

        self._name, self.weight = name, weight
        self._count = 0
        self._sums = {
            name: torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
            for name in sorted(names)
        }

    def add(self, weight: Any) -> None:
        """A hook for when the gradient of one sample is there."""
        for name, total in self._sums.items():
            total += _TERMS[name](weight.grad.double())
        self._count += 1
        weight.grad = None

    def check(self) -> None:
        """Raise InputError where nothing came by, or what nobody can count with."""
        if not self._count:
            raise unused(self._name)
        if not all(bool(total.isfinite().all()) for total in self._sums.values()):
            raise InputError(
                f"{self._name}: expected finite gradients, found NaN or infinity: the model cannot "
                "be learnt from in fp32; use a checkpoint that makes pictures"
            )

    def statistics(self, samples: int) -> dict[str, Tensor]:
        """The means over the samples of all processes, on the CPU."""
        from accelerate.utils import reduce

        return {name: reduce(t, "sum").cpu().div_(samples) for name, t in self._sums.items()}


_TERMS: dict[str, Callable[[Any], Tensor]] = {
    "grad_mean": lambda g: g,
    "grad_abs": lambda g: g.abs(),
    "grad_sq": lambda g: g * g,
}


@contextmanager
def _summing(pipeline: Any, wanted: Wanted) -> Iterator[dict[tuple[str, str], _Sums]]:
    """The sums of every wanted layer, which grow with each backward pass while the block lasts."""
    for component in ("text_encoder", "unet", "vae"):
        getattr(pipeline, component).requires_grad_(False)
    sums = {}
    hooks = []
    try:
        for component, layers in wanted.items():
            for layer, names in layers.items():
                weight = find_module(getattr(pipeline, component), layer).weight.requires_grad_()
                one = sums[component, layer] = _Sums(f"{component}/{layer}", weight, names)
                hooks.append(weight.register_post_accumulate_grad_hook(one.add))
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for one in sums.values():
            one.weight.requires_grad_(False)
