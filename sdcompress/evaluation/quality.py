"""How good the pictures of a compressed model are beside those of the dense one.

Both make the same prompts from the same seeds, so that every difference is paired, and the dense
model makes them once more from other seeds: what that changes is the floor below which nothing
means anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdcompress.bundle import Bundle
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.metrics import (
    Batch,
    Distance,
    Drift,
    Score,
    load_metric,
    metric_names,
)

if TYPE_CHECKING:
    from sdcompress.evaluation.metrics import Floats
    from sdcompress.evaluation.pictures import Pictures

Progress = Callable[[int, int], None]  # how much is done, of how much
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QualitySettings(_Record):
    """What pictures are made and what is measured on them; picture i starts from seed + i.

    height, width: pixels, None for the native size. clip: mini-sd2 for the small CLIP of this
    package, else a model on the hub or a directory; None for what suits the model. real_images,
    real_statistics: a folder or an .npz of mu and sigma, one of which inception_fid compares with.
    """

    prompts: tuple[str, ...] = Field(min_length=2)
    seed: int = Field(default=0, ge=0, le=1 << 32)
    steps: int = Field(ge=1)
    guidance: float = Field(ge=0, allow_inf_nan=False)
    height: int | None = None
    width: int | None = None
    batch: int = Field(default=16, ge=1)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    metrics: tuple[str, ...] = Field(min_length=1)
    clip: str | None = None
    real_images: str | None = None
    real_statistics: str | None = None
    inception_weights: str | None = None


class Estimate(_Record):
    """A figure and its 95 % interval."""

    value: _Finite
    low: _Finite
    high: _Finite


class MetricResult(_Record):
    """One metric. `values`, `dense_values`: one a prompt, empty for distances of sets.

    model: drifts (psnr, ssim, lpips) and clip_distance are from the dense pictures of the same
    seeds, inception_fid is from real images, the others are scores. dense: the same of the dense
    model, where that is not trivial. difference: model − dense, paired by prompt. floor: the dense
    model at other seeds, as many: for drifts and distances the same figure, for scores its
    difference from the dense model at these seeds.
    """

    metric: str
    unit: str
    better: Literal["higher", "lower"]
    model: Estimate
    dense: Estimate | None = None
    difference: Estimate | None = None
    floor: Estimate | None = None
    samples: int
    warnings: tuple[str, ...] = ()
    values: tuple[_Finite, ...] = ()
    dense_values: tuple[_Finite, ...] = ()


class Quality(_Record):
    """The whole of quality.json. `model`, `dense`: digests of the two bundles.

    unavailable: metric → why it cannot run here, and what to install or pass.
    """

    schema_version: Literal[1] = 1
    model: str
    dense: str
    settings: QualitySettings
    metrics: dict[str, MetricResult]
    unavailable: dict[str, str] = {}
    warnings: tuple[str, ...] = ()


SAMPLES = 400


def default_settings(
    dense: Bundle,
    samples: int | None = None,
    *,
    prompts: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    **chosen: Any,
) -> QualitySettings:
    """Settings for a model; `chosen` are other fields of QualitySettings, None for the default.

    Without `prompts` they are those that come with the model, 400 unless `samples` says otherwise;
    with them, the first `samples` are taken. Without `metrics` they are all that can run here.

    Raises:
        UsageError: fewer than 2 samples, more than there are prompts, or an unknown metric.
    """
    from sdcompress.evaluation.images import check_request
    from sdcompress.evaluation.metrics._clip import default_clip
    from sdcompress.models.defaults import sampling_defaults
    from sdcompress.models.prompts import prompts_for

    if samples is not None and samples < 2:
        raise UsageError(f"{samples} samples have no spread; ask for at least 2, better for 400")
    if prompts is None:
        prompts = prompts_for(dense, samples or SAMPLES, "evaluation")
    elif len(prompts) < (samples or 2):
        raise UsageError(
            f"{samples or 2} samples need as many prompts, found {len(prompts)}; add prompts"
        )
    prompts = tuple(prompts[: samples or SAMPLES])
    _check_known(metrics or ())
    given = {name: value for name, value in chosen.items() if value is not None}
    fields = {"clip": default_clip(dense), **sampling_defaults(dense), **given}
    check_request(prompts, range(len(prompts)), fields["steps"])
    settings = QualitySettings(prompts=prompts, metrics=tuple(metrics or metric_names()), **fields)
    if metrics:
        return settings
    unable = unavailable(settings, dense)
    able = tuple(name for name in settings.metrics if name not in unable)
    return settings.model_copy(update={"metrics": able})


def unavailable(settings: QualitySettings, dense: Bundle) -> dict[str, str]:
    """Metric → why it cannot run on these pictures and what to install or pass, for those."""
    reasons = {name: load_metric(name).why_not(settings, dense) for name in metric_names()}
    return {name: why for name, why in reasons.items() if why}


def _check_known(metrics: Sequence[str]) -> None:
    if unknown := sorted(set(metrics) - set(metric_names())):
        raise UsageError(f"no metric {unknown[0]!r}; there are {', '.join(metric_names())}")


def evaluate(
    model: Bundle,
    dense: Bundle,
    settings: QualitySettings,
    *,
    work: Path,
    unable: Mapping[str, str] = {},
    progress: Progress = lambda done, total: None,
) -> Quality:
    """Make the pictures that are not yet under `work` and measure them.

    Everything is a function of the bundles and the settings; `unable` is what `unavailable` said of
    the metrics that are not among them, to be noted. Processes of `accelerate launch`
    share the pictures; the first one measures, and all return the same.

    Raises:
        UsageError: a metric of `settings` cannot run, or the models cannot be compared.
        InputError: a model cannot be loaded.
    """
    from accelerate.utils import broadcast_object_list

    from sdcompress.evaluation.metrics._clip import default_clip
    from sdcompress.evaluation.pictures import Pictures, dense_pictures, make
    from sdcompress.evaluation.processes import processes

    settings = settings.model_copy(update={"clip": settings.clip or default_clip(dense)})
    _check_known(settings.metrics)
    for name in settings.metrics:
        if why := load_metric(name).why_not(settings, dense):
            raise UsageError(f"{name}: {why}")
    same, others = dense_pictures(dense, settings, work)
    sets = {"model": Pictures.of(model, settings, work), "dense": same, "floor": others}
    if sets["model"].size != sets["dense"].size:
        raise UsageError(
            f"pictures of {sets['model'].size} and {sets['dense'].size} pixels cannot be compared; "
            "pass --height and --width that both models make"
        )
    tick = _Ticks(4 * len(settings.prompts), progress)  # three sets, then measuring
    make([sets["dense"], sets["floor"]], tick)
    make([sets["model"]], tick)
    quality = None
    if processes().is_main_process:
        results = _measure(sets, settings, work, tick)
        quality = Quality(
            model=model.digest,
            dense=dense.digest,
            settings=settings,
            metrics=results[0],
            unavailable=dict(unable),
            warnings=results[1],
        )
    (shared,) = broadcast_object_list([quality.model_dump_json() if quality else None])
    return quality or Quality.model_validate_json(shared)


class _Ticks:
    """Counts up to `total` and reports."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, more: int) -> None:
        self._done = min(self._done + more, self._total)
        self._progress(self._done, self._total)


