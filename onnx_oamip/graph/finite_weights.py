"""Check of the weights of a model: each is finite, or the model is refused with the tensor and the index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Array, Model, Node
from onnx_oamip.graph.computed_constants import computing_nodes
from onnx_oamip.graph.ops import Trait, has, lookup
from onnx_oamip.graph.outputs import is_float
from onnx_oamip.graph.subgraphs import reads

CHUNK = 1 << 20
"""Values that are checked at a time: a weight may lie in a file that is larger than memory."""


def check(model: Model) -> None:
    """Refuse a model with weights that are NaN or infinite.

    An infinite constant is no weight where it is compared, selected or added: masks of attention scores and bounds are
    infinite on purpose.

    Args:
        model: A normalised model.

    Raises:
        ModelError: A constant that is NaN or infinite multiplies or normalises activations, or one that is NaN is added
            to them.
    """
    for name in model.constants:
        if name in model.computed or not is_float(model.dtypes[name]):
            continue
        value = model.constants[name]
        found = _first_faults(value)
        is_nan = any(np.isnan(number) for _, number in found)
        readers = _readers(model, name) if found else iter(())
        reader = next((node for node in readers if _refuses(node, is_nan=is_nan)), None)
        if reader is None:
            continue
        place, number = found[0]
        index = [int(i) for i in np.unravel_index(place, value.shape)]
        raise ModelError(
            f"the weight '{name}', which {reader} reads, is {number:g} at index {index}, so its outputs mean nothing; "
            "export a checkpoint with finite weights."
        )


def _first_faults(value: Array) -> list[tuple[int, float]]:
    """The first place in the flat array that is not finite, and the first that is NaN, with their values."""
    flat = value.reshape(-1)
    found: list[tuple[int, float]] = []
    for first in range(0, flat.size, CHUNK):
        part = flat[first : first + CHUNK].astype(np.float64)
        if np.isfinite(part).all():
            continue
        for faulty in (~np.isfinite(part), np.isnan(part)):
            found += [(first + int(i), float(part[i])) for i in np.flatnonzero(faulty)[:1]]
        if np.isnan(found[-1][1]):
            break
    return found


def _readers(model: Model, name: str) -> Iterator[Node]:
    """Nodes that read a constant, or one that is computed from it."""
    same = {name}
    for computing in computing_nodes(model.proto.graph):
        if not same.isdisjoint(reads(computing)):
            same.update(computing.output)
    for node in model.nodes:
        if not same.isdisjoint(node.inputs) and same.isdisjoint(node.outputs):
            yield node


def _refuses(node: Node, *, is_nan: bool) -> bool:
    """Test for a node whose outputs are meaningless with such a constant: NaN, or infinite."""
    spec = lookup(node.domain, node.op, node.version)
    if spec is None:
        return False
    multiplies = spec.linear is not None or has(node, Trait.BATCH_NORM)
    return multiplies or (is_nan and (spec.cost is not None or has(node, Trait.CHANNEL_AFFINE)))
