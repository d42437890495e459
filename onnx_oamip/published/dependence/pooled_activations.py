"""Activations pooled over space: one number for every sample and channel, at both ends of every linear consumer.

The mean over positions is taken inside the graph, so that (samples, channels) leave the device instead of maps. Rows
are the same samples in the same order for every tensor, which dependence between two layers rests on. Behind a node
the tensor is read after a batch normalisation or a constant bias that alone follows it: the folded layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scipy.sparse import csr_array

from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Axis,
    Consumer,
    Coupling,
    Floats,
    Ints,
    Model,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import chains
from onnx_oamip.graph.linear_layers import linear_consumers, matrix
from onnx_oamip.graph.ops import Trait, build, has, taps
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.runtime import Session
from onnx_oamip.published.dependence.requests import Pooled
from onnx_oamip.statistics.overflow import refuse

SAMPLES = 2000
"""Most samples that are pooled: estimators of dependence need that many rows, and memory grows with them."""


@dataclass(frozen=True)
class Pair:
    """One block of one linear consumer: the channels that it reads (parents) and gives (children).

    ``parents`` (samples, p) and ``children`` (samples, c) are pooled activations, float32; columns of one unit (a
    flattened map) are averaged into one parent. ``weight`` (c, p): mean absolute weight. ``parent_units`` (p,) and
    ``child_units`` (c,) are -1 for channels that belong to no unit.
    """

    consumer: Consumer
    block: int
    parents: Array
    children: Array
    weight: Floats
    parent_units: Ints
    child_units: Ints


def outlet(model: Model, place: Site) -> Axis:
    """The (tensor, axis) that holds the children: the node's output, or that of what is folded into it."""
    name = place.node.outputs[0]
    shape = model.shapes[name]
    axis = place.output_axis % len(shape)
    for tensor, node in chains.of_model(model).behind(name):
        others = [model.constants.get(i) for i in node.inputs if i and i != tensor]
        per_channel = all(
            o is not None and o.size in (1, shape[axis]) and np.isfinite(o).all() for o in others
        )
        folds = has(node, Trait.CHANNEL_AFFINE) and per_channel and bool(others)
        if not folds or model.shapes.get(node.outputs[0]) != shape:
            break
        name = node.outputs[0]
    return name, axis


def collect(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    seed: int = 0,
    batch_size: int = 32,
    most: int = SAMPLES,
    by_tap: bool = False,
    progress: Progress | None = None,
) -> Pooled:
    """Pooled activations of at most ``most`` samples, as many of every class as there are labels for.

    ``by_tap``: also what every tap of a convolution's kernel reads, pooled, from which the node's pooled output follows
    for any weights; left out where it is the pooled activation itself. Raises DataError where an activation is not
    finite.
    """
    chosen = _choose(samples, most, seed)
    few = samples.take(chosen)
    places = linear_consumers(model, coupling)
    ends = (axis for c, p in places for axis in ((c.data, c.axis), outlet(model, p)))
    held = 1 if few.whole else few.fixed_batch or 1
    # Several samples in one fixed feed are told apart along axis 0 only.
    wanted = [
        a
        for a in dict.fromkeys(ends)
        if held == 1 or (a[1] > 0 and model.shapes[a[0]][0] % held == 0)
    ]
    windows = {
        p.node.name: p
        for _, p in places
        if by_tap and (p.data, 1) in wanted and _looks_around(model, p)
    }
    if not wanted:
        return Pooled({}, {}, few.labels, few.usable())
    session = Session(
        _instrument(model, wanted, windows), device, what="the model with its pooled activations"
    )
    step = 1 if _alone(model, few, wanted, batch_size, session) else batch_size
    rows = few.usable()
    values = {axis: np.empty((rows, model.shapes[axis[0]][axis[1]]), np.float32) for axis in wanted}
    read = {
        n: np.empty((rows, model.shapes[p.data][1], int(np.prod(p.kernel))), np.float32)
        for n, p in windows.items()
    }
    names = [
        *(f"oamip_pool_{i}" for i in range(len(wanted))),
        *(f"oamip_taps_{n}" for n in windows),
    ]
    for index, feed in few.batches(step):
        found = session.run(feed, names)
        for target, value in zip((*values.values(), *read.values()), found, strict=True):
            target[index] = _by_sample(value, len(index), target.shape[1:])
        tensors = [*(tensor for tensor, _ in wanted), *(place.data for place in windows.values())]
        for tensor, value in zip(tensors, found, strict=True):
            if not np.isfinite(value).all():
                refuse(model, samples, tensor, device=device, batch_size=batch_size)
        if progress:
            progress("pool", int(index[-1]) + 1, rows)
    labels = None if few.labels is None or few.labels.ndim != 1 else few.labels[:rows]
    return Pooled(values, read, labels, rows)


def _looks_around(model: Model, place: Site) -> bool:
    """A convolution that does not read every pixel once: its mean output does not follow from the mean pixel."""
    moved = model.shapes[place.data][2:] != model.shapes[place.node.outputs[0]][2:]
    return place.spatial and (moved or int(np.prod(place.kernel)) > 1)


