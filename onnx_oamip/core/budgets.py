"""Table of the kinds of budgets, used by settings, planning, documents and pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx_oamip.core.records import Budget, Cost


@dataclass(frozen=True, slots=True)
class BudgetKind:
    """A kind of budget.

    Attributes:
        name: The option, the field of ``Budget``, and the key in documents.
        noun: Cost that a share is kept of; empty for a budget that is no share.
        label: Heading in tables and pages.
        cost: Field of ``Cost``, and of ``Ledger.counted``, that the budget bounds; empty for one that is measured.
        unit: Unit of the cost in pages.
        detail: Words after the exact cost in pages.
    """

    name: str
    noun: str = ""
    label: str = ""
    cost: str = ""
    unit: str = ""
    detail: str = ""

    def of(self, cost: Cost) -> int:
        """Return the cost that this budget bounds.

        Args:
            cost: All costs of a model.

        Returns:
            The counted cost.
        """
        value: int = getattr(cost, self.cost)
        return value


COUNTED = (
    BudgetKind("macs", noun="MACs", label="MACs", cost="macs", detail=" for one sample"),
    BudgetKind("params", noun="parameters", label="Parameters", cost="params"),
    BudgetKind("size", noun="bytes", label="File", cost="bytes", unit="B", detail=" bytes"),
)
"""Budgets whose cost is counted exactly for any widths, before a model is cut."""
KINDS = (
    *COUNTED,
    BudgetKind("latency", noun="latency"),
    BudgetKind("max_drop"),
    BudgetKind("threshold"),
    BudgetKind("max_loss"),
)
"""All budgets; the measured ones come after the counted ones."""


def counted_shares(budget: Budget) -> Iterator[tuple[BudgetKind, float]]:
    """Find the counted budgets that are set.

    Args:
        budget: All budgets of a run.

    Yields:
        The kind, and the share to keep.
    """
    for kind in COUNTED:
        share = getattr(budget, kind.name)
        if share is not None:
            yield kind, share


def costs(cost: Cost) -> dict[str, int]:
    """Return all counted costs by their key in documents.

    Args:
        cost: Costs of a model.

    Returns:
        Cost by key, in the order of the documents.
    """
    return {kind.cost: kind.of(cost) for kind in COUNTED}
