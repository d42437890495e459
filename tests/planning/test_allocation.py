"""Costs counted by hand, and plans: budgets met closely from below, alignment, thresholds, exclusions, refusals."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS
from graphs import NETS, build, load

from onnx_oamip.core.errors import BudgetNotMet, SettingsError
from onnx_oamip.core.records import (
    Budget,
    Cost,
    Coupling,
    Floats,
    Model,
    Plan,
    Scores,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple, exclude
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.importance import find
from onnx_oamip.planning import allocation, budget_program
from onnx_oamip.planning.budget_program import Choice, Ladder, LinearisedLimit
from onnx_oamip.programs.solvers import SolverLimits
from onnx_oamip.verification import latency

SHIPPED = sorted(p.stem for p in MODELS.glob("*.onnx"))

# Wide enough that 2 % of a budget is several units.
WIDE = {
    "wide-mlp": """(float[N,60] x) => (float[N,10] y)
    <float[60,120] w1, float[120] b1, float[120,80] w2, float[80] b2, float[80,10] w3> {
        a = Gemm(x, w1, b1)
        h = Relu(a)
        b = Gemm(h, w2, b2)
        r = Relu(b)
        y = MatMul(r, w3)
    }""",
    "wide-residual": """(float[N,3,8,8] x) => (float[N,10] y)
    <float[40,3,3,3] w1, float[48,40,3,3] w2, float[40,48,3,3] w3, float[40,1,3,3] w4, float[64,40,1,1] w5,
     float[64,10] w6> {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        h = Relu(a)
        b = Conv<pads = [1, 1, 1, 1]>(h, w2)
        r = Relu(b)
        c = Conv<pads = [1, 1, 1, 1]>(r, w3)
        s = Add(h, c)
        d = Conv<group = 40, pads = [1, 1, 1, 1]>(s, w4)
        e = Conv(d, w5)
        t = Relu(e)
        g = GlobalAveragePool(t)
        f = Flatten(g)
        y = MatMul(f, w6)
    }""",
}


def _plan(
    model: Model,
    coupling: Coupling,
    values: Floats | None = None,
    reserve: int = 0,
    **settings: object,
) -> Plan:
    """A plan by scores alone (the l2 norm unless given)."""
    asked = Settings.create(
        **{"allocate": "uniform", "align": 1, "importance": "l2", "refit": "none", **settings}
    )
    ledger = cost.ledger(model, coupling)
    scores = (
        find("l2").score(model, coupling, None, asked)
        if values is None
        else Scores("given", values)
    )
    limit = allocation.limits(asked.budget, ledger.cost(cost.full_widths(coupling)), reserve)
    steps = allocation.steps(model, coupling, asked.align, "cpu")
    return allocation.allocate(coupling, ledger, scores, limit, asked, step=steps)


def _full(model: Model, coupling: Coupling) -> tuple[int, int, int]:
    before = cost.ledger(model, coupling).cost(cost.full_widths(coupling))
    return before.macs, before.params, before.bytes


def _shipped(name: str) -> tuple[Model, Coupling]:
    model = models.load(MODELS / f"{name}.onnx")
    return model, couple(model)


def _assert_sound(coupling: Coupling, found: Plan) -> None:
    kept = [int(found.keep[g.units].sum()) for g in coupling.groups]
    assert kept == found.widths.tolist()
    assert min(kept) >= 1


# -------------------------------------------------------------------------------------------------- counted by hand

BY_HAND = {
    # name: macs, params, widths by first weight, macs then, params then
    "mlp": (
        6 * 12 + 12 * 10 + 10 * 4,
        6 * 12 + 12 + 12 * 10 + 10 + 10 * 4 + 4,
        {"w1": 6, "w2": 5},
        6 * 6 + 6 * 5 + 5 * 4,
        6 * 6 + 6 + 6 * 5 + 5 + 5 * 4 + 4,
    ),
    "cnn": (
        64 * 8 * 3 * 9 + 16 * 12 * 8 * 9 + 192 * 5,
        8 * 27 + 8 + 12 * 72 + 4 * 12 + 192 * 5 + 5,
        {"w1": 4, "w2": 6},
        64 * 4 * 3 * 9 + 16 * 6 * 4 * 9 + 96 * 5,
        4 * 27 + 4 + 6 * 36 + 4 * 6 + 96 * 5 + 5,
    ),
    "residual": (
        36 * 9 * (8 * 3 + 6 * 8 + 8 * 6) + 8 * 4,
        9 * (8 * 3 + 6 * 8 + 8 * 6) + 8 * 4,
        {"w1": 5, "w2": 2},
        36 * 9 * (5 * 3 + 2 * 5 + 5 * 2) + 5 * 4,
        9 * (5 * 3 + 2 * 5 + 5 * 2) + 5 * 4,
    ),
    # Six slots of two channels before the grouped convolution and six behind it, which its depthwise follower shares.
    "grouped": (
        36 * 12 * 3 + 36 * 12 * 6 * 9 + 36 * 12 * 9 + 16 * 4 * 12 * 9,
        12 * 3 + 12 * 6 * 9 + 12 + 12 * 9 + 4 * 12 * 9,
        {"w1": 3, "w2": 2},
        36 * 6 * 3 + 36 * 4 * 3 * 9 + 36 * 4 * 9 + 16 * 4 * 4 * 9,
        6 * 3 + 4 * 3 * 9 + 4 + 4 * 9 + 4 * 4 * 9,
    ),
    # Tokens x (embedding, three projections, output, head) and, per head of 4 channels, scores and mixtures.
    "attention": (
        5 * (6 * 12 + 4 * 12 * 12 + 12 * 4) + 2 * 3 * 5 * 5 * 4,
        6 * 12 + 4 * 12 * 12 + 12 * 4,
        {"we": 7, "wq": 3, "wv": 2},
        5 * (6 * 7 + 2 * 7 * 9 + 7 * 6 + 6 * 7 + 7 * 4) + 3 * 5 * 5 * (3 + 2),
        6 * 7 + 2 * 7 * 9 + 7 * 6 + 6 * 7 + 7 * 4,
    ),
}


@pytest.mark.parametrize("net", BY_HAND)
@pytest.mark.parametrize("batch", [1, 3])
def test_costs_equal_a_hand_count(tmp_path: Path, net: str, batch: int) -> None:
    macs, params, widths, macs_then, params_then = BY_HAND[net]
    # MACs are per sample, whatever the batch at which shapes are known.
    model = load(build(NETS[net]), tmp_path, {"N": batch})
    coupling = couple(model)
    assert _full(model, coupling)[:2] == (macs, params)
    by_name = {g.name: g for g in coupling.groups}
    assert set(by_name) == set(widths)
    keep = np.ones(coupling.n_units, bool)
    for name, width in widths.items():
        keep[by_name[name].units[width:]] = False
    predicted = cost.ledger(model, coupling).cost(
        np.asarray([widths[g.name] for g in coupling.groups])
    )
    assert (predicted.macs, predicted.params) == (macs_then, params_then)
    counted = cost.count(models.from_proto(rewrite.cut(model, coupling, keep), model.bindings))
    assert (counted.macs, counted.params) == (macs_then, params_then)


def test_transposed_convolution_cost_equals_a_hand_count(tmp_path: Path) -> None:
    model = load(
        build(
            "(float[N,3,5,5] x) => (float[] y) <float[3,8,2,2] w1, float[8,4,3,3] w2> {"
            " h = ConvTranspose<strides = [2, 2]>(x, w1)  y = ConvTranspose<group = 4>(h, w2) }"
        ),
        tmp_path,
    )
    # Every input value meets every kernel element of the outputs in its group.
    assert _full(model, couple(model))[0] == 25 * 3 * 8 * 4 + 100 * 8 * 4 * 9


def test_predicted_bytes_match_the_file(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-residual"]), tmp_path)
    coupling = couple(model)
    assert _full(model, coupling)[2] == pytest.approx(model.file_bytes, rel=0.01)
    found = _plan(model, coupling, macs=0.4)
    cut = rewrite.cut(model, coupling, found.keep)
    assert found.predicted.bytes == pytest.approx(cut.ByteSize(), rel=0.01)


# --------------------------------------------------------------------------------------------------------- budgets


@pytest.fixture(scope="module", params=[*WIDE, *SHIPPED])
def coupled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, Coupling]:
    if request.param in WIDE:
        model = load(build(WIDE[request.param]), tmp_path_factory.mktemp("wide"))
        return model, couple(model)
    return _shipped(request.param)


def test_shipped_models_exist() -> None:
    assert SHIPPED


@pytest.mark.parametrize("allocate", ["uniform", "global"])
@pytest.mark.parametrize("budget", ["macs", "params", "size"])
def test_budgets_are_met_within_two_percent(
    coupled: tuple[Model, Coupling], allocate: str, budget: str
) -> None:
    model, coupling = coupled
    before = dict(zip(("macs", "params", "size"), _full(model, coupling), strict=True))
    for share in (0.3, 0.5, 0.8):
        found = _plan(model, coupling, allocate=allocate, **{budget: share})
        _assert_sound(coupling, found)
        after = {
            "macs": found.predicted.macs,
            "params": found.predicted.params,
            "size": found.predicted.bytes,
        }
        assert 0.98 * share <= after[budget] / before[budget] <= share


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_several_budgets_are_met_together(coupled: tuple[Model, Coupling], allocate: str) -> None:
    model, coupling = coupled
    macs, params, size = _full(model, coupling)
    for shares in ({"macs": 0.6, "params": 0.4}, {"macs": 0.3, "params": 0.9, "size": 0.8}):
        found = _plan(model, coupling, allocate=allocate, **shares)
        _assert_sound(coupling, found)
        kept = {
            "macs": found.predicted.macs / macs,
            "params": found.predicted.params / params,
            "size": found.predicted.bytes / size,
        }
        assert all(kept[name] <= share for name, share in shares.items())
        # The tightest one is used up; the others may have room.
        assert max(kept[name] / share for name, share in shares.items()) >= 0.98


@pytest.mark.parametrize("share", [0.99, 1.0])
def test_all_units_stay_if_the_budget_allows(coupled: tuple[Model, Coupling], share: float) -> None:
    model, coupling = coupled
    found = _plan(model, coupling, macs=share)
    assert (found.predicted.macs == _full(model, coupling)[0]) == (share == 1.0)
    assert found.keep.all() == (share == 1.0)


def test_uniform_keeps_the_same_share_of_every_group(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    found = _plan(model, coupling, macs=0.5)
    shares = found.widths / cost.full_widths(coupling)
    assert np.ptp(shares) <= 0.03


def test_global_removes_from_the_group_with_low_scores(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.ones(coupling.n_units)
    # Relative to its group's mean, half of the first group is worth nothing and the second group is all alike.
    first = coupling.groups[0].units
    values[first[: len(first) // 2]] = 1e-3
    found = _plan(model, coupling, values, allocate="global", macs=0.6)
    # 60 % of 17,600: 140 for each unit of the first group, 800 for the rest.
    assert found.widths.tolist() == [69, 80]
    assert found.keep[first[60:]].all()


def test_highest_scoring_units_of_a_group_are_kept(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.random.default_rng(0).permutation(coupling.n_units).astype(np.float64)
    found = _plan(model, coupling, values, macs=0.5)
    assert len(coupling.groups) > 1
    for g, group in enumerate(coupling.groups):
        best = group.units[np.argsort(-values[group.units])[: found.widths[g]]]
        np.testing.assert_array_equal(
            np.flatnonzero(found.keep[group.units]), np.sort(best - group.units[0])
        )


def test_ties_are_broken_by_the_lower_index(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    found = _plan(model, coupling, np.ones(coupling.n_units), macs=0.5)
    assert len(coupling.groups) > 1
    for g, group in enumerate(coupling.groups):
        np.testing.assert_array_equal(
            np.flatnonzero(found.keep[group.units]), np.arange(found.widths[g])
        )


def test_budget_reserves_parameters_for_new_biases(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    params = _full(model, coupling)[1]
    found = _plan(model, coupling, params=0.5, reserve=200)
    assert found.predicted.params <= 0.5 * params - 200
    assert found.predicted.params >= 0.98 * (0.5 * params - 200)


# ------------------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("align", [4, 8, 16])
@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_widths_are_multiples_of_the_alignment(
    coupled: tuple[Model, Coupling], allocate: str, align: int
) -> None:
    model, coupling = coupled
    found = _plan(model, coupling, allocate=allocate, macs=0.6, align=align)
    _assert_sound(coupling, found)
    assert found.predicted.macs <= 0.6 * _full(model, coupling)[0]
    narrowed = 0
    for group, width in zip(coupling.groups, found.widths.tolist(), strict=True):
        if width < len(group.units):
            narrowed += 1
            for held in group.multiplicity.values():
                assert width * held % align == 0
    assert narrowed


def test_alignment_counts_channels_of_units_with_several(tmp_path: Path) -> None:
    model = load(build(NETS["grouped"]), tmp_path)
    coupling = couple(model)
    assert [g.name for g in coupling.groups] == ["w1", "w2"]
    # Slots behind the grouped convolution hold two channels everywhere: a step of 4 channels is two of them, of 3
    # channels three. Those in front hold one column of its weight, which is to be aligned as well.
    for align, step in ((1, 1), (2, 1), (3, 3), (4, 2), (6, 3), (8, 4)):
        assert allocation.steps(model, coupling, align, "cpu").tolist() == [align, step]


def test_alignment_larger_than_a_group_keeps_it_whole(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    found = _plan(model, coupling, macs=0.9, align=100)
    assert found.widths.tolist() == [100, 80]
    with pytest.raises(BudgetNotMet):
        _plan(model, coupling, macs=0.5, align=200)


# ------------------------------------------------------------------------------------- least widths and thresholds


def test_every_group_keeps_a_unit(coupled: tuple[Model, Coupling]) -> None:
    model, coupling = coupled
    ledger = cost.ledger(model, coupling)
    least = ledger.cost(np.ones(len(coupling.groups), np.int64))
    macs = _full(model, coupling)[0]
    for allocate in ("uniform", "global"):
        # A budget that only the narrowest model meets.
        found = _plan(model, coupling, allocate=allocate, macs=(least.macs + 0.5) / macs)
        assert found.widths.tolist() == [1] * len(coupling.groups)
        _assert_sound(coupling, found)


def test_unreachable_budget_is_refused(coupled: tuple[Model, Coupling]) -> None:
    model, coupling = coupled
    ledger = cost.ledger(model, coupling)
    least = ledger.cost(np.ones(len(coupling.groups), np.int64))
    share = (least.macs - 0.5) / _full(model, coupling)[0]
    with pytest.raises(BudgetNotMet) as caught:
        _plan(model, coupling, macs=share, params=1.0)
    text = str(caught.value)
    assert caught.value.exit_code == 1
    assert "\n" not in text
    assert text.startswith("the `macs` budget cannot be met")
    # It says what binds and names groups by their weights.
    assert any(g.name in text for g in coupling.groups)
    lengths = ledger.lengths(np.ones(len(coupling.groups), np.int64))
    order = np.argsort(-ledger.terms(ledger.macs, lengths), kind="stable")
    assert ledger.nodes[order[0]] in text
    listed = {name for i in order[:3] for name in ledger.inputs[i]}
    pinned = [p for p in coupling.pinned if p.count > 1]
    reasons = {p.reason for p in pinned if p.tensor in listed} or {p.reason for p in pinned}
    reported = "channels there cannot go, for example because "
    assert any(
        f"{reported}{why}; the least that can be met is `macs=0.0" in text for why in reasons
    )
    assert text.endswith("; ask for more or see 'onnx-oamip inspect'.")


def test_refusal_names_the_alignment_that_binds(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    with pytest.raises(
        BudgetNotMet, match=r"it can be met without `align=64`, that is with `align=1`\.$"
    ):
        _plan(model, coupling, macs=0.1, align=64)
    with pytest.raises(BudgetNotMet, match=r"without `floor=0.5` and `align=64`, that is with"):
        _plan(model, coupling, macs=0.1, align=64, floor=0.5)
    with pytest.raises(BudgetNotMet, match=r"it can be met without `floor=0.5`\.$"):
        _plan(model, coupling, macs=0.1, floor=0.5)


def test_program_without_widths_names_what_keeps_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise BudgetNotMet("the solver found no widths.")

    monkeypatch.setattr(allocation, "choose", none)
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    ledger = cost.ledger(model, coupling)
    full = cost.full_widths(coupling)
    scores = Scores("given", np.zeros(coupling.n_units))

    def refusal(align: int) -> str:
        asked = Settings.create(macs=0.5, allocate="mip", align=align, floor=0.25)
        limit = allocation.limits(asked.budget, ledger.cost(full), 0)
        with pytest.raises(BudgetNotMet) as caught:
            allocation.allocate(
                coupling,
                ledger,
                scores,
                limit,
                asked,
                step=np.full_like(full, align),
                ladder=_losses(full.tolist()),
            )
        return str(caught.value)

    reason = "the solver found no widths; what keeps widths up: `floor=0.25`"
    assert refusal(4) == f"{reason}, `align=4`."
    assert refusal(1) == f"{reason}."


def test_refusal_names_what_was_excluded(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = exclude(model, couple(model), ("w1", "w2"))
    with pytest.raises(
        BudgetNotMet, match=r"; `exclude=.*` keeps channels that could go; ask for more"
    ):
        _plan(model, coupling, macs=0.1, exclude=("w1", "w2"))


def test_refusal_gives_no_reason_where_nothing_is_pinned(tmp_path: Path) -> None:
    """Input and output have one channel each."""
    text = """(float[N,1] x) => (float[N,1] y) <float[1,8] w1, float[8,1] w2> {
        h = MatMul(x, w1)
        r = Relu(h)
        y = MatMul(r, w2)
    }"""
    model = load(build(text), tmp_path)
    with pytest.raises(BudgetNotMet, match=r"most MACs then are in .* %\); the least") as caught:
        _plan(model, couple(model), macs=0.1)
    assert "because" not in str(caught.value)


def test_plan_without_a_program_records_none(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    assert _plan(model, couple(model), macs=0.5).programs == ()


def test_widths_are_rounded_down_to_the_step_unless_full() -> None:
    widths, step, full = np.asarray([[7, 5, 9, 3], [4, 4, 3, 1], [7, 8, 10, 3]])
    assert allocation._snap(widths, step, full).tolist() == [7, 4, 9, 3]


def test_trade_records_loss_and_multiplier_of_the_widths_taken() -> None:
    """Widths above the ceiling belong to no bound; between two candidates the loss is interpolated."""
    candidates = (np.asarray([1, 3, 5]), np.asarray([2, 4]))
    losses = (np.asarray([6.0, 2.0, 0.0]), np.asarray([4.0, 0.0]))
    ladder = Ladder(candidates, losses)
    allowed = Ladder((candidates[0][:2], candidates[1]), (losses[0][:2], losses[1]))
    found = allocation._trade(ladder, np.asarray([3, 4]), np.asarray([2, 4]), 5.0)
    weight, units = budget_program.multiplier(allowed, 5.0)
    assert weight > 0
    assert found == {
        "max_loss": 5.0,
        "loss": 4.0,
        "lambda": weight,
        "units": 6,
        "least_units": units,
    }


def test_refusal_gives_the_reason_of_the_heaviest_nodes(tmp_path: Path) -> None:
    """A state that is an input pins nearly all MACs; the vocabulary of the embedding, pinned too, costs none."""
    step = """(int64[N] ids, float[N,64] state) => (float[N,64] next)
    <float[30,8] table, float[8,64] w, float[64,64] u> {
        e = Gather(table, ids)
        x = MatMul(e, w)
        h = MatMul(state, u)
        s = Add(x, h)
        next = Tanh(s)
    }"""
    model = load(build(step), tmp_path)
    coupling = couple(model)
    reasons = {p.tensor: p.reason for p in coupling.pinned if p.tensor != "u"}
    assert "picks from it at run time" in reasons["table"]
    with pytest.raises(BudgetNotMet, match=r"for example because .*a graph input \(state\)"):
        _plan(model, coupling, macs=0.5)


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_threshold_keeps_units_at_or_above_it(tmp_path: Path, allocate: str) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.concatenate([np.linspace(0, 1, 120), np.linspace(0, 0.1, 80)])
    found = _plan(model, coupling, values, allocate=allocate, threshold=0.5)
    np.testing.assert_array_equal(found.keep[:120], values[:120] >= 0.5)
    # Nothing in the second group reaches it: the best one stays all the same.
    assert np.flatnonzero(found.keep[120:]).tolist() == [79]
    everything = _plan(model, coupling, values, allocate=allocate, threshold=0.0)
    assert everything.keep.all()


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_threshold_and_budget_hold_together(tmp_path: Path, allocate: str) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.concatenate([np.linspace(0, 1, 120), np.linspace(0, 1, 80)])
    found = _plan(model, coupling, values, allocate=allocate, threshold=0.25, macs=0.3)
    assert (values[found.keep] >= 0.25).all()
    assert found.predicted.macs <= 0.3 * _full(model, coupling)[0]


def test_threshold_with_alignment_rounds_down(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.concatenate([np.linspace(0, 1, 120), np.linspace(0, 1, 80)])
    found = _plan(model, coupling, values, threshold=0.5, align=8)
    assert found.widths.tolist() == [56, 40]  # 60 and 40 reach it


# -------------------------------------------------------------------------------------------- widths from a program


@dataclass(frozen=True)
class _Asked:
    """One call of the budget program."""

    ladder: Ladder
    extra: tuple[LinearisedLimit, ...]
    solver: str
    limits: SolverLimits
    taken: list[int]


def _losses(full: list[int], scale: tuple[float, ...] = (1.0, 3.0)) -> Ladder:
    """Every width of every group, with losses that fall ever slower."""
    widths = tuple(np.arange(1, n + 1) for n in full)
    return Ladder(
        widths, tuple(a * (1 - w / n) ** 2 for a, w, n in zip(scale, widths, full, strict=True))
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[_Asked]:
    calls: list[_Asked] = []

    def choose(ledger: cost.Ledger, ladder: Ladder, *args: Any, **named: Any) -> Choice:
        found = budget_program.choose(ledger, ladder, *args, **named)
        calls.append(
            _Asked(ladder, args[1], named["solver"], named["solver_limits"], found.widths.tolist())
        )
        return found

    monkeypatch.setattr(allocation, "choose", choose)
    return calls


def _programmed(
    model: Model,
    coupling: Coupling,
    ladder: Ladder,
    extra: tuple[LinearisedLimit, ...] = (),
    align: int = 1,
    values: Floats | None = None,
    **settings: Any,
) -> Plan:
    wanted = Settings.create(**{"solver": "highs", "align": align, "refit": "none", **settings})
    ledger = cost.ledger(model, coupling)
    limit = allocation.limits(wanted.budget, ledger.cost(cost.full_widths(coupling)), 0)
    scores = Scores(
        "given", np.arange(coupling.n_units, dtype=np.float64) if values is None else values
    )
    steps = allocation.steps(model, coupling, align, "cpu")
    return allocation.allocate(
        coupling, ledger, scores, limit, wanted, step=steps, ladder=ladder, extra=extra
    )


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("shape", ["flat", "steep"])
def test_programs_over_rungs_find_the_best_of_all_widths(
    shape: str, share: float, tmp_path: Path
) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    ladder = _losses([120, 80])
    if shape == "steep":  # losses over many orders of magnitude, as measured ones are
        fall = [np.exp(-rate * (w - 1)) for w, rate in zip(ladder.widths, (0.1, 0.12), strict=True)]
        ladder = Ladder(ladder.widths, tuple(f - f[-1] for f in fall))
    found = _programmed(model, coupling, ladder, macs=share)
    first, second = np.meshgrid(*ladder.widths, indexing="ij")
    macs = 60 * first + first * second + 10 * second
    total = ladder.cost[0][:, None] + ladder.cost[1][None]
    best = total[macs <= share * macs[-1, -1]].min()
    assert total[found.widths[0] - 1, found.widths[1] - 1] <= 1.005 * best


def test_programs_after_the_first_look_around_the_widths_taken(
    tmp_path: Path, asked: list[_Asked]
) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    ladder = _losses([120, 80])
    found = _programmed(model, coupling, ladder, macs=0.4, solver="highs", time_limit=31.0, seed=5)
    _assert_sound(coupling, found)
    coarse, *finer = asked
    for widths, n in zip(coarse.ladder.widths, (120, 80), strict=True):
        assert len(widths) == allocation.RUNGS
        assert (widths[0], widths[-1]) == (1, n)
        assert np.ptp(np.diff(widths)) <= 1
    assert 1 <= len(finer) <= allocation.ROUNDS
    for before, after in itertools.pairwise(asked):
        for taken, near, n in zip(before.taken, after.ladder.widths, (120, 80), strict=True):
            distances = np.unique(np.abs(near - taken))
            assert distances.tolist() == [0, 1, 2, 3, 4, 9, 27, 81][: len(distances)]
            # Far moves in both directions: the largest power of three that fits.
            assert taken - near[0] >= (taken - 1) / 3
            assert near[-1] - taken >= (n - taken) / 3
    losses = [program["objective"] for program in found.programs]
    assert min(losses) == pytest.approx(losses[-1], rel=1e-3)
    for call in asked:
        assert call.solver == "highs"
        assert call.limits == SolverLimits(time_s=31.0, gap=1e-3, seed=5)
        for g, widths in enumerate(call.ladder.widths):
            np.testing.assert_array_equal(call.ladder.cost[g], ladder.cost[g][widths - 1])
    # The report is about the plan, which fills the budget that the rungs left.
    assert found.allocation == "mip"
    assert {p["purpose"] for p in found.programs} == {"budget"}
    assert found.programs[-1]["used"] == {
        "macs": pytest.approx(found.predicted.macs / (0.4 * 17600), abs=1e-12)
    }
    assert found.programs[-1]["binding"] == ["macs"]
    assert (found.widths >= asked[-1].taken).all()
    ledger = cost.ledger(model, coupling)
    for wider in found.widths + np.eye(2, dtype=np.int64):
        assert (wider > [120, 80]).any() or ledger.cost(wider).macs > 0.4 * 17600


def test_few_widths_need_one_program_only(tmp_path: Path, asked: list[_Asked]) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    few = Ladder(
        (np.array([10, 60, 120]), np.arange(69, 81)),
        (np.array([2.0, 1.0, 0.0]), np.linspace(1, 0, 12)),
    )
    found = _programmed(model, coupling, few, params=0.6)
    assert len(found.programs) == len(asked) == 1
    for given, widths in zip(few.widths, asked[0].ladder.widths, strict=True):
        np.testing.assert_array_equal(given, widths)


def test_group_of_few_widths_leaves_further_programs_to_the_others(
    tmp_path: Path, asked: list[_Asked]
) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    wide = _losses([120, 80])
    mixed = Ladder((wide.widths[0], np.array([20, 80])), (wide.cost[0], np.array([1.0, 0.0])))
    found = _programmed(model, coupling, mixed, macs=0.4)
    assert len(found.programs) == len(asked) > 1
    assert len(asked[0].ladder.widths[0]) == allocation.RUNGS


def test_measured_step_holds_for_channels_of_convolutions(tmp_path: Path) -> None:
    """Also where another layer reads them, and for no group that only other layers have."""
    convolved = load(build(WIDE["wide-residual"]), tmp_path)
    groups = couple(convolved)
    assert any("w6" in {tensor for tensor, _ in g.multiplicity} for g in groups.groups)
    assert allocation.steps(convolved, groups, "auto", "cpu", known=8).tolist() == [8, 8, 8]
    dense = load(build(WIDE["wide-mlp"]), tmp_path)
    assert allocation.steps(dense, couple(dense), "auto", "cpu", known=8).tolist() == [1, 1]


def test_ends_of_a_ladder_can_be_chosen(tmp_path: Path, asked: list[_Asked]) -> None:
    """All of one group is worth the most, all of the other nothing: what is taken has a neighbour on one side only."""
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    ladder = _losses([120, 80], (1e-6, 1.0))
    found = _programmed(model, coupling, ladder, params=0.2)
    assert found.widths[0] < 40
    assert found.widths[1] == 80
    assert asked[1].ladder.widths[1][-1] == 80


@pytest.mark.parametrize("align", [1, 8])
def test_program_stays_within_the_threshold_widths(tmp_path: Path, align: int) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.concatenate([np.linspace(0, 1, 120), np.linspace(0, 1, 80)])
    widths = tuple(np.arange(align, n + 1, align) for n in (120, 80))
    ladder = Ladder(widths, tuple(1 - w / w[-1] for w in widths))
    found = _programmed(
        model, coupling, ladder, align=align, values=values, threshold=0.5, macs=0.9
    )
    assert found.widths.tolist() == ([60, 40] if align == 1 else [56, 40])
    assert (values[found.keep] >= 0.5).all()


def test_measured_limit_is_passed_to_every_program(tmp_path: Path, asked: list[_Asked]) -> None:
    """Nothing is filled then: counted limits say nothing of what was measured."""
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    ledger = cost.ledger(model, coupling)
    line = LinearisedLimit("latency", ledger.macs, 10.0, 0.5 * 17600)
    found = _programmed(model, coupling, _losses([120, 80]), (line,), params=0.9)
    assert found.predicted.macs + 10 <= 0.5 * 17600
    assert len(asked) >= 2
    assert all(call.extra == (line,) for call in asked)
    assert found.widths.tolist() == asked[-1].taken
    assert found.predicted.params < 0.7 * _full(model, coupling)[1]
    assert set(found.programs[-1]["used"]) == {"params", "latency"}


def test_floors_apply_per_group(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    ledger = cost.ledger(model, coupling)
    wanted = Settings.create(allocate="global", align=1, refit="none", macs=0.5, floor=0.1)
    limit = allocation.limits(wanted.budget, ledger.cost(cost.full_widths(coupling)), 0)
    values = np.concatenate([np.ones(120), 1 + np.arange(80.0)])
    steps = np.ones(2, np.int64)
    plan = allocation.allocate(
        coupling,
        ledger,
        Scores("given", values),
        limit,
        wanted,
        step=steps,
        floor=np.array([0.1, 0.9]),
    )
    assert plan.widths[1] >= 72
    with pytest.raises(BudgetNotMet, match=r"it can be met without `floor=0\.1`\.$"):
        allocation.allocate(
            coupling,
            ledger,
            Scores("given", values),
            limit,
            wanted,
            step=steps,
            floor=np.array([0.9, 0.9]),
        )


def test_alpha_rule_removes_units_regardless_of_budget(tmp_path: Path) -> None:
    """Scores of 0 are what the rules of NNrelief took: no budget brings them back, and no step takes more."""
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.concatenate([np.repeat([0.0, 1.0], [75, 45]), np.repeat([0.0, 1.0], [60, 20])])
    found = _plan(model, coupling, values, importance="nnrelief", alpha=0.9)
    np.testing.assert_array_equal(found.keep, values > 0)
    aligned = _plan(model, coupling, values, importance="nnrelief", alpha=0.9, align=8)
    assert aligned.widths.tolist() == [48, 24]
    none = _plan(model, coupling, 0 * values, importance="nnrelief", alpha=0.9)
    assert none.widths.tolist() == [1, 1]


def test_auto_alignment_measures_a_step_for_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a group is the most; products of matrices have no blocks of channels."""
    devices = []

    def step(device: str) -> latency.Step:
        devices.append(device)
        return latency.Step(16, True, "")

    monkeypatch.setattr(allocation, "find_step", step)
    dense = load(build(WIDE["wide-mlp"]), tmp_path)
    assert allocation.steps(dense, couple(dense), "auto", "cuda").tolist() == [1, 1]
    image = load(build(WIDE["wide-residual"]), tmp_path)
    # Groups of 40, 48 and 64 channels: 16 is more than a quarter of the first two.
    assert allocation.steps(image, couple(image), "auto", "cuda").tolist() == [8, 8, 16]
    narrow = load(build(NETS["residual"]), tmp_path)
    assert [len(g.units) for g in couple(narrow).groups] == [8, 6]
    assert allocation.steps(narrow, couple(narrow), "auto", "cuda").tolist() == [2, 1]
    assert devices == ["cuda"] * 3


