"""The tar for a device: made from real exports, run as the one script it brings along."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from export.device_bundle import SCRIPT, is_device_results, read_results, write_device_bundle
from export.specs import Sizes
from export.targets import load_target
from sdcompress.bundle import Bundle
from sdcompress.commands import cli
from sdcompress.errors import InputError, UsageError, VerificationError
from tests import fake_cuda, fake_tensorrt

ORIN = load_target("jetson-orin-nano")


@pytest.fixture(scope="module")
def tar(onnx_dense: Bundle, onnx_sparse: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("device") / "bundle.tar"
    write_device_bundle(onnx_dense, onnx_sparse, out, target=ORIN, steps=3)
    return out


def unpack(tar: Path, place: Path) -> Path:
    place.mkdir()
    with tarfile.open(tar) as opened:
        for member in opened.getmembers():
            assert member.isreg()
            assert not member.name.startswith(("/", "."))
            assert ".." not in member.name
        subprocess.run(["tar", "xf", str(tar)], cwd=place, check=True)
    return place


@pytest.fixture
def unpacked(tar: Path, tmp_path: Path) -> Path:
    return unpack(tar, tmp_path / "unpacked")


def start(place: Path, *arguments: str, flags: tuple[str, ...] = (), path: Path | None = None):  # type: ignore[no-untyped-def]
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    return subprocess.run(
        [sys.executable, *flags, SCRIPT, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = (x for x in done.stderr.splitlines() if not x.startswith("["))
    return line


def test_same_inputs_same_bytes(
    tar: Path, onnx_dense: Bundle, onnx_sparse: Bundle, tmp_path: Path
) -> None:
    again = write_device_bundle(
        onnx_dense, onnx_sparse, tmp_path / "again.tar", target=ORIN, steps=3
    )
    assert again.path.read_bytes() == tar.read_bytes()
    assert again.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert again.bytes == tar.stat().st_size
    other = write_device_bundle(
        onnx_dense, onnx_sparse, tmp_path / "other.tar", target=ORIN, steps=3, seed=1
    )
    assert other.sha256 != again.sha256


def test_what_is_in_it(unpacked: Path, onnx_dense: Bundle, onnx_sparse: Bundle) -> None:
    manifest = json.loads((unpacked / "manifest.json").read_text())
    assert manifest["target"]["name"] == "jetson-orin-nano"
    assert manifest["order"] == ["text_encoder", "unet", "vae_decoder"]
    assert manifest["tolerance"] == 0.02
    assert manifest["subject"]["steps"] == 3
    assert manifest["subject"]["guidance"] == 7.5
    unet = manifest["components"]["unet"]
    assert unet["calls"] == 3
    assert [(t["name"], t["dtype"], t["shape"]) for t in unet["inputs"]] == [
        ("sample", "float32", [2, 4, 8, 8]),
        ("timestep", "int64", []),
        ("encoder_hidden_states", "float32", [2, 77, 32]),
    ]
    assert unet["twins"]["sparse"]["onnx"] == "onnx/sparse/unet/model.onnx"
    # The decoder is pruned in neither, so it is there once.
    decoder = manifest["components"]["vae_decoder"]["twins"]
    assert decoder["sparse"] == decoder["dense"]
    assert not (unpacked / "onnx/sparse/vae_decoder").exists()
    for twin, bundle in (("dense", onnx_dense), ("sparse", onnx_sparse)):
        for name in ("model.onnx", "model.onnx_data"):
            ours = (unpacked / "onnx" / twin / "unet" / name).read_bytes()
            assert ours == (bundle.path / "unet" / name).read_bytes()
    for name, record in manifest["files"].items():
        data = (unpacked / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record["size"], record["sha256"])
    assert set(manifest["files"]) | {"manifest.json"} == {
        f.relative_to(unpacked).as_posix() for f in unpacked.rglob("*") if f.is_file()
    }
    assert os.access(unpacked / SCRIPT, os.X_OK)
    readme = (unpacked / "README.txt").read_text()
    assert "python3 sdcompress_device.pyz" in readme
    # Three times the weights of the UNet and the target's workspace; the plans of both twins.
    memory = 3 * unet["twins"]["dense"]["weights"] / 2**20 + 1024
    assert f"about {int(memory)} MiB of free memory and " in readme
    golden = unet["twins"]["dense"]["outputs"][0]
    values = np.frombuffer((unpacked / golden["file"]).read_bytes(), "<f4")
    assert values.size == np.prod(golden["shape"])
    assert np.isfinite(values).all()


def test_sizes_and_distilled_models(
    onnx_dense: Bundle, onnx_sparse: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "bundle.tar"
    write_device_bundle(
        onnx_dense,
        onnx_sparse,
        out,
        target=ORIN,
        sizes=Sizes(images=1, guided=False, height=32, width=24),
        steps=1,
    )
    manifest = json.loads((unpack(out, tmp_path / "it") / "manifest.json").read_text())
    assert manifest["components"]["unet"]["inputs"][0]["shape"] == [1, 4, 16, 12]
    assert manifest["subject"]["guidance"] == 1.0
    assert (manifest["subject"]["height"], manifest["subject"]["width"]) == (32, 24)


def test_the_script_on_a_fake_device(unpacked: Path, tmp_path: Path) -> None:
    """Built, checked and measured in processes of their own; the numbers are onnxruntime's."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    fake_tensorrt.install(fakes, "10.3.0", sm="8.7")
    fake_cuda.install(fakes, real_time=True)
    done = start(unpacked, "--rounds", "2", "--budget", "0.01", path=fakes)
    assert done.returncode == 0, done.stderr
    assert "unet_step" in done.stdout
    assert is_device_results(unpacked / "results.json")
    results = read_results(unpacked / "results.json")
    assert results.model == "tiny-sd"
    assert results.setup.residency == "sequential"  # what the target suggests
    assert results.measures["unet_step"].dense.iterations == 2
    assert results.measures["peak_memory"].unit == "bytes"
    assert results.sparsity is not None
    assert results.engines["sparse"].sparse_kernels.used == 0
    assert len(list(unpacked.glob("work/engines/*/engine.plan"))) == 5
    gate = ["gate", str(unpacked / "results.json"), "--json"]
    passed = CliRunner().invoke(cli, [*gate, "--size", "100", "--memory", "100"])
    assert passed.exit_code == 0
    assert [c["name"] for c in json.loads(passed.stdout)["checks"]] == ["memory", "size"]
    failed = CliRunner().invoke(cli, [*gate, "--sparse-layers", "1"])
    assert isinstance(failed.exception, VerificationError)
    page = CliRunner().invoke(cli, ["report", str(unpacked), "--json"])
    assert page.exit_code == 0, page.exception
    assert "Fake GPU" in Path(json.loads(page.stdout)["report"]).read_text()


