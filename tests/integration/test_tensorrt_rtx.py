"""Real builds with TensorRT-RTX, ahead of time: no GPU is needed to build.

What these tests say of sparsity is what TensorRT-RTX does today: it ignores the flag.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.backends import load_backend
from export.backends.tensorrt import local_gpu
from export.device.builder import Request, run_in_process
from export.device.errors import DeviceError
from export.device.process import command_of
from export.specs import Sizes
from export.targets import load_target
from sdcompress.build_report import BuildReport
from sdcompress.bundle import Bundle
from sdcompress.errors import InputError, UsageError

pytest.importorskip("tensorrt_rtx", reason="pip install 'sdcompress[rtx]'")

ARGV = command_of("builder")
RTX = load_backend("tensorrt_rtx")
TWINS = ("dense", "sparse")
SHAPES = {"sample": (2, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 32, 128)}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """mini-sd2 in fp16, dense and 2:4."""
    from export.to_onnx import export_bundle
    from sdcompress.commands._common import open_model
    from sdcompress.prune import prune
    from sdcompress.recipe import load_recipe

    folder = tmp_path_factory.mktemp("mini")
    source = open_model("mini-sd2")
    pruned = prune(source, load_recipe("sd2-2to4"), folder / "pruned")
    return {
        "dense": export_bundle(source, folder / "dense", dtype="fp16"),
        "sparse": export_bundle(pruned, folder / "sparse", dtype="fp16"),
    }


@pytest.fixture(scope="module")
def engines(onnx: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Both twins for an RTX 4090."""
    folder, target = tmp_path_factory.mktemp("engines"), load_target("rtx-4090")
    return {twin: RTX.build(onnx[twin], folder / twin, target=target) for twin in TWINS}


def report(engine: Bundle) -> BuildReport:
    found = BuildReport.read(engine.path)
    assert found is not None
    return found


def test_engines_are_bundles(engines: dict[str, Bundle], onnx: dict[str, Bundle]) -> None:
    for twin, engine in engines.items():
        engine.check_files()
        assert engine.manifest.parent == onnx[twin].digest
        assert engine.manifest.details["providers"]["unet"].startswith("TensorRT-RTX 1.")
        assert engine.manifest.details["providers"]["unet"].endswith(" SM89")
        assert (engine.path / "tokenizer" / "vocab.json").is_file()
        assert not list(engine.path.rglob("*.onnx*"))


def test_the_twins_are_built_alike(engines: dict[str, Bundle]) -> None:
    dense, sparse = (report(engines[twin]) for twin in TWINS)
    assert dense.options == sparse.options
    assert dense.options["sparse"] == "on"
    assert dense.options["workspace_mb"] == 8192
    for component, part in dense.components.items():
        twin = sparse.components[component]
        assert part.tactics == twin.tactics
        assert part.plan_bytes == twin.plan_bytes
        assert part.ladder == twin.ladder == ()


def test_attention_is_fused(engines: dict[str, Bundle]) -> None:
    """7 transformer blocks of two attentions each in the UNet; one in each layer of the text."""
    parts = report(engines["sparse"]).components
    assert parts["unet"].fused_attention == 14
    assert parts["text_encoder"].fused_attention == 3
    assert parts["vae_decoder"].fused_attention == 0


def test_the_flag_changes_nothing_and_that_is_said(engines: dict[str, Bundle]) -> None:
    sparse = engines["sparse"]
    assert {p.flag_changed_plan for p in report(sparse).components.values()} == {False}
    kernels = sparse.manifest.details["sparse_kernels"]
    assert kernels["used"] == 0
    assert kernels["of"] > 40
    assert kernels["how"] == (
        "TensorRT-RTX ignores the flag ahead of time: the plans are the same bytes without it"
    )


def test_the_twins_differ_by_their_weights_only(engines: dict[str, Bundle]) -> None:
    plans = [engines[twin].manifest.details["plans"] for twin in TWINS]
    assert plans[0]["unet"] != plans[1]["unet"]
    assert plans[0]["vae_decoder"] == plans[1]["vae_decoder"]  # nothing in it was pruned


def test_memory_and_time_are_told(engines: dict[str, Bundle]) -> None:
    for part in report(engines["dense"]).components.values():
        assert part.context_from == "log"
        assert 1 << 10 < (part.context_bytes or 0) < 1 << 30
        assert 1 << 24 < (part.peak_build_bytes or 0) < 1 << 33
        assert part.seconds > 0


def test_the_log_is_verbose_and_names_no_folder(
    engines: dict[str, Bundle], onnx: dict[str, Bundle]
) -> None:
    text = (engines["dense"].path / "unet" / "build.log").read_text()
    assert "[VERBOSE] " in text
    assert "Engine generation completed" in text
    assert str(onnx["dense"].path) not in text


@pytest.mark.skipif(not isinstance(local_gpu(), str), reason="there is a GPU here")
def test_without_a_gpu_an_engine_is_built_and_not_run(engines: dict[str, Bundle]) -> None:
    assert RTX.available() is None
    why = RTX.why_not_run(engines["dense"].manifest.details)
    way = "measure it on the card, or with the device bundle of `sdcompress device`"
    assert why == f"{local_gpu()}; {way}"


