"""Options for reading samples from images and tables."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import (
    Count,
    Name,
    Numbers,
    Pixels,
    Positive,
    PositiveNumbers,
    Shapes,
    Shown,
    shape_of,
)
from onnx_oamip.core.records import Reading


class DataOptions(Options):
    """Options for reading samples; the defaults fit a network fed with values from 0 to 1."""

    heading: ClassVar[str] = "Data"

    shape: Shapes = Field(
        (),
        description="Shape of an input, or length of a symbolic dimension, that costs are counted at; may be given "
        "more than once. Default: that of the data; without data 1 for the leading dimension, 64 in images, 16 "
        "elsewhere.",
    )
    image_size: Pixels | None = Field(
        None,
        description="Of images: their size for the model. Default: the model's own, where it has one.",
    )
    image_fit: Literal["crop", "pad", "stretch"] = Field(
        "crop",
        description="Of images: treatment of another aspect ratio: cut, fill up, or distort.",
    )
    image_scale: Annotated[Positive | None, Shown(metavar="S", default="1/255")] = Field(
        None,
        description="Of images: factor of 8-bit values, before mean and deviation; 1 for an input of whole "
        "numbers.",
    )
    image_mean: Numbers = Field(
        (0.0,),
        description="Of images: mean subtracted from the scaled values, one number or one a channel.",
    )
    image_std: PositiveNumbers = Field(
        (1.0,),
        description="Of images: deviation that the result is divided by, one number or one a channel.",
    )
    image_layout: Literal["auto", "nchw", "nhwc"] = Field(
        "auto",
        description="Of images: where the model's input has its channels; auto sees it from the shape.",
    )
    image_color: Literal["rgb", "bgr"] = Field(
        "rgb", description="Of images: the order of the channels that the model takes."
    )
    samples: Count = Field(
        2048, description="Most images or rows to read, evenly over the classes."
    )
    column: Name | None = Field(
        None, description="Of a Parquet file: the column that the model's only input takes."
    )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Lengths by name of an input or of a symbolic dimension."""
        return dict(map(shape_of, self.shape))

    @property
    def reading(self) -> Reading:
        """These options as a record."""
        return Reading(
            size=self.image_size,
            fit=self.image_fit,
            scale=self.image_scale,
            mean=self.image_mean,
            std=self.image_std,
            layout=self.image_layout,
            color=self.image_color,
            most=self.samples,
            column=self.column,
        )
