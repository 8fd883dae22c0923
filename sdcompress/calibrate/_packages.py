"""Which layers are calibrated together, and what their statistics weigh."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from sdcompress.criteria import GRADIENTS

_NUMBER = 8  # bytes: fp64
_HESSIANS = {"hessian", "step_hessian"}

# Parts of layers' names in the order in which they run; all others come after these.
_WORDS = (
    *("text_encoder", "unet", "vae"),
    *("embeddings", "encoder", "final_layer_norm", "quant_conv", "post_quant_conv", "decoder"),
    *("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"),
    *("resnets", "attentions", "downsamplers", "upsamplers"),
    *("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    *("proj_in", "transformer_blocks", "proj_out"),
    *("self_attn", "mlp", "attn1", "attn2", "ff"),
    *("to_q", "to_k", "to_v", "to_out", "q_proj", "k_proj", "v_proj", "out_proj"),
)
_IN_TURN = {"resnets", "attentions"}  # resnets.0, attentions.0, resnets.1, ...
_LAST = {"downsamplers", "upsamplers"}  # of their block


def statistics_bytes(shape: tuple[int, ...], names: Collection[str], max_hessian: int) -> int:
    """Bytes that the statistics `names` take of a layer whose weight has this shape."""
    columns = math.prod(shape[1:])
    total = 0
    for name in names:
        if name in _HESSIANS:
            total += math.prod(hessian_shape(shape, max_hessian))
        else:
            total += columns * (shape[0] if name in GRADIENTS else 1)
    return total * _NUMBER


def hessian_shape(shape: tuple[int, ...], max_hessian: int) -> tuple[int, ...]:
    """[columns, columns], or [R·S, C, C] for a Conv [K, C, R, S] of more than `max_hessian`, if it
    has more than one position.
    """
    channels, positions = shape[1], math.prod(shape[2:])
    columns = channels * positions
    if positions > 1 and columns > max_hessian:
        return (positions, channels, channels)
    return (columns, columns)


def packages(
    layers: Sequence[tuple[str, str, int]], count: int
) -> list[list[tuple[str, str, int]]]:
    """Cut layers (component, name, bytes) into `count` packages of about the same bytes.

    Layers come in the order in which the model runs them, so that each package sees what pruning
    the ones before it has done. There are fewer packages where there are fewer layers, and none
    is empty.
    """
    left = sorted(layers, key=_in_order)
    cut = []
    for parts in range(min(count, len(left)), 0, -1):
        share = sum(size for *_, size in left) / parts
        taken, size = 1, left[0][2]
        while len(left) - taken >= parts and (parts == 1 or size + left[taken][2] / 2 <= share):
            size += left[taken][2]
            taken += 1
        cut.append(left[:taken])
        left = left[taken:]
    return cut


def _in_order(layer: tuple[str, str, int]) -> tuple[tuple[float, int, str], ...]:
    """Sorts layers as they run: by the parts of their names, each as (number, place, word)."""
    component, name, _ = layer
    parts = [component, *name.removeprefix("text_model.").split(".")]
    key: list[tuple[float, int, str]] = []
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if part.isdecimal():
            key.append((int(part), 0, ""))
            continue
        place = _WORDS.index(part) if part in _WORDS else len(_WORDS)
        number = math.inf if part in _LAST else 0
        key.append((int(following) if part in _IN_TURN else number, place, part))
    return tuple(key)
