"""One streaming pass over the data: moments of what every consumer receives.

Sums are taken inside the graph (two reductions per consumed tensor), so that a few numbers per channel leave the
device instead of whole activations; they are accumulated in float64. Memory does not depend on the number of samples.
Where squares leave the range of float32 (values beyond 1e19, or below 1e-16), a batch is summed again in float64.
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
    Coupling,
    Floats,
    Model,
    Moments,
    Statistics,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.ops import build
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.statistics.overflow import refuse
from onnx_oamip.statistics.requests import MOMENTS

FAINT = 1e-30
"""Sums of squares below this have lost digits in float32, whose numbers thin out from 1e-38 on."""


def collect(
    model: Model,
    coupling: Coupling,
    samples: Samples,
    device: str,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Statistics:
    """Moments (C,) per consumed axis over all samples and positions; float64.

    Raises DataError where a consumed tensor is not finite.
    """
    start = time.perf_counter()
    sites = consumed(model, coupling)
    sums: dict[Axis, tuple[Floats, Floats]] = {}
    counts = dict.fromkeys(sites, 0)
    session = None
    if sites:
        session = Session(
            _instrument(model, sites), device, what="the model with its statistics outputs"
        )
    total = samples.usable()
    names = [
        name
        for i in range(len(sites))
        for name in (f"oamip_sum_{i}", f"oamip_square_{i}", f"oamip_size_{i}")
    ]
    for index, feed in samples.batches(batch_size):
        if session is None:
            break
        outputs = session.run(feed, names)
        for i, site in enumerate(sites):
            first, second, size = outputs[3 * i : 3 * i + 3]
            a, b = first.astype(np.float64), second.astype(np.float64)
            if not (np.isfinite(a) & np.isfinite(b) & ((b > FAINT) | (a == 0))).all():
                a, b = _again(model, site, feed, device)
            if not np.isfinite(a + b).all():
                refuse(model, samples, site[0], device, batch_size)
            old = sums.get(site)
            sums[site] = (a, b) if old is None else (old[0] + a, old[1] + b)
            counts[site] += int(np.prod(size)) // max(len(a), 1)
        if progress:
            progress("calibrate", int(index[-1]) + 1, total)
    moments = {
        site: Moments(sums[site][0] / counts[site], sums[site][1] / counts[site], counts[site])
        for site in sites
    }
    return Statistics({MOMENTS: moments}, total, device, time.perf_counter() - start)


def consumed(model: Model, coupling: Coupling) -> list[Axis]:
    """The axes that consumers sum over, those of activations that stand in for weights among them."""
    met = {
        (c.weight, c.weight_axis)
        for c in coupling.consumers
        if c.weight and c.weight not in model.constants
    }
    return sorted({(c.data, c.axis) for c in coupling.consumers} | met)


def fits(moments: Mapping[Axis, Moments], model: Model, coupling: Coupling) -> bool:
    """Whether these may be the moments of a model: one for each consumed axis, of its length, finite."""
    return list(moments) == consumed(model, coupling) and all(
        type(m.count) is int
        and m.count > 0
        and all(
            v.dtype == np.float64
            and v.shape == (model.shapes[tensor][axis],)
            and np.isfinite(v).all()
            for v in (m.mean, m.mean_square)
        )
        for (tensor, axis), m in moments.items()
    )


def _again(
    model: Model, site: Axis, feed: Mapping[str, Array], device: str
) -> tuple[Floats, Floats]:
    """(sums, sums of squares) of one feed along an axis, in float64 throughout."""
    tensor, axis = site
    value = Session(with_outputs(model, [tensor]), device).run(feed, [tensor])[0].astype(np.float64)
    others = tuple(a for a in range(value.ndim) if a != axis)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told by who asks
        return value.sum(axis=others), np.square(value).sum(axis=others)


def _instrument(model: Model, sites: list[Axis]) -> onnx.ModelProto:
    """The model with, per site, the sum and the sum of squares along the axis, and the tensor's shape."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    del graph.output[:]
    cast: dict[str, str] = {}
    for i, (tensor, axis) in enumerate(sites):
        if tensor not in cast:
            # Half precision would overflow in the sums; a cast of float32 to itself is removed by the runtime.
            cast[tensor] = f"oamip_float_{i}"
            graph.node.append(build.to_float(tensor, cast[tensor], f"oamip_cast_{i}"))
        axes = [a for a in range(len(model.shapes[tensor])) if a != axis]
        for kind, reduce in (("sum", build.reduce_sum), ("square", build.reduce_sum_square)):
            name = f"oamip_{kind}_{i}"
            reduce(graph, cast[tensor], name, axes, opset)
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        graph.node.append(build.shape_of(tensor, f"oamip_size_{i}", f"oamip_shape_{i}"))
        graph.output.append(
            helper.make_tensor_value_info(f"oamip_size_{i}", TensorProto.INT64, None)
        )
    return proto
