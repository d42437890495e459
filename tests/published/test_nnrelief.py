"""NNrelief: its golden values, its vectorised forms against loops, its rules, and the sweep over the coupling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import NETS, activations, build, load, samples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.records import (
    Array,
    Coupling,
    Model,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.published.nnrelief import absolute_signal, score
from onnx_oamip.published.nnrelief.connection_shares import Layer, contributions, layers, shares
from onnx_oamip.published.nnrelief.requests import ABSOLUTE_ACTIVATIONS, Signal
from onnx_oamip.published.nnrelief.selection import (
    Mask,
    Rules,
    dead,
    faint,
    keep_alpha,
    needed,
    ranked,
    sweep,
)
from onnx_oamip.published.nnrelief.unit_worth import worth


def heard(model: Model, values: dict[str, Array], exact: bool = False, batch: int = 7) -> Signal:
    found = dataset.load(values, model)
    assert found is not None
    return absolute_signal.collect(
        model, couple(model), found, "cpu", batch_size=batch, exact=exact
    )


def layer(model: Model, signal: Signal, name: str) -> Layer:
    found = layers(model, couple(model), signal)
    return next(x for x in found if x.site.weight == name)


def reached(model: Model, signal: Signal, name: str) -> tuple[Array, Array]:
    place = layer(model, signal, name).site
    return contributions(model, place, signal, Editor(model.proto).whole_bias(place))


# ---------------------------------------------------------------------------------------------------- golden values


def test_signal_shares_of_a_dense_unit(tmp_path: Path) -> None:
    text = "(float[N,2] x) => (float[N,1] y) <float[2,1] w = {0.6, -0.1}, float[1] b = {0.1}> { y = Gemm(x, w, b) }"
    model = load(build(text), tmp_path)
    signal = heard(model, {"x": np.array([[0.5, -1.0], [-1.5, 3.0]], np.float32)})
    np.testing.assert_allclose(signal.means["x", 1], [1, 2], rtol=1e-6)
    r, bias = reached(model, signal, "w")
    np.testing.assert_allclose(np.append(r, bias), [0.6, 0.2, 0.1], rtol=1e-6)
    found = layer(model, signal, "w")
    np.testing.assert_allclose(
        np.append(found.shares, found.bias), [2 / 3, 2 / 9, 1 / 9], rtol=1e-6
    )
    for alpha, kept in (
        (0.85, [True, True, False]),
        (0.5, [True, False, False]),
        (0.95, [True, True, True]),
    ):
        weights, own = keep_alpha(*needed(found.shares, found.bias), alpha)
        assert np.append(weights, own).tolist() == kept


def test_branch_below_the_share_left_by_alpha_is_faint() -> None:
    norms = np.array([0.0526, 0.0527])
    assert faint(norms, np.ones(2), 0.95).tolist() == [True, False]
    assert pytest.approx(0.05263, abs=1e-5) == 0.05 / 0.95


@pytest.mark.parametrize("exact", [False, True])
def test_constant_map_gives_the_same_in_both_forms(tmp_path: Path, exact: bool) -> None:
    text = """(float[N,2,6,7] x) => (float[N,3,4,3] y) <float[3,2,3,5] w, float[3] b> { y = Conv(x, w, b) }"""
    model = load(build(text), tmp_path)
    level = np.array([-0.7, 1.3], np.float32)
    signal = heard(model, {"x": np.broadcast_to(level[:, None, None], (5, 2, 6, 7)).copy()}, exact)
    r, bias = reached(model, signal, "w")
    w, b = model.constants["w"], model.constants["b"]
    expected = np.abs(level) * np.abs(w).sum(axis=(2, 3)) * np.sqrt(12)
    np.testing.assert_allclose(r[0], expected, rtol=1e-5)
    np.testing.assert_allclose(bias[0], np.abs(b) * np.sqrt(12), rtol=1e-6)


def test_pointwise_convolution_equals_a_dense_layer_of_input_norms(tmp_path: Path) -> None:
    text = "(float[N,4,5,5] x) => (float[N,3,3,3] y) <float[3,4,1,1] w> { y = Conv<strides = [2, 2]>(x, w) }"
    model = load(build(text), tmp_path)
    values = samples(model, 9)
    r, _ = reached(model, heard(model, values, exact=True), "w")
    norm = np.linalg.norm(values["x"][:, :, ::2, ::2].reshape(9, 4, 9), axis=2).mean(axis=0)
    np.testing.assert_allclose(r[0], np.abs(model.constants["w"][:, :, 0, 0]) * norm, rtol=1e-5)


# ------------------------------------------------------------------------------------------- against direct loops

CONVOLUTIONS = {
    "padded": ("float[N,3,7,6] x", "float[4,3,3,2] w", "pads = [1, 0, 2, 1]", 1),
    "strided": (
        "float[N,4,8,7] x",
        "float[6,2,3,3] w",
        "strides = [2, 3], group = 2, pads = [1, 1, 1, 1]",
        2,
    ),
    "dilated": (
        "float[N,2,9,9] x",
        "float[3,2,2,2] w",
        "dilations = [2, 3], pads = [0, 1, 1, 0]",
        1,
    ),
    "one axis": ("float[N,3,11] x", "float[5,3,4] w", "strides = [2]", 1),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_paper_form_of_convolutions(tmp_path: Path, case: str) -> None:
    """One absolute kernel over one absolute channel at a time, by the runtime's own convolution."""
    x, w, attrs, groups = CONVOLUTIONS[case]
    model = load(build(f"({x}) => (float[] y) <{w}> {{ y = Conv<{attrs}>(x, w) }}"), tmp_path)
    values = samples(model, 5)
    r, _ = reached(model, heard(model, values, exact=True, batch=2), "w")
    weight = np.abs(model.constants["w"])
    outs, ins = len(weight) // groups, weight.shape[1]
    expected = np.zeros((groups, outs, ins))
    for g in range(groups):
        for i in range(ins):
            only = np.zeros_like(values["x"])
            only[:, g * ins + i] = np.abs(values["x"][:, g * ins + i])
            silent = ModelProto()
            silent.CopyFrom(model.proto)
            tensor = next(t for t in silent.graph.initializer if t.name == "w")
            tensor.CopyFrom(numpy_helper.from_array(weight, "w"))
            out = activations(model, {"x": only}, ["y"], silent)["y"]
            rows = out[:, g * outs : (g + 1) * outs].reshape(5, outs, -1)
            expected[g, :, i] = np.linalg.norm(rows, axis=2).mean(axis=0)
    np.testing.assert_allclose(r, expected, rtol=1e-4)


