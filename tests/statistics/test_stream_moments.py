"""Moments of the channels of streams equal those of numpy, over all positions or a sample of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import activations, build, load

from onnx_oamip.statistics import stream_moments

NET = """(float[N,3,4,4] x) => (float[N,2,5] y)
<float[5,3,1,1] w, float[5] b, int64[3] shape = {0, 5, -1}, float[5,5] v, float[16,2] u> {
    a = Conv(x, w, b)
    r = Reshape(a, shape)
    t = Transpose<perm = [0, 2, 1]>(r)
    m = MatMul(t, v)
    n = Transpose<perm = [0, 2, 1]>(m)
    k = MatMul(n, u)
    y = Transpose<perm = [0, 2, 1]>(k)
}"""


@pytest.mark.parametrize("least", [65536, 8])
def test_moments_are_those_of_the_channels(
    least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_moments, "LEAST_ROWS", least)
    monkeypatch.setattr(stream_moments, "ROWS_PER_CHANNEL", 16 if least > 8 else 1)
    model = load(build(NET), tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3, 4, 4)).astype(np.float32)
    axes = [("t", 2), ("a", 1), ("a", 1)]
    found = stream_moments.collect(model, axes, [{"x": x[:4]}, {"x": x[4:]}], "cpu")
    assert set(found) == {("t", 2), ("a", 1)}
    a = activations(model, {"x": x}, ["a"])["a"].astype(np.float64)
    rows = a.transpose(0, 2, 3, 1).reshape(-1, 5)
    moments = found["a", 1]
    if least > 8:
        assert np.allclose(moments.mean, rows.mean(axis=0))
        assert np.allclose(moments.second, rows.T @ rows / len(rows))
        assert np.allclose(moments.covariance, np.cov(rows.T, bias=True), atol=1e-8)
        assert np.allclose(found["t", 2].second, moments.second)
    else:  # ten of 96 positions
        assert not np.allclose(moments.second, rows.T @ rows / len(rows))
        assert np.linalg.matrix_rank(moments.second, tol=1e-6) <= 4  # three inputs and the bias
