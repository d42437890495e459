"""Rules that replace the computed target shape of an operator by a constant that is provably the same.

An exporter computes the target of a Reshape, Expand or Resize from the shapes of other tensors, although only a batch
or a sequence length is open. ``shape_folding`` runs these rules through a :class:`Targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from onnx_oamip.graph.symbolic_dims import Dims, Entries, Size, Unknown, divide

BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})
"""Operators that repeat their operands to a common shape themselves."""


def is_list_of_lengths(node: NodeProto) -> bool:
    """Recognise a list that is joined from single numbers and lengths.

    Args:
        node: The producer of the list.

    Returns:
        True if :meth:`Targets.joined` made it.
    """
    return node.op_type == "Concat" and node.name.endswith("_node")


class Targets(Protocol):
    """The handle of a rule for targets: known lengths and values, and the changes that a rule can make."""

    @property
    def version(self) -> int:
        """Opset of the default domain."""
        ...

    def producer(self, tensor: str, op: str) -> NodeProto | None:
        """Return the producer of a tensor if it is a given operator.

        Args:
            tensor: Name of the tensor.
            op: Name of the operator.

        Returns:
            The node, or None.
        """
        ...

    def consumers(self, tensor: str) -> Sequence[NodeProto]:
        """Return the consumers of a tensor.

        Args:
            tensor: Its name.

        Returns:
            Nodes in the order of the graph.
        """
        ...

    def is_output(self, tensor: str) -> bool:
        """Check whether a tensor is a graph output.

        Args:
            tensor: Its name.

        Returns:
            True for graph outputs.
        """
        ...

    def dims(self, tensor: str) -> Dims | None:
        """Return the dimensions of a tensor as declared or inferred.

        Args:
            tensor: Its name.

        Returns:
            A number, a symbol, a size or None per axis; None for an unknown rank.
        """
        ...

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """Return the element type of a tensor.

        Args:
            tensor: Name of a constant, or of a tensor whose entries are known.

        Returns:
            The type.
        """
        ...

    def lengths(self, tensor: str) -> Entries | None:
        """Return the dimensions of a tensor in symbolic form.

        Args:
            tensor: Its name.

        Returns:
            A number or a polynomial of symbols per axis; None where an axis is unknown.
        """
        ...

    def entries(self, tensor: str) -> Entries | None:
        """Return the elements of an integer tensor in symbolic form.

        Args:
            tensor: Its name.

        Returns:
            A number or a polynomial of symbols per element; None where an element is unknown, or for a tensor that is
            no list.
        """
        ...

    def constant(self, stem: str, value: npt.NDArray[Any]) -> str:
        """Add a constant to the graph.

        Args:
            stem: Beginning of its name.
            value: Its value.

        Returns:
            Its name, made unique.
        """
        ...

    def read(self, node: NodeProto, slot: int, name: str) -> None:
        """Replace an input of a node.

        Args:
            node: The node.
            slot: Position of the input.
            name: The tensor to read instead.
        """
        ...

    def joined(
        self,
        at: int,
        node: NodeProto,
        slot: int,
        *,
        wanted: Sequence[Any],
        source: Sequence[int],
    ) -> None:
        """Replace a list that a node reads by one that is joined from constants and from lengths of tensors.

        Args:
            at: Position of the node in the graph; inserted nodes stand before it.
            node: The node.
            slot: Position of the input that holds the list.
            wanted: Entries of the new list, numbers or symbols.
            source: Position of every entry in the old list, from which symbols without a known tensor are taken.
        """
        ...

    def expanded(
        self,
        at: int,
        node: NodeProto,
        *,
        known: Sequence[int],
        wanted: Sequence[Any],
    ) -> None:
        """Let a node make a tensor of known lengths, and expand that to lengths taken where they come from.

        Args:
            at: Place of the node in the graph.
            node: The node, whose input is a list of lengths.
            known: Lengths of the tensor that it makes, 1 for one that is open.
            wanted: Lengths of the expansion: a size for one that is open, 1 for the others.
        """
        ...

    def canonical(self, name: str) -> bool:
        """Check whether a list is joined from single numbers and lengths already.

        Args:
            name: Name of the list.

        Returns:
            True if no rule needs to rewrite it.
        """
        ...

    def become_transpose(
        self,
        node: NodeProto,
        source: str,
        perm: Sequence[int],
    ) -> None:
        """Turn a node into a transposition of another tensor.

        Args:
            node: The node.
            source: The tensor to transpose.
            perm: Axes of ``source`` in the order of the result.
        """
        ...


TargetRule = Callable[[NodeProto, int, Targets], None]
"""Rewrites the target of a node at a place of the graph."""


def _merged_transpose(node: NodeProto, edit: Targets) -> bool:
    """Replace a merge of leading axes, a transposition of the others and the division by one transposition.

    torch's exporter writes so the transposed keys of ``scaled_dot_product_attention``. Returns whether it was one.
    """
    transpose = edit.producer(node.input[0], "Transpose")
    if transpose is None:
        merge = None
    else:
        merge = edit.producer(transpose.input[0], "Reshape")
    if transpose is None or merge is None:
        return False
    before = edit.lengths(merge.input[0])
    merged = edit.entries(merge.input[1])
    after = edit.entries(node.input[1])
    orders = [list(a.ints) for a in transpose.attribute if a.name == "perm"]
    if before is None or merged is None or after is None or not orders or orders[0][0] != 0:
        return False
    lead = len(before) - len(merged) + 1
    if lead < 1 or len(after) != len(before):
        return False
    others = [lead + axis - 1 for axis in orders[0][1:]]
    perm = [*range(lead), *others]
    merges_only_leading = list(merged[1:]) == list(before[lead:])
    restores_leading = list(after) == [before[axis] for axis in perm]
    literal = all(isinstance(length, Size) or length >= 1 for length in after)
    if not (merges_only_leading and restores_leading and literal):
        return False
    edit.become_transpose(node, merge.input[0], perm)
    return True


def _reshape(node: NodeProto, at: int, edit: Targets) -> None:
    """A target in numbers: computed where the list is known, else from the inferred dimensions."""
    if _merged_transpose(node, edit):
        return
    target = edit.entries(node.input[1])
    zero_flags = [a for a in node.attribute if a.name == "allowzero"]
    zeros_are_lengths = any(a.i for a in zero_flags)
    if zeros_are_lengths and (target is None or _has_zero(target)):
        return
    before = edit.lengths(node.input[0])
    wanted = None
    if target is not None and before is not None:
        wanted = _numeric_target(list(target), before)
    if wanted is None:
        wanted = static_target(edit.dims(node.input[0]), edit.dims(node.output[0]))
    if wanted is None:
        _join_target(node, at, edit)
        return
    _read_numbers(node, 1, wanted, edit, suffix="target")
    for attribute in zero_flags:  # a zero of the new target copies a length
        node.attribute.remove(attribute)


def _join_target(node: NodeProto, at: int, edit: Targets) -> None:
    """A target with several open lengths, read as a whole from a shape: joined, so that its numbers can be changed."""
    target = edit.entries(node.input[1])
    if target is None or edit.producer(node.input[1], "Concat") is not None:
        return
    widths = [value for value in target if not isinstance(value, Size)]
    if max(widths, default=1) > 1:
        edit.joined(at, node, 1, wanted=list(target), source=range(len(target)))


def _has_zero(target: Entries) -> bool:
    return any(not isinstance(value, Size) and value == 0 for value in target)


def _read_numbers(
    node: NodeProto,
    slot: int,
    values: Sequence[int],
    edit: Targets,
    *,
    suffix: str,
) -> None:
    """Let a node read a constant list."""
    name = edit.constant(f"{node.output[0]}_{suffix}", np.asarray(values, np.int64))
    edit.read(node, slot, name)


def _numeric_target(target: list[Any], before: Entries) -> list[int] | None:
    """The same target in numbers: 0 for a copied length, -1 for at most one that is not known."""
    full = [_copied(value, axis, before) for axis, value in enumerate(target)]
    if -1 in full:  # the length that is left for it
        place = full.index(-1)
        rest = [value for axis, value in enumerate(full) if axis != place]
        try:
            full[place] = divide(_product(before), _product(rest))
        except Unknown:
            full[place] = -1
    result = []
    for axis, value in enumerate(full):
        if not isinstance(value, Size):
            result.append(int(value))
        elif axis < len(before) and before[axis] == value:
            result.append(0)
        else:
            result.append(-1)
    if result.count(-1) <= 1:
        return result
    return None


def _copied(value: Any, axis: int, before: Entries) -> Any:
    """An element of a target, the length that it copies where it is a zero."""
    copies = isinstance(value, int) and value == 0 and axis < len(before)
    return before[axis] if copies else value


def _product(values: Any) -> Any:
    total: Any = 1
    for value in values:
        total = total * value
    return total


def static_target(before: Dims | None, after: Dims | None) -> list[int] | None:
    """Find a constant target for a reshape.

    Args:
        before: Dimensions of its input.
        after: Dimensions of its output.

    Returns:
        The target, 0 for a copied length and -1 for at most one that is not known; None where there is no provably
        equal one.
    """
    if before is None or after is None or 0 in after:
        return None
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif size is not None and axis < len(before) and before[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) <= 1:
        return target
    return None


def _expand(node: NodeProto, at: int, edit: Targets) -> None:
    """A target of 1 for every axis that keeps its length, whatever the length."""
    target = edit.entries(node.input[1])
    before = edit.lengths(node.input[0])
    if target is None or before is None or edit.canonical(node.input[1]):
        return
    shift = len(target) - len(before)
    wanted = []
    for axis, value in enumerate(target):
        kept = axis >= shift and value == before[axis - shift]
        wanted.append(1 if kept else value)
    open_lengths = sum(isinstance(value, Size) for value in wanted)
    if not open_lengths:
        _read_numbers(node, 1, wanted, edit, suffix="target")
    elif open_lengths < len(wanted):
        edit.joined(at, node, 1, wanted=wanted, source=range(len(wanted)))


def _fill(node: NodeProto, at: int, edit: Targets) -> None:
    """Fills the known lengths by a constant target, which can be cut, and expands the result along the open ones."""
    target = edit.entries(node.input[0])
    if target is None:
        return
    is_open = [isinstance(value, Size) for value in target]
    known = [1 if isinstance(value, Size) else int(value) for value in target]
    if not any(is_open) or max(known, default=1) <= 1:
        return
    wanted = [value if isinstance(value, Size) else 1 for value in target]
    edit.expanded(at, node, known=known, wanted=wanted)


def _resize(node: NodeProto, at: int, edit: Targets) -> None:
    """Sizes only of the axes that change."""
    if len(node.input) < 4 or not node.input[3] or edit.canonical(node.input[3]):
        return
    target = edit.entries(node.input[3])
    before = edit.lengths(node.input[0])
    named = {a.name for a in node.attribute}
    if target is None or before is None or "axes" in named or len(target) != len(before):
        return
    changed = [axis for axis, value in enumerate(target) if value != before[axis]]
    wanted = [target[axis] for axis in changed]
    known = not any(isinstance(value, Size) for value in wanted)
    if not changed:
        return
    if edit.version >= 18 and "keep_aspect_ratio_policy" not in named:
        node.attribute.append(helper.make_attribute("axes", changed))
        if known:
            _read_numbers(node, 3, wanted, edit, suffix="sizes")
        else:
            edit.joined(at, node, 3, wanted=wanted, source=changed)
        return
    # Older versions take sizes of all axes only, but factors of 1 for those that stay.
    factors = [1.0] * len(before)
    for axis, size in zip(changed, wanted, strict=True):
        old = before[axis]
        if not known or not isinstance(old, int) or size % old:
            edit.joined(at, node, 3, wanted=list(target), source=range(len(target)))
            return
        factors[axis] = size / old
    scales = edit.constant(f"{node.output[0]}_scales", np.asarray(factors, np.float32))
    edit.read(node, 2, scales)
    del node.input[3:]


def _slice(node: NodeProto, at: int, edit: Targets) -> None:
    """An end at the length of its axis becomes the largest integer, so that it holds for any length."""
    del at
    ends = edit.entries(node.input[2])
    lengths = edit.lengths(node.input[0])
    axes = _slice_axes(node, edit)
    if ends is None or lengths is None or axes is None or len(axes) != len(ends):
        return
    if not all(-len(lengths) <= axis < len(lengths) for axis in axes):
        return  # an invalid node, which the runtime refuses
    dtype = edit.dtype(node.input[2])  # starts, ends and axes have one type
    longest = np.iinfo(dtype).max
    wanted = [
        longest if end == lengths[axis] else end for axis, end in zip(axes, ends, strict=True)
    ]
    if not any(isinstance(value, Size) for value in wanted):
        value = np.asarray(wanted, dtype)
        edit.read(node, 2, edit.constant(f"{node.output[0]}_ends", value))


def _slice_axes(node: NodeProto, edit: Targets) -> list[int] | None:
    """Axes of a Slice with steps of one; None where they are computed, or a step is another."""
    if len(node.input) > 4:
        steps = edit.entries(node.input[4])
        if steps is None or any(step != 1 for step in steps):
            return None
    if len(node.input) > 3 and node.input[3]:
        axes = edit.entries(node.input[3])
    else:
        ends = edit.entries(node.input[2])
        axes = np.arange(0 if ends is None else len(ends)).astype(object)
    if axes is None or any(isinstance(axis, Size) for axis in axes):
        return None
    return [int(axis) for axis in axes]


def drop_expand(node: NodeProto, edit: Targets) -> None:
    """Drop an Expand whose readers broadcast anyway, against something of the full shape.

    Args:
        node: Any node; other operators are left alone.
        edit: The graph.
    """
    if node.op_type != "Expand":
        return
    expanded = node.output[0]
    full = edit.lengths(expanded)
    before = edit.lengths(node.input[0])
    if full is None or before is None or edit.is_output(expanded) or edit.version < 7:
        return
    readers = edit.consumers(expanded)
    for reader in readers:
        others = [name for name in reader.input if name != expanded]
        if reader.op_type not in BROADCASTING or len(others) != 1:
            return
        lengths = edit.lengths(others[0])
        if lengths is None or len(lengths) != len(full) or not all(lengths == full):
            return
    for reader in readers:
        slot = list(reader.input).index(expanded)
        edit.read(reader, slot, node.input[0])


RULES: dict[str, tuple[int, TargetRule]] = {
    "Reshape": (1, _reshape),
    "Expand": (1, _expand),
    "ConstantOfShape": (0, _fill),
    "Resize": (3, _resize),
    "Slice": (2, _slice),
}
"""(input with the target shape, rule) by operator."""
