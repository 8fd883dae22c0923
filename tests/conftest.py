"""Fixtures more than one test file uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.recipe import Recipe
from tests.tiny_sd import make_tiny_sd

TWO_TO_FOUR = {
    "name": "two-to-four",
    "prune": {
        "text_encoder": {"rules": [{"scope": "linear", "sparsity": 0.475}]},
        "unet": {
            "rules": [
                {"pattern": "2:4"},
                {"layers": "conv_in", "keep": "dense", "reason": "next to the latents"},
            ]
        },
    },
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that begins empty; processes that tests start share it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SDCOMPRESS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded, untrained SD2-like diffusers directory. Do not write into it."""
    return make_tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_source(tiny_sd: Path) -> Bundle:
    return Bundle.of_source(tiny_sd, SourceRecord(id="tiny-sd", kind="directory"))


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe.model_validate(TWO_TO_FOUR)


@pytest.fixture(scope="session")
def pruned(tiny_source: Bundle, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny pipeline, 2:4 in the UNet. Do not write into it."""
    from sdcompress.prune import prune

    return prune(tiny_source, recipe, tmp_path_factory.mktemp("bundles") / "pruned")
