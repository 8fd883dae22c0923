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
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from export.backends import load_backend
from sdcompress.bundle import Bundle, staging, to_json, tool_versions, write_json, write_text
from sdcompress.errors import InputError, VerificationError
from sdcompress.recipe import Recipe
from sdcompress.results import Results

STATE = "state.json"
RESULTS = "results.json"
VERIFY = "verify.json"
PAGE = "report.html"
TWINS = ("dense", "sparse")

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
    def open(cls, path: Path, *, fresh: bool = False) -> Workspace:
        """Take up an earlier run's directory, or make a new one.

        Raises:
            InputError: the path holds something that no run of ours has made.
        """
        marker = path / STATE
        foreign = path.exists() and (not path.is_dir() or any(path.glob("[!.]*")))
        if foreign and not marker.is_file():
            raise InputError(
                f"{path}: exists and is not the output of `sdcompress run`; choose another --output"
            )
        state: dict[str, dict[str, str]] = {}
        if marker.is_file() and not fresh:
            try:
                state = json.loads(marker.read_text())
            except ValueError as e:
                raise InputError(f"{marker}: not valid JSON; start over with --fresh") from e
        path.mkdir(parents=True, exist_ok=True)
        workspace = cls(path, state)
        workspace._save()
        return workspace

    def bundle(self, stage: str, key: str, make: Callable[[Path], Bundle]) -> tuple[Bundle, bool]:
        """The bundle of a stage, made now unless it is there; and whether it was there."""
        target = self.path / stage
        done = self.state.get(stage, {})
        if done.get("key") == key and target.is_dir():
            try:
                bundle = Bundle.open(target)
                if bundle.digest == done.get("digest"):
                    bundle.check_files()
                    return bundle, True
            except (InputError, VerificationError):
                pass  # damaged since: make it again
        bundle = self._timed(stage, lambda: make(target))
        self._finish(stage, key, bundle.digest)
        return bundle, False

    def files(self, stage: str, key: str, make: Callable[[], None], output: Path) -> bool:
        """Make a stage's file or directory unless it is there and unchanged."""
        done = self.state.get(stage, {})
        if done.get("key") == key and output.exists() and done.get("digest") == _digest(output):
            return True
        self._timed(stage, make)
        self._finish(stage, key, _digest(output))
        return False

    def _timed(self, stage: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = make()
        self.seconds[stage] = round(time.perf_counter() - start, 3)
        return result

    def _finish(self, stage: str, key: str, digest: str) -> None:
        self.state[stage] = {"key": key, "digest": digest}
        self._save()

    def _save(self) -> None:
        write_text(self.path / STATE, to_json(self.state))


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
        VerificationError: the exported model failed a check; `verify.json` holds all of them.
    """
    from export.to_onnx import export_bundle
    from sdcompress.catalog import read_catalog
    from sdcompress.plan import make_plan
    from sdcompress.prune import prune
    from sdcompress.report import write_report

    backend = load_backend(recipe.engine.backend)
    if problem := backend.available():
        raise InputError(f"backend {recipe.engine.backend} does not run here: {problem}")
    make_plan(recipe, read_catalog(source.path))
    place = Workspace.open(out, fresh=fresh)
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))

    def bundle(
        stage: str, settings: Any, make: Callable[[Path], Bundle], *inputs: Bundle
    ) -> Bundle:
        made, done = place.bundle(stage, _key(stage, settings, *inputs), make)
        announce(stage, done)
        return made

    pruned = bundle(
        "pruned",
        {"prune": recipe.model_dump(mode="json")["prune"], "seed": recipe.seed},
        lambda path: prune(source, recipe, path, replace=True),
        source,
    )
    dtype, options = recipe.export.dtype, dict(recipe.engine.options)

    def export(weights: Bundle, path: Path) -> Bundle:
        return export_bundle(weights, path, dtype=dtype, replace=True)

    def build(onnx: Bundle, path: Path) -> Bundle:
        return backend.build(onnx, path, options=options, replace=True)

    def both(stage: str, settings: Any, make: Make, of: Mapping[str, Bundle]) -> dict[str, Bundle]:
        return {
            twin: bundle(f"{stage}/{twin}", settings, partial(make, of[twin]), of[twin])
            for twin in TWINS
        }

    onnx = both("onnx", {"dtype": dtype}, export, {"dense": source, "sparse": pruned})
    _verify(place, onnx["sparse"], pruned, announce)
    engine_settings = {"backend": recipe.engine.backend, "options": options}
    engines = both("engine", engine_settings, build, onnx)
    _pictures(place, recipe, engines, source, announce)
    _bench(place, recipe, engines, source, command, announce)
    write_json(out / "log.json", {"seconds": place.seconds, "command": command})
    page = write_report(out)
    announce("report", False)
    return page


def _verify(place: Workspace, onnx: Bundle, pruned: Bundle, announce: Announce) -> None:
    from export.verify import verify_bundle

    target = place.path / VERIFY

    def make() -> None:
        report = verify_bundle(onnx.path, against=pruned.path)
        write_text(target, report.model_dump_json(indent=1) + "\n")
        if not report.passed:
            failed = next(c for c in report.checks if not c.passed)
            raise VerificationError(f"{onnx.path}: {failed.name} failed: {failed.detail}")

    announce("verify", place.files("verify", _key("verify", {}, onnx, pruned), make, target))


def _pictures(
    place: Workspace, recipe: Recipe, engines: dict[str, Bundle], source: Bundle, announce: Announce
) -> None:
    from export.pipeline import generate
    from sdcompress.evaluation.images import save

    prompts = recipe.pictures.prompts
    if not prompts:
        return
    settings = sampling(recipe, source)
    seeds = [recipe.pictures.seed + i for i in range(len(prompts))]
    asked = {"prompts": list(prompts), "seeds": seeds, **settings}
    for twin in TWINS:
        stage = f"images/{twin}"
        engine = engines[twin]

        def make(engine: Bundle = engine, target: Path = place.path / stage) -> None:
            pictures = generate(engine.path, prompts, seeds, **settings)
            with staging(target, replace=True) as work:
                save(pictures, work, prompts, seeds, **settings)

        done = place.files(stage, _key(stage, asked, engine), make, place.path / stage)
        announce(stage, done)


def _bench(
    place: Workspace,
    recipe: Recipe,
    engines: dict[str, Bundle],
    source: Bundle,
    command: str,
    announce: Announce,
) -> None:
    from export.bench import bench

    target = place.path / RESULTS
    settings = {
        **sampling(recipe, source),
        "rounds": recipe.bench.rounds,
        "budget": recipe.bench.budget,
    }
    if recipe.pictures.prompts:
        settings["prompt"] = recipe.pictures.prompts[0]

    def make() -> None:
        results: Results = bench(engines["dense"], engines["sparse"], command=command, **settings)
        write_text(target, results.model_dump_json(indent=1) + "\n")

    key = _key("bench", settings, engines["dense"], engines["sparse"])
    announce("bench", place.files("bench", key, make, target))


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
