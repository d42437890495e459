"""Guards against small files that ask for large resources: huge tensors, constants, and lists of lengths."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, numpy_helper

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.printable import shortened
from onnx_oamip.graph import computed_constants, external_data, subgraphs
from onnx_oamip.graph.ops import kinds

UNKNOWN_MEMORY = 1 << 34
"""Assumed where a machine does not report its memory."""
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
LONGEST = 1 << 18
"""Elements of a list in a graph; with longer ones, none is followed."""
FOLDED = 1 << 26
"""Bytes that a constant made by folding may have, unless it is not ``TIMES`` as large as the model."""
TIMES = 16
SPARSE = 256
"""Largest ratio of a sparsely stored constant to the file that holds it."""
WIDTH = 8
"""Bytes of an element, at most."""


def memory() -> int:
    """Return the bytes that this process can still allocate.

    Returns:
        The free memory of the machine, or less where a limit is set for the process.
    """
    return min(_free(), _allowed())


def _free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                kibibytes = int(line.split()[1])
                return kibibytes << 10
    except (OSError, ValueError):
        pass
    # Not Linux: all memory of the machine is an upper bound.
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return UNKNOWN_MEMORY


def _allowed() -> int:
    """Remainder of a limit set for the process (``ulimit -v``)."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):
        return sys.maxsize
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(limit - pages * resource.getpagesize(), 0)


def amount(size: int) -> str:
    """Format a number of bytes for people.

    Args:
        size: Number of bytes.

    Returns:
        The number in the largest binary unit that it reaches, such as "1.5 GiB".
    """
    steps_of_1024 = max(size.bit_length() - 1, 0) // 10
    unit = min(steps_of_1024, len(UNITS) - 1)
    scaled = size / (1 << 10 * unit)
    digits = 1 if unit else 0
    return f"{scaled:,.{digits}f} {UNITS[unit]}"


def check(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]) -> None:
    """Refuse a model with a tensor that does not fit into memory.

    Args:
        shapes: Shapes of tensors by name.
        dtypes: Their element types, as far as they are known.

    Raises:
        ModelError: A single tensor is larger than the memory that is left.
    """
    sizes = {n: math.prod(s) * dtypes[n].itemsize for n, s in shapes.items() if n in dtypes}
    largest = max(sizes, key=lambda n: sizes[n], default=None)
    # Small ones are not worth asking the machine.
    if largest is None or sizes[largest] <= FOLDED:
        return
    free = memory()
    if sizes[largest] > free:
        raise ModelError(
            f"the tensor '{largest}' of shape {shapes[largest]} asks for {amount(sizes[largest])} of memory and this "
            f"machine has {amount(free)}; give smaller inputs, or export the model with smaller ones."
        )


def check_written_out(stored: SparseTensorProto, proto: ModelProto) -> None:
    """Refuse a sparsely stored constant that is very large with its zeros.

    Args:
        stored: The constant.
        proto: The model that it lies in.

    Raises:
        ModelError: It is too large for the size of the file.
    """
    size = math.prod(stored.dims) * WIDTH
    most = max(FOLDED, SPARSE * proto.ByteSize())
    if min(stored.dims, default=1) < 0 or size > most:
        raise ModelError(
            f"the sparse constant '{stored.values.name}' of shape {tuple(stored.dims)} asks for up to {amount(size)} "
            "with its zeros, more than is sensible for this file; store it densely."
        )


def inferred(proto: ModelProto) -> GraphProto:
    """Infer shapes with ONNX, and follow lists of lengths where none of them is very long.

    onnx keeps every element of every list of whole numbers, 70 bytes each: a small file can ask for all memory.

    Args:
        proto: The model.

    Returns:
        Its graph with inferred shapes.

    Raises:
        ModelError: A node asks for a tensor with a negative length, of which a slice would end the process.
    """
    for graph in subgraphs.graphs(proto.graph):
        _check_lengths(graph)
    plain = onnx.shape_inference.infer_shapes(proto).graph
    graphs = zip(subgraphs.graphs(plain), subgraphs.graphs(proto.graph), strict=True)
    if any(_first_negative(graph, given) is not None for graph, given in graphs):
        return plain  # to follow a negative length through a slice would end the process
    filled = {
        name
        for node in subgraphs.nodes(plain)
        if node.op_type in kinds.FILL
        for name in node.output
    }
    whole = {TensorProto.INT64, TensorProto.INT32}
    for graph in subgraphs.graphs(plain):
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = value.type.tensor_type
            listed = kind.elem_type in whole or value.name in filled
            if listed and len(kind.shape.dim) == 1 and kind.shape.dim[0].dim_value > LONGEST:
                return plain
    return onnx.shape_inference.infer_shapes(proto, data_prop=True).graph


