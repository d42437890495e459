"""Nodes that a cut adds around a node: they are counted before they are there, and a second cut adds none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import CASES
from graphs import assert_exact, build, constants, distance, feed, load, operands
from onnx import numpy_helper

from onnx_oamip.core.records import (
    Bools,
    Cost,
    Coupling,
    Model,
)
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

NORMALISED = """(float[N,4,5] x) => (float[] y) <float[5,12] w1, float[12,3] w2{constants}> {{
    h = MatMul(x, w1)
    {body}
    y = MatMul(r, w2)
}}"""
IMAGE = """(float[N,3,6,6] x) => (float[] y) <float[12,3,1,1] w1, float[4,12,1,1] w2> {
    h = Conv(x, w1)
    r = LRN<size = 5, alpha = 2.0>(h)
    y = Conv(r, w2)
}"""
GROUPS = """(float[N,3,6,6] x) => (float[N,4,6,6] y)
<float[12,3,1,1] w1, float[4,12,1,1] w2, int64[2] sizes = {{7, 5}}{constants}> {{
    c = Conv(x, w1)
    first, second = Split<axis = 1>(c, sizes)
    h = Concat<axis = 1>(second, first)
    {body}
    y = Conv(r, w2)
}}"""
MEAN = """(float[N,3,6,6] x) => (float[] y) <float[12,3,1,1] w1, float[4,1,3,3] w2> {
    h = Conv(x, w1)
    r = ReduceMean<axes = [1]>(h)
    y = Conv(r, w2)
}"""
_LAYER = NORMALISED.format(
    constants=", float[12] gain, float[12] b", body="r = LayerNormalization(h, gain, b)"
)
_RMS = NORMALISED.format(constants=", float[12] gain", body="r = RMSNormalization(h, gain)")
_GROUPS = GROUPS.format(
    constants=", float[12] gain, float[12] b",
    body="r = GroupNormalization<num_groups = 4>(h, gain, b)",
)
_GROUPS_WRITTEN_OUT = GROUPS.format(
    constants=", int64[3] in = {0, 4, -1}, int64[4] out = {0, 12, 6, 6}, float[4] ones = {1.0, 1.0, 1.0, 1.0}, "
    "float[4] none = {0.0, 0.0, 0.0, 0.0}",
    body="g = Reshape(h, in)  i = InstanceNormalization(g, ones, none)  r = Reshape(i, out)",
)
# Added at the first cut: nodes and floating constants.
SPREAD = Counter(Pad=1, Gather=2)
LAST = Counter(Pad=1, Slice=1)
NETS = {
    "layer": (_LAYER, 17, LAST, 0),
    "rms": (_RMS, 23, LAST, 0),
    "lrn": (IMAGE, 17, SPREAD, 0),
    "lrn-opset-9": (IMAGE, 9, SPREAD, 0),
    "groups": (_GROUPS, 21, SPREAD, 0),
    "groups-written-out": (_GROUPS_WRITTEN_OUT, 17, SPREAD, 0),
    "mean": (MEAN, 17, Counter(Mul=1), 1),
}


def _net(name: str, folder: Path) -> tuple[Model, Coupling]:
    text, opset, _, _ = NETS[name]
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"this onnx knows opsets up to {onnx.defs.onnx_opset_version()}")
    proto = build(text, opset, 11 if opset > 20 else 8)
    for tensor in proto.graph.initializer:  # as the cut writes them, so that bytes compare
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    model = load(proto, folder)
    return model, couple(model)


def _counts(model: Model, coupling: Coupling, keep: Bools) -> tuple[Cost, Cost]:
    """Predicted and counted."""
    widths = np.asarray([int(keep[g.units].sum()) for g in coupling.groups], np.int64)
    cut = models.from_proto(rewrite.cut(model, coupling, keep), model.bindings)
    return cost.ledger(model, coupling).cost(widths), cost.count(cut)


@pytest.mark.parametrize("name", NETS)
def test_inserted_nodes_are_counted_in_the_cost(name: str, tmp_path: Path) -> None:
    model, coupling = _net(name, tmp_path)
    _, _, added, floats = NETS[name]
    before = Counter(node.op for node in model.nodes)
    for kept in (12, 11, 5, 1):
        keep = np.arange(12) >= 12 - kept
        cut = assert_exact(model, coupling, keep)
        here = Counter(node.op_type for node in cut.graph.node)
        assert here - before == (added if kept < 12 else Counter())
        predicted, counted = _counts(model, coupling, keep)
        assert (predicted.macs, predicted.params) == (counted.macs, counted.params)
        weights = sum(
            v.size
            for v in constants(rewrite.cut(model, coupling, keep)).values()
            if v.dtype == np.float32
        )
        assert predicted.params == weights
        # Lengths of fields differ by a byte or two.
        assert abs(predicted.bytes - counted.bytes) <= 20
    whole = cost.ledger(model, coupling).cost(cost.full_widths(coupling))
    assert predicted.params <= whole.params - 11 * 3 + floats


@pytest.mark.parametrize("name", NETS)
def test_second_cut_inserts_no_further_nodes(name: str, tmp_path: Path) -> None:
    model, coupling = _net(name, tmp_path)
    first = np.arange(12) % 4 != 1
    half = load(rewrite.cut(model, coupling, first), tmp_path)
    again = couple(half)
    assert again.n_units == 9
    second = np.arange(9) % 2 == 0
    both = first.copy()
    both[np.flatnonzero(first)[~second]] = False
    twice, at_once = assert_exact(half, again, second), assert_exact(model, coupling, both)
    assert [(n.op_type, n.name) for n in twice.graph.node] == [
        (n.op_type, n.name) for n in at_once.graph.node
    ]
    for (node, slot, a), (other, place, b) in zip(operands(twice), operands(at_once), strict=True):
        assert (node, slot) == (other, place)
        np.testing.assert_allclose(a, b, rtol=2e-7)
    values = feed(model, 3, 2)
    assert distance(Session(at_once, "cpu").run(values), Session(twice, "cpu").run(values)) <= 1e-6
    predicted, counted = _counts(half, again, second)
    assert (predicted.macs, predicted.params) == (counted.macs, counted.params)
    # A gather behind the node is taken to stay as long as it is.
    assert abs(predicted.bytes - counted.bytes) <= 4 * 4 + 20


FOREIGN = """(float[N,4,5] x) => (float[] y{out}) <float[5,12] w1, float[12] gain, float[12,3] w2,
int64[6] pads = {{0, 0, {before}, 0, 0, {behind}}}, int64[12] spread = {{{index}}}, int64[10] kept = {{0, 1, 2, 3, 4, 5,
6, 7, 8, 9}}, float[10,3] w3, float one = {{{fill}}}> {{
    m = MatMul(x, w1)
    h = Gather<axis = 2>(m, kept)
    p = Pad(h, pads, one)
    s = Gather<axis = 2>(p, spread)
    n = LayerNormalization(s, gain)
    r = Gather<axis = 2>(n, kept)
    y = MatMul(r, w3)
    {more}
}}"""


@pytest.mark.parametrize(
    ("before", "behind", "index", "fill", "out", "more"),
    [
        (0, 1, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10", "0.0", "", ""),
        (0, 1, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10", "1.0", "", ""),
        (1, 0, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0", "0.0", "", ""),
        (0, 2, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11", "0.0", "", ""),
        (0, 1, "-11, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1", "0.0", "", ""),
        (
            0,
            1,
            "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10",
            "0.0",
            ", float[N,4,12] z",
            "z = Identity(n)",
        ),
        (
            0,
            1,
            "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10",
            "0.0",
            ", float[N,4,3] z",
            "z = MatMul(s, w2)",
        ),
    ],
)
def test_similar_gathers_are_not_taken_for_inserted_ones(
    before: int, behind: int, index: str, fill: str, out: str, more: str, tmp_path: Path
) -> None:
    """Other people's padding and gathers are not taken for ours where they are not the same."""
    text = FOREIGN.format(before=before, behind=behind, index=index, fill=fill, out=out, more=more)
    model = load(build(text), tmp_path)
    coupling = couple(model)
    for seed in range(3):
        keep = np.random.default_rng(seed).random(coupling.n_units) < 0.6
        keep[0] = True
        assert_exact(model, coupling, keep)


