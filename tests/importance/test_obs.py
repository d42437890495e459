"""The OBS order against a greedy search that solves every candidate's least squares anew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import ATTENTION, CNN, GROUPED, MLP, NETS, RESIDUAL, build, load, samples
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.records import (
    Array,
    Consumer,
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance import activation, find, obs
from onnx_oamip.statistics import calibration, covariances
from onnx_oamip.statistics.layer_problems import Problem, problems
from onnx_oamip.statistics.requests import COVARIANCE

SETTINGS = Settings(macs=0.5)


def problem(seed: int, outs: int, columns: Ints, others: int = 0, gain: float = 1.0) -> Problem:
    """Correlated inputs of uneven size; ``columns`` (units, k) of the first ones, in random places."""
    rng = np.random.default_rng(seed)
    d = columns.size + others
    place = rng.permutation(d)
    factor = rng.standard_normal((d, d)) * np.exp(0.5 * rng.standard_normal(d))
    covariance = factor @ factor.T / d + 1e-3 * np.eye(d)
    weight = gain * rng.standard_normal((outs, d))
    scale = float(np.einsum("od,de,oe->", weight, covariance, weight))
    return Problem(
        Consumer("node", 0, "x", 1, "w", 0),
        0,
        weight,
        covariance,
        rng.standard_normal(d),
        place[columns],
        np.arange(d)[:, None],
        scale,
    )


def loss(found: Problem, gone: Sequence[int]) -> float:
    """Cost of removing units after the best repair: one least squares on a root of the covariance."""
    columns = found.columns[list(gone)].reshape(-1)
    stays = np.setdiff1d(np.arange(found.weight.shape[1]), columns)
    root = np.linalg.cholesky(found.gram).T
    target = root @ found.weight.T
    if len(stays):
        target = target - root[:, stays] @ np.linalg.lstsq(root[:, stays], target, rcond=None)[0]
    return float(np.square(target).sum()) / found.scale


def greedy(found: Sequence[Problem], count: int) -> tuple[list[int], list[float]]:
    """Remove one unit after the other, always the one after which the summed loss is least."""
    order: list[int] = []
    curve: list[float] = []
    while len(order) < count:
        rest = [u for u in range(count) if u not in order]
        losses = [sum(loss(p, [*order, u]) for p in found) for u in rest]
        best = int(np.argmin(losses))
        order.append(rest[best])
        curve.append(losses[best] / len(found))
    return order, curve


def units(count: int, held: int = 1) -> Ints:
    return np.arange(count * held).reshape(count, held)


CASES = {
    "one consumer": lambda s: [problem(s, 6, units(9))],
    "columns of other groups": lambda s: [problem(s, 4, units(8), others=5)],
    "kernel taps": lambda s: [problem(s, 5, units(7, 4))],
    "three consumers": lambda s: [
        problem(s, 6, units(8)),
        problem(s + 9, 3, units(8)),
        problem(s + 99, 9, units(8)),
    ],
    "consumers of uneven loudness": lambda s: [
        problem(s, 6, units(8)),
        problem(s + 100, 6, units(8), gain=100.0),
    ],
    "taps in one, none in another": lambda s: [
        problem(s, 5, units(7, 3), others=2),
        problem(s + 100, 5, units(7)),
    ],
    "two units": lambda s: [problem(s, 3, units(2, 2))],
    "one unit": lambda s: [problem(s, 3, units(1, 2), others=2)],
    "a blind block": lambda s: [
        problem(s, 4, units(6)),
        problem(s + 100, 4, np.zeros((6, 0), np.int64), others=4),
    ],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_order_and_curve_equal_those_of_a_greedy_search(name: str, seed: int) -> None:
    found = CASES[name](seed)
    count = len(found[0].columns)
    before = [(p.weight.copy(), p.gram.copy(), p.columns.copy()) for p in found]
    order, curve = obs.eliminate(found, count)
    expected, errors = greedy(found, count)
    assert order.tolist() == expected
    np.testing.assert_allclose(curve, errors, rtol=1e-8, atol=1e-12)
    # The problems stay as they were.
    for p, (weight, covariance, columns) in zip(found, before, strict=True):
        np.testing.assert_array_equal(p.weight, weight)
        np.testing.assert_array_equal(p.gram, covariance)
        np.testing.assert_array_equal(p.columns, columns)


def _factored(found: Problem, ridge: float = 5e-4) -> Problem:
    """The same problem with a factor in place of the matrix."""
    assert found.gram is not None
    factor = np.linalg.cholesky(found.gram - ridge * np.eye(len(found.gram))).T
    return replace(found, gram=None, factor=factor, ridge=ridge)


@pytest.mark.parametrize("name", CASES)
def test_factor_has_the_order_and_the_curve_of_the_matrix(name: str) -> None:
    found = CASES[name](0)
    wide = [_factored(p) for p in found]
    count = len(found[0].columns)
    before = [(p.weight.copy(), p.factor.copy()) for p in wide]
    order, curve = obs.eliminate(found, count)
    other_order, other_curve = obs.eliminate(wide, count)
    np.testing.assert_array_equal(other_order, order)
    np.testing.assert_allclose(other_curve, curve, rtol=1e-8, atol=1e-12)
    for p, (weight, factor) in zip(wide, before, strict=True):
        np.testing.assert_array_equal(p.weight, weight)
        np.testing.assert_array_equal(p.factor, factor)


def test_factor_of_few_rows_has_the_order_of_its_matrix() -> None:
    """Groups of many units, first with more columns than rows, then with fewer; several units per step."""
    rng = np.random.default_rng(5)
    factor = rng.standard_normal((20, 100)) * np.exp(rng.standard_normal(100))
    ridge = 0.1
    gram = factor.T @ factor + ridge * np.eye(100)
    full = replace(problem(5, 4, units(90), others=10), gram=gram, ridge=ridge)
    wide = replace(full, gram=None, factor=factor)
    order, curve = obs.eliminate([full], 90)
    other_order, other_curve = obs.eliminate([wide], 90)
    np.testing.assert_array_equal(other_order, order)
    np.testing.assert_allclose(other_curve, curve, rtol=1e-8)


@pytest.mark.parametrize("wide", [False, True])
def test_constant_units_are_removed_first_and_cost_nothing(wide: bool) -> None:
    """Their weights do not matter: a bias compensates for them."""
    rng = np.random.default_rng(6)
    base = problem(6, 4, units(8, 2))
    constant = base.columns[[3, 5]].reshape(-1)
    factor = rng.standard_normal((30, 16))
    factor[:, constant] = 0
    base.weight[:, constant] *= 1e6
    found = replace(base, gram=None, factor=factor, ridge=0.1)
    if not wide:
        gram = factor.T @ factor + 0.1 * np.eye(16)
        found = replace(found, gram=gram, factor=None)
    np.testing.assert_array_equal(np.flatnonzero(found.constant), [3, 5])
    order, curve = obs.eliminate([found], 8)
    assert order[:2].tolist() == [3, 5]
    assert curve[1] == 0 < curve[2]


def test_curve_ends_at_the_whole_variance() -> None:
    """Everything gone: nothing is left but the mean."""
    other_columns_stay = ("columns", "taps in", "one unit", "a blind")
    cases = {n: make for n, make in CASES.items() if not n.startswith(other_columns_stay)}
    assert cases
    for name, make in cases.items():
        found = make(7)
        _, curve = obs.eliminate(found, len(found[0].columns))
        assert curve[-1] == pytest.approx(1.0, rel=1e-8), name


@pytest.mark.parametrize("held", [1, 3])
def test_wide_groups_remove_several_units_per_step(held: int) -> None:
    """Many at once are chosen by losses that do not know of each other: close to one by one, and never falling."""
    found = [problem(0, 20, units(100, held)), problem(1, 20, units(100))]
    order, curve = obs.eliminate(found, 100)
    assert sorted(order) == list(range(100))
    assert (np.diff(curve) >= 0).all()
    for share in (25, 50, 75):
        steps = sum(schur(p, order[:share].tolist()) for p in found) / 2
        assert steps == pytest.approx(curve[share - 1], rel=0.15)
        rng = np.random.default_rng(share)
        chance = [
            sum(schur(p, rng.permutation(100)[:share].tolist()) for p in found) / 2
            for _ in range(5)
        ]
        assert steps < 0.9 * min(chance)


def test_losses_by_two_formulas_agree() -> None:
    found = problem(2, 5, units(9, 2), others=3)
    for gone in ([0], [1, 4, 5], list(range(9))):
        assert schur(found, gone) == pytest.approx(loss(found, gone), rel=1e-8)


def test_copied_units_are_removed_first() -> None:
    """Of two equal units one is free; the other then is not."""
    base = problem(3, 5, units(8))
    mix = np.eye(8)
    a, b = base.columns[2, 0], base.columns[5, 0]
    mix[b] = mix[a]
    twin = Problem(
        base.consumer,
        0,
        base.weight,
        mix @ base.gram @ mix.T + 1e-9 * np.eye(8),
        base.mean,
        base.columns,
        base.spread,
        base.scale,
    )
    order, curve = obs.eliminate([twin], 8)
    assert order[0] in (2, 5)
    assert curve[0] < 1e-8
    assert curve[1] > 1e-5


def test_unit_without_weights_is_removed_first() -> None:
    found = problem(4, 5, units(8, 2))
    found.weight[:, found.columns[6]] = 0
    found.gram[:] = np.diag(found.gram.diagonal())  # else it would still help to repair others
    order, curve = obs.eliminate([found], 8)
    assert order[0] == 6
    assert curve[0] == 0


def test_ties_are_broken_by_the_lower_index() -> None:
    found = problem(0, 4, units(6))
    equal = Problem(
        found.consumer, 0, np.ones((4, 6)), np.eye(6), found.mean, units(6), found.spread, 24.0
    )
    order, curve = obs.eliminate([equal], 6)
    assert order.tolist() == list(range(6))
    np.testing.assert_allclose(curve, np.arange(1, 7) / 6)


@pytest.mark.parametrize("width", [512, pytest.param(2048, marks=pytest.mark.slow)])
def test_wide_groups_take_seconds(width: int) -> None:
    """One column a unit, random covariance of full rank; 2,048 take about four seconds of one core."""
    rng = np.random.default_rng(0)
    loud = np.exp(0.7 * rng.standard_normal((width, 1))).astype(np.float32)
    factor = loud * rng.standard_normal((width, width)).astype(np.float32)
    covariance = (factor @ factor.T).astype(np.float64) / width + 0.1 * np.eye(width)
    weight = rng.standard_normal((256, width))
    found = Problem(
        Consumer("node", 0, "x", 1, "w", 0),
        0,
        weight,
        covariance,
        np.zeros(width),
        units(width),
        units(width),
        float(np.einsum("od,od->", weight @ covariance, weight)),
    )
    start = time.process_time()
    order, curve = obs.eliminate([found], width)
    assert time.process_time() - start < 30
    assert sorted(order) == list(range(width))
    assert (np.diff(curve) >= 0).all()
    half = order[: width // 2].tolist()
    assert curve[width // 2 - 1] == pytest.approx(schur(found, half), rel=0.1)
    assert schur(found, half) < 0.3 * schur(found, rng.permutation(width)[: width // 2].tolist())


def schur(found: Problem, gone: Sequence[int]) -> float:
    """Compute ``loss`` by the Schur complement, which is faster for many columns."""
    columns = found.columns[list(gone)].reshape(-1)
    stays = np.setdiff1d(np.arange(len(found.gram)), columns)
    block = found.gram[np.ix_(columns, columns)]
    block = block - found.gram[np.ix_(columns, stays)] @ np.linalg.solve(
        found.gram[np.ix_(stays, stays)], found.gram[np.ix_(stays, columns)]
    )
    weight = found.weight[:, columns]
    return float(np.einsum("od,od->", weight @ block, weight)) / found.scale


# ---------------------------------------------------------------------------------------------------------- score


def _statistics(model: Model, coupling: Coupling, arrays: dict[str, Array]) -> Statistics:
    found = dataset.load(arrays, model)
    assert found is not None
    collected = calibration.collect(model, coupling, found, "cpu", batch_size=16)
    feeds = [feed for _, feed in found.batches(16)]
    grams = covariances.collect(model, coupling, feeds, "cpu")
    return Statistics({**collected.answers, COVARIANCE: grams}, collected.samples, "cpu")


def _score(model: Model, coupling: Coupling, statistics: Statistics) -> Scores:
    return find("obs").score(model, coupling, statistics, SETTINGS)


SCALED = """(float[N,12] x) => (float[N,4] y)
<float[12,24] w1, float[24] b1, float[24,4] w2> {
    a = Gemm(x, w1, b1)  h = Relu(a)  y = MatMul(h, w2)
}"""


def _scaled(exponents: Ints) -> ModelProto:
    """The same function with the hidden units times powers of 2, and the weights behind them divided by those."""
    proto = build(SCALED, seed=4)
    factors = np.exp2(exponents).astype(np.float32)
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        scaled = value / factors[:, None] if tensor.name == "w2" else value * factors
        tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
    return proto


def _order(proto: ModelProto, folder: Path, rows: int) -> Ints:
    model = load(proto, folder)
    coupling = couple(model)
    scores = _score(model, coupling, _statistics(model, coupling, samples(model, rows)))
    return np.argsort(scores.values, kind="stable")


@pytest.mark.parametrize("rows", [96, 16])  # a covariance as a matrix, and as a factor
def test_order_does_not_depend_on_the_scale_of_a_few_units(tmp_path: Path, rows: int) -> None:
    """Units of huge activations and tiny weights take part like others, and do not hide those."""
    huge = np.zeros(24, np.int64)
    huge[:4] = 20
    order = _order(_scaled(huge), tmp_path, rows)
    np.testing.assert_array_equal(_order(_scaled(2 * huge), tmp_path, rows), order)
    plain = _order(_scaled(0 * huge), tmp_path, rows)
    assert len(np.intersect1d(order[:12], plain[:12])) >= 11


def test_units_of_denormal_activations_go_first(tmp_path: Path) -> None:
    """Beside a unit of huge activations, whose ridge would make all others equal."""
    exponents = np.zeros(24, np.int64)
    exponents[5] = 60
    proto = _scaled(exponents)
    for tensor in proto.graph.initializer:
        if tensor.name != "w2":
            value = numpy_helper.to_array(tensor).copy()
            value[..., 10:16] *= np.float32(1e-38)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    assert sorted(_order(proto, tmp_path, 96)[:6].tolist()) == list(range(10, 16))


@pytest.mark.parametrize("net", NETS)
def test_scores_equal_the_curve_of_every_group(net: str, tmp_path: Path) -> None:
    model = load(build(NETS[net]), tmp_path)
    coupling = couple(model)
    statistics = _statistics(model, coupling, samples(model, 48))
    scores = _score(model, coupling, statistics)
    assert scores.method == "obs"
    assert scores.values.shape == (coupling.n_units,)
    assert np.isfinite(scores.values).all()
    assert (scores.values >= 0).all()
    for g, group in enumerate(coupling.groups):
        found = problems(model, coupling, statistics[COVARIANCE], g)
        if not found:
            continue
        expected, errors = greedy(found, len(group.units))
        values = scores.values[group.units]
        np.testing.assert_array_equal(np.argsort(values, kind="stable"), expected)
        np.testing.assert_allclose(values[expected], errors, rtol=1e-7, atol=1e-12)


def test_groups_without_a_linear_consumer_use_their_activation(tmp_path: Path) -> None:
    model = load(build(ATTENTION), tmp_path)
    coupling = couple(model)
    statistics = _statistics(model, coupling, samples(model, 32))
    plain = activation.score(model, coupling, statistics, SETTINGS).values
    found = _score(model, coupling, statistics).values
    by_name = {group.name: group.units for group in coupling.groups}
    np.testing.assert_array_equal(found[by_name["wq"]], plain[by_name["wq"]])
    assert not np.allclose(found[by_name["wv"]], plain[by_name["wv"]])


@pytest.mark.parametrize(
    ("net", "weight", "axis"), [(MLP, "w1", 1), (CNN, "w1", 0), (CNN, "w2", 0), (RESIDUAL, "w2", 0)]
)
def test_duplicate_unit_is_removed_first(net: str, weight: str, axis: int, tmp_path: Path) -> None:
    """Through normalisation, pooling and flattening: of two equal channels one is free."""
    proto = build(net)
    _copy_channel(proto, weight, axis, 2, 5)
    for other in {"w1": ["b1"], "w2": ["gain", "b2", "m", "var"]}[weight]:
        _copy_channel(proto, other, 0, 2, 5)
    model = load(proto, tmp_path)
    coupling = couple(model)
    values = _score(model, coupling, _statistics(model, coupling, samples(model, 400))).values
    (group,) = (g for g in coupling.groups if g.name == weight)
    order = group.units[np.argsort(values[group.units], kind="stable")]
    cost = dict(zip(order.tolist(), np.diff(values[order], prepend=0), strict=True))
    first, second = sorted(cost[u] for u in coupling.axes[weight, axis][[2, 5]].tolist())
    assert first < 0.15 * second
    assert first < np.median(list(cost.values()))


def _copy_channel(proto: ModelProto, name: str, axis: int, source: int, target: int) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            value = np.moveaxis(numpy_helper.to_array(tensor).copy(), axis, 0)
            value[target] = value[source]
            tensor.CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(np.moveaxis(value, 0, axis)), name)
            )


@pytest.mark.parametrize("count", [2, 12])
def test_few_rows_do_not_inflate_the_error(count: int, tmp_path: Path) -> None:
    """1 is the consumers' whole variance, also where so few rows were seen that the covariance is mostly guessed."""
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    values = _score(model, coupling, _statistics(model, coupling, samples(model, count))).values
    for group in coupling.groups:
        assert 0.3 < values[group.units].max() < 3


