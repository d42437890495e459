"""Integer lists that a graph computes from shapes, element by element, with the symbols of unknown dimensions.

Exporters write ``x.view(n, -1, 64)`` as a chain of Shape, Gather, Concat, Where and the like. Such a chain is followed
as far as it is known: an element is a number, or a polynomial of dimensions (``symbolic_dims.Size``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnx_oamip.graph.ops.shape_values import evaluate
from onnx_oamip.graph.symbolic_dims import LIMIT, VALUE, Entries, Size, Unknown, lengths


def follow(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, npt.NDArray[Any]],
    dims: Mapping[str, Sequence[int | str | None]],
    integers: Mapping[str, np.dtype[Any]],
) -> dict[str, Entries]:
    """Compute the integer tensors that are made of shapes.

    Args:
        nodes: Nodes in graph order.
        constants: Constants of integer or boolean type by name.
        dims: Dimensions by tensor: a number, a symbol's name, or None.
        integers: Types of the tensors of integer or boolean type by name.

    Returns:
        Elements by tensor. A value that is not known before the model runs, at a known place, is a symbol of its own;
        so is one beyond the range of its type, which a runtime may wrap.
    """
    values = {
        name: value.astype(object)
        for name, value in constants.items()
        if value.dtype.kind in "ib" and value.size <= LIMIT
    }
    for node in nodes:
        name = node.output[0] if node.output else ""
        if node.domain not in ("", "ai.onnx") or name not in integers or not node.input:
            continue
        inputs = [values.get(n) for n in node.input]
        try:
            computed = evaluate(node, inputs, lengths(node.input[0], dims))
            result: Entries | None = _within_range(np.asarray(computed, object), integers[name])
        except (Unknown, ValueError, IndexError):
            result = _own_symbols(name, dims.get(name))
        if result is not None and result.size <= LIMIT:
            values[name] = result
    return values


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


def _own_symbols(name: str, dims: Sequence[int | str | None] | None) -> Entries | None:
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
