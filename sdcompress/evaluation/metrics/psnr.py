"""PSNR of each picture to the dense model's of its seed, in dB.

Two identical pictures have an infinite ratio; it is capped at 100 dB, which no two pictures of 8
bits and up to a megapixel that differ in a visible way come near, so that means exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.evaluation.metrics import Batch, Drift

if TYPE_CHECKING:
    from sdcompress.evaluation.metrics import Floats

CAP = 100.0


def _between(made: Batch, dense: Batch) -> Floats:
    import numpy as np

    error = np.mean((made.images.astype(np.float64) - dense.images) ** 2, axis=(1, 2, 3))
    # The error at which the ratio is CAP.
    values: Floats = 10 * np.log10(255**2 / np.maximum(error, 255**2 / 10 ** (CAP / 10)))
    return values


METRIC = Drift(unit="dB", better="higher", between=_between)
