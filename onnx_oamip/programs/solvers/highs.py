"""HiGHS (open source, MIT licence): any size. The only file that imports highspy."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from onnx_oamip.core.errors import SolverError
from onnx_oamip.programs import Program
from onnx_oamip.programs.solvers.spec import (
    Backend,
    Licence,
    Limit,
    Limits,
    Solution,
    Termination,
    importing,
    solution,
    which,
)

NAME = "highs"
ABSOLUTE_GAP = 1e-9
"""Below HiGHS's own 1e-6, which would end the solve of a program with a small objective far from its optimum."""
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
    """HiGHS needs none."""
    try:
        _highspy()
    except SolverError as error:
        return Licence(f"none: {error}", None, None, False)
    return Licence("open source (MIT), any size", None, None, True)


def solve(program: Program, limits: Limits) -> Solution:
    """Solve with HiGHS; raises SolverError where HiGHS refuses the program or fails without a solution."""
    highspy = _highspy()
    began = time.perf_counter()
    highs = _silent(highspy)
    options: dict[str, Any] = {
        "output_flag": False,
        "mip_rel_gap": limits.gap,
        "mip_abs_gap": ABSOLUTE_GAP,
        "threads": limits.threads or 1,
        "parallel": "on" if (limits.threads or 1) > 1 else "off",
        "random_seed": limits.seed % 2**31,
    }
    if limits.time_s is not None:
        options["time_limit"] = float(limits.time_s)
    if limits.nodes is not None:
        options["mip_max_nodes"] = limits.nodes
    for name, value in options.items():
        highs.setOptionValue(name, value)
    if _load(highs, program) == highspy.HighsStatus.kError:
        raise SolverError(
            "HiGHS refused the program's arrays; its coefficients may be out of range."
        )
    _run(highs)

    status = highs.getModelStatus().name
    seconds = time.perf_counter() - began
    info = highs.getInfo()
    values = bound = None
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        values = np.asarray(highs.getSolution().col_value, np.float64)
    if program.integer.any():
        bound = float(info.mip_dual_bound)
    if status == "kOptimal":
        assert values is not None
        if not program.integer.any():
            bound = program.value(values)
        return solution(program, NAME, seconds, Termination.OPTIMAL, None, values, bound)
    if status == "kModelEmpty":
        zero = np.zeros(program.n_variables)
        ended = Termination.INFEASIBLE if program.violation(zero) > 0 else Termination.OPTIMAL
        return solution(program, NAME, seconds, ended, None, zero, program.value(zero))
    if status in ("kInfeasible", "kUnbounded"):
        ended = Termination.INFEASIBLE if status == "kInfeasible" else Termination.UNBOUNDED
        return solution(program, NAME, seconds, ended)
    if status == "kUnboundedOrInfeasible":
        return solution(program, NAME, time.perf_counter() - began, which(program, limits, solve))
    limit = _LIMITS.get(status)
    if limit is None or (limit is Limit.NUMERIC and values is None):
        raise SolverError(f"HiGHS ended with status {status}; try `solver=gurobi`.")
    ended = Termination.NO_SOLUTION if values is None else Termination.FEASIBLE
    return solution(program, NAME, seconds, ended, limit, values, bound)


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
    """Hand the arrays over, and the start where there is one; returns HiGHS's status for the arrays."""
    matrix = program.matrix
    status = highs.passModel(
        program.n_variables,
        program.n_rows,
        matrix.nnz,
        2,  # row-wise
        1,  # minimise
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
        given = np.flatnonzero(~np.isnan(program.start)).astype(np.int32)
        highs.setSolution(len(given), given, program.start[given])
    return status


def _run(highs: Any) -> None:
    """Run in a thread of its own.

    HiGHS ties its worker threads to the thread that first runs it and refuses another number there; a fresh thread
    takes any. It also leaves this one free to hear Ctrl-C, which ends the solve and is raised on.
    """
    highs.HandleUserInterrupt = True
    done = threading.Event()
    failed: list[Exception] = []

    def work() -> None:
        try:
            highs.run()
        except Exception as error:  # what its C++ throws, such as a lack of memory
            failed.append(error)
        finally:
            done.set()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        # Not join: interrupted there, Python before 3.13 takes a running thread for ended. Not without a time: Windows
        # would not hear Ctrl-C.
        while not done.wait(0.2):
            pass
    except KeyboardInterrupt:
        highs.cancelSolve()
        done.wait(5)
        raise
    finally:
        worker.join(5)
    if failed:
        what = str(failed[0]).rstrip(".") or type(failed[0]).__name__
        raise SolverError(f"HiGHS failed: {what}; try `solver=gurobi`.") from failed[0]


def _highspy() -> Any:
    with importing("highspy"):
        import highspy
    return highspy


BACKEND = Backend(NAME, "highspy", licence, lambda program: program.n_rows, solve)
