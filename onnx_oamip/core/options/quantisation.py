"""Options of the quantisation of a model to int8."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import Patterns


class QuantisationOptions(Options):
    """Options of ``int8``; they are no settings of ``prune``."""

    heading: ClassVar[str] = "Quantisation"

    ranges: Literal["static", "dynamic"] = Field(
        "static",
        description="Ranges of activations: static, from the samples; dynamic, computed in every run.",
    )
    calibration: Literal["minmax", "entropy", "percentile"] = Field(
        "minmax",
        description="How static ranges are chosen from the samples.",
    )
    per_tensor: bool = Field(
        False,
        description="One scale for every weight, instead of one for every output channel.",
    )
    keep_float: Patterns = Field(
        (),
        description="Leave nodes as they are whose name matches, such as 'head*'; may be given more than once.",
    )
    reduce_range: bool = Field(
        False,
        description="Weights of 7 bits: sums do not saturate on x86 processors without VNNI.",
    )
