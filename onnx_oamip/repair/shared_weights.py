"""Weights that several nodes share: which nodes are refitted together, and from which inputs.

One initialiser is one set of unknowns. The least-squares problem of a shared weight is the sum of the problems of its
uses: their normal equations are added, by stacking their rows. The input of a use may depend on the weight itself, or
on one that is refitted later; then it is unknown before the fit, and the input of the original model, without the
removed channels, takes its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from onnx_oamip.core.records import Floats, Model, Node
from onnx_oamip.graph.computed_constants import Constants
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.outputs import is_float
from onnx_oamip.graph.partial_execution import Slicer


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


class Sharing:
    """Uses of the initialisers of a model, through nodes that transpose, reshape, cast or dequantise them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._main = {node.name for node in model.nodes}
        self._given_out = {model.source(port.name) for port in model.outputs}
        self._uses: dict[str, list[tuple[Node, int]]] = defaultdict(list)
        for node in model.every:
            is_view = bool(node.outputs) and node.outputs[0] in model.views
            for slot, name in enumerate(node.inputs):
                if name in model.constants and not (is_view and slot == 0):
                    self._uses[model.source(name)].append((node, slot))

    def family(self, place: Site) -> tuple[Site, ...]:
        """Find the linear nodes that read the weight of a node.

        Args:
            place: A linear node.

        Returns:
            The nodes in graph order.
        """
        nodes = [node for node, _ in self._uses[self._model.source(place.weight)]]
        places = (site(node, self._model.constants) for node in nodes if node.name in self._main)
        return tuple(other for other in places if other is not None)

    def obstacle(self, place: Site) -> str:
        """Find why the weight of a linear node cannot be refitted.

        Args:
            place: The linear node.

        Returns:
            The reason, empty where it can.
        """
        model = self._model
        source = model.source(place.weight)
        if source in model.computed:
            return f"its weight '{place.weight}' is computed from constants"
        kind = model.dtypes[source]
        if not is_float(kind) and kind.kind not in "iu":
            return f"its weight is stored as '{source}' of {model.dtypes[source]}"
        if source in self._given_out:
            return f"its weight '{source}' is a graph output"
        form = _form(model, place)
        for node, slot in self._uses[source]:
            if node.name in self._main:
                other = site(node, model.constants)
            else:
                other = None
            is_alike = other is not None and other.weight_slot == slot
            if other is None or not is_alike or _form(model, other) != form:
                return (
                    f"its weight '{source}' is shared with {node}, which reads it in another form"
                )
        return ""


def _form(model: Model, place: Site) -> tuple[object, ...]:
    """Form in which a linear node reads its weight as a matrix; equal for nodes that read it alike."""
    path: list[bytes] = []
    if isinstance(model.constants, Constants):
        for node in model.constants.path(place.weight):
            attributes = [a.SerializeToString(deterministic=True) for a in node.attribute]
            path += [
                node.op_type.encode(),
                *attributes,
                *(name.encode() for name in node.input[1:]),
            ]
    rules = place.rules
    plain = rules.spatial, rules.scatters, place.weight_axis, place.groups, place.kernel
    return (*plain, *path)


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
    """

    x: Floats
    residual: Floats

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
        return self if factor == 1 else Rows(self.x * factor, self.residual)


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
