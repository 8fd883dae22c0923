"""What a pruned model costs: its zeros, the arithmetic of a picture, the bytes to ship."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from sdcompress.bundle import Bundle, to_json, tool_versions, write_json
from sdcompress.catalog import read_config
from sdcompress.evaluation.files import contents
from sdcompress.evaluation.images import picture_size
from sdcompress.models.modules import build
from sdcompress.plan import Accounting, SparsityPlan, account
from sdcompress.search.bisect import Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdcompress.evaluation.quality import QualitySettings
    from sdcompress.recipe import Recipe

Most = Literal["sparsity", "macs", "bytes"]
COSTS = "costs"
# The parts of a recipe that a cost depends on.
DECIDES = {"seed", "prune", "calibration", "schedule"}
FLOPS_PER_MAC = 2  # one multiplication, one addition: how torch counts


class Cost(Record):
    """`zeros` of all components; `macs` of a picture that are not by a zero; `bytes` packed.

    `accounting` is None for the dense model.
    """

    zeros: int
    macs: int
    bytes: int
    accounting: Accounting | None

    def rank(self, most: Most) -> int:
        """Less is better."""
        return {"sparsity": -self.zeros, "macs": self.macs, "bytes": self.bytes}[most]


def _folders(recipe: Recipe) -> list[str | None]:
    """Those whose pictures a pruned model depends on."""
    between = recipe.schedule.tune
    return [recipe.calibration.images, between.images if between else None]


def weigh(dense: Bundle, recipe: Recipe | None, settings: QualitySettings, work: Path) -> Cost:
    """What `dense` costs pruned by `recipe`, or as it is; kept in `work/costs`.

    The model is really pruned and packed, and both are removed again.
    """
    from sdcompress.packing import pack
    from sdcompress.rounds import prune_in_rounds

    made_of = {
        "dense": dense.digest,
        "recipe": recipe and recipe.model_dump(mode="json", include=DECIDES),
        "pictures": settings.model_dump(include={"steps", "guidance", "height", "width"}),
        "tools": tool_versions(),
        "files": contents(*_folders(recipe)) if recipe else {},
    }
    digest = hashlib.sha256(to_json(made_of).encode()).hexdigest()
    file = work / COSTS / f"{digest}.json"
    with suppress(OSError, ValidationError):
        return Cost.model_validate_json(file.read_bytes())
    folder = work / COSTS / digest[:32]
    shutil.rmtree(folder, ignore_errors=True)  # what a process that was killed has left
    folder.mkdir(parents=True)
    model = prune_in_rounds(dense, recipe, folder / "pruned") if recipe else dense
    packed = pack(model, folder / "packed.sdz").packed_bytes
    macs, plan = picture_macs(model.path, settings), model.manifest.plan if recipe else None
    shutil.rmtree(folder)
    accounting = account(plan) if plan else None
    cost = Cost(
        zeros=accounting.pipeline.zeros if accounting else 0,
        macs=sum(macs_left(plan, macs).values() if plan else (m.total for m in macs.values())),
        bytes=packed,
        accounting=accounting,
    )
    write_json(file, cost.model_dump(mode="json"))
    return cost


class Macs(Record):
    """Multiply-accumulates of one component for a picture: all, and of each layer with weights."""

    total: int
    layers: dict[str, int]


def picture_macs(model: Path, settings: QualitySettings) -> dict[str, Macs]:
    """What a model computes for one picture, zeros or not: component → Macs, layers by module.

    The text encoder reads the prompt once, the UNet runs once a step, the VAE decodes once; with
    guidance the first two work for two branches. Every product counts, those of attention and those
    with the padding of a convolution too. Counted by torch on its meta device: nothing is computed.

    Raises:
        UsageError: a size that does not fit the model.
    """
    import torch
    from torch import nn

    with torch.device("meta"):
        text_encoder, unet, vae = _modules(model)
        decode = nn.Sequential()  # in place of vae.decode, which is no module that is called
        for name in ("post_quant_conv", "decoder"):
            if part := getattr(vae, name):
                decode.add_module(name, part)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        sides = picture_size(model, settings.height, settings.width)
        latents = torch.empty(1, unet.config.in_channels, *(side // scale for side in sides))
        tokens = torch.zeros(1, text_encoder.config.max_position_embeddings, dtype=torch.long)
        text = torch.empty(*tokens.shape, text_encoder.config.hidden_size)
        branches = 2 if settings.guidance > 1 else 1
        return {
            "text_encoder": _count(text_encoder, branches, tokens),
            "unet": _count(unet, branches * settings.steps, latents, torch.tensor(0), text),
            "vae": _count(decode, 1, latents),
        }


def _modules(model: Path) -> tuple[Any, Any, Any]:
    parts = ("text_encoder", "unet", "vae")
    text_encoder, unet, vae = (build(part, read_config(model / part)) for part in parts)
    return text_encoder, unet, vae


def _count(module: nn.Module, times: int, *inputs: Tensor) -> Macs:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    root = f"{type(module).__name__}."
    called = {
        name.removeprefix(root): sum(by_operator.values()) // FLOPS_PER_MAC * times
        for name, by_operator in counter.get_flop_counts().items()
        if name.startswith(root)
    }
    leaves = {name for name, m in module.named_modules() if not any(m.children())}
    return Macs(
        total=counter.get_total_flops() // FLOPS_PER_MAC * times,
        layers={_module(name): macs for name, macs in called.items() if name in leaves},
    )


def macs_left(plan: SparsityPlan, dense: Mapping[str, Macs]) -> dict[str, int]:
    """Multiply-accumulates that are not by a zero weight: component → count.

    Every weight of a Linear or Conv layer is used equally often, so that a layer keeps the share of
    its arithmetic that it keeps of its weights. What has no part in a picture, such as the encoder
    of the VAE, counts nothing.
    """
    left = {component: macs.total for component, macs in dense.items()}
    for layer in plan.layers:
        if layer.pruned and (macs := dense[layer.component].layers.get(_module(layer.name))):
            left[layer.component] -= macs * (layer.zeros or 0) // layer.numel
    return left


def _module(key: str) -> str:
    """The module of a weight; transformers 5 does not call it by the prefix that files have."""
    return key.removesuffix(".weight").removeprefix("text_model.")
