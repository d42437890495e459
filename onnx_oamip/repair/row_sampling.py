"""Sampling of rows for the refit: how many rows of a node or recurrent layer, and which."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_oamip.core.records import Array, Ints
from onnx_oamip.graph.im2col import pick, pick_weighted
from onnx_oamip.graph.linear_layers import matrix_shape
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.objective.position_weights import PositionWeights

ROWS_PER_UNKNOWN = 64
MIN_ROWS = 16_384
MAX_ROWS = 98_304
GRAM_WORK = 2.5e10
"""Multiply-accumulates of a Gram matrix, beyond which no more than the following rows are sampled."""
FEWER_ROWS_PER_UNKNOWN, FEWER_ROWS = 16, 24_576
GRAM_CAP = 4608
"""Unknowns per output above which their Gram matrix gets too large: fewer rows are sampled."""
HELD_OUT = 0.2
"""Share of the rows on which the ridge strength is chosen."""
WIDE_VALUES = 1 << 25
"""Most values (rows x unknowns) sampled of a node that is too wide for a Gram matrix. Of a node with many groups, as a
depthwise convolution, no more are sampled beyond ``ROWS_PER_UNKNOWN``."""
HELD_BYTES = 4
"""Outputs of the original at the sampled rows are float32 until a node is refitted."""
HELD_SHARE = 2
"""Multiple of the memory limit that the outputs of all nodes may take together."""
FEWEST_ROWS = 32
"""Rows that are sampled however little memory there is."""
VALUE_BYTES = 8
"""Inputs, states and outputs at the sampled rows are float64."""
WIDE_COPIES = 4
"""Arrays of that size during the refit of a wide node."""

RowChoice = Callable[[int, tuple[int, ...]], Ints]
"""(index of a feed, lengths of the axes that its rows run over) -> numbers of the chosen rows."""


def row_choice(
    count: int,
    rng: np.random.Generator,
    weights: Sequence[PositionWeights] | None,
) -> RowChoice:
    """Make the choice of the rows of a node or recurrent layer.

    Args:
        count: Rows to choose of every feed.
        rng: Source of randomness.
        weights: Weights of positions by feed: rows are sampled in proportion to them. None to sample all rows alike.

    Returns:
        The choice.
    """

    def choose(feed: int, axes: tuple[int, ...]) -> Ints:
        if weights is None:
            return pick(int(np.prod(axes)), count, rng)
        return pick_weighted(weights[feed].rows(axes), count, rng)

    return choose


def leading_rows(count: int) -> int:
    """Count the rows that are fitted to while the ridge strength is chosen on the others.

    Args:
        count: All rows.

    Returns:
        Number of leading rows; all where there is a single row.
    """
    return int(np.ceil((1 - HELD_OUT) * count))


def wanted_rows(unknowns: int, groups: int = 1) -> int:
    """Count the rows that a fit should have.

    Args:
        unknowns: Unknowns per output.
        groups: Groups of outputs with inputs of their own, which all have values in a row.

    Returns:
        Number of rows, whatever memory they need.
    """
    cheap = int(GRAM_WORK / unknowns**2)
    fewer = min(FEWER_ROWS_PER_UNKNOWN * unknowns, FEWER_ROWS)
    enough = min(ROWS_PER_UNKNOWN * unknowns, max(cheap, fewer))
    least = MIN_ROWS
    if groups > 1:
        least = min(least, max(enough, WIDE_VALUES // (groups * unknowns)))
    return int(np.clip(enough, least, MAX_ROWS))


def is_wide(place: Site, weight: Array, cap: int = GRAM_CAP) -> bool:
    """Test whether a node has too many unknowns per output for a Gram matrix.

    Args:
        place: The linear node.
        weight: Its weight.
        cap: Most unknowns.

    Returns:
        True if it has more.
    """
    _, _, ins, taps = matrix_shape(place, weight)
    return ins * taps > cap


def row_limit(
    shape: tuple[int, int, int, int],
    cap: int,
    memory_limit: int,
) -> int:
    """Count the rows to sample for a node.

    Args:
        shape: Groups, outputs and inputs per group, and taps.
        cap: Unknowns per output above which it is wide.
        memory_limit: Upper bound in bytes on one array of its inputs and outputs.

    Returns:
        Number of rows of all feeds together.
    """
    groups, outs, ins, taps = shape
    unknowns = ins * taps
    values_per_row = groups * (unknowns + outs)
    most_values = memory_limit // VALUE_BYTES
    if unknowns <= cap:
        return min(wanted_rows(unknowns, groups), max(FEWEST_ROWS, most_values // values_per_row))
    # Rows this wide are many values each: bound the values instead.
    most_values = min(WIDE_VALUES, most_values // WIDE_COPIES)
    return max(FEWEST_ROWS, min(MIN_ROWS, most_values // (groups * max(unknowns, outs))))


def shared_rows(limits: Ints, rows: Ints, values: Ints, *, memory_limit: int) -> Ints:
    """Lower the rows of all nodes alike where their outputs together need too much memory.

    Args:
        limits: Rows to sample of every node (nodes,), as :func:`row_limit` counts them.
        rows: Rows that there are of every node (nodes,).
        values: Values that are held of a row (nodes,).
        memory_limit: Upper bound in bytes on one array; all outputs may take ``HELD_SHARE`` times that.

    Returns:
        Rows to sample of every node (nodes,).
    """
    sampled = np.minimum(limits, rows)
    needed = HELD_BYTES * int(sampled @ values)
    most = HELD_SHARE * memory_limit
    if needed <= most:
        return limits
    lowered = np.ceil(sampled * (most / needed)).astype(np.int64)
    return np.minimum(limits, np.maximum(lowered, FEWEST_ROWS))
