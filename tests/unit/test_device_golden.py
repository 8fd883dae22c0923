"""Values compared without numpy, and a package that needs the standard library only."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from export.device.golden import relative_error, unpack, verdict
from export.specs import make_inputs

PACKAGE = Path(__file__).parents[2] / "export" / "device"
OPTIONAL = {"tensorrt", "tensorrt_rtx"}  # and those through importlib only


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "int64"])
def test_values_are_those_of_numpy(dtype: str) -> None:
    values = np.array([1, -2, 300], f"<{np.dtype(dtype).str[1:]}")
    assert unpack(values.tobytes(), dtype) == (1, -2, 300)


def test_relative_error() -> None:
    assert relative_error([3.0, 4.0], [3.0, 4.0]) == 0
    assert relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert math.isnan(relative_error([3.0, math.inf], [3.0, 4.0]))
    assert math.isnan(relative_error([3.0, math.nan], [3.0, 4.0]))
    assert relative_error([3.0], [3.0, 4.0]) == math.inf
    assert relative_error([0.0], [0.0]) == 0
    assert relative_error([1.0], [0.0]) == math.inf


def test_the_worst_output_decides() -> None:
    assert verdict("dense unet", {"a": 0.01, "b": 0.002}, 0.01) == (
        True,
        "dense unet: a differs by 1.0e-02 of the host's output, 0.01 allowed",
    )
    assert verdict("x", {"a": 0.02, "b": 0.0}, 0.01)[0] is False
    assert verdict("x", {"a": 0.02, "b": math.nan}, 1.0) == (
        False,
        "x: b holds NaN or infinity, which is seen as a black picture",
    )
    assert verdict("x", {"a": math.inf, "b": 0.0}, 1.0)[0] is False


def test_it_agrees_with_the_hosts_own_measure() -> None:
    from export.parity import _relative_error

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1000)).astype(np.float32)
    ours = relative_error(unpack(a.tobytes(), "float32"), unpack(b.tobytes(), "float32"))
    assert ours == pytest.approx(_relative_error(a, b), rel=1e-6)


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda f: f.name)
def test_the_package_needs_the_standard_library_only(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [(node.module or "").split(".")[0]]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{file.name} looks outside its package"
            continue
        else:
            continue
        assert set(found) <= sys.stdlib_module_names, f"{file.name} imports {found}"


def test_the_host_makes_inputs_of_known_types_only() -> None:
    from export.device.engine import DTYPES
    from export.specs import component_spec

    config = {"vocab_size": 100, "max_position_embeddings": 7, "hidden_size": 4}
    made = make_inputs(component_spec("text_encoder", config), config, "fp16")
    assert {a.dtype.name for a in made.values()} <= set(DTYPES.values())
