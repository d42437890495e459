"""Samples of the measurements that run a model many times: fewer where the model is large.

The bound counts multiplications, not seconds, so that two runs measure the same.
"""

from __future__ import annotations

from onnx_oamip.data.dataset import Samples
from onnx_oamip.statistics.collector import parts
from onnx_oamip.statistics.context import Context

LOSS_MACS = 8e12
"""Multiply-accumulates of the losses of all groups: about five minutes on two cores."""
RELEVANCE_MACS = 2e12
"""Multiply-accumulates of the responses of the objective to errors of every node."""
LEAST_SAMPLES = 2


def measured(context: Context, passes: float, most: float) -> Samples:
    """Choose the samples of a measurement.

    Args:
        context: The model, and the samples for losses (see ``collector.parts``).
        passes: Times that the measurement runs the model on every sample.
        most: Most multiply-accumulates of all passes together.

    Returns:
        The first of the samples for losses; all of them if they take no more than that.
    """
    every = parts(context.samples)[1]
    of_sample = passes * context.before.macs / max(context.model.batch, 1)
    if of_sample * every.count <= most:
        return every
    return every.first(max(LEAST_SAMPLES, int(most / of_sample)))
