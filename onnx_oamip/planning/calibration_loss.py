"""The loss of pruned models on calibration samples that no repair used: what alternatives are compared by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective import loss, sums
from onnx_oamip.statistics.collector import parts
from onnx_oamip.statistics.context import Context


def losses(context: Context, protos: Sequence[onnx.ModelProto]) -> list[float]:
    """Measure the loss of the objective for several models in one pass over the original.

    Args:
        context: The original, its samples and its objective.
        protos: Pruned models.

    Returns:
        One loss per model; 1 is that of a model that gives the average answer.
    """
    objective = context.objective
    tensors = objective.tensors
    original = Session(with_outputs(context.model, tensors), context.device)
    sessions = [
        Session(
            with_outputs(context.model, tensors, proto), context.device, what="the pruned model"
        )
        for proto in protos
    ]
    totals = [np.zeros((len(objective.judged), 3)) for _ in sessions]
    for _, feed in parts(context.samples)[1].batches(context.batch):
        truth = original.run(feed, tensors)
        for total, session in zip(totals, sessions, strict=True):
            total += sums(objective, truth, session.run(feed, tensors))
    return [loss(objective, total).total for total in totals]
