"""Graph cases: at least one for every operator of the registry, and the patterns that real models are made of.

``units`` is counted by hand: how many channels (or sets of channels) may go. ``pinned`` is a part of the reason that
must be given for channels that may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from graphs import RUNTIME, build
from onnx import ModelProto, TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class OpCase:
    """One graph. ``ops`` are the operators it is about; they must still be there after loading."""

    name: str
    ops: tuple[str, ...]
    make: Callable[[], ModelProto]
    units: int
    pinned: tuple[str, ...] = ()
    opset: int = 17
    tolerance: float = 1e-5
    bindings: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES: list[OpCase] = []
NEED_NEWER_RUNTIME = {
    "swish": (1, 24),
    "reduce-nothing": (1, 24),
    "standard-attention-groups": (1, 24),
    "standard-attention-states-given-out": (1, 24),
    "standard-attention-mask-by-head": (1, 25),
    "qdq-weight-transposed": (1, 28),
}
"""Opset 24, a reduction over no axes, forms of Attention that are refused or answered at random, and a transposition
between a weight and its scale that is rewritten wrongly: the last release for Python 3.10 (1.23) takes none of them."""


def unknown_here(case: OpCase) -> str:
    """Why the installed onnx or ONNX Runtime cannot take a case, cut or not; empty where they can."""
    if case.name in NEED_NEWER_RUNTIME and NEED_NEWER_RUNTIME[case.name] > RUNTIME:
        return f"ONNX Runtime {'.'.join(map(str, RUNTIME))} cannot run this graph, cut or not"
    newest = onnx.defs.onnx_opset_version()
    return f"this onnx knows opsets up to {newest}" if case.opset > newest else ""


def case(
    name: str,
    ops: str,
    text: str,
    units: int,
    pinned: str | tuple[str, ...] = (),
    opset: int = 17,
    ir: int = 8,
    domains: Mapping[str, int] | None = None,
    tolerance: float = 1e-5,
    bindings: Mapping[str, int] | None = None,
    weights_as_inputs: bool = False,
) -> None:
    """Add a case written as text."""

    def make() -> ModelProto:
        return build(text, opset, ir, domains, weights_as_inputs=weights_as_inputs)

    reasons = (pinned,) if isinstance(pinned, str) else pinned
    CASES.append(
        OpCase(name, tuple(ops.split()), make, units, reasons, opset, tolerance, bindings or {})
    )


# ------------------------------------------------------------------------------------------------ linear operators

_GEMM_BIAS = {
    "none": ("", ""),
    "vector": (", float[8] c", ", c"),
    "row": (", float[1,8] c", ", c"),
    "one": (", float[1] c", ", c"),
    "scalar": (", float c = {0.7}", ", c"),
}
for _ta in (0, 1):
    for _tb in (0, 1):
        for _kind, (_declared, _operand) in _GEMM_BIAS.items():
            _x = "xt = Transpose<perm = [1, 0]>(x)" if _ta else "xt = Identity(x)"
            _h = "ht = Transpose<perm = [1, 0]>(h)" if _ta else "ht = Identity(h)"
            _w1, _w2 = (
                ("float[8,5] w1", "float[3,8] w2") if _tb else ("float[5,8] w1", "float[8,3] w2")
            )
            _first = f"<transA = {_ta}, transB = {_tb}, alpha = 0.5, beta = 2.0>"
            _second = f"<transA = {_ta}, transB = {_tb}, alpha = 1.5, beta = 0.25>"
            case(
                f"gemm-transA{_ta}-transB{_tb}-bias-{_kind}",
                "Gemm",
                f"""(float[N,5] x) => (float[] y) <{_w1}, {_w2}, float[3] d{_declared}> {{
                    {_x}
                    g = Gemm{_first}(xt, w1{_operand})
                    h = Relu(g)
                    {_h}
                    y = Gemm{_second}(ht, w2, d)
                }}""",
                units=8,
            )
case(
    "gemm-constant-left",
    "Gemm",
    """(float[4,5] x) => (float[] y) <float[8,5] w1, float[8,1] c, float[3,8] w2> {
        g = Gemm<transB = 1>(w1, x, c)
        h = Tanh(g)
        y = Gemm(w2, h)
    }""",
    units=8,
)
case(
    "gemm-full-bias",
    "Gemm",
    """(float[4,5] x) => (float[] y) <float[5,8] w1, float[4,8] c, float[8,3] w2> {
        g = Gemm(x, w1, c)
        h = Relu(g)
        y = Gemm(h, w2)
    }""",
    units=8,
)
case(
    "gemm-old-explicit-broadcast",
    "Gemm",
    """(float[4,5] x) => (float[] y) <float[5,8] w1, float[1,8] c, float[8,3] w2, float[4,1] d> {
        g = Gemm(x, w1, c)
        h = Relu(g)
        y = Gemm(h, w2, d)
    }""",
    units=8,
    opset=9,
    ir=4,
)
case(
    "matmul-then-add",
    "MatMul",
    """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8] b1, float[8,3] w2, float[3] b2> {
        m = MatMul(x, w1)
        a = Add(m, b1)
        h = Relu(a)
        o = MatMul(h, w2)
        y = Add(b2, o)
    }""",
    units=8,
)
case(
    "matmul-constant-left",
    "MatMul",
    """(float[N,5,4] x) => (float[] y) <float[8,5] w1, float[8,1] b1, float[3,8] w2> {
        m = MatMul(w1, x)
        a = Add(m, b1)
        h = Relu(a)
        y = MatMul(w2, h)
    }""",
    units=8,
)
case(
    "matmul-batched-weight",
    "MatMul",
    """(float[2,4,5] x) => (float[] y) <float[2,5,8] w1, float[2,8,3] w2> {
        m = MatMul(x, w1)
        h = Relu(m)
        y = MatMul(h, w2)
    }""",
    units=8,
)
case(
    "matmul-vectors",
    "MatMul",
    """(float[N,5] x) => (float[N] y) <float[5,8] w1, float[8] v> {
        m = MatMul(x, w1)
        h = Relu(m)
        y = MatMul(h, v)
    }""",
    units=8,
)
case(
    "matmul-broadcast-stack",
    "MatMul",
    """(float[N,4,5] x) => (float[] y) <float[6,5,7] w1, float[6,7,3] w2, int64[1] one = {1}> {
        u = Unsqueeze(x, one)
        m = MatMul(u, w1)
        h = Relu(m)
        o = MatMul(h, w2)
        y = ReduceSum<keepdims = 0>(o, one)
    }""",
    # The stack of six matrices comes from a broadcast axis, which is not tracked.
    units=7,
)
case(
    "conv-1d",
    "Conv",
    """(float[N,3,12] x) => (float[] y) <float[8,3,3] w1, float[8] b1, float[4,8,3] w2, float[4] b2> {
        c = Conv<pads = [1, 1]>(x, w1, b1)
        h = Relu(c)
        y = Conv<strides = [2], dilations = [2]>(h, w2, b2)
    }""",
    units=8,
)
case(
    "conv-2d",
    "Conv",
    """(float[N,3,8,8] x) => (float[] y) <float[8,3,3,3] w1, float[8] b1, float[4,8,3,3] w2> {
        c = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w1, b1)
        h = Relu(c)
        y = Conv<pads = [1, 0, 1, 0]>(h, w2)
    }""",
    units=8,
)
case(
    "conv-3d",
    "Conv",
    """(float[N,2,5,5,5] x) => (float[] y) <float[6,2,3,3,3] w1, float[4,6,1,2,3] w2> {
        c = Conv(x, w1)
        h = Relu(c)
        y = Conv(h, w2)
    }""",
    units=6,
)
case(
    "conv-grouped-slots",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[12,4,3,3] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        g = Conv<group = 2, pads = [1, 1, 1, 1]>(h, w2, b2)
        r = Relu(g)
        y = Conv(r, w3)
    }""",
    # Slot j of both groups goes together: 4 before the grouped convolution, 6 behind it.
    units=4 + 6,
)
case(
    "conv-grouped-whole",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[12,2,3,3] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        g = Conv<group = 4>(h, w2, b2)
        r = Relu(g)
        y = Conv(r, w3)
    }""",
    units=4,
)
case(
    "conv-depthwise",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,1,3,3] w2, float[8] b2, float[4,8,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        d = Conv<group = 8, pads = [1, 1, 1, 1]>(h, w2, b2)
        r = Relu(d)
        y = Conv(r, w3)
    }""",
    units=8,
)
case(
    "conv-depthwise-multiplier",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y) <float[6,3,1,1] w1, float[12,1,3,3] w2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        d = Conv<group = 6>(h, w2)
        r = Relu(d)
        y = Conv(r, w3)
    }""",
    units=6,
)
case(
    "conv-grouped-on-the-input",
    "Conv",
    """(float[N,4,6,6] x) => (float[] y) <float[8,2,3,3] w1, float[4,8,1,1] w2> {
        c = Conv<group = 2>(x, w1)
        h = Relu(c)
        y = Conv(h, w2)
    }""",
    units=0,
    pinned="reads an untracked input",
)
case(
    "conv-transpose",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y) <float[3,8,2,2] w1, float[8] b1, float[8,4,3,3] w2, float[4] b2> {
        c = ConvTranspose<strides = [2, 2]>(x, w1, b1)
        h = Relu(c)
        y = ConvTranspose(h, w2, b2)
    }""",
    units=8,
)
case(
    "conv-transpose-grouped-slots",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,6,2,2] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        t = ConvTranspose<group = 2, strides = [2, 2]>(h, w2, b2)
        r = Relu(t)
        y = Conv(r, w3)
    }""",
    units=4 + 6,
)
case(
    "conv-transpose-grouped-whole",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,3,2,2] w2, float[12] b2, float[4,12,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        t = ConvTranspose<group = 4>(h, w2, b2)
        r = Relu(t)
        y = Conv(r, w3)
    }""",
    units=4,
)
case(
    "conv-transpose-depthwise",
    "ConvTranspose",
    """(float[N,3,5,5] x) => (float[] y) <float[8,3,1,1] w1, float[8,1,2,2] w2, float[4,8,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        t = ConvTranspose<group = 8, strides = [2, 2]>(h, w2)
        r = Relu(t)
        y = Conv(r, w3)
    }""",
    units=8,
)

