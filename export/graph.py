"""An exported component, opened safely: graph, weight map, and the weights on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from export.specs import MODEL_OF
from export.to_onnx import MODEL
from export.weight_map import Entry, WeightMap
from sdcompress.bundle import Bundle
from sdcompress.catalog import read_config
from sdcompress.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

OF_ONNX_FILES = ("onnxruntime", "torch_cuda")  # the backends whose engines are the ONNX files


@dataclass(frozen=True)
class Graph:
    """An exported component, opened: its graph without weights, its map, its data on disk."""

    component: str
    directory: Path
    config: dict[str, Any]
    proto: onnx.ModelProto
    weight_map: WeightMap
    data: dict[str, np.memmap[Any, Any]]  # location → bytes

    @property
    def model(self) -> str:
        return MODEL_OF[self.component]

    def weights(self) -> Iterator[tuple[onnx.TensorProto, Entry]]:
        """Every initializer in the map, and what the map says about it."""
        for tensor in self.proto.graph.initializer:
            if entry := self.weight_map.initializers.get(tensor.name):
                yield tensor, entry

    def read(self, tensor: onnx.TensorProto) -> Tensor:
        """A weight in the state dict's layout, still backed by the file."""
        import torch

        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = external(tensor)
            start = int(facts.get("offset", 0))
            array = self.data[facts["location"]][start : start + _nbytes(tensor)].view(dtype)
        else:
            array = np.array(onnx.numpy_helper.to_array(tensor))  # a copy: torch wants it writable
        entry = self.weight_map.initializers[tensor.name]
        return torch.from_numpy(entry.to_key(array.reshape(tuple(tensor.dims))))

    def session(self, model: onnx.ModelProto | None = None) -> Any:
        """An onnxruntime session on the CPU, of this graph or of a changed one with its weights.

        Raises:
            InputError: onnxruntime is not installed or cannot open the graph.
        """
        try:
            import onnxruntime
        except ImportError as e:
            raise InputError(
                "running a graph needs onnxruntime, which is not installed; "
                "`pip install sdcompress[cpu]`"
            ) from e
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # The order of the file: what `watch` puts behind a node then runs while its value lives.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.directory)
        )
        source = str(self.directory / MODEL) if model is None else model.SerializeToString()
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's own exceptions share no base class
            raise InputError(
                f"{self.directory / MODEL}: onnxruntime cannot open it "
                f"({str(e).splitlines()[0]}); export the model again"
            ) from e


def open_graphs(bundle: Bundle) -> list[Graph]:
    """Open every exported component of a bundle; none, if it is a bundle of weights.

    Raises:
        InputError: a graph is corrupt, or its external data is missing, truncated or outside.
    """
    stage, details = bundle.manifest.stage, bundle.manifest.details
    if stage != "onnx" and not (stage == "engine" and details.get("backend") in OF_ONNX_FILES):
        return []
    return [open_graph(bundle.path, c) for c in details.get("components", ())]


def open_graph(bundle: Path, component: str) -> Graph:
    """Open one component of a directory laid out like an ONNX bundle; raises as `open_graphs`."""
    directory = bundle / component
    file = directory / MODEL
    try:
        proto = onnx.load(str(file), load_external_data=False)
    except (OSError, DecodeError) as e:
        raise InputError(
            f"{file}: expected an ONNX graph, found none that can be read; export the model again"
        ) from e
    data = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = _checked_location(directory, tensor)
            if location not in data:
                # Copy on write, so that torch may take the array; nothing ever writes to it.
                data[location] = np.memmap(directory / location, np.uint8, "c")
    config = read_config(directory)
    return Graph(component, directory, config, proto, WeightMap.read(directory), data)


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _nbytes(tensor: onnx.TensorProto) -> int:
    itemsize = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return int(math.prod(tensor.dims)) * itemsize


def _checked_location(directory: Path, tensor: onnx.TensorProto) -> str:
    """The name of a tensor's data file, after making sure that it may and can be read."""
    facts = external(tensor)
    location = facts.get("location", "")
    file = (directory / location).resolve()
    fix = "export the model again"
    if not location or file.parent != directory.resolve():
        raise InputError(
            f"{directory / MODEL}: {tensor.name} points to {location!r}, expected external data "
            f"in the same directory; {fix}"
        )
    if not file.is_file():
        raise InputError(f"{file}: expected the weights of {MODEL}, found no file; {fix}")
    try:
        start, length = int(facts.get("offset", 0)), int(facts.get("length", _nbytes(tensor)))
    except ValueError:
        start, length = -1, -1
    if start < 0 or length != _nbytes(tensor):
        raise InputError(
            f"{directory / MODEL}: {tensor.name} has an impossible place in {location}; {fix}"
        )
    if start + length > file.stat().st_size:
        raise InputError(
            f"{file}: expected at least {start + length} bytes for {tensor.name}, found "
            f"{file.stat().st_size}; it is truncated, {fix}"
        )
    return location


def record_dtype(tensor: onnx.TensorProto) -> str:
    """The type of a tensor as records name it."""
    name = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).name
    return {"float16": "F16", "float32": "F32"}.get(name, name)
