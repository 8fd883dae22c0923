"""How long the blocks of a component take at several widths, measured on one backend."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sdcompress.errors import UsageError


class LatencyTable(BaseModel):
    """Times in seconds of one run of a component, and of its blocks by their width in channels.

    `total` is of the whole dense component, measured beside them; `rest` follows. What it was
    measured with stands in `machine`, `backend`, `options` and `shapes` (those of the inputs).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sdcompress_latency: Literal[1] = 1
    component: str
    machine: str
    backend: str
    options: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    rounds: int
    total: float
    blocks: dict[str, dict[int, float]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def seconds(self, block: str, width: int) -> float:
        """Of a block at this width: measured, or in between two widths that were.

        Raises:
            UsageError: the table does not know the block, or only wider ones.
        """
        measured = self.blocks.get(block, {})
        widths = sorted(measured)
        if not widths or not widths[0] <= width <= widths[-1]:
            found = f"widths {widths[0]} to {widths[-1]}" if widths else "no such block"
            raise UsageError(
                f"latency table: expected {block} at width {width}, found {found}; measure a "
                "table of this model with `sdcompress latency`"
            )
        above = bisect_left(widths, width)
        if widths[above] == width:
            return measured[width]
        low, high = widths[above - 1], widths[above]
        part = (width - low) / (high - low)
        return measured[low] + part * (measured[high] - measured[low])


def read_table(file: Path) -> LatencyTable:
    """A table that `sdcompress latency` has written.

    Raises:
        UsageError: it is none.
    """
    try:
        return LatencyTable.model_validate_json(file.read_bytes())
    except OSError as e:
        raise UsageError(f"{file}: expected a latency table, found {e.strerror}") from e
    except ValidationError as e:
        raise UsageError(
            f"{file}: expected a latency table of `sdcompress latency`, found another file; "
            "measure one"
        ) from e
