"""Checks of arrays against a model's inputs.

Every error names the array and states the finding, the expectation and a remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Model,
    Port,
)
from onnx_oamip.data import out_of_core
from onnx_oamip.data.out_of_core import Values

LABELS = "labels"
SCALE = ".scale"
"""Suffix of the array that holds an input's scale."""
OFFSET = ".offset"
"""Suffix of the array that holds an input's offset."""
_LAYOUT_CHANGES = ((0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1), (0, 4, 1, 2, 3), (0, 2, 3, 4, 1))
"""Transpositions from channels last to channels first and back."""


class Scaling(NamedTuple):
    """Scale and offset (float32) that turn stored codes into values."""

    scale: Array
    offset: Array


def check_names(arrays: Mapping[str, Values], model: Model, where: str) -> None:
    """Check that every input has an array, and that every array has a meaning.

    Args:
        arrays: Arrays by name.
        model: Model that reads them.
        where: Name of the source.

    Raises:
        DataError: An array is missing or unknown, or the model has no inputs.
    """
    names = [port.name for port in model.inputs]
    if not names:
        raise DataError("the model has no inputs, so there is nothing to calibrate it with.")
    missing = [name for name in names if name not in arrays]
    if missing:
        present = sorted(key for key in arrays if not key.endswith((SCALE, OFFSET)))
        listed = ", ".join(present) or "nothing"
        raise DataError(
            f"{where} has arrays for {listed} but the model's input is '{missing[0]}' "
            f"({expected(model.port(missing[0]))}); name the array after the input."
        )
    allowed = {*names, LABELS}
    for name in names:
        allowed |= {name + SCALE, name + OFFSET}
    extra = sorted(set(arrays) - allowed)
    if extra:
        raise DataError(
            f"{where} has an array '{extra[0]}' that is no input of the model; inputs are {', '.join(names)}, "
            "and 'labels' is optional."
        )


def check_scaling(
    arrays: Mapping[str, Values], array: Values, port: Port, where: str
) -> Scaling | None:
    """Read the scale and the offset of an input.

    Args:
        arrays: All arrays by name.
        array: Array of the input.
        port: The input.
        where: Name of the source.

    Returns:
        Scale and offset, each replaced by 1 or 0 if only the other one is given; None if neither is.

    Raises:
        DataError: A factor is not finite or does not broadcast to a sample.
    """
    scale = _factor(arrays, port.name + SCALE, array, port, where)
    offset = _factor(arrays, port.name + OFFSET, array, port, where)
    if scale is None and offset is None:
        return None
    if scale is None:
        scale = np.ones((), np.float32)
    if offset is None:
        offset = np.zeros((), np.float32)
    return Scaling(scale, offset)


def _factor(
    arrays: Mapping[str, Values], key: str, array: Values, port: Port, where: str
) -> Array | None:
    """A scale or an offset: one number, or numbers that broadcast to a sample, for example one per channel."""
    if key not in arrays:
        return None
    given = arrays[key]
    if not np.issubdtype(given.dtype, np.number) or given.dtype.kind == "c":
        raise DataError(f"{where}: '{key}' must hold finite numbers.")
    sample = array.shape[array.ndim - len(port.dims) + 1 :]
    if given.size != 1 and not _broadcasts(given.shape, sample):
        raise DataError(
            f"{where}: '{key}' has shape {given.shape}, which does not broadcast to a sample's {sample}; give one "
            "number, or one for every channel as (C, 1, 1)."
        )
    # Read only now that the shape is known to be small: a file may claim a huge one.
    value = np.asarray(given)
    if not np.isfinite(value).all():
        raise DataError(f"{where}: '{key}' must hold finite numbers.")
    value = value.astype(np.float32)
    return np.asarray(value.reshape(()), np.float32) if value.size == 1 else value


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """True if numpy broadcasts a shape to the target."""
    if len(shape) > len(target):
        return False
    pairs = zip(shape[::-1], target[::-1], strict=False)
    return all(length in (1, wanted) for length, wanted in pairs)


def _fits(shape: tuple[int, ...], dims: tuple[int | str | None, ...]) -> bool:
    """True if the shape has every length that is fixed."""
    pairs = zip(shape, dims, strict=True)
    return all(not _is_fixed(wanted) or length == wanted for length, wanted in pairs)


def _is_fixed(dim: int | str | None) -> bool:
    return isinstance(dim, int) and dim > 0


def expected(port: Port) -> str:
    """Describe the array that an input takes.

    Args:
        port: Input of a model.

    Returns:
        Type and shape, such as ``float32 [N, 3, 32, 32]``.
    """
    dims = ", ".join("?" if dim is None else str(dim) for dim in port.dims)
    return f"{port.dtype} [{dims}]"


