"""Sensitivities: the loss of the model by the width of one group, whose consumers are repaired.

For every group one part of the graph is made: everything behind its first consumer, with the consumers' weights, bias
shifts and masks as inputs. A level then only feeds other numbers; no session is rebuilt, and nothing in front of the
group runs again unless the weights of all levels are too large to be held. Cost: about (1 + levels) halves of a forward
pass per group. Groups run in parallel threads, each with single-threaded sessions: ONNX Runtime and LAPACK release the
interpreter lock, weights are shared instead of copied to other processes, and results do not depend on the number of
workers, nor on whether a cluster does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import onnx
from onnx import helper

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Bools,
    Consumer,
    Coupling,
    Floats,
    Gram,
    Ints,
    Model,
    Objective,
    Sensitivity,
)
from onnx_oamip.executors import Receiver, executor
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops import build
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.partial_execution import Slicer, element_types
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.subgraphs import insert, reads
from onnx_oamip.objective import loss, sums
from onnx_oamip.planning.background import (
    Background,
    Mask,
    apply_mask,
    background,
    channel_mask,
    consumer_shift,
    consumer_weight,
    surrounding,
)
from onnx_oamip.statistics.layer_problems import (
    Job,
    Problem,
    compensate,
    jobs,
    problems,
)

T = TypeVar("T")
CHOICE = (0.7, 0.5, 0.3)
"""Shares of a group's width at which orders of removal are compared."""
LEVELS = (0.8, 0.6, 0.45, 0.3, 0.15)
"""Shares of a group's width at which the loss is measured; the full width costs nothing."""
FEW_LEVELS = (0.7, 0.45, 0.2)
"""The same with little effort."""
LEVEL_BYTES = 1 << 26
"""Bytes of repaired weights held at a time; where one weight has many consumers, a level may exceed the model."""


def fits(found: Sequence[Sensitivity], wide: Ints) -> bool:
    """Validate a cache entry: the losses of every group at several widths.

    Args:
        found: Losses as read.
        wide: Units of every group (groups,).

    Returns:
        True if each group has finite losses at rising widths, the last of which is its full width.
    """
    return len(found) == len(wide) and all(
        _fits(s, full) for s, full in zip(found, wide.tolist(), strict=True)
    )


def some_fit(found: Mapping[int, Sensitivity], wide: Ints) -> bool:
    """Validate a cache entry: the losses of some groups at several widths.

    Args:
        found: Losses as read, by the number of the group.
        wide: Units of every group (groups,).

    Returns:
        As for :func:`fits`.
    """
    return all(0 <= g < len(wide) and _fits(s, int(wide[g])) for g, s in found.items())


def _fits(s: Sensitivity, full: int) -> bool:
    return bool(
        s.widths.dtype == np.int64
        and s.loss.dtype == np.float64
        and s.widths.shape == s.loss.shape == (s.loss.size,)
        and s.loss.size > 0
        and s.widths[0] >= 0
        and (np.diff(s.widths) > 0).all()
        and s.widths[-1] == full
        and np.isfinite(s.loss).all()
    )


