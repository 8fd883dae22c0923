"""torch on an NVIDIA GPU: 2:4 Linear layers through cuSPARSELt, everything in CUDA graphs.

No engine has to be built for it, so it is the quickest answer to what sparsity brings on a card.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from export.backends import (
    Runner,
    Tensor,
    exported_components,
    read_options,
    require_component,
    seal_onnx_files,
)
from export.specs import MODEL_OF, Sizes, canonical_key, component_spec
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_config
from sdcompress.errors import InputError, SdcompressError, UsageError
from sdcompress.patterns import Pattern, violations
from sdcompress.plan import LayerPlan

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from export.backends import Arrays, BuildProgress
    from export.targets import Target

MODEL = "model.onnx"
TWO_TO_FOUR = Pattern(2, 4)
MULTIPLE = 16  # of both sides of an fp16 weight, as cuSPARSELt takes it from torch
FIRST_CAPABILITY = (8, 0)  # of GPUs with sparse Tensor Cores
WARM_UP = 3  # runs before a graph is captured: libraries choose kernels and take their workspaces


class Options(BaseModel):
    """What can be set in a recipe under `engine.options`.

    sparse: `auto` runs each 2:4 Linear layer of a fitting shape sparse; `on` refuses bundles with
        2:4 Linear layers that do not fit; `off` runs them dense.
    cuda_graph: replay one CUDA graph per input shape instead of starting every kernel on its own.
    channels_last: keep images as Tensor Cores want them, channels innermost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparse: Literal["auto", "on", "off"] = "auto"
    cuda_graph: bool = True
    channels_last: bool = True


class TorchCudaBackend:
    """The engine is the ONNX bundle's own files; torch rebuilds the modules from them.

    It can be built anywhere and runs where torch finds an NVIDIA GPU. Weights have the bundle's
    dtype; only fp16 runs sparse.
    """

    name = "torch_cuda"

    def available(self) -> str | None:
        import torch

        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is built without CUDA; install a build with CUDA, "
                "which pytorch.org/get-started names for each system"
            )
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU; `nvidia-smi` tells whether the driver does"
        return None

    def check(self, options: Mapping[str, Any], target: Target | None = None) -> None:
        _options(options)
        _no_target(target)

    def why_not_run(self, details: Mapping[str, Any]) -> str | None:
        if why := self.available():
            return why
        return _why_not_sparse() if any(details["sparse_layers"].values()) else None

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
        """Take the ONNX files into an engine bundle, and choose the layers that run sparse.

        `details` then also hold `sparse_layers`, component → weight keys, and `sparse_mac_share`,
        component → share of the multiply-adds of its Linear and Conv layers at `sizes`.
        """
        chosen = _options(options)
        _no_target(target)
        import torch

        components = exported_components(source)
        for component, kept in source.manifest.details.get("kept_fp32", {}).items():
            raise UsageError(
                f"{component}: {kept[0]} is to be computed in fp32, which is written in the graph "
                "only and torch_cuda runs the module; use another backend, or export as fp32"
            )
        layers = {c: sparse_layers(source, c, chosen) for c in components}
        sizes = sizes or Sizes()
        shares = {c: mac_share(source.path, c, keys, sizes) for c, keys in layers.items() if keys}
        details = {
            "backend": self.name,
            "providers": dict.fromkeys(components, "torch CUDA"),
            "options": chosen.model_dump(),
            "components": components,
            "sparse_layers": layers,
            "sparse_mac_share": shares,
            "sparse_kernels": _sparse_kernels(source, layers, shares, sizes, chosen),
        }
        tools = {"torch": torch.__version__}
        return seal_onnx_files(source, out, details, tools, replace=replace)

    def open(self, engine: Path, component: str, details: Mapping[str, Any]) -> Runner:
        # Imported before the runner loads, so that the time to load is the component's own.
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel  # noqa: F401

        import export.torch_module  # noqa: F401

        require_component(engine, component, details)
        return TorchRunner(
            engine,
            component,
            Options.model_validate(details["options"]),
            details["sparse_layers"][component],
        )


