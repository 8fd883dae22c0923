"""FID: Fréchet distance of the pictures' Inception features to those of real images.

Heusel et al. 2017. The network is torch-fidelity's port of the original weights, run as
torchmetrics runs it. The real images are a folder, or statistics saved earlier: an .npz that holds
`mu` [d] and `sigma` [d, d].
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.errors import InputError
from sdcompress.evaluation.metrics import Batch, Distance

if TYPE_CHECKING:
    from sdcompress.bundle import Bundle
    from sdcompress.evaluation.metrics import Floats, Images
    from sdcompress.evaluation.quality import QualitySettings
    from sdcompress.evaluation.statistics import Gaussian

FEATURES = 2048
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def _features(batch: Batch) -> Floats:
    return _extract(batch.images, batch.settings)


def _extract(images: Images, settings: QualitySettings) -> Floats:
    import torch

    from sdcompress.evaluation.processes import processes

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(processes().device)
    with torch.no_grad():
        values: Floats = _network(settings.inception_weights)(pixels).double().cpu().numpy()
    return values


@lru_cache(maxsize=1)
def _network(weights: str | None) -> Any:
    """uint8 [n, 3, H, W] → features [n, d]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    from sdcompress.evaluation.processes import processes

    try:
        metric = FrechetInceptionDistance(FEATURES, feature_extractor_weights_path=weights)
    except (OSError, RuntimeError) as e:
        raise InputError(
            f"the Inception network cannot be loaded from {weights or 'its home on the network'} "
            f"({str(e).splitlines()[0]}); pass --inception-weights FILE"
        ) from e
    return metric.inception.to(processes().device)


def _reference(settings: QualitySettings, work: Path) -> Gaussian:
    if settings.real_statistics:
        return read_statistics(Path(settings.real_statistics))
    assert settings.real_images is not None
    return _of_folder(Path(settings.real_images), settings, work)


def read_statistics(file: Path) -> Gaussian:
    """Statistics saved as `mu` [d] and `sigma` [d, d], as FID tools exchange them.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    import numpy as np

    from sdcompress.evaluation.statistics import Gaussian

    try:
        with np.load(file, allow_pickle=False) as found:
            mean, covariance = (np.asarray(found[k], np.float64) for k in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise InputError(
            f"{file}: expected an .npz with the arrays mu and sigma, found something else ({e}); "
            "pass --real-images DIR instead"
        ) from e
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise InputError(
            f"{file}: expected mu [d] and sigma [d, d], found {mean.shape} and {covariance.shape}; "
            "pass --real-images DIR instead"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{file}: holds NaN or infinity; pass --real-images DIR instead")
    return Gaussian(mean, covariance, None)


def _of_folder(folder: Path, settings: QualitySettings, work: Path) -> Gaussian:
    """The statistics of a folder's images, kept under `work` for the next evaluation."""
    import numpy as np

    from sdcompress.bundle import sha256_file
    from sdcompress.evaluation.pictures import replace_file
    from sdcompress.evaluation.statistics import Gaussian, gaussian

    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES and f.is_file())
    if len(files) < 2:
        raise InputError(f"{folder}: expected a folder of images, found {len(files)}; add some")
    digests = [sha256_file(f) for f in files]
    made_of = "\n".join([settings.inception_weights or "", *digests])
    kept = work / f"real-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.npz"
    if kept.is_file():
        found = read_statistics(kept)
        return Gaussian(found.mean, found.covariance, len(files))
    features = np.concatenate(
        [_extract(images, settings) for images in _same_sizes(files, settings.batch)]
    )
    statistics = gaussian(features)
    work.mkdir(parents=True, exist_ok=True)
    with replace_file(kept) as partial, partial.open("wb") as f:
        np.savez(f, mu=statistics.mean, sigma=statistics.covariance)
    return statistics


def _same_sizes(files: list[Path], batch: int) -> Any:
    """The images in batches of one size each, since the network resizes them itself."""
    import numpy as np
    from PIL import Image

    waiting: dict[tuple[int, int], list[Images]] = {}
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"{file}: a broken image; remove it or copy it again") from e
        group = waiting.setdefault(pixels.shape[:2], [])
        group.append(pixels)
        if len(group) == batch:
            yield np.stack(waiting.pop(pixels.shape[:2]))
    for group in waiting.values():
        yield np.stack(group)


def _possible(settings: QualitySettings, dense: Bundle) -> str | None:
    if settings.real_images is None and settings.real_statistics is None:
        return "compares with real images: pass --real-images DIR or --real-statistics FILE"
    return None


METRIC = Distance(
    unit="1",
    better="lower",
    packages={
        "torchmetrics": "pip install torchmetrics",
        "torch_fidelity": "pip install 'sdcompress[fid]'",
    },
    possible=_possible,
    features=_features,
    reference=_reference,
)
