"""Where a model stops giving numbers: which tensor, in how many samples, from which node on, and what to do.

A model that overflows has nothing to be compared with there, so a tensor that units are judged by must be finite on all
samples. Infinities that no unit's reader meets are left alone: masks added to attention scores, logits of classes that
are ruled out, a logarithm of 0 that is masked afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def refuse(model: Model, samples: Samples, tensor: str, device: str, batch_size: int) -> NoReturn:
    """Raises DataError for a tensor that is not finite on the samples. They are run once more, to count."""
    session = Session(with_outputs(model, [tensor]), device, what="the model")
    bad: list[Ints] = []
    first: Mapping[str, Array] | None = None
    largest = 0.0
    for index, feed in samples.batches(batch_size):
        value = session.run(feed, [tensor])[0].astype(np.float64)
        here = index[~by_sample(value, len(index))]
        if len(here) and first is None:
            first = (
                samples.feed(here[:1])
                if samples.fixed_batch in (None, 1) and not samples.whole
                else feed
            )
        bad.append(here)
        largest = max(largest, float(np.abs(value).max(initial=0.0)))
    found = np.unique(np.concatenate(bad))
    numbers = found if samples.origin is None else samples.origin[found]
    readers = [str(node) for node in model.nodes if tensor in node.inputs]
    reader = f", which {readers[0]} reads," if readers else ""
    kind = model.dtypes[tensor]
    half = kind.itemsize < 4
    if first is None:
        raise DataError(
            f"the tensor '{tensor}'{reader} takes values up to {largest:.1e}, and their sums are NaN or infinite in "
            "float32; scale the model's inputs as in training, or fold the scale into its weights."
        )
    source = _origin(model, tensor, first, device)
    since = f" from {source} on" if source else ""
    ends = f" ({kind} ends at {_largest(kind):.3g})" if half else ""
    advice = (
        "prune the model in float32 and convert the result"
        if half
        else "scale the inputs as in training"
    )
    raise DataError(
        f"the tensor '{tensor}'{reader} takes NaN or infinite values in {len(found)} of {samples.usable()} calibration "
        f"samples, first in sample {int(numbers.min())} of {samples.source},{since}{ends}, so no statistic would mean "
        f"anything; leave those samples out, or {advice}."
    )


def by_sample(value: Array, count: int) -> Bools:
    """(count,) samples whose values are all finite; all or none where the tensor does not lead with the samples."""
    sound = np.isfinite(value)
    if value.ndim and len(value) and len(value) % count == 0:
        return np.asarray(sound.reshape(count, -1).all(axis=1))
    return np.full(count, bool(sound.all()))


def _largest(kind: np.dtype[Any]) -> float:
    return float(np.finfo(kind).max) if kind.kind == "f" else 3.4e38  # bfloat16 has float32's range


def _origin(model: Model, tensor: str, feed: Mapping[str, Array], device: str) -> str:
    """The first node in front of ``tensor`` that makes no number of numbers; empty where activations do not fit."""
    slicer = Slicer(model.proto)
    nodes = {slicer.nodes[i].name for i in slicer.needed([tensor], ())}
    known = set(float_activations(model))
    names = [o for node in model.nodes if node.name in nodes for o in node.outputs if o in known]
    if not names or sum(4 * int(np.prod(model.shapes[n])) for n in names) > ACTIVATION_MEMORY:
        return ""
    found = dict(
        zip(names, Session(with_outputs(model, names), device).run(feed, names), strict=True)
    )
    sound = {
        name: bool(np.isfinite(value.astype(np.float64)).all()) for name, value in found.items()
    }
    for node in model.nodes:
        if any(not sound.get(o, True) for o in node.outputs) and all(
            sound.get(n, True) for n in node.inputs
        ):
            return str(node)
    return ""
