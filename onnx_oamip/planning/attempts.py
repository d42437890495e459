"""Attempts: plans for given limits, carried out and repeated where the model missed them.

Statistics, scores and sensitivities are made once (``Prepared``). ``allocate`` chooses a plan; ``attempt`` also carries
it out, with a tighter limit while the file is too large, and with ``effort=high`` with losses measured around the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.records import (
    Bools,
    Ints,
    Plan,
    Scores,
    Sensitivity,
)
from onnx_oamip.planning import (
    allocation,
    execution,
    factoring,
    width_losses,
)
from onnx_oamip.planning.budget_program import Ladder, LinearisedLimit
from onnx_oamip.planning.execution import Attempt, Draft
from onnx_oamip.planning.plan_constraints import Constraints
from onnx_oamip.statistics.context import Context

SIZE_TRIES = 3
NEAR_LIMIT = 0.95
"""Share of a limit that a plan with the measured step of widths uses at least; below it the step gives way."""
LOOKS = 2
"""Times that losses are measured again around a plan, with ``effort=high``."""
MUCH = 0.5
"""Summed loss of a plan, over that of the average answer, from which other allocations are carried out beside it.

Losses of groups end at that of a lost output. Where a plan loses much, giving up an output looks cheap in their sum.
"""
OTHERS = ("global", "uniform")
"""Those allocations."""
GAIN = 0.9
"""Loss of another allocation, over that of the program's plan, up to which it is taken; a smaller gain may be noise."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared(Context):
    """A context with its scores, constraints and measured losses: everything that does not depend on the budget.

    Attributes:
        scores: Scores with the constraints applied.
        constraints: Floors and limits that every plan meets.
        steps: Units per alignment step of every group (groups,).
        ladder: Losses at every width that a plan may choose; None where no program needs them.
        curves: The measured losses that the ladder was made from.
        emptiable: Groups whose losses without any unit were measured.
        emptied: Groups of which every plan keeps no unit.
        emptied_loss: Measured loss without them.
    """

    scores: Scores
    constraints: Constraints
    steps: Ints
    ladder: Ladder | None
    curves: tuple[Sensitivity, ...] = ()
    emptiable: frozenset[int] = frozenset()
    emptied: frozenset[int] = frozenset()
    emptied_loss: float = 0.0

    def rungs(self, curves: tuple[Sensitivity, ...], steps: Ints) -> Ladder:
        """List the widths that a plan may choose for each group, with their losses.

        Args:
            curves: Losses of every group.
            steps: Units per alignment step of every group (groups,).

        Returns:
            The levels of the budget program.
        """
        return width_losses.rungs(
            self.coupling,
            curves,
            steps,
            self.constraints.floor,
            self.emptied,
            most=self.widest,
        )

    def without(self, groups: frozenset[int], loss: float) -> Prepared:
        """Leave groups without units in every plan.

        Args:
            groups: All emptied groups.
            loss: Measured loss without them.

        Returns:
            The same with other levels.
        """
        emptied = replace(self, emptied=groups, emptied_loss=loss)
        return replace(emptied, ladder=emptied.rungs(self.curves, self.steps))


def attempt(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
) -> Attempt:
    """Allocate, cut and refit, and with ``effort=high`` choose the widths again around the plan.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.
        extra: Further linear limits of the budget program.

    Returns:
        The attempt that loses least.

    Raises:
        BudgetNotMet: No plan meets the limits.
    """
    return draft(ready, limit, extra).finished


def draft(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
) -> Draft:
    """Choose the plan of an attempt, which may be compared with others before it is finished.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.
        extra: Further linear limits of the budget program.

    Returns:
        The draft that loses least.

    Raises:
        BudgetNotMet: No plan meets the limits.
    """
    first = _draft(ready, limit, extra)
    if loses_much(ready, first.plan):
        first = _or_other_allocation(ready, limit, first)
    if ready.settings.effort != "high" or ready.ladder is None:
        return first
    return _look_again(ready, limit, extra, first)


