"""The budget program: how wide every group stays, as one mixed-integer linear program.

Every group has a ladder of widths with a measured loss each. The program takes one width a group so that the losses
sum to the least while every limit (MACs, parameters, bytes, latency, ...) holds. Costs are products of axis lengths;
``programs.products`` linearises them exactly. What the solver returns is counted again in whole numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Floats, Ints
from onnx_oamip.graph.cost import Ledger, Products
from onnx_oamip.programs import Builder, Program
from onnx_oamip.programs.products import (
    Levels,
    Polynomials,
    linearise,
    reduce_costs,
    with_thresholds,
)
from onnx_oamip.programs.solvers import (
    Limit,
    Notify,
    Solution,
    SolverLimits,
    Termination,
    relative_gap,
    solve,
)

SOLVER_LIMITS = SolverLimits(time_s=60.0, gap=1e-3)
TIE_BREAK = 1e-6
"""Weight of the budget's use, relative to the loss: among equal losses, the wider plan."""
MAGNITUDE = 1e3
"""The program's objective at the start: large enough for the tie-break to stand above solvers' absolute tolerances."""
BINDING = 0.995
"""A limit binds where this share of it is used."""
ROUNDING = 1e-9
"""Relative error allowed in sums of measured (not counted) costs."""
ATTEMPTS = 5
"""Solves, each with limits narrowed by what the last one's tolerance let through."""


class Targets(Protocol):
    """Absolute limits on counted costs; None where there is none."""

    @property
    def macs(self) -> float | None: ...
    @property
    def params(self) -> float | None: ...
    @property
    def bytes(self) -> float | None: ...


@dataclass(frozen=True)
class Ladder:
    """For every group the widths it may take, ascending, and the loss when only this group has that width.

    The last width is the widest that is allowed, as a rule the full one with a loss of 0.
    """

    widths: tuple[Ints, ...]
    cost: tuple[Floats, ...]

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.cost):
            raise ValueError(
                f"{len(self.widths)} groups have widths, {len(self.cost)} have losses."
            )
        for g, (widths, cost) in enumerate(zip(self.widths, self.cost, strict=True)):
            if len(widths) == 0 or widths[0] < 1 or (np.diff(widths) <= 0).any():
                raise ValueError(
                    f"group {g} has the widths {widths.tolist()}, expected positive and ascending."
                )
            if cost.shape != widths.shape or not np.isfinite(cost).all():
                raise ValueError(
                    f"group {g} has the losses {cost.tolist()}, expected {len(widths)} finite numbers."
                )


@dataclass(frozen=True)
class LinearisedLimit:
    """A measured cost: ``constant`` plus ``products`` over the ledger's axes must not exceed ``limit``.

    The unit is the caller's (seconds for a latency); factors may be any non-negative numbers.
    """

    name: str
    products: Products
    constant: float
    limit: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.constant) and math.isfinite(self.limit)):
            raise ValueError(
                f"the limit '{self.name}' is {self.limit} with the constant {self.constant}, not finite."
            )


@dataclass(frozen=True)
class Choice:
    """The widths taken, and what the solver said, ready for the report's ``programs``."""

    widths: Ints
    program: Mapping[str, Any]


def choose(
    ledger: Ledger,
    ladder: Ladder,
    limits: Targets,
    extra: Sequence[LinearisedLimit] = (),
    solver: str = "auto",
    solver_limits: SolverLimits = SOLVER_LIMITS,
    notify: Notify | None = None,
) -> Choice:
    """The widths of least total loss under all limits at once.

    The limits hold exactly, in whole numbers. A time limit leaves the best plan found with its gap. Raises
    BudgetNotMet, naming the limits, where even the narrowest widths are over one, and SolverError as ``solvers.solve``.
    """
    began = time.perf_counter()
    budget = _Budget.of(ledger, ladder, limits, extra)
    incumbent = _greedy(budget)
    floor = budget.used(budget.widest * 0)
    if incumbent is None and not extra and not budget.steps.any():
        raise BudgetNotMet(_over(budget, floor))
    formulation = _formulate(budget, incumbent)
    program = formulation.program
    solution, level = _solve(budget, formulation, incumbent, solver, solver_limits, notify)
    if level is None:
        if solution.termination is Termination.INFEASIBLE:
            raise BudgetNotMet(_over(budget, floor))
        raise BudgetNotMet(
            f"the solver found no widths within {solution.seconds:.0f} s and its other limits; give it more time, or "
            "ask for more."
        )
    level = _polish(budget, level)
    used = budget.used(level)
    objective = formulation.objective(budget, level)
    gap = (
        None if solution.bound is None else relative_gap(objective, min(solution.bound, objective))
    )
    status = solution.termination if solution.has_values else Termination.FEASIBLE
    record = {
        "purpose": "budget",
        "solver": solution.solver,
        "reason": solution.reason,
        "status": status.value,
        "limit": solution.limit.value if solution.limit else None,
        "gap": gap,
        "seconds": time.perf_counter() - began,
        "variables": program.n_variables,
        "rows": program.n_rows,
        "objective": float(budget.loss[budget.first + level].sum()),
        "binding": [
            name for name, share in zip(budget.names, used, strict=True) if share >= BINDING
        ],
        "used": {name: float(share) for name, share in zip(budget.names, used, strict=True)},
    }
    return Choice(budget.widths(level), record)


