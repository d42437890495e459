"""Reconstruction (refit): compensates removed units in the weights and biases of their consumers.

It needs no labels and no gradient. Two methods:

``bias``: the mean of every removed channel, times its weights, is added to the consumer's bias. For a convolution with
zero padding this is exact away from the border.

``least-squares``: every linear node behind the cut is refitted, front to back. With x the input of the node in the cut
model (whose nodes in front of it are already refitted) and y its output in the original model, on the same rows,

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

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Fit,
    Floats,
    Ints,
    Model,
    Node,
    Objective,
    Pruned,
    Statistics,
)
from onnx_oamip.data.augmentation import Augment, Copies
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import DEFAULT_MEMORY_LIMIT, Feeds, all_feeds
from onnx_oamip.graph.im2col import (
    data_rows,
    output_rows,
    pick,
    pick_weighted,
    row_axes,
    row_count,
)
from onnx_oamip.graph.linear_layers import (
    Editor,
    matrix,
    matrix_shape,
    quantised,
    site,
    unmatrix,
)
from onnx_oamip.graph.ops import lookup
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Frontier, Slicer, element_types, stream
from onnx_oamip.objective.position_weights import PositionWeights, position_weights
from onnx_oamip.repair import recurrent
from onnx_oamip.repair.residual_joins import Join, join
from onnx_oamip.repair.ridge import (
    RidgeFit,
    Solve,
    best_shift,
    choose_ridge,
    remaining_error,
    ridge_regression,
    solve_ridge,
)
from onnx_oamip.repair.shared_weights import (
    Family,
    Rows,
    Sharing,
    Spread,
    pooled_variance,
    schedule,
    stacked,
)

SINGLE_BYTES = 4
"""Bytes of a number in single precision; weights that are stored in fewer are rounded noticeably."""
ROWS_PER_UNKNOWN = 16
MIN_ROWS = 4096
MAX_ROWS = 24576
GRAM_CAP = 4608
"""Unknowns per output above which their Gram matrix gets too large: fewer rows are sampled, see ``_solver``."""
HELD_OUT = 0.2
"""Share of the rows on which the ridge strength is chosen."""
WIDE_VALUES = 1 << 25
"""Most values (rows x unknowns) sampled of a node that is too wide for a Gram matrix."""
MIN_WIDE_ROWS = 32
COPIES = 2
"""Augmented copies of every sample."""
SHORT = 0.1
"""Share of all rows that a fit of a node samples, from which on augmented copies are added to its rows."""
VALUE_BYTES = 8
"""Inputs and outputs at the sampled rows are float64."""
WIDE_COPIES = 4
"""Arrays of that size during the refit of a wide node."""


# ----------------------------------------------------------------------------------------------------------- bias


def fold_means(
    model: Model,
    coupling: Coupling,
    units: Bools,
    statistics: Statistics,
    raw: onnx.ModelProto,
) -> Pruned:
    """Adds the means of removed channels to the biases of their consumers.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        statistics: Moments of the channels of every consumer.
        raw: The cut model.

    Returns:
        The changed model, with a note for every consumer whose bias could not be changed.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(raw)
    editor = Editor(proto)
    nodes = {node.name: node for node in model.nodes}
    notes = _notes_on_bodies(model, coupling, units)
    for consumer in coupling.consumers:
        node = nodes[consumer.node]
        keep = coupling.keep((consumer.data, consumer.axis), units)
        if keep.all() or consumer.weight not in model.constants:
            continue
        place = site(node, model.constants)
        if place is None:
            notes.append(
                f"{node}: its weight has no plain matrix form, so the mean of what was removed is not added"
            )
            continue
        weight = matrix(place, model.constants[place.weight])
        means = statistics.moments[consumer.data, consumer.axis].mean
        removed_means = np.where(keep, 0.0, means).reshape(len(weight), -1)
        contribution = np.einsum("goit,gi->go", weight, removed_means)
        shift: Floats = place.factor * contribution.reshape(-1)
        if place.rules.scatters:
            # The taps of a transposed convolution are spread over the positions between two input pixels.
            shift /= int(np.prod(node.attrs.get("strides", [1])))
        kept_outputs = output_mask(model, coupling, place, units)
        if not editor.add_bias(place, shift[kept_outputs]):
            notes.append(
                f"{node}: its bias is computed, so the mean of what was removed is not added"
            )
    return Pruned(raw, proto, tuple(notes))


def output_mask(
    model: Model,
    coupling: Coupling,
    place: Site,
    units: Bools,
) -> Bools:
    """Outputs that a linear node keeps.

    Args:
        model: The original model.
        coupling: Its coupling.
        place: The linear node.
        units: Keep mask of the units (n_units,).

    Returns:
        A mask of the original outputs (outputs,).
    """
    output = place.node.outputs[0]
    shape = model.shapes.get(output)
    if shape is not None:
        axis = place.output_axis % len(shape)
        if (output, axis) in coupling.axes:
            return coupling.keep((output, axis), units)
    groups, outs, _, _ = matrix_shape(place, model.constants[place.weight])
    return np.ones(groups * outs, bool)


