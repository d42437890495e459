"""Pruning on samples of unequal lengths: the reported costs and errors are those of these samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import build, load

from onnx_oamip import Settings, prune
from onnx_oamip.core.errors import DataError
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.published.dependence import pooled_activations

AUDIO = """
(float[1,1,T] x) => (float[1,4] y)
<float[12,1,9] a, float[12] b, float[16,12,5] c, float[16] d, float[4,16] e> {
  h = Conv<kernel_shape = [9], pads = [4, 4]>(x, a, b)
  r = Relu(h)
  i = Conv<kernel_shape = [5], pads = [2, 2]>(r, c, d)
  s = Relu(i)
  p = ReduceMean<axes = [2], keepdims = 0>(s)
  y = Gemm<transB = 1>(p, e)
}
"""
Feed = dict[str, np.ndarray[Any, Any]]


def _feeds(count: int, seed: int) -> list[Feed]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 60, count)
    lengths[0] = 41
    return [{"x": rng.standard_normal((1, 1, n)).astype(np.float32)} for n in lengths]


def test_methods_that_compare_positions_refuse(tmp_path: Path) -> None:
    body = AUDIO.replace("(float[1,4] y)", "(float[N,4] y)").replace("float[1,1,T]", "float[N,1,T]")
    onnx.save(build(body), tmp_path / "m.onnx")
    options = Settings(macs=0.5, align=1, force=True, cache="off", importance="oamip")
    with pytest.raises(DataError, match="samples of unequal shapes"):
        prune(tmp_path / "m.onnx", _feeds(12, 0), tmp_path / "o.onnx", options)
    assert not (tmp_path / "o.onnx").exists()
    model = load(build(body), tmp_path)
    samples = dataset.load(_feeds(4, 0), model)
    assert samples is not None
    with pytest.raises(DataError, match="samples of unequal shapes"):
        pooled_activations.collect(model, couple(model), samples, "cpu", by_tap=True)


def test_costs_and_errors_are_those_of_the_samples(tmp_path: Path) -> None:
    onnx.save(build(AUDIO), tmp_path / "m.onnx")
    data, held_out = _feeds(25, 0), _feeds(9, 1)
    options = Settings(macs=0.5, align=1, force=True, cache="off")
    report = prune(
        tmp_path / "m.onnx", iter(data), tmp_path / "o.onnx", options, eval_data=held_out
    )
    length = int(np.median([feed["x"].shape[2] for feed in data]))
    assert report.before.macs == length * 12 * 9 + length * 16 * 12 * 5 + 4 * 16
    before, after = (
        [Session(str(tmp_path / name), "cpu").run(feed)[0] for feed in held_out]
        for name in ("m.onnx", "o.onnx")
    )
    error = np.linalg.norm(np.asarray(after) - before) / np.linalg.norm(before)
    assert report.verification.samples == 9
    assert report.verification.output_relative_error == pytest.approx(error, rel=1e-3)
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence < 1e-5


def test_positions_may_be_the_classes() -> None:
    """A pointer: the softmax chooses among as many positions as the feed has."""
    text = """(float[1,T,6] x) => (float[1,T] p) <float[6,16] w, float[16,1] v, int64[1] last = {2}> {
        h = MatMul(x, w)  r = Relu(h)  s = MatMul(r, v)  l = Squeeze(s, last)  p = Softmax(l) }"""
    rng = np.random.default_rng(0)
    feeds = [
        {"x": rng.standard_normal((1, n, 6)).astype(np.float32)} for n in rng.integers(3, 9, 30)
    ]
    proto = build(text)
    options = Settings(macs=0.5, align=1, force=True, cache="off")
    pruned = prune(proto, feeds[:20], settings=options, eval_data=feeds[20:])
    before, after = (
        [Session(model, "cpu").run(feed)[0].argmax() for feed in feeds[20:]]
        for model in (proto, pruned.model)
    )
    same = float(np.mean(np.equal(before, after)))
    assert pruned.report.verification.agreement == pytest.approx(same)
