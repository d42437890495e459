"""SCIP (open source, Apache 2.0), for programs of any size. The only module that imports pyscipopt."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from onnx_oamip.core.records import Floats
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

DIALECT = Dialect(
    name="scip",
    title="SCIP",
    instead="highs",
    ends={
        "optimal": Termination.OPTIMAL,
        "gaplimit": Termination.OPTIMAL,
        "infeasible": Termination.INFEASIBLE,
    },
    limits={
        "timelimit": Limit.TIME,
        "nodelimit": Limit.NODE,
        "totalnodelimit": Limit.NODE,
        "memlimit": Limit.MEMORY,
    },
    unclear=frozenset({"unbounded", "inforunbd"}),
    gap="limits/gap",
    absolute_gap="limits/absgap",
    time="limits/time",
    nodes="limits/totalnodes",
    seed="randomization/randomseedshift",
)


def licence() -> Licence:
    """Check that pyscipopt can be imported; SCIP needs no licence.

    Returns:
        A licence for any size, or an unusable one with the reason.
    """
    return open_source(_pyscipopt, "Apache 2.0")


def solve(program: Program, limits: SolverLimits) -> Solution:
    """Solve a program with SCIP.

    Args:
        program: Program to solve.
        limits: Limits and tolerances. SCIP uses one thread.

    Returns:
        The solution.

    Raises:
        SolverError: SCIP fails without a solution.
    """
    began = time.perf_counter()
    if _empty_row_is_violated(program):
        seconds = time.perf_counter() - began
        return solution(program, DIALECT.name, seconds, Termination.INFEASIBLE)
    scip = _pyscipopt()
    model = scip.Model()
    model.hideOutput()
    model.setParam("misc/catchctrlc", False)
    for name, value in DIALECT.parameters(limits).items():
        model.setParam(name, value)
    variables = _load(scip, model, program)
    run_interruptibly(
        model.optimizeNogil,
        model.interruptSolve,
        name=DIALECT.title,
        instead=DIALECT.instead,
    )
    values = None
    if model.getNSols():
        best = model.getBestSol()
        values = np.asarray([model.getSolVal(best, v) for v in variables], np.float64)
    return DIALECT.solution(
        program,
        limits,
        solve,
        status=model.getStatus(),
        began=began,
        values=values,
        bound=float(model.getDualbound()),
    )


def _empty_row_is_violated(program: Program) -> bool:
    """Tests whether a row without entries excludes 0; SCIP takes no such rows."""
    empty = np.diff(program.matrix.indptr) == 0
    excludes_zero = (program.row_lower > 0) | (program.row_upper < 0)
    return bool((empty & excludes_zero).any())


def _load(scip: Any, model: Any, program: Program) -> list[Any]:
    """Pass the program and its first point; returns SCIP's variables."""

    def side(value: float) -> float | None:
        return value if np.isfinite(value) else None

    columns = zip(
        program.lower.tolist(),
        program.upper.tolist(),
        program.objective.tolist(),
        program.integer.tolist(),
        strict=True,
    )
    variables = [
        model.addVar(lb=side(low), ub=side(high), obj=cost, vtype="I" if whole else "C")
        for low, high, cost, whole in columns
    ]
    model.addObjoffset(program.offset)
    matrix = program.matrix
    for row in range(program.n_rows):
        entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
        if entries.start == entries.stop:
            continue
        terms = zip(matrix.data[entries].tolist(), matrix.indices[entries].tolist(), strict=True)
        expression = scip.quicksum(weight * variables[column] for weight, column in terms)
        low, high = (side(float(s[row])) for s in (program.row_lower, program.row_upper))
        if low is not None or high is not None:
            model.addCons(scip.scip.ExprCons(expression, low, high))
    if program.start is not None:
        _propose(model, variables, program.start)
    return variables


def _propose(model: Any, variables: list[Any], start: Floats) -> None:
    """Pass the known values of a first point, which SCIP completes."""
    point = model.createPartialSol()
    for index in np.flatnonzero(~np.isnan(start)).tolist():
        model.setSolVal(point, variables[index], float(start[index]))
    model.addSol(point)


def _pyscipopt() -> Any:
    with importing("pyscipopt"):
        import pyscipopt
    return pyscipopt


BACKEND = Backend(
    name=DIALECT.name,
    package="pyscipopt",
    licence=licence,
    rows=lambda program: program.n_rows,
    solve=solve,
)
