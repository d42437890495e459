"""Gurobi: through gurobipy's matrix interface. The only file that imports gurobipy.

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

NAME = "gurobi"
SMALL = 2000
"""Variables and rows that the licence inside the wheel takes (gurobipy's own project page)."""
ABSOLUTE_GAP = 1e-9
WAYS_OUT = "install a full licence (https://www.gurobi.com), or use `solver=highs`"
_LIMITS = {
    "ITERATION_LIMIT": Limit.ITERATION,
    "NODE_LIMIT": Limit.NODE,
    "TIME_LIMIT": Limit.TIME,
    "MEM_LIMIT": Limit.MEMORY,
    "NUMERIC": Limit.NUMERIC,
    "SUBOPTIMAL": Limit.NUMERIC,
}


@functools.cache
def licence() -> Licence:
    """What the licence found here allows, by trying a trivial model one variable over the wheel's limit. Cached."""
    try:
        gp = _gurobipy()
        with _env(gp) as env, gp.Model(env=env) as model:
            model.addMVar(SMALL + 1)
            model.optimize()
    except SolverError as error:
        return Licence(f"none: {error}", None, None, False)
    except gp.GurobiError as error:
        if error.errno == gp.GRB.Error.SIZE_LIMIT_EXCEEDED:
            return Licence(f"size-limited: {SMALL:,} variables, {SMALL:,} rows", SMALL, SMALL, True)
        return Licence(f"none: {error}", None, None, False)
    return Licence("full, any size", None, None, True)


def rows(program: Program) -> int:
    """Constraints Gurobi will count: one with two finite, different sides is two, a free one none."""
    low, high = np.isfinite(program.row_lower), np.isfinite(program.row_upper)
    return int((low | high).sum() + (low & high & (program.row_lower != program.row_upper)).sum())


def solve(program: Program, limits: Limits) -> Solution:
    """Solve with Gurobi; raises SolverError for a missing licence, a program over its size, or a failure."""
    gp = _gurobipy()
    began = time.perf_counter()
    try:
        with _env(gp) as env, gp.Model(env=env) as model:
            for name, value in _parameters(limits).items():
                model.setParam(name, value)
            held = _load(gp, model, program)
            model.optimize()
            return _read(gp, model, held, program, limits, began)
    except gp.GurobiError as error:
        if error.errno == gp.GRB.Error.SIZE_LIMIT_EXCEEDED:
            raise SolverError(
                f"a program of {program.n_variables:,} variables and {rows(program):,} rows is over the size of the "
                f"Gurobi licence found here ({licence().text}); {WAYS_OUT}."
            ) from error
        licence.cache_clear()  # it may be gone: whoever chooses a solver next looks again
        raise SolverError(
            f"Gurobi failed: {str(error).rstrip('.')}; try `solver=highs`."
        ) from error


def _parameters(limits: Limits) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "MIPGap": limits.gap,
        "MIPGapAbs": ABSOLUTE_GAP,
        "Threads": limits.threads or 1,
        "Seed": limits.seed % 2_000_000_000,
    }
    if limits.time_s is not None:
        parameters["TimeLimit"] = limits.time_s
    if limits.nodes is not None:
        parameters["NodeLimit"] = limits.nodes
    return parameters


def _load(gp: Any, model: Any, program: Program) -> Any:
    """Hand the arrays over; returns the variables (None where there are none)."""
    model.ModelSense = gp.GRB.MINIMIZE
    model.ObjCon = program.offset
    low, high = program.row_lower, program.row_upper
    equal = low == high
    below, above = ~equal & np.isfinite(high), ~equal & np.isfinite(low)
    if program.n_variables == 0:  # then a row is a comparison of constants
        if program.violation(np.zeros(0)) > 0:
            model.addVar(lb=1, ub=0)
        return None
    kind = np.where(program.integer, gp.GRB.INTEGER, gp.GRB.CONTINUOUS)
    held = model.addMVar(program.n_variables, program.lower, program.upper, program.objective, kind)
    if program.start is not None:
        held.Start = np.where(np.isnan(program.start), gp.GRB.UNDEFINED, program.start)
    parts = [program.matrix[mask] for mask in (equal, below, above)]
    right = np.concatenate([low[equal], high[below], low[above]])
    sense = np.repeat(["=", "<", ">"], [p.shape[0] for p in parts])
    if len(right):
        model.addMConstr(csr_array(vstack(parts, format="csr")), held, sense, right)
    return held


def _read(
    gp: Any, model: Any, held: Any, program: Program, limits: Limits, began: float
) -> Solution:
    names = {getattr(gp.GRB.Status, n): n for n in dir(gp.GRB.Status) if n.isupper()}
    status = names.get(model.Status, str(model.Status))
    if (
        status == "INTERRUPTED"
    ):  # Ctrl-C: gurobipy swallows it, and ends but one of the solves that run in threads
        if threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main()
        raise KeyboardInterrupt
    values = bound = None
    if model.SolCount:
        values = np.zeros(0) if held is None else np.asarray(held.X, np.float64)
    if program.integer.any():
        bound = float(model.ObjBound)
    if status == "OPTIMAL":
        assert values is not None
        if bound is None:
            bound = program.value(values)
        return solution(
            program, NAME, time.perf_counter() - began, Termination.OPTIMAL, None, values, bound
        )
    if status in ("INFEASIBLE", "UNBOUNDED", "INF_OR_UNBD"):
        # Gurobi calls a mixed-integer program unbounded when its relaxation is, whether or not it has a point.
        ended = Termination.INFEASIBLE if status == "INFEASIBLE" else which(program, limits, solve)
        return solution(program, NAME, time.perf_counter() - began, ended)
    limit = _LIMITS.get(status)
    if limit is None or (limit is Limit.NUMERIC and values is None):
        raise SolverError(f"Gurobi ended with status {status}; try `solver=highs`.")
    ended = Termination.NO_SOLUTION if values is None else Termination.FEASIBLE
    return solution(program, NAME, time.perf_counter() - began, ended, limit, values, bound)


@contextmanager
def _env(gp: Any) -> Iterator[Any]:
    """A silent environment: no licence banner, no log."""
    with _INTERRUPTS, gp.Env(empty=True) as env:
        env.setParam("OutputFlag", 0)
        env.start()
        yield env


class _Interrupts:
    """Gives Ctrl-C back to Python behind every solve.

    gurobipy puts a handler of its own in place while it solves, and then what was there before: of solves that overlap
    in threads the last one puts back the first one's handler, and nobody would hear Ctrl-C any more. ``signal.signal``
    is for the main thread alone, so this takes the C functions behind it.
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


_INTERRUPTS = _Interrupts()


def _gurobipy() -> Any:
    with importing("gurobipy"):
        import gurobipy
    return gurobipy


BACKEND = Backend(NAME, "gurobipy", licence, rows, solve)
