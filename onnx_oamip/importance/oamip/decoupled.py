"""OAMIP layer by layer: one program per group, whose size does not grow with the number of samples.

The published decoupling fixes the inputs of a layer and puts an auxiliary head on its outputs. Here the head is the
group's own consumers: their outputs on all calibration samples, by second moments, so that hundreds of samples count
and the program has one keep variable per unit and one more. The loss is the error of the consumers' outputs when units
are removed *together* (see ``programs.subset``), under the repair that the pruned model will get:

- ``--refit least-squares``: after the best reconstruction of the consumers from the remaining units;
- ``--refit bias``: with the mean of the removed units folded into the biases (covariances);
- ``--refit none``: without repair (second moments).

The program of a group is solved for a falling number of units, each set within the previous one, so that a score orders
all units. The score of a unit is the relative loss of the consumers at which it is removed, in [0, 1].

Source: ElAraby, Wolf, Carvalho, "OAMIP: Optimizing ANN Architectures Using Mixed-Integer Programming", CPAIOR 2023.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.records import (
    Bools,
    Coupling,
    Floats,
    Ints,
    Model,
    Scores,
    Statistics,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.executors import executor
from onnx_oamip.importance import activation, magnitude, obs
from onnx_oamip.programs import branching
from onnx_oamip.programs.program_files import ProgramFile, first_point_record
from onnx_oamip.programs.repaired_loss import LinearConsumer, Repaired
from onnx_oamip.programs.solvers import (
    Solution,
    SolverLimits,
    Termination,
    relative_gap,
    solve,
)
from onnx_oamip.programs.subset import (
    Loss,
    Plane,
    Quadratic,
    Subset,
)
from onnx_oamip.statistics.layer_problems import (
    TINY,
    Job,
    Problem,
    jobs,
    parallel_groups,
    problems,
)
from onnx_oamip.statistics.relevance import weighted
from onnx_oamip.statistics.requests import COVARIANCE, RELEVANCE

KEPT_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of a group's units that the programs keep, one program for each."""
MAX_SOLVES = 6
"""Solves of the program for one share."""
MAX_SEARCH_STEPS = 64
"""Steps of the search for the first point of one share."""
MAX_RELAX_STEPS = 32
"""Steps of the search for the optimum of the relaxation of one share."""
FLOPS_PER_GROUP = 4e11
"""Approximate floating-point operations for the losses of one group. Wide groups get fewer solves and search steps; the
numbers do not depend on the machine. What one share leaves is for the narrower ones."""
FEW_GROUPS = 5
"""Groups up to which each gets all of these operations. Where there are more, each gets less, down to half."""
MIN_STEPS = 30
"""Steps of the relaxation that must be affordable, or there is neither a plane of it nor branch and bound."""
ROOT_SHARE = 0.2
"""Part of the remaining operations that these may take."""
RELATIVE_GAP = 0.01
MAX_NODES = 1_000
"""Branch-and-bound nodes of one solve."""
MAX_LISTED_GROUPS = 3
"""Groups that a note lists by name."""
MIN_SCALE = 1e-30
"""Replaces the largest score as divisor if all scores are 0."""


def score(
    model: Model,
    coupling: Coupling,
    statistics: Statistics | None,
    settings: Settings,
) -> Scores:
    """Score the units of every group by the programs of that group.

    A group whose consumers have no second moments (attention scores) takes its activation scores, and one with a
    consumer of too many columns for a matrix its scores by ``obs``; notes name them. Groups are solved in parallel.

    Args:
        model: Model to score.
        coupling: Units of the model.
        statistics: Activation statistics and covariances of the model.
        settings: Options of the run: refit, solver, time limit, workers.

    Returns:
        Scores in [0, 1] (n_units,), one record per group, and alternative rankings.
    """
    assert statistics is not None
    activations = activation.score(model, coupling, statistics, settings).values
    values = np.zeros(coupling.n_units)
    surgeon = activations.copy()
    other_moments = activations.copy()
    records: list[Mapping[str, Any]] = []
    without_moments: list[str] = []
    without_program: list[str] = []
    grams = statistics[COVARIANCE]
    workers = parallel_groups(settings.workers, model, coupling, grams, settings.max_memory)
    pool = executor(workers, settings.scheduler)
    shared = (model, coupling, settings, statistics.get(RELEVANCE, {}))
    results = pool.map(_score_group, shared, jobs(coupling, grams))
    for group, result in zip(coupling.groups, results, strict=True):
        units = group.units
        if result is None:
            largest = max(float(activations[units].max()), MIN_SCALE)
            values[units] = activations[units] / largest
            without_moments.append(group.name)
            continue
        values[units] = result.values
        surgeon[units] = result.surgeon
        other_moments[units] = result.other_moments
        if result.record is None:
            without_program.append(group.name)
        else:
            records.append(result.record)
    notes = (
        *_note(without_moments, "have no consumer with second moments, so activation scores"),
        *_note(without_program, "are too wide for a program, so scores of the order of obs"),
    )
    # Repaired consumers hide the way in which an order was found. Without repair the rest of the network decides, which
    # no moment of a single layer captures, so these orders are worth a measurement on the whole model.
    others = {}
    if settings.refit != "least-squares":
        l2 = magnitude.l2(model, coupling, statistics, settings).values
        others = {
            "activation": activations,
            "obs": surgeon,
            "l2": l2,
            "other moments": other_moments,
        }
    return Scores("oamip", values, tuple(records), notes, others)


