"""Branches of If nodes that no calibration sample runs: what only they read is kept, as nothing is known about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from onnx_oamip.core.records import Array, Body, Coupling, Model, Node, Objective
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import cost, external_data, subgraphs, taken_branches
from onnx_oamip.graph.coupling import couple, exclude, without
from onnx_oamip.graph.loading import remade
from onnx_oamip.graph.ops import Trait, consumers_by_tensor, has
from onnx_oamip.graph.partial_execution import element_types, stream


def marked(model: Model, samples: Samples) -> Model:
    """Finds the branches that no calibration sample runs.

    Args:
        model: A loaded model.
        samples: The samples.

    Returns:
        The model with its idle nodes and a note about them, or the same model if all branches run.
    """
    idle = _idle_nodes(model, samples)
    if not idle:
        return model
    names = ", ".join(sorted(set(idle.values())))
    note = (
        f"no calibration sample runs a branch of {names}: its MACs are not counted, and weights that only it reads are "
        "kept; give samples for both branches to prune both"
    )
    return replace(model, idle=idle, notes=(*model.notes, note))


def with_taken_branches(
    model: Model, samples: Samples, held_out: Samples | None
) -> tuple[Model, frozenset[str]]:
    """Puts branches that all samples take in place of their If nodes, so that they are analysed like the main graph.

    Args:
        model: A model; :func:`marked` finds its idle branches.
        samples: Calibration samples.
        held_out: Held-out samples, which must take the same branches.

    Returns:
        The model, and the names of the nodes in it that give outputs of branches their names outside.
    """
    if not model.idle:
        return model, frozenset()
    returns: set[str] = set()
    found = model
    while taken := _taken(found, [samples, *([held_out] if held_out is not None else [])]):
        proto, added = taken_branches.inline(found.proto, taken)
        found = remade(found, proto)
        returns.update(added)
    if found is model:
        return model, frozenset()
    whole, part = cost.count(model), cost.count(found)
    aside = external_data.size(model.proto) - external_data.size(found.proto)
    left_out = replace(found, aside_params=whole.params - part.params, aside_bytes=aside)
    return left_out, frozenset(returns)


def _taken(model: Model, parts: Sequence[Samples]) -> dict[str, bool]:
    """Condition of the If nodes of the main graph that have the same one for all samples, by name of the node."""
    choices = [node for node in model.nodes if has(node, Trait.BRANCHES)]
    conditions = [node.inputs[0] for node in choices]
    met: dict[str, set[bool]] = {name: set() for name in conditions}
    for samples in parts if choices else ():
        for name, outcomes in _conditions(model, samples, conditions).items():
            met[name] |= outcomes
    found = {node.name: met[node.inputs[0]] for node in choices}
    return {name: min(outcomes) for name, outcomes in found.items() if len(outcomes) == 1}


def removable(model: Model, excluded: tuple[str, ...], objective: Objective) -> Coupling:
    """Couples a model and leaves out groups that must be kept whole.

    Args:
        model: A model; :func:`marked` finds its idle branches.
        excluded: Patterns of names that the user excludes.
        objective: Terms by which a pruned model is judged.

    Returns:
        The coupling.

    Raises:
        SettingsError: A pattern matches no weight and no node.
    """
    coupling = without_compared(model, exclude(model, couple(model), excluded), objective)
    if not model.idle:
        return coupling
    readers = consumers_by_tensor(model)

    def branch_of(constant: str) -> str:
        """Node of the only branches that read a constant, if they are idle; else empty."""
        nodes = {node for reader in readers[constant] for node in ends(reader)}
        return nodes.pop() if len(nodes) == 1 else ""

    def ends(reader: Node) -> Iterator[str]:
        if reader.outputs and reader.outputs[0] in model.computed:
            for behind in readers[reader.outputs[0]]:
                yield from ends(behind)
        else:
            yield model.idle.get(reader.name, "")

    reasons = []
    for group in coupling.groups:
        weights = {tensor for tensor, _ in group.multiplicity if tensor in model.constants}
        branches = {branch_of(weight) for weight in weights}
        name = branches.pop() if len(branches) == 1 else ""
        reasons.append(
            f"only a branch of {name} reads it, which no calibration sample runs" if name else ""
        )
    return without(model, coupling, reasons)


def without_compared(model: Model, coupling: Coupling, objective: Objective) -> Coupling:
    """Leaves out groups with channels that a term of the objective compares inside the graph.

    An output may be a sum or a maximum of decisions, so that a decision could be removed like any unit. But each is
    compared with that of the original.

    Args:
        model: The coupled model.
        coupling: Its coupling.
        objective: Terms by which a pruned model is judged.

    Returns:
        The coupling without these groups.
    """
    output_of = {term.tensor: term.output for term in objective.judged}
    reasons = []
    for group in coupling.groups:
        compared = (output_of[tensor] for tensor, _ in group.multiplicity if tensor in output_of)
        output = next(compared, None)
        reasons.append("" if output is None else f"output '{output}' is judged by these channels")
    return without(model, coupling, reasons)


def _idle_nodes(model: Model, samples: Samples) -> dict[str, str]:
    """Nodes in branches that no sample runs, with the name of the node that has the branch."""
    result: dict[str, str] = {}
    choices = [node for node in model.nodes if has(node, Trait.BRANCHES)]
    taken = _conditions(model, samples, [node.inputs[0] for node in choices])
    for node in choices:
        met = taken[node.inputs[0]]
        for outcome, key in subgraphs.BRANCHES.items():
            if outcome not in met:
                result.update((inner.name, str(node)) for inner in _nodes(node.bodies[key]))
    return result


def _nodes(body: Body) -> Iterator[Node]:
    for node in body.nodes:
        yield node
        for inner in node.bodies.values():
            yield from _nodes(inner)


def _conditions(model: Model, samples: Samples, conditions: list[str]) -> Mapping[str, set[bool]]:
    """Values that conditions have over the samples; one that is a constant or a default has its stored value."""
    found: dict[str, set[bool]] = {name: set() for name in conditions}
    for name in found:
        if name in model.constants:
            found[name].add(_truth(model.constants[name]))
    targets = [name for name in found if name not in model.constants]
    if not targets:
        return found
    types = element_types(model.proto, model.dtypes)

    def feeds() -> Iterator[Mapping[str, Array]]:
        for _, feed in samples.batches(model.batch):
            yield feed

    for _, place, value in stream(model.proto, feeds(), targets, types, "cpu"):
        found[targets[place]].add(_truth(value))
    return found


def _truth(condition: Array) -> bool:
    """Value of a condition, which has one element."""
    return bool(condition.reshape(-1)[0])
