"""A small network with samples, and the result of a command, for tests of the command line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

try:
    import jsonschema
except ImportError:  # it belongs to the extra `dev`
    jsonschema = None


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        """stdout as one strict JSON document."""

        def refuse(word: str) -> None:
            raise ValueError(f"{word} is not JSON")

        document = json.loads(self.out, parse_constant=refuse)
        check_schema(document)
        return document


SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
SIGNS = {
    "status": "error",
    "broken": "run",
    "unrecovered": "recover",
    "unmatched": "checkpoint",
    "options": "config",
    "compared_models": "compare",
    "float_model": "int8",
    "ratio": "pack",
    "packed": "unpack",
    "points": "frontier",
    "after": "prune",
    "predicted": "plan",
    "method": "score",
    "pruned": "verify",
    "levels": "profile",
    "models": "bench",
    "operators": "ops",
    "devices": "doctor",
    "solvers": "solvers",
    "groups": "inspect",
}
"""Schema of a document, by the first of these keys that it has."""


def check_schema(document: dict) -> None:
    """The document is as its published schema says, if the package that checks it is installed."""
    name = next((name for key, name in SIGNS.items() if key in document), None)
    if jsonschema is not None and name is not None:
        validator(name).validate(document)


@cache
def validator(name: str) -> Any:
    """Validator of a published schema, which is checked itself when it is first used."""
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


def perceptron(path: Path, hidden: int = 16) -> None:
    """input (batch, 6) -> hidden -> relu -> logits (batch, 4)."""
    rng = np.random.default_rng(1)
    shapes = {
        "first.weight": (hidden, 6),
        "first.bias": (hidden,),
        "second.weight": (4, hidden),
        "second.bias": (4,),
    }
    weights = [
        numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Gemm", ["input", "first.weight", "first.bias"], ["a"], "first", transB=1),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node(
            "Gemm", ["b", "second.weight", "second.bias"], ["logits"], "second", transB=1
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )


def samples(count: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def without_notes(text: str) -> str:
    """A text without its lines of notes, such as those about the objective."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("note: "))


def one_sentence(result: Result) -> None:
    assert re.fullmatch(r"Error: [^\n]+[.?]\n", without_notes(result.err)), result.err
    assert "Traceback" not in result.err


def error_document(result: Result) -> dict[str, Any]:
    """The document of an error: finding and way out apart, which together are the sentence on stderr."""
    document: dict[str, Any] = json.loads(result.out)
    assert list(document) == ["schema_version", "error", "hint", "status"]
    assert document["schema_version"] == 1
    sentence = "; ".join(filter(None, (document["error"], document["hint"])))
    assert result.err.splitlines()[-1] == f"Error: {sentence}"
    return document
