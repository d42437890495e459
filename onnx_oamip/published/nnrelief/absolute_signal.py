"""Mean absolute signal of every consumed channel, collected in one streaming pass: the statistic of NNrelief.

Sums of absolute values are taken inside the graph, so that a few numbers per channel leave the device; they are
accumulated in float64. Memory does not depend on the number of samples. The exact norms of convolutions (``kernels``)
need, per sample and channel, the Gram matrix of the absolute patches, k^2 x k^2: patches are cut in the graph by a
convolution with one tap per channel, so that strides, padding and dilation are the runtime's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Axis,
    Coupling,
    Floats,
    Model,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.overflow import refuse
from onnx_oamip.graph.linear_layers import matrix
from onnx_oamip.graph.ops import build, domains
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.runtime import Session
from onnx_oamip.published.nnrelief.branches import (
    Join,
    data_axis,
    is_depthwise,
    joins,
    linear_nodes,
)
from onnx_oamip.published.nnrelief.requests import Signal
from onnx_oamip.statistics.calibration import consumed

PATCH_BYTES = 1 << 28
"""Upper bound of the patches that one run holds for one convolution; it sets how many samples run at a time."""
CHUNK = 1 << 24
"""Most values of a product that are held at a time while norms are computed."""


@dataclass(frozen=True)
class _Signals:
    """Everything that is measured.

    Attributes:
        axes: Channel axes that are read.
        joins: Residual sums.
        windows: Convolutions whose kernels are measured one by one.
    """

    axes: tuple[Axis, ...]
    joins: tuple[Join, ...]
    windows: tuple[Site, ...]


def collect(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
    exact: bool = False,
) -> Signal:
    """Collect the means of |x| of all read channels, and the norms of the branches of residual sums.

    Args:
        model: The model.
        coupling: Its units and consumers.
        samples: Calibration samples.
        device: Device that the model runs on.
        batch_size: Most samples in one run.
        progress: Callback ``(stage, done, total)``.
        exact: Also collect the norms of every kernel's map.

    Returns:
        The signal.

    Raises:
        DataError: An activation is not finite.
    """
    targets = _targets(model, coupling, exact)
    instrumented = _instrument(model, targets)
    names = [output.name for output in instrumented.graph.output]
    if not names:
        return Signal({}, {}, {})
    session = Session(instrumented, device, what="the model with its signal outputs")
    sums = _Sums(model, targets)
    total = samples.usable()
    for index, feed in samples.batches(_batch(model, targets.windows, batch_size)):
        outputs = dict(zip(names, session.run(feed, names), strict=True))
        faulty = sums.add(outputs)
        if faulty is not None:
            refuse(model, samples, faulty, device=device, batch_size=batch_size)
        if progress:
            progress("signal", int(index[-1]) + 1, total)
    return sums.signal()


def norms(weight: Floats, gram: Floats) -> Floats:
    """Compute the norms of the absolute maps of all kernels, ``sqrt(k' G k)``, summed over samples.

    Args:
        weight: Absolute weights (groups, outputs, inputs, taps).
        gram: Gram matrices of the patches (samples, groups * inputs, taps, taps).

    Returns:
        Sums (groups, outputs, inputs).
    """
    groups, outs, ins, taps = weight.shape
    kernels = weight.transpose(0, 2, 1, 3).reshape(groups * ins, outs, taps)
    step = max(1, CHUNK // kernels.size)
    total = np.zeros((groups * ins, outs))
    for first in range(0, len(gram), step):
        energy = ((kernels @ gram[first : first + step]) * kernels).sum(axis=-1)
        total += np.sqrt(np.maximum(energy, 0)).sum(axis=0)
    return total.reshape(groups, ins, outs).transpose(0, 2, 1)


class _Sums:
    """Sums over the outputs of the instrumented model."""

    def __init__(self, model: Model, targets: _Signals) -> None:
        self._targets = targets
        self._weights = {
            layer.node.name: np.abs(matrix(layer, model.constants[layer.weight]))
            for layer in targets.windows
        }
        self._kernels = {name: np.zeros(w.shape[:3]) for name, w in self._weights.items()}
        self._counts = dict.fromkeys(targets.axes, 0)
        self._rows = dict.fromkeys([*(join.node for join in targets.joins), *self._kernels], 0)
        self._totals: dict[str, Floats] = {}
        self._sources = {f"oamip_abs_{i}": tensor for i, (tensor, _) in enumerate(targets.axes)}
        for i, join in enumerate(targets.joins):
            for side, tensor in enumerate(join.inputs):
                self._sources[f"oamip_map_{i}_{side}"] = tensor

    def add(self, outputs: Mapping[str, Array]) -> str | None:
        """Add the outputs of one run.

        Args:
            outputs: Values by name.

        Returns:
            A tensor whose sum is not finite; None if there is none.
        """
        for name, tensor in self._sources.items():
            value = outputs[name].astype(np.float64)
            if not np.isfinite(value).all():
                return tensor
            self._totals[name] = self._totals[name] + value if name in self._totals else value
        for i, axis in enumerate(self._targets.axes):
            values = int(np.prod(outputs[f"oamip_size_{i}"]))
            self._counts[axis] += values // max(len(outputs[f"oamip_abs_{i}"]), 1)
        for i, join in enumerate(self._targets.joins):
            self._rows[join.node] += int(outputs[f"oamip_rows_{i}"][0])
        for i, layer in enumerate(self._targets.windows):
            name = layer.node.name
            gram = outputs[f"oamip_gram_{i}"].astype(np.float64)
            self._kernels[name] += norms(self._weights[name], gram)
            self._rows[name] += len(gram)
        return None

    def signal(self) -> Signal:
        """Divide the sums by the numbers of values and samples.

        Returns:
            The signal.
        """
        means = {
            axis: self._totals[f"oamip_abs_{i}"] / self._counts[axis]
            for i, axis in enumerate(self._targets.axes)
        }
        kernels = {name: total / self._rows[name] for name, total in self._kernels.items()}
        of_joins: dict[str, tuple[int, Floats]] = {}
        for i, join in enumerate(self._targets.joins):
            maps = [self._totals[f"oamip_map_{i}_{side}"] for side in (0, 1)]
            both = np.stack([_norm(total, join.axis) for total in maps])
            of_joins[join.node] = (join.axis, both / self._rows[join.node])
        return Signal(means, kernels, of_joins)


def _targets(model: Model, coupling: Coupling, exact: bool) -> _Signals:
    layers = linear_nodes(model)
    axes = {*consumed(model, coupling), *(data_axis(model, layer) for layer in layers)}
    windows = [
        layer for layer in layers if exact and layer.spatial and not is_depthwise(model, layer)
    ]
    return _Signals(tuple(sorted(axes)), tuple(joins(model, coupling)), tuple(windows))


def _norm(total: Floats, axis: int) -> Floats:
    """Euclidean norms of the channels of a map without the batch axis."""
    rows = np.moveaxis(total, axis - 1, 0)
    return np.asarray(np.linalg.norm(rows.reshape(len(rows), -1), axis=1))


def _batch(model: Model, windows: tuple[Site, ...], most: int) -> int:
    """Samples in one run, such that the patches of each convolution stay within PATCH_BYTES."""
    values = [_patch_values(model, layer) // max(model.batch, 1) for layer in windows]
    affordable = PATCH_BYTES // (4 * max(values, default=1))
    return max(1, min(most, affordable))


def _patch_values(model: Model, layer: Site) -> int:
    channels = model.shapes[layer.data][1]
    taps = int(np.prod(layer.kernel))
    positions = int(np.prod(model.shapes[layer.node.outputs[0]][2:]))
    return channels * taps * positions


def _instrument(model: Model, targets: _Signals) -> onnx.ModelProto:
    """The model with the statistics as outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    opset = domains.opset(proto)
    del graph.output[:]
    magnitudes: dict[str, str] = {}

    def show(name: str, kind: int = TensorProto.FLOAT) -> None:
        graph.output.append(helper.make_tensor_value_info(name, kind, None))

    def absolute(tensor: str) -> str:
        """|tensor| in single precision: half precision would overflow in the sums."""
        if tensor not in magnitudes:
            i = len(magnitudes)
            floating = f"oamip_float_{i}"
            graph.node.append(build.to_float(tensor, floating, f"oamip_cast_{i}"))
            magnitudes[tensor] = f"oamip_magnitude_{i}"
            graph.node.append(build.absolute(floating, magnitudes[tensor], f"oamip_take_{i}"))
        return magnitudes[tensor]

    for i, (tensor, axis) in enumerate(targets.axes):
        others = [a for a in range(len(model.shapes[tensor])) if a != axis]
        build.reduce_sum(graph, absolute(tensor), f"oamip_abs_{i}", axes=others, opset=opset)
        show(f"oamip_abs_{i}")
        graph.node.append(build.shape_of(tensor, f"oamip_size_{i}", f"oamip_shape_{i}"))
        show(f"oamip_size_{i}", TensorProto.INT64)
    for i, join in enumerate(targets.joins):
        for side, tensor in enumerate(join.inputs):
            name = f"oamip_map_{i}_{side}"
            build.reduce_sum(graph, absolute(tensor), name, axes=[0], opset=opset)
            show(name)
        graph.node.append(build.shape_of(join.inputs[0], f"oamip_rows_{i}", f"oamip_count_{i}"))
        show(f"oamip_rows_{i}", TensorProto.INT64)
    for i, layer in enumerate(targets.windows):
        _append_grams(graph, model, layer, magnitude=absolute(layer.data), number=i)
        show(f"oamip_gram_{i}")
    return proto


def _append_grams(
    graph: onnx.GraphProto,
    model: Model,
    layer: Site,
    *,
    magnitude: str,
    number: int,
) -> None:
    """Append nodes that compute ``oamip_gram_number`` (samples, channels, taps, taps) from the patches of channels."""
    channels = model.shapes[layer.data][1]
    taps = int(np.prod(layer.kernel))
    one_per_tap = np.tile(np.eye(taps)[None, :, None], (channels, 1, 1, 1))
    weight = layer.rules.weight(layer, one_per_tap, layer.kernel).astype(np.float32)
    original = next(node for node in model.proto.graph.node if node.name == layer.node.name)
    weight_name = f"oamip_taps_{number}"
    shape_name = f"oamip_patch_shape_{number}"
    patches = f"oamip_patches_{number}"
    rows = f"oamip_rows_of_{number}"
    columns = f"oamip_columns_of_{number}"

    convolution = onnx.NodeProto()
    convolution.CopyFrom(original)
    del convolution.input[:], convolution.output[:]
    convolution.name = f"oamip_patch_{number}"
    convolution.input.extend([magnitude, weight_name])
    convolution.output.append(patches)
    others = [attribute for attribute in convolution.attribute if attribute.name != "group"]
    del convolution.attribute[:]
    convolution.attribute.extend([*others, helper.make_attribute("group", channels)])

    shape = np.asarray([0, channels, taps, -1], np.int64)
    contiguous = np.ascontiguousarray(weight)
    graph.initializer.append(numpy_helper.from_array(contiguous, weight_name))
    graph.initializer.append(numpy_helper.from_array(shape, shape_name))
    graph.node.extend(
        [
            convolution,
            build.reshape(patches, shape_name, rows),
            build.transpose(rows, columns, [0, 1, 3, 2]),
            build.matmul(rows, columns, f"oamip_gram_{number}"),
        ]
    )
