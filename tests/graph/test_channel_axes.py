"""Axes of channels: those that layers write and read, and no axes of positions."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphs import build, load

from onnx_oamip.graph.channel_axes import channel_axes

ATTENTION = """(float[N, 6, 8] x) => (float[N, 6, 8] y)
<float[8, 16] wq, float[8, 16] wk, float[8, 16] wv, float[16, 8] wo, int64[4] heads = {0, 6, 2, 8},
 int64[3] joined = {0, 6, 16}> {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    qh = Reshape(q, heads)
    kh = Reshape(k, heads)
    vh = Reshape(v, heads)
    qt = Transpose<perm = [0, 2, 1, 3]>(qh)
    kt = Transpose<perm = [0, 2, 3, 1]>(kh)
    vt = Transpose<perm = [0, 2, 1, 3]>(vh)
    s = MatMul(qt, kt)
    p = Softmax<axis = -1>(s)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    oj = Reshape(ot, joined)
    y = MatMul(oj, wo)
}"""
IMAGE = """(float[N, 6, 6, 3] x) => (float[N, 4, 36] y)
<float[3] shift, float[3] scale, float[4, 3, 3, 3] w, int64[3] places = {0, 4, 36}> {
    d = Sub(x, shift)
    e = Div(d, scale)
    t = Transpose<perm = [0, 3, 1, 2]>(e)
    c = Conv<pads = [1, 1, 1, 1]>(t, w)
    r = Relu(c)
    y = Reshape(r, places)
}"""
RESIDUAL = """(float[N, 3, 6, 6] x) => (float[N, 3, 6, 6] y) <float[3, 3, 3, 3] w> {
    c = Conv<pads = [1, 1, 1, 1]>(x, w)
    s = Add(x, c)
    y = Tanh(s)
}"""

SPEECH = """(float[N, 7, 5] x) => (float[7, 1, N, 6] y)
<float[5] gain, float[1, 24, 5] w, float[1, 24, 6] r> {
    g = Mul(x, gain)
    t = Transpose<perm = [1, 0, 2]>(g)
    y = LSTM<hidden_size = 6>(t, w, r)
}"""
EXPERTS = """(float[N, 7, 5] x) => (float[N, 7, 4] y) <float[5] gain, float[5, 4] w> {
    g = Mul(x, gain)
    y = Einsum<equation = "ntc,cd->ntd">(g, w)
}"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ATTENTION, {"x": {2}, "q": {2}, "qt": {1, 3}, "kt": {1, 2}, "s": {1}, "p": {1}, "o": {1, 3}, "y": {2}}),
        (IMAGE, {"x": {3}, "e": {3}, "t": {1}, "c": {1}, "r": {1}, "y": {1}}),
        (RESIDUAL, {"x": {1}, "c": {1}, "s": {1}, "y": {1}}),
        (SPEECH, {"x": {2}, "t": {2}, "y": {3}}),
        (EXPERTS, {"x": {2}, "g": {2}, "y": {2}}),
    ],
    ids=["attention", "image", "residual", "speech", "experts"],
)  # fmt: skip
def test_channels_are_told_from_positions(
    text: str, expected: dict[str, set[int]], tmp_path: Path
) -> None:
    found = channel_axes(load(build(text), tmp_path))
    for tensor, axes in expected.items():
        assert {axis for name, axis in found if name == tensor} == axes, tensor