# --------------------------------------------------------------------------------------------------- normalisation

_IMAGE = """(float[N,3,6,6] x) => (float[{out}] y) <float[8,3,3,3] w1, float[4,8,1,1] w2{constants}> {{
    h = Conv<pads = [1, 1, 1, 1]>(x, w1)
    {body}
    y = Conv(r, w2)
}}"""


def image(
    name: str,
    ops: str,
    body: str,
    units: int = 8,
    constants: str = "",
    pinned: str = "",
    opset: int = 17,
    out: str = "",
) -> None:
    """Convolution to 8 channels ``h``, the operator giving ``r``, convolution of ``r`` to 4 channels."""
    text = _IMAGE.format(constants=", " + constants if constants else "", body=body, out=out)
    case(name, ops, text, units, (pinned,) if pinned else (), opset)


image(
    "batch-normalization",
    "BatchNormalization",
    "r = BatchNormalization<epsilon = 0.001>(h, gain, b, m, var)",
    constants="float[8] gain, float[8] b, float[8] m, float[8] var",
)
image(
    "batch-normalization-opset-9",
    "BatchNormalization",
    "r = BatchNormalization(h, gain, b, m, var)",
    constants="float[8] gain, float[8] b, float[8] m, float[8] var",
    opset=9,
)
image(
    "instance-normalization",
    "InstanceNormalization",
    "r = InstanceNormalization(h, gain, b)",
    constants="float[8] gain, float[8] b",
)
image(
    "group-normalization",
    "GroupNormalization",
    "r = GroupNormalization<num_groups = 2>(h, gain, b)",
    # Whole groups go.
    units=2,
    constants="float[8] gain, float[8] b",
    opset=21,
    out="N,4,6,6",
)
image(
    "mean-variance-normalization",
    "MeanVarianceNormalization",
    "r = MeanVarianceNormalization<axes = [0, 2, 3]>(h)",
    units=0,
    pinned="normalises over this axis",
    out="N,4,6,6",
)
for _size in (3, 21):
    # The sum over neighbours is exact because zeros are put back where channels went.
    image(f"lrn-{_size}", "LRN", f"r = LRN<size = {_size}, alpha = 0.7, beta = 0.8, bias = 1.5>(h)")
case(
    "lrn-twice",
    "LRN",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[6,8,1,1] w2, float[4,6,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        n = LRN<size = 5, alpha = 2.0>(h)
        d = Conv(n, w2)
        m = LRN<size = 3, alpha = 2.0>(d)
        o = LRN<size = 3, alpha = 2.0>(m)
        y = Conv(o, w3)
    }""",
    units=8 + 6,
)

_TOKENS = """(float[N,4,5] x) => (float[] y) <float[5,6] w1, float[6,7] w2, float[7,3] w3{constants}> {{
    e = MatMul(x, w1)
    a = Relu(e)
    h = MatMul(a, w2)
    {body}
    y = MatMul(r, w3)
}}"""


def tokens(
    name: str,
    ops: str,
    body: str,
    units: int,
    constants: str = "",
    pinned: str = "",
    opset: int = 17,
) -> None:
    """Token features: 6 free channels ``a``, then 7 channels ``h`` that the operator takes to ``r``."""
    text = _TOKENS.format(constants=", " + constants if constants else "", body=body)
    case(name, ops, text, units, (pinned,) if pinned else (), opset)


_NORMALISED = "normalises over this axis"
tokens(
    "layer-normalization",
    "LayerNormalization",
    "r = LayerNormalization(h, gain, b)",
    # The statistics still see zeros where channels went.
    6 + 7,
    "float[7] gain, float[7] b",
)
tokens(
    "layer-normalization-of-two-axes",
    "LayerNormalization",
    "r = LayerNormalization<axis = -2>(h, gain, b)",
    6,
    "float[4,7] gain, float[4,7] b",
    _NORMALISED,
)
tokens(
    "rms-normalization",
    "RMSNormalization",
    "r = RMSNormalization(h, gain)",
    6 + 7,
    "float[7] gain",
    opset=23,
)
tokens("lp-normalization", "LpNormalization", "r = LpNormalization<axis = -1, p = 2>(h)", 6 + 7)
tokens(
    "lp-normalization-of-tokens",
    "LpNormalization",
    "r = LpNormalization<axis = 1, p = 1>(h)",
    6 + 7,
)
tokens("softmax", "Softmax", "r = Softmax(h)", 6, "", _NORMALISED)
tokens("softmax-over-tokens", "Softmax", "r = Softmax<axis = 1>(h)", 6 + 7)
tokens("softmax-opset-11", "Softmax", "r = Softmax<axis = 1>(h)", 6, "", _NORMALISED, 11)
tokens("log-softmax", "LogSoftmax", "r = LogSoftmax(h)", 6, "", _NORMALISED)
tokens("hardmax", "Hardmax", "r = Hardmax(h)", 6, "", _NORMALISED)

# -------------------------------------------------------------------------------------------- pools and reductions

image("max-pool", "MaxPool", "r = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)")
image(
    "max-pool-ceil",
    "MaxPool",
    "r = MaxPool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(h)",
)
image(
    "average-pool", "AveragePool", "r = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(h)"
)
image("lp-pool", "LpPool", "r = LpPool<kernel_shape = [2, 2], p = 2>(h)")
image("global-average-pool", "GlobalAveragePool", "r = GlobalAveragePool(h)")
image("global-max-pool", "GlobalMaxPool", "r = GlobalMaxPool(h)")
image("global-lp-pool", "GlobalLpPool", "r = GlobalLpPool<p = 2>(h)")
_EXTREMES = ("ReduceMax", "ReduceMin", "ReduceLogSumExp")
for _op in (
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceSumSquare",
):
    image(_op.lower(), _op, f"r = {_op}<axes = [2, 3], keepdims = 1>(h)")
    image(
        f"{_op.lower()}-across-channels",
        _op,
        f"s = {_op}<axes = [-3], keepdims = 1>(h)  z = Conv<pads = [1, 1, 1, 1]>(x, w3)  r = Add(z, s)",
        # The single channel of the statistic is broadcast over the 8 channels of a second branch. Where zeros add
        # nothing to the statistic, the channels that it is taken over may go as well.
        units=8 if _op in _EXTREMES else 8 + 8,
        constants="float[8,3,3,3] w3",
        pinned="takes a statistic over this axis" if _op in _EXTREMES else (),
    )
for _op in ("ReduceProd", "ReduceLogSum"):
    image(_op.lower(), _op, f"s = Sigmoid(h)  r = {_op}<axes = [3]>(s)")
image("reduce-sum", "ReduceSum", "r = ReduceSum(h, axes)", constants="int64[2] axes = {2, 3}")
image(
    "reduce-mean-opset-18",
    "ReduceMean",
    "r = ReduceMean(h, axes)",
    constants="int64[2] axes = {-1, -2}",
    opset=18,
)
image(
    "reduce-sum-across-channels",
    "ReduceSum",
    "a = Relu(h)  s = ReduceSum(a, axes)  z = Conv<pads = [1, 1, 1, 1]>(x, w3)  r = Add(z, s)",
    # A sum over channels is a consumer: they may go, as those of the other branch may.
    units=8 + 8,
    constants="float[8,3,3,3] w3, int64[1] axes = {1}",
)
case(
    "reduce-without-keepdims",
    "ReduceMean ReduceMax",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,4] w2> {
        h = Conv(x, w1)
        m = ReduceMean<axes = [3], keepdims = 0>(h)
        r = ReduceMax<axes = [-1], keepdims = 0>(m)
        y = MatMul(r, w2)
    }""",
    units=8,
)
case(
    "reduce-everything",
    "ReduceMean",
    """(float[N,5] x) => (float[] y, float[] z) <float[5,6] w1, float[6,7] w2> {
        a = MatMul(x, w1)
        h = Relu(a)
        z = MatMul(h, w2)
        y = ReduceMean<keepdims = 0>(h)
    }""",
    units=6,
)
case(
    "reduce-nothing",
    "ReduceSum",
    """(float[N,5] x) => (float[] y) <float[5,6] w1, float[6,7] w2> {
        a = MatMul(x, w1)
        h = ReduceSum<noop_with_empty_axes = 1>(a)
        y = MatMul(h, w2)
    }""",
    units=6,
)

