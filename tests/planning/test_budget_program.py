"""The budget program against enumeration, the counted cost of the written model, and its promises at the edges."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from graphs import build, load
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import csr_array

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import Coupling, Ints, Model
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.cost import (
    Ledger,
    OneOffCosts,
    Products,
    full_widths,
)
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.planning import budget_program
from onnx_oamip.planning.allocation import best_units
from onnx_oamip.planning.budget_program import (
    Ladder,
    LinearisedLimit,
    choose,
    fewest_units,
    multiplier,
)
from onnx_oamip.programs import solvers
from onnx_oamip.programs.products import reduce_costs
from onnx_oamip.programs.solvers import Solution, SolverLimits, Termination

EXACT = SolverLimits(time_s=60.0, gap=0.0)

NETS = {
    "dense": """(float[1,6] x) => (float[] y)
        <float[8,6] w1, float[8] b1, float[7,8] w2, float[5,7] w3, float[3,5] w4>
        { a = Gemm<transB=1>(x, w1, b1)  r = Relu(a)  b = Gemm<transB=1>(r, w2)  s = Relu(b)
          c = Gemm<transB=1>(s, w3)  t = Relu(c)  y = Gemm<transB=1>(t, w4) }""",
    "residual": """(float[2,3,5,5] x) => (float[] y)
        <float[6,3,3,3] w1, float[5,6,3,3] w2, float[6,5,3,3] w3, float[4,6,1,1] w4, float[3,4,1,1] w5>
        { a = Conv<pads=[1,1,1,1]>(x, w1)  r = Relu(a)  b = Conv<pads=[1,1,1,1]>(r, w2)  s = Relu(b)
          c = Conv<pads=[1,1,1,1]>(s, w3)  d = Add(a, c)  t = Relu(d)  e = Conv(t, w4)
          u = Relu(e)  y = Conv(u, w5) }""",
    "concat": """(float[1,3,4,4] x) => (float[] y)
        <float[4,3,3,3] w1, float[5,4,3,3] w2, float[6,9,3,3] w3, float[4,15,1,1] w4, float[2,4,1,1] w5>
        { a = Conv<pads=[1,1,1,1]>(x, w1)  b = Conv<pads=[1,1,1,1]>(a, w2)  c = Concat<axis=1>(a, b)
          d = Conv<pads=[1,1,1,1]>(c, w3)  e = Concat<axis=1>(c, d)  f = Conv(e, w4)  g = Relu(f)  y = Conv(g, w5) }""",
    "depthwise": """(float[1,3,6,6] x) => (float[] y)
        <float[6,3,1,1] w1, float[6,1,3,3] w2, float[8,6,1,1] w3, float[8,1,3,3] w4, float[4,8,1,1] w5>
        { a = Conv(x, w1)  b = Conv<group=6,pads=[1,1,1,1]>(a, w2)  c = Conv(b, w3)
          d = Conv<group=8,pads=[1,1,1,1]>(c, w4)  y = Conv(d, w5) }""",
    "flatten": """(float[1,2,6,6] x) => (float[] y)
        <float[5,2,3,3] w1, float[6,5,3,3] w2, float[7,24] w3, float[4,7] w4>
        { a = Conv(x, w1)  r = Relu(a)  b = Conv(r, w2)  s = Relu(b)  f = Flatten(s)
          c = Gemm<transB=1>(f, w3)  t = Relu(c)  y = Gemm<transB=1>(t, w4) }""",
}
BUDGETS = ({"macs"}, {"params"}, {"macs", "params"}, {"macs", "params", "bytes"})


@dataclass(frozen=True)
class CostLimits:
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None

    @property
    def values(self) -> dict[str, float]:
        limits = {"macs": self.macs, "params": self.params, "size": self.bytes}
        return {name: limit for name, limit in limits.items() if limit is not None}


@cache
def net(name: str) -> tuple[Model, Coupling, Ledger]:
    with TemporaryDirectory() as folder:
        model = load(build(NETS[name]), Path(folder))
    coupling = couple(model)
    return model, coupling, cost.ledger(model, coupling)


def random_ladder(full: Ints, seed: int, levels: int = 4, jagged: bool = False) -> Ladder:
    """Losses that fall with the width, or (jagged) anything, even below 0; a loss of 0 at full width."""
    rng = np.random.default_rng(seed)
    widths, losses = [], []
    for most in full:
        chosen = rng.choice(np.arange(1, most), min(levels - 1, most - 1), replace=False)
        widths.append(np.append(np.sort(chosen), most).astype(np.int64))
        count = len(widths[-1]) - 1
        loss = (
            rng.uniform(-0.2, 1, count) if jagged else np.cumsum(rng.exponential(size=count))[::-1]
        )
        losses.append(np.append(loss, 0.0))
    return Ladder(tuple(widths), tuple(losses))


def measured(ledger: Ledger, widths: Ints, line: LinearisedLimit) -> float:
    lengths = ledger.lengths(widths)
    return line.constant + float(
        (line.products.factor * lengths[line.products.axes].prod(axis=1)).sum()
    )


def fits(
    ledger: Ledger, widths: Ints, targets: CostLimits, extra: tuple[LinearisedLimit, ...] = ()
) -> bool:
    counted = ledger.cost(widths)
    met = [
        limit is None or getattr(counted, kind) <= limit for kind, limit in vars(targets).items()
    ]
    return all(met) and all(
        measured(ledger, widths, line) <= line.limit * (1 + 1e-9) for line in extra
    )


def enumerate_best(
    ledger: Ledger, ladder: Ladder, targets: CostLimits, extra: tuple[LinearisedLimit, ...] = ()
) -> float:
    best = math.inf
    for levels in itertools.product(*(range(len(w)) for w in ladder.widths)):
        loss = sum(float(c[level]) for c, level in zip(ladder.cost, levels, strict=True))
        if loss < best:
            widths = np.asarray(
                [w[level] for w, level in zip(ladder.widths, levels, strict=True)], np.int64
            )
            if fits(ledger, widths, targets, extra):
                best = loss
    return best


def loss_of(ladder: Ladder, widths: Ints) -> float:
    """Total loss; fails where a width is not on the ladder."""
    return sum(
        float(c[w.tolist().index(taken)])
        for w, c, taken in zip(ladder.widths, ladder.cost, widths, strict=True)
    )


def shares(before: cost.Cost, kinds: set[str], share: float) -> CostLimits:
    return CostLimits(**{kind: share * getattr(before, kind) for kind in kinds})


def usable(name: str) -> bool:
    backend = solvers.BACKENDS[name]
    return importlib.util.find_spec(backend.package) is not None and backend.licence().usable


@pytest.fixture(params=list(solvers.BACKENDS))
def solver(request: pytest.FixtureRequest) -> str:
    if not usable(request.param):
        pytest.skip(f"{request.param} is not usable here")
    return str(request.param)


# ---------------------------------------------------------------------------------------------- against enumeration


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kinds", BUDGETS, ids=lambda kinds: "+".join(sorted(kinds)))
@pytest.mark.parametrize("jagged", [False, True])
def test_optimum_matches_enumeration(name: str, kinds: set[str], jagged: bool, solver: str) -> None:
    _, coupling, ledger = net(name)
    full = full_widths(coupling)
    before = ledger.cost(full)
    for seed, share in enumerate((0.25, 0.5, 0.9)):
        ladder = random_ladder(full, seed, jagged=jagged)
        targets = shares(
            before, kinds, share if kinds != {"macs", "params", "bytes"} else max(share, 0.8)
        )
        best = enumerate_best(ledger, ladder, targets)
        if math.isinf(best):
            with pytest.raises(BudgetNotMet):
                choose(ledger, ladder, targets, (), solver=solver, solver_limits=EXACT)
            continue
        choice = choose(ledger, ladder, targets, (), solver=solver, solver_limits=EXACT)
        assert loss_of(ladder, choice.widths) == pytest.approx(best, abs=2e-6)
        assert fits(ledger, choice.widths, targets)
        assert choice.program["status"] == "optimal"
        assert choice.program["objective"] == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize("name", NETS)
def test_predicted_cost_equals_that_of_the_written_model(name: str) -> None:
    model, coupling, ledger = net(name)
    full = full_widths(coupling)
    targets = shares(ledger.cost(full), {"macs", "params"}, 0.6)
    choice = choose(ledger, random_ladder(full, 1), targets, solver_limits=EXACT)
    keep = best_units(coupling, np.random.default_rng(0).random(coupling.n_units), choice.widths)
    written = cost.count(models.from_proto(rewrite.cut(model, coupling, keep), model.bindings))
    predicted = ledger.cost(choice.widths)
    assert (written.macs, written.params) == (predicted.macs, predicted.params)
    assert written.macs < cost.count(model).macs


@st.composite
def ledgers(draw: st.DrawFn) -> tuple[Ledger, Ladder, LinearisedLimit]:
    """Any axes over up to four groups, any products of up to four of them: squares, concats, cubes, constants."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups, axes, terms = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    per_unit = rng.integers(1, 4, (axes, groups)) * (
        rng.random((axes, groups)) < draw(st.floats(0.1, 0.9))
    )
    fixed = rng.integers(0, 4, axes)

    def products(factor: np.ndarray) -> Products:
        return Products(factor, rng.integers(-1, axes, (len(factor), draw(st.integers(1, 4)))))

    ledger = Ledger(
        fixed=fixed,
        per_unit=csr_array(per_unit),
        macs=products(rng.integers(1, 9, terms)),
        params=products(rng.integers(1, 9, terms)),
        bytes=products(rng.integers(1, 9, terms)),
        overhead=int(rng.integers(0, 20)),
        batch=draw(st.sampled_from([1, 2, 7])),
        nodes=(),
    )
    full = rng.integers(1, 9, groups)
    if steps := draw(st.integers(0, 3)):
        members = rng.random((steps, groups)) < 0.6
        # Where a group's widest level is not its full width, the step is there whatever is chosen.
        most = full + (rng.random(groups) < 0.2)
        ledger = replace(
            ledger, one_off=OneOffCosts(members, most, *rng.integers(0, 60, (2, steps)))
        )
    ladder = random_ladder(full, int(rng.integers(1000)), levels=3, jagged=draw(st.booleans()))
    line = LinearisedLimit("latency", products(rng.random(terms)), 0.5, 0.0)
    most = measured(ledger, np.asarray([w[-1] for w in ladder.widths]), line)
    return ledger, ladder, replace(line, limit=most * draw(st.floats(0.2, 1.1)))


