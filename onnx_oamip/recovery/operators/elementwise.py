"""Elementwise operators: activations, arithmetic, comparisons, logic, conversions."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from onnx import TensorProto

from onnx_oamip.recovery.operators.calls import Call, Function, Kernel, Tensor, UnsupportedForm

DTYPES = {
    TensorProto.FLOAT: torch.float32,
    # Models of 16 bits are trained in float32.
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}
"""Types of torch by ONNX's element type."""


def _unary(function: Callable[[Tensor], Tensor]) -> Function:
    def run(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001
        return function(x)

    return run


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def run(call: Call, a: Tensor, b: Tensor) -> Tensor:  # noqa: ARG001
        return function(a, b)

    return run


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def run(call: Call, *inputs: Tensor) -> Tensor:  # noqa: ARG001
        return reduce(function, inputs)

    return run


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _mean(call: Call, *inputs: Tensor) -> Tensor:  # noqa: ARG001
    return reduce(torch.add, inputs) / len(inputs)


def _power(a: Tensor, b: Tensor) -> Tensor:
    if b.numel() == 1 and not b.requires_grad:
        exponent = b.item()
        # The gradient by a general exponent is slower, and not finite at 0 for some.
        if exponent == 2:
            return a * a
        return torch.pow(a, exponent).to(a.dtype)
    return torch.pow(a, b).to(a.dtype)


def _modulo(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.attr("fmod", 0) else torch.remainder(a, b)


def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:  # noqa: ARG001
    return torch.where(x < 0, x * slope, x)


def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least = call.attr("min") if low is None else low.item()
    most = call.attr("max") if high is None else high.item()
    if least is None and most is None:
        return x
    if least is not None and most is not None and least <= most and x.is_floating_point():
        return F.hardtanh(x, least, most)  # one function computes its gradient, for clamp three
    return torch.clamp(x, least, most)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.attr("approximate", "none"))


def _fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.attr("alpha", 1.702) * x)


def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.attr("alpha", 1.0) * x)


def _leaky(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.attr("alpha", 0.01))


def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.attr("alpha", 1.0))


def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.attr("alpha", 1.0))


def _selu(call: Call, x: Tensor) -> Tensor:
    alpha = call.attr("alpha", 1.67326319217681884765625)
    gamma = call.attr("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


def _thresholded(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.attr("alpha", 1.0), x, torch.zeros((), dtype=x.dtype))


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return F.hardtanh(call.attr("alpha", 0.2) * x + call.attr("beta", 0.5), 0.0, 1.0)


def _shrink(call: Call, x: Tensor) -> Tensor:
    bias = call.attr("bias", 0.0)
    limit = call.attr("lambd", 0.5)
    none = torch.zeros((), dtype=x.dtype)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, none))


def _is_infinite(call: Call, x: Tensor) -> Tensor:
    found = torch.isinf(x)
    if not call.attr("detect_negative", 1):
        found &= x > 0
    if not call.attr("detect_positive", 1):
        found &= x < 0
    return found


def _shift(call: Call, a: Tensor, b: Tensor) -> Tensor:
    if call.attr("direction") == "LEFT":
        return torch.bitwise_left_shift(a, b)
    return torch.bitwise_right_shift(a, b)


def _where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:  # noqa: ARG001
    return torch.where(condition, a, b)


def _dropout(call: Call, x: Tensor, *_: Any) -> Any:
    if call.wants(1):
        return x, torch.ones_like(x, dtype=torch.bool)
    return x


def _identity(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001
    return x


def _cast(call: Call, x: Tensor) -> Tensor:
    kind = DTYPES.get(call.attr("to"))
    if kind is None:
        raise UnsupportedForm("it casts to a type that torch does not compute in")
    return x.to(kind)


def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:  # noqa: ARG001
    return x.to(like.dtype)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype))


def _inverse_or_sign(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that torch computes of floating numbers only."""
    return lambda x: function(x) if x.is_floating_point() else x


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softplus": _softplus,
    "Softsign": F.softsign,
    "Mish": lambda x: x * torch.tanh(_softplus(x)),
    "HardSwish": F.hardswish,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Sign": torch.sign,
    "Floor": _inverse_or_sign(torch.floor),
    "Ceil": _inverse_or_sign(torch.ceil),
    "Round": _inverse_or_sign(torch.round),
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
    "IsNaN": torch.isnan,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Pow": _power,
}
_AFFINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": _divide,
}
_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Sum": torch.add,
    "Max": torch.maximum,
    "Min": torch.minimum,
}

KERNELS = {
    **{("", name): Kernel(_unary(function)) for name, function in _UNARY.items()},
    **{("", name): Kernel(_binary(function)) for name, function in _BINARY.items()},
    **{
        ("", name): Kernel(_binary(function), trained_if_channels=(0, 1))
        for name, function in _AFFINE.items()
    },
    **{("", name): Kernel(_variadic(function)) for name, function in _VARIADIC.items()},
    ("", "Mean"): Kernel(_mean),
    ("", "Mod"): Kernel(_modulo),
    ("", "PRelu"): Kernel(_prelu, trained=(1,)),
    ("", "Clip"): Kernel(_clip),
    ("", "Gelu"): Kernel(_gelu),
    ("", "Swish"): Kernel(_swish),
    ("", "LeakyRelu"): Kernel(_leaky),
    ("", "Elu"): Kernel(_elu),
    ("", "Celu"): Kernel(_celu),
    ("", "Selu"): Kernel(_selu),
    ("", "ThresholdedRelu"): Kernel(_thresholded),
    ("", "HardSigmoid"): Kernel(_hard_sigmoid),
    ("", "Shrink"): Kernel(_shrink),
    ("", "IsInf"): Kernel(_is_infinite),
    ("", "BitShift"): Kernel(_shift),
    ("", "Where"): Kernel(_where),
    ("", "Dropout"): Kernel(_dropout),
    ("", "Identity"): Kernel(_identity),
    ("", "Cast"): Kernel(_cast),
    ("", "CastLike"): Kernel(_cast_like),
    ("com.microsoft", "Gelu"): Kernel(_unary(F.gelu)),
    ("com.microsoft", "FastGelu"): Kernel(_fast_gelu),
    ("com.microsoft", "QuickGelu"): Kernel(_quick_gelu),
}
