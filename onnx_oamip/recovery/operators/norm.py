"""Normalisations, in inference form, and softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from onnx_oamip.recovery.operators.calls import Call, Kernel, Tensor, UnsupportedForm


def _batch(call: Call, x: Tensor, *constants: Tensor) -> Tensor:
    scale, bias, mean, variance = constants
    if call.attr("training_mode", 0) or call.wants(1):
        raise UnsupportedForm("it is in training mode")
    return F.batch_norm(
        x, mean, variance, scale, bias, training=False, eps=call.attr("epsilon", 1e-5)
    )


def _along_channels(values: Tensor, rank: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (rank - 2))


def _instance(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    axes = tuple(range(2, x.dim()))
    y = _standardised(x, axes, call.attr("epsilon", 1e-5))
    return y * _along_channels(scale, x.dim()) + _along_channels(bias, x.dim())


def _standardised(x: Tensor, axes: tuple[int, ...], epsilon: float) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    return centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)


def _group(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = int(call.attr("num_groups"))
    parts = x.reshape(x.shape[0], groups, -1)
    y = _standardised(parts, (2,), call.attr("epsilon", 1e-5)).reshape(x.shape)
    if call.version < 21:  # one number per group
        repeats = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return y * _along_channels(scale, x.dim()) + _along_channels(bias, x.dim())


def _layer(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis = int(call.attr("axis", -1)) % x.dim()
    epsilon = call.attr("epsilon", 1e-5)
    if not call.wants(1) and not call.wants(2) and scale.shape == x.shape[axis:]:
        return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)
    axes = tuple(range(axis, x.dim()))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)
    y = centred * inverse * scale
    return (y if bias is None else y + bias), mean, inverse


def _root_mean_square(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axis = int(call.attr("axis", -1)) % x.dim()
    axes = tuple(range(axis, x.dim()))
    inverse = torch.rsqrt((x * x).mean(axes, keepdim=True) + call.attr("epsilon", 1e-5))
    return x * inverse * scale


def _local_response(call: Call, x: Tensor) -> Tensor:
    size = int(call.attr("size"))
    squares = (x * x).unsqueeze(1).flatten(3) if x.dim() > 2 else (x * x).reshape(*x.shape, 1)
    squares = squares.reshape(x.shape[0], 1, x.shape[1], -1)
    squares = F.pad(squares, (0, 0, (size - 1) // 2, size // 2))
    sums = F.avg_pool2d(squares, (size, 1), stride=1) * size
    alpha, beta = call.attr("alpha", 1e-4), call.attr("beta", 0.75)
    base = call.attr("bias", 1.0) + alpha / size * sums.reshape(x.shape)
    return x / base.pow(beta)


def _by_norm(call: Call, x: Tensor) -> Tensor:
    power = int(call.attr("p", 2))
    length = torch.linalg.vector_norm(x, ord=power, dim=int(call.attr("axis", -1)), keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length.clamp_min(1e-38))


def _mean_variance(call: Call, x: Tensor) -> Tensor:
    axes = tuple(int(axis) for axis in call.attr("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt((centred * centred).mean(axes, keepdim=True)) + 1e-9)


def _softmax_of(function: Any) -> Any:
    def run(call: Call, x: Tensor) -> Tensor:
        if call.version >= 13:
            return function(x, int(call.attr("axis", -1)))
        axis = int(call.attr("axis", 1)) % max(x.dim(), 1)
        rows = x.reshape(*x.shape[:axis], -1)  # one softmax over all later axes
        return function(rows, -1).reshape(x.shape)

    return run


def _largest(x: Tensor, axis: int) -> Tensor:
    place = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, place, 1.0)


KERNELS = {
    ("", "BatchNormalization"): Kernel(_batch, trained=(1, 2)),
    ("", "InstanceNormalization"): Kernel(_instance, trained=(1, 2)),
    ("", "GroupNormalization"): Kernel(_group, trained=(1, 2)),
    ("", "LayerNormalization"): Kernel(_layer, trained=(1, 2)),
    ("", "RMSNormalization"): Kernel(_root_mean_square, trained=(1,)),
    ("", "LRN"): Kernel(_local_response),
    ("", "LpNormalization"): Kernel(_by_norm),
    ("", "MeanVarianceNormalization"): Kernel(_mean_variance),
    ("", "Softmax"): Kernel(_softmax_of(torch.softmax)),
    ("", "LogSoftmax"): Kernel(_softmax_of(torch.log_softmax)),
    ("", "Hardmax"): Kernel(_softmax_of(_largest)),
}
