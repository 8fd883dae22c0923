"""One self-contained page: no script, no request, every picture inside it.

The page is made from what lies in the run's directory, and from nothing else. A part that is
missing is named on the page, with the command that makes it.
"""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdcompress import __version__
from sdcompress.build_report import BuildReport
from sdcompress.bundle import LOG, MANIFEST, Bundle, write_text
from sdcompress.errors import InputError
from sdcompress.evaluation.quality import MetricResult, Quality
from sdcompress.measure import Comparison
from sdcompress.plan import Accounting, LayerPlan, SparsityPlan, account
from sdcompress.prune import notes
from sdcompress.report import charts
from sdcompress.report.packs import DENSE, read_packs
from sdcompress.results import Check, Measure, Results
from sdcompress.structure import ComponentStructure, Kind, read_record

PAGE = "report.html"
RESULTS, VERIFICATION, RECIPE = "results.json", "verify.json", "recipe.yaml"
QUALITY = "quality.json"
# The later a stage, the more its manifest knows.
PRUNED = "pruned"
BUNDLES = ("engine/sparse", "onnx/sparse", "tuned", PRUNED)
NAMES = {
    "picture": "Whole picture",
    "text_encoder": "Text encoder",
    "unet_step": "One UNet step",
    "vae_decoder": "VAE decoder",
    "load": "Load the engine",
    "peak_memory": "Peak memory",
    "unet": "UNet",
    "vae": "VAE",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip_score": "CLIP score",
    "clip_distance": "CLIP Fréchet distance",
    "inception_fid": "FID",
}
# What is timed of each component.
TIMED = {"text_encoder": "text_encoder", "unet": "unet_step", "vae": "vae_decoder"}
KINDS: dict[Kind, str] = {
    "neurons": "Feed-forward neurons",
    "heads": "Attention heads",
    "channels": "Channels inside ResNet blocks",
}
SCORES = ("prompt_accuracy", "clip_score")  # what the headline tells
SAME = "no difference"
# What a target's engines are built by; others run on the machine they are made on.
FOR_A_TARGET = ("tensorrt", "tensorrt_rtx", "trtexec")
IDENTICAL = 100.0  # dB, in place of infinity
# The bootstrap of a median is too sure of itself with fewer.
ENOUGH_ROUNDS = 10


@dataclass(frozen=True)
class Cost:
    """What a component with narrower blocks costs, as a share of the dense one.

    `asked`: the budget it was to keep. `counts`: of the dense one and of what is left.
    """

    what: str
    of: str
    ratio: float
    asked: float | None = None
    counts: tuple[int, int] | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Pair:
    """Two pictures of the same prompt and seed, as data URIs; `psnr` None: identical."""

    prompt: str
    seed: int
    dense: str
    sparse: str
    size: tuple[int, int]
    psnr: float | None


def write_report(run: Path, results: Results | None = None, page: Path | None = None) -> Path:
    """Write `page`, else `report.html` into the run's directory, and return its path.

    `results` go before those of the directory's results.json.

    Raises:
        InputError: the directory holds nothing to report on, or a file in it is unreadable.
    """
    if results is None and (run / RESULTS).exists():
        results = Results.read(run / RESULTS)
    bundle = _bundle(run)
    if results is None and bundle is None:
        raise InputError(
            f"{run}: expected a run's directory, found neither {RESULTS} nor a pruned bundle; "
            "`sdcompress run RECIPE -o DIR` makes one"
        )
    page = page or run / PAGE
    write_text(page, render(run, results, bundle))
    return page


def render(run: Path, results: Results | None, bundle: Bundle | None) -> str:
    """The page as text."""
    import jinja2

    plan = bundle.manifest.plan if bundle else None
    sparsity = (results and results.sparsity) or (account(plan) if plan else None)
    pairs, settings = read_pairs(run)
    checks = read_checks(run)
    builds = read_builds(run)
    quality = read_quality(run)
    structure = read_structure(run)
    packs, damaged = read_packs(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, size=size, number=number, ratio=ratio, interval=interval, label=label
    )
    environment.filters["figure"] = figure
    environment.filters["in_sentence"] = _in_sentence
    environment.globals.update(verdict=verdict, amount=amount)
    source = bundle.manifest.source if bundle else None
    recipe = (bundle.manifest.recipe if bundle else None) or {}
    return environment.get_template("page.html.jinja").render(
        version=__version__,
        model=(results and results.model) or (source and source.id) or "a model",
        recipe=(results and results.recipe) or recipe.get("name"),
        recipe_text=_text(run / RECIPE),
        headline=headline(
            results,
            sparsity,
            pairs,
            plan,
            checks,
            not_measured(run),
            target=target_of(run),
            quality=quality,
            structure=structure,
        ),
        structure=[_narrowed(name, one, results) for name, one in structure.items()],
        results=results,
        forest=charts.forest(results.measures, NAMES) if results else "",
        sparsity=sparsity,
        plan=plan,
        layers=_by_component(plan, sparsity),
        notes=notes(Bundle.open(run / PRUNED).manifest)
        if (run / PRUNED / MANIFEST).exists()
        else [],
        pairs=pairs,
        settings=settings,
        checks=checks,
        builds=builds,
        quality=quality,
        limits_apart=builds["dense"].limits_apart(builds["sparse"])[0] if len(builds) == 2 else [],
        not_measured=not_measured(run),
        packs=packs,
        damaged_packs=damaged,
        dense_weights=DENSE,
        bundle=bundle,
        same=SAME,
        enough_rounds=ENOUGH_ROUNDS,
    )


