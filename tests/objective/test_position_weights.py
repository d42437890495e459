"""Weights of positions by hand, and a proposal network whose rare positives must be found at half of the cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_oamip import prune
from onnx_oamip.core.records import Array, Model, Objective
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.loading import from_proto
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective import Normaliser, Term
from onnx_oamip.objective.position_weights import (
    MAX_WEIGHT,
    PositionWeights,
    has_rare_decisions,
    position_weights,
    weighting,
    weights_of,
)

CLASSES = Term("c", "c", "c", "classes", 1, form="logits")
VALUES = Term("v", "v", "v", "values", 1)


def _scaled(*terms: Term, outputs: list[Array]) -> Objective:
    statistics = Normaliser(Objective(terms))
    statistics.update(outputs)
    return statistics.finish()


def _scores(positive: Array) -> Array:
    """Scores [N, 2, ...] of two classes."""
    return np.stack([np.where(positive, 0.0, 4.0), np.where(positive, 4.0, 0.0)], axis=1)


# ------------------------------------------------------------------------------------------------------------ weights


def test_positive_positions_weigh_as_much_as_all_others() -> None:
    positive = np.zeros((2, 2, 5), bool)
    positive[1, 0, 3] = positive[1, 1, 4] = True
    scores = _scores(positive)
    weights = weights_of(_scaled(CLASSES, outputs=[scores]), [scores])
    rows = weights.rows((2, 2, 5)).reshape(positive.shape)
    np.testing.assert_allclose(rows[positive], 0.5 / 0.1)
    np.testing.assert_allclose(rows[~positive], 0.5 / 0.9)


def test_terms_count_by_their_weights() -> None:
    positive = np.arange(20) >= 18
    scores = _scores(positive)
    values = np.random.default_rng(0).standard_normal((20, 3))
    term = Term("c", "c", "c", "classes", 1, weight=3.0, form="logits")
    weights = weights_of(_scaled(VALUES, term, outputs=[values, scores]), [values, scores])
    np.testing.assert_allclose(
        weights.rows((20,)), 0.25 + 0.75 * np.where(positive, 5.0, 0.5 / 0.9)
    )


def test_binary_positions_weigh_the_mean_of_their_columns() -> None:
    term = Term("b", "b", "b", "binary", 1, form="logits")
    scores = np.full((10, 2), -3.0)
    scores[0, 0] = scores[:5, 1] = 3.0
    weights = weights_of(_scaled(term, outputs=[scores]), [scores])
    np.testing.assert_allclose(weights.rows((10,)), [3.0, *[(0.5 / 0.9 + 1) / 2] * 9])


def test_power_tempers_weights() -> None:
    scores = _scores(np.arange(10) == 0)
    objective = _scaled(CLASSES, outputs=[scores])
    plain, tempered = (weights_of(objective, [scores], power=p).rows((10,)) for p in (1.0, 0.5))
    np.testing.assert_allclose(tempered, np.sqrt(plain))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 2, 2), [1, 2, 3, 4, 5, 6, 7, 8]),
        ((2, 4, 2), [1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6, 7, 8, 7, 8]),
        ((2, 1, 1), [2.5, 6.5]),
        ((2,), [2.5, 6.5]),  # a layer behind a Flatten
        ((4,), [2.5, 2.5, 6.5, 6.5]),  # samples split into parts
        ((3, 2), [2.5, 6.5, 2.5, 6.5, 2.5, 6.5]),  # a recurrent layer with the time in front
        ((2, 2, 3), [1, 1.5, 2, 3, 3.5, 4, 5, 5.5, 6, 7, 7.5, 8]),
    ],
)
def test_weights_are_carried_over_by_place(shape: tuple[int, ...], expected: list[float]) -> None:
    weights = PositionWeights(0.0, ((1.0, np.arange(1.0, 9.0).reshape(2, 2, 2)),))
    np.testing.assert_allclose(weights.rows(shape), expected)


def test_large_maps_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_oamip.objective.position_weights.MAX_NUMBERS", 8)
    scores = _scores(np.arange(32).reshape(2, 4, 4) == 0)
    weights = weights_of(_scaled(CLASSES, outputs=[scores]), [scores])
    ((_, values),) = weights.maps
    assert values.shape == (2, 2, 2)
    assert values[0, 0, 0] == values.max()


def test_weight_of_a_single_positive_is_bounded() -> None:
    scores = _scores(np.arange(1000) == 0)
    rows = weights_of(_scaled(CLASSES, outputs=[scores]), [scores]).rows((1000,))
    assert rows[0] == MAX_WEIGHT
    np.testing.assert_allclose(rows[1:], 0.5 / 0.999)


def test_even_decisions_have_no_weights() -> None:
    scores = _scores(np.arange(10) % 2 == 0)
    objective = _scaled(CLASSES, outputs=[scores])
    assert not has_rare_decisions(objective)
    assert weighting(objective) == {}
    rng = np.random.default_rng(0)
    assert position_weights(_model(rng, _pictures(rng, 2)), objective, [], "cpu") is None


# ---------------------------------------------------------------------------------------------------- proposal network

SIDE, HIDDEN = 8, 12


def _pictures(rng: np.random.Generator, count: int = 200) -> Array:
    """Six channels of noise, and one that is positive at 3 % of the positions."""
    noise = rng.standard_normal((count, 6, SIDE, SIDE))
    found = rng.random((count, 1, SIDE, SIDE)) < 0.03
    return np.concatenate([noise, found * rng.uniform(1.5, 2.5, found.shape)], 1).astype(np.float32)


def _model(rng: np.random.Generator, pictures: Array) -> Model:
    """A hidden layer of random weights, and scores fitted to what is there, on a background that varies much."""
    columns = pictures.transpose(0, 2, 3, 1).reshape(-1, 7)
    first = rng.standard_normal((HIDDEN, 7)).astype(np.float32)
    hidden = np.maximum(columns @ first.T, 0)
    positive = columns[:, 6] > 0
    background = np.tanh(columns[:, 0]) + np.abs(columns[:, 1]) - 1 + 0.5 * columns[:, 2]
    background -= 0.5 * np.abs(columns[:, 3])
    wanted = 6.0 * positive - 4 + background
    roots = np.sqrt(np.where(positive, 15.0, 1.0))
    system = np.c_[hidden, np.ones(len(hidden))] * roots[:, None]
    second = np.linalg.lstsq(system, wanted * roots, rcond=None)[0]
    constants = {
        "w1": first[:, :, None, None],
        "w2": np.stack([np.zeros(HIDDEN), second[:-1]])[:, :, None, None],
        "b2": np.asarray([0.0, second[-1]]),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["a"], "first"),
            helper.make_node("Relu", ["a"], ["h"], "relu"),
            helper.make_node("Conv", ["h", "w2", "b2"], ["s"], "second"),
            helper.make_node("Softmax", ["s"], ["p"], "softmax", axis=1),
        ],
        "proposals",
        [helper.make_tensor_value_info("x", 1, ["N", 7, SIDE, SIDE])],
        [helper.make_tensor_value_info("p", 1, ["N", 2, SIDE, SIDE])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return from_proto(proto)


@pytest.mark.parametrize(("seed", "least"), [(2, 0.85), (3, 0.8)])
def test_rare_positives_are_found_at_half_of_the_cost(
    seed: int, least: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    pictures = _pictures(rng)
    onnx.save(_model(rng, pictures).proto, tmp_path / "model.onnx")
    settings = Settings.create(macs=0.5, align=1, device="cpu", workers=1, force=True)
    report = prune(tmp_path / "model.onnx", {"x": pictures[:100]}, tmp_path / "out.onnx", settings)
    assert report.after.macs <= 0.5 * report.before.macs
    feed = {"x": _pictures(np.random.default_rng(99))}
    before, after = (
        Session(onnx.load(tmp_path / name), "cpu").run(feed, ["p"])[0].argmax(axis=1)
        for name in ("model.onnx", "out.onnx")
    )
    assert 0.01 < before.mean() < 0.05
    assert after[before == 1].mean() > least
    assert (before == after).mean() > 0.995
    # A refit that counts all rows alike fits the background and loses more.
    assert report.compared["refit"] < 0.5 * report.compared["refit_of_equal_rows"]