def test_mean_form_of_grouped_convolutions(tmp_path: Path) -> None:
    text = "(float[N,6,5,5] x) => (float[] y) <float[4,3,3,3] w, float[4] b> { y = Conv<group = 2>(x, w, b) }"
    model = load(build(text), tmp_path)
    values = samples(model, 8)
    r, bias = reached(model, heard(model, values), "w")
    mean = np.abs(values["x"].astype(np.float64)).mean(axis=(0, 2, 3))
    w = np.abs(model.constants["w"].astype(np.float64)).sum(axis=(2, 3))
    for g in range(2):
        for o in range(2):
            for i in range(3):
                assert r[g, o, i] == pytest.approx(w[2 * g + o, i] * mean[3 * g + i] * 3, rel=1e-5)
    np.testing.assert_allclose(bias.reshape(-1), np.abs(model.constants["b"]) * 3, rtol=1e-6)


PRODUCTS = {
    "positions": (
        "float[N,5,4] x",
        "float[4,3] w, float[3] b",
        "h = MatMul(x, w) y = Add(h, b)",
        False,
    ),
    "transposed": (
        "float[N,4] x",
        "float[3,4] w, float[3] b",
        "y = Gemm<transB = 1, alpha = 2.0>(x, w, b)",
        True,
    ),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_signals_of_products_equal_a_hand_computation(tmp_path: Path, case: str) -> None:
    x, constants, nodes, turned = PRODUCTS[case]
    model = load(build(f"({x}) => (float[] y) <{constants}> {{ {nodes} }}"), tmp_path)
    values = samples(model, 6)
    r, bias = reached(model, heard(model, values), "w")
    w = model.constants["w"].astype(np.float64)
    w = 2 * w if turned else w.T
    mean = np.abs(values["x"].astype(np.float64)).reshape(-1, 4).mean(axis=0)
    np.testing.assert_allclose(r[0], np.abs(w) * mean, rtol=1e-5)
    np.testing.assert_allclose(bias[0], np.abs(model.constants["b"]), rtol=1e-6)


def test_statistics_do_not_depend_on_batches(tmp_path: Path) -> None:
    model = load(build(NETS["residual"]), tmp_path)
    values = samples(model, 12)
    one, other = heard(model, values, True, 1), heard(model, values, True, 12)
    for key, value in one.means.items():
        np.testing.assert_allclose(value, other.means[key], rtol=1e-5)
    for node, r in one.kernels.items():
        np.testing.assert_allclose(r, other.kernels[node], rtol=1e-4)
    assert one.joins
    assert one.kernels
    for node, (axis, norms) in one.joins.items():
        assert axis == 1
        np.testing.assert_allclose(norms, other.joins[node][1], rtol=1e-5)
    shown = activations(model, values, ["h", "c"])
    expected = [
        np.linalg.norm(np.abs(shown[n]).mean(axis=0).reshape(8, -1), axis=1) for n in ("h", "c")
    ]
    np.testing.assert_allclose(next(iter(one.joins.values()))[1], expected, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- the rules

ROWS = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 6)),
    elements=st.one_of(st.floats(0, 5, width=16), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
)


