"""Relaxed energy of one refit: pieces, roots and restrictions against enumeration and plain algebra."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.programs.perspective import Perspective, _clusters, _symmetric_root

UNITS = 6


def relaxation(seed: int, per_unit: int = 1, outputs: int = 4) -> Perspective:
    """Correlated inputs of uneven size, the ridge as the only diagonal."""
    rng = np.random.default_rng(seed)
    d = UNITS * per_unit
    factor = rng.standard_normal((d, d + 2)) * np.exp(0.5 * rng.standard_normal((d, 1)))
    ridge = 0.05
    return Perspective(
        matrix=factor @ factor.T / d + ridge * np.eye(d),
        rows=rng.standard_normal((outputs, d)),
        piece=np.zeros(outputs, np.int64),
        diagonals=np.full((1, d), ridge),
        unit=np.repeat(np.arange(UNITS), per_unit),
        label=np.zeros(d, np.int64),
        constant=0.0,
        ridge=ridge,
    )


def energy(whole: Perspective, keep: Bools) -> float:
    """Energy that the kept columns explain, by one linear system."""
    here = np.flatnonzero(keep[whole.unit])
    rows = whole.rows[:, here]
    return float(np.vdot(rows.T, np.linalg.solve(whole.matrix[np.ix_(here, here)], rows.T)))


def sharpened(whole: Perspective, pieces: int) -> Perspective:
    found = whole.divided(pieces)
    for step in (1.0, 0.6):
        found = found.enlarged(np.full(UNITS, 0.5), step)
    return found


def upper_bound(found: Perspective, at: Floats, count: int) -> float:
    """Largest value of the tangent plane over the sets of a size."""
    here = found.evaluate(at)
    slope = np.bincount(found.unit, here.slope, UNITS)
    return float(here.explained - slope @ at + np.sort(slope)[-count:].sum())


@pytest.mark.parametrize("pieces", [1, 3, UNITS])
@pytest.mark.parametrize("per_unit", [1, 2])
def test_pieces_explain_the_energy_of_every_set(pieces: int, per_unit: int) -> None:
    whole = relaxation(1, per_unit)
    found = sharpened(whole, pieces)
    assert 1 <= len(found.diagonals) <= pieces
    assert len(np.unique(found.label)) == len(found.diagonals)
    at = np.random.default_rng(0).uniform(0.2, 0.9, UNITS)
    here = found.evaluate(at)
    slope = np.bincount(found.unit, here.slope, UNITS)
    for size in range(UNITS + 1):
        for chosen in combinations(range(UNITS), size):
            keep = np.zeros(UNITS, bool)
            keep[list(chosen)] = True
            exact = energy(whole, keep)
            assert found.evaluate(keep.astype(np.float64)).explained == pytest.approx(exact)
            assert exact <= here.explained + slope @ (keep - at) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_more_pieces_are_tighter(seed: int) -> None:
    whole = relaxation(seed)
    at = np.full(UNITS, 0.5)
    found = [whole, *(sharpened(whole, pieces) for pieces in (1, 3, UNITS))]
    values = [one.evaluate(at).explained for one in found]
    assert (np.diff(values) < 0).all()
    best = max(
        energy(whole, np.isin(np.arange(UNITS), chosen)) for chosen in combinations(range(6), 3)
    )
    assert all(upper_bound(one, at, 3) >= best for one in found)


@pytest.mark.parametrize("pieces", [1, 3, UNITS])
def test_restriction_explains_the_sets_that_are_left(pieces: int) -> None:
    """Fewer columns, the same energies, and tangent planes above them."""
    whole = relaxation(2, per_unit=2)
    found = sharpened(whole, pieces)
    free, kept = np.arange(UNITS) != 1, np.arange(UNITS) == 4
    part = found.between(free, kept)
    assert part.matrix.shape == (8, 8)
    assert len(part.diagonals) <= len(found.diagonals)
    assert set(part.unit) == {0, 2, 3, 5}
    at = kept + 0.5 * (free & ~kept)
    here = part.evaluate(at)
    slope = np.bincount(part.unit, here.slope, UNITS)
    if pieces == 1:  # the same diagonal, of fewer columns
        assert here.explained == pytest.approx(found.evaluate(at).explained)
    for chosen in combinations((0, 2, 3, 5), 2):
        keep = kept | np.isin(np.arange(UNITS), chosen)
        exact = energy(whole, keep)
        assert exact <= here.explained + slope @ (keep - at) + 1e-9
        assert part.evaluate(keep.astype(np.float64)).explained == pytest.approx(exact)
    nothing = found.between(kept, kept).evaluate(kept.astype(np.float64))
    assert nothing.explained == pytest.approx(energy(whole, kept))
    assert found.between(np.ones(UNITS, bool), np.zeros(UNITS, bool)) is found


def test_symmetric_root_has_the_same_products_and_lies_near_the_columns() -> None:
    whole = relaxation(3, outputs=9)
    root = _symmetric_root(whole.matrix, whole.rows)
    np.testing.assert_allclose(root.T @ root, whole.rows.T @ whole.rows, atol=1e-9)
    # Of uncorrelated outputs that read one column each, every row is one of them.
    alone = replace(whole, matrix=np.diag(np.arange(1.0, 7.0)), rows=np.diag(np.arange(1.0, 7.0)))
    root = _symmetric_root(alone.matrix, alone.rows[::-1])
    np.testing.assert_allclose(root, alone.rows, atol=1e-9)


def test_units_that_are_read_together_share_a_cluster() -> None:
    rows = np.kron(np.eye(3), np.ones((2, 2)))
    found = _clusters(rows, np.arange(6), 6, 3)
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[4] == found[5]
    assert len(set(found)) == 3
    np.testing.assert_array_equal(_clusters(rows, np.arange(6), 6, 6), np.arange(6))
