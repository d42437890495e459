"""Measures of a pruned model, term by term: agreement, recall, explained variance, cosine, worst term first.

Every measure has ``lost``, points from 0 to 100 that ``--max-drop`` bounds, and ``measure``, the name of what they are
points of:

- ``classes``: accuracy where the labels belong to the term; else the agreement of decisions, or where one class takes
  more than ``DOMINANT`` of them, the recall of all others if that is worse;
- ``binary``: accuracy with labels (balanced accuracy where fewer than ``RARE`` of them are positive); else the worst of
  agreement, recall and precision of decisions;
- ``values``: squared error over the variance about the mean, in the worst column;
- ``embedding``: 1 - mean cosine, over that of the average vector;
- ``ambiguous``: the worse of the agreement of decisions and the error over variance;
- ``exact``: unequal entries.

Recall and precision are those of what the original finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_oamip.core.records import (
    Array,
    Bools,
    Floats,
    Ints,
)
from onnx_oamip.core.records.objective import Measure, Objective, Term
from onnx_oamip.data.dataset import DOMINANT
from onnx_oamip.objective.divergences import angle, padded_sum, squared_error
from onnx_oamip.objective.moments import COLUMNS, Moments
from onnx_oamip.objective.normaliser import cutoff

RARE = 0.05
"""Share of decisions below which they are rare, and of positive decisions below which a warning is given."""
ENOUGH = 20
"""Decisions from which on a warning is given that all are the same."""
LISTED = 10
"""Rare classes listed at most."""
DIGITS = 9
"""Decimals of points: 100 * (0.99 - 0.985) is a little over 0.5, which its samples do not say."""


def promise(term: Term) -> str:
    """Name what ``--max-drop`` bounds for a term.

    Args:
        term: A judged term.

    Returns:
        The measure whose points are counted.
    """
    if term.labelled and term.kind in ("classes", "binary"):
        return "accuracy"
    return {
        "classes": "agreement with the original's classes",
        "binary": "agreement, recall and precision of decisions",
        "values": "error over variance, worst column",
        "embedding": "1 - mean cosine over that of the average vector",
        "ambiguous": "agreement of the largest column, or error over variance, whichever is worse",
        "exact": "equal entries",
    }[term.kind]


class Measures:
    """Streaming comparison of a pruned model with the original, for a scaled objective; can be merged."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._counts = [_counters(term) for term in objective.judged]

    def update(
        self,
        before: Sequence[Array],
        after: Sequence[Array],
        labels: Array | None = None,
    ) -> None:
        """Add a batch.

        Args:
            before: The original's arrays, in the order of ``objective.tensors``.
            after: The pruned model's, in the same order.
            labels: Labels of the samples, where the data has any.
        """
        pairs = self.objective.pairs(before, after)
        for term, counts, (old, new) in zip(
            self.objective.judged,
            self._counts,
            pairs,
            strict=True,
        ):
            given = labels if term.labelled else None
            for count in counts:
                count.update(old, new, given)

    def merge(self, other: Measures) -> None:
        """Add all batches of another comparison.

        Args:
            other: Measures of the same objective.
        """
        for mine, theirs in zip(self._counts, other._counts, strict=True):
            for count, more in zip(mine, theirs, strict=True):
                count.merge(more)

    def results(self) -> tuple[Measure, ...]:
        """Compute the measure of every judged term.

        Returns:
            Measures in the order of falling loss, equal losses in the order of the terms.
        """
        found = [
            _worst(t, [c.result() for c in cs])
            for t, cs in zip(self.objective.judged, self._counts, strict=True)
        ]
        return tuple(sorted(found, key=lambda measure: -measure.lost))


