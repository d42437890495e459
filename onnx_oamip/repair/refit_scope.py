"""Scope of a refit: the nodes behind a cut that are refitted, and notes on those that cannot be."""

from __future__ import annotations

from onnx_oamip.core.records import Bools, Coupling, Model, Node
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import DEFAULT_MEMORY_LIMIT
from onnx_oamip.graph.im2col import row_count
from onnx_oamip.graph.linear_layers import Editor, matrix_shape, quantised, site
from onnx_oamip.graph.ops import lookup
from onnx_oamip.graph.partial_execution import Slicer
from onnx_oamip.graph.weight_sharing import Sharing
from onnx_oamip.repair import recurrent
from onnx_oamip.repair.cut_model import Cut, notes_on_bodies
from onnx_oamip.repair.row_sampling import GRAM_CAP, is_wide, row_limit
from onnx_oamip.repair.shared_weights import Family, schedule

SHORT = 0.1
"""Share of all rows that a fit of a node samples, from which on augmented copies are added to its rows."""


def families_behind(cut: Cut) -> tuple[list[Family], list[recurrent.Layer], list[str]]:
    """Find the nodes to refit.

    They are the consumers of removed channels, all linear nodes behind one, whose input has changed, and all that share
    a weight with one of these.

    Args:
        cut: The original model and the kept units.

    Returns:
        Linear nodes, those that share a weight together; recurrent layers; and notes on nodes that cannot be refitted.
    """
    model = cut.model
    changed = _changed_nodes(cut)
    slicer = Slicer(model.proto)
    outputs = (name for node in slicer.nodes if node.name in changed for name in node.output)
    behind = {slicer.nodes[i].name for i in slicer.descendants(outputs)}
    sharing = Sharing(model)
    families: dict[str, Family] = {}
    layers = []
    notes = notes_on_bodies(model, cut.coupling, cut.units)
    for node in model.nodes:
        if node.name in cut.emptied.idle:
            continue
        is_behind_cut = node.name in changed or node.name in behind
        if is_behind_cut and (layer := recurrent.layer(node, model)) is not None:
            layers.append(layer)
            continue
        place = site(node, model.constants) if is_behind_cut else None
        obstacle = "" if place is None else sharing.obstacle(place)
        if obstacle:
            notes.append(f"{node}: {obstacle}, so it is not refitted")
        elif place is not None:
            uses = (use for use in sharing.family(place) if use.node.name not in cut.emptied.idle)
            family = Family(tuple(uses))
            families.setdefault(family.names[0], family)
        elif node.name in changed:
            notes += _notes_on_unfitted(node, model)
    order = {node.name: i for i, node in enumerate(model.nodes)}
    in_order = sorted(families.values(), key=lambda family: order[family.names[0]])
    return schedule(in_order, slicer), layers, notes


def _changed_nodes(cut: Cut) -> set[str]:
    """Names of the nodes of the main graph that read removed channels, themselves or in a subgraph."""
    return {
        cut.model.homes[consumer.node]
        for consumer in (*cut.coupling.consumers, *cut.coupling.inside)
        if not cut.coupling.keep((consumer.data, consumer.axis), cut.units).all()
    }


def _notes_on_unfitted(node: Node, model: Model) -> list[str]:
    """Reason why a node without matrix form is not refitted, if one could expect that it is."""
    has_constant = any(name in model.constants for name in node.inputs[:2])
    multiplies = _has_cost(node) and has_constant
    if quantised(node, model) or (multiplies and _multiplies_codes(node, model)):
        return [f"{node}: its weight is quantised, so it is not refitted"]
    if multiplies:
        return [f"{node}: its weight has no plain matrix form, so it is not refitted"]
    return []


def _multiplies_codes(node: Node, model: Model) -> bool:
    """Tests for a product with a constant matrix of integers."""
    held = (model.constants.get(name) for name in node.inputs)
    return any(value is not None and value.ndim > 1 and value.dtype.kind in "iu" for value in held)


def _has_cost(node: Node) -> bool:
    """Tests for an operator with weights that multiply; the gain of a normalisation is none."""
    spec = lookup(node.domain, node.op, node.version)
    return spec is not None and spec.cost is not None


def new_biases(model: Model) -> int:
    """Bound the parameters that a refit adds from above: biases of linear nodes that have none yet.

    Args:
        model: The original model.

    Returns:
        Number of elements before pruning.
    """
    editor = Editor(model.proto)
    places = (site(node, model.constants) for node in model.nodes)
    products = sum(editor.bias_growth(place) for place in places if place is not None)
    return products + recurrent.bias_growth(model)


def short_of_samples(
    model: Model, coupling: Coupling, units: Bools, samples: Samples
) -> frozenset[str]:
    """Find the nodes whose fit samples so many of their rows that more samples, or copies of them, add to it.

    Args:
        model: The original model.
        coupling: Its coupling.
        units: Keep mask of the units (n_units,).
        samples: Calibration samples.

    Returns:
        Names of the nodes whose fit samples at least the share ``SHORT`` of their rows. Nodes that share a weight, and
        those too wide for a Gram matrix, are none of them.
    """
    result = set[str]()
    cut = Cut(model, coupling, units)
    families, _, _ = families_behind(cut)
    for family in families:
        place = family.uses[0]
        shape = model.shapes.get(place.node.outputs[0])
        weight = model.constants[place.weight]
        if shape is None or family.is_shared or is_wide(place, weight, GRAM_CAP):
            continue
        if place.node.name in cut.emptied.biases:
            continue
        rows = row_count(place, shape) * samples.usable() / max(model.batch, 1)
        if row_limit(matrix_shape(place, weight), GRAM_CAP, DEFAULT_MEMORY_LIMIT) >= SHORT * rows:
            result.add(place.node.name)
    return frozenset(result)
