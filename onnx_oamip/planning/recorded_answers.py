"""Recorded outputs of the original on the held-out samples: they are the same for every plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_oamip.artifacts import cache, cache_entries
from onnx_oamip.core.records import (
    Array,
)
from onnx_oamip.statistics.context import Context
from onnx_oamip.verification import equivalence

ANSWERS = 1 << 26
"""Bytes of the original's outputs on the evaluation data that are held, and kept for the next run."""


def answers(ready: Context, batch: int) -> equivalence.Recorded | None:
    """Record the outputs of the original on the held-out samples; they are the same for every plan.

    Args:
        ready: The model and its samples.
        batch: Samples of one run.

    Returns:
        The outputs, from the cache where an earlier run kept them. None without held-out samples, and where the
        outputs would take more than ``ANSWERS`` bytes.
    """
    model = ready.model
    held = ready.held_out
    objective = ready.objective
    names = equivalence.watched(model, objective)
    if held is None or any(name not in model.shapes for name in names):
        return None
    types = {**{port.name: port.dtype for port in model.outputs}, **model.dtypes}
    each = sum(int(np.prod(model.shapes[name])) * types[name].itemsize for name in names)
    if each * held.count > ANSWERS * (1 if held.whole else model.batch):
        return None

    def run() -> list[list[Array]]:
        session = equivalence.watch(model, objective, ready.device, what=model.path)
        return list(session.stream(feed for _, feed in held.batches(batch)))

    known = {
        **cache.identity(model, held),
        "device": ready.device,
        "batch": batch,
        "tensors": names,
    }
    taken = [1 if held.whole else len(index) for index, _ in held.batches(batch)]
    wanted = [(model.shapes[name], types[name]) for name in names]
    return equivalence.Recorded(
        ready.store.recall(
            cache_entries.OUTPUTS,
            known,
            run,
            lambda found: held.unequal or _given(found, wanted, taken),
        )
    )


def _given(
    found: Sequence[Sequence[Array]],
    wanted: Sequence[tuple[tuple[int, ...], np.dtype[Any]]],
    taken: Sequence[int],
) -> bool:
    """Check that these may be tensors of these shapes and types for batches of so many samples."""
    return [[(v.shape, v.dtype) for v in values] for values in found] == [
        [((*(length * n for length in shape[:1]), *shape[1:]), dtype) for shape, dtype in wanted]
        for n in taken
    ]


def original_answers(ready: Context) -> equivalence.Answers:
    """Outputs of the original on the held-out samples, recorded or computed again for every plan.

    Args:
        ready: The model and its samples.

    Returns:
        The recorded outputs, or a session that computes them where they are too large to be held.
    """
    recorded = answers(ready, ready.batch)
    return recorded or equivalence.watch(ready.model, ready.objective, ready.device)
