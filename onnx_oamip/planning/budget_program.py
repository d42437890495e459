"""The budget program: chooses the width of every group by one mixed-integer linear program.

Every group has candidate widths with a measured loss each. The program takes one width per group, so that the sum of
the losses is minimal while every limit (MACs, parameters, bytes, latency, ...) holds. Costs are products of axis
lengths, which ``programs.products`` linearises exactly. The costs of the solver's widths are counted again in whole
numbers.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.budgets import COUNTED
from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Floats, Ints
from onnx_oamip.graph.cost import Ledger, Products
from onnx_oamip.programs import Builder, Program
from onnx_oamip.programs.products import (
    Levels,
    Polynomials,
    linearise,
    reduce_costs,
)
from onnx_oamip.programs.program_files import ProgramFile, distinct, first_point_record
from onnx_oamip.programs.solvers import (
    Limit,
    Notify,
    Solution,
    SolverLimits,
    Termination,
    relative_gap,
    solve,
)
from onnx_oamip.programs.thresholds import with_thresholds

SOLVER_LIMITS = SolverLimits(time_s=60.0, gap=1e-3)
TIE_BREAK = 1e-6
"""Weight of the used budget, relative to the loss: among equal losses, the wider plan is chosen."""
PREFERENCE = 1e-3
"""Weight of the loss, as a share of its bound, in the number of units: among equal numbers, less loss is chosen."""
TINY_LOSS = 1e-12
"""Divisor in place of a bound of 0 on the loss."""
MAGNITUDE = 1e3
"""Objective of the initial incumbent: large enough for the tie-break to exceed the absolute tolerances of solvers."""
BINDING = 0.995
"""A limit binds where this share of it is used."""
ROUNDING = 1e-9
"""Relative error allowed in sums of measured (not counted) costs."""
ATTEMPTS = 5
"""Number of solves, each with limits tightened by the excess that the tolerance of the last one allowed."""
NO_FILE = ProgramFile("budget")
"""Neither a program to write nor a solution to read."""
_THRESHOLD = re.compile(r"at_least_(\d+)_of_(.+)")
"""Name of a threshold variable in files."""


class CostLimits(Protocol):
    """Absolute limits on counted costs, by the name of their budget."""

    @property
    def values(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Ladder:
    """Candidate widths of every group, and the losses of the model at them.

    Attributes:
        widths: Candidate widths of each group, ascending. The last one is the widest that is allowed, usually the full
            width with a loss of 0.
        cost: Loss when only this group has the candidate width, in the order of ``widths``.
        bounded: A second measure of every candidate, whose sum may not exceed ``most``; empty if there is none.
        most: Upper bound on the sum of ``bounded``.

    Raises:
        ValueError: Widths and losses do not match, or widths are not ascending from 0 or more.
    """

    widths: tuple[Ints, ...]
    cost: tuple[Floats, ...]
    bounded: tuple[Floats, ...] = ()
    most: float = math.inf

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.cost):
            raise ValueError(
                f"{len(self.widths)} groups have widths, {len(self.cost)} have losses."
            )
        for g, (widths, cost) in enumerate(zip(self.widths, self.cost, strict=True)):
            if len(widths) == 0 or widths[0] < 0 or (np.diff(widths) <= 0).any():
                raise ValueError(
                    f"group {g} has the widths {widths.tolist()}, expected 0 or more and ascending."
                )
            if cost.shape != widths.shape or not np.isfinite(cost).all():
                raise ValueError(
                    f"group {g} has the losses {cost.tolist()}, expected {len(widths)} finite numbers."
                )


def fewest_units(ladder: Ladder, max_loss: float) -> Ladder:
    """Make a ladder for the fewest units within a bound on the summed loss: objective and constraint are exchanged.

    Args:
        ladder: Candidate widths and losses.
        max_loss: Upper bound on the sum of the losses.

    Returns:
        The ladder whose cost is the number of units. Among equal numbers the lower loss is preferred.
    """
    preference = PREFERENCE / max(max_loss, TINY_LOSS)
    units = tuple(
        widths + preference * np.minimum(losses, max_loss)
        for widths, losses in zip(ladder.widths, ladder.cost, strict=True)
    )
    return replace(ladder, cost=units, bounded=ladder.cost, most=max_loss)


def within_loss(ladder: Ladder, max_loss: float) -> Ladder:
    """Make a ladder for the least summed loss within the budgets and a bound on it.

    Args:
        ladder: Candidate widths and losses.
        max_loss: Upper bound on the sum of the losses.

    Returns:
        The ladder with the bound.
    """
    return replace(ladder, bounded=ladder.cost, most=max_loss)


def multiplier(ladder: Ladder, max_loss: float) -> tuple[float, float]:
    """Solve the linear relaxation of the program for the fewest units within a bound on the summed loss.

    The relaxation takes the lower convex hull of every group's candidates. Its segments are taken in the order of
    units saved per loss until the bound is used up (Sinha and Zoltners, The multiple-choice knapsack problem, 1979).

    Args:
        ladder: Candidate widths and losses.
        max_loss: Upper bound on the sum of the losses.

    Returns:
        (lambda, units): the multiplier of the bound, at which ``lambda * loss + units`` has the same minimum, and the
        least number of units that any widths within the bound keep. Lambda is 0 if the bound does not bind.
    """
    segments: list[tuple[float, float]] = []
    units = 0.0
    for widths, losses in zip(ladder.widths, ladder.cost, strict=True):
        hull = _lower_hull(losses[::-1], widths[::-1].astype(np.float64))
        units += hull[0][1]
        segments += [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(hull)]
    left = max_loss
    for loss, saved in sorted(segments, key=lambda segment: segment[0] / segment[1]):
        if loss > left:
            return saved / loss, units - saved * left / loss
        left -= loss
        units -= saved
    return 0.0, units


def _lower_hull(x: Floats, y: Floats) -> list[tuple[float, float]]:
    """Falling part of the lower convex hull of points whose x do not fall."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while hull and (
            hull[-1][0] == point[0] or (len(hull) > 1 and _above(hull[-2], hull[-1], point))
        ):
            hull.pop()
        hull.append(point)
    return hull


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Tests whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


