"""Timing and memory of one engine, with components that only pretend."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export import bench_worker
from export.backends import Runner, Tensor
from export.bench import _device_memory, _telemetry
from export.bench_worker import CUDA_EVENTS, WALL_CLOCK, DevicePeak, Stages
from export.residency import Components, Residency

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "text_encoder": ("last_hidden_state", (2, 3, 8)),
    "unet": ("out_sample", (2, 4, 2, 2)),
    "vae_decoder": ("sample", (1, 3, 4, 4)),
}
JOB: dict[str, Any] = {
    "steps": [{"timestep": 9.0, "a": 1.0, "b": 0.5}, {"timestep": 1.0, "a": 1.0, "b": 0.5}],
    "guidance": 2.0,
    "scaling_factor": 1.0,
    "token_ids": [[0, 1, 2], [0, 1, 3]],
    "seed": 0,
    "latent_shape": [4, 2, 2],
}
ONCE = dict.fromkeys(("text_encoder", "unet_step", "vae_decoder", "picture"), 1)


class Pretended(Runner):
    """A component on a GPU whose every run takes 5 ms and which notes what happens to it."""

    inputs = {"timestep": Tensor(np.dtype(np.int64), ())}  # noqa: RUF012
    log: list[str]
    events: float | None = 5.0

    def __init__(self, name: str) -> None:
        self._name = name

    def load(self) -> None:
        self.log.append(f"load {self._name}")

    def close(self) -> None:
        self.log.append(f"close {self._name}")

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.log.append(self._name)
        self.gpu_milliseconds = self.events
        name, shape = SHAPES[self._name]
        return {name: np.zeros(shape, np.float32)}

    def device_memory(self) -> dict[str, int]:
        size = {"text_encoder": 10, "unet": 30, "vae_decoder": 20}[self._name]
        return {"weights": size, "context": 100 - size}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(Pretended, "log", seen, raising=False)
    return seen


def test_all_components_stay_loaded(log: list[str]) -> None:
    with Components(Pretended, "resident") as components:
        stages = Stages(JOB, components)
        stages.picture(check=True)
        assert log[:3] == ["load text_encoder", "load unet", "load vae_decoder"]
        assert log[3:] == ["text_encoder", "unet", "unet", "vae_decoder"]
        assert stages.device_memory(None) == {"weights": 60, "context": 240}
        assert stages.device_memory(7) == {"weights": 60, "context": 240, "peak": 7}
        assert set(components.load_seconds) == {"text_encoder", "unet", "vae_decoder"}


def test_one_component_at_a_time(log: list[str]) -> None:
    with Components(Pretended, "sequential") as components:
        stages = Stages(JOB, components)
        stages.picture(check=True)
        assert log == [
            *("load text_encoder", "text_encoder", "close text_encoder"),
            *("load unet", "unet", "unet", "close unet"),
            *("load vae_decoder", "vae_decoder", "close vae_decoder"),
        ]
        assert stages.device_memory(None) == {"weights": 30, "context": 90}


@pytest.mark.parametrize(("residency", "first"), [("resident", 0), ("sequential", 1)])
def test_components_are_timed_by_events_and_pictures_by_the_clock(
    log: list[str], residency: Residency, first: int
) -> None:
    with Components(Pretended, residency) as components:
        stages = Stages(JOB, components)
        stages.picture()
        log.clear()
        result = stages.timed({**ONCE, "unet_step": 3}, warm_up=2)
    assert result["timer"] == CUDA_EVENTS
    assert result["text_encoder"] == result["vae_decoder"] == [5.0]
    assert result["unet_step"] == [5.0, 5.0, 5.0]
    assert 0 < result["picture"][0] < 5
    # Warm-ups, the timed runs, and three pictures of two steps.
    assert log.count("unet") == first + 2 + 3 + 3 * 2
    assert log.count("vae_decoder") == first + 2 + 1 + 3


def test_without_events_everything_is_timed_by_the_clock(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretended, "events", None)
    with Components(Pretended, "resident") as components:
        result = Stages(JOB, components).timed(ONCE, warm_up=0)
    assert result["timer"] == WALL_CLOCK
    assert 0 < result["unet_step"][0] < 5


def test_a_component_that_does_not_load_closes_the_others(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Pretended.load

    def failing(self: Pretended) -> None:
        if self._name == "vae_decoder":
            raise RuntimeError("no")
        load(self)

    monkeypatch.setattr(Pretended, "load", failing)
    with pytest.raises(RuntimeError), Components(Pretended, "resident"):
        pass
    assert log == ["load text_encoder", "load unet", "close unet", "close text_encoder"]


def test_the_peak_is_above_what_was_taken_before(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = iter([100, 150, 400])

    def used() -> int:
        return next(levels, 250)

    monkeypatch.setattr(bench_worker, "_device_memory_used", lambda: used)
    monkeypatch.setattr(bench_worker, "SAMPLE_EVERY_S", 0.001)
    with DevicePeak(True) as device:
        for _ in range(2000):
            if device.peak == 300:
                break
            time.sleep(0.001)
    assert device.peak == 300


def test_without_a_gpu_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("asked for a GPU")

    monkeypatch.setattr(bench_worker, "_device_memory_used", never)
    with DevicePeak(False) as device:
        device.stop()
    assert device.peak is None


def answer(process: int, peak: int, **telemetry: float | None) -> dict[str, Any]:
    fields = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "used_bytes")
    return {
        "process": process,
        "device_memory": {"weights": 10, "peak": peak},
        "telemetry": {**dict.fromkeys(fields), **telemetry},
    }


def test_device_memory_is_the_median_over_processes() -> None:
    memory = _device_memory([answer(0, 3, used_bytes=50.0), answer(1, 9), answer(2, 5)])
    assert memory is not None
    assert (memory.weights, memory.context, memory.peak, memory.process) == (10, None, 5, 50)
    assert _device_memory([{"device_memory": None}]) is None


def test_telemetry_is_in_the_order_of_the_processes() -> None:
    told = _telemetry(
        {
            "dense": [answer(1, 0, power_w=70.0, temperature_c=50.0)],
            "sparse": [answer(0, 0, power_w=60.0)],
            "control": [answer(2, 0, used_bytes=5.0)],  # nothing about the clocks
        }
    )
    assert [(t.process, t.contestant, t.power_w) for t in told] == [
        (0, "sparse", 60.0),
        (1, "dense", 70.0),
    ]
    assert told[1].temperature_c == 50.0
    assert told[1].sm_clock_mhz is None
    assert _telemetry({"dense": [{"process": 0}]}) == ()
