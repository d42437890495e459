"""MINT: the corrected estimator, and a time budget that tells when it ran out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import NETS, build, load, samples
from scipy.sparse.csgraph import minimum_spanning_tree

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Floats, Statistics
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph.coupling import couple
from onnx_oamip.importance import find
from onnx_oamip.published.dependence import layer_pairs, mint, pooled_activations
from onnx_oamip.published.dependence.correlation import partial
from onnx_oamip.published.dependence.propagation import propagate
from onnx_oamip.published.dependence.requests import POOLED_ACTIVATIONS
from onnx_oamip.statistics.requests import MOMENTS


def estimate(parents: Floats, children: Floats, splits: int = 3) -> Floats:
    found = [mint.dependence(parents, children, seed) for seed in range(splits)]
    return np.mean([f for f in found if f is not None], axis=0)


def test_crossings_are_counted_on_the_minimum_spanning_tree() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((120, 3))
    side = rng.random(120) < 0.4
    distance = np.square(points[:, None] - points).sum(axis=2)
    tree = minimum_spanning_tree(distance).tocoo()
    assert len(tree.row) == 119
    assert mint.crossings(distance, side) == int((side[tree.row] != side[tree.col]).sum())


def test_crossings_on_a_line_count_changes_of_side() -> None:
    place = np.arange(10.0)
    distance = np.square(place[:, None] - place)
    assert mint.crossings(distance, place >= 4) == 1
    assert mint.crossings(distance, place % 2 == 0) == 9


def test_equal_points_are_connected() -> None:
    """Distances of zero are edges, not holes."""
    distance = np.zeros((6, 6))
    assert mint.crossings(distance, np.asarray([False, True] * 3)) >= 1
    assert mint.crossings(distance, np.zeros(6, bool)) == 0


def test_fewer_samples_than_parts_of_a_split_are_refused(tmp_path: Path) -> None:
    model = load(build(NETS["mlp"]), tmp_path)
    coupling = couple(model)
    found = dataset.load(samples(model, 2), model)
    assert found is not None
    answer = pooled_activations.collect(model, coupling, found, "cpu")
    seen = Statistics({MOMENTS: {}, POOLED_ACTIVATIONS: answer}, 2, "cpu")
    with pytest.raises(
        DataError, match=r"splits the calibration samples in 3, and has 2 at a time"
    ):
        mint.score(model, coupling, seen, Settings(importance="mint"))


def test_independent_data_has_no_dependence() -> None:
    rng = np.random.default_rng(1)
    found = estimate(rng.standard_normal((1500, 4)), rng.standard_normal((1500, 1)))
    assert np.abs(found).max() < 0.1


def test_true_parent_has_the_highest_dependence() -> None:
    rng = np.random.default_rng(2)
    parents = rng.standard_normal((1500, 4))
    children = parents[:, :1] + 0.1 * rng.standard_normal((1500, 1))
    found = estimate(parents, children)[0]
    assert found[0] > 0.4
    assert found[0] > 2 * found[1:].max()
    unpaired = estimate(parents, children[rng.permutation(1500)])
    assert np.abs(unpaired).max() < 0.1


def test_filters_of_a_group_share_their_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mint, "GROUPS", 2)
    rng = np.random.default_rng(3)
    found = mint.dependence(rng.standard_normal((90, 6)), rng.standard_normal((90, 5)))
    assert found is not None
    assert found.shape == (5, 6)
    assert len(np.unique(found)) <= 4
    np.testing.assert_array_equal(found[:3, :3], found[0, 0])


def test_time_limit_is_reported(tmp_path: Path) -> None:
    """Layers that were not reached are scored by correlation, and the note counts them."""
    model = load(build(NETS["mlp"]), tmp_path)
    coupling = couple(model)
    found = dataset.load(samples(model, 90), model)
    assert found is not None
    answer = pooled_activations.collect(model, coupling, found, "cpu")
    seen = Statistics({MOMENTS: {}, POOLED_ACTIVATIONS: answer}, 90, "cpu")
    assert seen[POOLED_ACTIVATIONS] is not None
    hurried = find("mint").score(
        model, coupling, seen, Settings.create(macs=0.5, score_time=1e-9, workers=1)
    )
    (note,) = hurried.notes
    assert "of 2 pairs of layers 2 were not reached" in note
    pairs = list(layer_pairs.pairs(model, coupling, seen[POOLED_ACTIVATIONS]))
    expected = propagate(
        model, coupling, seen, [(p, partial(p.parents, p.children)) for p in pairs]
    )
    np.testing.assert_allclose(hurried.values, expected)
    patient = find("mint").score(model, coupling, seen, Settings.create(macs=0.5))
    assert not patient.notes
    assert not np.allclose(patient.values, hurried.values)


def test_method_is_marked_experimental() -> None:
    assert find("mint").summary.startswith("experimental")