@dataclass(frozen=True)
class LinearisedLimit:
    """Limit on a measured cost, in any unit (seconds for a latency).

    Attributes:
        name: Name of the cost in records and messages.
        products: Terms over the axes of the ledger, with non-negative factors.
        constant: Part of the cost that does not depend on widths.
        limit: Upper bound on the constant plus the terms.
        starts: Share of nodes in the constant, by their names.

    Raises:
        ValueError: The constant or the limit is not finite.
    """

    name: str
    products: Products
    constant: float
    limit: float
    starts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.constant) and math.isfinite(self.limit)):
            raise ValueError(
                f"the limit '{self.name}' is {self.limit} with the constant {self.constant}, not finite."
            )

    def without(self, nodes: Iterable[str]) -> LinearisedLimit:
        """Leave the shares of some nodes out of the constant.

        Args:
            nodes: Names of nodes that are removed.

        Returns:
            The limit for a network without them.
        """
        removed = set(nodes)
        saved = sum(cost for name, cost in self.starts.items() if name in removed)
        return replace(self, constant=self.constant - saved)


@dataclass(frozen=True)
class Choice:
    """Chosen widths.

    Attributes:
        widths: Width of every group (groups,).
        program: Record of the solve, for ``programs`` of the report.
    """

    widths: Ints
    program: Mapping[str, Any]