@dataclass(frozen=True, eq=False)
class _Budget:
    """Levels, losses and limits. A level vector (groups,) counts from 0, the narrowest.

    ``costs`` plus ``constant`` must not exceed ``bound``; the first ``counted`` of them are whole numbers. ``sums`` are
    the same costs as products of axis lengths, for exact counting; ``steps`` (costs, steps) is what the ledger's steps
    add to them.
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
    steps: Ints

    @classmethod
    def of(
        cls, ledger: Ledger, ladder: Ladder, limits: Targets, extra: Sequence[LinearisedLimit]
    ) -> _Budget:
        sizes = np.asarray([len(w) for w in ladder.widths], np.int64)
        groups = ledger.per_unit.shape[1]
        if len(sizes) != groups:
            raise ValueError(f"the ladder has {len(sizes)} groups, the model {groups}.")
        levels = Levels(
            np.repeat(np.arange(groups), sizes),
            np.concatenate([np.zeros(0, np.int64), *ladder.widths]),
        )
        names: list[str] = []
        sums: list[tuple[Ints | Floats, Ints]] = []
        constant: list[float] = []
        bound: list[float] = []
        # Whole numbers: `sum // batch <= limit` is `sum < batch * (floor(limit) + 1)`.
        asked: list[tuple[str, float | None, Products, int, int]] = [
            ("macs", limits.macs, ledger.macs, ledger.batch, 0),
            ("params", limits.params, ledger.params, 1, 0),
            ("size", limits.bytes, ledger.bytes, 1, ledger.overhead),
        ]
        for name, limit, products, unit, held in asked:
            if limit is not None:
                names.append(name)
                sums.append((products.factor, products.axes))
                constant.append(float(held))
                bound.append(float(unit * (math.floor(limit) + 1) - 1))
        counted = len(names)
        for line in extra:
            names.append(line.name)
            sums.append((line.products.factor, line.products.axes))
            constant.append(line.constant)
            bound.append(line.limit)
        added = {"params": ledger.one_off.params, "size": ledger.one_off.bytes}
        return cls(
            names=tuple(names),
            levels=levels,
            loss=np.concatenate([np.zeros(0), *ladder.cost]),
            first=np.cumsum(sizes) - sizes,
            widest=sizes - 1,
            costs=reduce_costs(
                ledger.fixed, ledger.per_unit, [(np.asarray(f, np.float64), a) for f, a in sums]
            ),
            constant=np.asarray(constant, np.float64),
            bound=np.asarray(bound, np.float64),
            ledger=ledger,
            sums=tuple(sums),
            counted=counted,
            steps=np.reshape(
                [added.get(n, 0 * added["size"]) for n in names], (len(names), len(added["size"]))
            ),
        )

    @property
    def scale(self) -> Floats:
        """What a use is divided by to be a share of its limit."""
        return np.maximum(np.abs(self.bound), 1e-12)

    def widths(self, level: Ints) -> Ints:
        """Width of every group."""
        result: Ints = self.levels.width[self.first + level]
        return result

    def level(self, values: Floats) -> Ints:
        """Level of every group from the program's values: how many of its thresholds are passed."""
        rungs = np.repeat(np.arange(len(self.widest)), self.widest)
        passed: Ints = np.bincount(
            rungs[values[: len(rungs)] > 0.5], minlength=len(self.widest)
        ).astype(np.int64)
        return passed

    def used(self, level: Ints) -> Floats:
        """Share of every limit in use, from exact sums."""
        widths = self.widths(level)
        lengths = self.ledger.lengths(widths)
        total = [float((factor * lengths[axes].prod(axis=1)).sum()) for factor, axes in self.sums]
        return self.share(
            np.asarray(total) + self.constant + self.steps @ self.ledger.one_off.incurred(widths)
        )

    def share(self, total: Floats) -> Floats:
        """Costs over limits, written so that the share is at most 1 exactly where the limit holds."""
        result: Floats = 1.0 + (total - self.bound) / self.scale
        return result

    def holds(self, level: Ints) -> bool:
        """Every limit is met: counted ones exactly, measured ones up to rounding."""
        used = self.used(level)
        return bool(
            (used[: self.counted] <= 1).all() and (used[self.counted :] <= 1 + ROUNDING).all()
        )


@dataclass(frozen=True, eq=False)
class _Formulation:
    """The program, the rows that are limits, and what its objective was divided by."""

    program: Program
    limit_rows: Ints
    unit: float

    def objective(self, budget: _Budget, level: Ints) -> float:
        """The program's objective at a choice of levels."""
        loss = float(budget.loss[budget.first + level].sum()) / self.unit
        return (
            loss - TIE_BREAK * MAGNITUDE * float(budget.used(level).mean())
            if len(budget.names)
            else loss
        )


