"""Residual joins: sums of a linear node's output with another branch that is computed before it.

A refit that only reconstructs the output of its own node leaves the error of the other branch uncorrected. The node can
compensate it: its target becomes ``y + (t - t') / gain``, where t and t' are the other branch in the original and in
the cut model, and gain is the factor of the normalisation between the node and the sum.

Source: He, Zhang and Sun, ICCV 2017, section 3.3, "enhancement for multi-branch networks", here with a normalisation in
between and for any linear operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Bools, Floats, Model
from onnx_oamip.graph import chains
from onnx_oamip.graph.ops import Trait, batch_scale, has
from onnx_oamip.graph.ops.matrix_view import Site

LEAST_GAIN = 1e-2
"""Smallest gain, relative to the largest, with which a channel takes part in the compensation."""


@dataclass(frozen=True)
class Join:
    """A sum that the output of a linear node reaches.

    Attributes:
        other: Tensor of the other branch.
        gain: Factor from the node to the sum (outputs,); 0 where it is too small.
    """

    other: str
    gain: Floats

    def correction(self, error: Floats, kept: Bools) -> Floats:
        """Change of the node's output that compensates the error of the other branch.

        Args:
            error: Original minus cut value of the other branch (rows, kept outputs).
            kept: Mask of the outputs that the node keeps (outputs,).

        Returns:
            The change (rows, kept outputs); 0 where the gain is too small.
        """
        gain = self.gain[kept]
        usable = gain != 0
        return np.where(usable, error / np.where(usable, gain, 1), 0)


def join(model: Model, place: Site) -> Join | None:
    """Finds the residual sum that the output of a linear node reaches through biases and normalisation only.

    Args:
        model: The original model.
        place: The linear node.

    Returns:
        The join, or None if there is no such sum.
    """
    output = place.node.outputs[0]
    shape = model.shapes.get(output)
    if shape is None:
        return None
    axis = place.output_axis % len(shape)
    gain = np.ones(shape[axis])
    for tensor, node in chains.of_model(model).behind(output):
        if has(node, Trait.BATCH_NORM):
            # A batch normalisation scales axis 1.
            scale = batch_scale(node, model.constants) if axis == 1 else None
            if scale is None:
                return None
            factor, deviation = scale
            gain = gain * factor / deviation
        elif has(node, Trait.SUM) and len(node.inputs) == 2:
            other = node.inputs[1] if node.inputs[0] == tensor else node.inputs[0]
            if other not in model.constants:
                if model.shapes.get(other) != shape or other == tensor:
                    return None
                muted = np.abs(gain) < LEAST_GAIN * np.abs(gain).max(initial=0.0)
                return Join(other, np.where(muted, 0.0, gain))
        elif not has(node, Trait.IDENTITY):
            return None
        if model.shapes.get(node.outputs[0]) != shape:
            return None
    return None
