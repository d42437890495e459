"""Requests for the built-in statistics. Collectors are imported when they run, so that naming a request is cheap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onnx_oamip.core.records import (
    Axis,
    Floats,
    Gram,
    Images,
    Moments,
    Request,
)

if TYPE_CHECKING:
    from onnx_oamip.statistics.context import Context

GRAM_SAMPLES = 512
"""Most calibration samples that covariances are collected from."""
COVARIANCE_BYTES = 1 << 31
"""Bytes of all covariances, where no option bounds memory, above which each consumer gets an equal share of them."""
COVARIANCE_POWER = 0.75
"""Exponent of the weights of rare decisions: full weights leave a covariance to too few different rows."""


def _moments(context: Context) -> Mapping[Axis, Moments]:
    from onnx_oamip.artifacts import cache_entries
    from onnx_oamip.statistics import calibration

    model = context.model
    coupling = context.coupling

    def collect() -> Mapping[Axis, Moments]:
        statistics = calibration.collect(
            model,
            coupling,
            context.samples,
            context.device,
            batch_size=context.batch,
            progress=context.progress,
        )
        return statistics[MOMENTS]

    def valid(entry: Mapping[Axis, Moments]) -> bool:
        return calibration.fits(entry, model, coupling)

    return context.store.recall(cache_entries.MOMENTS, context.cache_identity, collect, valid)


def _covariance(context: Context) -> Mapping[str, Gram]:
    from onnx_oamip.artifacts import cache_entries
    from onnx_oamip.data.feeds import Feeds
    from onnx_oamip.objective.position_weights import position_weights, weighting
    from onnx_oamip.statistics import covariances
    from onnx_oamip.statistics.collector import parts

    model = context.model
    coupling = context.coupling
    settings = context.settings
    fitted = parts(context.samples)[0].first(GRAM_SAMPLES)
    # One feed is in memory at a time, so that all samples are read.
    feeds = Feeds(fitted, list(fitted.feed_indices(context.batch)))
    cap, limit = _bounds_of_covariances(context)

    def collect() -> Mapping[str, Gram]:
        found = covariances.collect(
            model,
            coupling,
            feeds,
            context.device,
            seed=settings.seed,
            progress=context.progress,
            cap=cap,
            limit=limit,
            weights=position_weights(
                model,
                context.objective,
                feeds,
                context.device,
                power=COVARIANCE_POWER,
            ),
        )
        _refuse_overflow(context, found)
        return found

    def valid(entry: Mapping[str, Gram]) -> bool:
        return covariances.fits(entry, model, coupling, cap, limit)

    identity = {**context.cache_identity, **weighting(context.objective)}
    return context.store.recall(cache_entries.GRAMS, identity, collect, valid)


def _bounds_of_covariances(context: Context) -> tuple[int, int | None]:
    """Most columns of a covariance matrix, and most values of one; None where these are not limited."""
    from onnx_oamip.statistics import covariances

    model, coupling, settings = context.model, context.coupling, context.settings
    if settings.max_memory is not None:
        # Problems take several times the memory of the moments that they are made of.
        most = settings.activation_memory_limit // 2
    else:
        most = COVARIANCE_BYTES
        if covariances.estimated_bytes(model, coupling) <= most:
            return covariances.CAP, None
    return covariances.cap(coupling, most), covariances.share(coupling, most)


def _refuse_overflow(context: Context, found: Mapping[str, Gram]) -> None:
    """Raises DataError for covariances that are not finite; the message names the tensor."""
    import numpy as np

    from onnx_oamip.data import overflow

    for name, gram in found.items():
        if np.isfinite(gram.values).all() and np.isfinite(gram.mean).all():
            continue
        data = next(c.data for c in context.coupling.consumers if c.node == name)
        overflow.refuse(
            context.model,
            context.samples,
            data,
            device=context.device,
            batch_size=context.batch,
        )


def _class_samples(context: Context) -> Images | None:
    from onnx_oamip.statistics import class_samples

    settings = context.settings
    return class_samples.collect(
        context.model,
        context.objective,
        context.samples,
        context.device,
        per_class=settings.images_per_class,
        seed=settings.seed,
        batch_size=context.batch,
    )


def _relevance(context: Context) -> Mapping[str, Floats]:
    from onnx_oamip.artifacts import cache_entries
    from onnx_oamip.core.records.objective import document
    from onnx_oamip.statistics import relevance, workload
    from onnx_oamip.statistics.collector import parts

    model = context.model
    coupling = context.coupling
    objective = context.objective
    if not relevance.applies(objective):
        return {}

    passes = relevance.passes(model, coupling)
    samples = workload.measured(context, passes, workload.RELEVANCE_MACS)

    def collect() -> Mapping[str, Floats]:
        return relevance.collect(
            model,
            coupling,
            objective,
            samples,
            context.device,
            seed=context.settings.seed,
            batch_size=context.batch,
            progress=context.progress,
        )

    def valid(entry: Mapping[str, Floats]) -> bool:
        return relevance.fits(entry, model, coupling)

    identity = {**context.cache_identity, "objective": document(objective)}
    if samples.count < min(relevance.SAMPLES, parts(context.samples)[1].count):
        identity["samples"] = samples.count
    return context.store.recall(cache_entries.RELEVANCE, identity, collect, valid)


MOMENTS: Request[Mapping[Axis, Moments]] = Request("moments", _moments)
"""Mean and mean square of every channel that a consumer reads, by axis. Kept in the cache."""
CLASS_SAMPLES: Request[Images | None] = Request("class samples", _class_samples)
"""A few correctly classified samples of every class with all activations; None for a model that is no classifier."""
COVARIANCE: Request[Mapping[str, Gram]] = Request("covariance", _covariance)
"""Covariance of the input of every linear node, by node; nodes that share a weight have the same one. Kept in the
cache."""
RELEVANCE: Request[Mapping[str, Floats]] = Request("relevance", _relevance)
"""Loss of the objective per squared error of every linear consumer's output channels, by node. Empty for an objective
of one term: all consumers then weigh alike. Kept in the cache."""
BUILT_IN: tuple[Request[Any], ...] = (MOMENTS, CLASS_SAMPLES, COVARIANCE, RELEVANCE)
"""In the order of their passes over the samples, which precede those of all other requests."""
