"""Recurrent operators: LSTM, GRU and RNN lose hidden units. Reference: ONNX operator specification, opsets 7 to 22.

With G gates (4, 3, 1), D directions and h hidden units, ``W`` is (D, G h, inputs), ``R`` (D, G h, h), ``B`` (D, 2 G h)
and the peepholes ``P`` (D, 3 h): gates are stacked, so a hidden unit holds one row of every gate. The last axis of
``R`` meets the node's own output of the step before: there the unit is consumed inside the node, and to mask it is to
zero its column of ``R``. A masked unit then reaches no other unit, whatever its activations, clip or
initial state are, because everything else in the three cells acts unit by unit.

Both directions live in the same arrays, so that hidden units ``j`` of both are removed together.

``DynamicQuantizeLSTM`` of ONNX Runtime has codes of the transposed ``W`` (D, inputs, G h) and ``R`` (D, h, G h), and
quantises the hidden state at every step by the range of all units. To mask a unit is therefore to zero its gates, so
that its state stays zero, which is in every range.
"""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, TensorProto, numpy_helper

from onnx_oamip.core.records import Array, Axis, Ints, Node
from onnx_oamip.graph.ops.handles import Cuts, LabelAxis, Labels, operand
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import Codes, Edit, EditRules, LikeOperator, OpSpec, Shapes, Total

QUANTISED_GATES = 4
"""Gates of DynamicQuantizeLSTM."""
ZERO_POINTS = {1: 9, 2: 11}
"""Slots of the codes of DynamicQuantizeLSTM, with those of their zero points; the scale is in front of each."""

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
RESETTING = "GRU"
"""Has a reset gate, which multiplies the state in front of its third gate or behind it."""
LENGTHS = 4
"""Input with the lengths of the sequences; all have that of the data where it is absent."""
STATES = (5, 6)
"""Inputs with a state to start from; the specification takes zeros where they are absent."""
STILL = (
    "Identity",
    "Cast",
    "Expand",
    "Slice",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Tile",
    "Gather",
)
"""Operators that make zeros of zeros."""


def _recurrent(node: Node, labels: Labels) -> None:
    x, w, r = node.inputs[:3]
    gates = GATES[node.op]
    shape = labels.shape(r)
    weights = {1: w, 2: r, 3: operand(node, 3), 7: operand(node, 7)}
    if shape is None or not all(labels.is_constant(n) for n in weights.values() if n):
        opaque(node, labels, f"{node} takes its weights from a computation")
        return
    _pin_steps(node, labels)
    hidden = labels.label(r, 2)
    assert hidden is not None
    _stack(labels, (w, 1), gates, hidden)
    _stack(labels, (r, 1), gates, hidden)
    if weights[3]:
        _stack(labels, (weights[3], 1), 2 * gates, hidden)
    if weights[7]:
        _stack(labels, (weights[7], 1), 3, hidden)
    if labels.unify([(x, 2), (w, 2)], node) is not None:
        labels.consume(node, (x, 2), (w, 2))
    for slot in STATES:
        state = operand(node, slot)
        if state is not None:
            _initial_state(node, labels, state, hidden=(r, 2))
    # The recurrent weights meet the hidden state, not the cell: Y, or Y_h where only that is asked for.
    seen = next((name for name in node.outputs[:2] if name), None)
    meets = (seen, _last(labels, seen)) if seen else None
    labels.consume(node, (r, 2), meets)
    for name in filter(None, node.outputs):
        steps: list[LabelAxis] = [None] * _last(labels, name)
        labels.set(name, [*steps, hidden], f"{node} steps along this axis")


def _initial_state(node: Node, labels: Labels, state: str, hidden: Axis) -> None:
    """Tie a state to start from to the hidden units; one of zeros is dropped by the repair instead."""
    blank = not labels.is_constant(state) and zeros(state, labels)
    if blank:
        for axis in (0, 1, 2):
            reason = f"{node} starts from zeros along it"
            labels.pin(labels.label(state, axis), reason, listed=False)
        return
    if not labels.is_constant(state):
        for axis in (0, 1):
            labels.pin(labels.label(state, axis), f"{node} steps along it")
    labels.unify([hidden, (state, 2)], node)


def _last(labels: Labels, name: str) -> int:
    return len(labels.shape(name) or ()) - 1


def _stack(
    labels: Labels,
    stacked: Axis,
    parts: int,
    hidden: Ints,
) -> None:
    """Every part of an axis holds the hidden units in order."""
    found = labels.label(*stacked)
    assert found is not None
    labels.tie(found.reshape(parts, -1), hidden[None])


def _pin_steps(node: Node, labels: Labels) -> None:
    for axis in (0, 1):
        labels.pin(labels.label(node.inputs[0], axis), f"{node} steps along this axis")
    lengths = operand(node, 4)
    if lengths is not None:
        labels.pin_all(lengths, f"{node} takes it as lengths of sequences")


def zeros(tensor: str, labels: Labels) -> bool:
    """Recognise tensors of zeros: zeros that are filled in, stretched and moved.

    Args:
        tensor: Name of a tensor.
        labels: Labels of the graph.

    Returns:
        True if it holds nothing but zeros, whatever its shape.
    """
    value = labels.constant(tensor)
    if value is not None:
        return not value.any()
    node = labels.producer(tensor)
    if node is None or node.domain:
        return False
    if node.op == "ConstantOfShape":
        fill = node.attrs.get("value")
        return not isinstance(fill, TensorProto) or not numpy_helper.to_array(fill).any()
    if node.op == "Concat":
        return all(zeros(name, labels) for name in node.inputs)
    return node.op in STILL and zeros(node.inputs[0], labels)


