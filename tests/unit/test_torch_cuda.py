"""What torch_cuda decides without a GPU: which layers run sparse, and what share that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from export.backends import load_backend, torch_cuda
from export.backends.torch_cuda import BACKEND, MULTIPLE, Options, Program, sparse_layers
from export.torch_module import layer_macs
from sdcompress.bundle import Bundle, Manifest, SourceRecord, seal
from sdcompress.errors import InputError, SdcompressError, UsageError
from sdcompress.plan import LayerPlan, SparsityPlan
from tests.tiny_sd import TEXT_ENCODER, UNET


def layer(name: str, shape: tuple[int, ...], **changes: Any) -> LayerPlan:
    fields: dict[str, Any] = {
        "component": "unet",
        "name": name,
        "kind": "linear" if len(shape) == 2 else "conv",
        "shape": shape,
        "dtype": "F32",
        "pattern": "2:4",
        "axis": 1,
    }
    return LayerPlan(**{**fields, **changes})


FITS = layer("a.weight", (32, 48))
ODD = layer("odd.weight", (32, 40))
LAYERS = (
    FITS,
    layer("b.weight", (16, 16), pattern="1:4"),
    ODD,
    layer("conv.weight", (32, 32, 3, 3)),
    layer("pointwise.weight", (32, 32, 1, 1)),
    layer("unstructured.weight", (32, 32), pattern="unstructured", axis=None),
    layer("wide.weight", (32, 32), pattern="2:8"),
    layer("kept.weight", (32, 32), skipped_because="kept dense"),
    layer("encoder.layers.0.mlp.fc1.weight", (32, 32), component="text_encoder"),
)


def onnx_bundle(path: Path, layers: tuple[LayerPlan, ...], **details: Any) -> Bundle:
    """The manifest of an export and a file where its graph would be."""
    (path / "unet").mkdir(parents=True)
    (path / "unet" / "model.onnx").write_bytes(b"")
    manifest = Manifest(
        stage="onnx",
        parent=None,
        source=SourceRecord(id="a", kind="directory"),
        tools={},
        plan=SparsityPlan(layers=layers, parameters={"unet": 1, "text_encoder": 1}),
        details={"dtype": "fp16", **details},
    )
    seal(path, manifest)
    return Bundle.open(path)


def test_what_cusparselt_can_take(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "onnx", LAYERS)
    assert sparse_layers(bundle, "unet", Options()) == ["a.weight", "b.weight"]
    assert sparse_layers(bundle, "unet", Options(sparse="off")) == []
    # Under the key of the weight map, whatever the file calls it.
    assert sparse_layers(bundle, "text_encoder", Options()) == [
        "text_model.encoder.layers.0.mlp.fc1.weight"
    ]
    assert sparse_layers(bundle, "vae_decoder", Options()) == []


def test_sparse_on_refuses_what_does_not_fit(tmp_path: Path) -> None:
    fits = onnx_bundle(tmp_path / "fits", (FITS,))
    assert sparse_layers(fits, "unet", Options(sparse="on")) == ["a.weight"]
    odd = onnx_bundle(tmp_path / "odd", (FITS, ODD))
    with pytest.raises(UsageError, match=r"odd.weight: .* multiples of 16, found fp16 of 32×40"):
        sparse_layers(odd, "unet", Options(sparse="on"))


def test_fp32_runs_dense(tmp_path: Path) -> None:
    fp32 = onnx_bundle(tmp_path / "onnx", (FITS,), dtype="fp32")
    assert sparse_layers(fp32, "unet", Options()) == []
    with pytest.raises(UsageError, match="found fp32"):
        sparse_layers(fp32, "unet", Options(sparse="on"))


def test_the_shapes_are_those_torch_states() -> None:
    limits = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[torch.float16]
    assert limits.sparse_min_rows == limits.sparse_min_cols == MULTIPLE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sparce": "on"}, r"option 'sparce': .* there are: sparse, cuda_graph, channels_last"),
        ({"sparse": "maybe"}, "option 'sparse': expected 'auto', 'on' or 'off', found 'maybe'$"),
        ({"cuda_graph": "perhaps"}, "'cuda_graph': expected true or false, found 'perhaps'$"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        BACKEND.check(options)


def test_without_cuda_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    why = load_backend("torch_cuda").available()
    assert why
    assert "is built without CUDA" in why
    assert "pytorch.org/get-started" in why
    BACKEND.check({})  # an engine can be made for another machine
    assert BACKEND.why_not_run({"sparse_layers": {}}) == why


def test_without_a_gpu_it_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in (BACKEND.available() or "")


def test_sparse_layers_need_the_library_and_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = ({"sparse_layers": {"unet": keys}} for keys in ([], ["a.weight"]))
    monkeypatch.setattr(type(BACKEND), "available", lambda self: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Turing")
    assert BACKEND.why_not_run(dense) is None
    assert BACKEND.why_not_run(sparse) == (
        "Some Turing (compute capability 7.5) has no sparse Tensor Cores; "
        "build the engine with --option sparse=off"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert BACKEND.why_not_run(sparse) is None
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in (BACKEND.why_not_run(sparse) or "")


def test_a_target_is_refused(tmp_path: Path) -> None:
    from export.targets import load_target

    with pytest.raises(UsageError, match="leave out the target"):
        BACKEND.build(
            onnx_bundle(tmp_path / "onnx", ()), tmp_path / "out", target=load_target("l4")
        )


def test_what_only_the_graph_computes_in_fp32_is_refused(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "onnx", (), kept_fp32={"unet": ["mid_block.resnets.0.conv1"]})
    with pytest.raises(UsageError, match=r"unet: mid_block\.resnets\.0\.conv1 .* fp32"):
        BACKEND.build(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_graphs_is_refused(tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "onnx", ())
    (tmp_path / "onnx" / "unet" / "model.onnx").unlink()
    seal(tmp_path / "onnx", bundle.manifest)
    with pytest.raises(InputError, match="found none"):
        BACKEND.build(Bundle.open(tmp_path / "onnx"), tmp_path / "out")


def test_macs_against_a_count_by_hand() -> None:
    macs = layer_macs(
        "text_encoder", {"vocab_size": 99, **TEXT_ENCODER}, batch=2, height=8, width=8
    )
    first = "text_model.encoder.layers.0"
    # 2 texts of 77 tokens; 32 channels into 32, and into 128.
    assert macs[f"{first}.self_attn.q_proj.weight"] == 2 * 77 * 32 * 32 == 157_696
    assert macs[f"{first}.mlp.fc1.weight"] == 2 * 77 * 32 * 128 == 630_784
    # 2 layers, each with 4 projections and 2 matrices of the MLP.
    assert sum(macs.values()) == 2 * (4 * 157_696 + 2 * 630_784) == 3_784_704


def test_macs_of_convolutions_against_a_count_by_hand() -> None:
    macs = layer_macs("unet", UNET, batch=2, height=16, width=8)
    # 2 × 32 × 16 × 8 numbers out, each of 4 channels × 3 × 3.
    assert macs["conv_in.weight"] == 2 * 32 * 16 * 8 * 36 == 294_912
    # The downsampler halves both sides.
    assert macs["down_blocks.0.downsamplers.0.conv.weight"] == 2 * 32 * 8 * 4 * 32 * 9 == 589_824
    # Keys are made of the 77 tokens, not of the image.
    to_k = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert macs[to_k] == 2 * 77 * 32 * 32 == 157_696
    assert not any("norm" in key for key in macs)


class Dense24(SparseSemiStructuredTensorCUSPARSELT):
    """torch's own sparse weight with a dense product in place of cuSPARSELt's."""

    seen: list[tuple[int, ...]]

    def _mm(self, B: Any, *, bias: Any = None, **how: Any) -> torch.Tensor:  # noqa: N803
        assert B.is_contiguous()
        assert how["should_transpose_dense"]
        assert self.packed is not None
        self.seen.append(tuple(B.shape))
        out = B @ self.packed.T
        return out if bias is None else out + bias


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sparse weights without a GPU; the shapes of what they are multiplied with."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Dense24, "seen", seen, raising=False)
    monkeypatch.setattr(Dense24, "_PROTOTYPE_WARNING_SHOWN", True)

    def packed(weight: torch.Tensor) -> torch.Tensor:
        Dense24._load_dispatch_table()
        made: torch.Tensor = Dense24(weight.shape, weight, None, None, None, None)
        return made

    monkeypatch.setattr(torch_cuda, "_pack", packed)
    return seen


class Attending(nn.Module):
    """As in a UNet: a Linear layer on the pixels of an image, which is a strided view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(image.flatten(2).transpose(1, 2))
        return out


