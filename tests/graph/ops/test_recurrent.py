"""Recurrent operators beyond the cases: what masking means inside a loop, layouts, costs, states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, distance, feed, load, operands, random_keep
from onnx.reference import ReferenceEvaluator

from onnx_oamip.graph import cost
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _graph(
    op: str, attrs: str = "", directions: int = 1, extra: str = "", operand: str = ""
) -> onnx.ModelProto:
    rows = 8 * GATES[op]
    return build(
        f"""(float[6,3,5] x) => (float[] y) <float[{directions},{rows},5] w, float[{directions},{rows},8] r,
        float[{directions},{2 * rows}] b, int64[3] to = {{0, 0, {8 * directions}}},
        float[{8 * directions},2] w2{extra}> {{
            h = {op}<hidden_size = 8{attrs}>(x, w, r, b{operand})
            t = Transpose<perm = [0, 2, 1, 3]>(h)
            m = Reshape(t, to)
            y = MatMul(m, w2)
        }}"""
    )


@pytest.mark.parametrize("op", GATES)
def test_masked_unit_has_all_gates_zero(op: str, tmp_path: Path) -> None:
    """Two readings of the reference: columns of R zeroed and the output masked; or everything of the unit zeroed.

    From zero states the second leaves the unit at zero for ever (tanh(0) = 0, half of nothing), and nothing reads it.
    """
    model = load(_graph(op, ', direction = "bidirectional"', 2), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(1), 0.5)
    dead = onnx.ModelProto()
    dead.CopyFrom(model.proto)
    gone = np.flatnonzero(~coupling.keep(("r", 2), keep))
    for tensor in dead.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("w", "r", "b"):
            gates = value.reshape(2, -1, 8, *value.shape[2:])
            gates[:, :, gone] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    values = feed(model, 0)
    want = Session(dead, "cpu").run(values)
    assert distance(want, Session(rewrite.mask(model, coupling, keep), "cpu").run(values)) < 1e-6
    assert distance(want, Session(rewrite.cut(model, coupling, keep), "cpu").run(values)) < 1e-6


@pytest.mark.parametrize("op", GATES)
def test_macs_count_every_time_step(op: str, tmp_path: Path) -> None:
    model = load(_graph(op, ', direction = "bidirectional"', 2), tmp_path)
    coupling = couple(model)
    # 6 steps of 3 sequences (one sample is one step of them) in 2 directions, then the product behind.
    steps, gates = 6 * 3 * 2, GATES[op]
    for hidden in (8, 3):
        macs = steps * gates * hidden * (5 + hidden) + 6 * 3 * 2 * hidden * 2
        assert cost.ledger(model, coupling).cost(np.asarray([hidden])).macs == macs // model.batch


def test_consumers_name_the_state_that_weights_meet(tmp_path: Path) -> None:
    model = load(_graph("LSTM"), tmp_path)
    inside = [c for c in couple(model).consumers if c.data == "r"]
    assert [(c.node, c.axis, c.weight, c.weight_axis) for c in inside] == [("LSTM_0", 2, "h", 3)]


def test_hidden_size_and_every_array_shrink(tmp_path: Path) -> None:
    model = load(
        _graph("LSTM", ', direction = "bidirectional"', 2, ", float[2,24] p", ", , , , p"), tmp_path
    )
    coupling = couple(model)
    keep = np.arange(8) < 3
    cut = rewrite.cut(model, coupling, keep)
    node = next(n for n in cut.graph.node if n.op_type == "LSTM")
    assert next(a.i for a in node.attribute if a.name == "hidden_size") == 3
    shapes = {slot: v.shape for name, slot, v in operands(cut) if name == node.name}
    assert shapes == {1: (2, 12, 5), 2: (2, 12, 3), 3: (2, 24), 7: (2, 9)}


def test_constant_zero_states_are_dropped(tmp_path: Path) -> None:
    text = """(float[6,N,5] x) => (float[] y) <float[1,24,5] w, float[1,24,8] r, int64 at = {1}, int64[1] z = {0},
    int64[1] d = {1}, int64[1] k = {8}, float[8,2] w2> {
        n = Shape(x)
        one = Gather(n, at)
        two = Unsqueeze(one, z)
        size = Concat<axis = 0>(d, two, k)
        h0 = ConstantOfShape(size)
        h = GRU<hidden_size = 8>(x, w, r, , , h0)
        s = Squeeze(h, d)
        y = MatMul(s, w2)
    }"""
    model = load(build(text), tmp_path)
    cut = rewrite.cut(model, couple(model), np.arange(8) < 5)
    assert {n.op_type for n in cut.graph.node} == {"GRU", "Squeeze", "MatMul"}
    for batch in (1, 4):
        x = np.random.default_rng(batch).standard_normal((6, batch, 5)).astype(np.float32)
        assert Session(cut, "cpu").run({"x": x})[0].shape == (6, batch, 2)


@pytest.mark.skipif(
    onnx.defs.onnx_opset_version() < 28, reason="the evaluator of an older onnx cannot do it either"
)
@pytest.mark.parametrize("op", GATES)
def test_batch_first_layout_is_pruned_exactly(op: str, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider does not run ``layout = 1``; the reference evaluator does, in one direction."""
    rows = 8 * GATES[op]
    text = f"""(float[3,6,5] x) => (float[3,1,2] y) <float[1,{rows},5] w, float[1,{rows},8] r, float[1,{2 * rows}] b,
    float[8,2] w2> {{
        h, last = {op}<hidden_size = 8, layout = 1>(x, w, r, b)
        y = MatMul(last, w2)
    }}"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == 8
    keep = random_keep(coupling, np.random.default_rng(3), 0.5)
    cut = rewrite.cut(model, coupling, keep)
    onnx.checker.check_model(cut, full_check=True)
    values = feed(model, 0)
    want = ReferenceEvaluator(rewrite.mask(model, coupling, keep)).run(None, values)
    assert distance(want, ReferenceEvaluator(cut).run(None, values)) < 1e-5


def test_wrong_state_shape_pins_the_units(tmp_path: Path) -> None:
    model = load(
        build(
            """(float[6,3,5] x, float[1,3,8] h0, float[1,3,8] c0) => (float[] y)
            <float[1,32,5] w, float[1,32,8] r, float[8,2] w2> {
                h, last, cell = LSTM<hidden_size = 8>(x, w, r, , , h0, c0)
                y = MatMul(last, w2)
            }"""
        ),
        tmp_path,
    )
    coupling = couple(model)
    assert coupling.n_units == 0
    assert any("a graph input (h0)" in p.reason for p in coupling.pinned)
