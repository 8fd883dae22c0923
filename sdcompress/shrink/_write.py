"""The narrowed model in a directory: smaller tensors under their own names, configs that say so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from sdcompress.bits import tensors_in_order
from sdcompress.bundle import TensorRecord, to_json
from sdcompress.catalog import Catalog, read_config, weights_or_index
from sdcompress.errors import SdcompressError
from sdcompress.hashed_file import HashedFile
from sdcompress.models.checkpoint import encode_header
from sdcompress.safetensors_io import TensorInfo, raw_bytes, read_tensor
from sdcompress.structure import KEY, Block, Part, channels_of, cut

if TYPE_CHECKING:
    from torch import Tensor


def write_narrow(
    catalog: Catalog,
    component: str,
    narrow: Catalog,
    kept: Mapping[Block, tuple[int, ...]],
    refitted: Mapping[str, Tensor],
    work: Path,
    progress: Callable[[int], None],
) -> dict[str, TensorRecord]:
    """Write the component's files and its config below `work`; gives a record of each tensor.

    `narrow` has its shapes after removal, `kept` the units that stay of each block that loses
    some, and `refitted` what is to be written for some tensors, narrow already. `progress` hears of
    bytes read.
    """
    source, shapes = catalog.folder(component), narrow.shapes(component)
    parts: dict[str, tuple[Block, Part]] = {
        part.tensor: (block, part) for block in kept for part in block.parts
    }
    stays = {block: channels_of(block, units) for block, units in kept.items()}
    (work / component).mkdir(parents=True)
    records: dict[str, TensorRecord] = {}
    total = 0

    def make(info: TensorInfo) -> tuple[Tensor, TensorRecord]:
        tensor = read_tensor(info)
        if info.name in refitted:
            tensor = refitted[info.name].to(tensor.dtype)
        elif info.name in parts:
            block, part = parts[info.name]
            tensor = cut(tensor, part, stays[block], block.width)
        if tuple(tensor.shape) != shapes.get(info.name, info.shape):
            raise SdcompressError(
                f"{component}/{info.name}: expected {shapes[info.name]}, made "
                f"{tuple(tensor.shape)}; please report this"
            )
        return tensor, _record(tensor, info.dtype)

    for header in catalog.headers[component]:
        infos = header.tensors.values()
        with (
            HashedFile(work / component / header.path.name) as file,
            closing(tensors_in_order(partial(make, info) for info in infos)) as made,
        ):
            file.write(encode_header((i.name, i.dtype, shapes.get(i.name, i.shape)) for i in infos))
            for info, (tensor, record) in zip(infos, made, strict=True):
                data = raw_bytes(tensor)
                file.write(data)
                total += data.nbytes
                records[info.name] = record
                progress(info.nbytes)
    widths = {block.name: len(stays[block]) for block in kept}
    config = read_config(source) | ({KEY: widths} if widths else {})
    (work / component / "config.json").write_text(to_json(config), encoding="utf-8")
    if (index := weights_or_index(source)).suffix == ".json":
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {**content.get("metadata", {}), "total_size": total}
        (work / component / index.name).write_text(to_json(content), encoding="utf-8")
    return records


def records_of(
    catalog: Catalog, component: str, progress: Callable[[int], None]
) -> dict[str, TensorRecord]:
    """A record of each tensor of a component that stays as it is."""
    infos = [i for header in catalog.headers[component] for i in header.tensors.values()]

    def look(info: TensorInfo) -> TensorRecord:
        return _record(read_tensor(info), info.dtype)

    records = {}
    with closing(tensors_in_order(partial(look, info) for info in infos)) as found:
        for info, record in zip(infos, found, strict=True):
            records[info.name] = record
            progress(info.nbytes)
    return records


def _record(tensor: Tensor, dtype: str) -> TensorRecord:
    digest = blake3(raw_bytes(tensor)).hexdigest()
    return TensorRecord(dtype=dtype, shape=tuple(tensor.shape), blake3=digest)
