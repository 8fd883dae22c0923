"""The real exporter on the tiny pipeline: layout, bytes, and the same pictures as diffusers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import to_onnx, tracing
from export.graph import open_graphs
from export.specs import COMPONENTS, OPSET
from export.to_onnx import MODEL, build_skeleton, export_bundle
from export.tracing import trace_skeleton
from export.weight_map import DATA, WEIGHT_MAP, WeightMap
from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.catalog import read_catalog, read_config
from sdcompress.errors import InputError, UsageError
from tests.tiny_sd import make_tiny_sd

EXPORT = """
import sys
from pathlib import Path
from export.to_onnx import export_bundle
from sdcompress.bundle import Bundle, SourceRecord
source = Bundle.of_source(Path(sys.argv[1]), SourceRecord(id="tiny-sd", kind="directory"))
print(export_bundle(source, Path(sys.argv[2]), dtype="fp32").digest)
"""
# What a graph is traced with, which takes seconds to load; a known one is not traced.
SLOW = ("diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch")


def source_of(directory: Path) -> Bundle:
    return Bundle.of_source(directory, SourceRecord(id="tiny-sd", kind="directory"))


@pytest.fixture(scope="module")
def exported(tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny_source, tmp_path_factory.mktemp("export") / "fp32", dtype="fp32")


def graph(bundle: Bundle, component: str) -> onnx.ModelProto:
    return onnx.load(bundle.path / component / MODEL, load_external_data=False)


def test_everything_the_pipeline_needs_is_there(exported: Bundle, tiny_source: Bundle) -> None:
    expected = {"model_index.json", "README.md", "LICENSE", "scheduler/scheduler_config.json"}
    for component in COMPONENTS:
        expected |= {f"{component}/{n}" for n in (MODEL, DATA, WEIGHT_MAP, "config.json")}
    files = set(exported.manifest.files)
    assert {f for f in files if not f.startswith("tokenizer/")} == expected
    assert "tokenizer/vocab.json" in files
    assert exported.manifest.parent == tiny_source.digest
    assert exported.manifest.details["dtype"] == "fp32"
    exported.check_files()


@pytest.mark.parametrize("component", COMPONENTS)
def test_graph_is_clean(exported: Bundle, component: str) -> None:
    model = graph(exported, component)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert not model.metadata_props
    assert not model.doc_string
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
    assert not model.functions
    raw = (exported.path / component / MODEL).read_bytes()
    assert not re.search(rb"\.py\b|site-packages|/(home|root|usr|tmp|work)/", raw)
    onnx.checker.check_model(str(exported.path / component / MODEL), full_check=True)


@pytest.mark.parametrize("component", COMPONENTS)
def test_batch_height_and_width_are_free(exported: Bundle, component: str) -> None:
    for value in (
        *graph(exported, component).graph.input,
        *graph(exported, component).graph.output,
    ):
        axes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.name != "timestep":
            assert axes[0] == "batch"
        if len(axes) == 4:
            assert all(isinstance(axis, str) for axis in axes[2:])


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_weight_bears_its_key(exported: Bundle, tiny_source: Bundle, component: str) -> None:
    weight_map = WeightMap.read(exported.path / component)
    model = {"vae_decoder": "vae"}.get(component, component)
    keys = {
        i.name for h in read_catalog(tiny_source.path).headers[model] for i in h.tensors.values()
    }
    if component == "vae_decoder":
        keys = {k for k in keys if k.startswith(("decoder.", "post_quant_conv."))}
    assert {e.key for e in weight_map.initializers.values()} == keys
    for name, entry in weight_map.initializers.items():
        suffix = {"identity": "", "transpose": "_t", "reshape": ".reshaped"}[entry.transform]
        assert name == entry.key + suffix
    external = {t.name for t in graph(exported, component).graph.initializer if t.external_data}
    assert external == set(weight_map.initializers)


def test_two_to_four_lies_on_axis_0_of_transposed_weights(exported: Bundle) -> None:
    entries = WeightMap.read(exported.path / "unet").initializers
    query = entries["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight_t"]
    assert query.transform == "transpose"
    assert entries["conv_in.weight"].transform == "identity"


def export_in_another_process(tiny_source: Bundle, out: Path, then: str, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", EXPORT + then, str(tiny_source.path), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "7", **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_another_process_writes_the_same_bytes(
    exported: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")  # it traces for itself
    printed = export_in_another_process(tiny_source, tmp_path / "cold", "", SDCOMPRESS_CACHE=cache)
    assert printed[-1] == exported.digest


def test_a_known_graph_needs_no_exporter_and_gives_the_same_bytes(
    exported: Bundle, tiny_source: Bundle, tmp_path: Path
) -> None:
    digest, *loaded = export_in_another_process(
        tiny_source, tmp_path / "known", "print(*sorted(sys.modules))"
    )
    assert digest == exported.digest
    assert "export.tracing" not in loaded
    assert not [m for m in loaded if m in SLOW or m.startswith(tuple(f"{s}." for s in SLOW))]
    files = [f.relative_to(exported.path) for f in exported.path.rglob("*") if f.is_file()]
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "known" / file).read_bytes() == (exported.path / file).read_bytes()


def test_other_weights_change_only_the_data(exported: Bundle, tmp_path: Path) -> None:
    other = export_bundle(
        source_of(make_tiny_sd(tmp_path / "other", seed=1)), tmp_path / "out", dtype="fp32"
    )
    changed = {
        name
        for name, record in other.manifest.files.items()
        if exported.manifest.files[name] != record
    }
    assert changed == {f"{component}/{DATA}" for component in COMPONENTS}


def test_the_skeleton_does_not_depend_on_the_values_it_was_traced_with(
    exported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it did, a weight would hide in what is taken for a constant."""
    config = read_config(exported.path / "text_encoder")
    reference = build_skeleton("text_encoder", config, "fp32")
    make = np.random.PCG64
    monkeypatch.setattr(tracing.np.random, "PCG64", lambda seed: make(seed + 1))
    assert trace_skeleton("text_encoder", config, "fp32", OPSET) == reference  # past the cache


