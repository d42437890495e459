"""Layouts of arrays: the axis that counts samples, found from the shapes of all inputs together.

An array for an input of rank r has one of these layouts:

- ``feed``: rank r + 1, every index of axis 0 is one whole feed;
- ``batch``: rank r, samples along the batch axis. That is axis 0 of most inputs, and another one of recurrent states
  such as ``[layers, batch, hidden]``, whose samples may stand on axis 0 of the array or on the batch axis itself;
- ``shared``: the shape of one feed of a batch of 1, which all feeds get: a state, a template, a sampling rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from onnx_oamip.core.records import Array, Model, Port
from onnx_oamip.data.unequal import Stored, UnequalArrays
from onnx_oamip.graph import batch_symbols
from onnx_oamip.graph.batch_symbols import is_fixed

Dims = tuple[int | str | None, ...]


class Layout(NamedTuple):
    """Layout of one array.

    Attributes:
        kind: ``feed``, ``batch`` or ``shared``.
        axis: Batch axis of the input; None if it has none. A shared value is repeated along it.
        moved: True if samples stand on the batch axis of the array instead of its axis 0.
    """

    kind: Literal["feed", "batch", "shared"]
    axis: int | None = 0
    moved: bool = False


class Candidate(NamedTuple):
    """A layout that an array may have, and the number of samples that it then holds (None: any)."""

    layout: Layout
    samples: int | None


def fits(shape: Sequence[int], dims: Dims) -> bool:
    """Compare a shape with the dimensions of an input.

    Args:
        shape: Shape of an array.
        dims: Dimensions.

    Returns:
        True if the shape has as many axes and every length that is fixed.
    """
    if len(shape) != len(dims):
        return False
    return all(
        not is_fixed(want) or length == want for length, want in zip(shape, dims, strict=True)
    )


def batch_axes(port: Port, model: Model) -> tuple[int, ...]:
    """List the axes of an input that may be the batch.

    Args:
        port: Input of the model.
        model: The model.

    Returns:
        Axes, the likeliest first.
    """
    return batch_symbols.batch_axes(port, model.inputs, model.outputs)


def batch_axis(port: Port, model: Model) -> int | None:
    """Choose the likeliest batch axis of an input.

    Args:
        port: Input of the model.
        model: The model.

    Returns:
        The axis, None if there is none.
    """
    return next(iter(batch_axes(port, model)), None)


def is_batched_freely(port: Port, model: Model) -> bool:
    """Test for an input whose axis 0 is a batch of any size.

    Args:
        port: Input of the model.
        model: The model.

    Returns:
        True if it is.
    """
    return batch_axis(port, model) == 0 and not is_fixed(port.dims[0])


def candidates(array: Stored, port: Port, model: Model) -> Iterator[Candidate]:
    """Iterate over the layouts that an array may have by its shape.

    Args:
        array: Array of an input.
        port: The input.
        model: The model.

    Yields:
        Layouts, the likeliest first.
    """
    dims = port.dims
    axes = batch_axes(port, model)
    if isinstance(array, UnequalArrays):
        yield from _unequal(array, dims, axes)
        return
    shape = array.shape
    if fits(shape[1:], dims) and shape:
        yield Candidate(Layout("feed", axes[0] if axes else None), shape[0])
    if len(shape) != len(dims):
        return
    for axis in axes:
        if fits(shape[1:], without(dims, axis)):
            yield Candidate(Layout("batch", axis), shape[0])
    for axis in axes:
        if axis and not is_fixed(dims[axis]) and fits(shape, dims):
            yield Candidate(Layout("batch", axis, moved=True), shape[axis])
    if (not dims or is_fixed(dims[0])) and fits(shape, dims):
        yield from _shared(shape, dims, axes, model)


def _shared(
    shape: tuple[int, ...],
    dims: Dims,
    axes: Sequence[int],
    model: Model,
) -> Iterator[Candidate]:
    """Layout of an input with the same value in all feeds: with a batch axis of length 1, or without a batch axis."""
    single = next((axis for axis in axes if shape[axis] == 1), None)
    if single is not None:
        grows = not is_fixed(dims[single])
        yield Candidate(Layout("shared", single if grows else None), None)
        return
    leading = {port.dims[0] for port in model.inputs if port.dims} | {
        batch_symbols.batch_symbol(model.inputs, model.outputs)
    }
    if all(isinstance(dims[axis], str) and dims[axis] not in leading for axis in axes):
        # Axes of other lengths, such as the edges of a graph.
        yield Candidate(Layout("shared", None), None)


def _unequal(
    array: UnequalArrays,
    dims: Dims,
    axes: Sequence[int],
) -> Iterator[Candidate]:
    """Layouts of arrays of unequal shapes: whole feeds, or samples that lack the batch axis."""
    shapes = np.unique(array.shapes, axis=0).tolist()
    if all(fits(shape, dims) for shape in shapes):
        yield Candidate(Layout("feed", axes[0] if axes else None), len(array))
    for axis in axes:
        if all(fits(shape, without(dims, axis)) for shape in shapes):
            yield Candidate(Layout("batch", axis), len(array))


def without(dims: Dims, axis: int) -> Dims:
    """Leave out one axis.

    Args:
        dims: Dimensions.
        axis: The axis.

    Returns:
        The other dimensions.
    """
    return (*dims[:axis], *dims[axis + 1 :])


def find(
    arrays: Mapping[str, Stored], model: Model, labelled: int | None = None
) -> tuple[dict[str, Layout], int] | None:
    """Find the layout of every array.

    Args:
        arrays: Arrays by input.
        model: The model.
        labelled: Number of labels, which decides where shapes leave a choice; None without labels.

    Returns:
        Layouts by input and the number of samples; None if no number of samples fits all arrays.
    """
    possible = {p.name: list(candidates(arrays[p.name], p, model)) for p in model.inputs}
    counts = [c.samples for found in possible.values() for c in found[:1]]
    counts += [c.samples for found in possible.values() for c in found]
    if labelled in counts:
        counts.insert(0, labelled)
    for count in dict.fromkeys(count for count in counts if count is not None):
        chosen = {
            name: next((c.layout for c in found if c.samples in (count, None)), None)
            for name, found in possible.items()
        }
        layouts = {name: layout for name, layout in chosen.items() if layout is not None}
        if len(layouts) == len(possible) and _batches_agree(layouts, model):
            return layouts, count
    if all(c.samples is None for found in possible.values() for c in found[:1]) and all(
        possible.values()
    ):
        return {name: found[0].layout for name, found in possible.items()}, 1
    return None


def doubt(arrays: Mapping[str, Stored], layouts: Mapping[str, Layout], model: Model) -> str:
    """State that samples may stand on another axis of an array than the one that was taken.

    Args:
        arrays: Arrays by input, as they were given.
        layouts: Their layouts.
        model: The model.

    Returns:
        A note where an array also fits with more samples on its batch axis; else empty.
    """
    for port in model.inputs:
        layout, array = layouts[port.name], arrays[port.name]
        if (
            isinstance(array, UnequalArrays)
            or layout.kind != "batch"
            or layout.moved
            or not layout.axis
        ):
            continue
        moved = Layout("batch", layout.axis, moved=True)
        others = [c.samples for c in candidates(array, port, model) if c.layout == moved]
        taken = array.shape[0]
        if others and others[0] is not None and others[0] > taken:
            return (
                f"'{port.name}' {array.shape} is taken for {taken} samples along axis 0; if it holds {others[0]} along "
                f"axis {layout.axis}, move that axis to the front"
            )
    return ""


def _batches_agree(layouts: Mapping[str, Layout], model: Model) -> bool:
    """Check that the batched inputs can take the same number of samples at a time."""
    sizes = batch_sizes(layouts, model)
    whole = any(layout.kind == "feed" for layout in layouts.values())
    return len(sizes) < 2 and not (whole and sizes - {1})


def batch_sizes(layouts: Mapping[str, Layout], model: Model) -> set[int]:
    """Collect the batches that the model fixes.

    Args:
        layouts: Layouts by input.
        model: The model.

    Returns:
        Fixed lengths of the batch axes of batched arrays.
    """
    sizes = set()
    for port in model.inputs:
        kind, axis, _ = layouts[port.name]
        dim = None if axis is None else port.dims[axis]
        if kind == "batch" and isinstance(dim, int) and dim > 0:
            sizes.add(dim)
    return sizes


def arranged(array: Stored, layout: Layout) -> Stored:
    """Bring the samples of an array to axis 0.

    Args:
        array: Array as it was given.
        layout: Its layout.

    Returns:
        The array with samples on axis 0; a shared one has length 1 there.
    """
    if isinstance(array, UnequalArrays):
        return array
    if layout.kind == "shared":
        return np.asarray(array)[None]
    if layout.moved and layout.axis:
        return np.ascontiguousarray(np.moveaxis(np.asarray(array), layout.axis, 0))
    return array


def feed_of(stored: Stored, layout: Layout, index: Array) -> Array:
    """Take the samples of one feed.

    Args:
        stored: Array with samples on axis 0.
        layout: Its layout.
        index: Indices of the samples, one if feeds are whole.

    Returns:
        The value of the input, without scale.
    """
    first = int(index[0])
    if layout.kind == "feed":
        return stored[first]
    if layout.kind == "shared":
        value = stored[0]
        axis = layout.axis
        if axis is None or len(index) == 1:
            return value
        return np.repeat(value, len(index), axis=axis)
    if isinstance(stored, UnequalArrays):
        value = stored[first][None]
    else:
        value = stored[index]
    return np.moveaxis(value, 0, layout.axis or 0)


def feed_shape(stored: Stored, layout: Layout, place: int) -> tuple[int, ...]:
    """Compute the shape of an input in a feed of one sample.

    Args:
        stored: Array with samples on axis 0.
        layout: Its layout.
        place: Index of the sample.

    Returns:
        The shape.
    """
    if isinstance(stored, UnequalArrays):
        shape = stored.shapes[place].tolist()
    else:
        shape = stored.shape[1:]
    if layout.kind != "batch":
        return tuple(shape)
    axis = layout.axis or 0
    return (*shape[:axis], 1, *shape[axis:])


def accepted(port: Port, model: Model, count: int) -> str:
    """Describe the arrays that an input takes.

    Args:
        port: Input of the model.
        model: The model.
        count: Number of samples.

    Returns:
        Shapes with their meanings.
    """
    words = []
    for axis in batch_axes(port, model)[:1]:
        words.append(f"{_shape(count, without(port.dims, axis))} with samples along axis 0")
    words.append(f"{_shape(count, port.dims)} with one whole feed per index")
    if not port.dims or is_fixed(port.dims[0]):
        words.append(f"{_shape(None, port.dims)} for all samples")
    if len(words) > 1:
        return ", ".join(words[:-1]) + f" or {words[-1]}"
    return words[0]


def _shape(count: int | None, dims: Dims) -> str:
    lengths = [str(count)] if count is not None else []
    lengths += ["?" if dim is None else str(dim) for dim in dims]
    return f"({', '.join(lengths)}{',' if len(lengths) == 1 else ''})"