def test_the_script_needs_the_standard_library_only(unpacked: Path) -> None:
    alone = ("-I", "-S")
    done = start(unpacked, "--help", flags=alone)
    assert done.returncode == 0
    assert "--trtexec" in done.stdout
    done = start(unpacked, flags=alone)
    assert done.returncode == 1
    assert "the Python module tensorrt cannot be imported" in complaint(done)
    assert "checking digests" in done.stderr


def test_old_pythons_are_told(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer, found 3\.8; JetPack 6\.1"):
        runpy.run_path(str(unpacked / SCRIPT), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("onnx/dense/unet/model.onnx_data", 3, "model.onnx_data: is not the file that was packed"),
        ("golden/dense/unet/out_sample.bin", 3, "out_sample.bin: is not the file that was packed"),
    ],
)
def test_a_tampered_bundle(unpacked: Path, name: str, code: int, words: str) -> None:
    data = bytearray((unpacked / name).read_bytes())
    data[-1] ^= 1
    (unpacked / name).write_bytes(data)
    done = start(unpacked, flags=("-I", "-S"))
    assert done.returncode == code
    assert words in complaint(done)
    assert not (unpacked / "work").exists()


def test_a_missing_data_file(unpacked: Path) -> None:
    (unpacked / "onnx/sparse/unet/model.onnx_data").unlink()
    done = start(unpacked, flags=("-I", "-S"))
    assert done.returncode == 1
    assert "onnx/sparse/unet/model.onnx_data: is missing; unpack the tar again" in complaint(done)


