"""Graphs that have been traced before: an architecture is traced once, not in every process.

A graph depends on nothing but config, dtype, opset, the tools and our own code, so the key is made
of these and a stored graph is the very bytes that tracing gives. The cache may be deleted at any
time; a file that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from export.weight_map import WeightMap
from sdcompress.bundle import to_json, tool_versions
from sdcompress.cache import cache_folder
from sdcompress.models import modules

Traced = tuple[bytes, WeightMap]  # the serialised graph and the map to its weights


def cached(key: object, trace: Callable[[], Traced]) -> Traced:
    """What `trace` returns, from the cache if it has been called for `key` before."""
    digest = hashlib.sha256(to_json([key, tool_versions(), _code()]).encode()).hexdigest()
    file = cache_folder() / "graphs" / digest
    if (found := _read(file)) is not None:
        return found
    model, weight_map = trace()
    with suppress(OSError):  # a full or read-only disk only costs the next process its time
        file.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may trace the same graph at once: each writes a file of its own.
        work = file.with_name(f"{digest}.{os.getpid()}.partial")
        work.write_bytes(_pack(model, weight_map))
        work.replace(file)
    return model, weight_map


def _pack(model: bytes, weight_map: WeightMap) -> bytes:
    """Three parts: the digest of the rest, the map, the graph."""
    rest = weight_map.model_dump_json().encode() + b"\n" + model
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def _read(file: Path) -> Traced | None:
    try:
        digest, _, rest = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest.decode("ascii", errors="replace") != hashlib.sha256(rest).hexdigest():
        return None
    facts, _, model = rest.partition(b"\n")
    return model, WeightMap.model_validate_json(facts)


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the modules that shape a graph, so that a change of ours asks for new ones."""
    digest = hashlib.sha256()
    ours = (f"{name}.py" for name in ("precision", "specs", "to_onnx", "weight_map"))
    for file in (*map(Path(__file__).with_name, ours), Path(modules.__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()
