"""Choice of the number of shared values of each tensor: the fewest bytes within an accepted loss.

The loss of a codebook is modelled as ``c x its mean squared error``, with one number c per tensor: the squared relative
error of the outputs with this tensor alone shared, over its mean squared error. For a predicted loss of the whole model
the best codebooks follow from one price of bytes (Everett's Lagrange multipliers); the predicted loss is bisected until
the drop that is measured on evaluation samples is just accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_oamip.core import atomic_files
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Floats,
    Ints,
    Model,
    Objective,
    Verification,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import drop_search
from onnx_oamip.published.packing import codebook
from onnx_oamip.published.packing.codebook import Codebook
from onnx_oamip.published.packing.layout import Files, Place
from onnx_oamip.verification import equivalence

MEANS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
"""Sizes of codebooks by k-means that are tried."""
GRIDS = (3, 5, 7, 9, 11, 15, 19, 25, 31, 39, 51, 65, 85, 111, 145, 191, 255)
"""Sizes of codebooks by even grids that are tried. Keeping a tensor exact is one more level."""
EXACT = len(MEANS) + len(GRIDS)
"""Level of a tensor that is kept exact."""
PROBE = 8
"""Size of the codebook by k-means at which a tensor's loss is measured."""
SAMPLES = 128
"""Calibration samples for that measurement."""
TRIES = 9
"""Models that are measured in the bisection."""
LOSSES = (1e-6, 1.0)
"""Squared relative errors of the outputs between which the bisection searches."""
LOG_PRICES = (-60.0, 20.0)
"""Logarithms of the price of a byte, in losses, between which a price is searched."""
_RUINED = 1e30
"""Loss of a tensor without which the outputs are not finite."""


@dataclass(frozen=True)
class Candidates:
    """Codebooks to choose from.

    Attributes:
        places: Tensors that may share values.
        codebooks: By tensor, the codebooks by ``MEANS`` and then ``GRIDS``.
        exact: Bytes of each tensor if it is kept exact (places,).
    """

    places: tuple[Place, ...]
    codebooks: tuple[tuple[Codebook, ...], ...]
    exact: Floats


@dataclass(frozen=True)
class Judge:
    """Measures models with shared weights against the original.

    Attributes:
        files: Files of the original.
        model: The original.
        objective: Terms by which the model is judged.
        original: Its session.
        calibration: Samples for the losses of single tensors.
        held_out: Samples for the drop.
        device: Device that models run on.
        batch_size: Samples in one run.
    """

    files: Files
    model: Model
    objective: Objective
    original: Session
    calibration: Samples
    held_out: Samples
    device: str
    batch_size: int

    def measure(self, words: Mapping[Place, Array], samples: Samples) -> Verification:
        """Compare the model with other words in some tensors to the original.

        Args:
            words: New words by tensor.
            samples: Samples to compare on.

        Returns:
            The comparison.
        """
        with atomic_files.scratch() as folder:
            path = self.files.substitute(words).write(folder, "model.onnx")
            session = watch_file(path, self.model, self.objective, self.device)
            return equivalence.compare(
                self.model,
                self.objective,
                self.original,
                session,
                samples=samples,
                batch_size=self.batch_size,
            )

    def lost(self, verification: Verification) -> float:
        """Compute the points that a model loses.

        Args:
            verification: Its comparison to the original.

        Returns:
            Points of accuracy, agreement or output error.

        Raises:
            DataError: Nothing was measured, because every floating output is zero on all samples.
        """
        unmeasured = verification.agreement is None and verification.output_relative_error is None
        if unmeasured:
            raise DataError(
                f"no output of {self.model.path} is a float that is not zero on {self.held_out.source}, so that what "
                "is lost cannot be measured; give `clusters` without `data`, or leave both out to lose nothing."
            )
        return drop_search.drop(verification).lost


def watch_file(
    path: Path,
    model: Model,
    objective: Objective,
    device: str,
) -> Session:
    """Open a model file so that it gives what the terms of an objective read.

    Args:
        path: The file; its weights may lie beside it.
        model: The same model as it was loaded.
        objective: The terms; the file has their tensors.
        device: Where it runs.

    Returns:
        A session for :func:`equivalence.compare`.
    """
    what = "the model with shared weights"
    names = equivalence.watched(model, objective)
    if names == [port.name for port in model.outputs]:
        return Session(path, device, what=what)
    proto = onnx.load(path, load_external_data=False)
    shown = path.with_name(f"watched-{path.name}")
    onnx.save(with_outputs(model, names, proto), shown)
    return Session(shown, device, what=what)


def candidates(
    files: Files,
    exact: Mapping[Place, int],
    seed: int,
    progress: Progress | None = None,
) -> Candidates:
    """Find codebooks of every tensor that may share its values.

    Args:
        files: Files of the model.
        exact: Bytes of these tensors if they are kept exact.
        seed: Seed of k-means.
        progress: Callback ``(stage, done, total)``.

    Returns:
        The codebooks.
    """
    codebooks = []
    for i, place in enumerate(exact):
        distribution = codebook.histogram(codebook.numbers(place, files.words(place)))
        itemsize = place.form.dtype.itemsize
        by_means = [codebook.cluster(distribution, k, itemsize, seed) for k in MEANS]
        by_grids = [codebook.grid(distribution, k, itemsize) for k in GRIDS]
        codebooks.append((*by_means, *by_grids))
        if progress:
            progress("codebooks", i + 1, len(exact))
    sizes = np.asarray(list(exact.values()), np.float64)
    return Candidates(tuple(exact), tuple(codebooks), sizes)


