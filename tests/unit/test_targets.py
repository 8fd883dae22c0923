"""The shipped devices, files of the user's own, and what `plan` says about a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.targets import SHIPPED, Target, load_target, names
from export.targets.fit import check_backend, sparse_candidates, warnings
from sdcompress.commands import cli
from sdcompress.errors import UsageError
from sdcompress.plan import LayerPlan, SparsityPlan
from sdcompress.recipe import Recipe

# name: compute capability, GB, backends, oldest and newest TensorRT, sparse tensor cores
FACTS = {
    "jetson-agx-orin": ("8.7", 64, ("tensorrt",), "10.3", "11", True),
    "jetson-orin-nano": ("8.7", 8, ("tensorrt",), "10.3", "10", True),
    "jetson-orin-nx": ("8.7", 16, ("tensorrt",), "10.3", "10", True),
    "jetson-thor": ("11.0", 128, ("tensorrt",), "10.13", "11", True),
    "l4": ("8.9", 24, ("tensorrt", "tensorrt_rtx"), "10.3", None, True),
    "rtx-3060": ("8.6", 12, ("tensorrt_rtx", "tensorrt"), "10.3", None, True),
    "rtx-4060": ("8.9", 8, ("tensorrt_rtx", "tensorrt"), "10.3", None, True),
    "rtx-4090": ("8.9", 24, ("tensorrt_rtx", "tensorrt"), "10.3", None, True),
    "rtx-5090": ("12.0", 32, ("tensorrt_rtx", "tensorrt"), "10.8", None, True),
    "rtx-a6000": ("8.6", 48, ("tensorrt_rtx", "tensorrt"), "10.3", None, True),
}
# A device of before sparse tensor cores, as a user might describe it.
TURING: dict[str, Any] = {
    "name": "rtx-2080",
    "title": "GeForce RTX 2080 8 GB",
    "platform": "rtx",
    "compute_capability": "7.5",
    "memory_gb": 8,
    "shared_memory": False,
    "backends": ["tensorrt_rtx"],
    "tensorrt_min": "10.3",
    "opset_max": 20,
    "sparse_tensor_cores": False,
    "workspace_mb": 1024,
    "residency": "resident",
    "resolution": 512,
}


def write(path: Path, **changes: Any) -> str:
    content = {**TURING, **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}))
    return str(path)


def test_what_is_shipped() -> None:
    assert names() == sorted(FACTS)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_shipped_device(name: str) -> None:
    target = load_target(name)
    capability, memory, backends, oldest, newest, sparse = FACTS[name]
    assert target.name == name
    assert target.compute_capability == capability
    assert target.memory_gb == memory
    assert target.backends == backends
    assert (target.tensorrt_min, target.tensorrt_max) == (oldest, newest)
    assert target.sparse_tensor_cores is sparse
    assert target.platform == ("jetson" if name.startswith("jetson") else "rtx")
    assert target.shared_memory is (target.platform == "jetson")
    assert bool(target.jetpack) is (target.platform == "jetson")
    assert f"{memory} GB" in target.title
    assert f"SM {capability}" in target.summary


def test_the_small_jetson_loads_one_component_at_a_time() -> None:
    assert load_target("jetson-orin-nano").residency == "sequential"
    assert load_target("rtx-4090").residency == "resident"


def test_a_capability_is_compared_as_numbers() -> None:
    assert load_target("jetson-thor").capability == (11, 0)


@pytest.mark.parametrize(
    ("name", "version", "served"),
    [
        ("jetson-orin-nano", "10.3.0.30", True),
        ("jetson-orin-nano", "10.16.1", True),
        ("jetson-orin-nano", "8.6.2", False),
        ("jetson-orin-nano", "11.4.1", False),
        ("jetson-agx-orin", "11.4.1", True),
        ("jetson-thor", "10.3.0", False),
        ("rtx-5090", "10.7.0.23", False),
        ("rtx-5090", "12.0", True),
    ],
)
def test_versions_of_tensorrt(name: str, version: str, served: bool) -> None:
    assert load_target(name).accepts(version) is served


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    target = load_target(write(tmp_path / "mine.yaml"))
    assert target == Target.model_validate(TURING)
    assert target.capability == (7, 5)


@pytest.mark.parametrize(("written", "meant"), [(8.9, "8.9"), (8, "8.0")])
def test_a_capability_without_quotes(tmp_path: Path, written: float, meant: str) -> None:
    path = write(tmp_path / "mine.yaml", compute_capability=written)
    assert load_target(path).compute_capability == meant


def test_a_copy_of_a_shipped_device_is_that_device(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text((SHIPPED / "l4.yaml").read_text())
    assert load_target(str(copy)) == load_target("l4")
    assert load_target(str(SHIPPED / "l4.yaml")) == load_target("l4")


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"no target 'jetson-nano': .* jetson-agx-orin, .*, rtx-"):
        load_target("jetson-nano")


@pytest.mark.parametrize("name", ["", ".", "../targets/l4", "rtx-4090.yaml"])
def test_a_name_is_no_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no target"):
        load_target(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "green"}, "colour: unknown key"),
        ({"memory_gb": ...}, "memory_gb: is missing; add it$"),
        ({"compute_capability": "7.55"}, "compute_capability: .* such as 8.7, found '7.55'$"),
        ({"compute_capability": 7.55}, "compute_capability: .* such as 8.7, found '7.55'$"),
        ({"compute_capability": True}, "compute_capability: expected text, found true$"),
        ({"tensorrt_min": 10.3}, "tensorrt_min: expected text, found 10.3; put it in quotes$"),
        ({"tensorrt_min": "ten"}, "tensorrt_min: expected a version such as 10.3, found 'ten'$"),
        ({"name": "l4"}, "name: 'l4' is a device that comes with sdcompress, and this is another"),
        ({"memory_gb": float("nan")}, "memory_gb: expected a finite number, found nan$"),
        ({"workspace_mb": 0}, "workspace_mb: expected more than 0, found 0$"),
        ({"resolution": 500}, "resolution: expected a multiple of 8, found 500$"),
        ({"backends": []}, "backends: expected 1 or more entries, found an empty list$"),
        (
            {"backends": ["onnxruntime"]},
            r"backends\.0: expected 'tensorrt' or 'tensorrt_rtx', found",
        ),
        (
            {"shared_memory": "yes please"},
            "shared_memory: expected true or false, found 'yes please'$",
        ),
        ({"jetpack": "6.0"}, r"JetPack 6\.0 is too old.* upgrade the device to JetPack 6\.1"),
        ({"jetpack": "5.1.2"}, r"JetPack 5\.1\.2 is too old"),
        ({"tensorrt_min": "8.6"}, r"TensorRT 8\.6 is too old; upgrade to TensorRT 10\.3 or newer"),
        (
            {"tensorrt_min": "10.2", "platform": "jetson"},
            r"upgrade to JetPack 6\.1 or newer, which brings TensorRT 10\.3",
        ),
        ({"tensorrt_max": "9"}, "tensorrt_max 9 is older than tensorrt_min 10.3"),
        ({"opset_max": 17}, "opset 18, the device's TensorRT reads up to 17; upgrade"),
        (
            {"compute_capability": "8.7"},
            r"compute capability 7\.5, 8\.0, .*, found 8\.7; leave tensorrt_rtx out",
        ),
        ({"sparse_tensor_cores": True}, "found 7.5; set 'sparse_tensor_cores: false'"),
    ],
)
def test_a_device_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "mine.yaml", **changes)
    with pytest.raises(UsageError, match=message) as error:
        load_target(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_key_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text((SHIPPED / "l4.yaml").read_text() + "memory_gb: 48\n")
    with pytest.raises(UsageError, match=r"line \d+: the key 'memory_gb' appears twice"):
        load_target(str(path))


def layer(name: str, pattern: str, *shape: int) -> LayerPlan:
    return LayerPlan(
        component="unet", name=name, kind="linear", shape=shape, dtype="F16", pattern=pattern
    )


def plan(*patterns: str, parameters: dict[str, int] | None = None) -> SparsityPlan:
    layers = tuple(layer(f"{i}.weight", p, 320, 320) for i, p in enumerate(patterns))
    return SparsityPlan(layers=layers, parameters=parameters or {"unet": 1000, "vae": 1000})


def recipe(**changes: Any) -> Recipe:
    rules = {"unet": {"rules": [{"sparsity": 0.5}]}}
    return Recipe.model_validate({"name": "test", "prune": rules, **changes})


def test_which_layers_may_ever_run_sparse() -> None:
    layers = (
        layer("large", "2:4", 257, 257),
        layer("conv", "2:4", 320, 512, 3, 3),
        layer("few in", "2:4", 257, 256),
        layer("few out", "2:4", 256, 512),
        layer("sparser", "1:4", 512, 512),
        layer("other", "4:8", 512, 512),
        layer("unstructured", "unstructured", 512, 512),
        LayerPlan(
            component="unet", name="x", kind="linear", shape=(9, 9), dtype="F16",
            pattern="2:4", skipped_because="kept dense",
        ),
    )  # fmt: skip
    made = SparsityPlan(layers=layers, parameters={"unet": 1})
    found = sparse_candidates(load_target("rtx-4090"), made)
    assert found is not None
    assert (found.large_enough, found.of) == (3, 5)
    assert sparse_candidates(Target.model_validate(TURING), made) is None


def test_nothing_to_warn_of() -> None:
    asked = recipe(engine={"backend": "tensorrt"})
    assert warnings(load_target("jetson-orin-nano"), asked, plan("2:4", "1:4"), 512) == ()
    assert warnings(Target.model_validate(TURING), asked_rtx(), plan("unstructured"), 512) == ()


def asked_rtx(**changes: Any) -> Recipe:
    return recipe(engine={"backend": "tensorrt_rtx"}, **changes)


def test_a_device_without_sparse_tensor_cores_is_told() -> None:
    found = warnings(Target.model_validate(TURING), asked_rtx(), plan("2:4", "2:4", "4:8"), 512)
    assert found == (
        "rtx-2080 has no sparse tensor cores: 2:4, 4:8 in 3 layers makes nothing faster there, "
        "its zeros only make the packed file smaller",
    )


def test_patterns_that_are_not_2_to_4() -> None:
    target = load_target("jetson-agx-orin")
    (found,) = warnings(target, recipe(), plan("2:4", "4:8", "2:8", "1:2", "2:6"), 512)
    assert found == "sparse tensor cores know 2:4 only: 2:6, 4:8 in 2 layers makes nothing faster"


def test_tensorrt_rtx_is_not_said_to_be_faster() -> None:
    (found,) = warnings(load_target("rtx-4090"), asked_rtx(), plan("2:4"), 512)
    assert found.startswith("TensorRT-RTX has no sparse kernels so far")


def test_a_backend_that_does_not_build_for_the_device() -> None:
    jetson = load_target("jetson-thor")
    with pytest.raises(UsageError, match="tensorrt_rtx does not build for jetson-thor, tensorrt d"):
        check_backend(jetson, "tensorrt_rtx")
    for backend in ("onnxruntime", "torch_cuda", "tensorrt"):
        check_backend(jetson, backend)


def test_pictures_larger_than_suggested() -> None:
    target = load_target("rtx-4060")
    (found,) = warnings(target, recipe(), plan("unstructured"), 768)
    assert found == "768×768 pixels is more than the 512 suggested for rtx-4060"
    smaller = recipe(sampling={"width": 512, "height": 256})
    assert warnings(target, smaller, plan("unstructured"), 768) == ()


# 3 maps × 256 channels × 512 × 512 × 2 bytes = 0.4 GB beside the weights, 2 bytes each.
GIGA = 10**9


@pytest.mark.parametrize(
    ("parameters", "changes", "advice"),
    [
        ({"unet": 3.7 * GIGA, "vae": 0}, {}, None),
        (
            {"unet": 2 * GIGA, "vae": 2 * GIGA},
            {},
            "resident engines need about 8.4 GB (8.0 GB of weights in fp16, 0.4 GB for the "
            "decoder's maps at 512×512); set 'bench: {residency: sequential}'",
        ),
        ({"unet": 2 * GIGA, "vae": 2 * GIGA}, {"bench": {"residency": "sequential"}}, None),
        (
            {"unet": 3.9 * GIGA, "vae": 1},
            {"bench": {"residency": "sequential"}},
            "sequential engines need about 8.2 GB (7.8 GB of weights in fp16, 0.4 GB for the "
            "decoder's maps at 512×512); use a smaller picture, fp16 or a larger device",
        ),
        (
            {"unet": 2 * GIGA, "vae": 0},
            {"export": {"dtype": "fp32"}},
            "resident engines need about 8.8 GB (8.0 GB of weights in fp32, 0.8 GB for the "
            "decoder's maps at 512×512); use a smaller picture, fp16 or a larger device",
        ),
    ],
)
def test_memory(parameters: dict[str, float], changes: dict[str, Any], advice: str | None) -> None:
    made = plan("unstructured", parameters={k: int(v) for k, v in parameters.items()})
    found = warnings(Target.model_validate(TURING), recipe(**changes), made, 512)
    assert found == ((f"rtx-2080 has 8 GB, {advice}",) if advice else ())


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(["plan", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_plan_speaks_of_the_target(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "recipe.yaml"
    rules = {"unet": {"rules": [{"pattern": "2:4"}]}}
    content = {"name": "mine", "model": str(tiny_sd), "target": "jetson-thor", "prune": rules}
    mine.write_text(yaml.safe_dump(content))

    from_recipe = json.loads(planned(capsys, str(mine), "--json"))
    assert from_recipe["target"] == "jetson-thor"
    assert from_recipe["warnings"] == []
    assert from_recipe["sparse_candidates"]["large_enough"] == 0
    of = from_recipe["sparse_candidates"]["of"]
    assert of == sum(p["pattern"] == "2:4" for p in from_recipe["plan"]["layers"])
    assert from_recipe["gates"] is None
    text = planned(capsys, str(mine))
    assert f"jetson-thor: 0 of {of} 2:4 layers are large enough to be ever chosen" in text

    turing = write(tmp_path / "turing.yaml")
    said = json.loads(planned(capsys, str(mine), "--target", turing, "--json"))
    assert said["target"] == "rtx-2080"
    assert said["sparse_candidates"] is None
    assert "no sparse tensor cores: 2:4 in" in said["warnings"][0]
    text = planned(capsys, str(mine), "--target", turing)
    assert "warning: rtx-2080 has no sparse tensor cores" in text
    assert "large enough" not in text


def test_plan_refuses_an_old_jetpack(tiny_sd: Path, tmp_path: Path) -> None:
    old = write(tmp_path / "old.yaml", platform="jetson", jetpack="6.0", tensorrt_min="8.6")
    with pytest.raises(UsageError, match="upgrade the device to JetPack 6.1"):
        cli.main(
            ["plan", "sd2-2to4", "--model", str(tiny_sd), "--target", old], standalone_mode=False
        )


def test_plan_without_a_target_says_nothing_of_one(
    tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(planned(capsys, "demo", "--model", str(tiny_sd), "--json"))
    assert said["target"] is None
    assert said["warnings"] == []
    assert said["sparse_candidates"] is None


def test_plan_with_a_target_is_light(tiny_sd: Path) -> None:
    heavy = {"torch", "onnx", "onnxruntime", "diffusers", "transformers", "tensorrt_rtx"}
    code = (
        "import sys; from sdcompress.commands import cli\n"
        f"cli.main(['plan', 'sd2-2to4', '--model', {str(tiny_sd)!r}, '--target', 'l4', '--json'],"
        " standalone_mode=False)\n"
        f"print({heavy} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
