"""Random operators: sessions that compare draw the same numbers in every run, of the distribution asked for."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnx_oamip
from onnx_oamip.graph import random_numbers
from onnx_oamip.graph.runtime import Session

COUNT = 40_000


def drawn(op: str, opset: int = 17, **attributes: object) -> ModelProto:
    """A model whose output is one draw, in the shape of its input."""
    is_like = op.endswith("Like") or op == "Bernoulli"
    inputs = ["x"] if is_like else []
    if not is_like:
        attributes["shape"] = [COUNT]
    nodes = [
        helper.make_node(op, inputs, ["d"], **attributes),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("op", ["RandomNormal", "RandomNormalLike"])
def test_normal_draws_have_their_moments_and_repeat(op: str) -> None:
    session = Session(drawn(op, mean=2.0, scale=3.0), "cpu")
    feed = {"x": np.zeros(COUNT, np.float32)}
    (first,), (second,) = session.run(feed), session.run(feed)
    assert np.array_equal(first, second)
    standard = np.sort((first - 2) / 3)
    assert abs(standard.mean()) < 0.02
    assert abs(standard.std() - 1) < 0.02
    assert abs((standard < -1.96).mean() - 0.025) < 0.004
    neighbours = np.corrcoef(first[:-1], first[1:])[0, 1]
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize("op", ["RandomUniform", "RandomUniformLike"])
def test_uniform_draws_are_spread_evenly(op: str) -> None:
    session = Session(drawn(op, low=-1.0, high=3.0), "cpu")
    (found,) = session.run({"x": np.zeros(COUNT, np.float32)})
    counts, _ = np.histogram(found, bins=20, range=(-1, 3))
    assert counts.sum() == COUNT
    assert np.abs(counts / (COUNT / 20) - 1).max() < 0.1


def test_bernoulli_draws_by_the_probability_of_each_position() -> None:
    x = np.repeat(np.float32([0, 0.2, 0.9, 1]), COUNT // 4)
    (found,) = Session(drawn("Bernoulli"), "cpu").run({"x": x})
    assert found.reshape(4, -1).mean(axis=1) == pytest.approx([0, 0.2, 0.9, 1], abs=0.02)


def test_other_names_draw_other_numbers() -> None:
    one, other = drawn("RandomNormalLike"), drawn("RandomNormalLike")
    other.graph.node[0].output[0] = other.graph.node[1].input[0] = "e"
    feed = {"x": np.zeros(COUNT, np.float32)}
    (first,), (second,) = (Session(proto, "cpu").run(feed) for proto in (one, other))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_model_without_a_draw_and_too_old_ones_stay_the_same_object() -> None:
    assert random_numbers.repeatable(old := drawn("RandomNormalLike", opset=10)) is old
    assert random_numbers.repeatable(untyped := drawn("RandomNormalLike", opset=13)) is untyped
    plain = drawn("Identity")
    assert random_numbers.repeatable(plain) is plain


def _autoencoder() -> ModelProto:
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(
            rng.standard_normal(shape).astype(np.float32) / shape[0] ** 0.5, name
        )

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["mean"]),
        helper.make_node("RandomNormalLike", ["mean"], ["noise"], dtype=1),
        helper.make_node("Add", ["mean", "noise"], ["z"]),
        helper.make_node("MatMul", ["z", "w3"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 12]) for n in "xy"]
    weights = [weight("w1", 12, 32), weight("w2", 32, 6), weight("w3", 6, 12)]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_variational_autoencoder_equals_itself_and_keeps_its_draws() -> None:
    """Comparison, proof and loss see equal draws; the written model draws anew, and a note says so."""
    model = _autoencoder()
    data = {"x": np.random.default_rng(1).standard_normal((200, 12)).astype(np.float32)}
    same = onnx_oamip.verify(model, model, data, outputs={"y": "values"})
    assert same.outputs[0].values["error_over_variance"] == 0
    found = onnx_oamip.prune(model, data, macs=0.6, outputs={"y": "values"}, force=True)
    values = found.report.verification.outputs[0].values
    assert 0 < values["error_over_variance"] < 0.2
    assert [n.op_type for n in found.model.graph.node].count("RandomNormalLike") == 1
    assert any(
        "draws random numbers (RandomNormalLike)" in note for note in found.report.model.notes
    )
