"""Images as samples: found in a folder, decoded, fitted to the model's size and layout, stored as codes.

Values are ``(code * scale - mean) / std`` per colour channel, where codes are 0 to 255. They are stored as bytes, many
of them in a temporary file, and become values when a feed is made. If an image has 16 bits, all are stored with 16,
where 257 is one code of 8 bits.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.records import (
    Array,
    Floats,
    Ints,
    Model,
    Port,
    Reading,
)
from onnx_oamip.data.array_checks import LABELS, OFFSET, SCALE, Scaling
from onnx_oamip.data.folders import is_visible, visible_files
from onnx_oamip.data.loaded import Format, Loaded
from onnx_oamip.data.out_of_core import Spool, Values
from onnx_oamip.data.unequal import Stored
from onnx_oamip.graph.batch_symbols import is_fixed

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".webp", ".avif"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
}
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
"""Names of folders that divide a data set and are no classes."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode by number of channels."""
ALWAYS_ALLOWED_PIXELS = 1 << 24
"""Pixels that any image may have; 4 bytes each while it is read."""
MAX_PIXELS_PER_BYTE = 64
"""Pixels per byte of a larger image: photographs have 2 to 20, an image of one colour has thousands."""
MAX_REASON_CHARACTERS = 200
"""Characters of Pillow's message in an error."""
WIDE = 257
"""Code of 16 bits that equals the code 1 of 8 bits: 255 * 257 is 65535."""
QUALITY = 88
"""Quality of JPEG files that are written."""
SCALED_TO_16_BITS = ("PNG", "PPM")
"""Formats whose images in Pillow's mode of 32-bit integers have values up to 65535."""


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


class Codes(NamedTuple):
    """Decoded images.

    Attributes:
        values: Codes (samples, *shape of one sample), uint8 or uint16.
        bits: 8 or 16.
        modes: Number of images by Pillow's mode, such as RGB, L, CMYK or RGBA.
    """

    values: Values
    bits: int
    modes: Mapping[str, int]


class _HasMoreBits(Exception):
    """An image has 16 bits, so that codes of 8 bits would lose values."""


def check_extra(where: str) -> None:
    """Check that the extra ``images`` is installed.

    Args:
        where: Name of the data.

    Raises:
        EnvironmentMissing: It is not.
    """
    with imports_of("images", f"reading the images of {where}"):
        import PIL.Image  # noqa: F401


def matches(source: str) -> bool:
    """Test for a folder.

    Args:
        source: Path.

    Returns:
        True if it is one.
    """
    return Path(source).is_dir()


def load_folder(source: str, model: Model, reading: Reading) -> Loaded:
    """Load the images in a folder and its subfolders.

    If every image lies in a folder of its class, the classes are numbered by the sorted names of these folders. Hidden
    files and folders are left out. Of more than ``reading.most`` images every class contributes its share, evenly
    spaced.

    Args:
        source: Folder to search.
        model: Model with one input, which takes the images.
        reading: Size, layout and number of the images.

    Returns:
        Codes with their scale, and labels.

    Raises:
        DataError: There are no images, a file is no image, or the input takes none.
        EnvironmentMissing: The extra ``images`` is not installed.
    """
    path = Path(source)
    if len(model.inputs) != 1:
        names = ", ".join(port.name for port in model.inputs)
        raise DataError(
            f"{path} is a folder of images, but the model has the inputs {names}; give an .npz."
        )
    files = sorted(visible_files(path, SUFFIXES))
    if not files:
        raise DataError(
            f"{path} is a folder without images ({', '.join(sorted(SUFFIXES))}) or arrays; give images, an .npz, or a "
            "folder with one .npz per sample."
        )
    by_class: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        parts = file.relative_to(path).parts
        by_class[parts[0] if len(parts) > 1 else ""].append(file)
    _check_classes(path, by_class)
    chosen = files
    where = str(path)
    if len(files) > reading.most:
        chosen = _balanced(by_class, reading.most)
        where = f"{path} ({len(chosen):,} of {len(files):,} images)"
    notes: tuple[str, ...] = ()
    labels = _labels(path, chosen, by_class)
    if labels is None and len(by_class) > 1:
        notes = (
            f"{path}: {len(by_class[''])} images lie in no folder of a class, so no image has a label",
        )
    sources = [(str(file), file.read_bytes) for file in chosen]
    loaded = load_encoded(sources, model.inputs[0], reading, str(path))
    arrays = {**loaded.arrays, **({} if labels is None else {LABELS: labels})}
    return Loaded(arrays, where, loaded.reading, (*notes, *loaded.notes))


