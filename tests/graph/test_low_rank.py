"""Low-rank layers: a layer written as two computes the same, and only plain layers of their own weight are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import assert_exact, build, distance, feed, load, random_keep
from onnx import numpy_helper

from onnx_oamip.graph import low_rank
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session

LAYERS = """(float[N,3,4,4] x) => (float[N,5] y)
<float[8,3,3,3] w0, float[6,8,1,1] w1, float[6] b1, float[6,6,1,1] w2, float[6,7] w3, float[9,7] w4, float[9] b4,
 float[5,9] w5> {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0)
    r = Relu(a)
    c = Conv(r, w1, b1)
    t = Relu(c)
    s = Conv<strides = [2, 2]>(t, w2)
    g = GlobalAveragePool(s)
    f = Flatten(g)
    m = MatMul(f, w3)
    q = Relu(m)
    e = Gemm<transB = 1>(q, w4, b4)
    v = Relu(e)
    y = Gemm<alpha = 0.5, transB = 1>(v, w5)
}"""


def test_plain_layers_are_candidates(tmp_path: Path) -> None:
    """Neither a 3x3 or strided convolution, nor a product with a factor."""
    model = load(build(LAYERS), tmp_path)
    assert [place.weight for place in low_rank.candidates(model)] == ["w1", "w3", "w4"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("q = Relu(m)", "q0 = Relu(m)\n    q1 = MatMul(f, w3)\n    q = Add(q0, q1)"),
        ("float[6,7] w3", "float[6,7] w3_low_rank, float[6,7] w3"),
        ("m = MatMul(f, w3)", "w = Neg(w3)\n    m = MatMul(f, w)"),
        ("float[6,7] w3", "float[1,7] w3"),
    ],
    ids=["shared", "name taken", "computed", "rank 1"],
)
def test_other_weights_are_no_candidates(old: str, new: str, tmp_path: Path) -> None:
    text = LAYERS.replace(old, new)
    if "float[1,7]" in text:
        text = text.replace("f = Flatten(g)", "f0 = Flatten(g)\n    f = ReduceMean<axes = [1]>(f0)")
    if "w3_low_rank" in text:
        text = text.replace("q = Relu(m)", "k = MatMul(f, w3_low_rank)\n    q = Add(m, k)")
    found = [place.weight for place in low_rank.candidates(load(build(text), tmp_path))]
    assert "w3" not in found
    assert "w4" in found


def test_sparse_weights_are_no_candidates(tmp_path: Path) -> None:
    proto = build(LAYERS)
    for tensor in proto.graph.initializer:
        if tensor.name == "w3":
            sparse = numpy_helper.to_array(tensor).copy()
            sparse[:, 1:] = 0
            tensor.CopyFrom(numpy_helper.from_array(sparse, "w3"))
    found = [place.weight for place in low_rank.candidates(load(proto, tmp_path))]
    assert found == ["w1", "w4"]


def test_factored_model_computes_the_same_and_is_pruned_exactly(tmp_path: Path) -> None:
    model = load(build(LAYERS), tmp_path)
    places = low_rank.candidates(model)
    made = low_rank.factored(model, places)
    values = feed(model, 0, 3)
    outputs = [Session(m.proto, "cpu", exact=True).run(values) for m in (model, made)]
    assert distance(*outputs) < 1e-5
    shapes = {name: value.shape for name, value in made.constants.items()}
    assert (shapes["w1"], shapes["w1_low_rank"]) == ((6, 6, 1, 1), (6, 8, 1, 1))
    assert (shapes["w3"], shapes["w3_low_rank"]) == ((6, 7), (6, 6))
    assert (shapes["w4"], shapes["w4_low_rank"]) == ((9, 7), (7, 7))
    coupling = couple(made)
    groups = low_rank.groups(coupling, places)
    widths = [len(coupling.groups[index].units) for index in groups.values()]
    assert widths == [6, 6, 7]
    assert_exact(made, coupling, random_keep(coupling, np.random.default_rng(0), 0.5))