@settings(max_examples=40, deadline=None)
@given(case=ledgers(), share=st.floats(0.4, 1.1))
def test_first_point_of_the_program_is_the_greedy_plan(
    case: tuple[Ledger, Ladder, LinearisedLimit], share: float
) -> None:
    """The solution meets all rows, and has the plan's levels and its objective up to the terms that break ties."""
    ledger, ladder, _ = case
    full = np.asarray([w[-1] for w in ladder.widths])
    targets = shares(ledger.cost(full), {"macs", "params"}, share)
    budget = budget_program._Budget.of(ledger, ladder, targets, ())
    plan = budget_program._greedy(budget)
    assume(plan is not None)
    assert plan is not None
    formulation = budget_program._formulate(budget, plan)
    program = formulation.program
    point = program.start
    assert point is not None
    assert ((point >= program.lower) & (point <= program.upper)).all()
    rows = program.matrix @ point
    assert ((rows >= program.row_lower - 1e-9) & (rows <= program.row_upper + 1e-9)).all()
    np.testing.assert_array_equal(budget.level(point), plan)
    value = float(program.objective @ point + program.offset)
    expected = formulation.objective(budget, plan)
    ties = budget_program.TIE_BREAK * budget_program.MAGNITUDE
    assert value == pytest.approx(expected, rel=1e-9, abs=ties)


