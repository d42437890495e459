"""Words of a solver: the names of its parameters, and the meaning of its statuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx_oamip.core.errors import SolverError
from onnx_oamip.core.records import Floats
from onnx_oamip.programs import Program
from onnx_oamip.programs.solvers.spec import (
    Limit,
    Solution,
    SolverLimits,
    Termination,
    infeasible_or_unbounded,
    solution,
)

ABSOLUTE_GAP = 1e-9
"""Below the solvers' own, which would end the solve of a program with a small objective far from its optimum."""


@dataclass(frozen=True)
class Dialect:
    """Words of one solver. A parameter that it does not have is None.

    Attributes:
        name: Name in settings and reports.
        title: Name in messages.
        instead: Another solver to try if this one fails.
        ends: Meaning of the statuses of a solve that was not cut short.
        limits: Meaning of the statuses of a solve that was.
        unclear: Statuses that mean "infeasible or unbounded".
        gap: Parameter of the relative gap.
        absolute_gap: Parameter of the absolute gap.
        time: Parameter of the time limit in seconds.
        nodes: Parameter of the node limit.
        threads: Parameter of the number of threads.
        seed: Parameter of the seed.
        seeds: Number of seeds, which are taken modulo this.
    """

    name: str
    title: str
    instead: str
    ends: Mapping[str, Termination]
    limits: Mapping[str, Limit]
    unclear: frozenset[str] = field(default_factory=frozenset)
    gap: str | None = None
    absolute_gap: str | None = None
    time: str | None = None
    nodes: str | None = None
    threads: str | None = None
    seed: str | None = None
    seeds: int = 2**31

    def parameters(self, limits: SolverLimits) -> dict[str, Any]:
        """Translate the limits of a solve.

        Args:
            limits: Limits and tolerances.

        Returns:
            Values of the solver's parameters, those of the limits that are set.
        """
        values = {
            self.gap: limits.gap,
            self.absolute_gap: ABSOLUTE_GAP,
            self.time: None if limits.time_s is None else float(limits.time_s),
            self.nodes: limits.nodes,
            self.threads: limits.threads or 1,
            self.seed: limits.seed % self.seeds,
        }
        return {name: value for name, value in values.items() if name and value is not None}

    def solution(
        self,
        program: Program,
        limits: SolverLimits,
        solve: Callable[[Program, SolverLimits], Solution],
        *,
        status: str,
        began: float,
        values: Floats | None = None,
        bound: float | None = None,
    ) -> Solution:
        """Translate the end of a solve.

        Args:
            program: Program that was solved.
            limits: Limits of the solve.
            solve: Function of the backend, called again without an objective after an unclear status.
            status: Status that the solver reports.
            began: Time at which the solve began, by ``time.perf_counter``.
            values: Variables of the best point (n,), None without one.
            bound: Bound that the solver reports, None without one.

        Returns:
            The solution. An optimum of a program without integer variables is its own bound.

        Raises:
            SolverError: The solver failed without a solution.
        """
        limit = self.limits.get(status)
        if status in self.unclear:
            end = infeasible_or_unbounded(program, limits, solve)
        elif limit is None:
            end = self._end(status, values)
        elif values is not None:
            end = Termination.FEASIBLE
        elif limit is not Limit.NUMERIC:
            end = Termination.NO_SOLUTION
        else:
            raise self._failure(status)
        if end in (Termination.INFEASIBLE, Termination.UNBOUNDED):
            bound = None
        elif end is Termination.OPTIMAL and values is not None and not program.integer.any():
            bound = program.value(values)
        seconds = time.perf_counter() - began
        return solution(program, self.name, seconds, end, limit=limit, values=values, bound=bound)

    def _end(self, status: str, values: Floats | None) -> Termination:
        """Meaning of a status that is no limit."""
        end = self.ends.get(status)
        if end is None or (end is Termination.OPTIMAL and values is None):
            raise self._failure(status)
        return end

    def _failure(self, status: str) -> SolverError:
        return SolverError(f"{self.title} ended with status {status}; try `solver={self.instead}`.")
