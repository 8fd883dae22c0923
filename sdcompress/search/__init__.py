"""The most a model can be pruned within a budget of quality: each component alone, then together.

`bisect` finds the points where quality falls off, `budget` judges what was measured, `cost` says
what a pruned model costs. Here they come together, with real models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from sdcompress.bundle import Bundle
from sdcompress.catalog import read_catalog
from sdcompress.errors import UsageError
from sdcompress.evaluation.metrics import load_metric
from sdcompress.patterns import UNSTRUCTURED, parse_pattern
from sdcompress.plan import make_plan
from sdcompress.search.bisect import Kept, Outcome, Record, Trial, bisect, describe
from sdcompress.search.budget import in_words, judge
from sdcompress.search.cost import Cost, Most, weigh
from sdcompress.sweep.points import Part, Point, alone, measure_point, point_recipe

if TYPE_CHECKING:
    from sdcompress.evaluation.quality import QualitySettings
    from sdcompress.recipe import Recipe

Progress = Callable[[int, int], None]  # pictures made, of how many
MEANING = {
    "sparsity": "zeros",
    "macs": "multiply-accumulates saved",
    "bytes": "bytes saved",
}


class Request(Record):
    """What is searched: in which components, pruned how, within which budget, for the most of what.

    `budget`: metric → limit, as `budget.parse_budget` reads it. `by_value`: figures hold by
    themselves, and not by the worse end of their interval.
    """

    components: tuple[str, ...]
    budget: dict[str, float]
    by_value: bool = False
    criterion: str = "magnitude"
    scope: Literal["linear", "conv", "all"] = "all"
    most: Most = "sparsity"
    resolution: float = 0.01

    def recipe(self, sparsity: Mapping[str, float], name: str = "point") -> Recipe:
        """The recipe of one point."""
        parts = {
            component: Part(criterion=self.criterion, sparsity=value, scope=self.scope)
            for component, value in sparsity.items()
        }
        return point_recipe(Point.model_validate({"parts": parts})).model_copy(
            update={"name": name}
        )


class Candidate(Record):
    """The end of a line, and what the model costs there."""

    trial: Trial
    cost: Cost


class Found(Record):
    """All that a search has come to; `answer` is None where nothing keeps the budget.

    `warnings`: what is wrong with how the metrics were measured, and with the pictures of points.
    """

    request: Request
    outcome: Outcome
    dense: Cost
    candidates: tuple[Candidate, ...]
    answer: Candidate | None
    warnings: tuple[str, ...] = ()


def refuse_fixed(pattern: str) -> None:
    """Raises UsageError: the pattern leaves nothing to search for."""
    if (parsed := parse_pattern(pattern)) != UNSTRUCTURED:
        raise UsageError(
            f"pattern {pattern} has one sparsity, {parsed.sparsity:g}, so there is none to search "
            f"for; measure it with `sdcompress sweep --pattern {pattern}`, or search unstructured"
        )


def check(dense: Bundle, request: Request, settings: QualitySettings) -> None:
    """What can be known before slow work.

    Raises:
        UsageError: the request does not fit the model, or a metric cannot be measured here.
    """
    for metric in request.budget:
        if why := load_metric(metric).why_not(settings, dense):
            raise UsageError(f"--keep {metric}: it cannot be measured: {why}")
    catalog = read_catalog(dense.path)
    for component in request.components:  # each has to have layers that can be pruned
        make_plan(request.recipe({component: request.resolution}), catalog)


def search(
    dense: Bundle,
    request: Request,
    settings: QualitySettings,
    work: Path,
    *,
    announce: Callable[[str], None] = lambda what: None,
    progress: Progress | None = None,
) -> Found:
    """Search in `dense`. What is measured is kept under `work`, where a search that was stopped
    goes on, and one with another budget finds the points they share.

    Raises:
        UsageError: the request does not fit the model, or a metric cannot be measured here.
    """
    check(dense, request, settings)
    with alone(work):
        return _search(dense, request, settings, work, announce, progress)


def _search(
    dense: Bundle,
    request: Request,
    settings: QualitySettings,
    work: Path,
    announce: Callable[[str], None],
    progress: Progress | None,
) -> Found:
    warnings: dict[str, None] = {}  # in order, each once

    def measure(sparsity: Mapping[str, float]) -> dict[str, Kept]:
        found = measure_point(dense, request.recipe(sparsity), settings, work, progress=progress)
        assert found.quality
        for metric, result in found.quality.metrics.items():
            warnings.update((f"{metric}: {warning}", None) for warning in result.warnings)
        point = describe(sparsity)
        warnings.update((f"{point}: {warning}", None) for warning in found.quality.warnings)
        return judge(found.quality, request.budget, by_value=request.by_value)

    def cost(sparsity: Mapping[str, float]) -> Cost:
        announce(f"packing {describe(sparsity)}")
        return weigh(dense, request.recipe(sparsity) if sparsity else None, settings, work)

    outcome = bisect(measure, request.components, resolution=request.resolution, announce=announce)
    candidates = [Candidate(trial=t, cost=cost(t.sparsity)) for t in outcome.candidates]
    # Of equals, the one that keeps its distance from the limits.
    candidates.sort(key=lambda c: (c.cost.rank(request.most), -c.trial.margin))
    return Found(
        request=request,
        outcome=outcome,
        dense=cost({}),
        candidates=tuple(candidates),
        answer=candidates[0] if candidates else None,
        warnings=tuple(warnings),
    )


def closest(found: Found) -> Trial:
    """Of all that was measured, what came nearest to keeping the budget."""
    return max(found.outcome.trail, key=lambda trial: trial.margin)


def recipe_text(
    found: Found,
    settings: QualitySettings,
    *,
    model: str,
    name: str,
    prompts: Sequence[str] | None,
    run: str,
    made_by: str,
) -> str:
    """The answer as a recipe, which opens with what it keeps.

    `prompts`: those that did not come with the model. `run`, `made_by`: command lines.
    """
    request, answer, dense = found.request, found.answer, found.dense
    assert answer is not None
    assert answer.cost.accounting is not None
    zeros = answer.cost.accounting.pipeline
    judged = "figures" if request.by_value else "the worse ends of their 95 % intervals"
    comment = [
        run,
        "",
        f"The most {MEANING[request.most]} within a budget of quality. Found by",
        f"  {made_by}",
        "",
        f"Kept on {len(settings.prompts)} prompts with seeds from {settings.seed}, by {judged}:",
        *(f"  {in_words(metric, kept)}" for metric, kept in answer.trial.kept.items()),
        f"Zeros: {zeros.zeros:,} of {zeros.parameters:,} parameters, {zeros.of_component:.1%}.",
        f"Multiply-accumulates that are not by a zero: {_share(answer.cost.macs, dense.macs)}.",
        f"Packed: {answer.cost.bytes:,} bytes, {_share(answer.cost.bytes, dense.bytes)}.",
    ]
    document: dict[str, Any] = {
        "name": name,
        "model": model,
        "prune": request.recipe(answer.trial.sparsity).model_dump(
            mode="json", include={"prune"}, exclude_none=True
        )["prune"],
        "sampling": settings.model_dump(
            include={"steps", "guidance", "height", "width"}, exclude_none=True
        ),
        "quality": settings.model_dump(include={"seed", "clip"}, exclude_none=True)
        | {"samples": len(settings.prompts)}
        | ({"prompts": list(prompts)} if prompts else {}),
    }
    lines = [f"# {_printable(line)}".rstrip() for line in comment]
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return "\n".join([*lines, text])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f} of the dense model's"


def _printable(line: str) -> str:
    """A line of a comment: what people typed may hold line breaks, and what YAML refuses."""
    return "".join(c if c.isprintable() else "?" for c in line)
