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

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor.

        Args:
            tensor: Its name.

        Returns:
            Lengths of the axes, or None where they are unknown.
        """
        ...

    def constant(self, tensor: str) -> Array | None:
        """Return the value of a constant.

        Args:
            tensor: Its name.

        Returns:
            The value, or None for an activation.
        """
        ...

    def is_constant(self, tensor: str) -> bool:
        """Check whether a tensor is a constant.

        Args:
            tensor: Its name.

        Returns:
            True for initialisers and for outputs of constant nodes.
        """
        ...

    def readers(self, tensor: str) -> Sequence[Node]:
        """Return the consumers of a tensor.

        Args:
            tensor: Its name.

        Returns:
            Its consumers, in the order of the graph.
        """
        ...

    def producer(self, tensor: str) -> Node | None:
        """Return the producer of a tensor.

        Args:
            tensor: Its name.

        Returns:
            The node, or None for a graph input or a constant.
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

    def label(self, tensor: str, axis: int) -> LabelAxis:
        """Return the labels along one axis of a tensor.

        Args:
            tensor: Its name. A constant gets new labels at the first request.
            axis: The axis.

        Returns:
            One label per index (channels,), or None where the axis is not tracked.
        """
        ...

    def axes(self, tensor: str) -> list[LabelAxis]:
        """Return the labels along all axes of a tensor.

        Args:
            tensor: Its name. A constant gets new labels along every axis.

        Returns:
            Labels per axis, None for axes that are not tracked.
        """
        ...

    def fresh(self, count: int, reason: str) -> Ints:
        """Make pinned labels, for channels that must not be removed.

        Args:
            count: Number of channels.
            reason: Reason shown to the user.

        Returns:
            The labels (count,).
        """
        ...

    def free(self, count: int) -> Ints:
        """Make labels for channels that start at this node and can be removed.

        Args:
            count: Number of channels.

        Returns:
            The labels (count,).
        """
        ...

    def tie(self, a: Ints, b: Ints) -> None:
        """Couple channels pairwise: both of a pair are removed together or not at all.

        Args:
            a: Labels.
            b: Labels of a shape that broadcasts against that of ``a``.
        """
        ...

    def pin(self, labels: LabelAxis, reason: str, listed: bool = True) -> None:
        """Pin channels: they are never removed.

        Args:
            labels: Labels (channels,); None does nothing.
            reason: Reason shown to the user.
            listed: Report the channels as pinned. False for indices that are no channels, such as taps of a kernel.
        """
        ...

    def pin_all(self, tensor: str, reason: str) -> None:
        """Pin the channels along every axis of a tensor.

        Args:
            tensor: Its name.
            reason: Reason shown to the user.
        """
        ...

    def unify(self, occurrences: Sequence[Axis], node: Node) -> LabelAxis:
        """Couple several axes of equal length, index by index.

        Args:
            occurrences: The axes. If one of them is not tracked, the others are pinned.
            node: Node at which the axes meet, named in the reason.

        Returns:
            The common labels, or None if an axis is not tracked.
        """
        ...

    def consume(
        self,
        node: Node,
        data: Axis,
        weight: Axis | None,
        groups: int = 1,
    ) -> None:
        """Record that a node sums over an axis.

        Masked channels are set to zero there, which removes their contribution to the sum.

        Args:
            node: The consumer.
            data: The summed axis of an activation, or of a constant of the node that meets values that cannot be
                reached from outside (the recurrent weights of an LSTM meet the node's own output).
            weight: The axis of the weight that it is multiplied with, if any.
            groups: Blocks of a grouped product.
        """
        ...

    def set(self, tensor: str, axes: Sequence[LabelAxis], why: str = "", source: str = "") -> None:
        """Set the labels of an output.

        Args:
            tensor: Its name.
            axes: Labels per axis, None for axes that are not tracked.
            why: Reason for axes that are not tracked; by default that of the source.
            source: Tensor that the output is made of, the node's first input by default.
        """
        ...

    def enter(self, body: Body, unused: str = "") -> None:
        """Apply the channel rules to the nodes of a subgraph.

        Args:
            body: The subgraph; its inputs have labels.
            unused: Reason to pin the channels that are met first in it, if it does not run.
        """
        ...

    def choice(self, node: Node, default: int) -> int:
        """Return the side of an ambiguous split that remains removable.

        Args:
            node: The node that splits.
            default: Position of the side that is taken without a search.

        Returns:
            The position that the search over splits has chosen, or ``default``.
        """
        ...


