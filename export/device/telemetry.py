"""Clocks, temperature, power and memory of a GPU, read beside a process that is measured.

On cards through NVML; on a Jetson, where NVML knows little, from `tegrastats`. Whatever a device
does not tell is None. All readings are taken by the process that waits, never by the measured one.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Reading = dict[str, float | None]
# sm_clock and memory_clock in MHz, power in watts, temperature in degrees Celsius, memory in bytes.
FIELDS = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "used_bytes")
NOTHING: Reading = dict.fromkeys(FIELDS)
EVERY_S = 0.2

_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0  # nvmlClockType_t, nvmlTemperatureSensors_t
_NOT_AVAILABLE = (1 << 64) - 1
_MAX_PROCESSES = 256


class _ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t of the _v2 and _v3 functions."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """NVIDIA's management library for one card."""

    def __init__(self, library: Any, pci_bus_id: str | None = None) -> None:
        """Raises OSError where the library finds no driver or no such card."""
        self._library = library
        self._handle = ctypes.c_void_p()
        found = ctypes.byref(self._handle)
        failed = library.nvmlInit_v2()
        if not failed and pci_bus_id:
            failed = library.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id.encode(), found)
        elif not failed:
            failed = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(0), found)
        if failed:
            raise OSError(f"NVML answers {failed}")

    def read(self, pid: int | None = None) -> Reading:
        """All fields now; `used_bytes` is what process `pid` has on the card."""
        milliwatts = self._number("nvmlDeviceGetPowerUsage")
        return {
            "sm_clock_mhz": self._number("nvmlDeviceGetClockInfo", ctypes.c_int(_SM_CLOCK)),
            "memory_clock_mhz": self._number("nvmlDeviceGetClockInfo", ctypes.c_int(_MEMORY_CLOCK)),
            "temperature_c": self._number(
                "nvmlDeviceGetTemperature", ctypes.c_int(_GPU_TEMPERATURE)
            ),
            "power_w": None if milliwatts is None else milliwatts / 1000,
            "used_bytes": None if pid is None else self._used(pid),
        }

    def _number(self, function: str, *arguments: Any) -> float | None:
        value = ctypes.c_uint()
        call = getattr(self._library, function, None)
        if call is None or call(self._handle, *arguments, ctypes.byref(value)):
            return None
        return float(value.value)

    def _used(self, pid: int) -> float | None:
        for version in ("_v3", "_v2"):
            call = getattr(self._library, f"nvmlDeviceGetComputeRunningProcesses{version}", None)
            if call is None:
                continue
            count = ctypes.c_uint(_MAX_PROCESSES)
            found = (_ProcessInfo * _MAX_PROCESSES)()
            if call(self._handle, ctypes.byref(count), found):
                return None
            for process in found[: count.value]:
                if process.pid == pid and process.used != _NOT_AVAILABLE:
                    return float(process.used)
            return None  # not there, or in a container, where pids are others
        return None


# Forms of JetPack 6 and 7: `GR3D_FREQ 99%@[1020]`, `GR3D_FREQ 99%@1300`, `GR3D_FREQ @[1000,1000]`
# or none; `gpu@52.3C`, `GPU@39.5C`, `gpu@52.9C/52.9C`; `VDD_IN 5297mW/5297mW` (now/mean).
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_GPU_CLOCK = re.compile(r"\bGR3D_FREQ \d*%?@\[?(\d+)")
_MEMORY_CLOCK_LINE = re.compile(r"\bEMC_FREQ \d*%?@(\d+)")
_GPU_DEGREES = re.compile(r"\bgpu@(-?\d+(?:\.\d+)?)C", re.IGNORECASE)
_POWER = re.compile(r"\b(V(?:DD|IN)[A-Z0-9_]*|POM_[A-Z0-9_]+) (\d+)(?:mW)?/\d+")
# Rails that carry the whole module, so that nothing need be added up.
_WHOLE = ("VDD_IN", "VIN", "POM_5V_IN")


