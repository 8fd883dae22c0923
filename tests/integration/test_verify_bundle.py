"""What `verify` proves, and that each way a bundle can be wrong fails the check it should fail."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.to_onnx import MODEL, export_bundle
from export.verify import verify_bundle
from export.weight_map import DATA, WEIGHT_MAP, Entry, WeightMap
from sdcompress.bundle import Bundle, seal
from sdcompress.errors import InputError
from sdcompress.prune import record_tensor
from sdcompress.results import VerifyReport

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
TWIN = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
CONV = "mid_block.resnets.0.conv1.weight"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def exported(pruned: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(pruned, tmp_path_factory.mktemp("export") / "fp16", dtype="fp16")


def tampered(bundle: Bundle, out: Path, edit: Callable[[Path], object]) -> Path:
    """A copy with `edit` applied and file digests made to fit: only the contents can tell."""
    shutil.copytree(bundle.path, out)
    edit(out)
    seal(out, bundle.manifest)
    return out


def failed(report: VerifyReport) -> dict[str, tuple[str, ...]]:
    return {check.name: check.tensors for check in report.checks if not check.passed}


def names(tensors: tuple[str, ...]) -> list[str]:
    return [tensor.split()[0] for tensor in tensors]


def edit_data(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """An edit of the UNet's external data, given as state dict in its own layout."""

    def edit(bundle: Path) -> None:
        data = np.memmap(bundle / "unet" / DATA, np.uint8, "r+")
        state, entries = {}, WeightMap.read(bundle / "unet").by_key()
        for key, (entry, *_) in entries.items():
            state[key] = entry.to_key(stored(data, entry)).copy()
        change(state)
        for key, places in entries.items():
            for entry in places:
                stored(data, entry)[:] = entry.from_key(state[key])
        data.flush()

    return edit


def stored(data: np.ndarray, entry: Entry) -> np.ndarray:
    raw = data[entry.offset : entry.offset + entry.nbytes]
    return raw.view(np.float16).reshape(entry.shape)


