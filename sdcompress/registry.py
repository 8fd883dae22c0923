"""The file name is the registry: what a folder of this package offers, read from its listing."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType


def names(folder: str, package: str = "sdcompress") -> list[str]:
    """The names a folder offers: its modules, without those that start with an underscore.

    `folder` is relative to the package; "evaluation/metrics" is one inside another.
    """
    path = Path(__file__).parent.parent / package / folder
    return sorted(p.stem for p in path.glob("*.py") if not p.stem.startswith("_"))


def load(folder: str, name: str, package: str = "sdcompress") -> ModuleType:
    """Import one of them. The caller has checked the name against `names`."""
    return import_module(f"{package}.{folder.replace('/', '.')}.{name}")


def summary(folder: str, name: str, package: str = "sdcompress") -> str:
    """The first line of the module's docstring, without importing it."""
    import ast

    source = (Path(__file__).parent.parent / package / folder / f"{name}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
