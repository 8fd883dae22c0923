"""SR-STE: dense weights train on under a mask that follows them at every step; prompts or pictures.

Sparse-refined straight-through estimator (Zhou et al. 2021, arXiv 2102.04010). The loss is
`finetune`'s where `images` are given, else `distill`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdcompress.criteria import load_criterion
from sdcompress.errors import SdcompressError
from sdcompress.patterns import (
    Compare,
    Pattern,
    keep_mask,
    parse_pattern,
    violations,
)
from sdcompress.plan import LayerPlan
from sdcompress.tuning._job import Job
from sdcompress.tuning._loop import Samples, fit

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

MOVES_MASKS = True


def tune(job: Job) -> None:
    """Train the dense weights, and put the masks they end with into `job.masks`.

    Raises:
        UsageError, InputError: `images` cannot be learnt from.
    """
    from sdcompress.tuning import distill, finetune

    samples: Samples
    if job.settings.images is None:
        samples, loss = distill.Trajectories(job), distill.distillation_loss(job)
    else:
        samples, loss = finetune.Pictures(job), finetune.diffusion_loss(job)
    fit(job, loss, samples, keeper=MovingMasks(job))


class MovingMasks:
    """The masks and the dense weights below them; see `_loop.Keeper`.

    A pruned layer keeps its dense weight w as `parametrizations.weight.original`, which is what is
    trained, and computes with m ⊙ w. What the parent pruned begins at the dense model's value, and
    m as the parent's choice. The step of Zhou et al., for a learning rate γ,

        w ← w − γ (∂L/∂(m ⊙ w) + λ (1 − m) ⊙ w)        λ: `settings.decay`

    takes the first gradient straight through the mask, and shrinks what is masked at the moment, so
    that masks settle. With AdamW it is this sum that the optimiser sees. After it, m keeps the
    largest |w| by the pattern and the number of zeros that the layer was planned with.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._layers: dict[tuple[str, str], _Layer] = {}
        for component in job.components:
            dense = job.teachers[component].state_dict()
            for key, plan in job.layers[component].items():
                module = job.students[component].get_submodule(key.removesuffix(".weight"))
                below = job.left_of(component, key, dense[key])
                layer = _Layer.prepare(module, below, job.masks[component][key], plan)
                self._layers[component, key] = layer

    def after_backward(self) -> None:
        # fp16 scales a loss up, and its gradients are not scaled down before they are clipped.
        scaler = self._job.accelerator.scaler
        decay = self._job.settings.decay * (scaler.get_scale() if scaler else 1.0)
        for layer in self._layers.values():
            refine(layer.dense, layer.mask, decay)

    def after_step(self, step: int) -> None:
        self._follow(f"step {step + 1}")

    def finish(self) -> None:
        from torch.nn.utils import parametrize

        self._follow("the last step")
        revived = total = 0
        for (component, key), layer in self._layers.items():
            masks = self._job.masks[component]
            revived += int((layer.mask & ~masks[key]).sum())
            total += int(layer.mask.sum())
            masks[key] = layer.mask
            parametrize.remove_parametrizations(layer.module, "weight")
        self._job.details["revived"] = revived / max(
            total, 1
        )  # of the weights kept, those once pruned

    def state(self) -> dict[str, Any]:
        return {}  # from the first step on the masks are a function of the weights

    def restore(self, state: dict[str, Any]) -> None:
        self._follow("the checkpoint")

    def _follow(self, when: str) -> None:
        for (component, key), layer in self._layers.items():
            layer.follow()
            if problem := layer.problem():
                raise SdcompressError(
                    f"{component}.{key}: {problem} after {when}; please report this"
                )


@dataclass(frozen=True)
class _Layer:
    """A module whose weight is masked, and what its mask has to be."""

    module: Module
    pattern: Pattern
    zeros: int
    compare: Compare

    @classmethod
    def prepare(cls, module: Module, dense: Tensor, mask: Tensor, plan: LayerPlan) -> _Layer:
        import torch
        from torch.nn.utils import parametrize

        assert plan.criterion is not None
        assert plan.pattern is not None
        assert plan.asked is not None
        assert plan.zeros is not None
        assert isinstance(module.weight, torch.Tensor)
        pattern, zeros = parse_pattern(plan.pattern), plan.zeros
        compare = load_criterion(plan.criterion).compare
        with torch.no_grad():
            module.weight.copy_(torch.where(mask, module.weight, dense))
        parametrize.register_parametrization(module, "weight", straight_through(mask))
        return cls(module, pattern, zeros, compare)

    @property
    def _through(self) -> Any:
        return self.module.parametrizations.weight  # type: ignore[union-attr]

    @property
    def dense(self) -> Tensor:
        weight: Tensor = self._through.original
        return weight

    @property
    def mask(self) -> Tensor:
        mask: Tensor = self._through[0].mask
        return mask

    def follow(self) -> None:
        """Choose the mask anew from the dense weight as it is."""
        scores = self.dense.detach().abs()
        self._through[0].mask = keep_mask(scores, self.pattern, self.zeros, self.compare)

    def problem(self) -> str | None:
        """What the weight the layer computes with lacks; None if nothing."""
        weight: Any = self.module.weight
        if broken := violations(weight, self.pattern):
            return f"{broken} groups break the pattern {self.pattern}"
        if (found := int((weight == 0).sum())) < self.zeros:
            return f"{found:,} zeros where {self.zeros:,} are planned"
        return None


def straight_through(mask: Tensor) -> Module:
    """A parametrisation w → m ⊙ w whose gradient is the identity; `mask` may be replaced."""
    from torch import nn
    from torch.autograd import Function

    class Through(Function):
        @staticmethod
        def forward(context: Any, weight: Tensor, mask: Tensor) -> Tensor:
            return weight.masked_fill(~mask, 0.0)

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            return gradients[0], None

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = mask  # no buffer: distributed training would send it out at every step

        def forward(self, weight: Tensor) -> Tensor:
            masked: Tensor = Through.apply(weight, self.mask)  # type: ignore[no-untyped-call]
            return masked

    return Masked()


def refine(dense: Tensor, mask: Tensor, decay: float) -> None:
    """Add λ (1 − m) ⊙ w to the gradient of w: once a step, where the backward pass of a batch in
    parts would do it once a part."""
    if dense.grad is not None:
        dense.grad += decay * dense.detach().masked_fill(mask, 0.0)
