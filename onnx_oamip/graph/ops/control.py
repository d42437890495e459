"""Nodes that run other graphs: which tensor of a body is which tensor outside.

Branches and bodies share names and constants with the graph around them (see ``bodies``), so all that is to be said is
what enters and what leaves. A tensor carried from step to step keeps its channels where the first value, the body's
input, the body's output and the final value agree on them.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx_oamip.core.records import Node
from onnx_oamip.graph.ops.spec import (
    ChannelRule,
    Flow,
    LabelAxis,
    Labels,
    OpSpec,
    Trait,
)


def _if(node: Node) -> Flow:
    then, other = node.bodies["then_branch"], node.bodies["else_branch"]
    ends = zip(then.outputs, other.outputs, node.outputs, strict=False)
    return Flow(joins=tuple(((a, b), out) for a, b, out in ends if out))


def _carried(
    first: tuple[str, ...], given: tuple[str, ...], made: tuple[str, ...], last: tuple[str, ...]
) -> Flow:
    inside = tuple(((a, b), x) for a, b, x in zip(first, made, given, strict=False))
    outside = tuple(((a, b), y) for a, b, y in zip(first, made, last, strict=False) if y)
    return Flow(enters=inside, joins=outside)


def _loop(node: Node) -> Flow:
    body, count = node.bodies["body"], len(node.inputs) - 2
    flow = _carried(
        node.inputs[2:], body.inputs[2:], body.outputs[1 : 1 + count], node.outputs[:count]
    )
    stacked = zip(body.outputs[1 + count :], node.outputs[count:], strict=False)
    return Flow(flow.joins, flow.enters, stacks=tuple((x, out, 0) for x, out in stacked if out))


def _scan(node: Node) -> Flow:
    body, scanned = node.bodies["body"], int(node.attrs["num_scan_inputs"])
    count = len(node.inputs) - scanned
    flow = _carried(
        node.inputs[:count], body.inputs[:count], body.outputs[:count], node.outputs[:count]
    )
    ins = node.attrs.get("scan_input_axes") or [0] * scanned
    outs = node.attrs.get("scan_output_axes") or [0] * (len(body.outputs) - count)
    slices = zip(node.inputs[count:], body.inputs[count:], ins, strict=True)
    stacks = zip(body.outputs[count:], node.outputs[count:], outs, strict=False)
    return Flow(
        flow.joins, flow.enters, tuple(slices), tuple((x, out, a) for x, out, a in stacks if out)
    )


def _followed_bodies(find_flow: Callable[[Node], Flow]) -> ChannelRule:
    """Channel rule of a node with bodies, from how tensors pass between it and them."""

    def apply(node: Node, labels: Labels) -> None:
        _channels(node, find_flow(node), labels)

    return apply


def _channels(node: Node, flow: Flow, labels: Labels) -> None:
    for body in node.bodies.values():
        for name in body.inputs:
            labels.set(name, [], f"an input of the body of {node}")
    for (first, _), name in flow.enters:
        if labels.shape(name) is None:
            labels.pin_all(first, f"{node} carries it on in a shape that is not known")
            labels.set(name, [], f"carried by {node}")
        else:
            labels.set(name, labels.axes(first), f"carried by {node}")
    for outer, name, axis in flow.slices:
        found = labels.axes(outer)
        if found:
            labels.pin(found.pop(axis), f"{node} steps along it")
        labels.set(name, found, f"a part of '{outer}'")
    for body in node.bodies.values():
        labels.enter(body)
    for sources, name in flow.joins:
        labels.set(name, _joined(node, labels, sources), f"it leaves {node}")
    for (first, made), _ in flow.enters:
        _joined(node, labels, (first, made))
    for made, name, axis in flow.stacks:
        shape, part = labels.shape(name), labels.shape(made)
        if shape is None or part is None or len(shape) != len(part) + 1:
            labels.pin_all(made, f"{node} stacks it to a shape that is not known")
            labels.set(name, [], f"an output of {node}")
            continue
        found = labels.axes(made)
        found.insert(axis % len(shape), None)
        labels.set(name, found, f"steps of {node}")


def _joined(node: Node, labels: Labels, sources: tuple[str, ...]) -> list[LabelAxis]:
    """Channels of a tensor that is one or the other: tied where both have them, else they stay."""
    if labels.shape(sources[0]) is None or labels.shape(sources[0]) != labels.shape(sources[1]):
        for name in sources:
            labels.pin_all(
                name, f"{node} gives '{sources[0]}' or '{sources[1]}', which differ in shape"
            )
        return []
    first, second = (labels.axes(name) for name in sources)
    result: list[LabelAxis] = []
    for a, b in zip(first, second, strict=True):
        if a is None or b is None:
            for found, other in ((a, sources[1]), (b, sources[0])):
                labels.pin(found, f"{node} joins it with '{other}', whose channels are not tracked")
            result.append(None)
        else:
            labels.tie(a, b)
            result.append(a)
    return result


SPECS = (
    OpSpec("If", _followed_bodies(_if), flow=_if, traits=Trait.BRANCHES),
    OpSpec("Loop", _followed_bodies(_loop), flow=_loop),
    OpSpec("Scan", _followed_bodies(_scan), since=9, flow=_scan),
)
