"""Checks of arrays against a model's inputs.

Every error names the array and states the finding, the expectation and a remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Model,
    Port,
)
from onnx_oamip.data import layouts, out_of_core
from onnx_oamip.data.layouts import fits
from onnx_oamip.data.out_of_core import Values
from onnx_oamip.data.unequal import Stored, UnequalArrays, as_text
from onnx_oamip.graph.batch_symbols import is_fixed

LABELS = "labels"
GROUPS = "groups"
"""Name of the array that says what each sample is a part of."""
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


def check_names(
    arrays: Mapping[str, Stored],
    model: Model,
    where: str,
    *,
    prefix: str = "",
    held_out: Collection[str] = (),
) -> None:
    """Check that every input has an array, and that every array has a meaning.

    Args:
        arrays: Arrays by name.
        model: Model that reads them.
        where: Name of the source.
        prefix: Prefix of their names in the source, that of held-out samples or none.
        held_out: Names in the source of arrays that hold held-out samples, where these arrays do not.

    Raises:
        DataError: An array is missing or unknown, or the model has no inputs.
    """
    names = [port.name for port in model.inputs]
    if not names:
        raise DataError("the model has no inputs, so there is nothing to calibrate it with.")
    missing = [name for name in names if name not in arrays]
    if missing:
        present = sorted(key for key in arrays if not key.endswith((SCALE, OFFSET)))
        listed = ", ".join(prefix + key for key in present) or "nothing"
        wanted = f"'{missing[0]}' ({expected(model.port(missing[0]))})"
        if prefix:
            raise DataError(
                f"{where} has arrays for {listed} but no '{prefix}{missing[0]}', held-out samples for the model's "
                f"input {wanted}; add it, or leave out the arrays that begin with '{prefix}'."
            )
        if held_out and not present:
            raise DataError(
                f"{where} has arrays for {', '.join(sorted(held_out))} alone, which are held out, but none for the "
                f"model's input {wanted}; add an array '{missing[0]}' of calibration samples."
            )
        raise DataError(
            f"{where} has arrays for {listed} but the model's input is {wanted}; name the array after the input."
        )
    allowed = {*names, LABELS, GROUPS}
    for name in names:
        allowed |= {name + SCALE, name + OFFSET}
    extra = sorted(set(arrays) - allowed)
    if extra:
        raise DataError(
            f"{where} has an array '{prefix}{extra[0]}' that is no input of the model; inputs are {', '.join(names)}, "
            "and 'labels' and 'groups' are optional."
        )


def check_scaling(
    arrays: Mapping[str, Stored],
    array: Stored,
    port: Port,
    model: Model,
    where: str,
) -> Scaling | None:
    """Read the scale and the offset of an input.

    Args:
        arrays: All arrays by name.
        array: Array of the input.
        port: The input.
        model: The model; a key that is the name of another input is no scale.
        where: Name of the source.

    Returns:
        Scale and offset, each replaced by 1 or 0 if only the other one is given; None if neither is.

    Raises:
        DataError: A factor is not finite or does not broadcast to a sample.
    """
    names = {other.name for other in model.inputs}
    given = {key: value for key, value in arrays.items() if key not in names}
    scale = _factor(given, port.name + SCALE, array, port, where)
    offset = _factor(given, port.name + OFFSET, array, port, where)
    if scale is None and offset is None:
        return None
    if scale is None:
        scale = np.ones((), np.float32)
    if offset is None:
        offset = np.zeros((), np.float32)
    return Scaling(scale, offset)


def _factor(
    arrays: Mapping[str, Stored],
    key: str,
    array: Stored,
    port: Port,
    where: str,
) -> Array | None:
    """A scale or an offset: one number, or numbers that broadcast to a sample, for example one per channel."""
    if key not in arrays:
        return None
    given = arrays[key]
    is_number = np.issubdtype(given.dtype, np.number) and given.dtype.kind != "c"
    if isinstance(given, UnequalArrays) or not is_number:
        raise DataError(f"{where}: '{key}' must hold finite numbers.")
    if isinstance(array, UnequalArrays):
        sample: tuple[int, ...] = (1,) * (len(port.dims) - 1)
    else:
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
    if value.size == 1:
        return np.asarray(value.reshape(()), np.float32)
    return value


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """True if numpy broadcasts a shape to the target."""
    if len(shape) > len(target):
        return False
    pairs = zip(shape[::-1], target[::-1], strict=False)
    return all(length in (1, wanted) for length, wanted in pairs)


def expected(port: Port) -> str:
    """Describe the array that an input takes.

    Args:
        port: Input of a model.

    Returns:
        Type and shape, such as ``float32 [N, 3, 32, 32]``.
    """
    dims = ", ".join("?" if dim is None else str(dim) for dim in port.dims)
    kind = "text" if port.dtype == object else port.dtype
    return f"{kind} [{dims}]"


def check_type(
    array: Stored,
    port: Port,
    *,
    scaled: bool,
    where: str,
) -> None:
    """Check the type of an array.

    Args:
        array: Samples along axis 0.
        port: Input that takes them.
        scaled: True if a scale or an offset turns the stored codes into values.
        where: Name of the source.

    Raises:
        DataError: The type is not that of the input.
    """
    label = f"{where}: array '{port.name}'"
    takes_text = port.dtype == object
    if array.dtype == object:
        if takes_text:
            advice = ""
        else:
            advice = "; give numbers, or for unequal lengths a list of arrays"
        raise DataError(f"{label} holds Python objects; expected {expected(port)}{advice}.")
    accepted = array.dtype == port.dtype or (takes_text and array.dtype.kind == "U")
    if scaled:
        accepted = np.issubdtype(array.dtype, np.number)
    if not accepted:
        kind = "str" if takes_text else str(port.dtype)
        hint = f"; convert it with array.astype('{kind}')"
        if array.dtype.kind == "U":
            hint = "; give the numbers that the texts stand for"
        elif array.dtype.kind in "iu" and port.dtype.kind not in "iub":
            hint += f", or say what its codes mean with '{port.name}.scale'"
        elif array.dtype.kind == "f" and port.dtype.kind in "iu":
            hint = "; give the whole numbers that the model takes, a conversion would cut fractions"
        raise DataError(f"{label} is {array.dtype} but the model expects {expected(port)}{hint}.")


def check_finite(array: Stored, port: Port, where: str) -> None:
    """Check that all values of an array are numbers.

    Args:
        array: Samples along axis 0.
        port: Input that takes them.
        where: Name of the source.

    Raises:
        DataError: There are NaN or infinite values.
    """
    if array.dtype.kind not in "fcV":
        return
    wrong = out_of_core.first_not_finite(_values(array))
    if wrong is None:
        return
    if isinstance(array, UnequalArrays):
        row = array.sample_of(wrong.row)
    else:
        row = wrong.row
    hint = ""
    if wrong.only_negative_infinity:
        hint = ", and where -inf masks something, write the type's lowest number"
    raise DataError(
        f"{where}: array '{port.name}' has NaN or infinite values, first in sample {row}; clean the data{hint}."
    )


def _values(array: Stored) -> Values:
    if isinstance(array, UnequalArrays):
        return array.values
    return array


def find_layouts(
    arrays: Mapping[str, Stored],
    model: Model,
    where: str,
    labelled: int | None = None,
) -> tuple[dict[str, layouts.Layout], int]:
    """Find the layout of every array, and the number of samples.

    Args:
        arrays: Array of every input.
        model: The model.
        where: Name of the source.
        labelled: Number of labels, which decides where shapes leave a choice; None without labels.

    Returns:
        Layouts by input, and the number of samples.

    Raises:
        DataError: An array does not fit its input, the arrays hold unequal numbers of samples, or none.
    """
    found = layouts.find(arrays, model, labelled)
    if found is None:
        counts = {name: length(array) for name, array in arrays.items()}
        most = max(counts.values())
        for port in model.inputs:
            _check_shape(arrays[port.name], port, model, where, count=most)
        odd = next((p for p in model.inputs if counts[p.name] != most), model.inputs[-1])
        raise DataError(
            f"{where} holds unequal numbers of samples ({counts}), or mixes layouts: '{odd.name}' is "
            f"{_shape_of(arrays[odd.name])}; for {most} samples give {layouts.accepted(odd, model, most)}."
        )
    if not found[1]:
        raise DataError(
            f"{where} holds no samples; at least one is needed, a few hundred are better."
        )
    return found


def length(array: Stored) -> int:
    """Count the entries of axis 0.

    Args:
        array: Any array.

    Returns:
        Number of samples if axis 0 counts them, 1 for a single number.
    """
    if isinstance(array, UnequalArrays) or array.ndim:
        return len(array)
    return 1


def _shape_of(array: Stored) -> str:
    if isinstance(array, UnequalArrays):
        return f"{len(array)} arrays of unequal shapes"
    return str(array.shape)


def _check_shape(array: Stored, port: Port, model: Model, where: str, *, count: int) -> None:
    """Raise DataError if an array fits its input in no layout."""
    if next(layouts.candidates(array, port, model), None) is not None:
        return
    rank = len(port.dims)
    hint = ""
    if isinstance(array, UnequalArrays):
        samples = array.shapes.tolist()
        place = next((i for i, s in enumerate(samples) if not fits(s, port.dims)), 0)
        found = f"shape {tuple(samples[place])} in sample {place}"
    else:
        found = f"shape {array.shape}"
        hint = _transpose_hint(array, port)
    several = len(model.inputs) > 1 or bool(port.dims and is_fixed(port.dims[0]))
    if several and not hint:
        hint = f"; give {layouts.accepted(port, model, count)}"
    elif not isinstance(array, UnequalArrays) and (
        array.ndim not in (rank, rank + 1) or not array.ndim
    ):
        hint = ": axis 0 counts samples"
        if array.ndim == rank - 1 and fits(array.shape, port.dims[1:]):
            hint += "; for one sample write array[None]"
    raise DataError(
        f"{where}: array '{port.name}' has {found} but the model expects {expected(port)}{hint}."
    )


def _transpose_hint(array: Values, port: Port) -> str:
    """Hint for an array whose channels are on the other side."""
    for order in _LAYOUT_CHANGES:
        if len(order) == array.ndim == len(port.dims):
            transposed = tuple(array.shape[axis] for axis in order[1:])
            if fits(transposed, port.dims[1:]):
                return f"; the layout fits after array.transpose({', '.join(map(str, order))})"
    return ""


def check_labels(given: Stored, count: int, where: str) -> Array:
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
    if isinstance(given, UnequalArrays):
        raise DataError(
            f"{where}: 'labels' has arrays of unequal shapes; give every sample labels of one shape, or leave them out."
        )
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


def check_groups(given: Stored, count: int, where: str) -> Array:
    """Check the groups of samples.

    Args:
        given: Groups, samples along axis 0.
        count: Number of samples.
        where: Name of the source.

    Returns:
        One number or text per sample (count,).

    Raises:
        DataError: The groups are neither whole numbers nor texts, or not one per sample.
    """
    if isinstance(given, UnequalArrays) or given.size != count or given.shape[:1] != (count,):
        shape = "arrays of unequal shapes" if isinstance(given, UnequalArrays) else given.shape
        raise DataError(
            f"{where}: 'groups' has {shape}; expected ({count},), one number or text per sample."
        )
    groups = as_text(np.asarray(given))
    if groups.dtype.kind not in "biuU":
        raise DataError(f"{where}: 'groups' is {groups.dtype}; expected whole numbers or texts.")
    return groups.reshape(count)