class TorchRunner(Runner):
    """One component as a torch module; on "cpu" it runs dense and without graphs, for tests."""

    def __init__(
        self,
        engine: Path,
        component: str,
        options: Options,
        sparse: Sequence[str] = (),
        device: str = "cuda",
    ) -> None:
        self._engine, self._component, self._options = engine, component, options
        self._sparse, self._device = frozenset(sparse), device
        self._module: torch.nn.Module | None = None
        self._programs: dict[tuple[tuple[int, ...], ...], Program] = {}
        self._weights = 0

    def load(self) -> None:
        import numpy as np
        import torch

        from export.graph import open_graph
        from export.torch_module import torch_module

        if self._on_gpu:
            details = {"sparse_layers": {self._component: list(self._sparse)}}
            if why := BACKEND.why_not_run(details):
                raise UsageError(why)
        before = torch.cuda.memory_allocated() if self._on_gpu else 0
        graph = open_graph(self._engine, self._component)
        with _explained(self._component):
            module = torch_module(graph)
            packed = self._compress(module)
            place(module, self._device, self._options)
            for layer, weight in packed.items():
                replace_weight(layer, weight)
        self._module = module
        self._weights = torch.cuda.memory_allocated() - before if self._on_gpu else 0
        spec, dtype = component_spec(self._component, graph.config), graph.weight_map.dtype
        self.inputs, self.outputs = (
            {
                t.name: Tensor(
                    np.dtype(t.numpy_dtype(dtype)),
                    tuple(axis if isinstance(axis, int) else None for axis in t.axes),
                )
                for t in tensors
            }
            for tensors in (spec.inputs, spec.outputs)
        )

    def close(self) -> None:
        self._programs.clear()
        self._module = None
        if self._on_gpu:
            import torch

            gc.collect()
            torch.cuda.empty_cache()

    def infer(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        import numpy as np
        import torch

        assert self._module is not None
        # Copies, as torch takes no array that is read-only.
        given = [
            torch.from_numpy(np.array(feeds[name], wanted.dtype, order="C"))
            for name, wanted in self.inputs.items()
        ]
        shapes = tuple(tuple(t.shape) for t in given)
        with torch.inference_mode(), _explained(self._component):
            if shapes not in self._programs:
                self._programs[shapes] = Program(self._module, given, self._device, self._options)
            program = self._programs[shapes]
            outputs = program.run(given)
        self.gpu_milliseconds = program.milliseconds
        return dict(zip(self.outputs, outputs, strict=True))

    def device_memory(self) -> dict[str, int] | None:
        """Weights as they lie on the GPU; as context the most that a run took on top of them."""
        if not self._on_gpu:
            return None
        context = max((p.context for p in self._programs.values()), default=0)
        return {"weights": self._weights, "context": context}

    @property
    def _on_gpu(self) -> bool:
        return self._device != "cpu"

    def _compress(self, module: torch.nn.Module) -> dict[torch.nn.Module, torch.Tensor]:
        """Take the weights that run sparse out of the module, and pack them on the device.

        One at a time, so that no more than one is on the device both packed and not.
        """
        from export.tracing import parameter_names

        names = parameter_names(self._component, module)
        packed = {}
        for key in sorted(self._sparse):
            layer: Any = module.get_submodule(names[key].removesuffix(".weight"))
            weight = layer.weight.detach().to(self._device)
            if bad := violations(weight, TWO_TO_FOUR):
                raise InputError(
                    f"{self._engine / self._component}: expected {key} to be 2:4, found {bad:,} "
                    "groups of more than 2 weights; build the engine again"
                )
            layer.weight = None
            packed[layer] = _pack(weight)
        return packed


def place(module: torch.nn.Module, device: str, options: Options) -> torch.nn.Module:
    """The same module, on the device, laid out as the options say."""
    import torch

    layout = torch.channels_last if options.channels_last else torch.preserve_format
    return module.to(device, memory_format=layout)  # type: ignore[no-any-return, call-overload]


class Program:
    """A module on inputs of fixed shapes: its places on the device, and a CUDA graph of it.

    `milliseconds` is between events right before and after the last run, copies left out.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        given: Sequence[torch.Tensor],
        device: str,
        options: Options,
    ) -> None:
        import torch

        def place(tensor: torch.Tensor) -> torch.Tensor:
            image = tensor.ndim == 4 and options.channels_last
            layout = torch.channels_last if image else torch.contiguous_format
            return tensor.to(device, copy=True, memory_format=layout)

        self._module = module
        self._inputs = [place(t) for t in given]
        self._outputs: tuple[torch.Tensor, ...] = ()
        self._graph: Any = None
        self._events: Any = None
        self.context = 0
        self.milliseconds: float | None = None
        if device == "cpu":
            return
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._measure_context()
        if options.cuda_graph:
            self._capture()

    def run(self, given: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
        for place, tensor in zip(self._inputs, given, strict=True):
            place.copy_(tensor)
        if self._events:
            start, end = self._events
            start.record()
            self._step()
            end.record()
            end.synchronize()
            self.milliseconds = start.elapsed_time(end)
        else:
            self._step()
        return [output.cpu().numpy() for output in self._outputs]

    def _step(self) -> None:
        if self._graph:
            self._graph.replay()
        else:
            self._outputs = self._call()

    def _call(self) -> tuple[torch.Tensor, ...]:
        outputs = self._module(*self._inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _measure_context(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._call()
        torch.cuda.synchronize()
        self.context = torch.cuda.max_memory_allocated() - before

    def _capture(self) -> None:
        import torch

        ours = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(ours)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._call()
        ours.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may ask the driver for figures meanwhile, as measuring does.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._call()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise SdcompressError(
                f"torch could not capture a CUDA graph ({_first_line(error)}); build the engine "
                "with --option cuda_graph=false"
            ) from error
        self._graph = graph


@contextmanager
def _explained(component: str) -> Iterator[None]:
    """Running out of GPU memory, as one line that says what to do."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise SdcompressError(
            f"{component}: the GPU has too little memory ({_first_line(error)}); use "
            "--residency sequential, a smaller picture, or end what else runs on the GPU"
        ) from error


