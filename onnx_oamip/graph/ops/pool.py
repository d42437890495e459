"""Pooling and reductions: channels pass, pooled axes are untracked, a summed channel is consumed."""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Node
from onnx_oamip.graph.ops import maps
from onnx_oamip.graph.ops.handles import Cuts, LabelAxis, Labels, Refused, Terms, integers
from onnx_oamip.graph.ops.notation import opaque, rule
from onnx_oamip.graph.ops.spec import Edit, EditRules, OpSpec, Trait


def _reduce(node: Node, labels: Labels) -> None:
    """Reductions over listed axes: where zeros add nothing a tracked axis is consumed, another statistic pins it."""
    name = node.inputs[0]
    shape = labels.shape(name)
    try:
        listed = integers(node, labels, "axes", 1)
    except KeyError:
        shape, listed = None, None
    if shape is None:
        opaque(node, labels, f"{node} reduces axes that are not known before it runs")
        return
    if listed is None or not listed.size:
        if node.attrs.get("noop_with_empty_axes", 0):
            labels.set(node.outputs[0], labels.axes(name))
            return
        reduced = set(range(len(shape)))
    else:
        reduced = {int(a) % len(shape) for a in listed}
    axes = labels.axes(name)
    tracked = [a for a in sorted(reduced) if axes[a] is not None]
    if node.op in _ADDITIVE and len(tracked) == 1:
        labels.consume(node, (name, tracked[0]), None)
    else:
        for a in tracked:
            labels.pin(axes[a], f"{node} takes a statistic over this axis")
    keep = bool(node.attrs.get("keepdims", 1))
    result: list[LabelAxis] = []
    for a, found in enumerate(axes):
        if a not in reduced:
            result.append(found)
        elif keep:
            result.append(None)
    labels.set(node.outputs[0], result)


_ADDITIVE = frozenset({"ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare"})


def _mean_repair(node: Node, cuts: Cuts) -> Edit:
    """A mean over fewer channels divides by fewer: it is scaled down to the old length."""
    name = node.inputs[0]
    cut = [a for a in range(len(cuts.shape(name))) if cuts.keep(name, a) is not None]
    try:
        listed = integers(node, cuts, "axes", 1)
    except KeyError:
        return Edit()
    reduced = (
        range(len(cuts.shape(name)))
        if listed is None or not listed.size
        else listed % len(cuts.shape(name))
    )
    share = 1.0
    for a in cut:
        if a in reduced:
            share *= cuts.kept(name, a) / cuts.shape(name)[a]
    return Edit() if share == 1.0 else Edit(scale=share)


def _max_encode(node: Node, terms: Terms) -> None:
    if any(node.outputs[1:]):
        raise Refused(f"{node} gives its indices as well")
    x = node.inputs[0]
    out = node.outputs[0]
    terms.maximum(out, x, maps.windows(node, terms.shape(x), terms.shape(out)))


def _average_encode(node: Node, terms: Terms) -> None:
    x = node.inputs[0]
    out = node.outputs[0]
    terms.affine(out, [(x, maps.average(node, terms.shape(x), terms.shape(out)))])


def _global_average_encode(node: Node, terms: Terms) -> None:
    x = node.inputs[0]
    out = node.outputs[0]
    shape = terms.shape(x)
    terms.affine(out, [(x, maps.reduction(shape, range(2, len(shape)), mean=True))])


def _global_max_encode(node: Node, terms: Terms) -> None:
    x = node.inputs[0]
    out = node.outputs[0]
    shape = terms.shape(x)
    terms.maximum(out, x, maps.places(shape).reshape(int(np.prod(shape[:2])), -1))


def _reduce_encode(node: Node, terms: Terms) -> None:
    x = node.inputs[0]
    out = node.outputs[0]
    shape = terms.shape(x)
    try:
        listed = integers(node, terms, "axes", 1)
    except KeyError as error:
        raise Refused(f"{node} takes its axes from a computation") from error
    if listed is not None and listed.size:
        axes = [int(a) % len(shape) for a in listed]
    else:
        axes = [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(len(shape)))
    terms.affine(out, [(x, maps.reduction(shape, axes, mean=node.op == "ReduceMean"))])


_channelwise = rule("n c * -> n c *")
SPECS = (
    OpSpec("MaxPool", _channelwise, encode=_max_encode, traits=Trait.PIECEWISE),
    OpSpec("AveragePool", _channelwise, encode=_average_encode, traits=Trait.AVERAGES),
    OpSpec("LpPool", _channelwise),
    OpSpec("GlobalAveragePool", _channelwise, encode=_global_average_encode, traits=Trait.AVERAGES),
    OpSpec("GlobalMaxPool", _channelwise, encode=_global_max_encode, traits=Trait.PIECEWISE),
    OpSpec("GlobalLpPool", _channelwise),
    OpSpec(
        "ReduceMean",
        _reduce,
        edit=EditRules(_mean_repair),
        encode=_reduce_encode,
        traits=Trait.AVERAGES,
    ),
    OpSpec("ReduceSum", _reduce, encode=_reduce_encode, traits=Trait.AVERAGES),
    *(
        OpSpec(f"Reduce{name}", _reduce)
        for name in ("Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    ),
)
