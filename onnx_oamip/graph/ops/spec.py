"""Entry of one operator: all that the package uses of it, in facets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any

from onnx_oamip.core.records import Array, Axis, Node
from onnx_oamip.graph.ops.handles import Cuts, Labels, Terms
from onnx_oamip.graph.ops.matrix_view import Linear


@dataclass(frozen=True, slots=True)
class Edit:
    """Changes of a node after slicing: attributes to set or drop (None), inputs to replace by constants or drop.

    ``lengths``: numbers to set in an input that another node joins from pieces, by slot and place in the list.

    ``spread`` is an axis along which the node must still see zeros for removed channels: they are inserted in front of
    it and removed behind it. ``ordered``: at their old places; else, where places mean nothing to the node as edited,
    behind the others; ``until``: node behind which they are removed, itself by default. ``scale`` multiplies the first
    output. Both add nodes (``inserted_nodes``), which costs count.
    """

    attrs: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[int, Array | None] = field(default_factory=dict)
    lengths: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    spread: int | None = None
    ordered: bool = True
    until: str = ""
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Flow:
    """Tensors that pass between a node and its bodies.

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
"""The values that stand for zero in inputs, by slot, broadcast to them.

Where such an input is a constant, channels that it meets are masked in it: quantised arithmetic does not change."""
RunsRule = Callable[[Node, Shapes, Mapping[str, Array]], int | None]
"""Counts the runs of a body from the shapes and constants of the model."""
EncodeRule = Callable[[Node, Terms], None]


@dataclass(frozen=True, slots=True)
class EditRules:
    """Changes of a node with its channels: ``repair`` where they are removed, ``zero`` where they are masked."""

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
class LikeOperator:
    """Shapes of an operator that ONNX's inference does not know: those of a standard one.

    ``name``: the standard operator; ``inputs``: slots of the inputs that it reads; ``attrs``: attributes of the same
    name in both.
    """

    name: str
    inputs: tuple[int, ...]
    attrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LikeProduct:
    """Shape of an operator that ONNX's inference does not know: that of its first input times a matrix.

    ``matrix`` gives the shape of that matrix from the shapes of constants.
    """

    matrix: MatrixRule


@dataclass(frozen=True, slots=True)
class Codes:
    """Constant inputs of an operator that reads weights as codes.

    ``formats``: slots of scales, zero points and lengths, which are no parameters of the model; ``bits``: attribute
    with the bits of a code, where the bytes of a weight hold several.
    """

    formats: tuple[int, ...]
    bits: str = ""


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
    SCALES = auto()
    """Multiplies two inputs, element by element."""
    SUBTRACTS = auto()
    """Subtracts the second input from the first, element by element."""
    AVERAGES = auto()
    """Sums positions with the same factors for every channel."""
    BRANCHES = auto()
    """Runs one of its bodies."""
    ELEMENTWISE = auto()
    """Works element by element or channel by channel: inputs of one element along an axis broadcast there."""
    JOINS = auto()
    """Puts its inputs one behind the other along an axis."""


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
    """For products of the data input with a constant weight: their matrix form, by which refits change them."""
    encode: EncodeRule | None = None
    """States the operator exactly by linear maps, ReLUs and maxima; raises Refused for a form it cannot state."""
    shape: LikeInput | LikeOperator | LikeProduct | None = None
    """For operators whose shapes ONNX's own inference does not know."""
    flow: Callable[[Node], Flow] | None = None
    """For nodes with bodies that are followed: the tensors that pass in and out."""
    runs: RunsRule | None = None
    """For loops: how often the body runs in one run of the node, None where only the run shows it."""
    codes: Codes | None = None
    """For operators on codes: which of their constants are parameters."""
    attributes: Mapping[str, int] = field(default_factory=dict)
    """For operators that ONNX's checker does not know: types of attributes, as ``AttributeProto`` numbers them."""
    traits: Trait = NO_TRAITS
