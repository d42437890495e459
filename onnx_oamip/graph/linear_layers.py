"""Linear consumers seen one way: ``y = W x + b`` with W as (groups, outputs, inputs, taps), whatever the operator.

Reading and writing weights and biases of Conv, ConvTranspose, Gemm, MatMul and plain Einsum goes through here, so that
a refit never sees an operator's layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

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
from onnx_oamip.graph.external_data import array, references, tensor
from onnx_oamip.graph.ops import Site, Trait, build, has, lookup
from onnx_oamip.graph.ops.matrix_view import BiasInput
from onnx_oamip.graph.subgraphs import reads


def site(node: Node, constants: Mapping[str, Array]) -> Site | None:
    """The site of a linear node with one constant weight of a plain matrix form.

    Args:
        node: Any node.
        constants: Values of constants by name.

    Returns:
        The site, or None where the node is not linear or its weight has another form.
    """
    spec = lookup(node.domain, node.op, node.version)
    return None if spec is None or spec.linear is None else spec.linear.site(node, constants)


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
    """Whether a weight of the node is kept as codes, which no refit may set freely."""
    makers = {name: maker for maker in model.nodes for name in maker.outputs}
    for name in node.inputs[:2]:
        maker = makers.get(name)
        spec = None if maker is None else lookup(maker.domain, maker.op, maker.version)
        if (
            maker is not None
            and spec is not None
            and spec.edit.zero is not None
            and maker.inputs[0] in model.constants
        ):
            return True
    return False


def matrix(site: Site, weight: Array) -> Floats:
    """The weight as (groups, outputs per group, inputs per group, taps), float64."""
    return site.rules.matrix(site, weight.astype(np.float64))


def matrix_shape(site: Site, weight: Array) -> tuple[int, int, int, int]:
    """Shape that :func:`matrix` would give, without the copy."""
    return site.rules.matrix_shape(site, weight.shape)


def unmatrix(site: Site, value: Floats, like: Array) -> Array:
    """The inverse of :func:`matrix`: the weight in the layout and type of ``like``, whose channels may be others."""
    shaped = site.rules.weight(site, value, like.shape[2:])
    return np.ascontiguousarray(shaped.astype(like.dtype))


class Editor:
    """Weights and biases of a proto, changed in place. Shared constants are copied for the node that changes them."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self._aside = bool(references(proto))
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

    def constant(self, name: str) -> Array | None:
        """Value of an initialiser, or None."""
        held = self.tensors.get(name)
        return None if held is None else array(held)

    def replace(self, node: onnx.NodeProto, slot: int, value: Array) -> None:
        """Give input ``slot`` of the node a new constant value."""
        name = node.input[slot] if slot < len(node.input) else ""
        if name in self.tensors and self._own(name):
            self.tensors[name].CopyFrom(tensor(value, name, self._aside))
            return
        fresh = self._unused(f"{name or node.name + '_input' + str(slot)}_refitted")
        self.proto.graph.initializer.append(tensor(value, fresh, self._aside))
        self.tensors[fresh] = self.proto.graph.initializer[-1]
        while len(node.input) <= slot:
            node.input.append("")
        self.readers[name] = [r for r in self.readers[name] if r[0] is not node or r[1] != slot]
        node.input[slot] = fresh
        self.readers[fresh].append((node, slot))

    def _own(self, name: str) -> bool:
        """A constant with one reader, which may change it."""
        return len(self.readers[name]) == 1 and name not in self.outputs

    def _unused(self, name: str) -> str:
        result, i = name, 1
        while result in self.tensors or result in self.readers or result in self.nodes:
            result, i = f"{name}_{i}", i + 1
        return result

    def bias_growth(self, site: Site) -> int:
        """Elements that the model grows by when the node gets its first bias shift."""
        node = self.nodes[site.node.name]
        outputs = self._outputs(site)
        own = site.rules.bias
        if own is None:
            addition = self._following_add(site)
            name = "" if addition is None else addition[0].input[addition[1]]
        else:
            name = _operand(node, own.slot)
        old = self.constant(name) if name else None
        if old is None:
            return 0 if name else outputs
        if own is None and old.size != outputs:
            return outputs
        return max(old.size, outputs) - (old.size if self._own(name) else 0)

    def _outputs(self, site: Site) -> int:
        """Number of outputs of all groups of a site."""
        weight = self.constant(self.nodes[site.node.name].input[site.weight_slot])
        assert weight is not None
        groups, outputs, _, _ = matrix_shape(site, weight)
        return groups * outputs

    def bias(self, site: Site) -> Floats | None:
        """What the node itself adds per output, zeros where nothing; None where it is not one constant per output."""
        node, own = self.nodes[site.node.name], site.rules.bias
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
        """As :meth:`bias`, with the constant that is added right behind a product: all that ``add_bias`` adds to."""
        inner = self.bias(site)
        if site.rules.bias is not None or inner is None:
            return inner
        addition = self._following_add(site)
        outer = None if addition is None else self.constant(addition[0].input[addition[1]])
        return inner if outer is None or outer.shape != inner.shape else outer.astype(np.float64)

    def add_bias(self, site: Site, delta: Floats) -> bool:
        """Add ``delta`` (outputs,) to what the node puts out; makes a bias where there is none.

        Returns False where the bias is not a constant and therefore stays as it is.
        """
        node, own = self.nodes[site.node.name], site.rules.bias
        if own is None:
            return self._add_behind(node, site, delta)
        has_bias = bool(_operand(node, own.slot))
        factor = _bias_factor(node, own)
        if own.factor is not None and (not has_bias or factor == 0):
            # A factor of zero means that the constant there was never added.
            _set_attribute(node, own.factor, 1.0)
            has_bias, factor = False, 1.0
        shift = _per_output(site, delta) / factor
        if not has_bias:
            weight = self.constant(node.input[site.weight_slot])
            dtype = weight.dtype if weight is not None else np.dtype(np.float32)
            self.replace(node, own.slot, np.ascontiguousarray(shift.astype(dtype)))
            return True
        old = self.constant(node.input[own.slot])
        if old is None:
            return False
        self.replace(node, own.slot, (old.astype(np.float64) + shift).astype(old.dtype))
        return True

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
        constant = self.tensors.get(addition.input[other])
        if constant is None or len(constant.dims) > 1 or (constant.dims and constant.dims[0] == 1):
            return None
        return addition, other

    def _add_behind(self, node: onnx.NodeProto, site: Site, delta: Floats) -> bool:
        """Change the addition behind a product, or put one there."""
        weight = self.constant(node.input[site.weight_slot])
        assert weight is not None
        found = self._following_add(site)
        if found is not None:
            addition, slot = found
            old = self.constant(addition.input[slot])
            if old is not None and old.shape == delta.shape:
                self.replace(addition, slot, (old.astype(np.float64) + delta).astype(old.dtype))
                return True
        shift = np.ascontiguousarray(_per_output(site, delta).astype(weight.dtype))
        inner = self._unused(f"{node.output[0]}_unbiased")
        bias = self._unused(f"{node.name}_bias")
        self.proto.graph.initializer.append(numpy_helper.from_array(shift, bias))
        self.tensors[bias] = self.proto.graph.initializer[-1]
        name = self._unused(f"{node.name}_add_bias")
        addition = build.add(inner, bias, node.output[0], name)
        node.output[0] = inner
        place = next(i for i, n in enumerate(self.proto.graph.node) if n.name == node.name)
        self.proto.graph.node.insert(place + 1, addition)
        self._index()
        return True


def _per_output(site: Site, values: Floats) -> Floats:
    """Values (outputs,) in the shape that broadcasts to the output of a product."""
    return values if site.slot == 0 else values[:, None]


def _operand(node: onnx.NodeProto, slot: int) -> str:
    """Name of an input, empty where it is absent."""
    return str(node.input[slot]) if slot < len(node.input) else ""


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
