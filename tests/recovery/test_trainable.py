"""Choice of the initialisers that training may change: weights, and numbers per channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load
from onnx import numpy_helper

pytest.importorskip("torch")

from onnx_oamip.recovery.trainable import Trainable

CASES = {
    "masks and gains of an attention": (
        """(float[N, 6, 8] x) => (float[N, 6, 8] y)
        <float[8, 16] wq, float[16] bq, float[8, 16] wk, float[8, 16] wv, float[16, 8] wo, float[2, 1, 1] gain,
         int64[4] heads = {0, 6, 2, 8}, int64[3] joined = {0, 6, 16}, float[1, 1, 6] keys, float[6, 1] places,
         float[8] end> {
            q0 = MatMul(x, wq)
            q = Add(bq, q0)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            qh = Reshape(q, heads)
            kh = Reshape(k, heads)
            vh = Reshape(v, heads)
            qt = Transpose<perm = [0, 2, 1, 3]>(qh)
            kt = Transpose<perm = [0, 2, 3, 1]>(kh)
            vt = Transpose<perm = [0, 2, 1, 3]>(vh)
            s0 = MatMul(qt, kt)
            s1 = Mul(s0, gain)
            s = Add(s1, keys)
            p = Softmax<axis = -1>(s)
            o = MatMul(p, vt)
            ot = Transpose<perm = [0, 2, 1, 3]>(o)
            oj = Reshape(ot, joined)
            z = MatMul(oj, wo)
            zp = Add(z, places)
            y = Mul(zp, end)
        }""",
        ["wq", "bq", "wk", "wv", "gain", "wo", "end"],
    ),
    "numbers per channel of one that is spread": (
        """(float[N, 3, 4, 4] x) => (float[N, 2, 4, 4] y)
        <float[8, 3, 1, 1] w, float[1, 8, 1, 1] v, float[1, 8, 1, 1] gain, float[8, 1, 1] shift,
         float[2, 8, 1, 1] last> {
            h = Conv(x, w)
            one = Conv(h, v)
            gate = Sigmoid(one)
            spread = Mul(gate, gain)
            moved = Add(spread, shift)
            kept = Mul(h, moved)
            y = Conv(kept, last)
        }""",
        ["w", "v", "gain", "shift", "last"],
    ),
    "frequencies of positions": (
        """(float[N, 6, 8] x, int64[N, 6] at) => (float[N, 6, 3] y)
        <float[8] frequencies, float[1, 1, 8] phase, int64[1] end = {-1}, float[8, 3] w> {
            f = Cast<to = 1>(at)
            places = Unsqueeze(f, end)
            angles = Mul(places, frequencies)
            moved = Add(angles, phase)
            waves = Cos(moved)
            s = Add(x, waves)
            y = MatMul(s, w)
        }""",
        ["phase", "w"],
    ),
    "anchors and strides": (
        """(float[N, 3, 4, 4] x) => (float[N, 4, 16] y)
        <float[1, 3, 1, 1] mean, float[4, 3, 3, 3] w, int64[3] places = {0, 4, 16}, float[1, 1, 16] anchors,
         float[1, 16] strides, float[4, 1] gain> {
            d = Sub(x, mean)
            c = Conv<pads = [1, 1, 1, 1]>(d, w)
            r = Reshape(c, places)
            a = Add(r, anchors)
            s = Mul(a, strides)
            y = Mul(s, gain)
        }""",
        ["mean", "w", "gain"],
    ),
    "masks of classes": (
        """(float[N, 6] x) => (float[N, 4] y)
        <float[6, 4] w1, float[4] suppressed = {0, -1e9, 0.5, 0}, float[4, 4] w2,
         float[4] hidden = {0.1, -1000, 0.5, -1e4}, float[4] kept = {1, 1, 0, 1}> {
            a = MatMul(x, w1)
            b = Add(a, suppressed)
            c = Gemm(b, w2, hidden)
            y = Mul(c, kept)
        }""",
        ["w1", "w2"],
    ),
    "units of values": (
        """(float[N, 2] x) => (float[N, 4] y)
        <float[2] mean = {5e4, 3}, float[2, 4] w = {-5e4, 1, 2, 3, 4, 5, 6, 7}, float[4] b = {-2e3, -3e3, -4e3, -5e3},
         float[4] gain = {-1, 0, 1, 1}, float[4] shift = {1e5, 290, 0, 0}> {
            c = Sub(x, mean)
            h = Gemm(c, w, b)
            g = Mul(h, gain)
            y = Add(g, shift)
        }""",
        ["mean", "w", "b", "gain", "shift"],
    ),
    "constant of a weight and of a statistic": (
        """(float[N, 3, 4, 4] x) => (float[N, 4, 4, 4] y)
        <float[4, 3, 1, 1] w, float[4] b, float[4] ones, float[4] var> {
            c = Conv(x, w, b)
            y = BatchNormalization(c, ones, b, b, var)
        }""",
        ["w", "ones"],
    ),
    "weight that is a graph output": (
        """(float[N, 6] x) => (float[N, 4] y, float[6, 4] w, float[20, 4] c)
        <float[6, 4] w, float[4, 20] v, float[20, 4] u> {
            a = MatMul(x, w)
            b = MatMul(a, v)
            y = MatMul(b, u)
            c = Transpose(v)
        }""",
        ["u"],
    ),
    "weights that are rounded": (
        """(float[N, 6] x) => (float[N, 4] y)
        <float[4, 6] w, float scale = {0.02}, int8 zero = {0}, float[4] b, float[4] scales, int8[4] zeros> {
            xq = QuantizeLinear(x, scale, zero)
            xd = DequantizeLinear(xq, scale, zero)
            wq = QuantizeLinear<axis = 0>(w, scales, zeros)
            wd = DequantizeLinear<axis = 0>(wq, scales, zeros)
            wt = Transpose(wd)
            a = MatMul(xd, wt)
            y = Add(a, b)
        }""",
        ["w", "b"],
    ),
    "scales of codes that are no node's own": (
        """(float[N, 6] x) => (float[N, 4] y) <int8[6, 4] codes, float[4] scales, float[4] b> {
            f = Cast<to = 1>(codes)
            w = Mul(f, scales)
            a = MatMul(x, w)
            y = Add(a, b)
        }""",
        ["b"],
    ),
    "embedding that is scaled for another use": (
        """(int64[N, 5] x) => (float[N, 5, 9] y) <float[9, 64] e, float scale = {0.5}> {
            a = Gather(e, x)
            f = Mul(e, scale)
            t = Transpose(f)
            y = MatMul(a, t)
        }""",
        ["e"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_weights_and_numbers_per_channel_are_trained(name: str, tmp_path: Path) -> None:
    text, expected = CASES[name]
    model = load(build(text), tmp_path)
    assert sorted(Trainable(model)(model.nodes)) == sorted(expected)


LARGEST = np.finfo(np.float32).max


@pytest.mark.parametrize("number", [-np.inf, -LARGEST, LARGEST, np.inf])
def test_constant_that_hides_classes_is_not_trained(number: float, tmp_path: Path) -> None:
    text, expected = CASES["masks of classes"]
    proto = build(text)
    (held,) = (held for held in proto.graph.initializer if held.name == "suppressed")
    value = np.array([0.1, number, 0.5, 0.1], np.float32)
    held.CopyFrom(numpy_helper.from_array(value, held.name))
    model = load(proto, tmp_path)
    assert sorted(Trainable(model)(model.nodes)) == sorted(expected)
