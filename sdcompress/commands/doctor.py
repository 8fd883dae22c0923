"""`sdcompress doctor`: what works on this machine, and how to get the rest."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import click
from pydantic import BaseModel

from sdcompress.commands._common import emit, json_option

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = {
    "torch": "pip install sdcompress",
    "diffusers": "pip install sdcompress",
    "transformers": "pip install sdcompress",
    "onnx": "pip install sdcompress",
    "onnxruntime": "pip install 'sdcompress[cpu]'",
    "onnxruntime-gpu": "pip install 'sdcompress[gpu]'",
    "optimum-onnx": "pip install 'sdcompress[optimum]'",
    "tensorrt-rtx": "pip install 'sdcompress[rtx]'",
    "tensorrt": "comes with JetPack or NVIDIA's installer; see pip install 'sdcompress[tensorrt]'",
}
NEED_A_GPU = ("tensorrt", "tensorrt_rtx")


class Finding(BaseModel):
    """One thing looked at; `fix` is None where nothing is to be done."""

    name: str
    state: str
    ok: bool
    fix: str | None = None


class Output(BaseModel):
    """`doctor --json`; `ok` says whether the demo can run here."""

    ok: bool
    findings: list[Finding]


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Say what works on this machine and how to get the rest.

    \b
    Example:
      sdcompress doctor
    """
    findings = [*_packages(), _one_runtime(), *_backends(gpu := _gpu()), gpu, _model(), _disk()]
    required = {"torch", "diffusers", "transformers", "onnx", "one onnxruntime", "mini-sd2"}
    ok = all(f.ok for f in findings if f.name in required)
    output = Output(ok=ok, findings=findings)
    emit(output, as_json, lambda console: _show(console, output))
    if not ok:
        raise click.exceptions.Exit(1)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    return [
        Finding(name=p, state=found, ok=True)
        if (found := _installed(p))
        else Finding(name=p, state="not installed", ok=False, fix=fix)
        for p, fix in PACKAGES.items()
    ]


def _one_runtime() -> Finding:
    name = "one onnxruntime"
    found = [p for p in ("onnxruntime", "onnxruntime-gpu") if _installed(p)]
    if len(found) == 2:
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of the two"
        return Finding(name=name, state="both overwrite each other's files", ok=False, fix=fix)
    if not found:
        fix = "pip install 'sdcompress[cpu]', or [gpu] with an NVIDIA card"
        return Finding(name=name, state="none installed", ok=False, fix=fix)
    return Finding(name=name, state=found[0], ok=True)


def _backends(gpu: Finding) -> list[Finding]:
    from export.backends import load_backend, names

    findings = []
    for name in names():
        problem = load_backend(name).available()
        state = problem or "runs here"
        if problem is None and name in NEED_A_GPU and not gpu.ok:
            state = "builds here, needs a GPU to run"
        findings.append(Finding(name=f"backend {name}", state=state, ok=problem is None))
    return findings


def _gpu() -> Finding:
    from export.device.cuda import Cuda
    from export.device.errors import DeviceError

    try:
        card = Cuda.load()
        state = f"{card.name}, compute capability {card.compute_capability}"
    except DeviceError as e:
        fix = "engines can be built ahead of time with tensorrt_rtx, or on the device itself"
        return Finding(name="GPU", state=str(e), ok=False, fix=fix)
    return Finding(name="GPU", state=state, ok=True)


def _model() -> Finding:
    from sdcompress.models.mini_sd2 import WEIGHTS

    if (WEIGHTS / "model_index.json").is_file():
        return Finding(name="mini-sd2", state="in the package", ok=True)
    fix = "install the package again"
    return Finding(name="mini-sd2", state="its weights are missing", ok=False, fix=fix)


def _disk() -> Finding:
    import shutil

    from sdcompress.commands._common import size

    free = shutil.disk_usage(".").free
    enough = free > 10e9  # weights, two exports and two engines of a full-size model in fp16
    return Finding(
        name="disk",
        state=f"{size(free)} free here",
        ok=enough,
        fix=None if enough else "a full-size run needs about 10 GB",
    )


def _show(console: Console, output: Output) -> None:
    from rich.text import Text

    for f in output.findings:
        mark = Text("✓", "green") if f.ok else Text("–", "yellow")
        console.print(mark, f"{f.name}: {f.state}" + (f"  ({f.fix})" if f.fix else ""))
    console.print("The demo can run here." if output.ok else "The demo cannot run here yet.")
