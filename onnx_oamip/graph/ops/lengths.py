"""Operators that repeat, resize or read along axes: an axis passes where its length does not change."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_oamip.core.records import Array, Node
from onnx_oamip.graph.ops.handles import Cuts, LabelAxis, Labels, operand
from onnx_oamip.graph.ops.listed import elements
from onnx_oamip.graph.ops.movement import slice_bounds
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Edit, EditRules, OpSpec


def _sized(
    node: Node,
    labels: Labels,
    slot: int,
    what: str,
) -> None:
    name = node.inputs[0]
    out = node.outputs[0]
    before = labels.shape(name)
    after = labels.shape(out)
    if before is None or after is None:
        opaque(node, labels, f"{node} has a shape that is not known before it runs")
        return
    source = operand(node, slot)
    axes = labels.axes(name)
    shift = len(after) - len(before)
    where = [int(a) % len(after) for a in node.attrs.get("axes", range(len(after)))]
    if source is None:
        computed = set()
    else:
        computed = {where[i] for i in _computed(source, len(where), labels)}
    result: list[LabelAxis] = [None] * len(after)
    for a, found in enumerate(axes):
        if found is None:
            continue
        if a + shift in computed:
            labels.pin(found, f"{node} takes its {what} from a computation")
        if before[a] == after[a + shift]:
            result[a + shift] = found
        else:
            labels.pin(found, f"{node} changes the length of this axis")
    labels.set(out, result)


def _computed(tensor: str, count: int, labels: Labels) -> list[int]:
    """Places of a list of ``count`` lengths whose value is not known before it runs."""
    known = elements(tensor, labels)
    if known is None:
        return list(range(count))
    return [place for place, value in enumerate(known) if value is None]


def _resize(node: Node, labels: Labels) -> None:
    _sized(node, labels, 3, "sizes")


def _upsample(node: Node, labels: Labels) -> None:
    _sized(node, labels, 1, "scales")


def _expand(node: Node, labels: Labels) -> None:
    """Follow the input's channels; copies along an axis of known length are equal, so any can be removed."""
    _sized(node, labels, 1, "shape")
    name = node.inputs[0]
    out = node.outputs[0]
    target = elements(node.inputs[1], labels)
    before = labels.shape(name)
    after = labels.shape(out)
    if target is None or before is None or after is None:
        return
    known = labels.axes(out)
    shift = len(after) - len(before)
    first = len(after) - len(target)
    copies = [
        a
        for a, n in enumerate(after)
        if n > 1
        and a >= first
        and target[a - first] is not None
        and (a < shift or before[a - shift] == 1)
    ]
    for a in copies:
        known[a] = labels.free(after[a])
    labels.set(out, known)


def _fill(node: Node, labels: Labels) -> None:
    """All elements are equal, so any index along an axis of constant length can be removed."""
    out = node.outputs[0]
    target = labels.constant(node.inputs[0])
    shape = labels.shape(out)
    if target is None or shape is None:
        labels.set(out, [], f"{node} takes its shape from a computation")
        return
    labels.set(out, [labels.free(n) if n > 1 else None for n in shape])


def _fill_repair(node: Node, cuts: Cuts) -> Edit:
    return _lengths(node, cuts, 0, None)


def _tile(node: Node, labels: Labels) -> None:
    _sized(node, labels, 1, "repeats")


def _resize_repair(node: Node, cuts: Cuts) -> Edit:
    if operand(node, 3) is None:
        return Edit()
    axes = node.attrs.get("axes")
    return _lengths(
        node,
        cuts,
        3,
        None if axes is None else [a % len(cuts.shape(node.outputs[0])) for a in axes],
    )


def _expand_repair(node: Node, cuts: Cuts) -> Edit:
    return _lengths(node, cuts, 1, None)


def _lengths(
    node: Node,
    cuts: Cuts,
    slot: int,
    axes: list[int] | None,
) -> Edit:
    out = node.outputs[0]
    value = cuts.constant(node.inputs[slot])
    if value is None:
        return _listed_lengths(node, cuts, slot, axes)
    # A target shorter than the result is aligned from the right (Expand).
    where = axes or list(range(len(cuts.shape(out)) - len(value), len(cuts.shape(out))))
    fixed: Array = value.copy()
    for i, a in enumerate(where):
        if cuts.keep(out, a) is not None and value[i] != 1:
            fixed[i] = cuts.kept(out, a)
    if (fixed == value).all():
        return Edit()
    return Edit(inputs={slot: fixed})


