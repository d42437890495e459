"""Couplings by themselves: what a group is called, in what order units stand, and what is left without some groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import NETS, build, load

from onnx_oamip.coupling import couple, exclude
from onnx_oamip.records import Coupling, Model, Pinned

SPLIT = """(float[N,3,6,6] x) => (float[N,4,4,4] y, float[N,5,4,4] z)
    <float[9,3,3,3] w1, float[9] b1, int64[2] parts = {6, 3}, float[4,6,1,1] w2, float[5,3,1,1] w3> {
        a = Conv(x, w1, b1)
        h, g = Split<axis = 1>(a, parts)
        y = Conv(h, w2)
        z = Conv(g, w3)
    }"""
LOOP = """(float[N,6] x) => (float[N,4] y)
    <float[6,8] w1, float[8,10] w2, float[10,8] w3, float[8,4] w4, bool go = {1}> {
        h = MatMul(x, w1)
        c = Identity(go)
        s = If(c) <
            then_branch = yes () => (float[N,8] p) { a = MatMul(h, w2)  r = Relu(a)  p = MatMul(r, w3) },
            else_branch = no () => (float[N,8] q) { q = Relu(h) }
        >
        y = MatMul(s, w4)
    }"""


def _coupled(text: str, folder: Path) -> tuple[Model, Coupling]:
    model = load(build(text), folder)
    return model, couple(model)


def test_two_groups_of_one_weight_have_two_names(tmp_path: Path) -> None:
    model, coupling = _coupled(SPLIT, tmp_path)
    assert [g.name for g in coupling.groups] == ["w1", "w1#2"]
    first, second = coupling.groups
    # The weight that comes first in the graph, not one of those that read it; units in the order of its channels.
    np.testing.assert_array_equal(coupling.axes["w1", 0], np.arange(9))
    np.testing.assert_array_equal(first.units, np.arange(6))
    np.testing.assert_array_equal(second.units, np.arange(6, 9))
    np.testing.assert_array_equal(coupling.unit_group, [0] * 6 + [1] * 3)
    assert {t for t, _ in first.multiplicity if t in model.constants} == {"w1", "b1", "w2"}
    assert {t for t, _ in second.multiplicity if t in model.constants} == {"w1", "b1", "w3"}
    assert set(first.multiplicity.values()) == set(second.multiplicity.values()) == {1}


@pytest.mark.parametrize("net", ["mlp", "cnn", "residual", "grouped", "attention"])
def test_units_stand_in_the_order_of_the_graph(net: str, tmp_path: Path) -> None:
    model, coupling = _coupled(NETS[net], tmp_path)
    seen = np.concatenate([coupling.axes[key] for key in coupling.axes if key[0] in model.constants])
    free = seen[seen >= 0]
    first = np.unique(free, return_index=True)[1]
    assert sorted(set(free.tolist())) == list(range(coupling.n_units))
    for g, group in enumerate(coupling.groups):
        np.testing.assert_array_equal(coupling.unit_group[group.units], g)
        assert (np.diff(group.units) > 0).all()
        for key, x in coupling.axes.items():
            held = np.isin(x, group.units).sum()
            assert held == group.multiplicity.get(key, 0) * len(group.units)
    assert (np.diff(first) > 0).all()
    assert (np.diff([group.units[0] for group in coupling.groups]) > 0).all()


def test_what_is_pinned_is_counted_with_the_reason_of_most(tmp_path: Path) -> None:
    _, coupling = _coupled(SPLIT, tmp_path)
    found = {(p.tensor, p.axis): p for p in coupling.pinned}
    assert set(found) == {("w1", 1), ("w2", 0), ("w3", 0)}  # the interface; a bias is no weight
    assert {k: p.count for k, p in found.items()} == {("w1", 1): 3, ("w2", 0): 4, ("w3", 0): 5}
    assert all(p.given for p in found.values())
    assert found["w2", 0].reason == "it is part of the graph output 'y'"
    assert "a graph input (x)" in found["w1", 1].reason


CUTS = {
    "residual": (NETS["residual"], ["w1", "w2"]),
    "grouped": (NETS["grouped"], ["w1", "w2"]),
    "attention": (NETS["attention"], ["we", "wq", "wv"]),
    "split": (SPLIT, ["w2", "w3"]),
    "branches": (LOOP, ["w1", "w2"]),
}


@pytest.mark.parametrize(("net", "pattern"), [(n, p) for n, (_, patterns) in CUTS.items() for p in patterns])
def test_without_a_group_all_else_is_as_it_was(net: str, pattern: str, tmp_path: Path) -> None:
    model, coupling = _coupled(CUTS[net][0], tmp_path)
    fewer = exclude(model, coupling, [pattern])
    names = [g.name for g in fewer.groups]
    assert len(names) < len(coupling.groups)
    stays = np.zeros(coupling.n_units, bool)
    for group in coupling.groups:
        stays[group.units] = group.name in names
    assert fewer.n_units == stays.sum() == len(fewer.unit_group)
    rng = np.random.default_rng(0)
    keep = np.ones(coupling.n_units, bool)
    keep[stays] = rng.uniform(size=fewer.n_units) < 0.5
    for key in coupling.axes:
        whole = coupling.keep(key, keep)
        assert (key in fewer.axes) == bool((stays[coupling.axes[key]] & (coupling.axes[key] >= 0)).any())
        np.testing.assert_array_equal(fewer.keep(key, keep[stays]) if key in fewer.axes else True, whole)
        assert fewer.axes.get(key, coupling.axes[key]).min() >= -1
    kept = [g for g in coupling.groups if g.name in names]
    for g, (old, new) in enumerate(zip(kept, fewer.groups, strict=True)):
        assert (old.name, old.multiplicity) == (new.name, new.multiplicity)
        np.testing.assert_array_equal(np.flatnonzero(stays)[new.units], old.units)
        np.testing.assert_array_equal(fewer.unit_group[new.units], g)
    for was, now in ((coupling.consumers, fewer.consumers), (coupling.inside, fewer.inside)):
        assert now == tuple(c for c in was if (c.data, c.axis) in fewer.axes)
    # Every weight that a group leaves is told, as something that nobody may touch.
    added = fewer.pinned[len(coupling.pinned) :]
    assert fewer.pinned[: len(coupling.pinned)] == coupling.pinned
    expected = [
        Pinned(*key, held * len(g.units), f"--exclude '{pattern}' keeps it", True)
        for g in coupling.groups if g.name not in names
        for key, held in g.multiplicity.items() if key[0] in model.constants and len(model.shapes[key[0]]) > 1
    ]  # fmt: skip
    assert list(added) == expected
    assert expected


def test_the_pattern_that_took_a_group_is_told(tmp_path: Path) -> None:
    model, coupling = _coupled(SPLIT, tmp_path)
    fewer = exclude(model, coupling, ["w2", "w3"])
    assert fewer.n_units == 0
    assert (fewer.groups, fewer.axes, fewer.consumers) == ((), {}, ())
    reasons = {(p.tensor, p.reason) for p in fewer.pinned[len(coupling.pinned) :]}
    assert reasons == {
        ("w1", "--exclude 'w2' keeps it"), ("w2", "--exclude 'w2' keeps it"), ("w1", "--exclude 'w3' keeps it"),
        ("w3", "--exclude 'w3' keeps it"),
    }  # fmt: skip
