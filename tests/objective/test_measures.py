"""Measures of what a pruned model still does, against hand computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_oamip.core.records import Array
from onnx_oamip.objective import (
    Measure,
    Measures,
    Normaliser,
    Objective,
    Part,
    Term,
    compare,
)

CLASSES = Term("c", "c", "c", "classes", 1, form="logits")
BINARY = Term("b", "b", "b", "binary", 1, form="logits")
VALUES = Term("v", "v", "v", "values", 1)
EMBEDDING = Term("e", "e", "e", "embedding", 1)
AMBIGUOUS = Term("a", "a", "a", "ambiguous", 1)
EXACT = Term("x", "x", "x", "exact")
KINDS = {t.kind: t for t in (CLASSES, BINARY, VALUES, EMBEDDING, AMBIGUOUS, EXACT)}


def scaled(terms: Sequence[Term], truth: Sequence[Array]) -> Objective:
    normaliser = Normaliser(Objective(tuple(terms)))
    normaliser.update(truth)
    return normaliser.finish()


def measured(term: Term, truth: Array, found: Array, labels: Array | None = None) -> Measure:
    measures = Measures(scaled([term], [truth]))
    measures.update([truth], [found], labels)
    (result,) = measures.results()
    return result


def one_hot(classes: Sequence[int], count: int = 3) -> Array:
    return np.eye(count)[np.asarray(classes)]


# ------------------------------------------------------------------------------------------------------------- classes


def test_unlabelled_classes_lose_points_of_agreement() -> None:
    found = measured(CLASSES, one_hot([0, 1, 2, 0]), one_hot([0, 1, 1, 0]))
    assert found.values["agreement"] == 0.75
    assert found.values["accuracy_before"] is None
    assert (found.measure, found.lost) == ("agreement of decisions", 25.0)
    assert not found.warnings


def test_output_of_another_shape_agrees_with_nothing() -> None:
    truth = one_hot([0, 1, 2])
    term = replace(CLASSES, labelled=True)
    found = measured(term, truth, one_hot([0, 1, 2], 4), np.asarray([0, 1, 2]))
    assert found.values["agreement"] == 0.0
    assert (found.values["accuracy_before"], found.values["accuracy_after"]) == (1.0, 0.0)


def test_least_value_decides_where_the_term_says_so() -> None:
    """Distances: a change of the far ones decides nothing, and the loss sees the near ones."""
    term = replace(CLASSES, form="logits", least=True)
    distances = np.asarray([[0.1, 3.0, 5.0], [4.0, 0.2, 2.0]])
    far = distances + np.asarray([[0.0, 9.0, 9.0], [9.0, 0.0, 9.0]])
    near = distances[:, [1, 0, 2]]
    assert measured(term, distances, far).values["agreement"] == 1.0
    assert measured(term, distances, near).values["agreement"] == 0.0


def test_labelled_classes_lose_points_of_accuracy() -> None:
    term = replace(CLASSES, labelled=True)
    found = measured(term, one_hot([0, 1, 2, 0]), one_hot([0, 1, 1, 0]), np.asarray([0, 1, 2, 1]))
    assert (found.values["accuracy_before"], found.values["accuracy_after"]) == (0.75, 0.5)
    assert (found.measure, found.lost) == ("accuracy", 25.0)


def test_better_accuracy_loses_no_points() -> None:
    found = measured(
        replace(CLASSES, labelled=True), one_hot([0, 1]), one_hot([0, 2]), np.asarray([0, 2])
    )
    assert found.lost == 0.0
    assert found.values["agreement"] == 0.5


def test_labels_belong_to_the_labelled_term_alone() -> None:
    found = measured(CLASSES, one_hot([0, 1]), one_hot([0, 2]), np.asarray([0, 2]))
    assert found.values["accuracy_before"] is None
    assert found.lost == 50.0


def test_accuracy_counts_labels_by_position() -> None:
    """Labels of a segmenter: one for each pixel."""
    rng = np.random.default_rng(0)
    truth, found = rng.standard_normal((2, 4, 3, 5, 6))
    labels = rng.integers(0, 3, (4, 5, 6))
    result = measured(replace(CLASSES, labelled=True), truth, found, labels)
    assert result.values["agreement"] == (truth.argmax(1) == found.argmax(1)).mean()
    assert result.values["accuracy_before"] == (truth.argmax(1) == labels).mean()
    assert result.values["accuracy_after"] == (found.argmax(1) == labels).mean()


def test_rare_classes_are_measured_by_recall() -> None:
    """99 % of the positions agree, and one of three faces is found."""
    before = np.zeros(200, int)
    before[:3] = 1
    after = before.copy()
    after[1:3] = 0
    found = measured(CLASSES, one_hot(before.tolist(), 2), one_hot(after.tolist(), 2))
    assert found.values["agreement"] == 0.99
    assert found.values["recall"] == pytest.approx(1 / 3)
    assert found.values["precision"] == 1.0
    assert found.values["positives"] == pytest.approx(3 / 200)
    assert found.values["background"] == 0
    assert found.measure == "recall of all decisions but class 0"
    assert found.lost == pytest.approx(200 / 3)
    assert found.classes == ((1, 3 / 200, pytest.approx(1 / 3)),)
    (warning,) = found.warnings
    assert warning == (
        "only 1.5 % of the decisions of 'c' are for other classes than 0 on this data; agreement says little, look at "
        "the recall of all decisions but class 0"
    )


def test_false_positives_are_counted() -> None:
    before = np.zeros(100, int)
    before[:10] = 1
    after = np.where(np.arange(100) < 60, 1, 0)
    found = measured(CLASSES, one_hot(before.tolist(), 2), one_hot(after.tolist(), 2))
    assert found.values["recall"] == 1.0
    assert found.values["precision"] == pytest.approx(10 / 60)
    assert (found.measure, found.lost) == ("agreement of decisions", 50.0)
    assert not found.warnings


@pytest.mark.parametrize("kind", ["classes", "binary"])
def test_equal_decisions_are_warned_of(kind: str) -> None:
    scores = one_hot([0] * 40, 2) if kind == "classes" else np.full((40, 1), -1.0)
    found = measured(CLASSES if kind == "classes" else BINARY, scores, scores)
    assert found.lost == 0
    decision = "class 0" if kind == "classes" else "negative"
    (warning,) = found.warnings
    assert warning.startswith(f"all decisions of '{found.term}' are {decision} on this data")
    few = measured(CLASSES if kind == "classes" else BINARY, scores[:5], scores[:5])
    assert not few.warnings


def test_rare_classes_of_many_are_listed_worst_first() -> None:
    before = np.repeat([0, 1, 2, 3], [60, 38, 1, 1])
    after = np.where(before == 3, 0, before)
    found = measured(CLASSES, one_hot(before.tolist(), 4), one_hot(after.tolist(), 4))
    assert found.classes == ((3, 0.01, 0.0), (2, 0.01, 1.0))
    assert (found.measure, found.lost) == ("agreement of decisions", 1.0)


def test_nan_scores_agree_with_no_class() -> None:
    found = one_hot([0, 1, 2])
    found[1] = np.nan
    assert measured(CLASSES, one_hot([0, 1, 2]), found).values["agreement"] == pytest.approx(2 / 3)


# -------------------------------------------------------------------------------------------------------------- binary


def bits(text: str) -> Array:
    return np.asarray([[1.0 if bit == "1" else -1.0] for bit in text])


@pytest.mark.parametrize(
    ("before", "after", "agreement", "recall", "precision", "worst"),
    [
        ("1100", "1100", 1.0, 1.0, 1.0, ("agreement of decisions", 0.0)),
        ("1100", "1000", 0.75, 0.5, 1.0, ("recall of decisions", 50.0)),
        ("1000", "1110", 0.5, 1.0, 1 / 3, ("precision of decisions", pytest.approx(200 / 3))),
        ("1110", "0001", 0.0, 0.0, 0.0, ("agreement of decisions", 100.0)),
        ("0000", "0001", 0.75, None, 0.0, ("precision of decisions", 100.0)),
        ("0000", "0000", 1.0, None, None, ("agreement of decisions", 0.0)),
        ("1111", "0000", 0.0, 0.0, None, ("agreement of decisions", 100.0)),
    ],
)
def test_binary_decisions_lose_by_their_worst_measure(
    before: str,
    after: str,
    agreement: float,
    recall: float | None,
    precision: float | None,
    worst: tuple[str, float],
) -> None:
    found = measured(BINARY, bits(before), bits(after))
    assert found.values["agreement"] == agreement
    assert found.values["recall"] == recall
    assert found.values["precision"] == pytest.approx(precision)
    assert (found.measure, found.lost) == worst


def test_binary_threshold_decides_agreement() -> None:
    term = replace(BINARY, threshold=2.0)
    truth, found = np.asarray([[1.0], [3.0], [2.5]]), np.asarray([[1.9], [2.1], [1.0]])
    result = measured(term, truth, found)
    assert result.values["agreement"] == pytest.approx(2 / 3)
    assert result.values["recall"] == 0.5


def test_probabilities_are_decided_at_one_half() -> None:
    truth, found = np.asarray([[0.6], [0.4], [0.9]]), np.asarray([[0.4], [0.1], [0.6]])
    assert measured(replace(BINARY, form="auto"), truth, found).values[
        "agreement"
    ] == pytest.approx(2 / 3)


def test_few_positives_give_a_warning() -> None:
    truth = bits("1" + "0" * 29)
    found = measured(BINARY, truth, -np.ones_like(truth))
    assert found.values["positives"] == pytest.approx(1 / 30)
    assert found.lost == 100.0
    assert "only 3.3 % of the decisions of 'b' are positive" in found.warnings[0]


def test_accuracy_of_binary_labels() -> None:
    found = measured(
        replace(BINARY, labelled=True), bits("1100"), bits("1010"), np.asarray([1, 1, 0, 0])
    )
    assert (found.values["accuracy_before"], found.values["accuracy_after"]) == (1.0, 0.5)
    assert (found.measure, found.lost) == ("accuracy", 50.0)


def test_rare_positive_labels_are_balanced() -> None:
    """All answers are no: accuracy loses 2 points, balanced accuracy 50."""
    labels = np.zeros(50, int)
    labels[0] = 1
    truth = np.where(labels[:, None] == 1, 1.0, -1.0)
    found = measured(replace(BINARY, labelled=True), truth, -np.ones_like(truth), labels)
    assert found.values["accuracy_after"] == 0.98
    assert (found.measure, found.lost) == ("balanced accuracy", 50.0)


def test_labels_of_several_columns() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.standard_normal((2, 20, 3))
    labels = rng.integers(0, 2, (20, 3))
    result = measured(replace(BINARY, labelled=True), truth, found, labels)
    assert result.values["accuracy_before"] == pytest.approx(((truth > 0) == labels).mean())
    assert result.values["accuracy_after"] == pytest.approx(((found > 0) == labels).mean())


# -------------------------------------------------------------------------------------------------------------- values


def test_error_over_variance_by_column() -> None:
    """Age and weight: the loss is that of the worse one."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((100, 2)) * np.asarray([10, 20]) + np.asarray([35, 75])
    found = truth + rng.standard_normal((100, 2)) * np.asarray([1, 10])
    result = measured(VALUES, truth, found)
    expected = np.square(truth - found).mean(axis=0) / truth.var(axis=0)
    assert result.columns == pytest.approx(tuple(expected), rel=1e-12)
    assert result.values["error_over_variance"] == pytest.approx(expected.mean(), rel=1e-12)
    assert result.values["r2"] == pytest.approx(1 - expected.mean(), rel=1e-12)
    assert result.values["relative_error"] == pytest.approx(
        np.linalg.norm(truth - found) / np.linalg.norm(truth)
    )
    assert result.measure == "error over variance of column 1"
    assert result.lost == pytest.approx(100 * expected[1])


