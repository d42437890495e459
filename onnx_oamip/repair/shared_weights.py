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


@dataclass(frozen=True)
class Rows:
    """Sampled rows of one use of a weight.

    Attributes:
        x: Inputs (groups, rows, inputs * taps), in units of the first use.
        y: Wanted outputs (groups, rows, outputs).
        residual: What the outputs still lack (groups, rows, outputs).
    """

    x: Floats
    y: Floats
    residual: Floats

    def centred(self) -> Rows:
        """Subtract the means of the rows, for a use with a bias of its own.

        Returns:
            The centred rows.
        """
        x, y, residual = (
            v - v.mean(axis=1, keepdims=True) for v in (self.x, self.y, self.residual)
        )
        return Rows(x, y, residual)


def stacked(parts: Sequence[Rows], held_out: float) -> tuple[Rows, int]:
    """Stack the rows of all uses, so that the normal equations are the sums of those of the uses.

    Args:
        parts: Rows of every use, at least two each and in the order of the samples.
        held_out: Share of the rows of every use, its last ones, that come last.

    Returns:
        The rows, and the number of those in front of the ones held out.
    """
    splits = []
    for part in parts:
        rows = part.y.shape[1]
        splits.append(min(int(np.ceil((1 - held_out) * rows)), rows - 1))

    def stack(arrays: Sequence[Floats]) -> Floats:
        if len(arrays) == 1:
            return arrays[0]
        first = [a[:, :split] for a, split in zip(arrays, splits, strict=True)]
        last = [a[:, split:] for a, split in zip(arrays, splits, strict=True)]
        return np.concatenate([*first, *last], axis=1)

    x, y, residual = (
        stack([getattr(part, field) for part in parts]) for field in ("x", "y", "residual")
    )
    return Rows(x, y, residual), sum(splits)
