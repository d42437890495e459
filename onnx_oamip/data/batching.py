"""Trial of a model on its samples: several at a time, or one at a time if it takes no more or mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Array, Ints
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.layouts import feed_shape
from onnx_oamip.graph.runtime import Session

ALONE = "the model refuses several samples in one run, so they run one at a time"
MIXED = "several samples in one run change each other's outputs, so they run one at a time"
UNCOUNTED = (
    "no output grows with the samples of a run, so they run one at a time; if {} counts no samples, give whole feeds, "
    "with one more axis in front"
)
ELSEWHERE = "output '{}' counts samples on axis {}, so they run one at a time"
TOLERANCE = 0.1
"""Relative error of a sample's outputs in a batch, above which the samples are mixed; quantisation makes less."""


def tried(session: Session, samples: Samples, size: int) -> Samples:
    """Run the model on the first samples, and on the largest one where their shapes are unequal.

    A model may take any batch by its inputs and still not treat samples alike: it refuses more than one if a Reshape
    has the batch of 1 of its export, mixes them if that Reshape takes the rest as another axis or if the axis of the
    samples is none of the batch, or counts them on another axis of an output or on none. It then runs on one sample at
    a time.

    Args:
        session: The model.
        samples: Samples to run it on.
        size: Largest number of samples in a run.

    Returns:
        The samples, fixed to a batch of 1 if the model does not treat several alike.

    Raises:
        ModelError: The model cannot be run on the samples.
        OutOfMemory: The memory does not suffice.
    """
    index = next(samples.feed_indices(size))
    try:
        together = session.run(samples.feed(index))
    except ModelError as error:
        if len(index) == 1 or samples.fixed_batch:
            raise _refusal(error, samples, int(index[0])) from error
        _run_one(session, samples, int(index[0]))
        return _alone(samples, ALONE)
    if samples.unequal:
        _run_one(session, samples, samples.largest())
    if len(index) == 1 or samples.fixed_batch:
        return samples
    # The last sample as well: one that depends on those in front of it, as a step of a sequence does, shows there.
    alone = [_run_one(session, samples, int(index[place])) for place in (0, -1)]
    if all(batch.shape == one.shape for batch, one in zip(together, alone[0], strict=True)):
        return _alone(samples, UNCOUNTED.format(_batch_of(samples)))
    for place, outputs in zip((0, -1), alone, strict=True):
        note = _mixes(together, outputs, session.outputs, len(index), place)
        if note:
            return _alone(samples, note)
    return samples


def _batch_of(samples: Samples) -> str:
    """The axis of the first input that counts samples, for a note."""
    name, axis = next(
        (n, layout.axis) for n, layout in samples.layouts.items() if layout.kind == "batch"
    )
    return f"axis {axis} of '{name}'"


def _run_one(session: Session, samples: Samples, place: int) -> list[Array]:
    """Outputs for one sample."""
    try:
        return session.run(samples.feed(_index(place)))
    except ModelError as error:
        raise _refusal(error, samples, place) from error


def _index(place: int) -> Ints:
    return np.asarray([place], np.int64)


def _refusal(error: ModelError, samples: Samples, place: int) -> ModelError:
    """The error with the shapes that were fed."""
    fed = ", ".join(
        f"'{name}' {feed_shape(stored, samples.layouts[name], place)}"
        for name, stored in samples.arrays.items()
    )
    if samples.origin is None:
        number = place
    else:
        number = int(samples.origin[place])
    return ModelError(f"{str(error).rstrip('.')} (sample {number} was fed as {fed}).")


def _alone(samples: Samples, note: str) -> Samples:
    return replace(samples, fixed_batch=1, notes=(*samples.notes, note))


def _mixes(
    together: Sequence[Array],
    single: Sequence[Array],
    names: Sequence[str],
    count: int,
    place: int,
) -> str:
    """The reason why several samples are not like the one at a place; empty if they are, or if nothing shows it."""
    for batch, one, name in zip(together, single, names, strict=True):
        axis = _batch_axis(batch.shape, one.shape, count)
        if axis is None or not np.issubdtype(one.dtype, np.floating):
            continue
        rows = np.arange(one.shape[axis]) + place * one.shape[axis]
        beside, apart = (v.astype(np.float64) for v in (np.take(batch, rows, axis=axis), one))
        known = np.isfinite(beside) & np.isfinite(apart)  # masked scores are infinite
        error = np.linalg.norm(beside[known] - apart[known])
        if error > TOLERANCE * np.linalg.norm(apart[known]):
            return MIXED
        if axis:
            return ELSEWHERE.format(name, axis)
    return ""


def _batch_axis(
    batch: Sequence[int],
    one: Sequence[int],
    count: int,
) -> int | None:
    """The only axis that grows with the number of samples; None if there is none, or several."""
    if len(batch) != len(one):
        return None
    grown = [axis for axis in range(len(one)) if batch[axis] != one[axis]]
    if len(grown) != 1 or batch[grown[0]] != count * one[grown[0]]:
        return None
    return grown[0]


def alike(
    session: Session,
    samples: Samples,
    other: Samples | None,
) -> Samples | None:
    """Fix further samples to the batch that was found for the first ones, and run the largest of unequal ones.

    Args:
        session: The model.
        samples: Samples that were tried.
        other: Further samples of the same model, or None.

    Returns:
        The further samples.

    Raises:
        ModelError: The model cannot be run on the largest sample.
    """
    if other is not None and other.unequal:
        _run_one(session, other, other.largest())
    if other is None or other.whole or samples.whole:
        return other
    return replace(other, fixed_batch=samples.fixed_batch)
