"""From the dependence between single channels to one importance a unit: backwards through the network, layer by layer.

SNACS (Ganesh, Blanchard, Corso, Sekeh, "Slimming Neural Networks using Adaptive Connectivity Scores", arXiv
2006.12463): a layer's parents inherit the importance of its children in the shares
``rho'(c, p) = rho(c, p) / sum_p rho(c, p)``, and the last layer's children count equally. The authors' code knows
chains of layers; here a child inherits from every consumer of its unit that lies behind it, so that residual sums and
concatenations count all who read them. The importance of a layer's children is scaled to a sum of one, which in a chain
it has anyway; without it, sums of paths would grow with every residual block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from onnx_oamip.core.records import (
    Consumer,
    Coupling,
    Floats,
    Model,
    Statistics,
)
from onnx_oamip.importance import activation
from onnx_oamip.published.dependence.pooled_activations import Pair

Scored = tuple[Pair, Floats]
"""A pair of layers with rho (children, parents), none of it negative."""


def propagate(
    model: Model, coupling: Coupling, statistics: Statistics, found: Iterable[Scored]
) -> Floats:
    """Importance of every unit (n_units,), the mean of each group 1.

    Consumers without a pair (two activations meet, a recurrent layer) pass on by the energy that they receive.
    """
    blocks: dict[Consumer, list[Scored]] = defaultdict(list)
    for pair, rho in found:
        blocks[pair.consumer].append((pair, rho))
    place = {node.name: i for i, node in enumerate(model.nodes)}
    before = _ancestors(model, coupling)
    passed: dict[Consumer, Floats] = {}
    total = np.zeros(coupling.n_units)
    for consumer in sorted(coupling.consumers, key=lambda c: place[c.node], reverse=True):
        if consumer in blocks:
            readers = [
                flow for other, flow in passed.items() if consumer.node in before[other.data]
            ]
            inherited = np.sum(readers, axis=0) if readers else np.zeros(coupling.n_units)
            flow = _through(blocks[consumer], inherited, coupling.n_units)
        else:
            flow = activation.shares(model, coupling, statistics, consumer)
        passed[consumer] = flow
        total += flow
    mean = (
        np.bincount(coupling.unit_group, total) / np.bincount(coupling.unit_group)
        if len(total)
        else total
    )
    return (
        np.asarray(total / np.where(mean > 0, mean, 1.0)[coupling.unit_group])
        if len(total)
        else total
    )


def _through(blocks: list[Scored], inherited: Floats, n_units: int) -> Floats:
    """What the parents of one consumer receive (n_units,) when units have ``inherited`` importance."""
    units = np.concatenate([pair.child_units for pair, _ in blocks])
    free = units >= 0
    children = np.zeros(len(units))
    children[free] = inherited[units[free]]
    # Children that nobody may remove, among others that count: as the average of those.
    children[~free] = children[free].mean() if free.any() else 1.0
    children = (
        children / children.sum() if children.sum() > 0 else np.full(len(units), 1 / len(units))
    )
    flow = np.zeros(n_units)
    start = 0
    for pair, rho in blocks:
        given = children[start : start + len(rho)] @ share(rho)
        start += len(rho)
        inside = pair.parent_units >= 0
        flow += np.bincount(pair.parent_units[inside], given[inside], minlength=n_units)
    return flow


def share(rho: Floats) -> Floats:
    """``rho'`` (children, parents): rows that sum to one, equal shares where nothing tells parents apart."""
    sums = rho.sum(axis=1, keepdims=True)
    return np.where(sums > 0, rho / np.where(sums > 0, sums, 1.0), 1.0 / rho.shape[1])


def _ancestors(model: Model, coupling: Coupling) -> Mapping[str, frozenset[str]]:
    """Per tensor the consumer nodes that it depends on."""
    names = {c.node for c in coupling.consumers}
    found: dict[str, frozenset[str]] = defaultdict(frozenset)
    for node in model.nodes:
        reached = frozenset[str]().union(
            *(found[n] for n in (*node.inputs, *node.captures) if n in found)
        )
        if node.name in names:
            reached |= {node.name}
        found.update((name, reached) for name in node.outputs if name)
    return found
