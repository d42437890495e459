"""Semidefinite relaxation of the loss after the refit, against enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from subset_losses import KINDS, PLENTY, everything, least, repaired, sets

from onnx_oamip.core.records import Bools
from onnx_oamip.programs import semidefinite
from onnx_oamip.programs.repaired_loss import LinearConsumer, Repaired
from onnx_oamip.programs.semidefinite import _Point, _State
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
    """The cost at the point that was found is an upper bound of that optimum: the two meet but for the barrier."""
    monkeypatch.setattr(semidefinite, "FIRST_STEPS", 100)
    loss = repaired(kind, 3, UNITS, ridge=0.02)
    relaxation = loss.between(everything(UNITS), nothing())
    found = relaxation.plane(COUNT, PLENTY, None)
    state = found.state
    assert isinstance(state, _State)
    point = _Point.at(state.removed, state.correlation, UNITS - COUNT)
    reached = relaxation.loss + relaxation._cost(point).value
    bound = found.least(everything(UNITS), nothing(), COUNT)
    assert bound <= reached <= 1.02 * bound
    # Other points of the relaxation cost no less.
    rng = np.random.default_rng(0)
    for _ in range(10):
        mixed = rng.standard_normal((UNITS, UNITS)) + np.eye(UNITS)
        values = np.concatenate([mixed.ravel(), rng.standard_normal(UNITS)])
        other = _Point.of(values, UNITS, UNITS - COUNT)
        assert relaxation.loss + relaxation._cost(other).value >= bound


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
