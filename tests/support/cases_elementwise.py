"""Cases for functions of one tensor and of two, element by element."""

from __future__ import annotations

from case_templates import dense, image
from op_case import case

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
for _name, _op in (("gelu", "Gelu"), ("quick-gelu", "QuickGelu"), ("fast-gelu", "FastGelu")):
    _qualified = f"com.microsoft.{_op}"
    dense(
        f"microsoft-{_name}",
        _qualified,
        f"r = {_qualified}(h)",
        domains={"com.microsoft": 1},
        out="N,3",
    )
