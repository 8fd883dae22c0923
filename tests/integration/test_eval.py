"""`sdcompress eval` from the command line: kept, killed, shared among processes, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.commands import cli
from sdcompress.commands.eval import _remark
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.quality import Quality
from sdcompress.models.mini_sd2 import WEIGHTS

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The bytes of a picture depend on the number of threads; processes below run one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def command(
    pruned: Bundle, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """The arguments of an evaluation of 9 prompts in batches of 2, and whatever is added."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("".join(f"a red cat {i}\n" for i in range(9)))
    start = ["eval", pruned.path, "--against", tiny_sd, "--prompts", prompts, "--metric", "psnr"]
    start += ["--samples", 9, "--steps", 4, "--batch", 2]
    return lambda *more: [str(argument) for argument in (*start, *more)]


def run(arguments: list[str]) -> None:
    cli.main(arguments, standalone_mode=False)


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def undisturbed(
    command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    run(command("--keep-images", folder))
    torch.set_num_threads(threads)
    found = pictures(folder)
    assert len(found) == 3 * (9 + 1)
    return found


def test_a_document_and_nothing_else_is_left(
    command: Callable[..., list[str]],
    pruned: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cache: Path,
) -> None:
    out = tmp_path / "new" / "quality.json"
    run(command("-o", out, "--json"))
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    quality = Quality.model_validate_json(printed)
    jsonschema.validate(json.loads(printed), Quality.model_json_schema(mode="serialization"))
    assert quality.model == pruned.digest
    assert quality.metrics["psnr"].samples == 9
    assert list(tmp_path.rglob("*")) == [out.parent, out]
    with pytest.raises(InputError, match="quality.json: already exists"):
        run(command("-o", out))

    run(command())  # for people, without a file
    table = capsys.readouterr().out
    assert "9 prompts, 4 steps, guidance 7.5, seed 0" in table
    assert f"{quality.metrics['psnr'].model.value:.2f} [" in table
    assert not list((cache / "eval").iterdir())


def test_a_killed_evaluation_goes_on(
    command: Callable[..., list[str]], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "quality.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sdcompress", *command("-o", out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = tmp_path / ".quality.json.work"
    deadline = time.monotonic() + 120
    while len(list(work.rglob("*.png"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    kept = {name: data for name, data in pictures(work).items() if name.endswith(".png")}
    assert 5 <= len(kept) < 27
    assert not out.exists()
    assert all(undisturbed[name] == data for name, data in kept.items() if "partial" not in name)
    before = {f: f.stat().st_mtime_ns for f in work.rglob("0000[01].png")}
    seen: dict[str, bytes] = {}

    from sdcompress.evaluation import quality

    measure = quality._measure

    def look(*arguments: object) -> object:
        seen.update(pictures(work))
        assert {f: f.stat().st_mtime_ns for f in before} == before  # made once
        return measure(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_measure", look)
        run(command("-o", out))
    assert seen == undisturbed
    assert list(tmp_path.iterdir()) == [out]


# The command, and a note of which process makes a picture.
NOTED = """\
import os, sys
from pathlib import Path

from sdcompress.commands import main
from sdcompress.evaluation.pictures import Pictures

write = Pictures.write


def noted(self, index, levels):
    Path(__file__).with_name("made-by-" + os.environ["RANK"]).touch()
    write(self, index, levels)


Pictures.write = noted
main()
"""


def test_two_processes_make_what_one_makes(
    command: Callable[..., list[str]], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    script = tmp_path / "noted.py"
    script.write_text(NOTED)
    # Without a GPU these are processes on the CPU; with --cpu there would be one.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", str(script)]
    kept, out = tmp_path / "kept", tmp_path / "quality.json"
    done = subprocess.run(
        [sys.executable, "-m", *launch, *command("--keep-images", kept, "-o", out, "--json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(f.name for f in tmp_path.glob("made-by-*")) == ["made-by-0", "made-by-1"]
    assert pictures(kept) == undisturbed
    assert Quality.model_validate_json(done.stdout).metrics["psnr"].samples == 9  # printed once
    assert out.read_text() == done.stdout


def test_what_is_refused(command: Callable[..., list[str]], tiny_sd: Path, tmp_path: Path) -> None:
    def refused(*more: object) -> str:
        out = tmp_path / "q.json"
        with pytest.raises(UsageError) as error:
            run(command("-o", out, *more))
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    assert "10 samples need as many prompts, found 9" in refused("--samples", 10)
    assert "prompts in UTF-8" in refused("--prompts", tiny_sd)
    assert "describes none" in refused("--metric", "prompt_accuracy")
    assert "no such directory" in refused("--metric", "clip_score", "--clip", "./no-clip")
    assert "ramesh-zhao-2024 needs its data" in refused("--preset", "ramesh-zhao-2024")
    assert "height 12 does not fit" in refused("--height", 12)


def test_a_clip_that_is_asked_for_has_to_be_there(
    pruned: Bundle, tiny_sd: Path, tmp_path: Path
) -> None:
    start = ["eval", str(pruned.path), "--against", str(tiny_sd), "--samples", "2"]
    with pytest.raises(UsageError, match="clip_score: .*no such directory"):
        run([*start, "--clip", "./no-clip", "-o", str(tmp_path / "q.json")])
    assert list(tmp_path.iterdir()) == []


def test_an_unrelated_model_is_remarked_on(
    pruned: Bundle, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _remark(pruned, Bundle.of_source(tiny_sd, SourceRecord(id="a copy", kind="directory")))
    assert capsys.readouterr().err == ""
    _remark(pruned, Bundle.of_source(WEIGHTS, SourceRecord(id="mini-sd2", kind="mini-sd2")))
    assert "is not the model that" in capsys.readouterr().err
    _remark(pruned, pruned)
    assert "found a pruned bundle; figures are of these two all the same" in capsys.readouterr().err
