"""Which channels must go together: channel labels and union-find. Knows no operator.

Every index of every tracked tensor axis carries an integer label. Each operator's channel rule ties labels, pins them
with a reason, and hands label arrays on to its outputs. A *unit* is one connected component without a pinned label:
the set of (tensor, axis, index) that goes or stays as one. Components are found in one vectorised pass at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import (
    Array,
    Axis,
    Body,
    Consumer,
    Coupling,
    Group,
    Ints,
    Model,
    Node,
    Pinned,
)
from onnx_oamip.graph.ops import (
    LabelAxis,
    consumers_by_tensor,
    follows_bodies,
    lookup,
    opaque,
    rule_errors,
)


@dataclass(frozen=True, slots=True)
class _Pin:
    labels: Ints
    reason: str
    listed: bool
    given: bool


class _Labels:
    """The mutable side of one propagation; implements ``ops.Labels``."""

    def __init__(self, model: Model, choices: Mapping[str, int]) -> None:
        self.model = model
        self.count = 0
        self.known: dict[str, list[LabelAxis]] = {}
        self.made: dict[Axis, Ints] = {}
        self.why: dict[str, str] = {}
        self.given: set[str] = set()
        self.ties: list[tuple[Ints, Ints]] = []
        self.pins: list[_Pin] = []
        self.claims: set[tuple[str, Axis]] = set()
        self.whole: dict[str, str] = {}
        self.consumers: list[Consumer] = []
        self.choices = choices
        self.asked: dict[str, int] = {}
        self.node = ""
        self.inside: list[Consumer] = []
        self._depth = 0
        self._makers = {name: node for node in model.every for name in node.outputs if name}
        self._readers = consumers_by_tensor(model)
        self._shown = {p.name for p in model.outputs}
        self._shown |= {
            n for node in model.every for body in node.bodies.values() for n in body.outputs
        }

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        return self.model.shapes.get(tensor)

    def constant(self, tensor: str) -> Array | None:
        return self.model.constants.get(tensor)

    def is_constant(self, tensor: str) -> bool:
        return tensor in self.model.constants

    def readers(self, tensor: str) -> Sequence[Node]:
        return self._readers[tensor]

    def producer(self, tensor: str) -> Node | None:
        return self._makers.get(tensor)

    def is_output(self, tensor: str) -> bool:
        return tensor in self._shown

    def label(self, tensor: str, axis: int) -> LabelAxis:
        if not self.is_constant(tensor):
            axes = self.known.get(tensor, [])
            return axes[axis] if axis < len(axes) else None
        key = (tensor, axis)
        self.claims.add((self.node, key))
        if key not in self.made:
            self.made[key] = self._new(self.model.shapes[tensor][axis])
        return self.made[key]

    def axes(self, tensor: str) -> list[LabelAxis]:
        if self.is_constant(tensor):
            return [self.label(tensor, a) for a in range(len(self.model.shapes[tensor]))]
        found = self.known.get(tensor, [])
        rank = len(self.model.shapes.get(tensor, found))
        return [*found, *[None] * (rank - len(found))]

    # --- what rules may do ------------------------------------------------------------------------------------

    def _new(self, count: int) -> Ints:
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def free(self, count: int) -> Ints:
        return self._new(count)

    def fresh(self, count: int, reason: str) -> Ints:
        labels = self._new(count)
        self.pin(labels, reason)
        return labels

    def tie(self, a: Ints, b: Ints) -> None:
        if a is not b:
            left, right = np.broadcast_arrays(a, b)
            self.ties.append((left.reshape(-1), right.reshape(-1)))

    def pin(self, labels: LabelAxis, reason: str, listed: bool = True, given: bool = False) -> None:
        if labels is not None and labels.size:
            self.pins.append(_Pin(np.asarray(labels).reshape(-1), reason, listed, given))

    def pin_all(self, tensor: str, reason: str, given: bool = False) -> None:
        if self.is_constant(tensor):
            # A constant read whole keeps every axis; those another node labels are pinned at the end.
            self.whole.setdefault(tensor, reason)
        for found in self.known.get(tensor, []):
            self.pin(found, reason, given=given)

    def unify(self, occurrences: Sequence[Axis], node: Node) -> LabelAxis:
        found = [(axis, self.label(*axis)) for axis in occurrences]
        missing = [axis for axis, labels in found if labels is None]
        tracked = [(axis, labels) for axis, labels in found if labels is not None]
        if missing:
            name = missing[0][0]
            for _, labels in tracked:
                why = f"{node} ties it to '{name}', {self.why.get(name, 'untracked')}"
                self.pin(labels, why, given=name in self.given)
            return None
        first = tracked[0][1]
        for axis, labels in tracked[1:]:
            if labels.shape != first.shape:
                self.pin(labels, f"{node} ties axes of different length at '{axis[0]}'")
                self.pin(first, f"{node} ties axes of different length at '{axis[0]}'")
                return None
            self.tie(labels, first)
        return first

    def consume(self, node: Node, data: Axis, weight: Axis | None, groups: int = 1) -> None:
        slot = node.inputs.index(data[0])
        name, axis = weight or (None, 0)
        listed = self.inside if self._depth else self.consumers
        listed.append(Consumer(node.name, slot, data[0], data[1], name, axis, groups))

    def set(self, tensor: str, axes: Sequence[LabelAxis], why: str = "") -> None:
        if not tensor:
            return
        shape = self.shape(tensor)
        checked: list[LabelAxis] = []
        for a, labels in enumerate(axes):
            if labels is not None and (shape is None or a >= len(shape) or shape[a] != labels.size):
                self.pin(labels, f"'{tensor}' has a shape that does not match it")
                labels = None
            checked.append(labels)
        self.known[tensor] = checked
        self.why[tensor] = why or self.why.get(self.first, "untracked")
        if not why and self.first in self.given:
            self.given.add(tensor)

    def choice(self, node: Node, default: int) -> int:
        self.asked[node.name] = default
        return self.choices.get(node.name, default)

    def enter(self, body: Body) -> None:
        here = self.node, self.first
        self._depth += 1
        self.follow(body.nodes)
        self._depth -= 1
        self.node, self.first = here

    def follow(self, nodes: Sequence[Node]) -> None:
        """Apply the rule of every node in turn."""
        for node in nodes:
            self.node = node.name
            self.first = node.inputs[0] if node.inputs else ""
            spec = lookup(node.domain, node.op, node.version)
            if spec is None:
                where = f"{node.domain}::{node.op}" if node.domain else node.op
                opaque(node, self, f"operator {where} (node '{node.name}') is not supported")
            elif not follows_bodies(node) and (node.bodies or node.captures):
                opaque(node, self, f"{node} has a subgraph that is not followed")
            elif (
                any(n and n not in self.model.shapes for n in node.outputs[:1]) and not node.bodies
            ):
                opaque(node, self, f"{node} has an output of unknown shape")
            else:
                with rule_errors(node):
                    spec.channels(node, self)

    first = ""


def _propagate(model: Model, choices: Mapping[str, int]) -> _Labels:
    labels = _Labels(model, choices)
    for port in model.inputs:
        labels.set(port.name, [], f"a graph input ({port.name})")
        labels.given.add(port.name)
    labels.follow(model.nodes)
    for port in model.outputs:
        labels.pin_all(port.name, f"it is part of the graph output '{port.name}'", given=True)
    for key, made in labels.made.items():
        for node in labels.readers(key[0]):
            if (node.name, key) not in labels.claims:
                labels.pin(made, labels.whole.get(key[0], f"{node} reads '{key[0]}' whole"))
    return labels


def couple(model: Model) -> Coupling:
    """Find the units, groups and consumers of a model, and every pinned channel with its reason.

    If a reshape splits channels along an axis that could stay free on either side (attention heads, channel shuffle),
    the last axis stays free. If that pins the channels for another reason (a pixel shuffle written as reshapes), the
    first axis is tried, and chosen if it pins fewer.

    Args:
        model: A loaded model.

    Returns:
        The coupling of its channels.
    """
    labels = _propagate(model, {})
    best = _resolve(model, labels)
    choices: dict[str, int] = {}
    source = {node.name: node.inputs[0] for node in model.every if node.name in labels.asked}
    # All together first: queries, keys and values of one attention are of use only as one.
    stuck = dict.fromkeys(
        (n for n in labels.asked if not any(tensor == source[n] for tensor, _ in best.axes)), 0
    )
    if len(stuck) > 1:
        trial = _resolve(model, _propagate(model, stuck))
        if _pinned_count(trial) < _pinned_count(best):
            best, choices = trial, dict(stuck)
    for name in labels.asked:
        if name in choices or any(tensor == source[name] for tensor, _ in best.axes):
            continue
        trial = _resolve(model, _propagate(model, {**choices, name: 0}))
        if _pinned_count(trial) < _pinned_count(best):
            best, choices[name] = trial, 0
    return best


def exclude(model: Model, coupling: Coupling, patterns: Sequence[str]) -> Coupling:
    """The coupling without the groups that hold a tensor or belong to a node matching a pattern (``*`` and ``?``).

    Raises SettingsError for a pattern that matches no weight and no node.
    """
    if not patterns:
        return coupling
    readers: dict[str, set[str]] = defaultdict(set)
    for node in model.every:
        for name in node.inputs:
            if name in model.constants:
                readers[name].add(node.name)
    chosen = dict.fromkeys(range(len(coupling.groups)), "")
    for pattern in patterns:
        names = {n for tensor, users in readers.items() for n in (tensor, *users)}
        if not any(fnmatchcase(n, pattern) for n in names):
            raise SettingsError(
                f"`exclude='{pattern}'` matches no weight and no node; see 'onnx-oamip inspect' for names."
            )
        for g, group in enumerate(coupling.groups):
            held = {n for t, _ in group.multiplicity if t in readers for n in (t, *readers[t])}
            if any(fnmatchcase(n, pattern) for n in held):
                chosen[g] = pattern
    gone = np.asarray([bool(chosen[g]) for g in range(len(coupling.groups))], bool)
    stays = ~gone[coupling.unit_group]
    renumber = np.where(stays, np.cumsum(stays) - 1, -1)
    axes = {key: np.where(x < 0, -1, renumber[x]) for key, x in coupling.axes.items()}
    group_number = np.cumsum(~gone) - 1
    pinned = [
        Pinned(t, a, held * len(group.units), f"`exclude='{chosen[g]}'` keeps it", True)
        for g, group in enumerate(coupling.groups)
        if gone[g]
        for (t, a), held in group.multiplicity.items()
        if t in model.constants and len(model.shapes[t]) > 1
    ]
    kept_axes = {key: x for key, x in axes.items() if (x >= 0).any()}
    return Coupling(
        n_units=int(stays.sum()),
        groups=tuple(
            replace(g, units=renumber[g.units])
            for i, g in enumerate(coupling.groups)
            if not gone[i]
        ),
        unit_group=group_number[coupling.unit_group[stays]],
        axes=kept_axes,
        consumers=tuple(c for c in coupling.consumers if (c.data, c.axis) in kept_axes),
        inside=tuple(c for c in coupling.inside if (c.data, c.axis) in kept_axes),
        pinned=(*coupling.pinned, *pinned),
    )


def _pinned_count(coupling: Coupling) -> int:
    return sum(p.count for p in coupling.pinned)


def _resolve(model: Model, labels: _Labels) -> Coupling:
    n = labels.count
    left = np.concatenate([a for a, _ in labels.ties]) if labels.ties else np.zeros(0, np.int64)
    right = np.concatenate([b for _, b in labels.ties]) if labels.ties else np.zeros(0, np.int64)
    edges = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(n, n))
    total, component = (
        connected_components(edges, directed=False) if n else (0, np.zeros(0, np.int64))
    )

    reason = np.full(total, len(labels.pins), np.int64)
    for i, pin in enumerate(labels.pins):
        np.minimum.at(reason, component[pin.labels], i)
    free = reason == len(labels.pins)

    axes: dict[Axis, Ints] = dict(labels.made)
    for name, found in labels.known.items():
        axes.update({(name, a): x for a, x in enumerate(found) if x is not None})
    components = {key: component[x].astype(np.int64) for key, x in axes.items()}

    # Units in the order in which the graph meets them, so that results do not depend on label numbers.
    unit = np.full(total, -1, np.int64)
    seen = np.concatenate(list(components.values())) if components else np.zeros(0, np.int64)
    ordered, first = np.unique(seen, return_index=True)
    ordered = ordered[np.argsort(first, kind="stable")]
    ordered = ordered[free[ordered]]
    unit[ordered] = np.arange(len(ordered))
    mapped = {key: unit[x] for key, x in components.items()}
    tracked = {key: x for key, x in mapped.items() if (x >= 0).any()}

    groups, unit_group = _groups(model, tracked, len(ordered))
    return Coupling(
        n_units=len(ordered),
        groups=groups,
        unit_group=unit_group,
        axes=tracked,
        consumers=tuple(c for c in labels.consumers if (c.data, c.axis) in tracked),
        inside=tuple(c for c in labels.inside if (c.data, c.axis) in tracked),
        pinned=_pinned(model, labels, components, reason),
    )


def _groups(
    model: Model, axes: Mapping[Axis, Ints], n_units: int
) -> tuple[tuple[Group, ...], Ints]:
    """Units with the same number of indices on the same axes form a group (a random 64-bit sum tells)."""
    rng = np.random.default_rng(0)
    signature = np.zeros(n_units, np.uint64)
    for x in axes.values():
        token = rng.integers(1, 2**63, dtype=np.uint64)
        counts = np.bincount(x[x >= 0], minlength=n_units).astype(np.uint64)
        signature += counts * token
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    unit_group = rank[inverse].astype(np.int64)

    members: list[Ints] = []
    if n_units:
        ends = np.cumsum(np.bincount(unit_group, minlength=len(order)))
        members = np.split(np.argsort(unit_group, kind="stable"), ends[:-1])
    multiplicity: list[dict[Axis, int]] = [{} for _ in order]
    for key, x in axes.items():
        found, held = np.unique(unit_group[x[x >= 0]], return_counts=True)
        for g, c in zip(found.tolist(), held.tolist(), strict=True):
            multiplicity[g][key] = c // len(members[g])
    names = _names(model, multiplicity)
    groups = tuple(
        Group(name, np.asarray(units, np.int64), axes_held)
        for name, units, axes_held in zip(names, members, multiplicity, strict=True)
    )
    return groups, unit_group


def _names(model: Model, multiplicity: Sequence[Mapping[Axis, int]]) -> list[str]:
    """A group is called after the weight of the first node that makes it; a second one of that name gets '#2'."""
    order: dict[str, int] = {}
    for node in model.every:
        for name in node.inputs:
            if name in model.constants and len(model.shapes[name]) > 1:
                order.setdefault(name, len(order))
    used: dict[str, int] = defaultdict(int)
    names = []
    for held in multiplicity:
        tensors = [t for t, _ in held]
        weights = [t for t in tensors if t in order]
        base = min(weights, key=lambda t: order[t]) if weights else tensors[0]
        used[base] += 1
        names.append(base if used[base] == 1 else f"{base}#{used[base]}")
    return names


def _pinned(
    model: Model, labels: _Labels, components: Mapping[Axis, Ints], reason: Ints
) -> tuple[Pinned, ...]:
    """Axes of weights (constants of rank 2 and more) with channels that cannot go."""
    result = []
    for key in labels.made:
        if not _is_weight(model, key[0]):
            continue
        found = reason[components[key]]
        stuck = found[found < len(labels.pins)]
        if stuck.size:
            pin = labels.pins[int(np.bincount(stuck).argmax())]
            if pin.listed:
                result.append(Pinned(*key, int(stuck.size), pin.reason, pin.given))
    # Weights that only operators read whose channels cannot be followed: nobody labelled them.
    labelled = {tensor for tensor, _ in labels.made}
    result += [
        Pinned(name, 0, model.shapes[name][0], text)
        for name, text in labels.whole.items()
        if name not in labelled and _is_weight(model, name)
    ]
    return tuple(result)


def _is_weight(model: Model, name: str) -> bool:
    kind = model.dtypes[name]
    quantised = np.issubdtype(kind, np.integer) and kind.itemsize == 1
    return len(model.shapes[name]) > 1 and bool(quantised or np.issubdtype(kind, np.inexact))
