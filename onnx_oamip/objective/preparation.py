"""The objective of a run: found for its model, labels and settings, and scaled on its calibration samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_oamip.artifacts.cache import Store
from onnx_oamip.artifacts.cache_entries import Kind
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Model, Objective, Scale
from onnx_oamip.core.records.objective import document
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.dataset import Samples, evenly
from onnx_oamip.data.overflow import refuse
from onnx_oamip.graph.outputs import is_float, with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective.detection import detect
from onnx_oamip.objective.normaliser import UNLIKE_SCORES, Normaliser, unlikeness
from onnx_oamip.objective.position_weights import has_rare_decisions, weights_of

MAX_SAMPLES = 512
"""Samples that scales are found on, at most; rare decisions need hundreds."""
MIN_SAMPLES = 32
"""Samples that are taken however large the outputs are."""
ENOUGH_RARE = 32.0
"""Samples with rare decisions from which on a random order spreads them well enough."""
MAX_NUMBERS = 1 << 27
"""Numbers of all outputs of all samples together, about: large maps need fewer samples."""


def find_objective(
    model: Model,
    settings: Settings,
    samples: Samples,
    held: Samples | None = None,
) -> Objective:
    """Find the terms by which a pruned model is judged, without their scales.

    Args:
        model: The original.
        settings: The user's statements about outputs.
        samples: Calibration samples. Where they have no labels, those of ``held`` count.
        held: Held-out samples.

    Returns:
        The objective.

    Raises:
        SettingsError: A statement fits no output.
        DataError: Labels fit no output; the message begins with the data's name.
    """
    found: Objective | None = None
    for part in (samples, held):
        if part is not None and part.labels is not None:
            try:
                judged = detect(
                    model,
                    part.labels,
                    settings.task,
                    settings.kinds,
                    in_source=part.in_source,
                )
            except DataError as error:
                raise DataError(f"{part.source}: {error}") from error
            found = found or judged
    return found or detect(model, None, settings.task, settings.kinds)


def scale(
    model: Model,
    objective: Objective,
    samples: Samples,
    device: str,
    *,
    batch_size: int = 32,
    store: Store | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Objective:
    """Find the scale of every judged term on the original's outputs.

    Args:
        model: The original.
        objective: Terms without scales.
        samples: Calibration samples; up to ``MAX_SAMPLES`` of them are run, evenly spaced.
        device: Where the model runs.
        batch_size: Samples of one run.
        store: Cache of earlier runs.
        identity: What the outputs depend on besides the objective, as plain values.

    Returns:
        The same terms with their scales.

    Raises:
        DataError: An output is NaN or infinite on the samples.
    """

    def find() -> tuple[Scale, ...]:
        statistics = Normaliser(objective)
        tensors = objective.tensors
        session = Session(with_outputs(model, tensors), device, what="the model")
        for _, feed in _spread(model, objective, samples).batches(batch_size):
            outputs = session.run(feed, tensors)
            for tensor, value in zip(tensors, outputs, strict=True):
                if is_float(value.dtype) and (np.isnan(value) | np.isposinf(value)).any():
                    refuse(model, samples, tensor, device=device, batch_size=batch_size)
            statistics.update(outputs)
        return tuple(t.scale for t in statistics.finish().judged if t.scale is not None)

    if not objective.judged:
        return objective
    depends = {**(identity or {}), "objective": document(objective)}
    found = (store or Store()).recall(
        SCALES,
        depends,
        find,
        lambda value: are_scales(value, objective),
    )
    scales = iter(found)
    terms = (
        term if term.kind == "ignore" else replace(term, scale=next(scales))
        for term in objective.terms
    )
    return _by_size(replace(objective, terms=tuple(terms)))


def _by_size(objective: Objective) -> Objective:
    """Take raw outputs for values whose columns differ too much in size to be scores of classes beside each other."""
    terms = []
    notes = list(objective.notes)
    for term in objective.terms:
        if term.kind != "ambiguous" or term.scale is None:
            terms.append(term)
            continue
        ratio = unlikeness(term.scale.variance)
        if ratio < UNLIKE_SCORES:
            terms.append(term)
            continue
        note = (
            f"output '{term.output}' is taken for values, as the spread of one column is {ratio:,.0f} times that of "
            f"another; `outputs={term.output}=classes` says otherwise"
        )
        notes = [note if other == term.assumption else other for other in notes]
        terms.append(replace(term, kind="values", assumption=note))
    return replace(objective, terms=tuple(terms), notes=tuple(notes))


def spread_rare(
    model: Model,
    objective: Objective,
    samples: Samples,
    device: str,
    *,
    batch_size: int = 32,
) -> Samples:
    """Reorder calibration samples so that each run of consecutive ones has its share of rare decisions.

    Stages take the first or the last samples. Where few samples hold a decision that the model is there to make, a
    random order leaves some of these stages without one.

    Args:
        model: The original.
        objective: Terms with their scales.
        samples: Calibration samples in random order.
        device: Where the model runs.
        batch_size: Samples of one run.

    Returns:
        The samples. In their order if no decisions are rare, or enough samples hold rare ones: a random order spreads
        those well enough.
    """
    count = samples.usable()
    if count > MAX_SAMPLES or count < samples.count or not has_rare_decisions(objective):
        return samples
    tensors = objective.tensors
    session = Session(with_outputs(model, tensors), device, what="the model")
    rareness = np.zeros(count)
    for index, feed in samples.batches(batch_size):
        weights = weights_of(objective, session.run(feed, tensors))
        rareness[index] = weights.by_sample(len(index))
    beyond = rareness - rareness.min()
    # As many equally rare samples would have the same spread (Kish's effective sample size).
    effective = float(beyond.sum() ** 2 / max(np.square(beyond).sum(), 1e-300))
    if effective >= ENOUGH_RARE:
        return samples
    return samples.take(evenly(rareness))


def are_scales(scales: tuple[Scale, ...], objective: Objective) -> bool:
    """Validate a cache entry: the scales of the judged terms.

    Args:
        scales: Scales as read.
        objective: The terms that they belong to.

    Returns:
        True if there is one scale per judged term, all of finite positive numbers.
    """
    return len(scales) == len(objective.judged) and all(
        s.form in ("auto", "logits", "probabilities", "scores")
        and s.spread > 0
        and s.variance.ndim == 1
        and s.balance.shape[1:] == (2,)
        and all(
            v.dtype == np.float64 and np.isfinite(v).all() and (v > 0).all()
            for v in (s.variance, s.balance)
        )
        for s in scales
    )


def _spread(model: Model, objective: Objective, samples: Samples) -> Samples:
    """Evenly spaced samples, as many as scales need."""
    lengths = [int(np.prod(model.shapes.get(name, (1,)))) for name in objective.tensors]
    each = max(sum(lengths) // max(1 if samples.whole else model.batch, 1), 1)
    most = int(np.clip(MAX_NUMBERS // each, MIN_SAMPLES, MAX_SAMPLES))
    count = min(samples.count, max(most, samples.fixed_batch or 1))
    return samples.take(np.linspace(0, samples.count - 1, count).round().astype(np.int64))


def _pack(scales: tuple[Scale, ...]) -> dict[str, Array]:
    about = [[s.form, s.spread, s.background, s.unused] for s in scales]
    held: dict[str, Array] = {"about": np.asarray(json.dumps(about), np.str_)}
    for i, s in enumerate(scales):
        held[f"variance{i}"], held[f"balance{i}"] = s.variance, s.balance
    return held


def _unpack(held: Mapping[str, Array]) -> tuple[Scale, ...]:
    about = json.loads(str(held["about"]))
    return tuple(
        Scale(
            form,
            float(spread),
            held[f"variance{i}"],
            int(background),
            held[f"balance{i}"],
            tuple(map(int, unused)),
        )
        for i, (form, spread, background, unused) in enumerate(about)
    )


SCALES: Kind[tuple[Scale, ...]] = Kind("scales", _pack, _unpack)
