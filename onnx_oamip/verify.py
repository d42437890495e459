"""Proof that a pruned model is what it claims to be. A failed gate means that nothing is written.

Gates: the checker with full shape inference; ONNX Runtime loads and runs it, at two batch sizes where the batch is
symbolic; before refit it equals the original with removed channels zeroed at their consumers; the budget is met.
Measurements: relative output error, top-1 agreement, accuracy where labels are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from .calibrate import Progress
from .data import Samples
from .errors import GateFailed
from .records import Array, Ints, Model, Port, Verification
from .runtime import Session
from .shapes import symbol

TOLERANCE = 1e-4
"""Largest difference between pruned and masked outputs, relative to the output's scale (float32)."""
TOLERANCE_HALF = 2e-2
"""The same for half-precision outputs, whose own rounding is about 1e-3 a layer."""


@dataclass
class _Measured:
    """Running comparison of two models over batches."""

    squared: float = 0.0
    scale: float = 0.0
    worst: float = 0.0
    largest: float = 0.0
    agree: int = 0
    right_before: int = 0
    right_after: int = 0
    ranked: int = 0
    labelled: int = 0


def structure(proto: onnx.ModelProto) -> None:
    """Gate 1: valid ONNX with consistent shapes. Raises GateFailed."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker raises several types
        text = str(error).strip().splitlines()[0][:300]
        raise GateFailed(f"the pruned model fails the ONNX checker: {text}.") from error


def difference(reference: Session, other: Session, samples: Samples, batch_size: int) -> float:
    """Largest absolute difference over the largest reference magnitude, over all floating outputs and samples."""
    worst, largest = 0.0, 0.0
    for _, feed in samples.batches(batch_size):
        for a, b in zip(reference.run(feed), other.run(feed), strict=True):
            if _is_float(a):
                gap = _largest(a.astype(np.float64) - b.astype(np.float64))
                if not np.isfinite(gap):  # NaN loses every comparison: it must not slip through max()
                    return float("inf")
                worst = max(worst, gap)
                largest = max(largest, _largest(a))
            elif not np.array_equal(a, b):
                return float("inf")
    return worst / largest if largest else (0.0 if worst == 0 else float("inf"))


def tolerance(model: Model) -> float:
    """How far pruned and masked may differ, by the precision of the model's outputs."""
    half = any(p.dtype.itemsize < 4 and _is_float(np.zeros(0, p.dtype)) for p in model.outputs)
    return TOLERANCE_HALF if half else TOLERANCE


def _is_float(array: Array) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating)) or "float" in array.dtype.name


def _largest(array: Array) -> float:
    return float(np.abs(array.astype(np.float64)).max(initial=0.0))


def compare(
    model: Model, before: Session, after: Session, samples: Samples, batch_size: int, progress: Progress | None = None
) -> Verification:
    """Output error, agreement and accuracy of ``after`` against ``before`` on evaluation data."""
    total = samples.usable()
    found = _Measured()
    ranked = head(model)
    for index, feed in samples.batches(batch_size):
        old, new = before.run(feed), after.run(feed)
        for a, b in zip(old, new, strict=True):
            if _is_float(a):
                a64, b64 = a.astype(np.float64), b.astype(np.float64)
                found.squared += float(np.square(a64 - b64).sum())
                found.scale += float(np.square(a64).sum())
        if ranked is not None:
            _rank(found, old[ranked], new[ranked], samples, index)
        if progress:
            progress("verify", int(index[-1]) + 1, total)
    return Verification(
        masked_equivalence=None,
        output_relative_error=float(np.sqrt(found.squared / found.scale)) if found.scale else None,
        agreement=found.agree / found.ranked if found.ranked else None,
        accuracy_before=found.right_before / found.labelled if found.labelled else None,
        accuracy_after=found.right_after / found.labelled if found.labelled else None,
        batches=(),
        samples=total,
    )


def head(model: Model) -> int | None:
    """Index of the classification head: the first floating output of shape (samples, classes)."""
    for i, port in enumerate(model.outputs):
        shape = model.shapes.get(port.name)
        if shape is not None and len(shape) == 2 and shape[1] > 1 and _is_float(np.zeros(0, port.dtype)):
            return i
    return None


def _rank(found: _Measured, old: Array, new: Array, samples: Samples, index: Ints) -> None:
    a, b = _top(old), _top(new)
    found.agree += int((a == b).sum())
    found.ranked += len(a)
    labels = samples.labels
    if labels is not None:
        truth = labels[index].reshape(-1)
        if len(truth) == len(a):
            found.right_before += int((a == truth).sum())
            found.right_after += int((b == truth).sum())
            found.labelled += len(a)


def _top(logits: Array) -> Ints:
    return np.asarray(logits.astype(np.float64).argmax(axis=-1), np.int64)


def runs_at(model: Model, session: Session, samples: Samples) -> tuple[int, ...]:
    """Gate 2: batch sizes at which the pruned model ran with outputs of the right length. Raises GateFailed."""
    sizes = [1] if samples.whole else [samples.fixed_batch] if samples.fixed_batch else [1, 2]
    for size in sizes:
        assert size is not None
        index = np.arange(size, dtype=np.int64) % samples.count
        outputs = session.run(samples.feed(index))
        for port, value in zip(model.outputs, outputs, strict=True):
            if not samples.whole and _leads_with_batch(model, port) and len(value) != size:
                raise GateFailed(
                    f"the pruned model gives {len(value)} rows in '{port.name}' for a batch of {size}."
                )
            if _is_float(value) and not np.isfinite(value.astype(np.float64)).all():
                raise GateFailed(f"the pruned model gives NaN or infinity in '{port.name}'.")
    return tuple(s for s in sizes if s is not None)


def _leads_with_batch(model: Model, port: Port) -> bool:
    first = model.inputs[0]
    return bool(port.dims and first.dims) and symbol(port, 0) == symbol(first, 0) and port.dims[0] == first.dims[0]
