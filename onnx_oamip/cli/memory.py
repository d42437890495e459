"""The option that bounds memory."""

from __future__ import annotations

import re

import click

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(ctx: click.Context, param: click.Parameter, value: str | int | None) -> int | None:
    """Bytes, from a number with or without a unit: 2GB, 1.5 GiB, 800M (powers of 1,024)."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", str(value).strip().upper())
    if found is None or not float(found[1]):
        raise click.BadParameter(
            f"{value!r} is not a size; give a number of bytes, or one such as 2GB.", ctx, param
        )
    return int(float(found[1]) * UNITS[found[2]])


max_memory_option = click.option(
    "--max-memory",
    callback=size,
    metavar="SIZE",
    help="Aim at this much memory, such as 2GB: while learning a quarter of it goes to activations and a quarter to "
    "second moments, so there are fewer samples at a time, and coarser moments of wide layers. It is no hard limit, "
    "and it can change the result. Default: 1 GiB of activations.",
)
