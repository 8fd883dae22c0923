"""Is this the model that a bundle was pruned from?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.catalog import Catalog, read_catalog, read_config
from sdcompress.errors import InputError, SdcompressError, UsageError
from sdcompress.models.sources import resolve
from sdcompress.safetensors_io import TensorInfo, read_tensor
from sdcompress.structure import Remains, find_blocks, read_record, remains

DENSE = "dense"  # in a tuned bundle's details: the digest of the model it was distilled from


def find_dense(parent: Bundle) -> Bundle:
    """The model `parent` was pruned from, by what its manifest says of it.

    Raises:
        UsageError: it cannot be found from that; the line says to name it.
    """
    source = parent.manifest.source
    if not source.loras:
        for name in _places(source, parent.path):
            with suppress(SdcompressError):
                found = resolve(name)
                dense = Bundle.of_source(found.directory, found.source)
                if dense.digest == dense_digest(parent):
                    return dense
    merged = f" with {', '.join(source.loras)} merged" if source.loras else ""
    raise UsageError(
        f"{parent.path}: was pruned from {source.id}{merged} ({source.kind}), which cannot be "
        "found from here as it was then; name it with --dense"
    )


def _places(source: SourceRecord, beside: Path) -> Iterator[str]:
    if source.kind == "mini-sd2":
        yield source.id
    elif source.kind == "hub":
        yield f"{source.id}@{source.revision}"
    else:  # a name only; manifests do not say where things lie
        yield from (str(folder / source.id) for folder in (Path(), beside.resolve().parent))


def dense_digest(parent: Bundle) -> str | None:
    """The digest of the dense model, as far as the manifest tells."""
    manifest = parent.manifest
    digest = manifest.details.get(DENSE) if manifest.stage == "tuned" else manifest.parent
    return None if digest is None else str(digest)


def check_lineage(parent: Bundle, dense: Bundle) -> None:
    """Raise InputError unless `parent` was made from `dense`.

    The digest in the manifest tells; where the same model came another way (a copy of what was
    fetched from the hub), every tensor that was not pruned must hold what the dense one holds.
    """
    if dense.manifest.plan is not None:
        raise UsageError(
            f"{dense.path}: expected the dense model, found a {dense.manifest.stage} bundle; "
            "name the model it was pruned from"
        )
    if dense_digest(parent) == dense.digest:
        return
    if parent.manifest.stage == "tuned":
        raise InputError(
            f"{dense.path}: is not the model that {parent.path} was distilled from; name that one "
            f"with --dense ({parent.manifest.source.id})"
        )
    if different := _difference(parent, dense):
        raise InputError(
            f"{dense.path}: is not the model that {parent.path} was pruned from "
            f"({different}); name that one with --dense ({parent.manifest.source.id})"
        )


def _difference(parent: Bundle, dense: Bundle) -> str | None:
    """A tensor of `parent` that `dense` lacks or, if it was not pruned, holds other values for."""
    import torch

    assert parent.manifest.plan is not None
    changed = {(p.component, p.name) for p in parent.manifest.plan.layers if p.pruned}
    catalog = read_catalog(dense.path)
    before, lost = dict(_tensors(catalog)), lost_blocks(parent, catalog)
    for key, info in _tensors(read_catalog(parent.path)):
        name = "/".join(key)
        other = before.get(key)
        if other is None:
            return f"it has no {name}"
        if info.dtype != other.dtype:
            return f"{name} is {other.dtype} {list(other.shape)} there"
        left = lost.get(key[0], {}).get(key[1])
        if not left and info.shape != other.shape:
            return f"{name} is {other.dtype} {list(other.shape)} there"
        # What takes a block's numbers may have been fitted to what stays of them.
        if key in changed or (left and left.part.axis):
            continue
        value = read_tensor(other)
        if not torch.equal(read_tensor(info), left.of(value) if left else value):
            return f"{name} differs"
    return None


def lost_blocks(parent: Bundle, catalog: Catalog) -> dict[str, dict[str, Remains]]:
    """Component → tensor → what stayed of the dense model's, of those that `parent` has smaller.

    `catalog` is the dense model's.
    """
    found = {}
    for component, record in read_record(parent.manifest.details).items():
        config = read_config(catalog.folder(component))
        blocks = find_blocks(component, catalog.shapes(component), config)
        found[component] = remains(blocks, record)
    return found


def _tensors(catalog: Catalog) -> Iterator[tuple[tuple[str, str], TensorInfo]]:
    for component, headers in catalog.headers.items():
        for header in headers:
            for name, info in header.tensors.items():
                yield (component, name), info
