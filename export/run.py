"""All stages in a row, for the pruned model and its dense twin, resuming what is already done.

    model ─┬─────────── export ─ build ─┐
           └─ prune ─── export ─ build ─┴─ verify, pictures, bench ─ page

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from export.backends import load_backend
from export.pipeline import Geometry
from sdcompress.bundle import (
    Bundle,
    locked,
    runtime_versions,
    staging,
    to_json,
    tool_versions,
    write_json,
    write_text,
)
from sdcompress.catalog import read_catalog
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.plan import make_plan
from sdcompress.recipe import Recipe
from sdcompress.report import write_report
from sdcompress.results import Results

STATE = "state.json"
RESULTS = "results.json"
PAGE = "report.html"
TWINS = ("dense", "sparse")
VERIFY = {"dense": "verify-dense.json", "sparse": "verify.json"}
# In the order of the work. "pruned" belongs to the sparse twin; "bench" needs both.
STAGES = (
    "pruned",
    *(f"{kind}/{twin}" for kind in ("onnx", "verify", "engine", "images") for twin in TWINS),
    "bench",
)

Make = Callable[[Bundle, Path], Bundle]
Announce = Callable[[str, bool], None]  # a stage, and whether it was done before


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
        """
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
                yield workspace
        except BlockingIOError as e:
            raise InputError(f"{path}: another run is at work there; wait for it to end") from e

    def output(self, stage: str) -> Path:
        """The file or directory a stage makes."""
        kind, _, twin = stage.partition("/")
        return self.path / {"verify": VERIFY.get(twin), "bench": RESULTS}.get(kind, stage)  # type: ignore[operator]

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

    def _begin(self, stage: str) -> None:
        # What was made from this stage's old output must not outlive it: a later stage may fail,
        # and a page with yesterday's figures beside today's recipe would lie.
        (self.path / PAGE).unlink(missing_ok=True)
        for later in STAGES[STAGES.index(stage) + 1 :]:
            if later == "bench" or _twin(later) == _twin(stage):
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
) -> Path:
    """Run every stage into `out` and return the page.

    Raises:
        UsageError: the recipe does not fit the model or this machine; nothing slow has run yet.
        VerificationError: an exported model failed a check; its verify file holds all of them.
    """
    if source.path.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{source.path}: lies inside the output {out}; choose another --output")
    load_backend(recipe.engine.backend).check(recipe.engine.options)
    asked = sampling(recipe, source)
    Geometry.read(source.path, "vae").latent_shape(asked["height"], asked["width"])
    make_plan(recipe, read_catalog(source.path))
    with Workspace.open(out, fresh=fresh) as place:
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        write_text(out / "recipe.yaml", text)
        engines = _engines(place, source, recipe, announce)
        _pictures(place, recipe, engines, asked, announce)
        _bench(place, recipe, engines, asked, command, announce)
        write_json(out / "log.json", {"seconds": place.seconds, "command": command})
        page = write_report(out)
        announce("report", False)
    return page


def _engines(
    place: Workspace, source: Bundle, recipe: Recipe, announce: Announce
) -> dict[str, Bundle]:
    """Prune, export, verify and build: the engines of both twins."""
    from export.to_onnx import export_bundle
    from sdcompress.prune import DECIDES, prune

    backend = load_backend(recipe.engine.backend)
    dtype, options = recipe.export.dtype, dict(recipe.engine.options)

    def bundle(stage: str, settings: Any, make: Make, parent: Bundle) -> Bundle:
        key = _key(stage, settings, parent)
        made, done = place.bundle(stage, key, partial(make, parent))
        announce(stage, done)
        return made

    def both(kind: str, settings: Any, make: Make, of: Mapping[str, Bundle]) -> dict[str, Bundle]:
        return {twin: bundle(f"{kind}/{twin}", settings, make, of[twin]) for twin in TWINS}

    def export(weights: Bundle, path: Path) -> Bundle:
        return export_bundle(weights, path, dtype=dtype, replace=True)

    def build(onnx: Bundle, path: Path) -> Bundle:
        return backend.build(onnx, path, options=options, replace=True)

    pruned = bundle(
        "pruned",
        recipe.model_dump(mode="json", include=DECIDES),
        lambda parent, path: prune(parent, recipe, path, replace=True),
        source,
    )
    weights = {"dense": source, "sparse": pruned}
    onnx = both("onnx", {"dtype": dtype}, export, weights)
    for twin in TWINS:
        _verify(place, twin, onnx[twin], weights[twin], announce)
    settings = {"backend": recipe.engine.backend, "options": options, "runtime": runtime_versions()}
    return both("engine", settings, build, onnx)


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

    prompts = recipe.pictures.prompts
    seeds = [recipe.pictures.seed + i for i in range(len(prompts))]
    asked = {"prompts": list(prompts), "seeds": seeds, "runtime": runtime_versions(), **settings}
    for twin, engine in engines.items():
        stage = f"images/{twin}"
        if not prompts:
            place.drop(stage)
            continue

        def make(target: Path, engine: Bundle = engine) -> None:
            pictures = generate(engine.path, prompts, seeds, **settings)
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

    settings = {**sampling, "rounds": recipe.bench.rounds, "budget": recipe.bench.budget}
    if recipe.pictures.prompts:
        settings["prompt"] = recipe.pictures.prompts[0]

    def make(target: Path) -> None:
        results: Results = bench(engines["dense"], engines["sparse"], command=command, **settings)
        write_text(target, results.model_dump_json(indent=1) + "\n")

    where = {"settings": settings, "runtime": runtime_versions(), "machine": machine()}
    announce("bench", place.files("bench", _key("bench", where, *engines.values()), make))


def sampling(recipe: Recipe, source: Bundle) -> dict[str, Any]:
    """Steps, guidance, height and width: the recipe's, else the model's own."""
    from sdcompress.models.defaults import sampling_defaults

    asked = recipe.sampling.model_dump(exclude_none=True)
    return {**sampling_defaults(source.manifest.source), **asked}


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
