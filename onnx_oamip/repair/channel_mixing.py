"""Channel mixing: refit of nodes that are too wide for a Gram matrix of all their unknowns."""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Array, Floats, Ints
from onnx_oamip.graph.linear_layers import matrix, matrix_shape
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.repair.cut_model import Cut, output_mask, units_of_inputs
from onnx_oamip.repair.ridge import Solve, solve_ridge
from onnx_oamip.repair.row_sampling import GRAM_CAP, is_wide


def mixes_channels(cut: Cut, place: Site, cap: int) -> bool:
    """Test for a wide node with fewer channels, of several inputs each, than a Gram matrix may have rows.

    Args:
        cut: The original model and the kept units.
        place: The node in the original model.
        cap: Unknowns per output above which it is wide.

    Returns:
        True if its channels can be mixed: all its units have the same number of inputs.
    """
    weight = cut.model.constants[place.weight]
    units = units_of_inputs(cut, place) if is_wide(place, weight, cap) else None
    if units is None or place.node.name in cut.emptied.biases:
        return False
    _, _, ins, taps = matrix_shape(place, weight)
    present, counts = np.unique(units, return_counts=True)
    equal = bool((counts == counts[0]).all())
    return equal and len(present) < ins * taps and len(present) <= GRAM_CAP


def channel_mixing(
    cut: Cut,
    place: Site,
    wide_inputs: Array,
    x: Floats,
    weight: Floats,
) -> Solve:
    """Make the solver for a wide node that :func:`mixes_channels` accepts.

    Removed channels are expressed by kept ones. With channel blocks z (original, all channels) and z' (cut, kept ones),
    ``z = z' A`` is fitted by ridge regression towards "every kept channel is itself". The weights of a removed channel
    are then distributed over the kept ones. That needs only a Gram matrix of channels by channels.

    Args:
        cut: The original model and the kept units.
        place: The node in the original model.
        wide_inputs: Inputs in the original model (rows, 1, channels * taps).
        x: Inputs in the cut model (1, rows, kept channels * taps).
        weight: Its weights after the cut (1, outputs, kept channels, taps).

    Returns:
        The solver.
    """
    units = units_of_inputs(cut, place)
    assert units is not None
    present, counts = np.unique(units, return_counts=True)
    _, outs, _, taps = weight.shape
    # A unit may hold several columns of the input; its columns and the taps play the same part.
    block = int(counts[0]) * taps
    columns = np.argsort(units, kind="stable")
    kept_columns = np.argsort(units[cut.units[units]], kind="stable")
    stays = cut.units[present]
    original = wide_inputs.astype(np.float64)[:, 0]
    rows = len(original)

    def blocks(values: Floats, order: Ints, count: int) -> Floats:
        """Values (rows, units, block) with the columns of one unit next to each other."""
        return values.reshape(rows, -1, taps)[:, order].reshape(rows, count, block)

    kept_blocks = blocks(x[0], kept_columns, int(stays.sum()))
    remaining = blocks(original, columns, len(present)).copy()
    remaining[:, stays] -= kept_blocks
    full_weight = matrix(place, cut.model.constants[place.weight])[0] * place.factor
    kept_outputs = output_mask(cut.model, cut.coupling, place, cut.units)
    weight_blocks = full_weight[kept_outputs][:, columns].reshape(outs, len(present), block)

    def solve(count: int, ridge: float) -> Floats:
        a = kept_blocks[:count]
        b = remaining[:count]
        a = a - a.mean(axis=(0, 2), keepdims=True)
        b = b - b.mean(axis=(0, 2), keepdims=True)
        gram = np.einsum("rkt,rlt->kl", a, a, optimize=True)
        cross = np.einsum("rkt,rct->kc", a, b, optimize=True)
        mixing = solve_ridge(gram[None], cross[None], ridge)[0]
        change = np.einsum("kc,oct->okt", mixing, weight_blocks, optimize=True)
        in_order = np.empty((outs, len(kept_columns), taps))
        in_order[:, kept_columns] = change.reshape(outs, len(kept_columns), taps)
        return in_order.reshape(1, outs, -1).transpose(0, 2, 1)

    return solve
