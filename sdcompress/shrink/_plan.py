"""Which blocks become narrower, and how far, as far as that can be known without weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from sdcompress.catalog import Catalog, read_config
from sdcompress.criteria import GRADIENTS, load_criterion
from sdcompress.errors import UsageError
from sdcompress.patterns import parse_pattern
from sdcompress.recipe import Recipe, Rule, Structure, StructureRule
from sdcompress.shrink._importance import refuse
from sdcompress.structure import KEY, Block, find_blocks


@dataclass(frozen=True)
class Fate:
    """One block: the rule it falls under and the units that stay, or why all of them do.

    `kept` is None where only the weights can tell, because a budget decides.
    """

    block: Block
    rule: StructureRule | None
    kept: int | None
    skipped_because: str | None = None

    def choices(self) -> list[int]:
        """The numbers of units that a budget may leave it, all of them first."""
        if self.rule is None or self.skipped_because:
            return [self.block.units]
        return self.block.choices(self.rule.multiple, 1 - self.rule.max_ratio)


def structured(recipe: Recipe) -> dict[str, Structure]:
    """The components whose blocks the recipe makes narrower."""
    return {c: section.structure for c, section in recipe.prune.items() if section.structure}


def fates(recipe: Recipe, catalog: Catalog) -> dict[str, tuple[Fate, ...]]:
    """What becomes of every block of the components that the recipe structures.

    Raises:
        UsageError: a component is not there or has been structured before, or a rule matches no
            block, would leave nothing of one, or judges by what gives groups no score.
    """
    if missing := set(structured(recipe)) - set(catalog.components):
        raise UsageError(
            f"the recipe structures {', '.join(sorted(missing))}, the model has "
            f"{', '.join(catalog.components)}; correct the component's name in the recipe"
        )
    found = {}
    for component, section in structured(recipe).items():
        config = read_config(catalog.folder(component))
        if config.get(KEY):
            raise UsageError(
                f"{component}: expected a model whose blocks are whole, found {len(config[KEY])} "
                "that were made narrower before; structure the model it was made from"
            )
        blocks = find_blocks(component, catalog.shapes(component), config)
        _check_rules(component, section, blocks)
        found[component] = tuple(_fate(component, section, block) for block in blocks)
        _check_patterns(component, recipe.prune[component].rules, found[component])
    return found


def _fate(component: str, section: Structure, block: Block) -> Fate:
    matching = [i for i, rule in enumerate(section.rules) if _matches(rule, block)]
    if not matching:
        return Fate(block, None, block.units, "no rule matches")
    rule = section.rules[matching[-1]]
    if rule.keep:
        reason = f"kept dense by rule {matching[-1] + 1}: {rule.reason}"
        return Fate(block, rule, block.units, reason)
    if len(block.choices(rule.multiple)) == 1:
        reason = f"no narrower width is a multiple of {rule.multiple}"
        return Fate(block, rule, block.units, reason)
    if rule.ratio is None:
        return Fate(block, rule, None)
    if not (kept := block.kept(rule.ratio, rule.multiple)):
        least = min(block.choices(rule.multiple))
        raise UsageError(
            f"{component}, structure rule {matching[-1] + 1}: a ratio of {rule.ratio:g} leaves "
            f"nothing of {block.name} ({block.units} {_units(block)}, {least} or more must stay); "
            f"ask for no more than {_floor(1 - least / block.units)}, or keep it dense"
        )
    return Fate(block, rule, kept)


def _floor(ratio: float) -> str:
    return f"{int(ratio * 1000) / 1000:g}"


def _units(block: Block) -> str:
    return "groups of channels" if block.kind == "channels" else block.kind


def _matches(rule: StructureRule, block: Block) -> bool:
    return rule.kind in ("all", block.kind) and fnmatchcase(block.name, rule.blocks)


def _check_rules(component: str, section: Structure, blocks: Sequence[Block]) -> None:
    judges = {
        r.criterion: bool(load_criterion(r.criterion).needs & GRADIENTS)
        for r in section.rules
        if not r.keep
    }
    if section.budget and len(set(judges.values())) > 1:
        raise UsageError(
            f"{component}: a budget holds the blocks' losses against one another, which "
            f"{' and '.join(sorted(judges))} count in different units; take one criterion, or "
            "ratios"
        )
    for i, rule in enumerate(section.rules, 1):
        where = f"{component}, structure rule {i}"
        if not rule.keep and (problem := refuse(rule.criterion)):
            raise UsageError(f"{where}: {problem}")
        matched = [block for block in blocks if _matches(rule, block)]
        if not matched:
            kinds = sorted({block.kind for block in blocks})
            example = f"; one is called {blocks[0].name!r}" if blocks else ""
            raise UsageError(
                f"{where}: {rule.blocks!r} of kind {rule.kind} matches none of the {len(blocks)} "
                f"blocks ({', '.join(kinds) or 'there are no kinds'}{example}); `sdcompress plan` "
                "lists them"
            )
        if not rule.keep and all(len(block.choices(rule.multiple)) == 1 for block in matched):
            raise UsageError(
                f"{where}: none of the {len(matched)} blocks it matches has a narrower width that "
                f"is a multiple of {rule.multiple} ({matched[0].name} has {matched[0].width} "
                f"channels, {matched[0].unit} to a unit); lower 'multiple'"
            )


def _check_patterns(component: str, rules: Sequence[Rule], fates: Sequence[Fate]) -> None:
    """Raise UsageError where a budget could leave widths that an N:M pattern does not fit.

    Ratios leave what can be planned for; there the plan says what is skipped.
    """
    for rule in rules:
        group = parse_pattern(rule.pattern).m
        for fate in fates:
            if rule.keep or not group or fate.kept is not None or not fate.rule:
                continue
            if math.lcm(fate.block.unit, fate.rule.multiple) % group:
                raise UsageError(
                    f"{component}: {rule.pattern} needs widths that are multiples of {group}, "
                    f"found 'multiple: {fate.rule.multiple}' in the structure; raise it"
                )


def narrowed(catalog: Catalog, fates: Mapping[str, Iterable[Fate]]) -> Catalog:
    """The catalog of what will be left, as far as it is known."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for component, several in fates.items():
        known = catalog.shapes(component)
        for fate in several:
            if fate.kept is None:
                continue
            for part in fate.block.parts:
                shape = list(known[part.tensor])
                shape[part.axis] = part.copies * fate.kept * fate.block.unit
                shapes[component, part.tensor] = tuple(shape)
    layers = tuple(
        replace(layer, shape=shapes.get((layer.component, layer.name), layer.shape))
        for layer in catalog.layers
    )
    return replace(catalog, layers=layers)
