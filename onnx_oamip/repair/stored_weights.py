"""Writing of fitted weights in the type and form in which the model stores them."""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.records import Array, Floats
from onnx_oamip.graph.linear_layers import Editor, matrix, unmatrix
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.repair.clamped_targets import ClampedProblem
from onnx_oamip.repair.problems import CutLayer
from onnx_oamip.repair.ridge import RidgeFit, best_shift, remaining_error
from onnx_oamip.repair.shared_weights import Rows

SINGLE_BYTES = 4
"""Bytes of a number in single precision; weights that are stored in fewer are rounded noticeably."""


def weight_name(editor: Editor, here: Site) -> str:
    """Find the weight of a linear node.

    Args:
        editor: The cut model.
        here: The node.

    Returns:
        Name of the tensor that it reads.
    """
    return str(editor.nodes[here.node.name].input[here.weight_slot])


def _new_weight(editor: Editor, use: CutLayer, change: Floats) -> Array:
    """The weight of a node with a change, as its readers will see it once it is stored."""
    name = weight_name(editor, use.here)
    current = editor.constant(name)
    assert current is not None
    fitted = use.weight + change.transpose(0, 2, 1).reshape(use.weight.shape)
    with np.errstate(over="ignore"):
        value = unmatrix(use.here, fitted / use.here.factor, current)
    return editor.rounded(name, value)


def write_weight(
    editor: Editor,
    use: CutLayer,
    change: Floats,
    for_all: bool,
) -> None:
    """Write the changed weight of a linear node into the cut model.

    Args:
        editor: The cut model, changed in place.
        use: The node.
        change: Change of its weights (groups, inputs * taps, outputs).
        for_all: Whether the other nodes that read the weight read the changed one too.
    """
    node = editor.nodes[use.here.node.name]
    editor.replace(node, use.here.weight_slot, _new_weight(editor, use, change), for_all)


def as_stored(
    editor: Editor,
    use: CutLayer,
    rows: Rows,
    split: int,
    *,
    found: RidgeFit,
) -> RidgeFit | None:
    """Round a fit to the weights that are stored.

    Half precision rounds the change, to which the bias is fitted again.

    Args:
        editor: The cut model.
        use: The node, the first of those that share the weight.
        rows: Rows of all of them, with bounds if the fit is one to the outputs behind a clamp.
        split: Number of rows in front of those held out.
        found: The fit.

    Returns:
        The fit; None if the weights are out of range.
    """
    if found.change is None:
        return found
    value = _new_weight(editor, use, found.change)
    if not np.isfinite(value).all():
        return None
    kind = editor.stored_type(weight_name(editor, use.here))
    if kind is None or kind.itemsize >= SINGLE_BYTES:
        return found
    rounded = use.here.factor * matrix(use.here, value) - use.weight
    groups, outs, _, _ = rounded.shape
    change = rounded.reshape(groups, outs, -1).transpose(0, 2, 1)
    if rows.bounds is not None:
        problem = ClampedProblem(rows.x, rows.residual, rows.bounds, split)
        shift = best_shift(rows.x.mean(axis=1), found.shift, change - found.change)
        after = problem.error(change, shift)
    else:
        shift = best_shift(*rows.means, change)
        leading = best_shift(*rows.leading(split).means, change)
        after = remaining_error(rows.x[:, split:], rows.residual[:, split:], change, leading)
    return RidgeFit(change, shift, found.ridge, (found.errors[0], after))
