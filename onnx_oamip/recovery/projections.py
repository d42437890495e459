"""Projections: features at which the channels of the pruned model are combinations of the original's.

Such are principal components, and channels cut by another tool or without a known plan. There the pruned model is
compared with combinations of the original's channels, which are found from its own values before training. With the
channels x of the original and those z of the pruned model,

    minimise  sum_positions |P x + p - z|^2 + ridge |P|^2     over P and p.

What pruning took away is missing in z: a channel is ``z = y - r`` with y the combination that it stands for, and with r
uncorrelated with z, as after a least-squares refit. The regression of z on y then has the slope ``var(z) / var(y)``,
which is also the share of the variance of z that y explains. Every combination is therefore divided by the share that
it explains; else the pruned model would be held to what it has lost already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.cholesky import Cholesky
from onnx_oamip.core.records import Array, Floats, Ints, Model
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.im2col import pick
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.recovery.features import Feature, Projection, block_ends

SAMPLES = 512
"""Most samples that projections are fitted to."""
POSITIONS = 1 << 14
"""Most positions of a tensor in one run that projections are fitted to."""
MOST_CHANNELS = 2048
"""Channels of the original above which none is fitted, which takes cubic time."""
RIDGE = 1e-6
"""Ridge, relative to the mean variance of the original's channels."""
LEAST_EXPLAINED = 0.5
"""Share of the variance of the pruned model's channels from which a projection is used."""
LEAST_SHARE = 0.25
"""Least share that a combination is divided by."""
TINY = 1e-30
"""Replaces a variance of 0 as divisor."""


@dataclass(frozen=True)
class Projected:
    """Tensors that are compared by projections.

    Attributes:
        features: Ends of blocks with fewer channels in the pruned model, in graph order, each with its projection.
        left_out: Reason by tensor why an end of a block is not compared.
    """

    features: tuple[Feature, ...]
    left_out: Mapping[str, str]


def projected(
    original: Model,
    pruned: Model,
    known: Collection[str],
    samples: Samples,
    *,
    device: str,
    batch_size: int,
    seed: int,
) -> Projected:
    """Find further tensors at which both models can be compared, and fit their projections.

    Args:
        original: The original.
        pruned: The pruned model before training.
        known: Tensors that are compared already.
        samples: Samples to fit to.
        device: Device of ONNX Runtime.
        batch_size: Samples of one run.
        seed: Seed of the choice of positions.

    Returns:
        The tensors with their projections, and the reasons why other ends of blocks cannot be compared.
    """
    axes, left_out = _narrowed_axes(original, pruned, known)
    if not axes:
        return Projected((), left_out)
    fits = {name: _Fit(original.shapes[name][axis]) for name, axis in axes.items()}
    names = list(axes)
    sessions = [
        Session(with_outputs(model, names), device, what=what)
        for model, what in ((original, "the original"), (pruned, "the pruned model"))
    ]
    rng = np.random.default_rng(seed)
    for _, feed in samples.first(SAMPLES).batches(batch_size):
        wide, narrow = (session.run(feed, names) for session in sessions)
        for name, x, z in zip(names, wide, narrow, strict=True):
            rows = pick(x.size // x.shape[axes[name]], POSITIONS, rng)
            fits[name].add(*(_channels(value, axes[name], rows) for value in (x, z)))
    found = []
    for name, axis in axes.items():
        solved = fits[name].solved()
        if isinstance(solved, str):
            left_out[name] = solved
        else:
            found.append(Feature(name, projection=Projection(axis, *solved)))
    return Projected(tuple(found), left_out)


def _narrowed_axes(
    original: Model, pruned: Model, known: Collection[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Axis of the channels by tensor, and the reason by tensor why it has none that is compared."""
    axes, left_out = {}, {}
    for name in block_ends(original):
        if name in known:
            continue
        found = _narrowed_axis(original.shapes.get(name), pruned.shapes.get(name))
        if isinstance(found, int):
            axes[name] = found
        else:
            left_out[name] = found
    return axes, left_out


def _narrowed_axis(wide: tuple[int, ...] | None, narrow: tuple[int, ...] | None) -> int | str:
    """The only axis along which the pruned model is narrower; the reason where there is none."""
    if wide is None or narrow is None:
        return "the pruned model has no such tensor, or its shape is not known"
    if len(wide) != len(narrow):
        return "the two models have different numbers of axes there"
    other = [axis for axis in range(len(wide)) if wide[axis] != narrow[axis]]
    if len(other) != 1 or narrow[other[0]] > wide[other[0]]:
        return "the pruned model is not narrower along one axis alone"
    if wide[other[0]] > MOST_CHANNELS:
        return f"more than {MOST_CHANNELS:,} channels to combine"
    return other[0]


def _channels(value: Array, axis: int, rows: Ints) -> Floats:
    """The channels of a tensor at some positions (positions, channels)."""
    by_position = np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis])
    found: Floats = by_position[rows].astype(np.float64)
    return found


class _Fit:
    """Sums of the least-squares problem of one tensor."""

    def __init__(self, channels: int) -> None:
        self._gram: Floats = np.zeros((channels, channels))
        self._products: Floats | float = 0.0
        self._squares: Floats | float = 0.0
        self._sum_x: Floats = np.zeros(channels)
        self._sum_z: Floats | float = 0.0
        self._count = 0

    def add(self, x: Floats, z: Floats) -> None:
        """Add channels of the original, and those of the pruned model (positions, channels)."""
        is_finite = np.isfinite(x).all(axis=1) & np.isfinite(z).all(axis=1)
        x, z = x[is_finite], z[is_finite]
        self._gram += x.T @ x
        self._products = self._products + x.T @ z
        self._squares = self._squares + np.square(z).sum(axis=0)
        self._sum_x += x.sum(axis=0)
        self._sum_z = self._sum_z + z.sum(axis=0)
        self._count += len(x)

    def solved(self) -> tuple[Floats, Floats] | str:
        """The projection (channels, channels of the pruned model) and the shift; the reason where there is none."""
        if not self._count:
            return "no position has finite values in both models"
        mean_x, mean_z = self._sum_x / self._count, np.asarray(self._sum_z / self._count)
        covariance = self._gram / self._count - np.outer(mean_x, mean_x)
        products = self._products / self._count - np.outer(mean_x, mean_z)
        variance = np.maximum(self._squares / self._count - np.square(mean_z), 0.0)
        size = len(covariance)
        ridge = RIDGE * float(np.trace(covariance)) / size
        if not ridge > 0 or not variance.any():
            return "the channels of one model are constant"
        matrix = Cholesky.of(covariance + ridge * np.eye(size)).solve(products)
        # The error of a ridge solution is at most the variance less the products with it.
        explained = (matrix * products).sum(axis=0)
        share = float(explained.sum() / variance.sum())
        if share < LEAST_EXPLAINED:
            return f"combinations of the original's channels explain {share:.0%} of the variance, less than half"
        shares = np.clip(explained / np.maximum(variance, TINY), LEAST_SHARE, 1.0)
        matrix = matrix / shares
        return matrix, mean_z - mean_x @ matrix
