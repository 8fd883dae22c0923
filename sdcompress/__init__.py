"""sdcompress: smaller or faster Stable Diffusion 2 engines, with the proof."""

__version__ = "0.5.0"
