"""Cut models as the refit sees them: which outputs, inputs and units of a linear node are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx

from onnx_oamip.core.records import Bools, Coupling, Ints, Model
from onnx_oamip.graph.emptying import Effect, effect_of
from onnx_oamip.graph.linear_layers import matrix_shape
from onnx_oamip.graph.ops.matrix_view import Site


@dataclass(frozen=True)
class Cut:
    """A model and what is cut from it.

    Attributes:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
    """

    model: Model
    coupling: Coupling
    units: Bools

    @cached_property
    def emptied(self) -> Effect:
        """Effect of the groups without units."""
        return effect_of(self.model, self.coupling, self.units)


def output_mask(
    model: Model,
    coupling: Coupling,
    place: Site,
    units: Bools,
) -> Bools:
    """Find the outputs that a linear node keeps.

    Args:
        model: The original model.
        coupling: Its coupling.
        place: The linear node.
        units: Keep mask of the units (n_units,).

    Returns:
        A mask of the original outputs (outputs,).
    """
    output = place.node.outputs[0]
    shape = model.shapes.get(output)
    if shape is not None:
        axis = place.output_axis % len(shape)
        if (output, axis) in coupling.axes:
            return coupling.keep((output, axis), units)
    groups, outs, _, _ = matrix_shape(place, model.constants[place.weight])
    return np.ones(groups * outs, bool)


def in_cut_model(place: Site, node: onnx.NodeProto) -> Site:
    """Describe a linear node with the number of groups that it has after the cut.

    Args:
        place: The node in the original model.
        node: The node in the cut model.

    Returns:
        The description in which the matrix form of the cut weight is read.
    """
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    attrs = {**place.node.attrs, "group": group}
    groups = int(group) if place.spatial else 1
    return replace(place, node=replace(place.node, attrs=attrs), groups=groups)


def units_of_inputs(cut: Cut, place: Site) -> Ints | None:
    """Find the unit of every input channel of a linear node.

    Args:
        cut: The original model and the kept units.
        place: The node in the original model.

    Returns:
        Numbers of units (channels,); None if some have no unit, the node has several groups, or the shape of its input
        is unknown.
    """
    shape = cut.model.shapes.get(place.data)
    if shape is None:
        return None
    axis = place.data_axis % len(shape)
    units = cut.coupling.axes.get((place.data, axis))
    if units is None or place.groups > 1 or (units < 0).any():
        return None
    return units


def notes_on_bodies(
    model: Model,
    coupling: Coupling,
    units: Bools,
) -> list[str]:
    """Describe the nodes whose subgraphs lost channels: no statistics are collected in there.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).

    Returns:
        One note per node.
    """
    pruned = {
        model.homes[consumer.node]
        for consumer in coupling.inside
        if not coupling.keep((consumer.data, consumer.axis), units).all()
    }
    return [
        f"{node}: its body lost channels and is not refitted, as no data is seen inside"
        for node in model.nodes
        if node.name in pruned
    ]
