"""Choice of the units to keep, from scores, losses and a budget.

``mip`` chooses every group's width by the budget program from measured losses. ``uniform`` keeps the same share of
every group; ``global`` keeps the units of largest score relative to their group's mean, wherever they are. These two
land on the budget from below: a bisection on one number, then single steps while they fit. Widths are multiples of the
alignment (in channels), or the full width. Groups are emptied before, as the ladder of their widths says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnx_oamip.core.budgets import COUNTED, BudgetKind, counted_shares
from onnx_oamip.core.errors import BudgetNotMet
from onnx_oamip.core.options import ConstraintOptions
from onnx_oamip.core.records import (
    Bools,
    Budget,
    Cost,
    Coupling,
    Floats,
    Ints,
    Model,
    Plan,
    Scores,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.cost import Ledger, full_widths
from onnx_oamip.graph.ops import Trait, has, kinds
from onnx_oamip.planning.budget_program import (
    BINDING,
    Ladder,
    LinearisedLimit,
    choose,
    fewest_units,
    multiplier,
    within_loss,
)
from onnx_oamip.programs.program_files import ProgramFile
from onnx_oamip.programs.solvers import SolverLimits
from onnx_oamip.verification.latency import find_step

MOST_NODES = 3
"""Nodes with the most MACs that the refusal of a budget names."""


@dataclass(frozen=True)
class Limits:
    """Absolute limits on counted costs.

    Attributes:
        values: Limit by the name of its budget, for the budgets that are set.
        before: Costs of the original model, which make shares of limits again.
        reserved: Cost set aside by the name of its budget, for parameters that a refit will create.
    """

    values: Mapping[str, float]
    before: Cost | None = None
    reserved: Mapping[str, int] = field(default_factory=dict)

    def holds(self, cost: Cost) -> bool:
        """Check whether every limit is met.

        Args:
            cost: Costs of a plan.

        Returns:
            True if no cost exceeds its limit.
        """
        return all(kind.of(cost) <= limit for kind, limit in self._limited())

    def shares(self, cost: Cost) -> dict[str, float]:
        """Divide costs by their limits.

        Args:
            cost: Costs of a plan.

        Returns:
            Cost over limit by the name of the budget.
        """
        return {kind.name: kind.of(cost) / limit for kind, limit in self._limited() if limit}

    def least(self, cost: Cost) -> dict[str, float]:
        """Find the smallest budgets that given costs meet.

        Args:
            cost: Costs of the narrowest plan.

        Returns:
            Share of the original by the name of the budget, rounded up to four digits.
        """
        if self.before is None:
            return {}
        result = {}
        for kind, _ in self._limited():
            needed = kind.of(cost) + self.reserved.get(kind.name, 0)
            result[kind.name] = math.ceil(1e4 * needed / max(kind.of(self.before), 1)) / 1e4
        return result

    def with_limit(self, name: str, limit: float) -> Limits:
        """Replace one limit.

        Args:
            name: Name of the budget.
            limit: Its new limit.

        Returns:
            The limits with this one.
        """
        return replace(self, values={**self.values, name: limit})

    def _limited(self) -> Iterator[tuple[BudgetKind, float]]:
        for kind in COUNTED:
            if kind.name in self.values:
                yield kind, self.values[kind.name]


def limits(
    budget: Budget,
    before: Cost,
    reserve: int,
    itemsize: int = 4,
) -> Limits:
    """Turn shares into absolute limits.

    Args:
        budget: Shares to keep.
        before: Costs of the original model.
        reserve: Parameters set aside for biases that a refit will create.
        itemsize: Bytes of one parameter.

    Returns:
        The limits of the counted budgets that are set.
    """
    reserved = {"params": reserve, "size": reserve * itemsize}
    values = {}
    for kind, share in counted_shares(budget):
        held = reserved.get(kind.name, 0) if share < 1 else 0
        values[kind.name] = max(share * kind.of(before) - held, 1.0)
    return Limits(values, before, reserved)


def allocate(
    coupling: Coupling,
    ledger: Ledger,
    scores: Scores,
    limit: Limits,
    settings: Settings,
    *,
    step: Ints,
    ladder: Ladder | None = None,
    extra: Sequence[LinearisedLimit] = (),
    floor: Floats | None = None,
) -> Plan:
    """Choose the widths by the allocation of the settings, and the units of highest score in each group.

    Args:
        coupling: The units.
        ledger: Costs as functions of the widths.
        scores: One score per unit; of equal ones the lower index is kept.
        limit: Limits of the counted budgets.
        settings: Allocation, floor, threshold and alpha.
        step: Units per alignment step of every group (groups,).
        ladder: Losses at every width that a plan may choose; None for allocations without a program.
        extra: Further linear limits of the budget program.
        floor: Least share of every group (groups,); ``settings.floor`` for all where it is None.

    Returns:
        The plan.

    Raises:
        BudgetNotMet: Even the narrowest model exceeds a limit; the message names it.
    """
    full = full_widths(coupling)
    narrowest = least(settings.floor if floor is None else floor, step, full)
    ceiling = _most_by_scores(coupling, scores, settings, step, narrowest)
    if ladder is not None:  # an emptied group has no units to choose from
        ceiling = np.minimum(ceiling, [widths[-1] for widths in ladder.widths]).astype(np.int64)
        narrowest = np.minimum(narrowest, ceiling)

    def fits(widths: Ints) -> bool:
        return limit.holds(ledger.cost(widths))

    if not fits(narrowest):
        raise BudgetNotMet(
            _binding(coupling, ledger, limit, narrowest, _advice(coupling, settings, step, fits))
        )
    programs: tuple[Mapping[str, Any], ...] = ()
    if ladder is not None:
        try:
            widths, programs = _programmed(
                _bounded_by_loss(ladder, settings),
                ceiling,
                ledger=ledger,
                limit=limit,
                extra=extra,
                settings=settings,
                groups=tuple(group.name for group in coupling.groups),
            )
        except BudgetNotMet as error:
            held = ", ".join((*_floors(settings), *_others(coupling, settings)))
            reported = f"; what keeps widths up: {held}." if held else "."
            raise BudgetNotMet(f"{str(error).rstrip('.')}{reported}") from error
        # Widen groups within the budget that lies between two rungs. A measured limit cannot be counted here, and a
        # program that keeps as few units as possible is not to be widened.
        if not extra and settings.max_loss is None:
            widths = _fill(ledger, limit, widths, step=step, ceiling=ceiling, full=full)
            used = limit.shares(ledger.cost(widths))
            binding = [name for name, share in used.items() if share >= BINDING]
            programs = (*programs[:-1], {**programs[-1], "used": used, "binding": binding})
        if settings.max_loss is not None:
            traded = _trade(ladder, ceiling, widths, settings.max_loss)
            programs = (*programs[:-1], {**programs[-1], **traded})
    elif fits(ceiling):
        widths = ceiling
    else:
        if settings.allocate == "global":
            widths = _global(
                coupling,
                scores,
                fits,
                step=step,
                floor=narrowest,
                ceiling=ceiling,
                full=full,
            )
        else:
            widths = _uniform(fits, step=step, floor=narrowest, ceiling=ceiling, full=full)
        widths = _fill(ledger, limit, widths, step=step, ceiling=ceiling, full=full)
    return Plan(
        keep=best_units(coupling, scores.values, widths),
        widths=widths,
        allocation=settings.allocate,
        predicted=ledger.cost(widths),
        programs=programs,
    )


def _most_by_scores(
    coupling: Coupling, scores: Scores, settings: Settings, step: Ints, narrowest: Ints
) -> Ints:
    """Largest width of every group (groups,): a threshold, and the rules of ``alpha``, remove units by their scores."""
    full = full_widths(coupling)
    most = full
    if settings.threshold is not None:
        is_above = scores.values >= settings.threshold
        above = np.bincount(coupling.unit_group[is_above], minlength=len(full))
        most = np.maximum(_snap(above, step, full), narrowest)
    if settings.alpha is not None:
        # Units that the rules remove have a score of 0. No further one is removed to reach a multiple of the step.
        kept = np.bincount(coupling.unit_group[scores.values > 0], minlength=len(full))
        next_multiple = -(-kept // step) * step
        most = np.minimum(most, np.maximum(next_multiple, narrowest))
    return most


def _bounded_by_loss(ladder: Ladder, settings: Settings) -> Ladder:
    """The ladder of a program that observes a bound on the summed losses; the ladder itself without a bound."""
    if settings.max_loss is None:
        return ladder
    if settings.max_drop is None:
        return fewest_units(ladder, settings.max_loss)
    # The search over the drop asks for wider models too, which the fewest units within the loss are not.
    return within_loss(ladder, settings.max_loss)


def _trade(ladder: Ladder, ceiling: Ints, widths: Ints, max_loss: float) -> dict[str, float]:
    """Record of the trade between loss and units: the multiplier of the bound, and a bound on the number of units."""
    allowed = [np.flatnonzero(w <= c) for w, c in zip(ladder.widths, ceiling, strict=True)]
    weight, units = multiplier(_at(ladder, allowed), max_loss)
    loss = sum(
        float(np.interp(width, w, cost))
        for width, w, cost in zip(widths, ladder.widths, ladder.cost, strict=True)
    )
    return {
        "max_loss": max_loss,
        "loss": loss,
        "lambda": weight,
        "units": int(widths.sum()),
        "least_units": units,
    }


def least(floor: Floats | float, step: Ints, full: Ints) -> Ints:
    """Return the narrowest width of every group.

    Args:
        floor: Least share of a group, one for all or (groups,).
        step: Units per alignment step of every group (groups,).
        full: Units of every group (groups,).

    Returns:
        Multiples of the steps (groups,) that hold the share, or the full width where that is smaller.
    """
    share = np.ceil(floor * full - ROUNDING).astype(np.int64)
    widths: Ints = np.minimum(np.maximum(step, -(-share // step) * step), full)
    return widths


ROUNDING = 1e-9
"""A share of a group that is a whole number of units but for rounding is that number."""
FULLY_USED = 0.998
"""Share of a limit from which groups are not widened any more."""
RUNGS = 12
"""Widths per group that the first budget program chooses from."""
DENSE, GROWTH = 4, 3
"""Distances up to which a later program has every width around those taken, and the factor between those beyond."""
ROUNDS = 6
"""Most programs after the first one."""
SETTLED = 1e-3
"""Share of the loss that a program has to gain for another one to follow: the gap that each is solved to."""


def _programmed(
    ladder: Ladder,
    ceiling: Ints,
    *,
    ledger: Ledger,
    limit: Limits,
    extra: Sequence[LinearisedLimit],
    settings: Settings,
    groups: tuple[str, ...],
) -> tuple[Ints, tuple[Mapping[str, Any], ...]]:
    """Widths by the budget program: over rungs spread across each ladder, then over rungs around those taken.

    The latter is repeated until the loss settles: costs are products of widths, so that the best widths can lie far
    from the best ones of a coarse ladder.
    """
    solver_limits = SolverLimits(time_s=settings.time_limit, gap=1e-3, seed=settings.seed)
    lengths = [
        int(np.searchsorted(w, c, side="right"))
        for w, c in zip(ladder.widths, ceiling, strict=True)
    ]
    rungs = [np.unique(np.round(np.linspace(0, n - 1, RUNGS)).astype(int)) for n in lengths]
    file = ProgramFile.of(settings, "budget", groups)
    coarse = choose(
        ledger,
        _at(ladder, rungs),
        limit,
        extra,
        solver=settings.solver,
        solver_limits=solver_limits,
        file=file,
    )
    if all(len(r) == n for r, n in zip(rungs, lengths, strict=True)):
        return coarse.widths, (coarse.program,)
    chosen, programs = coarse, [coarse.program]
    for _ in range(ROUNDS):
        places = [
            int(np.searchsorted(w, width))
            for w, width in zip(ladder.widths, chosen.widths, strict=True)
        ]
        near = [_spread(at, n) for at, n in zip(places, lengths, strict=True)]
        finer = choose(
            ledger,
            _at(ladder, near),
            limit,
            extra,
            solver=settings.solver,
            solver_limits=solver_limits,
            file=file,
        )
        programs.append(finer.program)
        gained = chosen.program["objective"] - finer.program["objective"]
        settled = gained <= SETTLED * abs(chosen.program["objective"])
        if gained >= 0:
            chosen = finer
        if settled:
            break
    return chosen.widths, tuple(programs)


def _spread(at: int, count: int) -> Ints:
    """Indices of rungs around one of them: all near ones, and others at growing distances."""
    powers = int(np.ceil(np.log(max(count, 2)) / np.log(GROWTH)))
    distances = np.union1d(np.arange(1, DENSE + 1), GROWTH ** np.arange(powers))
    places = np.concatenate([at - distances, [at], at + distances])
    return np.unique(places[(places >= 0) & (places < count)])


def _at(ladder: Ladder, rungs: Sequence[Ints]) -> Ladder:
    return Ladder(
        tuple(w[r] for w, r in zip(ladder.widths, rungs, strict=True)),
        tuple(c[r] for c, r in zip(ladder.cost, rungs, strict=True)),
        tuple(b[r] for b, r in zip(ladder.bounded, rungs, strict=False)),
        ladder.most,
    )


def steps(
    model: Model,
    coupling: Coupling,
    align: int | str,
    device: str,
    *,
    known: int | None = None,
) -> Ints:
    """Determine the alignment step of each group, in units: one that holds several channels counts as many.

    ``auto`` measures the step of convolutions on the device. It holds for groups of their channels alone, as no other
    layer was measured, and is never more than a quarter of a group: a narrow layer has little time to win and much to
    lose.

    Args:
        model: The model.
        coupling: Its groups.
        align: Step in channels, or ``auto``.
        device: Device that the step is measured on.
        known: Step that ``auto`` takes in place of a measurement, None to measure.

    Returns:
        Units per step (groups,).
    """
    result = []
    if align != "auto":
        wanted = int(align)
    elif known is not None:
        wanted = known
    else:
        wanted = find_step(device).value
    convolved = _weights_of_convolutions(model) if align == "auto" else frozenset()
    for group in coupling.groups:
        held = min(group.multiplicity.values())
        channels = wanted
        if align == "auto":
            measured = any(tensor in convolved for tensor, _ in group.multiplicity)
            channels = wanted if measured else 1
            while channels > 1 and channels * 4 > len(group.units) * held:
                channels //= 2
        result.append(channels // math.gcd(channels, held))
    return np.asarray(result, np.int64)


def _weights_of_convolutions(model: Model) -> frozenset[str]:
    """Constants that convolutions read, also as codes or in another layout."""
    found: set[str] = set()
    for node in reversed(model.every):
        passes = has(node, Trait.DEQUANTISES | Trait.MOVES | Trait.CASTS)
        if kinds.CONVOLUTION in node.op or (passes and found.intersection(node.outputs)):
            found.update(node.inputs)
    return frozenset(name for name in found if name in model.constants)


def best_units(coupling: Coupling, values: Floats, widths: Ints) -> Bools:
    """Keep the units of largest value in every group.

    Args:
        coupling: The units.
        values: One value per unit (n_units,); ties go to the lower index.
        widths: Units to keep of every group (groups,).

    Returns:
        The keep mask (n_units,).
    """
    # lexsort is stable: by group, then by falling value, then by index.
    order = np.lexsort((-values, coupling.unit_group))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    start = np.cumsum(full_widths(coupling)) - full_widths(coupling)
    keep: Bools = place - start[coupling.unit_group] < widths[coupling.unit_group]
    return keep


def _snap(widths: Ints, step: Ints, full: Ints) -> Ints:
    return np.where(widths >= full, full, widths // step * step)


def _uniform(
    fits: Callable[[Ints], bool],
    *,
    step: Ints,
    floor: Ints,
    ceiling: Ints,
    full: Ints,
) -> Ints:
    def widths(share: float) -> Ints:
        return np.clip(
            _snap(np.floor(share * full + 1e-9).astype(np.int64), step, full), floor, ceiling
        )

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(widths(middle)) else (low, middle)
    return widths(low)


def _global(
    coupling: Coupling,
    scores: Scores,
    fits: Callable[[Ints], bool],
    *,
    step: Ints,
    floor: Ints,
    ceiling: Ints,
    full: Ints,
) -> Ints:
    mean = np.bincount(coupling.unit_group, scores.values) / full
    relative = scores.values / np.where(mean > 0, mean, 1)[coupling.unit_group]
    order = np.argsort(relative, kind="stable")

    def widths(removed: int) -> Ints:
        gone = np.bincount(coupling.unit_group[order[:removed]], minlength=len(full))
        return np.clip(_snap(full - gone, step, full), floor, ceiling)

    low, high = 0, len(order)  # removing `high` fits, removing `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(widths(middle)) else (middle, high)
    return widths(high)


def _fill(
    ledger: Ledger,
    limit: Limits,
    widths: Ints,
    *,
    step: Ints,
    ceiling: Ints,
    full: Ints,
) -> Ints:
    """Widen groups by single steps while the limits hold, always the group of the smallest kept share.

    Widths are multiples of the step or full, before and after.
    """
    widths = widths.copy()
    is_done = widths >= ceiling
    while not is_done.all():
        used = max(limit.shares(ledger.cost(widths)).values(), default=1.0)
        if used >= FULLY_USED:
            break
        g = int(np.argmin(np.where(is_done, np.inf, widths / full)))
        wider = widths.copy()
        wider[g] = min(widths[g] + step[g], full[g])
        if wider[g] <= ceiling[g] and limit.holds(ledger.cost(wider)):
            widths = wider
            is_done[g] = widths[g] >= ceiling[g]
        else:
            is_done[g] = True
    return widths


def _binding(
    coupling: Coupling,
    ledger: Ledger,
    limit: Limits,
    floor: Ints,
    advice: str,
) -> str:
    name, over = max(limit.shares(ledger.cost(floor)).items(), key=lambda item: item[1])
    lengths = ledger.lengths(floor)
    values = ledger.terms(ledger.macs, lengths)
    heaviest = np.argsort(-values, kind="stable")[:MOST_NODES].tolist()
    heavy = [
        f"{ledger.nodes[i]} ({100 * values[i] / max(values.sum(), 1):.0f} %)" for i in heaviest
    ]
    widest = sorted(coupling.groups, key=lambda g: -max(g.multiplicity.values()) * len(g.units))[:3]
    reason = _pinning(coupling, [ledger.inputs[i] for i in heaviest])
    why = f"; channels there cannot go, for example because {reason}" if reason else ""
    shares = limit.least(ledger.cost(floor))
    reach = (
        f"the least that can be met is {', '.join(f'`{k}={v:g}`' for k, v in shares.items())}; "
        if shares
        else ""
    )
    return (
        f"the `{name}` budget cannot be met: with all {len(coupling.groups)} groups "
        f"({', '.join(g.name for g in widest)}{', ...' if len(coupling.groups) > 3 else ''}) at their least width the "
        f"model is still {over:.2f} times the budget; most MACs then are in {', '.join(heavy)}{why}; "
        f"{reach}{advice}."
    )


def _pinning(coupling: Coupling, read: Sequence[Sequence[str]]) -> str:
    """Reason for which channels of the nodes with the most MACs cannot be removed.

    Args:
        coupling: The pinned channels.
        read: Tensors that these nodes read, those of the node with the most MACs first.

    Returns:
        The reason of the first pinned channels of the first node that has any; of any constant of the model where these
        nodes have none. Empty if nothing is pinned.
    """
    # Inputs and outputs of the model keep their channels in every model; other reasons explain more.
    pinned = [p for p in sorted(coupling.pinned, key=lambda p: p.given) if p.count > 1]
    there = [p.reason for tensors in read for p in pinned if p.tensor in tensors]
    return next(iter(there or [p.reason for p in pinned]), "")


def _advice(
    coupling: Coupling,
    settings: ConstraintOptions,
    step: Ints,
    fits: Callable[[Ints], bool],
) -> str:
    """Clause that names the settings without which the budget can be met, or another way out."""
    full = full_widths(coupling)
    floors = _floors(settings)
    others = _others(coupling, settings)
    excluded = [name for name in others if name.startswith("`exclude=")]
    one = np.ones_like(step)
    if floors and fits(least(0.0, step, full)):
        return f"it can be met without {' and '.join(floors)}"
    if fits(least(0.0, one, full)):
        return f"it can be met without {' and '.join((*floors, f'`align={settings.align}`'))}, that is with `align=1`"
    if excluded:
        return (
            f"{' and '.join(excluded)} keeps channels that could go; ask for more, or exclude less"
        )
    return "ask for more or see 'onnx-oamip inspect'"


def _floors(settings: ConstraintOptions) -> tuple[str, ...]:
    """Options that bound the share of a group that is kept."""
    asked = (
        ("floor", settings.floor, 0.0),
        ("limits", settings.limits, "none"),
        ("protect", settings.protect, 0.0),
    )
    return tuple(f"`{name}={value}`" for name, value, unset in asked if value != unset)


def _others(coupling: Coupling, settings: ConstraintOptions) -> tuple[str, ...]:
    """Other options that keep channels: the step of widths, and what was excluded."""
    excluded = dict.fromkeys(p.reason.removesuffix(" keeps it") for p in coupling.pinned if p.given)
    align = (f"`align={settings.align}`",) if settings.align not in ("auto", 1) else ()
    return (*align, *(reason for reason in excluded if reason.startswith("`exclude=")))