def headline(
    results: Results | None,
    sparsity: Accounting | None,
    pairs: Sequence[Pair],
    plan: SparsityPlan | None,
    checks: Sequence[Check] | None = None,
    reason: str | None = None,
    target: str | None = None,
    quality: Quality | None = None,
    structure: Mapping[str, ComponentStructure] | None = None,
) -> list[str]:
    """What was asked, what it brings and what it costs, claiming no more than was shown.

    `target` is the device the run is for, and `reason` why its engines were not measured.
    """
    said = []
    if failed := [check.name for check in checks or () if not check.passed]:
        said.append(f"Verification failed: {_list(failed)}. Do not use this model.")
    said += [
        _lost(name, one) for name, one in (structure or {}).items() if _kinds(one, narrower=True)
    ]
    zeros = bool(sparsity and sparsity.together.parameters_pruned)
    if sparsity and (zeros or not structure):
        both = sparsity.together
        pruned = [
            _in_sentence(label(n)) for n, c in sparsity.components.items() if c.parameters_pruned
        ]
        said.append(
            f"Asked for {percent(both.asked)} zeros in "
            f"{'what is left of ' if structure else ''}{_list(pruned or ['nothing'])}; "
            f"{percent(both.of_component)} of them really are zero, "
            f"{percent(sparsity.pipeline.of_component)} of the whole pipeline."
        )
    if results and target and results.engines["sparse"].backend not in FOR_A_TARGET:
        said.append(
            f"Measured with {results.engines['sparse'].backend} on "
            f"{results.environment.accelerator or results.environment.processor}, which is not "
            f"{target}: these figures say nothing about that; the script in device.tar measures "
            "there."
        )
    if results is None and reason:
        said.append(f"Built and not measured here: {reason}.")
    elif results is None:
        said.append("Nothing has been measured yet.")
    elif not results.control.trustworthy:
        said.append(
            "The measurement cannot be trusted: the dense engine differed from itself in "
            f"{_list([_in_sentence(label(n)) for n in results.control.differs])}."
        )
    else:
        if results.setup.rounds < ENOUGH_ROUNDS:
            said.append(f"Measured in {results.setup.rounds} rounds only, too few to rely on.")
        if picture := results.measures.get("picture"):
            said.append(_gain(picture, "time for a picture", "less", "more"))
        if memory := results.measures.get("peak_memory"):
            said.append(_gain(memory, "peak memory", "less", "more"))
        kernels = results.engines["sparse"].sparse_kernels
        if kernels.used == 0 and structure:
            said += ["The zeros take no part in that: no kernel of this engine skips them."] * zeros
        elif kernels.used == 0 and picture and picture.sparse_to_dense.verdict == SAME:
            said.append(
                "That is what theory says: unstructured zeros speed nothing up, and no kernel of "
                "this engine skips zeros."
                if plan and _unstructured(plan) > 0.5
                else "No kernel of this engine skips zeros."
            )
    if pairs:
        said.append(_pictures(pairs))
    for name in SCORES:
        if quality and (metric := quality.metrics.get(name)) and metric.dense and metric.difference:
            said.append(_score(label(name), metric))
    return said


def _lost(name: str, s: ComponentStructure) -> str:
    kinds = [_in_sentence(KINDS[kind]) for kind in _kinds(s, narrower=True)]
    return (
        f"The {_in_sentence(label(name))} lost whole {_list(kinds)}: "
        f"{percent(1 - _share(s.parameters_dense, s.parameters))} of its parameters and "
        f"{percent(1 - _share(s.macs_dense, s.macs))} of its multiply-accumulates are gone."
    )


