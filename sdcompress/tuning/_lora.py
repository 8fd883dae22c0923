"""LoRA on pruned layers: low-rank changes (Hu et al. 2021, arXiv 2106.09685) that keep the zeros.

`Adapters(job)` is the keeper of `_loop.fit` where `settings.lora_rank` is set. A pruned layer with
the weight W and the mask m (all of it, in a block that is narrower and else as it was) computes,
while it is tuned and after the merge alike, with

    W + m ⊙ (B·A)        A: [rank, in], B: [out, rank]; of a convolution A is a convolution to rank
                         channels and B one of 1×1 that follows it

A and B alone are trained; alpha is the rank, so peft's factor alpha/rank is 1.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear, LoraModel
from torch import nn
from torch.func import functional_call

from sdcompress.models.denoising import seeded
from sdcompress.tuning._job import Job
from sdcompress.tuning._loop import refuse_revived

if TYPE_CHECKING:
    from torch import Tensor

NAME = "masked"


class _Masked:
    """What peft's layers lack. They add B(A(x)) to the layer's output, which is what the merged
    weights give only if nothing of B·A is masked; here the same weights are made for the forward
    pass as for the merge, which calls `get_delta_weight` too. peft's variants (DoRA and others)
    cannot say this: they are chosen by fields of `LoraConfig`, and none is ours.
    """

    mask: Tensor  # True stays; set when the layers are in place

    def get_delta_weight(self, adapter: str) -> Tensor:
        # What is merged in fp32 must have been trained in fp32, whatever the step is computed in.
        with torch.autocast(self.mask.device.type, enabled=False):
            delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        return delta.masked_fill(~self.mask, 0.0)

    def effective(self) -> Tensor:
        """The weights that the layer computes with."""
        base: nn.Linear | nn.Conv2d = self.get_base_layer()  # type: ignore[attr-defined]
        return base.weight + self.get_delta_weight(NAME)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base: nn.Linear | nn.Conv2d = self.get_base_layer()  # type: ignore[attr-defined]
        return functional_call(base, {"weight": self.effective()}, (x, *args), kwargs)


class _MaskedLinear(_Masked, Linear):
    pass


class _MaskedConv2d(_Masked, Conv2d):
    pass


def _masks(job: Job, component: str) -> dict[str, Tensor]:
    """Of every weight that gets adapters: one that stays whole has a single True."""
    state = job.students[component].state_dict()
    whole = {
        key: torch.ones((), dtype=torch.bool, device=state[key].device)
        for key in job.remains.get(component, {})
        if state[key].dim() > 1
    }
    return whole | job.masks[component]


class Adapters:
    """Puts adapters on the pruned layers of the components that are tuned, and freezes all else.

    `finish` merges them: the students have their own modules and keys again, and compute what they
    computed. A and B begin as peft does it, B with zeros, from the seed of the settings.
    """

    def __init__(self, job: Job) -> None:
        rank = job.settings.lora_rank
        assert rank is not None
        self._tuners: dict[str, LoraModel] = {}
        self._layers: dict[str, _Masked] = {}
        self._job = job
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(job.settings.seed, "lora").initial_seed())
            for component in job.components:
                model, masks = job.students[component], _masks(job, component)
                names = [key.removesuffix(".weight") for key in masks]
                # A list would also match every module whose name ends like one of it.
                targets = "|".join(map(re.escape, names))
                config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
                config._register_custom_module({nn.Linear: _MaskedLinear, nn.Conv2d: _MaskedConv2d})
                self._tuners[component] = LoraModel(model, config, NAME)
                for key, name in zip(masks, names, strict=True):
                    layer = model.get_submodule(name)
                    assert isinstance(layer, _Masked)
                    layer.mask = masks[key]
                    self._layers[f"{component}.{key}"] = layer

    def after_backward(self) -> None:
        pass  # what has no mask has no gradient

    def after_step(self, step: int) -> None:
        self._check(f"step {step + 1}")

    def finish(self) -> None:
        self._check("the last step")
        for tuner in self._tuners.values():
            tuner.merge_and_unload(safe_merge=True)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        self._check("the checkpoint")

    @torch.no_grad()
    def _check(self, when: str) -> None:
        for name, layer in self._layers.items():  # one at a time: together they are a second model
            refuse_revived({name: (layer.effective(), ~layer.mask)}, when)
