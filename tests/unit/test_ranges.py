"""Ranges, and the graph pass that keeps values in fp32, on a graph one can follow by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.reference import ReferenceEvaluator

from export.precision import (
    attention_scores,
    changing_values,
    element_types,
    fp32_products,
    keep_in_fp32,
    touching,
    watch,
    wrong_product_dtypes,
)
from export.ranges import RANGES, Calibration, Ranges, Value, Watched
from sdcompress.errors import InputError, UsageError, VerificationError

FP16, FP32 = TensorProto.FLOAT16, TensorProto.FLOAT


def initializer(name: str, values: object, *, weight: bool) -> onnx.TensorProto:
    tensor = onnx.numpy_helper.from_array(np.array(values, np.float16), name)
    if weight:
        onnx.external_data_helper.set_external_data(tensor, "model.onnx_data")
    return tensor


def model(*, weights_outside: bool = True) -> onnx.ModelProto:
    """x → times 300 → times w → halved; then a masked softmax over scores. All of it fp16."""
    nodes = [
        make_node("Mul", ["x", "factor"], ["large"], name="mul"),
        make_node("MatMul", ["large", "w"], ["larger"], name="product"),
        make_node("Reshape", ["larger", "shape"], ["moved"], name="reshape"),
        make_node("Mul", ["moved", "tiny"], ["small"], name="norm"),
        make_node("MatMul", ["small", "w"], ["queries"], name="to_q"),
        make_node("Mul", ["queries", "tiny"], ["scaled"], name="scale"),
        make_node("MatMul", ["scaled", "queries"], ["scores"], name="scores"),
        make_node("Add", ["scores", "mask"], ["masked"], name="mask"),
        make_node("Softmax", ["masked"], ["attention"], name="softmax", axis=-1),
        make_node("Add", ["attention", "small"], ["y"], name="sum"),
    ]
    graph = make_graph(
        nodes,
        "graph",
        [make_tensor_value_info("x", FP16, ["batch", 2])],
        [make_tensor_value_info("y", FP16, ["batch", 2])],
        [
            initializer("w", [[2, 0], [0, 2]], weight=weights_outside),
            initializer("factor", 300, weight=False),
            initializer("tiny", 1 / 1024, weight=False),
            initializer("mask", [[0, -65504], [0, 0]], weight=False),
            onnx.numpy_helper.from_array(np.array([-1, 2]), "shape"),
        ],
    )
    return make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=10)


def run(graph: onnx.ModelProto, x: object) -> dict[str, np.ndarray]:
    """In numpy, which rounds every fp16 result to fp16."""
    names = [value.name for value in graph.graph.output]
    with np.errstate(all="ignore"):
        return dict(
            zip(
                names,
                ReferenceEvaluator(graph).run(None, {"x": np.array(x, np.float16)}),
                strict=True,
            )
        )


def lines(graph: onnx.ModelProto) -> list[str]:
    return [f"{n.op_type}({', '.join(n.input)}) → {', '.join(n.output)}" for n in graph.graph.node]


def test_only_what_touches_a_kept_value_changes() -> None:
    kept = keep_in_fp32(model(), ["larger", "moved"])
    assert lines(kept) == [
        "Mul(x, factor) → large",
        "Cast(large) → large_fp32",
        "Cast(w) → w_fp32",
        "MatMul(large_fp32, w_fp32) → larger",
        "Reshape(larger, shape) → moved",
        "Mul(moved, tiny_fp32) → small_fp32",
        "Cast(small_fp32) → small",
        "MatMul(small, w) → queries",
        "Mul(queries, tiny) → scaled",
        "MatMul(scaled, queries) → scores",
        "Add(scores, mask) → masked",
        "Softmax(masked) → attention",
        "Add(attention, small) → y",
    ]
    onnx.checker.check_model(keep_in_fp32(model(weights_outside=False), ["larger"]), True)
    types = element_types(kept)
    assert {types["larger"], types["moved"], types["tiny_fp32"]} == {FP32}
    assert {types["large"], types["small"], types["y"], types["w"]} == {FP16}
    assert fp32_products(kept) == ["product"]
    assert [node.name for node in touching(model(), ["moved"])] == ["reshape", "norm"]


def test_a_value_between_two_such_nodes_is_not_rounded() -> None:
    """`large` is kept on neither side, yet nobody reads it as fp16 any more."""
    kept = keep_in_fp32(model(), ["larger", "x"])
    assert lines(kept)[:4] == [
        "Cast(x) → x_fp32",
        "Mul(x_fp32, factor_fp32) → large_fp32",
        "Cast(w) → w_fp32",
        "MatMul(large_fp32, w_fp32) → larger",
    ]
    assert "factor" not in {t.name for t in kept.graph.initializer}


def test_outputs_stay_fp16_and_names_unique() -> None:
    once = keep_in_fp32(model(weights_outside=False), ["y"])
    assert element_types(once)["y"] == FP16
    twice = keep_in_fp32(once, changing_values(once))
    onnx.checker.check_model(twice, True)
    assert element_types(twice)["y"] == FP16
    names = [name for node in twice.graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_nothing_to_keep_leaves_the_graph_as_it_was() -> None:
    before = model()
    for values in ([], ["no such value"], ["shape"]):
        assert keep_in_fp32(before, values) == before


def test_a_kept_value_no_longer_overflows() -> None:
    plain = model(weights_outside=False)
    x = [[200.0, 1.0], [1.0, 1.0]]  # 200 · 300 · 2 = 120000
    assert not np.isfinite(run(plain, x)["y"]).all()
    found = run(keep_in_fp32(plain, ["larger", "moved"]), x)["y"]
    assert found.dtype == np.float16
    # Row 0: 120000 / 1024 = 117.2, and the mask leaves the softmax its first number only.
    assert found[0].tolist() == pytest.approx([118.2, 0.586], rel=1e-2)


def test_scores_are_found_from_the_scaling_to_the_softmax() -> None:
    assert attention_scores(model()) == {"scaled", "scores", "masked"}


def test_constants_and_shapes_do_not_change() -> None:
    values = changing_values(model())
    assert values[:3] == ["large", "larger", "moved"]
    assert "mask" not in values


def test_the_extremes_of_every_value_come_out() -> None:
    watched, extremes = watch(model(weights_outside=False))
    assert "attention" not in extremes  # a softmax gives nothing beyond 1
    assert extremes["moved"] == extremes["larger"] == ("Max(larger)", "Min(larger)")
    assert extremes["masked"] == ("Max(masked)",)  # the mask is below all on purpose
    order = [node.name for node in watched.graph.node]
    assert order.index("Min(larger)") < order.index("norm")
    found = run(watched, [[200.0, -201.0], [1.0, 1.0]])
    assert found["Max(larger)"] == 120000
    assert found["Min(larger)"] == -120600
    assert found["Max(masked)"] < 1000
    assert found["y"].dtype == np.float16


class FakeGraph:
    """A decoder whose session gives the numbers it is told to give."""

    component, config = "vae_decoder", {"latent_channels": 4, "out_channels": 3}
    weight_map = SimpleNamespace(dtype="fp16")

    def __init__(self) -> None:
        self.proto = model()
        self.told: dict[str, float] = {}

    def session(self, model: onnx.ModelProto) -> Any:
        return self

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert feeds["latent_sample"].dtype == np.float16
        return [np.float32(self.told.get(name, 0)) for name in names]


def test_the_largest_of_all_calls_is_kept() -> None:
    graph = FakeGraph()
    with Watched(graph) as runner:
        for graph.told in ({"Max(large)": 1, "Min(large)": -7}, {"Max(large)": 5}):
            runner.infer({"latent_sample": np.zeros(1)})
    assert runner.largest["large"] == 7
    assert runner.largest["larger"] == runner.largest["moved"] == 0


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_broken_in_fp32_too_ends_the_calibration(number: float) -> None:
    graph = FakeGraph()
    with Watched(graph) as runner:
        graph.told = {"Min(large)": number}
        with pytest.raises(VerificationError, match=f"vae_decoder: large is {number} in fp32 too"):
            runner.infer({"latent_sample": np.zeros(1)})
        graph.told = {"sample": number}
        with pytest.raises(VerificationError, match="sample holds NaN, or numbers beyond fp16"):
            runner.infer({"latent_sample": np.zeros(1)})


def test_products_in_fp32_are_allowed_by_name_only() -> None:
    kept = keep_in_fp32(model(), ["larger"])
    assert wrong_product_dtypes(kept, "fp16", ["product"]) == []
    assert wrong_product_dtypes(kept, "fp16") == ["product: large_fp32", "product: w_fp32"]
    assert wrong_product_dtypes(kept, "fp16", ["product", "to_q"]) == ["to_q: small", "to_q: w"]
    assert wrong_product_dtypes(kept, "fp16", ["product", "gone"]) == ["gone: missing"]


def ranges(digest: str = "abc", **largest: float) -> Ranges:
    return Ranges(
        graphs={"unet": digest},
        values={"unet": {n: Value(largest=v, node="n", layer="l") for n, v in largest.items()}},
        calibrations=(
            Calibration(
                bundle=f"b{sorted(largest.values())}",
                prompts=("a cat",),
                seed=0,
                steps=2,
                guidance=7.5,
                height=None,
                width=None,
            ),
        ),
    )


def test_values_above_half_of_fp16_are_beyond() -> None:
    assert ranges(a=32752.0, b=32753.0, c=1.0, d=1e6).beyond_fp16() == {"unet": ["b", "d"]}
    assert ranges(a=32752.0).beyond_fp16() == {}
    closer = ranges(a=32753.0, b=65505.0).model_copy(update={"headroom": 1.0})
    assert closer.beyond_fp16() == {"unet": ["b"]}


def test_merging_takes_the_larger_of_both() -> None:
    dense, sparse = ranges(a=1e5, b=1.0, c=3.0), ranges(a=2.0, b=2e5, c=3.0)
    merged = dense.merge(sparse)
    assert {name: v.largest for name, v in merged.values["unet"].items()} == {
        "a": 1e5,
        "b": 2e5,
        "c": 3.0,
    }
    assert merged.beyond_fp16() == sparse.merge(dense).beyond_fp16() == {"unet": ["a", "b"]}
    assert merged.calibrations == dense.calibrations + sparse.calibrations
    assert dense.merge(dense) == dense


def test_ranges_of_another_graph_are_refused() -> None:
    with pytest.raises(UsageError, match="unet: expected ranges of this graph"):
        ranges(a=1.0).merge(ranges("other", a=1.0))
    with pytest.raises(UsageError, match="calibrate again"):
        ranges(a=1.0).kept("unet", "other")
    with pytest.raises(UsageError, match="vae_decoder: expected ranges"):
        ranges(a=1.0).kept("vae_decoder", "abc")
    assert ranges(a=1e6).kept("unet", "abc") == ["a"]


def test_ranges_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = ranges(a=1e5, b=0.25)
    written.write(tmp_path)
    assert Ranges.read(tmp_path / RANGES) == written
    assert json.loads((tmp_path / RANGES).read_text())["limit"] == 65504


@pytest.mark.parametrize("text", [None, "{", '{"schema_version": 1}'])
def test_files_that_hold_no_ranges_are_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ranges.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match="--calibrate") as caught:
        Ranges.read(file)
    assert "\n" not in str(caught.value)
