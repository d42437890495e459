"""The data: scikit-learn's digits, all 1,797 images of 8x8 pixels, of which the last 500 are held out.

They are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, data set 80; CC BY 4.0), as scikit-learn bundles them (BSD 3-Clause). Pixels are whole numbers
from 0 to 16, and networks are fed pixels / 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

FILE = "digits.npz"
HELD_OUT = 500
SCALE = 1 / 16
Array = npt.NDArray[np.generic]


def write(folder: Path) -> None:
    """Write ``digits.npz``: uint8 ``images`` [n, 8, 8] and int64 ``labels`` [n], and the same held out as ``eval.``."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = found.images.astype(np.uint8), found.target.astype(np.int64)
    assert (images == found.images).all()
    cut = len(images) - HELD_OUT
    np.savez_compressed(
        folder / FILE,
        images=images[:cut],
        labels=labels[:cut],
        **{"eval.images": images[cut:], "eval.labels": labels[cut:]},
    )


def training(folder: Path, *shape: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(images, labels) to train on: float32 [n, *shape] in [0, 1], and int64 [n]."""
    with np.load(folder / FILE) as stored:
        return stored["images"].reshape(-1, *shape).astype(np.float32) * np.float32(SCALE), stored[
            "labels"
        ]


def data_file(folder: Path, path: Path, name: str, shape: Sequence[int]) -> None:
    """Write what ``onnx-oamip --data`` takes: the digits under the name and in the shape of a network's input."""
    with np.load(folder / FILE) as stored:
        np.savez(
            path,
            **{
                name: stored["images"].reshape(-1, *shape),
                f"{name}.scale": np.float64(SCALE),
                f"eval.{name}": stored["eval.images"].reshape(-1, *shape),
                "labels": stored["labels"],
                "eval.labels": stored["eval.labels"],
            },
        )
