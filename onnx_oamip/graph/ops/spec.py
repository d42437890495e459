"""What the package knows about one operator, and the narrow handles its rules are given.

A rule never sees a graph, a framework or a solver: ``channels`` sees :class:`Labels`, ``repair`` sees
:class:`Cuts`, ``cost`` sees shapes, ``encode`` sees :class:`Terms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, Protocol

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
from onnx_oamip.graph.ops.matrix_view import Linear

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
        """Whether a tensor is an output of the graph."""
        ...

    def label(self, tensor: str, axis: int) -> LabelAxis:
        """Labels along one axis. A constant gets fresh labels when first asked."""
        ...

    def axes(self, tensor: str) -> list[LabelAxis]:
        """Labels of all axes of an activation; for a constant, of all its axes (made fresh)."""
        ...

    def fresh(self, count: int, reason: str) -> Ints:
        """New pinned labels, for channels that nobody may remove."""
        ...

    def free(self, count: int) -> Ints:
        """New labels, for channels that are made here and may go."""
        ...

    def tie(self, a: Ints, b: Ints) -> None:
        """The channels of ``a`` and ``b`` (broadcast against each other) go together."""
        ...

    def pin(self, labels: LabelAxis, reason: str, listed: bool = True) -> None:
        """These stay; ``listed`` is False for what nobody would take for channels, such as the taps of a kernel."""
        ...

    def pin_all(self, tensor: str, reason: str) -> None: ...
    def unify(self, occurrences: Sequence[Axis], node: Node) -> LabelAxis:
        """Tie several axes of equal length; where one is untracked, pin the others and return None."""
        ...

    def consume(self, node: Node, data: Axis, weight: Axis | None, groups: int = 1) -> None:
        """Record that ``node`` sums over the axis ``data``, meeting ``weight`` along its axis.

        ``data`` is what holds zeros where channels are masked: an activation, or a constant of the node where it meets
        something that cannot be reached from outside (the recurrent weights of an LSTM meet the node's own output).
        """
        ...

    def set(self, tensor: str, axes: Sequence[LabelAxis], why: str = "") -> None:
        """Labels of an output; ``why`` explains untracked axes (default: as the node's first input)."""
        ...

    def enter(self, body: Body) -> None:
        """Follow the nodes of a body whose inputs have their labels."""
        ...

    def choice(self, node: Node, default: int) -> int:
        """Which side of an ambiguous split stays free: a position chosen by the search, or ``default``."""
        ...


class Cuts(Protocol):
    """The handle of a repair rule: what is kept along an axis, and shapes and constants before the cut."""

    def shape(self, tensor: str) -> tuple[int, ...]: ...
    def constant(self, tensor: str) -> Array | None: ...
    def keep(self, tensor: str, axis: int) -> Bools | None:
        """Mask along the axis, or None where nothing is cut there."""
        ...

    def kept(self, tensor: str, axis: int) -> int:
        """Length of the axis after the cut."""
        ...


class Terms(Protocol):
    """The handle of an encode rule: how a node's outputs follow from its inputs, for one feed, elements in C order.

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


@dataclass(frozen=True, slots=True)
class Edit:
    """How a node must change after slicing: attributes to set or drop (None), inputs to replace by constants or drop.

    ``spread`` is an axis along which the node must still see zeros where channels went: they are put back before it
    and dropped after it; not ``ordered``, where their places mean nothing to the node as edited: they come last.
    ``scale`` multiplies the first output. Both add nodes (``restoring``), which costs count.
    """

    attrs: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[int, Array | None] = field(default_factory=dict)
    spread: int | None = None
    ordered: bool = True
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Flow:
    """How tensors pass between a node and its bodies.

    ``joins``: (either of two, which output of the node it is); ``enters``: (first value, value of the step before),
    which input of the body it is; ``slices``: (outer tensor, input of the body, axis along which it is taken apart);
    ``stacks``: (output of the body, output of the node, new axis).
    """

    joins: tuple[tuple[tuple[str, str], str], ...] = ()
    enters: tuple[tuple[tuple[str, str], str], ...] = ()
    slices: tuple[tuple[str, str, int], ...] = ()
    stacks: tuple[tuple[str, str, int], ...] = ()


Shapes = Mapping[str, tuple[int, ...]]
ChannelRule = Callable[[Node, Labels], None]
RepairRule = Callable[[Node, Cuts], Edit]
Total = tuple[tuple[Axis, ...], int]
"""The sum of the lengths of some axes (one may be named twice) and a number."""
CostRule = Callable[[Node, Shapes], tuple[Axis | Total, ...]]
"""MACs of a node are the product of the lengths of the axes (and totals) returned."""
MatrixRule = Callable[[Node, Shapes], tuple[int, int] | None]
"""Shape of the matrix that, to judge by shapes, multiplies the first input; it is given the shapes of constants."""
ZeroRule = Callable[[Node, Cuts], Mapping[int, Array]]
"""What stands for zero in an input, by slot, broadcast to it: where such an input is a constant, channels that it meets
are masked in it, so that quantised arithmetic stays what it is."""
EncodeRule = Callable[[Node, Terms], None]


@dataclass(frozen=True, slots=True)
class EditRules:
    """How a node changes with its channels: ``repair`` where they are removed, ``zero`` where they are masked."""

    repair: RepairRule | None = None
    zero: ZeroRule | None = None
    """For quantised operators. Slot 0 is the data of an operator that works element by element."""


@dataclass(frozen=True, slots=True)
class LikeInput:
    """Shape of an operator that ONNX's inference does not know: that of its first input.

    ``floats``: only the shape is the input's; the type is float32.
    """

    floats: bool = False


@dataclass(frozen=True, slots=True)
class LikeProduct:
    """Shape of an operator that ONNX's inference does not know: that of its first input times a matrix.

    ``matrix`` gives the shape of that matrix from the shapes of constants.
    """

    matrix: MatrixRule


class Trait(Flag):
    """Properties of an operator that passes over a graph ask for (:func:`onnx_oamip.graph.ops.has`)."""

    COPIES = auto()
    """The output is the input, in every mode."""
    IDENTITY = auto()
    """The first output is the first input in inference."""
    MOVES = auto()
    """The first output holds the elements of the first input, in the same or another order, and nothing else."""
    RESHAPES = auto()
    """Moves elements and keeps their order."""
    TRANSPOSES = auto()
    """Permutes the axes."""
    SLICES = auto()
    """Takes ranges of indices."""
    CASTS = auto()
    """Converts the element type."""
    BIAS = auto()
    """Adds two inputs: where one is a constant it is the bias of a linear node in front."""
    SUM = auto()
    """Adds all inputs: where they are computed it joins branches."""
    CHANNEL_AFFINE = auto()
    """With constants as other inputs, scales and shifts every channel by numbers of its own."""
    BATCH_NORM = auto()
    """Scales and shifts every channel in inference, by the statistics of training."""
    RECTIFIES = auto()
    """max(x, 0)."""
    PIECEWISE = auto()
    """Piecewise linear but not linear: its encode rule uses ReLUs or maxima."""
    SATURATES = auto()
    """Large inputs of different size have almost the same output."""
    SOFTMAX = auto()
    """Normalises along an axis to probabilities, or to their logarithms."""
    QUANTISES = auto()
    """Maps real numbers to codes."""
    DEQUANTISES = auto()
    """Maps codes to real numbers."""
    BRANCHES = auto()
    """Runs one of its bodies."""


NO_TRAITS = Trait(0)


@dataclass(frozen=True, slots=True)
class OpSpec:
    """Everything known about one operator. Only ``channels`` is required.

    ``domain``, ``since`` and ``until`` (the last opset version included) say which operator it is, the other fields are
    its facets.
    """

    name: str
    channels: ChannelRule
    domain: str = ""
    since: int = 1
    until: int | None = None
    edit: EditRules = EditRules()
    cost: CostRule | None = None
    linear: Linear | None = None
    """How it is a matrix product of its data input with a constant weight, whose weights and bias can be refitted."""
    encode: EncodeRule | None = None
    """States the operator exactly by linear maps, ReLUs and maxima; raises Refused for a form it cannot state."""
    shape: LikeInput | LikeProduct | None = None
    """For operators whose shapes ONNX's own inference does not know."""
    flow: Callable[[Node], Flow] | None = None
    """For nodes with bodies that are followed: what passes in and out."""
    traits: Trait = NO_TRAITS


def operand(node: Node, index: int) -> str | None:
    """Name of input ``index``, or None where it is absent (an empty name counts as absent)."""
    return (node.inputs[index] or None) if index < len(node.inputs) else None


def integers(node: Node, labels: Labels | Cuts | Terms, name: str, index: int) -> Ints | None:
    """An integer list given as attribute ``name`` (old opsets) or as constant input ``index``; None if neither.

    Raises KeyError where the input is there but is not a constant, so that a rule can tell the two apart.
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
