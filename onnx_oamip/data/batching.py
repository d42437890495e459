"""Trial of a model on its samples: several at a time, or one at a time if the model takes no more."""

from __future__ import annotations

from dataclasses import replace

from onnx_oamip.core.errors import ModelError
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.layouts import feed_shape
from onnx_oamip.graph.runtime import Session

ALONE = "the model refuses several samples in one run, so they run one at a time"


def tried(session: Session, samples: Samples, size: int) -> Samples:
    """Run the model on the first samples.

    A model may take any batch by its inputs and still refuse more than one sample, for example if a Reshape has the
    batch of 1 of its export. It then runs on one sample at a time.

    Args:
        session: The model.
        samples: Samples to run it on.
        size: Largest number of samples in a run.

    Returns:
        The samples, fixed to a batch of 1 if the model takes no more.

    Raises:
        ModelError: The model cannot be run on the samples.
        OutOfMemory: The memory does not suffice.
    """
    index = next(samples.feed_indices(size))
    try:
        session.run(samples.feed(index))
    except ModelError as error:
        fed = ", ".join(
            f"'{name}' {feed_shape(stored, samples.layouts[name], 0)}"
            for name, stored in samples.arrays.items()
        )
        refusal = ModelError(f"{str(error).rstrip('.')} (one sample was fed as {fed}).")
        if len(index) == 1 or samples.fixed_batch:
            raise refusal from error
        try:
            session.run(samples.feed(index[:1]))
        except ModelError:
            raise refusal from error
        return replace(samples, fixed_batch=1, notes=(*samples.notes, ALONE))
    return samples


def alike(samples: Samples, other: Samples | None) -> Samples | None:
    """Fix further samples to the batch that was found for the first ones.

    Args:
        samples: Samples that were tried.
        other: Further samples of the same model, or None.

    Returns:
        The further samples.
    """
    if other is None or other.whole or samples.whole:
        return other
    return replace(other, fixed_batch=samples.fixed_batch)