# ----------------------------------------------------------------------------------------------------- elementwise

_DENSE = """(float[N,5] x) => (float[{out}] y) <float[5,8] w1, float[8] b1, float[8,3] w2{constants}> {{
    h = Gemm(x, w1, b1)
    {body}
    y = MatMul(r, w2)
}}"""


def dense(
    name: str,
    ops: str,
    body: str,
    units: int = 8,
    constants: str = "",
    pinned: str = "",
    opset: int = 17,
    domains: Mapping[str, int] | None = None,
    out: str = "",
) -> None:
    """Dense layer to 8 features ``h``, the operator giving ``r``, dense layer of ``r``."""
    text = _DENSE.format(constants=", " + constants if constants else "", body=body, out=out)
    case(name, ops, text, units, (pinned,) if pinned else (), opset, domains=domains)


# What leads the features into the domain of the function, and the opset that first has it.
_UNARY = {
    "Relu": "",
    "LeakyRelu": "",
    "Sigmoid": "",
    "Tanh": "",
    "Elu": "",
    "Selu": "",
    "Celu": "",
    "ThresholdedRelu": "",
    "HardSigmoid": "",
    "HardSwish": "",
    "Softplus": "",
    "Softsign": "",
    "Erf": "",
    "Exp": "",
    "Neg": "",
    "Abs": "",
    "Sign": "",
    "Floor": "",
    "Ceil": "",
    "Round": "",
    "Sin": "",
    "Cos": "",
    "Atan": "",
    "Sinh": "",
    "Cosh": "",
    "Asinh": "",
    "Shrink": "",
    "Identity": "",
    "Tan": "Tanh",
    "Log": "Sigmoid",
    "Sqrt": "Sigmoid",
    "Reciprocal": "Sigmoid",
    "Asin": "Sigmoid",
    "Acos": "Sigmoid",
    "Atanh": "Sigmoid",
}
for _op, _before in _UNARY.items():
    # An Identity in front would be taken out; behind the operator nothing is.
    _body = f"s = {_before}(h)  r = {_op}(s)" if _before else f"r = {_op}(h)"
    dense(_op.lower(), _op, _body)
dense("acosh", "Acosh", "e = Exp(h)  s = Add(e, one)  r = Acosh(s)", constants="float one = {1.0}")
dense("mish", "Mish", "r = Mish(h)", opset=18)
dense("gelu", "Gelu", 'r = Gelu<approximate = "tanh">(h)', opset=20)
dense("swish", "Swish", "r = Swish<alpha = 1.5>(h)", opset=24)
dense("not", "Not", "c = Greater(h, b)  n = Not(c)  r = Cast<to = 1>(n)", constants="float[8] b")
dense("is-nan", "IsNaN", "l = Log(h)  n = IsNaN(l)  r = Cast<to = 1>(n)")
dense("is-inf", "IsInf", "c = Relu(h)  d = Reciprocal(c)  n = IsInf(d)  r = Cast<to = 1>(n)")
dense("clip", "Clip", "r = Clip(h, low, high)", constants="float low = {-0.4}, float high = {0.6}")
dense("clip-above", "Clip", "r = Clip(h, , high)", constants="float high = {0.2}")
dense("clip-opset-10", "Clip", "r = Clip<min = -0.4, max = 0.6>(h)", opset=10)
dense(
    "bitwise-not",
    "BitwiseNot",
    "m = Mul(h, ten)  i = Cast<to = 6>(m)  n = BitwiseNot(i)  r = Cast<to = 1>(n)",
    constants="float ten = {10.0}",
    opset=18,
)
dense("cast", "Cast", "d = Cast<to = 11>(h)  r = Cast<to = 1>(d)")
dense("dropout", "Dropout", "r = Dropout(h)")
dense("dropout-opset-7", "Dropout", "r = Dropout<ratio = 0.4>(h)", opset=7)
dense(
    "dropout-with-mask",
    "Dropout",
    "d, keep = Dropout(h)  f = Cast<to = 1>(keep)  r = Mul(d, f)",
    # The mask has the shape of the data, so it shrinks with it.
    units=8,
)
case(
    "dropout-mask-as-output",
    "Dropout",
    """(float[N,5] x) => (float[] y, bool[N,8] keep) <float[5,8] w1, float[8,3] w2> {
        h = MatMul(x, w1)
        d, keep = Dropout(h)
        y = MatMul(d, w2)
    }""",
    units=0,
    pinned="graph output 'keep'",
)

