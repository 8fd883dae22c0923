"""One file that holds the state of a training: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdcompress.errors import InputError


def write(file: Path, state: dict[str, Any]) -> str | None:
    """Write `state` beside `file`, then rename it; returns why that failed, None where it did not.

    A full disk leaves the file as it was. `state` holds tensors, numbers, texts, lists and dicts.
    """
    import torch

    work = file.with_name(f".{file.name}.partial")
    try:
        with work.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(work, file)
    except OSError as e:
        return e.strerror or str(e)
    except RuntimeError as e:  # torch's own writer hides what the system said
        cause = e.__context__
        return (isinstance(cause, OSError) and cause.strerror) or str(e).splitlines()[0]
    finally:
        work.unlink(missing_ok=True)
    return None


def read(file: Path) -> dict[str, Any] | None:
    """The state in `file`, None where there is no file. No code in it is run.

    Raises:
        InputError: it cannot be read.
    """
    import torch

    if not file.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch's many ways to say that it is not one of its files
        raise InputError(
            f"{file}: not a checkpoint that can be read; remove it, or say --fresh to begin anew"
        ) from e
    return state
