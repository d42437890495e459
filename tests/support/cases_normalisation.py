"""Cases for normalisation over batches, instances, groups of channels, neighbours and tokens."""

from __future__ import annotations

from case_templates import image
from op_case import case

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
    "group-normalization-of-one-group",
    "GroupNormalization",
    "r = GroupNormalization<num_groups = 1>(h, gain, b)",
    # The one unit cannot go: it is listed with the node that joined its channels.
    units=1,
    constants="float[8] gain, float[8] b",
    pinned="GroupNormalization 'GroupNormalization_1' joins them into one unit",
    opset=21,
    out="N,4,6,6",
)
_SEAM = """(float[N,3,6,6] x) => (float[N,4,6,6] y)
<float[6,3,1,1] w1, float[4,3,3,3] w2, float[4,10,1,1] w3{constants}> {{
    a = Conv(x, w1)
    b = Conv<pads = [1, 1, 1, 1]>(x, w2)
    h = Concat<axis = 1>(a, b)
    {body}
    s = Relu(r)
    y = Conv(s, w3)
}}"""
case(
    "group-normalization-across-a-seam",
    "GroupNormalization",
    _SEAM.format(
        constants=", float[10] gain, float[10] beta",
        body="r = GroupNormalization<num_groups = 2>(h, gain, beta)",
    ),
    # Groups of five hold channels of both layers: as units they would tie the layers to each other.
    units=6 + 4,
    opset=21,
)
case(
    "group-normalization-up-to-a-seam",
    "GroupNormalization",
    _SEAM.format(
        constants=", float[10] gain, float[10] beta",
        body="r = GroupNormalization<num_groups = 5>(h, gain, beta)",
    ),
    units=3 + 2,
    opset=21,
)
case(
    "group-normalization-across-a-seam-written-out",
    "InstanceNormalization Reshape",
    _SEAM.format(
        constants=", int64[3] in = {0, 2, -1}, int64[4] out = {0, 10, 6, 6}, float[2] ones = {1.0, 1.0}, "
        "float[2] none = {0.0, 0.0}",
        body="g = Reshape(h, in)  i = InstanceNormalization(g, ones, none)  r = Reshape(i, out)",
    ),
    units=6 + 4,
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

# -------------------------------------------------------------------------------------- order of positions

for _reverse, _exclusive in ((0, 0), (1, 0), (0, 1)):
    tokens(
        f"running-sum-of-tokens-{_reverse}-{_exclusive}",
        "CumSum",
        f"r = CumSum<reverse = {_reverse}, exclusive = {_exclusive}>(h, axis)",
        6 + 7,
        "int64 axis = {-2}",
    )
tokens(
    "running-sum-of-channels",
    "CumSum",
    "r = CumSum(h, axis)",
    6,
    "int64 axis = {2}",
    "sums along it",
)
tokens(
    "running-sum-along-a-computed-axis",
    "CumSum",
    "s = Shape<start = 1, end = 2>(x)  i = Mod(s, two)  q = Squeeze(i)  v = Add(q, one)  r = CumSum(h, v)",
    6 + 7,
    "int64[1] two = {2}, int64 one = {1}",
)
tokens(
    "reversed-tokens",
    "ReverseSequence",
    "s = Shape<end = 1>(x)  n = Expand(three, s)  r = ReverseSequence<batch_axis = 0, time_axis = 1>(h, n)",
    6 + 7,
    "int64[1] three = {3}",
)
