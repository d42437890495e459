"""Response of the objective to errors of every linear node, by small random changes of its weights.

A unit that several consumers read is worth the loss that its removal brings through all of them. An error of the same
size costs much behind one consumer and nothing behind another: the boxes of a detector barely move where its classes
change. So the squared error of every output channel is weighted by the loss of the model per squared error there,
measured with that one node changed. One term of columns of similar size needs no such weights: all paths then end in
the same loss, and the relative error of a consumer is a fair guess of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Array, Coupling, Floats, Model, Objective
from onnx_oamip.core.records.objective import Term
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.linear_layers import matrix_shape, site, unmatrix
from onnx_oamip.graph.ops import Trait, has
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective import compare
from onnx_oamip.objective.moments import variance_range
from onnx_oamip.statistics.layer_problems import TINY, Problem

SAMPLES = 64
"""Samples that losses are measured on."""
CHANGE = 0.25
"""Standard deviation of a weight's relative change: squared errors of about a sixteenth of the output's energy."""
SINGLE = 16
"""Output channels up to which each is changed alone."""
UNEVEN = 16.0
"""Variance of a column over that of another one from which errors of columns are weighed."""
LEAST = 1e-6
"""Smallest weight over the largest: what no term depends on still has an order."""


def collect(
    model: Model,
    coupling: Coupling,
    objective: Objective,
    samples: Samples,
    device: str,
    *,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, Floats]:
    """Measure the loss per squared error of every consumer's output channels.

    Args:
        model: The original.
        coupling: Its units.
        objective: The terms, with their scales.
        samples: Samples; up to ``SAMPLES`` are used.
        device: Where the model runs.
        seed: Seed of the changes.
        batch_size: Samples of one run.
        progress: Callback ``(stage, done, total)``.

    Returns:
        Weights (output channels,) by linear node; none for an objective of one term with columns of similar size.
    """
    if not applies(objective):
        return {}
    places = _places(model, coupling)
    if not places:
        return {}
    few = samples.take(np.arange(min(samples.count, max(SAMPLES, samples.fixed_batch or 1))))
    feeds = [feed for _, feed in few.batches(batch_size)]
    probe = _Probe(model, objective, places, feeds, device)
    result = {}
    for i, place in enumerate(places):
        values = probe.weights(place, np.random.default_rng((seed, i)))
        variance = _variance_of_columns(place, model, objective)
        if variance is not None and len(variance) == len(values) > SINGLE:
            values = values * variance.mean() / variance
        result[place.node.name] = values
        if progress:
            progress("relevance", i + 1, len(places))
    top = max(float(values.max()) for values in result.values())
    return {name: np.maximum(values, LEAST * top or 1.0) for name, values in result.items()}


def applies(objective: Objective) -> bool:
    """Check whether errors of outputs of the same size may bring different losses.

    Args:
        objective: The terms, with their scales.

    Returns:
        True for several terms, and for one with columns of different size.
    """
    return len(objective.judged) > 1 or any(map(_is_uneven, objective.judged))


def _is_uneven(term: Term) -> bool:
    """Test for columns of sizes so different that the largest would drown the others in a sum of squared errors."""
    if term.kind not in ("values", "ambiguous") or term.scale is None:
        return False
    low, high = variance_range(term.scale.variance)
    return high > UNEVEN * low


def _variance_of_columns(place: Site, model: Model, objective: Objective) -> Floats | None:
    """Variances of the columns of an uneven term that a node makes, at most with a bias; None for other nodes."""
    uneven = {term.tensor: term for term in objective.judged if _is_uneven(term)}
    tensor = place.node.outputs[0]
    while tensor not in uneven:
        readers = [node for node in model.nodes if tensor in node.inputs]
        if len(readers) != 1 or not has(readers[0], Trait.BIAS | Trait.IDENTITY | Trait.CASTS):
            return None
        others = [name for name in readers[0].inputs if name != tensor]
        if not all(name in model.constants for name in others):
            return None
        tensor = readers[0].outputs[0]
    scale = uneven[tensor].scale
    return None if scale is None else scale.variance


def passes(model: Model, coupling: Coupling) -> int:
    """Count the runs of the model that one sample takes.

    Args:
        model: The original.
        coupling: Its units.

    Returns:
        The number for all linear consumers: one of the original, and one for every part that is changed.
    """
    channels = (_channels(place, model) for place in _places(model, coupling))
    return sum(1 + (count if count <= SINGLE else 1) for count in channels)


def weighted(found: Sequence[Problem], relevance: Mapping[str, Floats]) -> list[Problem]:
    """Weigh the outputs of a group's consumers by the loss that errors there bring.

    Args:
        found: The problems of all consumers of one group.
        relevance: Weights (output channels,) by linear node, empty where all weigh alike.

    Returns:
        Problems whose rows are scaled by the roots of the weights, and whose shares compare the consumers.
    """
    if not relevance:
        return list(found)
    result = []
    for problem in found:
        outs = len(problem.weight) // problem.spread.shape[1]
        of_uses = np.mean([relevance[name] for name in problem.uses], axis=0)
        values = of_uses.reshape(-1, outs)[problem.block]
        roots = np.sqrt(np.repeat(values, problem.spread.shape[1]))
        weight = roots[:, None] * problem.weight
        scale = max(problem.variance(weight), TINY)
        result.append(replace(problem, weight=weight, scale=scale, share=scale * len(problem.uses)))
    mean = sum(problem.share for problem in result) / max(len(result), 1)
    return [replace(problem, share=problem.share / mean) for problem in result]


def fits(found: Mapping[str, Floats], model: Model, coupling: Coupling) -> bool:
    """Validate a cache entry: the weights of a model's consumers.

    Args:
        found: Weights by linear node, as read.
        model: The original.
        coupling: Its units.

    Returns:
        True if there are no weights at all, or for every consumer a positive finite float64 array of its length.
    """
    lengths = {p.node.name: _channels(p, model) for p in _places(model, coupling)}
    return not found or (
        list(found) == list(lengths)
        and all(
            values.dtype == np.float64
            and values.shape == (lengths[name],)
            and np.isfinite(values).all()
            and (values > 0).all()
            for name, values in found.items()
        )
    )


def _places(model: Model, coupling: Coupling) -> list[Site]:
    """Linear consumers in graph order."""
    names = {c.node for c in coupling.consumers}
    nodes = [node for node in model.nodes if node.name in names]
    return [place for n in nodes if (place := site(n, model.constants)) is not None]


def _channels(place: Site, model: Model) -> int:
    groups, outs, _, _ = matrix_shape(place, model.constants[place.weight])
    return groups * outs


class _Probe:
    """The model with the weights of consumers as inputs."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        places: Sequence[Site],
        feeds: Sequence[Mapping[str, Array]],
        device: str,
    ) -> None:
        self.model, self.objective, self.feeds = model, objective, feeds
        names = list(dict.fromkeys([*objective.tensors, *(p.node.outputs[0] for p in places)]))
        proto = with_outputs(model, names)
        self.given = {f"oamip_weight_{p.node.name}": model.constants[p.weight] for p in places}
        _open(proto, places, model)
        self.session = Session(proto, device, what="the model with its weights as inputs")
        self.truth = [self._run(feed, objective.tensors, {}) for feed in feeds]

    def weights(self, place: Site, rng: np.random.Generator) -> Floats:
        """Loss per squared error of the output channels of one node."""
        channels = _channels(place, self.model)
        alone = channels <= SINGLE
        if alone:
            parts = np.arange(channels)[:, None]
        else:
            parts = np.arange(channels)[None]
        weight = self.model.constants[place.weight]
        noise = CHANGE * rng.standard_normal(weight.shape)
        result = np.zeros(channels)
        before = [self._run(feed, [place.node.outputs[0]], {})[0] for feed in self.feeds]
        for part in parts:
            chosen = np.zeros(channels)
            chosen[part] = 1.0
            mask = _by_channel(place, weight, chosen)
            changed = (weight * (1 + noise * mask)).astype(weight.dtype)
            result[part] = self._loss_per_error(place, changed, before)
        return result

    def _loss_per_error(
        self,
        place: Site,
        changed: Array,
        before: Sequence[Array],
    ) -> float:
        out = place.node.outputs[0]
        loss = error = 0.0
        for feed, truth, old in zip(self.feeds, self.truth, before, strict=True):
            names = [*self.objective.tensors, out]
            *found, new = self._run(feed, names, {f"oamip_weight_{place.node.name}": changed})
            loss += compare(self.objective, truth, found).total * len(old)
            shift = new.astype(np.float64) - old
            error += float(np.square(shift).sum()) / shift.shape[place.output_axis]
        positions = sum(old.size // old.shape[place.output_axis] for old in before)
        samples = sum(len(old) for old in before)
        if not (np.isfinite(error) and error > 0):
            return 0.0
        return float((loss / samples) / (error / positions))

    def _run(
        self,
        feed: Mapping[str, Array],
        names: Sequence[str],
        changed: Mapping[str, Array],
    ) -> list[Array]:
        return self.session.run({**feed, **self.given, **changed}, names)


def _by_channel(place: Site, weight: Array, values: Floats) -> Array:
    """Values of output channels (channels,) in a shape that broadcasts against the weight."""
    groups, outs, ins, taps = matrix_shape(place, weight)
    full = np.broadcast_to(values.reshape(groups, outs, 1, 1), (groups, outs, ins, taps))
    return unmatrix(place, np.ascontiguousarray(full), weight)


def _open(proto: onnx.ModelProto, places: Sequence[Site], model: Model) -> None:
    """Turn the weights of some nodes into inputs, one for each node."""
    by_name = {place.node.name: place for place in places}
    for node in proto.graph.node:
        place = by_name.get(node.name)
        if place is not None:
            node.input[place.weight_slot] = f"oamip_weight_{node.name}"
            kind = helper.np_dtype_to_tensor_dtype(model.constants[place.weight].dtype)
            proto.graph.input.append(
                helper.make_tensor_value_info(node.input[place.weight_slot], kind, None)
            )
