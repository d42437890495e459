"""Clamped targets: the bounds that are found behind a node, and the fit to the outputs behind them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from graphs import build, load
from refits import (
    random_calibration,
    refit,
    relative_error,
    without,
)
from scipy.optimize import minimize

from onnx_oamip.core.records import Floats, Model
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.repair import node_refit, ridge
from onnx_oamip.repair.clamped_targets import Bounds, Clamp, ClampedProblem, clamp_behind
from onnx_oamip.repair.residual_joins import join

pytestmark = pytest.mark.filterwarnings("error")

HEAD = "(float[N,3,4,4] x) => (float[N,4,4,4] y{more}) <float[4,3,1,1] w1, float[4,3,1,1] w2{constants}>"
NORM = ", float[4] s, float[4] b0, float[4] m, float[4] v"
PARAMETERS = {
    "s": [2.0, -1.0, 0.0, -3.0],
    "b0": [1.0, 0.5, 2.0, -1.5],
    "m": [0.5, 0.0, 1.0, 2.0],
    "v": [1.0, 4.0, 1.0, 0.25],
}


def _first(folder: Path, nodes: str, constants: str = "", more: str = "") -> tuple[Model, Site]:
    """A model with nodes behind its first convolution, and that convolution."""
    text = HEAD.format(constants=constants, more=more) + f" {{ a = Conv(x, w1)  {nodes} }}"
    model: Model = load(build(text), folder)
    values = {name: np.asarray(value, np.float32) for name, value in PARAMETERS.items()}
    model = replace(model, constants={**model.constants, **values})
    place = site(next(n for n in model.nodes if "w1" in n.inputs), model.constants)
    assert place is not None
    return model, place


def _clamp(folder: Path, nodes: str, constants: str = "", more: str = "") -> Clamp | None:
    """The clamp behind the first convolution."""
    model, place = _first(folder, nodes, constants, more)
    return clamp_behind(model, place, join(model, place))


@pytest.mark.parametrize(
    ("nodes", "constants", "op", "bounds"),
    [
        ("y = Relu(a)", "", "Relu", (0, np.inf)),
        ("i = Identity(a)  y = Relu(i)", "", "Relu", (0, np.inf)),
        (
            "y = Clip(a, low, high)",
            ", float low = {-1}, float high = {6}",
            "Clip",
            (-1, 6),
        ),
        ("y = Clip(a, low)", ", float low = {0.5}", "Clip", (0.5, np.inf)),
        (
            "n = Max(a, low)  y = Min(high, n)",
            ", float low = {0}, float[1] high = {6}",
            "Max",
            (0, 6),
        ),
        (
            "r = Relu(a)  y = Clip(r, low, high)",
            ", float low = {-1}, float high = {6}",
            "Relu",
            (0, 6),
        ),
        ("k = Add(a, c)  y = Relu(k)", ", float[4,1,1] c = {2, 2, 2, 2}", "Relu", (-2, np.inf)),
        ("k = Add(c, a)  y = Relu(k)", ", float c = {2}", "Relu", (-2, np.inf)),
    ],
)
def test_bounds_of_a_clamp_are_in_units_of_the_output(
    nodes: str, constants: str, op: str, bounds: tuple[float, float], tmp_path: Path
) -> None:
    found = _clamp(tmp_path, nodes, constants)
    assert found is not None
    assert found.op == op
    assert found.lower.tolist() == [bounds[0]] * 4
    assert found.upper.tolist() == [bounds[1]] * 4


@pytest.mark.parametrize(
    ("nodes", "constants", "more"),
    [
        ("y = LeakyRelu(a)", "", ""),
        ("y = Relu(a)  z = Identity(a)", "", ", float[N,4,4,4] z"),
        ("y = Clip(a)", "", ""),
        ("y = Clip(a, high, low)", ", float low = {-1}, float high = {6}", ""),
        ("h = ReduceMax<keepdims = 0>(x)  y = Clip(a, , h)", "", ""),
        ("k = Add(a, c)  y = Relu(k)", ", float[4,4] c", ""),
        ("b = Conv(x, w2)  k = Mul(a, b)  y = Relu(k)", "", ""),
        ("p = MaxPool<kernel_shape = [1, 1]>(a)  y = Relu(p)", "", ""),
    ],
)
def test_patterns_that_are_no_clamp(nodes: str, constants: str, more: str, tmp_path: Path) -> None:
    assert _clamp(tmp_path, nodes, constants, more) is None


def test_normalisation_maps_the_bounds_of_every_channel(tmp_path: Path) -> None:
    """A negative gain swaps them; a channel with gain 0 has none."""
    nodes = "n = BatchNormalization<epsilon = 0.0>(a, s, b0, m, v)  y = Clip(n, low, high)"
    found = _clamp(tmp_path, nodes, NORM + ", float low = {0}, float high = {6}")
    assert found is not None
    gain, shift, mean, variance = (np.asarray(value) for value in PARAMETERS.values())
    for channel in (0, 1, 3):
        edges = [found.lower[channel], found.upper[channel]]
        values = gain[channel] * (edges - mean[channel]) / np.sqrt(variance[channel])
        np.testing.assert_allclose(sorted(values + shift[channel]), [0, 6], atol=1e-12)
        assert edges[0] < edges[1]
    assert (found.lower[2], found.upper[2]) == (-np.inf, np.inf)
    relu = _clamp(tmp_path, nodes.replace("Clip(n, low, high)", "Relu(n)"), NORM)
    assert relu is not None
    assert np.isfinite(relu.lower).tolist() == [True, False, False, False]
    assert np.isfinite(relu.upper).tolist() == [False, True, False, True]


@pytest.mark.parametrize("sum_", ["Add(n, b)", "Add(b, n)"])
def test_clamp_behind_a_residual_sum(sum_: str, tmp_path: Path) -> None:
    """Channels whose gain is too small to compensate the other branch have no bounds."""
    nodes = f"b = Conv(x, w2)  n = BatchNormalization(a, s, b0, m, v)  k = {sum_}  y = Relu(k)"
    model, place = _first(tmp_path, nodes, NORM)
    joined = join(model, place)
    assert joined is not None
    found = clamp_behind(model, place, joined)
    assert found is not None
    assert np.isfinite(found.lower).tolist() == [True, False, False, False]
    assert np.isfinite(found.upper).tolist() == [False, True, False, True]
    assert clamp_behind(model, place, None) is None  # without compensation the sum is not known


def test_bounds_keep_the_outputs_that_are_left() -> None:
    clamp = Clamp("Relu", np.asarray([0.0, 1.0, 2.0]), np.full(3, np.inf))
    kept = np.asarray([True, False, True])
    found = clamp.bounds(np.zeros((1, 5, 2)), kept)
    assert found is not None
    assert found.lower.tolist() == [[[0, 2]]]
    assert clamp.bounds(np.full((1, 5, 2), 3.0), kept) is None


# -------------------------------------------------------------------------------------------------------------- the fit


def _problem(seed: int, rows: int, groups: int = 2, unknowns: int = 6) -> ClampedProblem:
    """Outputs that are linear in inputs of which some are missing, between two bounds or one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, rows, unknowns)) + 0.5
    more = rng.standard_normal((groups, rows, 3))
    values = x @ rng.standard_normal((groups, unknowns, 4)) + 2 * more @ rng.standard_normal(
        (groups, 3, 4)
    )
    start = 0.5 * rng.standard_normal(values.shape)
    upper = np.where(rng.random((groups, 1, 4)) < 0.5, 2.0, np.inf)
    lower = np.where(rng.random((groups, 1, 4)) < 0.8, -0.5, -np.inf)
    return ClampedProblem(x, values - start, Bounds(values, lower, upper), int(0.8 * rows))


