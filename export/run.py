"""All stages in a row, for the pruned model and its dense twin, resuming what is already done.

    model ─┬────────────────── export ─ build ─┐
           └─ prune ─ (tune) ─ export ─ build ─┴─ verify, pictures, bench ─ page

Where a budget of latency decides what goes, times are measured before anything is pruned.

An engine that cannot run here is built all the same; pictures and figures then wait for the device,
which gets a bundle of its own.

A stage is skipped when the digests of its inputs, its settings and the tools are what they were
and its output is still what it wrote then.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from export.backends import Backend, load_backend
from export.device_results import is_device_results, read_results
from export.pipeline import Geometry
from export.specs import Sizes
from export.targets import Target, load_target
from export.targets.fit import check_backend, warnings
from sdcompress.build_report import BuildReport
from sdcompress.bundle import (
    Bundle,
    locked,
    refuse_inside,
    runtime_versions,
    staging,
    to_json,
    tool_versions,
    write_json,
    write_text,
)
from sdcompress.catalog import COMPONENTS
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.evaluation.files import contents
from sdcompress.latency import LatencyTable, read_table
from sdcompress.recipe import Recipe
from sdcompress.report import picture_quality, write_report
from sdcompress.results import Results
from sdcompress.shrink import needs_tables

if TYPE_CHECKING:
    from export.ranges import Ranges
    from sdcompress.evaluation.quality import QualitySettings

STATE = "state.json"
RESULTS = "results.json"
QUALITY = "quality.json"
PAGE = "report.html"
DEVICE = "device.tar"
TWINS = ("dense", "sparse")
VERIFY = {"dense": "verify-dense.json", "sparse": "verify.json"}
# In the order of the work. WEIGHTS belong to the sparse twin; BOTH need both. There is tuning only
# where the recipe asks for it, latency is measured only for its budgets, ranges are recorded only
# where its export calibrates, and a device bundle is made only for a target.
KINDS = ("ranges", "onnx", "verify", "engine", "images")
BOTH = ("device", "bench", "quality")
LATENCY = tuple(f"latency/{component}" for component in COMPONENTS)
WEIGHTS = (*LATENCY, "pruned", "tuned")
STAGES = (*WEIGHTS, *(f"{kind}/{twin}" for kind in KINDS for twin in TWINS), *BOTH)

Make = Callable[[Bundle, Path], Bundle]
Announce = Callable[[str, bool], None]  # a stage, and whether it was done before
Tell = Callable[[str], None]  # what is being done, in a few words


@dataclass
class Workspace:
    """The output directory of a run, and what has been finished in it.

    `state.json` maps each stage to the key of what made it and the digest of its output.
    """

    path: Path
    state: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, fresh: bool = False) -> Iterator[Workspace]:
        """Take up an earlier run's directory, or make a new one; nobody else may meanwhile.

        Raises:
            InputError: the path holds something that no run of ours has made, or another run is
                at work there.
            UsageError: it lies in a bundle.
        """
        refuse_inside(path)
        marker = path / STATE
        foreign = path.exists() and (not path.is_dir() or any(path.glob("[!.]*")))
        if foreign and not marker.is_file():
            raise InputError(
                f"{path}: exists and is not the output of `sdcompress run`; choose another --output"
            )
        path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(path, wait=False):
                state = _read_state(marker) if marker.is_file() else {}
                workspace = cls(path, {} if fresh else state)
                workspace._save()
                if fresh:
                    workspace.drop_checkpoints()
                yield workspace
        except BlockingIOError as e:
            raise InputError(f"{path}: another run is at work there; wait for it to end") from e

    def output(self, stage: str) -> Path:
        """The file or directory a stage makes."""
        kind, _, twin = stage.partition("/")
        special = {
            "latency": f"latency-{twin}.json",
            "ranges": f"ranges-{twin}.json",
            "verify": VERIFY.get(twin, ""),
            "device": DEVICE,
            "bench": RESULTS,
            "quality": QUALITY,
        }
        return self.path / special.get(kind, stage)

    def bundle(self, stage: str, key: str, make: Callable[[Path], Bundle]) -> tuple[Bundle, bool]:
        """The bundle of a stage, made now unless it is there; and whether it was there."""
        target = self.output(stage)
        done = self.state.get(stage, {})
        if done.get("key") == key and target.is_dir():
            try:
                bundle = Bundle.open(target)
                if bundle.digest == done.get("digest"):
                    bundle.check_files()
                    return bundle, True
            except (InputError, VerificationError):
                pass  # damaged since: make it again
        self._begin(stage)
        bundle = self._timed(stage, lambda: make(target))
        self._finish(stage, key, bundle.digest)
        return bundle, False

    def files(self, stage: str, key: str, make: Callable[[Path], None]) -> bool:
        """Make a stage's file or directory unless it is there and unchanged."""
        target = self.output(stage)
        done = self.state.get(stage, {})
        if done.get("key") == key and target.exists() and done.get("digest") == _digest(target):
            return True
        self._begin(stage)
        self._timed(stage, lambda: make(target))
        self._finish(stage, key, _digest(target))
        return False

    def drop(self, stage: str) -> None:
        """Remove what a stage has made."""
        target = self.output(stage)
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        if self.state.pop(stage, None):
            self._save()

    def drop_checkpoints(self, keep: Path | None = None) -> None:
        """Remove what rounds and tunings that were stopped have left, but for those in `keep`."""
        for stale in {*self.path.glob(".tuning-*"), *self.path.glob(".pruned.rounds")} - {keep}:
            shutil.rmtree(stale, ignore_errors=True)

    def _begin(self, stage: str) -> None:
        # What was made from this stage's old output must not outlive it: a later stage may fail,
        # and a page with yesterday's figures beside today's recipe would lie.
        (self.path / PAGE).unlink(missing_ok=True)
        for later in STAGES[STAGES.index(stage) + 1 :]:
            if later == "quality" and stage not in WEIGHTS:
                continue  # it is the weights' own, whatever engines are made of them
            if later in LATENCY:
                continue  # one component's is nothing to another's
            if later in BOTH or _twin(later) == _twin(stage):
                self.drop(later)

    def _timed(self, stage: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = make()
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        return result

    def _finish(self, stage: str, key: str, digest: str) -> None:
        self.state[stage] = {"key": key, "digest": digest}
        self._save()

    def _save(self) -> None:
        write_json(self.path / STATE, {"sdcompress_run": 1, "stages": self.state})


def _read_state(marker: Path) -> dict[str, dict[str, str]]:
    try:
        state = json.loads(marker.read_text())
        if state["sdcompress_run"] == 1:
            return dict(state["stages"])
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{marker}: not written by this version of `sdcompress run`; choose another --output"
    )


