"""Weights and biases of linear nodes, read and written one way: ``y = W x + b``.

W is (groups, outputs, inputs, taps) whatever the operator; the layouts are facets of operators (``ops.matrix_view``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_oamip.core.records import (
    Array,
    Consumer,
    Coupling,
    Floats,
    Model,
    Node,
)
from onnx_oamip.graph.computed_constants import Constants, computed_nodes, followed_views
from onnx_oamip.graph.external_data import array, references, tensor
from onnx_oamip.graph.ops import Site, Trait, build, has, lookup, views
from onnx_oamip.graph.ops.matrix_view import BiasInput
from onnx_oamip.graph.subgraphs import reads


def site(node: Node, constants: Mapping[str, Array]) -> Site | None:
    """Find the data and the weight of a linear node.

    Args:
        node: Any node.
        constants: Values of constants by name.

    Returns:
        The site, or None where the node is not linear or its weight is not one constant of a plain matrix form.
    """
    spec = lookup(node.domain, node.op, node.version)
    if spec is None or spec.linear is None:
        return None
    return spec.linear.site(node, constants)


def linear_consumers(model: Model, coupling: Coupling) -> list[tuple[Consumer, Site]]:
    """List the consumers that multiply their data by a constant weight, with their linear form.

    Args:
        model: The model.
        coupling: Its units and consumers.

    Returns:
        Pairs of a consumer and its site, in graph order.
    """
    nodes = {node.name: node for node in model.nodes}
    result = []
    for consumer in coupling.consumers:
        form = site(nodes[consumer.node], model.constants)
        if form is None:
            continue
        if form.data == consumer.data and form.weight == consumer.weight:
            result.append((consumer, form))
    return result


def quantised(node: Node, model: Model) -> bool:
    """Check whether the weight of a node is stored as integer codes, which a refit cannot set freely.

    Args:
        node: A linear node.
        model: The model that it lies in.

    Returns:
        True if one of its operands is made of constant codes.
    """
    producers = {name: producer for producer in model.nodes for name in producer.outputs}
    operands = (producers.get(name) for name in node.inputs[:2])
    return any(producer is not None and _holds_codes(producer, model) for producer in operands)


def _holds_codes(node: Node, model: Model) -> bool:
    """True for a node that makes real numbers of constant codes."""
    spec = lookup(node.domain, node.op, node.version)
    works_on_codes = spec is not None and spec.edit.zero is not None
    return works_on_codes and node.inputs[0] in model.constants


def matrix(site: Site, weight: Array) -> Floats:
    """Read a weight as a matrix.

    Args:
        site: The linear node.
        weight: Value of its weight.

    Returns:
        (groups, outputs per group, inputs per group, taps) in float64.
    """
    return site.rules.matrix(site, weight.astype(np.float64))


def matrix_shape(site: Site, weight: Array) -> tuple[int, int, int, int]:
    """Return the shape that :func:`matrix` would give, without the copy.

    Args:
        site: The linear node.
        weight: Value of its weight.

    Returns:
        (groups, outputs per group, inputs per group, taps).
    """
    return site.rules.matrix_shape(site, weight.shape)


def unmatrix(site: Site, value: Floats, like: Array) -> Array:
    """Write a matrix as a weight: the inverse of :func:`matrix`.

    Args:
        site: The linear node.
        value: The matrix, which may have other numbers of channels.
        like: The node's present weight, which gives the type and the size of the kernel.

    Returns:
        The weight in the layout of the operator.
    """
    shaped = site.rules.weight(site, value, like.shape[2:])
    return shaped.astype(like.dtype, order="C")


class Editor:
    """Editor of the weights and biases of a proto, in place.

    A linear node of the original whose group is empty is a constant of the cut model: its bias is that constant.
    A constant that several nodes share is copied for the node that changes it, unless it is to change for all of them.
    A constant that nodes transpose, reshape, cast or dequantise is changed where it is stored.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self._external = bool(references(proto))
        self._index()

    def _index(self) -> None:
        """Look everything up afresh: an insertion may move messages."""
        proto = self.proto
        self.nodes = {node.name: node for node in proto.graph.node}
        self.tensors = {t.name: t for t in proto.graph.initializer}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        for node in proto.graph.node:
            for slot, name in enumerate(node.input):
                self.readers[name].append((node, slot))
            for name in set(reads(node)) - set(node.input):  # inside an If or a Loop
                self.readers[name].append((node, -1))
        self.outputs = {v.name for v in proto.graph.output}
        self.makers = computed_nodes(proto.graph)
        self.views = followed_views(proto.graph, self.makers)

    def constant(self, name: str) -> Array | None:
        """Read a constant.

        Args:
            name: Name of a tensor.

        Returns:
            Its value, or None if it depends on more than initialisers.
        """
        held = self.tensors.get(name)
        if held is not None:
            return array(held)
        if name not in self.makers:
            return None
        return Constants(self.proto).get(name)

    def path(self, name: str) -> list[onnx.NodeProto] | None:
        """Find the nodes between an initialiser and a view of it.

        Args:
            name: Name of a tensor.

        Returns:
            The nodes, the one behind the initialiser first; None where the tensor is neither.
        """
        result: list[onnx.NodeProto] = []
        while name not in self.tensors:
            if name not in self.views:
                return None
            node = self.makers[name]
            result.insert(0, node)
            name = node.input[0]
        return result

    def source(self, name: str) -> str:
        """Name the initialiser of a view.

        Args:
            name: Name of a tensor.

        Returns:
            The initialiser, or the name itself where it is no view.
        """
        path = self.path(name)
        return path[0].input[0] if path else name

    def stored_type(self, name: str) -> np.dtype[Any] | None:
        """Return the element type in which a constant is stored.

        Args:
            name: Name of a tensor.

        Returns:
            The type, or None where the constant is computed and cannot be changed.
        """
        if self.path(name) is None:
            return None
        kind = self.tensors[self.source(name)].data_type
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind))

    def rounded(self, name: str, value: Array) -> Array:
        """Round a new value of a constant to what its readers would see once it is stored.

        Args:
            name: The constant, an initialiser or a view of one.
            value: Its new value.

        Returns:
            The value in its present type.
        """
        path = self.path(name)
        if path is None:
            return value
        stored, shapes = self._backwards(self.source(name), path, value)
        seen = stored[self.source(name)]
        for node, shape in zip(path, shapes, strict=True):
            others = [
                stored[other] if other in stored else self._required(other)
                for other in node.input[1:]
                if other
            ]
            moved = views.read(node, seen, others)
            seen = seen.reshape(shape) if moved is None else moved
        with np.errstate(over="ignore"):
            return seen.astype(value.dtype)

    def _required(self, name: str) -> Array:
        value = self.constant(name)
        assert value is not None
        return value

    def replace(
        self,
        node: onnx.NodeProto,
        slot: int,
        value: Array,
        for_all: bool = False,
    ) -> None:
        """Give an input of a node a new constant value.

        Args:
            node: Node of the proto.
            slot: Input index.
            value: The new value. An initialiser with other consumers is left as it is, and the node gets its own.
            for_all: Change the initialiser for all its consumers.
        """
        name = _operand(node, slot)
        path = self.path(name) if name else None
        if path is not None and (for_all or self._own(name, path)):
            self._store(self.source(name), path, value)
            return
        stem = name or f"{node.name}_input{slot}"
        fresh = self._unused(f"{stem}_refitted")
        self.proto.graph.initializer.append(tensor(value, fresh, self._external))
        self.tensors[fresh] = self.proto.graph.initializer[-1]
        while len(node.input) <= slot:
            node.input.append("")
        others = (r for r in self.readers[name] if r[0] is not node or r[1] != slot)
        self.readers[name] = list(others)
        node.input[slot] = fresh
        self.readers[fresh].append((node, slot))

    def _store(
        self,
        name: str,
        path: Sequence[onnx.NodeProto],
        value: Array,
    ) -> None:
        """Writes the value of a view, which some nodes make, to its initialiser."""
        stored, _ = self._backwards(name, path, value)
        for changed, found in stored.items():
            plain = np.ascontiguousarray(found).reshape(found.shape)
            self.tensors[changed].CopyFrom(tensor(plain, changed, self._external))

    def _backwards(
        self, name: str, path: Sequence[onnx.NodeProto], value: Array
    ) -> tuple[dict[str, Array], list[tuple[int, ...]]]:
        """Values of the initialisers under which a view has a given value, and the shapes along its path.

        A scale in a product with codes becomes larger where the codes would not reach the value. That of a node which
        dequantises stays, as the scale of a bias may be made of it.
        """
        sources = [self._required(node.input[0]) for node in path]
        codes = sources[0].dtype if path else value.dtype
        result: dict[str, Array] = {}
        shapes: list[tuple[int, ...]] = []
        for node, source in zip(reversed(path), reversed(sources), strict=True):
            others = [self._required(other) for other in node.input[1:] if other]
            shapes.insert(0, value.shape)
            is_scaled = views.are_codes(codes) and has(node, Trait.SCALES)
            if is_scaled and self._is_own_scale(node.input[1]):
                zero = self._zero_points(path[: path.index(node)])
                others = [views.wider_scale(others[0], value, codes, zero)]
                result[node.input[1]] = others[0]
            value = views.write(node, value, source, others)
        if not path:
            value = value.astype(array(self.tensors[name]).dtype)
        return {**result, name: value}, shapes

    def _zero_points(self, path: Sequence[onnx.NodeProto]) -> Array:
        """Zero points that the nodes of a path subtract, in the form of its end."""
        zero: Array = np.zeros(())
        for node in path:
            others = [self._required(other) for other in node.input[1:] if other]
            if has(node, Trait.SUBTRACTS):
                zero = np.broadcast_to(others[0], self._required(node.input[0]).shape)
            elif zero.ndim:
                moved = views.read(node, zero, others)
                zero = (
                    zero.reshape(self._required(node.output[0]).shape) if moved is None else moved
                )
        return zero

    def _is_own_scale(self, name: str) -> bool:
        """Tests for a stored scale with one reader."""
        return name in self.tensors and len(self.readers[name]) == 1 and name not in self.outputs

    def _own(self, name: str, path: Sequence[onnx.NodeProto]) -> bool:
        """Tests for a constant with one reader, which may change it."""
        names = [name, *(node.input[0] for node in path)]
        return all(len(self.readers[n]) == 1 and n not in self.outputs for n in names)

    def readers_of(self, name: str) -> list[tuple[onnx.NodeProto, int]]:
        """Find the readers of an initialiser, through its views.

        Args:
            name: Name of an initialiser, or of a view.

        Returns:
            Pairs of a node and an input index, -1 for a node whose subgraphs read it; nodes of views left out.
        """
        result = []
        for node, slot in self.readers[name]:
            if slot == 0 and node.output and node.output[0] in self.views:
                result += self.readers_of(node.output[0])
            else:
                result.append((node, slot))
        return result

    def _unused(self, name: str) -> str:
        result = name
        number = 1
        while result in self.tensors or result in self.readers or result in self.nodes:
            result = f"{name}_{number}"
            number += 1
        return result

    def bias_growth(self, site: Site) -> int:
        """Count the elements that a first bias shift adds to the model.

        Args:
            site: The linear node.

        Returns:
            Number of elements of the new bias beyond those that it replaces.
        """
        node = self.nodes[site.node.name]
        outputs = self._outputs(site)
        own = site.rules.bias
        if own is None:
            name = self._added_behind(site)
        else:
            name = _operand(node, own.slot)
        if not name:
            return outputs
        old = self.constant(name)
        if old is None:
            return 0  # computed: it stays as it is
        if own is None and old.size != outputs:
            return outputs
        path = self.path(name)
        if path is not None and self._own(name, path):
            replaced = old.size
        else:
            replaced = 0
        return max(old.size, outputs) - replaced

    def _added_behind(self, site: Site) -> str:
        """Name of the constant that is added right behind a product, empty where there is none."""
        addition = self._following_add(site)
        if addition is None:
            return ""
        node, slot = addition
        return str(node.input[slot])

    def _outputs(self, site: Site) -> int:
        """Number of outputs of all groups of a site."""
        weight = self.constant(self.nodes[site.node.name].input[site.weight_slot])
        assert weight is not None
        groups, outputs, _, _ = matrix_shape(site, weight)
        return groups * outputs

    def is_emptied(self, site: Site) -> bool:
        """Check whether a constant stands in place of a node, all of whose inputs are removed.

        Args:
            site: The linear node in the original model.

        Returns:
            True if the proto has its output as an initialiser, and not the node.
        """
        return site.node.name not in self.nodes and site.node.outputs[0] in self.tensors

    def bias(self, site: Site) -> Floats | None:
        """Read the bias that the node itself adds.

        Args:
            site: The linear node.

        Returns:
            (outputs,), zeros without a bias; None where it is not one constant per output.
        """
        if self.is_emptied(site):
            return array(self.tensors[site.node.outputs[0]]).astype(np.float64).reshape(-1)
        node = self.nodes[site.node.name]
        own = site.rules.bias
        zeros = np.zeros(self._outputs(site))
        name = "" if own is None else _operand(node, own.slot)
        if own is None or not name:
            return zeros
        stored = self.constant(name)
        if stored is None:
            return None
        value = _bias_factor(node, own) * stored.astype(np.float64)
        rows = value.reshape(1, -1) if value.ndim < 2 else value
        by_output = rows if site.slot == 0 else rows.T
        if by_output.shape[0] != 1:  # other values for other rows
            return None
        return zeros + by_output.reshape(-1)

    def whole_bias(self, site: Site) -> Floats | None:
        """Read the bias with the constant that is added right behind a product: all that ``add_bias`` adds to.

        Args:
            site: The linear node.

        Returns:
            (outputs,), or None where it is not one constant per output.
        """
        inner = self.bias(site)
        if site.rules.bias is not None or inner is None:
            return inner
        outer = self.constant(self._added_behind(site))
        if outer is None or outer.shape != inner.shape:
            return inner
        return outer.astype(np.float64)

    def bias_name(self, site: Site) -> str:
        """Name the constant that ``add_bias`` changes.

        Args:
            site: The linear node.

        Returns:
            The name, empty where there is none yet.
        """
        own = site.rules.bias
        if own is None:
            return self._added_behind(site)
        return _operand(self.nodes[site.node.name], own.slot)

    def add_bias(
        self,
        site: Site,
        delta: Floats,
        for_all: bool = False,
    ) -> bool:
        """Shift the output of a node by a constant; makes a bias where there is none.

        Args:
            site: The linear node.
            delta: Shift of every output (outputs,).
            for_all: Change a bias that others read as well for all of them.

        Returns:
            False where the bias is not a constant and therefore stays as it is.
        """
        if self.is_emptied(site):
            self._shift_output(site, delta)
            return True
        node = self.nodes[site.node.name]
        own = site.rules.bias
        if own is None:
            return self._add_behind(node, site, delta, for_all)
        has_bias = bool(_operand(node, own.slot))
        factor = _bias_factor(node, own)
        if own.factor is not None and (not has_bias or factor == 0):
            # A factor of zero means that the constant there was never added.
            _set_attribute(node, own.factor, 1.0)
            has_bias, factor = False, 1.0
        shift = _per_output(site, delta) / factor
        if not has_bias:
            weight = self.constant(node.input[site.weight_slot])
            if weight is not None:
                dtype = weight.dtype
            else:
                dtype = np.dtype(np.float32)
            self.replace(node, own.slot, np.ascontiguousarray(shift.astype(dtype)))
            return True
        old = self.constant(node.input[own.slot])
        if old is None:
            return False
        moved = (old.astype(np.float64) + shift).astype(old.dtype)
        self.replace(node, own.slot, moved, for_all)
        return True

    def _shift_output(self, site: Site, delta: Floats) -> None:
        """Shifts the constant in place of a node."""
        name = site.node.outputs[0]
        old = array(self.tensors[name])
        moved = old.astype(np.float64) + delta.reshape(old.shape)
        self._store(name, (), moved.astype(old.dtype))

    def _following_add(self, site: Site) -> tuple[onnx.NodeProto, int] | None:
        """The addition of a constant that alone reads the node's output, and the slot of the constant.

        That is where exporters put the bias of a product, which has none of its own.
        """
        output = self.nodes[site.node.name].output[0]
        readers = self.readers[output]
        if site.slot != 0 or len(readers) != 1 or output in self.outputs:
            return None
        addition, slot = readers[0]
        if not has(addition, Trait.BIAS):
            return None
        other = 1 - slot
        constant = self.constant(addition.input[other])
        if constant is None or constant.ndim > 1:
            return None
        if constant.shape == (1,):
            return None
        return (addition, other)

    def _add_behind(
        self,
        node: onnx.NodeProto,
        site: Site,
        delta: Floats,
        for_all: bool,
    ) -> bool:
        """Change the addition behind a product, or put one there."""
        weight = self.constant(node.input[site.weight_slot])
        assert weight is not None
        following = self._following_add(site)
        if following is not None:
            addition, slot = following
            old = self.constant(addition.input[slot])
            if old is not None and old.shape == delta.shape:
                moved = (old.astype(np.float64) + delta).astype(old.dtype)
                self.replace(addition, slot, moved, for_all)
                return True
        shift = np.ascontiguousarray(_per_output(site, delta).astype(weight.dtype))
        inner = self._unused(f"{node.output[0]}_unbiased")
        bias = self._unused(f"{node.name}_bias")
        self.proto.graph.initializer.append(numpy_helper.from_array(shift, bias))
        self.tensors[bias] = self.proto.graph.initializer[-1]
        name = self._unused(f"{node.name}_add_bias")
        addition = build.add(inner, bias, node.output[0], name)
        node.output[0] = inner
        nodes = self.proto.graph.node
        place = next(i for i, n in enumerate(nodes) if n.name == node.name)
        nodes.insert(place + 1, addition)
        self._index()
        return True


def _per_output(site: Site, values: Floats) -> Floats:
    """Values (outputs,) in the shape that broadcasts to the output of a product."""
    if site.slot == 0:
        return values
    return values[:, None]


def _operand(node: onnx.NodeProto, slot: int) -> str:
    """Name of an input, empty where it is absent."""
    if slot < len(node.input):
        return str(node.input[slot])
    return ""


def _bias_factor(node: onnx.NodeProto, own: BiasInput) -> float:
    if own.factor is None:
        return 1.0
    return next((a.f for a in node.attribute if a.name == own.factor), 1.0)


def _set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.f = value
            return
    node.attribute.append(helper.make_attribute(name, value))
