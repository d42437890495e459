"""Types of values and options that commands share."""

from __future__ import annotations

import math
from pathlib import Path

import click

MODEL = click.Path(path_type=Path)
DATA = "FILE|MODULE:FUNCTION"


class Share(click.ParamType):
    """A share to keep: above 0 (or from 0) and at most 1, or a percentage with its sign."""

    name = "share"

    def __init__(self, zero: bool = False) -> None:
        self.zero = zero

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as a fraction."""
        text = str(value).strip()
        try:
            number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            number = math.nan
        if not (0 < number <= 1 or (self.zero and number == 0)):
            range_ = "from 0 to 1" if self.zero else "above 0 and at most 1"
            self.fail(f"{text!r} is not a share to keep; give a number {range_}, or a percentage such as 50%.", param, ctx)
        return number


class Alignment(click.ParamType):
    """``auto`` or a number of channels."""

    name = "alignment"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A number, or ``auto`` as it is."""
        text = str(value).strip()
        if text == "auto":
            return text
        if not text.isdecimal() or int(text) < 1:
            self.fail(f"{text!r} is no alignment; give auto or a whole number of channels from 1.", param, ctx)
        return int(text)


class Method(click.ParamType):
    """The name of an importance method, looked up in the registry."""

    name = "method"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if there is such a method."""
        from ..importance import METHODS

        if value not in METHODS:
            self.fail(f"{value!r} is not one of {', '.join(METHODS)}.", param, ctx)
        return str(value)


class MethodOption(click.Option):
    """Its help names every method of the registry, with what it measures."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The help, made when it is asked for: the registry is heavy to import."""
        from ..importance import METHODS

        self.help = "How units are scored: " + "; ".join(f"{n}, {m.summary}" for n, m in METHODS.items()) + "."
        return super().get_help_record(ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, no tables.")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs; auto takes CUDA where it works, and asking for cuda where it does not is an error.",
)
batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Samples that the model is run on at a time; a model with a fixed batch keeps its own.",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of everything random; with the same seed a budget that is counted gives the same model.",
)
