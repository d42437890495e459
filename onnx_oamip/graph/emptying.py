"""Emptied groups: the effect of groups that lose all their units, as residual and parallel branches may.

A linear node that reads nothing but removed channels gives its bias: one number per channel, which broadcasts. Where
only elementwise operators stand between it and an operator with another input of the full shape (the sum of a residual
branch, the gate of a squeeze-and-excitation), the number takes the place of the branch. A node that joins channels
leaves out those without any. All that then reaches no output is idle, and other groups may be among it: keys and
queries have no effect without values.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_oamip.core.records import Array, Axis, Bools, Coupling, Model, Node
from onnx_oamip.graph.linear_layers import Editor, site
from onnx_oamip.graph.ops import Site, Trait, consumers_by_tensor, has

BROADCASTS_SINCE = 7
"""Version from which elementwise operators broadcast in all directions."""


@dataclass(frozen=True)
class Effect:
    """Effect of emptied groups on a graph.

    Attributes:
        biases: Output of every linear node that becomes its bias, by the name of the node: the type and the rank of its
            output, but one element along all axes other than that of the channels.
        joined: Input slots without channels, by the name of a node that joins other channels.
        idle: Names of the nodes without effect on any output.
        obstacle: Reason for which the graph cannot do without these groups; empty if it can.
    """

    biases: Mapping[str, Array]
    joined: Mapping[str, tuple[int, ...]]
    idle: frozenset[str]
    obstacle: str = ""

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the nodes that compute nothing any more: those without effect, and those that become constants."""
        return (*sorted(self.idle), *self.biases)


NO_EFFECT = Effect({}, {}, frozenset())
"""Effect where every group has units."""


def emptied_groups(coupling: Coupling, keep: Bools) -> frozenset[int]:
    """Find the groups of which no unit is kept.

    Args:
        coupling: The groups.
        keep: Keep mask of the units (n_units,).

    Returns:
        Their numbers.
    """
    kept = np.bincount(coupling.unit_group[keep], minlength=len(coupling.groups))
    return frozenset(np.flatnonzero(kept == 0).tolist())


def effect_of(model: Model, coupling: Coupling, keep: Bools) -> Effect:
    """Find what becomes of a graph under a choice of units.

    Args:
        model: The model.
        coupling: Its groups.
        keep: Keep mask of the units (n_units,).

    Returns:
        The effect of the groups of which no unit is kept.
    """
    groups = emptied_groups(coupling, keep)
    return Emptying(model, coupling).effect(groups) if groups else NO_EFFECT


