"""Schema of plan files, checked when a file is read."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from onnx_oamip.artifacts.score_files import check_program


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Record):
    """The model that a plan was made for: its file, and a digest of its graph without names and numbers."""

    path: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    topology: str = Field(pattern="^[0-9a-f]{64}$")


class AxisEntry(_Record):
    """One axis of a group, with the number of channels that one unit has there."""

    tensor: str
    axis: int = Field(ge=0)
    per_unit: int = Field(ge=1)


class CostEntry(_Record):
    """Costs as ``records.Cost`` counts them."""

    macs: int = Field(ge=0)
    params: int = Field(ge=0)
    bytes: int = Field(ge=0)


class GroupEntry(_Record):
    """The kept units of one group.

    ``loss`` is the measured loss of the model with only this group at that width. Units of a group that is ``rotated``
    are principal components of its channels, the largest first. A group that is ``factored`` has the ranks of a layer
    that is written as two. A group that is emptied keeps none.
    """

    name: str
    units: int = Field(ge=1)
    kept: int = Field(ge=0)
    loss: float | None = None
    rotated: bool = False
    factored: bool = False
    axes: tuple[AxisEntry, ...] = Field(min_length=1)
    keep: tuple[int, ...]

    @model_validator(mode="after")
    def _consistent(self) -> GroupEntry:
        if self.keep:
            least = min(self.keep)
            greatest = max(self.keep)
            if least < 0 or greatest >= self.units:
                stray = least if least < 0 else greatest
                raise ValueError(
                    f"'keep' lists unit {stray}, but the units of this group are 0 to {self.units - 1}"
                )
            unit, count = Counter(self.keep).most_common(1)[0]
            if count > 1:
                raise ValueError(f"'keep' lists unit {unit} twice")
        if self.kept != len(self.keep):
            raise ValueError(
                f"'kept' says {self.kept}, but 'keep' lists {len(self.keep)} units; make the two agree"
            )
        return self


class PlanFile(_Record):
    """A plan file: the kept units of every group, and the settings and costs that it was made with."""

    kind: Literal["onnx-oamip plan"]
    schema_version: Literal[1]
    tool_version: str
    model: ModelEntry
    importance: str
    allocation: str
    budget: dict[str, float | None]
    before: CostEntry
    predicted: CostEntry
    settings: dict[str, Any]
    programs: tuple[Annotated[dict[str, Any], AfterValidator(check_program)], ...] = ()
    notes: tuple[str, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    groups: tuple[GroupEntry, ...]
