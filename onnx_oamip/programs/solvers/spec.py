"""Interface of the solver backends: limits, solutions, licences.

The reason for the end of a solve (``Termination``) and the limit that cut it short (``Limit``) are separate facts: an
incumbent at the time limit is FEASIBLE + TIME, a result with a gap, and neither an error nor an optimum.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from onnx_oamip.core.errors import SettingsError, SolverError
from onnx_oamip.core.records import Floats
from onnx_oamip.programs import Program

INFINITE = 1e30
"""Magnitude from which a solver's bound means that it has none."""
MIN_OBJECTIVE = 1e-10
"""Divisor of a relative gap if the objective is smaller."""
POLL_SECONDS = 0.2
"""Interval at which the thread that waits for a solver can receive Ctrl-C."""
STOP_SECONDS = 5
"""Time for a solver to stop after an interrupt."""


class Termination(str, Enum):
    """State of knowledge at the end of a solve."""

    OPTIMAL = "optimal"
    """The values are within the requested gap of the optimum."""
    FEASIBLE = "feasible"
    """The values satisfy everything; the gap bounds their distance from the optimum."""
    INFEASIBLE = "infeasible"
    """No point satisfies all rows and bounds."""
    UNBOUNDED = "unbounded"
    """The objective has no minimum."""
    NO_SOLUTION = "no_solution"
    """A limit was reached before any values were found."""


class Limit(str, Enum):
    """Limit that stopped a solve before it was done."""

    TIME = "time"
    NODE = "node"
    MEMORY = "memory"
    ITERATION = "iteration"
    NUMERIC = "numeric"
    """The solver gave up on numerical grounds; values, if there are any, satisfied its tolerances."""
    ROUND = "round"
    """``solve_with_cuts`` used up its rounds."""


@dataclass(frozen=True, slots=True)
class SolverLimits:
    """Limits and tolerances of a solve.

    Attributes:
        time_s: Wall-clock seconds, None for no limit.
        gap: Gap relative to the objective at which to stop.
        threads: Threads, None for one: then a result does not depend on the number of cores of the machine.
        seed: Seed of the solver.
        nodes: Branch-and-bound nodes, None for no limit.

    Raises:
        SettingsError: A value is out of range.
    """

    time_s: float | None = None
    gap: float = 1e-4
    threads: int | None = None
    seed: int = 0
    nodes: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("the solver's time limit", self.time_s, 1e-9),
            ("the solver's gap", self.gap, 0),
            ("the solver's number of threads", self.threads, 1),
            ("the solver's seed", self.seed, 0),
            ("the solver's number of nodes", self.nodes, 1),
        ):
            # Written so that NaN is out of range.
            if value is not None and not value >= least:
                if 0 < least < 1:
                    expected = "more than 0"
                else:
                    expected = f"at least {least}"
                raise SettingsError(f"{name} is {value}; expected {expected}.")


@dataclass(frozen=True, eq=False)
class Solution:
    """Result of a solve. A value that does not exist is None.

    Attributes:
        termination: State of knowledge at the end.
        limit: Limit that stopped the solve.
        values: Variables (n,); integer ones are integers exactly.
        objective: Objective at the values.
        bound: Lower bound that no point beats.
        gap: ``|objective - bound| / |objective|``.
        seconds: Wall-clock time.
        solver: Name of the backend.
        reason: Reason for the choice of this backend.
    """

    termination: Termination
    limit: Limit | None
    values: Floats | None
    objective: float | None
    bound: float | None
    gap: float | None
    seconds: float
    solver: str
    reason: str = ""

    @property
    def has_values(self) -> bool:
        """True if the solver found a point."""
        return self.values is not None


@dataclass(frozen=True, slots=True)
class Licence:
    """Permission of a backend on this machine.

    Attributes:
        text: Description for reports.
        variables: Largest number of variables, None for any.
        rows: Largest number of rows, None for any.
        usable: True if the backend works.
    """

    text: str
    variables: int | None
    rows: int | None
    usable: bool


@dataclass(frozen=True)
class Backend:
    """One solver.

    Attributes:
        name: Name in settings and reports.
        package: Python package to look for.
        licence: Function that determines the licence.
        rows: Function that counts the rows of a program as the licence does.
        solve: Function that solves a program.
        advice: Ways out if the package is installed but cannot be used; by default to reinstall it.
    """

    name: str
    package: str
    licence: Callable[[], Licence]
    rows: Callable[[Program], int]
    solve: Callable[[Program, SolverLimits], Solution]
    advice: str = ""


