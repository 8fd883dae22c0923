"""Where what was made once is kept for the next process: imports, merges, traced graphs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SDCOMPRESS_CACHE`, else `sdcompress` in the user's cache; it need not exist yet."""
    if chosen := os.environ.get("SDCOMPRESS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdcompress"