def choose(
    ledger: Ledger,
    ladder: Ladder,
    limits: CostLimits,
    extra: Sequence[LinearisedLimit] = (),
    *,
    solver: str = "auto",
    solver_limits: SolverLimits = SOLVER_LIMITS,
    notify: Notify | None = None,
    file: ProgramFile = NO_FILE,
) -> Choice:
    """Chooses the widths of least total loss under all limits at once.

    Args:
        ledger: Costs as functions of the widths.
        ladder: Candidate widths and losses.
        limits: Limits on counted costs, which hold exactly, in whole numbers.
        extra: Limits on measured costs.
        solver: Name of the solver, or ``auto``.
        solver_limits: Limits on time and gap. At the time limit the incumbent is taken, with its gap.
        notify: Receives the progress of the solver.
        file: Files of the program: it is written before it is solved, and a solution of it is read as a first point.

    Returns:
        The widths, and the record of the solve.

    Raises:
        BudgetNotMet: Even the narrowest widths exceed a limit, which the message names, or the solver found no widths
            in time.
        SolverError: The solver cannot be used.
    """
    began = time.perf_counter()
    budget = _Budget.of(ledger, ladder, limits, extra)
    incumbent = _greedy(budget)
    proposed = _proposed(budget, file)
    is_better = proposed is not None and _is_better(budget, proposed, incumbent)
    if is_better:
        incumbent = proposed
    narrowest = budget.used(budget.widest * 0)
    # Counted costs only fall with the widths, and one-off costs are the exception: without these, and without a bound
    # on the loss, the greedy search only fails if nothing holds.
    if incumbent is None and not extra and not budget.one_off.any() and not len(budget.bounded):
        raise BudgetNotMet(_not_met(budget, narrowest))
    formulation = _formulate(budget, incumbent)
    file.write(
        lambda: formulation.program,
        lambda: _columns(budget, formulation, file.groups),
        lambda: _rows(formulation, budget),
    )
    solution, level = _solve(
        budget,
        formulation,
        incumbent,
        solver=solver,
        limits=solver_limits,
        notify=notify,
    )
    if level is None:
        if solution.termination is Termination.INFEASIBLE:
            if len(budget.bounded):
                raise BudgetNotMet(_loss_not_met(budget))
            raise BudgetNotMet(_not_met(budget, narrowest))
        raise BudgetNotMet(
            f"the solver found no widths within {solution.seconds:.0f} s and its other limits; give it more time, or "
            "ask for more."
        )
    level = _polish(budget, level)
    record = _record(budget, formulation, solution, level)
    record["seconds"] = time.perf_counter() - began
    record |= first_point_record(int(proposed is not None), int(is_better))
    return Choice(budget.widths(level), record)


def _proposed(budget: _Budget, file: ProgramFile) -> Ints | None:
    """Level vector that a solution file proposes: the widest candidates within the widths that it reaches.

    The file may be of a program over other candidates of the same groups, as there are several in one run.
    """
    values = file.solution()
    if values is None:
        return None
    index = {name: group for group, name in enumerate(distinct(file.groups))}
    reached = np.zeros(len(budget.widest), np.int64)
    for name, value in values.items():
        threshold = _THRESHOLD.fullmatch(name)
        group = index.get(threshold[2]) if threshold and value > 0.5 else None
        if threshold and group is not None:
            reached[group] = max(reached[group], int(threshold[1]))
    is_within = budget.levels.width <= reached[budget.levels.group]
    count = np.bincount(budget.levels.group[is_within], minlength=len(reached))
    level: Ints = np.maximum(count - 1, 0)
    return level


def _is_better(budget: _Budget, level: Ints, other: Ints | None) -> bool:
    """Tests whether a level vector meets all limits at a lower loss than another one."""
    if not budget.holds(level):
        return False
    if other is None:
        return True
    loss = budget.loss[budget.first + level].sum() - budget.loss[budget.first + other].sum()
    return bool(loss < 0)


def _columns(budget: _Budget, formulation: _Formulation, groups: Sequence[str]) -> list[str]:
    """Names of the variables: one per threshold, by its group and least width, then those of products."""
    levels = budget.levels
    has_threshold = np.ones(len(levels.group), bool)
    has_threshold[budget.first] = False
    thresholds = zip(
        levels.group[has_threshold].tolist(), levels.width[has_threshold].tolist(), strict=True
    )
    names = [f"at_least_{width}_of_{groups[group]}" for group, width in thresholds]
    others = formulation.program.n_variables - len(names)
    return [*names, *(f"product_{i}" for i in range(others))]


