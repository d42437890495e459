"""Semidefinite relaxation of the loss after the refit, against enumeration."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from subset_losses import KINDS, PLENTY, everything, least, repaired, sets

from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.programs import semidefinite
from onnx_oamip.programs.repaired_loss import LinearConsumer, Repaired
from onnx_oamip.programs.semidefinite import _Pairs, _Point, _State
from onnx_oamip.programs.subset import tangent_plane

UNITS = 8
COUNT = 3


def nothing(units: int = UNITS) -> Bools:
    return np.zeros(units, bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_planes_are_below_every_set_and_close_to_the_best(kind: str, seed: int) -> None:
    """Sets of every size; of those of the asked size, the bound is tighter than that of the perspective relaxation."""
    loss = repaired(kind, seed, UNITS, ridge=0.02)
    free = everything(UNITS)
    free[np.random.default_rng(seed).permutation(UNITS)[:seed]] = False
    found = loss.between(free, nothing()).plane(COUNT, PLENTY, None)
    for count in range(1, int(free.sum()) + 1):
        for keep in sets(free, count):
            assert found.constant + found.slope @ keep <= loss.value(keep) + 1e-9
    best = least(loss, free, COUNT)
    bound = found.least(free, nothing(), COUNT)
    before = tangent_plane(loss, loss.relax(free, COUNT, 200)).least(free, nothing(), COUNT)
    assert bound <= best + 1e-12
    assert best - bound <= 0.75 * (best - before)


@pytest.mark.parametrize("kind", KINDS)
def test_bound_reaches_the_optimum_of_the_relaxation(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Lagrangian at the point that was found meets the bound but for the barrier, and is no less elsewhere."""
    monkeypatch.setattr(semidefinite, "FIRST_STEPS", 300)
    monkeypatch.setattr(semidefinite, "FIRST_BARRIERS", semidefinite.FIRST_BARRIERS[-1:])
    loss = repaired(kind, 3, UNITS, ridge=0.02)
    relaxation = loss.between(everything(UNITS), nothing())
    found = relaxation.plane(COUNT, PLENTY, None)
    state = found.state
    assert isinstance(state, _State)
    point = _Point.at(state.removed, state.correlation, UNITS - COUNT)
    start = relaxation.loss + relaxation._cost(_uniform()).value
    weight = semidefinite.PAIR_PENALTY * start / UNITS
    pairs = _Pairs.at(point, weight)

    def lagrangian(at: _Point) -> float:
        root = np.sqrt(at.removed)
        product = at.lifted * np.outer(root, root)
        inequalities = pairs.constant + pairs.by_removed @ at.removed
        inequalities += (pairs.by_product * product).sum()
        return relaxation.loss + relaxation._cost(at).value + float(inequalities)

    reached = lagrangian(point)
    bound = found.least(everything(UNITS), nothing(), COUNT)
    assert bound <= reached <= 1.02 * bound
    # Other points of the relaxation cost no less.
    rng = np.random.default_rng(0)
    for _ in range(10):
        mixed = rng.standard_normal((UNITS, UNITS)) + np.eye(UNITS)
        values = np.concatenate([mixed.ravel(), rng.standard_normal(UNITS)])
        other = _Point.of(values, UNITS, UNITS - COUNT)
        assert lagrangian(other) >= bound


def _uniform() -> _Point:
    """Point of uncorrelated units that are removed alike."""
    share = np.full(UNITS, (UNITS - COUNT) / UNITS)
    return _Point.at(share, np.eye(UNITS), UNITS - COUNT)


