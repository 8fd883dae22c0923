"""Pruning in rounds, each on what the last one left: recipe's `schedule` → pruned bundle.

    source ─ (shrink) ─ prune ─ (tune) ─ prune ─ (tune) ─ … ─ prune

Blocks that become narrower do so first, and once: what the rounds prune is what that has left.

What is finished lies sealed in a hidden folder beside the result, no more bundles at a time than
the next step needs. A call that was killed goes on from there when it is repeated; the folder goes
when the result is in its place.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdcompress import shrink, tuning
from sdcompress.bundle import (
    Bundle,
    link_files,
    locked,
    refuse_existing,
    seal,
    staging,
    to_json,
    tool_versions,
    write_json,
)
from sdcompress.calibrate import is_main_process, on_main_process
from sdcompress.catalog import Catalog, read_catalog
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.evaluation.files import contents
from sdcompress.latency import LatencyTable, read_table
from sdcompress.patterns import parse_pattern
from sdcompress.plan import SparsityPlan, account, make_plan
from sdcompress.prune import check as check_once
from sdcompress.prune import decisive, prune, record
from sdcompress.recipe import Recipe, Rule, Schedule, Tune

HISTORY = "rounds.json"  # in the folder: what each finished step reached, also those removed since
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
Tables = Mapping[str, LatencyTable]  # by component


def _silent(what: str, done: int, total: int) -> None:
    pass


def prune_in_rounds(
    source: Bundle,
    recipe: Recipe,
    out: Path,
    *,
    tables: Tables | None = None,
    replace: bool = False,
    fresh: bool = False,
    progress: Progress = _silent,
) -> Bundle:
    """Prune a weight bundle into a new bundle at `out`, in as many rounds as the recipe says.

    The result is one of stage "pruned" whose parent is `source`; its details say what each round
    reached. Where the recipe makes blocks narrower, that comes before all else; `tables` are for
    budgets of latency whose recipe names no file. `fresh` begins anew, whatever an earlier call has
    left. Under `accelerate launch` every process calls this, and the main one writes. `progress`
    counts as `shrink`, `prune` and `tune` do.

    Raises:
        UsageError: recipe, schedule and model do not fit together.
        InputError: weights or activations are not finite, the loss of a tuning diverges, `out`
            exists, or another process is at work on it.
    """
    check(source, recipe, tables)
    if not _prunes_weights(recipe):
        return shrink.shrink(source, recipe, out, tables=tables, replace=replace, progress=progress)
    if recipe.schedule.rounds == 1 and not shrink.asks(recipe):
        return prune(source, recipe, out, replace=replace, progress=progress)
    out = out.resolve()
    if not replace:
        refuse_existing(out)
    folder = out.with_name(f".{out.name}.rounds")
    steps = _steps(source, recipe, tables or {})
    with _alone(folder) if is_main_process() else nullcontext():
        if fresh:
            on_main_process(lambda: _remove_all_but((), folder))
        done, model = _resume(folder, steps, recipe.schedule)
        model = _go_on(source, recipe, tables, folder, steps, done, model, progress)
        on_main_process(lambda: _finish(recipe, folder, steps, model, out, replace))
    return Bundle.open(out)


def check(source: Bundle, recipe: Recipe, tables: Tables | None = None) -> SparsityPlan:
    """`check_recipe`, and that the source is one that tuning between rounds can learn from."""
    plan = check_recipe(recipe, read_catalog(source.path), tables)
    if recipe.schedule.tune:
        narrower = [c for c, section in recipe.prune.items() if section.structure]
        if source.outline.plan is not None:
            raise UsageError(
                f"{source.path}: expected a dense model, which tuning between rounds learns from, "
                f"found a {source.outline.stage} bundle; prune the model it was made from"
            )
        tuning.check(plan, recipe.schedule.tune, narrower)
    return plan


def check_recipe(recipe: Recipe, catalog: Catalog, tables: Tables | None = None) -> SparsityPlan:
    """What the last round will prune; what can be known without weights is found out here.

    Blocks that a budget decides on are taken as wide as they are.

    Raises:
        UsageError: schedule, rules and model do not fit together, or a budget cannot be met.
        InputError: see `prune.check`.
    """
    schedule, dense = recipe.schedule, catalog.parameters
    fates = shrink.check(recipe, catalog, tables)
    catalog = shrink.narrowed(catalog, fates)
    plan = check_once(recipe, catalog)
    removed = {
        component: None
        if any(fate.kept is None for fate in several)
        else dense[component] - plan.parameters[component]
        for component, several in fates.items()
    }
    plan = plan.model_copy(update={"removed": removed})
    if schedule.rounds == 1:
        given = schedule.model_dump(exclude_defaults=True, exclude={"rounds"})
        if given:
            raise UsageError(
                f"schedule: {next(iter(given))!r} is about several rounds, found 'rounds: 1'; ask "
                "for more rounds, or leave it out"
            )
        return plan
    if not _prunes_weights(recipe):
        raise UsageError(
            f"schedule: rounds prune single weights, found 'rounds: {schedule.rounds}' and no "
            "'rules' but those of 'structure'; add some, or leave the schedule out"
        )
    for component, section in recipe.prune.items():
        for i, rule in enumerate(section.rules, 1):
            if not rule.keep and schedule.initial > _asked(rule):
                raise UsageError(
                    f"schedule: expected 'initial' to be no more than what each rule asks for, "
                    f"found {schedule.initial:g} and {_asked(rule):g} ({component}, rule {i}); "
                    "lower it"
                )
    if recipe.calibration.packages > 1 and not schedule.recalibrate:
        raise UsageError(
            "schedule: packages are calibrated one after the other in every round, found "
            f"'packages: {recipe.calibration.packages}' with 'recalibrate: false'; take "
            "'packages: 1', or recalibrate"
        )
    for number in range(1, schedule.rounds):
        make_plan(round_recipe(recipe, number), catalog)
    return plan


def asked_in_rounds(recipe: Recipe, catalog: Catalog) -> list[float]:
    """What each round asks of the components pruned, over all their parameters; [] if only one."""
    if recipe.schedule.rounds == 1:
        return []
    numbers = range(1, recipe.schedule.rounds + 1)
    catalog = shrink.narrowed(catalog, shrink.check(recipe, catalog))
    plans = (make_plan(round_recipe(recipe, number), catalog) for number in numbers)
    return [account(plan).together.asked for plan in plans]


def cubic(initial: float, final: float, part: float) -> float:
    """The sparsity after this part (0..1) of the rounds: final + (initial - final)·(1 - part)³.

    Zhu & Gupta 2017, "To prune, or not to prune", equation 1: most goes early, while there is much
    that can be spared.
    """
    return final + (initial - final) * (1 - part) ** 3


def round_recipe(recipe: Recipe, number: int) -> Recipe:
    """What round `number`, counted from 1, prunes by: a recipe without a schedule.

    An N:M pattern loses at least one weight of each group in the first round, and its M - N in the
    last: 2:4 comes by way of 3:4. Limits of a rule below its sparsity grow as that does.
    """
    schedule = recipe.schedule
    prune = recipe.prune
    if number < schedule.rounds:
        step = partial(_rule, initial=schedule.initial, part=number / schedule.rounds)
        prune = {
            component: section.model_copy(update={"rules": tuple(map(step, section.rules))})
            for component, section in prune.items()
        }
    return recipe.model_copy(update={"prune": prune, "schedule": Schedule(), "tune": None})


def _rule(rule: Rule, initial: float, part: float) -> Rule:
    if rule.keep or not (asked := _asked(rule)):
        return rule
    sparsity = cubic(initial, asked, part)
    update: dict[str, Any] = {
        "sparsity": sparsity,
        "min_sparsity": rule.min_sparsity * sparsity / asked,
    }
    pattern = parse_pattern(rule.pattern)
    if pattern.n is not None and pattern.m is not None:
        zeros = max(1, math.floor(pattern.m * sparsity + 1e-9))  # 3.9999999999999996 is 4
        update |= {"pattern": f"{pattern.m - zeros}:{pattern.m}", "sparsity": None}
    return rule.model_copy(update=update)


def _asked(rule: Rule) -> float:
    fixed = parse_pattern(rule.pattern).sparsity
    return (rule.sparsity or 0.0) if fixed is None else fixed


def _prunes_weights(recipe: Recipe) -> bool:
    """Whether there is more to do than to make blocks narrower."""
    return any(section.rules for section in recipe.prune.values())


def _blocks_only(recipe: Recipe) -> Recipe:
    """What round 0 does: a recipe of what makes blocks narrower, and of nothing else."""
    prune = {
        component: section.model_copy(update={"rules": ()})
        for component, section in recipe.prune.items()
        if section.structure
    }
    return recipe.model_copy(update={"prune": prune, "schedule": Schedule(), "tune": None})


@dataclass(frozen=True)
class _Step:
    """Pruning by a recipe, or tuning, of what the step before has left; in round 0 blocks go.

    `key` digests all that decides what comes of it, the steps before included.
    """

    round: int
    do: Recipe | Tune
    key: str

    @property
    def name(self) -> str:
        """Of its bundle in the folder."""
        kind = "tuned" if isinstance(self.do, Tune) else "pruned" if self.round else "narrowed"
        return f"{self.round}-{kind}-{self.key[:16]}"


def _steps(source: Bundle, recipe: Recipe, tables: Tables) -> list[_Step]:
    """What there is to do. A round that asks for no more than the one before is left out, unless
    there was tuning since.
    """
    schedule, steps, last = recipe.schedule, list[_Step](), None
    key = _key(source.digest, tool_versions(), schedule.recalibrate)
    if shrink.asks(recipe):
        blocks = _blocks_only(recipe)
        key = _key(
            key, decisive(blocks), contents(blocks.calibration.images), _digests(blocks, tables)
        )
        steps.append(_Step(0, blocks, key))
    for number in range(1, schedule.rounds + 1):
        asked = round_recipe(recipe, number)
        if asked == last and not schedule.tune:
            continue
        last = asked
        key = _key(key, decisive(asked), contents(asked.calibration.images))
        steps.append(_Step(number, asked, key))
        if schedule.tune and number < schedule.rounds:
            key = _key(key, schedule.tune.model_dump(mode="json"), contents(schedule.tune.images))
            steps.append(_Step(number, schedule.tune, key))
    return steps


def _digests(recipe: Recipe, tables: Tables) -> dict[str, str]:
    """Those of the latencies that budgets count, by component."""
    named = {c: s.structure.table for c, s in recipe.prune.items() if s.structure}
    read = {component: read_table(Path(file)) for component, file in named.items() if file}
    return {component: table.sha256 for component, table in {**tables, **read}.items()}


def _key(*made_of: Any) -> str:
    return hashlib.sha256(to_json(made_of).encode()).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, made if need be, and nobody else's meanwhile; it stays only with rounds in it.

    Raises:
        InputError: another process is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=False):
            yield
    except BlockingIOError as e:
        raise InputError(f"{folder}: another pruning is at work there; wait for it to end") from e
    finally:
        with suppress(OSError):
            folder.rmdir()


def _resume(folder: Path, steps: Sequence[_Step], schedule: Schedule) -> tuple[int, Bundle | None]:
    """How many steps an earlier call has finished, and the bundle of the last of them."""
    known = _read_history(folder)
    for done in range(len(steps), 0, -1):
        with suppress(InputError, VerificationError):  # not there, or damaged since
            bundle = Bundle.open(folder / steps[done - 1].name)
            bundle.check_files()
            if done < len(steps) and not schedule.recalibrate:
                for step in _before_rounds(steps):
                    Bundle.open(folder / step.name).check_files()
            if all(step.name in known for step in steps[: done - 1]):
                return done, bundle
    return 0, None


def _before_rounds(steps: Sequence[_Step]) -> list[_Step]:
    """What statistics that are recorded once are recorded on."""
    return [step for step in steps if not step.round]


def _go_on(
    source: Bundle,
    recipe: Recipe,
    tables: Tables | None,
    folder: Path,
    steps: Sequence[_Step],
    done: int,
    model: Bundle | None,
    progress: Progress,
) -> Bundle:
    """The bundle of the last step; `model` is what `done` steps have left."""
    schedule, statistics = recipe.schedule, None
    first, before_first = next(s for s in steps if s.round), _before_rounds(steps)

    def tell(step: _Step, what: str, done: int, total: int) -> None:
        what = "tuning" if isinstance(step.do, Tune) else what  # which would tell its loss, too
        if step.round and schedule.rounds > 1:
            what = f"round {step.round} of {schedule.rounds}: {what}"
        progress(what, done, total)

    def settle(done: int, model: Bundle | None) -> None:
        """Keep what was reached and what the next step needs; leave the rest."""
        finished = steps[done - 1] if done else None
        known = {n: r for n, r in _read_history(folder).items() if n in {s.name for s in steps}}
        if finished and model:
            write_json(folder / HISTORY, {**known, finished.name: _reached(finished, model)})
        # A tuning that was stopped has left its checkpoint and its log beside its bundle.
        keep = [step.name for step in steps[max(0, done - 1) : done + 1]]
        if not schedule.recalibrate:
            keep += [step.name for step in before_first]
        _remove_all_but([*keep, HISTORY], folder)

    on_main_process(lambda: settle(done, model))
    for step in steps[done:]:
        told, target = partial(tell, step), folder / step.name
        if isinstance(step.do, Tune):
            assert model
            model = tuning.tune(model, step.do, target, dense=source, replace=True, progress=told)
        elif not step.round:
            model = shrink.shrink(
                source, step.do, target, tables=tables, replace=True, progress=told
            )
        else:
            if statistics is None and not schedule.recalibrate:
                assert isinstance(first.do, Recipe)
                base = [Bundle.open(folder / step.name) for step in before_first]
                statistics = record(
                    source, first.do, before=base[0] if base else None, progress=told
                )
            model = prune(
                source,
                step.do,
                target,
                replace=True,
                progress=told,
                before=model,
                statistics=statistics,
            )
        done += 1
        on_main_process(partial(settle, done, model))
    assert model
    return model


def _reached(step: _Step, bundle: Bundle) -> dict[str, Any]:
    """What a step came to, for the manifest of the result."""
    details, plan = bundle.manifest.details, bundle.manifest.plan
    if isinstance(step.do, Tune):
        facts = ("steps", "first_loss", "final_loss", "diverged_in_step")
        told = {fact: details[fact] for fact in facts if fact in details}
        return {"tuned": {"method": step.do.method, **told}}
    if not step.round:
        return {}  # it stands in the details of every bundle that comes after
    assert plan
    pruned = {c: s for c, s in account(plan).components.items() if s.parameters_pruned}
    return {
        "zeros": {c: s.zeros for c, s in pruned.items()},
        "sparsity": {c: s.of_layers_pruned for c, s in pruned.items()},
    }


def _read_history(folder: Path) -> dict[str, dict[str, Any]]:
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / HISTORY).read_text(encoding="utf-8")))
    return {}


def _remove_all_but(names: Collection[str], folder: Path) -> None:
    """Remove what has none of these names in its own."""
    for path in folder.iterdir():
        if not any(name in path.name for name in names):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _finish(
    recipe: Recipe, folder: Path, steps: Sequence[_Step], last: Bundle, out: Path, replace: bool
) -> None:
    """Put what the last round has made into its place, with the whole story in its manifest."""
    known, rounds = _read_history(folder), dict[int, dict[str, Any]]()
    for step in steps:
        if step.round:
            rounds.setdefault(step.round, {"round": step.round}).update(known[step.name])
    manifest, told = last.manifest, dict[str, Any]()
    if recipe.schedule.rounds > 1:
        schedule = recipe.schedule.model_dump(mode="json")
        told["recipe"] = {**(manifest.recipe or {}), "schedule": schedule}
        told["details"] = {**manifest.details, "rounds": list(rounds.values())}
    with staging(out, replace=replace) as work:
        linked = link_files(last, work)
        seal(work, manifest.model_copy(update=told), known=linked)
    shutil.rmtree(folder)
