"""The pictures a measurement is made of: made in batches, kept one file each, resumed after a kill.

Batches are cut by index, so what is in a batch, and with it every byte, depends neither on where
an earlier run was interrupted nor on how many processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.bundle import Bundle, locked, tool_versions, write_json
from sdcompress.evaluation.images import PROMPTS, denoise, load_pipeline, picture_size, to_levels
from sdcompress.evaluation.processes import processes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdcompress.evaluation.quality import QualitySettings

_DECIDES = {"prompts", "seed", "steps", "guidance", "height", "width", "batch", "dtype"}
_TOOLS = ("sdcompress", "torch", "diffusers", "transformers")
_MARK = "sdcompress"  # the text in a PNG that says which picture it is


@dataclass(frozen=True)
class Pictures:
    """The pictures one bundle makes with these settings; `folder` is theirs alone."""

    bundle: Bundle
    settings: QualitySettings
    folder: Path
    key: str
    size: tuple[int, int]

    @classmethod
    def of(cls, bundle: Bundle, settings: QualitySettings, work: Path) -> Pictures:
        """Their place under `work`, named after everything they depend on."""
        tools = {k: v for k, v in tool_versions().items() if k in _TOOLS}
        decides = settings.model_dump(mode="json", include=_DECIDES)
        device = processes().device.type  # a GPU rounds otherwise, which would look like drift
        kind = [] if device == "cpu" else [device]
        made_of = json.dumps([bundle.digest, decides, tools, *kind], sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:32]
        name = f"{bundle.manifest.stage}-{bundle.digest[:8]}-seed{settings.seed}-{key[:8]}"
        size = picture_size(bundle.path, settings.height, settings.width)
        return cls(bundle, settings, work / "pictures" / name, key, size)

    def __len__(self) -> int:
        return len(self.settings.prompts)

    def file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.png"

    def batches(self) -> Iterator[range]:
        for start in range(0, len(self), self.settings.batch):
            yield range(start, min(start + self.settings.batch, len(self)))

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """[n, H, W, 3]."""
        import numpy as np
        from PIL import Image

        return np.stack([np.asarray(Image.open(self.file(i)).convert("RGB")) for i in indices])

    def is_made(self, index: int) -> bool:
        """Whether the file is there, whole, and this very picture."""
        from PIL import Image

        try:
            with Image.open(self.file(index)) as image:
                mark, size = image.info.get(_MARK), image.size
                image.verify()  # the checksum of every chunk
        except (OSError, SyntaxError, ValueError):
            return False
        return bool(mark == self._mark(index) and size == self.size[::-1])

    def write(self, index: int, levels: NDArray[np.uint8]) -> None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text(_MARK, self._mark(index))
        with replace_file(self.file(index)) as partial:
            Image.fromarray(levels).save(partial, "PNG", pnginfo=text)

    def describe(self) -> None:
        """Write which file shows what, for people who look at the folder."""
        settings, n = self.settings, len(self)
        entries = [
            {"file": self.file(i).name, "prompt": settings.prompts[i], "seed": settings.seed + i}
            for i in range(n)
        ]
        how = settings.model_dump(mode="json", include=_DECIDES - {"prompts", "seed"})
        write_json(
            self.folder / PROMPTS,
            {"pictures": entries, "settings": how, "bundle": self.bundle.digest},
        )

    def _mark(self, index: int) -> str:
        return f"{self.key}/{index}"


def dense_pictures(
    dense: Bundle, settings: QualitySettings, work: Path
) -> tuple[Pictures, Pictures]:
    """What a model is held against: the dense model's pictures, and those at other seeds."""
    others = settings.model_copy(update={"seed": settings.seed + len(settings.prompts)})
    return Pictures.of(dense, settings, work), Pictures.of(dense, others, work)


def make(wanted: Sequence[Pictures], tick: Callable[[int], None]) -> None:
    """Make what is missing of one bundle's pictures, for several seeds; told how many more exist.

    Pictures that are not finite are kept black. Processes that `accelerate launch` started share
    the batches and return together; others wait until the folder is free, and find the work done.
    """
    assert len({(p.bundle.digest, p.settings.dtype) for p in wanted}) == 1  # one pipeline
    state = processes()
    pipeline = None
    for pictures in wanted:
        pictures.folder.mkdir(parents=True, exist_ok=True)
        with locked(pictures.folder) if state.is_main_process else nullcontext():
            state.wait_for_everyone()
            batches = list(pictures.batches())
            missing = [b for b in batches if not all(map(pictures.is_made, b))]
            tick(len(pictures) - sum(map(len, missing)))
            state.wait_for_everyone()  # nobody makes what another is still looking at
            for batch in missing[state.process_index :: state.num_processes]:
                if pipeline is None:
                    pipeline = _pipeline(pictures)
                _make_batch(pipeline, pictures, batch)
                tick(len(batch) * state.num_processes)
            state.wait_for_everyone()
            if state.is_main_process:
                for left in pictures.folder.glob(".*.partial-*"):
                    left.unlink(missing_ok=True)
                pictures.describe()


def _pipeline(pictures: Pictures) -> Any:
    return load_pipeline(pictures.bundle.path, pictures.settings.dtype, processes().device)


def _make_batch(pipeline: Any, pictures: Pictures, batch: range) -> None:
    import numpy as np

    settings, (height, width) = pictures.settings, pictures.size
    made = denoise(
        pipeline,
        [settings.prompts[i] for i in batch],
        [settings.seed + i for i in batch],
        steps=settings.steps,
        guidance=settings.guidance,
        height=height,
        width=width,
    )
    for i, values in zip(batch, made, strict=True):
        finite = bool(np.isfinite(values).all())
        pictures.write(i, to_levels(values if finite else np.full_like(values, -1)))


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; renamed to it when the block ends well, else removed."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