class Cuts(Protocol):
    """The handle of a repair rule: kept channels along axes, and the graph before the cut."""

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor before the cut.

        Args:
            tensor: Its name.

        Returns:
            Lengths of the axes.
        """
        ...

    def constant(self, tensor: str) -> Array | None:
        """Return the value of a constant before the cut.

        Args:
            tensor: Its name.

        Returns:
            The value, or None for an activation.
        """
        ...

    def readers(self, tensor: str) -> Sequence[Node]:
        """Return the nodes that read a tensor before the cut.

        Args:
            tensor: Its name.

        Returns:
            The nodes, in graph order.
        """
        ...

    def producer(self, tensor: str) -> Node | None:
        """Return the node that writes a tensor.

        Args:
            tensor: Its name.

        Returns:
            The node, or None for a graph input or a constant.
        """
        ...

    def keep(self, tensor: str, axis: int) -> Bools | None:
        """Return the keep mask along one axis.

        Args:
            tensor: Name of a tensor.
            axis: The axis.

        Returns:
            The mask (channels,), or None where no channel is removed.
        """
        ...

    def kept(self, tensor: str, axis: int) -> int:
        """Return the length of an axis after the cut.

        Args:
            tensor: Name of a tensor.
            axis: The axis.

        Returns:
            The number of channels kept.
        """
        ...


class Terms(Protocol):
    """The handle of an encode rule: states the outputs of a node by its inputs, for one feed, elements in C order.

    Three statements are enough for piecewise linear networks; from each of them follow both the expressions of the
    mixed-integer program and the intervals that bound them. A rule may name tensors in between as it likes.
    """

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor for the feed that is encoded.

        Args:
            tensor: Its name.

        Returns:
            Lengths of the axes.
        """
        ...

    def constant(self, tensor: str) -> Array | None:
        """Return the value of a constant.

        Args:
            tensor: Its name.

        Returns:
            The value, or None for an activation.
        """
        ...

    def affine(
        self,
        out: str,
        parts: Sequence[tuple[str, csr_array]],
        offset: npt.ArrayLike = 0.0,
    ) -> None:
        """State that a tensor is an affine function of others: ``out = sum of matrix @ tensor + offset``.

        Args:
            out: Name of the tensor.
            parts: Names of the others with their matrices (elements of ``out``, elements of the other).
            offset: Constant, broadcast to the elements of ``out``.
        """
        ...

    def relu(self, out: str, x: str) -> None:
        """State ``out = max(x, 0)`` by element.

        Args:
            out: Name of the result.
            x: Name of the argument.
        """
        ...

    def maximum(self, out: str, x: str, windows: Ints) -> None:
        """State ``out[i] = max over j of x[windows[i, j]]``.

        Args:
            out: Name of the result.
            x: Name of the argument.
            windows: Elements of ``x`` in C order (elements of ``out``, size of a window); -1 for a place in the
                padding. Every window has at least one element.
        """
        ...


class Reader(Protocol):
    """The handle of rules that look at a whole graph: producers, shapes and constants by name of a tensor."""

    def maker(self, tensor: str) -> Node | None:
        """Return the producer of a tensor.

        Args:
            tensor: Its name.

        Returns:
            The node; None for inputs, constants, and operators of unknown domains.
        """
        ...

    def op(self, tensor: str) -> str:
        """Name the operator that produces a tensor.

        Args:
            tensor: Its name.

        Returns:
            The operator; empty for inputs, constants and operators of unknown domains.
        """
        ...

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor.

        Args:
            tensor: Its name.

        Returns:
            Lengths of the axes for one feed, or None where they are unknown.
        """
        ...

    def rank(self, tensor: str) -> int | None:
        """Return the number of axes of a tensor.

        Args:
            tensor: Its name.

        Returns:
            The number, or None where it is unknown.
        """
        ...

    def floating(self, tensor: str) -> bool:
        """Check whether a tensor has a floating-point type.

        Args:
            tensor: Its name.

        Returns:
            False also for tensors of unknown type.
        """
        ...

    def constant(self, tensor: str) -> Array | None:
        """Return the value of a constant.

        Args:
            tensor: Its name.

        Returns:
            The value, or None for an activation.
        """
        ...

    def number(self, tensor: str) -> float | None:
        """Return the value of a constant with one element.

        Args:
            tensor: Its name.

        Returns:
            The value, or None for an activation and for constants of any other size.
        """
        ...

    def integers(self, node: Node, slot: int, attribute: str) -> list[int] | None:
        """Return a list that early opsets have as an attribute and later ones as an input.

        Args:
            node: The node.
            slot: Position of the input.
            attribute: Name of the attribute.

        Returns:
            The list, or None where it is absent or computed.
        """
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
    if index < len(node.inputs):
        return node.inputs[index] or None
    return None


def integers(
    node: Node,
    labels: Labels | Cuts | Terms,
    name: str,
    index: int,
) -> Ints | None:
    """Read a list of integers that is an attribute in old opsets and an input in later ones.

    Args:
        node: The node.
        labels: Any handle, for constants.
        name: Name of the attribute.
        index: Input index.

    Returns:
        The list, or None if there is neither.

    Raises:
        KeyError: The input is there but is not a constant, in contrast to one that is absent.
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
