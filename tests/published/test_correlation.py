"""Partial correlation: against regressions pair by pair, and what it is the baseline for."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_oamip.core.records import Floats
from onnx_oamip.published.dependence.correlation import partial
from onnx_oamip.published.dependence.layer_pairs import standardise
from onnx_oamip.statistics.layer_problems import shrinkage


def _residual(target: Floats, others: Floats) -> Floats:
    return target - others @ np.linalg.lstsq(others, target, rcond=None)[0]


def test_partial_correlation_equals_that_of_residuals() -> None:
    rng = np.random.default_rng(0)
    parents = rng.standard_normal((4000, 5)) @ rng.standard_normal((5, 5))
    children = parents @ rng.standard_normal((5, 3)) + 2 * rng.standard_normal((4000, 3))
    found = partial(parents, children)
    x, y = standardise(parents), standardise(children)
    for c in range(3):
        for p in range(5):
            others = np.delete(x, p, axis=1)
            a, b = _residual(x[:, p], others), _residual(y[:, c], others)
            exact = abs(float(a @ b) / np.sqrt(float(a @ a) * float(b @ b)))
            assert found[c, p] == pytest.approx(exact, abs=0.05)


def test_parent_explained_by_others_has_low_correlation() -> None:
    rng = np.random.default_rng(1)
    first = rng.standard_normal(3000)
    parents = np.stack([first, first + 0.5 * rng.standard_normal(3000)], axis=1)
    children = (first + 0.5 * rng.standard_normal(3000))[:, None]
    found = partial(parents, children)[0]
    plain = np.abs(np.corrcoef(parents.T, children.T))[2, :2]
    assert plain[1] > 0.7
    assert found[1] < 0.1 < 0.5 < found[0]


def test_independent_and_constant_columns_have_no_correlation() -> None:
    rng = np.random.default_rng(2)
    parents = rng.standard_normal((2000, 4))
    parents[:, 2] = 1.0
    found = partial(parents, rng.standard_normal((2000, 3)))
    assert np.isfinite(found).all()
    assert found.max() < 0.1
    assert (found[:, 2] == 0).all()


def test_exact_function_still_ranks_its_parents() -> None:
    """A linear layer's output is one of its inputs: the ridge keeps larger weights above smaller ones."""
    rng = np.random.default_rng(3)
    parents = rng.standard_normal((2000, 4))
    children = parents @ np.asarray([[1.0], [0.5], [0.25], [0.125]])
    found = partial(parents, children)[0]
    assert (np.diff(found) < 0).all()
    assert found[0] < 1


@pytest.mark.parametrize("rows", [3, 12, 40])
def test_more_parents_than_samples_equal_the_inverse_of_all_correlations(rows: int) -> None:
    rng = np.random.default_rng(rows)
    parents, children = rng.standard_normal((rows, 20)), rng.standard_normal((rows, 2))
    x, y = standardise(parents), standardise(children)
    gram = x.T @ x / rows
    ridge = shrinkage(gram, rows)
    for c in range(2):
        joint = np.block([[gram, x.T @ y[:, [c]] / rows], [y[:, [c]].T @ x / rows, np.eye(1)]])
        precision = np.linalg.inv(joint + ridge * np.eye(21))
        exact = np.abs(precision[:20, 20]) / np.sqrt(np.diag(precision)[:20] * precision[20, 20])
        np.testing.assert_allclose(partial(parents, children)[c], exact, rtol=1e-8)


def test_very_wide_layers_need_no_square_matrix() -> None:
    parents = np.random.default_rng(4).standard_normal((6, 100_000))
    found = partial(parents, parents[:, :1])
    assert found.shape == (1, 100_000)
    assert found.argmax() == 0
