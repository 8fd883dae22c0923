"""How far each component goes alone, and all of them together, by bisection on the cliff.

Bisection takes for granted that more zeros never make quality better. That need not be so, and only
measuring every point could tell. What is promised is therefore no more than what was measured: the
end of a line holds, and the next step does not or is the end of the range. The step below the end
is measured as well, and every pair of points that speaks against the assumption is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sdcompress.errors import UsageError

Sparsities = dict[str, float]  # component → fraction of zeros asked; what is not named is dense
Steps = dict[str, int]  # the same in multiples of the resolution


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kept(Record):
    """One metric in the terms of its limit, "at most" or "at least" that, with its interval.

    `margin` is how far within the limit it is, as a share of the limit; negative beyond it. `holds`
    and `margin` speak of the worse end of the interval, or of `value` where that was asked.
    """

    value: float
    low: float
    high: float
    limit: float
    at: Literal["most", "least"]
    margin: float
    holds: bool

    @property
    def value_holds(self) -> bool:
        return self.value >= self.limit if self.at == "least" else self.value <= self.limit


class Trial(Record):
    """A point that was measured, and the line that asked for it first."""

    line: str
    sparsity: Sparsities
    kept: dict[str, Kept]

    @property
    def holds(self) -> bool:
        return all(kept.holds for kept in self.kept.values())

    @property
    def margin(self) -> float:
        """That of the limit which is nearest, or left farthest behind."""
        return min(kept.margin for kept in self.kept.values())


class Line(Record):
    """A line of ever more sparsity: the last point that holds, and the next, which does not.

    `end` is None where not even the first step holds, `beyond` where the whole range does.
    """

    name: str
    end: Trial | None
    beyond: Trial | None


class Outcome(Record):
    """Each component alone, several together (if two or more bear any), and all measured points."""

    alone: dict[str, Line]
    together: tuple[Line, ...]
    trail: tuple[Trial, ...]
    contradictions: tuple[str, ...]

    @property
    def candidates(self) -> tuple[Trial, ...]:
        """The ends of all lines, each point once: nothing that was measured is better than all."""
        ends = (line.end for line in (*self.alone.values(), *self.together))
        return tuple({_key(end.sparsity): end for end in ends if end}.values())


Measure = Callable[[Mapping[str, float]], Mapping[str, Kept]]
Announce = Callable[[str], None]


def bisect(
    measure: Measure,
    components: Sequence[str],
    *,
    resolution: float,
    announce: Announce = lambda what: None,
) -> Outcome:
    """The most sparsity each of `components` bears with the others dense, and all together.

    Sparsities are multiples of `resolution`, above 0 and below 1. A line of n steps takes at most
    ceil(log2(n + 1)) measurements, and one for the step below its end; no point is measured twice.

    Together no component can go further than alone. Where all of them at their most leave the
    budget, straight lines below are followed: all in proportion, and for each component the others
    in proportion while it stays at its most.

    Raises:
        UsageError: a resolution outside 0 to 0.5, or no component.
    """
    if not 0 < resolution <= 0.5:
        raise UsageError(
            f"resolution: expected more than 0 and at most 0.5, found {resolution:g}; take 0.01"
        )
    if not components:
        raise UsageError("no component to search in; name one, such as unet")
    return _Bisection(measure, tuple(dict.fromkeys(components)), resolution, announce).run()


class _Bisection:
    def __init__(
        self,
        measure: Measure,
        components: tuple[str, ...],
        resolution: float,
        announce: Announce,
    ) -> None:
        self._measure, self._components = measure, components
        self._resolution, self._announce = resolution, announce
        self._trials: dict[frozenset[tuple[str, float]], Trial] = {}

    def run(self) -> Outcome:
        last = math.ceil(round(1 / self._resolution, 6)) - 1  # the step before all is zero
        alone, most = {}, {}
        for c in self._components:
            steps, alone[c] = self._climb(f"{c} alone", {}, {c: last})
            if steps:
                most[c] = steps
        together = self._together(most) if len(most) > 1 else ()
        trail = tuple(self._trials.values())
        return Outcome(
            alone=alone, together=together, trail=trail, contradictions=contradictions(trail)
        )

    def _together(self, most: Steps) -> tuple[Line, ...]:
        name = "all at their most"
        top = self._try(name, most, "where every line ends")
        if top.holds:
            return (Line(name=name, end=top, beyond=None),)
        lines = [self._climb("all in proportion", {}, most, top_fails=True)]
        for c in most:
            others = {other: steps for other, steps in most.items() if other != c}
            lines.append(self._climb(f"{c} at its most", {c: most[c]}, others, top_fails=True))
        return tuple(line for _, line in lines)

    def _climb(
        self, name: str, start: Steps, way: Steps, *, top_fails: bool = False
    ) -> tuple[int, Line]:
        """Bisect the straight line from `start`, which holds, to `start` and `way` together.

        Returns how many steps of it hold, and the line.
        """
        top = max(way.values())

        def point(step: int) -> Steps:
            return start | {c: k * step // top for c, k in way.items()}

        holds, fails = 0, top if top_fails else top + 1
        while fails - holds > 1:
            middle = (holds + fails) // 2
            bounds = f"between {self._text(point(holds))} and {self._text(point(min(fails, top)))}"
            if self._try(name, point(middle), bounds).holds:
                holds = middle
            else:
                fails = middle
        if holds > 1:
            self._try(name, point(holds - 1), "the step below the end")
        line = Line(
            name=name,
            end=self._try(name, point(holds), "the end") if start or holds else None,
            beyond=self._try(name, point(fails), "the step above the end")
            if fails <= top
            else None,
        )
        return holds, line

    def _try(self, line: str, steps: Steps, why: str) -> Trial:
        sparsity = self._sparsities(steps)
        if (known := self._trials.get(_key(sparsity))) is None:
            self._announce(f"{line}: measuring {describe(sparsity)}, {why}")
            known = Trial(line=line, sparsity=sparsity, kept=dict(self._measure(sparsity)))
            self._trials[_key(sparsity)] = known
        return known

    def _text(self, steps: Steps) -> str:
        return describe(self._sparsities(steps))

    def _sparsities(self, steps: Steps) -> Sparsities:
        there = [c for c in self._components if steps.get(c)]
        return {c: round(steps[c] * self._resolution, 9) for c in there}


def _key(sparsity: Mapping[str, float]) -> frozenset[tuple[str, float]]:
    return frozenset(sparsity.items())


def describe(sparsity: Mapping[str, float]) -> str:
    """`text_encoder 0.45, unet 0.3`, or `dense`."""
    return ", ".join(f"{c} {s:g}" for c, s in sparsity.items()) or "dense"


def contradictions(trail: Sequence[Trial]) -> tuple[str, ...]:
    """A sentence for each two points of which the one with more zeros alone keeps the budget."""
    return tuple(
        f"{describe(less.sparsity)} leaves the budget, {describe(more.sparsity)} keeps it"
        for less, more in permutations(trail, 2)
        if more.holds
        and not less.holds
        and all(s <= more.sparsity.get(c, 0.0) for c, s in less.sparsity.items())
    )
