"""Linear consumers seen one way: ``y = W x + b`` with W as (groups, outputs, inputs, taps), whatever the operator.

Reading and writing weights and biases of Conv, ConvTranspose, Gemm, MatMul and plain Einsum goes through here, so that
a refit never sees an operator's layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

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
from onnx_oamip.graph.ops import lookup, weight_axis
from onnx_oamip.graph.subgraphs import reads

PRODUCTS = ("MatMul", "Einsum")
"""Operators without a bias of their own."""


@dataclass(frozen=True)
class Site:
    """A linear node with a constant weight: which input is data, which axis of the weight it meets, how many blocks.

    ``kernel`` is the spatial kernel of a convolution, empty for products.
    """

    node: Node
    slot: int
    weight_axis: int
    groups: int
    kernel: tuple[int, ...] = ()

    @property
    def data(self) -> str:
        """Name of the data input."""
        return self.node.inputs[self.slot]

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return self.node.inputs[self.weight_slot]

    @property
    def weight_slot(self) -> int:
        """Input index of the weight."""
        return 1 - self.slot

    @property
    def factor(self) -> float:
        """What the operator multiplies the product with."""
        return float(self.node.attrs.get("alpha", 1.0)) if self.node.op == "Gemm" else 1.0

    @property
    def spatial(self) -> bool:
        """A convolution: positions are pixels, a patch has taps."""
        return self.node.op in ("Conv", "ConvTranspose")

    @property
    def data_axis(self) -> int:
        """Axis of the data that is summed over (negative for products)."""
        if self.spatial:
            return 1
        if self.node.op == "Gemm":
            turned = self.node.attrs.get("transA" if self.slot == 0 else "transB", 0)
            return (-2 if turned else -1) if self.slot == 0 else (-1 if turned else -2)
        return -1 if self.slot == 0 else -2

    @property
    def output_axis(self) -> int:
        """Axis of the output that counts the weight's outputs."""
        if self.spatial:
            return 1
        return -1 if self.slot == 0 else -2


def site(node: Node, known: Mapping[str, Array]) -> Site | None:
    """The site of a linear node with one constant weight of a plain matrix form, else None."""
    if node.op in ("Conv", "ConvTranspose"):
        if node.inputs[1] not in known:
            return None
        kernel = tuple(known[node.inputs[1]].shape[2:])
        return Site(node, 0, 1 if node.op == "Conv" else 0, int(node.attrs.get("group", 1)), kernel)
    if (
        node.op == "Einsum"
        and len(node.inputs) == 2
        and node.inputs[1] in known
        and node.inputs[0] not in known
    ):
        # The other ranks follow from the equation unless an ellipsis hides them, which changes nothing here.
        rank = len(str(node.attrs["equation"]).replace(" ", "").split(",")[0].replace("...", ""))
        axis = weight_axis(node, [rank, known[node.inputs[1]].ndim])
        return None if axis is None else Site(node, 0, axis, 1)
    if node.op not in ("Gemm", "MatMul"):
        return None
    fixed = [name in known for name in node.inputs[:2]]
    if sum(fixed) != 1:
        return None
    slot = 0 if fixed[1] else 1
    if known[node.inputs[1 - slot]].ndim != 2:
        return None
    if node.op == "Gemm":
        turned = node.attrs.get("transB" if slot == 0 else "transA", 0)
        axis = (1 if turned else 0) if slot == 0 else (0 if turned else 1)
    else:
        axis = 0 if slot == 0 else 1
    return Site(node, slot, axis, 1)


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
            and spec.zero is not None
            and maker.inputs[0] in model.constants
        ):
            return True
    return False


