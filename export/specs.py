"""What goes into and comes out of each exported component: names, types, shapes, in one table.

Names and types are those optimum's ONNX Runtime pipelines expect, so that an export loads there.
Light: no torch, no onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OPSET = 18  # what the exporter of torch writes natively; TensorRT 10.3 reads up to 20
DTypeName = Literal["fp16", "fp32"]
NUMPY_DTYPES: dict[DTypeName, str] = {"fp16": "float16", "fp32": "float32"}

# An axis is a number, a name of a size free at run time, or a key of the component's config.
Axis = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `dtype` "float" stands for the dtype of the export."""

    name: str
    dtype: Literal["float", "int32", "int64"]
    axes: tuple[Axis, ...]

    def numpy_dtype(self, dtype: DTypeName) -> str:
        return NUMPY_DTYPES[dtype] if self.dtype == "float" else self.dtype

    def shape(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every free axis at its size."""
        return tuple(axis if isinstance(axis, int) else axes[axis] for axis in self.axes)


@dataclass(frozen=True)
class Sizes:
    """What an engine of fixed shapes is made for: pictures at once, guided or not, their pixels.

    None means the model's own height and width.
    """

    images: int = 1
    guided: bool = True
    height: int | None = None
    width: int | None = None

    def batch(self, component: str) -> int:
        """With guidance, text encoder and UNet see each picture twice: without its prompt too."""
        return self.images * (2 if self.guided and component != "vae_decoder" else 1)


@dataclass(frozen=True)
class ComponentSpec:
    """An exported component.

    `model` is the diffusers component that holds its weights. The latents' height and width must
    be a multiple of `multiple`.
    """

    name: str
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiple: int = 1


# Free axes: batch (images, twice that with guidance), tokens, height and width of the latents,
# image_height and image_width of the picture.
_TABLE = (
    ComponentSpec(
        name="text_encoder",
        model="text_encoder",
        inputs=(TensorSpec("input_ids", "int32", ("batch", "max_position_embeddings")),),
        outputs=(
            TensorSpec(
                "last_hidden_state", "float", ("batch", "max_position_embeddings", "hidden_size")
            ),
            TensorSpec("pooler_output", "float", ("batch", "hidden_size")),
        ),
    ),
    ComponentSpec(
        name="unet",
        model="unet",
        inputs=(
            TensorSpec("sample", "float", ("batch", "in_channels", "height", "width")),
            TensorSpec("timestep", "int64", ()),
            TensorSpec(
                "encoder_hidden_states", "float", ("batch", "tokens", "cross_attention_dim")
            ),
        ),
        outputs=(TensorSpec("out_sample", "float", ("batch", "out_channels", "height", "width")),),
    ),
    ComponentSpec(
        name="vae_decoder",
        model="vae",
        inputs=(
            TensorSpec("latent_sample", "float", ("batch", "latent_channels", "height", "width")),
        ),
        outputs=(
            TensorSpec("sample", "float", ("batch", "out_channels", "image_height", "image_width")),
        ),
    ),
)
COMPONENTS = tuple(spec.name for spec in _TABLE)
MODEL_OF = {spec.name: spec.model for spec in _TABLE}


def component_spec(component: str, config: Mapping[str, Any]) -> ComponentSpec:
    """The row of the table for `component`, with the numbers of its `config.json` filled in."""
    (spec,) = (spec for spec in _TABLE if spec.name == component)

    def fill(tensor: TensorSpec) -> TensorSpec:
        axes = tuple(
            config.get(axis, axis) if isinstance(axis, str) else axis for axis in tensor.axes
        )
        return TensorSpec(tensor.name, tensor.dtype, axes)

    # Each level of the UNet but the last halves height and width, and skips must meet again.
    multiple = 2 ** (len(config["down_block_types"]) - 1) if component == "unet" else 1
    return ComponentSpec(
        name=spec.name,
        model=spec.model,
        inputs=tuple(fill(t) for t in spec.inputs),
        outputs=tuple(fill(t) for t in spec.outputs),
        multiple=multiple,
    )


def make_inputs(
    spec: ComponentSpec,
    config: Mapping[str, Any],
    dtype: DTypeName,
    *,
    batch: int = 2,
    height: int = 8,
    width: int = 8,
    tokens: int = 77,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Seeded inputs of the right names, types and shapes, for parity checks and measurements.

    `height` and `width` are those of the latents. Floats are standard normal, which is what
    latents and normalised hidden states are (the decoder's are scaled back); token ids are drawn
    below the last one, which CLIP uses as the end of the text and which therefore ends every row;
    the timestep is 500.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    free = {"batch": batch, "height": height, "width": width, "tokens": tokens}
    made: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in spec.inputs:
        shape, kind = tensor.shape(free), tensor.numpy_dtype(dtype)
        if tensor.name == "input_ids":
            made[tensor.name] = rng.integers(0, config["vocab_size"] - 1, shape).astype(kind)
            made[tensor.name][:, -1] = config["vocab_size"] - 1
        elif tensor.name == "timestep":
            made[tensor.name] = np.array(500, kind)
        else:
            values = rng.standard_normal(shape, np.float32)
            if tensor.name == "latent_sample":
                values /= config.get("scaling_factor", 1.0)  # as pipelines do before decoding
            made[tensor.name] = values.astype(kind)
    return made


def static_shapes(
    component: str, config: Mapping[str, Any], batch: int, height: int, width: int, tokens: int
) -> dict[str, tuple[int, ...]]:
    """The shape of each input at one batch, latent height and width, and length of the prompt."""
    free = {"batch": batch, "height": height, "width": width, "tokens": tokens}
    return {t.name: t.shape(free) for t in component_spec(component, config).inputs}


# Names that VAE checkpoints from before diffusers 0.18 use for their one attention; diffusers
# renames them whenever it loads one.
_OLD_VAE_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
_TEXT_PREFIX = "text_model."  # in weight files, but not in the modules of transformers 5


def canonical_key(component: str, name: str) -> str:
    """The one key of a tensor that goes by several names, in old files and in new libraries."""
    if component == "text_encoder":
        return name if name.startswith(_TEXT_PREFIX) else _TEXT_PREFIX + name
    if component == "vae_decoder" and ".attentions." in name:
        for old, new in _OLD_VAE_NAMES.items():
            name = name.replace(old, new)
    return name


def unused_key(component: str, key: str) -> bool:
    """Whether weight files may hold `key` without the exported component having a use for it."""
    if component == "vae_decoder":
        return key.startswith(("encoder.", "quant_conv."))
    return component == "text_encoder" and key.endswith(".position_ids")
