"""Comparing outputs with what the host computed: raw values in, one number out."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

FORMATS = {"float16": "e", "float32": "f", "int32": "i", "int64": "q"}


def unpack(data: bytes | bytearray, dtype: str) -> tuple[float, ...]:
    """Little-endian values of `dtype` as Python numbers."""
    letter = FORMATS[dtype]
    return struct.unpack(f"<{len(data) // struct.calcsize('<' + letter)}{letter}", data)


def relative_error(found: Sequence[float], expected: Sequence[float]) -> float:
    """Root mean square of the difference over that of `expected`.

    NaN where `found` holds NaN or infinity, infinity where the lengths differ.
    """
    if len(found) != len(expected):
        return math.inf
    if not all(map(math.isfinite, found)):
        return math.nan
    difference = math.fsum((f - e) ** 2 for f, e in zip(found, expected, strict=True))
    scale = math.fsum(e * e for e in expected)
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / scale)


def verdict(what: str, errors: dict[str, float], tolerance: float) -> tuple[bool, str]:
    """Whether all outputs of `what` are near enough, and that in words."""
    name, worst = max(errors.items(), key=lambda item: _rank(item[1]))
    if math.isnan(worst):
        return False, f"{what}: {name} holds NaN or infinity, which is seen as a black picture"
    words = f"{what}: {name} differs by {worst:.1e} of the host's output, {tolerance:g} allowed"
    return worst <= tolerance, words


def _rank(error: float) -> float:
    return math.inf if math.isnan(error) else error
