"""Removed constants: folds the constant outputs of removed units into the biases of their consumers.

In OAMIP as published, a pruned unit loses its weights but keeps its bias. It still emits a constant, relu(b), which
normalisation and pooling pass on. Removing the unit would lose that constant; here it is added to the biases of the
consumers instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from ml_dtypes import finfo
from onnx import helper

from onnx_oamip.core.records import (
    Array,
    Axis,
    Bools,
    Coupling,
    Floats,
    Model,
    Moments,
    Node,
    Pruned,
    Statistics,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.ops import lookup
from onnx_oamip.graph.outputs import is_float
from onnx_oamip.graph.runtime import Session
from onnx_oamip.repair.mean_folding import fold_means
from onnx_oamip.statistics.requests import MOMENTS

SAMPLES = 16
"""Number of samples that are run: a constant would need one, and a channel that varies gets its mean over these."""
RELATIVE_SPREAD = 1e-5
"""Spread of a channel, relative to the largest value of the removed channels of its tensor, up to which it is constant.

Equal sums at several places differ in their last bits, and by no more: a normalisation of values far above its epsilon
gives differences of 1e-4, which are not constant. Types with fewer digits may differ by two of their steps.
"""


def fold_constants(
    model: Model,
    coupling: Coupling,
    units: Bools,
    raw: onnx.ModelProto,
    *,
    samples: Samples,
    device: str,
) -> Pruned:
    """Adds the constant outputs of removed units to the biases of their consumers.

    All removed units lose their weights at once in a copy of the original, which is run on a few samples. The values
    that every consumer receives on the removed channels are multiplied with its weights and added to its bias.

    A channel that is no constant, because a residual branch feeds it too or because zeros were averaged in at a border,
    is folded by its mean and noted; so is one that no linear node computes, for it had no weights to lose. Also noted
    are convolutions that pad with zeros (exact away from the border) and transposed ones (exact on average). Without a
    note the result equals the copy.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        raw: The cut model.
        samples: Calibration samples.
        device: ``cpu`` or ``cuda``.

    Returns:
        The changed model, with notes.

    Raises:
        ModelError: The copy cannot be run.
    """
    consumers = [c for c in coupling.consumers if not coupling.keep((c.data, c.axis), units).all()]
    copy = zeroed(model, coupling, units)
    axes = sorted({(c.data, c.axis) for c in consumers})
    levels = _levels(model, copy, axes, samples, device)
    without_weights = _units_without_weights(model, coupling) & ~units
    nodes = {node.name: node for node in model.nodes}
    notes = []
    uneven = 0
    for consumer in consumers:
        key = (consumer.data, consumer.axis)
        level = levels[key]
        removed = ~coupling.keep(key, units)
        scale = (np.abs(level.mean) + level.spread)[removed].max()
        if not scale:
            continue
        node = nodes[consumer.node]
        tolerance = _relative_spread(model.dtypes[consumer.data]) * scale
        varying = int((level.spread[removed] > tolerance).sum())
        # A channel without weights may look constant on these samples only, in saturation for example.
        not_computed = int((~coupling.keep(key, ~without_weights)).sum())
        if consumer.weight is None or consumer.weight not in model.constants:
            notes.append(
                f"{node}: it has no constant weights, so the constants of what was removed are not added"
            )
        elif not_computed:
            notes.append(
                f"{node}: {not_computed} removed channels come from no layer with weights; their mean is added"
            )
        elif varying:
            notes.append(
                f"{node}: {varying} removed channels vary though their weights are zero; their mean is added"
            )
        else:
            uneven += _is_position_dependent(node, model.constants[consumer.weight])
    if uneven:
        notes.append(
            f"{uneven} of the convolutions that read removed units pad with zeros or spread their input: there the "
            "folded constants are exact only away from the border, or on average"
        )
    statistics = _as_statistics(levels, device)
    folded = fold_means(model, coupling, units, statistics, raw)
    return Pruned(raw, folded.proto, (*notes, *folded.notes))


def _relative_spread(dtype: np.dtype[Any]) -> float:
    if not is_float(dtype):
        return RELATIVE_SPREAD
    step = float(finfo(dtype).eps)  # type: ignore[no-untyped-call]
    return max(RELATIVE_SPREAD, 2 * step)


def _is_position_dependent(node: Node, weight: Array) -> bool:
    """Tests for a linear node that turns a constant input into different values at different positions."""
    spec = lookup(node.domain, node.op, node.version)
    if spec is None or spec.linear is None:
        return False
    return spec.linear.position_dependent(node, weight.shape[2:])


def zeroed(model: Model, coupling: Coupling, units: Bools) -> onnx.ModelProto:
    """Sets the weights of removed units to zero in the original graph, and keeps their biases.

    This is pruning as published: the graph keeps all its channels. Weights that only read removed units are not
    changed.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).

    Returns:
        The changed graph.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    read = {(c.node, c.weight, c.weight_axis) for c in coupling.consumers}
    for node in model.nodes:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.linear is None:
            continue
        for slot, name in enumerate(node.inputs[:2]):  # the third input is the bias
            if name not in model.constants:
                continue
            value = model.constants[name]
            for axis in range(value.ndim):
                if (name, axis) in coupling.axes and (node.name, name, axis) not in read:
                    shape = [1] * value.ndim
                    shape[axis] = -1
                    keep = coupling.keep((name, axis), units).reshape(shape)
                    value = np.where(keep, value, np.zeros((), value.dtype))
            if value is not model.constants[name]:
                editor.replace(editor.nodes[node.name], slot, np.ascontiguousarray(value))
    return proto


