"""The study of low-rank factors: factors of a weight, the factored network, and the search for widths and ranks."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_oamip.graph import loading as models
from onnx_oamip.graph.linear_layers import matrix, site
from onnx_oamip.graph.runtime import Session
from tools.bench import low_rank


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_factors_reproduce_the_weight_and_lose_least_variance(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape)
    root = rng.standard_normal((shape[1], shape[1]))
    covariance = root @ root.T
    outer, inner, variances = low_rank.factorised(weight, covariance)
    np.testing.assert_allclose(outer @ inner, weight, atol=1e-10)
    # The whitened weight has the singular values whose squares are the variances.
    singular = np.linalg.svd(weight @ root, compute_uv=False)
    np.testing.assert_allclose(variances, singular**2, rtol=1e-4)
    cut = weight - outer[:, :2] @ inner[:2]
    lost = np.trace(cut @ covariance @ cut.T)
    assert lost == pytest.approx((singular[2:] ** 2).sum(), rel=1e-4)


def network() -> ModelProto:
    """A 1x1 convolution and a dense layer with biases."""
    rng = np.random.default_rng(1)
    values = {
        "w": rng.standard_normal((6, 3, 1, 1)),
        "b": rng.standard_normal(6),
        "v": rng.standard_normal((6, 4)),
        "c": rng.standard_normal(4),
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w", "b"], ["h"], "conv"),
        helper.make_node("GlobalAveragePool", ["h"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "v", "c"], ["y"], "gemm"),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3, 5, 5]), ("y", ["n", 4]))
    ]
    constants = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_factored_network_computes_the_same() -> None:
    model = models.from_proto(network())
    places = [place for n in model.nodes if (place := site(n, model.constants)) is not None]
    factors = {}
    for place in places:
        weight = matrix(place, model.constants[place.weight])[0, :, :, 0]
        factors[place.node.name] = low_rank.factorised(weight, np.eye(weight.shape[1]))[:2]
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    low_rank.factor(proto, model, places, factors)
    assert [node.op_type for node in proto.graph.node].count("Conv") == 2
    assert [node.op_type for node in proto.graph.node].count("Gemm") == 2
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 5)).astype(np.float32)
    (expected,) = Session(model.proto, "cpu").run({"x": x})
    (found,) = Session(proto, "cpu").run({"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-5)
