"""Losses and their scales against hand computation, kind by kind and in pairs, and their invariances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import entr, expit, log_softmax, logit, rel_entr, softmax

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Floats
from onnx_oamip.core.records.objective import Form
from onnx_oamip.objective import (
    Normaliser,
    Objective,
    Part,
    Term,
    compare,
    divergences,
    loss,
    normaliser,
    sums,
)
from onnx_oamip.objective.losses import LOST
from onnx_oamip.objective.moments import COLUMNS

CLASSES = Term("c", "c", "c", "classes", 1, form="logits")
BINARY = Term("b", "b", "b", "binary", 1, form="logits")
VALUES = Term("v", "v", "v", "values", 1)
EMBEDDING = Term("e", "e", "e", "embedding", 1)
AMBIGUOUS = Term("a", "a", "a", "ambiguous", 1)
EXACT = Term("x", "x", "x", "exact")
KINDS = {t.kind: t for t in (CLASSES, BINARY, VALUES, EMBEDDING, AMBIGUOUS, EXACT)}


def scaled(terms: Sequence[Term], *batches: Sequence[Array]) -> Objective:
    """The objective with its scales, from batches of the original's outputs."""
    statistics = Normaliser(Objective(tuple(terms)))
    for batch in batches:
        statistics.update(batch)
    return statistics.finish()


def outputs(kind: str, seed: int, rows: int = 40, columns: int = 3) -> Array:
    rng = np.random.default_rng(seed)
    if kind == "exact":
        return rng.integers(0, 3, rows)
    if kind == "classes":  # no class takes most of the decisions
        return 3 * np.eye(columns)[np.arange(rows) % columns] + rng.standard_normal((rows, columns))
    return rng.standard_normal((rows, columns)) + 0.5


def by_hand(kind: str, truth: Array, found: Array) -> float:
    """The loss of a term over that of the average answer, written out for one tensor (rows, columns)."""
    if kind == "exact":
        return float((truth != found).mean())
    if kind == "classes":
        p, q = softmax(truth, axis=1), softmax(found, axis=1)
        return float(rel_entr(p, q).sum() / rel_entr(p, p.mean(axis=0)).sum())
    if kind == "binary":
        p, q = expit(truth), expit(found)
        positive = truth > 0
        weight = np.where(positive, 0.5 / positive.mean(axis=0), 0.5 / (~positive).mean(axis=0))
        m = (weight * p).mean(axis=0)
        divergence = rel_entr(p, q) + rel_entr(1 - p, 1 - q)
        return float(
            (weight * divergence).sum() / (weight * (rel_entr(p, m) + rel_entr(1 - p, 1 - m))).sum()
        )
    if kind == "values":
        return float((np.square(truth - found).mean(axis=0) / truth.var(axis=0)).mean())
    if kind == "embedding":
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (truth, found))
        middle = a.mean(axis=0) / np.linalg.norm(a.mean(axis=0))
        return float((1 - (a * b).sum(axis=1)).mean() / (1 - a @ middle).mean())
    return max(by_hand("classes", truth, found), by_hand("values", truth, found))


@pytest.mark.parametrize("kind", KINDS)
def test_term_equals_a_hand_computation(kind: str) -> None:
    truth, found = outputs(kind, 0), outputs(kind, 1)
    objective = scaled([KINDS[kind]], [truth])  # type: ignore[index]
    assert compare(objective, [truth], [found]).terms[0] == pytest.approx(
        by_hand(kind, truth, found), rel=1e-12
    )


@pytest.mark.parametrize("pair", list(combinations(KINDS, 2)), ids=lambda pair: " and ".join(pair))
def test_total_of_two_terms_is_their_weighted_mean(pair: tuple[str, str]) -> None:
    truth, found = ([outputs(kind, seed + i) for i, kind in enumerate(pair)] for seed in (0, 7))
    terms = [replace(KINDS[pair[0]], weight=3.0), KINDS[pair[1]]]  # type: ignore[index]
    result = compare(scaled(terms, truth), truth, found)
    expected = [by_hand(kind, a, b) for kind, a, b in zip(pair, truth, found, strict=True)]
    assert result.terms == pytest.approx(expected, rel=1e-12)
    assert result.total == pytest.approx((3 * expected[0] + expected[1]) / 4, rel=1e-12)