def _one_sided(problem: ClampedProblem, change: Floats, shift: Floats, count: int) -> Floats:
    """Distance to the wanted values, written out."""
    v = problem.bounds.values[:, :count]
    p = v - problem.residual[:, :count] + problem.x[:, :count] @ change + shift[:, None]
    lower, upper = (
        np.broadcast_to(b, v.shape) for b in (problem.bounds.lower, problem.bounds.upper)
    )
    wanted = np.where(
        v <= lower, np.minimum(p, lower), np.where(v >= upper, np.maximum(p, upper), v)
    )
    return wanted - p


@pytest.mark.parametrize("rows", [60, 5], ids=["normal equations", "dual form"])
def test_steps_end_at_the_minimum_of_the_one_sided_loss(rows: int) -> None:
    problem = _problem(0, rows, groups=1)
    strength = 0.1
    solve = ridge.ridge_regression(problem.x, problem.residual, problem.split)
    step = problem._step(solve, rows, strength)
    change, shift = solve(rows, strength), np.zeros((1, 4))
    for _ in range(3000):
        change, shift = step(change, shift)
    centred = problem.x[0] - problem.x[0].mean(axis=0)
    penalty = strength * np.square(centred).sum(axis=0).mean()

    def loss(flat: Floats) -> float:
        d, b = flat[:24].reshape(1, 6, 4), flat[24:].reshape(1, 4)
        return float(
            np.square(_one_sided(problem, d, b, rows)).sum() + penalty * np.square(d).sum()
        )

    found = minimize(
        loss, np.zeros(28), method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14}
    )
    mine = np.concatenate([change.reshape(-1), shift.reshape(-1)])
    assert loss(mine) <= found.fun * (1 + 1e-5)
    np.testing.assert_allclose(change.reshape(-1), found.x[:24], atol=2e-2)


