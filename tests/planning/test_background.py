"""Losses around a plan: exact against the cut model, and what they are for."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import objectives
import onnx
import pytest
from cases_quantized import codes
from graphs import build, feed, load, random_keep
from network_texts import MEASURED as NETS
from onnx import ModelProto, numpy_helper

from onnx_oamip import Settings, SettingsError, apply, plan, prune
from onnx_oamip.api import proof
from onnx_oamip.core.records import Array, Bools, Coupling, Model, Objective
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import attention_scale, rewrite
from onnx_oamip.objective import loss, sums
from onnx_oamip.planning import sensitivity
from onnx_oamip.planning.background import consumer_weight
from onnx_oamip.statistics import covariances
from onnx_oamip.verification.latency import Ratio

Feeds = Sequence[Mapping[str, Array]]


def _loss(model: Model, objective: Objective, feeds: Feeds, proto: ModelProto) -> float:
    tensors = objective.tensors
    original = Session(with_outputs(model, tensors), "cpu")
    other = Session(with_outputs(model, tensors, proto), "cpu")
    total = sum(sums(objective, original.run(f, tensors), other.run(f, tensors)) for f in feeds)
    return float(loss(objective, np.asarray(total)).total)


def _cut(model: Model, coupling: Coupling, keep: Bools) -> ModelProto:
    return attention_scale.rescale(model, coupling, keep, rewrite.cut(model, coupling, keep))


CODES = f"""(float[N,5] x) => (float[N,3] y)
<float sx = {{0.03}}, uint8 zx = {{120}}, float sw = {{0.006}}, uint8 zw = {{70}},
{codes("uint8", "w1", 5, 8, low=0, high=120)}, {codes("uint8", "w2", 8, 6, low=0, high=120)},
{codes("uint8", "w3", 6, 3, low=0, high=120)}> {{
    xq = QuantizeLinear(x, sx, zx)
    a = QLinearMatMul(xq, sx, zx, w1, sw, zw, sx, zx)
    b = QLinearMatMul(a, sx, zx, w2, sw, zw, sx, zx)
    c = DequantizeLinear(b, sx, zx)
    d, ds, dz = DynamicQuantizeLinear(c)
    e = MatMulInteger(d, w3, dz, zw)
    f = Cast<to = 1>(e)
    y = Mul(f, sw)
}}"""
"""Integer products of an opset in which no integers of eight bits are multiplied, with codes of zero that are not 0."""


@pytest.mark.parametrize(
    ("text", "opset"),
    [*((NETS[name], 17) for name in NETS if "softmax" not in name), (CODES, 11)],
    ids=[*(name for name in NETS if "softmax" not in name), "codes"],
)
def test_losses_around_a_plan_are_those_of_the_cut_model(
    text: str, opset: int, tmp_path: Path
) -> None:
    """Without a repair, the model with every group at the widths of the plan but one is the cut model."""
    model = load(build(text, opset), tmp_path)
    coupling = couple(model)
    feeds = [feed(model, seed, 4) for seed in range(2)]
    objective = objectives.of_feeds(model, feeds)
    rng = np.random.default_rng(1)
    keep, order = random_keep(coupling, rng, 0.6), rng.random(coupling.n_units)
    found = sensitivity.measure(
        model,
        coupling,
        covariances.collect(model, coupling, feeds, "cpu"),
        order,
        feeds,
        device="cpu",
        objective=objective,
        workers=1,
        repair="none",
        around=keep,
    )
    for group, one in zip(coupling.groups, found, strict=True):
        losses = []
        removal = group.units[np.argsort(order[group.units], kind="stable")]
        for width in one.widths.tolist():
            narrowed = keep.copy()
            narrowed[group.units] = True
            narrowed[removal[: len(removal) - width]] = False
            losses.append(_loss(model, objective, feeds, _cut(model, coupling, narrowed)))
        rising = np.maximum.accumulate(losses[::-1])[::-1]
        np.testing.assert_allclose(one.loss, rising - rising[-1], rtol=1e-4, atol=1e-5)


def test_losses_around_the_whole_original_are_those_of_single_groups(tmp_path: Path) -> None:
    model = load(build(NETS["concatenation"]), tmp_path)
    coupling = couple(model)
    feeds = [feed(model, seed, 4) for seed in range(2)]
    grams = covariances.collect(model, coupling, feeds, "cpu")
    order = np.random.default_rng(1).random(coupling.n_units)
    alone, around = (
        sensitivity.measure(
            model,
            coupling,
            grams,
            order,
            feeds,
            device="cpu",
            objective=objectives.of_feeds(model, feeds),
            workers=1,
            around=keep,
        )
        for keep in (None, np.ones(coupling.n_units, bool))
    )
    for one, other in zip(alone, around, strict=True):
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-4, atol=1e-6)


TWINS = """(float[N,6] x) => (float[N,3] y)
<float[6,12] w1, float[6,12] w2, float[24,3] w3, float[6,24] w4, float[24,3] w5> {
    a = MatMul(x, w1)
    h = Relu(a)
    b = MatMul(x, w2)
    i = Relu(b)
    c = Concat<axis = 1>(h, i)
    s = MatMul(c, w3)
    d = MatMul(x, w4)
    k = Tanh(d)
    t = MatMul(k, w5)
    y = Add(s, t)
}"""
"""Two branches, and a third one that holds less of the output."""


@pytest.fixture
def twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A network whose first two branches compute the same: each may go alone, and not both."""
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    proto = build(TWINS)
    constants = {t.name: t for t in proto.graph.initializer}
    values = {name: numpy_helper.to_array(tensor) for name, tensor in constants.items()}
    values["w2"] = values["w1"]
    values["w5"] = 0.7 * values["w5"]
    for name, tensor in constants.items():
        tensor.CopyFrom(numpy_helper.from_array(values[name], name))
    path = tmp_path / "twins.onnx"
    onnx.save(proto, path)
    rng = np.random.default_rng(0)
    return path, {"x": rng.normal(size=(400, 6)).astype(np.float32)}


