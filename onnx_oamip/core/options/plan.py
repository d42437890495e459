"""Options of a plan and of the repair: allocation, constraints on groups, reconstruction."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import (
    Alignment,
    Name,
    Patterns,
    ShareBelowOne,
    ShareOrZero,
    Shown,
)


class AllocationOptions(Options):
    """Options for spreading a budget over groups."""

    heading: ClassVar[str] = "What to remove"

    allocate: Literal["mip", "global", "uniform"] = Field(
        "mip",
        description="How a budget is spread: by a mixed-integer program over measured losses, by the lowest scores "
        "wherever they are, or as the same share of every group.",
    )
    effort: Literal["low", "normal", "high"] = Field(
        "normal",
        description="How widths are chosen by the program: by the loss of every group alone, with low measured at "
        "fewer widths and on a quarter of the samples, or with high by its mean with the loss around the first plan, "
        "which takes more than twice as long. The plan that loses less is kept. With normal, a large network is "
        "measured on fewer samples.",
    )
    rotate: Literal["auto", "none"] = Field(
        "auto",
        description="Choose principal components in place of channels where a group is between linear layers only, "
        "as the residual streams of inverted bottlenecks and the heads of attentions: with the default `importance`, "
        "`allocate` and `refit`.",
    )
    empty: Literal["auto", "always", "none"] = Field(
        "auto",
        description="Remove whole branches that the network can do without where that loses less than narrower "
        "layers: residual blocks, parallel branches of a Concat, attentions and MLPs of transformer blocks, gates of "
        "squeeze-and-excitation. With auto only under a `latency` budget, where it pays; always tries it for `macs`, "
        "`params` and `size` as well; with none every group keeps a unit.",
    )
    factor: Literal["auto", "none"] = Field(
        "none",
        description="Write dense layers and 1x1 convolutions as two of lower rank where few principal components hold "
        "nearly all of the variance of their outputs; the rank is chosen with the widths. Where `rotate` applies, and "
        "with another budget than `latency`.",
    )


class RepairOptions(Options):
    """Options for the compensation of removed units by the remaining weights."""

    heading: ClassVar[str] = "Repair"

    refit: Literal["least-squares", "bias", "none"] = Field(
        "least-squares",
        description="How removed units are compensated: by weights fitted anew to the original outputs, by the mean "
        "folded into the biases of the following layers, or not at all. The scores of oamip and measured losses "
        "assume it.",
    )


class ConstraintOptions(Options):
    """Constraints on every group, which hold for any budget."""

    heading: ClassVar[str] = "What to remove"

    align: Alignment = Field(
        "auto",
        description="Keep channels in multiples of N where a group has that many; auto takes the step that was "
        "measured to pay on the device, for convolutions.",
    )
    latency_table: Annotated[Name | None, Shown(metavar="FILE", heading="Budget")] = Field(
        None,
        description="Times of another device, as profile writes them there, or a CSV file with the columns operator, "
        "shapes and milliseconds, or a profile of ONNX Runtime, trtexec or benchmark_app. `latency` and `align=auto` "
        "then hold for that device, and nothing is timed for them here.",
    )
    floor: ShareOrZero = Field(
        0.0, description="Least share to keep of every group, as 0.1 or 10%."
    )
    limits: Name = Field("none", description="Most that any plan may remove from a group.")
    protect: ShareBelowOne = Field(
        0.0,
        description="Share of every group that no plan may remove, as 0.1 or 10%: the units that following layers "
        "weigh most.",
    )
    exclude: Patterns = Field(
        (),
        description="Keep all units of groups that match this shell pattern, such as 'conv1*'; may be given more than "
        "once.",
    )
