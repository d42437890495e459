"""The search for a ridge strength by itself: the strengths tried, and the errors passed to it."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_oamip.core.records import Floats
from onnx_oamip.repair import ridge

ROWS, SPLIT = 10, 6


def _problem(groups: int = 2, outputs: int = 3) -> tuple[Floats, Floats]:
    """Rows with two inputs and outputs that are twice the first, by group, and an offset that differs by output."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((groups, ROWS, 2))
    return x, 2 * x[:, :, :1] + np.arange(outputs) + 1.0


def _search(
    values: list[float],
) -> tuple[list[tuple[int, float]], float | None, tuple[float, float]]:
    """Requests to a solver whose error at strength i is ``values[i]``, the strength taken, and the errors."""
    x, residual = _problem()
    asked: list[tuple[int, float]] = []

    def solve(count: int, strength: float) -> Floats:
        asked.append((count, strength))
        change = np.zeros((2, 2, 3))
        change[:, 0] = 2 + values[int(strength)]
        return change

    change, shift, taken, errors = ridge.choose_ridge(
        x, residual, SPLIT, solve, [float(i) for i in range(len(values))]
    )
    if taken is not None:
        assert change is not None
        assert change[0, 0, 0] == 2 + values[int(taken)]
        np.testing.assert_allclose(
            shift, residual.mean(axis=1) - (x.mean(axis=1)[:, None] @ change)[:, 0]
        )
    return asked, taken, errors


@pytest.mark.parametrize(
    ("values", "tried", "taken"),
    [
        # From the middle (of six: the fourth) to one side as long as it gets better, then to the other.
        ([6, 5, 4, 3, 2, 1], [3, 2, 4, 5], 5),
        ([1, 2, 3, 4, 5, 6], [3, 2, 1, 0], 0),
        ([9, 9, 2, 1, 2, 9], [3, 2, 4], 3),
        ([0, 9, 1, 2, 3, 4], [3, 2, 1], 2),  # a hollow behind a rise is not looked for
        ([9, 9, 1, 1, 1, 0], [3, 2, 4], 3),  # nor is one behind a plain
        ([3, 2, 1], [1, 0, 2], 2),
    ],
)
def test_search_over_strengths_walks_downhill(
    values: list[float], tried: list[int], taken: int
) -> None:
    asked, found, errors = _search([0.01 * v for v in values])
    order = list(dict.fromkeys(int(strength) for count, strength in asked if count == SPLIT))
    assert sorted(order) == sorted(tried)
    assert [count for count, _ in asked].count(SPLIT) == len(tried)  # each is solved once
    assert asked[-1] == (ROWS, float(taken))  # and the winner again, on all rows
    assert found == taken
    assert 0 < errors[1] < errors[0]


def test_errors_are_measured_on_held_out_rows() -> None:
    """Per output the mean square over those rows, summed over groups and outputs, after the shift of the others."""
    x, residual = _problem()
    _, _, errors = _search([0.5])
    left = residual - x @ np.stack([np.stack([np.full(3, 2.5), np.zeros(3)])] * 2)
    left -= left[:, :SPLIT].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(errors[0], np.square(residual[:, SPLIT:]).mean(axis=1).sum())
    np.testing.assert_allclose(errors[1], np.square(left[:, SPLIT:]).mean(axis=1).sum())


def test_tie_keeps_the_bias_shift_only() -> None:
    """A change that gains nothing beside a shift of the bias is not made."""
    x, residual = _problem()
    change, shift, taken, errors = ridge.choose_ridge(
        0 * x, residual, SPLIT, lambda *_: np.zeros((2, 2, 3)), [1.0]
    )
    assert change is None
    assert taken is None
    np.testing.assert_allclose(shift, residual.mean(axis=1))
    assert errors[1] < errors[0]


def test_single_output_and_group_are_solved() -> None:
    x, residual = _problem(1, 1)
    change, _, taken, errors = ridge.choose_ridge(
        x, residual, SPLIT, ridge.ridge_regression(x, residual, SPLIT)
    )
    assert taken == ridge.RIDGES[0]  # what is exactly linear needs none
    assert change is not None
    np.testing.assert_allclose(change[0, :, 0], [2, 0], atol=1e-3)
    assert errors[1] < 1e-6 * errors[0]


def test_without_a_solver_only_the_bias_changes() -> None:
    x, residual = _problem()
    change, shift, taken, errors = ridge.choose_ridge(x, residual, SPLIT, None)
    assert (change, taken) == (None, None)
    np.testing.assert_allclose(shift, residual.mean(axis=1))
    assert errors[1] < errors[0]


def test_worse_bias_is_discarded() -> None:
    """If the held-out rows are exact already, no shift is made: the error after is that before."""
    x, residual = _problem()
    residual = residual * (np.arange(ROWS) < SPLIT)[:, None]
    _, _, _, errors = ridge.choose_ridge(x, residual, SPLIT, None)
    assert errors == (0.0, 0.0)


def test_ridges_are_powers_of_ten() -> None:
    """Powers of ten around a hundredth of the mean diagonal, in order."""
    np.testing.assert_allclose(np.log10(ridge.RIDGES), np.arange(-4, 2), atol=1e-12)


