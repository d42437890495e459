"""Channel coupling: finds the sets of channels that must be kept or removed together.

Every index of every tracked tensor axis carries an integer label. The channel rule of each operator ties labels, pins
them with a reason, and passes label arrays on to its outputs. A *unit* is one connected component without a pinned
label: a set of (tensor, axis, index) that is kept or removed as a whole. The components are computed in one vectorised
pass at the end. This module names no operator; all of that knowledge is in the channel rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.printable import shortened
from onnx_oamip.core.records import (
    Array,
    Axis,
    Body,
    Bools,
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
    Trait,
    consumers_by_tensor,
    follows_bodies,
    has,
    kinds,
    lookup,
    opaque,
    rule_errors,
)
from onnx_oamip.graph.ops.reshape import blocks


@dataclass(frozen=True, slots=True)
class _Pin:
    """Labels that must not be removed.

    Attributes:
        labels: The pinned labels, flat.
        reason: Why they are pinned, for the user.
        listed: Whether the report lists them.
        given: Whether the interface of the model is the reason.
    """

    labels: Ints
    reason: str
    listed: bool
    given: bool


class _Labels:
    """State of one label propagation through a graph; implements ``ops.Labels``.

    Attributes:
        count: Number of labels handed out.
        tracked: Labels of the axes of each intermediate tensor; None for an axis without labels.
        constant_labels: Labels of the axes of constants, made when an operator first asks for them.
        untracked_reasons: Why a tensor carries no labels.
        given: Intermediate tensors whose labels are missing because of the interface of the model.
        ties: Pairs of label arrays (n,) that must be kept or removed together, index by index.
        tied_by: Node that made each tie, in words.
        pins: Labels that must not be removed.
        claims: (node, constant axis) for every constant axis that the rule of a node has labelled.
        read_whole: Reason for each constant that a node reads without following its channels.
        consumers, inside: Reads of labelled axes, in the main graph and in subgraphs.
        defaults: Default choice of each node that has a choice of axis.
    """

    def __init__(self, model: Model, choices: Mapping[str, int]) -> None:
        self.model = model
        self.count = 0
        self.tracked: dict[str, list[LabelAxis]] = {}
        self.constant_labels: dict[Axis, Ints] = {}
        self.untracked_reasons: dict[str, str] = {}
        self.given: set[str] = set()
        self.ties: list[tuple[Ints, Ints]] = []
        self.tied_by: list[str] = []
        self.pins: list[_Pin] = []
        self.claims: set[tuple[str, Axis]] = set()
        self.read_whole: dict[str, str] = {}
        self.consumers: list[Consumer] = []
        self.inside: list[Consumer] = []
        self.defaults: dict[str, int] = {}
        self._choices = choices
        self._node = ""
        self._site = ""
        self._first_input = ""
        # Input of the current node whose missing labels untracked an axis of another one.
        self._untracked_input = ""
        self._depth = 0
        self._consumers_of = consumers_by_tensor(model)
        self._producers: dict[str, Node] = {}
        self._output_names = {port.name for port in model.outputs}
        for node in model.every:
            self._producers.update((name, node) for name in node.outputs if name)
            for body in node.bodies.values():
                self._output_names.update(body.outputs)

    # --- queries of the rules ---------------------------------------------------------------------------------

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        return self.model.shapes.get(tensor)

    def constant(self, tensor: str) -> Array | None:
        return self.model.constants.get(tensor)

    def is_constant(self, tensor: str) -> bool:
        return tensor in self.model.constants

    def readers(self, tensor: str) -> Sequence[Node]:
        return self._consumers_of[tensor]

    def producer(self, tensor: str) -> Node | None:
        return self._producers.get(tensor)

    def is_output(self, tensor: str) -> bool:
        return tensor in self._output_names

    def label(self, tensor: str, axis: int) -> LabelAxis:
        if not self.is_constant(tensor):
            axes = self.tracked.get(tensor, [])
            if axis < len(axes):
                return axes[axis]
            return None
        key = (tensor, axis)
        self.claims.add((self._node, key))
        source = self.model.source(tensor)
        if source != tensor:
            return self._label_of_view(key, source)
        if key not in self.constant_labels:
            self.constant_labels[key] = self._new(self.model.shapes[tensor][axis])
        return self.constant_labels[key]

    def _label_of_view(self, key: Axis, source: str) -> Ints:
        """Labels of an axis of a view: those of the initialiser, as far as they were followed into it."""
        tensor, axis = key
        axes = self.tracked[tensor]
        followed = axes[axis]
        if followed is None:
            reason = f"'{tensor}' rearranges it from '{source}' in a form that is not followed"
            followed = axes[axis] = self.fresh(self.model.shapes[tensor][axis], reason)
        return followed

    def axes(self, tensor: str) -> list[LabelAxis]:
        if self.is_constant(tensor):
            rank = len(self.model.shapes[tensor])
            return [self.label(tensor, axis) for axis in range(rank)]
        labels = self.tracked.get(tensor, [])
        rank = len(self.model.shapes.get(tensor, labels))
        return [*labels, *[None] * (rank - len(labels))]

    # --- actions of the rules ---------------------------------------------------------------------------------

    def _new(self, count: int) -> Ints:
        start = self.count
        self.count += count
        return np.arange(start, self.count, dtype=np.int64)

    def free(self, count: int) -> Ints:
        return self._new(count)

    def fresh(self, count: int, reason: str) -> Ints:
        labels = self._new(count)
        self.pin(labels, reason)
        return labels

    def tie(self, a: Ints, b: Ints) -> None:
        if a is b:
            return
        left, right = np.broadcast_arrays(a, b)
        self.ties.append((left.reshape(-1), right.reshape(-1)))
        self.tied_by.append(self._site)

    def pin(
        self,
        labels: LabelAxis,
        reason: str,
        listed: bool = True,
        given: bool = False,
    ) -> None:
        if labels is not None and labels.size:
            self.pins.append(_Pin(np.asarray(labels).reshape(-1), reason, listed, given))

    def pin_all(self, tensor: str, reason: str, given: bool = False) -> None:
        if self.is_constant(tensor):
            # Nodes still to come may label axes of this constant: those labels are pinned at the end.
            self.read_whole.setdefault(tensor, reason)
        for labels in self.tracked.get(tensor, []):
            self.pin(labels, reason, given=given)

    def unify(self, occurrences: Sequence[Axis], node: Node) -> LabelAxis:
        tracked: list[tuple[str, Ints]] = []
        missing: list[str] = []
        for tensor, axis in occurrences:
            labels = self.label(tensor, axis)
            if labels is None:
                missing.append(tensor)
            else:
                tracked.append((tensor, labels))
        if missing:
            self._pin_tied_to_untracked(missing[0], tracked, node)
            return None
        _, first = tracked[0]
        for tensor, labels in tracked[1:]:
            if labels.shape != first.shape:
                reason = f"{node} ties axes of different length at '{shortened(tensor)}'"
                self.pin(labels, reason)
                self.pin(first, reason)
                return None
            self.tie(labels, first)
        return first

    def _pin_tied_to_untracked(
        self, untracked: str, tracked: Sequence[tuple[str, Ints]], node: Node
    ) -> None:
        if tracked:
            self._untracked_input = untracked
        why_untracked = self.untracked_reasons.get(untracked, "untracked")
        reason = f"{node} ties it to '{shortened(untracked)}', {why_untracked}"
        for _, labels in tracked:
            self.pin(labels, reason, given=untracked in self.given)

    def consume(
        self,
        node: Node,
        data: Axis,
        weight: Axis | None,
        groups: int = 1,
    ) -> None:
        tensor, axis = data
        slot = node.inputs.index(tensor)
        weight_name, weight_axis = weight or (None, 0)
        consumer = Consumer(node.name, slot, tensor, axis, weight_name, weight_axis, groups)
        if self._depth:
            self.inside.append(consumer)
        else:
            self.consumers.append(consumer)

    def set(self, tensor: str, axes: Sequence[LabelAxis], why: str = "", source: str = "") -> None:
        if not tensor:
            return
        shape = self.shape(tensor)
        checked: list[LabelAxis] = []
        for axis, labels in enumerate(axes):
            if labels is None:
                checked.append(None)
                continue
            matches = shape is not None and axis < len(shape) and shape[axis] == labels.size
            if not matches:
                self.pin(labels, f"'{shortened(tensor)}' has a shape that does not match it")
            checked.append(labels if matches else None)
        self.tracked[tensor] = checked
        source = source or self._untracked_input or self._first_input
        inherited = self.untracked_reasons.get(source, "untracked")
        self.untracked_reasons[tensor] = why or inherited
        if not why and source in self.given:
            self.given.add(tensor)

    def choice(self, node: Node, default: int) -> int:
        self.defaults[node.name] = default
        return self._choices.get(node.name, default)

    def enter(self, body: Body, unused: str = "") -> None:
        outer = self._node, self._first_input, self._untracked_input
        before = self.count
        self._depth += 1
        self.follow(body.nodes)
        self._depth -= 1
        if unused:
            self.pin(np.arange(before, self.count, dtype=np.int64), unused)
        self._node, self._first_input, self._untracked_input = outer

    def follow(self, nodes: Sequence[Node]) -> None:
        """Applies the channel rule of every node in turn.

        Args:
            nodes: Nodes of one graph or subgraph, in topological order.
        """
        for node in nodes:
            self._node = node.name
            self._site = str(node)
            self._first_input = node.inputs[0] if node.inputs else ""
            self._untracked_input = ""
            if self._computes_constant(node):
                continue  # it reads its constants whole, and its outputs have labels of their own
            obstacle = self._obstacle(node)
            if obstacle:
                self._pin_decided_classes(node)  # first, as the first reason of a channel counts
                opaque(node, self, obstacle)
                continue
            spec = lookup(node.domain, node.op, node.version)
            assert spec is not None  # an operator without an entry is an obstacle
            with rule_errors(node):
                spec.channels(node, self)

    def _pin_decided_classes(self, node: Node) -> None:
        """Pins the classes among which a node chooses where the choice is a graph output: they are the interface."""
        output = self._decided_output(node)
        if not output:
            return
        axes = self.tracked.get(node.inputs[0], [])
        if axes:
            axis = int(node.attrs.get("axis", kinds.CLASS_DECISIONS[node.op])) % len(axes)
            reason = f"{node} chooses among them for the graph output '{shortened(output)}'"
            self.pin(axes[axis], reason, given=True)

    def _decided_output(self, node: Node) -> str:
        """Graph output that is a choice of this node among classes, with no layer behind it; empty for other nodes."""
        if node.domain not in kinds.STANDARD_DOMAINS or node.op not in kinds.CLASS_DECISIONS:
            return ""
        outputs = {port.name for port in self.model.outputs}
        reached: dict[str, None] = {}  # a set in order
        waiting = list(node.outputs)
        while waiting:
            tensor = waiting.pop()
            if not tensor or tensor in reached:
                continue
            reached[tensor] = None
            for reader in self.readers(tensor):
                if (
                    reader.domain not in kinds.DESCRIBED_DOMAINS
                    or reader.op not in kinds.POSTPROCESSING
                ):
                    return ""
                waiting += reader.outputs
        return next((tensor for tensor in reached if tensor in outputs), "")

    def _computes_constant(self, node: Node) -> bool:
        """Tests for a node that computes a constant which is no view of an initialiser."""
        name = node.outputs[0] if node.outputs else ""
        return name in self.model.computed and name not in self.model.views

    def _obstacle(self, node: Node) -> str:
        """Reason why the channels of a node cannot be followed; empty if they can."""
        if lookup(node.domain, node.op, node.version) is None:
            if node.domain:
                operator = f"{node.domain}::{node.op}"
            else:
                operator = node.op
            return f"operator {operator} (node '{shortened(node.name)}') is not supported"
        if not follows_bodies(node) and (node.bodies or node.captures):
            return f"{node} has a subgraph that is not followed"
        output_shape_missing = any(
            name and name not in self.model.shapes for name in node.outputs[:1]
        )
        if output_shape_missing and not node.bodies:
            return f"{node} has an output of unknown shape"
        return ""


def _follow(labels: _Labels) -> None:
    """Applies the channel rules of all nodes of a model."""
    for port in labels.model.inputs:
        labels.set(port.name, [], f"a graph input ({shortened(port.name)})")
        labels.given.add(port.name)
    labels.follow(labels.model.nodes)


def _propagate(model: Model, choices: Mapping[str, int]) -> _Labels:
    labels = _Labels(model, choices)
    _follow(labels)
    for port in model.outputs:
        labels.pin_all(
            port.name, f"it is part of the graph output '{shortened(port.name)}'", given=True
        )
    # A node that reads a constant without labelling an axis depends on all channels of that axis.
    of_views = {
        (view, axis): axis_labels
        for view in model.views
        for axis, axis_labels in enumerate(labels.tracked.get(view, ()))
        if axis_labels is not None
    }
    all_labels = {**labels.constant_labels, **of_views}
    is_channel = _channels(labels, all_labels)
    claiming: dict[str, set[str]] = defaultdict(set)
    for node_name, (constant, _) in labels.claims:
        claiming[constant].add(node_name)
    for key, axis_labels in all_labels.items():
        constant = key[0]
        if labels.is_output(constant):
            reason = f"'{shortened(constant)}' is a graph output as well"
            labels.pin(axis_labels, reason, given=True)
        if constant in labels.read_whole:
            # Also if the node that reads it whole has labelled some of its axes.
            labels.pin(axis_labels, labels.read_whole[constant])
            continue
        for node in labels.readers(constant):
            if (node.name, key) in labels.claims:
                continue
            # Views follow every axis of a kernel, also the taps: a layer has no labels for those.
            has_others = node.name in claiming[constant]
            is_listed = bool(is_channel[axis_labels].any()) or not has_others
            reason = f"{node} reads '{shortened(constant)}' whole"
            labels.pin(axis_labels, reason, listed=is_listed)
    return labels


class _AllChannels(_Labels):
    """Labels that are also given to the parts of an axis that a reshape does not leave free, such as heads.

    Attributes:
        read: Axes without labels that a product ties to a constant weight.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model, {})
        self.read: set[Axis] = set()

    def unify(self, occurrences: Sequence[Axis], node: Node) -> LabelAxis:
        found = super().unify(occurrences, node)
        spec = lookup(node.domain, node.op, node.version)
        is_product = spec is not None and spec.cost is not None
        if found is None and is_product and any(self.is_constant(name) for name, _ in occurrences):
            self.read.update(key for key in occurrences if not self.is_constant(key[0]))
        return found

    def set(self, tensor: str, axes: Sequence[LabelAxis], why: str = "", source: str = "") -> None:
        super().set(tensor, axes, why, source)
        node = self._producers.get(tensor)
        if node is None or not has(node, Trait.RESHAPES):
            return
        before, after = self.shape(node.inputs[0]), self.shape(tensor)
        if before is None or after is None:
            return
        labelled, result = self.axes(node.inputs[0]), self.axes(tensor)
        for left, right in blocks(before, after):
            if all(labelled[axis] is None for axis in left):
                continue
            for axis in right:
                if result[axis] is None:
                    result[axis] = self._new(after[axis])
        self.tracked[tensor] = result


