"""Limits for the last model of a run of several stages."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import Points, Seconds, Share
from onnx_oamip.core.records import Budget


class LimitOptions(Options):
    """Limits of ``run``, named as the budgets of ``prune``, and the time to measure latency."""

    heading: ClassVar[str] = "Budget"

    macs: Share | None = Field(None, description="Share of the multiply-accumulates.")
    params: Share | None = Field(None, description="Share of the parameters.")
    size: Share | None = Field(None, description="Share of the file's bytes.")
    latency: Share | None = Field(None, description="Share of the latency.")
    max_drop: Points | None = Field(None, description="Largest loss of an output, in points.")
    seconds: Seconds = Field(3.0, description="How long to measure latency.")

    @property
    def budget(self) -> Budget:
        """The limits, as a record."""
        return Budget(**self.model_dump(exclude={"seconds"}))
