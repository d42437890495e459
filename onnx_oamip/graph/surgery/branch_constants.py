"""Branch constants: folds the constants that emptied branches leave behind into the graph.

A cut model has a constant in place of the last linear node of an emptied branch. What follows it is computed here once
(a bias, a normalisation, an activation), and a sum with another branch becomes the bias of the layer in front of it
where there is one, as at the beginning of a stage. Sums of several constants become one, and a sum with zeros none.
"""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from onnx_oamip.core.records import Array, Bools, Coupling, Model
from onnx_oamip.graph import chains
from onnx_oamip.graph.computed_constants import Constants
from onnx_oamip.graph.emptying import effect_of
from onnx_oamip.graph.linear_layers import Editor, site
from onnx_oamip.graph.ops import Trait, has
from onnx_oamip.graph.subgraphs import reads


def fold(model: Model, coupling: Coupling, units: Bools, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Folds the constants of emptied branches as far as they reach.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        proto: The cut model.

    Returns:
        A model that computes the same, or ``proto`` itself without such constants.
    """
    effect = effect_of(model, coupling, units)
    if not effect.biases:
        return proto
    outputs = {node.outputs[0] for node in model.nodes if node.name in effect.biases}
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for tensor in _computed(result, outputs):
        _add_elsewhere(model, result, tensor)
    _remove_unread(result)
    return result


def _computed(proto: onnx.ModelProto, names: set[str]) -> list[str]:
    """Replaces the nodes that read these and other constants alone; the constants that are left to read, in order."""
    graph = proto.graph
    held = {tensor.name for tensor in graph.initializer}
    values = Constants(proto)
    outputs = {value.name for value in graph.output}
    found = [name for name in held if name in names]
    for node in list(graph.node):
        read = [name for name in reads(node) if name]
        (output, *others) = [name for name in node.output if name] or [""]
        if others or output in outputs or not names.intersection(read):
            continue
        if held.issuperset(read):
            graph.initializer.append(numpy_helper.from_array(values[output], output))
            held.add(output)
            names.add(output)
            found.append(output)
            graph.node.remove(node)
    declared = [value for value in graph.value_info if value.name not in names]
    del graph.value_info[:]
    graph.value_info.extend(declared)
    return found


def _add_elsewhere(model: Model, proto: onnx.ModelProto, tensor: str) -> None:
    """Moves a constant that is added to a branch into the layer or the sum in front of it."""
    graph = chains.of_graph(proto.graph)
    for node in graph.consumers.get(tensor, ()):
        if not has(node, Trait.SUM) or len(node.input) != 2:
            continue
        editor = Editor(proto)
        value = editor.constant(tensor)
        other = node.input[0] if node.input[1] == tensor else node.input[1]
        assert value is not None
        if _moved(model, editor, graph, other=other, value=value):
            _end_with(proto, node, graph.producers[other], other)
        elif not value.any() and node.output[0] not in graph.visible:
            _bypass(proto, node, other)
        else:
            continue
        _add_elsewhere(model, proto, tensor)
        return


def _moved(
    model: Model, editor: Editor, graph: chains.Chains[onnx.NodeProto], *, other: str, value: Array
) -> bool:
    """Adds a constant to what computes a tensor, if nothing but the sum reads it."""
    producer = graph.producers.get(other)
    if producer is None or not graph.read_once(other):
        return False
    if has(producer, Trait.SUM) and len(producer.input) == 2:
        for slot, name in enumerate(producer.input):
            old = editor.constant(name)
            if old is not None and old.ndim == value.ndim:
                editor.replace(editor.nodes[producer.name], slot, old + value)
                return True
    node = next((n for n in model.nodes if n.name == producer.name), None)
    place = None if node is None else site(node, model.constants)
    if place is None or place.rules.bias is None:
        return False
    axis = place.output_axis % value.ndim
    if value.size != value.shape[axis]:
        return False
    return editor.add_bias(place, value.astype(float).reshape(-1))


def _end_with(
    proto: onnx.ModelProto, node: onnx.NodeProto, producer: onnx.NodeProto, tensor: str
) -> None:
    """Removes a node whose producer computes its output now, under its name: that of a value of the original."""
    producer.output[list(producer.output).index(tensor)] = node.output[0]
    declared = [value for value in proto.graph.value_info if value.name != tensor]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(declared)
    proto.graph.node.remove(node)


def _bypass(proto: onnx.ModelProto, node: onnx.NodeProto, source: str) -> None:
    """Removes a node whose output equals a tensor."""
    for reader in proto.graph.node:
        for slot, name in enumerate(reader.input):
            if name == node.output[0]:
                reader.input[slot] = source
    proto.graph.node.remove(node)


def _remove_unread(proto: onnx.ModelProto) -> None:
    """Removes initialisers without readers."""
    read = {name for node in proto.graph.node for name in reads(node)}
    read |= {value.name for value in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
