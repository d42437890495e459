"""Cholesky factorisations: the right values, and other threads that run meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from onnx_oamip.core.cholesky import MIRROR, Cholesky
from onnx_oamip.core.records import Floats

SIZES = (1, 2, 7, MIRROR, MIRROR + 1, 2 * MIRROR + 3)


def _definite(n: int, seed: int = 0) -> Floats:
    rows: Floats = np.random.default_rng(seed).normal(size=(n, n))
    return rows @ rows.T / max(n, 1) + np.eye(n)


@pytest.mark.parametrize("n", SIZES)
def test_solutions_inverse_and_determinant_are_those_of_numpy(n: int) -> None:
    matrix = _definite(n)
    right = np.random.default_rng(1).normal(size=(n, 3))
    before = matrix.copy()
    found = Cholesky.of(matrix)
    assert np.array_equal(matrix, before)
    assert np.allclose(found.solve(right), np.linalg.solve(matrix, right), rtol=1e-10, atol=1e-12)
    single = found.solve(right[:, 0])
    assert single.shape == (n,)
    assert np.allclose(single, found.solve(right)[:, 0], rtol=1e-12, atol=1e-14)
    inverse = found.inverse()
    assert np.allclose(inverse, np.linalg.inv(matrix), rtol=1e-10, atol=1e-12)
    assert np.array_equal(inverse, inverse.T)
    assert np.allclose(np.tril(found.factor), np.linalg.cholesky(matrix), rtol=1e-10, atol=1e-12)
    determinant = np.linalg.slogdet(matrix)[1]
    assert found.log_determinant() == pytest.approx(determinant, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided", "float32"])
def test_any_layout_is_read(layout: str) -> None:
    matrix = _definite(9)
    given = {
        "rows": matrix,
        "columns": np.asfortranarray(matrix),
        "strided": np.repeat(np.repeat(matrix, 2, axis=0), 3, axis=1)[::2, ::3],
        "float32": matrix.astype(np.float32),
    }[layout]
    right = np.arange(18.0).reshape(2, 9).T
    tolerance = 1e-5 if layout == "float32" else 1e-10
    for overwrite in (False, True):
        solved = Cholesky.of(given.copy(order="K"), overwrite=overwrite).solve(right)
        assert np.allclose(matrix @ solved, right, rtol=tolerance, atol=tolerance)


def test_only_the_lower_triangle_is_read() -> None:
    matrix = _definite(6)
    lower = np.tril(matrix) + np.triu(np.full((6, 6), np.nan), 1)
    assert np.allclose(Cholesky.of(lower).inverse(), np.linalg.inv(matrix), rtol=1e-10, atol=1e-12)


def test_memory_is_taken_over_on_request() -> None:
    matrix = _definite(6)
    found = Cholesky.of(matrix, overwrite=True)
    assert np.shares_memory(found.factor, matrix)
    assert np.shares_memory(found.inverse(overwrite=True), matrix)


def test_matrices_without_rows_have_empty_solutions() -> None:
    found = Cholesky.of(np.zeros((0, 0)))
    assert found.solve(np.zeros((0, 4))).shape == (0, 4)
    assert found.solve(np.zeros(0)).shape == (0,)
    assert found.inverse().shape == (0, 0)
    assert found.log_determinant() == 0.0
    assert Cholesky.of(_definite(3)).solve(np.zeros((3, 0))).shape == (3, 0)


@pytest.mark.parametrize(
    "matrix", [np.diag([1.0, -1.0]), np.zeros((2, 2))], ids=["indefinite", "zero"]
)
def test_matrices_that_are_not_definite_are_refused(matrix: Floats) -> None:
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        Cholesky.of(matrix)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows and 3 columns"):
        Cholesky.of(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="4 rows of right sides for 3 unknowns"):
        Cholesky.of(_definite(3)).solve(np.zeros((4, 1)))


def test_other_threads_run_during_every_routine() -> None:
    """Each routine works long enough for another thread to see its begin and its end."""
    matrix = _definite(1500)
    factor = Cholesky.of(matrix)
    calls: dict[str, Callable[[], object]] = {
        "factorise": lambda: Cholesky.of(matrix),
        "solve": lambda: factor.solve(matrix),
        "invert": factor.inverse,
    }
    for name, call in calls.items():
        assert _runs_beside(call), name


def _runs_beside(call: Callable[[], object]) -> bool:
    """Tests for steps of another thread between the start and the end of a call, in one of a few attempts."""
    for _ in range(5):
        steps: list[float] = []
        done = threading.Event()
        watcher = threading.Thread(target=_note_times, args=(steps, done))
        watcher.start()
        while not steps:
            time.sleep(0.001)
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        done.set()
        watcher.join()
        third = (end - start) / 3
        if any(start + third < step < end - third for step in steps):
            return True
    return False


def _note_times(steps: list[float], done: threading.Event) -> None:
    while not done.is_set():
        steps.append(time.perf_counter())
        time.sleep(0.001)