def test_any_ledger_matches_enumeration() -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=80, deadline=None)
    @given(
        case=ledgers(),
        share=st.floats(0.1, 1.1),
        kinds=st.sampled_from(BUDGETS),
        latency=st.booleans(),
    )
    def check(
        case: tuple[Ledger, Ladder, LinearisedLimit], share: float, kinds: set[str], latency: bool
    ) -> None:
        ledger, ladder, line = case
        before = ledger.cost(np.asarray([w[-1] for w in ladder.widths]))
        targets = shares(before, kinds, share)
        extra = (line,) if latency else ()
        best = enumerate_best(ledger, ladder, targets, extra)
        if math.isinf(best):
            outcomes["infeasible"] += 1
            with pytest.raises(BudgetNotMet):
                choose(ledger, ladder, targets, extra, solver="highs", solver_limits=EXACT)
            return
        outcomes["feasible"] += 1
        choice = choose(ledger, ladder, targets, extra, solver="highs", solver_limits=EXACT)
        assert fits(ledger, choice.widths, targets, extra)
        assert loss_of(ladder, choice.widths) == pytest.approx(best, abs=2e-5)

    check()
    assert outcomes["feasible"] > 0
    assert outcomes["infeasible"] > 0


# ------------------------------------------------------------------------------------------- fewest units in a loss


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("macs", [None, 150.0])
def test_fewest_units_within_a_loss_match_enumeration(seed: int, macs: float | None) -> None:
    _, coupling, ledger = net("dense")
    ladder = random_ladder(full_widths(coupling), seed)
    targets = CostLimits(macs=macs)
    allowed = float(np.random.default_rng(seed).uniform(1, 5))
    best = min(
        (
            sum(widths)
            for widths in itertools.product(*(w.tolist() for w in ladder.widths))
            if loss_of(ladder, np.asarray(widths)) <= allowed
            and fits(ledger, np.asarray(widths), targets)
        ),
        default=None,
    )
    if best is None:
        with pytest.raises(BudgetNotMet, match="no widths with a summed loss of at most"):
            choose(ledger, fewest_units(ladder, allowed), targets, solver_limits=EXACT)
        return
    found = choose(ledger, fewest_units(ladder, allowed), targets, solver_limits=EXACT)
    assert found.widths.sum() == best
    assert loss_of(ladder, found.widths) <= allowed
    assert fits(ledger, found.widths, targets)
    assert found.program["used"]["max_loss"] == pytest.approx(
        loss_of(ladder, found.widths) / allowed
    )


