"""Least-squares refit: compensates removed units in the weights and biases of their consumers.

It needs no labels and no gradient. Every linear node behind the cut is refitted, front to back. With x the input of the
node in the cut model (whose nodes in front of it are already refitted) and y its output in the original model, on the
same rows,

    minimise  sum_rows |y - (W0 + D) x - b|^2 + ridge |D|^2     over D and b,

where W0 are its weights after the cut: ridge regression of the residual, pulled towards the original weights. The ridge
strength is chosen per node by the error on held-out rows; where no strength beats D = 0 there, the weights are kept and
only the bias changes. Sums are in float64.

Source: channel pruning with least-squares reconstruction, He, Zhang and Sun, ICCV 2017. The front-to-back order
corrects the errors that earlier layers made.

Where a node has few rows for its unknowns, as behind a pooling, augmented copies of the samples add to them
(``change``): the original gives the wanted outputs for any input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

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
from onnx_oamip.repair.refit_scope import families_behind, short_of_samples
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


def least_squares(
    model: Model,
    coupling: Coupling,
    units: Bools,
    raw: onnx.ModelProto,
    sampling: Sampling,
    *,
    change: Augment | None = None,
) -> tuple[Pruned, ...]:
    """Refits every linear node behind the cut, front to back.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        raw: The cut model.
        sampling: The samples.
        change: Makes a changed feed, for a second refit: where samples are few, it is also on augmented copies of them.
            Nodes in front of the first that is short of samples are refitted once for both. None for no second refit.

    Returns:
        The refitted model, with notes and one record per fit; behind it that of the second refit.

    Raises:
        OutOfMemory: The memory does not suffice for a node, which the message names.
    """
    task = _task(Cut(model, coupling, units), sampling)
    run = _begun(task, raw)
    in_order = task.in_order
    if change is None:
        run.advance(in_order)
        return (run.result(raw),)
    short = short_of_samples(model, task.families, sampling.samples, sampling.cap)
    names = [place.node.name for place in in_order]
    first = next((i for i, name in enumerate(names) if name in short), len(names))
    run.advance(in_order[:first])
    both = run.fork(change, short)
    run.advance(in_order[first:])
    plain = run.result(raw)
    del run  # its activations
    both.advance(in_order[first:])
    return plain, both.result(raw)


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

    @property
    def late(self) -> frozenset[str]:
        """Names of the nodes whose weight is refitted before their input is known."""
        return frozenset[str]().union(*(family.late for family in self.families))

    def targets(
        self,
        feeds: Sequence[Mapping[str, Array]],
        memory_limit: int,
        weights: Sequence[PositionWeights] | None,
        only: Collection[str] | None = None,
    ) -> dict[str, Target]:
        """Outputs of the original nodes on some feeds; of all nodes, or only of some."""
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

    def steps(self, weights: Sequence[PositionWeights] | None) -> dict[str, list[recurrent.Steps]]:
        """Gate sums of the recurrent layers at sampled steps."""
        return recurrent.collect(
            self.cut.model,
            self.layers,
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


@dataclass
class _Run:
    """A refit in progress.

    Attributes:
        task: The nodes and the samples.
        proto: The cut model, changed node by node.
        frontier: Its activations.
        targets: Outputs of the original nodes.
        steps: Gate sums of the original recurrent layers.
        limit: Upper bound in bytes on the activations of the samples in memory.
        copies: Augmented copies of the samples, if any.
        notes: Remarks so far.
        fits: Records so far.
    """

    task: _Task
    proto: onnx.ModelProto
    frontier: Frontier
    targets: dict[str, Target]
    steps: dict[str, list[recurrent.Steps]]
    limit: int
    copies: Copied | None = None
    notes: list[str] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)

    def advance(self, places: Sequence[Site | recurrent.Layer]) -> None:
        """Refits the next nodes."""
        task, cut = self.task, self.task.cut
        editor = Editor(self.proto)
        by_first = {family.names[0]: family for family in task.families}
        number = {place.node.name: i for i, place in enumerate(task.in_order)}
        for place in places:
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

    def fork(self, change: Augment, short: Collection[str]) -> _Run:
        """Makes a run that is as far as this one, with copies of the samples; both get their share of the memory.

        Args:
            change: Makes a changed feed.
            short: Names of the nodes whose rows the copies add to.

        Returns:
            The run.
        """
        task = self.task
        limit = task.sampling.limit // (1 + COPIES)
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        changed = Copies(task.feeds, change, COPIES, task.sampling.seed)
        copied = Copied(
            Frontier(proto, changed, task.types, task.sampling.device, COPIES * limit),
            task.targets(changed, COPIES * limit, task.weights(changed), short),
        )
        return _Run(
            task,
            proto,
            self.frontier.fork(proto, limit),
            dict(self.targets),
            dict(self.steps),
            limit,
            copied,
            list(self.notes),
            list(self.fits),
        )

    def result(self, raw: onnx.ModelProto) -> Pruned:
        """The refitted model with all notes, given the cut model."""
        feeds, used = self.task.feeds, self.frontier.batches
        notes = [*self.task.notes, *self.notes]
        if used < len(feeds):
            taken = sum(map(len, feeds.indices[:used]))
            total = sum(map(len, feeds.indices))
            notes.append(
                f"least squares used {taken} of {total} samples for the last nodes, as many as fit in "
                f"{self.limit >> 20} MiB"
            )
        return Pruned(raw, self.proto, tuple(notes), tuple(self.fits))


def _begun(task: _Task, raw: onnx.ModelProto) -> _Run:
    """A refit of all samples at its first node."""
    proto = onnx.ModelProto()
    proto.CopyFrom(raw)
    given = task.sampling
    frontier = Frontier(proto, task.feeds, task.types, given.device, given.limit)
    weights = task.weights(task.feeds)
    targets = task.targets(task.feeds, given.limit, weights)
    return _Run(task, proto, frontier, targets, task.steps(weights), given.limit)