@pytest.fixture
def unet(onnx: dict[str, Bundle], tmp_path: Path) -> Callable[..., Request]:
    def request(twin: str = "dense", **changes: Any) -> Request:
        asked = Request(
            module="tensorrt_rtx",
            onnx=str(onnx[twin].path / "unet" / "model.onnx"),
            plan=str(tmp_path / f"{twin}.plan"),
            log=str(tmp_path / f"{twin}.log"),
            shapes=SHAPES,
            compute_capability="8.9",
            inspect=False,
        )
        return replace(asked, **changes)

    return request


@pytest.mark.parametrize("capability", ["8.6", "12.0"])
def test_other_cards(
    capability: str, unet: Callable[..., Request], engines: dict[str, Bundle]
) -> None:
    made = {}
    for twin in TWINS:
        heard: list[str] = []
        request = unet(twin, compute_capability=capability)
        made[twin] = run_in_process(request, ARGV, lambda phase, *_, to=heard: to.append(phase))
        assert made[twin]["plan_sha256"] != engines[twin].manifest.details["plans"]["unet"]
        assert made[twin]["fused_attention"] == 14
        assert made[twin]["missing"] == []
        assert "Building engine" in heard
    assert made["dense"]["plan_sha256"] != made["sparse"]["plan_sha256"]
    assert made["dense"]["tactics"] == made["sparse"]["tactics"] > 100


def test_free_shapes(unet: Callable[..., Request]) -> None:
    low, high = {**SHAPES}, {**SHAPES, "sample": (4, 4, 16, 16)}
    low["sample"] = (1, 4, 8, 8)
    low["encoder_hidden_states"], high["encoder_hidden_states"] = (1, 32, 128), (4, 32, 128)
    profile = {name: (low[name], SHAPES[name], high[name]) for name in SHAPES}
    made = run_in_process(unet(shapes={}, profiles=(profile,)), ARGV)
    pinned = run_in_process(unet(), ARGV)
    assert made["plan_sha256"] != pinned["plan_sha256"]
    assert made["context_bytes"] > pinned["context_bytes"]  # room for the largest shape


def test_fp32(onnx_dense: Bundle, tmp_path: Path) -> None:
    options = {"compute_capability": "8.6", "check_flag": False}
    engine = RTX.build(onnx_dense, tmp_path / "engine", options=options, sizes=Sizes(guided=False))
    assert engine.manifest.details["dtype"] == "fp32"
    assert engine.manifest.details["providers"]["unet"].endswith(" SM86")
    assert engine.manifest.details["sparse_kernels"]["used"] is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"compute_capability": "8.7"}, "does not build for compute capability 8.7; it builds for"),
        ({"hardware_compatible": "AMPERE_PLUS"}, "has no hardware compatibility AMPERE_PLUS"),
        ({"timing_cache": "nowhere"}, "has no timing cache, because it times nothing"),
        ({"shapes": {"latents": (1, 4, 8, 8)}}, "has no input 'latents', only encoder_hidden"),
        ({"shapes": {}}, "Network has dynamic or shape inputs, but no optimization profile"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    changes: dict[str, Any], why: str, unet: Callable[..., Request]
) -> None:
    with pytest.raises(DeviceError, match=why) as caught:
        run_in_process(unet(**changes), ARGV)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path(unet().plan).exists()


def test_files_it_cannot_read(
    onnx: dict[str, Bundle], unet: Callable[..., Request], tmp_path: Path
) -> None:
    from onnx import load, save

    whole = onnx["dense"].path / "vae_decoder" / "model.onnx"
    alone = str(shutil.copy(whole, tmp_path / "model.onnx"))
    with pytest.raises(DeviceError, match="its data file model.onnx_data is missing"):
        run_in_process(unet(onnx=alone), ARGV)
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(DeviceError, match="cannot read it: .*Failed to parse the ONNX model"):
        run_in_process(unet(onnx=str(cut)), ARGV)
    model = load(str(whole))
    model.graph.node[3].op_type = "Frobnicate"
    save(model, str(tmp_path / "strange.onnx"))
    with pytest.raises(DeviceError, match=r"at node \S+ \(Frobnicate\): .*Plugin not found"):
        run_in_process(unet(onnx=str(tmp_path / "strange.onnx")), ARGV)


def test_which_card_must_be_said(onnx: dict[str, Bundle], tmp_path: Path) -> None:
    if isinstance(local_gpu(), str):
        with pytest.raises(UsageError, match="which card to build for"):
            RTX.build(onnx["dense"], tmp_path / "engine")
    with pytest.raises(UsageError, match="Jetson Orin Nano .* is not served by tensorrt_rtx"):
        RTX.check({}, load_target("jetson-orin-nano"))
    with pytest.raises(UsageError, match="is not that of the target, 8.9; leave one of them out"):
        RTX.check({"compute_capability": "8.6"}, load_target("rtx-4090"))
    with pytest.raises(UsageError, match="TensorRT-RTX times nothing while building"):
        RTX.check({"timing_cache": "here"}, load_target("rtx-4090"))


def test_a_failed_build_leaves_nothing(onnx: dict[str, Bundle], tmp_path: Path) -> None:
    """A plan for other versions needs a library that the package does not bring."""
    options = {"compute_capability": "8.9", "version_compatible": True}
    with pytest.raises(InputError, match="TensorRT could not build it: .*; see .*log"):
        RTX.build(onnx["dense"], tmp_path / "engine", options=options)
    assert list(tmp_path.iterdir()) == []
