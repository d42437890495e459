"""Linear operators: convolutions and matrix products. They make channels and they consume them.

Grouped convolution, two policies (a kernel's block structure must stay rectangular):

* *whole groups*, where there are more groups than channels in one (depthwise is the extreme): a unit is a group with
  all its inputs and outputs; ``group`` shrinks.
* *slots*, otherwise: channel ``j`` of every group goes together, on either side; ``group`` stays.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.records import Array, Axis, Node
from onnx_oamip.graph.ops import maps
from onnx_oamip.graph.ops.matrix_view import (
    Convolution,
    GeneralProduct,
    Product,
    TransposedConvolution,
)
from onnx_oamip.graph.ops.notation import opaque, rule
from onnx_oamip.graph.ops.spec import (
    Cuts,
    Edit,
    EditRules,
    Labels,
    OpSpec,
    Refused,
    Shapes,
    Terms,
    operand,
)

_conv_dense = rule("n c *, o c *, o -> n o *")
_transposed_dense = rule("n c *, c o *, o -> n o *")


def _pin_spatial(node: Node, labels: Labels, name: str) -> None:
    data = name == node.inputs[0]
    why = f"it is a spatial axis of {node}" if data else f"it is an axis of the kernel of {node}"
    for axis in range(2, len(labels.shape(name) or ())):
        labels.pin(labels.label(name, axis), why, listed=data)


def conv(node: Node, labels: Labels) -> None:
    """Conv of any group count."""
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        _conv_dense(node, labels)
        return
    x, w = node.inputs[0], node.inputs[1]
    shape = labels.shape(w)
    data = labels.label(x, 1)
    # Ask for the weight's labels last: an opaque node must not have claimed any.
    if shape is None or data is None or not _followed(labels, w):
        opaque(node, labels, f"the grouped {node} reads an untracked input")
        return
    rows, columns = labels.label(w, 0), labels.label(w, 1)
    assert rows is not None
    assert columns is not None
    if not labels.is_constant(w):
        _pin_spatial(node, labels, w)
    per_in, per_out = shape[1], shape[0] // groups
    _pin_spatial(node, labels, x)
    bias = operand(node, 2)
    if bias is not None:
        rows = labels.unify([(w, 0), (bias, 0)], node)
    if rows is None:
        labels.pin(data, f"the grouped {node} has an untracked bias")
        labels.pin(columns, f"the grouped {node} has an untracked bias")
    elif _whole(groups, per_in):
        labels.pin(
            columns, f"{node} loses whole groups, not channels within one", listed=per_in > 1
        )
        first = data.reshape(groups, per_in)[:, :1]
        labels.tie(data.reshape(groups, per_in), first)
        labels.tie(rows.reshape(groups, per_out), first)
    else:
        labels.tie(data.reshape(groups, per_in), columns[None])
        labels.tie(rows.reshape(groups, per_out), rows[None, :per_out])
        labels.consume(node, (x, 1), (w, 1), groups)
    labels.set(node.outputs[0], [None, rows] + [None] * (len(shape) - 2))


def _followed(labels: Labels, weight: str) -> bool:
    """A constant, or one behind operators that pass its channels on (dequantisation)."""
    return labels.is_constant(weight) or all(
        labels.label(weight, axis) is not None for axis in (0, 1)
    )


def conv_transpose(node: Node, labels: Labels) -> None:
    """ConvTranspose: the weight is (input channels, outputs per group, ...)."""
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        _transposed_dense(node, labels)
        return
    x, w = node.inputs[0], node.inputs[1]
    shape = labels.shape(w)
    data = labels.label(x, 1)
    if shape is None or data is None:
        opaque(node, labels, f"the grouped {node} reads an untracked input")
        return
    per_in, per_out = shape[0] // groups, shape[1]
    bias = operand(node, 2)
    if not _followed(labels, w) or (
        bias and not labels.is_constant(bias) and labels.label(bias, 0) is None
    ):
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
    if _whole(groups, per_in):
        first = rows.reshape(groups, per_in)[:, :1]
        labels.tie(rows.reshape(groups, per_in), first)
        labels.pin(columns, f"{node} loses whole groups, not channels within one")
        out = np.repeat(first[:, 0], per_out)
    else:
        labels.tie(rows.reshape(groups, per_in), rows[None, :per_in])
        out = np.tile(columns, groups)
        labels.consume(node, (x, 1), (w, 0), groups)
    if bias_labels is not None:
        labels.tie(bias_labels, out)
    labels.set(node.outputs[0], [None, out] + [None] * (len(shape) - 2))


def _whole(groups: int, per_in: int) -> bool:
    return groups > per_in


def regroup(node: Node, cuts: Cuts) -> Edit:
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        return Edit()
    weight = cuts.shape(node.inputs[3 if node.op == "QLinearConv" else 1])
    per_in = weight[0] // groups if node.op == "ConvTranspose" else weight[1]
    return (
        Edit({"group": cuts.kept(node.inputs[0], 1) // per_in})
        if _whole(groups, per_in)
        else Edit()
    )


def conv_cost(node: Node, shapes: Shapes, weight: int = 1) -> tuple[Axis, ...]:
    """Every output element meets every kernel element of a filter; ``weight``: input index of the filters."""
    out, w = node.outputs[0], node.inputs[weight]
    return (
        *((out, i) for i in range(len(shapes[out]))),
        *((w, i) for i in range(1, len(shapes[w]))),
    )


def _transposed_cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    # Every input value meets every kernel element: input positions x (outputs per group) x kernel.
    x, w = node.inputs[0], node.inputs[1]
    return (*((x, i) for i in range(len(shapes[x]))), *((w, i) for i in range(1, len(shapes[w]))))


def gemm(node: Node, labels: Labels) -> None:
    """Y = alpha A' B' + beta C with optional transposes; C broadcasts to (m, n)."""
    a = "k m" if node.attrs.get("transA", 0) else "m k"
    b = "n k" if node.attrs.get("transB", 0) else "k n"
    bias = operand(node, 2)
    shape = labels.shape(bias) if bias else None
    out = labels.shape(node.outputs[0])
    if bias and (shape is None or out is None):
        opaque(node, labels, f"{node} has a bias of unknown shape")
        return
    trimmed = Node(
        node.name, node.op, node.domain, node.version, node.inputs[:2], node.outputs, node.attrs
    )
    rule(f"{a}, {b} -> m n")(trimmed, labels)
    if not bias or shape is None or out is None:
        return
    # Align the bias from the right: a length of 1 (or no axis) is shared by all columns and needs no cut.
    weight_axis = 0 if node.attrs.get("transB", 0) else 1
    ties = {
        1: (node.inputs[1], weight_axis),
        0: (node.inputs[0], 1 if node.attrs.get("transA", 0) else 0),
    }
    for axis, n in enumerate(shape):
        target = axis + 2 - len(shape)
        if n > 1:
            labels.unify([(bias, axis), ties[target]], node)


def _gemm_cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    k = 0 if node.attrs.get("transA", 0) else 1
    return ((node.outputs[0], 0), (node.outputs[0], 1), (node.inputs[0], k))


def matmul(node: Node, labels: Labels) -> None:
    """numpy.matmul: the last axis of A meets the second to last of B; leading axes broadcast."""
    a, b = node.inputs[:2]
    sa, sb = labels.shape(a), labels.shape(b)
    out = labels.shape(node.outputs[0])
    if sa is None or sb is None or out is None or not sa or not sb:
        opaque(node, labels, f"{node} has an operand of unknown shape")
        return
    inner = [(a, len(sa) - 1), (b, max(len(sb) - 2, 0))]
    found = labels.unify(inner, node)
    if found is not None:
        constant = [labels.is_constant(t) for t, _ in inner]
        if all(constant):
            labels.pin(found, f"{node} multiplies two constants")
        else:
            data = 1 if constant[0] else 0
            labels.consume(node, inner[data], inner[1 - data])
    result: list[np.ndarray[tuple[int], np.dtype[np.int64]] | None] = []
    lead = len(out) - (len(sa) > 1) - (len(sb) > 1)
    for i in range(lead):
        here = []
        for name, shape in ((a, sa), (b, sb)):
            axis = i - (lead - (len(shape) - 2))
            if axis >= 0 and len(shape) > 2:
                if shape[axis] == out[i]:
                    here.append((name, axis))
                elif not labels.is_constant(name):
                    labels.pin(labels.label(name, axis), f"{node} broadcasts its single channel")
        tracked = any(not labels.is_constant(t) and labels.label(t, x) is not None for t, x in here)
        result.append(labels.unify(here, node) if tracked else None)
    if len(sa) > 1:
        result.append(labels.label(a, len(sa) - 2))
    if len(sb) > 1:
        result.append(labels.label(b, len(sb) - 1))
    labels.set(node.outputs[0], result)


def matmul_cost(node: Node, shapes: Shapes) -> tuple[Axis, ...]:
    """Every output element is a sum over the last axis of the first operand."""
    a, out = node.inputs[0], node.outputs[0]
    return (*((out, i) for i in range(len(shapes[out]))), (a, len(shapes[a]) - 1))


def _constant(node: Node, terms: Terms, index: int) -> Array:
    value = terms.constant(node.inputs[index])
    if value is None:
        raise Refused(f"{node} takes its {('data', 'weight', 'bias')[index]} from a computation")
    return value.astype(np.float64)


def _conv_encode(node: Node, terms: Terms) -> None:
    x, out = node.inputs[0], node.outputs[0]
    weight = _constant(node, terms, 1)
    after = terms.shape(out)
    bias = np.zeros(after[1]) if operand(node, 2) is None else _constant(node, terms, 2)
    offset = np.broadcast_to(bias.reshape(-1, *[1] * (len(after) - 2)), after)
    terms.affine(out, [(x, maps.convolution(node, weight, terms.shape(x), after))], offset)


def _gemm_encode(node: Node, terms: Terms) -> None:
    left = terms.constant(node.inputs[0]) is not None
    slot = 1 if left else 0
    x, out = node.inputs[slot], node.outputs[0]
    weight = _constant(node, terms, 1 - slot)
    names = ("transA", "transB")
    if node.attrs.get(names[1 - slot], 0):
        weight = weight.T
    shape = terms.shape(x)
    read = maps.places(shape).T if node.attrs.get(names[slot], 0) else maps.places(shape)
    matrix = (
        maps.product(weight, 1, read.shape[1]) if left else maps.product(weight.T, read.shape[0])
    )
    offset = np.zeros(())
    if operand(node, 2) is not None:
        offset = node.attrs.get("beta", 1.0) * _constant(node, terms, 2)
    order = maps.gather(read, read.size)
    terms.affine(out, [(x, csr_array(node.attrs.get("alpha", 1.0) * (matrix @ order)))], offset)


def _matmul_encode(node: Node, terms: Terms) -> None:
    left = terms.constant(node.inputs[0]) is not None
    slot = 1 if left else 0
    x, shape = node.inputs[slot], terms.shape(node.inputs[slot])
    weight = _constant(node, terms, 1 - slot)
    if weight.ndim > 2:
        raise Refused(f"{node} has a weight of its own for every matrix of a batch")
    if left:
        trailing = shape[-1] if len(shape) > 1 else 1
        size = shape[-2] if len(shape) > 1 else shape[0]
        matrix = maps.product(
            np.atleast_2d(weight), int(np.prod(shape)) // (size * trailing), trailing
        )
    else:
        matrix = maps.product(weight.reshape(len(weight), -1).T, int(np.prod(shape[:-1])))
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
    OpSpec("Gemm", gemm, cost=_gemm_cost, linear=GeneralProduct(), encode=_gemm_encode),
    OpSpec("MatMul", matmul, cost=matmul_cost, linear=Product(), encode=_matmul_encode),
)
