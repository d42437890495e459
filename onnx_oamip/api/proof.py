"""Gates and measurements of a pruned model before it is written.

``prove`` runs all of them; ``in_file`` makes the model to write; the others say what the report notes of the latency.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import onnx

from onnx_oamip.core.errors import GateFailed
from onnx_oamip.core.records import (
    Latency,
    Measure,
    Pruned,
    Verification,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import cost, taken_branches
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.planning import (
    attempts,
    latency_search,
    latency_tables,
    recorded_answers,
)
from onnx_oamip.planning.execution import Attempt
from onnx_oamip.statistics.context import Context
from onnx_oamip.verification import equivalence
from onnx_oamip.verification.latency import (
    compare_latency,
    described,
    is_overhead,
    is_slower,
)

LOG = logging.getLogger("onnx_oamip")
PROOF_SAMPLES = 64
"""Samples on which pruned and masked are compared: exactness does not need more."""
GATE_SECONDS = (0.3, 2.0)
"""Time for the latency gate: a first look, and a longer one where that does not show the pruned model to be faster."""
BUDGET_SECONDS = (3.0, 6.0)
"""Time for the gate of a latency budget, and a longer one where the first ratio is in doubt."""


def in_file(ready: Context, result: Attempt) -> onnx.ModelProto:
    """Return the branches of If nodes that were analysed in the main graph to their nodes.

    Args:
        ready: Context of the run.
        result: The cut and refitted model.

    Returns:
        The model to write, which computes the same.

    Raises:
        GateFailed: It does not.
    """
    whole = ready.whole
    if whole is None:
        unchanged: onnx.ModelProto = result.pruned.proto
        return unchanged
    cut = rewrite.cut(whole.model, whole.coupling, result.plan.keep)
    proto = taken_branches.put_back(cut, result.pruned.proto, whole.returns)
    equivalence.structure(proto)
    equivalence.same(
        ready.model, result.pruned.proto, proto, _few(ready.samples), ready.comparison_batch
    )
    return proto


def _few(samples: Samples) -> Samples:
    """The first samples, as many as show exactness."""
    count = min(samples.count, max(PROOF_SAMPLES, samples.fixed_batch or 1))
    return samples.take(np.arange(count))


def prove(
    ready: Context, result: Attempt, answers: equivalence.Answers | None = None
) -> Verification:
    """Run every gate and measurement on the final model.

    Args:
        ready: Context of the run: the original, its samples and its objective.
        result: The cut and refitted model, with its plan.
        answers: Recorded outputs of the original on the held-out samples; None to compute them.

    Returns:
        The verification. Without held-out data it has the results of the gates only.

    Raises:
        GateFailed: A gate does not hold.
    """
    model, samples, device = ready.model, ready.samples, ready.device
    pruned = result.pruned
    equivalence.structure(pruned.proto)
    masked = rewrite.mask(model, ready.coupling, result.plan.keep)
    objective = ready.objective
    proof = equivalence.prove(
        model, masked, pruned.raw, _few(samples), ready.comparison_batch, objective=objective
    )
    final = equivalence.watch(model, objective, device, pruned.proto, "the pruned model")
    batches = equivalence.runs_at(
        model, final, samples, lambda: Session(model.proto, device, what=model.path)
    )
    latency = None if result.plan.keep.all() else _measured_latency(ready, result)
    if ready.held_out is None:
        measured = Verification(
            masked_equivalence=None,
            output_relative_error=None,
            agreement=None,
            accuracy_before=None,
            accuracy_after=None,
            batches=batches,
            samples=0,
        )
    else:
        measured = _measured_on(ready.held_out, ready, pruned, final, answers)
    return replace(
        measured,
        masked_equivalence=proof.distance,
        rounding=proof.rounding,
        batches=batches,
        latency=latency,
        notes=_codes(proof),
    )


def _measured_on(
    held_out: Samples,
    ready: Context,
    pruned: Pruned,
    final: Session,
    answers: equivalence.Answers | None,
) -> Verification:
    """Losses of the pruned model and of the cut one on held-out samples, and the values of the user's metric.

    Raises GateFailed for an output that is no finite number where that of the original is one.
    """
    model, objective, device = ready.model, ready.objective, ready.device
    size = ready.comparison_batch
    answers = (
        answers
        or recorded_answers.answers(ready, size)
        or equivalence.watch(model, objective, device, what=model.path)
    )
    found = equivalence.compare(
        model,
        objective,
        answers,
        final,
        samples=held_out,
        batch_size=size,
        progress=ready.progress,
    )
    equivalence.numbers(model, found)
    before_refit: tuple[Measure, ...] = ()
    if pruned.fits:
        cut = equivalence.watch(model, objective, device, pruned.raw, "the cut model")
        before_refit = equivalence.compare(
            model, objective, answers, cut, samples=held_out, batch_size=size
        ).outputs
    metric = None
    if ready.metric is not None:
        metric = equivalence.user_metric(
            ready.metric,
            model,
            pruned.proto,
            samples=held_out,
            device=device,
            batch_size=size,
        )
    return replace(found, outputs_before_refit=before_refit, metric=metric)


def _codes(proof: equivalence.Proof) -> tuple[str, ...]:
    """Note and warning if the cut was verified without the rounding of activations to codes."""
    if not proof.is_unrounded:
        return ()
    note = (
        f"the cut model differs from the masked original by {proof.distance:.2e} of an output's scale where "
        "activations are rounded to codes, and agrees with it where they keep their real numbers: codes near a tie "
        "differ"
    )
    LOG.warning("%s", note)
    return (note,)


def _measured_latency(ready: Context, result: Attempt) -> Latency:
    """Latency over the original's. Raises GateFailed where it breaks the budget or is a slowdown.

    With a latency table nothing is refused: its budget holds for another device, on which nothing is measured.
    """
    budget = ready.settings.latency
    is_elsewhere = ready.settings.latency_table is not None
    durations: tuple[float, ...]
    if is_elsewhere:
        durations = GATE_SECONDS[:1]
    elif budget is None:
        durations = GATE_SECONDS
    else:
        durations = BUDGET_SECONDS
    share = _share_of_work(ready, result)
    for seconds in durations:
        ratio = compare_latency(
            ready.unfactored.proto,
            result.pruned.proto,
            ready.samples,
            ready.device,
            seconds=seconds,
        )
        found = described(ratio, share=share)
        is_clear = found.high < 1 or budget is not None
        if is_clear and not found.doubt:
            break
    if not is_elsewhere and not ready.settings.force:
        _gate_latency(ready, result, found)
    return found


def _gate_latency(ready: Context, result: Attempt, found: Latency) -> None:
    """Raises GateFailed for a latency over the budget by more than 5 %, or without one, for a slowdown.

    A slowdown within the overhead of calls and nodes is a note: see ``slowdown``.
    """
    budget = ready.settings.latency
    if budget is None:
        fails = is_slower(found) and not is_overhead(found)
        what = "slower than the original"
    else:
        fails = found.low > budget * (1 + latency_search.LATENCY_SLACK)
        what = f"over `latency={budget}`"
    if not fails:
        return
    named = " ".join(f"`exclude='{name}'`" for name in attempts.adding(ready, result.plan)[:3])
    if named:
        advice = f"{named}, where a cut adds nodes"
    else:
        advice = "`align` 8 or 16"
    raise GateFailed(
        f"the pruned model was measured {what} on {ready.device}: {found.median:.2f} of its time; nothing was "
        f"written; try {advice}, another budget, or `force`."
    )


def slowdown(found: Latency | None) -> tuple[str, ...]:
    """Note and warning if a model that is written was measured slower than the original.

    Args:
        found: The measured latency, or None.

    Returns:
        One note, or none.
    """
    if found is None or found.doubt or not is_slower(found):
        return ()
    note = (
        f"the pruned model was measured slower than the original: {found.median:.2f} of its time, "
        f"{found.added_ms:.3f} ms more per run"
    )
    if is_overhead(found):
        note += ", which is within the overhead of calls and of nodes that a cut adds"
    LOG.warning("%s", note)
    return (note,)


def elsewhere(ready: Context, result: Attempt) -> tuple[str, ...]:
    """Note of the predicted latency on the device of a latency table.

    Args:
        ready: Context of the run; its settings name the table.
        result: The pruned model, with its plan.

    Returns:
        One note, or none without a table.
    """
    table = ready.settings.latency_table
    if table is None or result.plan.keep.all():
        return ()
    ratio = latency_tables.predicted(table, ready.model, ready.coupling, result.plan.widths)
    note = (
        f"by {table}, one sample takes {ratio:.3f} of the original's time there; the latency that is shown was "
        "measured here"
    )
    return (note,)


def _share_of_work(ready: Context, result: Attempt) -> float | None:
    """Share of the multiply-accumulates that is kept; None if not all of them are counted."""
    if cost.uncounted(ready.model) or not ready.before.macs:
        return None
    return result.after.macs / ready.before.macs