_PAIR = """(float[N,5] x) => (float[] y) <float[5,8] w1, float[5,8] w2, float[8,3] w3{constants}> {{
    a = MatMul(x, w1)
    b = MatMul(x, w2)
    {body}
    y = MatMul(r, w3)
}}"""
_BINARY = {
    **{op: (f"r = {op}(a, b)", 17) for op in ("Add", "Sub", "Mul", "Min", "Max", "Sum", "Mean")},
    "Div": ("e = Exp(b)  r = Div(a, e)", 17),
    "Pow": ("e = Exp(a)  r = Pow(e, b)", 17),
    "Mod": ("e = Exp(b)  r = Mod<fmod = 1>(a, e)", 17),
    "PRelu": ("s = Sigmoid(b)  r = PRelu(a, s)", 17),
    "Where": ("c = Greater(a, b)  r = Where(c, a, b)", 17),
    **{
        op: (f"c = Greater(a, b)  d = Less(a, z)  e = {op}(c, d)  r = Cast<to = 1>(e)", 17)
        for op in ("And", "Or", "Xor")
    },
    **{op: (f"c = {op}(a, b)  r = Cast<to = 1>(c)", 17) for op in ("Greater", "Less")},
    **{
        op: (f"c = {op}(a, b)  r = Cast<to = 1>(c)", 17) for op in ("GreaterOrEqual", "LessOrEqual")
    },
    "Equal": ("i = Cast<to = 6>(a)  j = Cast<to = 6>(b)  c = Equal(i, j)  r = Cast<to = 1>(c)", 17),
    **{
        op: (f"i = Cast<to = 6>(a)  j = Cast<to = 6>(b)  c = {op}(i, j)  r = Cast<to = 1>(c)", 18)
        for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")
    },
    "BitShift": (
        (
            "p = Abs(a)  q = Abs(b)  i = Cast<to = 12>(p)  j = Cast<to = 12>(q)"
            '  c = BitShift<direction = "LEFT">(i, j)  r = Cast<to = 1>(c)'
        ),
        17,
    ),
}
for _op, (_body, _since) in _BINARY.items():
    case(
        _op.lower(),
        _op,
        _PAIR.format(body=_body, constants=", float z = {0.1}"),
        units=8,
        opset=_since,
    )
image("prelu-per-channel", "PRelu", "r = PRelu(h, gain)", constants="float[8,1,1] gain")
image("prelu-one-slope", "PRelu", "r = PRelu(h, gain)", constants="float[1] gain")
image("add-per-channel", "Add", "r = Add(h, b)", constants="float[8,1,1] b")
image("mul-scalar", "Mul", "r = Mul(s, h)", constants="float s = {0.3}")
image("mul-itself", "Mul", "r = Mul(h, h)")
for _name, _op in (("gelu", "Gelu"), ("quick-gelu", "QuickGelu")):
    _qualified = f"com.microsoft.{_op}"
    dense(
        f"microsoft-{_name}",
        _qualified,
        f"r = {_qualified}(h)",
        domains={"com.microsoft": 1},
        out="N,3",
    )

# ------------------------------------------------------------------------------------------- reshape and transpose

_FLAT = """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[128,4] w2{constants}> {{
    h = Conv(x, w1)
    {body}
    y = MatMul(r, w2)
}}"""
for _name, _body, _constants, _opset in (
    ("flatten", "r = Flatten(h)", "", 17),
    ("reshape", "r = Reshape(h, to)", ", int64[2] to = {0, -1}", 17),
    ("reshape-literal", "r = Reshape(h, to)", ", int64[2] to = {-1, 128}", 17),
    (
        "reshape-in-steps",
        "a = Reshape(h, first)  r = Reshape(a, second)",
        ", int64[3] first = {0, 8, 16}, int64[2] second = {0, 128}",
        17,
    ),
    (
        "flatten-channels-last",
        "t = Transpose<perm = [0, 2, 3, 1]>(h)  r = Flatten<axis = 1>(t)",
        "",
        17,
    ),
):
    _op = "Flatten" if _name.startswith("flatten") else "Reshape"
    case(_name, _op, _FLAT.format(body=_body, constants=_constants), 8, opset=_opset)
