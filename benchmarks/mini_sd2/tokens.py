"""Stage 0: a CLIP tokenizer whose merges make each word of the captions one token.

The byte-level alphabet stays below it, so any other text still encodes, letter by letter.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32


def byte_alphabet() -> list[str]:
    """One printable character for each byte, in CLIP's order; printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding over a list of distinct words, until every word is one symbol.

    Encoding replays the merges in this order, so it ends with one symbol a word, too.
    """
    parts = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while True:
        pairs = Counter(pair for p in parts for pair in pairwise(p))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for p in parts:
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i : i + 2] = ["".join(best)]
                i += 1


def build_tokenizer(words: list[str], folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt to `folder` and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    merges = learn_merges(words)
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=MAX_LENGTH,
        pad_token=END,
    )
