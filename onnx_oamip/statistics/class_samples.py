"""The few images that a program over a network's activations is made of.

One or more per class: among the calibration samples that the model classifies correctly, those with the lowest
probability of their class, "correct but unsure" as OAMIP means them to be (its code ranks groups of images by
``(1 - probabilities) * correct``, which by broadcasting is the accuracy alone). Without labels the model's own
predictions are the classes. Evaluation data is never looked at.
"""

from __future__ import annotations

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Floats,
    Images,
    Ints,
    Model,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.outputs import float_activations, head, with_outputs
from onnx_oamip.graph.runtime import Session

LIMIT_BYTES = 1 << 30
"""Bound of the activations held for all images together; above it none are, and no joint program can be made."""


def check_labels(model: Model, samples: Samples) -> None:
    """Raises DataError where a label is no class of the model's classification head; other models take any."""
    found = head(model)
    if found is None or samples.labels is None:
        return
    classes = model.shapes[model.outputs[found.index].name][1]
    if samples.labels.max(initial=0) >= classes:
        raise DataError(
            f"{samples.source}: 'labels' has the class {int(samples.labels.max())}, but the model's output "
            f"'{model.outputs[found.index].name}' has {classes} classes, which count from 0."
        )


def collect(
    model: Model, samples: Samples, device: str, per_class: int, seed: int, batch_size: int = 32
) -> Images | None:
    """Choose ``per_class`` images of every class and run them; None for a model without a classification head.

    A class without a correctly classified sample gives none. Ties are broken by the seed.
    """
    found_head = head(model)
    if found_head is None:
        return None
    logits = found_head.logits
    outputs, place = _all_logits(model, samples, logits, device, batch_size)
    chosen, label, notes = _choose(outputs, samples, place, per_class, seed)
    inside = np.arange(len(place)) - np.searchsorted(place, place)  # places ascend
    feeds, labels = _feeds(samples, place[chosen], inside[chosen], label, model.shapes[logits][0])
    names = float_activations(model)
    size = sum(4 * int(np.prod(model.shapes[n])) for n in names) * len(feeds)
    if size > LIMIT_BYTES or not feeds:
        return Images(tuple(feeds), labels, logits, {}, tuple(notes))
    session = Session(with_outputs(model, names), device, what="the model with its activations")
    runs = [session.run(feed, names) for feed in feeds]
    found: dict[str, Array] = {n: np.stack([run[i] for run in runs]) for i, n in enumerate(names)}
    for port in model.inputs:
        found[port.name] = np.stack([feed[port.name] for feed in feeds])
    return Images(tuple(feeds), labels, logits, found, tuple(notes))


def _all_logits(
    model: Model, samples: Samples, logits: str, device: str, batch_size: int
) -> tuple[Floats, Ints]:
    """Logits (rows, classes) of all samples, and the sample of each row."""
    session = Session(with_outputs(model, [logits]), device, what="the model")
    rows, places = [], []
    for index, feed in samples.batches(batch_size):
        found = session.run(feed, [logits])[0]
        rows.append(found.astype(np.float64))
        places.append(np.repeat(index, len(found) // len(index)))
    return np.concatenate(rows), np.concatenate(places)


def _choose(
    outputs: Floats, samples: Samples, place: Ints, per_class: int, seed: int
) -> tuple[Ints, Ints, list[str]]:
    """(rows, their classes, notes), ordered by class."""
    guess = outputs.argmax(axis=1)
    truth = guess
    notes = []
    if samples.labels is not None and samples.labels[place].size == len(place):
        truth = samples.labels[place].reshape(-1)
        if truth.max(initial=0) >= outputs.shape[1]:
            notes.append("labels beyond the model's classes: its own predictions stand in for them")
            truth = guess
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    log_probability = shifted[np.arange(len(guess)), guess] - np.log(np.exp(shifted).sum(axis=1))
    shuffled = np.random.default_rng(seed).permutation(len(guess))
    order = shuffled[np.argsort(log_probability[shuffled], kind="stable")]
    order = order[truth[order] == guess[order]]
    order = order[np.argsort(truth[order], kind="stable")]
    classes, first = np.unique(truth[order], return_index=True)
    rank = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    chosen = order[rank < per_class]
    if len(classes) < outputs.shape[1]:
        notes.append(
            f"{outputs.shape[1] - len(classes)} of {outputs.shape[1]} classes have no correct sample"
        )
    return chosen, truth[chosen].astype(np.int64), notes


def _feeds(
    samples: Samples, place: Ints, inside: Ints, label: Ints, rows: int
) -> tuple[list[dict[str, Array]], Ints]:
    """One feed an image, or as many as a fixed batch takes; labels (feeds, rows), -1 where a row does not count.

    ``inside`` is the row of a sample's feed that counts, where one sample is a whole feed of several ``rows``.
    """
    step = 1 if samples.whole else samples.fixed_batch or 1
    padded = np.resize(place, -(-len(place) // step) * step)
    feeds = [samples.feed(padded[i : i + step]) for i in range(0, len(padded), step)]
    labels = np.full((len(feeds), rows), -1, np.int64)
    feed, row = (
        (np.arange(len(place)), inside) if samples.whole else np.divmod(np.arange(len(place)), step)
    )
    labels[feed, row] = label
    return feeds, labels
