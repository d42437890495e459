"""How much absolute signal reaches every reader: the statistics behind NNrelief, in one streaming pass.

Sums of absolute values are taken inside the graph, so that a few numbers per channel leave the device; they are
accumulated in float64. Memory does not depend on the number of samples. The exact norms of convolutions (``kernels``)
need, per sample and channel, the Gram matrix of the absolute patches, k^2 x k^2: patches are cut in the graph by a
convolution with one tap a channel, so that strides, padding and dilation are the runtime's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Axis,
    Coupling,
    Floats,
    Model,
    Node,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import chains
from onnx_oamip.graph.linear_layers import matrix, matrix_shape, site
from onnx_oamip.graph.ops import Trait, build, has
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.runtime import Session
from onnx_oamip.published.nnrelief.requests import Signal
from onnx_oamip.statistics.overflow import refuse

PATCH_BYTES = 1 << 28
"""Bound of the patches that one run holds for one convolution; it sets how many samples run at a time."""
BETWEEN = Trait.IDENTITY | Trait.BATCH_NORM | Trait.BIAS
"""Operators that may lie between a linear node and the sum that its branch runs into."""
CHUNK = 1 << 24
"""Values of a product that are held at a time while norms are taken."""


@dataclass(frozen=True)
class Join:
    """A sum of two branches of one shape, and the axis that its units lie on."""

    node: str
    inputs: tuple[str, str]
    axis: int


def data_axis(model: Model, place: Site) -> Axis:
    """The axis that a linear node sums over."""
    return place.data, place.data_axis % len(model.shapes[place.data])


def places(model: Model) -> list[Site]:
    """Linear nodes whose data has a known shape, in graph order."""
    found = (site(node, model.constants) for node in model.nodes)
    return [
        p
        for p in found
        if p is not None and p.data in model.shapes and p.node.outputs[0] in model.shapes
    ]


def depthwise(model: Model, place: Site) -> bool:
    """Whether every filter reads one channel only: there is nothing to choose among."""
    return place.groups > 1 and matrix_shape(place, model.constants[place.weight])[2] == 1


def joins(model: Model, coupling: Coupling) -> list[Join]:
    """Residual sums: two computed branches of the same shape that carry units along one axis behind the batch."""
    found = []
    for node in model.nodes:
        if not has(node, Trait.SUM) or len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
            continue
        first, second = node.inputs
        shape = model.shapes.get(node.outputs[0])
        same = shape is not None and model.shapes.get(first) == shape == model.shapes.get(second)
        if not same or first in model.constants or second in model.constants:
            continue
        axes = [
            a
            for a in range(len(shape or ()))
            if (coupling.axes.get((node.outputs[0], a), np.zeros(0)) >= 0).any()
        ]
        if len(axes) == 1 and axes[0] > 0:
            found.append(Join(node.name, (first, second), axes[0]))
    return found


def maker(model: Model, tensor: str) -> Site | None:
    """The linear node that alone makes a branch, through biases and normalisation that nothing else reads."""
    chain = trail(model, tensor)
    return chain[0] if chain else None


def trail(model: Model, tensor: str) -> tuple[Site, list[Node]] | None:
    """The linear node a branch comes from and the nodes between (last first), all of them read by this branch only."""
    linear = {p.node.name: p for p in places(model)}

    def data_input(node: Node) -> str | None:
        computed = [n for n in node.inputs if n and n not in model.constants]
        if not has(node, BETWEEN) or len(computed) != 1:
            return None
        same_shape = model.shapes.get(computed[0]) == model.shapes.get(node.outputs[0])
        return computed[0] if same_shape else None

    between: list[Node] = []
    for node in chains.of_model(model).in_front(tensor, data_input):
        if node.name in linear:
            return linear[node.name], between
        between.append(node)
    return None


def collect(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    batch_size: int = 32,
    progress: Progress | None = None,
    exact: bool = False,
) -> Signal:
    """Means of |x| for every reader, norms at residual sums, and with ``exact`` the norms of every kernel's map.

    Raises DataError where an activation is not finite.
    """
    linear = places(model)
    met = {
        (c.weight, c.weight_axis)
        for c in coupling.consumers
        if c.weight and c.weight not in model.constants
    }
    sites = sorted(
        {(c.data, c.axis) for c in coupling.consumers} | met | {data_axis(model, p) for p in linear}
    )
    sums = joins(model, coupling)
    cut = [p for p in linear if exact and p.spatial and not depthwise(model, p)]
    proto, names = _instrument(model, sites, sums, cut)
    if not names:
        return Signal({}, {}, {})
    session = Session(proto, device, what="the model with its signal outputs")
    totals: dict[str, Floats] = {}
    kernels = {p.node.name: np.zeros(matrix_shape(p, model.constants[p.weight])[:3]) for p in cut}
    counts = dict.fromkeys(sites, 0)
    rows = dict.fromkeys([j.node for j in sums] + list(kernels), 0)
    total = samples.usable()
    for index, feed in samples.batches(_batch(model, cut, batch_size)):
        found = dict(zip(names, session.run(feed, names), strict=True))
        for name, value in found.items():
            if name.startswith(("oamip_abs_", "oamip_map_")):
                part = value.astype(np.float64)
                if not np.isfinite(part).all():
                    kind, at = name.split("_")[1], [int(i) for i in name.split("_")[2:]]
                    tensor = sites[at[0]][0] if kind == "abs" else sums[at[0]].inputs[at[1]]
                    refuse(model, samples, tensor, device=device, batch_size=batch_size)
                totals[name] = totals[name] + part if name in totals else part
        for i, axis in enumerate(sites):
            counts[axis] += int(np.prod(found[f"oamip_size_{i}"])) // max(
                len(found[f"oamip_abs_{i}"]), 1
            )
        for i, join in enumerate(sums):
            rows[join.node] += int(found[f"oamip_rows_{i}"][0])
        for i, place in enumerate(cut):
            gram = found[f"oamip_gram_{i}"].astype(np.float64)
            kernels[place.node.name] += norms(
                np.abs(matrix(place, model.constants[place.weight])), gram
            )
            rows[place.node.name] += len(gram)
        if progress:
            progress("signal", int(index[-1]) + 1, total)
    return Signal(
        means={axis: totals[f"oamip_abs_{i}"] / counts[axis] for i, axis in enumerate(sites)},
        kernels={name: value / rows[name] for name, value in kernels.items()},
        joins={
            join.node: (
                join.axis,
                np.stack([_norm(totals[f"oamip_map_{i}_{k}"], join.axis) for k in (0, 1)])
                / rows[join.node],
            )
            for i, join in enumerate(sums)
        },
    )


def norms(weight: Floats, gram: Floats) -> Floats:
    """Sums over samples of ``sqrt(k' G k)`` (groups, outputs, inputs).

    ``weight`` (groups, outputs, inputs, taps) of absolute values, ``gram`` (samples, groups * inputs, taps, taps).
    """
    groups, outs, ins, taps = weight.shape
    kernels = weight.transpose(0, 2, 1, 3).reshape(groups * ins, outs, taps)
    step = max(1, CHUNK // kernels.size)
    total = np.zeros((groups * ins, outs))
    for first in range(0, len(gram), step):
        energy = ((kernels @ gram[first : first + step]) * kernels).sum(axis=-1)
        total += np.sqrt(np.maximum(energy, 0)).sum(axis=0)
    return total.reshape(groups, ins, outs).transpose(0, 2, 1)


def _norm(total: Floats, axis: int) -> Floats:
    """Euclidean norms of what every channel of a map (without the batch axis) holds."""
    rows = np.moveaxis(total, axis - 1, 0)
    return np.asarray(np.linalg.norm(rows.reshape(len(rows), -1), axis=1))


def _batch(model: Model, cut: list[Site], wanted: int) -> int:
    sizes = [_patch_values(model, p) // max(model.batch, 1) for p in cut]
    return max(1, min(wanted, PATCH_BYTES // (4 * max(sizes, default=1))))


def _patch_values(model: Model, place: Site) -> int:
    channels = model.shapes[place.data][1]
    return (
        channels
        * int(np.prod(place.kernel))
        * int(np.prod(model.shapes[place.node.outputs[0]][2:]))
    )


def _instrument(
    model: Model, sites: list[Axis], sums: list[Join], cut: list[Site]
) -> tuple[onnx.ModelProto, list[str]]:
    """The model with its statistics as outputs, and their names."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    del graph.output[:]
    names: list[str] = []
    magnitude: dict[str, str] = {}

    def show(name: str, kind: int = TensorProto.FLOAT) -> None:
        graph.output.append(helper.make_tensor_value_info(name, kind, None))
        names.append(name)

    def absolute(tensor: str) -> str:
        """|tensor| in single precision: half precision would overflow in the sums."""
        if tensor not in magnitude:
            i = len(magnitude)
            floating = f"oamip_float_{i}"
            graph.node.append(build.to_float(tensor, floating, f"oamip_cast_{i}"))
            magnitude[tensor] = f"oamip_magnitude_{i}"
            graph.node.append(build.absolute(floating, magnitude[tensor], f"oamip_take_{i}"))
        return magnitude[tensor]

    for i, (tensor, axis) in enumerate(sites):
        axes = [a for a in range(len(model.shapes[tensor])) if a != axis]
        build.reduce_sum(graph, absolute(tensor), f"oamip_abs_{i}", axes=axes, opset=opset)
        show(f"oamip_abs_{i}")
        graph.node.append(build.shape_of(tensor, f"oamip_size_{i}", f"oamip_shape_{i}"))
        show(f"oamip_size_{i}", TensorProto.INT64)
    for i, join in enumerate(sums):
        for k, tensor in enumerate(join.inputs):
            name = f"oamip_map_{i}_{k}"
            build.reduce_sum(graph, absolute(tensor), name, axes=[0], opset=opset)
            show(name)
        graph.node.append(build.shape_of(join.inputs[0], f"oamip_rows_{i}", f"oamip_count_{i}"))
        show(f"oamip_rows_{i}", TensorProto.INT64)
    for i, place in enumerate(cut):
        _grams(graph, model, place, absolute(place.data), i)
        show(f"oamip_gram_{i}")
    return proto, names


def _grams(graph: onnx.GraphProto, model: Model, place: Site, magnitude: str, i: int) -> None:
    """Nodes that make ``oamip_gram_i`` (samples, channels, taps, taps): every channel's patches times themselves."""
    channels, taps = model.shapes[place.data][1], int(np.prod(place.kernel))
    one_per_tap = np.tile(np.eye(taps)[None, :, None], (channels, 1, 1, 1))
    weight = place.rules.weight(place, one_per_tap, place.kernel).astype(np.float32)
    original = next(n for n in model.proto.graph.node if n.name == place.node.name)
    node = onnx.NodeProto()
    node.CopyFrom(original)
    del node.input[:], node.output[:]
    node.name = f"oamip_patch_{i}"
    node.input.extend([magnitude, f"oamip_taps_{i}"])
    node.output.append(f"oamip_patches_{i}")
    kept = [a for a in node.attribute if a.name != "group"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("group", channels)])
    shape = np.asarray([0, channels, taps, -1], np.int64)
    graph.initializer.append(
        numpy_helper.from_array(np.ascontiguousarray(weight), f"oamip_taps_{i}")
    )
    graph.initializer.append(numpy_helper.from_array(shape, f"oamip_patch_shape_{i}"))
    graph.node.extend(
        [
            node,
            build.reshape(node.output[0], f"oamip_patch_shape_{i}", f"oamip_rows_of_{i}"),
            build.transpose(f"oamip_rows_of_{i}", f"oamip_columns_of_{i}", [0, 1, 3, 2]),
            build.matmul(f"oamip_rows_of_{i}", f"oamip_columns_of_{i}", f"oamip_gram_{i}"),
        ]
    )