def test_auto_alignment_leaves_recurrent_layers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of an LSTM have three axes, as those of a convolution, but no step was measured for it."""
    monkeypatch.setattr(allocation, "find_step", lambda _: latency.Step(8, True, ""))
    text = """(float[T,N,6] x) => (float[N,4] y) <float[1,256,6] w, float[1,256,64] r, int64[1] zero = {0},
        float[64,4] v> { s, h = LSTM <hidden_size = 64> (x, w, r)  f = Squeeze(h, zero)  y = MatMul(f, v) }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    assert [len(group.units) for group in coupling.groups] == [64]
    assert allocation.steps(model, coupling, "auto", "cpu").tolist() == [1]
    assert allocation.steps(model, coupling, 8, "cpu").tolist() == [8]


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_group_that_is_not_a_multiple_may_stay_whole(tmp_path: Path, allocate: str) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    assert _plan(model, coupling, allocate=allocate, threshold=0.0, align=7).keep.all()
    values = np.concatenate([np.full(120, 2.0), np.linspace(0, 1, 80)])
    found = _plan(model, coupling, values, allocate=allocate, threshold=0.5, align=7)
    assert found.widths.tolist() == [120, 35]  # 40 reach it


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_budget_restores_no_unit_below_the_threshold(tmp_path: Path, allocate: str) -> None:
    """The budget asks for less than the threshold does of one group, and leaves the other more room than it may use."""
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.concatenate([np.repeat([0.0, 1.0], [110, 10]), np.linspace(0.9, 1, 80)])
    found = _plan(model, coupling, values, allocate=allocate, threshold=0.5, params=0.1)
    assert found.widths[0] == 10
    assert 0.9 * 0.1 <= found.predicted.params / _full(model, coupling)[1] <= 0.1
    assert found.widths[1] < 80