class _Counter:
    """Sums over batches, by name; added up as they are."""

    def __init__(self, term: Term) -> None:
        self.term = term
        self.sums: dict[str, Floats] = {}

    def update(self, old: Array, new: Array, labels: Array | None) -> None:
        """Add a batch."""
        raise NotImplementedError

    def result(self) -> Measure:
        """The measure of all batches."""
        raise NotImplementedError

    def merge(self, other: _Counter) -> None:
        """Add the batches of another counter."""
        self.add(**other.sums)

    def add(self, **sums: Floats | float) -> None:
        """Add up sums by name."""
        for name, value in sums.items():
            before = self.sums.get(name, np.zeros(()))
            self.sums[name] = padded_sum(before, np.asarray(value, np.float64))

    def sum(self, name: str) -> float:
        """A sum that is one number."""
        return float(self.sums.get(name, np.zeros(())).sum())

    def share(self, part: str, whole: str) -> float | None:
        """One sum over another; None where the latter is zero."""
        if self.sum(whole):
            return self.sum(part) / self.sum(whole)
        return None

    def measure(
        self,
        name: str,
        kept: float | None,
        values: Mapping[str, float | None],
        **more: object,
    ) -> Measure:
        """The measure whose points are what is short of 1."""
        if kept is None:
            lost = 0.0
        else:
            lost = round(float(np.clip(100 * (1 - kept), 0.0, 100.0)), DIGITS)
        return Measure(self.term.name, self.term.output, self.term.kind, name, lost, values, **more)  # type: ignore[arg-type]


class _Decisions(_Counter):
    """Agreement of class decisions: counts by the original's decision."""

    def update(self, old: Array, new: Array, labels: Array | None) -> None:
        before = self.term.rows(old)
        after = self.term.rows(new)
        same_shape = before.shape == after.shape
        a = before.argmax(axis=1)
        b = after.argmax(axis=1) if same_shape else np.full(len(a), -1)
        if same_shape:
            b = np.where(np.isnan(after).any(axis=1), -1, b)
        classes = before.shape[1]
        self.add(
            decided=np.bincount(a, minlength=classes).astype(np.float64),
            kept=np.bincount(a[a == b], minlength=classes).astype(np.float64),
            found=np.bincount(b[b >= 0], minlength=classes).astype(np.float64),
        )
        truth = None if labels is None else np.asarray(labels).reshape(-1)
        if truth is not None and len(truth) == len(a):
            self.add(
                labelled=len(a),
                right=float((a == truth).sum()),
                right_after=float((b == truth).sum()),
            )

    def result(self) -> Measure:
        decided = self.sums.get("decided", np.zeros(1))
        kept = self.sums.get("kept", np.zeros(1))
        agreement = self.share("kept", "decided")
        values: dict[str, float | None] = {
            "agreement": agreement,
            "accuracy_before": self.share("right", "labelled"),
            "accuracy_after": self.share("right_after", "labelled"),
        }
        rare = _rare(decided, kept)
        warnings = []
        background = int(decided.argmax())
        others = decided.sum() - decided[background]
        recall = None
        if decided[background] > DOMINANT * decided.sum() and others:
            recall = float((kept.sum() - kept[background]) / others)
            found = self.sums["found"].sum() - self.sums["found"][background]
            values.update(
                background=float(background),
                positives=float(others / decided.sum()),
                recall=recall,
                precision=float(recall * others / found) if found else None,
            )
            if others < RARE * decided.sum():
                warnings.append(_few_others(self.term, others / decided.sum(), background))
        elif not others and len(decided) > 1 and decided.sum() >= ENOUGH:
            warnings.append(_alike(self.term, f"class {background}"))
        drop = _drop(values)
        if drop is not None:
            return self.measure(
                "accuracy",
                1 - drop,
                values,
                classes=rare,
                warnings=tuple(warnings),
            )
        name = "agreement of decisions"
        worst = agreement
        if recall is not None and agreement is not None and recall < agreement:
            name = f"recall of all decisions but class {background}"
            worst = recall
        return self.measure(name, worst, values, classes=rare, warnings=tuple(warnings))