def _rows(formulation: _Formulation, budget: _Budget) -> dict[int, str]:
    """Names of the rows that are limits."""
    names = dict(zip(formulation.limit_rows.tolist(), budget.names, strict=True))
    return names | dict.fromkeys(formulation.bounded_row.tolist(), "max_loss")


def _record(
    budget: _Budget,
    formulation: _Formulation,
    solution: Solution,
    level: Ints,
) -> dict[str, Any]:
    """Record of the solve for the report; its time is filled in by the caller."""
    objective = formulation.objective(budget, level)
    gap = None
    if solution.bound is not None:
        gap = relative_gap(objective, min(solution.bound, objective))
    # The greedy widths count as a feasible solution if the solver returned none.
    if solution.has_values:
        status = solution.termination
    else:
        status = Termination.FEASIBLE
    used = dict(zip(budget.names, budget.used(level).tolist(), strict=True))
    if len(budget.bounded):
        used["max_loss"] = budget.bounded_share(level)
    return {
        "purpose": "budget",
        "solver": solution.solver,
        "reason": solution.reason,
        "status": status.value,
        "limit": solution.limit.value if solution.limit else None,
        "gap": gap,
        "seconds": 0.0,
        "variables": formulation.program.n_variables,
        "rows": formulation.program.n_rows,
        "objective": float(budget.loss[budget.first + level].sum()),
        "binding": [name for name, share in used.items() if share >= BINDING],
        "used": used,
    }


