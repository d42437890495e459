"""A data set like KMNIST, which no package registry has: ten hiragana of Japanese fonts, deformed at random.

    python -m tools.experiments.kana --out DIR

Writes the four IDX files of MNIST's form: 60,000 images for training and 10,000 for tests of the same glyphs, every
one rotated, scaled, sheared, moved and bent at random. Brush, handwriting and printed fonts come from Debian packages:
``apt-get install PACKAGE ...`` with the packages that ``--help`` lists. The characters are those of KMNIST, which has
historical manuscripts in place of fonts.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from onnx_oamip.core.records import Floats

from .data import STEMS, Bytes, Labels

CLASSES = "おきすつなはまやれを"
FONTS = {
    "fonts-aoyagi-kouzan-t": ("aoyagi-kouzan-t/AoyagiKouzanT.ttf",),
    "fonts-aoyagi-soseki": ("aoyagi-soseki/aoyagi-soseki.ttf",),
    "fonts-kouzan-mouhitsu": (
        "kouzan-mouhitsu/KouzanBrushFontSousyo.ttf",
        "kouzan-mouhitsu/kouzan-mouhitsu-gyosho.ttf",
        "kouzan-mouhitsu/kouzan-mouhitsu.ttf",
    ),
    "fonts-kiloji": ("kiloji/kiloji.ttf", "kiloji/kiloji_b.ttf"),
    "fonts-seto": ("seto/setofont.ttf",),
    "fonts-konatu": ("konatu/Konatu.ttf",),
    "fonts-dejima-mincho": ("dejima-mincho/dejima-mincho-r227.ttf",),
    "fonts-sawarabi-mincho": ("sawarabi-mincho/sawarabi-mincho-medium.ttf",),
}
FOLDER = Path("/usr/share/fonts/truetype")
COUNTS = {"train": 60_000, "test": 10_000}
SIDE = 28
DRAWN = 84
"""Side of the glyphs that images are sampled from."""
MARGIN = 0.05
"""Part of that side that is left free at every border."""
TURN, SCALE, SHEAR, MOVE, BEND = 0.2, 0.15, 0.25, 0.08, 0.06
"""Standard deviations: angle in radians, logarithm of the size, shear, and parts of the side."""
KNOTS = 4
"""Points on each axis at which an image is bent, with straight lines between them."""
BATCH = 2000


def glyphs() -> Floats:
    """Draw all glyphs.

    Returns:
        Grey values in [0, 1] (fonts, classes, DRAWN, DRAWN).
    """
    files = [FOLDER / name for names in FONTS.values() for name in names]
    return np.stack([[_glyph(file, character) for character in CLASSES] for file in files])


def _glyph(file: Path, character: str) -> Floats:
    """One glyph in the middle of the square, as large as its margin leaves."""
    large = ImageFont.truetype(str(file), 4 * DRAWN)
    left, top, right, bottom = large.getbbox(character)
    square = max(right - left, bottom - top)
    image = Image.new("L", (int(square), int(square)))
    middle = ((square - right - left) / 2, (square - bottom - top) / 2)
    ImageDraw.Draw(image).text(middle, character, 255, large)
    inner = round(DRAWN * (1 - 2 * MARGIN))
    found = np.zeros((DRAWN, DRAWN))
    start = (DRAWN - inner) // 2
    small = image.resize((inner, inner), Image.Resampling.LANCZOS)
    found[start : start + inner, start : start + inner] = np.asarray(small) / 255
    return found


def deformed(drawn: Floats, rng: np.random.Generator) -> Bytes:
    """Deform glyphs.

    Args:
        drawn: Glyphs (n, DRAWN, DRAWN).
        rng: Draws the deformations.

    Returns:
        Images (n, SIDE, SIDE).
    """
    n = len(drawn)
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    angle, size = TURN * rng.standard_normal(n), np.exp(SCALE * rng.standard_normal(n))
    shear = SHEAR * rng.standard_normal(n)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=-1)
    slant = np.stack([np.ones(n), np.zeros(n), shear, np.ones(n)], axis=-1)
    matrices = turn.reshape(n, 2, 2) @ slant.reshape(n, 2, 2) * size[:, None, None]
    places = np.einsum("pj,nij->npi", grid, matrices)
    places += MOVE * rng.standard_normal((n, 1, 2))
    knots = np.linspace(-0.5, 0.5, KNOTS)
    hats = np.maximum(0, 1 - np.abs(axis[:, None] - knots) * (KNOTS - 1))
    bend = BEND * rng.standard_normal((n, KNOTS, KNOTS, 2))
    places += np.einsum("ak,bl,nkli->nabi", hats, hats, bend).reshape(n, -1, 2)
    values = _sampled(drawn, (places + 0.5) * DRAWN - 0.5)
    return np.round(255 * values).astype(np.uint8).reshape(n, SIDE, SIDE)


def _sampled(drawn: Floats, places: Floats) -> Floats:
    """Bilinear values of every glyph at its places (n, points, 2); nothing beyond the border."""
    padded = np.pad(drawn, ((0, 0), (1, 1), (1, 1)))
    places = np.clip(places + 1, 0, DRAWN + 0.999)
    low = places.astype(np.int64)
    part = places - low
    row, column = low[..., 0], low[..., 1]
    down, right = part[..., 0], part[..., 1]
    glyph = np.arange(len(drawn))[:, None]
    upper = padded[glyph, row, column] * (1 - right) + padded[glyph, row, column + 1] * right
    lower = (
        padded[glyph, row + 1, column] * (1 - right) + padded[glyph, row + 1, column + 1] * right
    )
    found: Floats = upper * (1 - down) + lower * down
    return found


def make(count: int, seed: int) -> tuple[Bytes, Labels]:
    """Make a data set.

    Args:
        count: Number of images.
        seed: Seed of all draws.

    Returns:
        Images (count, SIDE, SIDE) and labels (count,); fonts and classes are drawn with equal chances.
    """
    rng = np.random.default_rng(seed)
    drawn = glyphs()
    labels = rng.integers(len(CLASSES), size=count)
    fonts = rng.integers(len(drawn), size=count)
    parts = [
        deformed(drawn[fonts[start : start + BATCH], labels[start : start + BATCH]], rng)
        for start in range(0, count, BATCH)
    ]
    return np.concatenate(parts), labels


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.kana",
        description=__doc__,
        epilog=f"packages: {' '.join(FONTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    folder: Path = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate(COUNTS.items()):
        images, labels = make(count, seed)
        for kind, values in (("images", images), ("labels", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, values.ndim])
            sizes = np.asarray(values.shape, ">u4").tobytes()
            path = folder / f"{STEMS[f'{part}_{kind}']}.gz"
            path.write_bytes(gzip.compress(header + sizes + values.tobytes(), 6, mtime=0))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
