"""All options of a run in one record, validated once at the edge."""

from __future__ import annotations

from typing import Any

from onnx_oamip.core.options import (
    AllocationOptions,
    BudgetOptions,
    ConstraintOptions,
    DataOptions,
    ImportanceOptions,
    MintOptions,
    NNReliefOptions,
    OamipOptions,
    ObjectiveOptions,
    Options,
    RecoveryOptions,
    RemovalOptions,
    RepairOptions,
    RunOptions,
    SnacsOptions,
)


# Pydantic takes the fields of the last base first: budgets lead in documents and in the help.
class Settings(
    DataOptions,
    RunOptions,
    ConstraintOptions,
    RecoveryOptions,
    RepairOptions,
    AllocationOptions,
    MintOptions,
    SnacsOptions,
    RemovalOptions,
    NNReliefOptions,
    OamipOptions,
    ImportanceOptions,
    ObjectiveOptions,
    BudgetOptions,
):
    """All options of a run.

    They come in groups by owner, and a function that uses one group takes that group: settings are each of them. Values
    may also be given as the command line writes them, such as ``macs="50%"`` or ``max_memory="2GB"``.
    """

    @classmethod
    def owner(cls, name: str) -> type[Options]:
        """Return the group of options that a setting belongs to.

        Args:
            name: Name of the setting.

        Returns:
            The class that declares it.
        """
        owners = (base for base in cls.__bases__ if issubclass(base, Options))
        return next(owner for owner in owners if name in owner.model_fields)

    @classmethod
    def schema_document(cls) -> dict[str, Any]:
        """Return the JSON schema of a configuration file.

        Returns:
            The schema of all settings, under the names that configuration files have for them (dashes for
            underscores).
        """
        schema = cls.model_json_schema()
        schema["properties"] = {
            name.replace("_", "-"): value for name, value in schema["properties"].items()
        }
        return schema

    @property
    def without_budget(self) -> Settings:
        """Copy the settings without budgets."""
        return self.model_copy(update=dict.fromkeys(BudgetOptions.model_fields, None))
