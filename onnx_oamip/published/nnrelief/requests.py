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
    """Mean absolute signal of channels.

    Attributes:
        means: By axis, the mean of |x| over samples and positions (C,); 0 for a channel without any signal.
        kernels: By convolution, the mean over samples of the Frobenius norm of each kernel's absolute map (groups,
            outputs, inputs). Empty unless requested.
        joins: By sum of two branches, its channel axis and the norms of the branches' mean absolute maps (2, C).
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
        batch_size=context.batch,
        progress=context.progress,
        exact=context.settings.signal == "paper",
    )


ABSOLUTE_ACTIVATIONS: Request[Signal] = Request("absolute activations", _collect)
"""Mean absolute activation of every channel that a consumer reads, and norms at residual sums."""
