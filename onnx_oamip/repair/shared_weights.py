"""Weights that several nodes share: which nodes are refitted together, and from which inputs.

One initialiser is one set of unknowns. The least-squares problem of a shared weight is the sum of the problems of its
uses: their normal equations are added, by stacking their rows. The input of a use may depend on the weight itself, or
on one that is refitted later; then it is unknown before the fit, and the input of the original model, without the
removed channels, takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from onnx_oamip.core.records import Floats
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Slicer
from onnx_oamip.repair.clamped_targets import Bounds


@dataclass(frozen=True)
class Family:
    """Linear nodes that are refitted together, because they share a weight.

    Attributes:
        uses: The nodes in graph order; one for a weight that is not shared.
        late: Names of the nodes whose inputs in the cut model are known only after the fit.
    """

    uses: tuple[Site, ...]
    late: frozenset[str] = frozenset()

    @property
    def is_shared(self) -> bool:
        """True if there are several uses."""
        return len(self.uses) > 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(place.node.name for place in self.uses)

    @property
    def title(self) -> str:
        """Name for reports: the first node, and how many others share its weight."""
        others = len(self.uses) - 1
        if others:
            return f"{self.names[0]} and {others} more"
        return self.names[0]


def schedule(families: Sequence[Family], slicer: Slicer) -> list[Family]:
    """Find the uses whose inputs are known only after the fit of their weight.

    Every family is refitted when its first use is reached. The bias of a late use follows when that use is reached.

    Args:
        families: The families, in the order of their first uses.
        slicer: Index of the model.

    Returns:
        The families in the same order.
    """
    place_of = {node.name: i for i, node in enumerate(slicer.nodes)}
    done_at: dict[str, int] = {}
    result: list[Family] = []
    for family in families:
        now = place_of[family.names[0]]
        waiting = {n for other in families[len(result) :] for n in other.names}
        late = set()
        for place in family.uses if family.is_shared else ():
            before = {slicer.nodes[i].name for i in slicer.needed([place.data], ())}
            if not before.isdisjoint(waiting) or any(done_at.get(n, -1) >= now for n in before):
                late.add(place.node.name)
        for name in family.names:
            done_at[name] = place_of[name] if name in late else now
        result.append(replace(family, late=frozenset(late)))
    return result


class Spread(NamedTuple):
    """Wanted outputs of one use of a weight at its sampled rows.

    Attributes:
        rows: Their number.
        mean: Means of the outputs (outputs,).
        variance: Their variances (outputs,).
    """

    rows: int
    mean: Floats
    variance: Floats


def pooled_variance(spreads: Sequence[Spread], *, own_means: bool) -> float:
    """Variance of the outputs of several uses together, summed over the outputs.

    Args:
        spreads: The outputs of every use.
        own_means: Subtract the mean of every use, not that of all.

    Returns:
        The sum.
    """
    counts = np.asarray([spread.rows for spread in spreads], np.float64)[:, None]
    means = np.stack([spread.mean for spread in spreads])
    within = np.stack([spread.variance for spread in spreads])
    mean = (counts * means).sum(axis=0) / counts.sum()
    between = 0.0 if own_means else np.square(means - mean)
    return float((counts * (within + between)).sum() / counts.sum())


@dataclass(frozen=True)
class Rows:
    """Sampled rows of one use of a weight, or of all.

    Attributes:
        x: Inputs (groups, rows, inputs * taps), in units of the first use.
        residual: What the outputs still lack (groups, rows, outputs).
        bounds: Bounds of the clamp behind the outputs of a weight that is not shared; None if there is none.
    """

    x: Floats
    residual: Floats
    bounds: Bounds | None = None

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.x.shape[1])

    @property
    def means(self) -> tuple[Floats, Floats]:
        """Means of the inputs (groups, inputs * taps) and of what the outputs lack (groups, outputs)."""
        return self.x.mean(axis=1), self.residual.mean(axis=1)

    def leading(self, count: int) -> Rows:
        """Take the first rows.

        Args:
            count: Number of rows.

        Returns:
            Views of them.
        """
        return Rows(self.x[:, :count], self.residual[:, :count])

    def times(self, factor: float) -> Rows:
        """Scale the inputs.

        Args:
            factor: The factor; for 1 nothing is copied.

        Returns:
            The rows.
        """
        return self if factor == 1 else replace(self, x=self.x * factor)


def stacked(parts: list[Rows], held_out: float, *, centred: bool) -> tuple[Rows, int]:
    """Stack the rows of all uses, so that the normal equations are the sums of those of the uses.

    Args:
        parts: Rows of every use, at least two each and in the order of the samples. The list is emptied, so that
            memory holds no use twice.
        held_out: Share of the rows of every use, its last ones, that come last.
        centred: Subtract the means of the rows of every use, for uses with biases of their own.

    Returns:
        The rows, and the number of those in front of the ones held out.
    """
    splits = [min(int(np.ceil((1 - held_out) * part.count)), part.count - 1) for part in parts]
    first = parts[0]
    if len(parts) == 1 and not centred:
        return parts.pop(), splits[0]
    total = sum(part.count for part in parts)
    x, residual = (
        np.empty((whole.shape[0], total, whole.shape[2])) for whole in (first.x, first.residual)
    )
    del first
    lead = 0
    rest = sum(splits)
    for split in splits:
        part = parts.pop(0)
        behind = part.count - split
        for whole, piece in ((x, part.x), (residual, part.residual)):
            mean = piece.mean(axis=1, keepdims=True) if centred else 0.0
            np.subtract(piece[:, :split], mean, out=whole[:, lead : lead + split])
            np.subtract(piece[:, split:], mean, out=whole[:, rest : rest + behind])
        del part, piece
        lead += split
        rest += behind
    return Rows(x, residual), sum(splits)