def parse_tegrastats(line: str) -> Reading:
    """One line of tegrastats. `used_bytes` is the whole system's: CPU and GPU share the memory.

    Power is that of the rail that carries the module, or the sum of all rails where none does.
    """

    def first(pattern: re.Pattern[str]) -> float | None:
        match = pattern.search(line)
        return float(match[1]) if match else None

    used = first(_RAM)
    rails = {name: int(milliwatts) for name, milliwatts in _POWER.findall(line)}
    whole = next((rails[name] for name in _WHOLE if name in rails), None)
    milliwatts = whole if whole is not None else sum(rails.values())
    return {
        "sm_clock_mhz": first(_GPU_CLOCK),
        "memory_clock_mhz": first(_MEMORY_CLOCK_LINE),
        "temperature_c": first(_GPU_DEGREES),
        "power_w": milliwatts / 1000 if rails else None,
        "used_bytes": None if used is None else used * (1 << 20),
    }


Source = Callable[[int | None], Reading]


class Watch:
    """Reads a device while a `with` block lasts.

    `pid` is the process whose memory counts; set it once the process has been started. With
    `whole_system` the source does not know processes, and what counts is the rise of memory.
    """

    def __init__(
        self, source: Source, every: float = EVERY_S, *, whole_system: bool = False
    ) -> None:
        self.pid: int | None = None
        self._before: float | None = 0
        self._whole_system = whole_system
        self._source, self._every = source, every
        self._timing = False
        self._timed: list[Reading] = []
        self._peak: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        if self._whole_system:
            self._before = self._source(None)["used_bytes"]
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def start_timing(self) -> None:
        """Loading is over: clocks, temperature and power count from here on."""
        self._timing = True

    def summary(self) -> Reading:
        """The median of each field over the timed part; the peak of memory over all of it."""
        used = None
        if self._peak is not None and self._before is not None:
            used = max(0.0, self._peak - self._before)
        return {**summarise(self._timed), "used_bytes": used}

    def _run(self) -> None:
        while not self._stop.is_set():
            reading = self._source(self.pid)
            if (used := reading["used_bytes"]) is not None:
                self._peak = max(used, self._peak or 0)
            if self._timing:
                self._timed.append(reading)
            self._stop.wait(self._every)


def summarise(readings: Sequence[Mapping[str, float | None]]) -> Reading:
    """The median of each field; None where nothing was read."""
    result: Reading = {}
    for field in FIELDS:
        values = [value for reading in readings if (value := reading[field]) is not None]
        result[field] = float(statistics.median(values)) if values else None
    return result


class Telemetry:
    """Whatever tells about the device here, and `how`: "NVML", "tegrastats" or "none".

    `pci_bus_id` is CUDA's name of the card; without it, it is the first one.
    """

    def __init__(self, pci_bus_id: str | None = None) -> None:
        self.how = "none"
        self._source: Source = lambda pid: dict(NOTHING)
        self._tegrastats: subprocess.Popen[str] | None = None
        self._line = dict(NOTHING)
        if is_jetson() and (program := shutil.which("tegrastats")):
            self._tegrastats = subprocess.Popen(
                [program, "--interval", str(int(EVERY_S * 1000))],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._follower = threading.Thread(target=self._follow, daemon=True)
            self._follower.start()
            self.how, self._source = "tegrastats", lambda pid: dict(self._line)
        else:
            with suppress(OSError, AttributeError):
                nvml = Nvml(ctypes.CDLL("libnvidia-ml.so.1"), pci_bus_id)
                self.how, self._source = "NVML", nvml.read

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._tegrastats:
            self._tegrastats.terminate()
            self._tegrastats.wait()
            self._follower.join()  # it closes the pipe

    def read(self, pid: int | None = None) -> Reading:
        return self._source(pid)

    def watch(self, every: float = EVERY_S) -> Watch:
        return Watch(self._source, every, whole_system=self._tegrastats is not None)

    def _follow(self) -> None:
        assert self._tegrastats is not None
        assert self._tegrastats.stdout is not None
        with self._tegrastats.stdout as lines:
            for line in lines:
                self._line = parse_tegrastats(line)


def is_jetson() -> bool:
    with suppress(OSError):
        return "jetson" in Path("/proc/device-tree/model").read_text(errors="replace").lower()
    return Path("/etc/nv_tegra_release").exists()
