"""Who paints where, and who writes, under `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from sdcompress.evaluation.processes import processes

if TYPE_CHECKING:
    from torch import device


def exact_device() -> device:
    """The device of this process, or the CPU where that device has no fp64 (Apple's)."""
    import torch

    place = processes().device
    return torch.device("cpu") if place.type == "mps" else place


def is_main_process() -> bool:
    """Whether it is for this process to write and to print."""
    return not _launched() or processes().is_main_process


def on_main_process(make: Callable[[], None]) -> None:
    """Call it on one process only, while the others of `accelerate launch` wait."""
    if not _launched():
        make()
        return
    state = processes()
    state.wait_for_everyone()  # until all have looked at what is there
    try:
        if state.is_main_process:
            make()
    finally:
        state.wait_for_everyone()


def _launched() -> bool:
    # Asked before accelerate is, which would set up a GPU for what may need none.
    return int(os.environ.get("WORLD_SIZE", 1)) > 1
