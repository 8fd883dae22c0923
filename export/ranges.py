"""The largest number each value of a graph meets while pictures are made: does fp16 hold it?

A number beyond 65504 becomes infinity in fp16, infinity becomes NaN, and NaN is seen as a black
picture. The graph is run in fp32 on real prompts, and what leaves the range is then computed in
fp32 in the exported graph (`export.precision`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.backends import Runner, Tensor
from export.graph import Graph, open_graphs
from export.precision import watch
from export.specs import component_spec
from export.to_onnx import MODEL, export_bundle
from export.weight_map import layer_of
from sdcompress.bundle import Bundle, sha256_file, write_json
from sdcompress.errors import InputError, UsageError, VerificationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RANGES = "ranges.json"
LIMIT = 65504.0  # the largest number of fp16
HEADROOM = 2.0  # other prompts and seeds reach further than the few that were tried


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Value(_Record):
    """One value of a graph: its largest magnitude, the node that makes it, and the layer.

    `layer` is the module whose weight the node reads, or the node again if it reads none.
    """

    largest: float = Field(ge=0, allow_inf_nan=False)
    node: str
    layer: str


class Calibration(_Record):
    """The pictures made to record ranges; picture i uses seed `seed + i`.

    `bundle` is the digest of the weights; `height` and `width` are in pixels, None is the model's.
    """

    bundle: str
    prompts: tuple[str, ...]
    seed: int
    steps: int
    guidance: float
    height: int | None
    width: int | None


class Ranges(_Record):
    """`ranges.json`: component → value of its graph → the largest magnitude it met.

    `graphs` are the digests of the graphs, without anything kept in fp32, whose values these are.
    A value is kept in fp32 if it exceeds `limit / headroom`.
    """

    schema_version: Literal[1] = 1
    limit: float = LIMIT
    headroom: float = Field(default=HEADROOM, ge=1)
    graphs: dict[str, str]
    values: dict[str, dict[str, Value]]
    calibrations: tuple[Calibration, ...]

    @classmethod
    def read(cls, file: Path) -> Ranges:
        """Raises InputError where there are none of this version."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as e:
            raise InputError(
                f"{file}: expected the ranges an export has recorded, found none that can be read; "
                "make them with `sdcompress export --calibrate`"
            ) from e

    def write(self, directory: Path) -> None:
        write_json(directory / RANGES, self.model_dump(mode="json"))

    def merge(self, other: Ranges) -> Ranges:
        """The larger of both for each value: what two models with the same graphs need.

        Raises:
            UsageError: the graphs are not the same.
        """
        for component, digest in other.graphs.items():
            self._same_graph(component, digest)
        values = {
            component: {
                name: max(value, other.values[component][name], key=lambda v: v.largest)
                for name, value in values.items()
            }
            for component, values in self.values.items()
        }
        calibrations = tuple(dict.fromkeys(self.calibrations + other.calibrations))
        return self.model_copy(update={"values": values, "calibrations": calibrations})

    def beside(self, twin: Ranges) -> Ranges:
        """These, merged with the twin's in the components that are the same graph in both.

        What both meet is kept in fp32 in both, so that they remain the same graph. Blocks that
        became narrower make another graph, which keeps what its own numbers need.
        """
        same = {c for c, digest in self.graphs.items() if twin.graphs.get(c) == digest}
        if not same:
            return self
        theirs = twin.model_copy(update={"graphs": {c: twin.graphs[c] for c in same}})
        ours = self.model_copy(update={"values": {c: self.values[c] for c in same}})
        merged = ours.merge(theirs)
        return merged.model_copy(update={"values": {**self.values, **merged.values}})

    def beyond_fp16(self) -> dict[str, list[str]]:
        """Component → the names, sorted, of the values beyond fp16's range less headroom."""
        end = self.limit / self.headroom
        beyond = {
            component: sorted(name for name, value in values.items() if value.largest > end)
            for component, values in self.values.items()
        }
        return {component: names for component, names in beyond.items() if names}

    def kept(self, component: str, digest: str) -> list[str]:
        """The values to keep in fp32 in the component's graph of that digest.

        Raises:
            UsageError: the ranges are those of another graph.
        """
        self._same_graph(component, digest)
        return self.beyond_fp16().get(component, [])

    def _same_graph(self, component: str, digest: str) -> None:
        if self.graphs.get(component) != digest:
            raise UsageError(
                f"{component}: expected ranges of this graph, found those of another architecture "
                "or other versions of the tools; calibrate again"
            )


