"""Refit of one weight, for all nodes that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx_oamip.core.records import Array, Fit, Floats
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Frontier
from onnx_oamip.repair.channel_mixing import channel_mixing
from onnx_oamip.repair.clamped_targets import Clamp, ClampedProblem, clamp_behind
from onnx_oamip.repair.cut_model import Cut
from onnx_oamip.repair.problems import Copied, CutLayer, use_of
from onnx_oamip.repair.ridge import (
    Regression,
    RidgeFit,
    Solve,
    best_shift,
    choose_ridge,
    ridge_regression,
)
from onnx_oamip.repair.row_sampling import HELD_OUT, leading_rows
from onnx_oamip.repair.shared_weights import Family, Rows, Spread, pooled_variance, stacked
from onnx_oamip.repair.stored_weights import as_stored, weight_name, write_weight
from onnx_oamip.repair.targets import Target


def refit_family(
    cut: Cut,
    editor: Editor,
    family: Family,
    frontier: Frontier,
    targets: dict[str, Target],
    *,
    copies: Copied | None,
) -> tuple[Fit | None, list[str]]:
    """Refits one weight, for all nodes that share it.

    Args:
        cut: The original model and the kept units.
        editor: The cut model, changed in place.
        family: The nodes in the original model.
        frontier: Activations of the cut model.
        targets: Outputs of the nodes in the original model; their inputs are freed once they are read.
        copies: Augmented copies of the samples, if any.

    Returns:
        A record of the fit, None if there is none, and remarks for the user.
    """
    remarks: list[str] = []
    uses = _sampled(cut, editor, family, frontier, targets, copies=copies, remarks=remarks)
    if uses is None:
        return None, remarks
    first = uses.layers[0]
    if any(rows.count < 2 for rows in uses.rows):
        if not family.is_shared:
            editor.add_bias(first.here, uses.rows[0].residual.reshape(-1))
        remarks.append("one row is too few to fit and to judge, so only its bias moves")
        return None, remarks
    own_biases = family.is_shared and not _has_common_bias(editor, uses.layers)
    means = [rows.means for rows in uses.rows]
    rows, split = stacked(uses.rows, HELD_OUT, centred=own_biases)
    form, solve, remark = _solver(
        cut,
        family.uses[0],
        rows,
        uses.wide_inputs,
        weight=first.weight,
        split=split,
    )
    if remark:
        remarks.append(remark)
    found = choose_ridge(rows.x, rows.residual, split, solve)
    behind = _behind_clamp(rows, split, solve, found)
    if behind is None or uses.clamp is None:
        rows = replace(rows, bounds=None)
    else:
        found = behind
        form = f"{form} behind {uses.clamp.op}"
    stored = as_stored(editor, first, rows, split, found=found)
    if stored is None:
        kind = editor.stored_type(weight_name(editor, first.here))
        remarks.append(f"fitted weights are out of range for {kind}, so it is not refitted")
        return None, remarks
    scale = pooled_variance(uses.spreads, own_means=own_biases) or 1.0
    before, after = stored.errors
    _, count, unknowns = rows.x.shape
    fit = Fit(family.title, form, count, unknowns, stored.ridge, before / scale, after / scale)
    improves = after < before
    change = stored.change if improves else None
    if change is not None:
        write_weight(editor, first, change, for_all=family.is_shared)
    if own_biases:
        _write_own_biases(editor, family, uses.layers, means, change)
    elif improves:
        editor.add_bias(first.here, stored.shift.reshape(-1), for_all=family.is_shared)
    return fit, remarks


@dataclass(frozen=True, eq=False)
class _Uses:
    """All nodes that share a weight, with their sampled rows.

    Attributes:
        layers: The nodes in the cut model.
        rows: Rows of each, in units of the first one; emptied where they are stacked.
        spreads: Variance of the outputs of each.
        wide_inputs: Inputs in the original model, only of a node whose channels are mixed; None for others.
        clamp: Clamp behind the node, if the weight has only one.
    """

    layers: list[CutLayer]
    rows: list[Rows]
    spreads: list[Spread]
    wide_inputs: Array | None
    clamp: Clamp | None


def _sampled(
    cut: Cut,
    editor: Editor,
    family: Family,
    frontier: Frontier,
    targets: dict[str, Target],
    *,
    copies: Copied | None,
    remarks: list[str],
) -> _Uses | None:
    """Rows of all nodes that share a weight; None where one cannot be fitted, with the reason in ``remarks``."""
    layers: list[CutLayer] = []
    rows: list[Rows] = []
    spreads: list[Spread] = []
    wide_inputs: Array | None = None
    clamp: Clamp | None = None
    for place in family.uses:
        name = place.node.name
        source = None if name in family.late else frontier
        target = targets[name]
        if not family.is_shared:
            clamp = clamp_behind(cut.model, place, target.join)
        use = use_of(
            cut, editor, place, source, target=target, remarks=remarks, copies=copies, clamp=clamp
        )
        if name in family.late:
            targets[name] = replace(targets[name], inputs=())
        if use is None:
            return None
        layers.append(use.layer)
        rows.append(use.rows.times(use.layer.here.factor / layers[0].here.factor))
        spreads.append(use.spread)
        wide_inputs = use.wide_inputs
        del use  # memory holds one copy of the rows
    return _Uses(layers, rows, spreads, wide_inputs, clamp)


def _write_own_biases(
    editor: Editor,
    family: Family,
    layers: Sequence[CutLayer],
    means: Sequence[tuple[Floats, Floats]],
    change: Floats | None,
) -> None:
    """Gives every node its own bias under a common change of the weight; late ones get theirs by :func:`shift_bias`."""
    for layer, (mean_input, mean_residual) in zip(layers, means, strict=True):
        if layer.here.node.name not in family.late:
            shift = best_shift(mean_input, mean_residual, change)
            editor.add_bias(layer.here, shift.reshape(-1))


def _solver(
    cut: Cut,
    place: Site,
    sampled: Rows,
    wide_inputs: Array | None,
    *,
    weight: Floats,
    split: int,
) -> tuple[str, Solve | None, str]:
    """Chooses the form of a fit: (name for the report, solver for the weights, remark for the user).

    A constant in place of a node without inputs has no weights to solve for.

    A wide node with channels of several inputs each has fewer unknowns if whole channels are mixed. Any other is solved
    for all its unknowns: in its dual form the system is no larger than the number of rows.
    """
    rows, unknowns = sampled.x.shape[1:]
    if not unknowns:
        return "constant", None, ""
    if wide_inputs is None:
        remark = ""
        if rows < unknowns:
            remark = f"{rows} rows for {unknowns} unknowns, so more calibration samples would help"
        return "least squares", ridge_regression(sampled.x, sampled.residual, split), remark
    mixing = channel_mixing(cut, place, wide_inputs, sampled.x, weight)
    too_many = f"{unknowns} unknowns are too many for a Gram matrix"
    return "channel mixing", mixing, f"{too_many}, so removed channels are mixed into kept ones"


def _behind_clamp(rows: Rows, split: int, solve: Solve | None, plain: RidgeFit) -> RidgeFit | None:
    """Continues a fit to the outputs behind the clamp of a node; None if there is none, or if that gains nothing."""
    if rows.bounds is None or not (solve is None or isinstance(solve, Regression)):
        return None
    return ClampedProblem(rows.x, rows.residual, rows.bounds, split).refined(solve, plain)


def _has_common_bias(editor: Editor, layers: Sequence[CutLayer]) -> bool:
    """Tests for uses of a weight that share their bias too, and with no other node."""
    names = {editor.source(editor.bias_name(layer.here)) for layer in layers}
    readers = len(layers)
    return len(names) == 1 and "" not in names and len(editor.readers_of(names.pop())) == readers


def shift_bias(
    cut: Cut,
    editor: Editor,
    place: Site,
    frontier: Frontier,
    target: Target,
) -> None:
    """Refits the bias of a node whose weight was refitted before its input was known.

    Args:
        cut: The original model and the kept units.
        editor: The cut model, changed in place.
        place: The node in the original model.
        frontier: Activations of the cut model.
        target: Outputs of the node in the original model.
    """
    remarks: list[str] = []
    use = use_of(cut, editor, place, frontier, target=target, remarks=remarks)
    if use is None or _shares_bias(editor, use.layer):
        return
    split = leading_rows(use.rows.count)
    if split == use.rows.count:
        return
    found = choose_ridge(use.rows.x, use.rows.residual, split, None)
    before, after = found.errors
    if after < before:
        editor.add_bias(use.layer.here, found.shift.reshape(-1))


def _shares_bias(editor: Editor, use: CutLayer) -> bool:
    """Tests for a node whose bias other nodes read as well."""
    name = editor.bias_name(use.here)
    return bool(name) and len(editor.readers_of(editor.source(name))) > 1
