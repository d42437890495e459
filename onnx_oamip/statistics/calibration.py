"""Moments of every tensor that a consumer reads, in one streaming pass over the calibration samples.

Sums are taken inside the graph (two reductions per consumed axis), so that a few numbers per channel leave the device
instead of whole activations; they are accumulated in float64. Memory does not depend on the number of samples. Where
squares leave the range of float32 (values beyond 1e19, or below 1e-16), a batch is summed again in float64.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Axis,
    Bools,
    Coupling,
    Floats,
    Model,
    Moments,
    Statistics,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.overflow import refuse
from onnx_oamip.graph.ops import build, domains
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.statistics.requests import MOMENTS

Feed = Mapping[str, Array]

FAINT = 1e-30
"""Sums of squares below this have lost digits in float32, whose subnormal numbers begin at 1e-38."""


class _Sums:
    """Sums and sums of squares (C,) along one axis, and the number of values per channel."""

    def __init__(self) -> None:
        # The neutral element of addition is -0.0: 0.0 would change the sign of a sum of -0.0.
        self.first: Floats | float = -0.0
        self.second: Floats | float = -0.0
        self.count = 0

    def add(self, first: Floats, second: Floats, count: int) -> None:
        """Add the sums of one feed.

        Args:
            first: Sums (C,).
            second: Sums of squares (C,).
            count: Number of values per channel.
        """
        self.first = self.first + first
        self.second = self.second + second
        self.count += count

    def moments(self) -> Moments:
        """Divide the sums by the number of values.

        Returns:
            Mean and mean square per channel.
        """
        mean = self.first / self.count
        mean_square = self.second / self.count
        return Moments(np.asarray(mean), np.asarray(mean_square), self.count)


def collect(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Statistics:
    """Collect the moments of every consumed axis over all samples and positions.

    Args:
        model: The model.
        coupling: Its consumers.
        samples: Calibration samples.
        device: Device that the model runs on.
        batch_size: Samples in one run.
        progress: Callback ``(stage, done, total)``.

    Returns:
        The answer to the request for moments.

    Raises:
        DataError: A consumed tensor is not finite.
    """
    start = time.perf_counter()
    total = samples.usable()
    sums = {axis: _Sums() for axis in consumed(model, coupling)}
    if sums:
        instrumented = _instrument(model, list(sums))
        session = Session(instrumented, device, what="the model with its statistics outputs")
        names = [output.name for output in instrumented.graph.output]
        for index, feed in samples.batches(batch_size):
            outputs = iter(session.run(feed, names))
            for axis, accumulated in sums.items():
                first = next(outputs)
                second = next(outputs)
                shape = next(outputs)
                first = first.astype(np.float64)
                second = second.astype(np.float64)
                if not _reliable(first, second).all():
                    first, second = _sums_in_float64(model, axis, feed, device)
                if not np.isfinite(first + second).all():
                    refuse(model, samples, axis[0], device=device, batch_size=batch_size)
                count = int(np.prod(shape)) // max(len(first), 1)
                accumulated.add(first, second, count)
            if progress:
                progress("calibrate", int(index[-1]) + 1, total)
    moments = {axis: accumulated.moments() for axis, accumulated in sums.items()}
    seconds = time.perf_counter() - start
    return Statistics({MOMENTS: moments}, total, device, seconds)


def consumed(model: Model, coupling: Coupling) -> list[Axis]:
    """List the axes that consumers sum over, including those of activations in the place of weights.

    Args:
        model: The model.
        coupling: Its consumers.

    Returns:
        Axes in the order of their names.
    """
    axes = set()
    for consumer in coupling.consumers:
        axes.add((consumer.data, consumer.axis))
        if consumer.weight and consumer.weight not in model.constants:
            axes.add((consumer.weight, consumer.weight_axis))
    return sorted(axes)


def fits(
    moments: Mapping[Axis, Moments],
    model: Model,
    coupling: Coupling,
) -> bool:
    """Validate a cache entry: one record per consumed axis, of its length, with finite values.

    Args:
        moments: The entry.
        model: The model.
        coupling: Its consumers.

    Returns:
        True if the entry can hold the moments of the model.
    """
    if list(moments) != consumed(model, coupling):
        return False
    for (tensor, axis), record in moments.items():
        if type(record.count) is not int or record.count <= 0:
            return False
        channels = model.shapes[tensor][axis]
        for values in (record.mean, record.mean_square):
            if values.dtype != np.float64 or values.shape != (channels,):
                return False
            if not np.isfinite(values).all():
                return False
    return True


def _reliable(first: Floats, second: Floats) -> Bools:
    """Channels (C,) whose sums of squares neither overflowed nor vanished in float32."""
    finite = np.isfinite(first) & np.isfinite(second)
    return np.asarray(finite & ((second > FAINT) | (first == 0)))


def _sums_in_float64(
    model: Model,
    axis: Axis,
    feed: Feed,
    device: str,
) -> tuple[Floats, Floats]:
    """Sums and sums of squares of one feed along an axis, in float64 throughout."""
    tensor, position = axis
    (output,) = Session(with_outputs(model, [tensor]), device).run(feed, [tensor])
    value = output.astype(np.float64)
    others = tuple(a for a in range(value.ndim) if a != position)
    # The caller refuses values that are not finite; a warning would only repeat it.
    with np.errstate(over="ignore", invalid="ignore"):
        return value.sum(axis=others), np.square(value).sum(axis=others)


def _instrument(model: Model, axes: list[Axis]) -> onnx.ModelProto:
    """The model with three outputs per axis: sums, sums of squares, and the shape of the tensor."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    opset = domains.opset(proto)
    del graph.output[:]
    cast: dict[str, str] = {}
    for i, (tensor, axis) in enumerate(axes):
        if tensor not in cast:
            # Half precision would overflow in the sums; a cast of float32 to itself is removed by the runtime.
            cast[tensor] = f"oamip_float_{i}"
            graph.node.append(build.to_float(tensor, cast[tensor], f"oamip_cast_{i}"))
        others = [a for a in range(len(model.shapes[tensor])) if a != axis]
        for kind, reduce in (("sum", build.reduce_sum), ("square", build.reduce_sum_square)):
            name = f"oamip_{kind}_{i}"
            reduce(graph, cast[tensor], name, axes=others, opset=opset)
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        size = f"oamip_size_{i}"
        graph.node.append(build.shape_of(tensor, size, f"oamip_shape_{i}"))
        graph.output.append(helper.make_tensor_value_info(size, TensorProto.INT64, None))
    return proto
