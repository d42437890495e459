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
from scipy.linalg import cho_factor, cho_solve

from ..gram import Problem, problems
from ..records import Coupling, Floats, Ints, Model, Scores, Statistics
from ..settings import Settings
from . import activation

ONE_BY_ONE = 64
"""Groups up to this many units lose one unit a step; above it a step takes 1/64 of what is left."""


def score(model: Model, coupling: Coupling, statistics: Statistics | None, settings: Settings) -> Scores:
    """Per unit the error at which it goes: monotone along the order of its group, 1 is the consumers' whole variance.

    Groups without a linear consumer (attention scores) take their activation score.
    """
    assert statistics is not None
    values = activation.score(model, coupling, statistics, settings).values.copy()
    for g, group in enumerate(coupling.groups):
        found = problems(model, coupling, statistics.grams, g)
        if found:
            order, curve = eliminate(found, len(group.units))
            values[group.units[order]] = curve
    return Scores("obs", values)


def eliminate(found: Sequence[Problem], count: int) -> tuple[Ints, Floats]:
    """(order (count,) of removal, cumulated error (count,) when each has gone)."""
    states = [_State(p) for p in found]
    alive = np.ones(count, bool)
    order: list[Ints] = []
    curve: list[Floats] = []
    error = 0.0
    while (left := int(alive.sum())) > 0:
        loss = np.zeros(count)
        for state in states:
            loss += state.losses()
        loss[~alive] = np.inf
        step = 1 if left <= ONE_BY_ONE else left // ONE_BY_ONE
        chosen = np.argsort(loss, kind="stable")[:step]
        order.append(chosen)
        curve.append(error + np.cumsum(np.maximum(loss[chosen], 0)))
        error = float(curve[-1][-1])
        alive[chosen] = False
        if step < left:
            for state in states:
                state.remove(chosen)
    total = len(found)
    return np.concatenate(order), np.concatenate(curve) / total


class _State:
    """One consumer while its inputs are taken away."""

    def __init__(self, problem: Problem) -> None:
        self.scale = problem.scale
        self.columns = problem.columns
        self.weight = problem.weight.copy()
        identity = np.eye(len(problem.gram))
        self.inverse = np.asarray(cho_solve(cho_factor(problem.gram, check_finite=False), identity))

    def losses(self) -> Floats:
        """Loss of removing each unit now (count,); meaningless for units already gone."""
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        weights = self.weight[:, self.columns].transpose(1, 0, 2)  # (units, outputs, k)
        energy = weights.transpose(0, 2, 1) @ weights
        return np.asarray(np.einsum("ukl,ulk->u", np.linalg.inv(blocks), energy)) / self.scale

    def remove(self, units: Ints) -> None:
        """Take units away: repair the weights, downdate the inverse, leave a harmless identity in their place."""
        gone = self.columns[units].reshape(-1)
        rows = self.inverse[gone]
        part = np.linalg.solve(rows[:, gone], rows)
        self.weight -= self.weight[:, gone] @ part
        self.inverse -= rows.T @ part
        self.weight[:, gone] = 0
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1
