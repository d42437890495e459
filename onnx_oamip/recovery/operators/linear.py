"""Products with weights: convolutions, matrix products, Einsum."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from onnx_oamip.recovery.operators.calls import Call, Kernel, Tensor, UnsupportedForm
from onnx_oamip.recovery.operators.windows import window

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _of_rank(table: dict[int, Tensor], rank: int) -> Tensor:
    if rank not in table:
        raise UnsupportedForm(f"it has {rank} spatial axes")
    return table[rank]


def _convolution(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    frame = window(call, x, list(weight.shape[2:]))
    function = _of_rank(_CONVOLUTIONS, len(frame.kernel))
    padding: list[int] | int = 0
    if frame.is_symmetric:
        padding = frame.begin
    else:
        x = frame.padded(x)
    return function(
        x, weight, bias, frame.strides, padding, frame.dilations, int(call.attr("group", 1))
    )


def _transposed(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    strides = list(call.attr("strides", [1] * rank))
    dilations = list(call.attr("dilations", [1] * rank))
    added = list(call.attr("output_padding", [0] * rank))
    pads = list(call.attr("pads", [0] * 2 * rank))
    shape = call.attr("output_shape")
    mode = call.attr("auto_pad", "NOTSET")
    function = _of_rank(_TRANSPOSED, rank)
    group = int(call.attr("group", 1))
    y = function(x, weight, None, strides, 0, 0, group, dilations)
    sizes: list[int] = []
    for axis in reversed(range(rank)):
        length = int(y.shape[2 + axis])
        begin, end = pads[axis], pads[rank + axis]
        if shape is not None or mode.startswith("SAME"):
            wanted = x.shape[2 + axis] * strides[axis] if shape is None else shape[axis]
            total = length + added[axis] - int(wanted)
            half = total // 2
            begin, end = (total - half, half) if mode != "SAME_UPPER" else (half, total - half)
        sizes += [-begin, added[axis] - end]
    if any(sizes):
        y = F.pad(y, sizes)
    if bias is not None:
        y = y + bias.reshape(-1, *[1] * rank)
    return y


def _general(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    if call.attr("transA", 0):
        a = a.transpose(0, 1)
    if call.attr("transB", 0):
        b = b.transpose(0, 1)
    alpha = call.attr("alpha", 1.0)
    beta = call.attr("beta", 1.0)
    if c is not None and c.dim() <= 2 and a.is_floating_point():
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    y = alpha * torch.matmul(a, b)
    return y if c is None else y + beta * c


def _product(call: Call, a: Tensor, b: Tensor) -> Tensor:  # noqa: ARG001
    return torch.matmul(a, b)


def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.attr("equation"), *inputs)


KERNELS = {
    ("", "Conv"): Kernel(_convolution, trained=(1, 2)),
    ("", "ConvTranspose"): Kernel(_transposed, trained=(1, 2)),
    ("", "Gemm"): Kernel(_general, trained=(0, 1, 2)),
    ("", "MatMul"): Kernel(_product, trained=(0, 1)),
    ("", "Einsum"): Kernel(_einsum, trained=(0, 1, 2)),
}
