"""Fréchet distance of the pictures' CLIP embeddings to those of the dense model's.

It sees what changed in a set of pictures as a whole, and needs no real images. Most of it at few
samples is chance, so it stands beside the distance of the dense model from itself at other seeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.evaluation.metrics import Batch, Distance, _clip

if TYPE_CHECKING:
    from sdcompress.evaluation.metrics import Floats


def _features(batch: Batch) -> Floats:
    values: Floats = _clip.image_embeddings(batch).double().cpu().numpy()
    return values


METRIC = Distance(unit="1", better="lower", possible=_clip.possible, features=_features)
