"""Pictures from an engine: tokenizer, scheduler and three runners, whatever the backend."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends import Runner, load_backend, open_component
from export.residency import Components, Residency
from export.specs import component_spec
from sdcompress.errors import InputError, UsageError, VerificationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class Geometry:
    """The numbers of a pipeline that its pictures depend on; lengths in pixels.

    A picture of height x width pixels has latents [channels, height/scale, width/scale], and both
    sides must be multiples of `multiple`.
    """

    channels: int
    scale: int
    multiple: int
    default_size: int
    scaling_factor: float

    @classmethod
    def read(cls, bundle: Path, vae_name: str = "vae_decoder") -> Geometry:
        """Of an exported bundle, or with `vae_name="vae"` of a bundle of weights."""
        unet, vae = (_config(bundle / c / "config.json") for c in ("unet", vae_name))
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        return cls(
            channels=unet["in_channels"],
            scale=scale,
            multiple=scale * component_spec("unet", unet).multiple,
            default_size=unet["sample_size"] * scale,
            scaling_factor=vae.get("scaling_factor", 0.18215),
        )

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """[channels, height, width] of the latents; raises UsageError for sizes that do not fit."""
        from sdcompress.evaluation.images import fitting_size

        height, width = fitting_size(height, width, self.default_size, self.multiple)
        return self.channels, height // self.scale, width // self.scale


def check_sizes(
    details: Mapping[str, Any], geometry: Geometry, guidance: float, height: int, width: int
) -> None:
    """Refuse a picture that an engine of fixed shapes was not built for.

    `details` are those of its manifest; without `sizes` the engine takes any. One picture is made
    at a time, of `height` x `width` pixels, in two branches with `guidance` above 1.

    Raises:
        UsageError: which names the options of `build` that make an engine for it.
    """
    built = details.get("sizes")
    if not built:
        return
    default = geometry.default_size
    asked = (1, guidance > 1, height, width)
    fixed = (
        built["images"],
        built["guided"],
        built["height"] or default,
        built["width"] or default,
    )
    if asked == fixed:
        return

    def say(images: int, guided: bool, height: int, width: int) -> str:
        many = f"{images} picture{'s' if images > 1 else ''} at once"
        return f"{many} of {height}×{width} pixels {'with' if guided else 'without'} guidance"

    branches = "--guidance" if guidance > 1 else "--no-guidance"
    flags = f"--height {height} --width {width} {branches}"
    raise UsageError(
        f"the engine was built for {say(*fixed)}, asked is {say(*asked)}; "
        f"build it again with {flags}, or ask for what it was built for"
    )


def generate(
    engine: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    residency: Residency = "resident",
    progress: Callable[[int, int], None] | None = None,
) -> list[Image]:
    """One picture for each prompt and its seed.

    Pictures are made one at a time from latents drawn from their own seed, so that a picture does
    not depend on the others in the list. With `guidance` <= 1 there is no second, unconditional
    branch (as distilled models want it). All prompts are encoded, then all latents denoised, then
    all decoded, so that with `residency` "sequential" each component is loaded once, on its own;
    the pictures are the same. `progress(done, total)` counts those denoised.

    Raises:
        UsageError: a size that does not fit the model or the engine, lists of different lengths,
            or an engine that cannot run here.
        VerificationError: a component gave NaN or infinity, or a picture is black all over.
    """
    from sdcompress.bundle import Bundle
    from sdcompress.evaluation.images import check_request

    check_request(prompts, seeds, steps)
    geometry = Geometry.read(engine)
    shape = geometry.latent_shape(height, width)
    details = Bundle.open(engine, stages=("engine",)).manifest.details
    check_sizes(details, geometry, guidance, shape[1] * geometry.scale, shape[2] * geometry.scale)
    if why := load_backend(str(details["backend"])).why_not_run(details):
        raise UsageError(f"{engine}: cannot run here: {why}")
    negative, *positive = tokenize(engine, [negative_prompt, *prompts])
    painter = Painter(engine, steps, guidance)
    with Components(lambda component: open_component(engine, component), residency) as components:
        with components.use("text_encoder") as encoder:
            contexts = [painter.encode(encoder, negative, tokens) for tokens in positive]
        latents = []
        with components.use("unet") as unet:
            for i, (context, seed) in enumerate(zip(contexts, seeds, strict=True)):
                latents.append(painter.denoise(unet, context, seed, shape))
                if progress:
                    progress(i + 1, len(seeds))
        with components.use("vae_decoder") as decoder:
            return [painter.decode(decoder, one) for one in latents]


def tokenize(engine: Path, prompts: Sequence[str]) -> NDArray[np.int64]:
    """Token ids [n, 77] of the bundle's own tokenizer, padded and cut to the model's length."""
    from transformers import CLIPTokenizer

    folder = engine / "tokenizer"
    if not folder.is_dir():
        raise InputError(f"{folder}: the tokenizer is missing; export the model again")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length = tokenizer.model_max_length
    for prompt in prompts:
        if len(tokenizer(prompt, verbose=False)["input_ids"]) > length:
            warnings.warn(
                f"the model reads {length} tokens; the end of {prompt[:40]!r}… is cut off",
                stacklevel=3,
            )
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    ids: NDArray[np.int64] = batch["input_ids"]
    return ids


class Painter:
    """The three steps to a single picture; models and settings stay the same between pictures."""

    def __init__(self, engine: Path, steps: int, guidance: float) -> None:
        self._steps, self._guidance = steps, guidance
        self._scheduler_folder = engine / "scheduler"
        self._scaling_factor = Geometry.read(engine).scaling_factor

    def encode(
        self, encoder: Runner, negative: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Hidden states [1, 77, C] of the prompt, or [2, 77, C] with those of the negative one."""
        import numpy as np

        ids = np.stack([negative, tokens] if self._guidance > 1 else [tokens])
        return _infer(encoder, "text_encoder", {"input_ids": ids}, "last_hidden_state")

    def denoise(
        self, unet: Runner, context: NDArray[Any], seed: int, shape: tuple[int, int, int]
    ) -> NDArray[Any]:
        """Latents [1, *shape] as the decoder wants them."""
        import numpy as np
        import torch

        from sdcompress.evaluation.images import initial_latents, load_scheduler, step_arguments

        scheduler = load_scheduler(self._scheduler_folder)
        scheduler.set_timesteps(self._steps)
        generator = torch.Generator().manual_seed(seed)
        latents = initial_latents(generator, shape) * scheduler.init_noise_sigma
        extra = step_arguments(scheduler, generator)
        for i, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latents, timestep).numpy()
            predicted = _infer(
                unet,
                "unet",
                {
                    "sample": np.repeat(scaled, len(context), axis=0),
                    "timestep": _timestep(unet, float(timestep)),
                    "encoder_hidden_states": context,
                },
                "out_sample",
                f" at step {i + 1} of {len(scheduler.timesteps)}",
            ).astype(np.float32)
            if len(context) == 2:
                without, with_prompt = predicted[:1], predicted[1:]
                predicted = without + self._guidance * (with_prompt - without)
            latents = scheduler.step(
                torch.from_numpy(predicted), timestep, latents, **extra
            ).prev_sample
        scaled_back: NDArray[Any] = (latents / self._scaling_factor).numpy()
        return scaled_back

    def decode(self, decoder: Runner, latents: NDArray[Any]) -> Image:
        from sdcompress.evaluation.images import to_picture

        return to_picture(_infer(decoder, "vae_decoder", {"latent_sample": latents}, "sample")[0])


def _timestep(unet: Runner, value: float) -> NDArray[Any]:
    """The timestep as the graph wants it: a scalar or a vector of one, whole if it must be."""
    import numpy as np

    wanted = unet.inputs["timestep"]
    if wanted.dtype.kind == "i":  # some schedulers put steps between those of the training
        value = round(value)
    return np.full((1,) * len(wanted.shape), value)


def _infer(
    runner: Runner, component: str, feeds: dict[str, NDArray[Any]], output: str, where: str = ""
) -> NDArray[Any]:
    import numpy as np

    from sdcompress.evaluation.images import OVERFLOW_FIX

    result = runner.infer(feeds)[output]
    if not np.isfinite(result).all():
        raise VerificationError(f"{component}: gave NaN or infinity{where}: {OVERFLOW_FIX}")
    return result


def _config(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or unreadable; export the model again") from error
