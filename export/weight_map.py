"""Which initializer of an ONNX graph holds which tensor of the state dict, how turned, and where.

The exporter transposes and reshapes weights and forgets their names. Verification, refitting an
engine and caching all need the way back, so it is found once, by value, and kept beside the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from export.specs import DTypeName
from sdcompress.bundle import write_json
from sdcompress.errors import InputError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

WEIGHT_MAP = "weight_map.json"
DATA = "model.onnx_data"  # the name optimum gives the one external data file

Transform = Literal["identity", "transpose", "reshape"]
_SUFFIX: dict[Transform, str] = {"identity": "", "transpose": "_t", "reshape": ".reshaped"}

# Page alignment lets a runtime map a large tensor straight from the file; for small ones it would
# only be padding.
_PAGE, _LINE = 4096, 64


class Entry(BaseModel):
    """One initializer: `key`'s tensor of shape `key_shape`, stored as `shape` at `offset` bytes of
    the component's external data file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    transform: Transform
    key_shape: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @model_validator(mode="after")
    def _turned(self) -> Entry:
        if self.transform == "transpose":
            possible = self.shape == self.key_shape[::-1]
        else:
            possible = math.prod(self.shape) == math.prod(self.key_shape)
        if not possible:
            raise ValueError(f"{self.key}: {self.shape} is no {self.transform} of {self.key_shape}")
        return self

    def to_key(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The stored array, back in the state dict's layout."""
        return stored.T if self.transform == "transpose" else stored.reshape(self.key_shape)

    def from_key(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The state dict's array as it is stored."""
        return weight.T if self.transform == "transpose" else weight.reshape(self.shape)


class WeightMap(BaseModel):
    """Every weight of one exported component. All have the dtype of the export and lie outside the
    graph, so that graphs of one architecture are the same file whatever the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    dtype: DTypeName
    opset: int
    initializers: dict[str, Entry]

    def by_key(self) -> dict[str, list[Entry]]:
        """key → its entries, in file order."""
        entries: dict[str, list[Entry]] = {}
        for entry in sorted(self.initializers.values(), key=lambda e: e.offset):
            entries.setdefault(entry.key, []).append(entry)
        return entries

    def write(self, directory: Path) -> None:
        write_json(directory / WEIGHT_MAP, self.model_dump(mode="json"))

    @classmethod
    def read(cls, directory: Path) -> WeightMap:
        """Raises InputError where there is no valid map."""
        file = directory / WEIGHT_MAP
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as e:
            raise InputError(
                f"{file}: expected the weight map of an export, found none that can be read; "
                "export the model again"
            ) from e


def layer_of(node: onnx.NodeProto, weight_map: WeightMap) -> str:
    """The module whose weight a node reads, or the node's own name if it reads none."""
    for name in node.input:
        if entry := weight_map.initializers.get(name):
            return entry.key.rpartition(".")[0]
    return node.name


def match_by_value(
    initializers: Mapping[str, NDArray[Any]], weights: Mapping[str, NDArray[Any]]
) -> dict[str, tuple[str, Transform]]:
    """Find which weight each initializer is: its name → (state-dict key, transform).

    The weights' values must be distinct. Initializers that are none of the weights (constants of
    the architecture) are left out.
    """
    known: dict[object, tuple[str, Transform]] = {}
    for key, weight in weights.items():
        if weight.ndim == 2:
            known[_fingerprint(weight.T)] = key, "transpose"
    for key, weight in weights.items():  # after: of a vector, the plain reading wins
        known[_fingerprint(weight)] = key, "identity"
    found: dict[str, tuple[str, Transform]] = {}
    for name, stored in initializers.items():
        if (hit := known.get(_fingerprint(stored))) is None:
            continue
        key, transform = hit
        if transform == "identity" and stored.shape != weights[key].shape:
            transform = "reshape"
        weight = weights[key].T if transform == "transpose" else weights[key].reshape(stored.shape)
        if stored.shape == weight.shape and (_bits(stored) == _bits(weight)).all():
            found[name] = key, transform
    return found


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """As integers, which compare ten times as fast as halves."""
    return array.view(f"u{array.itemsize}")


def _fingerprint(array: NDArray[Any]) -> object:
    """Equal for arrays that are reshapes of each other; telling enough to try no other."""
    return array.dtype.str, array.size, array.flat[:16].tobytes()


def lay_out(
    found: Mapping[str, tuple[str, Transform]],
    initializers: Mapping[str, NDArray[Any]],
    weights: Mapping[str, NDArray[Any]],
) -> dict[str, tuple[str, Entry]]:
    """Give each initializer found its final name and its place in the data file, ordered by key.

    Returns the exporter's name → (final name, entry).
    """
    laid: dict[str, tuple[str, Entry]] = {}
    end = 0
    for name, (key, transform) in sorted(found.items(), key=lambda item: (item[1], item[0])):
        array = initializers[name]
        offset = _aligned(end, array.nbytes)
        end = offset + array.nbytes
        entry = Entry(
            key=key,
            transform=transform,
            key_shape=weights[key].shape,
            shape=array.shape,
            offset=offset,
            nbytes=array.nbytes,
        )
        laid[name] = key + _SUFFIX[transform], entry
    return laid


def _aligned(offset: int, nbytes: int) -> int:
    """The first allowed offset from `offset` on for a tensor of `nbytes`."""
    step = _PAGE if nbytes >= 16 * _PAGE else _LINE
    return -(-offset // step) * step