case(
    "shape-driven-reshape",
    "Reshape",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[128,4] w2, int64 zero = {0}, int64[1] at = {0}, int64[1] rest = {-1}> {
        h = Conv(x, w1)
        s = Shape(h)
        n = Gather(s, zero)
        u = Unsqueeze(n, at)
        to = Concat<axis = 0>(u, rest)
        r = Reshape(h, to)
        y = MatMul(r, w2)
    }""",
    units=8,
)
case(
    "reshape-to-a-computed-shape",
    "Reshape Shape",
    """(float[N,3,6,6] x, float[A,B] like) => (float[A,4] y) <float[8,3,3,3] w1, float[128,4] w2> {
        h = Conv(x, w1)
        to = Shape(like)
        r = Reshape(h, to)
        y = MatMul(r, w2)
    }""",
    units=0,
    pinned="takes its target shape from a computation",
    # The second input has the shape of the flattened features.
    bindings={"N": 1, "A": 1, "B": 128},
)
for _op, _call, _inputs in (
    ("Slice", "Slice(d, from, to)", "int64[4] from, int64[4] to"),
    ("Pad", "Pad(d, pads)", "int64[8] pads"),
    ("Resize", 'Resize<mode = "nearest">(d, , , size)', "int64[4] size"),
    ("Expand", "Expand(d, ones)", "int64[4] ones"),
    ("Tile", "Tile(d, ones)", "int64[4] ones"),
    ("Split", "s, t = Split<axis = 2>(d, parts)", "int64[2] parts"),
):
    case(
        f"{_op.lower()}-at-run-time",
        _op,
        f"""(float[N,3,10,6] x, {_inputs}) => (float[N,4,A,B] y)
        <float[8,3,3,3] w1, float[8,8,1,1] w2, float[4,8,1,1] w3> {{
            c = Conv(x, w1)
            h = Relu(c)
            d = Conv(h, w2)
            {_call if _op == "Split" else f"s = {_call}"}
            y = Conv(s, w3)
        }}""",
        units=8,
        pinned="output of unknown shape",
        bindings={"N": 1},
    )
# Sizes computed from shapes are provably constant, and then nobody needs o.
_SIZED = """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,8,1,1] w2, float[8,3,3,3] w4{constants},
float[4,8,1,1] w3> {{
    c = Conv(x, w1)
    h = Relu(c)
    d = Conv(h, w2)
    o = Conv(x, w4)
    {body}
    y = Conv(r, w3)
}}"""
for _name, _op, _body, _constants, _units, _why in (
    (
        "resize-to-a-computed-size",
        "Resize",
        's = Shape(o)  t = Mul(s, twice)  r = Resize<mode = "nearest">(d, , , t)',
        ", int64[4] twice = {1, 1, 2, 2}",
        8 + 8,
        "graph output",
    ),
    (
        "expand-to-a-computed-shape",
        "Expand",
        "g = GlobalMaxPool(d)  s = Shape(o)  r = Expand(g, s)",
        "",
        8 + 8,
        "graph output",
    ),
    (
        "slice-to-a-computed-end",
        "Slice",
        "s = Shape(o)  l = Gather(s, last)  r = Slice(d, from, l, last)",
        ", int64[1] last = {3}, int64[1] from = {1}",
        8 + 8,
        "graph output",
    ),
    (
        "reshape-to-a-computed-size",
        "Reshape",
        "s = Shape(o)  r = Reshape(d, s)",
        "",
        8 + 8,
        "graph output",
    ),
):
    case(
        _name, _op, _SIZED.format(body=_body, constants=_constants), _units, _why, bindings={"N": 1}
    )
for _opset in (12, 17):
    case(
        f"squeeze-of-all-ones-opset-{_opset}",
        "Squeeze",
        """(float[2,3,6,6] x) => (float[2,4] y) <float[8,3,3,3] w1, float[8,4] w2> {
        h = Conv(x, w1)
        p = GlobalAveragePool(h)
        r = Squeeze(p)
        y = MatMul(r, w2)
    }""",
        # With one channel left its axis is of length one as well.
        units=8,
        opset=_opset,
    )
case(
    "squeeze",
    "Squeeze",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,4] w2, int64[2] at = {2, 3}> {
        h = Conv(x, w1)
        p = GlobalAveragePool(h)
        r = Squeeze(p, at)
        y = MatMul(r, w2)
    }""",
    units=8,
)
case(
    "squeeze-unsqueeze-opset-11",
    "Squeeze Unsqueeze",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,5] w2, float[4,5,1,1] w3> {
        h = Conv(x, w1)
        p = GlobalAveragePool(h)
        s = Squeeze<axes = [2, 3]>(p)
        m = MatMul(s, w2)
        r = Relu(m)
        u = Unsqueeze<axes = [2, 3]>(r)
        y = Conv(u, w3)
    }""",
    units=8 + 5,
    opset=11,
)
dense("unsqueeze", "Unsqueeze", "r = Unsqueeze(h, at)", constants="int64[1] at = {1}")
case(
    "transpose",
    "Transpose",
    """(float[N,3,4,4] x) => (float[] y)
    <float[8,3,3,3] w1, float[8,6] w2, float[6] b2, float[4,6,1,1] w3> {
        h = Conv(x, w1)
        t = Transpose<perm = [0, 2, 3, 1]>(h)
        m = MatMul(t, w2)
        a = Add(m, b2)
        u = Transpose<perm = [0, 3, 1, 2]>(a)
        r = Relu(u)
        y = Conv(r, w3)
    }""",
    units=8 + 6,
)
case(
    "transpose-default",
    "Transpose",
    """(float[4,5] x) => (float[] y) <float[5,8] w1, float[3,8] w2> {
        h = MatMul(x, w1)
        t = Transpose(h)
        y = MatMul(w2, t)
    }""",
    units=8,
)
for _mode in ("DCR", "CRD"):
    case(
        f"depth-to-space-{_mode.lower()}",
        "DepthToSpace",
        f"""(float[N,3,4,4] x) => (float[] y) <float[12,3,3,3] w1, float[4,3,1,1] w2> {{
            h = Conv(x, w1)
            r = Relu(h)
            d = DepthToSpace<blocksize = 2, mode = "{_mode}">(r)
            y = Conv(d, w2)
        }}""",
        units=3,
    )
case(
    "space-to-depth",
    "SpaceToDepth",
    """(float[N,3,6,6] x) => (float[] y) <float[5,3,3,3] w1, float[4,20,1,1] w2> {
        h = Conv(x, w1)
        r = Relu(h)
        d = SpaceToDepth<blocksize = 2>(r)
        y = Conv(d, w2)
    }""",
    units=5,
)

# ---------------------------------------------------------------------------------------------------- join, divide

dense(
    "concat-with-itself",
    "Concat",
    "c = Concat<axis = 1>(h, h)  r = MatMul(c, w3)",
    8 + 8,
    "float[16,8] w3",
)
dense(
    "concat-with-the-input",
    "Concat",
    "c = Concat<axis = -1>(h, x)  r = MatMul(c, w3)",
    8 + 8,
    "float[13,8] w3",
    "joins it untracked",
)
case(
    "concat-split-cascade",
    "Concat Split",
    """(float[N,5] x) => (float[] y)
    <float[5,4] w1, float[5,6] w2, int64[2] sizes = {3, 7}, float[10,3] w3> {
        a = MatMul(x, w1)
        b = MatMul(x, w2)
        c = Concat<axis = 1>(a, b)
        s, t = Split<axis = 1>(c, sizes)
        p = Relu(s)
        q = Tanh(t)
        d = Concat<axis = 1>(q, p)
        y = MatMul(d, w3)
    }""",
    units=10,
)
case(
    "concat-along-space",
    "Concat",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8,3,3,3] w2, float[4,8,1,1] w3> {
        a = Conv(x, w1)
        b = Conv(x, w2)
        c = Concat<axis = 2>(a, b)
        y = Conv(c, w3)
    }""",
    units=8,
)
case(
    "concat-class-token",
    "Concat",
    """(float[1,4,5] x) => (float[] y) <float[5,8] w1, float[1,1,8] token, float[1,5,8] place, float[8,3] w2> {
        e = MatMul(x, w1)
        c = Concat<axis = 1>(token, e)
        p = Add(c, place)
        y = MatMul(p, w2)
    }""",
    units=8,
)
_HALVES = "p = Sigmoid(s)  q = Mul(p, t)  r = MatMul(q, w3)"
dense("split", "Split", f"s, t = Split<axis = 1>(h)  {_HALVES}", 4 + 8, "float[4,8] w3", opset=13)
dense(
    "split-opset-11",
    "Split",
    "s, t = Split<axis = -1, split = [3, 5]>(h)  p = MatMul(s, w3)  q = MatMul(t, w4)  r = Add(p, q)",
    3 + 5 + 8,
    "float[3,8] w3, float[5,8] w4",
    opset=11,
)
dense(
    "split-equal-opset-11",
    "Split",
    f"s, t = Split<axis = 1>(h)  {_HALVES}",
    4 + 8,
    "float[4,8] w3",
    opset=11,
)
dense(
    "split-opset-18",
    "Split",
    "s, t, u = Split<axis = 1, num_outputs = 3>(h)"
    "  a = MatMul(s, w3)  b = MatMul(t, w4)  c = MatMul(u, w5)  r = Sum(a, b, c)",
    # Three parts of 3, 3 and 2.
    8 + 8,
    "float[3,8] w3, float[3,8] w4, float[2,8] w5",
    opset=18,
)
dense(
    "split-with-an-unused-part",
    "Split",
    "s, t = Split<axis = 1>(h, sizes)  r = MatMul(s, w3)",
    8 + 8,
    "int64[2] sizes = {6, 2}, float[6,8] w3",
)
dense(
    "slice-opset-9",
    "Slice",
    "s = Slice<axes = [1], starts = [1], ends = [6]>(h)  r = MatMul(s, w3)",
    8 + 8,
    "float[5,8] w3",
    opset=9,
)
_SLICES = {
    "slice": ("{2}", "{7}", "{1}", 5),
    "slice-negative": ("{-6}", "{-1}", "{-1}", 5),
    "slice-open-end": ("{3}", "{9223372036854775807}", "{1}", 5),
}
for _name, (_from, _to, _axis, _size) in _SLICES.items():
    dense(
        _name,
        "Slice",
        "s = Slice(h, from, to, axes)  r = MatMul(s, w3)",
        8 + 8,
        f"int64[1] from = {_from}, int64[1] to = {_to}, int64[1] axes = {_axis}, float[{_size},8] w3",
        opset=10,
    )
for _name, _from, _to, _step, _size in (
    ("slice-every-second", "{0}", "{8}", "{2}", 4),
    ("slice-reversed", "{-1}", "{-9}", "{-1}", 8),
):
    dense(
        _name,
        "Slice",
        "a = Relu(h)  b = MatMul(a, w3)  s = Slice(b, from, to, axes, step)  r = MatMul(s, w4)",
        8 + 8,
        f"int64[1] from = {_from}, int64[1] to = {_to}, int64[1] axes = {{1}}, int64[1] step = {_step}, "
        f"float[8,8] w3, float[{_size},8] w4",
        "takes every",
    )
