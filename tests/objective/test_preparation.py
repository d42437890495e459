"""Scales of an objective, and their entries in the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import build, load
from onnx import numpy_helper

from onnx_oamip.artifacts.cache import open_store
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Model, Objective
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.objective import detect, preparation, scale, spread_rare
from onnx_oamip.objective.measures import Measures
from onnx_oamip.objective.moments import Moments
from onnx_oamip.statistics import relevance
from onnx_oamip.statistics.collector import parts

HEADS = """(float[N,8] x) => (float[] y, float[] z, float[] e) <float[8,6] w1, float[8,3] w2, float[8,5] w3> {
    a = MatMul(x, w1) y = Softmax(a) z = MatMul(x, w2) b = MatMul(x, w3)
    e = LpNormalization <axis = 1> (b) }"""


@pytest.fixture
def case(tmp_path: Path) -> tuple[Model, Samples]:
    model = load(build(HEADS), tmp_path)
    x = np.random.default_rng(0).standard_normal((700, 8)).astype(np.float32)
    samples = dataset.load({"x": x}, model)
    assert samples is not None
    return model, samples


def _equal(one: Objective, other: Objective) -> bool:
    pairs = zip(one.judged, other.judged, strict=True)
    return all(
        a.scale is not None
        and b.scale is not None
        and (a.scale.form, a.scale.spread, a.scale.background)
        == (b.scale.form, b.scale.spread, b.scale.background)
        and np.array_equal(a.scale.variance, b.scale.variance)
        and np.array_equal(a.scale.balance, b.scale.balance)
        for a, b in pairs
    )


@pytest.mark.parametrize("form", [(7,), (9, 2)])
def test_refusal_of_labels_has_the_shape_of_all_of_them(
    case: tuple[Model, Samples], form: tuple[int, ...]
) -> None:
    """Some samples were held out before the labels are read."""
    model, samples = case
    labels = np.full((samples.count, *form), 0.5, np.float32)
    calibration, _ = dataset.hold_out(replace(samples, labels=labels), seed=0)
    assert calibration.count < samples.count
    with pytest.raises(DataError) as caught:
        preparation.find_objective(model, Settings.create(), calibration)
    assert f"of shape {labels.shape}, which fits no output" in str(caught.value)


def test_scales_come_from_the_cache(
    case: tuple[Model, Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = case
    runs: list[int] = []
    session = preparation.Session

    def counted(*args: Any, **names: Any) -> Any:
        runs.append(1)
        return session(*args, **names)

    monkeypatch.setattr(preparation, "Session", counted)
    store = open_store(str(tmp_path / "cache"))
    objective = detect(model)
    assert [t.kind for t in objective.judged] == ["classes", "values", "embedding"]
    first = scale(model, objective, samples, "cpu", store=store, identity={"data": 1})
    again = scale(model, objective, samples, "cpu", store=store, identity={"data": 1})
    assert len(runs) == 1
    assert _equal(first, again)
    # Other data, or another statement about an output, are other entries.
    scale(model, objective, samples, "cpu", store=store, identity={"data": 2})
    stated = detect(model, outputs={"z": ("classes", 1.0)})
    scale(model, stated, samples, "cpu", store=store, identity={"data": 1})
    assert len(runs) == 3


def test_scales_use_evenly_spaced_samples(
    case: tuple[Model, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = case
    taken = preparation._spread(model, detect(model), samples)
    assert taken.count == preparation.MAX_SAMPLES
    assert taken.origin is not None
    assert (taken.origin[0], taken.origin[-1]) == (0, 699)
    monkeypatch.setattr(preparation, "MAX_NUMBERS", 14 * 40)
    assert preparation._spread(model, detect(model), samples).count == 40


def test_broken_scales_are_not_accepted(case: tuple[Model, Samples]) -> None:
    model, samples = case
    objective = scale(model, detect(model), samples, "cpu")
    scales = tuple(t.scale for t in objective.judged if t.scale is not None)
    assert preparation.are_scales(scales, objective)
    assert not preparation.are_scales(scales[:2], objective)
    broken = replace(scales[0], spread=-1.0)
    assert not preparation.are_scales((broken, *scales[1:]), objective)
    broken = replace(scales[1], variance=np.asarray([1.0, np.nan, 1.0]))
    assert not preparation.are_scales((scales[0], broken, scales[2]), objective)


@pytest.mark.parametrize("whole", [False, True])
def test_losses_are_measured_on_samples_with_rare_decisions(tmp_path: Path, whole: bool) -> None:
    """The last quarter of the samples, on which losses are measured, gets one of two positive samples."""
    batch = 1 if whole else "N"
    text = f"(float[{batch},4,2] x) => (float[] y) <float[2,1] w> {{ l = MatMul(x, w) y = Sigmoid(l) }}"
    proto = build(text)
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.asarray([[1.0], [0.0]], np.float32), "w")
    )
    model = load(proto, tmp_path)
    x = -np.ones((40, 4, 2), np.float32)
    x[:, :, 1] = np.arange(40)[:, None]
    x[2:4, 1, 0] = 3
    samples = dataset.load({"x": x}, model)
    assert samples is not None
    objective = scale(model, detect(model), samples, "cpu")
    spread = spread_rare(model, objective, samples, "cpu", batch_size=16)
    places = spread.arrays["x"][:, 0, 1].astype(int)
    assert sorted(places.tolist()) == list(range(40))
    measured = parts(spread)[1].arrays["x"]
    assert [row[0, 1] for row in measured if (row[:, 0] > 0).any()] == [2.0]
    few = scale(model, detect(model), samples.take(np.arange(10, 40)), "cpu")
    assert spread_rare(model, few, samples, "cpu") is samples  # all decisions are alike


@pytest.mark.parametrize(
    ("size", "kind"), [(1.0, "ambiguous"), (0.0, "ambiguous"), (1e-3, "values")]
)
def test_columns_of_very_different_size_are_values(size: float, kind: str, tmp_path: Path) -> None:
    proto = build("(float[N,8] x) => (float[] y) <float[8,3] w> { y = MatMul(x, w) }")
    weight = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    weight[:, 2] *= size
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    model = load(proto, tmp_path)
    x = np.random.default_rng(1).standard_normal((100, 8)).astype(np.float32)
    samples = dataset.load({"x": x}, model)
    assert samples is not None
    found = scale(model, detect(model), samples, "cpu")
    assert [term.kind for term in found.terms] == [kind]
    assert found.notes == (found.terms[0].assumption,)
    assert ("times that of another" in found.notes[0]) == (kind == "values")
    assert relevance.applies(found) == (kind == "values")


@pytest.mark.parametrize(
    ("mean", "deviation", "kind"),
    [
        pytest.param(-14.0, 1e-3, "ambiguous", id="scores of classes that never occur"),
        pytest.param(-14.0, 0.05, "ambiguous", id="scores that vary a little"),
        pytest.param(0.5, 0.01, "values", id="numbers of a smaller unit"),
        pytest.param(14.0, 1e-3, "values", id="above the other columns"),
    ],
)
def test_columns_of_unused_classes_are_not_compared(
    mean: float, deviation: float, kind: str, tmp_path: Path
) -> None:
    """Three of eight columns hardly vary. If they are classes that never occur, they count as constant columns do."""
    proto = build(
        "(float[N,8] x) => (float[] y) <float[8,8] w, float[8] b> { z = MatMul(x, w) y = Add(z, b) }"
    )
    rng = np.random.default_rng(0)
    weight = 2 * rng.standard_normal((8, 8))
    weight[:, 5:] *= deviation / np.linalg.norm(weight[:, 5:], axis=0)
    bias = np.where(np.arange(8) < 5, 0.0, mean)
    for place, value in enumerate((weight, bias)):
        name = proto.graph.initializer[place].name
        proto.graph.initializer[place].CopyFrom(
            numpy_helper.from_array(value.astype(np.float32), name)
        )
    model = load(proto, tmp_path)
    x = rng.standard_normal((200, 8)).astype(np.float32)
    samples = dataset.load({"x": x}, model)
    assert samples is not None
    store = open_store(str(tmp_path / "cache"))
    for _ in range(2):  # the second time from the cache
        found = scale(model, detect(model), samples, "cpu", store=store, identity={})
        (term,) = found.terms
        assert term.kind == kind
        assert term.scale is not None
        y = x.astype(np.float64) @ weight + bias
        expected = y.var(axis=0)
        if kind == "ambiguous":
            expected[5:] = expected[:5].mean()
        np.testing.assert_allclose(term.scale.variance, expected, rtol=1e-2)
    measures = Measures(found)
    measures.update(
        [y], [y + 0.1]
    )  # little beside the spread of five columns, much beside that of three
    (result,) = measures.results()
    assert (result.lost < 1) == (kind == "ambiguous")


def test_small_column_beside_a_large_one_is_scaled_by_its_own_variance() -> None:
    """A price in hundreds of thousands beside a grade of 3.5 +- 0.2; a sum of large numbers that cancel is rounding."""
    rng = np.random.default_rng(0)
    price = 3e5 * rng.standard_normal(200)
    grade = 3.5 + 0.2 * rng.standard_normal(200)
    rounding = 1e-3 * rng.standard_normal(200)
    moments = Moments()
    moments.update(np.stack([price, grade, rounding], axis=1))
    expected = price.var(), grade.var(), (price.var() + grade.var()) / 2
    np.testing.assert_allclose(moments.divisors(), expected)


@pytest.mark.parametrize(("small", "shared"), [(5, True), (40, False), (99, False)])
def test_many_columns_share_a_variance_unless_many_are_smaller(small: int, shared: bool) -> None:
    """A few words that never occur do not change the scale of a vocabulary; two kinds of numbers do."""
    rows = np.random.default_rng(0).standard_normal((50, 100))
    rows[:, :small] *= 0.01
    moments = Moments()
    moments.update(rows)
    found = moments.divisors()
    if shared:
        np.testing.assert_allclose(found, rows.var(axis=0).mean())
    else:
        np.testing.assert_allclose(found, rows.var(axis=0))
