"""Einsum: the equation is the channel rule. Reference: ONNX operator specification, "Einsum" (opset 12).

Axes with equal letters are coupled, a letter that the result does not have is summed over, and an ellipsis stands for
letters of its own. MACs are the product of the lengths of all letters, as for the loops that the equation writes down.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx_oamip.core.records import Array, Axis, Node
from onnx_oamip.graph.ops.handles import Labels
from onnx_oamip.graph.ops.matrix_view import Linear, Site
from onnx_oamip.graph.ops.notation import opaque, rule
from onnx_oamip.graph.ops.spec import OpSpec, Shapes


def letters(node: Node, ranks: list[int]) -> tuple[list[list[str]], list[str]] | None:
    """Name the axes of the inputs and of the result, the ellipsis written out.

    Args:
        node: The node.
        ranks: Ranks of the inputs.

    Returns:
        Names by input, and those of the result; None where the ranks do not fit the equation.
    """
    equation = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    inputs = []
    longest = 0
    for term, rank in zip(terms, ranks, strict=True):
        head, dots, tail = term.partition("...")
        between = rank - len(head) - len(tail)
        if between < 0 or (not dots and between):
            return None
        longest = max(longest, between)
        inputs.append([*head, *(f"axis{i}" for i in range(-between, 0)), *tail])
    open_axes = [f"axis{i}" for i in range(-longest, 0)]
    if not arrow:
        every = [c for c in left if c.isalpha()]
        return inputs, [*open_axes, *sorted(c for c in set(every) if every.count(c) == 1)]
    head, dots, tail = right.partition("...")
    return inputs, [*head, *(open_axes if dots else []), *tail]


def _channels(node: Node, labels: Labels) -> None:
    shapes = [labels.shape(name) for name in node.inputs]
    found = letters(node, [len(s) for s in shapes if s is not None])
    if found is None:
        opaque(node, labels, f"{node} reads a tensor of unknown shape")
        return
    inputs, result = found
    lengths: dict[str, int] = {}
    for shape, term in zip(shapes, inputs, strict=True):
        for letter, n in zip(term, shape or (), strict=True):
            if lengths.setdefault(letter, n) != n:
                opaque(node, labels, f"{node} broadcasts a single channel")
                return
    if not set(result) <= lengths.keys() or len(set(result)) < len(result):
        opaque(node, labels, f"{node} has a result that its inputs do not give")
        return
    rule(f"{', '.join(' '.join(term) for term in inputs)} -> {' '.join(result)}")(node, labels)


def _cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    """Every letter once, at the first place where its length is not a broadcast 1."""
    if any(name not in shapes for name in node.inputs):
        return ()
    found = letters(node, [len(shapes[name]) for name in node.inputs])
    where: dict[str, Axis] = {}
    for name, term in zip(node.inputs, found[0] if found else (), strict=False):
        for axis, letter in enumerate(term):
            if letter not in where or shapes[where[letter][0]][where[letter][1]] == 1:
                where[letter] = (name, axis)
    return tuple(where.values())


def weight_axis(node: Node, ranks: list[int]) -> int | None:
    """Find the axis of the second input that is summed over, where the node is a plain product with a matrix.

    Args:
        node: The node.
        ranks: Ranks of the inputs.

    Returns:
        The axis, or None where the node is something else.
    """
    found = letters(node, ranks)
    if found is None or len(ranks) != 2 or ranks[1] != 2 or ranks[0] < 1:
        return None
    (data, weight), result = found
    if data[-1] not in weight or len(set(data)) < len(data):
        return None
    axis = weight.index(data[-1])
    other = weight[1 - axis]
    if other not in data and result == [*data[:-1], other]:
        return axis
    return None


class EinsumProduct(Linear):
    """Einsum, where it is a plain product with a constant matrix as its second operand."""

    def site(self, node: Node, constants: Mapping[str, Array]) -> Site | None:
        """Find the weight: the second operand, where the equation is a plain product. See :meth:`Linear.site`.

        Args:
            node: Node of this operator.
            constants: Values of constants by name.

        Returns:
            The site, or None where the node is something else.
        """
        if len(node.inputs) != 2 or node.inputs[0] in constants or node.inputs[1] not in constants:
            return None
        # The rank of the data follows from the equation, but for an ellipsis, which changes nothing here.
        equation = str(node.attrs["equation"]).replace(" ", "")
        rank = len(equation.split(",")[0].replace("...", ""))
        axis = weight_axis(node, [rank, constants[node.inputs[1]].ndim])
        if axis is None:
            return None
        return Site(node, self, slot=0, weight_axis=axis, data_axis=-1, output_axis=-1)


SPECS = (OpSpec("Einsum", _channels, since=12, cost=_cost, linear=EinsumProduct()),)
