"""A few samples of every class, with all activations, for programs over the activations of a network.

One or more per class: among the calibration samples that the model classifies correctly, those with the lowest
probability of their class, "correct but unsure" as OAMIP means them to be (its code ranks groups of images by
``(1 - probabilities) * correct``, which by broadcasting is the accuracy alone). Without labels the model's own
predictions are the classes. Held-out data is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    ClassHead,
    Floats,
    Images,
    Ints,
    Model,
    Objective,
    Term,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.outputs import float_activations, with_outputs
from onnx_oamip.graph.runtime import Session

LIMIT_BYTES = 1 << 30
"""Upper bound of the activations of all images together; above it none are kept, and no joint program is possible."""


@dataclass(frozen=True)
class _Choice:
    """Chosen rows of the logits, ordered by class.

    Attributes:
        rows: Indices of the rows.
        labels: Class of each row.
        notes: Remarks for the report.
    """

    rows: Ints
    labels: Ints
    notes: tuple[str, ...]


def heads(model: Model, objective: Objective) -> list[Term]:
    """Find the classification heads of an objective.

    Args:
        model: The model.
        objective: Its terms.

    Returns:
        Terms with class scores of shape (samples, classes), two classes or more, the labelled one first. Raw floats of
        that shape are among them.
    """
    found = []
    for term in objective.judged:
        shape = model.shapes.get(term.tensor, ())
        table = len(shape) == 2 and shape[1] > 1 and term.axis == 1 and term.part is None
        if table and term.kind in ("classes", "ambiguous") and not term.least:
            found.append(term)
    return sorted(found, key=lambda term: not term.labelled)


def collect(
    model: Model,
    objective: Objective,
    samples: Samples,
    device: str,
    *,
    per_class: int,
    seed: int,
    batch_size: int = 32,
) -> Images | None:
    """Choose samples of every class of the first head and run them with all activations.

    A class without a correctly classified sample has none. The labels of further heads are their own predictions.

    Args:
        model: The model.
        objective: Its terms.
        samples: Calibration samples.
        device: Device that the model runs on.
        per_class: Number of samples per class.
        seed: Breaks ties between samples of equal probability.
        batch_size: Samples in one run.

    Returns:
        The samples; None for a model without a classification head.
    """
    terms = heads(model, objective)
    if not terms:
        return None
    first = terms[0]
    outputs, sample_of_row = _all_logits(
        model,
        samples,
        [term.tensor for term in terms],
        device=device,
        batch_size=batch_size,
    )
    truth, notes = _classes(outputs[0], samples if first.labelled else None, sample_of_row)
    choice = _choose(outputs[0], truth, per_class, seed)
    rows = model.shapes[first.tensor][0]
    feeds, labels = _feeds(samples, sample_of_row, choice, rows)
    weights = _weights(terms)
    others = []
    for term, logits, weight in zip(terms[1:], outputs[1:], weights[1:], strict=True):
        predicted = logits[choice.rows].argmax(axis=1).astype(np.int64)
        of_head = replace(choice, labels=predicted)
        _, head_labels = _feeds(samples, sample_of_row, of_head, rows)
        others.append(ClassHead(term.tensor, head_labels, weight))
    images = Images(
        feeds=tuple(feeds),
        labels=labels,
        logits=first.tensor,
        activations={},
        notes=(*notes, *_left_out(objective, terms), *choice.notes),
        others=tuple(others),
        weight=weights[0],
    )

    names = float_activations(model)
    values_per_feed = sum(int(np.prod(model.shapes[name])) for name in names)
    if not feeds or 4 * values_per_feed * len(feeds) > LIMIT_BYTES:
        return images
    return replace(images, activations=_activations(model, feeds, names, device))


def _weights(terms: Sequence[Term]) -> list[float]:
    """Weight of the loss of every head: its weight in the objective over its spread, 1 on average."""
    spreads = [term.scale.spread if term.scale is not None else 1.0 for term in terms]
    relative = [term.weight / spread for term, spread in zip(terms, spreads, strict=True)]
    return [value * len(relative) / sum(relative) for value in relative]


def _left_out(objective: Objective, terms: Sequence[Term]) -> tuple[str, ...]:
    """A remark about terms that are no classification heads."""
    rest = [f"'{term.name}'" for term in objective.judged if term not in terms]
    if not rest:
        return ()
    return (f"the program over the network is about classes and leaves out {', '.join(rest)}",)


def _all_logits(
    model: Model,
    samples: Samples,
    tensors: Sequence[str],
    *,
    device: str,
    batch_size: int,
) -> tuple[list[Floats], Ints]:
    """Logits (rows, classes) of every head for all samples, and the sample of each row, ascending."""
    if samples.unequal:
        raise DataError(
            f"{samples.source} holds samples of unequal shapes, and this method compares activations at the same "
            "positions; pad the samples to one length, or choose another `importance`."
        )
    session = Session(with_outputs(model, tensors), device, what="the model")
    rows: list[list[Floats]] = [[] for _ in tensors]
    sample_of_row = []
    for index, feed in samples.batches(batch_size):
        values = session.run(feed, tensors)
        for collected, value in zip(rows, values, strict=True):
            collected.append(value.astype(np.float64))
        sample_of_row.append(np.repeat(index, len(values[0]) // len(index)))
    return [np.concatenate(collected) for collected in rows], np.concatenate(sample_of_row)


def _classes(
    outputs: Floats,
    labelled: Samples | None,
    sample_of_row: Ints,
) -> tuple[Ints, tuple[str, ...]]:
    """The class of every row, by its label or by the prediction of the model, and remarks."""
    predicted = outputs.argmax(axis=1)
    given = None if labelled is None else labelled.labels
    if given is None or given[sample_of_row].size != len(sample_of_row):
        return predicted, ()
    labels = given[sample_of_row].reshape(-1)
    if labels.max(initial=0) >= outputs.shape[1]:
        note = "labels beyond the model's classes: its own predictions stand in for them"
        return predicted, (note,)
    return labels, ()


def _choose(
    outputs: Floats,
    truth: Ints,
    per_class: int,
    seed: int,
) -> _Choice:
    """The least certain of the correctly classified rows of every class."""
    predicted = outputs.argmax(axis=1)
    every = np.arange(len(predicted))
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=1))
    log_probability = shifted[every, predicted] - log_total

    shuffled = np.random.default_rng(seed).permutation(len(predicted))
    by_certainty = shuffled[np.argsort(log_probability[shuffled], kind="stable")]
    correct = by_certainty[truth[by_certainty] == predicted[by_certainty]]
    by_class = correct[np.argsort(truth[correct], kind="stable")]
    classes, first = np.unique(truth[by_class], return_index=True)
    sizes = np.diff([*first, len(by_class)])
    rank_in_class = np.arange(len(by_class)) - np.repeat(first, sizes)
    rows = by_class[rank_in_class < per_class]

    notes: tuple[str, ...] = ()
    total = outputs.shape[1]
    if len(classes) < total:
        notes = (f"{total - len(classes)} of {total} classes have no correct sample",)
    return _Choice(rows, truth[rows].astype(np.int64), notes)


def _feeds(
    samples: Samples,
    sample_of_row: Ints,
    choice: _Choice,
    rows: int,
) -> tuple[list[dict[str, Array]], Ints]:
    """One feed per image, or as many images as a fixed batch takes; labels (feeds, rows), -1 where a row is padding.

    If one sample is a whole feed of several ``rows``, only the chosen row of it counts.
    """
    chosen = sample_of_row[choice.rows]
    images = np.arange(len(chosen))
    step = 1 if samples.whole else samples.fixed_batch or 1
    feed_count = -(-len(chosen) // step)
    padded = np.resize(chosen, feed_count * step)
    feeds = [samples.feed(padded[i : i + step]) for i in range(0, len(padded), step)]
    if samples.whole:
        row_in_sample = np.arange(len(sample_of_row)) - np.searchsorted(
            sample_of_row, sample_of_row
        )
        feed = images
        row = row_in_sample[choice.rows]
    else:
        feed, row = np.divmod(images, step)
    labels = np.full((len(feeds), rows), -1, np.int64)
    labels[feed, row] = choice.labels
    return feeds, labels


def _activations(
    model: Model,
    feeds: Sequence[dict[str, Array]],
    names: Sequence[str],
    device: str,
) -> dict[str, Array]:
    """By tensor (feeds, *its shape for one feed): the named activations, and the inputs of the model."""
    session = Session(with_outputs(model, names), device, what="the model with its activations")
    runs = [session.run(feed, names) for feed in feeds]
    activations = {name: np.stack([run[i] for run in runs]) for i, name in enumerate(names)}
    for port in model.inputs:
        activations[port.name] = np.stack([feed[port.name] for feed in feeds])
    return activations