def test_loss_of_zero_keeps_what_costs_something() -> None:
    _, coupling, ledger = net("dense")
    ladder = random_ladder(full_widths(coupling), 0)
    found = choose(ledger, fewest_units(ladder, 0.0), CostLimits(), solver_limits=EXACT)
    assert (found.widths == full_widths(coupling)).all()


@pytest.mark.parametrize("seed", range(6))
def test_multiplier_solves_the_linear_relaxation(seed: int) -> None:
    """The bound is that of a linear program over the candidates, and lambda its dual value."""
    _, coupling, _ = net("residual")
    ladder = random_ladder(full_widths(coupling), seed)
    allowed = 0.3 * sum(float(losses[0]) for losses in ladder.cost)
    loss = np.concatenate(ladder.cost)
    group = np.repeat(np.arange(len(ladder.widths)), [len(w) for w in ladder.widths])
    one_each = (group == np.arange(len(ladder.widths))[:, None]).astype(float)
    reference = linprog(
        np.concatenate(ladder.widths), loss[None], [allowed], one_each, np.ones(len(one_each))
    )
    weight, units = multiplier(ladder, allowed)
    assert units == pytest.approx(reference.fun)
    assert weight == pytest.approx(-reference.ineqlin.marginals[0])
    assert multiplier(ladder, float("inf")) == (0.0, sum(int(w[0]) for w in ladder.widths))


@settings(max_examples=50, deadline=None)
@given(case=ledgers())
def test_polynomials_are_the_ledger(case: tuple[Ledger, Ladder, LinearisedLimit]) -> None:
    ledger, ladder, _ = case
    sums = [(p.factor.astype(float), p.axes) for p in (ledger.macs, ledger.params)]
    polynomials = reduce_costs(ledger.fixed, ledger.per_unit, sums)
    widths = np.asarray([w[0] for w in ladder.widths])

    def exact(at: np.ndarray) -> np.ndarray:
        lengths = np.append(ledger.fixed + ledger.per_unit @ at, 1)
        return np.asarray([(f * lengths[axes].prod(axis=1)).sum() for f, axes in sums])

    assert np.allclose(polynomials.values(widths), exact(widths), rtol=1e-12)
    step = 1e-5 * np.eye(len(widths))
    slopes = np.stack([(exact(widths + s) - exact(widths - s)) / 2e-5 for s in step], axis=1)
    assert np.allclose(polynomials.gradient(widths), slopes, rtol=1e-4, atol=1e-3)


def test_products_are_shared_between_terms_and_budgets() -> None:
    """MACs, parameters and bytes of a chain need the same three products: one set of variables for all."""
    _, coupling, ledger = net("dense")
    ladder = random_ladder(full_widths(coupling), 0)
    one = choose(ledger, ladder, CostLimits(macs=120), solver_limits=EXACT).program
    all_three = choose(
        ledger, ladder, CostLimits(macs=120, params=130, bytes=10**6), solver_limits=EXACT
    ).program
    # Thresholds; two products of 4 levels.
    assert one["variables"] == all_three["variables"] == 3 * 3 + 2 * 4
    assert all_three["rows"] == one["rows"] + 2


# ---------------------------------------------------------------------------------------------------- its promises


