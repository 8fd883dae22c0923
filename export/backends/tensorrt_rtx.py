"""TensorRT-RTX: engines for RTX cards, built ahead of time on a machine that needs no GPU."""

from __future__ import annotations

from export.backends.tensorrt import TensorRTBackend

BACKEND = TensorRTBackend("tensorrt_rtx")
