"""What a small file may ask for: tensors that no memory holds, lists that take long to follow."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from onnx_oamip.core.errors import ModelError
from onnx_oamip.graph import external_data, subgraphs
from onnx_oamip.graph.ops import kinds

UNKNOWN_MEMORY = 1 << 34
"""Taken for the memory of a machine that does not tell."""
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
LONGEST = 1 << 18
"""Elements of a list in a graph; with longer ones, none is followed."""
FOLDED = 1 << 26
"""Bytes that a constant made by folding may have, unless it is not ``TIMES`` as large as the model."""
TIMES = 16
SPARSE = 256
"""Times its file that a constant which is stored sparsely may take."""
WIDTH = 8
"""Bytes of an element, at most."""


def memory() -> int:
    """Bytes that this process can still have: what is free, or what the machine has where it does not tell."""
    return min(_free(), _allowed())


def _free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return UNKNOWN_MEMORY


def _allowed() -> int:
    """What is left of a limit set for the process (``ulimit -v``)."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(limit - used, 0)


def amount(size: int) -> str:
    """A number of bytes for people."""
    unit = min(max(size.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{size / (1 << 10 * unit):,.{1 if unit else 0}f} {UNITS[unit]}"


def check(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]) -> None:
    """Raises ModelError where a single tensor is larger than the memory that is there."""
    sizes = {n: math.prod(s) * dtypes[n].itemsize for n, s in shapes.items() if n in dtypes}
    largest = max(sizes, key=lambda n: sizes[n], default=None)
    if largest is not None and sizes[largest] > FOLDED and sizes[largest] > (free := memory()):
        raise ModelError(
            f"the tensor '{largest}' of shape {shapes[largest]} asks for {amount(sizes[largest])} of memory and this "
            f"machine has {amount(free)}; give smaller inputs, or export the model with smaller ones."
        )


def check_written_out(stored: SparseTensorProto, proto: ModelProto) -> None:
    """Raises ModelError where a constant that is stored sparsely is very large with its zeros."""
    size = math.prod(stored.dims) * WIDTH
    if min(stored.dims, default=1) < 0 or size > max(FOLDED, SPARSE * proto.ByteSize()):
        raise ModelError(
            f"the sparse constant '{stored.values.name}' of shape {tuple(stored.dims)} asks for up to {amount(size)} "
            "with its zeros, more than is sensible for this file; store it densely."
        )


def inferred(proto: ModelProto) -> GraphProto:
    """The graph with the shapes that ONNX infers, lists of lengths followed where none of them is very long.

    onnx keeps every element of every list of whole numbers, 70 bytes each: a small file can ask for all memory.
    """
    plain = onnx.shape_inference.infer_shapes(proto).graph
    filled = {
        n for node in subgraphs.nodes(plain) if node.op_type in kinds.FILL for n in node.output
    }
    whole = {TensorProto.INT64, TensorProto.INT32}
    for graph in subgraphs.graphs(plain):
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = value.type.tensor_type
            listed = kind.elem_type in whole or value.name in filled
            if listed and len(kind.shape.dim) == 1 and kind.shape.dim[0].dim_value > LONGEST:
                return plain
    return onnx.shape_inference.infer_shapes(proto, data_prop=True).graph


def unfoldable(proto: ModelProto, skeleton: ModelProto) -> tuple[set[str], bool]:
    """Tensors that are not made constants: too large ones, and those of which only folding others tells the size.

    ``skeleton``: the model without the payload of large constants. The second is whether there are any of the latter.
    """
    graph = proto.graph
    known = {t.name for t in graph.initializer}
    candidates: list[NodeProto] = []
    for node in graph.node:
        if known.issuperset(subgraphs.reads(node)):
            known.update(node.output)
            candidates.append(node)
    if not candidates:
        return set(), False
    plain = onnx.shape_inference.infer_shapes(skeleton).graph
    sizes: dict[str, int] = {}
    for value in (v for g in subgraphs.graphs(plain) for v in (*g.value_info, *g.output)):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            sizes[value.name] = math.prod(d.dim_value for d in kind.shape.dim) * WIDTH
    most = max(FOLDED, TIMES * external_data.size(proto))
    result: set[str] = set()
    waits = False
    for node in candidates:
        for name in node.output:
            open_size = node.op_type in kinds.GROWING and name not in sizes
            if sizes.get(name, 0) > most or open_size:
                result.add(name)
                waits |= open_size
    return result, waits
