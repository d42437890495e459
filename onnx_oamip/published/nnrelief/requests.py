"""Request for absolute activations. Its collector is imported when it runs, so that naming the request is cheap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx_oamip.core.records import Axis, Floats, Request

if TYPE_CHECKING:
    from onnx_oamip.statistics.context import Context


@dataclass(frozen=True)
class Signal:
    """Absolute signal (``absolute_signal.collect``): how much of it every channel brings to what reads it.

    ``means``: axis -> (C,) mean of |x| over samples and positions; 0 where a channel never says anything.
    ``kernels``: convolution -> (groups, outputs, inputs) mean over samples of the Frobenius norm of one kernel's
    absolute map, where it was asked for. ``joins``: sum of two branches -> (its channel axis, norms (2, C) of the
    branches' mean absolute maps).
    """

    means: Mapping[Axis, Floats]
    kernels: Mapping[str, Floats]
    joins: Mapping[str, tuple[int, Floats]]


def _collect(context: Context) -> Signal:
    from onnx_oamip.published.nnrelief import absolute_signal

    return absolute_signal.collect(
        context.model,
        context.coupling,
        context.samples,
        context.device,
        context.batch,
        context.progress,
        exact=context.settings.signal == "paper",
    )


ABSOLUTE_ACTIVATIONS: Request[Signal] = Request("absolute activations", _collect)
"""Mean absolute activation of every channel that a consumer reads, and norms at residual sums."""
