"""The scale of attention logits follows the size of a head, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from graphs import build, constants, distance, feed, load
from onnx import ModelProto

from onnx_oamip.api import pipeline
from onnx_oamip.core.records import Bools, Coupling, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import attention_scale, rewrite
from onnx_oamip.planning import allocation, attempts

_TEXT = """(float[N,5,6] x) => (float[N,5,4] y{out}) <float[6,16] wq, float[16] bq, float[6,16] wk, float[6,16] wv,
int64[4] in = {{0, 5, 2, 8}}, int64[3] to = {{0, 5, 16}}, float[16,4] wo, float s = {{{number}}}{constants}> {{
    {queries}
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    q4 = Reshape(q, in)
    k4 = Reshape(k, in)
    v4 = Reshape(v, in)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    {scores}
    p = Softmax(l)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    om = Reshape(ot, to)
    y = MatMul(om, wo)
    {more}
}}"""
_ADDED = "m = MatMul(x, wq)  q = Add(m, bq)"
_BEHIND = "r = MatMul(qt, kt)  l = Div(r, s)"
ROOT = math.sqrt(8)


def _net(
    folder: Path,
    queries: str = _ADDED,
    scores: str = _BEHIND,
    number: float = ROOT,
    constants: str = "",
    out: str = "",
    more: str = "",
) -> tuple[Model, Coupling]:
    more_constants = ", " + constants if constants else ""
    text = _TEXT.format(
        queries=queries, scores=scores, number=number, constants=more_constants, out=out, more=more
    )
    model = load(build(text), folder)
    return model, couple(model)


def _choice(coupling: Coupling, gone: int) -> Bools:
    """Without ``gone`` of the eight slots that queries and keys share."""
    keep = np.ones(coupling.n_units, bool)
    group = next(g for g in coupling.groups if ("wk", 1) in g.multiplicity)
    keep[group.units[:gone]] = False
    return keep


def _number(proto: ModelProto) -> float:
    """Divisor or factor of the logits."""
    held = constants(proto)
    node = next(n for n in proto.graph.node if n.op_type in ("Div", "Mul") and n.input[1] in held)
    return float(held[node.input[1]])


@pytest.mark.parametrize("gone", [1, 4, 7])
@pytest.mark.parametrize(
    ("queries", "scores", "divides"),
    [
        (_ADDED, _BEHIND, True),
        (_ADDED, "r = MatMul(qt, kt)  l = Mul(r, s)", False),
        (_ADDED, "r = Div(qt, s)  l = MatMul(r, kt)", True),
        ("m = MatMul(x, wq)  n = Add(bq, m)  q = Mul(n, s)", "l = MatMul(qt, kt)", False),
        ("q = MatMul(x, wq)", _BEHIND, True),
    ],
    ids=["behind", "times", "in-front", "on-the-layer", "no-bias"],
)
def test_attention_scale_is_the_root_of_the_head_size(
    queries: str, scores: str, divides: bool, gone: int, tmp_path: Path
) -> None:
    model, coupling = _net(tmp_path, queries, scores, ROOT if divides else 1 / ROOT)
    keep = _choice(coupling, gone)
    cut = rewrite.cut(model, coupling, keep)
    found = attention_scale.rescale(model, coupling, keep, cut)
    if "q = Mul" in queries:
        assert found is cut  # not next to the product: nothing that fuses attention looks there
        return
    root = math.sqrt(8 - gone)
    assert _number(found) == pytest.approx(root if divides else 1 / root)
    assert len(constants(found)) == len(constants(cut))
    values = feed(model, 0, 3)
    assert distance(Session(cut, "cpu").run(values), Session(found, "cpu").run(values)) < 2e-6


@pytest.mark.parametrize(
    "how",
    [
        {"number": 3.0},
        {"out": ", float[N,5,16] z", "more": "z = Identity(q)"},
        {"out": ", float[N,5,16] z", "more": "z = MatMul(x, wq)"},
        {"out": ", float[N,2,5,5] z", "more": "z = Identity(r)"},
        {"queries": "m = MatMul(x, wq)  n = Add(m, bq)  q = Relu(n)"},
        {"queries": "m = MatMul(x, wq)  q = Add(m, x2)", "constants": "float[6,16] w2", "more": ""},
    ],
    ids=[
        "another-number",
        "queries-shown",
        "weight-shared",
        "logits-shown",
        "not-linear",
        "two-layers",
    ],
)
def test_unsupported_patterns_keep_their_scale(how: dict[str, object], tmp_path: Path) -> None:
    if "x2" in str(how.get("queries")):
        how = {**how, "queries": "x2 = MatMul(x, w2)  m = MatMul(x, wq)  q = Add(m, x2)"}
    model, coupling = _net(tmp_path, **how)  # type: ignore[arg-type]
    group = next((g for g in coupling.groups if ("wk", 1) in g.multiplicity), None)
    keep = np.ones(coupling.n_units, bool) if group is None else _choice(coupling, 3)
    cut = rewrite.cut(model, coupling, keep)
    assert attention_scale.rescale(model, coupling, keep, cut) is cut


def test_shared_scale_constant_is_copied(tmp_path: Path) -> None:
    model, coupling = _net(tmp_path, out=", float[N,5,6] z", more="z = Div(x, s)")
    keep = _choice(coupling, 4)
    cut = rewrite.cut(model, coupling, keep)
    found = attention_scale.rescale(model, coupling, keep, cut)
    values = feed(model, 0, 3)
    assert distance(Session(cut, "cpu").run(values), Session(found, "cpu").run(values)) < 2e-6
    assert sorted(float(v) for v in constants(found).values() if v.ndim == 0) == pytest.approx(
        [2.0, ROOT]
    )


@pytest.mark.parametrize("fit", ["least-squares", "bias", "none"])
def test_scale_is_rewritten_after_the_refit(fit: str, tmp_path: Path) -> None:
    """A refit that came later would fit the queries to what they gave without it."""
    model, _ = _net(tmp_path)
    values = feed(model, 0, 64)
    settings = Settings.create(
        macs=0.6, refit=fit, importance="l2", allocate="uniform", align=1, seed=1
    )
    ready = pipeline.prepare(tmp_path / "case.onnx", values, settings)
    found = attempts.attempt(ready, allocation.limits(settings.budget, ready.before, 0), ())
    kept = int(
        found.plan.keep[
            next(g for g in ready.coupling.groups if ("wk", 1) in g.multiplicity).units
        ].sum()
    )
    assert kept < 8
    assert _number(found.pruned.proto) == pytest.approx(math.sqrt(kept))
    assert _number(found.pruned.raw) == pytest.approx(ROOT)
    if fit == "none":
        few = feed(model, 1, 3)
        raw, final = (
            Session(found.pruned.raw, "cpu").run(few),
            Session(found.pruned.proto, "cpu").run(few),
        )
        assert distance(raw, final) < 2e-6
