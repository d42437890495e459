"""Linear operators: convolutions and matrix products, which produce and consume channels.

Grouped convolution, two policies (a kernel's block structure must stay rectangular):

* *whole groups*, where there are more groups than channels in one (depthwise is the extreme): a unit is a group with
  all its inputs and outputs; ``group`` shrinks.
* *slots*, otherwise: a unit is channel ``j`` of every group, for inputs and outputs alike; ``group`` is unchanged.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.records import Array, Axis, Node
from onnx_oamip.graph.ops import maps
from onnx_oamip.graph.ops.handles import Cuts, LabelAxis, Labels, Refused, Terms, operand
from onnx_oamip.graph.ops.matrix_view import (
    Convolution,
    GeneralProduct,
    Product,
    TransposedConvolution,
)
from onnx_oamip.graph.ops.notation import opaque, rule
from onnx_oamip.graph.ops.spec import Edit, EditRules, OpSpec, Shapes

TRANSPOSITIONS = ("transA", "transB")
"""Attributes of Gemm that transpose its operands."""

_conv_dense = rule("n c *, o c *, o -> n o *")
_transposed_dense = rule("n c *, c o *, o -> n o *")


def _pin_spatial(node: Node, labels: Labels, name: str) -> None:
    data = name == node.inputs[0]
    if data:
        why = f"it is a spatial axis of {node}"
    else:
        why = f"it is an axis of the kernel of {node}"
    for axis in range(2, len(labels.shape(name) or ())):
        labels.pin(labels.label(name, axis), why, listed=data)


def conv(node: Node, labels: Labels) -> None:
    """Channel rule of Conv, for any number of groups.

    Args:
        node: The node.
        labels: Labels of the graph.
    """
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        _conv_dense(node, labels)
        return
    x = node.inputs[0]
    w = node.inputs[1]
    shape = labels.shape(w)
    data = labels.label(x, 1)
    # The weight's labels are asked for last: an opaque node must not have claimed any.
    if shape is None or data is None or not _followed(labels, w):
        opaque(node, labels, f"the grouped {node} reads an untracked input")
        return
    rows = labels.label(w, 0)
    columns = labels.label(w, 1)
    assert rows is not None
    assert columns is not None
    if not labels.is_constant(w):
        _pin_spatial(node, labels, w)
    per_in = shape[1]
    per_out = shape[0] // groups
    _pin_spatial(node, labels, x)
    bias = operand(node, 2)
    if bias is not None:
        rows = labels.unify([(w, 0), (bias, 0)], node)
    if rows is None:
        labels.pin(data, f"the grouped {node} has an untracked bias")
        labels.pin(columns, f"the grouped {node} has an untracked bias")
    elif _whole(groups, per_in):
        reason = f"{node} loses whole groups, not channels within one"
        labels.pin(columns, reason, listed=per_in > 1)
        inputs = data.reshape(groups, per_in)
        first = inputs[:, :1]
        labels.tie(inputs, first)
        labels.tie(rows.reshape(groups, per_out), first)
    else:
        inputs = data.reshape(groups, per_in)
        outputs = rows.reshape(groups, per_out)
        labels.tie(inputs, columns[None])
        labels.tie(outputs, rows[None, :per_out])
        labels.consume(node, (x, 1), (w, 1), groups)
    _set_image(node, labels, rows, len(shape))


def _set_image(
    node: Node,
    labels: Labels,
    channels: LabelAxis,
    rank: int,
) -> None:
    """The output of a grouped convolution: channels on axis 1, nothing else tracked."""
    spatial: list[LabelAxis] = [None] * (rank - 2)
    labels.set(node.outputs[0], [None, channels, *spatial])


def _followed(labels: Labels, weight: str) -> bool:
    """A constant, or one behind operators that pass its channels on (dequantisation)."""
    return labels.is_constant(weight) or all(
        labels.label(weight, axis) is not None for axis in (0, 1)
    )


def _deformable(node: Node, labels: Labels) -> None:
    """DeformConv: a convolution that reads at offsets, with channels in blocks of equal offsets."""
    x = node.inputs[0]
    blocks = int(node.attrs.get("offset_group", 1))
    for slot, what in ((2, "offsets"), (4, "a mask")):
        name = operand(node, slot)
        if name is not None:
            labels.pin_all(name, f"{node} takes it as {what}")
    channels = labels.label(x, 1)
    if blocks > 1 and channels is not None:
        # A block keeps its offsets: every block loses the same channels.
        by_block = channels.reshape(blocks, -1)
        labels.tie(by_block, by_block[:1])
    bias = operand(node, 3)
    conv(replace(node, inputs=(x, node.inputs[1], *([bias] if bias else []))), labels)


def conv_transpose(node: Node, labels: Labels) -> None:
    """Channel rule of ConvTranspose: the weight is (input channels, outputs per group, ...).

    Args:
        node: The node.
        labels: Labels of the graph.
    """
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        _transposed_dense(node, labels)
        return
    x = node.inputs[0]
    w = node.inputs[1]
    shape = labels.shape(w)
    data = labels.label(x, 1)
    if shape is None or data is None:
        opaque(node, labels, f"the grouped {node} reads an untracked input")
        return
    per_in = shape[0] // groups
    per_out = shape[1]
    bias = operand(node, 2)
    untracked_bias = bias and not labels.is_constant(bias) and labels.label(bias, 0) is None
    if not _followed(labels, w) or untracked_bias:
        opaque(node, labels, f"the grouped {node} has an untracked weight or bias")
        return
    if not labels.is_constant(w):
        _pin_spatial(node, labels, w)
    rows = labels.unify([(x, 1), (w, 0)], node)
    columns = labels.label(w, 1)
    bias_labels = labels.label(bias, 0) if bias else None
    assert rows is not None
    assert columns is not None
    _pin_spatial(node, labels, x)
    inputs = rows.reshape(groups, per_in)
    if _whole(groups, per_in):
        first = inputs[:, :1]
        labels.tie(inputs, first)
        labels.pin(columns, f"{node} loses whole groups, not channels within one")
        out = np.repeat(first[:, 0], per_out)
    else:
        labels.tie(inputs, rows[None, :per_in])
        out = np.tile(columns, groups)
        labels.consume(node, (x, 1), (w, 0), groups)
    if bias_labels is not None:
        labels.tie(bias_labels, out)
    _set_image(node, labels, out, len(shape))


def _whole(groups: int, per_in: int) -> bool:
    """The policy of a grouped convolution: whole groups are removed, not slots."""
    return groups > per_in


def regroup(node: Node, cuts: Cuts) -> Edit:
    """Repair of a grouped convolution that lost whole groups.

    Args:
        node: The node.
        cuts: The channels that are kept.

    Returns:
        The new number of groups.
    """
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        return Edit()
    weight = cuts.shape(node.inputs[3 if node.op == "QLinearConv" else 1])
    if node.op == "ConvTranspose":
        per_in = weight[0] // groups
    else:
        per_in = weight[1]
    if not _whole(groups, per_in):
        return Edit()
    kept_channels = cuts.kept(node.inputs[0], 1)
    return Edit({"group": kept_channels // per_in})


def conv_cost(node: Node, shapes: Shapes, weight: int = 1) -> tuple[Axis, ...]:
    """Cost of a convolution: every output element meets every kernel element of its filter.

    Args:
        node: The node.
        shapes: Shapes of tensors by name.
        weight: Input index of the filters.

    Returns:
        The axes whose lengths are multiplied.
    """
    out = node.outputs[0]
    w = node.inputs[weight]
    return (*_axes(out, shapes), *_axes(w, shapes, first=1))


def _axes(name: str, shapes: Shapes, first: int = 0) -> list[Axis]:
    """The axes of a tensor from ``first`` on."""
    return [(name, axis) for axis in range(first, len(shapes[name]))]


def _transposed_cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    # Every input value meets every kernel element: input positions x (outputs per group) x kernel.
    x, w = node.inputs[:2]
    return (*_axes(x, shapes), *_axes(w, shapes, first=1))


def gemm(node: Node, labels: Labels) -> None:
    """Channel rule of Gemm: ``Y = alpha A' B' + beta C`` with optional transposes; C broadcasts to (m, n).

    Args:
        node: The node.
        labels: Labels of the graph.
    """
    data_transposed, weight_transposed = (bool(node.attrs.get(n, 0)) for n in TRANSPOSITIONS)
    a = "k m" if data_transposed else "m k"
    b = "n k" if weight_transposed else "k n"
    bias = operand(node, 2)
    shape = labels.shape(bias) if bias else None
    out = labels.shape(node.outputs[0])
    if bias and (shape is None or out is None):
        opaque(node, labels, f"{node} has a bias of unknown shape")
        return
    product = replace(node, inputs=node.inputs[:2])
    rule(f"{a}, {b} -> m n")(product, labels)
    if not bias or shape is None or out is None:
        return
    # Align the bias from the right: a length of 1 (or no axis) is shared by all columns and needs no cut.
    ties = (
        (node.inputs[0], 1 if data_transposed else 0),
        (node.inputs[1], 0 if weight_transposed else 1),
    )
    for axis, n in enumerate(shape):
        target = axis + 2 - len(shape)
        if n > 1:
            labels.unify([(bias, axis), ties[target]], node)


def _gemm_cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    k = 0 if node.attrs.get("transA", 0) else 1
    return ((node.outputs[0], 0), (node.outputs[0], 1), (node.inputs[0], k))


def matmul(node: Node, labels: Labels) -> None:
    """Channel rule of numpy.matmul: the last axis of A meets the second to last of B; leading axes broadcast.

    Args:
        node: The node.
        labels: Labels of the graph.
    """
    a, b = node.inputs[:2]
    sa = labels.shape(a)
    sb = labels.shape(b)
    out = labels.shape(node.outputs[0])
    if sa is None or sb is None or out is None or not sa or not sb:
        opaque(node, labels, f"{node} has an operand of unknown shape")
        return
    inner = [(a, len(sa) - 1), (b, max(len(sb) - 2, 0))]
    found = labels.unify(inner, node)
    if found is not None and labels.is_constant(a) and labels.is_constant(b):
        labels.pin(found, f"{node} multiplies two constants")
    elif found is not None:
        data = 1 if labels.is_constant(a) else 0
        labels.consume(node, inner[data], inner[1 - data])
    lead = len(out) - (len(sa) > 1) - (len(sb) > 1)
    result = [_leading_axis(node, labels, i, lead, out[i]) for i in range(lead)]
    if len(sa) > 1:
        result.append(labels.label(a, len(sa) - 2))
    if len(sb) > 1:
        result.append(labels.label(b, len(sb) - 1))
    labels.set(node.outputs[0], result)


def _leading_axis(
    node: Node,
    labels: Labels,
    place: int,
    lead: int,
    length: int,
) -> LabelAxis:
    """Labels of one of the leading axes of the output, along which matrices are multiplied one by one."""
    here: list[Axis] = []
    for name in node.inputs[:2]:
        shape = labels.shape(name) or ()
        axis = place - lead + len(shape) - 2
        if axis < 0 or len(shape) <= 2:
            continue
        if shape[axis] == length:
            here.append((name, axis))
        elif not labels.is_constant(name):
            labels.pin(labels.label(name, axis), f"{node} broadcasts its single channel")
    activations = (axis for axis in here if not labels.is_constant(axis[0]))
    tracked = any(labels.label(*axis) is not None for axis in activations)
    if tracked:
        return labels.unify(here, node)
    return None


def matmul_cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    """Cost of a product: every output element is a sum over the last axis of the first operand.

    Args:
        node: The node.
        shapes: Shapes of tensors by name.

    Returns:
        The axes whose lengths are multiplied.
    """
    a = node.inputs[0]
    out = node.outputs[0]
    summed = (a, len(shapes[a]) - 1)
    return (*_axes(out, shapes), summed)


def _constant(node: Node, terms: Terms, index: int) -> Array:
    value = terms.constant(node.inputs[index])
    if value is None:
        raise Refused(f"{node} takes its {('data', 'weight', 'bias')[index]} from a computation")
    return value.astype(np.float64)


def _conv_encode(node: Node, terms: Terms) -> None:
    x = node.inputs[0]
    out = node.outputs[0]
    weight = _constant(node, terms, 1)
    after = terms.shape(out)
    if operand(node, 2) is None:
        bias = np.zeros(after[1])
    else:
        bias = _constant(node, terms, 2)
    per_channel = (-1, *[1] * (len(after) - 2))
    offset = np.broadcast_to(bias.reshape(per_channel), after)
    matrix = maps.convolution(node, weight, terms.shape(x), after)
    terms.affine(out, [(x, matrix)], offset)


def _gemm_encode(node: Node, terms: Terms) -> None:
    left = terms.constant(node.inputs[0]) is not None
    slot = 1 if left else 0
    x = node.inputs[slot]
    out = node.outputs[0]
    weight = _constant(node, terms, 1 - slot)
    if node.attrs.get(TRANSPOSITIONS[1 - slot], 0):
        weight = weight.T
    read = maps.places(terms.shape(x))
    if node.attrs.get(TRANSPOSITIONS[slot], 0):
        read = read.T
    rows, columns = read.shape
    if left:
        matrix = maps.product(weight, 1, columns)
    else:
        matrix = maps.product(weight.T, rows)
    offset = np.zeros(())
    if operand(node, 2) is not None:
        offset = node.attrs.get("beta", 1.0) * _constant(node, terms, 2)
    order = maps.gather(read, read.size)
    scaled = csr_array(node.attrs.get("alpha", 1.0) * (matrix @ order))
    terms.affine(out, [(x, scaled)], offset)


def _matmul_encode(node: Node, terms: Terms) -> None:
    left = terms.constant(node.inputs[0]) is not None
    slot = 1 if left else 0
    x = node.inputs[slot]
    shape = terms.shape(node.inputs[slot])
    weight = _constant(node, terms, 1 - slot)
    if weight.ndim > 2:
        raise Refused(f"{node} has a weight of its own for every matrix of a batch")
    if left:
        size, trailing = shape[-2:] if len(shape) > 1 else (shape[0], 1)
        lead = int(np.prod(shape)) // (size * trailing)
        matrix = maps.product(np.atleast_2d(weight), lead, trailing)
    else:
        columns = weight.reshape(len(weight), -1)
        matrix = maps.product(columns.T, int(np.prod(shape[:-1])))
    terms.affine(node.outputs[0], [(x, matrix)])


SPECS = (
    OpSpec(
        "Conv",
        conv,
        edit=EditRules(regroup),
        cost=conv_cost,
        linear=Convolution(),
        encode=_conv_encode,
    ),
    OpSpec(
        "ConvTranspose",
        conv_transpose,
        edit=EditRules(regroup),
        cost=_transposed_cost,
        linear=TransposedConvolution(),
    ),
    OpSpec("DeformConv", _deformable, since=19, edit=EditRules(regroup), cost=conv_cost),
    OpSpec("Gemm", gemm, cost=_gemm_cost, linear=GeneralProduct(), encode=_gemm_encode),
    OpSpec("MatMul", matmul, cost=matmul_cost, linear=Product(), encode=_matmul_encode),
)