def measure(
    model: Model,
    coupling: Coupling,
    grams: Mapping[str, Gram],
    order: Floats,
    feeds: Sequence[Mapping[str, Array]],
    *,
    device: str,
    objective: Objective,
    workers: int | None = None,
    progress: Progress | None = None,
    repair: str = "least-squares",
    scheduler: str | None = None,
    around: Bools | None = None,
    widths: Mapping[int, Ints] = MappingProxyType({}),
    known: Mapping[int, Sensitivity] | None = None,
    receive: Receiver[Sensitivity] | None = None,
) -> tuple[Sensitivity, ...]:
    """Measure the loss of the model with one group narrowed, for every group at a few widths.

    Args:
        model: The original.
        coupling: Its units.
        grams: Second moments of what linear consumers read.
        order: Units are removed by rising order (n_units,).
        feeds: Samples that losses are measured on.
        device: Where the model runs.
        objective: The terms, with their scales; a loss of 1 is that of a model that gives the average answer.
        workers: Groups that are measured at the same time.
        progress: Callback ``(stage, done, total)``.
        repair: How consumers are repaired, as ``--refit`` says.
        scheduler: Address of a Dask scheduler, in place of ``workers``.
        around: Keep mask (n_units,) of a plan at whose widths all other groups are; None for the original.
        widths: Widths at which a group is measured, by its number, in place of :func:`levels`.
        known: Losses by the number of the group that need not be measured again.
        receive: Receives the number and the losses of every group as soon as they are measured.

    Returns:
        The losses of every group beyond that at its full width, which is 0 in the original.
    """
    whole = _whole(
        model,
        coupling,
        [order],
        feeds,
        device=device,
        objective=objective,
        repair=repair,
    )
    if around is not None:
        plan = background(model, coupling, grams, keep=around, repair=repair)
        whole = replace(whole, around=plan)
    whole = replace(whole, widths=widths)
    found = _by_group(
        _measure,
        whole,
        grams,
        workers=workers,
        scheduler=scheduler,
        progress=progress,
        stage="sensitivity",
        known=known or {},
        receive=receive,
    )
    return tuple(found)


def choose(
    model: Model,
    coupling: Coupling,
    grams: Mapping[str, Gram],
    orders: Sequence[Floats],
    feeds: Sequence[Mapping[str, Array]],
    *,
    device: str,
    objective: Objective,
    workers: int | None = None,
    progress: Progress | None = None,
    repair: str = "least-squares",
    scheduler: str | None = None,
    margin: float = 0.0,
) -> Ints:
    """Choose for every group the order of removal under which the model loses least.

    Losses as in :func:`measure`, at the widths of ``CHOICE``; their logarithms are added up, so that no width drowns
    the others. The first order wins ties.

    Args:
        model: The original.
        coupling: Its units.
        grams: Second moments of what linear consumers read.
        orders: Several orders (n_units,); units are removed by rising order.
        feeds: Samples that losses are measured on.
        device: Where the model runs.
        objective: The terms, with their scales.
        workers: Groups that are measured at the same time.
        progress: Callback ``(stage, done, total)``.
        repair: How consumers are repaired, as ``--refit`` says.
        scheduler: Address of a Dask scheduler, in place of ``workers``.
        margin: Share by which another order must lose less than the first one to be chosen.

    Returns:
        The index of an order by group (groups,).
    """
    whole = _whole(
        model,
        coupling,
        orders,
        feeds,
        device=device,
        objective=objective,
        repair=repair,
    )
    whole = replace(whole, margin=margin)
    found = _by_group(
        _choose,
        whole,
        grams,
        workers=workers,
        scheduler=scheduler,
        progress=progress,
        stage="choose",
        known={},
    )
    return np.asarray(found, np.int64)


@dataclass(frozen=True, eq=False)
class _Whole:
    """Inputs that the work on every group shares; ``types``: element types of all tensors.

    ``widths``: widths at which a group is measured, by its number, in place of :func:`levels`.
    """

    model: Model
    coupling: Coupling
    slicer: Slicer
    types: Mapping[str, int]
    truth: _Truth
    orders: Sequence[Floats]
    device: str
    repair: str
    margin: float = 0.0
    around: Background | None = None
    widths: Mapping[int, Ints] = field(default_factory=dict)


def _whole(
    model: Model,
    coupling: Coupling,
    orders: Sequence[Floats],
    feeds: Sequence[Mapping[str, Array]],
    *,
    device: str,
    objective: Objective,
    repair: str,
) -> _Whole:
    slicer = Slicer(model.proto)
    types = _types(model, slicer, feeds, device)
    wanted = objective.tensors
    original = Session(with_outputs(model, wanted), device, threads=None)
    truth = _Truth(objective, feeds, [original.run(feed, wanted) for feed in feeds], wanted)
    return _Whole(model, coupling, slicer, types, truth, orders, device, repair)


