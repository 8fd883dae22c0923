"""What the commands share: options, progress on stderr, one JSON document on stdout."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from pydantic import BaseModel

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

    from sdcompress.bundle import Bundle

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, the rest on stderr."
)
output_option = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Where the result goes; it must not exist yet.",
)


residency_option = click.option(
    "--residency",
    type=click.Choice(["resident", "sequential"]),
    default="resident",
    show_default=True,
    help="All components of the engine loaded, or for small devices one at a time.",
)


class Finite(click.FloatRange):
    """A number within a range that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


GUIDANCE = Finite(min=0)


def model_options(f: F) -> F:
    """The options that say how a model is taken in; a command passes them on as `**how`."""
    for option in (
        click.option(
            "--config",
            type=click.Choice(["sd2-base", "sd2-768", "sd-turbo"]),
            help="What a single-file checkpoint is; its weights alone cannot tell.",
        ),
        click.option("--variant", help="Which weight files of a repository, such as fp16."),
        click.option("--allow-pickle", is_flag=True, help="Accept pickled weights you trust."),
        click.option(
            "--lora", "loras", multiple=True, metavar="FILE:SCALE", help="Merge a LoRA first."
        ),
    ):
        f = option(f)
    return f


def picture_options(f: F) -> F:
    """The options that say what pictures are made and measured; fields of QualitySettings."""
    folder, file = click.Path(exists=True, file_okay=False), click.Path(exists=True, dir_okay=False)
    options = (
        click.option(
            "--seed",
            type=click.IntRange(min=0, max=1 << 32),
            default=0,
            show_default=True,
            help="Picture i uses seed + i.",
        ),
        click.option("--steps", type=click.IntRange(min=1, max=1000), help="Denoising steps."),
        click.option("--guidance", type=GUIDANCE, help="Guidance; 1 or less runs one branch."),
        click.option("--height", type=click.IntRange(min=8), help="Pixels."),
        click.option("--width", type=click.IntRange(min=8), help="Pixels."),
        click.option(
            "--batch", type=click.IntRange(min=1), help="Pictures made at once.  [default: 16]"
        ),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "fp16", "bf16"]),
            help="What pictures are computed in.  [default: fp32]",
        ),
        click.option(
            "--clip", metavar="NAME|DIR", help="The CLIPModel that scores, on the hub or on disk."
        ),
        click.option("--real-images", type=folder, help="What inception_fid compares with."),
        click.option("--real-statistics", type=file, help="The same, as mu and sigma in an .npz."),
        click.option(
            "--inception-weights", type=file, help="Its network, where it cannot be fetched."
        ),
    )
    for option in reversed(options):  # as decorators stand, the first one on top
        f = option(f)
    return f


def open_model(model: str, *, check_now: bool = True, **how: Any) -> Bundle:
    """A model source, or an existing bundle of weights, as a bundle.

    What is in the files of a bundle is checked now, or else before its digest is given out, which
    is for commands that ask for it before they finish anything.
    """
    from sdcompress.bundle import MANIFEST, Bundle
    from sdcompress.models.sources import MINI_SD2, resolve

    path = Path(model).expanduser()
    if model != MINI_SD2 and (path / MANIFEST).is_file() and not how.get("loras"):
        bundle = Bundle.open(path, stages=("source", "pruned", "tuned"), check=True)
        if check_now:
            bundle.check_files()
        else:
            bundle.check_listing()
        return bundle
    resolved = resolve(model, **how)
    return Bundle.of_source(resolved.directory, resolved.source)


def console() -> Console:
    """Where people read: stderr, so that stdout stays one document."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def emit(document: BaseModel, as_json: bool, show: Callable[[Console], None]) -> None:
    """Print the result: the document for programs, or what `show` prints for people."""
    from rich.console import Console

    if as_json:
        click.echo(document.model_dump_json(indent=1))
    else:
        # A pipe has no width of its own, and nobody wants names cut short in a file. Without markup
        # names and messages may hold [brackets]; what has a colour is printed as rich's Text.
        width = None if sys.stdout.isatty() else 160
        show(Console(highlight=False, markup=False, width=width))


def _progress(*columns: ProgressColumn) -> Progress:
    """A bar on stderr that goes away when it is done; nothing at all where nobody watches."""
    from rich.progress import Progress

    people = console()
    return Progress(*columns, console=people, transient=True, disable=not people.is_terminal)


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over `total` bytes, on a terminal only; told what is done and bytes more."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        task = progress.add_task(what, total=total)
        yield lambda doing, n: progress.update(task, description=doing, advance=n)


@contextmanager
def byte_progress(bundle: Bundle) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over bytes of weights, on a terminal only."""
    from sdcompress.catalog import model_files

    files = model_files(bundle.path)
    total = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    with bytes_bar("reading", total) as progress:
        yield progress


@contextmanager
def told_progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar that also changes what it says, such as the loss; on a terminal only."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        task = progress.add_task(what, total=None)
        yield lambda doing, done, total: progress.update(
            task, description=doing, completed=done, total=total
        )


@contextmanager
def counted_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over things that are counted, such as pictures; on a terminal only."""
    with told_progress(what) as tell:
        yield lambda done, total: tell(what, done, total)


@contextmanager
def phase_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each of several things done in turn; told which, how much is done, of how much."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        yield show


@contextmanager
def stage_status(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner with elapsed time, for stages without a countable total; says what it is given."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with _progress(*columns) as progress:
        task = progress.add_task(what, total=None)
        yield lambda doing: progress.update(task, description=doing)


class Stopwatch:
    """Wall-clock seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def size(nbytes: int) -> str:
    """Bytes for people: 1.7 GB, 812 MB, 4.1 kB."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return (
                f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
            )
        value /= 1000
    return f"{value:.2f} GB"
