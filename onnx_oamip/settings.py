"""Settings of a run, validated once at the edge."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import SettingsError
from .records import Budget


class Settings(BaseModel):
    """What a run was asked to do. Shares are fractions to keep; ``align`` is the step of widths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: float | None = Field(None, gt=0, le=1)
    params: float | None = Field(None, gt=0, le=1)
    size: float | None = Field(None, gt=0, le=1)
    threshold: float | None = Field(None, ge=0, allow_inf_nan=False)
    importance: str = "activation"
    allocate: Literal["uniform", "global"] = "uniform"
    refit: Literal["none", "bias"] = "bias"
    align: int = Field(1, ge=1)
    exclude: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1)

    @classmethod
    def create(cls, **values: Any) -> Settings:
        """Validated settings; raises SettingsError with one sentence that names the setting."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "settings"
            what = first["msg"].replace("Input should be", "it should be")
            raise SettingsError(f"--{name.replace('_', '-')} is {first['input']!r}: {what}.") from error

    @property
    def budget(self) -> Budget:
        """The part of the settings that says how much to keep."""
        return Budget(self.macs, self.params, self.size, self.threshold)
