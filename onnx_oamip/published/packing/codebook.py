"""Weight sharing: every entry of a tensor becomes one of k values, by k-means in one dimension or near an even grid.

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
"""Cells of the histogram; the points of a tensor with fewer distinct values are these values."""
ENTRIES = 256
"""Fewest entries of a tensor that gets a codebook."""
ROUNDS = 50
"""Most iterations of k-means."""
_SHARED = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


@dataclass(frozen=True)
class Histogram:
    """Distribution of the entries of a tensor.

    Attributes:
        points: Values other than zero (n,), ascending.
        weights: Number of entries at each point (n,).
        zeros: Number of entries that are zero.
    """

    points: Floats
    weights: Floats
    zeros: int

    @property
    def count(self) -> int:
        """Entries of the tensor."""
        return self.zeros + int(self.weights.sum())


@dataclass(frozen=True)
class Codebook:
    """Values that the entries of a tensor share.

    Attributes:
        values: The values (k,), ascending.
        error: Mean squared error of sharing them.
        nbytes: Expected bytes of the coded tensor.
    """

    values: Floats
    error: float
    nbytes: float


def check() -> None:
    """Check that the extra ``pack``, for k-means, is installed.

    Raises:
        EnvironmentMissing: It is not.
    """
    with imports_of("pack", "sharing weights (`data` or `clusters`)"):
        import sklearn.cluster  # noqa: F401


def shares(place: Place, words: Array) -> bool:
    """Test whether a tensor gets a codebook: a matrix of finite floats (or more axes) that is not tiny.

    Args:
        place: The tensor.
        words: Its words (n,).

    Returns:
        True if it gets one.
    """
    is_matrix = sum(size > 1 for size in place.shape) >= 2
    if type_name(place.type) not in _SHARED or not is_matrix or words.size < ENTRIES:
        return False
    return bool(np.isfinite(numbers(place, words)).all())


def numbers(place: Place, words: Array) -> Floats:
    """Interpret the words of a tensor as numbers of its type.

    Args:
        place: The tensor.
        words: Its words (n,).

    Returns:
        The numbers (n,), float64.
    """
    dtype = onnx.helper.tensor_dtype_to_np_dtype(place.type)
    native = np.ascontiguousarray(words, words.dtype.newbyteorder("="))
    return np.asarray(native.view(dtype), np.float64)


def histogram(values: Floats) -> Histogram:
    """Sort values into at most ``BINS`` points: the means of cells of equal width.

    Args:
        values: The values (n,).

    Returns:
        Their distribution.
    """
    nonzero = values[values != 0]
    if not nonzero.size:
        return Histogram(np.zeros(0), np.zeros(0), values.size)
    points, counts = np.unique(nonzero, return_counts=True)
    if len(points) > BINS:
        weights, edges = np.histogram(nonzero, BINS)
        sums, _ = np.histogram(nonzero, edges, weights=nonzero)
        used = weights > 0
        points = sums[used] / weights[used]
        counts = weights[used]
    return Histogram(points, counts.astype(np.float64), values.size - nonzero.size)


def cluster(
    distribution: Histogram,
    k: int,
    itemsize: int,
    seed: int,
) -> Codebook:
    """Find a codebook by k-means.

    Lloyd's iteration starts where the density of centres is that of the values to the power 1/3, which is the best for
    many centres (Panter and Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of
    levels", 1951).

    Args:
        distribution: Distribution of the entries of a tensor.
        k: Most values.
        itemsize: Bytes of an entry.
        seed: Seed of k-means.

    Returns:
        The codebook.
    """
    keeps_zero = distribution.zeros * k >= distribution.count
    points = distribution.points
    weights = distribution.weights
    if distribution.zeros and not keeps_zero:
        points = np.append(points, 0.0)
        weights = np.append(weights, float(distribution.zeros))
    if points.size:
        centres = _lloyd(points, weights, max(k - keeps_zero, 1), seed)
    else:
        centres = points
    if keeps_zero:
        centres = np.append(centres, 0.0)
    return _measured(np.unique(centres), distribution, itemsize)


def grid(distribution: Histogram, k: int, itemsize: int) -> Codebook:
    """Find a codebook from k cells of equal width: the means of their entries.

    Frequent values share long cells, so that the numbers of the cells take fewer bits under an entropy code than those
    of as good a k-means (Gish and Pierce, "Asymptotically efficient quantizing", 1968).

    Args:
        distribution: Distribution of the entries of a tensor.
        k: Number of cells, odd: zero is the middle of one.
        itemsize: Bytes of an entry.

    Returns:
        The codebook.
    """
    points = distribution.points
    weights = distribution.weights
    middle = k // 2
    width = 2 * float(np.abs(points).max(initial=0.0)) / k or 1.0
    cells = np.clip(np.rint(points / width), -middle, middle).astype(np.int64) + middle
    in_cell = np.bincount(cells, weights, k)
    sums = np.bincount(cells, weights * points, k)
    used = in_cell > 0
    used[middle] = False
    means = sums[used] / in_cell[used]
    return _measured(np.unique(np.append(means, 0.0)), distribution, itemsize)


def nearest(values: Floats, points: Floats) -> Array:
    """Find the nearest value of each point; a point half way between two takes the upper one.

    Args:
        values: Ascending values (k,).
        points: Points (n,).

    Returns:
        Indices of values (n,).
    """
    borders = (values[1:] + values[:-1]) / 2
    return np.searchsorted(borders, points, side="right")


def share(place: Place, words: Array, values: Floats) -> Array:
    """Replace the entries of a tensor by the nearest values of a codebook.

    Args:
        place: The tensor.
        words: Its words (n,).
        values: Values of the codebook (k,), ascending.

    Returns:
        The new words (n,). Zeros stay exact if zero is a value.
    """
    dtype = onnx.helper.tensor_dtype_to_np_dtype(place.type)
    rounded = values.astype(dtype).view(words.dtype.newbyteorder("="))
    return np.asarray(rounded[nearest(values, numbers(place, words))])


def _measured(
    values: Floats,
    distribution: Histogram,
    itemsize: int,
) -> Codebook:
    points = np.append(distribution.points, 0.0)
    weights = np.append(distribution.weights, float(distribution.zeros))
    labels = nearest(values, points)
    error = float(weights @ np.square(points - values[labels])) / distribution.count
    bits = entropy.entropy(np.bincount(labels, weights, len(values)))
    nbytes = bits * distribution.count / 8 + itemsize * len(values)
    return Codebook(values, error, nbytes)


def _lloyd(
    points: Floats,
    weights: Floats,
    k: int,
    seed: int,
) -> Floats:
    """Centres (k,) of weighted points by k-means."""
    if len(points) <= k:
        return points
    check()
    from sklearn.cluster import KMeans

    order = np.argsort(points, kind="stable")
    points = points[order]
    weights = weights[order]
    gaps = np.gradient(points) if len(points) > 1 else np.ones(1)
    density = np.cumsum(np.cbrt(weights / gaps) * gaps)
    quantiles = (np.arange(k) + 0.5) / k * density[-1]
    initial = points[np.minimum(np.searchsorted(density, quantiles), len(points) - 1)]
    # Scaled, so that the tolerance means the same for all tensors.
    centre = float(weights @ points) / weights.sum()
    spread = float(points[-1] - points[0])
    start = (initial - centre) / spread
    scaled = (points - centre) / spread
    machine = KMeans(k, init=start[:, None], n_init=1, max_iter=ROUNDS, tol=1e-6, random_state=seed)
    # In one thread, so that sums have one order.
    with threadpool_limits(1):
        fitted = machine.fit(scaled[:, None], sample_weight=weights)
    return np.asarray(fitted.cluster_centers_[:, 0] * spread + centre, np.float64)