def _settings(effort: str) -> Settings:
    return Settings.create(
        macs=0.4, align=1, cache="off", device="cpu", workers=1, task="values", effort=effort
    )


def test_second_look_keeps_one_of_two_branches_that_stand_in_for_each_other(
    twins: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, data = twins
    reports = {
        effort: prune(path, data, tmp_path / f"{effort}.onnx", _settings(effort))
        for effort in ("normal", "high")
    }
    errors = {
        effort: report.verification.outputs[0].values["error_over_variance"]
        for effort, report in reports.items()
    }
    assert errors["high"] < 0.5 * errors["normal"], errors
    assert any("chosen again around the first plan" in note for note in reports["high"].notes)


def test_plan_and_apply_give_the_second_look_that_prune_gives(
    twins: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    path, data = twins
    settings = _settings("high")
    prune(path, data, tmp_path / "one.onnx", settings)
    plan(path, data, tmp_path / "plan.json", settings)
    apply(path, tmp_path / "plan.json", data, tmp_path / "two.onnx", {"cache": "off"})
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"macs": 0.5, "allocate": "uniform"}, "`allocate=mip`"),
        ({"max_drop": 1.0}, "`max_drop`"),
    ],
)
def test_second_look_without_a_program_or_a_fixed_budget_is_refused(
    choices: dict[str, object], named: str, twins: tuple[Path, dict[str, np.ndarray]]
) -> None:
    path, data = twins
    settings = Settings.create(**choices, effort="high", cache="off")
    with pytest.raises(SettingsError, match=named):
        prune(path, data, None, settings)


def test_repaired_weight_is_written_with_one_copy(tmp_path: Path) -> None:
    """In the type and the layout of the node; the weight of a wide layer is the largest array of its group."""
    model = load(
        build("(float[N,4] x) => (float[] y) <float[4,6000] w> {y = MatMul(x, w)}"), tmp_path
    )
    (node,) = model.nodes
    matrix = np.random.default_rng(0).standard_normal((6000, 4))
    shift = np.zeros(6000)
    tracemalloc.start()
    written = consumer_weight(model, node.name, [(matrix, shift)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written.dtype == np.float32
    assert written.flags.c_contiguous
    assert np.array_equal(written, matrix.T.astype(np.float32))
    assert peak < 0.6 * matrix.nbytes
