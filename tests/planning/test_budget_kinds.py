"""Kinds of budgets: one table for all, shown by a counted budget that exists only here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from graphs import MLP, build, load

from onnx_oamip.core import budgets
from onnx_oamip.core.budgets import COUNTED, KINDS, BudgetKind
from onnx_oamip.core.errors import BudgetNotMet, GateFailed
from onnx_oamip.core.options import BudgetOptions
from onnx_oamip.core.records import Budget, Cost, Coupling, Ints, Scores
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost
from onnx_oamip.graph.cost import CountedCost, Ledger, Products
from onnx_oamip.graph.coupling import couple
from onnx_oamip.planning import allocation, budget_program, search
from onnx_oamip.planning.budget_program import Ladder, choose


def test_every_budget_is_complete(tmp_path: Path) -> None:
    """A budget that misses one of its steps is found here."""
    names = {kind.name for kind in KINDS}
    assert len(names) == len(KINDS)
    assert names == set(BudgetOptions.model_fields)
    assert names == {field.name for field in fields(Budget)}
    model = load(build(MLP), tmp_path)
    counted = [kind.cost for kind in COUNTED]
    assert counted == [field.name for field in fields(Cost)]
    assert counted == list(cost.ledger(model, couple(model)).counted)
    assert [kind for kind in KINDS if kind.cost] == list(COUNTED)


OUTPUTS = BudgetKind("outputs", noun="outputs", label="Outputs", cost="outputs")
"""Bounds the output channels of all layers together."""


@dataclass(frozen=True, slots=True)
class BudgetWithOutputs(Budget):
    outputs: float | None = None


@dataclass(frozen=True, slots=True)
class CostWithOutputs(Cost):
    outputs: int = 0


class LedgerWithOutputs(Ledger):
    @property
    def counted(self) -> dict[str, CountedCost]:
        layers = len(self.macs.factor)
        outputs = Products(np.ones(layers, np.int64), self.macs.axes[:, 1:2])
        return {
            **super().counted,
            "outputs": CountedCost(outputs, np.zeros_like(self.one_off.params)),
        }


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Coupling, Ledger]:
    for module in (budgets, allocation, budget_program):
        monkeypatch.setattr(module, "COUNTED", (*COUNTED, OUTPUTS))
    monkeypatch.setattr(cost, "Cost", CostWithOutputs)
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    plain = cost.ledger(model, coupling)
    parts = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return coupling, LedgerWithOutputs(**parts)


def outputs(widths: Ints) -> int:
    """Counted by hand: two hidden layers with one output a unit, and four classes."""
    return int(widths.sum()) + 4


def limits(share: float, **shares: float) -> allocation.Limits:
    before = CostWithOutputs(macs=232, params=258, bytes=2000, outputs=26)
    return allocation.limits(BudgetWithOutputs(outputs=share, **shares), before, reserve=0)


def test_cost_of_a_new_kind_is_counted(network: tuple[Coupling, Ledger]) -> None:
    _, ledger = network
    for widths in ([12, 10], [5, 7], [1, 1]):
        counted = ledger.cost(np.asarray(widths))
        assert isinstance(counted, CostWithOutputs)
        assert counted.outputs == outputs(np.asarray(widths))
        assert budgets.costs(counted)["outputs"] == counted.outputs


@pytest.mark.parametrize("macs", [1.0, 0.4])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_program_is_optimal_under_a_new_kind(
    network: tuple[Coupling, Ledger], share: float, macs: float
) -> None:
    coupling, ledger = network
    rng = np.random.default_rng(0)
    widths = tuple(np.arange(1, full + 1) for full in cost.full_widths(coupling))
    losses = tuple(np.sort(rng.random(len(w)))[::-1] for w in widths)
    limit = limits(share, macs=macs)
    found = choose(ledger, Ladder(widths, losses), limit, solver="highs")
    assert limit.holds(ledger.cost(found.widths))
    allowed = [
        losses[0][a - 1] + losses[1][b - 1]
        for a, b in itertools.product(*widths)
        if limit.holds(ledger.cost(np.asarray([a, b])))
    ]
    loss = losses[0][found.widths[0] - 1] + losses[1][found.widths[1] - 1]
    assert loss <= min(allowed) * (1 + 1e-3)
    assert outputs(found.widths) <= 26 * share


@pytest.mark.parametrize("allocate", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_other_allocations_meet_a_new_kind(
    network: tuple[Coupling, Ledger], allocate: str, share: float
) -> None:
    coupling, ledger = network
    scores = Scores("given", np.random.default_rng(0).random(coupling.n_units))
    settings = Settings.create(allocate=allocate, align=1)
    steps = np.ones(len(coupling.groups), np.int64)
    plan = allocation.allocate(coupling, ledger, scores, limits(share), settings, step=steps)
    assert 26 * share - 1 < outputs(plan.widths) <= 26 * share


def test_messages_name_a_new_kind(network: tuple[Coupling, Ledger]) -> None:
    coupling, ledger = network
    scores = Scores("given", np.ones(coupling.n_units))
    settings = Settings.create(allocate="uniform", align=1)
    steps = np.ones(len(coupling.groups), np.int64)
    with pytest.raises(
        BudgetNotMet, match=r"the `outputs` budget cannot be met.*`outputs=0\.2308`"
    ):
        allocation.allocate(coupling, ledger, scores, limits(0.1), settings, step=steps)
    before, after = CostWithOutputs(1, 1, 1, outputs=26), CostWithOutputs(1, 1, 1, outputs=20)
    with pytest.raises(GateFailed, match=r"keeps 0\.7692 of its outputs, more than `outputs=0\.5`"):
        search.meets(BudgetWithOutputs(outputs=0.5), before, after)