@pytest.mark.parametrize("kind", ["classes", "binary", "values", "embedding"])
def test_constant_average_output_costs_one(kind: str) -> None:
    truth = outputs(kind, 3)
    average: Array
    if kind == "classes":
        average = np.log(softmax(truth, axis=1).mean(axis=0))
    elif kind == "binary":
        positive = truth > 0
        weight = np.where(positive, 0.5 / positive.mean(axis=0), 0.5 / (~positive).mean(axis=0))
        average = logit((weight * expit(truth)).mean(axis=0))
    elif kind == "values":
        average = truth.mean(axis=0)
    else:
        average = (truth / np.linalg.norm(truth, axis=1, keepdims=True)).mean(axis=0)
    objective = scaled([KINDS[kind]], [truth])  # type: ignore[index]
    assert compare(
        objective, [truth], [np.broadcast_to(average, truth.shape)]
    ).total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("form", ["logits", "probabilities"])
@pytest.mark.parametrize("block", [1, 50, 1 << 14])
def test_divergences_do_not_depend_on_their_blocks(
    form: Form, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergences, "BLOCK", block)
    truth, found = outputs("values", 0, 41, 7), outputs("values", 1, 41, 7)
    p, q = softmax(truth, axis=1), softmax(found, axis=1)
    given_scores = (p, q) if form == "probabilities" else (truth, found)
    divergence = divergences.class_divergence(*given_scores, form)
    np.testing.assert_allclose(divergence, rel_entr(p, q).sum(axis=1), rtol=1e-12)
    assert divergences.class_divergence(truth[:0], found[:0], form).shape == (0,)