def _note(names: Sequence[str], reason: str) -> tuple[str, ...]:
    """Note for the groups that took other scores; none if there are no such groups."""
    if not names:
        return ()
    listed = ", ".join(names[:MAX_LISTED_GROUPS])
    if len(names) > MAX_LISTED_GROUPS:
        listed += ", ..."
    return (f"{len(names)} groups {reason} stand in ({listed})",)


@dataclass(frozen=True, eq=False)
class _GroupResult:
    """Scores of one group.

    Attributes:
        values: Scores by the programs (units,).
        surgeon: Alternative ranking by the optimal brain surgeon (units,).
        other_moments: Alternative ranking by the quadratic loss that the refit does not correspond to (units,).
        record: Record of the programs; None if the group is too wide for one.
    """

    values: Floats
    surgeon: Floats
    other_moments: Floats
    record: Mapping[str, Any] | None


def _score_group(
    shared: tuple[Model, Coupling, Settings, Mapping[str, Floats]], job: Job
) -> _GroupResult | None:
    """Solve the programs of one group; None if no consumer of the group has second moments."""
    model, coupling, settings, relevance = shared
    index, grams = job
    group = coupling.groups[index]
    with memory_for(f"the programs of the group '{group.name}'"):
        consumers = weighted(problems(model, coupling, grams, index), relevance)
        if not consumers:
            return None
        if any(problem.factor is not None for problem in consumers):
            return _eliminate_group(consumers, len(group.units))
        return _solve_group(
            consumers, len(group.units), group.name, settings, groups=len(coupling.groups)
        )


def _eliminate_group(consumers: Sequence[Problem], units: int) -> _GroupResult:
    """Scores of a group that is too wide for a program: the cumulated error in the order of obs."""
    order, curve = obs.eliminate(consumers, units)
    values = np.empty(units)
    surgeon = np.empty(units)
    values[order] = _strictly_rising(curve)
    surgeon[order] = np.arange(units)
    return _GroupResult(values, surgeon, values, None)


