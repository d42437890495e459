"""Every operator and pattern: what is cut equals what is masked, and what may go is what was counted by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, OpCase, unknown_here
from graphs import assert_exact, distance, feed, keep_one, load, operands, random_keep

from onnx_oamip.core.records import Coupling, Model
from onnx_oamip.graph import cost
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.loading import from_proto
from onnx_oamip.graph.ops import REGISTRY, lookup
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

BY_NAME = {case.name: case for case in CASES}


@cache
def _coupled(name: str, folder: Path) -> tuple[Model, Coupling]:
    case = BY_NAME[name]
    model = load(case.make(), folder, case.bindings)
    return model, couple(model)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> OpCase:
    found: OpCase = request.param
    if reason := unknown_here(found):
        pytest.skip(reason)
    return found


@pytest.fixture
def coupled(case: OpCase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Coupling]:
    return _coupled(case.name, tmp_path_factory.getbasetemp())


def _batches(case: OpCase) -> tuple[int, ...]:
    return (1,) if case.bindings else (1, 3)


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(CASES)


def test_case_has_the_stated_units_and_reasons(
    case: OpCase, coupled: tuple[Model, Coupling]
) -> None:
    _, coupling = coupled
    reasons = [p.reason for p in coupling.pinned]
    assert coupling.n_units == case.units, reasons
    for part in case.pinned:
        assert any(part in reason for reason in reasons), reasons


def test_pruned_model_equals_masked_model(case: OpCase, coupled: tuple[Model, Coupling]) -> None:
    model, coupling = coupled
    rng = np.random.default_rng(11)
    for density in (0.25, 0.5, 0.85):
        keep = random_keep(coupling, rng, density)
        assert_exact(model, coupling, keep, case.tolerance, _batches(case))


def test_cut_to_one_unit_per_group_equals_the_masked_model(
    case: OpCase, coupled: tuple[Model, Coupling]
) -> None:
    model, coupling = coupled
    keep = keep_one(coupling, np.random.default_rng(5))
    cut = assert_exact(model, coupling, keep, case.tolerance, _batches(case))
    before = sum(v.size for v in model.constants.values())
    after = sum(v.size for _, _, v in operands(cut))
    removed = int(np.count_nonzero(~keep))
    assert removed == coupling.n_units - len(coupling.groups)
    if removed:
        assert after < before


@pytest.mark.parametrize("case", [case for case in CASES if case.units], indirect=True, ids=str)
def test_half_of_each_group_alone_is_cut_exactly(
    case: OpCase, coupled: tuple[Model, Coupling]
) -> None:
    """Half of one group, everything else whole: the widths of different groups do not depend on each other."""
    model, coupling = coupled
    assert coupling.groups
    rng = np.random.default_rng(17)
    for group in coupling.groups:
        keep = np.ones(coupling.n_units, bool)
        keep[rng.permutation(group.units)[: len(group.units) // 2]] = False
        assert_exact(model, coupling, keep, case.tolerance, _batches(case)[-1:])


def test_predicted_macs_equal_those_of_the_pruned_model(
    case: OpCase, coupled: tuple[Model, Coupling]
) -> None:
    model, coupling = coupled
    keep = random_keep(coupling, np.random.default_rng(23), 0.5)
    widths = np.asarray([int(keep[g.units].sum()) for g in coupling.groups], np.int64)
    predicted = cost.ledger(model, coupling).cost(widths)
    counted = cost.count(from_proto(rewrite.cut(model, coupling, keep), model.bindings))
    assert predicted.macs == counted.macs


def test_empty_plan_changes_nothing(case: OpCase, coupled: tuple[Model, Coupling]) -> None:
    model, coupling = coupled
    cut = rewrite.cut(model, coupling, np.ones(coupling.n_units, bool))
    before, after = list(operands(model.proto)), list(operands(cut))
    assert [(n, s) for n, s, _ in before] == [(n, s) for n, s, _ in after]
    for (node, slot, a), (_, _, b) in zip(before, after, strict=True):
        assert a.dtype == b.dtype, (node, slot)
        np.testing.assert_array_equal(a, b)
    original, same = Session(model.proto, "cpu"), Session(cut, "cpu")
    values = feed(model, 2, _batches(case)[-1])
    assert distance(original.run(values), same.run(values)) == 0


def test_loading_preserves_the_outputs(case: OpCase, coupled: tuple[Model, Coupling]) -> None:
    model, _ = coupled
    source = case.make()
    if case.name == "initialisers-as-inputs":
        assert [p.name for p in model.inputs] == ["x"]
    values = feed(model, 4, _batches(case)[-1])
    # Folding constants and fixing reshape targets may not change a single output.
    assert (
        distance(Session(source, "cpu").run(values), Session(model.proto, "cpu").run(values))
        <= case.tolerance
    )


def test_every_operator_has_a_case(tmp_path_factory: pytest.TempPathFactory) -> None:
    covered: set[int] = set()
    for case in CASES:
        if unknown_here(case):
            # An old onnx cannot load it; the entry counts as covered where it can.
            covered.update(id(s) for s in REGISTRY if s.name in case.ops)
            continue
        model, _ = _coupled(case.name, tmp_path_factory.getbasetemp())
        there = {f"{n.domain}.{n.op}" if n.domain else n.op for n in model.nodes}
        assert set(case.ops) <= there, f"{case.name}: {set(case.ops) - there} is gone after loading"
        for node in model.nodes:
            if (f"{node.domain}.{node.op}" if node.domain else node.op) in case.ops:
                covered.add(id(lookup(node.domain, node.op, node.version)))
    missing = [f"{s.domain}::{s.name} (since {s.since})" for s in REGISTRY if id(s) not in covered]
    assert not missing, f"no case in tests/cases.py for {missing}"
