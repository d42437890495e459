"""What every backend takes and returns.

Why a solve ended (``Termination``) and what cut it short (``Limit``) are separate facts: an incumbent at the time limit
is FEASIBLE + TIME, a result with a gap, and neither an error nor an optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from onnx_oamip.core.errors import SettingsError, SolverError
from onnx_oamip.core.records import Floats
from onnx_oamip.programs import Program

INFINITE = 1e30
"""A solver's bound of this size means that it has none."""


class Termination(str, Enum):
    """What is known at the end."""

    OPTIMAL = "optimal"
    """The values are within the gap that was asked for of the best there are."""
    FEASIBLE = "feasible"
    """The values satisfy everything; how far from the best they are is the gap."""
    INFEASIBLE = "infeasible"
    """Nothing satisfies all rows and bounds."""
    UNBOUNDED = "unbounded"
    """There is no least objective."""
    NO_SOLUTION = "no_solution"
    """A limit came before any values."""


class Limit(str, Enum):
    """What stopped a solve before it was done."""

    TIME = "time"
    NODE = "node"
    MEMORY = "memory"
    ITERATION = "iteration"
    NUMERIC = "numeric"
    """The solver gave up on numerical grounds; values, where there are any, satisfied its tolerances."""
    ROUND = "round"
    """``solve_with_cuts`` used up its rounds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how well to solve.

    ``time_s`` is in wall-clock seconds (None: no limit), ``gap`` relative to the objective, ``nodes`` the number of
    branch-and-bound nodes (None: no limit). ``threads`` None is one thread: a result then does not depend on how many
    cores a machine has. Raises SettingsError for values out of range.
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
            if value is not None and not value >= least:
                expected = "more than 0" if 0 < least < 1 else f"at least {least}"
                raise SettingsError(f"{name} is {value}; expected {expected}.")


@dataclass(frozen=True, eq=False)
class Solution:
    """The end of a solve: ``values`` (n,), integer ones whole, ``objective`` at them, ``bound`` that no point beats.

    Each is None where there is none. ``gap`` is ``|objective - bound| / |objective|``; ``seconds`` wall-clock;
    ``reason`` says why this solver was taken.
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
    def found(self) -> bool:
        """There are values."""
        return self.values is not None


@dataclass(frozen=True, slots=True)
class Licence:
    """What a backend may solve here: ``text`` in words, the largest program it takes (None: any), and if it works."""

    text: str
    variables: int | None
    rows: int | None
    usable: bool


@dataclass(frozen=True)
class Backend:
    """One solver: the package to look for, what its licence allows, its own count of rows, and its solve."""

    name: str
    package: str
    licence: Callable[[], Licence]
    rows: Callable[[Program], int]
    solve: Callable[[Program, Limits], Solution]


def solution(
    program: Program,
    solver: str,
    seconds: float,
    termination: Termination,
    limit: Limit | None = None,
    values: Floats | None = None,
    bound: float | None = None,
) -> Solution:
    """A Solution from what a backend knows: integers made whole, objective and gap computed one way for all."""
    if bound is not None and not abs(bound) < INFINITE:
        bound = None
    if values is None or termination not in (Termination.OPTIMAL, Termination.FEASIBLE):
        return Solution(termination, limit, None, None, bound, None, seconds, solver)
    values = np.clip(
        np.where(program.integer, np.round(values), values), program.lower, program.upper
    )
    objective = program.value(values)
    if bound is not None:
        bound = min(bound, objective)
    gap = None if bound is None else relative_gap(objective, bound)
    return Solution(termination, limit, values, objective, bound, gap, seconds, solver)


def relative_gap(objective: float, bound: float) -> float:
    """``|objective - bound| / |objective|``, 0 where they are equal."""
    return 0.0 if objective == bound else abs(objective - bound) / max(abs(objective), 1e-10)


def which(
    program: Program, limits: Limits, solve: Callable[[Program, Limits], Solution]
) -> Termination:
    """Settle a solver's "infeasible or unbounded": whether anything is feasible once nothing is optimised."""
    any_point = replace(program, objective=np.zeros(program.n_variables), offset=0.0)
    found = solve(any_point, limits).termination
    return Termination.UNBOUNDED if found in (Termination.OPTIMAL, Termination.FEASIBLE) else found


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Turn a failed import into SolverError with the command that mends it."""
    try:
        yield
    except ImportError as error:
        raise SolverError(
            f"the solver package {package} cannot be imported ({error}); install it with pip install {package}."
        ) from error
