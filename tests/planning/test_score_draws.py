"""Scores over several draws: different samples, their mean, and the units that all draws keep, counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import MLP, build, load
from graphs import samples as random_samples

from onnx_oamip.api import prepare
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Array, Scores
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.coupling import couple
from onnx_oamip.planning.score_draws import agreements, combine, notes, samples_of_draws


def _settings(**values: object) -> Settings:
    quick = {"importance": "activation", "align": 1, "device": "cpu", "cache": "off"}
    return Settings.create(**{**quick, **values})


def _task(folder: Path) -> tuple[Path, dict[str, Array]]:
    proto = build(MLP)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path, dict(random_samples(load(proto, folder), 40, 0))


@pytest.mark.parametrize("fixed_batch", [1, 4])
def test_draws_are_different_halves(fixed_batch: int) -> None:
    found = samples_of_draws(50, 3, 1, fixed_batch)
    assert len(found) == 3
    for index in found:
        assert len(set(index)) == len(index) == (25 if fixed_batch == 1 else 24)
        assert (np.diff(index) > 0).all()
    assert not np.array_equal(found[0], found[1])
    again = samples_of_draws(50, 3, 1, fixed_batch)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_agreement_is_counted_by_hand(tmp_path: Path) -> None:
    """Two draws of the first group's scores; three units are kept, on which the draws agree but for one."""
    coupling = couple(load(build(MLP), tmp_path))
    first, second = coupling.groups
    values = np.tile(np.linspace(1, 2, coupling.n_units), (2, 1))
    values[0, first.units[:3]] = [9, 8, 7]
    values[1, first.units[:4]] = [9, 8, 3, 7]
    both = combine([Scores("oamip", v, ({"purpose": "importance"},)) for v in values])
    np.testing.assert_allclose(both.values, values.mean(axis=0))
    assert [p["draw"] for p in both.programs] == [0, 1]
    keep = np.zeros(coupling.n_units, bool)
    keep[first.units[:3]] = True
    keep[second.units] = True
    one, other = agreements(both, coupling, keep)
    assert (one.name, one.kept, one.agreed) == (first.name, 3, 2)
    assert (other.kept, other.agreed, other.spread) == (len(second.units), len(second.units), 0.0)
    deviations = np.zeros(len(first.units))
    deviations[2] = 2.0
    deviations[3] = (7 - values[0, first.units[3]]) / 2
    assert one.spread == pytest.approx(deviations.mean() / values[:, first.units].mean())
    (note,) = notes(both, coupling, keep)
    assert f"all draws agree on {2 + len(second.units)} of {3 + len(second.units)}" in note
    assert notes(Scores("oamip", values[0]), coupling, keep) == ()


def test_scores_of_a_run_are_means_over_draws(tmp_path: Path) -> None:
    path, source = _task(tmp_path)
    _, found = prepare.score(path, source, _settings(draws=3))
    assert found.draws is not None
    assert found.draws.shape == (3, len(found.values))
    np.testing.assert_allclose(found.values, found.draws.mean(axis=0))
    assert (found.draws.std(axis=0) > 0).any()
    _, whole = prepare.score(path, source, _settings())
    assert whole.draws is None


@pytest.mark.parametrize("values", [{"importance": "l2"}, {"importance": "random"}])
def test_draws_for_scores_without_samples_are_refused(
    tmp_path: Path, values: dict[str, object]
) -> None:
    path, source = _task(tmp_path)
    with pytest.raises(SettingsError, match="`draws` scores on several draws of the samples"):
        prepare.prepare(path, source, _settings(macs=0.5, draws=2, **values))
