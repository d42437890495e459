"""The axis of an input that counts samples, found from the dimensions of all inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnx_oamip.core.records import Port

NAMED = re.compile(r"((n|num|dim)_?)?batch(_?(size|dim|axis))?", re.IGNORECASE)
"""Symbols that say that they are the batch."""
USUAL = ("N", "B", "bs")
"""Short symbols that mean the batch where they lead an input."""
RANK_OF_IMAGES = 4
"""Axes of an input from which the leading one counts images."""


def is_fixed(dim: int | str | None) -> bool:
    """Test a dimension of an input.

    Args:
        dim: Number, symbol or None.

    Returns:
        True if the length is fixed.
    """
    return isinstance(dim, int) and dim > 0


def batch_axes(port: Port, inputs: Sequence[Port], outputs: Sequence[Port]) -> tuple[int, ...]:
    """List the axes of an input that may be the batch.

    Args:
        port: Input of the model.
        inputs: All inputs.
        outputs: All outputs.

    Returns:
        Axes, the likeliest first: that of the symbol of the batch (see :func:`batch_symbol`); otherwise axis 0 if its
        length is free or 1, an axis with the symbol that leads another input, or an axis of free length or length 1.
    """
    dims = port.dims
    if not dims:
        return ()
    symbol = batch_symbol(inputs, outputs)
    if symbol in dims:
        return (dims.index(symbol),)
    others = [p.dims[0] for p in inputs if p is not port and p.dims]
    if not is_fixed(dims[0]):
        return (0,)
    named = [k for k, dim in enumerate(dims) if isinstance(dim, str) and dim in others]
    if named:
        return tuple(named)
    is_batch = dims[0] == 1 or port is inputs[0] or all(dims[0] == dim for dim in others)
    axes = [0] if is_batch else []
    axes += [k for k in range(1, len(dims)) if not is_fixed(dims[k])]
    if not is_batch:
        axes += [k for k in range(1, len(dims)) if dims[k] == 1]
    return tuple(axes)


def shown_batch_axis(port: Port, inputs: Sequence[Port], outputs: Sequence[Port]) -> int | None:
    """Find the batch axis of an input of which the symbols or the rank show that it counts samples.

    Args:
        port: Input of the model.
        inputs: All inputs.
        outputs: All outputs.

    Returns:
        The axis; None where axis 0 may as well count steps, rows of an image, or nodes of a graph.
    """
    symbol = batch_symbol(inputs, outputs)
    if symbol in port.dims:
        return port.dims.index(symbol)
    if not port.dims:
        return None
    is_usual = port.dims[0] in USUAL or len(port.dims) >= RANK_OF_IMAGES
    return 0 if is_usual else None


def batch_symbol(inputs: Sequence[Port], outputs: Sequence[Port]) -> str | None:
    """Find the symbol of the batch.

    Args:
        inputs: Inputs of the model.
        outputs: Its outputs.

    Returns:
        The only symbol that is called a batch; otherwise the first symbol that all inputs with symbols share, as a
        sequence and a recurrent state do, and of several the first that every output has as well; otherwise the
        symbol behind axis 0 that every output has while none has that of axis 0, as in ``[T, N, 6]`` to ``[N, 5]``.
        None where there is no such symbol.
    """
    symbols = [found for found in (_symbols(port) for port in inputs) if found]
    named = {name for found in symbols for name in found if NAMED.fullmatch(name)}
    if len(named) == 1:
        return named.pop()
    if not symbols:
        return None
    answers = [found for found in (_symbols(port) for port in outputs) if found]
    if len(symbols) > 1:
        shared = [name for name in symbols[0] if all(name in found for found in symbols)]
        counted = [name for name in shared if all(name in found for found in answers)]
        return next(iter((*counted, *shared)), None)
    source = next(port for port in inputs if _symbols(port))
    if not answers or source.dims[0] in {port.dims[0] for port in outputs if port.dims}:
        return None
    return _behind_another_axis(source, answers)


def _behind_another_axis(port: Port, answers: Sequence[Sequence[str]]) -> str | None:
    """The symbol on axis 1 of an input, if the symbols of the outputs show that it is the batch and axis 0 is not.

    Further symbols of the input in an output, as of pictures without a batch, show nothing.
    """
    first, *others = port.dims
    if first is None or first == 1 or first in USUAL or not others:
        return None
    symbol = others[0]
    if not isinstance(symbol, str) or symbol == first:
        return None
    own = set(_symbols(port))
    shown = all([name for name in found if name in own] == [symbol] for found in answers)
    return symbol if shown else None


def _symbols(port: Port) -> list[str]:
    return [dim for dim in port.dims if isinstance(dim, str)]
