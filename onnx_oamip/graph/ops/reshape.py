"""Operators that keep the order of elements and change the axes: what one axis becomes when axes merge and divide."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from onnx_oamip.core.records import Ints, Node
from onnx_oamip.graph.ops import maps
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import (
    Cuts,
    Edit,
    EditRules,
    LabelAxis,
    Labels,
    OpSpec,
    Terms,
    Trait,
    integers,
    operand,
)

Shape = tuple[int, ...]


def blocks(before: Shape, after: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of axes (length above 1) of equal product on both sides. Nothing for unequal sizes.

    >>> list(blocks((2, 3, 4), (2, 12)))
    [([0], [0]), ([1, 2], [1])]
    """
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        pa, pb = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while pa != pb:
            if pa < pb:
                if i == len(left):
                    return
                pa *= before[left[i]]
                a.append(left[i])
                i += 1
            else:
                if j == len(right):
                    return
                pb *= after[right[j]]
                b.append(right[j])
                j += 1
        yield a, b


def reshaped(node: Node, labels: Labels, fixed: bool) -> None:
    """Label arrays of any reshape with known shapes; ``fixed``: the target is a constant we can repair."""
    name, result_name = node.inputs[0], node.outputs[0]
    before, after = labels.shape(name), labels.shape(result_name)
    if before is None or after is None or 0 in before:
        opaque(node, labels, f"{node} has a shape that is not known before it runs")
        return
    axes = labels.axes(name)
    result: list[LabelAxis] = [None] * len(after)
    for axis, n in enumerate(before):
        if n == 1:
            labels.pin(axes[axis], f"it is the only index of an axis that {node} reshapes")
    for left, right in blocks(before, after):
        tracked = [a for a in left if axes[a] is not None]
        if not tracked:
            continue
        fine = refined([before[a] for a in left], [after[b] for b in right])
        if len(left) == len(right) == 1:
            result[right[0]] = axes[left[0]]
        elif not fixed:
            for a in tracked:
                labels.pin(axes[a], f"{node} takes its target shape from a computation")
        elif fine is None:
            for a in tracked:
                labels.pin(axes[a], f"{node} regroups it across axes that do not line up")
        else:
            _regroup(node, labels, (axes, left), (result, right), fine)
    labels.set(result_name, result)


