"""Operators that move data: the rule applies the operator itself to the label arrays.

A cut changes the constants these operators carry (split sizes, slice bounds, gather indices); each has a repair that
recomputes them from the kept channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_oamip.core.records import Node
from onnx_oamip.graph.ops import maps
from onnx_oamip.graph.ops.handles import Cuts, LabelAxis, Labels, Reader, Terms, integers, operand
from onnx_oamip.graph.ops.listed import followed
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Edit, EditRules, OpSpec, Trait

Shape = tuple[int, ...]


# ------------------------------------------------------------------------------------------------- permutation


def _transpose(node: Node, labels: Labels) -> None:
    axes = labels.axes(node.inputs[0])
    order = node.attrs.get("perm")
    if order is None:
        order = list(range(len(axes)))[::-1]
    labels.set(node.outputs[0], [axes[i] for i in order] if axes else [])


def _depth_to_space(node: Node, labels: Labels) -> None:
    """Channel ``c`` of the result is made of blocksize**2 channels of the input, which are one unit."""
    found = labels.label(node.inputs[0], 1)
    b = int(node.attrs["blocksize"])
    result = None
    if found is not None:
        crd = node.attrs.get("mode", "DCR") == "CRD"
        if crd:
            block = found.reshape(-1, b * b)
        else:
            block = found.reshape(b * b, -1).T
        labels.tie(block, block[:, :1])
        result = np.ascontiguousarray(block[:, 0])
    _pin_space(node, labels)
    labels.set(node.outputs[0], [None, result, None, None])


def _space_to_depth(node: Node, labels: Labels) -> None:
    found = labels.label(node.inputs[0], 1)
    b = int(node.attrs["blocksize"])
    _pin_space(node, labels)
    labels.set(
        node.outputs[0], [None, None if found is None else np.tile(found, b * b), None, None]
    )


def _pin_space(node: Node, labels: Labels) -> None:
    for axis in (0, 2, 3):
        labels.pin(labels.label(node.inputs[0], axis), f"it is a spatial axis of {node}")


# ---------------------------------------------------------------------------------------------- join and divide


def _concat(node: Node, labels: Labels) -> None:
    shapes = [labels.shape(n) for n in node.inputs]
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes):
        opaque(node, labels, f"{node} joins a tensor of unknown shape")
        return
    axis = int(node.attrs["axis"]) % len(known[0])
    result: list[LabelAxis] = []
    for a in range(len(known[0])):
        if a != axis:
            result.append(
                labels.unify([(n, a) for n in node.inputs], node) if _any(node, labels, a) else None
            )
            continue
        if not _any(node, labels, a):
            result.append(None)
            continue
        parts = []
        for name, shape in zip(node.inputs, known, strict=True):
            found = labels.label(name, a)
            parts.append(
                labels.fresh(shape[a], f"{node} joins it untracked") if found is None else found
            )
        result.append(np.concatenate(parts))
    labels.set(node.outputs[0], result)


def _any(node: Node, labels: Labels, axis: int) -> bool:
    return any(
        not labels.is_constant(n) and labels.label(n, axis) is not None for n in node.inputs if n
    )


def _split_op(node: Node, labels: Labels) -> None:
    name = node.inputs[0]
    shapes = [labels.shape(n) for n in node.outputs]
    shape = labels.shape(name)
    known = [s for s in shapes if s is not None]
    if shape is None or len(known) < len(shapes):
        opaque(node, labels, f"{node} has outputs of unknown shape")
        return
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    axes = labels.axes(name)
    bounds = np.cumsum([s[axis] for s in known])[:-1]
    sizes = operand(node, 1)
    found = axes[axis]
    if found is not None and sizes and labels.constant(sizes) is None:
        labels.pin(found, f"{node} takes its sizes from a computation")
    parts: list[LabelAxis] = [None] * len(known) if found is None else list(np.split(found, bounds))
    for out, part in zip(node.outputs, parts, strict=True):
        labels.set(out, [part if a == axis else x for a, x in enumerate(axes)])


def _split_repair(node: Node, cuts: Cuts) -> Edit:
    axis = int(node.attrs.get("axis", 0)) % len(cuts.shape(node.inputs[0]))
    if cuts.keep(node.inputs[0], axis) is None:
        return Edit()
    sizes = np.asarray([cuts.kept(out, axis) for out in node.outputs], np.int64)
    if node.version < 13:
        return Edit({"split": sizes.tolist()})
    return Edit({"num_outputs": None}, {1: sizes})


# ------------------------------------------------------------------------------------------------ pick and extend


def slice_bounds(
    node: Node,
    labels: Labels | Cuts,
    shape: Shape,
) -> dict[int, tuple[int, int, int]]:
    """Read the bounds of a Slice.

    Args:
        node: The node.
        labels: Any handle, for constants.
        shape: Shape of the data.

    Returns:
        (start, stop, step) by axis, as Python's slice takes them.

    Raises:
        KeyError: A bound is computed.
    """
    starts = integers(node, labels, "starts", 1)
    ends = integers(node, labels, "ends", 2)
    axes = integers(node, labels, "axes", 3)
    steps = integers(node, labels, "steps", 4)
    if starts is None or ends is None:
        raise KeyError("starts")
    if axes is None:
        where = np.arange(len(starts))
    else:
        where = axes % len(shape)
    if steps is None:
        by = np.ones(len(starts), np.int64)
    else:
        by = steps
    result = {}
    for a, start, stop, step in zip(
        where.tolist(),
        starts.tolist(),
        ends.tolist(),
        by.tolist(),
        strict=True,
    ):
        # Python clips bounds beyond either end as ONNX does; a negative stop beyond the start means "to the front".
        stop = None if step < 0 and stop < -shape[a] else stop
        result[a] = (start, stop, step)
    return result  # type: ignore[return-value]


def _sliced(node: Node, labels: Labels, rank: int) -> list[int]:
    """The axes that a Slice may shorten, whatever its bounds: all of them where even the list is computed."""
    try:
        axes = integers(node, labels, "axes", 3)
        starts = labels.shape(node.inputs[1])
    except KeyError:
        return list(range(rank))
    if axes is None:
        return list(range(starts[0] if starts else rank))
    return [int(a) for a in axes % rank]


def _slice(node: Node, labels: Labels) -> None:
    name = node.inputs[0]
    shape = labels.shape(name)
    if shape is None:
        opaque(node, labels, f"{node} reads a tensor of unknown shape")
        return
    axes = labels.axes(name)
    try:
        bounds = slice_bounds(node, labels, shape)
    except KeyError:
        out = labels.shape(node.outputs[0])
        result = list(axes)
        for a in _sliced(node, labels, len(shape)):
            labels.pin(axes[a], f"{node} takes its bounds from a computation")
            if out is None or out[a] != shape[a]:
                result[a] = None
        labels.set(node.outputs[0], result)
        return
    result = list(axes)
    for a, (start, stop, step) in bounds.items():
        found = axes[a]
        if found is None:
            continue
        if step != 1:
            labels.pin(found, f"{node} takes every {step}th of it")
        result[a] = found[start:stop:step]
    labels.set(node.outputs[0], result)


def _slice_repair(node: Node, cuts: Cuts) -> Edit:
    name = node.inputs[0]
    shape = cuts.shape(name)
    if all(cuts.keep(name, a) is None for a in range(len(shape))):
        return Edit()
    try:
        bounds = slice_bounds(node, cuts, shape)
    except KeyError:
        return Edit()  # computed bounds: the axes that they may move along were pinned
    cut = {a for a in bounds if cuts.keep(name, a) is not None}
    if not cut:
        return Edit()
    bounds_type = _bounds_type(node, cuts)
    starts = []
    ends = []
    for a, (start, stop, step) in bounds.items():
        keep = cuts.keep(name, a)
        if keep is not None and a in cut:
            low, high, _ = slice(start, stop, step).indices(shape[a])
            start = int(keep[:low].sum())
            stop = start + int(keep[low:high].sum())
        starts.append(start)
        ends.append(stop if stop is not None else np.iinfo(bounds_type).min)
    if "starts" in node.attrs:
        return Edit({"starts": starts, "ends": ends})
    return Edit(inputs={1: np.asarray(starts, bounds_type), 2: np.asarray(ends, bounds_type)})


def _bounds_type(node: Node, cuts: Cuts) -> np.dtype[Any]:
    """Element type of the bounds of a Slice, which may be int32 and must be one for all of them."""
    if "starts" in node.attrs:
        starts = None
    else:
        starts = cuts.constant(node.inputs[1])
    if starts is None:
        return np.dtype(np.int64)
    return starts.dtype


def _gather(node: Node, labels: Labels) -> None:
    data, index = node.inputs[:2]
    shape = labels.shape(data)
    index_shape = labels.shape(index)
    if shape is None or index_shape is None:
        opaque(node, labels, f"{node} reads a tensor of unknown shape")
        return
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    axes = labels.axes(data)
    found = axes[axis]
    picked = labels.constant(index)
    labels.pin_all(index, f"{node} uses it as an index")
    middle: list[LabelAxis] = [None] * len(index_shape)
    if found is not None:
        if picked is None:
            labels.pin(found, f"{node} picks from it at run time")
        elif picked.ndim == 1:
            middle = [found[picked]]
        else:
            labels.pin(np.atleast_1d(found[picked]).reshape(-1), f"{node} picks it by position")
    labels.set(node.outputs[0], [*axes[:axis], *middle, *axes[axis + 1 :]])


def _gather_repair(node: Node, cuts: Cuts) -> Edit:
    axis = int(node.attrs.get("axis", 0)) % len(cuts.shape(node.inputs[0]))
    keep = cuts.keep(node.inputs[0], axis)
    picked = cuts.constant(node.inputs[1])
    if keep is None or picked is None:
        return Edit()
    place = np.cumsum(keep) - 1
    picked = np.where(picked < 0, picked + len(keep), picked)
    if picked.ndim == 1:
        fixed = place[picked[keep[picked]]]
    else:
        fixed = place[picked]
    return Edit(inputs={1: fixed.astype(picked.dtype)})


def _pad_amounts(node: Node, labels: Labels, rank: int) -> dict[int, list[int | None]] | None:
    """Amounts before and behind every axis that a node pads, None for one that is computed."""
    axes = integers(node, labels, "axes", 3) if node.version >= 18 else None
    where = list(range(rank)) if axes is None else (axes % rank).tolist()
    if "pads" in node.attrs:
        amounts: list[int | None] | None = list(node.attrs["pads"])
    else:
        amounts = followed(node.inputs[1], labels)
    if amounts is None or len(amounts) != 2 * len(where):
        return None
    return {a: [amounts[i], amounts[i + len(where)]] for i, a in enumerate(where)}


def _pad(node: Node, labels: Labels) -> None:
    name = node.inputs[0]
    axes = labels.axes(name)
    try:
        amounts = _pad_amounts(node, labels, len(axes))
    except KeyError:
        amounts = None
    if amounts is None:
        opaque(node, labels, f"{node} takes its amounts from a computation")
        return
    result = list(axes)
    for a, (low, high) in amounts.items():
        found = axes[a]
        if found is None or (low == 0 and high == 0):
            continue
        if low is None or high is None:
            labels.pin(found, f"{node} takes its amounts from a computation")
            result[a] = None
        elif low < 0 or high < 0 or node.attrs.get("mode", "constant") != "constant":
            labels.pin(found, f"{node} crops or repeats along it")
            result[a] = None
        else:
            reason = f"{node} adds it as padding"
            result[a] = np.concatenate(
                [labels.fresh(low, reason), found, labels.fresh(high, reason)]
            )
    labels.set(node.outputs[0], result)


# --------------------------------------------------------------------------------------------------- order of positions


def _running_sum(node: Node, labels: Labels) -> None:
    name = node.inputs[0]
    axes = labels.axes(name)
    axis = labels.constant(node.inputs[1])
    if axis is None or labels.shape(name) is None:
        opaque(node, labels, f"{node} takes its axis from a computation")
        return
    labels.pin(axes[int(axis.reshape(-1)[0])], f"{node} sums along it")
    labels.set(node.outputs[0], axes)


def _reverse(node: Node, labels: Labels) -> None:
    axes = labels.axes(node.inputs[0])
    for attribute, usual in (("batch_axis", 1), ("time_axis", 0)):
        place = int(node.attrs.get(attribute, usual))
        if place < len(axes):
            labels.pin(axes[place], f"{node} reverses along it")
    labels.pin_all(node.inputs[1], f"{node} takes lengths from it")
    labels.set(node.outputs[0], axes)


# -------------------------------------------------------------------------------------------------- contiguous ranges


def taken_range(
    node: Node,
    tensor: str,
    graph: Reader,
) -> tuple[int, int, int] | None:
    """The contiguous range of its first input that a node gives.

    Args:
        node: Any node.
        tensor: The output in question.
        graph: Shapes and constants.

    Returns:
        (axis, start, stop), or None where the output is something else.
    """
    find = _RANGES.get(node.op)
    shape = graph.shape(node.inputs[0]) if node.inputs else None
    if find is None or shape is None:
        return None
    return find(node, tensor, shape, graph)


def _slice_range(
    node: Node,
    tensor: str,
    shape: Shape,
    graph: Reader,
) -> tuple[int, int, int] | None:
    del tensor  # there is one output
    starts = graph.integers(node, 1, "starts")
    ends = graph.integers(node, 2, "ends")
    axes = graph.integers(node, 3, "axes")
    steps = graph.integers(node, 4, "steps")
    if starts is None or ends is None or len(starts) != 1 or (steps or [1]) != [1]:
        return None
    computed_axes = axes is None and operand(node, 3) is not None
    if computed_axes:
        return None
    axis = (axes or [0])[0] % len(shape)
    start, stop, _ = slice(starts[0], ends[0]).indices(shape[axis])
    if start < stop:
        return (axis, start, stop)
    return None


def _split_range(
    node: Node,
    tensor: str,
    shape: Shape,
    graph: Reader,
) -> tuple[int, int, int] | None:
    axis = _axis(node, shape)
    place = node.outputs.index(tensor)
    sizes = [graph.shape(out) for out in node.outputs[: place + 1]]
    known = [size[axis] for size in sizes if size is not None]
    if len(known) != len(sizes):
        return None
    stop = sum(known)
    return axis, stop - known[-1], stop


def _gather_range(
    node: Node,
    tensor: str,
    shape: Shape,
    graph: Reader,
) -> tuple[int, int, int] | None:
    del tensor  # there is one output
    index = graph.constant(node.inputs[1])
    if index is None:
        return None
    axis = _axis(node, shape)
    places = index.reshape(-1).astype(np.int64) % max(shape[axis], 1)
    if not len(places) or not (np.diff(places) == 1).all():
        return None
    return axis, int(places[0]), int(places[-1]) + 1


def _axis(node: Node, shape: Shape) -> int:
    return int(node.attrs.get("axis", 0)) % max(len(shape), 1)


_RANGES = {"Slice": _slice_range, "Split": _split_range, "Gather": _gather_range}

# ------------------------------------------------------------------------------------------------------- encoding


def _transpose_encode(node: Node, terms: Terms) -> None:
    index = maps.places(terms.shape(node.inputs[0]))
    terms.affine(
        node.outputs[0],
        [(node.inputs[0], maps.gather(index.transpose(node.attrs.get("perm")), index.size))],
    )


def _concat_encode(node: Node, terms: Terms) -> None:
    """Every input's elements land where the operator puts its index array; constants land in the offset."""
    axis = int(node.attrs["axis"])
    shapes = [terms.shape(n) for n in node.inputs]
    absent = [np.full(s, -1, np.int64) for s in shapes]
    parts = []
    offset = np.zeros(terms.shape(node.outputs[0]))
    for i, (name, shape) in enumerate(zip(node.inputs, shapes, strict=True)):
        index = maps.places(shape)
        joined = np.concatenate([*absent[:i], index, *absent[i + 1 :]], axis=axis)
        value = terms.constant(name)
        if value is None:
            parts.append((name, maps.gather(joined, index.size)))
        else:
            offset[joined >= 0] = value.reshape(-1)[joined[joined >= 0]]
    terms.affine(node.outputs[0], parts, offset)


SPECS = (
    OpSpec(
        "Transpose",
        _transpose,
        encode=_transpose_encode,
        traits=Trait.MOVES | Trait.TRANSPOSES,
    ),
    OpSpec("DepthToSpace", _depth_to_space),
    OpSpec("SpaceToDepth", _space_to_depth),
    OpSpec("Concat", _concat, encode=_concat_encode, traits=Trait.JOINS),
    OpSpec("Split", _split_op, edit=EditRules(_split_repair)),
    OpSpec("Slice", _slice, edit=EditRules(_slice_repair), traits=Trait.SLICES),
    OpSpec("Gather", _gather, edit=EditRules(_gather_repair)),
    OpSpec("Pad", _pad),
    OpSpec("CumSum", _running_sum),
    OpSpec("ReverseSequence", _reverse),
)
