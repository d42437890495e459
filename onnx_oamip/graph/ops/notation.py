"""Einsum-like channel signatures: ``"n c *, o c *, o -> n o *"``.

Each comma-separated term names the axes of one input, the right side those of the outputs. Equal symbols are one
channel axis and go together; a symbol that is missing on the right is summed over (a consumer); ``*`` stands for the
remaining axes, which nobody may cut; ``!c`` pins the axis. Inputs beyond the signature must be absent. The notation
follows einops and JAX's Shardy rules, where the same question (which axes move together) is asked for sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx_oamip.core.records import Axis, Node
from onnx_oamip.graph.ops.spec import (
    ChannelRule,
    LabelAxis,
    Labels,
    operand,
)


@dataclass(frozen=True, slots=True)
class Term:
    head: tuple[str, ...]
    open: bool


def _term(text: str, signature: str) -> Term:
    tokens = text.split()
    if "*" in tokens[:-1]:
        raise ValueError(
            f"'*' must come last in the term '{text.strip()}' of the signature '{signature}'"
        )
    return Term(tuple(t for t in tokens if t != "*"), bool(tokens) and tokens[-1] == "*")


def parse(signature: str) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Inputs and outputs of a signature. Raises ValueError on bad syntax."""
    left, arrow, right = signature.partition("->")
    if not arrow:
        raise ValueError(f"the signature '{signature}' has no '->'")
    inputs = tuple(_term(t, signature) for t in left.split(","))
    outputs = tuple(_term(t, signature) for t in right.split(","))
    known = {s.lstrip("!") for t in inputs for s in t.head}
    for term in outputs:
        for symbol in term.head:
            if symbol not in known:
                raise ValueError(f"'{symbol}' is on the right of '{signature}' but not on the left")
    return inputs, outputs


def rule(signature: str, guard: Callable[[Node, Labels], str | None] | None = None) -> ChannelRule:
    """Turn a signature into a channel rule. ``guard`` may return a reason to pin everything instead."""
    inputs, outputs = parse(signature)

    def apply(node: Node, labels: Labels) -> None:
        reason = guard(node, labels) if guard else None
        terms = [(t, name) for i, t in enumerate(inputs) if (name := operand(node, i)) is not None]
        for term, name in terms:
            shape = labels.shape(name)
            fits = shape is not None and (
                len(shape) >= len(term.head) if term.open else len(shape) == len(term.head)
            )
            if not fits:
                reason = (
                    reason
                    or f"{node} reads '{name}' of shape {shape}, expected axes '{' '.join(term.head)}'"
                )
        if len(node.inputs) > len(inputs) and any(node.inputs[len(inputs) :]):
            reason = reason or f"{node} has inputs this version does not know"
        if reason:
            opaque(node, labels, reason)
            return
        where: dict[str, list[tuple[str, int]]] = {}
        for term, name in terms:
            for axis, symbol in enumerate(term.head):
                where.setdefault(symbol.lstrip("!"), []).append((name, axis))
                if symbol.startswith("!"):
                    labels.pin(labels.label(name, axis), f"{node} works across this axis")
            if term.open and not labels.is_constant(name):
                data = name == node.inputs[0]
                why = (
                    f"it is a spatial axis of {node}"
                    if data
                    else f"it is an axis of the kernel of {node}"
                )
                for axis in range(len(term.head), len(labels.axes(name))):
                    labels.pin(labels.label(name, axis), why, listed=data)
        result = {symbol: labels.unify(axes, node) for symbol, axes in where.items()}
        kept = {s for t in outputs for s in t.head}
        for symbol, axes in where.items():
            if symbol not in kept:
                _contract(node, axes, result[symbol], labels)
        for term, name in zip(outputs, node.outputs, strict=False):
            shape = labels.shape(name)
            rank = len(shape) if shape is not None else len(term.head)
            labels.set(name, [result[s] for s in term.head] + [None] * (rank - len(term.head)))
        extra_outputs(node, labels, len(outputs))

    return apply


def _contract(node: Node, axes: list[Axis], found: LabelAxis, labels: Labels) -> None:
    if found is None:
        return
    data = [a for a in axes if not labels.is_constant(a[0])]
    others = [a for a in axes if a != data[0]] if data else []
    if data:
        labels.consume(node, data[0], others[0] if others else None)
    else:
        labels.pin(found, f"{node} sums over it and no activation is involved")


def extra_outputs(node: Node, labels: Labels, first: int) -> None:
    """Indices and saved statistics: nobody follows them, so what they are made of stays."""
    for name in node.outputs[first:]:
        if name:
            labels.pin_all(node.inputs[0], f"{node} gives '{name}' as an extra output")
            labels.set(name, [], f"an extra output of {node}")


def opaque(node: Node, labels: Labels, reason: str) -> None:
    """Nothing may be cut around this node: pin what it reads, leave what it writes untracked."""
    for name in (*node.inputs, *node.captures):
        if name:
            labels.pin_all(name, reason)
    for name in node.outputs:
        if name:
            labels.set(name, [], reason)
