"""One point of a sweep: prune a model one way, measure its pictures, keep the answer.

What makes a point is digested, and the answer lies under that digest: asked again, by the same
sweep or by another command that works in the same folder, it is read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdcompress.bundle import Bundle, locked, refuse_inside, to_json, tool_versions, write_json
from sdcompress.catalog import COMPONENTS, read_catalog
from sdcompress.errors import InputError, SdcompressError, VerificationError
from sdcompress.evaluation.files import content
from sdcompress.evaluation.metrics._clip import SHIPPED
from sdcompress.evaluation.quality import Quality, QualitySettings
from sdcompress.patterns import parse_pattern
from sdcompress.plan import Accounting, account, make_plan
from sdcompress.recipe import ComponentRecipe, Recipe, Rule, describe_first

if TYPE_CHECKING:
    from sdcompress.evaluation.pictures import Pictures

POINTS = "points"
SHOWN, TILE = 4, 160  # how many pictures of a point are kept, and how large in pixels
# The parts of a recipe that make a point.
DECIDES = {"seed", "prune", "calibration", "schedule", "tune"}
Progress = Callable[[int, int], None]  # pictures made, of how many


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Record):
    """How one component is pruned; the fields mean what they mean in a recipe."""

    criterion: str = "magnitude"
    pattern: str = "unstructured"
    sparsity: float | None = None
    scope: Literal["linear", "conv", "all"] = "all"
    allocation: str = "uniform"

    @model_validator(mode="after")
    def _possible(self) -> Part:
        try:
            self.section()
        except ValidationError as e:
            raise ValueError(describe_first(e, "part")) from e
        return self

    def section(self) -> ComponentRecipe:
        rule = Rule.model_validate(self.model_dump(exclude={"allocation"}))
        return ComponentRecipe(allocation=self.allocation, rules=(rule,))

    @property
    def kind(self) -> str:
        """What pattern the points of one curve share: "unstructured", or "N:4" for 3:4, 2:4, …."""
        m = parse_pattern(self.pattern).m
        return "unstructured" if m is None else f"N:{m}"


class Curve(_Record):
    """What the points of one curve have in common; where components differ, "A + B"."""

    component: str
    criterion: str
    pattern: str
    scope: str
    allocation: str


class Point(_Record):
    """What is pruned, and how: component → part. `name` is for curves of unequal components."""

    parts: dict[Literal["text_encoder", "unet", "vae"], Part] = Field(min_length=1)
    name: str | None = None

    @property
    def curve(self) -> Curve:
        parts = [self.parts[c] for c in COMPONENTS if c in self.parts]

        def shared(*values: str) -> str:
            return " + ".join(dict.fromkeys(values))

        return Curve(
            component=self.name or ("both" if len(parts) > 1 else next(iter(self.parts))),
            criterion=shared(*(p.criterion for p in parts)),
            pattern=shared(*(p.kind for p in parts)),
            scope=shared(*(p.scope for p in parts)),
            allocation=shared(*(p.allocation for p in parts)),
        )


class PointResult(_Record):
    """What a point came to; `failed` says why there is no quality.

    `recipe` holds what decides a point (see `DECIDES`), `dense` the digest of the model, `pictures`
    the point's first pictures in one small image, as a data URI.
    """

    schema_version: Literal[1] = 1
    digest: str
    dense: str
    recipe: dict[str, Any]
    accounting: Accounting | None = None
    quality: Quality | None = None
    failed: str | None = None
    pictures: str = ""

    @property
    def sparsity(self) -> float | None:
        """What was asked of the components pruned, over all their parameters."""
        return round(self.accounting.together.asked, 6) if self.accounting else None


def point_recipe(point: Point, base: Recipe | None = None) -> Recipe:
    """The recipe of a point; its seed, calibration, schedule and tuning are those of `base`."""
    prune: dict[str, ComponentRecipe] = {c: part.section() for c, part in point.parts.items()}
    if base is None:
        return Recipe(name="point", prune=prune)
    return base.model_copy(update={"name": "point", "prune": prune})


def point_digest(dense: Bundle, recipe: Recipe, settings: QualitySettings) -> str:
    """The digest of all that decides a point's answer: model, recipe, pictures, tools, and what
    lies where recipe and settings name files.
    """
    made_of = {
        "dense": dense.digest,
        "recipe": recipe.model_dump(mode="json", include=DECIDES),
        "cost_of_blocks": _counted_for(recipe),
        "settings": settings.model_dump(mode="json"),
        "tools": tool_versions(),
        **_named_files(recipe, settings),
    }
    return hashlib.sha256(to_json(made_of).encode()).hexdigest()


def _counted_for(recipe: Recipe) -> dict[str, Any]:
    """The size of a picture, where blocks go by what they cost in one."""
    if not any(section.structure for section in recipe.prune.values()):
        return {}
    return recipe.sampling.model_dump(include={"height", "width"})


def _named_files(recipe: Recipe, settings: QualitySettings) -> dict[str, str]:
    """Digests of the files that are there by their names; whoever needs the others says so."""
    named = settings.model_dump(
        include={"clip", "real_images", "real_statistics", "inception_weights"}
    )
    if settings.clip == SHIPPED:
        del named["clip"]
    named["calibration_images"] = recipe.calibration.images
    for component, section in recipe.prune.items():
        named[f"{component}_table"] = section.structure and section.structure.table
    for use, tune in (("images", recipe.tune), ("schedule_images", recipe.schedule.tune)):
        named[use] = tune.images if tune else None
    places = {name: Path(place).expanduser() for name, place in named.items() if place}
    return {name: content(place) for name, place in places.items() if place.exists()}


def measure_point(
    dense: Bundle,
    recipe: Recipe,
    settings: QualitySettings,
    work: Path,
    *,
    progress: Progress | None = None,
) -> PointResult:
    """Prune `dense` by `recipe`, tune it if the recipe says so, and measure its pictures.

    The answer is kept in `work/points`, and read from there the next time; pictures are shared
    under `work`. A call that was killed is taken up where it was.

    Raises:
        SdcompressError: the point cannot be made or measured; nothing is kept.
    """
    digest = point_digest(dense, recipe, settings)
    known = read_point(work, digest)
    if known and known.quality:
        return known
    result = compute_point(dense, recipe, settings, work, progress=progress)
    save_point(work, result)
    return result


def try_point(
    dense: Bundle,
    recipe: Recipe,
    settings: QualitySettings,
    work: Path,
    *,
    progress: Progress | None = None,
) -> PointResult:
    """`compute_point`, where a failure is an answer too: one point must not end the others."""
    try:
        return compute_point(dense, recipe, settings, work, progress=progress)
    except Exception as e:
        text = " ".join(str(e).split()) or "no message"
        reason = text if isinstance(e, SdcompressError) else f"{type(e).__name__}: {text:.300}"
        return failed_point(dense, recipe, settings, reason)


def failed_point(
    dense: Bundle, recipe: Recipe, settings: QualitySettings, reason: str
) -> PointResult:
    """The answer of a point that could not be made or measured."""
    return PointResult(
        digest=point_digest(dense, recipe, settings),
        dense=dense.digest,
        recipe=recipe.model_dump(mode="json", include=DECIDES),
        accounting=account(make_plan(recipe, read_catalog(dense.path))),
        failed=reason,
    )


def compute_point(
    dense: Bundle,
    recipe: Recipe,
    settings: QualitySettings,
    work: Path,
    *,
    progress: Progress | None = None,
) -> PointResult:
    """`measure_point` without looking for an answer and without keeping it."""
    from sdcompress.evaluation.pictures import Pictures
    from sdcompress.evaluation.quality import evaluate

    digest = point_digest(dense, recipe, settings)
    folder = work / "bundles" / digest[:32]
    try:
        model = _made(dense, recipe, folder)
        assert model.manifest.plan
        quality = evaluate(model, dense, settings, work=work, progress=progress or _silent)
        result = PointResult(
            digest=digest,
            dense=dense.digest,
            recipe=recipe.model_dump(mode="json", include=DECIDES),
            accounting=account(model.manifest.plan),
            quality=quality,
            pictures=contact_strip(Pictures.of(model, settings, work)),
        )
    except Exception:
        # Checkpoints, and rounds that are finished, are worth more than their room.
        if not recipe.tune and recipe.schedule.rounds == 1:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)
    return result


def _made(dense: Bundle, recipe: Recipe, folder: Path) -> Bundle:
    """The pruned model, tuned where the recipe says so."""
    from sdcompress.rounds import prune_in_rounds

    # The folder is named after all that decides: what a killed call has left there is the same.
    pruned = folder / "pruned"
    model = _intact(pruned) or prune_in_rounds(dense, recipe, pruned, replace=True)
    if recipe.tune:
        from sdcompress.tuning import tune

        out, checkpoints = folder / "tuned", folder / "checkpoints"
        model = tune(model, recipe.tune, out, dense=dense, replace=True, checkpoints=checkpoints)
    return model


def _intact(path: Path) -> Bundle | None:
    """The bundle there, if there is one and nothing has happened to it."""
    with suppress(InputError, VerificationError):
        bundle = Bundle.open(path)
        bundle.check_files()
        return bundle
    return None


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the folder of a sweep or a search, which is made if need be, against any other.

    Raises:
        InputError: another is at work there, it holds something else, or it cannot be made.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{work}: cannot be created ({e.strerror}); check the path") from e
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(work, wait=False))
        except BlockingIOError as e:
            raise InputError(
                f"{work}: another sweep or search is at work there; wait for it or choose another "
                "folder"
            ) from e
        refuse_foreign(work)
        yield


def refuse_foreign(work: Path) -> None:
    """Raises InputError: `work` holds what neither a sweep nor a search has put there.

    UsageError: it lies in a bundle.
    """
    refuse_inside(work)
    if (work / POINTS).is_dir() or not work.exists():
        return
    if not work.is_dir():
        raise InputError(f"{work}: expected a folder, found a file; choose another place")
    found = sorted(file.name for file in work.iterdir())
    if set(found) - {"pictures", "bundles"}:  # those come before the first point
        more = ", …" if len(found) > 3 else ""
        raise InputError(
            f"{work}: expected a new folder or that of an earlier sweep or search, found "
            f"{', '.join(found[:3])}{more}; choose another folder"
        )


def save_point(work: Path, result: PointResult) -> None:
    (work / POINTS).mkdir(parents=True, exist_ok=True)
    write_json(work / POINTS / f"{result.digest}.json", result.model_dump(mode="json"))


def read_point(work: Path, digest: str) -> PointResult | None:
    """The answer kept under this digest, None if there is none.

    Raises:
        InputError: the file is there and is not such an answer.
    """
    file = work / POINTS / f"{digest}.json"
    try:
        return PointResult.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as e:
        raise InputError(f"{file}: not a point this version understands; remove the file") from e


def contact_strip(pictures: Pictures) -> str:
    """The first pictures side by side and small, as a data URI."""
    import base64
    import io

    from PIL import Image

    tiles = [Image.fromarray(picture) for picture in pictures.read(range(SHOWN)[: len(pictures)])]
    kind = "PNG" if max(tiles[0].size) <= TILE else "JPEG"
    for tile in tiles:
        tile.thumbnail((TILE, TILE))
    width, height = tiles[0].size
    strip = Image.new("RGB", (len(tiles) * width, height))
    for i, tile in enumerate(tiles):
        strip.paste(tile, (i * width, 0))
    written = io.BytesIO()
    strip.save(written, kind)
    text = base64.b64encode(written.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{text}"


def _silent(done: int, total: int) -> None:
    pass