def test_global_compares_scores_relative_to_their_group(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-mlp"]), tmp_path)
    coupling = couple(model)
    values = np.random.default_rng(3).uniform(size=coupling.n_units)
    louder = values * np.repeat([1.0, 1000.0], [120, 80])
    found = [
        _plan(model, coupling, v, allocate="global", macs=0.5).widths.tolist()
        for v in (values, louder)
    ]
    assert found[0] == found[1]
    assert max(found[0]) < 100


# ------------------------------------------------------------------------------------------------------- exclusions


def test_excluded_groups_keep_all_units(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-residual"]), tmp_path)
    coupling = couple(model)
    assert [g.name for g in coupling.groups] == ["w1", "w2", "w5"]
    # The weight of the middle convolution stays as it is: neither its inputs nor its outputs go.
    fewer = exclude(model, coupling, ["w2"])
    assert [g.name for g in fewer.groups] == ["w5"]
    assert fewer.n_units == coupling.n_units - 40 - 48
    assert {(p.tensor, p.axis) for p in fewer.pinned if p.reason == "`exclude='w2'` keeps it"} >= {
        ("w2", 0),
        ("w2", 1),
    }
    found = _plan(model, fewer, macs=0.95)
    _assert_sound(fewer, found)
    cut = models.from_proto(rewrite.cut(model, fewer, found.keep), model.bindings)
    assert cut.shapes["w2"] == (48, 40, 3, 3)
    assert cut.shapes["w5"][0] < 64
    assert cost.count(cut).macs == found.predicted.macs <= 0.95 * _full(model, coupling)[0]


def test_exclude_matches_nodes_and_patterns(tmp_path: Path) -> None:
    model = load(build(WIDE["wide-residual"]), tmp_path)
    coupling = couple(model)
    depthwise = next(n.name for n in model.nodes if n.inputs[1:2] == ("w4",))
    # A node stands for all groups that its weight lives on.
    assert [g.name for g in exclude(model, coupling, [depthwise]).groups] == ["w2", "w5"]
    assert exclude(model, coupling, ["w?"]).n_units == 0
    assert [g.name for g in exclude(model, coupling, ["w6"]).groups] == ["w1", "w2"]
    assert [g.name for g in exclude(model, coupling, ["w5"]).groups] == ["w2"]
    assert exclude(model, coupling, ["w6", "w3"]).n_units == 0
    assert exclude(model, coupling, []) is coupling


@pytest.mark.parametrize("pattern", ["nothing*", "W2", "x", "layer?"])
def test_exclude_pattern_without_match_is_refused(tmp_path: Path, pattern: str) -> None:
    model = load(build(WIDE["wide-residual"]), tmp_path)
    with pytest.raises(SettingsError, match="matches no weight and no node") as caught:
        exclude(model, couple(model), ["w2", pattern])
    assert f"'{pattern}'" in str(caught.value)


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"macs": 0}, "`macs`"),
        ({"macs": 1.5}, "`macs`"),
        ({"params": -0.1}, "`params`"),
        ({"size": float("nan")}, "`size`"),
        ({"threshold": -1}, "`threshold`"),
        ({"align": 0}, "`align`"),
        ({"allocate": "somehow"}, "`allocate`"),
        ({"refit": "magic"}, "`refit`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"seed": -1}, "`seed`"),
        ({"no_such_setting": 1}, "`no_such_setting`"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object], name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.create(**values)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_budget_follows_from_settings() -> None:
    found = Settings.create(macs=0.5, params=0.25, threshold=2.0).budget
    assert (found.macs, found.params, found.size, found.threshold) == (0.5, 0.25, None, 2.0)
    assert Settings().budget == Budget()


# ------------------------------------------------------------------------------------------------- limits and floors


@pytest.mark.parametrize(
    ("floor", "step", "full", "expected"),
    [
        (0.0, 1, 10, 1),
        (0.0, 4, 10, 4),
        (0.2, 1, 10, 2),
        (0.21, 1, 10, 3),
        (0.1 + 0.2, 1, 10, 3),  # a little over 0.3
        (1 / 3, 1, 9, 3),
        (0.5, 4, 10, 8),
        (0.4, 4, 10, 4),
        (0.41, 4, 10, 8),
        (0.9, 4, 10, 10),
        (0.1, 16, 10, 10),
        (1.0, 3, 10, 10),
    ],
)
def test_narrowest_width_follows_floor_and_alignment(
    floor: float, step: int, full: int, expected: int
) -> None:
    found = allocation.least(floor, np.asarray([step]), np.asarray([full]))
    assert found.tolist() == [expected]
    assert found.dtype == np.int64
    each = allocation.least(np.asarray([floor, 1.0]), np.asarray([step, 2]), np.asarray([full, 7]))
    assert each.tolist() == [expected, 7]


def test_shares_and_limits_convert_both_ways() -> None:
    before = Cost(1000, 200, 4000)
    found = allocation.limits(Budget(macs=0.5, params=0.5, size=0.25), before, reserve=10)
    # What a refit adds is set aside: ten biases of four bytes.
    assert found.values == {"macs": 500, "params": 90, "size": 960}
    assert found.reserved == {"params": 10, "size": 40}
    assert found.holds(Cost(500, 90, 960))
    assert not any(found.holds(c) for c in (Cost(501, 90, 960), Cost(5, 91, 9), Cost(5, 9, 961)))
    assert found.shares(Cost(250, 45, 960)) == {"macs": 0.5, "params": 0.5, "size": 1.0}
    assert found.least(Cost(333, 60, 999)) == {"macs": 0.333, "params": 0.35, "size": 0.2598}
    half = allocation.limits(Budget(params=0.5), before, 10, itemsize=2)
    assert (half.values, half.reserved) == ({"params": 90}, {"params": 10, "size": 20})
    assert half.least(Cost(1, 1, 1)) == {"params": 0.055}
    # All of it is all of it, refit or not; nothing at all is never asked for.
    whole = allocation.limits(Budget(macs=1.0, params=1.0, size=1.0), before, 10)
    assert whole.values == {"macs": 1000, "params": 200, "size": 4000}
    tiny = allocation.limits(Budget(macs=0.0001, params=0.01, size=0.001), before, 10)
    assert tiny.values == {"macs": 1, "params": 1, "size": 1}
    assert allocation.Limits({"macs": 1.0}).least(Cost(1, 1, 1)) == {}
    nothing = allocation.limits(Budget(macs=0.5), Cost(0, 0, 0), 0)
    assert nothing.least(Cost(3, 0, 0)) == {"macs": 3.0}


def test_full_widths_need_not_be_multiples_of_the_step() -> None:
    full, step = np.asarray([8, 5, 10, 7]), np.asarray([4, 4, 4, 1])
    np.testing.assert_array_equal(
        allocation._snap(np.asarray([7, 5, 9, 6]), step, full), [4, 5, 8, 6]
    )