def _solve_group(
    consumers: Sequence[Problem],
    units: int,
    name: str,
    settings: Settings,
    *,
    groups: int = 1,
) -> _GroupResult:
    """Solve the programs of a group, one for every share, from the widest to the narrowest.

    Args:
        consumers: Consumers of the group.
        units: Number of its units.
        name: Its name.
        settings: Refit, solver, time limit and seed.
        groups: Number of groups of the model, which share the operations where they are many.
    """
    began = time.perf_counter()
    order, _ = obs.eliminate(consumers, units)
    loss = _loss(consumers, settings.refit, order)
    flops = FLOPS_PER_GROUP * min(1.0, max(0.5, FEW_GROUPS / groups))
    subset = Subset(loss, units)
    keep = np.ones(units, bool)
    loss_of_all = loss.value(keep)
    values = np.zeros(units)
    level = 0.0
    removed: list[Ints] = []
    steps: list[_Step] = []
    for index, share in enumerate((*KEPT_SHARES, 0.0)):
        count = max(1, round(share * units)) if share else 0
        if count >= keep.sum():
            continue
        if count == 0:
            kept = np.zeros(units, bool)
        else:
            start = loss.narrow(keep, count, MAX_SEARCH_STEPS)
            step = _improve(
                subset,
                keep,
                start,
                settings,
                name,
                flops=flops * _part_of_rest(index),
                most_flops=ROOT_SHARE * flops,
                deadline=time.perf_counter() + settings.time_limit,
            )
            flops -= step.flops
            steps.append(step)
            kept = step.keep
        dropped = np.flatnonzero(keep & ~kept)
        relative_loss = (loss.value(kept) - loss_of_all) / len(consumers)
        next_level = max(level, min(1.0, relative_loss))
        # Units that are removed together get scores between the two levels, the cheapest unit first.
        ranked = dropped[np.argsort(loss.removal_costs(keep)[dropped], kind="stable")]
        fraction = np.arange(1, len(dropped) + 1)
        values[ranked] = level + (next_level - level) * fraction / len(dropped)
        removed.append(ranked)
        keep = kept
        level = next_level
    # A smaller set may lose no more than a larger one, and a loss may reach 1 early. Equal scores are then ordered by
    # removal, because the sets must stay nested.
    sequence = np.concatenate(removed)
    values[sequence] = _strictly_rising(values[sequence])
    surgeon = np.empty(units)
    surgeon[order] = np.arange(units)
    other_moments = values
    if settings.refit != "least-squares":
        other_moments = _exchange_scores(_quadratic(consumers, settings.refit == "none"))
    record = _record(name, subset, steps, time.perf_counter() - began)
    return _GroupResult(values, surgeon, other_moments, record)


def _part_of_rest(index: int) -> float:
    """Part of the remaining operations for one of the shares: narrower ones, whose gaps are wider, get more."""
    return (index + 1) / sum(range(index + 1, len(KEPT_SHARES) + 1))


def _exchange_scores(loss: Quadratic) -> Floats:
    """Scores (units,) by exchanges alone, without a program."""
    units = len(loss.matrix)
    keep = np.ones(units, bool)
    values = np.full(units, float(len(KEPT_SHARES)))
    for i, share in enumerate(KEPT_SHARES):
        count = min(int(keep.sum()), max(1, round(share * units)))
        kept = loss.narrow(keep, count, MAX_SEARCH_STEPS)
        values[keep & ~kept] = i
        keep = kept
    # Less than one step, so that it only orders the units of one share.
    own_cost = loss.removal_costs(np.ones(units, bool))
    return values + own_cost / (2 * max(float(own_cost.max()), MIN_SCALE))


def _strictly_rising(values: Floats) -> Floats:
    """Ascending scores without ties, still in [0, 1]: the order must survive the sorting of scores."""
    increment = 1e-9
    count = len(values)
    scaled = np.minimum(values, 1.0) * (1 - increment * count)
    return np.asarray(scaled + np.arange(1, count + 1) * increment, np.float64)


def _loss(consumers: Sequence[Problem], refit: str, order: Ints) -> Loss:
    """Loss of the group under the refit that the pruned model will get."""
    if refit != "least-squares":
        return _quadratic(consumers, refit == "bias")
    fits = []
    for problem in consumers:
        assert problem.gram is not None
        covariance = problem.gram.copy()
        covariance[np.diag_indices_from(covariance)] -= problem.ridge
        fits.append(
            LinearConsumer(
                weight=problem.weight,
                covariance=covariance,
                ridge=problem.ridge,
                columns=problem.columns,
                scale=problem.scale / problem.share,
            )
        )
    return Repaired(fits, order)


def _quadratic(consumers: Sequence[Problem], centred: bool) -> Quadratic:
    return Quadratic(np.sum([quadratic(problem, centred) for problem in consumers], axis=0))


def quadratic(problem: Problem, centred: bool) -> Floats:
    """Compute the quadratic loss of one consumer, relative to the energy of its outputs.

    Args:
        problem: Weight and moments of the consumer.
        centred: True for covariances (bias refit), False for second moments (no refit).

    Returns:
        Q (units, units) with ``Q_ij = tr(W_i C_ij W_j')``. The loss of removing a set is the sum of Q over the set.
    """
    assert problem.gram is not None
    moments = problem.gram
    if not centred:
        moments = moments + np.outer(problem.mean, problem.mean)
    units, per_unit = problem.columns.shape
    flat = problem.columns.reshape(-1)
    weight = problem.weight[:, flat]
    per_column = (weight.T @ weight) * moments[np.ix_(flat, flat)]
    energy = float(np.einsum("od,od->", problem.weight @ moments, problem.weight))
    blocks = per_column.reshape(units, per_unit, units, per_unit)
    result: Floats = blocks.sum(axis=(1, 3)) / max(energy, TINY)
    return result * problem.share


