"""Settings that a command takes, and those of the stages of a run.

The groups of options are named as text: the list of commands needs no settings, whose import takes a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

SCORING = (
    "ImportanceOptions",
    "OamipOptions",
    "NNReliefOptions",
    "SnacsOptions",
    "MintOptions",
    "RepairOptions",
)
"""Owners of the settings that scores depend on."""
PLANNING = (*SCORING, "AllocationOptions", "ConstraintOptions")
"""Owners of the settings that a plan for a given budget depends on."""


@dataclass(frozen=True)
class CommandSettings:
    """Settings that a command takes.

    Attributes:
        owners: Names of classes in ``core.options`` whose settings it takes.
        names: Further settings that it takes.
        without: Settings of the owners that it does not take.
    """

    owners: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def all_names(self) -> frozenset[str]:
        """List the settings.

        Returns:
            Their names.
        """
        from onnx_oamip.core import options

        found = set(self.names)
        for owner in self.owners:
            found.update(getattr(options, owner).model_fields)
        return frozenset(found.difference(self.without))


PRUNE = CommandSettings(
    (
        "BudgetOptions",
        "ObjectiveOptions",
        *PLANNING,
        "RecoveryOptions",
        "RemovalOptions",
        "DataOptions",
        "RunOptions",
    )
)
RECOVER = CommandSettings(
    ("RecoveryOptions", "ObjectiveOptions", "DataOptions"),
    ("device", "op_library", "seed", "batch_size", "max_memory"),
    without=("metric",),
)
INT8 = CommandSettings(("QuantisationOptions", "DataOptions"), ("batch_size", "seed"))
VERIFY = CommandSettings(
    ("ObjectiveOptions", "DataOptions"), ("device", "op_library", "batch_size")
)
