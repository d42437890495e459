"""Records of what is given: a model, how to read data for it, and what goes together in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]
Axis = tuple[str, int]
"""One axis of one tensor: (tensor name, non-negative axis)."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call. ``captures`` are outer tensors that only its bodies read; ``bodies`` by attribute name."""

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
        return f"{self.op} '{self.name}'"


@dataclass(frozen=True, slots=True)
class Body:
    """A graph inside a node: a branch of If, the body of Loop or Scan. Its constants are those of the model."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]


def within(nodes: Iterable[Node]) -> Iterator[Node]:
    """Nodes and those in their bodies, every body before the node that holds it."""
    for node in nodes:
        for body in node.bodies.values():
            yield from within(body.nodes)
        yield node


@dataclass(frozen=True, slots=True)
class Port:
    """A graph input or output: ``dims`` holds an int, a symbol's name, or None where nothing is known."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Reading:
    """How samples are read from images and tables; defaults fit a network fed with values from 0 to 1.

    ``size``: (height, width), None for the model's own; ``fit``: resize the short side and cut the middle out
    (``crop``), the long side and fill up (``pad``), or both (``stretch``); ``mean`` and ``std`` per channel, in values
    after ``scale``; ``most``: samples read at most, spread evenly over the classes; ``column``: of a table.
    """

    size: tuple[int, int] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    color: Literal["rgb", "bgr"] = "rgb"
    most: int = 2048
    column: str | None = None


@dataclass(frozen=True)
class Model:
    """A loaded model: constants folded, nodes named, shapes known for one feed of ``batch`` samples.

    ``proto`` is the normalised graph with symbolic dimensions as they were in the file; ``shapes`` holds concrete
    shapes under ``bindings`` (symbol -> size). ``nodes`` are those of the graph itself; names of tensors and nodes are
    unique over the bodies too (see ``bodies``). ``notes``: what a reader of a report should know about it.
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
    notes: tuple[str, ...] = ()

    @property
    def every(self) -> tuple[Node, ...]:
        """All nodes, those in bodies among them."""
        return tuple(within(self.nodes))

    @property
    def homes(self) -> dict[str, str]:
        """The node of the graph itself by every node in its bodies."""
        return {inner.name: node.name for node in self.nodes for inner in within((node,))}

    def port(self, name: str) -> Port:
        """The graph input called ``name``."""
        return next(p for p in self.inputs if p.name == name)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A place where channels are summed over: ``node`` reads ``data`` along ``axis`` and contracts it.

    ``weight`` is what meets it along ``weight_axis``: a constant, another activation (attention scores), or None where
    nothing does (a plain sum). ``groups`` is the number of channel blocks that share the weight axis (grouped
    convolution; 1 otherwise).
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


@dataclass(frozen=True)
class Coupling:
    """What must go together. ``axes`` maps an axis to the unit of each index (-1: pinned).

    ``inside``: consumers in the bodies of If, Loop and Scan, whose data no statistic reaches.
    """

    n_units: int
    groups: tuple[Group, ...]
    unit_group: Ints
    axes: Mapping[Axis, Ints]
    consumers: tuple[Consumer, ...]
    pinned: tuple[Pinned, ...]
    inside: tuple[Consumer, ...] = ()

    def keep(self, axis: Axis, units: Bools) -> Bools:
        """Which indices of ``axis`` stay when ``units`` (n_units,) says which units stay."""
        labels = self.axes[axis]
        return (
            np.where(labels < 0, True, units[labels])
            if self.n_units
            else np.ones(labels.shape, bool)
        )