class Emptying:
    """Finds the effects of emptied groups in one model.

    Attributes:
        model: The model.
        coupling: Its groups.
    """

    def __init__(self, model: Model, coupling: Coupling) -> None:
        """Index a model.

        Args:
            model: The model.
            coupling: Its groups.
        """
        self.model = model
        self.coupling = coupling
        self._place = {node.name: i for i, node in enumerate(model.nodes)}
        self._readers = consumers_by_tensor(model)
        self._homes = model.homes
        self._producers = {name: node for node in model.nodes for name in node.outputs if name}
        self._visible = {port.name for port in model.outputs}

    @cached_property
    def _editor(self) -> Editor:
        return Editor(self.model.proto)

    @cached_property
    def _groups_of(self) -> Mapping[str, set[int]]:
        """Groups by the computed tensors that hold their channels."""
        found: dict[str, set[int]] = defaultdict(set)
        for number, group in enumerate(self.coupling.groups):
            for tensor, _ in group.multiplicity:
                if tensor in self._producers:
                    found[tensor].add(number)
        return found

    def bundles(self, emptied: Collection[int] = ()) -> dict[int, frozenset[int]]:
        """Find the groups that may be emptied next, each with those that have no effect without it.

        Args:
            emptied: Groups that are empty already.

        Returns:
            By the number of a group, all groups to empty with it, itself among them.
        """
        found = {}
        for group in range(len(self.coupling.groups)):
            if group in emptied:
                continue
            bundle, effect = self._closed(frozenset(emptied) | {group})
            if not effect.obstacle:
                found[group] = bundle.difference(emptied)
        return found

    def _closed(self, groups: frozenset[int]) -> tuple[frozenset[int], Effect]:
        """Groups with all those that have no effect without them, and the effect of emptying all."""
        while True:
            effect = self.effect(groups)
            wider = groups | self._idle_groups(effect)
            if wider == groups or effect.obstacle:
                return groups, effect
            groups = wider

    def _idle_groups(self, effect: Effect) -> set[int]:
        """Groups all of whose channels are computed by idle nodes."""
        nodes = (self.node(name) for name in effect.idle)
        touched = {g for node in nodes for name in node.outputs for g in self._groups_of[name]}

        def is_idle(group: int) -> bool:
            tensors = {tensor for tensor, _ in self.coupling.groups[group].multiplicity}
            made = [self._producers[name] for name in tensors if name in self._producers]
            return all(node.name in effect.idle for node in made)

        return {group for group in touched if is_idle(group)}

    def effect(self, groups: Collection[int]) -> Effect:
        """Find what becomes of the graph without the channels of some groups.

        Args:
            groups: Numbers of the groups.

        Returns:
            The effect, with the reason where the graph cannot do without them.
        """
        if not groups:
            return NO_EFFECT
        return _Search(self, frozenset(groups)).effect()

    def empty_tensors(self, groups: frozenset[int]) -> set[str]:
        """Find the tensors with an axis that belongs to some groups alone.

        Args:
            groups: Numbers of the groups.

        Returns:
            Names of constants and of computed tensors.
        """
        axes = {axis for group in groups for axis in self.coupling.groups[group].multiplicity}
        return {axis[0] for axis in axes if self._is_within(axis, groups)}

    def _is_within(self, axis: Axis, groups: frozenset[int]) -> bool:
        units = self.coupling.axes[axis]
        return bool((units >= 0).all()) and groups.issuperset(self.coupling.unit_group[units])

    def home(self, node: Node) -> Node:
        """Return the node of the graph itself that holds a node.

        Args:
            node: A node of the graph or of a body.

        Returns:
            The node itself, or the one whose body it is in.
        """
        return self.node(self._homes[node.name])

    def position(self, name: str) -> int:
        """Return the position of a node in the graph.

        Args:
            name: Name of a node of the graph itself.

        Returns:
            Its index.
        """
        return self._place[name]

    def node(self, name: str) -> Node:
        """Return a node by its name.

        Args:
            name: Name of a node of the graph itself.

        Returns:
            The node.
        """
        return self.model.nodes[self._place[name]]

    def readers(self, tensor: str) -> list[Node]:
        """List the nodes of the graph itself that read a tensor, or whose bodies do.

        Args:
            tensor: Name of the tensor.

        Returns:
            The nodes.
        """
        return [self.home(node) for node in self._readers.get(tensor, ())]

    def producer(self, tensor: str) -> Node | None:
        """Return the node that computes a tensor.

        Args:
            tensor: Name of the tensor.

        Returns:
            The node; None for inputs and initialisers.
        """
        return self._producers.get(tensor)

    def is_output(self, tensor: str) -> bool:
        """Check whether a tensor is a graph output.

        Args:
            tensor: Name of the tensor.

        Returns:
            True if it is one.
        """
        return tensor in self._visible

    def bias(self, place: Site) -> Array | None:
        """Return the output of a linear node without inputs, as one number per channel.

        Args:
            place: The node.

        Returns:
            Its bias in the type and the rank of its output, of length 1 along all other axes; None where it is not one
            constant per channel, or the shape of the output is not known.
        """
        output = place.node.outputs[0]
        shape = self.model.shapes.get(output)
        values = self._editor.bias(place)
        if shape is None or values is None:
            return None
        view = [1] * len(shape)
        view[place.output_axis % len(shape)] = len(values)
        return values.reshape(view).astype(self.model.dtypes[output])


