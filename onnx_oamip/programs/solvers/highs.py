"""HiGHS (open source, MIT licence), for programs of any size. The only module that imports highspy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_oamip.core.errors import SolverError
from onnx_oamip.programs import Program
from onnx_oamip.programs.solvers.spec import (
    Backend,
    Licence,
    Limit,
    Solution,
    SolverLimits,
    Termination,
    importing,
    infeasible_or_unbounded,
    open_source,
    run_interruptibly,
    solution,
)

NAME = "highs"
ABSOLUTE_GAP = 1e-9
"""Below HiGHS's own 1e-6, which would end the solve of a program with a small objective far from its optimum."""
ROW_WISE = 2
"""HiGHS's code for a matrix in compressed rows."""
MINIMISE = 1
"""HiGHS's code for the sense of the objective."""
_LIMITS = {
    "kTimeLimit": Limit.TIME,
    "kSolutionLimit": Limit.NODE,  # HiGHS reports its node limit so
    "kIterationLimit": Limit.ITERATION,
    "kMemoryLimit": Limit.MEMORY,
    "kUnknown": Limit.NUMERIC,
    "kSolveError": Limit.NUMERIC,
    "kPostsolveError": Limit.NUMERIC,
}


def licence() -> Licence:
    """Check that highspy can be imported; HiGHS needs no licence.

    Returns:
        A licence for any size, or an unusable one with the reason.
    """
    return open_source(_highspy, "MIT")


def solve(program: Program, limits: SolverLimits) -> Solution:
    """Solve a program with HiGHS.

    Args:
        program: Program to solve.
        limits: Limits and tolerances.

    Returns:
        The solution.

    Raises:
        SolverError: HiGHS refuses the program or fails without a solution.
    """
    highspy = _highspy()
    began = time.perf_counter()
    highs = _silent(highspy)
    for name, value in _options(limits).items():
        highs.setOptionValue(name, value)
    if _load(highs, program) == highspy.HighsStatus.kError:
        raise SolverError(
            "HiGHS refused the program's arrays; its coefficients may be out of range."
        )
    _run(highs)
    if highs.getModelStatus().name == "kUnboundedOrInfeasible":
        end = infeasible_or_unbounded(program, limits, solve)
        return solution(program, NAME, time.perf_counter() - began, end)
    return _read(highspy, highs, program, time.perf_counter() - began)


def write(
    program: Program,
    path: Path,
    columns: Sequence[str],
    rows: Mapping[int, str],
) -> None:
    """Write a program in the format of the file's suffix: MPS or LP.

    Args:
        program: Program to write.
        path: File to write.
        columns: Name of each variable.
        rows: Names of some rows by their index.

    Raises:
        SolverError: HiGHS refuses the program or cannot write it.
    """
    highspy = _highspy()
    model = _silent(highspy)
    if _load(model, program) == highspy.HighsStatus.kError:
        raise SolverError(
            "HiGHS refused the program's arrays; its coefficients may be out of range."
        )
    for index, name in enumerate(columns):
        model.passColName(index, name)
    for index in range(program.n_rows):
        model.passRowName(index, rows.get(index, f"row_{index}"))
    if model.writeModel(str(path)) == highspy.HighsStatus.kError:
        raise SolverError(f"HiGHS cannot write the program to {path}.")


def _options(limits: SolverLimits) -> dict[str, Any]:
    """HiGHS's options for the limits."""
    threads = limits.threads or 1
    options: dict[str, Any] = {
        "output_flag": False,
        "mip_rel_gap": limits.gap,
        "mip_abs_gap": ABSOLUTE_GAP,
        "threads": threads,
        "parallel": "on" if threads > 1 else "off",
        "random_seed": limits.seed % 2**31,
    }
    if limits.time_s is not None:
        options["time_limit"] = float(limits.time_s)
    if limits.nodes is not None:
        options["mip_max_nodes"] = limits.nodes
    return options


def _read(
    highspy: Any,
    highs: Any,
    program: Program,
    seconds: float,
) -> Solution:
    """Translate the state of HiGHS after a run."""
    status = highs.getModelStatus().name
    info = highs.getInfo()
    values = bound = None
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        values = np.asarray(highs.getSolution().col_value, np.float64)
    if program.integer.any():
        bound = float(info.mip_dual_bound)
    if status == "kOptimal":
        assert values is not None
        if bound is None:
            bound = program.value(values)
        return solution(program, NAME, seconds, Termination.OPTIMAL, values=values, bound=bound)
    if status == "kModelEmpty":
        return _without_variables(program, seconds)
    if status == "kInfeasible":
        return solution(program, NAME, seconds, Termination.INFEASIBLE)
    if status == "kUnbounded":
        return solution(program, NAME, seconds, Termination.UNBOUNDED)
    limit = _LIMITS.get(status)
    if limit is None or (limit is Limit.NUMERIC and values is None):
        raise SolverError(f"HiGHS ended with status {status}; try `solver=gurobi`.")
    if values is None:
        end = Termination.NO_SOLUTION
    else:
        end = Termination.FEASIBLE
    return solution(program, NAME, seconds, end, limit=limit, values=values, bound=bound)


def _without_variables(program: Program, seconds: float) -> Solution:
    """Solution of a program that HiGHS calls empty: its only point either satisfies the rows or does not."""
    point = np.zeros(program.n_variables)
    feasible = program.violation(point) <= 0
    if feasible:
        end = Termination.OPTIMAL
    else:
        end = Termination.INFEASIBLE
    return solution(program, NAME, seconds, end, values=point, bound=program.value(point))


def _silent(highspy: Any) -> Any:
    """A HiGHS solver that prints nothing, its banner included.

    HiGHS prints its banner at the first call that is not about options, and highspy's constructor makes one: it enables
    callbacks. So the output is turned off there, before any caller of the constructor could do it.
    """

    class Silent(highspy.Highs):  # type: ignore[misc]
        def enableCallbacks(self) -> None:  # noqa: N802 - highspy's name
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    return Silent()


def _load(highs: Any, program: Program) -> Any:
    """Pass the arrays, and the first point if there is one; returns HiGHS's status for the arrays."""
    matrix = program.matrix
    status = highs.passModel(
        program.n_variables,
        program.n_rows,
        matrix.nnz,
        ROW_WISE,
        MINIMISE,
        program.offset,
        program.objective,
        program.lower,
        program.upper,
        program.row_lower,
        program.row_upper,
        matrix.indptr.astype(np.int32),
        matrix.indices.astype(np.int32),
        matrix.data,
        program.integer.astype(np.int32),
    )
    if program.start is not None:
        proposed = np.flatnonzero(~np.isnan(program.start)).astype(np.int32)
        highs.setSolution(len(proposed), proposed, program.start[proposed])
    return status


def _run(highs: Any) -> None:
    """Run HiGHS in a thread of its own.

    HiGHS ties its worker threads to the thread that first runs it and refuses another number there; a fresh thread
    takes any. It also leaves the calling thread free to receive Ctrl-C, which ends the solve and is raised again.
    """
    highs.HandleUserInterrupt = True
    run_interruptibly(highs.run, highs.cancelSolve, name="HiGHS", instead="gurobi")


def _highspy() -> Any:
    with importing("highspy"):
        import highspy
    return highspy


BACKEND = Backend(
    name=NAME,
    package="highspy",
    licence=licence,
    rows=lambda program: program.n_rows,
    solve=solve,
)
