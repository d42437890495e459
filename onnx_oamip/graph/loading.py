"""Loading: reads an ONNX file, checks it, and normalises its graph into a ``Model``.

No other module reads model files. Preserved are opset imports, metadata, doc strings, symbolic dimensions, and the
declarations of inputs and outputs. Normalising changes the following: values that the graph computes from constants
become initialisers (not those that a subgraph computes, and not where the file would grow); readers of a copy of a
constant read the constant; a subgraph returns an outer value or a constant through an Identity; unnamed nodes get
names; local functions are inlined; unused nodes are removed; and values computed from shapes (the target of a Reshape,
say) become constants where that is provably the same.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import (
    AttributeProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    numpy_helper,
)

from onnx_oamip.core.errors import ModelError, OamipError
from onnx_oamip.core.records import (
    Array,
    Body,
    Model,
    Node,
    Port,
)
from onnx_oamip.graph import (
    batch_symbols,
    computed_constants,
    conformance,
    default_inputs,
    external_data,
    finite_weights,
    input_guards,
    random_numbers,
    subgraphs,
)
from onnx_oamip.graph.ops import fused, kinds, sequences
from onnx_oamip.graph.runtime import Session, runtime
from onnx_oamip.graph.shape_folding import fold
from onnx_oamip.graph.shape_inference import (
    ROUNDS,
    bind,
    fitting_types,
    is_tensor,
    output_ports,
    port_of,
    skeleton,
    symbol,
)
from onnx_oamip.graph.shape_inference import sizes as stated_sizes

DEFAULT_DOMAINS = ("", "ai.onnx")
ModelSource = str | os.PathLike[str] | ModelProto
"""A model file, or a model in memory."""
IN_MEMORY = "(model)"
"""Name of a model in memory in messages and reports."""
SHORT_CONSTANTS = {
    "value_float": TensorProto.FLOAT,
    "value_floats": TensorProto.FLOAT,
    "value_int": TensorProto.INT64,
    "value_ints": TensorProto.INT64,
}
"""Element types of the attributes in which a Constant node may hold plain numbers."""


class ModelFile(NamedTuple):
    """Content of a model file.

    Attributes:
        proto: The model of the file, fused operators written out; large weights are references.
        sha256: Digest of the file and of those with its external data.
        size: Bytes of all these files.
        written_out: Names of the fused operators.
    """

    proto: ModelProto
    sha256: str
    size: int
    written_out: tuple[str, ...] = ()


def load(
    path: ModelSource,
    bindings: Mapping[str, int] | None = None,
    *,
    stated: Mapping[str, tuple[int, ...]] | None = None,
) -> Model:
    """Reads, checks and normalises a model.

    Args:
        path: Model file, or a model in memory, which is not changed.
        bindings: Sizes of symbolic dimensions, by name (``batch``) or by position (``input.2``). Default: 1 for the
            leading dimension of every input; 64 in images and 16 elsewhere for other symbols, and more where a kernel
            is longer.
        stated: Lengths by name of an input or of a symbolic dimension, as settings state them.

    Returns:
        The model, with constants folded and shapes inferred.

    Raises:
        ModelError: The file is missing, truncated or invalid.
        SettingsError: A stated shape does not fit the inputs.
    """
    if isinstance(path, ModelProto):
        name = IN_MEMORY
        found = read_proto(path)
    elif not isinstance(path, (str, os.PathLike)):
        raise ModelError(
            f"a model is the path of an .onnx file or an onnx.ModelProto, not {type(path).__name__}; for bytes, give "
            "onnx.load_from_string(...)."
        )
    else:
        name = str(Path(path))
        found = read(Path(path))
    for value in found.proto.graph.input:
        port_of(value)  # before other libraries read it
    interface = default_inputs.take(found.proto)
    try:
        # Shape inference follows every call of a function: too many calls are refused before.
        source = subgraphs.inline(found.proto)
        notes = (*_remarks(found), *conformance.declare_outputs(source), *interface.notes)
        proto = _normalise(source)
        notes = (*notes, *conformance.declare_outputs(proto))
        sizes = {**(bindings or {}), **_stated_sizes(proto, stated or {})}
        model = from_proto(proto, sizes, path=name, sha256=found.sha256, size=found.size)
    except OamipError:
        raise
    except Exception:
        # If the runtime refuses the model too, the model is at fault; else this package is.
        Session(path if isinstance(path, ModelProto) else Path(path), "cpu", what=name)
        raise
    finite_weights.check(model)
    folded = computed_constants.origins(proto, source)
    return replace(model, interface=interface, notes=notes, folded=folded)


def _stated_sizes(proto: ModelProto, stated: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(port_of(v) for v in proto.graph.input if v.name not in constants)
    return stated_sizes(inputs, stated)


def _remarks(file: ModelFile) -> tuple[str, ...]:
    """Notes about a file for reports."""
    notes = []
    if file.written_out:
        names = ", ".join(file.written_out)
        notes.append(
            f"fused operators ({names}) are written out in their parts, which ONNX Runtime fuses again when it loads "
            "the result"
        )
    notes += random_numbers.remarks(file.proto)
    others = [value.name for value in file.proto.graph.output if not is_tensor(value)]
    if others:
        names = ", ".join(f"'{name}'" for name in others)
        notes.append(
            f"not tensors, so kept as they are and not compared: the graph outputs {names}"
        )
    if file.proto.training_info:
        notes.append(
            "the file holds training graphs (training_info), which belong to the original weights; the result has none"
        )
    return tuple(notes)


def from_proto(
    proto: ModelProto,
    bindings: Mapping[str, int] | None = None,
    *,
    path: str = "",
    sha256: str = "",
    size: int | None = None,
    batch: int | None = None,
) -> Model:
    """Builds a Model from a normalised graph.

    Args:
        proto: A graph as :func:`load` and the surgery make it.
        bindings: Sizes of symbolic dimensions; see :func:`load`.
        path: File that the model comes from.
        sha256: Digest of that file.
        size: Bytes of that file. Default: the size of ``proto``.
        batch: Samples in one batch. Default: the length of the likeliest batch axis of the first input.

    Returns:
        The model, with inferred shapes.

    Raises:
        ModelError: Its shapes are too large to be sensible.
    """
    graph = proto.graph
    initialisers = {t.name for t in graph.initializer}
    inputs = tuple(port_of(v) for v in graph.input if v.name not in initialisers)
    outputs = output_ports(graph)
    bound = bind(inputs, bindings or {})
    versions = {o.domain: o.version for o in proto.opset_import}
    nodes = tuple(_node(n, versions) for n in graph.node)
    assumed = tuple(name for name in bound if name not in (bindings or {}))
    leading = {symbol(port, 0) for port in inputs if len(port.dims) > 1}
    bound, shapes, dtypes = fitting_types(proto, bound, nodes, set(assumed) - leading)
    most = input_guards.most_bytes(proto)

    def is_offered(name: str) -> bool:
        known = name in shapes and name in dtypes
        return known and math.prod(shapes[name]) * dtypes[name].itemsize <= most

    constants = computed_constants.Constants(proto, is_offered)
    for name, value in constants.stored.items():
        shapes[name], dtypes[name] = value.shape, value.dtype
    input_guards.check(shapes, dtypes)
    return Model(
        proto=proto,
        nodes=nodes,
        constants=constants,
        computed=frozenset(constants.nodes),
        views=constants.views,
        shapes=shapes,
        dtypes=dtypes,
        inputs=inputs,
        outputs=outputs,
        bindings=bound,
        batch=_batch(inputs, outputs, shapes) if batch is None else batch,
        path=path,
        sha256=sha256,
        file_bytes=external_data.size(proto) if size is None else size,
        assumed=assumed,
    )


def _batch(
    inputs: Sequence[Port], outputs: Sequence[Port], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """Length of the likeliest batch axis of the first input; 1 if it has none."""
    if not inputs:
        return 1
    shape = shapes.get(inputs[0].name, ())
    axes = batch_symbols.batch_axes(inputs[0], inputs, outputs)
    if len(shape) > 1 and axes and shape[axes[0]] > 0:
        return shape[axes[0]]
    return 1


def remade(model: Model, proto: ModelProto) -> Model:
    """Builds a Model from a graph that was made of another one, at the same sizes.

    Args:
        model: The other model.
        proto: The graph.

    Returns:
        The model, with the notes and the branches left out of the other one.
    """
    made = from_proto(
        proto,
        model.bindings,
        path=model.path,
        sha256=model.sha256,
        size=model.file_bytes,
        batch=model.batch,
    )
    return replace(
        made,
        interface=model.interface,
        notes=model.notes,
        folded=model.folded,
        assumed=model.assumed,
        idle=model.idle,
        aside_params=model.aside_params,
        aside_bytes=model.aside_bytes,
    )


def rebind(model: Model, bindings: Mapping[str, int]) -> Model:
    """Gives a model other sizes of its symbolic dimensions.

    Args:
        model: The model.
        bindings: Sizes by name of the dimension.

    Returns:
        The model with new shapes, or the same one if nothing changes.
    """
    assumed = tuple(name for name in model.assumed if name not in bindings)
    if all(model.bindings.get(k) == v for k, v in bindings.items()):
        if assumed == model.assumed:
            return model
        return replace(model, assumed=assumed)
    sizes = {**{k: v for k, v in model.bindings.items() if k not in model.assumed}, **bindings}
    bound = from_proto(
        model.proto,
        sizes,
        path=model.path,
        sha256=model.sha256,
        size=model.file_bytes,
    )
    return replace(
        bound,
        interface=model.interface,
        notes=model.notes,
        folded=model.folded,
        idle=model.idle,
    )


# ------------------------------------------------------------------------------------------------------- reading


def read(file: Path) -> ModelFile:
    """Reads a model file and the files with its external data, and checks them.

    Args:
        file: Path of the model.

    Returns:
        The model, the digest, and the size in bytes.

    Raises:
        ModelError: The file is missing, truncated or invalid.
    """
    if not file.exists():
        raise ModelError(f"{file}: no such file; give the path of an .onnx model.")
    if not file.is_file():
        kind = "folder" if file.is_dir() else "pipe or a device"
        raise ModelError(f"{file} is a {kind}; give the path of an .onnx file.")
    digest = hashlib.sha256()
    try:
        size = file.stat().st_size
        _add_content(digest, file)
        proto = external_data.parse(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    except DecodeError as error:
        raise ModelError(
            f"{file} is not an ONNX model or is truncated ({size} bytes do not parse); export it again."
        ) from error
    _check_graph(str(file), proto)
    data_files = _data_files(file, proto)
    for data_file in data_files.values():
        size += data_file.stat().st_size
        _add_content(digest, data_file)
    _resolve_external_data(file, proto, {**data_files, str(file.resolve()): file}, size)
    written_out = _conform(str(file), proto)
    return ModelFile(proto, digest.hexdigest(), size, written_out)


def read_proto(source: ModelProto) -> ModelFile:
    """Copies and checks a model in memory.

    Args:
        source: The model, which is not changed.

    Returns:
        A copy, with the digest and the size of the file that ``onnx.save`` would write.

    Raises:
        ModelError: The model is invalid, too large for one file, or refers to weights in files.
    """
    _check_graph(IN_MEMORY, source)
    away = sorted(_external_names(source))
    if away:
        raise ModelError(
            f"{IN_MEMORY} refers to weights in '{away[0]}', which were not loaded; give the path of the model, or load "
            "it with 'onnx.load(path)'."
        )
    size = source.ByteSize()
    if size >= external_data.PROTOBUF_LIMIT:
        raise ModelError(
            f"{IN_MEMORY} holds {size:,} bytes, more than one file of ONNX can; save it with its weights in files "
            "beside it, and give the path."
        )
    content = source.SerializeToString(deterministic=True)
    proto = ModelProto.FromString(content)
    written_out = _conform(IN_MEMORY, proto)
    return ModelFile(proto, hashlib.sha256(content).hexdigest(), size, written_out)


def _check_graph(name: str, proto: ModelProto) -> None:
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(
            f"{name} is not an ONNX model: it holds no graph; give a file written by an ONNX exporter."
        )


def _conform(name: str, proto: ModelProto) -> tuple[str, ...]:
    """Corrects small deviations from the standard, writes out fused operators, and checks a model, in place.

    Returns:
        Names of the fused operators.

    Raises:
        ModelError: The model is invalid.
    """
    try:
        conformance.conform(proto)
    except ModelError as error:
        raise ModelError(f"{name} is not a valid ONNX model: {error}") from error
    written_out = fused.write_out(proto)
    sequences.write_out(proto)
    try:
        onnx.checker.check_model(conformance.with_shapes(external_data.checkable(proto)))
    except Exception as error:
        raise ModelError(f"{name} is not a valid ONNX model: {_first_line(error)}.") from error
    return written_out


def _add_content(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(external_data.CHUNK_BYTES):
            digest.update(chunk)


def _data_files(file: Path, proto: ModelProto) -> dict[str, Path]:
    """Files with the external data of a model, by the name in the model; they must exist in its folder.

    A model that is a link may have its data in the folder that it links to, as in a store of files by their content.
    """
    folders = (file.parent, file.resolve().parent)
    result: dict[str, Path] = {}
    for name in sorted(_external_names(proto) - {str(file.resolve())}):
        data_file = file.parent / name
        if not any(_is_inside(data_file, name, folder) for folder in folders):
            raise ModelError(
                f"{file} keeps weights in '{name}', outside its own folder; move them beside it."
            )
        if not data_file.is_file():
            raise ModelError(
                f"{file} keeps weights in '{name}', which is missing; put it beside the model."
            )
        result[name] = data_file
    return result


def _is_inside(data_file: Path, name: str, folder: Path) -> bool:
    if os.path.isabs(name):
        return False
    try:
        data_file.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a circle of links
            return False
    except ValueError:  # an impossible file name
        return False
    try:
        return data_file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def _resolve_external_data(
    file: Path,
    proto: ModelProto,
    data_files: Mapping[str, Path],
    size: int,
) -> None:
    """Makes large weights of a large model refer to absolute paths, and loads all other external weights.

    Args:
        file: The model file, for messages.
        proto: The model, changed in place.
        data_files: Files by the name that the model gives them, the model file among them.
        size: Bytes of all files.

    Raises:
        ModelError: A weight has no file, no known type, or does not fit its file.
    """
    main_initialisers = len(proto.graph.initializer)
    # The initialisers of the main graph come first; only they may stay in files.
    for i, tensor in enumerate(subgraphs.tensors(proto)):
        if not external_data.is_reference(tensor):
            continue
        name, offset, length = _location(file, tensor)
        if name not in data_files or tensor.data_type not in external_data.SIZED_TYPES:
            raise ModelError(
                f"{file}: the weight '{tensor.name}' names no data file, or no type of its elements."
            )
        expected = external_data.size_of(tensor)
        available = data_files[name].stat().st_size
        has_wrong_length = length is not None and length != expected
        if has_wrong_length or offset + expected > available:
            raise ModelError(
                f"{file}: the weight '{tensor.name}' of {expected} bytes does not fit its place in '{name}' "
                f"({available} bytes, offset {offset}, length {length}); copy the data file again or export the model "
                "anew."
            )
        external_data.set_reference(tensor, data_files[name].resolve(), offset, expected)
        stays_in_file = (
            i < main_initialisers
            and size >= external_data.MAPPED_MODEL_BYTES
            and expected >= external_data.MAPPED_TENSOR_BYTES
            and tensor.data_type in external_data.WHOLE_BYTES
        )
        if not stays_in_file:
            external_data.load_payload(tensor)


def _location(file: Path, tensor: TensorProto) -> external_data.Location:
    try:
        return external_data.location(tensor)
    except ValueError as error:
        raise ModelError(
            f"{file}: the weight '{tensor.name}' has no place in its data file: {error}."
        ) from error


def external_paths(path: str | os.PathLike[str]) -> list[Path]:
    """Files with the external data of a model.

    Args:
        path: Model file.

    Returns:
        Their paths by name; empty if the model cannot be read, which :func:`load` reports.
    """
    file = Path(path)
    try:
        proto = external_data.parse(file)
    except (OSError, DecodeError):
        return []
    names = _external_names(proto) - {str(file.resolve())}
    return [file.parent / name for name in sorted(names)]


def _external_names(proto: ModelProto) -> set[str]:
    """Names of the files that the tensors of a model refer to."""
    names: set[str] = set()
    for tensor in subgraphs.tensors(proto):
        if external_data.is_reference(tensor):
            names.update(e.value for e in tensor.external_data if e.key == "location")
    return names


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first.rstrip(".")[:300]


# --------------------------------------------------------------------------------------------------- normalising


def _normalise(source: ModelProto) -> ModelProto:
    runtime()  # graphsurgeon folds with ONNX Runtime: report at once if that is not installed
    # graphsurgeon also prints the errors that it raises: silence it.
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL + 1
    _densify(source)
    _expand_short_constants(source)
    subgraphs.flatten(source)
    computed_constants.share(source)
    result = _fold_and_resolve(source)
    # Folding a computed shape makes the nodes that computed it foldable or unused, and so on.
    for _ in range(ROUNDS):
        if not fold(result):
            break
        result = _fold_and_resolve(result)
    computed_constants.separate(result, default_inputs.names(result))
    default_inputs.close(result)
    return result


def _fold_and_resolve(source: ModelProto) -> ModelProto:
    """Folds constants and replaces decided If nodes by their branches, until no such If is left."""
    result = _folded(source)
    while subgraphs.resolve(result):
        result = _folded(result)
    return result


def _folded(source: ModelProto) -> ModelProto:
    """Sorts and names the nodes, removes unused ones, and folds those that are computed from constants."""
    computed_constants.hoist(source)
    unfoldable, has_unknown_sizes = input_guards.unfoldable(source, skeleton(source))
    result = _fold_all(source, unfoldable)
    # Tensors of unknown size are left unfolded; the values folded so far may determine their sizes.
    while has_unknown_sizes:
        previous = unfoldable
        unfoldable, has_unknown_sizes = input_guards.unfoldable(result, skeleton(result))
        if unfoldable == previous:
            break
        result = _fold_all(result, unfoldable)
    return result


def _fold_all(source: ModelProto, unfoldable: set[str]) -> ModelProto:
    """One pass of :func:`_folded`, which leaves the tensors in ``unfoldable`` computed."""

    replaceable = default_inputs.names(source)
    # graphsurgeon cannot write texts as constants.
    texts = {t.name for t in source.graph.initializer if t.data_type == TensorProto.STRING}
    open_inputs = replaceable | texts

    def is_kept(node: gs.Node | NodeProto) -> bool:
        return (
            _must_stay(node)
            or not unfoldable.isdisjoint(_output_names(node))
            or not open_inputs.isdisjoint(_input_names(node))
        )

    _load_folded_weights(source, is_kept)
    graph = gs.import_onnx(source)
    graph.toposort(recurse_subgraphs=False)
    # Not in subgraphs: graphsurgeon ignores `should_exclude_node` there, and folds them only with some pairs of onnx
    # and ONNX Runtime.
    graph.fold_constants(
        fold_shapes=False,
        recurse_subgraphs=False,
        flatten_subgraphs=False,
        error_ok=True,
        should_exclude_node=is_kept,
    )
    graph.cleanup()
    _name_nodes([graph, *graph.subgraphs(recursive=True)])
    result: ModelProto = gs.export_onnx(graph, do_type_check=False)
    restore(result, source)
    return result


def _name_nodes(graphs: Sequence[gs.Graph]) -> None:
    """Gives a unique name to every node that has none, or one that occurred before."""
    taken = {node.name for graph in graphs for node in graph.nodes if node.name}
    seen: set[str] = set()
    for graph in graphs:
        for i, node in enumerate(graph.nodes):
            if not node.name or node.name in seen:
                node.name = subgraphs.unused_name(f"{node.op}_{i}", taken)
            seen.add(node.name)
            taken.add(node.name)


def _load_folded_weights(proto: ModelProto, is_kept: Callable[[NodeProto], bool]) -> None:
    """Loads the weights in files that folding will read: those of nodes whose inputs are all constant."""
    initialisers = {tensor.name: tensor for tensor in proto.graph.initializer}
    constant = set(initialisers)
    for node in proto.graph.node:
        inputs = subgraphs.reads(node)
        if not constant.issuperset(inputs) or is_kept(node):
            continue
        constant.update(node.output)
        for name in inputs:
            if name in initialisers:
                external_data.load_payload(initialisers[name])


def _densify(proto: ModelProto) -> None:
    """Replaces sparse initialisers and sparse constants by dense ones."""
    for graph in subgraphs.graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, proto))
        del graph.sparse_initializer[:]
        for node in graph.node:
            if node.op_type in kinds.CONSTANT and node.attribute[0].name == "sparse_value":
                dense = _dense(node.attribute[0].sparse_tensor, proto)
                node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", dense))


def _dense(sparse: SparseTensorProto, proto: ModelProto) -> TensorProto:
    """A sparse tensor with its zeros."""
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    input_guards.check_written_out(sparse, proto)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:  # one row of coordinates per value
        dense[tuple(indices.T)] = values
    else:  # positions in the flat array
        dense.reshape(-1)[indices] = values
    return numpy_helper.from_array(dense, sparse.values.name)


def _expand_short_constants(proto: ModelProto) -> None:
    """Rewrites Constant nodes that hold plain numbers (a float, a list of ints) so that they hold a tensor."""
    for node in subgraphs.nodes(proto.graph):
        if node.op_type not in kinds.CONSTANT:
            continue
        attribute = node.attribute[0]
        if attribute.name not in SHORT_CONSTANTS:
            continue
        value = onnx.helper.get_attribute_value(attribute)
        is_list = attribute.name.endswith("s")
        values = list(value) if is_list else [value]
        dims = [len(values)] if is_list else []
        tensor = onnx.helper.make_tensor("value", SHORT_CONSTANTS[attribute.name], dims, values)
        attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _output_names(node: gs.Node | NodeProto) -> list[str]:
    if isinstance(node, NodeProto):
        return list(node.output)
    return [tensor.name for tensor in node.outputs]


def _input_names(node: gs.Node | NodeProto) -> list[str]:
    if isinstance(node, NodeProto):
        return list(node.input)
    return [tensor.name for tensor in node.inputs]


def _must_stay(node: gs.Node | NodeProto) -> bool:
    """Tests for nodes that are never folded, as :func:`computed_constants.must_stay` does."""
    if isinstance(node, NodeProto):
        return computed_constants.must_stay(node)
    operators = {node.op}
    for body in node.subgraphs(recursive=True):
        operators.update(inner.op for inner in body.nodes)
    return any(operator.startswith(kinds.NOT_FOLDED) for operator in operators)


def restore(proto: ModelProto, source: ModelProto) -> None:
    """Restores the parts of a model that graphsurgeon drops.

    These are metadata, producer, doc strings, and the declarations of inputs and outputs.

    Args:
        proto: A graph that graphsurgeon exported, changed in place.
        source: The graph that it was imported from.
    """
    _restore_model_fields(proto, source)
    _restore_node_docs(proto, source)
    # Shapes of intermediate tensors are inferred anew; old ones would be wrong after a cut.
    del proto.graph.value_info[:]
    # graphsurgeon puts constants into the subgraphs that read them.
    subgraphs.lift(proto)
    _restore_interface(proto, source)


def _restore_model_fields(proto: ModelProto, source: ModelProto) -> None:
    proto.ir_version = max(source.ir_version, 4)  # initialisers that are no inputs need version 4
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(proto, field, getattr(source, field))
    proto.graph.name = source.graph.name
    proto.graph.doc_string = source.graph.doc_string
    for part, original in ((proto, source), (proto.graph, source.graph)):
        del part.metadata_props[:]
        part.metadata_props.extend(original.metadata_props)
    imported = {opset.domain for opset in proto.opset_import}
    proto.opset_import.extend(o for o in source.opset_import if o.domain not in imported)


def _restore_interface(proto: ModelProto, source: ModelProto) -> None:
    declared = {value.name: value for value in (*source.graph.input, *source.graph.output)}
    for value in proto.graph.output:
        if value.name in declared:
            value.CopyFrom(declared[value.name])
    # An input with a default value that no node reads has lost that value, and would have to be fed.
    lost = default_inputs.names(source) - {tensor.name for tensor in proto.graph.initializer}
    del proto.graph.input[:]
    proto.graph.input.extend(value for value in source.graph.input if value.name not in lost)


def _restore_node_docs(proto: ModelProto, source: ModelProto) -> None:
    originals = {node.name: node for node in source.graph.node if node.name}
    for node in proto.graph.node:
        original = originals.get(node.name)
        if original is None or original.op_type != node.op_type:
            continue
        node.doc_string = original.doc_string
        if not node.metadata_props:
            node.metadata_props.extend(original.metadata_props)


# ---------------------------------------------------------------------------------------------------------- nodes


def _node(node: NodeProto, versions: Mapping[str, int]) -> Node:
    """A node as a record, with its subgraphs.

    Args:
        node: The node.
        versions: Opset version by domain.
    """
    if node.domain in DEFAULT_DOMAINS:
        domain = ""
    else:
        domain = node.domain
    attrs = {}
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            continue
        value: Any = onnx.helper.get_attribute_value(attribute)
        attrs[attribute.name] = value.decode() if isinstance(value, bytes) else value
    bodies = {}
    for name, graph in subgraphs.bodies(node).items():
        bodies[name] = Body(
            tuple(value.name for value in graph.input),
            tuple(value.name for value in graph.output),
            tuple(_node(inner, versions) for inner in graph.node),
        )
    # The default domain has two spellings; the opset import may use either.
    default_version = versions.get(node.domain if domain else "", 1)
    captures = sorted(set(subgraphs.reads(node)) - set(node.input))
    return Node(
        name=node.name,
        op=node.op_type,
        domain=domain,
        version=versions.get(node.domain, default_version),
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attrs=attrs,
        captures=tuple(captures),
        bodies=bodies,
    )


def digest(array: Array) -> str:
    """SHA-256 of an array's bytes.

    Args:
        array: Any array.

    Returns:
        The digest in hexadecimal.
    """
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
