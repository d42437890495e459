"""Branch and bound over the subsets of one group, on the relaxations of its loss.

Where units make up for each other, a relaxation is below every set, and its planes prove no more than that. Removing or
keeping single units tightens it. Every node is bounded by a plane that holds for all its sets, even if the optimum of
the relaxation is only approached; the node of least bound comes first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from onnx_oamip.core.records import Bools
from onnx_oamip.programs.subset import Loss, Plane


@dataclass(frozen=True, eq=False)
class Searched:
    """Result of a search.

    Attributes:
        keep: Best set (units,).
        value: Loss of the set.
        bound: Proved lower bound of the loss.
        nodes: Number of nodes.
        flops: Approximate number of floating-point operations spent.
    """

    keep: Bools
    value: float
    bound: float
    nodes: int
    flops: float


@dataclass(order=True, frozen=True)
class _Node:
    """All sets that contain the units ``kept`` and no others than ``free``.

    Attributes:
        bound: Proved lower bound of their losses.
        number: Number of the node, which makes the order of equal bounds definite.
        free: Units that may be kept (units,).
        kept: Units that are kept (units,).
        plane: Plane below their losses.
    """

    bound: float
    number: int
    free: Bools = field(compare=False)
    kept: Bools = field(compare=False)
    plane: Plane = field(compare=False)


def search(
    loss: Loss,
    free: Bools,
    first: Bools,
    *,
    root: Plane,
    flops: float,
    gap: float,
    is_over: Callable[[], bool],
) -> Searched:
    """Search the subsets of some units that have a given size.

    Args:
        loss: Loss of the group.
        free: Units that may be kept (units,).
        first: First set, a subset of the free units (units,); its size is that of all sets.
        root: Plane below the losses of all sets.
        flops: Floating-point operations that may be spent.
        gap: Gap relative to the loss at which to stop.
        is_over: Called before every branching; True ends the search.

    Returns:
        The best set, and the bound of all sets.
    """
    tree = _Tree(loss, first)
    tree.add(root, free, np.zeros(len(free), bool), bound=-np.inf)
    while tree.open and tree.flops < flops and not is_over():
        if tree.value - tree.open[0].bound <= gap * tree.value:
            break
        node = heapq.heappop(tree.open)
        for child_free, child_kept in _branches(node):
            only = tree.only_set(child_free, child_kept)
            if only is not None:
                tree.offer(only)
                continue
            relaxation = loss.between(child_free, child_kept)
            plane = relaxation.plane(tree.count, flops, node.plane)
            tree.flops += plane.flops
            tree.add(plane, child_free, child_kept, bound=node.bound)
    bound = tree.open[0].bound if tree.open else tree.value
    return Searched(tree.keep, tree.value, min(bound, tree.value), tree.number, tree.flops)


class _Tree:
    """Open nodes and the best set so far."""

    def __init__(self, loss: Loss, first: Bools) -> None:
        self.loss = loss
        self.count = int(first.sum())
        self.keep = first
        self.value = loss.value(first)
        self.open: list[_Node] = []
        self.number = 0
        self.flops = 0.0

    def only_set(self, free: Bools, kept: Bools) -> Bools | None:
        """The set of a node that has only one, counted as a node; None if it has more."""
        if int(kept.sum()) == self.count:
            only = kept
        elif int(free.sum()) == self.count:
            only = free
        else:
            return None
        self.number += 1
        return only

    def offer(self, keep: Bools) -> None:
        """Take a set if its loss is lower."""
        value = self.loss.value(keep)
        if value < self.value:
            self.keep, self.value = keep, value

    def add(self, plane: Plane, free: Bools, kept: Bools, bound: float) -> None:
        """Round a node's point to a set, and keep the node if a better set may be in it.

        Args:
            plane: Plane below the losses of the sets of the node.
            free: Units that may be kept (units,).
            kept: Units that are kept (units,).
            bound: Bound of the parent.
        """
        self.number += 1
        ranked = np.argsort(-np.where(free, plane.keep, -1.0), kind="stable")
        rounded = np.zeros(len(free), bool)
        rounded[ranked[: self.count]] = True
        self.offer(rounded)
        bound = max(bound, plane.least(free, kept, self.count))
        if bound < self.value:
            heapq.heappush(self.open, _Node(bound, self.number, free, kept, plane))


def _branches(node: _Node) -> Iterator[tuple[Bools, Bools]]:
    """Free and kept units of the two children: without the unit of most doubt, and with it."""
    undecided = np.flatnonzero(node.free & ~node.kept)
    unit = undecided[np.argmax(node.plane.doubt[undecided])]
    without, with_it = node.free.copy(), node.kept.copy()
    without[unit] = False
    with_it[unit] = True
    yield without, node.kept
    yield node.free, with_it