def _listed_lengths(
    node: Node,
    cuts: Cuts,
    slot: int,
    axes: list[int] | None,
) -> Edit:
    """Edit of a list of lengths that is concatenated; channels that a computed length could cut were pinned."""
    out = node.outputs[0]
    known = elements(node.inputs[slot], cuts)
    if known is None:
        return Edit()
    rank = len(cuts.shape(out))
    where = axes or list(range(rank - len(known), rank))
    changed = {
        place: cuts.kept(out, axis)
        for place, axis in enumerate(where)
        if cuts.keep(out, axis) is not None and known[place] not in (None, 1)
    }
    if changed:
        return Edit(lengths={slot: changed})
    return Edit()


Places = Sequence["int | None"]
"""Axis whose length every element of a list is; None for other elements."""


def _axes_that_matter(tensor: str, order: Places, labels: Labels) -> set[int]:
    """Axes whose lengths matter to the readers of a list, followed through operators that move its elements."""
    if not order or all(axis is None for axis in order):
        return set()
    readers = labels.readers(tensor)
    whole = {axis for axis in order if axis is not None}
    if labels.is_output(tensor) or not readers:
        return whole
    seen: set[int] = set()
    for reader in readers:
        moved = _moved(reader, tensor, order, labels)
        if moved is None:
            return whole
        seen |= _axes_that_matter(reader.outputs[0], moved, labels)
    return seen


def _moved(reader: Node, tensor: str, order: Places, labels: Labels) -> Places | None:
    """The elements of a list as a reader passes them on in its one output; None for another reader."""
    if reader.domain or len(reader.outputs) != 1:
        return None
    if reader.op in ("Size", "Shape"):  # the number of axes
        return []
    if reader.op in ("Identity", "Cast") or (
        reader.op in ("Squeeze", "Unsqueeze") and reader.inputs[0] == tensor
    ):
        return order
    if reader.op == "Gather" and reader.inputs[0] == tensor:
        picks = labels.constant(reader.inputs[1])
        if picks is None or max(map(abs, picks.reshape(-1).tolist()), default=0) > len(order):
            return None
        return [order[int(i)] for i in picks.reshape(-1)]
    if reader.op == "Slice" and reader.inputs[0] == tensor:
        try:
            ((start, stop, step),) = slice_bounds(reader, labels, (len(order),)).values()
        except (KeyError, ValueError):
            return None
        return order[start:stop:step]
    if reader.op == "Concat":
        return _joined(reader, tensor, order, labels)
    return None


def _joined(reader: Node, tensor: str, order: Places, labels: Labels) -> Places | None:
    """The elements of a list that is joined with others."""
    result: list[int | None] = []
    for name in reader.inputs:
        shape = labels.shape(name)
        if name == tensor:
            result += order
        elif shape is None or len(shape) != 1:
            return None
        else:
            result += [None] * shape[0]
    return result


def _shape(node: Node, labels: Labels) -> None:
    """Channel rule of Shape: pin the axes whose lengths matter to the readers of the list."""
    name = node.inputs[0]
    axes = labels.axes(name)
    start = int(node.attrs.get("start", 0))
    stop = node.attrs.get("end")
    order = list(range(len(labels.shape(name) or axes)))[slice(start, stop)]
    for a in _axes_that_matter(node.outputs[0], order, labels).intersection(range(len(axes))):
        labels.pin(axes[a], f"{node} reads its length at run time")
    labels.set(node.outputs[0], [])


SPECS = (
    OpSpec("Resize", _resize, since=11, edit=EditRules(_resize_repair)),
    OpSpec("Resize", _upsample, until=10),
    OpSpec("Upsample", _upsample),
    OpSpec("Expand", _expand, edit=EditRules(_expand_repair)),
    OpSpec("ConstantOfShape", _fill, since=9, edit=EditRules(_fill_repair)),
    OpSpec("Tile", _tile),
    OpSpec("Shape", _shape),
)