def test_without_limit_the_least_loss_is_chosen() -> None:
    _, coupling, ledger = net("residual")
    full = full_widths(coupling)
    choice = choose(ledger, random_ladder(full, 3), CostLimits())
    assert choice.widths.tolist() == full.tolist()
    assert choice.program["binding"] == []
    assert choice.program["gap"] == 0


def test_ties_are_broken_by_the_wider_plan(solver: str) -> None:
    """With no loss anywhere, the budget is used up as far as whole widths allow."""
    _, coupling, ledger = net("dense")
    full = full_widths(coupling)
    widths = tuple(np.arange(1, w + 1) for w in full)
    ladder = Ladder(widths, tuple(np.zeros(len(w)) for w in widths))
    limit = 0.5 * ledger.cost(full).macs
    chosen = ledger.cost(
        choose(
            ledger, ladder, CostLimits(macs=limit), (), solver=solver, solver_limits=EXACT
        ).widths
    ).macs
    every = [ledger.cost(np.asarray(w)).macs for w in itertools.product(*widths)]
    assert chosen == max(m for m in every if m <= limit)


def test_binding_limits_are_named() -> None:
    _, coupling, ledger = net("residual")
    full = full_widths(coupling)
    widths = tuple(np.arange(1, w + 1) for w in full)
    ladder = Ladder(widths, tuple(np.linspace(1, 0, len(w)) for w in widths))
    least = choose(ledger, ladder, CostLimits(macs=20_000), solver_limits=EXACT).widths
    reached = ledger.cost(least).macs
    program = choose(
        ledger, ladder, CostLimits(macs=reached, params=10_000, bytes=10**9), solver_limits=EXACT
    ).program
    assert program["binding"] == ["macs"]
    assert program["used"].keys() == {"macs", "params", "size"}
    assert program["used"]["params"] < 0.1


def test_latency_is_an_additional_limit(solver: str) -> None:
    """Seconds per multiply-accumulate that differ by layer shift the widths; the constant counts."""
    _, coupling, ledger = net("flatten")
    full = full_widths(coupling)
    rates = np.asarray([1e-9, 5e-8, 1e-9, 2e-9])
    products = Products(rates, ledger.macs.axes)
    line = LinearisedLimit("latency", products, 1e-6, 0.0)
    line = replace(line, limit=0.4 * measured(ledger, full, line))
    for seed in range(3):
        ladder = random_ladder(full, seed, levels=5)
        targets = CostLimits(macs=0.9 * ledger.cost(full).macs)
        choice = choose(ledger, ladder, targets, (line,), solver=solver, solver_limits=EXACT)
        assert fits(ledger, choice.widths, targets, (line,))
        best = enumerate_best(ledger, ladder, targets, (line,))
        assert loss_of(ladder, choice.widths) == pytest.approx(best, abs=2e-6)
        assert choice.program["used"]["latency"] <= 1 + 1e-9


