"""What every tuning method is handed: the models, the masks, and the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.bundle import Bundle
from sdcompress.models import modules
from sdcompress.models.defaults import sampling_defaults
from sdcompress.models.prompts import prompts_for
from sdcompress.plan import LayerPlan, SparsityPlan
from sdcompress.recipe import Tune
from sdcompress.structure import Remains

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Module, Parameter

TUNABLE = ("text_encoder", "unet")
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def silent(what: str, done: int, total: int) -> None:
    """The progress nobody looks at."""


@dataclass
class Job:
    """One tuning, as a method sees it. A method changes `students` in place.

    students: text_encoder and unet of the parent, in fp32, on the accelerator's device; only those
        in `components` have parameters that require gradients.
    layers: component -> state-dict key -> the plan of each pruned tensor of `components`.
    masks: likewise, the weights that stay (True), on the same device. A method that moves zeros
        says so with `MOVES_MASKS = True` in its module and puts the final masks here.
    checkpoint: the file that `_loop.fit` keeps its state in; removed when the bundle is sealed.
    log: where the loss goes: a CSV file, or a folder of TensorBoard's.
    details: what a method wants told in the manifest; facts, no times.
    remains: component -> state-dict key -> what stayed of each tensor that is narrower than the
        dense model's.
    """

    settings: Tune
    parent: Bundle
    dense: Bundle
    plan: SparsityPlan
    components: tuple[str, ...]
    students: dict[str, Module]
    layers: dict[str, dict[str, LayerPlan]]
    masks: dict[str, dict[str, Tensor]]
    accelerator: Accelerator
    checkpoint: Path = Path("checkpoint.pt")
    log: Path = Path("log.csv")
    progress: Progress = silent
    details: dict[str, Any] = field(default_factory=dict)
    remains: dict[str, dict[str, Remains]] = field(default_factory=dict)

    @cached_property
    def teachers(self) -> dict[str, Module]:
        """The dense model's text_encoder and unet: fp32, frozen, loaded when first asked for."""
        return load_models(self.dense.path, self.accelerator.device)

    def left_of(self, component: str, key: str, dense: Tensor) -> Tensor:
        """What the student can have of one of the teachers' tensors."""
        remains = self.remains.get(component, {}).get(key)
        return remains.of(dense) if remains else dense

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.parent.path / "tokenizer")

    @property
    def sampling_steps(self) -> int:
        asked = self.settings.sampling_steps
        return int(sampling_defaults(self.dense)["steps"]) if asked is None else asked

    @property
    def guidance(self) -> float:
        """At 1 or below there is no unconditional branch."""
        asked = self.settings.guidance
        return float(sampling_defaults(self.dense)["guidance"]) if asked is None else asked

    def prompts(self, count: int) -> tuple[str, ...]:
        """`count` prompts: those of the settings, over again, or those that come with the model."""
        if not (own := self.settings.prompts):
            return prompts_for(self.dense, count, "learning")
        return tuple(own[i % len(own)] for i in range(count))

    def parameters(self) -> dict[str, Parameter]:
        """What is trained, by "component.key", in the order of the modules."""
        return {
            f"{component}.{name}": parameter
            for component in self.components
            for name, parameter in self.students[component].named_parameters()
            if parameter.requires_grad
        }


def load_models(path: Path, device: Any) -> dict[str, Module]:
    """text_encoder and unet of a diffusers directory in fp32, frozen."""
    return {
        name: modules.load(path / name, name).float().requires_grad_(False).to(device)
        for name in TUNABLE
    }


def state_key(component: str, name: str, keys: Any) -> str:
    """The state-dict key of a tensor in a file: transformers 5 drops the text model's prefix."""
    prefix = "text_model."
    if component != "text_encoder" or name in keys:
        return name
    return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
