"""Budgets: upper bounds on the cost of the pruned model."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import NotNegative, Points, Share, Shown
from onnx_oamip.core.records import Budget


class BudgetOptions(Options):
    """Budgets: shares of the original, the largest drop in points, or the least score."""

    heading: ClassVar[str] = "Budget"

    macs: Share | None = Field(
        None, description="Share of the multiply-accumulates to keep, as 0.5 or 50%."
    )
    params: Share | None = Field(
        None, description="Share of the parameters to keep, as 0.5 or 50%."
    )
    size: Share | None = Field(
        None, description="Share of the file's bytes to keep, as 0.5 or 50%."
    )
    threshold: NotNegative | None = Field(
        None,
        description="Remove every unit whose score is below T, in the units of the chosen importance; on decoupled "
        "scores of oamip, and with no other budget, keep the critical units.",
    )
    latency: Share | None = Field(
        None,
        description="Share of the latency to keep, as 0.5 or 50%: measured on the device, one sample at a time. "
        "Needs `allocate=mip`.",
    )
    max_drop: Points | None = Field(
        None,
        description="Find the fewest multiply-accumulates that lose at most P points on the evaluation samples: of "
        "accuracy, or without labels of agreement with the original.",
    )
    max_loss: Annotated[NotNegative | None, Shown(metavar="L")] = Field(
        None,
        description="Keep as few units as possible while the measured losses of all groups sum to at most L; 1 is the "
        "loss of the average answer. Needs `allocate=mip`.",
    )

    @property
    def budget(self) -> Budget:
        """The budgets that are set, as a record."""
        return Budget(**{name: getattr(self, name) for name in BudgetOptions.model_fields})
