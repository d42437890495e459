"""Operators whose target shape is an input: how a computed target becomes a constant that is provably the same.

An exporter computes the target of a Reshape, Expand or Resize from the shapes of other tensors, although only a batch
or a sequence length is open. ``shape_folding`` runs these rules; what they may read and change is a :class:`Targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper

from onnx_oamip.graph.symbolic_dims import Entries, Size, Unknown, divide

Dims = Sequence[int | str | None]
BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})
"""Operators that repeat their operands to a common shape themselves."""


def is_list_of_lengths(node: NodeProto) -> bool:
    """Whether a node joins a list from single numbers and lengths, as :meth:`Targets.joined` writes it."""
    return node.op_type == "Concat" and node.name.endswith("_node")


class Targets(Protocol):
    """The handle of a rule for targets: known lengths and values, and the changes that a rule can make."""

    @property
    def version(self) -> int:
        """Opset of the default domain."""
        ...

    def producer(self, tensor: str, op: str) -> NodeProto | None:
        """The producer of a tensor, if it is this operator."""
        ...

    def consumers(self, tensor: str) -> Sequence[NodeProto]: ...
    def is_output(self, tensor: str) -> bool: ...
    def dims(self, tensor: str) -> Dims | None:
        """Dimensions as declared or inferred: a number, a symbol's name, or None."""
        ...

    def lengths(self, tensor: str) -> Entries | None:
        """Dimensions as numbers and polynomials."""
        ...

    def entries(self, tensor: str) -> Entries | None:
        """Elements of an integer tensor as numbers and polynomials."""
        ...

    def constant(self, stem: str, value: npt.NDArray[Any]) -> str:
        """Add a constant; returns its name."""
        ...

    def read(self, node: NodeProto, slot: int, name: str) -> None:
        """Let a node read another tensor."""
        ...

    def joined(
        self, at: int, node: NodeProto, slot: int, wanted: Sequence[Any], source: Sequence[int]
    ) -> None:
        """Let a node read a list of numbers and of lengths taken where they come from; ``source``: old places."""
        ...

    def canonical(self, name: str) -> bool:
        """Whether a list is joined from single numbers and lengths already."""
        ...

    def become_transpose(self, node: NodeProto, source: str, perm: Sequence[int]) -> None:
        """Turn a node into a transposition of another tensor."""
        ...


TargetRule = Callable[[NodeProto, int, Targets], None]
"""Rewrites the target of a node at a place of the graph."""


def _merged_transpose(node: NodeProto, edit: Targets) -> bool:
    """Leading axes merged, the others transposed, the leading ones divided again: that is one transpose.

    torch's exporter writes so the transposed keys of ``scaled_dot_product_attention``.
    """
    transpose = edit.producer(node.input[0], "Transpose")
    merge = None if transpose is None else edit.producer(transpose.input[0], "Reshape")
    if transpose is None or merge is None:
        return False
    before = edit.lengths(merge.input[0])
    merged, after = edit.entries(merge.input[1]), edit.entries(node.input[1])
    orders = [list(a.ints) for a in transpose.attribute if a.name == "perm"]
    if before is None or merged is None or after is None or not orders or orders[0][0] != 0:
        return False
    lead = len(before) - len(merged) + 1
    perm = [*range(lead), *(lead + i - 1 for i in orders[0][1:])]
    if lead < 1 or len(after) != len(before):
        return False
    merges_only_leading = list(merged[1:]) == list(before[lead:])
    restores_leading = list(after) == [before[i] for i in perm]
    literal = all(isinstance(v, Size) or v >= 1 for v in after)
    if not (merges_only_leading and restores_leading and literal):
        return False
    edit.become_transpose(node, merge.input[0], perm)
    return True


