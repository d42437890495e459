"""Branches that all samples take: into the main graph, cut and refitted there, and back into their nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import build, load
from onnx import ModelProto

from onnx_oamip import Settings, prune
from onnx_oamip.api import pipeline, prepare
from onnx_oamip.core.records import Array, Floats
from onnx_oamip.graph import cost, subgraphs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.taken_branches import inline, put_back

NET = """(float[N,6] x, bool flag, bool inner) => (float[N,4] y)
<float[6,12] w0, float[12,16] w1, float[16,10] w2, float[12,14] v1, float[14,10] v2, float[10,4] w3,
float[16,16] u1, float[16] c> {
    a = MatMul(x, w0)
    h = Relu(a)
    o = If(flag) <
        then_branch = yes () => (float[N,10] u) {
            p = MatMul(h, w1)
            r = Relu(p)
            s = If(inner) <
                then_branch = deep () => (float[N,16] d) { e = MatMul(r, u1)  d = Relu(e) },
                else_branch = flat () => (float[N,16] f) { f = Add(r, c) }
            >
            u = MatMul(s, w2)
        },
        else_branch = no () => (float[N,10] v) { p2 = MatMul(h, v1)  r2 = Relu(p2)  v = MatMul(r2, v2) }
    >
    y = MatMul(o, w3)
}"""
ROWS = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)


def _feed(rows: Array, flag: bool, inner: bool) -> dict[str, Array]:
    return {"x": rows, "flag": np.asarray(flag), "inner": np.asarray(inner)}


def _data(flags: list[bool], inner: list[bool]) -> list[dict[str, Array]]:
    parts = np.split(ROWS, 20)
    return [
        _feed(rows, flags[i % len(flags)], inner[i % len(inner)]) for i, rows in enumerate(parts)
    ]


def _run(proto: ModelProto, flag: bool, inner: bool) -> Floats:
    (found,) = Session(proto, "cpu").run(_feed(ROWS, flag, inner))
    return found.astype(np.float64)


@pytest.mark.parametrize("inner", [True, False])
def test_branches_of_branches_come_into_the_graph_and_back(inner: bool, tmp_path: Path) -> None:
    model = load(build(NET), tmp_path)
    (outer,) = (node for node in model.nodes if node.op == "If")
    once, first = inline(model.proto, {outer.name: True})
    (middle,) = (node for node in once.graph.node if node.op_type == "If")
    twice, second = inline(once, {middle.name: inner})
    assert not any(node.op_type == "If" for node in twice.graph.node)
    stored = {tensor.name for tensor in twice.graph.initializer}
    assert stored == {"w0", "w1", "w2", "w3", "u1" if inner else "c"}
    np.testing.assert_array_equal(
        _run(twice, flag=False, inner=inner), _run(model.proto, flag=True, inner=inner)
    )
    back = put_back(model.proto, twice, [*first, *second])
    onnx.checker.check_model(back, full_check=True)
    assert [n.name for n in subgraphs.nodes(back.graph)] == [
        n.name for n in subgraphs.nodes(model.proto.graph)
    ]
    for flag in (True, False):
        for deep in (True, False):
            np.testing.assert_array_equal(
                _run(back, flag=flag, inner=deep), _run(model.proto, flag=flag, inner=deep)
            )


def test_layers_of_a_branch_that_all_samples_take_are_refitted() -> None:
    original = build(NET)
    options: dict[str, Any] = {"macs": 0.6, "align": 1, "force": True, "cache": "off"}
    always = prune(original, _data([True], [True]), **options)
    fitted = {fit["node"] for fit in always.document["fits"]}
    held = {n.name: n for n in subgraphs.nodes(always.model.graph)}
    weights = {name for node in fitted for name in held[node].input}
    assert {"w2", "u1"} <= weights
    sometimes = prune(original, _data([True, False], [True]), **options)
    truth = _run(original, flag=True, inner=True)
    lost = [
        np.square(_run(result.model, flag=True, inner=True) - truth).mean() / truth.var()
        for result in (always, sometimes)
    ]
    assert lost[0] < 0.5 * lost[1]
    # The file keeps its branches, and those that no sample takes still run.
    assert [n.op_type for n in subgraphs.nodes(always.model.graph)].count("If") == 2
    for flag, inner in ((True, False), (False, True)):
        assert np.isfinite(_run(always.model, flag=flag, inner=inner)).all()


def test_costs_of_a_branch_that_is_left_out_are_those_of_the_file(tmp_path: Path) -> None:
    settings = Settings(params=0.7, align="1", force=True, cache="off")
    ready = prepare.prepare(build(NET), _data([True], [True]), settings)
    assert ready.whole is not None
    elements = 6 * 12 + 12 * 16 + 16 * 16 + 16 * 10 + 10 * 4 + (12 * 14 + 14 * 10) + 16
    assert ready.before.params == elements == cost.count(ready.whole.model).params
    assert ready.before.macs == 6 * 12 + 12 * 16 + 16 * 16 + 16 * 10 + 10 * 4
    result = pipeline.pruned(build(NET), _data([True], [True]), settings)
    after = result.report.after
    assert after.params <= 0.7 * elements
    assert after.params == cost.count(load(result.model, tmp_path)).params


def test_branches_stay_in_their_nodes_if_held_out_samples_take_others() -> None:
    settings = Settings(macs=0.7, align="1", cache="off")
    held = _data([False], [True])
    ready = prepare.prepare(build(NET), _data([True], [True]), settings, eval_data=held)
    assert ready.whole is None
    assert any(node.op == "If" for node in ready.model.nodes)
