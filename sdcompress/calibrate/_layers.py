"""The layers of a loaded model, by the names that files give them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sdcompress.errors import InputError


def find_module(root: Any, layer: str) -> Any:
    """The module whose weight a file calls `layer`.

    Raises:
        InputError: the model has none.
    """
    name = layer.removesuffix(".weight")
    prefix = "text_model."  # of transformers 4; 5 has neither such modules nor writes such files
    for spelling in (name, name.removeprefix(prefix), prefix + name):
        with suppress(AttributeError):
            return root.get_submodule(spelling)
    raise InputError(
        f"{layer}: the loaded model has no such layer, so that nothing can be recorded for it; "
        "keep it dense, or use a criterion that needs no prompts"
    )


def unused(name: str) -> InputError:
    """The error of a layer that nothing comes by."""
    return InputError(
        f"{name}: expected activations, found none: painting does not use this layer; keep it "
        "dense, or use a criterion that needs no prompts"
    )


def is_conv(module: Any) -> bool:
    return int(module.weight.ndim) == 4
