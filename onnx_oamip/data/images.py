"""Images as samples: found in a folder, decoded, fitted to the model's size and layout, stored as 8-bit codes.

Values are ``(code * scale - mean) / std`` per colour channel. Codes stay 8-bit, many of them in a temporary file, and
become values when a feed is made.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.records import (
    Array,
    Ints,
    Port,
    Reading,
)
from onnx_oamip.data.array_checks import Scaling
from onnx_oamip.data.out_of_core import Spool, Values

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode by number of channels."""
ALWAYS_ALLOWED_PIXELS = 1 << 24
"""Pixels that any image may have; 4 bytes each while it is read."""
MAX_PIXELS_PER_BYTE = 64
"""Pixels per byte of a larger image: photographs have 2 to 20, an image of one colour has thousands."""
MAX_REASON_CHARACTERS = 200
"""Characters of Pillow's message in an error."""


@dataclass(frozen=True)
class ImageInput:
    """Layout of an input that takes images.

    Attributes:
        layout: Order of the axes, ``nchw`` or ``nhwc``.
        channels: Number of colour channels.
        height: Height in pixels.
        width: Width in pixels.
    """

    layout: str
    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample."""
        if self.layout == "nchw":
            return self.channels, self.height, self.width
        return self.height, self.width, self.channels


class ImageFolder(NamedTuple):
    """Images of a folder.

    Attributes:
        codes: Codes of the images (samples, *shape of one sample), uint8.
        labels: Class of each image, None if the folder has no folders by class.
        where: Name of the source, with the share of the images that was read.
    """

    codes: Values
    labels: Ints | None
    where: str


def check_extra(where: str) -> None:
    """Check that the extra ``images`` is installed.

    Args:
        where: Name of the data.

    Raises:
        EnvironmentMissing: It is not.
    """
    with imports_of("images", f"reading the images of {where}"):
        import PIL.Image  # noqa: F401


def load_folder(path: Path, port: Port, reading: Reading) -> ImageFolder:
    """Load the images in a folder and its subfolders.

    If every image lies in a folder of its class, the classes are numbered by the sorted names of these folders. Of more
    than ``reading.most`` images every class contributes its share, evenly spaced.

    Args:
        path: Folder to search.
        port: Input that takes the images.
        reading: Size, layout and number of the images.

    Returns:
        Codes and labels.

    Raises:
        DataError: There are no images, a file is no image, or the input takes none.
        EnvironmentMissing: The extra ``images`` is not installed.
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
    chosen = files
    where = str(path)
    if len(files) > reading.most:
        chosen = _balanced(by_class, reading.most)
        where = f"{path} ({len(chosen):,} of {len(files):,} images)"
    labels = None
    if "" not in by_class and len(by_class) > 1:
        number = {name: i for i, name in enumerate(sorted(by_class))}
        classes = [number[file.relative_to(path).parts[0]] for file in chosen]
        labels = np.asarray(classes, np.int64)
    sources = [(str(file), file.read_bytes) for file in chosen]
    codes = decode(sources, port, reading, str(path))
    return ImageFolder(codes, labels, where)


def _balanced(by_class: Mapping[str, Sequence[Path]], count: int) -> list[Path]:
    """``count`` files, as balanced over the classes as possible, each class evenly spaced."""
    sizes = np.asarray([len(files) for files in by_class.values()])
    # The least number per class that suffices; the first classes then give one less, until the count is met.
    quotas = range(1, int(sizes.max()) + 1)
    quota = next(q for q in quotas if np.minimum(sizes, q).sum() >= count)
    counts = np.minimum(sizes, quota)
    surplus = counts.sum() - count
    counts[np.flatnonzero(counts == quota)[:surplus]] -= 1
    chosen: list[Path] = []
    for files, share in zip(by_class.values(), counts.tolist(), strict=True):
        positions = np.linspace(0, len(files) - 1, share).round().astype(int)
        chosen.extend(files[i] for i in positions)
    return sorted(chosen)


def decode(
    sources: Sequence[tuple[str, Callable[[], bytes]]], port: Port, reading: Reading, where: str
) -> Values:
    """Decode images.

    Args:
        sources: Name of each image, and a function that returns its bytes.
        port: Input that takes the images.
        reading: Size, layout and colour order.
        where: Name of the data.

    Returns:
        Codes (samples, *shape of one sample), uint8.

    Raises:
        DataError: An image cannot be decoded, or the input takes none.
        EnvironmentMissing: The extra ``images`` is not installed.
    """
    check_extra(where)
    target = image_input(port, reading, where)
    spool = Spool(f"the images of {where}")
    for name, content in sources:
        code = _decode_one(name, content, target, reading.fit)
        if reading.color == "bgr" and target.channels >= 3:
            # Transparency stays the last channel.
            code = np.concatenate([code[..., 2::-1], code[..., 3:]], axis=-1)
        spool.append(code.transpose(2, 0, 1) if target.layout == "nchw" else code)
    return spool.finish((len(sources), *target.shape), np.dtype(np.uint8))


