"""Gurobi, through gurobipy's matrix interface. The only module that imports gurobipy.

The gurobipy wheel carries a licence for 2,000 variables and 2,000 linear constraints; only ``optimize`` refuses a
larger model. A full licence is found where Gurobi itself looks for one (GRB_LICENSE_FILE, gurobi.lic).
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.sparse import csr_array, vstack

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
    run_interruptibly,
)

WHEEL_LICENCE_SIZE = 2000
"""Variables and rows that the licence inside the wheel allows (gurobipy's own project page)."""
ADVICE = "install a full licence (https://www.gurobi.com), or use `solver=highs`"
"""Ways out if the licence does not suffice."""
DIALECT = Dialect(
    name="gurobi",
    title="Gurobi",
    instead="highs",
    ends={"OPTIMAL": Termination.OPTIMAL, "INFEASIBLE": Termination.INFEASIBLE},
    limits={
        "ITERATION_LIMIT": Limit.ITERATION,
        "NODE_LIMIT": Limit.NODE,
        "TIME_LIMIT": Limit.TIME,
        "MEM_LIMIT": Limit.MEMORY,
        "NUMERIC": Limit.NUMERIC,
        "SUBOPTIMAL": Limit.NUMERIC,
    },
    # Gurobi calls a mixed-integer program unbounded if its relaxation is, whether or not it has a point.
    unclear=frozenset({"UNBOUNDED", "INF_OR_UNBD"}),
    gap="MIPGap",
    absolute_gap="MIPGapAbs",
    time="TimeLimit",
    nodes="NodeLimit",
    threads="Threads",
    seed="Seed",
    seeds=2_000_000_000,
)


@functools.cache
def licence() -> Licence:
    """Determine the licence by solving a trivial model one variable above the wheel's limit. The result is cached.

    Returns:
        The licence found on this machine, unusable with the reason if there is none.
    """
    size = WHEEL_LICENCE_SIZE
    try:
        gp = _gurobipy()
        with _environment(gp) as env, gp.Model(env=env) as model:
            model.addMVar(size + 1)
            model.optimize()
    except SolverError as error:
        return Licence(f"none: {error}", None, None, False)
    except gp.GurobiError as error:
        if error.errno == gp.GRB.Error.SIZE_LIMIT_EXCEEDED:
            return Licence(f"size-limited: {size:,} variables, {size:,} rows", size, size, True)
        return Licence(f"none: {error}", None, None, False)
    return Licence("full, any size", None, None, True)


def rows(program: Program) -> int:
    """Count constraints as Gurobi does.

    Args:
        program: Program to count.

    Returns:
        Number of constraints: two for a row with two different finite sides, none for a row without a side.
    """
    low = np.isfinite(program.row_lower)
    high = np.isfinite(program.row_upper)
    two_sided = low & high & (program.row_lower != program.row_upper)
    return int((low | high).sum() + two_sided.sum())


def solve(program: Program, limits: SolverLimits) -> Solution:
    """Solve a program with Gurobi.

    Args:
        program: Program to solve.
        limits: Limits and tolerances.

    Returns:
        The solution.

    Raises:
        SolverError: There is no licence, the program exceeds its size, or Gurobi fails.
    """
    gp = _gurobipy()
    began = time.perf_counter()
    try:
        with _environment(gp) as env, gp.Model(env=env) as model:
            for name, value in DIALECT.parameters(limits).items():
                model.setParam(name, value)
            variables = _load(gp, model, program)
            _optimize(gp, model)
            return _read(gp, model, variables, program, limits=limits, began=began)
    except gp.GurobiError as error:
        if error.errno == gp.GRB.Error.SIZE_LIMIT_EXCEEDED:
            raise SolverError(
                f"a program of {program.n_variables:,} variables and {rows(program):,} rows is over the size of the "
                f"Gurobi licence found here ({licence().text}); {ADVICE}."
            ) from error
        # The licence may have been lost: the next choice of a solver must look again.
        licence.cache_clear()
        raise SolverError(
            f"Gurobi failed: {str(error).rstrip('.')}; try `solver=highs`."
        ) from error


def _optimize(gp: Any, model: Any) -> None:
    """Solve without gurobipy's handler of Ctrl-C, which loses a signal that arrives while solves start in threads."""
    refusals: list[Exception] = []

    def run() -> None:
        try:
            model.optimizeAsync()
            model.sync()
        except gp.GurobiError as error:
            refusals.append(error)

    run_interruptibly(run, model.terminate, name=DIALECT.title, instead=DIALECT.instead)
    if refusals:
        raise refusals[0]


def _load(gp: Any, model: Any, program: Program) -> Any:
    """Pass the arrays and the first point; returns Gurobi's variables, or None if the program has none."""
    model.ModelSense = gp.GRB.MINIMIZE
    model.ObjCon = program.offset
    if program.n_variables == 0:
        # The rows compare constants. A variable with crossed bounds makes Gurobi report what they say.
        if program.violation(np.zeros(0)) > 0:
            model.addVar(lb=1, ub=0)
        return None
    kind = np.where(program.integer, gp.GRB.INTEGER, gp.GRB.CONTINUOUS)
    variables = model.addMVar(
        program.n_variables,
        program.lower,
        program.upper,
        program.objective,
        kind,
    )
    if program.start is not None:
        undefined = np.isnan(program.start)
        variables.Start = np.where(undefined, gp.GRB.UNDEFINED, program.start)
    low = program.row_lower
    high = program.row_upper
    equal = low == high
    below = ~equal & np.isfinite(high)
    above = ~equal & np.isfinite(low)
    parts = [program.matrix[mask] for mask in (equal, below, above)]
    sides = np.concatenate([low[equal], high[below], low[above]])
    sense = np.repeat(["=", "<", ">"], [part.shape[0] for part in parts])
    if len(sides):
        model.addMConstr(csr_array(vstack(parts, format="csr")), variables, sense, sides)
    return variables


def _read(
    gp: Any,
    model: Any,
    variables: Any,
    program: Program,
    *,
    limits: SolverLimits,
    began: float,
) -> Solution:
    """Translate the state of a Gurobi model after a run."""
    status = _status_name(gp, model)
    if status == "INTERRUPTED":
        # gurobipy swallows Ctrl-C and ends only one of the solves that run in threads: pass it to the main thread.
        if threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main()
        raise KeyboardInterrupt
    values = bound = None
    if model.SolCount:
        values = np.zeros(0) if variables is None else np.asarray(variables.X, np.float64)
    if program.integer.any():
        bound = float(model.ObjBound)
    return DIALECT.solution(
        program,
        limits,
        solve,
        status=status,
        began=began,
        values=values,
        bound=bound,
    )


def _status_name(gp: Any, model: Any) -> str:
    """Name of a model's status, or its number if gurobipy has no name for it."""
    for name in dir(gp.GRB.Status):
        if name.isupper() and getattr(gp.GRB.Status, name) == model.Status:
            return name
    return str(model.Status)


@contextmanager
def _environment(gp: Any) -> Iterator[Any]:
    """A silent environment, without a licence banner or a log."""
    with _SIGNAL_HANDLER, gp.Env(empty=True) as env:
        env.setParam("OutputFlag", 0)
        env.start()
        yield env


class _SignalHandlerGuard:
    """Restores Python's handler for Ctrl-C after every solve.

    gurobipy installs a handler of its own while it solves, and then restores the previous one: of solves that overlap
    in threads the last one restores the first one's handler, and Ctrl-C would never be received again.
    ``signal.signal`` works in the main thread only, so this uses the C functions behind it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._handler: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                get = ctypes.pythonapi.PyOS_getsig
                get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
                self._handler = get(signal.SIGINT)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            put = ctypes.pythonapi.PyOS_setsig
            put.argtypes, put.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
            put(signal.SIGINT, self._handler)


_SIGNAL_HANDLER = _SignalHandlerGuard()


def _gurobipy() -> Any:
    with importing("gurobipy"):
        import gurobipy
    return gurobipy


BACKEND = Backend(
    name=DIALECT.name,
    package="gurobipy",
    licence=licence,
    rows=rows,
    solve=solve,
    advice=ADVICE,
)
