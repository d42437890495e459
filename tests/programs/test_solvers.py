"""One contract for every solver: what ends a solve, what the values, bound and gap mean, and who is chosen."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knapsack_programs import knapsack
from scipy.sparse import csr_array

from onnx_oamip.core.errors import SettingsError, SolverError
from onnx_oamip.programs import Builder, Program, Rows, solvers
from onnx_oamip.programs.solvers import (
    Licence,
    Limit,
    Solution,
    SolverLimits,
    Termination,
    gurobi,
)
from onnx_oamip.programs.solvers.spec import run_interruptibly

EXACT = SolverLimits(gap=0.0)
INF = math.inf


def usable(name: str) -> bool:
    backend = solvers.BACKENDS[name]
    return importlib.util.find_spec(backend.package) is not None and backend.licence().usable


@pytest.fixture(params=list(solvers.BACKENDS))
def solver(request: pytest.FixtureRequest) -> str:
    if not usable(request.param):
        pytest.skip(f"{request.param} is not usable here")
    return str(request.param)


@pytest.fixture
def size_limited() -> None:
    if not usable("gurobi") or solvers.BACKENDS["gurobi"].licence().variables is None:
        pytest.skip("needs gurobipy with the size-limited licence of its wheel")


@pytest.fixture
def no_gurobi(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gurobipy" else known(name)
    )


def best_by_enumeration(program: Program) -> float:
    n = program.n_variables
    points = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
    held = points @ program.matrix.T.toarray()
    fits = ((held >= program.row_lower - 1e-9) & (held <= program.row_upper + 1e-9)).all(axis=1)
    return float((points @ program.objective)[fits].min(initial=INF)) + program.offset


def with_start(program: Program, start: np.ndarray) -> Program:
    return Program(**{**vars(program), "start": start})


def assert_consistent(program: Program, solution: Solution) -> None:
    assert solution.values is not None
    assert solution.objective == pytest.approx(program.value(solution.values), abs=1e-9)
    assert program.violation(solution.values) < 1e-5
    assert np.array_equal(
        solution.values[program.integer], np.round(solution.values[program.integer])
    )
    if solution.bound is not None:
        assert solution.bound <= solution.objective
        assert solution.gap == pytest.approx(
            solvers.relative_gap(solution.objective, solution.bound)
        )


# ------------------------------------------------------------------------------------------- what ends a solve


def test_optimal_within_gap(solver: str) -> None:
    program = knapsack(14, rows=3)
    solution = solvers.solve(program, EXACT, solver)
    assert (solution.termination, solution.limit, solution.solver) == (
        Termination.OPTIMAL,
        None,
        solver,
    )
    assert_consistent(program, solution)
    assert solution.objective == pytest.approx(best_by_enumeration(program))
    assert solution.gap == pytest.approx(0, abs=1e-9)
    assert solution.seconds > 0


def test_linear_program_has_bound_and_no_gap(solver: str) -> None:
    builder = Builder()
    v = builder.variables(2, 0, 4, objective=[-1.0, -2.0])
    builder.rows(1, (0, v, [1.0, 1.0]), upper=5)
    builder.offset = 100.0
    program = builder.build()
    solution = solvers.solve(program, EXACT, solver)
    assert solution.termination is Termination.OPTIMAL
    assert solution.objective == pytest.approx(91)
    assert (solution.bound, solution.gap) == (solution.objective, 0.0)


@pytest.mark.parametrize("integer", [False, True])
def test_infeasible_program_has_no_solution(solver: str, integer: bool) -> None:
    builder = Builder()
    v = builder.variables(2, 0, 1, objective=1.0, integer=integer)
    builder.rows(1, (0, v, 1.0), lower=3)
    solution = solvers.solve(builder.build(), EXACT, solver)
    assert (solution.termination, solution.limit) == (Termination.INFEASIBLE, None)
    assert solution.values is solution.objective is solution.gap is None
    assert not solution.has_values


@pytest.mark.parametrize("integer", [False, True])
def test_unbounded_program_is_reported(solver: str, integer: bool) -> None:
    builder = Builder()
    v = builder.variables(2, 0, INF, objective=-1.0, integer=integer)
    builder.rows(1, (0, v, [1.0, -1.0]), lower=-1)
    solution = solvers.solve(builder.build(), EXACT, solver)
    assert solution.termination is Termination.UNBOUNDED
    assert solution.values is None


def test_infeasible_program_with_unbounded_relaxation(solver: str) -> None:
    """Solvers may call this unbounded, or stop at "infeasible or unbounded": no whole v has 2.5 <= v <= 2.6."""
    builder = Builder()
    v = builder.variables(2, 0, INF, objective=-1.0, integer=True)
    builder.rows(1, (0, v[:1], 1.0), lower=2.5, upper=2.6)
    assert solvers.solve(builder.build(), EXACT, solver).termination is Termination.INFEASIBLE


def test_time_limit_leaves_incumbent_with_gap(solver: str) -> None:
    program = knapsack(200, rows=40)
    began = time.perf_counter()
    solution = solvers.solve(program, SolverLimits(time_s=0.5, gap=0.0), solver)
    assert time.perf_counter() - began < 5
    assert (solution.termination, solution.limit) == (Termination.FEASIBLE, Limit.TIME)
    assert_consistent(program, solution)
    assert solution.gap is not None
    assert 0 < solution.gap < 0.5


def test_time_limit_without_incumbent_has_no_solution(solver: str) -> None:
    """An equality knapsack with awkward coefficients: nothing feasible is found in a millisecond."""
    rng = np.random.default_rng(0)
    builder = Builder()
    v = builder.variables(60, 0, 1, objective=1.0, integer=True)
    weight = rng.integers(10**5, 10**6, (6, 60)).astype(float)
    side = weight[:, ::2].sum(axis=1)
    builder.rows(6, (np.arange(6)[:, None], v, weight), side, side)
    solution = solvers.solve(builder.build(), SolverLimits(time_s=1e-3), solver)
    assert (solution.termination, solution.limit) == (Termination.NO_SOLUTION, Limit.TIME)
    assert solution.values is None


def test_node_limit_ends_the_search(solver: str) -> None:
    solution = solvers.solve(knapsack(100, rows=20), SolverLimits(nodes=1, gap=0.0), solver)
    assert (solution.termination, solution.limit) == (Termination.FEASIBLE, Limit.NODE)


def test_solution_within_a_loose_gap_is_optimal(solver: str) -> None:
    solution = solvers.solve(knapsack(60, rows=5), SolverLimits(gap=0.2), solver)
    assert solution.termination is Termination.OPTIMAL
    assert solution.gap is not None
    assert solution.gap <= 0.2


@pytest.mark.parametrize(
    ("side", "ended"), [(0.0, Termination.OPTIMAL), (1.0, Termination.INFEASIBLE)]
)
def test_program_without_variables_is_solved(solver: str, side: float, ended: Termination) -> None:
    none = np.zeros(0)
    program = Program(
        none,
        none,
        none,
        none.astype(bool),
        csr_array((1, 0)),
        np.array([side]),
        np.array([INF]),
        3.0,
    )
    solution = solvers.solve(program, EXACT, solver)
    assert solution.termination is ended
    assert solution.objective == (3.0 if ended is Termination.OPTIMAL else None)


def test_program_without_rows_is_solved(solver: str) -> None:
    builder = Builder()
    builder.variables(
        (2, 2), -1, [2.0, 3.0], objective=[[1.0, -1.0], [-1.0, 1.0]], integer=[[True], [False]]
    )
    solution = solvers.solve(builder.build(), EXACT, solver)
    assert solution.values is not None
    assert solution.values.tolist() == [-1, 3, 2, -1]


def test_rows_of_every_kind_are_respected(solver: str) -> None:
    """Equal, below, above, two-sided, free."""
    builder = Builder()
    v = builder.variables(4, -10, 10, objective=[1.0, -1.0, 1.0, 1.0])
    builder.rows(
        5, ([0, 1, 2, 3, 4], v[[0, 1, 2, 3, 3]], 1.0), [3, -INF, 4, -2, -INF], [3, 5, INF, 6, INF]
    )
    solution = solvers.solve(builder.build(), EXACT, solver)
    assert solution.values is not None
    assert np.allclose(solution.values, [3, 5, 4, -2])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    items=st.integers(1, 9),
    rows=st.integers(0, 4),
    room=st.floats(0.05, 1.2),
)
def test_all_solvers_find_what_enumeration_finds(
    seed: int, items: int, rows: int, room: float
) -> None:
    program = knapsack(items, rows, seed, room)
    best = best_by_enumeration(program)
    names = [name for name in solvers.BACKENDS if usable(name)]
    assert names
    for name in names:
        solution = solvers.solve(program, EXACT, name)
        assert solution.objective == pytest.approx(best)


@pytest.mark.skipif(not all(map(usable, solvers.BACKENDS)), reason="needs every solver")
def test_solvers_agree_within_their_gaps() -> None:
    program = knapsack(120, rows=4, seed=3)
    found = [solvers.solve(program, SolverLimits(gap=0.01), name) for name in solvers.BACKENDS]
    best = min(s.objective for s in found if s.objective is not None)
    for solution in found:
        assert solution.bound is not None
        assert solution.bound <= best + 1e-6


# ----------------------------------------------------------------------------------------- start, determinism


def test_feasible_start_is_used(solver: str) -> None:
    program = knapsack(200, rows=40)
    good = solvers.solve(program, SolverLimits(gap=0.02), solver)
    assert good.values is not None
    # Any solution ends the second solve: without the start it would be the solver's first and worse one.
    again = solvers.solve(with_start(program, good.values), SolverLimits(gap=100.0), solver)
    assert again.objective is not None
    assert again.objective <= good.objective + 1e-9  # type: ignore[operator]


def test_partial_start_is_completed(solver: str) -> None:
    """Only the integer variables are proposed; the continuous one follows from them."""
    builder = Builder()
    take = builder.variables(30, 0, 1, integer=True, start=np.tile([1.0, 0.0], 15))
    slack = builder.variables(1, -INF, INF, objective=1.0)
    weight = np.random.default_rng(0).uniform(1, 2, 30)
    builder.rows(1, (0, np.append(take, slack), np.append(-weight, -1.0)), upper=0)
    program = builder.build()
    assert program.start is not None
    assert np.isnan(program.start[-1])
    solution = solvers.solve(program, EXACT, solver)
    assert solution.objective == pytest.approx(-weight.sum())


@pytest.mark.parametrize("start", [np.full(20, 1.0), np.full(20, 0.4), np.full(20, 7.0)])
def test_unusable_start_is_ignored(solver: str, start: np.ndarray) -> None:
    program = knapsack(20, rows=2)
    expected = solvers.solve(program, EXACT, solver)
    solution = solvers.solve(with_start(program, start), EXACT, solver)
    assert solution.objective == pytest.approx(expected.objective)


def test_same_program_gives_the_same_values(solver: str) -> None:
    limits = SolverLimits(gap=0.02, seed=5)
    first, second = (solvers.solve(knapsack(60, rows=5), limits, solver) for _ in range(2))
    assert np.array_equal(first.values, second.values)  # type: ignore[arg-type]
    assert first.bound == second.bound


def test_number_of_threads_may_change_between_solves(solver: str) -> None:
    program = knapsack(30, rows=3)
    found = [
        solvers.solve(program, SolverLimits(gap=0.0, threads=t), solver).objective
        for t in (1, 2, None, 2)
    ]
    assert found == pytest.approx([found[0]] * 4)


def test_solvers_print_nothing(solver: str, capfd: pytest.CaptureFixture[str]) -> None:
    solvers.solve(knapsack(40, rows=4), EXACT, solver)
    solvers.solve(with_start(knapsack(40, rows=4), np.ones(40)), EXACT, solver)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_handler_of_ctrl_c_stays_while_gurobi_optimises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler of its own loses a Ctrl-C that arrives while a solve starts. Only opening Gurobi takes one."""
    if not usable("gurobi"):
        pytest.skip("gurobi is not usable here")
    get = ctypes.pythonapi.PyOS_getsig
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    handler = get(signal.SIGINT)
    seen = []
    optimize = gurobi._optimize

    def watched(*arguments: object) -> None:
        work = threading.Thread(target=optimize, args=arguments)
        work.start()
        while work.is_alive():
            seen.append(get(signal.SIGINT))
            time.sleep(0.01)

    monkeypatch.setattr(gurobi, "_optimize", watched)
    solvers.solve(knapsack(200, 40), SolverLimits(time_s=1.0, gap=0.0), "gurobi")
    assert len(seen) > 10
    assert set(seen) == {handler}


