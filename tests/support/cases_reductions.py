"""Cases for pools and reductions, over channels and over other axes."""

from __future__ import annotations

from case_templates import image
from op_case import case

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