@dataclass(frozen=True, eq=False)
class _Budget:
    """Candidate widths (levels), losses and limits in the form of the program.

    A level vector (groups,) holds the position of a candidate width in every group, 0 for the narrowest.

    Attributes:
        names: Names of the limited costs.
        levels: Group and width of every candidate, all groups in one list.
        loss: Loss of every candidate.
        first: Position of the first candidate of each group in that list.
        widest: Level of the widest candidate of each group.
        costs: Limited costs as polynomials of the widths, without constant.
        constant: Constant part of each cost.
        bound: Upper bound on each cost.
        ledger: Costs as functions of the widths, for exact counting.
        sums: (factors, axes) of the terms of each cost.
        counted: Number of leading costs that are whole numbers.
        one_off: Addition of every one-off item of the ledger to every cost (costs, items).
        bounded: Second measure of every candidate, whose sum is bounded; empty if there is none.
        most: Upper bound on the sum of ``bounded``.
    """

    names: tuple[str, ...]
    levels: Levels
    loss: Floats
    first: Ints
    widest: Ints
    costs: Polynomials
    constant: Floats
    bound: Floats
    ledger: Ledger
    sums: tuple[tuple[Ints | Floats, Ints], ...]
    counted: int
    one_off: Ints
    bounded: Floats
    most: float

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        ladder: Ladder,
        limits: CostLimits,
        extra: Sequence[LinearisedLimit],
    ) -> _Budget:
        """Collects the limits that are given.

        Args:
            ledger: Costs as functions of the widths.
            ladder: Candidate widths and losses.
            limits: Limits on counted costs.
            extra: Limits on measured costs.
        """
        sizes = np.asarray([len(widths) for widths in ladder.widths], np.int64)
        n_groups = ledger.per_unit.shape[1]
        if len(sizes) != n_groups:
            raise ValueError(f"the ladder has {len(sizes)} groups, the model {n_groups}.")
        levels = Levels(
            np.repeat(np.arange(n_groups), sizes),
            np.concatenate([np.zeros(0, np.int64), *ladder.widths]),
        )
        names: list[str] = []
        sums: list[tuple[Ints | Floats, Ints]] = []
        constant: list[float] = []
        bound: list[float] = []
        one_off: list[Ints] = []
        for kind in COUNTED:
            if kind.name not in limits.values:
                continue
            cost = ledger.counted[kind.cost]
            names.append(kind.name)
            sums.append((cost.products.factor, cost.products.axes))
            constant.append(float(cost.constant))
            # Whole numbers: `sum // divisor <= limit` is `sum < divisor * (floor(limit) + 1)`.
            upper = math.floor(limits.values[kind.name]) + 1
            bound.append(float(cost.divisor * upper - 1))
            one_off.append(cost.one_off)
        counted = len(names)
        none = np.zeros_like(ledger.one_off.params)
        for measured in extra:
            names.append(measured.name)
            sums.append((measured.products.factor, measured.products.axes))
            constant.append(measured.constant)
            bound.append(measured.limit)
            one_off.append(none)
        terms = [(np.asarray(factor, np.float64), axes) for factor, axes in sums]
        return cls(
            names=tuple(names),
            levels=levels,
            loss=np.concatenate([np.zeros(0), *ladder.cost]),
            first=np.cumsum(sizes) - sizes,
            widest=sizes - 1,
            costs=reduce_costs(ledger.fixed, ledger.per_unit, terms),
            constant=np.asarray(constant, np.float64),
            bound=np.asarray(bound, np.float64),
            ledger=ledger,
            sums=tuple(sums),
            counted=counted,
            one_off=np.reshape(one_off, (len(names), len(none))),
            bounded=np.concatenate([np.zeros(0), *ladder.bounded]),
            most=max(ladder.most, TINY_LOSS),
        )

    @property
    def scale(self) -> Floats:
        """Normaliser that turns a cost into a fraction of its limit."""
        return np.maximum(np.abs(self.bound), 1e-12)

    def widths(self, level: Ints) -> Ints:
        """Width of every group (groups,) at a level vector."""
        result: Ints = self.levels.width[self.first + level]
        return result

    def level(self, values: Floats) -> Ints:
        """Level vector of a solution: the number of thresholds that each group passes."""
        n_groups = len(self.widest)
        group_of_threshold = np.repeat(np.arange(n_groups), self.widest)
        is_passed = values[: len(group_of_threshold)] > 0.5
        passed = np.bincount(group_of_threshold[is_passed], minlength=n_groups)
        level: Ints = passed.astype(np.int64)
        return level

    def used(self, level: Ints) -> Floats:
        """Share of every limit (costs,) that a level vector uses, from exact sums."""
        widths = self.widths(level)
        lengths = self.ledger.lengths(widths)
        total = [float((factor * lengths[axes].prod(axis=1)).sum()) for factor, axes in self.sums]
        one_off = self.one_off @ self.ledger.one_off.incurred(widths)
        return self.share(np.asarray(total) + self.constant + one_off)

    def share(self, total: Floats) -> Floats:
        """Costs as fractions of their limits, computed so that a fraction is at most 1 exactly if the limit holds."""
        result: Floats = 1.0 + (total - self.bound) / self.scale
        return result

    def holds(self, level: Ints) -> bool:
        """Tests whether a level vector meets every limit: counted ones exactly, measured ones up to rounding."""
        used = self.used(level)
        counted_hold = (used[: self.counted] <= 1).all()
        measured_hold = (used[self.counted :] <= 1 + ROUNDING).all()
        return bool(counted_hold and measured_hold and self.bounded_share(level) <= 1 + ROUNDING)

    def bounded_share(self, level: Ints) -> float:
        """Share of the bound on the second measure that a level vector uses; 0 without such a bound."""
        if not len(self.bounded):
            return 0.0
        return float(self.bounded[self.first + level].sum()) / self.most


@dataclass(frozen=True, eq=False)
class _Formulation:
    """A mixed-integer program for a budget.

    Attributes:
        program: The program.
        limit_rows: Its rows that are limits.
        bounded_row: Its row that bounds the second measure (one row), or none.
        unit: Divisor of the losses in its objective.
    """

    program: Program
    limit_rows: Ints
    bounded_row: Ints
    unit: float

    def objective(self, budget: _Budget, level: Ints) -> float:
        """Objective of the program at a level vector."""
        loss = float(budget.loss[budget.first + level].sum()) / self.unit
        if not budget.names or len(budget.bounded):
            return loss
        return loss - TIE_BREAK * MAGNITUDE * float(budget.used(level).mean())


