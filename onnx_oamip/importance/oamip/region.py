"""Region of a graph that the joint importance program covers, and an estimate of its size.

The region reaches from the keep variables forward to the logits. Every node in it needs an ``encode`` rule. Units in
front of a node without such a rule are left out, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import (
    Axis,
    Bools,
    Coupling,
    Images,
    Ints,
    Model,
    Node,
)
from onnx_oamip.graph import chains
from onnx_oamip.graph.ops import Trait, has, lookup

MAX_LISTED_REASONS = 3
"""Distinct reasons that an error message lists."""


@dataclass(frozen=True)
class Form:
    """Options of the joint importance program.

    Attributes:
        kind: Encoding of the network, ``exact`` or ``paper`` (see ``programs.encoder``).
        weight: Weight of the cross-entropy against the sparsity term.
        relax: True to solve the program without any integer variable.
        budget: Share of the cost (given per unit) that may be kept. It replaces the sparsity term.
    """

    kind: Literal["exact", "paper"] = "exact"
    weight: float = 5.0
    relax: bool = False
    budget: float | None = None

    @property
    def whole_keep(self) -> bool:
        """True if keep variables are binary: ``exact`` chooses units, ``paper`` gives continuous scores."""
        return self.kind == "exact" and not self.relax

    @property
    def kernel_share(self) -> bool:
        """True if the sparsity of a convolution is also divided by its kernel size, as in the published program."""
        return self.kind == "paper"


@dataclass(frozen=True)
class Region:
    """Part of the graph that a program covers.

    Attributes:
        nodes: Indices of the nodes to encode, in graph order.
        inside: Those of the nodes whose outputs depend on a keep variable.
        included: Boolean per unit (n_units,), true if the unit has a keep variable.
        outside: Reason by unit, for the units without a keep variable.
    """

    nodes: tuple[int, ...]
    inside: frozenset[int]
    included: Bools
    outside: Mapping[int, str]


class GateSite(NamedTuple):
    """An axis with gates, and the indices of the nodes that read it gated."""

    axis: Axis
    consumers: list[int]


def without_rule(model: Model) -> dict[int, str]:
    """Find the nodes that cannot be encoded.

    Args:
        model: Model to search.

    Returns:
        Reason by index of the node.
    """
    reasons = {}
    for i, node in enumerate(model.nodes):
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.encode is None or node.captures:
            reasons[i] = f"{node} has no form in the program"
    return reasons


def region(
    model: Model,
    coupling: Coupling,
    logits: Collection[str],
    form: Form,
    blocked: Mapping[int, str],
) -> Region:
    """Determine the region that the program can cover.

    Args:
        model: Model to score.
        coupling: Units of the model.
        logits: Tensors on which cross-entropies are computed, one per head.
        form: Options of the program.
        blocked: Reason by index, for the nodes that cannot be encoded.

    Returns:
        The largest region without a blocked node behind a gate.
    """
    consumers = consumers_of(model)
    needed = _ancestors(model, logits)
    blocking = _blocking_reasons(model, consumers, needed, blocked)
    sites = gate_sites(model, coupling, consumers, needed, form)
    outside = _excluded_units(coupling, sites, blocking)
    included = np.ones(coupling.n_units, bool)
    included[list(outside)] = False
    inside = _dependent_nodes(model, coupling, sites, needed, included)
    # The bounds of `paper` propagate from the graph input; `exact` starts from known activations.
    if form.kind == "paper":
        nodes = sorted(needed)
    else:
        nodes = sorted(inside)
    return Region(tuple(nodes), frozenset(inside), included, outside)


def _blocking_reasons(
    model: Model,
    consumers: Mapping[str, Sequence[int]],
    needed: set[int],
    blocked: Mapping[int, str],
) -> dict[int, str]:
    """Reason by node, for the nodes that are blocked themselves or feed a blocked node."""
    reasons: dict[int, str] = {}
    for i in sorted(needed, reverse=True):
        if i in blocked:
            reasons[i] = blocked[i]
            continue
        for name in model.nodes[i].outputs:
            later = [reasons[j] for j in consumers[name] if j in reasons]
            if later:
                reasons[i] = later[0]
                break
    return reasons


def _excluded_units(
    coupling: Coupling,
    sites: Sequence[GateSite],
    blocking: Mapping[int, str],
) -> dict[int, str]:
    """Reason by unit, for the units that have no gate or a gate in front of a blocked node."""
    has_gate = np.zeros(coupling.n_units, bool)
    outside: dict[int, str] = {}
    for axis, nodes in sites:
        units = np.unique(_units_on(coupling, axis))
        has_gate[units] = True
        reason = next((blocking[j] for j in nodes if j in blocking), None)
        if reason is None:
            continue
        for unit in units:
            outside.setdefault(int(unit), reason)
    for unit in np.flatnonzero(~has_gate):
        outside[int(unit)] = "no logit depends on it"
    return outside


def _dependent_nodes(
    model: Model,
    coupling: Coupling,
    sites: Sequence[GateSite],
    needed: set[int],
    included: Bools,
) -> set[int]:
    """Nodes that read a gate of an included unit, and all needed nodes behind them."""
    inside: set[int] = set()
    for axis, nodes in sites:
        if included[_units_on(coupling, axis)].any():
            inside.update(nodes)
    dependent: set[str] = set()
    for i in sorted(needed):
        node = model.nodes[i]
        if i in inside or dependent.intersection(node.inputs):
            inside.add(i)
            dependent.update(name for name in node.outputs if name)
    return inside


def _units_on(coupling: Coupling, axis: Axis) -> Ints:
    """Units of the channels of an axis, one entry per channel that belongs to a unit."""
    labels = coupling.axes[axis]
    return labels[labels >= 0]


def consumers_of(model: Model) -> dict[str, list[int]]:
    """Index the consumers of every tensor.

    Args:
        model: Model to search; tensors that subgraphs capture count as read by the node that holds the subgraph.

    Returns:
        Indices of the consumers by tensor, in graph order, each once.
    """
    consumers: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(model.nodes):
        for name in dict.fromkeys((*node.inputs, *node.captures)):
            if name:
                consumers[name].append(i)
    return consumers


def _ancestors(model: Model, logits: Collection[str]) -> set[int]:
    """Indices of the nodes that the logits depend on."""
    producer: dict[str, int] = {}
    for i, node in enumerate(model.nodes):
        producer.update((name, i) for name in node.outputs if name)
    ancestors: set[int] = set()
    stack = list(logits)
    while stack:
        i = producer.get(stack.pop(), -1)
        if i >= 0 and i not in ancestors:
            ancestors.add(i)
            stack += [*model.nodes[i].inputs, *model.nodes[i].captures]
    return ancestors


def gate_sites(
    model: Model,
    coupling: Coupling,
    consumers: Mapping[str, Sequence[int]],
    needed: set[int],
    form: Form,
) -> list[GateSite]:
    """Find the axes that carry gates.

    Args:
        model: Model to score.
        coupling: Units of the model.
        consumers: Indices of the consumers by tensor.
        needed: Indices of the nodes that the logits depend on.
        form: Options of the program.

    Returns:
        Every gated axis with the needed nodes that read it gated: the consumers of the coupling in ``exact``, the
        consumers of the outputs of linear layers in ``paper``.
    """
    if form.kind == "exact":
        index = {node.name: i for i, node in enumerate(model.nodes)}
        sites = [GateSite((c.data, c.axis), [index[c.node]]) for c in coupling.consumers]
        return [site for site in sites if site.consumers[0] in needed]
    sites = []
    for name in _linear_outputs(model, needed):
        nodes = [j for j in consumers[name] if j in needed]
        for axis in range(len(model.shapes[name])):
            labels = coupling.axes.get((name, axis))
            if labels is not None and (labels >= 0).any():
                sites.append(GateSite((name, axis), list(nodes)))
    return sites


def _linear_outputs(model: Model, needed: set[int]) -> list[str]:
    """Outputs of linear layers. A bias that a separate Add of a constant adds belongs to its layer."""
    outputs = []
    chain = chains.of_nodes(model.nodes[i] for i in sorted(needed))
    for i in sorted(needed):
        node = model.nodes[i]
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.linear is None:
            continue
        name = node.outputs[0]
        addition = chain.sole_consumer(name)
        if addition is not None and _adds_constant(addition, model):
            name = addition.outputs[0]
        outputs.append(name)
    return outputs


def _adds_constant(node: Node, model: Model) -> bool:
    return has(node, Trait.BIAS) and any(name in model.constants for name in node.inputs)


def extent(
    model: Model,
    coupling: Coupling,
    images: Images,
    form: Form,
) -> int:
    """Estimate the size of the program by the ReLUs and maxima behind a gate.

    Args:
        model: Model to score.
        coupling: Units of the model.
        images: Samples that the program is made of.
        form: Options of the program.

    Returns:
        Elements of piecewise-linear outputs behind a gate, times the samples: an upper bound on their binaries.

    Raises:
        SettingsError: No unit can be encoded.
    """
    covered = region(model, coupling, images.tensors, form, without_rule(model))
    if not covered.included.any():
        raise SettingsError(nothing_encodable(covered))
    elements = 0
    for i in covered.inside:
        node = model.nodes[i]
        if has(node, Trait.PIECEWISE):
            elements += int(np.prod(model.shapes[node.outputs[0]]))
    return len(images.feeds) * elements


def nothing_encodable(covered: Region) -> str:
    """Build the error message for a region without any unit.

    Args:
        covered: Region whose units are all outside.

    Returns:
        One sentence with the first reasons and the alternatives.
    """
    reasons = list(dict.fromkeys(covered.outside.values()))
    listed = "; ".join(reasons[:MAX_LISTED_REASONS])
    return f"no unit can be scored by the joint program: {listed}; use `mode=decoupled`, or another `importance`."
