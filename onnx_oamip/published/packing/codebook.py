"""Weight sharing: every entry of a tensor becomes one of k values, of k-means in one dimension or near an even grid.

Entries are sorted into a histogram first, so that a codebook costs the same for large tensors and small ones. Zero
stays zero where a share of 1/k of the entries or more is zero, as in a pruned matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.records import Array, Floats
from onnx_oamip.published.packing import entropy
from onnx_oamip.published.packing.layout import Place, type_name

BINS = 4096
"""Cells of the histogram; a tensor with fewer distinct values is seen as it is."""
ENTRIES = 256
"""Fewest entries of a tensor that gets a codebook."""
ROUNDS = 50
_SHARED = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


@dataclass(frozen=True)
class Histogram:
    """Points (n,) with weights (n,) of what is not zero, and how many zeros there are."""

    points: Floats
    weights: Floats
    zeros: int

    @property
    def count(self) -> int:
        """Entries of the tensor."""
        return self.zeros + int(self.weights.sum())


@dataclass(frozen=True)
class Codebook:
    """Values (k,) in ascending order, the mean squared error of sharing them, and the bytes that it comes to."""

    values: Floats
    error: float
    nbytes: float


def check() -> None:
    """Raise EnvironmentMissing where the extra ``pack``, for k-means, is not installed."""
    with imports_of("pack", "sharing weights (`data` or `clusters`)"):
        import sklearn.cluster  # noqa: F401


def shares(place: Place, words: Array) -> bool:
    """Whether a tensor gets a codebook: a matrix of finite floats (or more axes), neither tiny nor constant."""
    if (
        type_name(place.type) not in _SHARED
        or sum(d > 1 for d in place.shape) < 2
        or words.size < ENTRIES
    ):
        return False
    return bool(np.isfinite(numbers(place, words)).all())


def numbers(place: Place, words: Array) -> Floats:
    """The values of a tensor's words (n,)."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(place.type)
    return np.asarray(
        np.ascontiguousarray(words, words.dtype.newbyteorder("=")).view(dtype), np.float64
    )


def histogram(values: Floats) -> Histogram:
    """Values (n,) as at most ``BINS`` points: the means of cells of equal width."""
    rest = values[values != 0]
    if not rest.size:
        return Histogram(np.zeros(0), np.zeros(0), values.size)
    points, counts = np.unique(rest, return_counts=True)
    if len(points) > BINS:
        weights, edges = np.histogram(rest, BINS)
        sums, _ = np.histogram(rest, edges, weights=rest)
        points, counts = sums[weights > 0] / weights[weights > 0], weights[weights > 0]
    return Histogram(points, counts.astype(np.float64), values.size - rest.size)


def cluster(found: Histogram, k: int, itemsize: int, seed: int) -> Codebook:
    """The codebook of at most k values for a tensor whose entries take ``itemsize`` bytes.

    Lloyd's iteration starts where the density of centres is that of the values to the power 1/3, which is what is best
    for many centres (Panter and Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of
    levels", 1951).
    """
    keeps_zero = found.zeros * k >= found.count
    points, weights = found.points, found.weights
    if found.zeros and not keeps_zero:
        points, weights = np.append(points, 0.0), np.append(weights, float(found.zeros))
    centres = _lloyd(points, weights, max(k - keeps_zero, 1), seed) if points.size else points
    return _measured(np.unique(np.append(centres, 0.0) if keeps_zero else centres), found, itemsize)


def grid(found: Histogram, k: int, itemsize: int) -> Codebook:
    """The means of at most k cells of equal width, the middle one at zero: an odd k.

    Frequent values share long cells, so that the numbers of the cells take fewer bits under an entropy code than those
    of as good a k-means (Gish and Pierce, "Asymptotically efficient quantizing", 1968).
    """
    width = 2 * float(np.abs(found.points).max(initial=0.0)) / k or 1.0
    cells = np.clip(np.rint(found.points / width), -(k // 2), k // 2).astype(np.int64) + k // 2
    weights = np.bincount(cells, found.weights, k)
    sums = np.bincount(cells, found.weights * found.points, k)
    used = weights > 0
    used[k // 2] = False
    return _measured(np.unique(np.append(sums[used] / weights[used], 0.0)), found, itemsize)


def _measured(values: Floats, found: Histogram, itemsize: int) -> Codebook:
    points, weights = np.append(found.points, 0.0), np.append(found.weights, float(found.zeros))
    labels = nearest(values, points)
    error = float(weights @ np.square(points - values[labels])) / found.count
    bits = entropy.entropy(np.bincount(labels, weights, len(values)))
    return Codebook(values, error, bits * found.count / 8 + itemsize * len(values))


def nearest(values: Floats, points: Floats) -> Array:
    """The number of the nearest of the ascending values for each point; a point half way takes the upper one."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, points, side="right")


def share(place: Place, words: Array, values: Floats) -> Array:
    """The words (n,) of a tensor whose entries are the nearest of the values; exact zeros stay if zero is a value."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(place.type)
    rounded = values.astype(dtype).view(words.dtype.newbyteorder("="))
    return np.asarray(rounded[nearest(values, numbers(place, words))])


def _lloyd(points: Floats, weights: Floats, k: int, seed: int) -> Floats:
    if len(points) <= k:
        return points
    check()
    from sklearn.cluster import KMeans

    order = np.argsort(points, kind="stable")
    points, weights = points[order], weights[order]
    centre, spread = float(weights @ points) / weights.sum(), float(points[-1] - points[0])
    gaps = np.gradient(points) if len(points) > 1 else np.ones(1)
    density = np.cumsum(np.cbrt(weights / gaps) * gaps)
    at = np.searchsorted(density, (np.arange(k) + 0.5) / k * density[-1])
    # Scaled, so that the tolerance means the same for all tensors; in one thread, so that sums have one order.
    start = (points[np.minimum(at, len(points) - 1)] - centre) / spread
    with threadpool_limits(1):
        fitted = KMeans(
            k, init=start[:, None], n_init=1, max_iter=ROUNDS, tol=1e-6, random_state=seed
        ).fit(((points - centre) / spread)[:, None], sample_weight=weights)
    return np.asarray(fitted.cluster_centers_[:, 0] * spread + centre, np.float64)