def test_limit_is_met_exactly() -> None:
    """A limit that one combination meets exactly is met by it; one less is not."""
    _, coupling, ledger = net("dense")
    full = full_widths(coupling)
    ladder = Ladder(
        tuple(np.asarray([w // 2, w]) for w in full), tuple(np.asarray([1.0, 0.0]) for _ in full)
    )
    exact = ledger.cost(np.asarray([full[0], full[1], full[2] // 2])).macs
    others = [full[0] // 2, full[1], full[2]], [full[0], full[1] // 2, full[2]]
    assert all(ledger.cost(np.asarray(w)).macs != exact for w in others)
    for limit in (exact, exact + 0.5):
        assert (
            ledger.cost(
                choose(ledger, ladder, CostLimits(macs=limit), solver_limits=EXACT).widths
            ).macs
            <= limit
        )
    assert (
        ledger.cost(
            choose(ledger, ladder, CostLimits(macs=exact - 0.5), solver_limits=EXACT).widths
        ).macs
        < exact
    )


def test_solution_that_exceeds_a_limit_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that takes limits loosely: the plan still holds exactly."""
    _, coupling, ledger = net("residual")
    full = full_widths(coupling)
    ladder = random_ladder(full, 0)
    targets = shares(ledger.cost(full), {"macs", "params"}, 0.5)
    calls = []

    def loose(program: solvers.Program, *rest: object) -> Solution:
        calls.append(1)
        upper = np.where(
            np.isfinite(program.row_lower), program.row_upper, program.row_upper + 0.02
        )
        return solvers.solve(replace(program, row_upper=upper), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(budget_program, "solve", loose)
    found = 0
    for share in np.linspace(0.3, 0.9, 13):
        targets = shares(ledger.cost(full), {"macs", "params"}, float(share))
        calls.clear()
        choice = choose(ledger, ladder, targets, solver_limits=EXACT)
        assert fits(ledger, choice.widths, targets)
        found += len(calls) > 1
        assert choice.program["gap"] < 0.5 or len(calls) > 1
    assert found


def test_solver_that_never_meets_the_limit_falls_back_to_the_greedy_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each solve has narrower limits and what time is left; what is never met is said to be no optimum."""
    _, coupling, ledger = net("residual")
    full = full_widths(coupling)
    targets = replace(
        shares(ledger.cost(full), {"macs", "params"}, 0.5), bytes=2 * ledger.cost(full).bytes
    )
    ladder = random_ladder(full, 0)
    asked: list[tuple[np.ndarray, SolverLimits]] = []

    def wrong(program: solvers.Program, limits: SolverLimits, *_: object) -> Solution:
        asked.append((program.row_upper, limits))
        time.sleep(0.001)
        wide = np.ones(program.n_variables)  # every group as wide as can be
        return Solution(Termination.OPTIMAL, None, wide, None, 0.0, None, 1.0, "highs")

    monkeypatch.setattr(budget_program, "solve", wrong)
    choice = choose(ledger, ladder, targets, solver_limits=SolverLimits(time_s=30.0, gap=0.0))
    assert fits(ledger, choice.widths, targets)
    assert (choice.program["status"], choice.program["limit"]) == ("feasible", "numeric")
    assert len(asked) == budget_program.ATTEMPTS
    for (before, earlier), (after, later) in itertools.pairwise(asked):
        assert ((after < before).sum(), (after > before).sum()) == (2, 0)
        assert earlier.time_s is not None
        assert later.time_s is not None
        assert 1 <= later.time_s < earlier.time_s
        assert later.gap == 0
    # Two costs are twice as large as they may be: each is narrowed by twice that, and the third stays as it was.
    over = (asked[0][0] - asked[1][0])[asked[1][0] < asked[0][0]]
    np.testing.assert_allclose(over, 2.0, rtol=0.01)


def test_loss_over_its_bound_narrows_the_bound_by_twice_the_excess(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, coupling, ledger = net("dense")
    ladder = random_ladder(full_widths(coupling), 0)
    most = 0.5 * loss_of(ladder, np.asarray([w[0] for w in ladder.widths]))
    asked: list[np.ndarray] = []

    def wrong(program: solvers.Program, *_: object) -> Solution:
        asked.append(program.row_upper)
        narrow = np.zeros(
            program.n_variables
        )  # every group as narrow as can be, at twice the bound
        return Solution(Termination.OPTIMAL, None, narrow, None, 0.0, None, 1.0, "highs")

    monkeypatch.setattr(budget_program, "solve", wrong)
    choose(ledger, fewest_units(ladder, most), CostLimits(), solver_limits=EXACT)
    narrowed = asked[0] - asked[1]
    assert narrowed[narrowed != 0] == pytest.approx([2.0])


def test_solver_without_a_solution_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    _, coupling, ledger = net("dense")

    def late(*_: object) -> Solution:
        return Solution(
            Termination.NO_SOLUTION, solvers.Limit.TIME, None, None, 0.0, None, 7.4, "highs"
        )

    monkeypatch.setattr(budget_program, "solve", late)
    line = LinearisedLimit("latency", Products(np.ones(4), ledger.macs.axes), 0.0, 1.0)
    with pytest.raises(
        BudgetNotMet, match="found no widths within 7 s and its other limits; give it more time"
    ):
        choose(ledger, random_ladder(full_widths(coupling), 0), CostLimits(), (line,))


def test_time_limit_keeps_the_best_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a solution in time, the greedy plan is taken."""
    _, coupling, ledger = net("concat")
    full = full_widths(coupling)

    def late(*_: object) -> Solution:
        return Solution(
            Termination.NO_SOLUTION, solvers.Limit.TIME, None, None, 0.0, None, 1.0, "highs"
        )

    monkeypatch.setattr(budget_program, "solve", late)
    targets = shares(ledger.cost(full), {"macs"}, 0.5)
    choice = choose(ledger, random_ladder(full, 0), targets)
    assert fits(ledger, choice.widths, targets)
    assert (choice.program["status"], choice.program["limit"]) == ("feasible", "time")
    assert choice.program["gap"] == pytest.approx(1, abs=1e-5)


def _free_widenings(
    ledger: Ledger, ladder: Ladder, widths: Ints, targets: CostLimits
) -> list[tuple[int, int]]:
    """Groups with a wider candidate that loses no more and fits, with that width."""
    found = []
    for g, (candidates, losses) in enumerate(zip(ladder.widths, ladder.cost, strict=True)):
        at = candidates.tolist().index(widths[g])
        for place in range(at + 1, len(candidates)):
            wider = widths.copy()
            wider[g] = candidates[place]
            if losses[place] <= losses[at] and fits(ledger, wider, targets):
                found.append((g, int(candidates[place])))
    return found


def test_solution_is_widened_where_that_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver may return the narrowest of widths that are equally good."""
    _, coupling, ledger = net("dense")
    full = full_widths(coupling)
    ladder = Ladder(tuple(np.arange(1, w + 1) for w in full), tuple(np.full(w, 0.5) for w in full))
    targets = shares(ledger.cost(full), {"macs"}, 0.6)

    def narrow(program: solvers.Program, *_: object) -> Solution:
        nothing = np.zeros(program.n_variables)
        return Solution(Termination.OPTIMAL, None, nothing, None, 0.0, None, 1.0, "highs")

    monkeypatch.setattr(budget_program, "solve", narrow)
    monkeypatch.setattr(budget_program, "_greedy", lambda _: None)
    latency = LinearisedLimit("latency", Products(np.zeros(4), ledger.macs.axes), 0.0, 1.0)
    found = choose(ledger, ladder, targets, (latency,)).widths
    assert (found > 1).any()
    assert _free_widenings(ledger, ladder, np.ones_like(full), targets)
    assert not _free_widenings(ledger, ladder, found, targets)


def test_greedy_plan_takes_back_steps_that_cost_nothing() -> None:
    """A step that a later one makes unnecessary is taken back; some of these plans have such steps."""
    _, coupling, ledger = net("concat")
    full = full_widths(coupling)
    unpolished = 0
    for seed, share in itertools.product(range(8), (0.3, 0.5, 0.7)):
        ladder = random_ladder(full, seed)
        targets = shares(ledger.cost(full), {"macs", "params"}, share)
        budget = budget_program._Budget.of(ledger, ladder, targets, ())
        level = budget_program._greedy(budget)
        if level is None:
            continue
        assert fits(ledger, budget.widths(level), targets)
        assert not _free_widenings(ledger, ladder, budget.widths(level), targets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(budget_program, "_polish", lambda _, level: level)
            raw = budget_program._greedy(budget)
        assert raw is not None
        unpolished += bool(_free_widenings(ledger, ladder, budget.widths(raw), targets))
    assert unpolished


def test_greedy_steps_lose_least_for_what_they_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is that of an enumeration of all narrower widths of single groups."""
    monkeypatch.setattr(budget_program, "_polish", lambda _, level: level)
    _, coupling, ledger = net("concat")
    full = full_widths(coupling)
    steps = 0
    for seed in range(6):
        ladder = random_ladder(full, seed)
        target = shares(ledger.cost(full), {"params"}, 0.5)
        budget = budget_program._Budget.of(ledger, ladder, target, ())
        level = budget.widest.copy()
        while not budget.holds(level):
            before = budget.widths(level)
            saved = budget.costs.gradient(before)
            choices = [
                (
                    (ladder.cost[g][lower] - ladder.cost[g][level[g]])
                    / (float((saved / budget.scale[:, None])[0, g]) * (before[g] - width)),
                    g,
                    lower,
                )
                for g in range(len(full))
                for lower, width in enumerate(ladder.widths[g][: level[g]])
            ]
            _, group, lower = min(choices)
            level[group] = lower
            steps += 1
        np.testing.assert_array_equal(budget_program._greedy(budget), level)
    assert steps > 6


def test_infeasible_program_names_the_limit() -> None:
    _, coupling, ledger = net("dense")
    ladder = random_ladder(full_widths(coupling), 0)
    floor = ledger.cost(np.asarray([w[0] for w in ladder.widths]))
    with pytest.raises(BudgetNotMet, match=r"still over macs \(2\.00 times its limit\)") as caught:
        choose(ledger, ladder, CostLimits(macs=floor.macs / 2, params=10**6))
    assert caught.value.exit_code == 1
    with pytest.raises(BudgetNotMet, match="size"):
        choose(ledger, ladder, CostLimits(bytes=ledger.overhead / 2))
    line = LinearisedLimit("latency", Products(np.ones(4), ledger.macs.axes), 0.0, 1.0)
    with pytest.raises(BudgetNotMet, match="over latency"):
        choose(ledger, ladder, CostLimits(), (line,))


def test_program_record_is_json() -> None:
    _, coupling, ledger = net("concat")
    full = full_widths(coupling)
    program = choose(
        ledger, random_ladder(full, 0), shares(ledger.cost(full), {"macs"}, 0.5)
    ).program
    assert json.loads(json.dumps(program)) == program
    assert program["purpose"] == "budget"
    assert program.keys() >= {
        "purpose",
        "solver",
        "status",
        "gap",
        "seconds",
        "variables",
        "rows",
        "binding",
        "objective",
    }


def test_single_level_and_empty_ladders_are_supported() -> None:
    _, coupling, ledger = net("residual")
    full = full_widths(coupling)
    ladder = Ladder(tuple(np.asarray([w]) for w in full), tuple(np.zeros(1) for _ in full))
    assert choose(ledger, ladder, CostLimits(macs=10**9)).widths.tolist() == full.tolist()
    nothing = cost.ledger(net("residual")[0], Coupling(0, (), np.zeros(0, np.int64), {}, (), ()))
    assert choose(nothing, Ladder((), ()), CostLimits(macs=10**9)).widths.tolist() == []
    with pytest.raises(BudgetNotMet):
        choose(nothing, Ladder((), ()), CostLimits(macs=1))


@pytest.mark.parametrize(
    ("widths", "loss", "message"),
    [
        ([2, 2], [1.0, 0.0], r"widths \[2, 2\], expected 0 or more and ascending"),
        ([-1, 2], [1.0, 0.0], "expected 0 or more"),
        ([], [], "expected 0 or more"),
        ([1, 2], [1.0], "expected 2 finite numbers"),
        ([1, 2], [math.nan, 0.0], "expected 2 finite numbers"),
    ],
)
def test_ladder_is_validated(widths: list[int], loss: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ladder((np.asarray(widths, np.int64),), (np.asarray(loss, np.float64),))
    with pytest.raises(ValueError, match="1 groups have widths, 0 have losses"):
        Ladder((np.ones(1, np.int64),), ())


def test_infinite_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="the limit 'latency' is nan"):
        LinearisedLimit("latency", net("dense")[2].macs, 0.0, math.nan)


def test_ladder_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match="the ladder has 1 groups, the model 3"):
        choose(net("dense")[2], Ladder((np.ones(1, np.int64),), (np.zeros(1),)), CostLimits(macs=1))


# ------------------------------------------------------------------------------------------------------------- size


@pytest.mark.slow
def test_densenet_sized_program_is_solved_in_seconds() -> None:
    """120 groups of eight widths, every layer reading all before it in its block of 40: as DenseNet-121 does."""
    rng = np.random.default_rng(0)
    groups, block = 120, 40
    per_unit = np.zeros((2 * groups, groups), np.int64)
    for g in range(groups):
        per_unit[2 * g, g] = 1
        per_unit[2 * g + 1, g // block * block : g] = 1
    axes = np.stack([np.arange(0, 2 * groups, 2), np.arange(1, 2 * groups, 2)], axis=1)
    fixed = np.where(np.arange(2 * groups) % 2, 64, 0)
    products = Products(np.repeat([9 * 28 * 28, 9 * 14 * 14, 9 * 7 * 7], block), axes)
    empty = Products(np.zeros(0, np.int64), np.zeros((0, 1), np.int64))
    ledger = Ledger(fixed, csr_array(per_unit), products, empty, empty, 0, 1, ())
    widths = np.arange(4, 33, 4)
    ladder = Ladder(
        (widths,) * groups,
        tuple(rng.lognormal() * ((32 / widths) ** rng.uniform(1, 3) - 1) for _ in range(groups)),
    )
    targets = CostLimits(macs=0.5 * ledger.cost(np.full(groups, 32)).macs)
    program = choose(
        ledger, ladder, targets, solver="highs", solver_limits=SolverLimits(time_s=20.0, gap=1e-3)
    ).program
    assert program["gap"] < 0.01  # solved to 0.001 in 3 s on a quiet machine
    assert program["seconds"] < 25
