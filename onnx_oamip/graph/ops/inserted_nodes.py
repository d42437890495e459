"""Nodes that a cut inserts around a node that must still see zeros for removed channels.

Zeros are inserted in front of a normalisation and removed behind it; a mean is scaled down. Where the order of channels
has no meaning for the node, the zeros come last: a Pad and a Slice, which copy whole rows. Where it has, one zero is
padded on and a Gather puts it into every place, which copies number by number. The cut inserts these nodes and the
costs count them: both take them from here. A model that was pruned before has such nodes already; then only their
constants change, so that two cuts give the same model as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from onnx_oamip.core.records import (
    Array,
    Bools,
    Ints,
    Model,
    Node,
)
from onnx_oamip.graph.ops import Edit, kinds


@dataclass(frozen=True)
class Step:
    """A node to insert. Inputs name tensors, new constants among them."""

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any]


@dataclass(frozen=True)
class Added:
    """Nodes and constants to insert around a node, which then reads ``reads`` (slot 0) and writes ``writes``."""

    steps: tuple[Step, ...]
    constants: Mapping[str, Array]
    reads: str
    writes: str

    def nbytes(self, node: Node, last: Node | None = None) -> int:
        """Count the bytes that the insertion adds to a file.

        Args:
            node: The node that it is around, which gets longer names.
            last: The node behind which it ends; default: the same node.

        Returns:
            Number of bytes.
        """
        sizes = [self._node_size(step) for step in self.steps]
        sizes += [numpy_helper.from_array(v, n).ByteSize() for n, v in self.constants.items()]
        # A field of a message has a tag of one byte and its length.
        headers = sum(2 if size < 128 else 3 for size in sizes)
        longer_input = len(self.reads) - len(node.inputs[0])
        longer_output = len(self.writes) - len((last or node).outputs[0])
        return sum(sizes) + headers + longer_input + longer_output

    @staticmethod
    def _node_size(step: Step) -> int:
        node = helper.make_node(step.op, step.inputs, [step.output], step.name, **step.attrs)
        return int(node.ByteSize())


class Names:
    """Unused names of a model."""

    def __init__(self, model: Model) -> None:
        self._taken = {*model.shapes, *model.constants}
        for node in model.every:
            self._taken.add(node.name)
            self._taken.update((*node.inputs, *node.outputs, *node.captures))
            for body in node.bodies.values():
                self._taken.update((*body.inputs, *body.outputs))

    def new(self, name: str) -> str:
        """Take a name.

        Args:
            name: The name wanted.

        Returns:
            The name, with a number where it is taken.
        """
        result = name
        number = 1
        while result in self._taken or f"{result}_out" in self._taken:
            result = f"{name}_{number}"
            number += 1
        self._taken.add(result)
        return result

    def several(self, stem: str, *suffixes: str) -> Iterator[str]:
        """Take names of a common beginning.

        Args:
            stem: Beginning of the names.
            suffixes: Their ends.

        Yields:
            The names, in order.
        """
        for suffix in suffixes:
            yield self.new(f"{stem}_{suffix}")


def restore_zeros(
    node: Node,
    rank: int,
    axis: int,
    *,
    ordered: bool,
    keep: Bools,
    names: Names,
    last: Node | None = None,
) -> Added:
    """Plan zeros for removed channels in front of a node, and their removal behind it.

    Args:
        node: The node.
        rank: Rank of its data.
        axis: Axis of the channels.
        ordered: Insert the zeros at the positions of the removed channels, instead of behind the kept ones.
        keep: Channels that are kept.
        names: Names that can be used.
        last: The node behind which the zeros are removed; default: the same node.

    Returns:
        The nodes to insert.
    """
    out = (last or node).outputs[0]
    zero = names.new(f"{node.name}_zero")
    pads = np.zeros(2 * rank, np.int64)
    removed = len(keep) - keep.sum()
    pads[rank + axis] = 1 if ordered else removed
    constants: dict[str, Array] = {}
    if node.version < 11:
        pad = Step("Pad", zero, (node.inputs[0],), f"{zero}_out", {"pads": pads.tolist()})
    else:
        amounts = names.new(f"{node.name}_zero_pads")
        constants[amounts] = pads
        pad = Step("Pad", zero, (node.inputs[0], amounts), f"{zero}_out", {})
    full, kept = names.several(node.name, "full_out", "kept")
    if not ordered:
        bounds = tuple(names.several(node.name, "kept_start", "kept_end", "kept_axis"))
        for name, value in zip(bounds, (0, keep.sum(), axis), strict=True):
            constants[name] = np.asarray([value], np.int64)
        drop = Step("Slice", kept, (full, *bounds), out, {})
        return Added((pad, drop), constants, reads=pad.output, writes=full)
    place, index, left = names.several(node.name, "spread", "spread_index", "kept_index")
    constants[index] = _places(keep).astype(np.int32)
    constants[left] = np.flatnonzero(keep).astype(np.int32)
    spread = Step("Gather", place, (pad.output, index), f"{place}_out", {"axis": axis})
    pick = Step("Gather", kept, (full, left), out, {"axis": axis})
    return Added((pad, spread, pick), constants, reads=spread.output, writes=full)


def _places(keep: Bools) -> Ints:
    """Index of every channel in a tensor of the kept channels and one zero; removed channels get the zero."""
    kept_so_far = np.cumsum(keep)
    return np.where(keep, kept_so_far - 1, keep.sum())


def computes_whole(node: Node, model: Model) -> bool:
    """Test for a node that computes a whole constant, from which the kept indices are taken.

    Args:
        node: Any node.
        model: Model that holds it.

    Returns:
        True if its output is a computed constant that is neither a view of an initialiser nor filled with one number:
        a node that fills computes the narrower constant from other lengths.
    """
    if not node.outputs or node.op in kinds.FILL:
        return False
    return node.outputs[0] in model.computed and node.outputs[0] not in model.views


def take_kept(node: Node, kept: Mapping[int, Bools], names: Names) -> Added:
    """Plan the choice of the kept indices of a constant that a node computes.

    Args:
        node: The node, which goes on to compute the whole constant.
        kept: Mask of the kept indices by axis.
        names: Names that can be used.

    Returns:
        The nodes to insert.
    """
    tensor = node.outputs[0]
    whole = names.new(f"{tensor}_whole")
    constants: dict[str, Array] = {}
    steps: list[Step] = []
    source = whole
    for axis, keep in kept.items():
        index, pick = names.several(tensor, "kept", "pick")
        constants[index] = np.flatnonzero(keep).astype(np.int32)
        is_last = len(steps) + 1 == len(kept)
        result = tensor if is_last else f"{pick}_out"
        steps.append(Step("Gather", pick, (source, index), result, {"axis": axis}))
        source = result
    return Added(tuple(steps), constants, reads=node.inputs[0], writes=whole)


def scale(
    node: Node,
    factor: float,
    dtype: np.dtype[Any],
    names: Names,
) -> Added:
    """Plan a product of a node's output with a number.

    Args:
        node: The node.
        factor: The number.
        dtype: Element type of the output.
        names: Names that can be used.

    Returns:
        The node to insert.
    """
    before, number, name = names.several(node.name, "unscaled", "scale", "rescale")
    step = Step("Mul", name, (before, number), node.outputs[0], {})
    constants = {number: np.asarray(factor, dtype)}
    return Added((step,), constants, reads=node.inputs[0], writes=before)


@dataclass(frozen=True)
class Around:
    """Nodes that insert zeros and remove them: ``source`` is padded; where ``ordered``, ``before`` places the zeros."""

    source: str
    pad: Node
    before: Node
    behind: Node
    ordered: bool


class Present:
    """The inserted nodes that a model has from an earlier cut."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._producers = {name: node for node in model.every for name in node.outputs}
        self._readers: dict[str, list[Node]] = {port.name: [] for port in model.outputs}
        self._visible = set(self._readers)
        for node in model.every:
            for body in node.bodies.values():
                self._visible.update(body.outputs)
            for name in (*node.inputs, *node.captures):
                self._readers.setdefault(name, []).append(node)

    def _only(self, tensor: str) -> Node | None:
        """The sole reader of a tensor that no output is and no body reads."""
        readers = self._readers.get(tensor, ())
        if len(readers) != 1 or tensor in self._visible or readers[0].captures:
            return None
        return readers[0]

    def _rank(self, tensor: str) -> int:
        """Rank of a tensor, 0 where it is not known."""
        return len(self._model.shapes.get(tensor, ()))

    def _picks(self, node: Node | None, axis: int) -> bool:
        """True for a node that takes listed indices of the axis."""
        if node is None or node.op != "Gather" or node.domain:
            return False
        index = self._model.constants.get(node.inputs[1])
        rank = self._rank(node.inputs[0])
        if index is None or index.ndim != 1 or not rank:
            return False
        return int(node.attrs.get("axis", 0)) % rank == axis

    def _takes_first(self, node: Node | None, axis: int, count: int) -> bool:
        """True for a node that takes the first ``count`` indices of the axis."""
        if node is None or node.op != "Slice" or node.domain or len(node.inputs) != 4:
            return False
        start, axes = (self._model.constants.get(node.inputs[slot]) for slot in (1, 3))
        rank = self._rank(node.inputs[0])
        kept = self._model.shapes.get(node.outputs[0])
        if start is None or axes is None or not rank or kept is None:
            return False
        along_axis = start.tolist() == [0] and (axes % rank).tolist() == [axis]
        return along_axis and kept[axis] == count

    def restored_zeros(
        self,
        node: Node,
        axis: int,
        ordered: bool,
        last: Node | None = None,
    ) -> Around | None:
        """Find the nodes around a node that see to its zeros already.

        Args:
            node: The node.
            axis: Axis of the channels.
            ordered: The zeros must be where the channels were; else those at the end will do as well.
            last: The node behind which the zeros are removed; default: the same node.

        Returns:
            The nodes, or None where there are none.
        """
        before = self._producers.get(node.inputs[0])
        behind = self._only((last or node).outputs[0])
        if before is None or behind is None or self._only(node.inputs[0]) is None:
            return None
        placed = self._picks(before, axis) and self._picks(behind, axis)
        if not placed and ordered:
            return None
        if placed:
            pad = self._producers.get(before.inputs[0])
        else:
            pad = before
        shape = self._model.shapes[node.inputs[0]]
        if pad is None:
            amount = 0
        else:
            amount = self._padded_at_end(pad, len(shape), axis)
        if pad is None or not amount:
            return None
        found = Around(pad.inputs[0], pad, before, behind, placed)
        if placed:
            return found if amount == 1 else None
        if self._takes_first(behind, axis, shape[axis] - amount):
            return found
        return None

    def _padded_at_end(self, node: Node, rank: int, axis: int) -> int:
        """Number of zeros that a node pads behind one axis and nowhere else; 0 for other nodes."""
        if node.op != "Pad" or node.domain or self._only(node.outputs[0]) is None:
            return 0
        constant = node.attrs.get("mode", "constant") == "constant"
        if not constant or len(node.inputs) > 2 or node.attrs.get("value", 0):
            return 0
        amounts = node.attrs.get("pads")
        if len(node.inputs) == 2:
            amounts = self._model.constants.get(node.inputs[1])
        if amounts is None or np.count_nonzero(amounts) != 1:
            return 0
        return max(int(amounts[rank + axis]), 0)

    def scale(self, node: Node) -> tuple[Node, int] | None:
        """Find a product of a node's output with a constant number.

        Args:
            node: The node.

        Returns:
            The product and the slot of the number, or None where there is none.
        """
        product = self._only(node.outputs[0])
        if product is None or product.op != "Mul" or product.domain:
            return None
        slot = 1 - product.inputs.index(node.outputs[0])
        number = self._model.constants.get(product.inputs[slot])
        if number is not None and number.ndim == 0:
            return (product, slot)
        return None


