"""Solution of an importance program by outer approximation, first of its relaxation, then with integer variables.

Feasible points are made on the way: by a line search towards the solution of the relaxation, and by evaluating the
network at keep variables that are rounded from it. So there is an incumbent with its true objective from the first
round on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.errors import SolverError
from onnx_oamip.core.records import Floats, Ints
from onnx_oamip.importance.oamip.formulation import Formulation
from onnx_oamip.programs import (
    ACCEPTED,
    Expression,
    Interval,
    Program,
    Rows,
    Separation,
)
from onnx_oamip.programs.program_files import first_point_record
from onnx_oamip.programs.solvers import (
    CutSolution,
    Separate,
    SolverLimits,
    Termination,
    relative_gap,
    solve,
    solve_with_cuts,
)

ABSOLUTE_GAP = 1e-6
"""Absolute gap that always ends a solve."""
MAX_ROUNDS = 200
"""Rounds of cuts for the relaxation, and again for the program."""
TANGENT_GAP_SHARE = 0.25
"""Share of the gap that tangent planes which are not added may account for."""
TIGHTENING_TIME_SHARE = 0.25
"""Share of the time limit in which bounds are tightened."""
DESCENT_TIME_SHARE = 0.125
"""Share of the time limit in which the incumbent is improved by evaluations of the network."""
ROW_TIME_LIMIT = 1.0
"""Seconds for the linear program of one bound."""
SOLVER_TOLERANCE = 1e-6
"""Relative error of a solver's bound."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Solution of an importance program.

    Attributes:
        keep: Keep variables of the best point (keep variables,), in [0, 1].
        values: All variables of the best point (variables,).
        program: The program with all cuts that were added.
        objective: True objective of the best point.
        bound: Proved lower bound of the objective, -inf if there is none.
        gap: Relative distance of the objective and the bound.
        record: Record of the program for reports.
        notices: At most one message, about a solver that was passed over.
    """

    keep: Floats
    values: Floats
    program: Program
    objective: float
    bound: float
    gap: float
    record: dict[str, Any]
    notices: tuple[str, ...]


def optimise(
    formulation: Formulation,
    limits: SolverLimits,
    solver: str,
    guess: Floats | None = None,
    *,
    proposed: Floats | None = None,
) -> Outcome:
    """Solve an importance program to a gap, or as far as the time limit allows.

    Args:
        formulation: Program to solve.
        limits: Relative gap, time limit in seconds and seed.
        solver: Name of a backend, or ``auto``.
        guess: Cheap score of each keep variable (keep variables,). Under a budget, the units of highest score that fit
            are a first point.
        proposed: Keep variables of a solution from elsewhere (keep variables,), another first point.

    Returns:
        The best point with its bound.

    Raises:
        SolverError: The solver refuses the program, the budget cannot be met, or no point was found in time.
    """
    run = _Optimisation(formulation, limits, solver)
    run.add_first_points(guess, proposed)
    program = run.search.with_tangents(formulation.program)
    if formulation.program.integer.any():
        program = run.solve_relaxation(program, guess)
        if not run.is_enough(run.bound):
            if run.separation.best.values is not None:
                program = replace(program, start=run.separation.best.values)
            run.solve_program(program)
    else:
        run.solve_program(program)
    return run.outcome()


class _Optimisation:
    """State of one solve: bound, incumbent, rounds and time."""

    def __init__(
        self,
        formulation: Formulation,
        limits: SolverLimits,
        solver: str,
    ) -> None:
        self.formulation = formulation
        self.limits = limits
        self.solver = solver
        self.began = time.perf_counter()
        self.separation = Separation(
            formulation.program,
            formulation.loss,
            formulation.pending,
            accuracy=TANGENT_GAP_SHARE * max(limits.gap, ABSOLUTE_GAP),
        )
        self.search = _Search(formulation, self.separation)
        self.bound = -np.inf
        self.rounds = 0
        self.cuts = 0
        self.notices: list[str] = []
        self.first_point: dict[str, Any] = {}
        self.last: CutSolution | None = None

    def add_first_points(self, guess: Floats | None, proposed: Floats | None) -> None:
        """Offer the point that keeps all units, under a budget the one of the guess, and the one that is proposed."""
        self.search.offer(np.ones(len(self.formulation.units)))
        if guess is not None and self.formulation.sparsity.budget is not None:
            self.search.offer(self.search.rounded(guess))
        if proposed is not None:
            before = self.separation.best.objective
            keep = np.round(proposed) if self.search.binary_keep else proposed
            self.search.offer(np.clip(keep, 0.0, 1.0))
            taken = self.separation.best.objective < before
            self.first_point = first_point_record(1, int(taken))

    def is_enough(self, bound: float) -> bool:
        """True if the incumbent is within the gap of a bound."""
        best = self.separation.best.objective
        return best - bound <= max(self.limits.gap * abs(best), ABSOLUTE_GAP)

    def solve_relaxation(self, program: Program, guess: Floats | None) -> Program:
        """Solve the relaxation in half of the time; returns the program with its cuts.

        Units are then tried in the order of its solution, or in that of the guess if there is no solution in time.
        """
        integer = self.formulation.program.integer
        relaxed = replace(program, integer=np.zeros(program.n_variables, bool), start=None)
        time_s = self.limits.time_s
        half = None if time_s is None else time_s / 2
        end = self._cut(relaxed, replace(self.limits, time_s=half), self.search.relaxation_cuts)
        if end.solution.values is None:
            order = guess
        else:
            order = end.solution.values[self.search.keep]
        if not self.is_enough(self.bound) and order is not None:
            if time_s is None:
                seconds = None
            else:
                seconds = DESCENT_TIME_SHARE * time_s
            self.search.descend(order, seconds)
        return replace(end.program, integer=integer)

    def solve_program(self, program: Program) -> None:
        """Solve the program itself in the remaining time."""
        # The rounds share the gap with the solver: a bound closer than half of it can then be reached.
        limits = replace(self._remaining(), gap=self.limits.gap / 2)
        end = self._cut(program, limits, self.search.cuts)
        if end.solution.termination is Termination.INFEASIBLE:
            raise SolverError("the importance program has no solution; widen `score_budget`.")

    def _cut(
        self,
        program: Program,
        limits: SolverLimits,
        separate: Separate,
    ) -> CutSolution:
        end = solve_with_cuts(
            program,
            limits,
            separate,
            self.solver,
            notify=self.notices.append,
            max_rounds=MAX_ROUNDS,
            is_enough=self.is_enough,
        )
        self.rounds += end.rounds
        self.cuts += end.cuts
        if end.solution.bound is not None:
            self.bound = max(self.bound, end.solution.bound)
        self.last = end
        return end

    def _remaining(self) -> SolverLimits:
        if self.limits.time_s is None:
            return self.limits
        elapsed = time.perf_counter() - self.began
        return replace(self.limits, time_s=max(self.limits.time_s - elapsed, 0.01))

    def outcome(self) -> Outcome:
        """The incumbent with the bound, checked against each other."""
        assert self.last is not None
        best = self.separation.best
        if best.values is None:
            raise SolverError(
                "the importance program has no solution yet; give it more `time_limit`."
            )
        bound = min(self.bound, best.objective)
        if np.isfinite(bound):
            gap = relative_gap(best.objective, bound)
        else:
            gap = np.inf
        keep = np.clip(best.values[self.formulation.encoder.keep], 0.0, 1.0)
        return Outcome(
            keep=keep,
            values=best.values,
            program=replace(
                self.last.program, integer=self.formulation.program.integer, start=None
            ),
            objective=best.objective,
            bound=bound,
            gap=gap,
            record=self._record(self.last, bound, gap),
            notices=tuple(self.notices[:1]),
        )

    def _record(
        self,
        last: CutSolution,
        bound: float,
        gap: float,
    ) -> dict[str, Any]:
        program = self.formulation.program
        proved = self.is_enough(bound)
        if proved:
            status = Termination.OPTIMAL
        else:
            status = Termination.FEASIBLE
        limit = None if proved else last.solution.limit
        return {
            "purpose": "importance",
            "solver": last.solution.solver,
            "status": status.value,
            "limit": None if limit is None else limit.value,
            "gap": gap,
            "objective": self.separation.best.objective,
            "bound": bound,
            "seconds": time.perf_counter() - self.began,
            "variables": program.n_variables,
            "integers": int(program.integer.sum()),
            "rows": last.program.n_rows,
            "rounds": self.rounds,
            "cuts": self.cuts,
            "largest_bound": self.formulation.encoder.largest,
            "reason": last.solution.reason,
            **self.first_point,
        }


class _Search:
    """Work between two rounds: cuts, and feasible points."""

    def __init__(self, formulation: Formulation, separation: Separation) -> None:
        self.formulation = formulation
        self.separation = separation
        self.keep = formulation.encoder.keep
        self.binary_keep = bool(formulation.program.integer[self.keep].all())
        self.tried: set[bytes] = set()

    def offer(self, keep: Floats) -> None:
        """Evaluate the network at given keep variables; an incumbent if it satisfies every row."""
        key = keep.tobytes()
        if key in self.tried:
            return
        self.tried.add(key)
        values = self.formulation.complete(keep)
        point, _ = self.separation.on_loss(values)
        violations = (
            self.formulation.program.violation(point),
            self.separation.range_violation(point),
        )
        if max(violations) <= ACCEPTED:
            self.separation.offer(point)

    def with_tangents(self, program: Program) -> Program:
        """The program with one plane per sample, at the incumbent or at equal logits."""
        loss = self.separation.loss
        samples = len(loss.label)
        best = self.separation.best.values
        logits = loss.equal_logits()
        if best is not None:
            logits = loss.outputs(best)
        planes = loss.tangents(logits, np.arange(samples), program.n_variables)
        return program.with_rows(planes)

    def relaxation_cuts(self, values: Floats) -> Rows | None:
        """Cuts at a solution of the relaxation. A point with integer keep variables nearby is offered as well."""
        keep = values[self.keep]
        self.offer(self.rounded(keep) if self.binary_keep else np.clip(keep, 0, 1))
        return self.separation.cuts(values, self.formulation.program.integer)

    def cuts(self, values: Floats) -> Rows | None:
        """Cuts at a solution of the program."""
        return self.separation.cuts(values)

    def descend(self, priority: Floats, seconds: float | None) -> None:
        """Improve the incumbent by removing or taking back units, many at once at first.

        Units of low ``priority`` (keep variables,) are removed first, from all layers in proportion. Every try costs
        one evaluation of the network.
        """
        best = self.separation.best
        if best.values is None or not self.binary_keep:
            return
        if seconds is None:
            deadline = None
        else:
            deadline = time.perf_counter() + seconds
        order = self._by_layer(priority)
        current = np.round(best.values[self.keep])
        size = max(len(self.keep) // 4, 1)
        while size:
            improved = False
            for remove in (True, False):
                chosen = order[current[order] == remove]
                if not remove:
                    chosen = chosen[::-1]
                n_parts = -(-len(chosen) // size) or 1
                for part in np.array_split(chosen, n_parts):
                    if deadline is not None and time.perf_counter() > deadline:
                        return
                    trial = current.copy()
                    trial[part] = not remove
                    if self._improves(trial):
                        current = trial
                        improved = True
            if not improved:
                size //= 2

    def _by_layer(self, priority: Floats) -> Ints:
        """Keep variables in the order of their removal.

        The sparsity term leaves out the layer that is cut most, so that cutting it alone gains nothing: consecutive
        units are of all layers, in proportion to their sizes.
        """
        rank_share = np.argsort(np.argsort(priority, kind="stable")) / len(priority)
        for positions, _ in self.formulation.sparsity.layers:
            rank = np.argsort(np.argsort(priority[positions], kind="stable"))
            rank_share[positions] = rank / len(positions)
        result: Ints = np.argsort(rank_share, kind="stable")
        return result

    def _improves(self, keep: Floats) -> bool:
        """Offer keep variables; true if they lower the objective by more than the absolute gap."""
        before = self.separation.best.objective
        self.offer(keep)
        return self.separation.best.objective < before - ABSOLUTE_GAP

    def rounded(self, keep: Floats) -> Floats:
        """Integer keep variables near ``keep``; under a budget the largest ones that fit."""
        budget = self.formulation.sparsity.budget
        if budget is None:
            return np.round(keep)
        order = np.argsort(-keep, kind="stable")
        result = np.zeros(len(keep))
        result[order] = np.cumsum(budget.cost[order]) <= budget.limit
        return result


class BoundTightener:
    """Tightens the bounds of rows by linear programs (optimality-based bound tightening), within a time limit.

    Both bounds of a row come from the relaxation of the program as far as it has been stated. The widest rows are done
    first; rows that the time does not suffice for keep their intervals.
    """

    def __init__(
        self,
        limits: SolverLimits,
        solver: str,
        seconds: float,
    ) -> None:
        """Prepare without solving anything.

        Args:
            limits: Gap and seed of the linear programs.
            solver: Name of a backend, or ``auto``.
            seconds: Wall-clock time for all calls together.
        """
        self.limits = replace(limits, time_s=ROW_TIME_LIMIT)
        self.solver = solver
        self.seconds = seconds
        self.spent = 0.0

    def __call__(self, program: Program, rows: Expression) -> Interval:
        """Tighten the bounds of rows.

        Args:
            program: The program so far.
            rows: Expressions over its variables, with the bounds known so far.

        Returns:
            Lower and upper bound of every row, at least as tight as the given ones.
        """
        lower = rows.lower.copy()
        upper = rows.upper.copy()
        # Over a box alone the interval is exact already.
        if not program.n_rows:
            return Interval(lower, upper)
        relaxed = replace(program, integer=np.zeros(program.n_variables, bool), start=None)
        for i in np.argsort(-np.minimum(upper, -lower), kind="stable"):
            began = time.perf_counter()
            if self.spent > self.seconds:
                break
            least = self._minimum(relaxed, rows, i, sign=1.0)
            if least is not None:
                lower[i] = max(lower[i], least)
            greatest = self._minimum(relaxed, rows, i, sign=-1.0)
            if greatest is not None:
                upper[i] = min(upper[i], greatest)
            self.spent += time.perf_counter() - began
        return Interval(np.minimum(lower, upper), np.maximum(lower, upper))

    def _minimum(
        self,
        relaxed: Program,
        rows: Expression,
        i: int,
        sign: float,
    ) -> float | None:
        """Safe least (sign 1) or greatest (sign -1) value of a row, or None if the solver proves none."""
        row = csr_array(rows.matrix[[i]])
        # Tolerances of solvers are absolute: scale the largest coefficient to 1.
        unit = float(np.abs(row.data).max(initial=0.0)) or 1.0
        objective = np.zeros(relaxed.n_variables)
        objective[row.indices] = row.data / unit
        program = replace(
            relaxed, objective=sign * objective, offset=sign * rows.constant[i] / unit
        )
        solution = solve(program, self.limits, self.solver)
        if solution.termination is not Termination.OPTIMAL or solution.bound is None:
            return None
        # Back off by the solver's own tolerance, so that no feasible point is cut off.
        safe = solution.bound - SOLVER_TOLERANCE * (1 + abs(solution.bound))
        return sign * safe * unit
