"""Whether this device can do it, found out before anything slow."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .contents import TWINS, Contents
from .errors import DeviceError

# A build holds the graph's weights, the plan and what is being timed at once. The full-size UNet
# took 3.4 times its weights on a PC, without a workspace limit.
BUILD_FACTOR = 3.0
# Plans are about as large as the weights they are made of.
PLAN_FACTOR = 1.1
MIB = 1 << 20
FIRST_L4T = (36, 4)  # JetPack 6.1


def check_version(target: Mapping[str, Any], module: str, version: str) -> None:
    """Refuse a TensorRT that does not serve the target."""
    if module == "tensorrt_rtx":
        if module not in target["backends"]:
            raise DeviceError(
                f"TensorRT-RTX does not serve {target['title']}; use --module tensorrt"
            )
        return
    low, high = target["tensorrt_min"], target["tensorrt_max"]
    upgrade = f"upgrade to TensorRT {low} or newer"
    if target["platform"] == "jetson":
        upgrade = f"upgrade to JetPack {target['jetpack']} or newer, which brings TensorRT {low}"
    found = _numbers(version)
    if found < _numbers(low):
        raise DeviceError(f"TensorRT {version} is too old for this bundle; {upgrade}")
    if high and found[: len(_numbers(high))] > _numbers(high):
        raise DeviceError(
            f"TensorRT {version} does not serve {target['title']}; use TensorRT {low} to {high}"
        )


def check_gpu(target: Mapping[str, Any], gpu: Mapping[str, Any]) -> None:
    """Refuse another kind of GPU than the bundle is for."""
    if gpu["compute_capability"] != target["compute_capability"]:
        raise DeviceError(
            f"this is {gpu['name']} (compute capability {gpu['compute_capability']}), the bundle "
            f"is for {target['title']} ({target['compute_capability']}); make one for this device "
            "with `sdcompress device --target …`"
        )


def check_system(target: Mapping[str, Any], release: Path = Path("/etc/nv_tegra_release")) -> None:
    """Refuse a JetPack from before 6.1 by its release file; says nothing elsewhere."""
    try:
        match = re.search(r"R(\d+).*?REVISION: (\d+)", release.read_text(errors="replace"))
    except OSError:
        return
    if match and (int(match[1]), int(match[2])) < FIRST_L4T:
        raise DeviceError(
            f"Jetson Linux R{match[1]}.{match[2]} is too old, its TensorRT cannot read these "
            f"graphs; upgrade to JetPack {target.get('jetpack') or '6.1'} or newer"
        )


def estimate(components: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of RAM the largest component's build takes, and bytes of disk for all plans."""
    weights = _weights(components)
    workspace = target["workspace_mb"] * MIB if target["shared_memory"] else 0
    memory = int(BUILD_FACTOR * max(weights.values())) + workspace
    return memory, int(PLAN_FACTOR * sum(weights.values()))


def check_memory(contents: Contents, gpu: Mapping[str, Any] | None, available: int | None) -> None:
    """Refuse where the largest build would not fit RAM (`available` bytes) or the GPU's own memory.

    Where RAM and GPU share their memory, the GPU's figure says nothing that RAM's does not.
    """
    needed, _ = estimate(contents.components, contents.target)
    advice = (
        "close other programs (on a Jetson also the desktop: `sudo systemctl isolate "
        "multi-user.target`) or add swap; --no-memory-check tries it nevertheless"
    )
    if available is not None and available < needed:
        raise DeviceError(
            f"building needs about {needed // MIB} MiB of memory, {available // MIB} MiB are "
            f"available; {advice}"
        )
    if gpu and not contents.target["shared_memory"]:
        on_gpu = int(PLAN_FACTOR * max(_weights(contents.components).values()))
        on_gpu += contents.target["workspace_mb"] * MIB
        if gpu["free"] < on_gpu:
            raise DeviceError(
                f"building needs about {on_gpu // MIB} MiB on the GPU, {gpu['free'] // MIB} MiB "
                f"are free; {advice}"
            )


def check_disk(contents: Contents, work: Path) -> None:
    """Refuse where the plans would not fit."""
    _, needed = estimate(contents.components, contents.target)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DeviceError(
            f"{work}: the engines need about {needed // MIB} MiB of disk, {free // MIB} MiB are "
            "free; free some space, or give another place with --work"
        )


def check_output(file: Path) -> None:
    """Refuse before an hour's work where its results could not be written in the end."""
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise DeviceError(f"{file}: cannot be written there; choose another --output")


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes the system can give without swapping, and what swap has left; None if unknown."""
    found = {}
    try:
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * 1024
        return found["MemAvailable"] + found.get("SwapFree", 0)
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _weights(components: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Bytes of weights of each graph; twins that are the same share their file."""
    return {
        (name, component["twins"][twin]["onnx"]): component["twins"][twin]["weights"]
        for name, component in components.items()
        for twin in TWINS
    }


def machine() -> dict[str, Any]:
    """What the figures hold for, beside the GPU."""
    import platform

    model = Path("/proc/device-tree/model")
    name = model.read_text(errors="replace").strip("\0\n ") if model.exists() else _processor()
    return {
        "machine": platform.machine(),
        "processor": name,
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else "unknown"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