def _check_lengths(graph: GraphProto) -> None:
    """Raises ModelError for a node whose shape is a constant with a negative length, or is joined from one."""
    constants = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type in kinds.CONSTANT:
            constants.extend((node.output[0], attribute.t) for attribute in node.attribute)
    negative = {name for name, tensor in constants if _is_negative_list(tensor)}
    for node in graph.node:
        if node.op_type in kinds.CONCATENATION and negative.intersection(node.input):
            negative.update(node.output)
    for node in graph.node:
        slot = 0 if node.op_type in kinds.FILL else 1 if node.op_type in kinds.EXPANSION else None
        if slot is not None and len(node.input) > slot and node.input[slot] in negative:
            raise ModelError(
                f"{node.op_type} '{shortened(node.name)}' asks for a tensor with a negative length, by "
                f"'{shortened(node.input[slot])}'; export the model again."
            )


def refuse_negative_lengths(graph: GraphProto, given: GraphProto) -> None:
    """Refuse a graph with a node that gives a negative length, such as one whose kernel is longer than the axis.

    Args:
        graph: The graph with inferred shapes, at the sizes that the model declares.
        given: The same graph before.

    Raises:
        ModelError: There is such a node.
    """
    found = _first_negative(graph, given)
    if found is not None:
        node, name = found
        lengths = _lengths(graph)[name]
        axis = next(i for i, length in enumerate(lengths) if length < 0)
        raise ModelError(
            f"{node.op_type} gives '{shortened(name)}' the length {lengths[axis]} along axis {axis}, "
            "as what it reads is too short there; export the model with longer inputs."
        )


def _first_negative(graph: GraphProto, given: GraphProto) -> tuple[NodeProto, str] | None:
    """First node that gives a negative length though it reads none, with the name of that output.

    Some exporters write -1 for a length that is not known: such a length, and what is inferred from it, says nothing.
    """
    stated = {name for name, found in _lengths(given).items() if min(found, default=0) < 0}
    negative = {name for name, found in _lengths(graph).items() if min(found, default=0) < 0}
    for node in graph.node:
        made = sorted(negative.intersection(node.output) - stated)
        if made and not negative.intersection(node.input):
            return node, made[0]
    return None


def _lengths(graph: GraphProto) -> dict[str, list[int]]:
    """Lengths of tensors along their axes; 0 where one is not known."""
    values = (*graph.input, *graph.value_info, *graph.output)
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def _is_negative_list(tensor: TensorProto) -> bool:
    if tensor.data_type != TensorProto.INT64 or len(tensor.dims) != 1 or tensor.dims[0] > LONGEST:
        return False
    if tensor.data_location == TensorProto.EXTERNAL:
        return False
    try:
        values = numpy_helper.to_array(tensor)
    except ValueError:  # a payload that does not fill its shape is refused where the tensor is read
        return False
    return bool((values < 0).any())


def unfoldable(proto: ModelProto, skeleton: ModelProto) -> tuple[set[str], bool]:
    """Find the computed constants that must not be folded.

    They are or may be too large, or the file would grow.

    Args:
        proto: The model.
        skeleton: The model without the payload of large constants.

    Returns:
        Names of tensors that stay computed, and whether the size of some of them is known only after others are folded.
    """
    candidates = computed_constants.computing_nodes(proto.graph)
    if not candidates:
        return set(), False
    exact_sizes, sizes = _known_sizes(skeleton)
    most = most_bytes(proto)
    result = computed_constants.enlarging(proto.graph, exact_sizes)
    result |= _filled_for_expansion(proto.graph)
    waits = False
    for node in candidates:
        for name in node.output:
            open_size = node.op_type in kinds.GROWING and name not in sizes
            if sizes.get(name, 0) > most or open_size:
                result.add(name)
                waits |= open_size
    return result, waits


def _filled_for_expansion(graph: GraphProto) -> set[str]:
    """Outputs of fills that are only expanded to lengths known at run time: as constants they would add to the file."""
    constants = {tensor.name for tensor in graph.initializer}
    filled = {name for node in graph.node if node.op_type in kinds.FILL for name in node.output}
    read_elsewhere: set[str] = {value.name for value in graph.output}
    for node in graph.node:
        reads = subgraphs.reads(node)
        expands = node.op_type in kinds.EXPANSION and reads[1] not in constants
        read_elsewhere.update(reads[1:] if expands else reads)
    return filled - read_elsewhere


def most_bytes(proto: ModelProto) -> int:
    """Size above which a computed constant is too large to be folded or evaluated.

    Args:
        proto: The model that computes it.

    Returns:
        The size in bytes.
    """
    return max(FOLDED, TIMES * external_data.size(proto))


def _known_sizes(skeleton: ModelProto) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the tensors whose shapes inference gives as numbers: exact where the type is known, and at most."""
    plain = onnx.shape_inference.infer_shapes(skeleton).graph
    exact: dict[str, int] = {}
    largest: dict[str, int] = {}
    for graph in subgraphs.graphs(plain):
        for value in (*graph.value_info, *graph.output):
            kind = value.type.tensor_type
            dims = kind.shape.dim
            if not kind.HasField("shape") or any(not d.HasField("dim_value") for d in dims):
                continue
            largest[value.name] = math.prod(d.dim_value for d in dims) * WIDTH
            if kind.elem_type in external_data.SIZED_TYPES:
                shaped = TensorProto(data_type=kind.elem_type, dims=[d.dim_value for d in dims])
                exact[value.name] = external_data.size_of(shaped)
    return exact, largest