image(
    "slice-space-and-channels",
    "Slice",
    "a = Slice(h, from, to)  r = Conv(a, w3)",
    8 + 8,
    "int64[3] from = {0, 2, 1}, int64[3] to = {9, 7, -1}, float[8,5,1,1] w3",
)
dense(
    "gather",
    "Gather",
    "r = Gather<axis = 1>(h, order)",
    constants="int64[8] order = {7, 5, 3, 1, 0, 2, 4, -2}",
)
dense(
    "gather-subset",
    "Gather",
    "g = Gather<axis = -1>(h, order)  r = MatMul(g, w3)",
    8 + 8,
    "int64[6] order = {2, 2, -1, 4, 5, 0}, float[6,8] w3",
)
dense(
    "gather-one-channel",
    "Gather",
    "g = Gather<axis = 1>(h, one)  u = Unsqueeze(g, at)  r = Mul(h, u)",
    7,
    "int64 one = {3}, int64[1] at = {1}",
    "picks it by position",
)
case(
    "gather-embedding",
    "Gather",
    """(int64[N,6] ids) => (float[] y) <float[5,8] table, float[8,3] w> {
        e = Gather(table, ids)
        h = Relu(e)
        y = MatMul(h, w)
    }""",
    units=8,
)
case(
    "gather-at-run-time",
    "Gather",
    """(float[N,5] x, int64[7] ids) => (float[] y) <float[5,6] w1, float[6,8] w2, float[7,3] w3> {
        a = MatMul(x, w1)
        h = MatMul(a, w2)
        g = Gather<axis = 1>(h, ids)
        y = MatMul(g, w3)
    }""",
    units=6,
    pinned="picks from it at run time",
)
case(
    "pad-channels",
    "Pad",
    """(float[N,3,6,6] x) => (float[] y)
    <float[4,3,3,3] w1, float[8,4,3,3] w2, int64[8] pads = {0, 2, 0, 0, 0, 2, 0, 0}, float[4,8,1,1] w3> {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        h = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(h, w2)
        p = Pad(h, pads)
        s = Add(c, p)
        r = Relu(s)
        y = Conv(r, w3)
    }""",
    # The narrow branch joins channels 2 to 5 of the wide one; what is added to padding stays.
    units=4,
    pinned="adds it as padding",
)
image(
    "pad-space",
    "Pad",
    'r = Pad<mode = "reflect">(h, pads)',
    constants="int64[8] pads = {0, 0, 1, 2, 0, 0, 2, 1}",
)
image("pad-opset-10", "Pad", "r = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1]>(h)", opset=10)
image(
    "pad-axes",
    "Pad",
    "r = Pad(h, pads, , axes)",
    constants="int64[4] pads = {1, 2, 0, 1}, int64[2] axes = {-1, 2}",
    opset=18,
)
image(
    "pad-crops-channels",
    "Pad",
    "a = Relu(h)  b = Conv(a, w3)  r = Pad(b, pads)",
    8,
    "float[9,8,1,1] w3, int64[8] pads = {0, -1, 0, 0, 0, 0, 0, 0}",
    "crops or repeats along it",
)
_DOUBLE = "float[4] by = {1.0, 1.0, 2.0, 2.0}"
image("resize-scales", "Resize", 'r = Resize<mode = "nearest">(h, , by)', constants=_DOUBLE)
image(
    "resize-opset-11",
    "Resize",
    'r = Resize<mode = "linear">(h, roi, by)',
    constants="float[0] roi = {}, float[4] by = {1.0, 1.0, 2.0, 2.0}",
    opset=11,
)
image(
    "resize-opset-10", "Resize", 'r = Resize<mode = "nearest">(h, by)', constants=_DOUBLE, opset=10
)
image(
    "resize-axes",
    "Resize",
    'r = Resize<mode = "nearest", axes = [2, 3]>(h, , , to)',
    constants="int64[2] to = {9, 7}",
    opset=18,
)
case(
    "resize-sizes",
    "Resize",
    """(float[1,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, int64[4] to = {1, 8, 9, 7}, float[4,8,1,1] w2> {
        h = Conv(x, w1)
        r = Resize<mode = "linear">(h, , , to)
        y = Conv(r, w2)
    }""",
    # The sizes name the channel count, which must follow.
    units=8,
)
image(
    "upsample",
    "Upsample",
    'r = Upsample<mode = "nearest">(h, by)',
    constants="float[4] by = {1.0, 1.0, 2.0, 2.0}",
    opset=9,
)
image(
    "upsample-opset-7",
    "Upsample",
    'r = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]>(h)',
    opset=7,
)
dense(
    "expand",
    "Expand",
    "u = Unsqueeze(h, at)  r = Expand(u, to)",
    constants="int64[1] at = {1}, int64[3] to = {1, 4, 8}",
)
dense("expand-by-ones", "Expand", "r = Expand(h, to)", constants="int64[2] to = {1, 1}")
dense(
    "expand-a-single-channel",
    "Expand",
    "a = Relu(h)  s = MatMul(a, w3)  r = Expand(s, to)",
    16,  # of the eight copies any may go
    "float[8,1] w3, int64[2] to = {1, 8}",
    "changes the length of this axis",
)
dense(
    "tile",
    "Tile",
    "u = Unsqueeze(h, at)  r = Tile(u, by)",
    constants="int64[1] at = {1}, int64[3] by = {1, 3, 1}",
)
dense(
    "tile-channels",
    "Tile",
    "a = Relu(h)  s = MatMul(a, w3)  r = Tile(s, by)",
    8,
    "float[8,4] w3, int64[2] by = {1, 2}",
    "changes the length of this axis",
)
dense(
    "shape-of-the-batch",
    "Shape",
    "s = Shape(h)  n = Gather(s, zero)  f = Cast<to = 1>(n)  r = Div(h, f)",
    constants="int64 zero = {0}",
)
dense("shape-range", "Shape", "s = Shape<end = 1>(h)  f = Cast<to = 1>(s)  r = Div(h, f)", opset=15)
dense(
    "shape-of-the-channels",
    "Div",
    # The width that is read is a constant, and stays what it was.
    "a = Relu(h)  b = MatMul(a, w3)  s = Shape(b)  n = Gather(s, last)  f = Cast<to = 1>(n)  r = Div(b, f)",
    8 + 8,
    "float[8,8] w3, int64 last = {-1}",
)

# ------------------------------------------------------------------------------------------------------- patterns

case(
    "residual",
    "Add",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[6,8,3,3] w2, float[8,6,3,3] w3, float[4,8,1,1] w4> {
        a = Conv(x, w1)
        h = Relu(a)
        b = Conv<pads = [1, 1, 1, 1]>(h, w2)
        r = Relu(b)
        c = Conv<pads = [1, 1, 1, 1]>(r, w3)
        s = Add(h, c)
        y = Conv(s, w4)
    }""",
    units=8 + 6,
)
case(
    "batch-norm-depthwise-flatten",
    "BatchNormalization Conv Flatten",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[8] gain, float[8] b, float[8] m, float[8] var, float[8,1,3,3] w2, float[32,5] w3> {
        c = Conv(x, w1)
        n = BatchNormalization(c, gain, b, m, var)
        h = Relu(n)
        d = Conv<group = 8>(h, w2)
        f = Flatten(d)
        y = MatMul(f, w3)
    }""",
    units=8,
)
case(
    "channel-shuffle",
    "Reshape Transpose",
    """(float[N,3,4,4] x) => (float[] y)
    <float[8,3,1,1] w1, int64[5] in = {0, 2, 4, 4, 4}, int64[4] out = {0, -1, 4, 4}, float[6,8,1,1] w2> {
        c = Conv(x, w1)
        h = Relu(c)
        a = Reshape(h, in)
        t = Transpose<perm = [0, 2, 1, 3, 4]>(a)
        s = Reshape(t, out)
        y = Conv(s, w2)
    }""",
    units=4,
)
case(
    "channel-shuffle-between-groups",
    "Reshape Transpose Conv",
    """(float[N,3,4,4] x) => (float[] y)
    <float[8,3,1,1] w1, float[8,4,1,1] w2, int64[5] in = {0, 2, 4, 4, 4}, int64[4] out = {0, 8, 4, 4},
     float[8,4,1,1] w3, float[4,8,1,1] w4> {
        h = Conv(x, w1)
        g = Conv<group = 2>(h, w2)
        a = Reshape(g, in)
        t = Transpose<perm = [0, 2, 1, 3, 4]>(a)
        s = Reshape(t, out)
        k = Conv<group = 2>(s, w3)
        y = Conv(k, w4)
    }""",
    # Shuffled slots: (0 1)(2 3) of the merged axis are slots 0 and 1 twice, so slots 0 and 2, 1 and 3 go together.
    units=4 + 2 + 4,
)
case(
    "pixel-shuffle",
    "Reshape Transpose",
    """(float[N,3,4,4] x) => (float[] y)
    <float[12,3,1,1] w1, int64[6] in = {0, 3, 2, 2, 4, 4}, int64[4] out = {0, 3, 8, 8}, float[6,3,1,1] w2> {
        c = Conv(x, w1)
        h = Relu(c)
        a = Reshape(h, in)
        t = Transpose<perm = [0, 1, 4, 2, 5, 3]>(a)
        s = Reshape(t, out)
        y = Conv(s, w2)
    }""",
    # Each of the three channels behind takes four in front.
    units=3,
)
case(
    "squeeze-excite",
    "GlobalAveragePool Mul",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[4,8,1,1] w2, float[8,4,1,1] w3, float[5,8,1,1] w4> {
        c = Conv(x, w1)
        h = Relu(c)
        p = GlobalAveragePool(h)
        d = Conv(p, w2)
        e = Relu(d)
        u = Conv(e, w3)
        g = Sigmoid(u)
        r = Mul(h, g)
        y = Conv(r, w4)
    }""",
    units=8 + 4,
)
_HEADS = """
    q4 = Reshape(q, in)  k4 = Reshape(k, in)  v4 = Reshape(v, in)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
    kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    l = MatMul(qt, kt)
    z = Mul(l, scale)
    p = Softmax(z)
    o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)
    om = Reshape(ot, out)
