"""Normalisation: per-channel parameters are coupled with their channel; a normalised axis is pinned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_oamip.core.records import Array, Floats, Ints, Node
from onnx_oamip.graph.ops import maps
from onnx_oamip.graph.ops.handles import Cuts, Labels, Refused, Terms
from onnx_oamip.graph.ops.notation import extra_outputs, opaque, rule
from onnx_oamip.graph.ops.spec import Edit, EditRules, LikeInput, OpSpec, Trait


def _training(node: Node, labels: Labels) -> str | None:
    if node.attrs.get("training_mode", 0):
        return f"{node} is in training mode"
    return None


def _softmax(node: Node, labels: Labels) -> None:
    shape = labels.shape(node.inputs[0])
    if shape is None:
        opaque(node, labels, f"{node} reads a tensor of unknown shape")
        return
    axis = int(node.attrs.get("axis", -1 if node.version >= 13 else 1)) % max(len(shape), 1)
    # Before opset 13 the input is flattened to two axes at `axis`, so everything behind it is normalised together.
    normalised = range(axis, len(shape)) if node.version < 13 else [axis]
    _pin_axes(node, labels, normalised)


def _layer(node: Node, labels: Labels) -> None:
    """Statistics over one axis: it is consumed, with zeros for removed channels, and passed on."""
    shape = labels.shape(node.inputs[0])
    if shape is None:
        opaque(node, labels, f"{node} reads a tensor of unknown shape")
        return
    axis = _layer_axis(node, shape)
    if axis != len(shape) - 1 or any(node.outputs[1:]):
        _pin_axes(node, labels, range(axis, len(shape)))
        return
    for name in node.inputs[1:]:  # gain and bias meet the padded data and stay whole
        if name and not labels.is_constant(name):
            opaque(node, labels, f"{node} takes a parameter from a computation")
            return
    _consume_and_pass(node, labels, axis)


def _layer_axis(node: Node, shape: tuple[int, ...]) -> int:
    return int(node.attrs.get("axis", -1)) % max(len(shape), 1)


def _layer_spread(node: Node, cuts: Cuts) -> Edit:
    """Mean and variance do not depend on the order: zeros come last, gain and bias of kept channels first."""
    axis = _layer_axis(node, cuts.shape(node.inputs[0]))
    keep = cuts.keep(node.inputs[0], axis)
    if keep is None:
        return Edit()
    inputs: dict[int, Array | None] = {}
    for slot in range(1, len(node.inputs)):
        value = cuts.constant(node.inputs[slot])
        if value is not None and value.shape[-1:] == keep.shape:
            # Values behind the kept ones are dropped: zero, so that one cut leaves the same as two.
            first = np.zeros_like(value)
            first[..., : keep.sum()] = value[..., keep]
            inputs[slot] = first
    return Edit(inputs=inputs, spread=axis, ordered=False)


def crosses_seam(channels: Ints, groups: int) -> bool:
    """Tell groups in which channels of different origin meet, as where a concatenation is normalised.

    As units, such groups would tie the parts of the concatenation to each other, and with skip connections the whole
    network to one unit.

    Args:
        channels: Labels of the channels.
        groups: Number of groups of equal size.

    Returns:
        True if the labels of a group do not follow each other.
    """
    steps = np.diff(channels.reshape(groups, -1), axis=1)
    return bool(((steps != 0) & (steps != 1)).any())


def _groups(node: Node, labels: Labels) -> None:
    """GroupNormalization: a unit is a whole group, or a channel where groups cross a seam.

    Gain and bias are per group before opset 21, per channel since.
    """
    found = labels.label(node.inputs[0], 1)
    shape = labels.shape(node.inputs[0])
    if shape is None or found is None or not all(labels.is_constant(n) for n in node.inputs[1:3]):
        opaque(node, labels, f"{node} reads something untracked")
        return
    if any(len(labels.shape(name) or ()) != 1 for name in node.inputs[1:3]):
        opaque(node, labels, f"{node} has a parameter that is no list")
        return
    for axis in (0, *range(2, len(shape))):
        labels.pin(labels.label(node.inputs[0], axis), f"{node} normalises over this axis")
    groups = int(node.attrs["num_groups"])
    if crosses_seam(found, groups):
        _consume_and_pass(node, labels, 1)
        return
    blocks = found.reshape(groups, -1)
    labels.tie(blocks, blocks[:, :1])
    for name in node.inputs[1:3]:
        made = labels.label(name, 0)
        assert made is not None
        labels.tie(made, found if made.size == found.size else np.ascontiguousarray(blocks[:, 0]))
    labels.set(node.outputs[0], [None, found] + [None] * (len(shape) - 2))


def _regroup(node: Node, cuts: Cuts) -> Edit:
    by_channel = cuts.keep(node.inputs[0], 1) is not None and cuts.keep(node.inputs[1], 0) is None
    if by_channel:
        return Edit(spread=1)  # gain and bias meet the channels at their old places
    channels = cuts.shape(node.inputs[0])[1]
    groups = int(node.attrs["num_groups"])
    kept = cuts.kept(node.inputs[0], 1) * groups // channels
    if kept == groups:
        return Edit()
    return Edit({"num_groups": kept})


def _neighbours(node: Node, labels: Labels) -> None:
    """Channel rule of LRN, which divides by a sum over neighbours: it consumes the channels and passes them on."""
    _consume_and_pass(node, labels, 1)


def _consume_and_pass(node: Node, labels: Labels, axis: int) -> None:
    """Consume an axis and pass it on: exact if zeros add nothing, or if a cut inserts them (``Edit.spread``)."""
    data = labels.axes(node.inputs[0])
    if axis < len(data) and data[axis] is not None:
        labels.consume(node, (node.inputs[0], axis), None)
    labels.set(node.outputs[0], data)


def _spread(node: Node, cuts: Cuts) -> Edit:
    if cuts.keep(node.inputs[0], 1) is None:
        return Edit()
    return Edit(spread=1)


def _all_but_first(node: Node, labels: Labels) -> None:
    _pin_axes(node, labels, range(1, len(labels.shape(node.inputs[0]) or ())))


def _lp(node: Node, labels: Labels) -> None:
    shape = labels.shape(node.inputs[0])
    if shape is None:
        opaque(node, labels, f"{node} reads a tensor of unknown shape")
        return
    _consume_and_pass(node, labels, int(node.attrs.get("axis", -1)) % max(len(shape), 1))


def _pin_axes(node: Node, labels: Labels, axes: range | list[int]) -> None:
    data = labels.axes(node.inputs[0])
    for axis in axes:
        if axis < len(data):
            labels.pin(data[axis], f"{node} normalises over this axis")
    labels.set(node.outputs[0], data)
    extra_outputs(node, labels, 1)


BATCH_AFFINE_SLOTS = (1, 2)
"""Input indices of the gain and the bias of a batch normalisation."""


def batch_scale(node: Node, constants: Mapping[str, Array]) -> tuple[Floats, Floats] | None:
    """Read the factor and the divisor of a batch normalisation.

    Args:
        node: A batch normalisation.
        constants: Values of constants by name.

    Returns:
        The gain and the standard deviation of every channel, or None where a parameter is computed or the node is in
        training mode, in which it normalises by statistics of the batch.
    """
    is_training = bool(node.attrs.get("training_mode", 0))
    if is_training or not all(name in constants for name in node.inputs[1:5]):
        return None
    gain, variance = (constants[node.inputs[slot]].astype(np.float64) for slot in (1, 4))
    return gain, np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))


def batch_affine(node: Node, constants: Mapping[str, Array]) -> tuple[Floats, Floats] | None:
    """Read a batch normalisation as a factor and a shift of every channel.

    Args:
        node: A batch normalisation.
        constants: Values of constants by name.

    Returns:
        (factor, shift), or None where a parameter is computed or the node is in training mode.
    """
    read = batch_scale(node, constants)
    if read is None:
        return None
    gain, deviation = read
    factor = gain / deviation
    bias, mean = (constants[node.inputs[slot]].astype(np.float64) for slot in (2, 3))
    return factor, bias - mean * factor


def shift_alone(node: Node, shift: Floats) -> dict[int, Floats]:
    """Make the parameters with which a batch normalisation only adds a shift.

    Args:
        node: A batch normalisation.
        shift: Shift of every channel (channels,).

    Returns:
        Values by input index.
    """
    gain = np.full_like(shift, np.sqrt(1 + float(node.attrs.get("epsilon", 1e-5))))
    return {1: gain, 2: shift, 3: np.zeros_like(shift), 4: np.ones_like(shift)}


def _batch_encode(node: Node, terms: Terms) -> None:
    """In inference: a scale and a shift per channel."""
    if node.attrs.get("training_mode", 0):
        raise Refused(f"{node} is in training mode")
    found = [terms.constant(n) for n in node.inputs[1:5]]
    if any(v is None for v in found):
        raise Refused(f"{node} takes a parameter from a computation")
    gain, bias, mean, variance = (np.asarray(v, np.float64) for v in found)
    x = node.inputs[0]
    out = node.outputs[0]
    shape = terms.shape(x)
    scale = gain / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    view = (-1, *[1] * (len(shape) - 2))
    matrix = maps.broadcast(shape, shape, scale.reshape(view))
    terms.affine(out, [(x, matrix)], np.broadcast_to((bias - mean * scale).reshape(view), shape))


SPECS = (
    OpSpec(
        "BatchNormalization",
        rule("n c *, c, c, c, c -> n c *", _training),
        encode=_batch_encode,
        traits=Trait.ELEMENTWISE | Trait.BATCH_NORM | Trait.CHANNEL_AFFINE,
    ),
    OpSpec("InstanceNormalization", rule("n c *, c, c -> n c *")),
    OpSpec("LRN", _neighbours, edit=EditRules(_spread)),
    OpSpec("GroupNormalization", _groups, edit=EditRules(_regroup), shape=LikeInput()),
    OpSpec("LayerNormalization", _layer, edit=EditRules(_layer_spread)),
    OpSpec("RMSNormalization", _layer, edit=EditRules(_layer_spread)),
    OpSpec("LpNormalization", _lp),
    OpSpec("MeanVarianceNormalization", _all_but_first),
    OpSpec("Softmax", _softmax, traits=Trait.SOFTMAX | Trait.SATURATES),
    OpSpec("LogSoftmax", _softmax, traits=Trait.SOFTMAX | Trait.SATURATES),
    OpSpec("Hardmax", _softmax),
)