def _check_classes(path: Path, by_class: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a folder whose folders are the parts of a data set, which hold the classes."""
    parts = sorted(name for name in by_class if name.lower() in PARTS)
    if parts and len(parts) == len(by_class) and len(parts) > 1:
        raise DataError(
            f"{path} holds the parts {', '.join(parts)} of a data set, not classes; give one of them as `data` and "
            "another as `eval_data`."
        )


def _labels(
    path: Path,
    chosen: Sequence[Path],
    by_class: Mapping[str, Sequence[Path]],
) -> Ints | None:
    """Classes of the images by the sorted names of their folders; None if not every image has one."""
    if "" in by_class or len(by_class) < 2:
        return None
    # A class whose folder is empty still has its number.
    names = [entry.name for entry in path.iterdir() if entry.is_dir() and is_visible(entry.name)]
    number = {name: i for i, name in enumerate(sorted(names))}
    return np.asarray([number[file.relative_to(path).parts[0]] for file in chosen], np.int64)


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


def load_encoded(
    sources: Sequence[tuple[str, Callable[[], bytes]]],
    port: Port,
    reading: Reading,
    where: str,
) -> Loaded:
    """Decode images for an input.

    Args:
        sources: Name of each image, and a function that returns its bytes.
        port: Input that takes the images.
        reading: Size, layout, colour order, scale, mean and deviation.
        where: Name of the data.

    Returns:
        Codes of the input with their scale and offset, and how they were read.

    Raises:
        DataError: An image cannot be decoded, or the input takes none.
        EnvironmentMissing: The extra ``images`` is not installed.
    """
    target = image_input(port, reading, where)
    # Settings are refused before any image is decoded.
    scaling(port, reading, where, 16 if port.dtype == np.uint16 else 8)
    codes = decode(sources, port, reading, where)
    scale, offset = scaling(port, reading, where, codes.bits)
    arrays: dict[str, Stored] = {
        port.name: codes.values,
        port.name + SCALE: scale,
        port.name + OFFSET: offset,
    }
    transparent = sum(n for mode, n in codes.modes.items() if mode.upper().endswith("A"))
    drops = bool(transparent) and target.channels != 4
    record = {
        "input": port.name,
        "layout": target.layout,
        "size": [target.height, target.width],
        "channels": target.channels,
        "color": reading.color if target.channels >= 3 else "gray",
        "fit": reading.fit,
        "resample": "bilinear",
        "bits": codes.bits,
        "scale": _base_scale(port, reading, codes.bits),
        "mean": list(reading.mean),
        "std": list(reading.std),
        "modes": dict(sorted(codes.modes.items())),
        "alpha": None if not transparent else "dropped" if drops else "kept",
    }
    notes: tuple[str, ...] = ()
    if drops:
        finding = f"{where}: {transparent} of {len(sources)} images have transparency"
        notes = (f"{finding}, which is dropped: the model sees the colours behind it",)
    return Loaded(arrays, where, record, notes)


def decode(
    sources: Sequence[tuple[str, Callable[[], bytes]]],
    port: Port,
    reading: Reading,
    where: str,
) -> Codes:
    """Decode images.

    Args:
        sources: Name of each image, and a function that returns its bytes.
        port: Input that takes the images.
        reading: Size, layout and colour order.
        where: Name of the data.

    Returns:
        Codes of 16 bits if an image has as many or the input takes them, otherwise of 8 bits.

    Raises:
        DataError: An image cannot be decoded, or the input takes none.
        EnvironmentMissing: The extra ``images`` is not installed.
    """
    check_extra(where)
    target = image_input(port, reading, where)
    bits = 16 if port.dtype == np.uint16 else 8
    widens = bits == 8 and port.dtype.kind not in "iu"
    try:
        return _decode_all(sources, target, reading, where, bits=bits, widens=widens)
    except _HasMoreBits:
        return _decode_all(sources, target, reading, where, bits=16, widens=False)


def _decode_all(
    sources: Sequence[tuple[str, Callable[[], bytes]]],
    target: ImageInput,
    reading: Reading,
    where: str,
    *,
    bits: int,
    widens: bool,
) -> Codes:
    """Codes of some bits; raises _HasMoreBits for an image with more if ``widens``."""
    spool = Spool(f"the images of {where}")
    modes: Counter[str] = Counter()
    for name, content in sources:
        mode, code = _decode_one(name, content, target, reading.fit, bits=bits, widens=widens)
        modes[mode] += 1
        if reading.color == "bgr" and target.channels >= 3:
            # Transparency stays the last channel.
            code = np.concatenate([code[..., 2::-1], code[..., 3:]], axis=-1)
        spool.append(code.transpose(2, 0, 1) if target.layout == "nchw" else code)
    dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
    return Codes(spool.finish((len(sources), *target.shape), dtype), bits, modes)


def _decode_one(
    name: str,
    content: Callable[[], bytes],
    target: ImageInput,
    fit: str,
    *,
    bits: int,
    widens: bool,
) -> tuple[str, Array]:
    """Mode of one image, and its codes (height, width, channels)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        data = content()
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image, len(data))
            is_wide = _is_wide(image)
            if is_wide and widens:
                raise _HasMoreBits
            ImageOps.exif_transpose(image, in_place=True)
            # The mode before conversion, with A for the transparency of a palette.
            has_alpha = "transparency" in image.info and not image.mode.endswith("A")
            mode = f"{image.mode}+A" if has_alpha else image.mode
            codes = _wide_codes(image, target, fit) if is_wide else _codes(image, target, fit)
            if is_wide and bits == 8:
                codes = np.round(codes / WIDE).astype(np.uint8)
            elif not is_wide and bits == 16:
                codes = codes.astype(np.uint16) * np.uint16(WIDE)
            return mode, codes
    except _HasMoreBits:
        raise
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


