"""Relevance of errors to an objective of several terms, and rare positives among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import objectives
import onnx
import pytest
from graphs import build, constants, load
from heads import replace_weight

from onnx_oamip import prune
from onnx_oamip.core.records import Array, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective import compare
from onnx_oamip.statistics import relevance

TWO_HEADS = """(float[N,8] x) => (float[] alarm, float[] value)
    <float[8,32] w, float[32] b, float[32,3] wa, float[3] ba, float[32,2] wv> {
        a = Gemm(x, w, b) h = Relu(a) l = Gemm(h, wa, ba) alarm = Sigmoid(l) value = MatMul(h, wv)
    }"""
X = np.random.default_rng(0).standard_normal((1200, 8)).astype(np.float32)
POSITIVE = 0.03
"""Share of the decisions that are positive."""


def _network() -> onnx.ModelProto:
    proto = build(TWO_HEADS)
    weights = constants(proto)
    scores = np.maximum(X @ weights["w"] + weights["b"], 0) @ weights["wa"]
    limit = np.quantile(scores, 1 - POSITIVE, axis=0)
    replace_weight(proto, "ba", -limit.astype(np.float32))
    return proto


@pytest.fixture
def case(tmp_path: Path) -> tuple[Model, Samples]:
    model = load(_network(), tmp_path)
    samples = dataset.load({"x": X[:64]}, model)
    assert samples is not None
    return model, samples


def test_relevance_is_loss_per_squared_error(case: tuple[Model, Samples]) -> None:
    """The output channels of a narrow consumer are changed one at a time."""
    model, samples = case
    objective = objectives.of_samples(model, samples)
    found = relevance.collect(model, couple(model), objective, samples, "cpu", batch_size=64)
    assert {name: len(values) for name, values in found.items()} == {"Gemm_2": 3, "MatMul_3": 2}
    session = Session(_network(), "cpu")
    truth = session.run({"x": X[:64]}, ["alarm", "value"])
    hidden = np.maximum(X[:64] @ model.constants["w"] + model.constants["b"], 0)
    names = objective.tensors

    def outputs(alarm: Array, value: Array) -> list[Array]:
        given = {"l": alarm, "value": value}
        return [given[name] for name in names]

    logits = hidden @ model.constants["wa"] + model.constants["ba"]
    whole = outputs(logits, truth[1])
    noise = relevance.CHANGE * np.random.default_rng((0, 0)).standard_normal((32, 3))
    for column in range(3):
        weight = model.constants["wa"].copy()
        weight[:, column] *= 1 + noise[:, column]
        changed = hidden @ weight + model.constants["ba"]
        loss = compare(objective, whole, outputs(changed, truth[1])).total
        error = float(np.square(changed - logits).sum()) / 3 / 64
        assert found["Gemm_2"][column] == pytest.approx(loss / error, rel=1e-3)


def test_one_term_needs_no_relevance(tmp_path: Path) -> None:
    model = load(
        build("(float[N,6] x) => (float[] y) <float[6,4] w> { y = MatMul(x, w) }"), tmp_path
    )
    samples = dataset.load({"x": X[:8, :6]}, model)
    assert samples is not None
    objective = objectives.of_samples(model, samples)
    assert relevance.collect(model, couple(model), objective, samples, "cpu") == {}


def test_rare_positives_are_found_and_their_recall_reported(tmp_path: Path) -> None:
    proto = _network()
    onnx.save(proto, tmp_path / "model.onnx")
    settings = Settings.create(macs=0.5, align=1, device="cpu", workers=1, force=True)
    data = {"x": X[:800], "eval.x": X[800:]}
    report = prune(tmp_path / "model.onnx", data, tmp_path / "out.onnx", settings)
    before, after = (
        Session(onnx.load(tmp_path / name), "cpu").run({"x": X[800:]}, ["alarm"])[0] > 0.5
        for name in ("model.onnx", "out.onnx")
    )
    assert 0.005 < before.mean() < 0.05
    (measure,) = (m for m in report.verification.outputs if m.term == "alarm")
    recall = float((before & after).sum() / before.sum())
    assert measure.values["recall"] == pytest.approx(recall)
    assert measure.values["positives"] == pytest.approx(float(before.mean()))
    # Calling all of them negative would agree in more than 95 % of the decisions.
    assert recall > 0.6
    assert measure.lost >= 100 * (1 - recall) - 1e-6
    (warning,) = measure.warnings
    assert "of the decisions of 'alarm' are positive" in warning
    assert warning in report.notes
    assert len(constants(onnx.load(tmp_path / "out.onnx"))["b"]) < 32


@pytest.mark.parametrize(("columns", "limit"), [(1, 0.06), (40, 0.3)])
def test_small_columns_are_kept_beside_large_ones(columns: int, limit: float) -> None:
    """Half of the units serve each half of the columns, and both lose alike where the first is 100 times as large."""
    text = f"""(float[N,8] x) => (float[N,{2 * columns}] y) <float[8,32] w, float[32,{2 * columns}] v>
        {{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }}"""
    proto = build(text)
    gains = np.geomspace(1, 0.1, 32)[:, None]
    weight = np.random.default_rng(3).standard_normal((32, 2, columns)) * gains[..., None]
    weight[::2, 0] = weight[1::2, 1] = 0
    weight[:, 0] *= 100
    replace_weight(proto, "v", weight.reshape(32, -1).astype(np.float32))
    settings = Settings(
        macs=0.5, align=1, workers=1, refit="none", cache="off", outputs={"y": "values"}
    )
    data = {"x": X[:200], "eval.x": X[200:]}
    pruned = prune(proto, data, settings=settings)
    truth, found = (Session(model, "cpu").run({"x": X[200:]})[0] for model in (proto, pruned.model))
    error = np.square(found - truth).mean(axis=0) / truth.var(axis=0)
    assert (error.reshape(2, -1).mean(axis=1) < limit).all()
    report = pruned.report.verification.outputs[0]
    assert report.values["error_over_variance"] == pytest.approx(error.mean(), rel=1e-4)
