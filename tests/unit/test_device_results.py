"""What a device brings back is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.device_results import TOLERANCE, is_device_results, read_results
from sdcompress.errors import InputError
from tests.sample_device import SUBJECT

DIGESTS = {"dense": "a" * 64, "sparse": "b" * 64}


def document() -> dict[str, Any]:
    """A results.json as the script writes it. Synthetic: no device has measured these figures."""

    def answer(ms: float) -> dict[str, Any]:
        return {
            "picture": [ms * 10],
            "text_encoder": [ms, ms],
            "unet_step": [ms],
            "vae_decoder": [ms],
            "load": [500.0],
            "device_memory": {"weights": 100, "context": 10, "peak": 120},
            "peak_anonymous_bytes": 1000,
        }

    facts = {
        "plan_bytes": 100,
        "layers_eligible": 10,
        "layers_sparse": 3,
        "log_generation": "10.x",
        "sparse_tactics": [],
        "workspace_mb": 64,
        "optimization_level": None,
        "seconds": 1.0,
    }
    names = ("text_encoder", "unet", "vae_decoder")
    return {
        "kind": "device",
        "version": 1,
        "bundle": "c" * 64,
        "subject": dict(SUBJECT),
        "target": "jetson-orin-nano",
        "engines": {
            twin: {name: {**facts, "plan_sha256": digest} for name in names}
            for twin, digest in DIGESTS.items()
        },
        "checks": [
            {"twin": t, "component": n, "plan": d, "error": 0.001, "tolerance": 0.02}
            for t, d in DIGESTS.items()
            for n in names
        ],
        "answers": {
            "dense": [answer(10), answer(10.2), answer(10.1)],
            "sparse": [answer(8), answer(8.2), answer(8.1)],
            "control": [answer(10.1), answer(10), answer(10.2)],
        },
        "other_residency": {"dense": answer(20), "sparse": None},
        "telemetry": [
            {"process": i, "contestant": c, "sm_clock_mhz": 612.0, "memory_clock_mhz": None,
             "temperature_c": 50.0, "power_w": 9.0, "used_bytes": 300.0}
            for i, c in enumerate(["dense", "sparse", "control"] * 3)
        ],
        "iterations": {"picture": 1, "text_encoder": 2, "unet_step": 1, "vae_decoder": 1},
        "warm_up": 1,
        "setup": {"rounds": 3, "seed": 0, "residency": "resident", "cuda_graph": True,
                  "timer": "CUDA events", "telemetry_from": "NVML", "command": "x"},
        "environment": {"machine": "aarch64", "processor": "Jetson", "cores": 6,
                        "memory_bytes": 8 << 30, "system": "Linux", "python": "3.10.12",
                        "module": "tensorrt", "version": "10.3.0",
                        "gpu": {"name": "Orin", "compute_capability": "8.7", "driver": "12.6",
                                "cuda": "12.6", "free": 1, "total": 2, "pci_bus_id": "0"}},
    }  # fmt: skip


def write(tmp_path: Path, found: object) -> Path:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(found))
    return file


def test_it_becomes_ordinary_results(tmp_path: Path) -> None:
    file = write(tmp_path, document())
    assert is_device_results(file)
    results = read_results(file)
    unet = results.measures["unet_step"]
    assert unet.sparse_to_dense.ratio == pytest.approx(8.1 / 10.1)
    assert unet.sparse_to_dense.verdict == "lower"
    assert results.measures["text_encoder"].dense.iterations == 6
    assert results.control.trustworthy
    sparse = results.engines["sparse"]
    assert sparse.sparse_kernels.model_dump() == {
        "used": 9, "of": 30, "how": "TensorRT's verbose log",
    }  # fmt: skip
    assert sparse.bytes == 300
    assert sparse.plans == dict.fromkeys(("text_encoder", "unet", "vae_decoder"), "b" * 64)
    assert sparse.device_memory is not None
    assert sparse.device_memory.model_dump() == {
        "weights": 100, "context": 10, "peak": 120, "process": 300,
    }  # fmt: skip
    assert sparse.device_memory_sequential is None
    dense = results.engines["dense"]
    assert dense.device_memory_sequential is not None
    assert dense.device_memory_sequential.process is None
    assert dense.peak_memory == {"resident": 1000, "sequential": 1000}
    assert results.environment.accelerator == "Orin, compute capability 8.7"
    assert results.telemetry[1].power_w == 9.0
    assert type(results).model_validate_json(results.model_dump_json()) == results


def _put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(found: dict[str, Any]) -> None:
        *folders, last = path.split(".")
        place: Any = found
        for folder in folders:
            place = place[int(folder) if folder.isdigit() else folder]
        place[int(last) if last.isdigit() else last] = value

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no answers": (lambda d: d.pop("answers"), "answers: is missing"),
    "one contestant": (lambda d: d["answers"].pop("control"), "dense, sparse and control"),
    "a round less": (lambda d: d["answers"]["sparse"].pop(), "not 3 rounds of each contestant"),
    "no rounds": (_put("answers.dense", []), "not 3 rounds"),
    "negative time": (_put("answers.dense.0.unet_step.0", -1.0), "expected more than 0, found -1"),
    "infinite time": (_put("answers.dense.0.unet_step.0", float("inf")), "expected a finite n"),
    "no number": (_put("answers.dense.0.unet_step.0", "fast"), "expected a number, found 'fast'"),
    "no times": (_put("answers.dense.0.unet_step", []), "expected 1 or more entries"),
    "other keys": (_put("answers.dense.0.more", 1), "more: unknown key"),
    "unchecked": (lambda d: d["checks"].pop(), "sparse vae_decoder was not compared"),
    "other plan checked": (_put("checks.0.plan", "f" * 64), "dense text_encoder was not compared"),
    "failed check": (_put("checks.0.error", 0.5), "differs from the golden outputs by 5.0e-01"),
    "a bound of its own": (
        lambda d: d["checks"][0].update(error=0.5, tolerance=1.0),
        "differs from the golden outputs by 5.0e-01",
    ),
    "no engine": (lambda d: d["engines"]["dense"].pop("unet"), "the dense engines are not"),
    "no digest": (_put("engines.dense.unet.plan_sha256", "../.."), "expected text of the form"),
    "escape codes": (_put("environment.processor", "\x1b[31mred"), "expected text of the form"),
    "long text": (_put("subject.model", "x" * 2000), "expected 1000 characters or fewer, found"),
    "other version": (_put("version", 2), "version: expected 1, found 2"),
    "many rounds": (_put("setup.rounds", 10**9), "expected 10000 or less, found 1000000000"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_line(name: str, tmp_path: Path) -> None:
    change, words = HOSTILE[name]
    found = document()
    change(found)
    file = write(tmp_path, found)
    with pytest.raises(InputError) as error:
        read_results(file)
    message = str(error.value)
    assert words in message
    assert message.isprintable()
    assert message.endswith("; copy it again")


def test_the_bound_is_that_of_the_host() -> None:
    from export.parity import PARITY_TOLERANCE

    assert TOLERANCE == PARITY_TOLERANCE["fp16"] == 0.02


def test_truncated_missing_and_foreign_files(tmp_path: Path) -> None:
    file = write(tmp_path, document())
    file.write_text(file.read_text()[:-50])
    assert not is_device_results(file)
    with pytest.raises(InputError, match="not the complete results of a device .*Invalid JSON"):
        read_results(file)
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        read_results(tmp_path / "none")
    for text in ("[" * 100_000, "[]", "{}", '{"kind": 1}', "\xff\xfe"):
        file.write_text(text)
        assert not is_device_results(file)
    file.write_bytes(b"\xff\xfe\x00")
    assert not is_device_results(file)
    with pytest.raises(InputError):
        read_results(file)


def test_very_large_files_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with file.open("wb") as f:
        f.truncate((64 << 20) + 1)
    assert not is_device_results(file)
    with pytest.raises(InputError, match="larger than 64 MiB"):
        read_results(file)
