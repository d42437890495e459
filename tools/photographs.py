"""Crops of real photographs out of Debian packages, for networks that take natural images.

    apt-get download gcompris-qt-data lomiri-wallpapers-16.04 mate-backgrounds
    for file in *.deb; do dpkg -x "$file" DIR; done

gives a folder DIR with about 260 photographs: animals, food, tools, plants, scenes and monuments of GCompris (WebP
files inside its resource files), and photographs among the backgrounds of Lomiri and MATE. Half of them, chosen by a
seed, give the crops for calibration, the other half those that are held out, so no photograph is on both sides. Needs
Pillow.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

RESOURCES = (
    "categorization",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
BACKGROUNDS = ("", "mate/nature")
LEAST = 200
"""Pixels that the shorter side of a photograph has at least; smaller ones are icons."""
THUMBNAIL, SAME = (8, 8), 8.0
"""Size of a thumbnail, and the mean difference (of 255) up to which two show the same photograph."""
SIZE = 224
SEED = 20240501
Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")


def find(folder: Path) -> list[Image.Image]:
    """Photographs of the packages unpacked in ``folder``, in a fixed order; some or all may be missing.

    Two that look the same as thumbnails are one photograph in two sizes, and only the first is given.
    """
    files: dict[bytes, None] = {}
    for name in RESOURCES:
        path = folder / "usr/share/gcompris-qt/rcc" / f"{name}.rcc"
        if path.exists():
            files |= dict.fromkeys(webp(path.read_bytes()))
    for part in BACKGROUNDS:
        for path in sorted((folder / "usr/share/backgrounds" / part).glob("*.jpg")):
            files[path.read_bytes()] = None
    images = [Image.open(io.BytesIO(data)) for data in files]
    images = [image for image in images if image.mode == "RGB" and min(image.size) >= LEAST]
    small = [
        np.asarray(image.resize(THUMBNAIL, Image.Resampling.BOX), np.float32) for image in images
    ]
    seen: list[npt.NDArray[np.float32]] = []
    kept = []
    for image, thumbnail in zip(images, small, strict=True):
        if all(np.abs(thumbnail - other).mean() > SAME for other in seen):
            kept.append(image)
            seen.append(thumbnail)
    return kept


def webp(data: bytes) -> Iterator[bytes]:
    """The WebP files that lie uncompressed in a resource file (a RIFF header says how long each is)."""
    at = data.find(b"RIFF")
    while at >= 0:
        (length,) = struct.unpack_from("<I", data, at + 4)
        if data[at + 8 : at + 12] == b"WEBP":
            yield data[at : at + 8 + length]
        at = data.find(b"RIFF", at + 4)


def split(photographs: Sequence[T], seed: int = SEED) -> tuple[list[T], list[T]]:
    """Two halves of the photographs, by chance: for calibration, and held out."""
    order = np.random.default_rng(seed).permutation(len(photographs))
    middle = (len(order) + 1) // 2
    return [photographs[i] for i in order[:middle]], [photographs[i] for i in order[middle:]]


def crops(
    photographs: Sequence[Image.Image],
    count: int,
    seed: int = SEED,
    size: int = SIZE,
) -> Pixels:
    """``count`` square crops as uint8 [count, 3, size, size], as many of each photograph as can be.

    The first of a photograph is its middle square; the others have sides between four tenths of it and all of it,
    anywhere, half of them mirrored.
    """
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        image = photographs[index % len(photographs)]
        width, height = image.size
        side = min(image.size)
        left, top, mirrored = (width - side) // 2, (height - side) // 2, False
        if index >= len(photographs):
            side = round(side * rng.uniform(0.4, 1.0))
            left, top = (int(rng.integers(n - side + 1)) for n in image.size)
            mirrored = bool(rng.random() < 0.5)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(
            image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        )
        made.append(pixels[:, ::-1] if mirrored else pixels)
    return np.ascontiguousarray(np.stack(made).transpose(0, 3, 1, 2))
