"""Narrowed models out of torch: graphs with the smaller shapes that every runtime takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.backends import load_backend
from export.bench import bench
from export.device_bundle import write_device_bundle
from export.ranges import Ranges, Value
from export.specs import COMPONENTS, MODEL_OF, Sizes, canonical_key
from export.targets import load_target
from export.to_onnx import build_skeleton, export_bundle
from export.verify import verify_bundle
from sdcompress.bundle import Bundle, seal, write_json
from sdcompress.catalog import read_config
from sdcompress.errors import UsageError
from sdcompress.models import modules
from sdcompress.structure import KEY, read_record
from tests.narrowed import blocks_of, narrow_bundle, thinned

BLOCK = "mid_block.attentions.0.transformer_blocks.0.ff"
SMALL = {"sizes": Sizes(height=16, width=16)}


@pytest.fixture(scope="module")
def narrow(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half of the neurons, heads and channels of every component, of one block all but one unit."""
    kept = thinned(tiny_sd, *MODEL_OF.values())
    kept["unet"][BLOCK] = [7]
    return narrow_bundle(tiny_sd, tmp_path_factory.mktemp("narrow") / "bundle", kept)


@pytest.fixture(scope="module")
def exported(narrow: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(narrow, tmp_path_factory.mktemp("narrow") / "onnx", dtype="fp32")


@pytest.fixture(scope="module")
def engine_narrow(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("narrow") / "engine"
    return load_backend("onnxruntime").build(exported, out, options={"provider": "cpu"})


def test_graphs_have_the_smaller_shapes_and_compute_what_torch_does(
    exported: Bundle, narrow: Bundle
) -> None:
    report = verify_bundle(exported.path, against=narrow.path)
    assert [c.name for c in report.checks if not c.passed] == []
    assert {c.name for c in report.checks} >= {f"parity {c}" for c in COMPONENTS}
    assert read_record(exported.manifest.details) == read_record(narrow.manifest.details)
    graph = onnx.load(str(exported.path / "unet" / "model.onnx"), load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    resnet = "down_blocks.0.resnets.0"
    assert shapes[f"{resnet}.conv1.weight"] == (16, 32, 3, 3)
    assert shapes[f"{resnet}.conv2.weight"] == (32, 16, 3, 3)
    for component, model in MODEL_OF.items():
        stored = (exported.path / component / "model.onnx_data").stat().st_size
        numbers = sum(
            np.prod(tensor.shape)
            for tensor in load_file(next((narrow.path / model).glob("*.safetensors"))).values()
        )
        assert stored < 4.1 * numbers


# optimum and diffusers, each by its own deprecations.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_optimum_draws_the_picture_of_the_narrowed_modules(
    exported: Bundle, narrow: Bundle, tiny_sd: Path
) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
    from diffusers import StableDiffusionPipeline

    ours = StableDiffusionPipeline.from_pretrained(tiny_sd)
    for component in MODEL_OF.values():
        setattr(ours, component, modules.load(narrow.path / component, component))
    dense = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pictures = []
    for pipeline in (
        optimum.ORTStableDiffusionPipeline.from_pretrained(exported.path),
        ours,
        dense,
    ):
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            "a red cat",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            height=16,
            width=32,
        )
        pictures.append(made.images[0])
    found, expected, before = pictures
    assert found.shape == (16, 32, 3)
    assert expected.std() > 0.05  # a picture, not a grey area
    assert 10 * np.log10(1 / float(np.square(found - expected).mean())) >= 60
    assert 10 * np.log10(1 / float(np.square(before - expected).mean())) < 40  # another model


def test_tensorrt_rtx_builds_it(exported: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'sdcompress[rtx]'")
    target = load_target("rtx-4090")
    built = load_backend("tensorrt_rtx").build(exported, tmp_path / "rtx", target=target, **SMALL)
    assert set(built.manifest.details["plans"]) == set(COMPONENTS)
    assert read_record(built.manifest.details) == read_record(exported.manifest.details)


def test_the_twins_are_measured_against_each_other(engine: Bundle, engine_narrow: Bundle) -> None:
    results = bench(
        engine, engine_narrow, rounds=2, steps=1, height=16, width=16, budget=0.02, prompt="a cat"
    )
    assert results.engines["sparse"].bytes < 0.75 * results.engines["dense"].bytes
    with pytest.raises(UsageError, match="has lost blocks that .* has; swap the two"):
        bench(engine_narrow, engine, rounds=2)


def test_other_graphs_keep_what_they_need_in_fp32(
    engine: Bundle, engine_narrow: Bundle, tmp_path: Path
) -> None:
    """Only components that are the same graph must agree; here all three are others."""
    from export.bench import _check_comparable

    other = tmp_path / "other"
    shutil.copytree(engine_narrow.path, other)
    details = {**engine_narrow.manifest.details, "kept_fp32": {"unet": ["conv_in"]}}
    seal(other, engine_narrow.manifest.model_copy(update={"details": details}))
    _check_comparable(engine, Bundle.open(other))
    record = details[KEY]
    details[KEY] = {"text_encoder": record["text_encoder"]}
    seal(other, engine_narrow.manifest.model_copy(update={"details": details}))
    with pytest.raises(UsageError, match="differ in kept_fp32"):
        _check_comparable(engine, Bundle.open(other))


def test_a_device_bundle_takes_graphs_that_differ(
    onnx_dense: Bundle, exported: Bundle, tmp_path: Path
) -> None:
    orin = load_target("jetson-orin-nano")
    written = write_device_bundle(
        onnx_dense, exported, tmp_path / "both.tar", target=orin, sizes=SMALL["sizes"]
    )
    assert written.files > 20
    with pytest.raises(UsageError, match="has lost blocks that .* has; swap the two"):
        write_device_bundle(exported, onnx_dense, tmp_path / "swapped.tar", target=orin)


def test_ranges_of_other_graphs_stay_apart() -> None:
    def ranges(largest: float, **graphs: str) -> Ranges:
        value = Value(largest=largest, node="n", layer="l")
        return Ranges(graphs=graphs, values={c: {"v": value} for c in graphs}, calibrations=())

    dense = ranges(1e5, text_encoder="same", unet="wide")
    sparse = ranges(1.0, text_encoder="same", unet="narrow")
    assert sparse.beside(dense).beyond_fp16() == {"text_encoder": ["v"]}
    assert dense.beside(sparse).beyond_fp16() == {"text_encoder": ["v"], "unet": ["v"]}
    assert sparse.beside(dense).graphs == sparse.graphs
    assert sparse.beside(ranges(1e5, unet="wide")) == sparse


def test_the_config_decides_on_the_graph(tiny_sd: Path) -> None:
    config = read_config(tiny_sd / "text_encoder")
    (block, *_) = [b for b in blocks_of(tiny_sd)["text_encoder"] if b.kind == "neurons"]
    dense = build_skeleton("text_encoder", config, "fp32")
    slim = build_skeleton("text_encoder", {**config, KEY: {block.name: 40}}, "fp32")
    assert dense.digest != slim.digest
    bias = canonical_key("text_encoder", f"{block.name}.fc1.bias")
    assert slim.weight_map.initializers[bias].shape == (40,)
    assert dense.weight_map.initializers[bias].shape == (128,)


def test_a_config_that_is_not_the_record_fails_verification(narrow: Bundle, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(narrow.path, changed)
    config = read_config(changed / "unet")
    write_json(changed / "unet" / "config.json", {**config, KEY: {**config[KEY], BLOCK: 2}})
    seal(changed, narrow.manifest)
    failed = [c for c in verify_bundle(changed).checks if not c.passed]
    assert [c.name for c in failed] == ["structure"]
    assert failed[0].detail == f"unet/{BLOCK} (width 1 and 2, recorded 1)"


def test_what_stayed_has_the_bits_of_the_parent(pruned: Bundle, tmp_path: Path) -> None:
    """Against a parent that is itself a bundle; numbers in the wrong places are seen."""
    kept = thinned(pruned.path, "unet", share=0.6)
    child = narrow_bundle(pruned, tmp_path / "child", kept)
    checks = {c.name: c for c in verify_bundle(child.path, against=pruned.path).checks}
    assert [name for name, check in checks.items() if not check.passed] == []
    assert checks["structure"].detail.endswith("as recorded and configured")
    file = child.path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = f"{BLOCK}.net.2.weight"
    weights[name] = weights[name].flip(1).contiguous()
    save_file(weights, file)
    checks = {c.name: c for c in verify_bundle(child.path, against=pruned.path).checks}
    assert checks["against"].tensors == (f"unet/{name}",)


def test_record_and_config_agree_on_disk(narrow: Bundle) -> None:
    manifest = json.loads((narrow.path / "manifest.json").read_text())
    record = manifest["details"][KEY]["unet"]["blocks"][BLOCK]
    assert (record["width"], record["kept"], record["removed"]) == (256, 1, "0-6,8-255")
