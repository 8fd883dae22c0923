"""What benchmarks/pack keeps, skips and cuts; the commands themselves are tested elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.pack import measure

FILE = "unet/model.safetensors"
TENSORS = {
    "embedding": torch.arange(1000.0),
    "first": torch.arange(20.0).reshape(4, 5),
    "second": torch.zeros(30),
    "third": torch.ones(500),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    save_file(TENSORS, tmp_path / "model" / FILE)
    return tmp_path / "model"


def test_a_cut_is_a_file_of_the_first_tensors_that_fit(model: Path, tmp_path: Path) -> None:
    measure.cut_file(model / FILE, tmp_path / "cut", 250)
    found = load_file(tmp_path / "cut")
    assert set(found) == {"first", "second"}
    assert torch.equal(found["first"], TENSORS["first"])
    assert torch.equal(found["second"], TENSORS["second"])


def test_what_is_known_is_not_measured_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PEERS", {"zstd -19": ["cat"], "xz -6": ["no-such-command"]})
    (tmp_path / "README.md").write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    command = [f"dense={model}", "--work", str(tmp_path / "w"), "--out", str(tmp_path)]
    command += ["--part", "peers", "--file", FILE]
    with pytest.raises(FileNotFoundError):
        measure.main(command)
    size = (model / FILE).stat().st_size
    monkeypatch.setattr(measure, "PEERS", {"zstd -19": ["no-such-command"], "xz -6": ["cat"]})
    measure.main(command)  # goes on with what was missing
    known = json.loads((tmp_path / "w" / "answers.json").read_text())["dense"]["peers"][FILE]
    assert known["zstd -19"]["bytes"] == known["xz -6"]["bytes"] == known["original_bytes"] == size
    readme = (tmp_path / "README.md").read_text()
    assert f"| dense: {FILE} |" in readme
    assert (readme.startswith("before\n"), readme.endswith("\nafter\n")) == (True, True)
    assert "old" not in readme
    save_file({"other": torch.zeros(9)}, model / FILE)  # another model under the same name
    with pytest.raises(FileNotFoundError):
        measure.main(command)


def test_a_round_packs_unpacks_and_copies(tiny_sd: Path, tmp_path: Path) -> None:
    found = measure.one_round(tiny_sd, tmp_path)
    assert {"pack", "unpack", "cp", "sizes"} == set(found)
    assert found["sizes"]["packed_bytes"] < found["sizes"]["original_bytes"]
    assert min(found[what]["seconds"] for what in ("pack", "unpack", "cp")) > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "said.json"]
