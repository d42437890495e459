"""Choice of the units of one group: losses, searches and programs against enumeration and plain least squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subset_losses import KINDS, PLENTY, everything, fit, least, repaired, sets

from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.programs.branching import Searched, search
from onnx_oamip.programs.diagonal_split import separable
from onnx_oamip.programs.repaired_loss import (
    LinearConsumer,
    Repaired,
    _shares,
    _SweptConsumer,
)
from onnx_oamip.programs.solvers import BACKENDS, SolverLimits, solve
from onnx_oamip.programs.subset import (
    Loss,
    Quadratic,
    Subset,
    _project,
)

SEEDS = st.integers(0, 2**32 - 1)
SOLVERS = [
    pytest.param(n, marks=pytest.mark.skipif(not b.licence().usable, reason="no licence"))
    for n, b in BACKENDS.items()
]


def matrix(rng: np.random.Generator, units: int, rank: int | None = None, dead: int = 0) -> Floats:
    """Semidefinite, of uneven size, with entries of both signs; the first ``dead`` units have none."""
    factor = rng.standard_normal((units, rank or 2 * units)) * np.exp(
        0.7 * rng.standard_normal((units, 1))
    )
    factor[:dead] = 0
    found = factor @ factor.T
    return (
        np.asarray(found / found.sum(), np.float64)
        if found.sum() > 0.01 * np.trace(found)
        else found / units
    )


def least_squares(fits: Sequence[LinearConsumer], keep: Floats) -> float:
    """The loss after repair by one plain least squares a consumer: the rows of a root of C, then those of the ridge."""
    total = 0.0
    for f in fits:
        d = f.weight.shape[1]
        values, vectors = np.linalg.eigh(f.covariance)
        root = (vectors * np.sqrt(np.maximum(values, 0))).T
        share = np.ones(d)
        for unit, columns in enumerate(f.columns):
            share[columns] = keep[unit]
        here = np.flatnonzero(share > 0)
        rows = np.vstack([root[:, here], np.diag(np.sqrt(f.ridge / share[here]))])
        sides = np.vstack([root @ f.weight.T, np.zeros((len(here), len(f.weight)))])
        fitted = (
            np.linalg.lstsq(rows, sides, rcond=None)[0]
            if len(here)
            else np.zeros((0, len(f.weight)))
        )
        total += float(np.square(rows @ fitted - sides).sum()) / f.scale
    return total


def plane(loss: Loss, at: Floats, free: Bools, count: int) -> float:
    """The least value of the tangent plane at ``at`` over 0 <= s <= free, sum(s) = count: by sorting."""
    value, gradient = loss.convex(at)
    slope = np.sort((gradient - loss.diagonal)[free])
    return float(value - gradient @ at + loss.diagonal.sum() + slope[:count].sum())


def whole(loss: Loss, keep: Floats) -> float:
    """The loss between sets: what the relaxation minimises."""
    return loss.convex(keep)[0] + float(loss.diagonal @ (1 - keep))


# ------------------------------------------------------------------------------------------------- without repair


@given(SEEDS, st.integers(1, 12), st.booleans(), st.integers(0, 2))
@settings(max_examples=60)
def test_quadratic_equals_the_form_on_sets_and_is_convex_between(
    seed: int, units: int, thin: bool, dead: int
) -> None:
    """On sets the parts add up to p'Qp; between them the loss lies above it, and is convex."""
    rng = np.random.default_rng(seed)
    q = matrix(rng, units, 1 + units // 2 if thin else None, min(dead, units - 1))
    loss = Quadratic(q)
    size = float(np.abs(q).sum())
    for _ in range(5):
        keep = rng.random(units) < 0.5
        gone = (~keep).astype(np.float64)
        assert loss.value(keep) == pytest.approx(float(gone @ q @ gone), abs=1e-12 * size)
        assert whole(loss, keep.astype(np.float64)) == pytest.approx(
            float(gone @ q @ gone), abs=1e-12 * size
        )
        here, there = rng.random(units), rng.random(units)
        assert whole(loss, here) >= float((1 - here) @ q @ (1 - here)) - 1e-12 * size
        value, gradient = loss.convex(here)
        # Semidefinite: no tangent plane is above the loss, anywhere.
        assert loss.convex(there)[0] >= value + gradient @ (there - here) - 1e-8 * size
        # Differences of a quadratic are exact, however wide.
        step = 0.25 * np.eye(units)
        found = [(loss.convex(here + s)[0] - loss.convex(here - s)[0]) / 0.5 for s in step]
        np.testing.assert_allclose(gradient, found, rtol=0, atol=1e-11 * size)


@given(SEEDS, st.integers(1, 15), st.booleans(), st.integers(0, 3))
@settings(max_examples=60)
def test_separable_part_is_as_large_as_can_be(seed: int, units: int, thin: bool, dead: int) -> None:
    rng = np.random.default_rng(seed)
    q = matrix(rng, units, 1 + units // 2 if thin else None, min(dead, units - 1))
    found = separable(q)
    own = np.diagonal(q)
    assert (found >= 0).all()
    assert (found <= own).all()
    assert np.linalg.eigvalsh(q - np.diag(found))[0] >= -1e-9 * own.max()
    live = own > 0
    root = np.sqrt(own[live])
    correlation = q[np.ix_(live, live)] / np.outer(root, root)
    least = max(float(np.linalg.eigvalsh(correlation)[0]), 0.0)
    assert found.sum() >= (least - 2e-9) * own.sum()  # the largest multiple of its own diagonal


@pytest.mark.parametrize("seed", range(5))
def test_separable_part_is_the_largest_of_a_grid(seed: int) -> None:
    """Of three units: two entries from a grid, the third one from the Schur complement."""
    q = matrix(np.random.default_rng(seed), 3)
    steps = np.linspace(0, 1, 201)
    first, second = np.meshgrid(steps * q[0, 0], steps * q[1, 1])
    a, b, c = q[0, 0] - first, q[1, 1] - second, q[0, 1]
    determinant = a * b - c * c
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = (b * q[0, 2] ** 2 - 2 * c * q[0, 2] * q[1, 2] + a * q[1, 2] ** 2) / determinant
    third = q[2, 2] - explained
    total = np.where((determinant > 0) & (a > 0) & (third >= 0), first + second + third, 0.0)
    assert separable(q).sum() >= total.max() - 1e-4 * np.trace(q)


def test_separable_part_of_two_units_is_known() -> None:
    """Of ``[[1, c], [c, 1]]`` each can lose ``1 - c``."""
    found = separable(np.asarray([[1.0, 0.3], [0.3, 1.0]]))
    np.testing.assert_allclose(found, 0.7, rtol=1e-5)
    # Of a unit that is alone, all can be taken, which a multiple of the diagonal does not do.
    three = np.eye(3)
    three[0, 1] = three[1, 0] = 0.9
    np.testing.assert_allclose(separable(three), [0.1, 0.1, 1.0], rtol=1e-3)


@pytest.mark.parametrize("accuracy", [0.0, 1e-2])
def test_weighted_separable_part_of_two_units_is_known(accuracy: float) -> None:
    """The most of ``4 e + f`` with ``(1 - e) (1 - f) >= c^2``: ``1 - e = c / 2`` and ``1 - f = 2 c``."""
    worth = np.asarray([4.0, 1.0])
    found = separable(np.asarray([[1.0, 0.3], [0.3, 1.0]]), worth, accuracy=accuracy)
    if not accuracy:
        np.testing.assert_allclose(found, [0.85, 0.4], rtol=1e-4)
    assert (1 - found).prod() >= 0.09
    best = 4 * 0.85 + 0.4
    assert (1 - accuracy) * best - 1e-6 <= worth @ found <= best


def test_separable_part_of_a_diagonal_is_the_diagonal() -> None:
    own = np.asarray([3.0, 0.0, 1e-4, 0.5])
    np.testing.assert_allclose(separable(np.diag(own)), own, rtol=1e-8, atol=0)
    np.testing.assert_array_equal(separable(np.zeros((3, 3))), np.zeros(3))
    # Rank one: nothing can be taken.
    np.testing.assert_array_equal(separable(np.ones((3, 3))), np.zeros(3))


def _greedy(loss: Loss, keep: Bools, count: int) -> Bools:
    """One unit after the other, each time the one after which the loss is least."""
    stays = keep.copy()
    while stays.sum() > count:
        losses = []
        for unit in np.flatnonzero(stays):
            trial = stays.copy()
            trial[unit] = False
            losses.append(loss.value(trial))
        stays[np.flatnonzero(stays)[int(np.argmin(losses))]] = False
    return stays


@pytest.mark.parametrize("seed", range(12))
def test_quadratic_narrow_is_locally_optimal(seed: int) -> None:
    """Greedy removal first, then exchanges until no single one helps; near the best set there is."""
    rng = np.random.default_rng(seed)
    units = 10
    loss = Quadratic(matrix(rng, units, 5 if seed % 2 else None))
    keep = everything(units)
    keep[rng.permutation(units)[: seed % 3]] = False  # some had gone before
    for count in (7, 5, 2):
        first = loss.narrow(keep, count, 0)
        np.testing.assert_array_equal(first, _greedy(loss, keep, count))
        found = loss.narrow(keep, count, 8)
        assert found.sum() == count
        assert not (found & ~keep).any()
        reached, best = loss.value(found), least(loss, keep, count)
        assert reached <= loss.value(first) * (1 + 1e-12)
        assert best * (1 - 1e-12) <= reached <= 1.25 * best
        for on in np.flatnonzero(found):
            for off in np.flatnonzero(keep & ~found):
                other = found.copy()
                other[on], other[off] = False, True
                assert loss.value(other) >= reached - 1e-11


@given(SEEDS)
@settings(max_examples=30)
def test_quadratic_narrow_is_exact_where_units_are_far_apart(seed: int) -> None:
    """Each twice as loud as the last one, and little between them."""
    rng = np.random.default_rng(seed)
    size = np.sqrt(2.0 ** rng.permutation(9))
    between = rng.uniform(-0.02, 0.02, (9, 9))
    q = np.outer(size, size) * (between + between.T + np.diag(1 - 2 * between.diagonal()))
    loss = Quadratic(q)
    for count in range(1, 9):
        found = loss.narrow(everything(9), count, 4)
        assert loss.value(found) == pytest.approx(least(loss, everything(9), count), rel=1e-12)
        assert set(np.flatnonzero(found)) == set(np.argsort(size)[9 - count :])


@given(SEEDS, st.integers(3, 10))
@settings(max_examples=30)
def test_narrow_is_nested(seed: int, units: int) -> None:
    """A removed unit is not taken back, with and without repair."""
    rng = np.random.default_rng(seed)
    for loss in (Quadratic(matrix(rng, units)), repaired("several", seed, units)):
        keep = everything(units)
        for count in range(units - 1, 0, -1):
            stays = loss.narrow(keep, count, 3)
            assert stays.sum() == count
            assert not (stays & ~keep).any()
            keep = stays


@given(SEEDS, st.integers(2, 9))
@settings(max_examples=40)
def test_costs_are_differences(seed: int, units: int) -> None:
    rng = np.random.default_rng(seed)
    keep = rng.random(units) < 0.7
    for loss in (Quadratic(matrix(rng, units)), repaired("several", seed, units)):
        found = loss.removal_costs(keep)
        here = loss.value(keep)
        for unit in range(units):
            less = keep.copy()
            less[unit] = False
            assert found[unit] == pytest.approx(loss.value(less) - here, abs=1e-9)
        assert not found[~keep].any()


@pytest.mark.parametrize("seed", range(10))
def test_quadratic_relaxation_bounds_every_set(seed: int) -> None:
    """Feasible, and its plane proves nearly all that the relaxation can prove."""
    rng = np.random.default_rng(seed)
    units = 10
    loss = Quadratic(matrix(rng, units, 6 if seed % 2 else None, dead=seed % 3))
    free = everything(units)
    free[rng.permutation(units)[: seed % 4]] = False
    for count in (6, 4, 2):
        found = loss.relax(free, count, 16)
        assert (found >= 0).all()
        assert (found <= free).all()
        assert found.sum() == pytest.approx(count, abs=1e-9)
        bound = plane(loss, found, free, count)
        best = least(loss, free, count)
        size = float(np.trace(loss.matrix))
        assert bound <= best + 1e-12 * size
        assert bound - 1e-12 * size <= whole(loss, found) <= best * (1 + 5e-3)
        assert whole(loss, found) - bound <= 5e-3 * whole(loss, found)
        if count == 4 and seed < 4:
            longer = loss.relax(free, count, 64)
            assert whole(loss, longer) - plane(loss, longer, free, count) <= 1e-6 * whole(
                loss, longer
            )
        # Better than where it began.
        assert whole(loss, found) <= whole(loss, free * (count / free.sum())) * (1 + 1e-12)


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=60)
def test_project_finds_the_nearest(seed: int, units: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, units + 1))
    point = rng.normal(0.5, 2.0, units)
    found, shift = _project(point, count, float(rng.normal(0.0, 3.0)))
    assert found == pytest.approx(np.clip(point - shift, 0, 1), abs=1e-15)
    assert found.sum() == pytest.approx(count, abs=1e-11)
    for _ in range(20):  # no feasible direction leads closer
        other = np.zeros(units)
        other[rng.permutation(units)[:count]] = 1.0
        assert (point - found) @ (other - found) <= 1e-10


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_project_of_equal_entries(count: int) -> None:
    """Every entry reaches 0 and 1 at the same shift, so that no Newton step has a slope at the ends."""
    found, _ = _project(np.full(4, 7.0), count, 0.0)
    assert found == pytest.approx(np.full(4, count / 4), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_descent_of_decided_units(seed: int) -> None:
    """Kept units stay 1 and removed ones 0; the undecided ones are optimal: no exchange of a little lowers the loss."""
    rng = np.random.default_rng(seed)
    units, count = 9, 5
    loss = Quadratic(matrix(rng, units, None))
    free, kept = everything(units), ~everything(units)
    free[rng.permutation(units)[:2]] = False
    kept[np.flatnonzero(free)[:2]] = True
    found = loss.descend(free, kept, count, 400, np.zeros(units))
    assert (found[kept] == 1).all()
    assert (found[~free] == 0).all()
    assert found.sum() == pytest.approx(count, abs=1e-9)
    slope = loss.convex(found)[1] - loss.diagonal
    undecided = free & ~kept
    rising = slope[undecided & (found < 1 - 1e-6)]
    falling = slope[undecided & (found > 1e-6)]
    assert falling.max() - rising.min() <= 1e-5 * np.abs(slope).max()


# ---------------------------------------------------------------------------------------------------- with repair


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [1e-4, 1e-1])
def test_repaired_is_ridge_regression(kind: str, ridge: float) -> None:
    """On sets, by one least squares a consumer."""
    rng = np.random.default_rng(1)
    for seed in range(4):
        loss = repaired(kind, seed, 6, ridge)
        assert not loss.diagonal.any()
        for keep in (np.zeros(6), np.ones(6), *(rng.random((4, 6)) < 0.5)):
            expected = least_squares(loss.consumers, keep.astype(np.float64))
            assert loss.convex(keep.astype(np.float64))[0] == pytest.approx(expected, rel=1e-8)
        some = rng.random(6) < 0.5
        assert loss.value(some) == pytest.approx(
            least_squares(loss.consumers, some.astype(np.float64)), rel=1e-8
        )