def _decode_one(name: str, content: Callable[[], bytes], target: ImageInput, fit: str) -> Array:
    """Codes of one image (height, width, channels)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        data = content()
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image, len(data))
            ImageOps.exif_transpose(image, in_place=True)
            mode = MODES[target.channels]
            converted = image if image.mode == mode else image.convert(mode)
            pixels = np.asarray(_resized(converted, target, fit))
            return pixels.reshape(target.height, target.width, target.channels)
    except UnidentifiedImageError as error:
        reason = "it has no format of images that is known" if data else "it is empty"
        raise DataError(
            f"{name} cannot be read as an image: {reason}; fix or delete it."
        ) from error
    except Exception as error:
        # The exceptions of Pillow for broken images are not documented.
        text = str(error)
        reason = text.splitlines()[0][:MAX_REASON_CHARACTERS] if text else type(error).__name__
        raise DataError(
            f"{name} cannot be read as an image: {reason.rstrip('.')}; fix or delete it."
        ) from error


def _check_size(image: Image.Image, size: int) -> None:
    """Raise ValueError for an image of ``size`` bytes that is much larger once it is decoded."""
    allowed = max(ALWAYS_ALLOWED_PIXELS, MAX_PIXELS_PER_BYTE * size)
    if image.width * image.height > allowed:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels in {size:,} bytes, more than {allowed:,}"
        )


def scaling(port: Port, reading: Reading, where: str) -> Scaling:
    """Compute the scale and the offset that turn codes into values.

    Args:
        port: Input that takes the images.
        reading: Scale, mean and standard deviation.
        where: Name of the data.

    Returns:
        Scale and offset, float32, of a shape that broadcasts to one sample by channel.

    Raises:
        DataError: There are not as many means or deviations as channels, or the input takes no images.
    """
    target = image_input(port, reading, where)
    mean = _per_channel("mean", reading.mean, port, target)
    std = _per_channel("std", reading.std, port, target)
    channels = target.channels
    shape = (channels, 1, 1) if target.layout == "nchw" else (channels,)
    scale = (reading.scale / std).astype(np.float32)
    offset = (-mean / std).astype(np.float32)
    return Scaling(scale.reshape(shape), offset.reshape(shape))


def _per_channel(name: str, given: Sequence[float], port: Port, target: ImageInput) -> Array:
    """One number per channel (channels,), float64."""
    channels = target.channels
    if len(given) not in (1, channels):
        raise DataError(
            f"`image_{name}` has {len(given)} values, but the input '{port.name}' has {channels} channels; "
            f"give 1 or {channels}."
        )
    return np.broadcast_to(np.asarray(given, np.float64), (channels,))


def image_input(port: Port, reading: Reading, where: str) -> ImageInput:
    """Determine the layout of an input that takes images.

    Args:
        port: Input of the model.
        reading: Layout and size, as far as they are given.
        where: Name of the data.

    Returns:
        Layout, channels and size.

    Raises:
        DataError: The input takes no images, leaves the size open, or contradicts the given size.
    """
    dims = port.dims
    expected = f"{port.dtype} [{', '.join('?' if d is None else str(d) for d in dims)}]"
    if len(dims) != 4:
        raise DataError(
            f"{where} holds images, but the model's input '{port.name}' is {expected}, without four axes."
        )
    layout: str = reading.layout
    if layout == "auto":
        channels_last = dims[3] in MODES and dims[1] not in MODES
        layout = "nhwc" if channels_last else "nchw"
    if layout == "nchw":
        channels, height, width = dims[1], dims[2], dims[3]
    else:
        channels, height, width = dims[3], dims[1], dims[2]
    if not isinstance(channels, int) or channels not in MODES:
        raise DataError(
            f"{where} holds images, but the model's input '{port.name}' is {expected} and read as {layout} has "
            f"{channels} channels; images have 1, 3 or 4: set `image_layout`, or give an .npz."
        )
    requested_height, requested_width = reading.size or (None, None)
    described = f"the model's input '{port.name}' is {expected}"
    return ImageInput(
        layout=layout,
        channels=channels,
        height=_side("height", requested_height, height, described),
        width=_side("width", requested_width, width, described),
    )


def _side(name: str, requested: int | None, dim: int | str | None, described: str) -> int:
    """Length of one side in pixels."""
    fixed = dim if isinstance(dim, int) and dim > 0 else None
    if fixed is None and requested is None:
        raise DataError(
            f"{described}, which leaves the images' size open; say it with `image_size`, as 224 or 224x320."
        )
    if fixed is not None and requested is not None and requested != fixed:
        raise DataError(f"`image_size` gives a {name} of {requested}, but {described}.")
    return int(requested or fixed or 0)


def _resized(image: Image.Image, target: ImageInput, fit: str) -> Image.Image:
    from PIL import Image, ImageOps

    size = (target.width, target.height)
    resample = Image.Resampling.BILINEAR
    if fit == "stretch":
        return image.resize(size, resample)
    if fit == "pad":
        return ImageOps.pad(image, size, resample)
    return ImageOps.fit(image, size, resample)
