"""Einsum-like channel signatures: ``"n c *, o c *, o -> n o *"``.

Each comma-separated term names the axes of one input, the right side those of the outputs. Equal symbols are one
channel axis and go together; a symbol that is missing on the right is summed over (a consumer); ``*`` stands for the
remaining axes, which must not be cut; ``!c`` pins the axis. Inputs beyond the signature must be absent. The notation
follows einops and JAX's Shardy rules, where the same question (which axes move together) is asked for sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx_oamip.core.printable import shortened
from onnx_oamip.core.records import Axis, Node
from onnx_oamip.graph.ops.handles import LabelAxis, Labels, operand
from onnx_oamip.graph.ops.spec import ChannelRule


@dataclass(frozen=True, slots=True)
class Term:
    """The axes of one tensor; ``open``: any number of further axes follows."""

    head: tuple[str, ...]
    open: bool

    def fits(self, rank: int) -> bool:
        """Compare with the rank of a tensor.

        Args:
            rank: Number of its axes.

        Returns:
            True if a tensor of this rank has these axes.
        """
        if self.open:
            return rank >= len(self.head)
        return rank == len(self.head)


def _term(text: str, signature: str) -> Term:
    tokens = text.split()
    if "*" in tokens[:-1]:
        raise ValueError(
            f"'*' must come last in the term '{text.strip()}' of the signature '{signature}'"
        )
    symbols = tuple(token for token in tokens if token != "*")
    return Term(symbols, open=len(symbols) < len(tokens))


def parse(signature: str) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Read a signature.

    Args:
        signature: Terms of inputs and outputs, such as ``"n c *, o c *, o -> n o *"``.

    Returns:
        Terms of the inputs and of the outputs.

    Raises:
        ValueError: The syntax is wrong, or an output has a symbol that no input has.
    """
    left, arrow, right = signature.partition("->")
    if not arrow:
        raise ValueError(f"the signature '{signature}' has no '->'")
    inputs = tuple(_term(text, signature) for text in left.split(","))
    outputs = tuple(_term(text, signature) for text in right.split(","))
    known = {symbol.lstrip("!") for term in inputs for symbol in term.head}
    for term in outputs:
        for symbol in term.head:
            if symbol not in known:
                raise ValueError(f"'{symbol}' is on the right of '{signature}' but not on the left")
    return inputs, outputs


def rule(signature: str, guard: Callable[[Node, Labels], str | None] | None = None) -> ChannelRule:
    """Turn a signature into a channel rule.

    Args:
        signature: See the module.
        guard: May return a reason to pin everything instead.

    Returns:
        The rule.
    """
    inputs, outputs = parse(signature)

    def apply(node: Node, labels: Labels) -> None:
        reason = guard(node, labels) if guard else None
        reason = reason or _mismatch(node, labels, inputs)
        if reason:
            opaque(node, labels, reason)
            return
        axes_by_symbol: dict[str, list[Axis]] = {}
        for term, name in _given(node, inputs):
            _name_axes(node, labels, term, name, axes_by_symbol)
        unified = {symbol: labels.unify(axes, node) for symbol, axes in axes_by_symbol.items()}
        kept = {symbol for term in outputs for symbol in term.head}
        for symbol, axes in axes_by_symbol.items():
            if symbol not in kept:
                _contract(node, axes, unified[symbol], labels)
        for term, name in zip(outputs, node.outputs, strict=False):
            head = [unified[symbol] for symbol in term.head]
            shape = labels.shape(name)
            rank = len(head) if shape is None else len(shape)
            rest: list[LabelAxis] = [None] * (rank - len(head))
            labels.set(name, head + rest)
        extra_outputs(node, labels, len(outputs))

    return apply


def _given(node: Node, terms: tuple[Term, ...]) -> list[tuple[Term, str]]:
    """Terms of the inputs that are there, with their names."""
    named = ((term, operand(node, slot)) for slot, term in enumerate(terms))
    return [(term, name) for term, name in named if name is not None]


def _mismatch(node: Node, labels: Labels, inputs: tuple[Term, ...]) -> str | None:
    """Reason that a node does not fit the signature, None where it does."""
    for term, name in _given(node, inputs):
        shape = labels.shape(name)
        if shape is None or not term.fits(len(shape)):
            axes = " ".join(term.head)
            return f"{node} reads '{shortened(name)}' of shape {shape}, expected axes '{axes}'"
    if any(node.inputs[len(inputs) :]):
        return f"{node} has inputs this version does not know"
    return None


def _name_axes(
    node: Node,
    labels: Labels,
    term: Term,
    name: str,
    axes_by_symbol: dict[str, list[Axis]],
) -> None:
    """Add the axes of one input under their symbols; pin those that nothing may cut."""
    for axis, symbol in enumerate(term.head):
        axes_by_symbol.setdefault(symbol.lstrip("!"), []).append((name, axis))
        if symbol.startswith("!"):
            labels.pin(labels.label(name, axis), f"{node} works across this axis")
    if not term.open or labels.is_constant(name):
        return
    data = name == node.inputs[0]
    what = "a spatial axis" if data else "an axis of the kernel"
    for axis in range(len(term.head), len(labels.axes(name))):
        labels.pin(labels.label(name, axis), f"it is {what} of {node}", listed=data)


def _contract(
    node: Node,
    axes: list[Axis],
    found: LabelAxis,
    labels: Labels,
) -> None:
    """Sum over an axis: the node consumes the first activation, the other tensor is its weight."""
    if found is None:
        return
    data = next((axis for axis in axes if not labels.is_constant(axis[0])), None)
    if data is None:
        labels.pin(found, f"{node} sums over it and no activation is involved")
        return
    weight = next((axis for axis in axes if axis != data), None)
    labels.consume(node, data, weight)


def extra_outputs(node: Node, labels: Labels, first: int) -> None:
    """Pin the data of a node that has outputs which no rule follows: indices and saved statistics.

    Args:
        node: The node.
        labels: Labels of the graph.
        first: Index of the first of these outputs.
    """
    for name in node.outputs[first:]:
        if name:
            labels.pin_all(node.inputs[0], f"{node} gives '{shortened(name)}' as an extra output")
            labels.set(name, [], f"an extra output of {node}")


def opaque(node: Node, labels: Labels, reason: str) -> None:
    """Cut nothing around a node: pin its inputs, leave its outputs untracked.

    Args:
        node: The node.
        labels: Labels of the graph.
        reason: Reported for the pinned channels.
    """
    for name in (*node.inputs, *node.captures):
        if name:
            labels.pin_all(name, reason)
    for name in node.outputs:
        if name:
            labels.set(name, [], reason)
