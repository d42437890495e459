"""Inputs with a default value: still offered after pruning where it did not change, and named where it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from graphs import build, constants, distance
from onnx import ModelProto, helper, numpy_helper

from onnx_oamip import Settings, prune
from onnx_oamip.core.records import Report
from onnx_oamip.graph import loading as models

NET = """(float[N,6] x, float t, float[3] bias, float unread, float[12] scale) => (float[N,3] y)
<float[6,12] w1, float[12,3] w2, float t = {0.1}, float[3] bias, float unread = {7}, float one = {1},
 float[12] scale> {
    a = MatMul(x, w1)
    b = Mul(a, scale)
    h = Relu(b)
    m = MatMul(h, w2)
    o = Sub(one, t)
    p = Mul(m, o)
    y = Add(p, bias)
}"""
QUICK = {
    "importance": "activation",
    "allocate": "uniform",
    "refit": "none",
    "align": 1,
    "device": "cpu",
    "force": True,
}
ROWS = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)


def _pruned(proto: ModelProto, folder: Path) -> tuple[Report, ModelProto]:
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    report = prune(
        folder / "net.onnx",
        {"x": ROWS},
        folder / "out.onnx",
        Settings(macs=0.5, **QUICK),  # type: ignore[arg-type]
    )
    return report, ModelProto.FromString((folder / "out.onnx").read_bytes())


def test_unchanged_defaults_are_inputs_of_the_pruned_file(tmp_path: Path) -> None:
    proto = build(NET)
    report, out = _pruned(proto, tmp_path)
    # The scale of the hidden units was cut with them.
    assert [value.name for value in out.graph.input] == ["x", "t", "bias", "unread"]
    assert [note for note in report.model.notes + report.notes if "'scale'" in note]
    assert "'t'" not in " ".join(report.notes)
    session = onnxruntime.InferenceSession(out.SerializeToString())
    (first,) = session.run(None, {"x": ROWS[:2]})
    # The value is not folded into what the graph computes from it: (1 - t) is linear in t.
    (other,) = session.run(None, {"x": ROWS[:2], "t": np.array(0.6, np.float32)})
    bias = constants(proto)["bias"]
    np.testing.assert_allclose((other - bias) * 0.9, (first - bias) * 0.4, rtol=1e-5, atol=1e-6)


def test_condition_with_a_default_is_not_resolved(tmp_path: Path) -> None:
    proto = build(
        "(float[N,6] x, bool c) => (float[N,3] y) <float[6,8] w1, float[8,3] w2, bool c = {1}> {"
        " a = MatMul(x, w1)"
        " r = If(c) <then_branch = t () => (float[N,8] p) { p = Relu(a) },"
        " else_branch = e () => (float[N,8] q) { q = Tanh(a) }>"
        " y = MatMul(r, w2) }"
    )
    _, out = _pruned(proto, tmp_path)
    session = onnxruntime.InferenceSession(out.SerializeToString())
    given = [
        session.run(None, {"x": ROWS[:2], **feed})[0]
        for feed in ({}, {"c": np.array(True)}, {"c": np.array(False)})
    ]
    assert distance(given[:1], given[1:2]) == 0
    assert distance(given[:1], given[2:]) > 1e-3


def test_listed_weights_are_constants_with_a_note(tmp_path: Path) -> None:
    proto = build(NET)
    listed = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name not in listed:
            proto.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    report, out = _pruned(proto, tmp_path)
    assert [value.name for value in out.graph.input] == ["x"]
    assert any("lists all its initialisers" in note for note in report.model.notes)


def test_default_of_declared_symbolic_length(tmp_path: Path) -> None:
    proto = build(NET)
    (bias,) = [value for value in proto.graph.input if value.name == "bias"]
    bias.type.tensor_type.shape.dim[0].dim_param = "K"
    model_file = tmp_path / "net.onnx"
    model_file.write_bytes(proto.SerializeToString())
    model = models.load(model_file)
    assert model.shapes["bias"] == (3,)
    np.testing.assert_array_equal(
        model.constants["bias"],
        numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "bias")),
    )
