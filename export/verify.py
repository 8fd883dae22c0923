"""Proof that a bundle is what its manifest says, read back from the files themselves.

Weights are read in the state dict's layout wherever they lie (safetensors, or ONNX initializers
through the weight map), one at a time, and compared with the plan, with the records made from the
torch side, and on request with the parent bundle. A failed check names the tensors.

What cannot be read (truncated, missing, pointing outside its directory) is an InputError; what can
be read and is wrong is a failed check.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from pydantic import ValidationError

from export.graph import Graph, external, open_graphs, record_dtype
from export.precision import FP32, element_types, wrong_product_dtypes
from export.ranges import RANGES, Ranges
from export.specs import canonical_key, unused_key
from export.to_onnx import MODEL, RECORD_DTYPES
from sdcompress.bits import all_finite, bits, is_zero, slices, tensors_in_order
from sdcompress.bundle import Bundle, Manifest
from sdcompress.catalog import read_catalog, read_config
from sdcompress.criteria import load_criterion
from sdcompress.errors import VerificationError
from sdcompress.parallel import beside
from sdcompress.patterns import fits, parse_pattern, violations
from sdcompress.plan import LayerPlan, shortfalls
from sdcompress.prune import record_tensor
from sdcompress.recipe import Recipe
from sdcompress.results import Check, VerifyReport
from sdcompress.safetensors_io import read_tensor
from sdcompress.structure import (
    KEY,
    ComponentStructure,
    channels_of,
    cut,
    find_blocks,
    from_ranges,
    read_record,
)

if TYPE_CHECKING:
    from torch import Tensor

NAMED = 20  # tensors named in a failed check


def verify_bundle(path: Path, *, against: Path | None = None, parity: bool = True) -> VerifyReport:
    """Check a bundle of weights or ONNX graphs against its manifest.

    `against` is its parent: lineage and values are compared too. `parity` runs every exported
    component in onnxruntime and in torch (fp32), which takes longest.

    Raises:
        InputError: a file is missing, truncated, corrupt or points outside its directory.
    """
    bundle = Bundle.open(path)
    # Files are hashed as a whole beside all that is done with the tensors in them.
    with beside(partial(_files, bundle)) as files:
        checks = _contents(bundle, against, parity)
        checks.insert(0, files.result())
    return VerifyReport(bundle=bundle.digest, stage=bundle.manifest.stage, checks=tuple(checks))


def _contents(bundle: Bundle, against: Path | None, parity: bool) -> list[Check]:
    import torch  # noqa: F401  # before several threads ask for it at once

    graphs, checks = open_graphs(bundle), list[Check]()
    if graphs:
        checks += [_structure(graphs, bundle), _product_dtypes(graphs, bundle)]
        if (bundle.path / RANGES).is_file():
            checks += [_kept(graphs, Ranges.read(bundle.path / RANGES))]
    if graphs or bundle.manifest.stage != "engine":  # other engines hold no weights one can read
        if record := read_record(bundle.manifest.details):
            checks += [_blocks(bundle, graphs, record)]
        checks += _tensors(bundle, graphs)
    if against is not None:
        checks += _against(bundle, graphs, Bundle.open(against))
    if parity and graphs:
        from export.parity import check_parity

        checks += [check for graph in graphs for check in check_parity(graph)]
    return checks


def _result(name: str, wrong: list[str], good: str) -> Check:
    """A check that passed, with `good` as its detail, or one that found something wrong."""
    if not wrong:
        return Check(name=name, passed=True, detail=good)
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Check(name=name, passed=False, detail=wrong[0] + more, tensors=tuple(wrong[:NAMED]))


def _files(bundle: Bundle) -> Check:
    try:
        bundle.check_files()
    except VerificationError as e:
        return Check(name="files", passed=False, detail=str(e))
    count = len(bundle.manifest.files)
    return Check(name="files", passed=True, detail=f"{count} files have the digest recorded")


# Reading weights back.


@dataclass(frozen=True)
class _Weight:
    """One tensor as stored. `name` is its key in the manifest; `shape` and what `read` gives are of
    the state dict's layout."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.name

    @property
    def label(self) -> str:
        return f"{self.model}/{self.name}"


