"""mini-sd2: a small, really trained Stable Diffusion 2 that ships with the package.

It has SD2's classes, noise schedule and guidance, draws 64-pixel scenes of one or two coloured
shapes (`scenes`), and its pictures can be checked against their prompts (`oracle`). Importing this
module is light: no torch, no numpy.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""A diffusers directory (fp16 safetensors); `WEIGHTS / "clip"` holds a small CLIP for scores."""

NATIVE_SIZE = 64
"""Height and width of its pictures, in pixels."""

DEFAULT_STEPS = 20
"""Denoising steps that the reported accuracies were measured with."""

DEFAULT_GUIDANCE = 2.0
"""Guidance scale that the reported accuracies were measured with."""

__all__ = ["DEFAULT_GUIDANCE", "DEFAULT_STEPS", "NATIVE_SIZE", "WEIGHTS"]
