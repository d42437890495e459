"""Solution of mixed-integer linear programs by any solver that is installed.

``auto`` takes the first backend of ``BACKENDS`` that is installed and whose licence allows the size of the program, and
reports the choice with its reason. A new solver is one module here and one entry of ``core.solvers``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module

from onnx_oamip.core.errors import SettingsError, SolverError
from onnx_oamip.core.records import Floats
from onnx_oamip.core.solvers import PACKAGES
from onnx_oamip.programs import Program, Rows
from onnx_oamip.programs.solvers.spec import (
    Backend,
    Licence,
    Limit,
    Solution,
    SolverLimits,
    Termination,
    relative_gap,
)

__all__ = [
    "BACKENDS",
    "CutSolution",
    "Licence",
    "Limit",
    "Separate",
    "Solution",
    "SolverLimits",
    "SolverRecord",
    "Termination",
    "available",
    "relative_gap",
    "solve",
    "solve_with_cuts",
]

BACKENDS: dict[str, Backend] = {
    name: import_module(f"{__name__}.{name}").BACKEND for name in PACKAGES
}
"""In order of preference under ``auto``."""
MIN_TIME_LIMIT = 0.01
"""Seconds that a round gets even if the time is used up."""

Notify = Callable[[str], None]
Separate = Callable[[Floats], Rows | None]
"""Values of the variables -> rows that they violate, or None if there are none left."""


@dataclass(frozen=True, slots=True)
class SolverRecord:
    """One solver as the ``solvers`` command reports it.

    Attributes:
        name: Name in settings.
        installed: True if its package is installed.
        version: Version of the package.
        licence: Description of the licence.
        variables: Largest number of variables, None for any.
        rows: Largest number of rows, None for any.
        usable: True if it works.
    """

    name: str
    installed: bool
    version: str | None
    licence: str
    variables: int | None
    rows: int | None
    usable: bool


@dataclass(frozen=True, eq=False)
class CutSolution:
    """Result of ``solve_with_cuts``.

    Attributes:
        solution: Last solution. Its bound holds for the whole problem.
        program: Program with all cuts.
        rounds: Number of solves.
        cuts: Number of rows added.
        closed: True if the last values violate no further row. Otherwise they solve a relaxation, and the objective of
            the solution need not be reachable.
    """

    solution: Solution
    program: Program
    rounds: int
    cuts: int
    closed: bool


def solve(
    program: Program,
    limits: SolverLimits | None = None,
    solver: str = "auto",
    notify: Notify | None = None,
) -> Solution:
    """Solve a program with one backend, or with the first suitable one (``auto``).

    Under ``auto`` the next backend takes over from one that fails, for example because its licence was lost.

    Args:
        program: Program to solve.
        limits: Limits and tolerances.
        solver: Name of a backend, or ``auto``.
        notify: Receives a message if ``auto`` passes over an installed solver.

    Returns:
        Solution with the reason for the choice of the backend.

    Raises:
        SettingsError: The name is unknown.
        SolverError: The solver is not installed, has no licence or one that is too small, or fails.
    """
    failures: dict[str, str] = {}
    while True:
        backend, reason = _choose(program, solver, notify, failures)
        try:
            return replace(backend.solve(program, limits or SolverLimits()), reason=reason)
        except SolverError as error:
            if solver != "auto":
                raise
            failures[backend.name] = f"{backend.name} failed ({str(error).rstrip('.')})"


def solve_with_cuts(
    program: Program,
    limits: SolverLimits | None,
    separate: Separate,
    solver: str = "auto",
    *,
    notify: Notify | None = None,
    max_rounds: int | None = None,
    is_enough: Callable[[float], bool] | None = None,
) -> CutSolution:
    """Solve a program by outer approximation: solve, add the rows that the solution violates, and solve again.

    Each round starts from the last one's integer values; continuous ones are left to the solver, since a cut has moved
    them. A round without values ends the loop.

    Args:
        program: Program without its cuts.
        limits: Limits and tolerances; the time limit is for all rounds together.
        separate: Finds violated rows.
        solver: Name of a backend, or ``auto``.
        notify: Receives at most one message, if ``auto`` passes over an installed solver.
        max_rounds: Largest number of rounds.
        is_enough: Called after every round with the bound so far; True ends the loop. A caller that makes feasible
            points of its own decides here that they are good enough.

    Returns:
        The last solution, with the best bound of all rounds.
    """
    limits = limits or SolverLimits()
    began = time.perf_counter()
    bound: float | None = None
    rounds = cuts = 0
    while True:
        remaining = _remaining(limits, began)
        last = solve(program, replace(limits, time_s=remaining), solver, notify)
        notify = None
        rounds += 1
        if last.bound is not None:
            if bound is None:
                bound = last.bound
            else:
                bound = max(bound, last.bound)
        if last.values is None:
            rows = None
        else:
            rows = separate(last.values)
        closed = last.values is not None and (rows is None or rows.count == 0)
        if closed or last.values is None or rows is None:
            break
        if is_enough is not None and bound is not None and is_enough(bound):
            break
        start = last.values.copy()
        start[~program.integer] = float("nan")
        program = replace(program.with_rows(rows), start=start)
        cuts += rows.count
        limit = _reached_limit(limits, began, rounds, max_rounds)
        if limit is not None:
            last = replace(last, termination=Termination.FEASIBLE, limit=limit)
            break
    if last.objective is not None and bound is not None:
        bound = min(bound, last.objective)
        last = replace(last, bound=bound, gap=relative_gap(last.objective, bound))
    last = replace(last, seconds=time.perf_counter() - began)
    return CutSolution(last, program, rounds, cuts, closed)


def _remaining(limits: SolverLimits, began: float) -> float | None:
    """Seconds that are left for the next round, None without a limit."""
    if limits.time_s is None:
        return None
    return max(limits.time_s - (time.perf_counter() - began), MIN_TIME_LIMIT)


def _reached_limit(
    limits: SolverLimits,
    began: float,
    rounds: int,
    max_rounds: int | None,
) -> Limit | None:
    """Limit that allows no further round, or None."""
    if limits.time_s is not None and time.perf_counter() - began >= limits.time_s:
        return Limit.TIME
    if max_rounds is not None and rounds >= max_rounds:
        return Limit.ROUND
    return None


def available() -> list[SolverRecord]:
    """List all backends.

    Returns:
        One record per backend, in order of preference.
    """
    records = []
    for backend in BACKENDS.values():
        installed = importlib.util.find_spec(backend.package) is not None
        if installed:
            licence = backend.licence()
        else:
            licence = Licence("not installed", None, None, False)
        record = SolverRecord(
            name=backend.name,
            installed=installed,
            version=_version(backend.package),
            licence=licence.text,
            variables=licence.variables,
            rows=licence.rows,
            usable=licence.usable,
        )
        records.append(record)
    return records


def _version(package: str) -> str | None:
    """Version of a package, or None if it is absent or importable without metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _choose(
    program: Program,
    solver: str,
    notify: Notify | None,
    failures: Mapping[str, str],
) -> tuple[Backend, str]:
    """The backend to use, with the reason; ``failures`` are the reasons of backends that have failed already."""
    if solver != "auto":
        return _requested(program, solver), "as asked"
    passed_over: list[str] = []
    for backend in BACKENDS.values():
        obstacle = failures.get(backend.name) or _obstacle(backend, program)
        if obstacle is None:
            choice = f"{backend.name} takes it: {backend.licence().text}"
            if passed_over and notify is not None:
                notify(f"solving with {backend.name}: {'; '.join(passed_over)}.")
            return backend, "; ".join([*passed_over, choice])
        passed_over.append(obstacle)
    if failures:
        advice = "try another `time_limit`"
    else:
        advice = "install one with pip install highspy"
    raise SolverError(f"no solver can be used: {'; '.join(passed_over)}; {advice}.")


