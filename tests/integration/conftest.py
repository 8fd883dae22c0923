"""Exports and engines of the tiny pipeline, made once. Do not write into them."""

from __future__ import annotations

import pytest

from export.backends import load_backend
from sdcompress.bundle import Bundle


@pytest.fixture(scope="session")
def onnx_dense(tiny_source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from export.to_onnx import export_bundle

    return export_bundle(tiny_source, tmp_path_factory.mktemp("onnx") / "dense", dtype="fp32")


@pytest.fixture(scope="session")
def onnx_sparse(pruned: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from export.to_onnx import export_bundle

    return export_bundle(pruned, tmp_path_factory.mktemp("onnx") / "sparse", dtype="fp32")


@pytest.fixture(scope="session")
def engine(onnx_dense: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _build(onnx_dense, tmp_path_factory)


@pytest.fixture(scope="session")
def engine_sparse(onnx_sparse: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _build(onnx_sparse, tmp_path_factory)


def _build(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("engines") / bundle.path.name
    return load_backend("onnxruntime").build(bundle, out, options={"provider": "cpu"})