def _is_wide(image: Image.Image) -> bool:
    """True for an image of 16 bits. Raises ValueError for one whose values have no known range."""
    if image.mode.startswith("I;16"):
        return True
    if image.mode == "I" and image.format in SCALED_TO_16_BITS:
        return True
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its pixels are {kind}, which have no known range (convert it to 8 or 16 bits, or give an .npz)"
        )
    return False


def _codes(image: Image.Image, target: ImageInput, fit: str) -> Array:
    """Codes of 8 bits (height, width, channels)."""
    mode = MODES[target.channels]
    converted = image if image.mode == mode else image.convert(mode)
    pixels = np.asarray(_resized(converted, target, fit))
    return pixels.reshape(target.height, target.width, target.channels)


def _wide_codes(image: Image.Image, target: ImageInput, fit: str) -> Array:
    """Codes of 16 bits (height, width, channels) of a gray image; transparency is full."""
    from PIL import Image

    gray = Image.fromarray(np.asarray(image).astype(np.float32))
    values = np.clip(np.round(np.asarray(_resized(gray, target, fit))), 0, 65535)
    codes = np.repeat(values.astype(np.uint16)[..., None], target.channels, axis=2)
    codes[..., 3:] = 65535
    return codes


def _check_size(image: Image.Image, size: int) -> None:
    """Raise ValueError for an image of ``size`` bytes that is much larger once it is decoded."""
    allowed = max(ALWAYS_ALLOWED_PIXELS, MAX_PIXELS_PER_BYTE * size)
    if image.width * image.height > allowed:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels in {size:,} bytes, more than {allowed:,}"
        )


