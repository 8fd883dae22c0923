"""Bundles are written whole or not at all, and say so when they have been touched."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdcompress import bundle
from sdcompress.bundle import (
    MANIFEST,
    PACK,
    Bundle,
    SourceRecord,
    link_or_copy,
    proving,
    refuse_existing,
    staging,
    write_text,
)
from sdcompress.errors import InputError, UsageError, VerificationError
from sdcompress.models.sources import resolve


def test_a_bundle_checks_its_files(pruned: Bundle, tmp_path: Path) -> None:
    pruned.check_files()
    for change, message in (
        (lambda p: (p / "LICENSE").unlink(), "LICENSE is missing"),
        (lambda p: (p / "extra.txt").write_text("x"), "extra.txt is not in the manifest"),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(pruned.path, copy)
        change(copy)
        with pytest.raises(VerificationError, match=message):
            Bundle.open(copy).check_files()
    shutil.rmtree(copy)
    shutil.copytree(pruned.path, copy)
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(VerificationError, match="diffusion_pytorch_model.safetensors is not"):
        Bundle.open(copy).check_files()


def test_a_source_is_hashed_once_and_not_before_its_files_are_asked_for(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = bundle.sha256_file
    monkeypatch.setattr(bundle, "sha256_file", lambda f: hashed.append(f.name) or real(f))
    source = Bundle.of_source(tiny_sd, SourceRecord(id="tiny-sd", kind="directory"))
    assert source.outline.stage == "source"
    assert source.outline.files == {}
    assert not hashed
    with ThreadPoolExecutor(4) as pool:
        digests = {*pool.map(lambda _: source.digest, range(8))}
    assert len(digests) == 1
    assert sorted(hashed) == sorted(Path(name).name for name in source.manifest.files)
    assert "diffusion_pytorch_model.safetensors" in hashed
    monkeypatch.setattr(bundle, "sha256_file", None)
    assert pickle.loads(pickle.dumps(source)).digest == source.digest
    monkeypatch.undo()
    another = Bundle.of_source(tiny_sd, SourceRecord(id="another", kind="directory"))
    assert another.digest not in digests


def _copy(bundle: Bundle, target: Path) -> Path:
    shutil.copytree(bundle.path, target)
    return target / "unet/diffusion_pytorch_model.safetensors"


def _flip(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def test_a_bundle_may_be_checked_later_and_gives_no_digest_before(
    pruned: Bundle, tmp_path: Path
) -> None:
    weights = _copy(pruned, tmp_path / "copy")
    whole = Bundle.open(tmp_path / "copy", check=True)
    assert (whole.digest, whole.manifest) == (pruned.digest, pruned.manifest)
    _flip(weights)
    changed = Bundle.open(tmp_path / "copy", check=True)
    assert changed.outline == pruned.manifest
    changed.check_listing()
    for ask in (lambda: changed.digest, lambda: changed.manifest, changed.check_files):
        with pytest.raises(VerificationError, match=r"safetensors is not the file the manifest"):
            ask()


def test_what_was_damaged_is_said_whatever_came_of_it(pruned: Bundle, tmp_path: Path) -> None:
    weights = _copy(pruned, tmp_path / "copy")
    with (
        pytest.raises(InputError, match="something else"),
        proving(Bundle.open(tmp_path / "copy", check=True)),
    ):
        raise InputError("something else")
    _flip(weights)
    for error in (InputError("NaN"), ZeroDivisionError("of a library")):
        with (
            pytest.raises(VerificationError, match="is not the file the manifest describes"),
            proving(Bundle.open(tmp_path / "copy", check=True)),
        ):
            raise error


def test_a_source_has_nothing_to_be_held_against(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd, tmp_path / "model")
    (tmp_path / "model/stray.ckpt").write_text("of no pipeline")
    source = Bundle.of_source(tmp_path / "model", SourceRecord(id="m", kind="directory"))
    for _ in range(2):  # hashed beside the block, and before it
        with pytest.raises(InputError, match="NaN"), proving(source):
            raise InputError("NaN")
        source.prove()


def test_a_file_that_was_cut_is_found_without_reading_it(pruned: Bundle, tmp_path: Path) -> None:
    weights = _copy(pruned, tmp_path / "copy")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="is not the file the manifest describes"):
        Bundle.open(tmp_path / "copy").check_listing()


def test_a_folder_that_is_no_pipeline_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model_index\.json"):
        Bundle.of_source(tmp_path, SourceRecord(id="nothing", kind="directory"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 1}', "\x00"])
def test_a_bad_manifest_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="not a manifest this version understands") as caught:
        Bundle.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_wrong_stage_says_what_to_do(pruned: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a bundle of stage onnx, found pruned; run"):
        Bundle.open(pruned.path, stages=("onnx",))
    with pytest.raises(InputError, match="no readable manifest"):
        Bundle.open(tmp_path)


def test_staging_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), staging(target) as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staging(target) as work:
        (work / "whole").write_text("x")
        assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="already exists"), staging(target):
        pass
    with staging(target, replace=True) as work:
        (work / "new").write_text("y")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_is_refused_before_slow_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_existing(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is not a folder that can be written to"):
        refuse_existing(tmp_path / "file" / "out")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="out: cannot be created, .* choose another --output"):
        refuse_existing(tmp_path / "out")


def test_staging_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staging(target) as work:
        (work / "old").write_text("x")
    with pytest.raises(RuntimeError), staging(target, replace=True):
        raise RuntimeError
    assert (target / "old").exists()


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already exists"), staging(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").write_text("x")
    assert (tmp_path / "out/precious").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_staging_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with staging(tmp_path / "out", replace=True) as work:
        (work / "new").write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]


def test_staging_clears_up_after_the_dead_but_not_the_living(tmp_path: Path) -> None:
    (tmp_path / ".out[1].partial-dead").mkdir()
    with staging(tmp_path / "out[1]") as first:
        assert not (tmp_path / ".out[1].partial-dead").exists()
        with staging(tmp_path / "out[1]", replace=True) as second:
            assert first.exists()
            assert second != first


def test_an_output_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be created"), staging(tmp_path / "file" / "out"):
        pass


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1")
    write_text(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_linking_follows_links_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "snapshot").symlink_to("blob")
    link_or_copy(tmp_path / "snapshot", tmp_path / "bundle" / "file")
    assert not (tmp_path / "bundle" / "file").is_symlink()
    assert (tmp_path / "bundle" / "file").samefile(tmp_path / "blob")


def test_nothing_is_put_into_a_bundle(pruned: Bundle) -> None:
    for inside in ("new", "unet/new", "a/b/c"):
        with pytest.raises(UsageError, match=r"lies in the bundle .* choose another place"):
            refuse_existing(pruned.path / inside)
    pruned.check_files()


def test_a_manifest_of_something_else_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"name": "an extension of a browser"}')
    refuse_existing(tmp_path / "new")


def test_what_is_no_bundle_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no such file or directory"):
        Bundle.open(tmp_path / "nowhere")
    (tmp_path / "m.sdz").write_bytes(PACK)
    with pytest.raises(InputError, match="found a pack; run `sdcompress unpack` on it first"):
        Bundle.open(tmp_path / "m.sdz")
    with pytest.raises(InputError, match="expected mini-sd2, .* found a pack; run"):
        resolve(str(tmp_path / "m.sdz"))