def _twin(stage: str) -> str:
    return "dense" if stage.endswith("/dense") else "sparse"


def run(
    source: Bundle,
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    fresh: bool = False,
    announce: Announce = lambda stage, done: None,
    tell: Tell = lambda what: None,
    warn: Tell = lambda what: None,
) -> Path:
    """Run every stage into `out` and return the page.

    Raises:
        UsageError: the recipe does not fit the model or this machine; nothing slow has run yet.
        VerificationError: an exported model failed a check; its verify file holds all of them.
    """
    if source.path.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{source.path}: lies inside the output {out}; choose another --output")
    job = _Job.check(recipe, source)
    for warning in job.warnings:
        warn(warning)
    with Workspace.open(out, fresh=fresh) as place:
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        write_text(out / "recipe.yaml", text)
        weights = {
            "dense": source,
            "sparse": _sparse_weights(place, source, recipe, announce, tell),
        }
        onnx = _onnx(place, weights, recipe, job.sampling, announce)
        engines = _engines(place, recipe, job, onnx, announce, tell)
        log: dict[str, Any] = {"seconds": place.seconds, "command": command}
        if why := job.backend.why_not_run(engines["dense"].manifest.details):
            log["not_measured"] = why
            for stage in (*(f"images/{twin}" for twin in TWINS), "bench"):
                if stage in place.state:  # else it is the device's results that were put there
                    place.drop(stage)
        else:
            _pictures(place, recipe, engines, job.sampling, announce)
        _device(place, recipe, job, onnx, needed=why is not None, announce=announce)
        if not why:
            _bench(place, recipe, engines, job.sampling, command, announce)
        _quality(place, job, weights, announce, tell)
        write_json(out / "log.json", log)
        file = place.output("bench")
        page = write_report(out, read_results(file) if is_device_results(file) else None)
        announce("report", False)
    return page


