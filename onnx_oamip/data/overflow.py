"""Diagnosis of activations that are not finite: the tensor, the samples, the first faulty node, and advice.

A model that overflows has no outputs to be compared with, so a tensor that scores depend on must be finite on all
samples. Infinities that no consumer of a unit reads are accepted: masks added to attention scores, logits of classes
that are ruled out, a logarithm of 0 that is masked afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.options.run import ACTIVATION_MEMORY
from onnx_oamip.core.records import (
    Array,
    Bools,
    Ints,
    Model,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.outputs import float_activations, with_outputs
from onnx_oamip.graph.partial_execution import Slicer
from onnx_oamip.graph.runtime import Session

Feed = Mapping[str, Array]


@dataclass(frozen=True)
class _Scan:
    """Values of one tensor over all samples.

    Attributes:
        faulty: Samples with a value that is not finite, ascending.
        first: A feed with such a sample; None if there is none.
        largest: Largest absolute value.
    """

    faulty: Ints
    first: Feed | None
    largest: float


def refuse(
    model: Model,
    samples: Samples,
    tensor: str,
    *,
    device: str,
    batch_size: int,
) -> NoReturn:
    """Raise an error about a tensor that is not finite; the samples run once more to find where.

    Args:
        model: The model.
        samples: The samples that it ran on.
        tensor: Name of the tensor.
        device: Device that the model runs on.
        batch_size: Samples in one run.

    Raises:
        DataError: Always. It names the tensor, the samples, and the first faulty node.
    """
    scan = _scan(model, samples, tensor, device=device, batch_size=batch_size)
    readers = [str(node) for node in model.nodes if tensor in node.inputs]
    reader = f", which {readers[0]} reads," if readers else ""
    if scan.first is None:
        raise DataError(
            f"the tensor '{tensor}'{reader} takes values up to {scan.largest:.1e}, whose squares cannot be summed in "
            "float64; scale the model's inputs as in training, or fold the scale into its weights."
        )

    source = _first_faulty_node(model, tensor, scan.first, device)
    since = f" from {source} on" if source else ""
    dtype = model.dtypes[tensor]
    advice, ends = "scale the inputs as in training", ""
    if dtype.itemsize < 4:
        advice = "prune the model in float32 and convert the result"
        ends = f" ({dtype} ends at {_largest_number(dtype):.3g})"
    if samples.origin is None:
        numbers = scan.faulty
    else:
        numbers = samples.origin[scan.faulty]
    raise DataError(
        f"the tensor '{tensor}'{reader} takes NaN or infinite values in {len(scan.faulty)} of {samples.usable()} "
        f"calibration samples, first in sample {int(numbers.min())} of {samples.source},{since}{ends}, so no "
        f"statistic would mean anything; leave those samples out, or {advice}."
    )


def by_sample(value: Array, count: int) -> Bools:
    """Find the samples of a feed whose values are all finite.

    Args:
        value: Value of a tensor for the feed.
        count: Number of samples in the feed.

    Returns:
        One boolean per sample. All are equal if the leading axis of the tensor does not count samples.
    """
    finite = np.isfinite(value)
    if value.ndim and len(value) and len(value) % count == 0:
        return np.asarray(finite.reshape(count, -1).all(axis=1))
    return np.full(count, bool(finite.all()))


def _scan(
    model: Model,
    samples: Samples,
    tensor: str,
    *,
    device: str,
    batch_size: int,
) -> _Scan:
    session = Session(with_outputs(model, [tensor]), device, what="the model")
    runs_alone = samples.fixed_batch in (None, 1) and not samples.whole
    faulty: list[Ints] = []
    first: Feed | None = None
    largest = 0.0
    for index, feed in samples.batches(batch_size):
        value = session.run(feed, [tensor])[0].astype(np.float64)
        here = index[~by_sample(value, len(index))]
        if len(here) and first is None:
            if runs_alone:
                first = samples.feed(here[:1])
            else:
                first = feed
        faulty.append(here)
        largest = max(largest, float(np.abs(value).max(initial=0.0)))
    return _Scan(np.unique(np.concatenate(faulty)), first, largest)


def _largest_number(dtype: np.dtype[Any]) -> float:
    # numpy knows no bfloat16; its range is that of float32.
    if dtype.kind == "f":
        return float(np.finfo(dtype).max)
    return 3.4e38


def _first_faulty_node(
    model: Model,
    tensor: str,
    feed: Feed,
    device: str,
) -> str:
    """The first node in front of a tensor with finite inputs and an output that is not finite.

    Empty if the activations do not fit into memory.
    """
    slicer = Slicer(model.proto)
    ancestors = {slicer.nodes[i].name for i in slicer.needed([tensor], ())}
    floating = set(float_activations(model))
    names = [
        output
        for node in model.nodes
        if node.name in ancestors
        for output in node.outputs
        if output in floating
    ]
    size = sum(4 * int(np.prod(model.shapes[name])) for name in names)
    if not names or size > ACTIVATION_MEMORY:
        return ""
    values = Session(with_outputs(model, names), device).run(feed, names)
    finite = {
        name: bool(np.isfinite(value.astype(np.float64)).all())
        for name, value in zip(names, values, strict=True)
    }
    for node in model.nodes:
        finite_inputs = all(finite.get(name, True) for name in node.inputs)
        finite_outputs = all(finite.get(name, True) for name in node.outputs)
        if finite_inputs and not finite_outputs:
            return str(node)
    return ""