def _reshape(node: NodeProto, at: int, edit: Targets) -> None:
    if _merged_transpose(node, edit):
        return
    target, before = edit.entries(node.input[1]), edit.lengths(node.input[0])
    literal = [a for a in node.attribute if a.name == "allowzero"]
    after = edit.dims(node.output[0])
    if any(a.i for a in literal) and (
        target is None or any(not isinstance(v, Size) and v == 0 for v in target)
    ):
        return  # a zero that is meant, or may be
    wanted = None if target is None or before is None else _target(list(target), before)
    if wanted is None:
        wanted = static_target(edit.dims(node.input[0]), after)
    if wanted is not None:
        edit.read(node, 1, edit.constant(f"{node.output[0]}_target", np.asarray(wanted, np.int64)))
        for attribute in literal:  # a zero of the new target copies a length
            node.attribute.remove(attribute)


def _target(target: list[Any], before: Entries) -> list[int] | None:
    """The same target in numbers: 0 for a copied length, -1 for at most one that is not known."""
    full = [
        before[i] if isinstance(v, int) and v == 0 and i < len(before) else v
        for i, v in enumerate(target)
    ]
    if -1 in full:  # what is left for it
        place = full.index(-1)
        rest = [v for i, v in enumerate(full) if i != place]
        try:
            full[place] = divide(_product(before), _product(rest))
        except Unknown:
            full[place] = -1
    result = []
    for i, value in enumerate(full):
        copied = isinstance(value, Size) and i < len(before) and before[i] == value
        result.append(0 if copied else -1 if isinstance(value, Size) else int(value))
    return result if result.count(-1) <= 1 else None


def _product(values: Any) -> Any:
    total: Any = 1
    for v in values:
        total = total * v
    return total


def static_target(before: Dims | None, after: Dims | None) -> list[int] | None:
    """A constant target for a reshape between these dimensions, or None where there is no provably equal one."""
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
    return target if target.count(-1) <= 1 else None


def _expand(node: NodeProto, at: int, edit: Targets) -> None:
    """An axis that keeps its length is asked for as 1, whatever the length."""
    target, before = edit.entries(node.input[1]), edit.lengths(node.input[0])
    if target is None or before is None or edit.canonical(node.input[1]):
        return
    shift = len(target) - len(before)
    wanted = [1 if i >= shift and v == before[i - shift] else v for i, v in enumerate(target)]
    if not any(isinstance(v, Size) for v in wanted):
        edit.read(node, 1, edit.constant(f"{node.output[0]}_target", np.asarray(wanted, np.int64)))
    elif any(not isinstance(v, Size) for v in wanted):
        edit.joined(at, node, 1, wanted, range(len(wanted)))


def _resize(node: NodeProto, at: int, edit: Targets) -> None:
    """Sizes only of the axes that change."""
    if len(node.input) < 4 or not node.input[3] or edit.canonical(node.input[3]):
        return
    target, before = edit.entries(node.input[3]), edit.lengths(node.input[0])
    named = {a.name for a in node.attribute}
    if target is None or before is None or "axes" in named or len(target) != len(before):
        return
    change = [i for i, v in enumerate(target) if v != before[i]]
    wanted = [target[i] for i in change]
    whole = not any(isinstance(v, Size) for v in wanted)
    if not change:
        return
    if edit.version >= 18 and "keep_aspect_ratio_policy" not in named:
        node.attribute.append(helper.make_attribute("axes", change))
        if whole:
            edit.read(
                node, 3, edit.constant(f"{node.output[0]}_sizes", np.asarray(wanted, np.int64))
            )
        else:
            edit.joined(at, node, 3, wanted, change)
    elif whole and all(isinstance(before[i], int) and target[i] % before[i] == 0 for i in change):
        scales = [target[i] / before[i] if i in change else 1.0 for i in range(len(before))]
        edit.read(
            node, 2, edit.constant(f"{node.output[0]}_scales", np.asarray(scales, np.float32))
        )
        del node.input[3:]


def drop_expand(node: NodeProto, edit: Targets) -> None:
    """Drop an Expand whose readers broadcast anyway, against something of the full shape."""
    if node.op_type != "Expand":
        return
    expanded = node.output[0]
    full, before = edit.lengths(expanded), edit.lengths(node.input[0])
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
        edit.read(reader, list(reader.input).index(expanded), node.input[0])


RULES: dict[str, tuple[int, TargetRule]] = {
    "Reshape": (1, _reshape),
    "Expand": (1, _expand),
    "Resize": (3, _resize),
}
"""(input with the target shape, rule) by operator."""
