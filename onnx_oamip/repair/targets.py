"""Wanted outputs of a refit: outputs of the linear nodes of the original model at sampled rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from onnx_oamip.core.records import Array, Bools, Ints, Model
from onnx_oamip.data.feeds import DEFAULT_MEMORY_LIMIT
from onnx_oamip.graph.im2col import data_rows, output_rows, row_axes
from onnx_oamip.graph.linear_layers import matrix_shape
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Slicer, stream
from onnx_oamip.objective.position_weights import PositionWeights
from onnx_oamip.repair.cut_model import Cut
from onnx_oamip.repair.residual_joins import Join, join
from onnx_oamip.repair.row_sampling import MAX_ROWS, RowChoice, row_choice, row_limit, shared_rows


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
        samples=sum(max((len(v) for v in feed.values() if v.ndim), default=1) for feed in feeds),
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


def of_kept_rows(cut: Cut, place: Site, target: Target) -> Target:
    """Leave out the rows that the cut model lacks, and number the others as they are there.

    The rows of a layer may run over channels that another layer makes: an MLP-Mixer multiplies along the positions of
    each channel.

    Args:
        cut: The original model and the kept units.
        place: A linear node in the original model.
        target: Its outputs there.

    Returns:
        The samples at the rows that are left.
    """
    output = place.node.outputs[0]
    masks = {
        axis: cut.coupling.keep((output, axis), cut.units)
        for axis in range(len(cut.model.shapes.get(output, ())))
        if (output, axis) in cut.coupling.axes
    }
    masks.pop(place.output_axis % max(len(cut.model.shapes.get(output, ())), 1), None)
    if all(mask.all() for mask in masks.values()):
        return target
    rows, stays = zip(
        *(_kept_rows(place, masks, *feed) for feed in zip(target.shapes, target.rows, strict=True)),
        strict=True,
    )

    def left(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(array[stay] for array, stay in zip(arrays, stays, strict=False))

    return replace(
        target,
        rows=rows,
        values=left(target.values),
        inputs=left(target.inputs),
        joined=left(target.joined),
    )


def _kept_rows(
    place: Site, masks: Mapping[int, Bools], shape: tuple[int, ...], rows: Ints
) -> tuple[Ints, Bools]:
    """Numbers of the rows in the cut model, and which of the rows (rows,) these are."""
    channel = place.output_axis % len(shape)
    axes = [axis for axis in range(len(shape)) if axis != channel]
    places = list(np.unravel_index(rows, row_axes(place, shape)))
    lengths = list(row_axes(place, shape))
    stays = np.ones(len(rows), bool)
    for i, axis in enumerate(axes):
        mask = masks.get(axis)
        if mask is not None:
            stays &= mask[places[i]]
            places[i] = np.cumsum(mask)[places[i]] - 1
            lengths[i] = int(mask.sum())
    left = [place_of[stays] for place_of in places]
    return np.ravel_multi_index(left, lengths), stays


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
        choose: RowChoice,
        needs_inputs: bool,
        join: Join | None,
    ) -> None:
        """Begins with no feed.

        Args:
            place: The node.
            choose: Chooses the rows of a feed.
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
        rows = self._choose(len(found["rows"]), row_axes(self.place, value.shape))
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
    samples: int,
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
    shapes = [matrix_shape(place, model.constants[place.weight]) for place in places]
    limits = np.asarray([row_limit(shape, cap, memory_limit) for shape in shapes])
    limits = shared_rows(limits, *_held(model, places, samples), memory_limit=memory_limit)
    generators = rng.spawn(len(places))
    for place, limit, own_rng in zip(places, limits.tolist(), generators, strict=True):
        name = place.node.name
        count = uses.get(name, 1)
        joint = None if count > 1 else join(model, place)
        if joint is not None:
            before_sum = slicer.needed([joint.other], ())
            if any(slicer.nodes[i].name in waiting for i in before_sum):
                joint = None  # the other branch is refitted later, and will compensate the error of this one
        waiting.discard(name)
        rows_per_feed = -(-limit // (batches * count))
        sampler = _Sampler(
            place,
            choose=row_choice(rows_per_feed, own_rng, weights),
            needs_inputs=name in needs_inputs,
            join=joint,
        )
        result.append(sampler)
    return result


def _held(model: Model, places: Sequence[Site], samples: int) -> tuple[Ints, Ints]:
    """Rows that all samples have at a node (nodes,), and values that are held of a row (nodes,).

    A row has the outputs of the node, and as many of the other branch where it reaches a residual sum.
    """
    rows, values = [], []
    for place in places:
        shape = model.shapes.get(place.node.outputs[0])
        of_batch = MAX_ROWS if shape is None else math.prod(row_axes(place, shape))
        rows.append(of_batch * samples // max(model.batch, 1))
        groups, outs, _, _ = matrix_shape(place, model.constants[place.weight])
        values.append(2 * groups * outs)
    return np.asarray(rows, np.int64), np.asarray(values, np.int64)


def _sampled(place: Site, output: Array, rows: Ints) -> Array:
    # Numbers of a float64 model may be beyond the range of float32.
    return output_rows(place, output, rows).astype(np.promote_types(output.dtype, np.float32))
