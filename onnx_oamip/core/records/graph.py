"""Records of a model, of how samples are read for it, and of its coupling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnx_oamip.core.printable import shortened

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]
Axis = tuple[str, int]
"""One axis of one tensor: (tensor name, non-negative axis)."""


@dataclass(frozen=True, slots=True)
class Node:
    """One call of an operator.

    Attributes:
        captures: Tensors of outer graphs that only the bodies read.
        bodies: Subgraphs by the name of their attribute.
    """

    name: str
    op: str
    domain: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    captures: tuple[str, ...] = ()
    bodies: Mapping[str, Body] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} '{shortened(self.name)}'"


@dataclass(frozen=True, slots=True)
class Body:
    """Subgraph of a node: a branch of If, the body of Loop or Scan. Its constants are those of the model."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]


def within(nodes: Iterable[Node]) -> Iterator[Node]:
    """Walk over nodes and those in their bodies.

    Args:
        nodes: Nodes of one graph.

    Yields:
        All nodes, those of a body before the node that holds it.
    """
    for node in nodes:
        for body in node.bodies.values():
            yield from within(body.nodes)
        yield node


@dataclass(frozen=True, slots=True)
class Port:
    """Graph input or output.

    Attributes:
        dims: Size of every axis: a number, the name of a symbol, or None if unknown.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Reading:
    """Options for reading samples from images and tables; defaults fit a network fed with values from 0 to 1.

    Attributes:
        size: (height, width) of images; None for that of the model.
        fit: ``crop`` resizes the short side and cuts out the middle, ``pad`` resizes the long side and fills up, and
            ``stretch`` resizes both.
        scale: Factor of the 8-bit codes of an image; None for 1/255, or 1 for an input of whole numbers.
        mean: Subtracted from the scaled values, per channel.
        std: Divisor of the result, per channel.
        layout: Order of the axes of an image input.
        color: Order of its channels.
        most: Largest number of samples to read, evenly over the classes.
        column: Column of a table that holds the samples.
    """

    size: tuple[int, int] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    scale: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    color: Literal["rgb", "bgr"] = "rgb"
    most: int = 2048
    column: str | None = None


@dataclass(frozen=True)
class Interface:
    """Inputs of a model file, where some of them have default values.

    Attributes:
        inputs: Declarations of all inputs, in the order of the file; empty if none has a default value.
        defaults: Default values (tensors) by name.
        notes: Remarks for reports.
    """

    inputs: tuple[Any, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Folded:
    """Origin of a constant that nodes of the file compute, and that was computed when the file was loaded.

    Attributes:
        initialisers: Names of the initialisers of the file that hold its values, that with the most elements first.
        nodes: Names of the nodes.
    """

    initialisers: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded model: constants folded, nodes named, shapes known for one batch.

    Names of tensors and nodes are unique over all bodies.

    Attributes:
        proto: The normalised graph, with the symbolic dimensions of the file.
        nodes: Nodes of the graph itself, without those in bodies.
        constants: Values of constant tensors by name: initialisers, and what nodes compute from them alone.
        shapes: Concrete shapes by tensor, under ``bindings``.
        dtypes: Element types by tensor.
        inputs: Graph inputs.
        outputs: Graph outputs.
        bindings: Size of every symbolic dimension.
        batch: Samples at these shapes, over which costs are divided.
        path: File that the model was read from.
        sha256: Digest of the file.
        file_bytes: Size of the file with its external data.
        interface: Inputs of the file with default values, which are constants here.
        notes: Remarks for reports.
        computed: Names of the constants that nodes compute.
        views: Initialiser by the name of a computed constant that holds its elements, transposed, reshaped, cast or
            dequantised.
        folded: Origin in the file of the constants that were computed from initialisers on loading.
        assumed: Symbolic dimensions whose size is a default.
        idle: Node by the name of every node in a branch of it that no calibration sample runs.
        aside_params: Parameters of branches that were left out of the graph (see ``graph.taken_branches``).
        aside_bytes: Their bytes.
    """

    proto: Any
    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    bindings: Mapping[str, int]
    batch: int
    path: str
    sha256: str
    file_bytes: int
    interface: Interface = Interface()
    notes: tuple[str, ...] = ()
    computed: frozenset[str] = frozenset()
    views: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, Folded] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    aside_params: int = 0
    aside_bytes: int = 0

    def __repr__(self) -> str:
        return f"<Model {self.path}: {len(self.nodes)} nodes, {self.file_bytes:,} bytes>"

    @property
    def initialisers(self) -> list[str]:
        """Names of the constants that are stored."""
        return [name for name in self.constants if name not in self.computed]

    def is_stored(self, tensor: str) -> bool:
        """Tests for an initialiser.

        Args:
            tensor: Name of a tensor.

        Returns:
            True for a constant that no node computes.
        """
        return tensor in self.constants and tensor not in self.computed

    def source(self, constant: str) -> str:
        """Name of the initialiser that holds the elements of a constant.

        Args:
            constant: Name of an initialiser, or of a constant that is computed.

        Returns:
            The initialiser that the constant is a view of, or else the name itself.
        """
        return self.views.get(constant, constant)

    def file_names(self, constant: str) -> tuple[str, ...]:
        """List the initialisers of the file that hold the values of a constant.

        Args:
            constant: Name of an initialiser, or of a constant that is computed.

        Returns:
            Their names, that with the most elements first. Several for weights that were joined on loading.
        """
        stored = self.source(constant)
        origin = self.folded.get(stored)
        if origin is None or not origin.initialisers:
            return (stored,)
        return origin.initialisers

    @property
    def every(self) -> tuple[Node, ...]:
        """All nodes, including those in bodies."""
        return tuple(within(self.nodes))

    @property
    def homes(self) -> dict[str, str]:
        """Name of the node of the graph itself that holds a node, by the name of the inner node."""
        return {inner.name: node.name for node in self.nodes for inner in within((node,))}

    def port(self, name: str) -> Port:
        """Return a graph input.

        Args:
            name: Its name.

        Returns:
            The input with its type and dimensions.
        """
        return next(p for p in self.inputs if p.name == name)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A node that contracts an axis of one of its inputs.

    Attributes:
        node: Name of the node.
        slot: Index of the input.
        data: Tensor that is contracted.
        axis: Its contracted axis.
        weight: The other operand: a constant, or another activation (attention scores); None for a plain sum.
        weight_axis: Contracted axis of the other operand.
        groups: Blocks of channels that share the weight axis (grouped convolution), otherwise 1.
    """

    node: str
    slot: int
    data: str
    axis: int
    weight: str | None
    weight_axis: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """Units that occupy the same axes equally often, so that only their number matters to the cost.

    Attributes:
        name: Name of the group.
        units: The units of the group.
        multiplicity: Number of indices that one unit occupies on every axis of the group.
    """

    name: str
    units: Ints
    multiplicity: Mapping[Axis, int]


@dataclass(frozen=True, slots=True)
class Pinned:
    """Channels of a constant that cannot be removed, with the reason.

    Attributes:
        given: Whether the reason is the interface of the model or an exclusion by the user.
    """

    tensor: str
    axis: int
    count: int
    reason: str
    given: bool = False


@dataclass(frozen=True, repr=False)
class Coupling:
    """The relation that ties channels across tensors.

    Attributes:
        n_units: Number of units.
        groups: Units that occupy the same axes.
        unit_group: Group of every unit (n_units,).
        axes: Unit of every index of an axis; -1 for a pinned index.
        consumers: Nodes that contract a coupled axis.
        pinned: Channels that cannot be removed.
        inside: Consumers in the bodies of If, Loop and Scan, which no statistic covers.
    """

    n_units: int
    groups: tuple[Group, ...]
    unit_group: Ints
    axes: Mapping[Axis, Ints]
    consumers: tuple[Consumer, ...]
    pinned: tuple[Pinned, ...]
    inside: tuple[Consumer, ...] = ()

    def __repr__(self) -> str:
        return f"<Coupling: {self.n_units:,} units in {len(self.groups)} groups, {len(self.pinned)} pinned axes>"

    def keep(self, axis: Axis, units: Bools) -> Bools:
        """Turn a keep mask of units into one of the indices of an axis.

        Args:
            axis: A coupled axis.
            units: Mask of the units to keep (n_units,).

        Returns:
            Mask of the indices to keep.
        """
        labels = self.axes[axis]
        if not self.n_units:
            return np.ones(labels.shape, bool)
        return np.where(labels < 0, True, units[labels])


@dataclass(frozen=True, eq=False)
class Whole:
    """The model of the file, where branches of If nodes stand in the graph that is analysed.

    Attributes:
        model: The model with its If nodes.
        coupling: The same units in it.
        returns: Names of the nodes that give the outputs of the branches their names outside.
    """

    model: Model
    coupling: Coupling
    returns: frozenset[str]