"""
case(
    "attention",
    "MatMul Softmax Reshape",
    f"""(float[N,5,6] x) => (float[] y)
    <float[6,12] we, float[1,5,12] place, float[12,12] wq, float[12] bq, float[12,12] wk, float[12,12] wv,
     float[12] bv, int64[4] in = {{0, 5, 3, 4}}, int64[3] out = {{0, 5, 12}}, float scale = {{0.5}}, float[12,12] wo,
     float[12,4] wy> {{
        e = MatMul(x, we)
        h = Add(e, place)
        qm = MatMul(h, wq)
        q = Add(qm, bq)
        k = MatMul(h, wk)
        vm = MatMul(h, wv)
        v = Add(bv, vm)
        {_HEADS}
        m = MatMul(om, wo)
        s = Add(h, m)
        y = MatMul(s, wy)
    }}""",
    # 12 of the residual stream, 4 slots of q and k (together in all three heads), 4 slots of v.
    units=12 + 4 + 4,
)
case(
    "attention-packed",
    "Gather MatMul Reshape",
    """(float[N,5,6] x) => (float[] y)
    <float[6,36] w, int64[5] in = {0, 5, 3, 3, 4}, int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2},
     int64[3] out = {0, 5, 12}, float[12,4] wy> {
        m = MatMul(x, w)
        r = Reshape(m, in)
        t = Transpose<perm = [2, 0, 3, 1, 4]>(r)
        q = Gather(t, i0)
        k = Gather(t, i1)
        v = Gather(t, i2)
        kt = Transpose<perm = [0, 1, 3, 2]>(k)
        l = MatMul(q, kt)
        p = Softmax(l)
        o = MatMul(p, v)
        ot = Transpose<perm = [0, 2, 1, 3]>(o)
        om = Reshape(ot, out)
        y = MatMul(om, wy)
    }""",
    # Slot j of q, k and v in all heads.
    units=4,
)
case(
    "shared-weight",
    "MatMul",
    """(float[N,5] a, float[N,5] b) => (float[] y)
    <float[5,8] w, float[8] c, float[8,3] u, float[8,3] v> {
        ma = MatMul(a, w)
        mb = MatMul(b, w)
        sa = Add(ma, c)
        sb = Add(mb, c)
        ra = Relu(sa)
        rb = Tanh(sb)
        ya = MatMul(ra, u)
        yb = MatMul(rb, v)
        y = Add(ya, yb)
    }""",
    units=8,
)
case(
    "shared-weight-on-both-sides",
    "MatMul",
    """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,8] w, float[8,3] w2> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w)
        r = Relu(b)
        c = MatMul(r, w)
        t = Tanh(c)
        y = MatMul(t, w2)
    }""",
    # A recurrent weight: rows and columns name the same channels.
    units=8,
)
case(
    "shared-constant-ties-layers",
    "Mul",
    """(float[N,3,6,6] x) => (float[] y)
    <float[8,3,3,3] w1, float[8,8,3,3] w2, float[1,8,1,1] g, float[4,8,1,1] w3> {
        c = Conv(x, w1)
        a = Mul(c, g)
        h = Relu(a)
        d = Conv(h, w2)
        b = Mul(d, g)
        r = Relu(b)
        y = Conv(r, w3)
    }""",
    # One constant scales both layers.
    units=8,
)
case(
    "tied-embedding",
    "Gather Gemm",
    """(int64[N] ids) => (float[] y) <float[5,8] table, float[8,6] w1, float[6,8] w2> {
        e = Gather(table, ids)
        a = MatMul(e, w1)
        r = Relu(a)
        b = MatMul(r, w2)
        s = Add(e, b)
        y = Gemm<transB = 1>(s, table)
    }""",
    units=8 + 6,
)
case(
    "tokens-through-gemm",
    "Reshape Gemm",
    """(float[N,5,6] x) => (float[] y)
    <float[6,8] w1, int64[2] flat = {-1, 8}, float[7,8] w2, float[7] b2, int64[3] back = {-1, 5, 7}, float[7,4] w3> {
        e = MatMul(x, w1)
        h = Relu(e)
        f = Reshape(h, flat)
        g = Gemm<transB = 1>(f, w2, b2)
        r = Relu(g)
        u = Reshape(r, back)
        y = MatMul(u, w3)
    }""",
    units=8 + 7,
)
case(
    "dense-block",
    "Concat BatchNormalization",
    """(float[N,3,6,6] x) => (float[] y)
    <float[4,3,3,3] w1, float[4] gain1, float[4] b1, float[4] m1, float[4] var1, float[3,4,3,3] w2,
     float[7] gain2, float[7] b2, float[7] m2, float[7] var2, float[3,7,3,3] w3, float[4,10,1,1] w4> {
        a = Conv(x, w1)
        n1 = BatchNormalization(a, gain1, b1, m1, var1)
        r1 = Relu(n1)
        b = Conv<pads = [1, 1, 1, 1]>(r1, w2)
        c = Concat<axis = 1>(a, b)
        n2 = BatchNormalization(c, gain2, b2, m2, var2)
        r2 = Relu(n2)
        d = Conv<pads = [1, 1, 1, 1]>(r2, w3)
        e = Concat<axis = -3>(c, d)
        y = Conv(e, w4)
    }""",
    units=4 + 3 + 3,
)
case(
    "grouped-with-residual",
    "Conv Add",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,1,1] w1, float[8,4,3,3] w2, float[4,8,1,1] w3> {
        h = Conv(x, w1)
        g = Conv<group = 2, pads = [1, 1, 1, 1]>(h, w2)
        s = Add(h, g)
        y = Conv(s, w3)
    }""",
    units=4,
)
case(
    "grouped-bias-from-outside",
    "Conv",
    """(float[N,3,6,6] x, float[8] c) => (float[] y) <float[8,3,1,1] w1, float[8,4,3,3] w2, float[4,8,1,1] w3> {
        h = Conv(x, w1)
        g = Conv<group = 2>(h, w2, c)
        y = Conv(g, w3)
    }""",
    units=0,
    pinned="untracked bias",
)
case(
    "layer-norm-statistics-used",
    "LayerNormalization",
    """(float[N,4,5] x) => (float[] y, float[] z)
    <float[5,6] w1, float[4,7] w2, float[4] gain> {
        a = MatMul(x, w1)
        t = Transpose<perm = [0, 2, 1]>(a)
        n, mean = LayerNormalization(t, gain)
        y = MatMul(n, w2)
        z = Mul(mean, mean)
    }""",
    units=0,
    pinned="extra output",
)
case(
    "weight-read-by-an-unknown-operator",
    "CumSum",
    """(float[N,5] x) => (float[] y) <float[5,8] w1, float[8,6] w2, float[6,3] w3, int64 axis = {0}, float[3] g> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        r = Relu(b)
        o = MatMul(r, w3)
        k = NonZero(w3)
        f = Cast<to = 1>(k)
        s = CumSum(h, axis)
        u = ReduceMax<keepdims = 0>(f)
        v = ReduceMax<keepdims = 0>(s)
        p = Add(o, u)
        y = Add(p, v)
    }""",
    units=6,
    pinned="CumSum",
)
case(
    "weight-read-whole-elsewhere",
    "Einsum",
    """(float[N,5] x, float[3,6] z) => (float[] y) <float[5,8] w1, float[8,6] w2, float[6,3] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        r = Relu(b)
        o = MatMul(r, w3)
        q = Einsum<equation = "ij,ki->kj">(w3, z)
        m = ReduceMax<keepdims = 0>(q)
        y = Add(o, m)
    }""",
    units=8,
    pinned="Einsum",
)
case(
    "broadcast-single-channel",
    "Mul",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[6,3,3,3] w2, float[1,6,1,1] w3, float[4,8,1,1] w4> {
        h = Conv(x, w1)
        c = Conv(x, w2)
        s = Conv(c, w3)
        g = Sigmoid(s)
        r = Mul(h, g)
        y = Conv(r, w4)
    }""",
    # The map of the gate has one channel for all eight.
    units=8 + 6,
    pinned="broadcasts its single channel",
)
dense(
    "unknown-operator",
    "CumSum",
    "a = Relu(h)  b = MatMul(a, w3)  r = CumSum(b, axis)",
    8,
    "float[8,8] w3, int64 axis = {1}",
    "operator CumSum (node",
)
dense(
    "unknown-domain",
    "com.microsoft.FastGelu",
    "a = Relu(h)  b = MatMul(a, w3)  r = com.microsoft.FastGelu(b)",
    8,
    "float[8,8] w3",
    "operator com.microsoft::FastGelu",
    domains={"com.microsoft": 1},
    out="N,3",
)
dense(
    "quantised-weight",
    "DequantizeLinear",
    "a = Relu(h)  q = DequantizeLinear<axis = 1>(codes, gain)  r = MatMul(a, q)",
    8 + 8,
    "int8[8,8] codes = {"
    + ", ".join(str((37 * i) % 255 - 127) for i in range(64))
    + "}, float[8] gain",
)
dense(
    "constant-nodes",
    "Add Mul",
    "s = Constant<value = float[8] {1, 2, 3, 4, 5, 6, 7, 8}>()  a = Add(h, s)"
    "  f = Constant<value_float = 0.5>()  r = Mul(a, f)",
)
case(
    "weight-behind-constant-nodes",
    "MatMul",
    """(float[N,5] x) => (float[] y) <float[8,5] w1, float[8,3] w2, float s = {2.0}> {
        t = Transpose<perm = [1, 0]>(w1)
        u = Mul(t, s)
        h = MatMul(x, u)
        i = Identity(w2)
        y = MatMul(h, i)
    }""",
    units=8,
)
case(
    "if-reads-an-outer-tensor",
    "If",
    """(float[N,5] x, bool flag) => (float[] y) <float[5,6] w1, float[6,8] w2, float[8,3] w3> {
        a = MatMul(x, w1)
        r = Relu(a)
        h = MatMul(r, w2)
        o = If(flag) <
            then_branch = yes () => (float[N,8] u) { u = Relu(h) },
            else_branch = no () => (float[N,8] v) { v = Neg(h) }
        >
        y = MatMul(o, w3)
    }""",
    units=14,
    pinned="graph output",
)
case(
    "if-reads-an-outer-weight",
    "If",
    """(float[N,5] x, bool flag) => (float[] y, float[] z) <float[5,6] w1, float[6,8] w2, float[8,3] w3> {
        a = MatMul(x, w1)
        r = Relu(a)
        h = MatMul(r, w2)
        t = Relu(h)
        y = MatMul(t, w3)
        z = If(flag) <
            then_branch = yes () => (float[8,3] u) { u = Relu(w3) },
            else_branch = no () => (float[8,3] v) { v = Neg(w3) }
        >
    }""",
    units=6,
    pinned="graph output",
)
case(
    "initialisers-as-inputs",
    "Conv",
    """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, float[8] b1, float[4,8,3,3] w2> {
        c = Conv(x, w1, b1)
        h = Relu(c)
        y = Conv(h, w2)
    }""",
    units=8,
    opset=8,
    ir=3,
    weights_as_inputs=True,
)
case(
    "channels-in-the-output",
    "MatMul",
    """(float[N,5] x) => (float[] y, float[] z) <float[5,8] w1, float[8,6] w2, float[6,3] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        z = MatMul(h, w2)
        r = Relu(z)
        y = MatMul(r, w3)
    }""",
    units=8,
    pinned="graph output 'z'",
)
case(
    "max-pool-with-indices",
    "MaxPool",
    """(float[N,3,6,6] x) => (float[] y, float[] z) <float[8,3,3,3] w1, float[6,8,1,1] w2, float[4,6,1,1] w3> {
        c = Conv(x, w1)
        h = Relu(c)
        d = Conv(h, w2)
        r, at = MaxPool<kernel_shape = [2, 2]>(d)
        y = Conv(r, w3)
        f = Cast<to = 1>(at)
        z = ReduceMax<axes = [1, 2, 3]>(f)
    }""",
    # An index counts through all channels, so they must all stay.
    units=8,
    pinned="extra output",
)
case(
    "half-precision",
    "Conv BatchNormalization Gemm",
    """(float16[N,3,6,6] x) => (float16[] y)
    <float16[8,3,3,3] w1, float16[8] gain, float16[8] b, float16[8] m, float16[8] var, float16[128,5] w2> {
        c = Conv(x, w1)
        n = BatchNormalization(c, gain, b, m, var)
        h = Relu(n)
        f = Flatten(h)
        y = Gemm(f, w2)
    }""",
    units=8,
    # Sums of 128 products, each rounded to 11 bits.
    tolerance=4e-3,
)
case(
    "double-precision",
    "Gemm",
    """(double[N,5] x) => (double[] y) <double[5,8] w1, double[8] b, double[8,3] w2> {
        g = Gemm(x, w1, b)
        h = Tanh(g)
        y = Gemm(h, w2)
    }""",
    units=8,
    tolerance=1e-13,
)


def _without_names() -> ModelProto:
    """Nodes built by the helper module, unnamed, with a bfloat-free dtype and an integer constant that two read."""
    rng = np.random.default_rng(3)
    shape = numpy_helper.from_array(np.asarray([0, 8, 4, 4], np.int64), "shape")
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)).astype(np.float32) / 5,
        "w2": rng.standard_normal((8, 8, 1, 1)).astype(np.float32) / 3,
        "w3": rng.standard_normal((4, 8, 1, 1)).astype(np.float32) / 3,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
        helper.make_node("Conv", ["d", "w3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "unnamed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 4, 4])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()] + [shape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


CASES.append(OpCase("shared-reshape-target", ("Reshape",), _without_names, units=16, opset=13))

import cases_attention  # noqa: E402, F401 (each adds its cases)
import cases_bodies  # noqa: E402, F401
import cases_einsum  # noqa: E402, F401
import cases_quantized  # noqa: E402, F401
import cases_recurrent  # noqa: E402, F401
import cases_shapes  # noqa: E402, F401
import cases_tabular  # noqa: E402, F401