def new_biases(model: Model) -> int:
    """Upper bound on the parameters that a refit adds: biases of linear nodes that have none yet.

    Args:
        model: The original model.

    Returns:
        Number of elements before pruning.
    """
    editor = Editor(model.proto)
    places = (site(node, model.constants) for node in model.nodes)
    products = sum(editor.bias_growth(place) for place in places if place is not None)
    return products + recurrent.bias_growth(model)


# --------------------------------------------------------------------------------------------------- least squares


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
class _Cut:
    """A model, its coupling, and the units that are kept (n_units,)."""

    model: Model
    coupling: Coupling
    units: Bools


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
    task = _task(_Cut(model, coupling, units), sampling)
    run = _begun(task, raw)
    in_order = task.in_order
    if change is None:
        run.advance(in_order)
        return (run.result(raw),)
    short = _short_of_samples(model, task.families, sampling.samples, sampling.cap)
    names = [place.node.name for place in in_order]
    first = next((i for i, name in enumerate(names) if name in short), len(names))
    run.advance(in_order[:first])
    both = run.fork(change, short)
    run.advance(in_order[first:])
    plain = run.result(raw)
    del run  # its activations
    both.advance(in_order[first:])
    return plain, both.result(raw)


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

    cut: _Cut
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
                if not family.is_shared and _mixes_channels(self.cut, family.uses[0], given.cap)
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