def _weights(bundle: Bundle, graphs: list[Graph]) -> Iterator[_Weight]:
    if not graphs:
        for model, headers in read_catalog(bundle.path).headers.items():
            for header in headers:
                for info in header.tensors.values():
                    read = partial(read_tensor, info)
                    yield _Weight(model, info.name, info.dtype, info.shape, info.nbytes, read)
    for graph in graphs:
        recorded = bundle.manifest.tensors.get(graph.model, {})
        names = {canonical_key(graph.component, name): name for name in recorded}
        for tensor, entry in graph.weights():
            name, read = names.get(entry.key, entry.key), partial(graph.read, tensor)
            dtype, shape = record_dtype(tensor), entry.key_shape
            yield _Weight(graph.model, name, dtype, shape, entry.nbytes, read)


# Checks of the weights.


@dataclass
class _Findings:
    """What one walk over weights found: for each check the tensors that fail it."""

    wrong: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    count: Counter[str] = field(default_factory=Counter)

    def add(self, more: _Findings) -> None:
        self.count.update(more.count)
        for check, tensors in more.wrong.items():
            self.wrong[check] += tensors


def _tensors(bundle: Bundle, graphs: list[Graph]) -> list[Check]:
    manifest, found = bundle.manifest, _Findings()
    wrong, count = found.wrong, found.count
    plans = _planned(bundle, graphs)
    unseen = {(m, n) for m, records in manifest.tensors.items() for n in records} | set(plans)
    known = frozenset(unseen)
    weights = list(_weights(bundle, graphs))
    jobs = (partial(_look_at, weight, manifest, plans.get(weight.key)) for weight in weights)
    with closing(tensors_in_order(jobs, sizes=(w.nbytes for w in weights))) as looks:
        for weight, seen in zip(weights, looks, strict=True):
            unseen.discard(weight.key)
            if known and weight.key not in known:
                wrong["tensors"].append(f"{weight.label} (not in the manifest)")
            found.add(seen)
    wrong["tensors"] += [f"{model}/{name} (missing)" for model, name in sorted(unseen)]
    checks = [
        _result("finite", wrong["finite"], f"{count['tensors']} tensors hold no NaN or infinity")
    ]
    if manifest.tensors:
        checks += [
            _result("tensors", wrong["tensors"], "all have the type and shape recorded"),
            _result("values", wrong["values"], "all have the digest recorded from the torch side"),
        ]
    if plans:
        good = f"{count['zeros']:,} zeros in {len(plans)} tensors, in number and place as planned"
        grouped = f"{count['N:M']} tensors hold their N:M pattern along the reduction axis"
        checks += [
            _request(manifest),
            _result("zeros", wrong["zeros"], good),
            _result("pattern", wrong["pattern"], grouped),
        ]
    return checks


def _request(manifest: Manifest) -> Check:
    """The plan itself does what the recipe asks; `zeros` then holds the files against the plan."""
    assert manifest.plan is not None
    if manifest.recipe is None:
        return Check(name="request", passed=False, detail="the manifest has a plan and no recipe")
    try:
        short = shortfalls(manifest.plan, Recipe.model_validate(manifest.recipe))
    except (ValidationError, KeyError, IndexError):
        return Check(name="request", passed=False, detail="recipe and plan do not fit each other")
    return _result("request", short, "the plan has all the zeros the recipe asks for")


def _planned(bundle: Bundle, graphs: list[Graph]) -> dict[tuple[str, str], LayerPlan]:
    """The plan of each pruned tensor that this bundle must hold."""
    if bundle.manifest.plan is None:
        return {}
    component_of = {graph.model: graph.component for graph in graphs}
    return {
        (p.component, p.name): p
        for p in bundle.manifest.plan.layers
        if p.pruned and (not graphs or _exported(component_of.get(p.component), p.name))
    }


def _exported(component: str | None, name: str) -> bool:
    return component is not None and not unused_key(component, canonical_key(component, name))