def solution(
    program: Program,
    solver: str,
    seconds: float,
    termination: Termination,
    *,
    limit: Limit | None = None,
    values: Floats | None = None,
    bound: float | None = None,
) -> Solution:
    """Build a Solution in the same way for all backends: integers rounded, objective and gap computed here.

    Args:
        program: Program that was solved.
        solver: Name of the backend.
        seconds: Wall-clock time of the solve.
        termination: State of knowledge at the end.
        limit: Limit that stopped the solve.
        values: Variables as the solver reports them (n,).
        bound: Bound as the solver reports it.

    Returns:
        Solution without a reason.
    """
    if bound is not None and not abs(bound) < INFINITE:
        bound = None
    if values is None or termination not in (Termination.OPTIMAL, Termination.FEASIBLE):
        return Solution(
            termination=termination,
            limit=limit,
            values=None,
            objective=None,
            bound=bound,
            gap=None,
            seconds=seconds,
            solver=solver,
        )
    rounded = np.where(program.integer, np.round(values), values)
    values = np.clip(rounded, program.lower, program.upper)
    objective = program.value(values)
    gap = None
    if bound is not None:
        bound = min(bound, objective)
        gap = relative_gap(objective, bound)
    return Solution(
        termination=termination,
        limit=limit,
        values=values,
        objective=objective,
        bound=bound,
        gap=gap,
        seconds=seconds,
        solver=solver,
    )


def relative_gap(objective: float, bound: float) -> float:
    """Compute ``|objective - bound| / |objective|``.

    Args:
        objective: Objective of the incumbent.
        bound: Lower bound.

    Returns:
        Relative gap, 0 if the two are equal.
    """
    if objective == bound:
        return 0.0
    return abs(objective - bound) / max(abs(objective), MIN_OBJECTIVE)


def infeasible_or_unbounded(
    program: Program,
    limits: SolverLimits,
    solve: Callable[[Program, SolverLimits], Solution],
) -> Termination:
    """Resolve a solver's "infeasible or unbounded" by a second solve without an objective.

    Args:
        program: Program that the solver could not classify.
        limits: Limits of the second solve.
        solve: Function of the backend.

    Returns:
        UNBOUNDED if the program has a feasible point, else the end of the second solve.
    """
    without_objective = replace(program, objective=np.zeros(program.n_variables), offset=0.0)
    end = solve(without_objective, limits).termination
    if end in (Termination.OPTIMAL, Termination.FEASIBLE):
        return Termination.UNBOUNDED
    return end


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Report a failed import as a SolverError.

    Args:
        package: Python package that is imported inside.

    Raises:
        SolverError: The import failed; the message holds the command that installs the package.
    """
    try:
        yield
    except ImportError as error:
        raise SolverError(
            f"the solver package {package} cannot be imported ({error}); install it with pip install {package}."
        ) from error


def open_source(load: Callable[[], object], name: str) -> Licence:
    """Licence of a solver that needs none, once its package can be imported.

    Args:
        load: Function that imports the package, inside ``importing``.
        name: Name of the open-source licence.

    Returns:
        A licence for any size, or an unusable one with the reason.
    """
    try:
        load()
    except SolverError as error:
        return Licence(f"none: {error}", None, None, False)
    return Licence(f"open source ({name}), any size", None, None, True)


def run_interruptibly(
    run: Callable[[], object],
    stop: Callable[[], object],
    *,
    name: str,
    instead: str,
) -> None:
    """Run a solver in a thread of its own, which leaves the calling thread free to receive Ctrl-C.

    Args:
        run: Function that solves; it releases Python's lock.
        stop: Function that asks the solver to end; called on Ctrl-C, which is raised again after it.
        name: Name of the solver in messages.
        instead: Another solver to try if this one fails.

    Raises:
        SolverError: The solver raised an exception.
    """
    done = threading.Event()
    errors: list[Exception] = []

    def work() -> None:
        try:
            run()
        except Exception as error:  # the solver's own, such as a lack of memory
            errors.append(error)
        finally:
            done.set()

    worker = threading.Thread(target=work, daemon=True)
    try:
        worker.start()
        # Not join: interrupted there, Python before 3.13 takes a running thread for ended. Not without a timeout:
        # Windows would not receive Ctrl-C.
        while not done.wait(POLL_SECONDS):
            pass
    except KeyboardInterrupt:
        # Again and again: a solver that has not started yet forgets the request.
        deadline = time.monotonic() + STOP_SECONDS
        stop()
        while not done.wait(POLL_SECONDS) and time.monotonic() < deadline:
            stop()
        raise
    finally:
        if worker.is_alive():  # false where Ctrl-C came before the start
            worker.join(STOP_SECONDS)
    if errors:
        cause = str(errors[0]).rstrip(".") or type(errors[0]).__name__
        raise SolverError(f"{name} failed: {cause}; try `solver={instead}`.") from errors[0]
