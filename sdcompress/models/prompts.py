"""The prompts that come with a model, and those people bring in a file."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Literal

from sdcompress.bundle import Bundle
from sdcompress.errors import UsageError

Purpose = Literal["learning", "evaluation"]
_SD2 = Path(__file__).parent / "sd2"
CAPTIONS: dict[Purpose, Path] = {
    "learning": _SD2 / "captions.txt",
    "evaluation": _SD2 / "captions_evaluation.txt",
}


def prompts_for(bundle: Bundle, count: int, purpose: Purpose) -> tuple[str, ...]:
    """`count` prompts for a model, always the same; those to evaluate on are never learnt from.

    mini-sd2 is evaluated on combinations of colour and shape it has never seen, half of the prompts
    with one object while there are different ones (200), the others with two. Every other model
    gets the 128 captions that this package has for either purpose, over again where more are asked.
    """
    if bundle.manifest.source.kind != "mini-sd2":
        captions = read_prompts(CAPTIONS[purpose])
        return tuple(captions[i % len(captions)] for i in range(count))
    if purpose == "learning":
        from sdcompress.models.mini_sd2.scenes import sample_prompts

        return tuple(text for _, text in sample_prompts(count, None, "train", seed=0))
    one = _held_out(count - count // 2, objects=1)
    two = _held_out(count - len(one), objects=2)
    return tuple(text for pair in zip_longest(one, two) for text in pair if text)


def _held_out(count: int, objects: int) -> list[str]:
    """`count` different prompts, or as many as there are."""
    from sdcompress.models.mini_sd2.scenes import sample_prompts

    draws, found, before = count, dict[str, None](), -1
    while len(found) < count and len(found) > before:
        before, draws = len(found), 4 * draws
        found = dict.fromkeys(t for _, t in sample_prompts(draws, objects, "heldout", seed=0))
    return list(found)[:count]


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line; empty lines do not count.

    Raises:
        UsageError: the file cannot be read as UTF-8 text, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise UsageError(
            f"{file}: expected a text file of prompts in UTF-8, one a line, found none ({why})"
        ) from e
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"{file}: expected one prompt a line, found none; add some")
    return prompts
