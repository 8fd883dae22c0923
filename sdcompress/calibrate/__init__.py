"""Prompts × denoising steps → statistics of the layers, summed while they come by.

The model paints as it does for people: the scheduler's own steps, the same first noise for the same
seed (see `evaluation.images`), with guidance both branches. Nothing is kept but sums in fp64.
Prompts go through in batches that depend on their place in the list alone, so that processes of
`accelerate launch`, which take turns at the batches, see the very same numbers as one process does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdcompress.bundle import Bundle
from sdcompress.calibrate import _gradients, _trajectories
from sdcompress.calibrate._layers import find_module
from sdcompress.calibrate._losses import Losses
from sdcompress.calibrate._packages import hessian_shape, packages, statistics_bytes
from sdcompress.calibrate._processes import exact_device, is_main_process, on_main_process
from sdcompress.criteria import GRADIENTS
from sdcompress.errors import UsageError
from sdcompress.evaluation.images import check_request, load_pipeline
from sdcompress.models.captioned import require_folder
from sdcompress.models.defaults import sampling_defaults
from sdcompress.models.prompts import prompts_for
from sdcompress.recipe import Calibration

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Calibrator",
    "Losses",
    "Statistics",
    "Wanted",
    "check",
    "collect",
    "complete",
    "exact_device",
    "hessian_shape",
    "is_main_process",
    "on_main_process",
    "packages",
    "statistics_bytes",
]

Wanted = Mapping[str, Mapping[str, frozenset[str]]]  # component → layer → statistics
Statistics = dict[str, dict[str, dict[str, "Tensor"]]]  # component → layer → statistic → tensor
Counted = Callable[[int, int], None]  # done, of how many


def _silent(done: int, total: int) -> None:
    pass


def complete(source: Bundle, settings: Calibration) -> Calibration:
    """The same settings with nothing left to the model: its prompts, steps and guidance."""
    defaults = sampling_defaults(source)
    prompts = settings.prompts or prompts_for(source, settings.count, "learning")
    return settings.model_copy(
        update={
            "prompts": prompts,
            "count": len(prompts),
            "steps": defaults["steps"] if settings.steps is None else settings.steps,
            "guidance": defaults["guidance"] if settings.guidance is None else settings.guidance,
        }
    )


def check(wanted: Wanted, settings: Calibration) -> None:
    """Refuse what can be refused without a model, before anything slow.

    Raises:
        InputError: painting does not use one of the layers, or the pictures' folder is no such.
        UsageError: the denoising loss does not reach one of the layers.
    """
    recorded, gradients = _parts(wanted)
    _trajectories.check(recorded)
    _gradients.check(gradients)
    if gradients and settings.images is not None:
        require_folder(Path(settings.images))


def collect(
    source: Bundle, wanted: Wanted, settings: Calibration, *, progress: Counted = _silent
) -> Statistics:
    """Load the model and record once: see `Calibrator`."""
    check(wanted, settings)
    return Calibrator(source, settings).record(wanted, progress=progress)


class Calibrator:
    """A model that is loaded to be looked at while it works, in fp32.

    `pipeline` is diffusers', on the device of this process; `asked` are the settings with nothing
    left to the model; `pictures` are what gradients are taken on, made when they are first needed.

    Raises:
        UsageError: there are no prompts, or they are no text.
    """

    def __init__(self, source: Bundle, settings: Calibration) -> None:
        self.asked = complete(source, settings)
        assert self.asked.steps  # `complete` fills it in
        seeds = range(self.asked.seed, self.asked.seed + len(self.asked.prompts))
        check_request(self.asked.prompts, seeds, self.asked.steps)
        self.pipeline = load_pipeline(source.path, device=exact_device())
        self.pictures: _gradients.Pictures | None = None

    def record(self, wanted: Wanted, *, progress: Counted = _silent) -> Statistics:
        """Sum up what the wanted layers are given, and their gradients, in fp64.

        `wanted` names layers by their key in the state dict, and of each the statistics of
        `criteria.LayerStats` to record; the results have the shapes described there and lie on the
        CPU. With several processes each works on its share and all get the result. `progress(done,
        total)` counts denoising steps, or prompts where only the text encoder is looked at.

        Raises:
            InputError: a layer is given NaN or infinity, or nothing at all.
            UsageError: there is not enough memory for what is wanted.
        """
        self._refuse_too_much(wanted)
        found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        recorders = (_trajectories.record, _gradients.record)
        for record, part in zip(recorders, _parts(wanted), strict=True):
            for component, layers in (record(self, part, progress) if part else {}).items():
                for layer, statistics in layers.items():
                    found[component][layer] |= statistics
        return {component: dict(layers) for component, layers in found.items()}

    def see(self, dense: Calibrator) -> None:
        """Take gradients on what the dense model paints, and not on what this one does."""
        _gradients.prepare(dense)
        self.pictures = dense.pictures

    def replace(self, component: str, layer: str, weight: Tensor) -> None:
        """From now on the model has this weight in this layer.

        What gradients are taken on is what the model paints before the first call (see `see`).
        """
        import torch

        with torch.no_grad():
            find_module(getattr(self.pipeline, component), layer).weight.copy_(weight)

    def _refuse_too_much(self, wanted: Wanted) -> None:
        sizes = [
            statistics_bytes(
                tuple(find_module(getattr(self.pipeline, component), layer).weight.shape),
                names,
                self.asked.max_hessian,
            )
            for component, layers in wanted.items()
            for layer, names in layers.items()
        ]
        needed, free = sum(sizes), _free_memory()
        if needed > free:
            raise UsageError(
                f"calibration: what {len(sizes)} layers are to be judged by takes "
                f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; calibrate fewer at a time "
                f"('packages: {self.asked.packages * math.ceil(1.2 * needed / max(free, 1))}', or "
                "--packages), or lower max_hessian"
            )


def _free_memory() -> int:
    """Bytes, where the statistics are summed up."""
    import psutil
    import torch

    place = exact_device()
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        # What torch keeps for its next tensors is not in use either.
        return free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    return int(psutil.virtual_memory().available)


def _parts(wanted: Wanted) -> tuple[Wanted, Wanted]:
    """What is recorded while the model paints, and the gradients."""
    return _only(wanted, lambda names: names - GRADIENTS), _only(wanted, lambda n: n & GRADIENTS)


def _only(
    wanted: Wanted, choose: Callable[[frozenset[str]], Collection[str]]
) -> dict[str, dict[str, frozenset[str]]]:
    """The part of what is wanted whose names `choose` leaves."""
    part: dict[str, dict[str, frozenset[str]]] = {}
    for component, layers in wanted.items():
        chosen = {layer: frozenset(choose(names)) for layer, names in layers.items()}
        if chosen := {layer: names for layer, names in chosen.items() if names}:
            part[component] = chosen
    return part
