"""The options that say how samples are read from images and tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from onnx_oamip.cli.options import fraction


class Separated(click.Option):
    """One value with several numbers in it; a configuration file may give them as a list."""

    def __init__(self, *arguments: Any, separator: str = ",", **choices: Any) -> None:
        super().__init__(*arguments, **choices)
        self.separator = separator


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """A height and a width in pixels, as 224 or 224x320."""
    if value is None:
        return None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        message = f"{value!r} is no size; give pixels as 224, or as 224x320 for the height first."
        raise click.BadParameter(message, ctx, param)
    return int(parts[0]), int(parts[-1])


def numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    """Finite numbers with commas between them."""
    found = tuple(fraction(part) for part in value.split(","))
    if not all(math.isfinite(n) for n in found):
        raise click.BadParameter(
            f"{value!r} is no list of numbers such as 0.485,0.456,0.406.", ctx, param
        )
    return found


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How samples are read from a folder of images or from a table, for every command that takes data."""
    options = (
        click.option(
            "--image-size",
            cls=Separated,
            separator="x",
            callback=size,
            metavar="H[xW]",
            help="Of images: their size for the model. Default: the model's own, where it has one.",
        ),
        click.option(
            "--image-fit",
            type=click.Choice(["crop", "pad", "stretch"]),
            default="crop",
            show_default=True,
            help="Of images: what to do with the rest of another shape.",
        ),
        click.option(
            "--image-scale",
            type=click.FloatRange(0, min_open=True),
            default=1 / 255,
            metavar="S",
            help="Of images: what 8-bit values are multiplied by, before mean and deviation.  [default: 1/255]",
        ),
        click.option(
            "--image-mean",
            cls=Separated,
            callback=numbers,
            default="0",
            show_default=True,
            metavar="M[,M,M]",
            help="Of images: what is taken off the scaled values, one number or one a channel.",
        ),
        click.option(
            "--image-std",
            cls=Separated,
            callback=numbers,
            default="1",
            show_default=True,
            metavar="S[,S,S]",
            help="Of images: what the rest is divided by, one number or one a channel.",
        ),
        click.option(
            "--image-layout",
            type=click.Choice(["auto", "nchw", "nhwc"]),
            default="auto",
            show_default=True,
            help="Of images: where the model's input has its channels; auto sees it from the shape.",
        ),
        click.option(
            "--image-color",
            type=click.Choice(["rgb", "bgr"]),
            default="rgb",
            show_default=True,
            help="Of images: the order of the channels that the model takes.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            default=2048,
            show_default=True,
            metavar="N",
            help="Most images or rows to read, evenly over the classes.",
        ),
        click.option(
            "--column",
            metavar="NAME",
            help="Of a Parquet file: the column that the model's only input takes.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
