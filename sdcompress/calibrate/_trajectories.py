"""What comes by while the model paints the prompts, step after step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdcompress.calibrate._hessians import NAMES as HESSIANS
from sdcompress.calibrate._hessians import step_weight
from sdcompress.calibrate._inputs import Inputs
from sdcompress.calibrate._layers import find_module
from sdcompress.errors import InputError
from sdcompress.evaluation.images import initial_latents
from sdcompress.evaluation.processes import processes
from sdcompress.recipe import Calibration

if TYPE_CHECKING:
    from sdcompress.calibrate import Calibrator, Counted, Statistics, Wanted

BATCH = 8  # pictures at a time: the memory of a small GPU is enough for them

_UNPAINTED = ("encoder.", "quant_conv.")  # of the VAE: painting only decodes


def check(wanted: Wanted) -> None:
    """Raise InputError for layers that no painting uses; it needs no model."""
    if never := [layer for layer in wanted.get("vae", ()) if layer.startswith(_UNPAINTED)]:
        raise InputError(
            f"vae/{never[0]}: expected layers that painting uses, found one of the VAE's encoder; "
            "name 'decoder.*' in the rule, or take a criterion and an allocation without prompts"
        )


def record(calibrator: Calibrator, wanted: Wanted, progress: Counted) -> Statistics:
    """Paint with the model and sum up what the wanted layers are given: `Calibrator.record`."""
    import torch

    pipeline, asked = calibrator.pipeline, calibrator.asked
    check(wanted)
    state = processes()
    seeds = range(asked.seed, asked.seed + len(asked.prompts))
    mine = list(batches(asked.prompts, seeds))[state.process_index :: state.num_processes]
    each = (asked.steps or 0) if _denoises(wanted) else 1
    total = each * sum(len(prompts) for prompts, _ in mine)
    done = 0

    def count(pictures: int) -> None:
        nonlocal done
        done += pictures
        progress(min(done, total), total)  # some schedulers take more steps than they are asked

    with _listening(pipeline, wanted, asked) as inputs, exact(), torch.no_grad():
        for prompts, numbers in mine:
            paint(pipeline, prompts, numbers, asked, wanted, count)
            for name, one in inputs.items():
                one.check("/".join(name))
    found: Statistics = {component: {} for component in wanted}
    for component, layer in list(inputs):
        one = inputs.pop((component, layer))  # with its sums, which else were there twice
        found[component][layer] = one.statistics(wanted[component][layer])
    return found


def batches(
    prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    for start in range(0, len(prompts), BATCH):
        yield prompts[start : start + BATCH], seeds[start : start + BATCH]


def paint(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    asked: Calibration,
    wanted: Iterable[str],
    count: Callable[[int], None],
) -> None:
    """Run the wanted components, and those before them, for one batch.

    `count` is told how many pictures have come a step further.
    """
    import torch

    def after_step(*_: Any) -> dict[str, Any]:
        count(len(prompts))
        return {}

    guided = asked.guidance is not None and asked.guidance > 1
    if not _denoises(wanted):
        pipeline.encode_prompt(list(prompts), pipeline.device, 1, guided)
        after_step()
        return
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline(
        list(prompts),
        latents=torch.cat([initial_latents(g, shape) for g in generators]),
        generator=generators,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        output_type="pt" if "vae" in wanted else "latent",
        callback_on_step_end=after_step,
    )


def _denoises(wanted: Iterable[str]) -> bool:
    return set(wanted) != {"text_encoder"}


class _Steps:
    """Counts the denoising steps of each batch of pictures: a forward hook of the UNet."""

    def __init__(self, pipeline: Any) -> None:
        self._scheduler = pipeline.scheduler
        self._done = 0

    def weight(self) -> float:
        """That of the step under way."""
        return step_weight(self._done, len(self._scheduler.timesteps))

    def count(self, *_: Any) -> None:
        self._done = (self._done + 1) % len(self._scheduler.timesteps)


@contextmanager
def _listening(
    pipeline: Any, wanted: Wanted, asked: Calibration
) -> Iterator[dict[tuple[str, str], Inputs]]:
    """The sums of every wanted layer, which grow with each forward pass while the block lasts.

    Raises:
        InputError: the model has no such layer, or no such statistic can be had of it.
    """
    steps = _Steps(pipeline)
    inputs: dict[tuple[str, str], Inputs] = {}
    for component, layers in wanted.items():
        for layer, statistics in layers.items():
            module = find_module(getattr(pipeline, component), layer)
            if statistics & HESSIANS and getattr(module, "groups", 1) > 1:
                raise InputError(
                    f"{component}/{layer}: expected a Conv without groups, found {module.groups}, "
                    "which Hessians are not made for; keep it dense, or use another criterion"
                )
            inputs[component, layer] = Inputs(
                module,
                statistics,
                max_hessian=asked.max_hessian,
                **({"weight": steps.weight} if component == "unet" else {}),
            )
    hooks = [one.module.register_forward_hook(one.add) for one in inputs.values()]
    hooks.append(pipeline.unet.register_forward_hook(steps.count))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def exact() -> Iterator[None]:
    """Without TF32, so that a GPU sums up what a CPU does."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
