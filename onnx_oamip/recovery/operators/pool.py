"""Pooling, and reductions over axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from onnx_oamip.recovery.operators.calls import Call, Function, Kernel, Tensor, UnsupportedForm
from onnx_oamip.recovery.operators.windows import Window, window

_MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _kernel(call: Call) -> list[int]:
    kernel = [int(n) for n in call.attr("kernel_shape")]
    if len(kernel) not in _MAXIMA:
        raise UnsupportedForm(f"it has {len(kernel)} spatial axes")
    return kernel


def _maximum(call: Call, x: Tensor) -> Tensor:
    if call.wants(1):
        raise UnsupportedForm("it gives out indices")
    frame = window(call, x, _kernel(call))
    fits = all(2 * pad <= kernel for pad, kernel in zip(frame.begin, frame.kernel, strict=True))
    padding: list[int] | int = 0
    if frame.is_symmetric and fits:
        padding = frame.begin
    else:
        x = frame.padded(x, float("-inf") if x.is_floating_point() else -128)
    function = _MAXIMA[len(frame.kernel)]
    return function(x, frame.kernel, frame.strides, padding, frame.dilations)


def _sums(frame: Window, x: Tensor) -> Tensor:
    """Sums of all windows, channel by channel."""
    flat = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones((1, 1, *frame.kernel), dtype=x.dtype, device=x.device)
    function = _CONVOLUTIONS[len(frame.kernel)]
    found = function(flat, ones, None, frame.strides, 0, frame.dilations)
    return found.reshape(*x.shape[:2], *found.shape[2:])


def _average(call: Call, x: Tensor) -> Tensor:
    frame = window(call, x, _kernel(call))
    with_padding = bool(call.attr("count_include_pad", 0))
    fits = all(2 * pad <= kernel for pad, kernel in zip(frame.begin, frame.kernel, strict=True))
    if frame.is_symmetric and fits and set(frame.dilations) == {1}:
        function = _AVERAGES[len(frame.kernel)]
        return function(x, frame.kernel, frame.strides, frame.begin, count_include_pad=with_padding)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if with_padding:
        counted = frame.padded(counted, 1.0, ends=frame.end)
        counted = F.pad(counted, [n for e in reversed(frame.extra) for n in (0, e)])
    else:
        counted = frame.padded(counted)
    return _sums(frame, frame.padded(x)) / _sums(frame, counted)


def _norm_pool(call: Call, x: Tensor) -> Tensor:
    frame = window(call, x, _kernel(call))
    power = call.attr("p", 2)
    return _sums(frame, frame.padded(x.abs().pow(power))).pow(1 / power)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _global_average(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001
    return x.mean(_spatial(x), keepdim=True)


def _global_maximum(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001
    return x.amax(_spatial(x), keepdim=True)


def _global_norm(call: Call, x: Tensor) -> Tensor:
    power = call.attr("p", 2)
    return x.abs().pow(power).sum(_spatial(x), keepdim=True).pow(1 / power)


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Function:
    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = call.numbers("axes", axes)
        if not chosen:
            if call.attr("noop_with_empty_axes", 0):
                return function(x.unsqueeze(-1), (-1,), False)
            chosen = list(range(x.dim()))
        return function(x, tuple(chosen), bool(call.attr("keepdims", 1)))

    return run


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.mean(axes, keepdim=keep) if axes else x


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep) if axes else x,
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep) if axes else x,
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(_sum(x, axes, keep)),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}


def _extreme(function: Callable[..., Tensor]) -> Function:
    def run(call: Call, x: Tensor) -> Tensor:
        axis = int(call.attr("axis", 0))
        if call.attr("select_last_index", 0):
            last = x.shape[axis] - 1
            place = last - function(x.flip(axis), axis)
        else:
            place = function(x, axis)
        return place.unsqueeze(axis) if call.attr("keepdims", 1) else place

    return run


KERNELS = {
    ("", "MaxPool"): Kernel(_maximum),
    ("", "AveragePool"): Kernel(_average),
    ("", "LpPool"): Kernel(_norm_pool),
    ("", "GlobalAveragePool"): Kernel(_global_average),
    ("", "GlobalMaxPool"): Kernel(_global_maximum),
    ("", "GlobalLpPool"): Kernel(_global_norm),
    ("", "ArgMax"): Kernel(_extreme(torch.argmax)),
    ("", "ArgMin"): Kernel(_extreme(torch.argmin)),
    **{("", name): Kernel(_reduction(function)) for name, function in _REDUCTIONS.items()},
}