LAST_FOREIGN = """(float[N,4,5] x) => (float[] y{out}) <float[5,10] w1, float[12] gain, float[12] shift, float[12,3] w2,
int64[6] pads = {{0, 0, {before}, 0, 0, {behind}}}, int64[1] start = {{{start}}}, int64[1] end = {{{end}}},
int64[1] axis = {{{axis}}}, float[{left},3] w3, float one = {{{fill}}}> {{
    h = MatMul(x, w1)
    p = Pad(h, pads, one)
    n = LayerNormalization(p, gain, shift)
    r = Slice(n, start, end, axis)
    y = MatMul(r, w3)
    {more}
}}"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"axis": -1},
        {"end": 1000, "left": 12},
        {"end": 8, "left": 8},
        {"start": 2, "end": 12},
        {"before": 2, "behind": 0, "start": 2, "end": 12},
        {"before": 1, "behind": 1},
        {"fill": 1.0},
        {"out": ", float[N,4,12] z", "more": "z = Identity(n)"},
        {"out": ", float[N,4,3] z", "more": "z = MatMul(p, w2)"},
    ],
)
def test_similar_pads_and_slices_are_not_taken_for_inserted_ones(
    changes: dict[str, object], tmp_path: Path
) -> None:
    plain = {
        "before": 0,
        "behind": 2,
        "start": 0,
        "end": 10,
        "axis": 2,
        "left": 10,
        "fill": 0.0,
        "out": "",
        "more": "",
    }
    text = LAST_FOREIGN.format(**(plain | changes))
    # With a value of its own the padding has an input more, and is never taken for ours.
    ours = text.replace("Pad(h, pads, one)", "Pad(h, pads)")
    for number, source in enumerate((text, ours)):
        (tmp_path / str(number)).mkdir()
        model = load(build(source), tmp_path / str(number))
        coupling = couple(model)
        for seed in range(3):
            keep = np.random.default_rng(seed).random(coupling.n_units) < 0.6
            keep[:1] = True
            cut = assert_exact(model, coupling, keep)
            if number == 1 and set(changes) <= {"axis", "fill"}:
                assert [n.op_type for n in cut.graph.node] == [n.op for n in model.nodes]


def test_shared_gain_is_copied_for_each_normalisation(tmp_path: Path) -> None:
    """Each is cut in its own way, so each gets its own."""
    text = """(float[N,4,5] x) => (float[N,4,3] y) <float[5,12] w1, float[5,12] w3, float[12] gain, float[12,3] w2,
    float[12,3] w4> {
        h = MatMul(x, w1)
        g = MatMul(x, w3)
        a = LayerNormalization(h, gain)
        b = LayerNormalization(g, gain)
        c = MatMul(a, w2)
        d = MatMul(b, w4)
        y = Add(c, d)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    assert coupling.n_units == 24
    for seed in range(3):
        assert_exact(model, coupling, np.random.default_rng(seed).random(24) < 0.6)


def test_second_cut_changes_the_lengths_of_the_first(tmp_path: Path) -> None:
    """A list of lengths is copied for the node that reads it; a further cut changes the copy and adds none."""
    name = "attention-with-heads-merged-into-the-batch-of-any-length"
    (case,) = (c for c in CASES if c.name == name)
    model = load(case.make(), tmp_path)
    computed = [n for n in model.nodes if n.op == "Reshape" and n.inputs[1] not in model.constants]
    assert computed
    coupling = couple(model)
    first = np.arange(18) % 3 != 1
    half = load(rewrite.cut(model, coupling, first), tmp_path)
    again = couple(half)
    assert again.n_units == 12
    second = np.arange(12) % 2 == 0
    both = first.copy()
    both[np.flatnonzero(first)[~second]] = False
    twice, at_once = assert_exact(half, again, second), assert_exact(model, coupling, both)
    operators = [Counter(n.op_type for n in proto.graph.node) for proto in (twice, at_once)]
    assert operators[0] == operators[1]
    values = feed(model, 3, 2)
    assert distance(Session(at_once, "cpu").run(values), Session(twice, "cpu").run(values)) <= 1e-6
