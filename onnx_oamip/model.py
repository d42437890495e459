"""ONNX file <-> Model. The only reader of model files; uses onnx-graphsurgeon to fold constants.

What a model keeps: opset imports, metadata, doc strings, symbolic dimensions, input and output declarations. What
changes on loading: constant subgraphs become initialisers, unnamed nodes get names, local functions are inlined,
unused nodes go, and what was computed from shapes (the target of a reshape, say) becomes constant where that is
provably the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from .errors import ModelError, OamipError
from .folding import fold
from .records import Array, Model, Node
from .runtime import runtime
from .shapes import ROUNDS, bind, infer, port_of, tensor_types

DEFAULT_DOMAINS = ("", "ai.onnx")


def load(path: str | os.PathLike[str], bindings: Mapping[str, int] | None = None) -> Model:
    """Read, check and normalise a model.

    ``bindings`` gives sizes of symbolic dimensions, by name (``batch``) or by place (``input.2``); without it the
    leading dimension of every input is 1 and other symbols take a default (64 in images, 16 elsewhere).

    Raises ModelError with one sentence for a missing, truncated or invalid file.
    """
    file = Path(path)
    source, sha256, size = read(file)
    try:
        proto = _normalise(source)
        return from_proto(proto, bindings, str(file), sha256, size)
    except OamipError:
        raise
    except Exception as error:  # a library refused the graph: say so instead of showing its traceback
        raise ModelError(f"{file}: the graph cannot be normalised: {_first_line(error)}.") from error


def from_proto(
    proto: ModelProto,
    bindings: Mapping[str, int] | None = None,
    path: str = "",
    sha256: str = "",
    size: int | None = None,
) -> Model:
    """A Model from a normalised proto (as ``load`` and ``rewrite`` make it)."""
    graph = proto.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    inputs = tuple(port_of(v) for v in graph.input if v.name not in constants)
    bound = bind(inputs, bindings or {})
    inferred = infer(proto, bound)
    shapes, dtypes = tensor_types(inferred)
    for name, value in constants.items():
        shapes[name], dtypes[name] = value.shape, value.dtype
    versions = {o.domain: o.version for o in proto.opset_import}
    nodes = tuple(_node(n, versions) for n in graph.node)
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
        file_bytes=proto.ByteSize() if size is None else size,
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
    if file.is_dir():
        raise ModelError(f"{file} is a folder; give the path of an .onnx file.")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            f"{file} is not an ONNX model or is truncated ({len(data)} bytes do not parse); export it again."
        ) from error
    if not proto.ByteSize() or not proto.graph.node or not proto.opset_import:
        raise ModelError(f"{file} is not an ONNX model: it holds no graph; give a file written by an ONNX exporter.")
    digest = hashlib.sha256(data)
    size = len(data)
    for external in sorted(_external_files(proto)):
        side = file.parent / external
        if os.path.isabs(external) or not side.resolve().is_relative_to(file.parent.resolve()):
            raise ModelError(f"{file} keeps weights in '{external}', outside its own folder; move them beside it.")
        if not side.is_file():
            raise ModelError(f"{file} keeps weights in '{external}', which is missing; put it beside the model.")
        size += side.stat().st_size
        with side.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    try:
        onnx.load_external_data_for_model(proto, str(file.parent))
        onnx.checker.check_model(str(file) if size > 1 << 30 else proto)
    except Exception as error:
        raise ModelError(f"{file} is not a valid ONNX model: {_first_line(error)}.") from error
    return proto, digest.hexdigest(), size


def external_paths(path: str | os.PathLike[str]) -> list[Path]:
    """Files beside a model that hold its weights; none where the model cannot be read (load says why)."""
    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
    except (OSError, DecodeError):
        return []
    return [Path(path).parent / name for name in sorted(_external_files(proto))]


def _external_files(proto: ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in proto.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


# --------------------------------------------------------------------------------------------------- normalising


def _normalise(source: ModelProto) -> ModelProto:
    runtime()  # graphsurgeon folds constants with ONNX Runtime: say what to install where it is missing
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    proto = onnx.inliner.inline_local_functions(source) if source.functions else source
    graph = gs.import_onnx(_constants_as_tensors(_dense(proto)))
    graph.toposort(recurse_subgraphs=False)
    graph.fold_constants(
        fold_shapes=False, recurse_subgraphs=False, error_ok=True, should_exclude_node=_keep_unfolded
    )
    graph.cleanup(recurse_subgraphs=False)
    taken = {node.name for node in graph.nodes if node.name}
    seen: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if not node.name or node.name in seen:
            node.name = _unused(f"{node.op}_{i}", taken)
        seen.add(node.name)
        taken.add(node.name)
    result: ModelProto = gs.export_onnx(graph, do_type_check=False)
    restore(result, source)
    _fix_shapes(result)
    return result


def _dense(proto: ModelProto) -> ModelProto:
    """Constants that are stored sparsely written out, zeros and all."""
    if not proto.graph.sparse_initializer:
        return proto
    result = ModelProto()
    result.CopyFrom(proto)
    for sparse in proto.graph.sparse_initializer:
        values, index = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        full = np.zeros(tuple(sparse.dims), values.dtype)
        if index.ndim == 2:
            full[tuple(index.T)] = values
        else:
            full.reshape(-1)[index] = values
        result.graph.initializer.append(numpy_helper.from_array(full, sparse.values.name))
    del result.graph.sparse_initializer[:]
    return result


def _constants_as_tensors(proto: ModelProto) -> ModelProto:
    """Constant nodes in their short forms (a float, a list of ints) written out as tensors of the right type."""
    short = {"value_float": TensorProto.FLOAT, "value_floats": TensorProto.FLOAT, "value_int": TensorProto.INT64,
             "value_ints": TensorProto.INT64}  # fmt: skip
    if not any(n.op_type == "Constant" and n.attribute[0].name in short for n in proto.graph.node):
        return proto
    result = ModelProto()
    result.CopyFrom(proto)
    for node in result.graph.node:
        if node.op_type == "Constant" and (name := node.attribute[0].name) in short:
            value = onnx.helper.get_attribute_value(node.attribute[0])
            dims, values = ([len(value)], list(value)) if name.endswith("s") else ([], [value])
            tensor = onnx.helper.make_tensor("value", short[name], dims, values)
            node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", tensor))
    return result


def _keep_unfolded(node: gs.Node) -> bool:
    """Quantised weights stay quantised; random and stateful operators stay."""
    quantised = {"DequantizeLinear", "QuantizeLinear"}
    return node.op in quantised or node.op.startswith(("Random", "Bernoulli", "Multinomial"))


def _unused(name: str, taken: Iterable[str]) -> str:
    taken = set(taken)
    result, i = name, 1
    while result in taken:
        result, i = f"{name}_{i}", i + 1
    return result


def restore(proto: ModelProto, source: ModelProto) -> None:
    """Put back what graphsurgeon drops: metadata, producer, doc strings, and the interface word for word."""
    proto.ir_version = max(source.ir_version, 4)
    proto.producer_name, proto.producer_version = source.producer_name, source.producer_version
    proto.domain, proto.model_version, proto.doc_string = source.domain, source.model_version, source.doc_string
    proto.graph.name, proto.graph.doc_string = source.graph.name, source.graph.doc_string
    for mine, theirs in ((proto.metadata_props, source.metadata_props),
                         (proto.graph.metadata_props, source.graph.metadata_props)):
        del mine[:]
        mine.extend(theirs)
    used = {o.domain for o in proto.opset_import}
    proto.opset_import.extend(o for o in source.opset_import if o.domain not in used)
    constants = {t.name for t in source.graph.initializer} | {t.values.name for t in source.graph.sparse_initializer}
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
    _unshadow(proto.graph, {t.name for t in proto.graph.initializer})


def _unshadow(graph: GraphProto, outer: set[str]) -> None:
    """Take out copies of outer constants that graphsurgeon leaves in subgraphs: one constant stays one."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs):
                kept = [t for t in inner.initializer if t.name not in outer]
                if len(kept) < len(inner.initializer):
                    del inner.initializer[:]
                    inner.initializer.extend(kept)
                _unshadow(inner, outer | {t.name for t in kept})