def _look_at(weight: _Weight, manifest: Manifest, layer: LayerPlan | None) -> _Findings:
    found = _Findings()
    wrong = found.wrong
    found.count["tensors"] += 1
    value = weight.read().contiguous()
    if not all_finite(value):
        wrong["finite"].append(weight.label)
    actual = record_tensor(value, weight.dtype, pruned=layer is not None)
    if record := manifest.tensors.get(weight.model, {}).get(weight.name):
        if (actual.dtype, actual.shape) != (record.dtype, record.shape):
            wrong["tensors"].append(
                f"{weight.label} ({actual.dtype} {list(actual.shape)}, "
                f"recorded {record.dtype} {list(record.shape)})"
            )
        if actual.blake3 != record.blake3:
            wrong["values"].append(weight.label)
    if layer is None:
        return found
    # What the cast made zero is on top of what was planned; export counted and recorded it.
    underflow = manifest.details.get("underflow", {}).get(weight.model, {}).get(weight.name, 0)
    zeros = actual.zeros or 0
    found.count["zeros"] += zeros
    if layer.zeros is None or zeros != layer.zeros + underflow:
        planned = "an unresolved number" if layer.zeros is None else f"{layer.zeros + underflow:,}"
        wrong["zeros"].append(f"{weight.label} ({zeros:,} zeros, planned {planned})")
    elif record and actual.zero_mask_blake3 != record.zero_mask_blake3:
        wrong["zeros"].append(f"{weight.label} (zeros in other places)")
    pattern = parse_pattern(layer.pattern or "unstructured")
    if pattern.m is not None:
        found.count["N:M"] += 1
        if why_not := fits(pattern, weight.shape):
            wrong["pattern"].append(f"{weight.label} ({why_not})")
        elif broken := violations(value, pattern):
            wrong["pattern"].append(f"{weight.label} ({broken:,} groups break {pattern})")
    return found