@dataclass(frozen=True)
class _Job:
    """What a recipe means for a model on this machine, found to be possible."""

    backend: Backend
    target: Target | None
    sampling: dict[str, Any]
    quality: QualitySettings | None = None
    warnings: tuple[str, ...] = ()  # what will not be on the target as the recipe hopes

    @classmethod
    def check(cls, recipe: Recipe, source: Bundle) -> _Job:
        """Raises UsageError for what would fail later, before anything slow."""
        from export.latency import check as check_latency
        from sdcompress.rounds import check as check_rounds
        from sdcompress.tuning import check as check_tuning

        prompts, wanted = len(recipe.pictures.prompts), recipe.export.calibrate
        if wanted > prompts:
            raise UsageError(
                f"'export: {{calibrate: {wanted}}}' paints as many prompts, found {prompts}; add "
                "prompts to 'pictures', or ask for fewer"
            )
        target = load_target(recipe.target) if recipe.target else None
        if target:
            check_backend(target, recipe.engine.backend)
        job = cls(load_backend(recipe.engine.backend), target, sampling(recipe, source))
        job.backend.check(recipe.engine.options, job.built_for)
        asked, geometry = job.sampling, Geometry.read(source.path, "vae")
        geometry.latent_shape(asked["height"], asked["width"])
        job = replace(job, quality=_quality_settings(recipe, source, job.sampling))
        if needs_tables(recipe):
            check_latency(recipe.engine.backend, recipe.engine.options)
        plan = check_rounds(source, recipe)
        if recipe.tune:
            narrower = [c for c, section in recipe.prune.items() if section.structure]
            check_tuning(plan, recipe.tune, narrower)
        if target is None:
            return job
        return replace(job, warnings=warnings(target, recipe, plan, geometry.default_size))

    @property
    def built_for(self) -> Target | None:
        """The target, if the engines are made for it; None if they are made for this machine."""
        serves = self.target and self.backend.name in self.target.backends
        return self.target if serves else None

    @property
    def sizes(self) -> Sizes:
        asked = self.sampling
        return Sizes(1, asked["guidance"] > 1, asked["height"], asked["width"])


def _sparse_weights(
    place: Workspace, source: Bundle, recipe: Recipe, announce: Announce, tell: Tell
) -> Bundle:
    """Prune, and tune if the recipe says so."""
    from sdcompress.prune import decisive
    from sdcompress.rounds import prune_in_rounds

    tables = _tables(place, source, recipe, announce, tell)

    def prune(parent: Bundle, path: Path) -> Bundle:
        def progress(what: str, done: int, of: int) -> None:
            tell(f"{what}: {done / max(of, 1):.0%}")

        return prune_in_rounds(parent, recipe, path, tables=tables, replace=True, progress=progress)

    between = recipe.schedule.tune
    folders = (recipe.calibration.images, between.images if between else None)
    named = (section.structure for section in recipe.prune.values())
    files = [Path(structure.table) for structure in named if structure and structure.table]
    widths = [table.sha256 for table in (*tables.values(), *map(read_table, files))]
    made_by = {**decisive(recipe), **contents(*folders), "tables": widths}
    pruned = _bundle(place, "pruned", made_by, prune, source, announce)
    if not (settings := recipe.tune):
        place.drop("tuned")
        return pruned

    from sdcompress.tuning import tune

    asked = {**settings.model_dump(mode="json"), **contents(settings.images)}
    checkpoints = place.path / f".tuning-{_key('tuned', settings.decides(), pruned)[:16]}"
    place.drop_checkpoints(keep=checkpoints)

    def make(parent: Bundle, path: Path) -> Bundle:
        return tune(
            parent,
            settings,
            path,
            dense=source,
            replace=True,
            progress=lambda what, done, of: tell(f"{what}: {done} of {of}"),
            checkpoints=checkpoints,
        )

    return _bundle(place, "tuned", asked, make, pruned, announce)


