"""How pictures are made where nobody says: steps and guidance of each kind of model."""

from __future__ import annotations

from typing import Any

from sdcompress.bundle import SourceRecord
from sdcompress.models import mini_sd2

STEPS, GUIDANCE = 25, 7.5  # what Stable Diffusion 2's own model card uses with a fast solver


def sampling_defaults(source: SourceRecord) -> dict[str, Any]:
    """`steps`, `guidance`, `height` and `width` (pixels; None is the model's native size)."""
    small = source.kind == "mini-sd2"
    return {
        "steps": mini_sd2.DEFAULT_STEPS if small else STEPS,
        "guidance": mini_sd2.DEFAULT_GUIDANCE if small else GUIDANCE,
        "height": None,
        "width": None,
    }
