"""Emptied branches: they are left out where that loses less than narrower layers, one after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from branch_networks import TRANSFORMER
from graphs import build, load, samples
from onnx import ModelProto, numpy_helper

from onnx_oamip import Settings, apply, plan
from onnx_oamip.api.prepare import prepare
from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Array, Pruned
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.cost import Products, full_widths
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.planning import (
    allocation,
    calibration_loss,
    emptied_branches,
    latency_search,
    latency_tables,
    search,
)
from onnx_oamip.planning.attempts import Prepared, losses
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.planning.latency_model import LatencyModel
from onnx_oamip.planning.latency_search import LatencyBudget
from onnx_oamip.repair import least_squares
from onnx_oamip.repair.mean_folding import fold_means
from onnx_oamip.statistics.collector import collect
from onnx_oamip.statistics.requests import MOMENTS

BLOCKS = """(float[N,6] x) => (float[N,4] y)
<float[6,12] w0, float[12] b0, float[12,24] wa1, float[24] ba1, float[24,12] wa2, float[12,24] wb1,
 float[24] bb1, float[24,12] wb2, float[12,4] wy> {
    a0 = Gemm(x, w0, b0)
    a = Tanh(a0)
    p = Gemm(a, wa1, ba1)
    pr = Relu(p)
    q = MatMul(pr, wa2)
    s = Add(a, q)
    u = Gemm(s, wb1, bb1)
    ur = Relu(u)
    v = MatMul(ur, wb2)
    t = Add(s, v)
    y = MatMul(t, wy)
}"""
"""Two residual blocks."""


def _scaled(proto: ModelProto, **factors: float) -> ModelProto:
    """The model with some weights multiplied."""
    for tensor in proto.graph.initializer:
        if tensor.name in factors:
            value = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return proto


def _data(proto: ModelProto, folder: Path) -> dict[str, Array]:
    return samples(load(proto, folder), 200)


def _ready(proto: ModelProto, folder: Path, **values: object) -> Prepared:
    asked = {
        "macs": 0.3,
        "empty": "always",
        "align": 1,
        "device": "cpu",
        "workers": 1,
        "outputs": {"y": "values"},
    }
    settings = Settings.create(**{**asked, **values})
    data = _data(proto, folder)
    onnx.save(proto, folder / "model.onnx")
    return prepare(folder / "model.onnx", data, settings)


def _emptied(ready: Prepared, widths: Array) -> set[str]:
    return {ready.coupling.groups[g].name for g in np.flatnonzero(widths == 0)}


WIDE_STEPS = {"align": 4, "macs": 0.45}
"""With these, the least width of a branch still costs a good part of the budget."""


@pytest.fixture
def weak(tmp_path: Path) -> ModelProto:
    """Blocks of which the second one adds next to nothing."""
    return _scaled(build(BLOCKS), wb2=1e-4)


def test_branch_without_effect_is_left_out(weak: ModelProto, tmp_path: Path) -> None:
    ready = _ready(weak, tmp_path, **WIDE_STEPS)
    assert {ready.coupling.groups[g].name for g in ready.emptiable} == {"wa1", "wb1"}
    found = search.search(ready)
    assert _emptied(ready, found.plan.widths) == {"wb1"}
    assert found.after.macs <= 0.45 * ready.before.macs
    # The MACs that the branch saves widen the other layers.
    plain = search.search(_ready(weak, tmp_path, empty="none", **WIDE_STEPS))
    assert plain.plan.widths.min() > 0
    others = [g for g, group in enumerate(ready.coupling.groups) if group.name != "wb1"]
    assert (found.plan.widths[others] >= plain.plan.widths[others]).all()
    (lost,) = calibration_loss.losses(ready, [found.pruned.proto])
    assert lost < calibration_loss.losses(ready, [plain.pruned.proto])[0]
    assert any("1 groups are emptied" in note and "(wb1)" in note for note in found.plan.notes)
    names = {node.name for node in found.pruned.proto.graph.node}
    assert len(names) < len(ready.model.nodes)
    number = next(g for g, group in enumerate(ready.coupling.groups) if group.name == "wb1")
    assert losses(ready, found.plan)[number] == ready.curves[number].loss[0]


@pytest.mark.parametrize(
    "values",
    [
        {"empty": "none", "macs": None, "latency": 0.5},
        {"empty": "auto"},
        {"floor": 0.1},
        {"protect": 0.1},
        {"iterations": 2},
        {"macs": None, "max_drop": 5.0},
        {"allocate": "uniform"},
        {"macs": None, "importance": "oamip"},
    ],
    ids=lambda values: next(iter(values)) if len(values) == 1 else "-".join(values),
)
def test_branches_stay_where_options_say_so(
    weak: ModelProto, tmp_path: Path, values: dict[str, object]
) -> None:
    settings = Settings.create(**{"macs": 0.6, "empty": "always", **values})
    if emptied_branches.applies(settings):  # a floor leaves no group to choose from
        assert not _ready(weak, tmp_path, **values).emptiable
    else:
        assert not {"floor", "protect"}.intersection(values)


def test_floor_of_one_group_keeps_it(weak: ModelProto, tmp_path: Path) -> None:
    ready = _ready(weak, tmp_path)
    floor = np.zeros(len(ready.coupling.groups))
    floor[max(ready.emptiable)] = 0.1
    assert emptied_branches.emptiable(ready, floor) == {min(ready.emptiable)}


def test_second_branch_is_measured_without_the_first(tmp_path: Path) -> None:
    """Two blocks whose losses do not add up: both add the same, of which the output shows the signs."""
    proto = build(BLOCKS)
    weights = {t.name: t for t in proto.graph.initializer}
    for first, second in (("wa1", "wb1"), ("ba1", "bb1"), ("wa2", "wb2")):
        value = numpy_helper.to_array(weights[first]).copy()
        if first == "wa1":
            value[6:] = 0  # neither reads what they add to
        if first == "wa2":
            value[:, :6] = 0
            value *= 20
        for name in (first, second):
            weights[name].CopyFrom(numpy_helper.from_array(value, name))
    last = proto.graph.node[-1]
    last.input[0] = "bounded"
    tanh = onnx.helper.make_node("Tanh", ["t"], ["bounded"])
    proto.graph.node.insert(len(proto.graph.node) - 1, tanh)
    ready = _ready(proto, tmp_path)
    one, two = sorted(ready.emptiable)
    alone = emptied_branches._losses(ready, ready.emptiable)
    without_first = ready.without(frozenset({one}), alone[one])
    both = emptied_branches._losses(without_first, frozenset({two}))[two]
    assert abs(both - alone[one] - alone[two]) > 0.1
    # The same by a model without both, whose constants are the means of the branches.
    keep = ~np.isin(ready.coupling.unit_group, [one, two])
    cut = rewrite.cut(ready.model, ready.coupling, keep)
    means = collect(ready, {MOMENTS})
    folded = fold_means(ready.model, ready.coupling, keep, means, cut)
    assert calibration_loss.losses(ready, [folded.proto]) == [pytest.approx(both, rel=0.02)]


def test_plan_with_all_branches_stays_where_it_loses_less(
    weak: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = _ready(weak, tmp_path)
    found = iter((0.1, 0.2))

    def measured(_: object, protos: Sequence[ModelProto]) -> list[float]:
        return [next(found), *(1.0 for _ in protos[1:])]

    monkeypatch.setattr(calibration_loss, "losses", measured)
    kept = search.search(ready)
    assert kept.plan.widths.min() > 0
    assert next(found, None) is None, "a plan without a branch was tried"


def test_nodes_that_are_removed_take_no_time() -> None:
    row = LinearisedLimit(
        "latency",
        Products(np.ones(0, np.int64), np.zeros((0, 1), np.int64)),
        5.0,
        6.0,
        {"a": 2.0, "b": 1.0},
    )
    assert row.without(["a", "c"]).constant == 3.0
    assert row.without([]).constant == 5.0


def test_latency_that_needs_a_branch_less_is_met(
    weak: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that take their time at any width."""
    ready = _ready(weak, tmp_path, macs=None, latency=0.7, empty="auto")
    budget = LatencyBudget(0.7, LinearisedLimit("latency", ready.ledger.macs, 0.0, 1e9))

    def corrected(given: Prepared, *_: object) -> LatencyBudget:
        if not given.emptied:
            raise BudgetNotMet("too slow")
        return budget

    monkeypatch.setattr(latency_search, "opened", lambda *_: budget)
    monkeypatch.setattr(latency_search, "corrected", corrected)
    found = search.search(ready)
    assert _emptied(ready, found.plan.widths) == {"wb1"}
    assert any("meets a budget that it missed" in note for note in found.plan.notes)
    monkeypatch.setattr(emptied_branches, "ROUNDS", {"normal": 0})
    with pytest.raises(BudgetNotMet, match="too slow"):
        search.search(ready)


