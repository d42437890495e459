"""Activations pooled over positions: one number per sample and channel, at both ends of every linear consumer.

The mean over positions is taken inside the graph, so that (samples, channels) leave the device instead of maps. Rows
are the same samples in the same order for every tensor, which dependence between two layers relies on. A node's output
is read behind the batch normalisation or the constant bias that alone follows it: the folded layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Axis,
    Coupling,
    Ints,
    Model,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.overflow import refuse
from onnx_oamip.graph import chains
from onnx_oamip.graph.linear_layers import linear_consumers
from onnx_oamip.graph.ops import Trait, build, domains, has, taps
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.runtime import Session
from onnx_oamip.published.dependence.requests import Pooled

SAMPLES = 2000
"""Most samples that are pooled: estimators of dependence need that many rows, and memory grows with them."""


@dataclass(frozen=True)
class _Pools:
    """Everything that is pooled.

    Attributes:
        axes: Channel axes of activations.
        windows: Convolutions by node whose taps are pooled one by one.
    """

    axes: tuple[Axis, ...]
    windows: Mapping[str, Site]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs that hold them, in the order of ``tensors``."""
        pools = [f"oamip_pool_{i}" for i in range(len(self.axes))]
        return [*pools, *(f"oamip_taps_{node}" for node in self.windows)]

    @property
    def tensors(self) -> list[str]:
        """The tensors that they are pooled from."""
        activations = [tensor for tensor, _ in self.axes]
        return [*activations, *(layer.data for layer in self.windows.values())]


def collect(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    *,
    seed: int = 0,
    batch_size: int = 32,
    most: int = SAMPLES,
    by_tap: bool = False,
    progress: Progress | None = None,
) -> Pooled:
    """Pool the activations of some samples, as many of every class if there are labels.

    Args:
        model: The model.
        coupling: Its consumers.
        samples: Calibration samples.
        device: Device that the model runs on.
        seed: Seed of the choice of samples.
        batch_size: Samples in one run.
        most: Upper bound on the number of samples.
        by_tap: Also pool the input of every tap of a convolution's kernel. The node's pooled output follows from it for
            any weights. Left out where it equals the pooled activation.
        progress: Callback ``(stage, done, total)``.

    Returns:
        The pooled activations.

    Raises:
        DataError: An activation is not finite, or the samples have unequal shapes and kernels are read tap by tap.
    """
    chosen = samples.take(_choose(samples, most, seed))
    rows = chosen.usable()
    targets = _targets(model, coupling, chosen, by_tap)
    if not targets.axes:
        return Pooled({}, {}, chosen.classes, rows)
    if targets.windows and samples.unequal:
        raise DataError(
            f"{samples.source} holds samples of unequal shapes, and `limits` reads convolutions at equal positions; "
            "pad the samples to one length, or leave `limits` out."
        )

    instrumented = _instrument(model, targets)
    session = Session(instrumented, device, what="the model with its pooled activations")
    step = batch_size
    if batch_size > 1 and _must_run_alone(model, chosen, targets.axes, session):
        step = 1
    values, by_window = _arrays(model, targets, rows)
    arrays = (*values.values(), *by_window.values())
    for index, feed in chosen.batches(step):
        outputs = session.run(feed, targets.outputs)
        for array, output in zip(arrays, outputs, strict=True):
            array[index] = _mean_by_sample(output, len(index), array.shape[1:])
        for tensor, output in zip(targets.tensors, outputs, strict=True):
            if not np.isfinite(output).all():
                refuse(model, samples, tensor, device=device, batch_size=batch_size)
        if progress:
            progress("pool", int(index[-1]) + 1, rows)
    if chosen.classes is None:
        labels = None
    else:
        labels = chosen.classes[:rows]
    return Pooled(values, by_window, labels, rows)


def outlet(model: Model, layer: Site) -> Axis:
    """Find the axis that holds the children of a layer, behind the nodes that can be folded into it.

    Args:
        model: The model.
        layer: A linear node.

    Returns:
        Tensor and axis: the node's output, or that of the last node that is folded into it.
    """
    name = layer.node.outputs[0]
    shape = model.shapes[name]
    axis = layer.output_axis % len(shape)
    for tensor, node in chains.of_model(model).behind(name):
        constants = [model.constants.get(i) for i in node.inputs if i and i != tensor]
        per_channel = all(_is_per_channel(value, shape[axis]) for value in constants)
        folds = has(node, Trait.CHANNEL_AFFINE) and per_channel and bool(constants)
        if not folds or model.shapes.get(node.outputs[0]) != shape:
            break
        name = node.outputs[0]
    return name, axis


def _is_per_channel(value: Array | None, channels: int) -> bool:
    """True for a finite constant with one value, or one per channel."""
    if value is None or value.size not in (1, channels):
        return False
    return bool(np.isfinite(value).all())


