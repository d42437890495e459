"""Options of the recovery of a pruned model by distillation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import Kind, Name, Shown

DEFAULT_EFFORT = "10m"
"""Effort where none is given."""
_EFFORT = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>s|m|h|)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Effort:
    """Budget of a recovery: a number of steps, or seconds; the other is None."""

    steps: int | None = None
    seconds: float | None = None


def effort_of(text: str) -> Effort:
    """Read a budget of a recovery.

    Args:
        text: A number of steps such as ``500``, or a time such as ``90s``, ``10m`` or ``1.5h``.

    Returns:
        The budget.

    Raises:
        ValueError: It is neither, or zero.
    """
    match = _EFFORT.fullmatch(text.strip())
    if (
        match is None
        or float(match["number"]) == 0
        or not (match["unit"] or text.strip().isdigit())
    ):
        raise ValueError(f"{text!r} is no number of steps and no time")
    if match["unit"]:
        return Effort(seconds=float(match["number"]) * _SECONDS[match["unit"]])
    return Effort(steps=int(match["number"]))


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _checked(text: str) -> str:
    effort_of(text)
    return text


EffortText = Annotated[
    str,
    BeforeValidator(_text),
    AfterValidator(_checked),
    Kind(
        "an effort",
        "a number of steps such as 500, or a time such as 90s, 10m or 1h",
        "STEPS|TIME",
    ),
]


class RecoveryOptions(Options):
    """Options for training a pruned model with the original as its teacher."""

    heading: ClassVar[str] = "Recovery"

    recover: Annotated[EffortText | None, Shown(flag_value=DEFAULT_EFFORT)] = Field(
        None,
        description="Train the pruned model behind the refit, without labels, to answer as the original: this many "
        "steps, or for this time, such as 500 or 10m; 10m where no value is given. Kept only if the objective falls on "
        "held-out samples. Needs the extra 'recover'.",
    )
    augment: Annotated[Name, Shown(metavar="none|auto|MODULE:FUNCTION")] = Field(
        "auto",
        description="Random changes of samples, for a recovery and for the copies of images that the refit adds where "
        "samples are few: auto takes those for the kind of each input (images, audio, tokens; none for tables), or a "
        "function (feed, generator) -> feed.",
    )
