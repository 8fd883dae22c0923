"""The JSON Schemas of every document other programs read; `make schemas` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from export.ranges import Ranges
from sdcompress import registry
from sdcompress.build_report import BuildReport
from sdcompress.bundle import Manifest, write_json
from sdcompress.results import Results

FOLDER = Path(__file__).parent.parent / "schemas"


def schemas() -> dict[str, dict[str, Any]]:
    """Name → schema: what bundles and runs hold, and what each command prints with --json."""
    documents: dict[str, type[BaseModel]] = {
        "build_report": BuildReport,
        "manifest": Manifest,
        "ranges": Ranges,
        "results": Results,
    }
    for name in registry.names("commands"):
        documents[name] = registry.load("commands", name).Output
    return {
        name: model.model_json_schema(mode="serialization") for name, model in documents.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, schema in schemas().items():
        write_json(FOLDER / f"{name}.json", schema)
