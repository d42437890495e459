"""Graph of a network for a page: its layers with their widths before and after pruning, in rows along the data flow.

Boxes are layers with weights, and nodes where several of their outputs meet. A network with more boxes than ``MOST`` is
drawn by blocks: layers that stand one after the other and share the start of their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from onnx_oamip.core.records import Axis, Bools, Coupling, Floats, Model, Node
from onnx_oamip.graph.ops import lookup

MOST = 40
"""Largest number of boxes."""
SWEEPS = 4
"""Passes that order the boxes of each row, alternately by those above and those below."""


@dataclass(frozen=True)
class Box:
    """A box of the drawing.

    Attributes:
        name: Name of the node, or what the names of a block begin with.
        kind: Operator, or the number of layers of a block.
        before: Channels of its outputs before pruning; None if none of them can be removed.
        after: Those that are kept.
    """

    name: str
    kind: str
    before: int | None = None
    after: int | None = None


@dataclass(frozen=True)
class Network:
    """Boxes in the order of the graph, and the edges between them; an edge leads to a later box."""

    boxes: Sequence[Box]
    edges: frozenset[tuple[int, int]]

    def places(self) -> list[tuple[float, int]]:
        """Lay out the boxes.

        A row is one below the lowest predecessor; in a row, boxes stand in the order of the mean column of their
        neighbours, which keeps edges short.

        Returns:
            Column, counted from the middle, and row of every box.
        """
        count = len(self.boxes)
        rows = [0] * count
        for start, end in sorted(self.edges, key=lambda edge: edge[1]):
            rows[end] = max(rows[end], rows[start] + 1)
        above = _neighbours(count, ((end, start) for start, end in self.edges))
        below = _neighbours(count, self.edges)
        members: list[list[int]] = [[] for _ in range(max(rows, default=0) + 1)]
        for box, row in enumerate(rows):
            members[row].append(box)
        columns = np.zeros(count)
        for sweep in range(SWEEPS):
            is_upward = sweep % 2 == 1
            near = below if is_upward else above
            for boxes in members[::-1] if is_upward else members:
                means = [_mean(columns, near[box]) for box in boxes]
                order = np.lexsort((boxes, means))
                columns[np.asarray(boxes)[order]] = np.arange(len(boxes)) - (len(boxes) - 1) / 2
        return [(float(columns[box]), rows[box]) for box in range(count)]


def network(model: Model, coupling: Coupling, keep: Bools) -> Network:
    """Find the layers of a model and the edges between them.

    Args:
        model: The original.
        coupling: Its units.
        keep: Units that are kept (n_units,).

    Returns:
        The layers, by blocks if there are more than ``MOST``.
    """
    by_tensor: dict[str, list[Axis]] = {}
    for axis in coupling.axes:
        by_tensor.setdefault(axis[0], []).append(axis)
    boxes: list[Box] = []
    edges: set[tuple[int, int]] = set()
    sources: dict[str, frozenset[int]] = {}
    for port in model.inputs:
        sources[port.name] = frozenset({len(boxes)})
        boxes.append(Box(port.name, "input"))
    for node in model.nodes:
        fed = [sources[name] for name in (*node.inputs, *node.captures) if name in sources]
        origins = frozenset[int]().union(*fed)
        if _is_layer(node) or len(set(fed)) > 1:
            edges |= {(origin, len(boxes)) for origin in origins}
            origins = frozenset({len(boxes)})
            axes = [axis for name in node.outputs for axis in by_tensor.get(name, ())]
            boxes.append(Box(node.name, node.op, *_widths(axes, coupling, keep)))
        if origins:
            sources |= dict.fromkeys(node.outputs, origins)
    for port in model.outputs:
        edges |= {(origin, len(boxes)) for origin in sources.get(port.name, ())}
        boxes.append(Box(port.name, "output"))
    whole = Network(boxes, frozenset(edges))
    return whole if len(boxes) <= MOST else _blocks(whole)


def _is_layer(node: Node) -> bool:
    """True for a node with weights of its own, or with a body."""
    spec = lookup(node.domain, node.op, node.version)
    return bool(node.bodies) or (spec is not None and spec.linear is not None)


def _widths(
    axes: Sequence[Axis], coupling: Coupling, keep: Bools
) -> tuple[int, int] | tuple[None, None]:
    """Channels before and after, of the axis with the most units."""
    found: tuple[int, int] | tuple[None, None] = (None, None)
    most = 0
    for axis in axes:
        units = coupling.axes[axis]
        removable = units >= 0
        count = int(removable.sum())
        if count > most:
            most = count
            found = (len(units), len(units) - count + int(keep[units[removable]].sum()))
    return found


def _blocks(whole: Network) -> Network:
    """Put boxes that follow each other into blocks, by the longest starts of names that give few enough."""
    parts = [re.split(r"(?<=[^/.])(?=[/.])", box.name) for box in whole.boxes]
    for depth in range(max(map(len, parts)) - 1, 0, -1):
        starts = ["".join(part[:depth]) for part in parts]
        runs = [list(run) for _, run in groupby(range(len(starts)), starts.__getitem__)]
        if len(runs) <= MOST:
            return _merged(whole, runs, [starts[run[0]] for run in runs])
    edges = np.linspace(0, len(parts), MOST + 1).round().astype(int).tolist()
    runs = [list(range(*ends)) for ends in pairwise(edges)]
    return _merged(whole, runs, [""] * len(runs))


def _merged(whole: Network, runs: Sequence[Sequence[int]], names: Sequence[str]) -> Network:
    """The network with one box for every run of boxes; one without a name of its own has those of its ends."""
    place = {box: number for number, run in enumerate(runs) for box in run}
    boxes = []
    for run, name in zip(runs, names, strict=True):
        inside = [whole.boxes[box] for box in run]
        if len(run) == 1:
            boxes.append(inside[0])
            continue
        is_unique = names.count(name) == 1
        label = name if is_unique else f"{inside[0].name} … {inside[-1].name}"
        known = [
            (b.before, b.after) for b in inside if b.before is not None and b.after is not None
        ]
        sums = (sum(b for b, _ in known), sum(a for _, a in known)) if known else (None, None)
        boxes.append(Box(label, f"{len(run)} layers", *sums))
    edges = {(place[a], place[b]) for a, b in whole.edges}
    return Network(boxes, frozenset((a, b) for a, b in edges if a != b))


def _neighbours(
    count: int, pairs: Iterator[tuple[int, int]] | frozenset[tuple[int, int]]
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(count)]
    for box, other in pairs:
        found[box].append(other)
    return found


def _mean(columns: Floats, boxes: Sequence[int]) -> float:
    """Mean column of the boxes; the middle without any."""
    return float(np.mean(columns[list(boxes)])) if boxes else 0.0
