"""Refit of one layer's kept connections to the outputs of the original layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Bools, Fit, Floats
from onnx_oamip.graph.im2col import data_rows, output_rows
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Frontier
from onnx_oamip.published.nnrelief.masked_ridge import masked_solver
from onnx_oamip.repair.ridge import RIDGES, choose_ridge
from onnx_oamip.repair.row_sampling import leading_rows
from onnx_oamip.repair.targets import Target

ROUNDING = 1e-10
"""Error, relative to the variance of a layer's outputs, that single precision alone causes."""


@dataclass(frozen=True)
class Rows:
    """Sampled rows of a layer.

    Attributes:
        inputs: Inputs in the pruned network (groups, rows, inputs * taps).
        outputs: Wanted outputs (groups, rows, outputs).
    """

    inputs: Floats
    outputs: Floats


@dataclass(frozen=True)
class Connected:
    """A layer with the connections that may change.

    Attributes:
        site: The layer.
        weight: Its weights (groups, outputs, inputs, taps).
        bias: Its biases (outputs,).
        mask: Kept weights (groups, outputs, inputs).
        live: Outputs (outputs,) that a later layer reads. The others get no bias and do not count as errors.
    """

    site: Site
    weight: Floats
    bias: Floats
    mask: Bools
    live: Bools


def collect_rows(
    site: Site,
    frontier: Frontier,
    *,
    target: Target,
    editor: Editor,
    original_bias: Floats,
) -> Rows:
    """Collect the inputs of a layer in the pruned network, and the outputs that it should have.

    These are the outputs of the original layer, with the bias that is added behind it. At the end of a residual branch
    they also compensate the error of the other branch.

    Args:
        site: The layer.
        frontier: Execution of the pruned network, up to the layer.
        target: Outputs of the original layer.
        editor: Editor of the pruned network.
        original_bias: Whole bias of the original layer (outputs,).

    Returns:
        The rows.
    """
    feeds = frontier.reach([site.data])[site.data]
    sampled = zip(feeds, target.rows, target.shapes, strict=True)
    inputs = np.concatenate([data_rows(site, value, rows, shape) for value, rows, shape in sampled])
    outputs = np.concatenate(target.values).astype(np.float64)
    own_bias = editor.bias(site)
    outputs += original_bias - (own_bias if own_bias is not None else 0.0)
    if target.join is not None:
        feeds = frontier.reach([target.join.other])[target.join.other]
        present = [
            output_rows(site, value, rows) for value, rows in zip(feeds, target.rows, strict=True)
        ]
        error = np.concatenate(target.joined) - np.concatenate(present)
        outputs += target.join.correction(error, np.ones(outputs.shape[1], bool))
    by_group = outputs.reshape(len(outputs), site.groups, -1)
    return Rows(inputs.transpose(1, 0, 2), by_group.transpose(1, 0, 2))


def refit(
    layer: Connected,
    rows: Rows,
    *,
    bias_only: bool,
    ridges: Sequence[float] = RIDGES,
) -> tuple[Floats, Floats, Fit | None]:
    """Fit the kept connections of a layer to its wanted outputs.

    Args:
        layer: The layer.
        rows: Its inputs and wanted outputs.
        bias_only: Fit the biases alone.
        ridges: Ridge strengths to choose from.

    Returns:
        Weights, biases, and a record of the fit; None if there are too few rows.
    """
    weight = layer.weight
    site = layer.site
    x = rows.inputs
    y = rows.outputs
    groups, outs, ins, taps = weight.shape
    by_row = (site.factor * weight).reshape(groups, outs, ins * taps)
    live = layer.live.reshape(groups, 1, outs)
    bias = np.where(layer.live, layer.bias, 0.0)
    count = x.shape[1]
    if count < 2:
        return weight, bias, None

    difference = y - x @ by_row.transpose(0, 2, 1) - layer.bias.reshape(groups, 1, outs)
    residual = np.where(live, difference, 0.0)
    split = min(leading_rows(count), count - 1)
    support = np.repeat(layer.mask, taps, axis=2) & live.transpose(0, 2, 1)
    solve = None
    if not bias_only and support.any():
        solve = masked_solver(x, residual, split, support)
    found = choose_ridge(x, residual, split, solve, ridges)
    error_before, error_after = found.errors
    scale = float(np.where(live[:, 0], y.var(axis=1), 0.0).sum()) or 1.0
    fit = Fit(
        node=site.node.name,
        form="bias" if bias_only else "least squares",
        rows=count,
        unknowns=int(support.sum()),
        ridge=found.ridge,
        error_before=error_before / scale,
        error_after=error_after / scale,
    )
    # An error up to ROUNDING is no loss, and there is nothing to gain.
    if error_after < error_before and error_before > ROUNDING * scale:
        if found.change is not None:
            change = found.change.transpose(0, 2, 1).reshape(weight.shape)
            weight = weight + change / site.factor
        bias = bias + np.where(layer.live, found.shift.reshape(-1), 0.0)
    return weight, bias, fit
