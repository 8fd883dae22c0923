"""What runs an exported model. One file a backend; the file name is its name in recipes.

A file defines `BACKEND`, an object with the methods of `Backend`. Nothing heavy is imported
before it is needed, so that every backend can be listed on every machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from sdcompress import registry
from sdcompress.errors import InputError, UsageError
from sdcompress.recipe import describe_first

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from export.specs import Sizes
    from export.targets import Target
    from sdcompress.bundle import Bundle

    Arrays = Mapping[str, NDArray[Any]]


Model = TypeVar("Model", bound=BaseModel)
# Hears of a component, the phase its build is in, steps done and steps in all.
BuildProgress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a component: its dtype and its shape, None where it is free."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Runner(ABC):
    """One component of an engine, loaded while the `with` block lasts.

    `inputs` and `outputs` say what it takes and gives, and are known once it is loaded.
    `gpu_milliseconds` is the time of the last `infer` between two events on the accelerator's own
    clock, copies to and from the host left out; None without an accelerator.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    gpu_milliseconds: float | None = None

    def __enter__(self) -> Runner:
        self.load()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def load(self) -> None:
        """Read the engine and get ready to run."""

    @abstractmethod
    def close(self) -> None:
        """Give back everything `load` took."""

    @abstractmethod
    def infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once. Feeds are cast to the dtypes of `inputs`; all outputs come back, by name."""

    def device_memory(self) -> dict[str, int] | None:
        """Bytes on the accelerator: `weights` and `context`, where known; None without one."""
        return None


class Backend(Protocol):
    """What a file of this folder offers as `BACKEND`."""

    name: str

    def available(self) -> str | None:
        """None if it runs here; else one sentence that says why not and how to change that."""

    def check(self, options: Mapping[str, Any], target: Target | None = None) -> None:
        """Find out before any slow work whether `build` can succeed here with these options.

        Raises:
            UsageError: it cannot: the backend does not run here or does not serve the target, or an
                option is not known or asks for what is not here.
        """

    def why_not_run(self, details: Mapping[str, Any]) -> str | None:
        """None if an engine with these manifest details can be opened here; else why not.

        Engines may be built ahead of time on machines that lack the device they run on.
        """

    def build(
        self,
        source: Bundle,
        out: Path,
        *,
        target: Target | None = None,
        sizes: Sizes | None = None,
        options: Mapping[str, Any] | None = None,
        replace: bool = False,
        progress: BuildProgress | None = None,
    ) -> Bundle:
        """Make an engine bundle at `out` from an ONNX bundle, for this machine or for `target`.

        `sizes` are what a backend with fixed shapes builds for; others take any. The manifest's
        details then hold `backend`, `providers`, `options`, `components`, `dtype` and
        `sparse_kernels` (see `sdcompress.results.SparseKernels`).

        Raises:
            UsageError: an option or a target this backend does not know or cannot serve here.
        """

    def open(self, engine: Path, component: str, details: Mapping[str, Any]) -> Runner:
        """A runner for one component of an engine bundle this backend has built.

        `details` are the manifest's; the manifest itself, which lists every tensor, is not read.
        """


def names() -> list[str]:
    """The backends there are, whether or not they run here."""
    return registry.names("backends", "export")


def load_backend(name: str) -> Backend:
    """Import one backend by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in names():
        raise UsageError(f"no backend is called {name!r}; there are: {', '.join(names())}")
    backend: Backend = registry.load("backends", name, "export").BACKEND
    return backend


def read_options(backend: str, model: type[Model], options: Mapping[str, Any] | None) -> Model:
    """The options of a backend as its `model` holds them.

    Raises:
        UsageError: there is none of that name, or its value is not allowed.
    """
    given = options or {}
    for name in given:
        if name not in model.model_fields:
            raise UsageError(
                f"{backend} option {name!r}: unknown; there are: {', '.join(model.model_fields)}"
            )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        name, _, why = describe_first(error).partition(": ")
        raise UsageError(f"{backend} option {name!r}: {why}") from error


def exported_components(source: Bundle) -> list[str]:
    """The components of an ONNX bundle, after checking its files against the manifest.

    Raises:
        VerificationError: a file is not what the manifest says.
        InputError: there is no component.
    """
    source.check_files()
    components = sorted(p.parent.name for p in source.path.glob("*/model.onnx"))
    if not components:
        raise InputError(f"{source.path}: expected <component>/model.onnx, found none")
    return components


def require_component(engine: Path, component: str, details: Mapping[str, Any]) -> None:
    """Raises InputError where an engine with these manifest details lacks the component."""
    if component not in details["components"]:
        raise InputError(
            f"{engine}: has no component {component!r}, only {', '.join(details['components'])}"
        )


def seal_onnx_files(
    source: Bundle,
    out: Path,
    details: Mapping[str, Any],
    tools: Mapping[str, str],
    *,
    replace: bool,
) -> Bundle:
    """An engine bundle of the ONNX bundle's own files: `details` and `tools` are added to its."""
    from sdcompress.bundle import Bundle, link_files, seal, staging

    manifest = source.manifest
    update = {
        "stage": "engine",
        "parent": source.digest,
        "details": {**manifest.details, **details},
        "tools": {**manifest.tools, **tools},
    }
    with staging(out, replace=replace) as work:
        seal(work, manifest.model_copy(update=update), known=link_files(source, work))
    return Bundle.open(out)


def open_component(engine: Path, component: str) -> Runner:
    """A runner for one component of any engine bundle, by the backend that built it."""
    from sdcompress.bundle import Bundle

    details = Bundle.open(engine, stages=("engine",)).manifest.details
    return load_backend(str(details["backend"])).open(engine, component, details)
