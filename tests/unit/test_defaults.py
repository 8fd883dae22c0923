"""How pictures are made where nobody says, and how a distilled model is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.specs import Sizes
from sdcompress.bundle import Bundle, Manifest, seal
from sdcompress.commands import cli
from sdcompress.errors import InputError
from sdcompress.models import sd2
from sdcompress.models.defaults import sampling_defaults

ORDINARY, DISTILLED, MINI = (25, 7.5), (1, 0.0), (20, 2.0)
TURBO = sd2.component_configs("sd-turbo")["scheduler"]


def bundle(directory: Path, stage: str, scheduler: object, kind: str = "directory") -> Bundle:
    """One that holds nothing but a scheduler_config.json."""
    (directory / "scheduler").mkdir(parents=True)
    text = scheduler if isinstance(scheduler, str) else json.dumps(scheduler)
    (directory / "scheduler/scheduler_config.json").write_text(text)
    source = {"id": "a model", "kind": kind}
    fields = {"stage": stage, "parent": None, "source": source, "tools": {}}
    seal(directory, Manifest.model_validate(fields))
    return Bundle.open(directory)


def defaults(directory: Path, scheduler: object, kind: str = "directory") -> tuple[int, float]:
    found = sampling_defaults(bundle(directory, "source", scheduler, kind))
    assert (found["height"], found["width"]) == (None, None)
    return found["steps"], found["guidance"]


@pytest.mark.parametrize(
    ("name", "expected"), [("sd2-base", ORDINARY), ("sd2-768", ORDINARY), ("sd-turbo", DISTILLED)]
)
def test_what_checkpoints_are_imported_as(
    tmp_path: Path, name: str, expected: tuple[int, float]
) -> None:
    assert defaults(tmp_path, sd2.component_configs(name)["scheduler"]) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # As published: with more keys than are needed here.
        ({"steps_offset": 1, "timestep_type": "discrete", "use_karras_sigmas": False}, DISTILLED),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, DISTILLED),
        ({"_class_name": "DDIMScheduler"}, ORDINARY),
        ({"timestep_spacing": "leading"}, ORDINARY),
        ({"prediction_type": "v_prediction"}, ORDINARY),
        ({"rescale_betas_zero_snr": True}, ORDINARY),
    ],
)
def test_only_the_scheduler_of_turbo_is_taken_for_it(
    tmp_path: Path, changes: dict[str, Any], expected: tuple[int, float]
) -> None:
    assert defaults(tmp_path, {**TURBO, **changes}) == expected


@pytest.mark.parametrize("scheduler", ["", "[]", "{}", {"_class_name": TURBO["_class_name"]}])
def test_a_scheduler_that_does_not_tell_is_ordinary(tmp_path: Path, scheduler: object) -> None:
    assert defaults(tmp_path, scheduler) == ORDINARY


def test_mini_sd2_has_its_own(tmp_path: Path) -> None:
    assert defaults(tmp_path, TURBO, "mini-sd2") == MINI


class Recorder:
    """A backend that notes the sizes it is asked for, and then gives up."""

    def __init__(self) -> None:
        self.sizes: list[Sizes] = []

    def check(self, *settings: object) -> None:
        pass

    def build(self, *paths: object, sizes: Sizes, **settings: object) -> None:
        self.sizes.append(sizes)
        raise InputError("enough")


@pytest.mark.parametrize(
    ("scheduler", "flags", "guided"),
    [
        (TURBO, [], False),
        (TURBO, ["--guidance"], True),
        ({}, [], True),
        ({}, ["--no-guidance"], False),
    ],
)
def test_engines_get_the_branches_of_their_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: dict[str, Any],
    flags: list[str],
    guided: bool,
) -> None:
    onnx = bundle(tmp_path / "onnx", "onnx", scheduler).path
    backend = Recorder()
    monkeypatch.setattr("export.backends.load_backend", lambda name: backend)
    with pytest.raises(InputError, match="enough"):
        cli.main(["build", str(onnx), "-o", str(tmp_path / "out"), *flags], standalone_mode=False)
    assert [sizes.guided for sizes in backend.sizes] == [guided]
