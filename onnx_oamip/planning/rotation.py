"""Rotation: linear streams are expressed in principal components before their units are chosen.

A unit of a rotated group is a component in place of a channel. Between linear nodes this changes nothing but the basis
(:mod:`onnx_oamip.graph.linear_streams`), and fewer components than channels hold the same share of what readers
compute. With S the covariance of the channels and ``M`` the sum of ``W^T W`` over the readers, each divided by the
variance of its outputs, the components are ``T = V^T M^1/2`` with the eigenvectors V of ``M^1/2 S M^1/2``: of all
choices of k components, the first k lose least of the readers' outputs. Queries and keys are balanced in the same way,
with the second moments of the keys as M: both then have the same diagonal moments.

Only groups that a plan narrows are rotated in the model that is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_oamip.artifacts import cache
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Axis, Coupling, Floats, Model, Plan
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.feeds import all_feeds
from onnx_oamip.graph import linear_streams
from onnx_oamip.graph.linear_layers import matrix
from onnx_oamip.graph.linear_streams import Basis, Side, Stream
from onnx_oamip.graph.runtime import Session
from onnx_oamip.statistics import stream_moments
from onnx_oamip.statistics.collector import parts
from onnx_oamip.statistics.context import Collected, Context, Rotation
from onnx_oamip.statistics.stream_moments import StreamMoments
from onnx_oamip.verification import equivalence

LOG = logging.getLogger("onnx_oamip")
DAMPING = 0.01
"""Added to the metric of a basis, as a share of its mean eigenvalue: it bounds the condition of the basis."""
MOST_CHANNELS = 2048
"""Channels of a block above which its components are not computed, which takes cubic time."""
CHECKED = 8
"""Samples on which the rotated model is compared with the original."""


def applies(settings: Settings) -> bool:
    """Check whether a run may rotate streams.

    Other importance methods are published for channels.

    Args:
        settings: Settings of the run.

    Returns:
        True for the default importance, allocation and refit.
    """
    return (
        settings.rotate == "auto"
        and settings.importance == "obs"
        and settings.allocate == "mip"
        and settings.refit == "least-squares"
        and settings.granularity == "unit"
    )


def rotate(context: Context) -> Context:
    """Express all linear streams in principal components.

    Args:
        context: The model and its samples.

    Returns:
        A context whose model computes the same; the one that was given, with a note, where no stream can be rotated.
    """
    model = context.model
    found, _ = linear_streams.find(model, context.coupling)
    if context.whole is not None:
        return _noted(context, len(found), "a branch of an If node stands in the analysed graph")
    streams = tuple(stream for stream in found if stream.width <= MOST_CHANNELS)
    context = _noted(
        context, len(found) - len(streams), f"they have more than {MOST_CHANNELS:,} channels"
    )
    if not streams:
        return context
    plain = linear_streams.without_norms(model, streams)
    moments = _moments(replace(context, model=plain), streams)
    bases = tuple((stream, _basis(plain, stream, moments)) for stream in streams)
    usable = tuple((stream, basis) for stream, basis in bases if _is_finite(basis))
    context = _noted(context, len(bases) - len(usable), "their components are not finite")
    if not usable:
        return context
    turned = linear_streams.rotated(context.model, usable)
    apart = distance(context, model, turned)
    if not apart <= equivalence.tolerance(model):
        reason = f"the model in principal components differs by {apart:.2e} of an output's scale"
        return _noted(context, len(usable), reason)
    return replace(
        context,
        model=turned,
        rotation=Rotation(context.model, usable, apart),
        cache_identity=_identity(context, turned),
        collected=Collected(),
    )


def without_rotation(context: Context, reason: str) -> Context:
    """Note that the streams of a model keep their channels.

    Args:
        context: The model.
        reason: Clause that states the reason.

    Returns:
        The context with the note, if the model has a stream.
    """
    streams, _ = linear_streams.find(context.model, context.coupling)
    return _noted(context, len(streams), reason)


def note_on_channels(model: Model, coupling: Coupling, reason: str) -> tuple[str, ...]:
    """Describe the streams of a model that is not rotated, which is also logged.

    Args:
        model: The model.
        coupling: Its units.
        reason: Clause that states the reason.

    Returns:
        One note for the user; none if the model has no stream.
    """
    streams, _ = linear_streams.find(model, coupling)
    return _logged(len(streams), reason)


def _logged(streams: int, reason: str) -> tuple[str, ...]:
    """A note on some streams that are not rotated, which is logged; none without streams."""
    if not streams:
        return ()
    groups = "1 group" if streams == 1 else f"{streams} groups"
    note = f"principal components are not used for {groups} between linear layers: {reason}"
    LOG.warning("%s", note)
    return (note,)


def _noted(context: Context, streams: int, reason: str) -> Context:
    """The context with a note on some streams that are not rotated; unchanged without streams."""
    note = _logged(streams, reason)

    def noted(model: Model) -> Model:
        return replace(model, notes=(*model.notes, *note))

    whole = context.whole
    return replace(
        context,
        model=noted(context.model),
        whole=None if whole is None else replace(whole, model=noted(whole.model)),
    )


def for_plan(context: Context, plan: Plan) -> Context:
    """Rotate only the groups that a plan names.

    Args:
        context: A context whose model may have more groups in principal components.
        plan: The plan.

    Returns:
        The context in which the plan is carried out and verified.

    Raises:
        DataError: The plan names a group that is no linear stream.
    """
    rotation = context.rotation
    bases = () if rotation is None else rotation.bases
    groups = context.coupling.groups
    chosen = tuple(pair for pair in bases if groups[pair[0].group].name in plan.rotated)
    strangers = set(plan.rotated) - {groups[stream.group].name for stream, _ in chosen}
    if strangers:
        raise DataError(
            f"the plan keeps principal components of the group '{min(strangers)}', which is no linear stream of "
            f"{context.model.path} on this data; make the plan again."
        )
    if rotation is None or len(chosen) == len(bases):
        return context
    if not chosen:
        model = rotation.original
    else:
        model = linear_streams.rotated(rotation.original, chosen)
    return replace(
        context,
        model=model,
        rotation=replace(rotation, bases=chosen),
        cache_identity=_identity(context, model),
        collected=Collected(),
    )


def _identity(context: Context, model: Model) -> Mapping[str, object]:
    """Identity of cached results that belong to a rotated model."""
    return {**context.cache_identity, "rotated": cache.content_digest(model.proto)}


def _moments(context: Context, streams: Sequence[Stream]) -> dict[Axis, StreamMoments]:
    """Moments of the channels that readers of streams take, and of both sides of pairs."""
    axes: list[Axis] = []
    for stream in streams:
        if stream.opposite is None:
            axes += _read_axes(context.model, stream.side)
        else:
            axes += [stream.side.last, stream.opposite.last]
    samples = parts(context.samples)[0]
    feeds = all_feeds(
        context.model, samples, context.batch, context.settings.activation_memory_limit
    )
    return stream_moments.collect(
        context.model, axes, feeds, context.device, seed=context.settings.seed
    )


def _read_axes(model: Model, side: Side) -> list[Axis]:
    """Axis that every reader of a side contracts, in their order."""
    return [(place.data, place.data_axis % len(model.shapes[place.data])) for place in side.readers]


def _basis(model: Model, stream: Stream, moments: Mapping[Axis, StreamMoments]) -> Basis:
    """Principal components of every block of a stream."""
    if stream.opposite is not None:
        inner = _diagonal_blocks(moments[stream.side.last].second, stream.blocks)
        outer = _diagonal_blocks(moments[stream.opposite.last].second, stream.blocks)
        return _components(inner, outer)
    inner = np.zeros((stream.blocks, stream.width, stream.width))
    outer = np.zeros_like(inner)
    for place, axis in zip(stream.side.readers, _read_axes(model, stream.side), strict=True):
        covariance = moments[axis].covariance
        weight = matrix(place, model.constants[place.weight])[0]
        by_input = weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])
        gram = by_input.T @ by_input
        variance = float(np.sum(gram * covariance))
        if variance > 0:
            outer += _diagonal_blocks(gram, stream.blocks) / variance
            inner += _diagonal_blocks(covariance, stream.blocks) / np.trace(covariance)
    return _components(inner, outer)


def _diagonal_blocks(whole: Floats, blocks: int) -> Floats:
    """Blocks (blocks, width, width) along the diagonal of a matrix."""
    width = len(whole) // blocks
    split = whole.reshape(blocks, width, blocks, width)
    return np.stack([split[block, :, block] for block in range(blocks)])


def _components(inner: Floats, outer: Floats) -> Basis:
    """Components of vectors with second moments ``inner`` in the metric ``outer``, the largest first (blocks, n, n)."""
    if not (np.isfinite(inner).all() and np.isfinite(outer).all()):
        return Basis(np.full_like(inner, np.nan), np.full_like(inner, np.nan))
    size = inner.shape[-1]
    scale = np.trace(outer, axis1=1, axis2=2)[:, None, None] / size
    metric = outer / np.where(scale > 0, scale, 1) + DAMPING * np.eye(size)
    values, vectors = np.linalg.eigh(metric)
    roots = np.sqrt(values)[:, None, :]
    root = (vectors * roots) @ vectors.transpose(0, 2, 1)
    inverse_root = (vectors / roots) @ vectors.transpose(0, 2, 1)
    _, components = np.linalg.eigh(root @ inner @ root)
    largest_first = components[:, :, ::-1]
    return Basis(largest_first.transpose(0, 2, 1) @ root, inverse_root @ largest_first)


def _is_finite(basis: Basis) -> bool:
    return bool(np.isfinite(basis.forward).all() and np.isfinite(basis.inverse).all())


def distance(context: Context, original: Model, turned: Model) -> float:
    """Measure the largest difference of an output of two models on a few samples.

    Args:
        context: Context with the samples.
        original: A model.
        turned: A model that should compute the same.

    Returns:
        The difference as a share of the scale of the output.
    """
    few = context.samples.take(np.arange(min(CHECKED, context.samples.count)))
    first, second = (
        Session(model.proto, "cpu", what=model.path, exact=True) for model in (original, turned)
    )
    found = equivalence.differences(first, second, few, context.comparison_batch)
    return float(found.max(initial=0.0))
