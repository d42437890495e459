"""What a removed unit still says when its weights are zero: a constant, folded into the units that read it.

In the published OAMIP pruning a pruned unit loses the weights that make it and keeps its bias, so that it still emits
relu(b), carried on through normalisation and pooling. A removed unit's constant is folded into its consumers, not left
alive and not lost.
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
    Axis,
    Bools,
    Coupling,
    Floats,
    Model,
    Moments,
    Pruned,
    Statistics,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.ops import lookup
from onnx_oamip.graph.outputs import is_float
from onnx_oamip.graph.runtime import Session
from onnx_oamip.repair.least_squares import fold_means
from onnx_oamip.statistics.requests import MOMENTS

SAMPLES = 16
"""Samples that are looked at: what is constant needs no more than one, and what is not gets its mean over these."""
VARIES = 1e-5
"""Spread of a channel, over the largest value of its tensor's removed channels, above which it is no constant.

Equal sums at several places differ in their last bits, and by no more: what a normalisation makes of values far above
its epsilon differs by 1e-4 and is none. Types with fewer digits may differ by two of their steps.
"""


def fold_constants(
    model: Model,
    coupling: Coupling,
    units: Bools,
    samples: Samples,
    device: str,
    raw: onnx.ModelProto,
) -> Pruned:
    """The cut model ``raw`` with what the removed units emit on zero weights in their consumers' biases, and notes.

    ``units`` (n_units,) says which units stay. All others lose their weights at once in a copy of the original, which
    runs on a few of ``samples``; what every consumer then receives on the removed channels goes, times its weights,
    into its bias. A channel that is no constant, because a residual branch feeds it too or because zeros were averaged
    in at a border, is folded by its mean and noted; so is one that no linear node makes, for it had no weights to lose.
    Noted as well are convolutions that pad with zeros (exact away from the border) and transposed ones (exact on
    average). Without a note the result equals the copy. Raises ModelError where the copy does not run.
    """
    consumers = [c for c in coupling.consumers if not coupling.keep((c.data, c.axis), units).all()]
    proto = zeroed(model, coupling, units)
    levels = _levels(model, proto, sorted({(c.data, c.axis) for c in consumers}), samples, device)
    nodes = {node.name: node for node in model.nodes}
    weightless = _weightless(model, coupling) & ~units
    notes, uneven = [], 0
    for consumer in consumers:
        node, level = nodes[consumer.node], levels[consumer.data, consumer.axis]
        gone = ~coupling.keep((consumer.data, consumer.axis), units)
        scale = (np.abs(level.mean) + level.spread)[gone].max()
        if not scale:
            continue
        varying = int((level.spread[gone] > _rounding(model.dtypes[consumer.data]) * scale).sum())
        # What only looks constant on these samples, an activation in saturation say, is none.
        unmade = int((~coupling.keep((consumer.data, consumer.axis), ~weightless)).sum())
        if consumer.weight is None or consumer.weight not in model.constants:
            notes.append(
                f"{node}: it has no constant weights, so the constants of what was removed are not added"
            )
        elif unmade:
            notes.append(
                f"{node}: {unmade} removed channels come from no layer with weights; their mean is added"
            )
        elif varying:
            notes.append(
                f"{node}: {varying} removed channels vary though their weights are zero; their mean is added"
            )
        else:
            spec = lookup(node.domain, node.op, node.version)
            if spec is not None and spec.linear is not None:
                kernel = model.constants[consumer.weight].shape[2:]
                uneven += spec.linear.position_dependent(node, kernel)
    if uneven:
        notes.append(
            f"{uneven} of the convolutions that read removed units pad with zeros or spread their input: there the "
            "folded constants are exact only away from the border, or on average"
        )
    # To a consumer, a constant is a channel whose mean is all there is.
    moments = {
        key: Moments(level.mean, np.square(level.mean), level.count)
        for key, level in levels.items()
    }
    used = max((level.count for level in levels.values()), default=0)
    folded = fold_means(model, coupling, units, Statistics({MOMENTS: moments}, used, device), raw)
    return Pruned(raw, folded.proto, (*notes, *folded.notes))


def _rounding(dtype: np.dtype[Any]) -> float:
    step = float(finfo(dtype).eps) if is_float(dtype) else 0.0  # type: ignore[no-untyped-call]
    return max(VARIES, 2 * step)


def zeroed(model: Model, coupling: Coupling, units: Bools) -> onnx.ModelProto:
    """The original graph in which linear nodes make the removed units from zero weights and the bias they had.

    It has all its channels: this is pruning as published. Weights that only read removed units stay as they are.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    read = {(c.node, c.weight, c.weight_axis) for c in coupling.consumers}
    for node in model.nodes:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.linear is None:
            continue
        for slot, name in enumerate(node.inputs[:2]):  # the third is the bias
            if name not in model.constants:
                continue
            value = model.constants[name]
            for axis in range(value.ndim):
                if (name, axis) in coupling.axes and (node.name, name, axis) not in read:
                    keep = coupling.keep((name, axis), units)
                    view = [1] * value.ndim
                    view[axis] = -1
                    value = np.where(keep.reshape(view), value, np.zeros((), value.dtype))
            if value is not model.constants[name]:
                editor.replace(editor.nodes[node.name], slot, np.ascontiguousarray(value))
    return proto


def _weightless(model: Model, coupling: Coupling) -> Bools:
    """Units (n_units,) that a node other than a linear one makes of inputs without them, as a gain makes channels."""
    read = {(c.weight, c.weight_axis) for c in coupling.consumers}

    def carried(names: Iterable[str]) -> Bools:
        held = np.zeros(coupling.n_units + 1, bool)  # the last place takes what is pinned
        for name in names:
            for axis in range(len(model.shapes.get(name, ()))):
                if (name, axis) in coupling.axes and (name, axis) not in read:
                    held[coupling.axes[name, axis]] = True
        return held[:-1]

    found = np.zeros(coupling.n_units, bool)
    for node in model.nodes:
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.linear is None:
            found |= carried(node.outputs) & ~carried(
                n for n in node.inputs if n not in model.constants
            )
    return found


@dataclass(frozen=True)
class _Level:
    """Mean and spread (largest less smallest value) of every channel (C,), over ``count`` samples."""

    mean: Floats
    spread: Floats
    count: int


def _levels(
    model: Model, proto: onnx.ModelProto, axes: list[Axis], samples: Samples, device: str
) -> dict[Axis, _Level]:
    """What the channels of every axis hold, read one sample at a time so that whole activations may come back."""
    if not axes:
        return {}
    names = sorted({name for name, _ in axes})
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    for name in names:
        kind = helper.np_dtype_to_tensor_dtype(model.dtypes[name])
        shown.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    session = Session(shown, device, what="the model with zero weights")
    few = samples.take(np.arange(min(samples.count, max(SAMPLES, samples.fixed_batch or 1))))
    found: dict[Axis, list[Floats]] = {key: [] for key in axes}
    count = 0
    for index, feed in few.batches(1):
        values = dict(zip(names, session.run(feed, names), strict=True))
        count += len(index)
        for name, axis in axes:
            # Sums of equal float32 values drift: they are taken in float64.
            rows = np.moveaxis(values[name], axis, 0).astype(np.float64)
            rows = rows.reshape(len(rows), -1)
            found[name, axis].append(
                np.stack([rows.mean(axis=1), rows.min(axis=1), rows.max(axis=1)])
            )
    result = {}
    for key, parts in found.items():
        mean, low, high = np.stack(parts, axis=1)
        result[key] = _Level(mean.mean(axis=0), high.max(axis=0) - low.min(axis=0), count)
    return result