def _choose(samples: Samples, most: int, seed: int) -> Ints:
    """Indices of the samples, ascending: all, or a seeded choice with equal parts of the classes."""
    if samples.count <= most:
        return np.arange(samples.count, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(samples.count)
    if samples.classes is not None:
        classes = samples.classes[order]
        by_class = np.argsort(classes, kind="stable")
        first_of_class = np.searchsorted(classes[by_class], classes)
        rank = np.empty(len(order), np.int64)
        rank[by_class] = np.arange(len(order))
        # The first of every class, then the second, and so on.
        order = order[np.argsort(rank - first_of_class, kind="stable")]
    count = max(most, samples.fixed_batch or 1)
    return np.sort(order[:count]).astype(np.int64)


def _targets(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    by_tap: bool,
) -> _Pools:
    layers = linear_consumers(model, coupling)
    ends: list[Axis] = []
    for consumer, layer in layers:
        ends += [(consumer.data, consumer.axis), outlet(model, layer)]
    if samples.whole:
        samples_per_feed = 1
    else:
        samples_per_feed = samples.fixed_batch or 1
    axes = []
    for tensor, axis in dict.fromkeys(ends):
        # Several samples in one fixed feed can be separated along axis 0 only.
        separable = axis > 0 and model.shapes[tensor][0] % samples_per_feed == 0
        if samples_per_feed == 1 or separable:
            axes.append((tensor, axis))
    windows = {}
    for _, layer in layers:
        if by_tap and (layer.data, 1) in axes and _has_windows(model, layer):
            windows[layer.node.name] = layer
    return _Pools(tuple(axes), windows)


def _has_windows(model: Model, layer: Site) -> bool:
    """True for a convolution whose mean output does not follow from its mean input pixel."""
    if not layer.spatial:
        return False
    before, after = _spatial_shapes(model, layer)
    taps = int(np.prod(layer.kernel))
    return before != after or taps > 1


def _spatial_shapes(model: Model, layer: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spatial axes of the input and of the output of a convolution."""
    output = layer.node.outputs[0]
    return model.shapes[layer.data][2:], model.shapes[output][2:]


def _arrays(
    model: Model,
    targets: _Pools,
    rows: int,
) -> tuple[dict[Axis, Array], dict[str, Array]]:
    """Empty arrays for the rows of all samples: by axis, and by convolution."""
    values: dict[Axis, Array] = {}
    for tensor, axis in targets.axes:
        channels = model.shapes[tensor][axis]
        values[tensor, axis] = np.empty((rows, channels), np.float32)
    by_window: dict[str, Array] = {}
    for node, layer in targets.windows.items():
        channels = model.shapes[layer.data][1]
        count = int(np.prod(layer.kernel))
        by_window[node] = np.empty((rows, channels, count), np.float32)
    return values, by_window


def _instrument(model: Model, targets: _Pools) -> onnx.ModelProto:
    """The model with two kinds of outputs: means over all axes but axis 0 and the channels, and the inputs of taps."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    opset = domains.opset(proto)
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

    for i, (tensor, axis) in enumerate(targets.axes):
        name = f"oamip_pool_{i}"
        others = [a for a in range(1, len(model.shapes[tensor])) if a != axis]
        build.reduce_mean(graph, floating(tensor), name, axes=others, opset=opset)
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    for node, layer in targets.windows.items():
        name = f"oamip_taps_{node}"
        flat = constant(f"{name}_flat", np.asarray([0, 0, -1], np.int64))
        frequencies = constant(f"{name}_reads", _read_frequencies(model, layer))
        graph.node.append(build.reshape(floating(layer.data), flat, f"{name}_pixels"))
        graph.node.append(build.matmul(f"{name}_pixels", frequencies, name))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return proto


def _read_frequencies(model: Model, layer: Site) -> Array:
    """(pixels, taps) float32: the share of output positions at which a tap reads a pixel."""
    before, after = _spatial_shapes(model, layer)
    positions = np.arange(int(np.prod(after)), dtype=np.int64)
    index = taps(layer.node, layer.kernel, before=before, after=after, positions=positions)
    pixels = int(np.prod(before))
    count = index.shape[1]
    code = index * count + np.arange(count)
    # A tap outside the image, in the padding, reads a zero.
    inside = code[index >= 0]
    times = np.bincount(inside, minlength=pixels * count).reshape(pixels, count)
    return (times / len(positions)).astype(np.float32)


def _must_run_alone(
    model: Model,
    samples: Samples,
    axes: Sequence[Axis],
    session: Session,
) -> bool:
    """True if samples must run one by one, because axis 0 of a tensor does not count samples."""
    if samples.whole or samples.fixed_batch or samples.count < 2:
        return False
    for tensor, axis in axes:
        if axis == 0 or len(model.shapes[tensor]) < 2:
            return True
    # Two samples at once: a tensor that does not grow with them mixes samples.
    index, feed = next(samples.batches(2))
    outputs = session.run(feed, [f"oamip_pool_{i}" for i in range(len(axes))])
    for (tensor, _), output in zip(axes, outputs, strict=True):
        expected = model.shapes[tensor][0] * len(index) // model.batch
        if len(output) != expected:
            return True
    return False


def _mean_by_sample(value: Array, count: int, shape: tuple[int, ...]) -> Array:
    """(count, *shape): the mean over all leading indices that belong to one sample."""
    by_sample = value.reshape(count, -1, *shape)
    return np.asarray(by_sample.mean(axis=1))