def _units_without_weights(model: Model, coupling: Coupling) -> Bools:
    """Mask of the units (n_units,) that a node other than a linear one creates, as a gain creates channels."""
    read = {(c.weight, c.weight_axis) for c in coupling.consumers}

    def carried(names: Iterable[str]) -> Bools:
        """Units with a channel in any of these tensors."""
        # Pinned channels have the unit -1: the last entry.
        mask = np.zeros(coupling.n_units + 1, bool)
        for name in names:
            for axis in range(len(model.shapes.get(name, ()))):
                if (name, axis) in coupling.axes and (name, axis) not in read:
                    mask[coupling.axes[name, axis]] = True
        return mask[:-1]

    result = np.zeros(coupling.n_units, bool)
    for node in model.nodes:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.linear is None:
            activations = [name for name in node.inputs if name not in model.constants]
            result |= carried(node.outputs) & ~carried(activations)
    return result


@dataclass(frozen=True)
class _Level:
    """Values of the channels of an axis over the samples.

    Attributes:
        mean: Mean of every channel (channels,).
        spread: Largest less smallest value of every channel (channels,).
        count: Number of samples.
    """

    mean: Floats
    spread: Floats
    count: int


def _levels(
    model: Model,
    proto: onnx.ModelProto,
    axes: list[Axis],
    samples: Samples,
    device: str,
) -> dict[Axis, _Level]:
    """Runs a model on a few samples, one at a time so that memory holds whole activations of one sample only.

    Args:
        model: The original model, for element types.
        proto: The model to run.
        axes: Axes whose channels are measured.
        samples: Calibration samples.
        device: ``cpu`` or ``cuda``.
    """
    if not axes:
        return {}
    names = sorted({name for name, _ in axes})
    with_outputs = onnx.ModelProto()
    with_outputs.CopyFrom(proto)
    del with_outputs.graph.output[:]
    for name in names:
        element_type = helper.np_dtype_to_tensor_dtype(model.dtypes[name])
        with_outputs.graph.output.append(helper.make_tensor_value_info(name, element_type, None))
    session = Session(with_outputs, device, what="the model with zero weights")
    few = samples.take(np.arange(min(samples.count, max(SAMPLES, samples.fixed_batch or 1))))
    measured: dict[Axis, list[Floats]] = {key: [] for key in axes}
    count = 0
    for index, feed in few.batches(1):
        values = dict(zip(names, session.run(feed, names), strict=True))
        count += len(index)
        for name, axis in axes:
            # Sums of equal float32 values drift: they are taken in float64.
            channels = np.moveaxis(values[name], axis, 0).astype(np.float64)
            channels = channels.reshape(len(channels), -1)
            summary = [channels.mean(axis=1), channels.min(axis=1), channels.max(axis=1)]
            measured[name, axis].append(np.stack(summary))
    result = {}
    for key, parts in measured.items():
        mean, low, high = np.stack(parts, axis=1)
        spread = high.max(axis=0) - low.min(axis=0)
        result[key] = _Level(mean.mean(axis=0), spread, count)
    return result


def _as_statistics(levels: dict[Axis, _Level], device: str) -> Statistics:
    """The measured constants as moments: for a consumer, a constant is a channel without variance."""
    moments = {}
    for key, level in levels.items():
        moments[key] = Moments(level.mean, np.square(level.mean), level.count)
    used = max((level.count for level in levels.values()), default=0)
    return Statistics({MOMENTS: moments}, used, device)