def test_removing_a_single_input_loses_the_whole_variance(tmp_path: Path) -> None:
    text = """(float[N,5] x) => (float[] y) <float[5,1] w1, float[1,4] w2> {
        a = MatMul(x, w1)
        y = MatMul(a, w2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    values = _score(model, coupling, _statistics(model, coupling, samples(model, 40))).values
    np.testing.assert_allclose(values, 1.0, rtol=1e-6)


def test_depthwise_and_grouped_chain_is_scored(tmp_path: Path) -> None:
    """Slots of a grouped convolution: the loss of a slot is that of all its channels in all blocks."""
    model = load(build(GROUPED), tmp_path)
    coupling = couple(model)
    statistics = _statistics(model, coupling, samples(model, 32))
    (g,) = (i for i, group in enumerate(coupling.groups) if group.name == "w1")
    found = problems(model, coupling, statistics[COVARIANCE], g)
    assert [p.block for p in found] == [0, 1]
    assert all(p.columns.shape == (6, 9) for p in found)
    values = _score(model, coupling, statistics).values[coupling.groups[g].units]
    first = int(np.argmin(values))
    assert values[first] == pytest.approx(sum(loss(p, [first]) for p in found) / 2, rel=1e-8)


def test_dead_and_constant_channels_score_lowest(tmp_path: Path) -> None:
    """A channel that never changes costs nothing: its mean goes into the bias."""
    proto = build(MLP)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w1", "b1"):
            value = numpy_helper.to_array(tensor).copy()
            value[..., 3] = 0 if tensor.name == "w1" else 2.0  # always 2
            value[..., 7] = 0 if tensor.name == "w1" else -2.0  # never on
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    model = load(proto, tmp_path)
    coupling = couple(model)
    values = _score(model, coupling, _statistics(model, coupling, samples(model, 2000))).values
    (group,) = (g for g in coupling.groups if g.name == "w1")
    ordered: Floats = np.sort(values[group.units])
    assert set(np.argsort(values[group.units])[:2]) == {3, 7}
    assert ordered[1] < 0.1 * ordered[2]