class _Binary(_Counter):
    """Agreement, recall and precision of decisions at a threshold."""

    def update(self, old: Array, new: Array, labels: Array | None) -> None:
        assert self.term.scale is not None, "the objective has no scales yet"
        limit = cutoff(self.term.threshold, self.term.scale.form)
        before = self.term.rows(old)
        after = self.term.rows(new)
        a = before > limit
        # Where there is no number any more, the decision is the other one.
        if after.shape == before.shape:
            b = np.where(np.isnan(after), ~a, after > limit)
        else:
            b = ~a
        self.add(
            all=a.size,
            both=(a & b).sum(),
            neither=(~a & ~b).sum(),
            before=a.sum(),
            after=b.sum(),
        )
        if labels is None:
            truth = None
        else:
            truth = np.asarray(labels).reshape(-1) > 0
        if truth is not None and truth.size == a.size:
            self._labelled(a.reshape(-1), b.reshape(-1), truth)

    def _labelled(self, a: Bools, b: Bools, truth: Bools) -> None:
        self.add(
            labelled=truth.size,
            positive=truth.sum(),
            negative=(~truth).sum(),
            found=(a & truth).sum(),
            found_after=(b & truth).sum(),
            refused=(~a & ~truth).sum(),
            refused_after=(~b & ~truth).sum(),
        )

    def result(self) -> Measure:
        whole = self.sum("all")
        positives = self.share("before", "all")
        found: dict[str, float | None] = {
            "agreement": (self.sum("both") + self.sum("neither")) / whole if whole else None,
            "recall": self.share("both", "before"),
            "precision": self.share("both", "after"),
        }
        few = positives is not None and positives < RARE
        warnings = (_few(self.term, positives),) if few and positives else ()
        if positives == 0 and whole >= ENOUGH:
            warnings = (_alike(self.term, "negative"),)
        values = {**found, "positives": positives}
        for when in ("", "_after"):
            right = self.sum(f"found{when}") + self.sum(f"refused{when}")
            name = "after" if when else "before"
            labelled = self.sum("labelled")
            values[f"accuracy_{name}"] = right / labelled if labelled else None
            sides = (
                self.share(f"found{when}", "positive"),
                self.share(f"refused{when}", "negative"),
            )
            both = [side for side in sides if side is not None]
            values[f"balanced_accuracy_{name}"] = sum(both) / len(both) if both else None
        drop = _drop(values)
        if drop is None:
            known = {name: value for name, value in found.items() if value is not None}
            name = min(known, key=lambda name: known[name], default="agreement")
            return self.measure(f"{name} of decisions", known.get(name), values, warnings=warnings)
        rare = self.sum("positive") < RARE * self.sum("labelled")
        balanced = _drop(values, "balanced_accuracy")
        if rare and balanced is not None:
            return self.measure("balanced accuracy", 1 - balanced, values, warnings=warnings)
        return self.measure("accuracy", 1 - drop, values, warnings=warnings)