def _by_group(
    task: Callable[[_Whole, Job], T],
    whole: _Whole,
    grams: Mapping[str, Gram],
    *,
    workers: int | None,
    scheduler: str | None,
    progress: Progress | None,
    stage: str,
    known: Mapping[int, T],
    receive: Receiver[T] | None = None,
) -> list[T]:
    """``task`` for every group that is not known, several at a time."""
    missing = [job for job in jobs(whole.coupling, grams) if job[0] not in known]

    def report(done: int, total: int) -> None:
        if progress:
            progress(stage, len(known) + done, len(known) + total)

    def received(index: int, result: T) -> None:
        if receive:
            receive(missing[index][0], result)

    results = executor(workers, scheduler, whole.device).map(task, whole, missing, report, received)
    found = {**known, **{job[0]: result for job, result in zip(missing, results, strict=True)}}
    return [found[g] for g in range(len(found))]


def _measure(whole: _Whole, job: Job) -> Sensitivity:
    units = whole.coupling.groups[job[0]].units
    removal = np.argsort(whole.orders[0][units], kind="stable")
    widths = whole.widths.get(job[0], levels(len(units)))
    if whole.around is None:
        narrowed = [removal[: len(units) - w] for w in widths[:-1]]
        loss = np.append(_losses(whole, job, narrowed), 0.0)  # the original loses nothing
    else:
        loss = _losses(whole, job, [removal[: len(units) - w] for w in widths])
    # More units never hurt: noise in the measurement must not make the program prefer fewer.
    rising = np.maximum.accumulate(loss[::-1])[::-1]
    return Sensitivity(widths, rising - rising[-1])


def _choose(whole: _Whole, job: Job) -> int:
    units = whole.coupling.groups[job[0]].units
    gone = [len(units) - max(1, round(share * len(units))) for share in CHOICE]
    sets = [np.argsort(order[units], kind="stable")[:n] for order in whole.orders for n in gone]
    if all(
        set(a) == set(b) for a, b in zip(sets, sets[: len(gone)] * len(whole.orders), strict=True)
    ):
        return 0  # all orders remove the same units
    found = _losses(whole, job, sets).reshape(len(whole.orders), -1)
    logs = np.log(found + 1e-9).mean(axis=1)
    best = int(np.argmin(logs))
    if logs[best] < logs[0] + np.log1p(-whole.margin):
        return best
    return 0


def _losses(whole: _Whole, job: Job, removed: Sequence[Ints]) -> Floats:
    """See :meth:`_Part.losses`. Raises OutOfMemory, naming the group."""
    with memory_for(f"the losses of the group '{whole.coupling.groups[job[0]].name}'"):
        return _Part(whole, *job).losses(removed)


def levels(width: int, shares: Sequence[float] = LEVELS) -> Ints:
    """Choose the widths at which a group is measured.

    Args:
        width: Units of the group.
        shares: Shares of the width, beside one unit and the full width.

    Returns:
        Rising widths from 1 to the full width.
    """
    counts = np.asarray([1.0, *(width * share for share in sorted(shares)), width])
    return np.unique(np.clip(np.round(counts), 1, width).astype(np.int64))


def passes(coupling: Coupling, count: int = len(LEVELS) + 1) -> float:
    """Count the runs of the whole model that one sample takes.

    Args:
        coupling: The groups.
        count: Levels at which every group is measured.

    Returns:
        The number for all groups: the part in front of a group runs once, the part behind it at every level.
    """
    return len(coupling.groups) * (1 + count) / 2


def _types(
    model: Model,
    slicer: Slicer,
    feeds: Sequence[Mapping[str, Array]],
    device: str,
) -> dict[str, int]:
    """Element types of all tensors; the model runs where shape inference does not know them."""
    types = element_types(model.proto, model.dtypes)
    unknown = [o for node in slicer.nodes for o in node.output if o and o not in types]
    if unknown and feeds:
        session = Session(slicer.model(slicer.needed(unknown, ()), unknown, types), device)
        found = session.run({n: feeds[0][n] for n in session.inputs}, unknown)
        types.update(
            (n, int(helper.np_dtype_to_tensor_dtype(v.dtype)))
            for n, v in zip(unknown, found, strict=True)
            if hasattr(v, "dtype")  # sequences have none, and are never cut in two
        )
    return types


