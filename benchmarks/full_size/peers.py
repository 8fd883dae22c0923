"""What other tools do with the same weights, each as they are meant to be called.

    python benchmarks/full_size/peers.py NAME IN [OUT] [options]

All work on a diffusers directory in its own type (fp16), on UNet and text encoder, and write what
they pruned; but for `polygraphy` and `hashlib`, which read files. A JSON object is printed last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SPARSITY = 0.5
Options = argparse.Namespace


def hashlib_sha256(files: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """Python's own digest of every weight file under a directory, by one thread."""
    buffer, total = memoryview(bytearray(1 << 20)), 0
    for file in sorted(files.rglob("*.safetensors")):
        if file.parent.name != "vae":
            digest = hashlib.sha256()
            with file.open("rb", buffering=0) as f:
                while n := f.readinto(buffer):
                    digest.update(buffer[:n])
                    total += n
    return {"bytes": total}


def loaded(model: Path, dtype: str = "auto") -> dict[str, Any]:
    """UNet and text encoder as diffusers and transformers load them."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    kept = torch.float32 if dtype == "fp32" else torch.float16
    return {
        "unet": UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=kept),
        "text_encoder": CLIPTextModel.from_pretrained(model / "text_encoder", dtype=kept),
    }


def layers(modules: dict[str, Any]) -> Iterator[Any]:
    from torch import nn

    for module in modules.values():
        yield from (m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def save(modules: dict[str, Any], out: Path) -> None:
    for component, module in modules.items():
        module.save_pretrained(out / component)


def naive(model: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """Load, a threshold a layer by kthvalue, save."""
    import torch

    assert out
    modules, count = loaded(model), 0
    with torch.no_grad():
        for layer in layers(modules):
            size = layer.weight.abs()
            threshold = size.flatten().kthvalue(int(SPARSITY * size.numel())).values
            layer.weight.mul_(size > threshold)
            count += layer.weight.numel()
    save(modules, out)
    return {"weights": count}


def torch_global(model: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """`torch.nn.utils.prune.global_unstructured`, no more memory than --limit-gb."""
    from torch.nn.utils import prune

    assert out
    limit = int(options.limit_gb * 1e9)
    # Of private writable memory: mapped files of weights do not count.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    modules = loaded(model)
    wanted = [(layer, "weight") for layer in layers(modules)]
    prune.global_unstructured(wanted, pruning_method=prune.L1Unstructured, amount=SPARSITY)
    for layer, name in wanted:
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
    save(modules, out)
    return {"weights": sum(layer.weight.numel() for layer, _ in wanted)}


def modelopt(model: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """ModelOpt's `sparse_magnitude`: 2:4 in what its rules of size let through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.sparsity as mts  # type: ignore[import-not-found]

        assert out
        modules = loaded(model)
        for module in modules.values():
            mts.export(mts.sparsify(module, "sparse_magnitude"))
        save(modules, out)
    return {}


def optimum(model: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """The exporter of `optimum-cli export onnx`, of these two components, without its validation.

    --pixels makes the example it runs smaller than its default of 64 by 64 latents.
    """
    import torch
    from diffusers import StableDiffusionPipeline
    from optimum.exporters.onnx import convert
    from optimum.exporters.utils import get_diffusion_models_for_export
    from optimum.utils import DEFAULT_DUMMY_SHAPES

    assert out
    kept = torch.float32 if options.dtype == "fp32" else torch.float16
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=kept)
    # Its own names of types are those of `_get_submodels_and_onnx_configs`.
    found = get_diffusion_models_for_export(pipeline, float_dtype=options.dtype)
    chosen = {name: found[name] for name in ("text_encoder", "unet")}
    shapes = dict(DEFAULT_DUMMY_SHAPES)
    if options.pixels:
        shapes |= {"height": options.pixels // 8, "width": options.pixels // 8}
    convert.export_models(
        models_and_onnx_configs=chosen,
        output_dir=out,
        output_names=[f"{name}/model.onnx" for name in chosen],
        input_shapes=shapes,
        dtype=options.dtype,
    )
    return {"bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file())}


def polygraphy(onnx_model: Path, out: Path | None, options: Options) -> dict[str, Any]:
    """`polygraphy inspect sparsity` of one graph, for no longer than --seconds."""
    script = Path(sys.executable).with_name("polygraphy")
    command = [sys.executable, "-u", str(script), "inspect", "sparsity", str(onnx_model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(options.seconds, process.kill)
    timer.start()
    assert process.stdout
    lines = list(process.stdout)
    timer.cancel()
    code = process.wait()
    stopped = code == -signal.SIGKILL
    if code and not stopped:
        raise SystemExit(lines[-1] if lines else f"polygraphy: exit code {code}")
    said = read_polygraphy(lines)
    outcome = f"stopped after {options.seconds:g} s" if stopped else "ok"
    return {"outcome": outcome, **sizes(onnx_model, said.pop("names")), **said}


def read_polygraphy(lines: Sequence[str]) -> dict[str, Any]:
    """`tensors` it means to check and the `names` of those it has judged, from what it printed."""
    text = "\n".join(lines)
    total = re.search(r"Found: (\d+) weight tensor", text)
    names = re.findall(r"Found (?:non-)?sparse tensor: (\S+)", text)
    return {"tensors": int(total[1]) if total else None, "done": len(names), "names": names}


def sizes(onnx_model: Path, names: Sequence[str]) -> dict[str, int]:
    """`done_weights` in the named initializers."""
    import math

    import onnx

    graph = onnx.load(onnx_model, load_external_data=False).graph
    counts = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    return {"done_weights": sum(counts[name] for name in names)}


PEERS: dict[str, Callable[[Path, Path | None, Options], dict[str, Any]]] = {
    "hashlib": hashlib_sha256,
    "naive": naive,
    "torch_global": torch_global,
    "modelopt": modelopt,
    "optimum": optimum,
    "polygraphy": polygraphy,
}


def arguments(argv: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("input", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp32", help="for optimum")
    parser.add_argument("--pixels", type=int, help="for optimum; 512 are its own 64 by 64 latents")
    parser.add_argument("--limit-gb", type=float, default=18, help="for torch_global")
    parser.add_argument("--seconds", type=float, default=120, help="for polygraphy")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.out:
        shutil.rmtree(args.out, ignore_errors=True)
        args.out.mkdir(parents=True)
    print(json.dumps(PEERS[args.peer](args.input, args.out, args)))


if __name__ == "__main__":
    main()