def test_times_are_measured_once_and_corrected_without_a_branch(
    weak: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every plan takes half as long as the fitted times say, and the branch a second at any width."""
    ready = _ready(weak, tmp_path, macs=None, latency=0.4)
    ledger = ready.ledger
    full = full_widths(ready.coupling)
    whole = float(ledger.terms(ledger.macs, ledger.lengths(full)).sum())
    branch = next(node.name for node in ready.model.nodes if "wb2" in node.inputs)
    profiled: list[object] = []

    def profile(*_: object, **__: object) -> LatencyModel:
        profiled.append(None)
        seconds = np.asarray([whole])
        times = LatencyModel(1.0, ledger.macs, full[None], seconds, seconds, 0.0, True)
        return replace(times, starts={branch: 1.0})

    ratios: list[float] = []

    def ratio(given: Prepared, proto: ModelProto) -> float:
        counted = cost.count(models.from_proto(proto, given.model.bindings))
        ratios.append(0.5 * counted.macs / whole)
        return ratios[-1]

    monkeypatch.setattr(latency_search, "profile", profile)
    monkeypatch.setattr(latency_search, "latency_ratio", ratio)
    budget = latency_search.opened(ready, 0.4)
    assert budget.row().limit == pytest.approx(0.4 * whole)
    assert budget.row().constant == 1.0
    one_less = ready.without(frozenset({max(ready.emptiable)}), 0.0)
    removed = latency_search.removed_nodes(one_less)
    assert branch in removed
    assert budget.row(removed).constant == 0.0
    limit = allocation.Limits({}, ready.before)
    met = latency_search.corrected(ready, limit, budget)
    assert 1.8 < met.factor <= 2.0
    assert len(ratios) > 1
    # The next plan starts from what was found for this one.
    ratios.clear()
    assert latency_search.corrected(ready, limit, met) == met
    assert len(ratios) == 1
    profiled.clear()
    search.search(ready)
    assert len(profiled) == 1


def test_branch_is_left_out_by_the_times_of_another_device(
    weak: ModelProto, tmp_path: Path
) -> None:
    """The layers of the second branch take 2 ms each at any width there, and the others their time per MAC."""
    onnx.save(weak, tmp_path / "model.onnx")
    model = models.load(tmp_path / "model.onnx")
    coupling = couple(model)
    costs = cost.ledger(model, coupling)
    full = full_widths(coupling)
    branch = {n.name for n in model.nodes if {"wb1", "wb2"} & set(n.inputs)}
    linear = [n for n in model.nodes if any(name.startswith("w") for name in n.inputs)]

    def run(share: float) -> dict[str, Any]:
        widths = np.maximum(1, np.round(share * full)).astype(np.int64)
        times = {n.name: 2.0 if n.name in branch else share**2 for n in linear}
        named = dict(zip((g.name for g in coupling.groups), widths.tolist(), strict=True))
        return {"widths": named, "milliseconds": sum(times.values()), "nodes": times}

    table = {"kind": "onnx-oamip latency table", "schema_version": 1, "device": "elsewhere"}
    table |= {"step": 1, "runs": [run(share) for share in (1.0, 0.75, 0.5, 0.25)]}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    asked = {"macs": None, "latency": 0.5, "latency_table": str(path), "empty": "auto"}
    ready = _ready(weak, tmp_path, **asked)
    found = search.search(ready)
    assert _emptied(ready, found.plan.widths) == {"wb1"}
    ratio = latency_tables.predicted(str(path), ready.model, ready.coupling, found.plan.widths)
    assert 0.1 < ratio <= 0.5
    assert costs.cost(found.plan.widths).macs > 0.4 * costs.cost(full).macs
    # With both branches, 4 of 8 ms remain at any width.
    with pytest.raises(BudgetNotMet):
        search.search(_ready(weak, tmp_path, **{**asked, "empty": "none"}))


def test_plans_are_compared_before_they_are_finished(
    weak: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the plan that is kept is refitted on all samples."""
    ready = _ready(weak, tmp_path, cache="off", **WIDE_STEPS)
    rest = least_squares.rest
    counts: list[int] = []

    def counted(*args: Any, **named: Any) -> Pruned:
        counts.append(args[4].samples.count)
        return rest(*args, **named)

    monkeypatch.setattr(least_squares, "rest", counted)
    found = search.search(ready)
    assert _emptied(ready, found.plan.widths) == {"wb1"}
    assert len(counts) > 2, "two plans were to be compared"
    assert counts.count(ready.samples.count) == 1
    assert counts[-1] == ready.samples.count


def test_plan_file_with_emptied_groups_is_applied(tmp_path: Path) -> None:
    proto = build(TRANSFORMER, opset=20)
    data = _data(proto, tmp_path)
    made = plan(proto, data=data, macs=0.9, empty="none", align=1, cache="off")
    content = json.loads(made.text)
    group = content["groups"][-1]
    group.update(keep=[], kept=0)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    report = apply(proto, path, data=data).report
    assert report.plan.widths[-1] == 0
    assert report.after.macs <= report.plan.predicted.macs
