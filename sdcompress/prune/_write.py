"""Files in → files out: tensors that are pruned are written anew, all others stay as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from sdcompress.bits import Array, in_memory, is_zero, slices
from sdcompress.bundle import FileRecord, TensorRecord
from sdcompress.catalog import Catalog
from sdcompress.plan import LayerPlan, SparsityPlan
from sdcompress.safetensors_io import StreamWriter, TensorInfo, raw_bytes, read_finite

if TYPE_CHECKING:
    from torch import Tensor

# A layer's weight is changed in place, and given again slice by slice.
Decide = Callable[[LayerPlan, Array], Iterable[Array]]
Records = dict[str, dict[str, TensorRecord]]


def write_pruned(
    model: Path,
    catalog: Catalog,
    plan: SparsityPlan,
    work: Path,
    decide: Decide,
    progress: Callable[[int, int], None],
    threads: int | None = None,
) -> tuple[SparsityPlan, Records, dict[str, FileRecord]]:
    """Write every file of the catalog in which a tensor changes below `work`.

    Gives the plan with the zeros that came of it, the record of every tensor, and that of every
    file written. Tensors are read, decided on and hashed by several threads, a few at a time, and
    written in file order; `progress` counts their bytes.
    """
    layers = {(p.component, p.name): p for p in plan.layers}
    tensors: Records = defaultdict(dict)
    files: dict[str, FileRecord] = {}
    infos = [
        (component, info)
        for component, shards in catalog.headers.items()
        for header in shards
        for info in header.tensors.values()
    ]

    def make(component: str, info: TensorInfo, memory: Array) -> tuple[Array, TensorRecord]:
        layer, weight = layers.get((component, info.name)), read_finite(info, memory)
        if layer is None or not layer.pruned:
            return weight, record_tensor(weight, info.dtype, pruned=False)
        return weight, _record(decide(layer, weight), info.dtype, info.shape, pruned=True)

    done, total = 0, sum(info.nbytes for _, info in infos)
    jobs = ((info.nbytes, partial(make, component, info)) for component, info in infos)
    with closing(in_memory(jobs, threads)) as made:
        for component, shards in catalog.headers.items():
            for header in shards:
                changes = any(_is_pruned(layers.get((component, n))) for n in header.tensors)
                name = header.path.relative_to(model).as_posix()
                with StreamWriter(work / name, header) if changes else nullcontext() as writer:
                    for info in header.tensors.values():
                        weight, record = next(made)
                        if writer:
                            writer.write_tensor(info, raw_bytes(weight))
                        tensors[component][info.name] = record
                        if record.zeros is not None:  # those the model brought along, too
                            share = record.zeros / info.numel
                            layers[component, info.name] = layers[component, info.name].model_copy(
                                update={"zeros": record.zeros, "sparsity": share}
                            )
                        done += info.nbytes
                        progress(done, total)
                if writer:
                    files[name] = FileRecord(size=writer.size, sha256=writer.sha256)
    resolved = plan.model_copy(update={"layers": tuple(layers.values())})
    return resolved, dict(tensors), files


def _is_pruned(layer: LayerPlan | None) -> bool:
    return layer is not None and layer.pruned


def record_tensor(weight: Tensor | Array, dtype: str, *, pruned: bool) -> TensorRecord:
    """The record of a tensor in memory; with `pruned`, its zeros and where they lie."""
    return _record(slices(weight), dtype, tuple(weight.shape), pruned=pruned)


def _record(
    parts: Iterable[Tensor | Array], dtype: str, shape: tuple[int, ...], *, pruned: bool
) -> TensorRecord:
    import numpy as np

    digest, zeros, mask, rest = blake3(), 0, blake3(), np.empty(0, bool)
    for part in parts:
        digest.update(raw_bytes(part))
        if pruned:
            zero = is_zero(part)
            zeros += int(np.count_nonzero(zero))
            zero = np.concatenate([rest, zero]) if len(rest) else zero
            whole = len(zero) // 8 * 8
            mask.update(np.packbits(zero[:whole]).data)
            rest = zero[whole:]  # bits of one byte, which the next part fills
    mask.update(np.packbits(rest).data)
    record = TensorRecord(dtype=dtype, shape=shape, blake3=digest.hexdigest())
    if not pruned:
        return record
    return record.model_copy(update={"zeros": zeros, "zero_mask_blake3": mask.hexdigest()})
