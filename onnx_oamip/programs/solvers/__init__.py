"""Solve a mixed-integer linear program with whichever solver is here.

``auto`` takes the first backend of ``BACKENDS`` that is installed and whose licence allows the program's size, and says
which and why. A new solver is one file and one entry here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from onnx_oamip.core.errors import SettingsError, SolverError
from onnx_oamip.core.records import Floats
from onnx_oamip.programs import Program, Rows
from onnx_oamip.programs.solvers import gurobi, highs
from onnx_oamip.programs.solvers.spec import (
    Backend,
    Licence,
    Limit,
    Limits,
    Solution,
    Termination,
    relative_gap,
)

__all__ = [
    "BACKENDS",
    "CutSolution",
    "Licence",
    "Limit",
    "Limits",
    "Solution",
    "SolverRecord",
    "Termination",
    "available",
    "relative_gap",
    "solve",
    "solve_with_cuts",
]

BACKENDS: dict[str, Backend] = {b.name: b for b in (gurobi.BACKEND, highs.BACKEND)}
"""In order of preference under ``auto``."""

Notify = Callable[[str], None]
Separate = Callable[[Floats], Rows | None]
"""Values of the variables -> rows they violate, or None when there are none left."""


@dataclass(frozen=True, slots=True)
class SolverRecord:
    """One solver as the ``solvers`` command shows it. ``variables``/``rows``: the largest it takes, None for any."""

    name: str
    installed: bool
    version: str | None
    licence: str
    variables: int | None
    rows: int | None
    usable: bool


@dataclass(frozen=True, eq=False)
class CutSolution:
    """The end of ``solve_with_cuts``.

    ``closed``: the last values violate no further row. Where not, they solve a relaxation: ``solution.bound`` holds
    for the whole problem, but ``solution.objective`` need not be reachable. ``program`` carries every cut, for reuse.
    """

    solution: Solution
    program: Program
    rounds: int
    cuts: int
    closed: bool


def solve(
    program: Program,
    limits: Limits | None = None,
    solver: str = "auto",
    notify: Notify | None = None,
) -> Solution:
    """Solve with one backend, or with the first that can (``auto``).

    ``notify`` is told where ``auto`` passes over an installed solver; ``Solution.reason`` always says why this one.
    Raises SettingsError for an unknown name, SolverError where the solver asked for is not there, has no licence, or
    a licence too small for the program, or where it fails. Under ``auto`` the next backend takes over from one that
    fails (a licence that was lost meanwhile, say).
    """
    failed: dict[str, str] = {}
    while True:
        backend, reason = _choose(program, solver, notify, failed)
        try:
            return replace(backend.solve(program, limits or Limits()), reason=reason)
        except SolverError as error:
            if solver != "auto":
                raise
            failed[backend.name] = f"{backend.name} failed ({str(error).rstrip('.')})"


def solve_with_cuts(
    program: Program,
    limits: Limits | None,
    separate: Separate,
    solver: str = "auto",
    notify: Notify | None = None,
    rounds: int | None = None,
    enough: Callable[[float], bool] | None = None,
) -> CutSolution:
    """Outer approximation: solve, ask ``separate`` for violated rows, add them, until there are none or time is out.

    Each round starts from the last one's integer values (continuous ones are left to the solver, since a cut has
    moved them). The bound is the best of all rounds; ``limits.time_s`` is for all of them together. A round that ends
    without values ends the loop. ``enough`` is asked after every round with the bound so far, and may end the loop
    too: a caller that makes feasible points of its own knows when they are good enough.
    """
    limits = limits or Limits()
    began = time.perf_counter()
    bound: float | None = None
    done = cuts = 0
    while True:
        left = (
            None
            if limits.time_s is None
            else max(limits.time_s - (time.perf_counter() - began), 0.01)
        )
        last = solve(program, replace(limits, time_s=left), solver, notify)
        notify = None  # once is enough
        done += 1
        if last.bound is not None:
            bound = last.bound if bound is None else max(bound, last.bound)
        rows = None if last.values is None else separate(last.values)
        closed = last.values is not None and (rows is None or rows.count == 0)
        if closed or last.values is None or rows is None:
            break
        if enough is not None and bound is not None and enough(bound):
            break
        start = last.values.copy()
        start[~program.integer] = float("nan")
        program = replace(program.with_rows(rows), start=start)
        cuts += rows.count
        if limits.time_s is not None and time.perf_counter() - began >= limits.time_s:
            last = replace(last, termination=Termination.FEASIBLE, limit=Limit.TIME)
            break
        if rounds is not None and done >= rounds:
            last = replace(last, termination=Termination.FEASIBLE, limit=Limit.ROUND)
            break
    if last.objective is not None and bound is not None:
        bound = min(bound, last.objective)
        last = replace(last, bound=bound, gap=relative_gap(last.objective, bound))
    return CutSolution(
        replace(last, seconds=time.perf_counter() - began), program, done, cuts, closed
    )


def available() -> list[SolverRecord]:
    """Every backend: whether it is installed, its version, what its licence allows."""
    found = []
    for backend in BACKENDS.values():
        installed = importlib.util.find_spec(backend.package) is not None
        licence = backend.licence() if installed else Licence("not installed", None, None, False)
        found.append(
            SolverRecord(
                backend.name,
                installed,
                _version(backend.package),
                licence.text,
                licence.variables,
                licence.rows,
                licence.usable,
            )
        )
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # absent, or importable without metadata
        return None


def _choose(
    program: Program, solver: str, notify: Notify | None, failed: Mapping[str, str]
) -> tuple[Backend, str]:
    if solver != "auto":
        backend = BACKENDS.get(solver)
        if backend is None:
            raise SettingsError(
                f"`solver='{solver}'` is unknown; choose one of auto, {', '.join(BACKENDS)}."
            )
        obstacle = _obstacle(backend, program)
        if obstacle:
            raise SolverError(
                f"`solver={solver}` cannot be used: {obstacle}; {_ways_out(backend)}."
            )
        return backend, "as asked"
    passed: list[str] = []
    for backend in BACKENDS.values():
        obstacle = failed.get(backend.name) or _obstacle(backend, program)
        if obstacle is None:
            reason = "; ".join([*passed, f"{backend.name} takes it: {backend.licence().text}"])
            if passed and notify is not None:
                notify(f"solving with {backend.name}: {'; '.join(passed)}.")
            return backend, reason
        passed.append(obstacle)
    way = "try another `time_limit`" if failed else "install one with pip install highspy"
    raise SolverError(f"no solver can be used: {'; '.join(passed)}; {way}.")


def _obstacle(backend: Backend, program: Program) -> str | None:
    """Why a backend cannot take a program, or None."""
    if importlib.util.find_spec(backend.package) is None:
        return f"{backend.package} is not installed"
    licence = backend.licence()
    if not licence.usable:
        return f"{backend.name} has no usable licence ({licence.text})"
    rows = backend.rows(program)
    if program.n_variables > (licence.variables or program.n_variables) or rows > (
        licence.rows or rows
    ):
        return (
            f"the program has {program.n_variables:,} variables and {rows:,} rows, over the {backend.name} licence "
            f"found here ({licence.text})"
        )
    return None


def _ways_out(backend: Backend) -> str:
    if importlib.util.find_spec(backend.package) is None:
        return f"install it with pip install {backend.package}, or use another `solver`"
    return gurobi.WAYS_OUT if backend.name == gurobi.NAME else f"reinstall {backend.package}"
