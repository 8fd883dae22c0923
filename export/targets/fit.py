"""What a plan means for a device, said before anything is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from export.targets import Target
from sdcompress.errors import UsageError
from sdcompress.patterns import Pattern, parse_pattern
from sdcompress.plan import LayerPlan, SparsityPlan
from sdcompress.recipe import Recipe

# TensorRT times the sparse kernels of every 2:4 layer (its input channels are then a multiple of
# 4), but those of smaller layers have not been seen to win.
SPARSE_CHANNELS = 256
# The widest place of SD2's VAE decoder: what a convolution reads, writes and adds, at full size.
DECODER_MAPS, DECODER_CHANNELS = 3, 256


class SparseCandidates(BaseModel):
    """The 2:4 layers, and those with more than 256 input and more than 256 output channels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    large_enough: int
    of: int


def sparse_candidates(target: Target, plan: SparsityPlan) -> SparseCandidates | None:
    """None where the device has no sparse tensor cores."""
    if not target.sparse_tensor_cores:
        return None
    layers = [p for p in _n_to_m(plan) if _is_two_to_four(_pattern(p))]
    large = [p for p in layers if min(p.shape[:2]) > SPARSE_CHANNELS]
    return SparseCandidates(large_enough=len(large), of=len(layers))


def check_backend(target: Target, backend: str) -> None:
    """Raises UsageError for an engine builder that does not build for the target."""
    if backend.startswith("tensorrt") and backend not in target.backends:
        raise UsageError(
            f"{backend} does not build for {target.name}, {' or '.join(target.backends)} does; "
            "with backend onnxruntime pictures are made here, and device.tar builds on the device"
        )


def warnings(target: Target, recipe: Recipe, plan: SparsityPlan, native: int) -> tuple[str, ...]:
    """What will not be as the recipe hopes on this device, a line each.

    `native` is the model's own picture size in pixels, used where the recipe names none.
    """
    return (
        *_about_sparsity(target, recipe, plan),
        *_about_size(target, recipe, plan, native),
    )


def _about_sparsity(target: Target, recipe: Recipe, plan: SparsityPlan) -> Iterator[str]:
    layers = _n_to_m(plan)
    if layers and not target.sparse_tensor_cores:
        yield (
            f"{target.name} has no sparse tensor cores: {_patterns(layers)} in {len(layers)} "
            "layers makes nothing faster there, its zeros only make the packed file smaller"
        )
        return
    if other := [p for p in layers if not _is_two_to_four(_pattern(p))]:
        yield (
            f"sparse tensor cores know 2:4 only: {_patterns(other)} in {len(other)} layers makes "
            "nothing faster"
        )
    if len(layers) > len(other) and recipe.engine.backend == "tensorrt_rtx":
        yield (
            "TensorRT-RTX has no sparse kernels so far: its plans are the same with and without "
            "the flag for sparse weights; 2:4 makes nothing faster there"
        )


def _about_size(target: Target, recipe: Recipe, plan: SparsityPlan, native: int) -> Iterator[str]:
    asked = recipe.sampling
    height, width = asked.height or native, asked.width or native
    if max(height, width) > target.resolution:
        yield (
            f"{width}×{height} pixels is more than the {target.resolution} suggested for "
            f"{target.name}"
        )
    itemsize = 2 if recipe.export.dtype == "fp16" else 4
    weights = {c: n * itemsize for c, n in plan.parameters.items()}
    activations = DECODER_MAPS * DECODER_CHANNELS * height * width * itemsize
    set_by_recipe = "residency" in recipe.bench.model_fields_set
    residency = recipe.bench.residency if set_by_recipe else target.residency
    largest = max(weights.values())
    held = sum(weights.values()) if residency == "resident" else largest
    if held + activations <= target.memory_gb * 1e9:
        return
    fits_in_turn = residency == "resident" and largest + activations <= target.memory_gb * 1e9
    yield (
        f"{target.name} has {target.memory_gb:g} GB, {residency} engines need about "
        f"{_gb(held + activations)} ({_gb(held)} of weights in {recipe.export.dtype}, "
        f"{_gb(activations)} for the decoder's maps at {width}×{height}); "
        + (
            "set 'bench: {residency: sequential}'"
            if fits_in_turn
            else "use a smaller picture, fp16 or a larger device"
        )
    )


def _n_to_m(plan: SparsityPlan) -> list[LayerPlan]:
    return [p for p in plan.layers if p.pruned and _pattern(p).m is not None]


def _pattern(layer: LayerPlan) -> Pattern:
    return parse_pattern(layer.pattern or "unstructured")


def _is_two_to_four(pattern: Pattern) -> bool:
    """Whether every weight of this pattern has at most two of each four consecutive ones left."""
    n, m = pattern.n, pattern.m
    return n is not None and m is not None and ((m % 4 == 0 and n <= 2) or (n, m) == (1, 2))


def _patterns(layers: Sequence[LayerPlan]) -> str:
    return ", ".join(sorted({str(_pattern(p)) for p in layers}))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
