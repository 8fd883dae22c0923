"""ONNX Runtime: on any CPU; on NVIDIA GPUs through its CUDA and TensorRT providers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from export.backends import (
    Runner,
    Tensor,
    exported_components,
    read_options,
    require_component,
    seal_onnx_files,
)
from sdcompress.bundle import Bundle
from sdcompress.errors import InputError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.backends import Arrays, BuildProgress
    from export.specs import Sizes
    from export.targets import Target

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
BEST = (PROVIDERS["tensorrt"], PROVIDERS["cuda"], PROVIDERS["cpu"])
MODEL = "model.onnx"


class Options(BaseModel):
    """What can be set in a recipe under `engine.options`.

    provider: `auto` takes TensorRT, CUDA or the CPU, the first that is there.
    threads: within one operation; None leaves it to ONNX Runtime (one a physical core).
    graph_optimization: how far ONNX Runtime rewrites the graph when it loads it.
    trt_*: passed to the TensorRT provider, which builds its engines at the first run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    graph_optimization: Literal["all", "extended", "basic", "none"] = "all"
    trt_fp16: bool = False
    trt_sparsity: bool = True
    trt_engine_cache: bool = True


class OnnxRuntimeBackend:
    """The engine is the ONNX bundle's own files and the options to load them with.

    Only the weights are copied, everything else is hard-linked.

    An fp16 graph runs on a CPU too, but is computed in fp32: casts are put in when it is loaded.
    It is as fast as the fp32 graph and needs as much memory; only its file is half the size.
    """

    name = "onnxruntime"

    def available(self) -> str | None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            return (
                "the package onnxruntime is missing; "
                "pip install 'sdcompress[cpu]', or 'sdcompress[gpu]' for NVIDIA GPUs"
            )
        return None

    def check(self, options: Mapping[str, Any], target: Target | None = None) -> None:
        chosen = _options(options)
        if why := self.available():
            raise UsageError(why)
        _providers(chosen)

    def why_not_run(self, details: Mapping[str, Any]) -> str | None:
        return self.available()

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
        """Take the ONNX files into an engine bundle, after loading each of them once here."""
        chosen = _options(options)
        if target:
            raise UsageError(
                "the onnxruntime backend builds for the machine it runs on; leave out the target"
            )
        if why := self.available():
            raise UsageError(why)
        import onnxruntime

        components = exported_components(source)
        models = [source.path / c / MODEL for c in components]
        provider = _provider_that_loads(models, chosen)
        details = {
            "backend": self.name,
            "providers": dict.fromkeys(components, provider),
            "options": chosen.model_dump(),
            "components": components,
            "sparse_kernels": _sparse_kernels(provider, chosen, source),
        }
        tools = {"onnxruntime": onnxruntime.__version__}
        return seal_onnx_files(source, out, details, tools, replace=replace)

    def open(self, engine: Path, component: str, details: Mapping[str, Any]) -> Runner:
        require_component(engine, component, details)
        provider = details["providers"][component]
        return OnnxRuntimeRunner(
            engine / component / MODEL, Options.model_validate(details["options"]), provider
        )


