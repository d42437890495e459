"""Quantisation: codes are whole numbers in float32, and the gradient passes through the rounding inside the range."""

from __future__ import annotations

from typing import Any

import torch

from onnx_oamip.recovery.operators.calls import Call, Kernel, Tensor, UnsupportedForm

RANGES = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
}
"""Smallest and largest code by type of the codes."""


def _along(call: Call, values: Tensor, x: Tensor) -> Tensor:
    """Scales or zero points, one for all or one per index of an axis, as they broadcast to the data."""
    if call.attr("block_size", 0):
        raise UnsupportedForm("it has scales per block")
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[int(call.attr("axis", 1))] = -1
    return values.reshape(shape)


def _quantise(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    kind = None if call.type is None else call.type.name
    if kind not in RANGES:
        raise UnsupportedForm(f"its codes are {kind or 'of an unknown type'}")
    low, high = RANGES[kind]
    ratio = x / _along(call, scale, x)
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    if zero is not None:
        rounded = rounded + _along(call, zero, x).to(x.dtype)
    return rounded.clamp(low, high)


def _dequantise(call: Call, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    values = codes.to(scale.dtype)
    if zero is not None:
        values = values - _along(call, zero, codes).to(scale.dtype)
    return values * _along(call, scale, codes)


def _dynamic(call: Call, x: Tensor) -> Any:  # noqa: ARG001
    low = x.detach().min().clamp(max=0.0)
    high = x.detach().max().clamp(min=0.0)
    scale = (high - low) / 255
    zero = torch.round((-low / scale).clamp(0, 255))
    ratio = x / scale
    codes = ratio + (torch.round(ratio) - ratio).detach() + zero
    return codes.clamp(0, 255), scale, zero


KERNELS = {
    ("", "QuantizeLinear"): Kernel(_quantise),
    ("", "DequantizeLinear"): Kernel(_dequantise),
    ("", "DynamicQuantizeLinear"): Kernel(_dynamic),
}
