"""Structured optimal brain surgeon: remove the unit whose loss, after the best repair by the others, is least.

For a consumer with weights W and inverse (ridged) covariance H of its inputs, removing the columns j of one unit and
repairing the rest costs ``tr(W_j (H_jj)^-1 W_j')`` and changes ``W -= W_j (H_jj)^-1 H_j:``; H itself is then downdated
(Hassibi and Stork 1993; in blocks as in Frantar and Alistarh 2022). One pass gives the whole order of a group and its
error curve. Several consumers are added up, each in units of its output variance. Wide groups remove a few units a
step: a share of those left, so that the last ones are still told apart one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor
from scipy.linalg.lapack import dpotri

from onnx_oamip.core.records import (
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.executors import executor
from onnx_oamip.importance import activation
from onnx_oamip.statistics.layer_problems import (
    Job,
    Problem,
    jobs,
    problems,
)
from onnx_oamip.statistics.requests import COVARIANCE

MIRROR = 256
"""Rows mirrored at a time."""
ONE_BY_ONE = 32
"""Groups up to this many units lose one unit a step; above it a step takes 1/32 of what is left."""


def score(
    model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings
) -> Scores:
    """Per unit the error at which it goes: monotone along the order of its group, 1 is the consumers' whole variance.

    Groups without a linear consumer (attention scores) take their activation score.
    """
    assert statistics is not None
    values = activation.score(model, coupling, statistics, settings).values.copy()
    # Groups side by side, each with one thread for linear algebra: most matrices are too small to share.
    place = executor(settings.workers, settings.scheduler)
    every = place.map(_one, (model, coupling), jobs(coupling, statistics[COVARIANCE]))
    for group, found in zip(coupling.groups, every, strict=True):
        if found is not None:
            order, curve = found
            values[group.units[order]] = curve
    return Scores("obs", values)


def _one(whole: tuple[Model, Coupling], job: Job) -> tuple[Ints, Floats] | None:
    model, coupling = whole
    found = problems(model, coupling, job[1], job[0])
    return eliminate(found, len(coupling.groups[job[0]].units)) if found else None


def eliminate(found: Sequence[Problem], count: int) -> tuple[Ints, Floats]:
    """(order (count,) of removal, cumulated error (count,) when each has gone)."""
    states = [_State(p) for p in found]
    alive = np.ones(count, bool)
    order: list[Ints] = []
    curve: list[Floats] = []
    error = 0.0
    while (left := int(alive.sum())) > 0:
        here = np.flatnonzero(alive)
        loss = np.zeros(left)
        for state in states:
            loss += state.losses(here)
        step = max(1, left // ONE_BY_ONE)
        first = np.argsort(loss, kind="stable")[:step]
        chosen = here[first]
        order.append(chosen)
        curve.append(error + np.cumsum(np.maximum(loss[first], 0)))
        error = float(curve[-1][-1])
        alive[chosen] = False
        if step < left:
            for state in states:
                state.remove(chosen)
    total = len(found)
    return np.concatenate(order), np.concatenate(curve) / total


def _inverse(gram: Floats) -> Floats:
    """Inverse of a positive definite matrix from its Cholesky factor, a third of the work of solving for I."""
    # LAPACK counts columns first: its lower triangle is the upper one here.
    factor, _ = cho_factor(gram.T, lower=True, check_finite=False)
    inverse, _ = dpotri(factor, lower=True, overwrite_c=True)
    inverse = inverse.T
    for first in range(
        0, len(inverse), MIRROR
    ):  # block by block: whole triangles would be copied several times
        last = first + MIRROR
        corner = inverse[first:last, first:last]
        inverse[first:last, first:last] = np.triu(corner) + np.triu(corner, 1).T
        inverse[last:, first:last] = inverse[first:last, last:].T
    return np.ascontiguousarray(inverse)


class _State:
    """One consumer while its inputs are taken away. Columns already gone are dropped once they are a quarter."""

    def __init__(self, problem: Problem) -> None:
        self.scale = problem.scale
        self.columns = problem.columns.copy()
        self.weight = problem.weight.copy()
        self.present = np.ones(len(problem.gram), bool)
        self.inverse = _inverse(problem.gram)

    def losses(self, units: Ints) -> Floats:
        """Loss of removing each of ``units`` now."""
        columns = self.columns[units]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = self.weight[:, columns].transpose(1, 0, 2)  # (units, outputs, k)
        energy = weights.transpose(0, 2, 1) @ weights
        return np.asarray(np.einsum("ukl,ulk->u", np.linalg.inv(blocks), energy)) / self.scale

    def remove(self, units: Ints) -> None:
        """Take units away: repair the weights of the rest and downdate the inverse."""
        gone = self.columns[units].reshape(-1)
        rows = self.inverse[gone]
        part = np.linalg.solve(rows[:, gone], rows)
        self.weight -= self.weight[:, gone] @ part
        self.inverse -= rows.T @ part
        self.present[gone] = False
        if self.present.mean() < 0.75:
            place = np.cumsum(self.present) - 1
            self.columns = place[
                self.columns
            ]  # of units still there; others point anywhere and are not asked for
            self.inverse = self.inverse[np.ix_(self.present, self.present)]
            self.weight = self.weight[:, self.present]
            self.present = np.ones(len(self.inverse), bool)
