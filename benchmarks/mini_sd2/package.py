"""Stage 4: the trained parts as one diffusers directory, fp16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessor, CLIPModel

HERE = Path(__file__).parent


def write_weights(pipe: StableDiffusionPipeline, clip: CLIPModel, out: Path) -> int:
    """Write everything beside `out`, then put it in its place. Returns the size in bytes.

    The modules are cast to fp16 in place: what is evaluated afterwards is what is shipped.
    """
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    for module in (pipe.vae, pipe.unet, pipe.text_encoder, clip):
        module.half()
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} does not fit fp16")
    pipe.save_pretrained(fresh, safe_serialization=True)
    clip.save_pretrained(fresh / "clip", safe_serialization=True)
    pipe.tokenizer.save_pretrained(fresh / "clip")
    CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(fresh / "clip")
    # A config must not tell the reader where its author kept the files.
    for path in fresh.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name in ("README.md", "LICENSE"):
        if (HERE / "card" / name).exists():
            shutil.copy(HERE / "card" / name, fresh / name)
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