def test_non_finite_values_are_lost() -> None:
    truth = np.random.default_rng(0).standard_normal((10, 2))
    found = truth.copy()
    found[0, 1] = np.nan
    assert measured(VALUES, truth, found).lost == 100.0
    assert measured(VALUES, truth, truth[:-1]).lost == 100.0


def test_variance_is_that_of_the_data_compared() -> None:
    rng = np.random.default_rng(0)
    calibration, truth = rng.standard_normal((30, 2)), 5 * rng.standard_normal((30, 2))
    measures = Measures(scaled([VALUES], [calibration]))
    measures.update([truth], [truth + 1])
    (result,) = measures.results()
    assert result.columns == pytest.approx(tuple(1 / truth.var(axis=0)))


def test_single_sample_is_scaled_by_the_calibration_data() -> None:
    calibration = np.random.default_rng(0).standard_normal((30, 2))
    measures = Measures(scaled([VALUES], [calibration]))
    measures.update([calibration[:1]], [calibration[:1] + 0.1])
    (result,) = measures.results()
    assert result.columns == pytest.approx(tuple(0.01 / calibration.var(axis=0)))


def test_part_of_a_tensor_is_measured_alone() -> None:
    truth = np.random.default_rng(0).standard_normal((30, 5))
    found = truth + np.asarray([9.0, 0, 0, 9, 9])
    assert measured(replace(VALUES, part=Part(1, 1, 3)), truth, found).lost == 0.0


