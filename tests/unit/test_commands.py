"""What the command line says and refuses before it does any work."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sdcompress.bundle import MANIFEST, Bundle
from sdcompress.commands import _interrupted, _unexpected, _warn, cli, doctor
from sdcompress.commands._common import emit, open_model
from sdcompress.errors import InputError, UsageError


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    fix = doctor.PACKAGES["onnxruntime-gpu"]
    finding = doctor.Finding(name="a [b]", state="not installed", ok=False, fix=fix)
    output = doctor.Output(ok=True, findings=[finding])
    emit(output, False, lambda console: doctor._show(console, output))
    assert "a [b]: not installed  (pip install 'sdcompress[gpu]')" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_was_freed_is_used_again() -> None:
    """Counted in a process of its own: faults of pages while arrays come and go in a thread."""
    code = """
import resource, sys, threading
import numpy as np
from sdcompress import commands
if sys.argv[1] == "keep":
    commands._keep_freed_memory()
def work():
    for _ in range(50):
        [np.ones(1 << 21, np.uint8) for _ in range(8)]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""
    kept, plain = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, how], capture_output=True, check=True
            ).stdout
        )
        for how in ("keep", "plain")
    )
    assert kept < plain / 5


def test_an_interruption_promises_only_what_is_true() -> None:
    assert "goes on" in _interrupted(["--debug", "run", "demo"])
    assert _interrupted(["prune", "run"]) == "interrupted; nothing was half-written"


def raised(kind: str) -> BaseException:
    """An error as a library raises it while, or because, the system has refused something."""
    full = OSError(errno.ENOSPC, "No space left on device", "/x")
    missing = OSError(errno.ENOENT, "No such file or directory", "/x")
    try:
        try:
            raise missing if "missing" in kind else full
        except OSError as e:
            if kind.startswith("from"):
                raise ValueError("broken") from e
            if kind.startswith("hiding"):
                raise ValueError("broken") from None
            raise ValueError("broken")  # noqa: B904  # the case that is tested
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("from full", "/x: No space left on device; free some space"),
        ("from missing", "/x: No such file or directory; check the path and its permissions"),
        ("during full", "/x: No space left on device; free some space"),
        ("during missing", "ValueError: broken; this is a bug"),
        ("hiding full", "ValueError: broken; this is a bug"),
    ],
)
def test_an_unexpected_error_is_put_down_to_its_cause(kind: str, message: str) -> None:
    assert _unexpected(raised(kind)).startswith(message)


def test_the_shipped_model_is_not_hidden_by_a_folder(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdcompress.models import sources

    (tmp_path / "mini-sd2").mkdir()
    (tmp_path / "mini-sd2" / MANIFEST).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_mini_sd2", lambda: tiny_sd)
    assert open_model("mini-sd2").manifest.source.kind == "mini-sd2"


def test_a_malformed_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(click.BadParameter, match="x=, found"):
        cli.main(["build", "onnx", "-o", "engine", "--option", "x=[1"], standalone_mode=False)


@pytest.mark.parametrize("command", [["bench", "a", "b"], ["export", "a", "--calibrate", "2"]])
def test_an_output_that_exists_is_refused_before_anything(
    command: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="already exists; choose another --output"):
        cli.main([*command, "-o", str(tmp_path)], standalone_mode=False)


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "mini-sd2", "-o"],
        ["run", "edge", "-o"],
        ["eval", "a", "--against", "b", "--keep-images"],
    ],
)
def test_what_goes_into_a_bundle_is_refused_before_anything(
    command: list[str], pruned: Bundle
) -> None:
    for place in ("", "new", "unet/new"):
        with pytest.raises((UsageError, InputError), match="lies in the bundle"):
            cli.main([*command, str(pruned.path / place)], standalone_mode=False)
    pruned.check_files()


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize(
    "command",
    [
        ["bench", "a", "b", "-o", "r.json", "--budget"],
        ["bench", "a", "b", "-o", "r.json", "--guidance"],
        ["generate", "a", "--prompt", "p", "-o", "out", "--guidance"],
        ["export", "a", "-o", "out", "--calibrate", "1", "--guidance"],
    ],
)
def test_numbers_are_finite_and_in_range(command: list[str], value: str) -> None:
    with pytest.raises(click.BadParameter, match="not a finite number|not in the range"):
        cli.main([*command, value], standalone_mode=False)


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    _warn(UserWarning("the picture is cut"), UserWarning, "/somewhere/file.py", 12)
    assert capsys.readouterr().err == "sdcompress: warning: the picture is cut\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--height", "65"], "height 65 does not fit"), (["--prompt", "\udcff"], "not valid text")],
)
def test_what_no_picture_can_be_made_of(
    tiny_sd: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "pictures"
    command = ["generate", str(tiny_sd), "--prompt", "a red cat", "-o", str(out), *options]
    with pytest.raises(UsageError, match=message):
        cli.main(command, standalone_mode=False)
    assert not out.exists()


def engine(path: Path, model: str, zeros: int) -> Bundle:
    """What an engine's manifest says, and nothing that runs."""
    from export.specs import COMPONENTS
    from sdcompress.bundle import Manifest, SourceRecord, seal
    from sdcompress.plan import LayerPlan, SparsityPlan

    for component in COMPONENTS:
        (path / component).mkdir(parents=True)
        (path / component / "config.json").write_text("{}")
    layer = LayerPlan(
        component="unet", name="a.weight", kind="linear", shape=(4, 4), dtype="F32", zeros=zeros
    )
    plan = SparsityPlan(layers=(layer,), parameters={"unet": 16})
    source = SourceRecord(id=model, kind="directory")
    seal(path, Manifest(stage="engine", parent=None, source=source, tools={}, plan=plan))
    return Bundle.open(path)


def test_engines_that_cannot_be_compared(tmp_path: Path) -> None:
    from export.bench import _check_comparable

    dense = engine(tmp_path / "dense", "a", 0)
    sparse = engine(tmp_path / "sparse", "a", 8)
    _check_comparable(dense, sparse)
    _check_comparable(dense, dense)
    with pytest.raises(UsageError, match="swap the two"):
        _check_comparable(sparse, dense)
    with pytest.raises(UsageError, match=r"different models \(a and b\)"):
        _check_comparable(dense, engine(tmp_path / "other", "b", 8))


def test_a_driver_that_hangs_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    import subprocess

    from export.bench import _accelerator

    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(subprocess, "run", hang)
    assert _accelerator() is None
