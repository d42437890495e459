"""Published JSON schemas: fresh where they are made from types, and refusing what breaks them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command_line import SCHEMAS, SIGNS
from conftest import MODELS

from onnx_oamip.artifacts.plan_schema import PlanFile
from onnx_oamip.cli import cli
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.loading import load
from onnx_oamip.planning.latency_tables import LatencyTable
from tools import schemas


def published(name: str) -> dict:
    return json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("plan-file", PlanFile.model_json_schema()),
        ("latency-table", LatencyTable.model_json_schema()),
        ("settings", Settings.schema_document()),
    ],
)
def test_schema_of_a_file_is_fresh(name: str, schema: dict) -> None:
    found = published(name)
    assert found.pop("$schema") == schemas.DIALECT
    found.pop("title")
    schema.pop("title", None)
    made = json.loads(json.dumps(schema))
    assert _without_defaults(found) == _without_defaults(made), "run: python -m tools.schemas"


def _without_defaults(schema: Any) -> Any:
    """The schema without what says nothing, which releases of pydantic write or leave out."""
    if isinstance(schema, list):
        return [_without_defaults(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _without_defaults(part) for key, part in schema.items()}
    if kept.get("additionalProperties") is True:
        del kept["additionalProperties"]
    if "const" in kept and kept.get("enum") == [kept["const"]]:
        del kept["enum"]
    return kept


def test_schema_of_a_recovery_is_fresh() -> None:
    """Its document is made without training, as torch is not installed everywhere."""
    found = schemas.schema_of(schemas.recovered(load(MODELS / schemas.MODEL)))
    published_one = published("recover")
    assert published_one["properties"]["recovery"] == found["properties"]["recovery"]
    assert published_one["required"] == found["required"]


def test_every_command_with_a_document_has_a_schema() -> None:
    names = {path.stem for path in SCHEMAS.iterdir()}
    files = {"plan-file", "latency-table", "settings"}
    assert names == {*schemas.COMMANDS, "apply", "error", "recover", *files}
    assert set(SIGNS.values()) | {"apply"} <= names
    assert set(cli.commands) <= names


def test_schema_requires_keys_and_types() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the extra 'dev'")
    document = {"schema_version": 1, "error": "it failed", "hint": None, "status": 2}
    jsonschema.validate(document, published("error"))
    for broken in ({**document, "status": "2"}, {"error": "it failed"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, published("error"))


def test_schema_describes_nested_values() -> None:
    value = {"a": 1, "b": [{"c": "x", "d": 1}, {"c": "y"}], "timings": {"load": 1}, "e": None}
    found = schemas.schema_of(value)
    assert found["required"] == ["a", "b", "e", "timings"]
    assert found["properties"]["b"]["items"]["required"] == ["c"]
    assert found["properties"]["timings"] == {"type": ["object", "null"]}
    assert found["properties"]["e"] == {}