def _gain(measure: Measure, what: str, less: str, more: str) -> str:
    c = measure.sparse_to_dense
    if c.verdict == SAME:
        control = ", within the control" if c.within_control else ""
        return f"No difference in {what} ({ratio(c.ratio)}, {interval(c)}{control})."
    word = less if c.verdict == "lower" else more
    return f"{percent(abs(1 - c.ratio))} {word} {what} ({ratio(c.ratio)}, {interval(c)})."


def _unstructured(plan: SparsityPlan) -> float:
    """The share of the plan's zeros that follow no pattern."""
    zeros = sum(p.zeros or 0 for p in plan.layers)
    free = sum(p.zeros or 0 for p in plan.layers if p.pattern == "unstructured")
    return free / zeros if zeros else 0.0


def _score(name: str, metric: MetricResult) -> str:
    assert metric.dense
    assert metric.difference
    d = metric.difference
    return (
        f"{name} {figure(metric.model.value)} beside {figure(metric.dense.value)} of the dense "
        f"model, over {metric.samples} prompts (difference {figure(d.value)}, 95 % interval "
        f"{figure(d.low)} to {figure(d.high)})."
    )


def _pictures(pairs: Sequence[Pair]) -> str:
    different = [p.psnr for p in pairs if p.psnr is not None]
    if not different:
        return f"All {len(pairs)} pictures are identical to the dense ones."
    return (
        f"The pictures differ from the dense ones by a median PSNR of "
        f"{statistics.median(different):.1f} dB ({len(different)} of {len(pairs)} differ); "
        "look at them below."
    )


def read_pairs(run: Path) -> tuple[list[Pair], dict[str, Any]]:
    """The pictures both engines made of the same prompt and seed, and the settings they share."""
    from PIL import Image

    from sdcompress.evaluation.images import PROMPTS, psnr

    folders = [run / "images" / name for name in ("dense", "sparse")]
    if not all((folder / PROMPTS).exists() for folder in folders):
        return [], {}
    listed = [_json(folder / PROMPTS) for folder in folders]
    dense, sparse = (
        {(p["prompt"], p["seed"]): folder / Path(p["file"]).name for p in listing["pictures"]}
        for folder, listing in zip(folders, listed, strict=True)
    )
    pairs = []
    for key in dense.keys() & sparse.keys():
        try:
            with Image.open(dense[key]) as a, Image.open(sparse[key]) as b:
                pairs.append(
                    Pair(
                        prompt=key[0],
                        seed=key[1],
                        dense=_data_uri(dense[key]),
                        sparse=_data_uri(sparse[key]),
                        size=a.size,
                        psnr=psnr(a, b),
                    )
                )
        except (OSError, ValueError) as error:
            raise InputError(
                f"{run}: the pictures of {key[0]!r} cannot be compared ({error}); make them again"
            ) from error
    order = list(dense)
    return sorted(pairs, key=lambda p: order.index((p.prompt, p.seed))), listed[0]["settings"]


def picture_quality(run: Path) -> dict[str, float]:
    """`psnr`: the median over a run's pictures of sparse against dense, in dB; identical is 100."""
    pairs, _ = read_pairs(run)
    if not pairs:
        return {}
    decibels = (IDENTICAL if p.psnr is None else min(IDENTICAL, p.psnr) for p in pairs)
    return {"psnr": statistics.median(decibels)}


def read_checks(run: Path) -> tuple[Check, ...] | None:
    """The checks of `verify.json`, or None without one."""
    if not (run / VERIFICATION).exists():
        return None
    listed = _json(run / VERIFICATION)["checks"]
    return tuple(Check.model_validate(check) for check in listed)


def read_quality(run: Path) -> Quality | None:
    """What `quality.json` says, or None without one."""
    if not (run / QUALITY).exists():
        return None
    try:
        return Quality.model_validate(_json(run / QUALITY))
    except ValidationError as e:
        raise InputError(
            f"{run / QUALITY}: not what this version understands; remove it or make it again"
        ) from e


def read_structure(run: Path) -> dict[str, ComponentStructure]:
    """What became of the blocks of each component, as the run's latest bundle says; {} if whole."""
    manifests = (Bundle.open(run / b).manifest for b in BUNDLES if (run / b / MANIFEST).exists())
    return next(filter(None, (read_record(m.details) for m in manifests)), {})


def not_measured(run: Path) -> str | None:
    """Why the engines of a run were not measured, as the run's log says; None if it does not."""
    if not (run / LOG).exists():
        return None
    reason = _json(run / LOG).get("not_measured")
    return str(reason) if reason else None


def target_of(run: Path) -> str | None:
    """The device that a run's recipe names."""
    import yaml

    try:
        recipe = yaml.safe_load(_text(run / RECIPE) or "")
    except yaml.YAMLError:
        return None
    target = recipe.get("target") if isinstance(recipe, dict) else None
    return str(target) if target else None