def _tables(
    place: Workspace, source: Bundle, recipe: Recipe, announce: Announce, tell: Tell
) -> dict[str, LatencyTable]:
    """What widths take on this machine, of the components whose budget needs to know."""
    from export.bench import machine
    from export.latency import measure_latency

    needed = needs_tables(recipe)
    settings = as_engines(recipe, source)
    where = {**settings, "sizes": asdict(settings["sizes"])}
    where |= {"runtime": runtime_versions(), "machine": machine()}
    tables = {}
    for component in COMPONENTS:
        stage = f"latency/{component}"
        if component not in needed:
            place.drop(stage)
            continue

        def make(target: Path, component: str = component) -> None:
            table = measure_latency(
                source,
                component,
                **settings,
                progress=lambda what, done, of: tell(f"{component}, {what}: {done} of {of}"),
            )
            write_text(target, table.model_dump_json(indent=1) + "\n")

        announce(stage, place.files(stage, _key(stage, where, source), make))
        tables[component] = read_table(place.output(stage))
    return tables


def _onnx(
    place: Workspace,
    weights: Mapping[str, Bundle],
    recipe: Recipe,
    sampling: dict[str, Any],
    announce: Announce,
) -> dict[str, Bundle]:
    """Export and verify: the ONNX bundles of both twins."""
    from export.to_onnx import export_bundle

    asked = recipe.export
    ranges = _ranges(place, recipe, weights, sampling, announce)
    onnx = {}
    for twin in TWINS:
        kept = ranges.get(twin)
        export = partial(
            export_bundle,
            dtype=asked.dtype,
            upcast_attention=asked.upcast_attention,
            keep_fp32=kept,
            replace=True,
        )
        settings = {
            "dtype": asked.dtype,
            "upcast_attention": asked.upcast_attention,
            "keep_fp32": kept.beyond_fp16() if kept else None,
        }
        onnx[twin] = _bundle(place, f"onnx/{twin}", settings, export, weights[twin], announce)
    for twin in TWINS:
        _verify(place, twin, onnx[twin], weights[twin], announce)
    return onnx


def _bundle(
    place: Workspace,
    stage: str,
    settings: Any,
    make: Make,
    parent: Bundle,
    announce: Announce,
) -> Bundle:
    key = _key(stage, settings, parent)
    made, done = place.bundle(stage, key, partial(make, parent))
    announce(stage, done)
    return made


def _ranges(
    place: Workspace,
    recipe: Recipe,
    weights: Mapping[str, Bundle],
    sampling: dict[str, Any],
    announce: Announce,
) -> dict[str, Ranges]:
    """The largest numbers the twins meet on the recipe's prompts; {} if not asked for.

    Where both are the same graph, both keep the same layers in fp32 and remain the same.
    """
    from export.ranges import Ranges, record_ranges

    asked = recipe.export
    prompts = recipe.pictures.prompts[: asked.calibrate]
    if asked.dtype != "fp16" or not asked.calibrate:
        for twin in TWINS:
            place.drop(f"ranges/{twin}")
        return {}
    settings = {
        **sampling,
        "prompts": prompts,
        "seed": recipe.pictures.seed,
    }

    def make(twin: str, target: Path) -> None:
        write_text(
            target, record_ranges(weights[twin], **settings).model_dump_json(indent=1) + "\n"
        )

    found = {}
    for twin in TWINS:
        stage = f"ranges/{twin}"
        key = _key(stage, {**settings, "runtime": runtime_versions()}, weights[twin])
        announce(stage, place.files(stage, key, partial(make, twin)))
        found[twin] = Ranges.read(place.output(stage))
    dense, sparse = (found[twin] for twin in TWINS)
    return {"dense": dense.beside(sparse), "sparse": sparse.beside(dense)}