class Watched(Runner):
    """A component of an fp16 export, computed in fp32, that notes how large its values get.

    `largest` maps the fp16 values of the graph to the largest magnitude of all calls.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._session: Any = None
        self.largest: dict[str, float] = {}

    def load(self) -> None:
        graph = self._graph
        spec, dtype = component_spec(graph.component, graph.config), graph.weight_map.dtype
        self.inputs, self.outputs = (
            {
                t.name: Tensor(
                    np.dtype(t.numpy_dtype(dtype)),
                    tuple(a if isinstance(a, int) else None for a in t.axes),
                )
                for t in tensors
            }
            for tensors in (spec.inputs, spec.outputs)
        )
        model, self._extremes = watch(graph.proto)
        self._session = graph.session(model)

    def close(self) -> None:
        self._session = None

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once.

        Raises:
            VerificationError: a value is NaN or infinite even in fp32, or an output is too large
                for fp16, which nothing inside the graph can change.
        """
        with np.errstate(over="ignore"):  # what becomes infinite here is seen below
            cast = {name: np.asarray(v, self.inputs[name].dtype) for name, v in feeds.items()}
        wanted = list(dict.fromkeys(n for names in self._extremes.values() for n in names))
        found = self._session.run([*self.outputs, *wanted], cast)
        outputs = dict(zip(self.outputs, found, strict=False))
        extreme = dict(zip(wanted, found[len(outputs) :], strict=True))
        for value, names in self._extremes.items():
            met = float(np.max([abs(float(extreme[n])) for n in names]))
            if not np.isfinite(met):
                raise VerificationError(
                    f"{self._graph.component}: {value} is {met} in fp32 too; the weights are "
                    "broken or pruned too far"
                )
            self.largest[value] = max(met, self.largest.get(value, 0.0))
        for name, output in outputs.items():
            if not np.isfinite(output).all():
                raise VerificationError(
                    f"{self._graph.component}: {name} holds NaN, or numbers beyond fp16; export as "
                    "fp32, or prune less"
                )
        return outputs


def record_ranges(
    source: Bundle,
    *,
    prompts: Sequence[str],
    seed: int = 0,
    steps: int = 20,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ranges:
    """Make a picture of each prompt with a bundle of weights, and note how large all values get.

    Everything runs in onnxruntime on the CPU, one component in memory at a time, in the graph that
    an fp16 export has. That graph is written to the temporary directory (TMPDIR) first, which
    must have room for the model in fp16. `progress(done, total)` counts pictures denoised.

    Raises:
        UsageError: a size or a request that makes no picture.
        VerificationError: the model gives NaN or infinity in fp32 too, or its outputs leave fp16.
    """
    from export.pipeline import Geometry, Painter, tokenize
    from sdcompress.evaluation.images import check_request

    check_request(prompts, [seed + i for i in range(len(prompts))], steps)
    shape = Geometry.read(source.path, "vae").latent_shape(height, width)
    with tempfile.TemporaryDirectory(prefix="sdcompress-") as folder:
        onnx = export_bundle(source, Path(folder) / "onnx", dtype="fp16", upcast_attention="off")
        graphs = {graph.component: graph for graph in open_graphs(onnx)}
        encoder, unet, decoder = watched = [Watched(graph) for graph in graphs.values()]
        painter = Painter(onnx.path, steps, guidance)
        negative, *positive = tokenize(onnx.path, ["", *prompts])
        with encoder:
            contexts = [painter.encode(encoder, negative, tokens) for tokens in positive]
        latents = []
        with unet:
            for i, context in enumerate(contexts):
                latents.append(painter.denoise(unet, context, seed + i, shape))
                if progress:
                    progress(i + 1, len(prompts))
        with decoder:
            for one in latents:
                decoder.infer({"latent_sample": one})
        values = {
            component: _described(graph, runner.largest)
            for (component, graph), runner in zip(graphs.items(), watched, strict=True)
        }
        digests = {c: sha256_file(onnx.path / c / MODEL) for c in graphs}
    calibration = Calibration(
        bundle=source.digest,
        prompts=tuple(prompts),
        seed=seed,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
    )
    return Ranges(graphs=digests, values=values, calibrations=(calibration,))


def _described(graph: Graph, largest: Mapping[str, float]) -> dict[str, Value]:
    makers = {name: node for node in graph.proto.graph.node for name in node.output}
    return {
        # Four digits: sums differ in the last ones between machines.
        name: Value(
            largest=float(f"{met:.4g}"),
            node=makers[name].name,
            layer=layer_of(makers[name], graph.weight_map),
        )
        for name, met in largest.items()
    }