def _formulate(budget: _Budget, incumbent: Ints | None) -> _Formulation:
    """One binary a level, one row a limit, the products' rows; then all of it in thresholds."""
    levels = budget.levels
    start = np.full(len(levels.group), np.nan)
    largest = float(np.abs(budget.loss).max(initial=0.0)) or 1.0
    unit = largest / MAGNITUDE
    if incumbent is not None:
        start[:] = 0.0
        start[budget.first + incumbent] = 1.0
        unit = (
            max(abs(float(budget.loss[budget.first + incumbent].sum())), 1e-3 * largest) / MAGNITUDE
        )
    builder = Builder()
    binaries = builder.variables(
        len(levels.group), 0, 1, objective=budget.loss / unit, integer=True, start=start
    )
    matrix, constant = linearise(builder, binaries, levels, budget.costs, start=start)
    matrix = csr_array(matrix / budget.scale[:, None])
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    room = (budget.bound - budget.constant - constant) / budget.scale
    limit, step = np.nonzero(budget.steps)
    taken = _steps(builder, binaries, budget, incumbent)
    entries = (
        np.concatenate([row, limit]),
        np.concatenate([matrix.indices, taken[step]]),
        np.concatenate([matrix.data, budget.steps[limit, step] / budget.scale[limit]]),
    )
    limit_rows = builder.rows(matrix.shape[0], entries, upper=room)
    program = builder.build()
    if not len(limit_rows):
        return _Formulation(with_thresholds(program, levels), limit_rows, unit)
    use = np.bincount(matrix.indices, matrix.data, minlength=program.n_variables) / matrix.shape[0]
    program = replace(
        program,
        objective=program.objective - TIE_BREAK * MAGNITUDE * use,
        offset=-TIE_BREAK * MAGNITUDE * float(budget.share(constant + budget.constant).mean()),
    )
    return _Formulation(with_thresholds(program, levels), limit_rows, unit)


def _steps(builder: Builder, binaries: Ints, budget: _Budget, incumbent: Ints | None) -> Ints:
    """A variable for every step of a limit: at least 1 where a member is not at its full width (-1: for no limit)."""
    steps, levels = budget.ledger.one_off, budget.levels
    used, top = np.flatnonzero(budget.steps.any(axis=0)), budget.first + budget.widest
    result = np.full(len(steps.members), -1, np.int64)
    if not len(used):
        return result
    whole = levels.width[top] >= steps.full
    start = np.nan if incumbent is None else steps.incurred(budget.widths(incumbent))[used]
    sure = (steps.members[used] & ~whole).any(axis=1)
    result[used] = builder.variables(len(used), sure, 1, start=start)
    step, group = np.nonzero(steps.members[used] & whole)
    row = np.arange(len(step))
    entries = (np.tile(row, 2), np.concatenate([result[used][step], binaries[top[group]]]), 1.0)
    builder.rows(len(step), entries, lower=1.0)
    return result


def _solve(
    budget: _Budget,
    formulation: _Formulation,
    incumbent: Ints | None,
    solver: str,
    limits: SolverLimits,
    notify: Notify | None,
) -> tuple[Solution, Ints | None]:
    """The last solution, and the best levels known that hold in whole numbers (None: there are none).

    A solver meets rows only to its tolerance. Where the counted cost is over a limit by that, the limit is narrowed by
    twice the excess and the program solved again; the bound of the first solve stays the valid one.
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
        over = np.maximum(budget.used(level) - 1, 0)
        level = None
        if attempt + 1 < ATTEMPTS:
            upper = program.row_upper.copy()
            upper[formulation.limit_rows] -= 2 * over + np.where(over > 0, ROUNDING, 0)
            program = replace(program, row_upper=upper)
            left = (
                None
                if limits.time_s is None
                else max(limits.time_s - (time.perf_counter() - began), 1.0)
            )
            solution = solve(program, replace(limits, time_s=left), solver)
    if level is None and solution.termination is Termination.OPTIMAL:
        solution = replace(solution, termination=Termination.FEASIBLE, limit=Limit.NUMERIC)
    known = [c for c in (level, incumbent) if c is not None]
    best = min(known, key=lambda c: formulation.objective(budget, c), default=None)
    return replace(solution, bound=bound), best


def _greedy(budget: _Budget) -> Ints | None:
    """Levels that hold, from the widest down, by the least loss per share of a limit gained; None if stuck."""
    levels, first = budget.levels, budget.first
    level = budget.widest.copy()
    while not budget.holds(level):
        over = np.maximum(budget.used(level) - 1, 0)
        slope = ((over > 0) / budget.scale) @ budget.costs.gradient(budget.widths(level))
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
    """Widen single groups where that costs no loss and still holds, the largest gain first."""
    levels, first = budget.levels, budget.first
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


def _over(budget: _Budget, used: Floats) -> str:
    """The sentence for limits that the narrowest widths are over: costs only fall with the width, so nothing holds."""
    shares = zip(budget.names, used, strict=True)
    over = [f"{name} ({share:.2f} times its limit)" for name, share in shares if share > 1]
    return f"with every group at its narrowest width the model is still over {' and '.join(over)}; ask for more."