def test_a_sparse_weight_takes_strided_images(pack: list[tuple[int, ...]]) -> None:
    module = Attending()
    image = torch.randn(2, 16, 3, 5)
    expected = module(image).detach()
    weight = module.linear.weight.detach()
    torch_cuda.replace_weight(module.linear, torch_cuda._pack(weight))
    with torch.inference_mode():
        program = Program(module, [image], "cpu", Options())
        (found,) = program.run([image])
    assert pack == [(30, 16)]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert program.milliseconds is None


class FakeCuda:
    """What `torch.cuda` does around a run, noted; tensors stay on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: str | None = None) -> None:
        self.log: list[str] = []
        self.replay: Any = None
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("event")

            def synchronize(self) -> None:
                fake.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return 1.5

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                fake.log.append("wait_stream")

        class CUDAGraph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.replay()

        @contextmanager
        def graph(graph: CUDAGraph, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            fake.log.append("capture")
            if fail:
                raise RuntimeError(fail)
            yield

        allocated = iter([1000])
        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": lambda stream: nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: next(allocated),
            "max_memory_allocated": lambda: 1700,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


class Doubling(nn.Module):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._log.append("run")
        return 2 * x


CPU_AS_GPU = "cpu:0"  # torch takes it for the CPU, the program for a GPU
TIMED_RUN = ["event", "replay", "event", "wait"]


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    one, two = torch.ones(2), torch.full((2,), 5.0)
    with torch.inference_mode():
        program = Program(Doubling(cuda.log), [one], CPU_AS_GPU, Options())
        streams = ["wait_stream", *["run"] * torch_cuda.WARM_UP, "wait_stream"]
        assert cuda.log == ["run", *streams, "capture", "run"]
        cuda.log.clear()
        # A graph writes to where its outputs were when it was captured.
        cuda.replay = lambda: program._outputs[0].copy_(2 * program._inputs[0])
        assert program.run([two])[0].tolist() == [10.0, 10.0]
    assert cuda.log == TIMED_RUN
    assert program.milliseconds == 1.5
    assert program.context == 700


def test_without_a_graph_every_run_starts_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with torch.inference_mode():
        program = Program(
            Doubling(cuda.log), [torch.ones(2)], CPU_AS_GPU, Options(cuda_graph=False)
        )
        cuda.log.clear()
        assert program.run([torch.full((2,), 3.0)])[0].tolist() == [6.0, 6.0]
    assert cuda.log == ["event", "run", "event", "wait"]


def test_what_cannot_be_captured_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, fail="operation not permitted\nwhen stream is capturing")
    with pytest.raises(SdcompressError, match="cuda_graph=false") as caught:
        Program(Doubling([]), [torch.ones(2)], CPU_AS_GPU, Options())
    assert "(operation not permitted)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_little_gpu_memory_is_one_clear_line() -> None:
    with (
        pytest.raises(SdcompressError, match="unet: .* --residency sequential") as caught,
        torch_cuda._explained("unet"),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
    assert "\n" not in str(caught.value)
