"""Search for the fewest MACs at which the drop on evaluation data stays within ``max_drop`` points."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx_oamip.core.errors import BudgetNotMet, DataError
from onnx_oamip.core.records import (
    Objective,
    Trial,
    Verification,
)
from onnx_oamip.objective.measures import promise
from onnx_oamip.objective.metric import Metric
from onnx_oamip.planning import (
    allocation,
)
from onnx_oamip.planning.attempts import Prepared, attempt
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.planning.execution import Attempt
from onnx_oamip.planning.recorded_answers import original_answers
from onnx_oamip.verification import equivalence

DROP_TRIES = 7
DROP_RESOLUTION = 0.02


@dataclass(frozen=True)
class Drop:
    """Loss of a model on evaluation data, in points of a ``measure``."""

    lost: float
    measure: str


def smallest(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
    points: float,
) -> Attempt:
    """Find the fewest MACs at which the drop on evaluation data stays within ``points``, by bisection.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.
        extra: Further linear limits of the budget program.
        points: Largest drop, in points of its measure.

    Returns:
        The attempt with the fewest MACs that was found, with all trials.

    Raises:
        BudgetNotMet: There is no evaluation data, or no plan loses so little.
    """
    if ready.held_out is None:
        raise BudgetNotMet(
            "`max_drop` needs data to measure the drop on; give `data` with enough samples, or `eval_data`."
        )
    original = original_answers(ready)
    silent = replace(ready, progress=None)  # progress is that of the bisection
    best: Attempt | None = None
    tried: list[Trial] = []
    low = 0.0
    high = min(1.0, limit.values.get("macs", ready.before.macs) / ready.before.macs)
    share = high if high < 1 else 0.5
    for i in range(DROP_TRIES):
        try:
            found = attempt(silent, limit.with_limit("macs", share * ready.before.macs), extra)
            measured = measured_drop(ready, original, found)
            tried.append(Trial(share, found.after.macs, measured.lost, measured.measure))
            held = measured.lost <= points
        except BudgetNotMet:
            tried.append(Trial(share, None, None))
            held = False
        if ready.progress:
            ready.progress("max-drop", i + 1, DROP_TRIES)
        if held:
            best = found
            high = found.after.macs / ready.before.macs
        else:
            low = share
        if high - low < DROP_RESOLUTION:
            break
        share = (low + high) / 2
    if best is None:
        whole = attempt(silent, limit, extra)
        least = measured_drop(ready, original, whole)
        tried.append(Trial(1.0, whole.after.macs, least.lost, least.measure))
        if least.lost > points:
            raise BudgetNotMet(
                f"no plan within the other budgets loses at most {points} points on {ready.held_out.source} "
                f"({least.measure}); ask for a larger drop or a larger budget."
            )
        best = whole
    return replace(best, tried=tuple(tried))


def measured_drop(
    ready: Prepared,
    original: equivalence.Answers,
    found: Attempt,
) -> Drop:
    """Measure what a pruned model loses on evaluation data.

    Args:
        ready: The original and its samples.
        original: Outputs of the original on the held-out samples.
        found: The pruned model.

    Returns:
        The drop, by the user's metric or by the worst term of the objective.
    """
    assert ready.held_out is not None
    if ready.metric is not None:
        values = equivalence.user_metric(
            ready.metric,
            ready.model,
            found.pruned.proto,
            samples=ready.held_out,
            device=ready.device,
            batch_size=ready.batch,
        )
        return Drop(values.lost, values.name)
    after = equivalence.watch(ready.model, ready.objective, ready.device, found.pruned.proto)
    return drop(
        equivalence.compare(
            ready.model,
            ready.objective,
            original,
            after,
            samples=ready.held_out,
            batch_size=ready.batch,
        )
    )


def bounded(objective: Objective, metric: Metric | None) -> str:
    """Name what ``max_drop`` bounds.

    Args:
        objective: Terms by which the pruned model is judged.
        metric: The user's own metric, or None.

    Returns:
        A note: the measures of all terms, or the metric.

    Raises:
        DataError: Nothing could be measured, or nothing but the equality of whole numbers.
    """
    if metric is not None:
        return f"`max_drop` bounds the metric {metric.name}, in its own units"
    judged = objective.judged
    if not judged:
        raise DataError(
            "no loss can be measured: every output is a constant or an input of the model; give another budget than "
            "`max_drop`."
        )
    if all(term.kind == "exact" for term in judged):
        raise DataError(
            "`max_drop` would bound the equality of whole numbers, which says little; give `outputs=NAME=KIND` or "
            "`metric`, or another budget."
        )
    measures = "; ".join(f"{promise(term)} of '{term.name}'" for term in judged)
    return f"`max_drop` bounds points of {measures}"


def drop(found: Verification) -> Drop:
    """The loss of the worst term.

    Args:
        found: The measures of all terms.

    Returns:
        Points lost, and of which measure.

    Raises:
        DataError: Nothing was measured.
    """
    if found.metric is not None:
        return Drop(found.metric.lost, found.metric.name)
    known = [m for m in found.outputs if any(v is not None for v in m.values.values())]
    if not known:
        raise DataError(
            "no loss can be measured on the evaluation data: the model has no floating-point output that is not all "
            "zero; give another budget than `max_drop`."
        )
    worst = max(known, key=lambda measure: measure.lost)
    return Drop(worst.lost, f"{worst.measure} of '{worst.term}'")
