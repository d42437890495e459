"""Which part of a graph the importance program covers.

It reaches from the keep variables forward to the logits. Every node on the way must have an ``encode`` rule; units in
front of one that has none are left out, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import (
    Axis,
    Bools,
    Coupling,
    Images,
    Model,
    Node,
)
from onnx_oamip.graph import chains
from onnx_oamip.graph.ops import Trait, has, lookup


@dataclass(frozen=True)
class Form:
    """How to state the program.

    ``kind``: see ``milp.encoder``; ``relax``: no whole variables at all; ``whole_keep``: keep variables are binary;
    ``kernel_share``: a convolution's reward per filter is divided by its kernel's size, as published; ``budget``: the
    share of ``cost`` (per unit) that may be kept, in place of a reward.
    """

    kind: Literal["exact", "paper"] = "exact"
    weight: float = 5.0
    relax: bool = False
    budget: float | None = None

    @property
    def whole_keep(self) -> bool:
        """``exact`` decides whole units; ``paper`` gives continuous scores."""
        return self.kind == "exact" and not self.relax

    @property
    def kernel_share(self) -> bool:
        """The published quirk, kept where the published program is asked for."""
        return self.kind == "paper"


@dataclass(frozen=True)
class Region:
    """Part of the graph: ``nodes`` (indices, in order) to encode, ``inside`` those that depend on a keep variable.

    ``included`` (n_units,) says whose keep variables there are.
    """

    nodes: tuple[int, ...]
    inside: frozenset[int]
    included: Bools
    outside: Mapping[int, str]


def without_rule(model: Model) -> dict[int, str]:
    found = {}
    for i, node in enumerate(model.nodes):
        spec = lookup(node.domain, node.op, node.version)
        if spec is None or spec.encode is None or node.captures:
            found[i] = f"{node} has no form in the program"
    return found


def region(
    model: Model, coupling: Coupling, logits: str, form: Form, blocked: Mapping[int, str]
) -> Region:
    """What the program can cover. ``blocked``: reason by index of node that cannot be stated."""
    readers = readers_of(model)
    producer = {name: i for i, node in enumerate(model.nodes) for name in node.outputs if name}
    needed = _ancestors(model, producer, logits)
    behind: dict[int, str] = {}  # node -> why nothing before it can be in the program
    for i in sorted(needed, reverse=True):
        later = [behind[j] for name in model.nodes[i].outputs for j in readers[name] if j in behind]
        if i in blocked:
            behind[i] = blocked[i]
        elif later:
            behind[i] = later[0]
    sites = gate_sites(model, coupling, readers, needed, form)
    met = np.zeros(coupling.n_units, bool)
    outside: dict[int, str] = {}
    for axis, nodes in sites:
        labels = coupling.axes[axis]
        units = np.unique(labels[labels >= 0])
        met[units] = True
        reason = next((behind[j] for j in nodes if j in behind), None)
        if reason is not None:
            outside.update((int(u), reason) for u in units if int(u) not in outside)
    outside.update((int(u), "no logit depends on it") for u in np.flatnonzero(~met))
    included = np.ones(coupling.n_units, bool)
    included[list(outside)] = False
    inside: set[int] = set()
    touched: set[str] = set()
    for axis, nodes in sites:
        labels = coupling.axes[axis]
        if included[labels[labels >= 0]].any():
            inside.update(nodes)
    for i in sorted(needed):
        if i in inside or touched.intersection(model.nodes[i].inputs):
            inside.add(i)
            touched.update(n for n in model.nodes[i].outputs if n)
    # The bounds of `paper` come from the input; `exact` starts from known activations.
    nodes = sorted(needed) if form.kind == "paper" else sorted(inside)
    return Region(tuple(nodes), frozenset(inside), included, outside)


def readers_of(model: Model) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for i, node in enumerate(model.nodes):
        for name in dict.fromkeys((*node.inputs, *node.captures)):
            if name:
                found[name].append(i)
    return found


def _ancestors(model: Model, producer: Mapping[str, int], logits: str) -> set[int]:
    found: set[int] = set()
    stack = [logits]
    while stack:
        i = producer.get(stack.pop())
        if i is not None and i not in found:
            found.add(i)
            stack += [*model.nodes[i].inputs, *model.nodes[i].captures]
    return found


def gate_sites(
    model: Model,
    coupling: Coupling,
    readers: Mapping[str, Sequence[int]],
    needed: set[int],
    form: Form,
) -> list[tuple[Axis, list[int]]]:
    """(gated axis, nodes that read it gated): consumers in ``exact``, the readers of scored layers in ``paper``."""
    if form.kind == "exact":
        place = {node.name: i for i, node in enumerate(model.nodes)}
        return [
            ((c.data, c.axis), [i]) for c in coupling.consumers if (i := place[c.node]) in needed
        ]
    return [
        ((name, axis), [j for j in readers[name] if j in needed])
        for name in _scored(model, needed)
        for axis in range(len(model.shapes[name]))
        if (coupling.axes.get((name, axis), np.full(1, -1)) >= 0).any()
    ]


def _scored(model: Model, needed: set[int]) -> list[str]:
    """Outputs of linear layers; a bias that is a separate Add of a constant belongs to its layer."""
    found = []
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
        found.append(name)
    return found


def _adds_constant(node: Node, model: Model) -> bool:
    return has(node, Trait.BIAS) and any(name in model.constants for name in node.inputs)


def extent(model: Model, coupling: Coupling, images: Images, form: Form) -> int:
    """How many ReLUs and maxima, images times elements, lie behind a gate: what may become a binary.

    Raises SettingsError where no unit can be encoded.
    """
    found = region(model, coupling, images.logits, form, without_rule(model))
    if not found.included.any():
        raise SettingsError(nothing_encodable(found))
    nodes = [model.nodes[i] for i in found.inside]
    bent = [n for n in nodes if has(n, Trait.PIECEWISE)]
    return len(images.feeds) * sum(int(np.prod(model.shapes[n.outputs[0]])) for n in bent)


def nothing_encodable(found: Region) -> str:
    reasons = list(dict.fromkeys(found.outside.values()))
    listed = "; ".join(reasons[:3])
    return f"no unit can be scored by the joint program: {listed}; use `mode=decoupled`, or another `importance`."