def _engines(
    place: Workspace,
    recipe: Recipe,
    job: _Job,
    onnx: Mapping[str, Bundle],
    announce: Announce,
    tell: Tell,
) -> dict[str, Bundle]:
    """The engines of both twins, built with the same settings.

    Where memory ran out for one of them only, both are built again with what was left to that one.
    """

    asked = dict(recipe.engine.options)
    settings = {
        "backend": job.backend.name,
        "options": asked,
        "target": job.built_for.model_dump(mode="json") if job.built_for else None,
        "sizes": asdict(job.sizes),
        "runtime": runtime_versions(),
    }

    def build(options: dict[str, Any]) -> dict[str, Bundle]:
        def make(parent: Bundle, path: Path) -> Bundle:
            return job.backend.build(
                parent,
                path,
                target=job.built_for,
                sizes=job.sizes,
                options=options,
                replace=True,
                progress=lambda name, phase, done, of: tell(f"{name}: {phase}, {done} of {of}"),
            )

        return {
            twin: _bundle(place, f"engine/{twin}", settings, make, onnx[twin], announce)
            for twin in TWINS
        }

    engines = build(asked)
    dense, sparse = (BuildReport.read(engines[twin].path) for twin in TWINS)
    apart, lowest = dense.limits_apart(sparse) if dense and sparse else ([], {})
    if apart:
        for twin in TWINS:
            place.drop(f"engine/{twin}")
        engines = build({**asked, **lowest})
    return engines


def _device(
    place: Workspace,
    recipe: Recipe,
    job: _Job,
    onnx: Mapping[str, Bundle],
    *,
    needed: bool,
    announce: Announce,
) -> None:
    """The bundle that builds and measures on the target, unless that has been done here."""
    from export.device_bundle import write_device_bundle

    target, stage = job.target, "device"
    if target is None or not (needed or job.built_for is None):
        place.drop(stage)
        return
    settings = {"target": target.model_dump(mode="json"), "sizes": asdict(job.sizes)}

    def make(path: Path) -> None:
        write_device_bundle(
            onnx["dense"],
            onnx["sparse"],
            path,
            target=target,
            sizes=job.sizes,
            steps=job.sampling["steps"],
            replace=True,
        )

    announce(stage, place.files(stage, _key(stage, settings, *onnx.values()), make))


def _verify(place: Workspace, twin: str, onnx: Bundle, weights: Bundle, announce: Announce) -> None:
    from export.verify import verify_bundle

    def make(target: Path) -> None:
        # A source has no manifest on disk to compare with; its digests are in the export's.
        against = weights.path if weights.manifest.stage != "source" else None
        report = verify_bundle(onnx.path, against=against)
        write_text(target, report.model_dump_json(indent=1) + "\n")
        if not report.passed:
            failed = next(c for c in report.checks if not c.passed)
            raise VerificationError(f"{onnx.path}: {failed.name} failed: {failed.detail}")

    stage = f"verify/{twin}"
    announce(stage, place.files(stage, _key(stage, runtime_versions(), onnx, weights), make))


def _pictures(
    place: Workspace,
    recipe: Recipe,
    engines: Mapping[str, Bundle],
    settings: dict[str, Any],
    announce: Announce,
) -> None:
    from export.pipeline import generate
    from sdcompress.evaluation.images import save

    prompts, residency = recipe.pictures.prompts, recipe.bench.residency
    seeds = [recipe.pictures.seed + i for i in range(len(prompts))]
    asked = {"prompts": list(prompts), "seeds": seeds, "runtime": runtime_versions(), **settings}
    for twin, engine in engines.items():
        stage = f"images/{twin}"
        if not prompts:
            place.drop(stage)
            continue

        def make(target: Path, engine: Bundle = engine) -> None:
            pictures = generate(engine.path, prompts, seeds, residency=residency, **settings)
            with staging(target, replace=True) as work:
                save(pictures, work, prompts, seeds, **settings)

        announce(stage, place.files(stage, _key(stage, asked, engine), make))