def refined(before: list[int], after: list[int]) -> tuple[list[list[int]], list[list[int]]] | None:
    """The coarsest lengths that make up both: those inside every axis before, and inside every axis after.

    >>> refined([8, 5], [2, 20])
    ([[2, 4], [5]], [[2], [4, 5]])
    """
    ends = [np.cumprod(x).tolist() for x in (before, after)]
    cuts = sorted({*ends[0], *ends[1]})
    if any(b % a for a, b in pairwise(cuts)):
        return None
    runs: tuple[list[list[int]], list[list[int]]] = ([], [])
    for side, stops in zip(runs, ends, strict=True):
        low = 1
        for stop in stops:
            inside = [c for c in cuts if low < c <= stop]
            side.append([c // p for p, c in zip([low, *inside], inside, strict=False)])
            low = stop
    return runs


def _regroup(
    node: Node,
    labels: Labels,
    source: tuple[list[LabelAxis], list[int]],
    target: tuple[list[LabelAxis], list[int]],
    fine: tuple[list[list[int]], list[list[int]]],
) -> None:
    """Divide every axis into the common lengths, then merge those that make up a new axis."""
    parts: list[LabelAxis] = []
    for a, sizes in zip(source[1], fine[0], strict=True):
        found = source[0][a]
        pieces: list[LabelAxis] = [None] * len(sizes)
        if found is not None and len(sizes) == 1:
            pieces[0] = found
        elif found is not None:
            place, pieces_found = _split(node, labels, found, tuple(sizes))
            pieces[place] = pieces_found
        parts += pieces
    at = 0
    for b, sizes in zip(target[1], fine[1], strict=True):
        run = list(range(at, at + len(sizes)))
        at += len(sizes)
        if any(parts[i] is not None for i in run):
            target[0][b] = _merge(node, labels, parts, run, sizes)


def _merge(
    node: Node, labels: Labels, axes: list[LabelAxis], left: list[int], sizes: list[int]
) -> Ints:
    """Several axes become one: the index set of a unit is a strided run of the merged axis."""
    found: list[tuple[int, Ints]] = [
        (i, x) for i, a in enumerate(left) if (x := axes[a]) is not None
    ]
    # Only one tracked axis can stay free: the one with the most channels.
    place, free = max(found, key=lambda item: item[1].size)
    for i, other in found:
        if i != place:
            labels.pin(other, f"{node} merges it with another channel axis")
    view = [1] * len(sizes)
    view[place] = -1
    return np.ascontiguousarray(np.broadcast_to(free.reshape(view), sizes)).reshape(-1)


def _split(node: Node, labels: Labels, found: LabelAxis, sizes: Shape) -> tuple[int, Ints]:
    """One axis becomes several: keep the axis along which labels vary, tie across the others.

    Where labels vary along several axes (packed heads, channel shuffle) one must be chosen: by default the last,
    so that slot ``j`` of every block goes together; the first where every block is then normalised on its own
    (GroupNorm as torch exports it).
    """
    assert found is not None
    block = found.reshape(sizes)
    readers = labels.readers(node.outputs[0])
    alone = bool(readers) and all(r.op == "InstanceNormalization" for r in readers)
    varying = [i for i in range(len(sizes)) if (block != block.take([0], i)).any()]
    place = varying[0] if len(varying) == 1 else labels.choice(node, 0 if alone else len(sizes) - 1)
    first = block
    for i in range(len(sizes)):
        if i != place:
            first = first.take([0], i)
    labels.tie(block, first)
    return place, first.reshape(-1)


def _reshape(node: Node, labels: Labels) -> None:
    fixed = "shape" in node.attrs or labels.constant(node.inputs[1]) is not None
    reshaped(node, labels, fixed)


def _same_elements(node: Node, labels: Labels) -> None:
    reshaped(node, labels, True)


def _reshape_repair(node: Node, cuts: Cuts) -> Edit:
    out = node.outputs[0]
    if "shape" not in node.attrs and cuts.constant(node.inputs[1]) is None:
        return Edit()  # a computed target: what it could cut was pinned
    target = integers(node, cuts, "shape", 1)
    assert target is not None
    fixed = target.copy()
    for axis, value in enumerate(target):
        if value > 0 and cuts.keep(out, axis) is not None:
            fixed[axis] = cuts.kept(out, axis)
    if (fixed == target).all():
        return Edit()
    return Edit({"shape": fixed.tolist()}) if "shape" in node.attrs else Edit(inputs={1: fixed})


def _squeeze_repair(node: Node, cuts: Cuts) -> Edit:
    """Without axes it takes every axis of one: an axis of which one channel is left must not go with them."""
    source = node.inputs[0]
    shape = cuts.shape(source)
    narrowed = any(n > 1 and cuts.kept(source, a) == 1 for a, n in enumerate(shape))
    if operand(node, 1) or "axes" in node.attrs or not narrowed:
        return Edit()
    axes = [a for a, n in enumerate(shape) if n == 1]
    return (
        Edit({"axes": axes}) if node.version < 13 else Edit(inputs={1: np.asarray(axes, np.int64)})
    )


def _encode(node: Node, terms: Terms) -> None:
    index = maps.places(terms.shape(node.inputs[0]))
    terms.affine(node.outputs[0], [(node.inputs[0], maps.gather(index, index.size))])


_TRAITS = Trait.MOVES | Trait.RESHAPES
SPECS = (
    OpSpec("Reshape", _reshape, edit=EditRules(_reshape_repair), encode=_encode, traits=_TRAITS),
    OpSpec("Flatten", _same_elements, encode=_encode, traits=_TRAITS),
    OpSpec(
        "Squeeze", _same_elements, edit=EditRules(_squeeze_repair), encode=_encode, traits=_TRAITS
    ),
    OpSpec("Unsqueeze", _same_elements, encode=_encode, traits=_TRAITS),
)
