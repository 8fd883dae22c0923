"""Sums over all that a layer is given while the model paints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdcompress.calibrate import _hessians
from sdcompress.calibrate._layers import is_conv, unused
from sdcompress.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

_POWERS = {"input_sq_norm": {2}, "input_mean": {1}, "input_var": {1, 2}}  # which sums each needs


class Inputs:
    """Sums over all that one layer is given: of x, of x², of x xᵀ, and how many x a weight met.

    `weight()` is that of the denoising step which is under way. A Conv of more than `max_hessian`
    columns has one Hessian for each position in its kernel.
    """

    def __init__(
        self,
        module: Any,
        statistics: frozenset[str],
        *,
        max_hessian: int = 8192,
        weight: Callable[[], float] = lambda: 1.0,
    ) -> None:
        import torch

        self.module = module
        self._weight = weight
        self._count = 0
        # The weight's shape but for the outputs, with every channel whatever the groups.
        channels = module.in_channels if is_conv(module) else module.in_features
        shape = (channels, *module.weight.shape[2:])
        self._sums = {
            power: torch.zeros(shape, dtype=torch.float64, device=module.weight.device)
            for power in sorted(set().union(*(_POWERS.get(s, ()) for s in statistics)))
        }
        self._hessians = _hessians.Hessians(module, statistics & _hessians.NAMES, max_hessian)

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook: [N, C, H, W] for a Conv, [..., in] for a Linear."""
        (x,) = args
        for power, total in self._sums.items():
            values = x if power == 1 else x * x
            total += (
                _sum_conv(self.module, values, output) if is_conv(self.module) else _sum(values)
            )
        self._hessians.add(x, output, self._weight())
        self._count += output.numel() // output.shape[1 if is_conv(self.module) else -1]

    def check(self, name: str) -> None:
        """Raise InputError where nothing came by, or what nobody can count with."""
        if not self._count:
            raise unused(name)
        finite = all(bool(total.isfinite().all()) for total in self._sums.values())
        if not (finite and self._hessians.is_finite()):
            raise InputError(
                f"{name}: expected finite activations, found NaN or infinity: the model makes no "
                "pictures in fp32; use a checkpoint that does"
            )

    def statistics(self, names: frozenset[str]) -> dict[str, Tensor]:
        """The sums of all processes as `criteria.LayerStats` describes them."""
        import torch
        from accelerate.utils import reduce

        count = torch.tensor(self._count, device=self.module.weight.device)
        count = reduce(count, "sum").item()
        sums = {power: reduce(total, "sum").cpu() for power, total in self._sums.items()}
        compute = {
            "input_sq_norm": lambda: sums[2],
            "input_mean": lambda: sums[1] / count,
            "input_var": lambda: (sums[2] / count - (sums[1] / count) ** 2).clamp(min=0),
        }
        moments = {
            name: _like_weight(compute[name](), self.module)
            for name in sorted(names & set(compute))
        }
        return moments | self._hessians.statistics()


def _sum(values: Tensor) -> Tensor:
    """[..., in] → [in]."""
    import torch

    return values.flatten(0, -2).sum(0, dtype=torch.float64)


def _sum_conv(conv: Any, values: Tensor, output: Tensor) -> Tensor:
    """[N, C, H, W] → [C, R, S]: for each place in the kernel, the sum of all it comes to lie on.

    Adding up the pictures first changes nothing, and spares unfolding each of them.
    """
    import torch
    from torch.nn.functional import pad

    height, width = output.shape[-2:]
    (tall, wide), (down, right), (below, beside) = conv.kernel_size, conv.stride, conv.dilation
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    image = values.sum(0, dtype=torch.float64)
    image = pad(image, conv._reversed_padding_repeated_twice, mode=mode)
    sums = [
        image[:, r * below :: down, s * beside :: right][:, :height, :width].sum((1, 2))
        for r in range(tall)
        for s in range(wide)
    ]
    return torch.stack(sums, 1).reshape(-1, tall, wide)


def _like_weight(statistic: Tensor, module: Any) -> Tensor:
    """[C, ...] → [1, C, ...], or [K, C/groups, ...] for a Conv with groups."""
    groups = module.groups if is_conv(module) else 1
    outputs = module.weight.shape[0] // groups if groups > 1 else 1
    return statistic.reshape(groups, -1, *statistic.shape[1:]).repeat_interleave(outputs, 0)
