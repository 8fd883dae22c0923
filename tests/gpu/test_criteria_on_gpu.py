"""What is recorded and decided on a GPU is what the CPU would have recorded and decided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdcompress.bundle import Bundle
from sdcompress.criteria import STATISTICS, for_weights, load_criterion
from sdcompress.prune import prune
from sdcompress.recipe import Recipe

UNET = "unet/diffusion_pytorch_model.safetensors"
LOOKING = [name for name in for_weights() if load_criterion(name).needs & STATISTICS]


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("criterion", LOOKING)
def test_masks_do_not_depend_on_the_device(
    criterion: str,
    pattern: str,
    tiny_source: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = {"criterion": criterion, "pattern": pattern}
    if pattern == "unstructured":
        rule["sparsity"] = 0.5
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "prune": {"unet": {"rules": [rule]}},
            "calibration": {"count": 4, "steps": 2},
        }
    )
    gpu = load_file(prune(tiny_source, recipe, tmp_path / "gpu").path / UNET)
    for module in ("sdcompress.calibrate", "sdcompress.prune._decisions"):
        monkeypatch.setattr(f"{module}.exact_device", lambda: torch.device("cpu"))
    bundle = prune(tiny_source, recipe, tmp_path / "cpu")
    cpu = load_file(bundle.path / UNET)
    assert bundle.manifest.plan
    pruned = [p for p in bundle.manifest.plan.of("unet") if p.pruned]
    differing = sum(int(((cpu[p.name] == 0) != (gpu[p.name] == 0)).sum()) for p in pruned)
    assert differing < 1e-4 * sum(p.numel for p in pruned)
