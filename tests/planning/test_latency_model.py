"""The additive model of latency: kernels to nodes, the fit on made-up times, and the whole on small real models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from graphs import build, load
from onnx import ModelProto

from onnx_oamip.core.records import (
    Coupling,
    Floats,
    Ints,
    Model,
)
from onnx_oamip.data import dataset
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery.rewrite import cut
from onnx_oamip.planning import latency_model
from onnx_oamip.verification.latency import WARM_RUNS

LENET = ROOT / "models" / "lenet5-mnist.onnx"
RESIDUAL = """(float[n, 3, 12, 12] x) => (float[] y)
<float[16, 3, 3, 3] w0, float[16] b0, float[16, 16, 3, 3] w1, float[16] b1, float[16, 16, 3, 3] w2, float[16] b2,
 float[16, 16, 1, 1] w3, float[16] gain, float[16] beta, float[16] mean, float[16] var, float[16, 5] w4, float[5] b4>
{
  a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)   ar = Relu(a)
  b = Conv <pads = [1, 1, 1, 1]> (ar, w1, b1)  bn = BatchNormalization(b, gain, beta, mean, var)  br = Relu(bn)
  c = Conv <pads = [1, 1, 1, 1]> (br, w2, b2)
  s = Conv (ar, w3)
  d = Add(c, s)  dr = Relu(d)
  p = GlobalAveragePool(dr)  f = Flatten(p)
  y = Gemm(f, w4, b4)
}"""
TOKENS = """(float[n, 6, 16] x) => (float[] y)
<float[16, 32] w1, float[32] b1, float[32, 16] w2, float[16] b2, float[16, 4] w3>
{
  m = MatMul(x, w1)  h = Add(m, b1)  r = Relu(h)
  q = MatMul(r, w2)  t = Add(q, b2)  z = Add(t, x)
  y = MatMul(z, w3)
}"""


def _ladder(coupling: Coupling, rungs: int = 4) -> list[Ints]:
    return [
        np.unique(np.linspace(1, len(g.units), rungs).astype(np.int64)) for g in coupling.groups
    ]


def _images(model: Model, count: int = 8) -> dataset.Samples:
    port = model.inputs[0]
    values = np.random.default_rng(0).random((count, *model.shapes[port.name][1:]), np.float32)
    samples = dataset.load({port.name: values}, model)
    assert samples is not None
    return samples


# ------------------------------------------------------------------------------------------------------- parsing


def _event(name: str, micros: int, op: str = "", cat: str = "Node") -> dict[str, object]:
    return {"cat": cat, "name": name, "dur": micros, "args": {"op_name": op} if op else {}}


def test_parse_leaves_out_warm_runs_and_sums_equal_names() -> None:
    end = _event("model_run", 99, cat="Session")
    first = [
        _event("a_kernel_time", 1000, "Conv"),
        _event("r_kernel_time", 500, "ReorderOutput"),
        end,
    ]
    later = [
        _event("a_fence_before", 7, "Conv"),
        _event("a_kernel_time", 10, "Conv"),
        _event("r_kernel_time", 2, "Reorder"),
        _event("r_kernel_time", 3, "Reorder"),
        end,
    ]
    start = [_event("session_initialization", 5, cat="Session")]
    found = latency_model.parse([*start, *first, *later, *later], skip=1)
    assert {k: op for k, (op, _) in found.items()} == {"a": "Conv", "r": "Reorder"}
    assert found["a"][1] == pytest.approx(10e-6)
    assert found["r"][1] == pytest.approx(5e-6)
    assert latency_model.parse(first, skip=1) == {}


def test_real_profile_is_parsed(tmp_path: Path) -> None:
    model = models.load(LENET)
    session = Session(model.proto, "cpu", 1, profile=tmp_path / "p")
    feed = {model.inputs[0].name: np.zeros(model.shapes[model.inputs[0].name], np.float32)}
    for _ in range(WARM_RUNS + 3):
        session.run(feed)
    path = Path(session.end_profile())
    assert path.parent == tmp_path
    kernels = latency_model.parse(json.loads(path.read_text()))
    assert sum("Conv" in op for op, _ in kernels.values()) == 2
    assert sum("Gemm" in op for op, _ in kernels.values()) == 2
    assert all(spent >= 0 for _, spent in kernels.values())


def _assign(
    proto: ModelProto, names: Sequence[str], kernels: Mapping[str, tuple[str, float]], macs: Floats
) -> list[float]:
    found: list[float] = latency_model.assign(proto, names, dict(kernels), macs).tolist()
    return found


def test_assign_by_node_tensor_and_fused_name(tmp_path: Path) -> None:
    proto = load(build(RESIDUAL), tmp_path).proto
    made = {n.output[0]: n.name for n in proto.graph.node}
    kernels = {
        "ar_nchwc": ("Conv", 1.0),  # named after the tensor of a fused Relu
        made["b"]: ("Conv", 2.0),  # after the node
        # C with Add and Relu fused: the shortcut has a kernel of its own.
        "dr_nchwc": (
            "Conv",
            3.0,
        ),
        "s_nchwc_token_4": ("Conv", 4.0),
        f"fused {made['y']}": ("FusedGemm", 5.0),
        "ReorderOutput": ("ReorderOutput", 9.0),
        "p_nchwc": ("GlobalAveragePool", 9.0),
    }
    assert _assign(proto, [made[t] for t in "abcsy"], kernels, np.ones(5)) == [
        1.0,
        2.0,
        3.0,
        4.0,
        5.0,
    ]


def test_assign_splits_kernels_by_macs_and_distributes_the_rest(tmp_path: Path) -> None:
    proto = load(build(RESIDUAL), tmp_path).proto
    made = {n.output[0]: n.name for n in proto.graph.node}
    kernels = {
        "ar": ("Conv", 1.0),
        "dr_nchwc": ("Conv", 8.0),  # c and its shortcut in one kernel
        "made up": ("FusedMatMul", 6.0),
        "y": ("Softmax", 7.0),
    }
    macs = np.asarray([1.0, 2.0, 3.0, 1.0, 1.0])
    assert _assign(proto, [made[t] for t in "abcsy"], kernels, macs) == [1.0, 4.0, 6.0, 2.0, 2.0]


def test_assign_without_kernels_gives_zeros(tmp_path: Path) -> None:
    proto = load(build(RESIDUAL), tmp_path).proto
    names = [n.name for n in proto.graph.node]
    assert _assign(proto, names, {}, np.ones(len(names))) == [0.0] * len(names)


@pytest.mark.parametrize("text", [RESIDUAL, TOKENS], ids=["residual", "tokens"])
def test_every_linear_node_of_a_real_run_has_a_time(text: str, tmp_path: Path) -> None:
    model = load(build(text), tmp_path)
    names = cost.ledger(model, couple(model)).nodes
    feed = _images(model).feed(np.arange(8))
    session = Session(model.proto, "cpu", 1, profile=tmp_path / "p")
    for _ in range(WARM_RUNS + 5):
        session.run(feed)
    kernels = latency_model.parse(json.loads(Path(session.end_profile()).read_text()))
    # Times on a fast machine round to 0 us: only who gets them matters here.
    marked = {k: (op, 1.0) for k, (op, _) in kernels.items()}
    assert (latency_model.assign(model.proto, names, marked, np.ones(len(names))) > 0).all()


# ----------------------------------------------------------------------------------------------------------- fit


def test_fit_recovers_the_rates_behind_the_times() -> None:
    rng = np.random.default_rng(0)
    macs, sizes = rng.uniform(1e6, 1e8, (6, 3)), rng.uniform(1e3, 1e5, (6, 3))
    rates, own, base = (
        np.asarray([1e-11, 5e-11, 0.0]),
        np.asarray([1e-9, 0.0, 2e-9]),
        np.asarray([1e-5, 0.0, 3e-5]),
    )
    nodes = base + macs * rates + sizes * own
    walls = nodes.sum(axis=1) + 1e-4 + 3e-9 * sizes.sum(axis=1)
    constant, found, elements, by_node, starts = latency_model.fit(walls, nodes, macs, sizes)
    assert by_node
    assert constant == pytest.approx(1e-4 + base.sum(), rel=1e-6)
    assert starts == pytest.approx(base, rel=1e-6)
    assert found == pytest.approx(rates, rel=1e-6, abs=1e-16)
    assert elements == pytest.approx(own + 3e-9, rel=1e-6)


def test_fit_never_goes_negative() -> None:
    macs = np.asarray([[4e6], [2e6], [1e6]])
    nodes = np.asarray([[1e-4], [2e-4], [3e-4]])  # narrower is slower: no rate explains that
    constant, rates, elements, _, _ = latency_model.fit(nodes[:, 0] + 1e-5, nodes, macs, macs / 100)
    assert constant > 0
    assert (rates >= 0).all()
    assert (elements >= 0).all()


def test_fit_uses_whole_runs_if_kernels_are_unknown() -> None:
    macs = np.asarray([[4e6, 2e6], [2e6, 2e6], [1e6, 5e5]])
    sizes = np.asarray([[2e3, 2e3], [2e3, 1e3], [5e2, 5e2]])
    walls = 1e-4 + 2e-11 * macs.sum(axis=1) + 1e-9 * sizes.sum(axis=1)
    for nodes in (None, np.zeros((3, 2))):
        constant, rates, elements, by_node, _ = latency_model.fit(walls, nodes, macs, sizes)
        assert not by_node
        assert constant + macs @ rates + sizes @ elements == pytest.approx(walls, rel=1e-6)
        assert len(set(rates.tolist())) == 1


# --------------------------------------------------------------------------------------------------------- table


@pytest.fixture
def residual(tmp_path: Path) -> tuple[Model, Coupling]:
    model = load(build(RESIDUAL), tmp_path)
    return model, couple(model)


def test_levels_are_distinct_and_on_the_ladder(residual: tuple[Model, Coupling]) -> None:
    _, coupling = residual
    ladder = _ladder(coupling)
    widths = latency_model.level_widths(coupling, ladder)
    assert widths[0].tolist() == cost.full_widths(coupling).tolist()
    assert len({tuple(w) for w in widths.tolist()}) == len(widths) >= 3
    assert all(w in rung for level in widths for w, rung in zip(level, ladder, strict=True))
    only = [rung[-1:] for rung in ladder]
    assert latency_model.level_widths(coupling, only).tolist() == [
        cost.full_widths(coupling).tolist()
    ]


def test_first_units_match_the_requested_widths(residual: tuple[Model, Coupling]) -> None:
    _, coupling = residual
    widths = np.asarray([1 + g for g in range(len(coupling.groups))])
    keep = latency_model.first_units(coupling, widths)
    assert [int(keep[g.units].sum()) for g in coupling.groups] == widths.tolist()


@pytest.mark.parametrize("text", [RESIDUAL, TOKENS, None], ids=["residual", "tokens", "lenet5"])
def test_real_model_is_profiled(text: str | None, tmp_path: Path) -> None:
    model = models.load(LENET) if text is None else load(build(text), tmp_path)
    samples = _images(model)
    model = models.rebind(model, samples.bindings(model))
    coupling = couple(model)
    costs = cost.ledger(model, coupling)
    table = latency_model.profile(
        model, coupling, _ladder(coupling), samples, device="cpu", batch=2, threads=1, seconds=0.2
    )
    factor = table.products.factor
    assert table.by_node
    assert len(factor) == len(table.products.axes) == 2 * len(costs.nodes)
    assert np.array_equal(table.products.axes[: len(costs.nodes)], costs.macs.axes)
    assert (factor >= 0).all()
    assert table.constant >= 0
    assert (table.measured > 0).all()
    assert np.isfinite(table.error)
    predicted = [table.seconds(costs.lengths(w)) for w in table.widths]
    assert predicted == pytest.approx(table.fitted)
    assert table.error == pytest.approx(np.abs(np.asarray(predicted) / table.measured - 1).max())
    doubled = table.scaled(2.0)
    assert doubled.seconds(costs.lengths(table.widths[-1])) == pytest.approx(2 * predicted[-1])


def test_activation_terms_count_elements(residual: tuple[Model, Coupling]) -> None:
    model, coupling = residual
    costs = cost.ledger(model, coupling)
    widths = np.maximum(cost.full_widths(coupling) // 2, 1)
    found = cost.Ledger.terms(latency_model._activations(model, costs), costs.lengths(widths))
    narrow = models.from_proto(
        cut(model, coupling, latency_model.first_units(coupling, widths)), model.bindings
    )
    made = {n.name: n.outputs[0] for n in narrow.nodes}
    assert found.tolist() == [int(np.prod(narrow.shapes[made[n]])) for n in costs.nodes]