def edit_weights(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """The same edit of a bundle of weights."""

    def edit(bundle: Path) -> None:
        state = {k: w.numpy() for k, w in load_file(bundle / WEIGHTS).items()}
        change(state)
        (bundle / WEIGHTS).unlink()  # it may be a link
        save_file({k: torch.from_numpy(w.copy()) for k, w in state.items()}, bundle / WEIGHTS)

    return edit


def flip_a_group(state: dict[str, np.ndarray]) -> None:
    """Of one group of four, keep the two that were dropped and drop the two that were kept."""
    weight = state[LINEAR]
    row, group = np.argwhere((weight.reshape(len(weight), -1, 4) == 0).sum(-1) == 2)[0]
    four = weight[row, 4 * group : 4 * group + 4]
    four[:] = np.where(four == 0, 1, 0)


def swap_two_tensors(state: dict[str, np.ndarray]) -> None:
    state[LINEAR], state[TWIN] = state[TWIN], state[LINEAR]


def make_dense(state: dict[str, np.ndarray]) -> None:
    for weight in state.values():
        weight[weight == 0] = 0.5


def flatten_the_conv(state: dict[str, np.ndarray]) -> None:
    """2:4 on [K, C*R*S], as ports of SparseGPT and Wanda do: the same number of zeros."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.1, 1, state[CONV].shape).astype(state[CONV].dtype)
    groups = weight.reshape(-1, 4)
    np.put_along_axis(groups, groups.argsort(-1)[:, :2], 0, -1)
    state[CONV] = groups.reshape(weight.shape)


EDITS = pytest.mark.parametrize(
    ("edit", "check", "tensors"),
    [
        (flip_a_group, "zeros", [LINEAR]),
        (swap_two_tensors, "values", [LINEAR, TWIN]),
        (flatten_the_conv, "pattern", [CONV]),
    ],
)


def test_a_sound_export_passes_every_check(exported: Bundle, pruned: Bundle) -> None:
    report = verify_bundle(exported.path, against=pruned.path)
    assert failed(report) == {}
    assert report.passed
    by_name = {check.name: check for check in report.checks}
    assert {"zeros", "pattern", "dtypes", "values", "against", "parity unet"} <= set(by_name)
    assert by_name["parity unet"].tolerance is not None


def test_sound_weights_pass(pruned: Bundle) -> None:
    assert failed(verify_bundle(pruned.path)) == {}


@EDITS
def test_a_wrong_export_fails(
    exported: Bundle,
    tmp_path: Path,
    edit: Callable[[dict[str, np.ndarray]], None],
    check: str,
    tensors: list[str],
) -> None:
    path = tampered(exported, tmp_path / "wrong", edit_data(edit))
    report = verify_bundle(path, parity=False)
    assert not report.passed
    assert names(failed(report)[check]) == sorted(f"unet/{tensor}" for tensor in tensors)


@EDITS
def test_wrong_weights_fail(
    pruned: Bundle,
    tmp_path: Path,
    edit: Callable[[dict[str, np.ndarray]], None],
    check: str,
    tensors: list[str],
) -> None:
    path = tampered(pruned, tmp_path / "wrong", edit_weights(edit))
    assert names(failed(verify_bundle(path))[check]) == sorted(f"unet/{t}" for t in tensors)


def test_a_dense_model_fails(exported: Bundle, pruned: Bundle, tmp_path: Path) -> None:
    for bundle, edit in ((exported, edit_data), (pruned, edit_weights)):
        path = tampered(bundle, tmp_path / bundle.manifest.stage, edit(make_dense))
        wrong = failed(verify_bundle(path, parity=False))
        assert {"zeros", "pattern", "values"} <= set(wrong)
        assert all(name.startswith("unet/") for name in wrong["zeros"])


def test_the_command_exits_3_and_names_the_tensors(pruned: Bundle, tmp_path: Path) -> None:
    path = tampered(pruned, tmp_path / "swapped", edit_weights(swap_two_tensors))
    run = "from sdcompress.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", run, "verify", str(path), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert LINEAR in done.stdout
    assert TWIN in done.stdout


def test_zeros_on_the_flattened_axis_fail_even_if_recorded(pruned: Bundle, tmp_path: Path) -> None:
    """A criterion that chooses groups wrongly records them faithfully; the axis tells."""
    out = tmp_path / "flattened"
    path = tampered(pruned, out, edit_weights(flatten_the_conv))
    weight = load_file(path / WEIGHTS)[CONV]
    records = dict(pruned.manifest.tensors)
    records["unet"] = {**records["unet"], CONV: record_tensor(weight, "F32", pruned=True)}
    seal(path, pruned.manifest.model_copy(update={"tensors": records}))
    assert list(failed(verify_bundle(path))) == ["pattern"]


def test_changed_weights_do_not_pass_as_their_parents(pruned: Bundle, tmp_path: Path) -> None:
    path = tampered(pruned, tmp_path / "other", edit_weights(swap_two_tensors))
    report = verify_bundle(pruned.path, against=path)
    assert set(failed(report)) == {"lineage", "against"}


def test_nan_fails(exported: Bundle, tmp_path: Path) -> None:
    def poison(state: dict[str, np.ndarray]) -> None:
        state["conv_out.bias"][0] = np.nan

    report = verify_bundle(tampered(exported, tmp_path / "nan", edit_data(poison)))
    assert failed(report)["finite"] == ("unet/conv_out.bias",)
    assert {"parity unet", "range unet"} <= set(failed(report))


def test_a_changed_file_fails_by_its_digest(exported: Bundle, tmp_path: Path) -> None:
    shutil.copytree(exported.path, tmp_path / "changed")
    with (tmp_path / "changed" / "README.md").open("a") as f:
        f.write("!")
    assert set(failed(verify_bundle(tmp_path / "changed", parity=False))) == {"files"}


def test_another_dtype_than_asked_fails(exported: Bundle, tmp_path: Path) -> None:
    shutil.copytree(exported.path, tmp_path / "asked")
    asked = {**exported.manifest.details, "dtype": "fp32"}
    seal(tmp_path / "asked", exported.manifest.model_copy(update={"details": asked}))
    assert "graph" in failed(verify_bundle(tmp_path / "asked", parity=False))


# Exports that cannot be read: one clear line, never a failed check.


def edit_graph(change: Callable[[onnx.TensorProto], None]) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        model = onnx.load(bundle / "unet" / MODEL, load_external_data=False)
        change(next(t for t in model.graph.initializer if t.external_data))
        (bundle / "unet" / MODEL).write_bytes(model.SerializeToString())

    return edit


def relocate(location: str) -> Callable[[Path], None]:
    def change(tensor: onnx.TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location

    return edit_graph(change)


def link_outside(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    (bundle / "unet" / DATA).rename(outside)
    (bundle / "unet" / DATA).symlink_to(outside)


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        raw = (bundle / "unet" / name).read_bytes()
        (bundle / "unet" / name).write_bytes(raw[: int(len(raw) * keep)])

    return edit


def delete(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / "unet" / name).unlink()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (delete(DATA), "found no file"),
        (truncate(DATA, 0.5), "it is truncated"),
        (relocate("../text_encoder/model.onnx_data"), "in the same directory"),
        (relocate("/etc/passwd"), "in the same directory"),
        (link_outside, "in the same directory"),
        (truncate(MODEL, 0.5), "expected an ONNX graph"),
        (delete(MODEL), "expected an ONNX graph"),
        (truncate(WEIGHT_MAP, 0.5), "expected the weight map"),
        (delete("config.json"), "expected the component's configuration"),
    ],
)
def test_an_unreadable_export_is_refused(
    exported: Bundle, tmp_path: Path, edit: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(exported.path, tmp_path / "broken")
    edit(tmp_path / "broken")
    with pytest.raises(InputError, match=message) as caught:
        verify_bundle(tmp_path / "broken")
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(pruned: Bundle, tmp_path: Path) -> None:
    shutil.copytree(pruned.path, tmp_path / "broken")
    raw = (tmp_path / "broken" / WEIGHTS).read_bytes()
    (tmp_path / "broken" / WEIGHTS).unlink()
    (tmp_path / "broken" / WEIGHTS).write_bytes(raw[:-100])
    with pytest.raises(InputError, match="truncated"):
        verify_bundle(tmp_path / "broken")


def test_polygraphy_finds_the_same_sparse_tensors(exported: Bundle) -> None:
    """An independent checker; it reads the axis off the graph's operators."""
    pytest.importorskip("polygraphy")
    run = "from polygraphy.tools import main; main()"
    model = str(exported.path / "unet" / MODEL)
    done = subprocess.run(
        [sys.executable, "-c", run, "inspect", "sparsity", model],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sparse = set(re.findall(r"Found sparse tensor: (\S+)", done.stdout))
    dense = set(re.findall(r"Found non-sparse tensor: (\S+)", done.stdout))
    plan = exported.manifest.plan
    assert plan is not None
    planned = {p.name for p in plan.of("unet") if p.pattern == "2:4" and p.pruned}
    entries = WeightMap.read(exported.path / "unet").initializers
    assert {entries[name].key for name in sparse} == planned
    assert dense == {"conv_in.weight"}