def _measure(
    sets: dict[str, Pictures], settings: QualitySettings, work: Path, tick: Callable[[int], None]
) -> tuple[dict[str, MetricResult], tuple[str, ...]]:
    """Every metric's result, and what is wrong with the pictures; one pass over the files."""
    import numpy as np

    metrics = {name: load_metric(name) for name in settings.metrics}
    found: dict[str, dict[str, list[Floats]]] = {n: {s: [] for s in sets} for n in metrics}
    black = dict.fromkeys(sets, 0)
    for indices in sets["dense"].batches():
        prompts = [settings.prompts[i] for i in indices]
        batches = {s: Batch(p.read(indices), prompts, settings) for s, p in sets.items()}
        for s, batch in batches.items():
            black[s] += int((~batch.images.any(axis=(1, 2, 3))).sum())
        for name, metric in metrics.items():
            for s, batch in batches.items():
                if isinstance(metric, Score):
                    found[name][s].append(metric.score(batch))
                elif isinstance(metric, Distance):
                    found[name][s].append(metric.features(batch))
                elif s != "dense":
                    found[name][s].append(metric.between(batch, batches["dense"]))
        tick(len(indices))
    results = {}
    for name, metric in metrics.items():
        values = {s: np.concatenate(parts) for s, parts in found[name].items() if parts}
        results[name] = _result(name, metric, values, settings, work)
    warnings = _strangers(sets["model"].bundle, sets["dense"].bundle) + tuple(
        f"{count} of {len(settings.prompts)} pictures of the {who} are black all over or not finite"
        for who, count in (("model", black["model"]), ("dense model", black["dense"]))
        if count
    )
    return results, warnings


def _strangers(model: Bundle, dense: Bundle) -> tuple[str, ...]:
    names = [b.manifest.source.id for b in (model, dense)]
    if model.manifest.parent == dense.digest or names[0] == names[1]:
        return ()
    return (
        f"the model comes from {names[0]}, the dense one from {names[1]}: they may be unrelated",
    )


