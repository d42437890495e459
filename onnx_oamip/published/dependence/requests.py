"""Request for pooled activations. Its collector is imported when it runs, so that naming the request is cheap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx_oamip.core.records import Array, Axis, Ints, Request

if TYPE_CHECKING:
    from onnx_oamip.statistics.context import Context


@dataclass(frozen=True)
class Pooled:
    """Activations pooled over positions, of the same samples for every tensor.

    Attributes:
        values: By axis, means over positions (samples, channels), float32.
        taps: By convolution, means over the output's positions of the inputs of every tap of its kernel (samples,
            channels, taps).
        labels: Classes (samples,), if they are known.
        samples: Number of samples.
    """

    values: Mapping[Axis, Array]
    taps: Mapping[str, Array]
    labels: Ints | None
    samples: int


def _collect(context: Context) -> Pooled:
    from onnx_oamip.published.dependence import pooled_activations

    settings = context.settings
    return pooled_activations.collect(
        context.model,
        context.coupling,
        context.samples,
        context.device,
        seed=settings.seed,
        batch_size=context.batch,
        by_tap=settings.limits != "none",
        progress=context.progress,
    )


POOLED_ACTIVATIONS: Request[Pooled] = Request("pooled activations", _collect)
"""Activations of many samples, averaged over positions, at both ends of every linear consumer."""