def followed_axes(model: Model) -> tuple[frozenset[Axis], frozenset[Axis]]:
    """Finds the axes of computed tensors along which channels are followed, whether these can be removed or not.

    Args:
        model: A loaded model.

    Returns:
        Axes that are followed from the layer that writes them (of one that a reshape divides, all parts), and axes that
        are not, although a layer sums over them.
    """
    labels = _AllChannels(model)
    _follow(labels)
    written = (
        (tensor, axis)
        for tensor, axes in labels.tracked.items()
        if tensor not in model.constants
        for axis, found in enumerate(axes)
        if found is not None
    )
    return frozenset(written), frozenset(labels.read)


def _channels(labels: _Labels, all_labels: Mapping[Axis, Ints]) -> Bools:
    """Mask of the labels (labels,) that a node follows which does more than to make a view of a constant."""
    views = labels.model.views
    makers = {node.name for node in labels.model.every if node.outputs and node.outputs[0] in views}
    result = np.zeros(labels.count, bool)
    for node, key in labels.claims:
        if node not in makers and key in all_labels:
            result[all_labels[key]] = True
    return result


def couple(model: Model) -> Coupling:
    """Finds the units, groups and consumers of a model, and every pinned channel with its reason.

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
    best_labels = labels
    choices: dict[str, int] = {}
    source = {node.name: node.inputs[0] for node in model.every if node.name in labels.defaults}

    def is_pinned(name: str) -> bool:
        return all(tensor != source[name] for tensor, _ in best.axes)

    # All together first: queries, keys and values of one attention are only useful together.
    pinned = dict.fromkeys((name for name in labels.defaults if is_pinned(name)), 0)
    trials = [pinned] if len(pinned) > 1 else []
    for trial_choices in (*trials, *({name: 0} for name in labels.defaults)):
        if any(name in choices or not is_pinned(name) for name in trial_choices):
            continue
        trial_labels = _propagate(model, {**choices, **trial_choices})
        trial = _resolve(model, trial_labels)
        if _pinned_count(trial) < _pinned_count(best):
            best = trial
            best_labels = trial_labels
            choices.update(trial_choices)
    return replace(best, pinned=(*best.pinned, *_single_units(model, best, best_labels)))


def _single_units(model: Model, coupling: Coupling, labels: _Labels) -> list[Pinned]:
    """Records for the weights of groups of one unit, which is kept: its channels were joined by a node."""
    result = []
    for group in coupling.groups:
        weights = {
            key: channels
            for key, channels in group.multiplicity.items()
            if key in labels.constant_labels and _is_weight(model, key[0])
        }
        if len(group.units) > 1 or min(weights.values(), default=1) == 1:
            continue  # one channel is one unit without being joined to others
        widest = max(weights, key=lambda key: weights[key])
        joined = labels.constant_labels[widest][coupling.axes[widest] == group.units[0]]
        reason = f"{_joined_by(labels, joined)} joins them into one unit, which stays"
        result += [Pinned(*key, channels, reason) for key, channels in weights.items()]
    return result


def _joined_by(labels: _Labels, joined: Ints) -> str:
    """The node whose tie is the first by which all of several labels are joined."""
    low = 0
    high = len(labels.ties)
    while low < high:
        middle = (low + high) // 2
        component = _components(labels, middle)[joined]
        if (component == component[0]).all():
            high = middle
        else:
            low = middle + 1
    return labels.tied_by[low - 1]


def exclude(model: Model, coupling: Coupling, patterns: Sequence[str]) -> Coupling:
    """Removes groups from a coupling whose tensors or nodes match a pattern, so that they are kept whole.

    Args:
        model: The coupled model.
        coupling: Its coupling.
        patterns: Names of weights or nodes, with ``*`` and ``?`` as wildcards.

    Returns:
        The coupling without the matching groups; their weights are listed as pinned.

    Raises:
        SettingsError: A pattern matches no weight and no node.
    """
    if not patterns:
        return coupling
    matched = _matching_patterns(model, coupling, patterns)
    reasons = [f"`exclude='{pattern}'` keeps it" if pattern else "" for pattern in matched]
    return without(model, coupling, reasons)


def without(model: Model, coupling: Coupling, reasons: Sequence[str]) -> Coupling:
    """Removes groups from a coupling, so that they are kept whole.

    Args:
        model: The coupled model.
        coupling: Its coupling.
        reasons: Reason to keep each group whole; empty for groups that remain.

    Returns:
        The coupling without these groups; their weights are listed as pinned.
    """
    removed = np.asarray([bool(reason) for reason in reasons], bool)
    if not removed.any():
        return coupling
    unit_stays = ~removed[coupling.unit_group]
    new_unit = np.where(unit_stays, np.cumsum(unit_stays) - 1, -1)
    new_group = np.cumsum(~removed) - 1
    axes: dict[Axis, Ints] = {}
    for key, units in coupling.axes.items():
        renumbered = np.where(units < 0, -1, new_unit[units])
        if (renumbered >= 0).any():
            axes[key] = renumbered
    groups = [
        replace(group, units=new_unit[group.units])
        for group, reason in zip(coupling.groups, reasons, strict=True)
        if not reason
    ]
    return Coupling(
        n_units=int(unit_stays.sum()),
        groups=tuple(groups),
        unit_group=new_group[coupling.unit_group[unit_stays]],
        axes=axes,
        consumers=_consumers_on(coupling.consumers, axes),
        inside=_consumers_on(coupling.inside, axes),
        pinned=(*coupling.pinned, *_kept_whole(model, coupling, reasons)),
    )


def _matching_patterns(model: Model, coupling: Coupling, patterns: Sequence[str]) -> list[str]:
    """Last pattern that matches each group; empty for a group without a match."""
    names_of: dict[str, set[str]] = defaultdict(set)
    for node in model.every:
        for name in node.inputs:
            if name in model.constants:
                names_of[name].update((node.name, *weight_names(model, name)))
    all_names = set().union(*names_of.values())
    matched = [""] * len(coupling.groups)
    for pattern in patterns:
        if not any(matches(name, pattern, all_names) for name in all_names):
            raise SettingsError(
                f"`exclude='{pattern}'` matches no weight and no node; see 'onnx-oamip inspect' for names."
            )
        for i, group in enumerate(coupling.groups):
            weights = {tensor for tensor, _ in group.multiplicity if tensor in names_of}
            names = set().union(*(names_of[weight] for weight in weights))
            if any(matches(name, pattern, all_names) for name in names):
                matched[i] = pattern
    return matched


def weight_names(model: Model, weight: str) -> tuple[str, ...]:
    """List the names by which a pattern of ``exclude`` may mean a weight, besides those of the nodes that read it.

    Args:
        model: The model.
        weight: Name of a constant.

    Returns:
        The name itself, those of the initialisers of the file that hold its values, and those of the nodes of the file
        that computed it from them.
    """
    origin = model.folded.get(model.source(weight))
    nodes = () if origin is None else origin.nodes
    return (weight, *model.file_names(weight), *nodes)


def matches(name: str, pattern: str, names: Collection[str]) -> bool:
    """Match a name of a weight or a node with a pattern of ``exclude``.

    Args:
        name: The name.
        pattern: A name, or a shell pattern. Exporters write ``[`` and ``*`` into names, so a pattern that is the name
            of a weight or a node matches only that name.
        names: All names that the pattern may mean.

    Returns:
        True if the pattern matches.
    """
    if pattern in names:
        return name == pattern
    return fnmatchcase(name, pattern)


def _kept_whole(model: Model, coupling: Coupling, reasons: Sequence[str]) -> list[Pinned]:
    """Records for the weights of groups that are kept for a reason."""
    result = []
    for group, reason in zip(coupling.groups, reasons, strict=True):
        if not reason:
            continue
        for (tensor, axis), per_unit in group.multiplicity.items():
            if model.is_stored(tensor) and len(model.shapes[tensor]) > 1:
                channels = per_unit * len(group.units)
                result.append(Pinned(tensor, axis, channels, reason, True))
    return result


def _consumers_on(consumers: Sequence[Consumer], axes: Mapping[Axis, Ints]) -> tuple[Consumer, ...]:
    return tuple(c for c in consumers if (c.data, c.axis) in axes)


def _pinned_count(coupling: Coupling) -> int:
    return sum(p.count for p in coupling.pinned)


def _resolve(model: Model, labels: _Labels) -> Coupling:
    """Builds the coupling from the ties and pins of a propagation."""
    component = _components(labels)
    total = int(component.max()) + 1 if len(component) else 0

    # The first pin of a component names its reason; without a pin the index stays at the number of pins.
    first_pin = np.full(total, len(labels.pins), np.int64)
    for i, pin in enumerate(labels.pins):
        np.minimum.at(first_pin, component[pin.labels], i)
    is_free = first_pin == len(labels.pins)

    labelled: dict[Axis, Ints] = dict(labels.constant_labels)
    for name, tensor_axes in labels.tracked.items():
        for axis, axis_labels in enumerate(tensor_axes):
            if axis_labels is not None:
                labelled[name, axis] = axis_labels
    components = {key: component[x].astype(np.int64) for key, x in labelled.items()}

    # Units in the order in which the graph meets them, so that results do not depend on label numbers.
    unit_of_component = np.full(total, -1, np.int64)
    met = _concatenated(components.values())
    distinct, first_position = np.unique(met, return_index=True)
    in_order = distinct[np.argsort(first_position, kind="stable")]
    free = in_order[is_free[in_order]]
    unit_of_component[free] = np.arange(len(free))
    axes: dict[Axis, Ints] = {}
    for key, x in components.items():
        units = unit_of_component[x]
        if (units >= 0).any():
            axes[key] = units

    groups, unit_group = _groups(model, axes, len(free))
    return Coupling(
        n_units=len(free),
        groups=groups,
        unit_group=unit_group,
        axes=axes,
        consumers=_consumers_on(labels.consumers, axes),
        inside=_consumers_on(labels.inside, axes),
        pinned=_pinned(model, labels, components, first_pin),
    )


def _components(labels: _Labels, ties: int | None = None) -> Ints:
    """Component number of every label (labels,), by the first ``ties`` ties or by all."""
    if not labels.count:
        return np.zeros(0, np.int64)
    left = _concatenated([a for a, _ in labels.ties[:ties]])
    right = _concatenated([b for _, b in labels.ties[:ties]])
    shape = (labels.count, labels.count)
    edges = coo_array((np.ones(len(left), np.int8), (left, right)), shape=shape)
    _, component = connected_components(edges, directed=False)
    return np.asarray(component)


def _concatenated(parts: Collection[Ints]) -> Ints:
    if parts:
        return np.concatenate(list(parts))
    return np.zeros(0, np.int64)


def _groups(
    model: Model, axes: Mapping[Axis, Ints], n_units: int
) -> tuple[tuple[Group, ...], Ints]:
    """Groups of units, and the group number of every unit (n_units,).

    Units with the same number of indices on the same axes form a group: only the number of such units that are kept
    matters to the cost.
    """
    signature = _signatures(axes, n_units)
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    # Groups are numbered in the order of their first unit, not by the value of the signature.
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
        present, channels = np.unique(unit_group[x[x >= 0]], return_counts=True)
        for g, count in zip(present.tolist(), channels.tolist(), strict=True):
            multiplicity[g][key] = count // len(members[g])
    names = _group_names(model, multiplicity)
    groups = []
    for name, units, channels_per_unit in zip(names, members, multiplicity, strict=True):
        groups.append(Group(name, np.asarray(units, np.int64), channels_per_unit))
    return tuple(groups), unit_group


def _signatures(axes: Mapping[Axis, Ints], n_units: int) -> Array:
    """A 64-bit hash per unit (n_units,) of its number of indices on every axis.

    Each axis has a random multiplier, so that units with different counts get the same sum with negligible
    probability. The seed is fixed: results are the same on every run.
    """
    rng = np.random.default_rng(0)
    signature = np.zeros(n_units, np.uint64)
    for x in axes.values():
        multiplier = rng.integers(1, 2**63, dtype=np.uint64)
        counts = np.bincount(x[x >= 0], minlength=n_units).astype(np.uint64)
        signature += counts * multiplier
    return signature


def _group_names(model: Model, multiplicity: Sequence[Mapping[Axis, int]]) -> list[str]:
    """Names of the groups: the first weight in graph order, with '#2' behind it for a second group of that name."""
    order: dict[str, int] = {}
    for node in model.every:
        for name in node.inputs:
            if name in model.constants and len(model.shapes[name]) > 1:
                order.setdefault(name, len(order))
    used: dict[str, int] = defaultdict(int)
    names = []
    for axes in multiplicity:
        tensors = [tensor for tensor, _ in axes]
        weights = [tensor for tensor in tensors if tensor in order]
        if weights:
            base = min(weights, key=lambda weight: order[weight])
        else:
            base = tensors[0]
        used[base] += 1
        names.append(base if used[base] == 1 else f"{base}#{used[base]}")
    return names


def _pinned(
    model: Model,
    labels: _Labels,
    components: Mapping[Axis, Ints],
    first_pin: Ints,
) -> tuple[Pinned, ...]:
    """Axes of weights (constants of rank 2 and more) with pinned channels.

    Each axis is reported with the reason that most of its pinned channels have.
    """
    result = []
    for key in labels.constant_labels:
        if not _is_weight(model, key[0]):
            continue
        pins = first_pin[components[key]]
        pinned = pins[pins < len(labels.pins)]
        if not pinned.size:
            continue
        pin = labels.pins[int(np.bincount(pinned).argmax())]
        if pin.listed:
            result.append(Pinned(*key, int(pinned.size), pin.reason, pin.given))
    # Weights without labels: every operator that reads them is one whose channels cannot be followed.
    labelled = {tensor for tensor, _ in labels.constant_labels}
    for name, reason in labels.read_whole.items():
        if name not in labelled and _is_weight(model, name):
            result.append(Pinned(name, 0, model.shapes[name][0], reason))
    return tuple(result)


def _is_weight(model: Model, name: str) -> bool:
    dtype = model.dtypes[name]
    is_quantised = np.issubdtype(dtype, np.integer) and dtype.itemsize == 1
    is_floating = np.issubdtype(dtype, np.inexact)
    return len(model.shapes[name]) > 1 and bool(is_quantised or is_floating)
