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
    integers: set[str],
) -> dict[str, Entries]:
    """Entries of every tensor in ``integers`` that is made of shapes; ``constants`` are those of integer type."""
    found = {
        n: v.astype(object)
        for n, v in constants.items()
        if v.dtype.kind in "ib" and v.size <= LIMIT
    }
    for node in nodes:
        name = node.output[0] if node.output else ""
        if node.domain not in ("", "ai.onnx") or name not in integers or not node.input:
            continue
        try:
            known_shape = lengths(node.input[0], dims)
            made = np.asarray(
                evaluate(node, [found.get(n) for n in node.input], known_shape), object
            )
        except (Unknown, ValueError, IndexError):
            known = dims.get(name)
            if (
                known is None
                or not all(isinstance(d, int) and d <= LIMIT for d in known)
                or len(known) > 1
            ):
                continue
            # A value that is not known before the model runs, at a known place.
            made = np.empty(
                [int(d) for d in known if d is not None and not isinstance(d, str)], object
            )
            for at in np.ndindex(made.shape):
                made[at] = Size.of(f"{VALUE}{name}{list(at)}")
        if made.size <= LIMIT:
            found[name] = made
    return found