def _blocks(bundle: Bundle, graphs: list[Graph], record: Mapping[str, ComponentStructure]) -> Check:
    """Every block is as wide as recorded: its tensors, and the config that modules are made by."""
    folders = (
        {g.model: g.component for g in graphs} if graphs else {model: model for model in record}
    )
    shapes: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for weight in _weights(bundle, graphs):
        shapes[weight.model][weight.name] = weight.shape
    wrong, count = [], Counter[str]()
    for model in record.keys() & folders:
        config, said = read_config(bundle.path / folders[model]), record[model].blocks
        found = {block.name: block for block in find_blocks(model, shapes[model], config)}
        if not graphs:  # a graph has not all of a VAE
            wrong += [f"{model}/{name} (missing)" for name in said if name not in found]
        for name, block in found.items():
            tensors = {shapes[model][p.tensor][p.axis] // p.copies for p in block.parts}
            widths = {*tensors, config.get(KEY, {}).get(name, block.full)}
            recorded = said[name].kept if name in said else block.full
            if widths != {recorded}:
                every = " and ".join(map(str, sorted(widths)))
                wrong.append(f"{model}/{name} (width {every}, recorded {recorded})")
            count["narrower" if recorded < block.full else "whole"] += 1
    good = f"{count['narrower']} of {count.total()} blocks are narrower, as recorded and configured"
    return _result("structure", wrong, good)


def _against(bundle: Bundle, graphs: list[Graph], parent: Bundle) -> list[Check]:
    """Compare with the parent: what was not pruned away is bit for bit what the parent has."""
    lineage = Check(
        name="lineage",
        passed=bundle.manifest.parent == parent.digest,
        detail="the manifest names this parent"
        if bundle.manifest.parent == parent.digest
        else f"made from {bundle.manifest.parent}, not from {parent.digest}",
    )
    if not graphs and bundle.manifest.stage == "engine":
        return [lineage, _carried(bundle, parent)]
    parents = {weight.key: weight for weight in _weights(parent, open_graphs(parent))}
    made = _Made.of(bundle, parent)
    plan = bundle.manifest.plan
    pruned = {(p.component, p.name) for p in plan.layers if p.pruned} if plan else set()
    tuned = _tuned(bundle, pruned)

    def compare(weight: _Weight) -> str | None:
        """What to say of a weight that is not what became of the parent's."""
        if weight.key not in parents:
            return f"{weight.label} (not in the parent)"
        before = parents[weight.key].read()
        for to_what_stayed in made.cuts.get(weight.key, ()):
            before = to_what_stayed(before)
        if weight.key in made.refitted:
            return None if weight.shape == tuple(before.shape) else weight.label
        return None if _descends(bundle, pruned, tuned, weight, before) else weight.label

    weights = list(_weights(bundle, graphs))
    jobs = (partial(compare, weight) for weight in weights)
    with closing(tensors_in_order(jobs, sizes=(w.nbytes for w in weights))) as found:
        wrong = [label for label in found if label is not None]
    good = {
        "pruned": "every weight kept has the parent's bits"
        + (f", but in {len(made.refitted)} that were fitted anew" if made.refitted else ""),
        "tuned": "every tensor has the parent's shape; this method moves zeros"
        if _moves_zeros(bundle)
        else "every weight that was pruned is still zero",
    }.get(bundle.manifest.stage, "every weight has the parent's bits after the cast")
    return [lineage, _result("against", wrong, good)]


@dataclass
class _Made:
    """What became of the parent's tensors in pruning.

    `cuts`: how to make of one what stayed of it. `refitted`: those of which values that stayed were
    changed, to make up for others.
    """

    cuts: defaultdict[tuple[str, str], list[Callable[[Tensor], Tensor]]]
    refitted: set[tuple[str, str]]

    @classmethod
    def of(cls, bundle: Bundle, parent: Bundle) -> _Made:
        made, manifest = cls(defaultdict(list), set()), bundle.manifest
        if manifest.stage != "pruned":
            return made
        if manifest.plan:
            made.refitted = {
                (layer.component, layer.name)
                for layer in manifest.plan.layers
                if layer.criterion and load_criterion(layer.criterion).solve
            }
        before = read_record(parent.manifest.details)
        for model, record in read_record(manifest.details).items():
            if model not in before:
                made._narrowed(model, record, parent)
        return made

    def _narrowed(self, model: str, record: ComponentStructure, parent: Bundle) -> None:
        catalog = read_catalog(parent.path)
        config = read_config(catalog.folder(model))
        for block in find_blocks(model, catalog.shapes(model), config):
            said = record.blocks[block.name]
            if not (gone := {*from_ranges(said.removed)}):
                continue
            channels = channels_of(block, (u for u in range(block.units) if u not in gone))
            for part in block.parts:
                how = partial(cut, part=part, channels=channels, width=block.width)
                self.cuts[model, part.tensor].append(how)
            if said.refit:
                self.refitted.add((model, block.consumer))


def _carried(bundle: Bundle, parent: Bundle) -> Check:
    """What an engine with plans took over from its parent as it was, and the parent's own files."""
    wrong = []
    if not (intact := _files(parent)).passed:
        wrong.append(f"the parent's {intact.detail}")
    theirs, ours = parent.manifest.files, bundle.manifest.files
    shared = sorted(set(theirs) & set(ours))
    wrong += [name for name in shared if theirs[name].sha256 != ours[name].sha256]
    unread = "weights inside a plan cannot be read back and were not compared"
    good = f"{len(shared)} files have the digest they have in the parent; {unread}"
    return _result("against", wrong, good)


def _moves_zeros(bundle: Bundle) -> bool:
    """Whether it was tuned in a way that chooses anew what is zero."""
    return bundle.manifest.details.get("masks") == "moved"


def _tuned(bundle: Bundle, pruned: Set[tuple[str, str]]) -> set[str]:
    """The components that a tuning may have changed: those with zeros, and narrower ones."""
    if bundle.manifest.stage != "tuned":
        return set()
    tuned = {model for model, _ in pruned}
    if _moves_zeros(bundle):
        return tuned  # such a method has nothing to do elsewhere
    for model, record in read_record(bundle.manifest.details).items():
        if any(block.kept < block.width for block in record.blocks.values()):
            tuned.add(model)
    return tuned


def _descends(
    bundle: Bundle,
    pruned: Set[tuple[str, str]],
    tuned: Set[str],
    weight: _Weight,
    before: Tensor,
) -> bool:
    value, before = weight.read().contiguous(), before.contiguous()
    if value.shape != before.shape:
        return False
    was_tuned = weight.model in tuned
    # A zero that nobody pruned, as in many a bias, may become something else.
    if was_tuned and (weight.key not in pruned or _moves_zeros(bundle)):
        return True
    may_go = bundle.manifest.stage == "pruned" and value.is_floating_point()
    for now, then in zip(slices(value), slices(before), strict=True):
        then = then.to(now.dtype)
        if was_tuned:
            wrong = is_zero(then) & ~is_zero(now)
        else:  # as bits, which tell -0.0 from +0.0
            wrong = bits(now) != bits(then)
            if may_go:
                wrong &= ~is_zero(now)
        if wrong.any():
            return False
    return True


# Checks of the graphs.


def _structure(graphs: list[Graph], bundle: Bundle) -> Check:
    """The graphs are valid ONNX of the opset asked, and their weights lie where the map says."""
    wrong = [f"{g.component}: {fault}" for g in graphs for fault in _faults(g, bundle)]
    return _result(
        "graph",
        wrong,
        f"{len(graphs)} graphs are valid ONNX, weights outside in one file each, as mapped",
    )


def _faults(graph: Graph, bundle: Bundle) -> Iterator[str]:
    try:
        onnx.checker.check_model(str(graph.directory / MODEL))
    except (onnx.checker.ValidationError, ValueError) as e:
        yield f"not valid ONNX ({str(e).splitlines()[0]})"
    opset = {o.domain: o.version for o in graph.proto.opset_import}
    details = bundle.manifest.details
    if opset != {"": details.get("opset", graph.weight_map.opset)}:
        yield f"opset {opset}"
    if details.get("dtype", graph.weight_map.dtype) != graph.weight_map.dtype:
        yield f"weights of {graph.weight_map.dtype}, asked for {details['dtype']}"
    if len(graph.data) != 1:
        yield f"{len(graph.data)} external data files"
    tensors = {t.name: t for t in graph.proto.graph.initializer}
    for name, entry in graph.weight_map.initializers.items():
        tensor = tensors.pop(name, None)
        if tensor is None:
            yield f"{name} is missing"
        elif tuple(tensor.dims) != entry.shape or entry.offset != _offset(tensor):
            yield f"{name} is not where the map says"
        elif record_dtype(tensor) != RECORD_DTYPES[graph.weight_map.dtype]:
            yield f"{name} is not {graph.weight_map.dtype}"
    for name in (t.name for t in tensors.values() if _offset(t) is not None):
        yield f"{name} is not in the map"


def _offset(tensor: onnx.TensorProto) -> int | None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return int(external(tensor).get("offset", 0))


def _product_dtypes(graphs: list[Graph], bundle: Bundle) -> Check:
    """Products are of the dtype asked for; those the manifest names, and no others, are fp32."""
    in_fp32 = bundle.manifest.details.get("fp32_products", {})
    wrong = [
        f"{graph.component}: {name}"
        for graph in graphs
        for name in wrong_product_dtypes(
            graph.proto, graph.weight_map.dtype, in_fp32.get(graph.component, ())
        )
    ]
    dtypes = " and ".join(sorted({graph.weight_map.dtype for graph in graphs}))
    good = f"every input of a matrix product or convolution is {dtypes}"
    if count := sum(len(in_fp32.get(graph.component, ())) for graph in graphs):
        good += f", but fp32 in the {count} that the manifest names"
    return _result("dtypes", wrong, good)


def _kept(graphs: list[Graph], ranges: Ranges) -> Check:
    """What left fp16's range during calibration is fp32 in the graph."""
    beyond = ranges.beyond_fp16()
    wrong, count = [], 0
    for graph in graphs:
        types = element_types(graph.proto)
        outputs = {value.name for value in graph.proto.graph.output}  # which stay fp16
        names = [name for name in beyond.get(graph.component, []) if name not in outputs]
        count += len(names)
        wrong += [f"{graph.component}/{name}" for name in names if types.get(name) != FP32]
    good = f"all {count} values that left fp16 in calibration are fp32"
    return _result("kept", wrong, good if count else "no value left fp16 in calibration")
