"""Protocols of published studies, so that figures can be laid beside theirs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdcompress.bundle import Bundle
from sdcompress.errors import UsageError
from sdcompress.evaluation.metrics._clip import VIT_B_32
from sdcompress.evaluation.quality import QualitySettings, default_settings
from sdcompress.models.prompts import read_prompts

RAMESH_ZHAO = "ramesh-zhao-2024"
PRESETS = {
    RAMESH_ZHAO: "Ramesh & Zhao 2024 (arXiv 2411.15113): 10,000 COCO captions, one picture each in "
    "fp16, FID against the real images, CLIP score with ViT-B/32"
}
CAPTIONS = 10_000


def preset_settings(
    name: str,
    dense: Bundle,
    samples: int | None,
    *,
    prompts: Sequence[str] | None,
    metrics: Sequence[str] | None = None,
    **chosen: Any,
) -> QualitySettings:
    """The settings of a protocol; what is chosen by hand goes before what it says.

    Captions are drawn from `prompts` without replacement, by the seed. The study's runs were
    unseeded and their steps and guidance are not stated, so those are the model's own here.

    Raises:
        UsageError: no such preset, or what it needs was not passed.
    """
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    samples = samples or CAPTIONS
    real = [chosen.get(key) for key in ("real_images", "real_statistics")]
    if prompts is None or not any(real):
        raise UsageError(
            f"{name} needs its data: pass --prompts FILE (COCO's captions, as JSON or text) and "
            "--real-images DIR or --real-statistics FILE"
        )
    if len(prompts) < samples:
        raise UsageError(
            f"{name} needs {samples} captions, found {len(prompts)}; pass more, or --samples"
        )

    import numpy as np

    drawn = np.random.default_rng(chosen.get("seed") or 0).permutation(len(prompts))[:samples]
    fixed = {"clip": VIT_B_32, "dtype": "fp16"}
    given = {key: value for key, value in chosen.items() if value is not None}
    return default_settings(
        dense,
        samples,
        prompts=[prompts[i] for i in drawn],
        metrics=metrics or ("clip_score", "inception_fid"),
        **{**fixed, **given},
    )


def read_captions(file: Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line, or the captions of a COCO annotations file (.json).

    Raises:
        UsageError: the file cannot be read as either, or holds none.
    """
    if file.suffix != ".json":
        return read_prompts(file)
    try:
        annotations = json.loads(file.read_text(encoding="utf-8"))["annotations"]
        ordered = sorted(annotations, key=lambda entry: int(entry["id"]))
        captions = tuple(" ".join(str(entry["caption"]).split()) for entry in ordered)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(
            f"{file}: expected captions in COCO's format, 'annotations' with an 'id' and a "
            f"'caption' each, found none ({type(e).__name__}: {e}); check the file"
        ) from e
    if not captions:
        raise UsageError(f"{file}: expected captions, found none; check the file")
    return captions
