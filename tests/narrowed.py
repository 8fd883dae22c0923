"""Narrowed bundles made by hand: what is cut is what a test names, and nothing chooses it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from sdcompress.bundle import Bundle, Manifest, SourceRecord, link_files, seal, staging
from sdcompress.catalog import Catalog, read_catalog, read_config
from sdcompress.macs import Sizes, component_macs
from sdcompress.plan import LayerPlan, SparsityPlan
from sdcompress.prune import record_tensor
from sdcompress.recipe import Recipe
from sdcompress.structure import (
    KEY,
    RECORD,
    Block,
    BlockRecord,
    ComponentStructure,
    channels_of,
    cut,
    find_blocks,
    to_ranges,
)

Kept = Mapping[str, Mapping[str, Sequence[int]]]  # component → block → the units that stay
WHY = "the recipe only makes blocks of this component narrower"


def blocks_of(model: Path) -> dict[str, tuple[Block, ...]]:
    """Component → its blocks."""
    catalog = read_catalog(model)
    return {
        c: find_blocks(c, catalog.shapes(c), read_config(catalog.folder(c)))
        for c in catalog.components
    }


def thinned(
    model: Path, *components: str, share: float = 0.5, kind: str | None = None
) -> dict[str, dict[str, list[int]]]:
    """This share of the units of every block (of a kind), at least one, spread evenly."""
    return {
        component: {
            block.name: [
                i * block.units // max(1, int(block.units * share))
                for i in range(max(1, int(block.units * share)))
            ]
            for block in blocks
            if kind in (None, block.kind)
        }
        for component, blocks in blocks_of(model).items()
        if component in components
    }


def narrow_bundle(source: Path | Bundle, out: Path, kept: Kept) -> Bundle:
    """A bundle of stage "pruned" in which only the named units of these blocks are left.

    As `shrink` makes it: smaller tensors, the widths in the configs, the record in the manifest.
    `source` is a diffusers directory with one file of weights a component, or a bundle of one.
    """
    if isinstance(source, Path):
        source = Bundle.of_source(source, SourceRecord(id=source.name, kind="directory"))
    catalog = read_catalog(source.path)
    records, tensors = {}, {}
    with staging(out) as work:
        for component, blocks in kept.items():
            folder = catalog.folder(component)
            (header,) = catalog.headers[component]
            config, weights = read_config(folder), load_file(header.path)
            known = {
                block.name: block
                for block in find_blocks(component, catalog.shapes(component), config)
            }
            for name, units in blocks.items():
                block = known[name]
                for part in block.parts:
                    channels = channels_of(block, units)
                    old = weights[part.tensor]
                    weights[part.tensor] = cut(old, part, channels, block.width).contiguous()
            (work / component).mkdir()
            save_file(weights, work / component / header.path.name, header.metadata or None)
            widths = {name: len(units) * known[name].unit for name, units in blocks.items()}
            narrower = {n: w for n, w in widths.items() if w < known[n].full}
            text = json.dumps({**config, KEY: {**config.get(KEY, {}), **narrower}}, indent=2)
            (work / component / "config.json").write_text(text + "\n")
            records[component] = _record(source.path, catalog, component, known, blocks)
            tensors[component] = {
                name: record_tensor(weights[name], info.dtype, pruned=False)
                for name, info in header.tensors.items()
            }
        for component in catalog.headers.keys() - kept.keys():
            (header,) = catalog.headers[component]
            tensors[component] = {
                name: record_tensor(value, header.tensors[name].dtype, pruned=False)
                for name, value in load_file(header.path).items()
            }
        linked = link_files(source, work)
        after = read_catalog(work)
        recipe = Recipe.model_validate(
            {
                "name": "by-hand",
                "prune": {c: {"structure": {"rules": [{"ratio": 0.5}]}} for c in kept},
            }
        )
        manifest = Manifest(
            stage="pruned",
            parent=source.digest,
            source=source.manifest.source,
            recipe=recipe.model_dump(mode="json", include={"name", "seed", "prune"}),
            tools={"sdcompress": "by hand"},
            plan=SparsityPlan(
                layers=tuple(
                    LayerPlan(
                        component=layer.component,
                        name=layer.name,
                        kind=layer.kind,
                        shape=layer.shape,
                        dtype=layer.dtype,
                        skipped_because=WHY,
                    )
                    for layer in after.layers
                ),
                parameters=after.parameters,
            ),
            tensors=tensors,
            details={RECORD: {c: r.model_dump(mode="json") for c, r in records.items()}},
        )
        seal(work, manifest, known=linked)
    return Bundle.open(out)


def _record(
    model: Path,
    catalog: Catalog,
    component: str,
    known: Mapping[str, Block],
    kept: Mapping[str, Sequence[int]],
) -> ComponentStructure:
    config, shapes = read_config(catalog.folder(component)), catalog.shapes(component)
    narrow = dict(shapes)
    for name, units in kept.items():
        block = known[name]
        for part in block.parts:
            shape = list(narrow[part.tensor])
            shape[part.axis] = part.copies * len(units) * block.unit
            narrow[part.tensor] = tuple(shape)
    sizes = Sizes.of_model(model)

    def macs(of: Mapping[str, Sequence[int]]) -> int:
        return sum(component_macs(component, of, config, sizes).values())

    return ComponentStructure(
        parameters_dense=sum(math.prod(shape) for shape in shapes.values()),
        parameters=sum(math.prod(shape) for shape in narrow.values()),
        macs_dense=macs(shapes),
        macs=macs(narrow),
        blocks={
            block.name: BlockRecord(
                kind=block.kind,
                unit=block.unit,
                width=block.full,
                kept=len(kept.get(block.name, range(block.units))) * block.unit,
                asked=0.5 if block.name in kept else 0.0,
                criterion="magnitude",
                removed=to_ranges(
                    sorted(set(range(block.units)) - set(kept[block.name]))
                    if block.name in kept
                    else ()
                ),
            )
            for block in known.values()
        },
    )
