"""Bias refit: the mean of every removed channel, times its weights, is added to the bias of its consumer.

For a convolution with zero padding this is exact away from the border.
"""

from __future__ import annotations

import numpy as np
import onnx

from onnx_oamip.core.records import Bools, Coupling, Floats, Model, Pruned, Statistics
from onnx_oamip.graph.linear_layers import Editor, matrix, site
from onnx_oamip.repair.cut_model import Cut, notes_on_bodies, output_mask


def fold_means(
    model: Model,
    coupling: Coupling,
    units: Bools,
    statistics: Statistics,
    raw: onnx.ModelProto,
) -> Pruned:
    """Adds the means of removed channels to the biases of their consumers.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        statistics: Moments of the channels of every consumer.
        raw: The cut model.

    Returns:
        The changed model, with a note for every consumer whose bias could not be changed.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(raw)
    editor = Editor(proto)
    nodes = {node.name: node for node in model.nodes}
    idle = Cut(model, coupling, units).emptied.idle
    notes = notes_on_bodies(model, coupling, units)
    for consumer in coupling.consumers:
        node = nodes[consumer.node]
        keep = coupling.keep((consumer.data, consumer.axis), units)
        if keep.all() or consumer.weight not in model.constants or node.name in idle:
            continue
        place = site(node, model.constants)
        if place is None:
            notes.append(
                f"{node}: its weight has no plain matrix form, so the mean of what was removed is not added"
            )
            continue
        weight = matrix(place, model.constants[place.weight])
        means = statistics.moments[consumer.data, consumer.axis].mean
        removed_means = np.where(keep, 0.0, means).reshape(len(weight), -1)
        contribution = np.einsum("goit,gi->go", weight, removed_means)
        shift: Floats = place.factor * contribution.reshape(-1)
        if place.rules.scatters:
            # The taps of a transposed convolution are spread over the positions between two input pixels.
            shift /= int(np.prod(node.attrs.get("strides", [1])))
        kept_outputs = output_mask(model, coupling, place, units)
        if not editor.add_bias(place, shift[kept_outputs]):
            notes.append(
                f"{node}: its bias is computed, so the mean of what was removed is not added"
            )
    return Pruned(raw, proto, tuple(notes))
