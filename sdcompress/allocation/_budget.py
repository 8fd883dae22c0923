"""How many weights of a rule go, within what its limits leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcompress.allocation import Evidence, Group
from sdcompress.errors import UsageError
from sdcompress.patterns import zeros_for
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    from sdcompress.recipe import Rule

_TOLERANCE = 1e-3  # of a rule's weights: by how much the sparsity asked for may be missed


@dataclass(frozen=True)
class Budget:
    """`total` weights go; each layer loses `least` to `most`."""

    layers: Sequence[LayerPlan]
    total: int
    least: Sequence[int]
    most: Sequence[int]

    @classmethod
    def of(cls, layers: Sequence[LayerPlan], rule: Rule, evidence: Evidence) -> Budget:
        """What a rule asks of its layers.

        The sparsity asked for is within the limits of every layer, also where its rounding is not,
        or where an early round asks for less than the least of the last.

        Raises:
            UsageError: earlier rounds have taken more than is asked for now.
        """
        asked = layers[0].asked or 0.0  # one rule, one request
        least, most = [], []
        for layer in layers:
            even = zeros_for(asked, layer.numel)
            lowest = min(_up(rule.min_sparsity * layer.numel), even)
            least.append(max(lowest, evidence.gone(layer)))
            most.append(max(_down(rule.max_sparsity * layer.numel), even, least[-1]))
        numel = sum(layer.numel for layer in layers)
        wanted = zeros_for(asked, numel)
        if sum(least) - wanted > numel * _TOLERANCE:
            raise UsageError(
                f"{layers[0].component}: expected layers that can come to {asked:.1%} together, "
                f"found {sum(least) / numel:.1%} at the least, by their limits or by earlier "
                "rounds; ask for more, or lower 'min_sparsity'"
            )
        return cls(layers, min(max(wanted, sum(least)), sum(most)), least, most)

    def spread(self, at: Callable[[float], Sequence[float]]) -> list[Group]:
        """Find the x in 0..1 at which the layers lose what they should, within their limits.

        `at(x)` is the sparsity of each layer, which must not fall as x grows.
        """
        low, high = 0.0, 1.0
        for _ in range(64):
            middle = (low + high) / 2
            if sum(self._clamped(at(middle))) < self.total:
                low = middle
            else:
                high = middle
        return self.settle(self._clamped(at(high)))

    def settle(self, wanted: Sequence[float]) -> list[Group]:
        """Counts of zeros that add up to the total: those that lose most by rounding down come
        first, and what is still missing goes wherever there is room.
        """
        counts = [
            min(max(_down(w), least), most)
            for w, least, most in zip(wanted, self.least, self.most, strict=True)
        ]
        missing = self.total - sum(counts)
        by_rounding = sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])
        for room in (1, math.inf):
            for i in by_rounding:
                more = int(min(missing, room, self.most[i] - counts[i]))
                counts[i] += more
                missing -= more
        return [Group((layer,), n) for layer, n in zip(self.layers, counts, strict=True)]

    def _clamped(self, sparsities: Sequence[float]) -> list[float]:
        return [
            min(max(s * layer.numel, least), most)
            for s, layer, least, most in zip(
                sparsities, self.layers, self.least, self.most, strict=True
            )
        ]


def _up(number: float) -> int:
    return math.ceil(number - 1e-6)  # 0.3 of 10 is 3


def _down(number: float) -> int:
    return math.floor(number + 1e-6)
