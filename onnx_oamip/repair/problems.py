"""Least-squares problems of the refit: inputs in the cut model, and what the outputs lack, at the sampled rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.records import Array, Bools, Floats
from onnx_oamip.graph.im2col import data_rows, output_rows
from onnx_oamip.graph.linear_layers import Editor, matrix, matrix_shape
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Frontier
from onnx_oamip.repair.clamped_targets import Clamp
from onnx_oamip.repair.cut_model import Cut, in_cut_model, output_mask
from onnx_oamip.repair.shared_weights import Rows, Spread
from onnx_oamip.repair.targets import Target, of_kept_rows


@dataclass(frozen=True)
class Copied:
    """Augmented copies of the samples.

    Attributes:
        frontier: Their activations in the cut model.
        targets: Outputs in the original model of the nodes whose rows they add to, by name.
    """

    frontier: Frontier
    targets: dict[str, Target]


@dataclass(frozen=True)
class _Problem:
    """Least-squares problem of one node.

    Attributes:
        x: Inputs in the cut model (groups, rows, inputs * taps).
        y: Wanted outputs (groups, rows, outputs).
        original: Original values in front of the clamp behind the node, if any, in units of its output (groups, rows,
            outputs); ``y`` where there is no residual sum.
        wide_inputs: Inputs in the original model (rows, groups, inputs * taps), only of a node whose channels are
            mixed; None for others.
    """

    x: Floats
    y: Floats
    original: Floats
    wide_inputs: Array | None

    @property
    def finite_rows(self) -> Bools:
        """Mask of the rows (rows,) without infinite values and NaN."""
        is_finite = np.isfinite(self.y).all(axis=(0, 2)) & np.isfinite(self.x).all(axis=(0, 2))
        return np.asarray(is_finite)

    def take(self, rows: Bools) -> _Problem:
        """The problem on some of the rows."""
        wide_inputs = None if self.wide_inputs is None else self.wide_inputs[rows]
        y = self.y[:, rows]
        original = y if self.original is self.y else self.original[:, rows]
        return _Problem(self.x[:, rows], y, original, wide_inputs)


@dataclass(frozen=True)
class CutLayer:
    """A linear node in the cut model.

    Attributes:
        here: The node.
        weight: Its weight as a matrix, times its factor (groups, outputs, inputs, taps).
    """

    here: Site
    weight: Floats


@dataclass(frozen=True)
class Use:
    """A linear node in the cut model, with its sampled rows.

    Attributes:
        layer: The node.
        rows: Inputs and what its outputs lack at the sampled rows.
        spread: Number, mean and variance of the wanted outputs.
        wide_inputs: Inputs in the original model, only of a node whose channels are mixed; None for others.
    """

    layer: CutLayer
    rows: Rows
    spread: Spread
    wide_inputs: Array | None


def use_of(
    cut: Cut,
    editor: Editor,
    place: Site,
    frontier: Frontier | None,
    *,
    target: Target,
    remarks: list[str],
    copies: Copied | None = None,
    clamp: Clamp | None = None,
) -> Use | None:
    """Sample a linear node of the cut model, with what its outputs lack.

    Args:
        cut: The original model and the kept units.
        editor: The cut model.
        place: The node in the original model.
        frontier: Activations of the cut model; None to take the inputs in the original model.
        target: Outputs of the node in the original model.
        remarks: Remarks for the user, extended by those about this node.
        copies: Augmented copies of the samples, if any.
        clamp: Clamp behind the node, if any.

    Returns:
        The use; None if its bias cannot be changed or no row is finite.
    """
    layer = _layer(editor, place)
    weight = layer.weight
    bias = editor.bias(layer.here)
    if bias is None:
        remarks.append("its bias is not one constant per output, so it is not refitted")
        return None
    groups, outs, _, _ = weight.shape
    problem = _problem(
        cut,
        editor,
        place,
        layer.here,
        frontier=frontier,
        target=target,
        copies=copies,
        has_clamp=clamp is not None,
    )
    finite = problem.finite_rows
    if not finite.all():
        remarks.append(
            f"{int((~finite).sum())} of {finite.size} rows are not finite and not fitted to"
        )
        problem = problem.take(finite)
    if not problem.y.shape[1]:
        return None
    residual = problem.x @ weight.reshape(groups, outs, -1).transpose(0, 2, 1)
    np.subtract(problem.y, residual, out=residual)
    residual -= bias.reshape(groups, 1, outs)
    spread = Spread(
        problem.y.shape[1], problem.y.mean(axis=1).reshape(-1), problem.y.var(axis=1).reshape(-1)
    )
    bounds = None
    if clamp is not None:
        kept = output_mask(cut.model, cut.coupling, place, cut.units)
        bounds = clamp.bounds(problem.original, kept)
    return Use(layer, Rows(problem.x, residual, bounds), spread, problem.wide_inputs)


def _layer(editor: Editor, place: Site) -> CutLayer:
    """A linear node in the cut model; without inputs if a constant stands in its place."""
    if editor.is_emptied(place):
        outputs = editor.tensors[place.node.outputs[0]].dims
        return CutLayer(replace(place, groups=1), np.zeros((1, int(np.prod(outputs)), 0, 1)))
    node = editor.nodes[place.node.name]
    current = editor.constant(node.input[place.weight_slot])
    assert current is not None
    here = in_cut_model(place, node)
    return CutLayer(here, here.factor * matrix(here, current))


def _problem(
    cut: Cut,
    editor: Editor,
    place: Site,
    here: Site,
    *,
    frontier: Frontier | None,
    target: Target,
    copies: Copied | None,
    has_clamp: bool,
) -> _Problem:
    """Inputs and wanted outputs of a node at the sampled rows.

    Args:
        cut: The original model and the kept units.
        editor: The cut model.
        place: The node in the original model.
        here: The node in the cut model.
        frontier: Activations of the cut model; None to take the inputs in the original model.
        target: Outputs in the original model.
        copies: Augmented copies of the samples, if any.
        has_clamp: Whether original values in front of a clamp are asked for.
    """
    kept = output_mask(cut.model, cut.coupling, place, cut.units)
    target = of_kept_rows(cut, place, target)
    if frontier is None:
        x = _original_inputs(cut, place, here, target)
        y = np.concatenate(target.values).astype(np.float64)[:, kept]
        original = None
    else:
        node = editor.nodes.get(place.node.name)
        data = None if node is None else node.input[place.slot]
        other = None if target.join is None else editor.constant(target.join.other)
        others = copies.targets.pop(place.node.name, None) if copies is not None else None
        parts = [(frontier, target)]
        if copies is not None and others is not None:
            parts.append((copies.frontier, of_kept_rows(cut, place, others)))
        x, y, original = _sampled_problem(
            here, data, parts, kept=kept, other=other, has_clamp=has_clamp
        )
    groups = len(x)

    def by_group(values: Floats) -> Floats:
        return values.reshape(-1, groups, values.shape[1] // groups).transpose(1, 0, 2)

    y = by_group(y)
    original = y if original is None else by_group(original)
    is_mixed = bool(target.inputs) and not target.is_late
    wide_inputs = np.concatenate(target.inputs) if is_mixed else None
    return _Problem(x, y, original, wide_inputs)


def _sampled_problem(
    here: Site,
    data: str | None,
    parts: Sequence[tuple[Frontier, Target]],
    *,
    kept: Bools,
    other: Array | None,
    has_clamp: bool,
) -> tuple[Floats, Floats, Floats | None]:
    """Inputs of a node in the cut model and wanted outputs at the sampled rows, of the feeds that the frontiers hold.

    Args:
        here: The node in the cut model.
        data: Tensor that it reads there; None if it reads nothing any more.
        parts: Activations of the cut model with outputs in the original model: of the samples, and of their copies if
            there are any. The rows of every feed are followed by those of its copies: the last rows, which judge a fit,
            are then no copies of rows of the fit.
        kept: Mask of the outputs that the node keeps (outputs,).
        other: Other branch of the residual sum, where it is a constant in the cut model.
        has_clamp: Whether original values of residual sums are asked for.

    Returns:
        Inputs (groups, rows, inputs * taps), wanted outputs (rows, kept outputs), and the original sums in units of
        the output; None where there is no sum or they are not asked for.
    """
    feeds = len(parts[0][1].rows)
    places = sorted(
        (feed * feeds // len(target.rows), part, feed)
        for part, (_, target) in enumerate(parts)
        for feed in range(len(target.rows))
    )
    counts = [len(parts[part][1].rows[feed]) for _, part, feed in places]
    slots = {(part, feed): slot for slot, (_, part, feed) in enumerate(places)}
    inputs, outputs, sums = _Filled(counts), _Filled(counts), _Filled(counts)
    for part, (frontier, target) in enumerate(parts):
        put = _put(slots, part, inputs, outputs)
        _sample(here, data, frontier, target, kept=kept, other=other, put=put)
        if has_clamp and target.join is not None:
            for feed in range(frontier.batches):
                joined = target.join.correction(target.joined[feed][:, kept], kept)
                sums.put(slots[part, feed], joined + target.values[feed][:, kept])
    has_sums = has_clamp and parts[0][1].join is not None
    return inputs.values.transpose(1, 0, 2), outputs.values, sums.values if has_sums else None


def _put(
    slots: Mapping[tuple[int, int], int], part: int, inputs: _Filled, outputs: _Filled
) -> Callable[[int, Floats, Floats], None]:
    """Function that puts inputs and outputs of a feed of a part to their places."""

    def put(feed: int, x: Floats, y: Floats) -> None:
        slot = slots[part, feed]
        inputs.put(slot, x)
        outputs.put(slot, y)

    return put


def _sample(
    here: Site,
    data: str | None,
    frontier: Frontier,
    target: Target,
    *,
    kept: Bools,
    other: Array | None,
    put: Callable[[int, Floats, Floats], None],
) -> None:
    """Gives inputs (rows, groups, inputs * taps) and wanted outputs (rows, kept outputs) of every feed to ``put``."""
    join = target.join

    def take(feed: int, values: Mapping[str, Array]) -> None:
        rows = target.rows[feed]
        wanted = target.values[feed].astype(np.float64)[:, kept]
        if join is not None:
            branch = values[join.other] if other is None else _repeated(other, target.shapes[feed])
            error = target.joined[feed][:, kept] - output_rows(here, branch, rows)
            wanted += join.correction(error, kept)
        inputs = np.zeros((len(rows), 1, 0))
        if data is not None:
            inputs = data_rows(here, values[data], rows, target.shapes[feed])
        put(feed, inputs, wanted)

    branches = [join.other] if join is not None and other is None else []
    frontier.each([*branches, *([] if data is None else [data])], take)


def _repeated(constant: Array, shape: tuple[int, ...]) -> Array:
    """A constant at every position of a tensor, with the channels that are kept."""
    pairs = zip(constant.shape, shape, strict=True)
    return np.broadcast_to(constant, [own if own > 1 else full for own, full in pairs])


class _Filled:
    """An array of the rows of several feeds, which come in any order: memory never holds them twice."""

    def __init__(self, counts: Sequence[int]) -> None:
        """Begins empty.

        Args:
            counts: Number of rows of every feed; those of some feeds may never come.
        """
        self._ends = np.cumsum([0, *counts])
        self._is_filled = np.zeros(self._ends[-1], bool)
        self._held: Floats | None = None

    def put(self, slot: int, part: Floats) -> None:
        """Put the rows (rows, ...) of a feed to their place."""
        if self._held is None:
            self._held = np.empty((len(self._is_filled), *part.shape[1:]))
        place = slice(self._ends[slot], self._ends[slot + 1])
        self._held[place] = part
        self._is_filled[place] = True

    @property
    def values(self) -> Floats:
        """The rows that came."""
        assert self._held is not None
        count = int(self._is_filled.sum())
        if self._is_filled[:count].all():
            return self._held[:count]
        return self._held[self._is_filled]


def _original_inputs(
    cut: Cut,
    place: Site,
    here: Site,
    target: Target,
) -> Floats:
    """Inputs of a node in the original model, without the removed channels (groups, rows, inputs * taps)."""
    inputs = np.concatenate(target.inputs).astype(np.float64)
    _, _, ins, taps = matrix_shape(place, cut.model.constants[place.weight])
    axis = place.data_axis % len(cut.model.shapes[place.data])
    channels = inputs.reshape(len(inputs), place.groups * ins, taps)
    if (place.data, axis) in cut.coupling.axes:
        channels = channels[:, cut.coupling.keep((place.data, axis), cut.units)]
    return channels.reshape(len(inputs), here.groups, -1).transpose(1, 0, 2)
