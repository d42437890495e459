"""Relaxed energy of one refit against enumeration and plain algebra."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.programs.perspective import Perspective, relaxed_energy

UNITS = 6
RIDGE = 0.05


def problem(seed: int, per_unit: int, others: int) -> tuple[Floats, Floats]:
    """Covariance of correlated inputs of uneven size with the ridge, and that of four outputs with them."""
    rng = np.random.default_rng(seed)
    d = UNITS * per_unit + others
    factor = rng.standard_normal((d, d + 2)) * np.exp(0.5 * rng.standard_normal((d, 1)))
    return factor @ factor.T / d + RIDGE * np.eye(d), rng.standard_normal((4, d))


def energy(matrix: Floats, rows: Floats, here: Bools) -> float:
    """Energy that some columns explain, by one linear system."""
    chosen = rows[:, here]
    return float(np.vdot(chosen.T, np.linalg.solve(matrix[np.ix_(here, here)], chosen.T)))


def relaxation(seed: int, per_unit: int, others: int) -> tuple[Perspective, Floats, Floats, Bools]:
    matrix, rows = problem(seed, per_unit, others)
    unit = np.append(np.repeat(np.arange(UNITS), per_unit), np.zeros(others, np.int64))
    optional = np.arange(len(unit)) < UNITS * per_unit
    return relaxed_energy(matrix, rows, unit, optional, RIDGE), matrix, rows, optional


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("per_unit", [1, 2])
def test_relaxation_explains_the_energy_of_every_set(per_unit: int, others: int) -> None:
    """Columns of no unit are always present; tangent planes lie above all sets."""
    found, matrix, rows, optional = relaxation(1, per_unit, others)
    at = np.random.default_rng(0).uniform(0.2, 0.9, UNITS)
    here = found.evaluate(at)
    slope = np.bincount(found.unit, here.slope, UNITS)
    shares = at[found.unit]
    system = found.matrix + np.diag(found.diagonal * (1 / shares - 1))
    between = np.vdot(found.rows.T, np.linalg.solve(system, found.rows.T))
    assert here.explained == pytest.approx(found.constant + float(between))
    for size in range(UNITS + 1):
        for chosen in combinations(range(UNITS), size):
            keep = np.isin(np.arange(UNITS), chosen)
            present = ~optional
            present[optional] = keep[found.unit]
            exact = energy(matrix, rows, present)
            assert found.evaluate(keep.astype(np.float64)).explained == pytest.approx(exact)
            assert exact <= here.explained + slope @ (keep - at) + 1e-9


def test_diagonal_is_more_than_the_ridge_and_leaves_a_semidefinite_matrix() -> None:
    found, *_ = relaxation(2, 1, 0)
    assert (found.diagonal >= 0.9 * RIDGE).all()
    assert found.diagonal.sum() > 2 * RIDGE * UNITS
    assert np.linalg.eigvalsh(found.matrix - np.diag(found.diagonal))[0] >= -1e-9
