"""Clocks, power and memory. All samples here are synthetic: written by hand after the documented
forms of tegrastats and after field reports, not recorded on a device."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import pytest

from export.device import telemetry
from export.device.telemetry import NOTHING, Nvml, Telemetry, Watch, parse_tegrastats

# Synthetic.
ORIN_NANO = (
    "11-22-2026 10:00:00 RAM 3011/7620MB (lfb 4x4MB) SWAP 12/3810MB (cached 0MB) "
    "CPU [11%@1510,7%@1510,off,off,off,off] EMC_FREQ 31%@2133 GR3D_FREQ 97%@[612] "
    "NVDEC off NVJPG off APE 200 cpu@49.1C soc2@48.2C soc0@47.9C gpu@51.5C tj@51.5C soc1@48.6C "
    "VDD_IN 9214mW/8100mW VDD_CPU_GPU_CV 4120mW/3300mW VDD_SOC 1900mW/1800mW"
)
AGX_ORIN = (
    "RAM 20642/62817MB (lfb 1x2MB) EMC_FREQ 3%@3199 GR3D_FREQ 0%@[1300,1300] "
    "cpu@52.9C/52.9C gpu@50.25C/50.3C VDD_GPU_SOC 2800mW/2700mW VDD_CPU_CV 400mW/390mW "
    "VIN_SYS_5V0 3025mW/3000mW"
)
PLAIN = (
    "RAM 3276/7859MB (lfb 5x4MB) GR3D_FREQ 12%@114 GPU@39.5C VDD_SYS_GPU 182/182 VDD_IN 5297/5297"
)
THOR = "RAM 9000/125000MB (lfb 1x4MB) gpu@62.906C VDD_GPU 9000mW/8800mW VIN 31000mW/30000mW"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (ORIN_NANO, (612.0, 2133.0, 51.5, 9.214, 3011 << 20)),
        (AGX_ORIN, (1300.0, 3199.0, 50.25, 6.225, 20642 << 20)),
        (PLAIN, (114.0, None, 39.5, 5.297, 3276 << 20)),
        (THOR, (None, None, 62.906, 31.0, 9000 << 20)),
        ("GR3D_FREQ @[1000,900,900]", (1000.0, None, None, None, None)),
        ("", (None, None, None, None, None)),
    ],
)
def test_lines_of_tegrastats(line: str, expected: tuple[float | None, ...]) -> None:
    assert tuple(parse_tegrastats(line).values()) == expected


class FakeNvml:
    """One card: 1500 MHz, 7000 MHz, 61 degrees, 123.4 W; process 42 holds 2 GiB."""

    def __init__(self, **failing: int) -> None:
        self.failing, self.asked = failing, ""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.failing.get("init", 0)

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        self.asked = f"index {index.value}"
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:  # noqa: N802
        self.asked = bus.decode()
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = {1: 1500, 2: 7000}[kind.value]
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = 61
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = 123_400
        return self.failing.get("power", 0)

    def nvmlDeviceGetComputeRunningProcesses_v3(  # noqa: N802
        self, handle: Any, count: Any, found: Any
    ) -> int:
        assert ctypes.sizeof(found._type_) == 24  # as the library lays it out
        for place, (pid, used) in enumerate([(7, 1 << 20), (42, 2 << 30), (43, (1 << 64) - 1)]):
            found[place].pid, found[place].used = pid, used
        count._obj.value = 3
        return 0


def test_nvml() -> None:
    library = FakeNvml()
    assert Nvml(library).read(42) == {
        "sm_clock_mhz": 1500.0,
        "memory_clock_mhz": 7000.0,
        "temperature_c": 61.0,
        "power_w": 123.4,
        "used_bytes": 2 << 30,
    }
    assert library.asked == "index 0"
    assert Nvml(library, "0000:01:00.0").read()["used_bytes"] is None
    assert library.asked == "0000:01:00.0"


def test_what_a_card_does_not_tell_is_none() -> None:
    nvml = Nvml(FakeNvml(power=3))
    assert nvml.read(42)["power_w"] is None
    assert nvml.read(43)["used_bytes"] is None  # NVML's "not available"
    assert nvml.read(99)["used_bytes"] is None
    with pytest.raises(OSError, match="NVML answers 9"):
        Nvml(FakeNvml(init=9))


def test_a_watch_takes_clocks_while_timing_and_the_peak_of_memory_always() -> None:
    clock, used = 100.0, 5.0

    def source(pid: int | None) -> dict[str, float | None]:
        return {**NOTHING, "sm_clock_mhz": clock, "used_bytes": used if pid == 9 else None}

    with Watch(source, every=0.001) as watch:
        watch.pid = 9
        time.sleep(0.05)
        clock, used = 200.0, 3.0
        watch.start_timing()
        time.sleep(0.05)
    assert watch.summary() == {**NOTHING, "sm_clock_mhz": 200.0, "used_bytes": 5.0}


def test_memory_of_a_whole_system_counts_from_where_it_was() -> None:
    used = 1000.0

    def source(pid: int | None) -> dict[str, float | None]:
        return {**NOTHING, "used_bytes": used}

    with Watch(source, every=0.001, whole_system=True) as watch:
        used = 1600.0
        time.sleep(0.05)
        used = 1200.0
    assert watch.summary()["used_bytes"] == 600.0


def test_where_nothing_tells_all_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(telemetry, "is_jetson", lambda: False)
    with Telemetry() as found, found.watch(every=0.001) as watch:
        watch.start_timing()
    assert found.how == "none"
    assert watch.summary() == NOTHING


def test_tegrastats_is_followed_and_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "tegrastats"
    program.write_text(f"#!/bin/sh\nwhile true; do echo '{ORIN_NANO}'; sleep 0.02; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(telemetry, "is_jetson", lambda: True)
    with Telemetry() as found:
        for _ in range(200):
            if found.read()["power_w"]:
                break
            time.sleep(0.01)
        assert found.how == "tegrastats"
        assert found.read()["power_w"] == 9.214
    assert found._tegrastats is not None
    assert found._tegrastats.poll() is not None