class _Search:
    """Walk through the nodes that emptied groups affect.

    Attributes:
        constants: Computed tensors that become one number per channel.
        refusals: Reason why a node cannot do without the channels, by its name; idle nodes need not.
    """

    def __init__(self, graph: Emptying, groups: frozenset[int]) -> None:
        self._graph = graph
        self._empty = graph.empty_tensors(groups)
        self._biases: dict[str, Array] = {}
        self._joined: dict[str, tuple[int, ...]] = {}
        self._idle: set[str] = set()
        self.constants: set[str] = set()
        self.refusals: dict[str, str] = {}

    def effect(self) -> Effect:
        """Finds the effect, front to back."""
        graph = self._graph
        queue = [graph.position(node.name) for name in self._empty for node in graph.readers(name)]
        heapq.heapify(queue)
        last = -1
        while queue:
            place = heapq.heappop(queue)
            if place == last:
                continue
            last = place
            node = graph.model.nodes[place]
            if self._becomes_constant(node):
                self.constants.add(node.outputs[0])
                for reader in graph.readers(node.outputs[0]):
                    heapq.heappush(queue, graph.position(reader.name))
        self._find_idle()
        return Effect(self._biases, self._joined, frozenset(self._idle), self._obstacle())

    def _becomes_constant(self, node: Node) -> bool:
        """Tests for a node with one number per channel as its output; notes the changes and refusals of others."""
        outputs = [name for name in node.outputs if name]
        if self._empty.issuperset(outputs):
            return False
        lost = tuple(slot for slot, name in enumerate(node.inputs) if name in self._empty)
        is_hidden = not lost and self._empty.intersection(node.captures)
        reads_constant = bool(self.constants.intersection((*node.inputs, *node.captures)))
        if is_hidden:
            self.refusals[node.name] = f"the body of {node} reads it"
        elif lost and has(node, Trait.JOINS) and not reads_constant:
            self._joined[node.name] = lost
        elif lost:
            return self._becomes_bias(node)
        elif reads_constant:
            return self._passes_on(node)
        return False

    def _becomes_bias(self, node: Node) -> bool:
        """Tests for a linear node that reads nothing but removed channels."""
        place = site(node, self._graph.model.constants)
        if place is None or place.data not in self._empty:
            self.refusals[node.name] = f"{node} reads it, which has no output without it"
        elif (bias := self._graph.bias(place)) is None:
            self.refusals[node.name] = f"the bias of {node} is not one constant per channel"
        else:
            self._biases[node.name] = bias
            return True
        return False

    def _passes_on(self, node: Node) -> bool:
        """Tests for an elementwise node whose output is one number per channel, as an input is."""
        model = self._graph.model
        names = [name for name in node.inputs if name]
        computed = [n for n in names if n not in self.constants and n not in model.constants]
        is_elementwise = has(node, Trait.ELEMENTWISE) and not node.bodies
        if not is_elementwise or (len(names) > 1 and node.version < BROADCASTS_SINCE):
            self.refusals[node.name] = f"{node} would read a constant"
            return False
        if not computed:
            return True
        shape = model.shapes.get(node.outputs[0])
        if shape is None or all(model.shapes.get(name) != shape for name in computed):
            self.refusals[node.name] = f"{node} would have another shape"
        return False

    def _find_idle(self) -> None:
        """Finds the nodes that no output depends on any more."""
        graph = self._graph
        for name in self._empty:
            node = graph.producer(name)
            if node is not None and self._empty.issuperset(n for n in node.outputs if n):
                self._idle.add(node.name)
        nodes = [*self._idle, *self._biases, *self._joined]
        pending = [name for node in nodes for name in self._reads(node)]
        while pending:
            node = graph.producer(pending.pop())
            if node is None or node.name in self._idle:
                continue
            if all(self._is_unread(name) for name in node.outputs if name):
                self._idle.add(node.name)
                pending += self._reads(node.name)

    def _reads(self, name: str) -> list[str]:
        node = self._graph.node(name)
        return [*node.inputs, *node.captures]

    def _is_unread(self, tensor: str) -> bool:
        """Tests for a tensor that is no output and is read by idle nodes only."""
        if self._graph.is_output(tensor):
            return False
        return all(
            node.name in self._idle or node.name in self._biases or self._is_left_out(tensor, node)
            for node in self._graph.readers(tensor)
        )

    def _is_left_out(self, tensor: str, node: Node) -> bool:
        slots = {slot for slot, name in enumerate(node.inputs) if name == tensor}
        return bool(slots) and slots.issubset(self._joined.get(node.name, ()))

    def _obstacle(self) -> str:
        """The first reason at a node that is not idle, or a graph output that would not depend on any input."""
        for name in sorted(self.refusals, key=self._graph.position):
            if name not in self._idle:
                return self.refusals[name]
        outputs = [port.name for port in self._graph.model.outputs]
        lost = [name for name in outputs if name in self.constants or name in self._empty]
        return f"the graph output '{lost[0]}' would be a constant" if lost else ""
