"""Refit of recurrent layers: input weights, recurrent weights and biases of LSTM, GRU and RNN.

At every step a gate adds up ``W x + R h + b``, with x the input and h the hidden state of the step before. That sum is
linear, though it is no tensor of the graph. It is computed here from the inputs and states of the original, and the
weights of the cut layer are fitted to it by ridge regression from the inputs of the cut model and the kept units of
the original's state:

    minimise  sum_rows |W x + R h - (W0 + D) x' - (R0 + E) h' - b|^2 + ridge (|D|^2 + |E|^2)     over D, E and b.

The new gate of a GRU multiplies ``R h`` by the reset gate, so that its two sums are fitted one by one; where the reset
gate multiplies h itself (``linear_before_reset = 0``), that product takes the place of h.

Rows are steps of sequences. A step behind the end of a sequence (``sequence_lens``) is no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from scipy.special import expit

from onnx_oamip.core.records import Array, Bools, Coupling, Fit, Floats, Ints, Model, Node
from onnx_oamip.graph.linear_layers import Editor
from onnx_oamip.graph.ops import domains, recurrent
from onnx_oamip.graph.ops.handles import operand
from onnx_oamip.graph.partial_execution import Frontier, stream
from onnx_oamip.objective.position_weights import PositionWeights
from onnx_oamip.repair.ridge import RidgeFit, choose_ridge, ridge_regression
from onnx_oamip.repair.row_sampling import (
    FEWEST_ROWS,
    VALUE_BYTES,
    leading_rows,
    row_choice,
    wanted_rows,
)
from onnx_oamip.repair.stored_weights import SINGLE_BYTES

COPIES = 3
"""Arrays of inputs and sums during a fit."""


@dataclass(frozen=True)
class Layer:
    """A recurrent layer with constant weights.

    Attributes:
        node: Its node in the original model.
        gates: Rows of weights per hidden unit.
        w: Input weights (directions, gates * units, inputs).
        r: Recurrent weights (directions, gates * units, units).
        b: Biases of both (directions, 2 * gates * units).
    """

    node: Node
    gates: int
    w: Floats
    r: Floats
    b: Floats

    @property
    def reversed(self) -> list[bool]:
        """For every direction whether its steps go backwards in time."""
        if len(self.w) == 1:
            return [recurrent.is_reversed(self.node)]
        return [False, True]


@dataclass(frozen=True)
class Steps:
    """Sampled steps of a layer in the original model, of one feed.

    Attributes:
        rows: Numbers of the rows (time * samples).
        x: Inputs (rows, inputs).
        h: Hidden states of the steps before (directions, rows, units).
    """

    rows: Ints
    x: Array
    h: Array


def layer(node: Node, model: Model) -> Layer | None:
    """Read the weights of a recurrent layer.

    Args:
        node: Any node of the main graph.
        model: The model that it lies in.

    Returns:
        The layer; None for other operators, computed weights, and layouts with the samples in front.
    """
    gates = recurrent.GATES.get(node.op)
    if gates is None or node.domain not in domains.STANDARD or node.attrs.get("layout", 0):
        return None
    w, r = (model.constants.get(name) for name in node.inputs[1:3])
    if w is None or r is None or min(w.dtype.itemsize, r.dtype.itemsize) < SINGLE_BYTES:
        return None
    name = operand(node, 3)
    bias = np.zeros((len(w), 2 * w.shape[1])) if name is None else model.constants.get(name)
    if bias is None:
        return None
    return Layer(node, gates, *(value.astype(np.float64) for value in (w, r, bias)))


def kept_units(one: Layer, coupling: Coupling, units: Bools) -> Bools:
    """Hidden units that a layer keeps.

    Args:
        one: The layer.
        coupling: The coupling of the original model.
        units: Keep mask of the units (n_units,).

    Returns:
        A mask of the hidden units of the original.
    """
    axis = (one.node.inputs[2], 2)
    if axis not in coupling.axes:
        return np.ones(one.r.shape[2], bool)
    return coupling.keep(axis, units)


def bias_growth(model: Model) -> int:
    """Upper bound on the parameters that refits of recurrent layers add: biases of those that have none.

    Args:
        model: The original model.

    Returns:
        Number of elements before pruning.
    """
    found = (layer(node, model) for node in model.nodes)
    return sum(int(one.b.size) for one in found if one and operand(one.node, 3) is None)


# -------------------------------------------------------------------------------------------------------- the original


def collect(
    model: Model,
    layers: Sequence[Layer],
    feeds: Sequence[Mapping[str, Array]],
    *,
    types: dict[str, int],
    device: str,
    rng: np.random.Generator,
    memory_limit: int,
    weights: Sequence[PositionWeights] | None = None,
) -> dict[str, list[Steps]]:
    """Samples the steps of recurrent layers in one run through the original model.

    Args:
        model: The original model.
        layers: The layers in topological order.
        feeds: Values of the graph inputs, one mapping per batch.
        types: ONNX element types by tensor name.
        device: ``cpu`` or ``cuda``.
        rng: Chooses the rows.
        memory_limit: Upper bound in bytes on the arrays of one layer at the sampled rows.
        weights: Weights of positions by feed: rows are sampled in proportion to them. None to sample all rows alike.

    Returns:
        The steps of every feed, by the name of the node.
    """
    if not layers:
        return {}
    proto, sequences = _with_sequences(model, layers)
    wanted: list[tuple[int, str]] = []
    for i, one in enumerate(layers):
        optional = (operand(one.node, slot) for slot in (recurrent.LENGTHS, recurrent.STATES[0]))
        computed = [name for name in optional if name and name not in model.constants]
        wanted += [(i, name) for name in (one.node.inputs[0], *computed, sequences[i])]
    found: dict[str, list[Steps]] = {one.node.name: [] for one in layers}
    held: dict[str, Array] = {}
    for feed, number, value in stream(proto, feeds, [n for _, n in wanted], types, device):
        i, name = wanted[number]
        held[name] = value
        if name != sequences[i]:
            continue
        one = layers[i]
        count = -(-_row_limit(one, memory_limit) // len(feeds))
        rows = row_choice(count, rng, weights)(feed, _step_axes(value))
        values = {**model.constants, **held}
        found[one.node.name].append(_steps(one, values, value, rows))
        held = {}
    return found


def _with_sequences(model: Model, layers: Sequence[Layer]) -> tuple[onnx.ModelProto, list[str]]:
    """A model whose recurrent layers all give the states of all steps, and the names of these tensors."""
    names = [one.node.outputs[0] or f"{one.node.name}_all_steps" for one in layers]
    missing = {
        one.node.name: name
        for one, name in zip(layers, names, strict=True)
        if not one.node.outputs[0]
    }
    if not missing:
        return model.proto, names
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        if node.name in missing:
            node.output[0] = missing[node.name]
    return proto, names


def _row_limit(one: Layer, memory_limit: int) -> int:
    """Number of rows to sample for a layer."""
    directions, outputs, inputs = one.w.shape
    units = one.r.shape[2]
    unknowns = inputs + units
    held_per_row = inputs + directions * units
    fitted_per_row = COPIES * (unknowns + outputs)
    most: int = memory_limit // (VALUE_BYTES * (held_per_row + fitted_per_row))
    return min(wanted_rows(unknowns), max(FEWEST_ROWS, most))


def _step_axes(states: Array) -> tuple[int, int]:
    """Time and samples of the states at all steps (time, directions, samples, units)."""
    time, _, samples, _ = states.shape
    return time, samples


def _steps(
    one: Layer,
    values: Mapping[str, Array],
    states: Array,
    rows: Ints,
) -> Steps:
    """Steps of one feed: inputs, and in every direction the state of the step before.

    Args:
        one: The layer.
        values: Constants, and the tensors that it reads at the feed.
        states: Its states at all steps (time, directions, samples, units).
        rows: Numbers of the chosen rows of (time, samples).

    Returns:
        The chosen steps in front of the ends of their sequences.
    """
    time, directions, samples, units = states.shape
    first: Array = np.zeros((directions, samples, units))
    if (name := operand(one.node, recurrent.STATES[0])) is not None:
        first = np.broadcast_to(values[name], first.shape)
    ends = np.full(samples, time)
    if (name := operand(one.node, recurrent.LENGTHS)) is not None:
        ends = values[name].astype(np.int64).reshape(-1)
    before = []
    for k, is_reversed in enumerate(one.reversed):
        own = states[:, k].astype(np.float64)
        shifted = np.empty_like(own)
        if is_reversed:
            shifted[:-1] = own[1:]
            shifted[np.maximum(ends - 1, 0), np.arange(samples)] = first[k]
        else:
            shifted[1:] = own[:-1]
            shifted[0] = first[k]
        before.append(shifted.reshape(time * samples, units))
    is_inside = (np.arange(time)[:, None] < ends).reshape(-1)
    rows = rows[is_inside[rows]]
    x = values[one.node.inputs[0]].reshape(time * samples, -1)
    return Steps(rows, x[rows], np.stack(before)[:, rows])


# -------------------------------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True)
class _Sum:
    """A linear sum of some gates.

    Attributes:
        gates: The gates, numbered as their weights are stacked.
        reads_input: Whether it has the inputs times ``W``.
        reads_state: Whether it has the state times ``R``.
        is_reset: Whether the reset gate multiplies the state first.
    """

    gates: slice
    reads_input: bool = True
    reads_state: bool = True
    is_reset: bool = False

    def rows(self, units: int) -> slice:
        """Rows of the weights of its gates, for a number of hidden units."""
        return slice(self.gates.start * units, self.gates.stop * units)

    def biases(self, units: int, length: int) -> list[slice]:
        """Places of its biases among those of the inputs and then of the states, ``length`` in all."""
        rows = self.rows(units)
        behind = slice(length // 2 + rows.start, length // 2 + rows.stop)
        return [rows] * self.reads_input + [behind] * self.reads_state


def _sums(one: Layer) -> tuple[_Sum, ...]:
    """The linear sums of a layer."""
    if one.node.op != recurrent.RESETTING:
        return (_Sum(slice(0, one.gates)),)
    is_reset = not one.node.attrs.get("linear_before_reset", 0)
    new = slice(2, 3)
    return (
        _Sum(slice(0, 2)),
        _Sum(new, reads_state=False),
        _Sum(new, reads_input=False, is_reset=is_reset),
    )


def refit(
    one: Layer,
    keep: Bools,
    editor: Editor,
    frontier: Frontier,
    steps: Sequence[Steps],
) -> tuple[Fit | None, list[str]]:
    """Refits a recurrent layer of the cut model.

    Args:
        one: The layer in the original model.
        keep: Mask of its hidden units (units,).
        editor: The cut model, changed in place.
        frontier: Activations of the cut model.
        steps: Steps of the layer in the original model, one record per feed.

    Returns:
        A record of the fit, None if there is none, and remarks for the user.
    """
    node = editor.nodes[one.node.name]
    present = [editor.constant(name) for name in node.input[1:3]]
    if any(_is_shared(editor, node, slot) for slot in (1, 2, 3)):
        return None, ["another node reads its weights too, so it is not refitted"]
    if any(editor.stored_type(node.input[slot]) is None for slot in (1, 2)):
        # New constants beside the stored ones, which other nodes may read, would enlarge the file.
        return None, ["its weights are computed from constants, so it is not refitted"]
    assert present[0] is not None
    assert present[1] is not None
    cut_x, x, h = _finite_rows(node.input[0], frontier, steps)
    split = leading_rows(len(x))
    if split == len(x):
        return None, ["one row is too few to fit and to judge, so it is not refitted"]
    w, r = (value.astype(np.float64) for value in present if value is not None)
    b = _bias(editor, node, (len(w), 2 * w.shape[1]))
    # The offset of the bias by the constants that the cut folded into it.
    bias_offset = one.b[:, np.tile(keep, 2 * one.gates)] - b
    errors = np.zeros(3)
    ridge = None
    for k in range(len(w)):
        for part in _sums(one):
            state = h[k] * _reset(one, k, x, h[k]) if part.is_reset else h[k]
            kept_rows = np.tile(keep, part.gates.stop - part.gates.start)
            wanted = _wanted(one, part, k, x, state)[:, kept_rows]
            places = part.biases(int(keep.sum()), b.shape[1])
            wanted += sum(bias_offset[k, place] for place in places)
            found = _fit(part, (w[k], r[k], b[k]), (cut_x, state[:, keep]), wanted, split)
            errors += (*found.errors, float(wanted.var(axis=0).sum()))
            ridge = ridge if found.ridge is None else found.ridge
    before, after, variance = errors.tolist()
    scale = variance or 1.0
    unknowns = cut_x.shape[1] + int(keep.sum())
    fit = Fit(one.node.name, "gate sums", len(x), unknowns, ridge, before / scale, after / scale)
    if after < before:
        for slot, value in ((1, w), (2, r), (3, b)):
            editor.replace(node, slot, np.ascontiguousarray(value.astype(present[0].dtype)))
    return fit, []


def _finite_rows(
    data: str, frontier: Frontier, steps: Sequence[Steps]
) -> tuple[Floats, Floats, Floats]:
    """Finite rows of the inputs in the cut model, of those in the original, and of its states before every step."""

    def inputs(i: int, values: Mapping[str, Array]) -> Floats:
        """Inputs in the cut model at the sampled steps of one feed (rows, inputs)."""
        x = values[data]
        by_step = x.reshape(x.shape[0] * x.shape[1], -1)
        return by_step[steps[i].rows].astype(np.float64)

    cut_x = np.concatenate(frontier.each([data], inputs))
    used = steps[: frontier.batches]
    x = np.concatenate([step.x for step in used]).astype(np.float64)
    h = np.concatenate([step.h for step in used], axis=1)
    is_finite = np.isfinite(cut_x).all(axis=1) & np.isfinite(x).all(axis=1)
    is_finite &= np.isfinite(h).all(axis=(0, 2))
    return cut_x[is_finite], x[is_finite], h[:, is_finite]


def _is_shared(editor: Editor, node: onnx.NodeProto, slot: int) -> bool:
    """Tests for a constant that other nodes read as well."""
    name = node.input[slot] if slot < len(node.input) else ""
    return bool(name) and len(editor.readers_of(editor.source(name))) > 1


def _bias(editor: Editor, node: onnx.NodeProto, shape: tuple[int, int]) -> Floats:
    """Biases of a layer of the cut model; zeros where it has none."""
    name = node.input[3] if len(node.input) > 3 else ""
    value = editor.constant(name) if name else None
    return np.zeros(shape) if value is None else value.astype(np.float64)


def _reset(one: Layer, k: int, x: Floats, h: Floats) -> Floats:
    """The reset gate of a GRU in the original (rows, units), the second of its gates."""
    units = one.r.shape[2]
    rows = slice(units, 2 * units)
    recurrent_biases = one.b[k, one.gates * units :]
    bias = one.b[k, rows] + recurrent_biases[rows]
    gate: Floats = expit(x @ one.w[k, rows].T + h @ one.r[k, rows].T + bias)
    return gate


def _wanted(one: Layer, part: _Sum, k: int, x: Floats, state: Floats) -> Floats:
    """A sum in the original model, without its bias (rows, gates * units)."""
    rows = part.rows(one.r.shape[2])
    total = np.zeros((len(x), rows.stop - rows.start))
    if part.reads_input:
        total += x @ one.w[k, rows].T
    if part.reads_state:
        total += state @ one.r[k, rows].T
    return total


def _fit(
    part: _Sum,
    weights: tuple[Floats, Floats, Floats],
    inputs: tuple[Floats, Floats],
    wanted: Floats,
    split: int,
) -> RidgeFit:
    """Fits one sum of one direction.

    Args:
        part: The sum.
        weights: Input weights, recurrent weights and biases of the direction in the cut model, changed in place if
            the fit is better on held-out rows.
        inputs: Inputs in the cut model, and kept units of the state.
        wanted: The sum in the original model (rows, gates * units), without its bias.
        split: Number of rows in front of those held out.

    Returns:
        The fit.
    """
    w, r, b = weights
    rows = part.rows(r.shape[1])
    reads = [part.reads_input, part.reads_state]
    x = np.concatenate([value for value, is_read in zip(inputs, reads, strict=True) if is_read], 1)
    matrices = [matrix for matrix, is_read in zip((w, r), reads, strict=True) if is_read]
    present = np.concatenate([matrix[rows] for matrix in matrices], axis=1)
    residual = (wanted - x @ present.T)[None]
    found = choose_ridge(x[None], residual, split, ridge_regression(x[None], residual, split))
    before, after = found.errors
    if after >= before:
        return found
    if found.change is not None:
        place = 0
        for matrix in matrices:
            width = matrix.shape[1]
            matrix[rows] += found.change[0, place : place + width].T
            place += width
    b[part.biases(r.shape[1], len(b))[0]] += found.shift[0]
    return found
