"""Structured optimal brain surgeon: units are removed in the order of least loss after the best linear repair.

For a consumer with weights W and inverse (ridged) covariance H of its inputs, removing the columns j of one unit and
repairing the rest costs ``tr(W_j (H_jj)^-1 W_j')`` and changes ``W -= W_j (H_jj)^-1 H_j:``; H itself is then downdated
(Hassibi and Stork 1993; in blocks as in Frantar and Alistarh 2022). One pass gives the whole order of a group and its
error curve. Several consumers are added up, each in units of its output variance, or if the objective has several
terms by the loss that their errors bring (``statistics.relevance``). Wide groups remove a few units per step, a share
of those left, so that the last ones are still ordered one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_oamip.core.cholesky import Cholesky
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
from onnx_oamip.importance import activation, magnitude
from onnx_oamip.statistics.layer_problems import (
    Job,
    Problem,
    jobs,
    parallel_groups,
    problems,
)
from onnx_oamip.statistics.relevance import weighted
from onnx_oamip.statistics.requests import COVARIANCE, RELEVANCE

ONE_BY_ONE = 32
"""Groups of up to this many units lose one unit per step; above it a step removes 1/32 of the units left."""
LEAST_PRESENT = 0.75
"""Share of present columns below which the removed ones are dropped from the matrices."""


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score units by the error of their group at their removal.

    Args:
        model: The model.
        coupling: Its units and consumers.
        statistics: Moments and covariances of the inputs of consumers.
        settings: Settings of the run.

    Returns:
        One score per unit, monotone along the order of its group; 1 is the whole variance of the consumers. Groups
        without a linear consumer (attention scores) have their activation scores.
    """
    assert statistics is not None
    values = activation.score(model, coupling, statistics, settings).values.copy()
    # Groups side by side, each with one thread for linear algebra: most matrices are too small to share.
    grams = statistics[COVARIANCE]
    workers = parallel_groups(settings.workers, model, coupling, grams, settings.max_memory)
    pool = executor(workers, settings.scheduler)
    every_job = jobs(coupling, grams)
    shared = (model, coupling, statistics.get(RELEVANCE, {}))
    results = pool.map(_eliminate_group, shared, every_job)
    for group, result in zip(coupling.groups, results, strict=True):
        if result is not None:
            order, curve = result
            values[group.units[order]] = curve
    return Scores("obs", values, others=_others(model, coupling, statistics, settings, values))


def _others(
    model: Model,
    coupling: Coupling,
    statistics: Statistics,
    settings: Settings,
    values: Floats,
) -> dict[str, Floats]:
    """Other orders for groups with a consumer that has no covariance, such as a normalisation.

    What that consumer loses is not part of the error above, so that another order may be better. All other groups keep
    their order.
    """
    grams = statistics[COVARIANCE]
    unseen = np.zeros(coupling.n_units, bool)
    for consumer in (*coupling.consumers, *coupling.inside):
        if consumer.node not in grams:
            labels = coupling.axes[consumer.data, consumer.axis]
            unseen[labels[labels >= 0]] = True
    if not unseen.any():
        return {}
    affected = np.isin(coupling.unit_group, coupling.unit_group[unseen])
    return {
        name: np.where(affected, method(model, coupling, statistics, settings).values, values)
        for name, method in (("activation", activation.score), ("l2", magnitude.l2))
    }


def _eliminate_group(
    shared: tuple[Model, Coupling, Mapping[str, Floats]], job: Job
) -> tuple[Ints, Floats] | None:
    model, coupling, relevance = shared
    group, grams = job
    every_problem = weighted(problems(model, coupling, grams, group), relevance)
    if not every_problem:
        return None
    return eliminate(every_problem, len(coupling.groups[group].units))