class _Values(_Counter):
    """Squared error of every column over its variance on the data that is compared."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self.moments = Moments()

    def update(
        self,
        old: Array,
        new: Array,
        labels: Array | None,  # noqa: ARG002
    ) -> None:
        before = self.term.values(old)
        after = self.term.values(new)
        known = np.isfinite(before)
        if after.shape == before.shape:
            error = squared_error(before, after)
        else:
            error = np.full(before.shape, np.inf)
        self.moments.update(before)
        self.add(
            error=error.sum(axis=0), energy=np.square(np.where(known, before, 0.0)).sum(axis=0)
        )

    def merge(self, other: _Counter) -> None:
        super().merge(other)
        assert isinstance(other, _Values)
        self.moments.merge(other.moments)

    def result(self) -> Measure:
        assert self.term.scale is not None, "the objective has no scales yet"
        error = self.sums.get("error", np.zeros(0))
        if not error.size:
            return self.measure(
                "error over variance", None, {"error_over_variance": None, "relative_error": None}
            )
        divisors = self.moments.divisors(self.term.scale.variance, self.term.scale.unused)
        columns = error / np.maximum(self.moments.count, 1) / divisors
        place = int(columns.argmax())
        whole = float(columns.mean())
        worst = float(columns.max())
        energy = self.sum("energy")
        values = {
            "error_over_variance": whole,
            "r2": 1 - whole,
            "worst_column": float(place),
            "worst_error_over_variance": worst,
            "relative_error": float(np.sqrt(error.sum() / energy)) if energy else None,
        }
        if not 1 < columns.size <= COLUMNS:
            return self.measure("error over variance", 1 - whole, values)
        name = f"error over variance of column {place}"
        return self.measure(name, 1 - worst, values, columns=tuple(columns.tolist()))


class _Cosines(_Counter):
    """Cosines of vectors, kept one by one for their percentile."""

    def update(
        self,
        old: Array,
        new: Array,
        labels: Array | None,  # noqa: ARG002
    ) -> None:
        before = self.term.rows(old)
        after = self.term.rows(new)
        if before.shape != after.shape:
            cosine = np.full(len(before), -1.0)
        else:
            cosine = 1 - np.minimum(angle(before, after), 2.0)
        self.merge_cosines(cosine)

    def merge(self, other: _Counter) -> None:
        self.merge_cosines(other.sums.get("cosine", np.zeros(0)))

    def merge_cosines(self, cosine: Floats) -> None:
        """Add cosines."""
        self.sums["cosine"] = np.concatenate([self.sums.get("cosine", np.zeros(0)), cosine])

    def result(self) -> Measure:
        assert self.term.scale is not None, "the objective has no scales yet"
        cosine = self.sums.get("cosine", np.zeros(0))
        if not cosine.size:
            return self.measure("1 - cosine over its spread", None, {"cosine": None})
        mean = float(cosine.mean())
        # Vectors that all point nearly the same way have cosines near 1 whatever was lost.
        error = (1 - mean) / self.term.scale.spread
        values = {
            "cosine": mean,
            "cosine_1st_percentile": float(np.percentile(cosine, 1)),
            "error_over_spread": error,
        }
        return self.measure("1 - cosine over its spread", 1 - error, values)


class _Equal(_Counter):
    """Entries that are equal."""

    def update(
        self,
        old: Array,
        new: Array,
        labels: Array | None,  # noqa: ARG002
    ) -> None:
        if old.shape == new.shape:
            equal = float((old == new).sum())
        else:
            equal = 0.0
        self.add(all=old.size, equal=equal)

    def result(self) -> Measure:
        equal = self.share("equal", "all")
        return self.measure("equal entries", equal, {"equal": equal})


def _counters(term: Term) -> list[_Counter]:
    if term.kind == "ambiguous":
        return [_Decisions(term), _Values(term)]
    kinds = {
        "classes": _Decisions,
        "binary": _Binary,
        "values": _Values,
        "embedding": _Cosines,
        "exact": _Equal,
    }
    return [kinds[term.kind](term)]


def _worst(term: Term, found: Sequence[Measure]) -> Measure:
    """The measure that loses most, with the numbers of all."""
    worst = max(found, key=lambda measure: measure.lost)
    values = {name: value for measure in found for name, value in measure.values.items()}
    columns = next((m.columns for m in found if m.columns), ())
    classes = next((m.classes for m in found if m.classes), ())
    warnings = tuple(w for m in found for w in m.warnings)
    return Measure(
        term.name,
        term.output,
        term.kind,
        worst.measure,
        worst.lost,
        values,
        classes,
        columns,
        warnings,
    )


def _drop(values: Mapping[str, float | None], name: str = "accuracy") -> float | None:
    before = values.get(f"{name}_before")
    after = values.get(f"{name}_after")
    if before is None or after is None:
        return None
    return before - after


def _rare(decided: Floats, kept: Floats) -> tuple[tuple[int, float, float], ...]:
    """(class, share, recall) of classes that the original rarely decides for, worst first."""
    total = max(decided.sum(), 1)
    few = np.flatnonzero((decided > 0) & (decided < RARE * total))
    recall = kept[few] / np.maximum(decided[few], 1)
    order: Ints = np.argsort(recall, kind="stable")[:LISTED]
    return tuple((int(few[i]), float(decided[few[i]] / total), float(recall[i])) for i in order)


def _alike(term: Term, decision: str) -> str:
    return (
        f"all decisions of '{term.name}' are {decision} on this data, so that their agreement says nothing; give data "
        "on which the model decides otherwise"
    )


def _few_others(term: Term, share: float, background: int) -> str:
    return (
        f"only {100 * share:.2g} % of the decisions of '{term.name}' are for other classes than {background} on this "
        f"data; agreement says little, look at the recall of all decisions but class {background}"
    )


def _few(term: Term, share: float) -> str:
    return (
        f"only {100 * share:.2g} % of the decisions of '{term.name}' are positive on this data; agreement says little, "
        "look at the recall"
    )
