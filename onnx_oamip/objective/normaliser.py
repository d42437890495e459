"""The scale of every term, from one pass over the original's outputs on calibration data.

Each term is divided by its own spread, so that no output drowns another: a loss of 1 is that of a model which always
gives the average answer.

- ``values``: squared errors over the variance about the mean, column by column (``moments.Moments.divisors``). Columns
  of an ambiguous term that look like scores of classes which never occur count as constant (``_unused_classes``).
- ``classes``, ``binary``: mean KL divergence from the original's answers to their mean.
- ``embedding``: 1 - cosine to the mean direction.

Rare positives. Where one class takes more than ``DOMINANT`` of the original's decisions it is the background, and all
positions with another decision weigh as much in total as those of the background; in a binary term the positions that
the original decides positively weigh as much as the others, column by column. Weights are 1 on average. A classifier
with labels for its classes is not balanced (``Term.balanced``): its loss is the plain mean divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Floats
from onnx_oamip.core.records.objective import (
    Form,
    Objective,
    Scale,
    Term,
)
from onnx_oamip.data.dataset import DOMINANT
from onnx_oamip.objective.divergences import (
    directions,
    log_binary,
    log_classes,
    padded_sum,
    weighted,
)
from onnx_oamip.objective.moments import Moments, variance_range

MAX_SUMS = 1 << 24
"""Sums of probabilities by decision that are held at most, per term."""
MIN_SPREAD = 1e-3
"""Smallest spread of decisions, over the largest possible one."""
SUM_TOLERANCE = 1e-3
"""Tolerance of a sum of probabilities around 1."""
UNLIKE_SCORES = 30.0
"""Standard deviation of a column over that of another one from which a raw output holds values, not scores."""


class Normaliser:
    """Streaming statistics of the original's outputs, and the objective with its scales.

    Batches may come in any order and size; two normalisers of the same objective can be merged.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._sums = [_Sums(term) for term in objective.judged]

    def update(self, outputs: Sequence[Array]) -> None:
        """Add a batch.

        Args:
            outputs: Arrays of the original, in the order of ``objective.tensors``.

        Raises:
            DataError: A tensor holds NaN or plus infinity, from which no loss can be measured.
        """
        pairs = zip(self.objective.judged, self._sums, self.objective.pairs(outputs), strict=True)
        for term, sums, (array,) in pairs:
            if term.kind == "exact":
                continue
            rows = term.rows(array)
            if (np.isnan(rows) | np.isposinf(rows)).any():
                raise DataError(
                    f"the model's output '{term.output}' is NaN or infinite on some of this data, so no loss can be "
                    "measured; leave out the samples at which it is, or prune the model in float32."
                )
            sums.update(rows, term.values(array))

    def merge(self, other: Normaliser) -> None:
        """Add all batches of another normaliser.

        Args:
            other: Normaliser of the same objective.
        """
        for mine, theirs in zip(self._sums, other._sums, strict=True):
            mine.merge(theirs)

    def finish(self) -> Objective:
        """Compute the scales from all batches.

        Returns:
            The objective with the scale of every judged term.
        """
        scales = iter([sums.scale() for sums in self._sums])
        terms = [
            term if term.kind == "ignore" else replace(term, scale=next(scales))
            for term in self.objective.terms
        ]
        return replace(self.objective, terms=tuple(terms))


class _Sums:
    """Statistics of one term."""

    def __init__(self, term: Term) -> None:
        self.term = term
        self.moments = Moments() if term.kind in ("values", "ambiguous") else None
        self.direction = _Direction() if term.kind == "embedding" else None
        forms: tuple[Form, ...] = (
            ("probabilities", "logits") if term.form == "auto" else (term.form,)
        )
        reader = {"classes": _Classes, "ambiguous": _Classes, "binary": _Binary}.get(term.kind)
        self.answers: list[_Answers] = (
            [] if reader is None else [reader(term, form) for form in forms]
        )

    def update(self, rows: Floats, values: Floats) -> None:
        if self.moments is not None:
            self.moments.update(values)
        for statistic in (self.direction, *self.answers):
            if statistic is not None:
                statistic.update(rows)

    def merge(self, other: _Sums) -> None:
        if self.moments and other.moments:
            self.moments.merge(other.moments)
        if self.direction and other.direction:
            self.direction.merge(other.direction)
        for mine, theirs in zip(self.answers, other.answers, strict=True):
            mine.merge(theirs)

    def scale(self) -> Scale:
        if self.moments:
            variance = self.moments.divisors()
        else:
            variance = np.ones(1)
        if self.direction:
            return Scale("auto", self.direction.spread(), variance, -1, np.ones((1, 2)))
        for answers in self.answers:  # probabilities come first
            if answers.possible:
                return self._without_unused(answers.scale(variance), answers)
        return Scale("auto", 1.0, variance, -1, np.ones((1, 2)))

    def _without_unused(self, scale: Scale, answers: _Answers) -> Scale:
        """The scale where unused classes count as constant, if the other columns may be scores beside each other."""
        if self.term.kind != "ambiguous" or self.moments is None or answers.sums is None:
            return scale
        unused = _unused_classes(self.moments, decided=answers.sums[0])
        variance = self.moments.divisors(unused=unused)
        if not unused or unlikeness(variance) >= UNLIKE_SCORES:
            return scale
        return replace(scale, variance=variance, unused=unused)