@dataclass(frozen=True, eq=False)
class _Step:
    """Result for one number of units.

    Attributes:
        keep: Best set (units,).
        value: Loss of the set.
        bound: Proved lower bound of the loss.
        flops: Approximate number of floating-point operations spent.
        solution: Last solution of the program, or None if it was not solved.
        improved: True if the set is better than the first point.
        solution_read: True if a solution was read from a file.
        solution_taken: True if that was better than the first point.
    """

    keep: Bools
    value: float
    bound: float
    flops: float
    solution: Solution | None
    improved: bool
    solution_read: bool
    solution_taken: bool


class _Incumbent:
    """Best set of a fixed size found so far, with its loss."""

    def __init__(self, loss: Loss, free: Bools, start: Bools) -> None:
        self.loss = loss
        self.free = free
        self.count = int(start.sum())
        self.keep = start
        self.value = loss.value(start)

    def offer(self, weights: Floats) -> bool:
        """Take the units of largest weight among the free ones if their loss is lower; True if they are taken."""
        ranked = np.argsort(-np.where(self.free, weights, -1.0), kind="stable")
        trial = np.zeros(len(weights), bool)
        trial[ranked[: self.count]] = True
        value = self.loss.value(trial)
        is_better = bool(value < self.value)
        if is_better:
            self.keep, self.value = trial, value
        return is_better


def _improve(
    subset: Subset,
    free: Bools,
    start: Bools,
    settings: Settings,
    name: str,
    *,
    flops: float,
    most_flops: float,
    deadline: float,
) -> _Step:
    """Improve a set by outer approximation, then by branch and bound on the relaxation.

    Tangent planes are added at the optimum of the convex function, at the first set and at every solution; where they
    do not prove enough, a plane of the relaxation. Each solution is rounded to a set and compared by its true loss.

    Args:
        subset: Program of the group, with the planes of earlier sizes.
        free: Units that may be kept (units,).
        start: First set, a subset of the free units (units,).
        settings: Solver and seed.
        name: Name of the group.
        flops: Floating-point operations that may be spent.
        most_flops: The same for the plane of the relaxation, if it takes more.
        deadline: Time at which to stop, by ``time.perf_counter``.
    """
    best = _Incumbent(subset.loss, free, start)
    file = ProgramFile.of(settings, f"importance-{name}-{best.count}-of-{subset.units}")
    columns = [f"keep_{name}_{unit}" for unit in range(subset.units)]
    proposed = file.values(lambda: columns)
    taken = proposed is not None and best.offer(proposed)
    search = _SubsetSearch(subset, best, settings, flops, most_flops, deadline)
    search.approximate()
    search.branch()
    file.write(
        lambda: subset.program(free, best.count, best.keep),
        lambda: [*columns, "loss"],
    )
    return _Step(
        keep=best.keep,
        value=best.value,
        bound=min(search.bound, best.value),
        flops=search.spent,
        solution=search.solution,
        improved=best.keep is not start,
        solution_read=proposed is not None,
        solution_taken=taken,
    )