def matrix(site: Site, weight: Array) -> Floats:
    """The weight as (groups, outputs per group, inputs per group, taps), float64."""
    value = weight.astype(np.float64)
    groups = site.groups
    if site.node.op == "Conv":
        return value.reshape(groups, value.shape[0] // groups, value.shape[1], -1)
    if site.node.op == "ConvTranspose":
        return value.reshape(groups, value.shape[0] // groups, value.shape[1], -1).transpose(
            0, 2, 1, 3
        )
    return (value.T if site.weight_axis == 0 else value)[None, :, :, None]


def matrix_shape(site: Site, weight: Array) -> tuple[int, int, int, int]:
    """Shape that :func:`matrix` would give, without the copy."""
    shape, g = weight.shape, site.groups
    taps = int(np.prod(shape[2:]))
    if site.node.op == "Conv":
        return g, shape[0] // g, shape[1], taps
    if site.node.op == "ConvTranspose":
        return g, shape[1], shape[0] // g, taps
    return 1, shape[1 - site.weight_axis], shape[site.weight_axis], 1


def unmatrix(site: Site, value: Floats, like: Array) -> Array:
    """The inverse of :func:`matrix`: the weight in the layout and type of ``like``, whose channels may be others."""
    if site.node.op == "Conv":
        shaped = value.reshape(value.shape[0] * value.shape[1], value.shape[2], *like.shape[2:])
    elif site.node.op == "ConvTranspose":
        turned = value.transpose(0, 2, 1, 3)
        shaped = turned.reshape(turned.shape[0] * turned.shape[1], turned.shape[2], *like.shape[2:])
    else:
        shaped = value[0, :, :, 0].T if site.weight_axis == 0 else value[0, :, :, 0]
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

    def room(self, site: Site) -> int:
        """Elements that the model grows by when the node gets its first bias shift."""
        node = self.nodes[site.node.name]
        weight = self.constant(node.input[site.weight_slot])
        assert weight is not None
        groups, outs, _, _ = matrix_shape(site, weight)
        name = node.input[2] if len(node.input) > 2 else ""
        if node.op_type in PRODUCTS:
            found = self._following_add(node) if site.slot == 0 else None
            name = found[0].input[found[1]] if found else ""
        old = self.constant(name) if name else None
        if old is None:
            return 0 if name else groups * outs
        if node.op_type in PRODUCTS and old.size != outs:
            return outs
        return max(old.size, groups * outs) - (old.size if self._own(name) else 0)

    def bias(self, site: Site) -> Floats | None:
        """What the node itself adds per output, zeros where nothing; None where it is not one constant per output."""
        node = self.nodes[site.node.name]
        weight = self.constant(node.input[site.weight_slot])
        assert weight is not None
        groups, outs, _, _ = matrix_shape(site, weight)
        none = np.zeros(groups * outs)
        if node.op_type in PRODUCTS or len(node.input) < 3 or not node.input[2]:
            return none
        found = self.constant(node.input[2])
        if found is None:
            return None
        beta = _attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
        value = beta * found.astype(np.float64)
        if node.op_type == "Gemm":
            per_column = value.reshape(1, -1) if value.ndim < 2 else value
            value = per_column if site.slot == 0 else per_column.T
            if value.shape[0] != 1:
                return None
        return none + value.reshape(-1)

    def whole_bias(self, site: Site) -> Floats | None:
        """As :meth:`bias`, with the constant that is added right behind a product: all that ``add_bias`` adds to."""
        node = self.nodes[site.node.name]
        none = self.bias(site)
        if node.op_type not in PRODUCTS or none is None or site.slot != 0:
            return none
        found = self._following_add(node)
        old = None if found is None else self.constant(found[0].input[found[1]])
        return none if old is None or old.shape != none.shape else old.astype(np.float64)

    def add_bias(self, site: Site, delta: Floats) -> bool:
        """Add ``delta`` (outputs,) to what the node puts out; makes a bias where there is none.

        Returns False where the bias is not a constant and therefore stays as it is.
        """
        node = self.nodes[site.node.name]
        if node.op_type in PRODUCTS:
            return self._add_after_matmul(node, site, delta)
        column = node.op_type == "Gemm" and site.slot == 1
        has = len(node.input) > 2 and bool(node.input[2])
        beta = _attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
        if node.op_type == "Gemm" and (not has or beta == 0):
            # A factor of zero means that the constant there was never added.
            _set_attribute(node, "beta", 1.0)
            has, beta = False, 1.0
        shift = (delta[:, None] if column else delta) / beta
        if not has:
            weight = self.constant(node.input[site.weight_slot])
            dtype = weight.dtype if weight is not None else np.dtype(np.float32)
            self.replace(node, 2, np.ascontiguousarray(shift.astype(dtype)))
            return True
        old = self.constant(node.input[2])
        if old is None:
            return False
        self.replace(node, 2, (old.astype(np.float64) + shift).astype(old.dtype))
        return True

    def _following_add(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
        """The Add with a constant that alone reads the node's output: where a MatMul keeps its bias."""
        readers = self.readers[node.output[0]]
        if len(readers) != 1 or node.output[0] in self.outputs or readers[0][0].op_type != "Add":
            return None
        add, slot = readers[0]
        other = 1 - slot
        constant = self.tensors.get(add.input[other])
        if constant is None or len(constant.dims) > 1 or (constant.dims and constant.dims[0] == 1):
            return None
        return add, other

    def _add_after_matmul(self, node: onnx.NodeProto, site: Site, delta: Floats) -> bool:
        weight = self.constant(node.input[site.weight_slot])
        assert weight is not None
        found = self._following_add(node) if site.slot == 0 else None
        if found is not None:
            add, slot = found
            old = self.constant(add.input[slot])
            if old is not None and old.shape == delta.shape:
                self.replace(add, slot, (old.astype(np.float64) + delta).astype(old.dtype))
                return True
        shift = (delta if site.slot == 0 else delta[:, None]).astype(weight.dtype)
        inner = self._unused(f"{node.output[0]}_unbiased")
        bias = self._unused(f"{node.name}_bias")
        self.proto.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(shift), bias)
        )
        self.tensors[bias] = self.proto.graph.initializer[-1]
        add = helper.make_node(
            "Add", [inner, bias], [node.output[0]], self._unused(f"{node.name}_add_bias")
        )
        node.output[0] = inner
        place = next(i for i, n in enumerate(self.proto.graph.node) if n.name == node.name)
        self.proto.graph.node.insert(place + 1, add)
        self._index()
        return True


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    return next((a.f for a in node.attribute if a.name == name), default)


def _set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.f = value
            return
    node.attribute.append(helper.make_attribute(name, value))
