"""The prompts that come with a model, and those people bring in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sdcompress.bundle import Bundle
from sdcompress.errors import UsageError

CAPTIONS = Path(__file__).parent / "sd2" / "captions.txt"
Purpose = Literal["learning", "evaluation"]


def prompts_for(bundle: Bundle, count: int, purpose: Purpose) -> tuple[str, ...]:
    """`count` prompts for a model, always the same.

    mini-sd2 is evaluated on combinations of colour and shape it never learnt, half of the prompts
    with one object and half with two, and calibrated and tuned on the others. Every other model
    gets the captions of this package, over again where more are asked for.
    """
    if bundle.manifest.source.kind != "mini-sd2":
        captions = read_prompts(CAPTIONS)
        return tuple(captions[i % len(captions)] for i in range(count))
    from sdcompress.models.mini_sd2.scenes import sample_prompts

    if purpose == "learning":
        return tuple(text for _, text in sample_prompts(count, None, "train", seed=0))
    one, two = (
        [text for _, text in sample_prompts(n, objects, "heldout", seed=0)]
        for n, objects in ((count - count // 2, 1), (count // 2, 2))
    )
    mixed = [""] * count
    mixed[0::2], mixed[1::2] = one, two
    return tuple(mixed)


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line; empty lines do not count.

    Raises:
        UsageError: the file cannot be read as UTF-8 text, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(
            f"{file}: expected a text file of prompts in UTF-8, one a line, found none ({e})"
        ) from e
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"{file}: expected one prompt a line, found none; add some")
    return prompts
