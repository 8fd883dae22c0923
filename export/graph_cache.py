"""Graphs that have been made before: an architecture is traced once, not in every process.

A graph depends on nothing but config, dtype, opset, the tools and our own code, so the key is made
of these and a stored graph is the very bytes that tracing gives. The cache may be deleted at any
time; a file that is damaged is made again. Reading it takes neither torch nor onnx.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from export.weight_map import WeightMap
from sdcompress.bundle import to_json, tool_versions
from sdcompress.cache import cache_folder
from sdcompress.models import modules


class Skeleton(BaseModel):
    """The serialised graph, its weights all external and not there yet, and the map to them.

    What an fp16 graph computes in fp32: `fp32_layers` to keep numbers in range, named after their
    weights or else their nodes, and `fp32_products` are all the nodes that multiply in fp32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: bytes
    weight_map: WeightMap
    fp32_layers: tuple[str, ...] = ()
    fp32_products: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model).hexdigest()


def cached(key: object, make: Callable[[], Skeleton]) -> Skeleton:
    """What `make` returns, from the cache if it has been called for `key` before."""
    digest = hashlib.sha256(to_json([key, tool_versions(), _code()]).encode()).hexdigest()
    file = cache_folder() / "graphs" / digest
    if (found := _read(file)) is not None:
        return found
    made = make()
    with suppress(OSError):  # a full or read-only disk only costs the next process its time
        file.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may trace the same graph at once: each writes a file of its own.
        work = file.with_name(f"{digest}.{os.getpid()}.partial")
        work.write_bytes(_pack(made))
        work.replace(file)
    return made


def _pack(made: Skeleton) -> bytes:
    """Three parts, a line each: the digest of the rest, what is known of the graph, the graph."""
    rest = made.model_dump_json(exclude={"model"}).encode() + b"\n" + made.model
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def _read(file: Path) -> Skeleton | None:
    try:
        digest, _, rest = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest.decode("ascii", errors="replace") != hashlib.sha256(rest).hexdigest():
        return None
    facts, _, model = rest.partition(b"\n")
    try:
        return Skeleton.model_validate({**json.loads(facts), "model": model})
    except ValueError:  # whole, and not of this form
        return None


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the modules that shape a graph, so that a change of ours asks for new ones."""
    digest = hashlib.sha256()
    ours = (f"{name}.py" for name in ("graph_cache", "precision", "specs", "tracing", "weight_map"))
    for file in (*map(Path(__file__).with_name, ours), Path(modules.__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()
