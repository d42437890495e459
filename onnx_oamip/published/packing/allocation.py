"""Which tensor gets how many shared values: the fewest bytes at which the model still answers as well as asked.

The loss of a codebook is taken to be ``c x its mean squared error``, with one number c a tensor: the squared relative
error of the outputs with this tensor alone shared, over its mean squared error. For a predicted loss of the whole model
the best codebooks follow from one price of bytes (Everett's Lagrange multipliers); the predicted loss is bisected until
the drop that is measured on evaluation samples is just within what was allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core import atomic_files
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Floats,
    Ints,
    Model,
    Verification,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import search
from onnx_oamip.published.packing import codebook
from onnx_oamip.published.packing.codebook import Codebook
from onnx_oamip.published.packing.layout import Files, Place
from onnx_oamip.verification import equivalence

MEANS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
"""Sizes of codebooks by k-means that are tried."""
GRIDS = (3, 5, 7, 9, 11, 15, 19, 25, 31, 39, 51, 65, 85, 111, 145, 191, 255)
"""Sizes of codebooks by even grids; keeping a tensor exact is one more level."""
PROBE = 8
"""Size of the codebook by k-means at which a tensor's loss is measured."""
SAMPLES = 128
"""Calibration samples for that."""
TRIES = 9
LOSSES = (1e-6, 1.0)
"""Squared relative errors of the outputs between which the best is looked for."""
_RUINED = 1e30
"""The loss of a tensor without which the outputs are no numbers."""


@dataclass(frozen=True)
class Candidates:
    """For each of ``places`` its codebooks by ``MEANS`` and then ``GRIDS``, and its bytes when kept exact (places,)."""

    places: tuple[Place, ...]
    codebooks: tuple[tuple[Codebook, ...], ...]
    exact: Floats


@dataclass(frozen=True)
class Judge:
    """Runs a model's files beside the original. ``calibration`` gives losses of tensors, ``held`` the drop."""

    files: Files
    model: Model
    original: Session
    calibration: Samples
    held: Samples
    device: str
    batch_size: int

    def measure(self, words: Mapping[Place, Array], samples: Samples) -> Verification:
        """The model with these tensors beside the original."""
        with atomic_files.scratch() as folder:
            path = self.files.substitute(words).write(folder, "model.onnx")
            session = Session(path, self.device, what="the model with shared weights")
            return equivalence.compare(self.model, self.original, session, samples, self.batch_size)

    def lost(self, found: Verification) -> float:
        """Points lost. Raises DataError where nothing was measured: no floating output that is not zero throughout."""
        if found.agreement is None and found.output_relative_error is None:
            raise DataError(
                f"no output of {self.model.path} is a float that is not zero on {self.held.source}, so that what is "
                "lost cannot be measured; give `clusters` without `data`, or leave both out to lose nothing."
            )
        return search.drop(found)


def candidates(
    files: Files, exact: Mapping[Place, int], seed: int, progress: Progress | None = None
) -> Candidates:
    """Codebooks of every tensor that may share its values; ``exact``: bytes of those tensors kept exact."""
    found = []
    for i, place in enumerate(exact):
        seen = codebook.histogram(codebook.numbers(place, files.words(place)))
        size = place.form.dtype.itemsize
        means = [codebook.cluster(seen, k, size, seed) for k in MEANS]
        found.append((*means, *(codebook.grid(seen, k, size) for k in GRIDS)))
        if progress:
            progress("codebooks", i + 1, len(exact))
    return Candidates(tuple(exact), tuple(found), np.asarray(list(exact.values()), np.float64))


def smallest(
    judge: Judge, found: Candidates, points: float, progress: Progress | None = None
) -> tuple[dict[Place, Floats], Verification]:
    """(values by tensor, what was measured) of the smallest model that loses at most ``points`` on held samples.

    Tensors that are best kept exact are left out; with all of them exact nothing is lost.
    """
    exact = len(MEANS) + len(GRIDS)
    error = np.asarray([[*(c.error for c in books), 0.0] for books in found.codebooks]).reshape(
        -1, exact + 1
    )
    coded = np.asarray([[c.nbytes for c in books] for books in found.codebooks]).reshape(-1, exact)
    nbytes = np.column_stack([coded, found.exact])
    loss = _weights(judge, found, progress)[:, None] * error
    low, high = np.log(LOSSES)
    at = (low + high) / 2
    best: dict[Place, Floats] = {}
    verification = judge.measure({}, judge.held)
    judge.lost(verification)
    measured: dict[tuple[int, ...], Verification] = {}
    for i in range(TRIES if found.places else 0):
        levels = choose(loss, nbytes, float(np.exp(at)))
        values = {
            place: books[level].values
            for place, books, level in zip(
                found.places, found.codebooks, levels.tolist(), strict=True
            )
            if level < exact
        }
        key = tuple(levels.tolist())
        if key not in measured:
            measured[key] = judge.measure(shared(judge.files, values), judge.held)
        if judge.lost(measured[key]) <= points:
            best, verification, low = values, measured[key], at
        else:
            high = at
        at = (low + high) / 2
        if progress:
            progress("max-drop", i + 1, TRIES)
    return best, verification


def shared(files: Files, values: Mapping[Place, Floats]) -> dict[Place, Array]:
    """The words of tensors under their codebooks."""
    return {
        place: codebook.share(place, files.words(place), book) for place, book in values.items()
    }


def choose(loss: Floats, nbytes: Floats, allowed: float) -> Ints:
    """The level of each tensor (tensors,) that takes the fewest bytes at a sum of losses within ``allowed``.

    ``loss`` and ``nbytes`` (tensors, levels); the last level loses nothing. Only levels on a tensor's lower convex hull
    of loss and bytes are taken, which costs less than a step of one tensor.
    """

    def at(price: float) -> Ints:
        return np.asarray((loss + price * nbytes).argmin(axis=1), np.int64)

    rows = np.arange(len(loss))
    low, high = -60.0, 20.0  # logarithms of the price of a byte, in losses
    for _ in range(60):
        middle = (low + high) / 2
        if loss[rows, at(float(np.exp(middle)))].sum() <= allowed:
            low = middle
        else:
            high = middle
    return at(float(np.exp(low)))


def _weights(judge: Judge, found: Candidates, progress: Progress | None) -> Floats:
    """Loss of each tensor's error (tensors,): of the outputs, or where they are zero of the tensor."""
    order = np.random.default_rng(0).permutation(judge.calibration.count)
    few = judge.calibration.take(np.sort(order[: max(SAMPLES, judge.calibration.fixed_batch or 1)]))
    result = np.zeros(len(found.places))
    for i, (place, books) in enumerate(zip(found.places, found.codebooks, strict=True)):
        book = books[MEANS.index(PROBE)]
        words = judge.files.words(place)
        if book.error > 0:
            relative = judge.measure(
                {place: codebook.share(place, words, book.values)}, few
            ).output_relative_error
            scale = float(np.mean(np.square(codebook.numbers(place, words))))
            result[i] = 1 / scale if relative is None else relative**2 / book.error
        if progress:
            progress("sensitivity", i + 1, len(found.places))
    return np.nan_to_num(result, nan=_RUINED, posinf=_RUINED)
