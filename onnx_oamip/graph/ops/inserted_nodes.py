"""The nodes that a cut puts around a node, where that still has to see what went.

Zeros are put back in front of a normalisation and dropped behind it; a mean is scaled down. Where the order of
channels means nothing to the node, the zeros come last: a padding and a slice, which copy whole rows. Where it does,
one zero is padded on and a gather puts it into every place, which copies number by number. The cut adds these nodes,
the costs count them: both take them from here. A model that was cut before has such nodes already, and then only their
constants change: cut twice is cut at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from onnx_oamip.core.records import (
    Array,
    Bools,
    Model,
    Node,
)
from onnx_oamip.graph.ops import Edit


@dataclass(frozen=True)
class Step:
    """A node to add. Inputs name tensors, new constants among them."""

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any]


@dataclass(frozen=True)
class Added:
    """Nodes and constants to add around a node, which then reads ``reads`` (slot 0) and writes ``writes``."""

    steps: tuple[Step, ...]
    constants: Mapping[str, Array]
    reads: str
    writes: str

    def nbytes(self, node: Node) -> int:
        """What they take in a file, with the longer names in the node that they are around."""
        nodes = [
            helper.make_node(s.op, s.inputs, [s.output], s.name, **s.attrs).ByteSize()
            for s in self.steps
        ]
        values = [numpy_helper.from_array(v, name).ByteSize() for name, v in self.constants.items()]
        # A field of a message has a tag of one byte and its length.
        longer = len(self.reads) - len(node.inputs[0]) + len(self.writes) - len(node.outputs[0])
        return sum(n + (2 if n < 128 else 3) for n in (*nodes, *values)) + longer


class Names:
    """Names that are not taken."""

    def __init__(self, model: Model) -> None:
        self._taken = {n.name for n in model.every} | set(model.shapes) | set(model.constants)
        self._taken.update(
            name for n in model.every for name in (*n.inputs, *n.outputs, *n.captures)
        )
        self._taken.update(
            name for n in model.every for b in n.bodies.values() for name in (*b.inputs, *b.outputs)
        )

    def new(self, name: str) -> str:
        """The name, or with a number where it is taken."""
        result, i = name, 1
        while result in self._taken or f"{result}_out" in self._taken:
            result, i = f"{name}_{i}", i + 1
        self._taken.add(result)
        return result


def spread(node: Node, rank: int, axis: int, ordered: bool, keep: Bools, names: Names) -> Added:
    """Zeros where ``keep`` is false in front of the node, along an axis; behind it only what is kept.

    ``ordered``: the zeros go where the channels were, and not behind those that are kept.
    """
    zero = names.new(f"{node.name}_zero")
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + axis] = 1 if ordered else len(keep) - keep.sum()
    constants: dict[str, Array] = {}
    if node.version < 11:
        pad = Step("Pad", zero, (node.inputs[0],), f"{zero}_out", {"pads": pads.tolist()})
    else:
        amounts = names.new(f"{node.name}_zero_pads")
        constants[amounts] = pads
        pad = Step("Pad", zero, (node.inputs[0], amounts), f"{zero}_out", {})
    full = names.new(f"{node.name}_full_out")
    kept = names.new(f"{node.name}_kept")
    if not ordered:
        bounds = [names.new(f"{node.name}_kept_{what}") for what in ("start", "end", "axis")]
        constants |= {
            n: np.asarray([v], np.int64) for n, v in zip(bounds, (0, keep.sum(), axis), strict=True)
        }
        drop = Step("Slice", kept, (full, *bounds), node.outputs[0], {})
        return Added((pad, drop), constants, pad.output, full)
    place = names.new(f"{node.name}_spread")
    index, left = (names.new(f"{node.name}_{what}") for what in ("spread_index", "kept_index"))
    constants[index] = np.where(keep, np.cumsum(keep) - 1, keep.sum()).astype(np.int32)
    constants[left] = np.flatnonzero(keep).astype(np.int32)
    steps = (
        pad,
        Step("Gather", place, (pad.output, index), f"{place}_out", {"axis": axis}),
        Step("Gather", kept, (full, left), node.outputs[0], {"axis": axis}),
    )
    return Added(steps, constants, f"{place}_out", full)


def scale(node: Node, factor: float, dtype: np.dtype[Any], names: Names) -> Added:
    """The node's output times a number."""
    before, number, name = (
        names.new(f"{node.name}_{what}") for what in ("unscaled", "scale", "rescale")
    )
    step = Step("Mul", name, (before, number), node.outputs[0], {})
    return Added((step,), {number: np.asarray(factor, dtype)}, node.inputs[0], before)


@dataclass(frozen=True)
class Around:
    """Nodes that put zeros back and drop them: ``source`` is padded; where ``ordered``, ``before`` places the zeros."""

    source: str
    pad: Node
    before: Node
    behind: Node
    ordered: bool