@dataclass(eq=False)
class _SubsetSearch:
    """Search for the best set of a fixed size, with a lower bound of its loss.

    Attributes:
        subset: Program of the group.
        best: Best set so far.
        settings: Solver and seed.
        flops: Floating-point operations that may be spent.
        most_flops: The same for the plane of the relaxation, if it takes more.
        deadline: Time at which to stop, by ``time.perf_counter``.
        bound: Proved lower bound of the loss.
        spent: Operations that were spent.
        root: Plane of the relaxation, if there is one.
        solution: Last solution of the program, if there is one.
    """

    subset: Subset
    best: _Incumbent
    settings: Settings
    flops: float
    most_flops: float
    deadline: float
    bound: float = 0.0
    spent: float = 0.0
    root: Plane | None = None
    solution: Solution | None = None

    def approximate(self) -> None:
        """Solve the program with more and more planes, until the gap is closed or nothing changes."""
        loss, best = self.subset.loss, self.best
        evaluations = self.flops / loss.flops
        relax_steps = int(min(MAX_RELAX_STEPS, max(2, evaluations / 3)))
        relaxed = loss.relax(best.free, best.count, relax_steps)
        self.spent = relax_steps * loss.flops
        best.offer(relaxed)
        self.subset.tangent(relaxed)
        self.subset.tangent(best.keep.astype(np.float64))
        for _ in range(int(min(MAX_SOLVES, max(1, evaluations / 6)))):
            remaining = self.deadline - time.perf_counter()
            if remaining <= 0:
                return
            before = best.value, self.bound
            keep = self._solve(remaining)
            if keep is None or not self._is_open:
                return
            if self.root is None and max(self.flops, self.most_flops) >= self._flops_of_root:
                self._add_root()
            elif self.root is not None and (best.value, self.bound) == before:
                return  # the plane of the relaxation is above all that follow
            self.subset.tangent(keep)
            # A plane at the midpoint cuts deeper between the two points than the plane at the far end alone.
            self.subset.tangent((keep + relaxed) / 2)

    def branch(self) -> None:
        """Branch and bound on the relaxation, if its plane is known and the gap is open."""
        if self.root is None or not self._is_open or time.perf_counter() >= self.deadline:
            return
        searched = branching.search(
            self.subset.loss,
            self.best.free,
            self.best.keep,
            root=self.root,
            flops=self.flops - self.spent,
            gap=RELATIVE_GAP,
            is_over=lambda: time.perf_counter() >= self.deadline,
        )
        self.best.offer(searched.keep.astype(np.float64))
        self.bound = max(self.bound, searched.bound)
        self.spent += searched.flops

    @property
    def _is_open(self) -> bool:
        """True if the gap between the best set and the bound is too large."""
        return self.best.value - self.bound > RELATIVE_GAP * self.best.value

    @property
    def _flops_of_root(self) -> float:
        """Operations that the plane of the relaxation needs at least."""
        return MIN_STEPS * self.subset.loss.plane_flops(int(self.best.free.sum()))

    def _solve(self, seconds: float) -> Floats | None:
        """Solve the program once; its solution (units,), None if there is none."""
        best = self.best
        limits = SolverLimits(
            time_s=seconds,
            gap=RELATIVE_GAP / 4,
            seed=self.settings.seed,
            nodes=MAX_NODES,
        )
        program = self.subset.program(best.free, best.count, best.keep)
        self.solution = solve(program, limits, self.settings.solver)
        if self.solution.bound is not None:
            self.bound = max(self.bound, self.solution.bound)
        if self.solution.values is None:
            return None
        keep = self.solution.values[:-1]
        best.offer(keep)
        return keep

    def _add_root(self) -> None:
        """Add the plane of the relaxation over all sets."""
        best = self.best
        none = np.zeros(len(best.free), bool)
        flops = max(self.flops - self.spent, self._flops_of_root)
        root = self.subset.loss.between(best.free, none).plane(best.count, flops, None)
        self.root = root
        self.spent += root.flops
        best.offer(root.keep)
        self.subset.bound(root)
        self.bound = max(self.bound, root.least(best.free, none, best.count))


def _record(
    name: str,
    subset: Subset,
    steps: Sequence[_Step],
    seconds: float,
) -> Mapping[str, Any]:
    """One record for all programs of a group. The gap is that of the sum of their losses."""
    solutions = [step.solution for step in steps if step.solution is not None]
    value = sum(step.value for step in steps)
    bound = sum(step.bound for step in steps)
    gap = relative_gap(value, bound)
    if gap <= RELATIVE_GAP:
        status = Termination.OPTIMAL
    else:
        status = Termination.FEASIBLE
    limits: list[str] = []
    if status is not Termination.OPTIMAL:  # what the search has proven needs no solver
        limits = [solution.limit.value for solution in solutions if solution.limit is not None]
    solvers = dict.fromkeys(solution.solver for solution in solutions)
    return {
        "purpose": "importance",
        "group": name,
        "solver": ", ".join(solvers) or None,
        "reason": solutions[-1].reason if solutions else "nothing to choose",
        "status": status.value,
        "limit": limits[0] if limits else None,
        "gap": gap,
        "objective": value,
        "bound": bound,
        "seconds": seconds,
        "variables": subset.units + 1,
        "rows": subset.rows,
        "programs": len(steps),
        "improved": sum(step.improved for step in steps),
        **first_point_record(
            sum(step.solution_read for step in steps),
            sum(step.solution_taken for step in steps),
        ),
    }
