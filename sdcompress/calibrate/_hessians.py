"""Sums of x xᵀ over all that a layer is given, for methods that know how inputs go together."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from sdcompress.calibrate._layers import is_conv
from sdcompress.calibrate._packages import hessian_shape

if TYPE_CHECKING:
    from torch import Tensor

NAMES = frozenset({"hessian", "step_hessian"})
_FIRST, _LAST = 1.2, 0.8  # weights of the first and the last denoising step
_PANEL = 256  # rows of a product at a time
_CHUNK = 2**24  # numbers of an unfolded input at a time: 64 MiB in fp32


def step_weight(step: int, steps: int) -> float:
    """The weight α of denoising step `step` (from 0) of `steps`: 1.2 at first, 0.8 at last.

    α = 0.8 + 0.4 ln(T - i) / ln T falls slowly while there is noise, then fast (OBS-Diff, Zhu et
    al. 2025, arXiv 2510.06751: an error at an early step goes through all the later ones).
    """
    if steps < 2:
        return 1.0
    left = max(1, steps - step)  # some schedulers take more steps than they list
    return _LAST + (_FIRST - _LAST) * math.log(left) / math.log(steps)


class Hessians:
    """Σ x xᵀ over the columns of a layer's weight, plain and weighted by step, in fp64.

    A Conv is unfolded a few rows of the picture at a time. Products are taken in fp32.
    """

    def __init__(self, module: Any, names: Collection[str], max_hessian: int) -> None:
        import torch

        self._module = module
        shape = hessian_shape(tuple(module.weight.shape), max_hessian)
        self._blocks = len(shape) == 3
        self._sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=module.weight.device)
            for name in sorted(names)
        }

    def add(self, x: Tensor, output: Tensor, weight: float) -> None:
        """[N, C, H, W] for a Conv, [..., in] for a Linear; `weight` is that of the step."""
        for columns in self._columns(x, output) if self._sums else ():
            # [columns, places], or [R·S, C, places] where every position has a block of its own.
            count = columns.shape[-2]
            for top in range(0, count, _PANEL):  # what is left of the diagonal follows from it
                panel = slice(top, min(top + _PANEL, count))
                product = columns[..., panel, :] @ columns[..., top:, :].mT
                for name, total in self._sums.items():
                    alpha = weight if name == "step_hessian" else 1.0
                    total[..., panel, top:].add_(product, alpha=alpha)

    def _columns(self, x: Tensor, output: Tensor) -> Iterator[Tensor]:
        x = x.float()
        if not is_conv(self._module):
            yield x.flatten(0, -2).mT
            return
        for windows in _unfold(self._module, x, output):
            yield windows if self._blocks else windows.flatten(0, 1)

    def statistics(self) -> dict[str, Tensor]:
        """The sums of all processes."""
        from accelerate.utils import reduce

        found = {}
        for name, total in self._sums.items():
            upper = reduce(total, "sum").cpu().triu()
            found[name] = upper + upper.triu(1).mT
        return found

    def is_finite(self) -> bool:
        """Whether all that came by was; what is not shows on the diagonal."""
        diagonals = (total.diagonal(dim1=-2, dim2=-1) for total in self._sums.values())
        return all(bool(diagonal.isfinite().all()) for diagonal in diagonals)


def _unfold(conv: Any, x: Tensor, output: Tensor) -> Iterator[Tensor]:
    """[R·S, C, places] for a few rows of the output at a time."""
    import torch
    from torch.nn.functional import pad

    height, width = output.shape[-2:]
    (tall, wide), (down, right), (below, beside) = conv.kernel_size, conv.stride, conv.dilation
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # Channels first: what one weight meets then lies in one piece.
    image = pad(x, conv._reversed_padding_repeated_twice, mode=mode).transpose(0, 1)
    rows = max(1, _CHUNK // (image.shape[0] * tall * wide * image.shape[1] * width))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        positions = [
            image[
                :,
                :,
                top * down + r * below : (bottom - 1) * down + r * below + 1 : down,
                s * beside : (width - 1) * right + s * beside + 1 : right,
            ].flatten(1)
            for r in range(tall)
            for s in range(wide)
        ]
        yield torch.stack(positions)
