"""Low-rank layers: dense layers and 1x1 convolutions that are written as two, with a group of ranks in between.

A layer ``y = W x + b`` of full rank is exactly ``y = U z + b`` with ``z = V x`` and ``W = U V``. The channels of z lie
between linear layers only, so that they are a linear stream: in principal components the first of them lose least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from onnx_oamip.core.records import Coupling, Floats, Model
from onnx_oamip.graph.external_data import tensor
from onnx_oamip.graph.linear_layers import Editor, matrix, quantised, site, unmatrix
from onnx_oamip.graph.linear_streams import MOST_ZEROS
from onnx_oamip.graph.loading import remade
from onnx_oamip.graph.ops.matrix_view import Site

SUFFIX = "_low_rank"
"""End of the names of the first factor, of its node and of its output."""
LEAST_BYTES = 4
"""Bytes of an element of a weight from which on a product of two factors is exact enough."""


def candidates(model: Model) -> tuple[Site, ...]:
    """Find the layers that may be written as two.

    Args:
        model: A model.

    Returns:
        Dense layers and 1x1 convolutions of stride 1 with a weight of their own, in graph order.
    """
    editor = Editor(model.proto)
    made = {name for node in model.nodes for name in node.outputs}
    return tuple(
        place
        for node in model.nodes
        if (place := site(node, model.constants)) is not None
        and place.data in made
        and _is_plain(model, place)
        and _is_own(editor, place)
        and not quantised(node, model)
    )


def _is_plain(model: Model, place: Site) -> bool:
    """Tests for a layer that is one matrix, whose output differs from its input in the channels alone."""
    weight = model.constants[place.weight]
    groups, outputs, inputs, taps = matrix(place, weight).shape
    is_matrix = groups == taps == place.factor == 1 and min(outputs, inputs) > 1
    if not is_matrix or weight.dtype.kind != "f" or weight.dtype.itemsize < LEAST_BYTES:
        return False
    before, behind = (list(model.shapes[name]) for name in (place.data, place.node.outputs[0]))
    axes = {place.data_axis % len(before), place.output_axis % len(behind)}
    if len(before) != len(behind) or len(axes) != 1:
        return False
    axis = axes.pop()
    del before[axis], behind[axis]
    is_dense = np.count_nonzero(weight) >= (1 - MOST_ZEROS) * weight.size
    return before == behind and bool(is_dense)


def _is_own(editor: Editor, place: Site) -> bool:
    """Tests for a stored weight that only this node reads, and for names that are free for a first factor."""
    weight = place.weight
    if weight not in editor.tensors or weight in editor.outputs or len(editor.readers[weight]) > 1:
        return False
    taken = editor.readers.keys() | editor.tensors.keys() | editor.nodes.keys()
    return not taken & {f"{weight}{SUFFIX}", inner(place), f"{place.node.name}{SUFFIX}"}


def inner(place: Site) -> str:
    """Name the tensor between the two layers.

    Args:
        place: The layer.

    Returns:
        The name.
    """
    return f"{place.node.outputs[0]}{SUFFIX}"


def factored(model: Model, places: Sequence[Site], seed: int = 0) -> Model:
    """Write layers as two at full rank.

    The channels between them are in a random orthogonal basis: a zero in a factor would make it look sparse.

    Args:
        model: A model.
        places: Its layers.
        seed: Seed of the bases.

    Returns:
        A model that computes the same up to rounding. The second of two layers has the names of the layer.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    editor = Editor(proto)
    first: dict[str, onnx.NodeProto] = {}
    for place in places:
        weight = matrix(place, model.constants[place.weight])[0, :, :, 0]
        outer, inside = _factors(weight, np.random.default_rng(seed))
        like = model.constants[place.weight]
        stored, name = unmatrix(place, inside[None, :, :, None], like), f"{place.weight}{SUFFIX}"
        proto.graph.initializer.append(tensor(stored, name, False))
        node = editor.nodes[place.node.name]
        editor.replace(node, place.weight_slot, unmatrix(place, outer[None, :, :, None], like))
        first[node.name] = _first(node, place)
        node.input[place.slot] = inner(place)
    nodes = []
    for node in proto.graph.node:
        if node.name in first:
            nodes.append(first[node.name])
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return remade(model, proto)


def _first(node: onnx.NodeProto, place: Site) -> onnx.NodeProto:
    """The node in front of a layer, an operator of the same kind without a bias."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    del made.input[2:]
    made.name = f"{node.name}{SUFFIX}"
    made.input[place.weight_slot] = f"{place.weight}{SUFFIX}"
    made.output[0] = inner(place)
    return made


def _factors(weight: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Factors of a matrix, the outer or the inner one orthogonal."""
    outputs, inputs = weight.shape
    rank = min(outputs, inputs)
    basis, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    if outputs <= inputs:
        return basis, basis.T @ weight
    return weight @ basis, basis.T


def groups(coupling: Coupling, places: Sequence[Site]) -> dict[str, int]:
    """Find the groups of ranks.

    Args:
        coupling: Units of a factored model.
        places: The layers that were written as two.

    Returns:
        Index of the group of every layer by the name of its node; layers whose ranks are pinned are left out.
    """
    inside = {inner(place): place.node.name for place in places}
    return {
        inside[tensor_name]: index
        for index, group in enumerate(coupling.groups)
        for tensor_name, _ in group.multiplicity
        if tensor_name in inside
    }