def _fix_shapes(proto: ModelProto) -> None:
    """Make constants of computed shapes, round after round, and drop the computations behind."""
    for _ in range(ROUNDS):
        if not fold(proto):
            return
        graph = gs.import_onnx(proto)
        graph.toposort(recurse_subgraphs=False)
        graph.fold_constants(
            fold_shapes=False, recurse_subgraphs=False, error_ok=True, should_exclude_node=_keep_unfolded
        )
        graph.cleanup(recurse_subgraphs=False)
        trimmed = gs.export_onnx(graph, do_type_check=False)
        restore(trimmed, proto)
        proto.CopyFrom(trimmed)


# ---------------------------------------------------------------------------------------------------------- nodes


def _node(node: NodeProto, versions: Mapping[str, int]) -> Node:
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    attrs = {}
    captures: set[str] = set()
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for graph in graphs:
                captures |= captured(graph)
        else:
            value: Any = onnx.helper.get_attribute_value(attribute)
            attrs[attribute.name] = value.decode() if isinstance(value, bytes) else value
    version = versions.get(node.domain, versions.get("" if not domain else node.domain, 1))
    return Node(
        node.name, node.op_type, domain, version, tuple(node.input), tuple(node.output), attrs, tuple(sorted(captures))
    )


def reads(node: NodeProto) -> list[str]:
    """Every tensor a node needs: its inputs and what its subgraphs take from outside."""
    names = [n for n in node.input if n]
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            names += sorted(set().union(*(captured(g) for g in graphs)) - set(names))
    return names


def captured(graph: GraphProto) -> set[str]:
    """Outer tensors that a subgraph reads."""
    own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    read: set[str] = set()
    for node in graph.node:
        read |= set(node.input)
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)):
                read |= captured(inner)
        own |= set(node.output)
    read |= {v.name for v in graph.output}
    return read - own - {""}


def digest(array: Array) -> str:
    """sha256 of an array's bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