@dataclass(frozen=True)
class _Truth:
    """Tensors of the objective in the original, on every feed; ``wanted``: their names in order."""

    objective: Objective
    feeds: Sequence[Mapping[str, Array]]
    outputs: Sequence[list[Array]]
    wanted: list[str]


class _Part:
    """The graph behind a group's consumers; weights, shifts and masks that differ between levels are inputs."""

    def __init__(
        self,
        whole: _Whole,
        group: int,
        grams: Mapping[str, Gram],
    ) -> None:
        model = whole.model
        coupling = whole.coupling
        slicer = whole.slicer
        types = whole.types
        if whole.around is not None:
            slicer = Slicer(surrounding(model, coupling, whole.around, group=group))
        found = problems(model, coupling, grams, group)
        self.model, self.found, self.truth, self.repair = model, found, whole.truth, whole.repair
        wanted = whole.truth.wanted
        self.units = coupling.groups[group].units
        self.others: Ints | None = None
        if whole.around is not None:
            self.others = np.setdiff1d(whole.around.removed, self.units)
        self.linear = {name: p.uses[0] for p in found for name in p.uses}
        self.wanted = wanted
        self.nodes = {node.name: node for node in model.every}
        names, self.masked = self._consumers(coupling)
        sources = [o for node in slicer.nodes if node.name in names for o in node.output if o]
        behind = slicer.descendants(sources) | {
            i for i, n in enumerate(slicer.nodes) if n.name in names
        }
        behind &= set(slicer.needed(wanted, ()))
        # Else these units have no consumer, or only other outputs depend on them.
        self.reaches = bool(behind)
        if not behind:
            return
        made = {o for i in behind for o in slicer.nodes[i].output if o}
        inputs = {
            n
            for i in behind
            for n in slicer.reads[i]
            if n not in made and n not in slicer.constants
        }
        # A wanted output in front of the group does not depend on it.
        self.before = sorted(inputs | {w for w in wanted if w not in made})
        prefix = slicer.needed(self.before, ())
        graph_inputs = {p.name for p in model.inputs}
        computed = [n for n in self.before if n not in graph_inputs]
        self.prefix = (
            Session(slicer.model(prefix, computed, types), whole.device, 1) if computed else None
        )
        self.computed = computed
        proto = slicer.model(sorted(behind), [w for w in wanted if w in made], types)
        self._open(proto, types)
        self.suffix = Session(proto, whole.device, 1, what="a part of the model")
        self.made = made

    def _consumers(
        self, coupling: Coupling
    ) -> tuple[set[str], dict[str, list[tuple[str, Consumer, Ints]]]]:
        """Nodes of the main graph with consumers of the group; and those to mask, with a name for every mask."""
        homes = self.model.homes
        names: set[str] = set()
        # A node may read the group at several places (a recurrent one: its input and its own state).
        masked: dict[str, list[tuple[str, Consumer, Ints]]] = {}
        for c in (*coupling.consumers, *coupling.inside):
            labels = coupling.axes[c.data, c.axis]
            if not np.isin(labels, self.units).any():
                continue
            names.add(homes[c.node])
            if c.node not in self.linear:
                here = masked.setdefault(c.node, [])
                here.append((f"{len(here)}_{c.node}", c, labels))
        return names, masked

    def _open(self, proto: onnx.ModelProto, types: Mapping[str, int]) -> None:
        """Turn weights into inputs, add bias shifts behind and masks before the consumers."""
        weights: set[str] = set()

        def opened(node: onnx.NodeProto) -> list[onnx.NodeProto]:
            nodes: list[onnx.NodeProto] = []
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            place = None
            if copy.name in self.linear:
                place = site(
                    next(n for n in self.model.nodes if n.name == copy.name), self.model.constants
                )
                assert place is not None
                kind = types[place.weight]
                weight = f"oamip_weight_{self.linear[copy.name]}"
                copy.input[place.weight_slot] = weight
                if weight not in weights:
                    weights.add(weight)
                    proto.graph.input.append(helper.make_tensor_value_info(weight, kind, None))
                proto.graph.input.append(
                    helper.make_tensor_value_info(f"oamip_shift_{copy.name}", kind, None)
                )
                inner = f"oamip_inner_{copy.name}"
                out = copy.output[0]
                copy.output[0] = inner
                nodes.append(copy)
                nodes.append(build.add(inner, f"oamip_shift_{copy.name}", out))
                return nodes
            for key, consumer, labels in self.masked.get(copy.name, ()):
                kind = types[consumer.data]
                name = f"oamip_mask_{key}"
                proto.graph.input.append(helper.make_tensor_value_info(name, kind, None))
                none_removed = self._mask(consumer, np.ones(len(labels), bool))
                nodes += apply_mask(copy, consumer.slot, name, none_removed.replaces)
            nodes.append(copy)
            return nodes

        insert(proto.graph, opened)
        read = {n for node in proto.graph.node for n in reads(node)}
        kept = [t for t in proto.graph.initializer if t.name in read]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)

    def losses(self, removed: Sequence[Ints]) -> Floats:
        """Mean loss (sets,) of the model without the units at each set of positions of the group."""
        if not self.reaches:
            return np.zeros(len(removed))
        objective = self.truth.objective
        total = np.zeros((len(removed), len(objective.judged), 3))
        for start, settings in self._levels(removed):
            for feed, truth in zip(self.truth.feeds, self.truth.outputs, strict=True):
                boundary = self.boundary(feed)
                for i, setting in enumerate(settings, start):
                    total[i] += sums(objective, truth, self.run(boundary, setting))
        return np.asarray([loss(objective, one).total for one in total])

    def _levels(self, removed: Sequence[Ints]) -> Iterator[tuple[int, list[dict[str, Array]]]]:
        """Inputs of several levels at a time, as many as fit in ``LEVEL_BYTES``, with the number of the first."""
        held: list[dict[str, Array]] = []
        start = 0
        for places in removed:
            held.append(self.level(places))
            size = sum(value.nbytes for value in held[0].values())
            if (len(held) + 1) * size > LEVEL_BYTES:
                yield start, held
                start += len(held)
                held = []
        if held:
            yield start, held

    def boundary(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Tensors that cross from the original front into this part."""
        values: dict[str, Array] = {}
        if self.prefix:
            given = {n: feed[n] for n in self.prefix.inputs}
            values = dict(zip(self.computed, self.prefix.run(given, self.computed), strict=True))
        return {name: values[name] if name in values else feed[name] for name in self.before}

    def level(self, removed: Ints) -> dict[str, Array]:
        """Inputs that take away the units at positions ``removed`` of the group and repair the consumers."""
        result: dict[str, Array] = {}
        by_weight: dict[tuple[str, ...], list[Problem]] = {}
        for problem in self.found:
            by_weight.setdefault(problem.uses, []).append(problem)
        # The repaired weights of one consumer at a time are held in double precision.
        for uses, problems_of_weight in by_weight.items():
            blocks = [
                problem.unfold(*compensate(problem, removed, self.repair, self.others))
                for problem in problems_of_weight
            ]
            result[f"oamip_weight_{uses[0]}"] = consumer_weight(self.model, uses[0], blocks)
            for name in uses:
                result[f"oamip_shift_{name}"] = consumer_shift(self.model, name, blocks)
        gone = self.units[removed]
        if self.others is not None:
            gone = np.append(gone, self.others)
        for key, consumer, labels in (
            found for several in self.masked.values() for found in several
        ):
            result[f"oamip_mask_{key}"] = self._mask(consumer, ~np.isin(labels, gone)).value
        return result

    def _mask(self, consumer: Consumer, kept: Bools) -> Mask:
        """Removal of the channels that a consumer reads."""
        return channel_mask(self.model, self.nodes[consumer.node], consumer, kept)

    def run(self, boundary: Mapping[str, Array], setting: Mapping[str, Array]) -> list[Array]:
        """The wanted outputs at one level."""
        feed = {n: v for n, v in {**boundary, **setting}.items() if n in self.suffix.inputs}
        names = [w for w in self.wanted if w in self.made]
        found = dict(zip(names, self.suffix.run(feed, names), strict=True))
        return [found[w] if w in found else boundary[w] for w in self.wanted]
