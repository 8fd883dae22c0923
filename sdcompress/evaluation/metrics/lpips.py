"""LPIPS: perceptual distance of each picture to the dense model's of its seed.

0 is identical. Zhang et al. 2018, with AlexNet, by torchmetrics, which needs torchvision for the
network.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sdcompress.errors import InputError
from sdcompress.evaluation.metrics import Batch, Drift

if TYPE_CHECKING:
    from torch import Tensor

    from sdcompress.bundle import Bundle
    from sdcompress.evaluation.metrics import Floats
    from sdcompress.evaluation.quality import QualitySettings

SMALLEST = 64  # pixels; AlexNet halves smaller pictures away


def _between(made: Batch, dense: Batch) -> Floats:
    import torch

    from sdcompress.evaluation.processes import processes

    def scaled(batch: Batch) -> Tensor:
        pixels = torch.from_numpy(batch.images).permute(0, 3, 1, 2).float()
        return (pixels / 255).to(processes().device)

    with torch.no_grad():
        distances = _network()(scaled(made), scaled(dense))
    values: Floats = distances.reshape(-1).double().cpu().numpy()
    return values


@lru_cache(maxsize=1)
def _network() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    from sdcompress.evaluation.processes import processes

    try:
        network = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
    except OSError as e:
        raise InputError(
            "lpips: torchvision cannot fetch the weights of AlexNet; run it once with a network "
            "connection, or choose other metrics with --metric"
        ) from e
    return network.to(processes().device)


def _possible(settings: QualitySettings, dense: Bundle) -> str | None:
    from sdcompress.evaluation.images import picture_size

    smallest = min(picture_size(dense.path, settings.height, settings.width))
    if smallest < SMALLEST:
        return f"needs {SMALLEST} pixels a side, found {smallest}; pass --height and --width"
    try:
        _network()  # now, and not when all pictures are made
    except InputError as e:
        return str(e).removeprefix("lpips: ")
    return None


METRIC = Drift(
    unit="1",
    better="lower",
    packages={
        "torchmetrics": "pip install torchmetrics",
        "torchvision": "pip install 'sdcompress[lpips]'",
    },
    possible=_possible,
    between=_between,
)
