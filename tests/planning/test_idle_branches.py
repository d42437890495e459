"""Branches that no calibration sample runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.core.records import Objective
from onnx_oamip.data import dataset
from onnx_oamip.graph import cost
from onnx_oamip.objective import detect
from onnx_oamip.planning.idle_branches import marked, removable

NET = """(float[N,6] x, bool flag) => (float[N,4] y)
<float[6,12] w0, float[12,16] w1, float[16,10] w2, float[12,14] v1, float[14,10] v2, float[10,4] w3> {
    a = MatMul(x, w0)
    h = Relu(a)
    o = If(flag) <
        then_branch = yes () => (float[N,10] u) { p = MatMul(h, w1)  r = Relu(p)  u = MatMul(r, w2) },
        else_branch = no () => (float[N,10] v) {
            turned = Transpose(v1)  back = Transpose(turned)
            p2 = MatMul(h, back)  r2 = Relu(p2)  v = MatMul(r2, v2)
        }
    >
    y = MatMul(o, w3)
}"""
ROWS = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("flags", "free"),
    [
        pytest.param([True, True], {"w0", "w1", "w2"}, id="one"),
        pytest.param([False, False], {"w0", "back", "w2"}, id="other"),
        pytest.param([True, False], {"w0", "w1", "back", "w2"}, id="both"),
    ],
)
def test_weights_of_an_idle_branch_are_kept(
    flags: list[bool], free: set[str], tmp_path: Path
) -> None:
    model = load(build(NET), tmp_path)
    feeds = [{"x": ROWS[:4], "flag": np.asarray(flag)} for flag in flags]
    samples = dataset.load(feeds, model)
    assert samples is not None
    known = marked(model, samples)
    coupling = removable(known, (), Objective())
    assert {group.name for group in coupling.groups} == free
    reasons = {pin.tensor: pin.reason for pin in coupling.pinned if "no calibration" in pin.reason}
    idle = {"w0", "w1", "back", "w2"} - free
    assert idle <= reasons.keys()
    assert set(reasons.values()) == (
        {"only a branch of If 'If_2' reads it, which no calibration sample runs"} if idle else set()
    )


@pytest.mark.parametrize(
    ("flags", "branches"),
    [([True], 12 * 16 + 16 * 10), ([False], 12 * 14 + 14 * 10), ([True, False], 12 * 30 + 30 * 10)],
)
def test_macs_of_an_idle_branch_are_not_counted(
    flags: list[bool], branches: int, tmp_path: Path
) -> None:
    model = load(build(NET), tmp_path)
    samples = dataset.load([{"x": ROWS, "flag": np.asarray(flag)} for flag in flags], model)
    assert samples is not None
    assert cost.count(marked(model, samples)).macs == 6 * 12 + branches + 10 * 4


def test_decisions_that_are_summed_are_kept(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (int64[N] age, float[N,12] r) <float[6,12] w, float[12,5] v, float half = {0.5},
        int64[1] last = {1}> {
        h = MatMul(x, w) r = Relu(h) l = MatMul(r, v) p = Sigmoid(l) d = Greater(p, half) i = Cast <to = 7> (d)
        age = ReduceSum <keepdims = 0> (i, last) }"""
    model = load(build(text), tmp_path)
    coupling = removable(model, (), detect(model))
    assert not coupling.groups
    assert "output 'age' is judged by these channels" in {pin.reason for pin in coupling.pinned}
    ignored = removable(
        model, (), detect(model, outputs={"age": ("ignore", 1.0), "r": ("values", 1.0)})
    )
    assert {group.name for group in ignored.groups} == {"v"}


def test_random_samples_decide_nothing(tmp_path: Path) -> None:
    model = load(build(NET), tmp_path)
    assert {group.name for group in removable(model, (), Objective()).groups} == {
        "w0",
        "w1",
        "back",
        "w2",
    }
