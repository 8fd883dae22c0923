"""fp16 overflows at 65504: what leaves it is found, named, kept in fp32, and then right again.

onnxruntime computes fp16 graphs in fp32 on a CPU, so that nothing overflows there. What a GPU would
give is computed with onnx's reference evaluator, which rounds every result to its type.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from export import tracing
from export.backends import load_backend
from export.graph import open_graph
from export.parity import PARITY_TOLERANCE
from export.pipeline import generate
from export.ranges import RANGES, Ranges, record_ranges
from export.specs import COMPONENTS, component_spec, make_inputs
from export.to_onnx import MODEL, export_bundle
from export.torch_module import torch_module
from export.verify import verify_bundle
from export.weight_map import DATA, WEIGHT_MAP
from sdcompress.bundle import Bundle, SourceRecord, seal
from sdcompress.commands import cli
from sdcompress.errors import UsageError, VerificationError
from sdcompress.evaluation.images import generate_from_weights, psnr
from sdcompress.results import Check, VerifyReport
from tests.tiny_sd import make_tiny_sd

CONV = "mid_block.resnets.0.conv1"
CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
PROMPTS = ["a red cat"]
SAMPLING: dict[str, Any] = {"steps": 2, "guidance": 7.5}
State = dict[str, torch.Tensor]


def source_of(directory: Path) -> Bundle:
    return Bundle.of_source(directory, SourceRecord(id=directory.name, kind="directory"))


def edited(directory: Path, file: str, edit: Callable[[State], None], **configs: Any) -> Bundle:
    """The tiny pipeline with other weights."""
    make_tiny_sd(directory, **configs)
    state = load_file(directory / file)
    edit(state)
    save_file(state, directory / file)
    return source_of(directory)


def make_hot(state: State) -> None:
    """The norm behind this convolution takes its numbers back to where they were."""
    state[f"{CONV}.weight"] *= 1e5


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model one layer of which gives numbers beyond fp16."""
    return edited(tmp_path_factory.mktemp("models") / "hot", UNET, make_hot)


@pytest.fixture(scope="module")
def ranges(hot: Bundle) -> Ranges:
    return record_ranges(hot, prompts=PROMPTS, **SAMPLING)