def test_empty_repaired_set_loses_the_whole_variance() -> None:
    loss = repaired("one consumer", 0, 5)
    assert loss.value(np.zeros(5, bool)) == pytest.approx(1.0, rel=1e-12)
    losses = [loss.value(np.arange(5) < n) for n in range(6)]
    assert (np.diff(losses) < 0).all()  # every unit gives something


@pytest.mark.parametrize("kind", KINDS)
def test_repaired_gradient_matches_differences(kind: str) -> None:
    rng = np.random.default_rng(2)
    for seed in range(4):
        loss = repaired(kind, seed, 6)
        at = rng.uniform(0.2, 0.9, 6)
        gradient = loss.convex(at)[1]
        step = 1e-5 * np.eye(6)
        found = [(loss.convex(at + s)[0] - loss.convex(at - s)[0]) / 2e-5 for s in step]
        np.testing.assert_allclose(
            gradient, found, rtol=1e-6, atol=1e-7 * float(np.abs(gradient).max())
        )
        # At 0 as well, where the unit is not even in the matrix: from above.
        at[[1, 4]] = 0
        gradient = loss.convex(at)[1]
        for unit in (1, 4):
            ends = []
            for h in (2e-6, 1e-6):
                up = at.copy()
                up[unit] = h
                ends.append((loss.convex(up)[0] - loss.convex(at)[0]) / h)
            assert 2 * ends[1] - ends[0] == pytest.approx(gradient[unit], rel=1e-4)  # Richardson


