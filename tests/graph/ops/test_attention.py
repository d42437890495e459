"""Fused attention beyond the cases: head counts, costs, and forms that this runtime does not run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, load

from onnx_oamip.core.records import Coupling, Model
from onnx_oamip.graph import cost
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.surgery import rewrite

MS = {"com.microsoft": 1}


def _load(text: str, folder: Path, standard: bool = False) -> tuple[Model, Coupling]:
    model = load(
        build(text, 23 if standard else 17, 11 if standard else 8, None if standard else MS), folder
    )
    return model, couple(model)


def _attrs(proto: onnx.ModelProto, op: str) -> dict[str, object]:
    node = next(n for n in proto.graph.node if n.op_type == op)
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


PACKED = """(float[2,4,5] x) => (float[2,4,3] y) <float[5,6] w0, float[6,24] w, float[24] b, float[8,3] w2> {
    e = MatMul(x, w0)
    h = com.microsoft.Attention<num_heads = 4, qkv_hidden_sizes = [8, 8, 8]>(e, w, b)
    y = MatMul(h, w2)
}"""
STANDARD = """(float[2,4,5] x) => (float[2,4,3] y) <float[5,16] wq, float[5,8] wk, float[5,12] wv, float[24,3] wo> {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    h = Attention<q_num_heads = 8, kv_num_heads = 4>(q, k, v)
    y = MatMul(h, wo)
}"""


def test_head_counts_shrink(tmp_path: Path) -> None:
    model, coupling = _load(PACKED, tmp_path)
    heads = next(g for g in coupling.groups if ("w", 1) in g.multiplicity)
    keep = np.ones(coupling.n_units, bool)
    keep[heads.units[:1]] = False
    found = _attrs(rewrite.cut(model, coupling, keep), "Attention")
    assert (found["num_heads"], found["qkv_hidden_sizes"]) == (3, [6, 6, 6])


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 23, reason="this onnx does not know Attention")
def test_key_head_is_removed_with_its_query_heads(tmp_path: Path) -> None:
    model, coupling = _load(STANDARD, tmp_path, True)
    assert coupling.n_units == 4
    assert coupling.groups[0].multiplicity[("wq", 1)] == 4  # two heads of two
    found = _attrs(rewrite.cut(model, coupling, np.arange(4) > 0), "Attention")
    assert (found["q_num_heads"], found["kv_num_heads"]) == (6, 3)


def test_macs_count_projection_and_products(tmp_path: Path) -> None:
    model, coupling = _load(PACKED, tmp_path)
    ledger = cost.ledger(model, coupling)
    for inner, heads in ((6, 4), (2, 3)):
        widths = np.asarray(
            [heads if ("w", 1) in g.multiplicity else inner for g in coupling.groups]
        )
        wide = 2 * heads
        before, behind = 4 * 5 * inner, 4 * wide * 3
        # Queries with keys, probabilities with values.
        attention = 4 * inner * 3 * wide + 2 * 4 * 4 * wide
        assert ledger.cost(widths).macs == before + attention + behind


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 23, reason="this onnx does not know Attention")
def test_macs_of_separate_projections_are_counted(tmp_path: Path) -> None:
    model, coupling = _load(STANDARD, tmp_path, True)
    for heads in (4, 1):
        q, k, v, out = 4 * heads, 2 * heads, 3 * heads, 6 * heads
        linear = 4 * 5 * (q + k + v) + 4 * out * 3
        assert cost.ledger(model, coupling).cost(np.asarray([heads])).macs == linear + 4 * 4 * (
            q + out
        )


QKV, END = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)", "y = MatMul(h, wo)"
GQA, LENGTHS = (
    "com.microsoft.GroupQueryAttention",
    "int32[2] lens = {3, 3}, int32 total = {4}, float[8,3] wo",
)
REFUSED = {
    "packed inputs": (
        "float[5,24] w, int64[5] to = {0, 0, 4, 3, 2}, float[8,3] wo",
        "e = MatMul(x, w) p = Reshape(e, to) h = com.microsoft.MultiHeadAttention<num_heads = 4>(p) y = MatMul(h, wo)",
        "",
    ),
    "rotary": (
        "float[5,24] w, float[24] b, float[8,3] wo",
        f"h = com.microsoft.Attention<num_heads = 4, do_rotary = 1>(x, w, b) {END}",
        "rotates queries",
    ),
    "uneven groups": (
        f"float[5,8] wq, float[5,6] wk, float[5,6] wv, {LENGTHS}",
        f"{QKV} h, pk, pv = {GQA}<num_heads = 4, kv_num_heads = 3>(q, k, v, , , lens, total) {END}",
        "do not divide",
    ),
    "untracked keys": (
        "float[5,8] wq, float[5,5] wk, float[8,3] wo",
        "q = MatMul(x, wq) h = com.microsoft.MultiHeadAttention<num_heads = 1>(q, x, x) y = MatMul(h, wo)",
        "another width",
    ),
    "keys from outside": (
        "float[5,5] wq, float[5,3] wo",
        "q = MatMul(x, wq) h = com.microsoft.MultiHeadAttention<num_heads = 5>(q, x, x) y = MatMul(h, wo)",
        "is not followed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kept_heads_have_a_reason(name: str, tmp_path: Path) -> None:
    constants, body, reason = REFUSED[name]
    model, coupling = _load(
        f"(float[2,4,5] x) => (float[2,4,3] y) <{constants}> {{ {body} }}", tmp_path
    )
    assert coupling.n_units == 0
    assert any(reason in p.reason for p in coupling.pinned), [p.reason for p in coupling.pinned]
    same = rewrite.cut(model, coupling, np.ones(0, bool))
    assert len(same.graph.node) == len(model.nodes)
    assert cost.count(model).macs > 0


def test_shapes_follow_the_weight(tmp_path: Path) -> None:
    """ONNX's own inference does not know the operator; the width of its result is that of the values."""
    model, _ = _load(PACKED, tmp_path)
    assert model.shapes["h"] == (2, 4, 8)