def smallest(
    judge: Judge,
    choices: Candidates,
    points: float,
    progress: Progress | None = None,
) -> tuple[dict[Place, Floats], Verification]:
    """Find the smallest model within an accepted loss.

    Args:
        judge: Measures models.
        choices: Codebooks to choose from.
        points: Most points that may be lost on evaluation samples.
        progress: Callback ``(stage, done, total)``.

    Returns:
        Values by tensor, without tensors that are kept exact, and the comparison of the model to the original. With all
        tensors exact nothing is lost.

    Raises:
        DataError: The loss cannot be measured.
    """
    error, nbytes = _tables(choices)
    loss = _loss_factors(judge, choices, progress)[:, None] * error
    best: dict[Place, Floats] = {}
    verification = judge.measure({}, judge.held_out)
    judge.lost(verification)
    measured: dict[tuple[int, ...], Verification] = {}
    low, high = np.log(LOSSES)
    for i in range(TRIES if choices.places else 0):
        middle = (low + high) / 2
        levels = choose(loss, nbytes, float(np.exp(middle)))
        values = _values(choices, levels)
        key = tuple(levels.tolist())
        if key not in measured:
            measured[key] = judge.measure(shared(judge.files, values), judge.held_out)
        if judge.lost(measured[key]) <= points:
            best = values
            verification = measured[key]
            low = middle
        else:
            high = middle
        if progress:
            progress("max-drop", i + 1, TRIES)
    return best, verification


def shared(files: Files, values: Mapping[Place, Floats]) -> dict[Place, Array]:
    """Replace the entries of tensors by values of their codebooks.

    Args:
        files: Files of the model.
        values: Values of the codebook by tensor.

    Returns:
        New words by tensor.
    """
    return {
        place: codebook.share(place, files.words(place), book) for place, book in values.items()
    }


def choose(loss: Floats, nbytes: Floats, allowed: float) -> Ints:
    """Choose the levels of all tensors that take the fewest bytes within an allowed sum of losses.

    Only levels on a tensor's lower convex hull of loss and bytes are chosen, which costs less than a step of one
    tensor.

    Args:
        loss: Loss of each level (tensors, levels); 0 at the last one.
        nbytes: Bytes of each level (tensors, levels).
        allowed: Largest sum of losses.

    Returns:
        Levels (tensors,).
    """

    def cheapest(log_price: float) -> Ints:
        price = float(np.exp(log_price))
        return np.asarray((loss + price * nbytes).argmin(axis=1), np.int64)

    rows = np.arange(len(loss))
    low, high = LOG_PRICES
    for _ in range(60):
        middle = (low + high) / 2
        if loss[rows, cheapest(middle)].sum() <= allowed:
            low = middle
        else:
            high = middle
    return cheapest(low)


def _tables(choices: Candidates) -> tuple[Floats, Floats]:
    """Mean squared errors and bytes of all levels (tensors, levels)."""
    books = choices.codebooks
    shape = (len(books), EXACT)
    error = np.asarray([[book.error for book in row] for row in books]).reshape(shape)
    coded = np.asarray([[book.nbytes for book in row] for row in books]).reshape(shape)
    exact_error = np.zeros(len(books))
    return np.column_stack([error, exact_error]), np.column_stack([coded, choices.exact])


def _values(choices: Candidates, levels: Ints) -> dict[Place, Floats]:
    """Values of the codebooks at some levels, of tensors that are not kept exact."""
    result = {}
    rows = zip(choices.places, choices.codebooks, levels.tolist(), strict=True)
    for place, books, level in rows:
        if level < EXACT:
            result[place] = books[level].values
    return result


def _loss_factors(
    judge: Judge,
    choices: Candidates,
    progress: Progress | None,
) -> Floats:
    """Loss per mean squared error of each tensor (tensors,): that of the outputs, or of the tensor if they are zero."""
    calibration = judge.calibration
    order = np.random.default_rng(0).permutation(calibration.count)
    count = max(SAMPLES, calibration.fixed_batch or 1)
    samples = calibration.take(np.sort(order[:count]))
    result = np.zeros(len(choices.places))
    rows = zip(choices.places, choices.codebooks, strict=True)
    for i, (place, books) in enumerate(rows):
        book = books[MEANS.index(PROBE)]
        words = judge.files.words(place)
        if book.error > 0:
            replaced = {place: codebook.share(place, words, book.values)}
            relative = judge.measure(replaced, samples).output_relative_error
            scale = float(np.mean(np.square(codebook.numbers(place, words))))
            result[i] = 1 / scale if relative is None else relative**2 / book.error
        if progress:
            progress("sensitivity", i + 1, len(choices.places))
    return np.nan_to_num(result, nan=_RUINED, posinf=_RUINED)
