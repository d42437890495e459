"""What removed units carried is folded into their consumers, without labels and without a training step.

``bias``: the mean of every removed channel moves, through its weights, into the consumer's bias. For a convolution
with zero padding this is exact away from the border.

``least-squares``: every linear node behind the cut is fitted anew, front to back. With x the input that the node gets
in the cut model (already refitted in front of it) and y the output it gave in the original model, on the same rows,

    minimise  sum_rows |y - (W0 + D) x - b|^2 + ridge |D|^2     over D and b,

where W0 is what the cut left of its weights: ridge regression of the residual, pulled towards the original weights.
The ridge strength is chosen per node by the error on held-out rows; where no strength beats D = 0 there, the weights
stay and only the bias moves. Sums are in float64. (Channel pruning with least-squares reconstruction: He, Zhang and
Sun, ICCV 2017; the front-to-back order corrects errors that earlier layers made.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_oamip.core.errors import memory_for
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Fit,
    Floats,
    Ints,
    Model,
    Node,
    Pruned,
    Statistics,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import FRONTIER_BYTES, affordable
from onnx_oamip.graph.im2col import (
    data_rows,
    output_rows,
    pick,
    row_count,
)
from onnx_oamip.graph.linear_layers import (
    Editor,
    matrix,
    matrix_shape,
    quantised,
    site,
    unmatrix,
)
from onnx_oamip.graph.ops import lookup
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.partial_execution import Frontier, Slicer, element_types
from onnx_oamip.repair.residual_joins import Join, join
from onnx_oamip.repair.ridge import (
    Solve,
    best,
    ridge_regression,
    solve_ridge,
)

ROWS_PER_UNKNOWN = 4
LEAST_ROWS, MOST_ROWS = 4096, 24576
GRAM_CAP = 4608
"""Unknowns per output above which a Gram matrix gets too large; then removed channels are mixed into kept ones."""
HELD_OUT = 0.2
WIDE_VALUES = 1 << 25
"""Values (rows x unknowns) kept of a node that is too wide for a Gram matrix."""


def fold_means(
    model: Model, coupling: Coupling, units: Bools, statistics: Statistics, raw: onnx.ModelProto
) -> Pruned:
    """The cut model ``raw`` with the means of removed channels in the consumers' biases, and notes."""
    proto = onnx.ModelProto()
    proto.CopyFrom(raw)
    editor = Editor(proto)
    nodes = {node.name: node for node in model.nodes}
    notes = _bodies(model, coupling, units)
    for consumer in coupling.consumers:
        keep = coupling.keep((consumer.data, consumer.axis), units)
        node = nodes[consumer.node]
        if keep.all() or consumer.weight not in model.constants:
            continue
        place = site(node, model.constants)
        if place is None:
            notes.append(
                f"{node}: its weight has no plain matrix form, so the mean of what was removed is not added"
            )
            continue
        weight = matrix(place, model.constants[place.weight])
        lost = np.where(keep, 0.0, statistics.moments[consumer.data, consumer.axis].mean)
        shift: Floats = place.factor * np.einsum(
            "goit,gi->go", weight, lost.reshape(len(weight), -1)
        ).reshape(-1)
        if place.rules.scatters:  # taps are shared out over the positions between two input pixels
            shift /= int(np.prod(node.attrs.get("strides", [1])))
        if not editor.add_bias(place, shift[output_mask(model, coupling, place, units)]):
            notes.append(
                f"{node}: its bias is computed, so the mean of what was removed is not added"
            )
    return Pruned(raw, proto, tuple(notes))


def output_mask(model: Model, coupling: Coupling, place: Site, units: Bools) -> Bools:
    """Which of a linear node's own outputs stay."""
    name = place.node.outputs[0]
    shape = model.shapes.get(name)
    if shape is not None and (name, place.output_axis % len(shape)) in coupling.axes:
        return coupling.keep((name, place.output_axis % len(shape)), units)
    groups, outs, _, _ = matrix_shape(place, model.constants[place.weight])
    return np.ones(groups * outs, bool)


def new_biases(model: Model) -> int:
    """Elements that a refit may add (before pruning): biases of linear nodes that have none of their own yet."""
    editor = Editor(model.proto)
    places = (site(node, model.constants) for node in model.nodes)
    return sum(editor.bias_growth(place) for place in places if place is not None)


# --------------------------------------------------------------------------------------------------- least squares