def loses_much(ready: Prepared, chosen: Plan) -> bool:
    """Check whether other allocations are carried out beside a plan of the budget program.

    Args:
        ready: Scores and losses.
        chosen: The plan.

    Returns:
        True if the sum of its losses is large. Always false under limits that only the program observes, and where
        branches are left out.
    """
    settings = ready.settings
    only_program = settings.latency is not None or settings.max_loss is not None
    if ready.ladder is None or ready.emptied or only_program or chosen.keep.all():
        return False
    return sum(lost or 0.0 for lost in losses(ready, chosen)) >= MUCH


def _or_other_allocation(ready: Prepared, limit: allocation.Limits, first: Draft) -> Draft:
    """The draft of the program, or of another allocation if that loses clearly less on samples that no refit used."""
    others = []
    for name in OTHERS:
        settings = ready.settings.model_copy(update={"allocate": name})
        others.append(_draft(replace(ready, settings=settings, ladder=None), limit, ()))
    best = min(others, key=lambda other: other.loss)
    if best.loss > GAIN * first.loss:
        return first
    # The program was solved all the same: its record, and files of its solution, belong to the run.
    best = replace(best, plan=replace(best.plan, programs=first.plan.programs))
    return best.noted(
        f"widths are those of `allocate={best.plan.allocation}`: on calibration samples that no refit used the model "
        f"loses {best.loss:.3g} in place of {first.loss:.3g} with the widths of the budget program"
    )


def _look_again(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
    first: Draft,
) -> Draft:
    """Measure the losses of groups around the plan, and choose widths by their mean with those in the original.

    The draft that loses least on samples that its refit did not use is kept.
    """
    best, keep = first, first.plan.keep
    for _ in range(LOOKS):
        curves, ladder = losses_around(ready, keep)
        again = _draft(replace(ready, curves=curves, ladder=ladder), limit, extra)
        if np.array_equal(again.plan.keep, keep):
            break
        keep = again.plan.keep
        if again.loss < best.loss:
            best = again
    if best is first:
        return first
    note = (
        f"widths were chosen again around the first plan: on calibration samples that no refit used the model loses "
        f"{best.loss:.3g} in place of {first.loss:.3g}"
    )
    return best.noted(note)


def losses_around(ready: Prepared, keep: Bools) -> tuple[tuple[Sensitivity, ...], Ladder]:
    """Losses of groups by the mean of those in the original and those around a plan.

    A group that others stand in for loses least as the first one to be narrowed, and most as the last one: the mean of
    both is the trapezoid rule for its share of the whole loss on the way from the original to the plan. It never counts
    for less than alone: a layer near the output can seem to gain where it only damps the errors in front of it.

    Args:
        ready: Scores and the losses in the original.
        keep: Keep mask of the plan (n_units,).

    Returns:
        The mean losses of every group, and the levels that a program chooses from.
    """
    around = width_losses.losses_of_groups(ready, ready.scores, keep, emptiable=ready.emptiable)
    curves = tuple(
        Sensitivity(alone.widths, (alone.loss + np.maximum(alone.loss, last.loss)) / 2)
        for alone, last in zip(ready.curves, around, strict=True)
    )
    return curves, ready.rungs(curves, ready.steps)


def _draft(ready: Prepared, limit: allocation.Limits, extra: tuple[LinearisedLimit, ...]) -> Draft:
    """Allocate and cut; under a limit on the file, refit and repeat with a tighter one while the file is too large.

    Args:
        ready: Scores and losses.
        limit: Limits of the counted budgets.
        extra: Further linear limits of the budget program.

    Returns:
        The draft. If the file is too large after ``SIZE_TRIES`` repeats, it is returned as it is.

    Raises:
        BudgetNotMet: No plan meets the limits.
    """
    found = execution.draft(ready, allocate(ready, limit, extra))
    size = ready.settings.budget.size
    if size is None or "size" not in limit.values:
        return found
    for _ in range(SIZE_TRIES):
        # A file holds more than its tensors (names, repaired constants): the first size is a prediction.
        over = found.finished.after.bytes - size * ready.before.bytes
        if over <= 0:
            break
        tighter = limit.values["size"] - over
        if found.plan.predicted.bytes <= tighter:  # the same plan would be chosen again
            tighter = found.plan.predicted.bytes - over
        limit = limit.with_limit("size", tighter)
        found = execution.draft(ready, allocate(ready, limit, extra))
    return found


