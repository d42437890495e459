"""Nodes that run other graphs: the tensors of a body and those outside that are the same.

Branches and bodies share names and constants with the graph around them (see ``subgraphs``), so that a rule only has to
state the tensors that enter and leave. A tensor that is carried from step to step keeps its channels where the first
value, the body's input, the body's output and the final value agree on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from onnx_oamip.core.printable import shortened
from onnx_oamip.core.records import Array, Node
from onnx_oamip.graph.ops.handles import LabelAxis, Labels
from onnx_oamip.graph.ops.spec import ChannelRule, Flow, OpSpec, Shapes, Trait

NO_COUNT = 1 << 31
"""Trip count from which a Loop has none: exporters write the largest integer where a condition ends it."""
BRANCHES = ("then_branch", "else_branch")
"""Bodies of an If, in the order in which joins name their outputs."""


def _if(node: Node) -> Flow:
    then, other = (node.bodies[key] for key in BRANCHES)
    ends = zip(then.outputs, other.outputs, node.outputs, strict=False)
    return Flow(joins=tuple(((a, b), out) for a, b, out in ends if out))


def _carried(
    first: tuple[str, ...],
    given: tuple[str, ...],
    made: tuple[str, ...],
    last: tuple[str, ...],
) -> Flow:
    enters = zip(first, made, given, strict=False)
    joins = zip(first, made, last, strict=False)
    return Flow(
        enters=tuple(((start, step), name) for start, step, name in enters),
        joins=tuple(((start, step), name) for start, step, name in joins if name),
    )


def _loop(node: Node) -> Flow:
    body = node.bodies["body"]
    count = len(node.inputs) - 2
    flow = _carried(
        node.inputs[2:],
        body.inputs[2:],
        body.outputs[1 : 1 + count],
        node.outputs[:count],
    )
    stacked = zip(body.outputs[1 + count :], node.outputs[count:], strict=False)
    return Flow(flow.joins, flow.enters, stacks=tuple((x, out, 0) for x, out in stacked if out))


def _trip_count(node: Node, shapes: Shapes, constants: Mapping[str, Array]) -> int | None:
    """Trip count of a Loop that is a constant; a condition may end it before."""
    count = constants.get(node.inputs[0])
    if count is None or count.size != 1 or int(count.reshape(-1)[0]) >= NO_COUNT:
        return None
    return int(count.reshape(-1)[0])


def _steps(node: Node, shapes: Shapes, constants: Mapping[str, Array]) -> int | None:
    """Length of the sequences of a Scan."""
    sequence, _, axis = _scan(node).slices[0]
    shape = shapes.get(sequence)
    return None if shape is None else shape[axis]


def _scan(node: Node) -> Flow:
    body = node.bodies["body"]
    scanned = int(node.attrs["num_scan_inputs"])
    count = len(node.inputs) - scanned
    flow = _carried(
        node.inputs[:count],
        body.inputs[:count],
        body.outputs[:count],
        node.outputs[:count],
    )
    ins = node.attrs.get("scan_input_axes") or [0] * scanned
    outs = node.attrs.get("scan_output_axes") or [0] * (len(body.outputs) - count)
    slices = zip(node.inputs[count:], body.inputs[count:], ins, strict=True)
    stacks = zip(body.outputs[count:], node.outputs[count:], outs, strict=False)
    return Flow(
        flow.joins,
        flow.enters,
        tuple(slices),
        tuple((x, out, a) for x, out, a in stacks if out),
    )


def _followed_bodies(find_flow: Callable[[Node], Flow]) -> ChannelRule:
    """Channel rule of a node with bodies, from the tensors that pass between it and them."""

    def apply(node: Node, labels: Labels) -> None:
        _channels(node, find_flow(node), labels)

    return apply


def _channels(node: Node, flow: Flow, labels: Labels) -> None:
    _enter(node, flow, labels)
    unused = _unused_branch(node, flow, labels)
    # The branch that runs comes first: what only the other one reads is met in that one.
    for key in sorted(node.bodies, key=lambda key: key == unused):
        reason = f"only a branch of {node} reads it that does not run at these sizes"
        labels.enter(node.bodies[key], reason if key == unused else "")
    for sources, name in flow.joins:
        if unused is None:
            found = _joined(node, labels, sources)
        else:
            other = sources[BRANCHES.index(unused)]
            taken = sources[1 - BRANCHES.index(unused)]
            found = _chosen(node, labels, taken, other)
            if not any(axis is not None for axis in found):
                labels.set(name, found, source=taken)
                continue
        labels.set(name, found, f"it leaves {node}")
    for (first, step), _ in flow.enters:
        _joined(node, labels, (first, step))
    for inner, name, axis in flow.stacks:
        _stack(node, labels, inner, name, axis)


def _unused_branch(node: Node, flow: Flow, labels: Labels) -> str | None:
    """The branch that sizes rule out; None where both may run.

    ``squeeze(dim)`` is exported as a choice between a Squeeze and an Identity, by the length of the axis.
    """
    if set(node.bodies) != set(BRANCHES):
        return None
    for sources, name in flow.joins:
        shape = labels.shape(name)
        fits = [labels.shape(source) == shape for source in sources]
        if shape is not None and fits.count(True) == 1:
            return BRANCHES[fits.index(False)]
    return None


def _chosen(node: Node, labels: Labels, taken: str, other: str) -> list[LabelAxis]:
    """Channels of an output that comes from one branch; the other one may return the same channels."""
    axes = labels.axes(taken)
    followed = [found for found in axes if found is not None]
    for found in labels.axes(other):
        if found is not None and not any(np.isin(found, same).all() for same in followed):
            reason = f"{node} gives '{shortened(taken)}' at these sizes, and at others this"
            labels.pin(found, reason)
    return axes


def _enter(node: Node, flow: Flow, labels: Labels) -> None:
    """Labels of the inputs of bodies."""
    for body in node.bodies.values():
        for name in body.inputs:
            labels.set(name, [], f"an input of the body of {node}")
    for (first, _), name in flow.enters:
        carried: list[LabelAxis] = []
        if labels.shape(name) is None:
            labels.pin_all(first, f"{node} carries it on in a shape that is not known")
        else:
            carried = labels.axes(first)
        labels.set(name, carried, f"carried by {node}")
    for outer, name, axis in flow.slices:
        axes = labels.axes(outer)
        if axes:
            labels.pin(axes.pop(axis), f"{node} steps along it")
        labels.set(name, axes, f"a part of '{shortened(outer)}'")


def _stack(
    node: Node,
    labels: Labels,
    inner: str,
    name: str,
    axis: int,
) -> None:
    """Labels of an output that holds the outputs of all steps along a new axis."""
    shape = labels.shape(name)
    step = labels.shape(inner)
    if shape is None or step is None or len(shape) != len(step) + 1:
        labels.pin_all(inner, f"{node} stacks it to a shape that is not known")
        labels.set(name, [], f"an output of {node}")
        return
    axes = labels.axes(inner)
    axes.insert(axis % len(shape), None)
    labels.set(name, axes, f"steps of {node}")


def _joined(node: Node, labels: Labels, sources: tuple[str, str]) -> list[LabelAxis]:
    """Channels of a tensor that is one of two: tied where both are tracked, else pinned."""
    one, other = sources
    if labels.shape(one) is None or labels.shape(one) != labels.shape(other):
        reason = f"{node} gives '{shortened(one)}' or '{shortened(other)}', which differ in shape"
        for name in sources:
            labels.pin_all(name, reason)
        return []
    first = labels.axes(one)
    second = labels.axes(other)
    result: list[LabelAxis] = []
    for a, b in zip(first, second, strict=True):
        if a is None or b is None:
            labels.pin(
                a, f"{node} joins it with '{shortened(other)}', whose channels are not tracked"
            )
            labels.pin(
                b, f"{node} joins it with '{shortened(one)}', whose channels are not tracked"
            )
            result.append(None)
        else:
            labels.tie(a, b)
            result.append(a)
    return result


SPECS = (
    OpSpec("If", _followed_bodies(_if), flow=_if, traits=Trait.BRANCHES),
    OpSpec("Loop", _followed_bodies(_loop), flow=_loop, runs=_trip_count),
    OpSpec("Scan", _followed_bodies(_scan), since=9, flow=_scan, runs=_steps),
)
