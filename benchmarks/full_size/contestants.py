"""What is measured: every command, what it reads and writes, and what was asked of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sdcompress.catalog import weight_files

HERE = Path(__file__).parent
SDCOMPRESS = (sys.executable, "-m", "sdcompress")
PEERS = (sys.executable, str(HERE / "peers.py"))
COMPONENTS = ("unet", "text_encoder")
CP, SHA256SUM, HASHLIB = "cp", "sha256sum", "hashlib, one thread"
COLD, KNOWN, OPTIMUM = "export, cold", "export, graph known", "optimum, fp32"
EXPORT_TWO = """
import sys
from pathlib import Path
from export.to_onnx import export_bundle
from sdcompress.bundle import Bundle
bundle = Bundle.open(Path(sys.argv[1]))
bundle.check_files()
export_bundle(bundle, Path(sys.argv[2]), components=("text_encoder", "unet"))
"""
PRUNED = "prune, 2:4"
PARTS = {
    "base": "The same bytes, copied and hashed",
    "start-up": "Start-up",
    "prune": "Prune",
    "export": "Export",
    "verify": "Verify",
    "structure": "Narrower blocks",
}


class Limit(NamedTuple):
    """At most so many `times` the seconds of the contestant `of`, and so many bytes at the peak."""

    of: str
    times: float
    peak_bytes: float | None = None


@dataclass(frozen=True)
class Contestant:
    """One command.

    It reads `reads`, brought into the page cache before; what of that is not there is made by those
    that make it. What it `makes` is removed before it starts and, unless `kept`, before the next. A
    `slow` one runs fewer rounds. `asked` is what the project wants of it.
    """

    name: str
    part: str
    command: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()
    kept: bool = False
    slow: bool = False
    peer: bool = False
    timeout: float | None = None
    asked: Limit | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Settings(NamedTuple):
    """`modelopt`: the folder it was installed into, None where it can be imported as it is.
    `limit_gb`: memory of torch's global pruning. `cut_off`: seconds of those that do not end.
    """

    modelopt: Path | None = None
    limit_gb: float = 18
    cut_off: float = 120
    peer_timeout: float = 300


def contestants(model: Path, work: Path, settings: Settings) -> list[Contestant]:
    """In the order they run in. `work` is where they write."""
    folders = tuple(model / component for component in COMPONENTS)
    weights = tuple(file for folder in folders for file in weight_files(folder))
    cache = work / "cache"
    pruned, onnx = work / "two_four", work / "onnx"
    ours = {"SDCOMPRESS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}

    def recipe(name: str) -> str:
        return str(HERE / "recipes" / f"{name}.yaml")

    def own(name: str, part: str, *command: object, **more: object) -> Contestant:
        line = (*SDCOMPRESS, *map(str, command))
        return Contestant(name, part, line, environment=ours, **more)  # type: ignore[arg-type]

    def prune(name: str, file: str, out: Path, **more: object) -> Contestant:
        line = ("prune", model, "--recipe", recipe(file), "-o", out, "--json")
        part = "structure" if file == "structure" else "prune"
        return own(name, part, *line, reads=(model,), makes=(out,), **more)

    def peer(name: str, part: str, *command: object, **more: object) -> Contestant:
        line = (*PEERS, *map(str, command))
        more = {"reads": (model,), "peer": True, "slow": True, **more}
        environment = {"HF_HUB_OFFLINE": "1", **_path_of(settings.modelopt, command)}
        return Contestant(
            name,
            part,
            line,
            timeout=settings.peer_timeout,
            environment=environment,
            **more,  # type: ignore[arg-type]
        )

    fast = Limit(CP, 4, 1e9)
    verified = Limit(SHA256SUM, 2)
    copy, other, nothing = work / "copy", work / "other", work / "empty_cache"
    export = ("export", pruned, "-o", onnx, "--json")
    return [
        Contestant(
            "cp, whole model", "base", ("cp", "-rL", str(model), str(copy)),
            reads=(model,), makes=(copy,),
        ),
        Contestant(
            CP, "base",
            ("sh", "-c", 'mkdir "$0" && cp -rL "$@" "$0"', *map(str, (copy, *folders))),
            reads=folders, makes=(copy,),
        ),
        Contestant(SHA256SUM, "base", ("sha256sum", *map(str, weights)), reads=weights),
        peer(HASHLIB, "base", "hashlib", model, reads=weights, slow=False, peer=False),
        own("--help", "start-up", "--help"),
        own("list criteria", "start-up", "list", "criteria"),
        own("plan", "start-up", "plan", recipe("two_four"), "--model", model, "--json"),
        prune("prune, uniform", "uniform", other, asked=fast),
        prune("prune, global", "global", other, asked=fast),
        prune(PRUNED, "two_four", pruned, kept=True, asked=fast),
        peer("kthvalue by layer", "prune", "naive", model, other, makes=(other,)),
        peer(
            "torch.nn.utils.prune, global", "prune", "torch_global", model, other,
            "--limit-gb", settings.limit_gb, makes=(other,),
        ),
        peer("modelopt, 2:4", "prune", "modelopt", model, other, makes=(other,)),
        own(
            COLD, "export", *export,
            reads=(pruned,), makes=(onnx, cache), kept=True, slow=True,
        ),
        Contestant(
            "export, cold, the same two", "export",
            (sys.executable, "-c", EXPORT_TWO, str(pruned), str(other)),
            reads=(pruned,), makes=(other, nothing), slow=True, asked=Limit(OPTIMUM, 1, 3e9),
            environment={**ours, "SDCOMPRESS_CACHE": str(nothing)},
        ),
        own(
            KNOWN, "export", *export,
            reads=(pruned, cache), makes=(onnx,), kept=True, asked=Limit(CP, 4, 1e9),
        ),
        peer(OPTIMUM, "export", "optimum", model, other, "--dtype", "fp32", makes=(other,)),
        peer(
            "optimum, fp16", "export", "optimum", model, other, "--dtype", "fp16", makes=(other,)
        ),
        own("verify, weights", "verify", "verify", pruned, "--json",
            reads=(pruned,), asked=verified),
        own(
            "verify, ONNX", "verify",
            "verify", onnx, "--against", pruned, "--no-parity", "--json",
            reads=(pruned, onnx), asked=verified,
        ),
        peer(
            "polygraphy inspect sparsity", "verify",
            "polygraphy", onnx / "unet" / "model.onnx", "--seconds", settings.cut_off,
            reads=(onnx,),
        ),
        prune("prune, structure", "structure", other),
    ]  # fmt: skip


def _path_of(modelopt: Path | None, command: Sequence[object]) -> dict[str, str]:
    return {"PYTHONPATH": str(modelopt)} if modelopt and "modelopt" in command else {}
