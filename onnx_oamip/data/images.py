"""Images as samples: found in a folder, decoded, brought to the model's size and layout, kept as 8-bit codes.

Values are ``(code * scale - mean) / std`` per colour channel. Codes stay 8-bit, many of them in a temporary file, and
become values batch by batch.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.records import (
    Array,
    Ints,
    Port,
    Reading,
)
from onnx_oamip.data.out_of_core import Spool, Values

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
PIXELS = 1 << 24
"""Pixels that any image may have; 4 bytes each while it is read."""
DENSITY = 64
"""... and for each byte of it: photographs have 2 to 20, one colour has thousands."""


@dataclass(frozen=True)
class Form:
    """What an image input looks like: layout, channels and (height, width)."""

    layout: str
    channels: int
    size: tuple[int, int]


def check(where: str) -> None:
    """Raise EnvironmentMissing, naming the data, where the extra ``images`` is not installed."""
    with imports_of("images", f"reading the images of {where}"):
        import PIL.Image  # noqa: F401


def folder(path: Path, port: Port, reading: Reading) -> tuple[Values, Ints | None, str]:
    """(codes, labels, where they are from) of the images in a folder and the folders in it.

    Where every image lies in a folder of its class the classes are numbered by the sorted names of these folders. Of
    more than ``reading.most`` images every class gives its share, evenly spaced. Raises DataError for a folder without
    images, for a file that is no image, and where the model's input is none.
    """
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise DataError(
            f"{path} is a folder without images ({', '.join(sorted(SUFFIXES))}); give images or an .npz."
        )
    by_class: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        parts = file.relative_to(path).parts
        by_class[parts[0] if len(parts) > 1 else ""].append(file)
    names = sorted(by_class)
    chosen = files if len(files) <= reading.most else _spread(by_class, reading.most)
    labelled = "" not in by_class and len(names) > 1
    number = {name: i for i, name in enumerate(names)}
    labels = [number[f.relative_to(path).parts[0]] for f in chosen] if labelled else None
    codes = decode([(str(f), f.read_bytes) for f in chosen], port, reading, str(path))
    some = f" ({len(chosen):,} of {len(files):,} images)" if len(chosen) < len(files) else ""
    return codes, None if labels is None else np.asarray(labels, np.int64), f"{path}{some}"


def _spread(by_class: dict[str, list[Path]], most: int) -> list[Path]:
    """``most`` files, as even over the classes as these allow, each class evenly spaced."""
    sizes = np.asarray([len(files) for files in by_class.values()])
    quota = next(q for q in range(1, int(sizes.max()) + 1) if np.minimum(sizes, q).sum() >= most)
    counts = np.minimum(sizes, quota)
    counts[np.flatnonzero(counts == quota)[: counts.sum() - most]] -= 1
    chosen: list[Path] = []
    for files, count in zip(by_class.values(), counts.tolist(), strict=True):
        chosen.extend(files[i] for i in np.linspace(0, len(files) - 1, count).round().astype(int))
    return sorted(chosen)


def decode(
    sources: Sequence[tuple[str, Callable[[], bytes]]], port: Port, reading: Reading, where: str
) -> Values:
    """Codes (samples, *input shape without the batch) uint8 of named images: functions that give their bytes."""
    check(where)
    from PIL import Image, ImageOps, UnidentifiedImageError

    form = image_form(port, reading, where)
    height, width = form.size
    spool = Spool(f"the images of {where}")
    for name, content in sources:
        try:
            data = content()
            with Image.open(io.BytesIO(data)) as image:
                _bounded(image, len(data))
                ImageOps.exif_transpose(image, in_place=True)
                mode = MODES[form.channels]
                same = image if image.mode == mode else image.convert(mode)
                code = np.asarray(_fitted(same, form.size, reading.fit)).reshape(
                    height, width, form.channels
                )
        except UnidentifiedImageError as error:
            what = "it has no format of images that is known" if data else "it is empty"
            raise DataError(
                f"{name} cannot be read as an image: {what}; mend or remove it."
            ) from error
        except Exception as error:  # what broken images make Pillow raise is not documented
            text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DataError(
                f"{name} cannot be read as an image: {text.rstrip('.')}; mend or remove it."
            ) from error
        if reading.color == "bgr" and form.channels >= 3:
            code = np.concatenate([code[..., 2::-1], code[..., 3:]], axis=-1)
        spool.append(code.transpose(2, 0, 1) if form.layout == "nchw" else code)
    shape = (
        (form.channels, height, width) if form.layout == "nchw" else (height, width, form.channels)
    )
    return spool.finish((len(sources), *shape), np.dtype(np.uint8))


def _bounded(image: Image.Image, size: int) -> None:
    """Raises ValueError for an image of ``size`` bytes that is much larger once it is decoded."""
    most = max(PIXELS, DENSITY * size)
    if image.width * image.height > most:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels in {size:,} bytes, more than {most:,}"
        )


def affine(port: Port, reading: Reading, where: str) -> tuple[Array, Array]:
    """(scale, offset) that turn codes into values, float32, of a shape that meets one sample channel by channel."""
    form = image_form(port, reading, where)
    parts = []
    for name, given in (("mean", reading.mean), ("std", reading.std)):
        if len(given) not in (1, form.channels):
            raise DataError(
                f"`image_{name}` has {len(given)} values, but the input '{port.name}' has {form.channels} channels; "
                f"give 1 or {form.channels}."
            )
        parts.append(np.broadcast_to(np.asarray(given, np.float64), (form.channels,)))
    mean, std = parts
    view = (form.channels, 1, 1) if form.layout == "nchw" else (form.channels,)
    return (reading.scale / std).astype(np.float32).reshape(view), (-mean / std).astype(
        np.float32
    ).reshape(view)


def image_form(port: Port, reading: Reading, where: str) -> Form:
    """Layout, channels and size of an image input. Raises DataError where it is none, or leaves the size open."""
    dims = port.dims
    expected = f"{port.dtype} [{', '.join('?' if d is None else str(d) for d in dims)}]"
    if len(dims) != 4:
        raise DataError(
            f"{where} holds images, but the model's input '{port.name}' is {expected}, without four axes."
        )
    layout: str = reading.layout
    if layout == "auto":
        layout = "nhwc" if dims[3] in MODES and dims[1] not in MODES else "nchw"
    channels, *sides = (
        (dims[1], dims[2], dims[3]) if layout == "nchw" else (dims[3], dims[1], dims[2])
    )
    if not isinstance(channels, int) or channels not in MODES:
        raise DataError(
            f"{where} holds images, but the model's input '{port.name}' is {expected} and read as {layout} has "
            f"{channels} channels; images have 1, 3 or 4: set `image_layout`, or give an .npz."
        )
    size = []
    for axis, (asked, own) in enumerate(zip(reading.size or (None, None), sides, strict=True)):
        fixed = own if isinstance(own, int) and own > 0 else None
        if fixed is None and asked is None:
            raise DataError(
                f"the model's input '{port.name}' is {expected}, which leaves the images' size open; say it with "
                "`image_size`, as 224 or 224x320."
            )
        if fixed is not None and asked is not None and asked != fixed:
            raise DataError(
                f"`image_size` gives a {('height', 'width')[axis]} of {asked}, but the model's input '{port.name}' is "
                f"{expected}."
            )
        size.append(int(asked or fixed or 0))
    return Form(layout, channels, (size[0], size[1]))


def _fitted(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    from PIL import Image, ImageOps

    wide = (size[1], size[0])
    resample = Image.Resampling.BILINEAR
    if fit == "stretch":
        return image.resize(wide, resample)
    if fit == "pad":
        return ImageOps.pad(image, wide, resample)
    return ImageOps.fit(image, wide, resample)
