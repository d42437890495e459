"""Settings of a run, validated once at the edge."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Budget, Reading

ROOM = 1 << 30
"""Bytes of activations that are held at once where nothing bounds memory."""
LEAST_MEMORY = 1 << 28
PART = 4
"""Activations, what is computed from them, and ONNX Runtime's own copies share what a run may take."""
READING = {
    "image_size",
    "image_fit",
    "image_scale",
    "image_mean",
    "image_std",
    "image_layout",
    "image_color",
    "samples",
    "column",
}
"""Settings that say how samples are read."""


class Settings(BaseModel):
    """What a run was asked to do.

    Shares are fractions to keep; ``max_drop`` is in points; ``align`` is the step of widths in channels; ``floor`` the
    least share of any group; ``time_limit`` (seconds) bounds every solver call; ``cache`` is a folder, auto or off.
    ``scheduler`` is the address of a Dask scheduler whose workers take the place of ``workers`` threads here.
    ``image_size`` to ``column`` say how images and tables are read (see ``records.Reading``).
    ``mode`` to ``images_per_class`` are about the importance ``oamip`` alone; ``score_budget`` is a share as well.
    ``alpha`` (a share of absolute signal to keep) and ``signal`` are about ``nnrelief``; ``sparse`` is about the
    granularity ``connection``.
    ``phi`` is about ``snacs``, ``score_time`` (seconds) about ``mint``. ``limits`` bounds what any plan may take from a
    group, ``protect`` is the share of every group that it may not touch.
    ``batch_size`` is of comparisons alone; ``max_memory`` (bytes) bounds what is held while learning;
    ``no_provenance`` writes nothing about the model's origin into it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: float | None = Field(None, gt=0, le=1)
    params: float | None = Field(None, gt=0, le=1)
    size: float | None = Field(None, gt=0, le=1)
    threshold: float | None = Field(None, ge=0, allow_inf_nan=False)
    latency: float | None = Field(None, gt=0, le=1)
    max_drop: float | None = Field(None, ge=0, lt=100)
    importance: str = "obs"
    mode: Literal["auto", "joint", "per-class", "decoupled"] = "auto"
    formulation: Literal["paper", "exact"] = "exact"
    loss_weight: float = Field(5.0, gt=0, allow_inf_nan=False)
    score_budget: float | None = Field(None, gt=0, le=1)
    relax: bool = False
    images_per_class: int = Field(1, ge=1)
    alpha: float | None = Field(None, gt=0, le=1)
    signal: Literal["mean", "paper"] = "mean"
    granularity: Literal["unit", "connection"] = "unit"
    iterations: int = Field(1, ge=1)
    sparse: bool = False
    phi: Literal["weight", "weight_sq", "exp_weight", "none"] = "weight"
    score_time: float = Field(300.0, gt=0, allow_inf_nan=False)
    allocate: Literal["mip", "global", "uniform"] = "mip"
    refit: Literal["least-squares", "bias", "none"] = "least-squares"
    align: int | Literal["auto"] = "auto"
    floor: float = Field(0.0, ge=0, le=1)
    limits: str = "none"
    protect: float = Field(0.0, ge=0, lt=1)
    exclude: tuple[str, ...] = ()
    solver: Literal["auto", "gurobi", "highs"] = "auto"
    time_limit: float = Field(60.0, gt=0, allow_inf_nan=False)
    workers: int | None = Field(None, ge=1)
    scheduler: str | None = Field(None, min_length=1)
    cache: str = "auto"
    force: bool = False
    strict: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1)
    max_memory: int | None = Field(None, ge=LEAST_MEMORY)
    no_provenance: bool = False
    image_size: tuple[int, int] | None = None
    image_fit: Literal["crop", "pad", "stretch"] = "crop"
    image_scale: float = Field(1 / 255, gt=0, allow_inf_nan=False)
    image_mean: tuple[float, ...] = (0.0,)
    image_std: tuple[float, ...] = (1.0,)
    image_layout: Literal["auto", "nchw", "nhwc"] = "auto"
    image_color: Literal["rgb", "bgr"] = "rgb"
    samples: int = Field(2048, ge=1)
    column: str | None = None

    @classmethod
    def create(cls, **values: Any) -> Settings:
        """Validated settings; raises SettingsError with one sentence that names the setting."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "settings"
            what = first["msg"].replace("Input should be", "it should be")
            raise SettingsError(f"`{name}` is {first['input']!r}: {what}.") from error

    @classmethod
    def schema_document(cls) -> dict[str, Any]:
        """The JSON schema of all settings under the command line's names, as a configuration file has them."""
        schema = cls.model_json_schema()
        schema["properties"] = {
            name.replace("_", "-"): value for name, value in schema["properties"].items()
        }
        return schema

    @property
    def budget(self) -> Budget:
        """The part of the settings that says how much to keep."""
        return Budget(
            self.macs, self.params, self.size, self.threshold, self.latency, self.max_drop
        )

    @property
    def without_budget(self) -> Settings:
        """These settings without anything that says how much to keep."""
        return self.model_copy(
            update=dict.fromkeys((budget.name for budget in fields(Budget)), None)
        )

    @property
    def reading(self) -> Reading:
        """How samples are read from images and tables."""
        return Reading(
            self.image_size,
            self.image_fit,
            self.image_scale,
            self.image_mean,
            self.image_std,
            self.image_layout,
            self.image_color,
            self.samples,
            self.column,
        )

    @property
    def room(self) -> int:
        """Bytes of activations that are held at once."""
        return ROOM if self.max_memory is None else min(ROOM, self.max_memory // PART)

    @model_validator(mode="after")
    def _positive_step(self) -> Settings:
        if isinstance(self.align, int) and self.align < 1:
            raise ValueError("`align` must be auto or at least 1")
        if (
            min(self.image_size or (1,)) < 1
            or min(self.image_std, default=0) <= 0
            or not self.image_mean
        ):
            raise ValueError(
                "`image_size` and `image_std` must be above 0, and `image_mean` not empty"
            )
        return self