class _Direction:
    """The mean of unit vectors."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Floats | float = 0.0

    def update(self, rows: Floats) -> None:
        self.count += len(rows)
        self.total = self.total + directions(rows).sum(axis=0)

    def merge(self, other: _Direction) -> None:
        self.count += other.count
        self.total = self.total + other.total

    def spread(self) -> float:
        """1 - cosine to the mean direction, on average."""
        return max(1 - float(np.linalg.norm(self.total)) / max(self.count, 1), MIN_SPREAD)


class _Answers:
    """Sums over the answers of one term, read in one form.

    ``possible``: whether all values seen may have this form; ``sums``: None before the first batch.
    """

    def __init__(self, term: Term, form: Form) -> None:
        self.term, self.form = term, form
        self.possible = True
        self.sums: tuple[Floats, ...] | None = None

    def update(self, rows: Floats) -> None:
        """Add rows (positions, columns)."""
        if self.form == "probabilities" and self.term.form == "auto" and self.possible:
            self.possible = self.may_be_probabilities(rows)
        if self.possible:
            self.add(self.sums_of(rows))

    def merge(self, other: _Answers) -> None:
        """Add the rows of another one."""
        self.possible &= other.possible
        if other.sums is not None:
            self.add(other.sums)

    def add(self, sums: tuple[Floats, ...]) -> None:
        """Add sums."""
        self.sums = (
            sums
            if self.sums is None
            else tuple(padded_sum(a, b) for a, b in zip(self.sums, sums, strict=True))
        )

    def may_be_probabilities(self, rows: Floats) -> bool:
        """Check whether rows may be probabilities."""
        raise NotImplementedError

    def sums_of(self, rows: Floats) -> tuple[Floats, ...]:
        """The sums of one batch."""
        raise NotImplementedError

    def scale(self, variance: Floats) -> Scale:
        """The scale of the term."""
        raise NotImplementedError


class _Classes(_Answers):
    """By decision of the original: counts and sums of negated entropies; sums of class probabilities.

    ``by_decision``: sums of probabilities of the positions with a decision, None where they are not needed or take more
    than ``MAX_SUMS`` numbers; then no background is looked for.
    """

    def __init__(self, term: Term, form: Form) -> None:
        super().__init__(term, form)
        self.by_decision: dict[int, Floats] | None = (
            {} if term.balanced and term.kind == "classes" else None
        )

    def may_be_probabilities(self, rows: Floats) -> bool:
        return bool((rows >= 0).all() and np.allclose(rows.sum(axis=1), 1, atol=SUM_TOLERANCE))

    def sums_of(self, rows: Floats) -> tuple[Floats, ...]:
        log = log_classes(rows, self.form)
        probability = np.exp(log)
        negentropy = weighted(log).sum(axis=1)
        decision = rows.argmax(axis=1)
        if self.by_decision is not None and len(rows):
            order = np.argsort(decision, kind="stable")
            seen, starts = np.unique(decision[order], return_index=True)
            sums = np.add.reduceat(probability[order], starts, axis=0)
            self._split(dict(zip(seen.tolist(), sums, strict=True)))
        counts = (np.bincount(decision, weights, rows.shape[1]) for weights in (None, negentropy))
        decided, entropies = (count.astype(np.float64) for count in counts)
        return decided, entropies, probability.sum(axis=0)

    def merge(self, other: _Answers) -> None:
        assert isinstance(other, _Classes)
        super().merge(other)
        self._split(other.by_decision)

    def _split(self, sums: Mapping[int, Floats] | None) -> None:
        """Add sums of probabilities by decision."""
        if self.by_decision is None or sums is None:
            self.by_decision = None
            return
        for decision, values in sums.items():
            self.by_decision[decision] = padded_sum(
                self.by_decision.get(decision, values[:0]), values
            )
        if sum(values.size for values in self.by_decision.values()) > MAX_SUMS:
            self.by_decision = None

    def scale(self, variance: Floats) -> Scale:
        if self.sums is None:
            return Scale(self.form, 1.0, variance, -1, np.ones((1, 2)))
        decided, negentropy, probability = self.sums
        total = max(float(decided.sum()), 1.0)
        most = int(decided.argmax())
        share = float(decided[most]) / total
        background, low, high = -1, 1.0, 1.0
        inside = np.zeros_like(probability)
        if self.by_decision is not None and DOMINANT < share < 1:
            background = most
            low = 0.5 / share
            high = 0.5 / (1 - share)
            inside = padded_sum(self.by_decision[most], inside)
        weight = np.full(len(decided), high)
        weight[background] = low
        mean = (low * inside + high * (probability - inside)) / total
        spread = float(weight @ negentropy) / total - float(
            weighted(_log(np.maximum(mean, 0.0))).sum()
        )
        least = MIN_SPREAD * float(np.log(max(len(mean), 2)))
        return Scale(self.form, max(spread, least), variance, background, np.asarray([[low, high]]))


class _Binary(_Answers):
    """By column and decision of the original: counts, sums of probabilities of yes, sums of negated entropies."""

    def may_be_probabilities(self, rows: Floats) -> bool:
        return bool(((rows >= 0) & (rows <= 1)).all())

    def sums_of(self, rows: Floats) -> tuple[Floats, ...]:
        yes, no = log_binary(rows, self.form, self.term.threshold)
        positive = rows > cutoff(self.term.threshold, self.form)
        parts = (np.ones_like(rows), np.exp(yes), weighted(yes) + weighted(no))
        sides = (~positive, positive)
        return tuple(
            np.stack([np.where(side, part, 0.0).sum(axis=0) for side in sides], axis=1)
            for part in parts
        )

    def scale(self, variance: Floats) -> Scale:
        if self.sums is None:
            return Scale(self.form, 1.0, variance, -1, np.ones((1, 2)))
        count, probability, negentropy = self.sums
        total = np.maximum(count.sum(axis=1, keepdims=True), 1)
        both = (count > 0).all(axis=1, keepdims=True) & self.term.balanced
        balance = np.where(both, 0.5 * total / np.maximum(count, 1), 1.0)
        mean = np.clip((balance * probability).sum(axis=1) / total[:, 0], 0.0, 1.0)
        kept = weighted(_log(mean)) + weighted(_log(1 - mean))
        spread = float(((balance * negentropy).sum(axis=1) / total[:, 0] - kept).mean())
        return Scale(self.form, max(spread, MIN_SPREAD * float(np.log(2))), variance, -1, balance)


def unlikeness(variances: Floats) -> float:
    """Compare the columns of a raw output.

    Args:
        variances: Their variances (columns,).

    Returns:
        The largest standard deviation over a small one (``moments.variance_range``).
    """
    low, high = variance_range(variances)
    return float(np.sqrt(high / low))


def _unused_classes(moments: Moments, decided: Floats) -> tuple[int, ...]:
    """Columns that would be scores of classes which never occur, if the columns are scores.

    They are never the highest, lie further below zero than the columns that are the highest spread, and hardly vary
    beside these. A column of values in a smaller unit hardly varies either, but lies near zero in the larger unit.

    Args:
        moments: Moments of the columns.
        decided: Positions at which each column is the highest (columns,).
    """
    occurs = decided > 0
    if occurs.sum() < 2:
        return ()  # nothing is decided by the columns
    variance = moments.deviation / np.maximum(moments.count, 1)
    spread = float(np.sqrt(variance[occurs].mean()))
    is_low = moments.mean < -spread
    is_steady = np.sqrt(variance) * UNLIKE_SCORES < spread
    return tuple(np.flatnonzero(~occurs & is_low & is_steady).tolist())


def cutoff(threshold: float | None, form: Form) -> float:
    """Return the threshold of a binary decision in the units of the tensor.

    Args:
        threshold: Threshold of the term, or None for even odds.
        form: Form of the scores.

    Returns:
        The threshold.
    """
    if threshold is not None:
        return threshold
    if form == "probabilities":
        return 0.5
    return 0.0


def _log(values: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(values)
