"""Gradients of the denoising loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdcompress.calibrate import Calibrator, Counted, Statistics, Wanted


def record(calibrator: Calibrator, wanted: Wanted, progress: Counted) -> Statistics:
    raise NotImplementedError