class Present:
    """The nodes of that kind that a model has already."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._makers = {name: n for n in model.every for name in n.outputs}
        self._readers: dict[str, list[Node]] = {port.name: [] for port in model.outputs}
        self._shown = set(self._readers)
        self._shown.update(
            name for n in model.every for body in n.bodies.values() for name in body.outputs
        )
        for n in model.every:
            for name in (*n.inputs, *n.captures):
                self._readers.setdefault(name, []).append(n)

    def _only(self, tensor: str) -> Node | None:
        """The one reader of a tensor that nobody else sees."""
        found = self._readers.get(tensor, ())
        return (
            found[0]
            if len(found) == 1 and tensor not in self._shown and not found[0].captures
            else None
        )

    def _picks(self, node: Node | None, axis: int) -> bool:
        """Whether a node takes listed indices of the axis."""
        if node is None or node.op != "Gather" or node.domain:
            return False
        index = self._model.constants.get(node.inputs[1])
        rank = len(self._model.shapes.get(node.inputs[0], ()))
        return (
            index is not None
            and index.ndim == 1
            and rank > 0
            and int(node.attrs.get("axis", 0)) % rank == axis
        )

    def _first(self, node: Node | None, axis: int, count: int) -> bool:
        """Whether a node takes the first ``count`` indices of the axis."""
        if node is None or node.op != "Slice" or node.domain or len(node.inputs) != 4:
            return False
        start, axes = (self._model.constants.get(node.inputs[i]) for i in (1, 3))
        rank = len(self._model.shapes.get(node.inputs[0], ()))
        if start is None or axes is None or rank == 0 or node.outputs[0] not in self._model.shapes:
            return False
        one = start.tolist() == [0] and (axes % rank).tolist() == [axis]
        return one and self._model.shapes[node.outputs[0]][axis] == count

    def spread(self, node: Node, axis: int, ordered: bool) -> Around | None:
        """The nodes around one whose zeros are put back already; placed zeros do wherever the last would."""
        before, behind = self._makers.get(node.inputs[0]), self._only(node.outputs[0])
        if before is None or behind is None or self._only(node.inputs[0]) is None:
            return None
        placed = self._picks(before, axis) and self._picks(behind, axis)
        if not placed and ordered:
            return None
        pad = self._makers.get(before.inputs[0]) if placed else before
        if pad is None or pad.op != "Pad" or pad.domain or self._only(pad.outputs[0]) is None:
            return None
        if (
            pad.attrs.get("mode", "constant") != "constant"
            or len(pad.inputs) > 2
            or pad.attrs.get("value", 0)
        ):
            return None
        amounts = (
            pad.attrs.get("pads")
            if len(pad.inputs) == 1
            else self._model.constants.get(pad.inputs[1])
        )
        shape = self._model.shapes[node.inputs[0]]
        at = len(shape) + axis
        if amounts is None or np.count_nonzero(amounts) != 1 or amounts[at] <= 0:
            return None
        fits = (
            amounts[at] == 1
            if placed
            else self._first(behind, axis, shape[axis] - int(amounts[at]))
        )
        return Around(pad.inputs[0], pad, before, behind, placed) if fits else None

    def scale(self, node: Node) -> tuple[Node, int] | None:
        """The product of a node's output with a constant number, and the slot of that."""
        mul = self._only(node.outputs[0])
        if mul is None or mul.op != "Mul" or mul.domain:
            return None
        slot = 1 - mul.inputs.index(node.outputs[0])
        number = self._model.constants.get(mul.inputs[slot])
        return (mul, slot) if number is not None and number.ndim == 0 else None


def again(around: Around, axis: int, source: Bools, inside: Bools, model: Model) -> dict[str, Edit]:
    """Edits of nodes that put zeros back already, for a further cut; a slice behind them follows by itself.

    ``source`` is what is kept of the tensor in front of the padding, ``inside`` of what the node reads.
    """
    if not around.ordered:
        rank = len(model.shapes[around.source])
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + axis] = len(inside) - source.sum()
        by_input = len(around.pad.inputs) == 2
        return {
            around.pad.name: Edit(inputs={1: pads}) if by_input else Edit({"pads": pads.tolist()})
        }
    index, kept = (model.constants[n.inputs[1]] for n in (around.before, around.behind))
    index = np.where(index < 0, index + len(source) + 1, index)
    kept = np.where(kept < 0, kept + len(inside), kept)
    places = np.append(np.where(source, np.cumsum(source) - 1, source.sum()), source.sum())
    return {
        around.before.name: Edit(inputs={1: places[index].astype(np.int32)}),
        around.behind.name: Edit(inputs={1: kept[inside[kept]].astype(np.int32)}),
    }
