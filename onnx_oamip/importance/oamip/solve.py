"""Solve an importance program to a gap: tangent cuts and lazy rows first on the relaxation, then with whole variables.

Feasible points are made on the way (a line search towards the relaxation's solution; whole keep variables rounded from
it and the network evaluated at them), so that there is an incumbent with its true objective from the first round on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.errors import SolverError
from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.importance.oamip.formulation import Formulation
from onnx_oamip.programs import (
    ACCEPTED,
    Expression,
    Program,
    Rows,
    Separation,
)
from onnx_oamip.programs.solvers import (
    CutSolution,
    Limits,
    Termination,
    relative_gap,
    solve,
    solve_with_cuts,
)

LEAST = 1e-6
"""Absolute gap that is always good enough."""
ROUNDS = 200
SHARE = 0.25
"""Share of the gap that is left to tangent planes not added; and of the time that bounds may take to tighten."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """``keep`` (keep variables,) of the best point, its true ``objective``, a ``bound``, and the program's record.

    ``values`` are those of all variables there; ``notices`` say which solver was passed over.
    """

    keep: Floats
    values: Floats
    objective: float
    bound: float
    gap: float
    record: dict[str, Any]
    notices: tuple[str, ...]


def optimise(
    formulation: Formulation, limits: Limits, solver: str, guess: Floats | None = None
) -> Outcome:
    """The best keep variables within ``limits.gap`` of the optimum, or the best found in ``limits.time_s``.

    ``guess`` (keep variables,) orders the units by a cheap score: under a budget the first of them are a first point.
    Raises SolverError where the solver cannot take the program, or where nothing was found in time.
    """
    began = time.perf_counter()
    base = formulation.program
    notices: list[str] = []
    separation = Separation(
        base, formulation.loss, formulation.pending, SHARE * max(limits.gap, LEAST)
    )
    search = _Search(formulation, separation)
    search.offer(np.ones(len(formulation.units)))
    if guess is not None and formulation.reward.share_cost is not None:
        search.offer(search.rounded(guess))
    program = search.with_tangents(base)
    rounds = cuts = 0
    bound = -np.inf

    def enough(found: float) -> bool:
        best = separation.best.objective
        return best - found <= max(limits.gap * abs(best), LEAST)

    def left() -> Limits:
        if limits.time_s is None:
            return limits
        return replace(limits, time_s=max(limits.time_s - (time.perf_counter() - began), 0.01))

    whole = base.integer.any()
    end: CutSolution | None = None
    if whole:
        relaxed = replace(program, integer=np.zeros(base.n_variables, bool), start=None)
        half = left() if limits.time_s is None else replace(left(), time_s=limits.time_s / 2)
        end = solve_with_cuts(
            relaxed, half, search.relaxation, solver, notices.append, ROUNDS, enough
        )
        bound = end.solution.bound if end.solution.bound is not None else bound
        rounds, cuts = end.rounds, end.cuts
        program = replace(end.program, integer=base.integer)
        if not enough(bound) and end.solution.values is not None:
            search.descend(
                end.solution.values, None if limits.time_s is None else SHARE / 2 * limits.time_s
            )
    if not whole or not enough(bound):
        start = separation.best.values
        if start is not None and whole:
            program = replace(program, start=start)
        # Rounds share the gap with the solver: a bound closer than it can be reached.
        near = replace(left(), gap=limits.gap / 2)
        end = solve_with_cuts(
            program, near, search.solution, solver, notices.append, ROUNDS, enough
        )
        rounds, cuts = rounds + end.rounds, cuts + end.cuts
        if end.solution.bound is not None:
            bound = max(bound, end.solution.bound)
        if end.solution.termination is Termination.INFEASIBLE:
            raise SolverError("the importance program has no solution; widen `score_budget`.")
    assert end is not None
    best = separation.best
    if best.values is None:
        raise SolverError("the importance program has no solution yet; give it more `time_limit`.")
    bound = min(bound, best.objective)
    gap = relative_gap(best.objective, bound) if np.isfinite(bound) else np.inf
    record = {
        "purpose": "importance",
        "solver": end.solution.solver,
        "status": (Termination.OPTIMAL if enough(bound) else Termination.FEASIBLE).value,
        "limit": None if enough(bound) or end.solution.limit is None else end.solution.limit.value,
        "gap": gap,
        "objective": best.objective,
        "bound": bound,
        "seconds": time.perf_counter() - began,
        "variables": base.n_variables,
        "integers": int(base.integer.sum()),
        "rows": end.program.n_rows,
        "rounds": rounds,
        "cuts": cuts,
        "largest_bound": formulation.encoder.largest,
        "reason": end.solution.reason,
    }
    keep = np.clip(best.values[formulation.encoder.keep], 0.0, 1.0)
    return Outcome(keep, best.values, best.objective, bound, gap, record, tuple(notices[:1]))


class _Search:
    """What happens between rounds: cuts, and feasible points."""

    def __init__(self, formulation: Formulation, separation: Separation) -> None:
        self.formulation = formulation
        self.separation = separation
        self.relaxed: Bools = formulation.program.integer
        self.tried: set[bytes] = set()

    def offer(self, keep: Floats) -> Floats | None:
        """The network at given keep variables, as an incumbent where it satisfies every row."""
        key = keep.tobytes()
        if key in self.tried:
            return None
        self.tried.add(key)
        values = self.formulation.complete(keep)
        point, _ = self.separation.truth(values)
        if (
            max(self.formulation.program.violation(point), self.separation.violated(point))
            > ACCEPTED
        ):
            return None
        self.separation.offer(point)
        return point

    def with_tangents(self, program: Program) -> Program:
        """The program with a first plane an image, at the incumbent or at equal logits."""
        loss = self.separation.loss
        count = len(loss.label)
        best = self.separation.best.values
        at = (
            loss.outputs(best) if best is not None else np.zeros((count, loss.logits.rows // count))
        )
        return program.with_rows(loss.tangents(at, np.arange(count), program.n_variables))

    def relaxation(self, values: Floats) -> Rows | None:
        """Cuts at a solution of the relaxation; a point of whole keep variables nearby is tried as well."""
        if self.formulation.program.integer[self.formulation.encoder.keep].all():
            self.offer(self.rounded(values[self.formulation.encoder.keep]))
        else:
            self.offer(np.clip(values[self.formulation.encoder.keep], 0, 1))
        return self.separation.cuts(values, self.relaxed)

    def solution(self, values: Floats) -> Rows | None:
        """Cuts at a solution."""
        return self.separation.cuts(values)

    def descend(self, values: Floats, seconds: float | None) -> None:
        """Improve an incumbent of whole keep variables by dropping or taking back units, many at once at first.

        Units go in the order of a relaxation's ``values``. One try costs an evaluation of the network.
        """
        place = self.formulation.encoder.keep
        best = self.separation.best
        if best.values is None or not self.formulation.program.integer[place].all():
            return
        began = time.perf_counter()
        order = np.argsort(values[place], kind="stable")
        current = np.round(best.values[place])
        size = max(len(place) // 4, 1)
        while size:
            improved = False
            for drop in (True, False):
                chosen = order[current[order] == drop]
                for part in np.array_split(
                    chosen if drop else chosen[::-1], -(-len(chosen) // size) or 1
                ):
                    if seconds is not None and time.perf_counter() - began > seconds:
                        return
                    trial = current.copy()
                    trial[part] = not drop
                    before = self.separation.best.objective
                    self.offer(trial)
                    if self.separation.best.objective < before - LEAST:
                        current, improved = trial, True
            if not improved:
                size //= 2

    def rounded(self, keep: Floats) -> Floats:
        """Whole keep variables near ``keep``; under a budget the largest that fit."""
        share = self.formulation.reward.share_cost
        if share is None:
            return np.round(keep)
        cost, most = share
        order = np.argsort(-keep, kind="stable")
        result = np.zeros(len(keep))
        result[order] = np.cumsum(cost[order]) <= most
        return result


def tightener(limits: Limits, solver: str, seconds: float) -> Any:
    """Bounds of rows by linear programs, one a row and side, until ``seconds`` are spent (OBBT).

    Both bounds of a row come from the relaxation of the program as far as it is stated; those that time did not reach
    keep their intervals. The widest rows go first.
    """
    spent = 0.0

    def tighten(program: Program, rows: Expression) -> tuple[Floats, Floats]:
        nonlocal spent
        lower, upper = rows.lower.copy(), rows.upper.copy()
        if not program.n_rows:  # over a box alone the interval is exact already
            return lower, upper
        relaxed = replace(program, integer=np.zeros(program.n_variables, bool), start=None)
        for i in np.argsort(-np.minimum(upper, -lower), kind="stable"):
            began = time.perf_counter()
            if spent > seconds:
                break
            row = csr_array(rows.matrix[[i]])
            unit = (
                float(np.abs(row.data).max(initial=0.0)) or 1.0
            )  # solvers' tolerances are absolute
            objective = np.zeros(program.n_variables)
            objective[row.indices] = row.data / unit
            for sign, side in ((1.0, lower), (-1.0, upper)):
                at = replace(
                    relaxed, objective=sign * objective, offset=sign * rows.constant[i] / unit
                )
                found = solve(at, replace(limits, time_s=1.0), solver)
                if found.termination is Termination.OPTIMAL and found.bound is not None:
                    # The solver's own tolerance must not cut a point off.
                    value = sign * (found.bound - 1e-6 * (1 + abs(found.bound))) * unit
                    side[i] = max(side[i], value) if sign > 0 else min(side[i], value)
            spent += time.perf_counter() - began
        return np.minimum(lower, upper), np.maximum(lower, upper)

    return tighten