def sparse_layers(bundle: Bundle, component: str, options: Options) -> list[str]:
    """The keys of the weights of an ONNX bundle that cuSPARSELt can take.

    Those are 2:4 along the inputs of a Linear layer, in fp16, both sides multiples of 16.

    Raises:
        UsageError: `sparse` is on, and a 2:4 Linear layer is of another dtype or shape.
    """
    plan, dtype = bundle.manifest.plan, bundle.manifest.details["dtype"]
    if plan is None or options.sparse == "off":
        return []
    chosen = []
    for layer in plan.of(MODEL_OF[component]):
        if not _is_two_to_four_linear(layer):
            continue
        fits = dtype == "fp16" and not any(side % MULTIPLE for side in layer.shape)
        if fits:
            chosen.append(canonical_key(component, layer.name))
        elif options.sparse == "on":
            raise UsageError(
                f"{layer.name}: cuSPARSELt takes fp16 weights with sides that are multiples of "
                f"{MULTIPLE}, found {dtype} of {'×'.join(map(str, layer.shape))}; set sparse: auto"
            )
    return sorted(chosen)


def mac_share(bundle: Path, component: str, keys: Sequence[str], sizes: Sizes) -> float:
    """The share that the layers of `keys` have in the multiply-adds of all Linear and Conv layers.

    Of one run of the component at `sizes`; see `export.torch_module.layer_macs`.
    """
    from export.pipeline import Geometry
    from export.torch_module import layer_macs

    _, height, width = Geometry.read(bundle).latent_shape(sizes.height, sizes.width)
    macs = layer_macs(
        component,
        read_config(bundle / component),
        batch=sizes.batch(component),
        height=height,
        width=width,
    )
    return sum(macs[key] for key in keys) / sum(macs.values())


def _is_two_to_four_linear(layer: LayerPlan) -> bool:
    """Conv weights have more sides than two. What is 1:4 is 2:4 as well."""
    linear = layer.kind == "linear" and len(layer.shape) == 2
    return layer.pruned and linear and layer.pattern in ("2:4", "1:4") and layer.axis == 1


def _sparse_kernels(
    source: Bundle,
    layers: Mapping[str, Sequence[str]],
    shares: Mapping[str, float],
    sizes: Sizes,
    options: Options,
) -> dict[str, Any]:
    from export.pipeline import Geometry

    plan = source.manifest.plan
    pruned = sum(layer.pruned for layer in plan.layers) if plan else 0
    parts = [f"{share:.0%} in {component}" for component, share in shares.items()]
    if options.sparse == "off":
        how = "sparse kernels were switched off"
    elif not parts:
        how = f"cuSPARSELt takes 2:4 Linear layers in fp16, sides multiples of {MULTIPLE}; no such"
    else:
        geometry = Geometry.read(source.path)
        _, height, width = geometry.latent_shape(sizes.height, sizes.width)
        pixels = f"{height * geometry.scale}×{width * geometry.scale}"
        how = (
            f"cuSPARSELt, Linear layers only; share of the multiply-adds of all Linear and Conv "
            f"layers at {pixels} pixels: {', '.join(parts)}"
        )
    return {"used": sum(map(len, layers.values())), "of": pruned, "how": how}


def replace_weight(layer: torch.nn.Module, packed: torch.Tensor) -> None:
    """Make a Linear layer use a packed weight.

    Such a weight takes no strided input, as the layers are given that attend to an image.
    """
    import torch

    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
        return torch.sparse.to_sparse_semi_structured(weight.contiguous())


def _why_not_sparse() -> str | None:
    import torch

    fix = "build the engine with --option sparse=off"
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} comes without cuSPARSELt for the sparse layers; {fix}"
    if (found := torch.cuda.get_device_capability()) < FIRST_CAPABILITY:
        name, capability = torch.cuda.get_device_name(), ".".join(map(str, found))
        return f"{name} (compute capability {capability}) has no sparse Tensor Cores; {fix}"
    return None


def _options(options: Mapping[str, Any] | None) -> Options:
    return read_options("torch_cuda", Options, options)


def _no_target(target: Target | None) -> None:
    if target:
        raise UsageError(
            "the torch_cuda backend builds for the machine it runs on; leave out the target"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


BACKEND = TorchCudaBackend()