@given(ROWS, st.data())
def test_alpha_rule_keeps_the_smallest_sufficient_set(raw: Array, pick: st.DataObject) -> None:
    own = np.asarray([pick.draw(st.floats(0, 2, width=16)) for _ in raw])
    alpha = pick.draw(st.floats(0.01, 1))
    weights, bias = shares(raw, own)
    kept_weights, kept_bias = keep_alpha(*needed(weights, bias), alpha)
    for w, b, kw, kb in zip(weights, bias, kept_weights, kept_bias, strict=True):
        entries, kept = np.append(w, b), np.append(kw, kb)
        if not entries.any():
            assert not kept.any()
            continue
        whole = entries.sum()
        assert entries[kept].sum() >= alpha * whole * (1 - 1e-9)
        assert (entries[kept] > 0).all()
        if w.any():
            assert kw.any(), "a unit lost its last weight"
        falling = np.sort(entries)[::-1]
        count = int(np.argmax(np.cumsum(falling) >= alpha * whole * (1 - 1e-9))) + 1
        more = entries[kept] < falling[count - 1] * (1 - 1e-9)
        # Only the largest weights next to a bias that does alone may be smaller than what alpha needs.
        assert not more.any() or (kb and (w[kw] == w.max()).all())


def test_alpha_of_one_keeps_all_needed_connections() -> None:
    even = np.full((2, 20), 0.05)
    assert keep_alpha(*needed(even, np.zeros(2)), 0.96)[0].all()
    falling = np.array([[0.5, 0.3, 0.2]])
    assert keep_alpha(*needed(falling, np.zeros(1)), 0.99)[0].all()
    assert keep_alpha(*needed(falling, np.zeros(1)), 1.0)[0].all()


@given(ROWS, st.floats(0.01, 1), st.floats(0.01, 1))
def test_more_alpha_keeps_more(raw: Array, a: float, b: float) -> None:
    found = needed(*shares(raw, np.zeros(len(raw))))
    less, more = keep_alpha(*found, min(a, b))[0], keep_alpha(*found, max(a, b))[0]
    assert not (less & ~more).any()


