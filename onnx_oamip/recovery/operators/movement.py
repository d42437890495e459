"""Operators that move elements: reshapes, joins, slices, gathers, padding; and those that read or make lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import numpy_helper

from onnx_oamip.recovery.operators.calls import (
    Call,
    Kernel,
    Tensor,
    UnsupportedForm,
    integers,
    padded,
)
from onnx_oamip.recovery.operators.elementwise import DTYPES

# ------------------------------------------------------------------------------------------------------ shapes


def _reshape(call: Call, x: Tensor, target: Tensor | None = None) -> Tensor:
    sizes = call.numbers("shape", target) or []
    if not call.attr("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = int(call.attr("axis", 1))
    axis = axis + x.dim() if axis < 0 else axis
    rows = int(np.prod(x.shape[:axis], dtype=np.int64))
    return x.reshape(rows, -1)


def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = call.numbers("axes", axes)
    if chosen is None:
        return x.squeeze()
    return x.squeeze(tuple(chosen))


def _unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = call.numbers("axes", axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call, x: Tensor) -> Tensor:
    order = call.attr("perm") or list(reversed(range(x.dim())))
    return x.permute(*order)


def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:  # noqa: ARG001
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(integers(shape))))


def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:  # noqa: ARG001
    return x.repeat(integers(repeats))


def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    block = int(call.attr("blocksize"))
    n, c, h, w = x.shape
    if call.attr("mode", "DCR") == "DCR":
        parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = int(call.attr("blocksize"))
    n, c, h, w = x.shape
    order = (0, 3, 5, 1, 2, 4) if call.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(*order)
    return parts.reshape(n, c * block**2, h // block, w // block)


# ----------------------------------------------------------------------------------------- joins, splits and slices


def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, int(call.attr("axis", 1)))


def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> Any:
    axis = int(call.attr("axis", 0))
    lengths = call.numbers("split", sizes)
    if lengths is None:
        parts = int(call.attr("num_outputs", len(call.node.outputs)))
        each = -(-x.shape[axis] // parts)
        lengths = [min(each, max(x.shape[axis] - i * each, 0)) for i in range(parts)]
    return tuple(torch.split(x, lengths, axis))


def _slice(
    call: Call,
    x: Tensor,
    *lists: Tensor | None,
) -> Tensor:
    starts, ends, axes, steps = padded(lists, 4)
    first = call.numbers("starts", starts) or []
    last = call.numbers("ends", ends) or []
    along = call.numbers("axes", axes) or list(range(len(first)))
    by = call.numbers("steps", steps) or [1] * len(first)
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        begin, stop, stride = slice(start, end, step).indices(x.shape[axis])
        if stride > 0:
            places = [slice(None)] * x.dim()
            places[axis] = slice(begin, max(stop, begin), stride)
            x = x[tuple(places)]
        else:
            index = torch.arange(begin, stop, stride, device=x.device)
            x = x.index_select(axis, index)
    return x


def _within(index: Tensor, length: int) -> Tensor:
    index = index.long()
    return torch.where(index < 0, index + length, index)


def _gather(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = int(call.attr("axis", 0)) % x.dim()
    places = _within(index, x.shape[axis])
    if places.dim() == 0:
        return x.select(axis, int(places))
    found = x.index_select(axis, places.reshape(-1))
    return found.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = int(call.attr("axis", 0))
    return x.gather(axis, _within(index, x.shape[axis]))


def _gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    batched = int(call.attr("batch_dims", 0))
    depth = index.shape[-1]
    rows = int(np.prod(x.shape[:batched], dtype=np.int64))
    data = x.reshape(rows, *x.shape[batched:])
    places = index.reshape(rows, -1, depth).long()
    lengths = torch.as_tensor(x.shape[batched : batched + depth], device=index.device)
    places = torch.where(places < 0, places + lengths, places)
    row = torch.arange(rows, device=index.device).reshape(-1, 1).expand(places.shape[:2])
    found = data[(row, *places.unbind(-1))]
    return found.reshape(*index.shape[:-1], *x.shape[batched + depth :])


_SCATTERED = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis = int(call.attr("axis", 0))
    places = _within(index, x.shape[axis])
    how = call.attr("reduction", "none")
    if how == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _SCATTERED[how], include_self=True)


def _scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    how = call.attr("reduction", "none")
    if how not in ("none", "add"):
        raise UnsupportedForm(f"its reduction is {how}")
    lengths = torch.as_tensor(x.shape[: index.shape[-1]], device=index.device)
    places = torch.where(index < 0, index + lengths, index).long()
    return x.index_put(tuple(places.unbind(-1)), updates, accumulate=how == "add")


_PADDINGS = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(
    call: Call,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    given = call.numbers("pads", pads) or []
    along = [axis % x.dim() for axis in (integers(axes) if axes is not None else range(x.dim()))]
    begin, end = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(along):
        begin[axis], end[axis] = given[place], given[len(along) + place]
    mode = call.attr("mode", "constant")
    if mode == "constant":
        fill = call.attr("value", 0.0) if value is None else value.item()
        sizes = [n for axis in reversed(range(x.dim())) for n in (begin[axis], end[axis])]
        return F.pad(x, sizes, value=fill)
    for axis in range(x.dim()):
        if begin[axis] or end[axis]:
            x = x.index_select(axis, _sources(x.shape[axis], begin[axis], end[axis], mode, x))
    return x


def _sources(length: int, begin: int, end: int, mode: str, like: Tensor) -> Tensor:
    """Index of the element that every place of a padded axis repeats."""
    places = np.arange(-begin, length + end)
    if mode == "edge":
        found = places.clip(0, length - 1)
    elif mode == "wrap":
        found = places % length
    else:
        period = max(2 * (length - 1), 1)
        found = np.abs((places + period // 2) % period - period // 2) if length > 1 else places * 0
    return torch.as_tensor(found, device=like.device)


def _triangle(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if call.attr("upper", 1) else torch.tril(x, diagonal)


def _running_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis.item())
    if call.attr("reverse", 0):
        x = x.flip(along)
    y = x.cumsum(along, dtype=x.dtype)
    if call.attr("exclusive", 0):
        y = y - x
    return y.flip(along) if call.attr("reverse", 0) else y


def _largest(call: Call, x: Tensor, k: Tensor) -> Any:
    # A stable sort: of equal elements the first ones are taken.
    axis = int(call.attr("axis", -1))
    values, places = torch.sort(x, axis, descending=bool(call.attr("largest", 1)), stable=True)
    count = int(k.item())
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _one_hot(call: Call, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    length = int(depth.item())
    axis = int(call.attr("axis", -1))
    places = _within(index, length)
    hot = places.unsqueeze(-1) == torch.arange(length, device=index.device)
    found = torch.where(hot, values[1], values[0])
    return found.movedim(-1, axis if axis >= 0 else found.dim() + axis)


def _reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time = int(call.attr("time_axis", 0))
    batch = int(call.attr("batch_axis", 1))
    steps = torch.arange(x.shape[time], device=x.device).reshape(-1, 1)
    limit = lengths.reshape(1, -1)
    places = torch.where(steps < limit, limit - 1 - steps, steps)
    if time > batch:
        places = places.transpose(0, 1)
    shape = [1] * x.dim()
    shape[time], shape[batch] = x.shape[time], x.shape[batch]
    return x.gather(time, places.reshape(shape).expand(x.shape))


# ----------------------------------------------------------------------------------------------------- lengths


def _shape(call: Call, x: Tensor) -> Tensor:
    sizes = list(x.shape)[call.attr("start", 0) : call.attr("end")]
    return torch.as_tensor(sizes, dtype=torch.int64)


def _size(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001
    return torch.as_tensor(x.numel(), dtype=torch.int64)


def _fill(call: Call, shape: Tensor) -> Tensor:
    given = call.attr("value")
    if given is None:
        return torch.zeros(integers(shape))
    value = numpy_helper.to_array(given).reshape(-1)[0]
    kind = DTYPES.get(given.data_type)
    if kind is None:
        raise UnsupportedForm("it makes a type that torch does not compute in")
    return torch.full(integers(shape), value.item(), dtype=kind)


def _range(call: Call, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:  # noqa: ARG001
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _eye(call: Call, x: Tensor) -> Tensor:
    kind = DTYPES.get(call.attr("dtype"), x.dtype)
    rows, columns = x.shape
    ones = torch.ones(rows, columns, dtype=kind)
    offset = int(call.attr("k", 0))
    return torch.tril(torch.triu(ones, offset), offset)


def _nonzero(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001
    return x.nonzero().transpose(0, 1)


KERNELS = {
    ("", "Reshape"): Kernel(_reshape),
    ("", "Flatten"): Kernel(_flatten),
    ("", "Squeeze"): Kernel(_squeeze),
    ("", "Unsqueeze"): Kernel(_unsqueeze),
    ("", "Transpose"): Kernel(_transpose),
    ("", "Expand"): Kernel(_expand),
    ("", "Tile"): Kernel(_tile),
    ("", "DepthToSpace"): Kernel(_depth_to_space),
    ("", "SpaceToDepth"): Kernel(_space_to_depth),
    ("", "Concat"): Kernel(_concat),
    ("", "Split"): Kernel(_split),
    ("", "Slice"): Kernel(_slice),
    ("", "Gather"): Kernel(_gather, trained=(0,)),
    ("", "GatherElements"): Kernel(_gather_elements),
    ("", "GatherND"): Kernel(_gather_nd),
    ("", "ScatterElements"): Kernel(_scatter_elements),
    ("", "ScatterND"): Kernel(_scatter_nd),
    ("", "Pad"): Kernel(_pad),
    ("", "Trilu"): Kernel(_triangle),
    ("", "CumSum"): Kernel(_running_sum),
    ("", "TopK"): Kernel(_largest),
    ("", "OneHot"): Kernel(_one_hot),
    ("", "ReverseSequence"): Kernel(_reverse_sequence),
    ("", "Shape"): Kernel(_shape),
    ("", "Size"): Kernel(_size),
    ("", "ConstantOfShape"): Kernel(_fill),
    ("", "Range"): Kernel(_range),
    ("", "EyeLike"): Kernel(_eye),
    ("", "NonZero"): Kernel(_nonzero),
}