def _choose(samples: Samples, most: int, seed: int) -> Ints:
    """Indices of the samples, ascending: all, or a seeded choice with equal parts of the classes."""
    if samples.count <= most:
        return np.arange(samples.count, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(samples.count)
    if samples.labels is not None and samples.labels.ndim == 1:
        kinds = samples.labels[order]
        by_kind = np.argsort(kinds, kind="stable")
        first = np.searchsorted(kinds[by_kind], kinds)
        rank = np.empty(len(order), np.int64)
        rank[by_kind] = np.arange(len(order))
        order = order[
            np.argsort(rank - first, kind="stable")
        ]  # the first of every class, then the second, ...
    held = max(most, samples.fixed_batch or 1)
    return np.sort(order[:held]).astype(np.int64)


def _instrument(
    model: Model, wanted: Sequence[Axis], windows: Mapping[str, Site]
) -> onnx.ModelProto:
    """The model with, per axis, the mean over all axes but it and axis 0; and what taps read, pooled."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    del graph.output[:]
    cast: dict[str, str] = {}

    def floating(tensor: str) -> str:
        if tensor not in cast:
            cast[tensor] = f"oamip_pooling_{len(cast)}"
            graph.node.append(build.to_float(tensor, cast[tensor]))
        return cast[tensor]

    def constant(name: str, value: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    for i, (tensor, axis) in enumerate(wanted):
        name = f"oamip_pool_{i}"
        axes = [a for a in range(1, len(model.shapes[tensor])) if a != axis]
        build.reduce_mean(graph, floating(tensor), name, axes=axes, opset=opset)
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    for node, place in windows.items():
        name = f"oamip_taps_{node}"
        flat = constant(f"{name}_flat", np.asarray([0, 0, -1], np.int64))
        reads = constant(f"{name}_reads", _reads(model, place))
        graph.node.append(build.reshape(floating(place.data), flat, f"{name}_pixels"))
        graph.node.append(build.matmul(f"{name}_pixels", reads, name))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return proto


def _reads(model: Model, place: Site) -> Array:
    """(pixels, taps) float32: the share of output positions at which a tap reads a pixel."""
    before, after = model.shapes[place.data][2:], model.shapes[place.node.outputs[0]][2:]
    positions = np.arange(int(np.prod(after)), dtype=np.int64)
    index = taps(place.node, place.kernel, before=before, after=after, positions=positions)
    pixels, count = int(np.prod(before)), index.shape[1]
    code = index * count + np.arange(count)
    seen = np.bincount(code[index >= 0], minlength=pixels * count).reshape(pixels, count)
    return (seen / len(positions)).astype(np.float32)


def _alone(
    model: Model, few: Samples, wanted: Sequence[Axis], batch_size: int, session: Session
) -> bool:
    """Whether samples must run one by one: where a tensor does not count samples along axis 0."""
    if few.whole or few.fixed_batch or few.count < 2:
        return False
    if any(axis == 0 or len(model.shapes[tensor]) < 2 for tensor, axis in wanted):
        return True
    index, feed = next(few.batches(min(2, batch_size)))
    found = session.run(feed, [f"oamip_pool_{i}" for i in range(len(wanted))])
    lengths = [model.shapes[tensor][0] * len(index) // model.batch for tensor, _ in wanted]
    return any(len(value) != length for value, length in zip(found, lengths, strict=True))


def _by_sample(value: Array, count: int, shape: tuple[int, ...]) -> Array:
    """(count, *shape): what belongs to one sample, along the leading axes, averaged."""
    return np.asarray(value.reshape(count, -1, *shape).mean(axis=1))


def pairs(model: Model, coupling: Coupling, pooled: Pooled) -> Iterator[Pair]:
    """All pairs of layers, one a block of every linear consumer, in graph order."""
    for consumer, place in linear_consumers(model, coupling):
        weight = np.abs(matrix(place, model.constants[place.weight])).mean(
            axis=3
        )  # (groups, outputs, inputs)
        groups, outs, ins = weight.shape
        labels = coupling.axes[consumer.data, consumer.axis]
        end = outlet(model, place)
        if (consumer.data, consumer.axis) not in pooled.values or end not in pooled.values:
            continue
        made = coupling.axes.get(end, np.full(groups * outs, -1, np.int64))
        read, given = pooled.values[consumer.data, consumer.axis], pooled.values[end]
        for block in range(groups):
            here, there = (
                slice(block * ins, (block + 1) * ins),
                slice(block * outs, (block + 1) * outs),
            )
            units, mean = _parents(labels[here])
            single = (
                mean.shape[0] == mean.shape[1] and (mean.indices == np.arange(len(units))).all()
            )
            parents = read[:, here] if single else read[:, here] @ mean.astype(np.float32)
            yield Pair(
                consumer, block, parents, given[:, there], weight[block] @ mean, units, made[there]
            )


def _parents(labels: Ints) -> tuple[Ints, csr_array]:
    """(unit of every parent, matrix (columns, parents) that averages columns); pinned columns stand for themselves."""
    free = labels >= 0
    top = int(labels.max(initial=0)) + 1
    ids = np.where(free, labels, top + np.arange(len(labels)))
    found, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    mean = csr_array(
        (1.0 / counts[inverse], (np.arange(len(labels)), inverse)), shape=(len(labels), len(found))
    )
    return np.where(found < top, found, -1).astype(np.int64), mean


def standardise(values: Array) -> Floats:
    """Columns of mean 0 and variance 1, float64; a constant column becomes zeros."""
    values = values.astype(np.float64)
    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    still = spread <= 1e-6 * (np.abs(values).max(axis=0, initial=0.0) + 1e-30)
    return np.asarray(np.where(still, 0.0, centred / np.where(still, 1.0, spread)))