def eliminate(consumers: Sequence[Problem], count: int) -> tuple[Ints, Floats]:
    """Remove all units of a group, those of least loss first.

    Args:
        consumers: The consumers of the group.
        count: Number of units.

    Returns:
        The order of removal (count,), and the cumulated error (count,) after each removal.
    """
    states = [_state(problem) for problem in consumers]
    # A unit that is constant in all consumers costs nothing: biases make up for it.
    constant = np.all([problem.constant for problem in consumers], axis=0)
    alive = np.ones(count, bool)
    order: list[Ints] = []
    curve: list[Floats] = []
    error = 0.0
    while (left := int(alive.sum())) > 0:
        candidates = np.flatnonzero(alive)
        loss = np.zeros(left)
        for state in states:
            loss += state.losses(candidates)
        loss[constant[candidates]] = 0.0
        step = max(1, left // ONE_BY_ONE)
        least = np.argsort(loss, kind="stable")[:step]
        removed = candidates[least]
        order.append(removed)
        curve.append(error + np.cumsum(np.maximum(loss[least], 0)))
        error = float(curve[-1][-1])
        alive[removed] = False
        if step < left:
            states = [state.remove(removed) for state in states]
    return np.concatenate(order), np.concatenate(curve) / len(consumers)


def _state(problem: Problem) -> _State | _WideState:
    scale = problem.scale / problem.share
    columns = problem.columns.copy()
    weight = problem.weight.copy()
    if problem.factor is not None:
        return _WideState(problem.factor.copy(), columns, weight, ridge=problem.ridge, scale=scale)
    assert problem.gram is not None
    return _State(problem.gram, columns, weight, scale)


class _WideState:
    """One consumer with more columns than rows during the removal of its inputs.

    With F the factor of the present columns and ``K = F F' + ridge I``, a matrix of rows by rows, the inverse is
    ``H = (I - F' K^-1 F) / ridge`` (Woodbury).
    """

    def __init__(
        self,
        factor: Floats,
        columns: Ints,
        weight: Floats,
        *,
        ridge: float,
        scale: float,
    ) -> None:
        self.factor, self.columns, self.weight = factor, columns, weight
        self.ridge, self.scale = ridge, scale
        self._solve()

    def _solve(self) -> None:
        products = self.factor @ self.factor.T
        products[np.diag_indices_from(products)] += self.ridge
        self.solved = Cholesky.of(products).inverse(overwrite=True) @ self.factor

    def losses(self, units: Ints) -> Floats:
        """Compute the loss of removing each unit from the present state.

        Args:
            units: Units that are present.

        Returns:
            One loss per unit, in units of the consumer's output variance.
        """
        per_unit = self.columns.shape[1]
        columns = self.columns[units].reshape(-1)
        shape = (len(self.factor), len(units), per_unit)
        factor = self.factor[:, columns].reshape(shape)
        solved = self.solved[:, columns].reshape(shape)
        reach = np.einsum("nuk,nul->ukl", factor, solved, optimize=True)
        weights = self.weight[:, columns].reshape(len(self.weight), len(units), per_unit)
        energy = np.einsum("ouk,oul->ukl", weights, weights, optimize=True)
        blocks = np.eye(per_unit) - reach
        losses = self.ridge * np.einsum("ukl,ulk->u", np.linalg.inv(blocks), energy)
        return np.asarray(losses) / self.scale

    def remove(self, units: Ints) -> _State | _WideState:
        """Remove units and repair the weights of the rest.

        Args:
            units: Units that are present.

        Returns:
            The state without them, as a matrix once there are no more columns than rows.
        """
        removed = self.columns[units].reshape(-1)
        lost = self.weight[:, removed] @ self.factor[:, removed].T
        present = np.ones(self.factor.shape[1], bool)
        present[removed] = False
        place = np.cumsum(present) - 1
        # Entries of removed units become arbitrary, and are never read.
        self.columns = place[self.columns]
        self.factor = self.factor[:, present]
        self.weight = self.weight[:, present]
        self._solve()
        self.weight += lost @ self.solved
        if self.factor.shape[1] > len(self.factor):
            return self
        gram = self.factor.T @ self.factor
        gram[np.diag_indices_from(gram)] += self.ridge
        return _State(gram, self.columns, self.weight, self.scale)


class _State:
    """One consumer during the removal of its inputs."""

    def __init__(
        self,
        gram: Floats,
        columns: Ints,
        weight: Floats,
        scale: float,
    ) -> None:
        self.columns, self.weight, self.scale = columns, weight, scale
        self.present = np.ones(len(gram), bool)
        self.inverse = Cholesky.of(gram).inverse(overwrite=True)

    def losses(self, units: Ints) -> Floats:
        """Compute the loss of removing each unit from the present state.

        Args:
            units: Units that are present.

        Returns:
            One loss per unit, in units of the consumer's output variance.
        """
        columns = self.columns[units]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = self.weight[:, columns].transpose(1, 0, 2)  # (units, outputs, k)
        energy = weights.transpose(0, 2, 1) @ weights
        losses = np.einsum("ukl,ulk->u", np.linalg.inv(blocks), energy)
        return np.asarray(losses) / self.scale

    def remove(self, units: Ints) -> _State:
        """Remove units: repair the weights of the rest and downdate the inverse.

        Args:
            units: Units that are present.

        Returns:
            The state without them.
        """
        removed = self.columns[units].reshape(-1)
        rows = self.inverse[removed]
        repair = np.linalg.solve(rows[:, removed], rows)
        self.weight -= self.weight[:, removed] @ repair
        self.inverse -= rows.T @ repair
        self.present[removed] = False
        if self.present.mean() < LEAST_PRESENT:
            self._drop_removed()
        return self

    def _drop_removed(self) -> None:
        place = np.cumsum(self.present) - 1
        # Entries of removed units become arbitrary, and are never read.
        self.columns = place[self.columns]
        self.inverse = self.inverse[np.ix_(self.present, self.present)]
        self.weight = self.weight[:, self.present]
        self.present = np.ones(len(self.inverse), bool)