def _formulate(budget: _Budget, incumbent: Ints | None) -> _Formulation:
    """Builds the program: one binary per level, one row per limit, rows for products; then all in threshold form."""
    levels = budget.levels
    n_levels = len(levels.group)
    start = np.full(n_levels, np.nan)
    largest = float(np.abs(budget.loss).max(initial=0.0)) or 1.0
    unit = largest / MAGNITUDE
    if incumbent is not None:
        chosen = budget.first + incumbent
        start[:] = 0.0
        start[chosen] = 1.0
        loss = abs(float(budget.loss[chosen].sum()))
        unit = max(loss, 1e-3 * largest) / MAGNITUDE
    builder = Builder()
    binaries = builder.variables(
        n_levels,
        0,
        1,
        objective=budget.loss / unit,
        integer=True,
        start=start,
    )
    matrix, constant = linearise(builder, binaries, levels, budget.costs, start=start)
    matrix = csr_array(matrix / budget.scale[:, None])
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    limit, item = np.nonzero(budget.one_off)
    item_variables = _one_off_variables(builder, binaries, budget, incumbent)
    entries = (
        np.concatenate([row, limit]),
        np.concatenate([matrix.indices, item_variables[item]]),
        np.concatenate([matrix.data, budget.one_off[limit, item] / budget.scale[limit]]),
    )
    available = (budget.bound - budget.constant - constant) / budget.scale
    limit_rows = builder.rows(matrix.shape[0], entries, upper=available)
    bounded_row = np.zeros(0, np.int64)
    if len(budget.bounded):
        shares = (np.zeros(n_levels, np.int64), binaries, budget.bounded / budget.most)
        bounded_row = builder.rows(1, shares, upper=1.0)
    program = builder.build()
    if len(limit_rows) and not len(budget.bounded):
        # The tie-break rewards the mean share of the limits in use.
        use = np.bincount(matrix.indices, matrix.data, minlength=program.n_variables)
        constant_use = float(budget.share(constant + budget.constant).mean())
        program = replace(
            program,
            objective=program.objective - TIE_BREAK * MAGNITUDE * (use / matrix.shape[0]),
            offset=-TIE_BREAK * MAGNITUDE * constant_use,
        )
    return _Formulation(with_thresholds(program, levels), limit_rows, bounded_row, unit)


def _one_off_variables(
    builder: Builder,
    binaries: Ints,
    budget: _Budget,
    incumbent: Ints | None,
) -> Ints:
    """Variables of the one-off items (items,): at least 1 if a member group is pruned; -1 for items without a limit."""
    items = budget.ledger.one_off
    top = budget.first + budget.widest
    result = np.full(len(items.members), -1, np.int64)
    used = np.flatnonzero(budget.one_off.any(axis=0))
    if not len(used):
        return result
    start: float | Floats = np.nan
    if incumbent is not None:
        start = np.asarray(items.incurred(budget.widths(incumbent))[used], np.float64)
    can_be_whole = budget.levels.width[top] >= items.full
    members = items.members[used]
    # A group whose widest candidate is narrower than the full width incurs its items in any case.
    always = (members & ~can_be_whole).any(axis=1)
    result[used] = builder.variables(len(used), always, 1, start=start)
    item, group = np.nonzero(members & can_be_whole)
    row = np.arange(len(item))
    columns = np.concatenate([result[used][item], binaries[top[group]]])
    builder.rows(len(item), (np.tile(row, 2), columns, 1.0), lower=1.0)
    return result


