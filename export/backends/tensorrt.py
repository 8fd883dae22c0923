"""TensorRT 10.3 and newer, on the device it builds for; shared with TensorRT-RTX.

What is specific to a version is in `export.device.builder`; here are bundles, targets and options.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from export.backends import Runner, Tensor, exported_components, read_options, require_component
from export.device import builder
from export.device.errors import DeviceError
from export.device.process import command_of
from export.specs import Sizes, static_shapes
from export.targets import names as target_names
from sdcompress.build_report import BUILD_REPORT, BuildReport, Component
from sdcompress.build_report import Runtime as RuntimeRecord
from sdcompress.bundle import Bundle, carry_over, seal, staging, write_text
from sdcompress.errors import InputError, SdcompressError, UsageError, VerificationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.backends import Arrays, BuildProgress
    from export.targets import Target

MODEL, PLAN, LOG = "model.onnx", "engine.plan", "build.log"
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
FIRST_SPARSE = (8, 0)  # compute capability of the first sparse Tensor Cores
HARDWARE = {"ampere+": "AMPERE_PLUS", "same-sm": "SAME_COMPUTE_CAPABILITY"}
_PROFILE = re.compile(r"(\d+)x(\d+)x(\d+)")


class Options(BaseModel):
    """What can be set in a recipe under `engine.options`.

    sparse: whether TensorRT may choose sparse kernels. `auto`: wherever the device has sparse
        Tensor Cores. Weights decide nothing here, so that both twins are built alike.
    profiles: free shapes, each "MIN,USUAL,MAX" with IMAGESxHEIGHTxWIDTH in pixels for each of them,
        such as "1x512x512,1x512x512,4x768x768". Without any, shapes are fixed, which is faster.
    workspace_mb: the most a kernel may use besides, MiB; None takes the target's.
    optimization_level: 0 to 5; None leaves it to TensorRT.
    timing_cache: the folder where timings are kept over builds; `auto` is one below ~/.cache.
    compute_capability: of the card, where TensorRT-RTX builds without a target.
    version_compatible, hardware_compatible: for plans that run on newer versions and other GPUs.
    refit: weights can be changed later, by `build --refit`; strip: leave them out of the plan.
    weight_streaming, weight_budget_mb: keep only so many MiB of weights on the GPU.
    check_flag: build again without sparse kernels and compare; None does so for TensorRT-RTX.
    allow_smaller: halve height and width if memory is too small for anything else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparse: Literal["auto", "on", "off"] = "auto"
    profiles: tuple[str, ...] = ()
    workspace_mb: int | None = Field(default=None, ge=1)
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    timing_cache: str = "auto"
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d$")
    version_compatible: bool = False
    hardware_compatible: Literal["off", "ampere+", "same-sm"] = "off"
    refit: bool = False
    strip: bool = False
    weight_streaming: bool = False
    weight_budget_mb: int | None = Field(default=None, ge=1)
    cuda_graph: bool = True
    check_flag: bool | None = None
    allow_smaller: bool = False

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int | float) else value

    @field_validator("profiles", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("profiles")
    @classmethod
    def _well_formed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_profile(text)
        return value


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine."""

    name: str
    compute_capability: str


def local_gpu() -> Gpu | str:
    """The GPU that is here, or one sentence that says why none can be used."""
    from export.device.cuda import Cuda

    try:
        cuda = Cuda.load()
        return Gpu(cuda.name, cuda.compute_capability)
    except DeviceError as error:
        return str(error)


def parse_profile(text: str) -> tuple[Sizes, Sizes, Sizes]:
    """Smallest, usual and largest of "1x512x512,1x512x512,4x768x768"; raises ValueError."""
    found = [_PROFILE.fullmatch(part.strip()) for part in text.split(",")]
    if len(found) != 3 or not all(found):
        raise ValueError(
            f"expected MIN,USUAL,MAX with IMAGESxHEIGHTxWIDTH for each, found {text!r}; "
            "such as 1x512x512,1x512x512,4x768x768"
        )
    numbers = [tuple(int(n) for n in match.groups()) for match in found if match]
    if any(not a <= b <= c for a, b, c in zip(*numbers, strict=True)):
        raise ValueError(f"expected sizes that grow from MIN to USUAL to MAX, found {text!r}")
    if not all(min(size) for size in numbers):
        raise ValueError(f"expected 1 or more of images and pixels, found {text!r}")
    low, usual, high = (Sizes(images=i, height=h, width=w) for i, h, w in numbers)
    return low, usual, high


class TensorRTBackend:
    """Builds with the Python module `name`, which is `tensorrt` or `tensorrt_rtx`.

    TensorRT builds for the GPU it runs on. TensorRT-RTX builds for any RTX card, and what it builds
    runs under any operating system.
    """

    def __init__(self, name: Literal["tensorrt", "tensorrt_rtx"]) -> None:
        self.name = name

    @property
    def _ahead_of_time(self) -> bool:
        return self.name == "tensorrt_rtx"

    def available(self) -> str | None:
        if why := self._no_module():
            return why
        if self._ahead_of_time or isinstance(gpu := local_gpu(), Gpu):
            return None
        return f"TensorRT builds on the GPU it builds for: {gpu}"

    def check(self, options: Mapping[str, Any], target: Target | None = None) -> None:
        self._settings(_options(self.name, options), target)

    def why_not_run(self, details: Mapping[str, Any]) -> str | None:
        why = self.why_not_load(details)
        if why and (self._no_module() or not isinstance(local_gpu(), Gpu)):
            why += "; measure it on the card, or with the device bundle of `sdcompress device`"
        return why

    def why_not_load(self, details: Mapping[str, Any]) -> str | None:
        """The same, without where to go for pictures and figures."""
        if why := self._no_module():
            return why
        gpu = local_gpu()
        if not isinstance(gpu, Gpu):
            return gpu
        built: Mapping[str, str] = details["runtime"]
        here = self._runtime(gpu.compute_capability)
        options = Options.model_validate(details["options"])
        again = f"build it again here with `{_rebuild(self.name, details, gpu)}`"
        if not _runs_on(options.hardware_compatible, built, here):
            return (
                f"the engine was built for compute capability {built['compute_capability']} and "
                f"the {gpu.name} here has {gpu.compute_capability}; {again}"
            )
        if not _runs_with(options.version_compatible, built["version"], here["version"]):
            title = TITLES[self.name]
            return (
                f"the engine was built by {title} {built['version']} and {here['version']} is "
                f"installed here; {again}"
            )
        keys = () if self._ahead_of_time else ("os", "machine")
        for key in keys:
            if built[key] != here[key]:
                return f"the engine was built for {built[key]} and this is {here[key]}; {again}"
        return None

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
        """Build every component, each in a process of its own, with its verbose log and a report.

        Raises:
            UsageError: an option, a size or a target that cannot be served here.
            InputError: TensorRT cannot read or build it, or memory is too small; the message names
                the log, which is kept where nothing else is.
        """
        chosen = _options(self.name, options)
        settings = self._settings(chosen, target)
        opset = source.manifest.details.get("opset", 0)
        if target and opset > target.opset_max:
            raise UsageError(
                f"{source.path}: its graphs have opset {opset}, and {target.title} reads up to "
                f"{target.opset_max}; export it again with an older exporter or upgrade the device"
            )
        components = exported_components(source)
        sizes = sizes or Sizes()
        for component in components:
            _shapes(source, component, sizes, chosen)  # whether all fit, before the first is built
        with staging(out, replace=replace) as work, _logs() as logs:
            job = _Job(self.name, settings, source, work, logs, progress)
            sizes, made = _build_all(job, components, sizes)
            for name in source.manifest.files:
                if not _of_graph(name):
                    carry_over(source, name, work / name)
            report = BuildReport(
                backend=self.name,
                runtime=RuntimeRecord.model_validate(settings.runtime),
                target=target.name if target else None,
                options=settings.options.model_dump(mode="json"),
                components=made,
            )
            details = {
                **source.manifest.details,
                "backend": self.name,
                "providers": dict.fromkeys(components, self._provider(settings.runtime)),
                "options": report.options,
                "components": components,
                "target": report.target,
                "runtime": settings.runtime,
            }
            if not chosen.profiles:
                details["sizes"] = asdict(sizes)
            _seal(work, source, details, report)
        return Bundle.open(out)

    def open(self, engine: Path, component: str, details: Mapping[str, Any]) -> Runner:
        require_component(engine, component, details)
        return TensorRTRunner(
            self.name,
            engine / component / PLAN,
            details["plans"][component],
            Options.model_validate(details["options"]),
            details["providers"][component],
        )

    def _no_module(self, way: str | None = None) -> str | None:
        """None if a version that serves is installed, else how to get one, or another `way`."""
        try:
            module = importlib.import_module(self.name)
            builder.check_version(self.name, module.__version__)
        except ImportError as error:
            # What is installed and broken says itself what it lacks.
            missing = isinstance(error, ModuleNotFoundError) and error.name == self.name
            found = "is missing" if missing else f"cannot be imported ({error})"
            return f"the Python module {self.name} {found}; {way or self._how_to_get()}"
        except DeviceError as error:
            return str(error)
        return None

    def _how_to_get(self) -> str:
        if self._ahead_of_time:
            return "pip install 'sdcompress[rtx]'"
        if platform.machine() == "aarch64":
            return (
                "JetPack 6.1 or newer brings it (sudo apt install nvidia-jetpack), and a virtual "
                "environment sees it when made with --system-site-packages"
            )
        return (
            "use NVIDIA's TensorRT container from NGC, or its installer for TensorRT 10.3 or "
            "newer; for RTX cards backend tensorrt_rtx does without: pip install 'sdcompress[rtx]'"
        )

    def _settings(self, chosen: Options, target: Target | None) -> _Settings:
        """What to build for, with nothing left to choose; UsageError if that is impossible."""
        if target and self.name not in target.backends:
            raise UsageError(
                f"{target.title} is not served by {self.name}; use backend "
                f"{' or '.join(target.backends)}"
            )
        # A Jetson's engines are built by the Jetson: what would make this machine build is no help.
        elsewhere = target and target.platform == "jetson" and platform.machine() != "aarch64"
        way = _on_the_device(target) if target and elsewhere else None
        if why := self._no_module(way):
            raise UsageError(why)
        if why := self.available():
            raise UsageError(f"{why}; {way}" if way else why)
        gpu = local_gpu()
        capability = self._capability(chosen, target, gpu)
        runtime = self._runtime(capability)
        if target and not self._ahead_of_time and not target.accepts(runtime["version"]):
            raise UsageError(
                f"TensorRT {runtime['version']} does not serve {target.title}; "
                f"it takes {target.tensorrt_min} to {target.tensorrt_max or 'any newer'}"
            )
        able = tuple(map(int, capability.split("."))) >= FIRST_SPARSE
        if chosen.sparse == "on" and not able:
            raise UsageError(
                f"compute capability {capability} has no sparse Tensor Cores (8.0 and newer have); "
                "leave out sparse: on"
            )
        sparse = chosen.sparse == "on" or (chosen.sparse == "auto" and able)
        if chosen.strip and sparse:
            raise UsageError(
                "a stripped plan is built without looking at weights, so it has no sparse kernels; "
                "set sparse: off, or strip: false"
            )
        if chosen.weight_budget_mb and not chosen.weight_streaming:
            raise UsageError("weight_budget_mb needs weight_streaming: true; set it, or leave out")
        if self._ahead_of_time:
            _refuse_for_rtx(chosen, gpu)
        options = chosen.model_copy(
            update={
                "sparse": "on" if sparse else "off",
                "workspace_mb": chosen.workspace_mb or (target.workspace_mb if target else None),
                "check_flag": self._ahead_of_time
                if chosen.check_flag is None
                else chosen.check_flag,
            }
        )
        return _Settings(options, runtime, gpu if isinstance(gpu, Gpu) else None)

    def _capability(self, chosen: Options, target: Target | None, gpu: Gpu | str) -> str:
        """The compute capability to build for."""
        asked = {target.compute_capability} if target else set()
        asked |= {chosen.compute_capability} if chosen.compute_capability else set()
        if len(asked) > 1:
            raise UsageError(
                f"compute_capability {chosen.compute_capability} is not that of the target, "
                f"{target.compute_capability if target else None}; leave one of them out"
            )
        if not isinstance(gpu, Gpu):
            if not asked:
                raise UsageError(
                    f"which card to build for? ({gpu}) name it with --target, such as rtx-4090, or "
                    "with --option compute_capability=8.9"
                )
            return asked.pop()
        wanted = asked.pop() if asked else gpu.compute_capability
        if not self._ahead_of_time and wanted != gpu.compute_capability:
            raise UsageError(
                f"TensorRT builds for the GPU it runs on: asked is compute capability {wanted}, "
                f"and the {gpu.name} here has {gpu.compute_capability}; "
                f"{_on_the_device(target)}"
            )
        return wanted

    def _runtime(self, capability: str) -> dict[str, str]:
        return {
            "module": self.name,
            "version": str(importlib.import_module(self.name).__version__),
            "compute_capability": capability,
            "os": platform.system(),
            "machine": platform.machine(),
        }

    def _provider(self, runtime: Mapping[str, str]) -> str:
        digits = runtime["compute_capability"].replace(".", "")
        return f"{TITLES[self.name]} {runtime['version']} SM{digits}"


@dataclass(frozen=True)
class _Settings:
    """Options with nothing left to choose, what builds and for what, and the GPU that is here."""

    options: Options
    runtime: dict[str, str]
    gpu: Gpu | None


@dataclass(frozen=True)
class _Job:
    """One bundle being built into `work`; logs lie elsewhere, to outlive a failure."""

    module: str
    settings: _Settings
    source: Bundle
    work: Path
    logs: Path
    progress: BuildProgress | None

    def request(self, component: str, sizes: Sizes) -> builder.Request:
        options, runtime = self.settings.options, self.settings.runtime
        ahead = self.module == "tensorrt_rtx"
        capability, gpu = runtime["compute_capability"], self.settings.gpu
        loads_here = gpu is not None and gpu.compute_capability == capability
        return builder.Request(
            module=self.module,
            onnx=str((self.source.path / component / MODEL).resolve()),
            plan=str(self.work / component / PLAN),
            log=str(self.logs / f"{component}.log"),
            **_shapes(self.source, component, sizes, options),
            sparse=options.sparse == "on",
            workspace_mb=options.workspace_mb,
            optimization_level=options.optimization_level,
            timing_cache=_timing_cache(self.module, options),
            device=gpu.name if gpu else f"SM{capability}",
            compute_capability=capability if ahead else None,
            version_compatible=options.version_compatible,
            hardware_compatible=HARDWARE.get(options.hardware_compatible),
            refit=options.refit,
            strip=options.strip,
            weight_streaming=options.weight_streaming,
            inspect=loads_here,
            check_flag=bool(options.check_flag),
        )

    def tell(self, component: str) -> builder.Progress | None:
        if (progress := self.progress) is None:
            return None
        return lambda phase, done, steps: progress(component, phase, done, steps)


def _build_all(
    job: _Job, components: list[str], sizes: Sizes
) -> tuple[Sizes, dict[str, Component]]:
    """Build all components for the same sizes; returns those, halved if that was allowed."""
    try:
        return sizes, {c: _build_one(job, c, sizes) for c in components}
    except builder.OutOfMemoryError as error:
        if not job.settings.options.allow_smaller:
            hint = "or add --option allow_smaller=true to have height and width halved"
            raise InputError(f"{error}; {hint}") from error
        smaller = _halved(job.source, sizes)
        try:
            made = {c: _build_one(job, c, smaller) for c in components}
        except DeviceError as again:
            raise _ours(again) from again
        note = f"height and width were halved, because memory ran out ({error})"
        return smaller, {
            c: m.model_copy(update={"warnings": (note, *m.warnings)}) for c, m in made.items()
        }
    except DeviceError as error:
        raise _ours(error) from error


def _build_one(job: _Job, component: str, sizes: Sizes) -> Component:
    (job.work / component).mkdir(exist_ok=True)
    request = job.request(component, sizes)
    made = builder.build_in_process(request, command_of("builder"), job.tell(component))
    shutil.move(request.log, job.work / component / LOG)
    return Component.model_validate(made)


def _halved(source: Bundle, sizes: Sizes) -> Sizes:
    """Half the height and width; raises UsageError where the model does not take that."""
    from export.pipeline import Geometry

    geometry = Geometry.read(source.path)
    height = (sizes.height or geometry.default_size) // 2
    width = (sizes.width or geometry.default_size) // 2
    geometry.latent_shape(height, width)
    return replace(sizes, height=height, width=width)


def _shapes(source: Bundle, component: str, sizes: Sizes, options: Options) -> dict[str, Any]:
    """`shapes` or `profiles` of a build request."""
    from export.pipeline import Geometry

    geometry = Geometry.read(source.path)
    configs = {
        c: json.loads((source.path / c / "config.json").read_text())
        for c in {component, "text_encoder"}
        if (source.path / c / "config.json").is_file()
    }
    tokens = configs.get("text_encoder", {}).get("max_position_embeddings", 77)

    def at(one: Sizes) -> dict[str, builder.Shape]:
        _, height, width = geometry.latent_shape(one.height, one.width)
        batch = one.batch(component)
        return static_shapes(component, configs[component], batch, height, width, tokens)

    if not options.profiles:
        return {"shapes": at(sizes)}
    profiles = []
    for text in options.profiles:
        try:
            low, usual, high = (at(replace(s, guided=sizes.guided)) for s in parse_profile(text))
        except UsageError as error:
            raise UsageError(f"profile {text}: {error}") from error
        profiles.append({name: (low[name], usual[name], high[name]) for name in usual})
    asked = at(sizes)
    if not any(_within(profile, asked) for profile in profiles):
        raise UsageError(
            f"none of the profiles {', '.join(options.profiles)} has room for {component} at "
            f"{sizes.images}x{sizes.height or geometry.default_size}x"
            f"{sizes.width or geometry.default_size}, which is asked for; widen one of them"
        )
    return {"profiles": tuple(profiles)}


def _on_the_device(target: Target | None) -> str:
    """How engines get built where they will run."""
    name = target.name if target and target.name in target_names() else "TARGET"
    return (
        "build on the device, with what "
        f"`sdcompress device DENSE SPARSE --target {name} -o device.tar` packs for it"
    )


def _within(profile: builder.Profile, shapes: builder.Shapes) -> bool:
    return all(
        low <= side <= high
        for name, shape in shapes.items()
        for low, side, high in zip(profile[name][0], shape, profile[name][2], strict=True)
    )


def _timing_cache(module: str, options: Options) -> str | None:
    if options.timing_cache == "off" or module == "tensorrt_rtx":
        return None
    if options.timing_cache in ("auto", "on"):
        return str(Path.home() / ".cache" / "sdcompress" / "timing")
    return str(Path(options.timing_cache).resolve())


def _refuse_for_rtx(chosen: Options, gpu: Gpu | str) -> None:
    """What TensorRT-RTX does not do, and would not say before the build."""
    if chosen.timing_cache not in ("auto", "off"):
        raise UsageError("TensorRT-RTX times nothing while building; leave out timing_cache")
    if chosen.hardware_compatible != "off":
        raise UsageError(
            "TensorRT-RTX has no hardware compatibility; build for each card, one target at a time"
        )
    if (chosen.refit or chosen.strip) and not isinstance(gpu, Gpu):
        asked = "refit" if chosen.refit else "strip"
        raise UsageError(
            f"TensorRT-RTX needs a GPU to build plans that take other weights later ({gpu}); "
            f"leave out {asked}"
        )


def _of_graph(name: str) -> bool:
    """Whether a file of an ONNX bundle is what the plan replaces."""
    return Path(name).name.startswith(MODEL) or Path(name).name == "weight_map.json"


@contextmanager
def _logs() -> Iterator[Path]:
    """A folder for logs that is left where it is if the block fails after writing one."""
    folder = Path(tempfile.mkdtemp(prefix="sdcompress-build-log-"))
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder)


def _seal(work: Path, source: Bundle, details: Mapping[str, Any], report: BuildReport) -> None:
    write_text(work / BUILD_REPORT, report.model_dump_json(indent=1) + "\n")
    manifest = source.manifest
    seal(
        work,
        manifest.model_copy(
            update={
                "stage": "engine",
                "parent": source.digest,
                "details": {
                    **details,
                    "plans": {c: made.plan_sha256 for c, made in report.components.items()},
                    "sparse_kernels": sparse_kernels(report, source),
                },
                "tools": {**manifest.tools, report.runtime.module: report.runtime.version},
            }
        ),
    )


def sparse_kernels(report: BuildReport, source: Bundle) -> dict[str, Any]:
    """How many layers run on kernels that skip zeros, and what tells (see `SparseKernels`)."""
    plan, title = source.manifest.plan, TITLES[report.runtime.module]
    of = sum(layer.pruned for layer in plan.layers) if plan else 0
    parts = report.components.values()
    if report.options["sparse"] == "off":
        how = "it was built without SPARSE_WEIGHTS, so that no kernel may skip zeros"
        return {"used": 0, "of": of, "how": how}
    if all(part.layers_sparse is not None for part in parts):
        used = sum(part.layers_sparse or 0 for part in parts)
        if all(part.layers_eligible is not None for part in parts):
            eligible = sum(part.layers_eligible or 0 for part in parts)
            told = (
                "the verbose log and the engine's tactics say"
                if any(part.sparse_tactics for part in parts)
                else "the verbose log says"
            )
            return {
                "used": used,
                "of": of,
                "how": f"{told} {used} of {eligible} layers use sparse tactics",
            }
        listed = sum(part.tactics or 0 for part in parts)
        how = f"{used} of the {listed} tactics the engines list are sparse ones by their names"
        return {"used": used, "of": of, "how": how}
    if all(part.flag_changed_plan is False for part in parts):
        plans = "the plan is" if len(report.components) == 1 else "the plans are"
        how = f"{title} ignores the flag ahead of time: {plans} the same bytes without it"
        return {"used": 0, "of": of, "how": how}
    how = "neither the log nor the engine tells which of its kernels are sparse"
    if any(part.flag_changed_plan for part in parts):
        how = f"SPARSE_WEIGHTS changed the plan, but {how}"
    return {"used": None, "of": of, "how": how}


def refit(engine: Bundle, onnx: Bundle, out: Path, *, replace: bool = False) -> Bundle:
    """A new engine bundle with the plans of `engine` and the weights of `onnx`.

    Sparse kernels read only what was non-zero when the engine was built, so every pruned tensor
    must have its zeros at the same places.

    Raises:
        UsageError: the engine cannot take these weights, or cannot be loaded here.
        VerificationError: a file of either bundle is not what its manifest says; nothing was
            loaded then.
    """
    details = engine.manifest.details
    if details["backend"] not in TITLES:
        raise UsageError(
            f"{engine.path}: is an engine of {details['backend']}, and only those of "
            f"{' and '.join(TITLES)} are refitted; build it without --refit"
        )
    name, options = str(details["backend"]), Options.model_validate(details["options"])
    backend = TensorRTBackend(name)  # type: ignore[arg-type]
    _refuse_other_structure(engine, onnx, options)
    for bundle in (engine, onnx):
        bundle.check_files()
    if why := backend.why_not_load(details):
        raise UsageError(f"{engine.path}: cannot be refitted here: {why}")
    old = BuildReport.read(engine.path)
    if old is None:
        raise InputError(f"{engine.path}: expected {BUILD_REPORT}, found none; build it again")
    with staging(out, replace=replace) as work, _logs() as logs:
        made = {}
        for component in details["components"]:
            (work / component).mkdir()
            plan, log = engine.path / component / PLAN, logs / f"{component}.log"
            request = builder.Request(
                module=name,
                onnx=str((onnx.path / component / MODEL).resolve()),
                plan=str(work / component / PLAN),
                log=str(log),
                sparse=options.sparse == "on",
                refit_from=str(plan.resolve()),
                refit_sha256=details["plans"][component],
            )
            try:
                new = builder.run_in_process(request, command_of("builder"))
            except DeviceError as error:
                raise _ours(error) from error
            shutil.move(log, work / component / LOG)
            # Kernels stay what they were: only what is about this plan file is new.
            fresh = {
                k: new[k] for k in ("plan_bytes", "plan_sha256", "seconds", "peak_build_bytes")
            }
            made[component] = old.components[component].model_copy(update=fresh)
        for file in onnx.manifest.files:
            if not _of_graph(file):
                carry_over(onnx, file, work / file)
        kept = ("backend", "providers", "options", "components", "target", "runtime", "sizes")
        _seal(
            work,
            onnx,
            {
                **onnx.manifest.details,
                **{key: details[key] for key in kept if key in details},
                "refitted_from": engine.digest,
            },
            old.model_copy(update={"components": made}),
        )
    return Bundle.open(out)


def _refuse_other_structure(engine: Bundle, onnx: Bundle, options: Options) -> None:
    """UsageError unless the engine takes other weights, and these fit where its own are."""
    details = engine.manifest.details
    if not (options.refit or options.strip):
        raise UsageError(f"{engine.path}: was not built to be refitted; build it with refit=true")
    asked = onnx.manifest.details
    for key in ("components", "dtype"):
        if asked.get(key) != details.get(key):
            raise UsageError(
                f"{onnx.path}: its {key} is {asked.get(key)}, that of the engine "
                f"{details.get(key)}; build a new engine"
            )
    before, after = engine.manifest.tensors, onnx.manifest.tensors
    for model in sorted(set(before) | set(after)):
        old, new = before.get(model, {}), after.get(model, {})
        if set(old) != set(new) or any(old[name].shape != new[name].shape for name in old):
            raise UsageError(
                f"{onnx.path}: {model} has other tensors than the engine; build a new engine"
            )
        for name in sorted(old):
            if old[name].zero_mask_blake3 != new[name].zero_mask_blake3:
                raise UsageError(
                    f"{onnx.path}: {model} {name} has its zeros at other places than the engine; "
                    "build a new engine"
                )
            if not options.refit and old[name].blake3 != new[name].blake3:
                raise UsageError(
                    f"{onnx.path}: {model} {name} has other values, and a stripped engine takes "
                    "back its own only; build it with refit=true"
                )


class TensorRTRunner(Runner):
    """A plan on the GPU, with its own stream and, if the engine's options say so, a CUDA graph."""

    def __init__(
        self, module: str, plan: Path, sha256: str, options: Options, built_for: str
    ) -> None:
        self._module, self._plan, self._sha256 = module, plan, sha256
        self._options, self._built_for = options, built_for
        self._engine: Any = None

    def load(self) -> None:
        import numpy as np

        from export.device.engine import Engine

        try:
            trt = importlib.import_module(self._module)
        except ImportError as error:
            why = TensorRTBackend(self._module).available()  # type: ignore[arg-type]
            raise UsageError(why or str(error)) from error
        budget = self._options.weight_budget_mb
        with _explained():
            self._engine = Engine(
                trt,
                self._plan,
                sha256=self._sha256,
                cuda_graph=self._options.cuda_graph,
                built_for=self._built_for,
                weight_budget=budget << 20 if budget else None,
                allow_host_code=self._options.version_compatible,
            )

        def described(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
            return {
                name: Tensor(np.dtype(dtype), tuple(None if side < 0 else side for side in shape))
                for name, (dtype, shape) in tensors.items()
            }

        self.inputs = described(self._engine.inputs)
        self.outputs = described(self._engine.outputs)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        import numpy as np

        given = {
            name: np.asarray(value, self.inputs[name].dtype, order="C")
            for name, value in feeds.items()
        }
        free = {name: a.shape for name, a in given.items() if None in self.inputs[name].shape}
        for name, array in given.items():
            if name not in free and array.shape != self.inputs[name].shape:
                raise UsageError(
                    f"{self._plan}: was built for {name} {list(self.inputs[name].shape)}, got "
                    f"{list(array.shape)}; build it for these sizes"
                )
        with _explained():
            raw = self._engine.run({n: a.tobytes() for n, a in given.items()}, free)
        self.gpu_milliseconds = self._engine.gpu_milliseconds
        return {
            name: np.frombuffer(data, self.outputs[name].dtype).reshape(self._engine.shape(name))
            for name, data in raw.items()
        }

    def device_memory(self) -> dict[str, int] | None:
        return dict(self._engine.memory) if self._engine is not None else None


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of the device's package as our own."""
    try:
        yield
    except DeviceError as error:
        raise _ours(error) from error


def _ours(error: DeviceError) -> SdcompressError:
    kind = VerificationError if error.exit_code == VerificationError.exit_code else InputError
    return kind(str(error))


def _runs_on(compatible: str, built: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether a plan for one compute capability runs on another."""
    if compatible == "ampere+":
        return tuple(map(int, here["compute_capability"].split("."))) >= FIRST_SPARSE
    return built["compute_capability"] == here["compute_capability"]


def _runs_with(compatible: bool, built: str, here: str) -> bool:
    """Whether a plan of one version runs with another: newer ones, if it was built for that."""
    if not compatible:
        return built == here
    old, new = (tuple(map(int, version.split("."))) for version in (built, here))
    return old[0] == new[0] and old <= new


def _rebuild(name: str, details: Mapping[str, Any], gpu: Gpu) -> str:
    """The command that builds an engine like this one for the GPU that is here."""
    words = ["sdcompress", "build", "ONNX", "-o", "ENGINE", "--backend", name]
    same = details["runtime"]["compute_capability"] == gpu.compute_capability
    target = details.get("target") if same else None
    if target:
        words += ["--target", target]
    sizes = details.get("sizes") or {}
    for side in ("height", "width"):
        if sizes.get(side):
            words += [f"--{side}", str(sizes[side])]
    if sizes.get("images", 1) != 1:
        words += ["--images", str(sizes["images"])]
    if not sizes.get("guided", True):
        words.append("--no-guidance")
    usual = {
        **Options().model_dump(mode="json"),
        "sparse": "on",
        "check_flag": name == "tensorrt_rtx",
    }
    options = dict(details["options"])
    if target:
        options["workspace_mb"] = None
    options["compute_capability"] = None
    if name == "tensorrt_rtx" and not target:
        options["compute_capability"] = gpu.compute_capability
    for key, value in options.items():
        if value != usual[key]:
            for one in value if isinstance(value, list) else [value]:
                words += ["--option", f"{key}={str(one).lower() if one in (True, False) else one}"]
    return shlex.join(words)


def _options(name: str, options: Mapping[str, Any] | None) -> Options:
    return read_options(name, Options, options)


BACKEND = TensorRTBackend("tensorrt")
