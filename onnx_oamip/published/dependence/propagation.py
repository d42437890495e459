"""Propagation of dependence between single channels to one importance per unit, backwards, layer by layer.

SNACS (Ganesh, Blanchard, Corso, Sekeh, "Slimming Neural Networks using Adaptive Connectivity Scores", arXiv
2006.12463): a layer's parents inherit the importance of its children in the shares
``rho'(c, p) = rho(c, p) / sum_p rho(c, p)``, and the last layer's children count equally. The authors' code covers
chains of layers; here a child inherits from every consumer of its unit that lies behind it, so that residual sums and
concatenations count all their readers. The importance of a layer's children is scaled to a sum of one, which in a chain
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
from onnx_oamip.published.dependence.layer_pairs import Pair

Scored = tuple[Pair, Floats]
"""A pair of layers with rho (children, parents), none of it negative."""


def propagate(
    model: Model,
    coupling: Coupling,
    statistics: Statistics,
    scored: Iterable[Scored],
) -> Floats:
    """Compute the importance of every unit from the dependence between channels.

    Consumers without a pair (two activations meet, a recurrent layer) pass importance on by the energy that they
    receive.

    Args:
        model: The model.
        coupling: Its units and consumers.
        statistics: Moments, for consumers without a pair.
        scored: Pairs of layers with the dependence of their channels.

    Returns:
        Importance (n_units,); the mean of each group is 1.
    """
    blocks: dict[Consumer, list[Scored]] = defaultdict(list)
    for pair, rho in scored:
        blocks[pair.consumer].append((pair, rho))
    position = {node.name: i for i, node in enumerate(model.nodes)}
    backwards = sorted(coupling.consumers, key=lambda c: position[c.node], reverse=True)
    ancestors = _ancestors(model, coupling)
    passed: dict[Consumer, Floats] = {}
    total = np.zeros(coupling.n_units)
    for consumer in backwards:
        if consumer in blocks:
            behind = [
                flow for later, flow in passed.items() if consumer.node in ancestors[later.data]
            ]
            if behind:
                inherited = np.sum(behind, axis=0)
            else:
                inherited = np.zeros(coupling.n_units)
            flow = _through(blocks[consumer], inherited, coupling.n_units)
        else:
            flow = activation.shares(model, coupling, statistics, consumer)
        passed[consumer] = flow
        total += flow
    return _relative_to_group(total, coupling)


def share(rho: Floats) -> Floats:
    """Compute the shares of parents in the dependence of each child.

    Args:
        rho: Dependence (children, parents), none of it negative.

    Returns:
        Rows that sum to one; equal shares for a child that depends on no parent.
    """
    sums = rho.sum(axis=1, keepdims=True)
    equal = 1.0 / rho.shape[1]
    return np.where(sums > 0, rho / np.where(sums > 0, sums, 1.0), equal)


def _relative_to_group(total: Floats, coupling: Coupling) -> Floats:
    """``total`` (n_units,) divided by the mean of each group."""
    if not len(total):
        return total
    sums = np.bincount(coupling.unit_group, total)
    means = sums / np.bincount(coupling.unit_group)
    divisors = np.where(means > 0, means, 1.0)
    return np.asarray(total / divisors[coupling.unit_group])


def _through(blocks: list[Scored], inherited: Floats, n_units: int) -> Floats:
    """Importance (n_units,) that the parents of one consumer receive from children with ``inherited`` importance."""
    units = np.concatenate([pair.child_units for pair, _ in blocks])
    free = units >= 0
    children = np.zeros(len(units))
    children[free] = inherited[units[free]]
    # Pinned children count as the average of the others.
    children[~free] = children[free].mean() if free.any() else 1.0
    whole = children.sum()
    equal = np.full(len(units), 1 / len(units))
    children = children / whole if whole > 0 else equal

    flow = np.zeros(n_units)
    start = 0
    for pair, rho in blocks:
        received = children[start : start + len(rho)] @ share(rho)
        start += len(rho)
        of_units = pair.parent_units >= 0
        flow += np.bincount(pair.parent_units[of_units], received[of_units], minlength=n_units)
    return flow


def _ancestors(model: Model, coupling: Coupling) -> Mapping[str, frozenset[str]]:
    """By tensor, the consumer nodes that it depends on."""
    consumer_nodes = {consumer.node for consumer in coupling.consumers}
    result: dict[str, frozenset[str]] = defaultdict(frozenset)
    for node in model.nodes:
        reached: frozenset[str] = frozenset()
        for name in (*node.inputs, *node.captures):
            reached |= result.get(name, frozenset())
        if node.name in consumer_nodes:
            reached |= {node.name}
        for name in node.outputs:
            if name:
                result[name] = reached
    return result
