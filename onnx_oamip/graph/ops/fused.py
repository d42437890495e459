"""Operators into which ONNX Runtime's optimisers fuse a layer and what follows it, written out in the parts they fuse.

Operators on codes, which its quantiser writes for those of real numbers, are written out as the latter between
DequantizeLinear and QuantizeLinear.

A file that an optimiser saved is pruned and refitted like the file before it: channels, costs and refits of the parts
are known, and ONNX Runtime fuses them again when it loads the result. Operators that fuse nothing linear, or that are
one linear operator themselves, have entries in the table instead.

Reference: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.printable import shortened
from onnx_oamip.graph.ops import domains

CONTRIBUTED = "com.microsoft"
LAYER_NORMALIZATION_SINCE = 17
"""Opset of ``LayerNormalization``; ONNX Runtime writes it into files of older opsets too."""
NORMALIZATION_EPSILON = 1e-5
EMBEDDING_EPSILON = 1e-12
AXES_OF_REDUCTIONS = {"ReduceMean": 18, "ReduceSum": 13}
"""Opset from which a reduction takes its axes as an input."""


class _Context:
    """The graph around the fused nodes.

    Attributes:
        version: Opset of the default domain.
        taken: Names in use.
        dtypes: Element types of the weights by name.
        ranks: Ranks of the weights by name.
    """

    def __init__(self, proto: ModelProto) -> None:
        graph = proto.graph
        self.version = {o.domain: o.version for o in proto.opset_import}.get("", 1)
        self.taken = {value.name for value in (*graph.input, *graph.output)}
        self.taken.update(tensor.name for tensor in graph.initializer)
        for node in graph.node:
            self.taken.update((node.name, *node.input, *node.output))
        self.dtypes = {
            tensor.name: helper.tensor_dtype_to_np_dtype(tensor.data_type)
            for tensor in graph.initializer
        }
        self.ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}


class _Parts:
    """The nodes that one fused node is written out into.

    Attributes:
        node: The fused node.
        attrs: Its attributes.
        nodes: The nodes written so far, in order.
    """

    def __init__(self, node: NodeProto, graph: _Context) -> None:
        self.node = node
        self.version = graph.version
        self.attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.nodes: list[NodeProto] = []
        self._graph = graph

    def input(self, slot: int) -> str:
        """Name of an input, empty where it is absent."""
        if slot < len(self.node.input):
            return self.node.input[slot]
        return ""

    def output(self, slot: int) -> str:
        """Name of an output, empty where it is absent."""
        if slot < len(self.node.output):
            return self.node.output[slot]
        return ""

    def text(self, attribute: str) -> str:
        """Value of a text attribute, empty where it is absent."""
        value = self.attrs.get(attribute, b"")
        if isinstance(value, bytes):
            return value.decode()
        return str(value)

    def numeric(self, attribute: str, default: float) -> float:
        """Value of an attribute that is a number; raises ModelError where it is anything else."""
        value = self.attrs.get(attribute, default)
        if isinstance(value, int | float):
            return float(value)
        raise ModelError(
            f"the attribute '{attribute}' of {self.node.op_type} '{shortened(self.node.name)}' is no number; export "
            "the model again."
        )

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        out: str = "",
        domain: str = "",
        **attrs: Any,
    ) -> str:
        """Append a node.

        Args:
            op: Its operator.
            inputs: Names of its inputs.
            out: Name of its output; a new one where it is empty.
            domain: Domain of the operator.
            attrs: Its attributes; those that are None are left out.

        Returns:
            Name of the output.
        """
        stem = self.node.name or self.node.output[0]
        result = out or self._unused(f"{stem}/{op}_out")
        given = {name: value for name, value in attrs.items() if value is not None}
        name = self._unused(f"{stem}/{op}")
        self.nodes.append(
            helper.make_node(op, list(inputs), [result], name, domain=domain, **given)
        )
        return result

    def constant(self, value: npt.NDArray[Any]) -> str:
        """Append a constant; returns its name."""
        return self.add("Constant", (), value=numpy_helper.from_array(value))

    def number(self, value: float, like: str) -> str:
        """Append a number of the element type of a weight, single precision where that is not known."""
        dtype = self._graph.dtypes.get(like, np.dtype(np.float32))
        return self.constant(np.asarray(value, dtype))

    def reduced(
        self,
        op: str,
        source: str,
        axis: int,
        out: str = "",
        keepdims: int = 1,
    ) -> str:
        """Append a reduction over one axis; returns the name of its output."""
        if self.version < AXES_OF_REDUCTIONS[op]:
            return self.add(op, (source,), out, axes=[axis], keepdims=keepdims)
        axes = self.constant(np.asarray([axis], np.int64))
        return self.add(op, (source, axes), out, keepdims=keepdims)

    def rank(self, weight: str) -> int:
        """Rank of a weight; 0 for a computed tensor."""
        return self._graph.ranks.get(weight, 0)

    def _unused(self, name: str) -> str:
        result = name
        number = 1
        while result in self._graph.taken:
            result = f"{name}_{number}"
            number += 1
        self._graph.taken.add(result)
        return result


# ---------------------------------------------------------------------------------------------- layer and activation

_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
"""Attributes of the activations that are fused, in the order of ``activation_params``."""
_CLIP_BY_INPUTS = 11
"""Opset from which Clip takes its bounds as inputs."""


def _activation(
    parts: _Parts,
    source: str,
    values: Sequence[float],
    out: str,
) -> bool:
    """Append the fused activation.

    Returns:
        False where it is one that is not known.
    """
    name = parts.text("activation")
    if not name:
        parts.add("Identity", (source,), out)
        return True
    if name not in _PARAMETERS:
        return False
    given: dict[str, Any] = dict(zip(_PARAMETERS[name], values, strict=False))
    if name == "Clip" and parts.version >= _CLIP_BY_INPUTS:
        bounds = [
            parts.number(given[key], parts.input(1)) if key in given else ""
            for key in _PARAMETERS[name]
        ]
        parts.add(name, (source, *bounds), out)
    else:
        parts.add(name, (source,), out, **given)
    return True


def _convolution(parts: _Parts) -> bool:
    """FusedConv: a convolution, an addition of another tensor where there is one, an activation."""
    own = {k: v for k, v in parts.attrs.items() if not k.startswith("activation")}
    result = parts.add("Conv", [n for n in parts.node.input[:3] if n], **own)
    if parts.input(3):
        result = parts.add("Add", (result, parts.input(3)))
    return _activation(parts, result, parts.attrs.get("activation_params", ()), parts.output(0))


def _product(parts: _Parts) -> bool:
    """FusedGemm: a Gemm and an activation."""
    own = {k: v for k, v in parts.attrs.items() if not k.startswith("activation")}
    result = parts.add("Gemm", [n for n in parts.node.input[:3] if n], **own)
    name = parts.text("activation")
    keys = [f"activation_{key}" for key in ("alpha", "beta", "gamma")]
    if name == "Clip":
        return False  # its bounds have no documented place among these
    values = [parts.attrs[key] for key in keys if key in parts.attrs]
    return _activation(parts, result, values, parts.output(0))


def _matrix_product(parts: _Parts) -> bool:
    """FusedMatMul: a product of matrices that may be transposed, times a number."""
    if parts.numeric("transBatchA", 0) or parts.numeric("transBatchB", 0):
        return False
    transposed = [bool(parts.numeric(name, 0)) for name in ("transA", "transB")]
    factor = parts.numeric("alpha", 1.0)
    out = parts.output(0) if factor == 1.0 else ""
    operands = list(parts.node.input[:2])
    for slot, name in enumerate(operands):
        rank = parts.rank(name)
        if transposed[slot] and rank > 1:
            perm = [*range(rank - 2), rank - 1, rank - 2]
            operands[slot] = parts.add("Transpose", (name,), perm=perm)
            transposed[slot] = False
    if any(transposed):  # computed operands, whose rank is not known here
        if any(parts.rank(name) for name in operands):
            return False
        left, right = "km" if transposed[0] else "mk", "nk" if transposed[1] else "kn"
        equation = f"...{left},...{right}->...mn"
        result = parts.add("Einsum", operands, out, equation=equation)
    else:
        result = parts.add("MatMul", operands, out)
    if factor != 1.0:
        parts.add("Mul", (result, parts.number(factor, parts.input(1))), parts.output(0))
    return True


# --------------------------------------------------------------------------------------------------- normalisation


def _normalised(
    parts: _Parts,
    source: str,
    affine: tuple[str, str],
    epsilon: float,
    out: str,
) -> None:
    """Append a layer normalisation over the last axis, in elementary operators before it was one."""
    if parts.version >= LAYER_NORMALIZATION_SINCE:
        inputs = [source, *(name for name in affine if name)]
        parts.add("LayerNormalization", inputs, out, axis=-1, epsilon=epsilon)
        return
    mean = parts.reduced("ReduceMean", source, -1)
    centred = parts.add("Sub", (source, mean))
    _scaled(parts, centred, affine, epsilon, out)


def _scaled(
    parts: _Parts,
    centred: str,
    affine: tuple[str, str],
    epsilon: float,
    out: str,
) -> None:
    """Append the division by the root mean square of the last axis, then a gain and a bias."""
    gain, bias = affine
    square = parts.add("Mul", (centred, centred))
    variance = parts.reduced("ReduceMean", square, -1)
    small = parts.number(epsilon, gain)
    root = parts.add("Sqrt", (parts.add("Add", (variance, small)),))
    unit = parts.add("Div", (centred, root))
    if not bias:
        parts.add("Mul", (unit, gain), out)
        return
    parts.add("Add", (parts.add("Mul", (unit, gain)), bias), out)


def _epsilon(parts: _Parts, default: float) -> float:
    return parts.numeric("epsilon", default)


def _layer_normalization(parts: _Parts) -> bool:
    """LayerNormalization in a file of an opset that does not have it."""
    axis = int(parts.numeric("axis", -1))
    statistics = parts.output(1) or parts.output(2)
    if parts.version >= LAYER_NORMALIZATION_SINCE or axis != -1 or statistics:
        return False
    epsilon = _epsilon(parts, NORMALIZATION_EPSILON)
    affine = (parts.input(1), parts.input(2))
    _normalised(parts, parts.input(0), affine, epsilon, parts.output(0))
    return True


def _root_mean_square(parts: _Parts) -> bool:
    """SimplifiedLayerNormalization, which ONNX Runtime has in the default domain."""
    if int(parts.numeric("axis", -1)) != -1 or parts.output(1):
        return False
    epsilon = _epsilon(parts, NORMALIZATION_EPSILON)
    _scaled(parts, parts.input(0), (parts.input(1), ""), epsilon, parts.output(0))
    return True


def _skip_sum(parts: _Parts, bias: str) -> str:
    """Append the sum of the data, the skip connection and a bias; it may be an output as well."""
    if parts.output(1) or parts.output(2):
        return ""
    whole = parts.output(3)
    if not bias:
        return parts.add("Add", parts.node.input[:2], whole)
    return parts.add("Add", (parts.add("Add", parts.node.input[:2]), bias), whole)


def _skip_normalization(parts: _Parts) -> bool:
    """SkipLayerNormalization: an addition, another of a bias, a layer normalisation."""
    total = _skip_sum(parts, parts.input(4))
    if not total:
        return False
    epsilon = _epsilon(parts, EMBEDDING_EPSILON)
    _normalised(parts, total, (parts.input(2), parts.input(3)), epsilon, parts.output(0))
    return True


def _skip_root_mean_square(parts: _Parts) -> bool:
    """SkipSimplifiedLayerNormalization: an addition, another of a bias, a division by the root mean square."""
    total = _skip_sum(parts, parts.input(3))
    if not total:
        return False
    epsilon = _epsilon(parts, EMBEDDING_EPSILON)
    _scaled(parts, total, (parts.input(2), ""), epsilon, parts.output(0))
    return True


def _embedding(parts: _Parts) -> bool:
    """EmbedLayerNormalization: rows of up to three tables, added up and normalised, and the lengths of a mask."""
    ids, segments, words, places, kinds, gain, bias, mask, place_ids = map(parts.input, range(9))
    total = parts.add("Gather", (words, ids))
    if not place_ids:
        index = parts.constant(np.asarray([1], np.int64))
        length = parts.add("Gather", (parts.add("Shape", (ids,)), index))
        first = parts.constant(np.asarray([0], np.int64))
        position = parts.add("Slice", (places, first, length, first))
    else:
        position = parts.add("Gather", (places, place_ids))
    last = "" if segments else parts.output(2)
    total = parts.add("Add", (total, position), last)
    if segments:
        kind = parts.add("Gather", (kinds, segments))
        total = parts.add("Add", (total, kind), parts.output(2))
    epsilon = _epsilon(parts, EMBEDDING_EPSILON)
    _normalised(parts, total, (gain, bias), epsilon, parts.output(0))
    if parts.output(1):
        # Without a mask the lengths are zeros.
        marks = mask or parts.add("Sub", (ids, ids))
        parts.reduced("ReduceSum", marks, 1, parts.output(1), keepdims=0)
    return True


# ------------------------------------------------------------------------------------------------- bias and activation


def _biased_gelu(parts: _Parts) -> bool:
    total = parts.add("Add", parts.node.input[:2])
    parts.add("Gelu", (total,), parts.output(0), domain=CONTRIBUTED)
    return True


def _biased_fast_gelu(parts: _Parts) -> bool:
    if not parts.input(1):
        return False
    total = parts.add("Add", parts.node.input[:2])
    parts.add("FastGelu", (total,), parts.output(0), domain=CONTRIBUTED)
    return True


def _bias_add(parts: _Parts) -> bool:
    total = parts.add("Add", parts.node.input[:2])
    parts.add("Add", (total, parts.input(2)), parts.output(0))
    return True


# ------------------------------------------------------------------------------------------ operators on codes

_SCALES_BY_AXIS = 13
"""Opset from which a scale may have an axis."""
_SOFTMAX_OF_ONE_AXIS = 13
"""Opset from which Softmax normalises one axis."""


def _real(parts: _Parts, slot: int, axis: int | None = None) -> str:
    """Real numbers of the codes in an input, whose scale and zero point are the two inputs behind it."""
    read = [parts.input(i) for i in range(slot, slot + 3)]
    return parts.add("DequantizeLinear", [name for name in read if name], axis=axis)


def _encoded(parts: _Parts, source: str, slot: int) -> bool:
    """Append the output: codes by the scale and the zero point in two inputs; False where the latter is absent."""
    if not parts.input(slot + 1):
        return False  # it alone says whether codes have a sign
    parts.add("QuantizeLinear", (source, parts.input(slot), parts.input(slot + 1)), parts.output(0))
    return True


def _of_two_codes(op: str) -> Callable[[_Parts], bool]:
    """QLinearAdd, QLinearMul: an operator of two tensors of codes."""

    def write(parts: _Parts) -> bool:
        return _encoded(parts, parts.add(op, (_real(parts, 0), _real(parts, 3))), 6)

    return write


def _of_codes(op: str, *names: str) -> Callable[[_Parts], bool]:
    """QLinearSigmoid and others: an operator of one tensor of codes, with these attributes."""

    def write(parts: _Parts) -> bool:
        if parts.numeric("channels_last", 0):
            return False
        given: dict[str, Any] = {name: parts.attrs.get(name) for name in names}
        return _encoded(parts, parts.add(op, (_real(parts, 0),), **given), 3)

    return write


def _softmax_of_codes(parts: _Parts) -> bool:
    axis = int(parts.numeric("axis", -1))
    written_for = parts.numeric("opset", parts.version)
    if axis != -1 and min(written_for, parts.version) < _SOFTMAX_OF_ONE_AXIS:
        return False
    return _encoded(parts, parts.add("Softmax", (_real(parts, 0),), axis=axis), 3)


def _concat_of_codes(parts: _Parts) -> bool:
    joined = [_real(parts, slot) for slot in range(2, len(parts.node.input), 3)]
    return _encoded(parts, parts.add("Concat", joined, axis=parts.attrs.get("axis")), 0)


def _product_of_codes(parts: _Parts) -> bool:
    """QGemm: a Gemm of codes, whose bias counts in the product of both scales."""
    factor = parts.numeric("alpha", 1.0)
    has_axis = parts.rank(parts.input(4)) > 0
    if factor != 1.0 or (has_axis and parts.version < _SCALES_BY_AXIS):
        return False
    turned: dict[str, Any] = {name: int(parts.numeric(name, 0)) for name in ("transA", "transB")}
    column = 1 - turned["transB"] if has_axis else None
    operands = [_real(parts, 0), _real(parts, 3, column)]
    if parts.input(6):
        scale = parts.add("Mul", (parts.input(1), parts.input(4)))
        place = 0 if has_axis else None
        operands.append(parts.add("DequantizeLinear", (parts.input(6), scale), axis=place))
    if not parts.input(7):
        parts.add("Gemm", operands, parts.output(0), **turned)
        return True
    return _encoded(parts, parts.add("Gemm", operands, **turned), 7)


_POOLING = (
    "auto_pad",
    "ceil_mode",
    "count_include_pad",
    "dilations",
    "kernel_shape",
    "pads",
    "strides",
)

_WRITERS: Mapping[tuple[str, str], Callable[[_Parts], bool]] = {
    (CONTRIBUTED, "FusedConv"): _convolution,
    (CONTRIBUTED, "FusedGemm"): _product,
    (CONTRIBUTED, "FusedMatMul"): _matrix_product,
    (CONTRIBUTED, "SkipLayerNormalization"): _skip_normalization,
    (CONTRIBUTED, "SkipSimplifiedLayerNormalization"): _skip_root_mean_square,
    (CONTRIBUTED, "EmbedLayerNormalization"): _embedding,
    (CONTRIBUTED, "BiasGelu"): _biased_gelu,
    (CONTRIBUTED, "FastGelu"): _biased_fast_gelu,
    (CONTRIBUTED, "BiasAdd"): _bias_add,
    (CONTRIBUTED, "QLinearAdd"): _of_two_codes("Add"),
    (CONTRIBUTED, "QLinearMul"): _of_two_codes("Mul"),
    (CONTRIBUTED, "QLinearSigmoid"): _of_codes("Sigmoid"),
    (CONTRIBUTED, "QLinearLeakyRelu"): _of_codes("LeakyRelu", "alpha"),
    (CONTRIBUTED, "QLinearGlobalAveragePool"): _of_codes("GlobalAveragePool"),
    (CONTRIBUTED, "QLinearAveragePool"): _of_codes("AveragePool", *_POOLING),
    (CONTRIBUTED, "QLinearSoftmax"): _softmax_of_codes,
    (CONTRIBUTED, "QLinearConcat"): _concat_of_codes,
    (CONTRIBUTED, "QGemm"): _product_of_codes,
    ("", "LayerNormalization"): _layer_normalization,
    ("", "SimplifiedLayerNormalization"): _root_mean_square,
}
"""Functions that write a fused operator out; False where a form of it is not known, which then stays as it is."""


def write_out(proto: ModelProto) -> tuple[str, ...]:
    """Write out the fused operators of a graph, in place. Bodies of nodes are left as they are.

    Args:
        proto: The model.

    Returns:
        Names of the operators that were written out, each once.
    """
    fused = [node for node in proto.graph.node if _writer(node) is not None]
    if not fused:
        return ()
    context = _Context(proto)
    names: dict[str, None] = {}
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        writer = _writer(node)
        parts = None if writer is None else _Parts(node, context)
        if writer is None or parts is None or not writer(parts):
            nodes.append(node)
            continue
        nodes.extend(parts.nodes)
        names.setdefault(node.op_type)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return tuple(names)


def _writer(node: NodeProto) -> Callable[[_Parts], bool] | None:
    return _WRITERS.get((domains.plain(node.domain), node.op_type))
