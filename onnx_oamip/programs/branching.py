"""Branch and bound over the subsets of one group, on the relaxation of its loss.

Where units make up for each other, the relaxation is far below every set, and tangent planes prove no more than that.
Removing or keeping single units tightens it. Every node is bounded by the tangent plane at its own relaxed point, so
that its bound holds even if that point is not optimal; the node of least bound comes first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from onnx_oamip.core.records import Bools, Floats
from onnx_oamip.programs.subset import Loss, Relaxation

TURNS = 1
"""Steps towards the optimum of the relaxation of a node, from the point of its parent: more nodes prove more than more
steps."""
HALF = 0.5
"""Keep variable of a unit that is as undecided as can be."""


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
        relaxed: Point of the relaxation (units,).
    """

    bound: float
    number: int
    free: Bools = field(compare=False)
    kept: Bools = field(compare=False)
    relaxed: Floats = field(compare=False)


def plane_bound(
    loss: Relaxation,
    at: Floats,
    free: Bools,
    kept: Bools,
    count: int,
) -> float:
    """Bound the losses of sets by the tangent plane at a point.

    Args:
        loss: Relaxation of the loss for these sets.
        at: Keep variables in [0, 1] (units,).
        free: Units that may be kept (units,).
        kept: Units that are kept, a subset of the free ones (units,).
        count: Number of units to keep.

    Returns:
        Least value of the plane over the sets.
    """
    value, gradient = loss.convex(at)
    slope = gradient - loss.diagonal
    constant = value - float(gradient @ at) + float(loss.diagonal.sum())
    cheapest = np.sort(slope[free & ~kept])[: count - int(kept.sum())]
    return constant + float(slope[kept].sum()) + float(cheapest.sum())


def search(
    loss: Loss,
    free: Bools,
    first: Bools,
    *,
    relaxed: Floats,
    flops: float,
    gap: float,
    is_over: Callable[[], bool],
) -> Searched:
    """Search the subsets of some units that have a given size.

    Args:
        loss: Loss of the group.
        free: Units that may be kept (units,).
        first: First set, a subset of the free units (units,); its size is that of all sets.
        relaxed: Point of the relaxation to begin with (units,).
        flops: Floating-point operations that may be spent.
        gap: Gap relative to the loss at which to stop.
        is_over: Called before every branching; True ends the search.

    Returns:
        The best set, and the bound of all sets.
    """
    tree = _Tree(loss, first)
    tree.add(loss, free, np.zeros(len(free), bool), relaxed, bound=-np.inf)
    while tree.open and tree.flops < flops and not is_over():
        if tree.value - tree.open[0].bound <= gap * tree.value:
            break
        node = heapq.heappop(tree.open)
        for child_free, child_kept in _branches(node):
            relaxation = loss.between(child_free, child_kept)
            point = relaxation.relax(
                child_free,
                tree.count,
                TURNS,
                kept=child_kept,
                start=node.relaxed,
            )
            tree.flops += (TURNS + 1) * relaxation.flops
            tree.add(relaxation, child_free, child_kept, point, bound=node.bound)
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

    def add(
        self,
        relaxation: Relaxation,
        free: Bools,
        kept: Bools,
        relaxed: Floats,
        bound: float,
    ) -> None:
        """Round a node's point to a set, and keep the node if a better set may be in it.

        Args:
            relaxation: Relaxation of the loss for the sets of the node.
            free: Units that may be kept (units,).
            kept: Units that are kept (units,).
            relaxed: Point of the relaxation (units,).
            bound: Bound of the parent.
        """
        self.number += 1
        ranked = np.argsort(-np.where(free, relaxed, -1.0), kind="stable")
        rounded = np.zeros(len(free), bool)
        rounded[ranked[: self.count]] = True
        value = self.loss.value(rounded)
        if value < self.value:
            self.keep, self.value = rounded, value
        if int(kept.sum()) == self.count or int(free.sum()) == self.count:
            return  # the rounded set is the only one
        bound = max(bound, plane_bound(relaxation, relaxed, free, kept, self.count))
        if bound < self.value:
            heapq.heappush(self.open, _Node(bound, self.number, free, kept, relaxed))


def _branches(node: _Node) -> Iterator[tuple[Bools, Bools]]:
    """Free and kept units of the two children: without the most undecided unit, and with it."""
    undecided = np.flatnonzero(node.free & ~node.kept)
    unit = undecided[np.argmin(np.abs(node.relaxed[undecided] - HALF))]
    without, with_it = node.free.copy(), node.kept.copy()
    without[unit] = False
    with_it[unit] = True
    yield without, node.kept
    yield node.free, with_it
