"""Pictures from an engine: tokenizer, scheduler and three runners, whatever the backend."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends import Runner, open_component
from export.specs import COMPONENTS, component_spec
from sdcompress.errors import InputError, SdcompressError

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


@contextmanager
def open_runners(engine: Path) -> Iterator[dict[str, Runner]]:
    """Load all components of an engine bundle; they are closed when the block ends."""
    with ExitStack() as stack:
        yield {c: stack.enter_context(open_component(engine, c)) for c in COMPONENTS}


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
    progress: Callable[[int, int], None] | None = None,
) -> list[Image]:
    """One picture for each prompt and its seed.

    Pictures are made one at a time from latents drawn from their own seed, so that a picture does
    not depend on the others in the list. With `guidance` <= 1 there is no second, unconditional
    branch (as distilled models want it). `progress(done, total)` counts pictures.

    Raises:
        UsageError: a size that does not fit the model, or lists of different lengths.
        SdcompressError: a component gave NaN or infinity.
    """
    from sdcompress.evaluation.images import check_request

    check_request(prompts, seeds, steps)
    shape = Geometry.read(engine).latent_shape(height, width)
    tokens = tokenize(engine, [negative_prompt, *prompts])
    pictures = []
    with open_runners(engine) as runners:
        painter = _Painter(engine, runners, steps, guidance)
        for i, seed in enumerate(seeds):
            pictures.append(painter.paint(tokens[i + 1], tokens[0], seed, shape))
            if progress:
                progress(i + 1, len(seeds))
    return pictures


def tokenize(engine: Path, prompts: Sequence[str]) -> NDArray[np.int64]:
    """Token ids [n, 77] of the bundle's own tokenizer, padded and cut to the model's length."""
    from transformers import CLIPTokenizer

    folder = engine / "tokenizer"
    if not folder.is_dir():
        raise InputError(f"{folder}: the tokenizer is missing; export the model again")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length = tokenizer.model_max_length
    for prompt in prompts:
        if len(tokenizer(prompt)["input_ids"]) > length:
            warnings.warn(
                f"the model reads {length} tokens; the end of {prompt[:40]!r}… is cut off",
                stacklevel=3,
            )
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    ids: NDArray[np.int64] = batch["input_ids"]
    return ids


class _Painter:
    """Makes single pictures; the models and the settings stay the same between them."""

    def __init__(
        self, engine: Path, runners: dict[str, Runner], steps: int, guidance: float
    ) -> None:
        self._runners, self._steps, self._guidance = runners, steps, guidance
        self._scheduler_folder = engine / "scheduler"
        self._scaling_factor = Geometry.read(engine).scaling_factor

    def paint(
        self,
        tokens: NDArray[np.int64],
        negative_tokens: NDArray[np.int64],
        seed: int,
        shape: tuple[int, int, int],
    ) -> Image:
        import numpy as np
        import torch

        from sdcompress.evaluation.images import (
            initial_latents,
            load_scheduler,
            step_arguments,
            to_picture,
        )

        guided = self._guidance > 1
        ids = np.stack([negative_tokens, tokens] if guided else [tokens])
        context = self._infer("text_encoder", {"input_ids": ids}, "last_hidden_state", "")
        scheduler = load_scheduler(self._scheduler_folder)
        scheduler.set_timesteps(self._steps)
        generator = torch.Generator().manual_seed(seed)
        latents = initial_latents(generator, shape) * scheduler.init_noise_sigma
        extra = step_arguments(scheduler, generator)
        for i, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latents, timestep).numpy()
            predicted = self._infer(
                "unet",
                {
                    "sample": np.repeat(scaled, len(ids), axis=0),
                    "timestep": self._timestep(float(timestep)),
                    "encoder_hidden_states": context,
                },
                "out_sample",
                f" at step {i + 1} of {len(scheduler.timesteps)}",
            ).astype(np.float32)
            if guided:
                without, with_prompt = predicted[:1], predicted[1:]
                predicted = without + self._guidance * (with_prompt - without)
            latents = scheduler.step(
                torch.from_numpy(predicted), timestep, latents, **extra
            ).prev_sample
        latents = latents / self._scaling_factor
        return to_picture(
            self._infer("vae_decoder", {"latent_sample": latents.numpy()}, "sample", "")[0]
        )

    def _timestep(self, value: float) -> NDArray[Any]:
        """The timestep as the graph wants it: a scalar or a vector of one, whole if it must be."""
        import numpy as np

        wanted = self._runners["unet"].inputs["timestep"]
        if wanted.dtype.kind == "i":  # some schedulers put steps between those of the training
            value = round(value)
        return np.full((1,) * len(wanted.shape), value)

    def _infer(
        self, component: str, feeds: dict[str, NDArray[Any]], output: str, where: str
    ) -> NDArray[Any]:
        import numpy as np

        result = self._runners[component].infer(feeds)[output]
        if not np.isfinite(result).all():
            raise SdcompressError(
                f"{component}: gave NaN or infinity{where} (in fp16 mostly an overflow, seen as a "
                "black picture); export with dtype fp32, or prune less"
            )
        return result


def _config(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or unreadable; export the model again") from error
