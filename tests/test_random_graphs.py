"""Random networks: whatever they are made of, pruning is exact, composes, costs what was predicted, or does nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from graphs import assert_exact, distance, feed, load, operands, random_keep
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FLAT, IMAGE, TOKENS, Network, networks

from onnx_oamip import cost, rewrite
from onnx_oamip import model as models
from onnx_oamip.coupling import couple
from onnx_oamip.records import Bools, Coupling, Ints, Model
from onnx_oamip.runtime import Session

BLOCKS = {name.removeprefix("block_") for name in (*IMAGE, *FLAT, *TOKENS)}
SEEDS = st.integers(0, 2**16)
DENSITIES = st.sampled_from((0.2, 0.5, 0.8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def _survivors(first: Coupling, kept: Bools, second: Coupling) -> Ints | None:
    """For every unit of a model pruned once, which unit of the original it was.

    None where that has no answer: a policy that depends on widths (the groups of a convolution) has regrouped them.
    """
    was = np.full(second.n_units, -1, np.int64)
    now = np.full(first.n_units, -1, np.int64)
    for key, labels in first.axes.items():
        if key not in second.axes:
            continue
        old, new = labels[first.keep(key, kept)], second.axes[key]
        assert old.shape == new.shape, f"{key}: {len(old)} indices should have stayed, {len(new)} did"
        free = new >= 0
        if (old[free] < 0).any():
            return None
        for a, b in zip(old[free].tolist(), new[free].tolist(), strict=True):
            if was[b] not in (-1, a) or now[a] not in (-1, b):
                return None
            was[b], now[a] = a, b
    return was if (was >= 0).all() else None


def _exact(model: Model, coupling: Coupling, keep: Bools) -> None:
    cut = assert_exact(model, coupling, keep, tolerance=2e-5, batches=(1, 2))
    widths = np.asarray([int(keep[g.units].sum()) for g in coupling.groups], np.int64)
    predicted = cost.ledger(model, coupling).cost(widths)
    counted = cost.count(models.from_proto(cut, model.bindings))
    assert (predicted.macs, predicted.params) == (counted.macs, counted.params)


def _identity(model: Model, coupling: Coupling) -> None:
    same = rewrite.cut(model, coupling, np.ones(coupling.n_units, bool))
    for (node, slot, a), (other, place, b) in zip(operands(model.proto), operands(same), strict=True):
        assert (node, slot) == (other, place)
        np.testing.assert_array_equal(a, b)
    values = feed(model, 3, 2)
    assert distance(Session(model.proto, "cpu").run(values), Session(same, "cpu").run(values)) == 0


def _check_exactness(folder: Path, examples: int) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(network=networks(), seed=SEEDS, density=DENSITIES)
    def holds(network: Network, seed: int, density: float) -> None:
        model = load(network.proto, folder)
        coupling = couple(model)
        free = sum(len(g.units) - 1 for g in coupling.groups)
        keep = random_keep(coupling, np.random.default_rng(seed), density)
        _exact(model, coupling, keep)
        _identity(model, coupling)
        seen.update(["examples", *network.blocks])
        seen["prunable"] += any(len(g.units) > 1 for g in coupling.groups)
        seen["pruned"] += not keep.all()
        seen["many"] += free >= 8

    holds()
    # Properties of graphs in which nothing can go would hold for any implementation.
    assert seen["examples"] >= examples
    assert seen["prunable"] >= 0.95 * seen["examples"]
    assert seen["pruned"] >= 0.9 * seen["examples"]
    assert seen["many"] >= 0.6 * seen["examples"]
    assert min(seen[block] for block in BLOCKS) >= examples / 60, dict(seen)


def _check_composition(folder: Path, examples: int) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(network=networks(), seed=SEEDS, density=DENSITIES)
    def holds(network: Network, seed: int, density: float) -> None:
        rng = np.random.default_rng(seed)
        model = load(network.proto, folder)
        coupling = couple(model)
        first = random_keep(coupling, rng, density)
        half = load(rewrite.cut(model, coupling, first), folder)
        again = couple(half)
        second = random_keep(again, rng, density)
        twice = rewrite.cut(half, again, second)
        seen["examples"] += 1
        was = _survivors(coupling, first, again)
        if was is None:
            assert_exact(half, again, second, tolerance=2e-5)
            return
        union = first.copy()
        union[was[~second]] = False
        at_once = rewrite.cut(model, coupling, union)
        values = feed(model, 5, 3)
        assert distance(Session(at_once, "cpu").run(values), Session(twice, "cpu").run(values)) <= 1e-6
        if "lrn" not in network.blocks:
            here = {(n, s): v for n, s, v in operands(at_once)}
            there = {(n, s): v for n, s, v in operands(twice)}
            assert here.keys() == there.keys()
            for place, value in here.items():
                np.testing.assert_array_equal(value, there[place], err_msg=str(place))
        seen["compared"] += 1
        seen["twice"] += bool((~first).any() and (~second).any())

    holds()
    assert seen["examples"] >= examples
    assert seen["compared"] >= 0.8 * seen["examples"]
    assert seen["twice"] >= 0.6 * seen["examples"]


@pytest.mark.fuzz
def test_pruned_equals_masked_and_costs_what_was_predicted(folder: Path) -> None:
    _check_exactness(folder, 300)


@pytest.mark.fuzz
def test_pruning_twice_equals_pruning_at_once(folder: Path) -> None:
    _check_composition(folder, 300)


@pytest.mark.slow
@pytest.mark.fuzz
def test_many_random_graphs(folder: Path) -> None:
    _check_exactness(folder, 1000)
    _check_composition(folder, 1000)
