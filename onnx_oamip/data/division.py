"""Choice of the groups of samples that are held out.

Windows of one recording, or crops of one photograph, are alike: a model that was fitted to some of them answers the
others too well for a test. Where the data name what each sample is a part of, no group is on both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Bools, Floats, Ints

DRAWS = 256
"""Random choices of which the one with the most even shares of the classes is taken."""


def held_out_groups(groups: Array, wanted: int, seed: int, classes: Ints | None) -> Bools:
    """Choose the groups that are held out.

    Args:
        groups: Group of every sample.
        wanted: Number of samples to hold out. The number that is held out comes close to it.
        seed: Seed of the choice.
        classes: Class of every sample, None if unknown. Both parts get their share of every class as far as possible.

    Returns:
        True for samples that are held out.

    Raises:
        DataError: All samples are of one group.
    """
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise DataError(
            "all samples are of one group, so that no group can be held out; give samples of several groups, or "
            "held-out samples."
        )
    rng = np.random.default_rng(seed)

    def draw() -> Bools:
        chosen: Bools = _whole(sizes, wanted, rng)[members.reshape(-1)]
        return chosen

    return draw() if classes is None else _most_even(draw, classes, wanted / len(groups))


def _whole(sizes: Ints, wanted: int, rng: np.random.Generator) -> Bools:
    """Random groups, each taken if the number of samples comes closer to that wanted; at least the smallest group."""
    chosen = np.zeros(len(sizes), bool)
    missing = wanted
    for group in rng.permutation(len(sizes)):
        if missing <= 0:
            break
        if sizes[group] < 2 * missing:
            chosen[group] = True
            missing -= int(sizes[group])
    if not chosen.any():
        chosen[np.argmin(sizes)] = True
    return chosen


def _most_even(draw: Callable[[], Bools], classes: Ints, share: float) -> Bools:
    """The first of some random choices with the smallest deviation from the share of every class."""
    _, members, counts = np.unique(classes, return_inverse=True, return_counts=True)
    # Of a class with two samples or more, either part has one.
    wanted: Floats = np.where(counts > 1, np.maximum(np.round(share * counts), 1), 0.0)
    best, least = draw(), np.inf
    for _ in range(DRAWS):
        chosen = draw()
        found = np.bincount(members[chosen], minlength=len(counts))
        deviation = float(((found - wanted) ** 2 / np.maximum(wanted, 1)).sum())
        if deviation < least:
            best, least = chosen, deviation
    return best
