"""Prompts × denoising steps → statistics of the layers, summed while they come by.

The model paints as it does for people: the scheduler's own steps, the same first noise for the same
seed (see `evaluation.images`), with guidance both branches. Nothing is kept but sums in fp64.
Prompts go through in batches that depend on their place in the list alone, so that processes of
`accelerate launch`, which take turns at the batches, see the very same numbers as one process does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from sdcompress.bundle import Bundle
from sdcompress.calibrate import _gradients, _trajectories
from sdcompress.calibrate._layers import find_module
from sdcompress.calibrate._processes import exact_device, is_main_process, on_main_process
from sdcompress.criteria import GRADIENTS
from sdcompress.evaluation.images import check_request, load_pipeline
from sdcompress.models.defaults import sampling_defaults
from sdcompress.models.prompts import prompts_for
from sdcompress.recipe import Calibration

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Calibrator",
    "Statistics",
    "Wanted",
    "collect",
    "complete",
    "exact_device",
    "is_main_process",
    "on_main_process",
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


def collect(
    source: Bundle, wanted: Wanted, settings: Calibration, *, progress: Counted = _silent
) -> Statistics:
    """Load the model and record once: see `Calibrator`."""
    return Calibrator(source, settings).record(wanted, progress=progress)


class Calibrator:
    """A model that is loaded to be looked at while it works, in fp32.

    `pipeline` is diffusers', on the device of this process; `asked` are the settings with nothing
    left to the model.

    Raises:
        UsageError: there are no prompts, or they are no text.
    """

    def __init__(self, source: Bundle, settings: Calibration) -> None:
        self.asked = complete(source, settings)
        assert self.asked.steps  # `complete` fills it in
        seeds = range(self.asked.seed, self.asked.seed + len(self.asked.prompts))
        check_request(self.asked.prompts, seeds, self.asked.steps)
        self.pipeline = load_pipeline(source.path, device=exact_device())

    def record(self, wanted: Wanted, *, progress: Counted = _silent) -> Statistics:
        """Sum up what the wanted layers are given, and their gradients, in fp64.

        `wanted` names layers by their key in the state dict, and of each the statistics of
        `criteria.LayerStats` to record; the results have the shapes described there and lie on the
        CPU. With several processes each works on its share and all get the result. `progress(done,
        total)` counts denoising steps, or prompts where only the text encoder is looked at.

        Raises:
            InputError: a layer is given NaN or infinity, or nothing at all.
        """
        found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        for record, part in (
            (_trajectories.record, _only(wanted, lambda names: names - GRADIENTS)),
            (_gradients.record, _only(wanted, lambda names: names & GRADIENTS)),
        ):
            for component, layers in (record(self, part, progress) if part else {}).items():
                for layer, statistics in layers.items():
                    found[component][layer] |= statistics
        return {component: dict(layers) for component, layers in found.items()}

    def replace(self, component: str, layer: str, weight: Tensor) -> None:
        """From now on the model has this weight in this layer."""
        import torch

        with torch.no_grad():
            find_module(getattr(self.pipeline, component), layer).weight.copy_(weight)


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