def _task(cut: _Cut, sampling: Sampling) -> _Task:
    """Finds the nodes to refit, and the feeds."""
    model = cut.model
    families, layers, notes = _families(cut)
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
    copies: _Copied | None = None
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
                    fit, remarks = _refit(
                        cut,
                        editor,
                        by_first[name],
                        self.frontier,
                        self.targets,
                        copies=self.copies,
                    )
                    for late_name in by_first[name].late:
                        self.targets[late_name] = replace(self.targets[late_name], inputs=())
                elif name in task.late:
                    _shift_bias(cut, editor, place, self.frontier, self.targets[name])
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
        copied = _Copied(
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


def _families(cut: _Cut) -> tuple[list[Family], list[recurrent.Layer], list[str]]:
    """Linear nodes to refit, those that share a weight together, recurrent layers, and notes on those that cannot be.

    They are the consumers of removed channels, all linear nodes behind one, whose input has changed, and all that share
    a weight with one of these.
    """
    model = cut.model
    changed = _changed_nodes(cut)
    slicer = Slicer(model.proto)
    outputs = (name for node in slicer.nodes if node.name in changed for name in node.output)
    behind = {slicer.nodes[i].name for i in slicer.descendants(outputs)}
    sharing = Sharing(model)
    families: dict[str, Family] = {}
    layers = []
    notes = _notes_on_bodies(model, cut.coupling, cut.units)
    for node in model.nodes:
        is_behind_cut = node.name in changed or node.name in behind
        if is_behind_cut and (layer := recurrent.layer(node, model)) is not None:
            layers.append(layer)
            continue
        place = site(node, model.constants) if is_behind_cut else None
        obstacle = "" if place is None else sharing.obstacle(place)
        if obstacle:
            notes.append(f"{node}: {obstacle}, so it is not refitted")
        elif place is not None:
            family = Family(sharing.family(place))
            families.setdefault(family.names[0], family)
        elif node.name in changed:
            notes += _notes_on_unfitted(node, model)
    order = {node.name: i for i, node in enumerate(model.nodes)}
    in_order = sorted(families.values(), key=lambda family: order[family.names[0]])
    return schedule(in_order, slicer), layers, notes


def _changed_nodes(cut: _Cut) -> set[str]:
    """Names of the nodes of the main graph that read removed channels, themselves or in a subgraph."""
    return {
        cut.model.homes[consumer.node]
        for consumer in (*cut.coupling.consumers, *cut.coupling.inside)
        if not cut.coupling.keep((consumer.data, consumer.axis), cut.units).all()
    }


def _notes_on_unfitted(node: Node, model: Model) -> list[str]:
    """Reason why a node without matrix form is not refitted, if one could expect that it is."""
    has_constant = any(name in model.constants for name in node.inputs[:2])
    if _has_cost(node) and has_constant:
        return [f"{node}: its weight has no plain matrix form, so it is not refitted"]
    if quantised(node, model):
        return [f"{node}: its weight is quantised, so it is not refitted"]
    return []


def _has_cost(node: Node) -> bool:
    """Tests for an operator with weights that multiply; the gain of a normalisation is none."""
    spec = lookup(node.domain, node.op, node.version)
    return spec is not None and spec.cost is not None


def _notes_on_bodies(
    model: Model,
    coupling: Coupling,
    units: Bools,
) -> list[str]:
    """Notes on the nodes whose subgraphs lost channels: no statistics are collected in there."""
    pruned = {
        model.homes[consumer.node]
        for consumer in coupling.inside
        if not coupling.keep((consumer.data, consumer.axis), units).all()
    }
    return [
        f"{node}: its body lost channels and is not refitted, as no data is seen inside"
        for node in model.nodes
        if node.name in pruned
    ]


@dataclass(frozen=True)
class Target:
    """Outputs of an original node at sampled rows, per feed.

    Attributes:
        shapes: Shape of the whole output.
        rows: Numbers of the sampled rows.
        values: Outputs (rows, outputs).
        inputs: Inputs (rows, groups, inputs * taps), only of nodes whose channels are mixed and of late ones.
        join: Residual sum that the output reaches, if its other branch is not refitted later.
        joined: Other branch of that sum (rows, outputs); else empty.
        is_late: Whether the node shares a weight that is refitted before its input in the cut model is known.
    """

    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[Ints, ...]
    values: tuple[Array, ...]
    inputs: tuple[Array, ...]
    join: Join | None
    joined: tuple[Array, ...]
    is_late: bool = False


def collect_targets(
    model: Model,
    places: Sequence[Site],
    feeds: Sequence[Mapping[str, Array]],
    *,
    types: dict[str, int],
    device: str,
    rng: np.random.Generator,
    cap: int,
    mixed: Collection[str] = (),
    uses: Mapping[str, int] = MappingProxyType({}),
    late: Collection[str] = (),
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    weights: Sequence[PositionWeights] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Target]:
    """Samples the outputs of linear nodes in one run through the original model.

    Args:
        model: The original model.
        places: Linear nodes in topological order.
        feeds: Values of the graph inputs, one mapping per batch.
        types: ONNX element types by tensor name.
        device: ``cpu`` or ``cuda``.
        rng: Chooses the rows.
        cap: Unknowns per output above which a node is wide: fewer of its rows are sampled.
        mixed: Names of the nodes whose channels are mixed, for which inputs are sampled too.
        uses: Number of nodes that share the weight of a node, by its name.
        late: Names of the nodes that need their inputs in the original model.
        memory_limit: Upper bound in bytes on one array of inputs and outputs at the sampled rows.
        weights: Weights of positions by feed: rows are sampled in proportion to them. None to sample all rows alike.
        only: Names of the nodes to sample; None for all.

    Returns:
        The samples by node name.
    """
    samplers = _samplers(
        model,
        places,
        batches=len(feeds),
        rng=rng,
        cap=cap,
        needs_inputs={*mixed, *late},
        uses=uses,
        memory_limit=memory_limit,
        weights=weights,
    )
    samplers = [s for s in samplers if only is None or s.place.node.name in only]
    asked = [(sampler, tensor) for sampler in samplers for tensor in sampler.tensors]
    tensors = [tensor for _, tensor in asked]
    for _, number, value in stream(model.proto, feeds, tensors, types, device):
        sampler, tensor = asked[number]
        sampler.take(tensor, value)
    return {sampler.place.node.name: sampler.target(late) for sampler in samplers}


def _row_choice(
    place: Site,
    rows_per_feed: int,
    rng: np.random.Generator,
    weights: Sequence[PositionWeights] | None,
) -> Callable[[int, tuple[int, ...]], Ints]:
    """Choice of the rows of a node, by the index of a feed and the shape of the output there."""

    def choose(feed: int, shape: tuple[int, ...]) -> Ints:
        if weights is None:
            return pick(row_count(place, shape), rows_per_feed, rng)
        return pick_weighted(weights[feed].rows(row_axes(place, shape)), rows_per_feed, rng)

    return choose


class _Sampler:
    """Samples the tensors around one linear node, one feed after another.

    Attributes:
        place: The node.
        tensors: Tensors to sample, in the order in which they are taken; the output is the last one.
    """

    def __init__(
        self,
        place: Site,
        *,
        choose: Callable[[int, tuple[int, ...]], Ints],
        needs_inputs: bool,
        join: Join | None,
    ) -> None:
        """Begins with no feed.

        Args:
            place: The node.
            choose: Chooses rows of a feed, by its index and the shape of the output.
            needs_inputs: Whether inputs are sampled too.
            join: Residual sum whose other branch is sampled too.
        """
        self.place = place
        self.join = join
        self.tensors = [
            *([place.data] if needs_inputs else []),
            *([join.other] if join else []),
            place.node.outputs[0],
        ]
        self._needs_inputs = needs_inputs
        self._choose = choose
        self._held: dict[str, Array] = {}
        self._found: dict[str, list[Any]] = defaultdict(list)

    def take(self, tensor: str, value: Array) -> None:
        """Takes the value of the next tensor at one feed; rows are chosen once the output is known."""
        self._held[tensor] = value
        output = self.place.node.outputs[0]
        if tensor != output:
            return
        found = self._found
        rows = self._choose(len(found["rows"]), value.shape)
        found["shapes"].append(value.shape)
        found["rows"].append(rows)
        found["values"].append(_sampled(self.place, value, rows))
        if self._needs_inputs:
            data = self._held[self.place.data]
            inputs = data_rows(self.place, data, rows, value.shape)
            found["inputs"].append(inputs.astype(np.promote_types(data.dtype, np.float32)))
        if self.join is not None:
            found["joined"].append(_sampled(self.place, self._held[self.join.other], rows))
        self._held = {}

    def target(self, late: Collection[str]) -> Target:
        """The samples of all feeds, for a node that is among the late ones or not."""
        found = {name: tuple(values) for name, values in self._found.items()}
        return Target(
            shapes=found.get("shapes", ()),
            rows=found.get("rows", ()),
            values=found.get("values", ()),
            inputs=found.get("inputs", ()),
            join=self.join,
            joined=found.get("joined", ()),
            is_late=self.place.node.name in late,
        )


def _samplers(
    model: Model,
    places: Sequence[Site],
    *,
    batches: int,
    rng: np.random.Generator,
    cap: int,
    needs_inputs: Collection[str],
    uses: Mapping[str, int],
    memory_limit: int,
    weights: Sequence[PositionWeights] | None,
) -> list[_Sampler]:
    """Samplers of linear nodes, each with a generator of its own, so that their rows do not depend on each other."""
    slicer = Slicer(model.proto)
    waiting = {place.node.name for place in places}
    result = []
    for place, own_rng in zip(places, rng.spawn(len(places)), strict=True):
        name = place.node.name
        count = uses.get(name, 1)
        joint = None if count > 1 else join(model, place)
        if joint is not None:
            before_sum = slicer.needed([joint.other], ())
            if any(slicer.nodes[i].name in waiting for i in before_sum):
                joint = None  # the other branch is refitted later, and will compensate the error of this one
        waiting.discard(name)
        shape = matrix_shape(place, model.constants[place.weight])
        rows_per_feed = -(-_row_limit(shape, cap, memory_limit) // (batches * count))
        sampler = _Sampler(
            place,
            choose=_row_choice(place, rows_per_feed, own_rng, weights),
            needs_inputs=name in needs_inputs,
            join=joint,
        )
        result.append(sampler)
    return result


def is_wide(place: Site, weight: Array, cap: int = GRAM_CAP) -> bool:
    """Test whether a node has too many unknowns per output for a Gram matrix.

    Args:
        place: The linear node.
        weight: Its weight.
        cap: Most unknowns.

    Returns:
        True if it has more.
    """
    _, _, ins, taps = matrix_shape(place, weight)
    return ins * taps > cap


def is_short_of_samples(model: Model, coupling: Coupling, units: Bools, samples: Samples) -> bool:
    """Test whether augmented copies of the samples would add to the rows of any fit.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        samples: Calibration samples.

    Returns:
        True if the fit of a node samples at least the share ``SHORT`` of its rows.
    """
    families, _, _ = _families(_Cut(model, coupling, units))
    return bool(_short_of_samples(model, families, samples, GRAM_CAP))


def _short_of_samples(
    model: Model, families: Sequence[Family], samples: Samples, cap: int
) -> set[str]:
    """Names of the nodes whose fit samples so many of their rows that copies of the samples add to them.

    Nodes that share a weight, and those too wide for a Gram matrix, are none of them.
    """
    result = set[str]()
    for family in families:
        place = family.uses[0]
        shape = model.shapes.get(place.node.outputs[0])
        weight = model.constants[place.weight]
        if shape is None or family.is_shared or is_wide(place, weight, cap):
            continue
        rows = row_count(place, shape) * samples.usable() / max(model.batch, 1)
        if _row_limit(matrix_shape(place, weight), cap, DEFAULT_MEMORY_LIMIT) >= SHORT * rows:
            result.add(place.node.name)
    return result


def _row_limit(
    shape: tuple[int, int, int, int],
    cap: int,
    memory_limit: int,
) -> int:
    """Number of rows to sample for a node.

    Args:
        shape: Groups, outputs and inputs per group, and taps.
        cap: Unknowns per output above which it is wide.
        memory_limit: Upper bound in bytes on one array of its inputs and outputs.
    """
    groups, outs, ins, taps = shape
    unknowns = ins * taps
    values_per_row = groups * (unknowns + outs)
    most_values = memory_limit // VALUE_BYTES
    if unknowns <= cap:
        wanted = int(np.clip(ROWS_PER_UNKNOWN * unknowns, MIN_ROWS, MAX_ROWS))
        return min(wanted, max(MIN_WIDE_ROWS, most_values // values_per_row))
    # Rows this wide are many values each: bound the values instead.
    most_values = min(WIDE_VALUES, most_values // WIDE_COPIES)
    return max(MIN_WIDE_ROWS, min(MIN_ROWS, most_values // (groups * max(unknowns, outs))))


def _sampled(place: Site, output: Array, rows: Ints) -> Array:
    # Numbers of a float64 model may be beyond the range of float32.
    return output_rows(place, output, rows).astype(np.promote_types(output.dtype, np.float32))


@dataclass(frozen=True)
class _Copied:
    """Augmented copies of the samples.

    Attributes:
        frontier: Their activations in the cut model.
        targets: Outputs in the original model of the nodes whose rows they add to, by name.
    """

    frontier: Frontier
    targets: dict[str, Target]


@dataclass(frozen=True)
class _Problem:
    """Least-squares problem of one node.

    Attributes:
        x: Inputs in the cut model (groups, rows, inputs * taps).
        y: Wanted outputs (groups, rows, outputs).
        wide_inputs: Inputs in the original model (rows, groups, inputs * taps), only of a node whose channels are
            mixed; None for others.
    """

    x: Floats
    y: Floats
    wide_inputs: Array | None

    @property
    def finite_rows(self) -> Bools:
        """Mask of the rows (rows,) without infinite values and NaN."""
        is_finite = np.isfinite(self.y).all(axis=(0, 2)) & np.isfinite(self.x).all(axis=(0, 2))
        return np.asarray(is_finite)

    def take(self, rows: Bools) -> _Problem:
        """The problem on some of the rows."""
        wide_inputs = None if self.wide_inputs is None else self.wide_inputs[rows]
        return _Problem(self.x[:, rows], self.y[:, rows], wide_inputs)


@dataclass(frozen=True)
class _Layer:
    """A linear node in the cut model.

    Attributes:
        here: The node.
        weight: Its weight as a matrix, times its factor (groups, outputs, inputs, taps).
    """

    here: Site
    weight: Floats


@dataclass(frozen=True)
class _Use:
    """A linear node in the cut model, with its sampled rows.

    Attributes:
        layer: The node.
        rows: Inputs and what its outputs lack at the sampled rows.
        spread: Number, mean and variance of the wanted outputs.
        wide_inputs: Inputs in the original model, only of a node whose channels are mixed; None for others.
    """

    layer: _Layer
    rows: Rows
    spread: Spread
    wide_inputs: Array | None


def _refit(
    cut: _Cut,
    editor: Editor,
    family: Family,
    frontier: Frontier,
    targets: Mapping[str, Target],
    *,
    copies: _Copied | None,
) -> tuple[Fit | None, list[str]]:
    """Refits one weight, for all nodes that share it.

    Args:
        cut: The original model and the kept units.
        editor: The cut model, changed in place.
        family: The nodes in the original model.
        frontier: Activations of the cut model.
        targets: Outputs of the nodes in the original model.
        copies: Augmented copies of the samples, if any.

    Returns:
        A record of the fit, None if there is none, and remarks for the user.
    """
    remarks: list[str] = []
    layers: list[_Layer] = []
    parts: list[Rows] = []
    spreads: list[Spread] = []
    wide_inputs: Array | None = None
    for place in family.uses:
        name = place.node.name
        source = None if name in family.late else frontier
        use = _use(cut, editor, place, source, target=targets[name], remarks=remarks, copies=copies)
        if use is None:
            return None, remarks
        layers.append(use.layer)
        parts.append(use.rows.times(use.layer.here.factor / layers[0].here.factor))
        spreads.append(use.spread)
        wide_inputs = use.wide_inputs
        del use  # memory holds one copy of the rows
    first = layers[0]
    if any(part.count < 2 for part in parts):
        if not family.is_shared:
            editor.add_bias(first.here, parts[0].residual.reshape(-1))
        remarks.append("one row is too few to fit and to judge, so only its bias moves")
        return None, remarks
    has_common_bias = family.is_shared and _has_common_bias(editor, layers)
    own_biases = family.is_shared and not has_common_bias
    means = [part.means for part in parts]
    rows, split = stacked(parts, HELD_OUT, centred=own_biases)
    form, solve, remark = _solver(
        cut,
        family.uses[0],
        rows,
        wide_inputs,
        weight=first.weight,
        split=split,
    )
    if remark:
        remarks.append(remark)
    found = choose_ridge(rows.x, rows.residual, split, solve)
    stored = _as_stored(editor, first, rows, split, found=found)
    if stored is None:
        kind = editor.stored_type(_weight_name(editor, first.here))
        remarks.append(f"fitted weights are out of range for {kind}, so it is not refitted")
        return None, remarks
    found = stored
    scale = pooled_variance(spreads, own_means=own_biases) or 1.0
    before, after = found.errors
    _, count, unknowns = rows.x.shape
    fit = Fit(family.title, form, count, unknowns, found.ridge, before / scale, after / scale)
    improves = after < before
    if improves and found.change is not None:
        _write_weight(editor, first, found.change, for_all=family.is_shared)
    if not own_biases:
        if improves:
            editor.add_bias(first.here, found.shift.reshape(-1), for_all=family.is_shared)
        return fit, remarks
    change = found.change if improves else None
    for layer, (mean_input, mean_residual) in zip(layers, means, strict=True):
        if layer.here.node.name not in family.late:
            shift = best_shift(mean_input, mean_residual, change)
            editor.add_bias(layer.here, shift.reshape(-1))
    return fit, remarks


def _use(
    cut: _Cut,
    editor: Editor,
    place: Site,
    frontier: Frontier | None,
    *,
    target: Target,
    remarks: list[str],
    copies: _Copied | None = None,
) -> _Use | None:
    """A linear node with what its outputs lack at the sampled rows.

    Args:
        cut: The original model and the kept units.
        editor: The cut model.
        place: The node in the original model.
        frontier: Activations of the cut model; None to take the inputs in the original model.
        target: Outputs of the node in the original model.
        remarks: Remarks for the user, extended by those about this node.
        copies: Augmented copies of the samples, if any.

    Returns:
        The use; None if its bias cannot be changed or no row is finite.
    """
    node = editor.nodes[place.node.name]
    current = editor.constant(node.input[place.weight_slot])
    assert current is not None
    here = _in_cut_model(place, node)
    bias = editor.bias(here)
    if bias is None:
        remarks.append("its bias is not one constant per output, so it is not refitted")
        return None
    weight = here.factor * matrix(here, current)
    groups, outs, _, _ = weight.shape
    problem = _problem(cut, place, node, frontier, target, copies=copies)
    finite = problem.finite_rows
    if not finite.all():
        remarks.append(
            f"{int((~finite).sum())} of {finite.size} rows are not finite and not fitted to"
        )
        problem = problem.take(finite)
    if not problem.y.shape[1]:
        return None
    residual = problem.x @ weight.reshape(groups, outs, -1).transpose(0, 2, 1)
    np.subtract(problem.y, residual, out=residual)
    residual -= bias.reshape(groups, 1, outs)
    spread = Spread(
        problem.y.shape[1], problem.y.mean(axis=1).reshape(-1), problem.y.var(axis=1).reshape(-1)
    )
    return _Use(_Layer(here, weight), Rows(problem.x, residual), spread, problem.wide_inputs)


def _has_common_bias(editor: Editor, layers: Sequence[_Layer]) -> bool:
    """Tests for uses of a weight that share their bias too, and with no other node."""
    names = {editor.source(editor.bias_name(layer.here)) for layer in layers}
    readers = len(layers)
    return len(names) == 1 and "" not in names and len(editor.readers_of(names.pop())) == readers


def _weight_name(editor: Editor, here: Site) -> str:
    return str(editor.nodes[here.node.name].input[here.weight_slot])


def _new_weight(editor: Editor, use: _Layer, change: Floats) -> Array:
    """The weight of a node with a change, as its readers will see it once it is stored."""
    name = _weight_name(editor, use.here)
    current = editor.constant(name)
    assert current is not None
    fitted = use.weight + change.transpose(0, 2, 1).reshape(use.weight.shape)
    with np.errstate(over="ignore"):
        value = unmatrix(use.here, fitted / use.here.factor, current)
    return editor.rounded(name, value)


def _write_weight(
    editor: Editor,
    use: _Layer,
    change: Floats,
    for_all: bool,
) -> None:
    node = editor.nodes[use.here.node.name]
    editor.replace(node, use.here.weight_slot, _new_weight(editor, use, change), for_all)


def _as_stored(
    editor: Editor,
    use: _Layer,
    rows: Rows,
    split: int,
    *,
    found: RidgeFit,
) -> RidgeFit | None:
    """A fit with the weights that are stored: half precision rounds the change, to which the bias is fitted again.

    Args:
        editor: The cut model.
        use: The node, the first of those that share the weight.
        rows: Rows of all of them.
        split: Number of rows in front of those held out.
        found: The fit.

    Returns:
        The fit; None if the weights are out of range.
    """
    if found.change is None:
        return found
    value = _new_weight(editor, use, found.change)
    if not np.isfinite(value).all():
        return None
    kind = editor.stored_type(_weight_name(editor, use.here))
    if kind is None or kind.itemsize >= SINGLE_BYTES:
        return found
    rounded = use.here.factor * matrix(use.here, value) - use.weight
    groups, outs, _, _ = rounded.shape
    change = rounded.reshape(groups, outs, -1).transpose(0, 2, 1)
    shift = best_shift(*rows.means, change)
    leading = best_shift(*rows.leading(split).means, change)
    after = remaining_error(rows.x[:, split:], rows.residual[:, split:], change, leading)
    return RidgeFit(change, shift, found.ridge, (found.errors[0], after))


def _shift_bias(
    cut: _Cut,
    editor: Editor,
    place: Site,
    frontier: Frontier,
    target: Target,
) -> None:
    """Refits the bias of a node whose weight was refitted before its input was known."""
    remarks: list[str] = []
    use = _use(cut, editor, place, frontier, target=target, remarks=remarks)
    if use is None or _shares_bias(editor, use.layer):
        return
    split = int(np.ceil((1 - HELD_OUT) * use.rows.count))
    if split == use.rows.count:
        return
    found = choose_ridge(use.rows.x, use.rows.residual, split, None)
    before, after = found.errors
    if after < before:
        editor.add_bias(use.layer.here, found.shift.reshape(-1))


def _shares_bias(editor: Editor, use: _Layer) -> bool:
    """Tests for a node whose bias other nodes read as well."""
    name = editor.bias_name(use.here)
    return bool(name) and len(editor.readers_of(editor.source(name))) > 1


def _in_cut_model(place: Site, node: onnx.NodeProto) -> Site:
    """A linear node with the number of groups that it has after the cut."""
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    attrs = {**place.node.attrs, "group": group}
    groups = int(group) if place.spatial else 1
    return replace(place, node=replace(place.node, attrs=attrs), groups=groups)


def _problem(
    cut: _Cut,
    place: Site,
    node: onnx.NodeProto,
    frontier: Frontier | None,
    target: Target,
    *,
    copies: _Copied | None,
) -> _Problem:
    """Inputs and wanted outputs of a node at the sampled rows.

    Args:
        cut: The original model and the kept units.
        place: The node in the original model.
        node: The node in the cut model.
        frontier: Activations of the cut model; None to take the inputs in the original model.
        target: Outputs in the original model.
        copies: Augmented copies of the samples, if any.
    """
    here = _in_cut_model(place, node)
    kept = output_mask(cut.model, cut.coupling, place, cut.units)
    if frontier is None:
        x = _original_inputs(cut, place, here, target)
        y = np.concatenate(target.values).astype(np.float64)[:, kept]
    else:
        data = node.input[place.slot]
        others = copies.targets.pop(place.node.name, None) if copies is not None else None
        parts = [(frontier, target)]
        if copies is not None and others is not None:
            parts.append((copies.frontier, others))
        x, y = _sampled_problem(here, data, parts, kept)
    groups = len(x)
    y = y.reshape(-1, groups, y.shape[1] // groups).transpose(1, 0, 2)
    is_mixed = bool(target.inputs) and not target.is_late
    wide_inputs = np.concatenate(target.inputs) if is_mixed else None
    return _Problem(x, y, wide_inputs)


def _sampled_problem(
    here: Site,
    data: str,
    parts: Sequence[tuple[Frontier, Target]],
    kept: Bools,
) -> tuple[Floats, Floats]:
    """Inputs of a node in the cut model and wanted outputs at the sampled rows, of the feeds that the frontiers hold.

    Args:
        here: The node in the cut model.
        data: Tensor that it reads there.
        parts: Activations of the cut model with outputs in the original model: of the samples, and of their copies if
            there are any. The rows of every feed are followed by those of its copies: the last rows, which judge a fit,
            are then no copies of rows of the fit.
        kept: Mask of the outputs that the node keeps (outputs,).

    Returns:
        Inputs (groups, rows, inputs * taps) and wanted outputs (rows, kept outputs).
    """
    feeds = len(parts[0][1].rows)
    places = sorted(
        (feed * feeds // len(target.rows), part, feed)
        for part, (_, target) in enumerate(parts)
        for feed in range(len(target.rows))
    )
    counts = [len(parts[part][1].rows[feed]) for _, part, feed in places]
    slots = {(part, feed): slot for slot, (_, part, feed) in enumerate(places)}
    inputs, outputs = _Filled(counts), _Filled(counts)
    for part, (frontier, target) in enumerate(parts):
        _sample(here, data, frontier, target, kept=kept, put=_put(slots, part, inputs, outputs))
    return inputs.values.transpose(1, 0, 2), outputs.values


def _put(
    slots: Mapping[tuple[int, int], int], part: int, inputs: _Filled, outputs: _Filled
) -> Callable[[int, Floats, Floats], None]:
    """Function that puts inputs and outputs of a feed of a part to their places."""

    def put(feed: int, x: Floats, y: Floats) -> None:
        slot = slots[part, feed]
        inputs.put(slot, x)
        outputs.put(slot, y)

    return put


def _sample(
    here: Site,
    data: str,
    frontier: Frontier,
    target: Target,
    *,
    kept: Bools,
    put: Callable[[int, Floats, Floats], None],
) -> None:
    """Gives inputs (rows, groups, inputs * taps) and wanted outputs (rows, kept outputs) of every feed to ``put``."""
    join = target.join

    def take(feed: int, values: Mapping[str, Array]) -> None:
        rows = target.rows[feed]
        wanted = target.values[feed].astype(np.float64)[:, kept]
        if join is not None:
            error = target.joined[feed][:, kept] - output_rows(here, values[join.other], rows)
            wanted += join.correction(error, kept)
        put(feed, data_rows(here, values[data], rows, target.shapes[feed]), wanted)

    frontier.each([data] if join is None else [data, join.other], take)


class _Filled:
    """An array of the rows of several feeds, which come in any order: memory never holds them twice."""

    def __init__(self, counts: Sequence[int]) -> None:
        """Begins empty.

        Args:
            counts: Number of rows of every feed; those of some feeds may never come.
        """
        self._ends = np.cumsum([0, *counts])
        self._is_filled = np.zeros(self._ends[-1], bool)
        self._held: Floats | None = None

    def put(self, slot: int, part: Floats) -> None:
        """Put the rows (rows, ...) of a feed to their place."""
        if self._held is None:
            self._held = np.empty((len(self._is_filled), *part.shape[1:]))
        place = slice(self._ends[slot], self._ends[slot + 1])
        self._held[place] = part
        self._is_filled[place] = True

    @property
    def values(self) -> Floats:
        """The rows that came."""
        assert self._held is not None
        count = int(self._is_filled.sum())
        if self._is_filled[:count].all():
            return self._held[:count]
        return self._held[self._is_filled]


def _original_inputs(
    cut: _Cut,
    place: Site,
    here: Site,
    target: Target,
) -> Floats:
    """Inputs of a node in the original model, without the removed channels (groups, rows, inputs * taps)."""
    inputs = np.concatenate(target.inputs).astype(np.float64)
    _, _, ins, taps = matrix_shape(place, cut.model.constants[place.weight])
    axis = place.data_axis % len(cut.model.shapes[place.data])
    channels = inputs.reshape(len(inputs), place.groups * ins, taps)
    if (place.data, axis) in cut.coupling.axes:
        channels = channels[:, cut.coupling.keep((place.data, axis), cut.units)]
    return channels.reshape(len(inputs), here.groups, -1).transpose(1, 0, 2)


def _solver(
    cut: _Cut,
    place: Site,
    sampled: Rows,
    wide_inputs: Array | None,
    *,
    weight: Floats,
    split: int,
) -> tuple[str, Solve, str]:
    """Chooses the form of a fit: (name for the report, solver for the weights, remark for the user).

    A wide node with channels of several inputs each has fewer unknowns if whole channels are mixed. Any other is solved
    for all its unknowns: in its dual form the system is no larger than the number of rows.
    """
    rows, unknowns = sampled.x.shape[1:]
    if wide_inputs is None:
        remark = ""
        if rows < unknowns:
            remark = f"{rows} rows for {unknowns} unknowns, so more calibration samples would help"
        return "least squares", ridge_regression(sampled.x, sampled.residual, split), remark
    mixing = _channel_mixing(cut, place, wide_inputs, sampled.x, weight)
    too_many = f"{unknowns} unknowns are too many for a Gram matrix"
    return "channel mixing", mixing, f"{too_many}, so removed channels are mixed into kept ones"


def _mixes_channels(cut: _Cut, place: Site, cap: int) -> bool:
    """Tests for a wide node with fewer channels, of several inputs each, than a Gram matrix may have rows.

    All its units have the same number of inputs.
    """
    weight = cut.model.constants[place.weight]
    units = _units_of_inputs(cut, place) if is_wide(place, weight, cap) else None
    if units is None:
        return False
    _, _, ins, taps = matrix_shape(place, weight)
    present, counts = np.unique(units, return_counts=True)
    equal = bool((counts == counts[0]).all())
    return equal and len(present) < ins * taps and len(present) <= GRAM_CAP


def _channel_mixing(
    cut: _Cut,
    place: Site,
    wide_inputs: Array,
    x: Floats,
    weight: Floats,
) -> Solve:
    """Solver for wide nodes that :func:`_mixes_channels` accepts, which expresses removed channels by kept ones.

    With channel blocks z (original, all channels) and z' (cut, kept ones), ``z = z' A`` is fitted by ridge regression
    towards "every kept channel is itself". The weights of a removed channel are then distributed over the kept ones.
    That needs only a Gram matrix of channels by channels.

    Args:
        cut: The original model and the kept units.
        place: The node in the original model.
        wide_inputs: Inputs in the original model (rows, 1, channels * taps).
        x: Inputs in the cut model (1, rows, kept channels * taps).
        weight: Its weights after the cut (1, outputs, kept channels, taps).

    Returns:
        The solver.
    """
    units = _units_of_inputs(cut, place)
    assert units is not None
    present, counts = np.unique(units, return_counts=True)
    _, outs, _, taps = weight.shape
    # A unit may hold several columns of the input; its columns and the taps play the same part.
    block = int(counts[0]) * taps
    columns = np.argsort(units, kind="stable")
    kept_columns = np.argsort(units[cut.units[units]], kind="stable")
    stays = cut.units[present]
    original = wide_inputs.astype(np.float64)[:, 0]
    rows = len(original)

    def blocks(values: Floats, order: Ints, count: int) -> Floats:
        """Values (rows, units, block) with the columns of one unit next to each other."""
        return values.reshape(rows, -1, taps)[:, order].reshape(rows, count, block)

    kept_blocks = blocks(x[0], kept_columns, int(stays.sum()))
    remaining = blocks(original, columns, len(present)).copy()
    remaining[:, stays] -= kept_blocks
    full_weight = matrix(place, cut.model.constants[place.weight])[0] * place.factor
    kept_outputs = output_mask(cut.model, cut.coupling, place, cut.units)
    weight_blocks = full_weight[kept_outputs][:, columns].reshape(outs, len(present), block)

    def solve(count: int, ridge: float) -> Floats:
        a = kept_blocks[:count]
        b = remaining[:count]
        a = a - a.mean(axis=(0, 2), keepdims=True)
        b = b - b.mean(axis=(0, 2), keepdims=True)
        gram = np.einsum("rkt,rlt->kl", a, a, optimize=True)
        cross = np.einsum("rkt,rct->kc", a, b, optimize=True)
        mixing = solve_ridge(gram[None], cross[None], ridge)[0]
        change = np.einsum("kc,oct->okt", mixing, weight_blocks, optimize=True)
        in_order = np.empty((outs, len(kept_columns), taps))
        in_order[:, kept_columns] = change.reshape(outs, len(kept_columns), taps)
        return in_order.reshape(1, outs, -1).transpose(0, 2, 1)

    return solve


def _units_of_inputs(cut: _Cut, place: Site) -> Ints | None:
    """Unit of every input channel of a node (channels,).

    None if some have no unit, the node has several groups, or the shape of its input is unknown.
    """
    shape = cut.model.shapes.get(place.data)
    if shape is None:
        return None
    axis = place.data_axis % len(shape)
    units = cut.coupling.axes.get((place.data, axis))
    if units is None or place.groups > 1 or (units < 0).any():
        return None
    return units
