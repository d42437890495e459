"""Pooling and reductions: channels pass, pooled axes are untracked, a summed channel is consumed."""

from __future__ import annotations

from ..records import Node
from .notation import opaque, rule
from .spec import LabelAxis, Labels, OpSpec, integers


def _reduce(node: Node, labels: Labels) -> None:
    """Reductions over listed axes. A sum over a tracked axis consumes it; any other statistic pins it."""
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
    if node.op == "ReduceSum" and len(tracked) == 1:
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


_channelwise = rule("n c * -> n c *")
SPECS = (
    *(
        OpSpec(name, _channelwise)
        for name in ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    ),
    *(
        OpSpec(f"Reduce{name}", _reduce)
        for name in ["Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"]
    ),
)
