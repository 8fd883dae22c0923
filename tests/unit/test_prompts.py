"""Prompts that come with a model, and those in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdcompress.bundle import Bundle, SourceRecord
from sdcompress.errors import UsageError
from sdcompress.models.mini_sd2 import WEIGHTS
from sdcompress.models.mini_sd2.scenes import HELD_OUT, sample_prompts
from sdcompress.models.prompts import prompts_for, read_prompts


@pytest.fixture(scope="module")
def mini() -> Bundle:
    return Bundle.of_source(WEIGHTS, SourceRecord(id="mini-sd2", kind="mini-sd2"))


def test_mini_sd2_is_evaluated_on_what_it_never_learnt(mini: Bundle) -> None:
    prompts = prompts_for(mini, 41, "evaluation")
    assert len(set(prompts)) == len(prompts) == 41
    words = [set(p.replace(",", " ").replace(":", " ").split()) for p in prompts]
    assert all(any({c, s} <= found for c, s in HELD_OUT) for found in words)
    one, two = ({t for _, t in sample_prompts(4000, n, "heldout", 0)} for n in (1, 2))
    assert set(prompts[0::2]) <= one
    assert set(prompts[1::2]) <= two


@pytest.mark.parametrize("count", [2, 400, 700])
def test_evaluation_repeats_no_prompt(mini: Bundle, count: int) -> None:
    prompts = prompts_for(mini, count, "evaluation")
    assert len(set(prompts)) == count
    one = {t for _, t in sample_prompts(4000, 1, "heldout", 0)}
    assert len(one & set(prompts)) == min(200, count // 2)


def test_learning_and_evaluation_share_no_prompt(mini: Bundle) -> None:
    learnt = prompts_for(mini, 500, "learning")
    assert len(learnt) == 500
    assert not set(learnt) & set(prompts_for(mini, 400, "evaluation"))
    assert learnt == prompts_for(mini, 500, "learning")


def test_other_models_get_the_captions_over_again(tiny_source: Bundle) -> None:
    prompts = prompts_for(tiny_source, 130, "learning")
    assert len(set(prompts)) == 128
    assert prompts[128:] == prompts[:2]
    assert not set(prompts) & set(prompts_for(tiny_source, 128, "evaluation"))


def test_a_file_gives_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dög \r\n", encoding="utf-8")
    assert read_prompts(file) == ("a cat", "a dög")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="expected"):
        read_prompts(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected"):
        read_prompts(tmp_path / "none.txt")