def _repair(node: Node, cuts: Cuts) -> Edit:
    keep = cuts.keep(node.inputs[2], 2)
    if keep is None:
        return Edit()
    # A computed state that does not shrink with the hidden units held zeros: that is what an absent one means.
    dropped: dict[int, None] = {}
    for slot in STATES:
        state = operand(node, slot)
        if state is not None and cuts.keep(state, 2) is None:
            dropped[slot] = None
    hidden_size = cuts.kept(node.inputs[2], 2)
    return Edit({"hidden_size": hidden_size}, dropped)


def _cost(node: Node, shapes: Shapes) -> tuple[Axis | Total, ...]:
    """At every step each gate of each direction meets the input and the state before."""
    x, w, r = node.inputs[:3]
    inputs_and_state: Total = (((w, 2), (r, 2)), 0)
    return ((x, 0), (x, 1), (w, 0), (w, 1), inputs_and_state)


# ------------------------------------------------------------------------------------------------- DynamicQuantizeLSTM


def _quantised(node: Node, labels: Labels) -> None:
    x, w, r = node.inputs[:3]
    given = [node.inputs[slot] for slot in (1, 2, 3, 7, *range(8, 12)) if operand(node, slot)]
    if not all(labels.is_constant(name) for name in given):
        opaque(node, labels, f"{node} takes its weights from a computation")
        return
    states = [state for slot in STATES if (state := operand(node, slot)) is not None]
    _pin_steps(node, labels)
    hidden = labels.label(r, 1)
    assert hidden is not None
    if not all(zeros(state, labels) for state in states):
        # The range of its codes covers all hidden units, also those that would be removed.
        labels.pin(hidden, f"{node} quantises a hidden state that does not start from zeros")
    stacks = {(w, 2): QUANTISED_GATES, (r, 2): QUANTISED_GATES}
    if bias := operand(node, 3):
        stacks[bias, 1] = 2 * QUANTISED_GATES
    for stacked, parts in stacks.items():
        _stack(labels, stacked, parts, hidden)
        labels.consume(node, stacked, None)
    if peepholes := operand(node, 7):
        _stack(labels, (peepholes, 1), 3, hidden)
    for slot in range(8, 12):
        parameter = operand(node, slot)
        if parameter and len(labels.shape(parameter) or ()) == 2:  # one for every row of gates
            _stack(labels, (parameter, 1), QUANTISED_GATES, hidden)
    if labels.unify([(x, 2), (w, 1)], node) is not None:
        labels.consume(node, (x, 2), None)
    for state in states:
        _initial_state(node, labels, state, hidden=(r, 1))
    for name in filter(None, node.outputs):
        steps: list[LabelAxis] = [None] * _last(labels, name)
        labels.set(name, [*steps, hidden], f"{node} steps along this axis")


def _quantised_repair(node: Node, cuts: Cuts) -> Edit:
    if cuts.keep(node.inputs[2], 1) is None:
        return Edit()
    dropped: dict[int, None] = {}
    for slot in STATES:
        state = operand(node, slot)
        if state is not None and cuts.keep(state, 2) is None:
            dropped[slot] = None
    return Edit({"hidden_size": cuts.kept(node.inputs[2], 1)}, dropped)


def _quantised_zero(node: Node, cuts: Cuts) -> dict[int, Array]:
    result = {}
    for slot, place in ZERO_POINTS.items():
        name = operand(node, place)
        value = np.zeros(1) if name is None else cuts.constant(name)
        if value is not None:
            result[slot] = value.reshape(len(value), 1, -1)
    return result


def _quantised_cost(node: Node, shapes: Shapes) -> tuple[Axis | Total, ...]:
    del shapes
    x, w, r = node.inputs[:3]
    inputs_and_state: Total = (((w, 1), (r, 1)), 0)
    return ((x, 0), (x, 1), (w, 0), (w, 2), inputs_and_state)


def is_reversed(node: Node) -> bool:
    """Test for a recurrent operator of one direction that steps backwards in time.

    Args:
        node: The node.

    Returns:
        True for the direction "reverse".
    """
    return node.attrs.get("direction") == "reverse"


def direction_axis(node: Node, tensor: str) -> int | None:
    """Find the axis of an output of a recurrent operator that counts its directions.

    Args:
        node: The node.
        tensor: Name of one of its outputs: the sequence, or a state behind the last step.

    Returns:
        The axis; None for other operators.
    """
    if node.op not in GATES and node.op != "DynamicQuantizeLSTM":
        return None
    is_sequence = tensor == node.outputs[0]
    is_batch_first = bool(node.attrs.get("layout", 0))
    return int(is_sequence) + int(is_batch_first)


SPECS = (
    *(OpSpec(name, _recurrent, since=7, edit=EditRules(_repair), cost=_cost) for name in GATES),
    OpSpec(
        "DynamicQuantizeLSTM",
        _quantised,
        "com.microsoft",
        edit=EditRules(_quantised_repair, _quantised_zero),
        cost=_quantised_cost,
        shape=LikeOperator("LSTM", (0, 1, 2), ("hidden_size", "direction")),
        codes=Codes((4, 8, 9, 10, 11)),
        attributes={
            "activations": AttributeProto.STRINGS,
            "direction": AttributeProto.STRING,
            "hidden_size": AttributeProto.INT,
            "input_forget": AttributeProto.INT,
        },
    ),
)