def edits_of_further_cut(
    around: Around,
    axis: int,
    *,
    source: Bools,
    inside: Bools,
    model: Model,
) -> dict[str, Edit]:
    """Adapt nodes that see to zeros already to a further cut; a Slice behind them needs no change.

    Args:
        around: The nodes.
        axis: Axis of the channels.
        source: Channels that are kept of the tensor in front of the padding.
        inside: Channels that are kept of the tensor that the node reads.
        model: The model before the further cut.

    Returns:
        Edits by node.
    """
    if not around.ordered:
        rank = len(model.shapes[around.source])
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + axis] = len(inside) - source.sum()
        by_input = len(around.pad.inputs) == 2
        if by_input:
            edit = Edit(inputs={1: pads})
        else:
            edit = Edit({"pads": pads.tolist()})
        return {around.pad.name: edit}
    index, kept = (model.constants[node.inputs[1]] for node in (around.before, around.behind))
    index = np.where(index < 0, index + len(source) + 1, index)
    kept = np.where(kept < 0, kept + len(inside), kept)
    # The zero lies behind the channels of the source, before and after the cut.
    places = np.append(_places(source), source.sum())
    still_kept = kept[inside[kept]]
    return {
        around.before.name: Edit(inputs={1: places[index].astype(np.int32)}),
        around.behind.name: Edit(inputs={1: still_kept.astype(np.int32)}),
    }