# -------------------------------------------------------------------------------------------------------- the sweep


def swept(
    model: Model, signal: Signal, cuts: dict[str, Array]
) -> tuple[dict[str, Mask], Array, Coupling]:
    """The sweep after everything that reads the given inputs of a weight was pruned."""
    coupling = couple(model)
    found = layers(model, coupling, signal)
    masks = {}
    for x in found:
        weights = np.ones(x.shares.shape, bool)
        if x.site.weight in cuts:
            weights[..., cuts[x.site.weight]] = False
        masks[x.site.node.name] = Mask(weights, np.ones(x.bias.shape, bool))
    result, units = sweep(coupling, found, masks)
    return {x.site.weight: result[x.site.node.name] for x in found}, units, coupling


def test_backward_sweep_follows_a_chain(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    masks, units, _ = swept(model, heard(model, samples(model, 4)), {"w3": np.arange(10)})
    assert not units.any()  # nothing reads the second layer, so nothing needs the first
    assert not any(masks[w].weights.any() or masks[w].bias.any() for w in ("w1", "w2"))
    masks, units, coupling = swept(model, heard(model, samples(model, 4)), {"w3": np.array([2, 5])})
    assert int((~units).sum()) == 2
    gone = ~coupling.keep(("b", 1), units)
    assert np.flatnonzero(gone).tolist() == [2, 5]
    assert not masks["w2"].weights[0, gone].any()
    assert masks["w2"].weights[0, ~gone].all()
    assert masks["w1"].weights.all()


def test_residual_channel_is_kept_while_it_has_a_consumer(tmp_path: Path) -> None:
    model = load(build(NETS["residual"]), tmp_path)
    signal = heard(model, samples(model, 4))
    _, units, coupling = swept(model, signal, {"w4": np.array([1, 2])})
    assert units.all()  # the block still reads them
    masks, units, coupling = swept(model, signal, {"w4": np.array([1, 2]), "w2": np.array([2, 3])})
    assert np.flatnonzero(~coupling.keep(("s", 1), units)).tolist() == [2]
    assert not masks["w3"].weights[0, 2].any()
    assert not masks["w1"].weights[0, 2].any()


CONCAT = """(float[N,3,4,4] x) => (float[N,2] y)
<float[4,3,1,1] w1, float[5,3,1,1] w2, float[6,9,1,1] w3, float[6,2] w4> {
    a = Conv(x, w1)
    b = Conv(x, w2)
    c = Concat<axis = 1>(a, b)
    r = Relu(c)
    d = Conv(r, w3)
    g = GlobalAveragePool(d)
    f = Flatten(g)
    y = MatMul(f, w4)
}"""


def test_backward_sweep_follows_a_concatenation(tmp_path: Path) -> None:
    model = load(build(CONCAT), tmp_path)
    masks, units, coupling = swept(
        model, heard(model, samples(model, 4)), {"w3": np.array([1, 4, 8])}
    )
    assert np.flatnonzero(~coupling.keep(("a", 1), units)).tolist() == [1]
    assert np.flatnonzero(~coupling.keep(("b", 1), units)).tolist() == [0, 4]
    assert masks["w2"].weights[0].all(axis=1).tolist() == [False, True, True, True, False]


def test_dead_units_have_no_connection_at_any_alpha(tmp_path: Path) -> None:
    proto = build(NETS["mlp"])
    tensor = next(t for t in proto.graph.initializer if t.name == "b1")
    bias = numpy_helper.to_array(tensor).copy()
    bias[[3, 7]] = -1e3
    tensor.CopyFrom(numpy_helper.from_array(bias, "b1"))
    model = load(proto, tmp_path)
    coupling = couple(model)
    signal = heard(model, samples(model, 30))
    found = layers(model, coupling, signal)
    silent = dead(coupling, signal)
    assert {3, 7} <= set(np.flatnonzero(~coupling.keep(("h", 1), ~silent)).tolist())
    kept = Rules(model, coupling, signal, found).select(1.0)
    assert not kept.units[silent].any()
    statistics = Statistics({ABSOLUTE_ACTIVATIONS: signal}, 30, "cpu")
    scores = score.score(
        model, coupling, statistics, Settings.create(importance="nnrelief", alpha=1.0)
    )
    assert (scores.values[silent] == 0).all()
    assert (scores.values[~silent] > 0).all()


def test_faint_branches_are_removed(tmp_path: Path) -> None:
    proto = build(NETS["residual"])
    tensor = next(t for t in proto.graph.initializer if t.name == "w3")
    weight = numpy_helper.to_array(tensor).copy()
    weight[2] *= 1e-3
    tensor.CopyFrom(numpy_helper.from_array(weight, "w3"))
    model = load(proto, tmp_path)
    coupling, signal = couple(model), heard(model, samples(model, 6))
    found = layers(model, coupling, signal)
    chosen = Rules(model, coupling, signal, found).select(0.95)
    name = next(x.site.node.name for x in found if x.site.weight == "w3")
    assert np.flatnonzero(chosen.muted[name]).tolist() == [2]
    assert not chosen.masks[name].weights[0, 2].any()
    assert coupling.keep(("s", 1), chosen.units).all()  # the other branch carries it on


# ------------------------------------------------------------------------------------------------- scores of units


def test_outgoing_shares_of_a_chain(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    coupling, signal = couple(model), heard(model, samples(model, 10))
    found = {x.site.weight: x for x in layers(model, coupling, signal)}
    last = found["w3"].shares[0].sum(axis=0) / 4
    first = last @ found["w2"].shares[0]
    values, _ = worth(model, coupling, signal, list(found.values()))
    np.testing.assert_allclose(values[coupling.axes["r", 1]], last, rtol=1e-12)
    np.testing.assert_allclose(values[coupling.axes["h", 1]], first, rtol=1e-12)


def test_residual_sum_splits_the_worth_of_a_channel(tmp_path: Path) -> None:
    model = load(build(NETS["residual"]), tmp_path)
    coupling, signal = couple(model), heard(model, samples(model, 10))
    found = {x.site.weight: x for x in layers(model, coupling, signal)}
    after = found["w4"].shares[0].sum(axis=0) / 4
    norms = next(iter(signal.joins.values()))[1]
    inner = (after * norms[1] / norms.sum(axis=0)) @ found["w3"].shares[0]
    outer = after + inner @ found["w2"].shares[0]
    values, _ = worth(model, coupling, signal, list(found.values()))
    np.testing.assert_allclose(values[coupling.axes["r", 1]], inner, rtol=1e-9)
    np.testing.assert_allclose(values[coupling.axes["s", 1]], outer, rtol=1e-9)


def test_connections_are_ranked_over_all_layers(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    coupling, signal = couple(model), heard(model, samples(model, 10))
    found = layers(model, coupling, signal)
    _, pi = worth(model, coupling, signal, found)
    ranks = ranked(found, pi)
    values, places = [], []
    for x in found:
        scale = (
            pi[x.site.node.name]
            / pi[x.site.node.name].sum()
            / ((x.shares**2).sum(axis=2) + x.bias**2)
        )
        values += [(scale[..., None] * x.shares**2).reshape(-1), (scale * x.bias**2).reshape(-1)]
        places += [part.reshape(-1) for part in ranks[x.site.node.name]]
    order = np.argsort(-np.concatenate(values), kind="stable")
    place = np.concatenate(places)
    assert (np.diff(np.concatenate(values)[np.argsort(place)]) <= 1e-15).all()
    assert place[order[0]] == 0
    half = Rules(model, coupling, signal, found, worth=pi).select(0.5)
    kept = sum(int(m.weights.sum() + m.bias.sum()) for m in half.masks.values())
    assert kept <= 0.5 * len(place) + 1
