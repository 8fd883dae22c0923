"""FID: Fréchet distance of the pictures' Inception features to those of real images.

Heusel et al. 2017. The network is torch-fidelity's port of the original weights, run as
torchmetrics runs it. The real images are a folder, or statistics saved earlier: an .npz that holds
`mu` [d] and `sigma` [d, d].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress.errors import InputError
from sdcompress.evaluation.metrics import Batch, Distance

if TYPE_CHECKING:
    from PIL.Image import Image

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
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"the Inception network cannot be loaded from {weights or 'its home on the network'} "
            f"({reason}); pass --inception-weights FILE"
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

    from sdcompress.evaluation.files import content
    from sdcompress.evaluation.pictures import replace_file
    from sdcompress.evaluation.statistics import Gaussian, gaussian

    files = _files(folder)
    weights = settings.inception_weights
    made_of = "\n".join([content(Path(weights)) if weights else "", *map(content, files)])
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


def _files(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES and f.is_file())
    if len(files) < 2:
        raise InputError(f"{folder}: expected a folder of images, found {len(files)}; add some")
    return files


def _same_sizes(files: list[Path], batch: int) -> Iterator[Images]:
    """The images in batches of one size each, since the network resizes them itself.

    Sizes are read first: real images come in thousands of them, and no more than a batch is held.
    """
    import numpy as np

    sizes = {}
    for file in files:
        with _opened(file) as image:
            sizes[file] = image.size
    for _, group in groupby(sorted(files, key=sizes.__getitem__), sizes.__getitem__):
        alike = list(group)
        for start in range(0, len(alike), batch):
            yield np.stack([_pixels(file) for file in alike[start : start + batch]])


def _pixels(file: Path) -> Images:
    import numpy as np

    with _opened(file) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(file: Path) -> Iterator[Image]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError) as e:
        raise InputError(f"{file}: a broken image; remove it or copy it again") from e


def _possible(settings: QualitySettings, dense: Bundle) -> str | None:
    """Everything but the pictures is looked at, since those take hours."""
    if settings.real_images is None and settings.real_statistics is None:
        return "compares with real images: pass --real-images DIR or --real-statistics FILE"
    try:
        if settings.real_statistics:
            read_statistics(Path(settings.real_statistics))
        elif settings.real_images:
            _files(Path(settings.real_images))
        _network(settings.inception_weights)
    except InputError as e:
        return str(e)
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