def test_it_builds_with_the_real_tensorrt_rtx(
    onnx_dense: Bundle, onnx_sparse: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    tar = tmp_path / "bundle.tar"
    target = load_target("rtx-4090").model_copy(update={"workspace_mb": 256})
    write_device_bundle(onnx_dense, onnx_sparse, tar, target=target, steps=3)
    place = unpack(tar, tmp_path / "it")
    readme = (place / "README.txt").read_text()
    assert "TensorRT-RTX (module tensorrt_rtx)\n  or TensorRT 10.3 or newer (module ten" in readme
    ahead = ("--only", "build", "--compute-capability", "8.9")
    done = start(place, *ahead)
    assert done.returncode == 0, done.stderr
    plans = sorted(place.glob("work/engines/*/engine.plan"))
    assert len(plans) == 5
    for plan in plans:
        facts = json.loads((plan.parent / "build.json").read_text())
        assert facts["plan_sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
        assert facts["layers_sparse"] is None  # its log does not say
        assert (plan.parent / "build.log").stat().st_size > 1000
    built = {plan: plan.stat().st_mtime_ns for plan in plans}
    shutil.rmtree(plans[0].parent)
    done = start(place, *ahead)
    assert done.stderr.count("] building ") == 1
    assert {p: p.stat().st_mtime_ns for p in plans[1:]} == dict(list(built.items())[1:])


def test_what_cannot_be_packed(
    onnx_dense: Bundle, onnx_sparse: Bundle, engine: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "bundle.tar"

    def refused(dense: Bundle, sparse: Bundle) -> str:
        with pytest.raises((InputError, UsageError, VerificationError)) as error:
            write_device_bundle(dense, sparse, out, target=ORIN)
        assert list(tmp_path.glob("*.tar")) == list(tmp_path.glob(".*")) == []
        return str(error.value)

    assert "swap the two" in refused(onnx_sparse, onnx_dense)
    assert "expected an ONNX bundle, found one of stage engine" in refused(engine, onnx_sparse)
    other = onnx_sparse.manifest.model_copy(
        update={"details": {**onnx_sparse.manifest.details, "dtype": "fp16"}}
    )
    assert "differ in dtype (fp32 and fp16)" in refused(
        onnx_dense, Bundle(onnx_sparse.path, other, onnx_sparse.digest)
    )
    newer = onnx_dense.manifest.model_copy(
        update={"details": {**onnx_dense.manifest.details, "opset": 99}}
    )
    for fact, value in (("upcast_attention", True), ("kept_fp32", {"unet": 1}), ("opset", 17)):
        details = {**onnx_sparse.manifest.details, fact: value}
        changed = onnx_sparse.manifest.model_copy(update={"details": details})
        assert f"differ in {fact} (" in refused(
            onnx_dense, Bundle(onnx_sparse.path, changed, onnx_sparse.digest)
        )
    files = dict(onnx_sparse.manifest.files)
    files["unet/model.onnx"] = files["vae_decoder/model.onnx"]
    changed = onnx_sparse.manifest.model_copy(update={"files": files})
    assert "differ in the graph of unet (" in refused(
        onnx_dense, Bundle(onnx_sparse.path, changed, onnx_sparse.digest)
    )
    assert "are the same bundle" in refused(onnx_sparse, onnx_sparse)
    assert "has no zeros planned; prune the model" in refused(
        onnx_dense, Bundle(onnx_dense.path, onnx_dense.manifest, "another digest")
    )
    assert "has opset 99, Jetson Orin Nano 8 GB reads up to 20" in refused(
        Bundle(onnx_dense.path, newer, onnx_dense.digest), onnx_sparse
    )


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone"])
def test_a_damaged_export_is_not_packed(
    harm: str, onnx_dense: Bundle, onnx_sparse: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(onnx_sparse.path, copy)
    file = copy / "text_encoder" / "config.json"
    data = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes(data[:-1] + b" " if harm == "changed" else data[:-1])
    with pytest.raises((InputError, VerificationError)) as error:
        write_device_bundle(onnx_dense, Bundle.open(copy), tmp_path / "bundle.tar", target=ORIN)
    assert "text_encoder/config.json: is " in str(error.value)
    assert list(tmp_path.iterdir()) == [copy]


def test_the_command(onnx_dense: Bundle, onnx_sparse: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "bundle.tar"
    command = ["device", str(onnx_dense.path), str(onnx_sparse.path), "-o", str(out)]
    done = CliRunner().invoke(cli, [*command, "--target", "jetson-orin-nano", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert said["target"] == "jetson-orin-nano"
    done = CliRunner().invoke(cli, [*command, "--target", "jetson-orin-nano"])
    assert isinstance(done.exception, InputError)
    assert "already exists" in str(done.exception)
    inside = [*command[:-1], str(onnx_dense.path / "new.tar"), "--target", "jetson-orin-nano"]
    done = CliRunner().invoke(cli, inside)
    assert isinstance(done.exception, UsageError)
    assert "lies in the bundle" in str(done.exception)
    onnx_dense.check_files()
    done = CliRunner().invoke(cli, [*command, "--target", "jetson-orin-nano", "--seed", "-1"])
    assert done.exit_code == 2
    assert "-1 is not in the range x>=0" in done.output
    done = CliRunner().invoke(cli, [*command, "--target", "no-such-device"])
    assert isinstance(done.exception, UsageError)
