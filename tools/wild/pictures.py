"""Pictures: crops of photographs, pages and lines of text, captchas, faces, fingerprints."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from .. import photographs
from .sounds import SENTENCES

Pixels = npt.NDArray[np.uint8]
INSTALL = (
    "photographs are missing: apt-get download gcompris-qt-data lomiri-wallpapers-16.04 mate-backgrounds, then "
    "dpkg -x each into"
)


@functools.lru_cache(maxsize=1)
def photos(folder: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """Photographs for calibration, and those that are held out.

    Raises:
        RuntimeError: The folder has none.
    """
    found = photographs.find(folder)
    if not found:
        raise RuntimeError(f"{INSTALL} {folder}.")
    return photographs.split(found)


def crop(rng: np.random.Generator, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A random part of an image, resized to (height, width)."""
    height, width = size
    share = rng.uniform(0.5, 1.0)
    scale = share * min(image.width / width, image.height / height)
    wide, high = round(width * scale), round(height * scale)
    left, top = rng.integers(image.width - wide + 1), rng.integers(image.height - high + 1)
    box = (int(left), int(top), int(left) + wide, int(top) + high)
    made = image.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    return ImageOps.mirror(made) if rng.random() < 0.5 else made


def crops(
    rng: np.random.Generator, folder: Path, part: int, count: int, size: tuple[int, int]
) -> Pixels:
    """Crops of photographs [count, height, width, 3]."""
    held = photos(folder)[part]
    order = rng.permutation(len(held))
    made = [np.asarray(crop(rng, held[order[i % len(held)]], size)) for i in range(count)]
    return np.stack(made)


def colour(rng: np.random.Generator, dark: bool) -> tuple[int, int, int]:
    """A dark or a light colour."""
    low, high = (0, 90) if dark else (170, 256)
    red, green, blue = (int(value) for value in rng.integers(low, high, 3))
    return red, green, blue


def words(rng: np.random.Generator, part: int, count: int) -> str:
    """Words of the sentences of one part, some of them numbers."""
    held = " ".join(SENTENCES[part]).split()
    chosen = [str(rng.choice(held)) for _ in range(count)]
    return " ".join(w if rng.random() < 0.85 else str(rng.integers(10_000)) for w in chosen)


def line(rng: np.random.Generator, part: int, size: tuple[int, int]) -> Image.Image:
    """One line of text that fills an image of (height, width), slightly blurred."""
    height, width = size
    font = ImageFont.load_default(height * rng.uniform(0.55, 0.8))
    image = Image.new("RGB", (width, height), colour(rng, dark=False))
    text = words(rng, part, 12)
    while len(text) > 2 and font.getlength(text) > width - 6:
        text = text[:-1]
    ImageDraw.Draw(image).text((3, height * 0.08), text, colour(rng, dark=True), font)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))


def page(
    rng: np.random.Generator, part: int, size: tuple[int, int], behind: Image.Image | None = None
) -> Image.Image:
    """A page of paragraphs, headings, rules and grey boxes, or lines of text over a photograph."""
    height, width = size
    image = behind or Image.new("RGB", (width, height), colour(rng, dark=False))
    draw, top = ImageDraw.Draw(image), rng.uniform(0.02, 0.08) * height
    while top < height * 0.93:
        kind, points = rng.integers(6), max(10.0, height * rng.uniform(0.018, 0.05))
        if kind == 0 and behind is None:
            deep = height * rng.uniform(0.08, 0.2)
            draw.rectangle((width * 0.1, top, width * rng.uniform(0.4, 0.9), top + deep), "#888888")
            top += deep * 1.2
            continue
        font = ImageFont.load_default(points)
        for _ in range(1 if kind == 1 else rng.integers(2, 6)):
            text = words(rng, part, rng.integers(2, 12))
            draw.text((width * 0.06, top), text, colour(rng, behind is None), font)
            top += points * 1.35
        top += points * rng.uniform(0.5, 2.5)
    return image


def captcha(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """Five characters, turned and shifted, under lines and dots."""
    height, width = size
    image = Image.new("RGB", (width, height), colour(rng, dark=False))
    text = "".join(rng.choice(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 5))
    for i, character in enumerate(text):
        tile = Image.new("L", (height, height), 0)
        font = ImageFont.load_default(height * rng.uniform(0.5, 0.7))
        ImageDraw.Draw(tile).text((height * 0.25, height * 0.1), character, 255, font)
        tile = tile.rotate(rng.uniform(-20, 20))
        image.paste(colour(rng, dark=True), (int(i * width * 0.18), int(rng.integers(-4, 5))), tile)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 5)):
        ends = [tuple(rng.uniform(0, (width, height))) for _ in range(2)]
        draw.line(ends, colour(rng, dark=True))
    return image, text


def fingerprint(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """Ridges that follow a field of orientations with one core; light on dark borders, as uint8."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float64)
    at = rng.uniform(0.35, 0.65, 2) * (height, width)
    turned = np.arctan2(y - at[0], x - at[1])
    distance = np.hypot(y - at[0], 1.2 * (x - at[1]))
    period, bend = rng.uniform(7, 10), rng.uniform(2, 8)
    coarse = rng.standard_normal((height // 40 + 2, width // 40 + 2))
    waves = Image.fromarray(coarse.astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    phase = distance / period + bend * np.sin(turned) / 6 + 0.8 * np.asarray(waves)
    ridges = 127 + 90 * np.sin(2 * np.pi * phase) + rng.normal(0, 12, size)
    inside = ((y - height / 2) / (height * 0.45)) ** 2 + ((x - width / 2) / (width * 0.42)) ** 2 < 1
    return np.clip(np.where(inside, ridges, 255), 0, 255).astype(np.uint8)


def faces(paths: Sequence[Path], rng: np.random.Generator, count: int) -> list[Pixels]:
    """Variants of photographs with faces: sizes, mirrored, brightness."""
    made = []
    for i in range(count):
        image = Image.open(paths[i % len(paths)]).convert("RGB")
        side = rng.uniform(260, 420)
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        image = ImageOps.mirror(image) if i // len(paths) % 2 else image
        bright = rng.uniform(0.7, 1.25)
        made.append(np.clip(np.asarray(image) * bright, 0, 255).astype(np.uint8))
    return made
