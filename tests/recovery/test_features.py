"""Features: ends of blocks, and the channels of them that a pruned model has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import MODELS
from graphs import build, load

from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.recovery.features import block_ends, features


def test_blocks_of_a_residual_network_end_at_its_sums() -> None:
    model = models.load(MODELS / "resnet20-fashion.onnx")
    ends = block_ends(model)
    producers = {name: node.op for node in model.nodes for name in node.outputs}
    assert [producers[name] for name in ends] == ["Add"] * 9 + ["Flatten"]


def test_blocks_of_inverted_bottlenecks_end_at_projections() -> None:
    model = models.load(MODELS / "mobilenet-fashion.onnx")
    ends = block_ends(model)
    producers = {name: node.op for node in model.nodes for name in node.outputs}
    assert {"Conv", "Add"} <= {producers[name] for name in ends}
    relu = {node.inputs[0] for node in model.nodes if node.op == "Clip"}
    assert not relu & set(ends)


def test_blocks_of_a_plain_chain_are_its_layers(tmp_path: Path) -> None:
    text = """(float[N, 4] x) => (float[N, 3] y) <float[4, 5] w1, float[5] b1, float[5, 3] w2> {
        a = MatMul(x, w1)
        b = Add(a, b1)
        c = Relu(b)
        y = MatMul(c, w2)
    }"""
    assert block_ends(load(build(text), tmp_path)) == ["b", "c"]


def test_sum_of_single_numbers_ends_no_block(tmp_path: Path) -> None:
    """An auxiliary loss has no channels to compare."""
    text = """(float[N,4] x) => (float[N,2] y, float[] loss) <float[4,6] w, float[6,2] v, float two = {2}> {
        h = MatMul(x, w)
        r = Relu(h)
        y = MatMul(r, v)
        a = ReduceMean<keepdims = 0>(r)
        b = ReduceMean<keepdims = 0>(y)
        s = Add(a, b)
        loss = Mul(s, two)
    }"""
    model = load(build(text), tmp_path)
    assert model.shapes["s"] == ()
    assert "s" not in block_ends(model)


def test_feature_names_the_channels_that_were_kept(tmp_path: Path) -> None:
    text = """(float[N, 4] x) => (float[N, 3] y) <float[4, 6] w1, float[6, 3] w2> {
        a = MatMul(x, w1)
        c = Relu(a)
        y = MatMul(c, w2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = np.array([True, False, True, True, False, True])
    pruned = models.from_proto(rewrite.cut(model, coupling, keep))
    found = features(model, pruned, coupling, keep)
    assert [feature.tensor for feature in found] == ["a", "c"]
    for feature in found:
        ((axis, kept),) = feature.kept
        assert axis == 1
        assert kept.tolist() == [0, 2, 3, 5]


def test_narrower_tensors_are_left_out_without_a_plan(tmp_path: Path) -> None:
    text = """(float[N, 4] x) => (float[N, 3] y) <float[4, 6] w1, float[6, 5] w2, float[5, 3] w3> {
        a = MatMul(x, w1)
        b = Relu(a)
        c = MatMul(b, w2)
        d = Relu(c)
        y = MatMul(d, w3)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    first = next(g for g in coupling.groups if len(g.units) == 6)
    keep = np.ones(coupling.n_units, bool)
    keep[first.units[0]] = False
    pruned = models.from_proto(rewrite.cut(model, coupling, keep))
    assert [feature.tensor for feature in features(model, pruned)] == ["c", "d"]
