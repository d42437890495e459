"""Options for scoring units, and for the removal by their scores."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import Count, Name


class ImportanceOptions(Options):
    """The importance method."""

    heading: ClassVar[str] = "What to remove"

    importance: Name = Field("obs", description="How units are scored.")
    draws: Count = Field(
        1,
        description="Score on N random halves of the calibration samples, take the mean, and report the spread and the "
        "units that all of them keep.",
    )


class RemovalOptions(Options):
    """Options for the size of the removed parts and the number of rounds."""

    heading: ClassVar[str] = "What to remove"

    granularity: Literal["unit", "connection"] = Field(
        "unit",
        description="What is removed: whole units, so that the model shrinks, or single connections, whose weights "
        "become zero in a model of the same shape. Connections need `importance=nnrelief`, and take `alpha`, or "
        "`params` or `max_drop`, which rank all connections together, but with `allocate=uniform` find one alpha.",
    )
    iterations: Count = Field(
        1,
        description="Score, prune and refit N times, a counted budget reached in equal factors.",
    )
    sparse: bool = Field(
        False,
        description="Of connections: store constants that are mostly zero as sparse tensors.",
    )
