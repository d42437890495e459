"""Residual joins: where a linear node's output is added to another branch that is computed before it.

A refit that only rebuilds its own node's output leaves the error that the other branch has gathered. The node can take
it on: its target becomes ``y + (t - t') / gain``, where t and t' are the other branch in the original and in the cut
model and gain is what normalisation does between the node and the sum (He, Zhang and Sun, ICCV 2017, section 3.3,
"enhancement for multi-branch networks", here with the normalisation in between and for any operator).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Floats, Model
from onnx_oamip.graph import chains
from onnx_oamip.graph.ops import Trait, batch_scale, has
from onnx_oamip.graph.ops.matrix_view import Site

LEAST_GAIN = 1e-2
"""Relative to the largest gain: a channel that normalisation mutes is not asked to carry an error."""


@dataclass(frozen=True)
class Join:
    """The other branch of a node's sum, and the gain (outputs,) from the node to the sum; 0 where it is too small."""

    other: str
    gain: Floats

    def correction(self, error: Floats, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Floats:
        """What the node must add to undo ``error`` (rows, kept outputs) of the other branch."""
        gain = self.gain[kept]
        return np.where(gain != 0, error / np.where(gain != 0, gain, 1), 0)


def join(model: Model, place: Site) -> Join | None:
    """The join a linear node's output runs into through biases and normalisation only, or None."""
    output = place.node.outputs[0]
    shape = model.shapes.get(output)
    if shape is None:
        return None
    gain = np.ones(shape[place.output_axis])
    for tensor, node in chains.of_model(model).behind(output):
        if has(node, Trait.BATCH_NORM):
            scale = batch_scale(node, model.constants)
            if scale is None:
                return None
            gain = gain * scale[0] / scale[1]
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