@pytest.mark.parametrize("rows", [200, 30, 5])
@pytest.mark.parametrize("seed", range(4))
def test_steps_never_increase_the_loss(rows: int, seed: int) -> None:
    problem = _problem(seed, rows)
    solve = ridge.ridge_regression(problem.x, problem.residual, problem.split)
    step = problem._step(solve, rows, 1e-9)
    change, shift = solve(rows, 1e-9), np.zeros((2, 4))
    losses = []
    for _ in range(6):
        change, shift = step(change, shift)
        losses.append(float(np.square(_one_sided(problem, change, shift, rows)).sum()))
    assert all(b <= a * (1 + 1e-6) + 1e-9 for a, b in pairwise(losses))


@pytest.mark.parametrize("rows", [400, 40, 6])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("has_weights", [True, False])
def test_error_behind_the_clamp_is_never_above_that_of_the_plain_fit(
    rows: int, seed: int, has_weights: bool
) -> None:
    """On the held-out rows, where both are judged; most of these problems gain."""
    problem = _problem(seed, rows)
    split = problem.split
    solve = ridge.ridge_regression(problem.x, problem.residual, split) if has_weights else None
    plain = ridge.choose_ridge(problem.x, problem.residual, split, solve)
    change = None if solve is None or plain.ridge is None else solve(split, plain.ridge)
    lead = problem.residual[:, :split].mean(axis=1)
    shift = ridge.best_shift(problem.x[:, :split].mean(axis=1), lead, change)
    found = problem.refined(solve, plain)
    if found is None:
        return
    assert found.errors[1] <= problem.error(change, shift)
    assert found.errors[1] <= found.errors[0]
    if found.errors[1] == found.errors[0]:
        assert found.change is None
        assert not found.shift.any()
        return
    assert found.errors[0] == problem.error(None, np.zeros_like(shift))
    assert (found.change is None) == (plain.ridge is None)


def test_most_problems_gain() -> None:
    gains = 0
    for seed in range(10):
        problem = _problem(seed, 400)
        solve = ridge.ridge_regression(problem.x, problem.residual, problem.split)
        plain = ridge.choose_ridge(problem.x, problem.residual, problem.split, solve)
        gains += problem.refined(solve, plain) is not None
    assert gains >= 8


def test_values_within_the_bounds_give_the_plain_fit() -> None:
    """A step towards values that none of the bounds concerns is the fit that it starts from."""
    problem = _problem(1, 200)
    wide = replace(
        problem,
        bounds=Bounds(problem.bounds.values, np.full((2, 1, 4), -1e9), np.full((2, 1, 4), 1e9)),
    )
    solve = ridge.ridge_regression(wide.x, wide.residual, wide.split)
    plain = ridge.choose_ridge(wide.x, wide.residual, wide.split, solve, [0.1])
    assert plain.change is not None
    change, shift = wide._step(solve, 200, 0.1)(plain.change, plain.shift)
    np.testing.assert_allclose(change, plain.change, atol=1e-5)
    np.testing.assert_allclose(shift, plain.shift, atol=1e-5)
    assert wide.refined(solve, plain) is None


