"""Least-squares refit: compensates removed units in the weights and biases of their consumers.

It needs no labels and no gradient. Every linear node behind the cut is refitted, front to back. With x the input of the
node in the cut model (whose nodes in front of it are already refitted) and y its output in the original model, on the
same rows,

    minimise  sum_rows |y - (W0 + D) x - b|^2 + ridge |D|^2     over D and b,

where W0 are its weights after the cut: ridge regression of the residual, pulled towards the original weights. The ridge
strength is chosen per node by the error on held-out rows; where no strength beats D = 0 there, the weights are kept and
only the bias changes. Sums are in float64. Where a clamp follows the node, the fit goes on towards the outputs behind
the clamp (:mod:`~onnx_oamip.repair.clamped_targets`).

Source: channel pruning with least-squares reconstruction, He, Zhang and Sun, ICCV 2017. The front-to-back order
corrects the errors that earlier layers made.

Where a node has few rows for its unknowns, as behind a pooling, augmented copies of the samples add to them
(``change``): the original gives the wanted outputs for any input.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Array, Bools, Coupling, Fit, Model, Objective, Pruned
from onnx_oamip.data.augmentation import Augment, Copies
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import DEFAULT_MEMORY_LIMIT, Feeds, all_feeds
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Frontier, element_types
from onnx_oamip.objective.position_weights import PositionWeights, position_weights
from onnx_oamip.repair import recurrent
from onnx_oamip.repair.channel_mixing import mixes_channels
from onnx_oamip.repair.cut_model import Cut
from onnx_oamip.repair.node_refit import refit_family, shift_bias
from onnx_oamip.repair.problems import Copied
from onnx_oamip.repair.refit_scope import families_behind
from onnx_oamip.repair.row_sampling import GRAM_CAP
from onnx_oamip.repair.shared_weights import Family
from onnx_oamip.repair.targets import Target, collect_targets

COPIES = 2
"""Augmented copies of every sample."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Calibration samples of a refit, and how models are run on them.

    Attributes:
        samples: The samples.
        device: ``cpu`` or ``cuda``.
        batch_size: Samples per run.
        seed: Seed of the choice of rows and of the changes of copies.
        cap: Unknowns per output above which channels are mixed instead of fitting all weights.
        memory_limit: Upper bound in bytes on the activations in memory; fewer samples are used if they do not fit.
        objective: Terms with their scales: rows behind rare decisions count more. None to count all rows alike.
        progress: Receives the number of refitted nodes.
    """

    samples: Samples
    device: str
    batch_size: int = 32
    seed: int = 0
    cap: int = GRAM_CAP
    memory_limit: int | None = None
    objective: Objective | None = None
    progress: Progress | None = None

    @property
    def limit(self) -> int:
        """Upper bound in bytes on the activations in memory."""
        return DEFAULT_MEMORY_LIMIT if self.memory_limit is None else self.memory_limit


def front(
    model: Model,
    coupling: Coupling,
    units: Bools,
    raw: onnx.ModelProto,
    sampling: Sampling,
    *,
    short: Collection[str],
) -> Pruned:
    """Refits the nodes in front of the first that is short of samples: further samples would not change them much.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        raw: The cut model.
        sampling: The samples.
        short: Names of the nodes that are short of samples (:func:`refit_scope.short_of_samples`). Without any, all
            nodes are refitted.

    Returns:
        The model with these nodes refitted, from which several refits of the other nodes can start.

    Raises:
        OutOfMemory: The memory does not suffice for a node, which the message names.
    """
    task = _task(Cut(model, coupling, units), sampling)
    return _refitted(task, Pruned(raw, raw, task.notes), task.in_front_of(short))


def rest(
    model: Model,
    coupling: Coupling,
    units: Bools,
    start: Pruned,
    sampling: Sampling,
    *,
    short: Collection[str],
    change: Augment | None = None,
) -> Pruned:
    """Refits the nodes from the first that is short of samples on.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        start: The model with the nodes in front of these refitted (:func:`front`).
        sampling: The samples; they may be others than those of the nodes in front.
        short: Names of the nodes that are short of samples.
        change: Makes a changed feed: augmented copies of the samples add to the rows of nodes that are short of them.
            None for no copies.

    Returns:
        The refitted model, with notes and one record per fit of all nodes.

    Raises:
        OutOfMemory: The memory does not suffice for a node, which the message names.
    """
    task = _task(Cut(model, coupling, units), sampling)
    places = task.in_order[len(task.in_front_of(short)) :]
    if not places:
        return start
    copies = None if change is None else _Copying(change, short)
    return _refitted(task, start, places, copies)


def is_valid_cache_entry(refitted: Pruned, raw: onnx.ModelProto) -> bool:
    """Checks a cached refit against the cut model that it should belong to.

    Args:
        refitted: The cache entry.
        raw: The cut model.

    Returns:
        True if the entry has the interface, the nodes and the weight shapes of the cut model, possibly among others.
    """
    old = raw.graph
    new = refitted.proto.graph
    if list(old.input) != list(new.input) or list(old.output) != list(new.output):
        return False
    if list(raw.opset_import) != list(refitted.proto.opset_import) or refitted.proto.functions:
        return False
    initialisers = {tensor.name: tensor for tensor in new.initializer}
    if any(tensor.external_data for tensor in new.initializer):
        return False
    for tensor in old.initializer:
        other = initialisers.get(tensor.name)
        if other is None:  # a refit replaces weights under new names
            continue
        if (other.dims, other.data_type) != (tensor.dims, tensor.data_type):
            return False
    # A product that gets a bias passes its output on to a sum, which has the old output name.
    nodes = {(node.op_type, node.name) for node in new.node}
    outputs = {name for node in new.node for name in node.output}
    return all(
        (node.op_type, node.name) in nodes and outputs.issuperset(node.output) for node in old.node
    )


@dataclass(frozen=True)
class _Task:
    """The linear nodes behind a cut, and the samples that they are refitted on.

    Attributes:
        cut: The original model and the kept units.
        sampling: The samples.
        feeds: All of them, in batches.
        types: ONNX element types of tensors.
        rng: Chooses rows.
        families: The nodes, those that share a weight together.
        places: The same nodes in the order of the graph.
        layers: Recurrent layers to refit.
        notes: Remarks on nodes that are not refitted.
    """

    cut: Cut
    sampling: Sampling
    feeds: Feeds
    types: dict[str, int]
    rng: np.random.Generator
    families: tuple[Family, ...]
    places: tuple[Site, ...]
    layers: tuple[recurrent.Layer, ...]
    notes: tuple[str, ...]

    @property
    def in_order(self) -> list[Site | recurrent.Layer]:
        """Nodes and recurrent layers in the order of the graph."""
        number = {node.name: i for i, node in enumerate(self.cut.model.nodes)}
        both: list[Site | recurrent.Layer] = [*self.places, *self.layers]
        return sorted(both, key=lambda place: number[place.node.name])

    def in_front_of(self, names: Collection[str]) -> list[Site | recurrent.Layer]:
        """Nodes and recurrent layers in front of the first of some nodes; all of them where there is none."""
        return list(itertools.takewhile(lambda place: place.node.name not in names, self.in_order))

    @property
    def late(self) -> frozenset[str]:
        """Names of the nodes whose weight is refitted before their input is known."""
        return frozenset[str]().union(*(family.late for family in self.families))

    def targets(
        self,
        feeds: Sequence[Mapping[str, Array]],
        memory_limit: int,
        weights: Sequence[PositionWeights] | None,
        only: Collection[str],
    ) -> dict[str, Target]:
        """Outputs of some of the original nodes on some feeds."""
        given = self.sampling
        return collect_targets(
            self.cut.model,
            self.places,
            feeds,
            types=self.types,
            device=given.device,
            rng=self.rng,
            cap=given.cap,
            mixed={
                family.names[0]
                for family in self.families
                if not family.is_shared and mixes_channels(self.cut, family.uses[0], given.cap)
            },
            uses={name: len(family.uses) for family in self.families for name in family.names},
            late=self.late,
            memory_limit=memory_limit,
            weights=weights,
            only=only,
        )

    def weights(self, feeds: Sequence[Mapping[str, Array]]) -> list[PositionWeights] | None:
        """Weights of the positions of some feeds; None if all positions weigh the same."""
        given = self.sampling
        if given.objective is None:
            return None
        return position_weights(self.cut.model, given.objective, feeds, given.device)

    def steps(
        self, layers: Sequence[recurrent.Layer], weights: Sequence[PositionWeights] | None
    ) -> dict[str, list[recurrent.Steps]]:
        """Gate sums of recurrent layers at sampled steps."""
        return recurrent.collect(
            self.cut.model,
            layers,
            self.feeds,
            types=self.types,
            device=self.sampling.device,
            rng=self.rng,
            memory_limit=self.sampling.limit,
            weights=weights,
        )


def _task(cut: Cut, sampling: Sampling) -> _Task:
    """Finds the nodes to refit, and the feeds."""
    model = cut.model
    families, layers, notes = families_behind(cut)
    order = {node.name: i for i, node in enumerate(model.nodes)}
    places = [place for family in families for place in family.uses]
    places.sort(key=lambda place: order[place.node.name])
    return _Task(
        cut,
        sampling,
        all_feeds(model, sampling.samples, sampling.batch_size, sampling.limit),
        element_types(model.proto, model.dtypes),
        np.random.default_rng(sampling.seed),
        tuple(families),
        tuple(places),
        tuple(layers),
        tuple(notes),
    )


@dataclass(frozen=True)
class _Copying:
    """Augmented copies of the samples: ``change`` makes them, ``names`` are the nodes whose rows they add to."""

    change: Augment
    names: Collection[str]


def _refitted(
    task: _Task,
    start: Pruned,
    places: Sequence[Site | recurrent.Layer],
    copying: _Copying | None = None,
) -> Pruned:
    """Refits some nodes, with copies of the samples if they are given.

    Args:
        task: All nodes behind the cut, and the samples.
        start: The cut model, with the nodes in front of these refitted.
        places: The nodes, in the order of the graph.
        copying: Augmented copies of the samples; both then get their share of the memory.

    Returns:
        The model with the nodes refitted, and all notes and records.
    """
    given = task.sampling
    proto = onnx.ModelProto()
    proto.CopyFrom(start.proto)
    run = _Run(task, places, proto, given.limit if copying is None else given.limit // (1 + COPIES))
    if copying is not None:
        run.add_copies(copying)
    run.advance()
    used, feeds = run.frontier.batches, task.feeds
    notes = [*start.notes, *run.notes]
    if used < len(feeds):
        taken = sum(map(len, feeds.indices[:used]))
        total = sum(map(len, feeds.indices))
        notes.append(
            f"least squares used {taken} of {total} samples for the last nodes, as many as fit in "
            f"{run.limit >> 20} MiB"
        )
    return Pruned(start.raw, proto, tuple(notes), (*start.fits, *run.fits))


class _Run:
    """A refit in progress.

    Attributes:
        task: All nodes behind the cut, and the samples.
        places: The nodes to refit.
        proto: The cut model, changed node by node.
        limit: Upper bound in bytes on the activations of the samples in memory.
        frontier: These activations.
        targets: Outputs of the original nodes.
        steps: Gate sums of the original recurrent layers.
        copies: Augmented copies of the samples, if any.
        notes: Remarks so far.
        fits: Records so far.
    """

    def __init__(
        self,
        task: _Task,
        places: Sequence[Site | recurrent.Layer],
        proto: onnx.ModelProto,
        limit: int,
    ) -> None:
        self.task = task
        self.places = places
        self.proto = proto
        self.limit = limit
        self.frontier = Frontier(proto, task.feeds, task.types, task.sampling.device, limit)
        names = {place.node.name for place in places}
        weights = task.weights(task.feeds)
        # The uses of a weight are refitted together at the first of them, which needs the outputs of all.
        used = {
            name for family in task.families if family.names[0] in names for name in family.names
        }
        self.targets = task.targets(task.feeds, limit, weights, names | used)
        self.steps = task.steps(
            [layer for layer in task.layers if layer.node.name in names], weights
        )
        self.copies: Copied | None = None
        self.notes: list[str] = []
        self.fits: list[Fit] = []

    def add_copies(self, copying: _Copying) -> None:
        """Adds copies of the samples to the rows of some nodes."""
        task = self.task
        limit = COPIES * self.limit
        feeds = Copies(task.feeds, copying.change, COPIES, task.sampling.seed)
        self.copies = Copied(
            Frontier(self.proto, feeds, task.types, task.sampling.device, limit),
            task.targets(feeds, limit, task.weights(feeds), copying.names),
        )

    def advance(self) -> None:
        """Refits the nodes."""
        task, cut = self.task, self.task.cut
        editor = Editor(self.proto)
        by_first = {family.names[0]: family for family in task.families}
        number = {place.node.name: i for i, place in enumerate(task.in_order)}
        for place in self.places:
            fit = None
            remarks: list[str] = []
            name = place.node.name
            with memory_for(f"the refit of {place.node}"):
                if isinstance(place, recurrent.Layer):
                    keep = recurrent.kept_units(place, cut.coupling, cut.units)
                    steps = self.steps.pop(name)
                    fit, remarks = recurrent.refit(place, keep, editor, self.frontier, steps)
                elif name in by_first:
                    fit, remarks = refit_family(
                        cut,
                        editor,
                        by_first[name],
                        self.frontier,
                        self.targets,
                        copies=self.copies,
                    )
                elif name in task.late:
                    shift_bias(cut, editor, place, self.frontier, self.targets[name])
                if name in task.late or name not in by_first:
                    self.targets.pop(name, None)
            if fit is not None:
                self.fits.append(fit)
            if remarks:
                self.notes.append(f"{place.node}: {'; '.join(remarks)}")
            if task.sampling.progress:
                task.sampling.progress("refit", number[name] + 1, len(number))