def check_array(array: Values, port: Port, *, scaled: bool, where: str) -> None:
    """Check type, shape and values of an array.

    Args:
        array: Samples along axis 0.
        port: Input that takes them.
        scaled: True if a scale or an offset turns the stored codes into values.
        where: Name of the source.

    Raises:
        DataError: The array does not fit the input, or holds NaN or infinite values.
    """
    label = f"{where}: array '{port.name}'"
    _check_type(array, port, scaled, label)
    _check_shape(array, port, label)
    if array.dtype.kind in "fcV":
        _check_finite(array, label)


def _check_type(array: Values, port: Port, scaled: bool, label: str) -> None:
    if array.dtype == object:
        raise DataError(f"{label} holds Python objects; expected {expected(port)}.")
    accepted = array.dtype == port.dtype
    if scaled:
        accepted = np.issubdtype(array.dtype, np.number)
    if not accepted:
        hint = f"; convert it with array.astype('{port.dtype}')"
        if array.dtype.kind in "iu":
            hint += f", or say what its codes mean with '{port.name}.scale'"
        raise DataError(f"{label} is {array.dtype} but the model expects {expected(port)}{hint}.")


def _check_shape(array: Values, port: Port, label: str) -> None:
    rank = len(port.dims)
    if array.ndim not in (rank, rank + 1) or array.ndim == 0:
        one_sample = array.ndim == rank - 1 and _fits(array.shape, port.dims[1:])
        hint = "; for one sample write array[None]" if one_sample else ""
        raise DataError(
            f"{label} has shape {array.shape} but the model expects {expected(port)}: axis 0 counts samples{hint}."
        )
    # In a batched array axis 0 counts samples, whatever batch the model is fixed to.
    dims = port.dims[1:] if array.ndim == rank else port.dims
    if not _fits(array.shape[1:], dims):
        hint = _transpose_hint(array, port)
        raise DataError(
            f"{label} has shape {array.shape} but the model expects {expected(port)}{hint}."
        )


def _transpose_hint(array: Values, port: Port) -> str:
    """Hint for an array whose channels are on the other side."""
    for order in _LAYOUT_CHANGES:
        if len(order) == array.ndim == len(port.dims):
            transposed = tuple(array.shape[axis] for axis in order[1:])
            if _fits(transposed, port.dims[1:]):
                return f"; the layout fits after array.transpose({', '.join(map(str, order))})"
    return ""


def _check_finite(array: Values, label: str) -> None:
    wrong = out_of_core.first_not_finite(array)
    if wrong is None:
        return
    hint = ""
    if wrong.only_negative_infinity:
        hint = ", and where -inf masks something, write the type's lowest number"
    raise DataError(
        f"{label} has NaN or infinite values, first in sample {wrong.row}; clean the data{hint}."
    )


def check_count(arrays: Mapping[str, Values], where: str) -> int:
    """Check that all arrays hold the same number of samples.

    Args:
        arrays: Samples by input, at least one input.
        where: Name of the source.

    Returns:
        The number of samples.

    Raises:
        DataError: There are no samples, or unequal numbers of them.
    """
    counts = {name: len(array) for name, array in arrays.items()}
    count = min(counts.values())
    if count == 0:
        raise DataError(
            f"{where} holds no samples; at least one is needed, a few hundred are better."
        )
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{where} holds unequal numbers of samples ({counts}); axis 0 of every array counts samples."
        )
    return count


def check_labels(given: Values, count: int, where: str) -> Array:
    """Check labels. Their fit to an output of the model is for the objective to say.

    Args:
        given: Labels, samples along axis 0.
        count: Number of samples.
        where: Name of the source.

    Returns:
        The labels in memory: int64 or floats.

    Raises:
        DataError: The labels are no numbers, not one entry per sample, or negative classes.
    """
    if given.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: 'labels' is {given.dtype}; expected integers, one class per sample, or floats."
        )
    if given.ndim == 0 or len(given) != count:
        raise DataError(
            f"{where}: 'labels' has shape {given.shape}; expected ({count},), one class per sample, or more axes "
            "behind that one."
        )
    # Read only now that the shape is checked: a file may claim a huge one.
    labels = np.asarray(given)
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise DataError(f"{where}: 'labels' has NaN or infinite values; clean the data.")
        return labels
    if labels.size and labels.max() > np.iinfo(np.int64).max:
        raise DataError(
            f"{where}: 'labels' has the class {int(labels.max())}, which exceeds int64."
        )
    if labels.size and labels.min() < 0:
        raise DataError(
            f"{where}: 'labels' has the negative class {int(labels.min())}; classes count from 0."
        )
    return labels.astype(np.int64)