def _bench(
    place: Workspace,
    recipe: Recipe,
    engines: Mapping[str, Bundle],
    sampling: dict[str, Any],
    command: str,
    announce: Announce,
) -> None:
    from export.bench import bench, machine

    settings = {**sampling, **recipe.bench.model_dump()}
    if recipe.pictures.prompts:
        settings["prompt"] = recipe.pictures.prompts[0]

    def make(target: Path) -> None:
        results: Results = bench(engines["dense"], engines["sparse"], command=command, **settings)
        results = results.model_copy(update={"quality": picture_quality(place.path)})
        write_text(target, results.model_dump_json(indent=1) + "\n")

    where = {"settings": settings, "runtime": runtime_versions(), "machine": machine()}
    announce("bench", place.files("bench", _key("bench", where, *engines.values()), make))


def _quality_settings(
    recipe: Recipe, source: Bundle, sampling: dict[str, Any]
) -> QualitySettings | None:
    """Raises UsageError: a metric that is asked for cannot run here."""
    from sdcompress.evaluation.quality import default_settings, unavailable

    if (asked := recipe.quality) is None:
        return None
    settings = default_settings(
        source,
        min(asked.samples, len(asked.prompts) or asked.samples),
        prompts=asked.prompts or None,
        metrics=asked.metrics or None,
        seed=asked.seed,
        clip=asked.clip,
        **sampling,
    )
    unable = unavailable(settings, source)
    if missing := [name for name in settings.metrics if name in unable]:
        raise UsageError(f"quality.metrics: {missing[0]}: {unable[missing[0]]}")
    if asked.clip and "clip_score" in unable:
        raise UsageError(f"quality.clip: {unable['clip_score']}")
    return settings


def _quality(
    place: Workspace, job: _Job, weights: Mapping[str, Bundle], announce: Announce, tell: Tell
) -> None:
    """What the metrics say of many pictures, made from the weights in fp32."""
    from sdcompress.evaluation.quality import evaluate, unavailable

    if (settings := job.quality) is None:
        place.drop("quality")
        return

    def make(target: Path) -> None:
        work = place.path / ".quality"  # pictures that are done outlive a run that is stopped
        quality = evaluate(
            weights["sparse"],
            weights["dense"],
            settings,
            work=work,
            unable=unavailable(settings, weights["dense"]),
            progress=lambda done, of: tell(f"quality: {done} of {of}"),
        )
        write_text(target, quality.model_dump_json(indent=1) + "\n")
        shutil.rmtree(work, ignore_errors=True)

    key = _key("quality", [settings.model_dump(mode="json"), runtime_versions()], *weights.values())
    announce("quality", place.files("quality", key, make))


def sampling(recipe: Recipe, source: Bundle) -> dict[str, Any]:
    """Steps, guidance, height and width: the recipe's, else the model's own."""
    from sdcompress.models.defaults import sampling_defaults

    asked = recipe.sampling.model_dump(exclude_none=True)
    return {**sampling_defaults(source), **asked}


def as_engines(recipe: Recipe, source: Bundle) -> dict[str, Any]:
    """What `measure_latency` needs to know to measure what the recipe's engines will take."""
    asked = sampling(recipe, source)
    return {
        "backend": recipe.engine.backend,
        "options": recipe.engine.options,
        "sizes": Sizes(1, asked["guidance"] > 1, asked["height"], asked["width"]),
        "dtype": recipe.export.dtype,
    }


def command_line(argv: list[str]) -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["sdcompress", *argv])


def _key(stage: str, settings: Any, *inputs: Bundle) -> str:
    made_of = [stage, settings, [b.digest for b in inputs], tool_versions()]
    return hashlib.sha256(to_json(made_of).encode()).hexdigest()


def _digest(output: Path) -> str:
    """sha256 over the names and contents of a file or of all files of a directory."""
    files = sorted(f for f in output.rglob("*") if f.is_file()) if output.is_dir() else [output]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
