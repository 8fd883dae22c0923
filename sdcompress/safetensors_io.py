"""Reading and writing safetensors files without holding them in memory.

The format is eight bytes of header length, a JSON header, and the tensors' bytes end to end
(https://huggingface.co/docs/safetensors). The `safetensors` library reads whole tensors; what is
needed here besides is the header alone (for `plan`), a strict check before any work starts, and a
writer that streams, so that pruning a model costs about as much memory as its largest tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sdcompress.bits import Array, Buffers, all_finite, bits, slices, type_name
from sdcompress.errors import InputError
from sdcompress.hashed_file import HashedFile

if TYPE_CHECKING:
    from torch import Tensor

# The format's name of a type → torch's name and the bytes of one number.
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4),
    "I64": ("int64", 8), "U64": ("uint64", 8), "F64": ("float64", 8),
}  # fmt: skip
PRUNABLE_DTYPES = frozenset({"F16", "BF16", "F32"})
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` are in bytes from the start of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in file order, and the file's own metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file; no tensor is read.

    Raises:
        InputError: the file is truncated, its header is not valid, or it claims more than it has.
    """
    fix = "download or convert the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(
                    f"{path}: expected a safetensors file, found a header of {length} bytes in a "
                    f"file of {size}; {fix}"
                )
            raw = json.loads(f.read(length))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: its safetensors header is not valid JSON; {fix}") from e
    if not isinstance(raw, dict):
        raise InputError(f"{path}: its safetensors header is not a JSON object; {fix}")
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: its safetensors metadata is not a JSON object; {fix}")
    start = 8 + length
    infos = sorted((_tensor_info(path, k, v, start) for k, v in raw.items()), key=_file_order)
    end = start
    for info in infos:
        if info.offset != end:
            raise InputError(f"{path}: tensor {info.name} overlaps another or leaves a gap; {fix}")
        end += info.nbytes
    if end != size:
        raise InputError(
            f"{path}: its header describes {end} bytes, the file has {size}; it is truncated or "
            f"corrupt, {fix}"
        )
    return Header(path, {i.name: i for i in infos}, metadata, start)


def _file_order(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes  # an empty tensor shares the offset of the one after it


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers_ok = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not numbers_ok or end - begin != math.prod(shape) * DTYPES[dtype][1]:
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(
            f"{path}: tensor {name} has an impossible header entry (type, shape and offsets "
            "disagree); download or convert the file again"
        ) from e
    return TensorInfo(path, name, dtype, shape, start + begin, end - begin)


def read_array(info: TensorInfo, buffer: Array | None = None) -> Array:
    """The tensor in its own type and shape, as `bits` has it, in a buffer that is large enough.

    Raises:
        InputError: the file shrank or cannot be read any more.
    """
    return _read(info, buffer, lambda part: None)


def read_finite(info: TensorInfo, buffer: Array | None = None) -> Array:
    """`read_array`.

    Raises:
        InputError: it holds NaN or infinity, too.
    """

    def check(part: Array) -> None:
        if not all_finite(part):
            raise InputError(
                f"{info.file}: {info.name} holds NaN or infinite weights; "
                "use a checkpoint that makes pictures (fp16 conversions of fp32 can overflow)"
            )

    return _read(info, buffer, check)


def read_rows(info: TensorInfo, picks: Sequence[range], buffers: Buffers) -> Iterator[Array]:
    """Some rows after others (numbers of a vector), each where the next ones will be.

    Raises:
        InputError: the file shrank or cannot be read any more.
    """
    rows, *row = info.shape if len(info.shape) > 1 else (info.numel,)
    nbytes, dtype = info.nbytes // max(rows, 1), _numpy_dtype(DTYPES[info.dtype][0])
    most = max(map(len, picks), default=0) * nbytes
    with _opened(info) as f, buffers.lent(most) as buffer:
        for pick in picks:
            f.seek(info.offset + pick.start * nbytes)
            part = buffer[: len(pick) * nbytes].view(dtype)
            _fill(part, f, info)
            yield part.reshape(len(pick), *row)


def _read(info: TensorInfo, buffer: Array | None, look: Callable[[Array], None]) -> Array:
    """The tensor; `look` has each part of it while it is in the cache."""
    memory = Buffers().take(info.nbytes) if buffer is None else buffer
    flat: Array = memory[: info.nbytes].view(_numpy_dtype(DTYPES[info.dtype][0]))
    with _opened(info) as f:
        f.seek(info.offset)
        for part in slices(flat):
            _fill(part, f, info)
            look(part)
    return flat.reshape(info.shape)


@contextmanager
def _opened(info: TensorInfo) -> Iterator[IO[bytes]]:
    try:
        with info.file.open("rb", buffering=0) as f:
            yield f
    except OSError as e:
        raise InputError(f"{info.file}: cannot be read ({e.strerror}); check the disk") from e


def _fill(part: Array, f: IO[bytes], info: TensorInfo) -> None:
    memory, done = part.view("u1").data, 0
    while done < len(memory) and (n := f.readinto(memory[done:])):  # type: ignore[attr-defined]
        done += n
    if done < len(memory):
        raise InputError(f"{info.file}: it shrank while being read; is something writing to it?")


def _numpy_dtype(name: str) -> Any:
    """numpy's type of torch's name; it has none of the shorter floats."""
    import numpy as np

    if not name.startswith(("bfloat", "float8")):
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor as a private torch copy, in its own type and shape; raises as `read_array`."""
    return as_tensor(read_array(info))


def as_tensor(array: Array) -> Tensor:
    """An array of `read_array` as torch sees it, in the same memory."""
    import numpy as np
    import torch

    dtype = getattr(torch, type_name(array))
    if not array.size:  # of which torch makes no view
        return torch.empty(array.shape, dtype=dtype)
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(dtype).reshape(array.shape)


def raw_bytes(tensor: Tensor | Array) -> memoryview:
    """The little-endian bytes of a contiguous CPU tensor, without a copy."""
    data: Any = bits(tensor).view("u1")
    return memoryview(data)


class StreamWriter(HashedFile):
    """Writes a file with the same tensors, types, shapes and order as `like`, one at a time.

    Folders on the way to it are made.
    """

    def __init__(self, path: Path, like: Header) -> None:
        self._todo: Iterator[TensorInfo] = iter(like.tensors.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path)
        with like.path.open("rb") as f:  # the header stays byte for byte what it was
            self.write(f.read(like.data_start))

    def write_tensor(self, info: TensorInfo, data: memoryview) -> None:
        expected = next(self._todo)
        if expected.name != info.name or data.nbytes != expected.nbytes:
            raise ValueError(f"expected {expected.name} of {expected.nbytes} bytes next")
        self.write(data)