# ------------------------------------------------------------------------------------------------------------ the rest


def _directions(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_embedding_agreement_is_the_cosine_over_its_spread() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((200, 8))
    found = truth + rng.standard_normal((200, 8))
    cosine = (_directions(truth) * _directions(found)).sum(axis=1)
    spread = 1 - np.linalg.norm(_directions(truth).mean(axis=0))
    result = measured(EMBEDDING, truth, found)
    assert result.values["error_over_spread"] == pytest.approx((1 - cosine.mean()) / spread)
    assert result.values["cosine"] == pytest.approx(cosine.mean())
    assert result.values["cosine_1st_percentile"] == pytest.approx(np.percentile(cosine, 1))
    assert (result.measure, result.lost) == (
        "1 - cosine over its spread",
        pytest.approx(100 * (1 - cosine.mean()) / spread),
    )
    assert measured(EMBEDDING, truth, -truth).lost == 100.0


def test_average_vector_loses_everything_where_all_vectors_are_alike() -> None:
    rng = np.random.default_rng(0)
    truth = np.asarray([9.0, 0.0, 0.0, 0.0]) + rng.standard_normal((300, 4))
    average = np.broadcast_to(_directions(truth).mean(axis=0), truth.shape)
    result = measured(EMBEDDING, truth, average)
    assert result.values["cosine"] > 0.97
    assert result.lost == pytest.approx(100)


@pytest.mark.parametrize("fill", [-1e9, 1e9, -1e4])
def test_masked_entries_are_no_values(fill: float) -> None:
    """The variance is that of the entries that no mask covers."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((300, 3))
    found = truth + rng.standard_normal((300, 3)) / 2
    covered = rng.random((300, 3)) < 0.4
    term = replace(VALUES, fill=fill)
    kept = ~covered
    wanted = [
        np.square(found - truth)[kept[:, c], c].mean() / truth[kept[:, c], c].var()
        for c in range(3)
    ]
    result = measured(term, np.where(covered, fill, truth), np.where(covered, fill, found))
    assert result.columns == pytest.approx(tuple(wanted))
    # A mask that is added leaves a rounding of the large number, which differs in both.
    rounded = np.where(covered, np.round(fill + found, -1), found)
    assert measured(term, np.where(covered, fill, truth), rounded).columns == pytest.approx(
        tuple(wanted)
    )


def test_loss_of_masked_values_is_that_of_the_entries_without_a_mask() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((400, 2))
    found = truth + rng.standard_normal((400, 2))
    covered = np.zeros((400, 2), bool)
    covered[::2] = True
    objective = scaled([replace(VALUES, fill=-1e9)], [np.where(covered, -1e9, truth)])
    whole = compare(
        objective, [np.where(covered, -1e9, truth)], [np.where(covered, -1e9, found)]
    ).total
    error = np.square(found - truth)[1::2].mean(axis=0) / truth[1::2].var(axis=0)
    assert whole == pytest.approx(error.mean() / 2)  # half of all positions


def test_integer_agreement_is_the_share_of_equal_entries() -> None:
    result = measured(EXACT, np.asarray([1, 2, 3, 4]), np.asarray([1, 2, 0, 4]))
    assert (result.values["equal"], result.measure, result.lost) == (0.75, "equal entries", 25.0)
    assert measured(EXACT, np.asarray(["a", "b"]), np.asarray(["a", "c"])).lost == 50.0
    assert measured(EXACT, np.asarray([1, 2]), np.asarray([1, 2, 3])).lost == 100.0


def test_ambiguous_term_reports_the_worse_measure() -> None:
    """The second of two targets is always the larger one: the argmax says nothing, the variance does."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((50, 2)) + np.asarray([0, 100])
    found = np.broadcast_to(truth.mean(axis=0), truth.shape)
    result = measured(AMBIGUOUS, truth, found)
    assert result.values["agreement"] == 1.0
    assert result.lost == 100.0
    assert result.measure.startswith("error over variance")
    near = one_hot([0, 1, 2, 0]) * 0.01 + np.asarray([10.0, 10.0, 10.0]) * np.arange(4)[:, None]
    turned = near - 0.02 * one_hot([0, 1, 2, 0])
    assert measured(AMBIGUOUS, near, turned).measure == "agreement of decisions"


def test_worst_term_comes_first() -> None:
    truth = [one_hot([0, 1, 2, 0]), bits("1100"), np.arange(8.0).reshape(4, 2)]
    found = [one_hot([0, 1, 1, 0]), bits("1000"), np.arange(8.0).reshape(4, 2)]
    measures = Measures(scaled([CLASSES, BINARY, VALUES], truth))
    measures.update(truth, found)
    assert [(m.term, m.lost) for m in measures.results()] == [("b", 50.0), ("c", 25.0), ("v", 0.0)]


def test_no_measurement_loses_no_points() -> None:
    objective = scaled(list(KINDS.values()), [np.random.default_rng(0).standard_normal((4, 3))] * 6)
    assert [m.lost for m in Measures(objective).results()] == [0.0] * 6


@given(
    st.sampled_from(list(KINDS)),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_measures_do_not_depend_on_batch_splits(
    kind: str, sizes: list[int], seed: int, labelled: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = sum(sizes) + 1
    truth, found = rng.standard_normal((2, rows, 3))
    if kind == "exact":
        truth, found = truth > 0, found > 0
    labels = rng.integers(0, 2, (rows, 3)) if kind == "binary" else rng.integers(0, 3, rows)
    objective = scaled([replace(KINDS[kind], labelled=labelled)], [truth])  # type: ignore[index]
    whole, first, second = (Measures(objective) for _ in range(3))
    whole.update([truth], [found], labels)
    for i, part in enumerate(np.split(np.arange(rows), np.cumsum(sizes))):
        (first if i % 2 else second).update([truth[part]], [found[part]], labels[part])
    first.merge(second)
    (a,), (b,) = whole.results(), first.results()
    assert b.lost == pytest.approx(a.lost, rel=1e-9)
    assert b.measure == a.measure
    assert {k for k, v in b.values.items() if v is None} == {
        k for k, v in a.values.items() if v is None
    }
    known = {k: v for k, v in a.values.items() if v is not None}
    assert {k: b.values[k] for k in known} == pytest.approx(known, rel=1e-9)


@given(st.sampled_from(list(KINDS)), st.integers(0, 10_000))
def test_points_lie_between_0_and_100(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, found = rng.standard_normal((2, 20, 3)) * 10.0 ** rng.integers(-3, 4)
    result = measured(KINDS[kind], truth, found)  # type: ignore[index]
    assert 0 <= result.lost <= 100
    assert measured(KINDS[kind], truth, truth).lost == 0  # type: ignore[index]


def test_stacked_state_is_one_row_per_sample() -> None:
    """Two directions with means far apart: their distance is no variance over the samples."""
    truth = np.asarray([[[0.0], [2.0]], [[100.0], [102.0]]])  # (directions, samples, units)
    term = Term("h", "h", "h", "values", 2, stacked=(0,))
    assert (term.rows(truth) == [[0, 100], [2, 102]]).all()
    assert term.positions(truth) == (2,)
    found = measured(term, truth, truth + 1)
    assert found.values["error_over_variance"] == 1.0  # an error of 1 against a variance of 1
    assert measured(replace(term, stacked=()), truth, truth + 1).values["r2"] > 0.99  # type: ignore[operator]
