"""Operators that keep the order of elements and change the axes, which they merge and divide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from onnx_oamip.core.records import Ints, Node
from onnx_oamip.graph.ops import maps
from onnx_oamip.graph.ops.handles import Cuts, LabelAxis, Labels, Terms, integers, operand
from onnx_oamip.graph.ops.listed import elements
from onnx_oamip.graph.ops.norm import crosses_seam
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Edit, EditRules, OpSpec, Trait

Shape = tuple[int, ...]
_COMPUTED = "takes its target shape from a computation"
_REGROUPED = "regroups it across axes that do not line up"


def blocks(before: Shape, after: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of axes (length above 1) of equal product on both sides.

    >>> list(blocks((2, 3, 4), (2, 12)))
    [([0], [0]), ([1, 2], [1])]

    Args:
        before: Shape in front of a reshape.
        after: Shape behind it.

    Yields:
        Axes before and axes after, up to where the sizes differ.
    """
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    while left and right:
        a = [left.pop(0)]
        b = [right.pop(0)]
        size_a = before[a[0]]
        size_b = after[b[0]]
        while size_a != size_b:
            rest = left if size_a < size_b else right
            if not rest:
                return
            axis = rest.pop(0)
            if rest is left:
                size_a *= before[axis]
                a.append(axis)
            else:
                size_b *= after[axis]
                b.append(axis)
        yield a, b


def reshaped(node: Node, labels: Labels, known: Sequence[bool] | None = None) -> None:
    """Channel rule of any reshape with known shapes.

    Args:
        node: The node.
        labels: Labels of the graph.
        known: Whether the length of an axis of the result is a number that can be repaired; default: of every axis.
    """
    name = node.inputs[0]
    result_name = node.outputs[0]
    before = labels.shape(name)
    after = labels.shape(result_name)
    if before is None or after is None or 0 in before:
        opaque(node, labels, f"{node} has a shape that is not known before it runs")
        return
    axes = labels.axes(name)
    result: list[LabelAxis] = [None] * len(after)
    for axis, n in enumerate(before):
        if n == 1:
            labels.pin(axes[axis], f"it is the only index of an axis that {node} reshapes")
    for left, right in blocks(before, after):
        tracked = [axes[a] for a in left if axes[a] is not None]
        if not tracked:
            continue
        cuttable = [b for b in right if known is None or known[b]]
        fine = refined([before[a] for a in left], [after[b] for b in right])
        if not cuttable or fine is None:
            why = _COMPUTED if fine is not None else _REGROUPED
            reason = f"{node} {why}"
            for found in tracked:
                labels.pin(found, reason)
            continue
        if len(left) == len(right) == 1:
            result[right[0]] = axes[left[0]]
            continue
        parts = _divide(node, labels, [axes[a] for a in left], fine[0])
        for axis, merged in zip(right, _merged(node, labels, parts, fine[1]), strict=True):
            if axis in cuttable:
                result[axis] = merged
            else:
                labels.pin(merged, f"{node} {_COMPUTED}")
    labels.set(result_name, result)