def scaling(
    port: Port,
    reading: Reading,
    where: str,
    bits: int = 8,
) -> Scaling:
    """Compute the scale and the offset that turn codes into values.

    Args:
        port: Input that takes the images.
        reading: Scale, mean and standard deviation.
        where: Name of the data.
        bits: Bits of the codes.

    Returns:
        Scale and offset, float32, of a shape that broadcasts to one sample by channel.

    Raises:
        DataError: There are not as many means or deviations as channels, the input takes no images, or takes whole
            numbers that these settings do not give.
    """
    target = image_input(port, reading, where)
    mean = _per_channel("mean", reading.mean, port, target)
    std = _per_channel("std", reading.std, port, target)
    channels = target.channels
    shape = (channels, 1, 1) if target.layout == "nchw" else (channels,)
    scale = _base_scale(port, reading, bits) / std
    offset = -mean / std
    if port.dtype.kind in "iu":
        _check_whole(scale, offset, port, bits)
    return Scaling(
        scale.astype(np.float32).reshape(shape), offset.astype(np.float32).reshape(shape)
    )


def _base_scale(port: Port, reading: Reading, bits: int) -> float:
    """Factor of codes before mean and deviation. An input of whole numbers takes codes as they are."""
    default = 1.0 if port.dtype.kind in "iu" else 1 / 255
    scale = default if reading.scale is None else reading.scale
    return scale / WIDE if bits == 16 and port.dtype != np.uint16 else scale


def _check_whole(
    scale: Floats,
    offset: Floats,
    port: Port,
    bits: int,
) -> None:
    """Raise DataError unless codes become whole numbers in the range of an input."""
    limits = np.iinfo(port.dtype)
    least = float(offset.min()) + 0.0  # no -0
    most = float((scale * (2**bits - 1) + offset).max())
    whole = np.array_equal(scale, np.round(scale)) and np.array_equal(offset, np.round(offset))
    if not whole or least < limits.min or most > limits.max:
        codes = 2**bits - 1
        hint = f", or leave them out to feed codes of 0 to {codes}" if codes <= limits.max else ""
        raise DataError(
            f"the model's input '{port.name}' takes {port.dtype}, but images would have values from {least:g} to "
            f"{most:g} by `image_scale`, `image_mean` and `image_std`; choose them so that whole numbers from "
            f"{limits.min} to {limits.max} result{hint}."
        )


def _per_channel(
    name: str,
    given: Sequence[float],
    port: Port,
    target: ImageInput,
) -> Array:
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
        channels = dims[1]
        height = dims[2]
        width = dims[3]
    else:
        channels = dims[3]
        height = dims[1]
        width = dims[2]
    if channels not in MODES:
        count = channels if is_fixed(channels) else "an open number of"
        raise DataError(
            f"{where} holds images, but the model's input '{port.name}' is {expected} and read as {layout} has "
            f"{count} channels; images have 1, 3 or 4: set `image_layout`, or give an .npz."
        )
    assert isinstance(channels, int)
    requested_height, requested_width = reading.size or (None, None)
    described = f"the model's input '{port.name}' is {expected}"
    return ImageInput(
        layout=layout,
        channels=channels,
        height=_side("height", requested_height, height, described),
        width=_side("width", requested_width, width, described),
    )


def _side(
    name: str,
    requested: int | None,
    dim: int | str | None,
    described: str,
) -> int:
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


def jpeg(pixels: Array) -> bytes | None:
    """Encode a drawing as JPEG.

    Args:
        pixels: The drawing (height, width, 3), uint8.

    Returns:
        The file; None if the extra ``images`` is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        return None
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


FORMAT = Format("a folder of images", matches, load_folder, check_extra=check_extra)