def test_equal_tensors_are_not_merged(exported: Bundle, tmp_path: Path) -> None:
    """The exporter merges small equal tensors; a refit would then change all of them."""
    from safetensors.torch import load_file, save_file

    directory = make_tiny_sd(tmp_path / "equal")
    file = directory / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: torch.ones_like(w) for k, w in load_file(file).items()}, file)
    out = export_bundle(source_of(directory), tmp_path / "out", dtype="fp32", components=["unet"])
    weights = [t for (opened,) in [open_graphs(out)] for t, _ in opened.weights()]
    assert len(weights) == len(WeightMap.read(exported.path / "unet").initializers)


def test_older_opsets_are_refused(exported: Bundle) -> None:
    with pytest.raises(UsageError, match="opset 17"):
        build_skeleton("unet", read_config(exported.path / "unet"), "fp32", opset=17)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    directory = make_tiny_sd(tmp_path / "mixed", text_encoder={"num_hidden_layers": 3})
    config = make_tiny_sd(tmp_path / "plain") / "text_encoder" / "config.json"
    (directory / "text_encoder" / "config.json").write_bytes(config.read_bytes())
    with pytest.raises(InputError, match="has no use for"):
        export_bundle(
            source_of(directory), tmp_path / "out", dtype="fp32", components=["text_encoder"]
        )
    assert not (tmp_path / "out").exists()


# optimum and diffusers, each by its own deprecations.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_optimum_draws_diffusers_picture(
    exported: Bundle, tiny_sd: Path, images: int, guidance: float
) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")
    from diffusers import StableDiffusionPipeline

    pictures = []
    for loader, path in (
        (optimum.ORTStableDiffusionPipeline, exported.path),
        (StableDiffusionPipeline, tiny_sd),
    ):
        pipeline = loader.from_pretrained(path)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            "a red cat",
            num_inference_steps=3,
            guidance_scale=guidance,
            num_images_per_prompt=images,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            height=16,
            width=32,
        )
        pictures.append(made.images)
    found, expected = pictures
    assert found.shape == expected.shape == (images, 16, 32, 3)
    assert expected.std() > 0.05  # a picture, not a grey area
    error = float(np.square(found - expected).mean())
    assert 10 * np.log10(1 / error) >= 60


def test_a_cached_graph_is_the_one_that_tracing_gives(
    tiny_sd: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(tiny_sd / "vae")
    warm = build_skeleton("vae_decoder", config, "fp32")
    to_onnx._build_skeleton.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "trace_skeleton", None)  # from the cache on the disk, or not at all
        assert build_skeleton("vae_decoder", config, "fp32") == warm
    # As the exporter optimizes by itself, without our short cut.
    monkeypatch.setattr(tracing, "_rules_by_operator", nullcontext)
    assert trace_skeleton("vae_decoder", config, "fp32", OPSET) == warm
    assert any((cache / "graphs").iterdir())
