"""Tests in this directory need an NVIDIA GPU; without one they are skipped, with this reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcompress.bundle import Bundle


@pytest.fixture(scope="session")
def onnx_fp16(
    tiny_source: Bundle, pruned: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Exports of the tiny pipeline in fp16, "dense" and "sparse". Do not write into them."""
    from export.to_onnx import export_bundle

    place = tmp_path_factory.mktemp("onnx-fp16")
    sources = {"dense": tiny_source, "sparse": pruned}
    return {t: export_bundle(b, place / t, dtype="fp16") for t, b in sources.items()}


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