@pytest.mark.parametrize("rows", [9000, 40, 5])
def test_factored_regression_solves_for_its_own_residual(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of any size, with inputs of any mean and scale."""
    monkeypatch.setattr(ridge, "BLOCK", 512)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, rows, 6)) * np.asarray([1, 1, 1, 1, 1, 1e7])
    x += np.asarray([0, 1e3, 1, 0, 5, 3])
    x[..., 3] = 7.0
    residual = rng.standard_normal((2, rows, 3)) + np.asarray([1e3, 0, 1])
    split = max(3, int(0.8 * rows))
    solve = ridge.ridge_regression(x, residual, split)
    for count in (split, rows):
        step = solve.factored(count, 0.01)
        expected = solve(count, 0.01)
        for start in (None, rng.standard_normal(expected.shape)):
            change, shift = step(start, np.ones((2, 3)), lambda rows, _: residual[:, rows].copy())
            size = np.abs(expected).max(axis=2, keepdims=True)
            np.testing.assert_allclose(
                change / (size + 1e-300), expected / (size + 1e-300), atol=1e-4
            )
        means = x[:, :count].mean(axis=1), residual[:, :count].mean(axis=1)
        np.testing.assert_allclose(shift, ridge.best_shift(*means, change), rtol=1e-6, atol=1e-6)
        assert not change[:, 3].any()


# ------------------------------------------------------------------------------------------------------ whole networks

# Unit 1 makes the sum negative where the first input is; units 0 and 2 can do the same, not as much.
BRANCH = """(float[N,2] x) => (float[N,2] y)
<float[2,2] v = {1, 0, 0, 1}, float[2] c = {-2, -2}, float[2,3] w1 = {1, -1, -1, 0, 0, 0}, float[3] b1 = {0, 0, 0.5},
 float[3,2] w2 = {1, -1, -5, 5, 0, 0}, float[2] s = {1, -1}, float[2] b0 = {0, 0}, float[2] m = {0, 0},
 float[2] q = {1, 1}> {
    o = Gemm(x, v, c)
    other = Relu(o)
    a = Gemm(x, w1, b1)
    h = Relu(a)
    b = MatMul(h, w2)
    n = BatchNormalization<epsilon = 0.0>(b, s, b0, m, q)
    k = Add(n, other)
    y = Relu(k)
}"""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sum_behind_a_branch_is_fitted_behind_its_clamp(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gains of both signs, judged on other samples."""
    model = load(build(BRANCH), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [1])
    samples, unseen = (random_calibration(model, 1000, k) for k in (seed, seed + 9))
    clamped = refit(model, coupling, keep, samples)
    (fit,) = clamped.fits
    assert fit.form == "least squares behind Relu"
    monkeypatch.setattr(node_refit, "clamp_behind", lambda *_: None)
    plain = refit(model, coupling, keep, samples)
    errors = [relative_error(model, found.proto, unseen) for found in (clamped, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_clamped_fit_is_the_same_in_every_run(tmp_path: Path) -> None:
    model = load(build(BRANCH), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [1])
    one, two = (refit(model, coupling, keep, random_calibration(model, 40)) for _ in range(2))
    assert one.proto.SerializeToString() == two.proto.SerializeToString()
    assert one.fits == two.fits


def test_nodes_that_share_a_weight_keep_the_plain_fit(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,5] y) <float[6,8] w1, float[8,8] w2, float[8,5] w3> {
        a = MatMul(x, w1)
        r = Relu(a)
        b = MatMul(r, w2)
        s = Relu(b)
        c = MatMul(s, w2)
        t = Relu(c)
        y = MatMul(t, w3)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    group = next(g for g in coupling.groups if len(g.units) > 1)
    keep = np.ones(coupling.n_units, bool)
    keep[group.units[:2]] = False
    pruned = refit(model, coupling, keep, random_calibration(model, 200))
    assert {fit.form for fit in pruned.fits if " more" in fit.node} == {"least squares"}


def test_half_precision_is_judged_as_stored(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,4] y) <float16[6,24] w1, float16[24,12] w2, float16[12,4] w3> {
        v1 = Cast<to = 1>(w1)
        v2 = Cast<to = 1>(w2)
        v3 = Cast<to = 1>(w3)
        a = MatMul(x, v1)
        h = Relu(a)
        b = MatMul(h, v2)
        r = Relu(b)
        y = MatMul(r, v3)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [1, 2, 8, 20, 21])
    pruned = refit(model, coupling, keep, random_calibration(model, 400))
    assert pruned.fits[0].form == "least squares behind Relu"
    unseen = random_calibration(model, 200, 7)
    assert relative_error(model, pruned.proto, unseen) < 0.8 * relative_error(
        model, pruned.raw, unseen
    )