@given(SEEDS, st.sampled_from(list(KINDS)))
@settings(max_examples=60)
def test_repaired_is_convex(seed: int, kind: str) -> None:
    """Along segments between any two points, borders too; planes lie below."""
    rng = np.random.default_rng(seed)
    loss = repaired(kind, seed % 97, 5)
    here, there = (np.clip(rng.normal(0.5, 0.6, 5), 0, 1) for _ in range(2))
    (a, slope), (b, _) = loss.convex(here), loss.convex(there)
    for t in (0.1, 0.5, 0.8):
        assert loss.convex((1 - t) * here + t * there)[0] <= (1 - t) * a + t * b + 1e-10
    assert b >= a + slope @ (there - here) - 1e-9 * (1 + float(np.abs(slope).max()))
    assert (slope <= 0).all()  # more of a unit never hurts


@pytest.mark.parametrize("held", [1, 3])
def test_unit_worth_is_a_loss_difference_and_sweeps_are_reversible(held: int) -> None:
    rng = np.random.default_rng(held)
    for _ in range(4):
        one = fit(rng, 4, 7, held, others=2)
        loss = Repaired([one], np.arange(7))
        cross = one.weight @ one.covariance
        for stays in (np.zeros(7, bool), everything(7), rng.random(7) < 0.5):
            state = _SweptConsumer(one, cross, stays)
            here = least_squares([one], stays.astype(np.float64))
            other = []
            for unit in range(7):
                turned = stays.copy()
                turned[unit] = not turned[unit]
                other.append(here - least_squares([one], turned.astype(np.float64)))
            np.testing.assert_allclose(state.worth(), other, rtol=1e-6, atol=1e-9)
            assert (np.asarray(other)[stays] <= 0).all()
            table, outputs = state.table.copy(), state.outputs.copy()
            # In and out again; then a walk, against a state that is made anew at its end.
            for unit in (2, 5, 5, 2):
                state.sweep(unit)
            np.testing.assert_array_equal(state.kept, stays)
            np.testing.assert_allclose(
                state.table, table, rtol=0, atol=1e-9 * float(np.abs(table).max())
            )
            np.testing.assert_allclose(
                state.outputs, outputs, rtol=0, atol=1e-9 * float(np.abs(outputs).max())
            )
            for unit in rng.integers(0, 7, 51):
                state.sweep(int(unit))
            fresh = _SweptConsumer(one, cross, state.kept)
            np.testing.assert_allclose(
                state.table, fresh.table, rtol=0, atol=1e-8 * float(np.abs(fresh.table).max())
            )
            np.testing.assert_allclose(
                state.outputs, fresh.outputs, rtol=0, atol=1e-8 * float(np.abs(fresh.outputs).max())
            )
            np.testing.assert_allclose(
                state.table, state.table.T, rtol=0, atol=1e-8 * float(np.abs(table).max())
            )
        assert loss.value(stays) == pytest.approx(here, rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_repaired_narrow_is_locally_optimal(kind: str, seed: int) -> None:
    """Without turns the last of the order; exchanges only ever help."""
    loss = repaired(kind, seed, 9)
    rng = np.random.default_rng(seed)
    keep = everything(9)
    keep[rng.permutation(9)[:seed]] = False
    for count in (6, 4, 2):
        first = loss.narrow(keep, count, 0)
        ordered = [u for u in loss.order.tolist() if keep[u]]
        assert set(np.flatnonzero(first)) == set(ordered[len(ordered) - count :])
        losses = [loss.value(loss.narrow(keep, count, turns)) for turns in (0, 1, 2, 4, 64)]
        assert (np.diff(losses) <= 1e-12).all()
        assert losses[-1] >= least(loss, keep, count) * (1 - 1e-9)
        # Nothing to take.
        np.testing.assert_array_equal(loss.narrow(keep, int(keep.sum()), 3), keep)


def test_repaired_narrow_is_near_the_best_set() -> None:
    """From a greedy order never far away, and mostly there; from a random one still near."""
    informed, chance = [], []
    for kind in KINDS:
        for seed in range(3):
            loss = repaired(kind, seed, 8)
            order: list[int] = []
            keep = everything(8)
            while keep.any():
                less = _greedy(loss, keep, int(keep.sum()) - 1)
                order += np.flatnonzero(keep & ~less).tolist()
                keep = less
            greedy = Repaired(loss.consumers, np.asarray(order))
            for count in (5, 3, 2):
                best = least(loss, everything(8), count)
                informed.append(loss.value(greedy.narrow(everything(8), count, 64)) / best)
                chance.append(loss.value(loss.narrow(everything(8), count, 64)) / best)
    assert max(informed) < 2
    assert np.mean(informed) < 1.1
    assert np.mean(np.asarray(informed) < 1 + 1e-9) > 0.6
    assert np.mean(chance) < 1.2


def test_exchanges_recover_removed_units() -> None:
    """Consumers listen to three units, and the order takes those first."""
    rng = np.random.default_rng(0)
    weight = np.full((4, 8), 0.01)
    weight[:, [1, 4, 6]] = rng.uniform(1, 2, (4, 3))
    one = LinearConsumer(
        weight, np.eye(8), 1e-3, np.arange(8)[:, None], float(np.square(weight).sum())
    )
    loss = Repaired([one], np.asarray([1, 4, 6, 0, 2, 3, 5, 7]))
    assert set(np.flatnonzero(loss.narrow(everything(8), 3, 0))) == {3, 5, 7}
    assert len({1, 4, 6} & set(np.flatnonzero(loss.narrow(everything(8), 3, 2)))) == 2  # one a turn
    assert set(np.flatnonzero(loss.narrow(everything(8), 3, 3))) == {1, 4, 6}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_repaired_relaxation_bounds_every_set(kind: str, seed: int) -> None:
    """The whole count is shared out, every turn helps, and the plane there bounds all sets."""
    loss = repaired(kind, seed, 10, ridge=0.05)
    free = everything(10)
    free[np.random.default_rng(seed).permutation(10)[:seed]] = False
    for count in (6, 3):
        turns = [loss.relax(free, count, n) for n in (0, 1, 2, 4, 8, 16, 200)]
        np.testing.assert_allclose(turns[0], free * (count / free.sum()))
        for found in turns:
            assert (found >= 0).all()
            assert (found <= free).all()
            assert found.sum() == pytest.approx(count, rel=1e-9)
        losses = [whole(loss, t) for t in turns]
        assert (np.diff(losses) <= 1e-12).all()
        best = least(loss, free, count)
        for found, reached in zip(turns, losses, strict=True):
            bound = plane(loss, found, free, count)
            assert bound <= min(best, reached) + 1e-12
        assert losses[-1] <= best
        gaps = [
            reached - plane(loss, t, free, count) for t, reached in zip(turns, losses, strict=True)
        ]
        assert gaps[-1] <= 1e-2 * losses[-1]
        assert gaps[-2] <= 0.5 * gaps[0]


@given(SEEDS, st.integers(1, 12))
@settings(max_examples=60)
def test_shared_out_is_best(seed: int, units: int) -> None:
    """Of all ways to share the count out, none has a lower sum of squares over shares."""
    rng = np.random.default_rng(seed)
    free = rng.random(units) < 0.8
    free[0] = True
    count = int(rng.integers(1, free.sum() + 1))
    weight = rng.random(units) ** 3 + 1e-3
    found = _shares(weight, free, count)
    assert (found <= free).all()
    assert found.sum() == pytest.approx(count, rel=1e-9)
    inner = free & (found > 0)
    assert (inner == free).all()
    least_sum = float((weight[free] ** 2 / found[free]).sum())
    for _ in range(20):
        other = _shares(weight * rng.uniform(0.3, 3, units), free, count)
        assert (weight[free] ** 2 / other[free]).sum() >= least_sum * (1 - 1e-9)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_units_of_zero_weight_receive_a_share(count: int) -> None:
    """Consumers that read no unit, and consumers that read fewer units than may be kept."""
    for weight in (np.zeros(6), np.asarray([0, 0, 5.0, 0, 1.0, 0])):
        found = _shares(weight, everything(6), count)
        assert found.sum() == pytest.approx(count)
        assert ((found >= 0) & (found <= 1)).all()
        if weight.any() and count >= 3:
            np.testing.assert_allclose(found[[2, 4]], 1)


# -------------------------------------------------------------------------------------------------------- program


def losses_of(seed: int, units: int = 7) -> dict[str, Loss]:
    return {
        "quadratic": Quadratic(matrix(np.random.default_rng(seed), units)),
        "thin quadratic": Quadratic(matrix(np.random.default_rng(seed), units, 3)),
        "repaired": repaired("several", seed, units, 0.05),
        "repaired blocks": repaired("blocks of three", seed, units, 0.05),
    }


LOSSES = list(losses_of(0))


def outer(
    subset: Subset, free: Bools, count: int, solver: str, rounds: int = 200
) -> tuple[Bools, float, float]:
    """(best set, its loss, proven bound): planes at all that is found, until the bound meets the loss."""
    best = subset.loss.narrow(free, count, 0)
    value, bound = subset.loss.value(best), -np.inf
    subset.tangent(subset.loss.relax(free, count, 8))
    subset.tangent(best.astype(np.float64))
    for _ in range(rounds):
        solution = solve(
            subset.program(free, count, best), SolverLimits(time_s=20, gap=1e-9), solver
        )
        assert solution.values is not None
        assert solution.bound is not None
        bound = max(bound, solution.bound)
        keep = solution.values[:-1] > 0.5
        assert keep.sum() == count
        assert not (keep & ~free).any()
        if subset.loss.value(keep) < value:
            best, value = keep, subset.loss.value(keep)
        if value - bound <= 1e-6:
            break
        subset.tangent(keep.astype(np.float64))
    return best, value, bound


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", LOSSES)
def test_program_finds_the_best_set(name: str, solver: str) -> None:
    """Falling counts with all planes of the counts before, as in a walk; some units are gone already."""
    for seed in range(2):
        loss = losses_of(seed)[name]
        subset = Subset(loss, 7)
        free = everything(7)
        free[seed + 2] = False
        for count in (5, 3, 1):
            _, value, bound = outer(subset, free, count, solver)
            best = least(loss, free, count)
            assert value == pytest.approx(best, abs=1e-6)
            assert best - 2e-6 <= bound <= best + 1e-7


@pytest.mark.parametrize("name", LOSSES)
def test_cutting_planes_hold_for_every_set(name: str) -> None:
    """At any count, wherever they touch: with t the true loss no row cuts a set off; at a plane's own set t is met."""
    loss = losses_of(3)[name]
    rng = np.random.default_rng(0)
    subset = Subset(loss, 7)
    assert subset.rows == 1
    points = [
        *rng.random((4, 7)),
        *(rng.random((4, 7)) < 0.5).astype(np.float64),
        loss.relax(everything(7), 3, 8),
    ]
    for at in points:
        subset.tangent(at)
    assert subset.rows == 1 + len(points)
    for count in (2, 5):
        program = subset.program(everything(7), count, None)
        assert program.n_variables == 8
        assert program.matrix.shape[0] == subset.rows
        assert np.abs(program.matrix.toarray()).max() <= 1 + 1e-12  # steep planes are scaled
        for keep in sets(everything(7), count):
            one = keep.astype(np.float64)
            bent = loss.convex(one)[0]
            point = np.append(one, bent)
            rows = program.matrix @ point
            assert (rows >= program.row_lower - 1e-9).all()
            assert (rows <= program.row_upper + 1e-9).all()
            assert program.objective @ point + program.offset == pytest.approx(
                loss.value(keep), abs=1e-12
            )
            for row, at in enumerate(points, 1):
                if np.array_equal(at, one):
                    assert rows[row] == pytest.approx(program.row_lower[row], abs=1e-9)
        more = sets(everything(7), count + 1)
        assert all((program.matrix @ np.append(k, 0.0))[0] > program.row_upper[0] for k in more)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["quadratic", "repaired"])
