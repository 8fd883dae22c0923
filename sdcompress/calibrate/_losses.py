"""What one layer's weight does to the noise prediction, on a few steps of the calibration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sdcompress.calibrate._layers import find_module, unused
from sdcompress.calibrate._trajectories import exact, paint
from sdcompress.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from sdcompress.calibrate import Calibrator

PROMPTS = 8
STEPS = 4  # of each prompt's trajectory, one in the middle of each quarter


class Losses:
    """Remembers what the UNet is given and what it predicts at a few of the calibration's steps.

    It paints evenly spaced prompts of the calibration, both branches, as everywhere; so the calls
    are the model's own, and come in the same batches again when they are replayed. Every process
    does the same. Holds PROMPTS × STEPS inputs and outputs of the UNet in memory.

    Raises:
        InputError: the model predicts NaN or infinity.
    """

    def __init__(self, calibrator: Calibrator) -> None:
        import torch

        self._calibrator, self._pipeline = calibrator, calibrator.pipeline
        asked = calibrator.asked
        some = middles(len(asked.prompts), PROMPTS)
        prompts, seeds = [asked.prompts[i] for i in some], [asked.seed + i for i in some]
        self._seen = 0
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        self._texts: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hooks = [
            self._pipeline.unet.register_forward_hook(self._remember, with_kwargs=True),
            self._pipeline.text_encoder.register_forward_hook(
                lambda module, args, kwargs, output: self._texts.append((args, kwargs)),
                with_kwargs=True,
            ),
        ]
        try:
            with exact(), torch.no_grad():
                paint(self._pipeline, prompts, seeds, asked, {"unet"}, lambda pictures: None)
        finally:
            for hook in hooks:
                hook.remove()
        self._norm = sum(_sum_of_squares(dense) for _, _, dense in self._calls)
        if not math.isfinite(self._norm):
            raise InputError(
                "unet: expected finite predictions, found NaN or infinity: the model makes no "
                "pictures in fp32; use a checkpoint that does"
            )

    def of(self, component: str, layer: str, weight: Tensor) -> float:
        """Σ (out - dense)² / Σ dense² of the noise prediction with this weight in this layer.

        `layer` is a key of the state dict, `weight` has its shape. A layer of the text encoder
        changes what the UNet is told of the prompts. The layer then has its own weight again.

        Raises:
            UsageError: the component is neither the UNet nor the text encoder.
            InputError: the model has no such layer, or it is not used, or the prediction is not
                finite.
        """
        import torch

        if component not in ("unet", "text_encoder"):
            raise UsageError(
                f"{component}/{layer}: expected a layer of unet or text_encoder, the noise "
                "prediction shows no other; use an allocation that measures no losses"
            )
        module = find_module(getattr(self._pipeline, component), layer)
        own, used = module.weight.detach().clone(), list[bool]()
        hook = module.register_forward_pre_hook(lambda *_: used.append(True))
        try:
            with exact(), torch.no_grad():
                self._calibrator.replace(component, layer, weight)
                error = self._error(anew=component == "text_encoder")
        finally:
            hook.remove()
            self._calibrator.replace(component, layer, own)
        if not used:
            raise unused(f"{component}/{layer}")
        if not math.isfinite(error):
            raise InputError(
                f"{component}/{layer}: expected a finite prediction with this layer pruned, found "
                "NaN or infinity; keep it dense"
            )
        return error / self._norm

    def _remember(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A forward hook of the UNet."""
        if self._seen in middles(len(self._pipeline.scheduler.timesteps), STEPS):
            self._calls.append((args, kwargs, output[0]))
        self._seen += 1

    def _error(self, *, anew: bool) -> float:
        """The squared error over all calls; `anew`: with the prompts encoded once more."""
        changed = {"encoder_hidden_states": self._encode()} if anew else {}
        error = 0.0
        for args, kwargs, dense in self._calls:
            out = self._pipeline.unet(*args, **{**kwargs, **changed})[0]
            error += _sum_of_squares(out - dense)
        return error

    def _encode(self) -> Tensor:
        """What the pipeline tells the UNet of the prompts.

        It encodes them before it encodes nothing for the unconditional branch, and puts that first.
        """
        import torch

        encoder = self._pipeline.text_encoder
        return torch.cat([encoder(*args, **kwargs)[0] for args, kwargs in reversed(self._texts)])


def middles(count: int, parts: int) -> list[int]:
    """The middles of equal parts of range(count); all of it where there are not so many."""
    parts = min(count, parts)
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def _sum_of_squares(values: Tensor) -> float:
    return float(values.double().square().sum())
