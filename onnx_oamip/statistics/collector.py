"""Collects the statistics of calibration samples that importance methods and stages request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from onnx_oamip.artifacts import cache
from onnx_oamip.core.records import (
    Axis,
    Gram,
    Images,
    Moments,
    Pooled,
    Request,
    Signal,
    Statistics,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import affordable
from onnx_oamip.published.dependence import pooled_activations
from onnx_oamip.published.nnrelief import absolute_signal
from onnx_oamip.statistics import calibration, class_samples, covariances
from onnx_oamip.statistics.context import Context

SENSITIVITY_SAMPLES = 128
GRAM_SAMPLES = 512


def collect(context: Context, requests: Iterable[Request]) -> Statistics:
    """Answer requests for statistics.

    Moments and covariances are taken from the store where an earlier run kept them, and every answer is kept in the
    context for the rest of the run, so that no statistic is collected twice.

    Args:
        context: The model and its calibration samples.
        requests: The kinds of statistics to collect.

    Returns:
        The statistics that were requested, and no others.

    Raises:
        DataError: A tensor of the model is not finite on the samples.
    """
    start = time.perf_counter()
    wanted = set(requests)
    with context.clock("calibrate"):
        # In the order of the table: whatever is requested first, the passes run in the same order.
        answers = {
            request: context.collected.get(request, context, make)
            for request, make in COLLECTORS.items()
            if request in wanted
        }
    return Statistics(
        answers, context.samples.usable(), context.device, time.perf_counter() - start
    )


def parts(samples: Samples) -> tuple[Samples, Samples]:
    """Samples for covariances and others for sensitivities: a repair is not judged on the rows that made it."""
    count = samples.count
    measured = min(SENSITIVITY_SAMPLES, count // 4)
    if measured < (samples.fixed_batch or 1):
        return samples, samples
    split = count - measured
    return samples.take(np.arange(min(split, GRAM_SAMPLES))), samples.take(np.arange(split, count))


def _moments(context: Context) -> Mapping[Axis, Moments]:
    model, coupling = context.model, context.coupling
    return context.store.keep(
        cache.MOMENTS,
        context.known,
        lambda: (
            calibration.collect(
                model, coupling, context.samples, context.device, context.batch, context.progress
            ).moments
        ),
        lambda found: calibration.fits(found, model, coupling),
    )


def _covariance(context: Context) -> Mapping[str, Gram]:
    model, coupling, settings = context.model, context.coupling, context.settings
    fitted, _ = parts(context.samples)
    feeds, _ = affordable(model, fitted, context.batch, settings.room)
    cap = (
        covariances.CAP if settings.max_memory is None else covariances.cap(coupling, settings.room)
    )
    return context.store.keep(
        cache.GRAMS,
        context.known,
        lambda: covariances.collect(
            model, coupling, feeds, context.device, settings.seed, context.progress, cap
        ),
        lambda found: covariances.fits(found, model, coupling, cap),
    )


def _class_samples(context: Context) -> Images | None:
    settings = context.settings
    return class_samples.collect(
        context.model,
        context.samples,
        context.device,
        settings.images_per_class,
        settings.seed,
        context.batch,
    )


def _absolute_activations(context: Context) -> Signal:
    return absolute_signal.collect(
        context.model,
        context.coupling,
        context.samples,
        context.device,
        context.batch,
        context.progress,
        exact=context.settings.signal == "paper",
    )


def _pooled_activations(context: Context) -> Pooled:
    return pooled_activations.collect(
        context.model,
        context.coupling,
        context.samples,
        context.device,
        context.settings.seed,
        context.batch,
        by_tap=context.settings.limits != "none",
        progress=context.progress,
    )


COLLECTORS: Mapping[Request, Callable[[Context], Any]] = MappingProxyType(
    {
        Request.MOMENTS: _moments,
        Request.CLASS_SAMPLES: _class_samples,
        Request.ABSOLUTE_ACTIVATIONS: _absolute_activations,
        Request.COVARIANCE: _covariance,
        Request.POOLED_ACTIVATIONS: _pooled_activations,
    }
)
"""How every request is answered, in the order of the passes over the samples."""