def test_start_and_relaxation_are_consistent(name: str, solver: str) -> None:
    """A start is handed over as it is and never lost; without one the keep variables may be fractions."""
    loss = losses_of(5)[name]
    subset = Subset(loss, 7)
    free = everything(7)
    free[0] = False
    start = loss.narrow(free, 3, 8)
    relaxed = loss.relax(free, 3, 16)
    for at in (relaxed, start.astype(np.float64)):
        subset.tangent(at)
    program = subset.program(free, 3, start)
    assert program.start is not None
    np.testing.assert_array_equal(program.start[:-1], start)
    assert np.isnan(program.start[-1])
    np.testing.assert_array_equal(program.integer, [True] * 7 + [False])
    np.testing.assert_array_equal(program.upper[:-1], free)
    # Not a single node: what comes back is at least as good as the start, on the planes there are.
    hurried = solve(program, SolverLimits(time_s=20, gap=1e-9, nodes=1), solver)
    assert hurried.objective is not None
    assert hurried.objective <= loss.value(start) + 1e-7
    loose = subset.program(free, 3, None)
    assert loose.start is None
    assert not loose.integer.any()
    solution = solve(loose, SolverLimits(time_s=20), solver)
    assert solution.objective is not None
    assert plane(loss, relaxed, free, 3) - 1e-7 <= solution.objective <= whole(loss, relaxed) + 1e-6
    assert solution.objective <= hurried.objective + 1e-6  # a solver may miss a row by that much


