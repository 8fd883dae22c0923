"""Files in → files out: tensors that are pruned are written anew, all others stay as they are."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdcompress.bundle import TensorRecord
from sdcompress.catalog import Catalog
from sdcompress.plan import LayerPlan, SparsityPlan
from sdcompress.safetensors_io import StreamWriter, raw_bytes, read_finite

if TYPE_CHECKING:
    from torch import Tensor

Decide = Callable[[LayerPlan, "Tensor"], "Tensor"]  # a layer's weight → what becomes of it
Records = dict[str, dict[str, TensorRecord]]


def write_pruned(
    model: Path,
    catalog: Catalog,
    plan: SparsityPlan,
    work: Path,
    decide: Decide,
    progress: Callable[[int, int], None],
) -> tuple[SparsityPlan, Records]:
    """Write every file of the catalog in which a tensor changes below `work`.

    Gives the plan with the zeros that came of it, and the record of every tensor. Tensors come by
    one at a time, in file order; `progress` counts their bytes.
    """
    layers = {(p.component, p.name): p for p in plan.layers}
    tensors: Records = defaultdict(dict)
    infos = [i for shards in catalog.headers.values() for h in shards for i in h.tensors.values()]
    done, total = 0, sum(info.nbytes for info in infos)
    for component, shards in catalog.headers.items():
        for header in shards:
            planned = {n for n in header.tensors if _is_pruned(layers.get((component, n)))}
            target = work / header.path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            with StreamWriter(target, header) if planned else nullcontext() as writer:
                for info in header.tensors.values():
                    weight = read_finite(info)
                    if info.name in planned:
                        layer = layers[component, info.name]
                        weight = decide(layer, weight)
                        zeros = int((weight == 0).sum())  # those the model brought along too
                        layers[component, info.name] = layer.model_copy(
                            update={"zeros": zeros, "sparsity": zeros / layer.numel}
                        )
                    if writer:
                        writer.write(info, raw_bytes(weight))
                    record = record_tensor(weight, info.dtype, pruned=info.name in planned)
                    tensors[component][info.name] = record
                    done += info.nbytes
                    progress(done, total)
    return plan.model_copy(update={"layers": tuple(layers.values())}), dict(tensors)


def _is_pruned(layer: LayerPlan | None) -> bool:
    return layer is not None and layer.pruned


def record_tensor(weight: Tensor, dtype: str, *, pruned: bool) -> TensorRecord:
    """The record of a tensor in memory; with `pruned`, its zeros and where they lie."""
    record = TensorRecord(
        dtype=dtype,
        shape=tuple(weight.shape),
        sha256=hashlib.sha256(raw_bytes(weight)).hexdigest(),
    )
    if not pruned:
        return record
    zero = (weight == 0).reshape(-1).numpy()
    mask = hashlib.sha256(np.packbits(zero).tobytes()).hexdigest()
    return record.model_copy(update={"zeros": int(zero.sum()), "zero_mask_sha256": mask})
