"""Collects the statistics of calibration samples that importance methods and stages request."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from onnx_oamip.core.records import Request, Statistics
from onnx_oamip.data import division
from onnx_oamip.data.dataset import Samples
from onnx_oamip.statistics.context import Context
from onnx_oamip.statistics.requests import BUILT_IN

SENSITIVITY_SAMPLES = 128
"""Most calibration samples that losses are measured on."""


def collect(context: Context, requests: Iterable[Request[Any]]) -> Statistics:
    """Answer requests for statistics.

    Every answer is kept in the context for the rest of the run, so that no statistic is collected twice. A collector
    may also take its answer from the cache, as those of moments and covariances do.

    Args:
        context: The model and its calibration samples.
        requests: The statistics to collect.

    Returns:
        The statistics that were requested, and no others.

    Raises:
        DataError: A tensor of the model is not finite on the samples.
        SettingsError: Two requests of one name have different collectors.
    """
    start = time.perf_counter()
    with context.clock("calibrate"):
        in_order = sorted(set(requests), key=_position)
        answers = {request: context.collected.get(request, context) for request in in_order}
    seconds = time.perf_counter() - start
    return Statistics(answers, context.samples.usable(), context.device, seconds)


def parts(samples: Samples) -> tuple[Samples, Samples]:
    """Split calibration samples, so that a repair is not measured on the samples that it was computed from.

    Args:
        samples: All calibration samples, in random order.

    Returns:
        Samples for covariances and repairs, and up to ``SENSITIVITY_SAMPLES`` for losses. Where the samples have
        groups, no group is on both sides, if these can be divided so (see :func:`undivided_groups`). Both sides are all
        samples if there are too few to split.
    """
    count = samples.count
    measured = min(SENSITIVITY_SAMPLES, count // 4)
    if measured < _batch(samples):
        return samples, samples
    by_group = _parts_by_group(samples)
    if by_group is not None:
        return by_group
    split = count - measured
    return samples.take(np.arange(split)), samples.take(np.arange(split, count))


def are_groups_apart(samples: Samples) -> bool:
    """Check whether :func:`parts` divides calibration samples by their groups.

    Args:
        samples: All calibration samples.

    Returns:
        False also for samples without groups.
    """
    return _parts_by_group(samples) is not None


def undivided_groups(samples: Samples) -> str:
    """Describe calibration samples whose groups :func:`parts` cannot keep apart.

    Args:
        samples: All calibration samples.

    Returns:
        A sentence for the user; empty where groups are kept apart, or the samples have none.
    """
    if samples.groups is None or are_groups_apart(samples):
        return ""
    if len(np.unique(samples.groups)) == 1:
        cause = "all calibration samples are of one group"
    else:
        cause = f"no choice of whole groups leaves the {_batch(samples)} samples of a batch on both sides"
    return f"losses of widths and refits are measured on groups to which refits are fitted: {cause}"


def _batch(samples: Samples) -> int:
    """Least number of samples that the model can run on."""
    return samples.fixed_batch or 1


def _parts_by_group(samples: Samples) -> tuple[Samples, Samples] | None:
    """About a quarter of the samples in whole groups for losses, and the others; None if no groups can be divided."""
    groups = samples.groups
    if groups is None or (groups == groups[0]).all():
        return None
    chosen = division.held_out_groups(groups, samples.count // 4, 0, samples.classes)
    fitted = np.flatnonzero(~chosen)
    # All groups have their part in these: the samples are in random order.
    measured = np.flatnonzero(chosen)[:SENSITIVITY_SAMPLES]
    if min(len(fitted), len(measured)) < _batch(samples):
        return None
    return samples.take(fitted), samples.take(measured)


def _position(request: Request[Any]) -> tuple[int, str]:
    """Place of a request in the order of passes: built-in ones first, then by name."""
    if request in BUILT_IN:
        rank = BUILT_IN.index(request)
    else:
        rank = len(BUILT_IN)
    return rank, request.name