def test_inequalities_of_pairs_hold_for_sets_and_are_penalised_elsewhere() -> None:
    """Sum of squares of the violations; the multipliers give no set a positive value."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((UNITS, UNITS))
    values = np.concatenate([mixed.ravel(), 2 * rng.standard_normal(UNITS)])
    point = _Point.of(values, UNITS, UNITS - COUNT)
    pairs = _Pairs.at(point, 2.0)
    p = point.removed
    root = np.sqrt(p)
    product = point.lifted * np.outer(root, root)
    low, high = np.maximum(p[:, None] + p - 1, 0.0), np.minimum(p[:, None], p)
    outside = ~np.eye(UNITS, dtype=bool)
    assert ((product < low) | (product > high))[outside].any()
    negative, below = np.maximum(-product, 0), np.maximum(p[:, None] + p - 1 - product, 0)
    above = np.maximum(product - p[:, None], 0)
    assert pairs.penalty == pytest.approx(
        sum(np.square(part[outside]).sum() for part in (negative, below, above))
    )
    np.testing.assert_allclose(pairs.by_product, pairs.by_product.T)
    weighted = pairs.constant + pairs.by_removed @ p + (pairs.by_product * product).sum()
    assert weighted == pytest.approx(2 * pairs.penalty)
    for bits in range(2**UNITS):
        removed = np.array([bits >> i & 1 for i in range(UNITS)], np.float64)
        value = pairs.constant + pairs.by_removed @ removed + removed @ pairs.by_product @ removed
        assert value <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_search_includes_the_penalty(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Function and gradient that the quasi-Newton method receives, by central differences."""
    relaxation = repaired(kind, 4, UNITS, ridge=0.02).between(everything(UNITS), nothing())
    received: list[Callable[[Floats], tuple[float, Floats]]] = []

    def minimise(function: Any, values: Floats, **_: Any) -> SimpleNamespace:
        received.append(function)
        return SimpleNamespace(x=values, nfev=1)

    monkeypatch.setattr(semidefinite, "minimize", minimise)
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((UNITS, UNITS)) + np.eye(UNITS)
    values = np.concatenate([mixed.ravel(), rng.standard_normal(UNITS)])
    point = _Point.of(values, UNITS, UNITS - COUNT)
    assert _Pairs.at(point, 5.0).penalty > 0
    relaxation._descend(point, 0.01, 5.0, 1)
    (function,) = received
    gradient = function(values)[1]
    for place in range(0, len(values), 7):
        step = np.zeros_like(values)
        step[place] = 1e-6
        slope = (function(values + step)[0] - function(values - step)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_inequalities_of_pairs_raise_the_bound(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = repaired(kind, 3, UNITS, ridge=0.02)
    free = everything(UNITS)

    def bound() -> float:
        found = loss.between(free, nothing()).plane(COUNT, PLENTY, None)
        return found.least(free, nothing(), COUNT)

    with_pairs = bound()
    monkeypatch.setattr(semidefinite, "PAIR_PENALTY", 0.0)
    assert least(loss, free, COUNT) >= with_pairs > bound()


@pytest.mark.parametrize("kind", KINDS)
def test_cost_of_a_set_is_its_loss(kind: str) -> None:
    """Removed units one after the other, then none that are undecided."""
    loss = repaired(kind, 5, UNITS)
    relaxation = loss.between(everything(UNITS), nothing())
    keep = np.arange(UNITS) % 3 == 1
    some = keep | (np.arange(UNITS) > 4)
    for nested in (relaxation.between(keep, keep), relaxation.between(some, nothing())):
        assert nested.loss == pytest.approx(loss.value(nested.free), rel=1e-9)
    step = relaxation.between(some, nothing()).between(keep, keep)
    assert step.loss == pytest.approx(loss.value(keep), rel=1e-9)


def test_relaxation_of_uncorrelated_units_is_exact() -> None:
    """Each unit loses for itself."""
    rng = np.random.default_rng(0)
    covariance = np.diag(rng.uniform(0.5, 2.0, 9))
    one = LinearConsumer(rng.standard_normal((4, 9)), covariance, 1e-3, np.arange(9)[:, None], 1.0)
    loss = Repaired([one], np.arange(9))
    found = loss.between(everything(9), nothing(9)).plane(4, PLENTY, None)
    best = least(loss, everything(9), 4)
    assert found.least(everything(9), nothing(9), 4) == pytest.approx(best, rel=0.01)


def test_units_that_lose_nothing_leave_a_bound() -> None:
    """Consumers that read no unit, and units without variance."""
    weight = np.zeros((3, 5))
    blind = LinearConsumer(weight, np.eye(5), 1e-2, np.arange(5)[:, None], 1.0)
    found = (
        Repaired([blind], np.arange(5)).between(everything(5), nothing(5)).plane(2, PLENTY, None)
    )
    assert abs(found.least(everything(5), nothing(5), 2)) <= 1e-12
    covariance = np.diag([0.0, 0.0, 1.0, 1.0, 2.0])
    dead = LinearConsumer(np.ones((1, 5)), covariance, 1e-2, np.arange(5)[:, None], 1.0)
    loss = Repaired([dead], np.arange(5))
    found = loss.between(everything(5), nothing(5)).plane(2, PLENTY, None)
    best = least(loss, everything(5), 2)
    assert found.least(everything(5), nothing(5), 2) == pytest.approx(best, rel=0.02)
