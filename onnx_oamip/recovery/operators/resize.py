"""Resize, Upsample and GridSample: interpolation along axes, and at given places."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from onnx_oamip.core.records import Array, Floats
from onnx_oamip.recovery.operators.calls import Call, Kernel, Tensor, UnsupportedForm, integers


def _places(call: Call, length: int, target: int, scale: float) -> Floats:
    """Coordinates in the source of every position of the result, along one axis."""
    x = np.arange(target, dtype=np.float64)
    mode = call.attr("coordinate_transformation_mode", "half_pixel")
    if call.version < 11:
        mode = "asymmetric"
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * (length - 1) / (target - 1) if target > 1 else x * 0
    if mode == "pytorch_half_pixel" and target <= 1:
        return x * 0
    if mode == "half_pixel_symmetric":
        adjustment = target / (scale * length)
        return length / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (x + 0.5) / scale - 0.5
    raise UnsupportedForm(f"its coordinate transformation is {mode}")


def _nearest(call: Call, places: Floats) -> Array:
    mode = call.attr("nearest_mode", "round_prefer_floor" if call.version >= 11 else "floor")
    if mode == "floor":
        return np.floor(places)
    if mode == "ceil":
        return np.ceil(places)
    if mode == "round_prefer_ceil":
        return np.floor(places + 0.5)
    return np.ceil(places - 0.5)


def _cubic(distance: Floats, a: float) -> Floats:
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _taps(call: Call, mode: str, places: Floats, length: int) -> list[tuple[Array, Floats]]:
    """Pairs of indices in the source and their weights."""
    if mode == "nearest":
        return [(_nearest(call, places), np.ones_like(places))]
    base = np.floor(places)
    if mode == "linear":
        share = places - base
        return [(base, 1 - share), (base + 1, share)]
    taps = []
    for step in (-1, 0, 1, 2):
        weight = _cubic(places - (base + step), call.attr("cubic_coeff_a", -0.75))
        if call.attr("exclude_outside", 0):
            inside = (base + step >= 0) & (base + step < length)
            weight = np.where(inside, weight, 0.0)
        taps.append((base + step, weight))
    total = sum(weight for _, weight in taps)
    if call.attr("exclude_outside", 0):
        taps = [(index, weight / total) for index, weight in taps]
    return taps


def _along(call: Call, x: Tensor, axis: int, target: int, scale: float) -> Tensor:
    length = int(x.shape[axis])
    mode = call.attr("mode", "nearest")
    places = _places(call, length, target, scale)
    result = None
    for index, weight in _taps(call, mode, places, length):
        inside = torch.as_tensor(index.clip(0, length - 1).astype(np.int64), device=x.device)
        part = x.index_select(axis, inside)
        if mode != "nearest":
            shape = [1] * x.dim()
            shape[axis] = target
            part = part * torch.as_tensor(weight, dtype=x.dtype, device=x.device).reshape(shape)
        result = part if result is None else result + part
    return result


def _resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    if call.version < 11:
        scales = roi
    if call.attr("antialias", 0):
        raise UnsupportedForm("it filters against aliasing")
    if call.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise UnsupportedForm("it keeps the aspect ratio")
    axes = [int(axis) % x.dim() for axis in call.attr("axes") or range(x.dim())]
    if sizes is not None and sizes.numel():
        targets = integers(sizes)
        factors = [n / x.shape[axis] for n, axis in zip(targets, axes, strict=True)]
    else:
        given = call.attr("scales") if scales is None else scales.tolist()
        factors = [float(factor) for factor in given]
        targets = [int(np.floor(x.shape[a] * f)) for a, f in zip(axes, factors, strict=True)]
    for axis, target, factor in zip(axes, targets, factors, strict=True):
        if target != x.shape[axis] or factor != 1.0:
            x = _along(call, x, axis, target, factor)
    return x


_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def _grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = call.attr("mode", "bilinear")
    return F.grid_sample(
        x,
        grid,
        mode=_MODES.get(mode, mode),
        padding_mode=call.attr("padding_mode", "zeros"),
        align_corners=bool(call.attr("align_corners", 0)),
    )


KERNELS = {
    ("", "Resize"): Kernel(_resize),
    ("", "Upsample"): Kernel(_resize),
    ("", "GridSample"): Kernel(_grid_sample),
}
