"""SSIM: structural similarity of each picture to the dense model's of its seed.

1 is identical. Wang et al. 2004, with its Gaussian window of 11 pixels, by torchmetrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdcompress.evaluation.metrics import Batch, Drift

if TYPE_CHECKING:
    from torch import Tensor

    from sdcompress.evaluation.metrics import Floats


def _between(made: Batch, dense: Batch) -> Floats:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    def channels_first(batch: Batch) -> Tensor:
        return torch.from_numpy(batch.images).permute(0, 3, 1, 2).float() / 255

    similarity = structural_similarity_index_measure(
        channels_first(made), channels_first(dense), data_range=1.0, reduction="none"
    )
    assert not isinstance(similarity, tuple)
    values: Floats = similarity.reshape(-1).double().numpy()
    return values


METRIC = Drift(
    unit="1",
    better="higher",
    packages={"torchmetrics": "pip install torchmetrics"},
    between=_between,
)
