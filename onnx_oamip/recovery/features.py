"""Features: tensors at the ends of blocks, at which a pruned model is compared with the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Bools, Coupling, Floats, Ints, Model, Node
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops import Trait, consumers_by_tensor, has
from onnx_oamip.graph.outputs import is_float


@dataclass(frozen=True, eq=False)
class Projection:
    """Combinations of the channels of the original that the channels of the pruned model are compared with.

    Attributes:
        axis: Axis of the channels.
        matrix: Weights of the combinations (channels of the original, channels of the pruned model).
        shift: Constants that are added to them (channels of the pruned model,).
    """

    axis: int
    matrix: Floats
    shift: Floats


@dataclass(frozen=True, eq=False)
class Feature:
    """A tensor of both models.

    Attributes:
        tensor: Its name.
        kept: Pairs of an axis and the indices of the original that the pruned model has.
        projection: Combinations of channels that the pruned model has in place of channels; None for channels.
    """

    tensor: str
    kept: tuple[tuple[int, Ints], ...] = ()
    projection: Projection | None = None

    @property
    def narrowed(self) -> tuple[int, ...]:
        """Axes along which the pruned model is narrower."""
        if self.projection is not None:
            return (self.projection.axis,)
        return tuple(axis for axis, _ in self.kept)


def features(
    original: Model,
    pruned: Model,
    coupling: Coupling | None = None,
    keep: Bools | None = None,
) -> tuple[Feature, ...]:
    """Find the tensors at which both models can be compared.

    Args:
        original: The original.
        pruned: The pruned model.
        coupling: Units of the original, where the plan is known.
        keep: Units that were kept (n_units,).

    Returns:
        Ends of blocks whose kept channels are known; without a plan, those of the same shape in both.
    """
    found = []
    for tensor in block_ends(original):
        shape = original.shapes.get(tensor)
        if shape is None or tensor not in pruned.shapes:
            continue
        kept = []
        lengths = list(shape)
        for axis in range(len(shape)):
            if coupling is None or keep is None or (tensor, axis) not in coupling.axes:
                continue
            index = np.flatnonzero(coupling.keep((tensor, axis), keep))
            if len(index) < shape[axis]:
                kept.append((axis, index))
                lengths[axis] = len(index)
        if tuple(lengths) == pruned.shapes[tensor]:
            found.append(Feature(tensor, tuple(kept)))
    return tuple(found)


def block_ends(model: Model) -> list[str]:
    """List the tensors at which blocks end.

    These are sums of branches, outputs of linear layers that no activation follows (projections of inverted
    bottlenecks), and the input of the last linear layer. Without sums and projections, blocks are single layers.

    Args:
        model: The original.

    Returns:
        Floating tensors in graph order, each once.
    """
    consumers = consumers_by_tensor(model)
    computed = {name for node in model.nodes for name in node.outputs} | {
        port.name for port in model.inputs
    }
    computed -= set(model.constants)
    ends: dict[str, None] = {}
    layers: dict[str, None] = {}
    last = ""
    for node in model.nodes:
        if _is_join(model, node, computed):
            ends[node.outputs[0]] = None
        here = site(node, model.constants)
        if here is None:
            continue
        if here.data in computed:
            last = here.data
        output = _after_affine(model, node.outputs[0], consumers)
        layers[output] = None
        readers = consumers.get(output, [])
        linear = [reader for reader in readers if site(reader, model.constants) is not None]
        others = [reader for reader in readers if reader not in linear]
        if linear and all(_is_join(model, reader, computed) for reader in others):
            ends[output] = None
    chosen = dict(ends or layers)
    inputs = {port.name for port in model.inputs}
    if last and last not in inputs:
        chosen[last] = None
    outputs = {port.name for port in model.outputs}
    order = {name: place for place, node in enumerate(model.nodes) for name in node.outputs}
    inner = (name for name in chosen if name in order and name not in outputs)
    # A single number, as an auxiliary loss, has no channels.
    compared = (n for n in inner if _is_floating(model, n) and model.shapes.get(n) != ())
    return sorted(compared, key=lambda name: order[name])


def _is_join(model: Model, node: Node, computed: set[str]) -> bool:
    """True for a sum of two branches of the shape of the result."""
    if not has(node, Trait.SUM):
        return False
    shape = model.shapes.get(node.outputs[0])
    branches = [name for name in node.inputs if name in computed]
    return len(branches) > 1 and all(model.shapes.get(name) == shape for name in branches)


def _after_affine(model: Model, tensor: str, consumers: Mapping[str, list[Node]]) -> str:
    """The tensor behind biases and normalisations by constants that follow a layer."""
    while True:
        readers = consumers.get(tensor, [])
        if len(readers) != 1:
            return tensor
        node = readers[0]
        others = [name for name in node.inputs if name and name != tensor]
        is_constant = all(name in model.constants for name in others)
        if not has(node, Trait.IDENTITY | Trait.BIAS | Trait.CHANNEL_AFFINE) or not is_constant:
            return tensor
        if node.name not in {own.name for own in model.nodes}:
            return tensor
        tensor = node.outputs[0]


def _is_floating(model: Model, tensor: str) -> bool:
    return tensor in model.dtypes and is_float(model.dtypes[tensor])
