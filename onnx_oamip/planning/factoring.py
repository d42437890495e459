"""Low-rank layers: some layers are written as two, so that the budget program also chooses their rank.

A dense layer or 1x1 convolution of rank r costs ``r (inputs + outputs)`` in place of ``inputs * outputs``. Where a rank
that saves a good part of that holds nearly all of the variance of the outputs, the layer is written as two at its full
rank, which changes nothing (:mod:`onnx_oamip.graph.low_rank`). The channels in between are a linear stream, whose
principal components (:mod:`onnx_oamip.planning.rotation`) are those of the outputs: a singular value decomposition of
the weight whitened by the covariance of the inputs. Their number is a width like any other, below the rank at which two
layers cost as much as one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from onnx_oamip.artifacts import cache
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Axis, Floats, Model, Plan
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.feeds import all_feeds
from onnx_oamip.graph import cost, low_rank
from onnx_oamip.graph.coupling import weight_names
from onnx_oamip.graph.linear_layers import matrix_shape
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.planning import idle_branches, rotation, width_losses
from onnx_oamip.statistics import stream_moments
from onnx_oamip.statistics.collector import parts
from onnx_oamip.statistics.context import Collected, Context, Factoring
from onnx_oamip.verification import equivalence

LOG = logging.getLogger("onnx_oamip")
LEAST_SHARE = 0.01
"""Share of the MACs of the model from which on a layer is considered."""
LOST = 0.01
"""Share of the variance of the outputs that the rank may lose at which a layer is judged."""
SAVED = 0.5
"""Share of its MACs that a layer saves at that rank, at least."""


def applies(settings: Settings) -> bool:
    """Check whether a run may factor layers.

    Args:
        settings: Settings of the run.

    Returns:
        True where principal components may be used and a budget other than latency is programmed: of two small layers
        more than the arithmetic counts. Not with branches that may be emptied, whose ranks would be left without a
        layer.
    """
    return (
        settings.factor == "auto"
        and settings.latency is None
        and settings.max_loss is None
        and settings.empty != "always"
        and rotation.applies(settings)
        and width_losses.programmed(settings)
    )


def check(settings: Settings, scored: bool) -> None:
    """Refuse ``factor=auto`` with settings under which no ranks are chosen.

    Args:
        settings: Settings of the run.
        scored: True if scores are read from a file.

    Raises:
        SettingsError: Ranks are asked for and cannot be chosen.
    """
    if settings.factor == "auto" and (scored or not applies(settings)):
        raise SettingsError(
            "`factor=auto` chooses ranks among principal components: it needs the default `importance`, `allocate`, "
            "`refit` and `rotate` in one round, without a keep-map or a file of scores, a budget of MACs, "
            "parameters or size, and not `empty=always`; change these, or leave `factor` out."
        )


def in_components(context: Context) -> Context:
    """Factor layers, and express all linear streams in principal components.

    Args:
        context: The model and its samples.

    Returns:
        A context whose model computes the same.
    """
    if not applies(context.settings):
        return rotation.rotate(context)
    factored = _of_layers(context, _paying(context))
    if factored.factoring is None:
        return rotation.rotate(_noted(context))
    turned = rotation.rotate(factored)
    if set(factored.factoring.groups) <= _rotated(turned):
        return turned
    return rotation.rotate(_noted(context))  # ranks in an arbitrary order are worth nothing


def _noted(context: Context) -> Context:
    """The context with a note that no layer is factored, which is logged."""
    note = (
        f"no layer is written as two: no rank that saves {SAVED:.0%} of a layer's MACs holds {1 - LOST:.0%} of the "
        "variance of its outputs"
    )
    LOG.warning("%s", note)
    return replace(context, model=replace(context.model, notes=(*context.model.notes, note)))


def of_weights(context: Context, weights: Collection[str], plan: str) -> Context:
    """Factor the layers that a plan names.

    Args:
        context: The model and its samples.
        weights: Weights of the layers.
        plan: Name of the plan, for messages.

    Returns:
        A context whose model computes the same.

    Raises:
        DataError: A layer cannot be factored.
    """
    by_weight = {place.weight: place for place in low_rank.candidates(context.model)}
    if missing := sorted(set(weights) - by_weight.keys()):
        raise DataError(
            f"{plan} factors the layer of '{missing[0]}', which is no dense layer or 1x1 convolution with a weight of "
            f"its own in {context.model.path}; make the plan again."
        )
    return _of_layers(context, [place for w, place in by_weight.items() if w in weights])


def marked(context: Context, plan: Plan) -> Plan:
    """Name the groups of a plan whose units are no channels: principal components, and ranks of factored layers.

    Args:
        context: Context that the plan was made in.
        plan: The plan.

    Returns:
        The plan with the names of the groups in principal components that it narrows, and of all ranks.
    """
    ranks = () if context.factoring is None else context.factoring.groups
    streams = () if context.rotation is None else context.rotation.bases
    narrowed = tuple(
        context.coupling.groups[stream.group].name
        for stream, _ in streams
        if 0 < plan.widths[stream.group] < stream.width
    )
    notes = list(plan.notes)
    components = len(set(narrowed) - set(ranks))
    if components:
        assert context.rotation is not None
        notes.append(
            f"{components} groups between linear layers keep principal components in place of channels; before "
            f"pruning, that changes outputs by {context.rotation.distance:.1e} of their scale"
        )
    if ranks:
        layers = "1 layer is" if len(ranks) == 1 else f"{len(ranks)} layers are"
        notes.append(f"{layers} written as two of lower rank")
    return replace(plan, rotated=narrowed, factored=ranks, notes=tuple(notes))


def _rotated(context: Context) -> set[str]:
    """Names of the groups in principal components."""
    bases = () if context.rotation is None else context.rotation.bases
    return {context.coupling.groups[stream.group].name for stream, _ in bases}


def _paying(context: Context) -> list[Site]:
    """Layers of which a low rank holds nearly all of the variance of the outputs."""
    if context.whole is not None:
        return []
    model = context.model
    places = [place for place in low_rank.candidates(model) if _is_large(context, place)]
    if not places:
        return []
    axes = [_output_axis(model, place) for place in places]
    feeds = all_feeds(
        model, parts(context.samples)[0], context.batch, context.settings.activation_memory_limit
    )
    moments = stream_moments.collect(model, axes, feeds, context.device, seed=context.settings.seed)
    return [
        place
        for place, axis in zip(places, axes, strict=True)
        if _pays(model, place, moments[axis].covariance)
    ]


def _is_large(context: Context, place: Site) -> bool:
    """Tests for a layer with a share of the MACs, of no more outputs than components are computed for."""
    if _is_excluded(place, context):
        return False
    ledger = context.ledger
    terms = ledger.terms(ledger.macs, ledger.lengths(cost.full_widths(context.coupling)))
    own = terms[ledger.nodes.index(place.node.name)]
    _, outputs, _, _ = matrix_shape(place, context.model.constants[place.weight])
    return bool(own >= LEAST_SHARE * terms.sum()) and outputs <= rotation.MOST_CHANNELS


def _is_excluded(place: Site, context: Context) -> bool:
    names = (place.node.name, *weight_names(context.model, place.weight))
    patterns = context.settings.exclude
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _output_axis(model: Model, place: Site) -> Axis:
    output = place.node.outputs[0]
    return output, place.output_axis % len(model.shapes[output])


def _pays(model: Model, place: Site, covariance: Floats) -> bool:
    """Tests for a rank that saves MACs and loses little of the variance of the outputs."""
    if not np.isfinite(covariance).all() or np.trace(covariance) <= 0:
        return False
    _, outputs, inputs, _ = matrix_shape(place, model.constants[place.weight])
    variances = np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0.0)
    lost = 1 - np.cumsum(variances) / variances.sum()
    rank = 1 + int(np.argmax(lost <= LOST))
    return rank * (inputs + outputs) <= (1 - SAVED) * inputs * outputs


def _of_layers(context: Context, places: Sequence[Site]) -> Context:
    """The context with some layers written as two; the given one where none can be."""
    if not places:
        return context
    model = low_rank.factored(context.model, places, context.settings.seed)
    coupling = idle_branches.removable(model, context.settings.exclude, context.objective)
    groups = low_rank.groups(coupling, places)
    free = [place for place in places if place.node.name in groups]
    if len(free) < len(places):
        return _of_layers(context, free)
    distance = rotation.distance(context, context.model, model)
    if not distance <= equivalence.tolerance(model):
        return context
    most = cost.full_widths(coupling)
    for place in places:
        _, outputs, inputs, _ = matrix_shape(place, context.model.constants[place.weight])
        most[groups[place.node.name]] = max(1, (inputs * outputs - 1) // (inputs + outputs))
    return replace(
        context,
        model=model,
        coupling=coupling,
        factoring=Factoring(
            original=context.model,
            before=context.before,
            groups=tuple(coupling.groups[index].name for index in groups.values()),
            most=most,
        ),
        cache_identity={**context.cache_identity, "factored": cache.content_digest(model.proto)},
        collected=Collected(),
    )
