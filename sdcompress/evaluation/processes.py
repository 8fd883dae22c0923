"""The processes that `accelerate launch` started; without it there is one."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=1)  # the first process measures while the others wait


def processes() -> PartialState:
    """Which of how many this process is, and the device that it works on."""
    import torch
    from accelerate import PartialState

    # Without a GPU accelerate takes what torchrun started for one process each, unless told.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
