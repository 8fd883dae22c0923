"""Prompts × denoising steps → statistics of what every layer is given, summed while it comes by.

The model paints as it does for people: the scheduler's own steps, the same first noise for the same
seed (see `evaluation.images`), with guidance both branches. Nothing is kept but sums in fp64.
Prompts go through in batches that depend on their place in the list alone, so that processes of
`accelerate launch`, which take turns at the batches, see the very same numbers as one process does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sdcompress.bundle import Bundle
from sdcompress.errors import InputError
from sdcompress.evaluation.images import check_request, initial_latents, load_pipeline
from sdcompress.evaluation.processes import processes
from sdcompress.models.defaults import sampling_defaults
from sdcompress.models.prompts import prompts_for
from sdcompress.recipe import Calibration

if TYPE_CHECKING:
    from torch import Tensor, device, nn

BATCH = 8  # pictures at a time: the memory of a small GPU is enough for them
Wanted = Mapping[str, Mapping[str, frozenset[str]]]  # component → layer → statistics
Statistics = dict[str, dict[str, dict[str, "Tensor"]]]  # component → layer → statistic → tensor
Counted = Callable[[int, int], None]  # done, of how many

_UNPAINTED = ("encoder.", "quant_conv.")  # of the VAE: painting only decodes
_POWERS = {"input_sq_norm": {2}, "input_mean": {1}, "input_var": {1, 2}}  # which sums each needs


def _silent(done: int, total: int) -> None:
    pass


def complete(source: Bundle, settings: Calibration) -> Calibration:
    """The same settings with nothing left to the model: its prompts, steps and guidance."""
    defaults = sampling_defaults(source)
    prompts = settings.prompts or prompts_for(source, settings.count, "learning")
    return Calibration(
        prompts=prompts,
        count=len(prompts),
        seed=settings.seed,
        steps=defaults["steps"] if settings.steps is None else settings.steps,
        guidance=defaults["guidance"] if settings.guidance is None else settings.guidance,
    )


def collect(
    source: Bundle, wanted: Wanted, settings: Calibration, *, progress: Counted = _silent
) -> Statistics:
    """Paint with the model and sum up what the wanted layers are given.

    `wanted` names layers by their key in the state dict, and of each the statistics of
    `criteria.LayerStats` to record; the results have the shapes described there, in fp64 on the
    CPU. With several processes each paints its share and all get the result. `progress(done,
    total)` counts denoising steps, or prompts where only the text encoder is wanted.

    Raises:
        UsageError: there are no prompts, or they are no text.
        InputError: a layer is given NaN or infinity, or nothing at all.
    """
    import torch

    asked = complete(source, settings)
    assert asked.steps  # `complete` fills it in
    seeds = range(asked.seed, asked.seed + len(asked.prompts))
    check_request(asked.prompts, seeds, asked.steps)
    if unused := [layer for layer in wanted.get("vae", ()) if layer.startswith(_UNPAINTED)]:
        raise _unused(f"vae/{unused[0]}")  # now, and not after the first pictures
    state = processes()
    pipeline = load_pipeline(source.path, device=exact_device())
    batches = list(_batches(asked.prompts, seeds))[state.process_index :: state.num_processes]
    each = asked.steps if _denoises(wanted) else 1
    total = each * sum(len(prompts) for prompts, _ in batches)
    done = 0

    def count(pictures: int) -> None:
        nonlocal done
        done += pictures
        progress(min(done, total), total)  # some schedulers take more steps than they are asked

    with _listening(pipeline, wanted) as inputs, torch.no_grad():
        for prompts, numbers in batches:
            _paint(pipeline, prompts, numbers, asked, wanted, count)
            for name, one in inputs.items():
                one.check("/".join(name))
    found: Statistics = {component: {} for component in wanted}
    for (component, layer), one in inputs.items():
        found[component][layer] = one.statistics(wanted[component][layer])
    return found


def exact_device() -> device:
    """The device of this process, or the CPU where that device has no fp64 (Apple's)."""
    import torch

    place = processes().device
    return torch.device("cpu") if place.type == "mps" else place


def is_main_process() -> bool:
    """Whether it is for this process to write and to print."""
    return not _launched() or processes().is_main_process


def on_main_process(make: Callable[[], None]) -> None:
    """Call it on one process only, while the others of `accelerate launch` wait."""
    if not _launched():
        make()
        return
    state = processes()
    state.wait_for_everyone()  # until all have looked at what is there
    try:
        if state.is_main_process:
            make()
    finally:
        state.wait_for_everyone()


def _launched() -> bool:
    # Asked before accelerate is, which would set up a GPU for what may need none.
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _batches(
    prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    for start in range(0, len(prompts), BATCH):
        yield prompts[start : start + BATCH], seeds[start : start + BATCH]


def _paint(
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


@contextmanager
def _listening(pipeline: Any, wanted: Wanted) -> Iterator[dict[tuple[str, str], _Inputs]]:
    """The sums of every wanted layer, which grow with each forward pass while the block lasts."""
    inputs = {
        (component, layer): _Inputs(_module(getattr(pipeline, component), layer), statistics)
        for component, layers in wanted.items()
        for layer, statistics in layers.items()
    }
    hooks = [one.module.register_forward_hook(one.add) for one in inputs.values()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _module(root: nn.Module, layer: str) -> nn.Module:
    name = layer.removesuffix(".weight")
    prefix = "text_model."  # of transformers 4; 5 has neither such modules nor writes such files
    for spelling in (name, name.removeprefix(prefix), prefix + name):
        with suppress(AttributeError):
            return root.get_submodule(spelling)
    raise InputError(
        f"{layer}: the loaded model has no such layer, so that nothing can be recorded for it; "
        "keep it dense, or use a criterion that needs no prompts"
    )


class _Inputs:
    """Sums over all that one layer is given: of x, of x², and how many x each weight met."""

    def __init__(self, module: Any, statistics: frozenset[str]) -> None:
        import torch

        self.module = module
        self._count = 0
        # The weight's shape but for the outputs, with every channel whatever the groups.
        channels = module.in_channels if _is_conv(module) else module.in_features
        shape = (channels, *module.weight.shape[2:])
        self._sums = {
            power: torch.zeros(shape, dtype=torch.float64, device=module.weight.device)
            for power in sorted(set().union(*(_POWERS[s] for s in statistics)))
        }

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook: [N, C, H, W] for a Conv, [..., in] for a Linear."""
        (x,) = args
        for power, total in self._sums.items():
            values = x if power == 1 else x * x
            total += (
                _sum_conv(self.module, values, output) if _is_conv(self.module) else _sum(values)
            )
        self._count += output.numel() // output.shape[1 if _is_conv(self.module) else -1]

    def check(self, name: str) -> None:
        """Raise InputError where nothing came by, or what nobody can count with."""
        if not self._count:
            raise _unused(name)
        if not all(bool(total.isfinite().all()) for total in self._sums.values()):
            raise InputError(
                f"{name}: expected finite activations, found NaN or infinity: the model makes no "
                "pictures in fp32; use a checkpoint that does"
            )

    def statistics(self, names: frozenset[str]) -> dict[str, Tensor]:
        """The sums of all processes as `criteria.LayerStats` describes them."""
        import torch
        from accelerate.utils import reduce

        count = torch.tensor(self._count, device=self.module.weight.device)
        count = reduce(count, "sum").item()
        sums = {power: reduce(total, "sum").cpu() for power, total in self._sums.items()}
        compute = {
            "input_sq_norm": lambda: sums[2],
            "input_mean": lambda: sums[1] / count,
            "input_var": lambda: (sums[2] / count - (sums[1] / count) ** 2).clamp(min=0),
        }
        return {name: _like_weight(compute[name](), self.module) for name in sorted(names)}


def _unused(name: str) -> InputError:
    return InputError(
        f"{name}: expected activations, found none: painting does not use this layer; keep it "
        "dense, or use a criterion that needs no prompts"
    )


def _is_conv(module: Any) -> bool:
    return int(module.weight.ndim) == 4


def _sum(values: Tensor) -> Tensor:
    """[..., in] → [in]."""
    import torch

    return values.flatten(0, -2).sum(0, dtype=torch.float64)


def _sum_conv(conv: Any, values: Tensor, output: Tensor) -> Tensor:
    """[N, C, H, W] → [C, R, S]: for each place in the kernel, the sum of all it comes to lie on.

    Adding up the pictures first changes nothing, and spares unfolding each of them.
    """
    import torch
    from torch.nn.functional import pad

    height, width = output.shape[-2:]
    (tall, wide), (down, right), (below, beside) = conv.kernel_size, conv.stride, conv.dilation
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    image = values.sum(0, dtype=torch.float64)
    image = pad(image, conv._reversed_padding_repeated_twice, mode=mode)
    sums = [
        image[:, r * below :: down, s * beside :: right][:, :height, :width].sum((1, 2))
        for r in range(tall)
        for s in range(wide)
    ]
    return torch.stack(sums, 1).reshape(-1, tall, wide)


def _like_weight(statistic: Tensor, module: Any) -> Tensor:
    """[C, ...] → [1, C, ...], or [K, C/groups, ...] for a Conv with groups."""
    groups = module.groups if _is_conv(module) else 1
    outputs = module.weight.shape[0] // groups if groups > 1 else 1
    return statistic.reshape(groups, -1, *statistic.shape[1:]).repeat_interleave(outputs, 0)
