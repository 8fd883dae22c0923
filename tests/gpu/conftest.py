"""Tests in this directory need an NVIDIA GPU; without one they are skipped, with this reason."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    if not mine:
        return
    import torch

    if not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU and a torch build that can use it"
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))
