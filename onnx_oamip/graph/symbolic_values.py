"""Small tensors that a graph computes from shapes, element by element, with the symbols of unknown dimensions.

Exporters write ``x.view(n, -1, 64)`` as a chain of Shape, Gather, Concat, Where and the like. Such a chain is followed
as far as it is known: an element is a number, or a polynomial of dimensions (``symbolic_dims.Size``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnx_oamip.graph.ops import domains
from onnx_oamip.graph.ops.shape_values import compute, evaluate_all, has_rule
from onnx_oamip.graph.symbolic_dims import (
    LIMIT,
    VALUE,
    Dims,
    Entries,
    Size,
    Unknown,
    lengths,
    numbers,
)

SMALL = 16
"""Constants of floating type with more elements are no part of a computation of lengths."""


def follow(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, npt.NDArray[Any]],
    dims: Mapping[str, Dims],
    *,
    dtypes: Mapping[str, np.dtype[Any]],
    version: int,
) -> dict[str, Entries]:
    """Compute the small tensors that are made of shapes.

    Args:
        nodes: Nodes in graph order.
        constants: Constants of integer, boolean or floating type by name.
        dims: Dimensions by tensor.
        dtypes: Types of the tensors of these types by name; tensors of floating type are followed on numbers only.
        version: Opset of the default domain.

    Returns:
        Elements by tensor. An integer that is not known before the model runs, at a known place, is a symbol of its
        own; so is one beyond the range of its type, which a runtime may wrap.
    """
    values = {
        name: value.astype(object)
        for name, value in constants.items()
        if value.size <= (SMALL if value.dtype.kind == "f" else LIMIT)
    }
    for node in nodes:
        names = [name for name in node.output if name in dtypes]
        if node.domain not in domains.STANDARD or not names or not node.input:
            continue
        try:
            found = _outputs(node, values, dims, dtypes=dtypes, version=version)
        except (Unknown, ValueError, IndexError):
            integers = [name for name in names if dtypes[name].kind != "f"]
            found = {name: _own_symbols(name, dims.get(name)) for name in integers}
        for name, result in found.items():
            if result is not None and result.size <= LIMIT:
                values[name] = result
    return values


def _outputs(
    node: NodeProto,
    values: Mapping[str, Entries],
    dims: Mapping[str, Dims],
    *,
    dtypes: Mapping[str, np.dtype[Any]],
    version: int,
) -> Mapping[str, Entries | None]:
    """Elements of the outputs of a node, by rules where it computes integers, else on numbers."""
    first = dtypes.get(node.output[0])
    if first is not None and first.kind != "f" and has_rule(node):
        inputs = [values.get(name) for name in node.input]
        computed = evaluate_all(node, inputs, lengths(node.input[0], dims))
        return {
            name: _within_range(entries, first)
            for name, entries in zip(node.output, computed, strict=True)
        }
    given: dict[str, npt.NDArray[Any]] = {}
    for name in filter(None, node.input):
        known = values.get(name)
        if known is None or name not in dtypes or not numbers(known):
            raise Unknown
        given[name] = known.astype(dtypes[name])
    results = compute(node, given, version)
    filled = [name for name in node.output if name]
    return {name: np.asarray(x.astype(object)) for name, x in zip(filled, results, strict=True)}


def _within_range(entries: Entries, dtype: np.dtype[Any]) -> Entries:
    """The elements, if a tensor of this type holds their numbers.

    Raises:
        Unknown: A number is too large or too small.
    """
    if dtype.kind == "i":
        bounds = np.iinfo(dtype)
        for value in entries.reshape(-1):
            if not isinstance(value, Size) and not bounds.min <= value <= bounds.max:
                raise Unknown
    return entries


def _own_symbols(name: str, dims: Dims | None) -> Entries | None:
    """A scalar or list of known length whose elements are symbols of their own; None for other tensors."""
    if dims is None or len(dims) > 1:
        return None
    shape = [d for d in dims if isinstance(d, int) and d <= LIMIT]
    if len(shape) < len(dims):
        return None
    result = np.empty(shape, object)
    for at in np.ndindex(result.shape):
        result[at] = Size.of(f"{VALUE}{name}{list(at)}")
    return result
