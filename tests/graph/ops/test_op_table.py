"""The table of operators in docs/ has the entries of the registry."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from onnx import AttributeProto

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


def test_types_of_attributes_are_those_of_the_runtime() -> None:
    """The checker of ONNX does not know these operators, so that their entries state the types."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schemas: dict[tuple[str, str], Any] = {}
    for schema in state.get_all_operator_schema():
        schemas[schema.domain, schema.name] = schema
    stated = [spec for spec in REGISTRY if spec.attributes]
    assert {spec.name for spec in stated} >= {"Attention", "MatMulNBits", "DynamicQuantizeLSTM"}
    for spec in stated:
        known = schemas[spec.domain, spec.name].attributes
        for name, kind in spec.attributes.items():
            if name in known:
                assert known[name].type.name == AttributeProto.AttributeType.Name(kind), name
    for name in {name for spec in stated for name in spec.attributes}:
        owners = [schemas[spec.domain, spec.name].attributes for spec in stated]
        assert any(name in attributes for attributes in owners), name