def fits(found: Pruned, raw: onnx.ModelProto) -> bool:
    """Whether this may be what a refit made of a cut model: its graph and more, weights of the same shapes."""
    old, new = raw.graph, found.proto.graph
    # A product that gets a bias hands its output on to a sum, which gives it under the old name.
    nodes = {(node.op_type, node.name) for node in new.node}
    made = {name for node in new.node for name in node.output}
    held = {t.name: t for t in new.initializer}
    same = all(
        t.name not in held or (held[t.name].dims, held[t.name].data_type) == (t.dims, t.data_type)
        for t in old.initializer
    )
    ports = list(old.input) == list(new.input) and list(old.output) == list(new.output)
    whole = (
        ports
        and list(raw.opset_import) == list(found.proto.opset_import)
        and not found.proto.functions
    )
    inside = not any(t.external_data for t in new.initializer)
    kept = all(
        (node.op_type, node.name) in nodes and made.issuperset(node.output) for node in old.node
    )
    return whole and same and inside and kept


def least_squares(
    model: Model,
    coupling: Coupling,
    units: Bools,
    raw: onnx.ModelProto,
    samples: Samples,
    device: str,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
    cap: int = GRAM_CAP,
    room: int | None = None,
) -> Pruned:
    """The cut model with every linear node behind the cut refitted, front to back."""
    proto = onnx.ModelProto()
    proto.CopyFrom(raw)
    editor = Editor(proto)
    places, notes = _places(model, coupling, units)
    feeds, used = affordable(model, samples, batch_size, room)
    types = element_types(model.proto, model.dtypes)
    rng = np.random.default_rng(seed)
    targets = collect_targets(model, places, feeds, types, device, rng, cap)
    frontier = Frontier(proto, feeds, types, device)
    fits: list[Fit] = []
    if used < samples.usable():
        size = (FRONTIER_BYTES if room is None else room) >> 20
        notes.append(
            f"least squares used {used} of {samples.usable()} samples, as many as fit in {size} MiB"
        )
    for i, place in enumerate(places):
        with memory_for(f"the refit of {place.node}"):
            fit, said = _refit(
                model, coupling, units, editor, place, frontier, targets.pop(place.node.name)
            )
        fits += [fit] if fit else []
        notes += [f"{place.node}: {'; '.join(said)}"] if said else []
        if progress:
            progress("refit", i + 1, len(places))
    return Pruned(raw, proto, tuple(notes), tuple(fits))


def _places(model: Model, coupling: Coupling, units: Bools) -> tuple[list[Site], list[str]]:
    """Linear nodes whose input changed (consumers of a cut, and everything linear behind one), and what is left out."""
    slicer = Slicer(model.proto)
    homes = model.homes
    cut = [
        c
        for c in (*coupling.consumers, *coupling.inside)
        if not coupling.keep((c.data, c.axis), units).all()
    ]
    changed = {homes[c.node] for c in cut}
    outputs = (o for n in slicer.nodes if n.name in changed for o in n.output)
    behind = {slicer.nodes[i].name for i in slicer.descendants(outputs)}
    uses: dict[str, int] = {}
    for node in model.nodes:
        for name in (*node.inputs, *node.captures):
            uses[name] = uses.get(name, 0) + 1
    places = []
    notes = _bodies(model, coupling, units)
    for node in model.nodes:
        place = site(node, model.constants) if node.name in changed | behind else None
        if place is not None and uses[place.weight] > 1:
            notes.append(
                f"{node}: its weight '{place.weight}' is shared with another node, so it is not refitted"
            )
        elif place is not None:
            places.append(place)
        elif (
            node.name in changed
            and _multiplies(node)
            and any(n in model.constants for n in node.inputs[:2])
        ):
            notes.append(f"{node}: its weight has no plain matrix form, so it is not refitted")
        elif node.name in changed and quantised(node, model):
            notes.append(f"{node}: its weight is quantised, so it is not refitted")
    return places, notes


def _multiplies(node: Node) -> bool:
    """Whether a node has weights that a refit could be expected to change; the gain of a normalisation is none."""
    spec = lookup(node.domain, node.op, node.version)
    return spec is not None and spec.cost is not None


def _bodies(model: Model, coupling: Coupling, units: Bools) -> list[str]:
    """Notes on the nodes whose bodies lost channels: nothing is measured in there."""
    cut = [c.node for c in coupling.inside if not coupling.keep((c.data, c.axis), units).all()]
    holders = {model.homes[name] for name in cut}
    return [
        f"{n}: its body lost channels and is not refitted, as no data is seen inside"
        for n in model.nodes
        if n.name in holders
    ]