def _requested(program: Program, solver: str) -> Backend:
    """The backend of a given name; raises an error if it is unknown or cannot take the program."""
    backend = BACKENDS.get(solver)
    if backend is None:
        raise SettingsError(
            f"`solver='{solver}'` is unknown; choose one of auto, {', '.join(BACKENDS)}."
        )
    obstacle = _obstacle(backend, program)
    if obstacle:
        raise SolverError(f"`solver={solver}` cannot be used: {obstacle}; {_advice(backend)}.")
    return backend


def _obstacle(backend: Backend, program: Program) -> str | None:
    """Reason why a backend cannot take a program, or None."""
    if importlib.util.find_spec(backend.package) is None:
        return f"{backend.package} is not installed"
    licence = backend.licence()
    if not licence.usable:
        return f"{backend.name} has no usable licence ({licence.text})"
    rows = backend.rows(program)
    most_variables = licence.variables or program.n_variables
    most_rows = licence.rows or rows
    if program.n_variables > most_variables or rows > most_rows:
        return (
            f"the program has {program.n_variables:,} variables and {rows:,} rows, over the {backend.name} licence "
            f"found here ({licence.text})"
        )
    return None


def _advice(backend: Backend) -> str:
    """Ways out if a backend cannot be used."""
    if importlib.util.find_spec(backend.package) is None:
        return f"install it with pip install {backend.package}, or use another `solver`"
    return backend.advice or f"reinstall {backend.package}"