def test_interrupt_stops_a_solve(solver: str) -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from knapsack_programs import knapsack\n"
        "from onnx_oamip.programs import solvers\n"
        "print('solving', flush=True)\n"
        f"try: solvers.solve(knapsack(200, 40), solvers.SolverLimits(gap=0.0), {solver!r})\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "solving\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.endswith("interrupted\n")  # Gurobi adds a line of its own before


def test_request_to_end_a_solve_is_repeated_until_it_ends() -> None:
    """A solver that has not started yet forgets a request."""
    ended = threading.Event()
    requests: list[float] = []

    def request() -> None:
        requests.append(time.monotonic())
        if len(requests) == 3:
            ended.set()

    def solve() -> None:
        time.sleep(0.5)  # the main thread waits by then
        signal.raise_signal(signal.SIGINT)
        ended.wait(30)

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(solve, request, name="a solver", instead="highs")
    assert len(requests) == 3


def test_ctrl_c_works_after_overlapping_solves(solver: str) -> None:
    """A handler that a solver puts in place while it works is gone behind the last of them."""

    def work(seconds: float) -> None:
        solvers.solve(knapsack(200, 40), SolverLimits(time_s=seconds, gap=0.0), solver)

    threads = [threading.Thread(target=work, args=(seconds,)) for seconds in (0.4, 0.8)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------------------------ cuts


def circle(values: np.ndarray) -> Rows | None:
    """The tangent that cuts a point outside the unit circle off."""
    norm = float(np.linalg.norm(values))
    if norm <= 1 + 1e-6:
        return None
    return Rows(csr_array((values / norm)[None]), np.array([-INF]), np.array([1.0]))


def plane(integer: bool = False) -> Program:
    builder = Builder()
    builder.variables(2, -2, 2, objective=[-1.0, -2.0], integer=integer)
    return builder.build()


def test_cuts_reach_the_optimum(solver: str) -> None:
    end = solvers.solve_with_cuts(plane(), EXACT, circle, solver)
    assert end.closed
    assert end.solution.termination is Termination.OPTIMAL
    assert end.solution.objective == pytest.approx(-math.sqrt(5), abs=1e-4)
    assert end.cuts == end.program.n_rows == end.rounds - 1


def test_cuts_on_whole_variables_reach_the_optimum(solver: str) -> None:
    end = solvers.solve_with_cuts(plane(integer=True), EXACT, circle, solver)
    assert end.closed
    assert end.solution.values is not None
    assert end.solution.values.tolist() == [0, 1]


def test_cuts_stop_at_the_limit_with_a_valid_bound(solver: str) -> None:
    end = solvers.solve_with_cuts(plane(), EXACT, circle, solver, max_rounds=3)
    assert not end.closed
    assert (end.solution.termination, end.solution.limit, end.rounds) == (
        Termination.FEASIBLE,
        Limit.ROUND,
        3,
    )
    assert end.solution.bound is not None
    assert -6 <= end.solution.bound <= -math.sqrt(5)
    end = solvers.solve_with_cuts(
        plane(), SolverLimits(time_s=1e-3), lambda v: time.sleep(0.01) or circle(v), solver
    )
    assert (end.closed, end.solution.limit, end.rounds) == (False, Limit.TIME, 1)


def test_cuts_can_prove_infeasible(solver: str) -> None:
    far = Rows(csr_array(np.array([[1.0, 0.0]])), np.array([3.0]), np.array([INF]))
    end = solvers.solve_with_cuts(plane(), EXACT, lambda _: far, solver)
    assert (end.closed, end.solution.termination, end.rounds) == (False, Termination.INFEASIBLE, 2)


# ------------------------------------------------------------------------------------------- which solver, and why


def test_program_over_the_licence_limit_is_refused(size_limited: None) -> None:
    program = knapsack(2001)
    with pytest.raises(
        SolverError,
        match=r"2,001 variables and 1 rows.*2,000 variables.*full licence.*`solver=highs`",
    ):
        solvers.solve(program, SolverLimits(), "gurobi")
    heard: list[str] = []
    solution = solvers.solve(program, SolverLimits(gap=0.01), "auto", heard.append)
    assert solution.solver == "highs"
    assert solution.has_values
    assert len(heard) == 1
    assert "2,001 variables" in heard[0]
    assert "2,001 variables" in solution.reason


def test_program_at_the_licence_limit_is_solved(size_limited: None) -> None:
    builder = Builder()
    v = builder.variables(2000, 0, 1, objective=-1.0, integer=True)
    builder.rows(2000, (np.arange(2000), v, 1.0), upper=0.5)
    assert solvers.solve(builder.build(), SolverLimits(), "auto").solver == "gurobi"
    builder.rows(1, (0, v[:1], 1.0), 0.1, 0.9)  # two-sided: two rows for Gurobi
    assert solvers.BACKENDS["gurobi"].rows(builder.build()) == 2002
    assert solvers.solve(builder.build(), SolverLimits(), "auto").solver == "highs"


def test_program_that_exceeds_the_licence_by_cuts_moves_to_highs(size_limited: None) -> None:
    builder = Builder()
    v = builder.variables(10, 0, 1, objective=-1.0, integer=True)
    program = builder.build()
    left = [Rows(csr_array(np.ones((2001, 10))), np.full(2001, -INF), np.full(2001, 4.0))]
    end = solvers.solve_with_cuts(program, SolverLimits(), lambda _: left.pop() if left else None)
    assert (end.solution.solver, end.solution.objective, len(v)) == ("highs", -4.0, 10)


def test_refusal_by_gurobi_is_reported(size_limited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver's refusal is one sentence, even if the size was counted wrongly before."""
    with pytest.raises(SolverError, match=r"2,001 variables.*`solver=highs`"):
        gurobi.solve(knapsack(2001), SolverLimits())


def test_auto_reports_the_chosen_solver_and_the_reason(solver: str) -> None:
    solution = solvers.solve(knapsack(5), EXACT)
    expected = next(name for name in solvers.BACKENDS if usable(name))
    assert solution.solver == expected
    assert f"{expected} takes it" in solution.reason
    assert solvers.solve(knapsack(5), EXACT, solver).reason == "as asked"


def test_missing_gurobi_is_reported(no_gurobi: None) -> None:
    heard: list[str] = []
    solution = solvers.solve(knapsack(5), EXACT, notify=heard.append)
    assert solution.solver == "highs"
    assert "gurobipy is not installed" in solution.reason
    with pytest.raises(SolverError, match="pip install gurobipy"):
        solvers.solve(knapsack(5), EXACT, "gurobi")
    record = solvers.available()[0]
    assert (record.name, record.installed, record.usable) == ("gurobi", False, False)
    assert record.licence == "not installed"


def test_missing_gurobi_licence_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dict(solvers.BACKENDS)
    without = Licence("none: no Gurobi license found", None, None, False)
    broken["gurobi"] = solvers.Backend(**{**vars(broken["gurobi"]), "licence": lambda: without})
    monkeypatch.setattr(solvers, "BACKENDS", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert solvers.solve(knapsack(5), EXACT).solver == "highs"
    with pytest.raises(SolverError, match=r"no usable licence.*full licence.*`solver=highs`"):
        solvers.solve(knapsack(5), EXACT, "gurobi")


def test_available_lists_every_solver() -> None:
    records = {r.name: r for r in solvers.available()}
    assert list(records) == ["gurobi", "highs", "scip"]
    for record in records.values():
        if record.installed:
            assert record.version
            assert record.licence
    if records["gurobi"].variables:
        assert records["gurobi"].licence == "size-limited: 2,000 variables, 2,000 rows"
    if records["highs"].installed:
        assert records["highs"].usable
        assert records["highs"].variables is None


def test_unknown_solver_is_refused() -> None:
    with pytest.raises(
        SettingsError, match="`solver='cplex'` is unknown; choose one of auto, gurobi, highs"
    ):
        solvers.solve(knapsack(3), EXACT, "cplex")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_s": 0.0}, "time limit is 0.0; expected more than 0"),
        ({"time_s": math.nan}, "time limit is nan"),
        ({"gap": -0.1}, "gap is -0.1; expected at least 0"),
        ({"threads": 0}, "threads is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"nodes": 0}, "nodes is 0"),
    ],
)
def test_limits_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SolverLimits(**values)


def test_solve_from_python_prints_nothing(solver: str) -> None:
    """Not even the banner that HiGHS prints once in a process, here while solves overlap in threads."""
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from knapsack_programs import knapsack\n"
        "from onnx_oamip.programs import solvers\n"
        "exact = solvers.SolverLimits(gap=0.0)\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        f"    found = list(pool.map(lambda n: solvers.solve(knapsack(n), exact, {solver!r}), range(5, 13)))\n"
        f"assert all(f.solver == {solver!r} and f.has_values for f in found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_imports_no_solver() -> None:
    code = "import sys, onnx_oamip.planning.budget_program; print({'gurobipy', 'highspy'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "set()\n"
    )


# -------------------------------------------------------------------------------------------------- the program


def parts() -> dict:
    return {
        "objective": np.zeros(2),
        "lower": np.zeros(2),
        "upper": np.ones(2),
        "integer": np.zeros(2, bool),
        "matrix": csr_array(np.ones((1, 2))),
        "row_lower": np.zeros(1),
        "row_upper": np.ones(1),
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lower": np.zeros(3)}, r"lower has shape \(3,\), expected \(2,\)"),
        ({"start": np.zeros(1)}, "start has shape"),
        ({"integer": np.zeros(2)}, "integer has dtype float64"),
        ({"matrix": csr_array(np.ones((1, 3)))}, "3 columns for 2 variables"),
        ({"matrix": csr_array(np.array([[1.0, np.nan]]))}, "coefficient that is not finite"),
        ({"objective": np.array([0.0, INF])}, r"objective\[1\] is not finite"),
        ({"offset": math.nan}, "the offset is nan"),
        ({"lower": np.array([0.0, 2.0])}, "variable 1 has lower 2.0 and upper 1.0"),
        ({"upper": np.array([1.0, np.nan])}, "variable 1 has"),
        (
            {"lower": np.array([INF, 0.0]), "upper": np.array([INF, 1.0])},
            "variable 0 has lower inf",
        ),
        ({"row_lower": np.array([2.0])}, "row 0 has lower 2.0 and upper 1.0"),
        ({"row_upper": np.ones(2)}, r"row_upper has shape \(2,\)"),
    ],
)
def test_program_is_validated(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Program(**{**parts(), **wrong})


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            lambda b: b.variables((2, 3), lower=np.zeros(2)),
            r"lower has shape \(2,\), which does not spread over",
        ),
        (lambda b: b.rows(2, (2, 0, 1.0)), "entry outside rows 0 to 1"),
        (
            lambda b: (b.rows(1, (0, 4, 1.0)), b.build()),
            "row 0 names a variable that is not one of the 0",
        ),
        (lambda b: b.rows(1, ([0, 0], [0, 1, 2], 1.0)), "shape mismatch"),
    ],
)
def test_builder_is_validated(add: Callable[[Builder], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(Builder())


def test_builder_assembles_blocks() -> None:
    builder = Builder()
    a = builder.variables((2, 2), 0, 1, objective=[1.0, 2.0], integer=True)
    b = builder.variables(1, -INF, objective=5.0, start=3.0)
    first = builder.rows(2, (np.arange(2)[:, None], a, 1.0), 1, 1)
    second = builder.rows(1, (0, [a[0, 0], a[0, 0], b[0]], [1.0, 2.0, -1.0]), upper=[7])
    program = builder.build()
    assert (a.tolist(), b.tolist(), first.tolist(), second.tolist()) == (
        [[0, 1], [2, 3]],
        [4],
        [0, 1],
        [2],
    )
    assert program.matrix.toarray().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [3, 0, 0, 0, -1]]
    assert program.objective.tolist() == [1, 2, 1, 2, 5]
    assert program.integer.tolist() == [True] * 4 + [False]
    assert (program.row_lower.tolist(), program.row_upper.tolist()) == ([1, 1, -INF], [1, 1, 7])
    assert program.start is not None
    assert np.isnan(program.start[:4]).all()
    assert program.violation(np.array([1, 0, 0.5, 0.5, 3])) == 0.5
    assert program.violation(np.array([1, 0, 0, 1, 3.0])) == 0
    assert program.value(np.array([1, 0, 0, 1, 3.0])) == 18


def test_rows_are_appended() -> None:
    program = Program(**parts())
    more = program.with_rows(
        Rows(csr_array(np.array([[2.0, 0.0]])), np.array([-INF]), np.array([1.0]))
    )
    assert (program.n_rows, more.n_rows) == (1, 2)
    assert more.matrix.toarray().tolist() == [[1, 1], [2, 0]]
    assert more.row_upper.tolist() == [1, 1]
