"""Weights that are NaN or infinite, and constants that are infinite on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.errors import ModelError
from onnx_oamip.graph import finite_weights

NET = """(float[N,3] x) => (float[N,2] y)
<float[3,4] w, float[4] b, float[4] gain, float[2,20] v, float16[4,20] half> {
    h = Gemm(x, w, b)
    s = Mul(h, gain)
    c = Cast<to = 1>(half)
    m = MatMul(s, c)
    r = Relu(m)
    t = Transpose<perm = [1, 0]>(v)
    y = MatMul(r, t)
}"""


def _with(name: str, index: tuple[int, ...], number: float, text: str = NET) -> ModelProto:
    proto = build(text)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    value = numpy_helper.to_array(tensor).copy()
    value[index] = number
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return proto


@pytest.mark.parametrize(
    ("name", "index", "number", "reader"),
    [
        ("w", (2, 1), np.nan, "Gemm"),
        ("w", (0, 3), -np.inf, "Gemm"),
        ("b", (1,), np.inf, "Gemm"),
        ("gain", (3,), np.nan, "Mul"),
        ("half", (1, 2), np.inf, "MatMul"),
        ("half", (1, 2), np.nan, "MatMul"),
    ],
)
def test_weight_that_is_not_finite_is_named(
    name: str, index: tuple[int, ...], number: float, reader: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as error:
        load(_with(name, index, number), tmp_path)
    expected = f"the weight '{name}', which {reader} '"
    assert str(error.value).startswith(expected)
    assert f"is {number:g} at index {list(index)}, so" in str(error.value)


def test_first_faulty_weight_of_a_large_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite_weights, "CHUNK", 5)
    proto = _with("w", (2, 1), np.nan)
    with pytest.raises(ModelError, match=r"is nan at index \[2, 1\]"):
        load(proto, tmp_path)


def test_masks_and_bounds_may_be_infinite(tmp_path: Path) -> None:
    text = """(float[N,4] x) => (float[N,2] y)
    <float[4,4] w, float[4] mask = {0, -inf, 0, 0}, float top = {inf}, float[4,2] v> {
        h = MatMul(x, w)
        c = Clip(h, , top)
        s = Add(c, mask)
        p = Softmax(s)
        y = MatMul(p, v)
    }"""
    proto = _with(
        "mask", (1,), -np.inf, text.replace(" = {0, -inf, 0, 0}", "").replace(" = {inf}", " = {1}")
    )
    assert load(proto, tmp_path).nodes
