"""Share of pictures that show all their prompt states, read by mini-sd2's oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.evaluation.metrics import Batch, Score

if TYPE_CHECKING:
    from sdcompress.bundle import Bundle
    from sdcompress.evaluation.metrics import Floats
    from sdcompress.evaluation.quality import QualitySettings


def _score(batch: Batch) -> Floats:
    import numpy as np

    from sdcompress.models.mini_sd2.oracle import matches, read_scene
    from sdcompress.models.mini_sd2.scenes import read_caption

    scenes = map(read_caption, batch.prompts)
    return np.array(
        [
            scene is not None and matches(scene, read_scene(image))
            for scene, image in zip(scenes, batch.images, strict=True)
        ],
        np.float64,
    )


def _possible(settings: QualitySettings, dense: Bundle) -> str | None:
    from sdcompress.evaluation.images import picture_size
    from sdcompress.models.mini_sd2.scenes import SIZE, read_caption

    for prompt in settings.prompts:
        if read_caption(prompt) is None:
            return (
                f"reads mini-sd2's scenes only, and {prompt!r} describes none; pass other --prompts"
            )
    if (size := picture_size(dense.path, settings.height, settings.width)) != (SIZE, SIZE):
        return f"reads pictures of {SIZE}×{SIZE} pixels only, found {size[1]}×{size[0]}"
    return None


METRIC = Score(unit="share", better="higher", possible=_possible, score=_score)
