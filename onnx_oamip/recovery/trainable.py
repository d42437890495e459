"""Selection of the initialisers that training may change: those that all nodes that read them read as weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from onnx_oamip.core.records import Array, Model, Node
from onnx_oamip.core.records.graph import within
from onnx_oamip.graph.channel_axes import aligned, channel_axes
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops import Trait, has
from onnx_oamip.graph.ops.compositions import LARGE
from onnx_oamip.graph.ops.kinds import LENGTHS
from onnx_oamip.graph.ops.views import VIEWS
from onnx_oamip.graph.outputs import is_float
from onnx_oamip.recovery.operators import kernel_of

ROUNDS = Trait.QUANTISES | Trait.DEQUANTISES
"""Operators that round weights to codes, and that make numbers of them again."""

KEEPS = Trait.ELEMENTWISE | Trait.MOVES | Trait.CASTS
"""Operators whose output has the values of their input, or numbers computed from each of them."""


class Trainable:
    """Initialisers of a model that training may change, by the nodes that read them.

    These are floating weights, biases, and scales and shifts of channels. Everything else stays as it is: scales of
    quantisation, statistics of normalisations, bounds, masks, tables of positions, and what is one of these for any of
    its readers, or a graph output.
    """

    def __init__(self, model: Model) -> None:
        """Find them.

        Args:
            model: The model.
        """
        self._model = model
        self._sources = _sources(model)
        self._constants = _constants(model)
        self._channels = channel_axes(model)
        self._makers = {name: node for node in model.every for name in node.outputs if name}
        self._read: dict[str, list[str]] = defaultdict(list)
        weights = set()
        fixed = {self._sources.get(name) for name in _returned(model)}
        for node in model.every:
            for slot, tensor in enumerate(node.inputs):
                source = self._sources.get(tensor)
                if source is None:
                    continue
                self._read[node.name].append(source)
                if self._is_weight(node, slot):
                    weights.add(source)
                elif not self._makes_constant(node, slot):
                    fixed.add(source)
        self._names = weights - fixed

    def __call__(self, nodes: Sequence[Node]) -> list[str]:
        """List those that some nodes read.

        Args:
            nodes: Nodes that are computed.

        Returns:
            Names of initialisers, each once: one that several nodes share is one weight.
        """
        names = (name for node in within(nodes) for name in self._read.get(node.name, ()))
        return [name for name in dict.fromkeys(names) if name in self._names]

    def _makes_constant(self, node: Node, slot: int) -> bool:
        """True for a node that makes a constant of an input, through which its gradient passes."""
        if has(node, ROUNDS):
            return slot == 0 and node.outputs[0] in self._sources
        return self._constants.issuperset(node.outputs)

    def _is_weight(self, node: Node, slot: int) -> bool:
        """True for an input that holds weights, or one number per channel."""
        kernel = kernel_of(node)
        if kernel is None:
            return False
        is_by_channel = slot in kernel.trained_if_channels and self._is_by_channel(node, slot)
        return (slot in kernel.trained or is_by_channel) and not self._is_mask(node, slot)

    def _is_by_channel(self, node: Node, slot: int) -> bool:
        """True for an operand with one number per channel of the other operand, or of the result if that is narrower.

        Where the shape of the other one is not known, every vector is taken for that.
        """
        shapes = self._model.shapes
        tensor, other = node.inputs[slot], node.inputs[1 - slot]
        axes = [axis for axis, length in enumerate(shapes[tensor]) if length > 1]
        if len(axes) != 1:
            return False
        if other not in shapes:
            return True
        place = len(shapes[other]) - len(shapes[tensor]) + axes[0]
        is_spread = place >= 0 and shapes[other][place] == 1
        if is_spread and not self._counts(other):
            other = node.outputs[0]
        return aligned(self._model, tensor, axes[0], other) in self._channels

    def _counts(self, tensor: str) -> bool:
        """True for a tensor that is made of whole numbers or lengths, such as positions."""
        maker = self._makers.get(tensor)
        while maker is not None:
            if maker.op in LENGTHS:
                return True
            if not has(maker, KEEPS):
                return False
            computed = [name for name in maker.inputs if name and name not in self._constants]
            if not computed:
                return False
            dtype = self._model.dtypes.get(computed[0])
            if dtype is not None and not is_float(dtype):
                return True
            maker = self._makers.get(computed[0])
        return False

    def _is_mask(self, node: Node, slot: int) -> bool:
        """True for a constant that hides some elements of what it is added to or multiplied with."""
        constants, tensor = self._model.constants, node.inputs[slot]
        values = constants[self._sources[tensor]]
        values = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
        if _are_endless(values):
            return True
        layer = site(node, constants)
        if layer is not None and tensor == layer.weight:
            return False
        return _hides(values) or (has(node, Trait.SCALES) and _selects(values))


def _returned(model: Model) -> Iterator[str]:
    """Tensors that the graph and its bodies give out."""
    yield from (port.name for port in model.outputs)
    for node in model.every:
        for body in node.bodies.values():
            yield from body.outputs


def _constants(model: Model) -> set[str]:
    """Constants, and what nodes compute from them alone, in bodies as well."""
    found = set(model.constants)
    for node in model.every:
        if not (node.bodies or node.captures) and found.issuperset(filter(None, node.inputs)):
            found.update(node.outputs)
    return found


def _sources(model: Model) -> dict[str, str]:
    """Floating initialisers by their own names and those of their views, rounded to codes and back as well."""
    found = {name: name for name in model.initialisers if is_float(model.dtypes[name])}
    found.update((view, name) for view, name in model.views.items() if name in found)
    for node in model.every:
        # Codes that are stored are no weights that small steps could change.
        are_codes = has(node, Trait.DEQUANTISES) and node.inputs[0] in model.constants
        if has(node, VIEWS | ROUNDS) and not are_codes and node.inputs[0] in found:
            found[node.outputs[0]] = found[node.inputs[0]]
    return found


def _are_endless(values: Array) -> bool:
    """True if some are infinite or stand for that, as the largest number of a type does: their squares are infinite."""
    with np.errstate(over="ignore"):
        return not np.isfinite(np.square(values)).all()


def _hides(values: Array) -> bool:
    """True for shifts some of which are so far below the others that they stand for masked elements."""
    is_low = values <= -LARGE
    return bool(is_low.any() and not is_low.all())


def _selects(values: Array) -> bool:
    """True for factors of zero and one, and both of them."""
    return set(np.unique(values)) == {0.0, 1.0}
