"""How many weights of a rule go, within what its limits leave, in counts that fit each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdcompress.allocation import Evidence, Group
from sdcompress.criteria import load_criterion
from sdcompress.errors import UsageError
from sdcompress.patterns import UNSTRUCTURED, planned_zeros, zeros_for
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    from sdcompress.recipe import Rule

_TOLERANCE = 1e-3  # of a rule's weights: by how much the sparsity asked for may be missed


@dataclass(frozen=True)
class Budget:
    """`total` weights go; each layer loses `least` to `most`, in steps of `quanta`.

    A quantum is the layer's number of rows where scores compete within rows, else 1.
    """

    layers: Sequence[LayerPlan]
    total: int
    quanta: Sequence[int]
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
        compare = load_criterion(rule.criterion).compare
        asked = layers[0].asked or 0.0  # one rule, one request
        quanta = [layer.shape[0] if compare == "row" else 1 for layer in layers]
        least, most = [], []
        for layer, step in zip(layers, quanta, strict=True):
            even = planned_zeros(UNSTRUCTURED, layer.shape, asked, compare)
            steps = layer.numel // step
            lowest = min(_up(rule.min_sparsity * steps) * step, even)
            least.append(max(lowest, _up(evidence.gone(layer) / step) * step))
            most.append(max(_down(rule.max_sparsity * steps) * step, even, least[-1]))
        numel = sum(layer.numel for layer in layers)
        wanted = zeros_for(asked, numel)
        if sum(least) - wanted > max(numel * _TOLERANCE, min(quanta)):
            raise UsageError(
                f"{layers[0].component}: expected layers that can come to {asked:.1%} together, "
                f"found {sum(least) / numel:.1%} at the least, by their limits or by earlier "
                "rounds; ask for more, or lower 'min_sparsity'"
            )
        total = min(max(wanted, sum(least)), sum(most))
        return cls(layers, total, quanta, least, most)

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
        """Counts of zeros, made whole quanta: those that lose most by rounding down come first.

        They add up to the total, or to a little more where no quantum is small enough.
        """
        counts = [
            min(max(_down(w / step) * step, least), most)
            for w, step, least, most in zip(wanted, self.quanta, self.least, self.most, strict=True)
        ]
        missing = self.total - sum(counts)

        def move(i: int, way: int) -> None:
            nonlocal missing
            counts[i] += way * self.quanta[i]
            missing -= way * self.quanta[i]

        def can(way: int, at_most: float = math.inf) -> list[int]:
            """Which layers can lose a quantum more (1) or less (-1)."""
            return [
                i
                for i, (n, step) in enumerate(zip(counts, self.quanta, strict=True))
                if self.least[i] <= n + way * step <= self.most[i] and step <= at_most
            ]

        def size(i: int) -> int:
            return self.quanta[i]

        for i in sorted(can(1), key=lambda i: (counts[i] - wanted[i]) / self.quanta[i]):
            if self.quanta[i] <= missing:
                move(i, 1)
        while fitting := can(1, at_most=missing):
            move(max(fitting, key=size), 1)
        if missing > 0 and (larger := can(1)):
            move(min(larger, key=size), 1)
            while fitting := can(-1, at_most=-missing):
                move(max(fitting, key=size), -1)
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
