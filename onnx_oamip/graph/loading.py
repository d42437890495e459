"""ONNX file <-> Model. The only reader of model files; uses onnx-graphsurgeon to fold constants.

What a model keeps: opset imports, metadata, doc strings, symbolic dimensions, input and output declarations. What
changes on loading: what the graph computes from constants becomes an initialiser (what a body computes does not), a
body returns an outer value or a constant through an Identity, unnamed nodes get names, local functions are inlined,
unused nodes go, and what was computed from shapes (the target of a reshape, say) becomes constant where that is
provably the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper

from onnx_oamip.core.errors import ModelError, OamipError, RuleFailed
from onnx_oamip.core.records import (
    Array,
    Body,
    Model,
    Node,
)
from onnx_oamip.graph import external_data, input_guards, subgraphs
from onnx_oamip.graph.ops import kinds
from onnx_oamip.graph.runtime import Session, runtime
from onnx_oamip.graph.shape_folding import fold
from onnx_oamip.graph.shape_inference import (
    ROUNDS,
    all_types,
    bind,
    port_of,
    skeleton,
)

DEFAULT_DOMAINS = ("", "ai.onnx")


def load(path: str | os.PathLike[str], bindings: Mapping[str, int] | None = None) -> Model:
    """Read, check and normalise a model.

    Args:
        path: Model file.
        bindings: Sizes of symbolic dimensions, by name (``batch``) or by position (``input.2``). Default: 1 for the
            leading dimension of every input; 64 in images and 16 elsewhere for other symbols.

    Returns:
        The model, with constants folded and shapes inferred.

    Raises:
        ModelError: The file is missing, truncated or invalid.
    """
    file = Path(path)
    source, sha256, size = read(file)
    try:
        proto = _normalise(source)
        return from_proto(proto, bindings, str(file), sha256, size)
    except OamipError:
        raise
    except RuleFailed:
        Session(file, "cpu", what=str(file))  # what the runtime refuses is no mistake of a rule
        raise
    except (
        Exception
    ) as error:  # a library refused the graph: say so instead of showing its traceback
        raise ModelError(
            f"{file}: the graph cannot be normalised: {_first_line(error)}."
        ) from error


def from_proto(
    proto: ModelProto,
    bindings: Mapping[str, int] | None = None,
    path: str = "",
    sha256: str = "",
    size: int | None = None,
) -> Model:
    """A Model from a normalised proto (as ``load`` and ``rewrite`` make it)."""
    graph = proto.graph
    constants = {t.name: external_data.array(t) for t in graph.initializer}
    inputs = tuple(port_of(v) for v in graph.input if v.name not in constants)
    bound = bind(inputs, bindings or {})
    versions = {o.domain: o.version for o in proto.opset_import}
    nodes = tuple(_node(n, versions) for n in graph.node)
    shapes, dtypes = all_types(proto, bound, nodes)
    for name, value in constants.items():
        shapes[name], dtypes[name] = value.shape, value.dtype
    input_guards.check(shapes, dtypes)
    first = shapes.get(inputs[0].name, ()) if inputs else ()
    return Model(
        proto=proto,
        nodes=nodes,
        constants=constants,
        shapes=shapes,
        dtypes=dtypes,
        inputs=inputs,
        outputs=tuple(port_of(v) for v in graph.output),
        bindings=bound,
        batch=first[0] if len(first) > 1 and first[0] > 0 else 1,
        path=path,
        sha256=sha256,
        file_bytes=external_data.size(proto) if size is None else size,
    )


def rebind(model: Model, bindings: Mapping[str, int]) -> Model:
    """The same model with other sizes of its symbolic dimensions."""
    if all(model.bindings.get(k) == v for k, v in bindings.items()):
        return model
    return from_proto(model.proto, bindings, model.path, model.sha256, model.file_bytes)


# ------------------------------------------------------------------------------------------------------- reading


def read(file: Path) -> tuple[ModelProto, str, int]:
    """(model as it is in the file, with external data, sha256, bytes). Raises ModelError as ``load`` does."""
    if not file.exists():
        raise ModelError(f"{file}: no such file; give the path of an .onnx model.")
    if not file.is_file():
        what = "folder" if file.is_dir() else "pipe or a device"
        raise ModelError(f"{file} is a {what}; give the path of an .onnx file.")
    try:
        size = file.stat().st_size
        digest = hashlib.sha256()
        _add(digest, file)
        proto = external_data.parse(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    except DecodeError as error:
        raise ModelError(
            f"{file} is not an ONNX model or is truncated ({size} bytes do not parse); export it again."
        ) from error
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(
            f"{file} is not an ONNX model: it holds no graph; give a file written by an ONNX exporter."
        )
    sides = _sides(file, proto)
    for side in sides.values():
        size += side.stat().st_size
        _add(digest, side)
    _settle(file, proto, {**sides, str(file.resolve()): file}, size)
    try:
        onnx.checker.check_model(external_data.checkable(proto))
    except Exception as error:
        raise ModelError(f"{file} is not a valid ONNX model: {_first_line(error)}.") from error
    return proto, digest.hexdigest(), size


def _add(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(external_data.CHUNK):
            digest.update(chunk)


def _sides(file: Path, proto: ModelProto) -> dict[str, Path]:
    """Files beside a model that hold its weights, by the name it gives them, all in its folder and there."""
    found: dict[str, Path] = {}
    for name in sorted(_external_files(proto) - {str(file.resolve())}):
        side = file.parent / name
        try:
            within = not os.path.isabs(name) and side.resolve().is_relative_to(
                file.parent.resolve()
            )
        except (
            OSError,
            RuntimeError,
            ValueError,
        ):  # links in a circle, or no name that a file can have
            within = False
        if not within:
            raise ModelError(
                f"{file} keeps weights in '{name}', outside its own folder; move them beside it."
            )
        if not side.is_file():
            raise ModelError(
                f"{file} keeps weights in '{name}', which is missing; put it beside the model."
            )
        found[name] = side
    return found


def _settle(file: Path, proto: ModelProto, sides: Mapping[str, Path], size: int) -> None:
    """Let large weights of a large model name the place in their file, and read all others in.

    ``sides``: files by the name that the model gives them, its own among them.
    """
    main = len(proto.graph.initializer)
    for i, tensor in enumerate(subgraphs.tensors(proto)):  # those of the graph itself come first
        if not external_data.is_reference(tensor):
            continue
        location, offset, length = _place(file, tensor)
        if location not in sides or tensor.data_type not in external_data.KNOWN:
            raise ModelError(
                f"{file}: the weight '{tensor.name}' names no data file, or no type of its elements."
            )
        held = external_data.size_of(tensor)
        there = sides[location].stat().st_size
        if (length is not None and length != held) or offset + held > there:
            raise ModelError(
                f"{file}: the weight '{tensor.name}' of {held} bytes does not fit its place in '{location}' "
                f"({there} bytes, offset {offset}, length {length}); copy the data file again or export the model anew."
            )
        external_data.refer(tensor, sides[location].resolve(), offset, held)
        large = (
            size >= external_data.MAPPED
            and held >= external_data.LEAST
            and tensor.data_type in external_data.WHOLE_BYTES
        )
        if not large or i >= main:
            external_data.hold(tensor)


def _place(file: Path, tensor: TensorProto) -> tuple[str, int, int | None]:
    try:
        return external_data.place(tensor)
    except ValueError as error:
        raise ModelError(
            f"{file}: the weight '{tensor.name}' has no place in its data file: {error}."
        ) from error


def external_paths(path: str | os.PathLike[str]) -> list[Path]:
    """Files beside a model that hold its weights; none where the model cannot be read (load says why)."""
    try:
        proto = external_data.parse(Path(path))
    except (OSError, DecodeError):
        return []
    names = _external_files(proto) - {str(Path(path).resolve())}
    return [Path(path).parent / name for name in sorted(names)]


def _external_files(proto: ModelProto) -> set[str]:
    said = (
        e
        for t in subgraphs.tensors(proto)
        if external_data.is_reference(t)
        for e in t.external_data
    )
    return {e.value for e in said if e.key == "location"}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


# --------------------------------------------------------------------------------------------------- normalising


def _normalise(source: ModelProto) -> ModelProto:
    runtime()  # graphsurgeon folds constants with ONNX Runtime: say what to install where it is missing
    gs.logger.G_LOGGER.severity = (
        gs.logger.G_LOGGER.CRITICAL + 1
    )  # it prints what it raises as well
    source = subgraphs.inline(source)
    _dense(source)
    _constants_as_tensors(source)
    subgraphs.flatten(source)
    result = _folded(source)
    while subgraphs.resolve(result):
        result = _folded(result)
    for _ in range(
        ROUNDS
    ):  # constants of computed shapes, round after round, and off with the computations behind
        if not fold(result):
            break
        result = _folded(result)
        while subgraphs.resolve(result):
            result = _folded(result)
    return result


def _folded(source: ModelProto) -> ModelProto:
    """In order, named, without unused nodes, and with constants in place of what is computed from constants."""
    left, waits = input_guards.unfoldable(source, skeleton(source))
    result = _fold_all(source, left)
    while waits:  # what was folded says how large the others are
        before = left
        left, waits = input_guards.unfoldable(result, skeleton(result))
        if left == before:
            break
        result = _fold_all(result, left)
    return result


def _fold_all(source: ModelProto, left: set[str]) -> ModelProto:
    """:func:`_folded` but for the tensors in ``left``."""

    def stays(node: gs.Node | NodeProto) -> bool:
        outputs = (
            node.output if isinstance(node, NodeProto) else [tensor.name for tensor in node.outputs]
        )
        return _keep_unfolded(node) or not left.isdisjoint(outputs)

    _hold_foldable(source, stays)
    graph = gs.import_onnx(source)
    graph.toposort(recurse_subgraphs=False)
    # Not in bodies: there graphsurgeon ignores `stays`, and folds with only some pairs of onnx and ONNX Runtime.
    graph.fold_constants(
        fold_shapes=False,
        recurse_subgraphs=False,
        flatten_subgraphs=False,
        error_ok=True,
        should_exclude_node=stays,
    )
    graph.cleanup()
    every = [graph, *graph.subgraphs(recursive=True)]
    taken = {node.name for g in every for node in g.nodes if node.name}
    seen: set[str] = set()
    for g in every:
        for i, node in enumerate(g.nodes):
            if not node.name or node.name in seen:
                node.name = subgraphs.unused(f"{node.op}_{i}", taken)
            seen.add(node.name)
            taken.add(node.name)
    result: ModelProto = gs.export_onnx(graph, do_type_check=False)
    restore(result, source)
    return result


def _hold_foldable(proto: ModelProto, stays: Callable[[NodeProto], bool]) -> None:
    """Read in what folding will read: weights of nodes that see nothing but constants."""
    tensors = {t.name: t for t in proto.graph.initializer}
    known = set(tensors)
    for node in proto.graph.node:
        read = subgraphs.reads(node)
        if known.issuperset(read) and not stays(node):
            known.update(node.output)
            for name in read:
                if name in tensors:
                    external_data.hold(tensors[name])


def _dense(proto: ModelProto) -> None:
    """Constants that are stored sparsely written out, zeros and all."""
    for graph in subgraphs.graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            values, index = (
                numpy_helper.to_array(sparse.values),
                numpy_helper.to_array(sparse.indices),
            )
            input_guards.check_written_out(sparse, proto)
            full = np.zeros(tuple(sparse.dims), values.dtype)
            if index.ndim == 2:
                full[tuple(index.T)] = values
            else:
                full.reshape(-1)[index] = values
            graph.initializer.append(numpy_helper.from_array(full, sparse.values.name))
        del graph.sparse_initializer[:]


def _constants_as_tensors(proto: ModelProto) -> None:
    """Constant nodes in their short forms (a float, a list of ints) written out as tensors of the right type."""
    short = {
        "value_float": TensorProto.FLOAT,
        "value_floats": TensorProto.FLOAT,
        "value_int": TensorProto.INT64,
        "value_ints": TensorProto.INT64,
    }
    for node in subgraphs.nodes(proto.graph):
        if node.op_type in kinds.CONSTANT and (name := node.attribute[0].name) in short:
            value = onnx.helper.get_attribute_value(node.attribute[0])
            dims, values = ([len(value)], list(value)) if name.endswith("s") else ([], [value])
            tensor = onnx.helper.make_tensor("value", short[name], dims, values)
            node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", tensor))


def _keep_unfolded(node: gs.Node | NodeProto) -> bool:
    """Quantised weights stay quantised; random and stateful operators stay, and nodes with one of them in a body."""
    if isinstance(node, NodeProto):
        ops = {
            node.op_type,
            *(n.op_type for body in subgraphs.inner(node) for n in subgraphs.nodes(body)),
        }
    else:
        ops = {node.op, *(n.op for body in node.subgraphs(recursive=True) for n in body.nodes)}
    return any(op.startswith(kinds.NOT_FOLDED) for op in ops)


def restore(proto: ModelProto, source: ModelProto) -> None:
    """Put back what graphsurgeon drops: metadata, producer, doc strings, and the interface word for word."""
    proto.ir_version = max(source.ir_version, 4)
    proto.producer_name, proto.producer_version = source.producer_name, source.producer_version
    proto.domain, proto.model_version, proto.doc_string = (
        source.domain,
        source.model_version,
        source.doc_string,
    )
    proto.graph.name, proto.graph.doc_string = source.graph.name, source.graph.doc_string
    for mine, theirs in (
        (proto.metadata_props, source.metadata_props),
        (proto.graph.metadata_props, source.graph.metadata_props),
    ):
        del mine[:]
        mine.extend(theirs)
    used = {o.domain for o in proto.opset_import}
    proto.opset_import.extend(o for o in source.opset_import if o.domain not in used)
    constants = {t.name for t in source.graph.initializer} | {
        t.values.name for t in source.graph.sparse_initializer
    }
    declared = {v.name: v for v in (*source.graph.input, *source.graph.output)}
    for values in (proto.graph.input, proto.graph.output):
        for value in values:
            if value.name in declared:
                value.CopyFrom(declared[value.name])
    docs = {n.name: n for n in source.graph.node if n.name}
    for node in proto.graph.node:
        if (old := docs.get(node.name)) is not None and old.op_type == node.op_type:
            node.doc_string = old.doc_string
            if not node.metadata_props:
                node.metadata_props.extend(old.metadata_props)
    # An input that is also an initialiser is a constant: it may shrink, so it is no longer offered as an input.
    kept = [v for v in proto.graph.input if v.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    # Shapes of intermediate tensors are inferred afresh; old ones would be wrong after a cut.
    del proto.graph.value_info[:]
    # graphsurgeon puts constants into the bodies that read them.
    subgraphs.lift(proto)


# ---------------------------------------------------------------------------------------------------------- nodes


def _node(node: NodeProto, versions: Mapping[str, int]) -> Node:
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    attrs = {}
    for attribute in node.attribute:
        if attribute.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            value: Any = onnx.helper.get_attribute_value(attribute)
            attrs[attribute.name] = value.decode() if isinstance(value, bytes) else value
    held = {
        name: Body(
            tuple(v.name for v in g.input),
            tuple(v.name for v in g.output),
            tuple(_node(n, versions) for n in g.node),
        )
        for name, g in subgraphs.held(node).items()
    }
    version = versions.get(node.domain, versions.get("" if not domain else node.domain, 1))
    captures = tuple(sorted(set(subgraphs.reads(node)) - set(node.input)))
    inputs, outputs = tuple(node.input), tuple(node.output)
    return Node(node.name, node.op_type, domain, version, inputs, outputs, attrs, captures, held)


def digest(array: Array) -> str:
    """sha256 of an array's bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