@pytest.mark.parametrize("scale", [1e-308, 1e-100, 1e200])
def test_separable_part_does_not_depend_on_the_scale_of_its_worth(scale: float) -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((30, 6))
    q, worth = rows.T @ rows, rng.uniform(0.5, 2, 6)
    np.testing.assert_allclose(separable(q, scale * worth), separable(q, worth), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ branch and bound


def searched(
    loss: Loss,
    free: Bools,
    count: int,
    flops: float = PLENTY,
    gap: float = 0.0,
) -> Searched:
    return search(
        loss,
        free,
        loss.narrow(free, count, 0),
        root=loss.between(free, np.zeros(len(free), bool)).plane(count, PLENTY, None),
        flops=flops,
        gap=gap,
        is_over=lambda: False,
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(2))
def test_search_finds_the_best_set_and_proves_it(name: str, seed: int) -> None:
    loss = losses_of(seed)[name]
    free = everything(7)
    free[: 2 * seed] = False
    best = least(loss, free, 3)
    found = searched(loss, free, 3)
    assert found.keep.sum() == 3
    assert not (found.keep & ~free).any()
    assert loss.value(found.keep) == pytest.approx(found.value, rel=1e-12)
    assert found.value == pytest.approx(best, rel=1e-9)
    assert found.bound == pytest.approx(best, rel=1e-9)
    # No more nodes than there are sets, each of which ends at most one branch, and their parents.
    assert found.nodes <= 2 * sum(1 for _ in sets(free, 3)) - 1


@pytest.mark.parametrize("name", LOSSES)
def test_bound_of_a_search_rises_with_its_operations(name: str) -> None:
    loss = losses_of(3)[name]
    free = everything(7)
    best = least(loss, free, 3)
    bounds = []
    root = loss.between(free, np.zeros(7, bool)).plane(3, PLENTY, None)
    most = loss.between(free, np.arange(7) == 0).plane(3, PLENTY, root).flops
    for flops in (0.0, most, 4 * most, PLENTY):
        found = searched(loss, free, 3, flops)
        # The last branching may spend more than is left, on two nodes.
        assert found.flops <= flops + 2 * most
        assert found.bound <= best * (1 + 1e-9)
        assert found.value >= best * (1 - 1e-9)
        bounds.append(found.bound)
    assert bounds[0] == pytest.approx(root.least(free, np.zeros(7, bool), 3), rel=1e-9)
    assert (np.diff(bounds) >= -1e-12).all()
    assert bounds[-1] == pytest.approx(best, rel=1e-9)
    # Without repair the split diagonal makes the relaxation nearly exact.
    assert bounds[-1] > bounds[0] or name == "quadratic"
    assert searched(loss, free, 3, gap=1.0).nodes == 1


def test_search_ends_when_it_is_told() -> None:
    loss = losses_of(1)["repaired"]
    first = loss.narrow(everything(7), 3, 0)
    answers = iter([False, False, True])
    found = search(
        loss,
        everything(7),
        first,
        root=loss.between(everything(7), np.zeros(7, bool)).plane(3, PLENTY, None),
        flops=PLENTY,
        gap=0.0,
        is_over=lambda: next(answers),
    )
    assert found.nodes == 5
    assert found.bound < found.value


@pytest.mark.parametrize("name", LOSSES)
def test_relaxation_with_kept_units_bounds_the_sets_that_contain_them(name: str) -> None:
    loss = losses_of(2)[name]
    free = everything(7)
    free[6] = False
    kept = np.arange(7) == 2
    first = loss.between(free, np.zeros(7, bool)).plane(4, PLENTY, None)
    for origin in (None, first):
        found = loss.between(free, kept).plane(4, PLENTY, origin)
        for _ in range(5):
            found = loss.between(free, kept).plane(4, PLENTY, found)
        assert found.keep[2] == 1
        assert found.keep[6] == 0
        assert found.keep.sum() == pytest.approx(4, rel=1e-6)
        chosen = [keep for keep in sets(free, 4) if keep[2]]
        best = min(loss.value(keep) for keep in chosen)
        assert found.least(free, kept, 4) <= best + 1e-12
        assert found.least(free, kept, 4) >= 0.2 * best
        for keep in chosen:
            assert found.constant + found.slope @ keep <= loss.value(keep) + 1e-12