def _solve(
    budget: _Budget,
    formulation: _Formulation,
    incumbent: Ints | None,
    *,
    solver: str,
    limits: SolverLimits,
    notify: Notify | None,
) -> tuple[Solution, Ints | None]:
    """Solves the program until the limits hold in whole numbers.

    A solver meets rows only to its tolerance. If the counted cost exceeds a limit by that, the limit is tightened by
    twice the excess and the program is solved again. The bound of the first solve is the valid one.

    Returns:
        The last solution, and the best known level vector that meets all limits; None if there is none.
    """
    began = time.perf_counter()
    program = formulation.program
    solution = solve(program, limits, solver, notify)
    bound = solution.bound
    level = None
    for attempt in range(ATTEMPTS):
        if solution.values is None:
            break
        level = budget.level(solution.values)
        if budget.holds(level):
            break
        excess = np.maximum(budget.used(level) - 1, 0)
        excess_of_bounded = max(budget.bounded_share(level) - 1, 0.0)
        level = None
        if attempt + 1 < ATTEMPTS:
            upper = program.row_upper.copy()
            upper[formulation.limit_rows] -= 2 * excess + np.where(excess > 0, ROUNDING, 0)
            upper[formulation.bounded_row] -= 2 * excess_of_bounded
            program = replace(program, row_upper=upper)
            time_left = None
            if limits.time_s is not None:
                time_left = max(limits.time_s - (time.perf_counter() - began), 1.0)
            solution = solve(program, replace(limits, time_s=time_left), solver)
    if level is None and solution.termination is Termination.OPTIMAL:
        solution = replace(solution, termination=Termination.FEASIBLE, limit=Limit.NUMERIC)
    feasible = [candidate for candidate in (level, incumbent) if candidate is not None]
    best = min(feasible, key=lambda c: formulation.objective(budget, c), default=None)
    return replace(solution, bound=bound), best


def _greedy(budget: _Budget) -> Ints | None:
    """Finds a level vector that meets all limits, by narrowing groups from the widest levels on.

    Each step is the one of least loss per share of the exceeded limits.

    Returns:
        The level vector, or None if no group can be narrowed to any effect.
    """
    levels = budget.levels
    first = budget.first
    level = budget.widest.copy()
    while not budget.holds(level):
        is_exceeded = budget.used(level) > 1
        # Only the bound on the loss is exceeded, and narrower groups lose more.
        if not is_exceeded.any():
            return None
        slope = (is_exceeded / budget.scale) @ budget.costs.gradient(budget.widths(level))
        current = (first + level)[levels.group]
        gain = slope[levels.group] * (levels.width[current] - levels.width)
        loss = budget.loss - budget.loss[current]
        possible = np.flatnonzero((np.arange(len(gain)) < current) & (gain > 0))
        if not len(possible):
            return None
        best = possible[np.argmin(loss[possible] / gain[possible])]
        level[levels.group[best]] = best - first[levels.group[best]]
    return _polish(budget, level)


def _polish(budget: _Budget, level: Ints) -> Ints:
    """Widens single groups as long as the loss does not grow and all limits hold, the largest gain first."""
    levels = budget.levels
    first = budget.first
    level = level.copy()
    refused = np.zeros(len(levels.group), bool)
    while True:
        current = (first + level)[levels.group]
        change = budget.loss - budget.loss[current]
        possible = np.flatnonzero((np.arange(len(change)) > current) & (change <= 0) & ~refused)
        if not len(possible):
            return level
        best = possible[np.lexsort((-levels.width[possible], change[possible]))[0]]
        wider = level.copy()
        wider[levels.group[best]] = best - first[levels.group[best]]
        if budget.holds(wider):
            level = wider
        else:
            refused[best] = True


def _loss_not_met(budget: _Budget) -> str:
    """Message for limits that no widths within the bound on the loss meet."""
    others = " and ".join(f"`{name}`" for name in budget.names) or "the threshold"
    return (
        f"no widths with a summed loss of at most {budget.most:.3g} meet {others}; ask for a larger loss or a larger "
        "budget."
    )


def _not_met(budget: _Budget, used: Floats) -> str:
    """Message for limits that even the narrowest widths exceed."""
    shares = zip(budget.names, used, strict=True)
    exceeded = [f"{name} ({share:.2f} times its limit)" for name, share in shares if share > 1]
    return f"with every group at its narrowest width the model is still over {' and '.join(exceeded)}; ask for more."
