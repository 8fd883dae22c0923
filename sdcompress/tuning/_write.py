"""The tuned students as a bundle: in the parent's files and number formats, zeros counted again."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress import registry
from sdcompress.bundle import (
    LOG,
    Bundle,
    Manifest,
    TensorRecord,
    link_files,
    seal,
    staging,
    tool_versions,
    write_json,
)
from sdcompress.catalog import read_catalog, weight_files
from sdcompress.errors import InputError, SdcompressError
from sdcompress.patterns import parse_pattern, violations
from sdcompress.plan import LayerPlan, shortfalls
from sdcompress.prune import record_tensor
from sdcompress.recipe import Recipe
from sdcompress.safetensors_io import (
    Header,
    StreamWriter,
    TensorInfo,
    raw_bytes,
    read_header,
    read_tensor,
)
from sdcompress.structure import RECORD
from sdcompress.tuning._job import Job, state_key
from sdcompress.tuning._lineage import DENSE

if TYPE_CHECKING:
    from torch import Tensor


def write_bundle(job: Job, out: Path, *, replace: bool, log: dict[str, Any]) -> Bundle:
    """Write what `job.students` have become; `log` goes into log.json, outside the digests.

    Raises:
        InputError: a number does not fit the parent's format, or `out` exists.
        SdcompressError: what was written does not hold the zeros that were planned.
    """
    parent = job.parent.manifest
    catalog = read_catalog(job.parent.path)
    records = {c: dict(tensors) for c, tensors in parent.tensors.items()}
    underflow: dict[str, dict[str, int]] = defaultdict(dict)
    with staging(out, replace=replace) as work:
        for component in job.components:
            for header in catalog.headers[component]:
                target = work / header.path.relative_to(job.parent.path)
                lost = _write_file(job, component, header, target, records[component])
                underflow[component] |= lost
        resolved = {
            (component, layer.name): _recount(layer, records[component][layer.name])
            for component in job.components
            for layer in job.plan.of(component)
            if layer.pruned
        }
        layers = tuple(resolved.get((p.component, p.name), p) for p in job.plan.layers)
        plan = job.plan.model_copy(update={"layers": layers})
        recipe = {**(parent.recipe or {}), "tune": job.settings.model_dump(mode="json")}
        if short := shortfalls(plan, Recipe.model_validate(recipe)):
            raise SdcompressError(f"{short[0]} after tuning; please report this")
        _check_written(job, work)
        manifest = Manifest(
            stage="tuned",
            parent=job.parent.digest,
            source=parent.source,
            recipe=recipe,
            tools=tool_versions(),
            plan=plan,
            tensors=records,
            details={
                DENSE: job.dense.digest,
                "masks": "moved" if moves_masks(job.settings.method) else "fixed",
                "underflow_zeros": {c: lost for c, lost in underflow.items() if lost},
                **{fact: parent.details[fact] for fact in (RECORD,) if fact in parent.details},
                **job.details,
            },
        )
        linked = link_files(job.parent, work)
        seal(work, manifest, known=linked)
        write_json(work / LOG, log)
    return Bundle.open(out)


def moves_masks(method: str) -> bool:
    """Whether zeros are elsewhere when a method is done."""
    return bool(getattr(registry.load("tuning", method), "MOVES_MASKS", False))


def _write_file(
    job: Job, component: str, header: Header, target: Path, records: dict[str, TensorRecord]
) -> dict[str, int]:
    """Write one file of a tuned component and its tensors' records.

    Returns how many weights of each pruned tensor were not zero before the cast, and are now.
    """
    state = job.students[component].state_dict()
    underflow = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with StreamWriter(target, header) as writer:
        for info in header.tensors.values():
            key = state_key(component, info.name, state)
            pruned = key in job.masks[component]
            value = read_tensor(info)
            if key in state and value.is_floating_point():
                exact = state[key].detach().cpu()
                value = _cast(exact, value, info)
                if pruned and (lost := int(((value == 0) & (exact != 0)).sum())):
                    underflow[info.name] = lost
            writer.write_tensor(info, raw_bytes(value))
            records[info.name] = record_tensor(value, info.dtype, pruned=pruned)
    return underflow


def _cast(value: Tensor, like: Tensor, info: TensorInfo) -> Tensor:
    cast = value.reshape(like.shape).to(like.dtype)
    if not bool(cast.isfinite().all()):
        raise InputError(
            f"{info.name}: tuning made numbers that {info.dtype} cannot hold; tune with a lower "
            "learning rate, or prune a model stored as F32"
        )
    # A pruned weight is +0.0, whatever an optimiser or a cast makes of it.
    return cast.masked_fill_(cast == 0, 0.0)


def _recount(layer: LayerPlan, record: TensorRecord) -> LayerPlan:
    zeros = record.zeros or 0
    return layer.model_copy(update={"zeros": zeros, "sparsity": zeros / layer.numel})


def _check_written(job: Job, work: Path) -> None:
    """Read the pruned tensors back: zero outside their masks, their patterns intact."""
    for component in job.components:
        masks = job.masks[component]
        for header in map(read_header, weight_files(work / component)):
            for info in header.tensors.values():
                key = state_key(component, info.name, masks)
                if key not in masks:
                    continue
                value, mask = read_tensor(info), masks[key].cpu()
                pattern = parse_pattern(job.layers[component][key].pattern or "unstructured")
                if bool((value[~mask] != 0).any()) or violations(value, pattern):
                    raise SdcompressError(
                        f"{component}/{info.name}: pruned weights are not zero in the file just "
                        "written; please report this"
                    )
