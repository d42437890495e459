"""The narrow handles that rules of operators work through: a rule never sees a graph, a framework or a solver.

``channels`` rules see :class:`Labels`, ``repair`` and ``zero`` rules :class:`Cuts`, ``encode`` rules :class:`Terms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from onnx_oamip.core.records import (
    Array,
    Axis,
    Body,
    Bools,
    Ints,
    Node,
)

LabelAxis = Ints | None
"""The labels of every index along one axis, or None where the axis is not tracked and can never shrink."""


class Labels(Protocol):
    """The handle of a channel rule: read the labels of inputs, tie and pin them, set those of outputs."""

    def shape(self, tensor: str) -> tuple[int, ...] | None: ...
    def constant(self, tensor: str) -> Array | None: ...
    def is_constant(self, tensor: str) -> bool: ...
    def readers(self, tensor: str) -> Sequence[Node]: ...
    def producer(self, tensor: str) -> Node | None:
        """The node that makes a tensor, None for a graph input or a constant."""
        ...

    def is_output(self, tensor: str) -> bool:
        """True for outputs of the graph."""
        ...

    def label(self, tensor: str, axis: int) -> LabelAxis:
        """Labels along one axis. A constant gets fresh labels when first asked."""
        ...

    def axes(self, tensor: str) -> list[LabelAxis]:
        """Labels of all axes of an activation; for a constant, of all its axes (made fresh)."""
        ...

    def fresh(self, count: int, reason: str) -> Ints:
        """New pinned labels, for channels that must not be removed."""
        ...

    def free(self, count: int) -> Ints:
        """New labels, for channels that are made here and can be removed."""
        ...

    def tie(self, a: Ints, b: Ints) -> None:
        """Channels of ``a`` and ``b``, broadcast against each other, can only be removed together."""
        ...

    def pin(self, labels: LabelAxis, reason: str, listed: bool = True) -> None:
        """Keep channels; ``listed``: report them. False for indices that are no channels, such as taps of a kernel."""
        ...

    def pin_all(self, tensor: str, reason: str) -> None: ...
    def unify(self, occurrences: Sequence[Axis], node: Node) -> LabelAxis:
        """Tie several axes of equal length; where one is untracked, pin the others and return None."""
        ...

    def consume(self, node: Node, data: Axis, weight: Axis | None, groups: int = 1) -> None:
        """Record that ``node`` sums over the axis ``data``, meeting ``weight`` along its axis.

        ``data`` holds zeros where channels are masked: an activation, or a constant of the node where it meets values
        that cannot be reached from outside (the recurrent weights of an LSTM meet the node's own output).
        """
        ...

    def set(self, tensor: str, axes: Sequence[LabelAxis], why: str = "") -> None:
        """Labels of an output; ``why`` explains untracked axes (default: as the node's first input)."""
        ...

    def enter(self, body: Body) -> None:
        """Follow the nodes of a body whose inputs have their labels."""
        ...

    def choice(self, node: Node, default: int) -> int:
        """Side of an ambiguous split that stays free: a position chosen by the search, or ``default``."""
        ...


class Cuts(Protocol):
    """The handle of a repair rule: kept channels along axes, and shapes and constants before the cut."""

    def shape(self, tensor: str) -> tuple[int, ...]: ...
    def constant(self, tensor: str) -> Array | None: ...
    def keep(self, tensor: str, axis: int) -> Bools | None:
        """Mask along the axis, or None where nothing is cut there."""
        ...

    def kept(self, tensor: str, axis: int) -> int:
        """Length of the axis after the cut."""
        ...


class Terms(Protocol):
    """The handle of an encode rule: states the outputs of a node by its inputs, for one feed, elements in C order.

    Three statements are enough for piecewise linear networks; from each of them follow both the expressions of the
    mixed-integer program and the intervals that bound them. A rule may name tensors in between as it likes.
    """

    def shape(self, tensor: str) -> tuple[int, ...]: ...
    def constant(self, tensor: str) -> Array | None: ...
    def affine(
        self, out: str, parts: Sequence[tuple[str, csr_array]], offset: npt.ArrayLike = 0.0
    ) -> None:
        """``out = sum of matrix @ tensor + offset``: matrices are (elements of out, elements of the tensor)."""
        ...

    def relu(self, out: str, x: str) -> None:
        """``out = max(x, 0)``."""
        ...

    def maximum(self, out: str, x: str, windows: Ints) -> None:
        """``out[i] = max_j x[windows[i, j]]``, -1 for a place outside; every window has at least one inside."""
        ...


class Reader(Protocol):
    """The handle of rules that look at a whole graph: producers, shapes and constants by name of a tensor."""

    def maker(self, tensor: str) -> Node | None: ...
    def op(self, tensor: str) -> str:
        """The operator that gives a tensor; empty where there is none that is known."""
        ...

    def shape(self, tensor: str) -> tuple[int, ...] | None: ...
    def rank(self, tensor: str) -> int | None: ...
    def floating(self, tensor: str) -> bool: ...
    def constant(self, tensor: str) -> Array | None: ...
    def number(self, tensor: str) -> float | None:
        """The value of a constant with one element."""
        ...

    def integers(self, node: Node, slot: int, attribute: str) -> list[int] | None:
        """A list given as an attribute or as a constant input; None where it is neither."""
        ...


class Refused(Exception):
    """An encode rule met a form of its operator that it cannot state; the message says which."""


def operand(node: Node, index: int) -> str | None:
    """Name an input of a node.

    Args:
        node: The node.
        index: Input index.

    Returns:
        The name, or None where the input is absent (an empty name counts as absent).
    """
    return (node.inputs[index] or None) if index < len(node.inputs) else None


def integers(node: Node, labels: Labels | Cuts | Terms, name: str, index: int) -> Ints | None:
    """Read a list of integers that is an attribute in old opsets and an input in later ones.

    Args:
        node: The node.
        labels: Any handle, for constants.
        name: Name of the attribute.
        index: Input index.

    Returns:
        The list, or None if there is neither.

    Raises:
        KeyError: The input is there but is not a constant, so that a rule can tell the two apart.
    """
    if name in node.attrs:
        return np.atleast_1d(np.asarray(node.attrs[name], np.int64))
    tensor = operand(node, index)
    if tensor is None:
        return None
    value = labels.constant(tensor)
    if value is None:
        raise KeyError(tensor)
    return np.atleast_1d(np.asarray(value, np.int64))