def refined(before: list[int], after: list[int]) -> tuple[list[list[int]], list[list[int]]] | None:
    """Find the coarsest lengths that make up the axes on both sides of a reshape.

    >>> refined([8, 5], [2, 20])
    ([[2, 4], [5]], [[2], [4, 5]])

    Args:
        before: Lengths of axes.
        after: Lengths of axes of the same product.

    Returns:
        The lengths inside every axis before and inside every axis after, or None where the axes do not line up.
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
            steps = zip([low, *inside], inside, strict=False)
            side.append([high // previous for previous, high in steps])
            low = stop
    return runs


def _divide(
    node: Node,
    labels: Labels,
    axes: list[LabelAxis],
    lengths: list[list[int]],
) -> list[LabelAxis]:
    """Divide every axis into its lengths; at most one part of an axis is tracked."""
    parts: list[LabelAxis] = []
    for found, sizes in zip(axes, lengths, strict=True):
        pieces: list[LabelAxis] = [None] * len(sizes)
        if found is not None and len(sizes) == 1:
            pieces[0] = found
        elif found is not None:
            place, piece = _split(node, labels, found, tuple(sizes))
            pieces[place] = piece
        parts += pieces
    return parts


def _merged(
    node: Node,
    labels: Labels,
    parts: list[LabelAxis],
    lengths: list[list[int]],
) -> Iterator[LabelAxis]:
    """Merge runs of parts into axes of these lengths."""
    at = 0
    for sizes in lengths:
        run = parts[at : at + len(sizes)]
        at += len(sizes)
        tracked = any(part is not None for part in run)
        yield _merge(node, labels, run, sizes) if tracked else None


def _merge(
    node: Node,
    labels: Labels,
    parts: list[LabelAxis],
    sizes: list[int],
) -> Ints:
    """Several axes become one: the index set of a unit is a strided run of the merged axis."""
    tracked = [(i, part) for i, part in enumerate(parts) if part is not None]
    # Only one tracked axis can stay free: the one with the most channels.
    place, free = max(tracked, key=lambda item: item[1].size)
    for i, other in tracked:
        if i != place:
            labels.pin(other, f"{node} merges it with another channel axis")
    view = [1] * len(sizes)
    view[place] = -1
    repeated = np.broadcast_to(free.reshape(view), sizes)
    return np.ascontiguousarray(repeated).reshape(-1)


def _split(
    node: Node,
    labels: Labels,
    found: Ints,
    sizes: Shape,
) -> tuple[int, Ints]:
    """One axis becomes several: keep the axis along which labels vary, tie across the others.

    Where labels vary along several axes (packed heads, channel shuffle) one must be chosen: by default the last,
    so that a unit is slot ``j`` of every block; the first where every block is then normalised on its own
    (GroupNorm as torch exports it).
    """
    block = found.reshape(sizes)
    readers = labels.readers(node.outputs[0])
    alone = bool(readers) and all(r.op == "InstanceNormalization" for r in readers)
    varying = [i for i in range(len(sizes)) if (block != block.take([0], i)).any()]
    default = 0 if alone else len(sizes) - 1
    place = varying[0] if len(varying) == 1 else labels.choice(node, default)
    first = block
    for i in range(len(sizes)):
        if i != place:
            first = first.take([0], i)
    labels.tie(block, first)
    return place, first.reshape(-1)


def _group_norm_end(first: Node, graph: Labels | Cuts) -> Node | None:
    """The second reshape of a GroupNorm written with an InstanceNormalization, by the first; None for other nodes."""
    readers = graph.readers(first.outputs[0])
    if len(readers) != 1 or readers[0].op != "InstanceNormalization" or readers[0].domain:
        return None
    behind = graph.readers(readers[0].outputs[0])
    reshaped_back = len(behind) == 1 and behind[0].op == first.op and not behind[0].domain
    return behind[0] if reshaped_back and behind[0].inputs[0] == readers[0].outputs[0] else None


def _by_channel(first: Node, labels: Labels) -> Node | None:
    """The second reshape of a GroupNorm whose groups cross a seam, so that units are channels; None for others."""
    last = _group_norm_end(first, labels)
    if last is None or _known(last, labels)[1:2] != [True]:
        return None
    name, blocks = first.inputs[0], first.outputs[0]
    shapes = [labels.shape(tensor) for tensor in (name, blocks, last.outputs[0])]
    if any(shape is None or len(shape) < 3 for shape in shapes) or shapes[0] != shapes[2]:
        return None
    before, inside, _ = (shape or () for shape in shapes)
    found = labels.label(name, 1)
    visible = any(labels.is_output(tensor) for tensor in (blocks, last.inputs[0]))
    grouped = len(inside) == 3 and inside[0] == before[0] and before[1] % inside[1] == 0
    if found is None or visible or not grouped or not crosses_seam(found, inside[1]):
        return None
    return last


def _first_reshape(last: Node, labels: Labels) -> Node | None:
    """The first reshape of a GroupNorm that is written in channels, by the second; None for other nodes."""
    norm = labels.producer(last.inputs[0])
    first = (
        None if norm is None or norm.domain or not norm.inputs else labels.producer(norm.inputs[0])
    )
    if first is None or first.domain or first.op != last.op:
        return None
    end = _by_channel(first, labels)
    return first if end is not None and end.name == last.name else None


def _known(node: Node, labels: Labels) -> list[bool]:
    """Test for an axis of the result whose length is a number, not one that is read at run time."""
    rank = len(labels.shape(node.outputs[0]) or ())
    if "shape" in node.attrs:
        return [True] * rank
    target = elements(node.inputs[1], labels)
    if target is None or len(target) != rank:
        return [False] * rank
    return [length is not None for length in target]


def _reshape(node: Node, labels: Labels) -> None:
    name, out = node.inputs[0], node.outputs[0]
    if _by_channel(node, labels) is not None:
        for axis, found in enumerate(labels.axes(name)):
            if axis != 1:
                labels.pin(found, f"{node} divides it into groups that are normalised")
        labels.consume(node, (name, 1), None)
        labels.set(out, [], f"{node} divides it into groups that are normalised")
        return
    first = _first_reshape(node, labels)
    if first is not None:
        rank = len(labels.shape(out) or ())
        channels = labels.label(first.inputs[0], 1)
        labels.set(out, [channels if axis == 1 else None for axis in range(rank)])
        return
    reshaped(node, labels, _known(node, labels))


def _same_elements(node: Node, labels: Labels) -> None:
    reshaped(node, labels)


def _reshape_repair(node: Node, cuts: Cuts) -> Edit:
    name, out = node.inputs[0], node.outputs[0]
    if all(cuts.keep(name, axis) is None for axis in range(len(cuts.shape(name)))):
        # Behind a normalisation of all channels, the kept ones are taken from the result.
        return Edit()
    last = _group_norm_end(node, cuts)
    if last is not None and cuts.keep(out, 1) is None:
        return Edit(spread=1, until=last.name)
    if "shape" not in node.attrs and cuts.constant(node.inputs[1]) is None:
        return _repair_listed(node, cuts)
    target = integers(node, cuts, "shape", 1)
    assert target is not None
    fixed = target.copy()
    for axis, value in enumerate(target):
        if value > 0 and cuts.keep(out, axis) is not None:
            fixed[axis] = cuts.kept(out, axis)
    if (fixed == target).all():
        return Edit()
    if "shape" in node.attrs:
        return Edit({"shape": fixed.tolist()})
    return Edit(inputs={1: fixed})


def _repair_listed(node: Node, cuts: Cuts) -> Edit:
    """Repair of a target that is joined from lengths; the axes that a computed length would change were pinned."""
    out = node.outputs[0]
    target = elements(node.inputs[1], cuts) or []
    changed = {
        axis: cuts.kept(out, axis)
        for axis, length in enumerate(target)
        if length is not None and length > 0 and cuts.keep(out, axis) is not None
    }
    return Edit(lengths={1: changed}) if changed else Edit()


def _squeeze_repair(node: Node, cuts: Cuts) -> Edit:
    """Without axes it drops every axis of length 1: one of which a single channel is left must not be dropped."""
    source = node.inputs[0]
    shape = cuts.shape(source)
    narrowed = any(n > 1 and cuts.kept(source, a) == 1 for a, n in enumerate(shape))
    if operand(node, 1) or "axes" in node.attrs or not narrowed:
        return Edit()
    axes = [a for a, n in enumerate(shape) if n == 1]
    if node.version < 13:
        return Edit({"axes": axes})
    return Edit(inputs={1: np.asarray(axes, np.int64)})


def _encode(node: Node, terms: Terms) -> None:
    index = maps.places(terms.shape(node.inputs[0]))
    same = maps.gather(index, index.size)
    terms.affine(node.outputs[0], [(node.inputs[0], same)])


_TRAITS = Trait.MOVES | Trait.RESHAPES
SPECS = (
    OpSpec("Reshape", _reshape, edit=EditRules(_reshape_repair), encode=_encode, traits=_TRAITS),
    OpSpec("Flatten", _same_elements, encode=_encode, traits=_TRAITS),
    OpSpec(
        "Squeeze",
        _same_elements,
        edit=EditRules(_squeeze_repair),
        encode=_encode,
        traits=_TRAITS,
    ),
    OpSpec("Unsqueeze", _same_elements, encode=_encode, traits=_TRAITS),
)