@pytest.mark.parametrize("count", [6, 10])
@pytest.mark.parametrize("strength", ridge.RIDGES)
def test_primal_and_dual_forms_have_the_same_solution(count: int, strength: float) -> None:
    """With fewer rows than unknowns, by groups, wherever the data lie."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, ROWS, 14)) + rng.standard_normal((3, 1, 14))
    residual = rng.standard_normal((3, ROWS, 2)) + 5
    found = ridge.ridge_regression(x, residual, SPLIT)(count, strength)
    normal = ridge.normal_equations(x, residual, SPLIT)[count]
    np.testing.assert_allclose(found, ridge.solve_ridge(*normal, strength), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows", [200, 20])  # the normal equations, and the dual form
def test_fit_does_not_depend_on_the_scale_of_a_few_inputs(rows: int) -> None:
    """An input times a huge number has its weight divided by it, and the weights of others stay."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, rows, 30))
    residual = x @ rng.standard_normal((2, 30, 3)) + 0.1 * rng.standard_normal((2, rows, 3))
    fits = []
    for factor in (1e6, 1e12):
        scaled = x.copy()
        scaled[:, :, :3] *= factor
        solve = ridge.ridge_regression(scaled, residual, rows // 2)
        change = solve(rows, 0.1)
        change[:, :3] *= factor
        fits.append(change)
    np.testing.assert_allclose(fits[0], fits[1], rtol=1e-6, atol=1e-9)
    plain = ridge.ridge_regression(x, residual, rows // 2)(rows, 0.1)
    np.testing.assert_allclose(fits[0], plain, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("rows", [200, 5])  # the normal equations, and the dual form
def test_constant_inputs_do_not_count_for_the_usual_scale(rows: int) -> None:
    """Most inputs are constant, one of the others is a thousand times as large: it is scaled down as without them."""
    rng = np.random.default_rng(2)
    varying = 1e-3 * rng.standard_normal((1, rows, 6))
    varying[..., 0] *= 1e3
    residual = rng.standard_normal((1, rows, 2))
    alone, beside = (
        ridge.ridge_regression(x, residual, rows - 1)
        for x in (varying, np.concatenate([varying, np.ones((1, rows, 9))], axis=2))
    )
    # Strengths are relative to the mean diagonal, which nine zeros divide by 15 / 6.
    np.testing.assert_allclose(beside(rows, 0.25)[:, :6], alone(rows, 0.1), rtol=1e-6)
    assert not beside(rows, 0.25)[:, 6:].any()


def test_solve_ridge_gives_dead_inputs_no_weight() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 50, 6))
    x[:, :, 3] = 0
    gram = x.transpose(0, 2, 1) @ x
    cross = x.transpose(0, 2, 1) @ rng.standard_normal((2, 50, 4))
    for stack in (slice(0, 1), slice(0, 2)):
        found = ridge.solve_ridge(gram[stack], cross[stack], 1e-3)
        assert not found[:, 3].any()
        for g, c, w in zip(gram[stack], cross[stack], found, strict=True):
            np.testing.assert_allclose(
                (g + 1e-3 * np.trace(g) / 6 * np.eye(6)) @ w, c, rtol=1e-6, atol=1e-8
            )
    assert not ridge.solve_ridge(np.zeros((1, 3, 3)), np.zeros((1, 3, 2)), 1e-2).any()


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e8])
@pytest.mark.parametrize("groups", [1, 3])
def test_solve_ridge_does_not_depend_on_units_of_measure(scale: float, groups: int) -> None:
    """Strengths are relative: inputs in other units give the same outputs, also where some input is dead."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(groups, 50, 6))
    x[:, :, 2] = 0
    y = rng.normal(size=(groups, 50, 4))
    turned = x.transpose(0, 2, 1)
    plain = ridge.solve_ridge(turned @ x, turned @ y, 1e-2)
    other = ridge.solve_ridge(scale * turned @ x, scale * turned @ y, 1e-2)
    np.testing.assert_allclose(other, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 40], ids=["fewer rows than unknowns", "more rows"])
@pytest.mark.parametrize("size", [1e-20, 1.1, 1e20])
def test_input_that_varies_by_rounding_alone_gets_no_weight(rows: int, size: float) -> None:
    """Centred sums of a constant are rounding errors of either sign, which no system may be solved with."""
    rng = np.random.default_rng(0)
    varying = rng.standard_normal((1, rows, 4))
    constant = size * (1 + 1e-16 * rng.standard_normal((1, rows, 2)))
    residual = varying[..., :1] + constant[..., :1] / size
    split = rows - 1
    fit = ridge.choose_ridge(
        x := np.concatenate([constant, varying], axis=2),
        residual,
        split,
        ridge.ridge_regression(x, residual, split),
        [1e-6, 1e-4, 1e-2],
    )
    change = ridge.ridge_regression(x, residual, split)(split, 1e-6)
    assert np.isfinite(change).all()
    assert not change[0, :2].any()
    assert np.isfinite(fit.shift).all()
    if rows > split > x.shape[2]:
        np.testing.assert_allclose(change[0, 2:, 0], [1, 0, 0, 0], atol=1e-3)
