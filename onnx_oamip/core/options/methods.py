"""Options of single published methods, each of its own."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import Count, Positive, Seconds, Share, Shown

PUBLISHED = "Published methods"


class OamipOptions(Options):
    """Options of the importance ``oamip``."""

    heading: ClassVar[str] = PUBLISHED

    mode: Literal["auto", "joint", "per-class", "decoupled"] = Field(
        "auto",
        description="Of oamip: one program over the network, one for every class with the scores averaged, or one for "
        "every layer; auto is joint where the program is small.",
    )
    formulation: Literal["paper", "exact"] = Field(
        "exact",
        description="Of oamip, joint and per-class: whole keep variables with bounds that hold for all of them, or the "
        "program as published, with continuous scores, bounds of the unpruned network and its k x k quirk.",
    )
    loss_weight: Positive = Field(
        5.0, description="Of oamip: weight of the loss against sparsity; more keeps more."
    )
    score_budget: Share | None = Field(
        None,
        description="Of oamip, exact: the share of the units' multiply-accumulates that the program may keep, in place "
        "of its reward for sparsity.",
    )
    relax: bool = Field(
        False, description="Of oamip: no whole variables; faster, and no longer exact."
    )
    images_per_class: Count = Field(
        1,
        description="Of oamip: calibration samples of every class that the program is over, the least certain of those "
        "that the model gets right.",
    )


class NNReliefOptions(Options):
    """Options of the importance ``nnrelief``."""

    heading: ClassVar[str] = PUBLISHED

    alpha: Annotated[Share | None, Shown(metavar="A")] = Field(
        None,
        description="Of nnrelief: the share of absolute signal that the connections kept must carry into every unit, "
        "as 0.95; units left without a connection are removed. Says how much is removed where no budget does.",
    )
    signal: Literal["mean", "paper"] = Field(
        "mean",
        description="Of nnrelief, for convolutions: signal from the mean of every channel, or as published from every "
        "kernel's own map, which takes longer.",
    )


class SnacsOptions(Options):
    """Options of the importance ``snacs``."""

    heading: ClassVar[str] = PUBLISHED

    phi: Literal["weight", "weight_sq", "exp_weight", "none"] = Field(
        "weight",
        description="Of snacs: factor of the mutual information: the mean absolute weight w between two channels "
        "over the largest of the layer, its square, exp(-w^2 / 2), or nothing.",
    )


class MintOptions(Options):
    """Options of the importance ``mint``."""

    heading: ClassVar[str] = PUBLISHED

    score_time: Seconds = Field(
        300.0,
        description="Of mint: most seconds for its estimates; layers not reached by then are scored by correlation.",
    )
