"""HiGHS (open source, MIT licence), for programs of any size. The only module that imports highspy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_oamip.core.errors import SolverError
from onnx_oamip.programs import Program
from onnx_oamip.programs.solvers.dialect import Dialect
from onnx_oamip.programs.solvers.spec import (
    Backend,
    Licence,
    Limit,
    Solution,
    SolverLimits,
    Termination,
    importing,
    open_source,
    run_interruptibly,
    solution,
)

ROW_WISE = 2
"""HiGHS's code for a matrix in compressed rows."""
MINIMISE = 1
"""HiGHS's code for the sense of the objective."""
DIALECT = Dialect(
    name="highs",
    title="HiGHS",
    instead="gurobi",
    ends={
        "kOptimal": Termination.OPTIMAL,
        "kInfeasible": Termination.INFEASIBLE,
        "kUnbounded": Termination.UNBOUNDED,
    },
    limits={
        "kTimeLimit": Limit.TIME,
        "kSolutionLimit": Limit.NODE,  # HiGHS reports its node limit so
        "kIterationLimit": Limit.ITERATION,
        "kMemoryLimit": Limit.MEMORY,
        "kUnknown": Limit.NUMERIC,
        "kSolveError": Limit.NUMERIC,
        "kPostsolveError": Limit.NUMERIC,
    },
    unclear=frozenset({"kUnboundedOrInfeasible"}),
    gap="mip_rel_gap",
    absolute_gap="mip_abs_gap",
    time="time_limit",
    nodes="mip_max_nodes",
    threads="threads",
    seed="random_seed",
)


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
    for name, value in DIALECT.parameters(limits).items():
        highs.setOptionValue(name, value)
    highs.setOptionValue("parallel", "off" if limits.threads in (None, 1) else "on")
    if _load(highs, program) == highspy.HighsStatus.kError:
        raise SolverError(
            "HiGHS refused the program's arrays; its coefficients may be out of range."
        )
    _run(highs)
    status = highs.getModelStatus().name
    if status == "kModelEmpty":
        return _without_variables(program, time.perf_counter() - began)
    info = highs.getInfo()
    values = bound = None
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        values = np.asarray(highs.getSolution().col_value, np.float64)
    if program.integer.any():
        bound = float(info.mip_dual_bound)
    return DIALECT.solution(
        program,
        limits,
        solve,
        status=status,
        began=began,
        values=values,
        bound=bound,
    )


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


def _without_variables(program: Program, seconds: float) -> Solution:
    """Solution of a program that HiGHS calls empty: its only point either satisfies the rows or does not."""
    point = np.zeros(program.n_variables)
    feasible = program.violation(point) <= 0
    if feasible:
        end = Termination.OPTIMAL
    else:
        end = Termination.INFEASIBLE
    return solution(program, DIALECT.name, seconds, end, values=point, bound=program.value(point))


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
    run_interruptibly(highs.run, highs.cancelSolve, name=DIALECT.title, instead=DIALECT.instead)


def _highspy() -> Any:
    with importing("highspy"):
        import highspy
    return highspy


BACKEND = Backend(
    name=DIALECT.name,
    package="highspy",
    licence=licence,
    rows=lambda program: program.n_rows,
    solve=solve,
)