def read_builds(run: Path) -> dict[str, BuildReport]:
    """What the builders of both engines say they did: twin → report, where there is one."""
    reports = {twin: BuildReport.read(run / "engine" / twin) for twin in ("dense", "sparse")}
    return {twin: report for twin, report in reports.items() if report}


def percent(fraction: float) -> str:
    """0.3845 → "38.5 %"; what is not quite 0 or 1 never looks like it."""
    if 0 < abs(fraction) < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= fraction < 1:
        return "> 99.9 %"
    return f"{100 * fraction:.1f} %"


def size(count: float) -> str:
    """Bytes in powers of ten, as disks and download pages count them."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def amount(value: float, unit: str) -> str:
    """A figure of a measure with its unit, to three or four digits."""
    if unit == "bytes":
        return size(value)
    if value >= 10_000:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def figure(value: float) -> str:
    """A metric to three significant digits, with a true minus sign."""
    text = f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def number(value: int) -> str:
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def ratio(value: float) -> str:
    return f"×{value:.3f}"


def interval(c: Comparison) -> str:
    return f"{percent(c.confidence)} interval {c.low:.3f}–{c.high:.3f}".replace(".0 %", " %")


def label(name: str) -> str:
    return NAMES.get(name, name.replace("_", " ").capitalize())


def _in_sentence(name: str) -> str:
    """Lower case at the start ("text encoder"); "UNet" and "VAE" stay as they are."""
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def verdict(c: Comparison, unit: str) -> str:
    """The verdict in the words of the unit: times get faster, sizes get smaller."""
    if c.verdict == SAME:
        return SAME
    words = {"ms": ("faster", "slower"), "bytes": ("smaller", "larger")}[unit]
    return words[c.verdict == "higher"]


def _narrowed(name: str, structure: ComponentStructure, results: Results | None) -> dict[str, Any]:
    """What the page shows of one component's blocks."""
    measure = results.measures.get(TIMED[name]) if results else None
    kinds = [
        {
            "title": KINDS[kind],
            "blocks": blocks,
            "narrower": sum(b.kept < b.width for b in blocks.values()),
            "chart": charts.blocks(f"{label(name)}, {_in_sentence(KINDS[kind])}", blocks),
        }
        for kind in _kinds(structure)
        for blocks in [{n: b for n, b in structure.blocks.items() if b.kind == kind}]
    ]
    asked = structure.budget or {}
    of = "of one sample in one step" if name == "unet" else "of one sample"
    parameters = (structure.parameters_dense, structure.parameters)
    macs = (structure.macs_dense, structure.macs)
    costs = [
        Cost("parameters", "", _share(*parameters), asked.get("params"), parameters),
        Cost("multiply-accumulates", of, _share(*macs), asked.get("macs"), macs),
    ]
    run = f"of {_in_sentence(label(TIMED[name]))}"
    if structure.latency is not None:
        costs.append(Cost("time, by the table", run, structure.latency, asked.get("latency")))
    if measure:
        found = measure.sparse_to_dense
        costs.append(Cost("time, measured", run, found.ratio, interval=(found.low, found.high)))
    return {
        "name": name,
        "blocks": structure.blocks,
        "budget": bool(structure.budget),
        "kinds": kinds,
        "costs": costs,
    }


def _share(dense: int, now: int) -> float:
    return now / dense


def _kinds(structure: ComponentStructure, *, narrower: bool = False) -> list[Kind]:
    """The kinds of its blocks; `narrower`: only those of blocks that lost something."""
    blocks = [b for b in structure.blocks.values() if b.kept < b.width or not narrower]
    return [kind for kind in KINDS if any(b.kind == kind for b in blocks)]


def _by_component(plan: SparsityPlan | None, sparsity: Accounting | None) -> list[dict[str, Any]]:
    if plan is None or sparsity is None:
        return []
    found = []
    for component in plan.parameters:
        layers = plan.of(component)
        found.append(
            {
                "name": component,
                "layers": layers,
                "pruned": sum(p.pruned for p in layers),
                "skipped": _reasons(layers),
                "chart": charts.layers(label(component), layers, plan.parameters[component]),
            }
        )
    return found


def _reasons(layers: Sequence[LayerPlan]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for layer in layers:
        if layer.skipped_because:
            counts[layer.skipped_because] = counts.get(layer.skipped_because, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def _bundle(run: Path) -> Bundle | None:
    for name in BUNDLES:
        if (run / name / MANIFEST).exists():
            return Bundle.open(run / name)
    return None


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ({error}); remove it or make it again") from error


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
