"""Which values of an fp16 graph are computed in fp32, and how the graph says so.

The graph is strongly typed: what is computed in fp32 is so by casts around it, and every backend
does the same. Weights stay fp16 in the data file and are cast up in the graph, so that neither the
file nor the weight map depends on what is kept in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx

from export.specs import NUMPY_DTYPES, DTypeName

FP16, FP32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
# These hand on the very numbers they are given.
MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity"})
BOUNDED = frozenset({"Softmax", "Sigmoid", "Erf", "Tanh", "Sin", "Cos"})  # between -1 and 1


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value of the graph, as ONNX numbers them."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=False).graph
    types = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def wrong_product_dtypes(
    model: onnx.ModelProto, dtype: DTypeName, fp32: Collection[str] = ()
) -> list[str]:
    """The inputs of matrix products and convolutions that are not of `dtype`.

    Those of the nodes named in `fp32` must be fp32 instead, and each of these must be there.
    """
    usual = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(NUMPY_DTYPES[dtype]))
    types = element_types(model)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    missing = sorted(set(fp32) - {node.name for node in products})
    return [f"{name}: missing" for name in missing] + [
        f"{node.name}: {name}"
        for node in products
        for name in node.input
        if name and types.get(name) != (FP32 if node.name in fp32 else usual)
    ]


def fp32_products(model: onnx.ModelProto) -> list[str]:
    """The names of the matrix products and convolutions that give fp32, in graph order."""
    types = element_types(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and types.get(node.output[0]) == FP32
    ]


def changing_values(model: onnx.ModelProto) -> list[str]:
    """The fp16 results that depend on inputs or weights, in graph order.

    Constants of the architecture, such as the mask of the text encoder, are not among them: they
    hold what fp16 can hold, up to minus infinity, on purpose.
    """
    weights = {t.name for t in model.graph.initializer if t.external_data}
    depends = weights | {value.name for value in model.graph.input}
    types = element_types(model)
    found = []
    for node in model.graph.node:
        if node.op_type != "Shape" and not depends.isdisjoint(node.input):
            depends.update(node.output)
            found += [name for name in node.output if types.get(name) == FP16]
    return found


def attention_scores(model: onnx.ModelProto) -> set[str]:
    """The fp16 values between queries and keys, as they come from their layers, and each softmax.

    Kept in fp32, they are what diffusers' `upcast_attention` computes in fp32.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    changing = set(changing_values(model))
    found: set[str] = set()

    def walk(value: str, product_passed: bool) -> None:
        maker = makers.get(value)
        if value not in changing or maker is None:
            return
        if maker.op_type == "MatMul" and not product_passed:
            product_passed = True
        elif maker.op_type not in ({"Mul", "Div"} if product_passed else {"Mul", "Div", "Add"}):
            return
        found.add(value)
        for name in maker.input:
            walk(name, product_passed)

    for node in model.graph.node:
        if node.op_type == "Softmax":
            walk(node.input[0], False)
    return found


def touching(model: onnx.ModelProto, values: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes that compute with one of `values` or make it, in graph order."""
    names = set(values)
    return [
        node
        for node in model.graph.node
        if node.op_type != "Shape" and not names.isdisjoint((*node.input, *node.output))
    ]


def keep_in_fp32(model: onnx.ModelProto, values: Collection[str]) -> onnx.ModelProto:
    """A graph in which every node that makes or reads one of `values` computes in fp32.

    Its fp16 inputs are cast up, its results cast down unless they are kept themselves; what passes
    between two such nodes is not rounded on the way. The graph's own inputs and outputs keep their
    types. Without `values` of fp16 the graph comes back as it was.
    """
    types = element_types(model)
    kept = {name for name in values if types.get(name) == FP16}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    outputs = {value.name for value in graph.output}
    constants = {t.name: t for t in graph.initializer if not t.external_data}
    widened = {node.name for node in touching(model, kept)}
    read_as_fp16 = outputs | {
        name for node in graph.node if node.name not in widened for name in node.input
    }
    wide: dict[str, str] = {}  # an fp16 value → the name of the same in fp32
    nodes: list[onnx.NodeProto] = []

    def in_fp32(name: str) -> str:
        while name in types:  # the graph may have kept other values in fp32 before
            name += "_fp32"
        return name

    def cast(name: str, into: str, to: int) -> None:
        label = f"cast_{name}_to_{into}"
        nodes.append(onnx.helper.make_node("Cast", [name], [into], name=label, to=to))

    for node in model.graph.node:
        if node.name not in widened:
            nodes.append(node)
            continue
        for name in _of_type(node.input, types, FP16):
            if name in wide:
                continue
            wide[name] = in_fp32(name)
            if name in constants:
                graph.initializer.append(_constant_in_fp32(constants[name], wide[name]))
            else:
                cast(name, wide[name], FP32)
        made = list(_of_type(node.output, types, FP16))
        for name in made:
            wide[name] = name if name in kept - outputs else in_fp32(name)
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[:] = [wide.get(name, name) for name in node.input]
        changed.output[:] = [wide.get(name, name) for name in node.output]
        for attribute in changed.attribute:
            if made and node.op_type == "Cast" and attribute.name == "to":
                attribute.i = FP32
        nodes.append(changed)
        for name in made:
            if wide[name] != name and name in read_as_fp16:
                cast(wide[name], name, FP16)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for name, tensor in constants.items():
        if name not in used:
            graph.initializer.remove(tensor)
    return result


def _of_type(names: Iterable[str], types: dict[str, int], wanted: int) -> Iterable[str]:
    return (name for name in names if types.get(name) == wanted)


def _constant_in_fp32(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), name)


def watch(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, tuple[str, ...]]]:
    """The fp16 graph computed in fp32 throughout, with the extremes of its values as outputs.

    Also returns each fp16 result that may leave the range → the scalar outputs whose largest
    magnitude is its own. Each is reduced right behind the node that makes it, so that a session
    that keeps this order needs little more memory than the graph itself.
    """
    values = set(changing_values(model))
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    result = keep_in_fp32(model, values)
    interface = {value.name for value in model.graph.output}
    extremes: dict[str, tuple[str, ...]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in result.graph.node:
        nodes.append(node)
        for name in node.output:
            # The graph's outputs stay fp16: each is cast down from its fp32 self.
            watched = node.input[0] if name in interface else name
            maker = makers.get(name)
            if name not in values or maker is None or maker.op_type in BOUNDED:
                continue
            if maker.op_type in MOVES and maker.input[0] in extremes:
                extremes[name] = extremes[maker.input[0]]
                continue
            # A softmax makes nothing of what is far below its largest number: masks may do that.
            masked = readers.get(name) == {"Softmax"}
            extremes[name] = tuple(
                f"{bound}({name})" for bound in (["Max"] if masked else ["Max", "Min"])
            )
            for output in extremes[name]:
                op = f"Reduce{output.partition('(')[0]}"
                nodes.append(
                    onnx.helper.make_node(op, [watched], [output], name=output, keepdims=0)
                )
                result.graph.output.append(onnx.helper.make_tensor_value_info(output, FP32, []))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result, extremes
