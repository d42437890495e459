"""Nodes that torch computes by one function: which chains are replaced, and that values stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.core.records import Model
from onnx_oamip.graph.runtime import Session

torch = pytest.importorskip("torch")

from onnx_oamip.recovery import engine  # noqa: E402
from onnx_oamip.recovery.operators.fusion import fused  # noqa: E402

HEAD = """(float[N, 6] x) => (float[N, 6] y)
    <float root = {1.4142135623730951}, float inverse = {0.7071067811865476}, float one = {1.0}, float half = {0.5}> """
WRITTEN_OUT = {
    "halved at the end": "{ s = Div(x, root) e = Erf(s) a = Add(e, one) m = Mul(x, a) y = Mul(m, half) }",
    "halved first": "{ s = Div(x, root) e = Erf(s) a = Add(one, e) h = Mul(half, x) y = Mul(h, a) }",
    "scaled by the inverse": "{ s = Mul(inverse, x) e = Erf(s) a = Add(e, one) m = Mul(x, a) y = Mul(m, half) }",
    "halved between": "{ s = Div(x, root) e = Erf(s) a = Add(e, one) m = Mul(a, half) y = Mul(m, x) }",
}
OTHER = {
    "read elsewhere": "{ s = Div(x, root) e = Erf(s) a = Add(e, one) m = Mul(x, a) z = Mul(m, half) y = Add(z, e) }",
    "another divisor": "{ s = Div(x, half) e = Erf(s) a = Add(e, one) m = Mul(x, a) y = Mul(m, half) }",
    "divided by the tensor": "{ s = Div(root, x) e = Erf(s) a = Add(e, one) m = Mul(x, a) y = Mul(m, half) }",
    "halved twice": "{ s = Div(x, root) e = Erf(s) a = Add(e, one) m = Mul(a, half) y = Mul(m, half) }",
    "not halved": "{ s = Div(x, root) e = Erf(s) a = Add(e, one) y = Mul(x, a) }",
}


def operators(model: Model, kept: tuple[str, ...] = ("y",)) -> list[str]:
    return [node.op for node in fused(model, model.nodes, kept)]


def errors(model: Model) -> float:
    """Largest difference of torch's output from ONNX Runtime's."""
    x = np.linspace(-4, 4, 18, dtype=np.float32).reshape(3, 6)
    (truth,) = Session(model.proto, "cpu").run({"x": x})
    (found,) = engine.Engine(model, ["y"]).run({"x": torch.from_numpy(x)})
    return float(np.abs(found.numpy() - truth).max())


@pytest.mark.parametrize("form", WRITTEN_OUT)
def test_written_out_gelu_is_one_node(form: str, tmp_path: Path) -> None:
    model = load(build(HEAD + WRITTEN_OUT[form]), tmp_path)
    assert operators(model) == ["Gelu"]
    assert errors(model) < 1e-6


@pytest.mark.parametrize("form", OTHER)
def test_other_chains_are_not_fused(form: str, tmp_path: Path) -> None:
    model = load(build(HEAD + OTHER[form]), tmp_path)
    assert operators(model) == [node.op for node in model.nodes]
    assert errors(model) < 1e-5


def test_chain_stays_where_an_inner_tensor_is_compared(tmp_path: Path) -> None:
    model = load(build(HEAD + WRITTEN_OUT["halved at the end"]), tmp_path)
    assert operators(model, ("y", "a")) == ["Div", "Erf", "Add", "Mul", "Mul"]