class OnnxRuntimeRunner(Runner):
    """A session on one `model.onnx`; `settings` are more entries of its configuration."""

    def __init__(self, model: Path, options: Options, provider: str) -> None:
        self._model, self._options, self._provider = model, options, provider
        self.settings: Mapping[str, str] = {}
        self._session: Any = None

    def load(self) -> None:
        import numpy as np
        import onnxruntime as ort

        if self._provider not in ort.get_available_providers():
            raise UsageError(
                f"the engine was built for {self._provider}, which this onnxruntime lacks; "
                "build it again here"
            )
        try:
            self._session = ort.InferenceSession(
                str(self._model), self._session_options(), providers=self._provider_options()
            )
        except Exception as error:  # onnxruntime raises classes of its own, all from Exception
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{self._model}: onnxruntime cannot load it ({reason}); export it again"
            ) from error
        if (runs := self._session.get_providers()[0]) != self._provider:
            raise UsageError(
                f"{self._provider} could not start here and onnxruntime fell back to {runs}; "
                "install its libraries (CUDA, cuDNN, TensorRT) or set provider: cpu"
            )
        dtypes = {
            "float": np.float32,
            "float16": np.float16,
            "int32": np.int32,
            "int64": np.int64,
            "double": np.float64,
        }

        def described(infos: Any) -> dict[str, Tensor]:
            return {
                i.name: Tensor(
                    np.dtype(dtypes[i.type.removeprefix("tensor(").removesuffix(")")]),
                    tuple(d if isinstance(d, int) else None for d in i.shape),
                )
                for i in infos
            }

        self.inputs = described(self._session.get_inputs())
        self.outputs = described(self._session.get_outputs())

    def close(self) -> None:
        self._session = None

    def infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        import numpy as np

        cast = {
            name: np.asarray(value, dtype=self.inputs[name].dtype, order="C")
            for name, value in feeds.items()
        }
        return dict(zip(self.outputs, self._session.run(None, cast), strict=True))

    def device_memory(self) -> dict[str, int] | None:
        if self._provider == PROVIDERS["cpu"]:
            return None
        return {"weights": sum(f.stat().st_size for f in self._model.parent.glob("model.onnx*"))}

    def _session_options(self) -> Any:
        import onnxruntime as ort

        levels = ort.GraphOptimizationLevel
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings about the graph's shape help nobody here
        for name, value in self.settings.items():
            options.add_session_config_entry(name, value)
        if self._options.threads:
            options.intra_op_num_threads = self._options.threads
        options.graph_optimization_level = {
            "all": levels.ORT_ENABLE_ALL,
            "extended": levels.ORT_ENABLE_EXTENDED,
            "basic": levels.ORT_ENABLE_BASIC,
            "none": levels.ORT_DISABLE_ALL,
        }[self._options.graph_optimization]
        return options

    def _provider_options(self) -> list[Any]:
        cpu, chosen = PROVIDERS["cpu"], self._options
        if self._provider == cpu:
            return [cpu]
        if self._provider == PROVIDERS["cuda"]:
            return [self._provider, cpu]
        settings: dict[str, Any] = {
            "trt_fp16_enable": chosen.trt_fp16,
            "trt_sparsity_enable": chosen.trt_sparsity,
        }
        if chosen.trt_engine_cache:
            settings["trt_engine_cache_enable"] = True
            settings["trt_engine_cache_path"] = str(self._cache())
        return [(self._provider, settings), PROVIDERS["cuda"], cpu]

    def _cache(self) -> Path:
        """Where TensorRT's own engines go: outside the bundle, whose files are sealed."""
        digest = Bundle.open(self._model.parent.parent).digest
        folder = Path.home() / ".cache" / "sdcompress" / "tensorrt" / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@lru_cache(maxsize=1)
def shared_memory() -> dict[str, str]:
    """The settings of sessions that compute in the same memory, one after the other.

    A session of its own keeps as much as its largest run has needed, for as long as it lives.
    """
    import onnxruntime as ort

    kind, use = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, use), None)
    return {"session.use_env_allocators": "1"}


def _options(options: Mapping[str, Any] | None) -> Options:
    return read_options("onnxruntime", Options, options)


def _provider_that_loads(models: list[Path], options: Options) -> str:
    """The provider asked for, or the best there is; every model is loaded with it once.

    A graph that cannot be loaded fails here, and not when somebody waits for a picture. Providers
    are listed even where their libraries are missing, so only a session shows what really runs.
    """
    wanted = _providers(options)
    # The engine's cache is keyed by a bundle that does not exist yet.
    trial = options.model_copy(update={"trt_engine_cache": False})
    for provider in wanted:
        try:
            for model in models:
                with OnnxRuntimeRunner(model, trial, provider):
                    pass
        except UsageError:
            if provider == wanted[-1]:
                raise
        else:
            return provider
    raise AssertionError("the CPU provider is always there")


def _providers(options: Options) -> list[str]:
    """What `options` allow and this onnxruntime has, best first; UsageError if nothing is left."""
    import onnxruntime as ort

    here = ort.get_available_providers()
    if options.provider == "auto":
        return [p for p in BEST if p in here]
    if (asked := PROVIDERS[options.provider]) not in here:
        raise UsageError(
            f"provider {options.provider!r} is not in this onnxruntime ({', '.join(here)}); "
            "pip install 'sdcompress[gpu]' in place of onnxruntime, or set provider: cpu"
        )
    return [asked]


def _sparse_kernels(provider: str, options: Options, source: Bundle) -> dict[str, Any]:
    plan = source.manifest.plan
    pruned = sum(layer.pruned for layer in plan.layers) if plan else 0
    if provider == PROVIDERS["tensorrt"] and options.trt_sparsity:
        return {
            "used": None,
            "of": pruned,
            "how": "TensorRT was allowed sparse kernels; the provider does not say which it chose",
        }
    kind = provider.removesuffix("ExecutionProvider")
    how = f"ONNX Runtime's {kind} kernels multiply by zeros like by any other number"
    return {"used": 0, "of": pruned, "how": how}


BACKEND = OnnxRuntimeBackend()