def test_classifier_loss_is_proportional_to_mean_divergence() -> None:
    """Also where nearly all samples are of one class: the order of widths stays what the plain divergence says."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((200, 4)) + np.asarray([4, 0, 0, 0])
    assert (truth.argmax(axis=1) == 0).mean() > 0.95
    objective = scaled([replace(CLASSES, balanced=False, labelled=True)], [truth])
    ratios = []
    for noise in (0.01, 0.1, 1.0, 5.0):
        found = truth + noise * rng.standard_normal(truth.shape)
        plain = rel_entr(softmax(truth, axis=1), softmax(found, axis=1)).sum(axis=1).mean()
        ratios.append(compare(objective, [truth], [found]).total / plain)
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-9)


@pytest.mark.parametrize("kind", ["classes", "binary"])
def test_probabilities_are_recognised(kind: str) -> None:
    logits, moved = outputs(kind, 0), outputs(kind, 1)
    term = replace(KINDS[kind], form="auto")  # type: ignore[index]
    make = expit if kind == "binary" else (lambda values: softmax(values, axis=1))
    raw, plain = scaled([term], [logits]), scaled([term], [make(logits)])
    assert plain.terms[0].scale is not None
    assert plain.terms[0].scale.form == "probabilities"
    assert raw.terms[0].scale is not None
    assert raw.terms[0].scale.form == "logits"
    expected = compare(raw, [logits], [moved]).total
    assert compare(plain, [make(logits)], [make(moved)]).total == pytest.approx(expected, rel=1e-9)


def test_one_batch_of_logits_excludes_probabilities() -> None:
    term = replace(BINARY, form="auto")
    first, second = np.full((2, 1), 0.5), np.asarray([[3.0], [-2.0]])
    for batches in ([first, second], [second, first]):
        found = scaled([term], *([b] for b in batches)).terms[0].scale
        assert found is not None
        assert found.form == "logits"


def test_rare_positions_weigh_as_much_as_the_background() -> None:
    """Of 20 positions one is positive: an error there costs 19 times one elsewhere."""
    truth = np.where(np.arange(20)[:, None] == 7, 2.0, -2.0) * np.asarray([[-1, 1]])
    objective = scaled([CLASSES], [truth])
    scale = objective.terms[0].scale
    assert scale is not None
    assert scale.background == 0
    assert scale.balance == pytest.approx(np.asarray([[10 / 19, 10.0]]))
    costs = []
    for place in (0, 7):
        found = truth.copy()
        found[place] *= -1
        costs.append(compare(objective, [truth], [found]).total)
    assert costs[1] == pytest.approx(19 * costs[0], rel=1e-12)
    # Losing all positives costs as much as losing all others.
    sides = [
        np.where(np.arange(20)[:, None] == 7, -truth, truth),
        np.where(np.arange(20)[:, None] == 7, truth, -truth),
    ]
    assert compare(objective, [truth], [sides[0]]).total == pytest.approx(
        compare(objective, [truth], [sides[1]]).total
    )


def test_no_background_with_more_decisions_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = np.repeat(5 * np.eye(5), [18, 1, 1, 0, 0], axis=0)
    first, second = truth[:19], truth[19:]
    assert _background(scaled([CLASSES], [first], [second])) == 0
    monkeypatch.setattr(normaliser, "MAX_SUMS", 10)
    for batches in ([first], [second]), ([second], [first]):
        assert _background(scaled([CLASSES], *batches)) == -1
    one, other = Normaliser(Objective((CLASSES,))), Normaliser(Objective((CLASSES,)))
    one.update([first])
    other.update([second])
    one.merge(other)
    found = one.finish().terms[0].scale
    assert found is not None
    p = softmax(truth, axis=1)
    assert found.spread == pytest.approx(rel_entr(p, p.mean(axis=0)).sum() / len(p))
    assert _background(one.finish()) == -1


def _background(objective: Objective) -> int:
    scale = objective.terms[0].scale
    assert scale is not None
    return scale.background


def test_spread_with_background_equals_a_hand_computation() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((100, 3)) + np.asarray([4.0, 0.0, 0.0])
    truth[:5, 0] -= 8.0
    p = softmax(truth, axis=1)
    rare = truth.argmax(axis=1) != 0
    weight = np.where(rare, 0.5 / rare.mean(), 0.5 / (~rare).mean())[:, None]
    scale = scaled([CLASSES], [truth[:50]], [truth[50:]]).terms[0].scale
    assert scale is not None
    assert scale.background == 0
    assert scale.spread == pytest.approx(
        (weight * rel_entr(p, (weight * p).mean(axis=0))).sum() / len(p), rel=1e-9
    )


def test_rare_positives_of_a_binary_term_are_balanced_per_column() -> None:
    truth = np.full((40, 2), -1.0)
    truth[:2, 0] = truth[:20, 1] = 1.0
    scale = scaled([BINARY], [truth]).terms[0].scale
    assert scale is not None
    assert scale.balance == pytest.approx(np.asarray([[40 / 76, 10.0], [1.0, 1.0]]))


def test_background_class_must_exceed_the_dominance_threshold() -> None:
    truth = np.repeat(5 * np.eye(5), [8, 1, 1, 0, 0], axis=0)  # 80 %: not more than DOMINANT
    scale = scaled([CLASSES], [truth]).terms[0].scale
    assert scale is not None
    assert scale.background == -1


def test_binary_threshold_is_in_units_of_the_scores() -> None:
    """Scores above 3 are positive; odds are counted from there."""
    term = replace(BINARY, form="scores", threshold=3.0)
    truth, found = outputs("binary", 0) + 3, outputs("binary", 1) + 3
    expected = by_hand("binary", truth - 3, found - 3)
    assert compare(scaled([term], [truth]), [truth], [found]).total == pytest.approx(
        expected, rel=1e-12
    )


def test_score_at_the_threshold_is_negative() -> None:
    """The position has the weight of the negatives, not that of the rare positives."""
    truth = np.full((100, 1), -1.0)
    truth[:5] = 1.0
    objective = scaled([BINARY], [truth])

    def total(old: float) -> float:
        return compare(objective, [np.full((1, 1), old)], [np.full((1, 1), 1.0)]).total

    below, at, above = total(-1e-9), total(0.0), total(1e-9)
    assert at == pytest.approx(below, rel=1e-6)
    assert above > 2 * at


def test_tensors_of_any_rank_are_read_along_their_axis() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.standard_normal((2, 6, 4, 5, 3))
    rows, moved = (np.moveaxis(v, 1, -1).reshape(-1, 4) for v in (truth, found))
    for kind in ("classes", "binary", "values", "embedding", "ambiguous"):
        term = KINDS[kind]  # type: ignore[index]
        flat = compare(scaled([term], [rows]), [rows], [moved]).total
        assert compare(scaled([term], [truth]), [truth], [found]).total == pytest.approx(
            flat, rel=1e-12
        )


def test_part_of_a_tensor_is_compared_alone() -> None:
    truth, found = outputs("values", 0, columns=5), outputs("values", 1, columns=5)
    term = replace(VALUES, part=Part(1, 2, 4))
    expected = by_hand("values", truth[:, 2:4], found[:, 2:4])
    assert compare(scaled([term], [truth]), [truth], [found]).total == pytest.approx(
        expected, rel=1e-12
    )


def test_terms_of_one_tensor_read_it_once() -> None:
    boxes, scores = (
        replace(VALUES, tensor="y", part=Part(1, 0, 2)),
        replace(BINARY, tensor="y", part=Part(1, 2, 5)),
    )
    objective = Objective((boxes, Term("z", "z", "z", "ignore"), scores))
    assert objective.tensors == ["y"]
    truth, found = outputs("values", 0, columns=5), outputs("values", 1, columns=5)
    statistics = Normaliser(objective)
    statistics.update([truth])
    expected = [
        by_hand("values", truth[:, :2], found[:, :2]),
        by_hand("binary", truth[:, 2:], found[:, 2:]),
    ]
    assert compare(statistics.finish(), [truth], [found]).terms == pytest.approx(
        expected, rel=1e-12
    )


# ------------------------------------------------------------------------------------------------------ dead columns


def test_constant_column_is_scaled_by_the_others() -> None:
    truth = np.column_stack([outputs("values", 0, columns=1) * 100, np.full(40, 7.0)])
    objective = scaled([VALUES], [truth])
    found = truth + np.asarray([0.0, 3.0])
    assert compare(objective, [truth], [found]).total == pytest.approx(9 / truth[:, 0].var() / 2)


def test_constant_outputs_are_scaled_by_their_magnitude() -> None:
    truth = np.full((5, 2), 4.0)
    assert compare(scaled([VALUES], [truth]), [truth], [truth + 2.0]).total == pytest.approx(4 / 16)
    zeros = np.zeros((5, 2))
    assert compare(scaled([VALUES], [zeros]), [zeros], [zeros + 0.5]).total == pytest.approx(0.25)


def test_small_column_keeps_its_own_scale() -> None:
    """Scores between 0 and 1 beside boxes in thousands of pixels."""
    rng = np.random.default_rng(0)
    truth = rng.random((50, 2)) * [5000, 0.05]
    found = np.column_stack([truth[:, 0], np.full(50, truth[:, 1].mean())])
    assert compare(scaled([VALUES], [truth]), [truth], [found]).total == pytest.approx(0.5)


def test_many_columns_share_their_variance() -> None:
    truth, found = (
        outputs("values", 0, columns=COLUMNS + 1),
        outputs("values", 1, columns=COLUMNS + 1),
    )
    expected = np.square(truth - found).mean() / truth.var(axis=0).mean()
    assert compare(scaled([VALUES], [truth]), [truth], [found]).total == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("kind", ["classes", "binary", "embedding"])
def test_constant_predictions_still_have_a_scale(kind: str) -> None:
    truth = np.tile([[2.0, -1.0, 0.5]], (10, 1))
    result = compare(scaled([KINDS[kind]], [truth]), [truth], [truth[:, ::-1]])  # type: ignore[index]
    assert 0 < result.total <= LOST


# ---------------------------------------------------------------------------------------------------- not finite


def test_equal_infinities_cost_nothing() -> None:
    masked = np.asarray([[1.0, 0.0, -np.inf], [0.0, 2.0, -np.inf]])
    kept = np.asarray([[1.0, 0.0], [0.0, 2.0]])
    for kind in ("classes", "values", "binary"):
        term = KINDS[kind]  # type: ignore[index]
        assert compare(scaled([term], [masked]), [masked], [masked]).total == 0
    found = np.asarray([[0.5, 0.5, -np.inf], [0.0, 2.0, -np.inf]])
    expected = compare(scaled([CLASSES], [kept]), [kept], [found[:, :2]]).total
    assert compare(scaled([CLASSES], [masked]), [masked], [found]).total == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("kind", ["classes", "binary", "values", "ambiguous", "embedding"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_that_becomes_nan_or_infinite_is_lost(kind: str, bad: float) -> None:
    truth = outputs(kind, 0)
    found = truth.copy()
    found[3, 1] = bad
    objective = scaled([KINDS[kind]], [truth])  # type: ignore[index]
    assert compare(objective, [truth], [found]).total == LOST
    # One bad batch of many is enough.
    total = sums(objective, [truth], [found]) + 10 * sums(objective, [truth], [truth])
    assert loss(objective, total).total == LOST


def test_finite_value_for_a_masked_logit_is_lost() -> None:
    masked = np.asarray([[1.0, 0.0, -np.inf], [0.0, 2.0, -np.inf]])
    for kind in ("classes", "binary", "values"):
        objective = scaled([KINDS[kind]], [masked])  # type: ignore[index]
        assert (
            compare(objective, [masked], [np.where(np.isinf(masked), -9.0, masked)]).total == LOST
        )


def test_changed_output_shape_is_lost() -> None:
    truth = outputs("values", 0)
    assert compare(scaled([VALUES], [truth]), [truth], [truth[:-1]]).total == LOST
    assert compare(scaled([EXACT], [truth]), [truth], [truth[:-1]]).total == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_original_outputs_must_be_finite(bad: float) -> None:
    with pytest.raises(
        DataError, match="the model's output 'v' is NaN or infinite on some of this data"
    ):
        scaled([VALUES], [np.asarray([[1.0, bad]])])


def test_half_precision_is_accumulated_in_double() -> None:
    truth = (outputs("values", 0, 4000) * 200).astype(np.float16)
    found = (truth * np.float16(1.01)).astype(np.float16)
    expected = by_hand("values", truth.astype(np.float64), found.astype(np.float64))
    assert compare(scaled([VALUES], [truth]), [truth], [found]).total == pytest.approx(
        expected, rel=1e-12
    )


def test_extreme_logits_do_not_overflow() -> None:
    truth = np.asarray([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    for term in (CLASSES, BINARY):
        objective = scaled([term], [truth])
        assert compare(objective, [truth], [truth]).total == 0
        assert 0 < compare(objective, [truth], [truth[::-1]]).total <= LOST


# --------------------------------------------------------------------------------------------------------- properties


ROWS = st.integers(2, 30)
SEEDS = st.integers(0, 10_000)
NAMES = st.sampled_from(["classes", "binary", "values", "embedding", "ambiguous", "exact"])


def answers(kind: str, values: Floats) -> Floats:
    """Properties that a loss of 0 implies."""
    if kind == "classes":
        return log_softmax(values, axis=1)
    if kind == "embedding":
        return values / np.linalg.norm(values, axis=1, keepdims=True)
    return values


@given(NAMES, ROWS, SEEDS, st.booleans())
def test_a_loss_of_zero_means_equal(kind: str, rows: int, seed: int, change: bool) -> None:
    truth = outputs(kind, seed, rows)
    found = truth.copy()
    if change:
        place = np.random.default_rng(seed).integers(rows)
        found[place] = found[place] + 1 if kind == "exact" else found[place][..., ::-1]
    total = compare(scaled([KINDS[kind]], [truth]), [truth], [found]).total  # type: ignore[index]
    same = bool(np.array_equal(truth, found)) or np.allclose(
        answers(kind, truth), answers(kind, found), atol=1e-9
    )
    assert (total == 0) == same
    assert total >= 0


@given(NAMES, st.lists(st.integers(1, 9), min_size=1, max_size=6), SEEDS)
def test_loss_does_not_depend_on_batch_splits(kind: str, sizes: list[int], seed: int) -> None:
    rows = sum(sizes) + 1
    truth, found = outputs(kind, seed, rows), outputs(kind, seed + 1, rows)
    term = KINDS[kind]  # type: ignore[index]
    whole = scaled([term], [truth])
    parts = [np.split(v, np.cumsum(sizes)) for v in (truth, found)]
    split = scaled([term], *([part] for part in parts[0]))
    merged, other = Normaliser(Objective((term,))), Normaliser(Objective((term,)))
    for i, part in enumerate(parts[0]):
        (merged if i % 2 else other).update([part])
    merged.merge(other)
    expected = compare(whole, [truth], [found]).total
    for objective in (split, merged.finish()):
        total = sum(sums(objective, [a], [b]) for a, b in zip(*parts, strict=True))
        assert loss(objective, np.asarray(total)).total == pytest.approx(
            expected, rel=1e-9, abs=1e-12
        )


@given(NAMES, ROWS, SEEDS)
def test_loss_does_not_depend_on_sample_order(kind: str, rows: int, seed: int) -> None:
    truth, found = outputs(kind, seed, rows), outputs(kind, seed + 1, rows)
    order = np.random.default_rng(seed).permutation(rows)
    term = KINDS[kind]  # type: ignore[index]
    expected = compare(scaled([term], [truth]), [truth], [found]).total
    moved = compare(scaled([term], [truth[order]]), [truth[order]], [found[order]]).total
    assert moved == pytest.approx(expected, rel=1e-9)


@given(
    st.sampled_from(["values", "embedding"]), ROWS, SEEDS, st.sampled_from([1e-6, 1e-3, 1e3, 1e6])
)
def test_loss_does_not_depend_on_output_scale(kind: str, rows: int, seed: int, unit: float) -> None:
    truth, found = outputs(kind, seed, rows), outputs(kind, seed + 1, rows)
    term = KINDS[kind]  # type: ignore[index]
    expected = compare(scaled([term], [truth]), [truth], [found]).total
    assert compare(
        scaled([term], [unit * truth]), [unit * truth], [unit * found]
    ).total == pytest.approx(expected)


@given(ROWS, SEEDS, st.sampled_from([1e-3, 1e3]))
def test_loss_does_not_depend_on_the_scale_of_one_column(rows: int, seed: int, unit: float) -> None:
    truth, found = outputs("values", seed, rows), outputs("values", seed + 1, rows)
    scale = np.asarray([unit, 1.0, 1.0])
    expected = compare(scaled([VALUES], [truth]), [truth], [found]).total
    assert compare(
        scaled([VALUES], [truth * scale]), [truth * scale], [found * scale]
    ).total == pytest.approx(expected)


@given(NAMES, ROWS, SEEDS)
def test_loss_does_not_depend_on_column_order(kind: str, rows: int, seed: int) -> None:
    if kind == "exact":
        return
    truth, found = outputs(kind, seed, rows, 4), outputs(kind, seed + 1, rows, 4)
    order = np.random.default_rng(seed).permutation(4)
    term = KINDS[kind]  # type: ignore[index]
    expected = compare(scaled([term], [truth]), [truth], [found]).total
    moved = compare(scaled([term], [truth[:, order]]), [truth[:, order]], [found[:, order]]).total
    assert moved == pytest.approx(expected, rel=1e-9)


@given(ROWS, SEEDS)
def test_spread_equals_the_entropy(rows: int, seed: int) -> None:
    """Entropy of the mean answer, less the mean entropy of the answers."""
    truth = outputs("classes", seed, 3 * rows)
    scale = scaled([CLASSES], [truth]).terms[0].scale
    assert scale is not None
    p = softmax(truth, axis=1)
    if scale.background < 0:
        assert scale.spread == pytest.approx(
            entr(p.mean(axis=0)).sum() - entr(p).sum(axis=1).mean(), rel=1e-9
        )