def _result(
    name: str,
    metric: Drift | Score | Distance,
    found: dict[str, Floats],
    settings: QualitySettings,
    work: Path,
) -> MetricResult:
    parts: dict[str, Any] = {}
    if isinstance(metric, Drift):
        parts = {"model": _mean(found["model"]), "floor": _mean(found["floor"])}
        parts["values"] = tuple(found["model"].tolist())
    elif isinstance(metric, Score):
        parts = {s: _mean(found[s]) for s in ("model", "dense")}
        parts["difference"] = _mean(found["model"] - found["dense"])
        parts["floor"] = _mean(found["floor"] - found["dense"])
        parts["values"] = tuple(found["model"].tolist())
        parts["dense_values"] = tuple(found["dense"].tolist())
        if len(set(parts["values"])) == 1:
            n = len(settings.prompts)
            parts["warnings"] = (
                f"all {n} values are equal, so resampling shows no spread; at 95 % confidence less "
                f"than {3 / n:.1%} of such pictures differ",
            )
    else:
        parts = _distances(metric, found, settings, work)
    parts["warnings"] = (*parts.get("warnings", ()), *_repeated(settings.prompts))
    return MetricResult(
        metric=name,
        unit=metric.unit,
        better=metric.better,
        samples=len(settings.prompts),
        **parts,
    )


def _repeated(prompts: Sequence[str]) -> tuple[str, ...]:
    """Pictures of one prompt are alike; drawn as if each had its own, they show too little spread.

    Prompts drawn at random may come twice; those of a list that is used over again all do.
    """
    n, different = len(prompts), len(set(prompts))
    if 2 * different > n:
        return ()
    return (
        f"{n} pictures of {different} prompts: the interval takes each for one of its own and is "
        f"too narrow for other prompts; pass --prompts with {n}",
    )


def _mean(values: Floats) -> Estimate:
    from sdcompress.evaluation.statistics import mean_interval

    value, low, high = mean_interval(values)
    return Estimate(value=value, low=low, high=high)


def _distances(
    metric: Distance, found: dict[str, Floats], settings: QualitySettings, work: Path
) -> dict[str, Any]:
    """Distances of the sets from the reference: the dense set, or one that does not vary."""
    import numpy as np

    from sdcompress.evaluation.statistics import (
        Gaussian,
        frechet_distance,
        gaussian,
        resamplings,
        spread_interval,
    )

    n, dimension = found["model"].shape
    fixed = metric.reference(settings, work) if metric.reference else None
    if fixed is not None and len(fixed.mean) != dimension:
        raise InputError(
            f"the statistics of the real images have {len(fixed.mean)} features, the network "
            f"{dimension}; give statistics of the same network, or --real-images DIR"
        )
    measured = [s for s in ("model", "dense", "floor") if fixed is not None or s != "dense"]

    def distances(times: Floats | None) -> dict[str, float]:
        reference: Gaussian = fixed or gaussian(found["dense"], times)
        return {s: frechet_distance(gaussian(found[s], times), reference) for s in measured}

    value = distances(None)
    resampled = [distances(times) for times in resamplings(n, dimension)]

    def estimate(middle: float, around: list[float], least: float = 0.0) -> Estimate:
        low, high = spread_interval(middle, np.array(around))
        return Estimate(value=middle, low=max(least, low), high=high)

    parts: dict[str, Any] = {s: estimate(value[s], [r[s] for r in resampled]) for s in measured}
    if fixed is not None:
        differences = [r["model"] - r["dense"] for r in resampled]
        parts["difference"] = estimate(value["model"] - value["dense"], differences, -np.inf)
    counts = [n] if fixed is None or fixed.count is None else [n, fixed.count]
    if min(counts) <= dimension:
        parts["warnings"] = (
            f"{min(counts)} samples for {dimension} features: their covariance is not of full rank "
            f"and the distance is mostly chance; it needs more than {dimension} samples",
        )
    return parts


def holds(result: MetricResult, limit: float) -> bool:
    """Whether a metric is within its limit: `margin` is not negative."""
    return margin(result, limit) >= 0


def margin(result: MetricResult, limit: float) -> float:
    """How far within `limit` a metric is, negative beyond it.

    A limit is on the share of the dense model's score that is kept (clip_score, prompt_accuracy):
    model / dense − limit; on a drift itself (psnr and ssim: value − limit, lpips: limit − value);
    on a distance in units of its floor (clip_distance, inception_fid): limit − value / floor.

    Raises:
        UsageError: the dense model's score, or the floor, is 0, so that there is no ratio.
    """
    metric, value = load_metric(result.metric), result.model.value
    if isinstance(metric, Drift):
        return value - limit if result.better == "higher" else limit - value
    base = result.dense if isinstance(metric, Score) else result.floor
    if base is None or base.value <= 0:
        raise UsageError(
            f"{result.metric}: a limit is in proportion to the dense model's figure, found "
            f"{base.value if base else None}; choose another metric"
        )
    ratio = value / base.value
    return ratio - limit if isinstance(metric, Score) else limit - ratio
