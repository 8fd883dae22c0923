"""Which points a sweep has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sdcompress.bundle import Bundle
from sdcompress.errors import InputError, UsageError
from sdcompress.evaluation.quality import QualitySettings
from sdcompress.recipe import Tune
from sdcompress.sweep.grid import (
    RAMESH_ZHAO,
    grid,
    parse_sparsities,
    preset,
    published,
    read_points,
)
from sdcompress.sweep.points import (
    Curve,
    Part,
    Point,
    point_digest,
    point_recipe,
    refuse_foreign,
)
from sdcompress.sweep.run import parse_keep


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3:0.7:0.1", (0.3, 0.4, 0.5, 0.6, 0.7)),  # exactly: no 0.30000000000000004
        ("0.3:0.45:0.1", (0.3, 0.4)),
        ("0.5", (0.5,)),
        ("0.475, 0.35", (0.475, 0.35)),
        ("0:1:0.5", (0.0, 0.5, 1.0)),
    ],
)
def test_sparsities(text: str, expected: tuple[float, ...]) -> None:
    assert parse_sparsities(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0.3:0.7", "0.7:0.3:0.1", "0:1:0", "0:1:1e-9", "1.5", "-0.1", "half", "nan", "0.5;1"],
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected FIRST:LAST:STEP"):
        parse_sparsities(text)


def test_the_grid_is_the_product() -> None:
    points = grid(
        ["text_encoder", "both"], ["magnitude", "random"], ["unstructured", "2:4"], [0.3, 0.5]
    )
    assert len(points) == 2 * 2 * (2 + 1)
    assert Counter(point.curve.component for point in points) == {"text_encoder": 6, "both": 6}
    assert points[2] == Point(parts={"text_encoder": Part(pattern="2:4")})
    both = points[6]
    assert both.parts == {"text_encoder": Part(sparsity=0.3), "unet": Part(sparsity=0.3)}
    assert grid(["unet"], ["magnitude"], ["2:4", "2:4"], []) == [
        Point(parts={"unet": Part(pattern="2:4")})
    ]


def test_what_makes_a_curve() -> None:
    def curve(**part: object) -> Curve:
        return Point.model_validate({"parts": {"unet": part}}).curve

    assert curve(sparsity=0.3) == curve(sparsity=0.7)
    assert curve(pattern="3:4") == curve(pattern="1:4")
    assert curve(pattern="2:4").pattern == "N:4"
    different = [curve(sparsity=0.3), curve(pattern="2:4"), curve(pattern="4:8"),
                 curve(sparsity=0.3, criterion="random"), curve(sparsity=0.3, scope="linear"),
                 curve(sparsity=0.3, allocation="global")]  # fmt: skip
    assert len(set(different)) == 6
    unequal = Point.model_validate(
        {"parts": {"unet": {"pattern": "2:4"}, "text_encoder": {"sparsity": 0.5}}}
    )
    assert unequal.curve.pattern == "unstructured + N:4"
    assert unequal.curve.component == "both"


def test_the_recipe_of_a_point() -> None:
    part = Part(criterion="random", sparsity=0.4, scope="linear", allocation="global")
    recipe = point_recipe(Point(parts={"unet": part}))
    (rule,) = recipe.prune["unet"].rules
    assert (rule.criterion, rule.pattern, rule.sparsity) == ("random", "unstructured", 0.4)
    assert (rule.scope, rule.layers, rule.keep) == ("linear", "*", None)
    assert recipe.prune["unet"].allocation == "global"
    assert recipe.tune is None
    base = recipe.model_copy(update={"seed": 3})
    again = point_recipe(Point(parts={"text_encoder": Part(sparsity=0.1)}), base)
    assert again.seed == 3
    assert list(again.prune) == ["text_encoder"]


def test_an_answer_is_of_the_files_that_were_there(tiny_source: Bundle, tmp_path: Path) -> None:
    """A name stays while its files change; what was measured with the old ones is no answer."""
    recipe = point_recipe(Point(parts={"unet": Part(sparsity=0.4)}))
    settings = QualitySettings(prompts=("a", "b"), steps=1, guidance=1, metrics=("psnr",))
    folder, file = tmp_path / "clip", tmp_path / "real.npz"
    folder.mkdir()
    named = settings.model_copy(update={"clip": str(folder), "real_statistics": str(file)})
    tuned = recipe.model_copy(update={"tune": Tune(method="finetune", images=str(folder))})

    def digests() -> list[str]:
        return [
            point_digest(tiny_source, *made_of)
            for made_of in ((recipe, settings), (recipe, named), (tuned, settings))
        ]

    found = [digests()]
    for name, data in (("a/x", b"1"), ("a/x", b"2"), ("b", b"2")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        found.append(digests())
    file.write_bytes(b"3")
    found.append(digests())
    assert found[-1] == digests()
    plain, clip, images = zip(*found, strict=True)
    assert [len(set(column)) for column in (plain, clip, images)] == [1, 5, 4]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((["tail"], ["magnitude"], ["2:4"], []), "expected 'text_encoder', 'unet' or 'vae'"),
        ((["unet"], ["magic"], ["2:4"], []), "expected one of fisher, .*found 'magic'"),
        ((["unet"], ["magnitude"], ["5:4"], []), "expected 'unstructured' or N:M"),
        ((["unet"], ["magnitude"], ["unstructured"], []), "give them with --sparsity"),
    ],
)
def test_a_name_that_is_unknown(asked: tuple[list[str], ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grid(*asked)  # type: ignore[arg-type]


def test_a_file_lists_points(tmp_path: Path) -> None:
    file = tmp_path / "points.yaml"
    file.write_text(
        "points:\n"
        "  - parts: {text_encoder: {sparsity: 0.5}, unet: {pattern: 2:4, scope: conv}}\n"
        "    name: mixed\n"
        "  - parts: {unet: {sparsity: 0.3, criterion: random}}\n"
    )
    assert read_points(file) == [
        Point(
            parts={"text_encoder": Part(sparsity=0.5), "unet": Part(pattern="2:4", scope="conv")},
            name="mixed",
        ),
        Point(parts={"unet": Part(sparsity=0.3, criterion="random")}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("points: []", "points: expected 1 or more entries"),
        ("points: [{parts: {unet: {sparsty: 0.3}}}]", "sparsty: unknown key"),
        ("points: [{parts: {unet: {}}}]", "needs a 'sparsity'"),
        ("point: []", "point: unknown key"),
        ("[1]", "expected a mapping with 'points'"),
    ],
)
def test_a_bad_file_names_the_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "points.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_points(file)
    assert "\n" not in str(caught.value)


def test_the_study_is_shipped_whole() -> None:
    rows = published()
    assert len(rows) == 100
    assert Counter(row.component for row in rows if row.method == "magnitude") == {
        "text_encoder": 11,
        "unet": 14,
        "both": 9,
        "whole model 6:7": 5,
        "whole model 5:2": 4,
        "whole model 8:1": 2,
    }
    (dense,) = (row for row in rows if row.sparsity == 0)
    assert (dense.fid, dense.clip_score, dense.point) == (18.066, 0.314, None)
    # The study calls this setting 38.5 %: 0.475 of the text encoder and 0.35 of the UNet.
    (nominal,) = (r for r in rows if r.method == "magnitude" and (r.fid, r.clip_score) ==
                  (18.148, 0.31128))  # fmt: skip
    assert round(nominal.sparsity, 3) == 0.385
    assert nominal.component == "both"
    budgets = sorted(r.sparsity for r in rows if r.component == "whole model 6:7"
                     and r.method == "magnitude")  # fmt: skip
    assert [round(b, 1) for b in budgets] == [0.2, 0.3, 0.4, 0.5, 0.6]


def test_the_preset_runs_what_the_study_ran() -> None:
    points = preset(RAMESH_ZHAO)
    assert len(points) == len({point.model_dump_json() for point in points})
    by_method = Counter((p.curve.criterion, "owl" in p.curve.allocation) for p in points)
    assert by_method == {
        ("magnitude", False): 45,  # 46 published, the dense model being one
        ("magnitude", True): 31,
        ("wanda", False): 12,
        ("wanda", True): 11,
    }
    assert {part.scope for point in points for part in point.parts.values()} == {"linear"}
    assert (
        Point(
            parts={
                "text_encoder": Part(sparsity=0.475, scope="linear"),
                "unet": Part(sparsity=0.35, scope="linear"),
            },
            name="both",
        )
        in points
    )
    with pytest.raises(UsageError, match="expected one of ramesh-zhao-2024"):
        preset("another")


def test_keep() -> None:
    assert parse_keep(["clip_score=0.98", "psnr=20"]) == {"clip_score": 0.98, "psnr": 20.0}
    assert parse_keep([]) == {}  # of a search, the tests say what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", RAMESH_ZHAO, "--sparsity", "0.5"], "--preset says .*leave out --sparsity"),
        (["--points", "x.yaml", "--scope", "conv"], "--points says .*leave out --scope"),
        (["--preset", RAMESH_ZHAO, "--points", "x.yaml"], "--preset says .*leave out --points"),
        (["--pattern", "5:4"], "expected 'unstructured' or N:M"),
        (["--component", "unet,tail"], "expected 'text_encoder', 'unet' or 'vae'"),
        (["--keep", "psnr"], "expected a number above 0"),
        (["--keep", "clip_score=1.2"], "the dense model itself has 1"),
        (["--points", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_the_command_refuses_before_it_opens_the_model(options: list[str], message: str) -> None:
    from sdcompress.commands import cli

    with pytest.raises(UsageError, match=message):
        cli.main(["sweep", "no-such-model", "-o", "out", *options], standalone_mode=False)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    refuse_foreign(tmp_path / "new")
    (tmp_path / "pictures").mkdir()
    refuse_foreign(tmp_path)  # a sweep that was killed before its first point
    (tmp_path / "manifest.json").touch()
    with pytest.raises(InputError, match=r"found manifest.json, pictures; choose another folder"):
        refuse_foreign(tmp_path)
    (tmp_path / "points").mkdir()
    refuse_foreign(tmp_path)
    with pytest.raises(InputError, match="expected a folder, found a file"):
        refuse_foreign(tmp_path / "manifest.json")
