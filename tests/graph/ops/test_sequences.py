"""Sequences of known tensors: written out, they compute the same, and channels are followed through them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from graphs import assert_exact, build, feed, load, random_keep
from onnx import TensorProto, helper

from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session


@dataclass(frozen=True)
class Listed:
    """Nodes between ``h`` (N, 8), ``k`` (N, 8) and ``r`` (N, 8), and the units counted by hand."""

    body: str
    units: int
    left: frozenset[str] = frozenset()
    opset: int = 17


CASES = {
    "concatenated": Listed(
        "s = SequenceConstruct(h, k) c = ConcatFromSequence<axis = 1>(s) r = MatMul(c, w)",
        24,
    ),
    "stacked": Listed(
        "s = SequenceConstruct(h, k) c = ConcatFromSequence<axis = 1, new_axis = 1>(s)"
        " r = ReduceMax<axes = [1], keepdims = 0>(c)",
        8,
    ),
    "stacked, opset 11": Listed(
        "s = SequenceConstruct(h, k) c = ConcatFromSequence<axis = -2, new_axis = 1>(s)"
        " r = ReduceMax<axes = [1], keepdims = 0>(c)",
        8,
        opset=11,
    ),
    "appended": Listed(
        "e = SequenceEmpty() a = SequenceInsert(e, h) s = SequenceInsert(a, k, zero)"
        " t = Identity(s) c = ConcatFromSequence<axis = 1>(t) r = MatMul(c, w)",
        24,
    ),
    "erased": Listed(
        "s = SequenceConstruct(h, k, h) a = SequenceErase(s, zero) b = SequenceErase(a)"
        " r = SequenceAt(b, last)",
        8,
    ),
    "split": Listed(
        "s = SplitToSequence<axis = 1>(h, parts) a = SequenceAt(s, zero) b = SequenceAt(s, one)"
        " g = Sigmoid(b) q = Mul(a, g) z = MatMul(q, v) r = Add(z, k)",
        3 + 8,
    ),
    "split, opset 11": Listed(
        "s = SplitToSequence<axis = -1>(h, parts) a = SequenceAt(s, zero) b = SequenceAt(s, one)"
        " g = Sigmoid(b) q = Mul(a, g) z = MatMul(q, v) r = Add(z, k)",
        3 + 8,
        opset=11,
    ),
    "counted": Listed(
        "s = SequenceConstruct(h, k) n = SequenceLength(s) f = Cast<to = 1>(n) q = Mul(h, f) r = Add(q, k)",
        8,
    ),
    "optional": Listed("o = Optional(h) e = OptionalGetElement(o) r = Add(e, k)", 8),
    "chosen at run time": Listed(
        "s = SequenceConstruct(h, k) m = Shape(x) d = Gather(m, zero) i = Mod(d, two) q = SequenceAt(s, i)"
        " r = Add(q, k)",
        0,
        frozenset({"SequenceConstruct", "SequenceAt"}),
    ),
    "also read as a whole": Listed(
        "s = SequenceConstruct(h, k) a = SequenceAt(s, zero) m = Shape(x) d = Gather(m, zero) i = Mod(d, two)"
        " b = SequenceAt(s, i) r = Add(a, b)",
        0,
        frozenset({"SequenceConstruct", "SequenceAt"}),
    ),
}
TEXT = """(float[N,5] x) => (float[N,3] y) <float[5,{wide}] w1, float[5,8] w2, float[16,8] w, float[3,8] v,
 float[8,3] w3, int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64 last = {{-1}},
 int64[2] parts = {{3, 3}}> {{
    h = MatMul(x, w1)
    k = MatMul(x, w2)
    {body}
    y = MatMul(r, w3)
}}"""


@pytest.mark.parametrize("name", CASES)
def test_sequences_of_known_tensors_are_followed(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wide = 6 if "parts" in case.body else 8
    proto = build(TEXT.format(body=case.body, wide=wide), case.opset)
    model = load(proto, tmp_path)
    kinds = {node.op for node in model.nodes}
    sequential = {op for op in kinds if "Sequence" in op or "Optional" in op}
    assert sequential == case.left
    values = feed(model, 3, 2)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (wanted,) = session.run(None, values)
    (found,) = Session(model.proto, "cpu").run(values)
    assert np.abs(wanted - found).max() <= 1e-5 * np.abs(wanted).max()
    coupling = couple(model)
    assert coupling.n_units == case.units, [p.reason for p in coupling.pinned]
    if case.units:
        assert_exact(model, coupling, random_keep(coupling, np.random.default_rng(0), 0.5))


def test_output_that_is_a_sequence_stays(tmp_path: Path) -> None:
    proto = build(TEXT.format(body="s = SequenceConstruct(h, k) r = SequenceAt(s, one)", wide=8))
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 8])
    proto.graph.output.append(helper.make_value_info("s", helper.make_sequence_type_proto(tensor)))
    model = load(proto, tmp_path)
    assert "SequenceConstruct" in {node.op for node in model.nodes}
    assert [value.name for value in model.proto.graph.output] == ["y", "s"]
