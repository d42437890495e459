"""The table of operators in docs/ has the entries of the registry."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from conftest import ROOT

from onnx_oamip.graph.ops import REGISTRY


@pytest.fixture(scope="module")
def op_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("op_table", ROOT / "tools" / "op_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operator_page_is_up_to_date(op_table: ModuleType) -> None:
    text = op_table.FILE.read_text(encoding="utf-8")
    assert op_table.updated(text) == text, "run: python -m tools.op_table"


def test_every_operator_is_listed(op_table: ModuleType) -> None:
    text = op_table.table()
    for spec in REGISTRY:
        assert f"`{spec.domain + '.' if spec.domain else ''}{spec.name}`" in text


def test_missing_markers_are_reported(op_table: ModuleType) -> None:
    with pytest.raises(ValueError, match="operators:begin"):
        op_table.updated("no markers")
