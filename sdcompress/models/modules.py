"""A component as a torch module, as wide as its config says, narrower blocks included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.catalog import read_config, weight_files
from sdcompress.errors import InputError
from sdcompress.structure import KEY

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "text_model."  # of a text encoder's names in files, and in transformers before 5


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The module that `config` describes: a CLIPTextModel, UNet2DConditionModel or AutoencoderKL.

    Its values are whatever the library begins with; make it under `torch.device("meta")` where
    they do not matter.

    Raises:
        InputError: the config names a block that the module does not have.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    plain = {key: value for key, value in config.items() if key != KEY}
    if component == "text_encoder":
        module: nn.Module = CLIPTextModel(CLIPTextConfig(**plain))
    else:
        classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        module = classes[component].from_config(plain)
    return narrow(module, config.get(KEY, {}))


def narrow(module: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """The same module, in place, its blocks of these names as wide as said; their weights are new.

    Raises:
        InputError: there is no such block, or it cannot have that width.
    """
    for name, width in widths.items():
        parent, _, own = _spelt(module, name).rpartition(".")
        around = module.get_submodule(parent)
        block = getattr(around, own)
        how = next((how for part, how in _NARROW if hasattr(block, part)), None)
        if how is None:
            raise InputError(
                f"{KEY}: expected the name of a feed-forward, an attention or a ResNet block, "
                f"found {name}; make the bundle again"
            )
        setattr(around, own, how(block, width))
    return module


def _spelt(module: nn.Module, name: str) -> str:
    """The name as the loaded libraries spell it: transformers 5 drops the text model's prefix."""
    for spelling in (name, name.removeprefix(PREFIX), PREFIX + name):
        with suppress(AttributeError):
            module.get_submodule(spelling)
            return spelling
    raise InputError(
        f"{KEY}: the model has no block {name}; config.json and weights belong to different "
        "models, make the bundle again"
    )


def _feed_forward(block: Any, width: int) -> Any:
    projection = block.net[0].proj
    halves = projection.out_features // block.net[2].in_features  # two in a GEGLU
    block.net[0].proj = _linear(projection, outputs=halves * width)
    block.net[2] = _linear(block.net[2], inputs=width)
    return block


def _mlp(block: Any, width: int) -> Any:
    block.fc1, block.fc2 = _linear(block.fc1, outputs=width), _linear(block.fc2, inputs=width)
    return block


def _attention(block: Any, width: int) -> Any:
    block.heads = _whole(width, block.inner_dim // block.heads, "heads")
    block.sliceable_head_dim = block.heads
    block.inner_dim = block.inner_kv_dim = width
    for name in ("to_q", "to_k", "to_v"):
        setattr(block, name, _linear(getattr(block, name), outputs=width))
    block.to_out[0] = _linear(block.to_out[0], inputs=width)
    return block


def _clip_attention(block: Any, width: int) -> Any:
    """CLIP's own forward gives its output the model's width before the projection, so that it is
    done here for what there is; the masks come by the names that transformers 4 and 5 have.
    """
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    size, scale = int(block.head_dim), float(block.scale)
    _whole(width, size, "heads")

    class CLIPAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = _linear(block.q_proj, outputs=width)
            self.k_proj = _linear(block.k_proj, outputs=width)
            self.v_proj = _linear(block.v_proj, outputs=width)
            self.out_proj = _linear(block.out_proj, inputs=width)

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            causal_attention_mask: Tensor | None = None,
            output_attentions: bool = False,
            is_causal: bool = False,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            masks = [m for m in (attention_mask, causal_attention_mask) if m is not None]
            mask = sum(masks[1:], masks[0]) if masks else None
            shape = (*hidden_states.shape[:-1], -1, size)
            q, k, v = (
                layer(hidden_states).view(shape).transpose(1, 2)
                for layer in (self.q_proj, self.k_proj, self.v_proj)
            )
            mixed = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal and mask is None, scale=scale
            )
            out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
            return out, None

    return CLIPAttention()


def _resnet(block: Any, width: int) -> Any:
    from torch import nn

    norm, projection = block.norm2, block.time_emb_proj
    groups = _whole(width, norm.num_channels // norm.num_groups, "groups of its GroupNorm")
    if projection is not None:
        each = projection.out_features // norm.num_channels
        block.time_emb_proj = _linear(projection, outputs=each * width)
    block.conv1 = _conv(block.conv1, outputs=width)
    place = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    block.norm2 = nn.GroupNorm(groups, width, eps=norm.eps, **place)
    block.conv2 = _conv(block.conv2, inputs=width)
    return block


_NARROW = (
    ("fc1", _mlp),
    ("net", _feed_forward),
    ("to_q", _attention),
    ("q_proj", _clip_attention),
    ("conv2", _resnet),
)


def _whole(width: int, size: int, what: str) -> int:
    count, rest = divmod(width, size)
    if rest or not count:
        raise InputError(
            f"{KEY}: expected a width of whole {what} of {size}, found {width}; make the bundle "
            "again"
        )
    return count


def _linear(like: Any, inputs: int | None = None, outputs: int | None = None) -> Any:
    from torch import nn

    return nn.Linear(
        inputs or like.in_features,
        outputs or like.out_features,
        bias=like.bias is not None,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )


def _conv(like: Any, inputs: int | None = None, outputs: int | None = None) -> Any:
    from torch import nn

    return nn.Conv2d(
        inputs or like.in_channels,
        outputs or like.out_channels,
        like.kernel_size,
        like.stride,
        like.padding,
        like.dilation,
        bias=like.bias is not None,
        padding_mode=like.padding_mode,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )


def is_narrow(folder: Path) -> bool:
    """Whether blocks of this component have become narrower, so that no other library loads it."""
    return bool(read_config(folder).get(KEY))


def load(folder: Path, component: str) -> nn.Module:
    """A component with its weights as they are stored, in inference mode, on the CPU.

    Raises:
        InputError: the weights do not fit the config.
    """
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    with init_empty_weights():  # buffers stay, which no file has
        module = build(component, read_config(folder))
    names = {spelling: key for key in module.state_dict() for spelling in _spellings(key)}
    state = {
        names.get(key, key): value
        for file in weight_files(folder)
        for key, value in load_file(file).items()
    }
    reason = ""
    try:
        # Old files hold more: position_ids, which modules make their own of.
        missing = module.load_state_dict(state, strict=False, assign=True).missing_keys
        reason = f"there is no {missing[0]}" if missing else ""
    except RuntimeError as e:
        reason = str(e).splitlines()[-1].strip().rstrip(".")
    if reason:
        raise InputError(
            f"{folder}: the weights do not fit config.json ({reason}); download or make the model "
            "again"
        )
    return module.eval()


def _spellings(key: str) -> Iterator[str]:
    """A tensor's name as modules have it, and those that files can have for it."""
    yield from (key, f"{PREFIX}{key}", key.removeprefix(PREFIX))
    if match := re.fullmatch(r"(.*\.attentions\.\d+\.)(to_[qkv]|to_out\.0)(\..*)", key):
        yield f"{match[1]}{_OLD_VAE_NAMES[match[2]]}{match[3]}"


# What diffusers before 0.18 called the parts of a VAE's attention; SD2's files are that old.
_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