def allocate(
    ready: Prepared,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...] = (),
) -> Plan:
    """Choose a plan under absolute limits.

    A step of widths that ``align=auto`` chose gives way, half by half, if no plan meets the limits with it, or if the
    plan keeps much less than they allow.

    Args:
        ready: Scores, losses and constraints.
        limit: Counted limits.
        extra: Limits that are measured.

    Returns:
        The plan.

    Raises:
        BudgetNotMet: No plan meets the limits.
    """
    steps = ready.steps
    ladder = ready.ladder
    best: Plan | None = None
    while True:
        missed: BudgetNotMet | None = None
        try:
            plan = _allocate(ready, steps, ladder, limit, extra)
            if best is None or plan.predicted.macs > best.predicted.macs:
                note = () if steps is ready.steps else (_gave_way(ready.steps, steps),)
                best = replace(plan, notes=(*plan.notes, *note))
        except BudgetNotMet as error:
            missed = error
        near = best is not None and _used(best, limit, extra) >= NEAR_LIMIT
        if near or ready.settings.align != "auto" or steps.max(initial=1) == 1:
            if best is None and missed is not None:
                raise missed
            assert best is not None
            return best
        steps = np.maximum(steps // 2, 1)
        if ladder is not None:
            ladder = ready.rungs(ready.curves, steps)


def _allocate(
    ready: Prepared,
    steps: Ints,
    ladder: Ladder | None,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
) -> Plan:
    found = allocation.allocate(
        ready.coupling,
        ready.ledger,
        ready.scores,
        limit,
        ready.settings,
        step=steps,
        ladder=ladder,
        extra=extra,
        floor=ready.constraints.floor,
    )
    return factoring.marked(ready, found)


def _used(
    plan: Plan,
    limit: allocation.Limits,
    extra: tuple[LinearisedLimit, ...],
) -> float:
    """The largest share of a limit that a plan uses; 1 without limits."""
    used = limit.shares(plan.predicted)
    if extra:  # the program that chose the plan reports what it uses of them
        used |= {row.name: plan.programs[-1]["used"][row.name] for row in extra}
    return max(used.values(), default=1.0)


def _gave_way(before: Ints, after: Ints) -> str:
    return (
        f"channels are in steps of {int(after.max())} units in place of {int(before.max())}, as the larger step misses "
        "the budget"
    )


def losses(ready: Prepared, chosen: Plan) -> list[float | None]:
    """Return the measured loss of every group at its planned width.

    Args:
        ready: Scores and losses.
        chosen: The plan.

    Returns:
        Per group the loss of the model with only that group pruned; None where no losses were measured.
    """
    if ready.ladder is None:
        return [None] * len(ready.coupling.groups)
    rows = zip(
        ready.ladder.widths, ready.ladder.cost, ready.curves, chosen.widths.tolist(), strict=True
    )
    return [
        float(np.interp(width, widths, cost)) if width else _emptied_loss(curve)
        for widths, cost, curve, width in rows
    ]


def _emptied_loss(curve: Sensitivity) -> float | None:
    """Loss of a group without units; None where that was not measured, as for a group that serves another one."""
    return float(curve.loss[0]) if curve.widths[0] == 0 else None


def adding(ready: Context, chosen: Plan) -> list[str]:
    """Name the groups whose cut inserts nodes, because a normalisation needs zeros in place of removed channels.

    Args:
        ready: The model and its costs.
        chosen: The plan.

    Returns:
        Names of the groups.
    """
    brought = ready.ledger.one_off.inserting_groups(chosen.widths)
    return [ready.coupling.groups[g].name for g in np.flatnonzero(brought)]