@pytest.fixture(scope="module")
def plain(hot: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(hot, tmp_path_factory.mktemp("onnx") / "plain")


@pytest.fixture(scope="module")
def kept(hot: Bundle, ranges: Ranges, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(hot, tmp_path_factory.mktemp("onnx") / "kept", keep_fp32=ranges)


def inputs(bundle: Bundle, component: str = "unet", **sizes: int) -> dict[str, Any]:
    config = json.loads((bundle.path / component / "config.json").read_text())
    return make_inputs(component_spec(component, config), config, "fp16", **sizes)


def in_fp16(bundle: Bundle, feeds: dict[str, Any], component: str = "unet") -> Any:
    """The first output when every fp16 result is rounded to fp16."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(str(bundle.path / component / MODEL)).run(None, feeds)[0]


def in_fp32(bundle: Bundle, feeds: dict[str, Any], component: str = "unet") -> Any:
    module = torch_module(open_graph(bundle.path, component), torch.float32)
    tensors = (torch.from_numpy(a) for a in feeds.values())
    with torch.inference_mode():
        return module(*(t.float() if t.is_floating_point() else t for t in tensors)).numpy()


def error(found: Any, expected: Any) -> float:
    difference = found.astype(np.float64) - expected
    return float(np.sqrt(np.square(difference).mean() / np.square(expected).mean()))


def checks(report: VerifyReport) -> dict[str, Check]:
    return {check.name: check for check in report.checks}


def nodes(bundle: Bundle, component: str = "unet") -> list[onnx.NodeProto]:
    model = onnx.load(bundle.path / component / MODEL, load_external_data=False)
    return list(model.graph.node)


# Ranges, and layers kept in fp32.


def test_the_layer_that_leaves_fp16_is_named(ranges: Ranges) -> None:
    beyond = ranges.beyond_fp16()
    assert list(beyond) == ["unet"]
    values = [ranges.values["unet"][name] for name in beyond["unet"]]
    # The convolution, the sum with the time embedding, and the groups that the norm is given.
    assert {v.node: v.layer for v in values} == {
        "node_conv2d_7": CONV,
        "node_add_458": "node_add_458",
        "node_Reshape_334": "node_Reshape_334",
    }
    assert all(65504 < v.largest < 1e6 for v in values)
    (calibration,) = ranges.calibrations
    assert (calibration.prompts, calibration.steps) == (("a red cat",), 2)


def test_every_component_was_watched(ranges: Ranges) -> None:
    """A value of each: the text encoder's embedding, the UNet's first, the decoder's picture."""
    for component, value in zip(COMPONENTS, ("embedding", "conv2d", "sample"), strict=True):
        assert 0 < ranges.values[component][value].largest < 100


def test_ranges_agree_with_torch(hot: Bundle, plain: Bundle, ranges: Ranges) -> None:
    """The largest output of the convolution over the same steps, seen by a hook."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(hot.path)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    layer = pipeline.unet.mid_block.resnets[0].conv1
    layer.register_forward_hook(lambda m, i, out: seen.append(float(out.abs().max())))
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    pipeline(PROMPTS[0], latents=latents, num_inference_steps=2, height=16, width=16)
    assert len(seen) == 2
    assert ranges.values["unet"]["conv2d_7"].largest == pytest.approx(max(seen), rel=5e-3)


def test_plain_fp16_overflows_and_the_kept_layer_does_not(plain: Bundle, kept: Bundle) -> None:
    feeds = inputs(plain)
    assert not np.isfinite(in_fp16(plain, feeds)).all()
    found = in_fp16(kept, feeds)
    assert found.dtype == np.float16
    assert error(found, in_fp32(plain, feeds)) <= PARITY_TOLERANCE["fp16"]


def test_a_graph_with_layers_in_fp32_is_known_the_second_time(
    hot: Bundle, kept: Bundle, ranges: Ranges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "in_fp32", None)
    again = export_bundle(hot, tmp_path / "again", keep_fp32=ranges)
    assert again.digest == kept.digest


def test_nothing_else_changes(plain: Bundle, kept: Bundle) -> None:
    details = kept.manifest.details
    assert details["kept_fp32"] == {
        "unet": [CONV, "node_add_458", "node_InstanceNormalization_341"]
    }
    assert details["fp32_products"] == {"unet": ["node_conv2d_7"]}
    assert details["upcast_attention"] is False
    changed = {
        name
        for name, record in kept.manifest.files.items()
        if plain.manifest.files.get(name) != record
    }
    assert changed == {f"unet/{MODEL}", RANGES}
    before = {node.name: node for node in nodes(plain)}
    added = [node for node in nodes(kept) if before.get(node.name) != node]
    assert sorted(node.op_type for node in added) == sorted(
        # up: the input, weight and bias of the convolution, the other half of the sum;
        # down: what comes out of the norm.
        ["Cast"] * 5 + ["Conv", "Add", "InstanceNormalization"]
    )
    assert {node.name for node in nodes(kept)} >= set(before)


def test_ranges_within_fp16_keep_nothing(tiny_source: Bundle, tmp_path: Path) -> None:
    found = record_ranges(tiny_source, prompts=PROMPTS, **SAMPLING)
    assert found.beyond_fp16() == {}
    plain = export_bundle(tiny_source, tmp_path / "plain")
    kept = export_bundle(tiny_source, tmp_path / "kept", keep_fp32=found)
    assert kept.manifest.details == plain.manifest.details
    assert kept.manifest.files == {**plain.manifest.files, RANGES: kept.manifest.files[RANGES]}


def test_a_twin_keeps_the_same_layers(
    kept: Bundle, ranges: Ranges, tiny_source: Bundle, tmp_path: Path
) -> None:
    """Also when only the other one leaves the range."""
    own = record_ranges(tiny_source, prompts=PROMPTS, **SAMPLING)
    twin = export_bundle(tiny_source, tmp_path / "twin", keep_fp32=own.merge(ranges))
    for component in COMPONENTS:
        name = f"{component}/{MODEL}"
        assert twin.manifest.files[name] == kept.manifest.files[name]


def test_verify_accepts_it_and_tells_the_plain_one_apart(plain: Bundle, kept: Bundle) -> None:
    report = verify_bundle(kept.path)
    assert report.passed
    found = checks(report)
    assert "fp32 in the 1 that the manifest names" in found["dtypes"].detail
    assert found["kept"].passed
    assert found["range unet"].tolerance == 65504
    wrong = {c.name: c for c in verify_bundle(plain.path).checks if not c.passed}
    assert list(wrong) == ["range unet"]
    assert CONV in wrong["range unet"].detail
    assert wrong["range unet"].tensors[0] == "unet/conv2d_7"


@pytest.mark.parametrize(
    "products", [{}, {"unet": []}, {"unet": ["node_conv2d_7", "node_conv2d_8"]}]
)
def test_products_in_fp32_that_the_manifest_does_not_name_fail(
    kept: Bundle, tmp_path: Path, products: dict[str, list[str]]
) -> None:
    shutil.copytree(kept.path, tmp_path / "wrong")
    details = {**kept.manifest.details, "fp32_products": products}
    seal(tmp_path / "wrong", kept.manifest.model_copy(update={"details": details}))
    report = verify_bundle(tmp_path / "wrong", parity=False)
    assert [c.name for c in report.checks if not c.passed] == ["dtypes"]


def test_ranges_that_the_graph_ignores_fail(plain: Bundle, kept: Bundle, tmp_path: Path) -> None:
    shutil.copytree(plain.path, tmp_path / "wrong")
    shutil.copyfile(kept.path / RANGES, tmp_path / "wrong" / RANGES)
    seal(tmp_path / "wrong", plain.manifest)
    report = verify_bundle(tmp_path / "wrong", parity=False)
    (check,) = (c for c in report.checks if not c.passed)
    assert (check.name, check.tensors[1]) == ("kept", "unet/conv2d_7")


def test_independent_tools_read_it(kept: Bundle) -> None:
    path = kept.path / "unet" / MODEL
    onnx.checker.check_model(str(path), full_check=True)
    pytest.importorskip("polygraphy")
    run = "from polygraphy.tools import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", run, "inspect", "model", str(path), "--show", "layers"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "node_conv2d_7" in done.stdout


# optimum and diffusers, each by its own deprecations.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_optimum_draws_the_picture_of_the_weights(kept: Bundle, hot: Bundle) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
    from diffusers import StableDiffusionPipeline

    pictures = []
    for loader, path in (
        (optimum.ORTStableDiffusionPipeline, kept.path),
        (StableDiffusionPipeline, hot.path),
    ):
        pipeline = loader.from_pretrained(path)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            PROMPTS[0],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            height=16,
            width=16,
        )
        pictures.append(made.images[0])
    squared = float(np.square(pictures[0] - pictures[1]).mean())
    assert 10 * np.log10(1 / squared) >= 40


def test_tensorrt_builds_it(kept: Bundle) -> None:
    build_with_tensorrt(kept)


def build_with_tensorrt(bundle: Bundle) -> None:
    """Networks of TensorRT-RTX are strongly typed: a graph with types mixed up does not parse."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(bundle.path / "unet" / MODEL))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    shapes = {name: array.shape for name, array in inputs(bundle).items()}
    for i in range(network.num_inputs):
        network.get_input(i).shape = shapes[network.get_input(i).name]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_a_model_that_is_broken_in_fp32_too_is_said(tmp_path: Path) -> None:
    def poison(state: State) -> None:
        state[f"{CONV}.bias"][:] = 60000
        state["mid_block.resnets.0.norm2.weight"][:] = 60000
        state["mid_block.resnets.0.conv2.weight"][:] = 60000
        for name in state:
            if name.startswith("up_blocks") and name.endswith("weight") and "norm" not in name:
                state[name][:] = 60000

    source = edited(tmp_path / "broken", UNET, poison)
    with pytest.raises(VerificationError, match="unet: .* in fp32 too|unet: .* beyond fp16"):
        record_ranges(source, prompts=PROMPTS, **SAMPLING)


# Attention.


def make_attention_hot(state: State) -> None:
    for name in ("to_q", "to_k"):
        state[f"{CROSS}.{name}.weight"] *= 1e3


@pytest.fixture(scope="module")
def hot_attention(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model whose config asks for `upcast_attention`, and which needs it."""
    return edited(
        tmp_path_factory.mktemp("models") / "attention",
        UNET,
        make_attention_hot,
        unet={"upcast_attention": True},
    )


@pytest.fixture(scope="module")
def upcast(hot_attention: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(hot_attention, tmp_path_factory.mktemp("onnx") / "upcast")


@pytest.fixture(scope="module")
def not_upcast(hot_attention: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("onnx") / "not-upcast"
    return export_bundle(hot_attention, out, upcast_attention="off")


def alike(bundle: Bundle) -> dict[str, Any]:
    """Inputs whose context is one token again and again: all its scores are equal, however large,
    and no rounding tips a softmax over."""
    feeds = inputs(bundle)
    feeds["encoder_hidden_states"][:] = feeds["encoder_hidden_states"][:, :1]
    return feeds


def test_auto_upcasts_where_the_config_asks_for_it(
    upcast: Bundle, not_upcast: Bundle, plain: Bundle
) -> None:
    assert upcast.manifest.details["upcast_attention"] is True
    assert upcast.manifest.details["kept_fp32"] == {}
    assert not_upcast.manifest.details["upcast_attention"] is False
    assert plain.manifest.details["upcast_attention"] is False
    for component in ("text_encoder", "vae_decoder"):
        name = f"{component}/{MODEL}"
        assert upcast.manifest.files[name] == plain.manifest.files[name]
    for name in (f"unet/{MODEL}", f"unet/{WEIGHT_MAP}"):  # the config itself changes no graph
        assert not_upcast.manifest.files[name] == plain.manifest.files[name]
    assert upcast.manifest.files[f"unet/{DATA}"] == not_upcast.manifest.files[f"unet/{DATA}"]


def test_scores_and_softmax_are_fp32_and_nothing_else_is(upcast: Bundle) -> None:
    model = onnx.load(upcast.path / "unet" / MODEL, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    fp32 = {n.name for n in graph.node if types.get(n.output[0]) == onnx.TensorProto.FLOAT}
    makers = {name: node for node in graph.node for name in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 8
    products = [makers[node.input[0]] for node in softmaxes]
    assert {node.op_type for node in products} == {"MatMul"}
    assert {node.name for node in (*softmaxes, *products)} <= fp32
    details = upcast.manifest.details
    assert details["fp32_products"] == {"unet": [node.name for node in products]}
    in_products = [n for n in graph.node if n.op_type in {"MatMul", "Gemm", "Conv"}]
    assert {n.name for n in in_products} & fp32 == {n.name for n in products}


def test_upcast_attention_is_what_diffusers_computes(
    upcast: Bundle, not_upcast: Bundle, hot_attention: Bundle
) -> None:
    """Only diffusers' classic processor honours `upcast_attention`; here it runs in real fp16."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel.from_pretrained(hot_attention.path / "unet").half()
    feeds = alike(upcast)
    sample, timestep, context = (torch.from_numpy(a) for a in feeds.values())
    unet.set_attn_processor(AttnProcessor())
    with torch.inference_mode():
        classic = unet(sample, timestep, context).sample.numpy()
    found = in_fp16(upcast, feeds)
    assert not np.isfinite(in_fp16(not_upcast, feeds)).all()
    assert np.isfinite(classic).all()
    assert error(found, in_fp32(upcast, feeds)) <= PARITY_TOLERANCE["fp16"]
    assert error(found, classic.astype(np.float64)) <= PARITY_TOLERANCE["fp16"]


def test_verify_and_tensorrt_accept_upcast_attention(upcast: Bundle) -> None:
    report = checks(verify_bundle(upcast.path))
    assert {"dtypes", "graph", "range unet"} <= set(report)
    assert all(report[name].passed for name in ("dtypes", "graph", "range unet"))
    assert "fp32 in the 8 that the manifest names" in report["dtypes"].detail
    build_with_tensorrt(upcast)


def test_on_upcasts_any_model_and_fp32_needs_none(tiny_source: Bundle, tmp_path: Path) -> None:
    on = export_bundle(tiny_source, tmp_path / "on", upcast_attention="on")
    assert len(on.manifest.details["fp32_products"]["unet"]) == 8
    assert verify_bundle(on.path).passed
    fp32 = export_bundle(
        tiny_source, tmp_path / "fp32", dtype="fp32", upcast_attention="on", components=["unet"]
    )
    assert fp32.manifest.details["upcast_attention"] is False
    assert fp32.manifest.details["fp32_products"] == {}


# Models of other kinds: v-prediction, and distilled ones that take few steps without guidance.

KINDS = {
    "v-prediction": ({"prediction_type": "v_prediction"}, {"steps": 3, "guidance": 5.0}),
    "turbo": (
        {
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "epsilon",
            "timestep_spacing": "trailing",
        },
        {"steps": 1, "guidance": 0.0},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_goes_all_the_way(kind: str, tmp_path: Path) -> None:
    """The pictures of an fp16 graph with layers in fp32 are diffusers', to 40 dB or better."""
    scheduler, sampling = KINDS[kind]
    source = edited(tmp_path / kind, UNET, make_hot)
    file = source.path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **scheduler}))
    if "_class_name" in scheduler:
        index = source.path / "model_index.json"
        named = {"scheduler": ["diffusers", scheduler["_class_name"]]}
        index.write_text(json.dumps({**json.loads(index.read_text()), **named}))
    source = source_of(source.path)
    ranges = record_ranges(source, prompts=PROMPTS, **sampling)
    onnx_bundle = export_bundle(source, tmp_path / "onnx", keep_fp32=ranges)
    assert onnx_bundle.manifest.details["kept_fp32"]["unet"][0] == CONV
    engine = load_backend("onnxruntime").build(
        onnx_bundle, tmp_path / "engine", options={"provider": "cpu"}
    )
    (ours,) = generate(engine.path, PROMPTS, [3], **sampling)
    (theirs,) = generate_from_weights(source.path, PROMPTS, [3], **sampling)
    assert np.asarray(theirs).std() > 10  # a picture, not a grey area
    assert (psnr(ours, theirs) or 100) >= 40


# Pictures.


def test_black_pictures_are_refused(tmp_path: Path) -> None:
    def blacken(state: State) -> None:
        state["decoder.conv_out.weight"][:] = 0
        state["decoder.conv_out.bias"][:] = -100

    source = edited(tmp_path / "black", VAE, blacken)
    engine = load_backend("onnxruntime").build(
        export_bundle(source, tmp_path / "onnx"), tmp_path / "engine", options={"provider": "cpu"}
    )
    for make, path in ((generate, engine.path), (generate_from_weights, source.path)):
        with pytest.raises(VerificationError, match="black all over.*--upcast-attention on"):
            make(path, PROMPTS, [0], steps=1)


# The command.


def invoke(*args: object) -> Any:
    return CliRunner().invoke(cli, [str(a) for a in args], standalone_mode=False)


def test_the_command_calibrates_names_and_hands_on(hot: Bundle, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    prompt = ("--prompt", PROMPTS[0], "--steps", 2)
    done = invoke("export", hot.path, "-o", first, "--calibrate", 1, *prompt)
    assert done.exception is None
    assert f"unet: 3 layers in fp32, beyond fp16's range:\n  {CONV}\n" in done.output
    recorded = Ranges.read(first / RANGES)
    assert recorded.calibrations[0].prompts == ("a red cat",)
    assert (recorded.calibrations[0].steps, recorded.calibrations[0].guidance) == (2, 7.5)
    done = invoke("export", hot.path, "-o", second, "--keep-fp32", first / RANGES, "--json")
    printed = json.loads(done.stdout)
    assert printed["kept_fp32"]["unet"][0] == CONV
    assert printed["upcast_attention"] is False
    assert Bundle.open(second).manifest.files == Bundle.open(first).manifest.files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "fp32", "--calibrate", "1"), "fp32 has range enough"),
        (("--dtype", "fp32", "--prompt", "a cat"), "fp32 has range enough"),
        (("--dtype", "fp32", "--keep-fp32", "ranges.json"), "fp32 has range enough"),
        (("--guidance", "0"), "are for --calibrate"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tiny_sd: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = invoke("export", tiny_sd, "-o", tmp_path / "out", *arguments)
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_ranges_of_another_architecture_are_refused(ranges: Ranges, tmp_path: Path) -> None:
    other = make_tiny_sd(tmp_path / "other", text_encoder={"num_hidden_layers": 1})
    with pytest.raises(UsageError, match="text_encoder: expected ranges of this graph"):
        export_bundle(source_of(other), tmp_path / "out", keep_fp32=ranges)
    assert not (tmp_path / "out").exists()


def test_help_names_the_options() -> None:
    with click.Context(cli) as context:
        text = cli.get_command(context, "export").get_help(context)
    for option in ("--upcast-attention", "--calibrate", "--keep-fp32"):
        assert option in text
