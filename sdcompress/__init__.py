"""sdcompress: smaller or faster Stable Diffusion 2 engines, with the proof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["__version__", "load"]

__version__ = "0.6.0"


def load(model: str | PathLike[str], dtype: str = "fp32", device: Any = "cpu") -> Any:
    """A diffusers `StableDiffusionPipeline` of a bundle of weights, or of any other model.

    Unlike diffusers' own `from_pretrained`, it knows blocks that were made narrower. `model` is
    what the commands take, `dtype` is fp32, fp16 or bf16, `device` is torch's.

    Raises:
        UsageError: there is no such `dtype`.
        InputError: there is no such model, or it is no Stable Diffusion 2 in safetensors.
    """
    from sdcompress.errors import UsageError
    from sdcompress.evaluation.images import load_pipeline
    from sdcompress.models.sources import resolve

    if dtype not in (known := ("fp32", "fp16", "bf16")):
        raise UsageError(f"dtype: expected one of {', '.join(known)}, found {dtype!r}")
    return load_pipeline(resolve(str(model)).directory, dtype, device)
