"""What the widths of a component's blocks cost on this machine: model + backend → latency table.

    seconds = of the whole dense component - Σ over its blocks (at full width - at their width)

Blocks are taken out of the component and timed at several widths, in turn, on inputs of the shapes
they have inside it; the whole is timed in turn with them. A budget of latency adds the parts up
(`sdcompress.shrink`).
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.backends import Runner, load_backend, onnxruntime, torch_cuda
from export.bench import environment
from export.pipeline import Geometry
from export.specs import MODEL_OF, DTypeName, Sizes, canonical_key, component_spec, make_inputs
from export.to_onnx import export_bundle
from export.torch_module import run_on_meta
from export.tracing import TORCH_DTYPES, architecture, parameter_names, trace
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_catalog, read_config
from sdcompress.errors import UsageError
from sdcompress.latency import LatencyTable
from sdcompress.measure import percentile
from sdcompress.models.modules import narrow
from sdcompress.structure import Block, find_blocks

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)  # of the full width, which is measured as well
MULTIPLE = 8  # of the widths measured, but for the narrowest there is
MOST_ROUNDS = 50
LOW = 25  # the percentile of a figure's rounds that counts: what else a machine does only adds
# Threads of a session that has run spin for 50 ms, and would take the cores from the next.
QUIET = {"session.force_spinning_stop": "1"}
ROOM = 2 << 30  # bytes of weights that are held at a time, beside those of the whole
SLOW = 0.1  # seconds from which on making room for the first time is no great part of a run
Run = Callable[[], float]  # runs once and tells the seconds
Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def _silent(what: str, done: int, total: int) -> None:
    pass


def check(backend: str, options: Mapping[str, Any]) -> None:
    """Find out before any slow work whether latencies can be measured here.

    Raises:
        UsageError: the backend builds its engines ahead of time or does not run here, or an option
            is not known.
    """
    chosen = load_backend(backend)
    if backend not in _READY:
        raise UsageError(
            f"{backend}: builds a component as a whole and cannot time its blocks; measure with "
            f"{' or '.join(_READY)}, or take a budget of macs"
        )
    chosen.check(options)
    if why := chosen.available():
        raise UsageError(f"{backend}: cannot run here: {why}")


def measure_latency(
    source: Bundle,
    component: str,
    *,
    backend: str = "onnxruntime",
    options: Mapping[str, Any] | None = None,
    sizes: Sizes | None = None,
    dtype: DTypeName = "fp32",
    rounds: int = 5,
    budget: float = 30.0,
    progress: Progress = _silent,
) -> LatencyTable:
    """Time the blocks of a component, and all of it, as `backend` runs them with these options.

    Blocks that are alike are measured once, as many at a time as memory has room for. In each of at
    least `rounds` everything has its turn; fast components get more of them, about `budget` seconds
    in all. The temporary directory (TMPDIR) must have room for the component twice. `progress`
    counts kinds of blocks.

    Raises:
        UsageError: see `check`; or the component has no blocks.
    """
    check(backend, options or {})
    sizes, (exported,) = sizes or Sizes(), (c for c, m in MODEL_OF.items() if m == component)
    config = read_config(source.path / component)
    blocks = find_blocks(component, read_catalog(source.path).shapes(component), config)
    if not blocks:
        raise UsageError(f"{component}: has no blocks that could become narrower; take another")
    free = _free(source, sizes, exported)
    feeds = make_inputs(component_spec(exported, config), config, dtype, **free)
    kinds = _kinds(exported, config, blocks, free)
    shares = {b.name: dict.fromkeys((b.unit, b.width), 0.0) for b in blocks}  # if never run
    done, wholes = 0, list[float]()
    progress("measuring blocks", done, len(kinds))
    with _whole(source, exported, dtype, backend, options or {}, sizes) as (runner, details):
        whole = partial(_seconds, partial(runner.infer, feeds), lambda: runner.gpu_milliseconds)
        of_one = _expected(whole)
        for group in _groups(kinds, dtype):
            with ExitStack() as stack:
                runs = []
                for kind in group:
                    runs.append(
                        stack.enter_context(_READY[backend](kind, dtype, details, exported))
                    )
                    progress("measuring blocks", done := done + 1, len(kinds))
                turns = iter(_in_turn(whole, of_one, runs, rounds, budget))
            for kind in group:
                of_widths = {}
                for width, turn in zip(kind.widths, turns, strict=False):
                    of_whole, own = (percentile(one, LOW) for one in zip(*turn, strict=True))
                    of_widths[width] = own / of_whole
                    wholes.append(of_whole)
                shares |= dict.fromkeys(kind.names, of_widths)
    total, here = percentile(wholes, 50), environment()
    return LatencyTable(
        component=component,
        machine=f"{here.accelerator or here.processor}, {here.cores} cores",
        backend=backend,
        options=details["options"],
        shapes={name: array.shape for name, array in feeds.items()},
        rounds=len(turn),
        total=total,
        blocks={
            name: {width: share * total for width, share in widths.items()}
            for name, widths in shares.items()
        },
    )


def _free(source: Bundle, sizes: Sizes, exported: str) -> dict[str, int]:
    """The sizes of the inputs that the config leaves open."""
    _, height, width = Geometry.read(source.path, "vae").latent_shape(sizes.height, sizes.width)
    tokens = int(read_config(source.path / "text_encoder")["max_position_embeddings"])
    return {
        "batch": sizes.batch(exported),
        "height": height,
        "width": width,
        "tokens": tokens,
    }


# What is measured.


@dataclass
class _Kind:
    """Blocks that are alike: one of them, without weights, and what it is called with."""

    block: Block
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: list[str] = field(default_factory=list)

    @property
    def widths(self) -> list[int]:
        """All of it, the shares of it that can be had in multiples, and the narrowest."""
        block, choices = self.block, self.block.choices(MULTIPLE)
        shares = (min(choices, key=lambda n: abs(n - s * block.units)) for s in SHARES)
        return [n * block.unit for n in sorted({block.units, *shares, 1}, reverse=True)]

    def parts(self, dtype: DTypeName) -> list[nn.Module]:
        return [self.part(width, dtype) for width in self.widths]

    def part(self, width: int, dtype: DTypeName) -> nn.Module:
        """The block at this width, with seeded weights, taking `inputs` one after the other."""
        alone = nn.ModuleDict({"block": copy.deepcopy(self.module)})
        narrow(alone, {"block": width})
        block = alone["block"].to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for weight in block.parameters():
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
        return _Part(block, self.args, self.kwargs).to(TORCH_DTYPES[dtype]).eval()

    def inputs(self, dtype: DTypeName) -> list[Tensor]:
        """Seeded normal numbers of the shapes the block is given."""
        generator = torch.Generator().manual_seed(1)
        given = filter(torch.is_tensor, (*self.args, *self.kwargs.values()))
        return [
            torch.randn(tensor.shape, generator=generator).to(
                TORCH_DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
            )
            for tensor in given
        ]


class _Part(nn.Module):
    """A block that takes its tensors one after the other; whatever else it is called with stays."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.block = block
        self.args = [None if torch.is_tensor(v) else (v,) for v in args]
        self.kwargs = {k: None if torch.is_tensor(v) else (v,) for k, v in kwargs.items()}

    def forward(self, *tensors: Tensor) -> Tensor:
        rest = list(tensors)
        args = [rest.pop(0) if fixed is None else fixed[0] for fixed in self.args]
        kwargs = {k: rest.pop(0) if f is None else f[0] for k, f in self.kwargs.items()}
        out = self.block(*args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


class _Parts(nn.Module):
    """Several side by side, on the same inputs."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(*tensors) for part in self.parts)


def _groups(kinds: Sequence[_Kind], dtype: DTypeName) -> Iterator[list[_Kind]]:
    """The kinds, as many at a time as there is room for their weights."""
    group, held = list[_Kind](), 0.0
    for kind in kinds:
        numbers = sum(weight.numel() for weight in kind.module.parameters())
        full = numbers * TORCH_DTYPES[dtype].itemsize
        nbytes = full * sum(kind.widths) / kind.block.width
        if group and held + nbytes > ROOM:
            yield group
            group, held = [], 0.0
        group.append(kind)
        held += nbytes
    yield group


def _kinds(
    exported: str, config: Mapping[str, Any], blocks: Sequence[Block], free: Mapping[str, int]
) -> list[_Kind]:
    """The blocks that run, by what they are; shapes alone are sent through the component."""
    module = architecture(exported, config).to("meta")
    names = parameter_names(exported, module)
    kinds: dict[str, _Kind] = {}

    def see(block: Block, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [v.shape if torch.is_tensor(v) else v for v in (*args, *kwargs.values())]
        kind = _Kind(block, part, args, kwargs)
        kinds.setdefault(f"{part} {block.unit} {given}", kind).names.append(block.name)

    hooks = []
    for block in blocks:
        within = block.consumer.removeprefix(block.name)
        if name := names.get(canonical_key(exported, block.consumer)):  # a VAE's encoder is none
            part = module.get_submodule(name.removesuffix(within))
            hook = part.register_forward_pre_hook(partial(see, block), with_kwargs=True)
            hooks.append(hook)
    run_on_meta(module, exported, config, **free)
    for hook in hooks:
        hook.remove()
    return list(kinds.values())


# What runs it.


@contextmanager
def _whole(
    source: Bundle,
    exported: str,
    dtype: DTypeName,
    backend: str,
    options: Mapping[str, Any],
    sizes: Sizes,
) -> Iterator[tuple[Runner, Mapping[str, Any]]]:
    """The dense component as an engine of its own, loaded; and what the engine's manifest says."""
    chosen = load_backend(backend)
    with tempfile.TemporaryDirectory(prefix="sdcompress-") as folder:
        onnx = export_bundle(source, Path(folder) / "onnx", dtype=dtype, components=[exported])
        engine = chosen.build(onnx, Path(folder) / "engine", sizes=sizes, options=options)
        details = engine.manifest.details
        runner = chosen.open(engine.path, exported, details)
        if isinstance(runner, onnxruntime.OnnxRuntimeRunner):
            runner.settings = QUIET
        with runner:
            yield runner, details


@contextmanager
def _onnxruntime(
    kind: _Kind, dtype: DTypeName, details: Mapping[str, Any], exported: str
) -> Iterator[list[Run]]:
    """A session for each width."""
    inputs = kind.inputs(dtype)
    names = [f"input_{i}" for i in range(len(inputs))]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    options = onnxruntime.Options.model_validate({**details["options"], "trt_engine_cache": False})
    settings = {**QUIET, **onnxruntime.shared_memory()}
    with tempfile.TemporaryDirectory(prefix="sdcompress-") as folder, ExitStack() as stack:
        runs: list[Run] = []
        for file in _write_parts(kind.parts(dtype), inputs, names, Path(folder)):
            session = onnxruntime.OnnxRuntimeRunner(file, options, details["providers"][exported])
            session.settings = settings
            runner = stack.enter_context(session)
            runs.append(partial(_seconds, partial(runner.infer, feeds)))
        yield runs


def _write_parts(
    parts: Sequence[nn.Module], inputs: Sequence[Tensor], names: Sequence[str], folder: Path
) -> list[Path]:
    """A graph of each; all are traced at once, which takes little longer than one."""
    traced, files = trace(_Parts(parts), inputs, input_names=names), []
    for i, output in enumerate(traced.graph.outputs):
        graph = ir.convenience.extract(traced.graph, traced.graph.inputs, [output])
        files.append(folder / f"{i}.onnx")
        model = ir.Model(graph, ir_version=traced.ir_version)
        ir.save(model, files[-1], external_data=f"{i}.data")
    return files


@contextmanager
def _torch_cuda(
    kind: _Kind,
    dtype: DTypeName,
    details: Mapping[str, Any],
    exported: str,
    device: str = "cuda",
) -> Iterator[list[Run]]:
    """The modules themselves, in a CUDA graph where the component runs in one."""
    options = torch_cuda.Options.model_validate(details["options"])
    inputs, runs = kind.inputs(dtype), list[Run]()
    with torch.inference_mode():
        for module in kind.parts(dtype):
            placed = torch_cuda.place(module, device, options)
            program = torch_cuda.Program(placed, inputs, device, options)
            clock = partial(getattr, program, "milliseconds")
            runs.append(partial(_seconds, partial(program.run, inputs), clock))
        yield runs


_READY = {"onnxruntime": _onnxruntime, "torch_cuda": _torch_cuda}


def _seconds(
    run: Callable[[], object], milliseconds: Callable[[], float | None] = lambda: None
) -> float:
    """Of one run, by the accelerator's clock if it has told one."""
    start = time.perf_counter()
    run()
    taken, told = time.perf_counter() - start, milliseconds()
    return taken if told is None else told / 1000


def _in_turn(
    whole: Run, of_one: float, kinds: Sequence[Sequence[Run]], rounds: int, budget: float
) -> list[list[tuple[float, float]]]:
    """Of each run of these kinds, one kind after the other, and in every round: the seconds that
    the whole took before it, of which one run takes about `of_one`, and its own.

    Caches hold what they hold within the component, where a block has just been given its inputs,
    and used its weights a whole run ago: it runs once before the whole, and the last of its kind,
    the narrowest, once behind it. A whole that is slow hardly lives on caches, and runs in the
    first and in the last round.
    """
    runs = [(run, kind[-1]) for kind in kinds for run in kind]
    fast, order, shuffle = of_one < SLOW, list(range(len(runs))), random.Random(0).shuffle
    each = {run: _expected(run) for run, _ in runs}
    if fast:
        a_round = sum(of_one + 2 * each[run] + each[last] for run, last in runs)
        rounds = max(rounds, min(MOST_ROUNDS, int(budget / a_round)))
    turns: list[list[tuple[float, float]]] = [[] for _ in runs]
    for number in range(rounds):
        shuffle(order)
        if not fast and number in (0, rounds - 1):
            of_whole = whole()
        for i in order:
            run, last = runs[i]
            if fast:
                run()
                of_whole = whole()
                last()
            turns[i].append((of_whole, run()))
    return turns


def _expected(run: Run) -> float:
    """About how many seconds a run takes; the first makes room for what it computes."""
    first = run()
    return first if first > SLOW else run()