@dataclass(frozen=True)
class Target:
    """What the original node gave at sampled rows, per feed: output shape, row numbers, values (rows, outputs).

    ``inputs`` (rows, channels, taps) is kept only where the node is too wide for a Gram matrix of its own; ``joined``
    (rows, outputs) is the other branch of a residual sum that the node runs into, if there is one.
    """

    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[Ints, ...]
    values: tuple[Array, ...]
    inputs: tuple[Array, ...]
    join: Join | None
    joined: tuple[Array, ...]


def collect_targets(
    model: Model,
    places: Sequence[Site],
    feeds: Sequence[Mapping[str, Array]],
    types: dict[str, int],
    device: str,
    rng: np.random.Generator,
    cap: int,
) -> dict[str, Target]:
    """One walk through the original model, by node name: outputs of every node to be refitted, at sampled rows."""
    frontier = Frontier(model.proto, feeds, types, device)
    slicer = Slicer(model.proto)
    waiting = {place.node.name for place in places}
    result = {}
    for place in places:
        name = place.node.outputs[0]
        _, _, ins, taps = matrix_shape(place, model.constants[place.weight])
        wide = ins * taps > cap
        # Only what a frontier forgets first must be asked for first: the data, then the output.
        data = frontier.reach([place.data])[place.data] if wide else []
        joint = join(model, place)
        if joint and any(slicer.nodes[i].name in waiting for i in slicer.needed([joint.other], ())):
            joint = (
                None  # the other branch is still to be refitted: it will take on this one's error
            )
        waiting.discard(place.node.name)
        others = frontier.reach([name, joint.other])[joint.other] if joint else []
        outputs = frontier.reach([name])[name]
        wanted = (
            LEAST_ROWS
            if wide
            else int(np.clip(ROWS_PER_UNKNOWN * ins * taps, LEAST_ROWS, MOST_ROWS))
        )
        if wide:  # rows this wide are many values each: bound the values instead
            wanted = max(256, min(wanted, WIDE_VALUES // (ins * taps)))
        rows = tuple(
            pick(row_count(place, y.shape), -(-wanted // len(feeds)), rng) for y in outputs
        )
        values = tuple(
            output_rows(place, y, r).astype(np.float32) for y, r in zip(outputs, rows, strict=True)
        )
        shapes = tuple(y.shape for y in outputs)
        inputs = tuple(
            data_rows(place, x, r, shape).astype(np.float32)
            for x, r, shape in zip(data, rows, shapes, strict=False)
        )
        joined = tuple(
            output_rows(place, t, r).astype(np.float32) for t, r in zip(others, rows, strict=False)
        )
        result[place.node.name] = Target(shapes, rows, values, inputs, joint, joined)
    return result


def _refit(
    model: Model,
    coupling: Coupling,
    units: Bools,
    editor: Editor,
    place: Site,
    frontier: Frontier,
    target: Target,
) -> tuple[Fit | None, list[str]]:
    node = editor.nodes[place.node.name]
    current = editor.constant(node.input[place.weight_slot])
    assert current is not None
    attrs = {
        **place.node.attrs,
        "group": next((a.i for a in node.attribute if a.name == "group"), 1),
    }
    here = replace(
        place,
        node=replace(place.node, attrs=attrs),
        groups=int(attrs["group"]) if place.spatial else 1,
    )
    bias = editor.bias(here)
    if bias is None:
        return None, ["its bias is not one constant per output, so it is not refitted"]
    w0 = here.factor * matrix(here, current)
    groups, outs, ins, taps = w0.shape
    data = node.input[place.slot]
    inputs = frontier.reach([data])[data]
    found = [
        data_rows(here, v, r, s) for v, r, s in zip(inputs, target.rows, target.shapes, strict=True)
    ]
    x = np.concatenate(found).transpose(1, 0, 2)
    kept = output_mask(model, coupling, place, units)
    y = np.concatenate(target.values).astype(np.float64)[:, kept]
    if target.join is not None:
        now = frontier.reach([target.join.other])[target.join.other]
        error = np.concatenate(target.joined)[:, kept] - np.concatenate(
            [output_rows(here, t, r) for t, r in zip(now, target.rows, strict=True)]
        )
        y += target.join.correction(error, kept)
    y = y.reshape(-1, groups, outs).transpose(1, 0, 2)
    sound = np.asarray(np.isfinite(y).all(axis=(0, 2)) & np.isfinite(x).all(axis=(0, 2)))
    said: list[str] = []
    if not sound.all():
        said.append(f"{int((~sound).sum())} of {sound.size} rows are not finite and not fitted to")
        x, y = x[:, sound], y[:, sound]
        wide = (np.concatenate(target.inputs)[sound],) if target.inputs else ()
        target = replace(target, inputs=wide)
    rows = len(y[0])
    if not rows:
        return None, said
    split = min(
        int(np.ceil((1 - HELD_OUT) * rows)), rows - 1
    )  # rows come in the order of samples: the last are held
    residual = (
        y - x @ w0.reshape(groups, outs, -1).transpose(0, 2, 1) - bias.reshape(groups, 1, outs)
    )
    if rows < 2:
        editor.add_bias(here, residual.reshape(-1))
        said.append("one row is too few to fit and to judge, so only its bias moves")
        return None, said
    form = "least squares"
    if target.inputs:
        mixed = _mixing(model, coupling, units, place, target, x, w0)
        if mixed is None:
            form, solve = "bias", None
            said.append(
                f"{ins * taps} unknowns are too many and have no channel form, so only its bias is refitted"
            )
        else:
            form, solve = "channel mixing", mixed
            many = f"{ins * taps} unknowns are too many for a Gram matrix"
            said.append(f"{many}, so removed channels are mixed into kept ones")
    else:
        solve = ridge_regression(x, residual, split)
        if x.shape[1] < ins * taps:
            said.append(
                f"{x.shape[1]} rows for {ins * taps} unknowns, so more calibration samples would help"
            )
    change, shift, ridge, errors = best(x, residual, split, solve)
    scale = float(y.var(axis=1).sum()) or 1.0
    fit = Fit(
        place.node.name, form, x.shape[1], ins * taps, ridge, errors[0] / scale, errors[1] / scale
    )
    if errors[1] < errors[0]:
        if change is not None:
            weight = w0 + change.transpose(0, 2, 1).reshape(w0.shape)
            with np.errstate(over="ignore"):
                fresh = unmatrix(here, weight / here.factor, current)
            if not np.isfinite(fresh).all():
                said.append(
                    f"fitted weights are out of range for {current.dtype}, so it is not refitted"
                )
                return None, said
            editor.replace(node, place.weight_slot, fresh)
        editor.add_bias(here, shift.reshape(-1))
    return fit, said


def _mixing(
    model: Model,
    coupling: Coupling,
    units: Bools,
    place: Site,
    target: Target,
    x: Floats,
    w0: Floats,
) -> Solve | None:
    """Removed channels are expressed by kept ones (a channels x channels Gram only), for nodes that are very wide.

    With channel blocks z (original, all channels) and z' (cut, kept ones), ``z = z' A`` is fitted by ridge towards
    "every kept channel is itself"; the weights of a removed channel are then spread over the kept ones.
    """
    name = place.data
    axis = place.data_axis % len(model.shapes[name])
    labels = coupling.axes.get((name, axis))
    if labels is None or place.groups > 1 or (labels < 0).any():
        return None
    taps = w0.shape[3]
    # Columns of one unit stand together: (unit, its columns); a unit's columns and taps play the same part.
    order = np.argsort(labels, kind="stable")
    present, counts = np.unique(labels, return_counts=True)
    if (counts != counts[0]).any():
        return None
    held = int(counts[0])
    stays = units[present]
    original = np.concatenate(target.inputs).astype(np.float64)[:, 0]
    rows = len(original)

    def blocks(values: Floats, columns: Ints, count: int) -> Floats:
        return values.reshape(rows, -1, taps)[:, columns].reshape(rows, count, held * taps)

    z = blocks(original, order, len(present))
    kept_order = np.argsort(labels[units[labels]], kind="stable")
    zk = blocks(x[0], kept_order, int(stays.sum()))
    left = z.copy()
    left[:, stays] -= zk
    full = matrix(place, model.constants[place.weight])[0] * place.factor
    kept_outputs = output_mask(model, coupling, place, units)
    weight = full[kept_outputs][:, order].reshape(w0.shape[1], len(present), held * taps)

    def solve(count: int, ridge: float) -> Floats:
        a, b = zk[:count], left[:count]
        a, b = a - a.mean(axis=(0, 2), keepdims=True), b - b.mean(axis=(0, 2), keepdims=True)
        gram = np.einsum("rkt,rlt->kl", a, a, optimize=True)
        cross = np.einsum("rkt,rct->kc", a, b, optimize=True)
        mixing = solve_ridge(gram[None], cross[None], ridge)[0]
        change = np.einsum("kc,oct->okt", mixing, weight, optimize=True)
        back = np.empty((w0.shape[1], len(kept_order), taps))
        back[:, kept_order] = change.reshape(w0.shape[1], len(kept_order), taps)
        return back.reshape(1, w0.shape[1], -1).transpose(0, 2, 1)

    return solve
