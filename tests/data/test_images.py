"""Images as they are in deployment: codes, bits, modes, rotation, and folders of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import build, load
from PIL import Image

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Model, Reading
from onnx_oamip.data import dataset
from onnx_oamip.data.contact_sheet import MARGIN, contact_sheet
from onnx_oamip.data.dataset import Samples

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return _model(place, "float", 3)


def _model(place: Path, kind: str, channels: int, layout: str = "N,{},8,6") -> Model:
    """A network on images of 8 x 6 pixels."""
    dims = layout.format(channels)
    flat = 48 * channels
    body = "f = Cast<to = 1>(x) r = Reshape(f, s) y = MatMul(r, w)"
    return load(
        build(
            f"({kind}[{dims}] x) => (float[] y) <int64[2] s = {{-1, {flat}}}, float[{flat},3] w> {{ {body} }}"
        ),
        place,
    )


def _load(source: Any, model: Model, **values: Any) -> Samples:
    samples = dataset.load(source, model, reading=Reading(**values))
    assert samples is not None
    return samples


def _refused(source: Path, model: Model, part: str, **values: Any) -> None:
    with pytest.raises(DataError) as caught:
        _load(source, model, **values)
    assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def _save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path.parent


def _first(samples: Samples) -> Array:
    return samples.feed(np.arange(1))["x"][0]


# ---------------------------------------------------------------------------------------------------- codes and bits


@pytest.mark.parametrize("kind", ["uint8", "int32"])
def test_input_of_whole_numbers_gets_codes(place: Path, tmp_path: Path, kind: str) -> None:
    folder = _save(Image.fromarray(PIXELS), tmp_path / "d" / "a.png")
    last = _model(place, kind, 3, "N,8,6,{}")
    samples = _load(folder, last)
    value = _first(samples)
    assert value.dtype == kind
    np.testing.assert_array_equal(value, PIXELS)
    assert samples.reading is not None
    assert samples.reading["scale"] == 1
    assert samples.reading["layout"] == "nhwc"


def test_codes_of_a_signed_input_are_shifted_or_refused(place: Path, tmp_path: Path) -> None:
    folder = _save(Image.fromarray(PIXELS), tmp_path / "d" / "a.png")
    signed = _model(place, "int8", 3)
    _refused(folder, signed, "'x' takes int8, but images would have values from 0 to 255")
    value = _first(_load(folder, signed, mean=(128.0,)))
    np.testing.assert_array_equal(value, PIXELS.transpose(2, 0, 1).astype(int) - 128)
    unsigned = _model(place, "uint8", 3)
    _refused(folder, unsigned, "'x' takes uint8", scale=1 / 255)
    _refused(folder, unsigned, "'x' takes uint8", std=(58.0,))


def test_images_of_16_bits_keep_their_range(place: Path, tmp_path: Path, model: Model) -> None:
    deep = RNG.integers(0, 65536, (8, 6)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    for suffix in ("png", "tif"):
        folder = _save(Image.fromarray(deep), tmp_path / suffix / f"b.{suffix}")
        value = _first(_load(folder, _model(place, "float", 1)))
        np.testing.assert_allclose(value[0], deep / 65535, atol=1e-6)
    # One such image decides for all; those of 8 bits keep their values.
    _save(Image.fromarray(PIXELS), folder / "a.png")
    samples = _load(folder, model)
    assert samples.reading is not None
    assert samples.reading["bits"] == 16
    both = samples.feed(np.arange(2))["x"]
    np.testing.assert_allclose(both[0], PIXELS.transpose(2, 0, 1) / 255, atol=1e-6)
    np.testing.assert_allclose(both[1], np.broadcast_to(deep / 65535, (3, 8, 6)), atol=1e-6)
    only = tmp_path / "png"
    np.testing.assert_array_equal(_first(_load(only, _model(place, "uint16", 1)))[0], deep)
    np.testing.assert_array_equal(
        _first(_load(only, _model(place, "uint8", 1)))[0], np.round(deep / 257)
    )


def test_pixels_without_a_known_range_are_refused(tmp_path: Path, model: Model) -> None:
    for name, dtype in (("f", np.float32), ("i", np.int32)):
        image = Image.fromarray(np.ones((8, 6), dtype))
        folder = _save(image, tmp_path / name / "a.tif")
        _refused(folder, model, "a.tif cannot be read as an image: its pixels are")
        _refused(folder, model, "no known range")


# ------------------------------------------------------------------------------------------------ modes and rotation


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA"])
def test_modes_are_converted(tmp_path: Path, model: Model, mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    options = {"compression": "raw"} if suffix == "tif" else {}
    folder = _save(image, tmp_path / "d" / f"a.{suffix}", **options)
    samples = _load(folder, model, scale=1.0)
    with Image.open(folder / f"a.{suffix}") as stored:
        expected = np.asarray(stored.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(_first(samples), expected)
    has_alpha = mode.endswith("A")
    assert samples.reading is not None
    assert samples.reading["alpha"] == ("dropped" if has_alpha else None)
    assert any("transparency, which is dropped" in note for note in samples.notes) == has_alpha


def test_transparency_of_a_palette_is_noted(tmp_path: Path, model: Model) -> None:
    image = Image.fromarray(PIXELS).convert("P")
    folder = _save(image, tmp_path / "d" / "a.png", transparency=0)
    assert any("1 of 1 images have transparency" in note for note in _load(folder, model).notes)


def test_transparency_is_kept_for_four_channels(place: Path, tmp_path: Path) -> None:
    pixels = np.concatenate([PIXELS, PIXELS[..., :1]], axis=2)
    folder = _save(Image.fromarray(pixels), tmp_path / "d" / "a.png")
    samples = _load(folder, _model(place, "float", 4), scale=1.0, color="bgr")
    np.testing.assert_array_equal(_first(samples).transpose(1, 2, 0), pixels[..., [2, 1, 0, 3]])
    assert not samples.notes


def test_column_has_no_effect_on_a_folder(tmp_path: Path, model: Model) -> None:
    folder = _save(Image.fromarray(PIXELS), tmp_path / "d" / "a.png")
    (note,) = _load(folder, model, column="image", mean=(0.5,)).notes
    assert note == f"`column` has no effect on {folder}: it has no columns"


def test_rotation_is_applied_and_the_first_frame_is_read(tmp_path: Path, model: Model) -> None:
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(PIXELS)))
    exif = Image.Exif()
    exif[274] = 6  # turn clockwise to show
    folder = _save(turned, tmp_path / "r" / "a.png", exif=exif)
    np.testing.assert_array_equal(
        _first(_load(folder, model, scale=1.0)), PIXELS.transpose(2, 0, 1)
    )
    frames = [Image.new("RGB", (6, 8), color) for color in ("red", "blue")]
    folder = _save(frames[0], tmp_path / "g" / "a.gif", save_all=True, append_images=frames[1:])
    value = _first(_load(folder, model))
    assert value[0].min() > 0.9
    assert value[2].max() < 0.1


# ------------------------------------------------------------------------------------------------ folders of classes


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_hidden_folders_are_no_classes(tmp_path: Path, model: Model, hidden: str) -> None:
    image = Image.fromarray(PIXELS)
    for name in (hidden, "b", "c"):
        _save(image, tmp_path / name / "1.png")
    (tmp_path / "b" / "._1.png").write_bytes(b"resource fork")
    (tmp_path / "b" / ".DS_Store").write_bytes(b"")
    (tmp_path / "b" / "Thumbs.db").write_bytes(b"")
    samples = _load(tmp_path, model)
    assert samples.count == 2
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1]


def test_class_without_images_keeps_its_number(tmp_path: Path, model: Model) -> None:
    for name in ("a", "c"):
        _save(Image.fromarray(PIXELS), tmp_path / name / "1.png")
    (tmp_path / "b").mkdir()
    labels = _load(tmp_path, model).labels
    assert labels is not None
    assert labels.tolist() == [0, 2]


def test_parts_of_a_data_set_are_refused_as_classes(tmp_path: Path, model: Model) -> None:
    for name in ("train", "val"):
        _save(Image.fromarray(PIXELS), tmp_path / name / "cat" / "1.png")
    _refused(tmp_path, model, "holds the parts train, val of a data set, not classes")
    assert _load(tmp_path / "train", model).count == 1


def test_image_outside_of_the_classes_is_noted(tmp_path: Path, model: Model) -> None:
    for name in ("a/1.png", "b/1.png", "cover.png"):
        _save(Image.fromarray(PIXELS), tmp_path / name)
    samples = _load(tmp_path, model)
    assert samples.labels is None
    assert samples.notes == (
        f"{tmp_path}: 1 images lie in no folder of a class, so no image has a label",
    )


def test_folder_of_images_and_arrays_is_refused(tmp_path: Path, model: Model) -> None:
    _save(Image.fromarray(PIXELS), tmp_path / "1.png")
    np.savez(tmp_path / "2.npz", x=np.zeros((1, 3, 8, 6), np.float32))
    _refused(tmp_path, model, "holds 1 images and 1 .npz or .npy files; give a folder of one kind")


def test_linked_folders_are_followed_once(tmp_path: Path, model: Model) -> None:
    _save(Image.fromarray(PIXELS), tmp_path / "store" / "1.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "d", target_is_directory=True)
    assert _load(tmp_path / "d", model).count == 1


# --------------------------------------------------------------------------------------------------- contact sheet


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_contact_sheet_shows_samples_as_the_model_saw_them(place: Path, layout: str) -> None:
    images = RNG.standard_normal((20, 8, 6, 3)).astype(np.float32)
    last = layout == "nhwc"
    model = _model(place, "float", 3, "N,8,6,{}" if last else "N,{},8,6")
    samples = _load({"x": images if last else images.transpose(0, 3, 1, 2)}, model)
    sheet = contact_sheet(samples, model)
    assert sheet is not None
    assert (sheet.input, sheet.count) == ("x", 16)
    times = 6
    assert sheet.pixels.shape == (2 * 8 * times + MARGIN, 8 * 6 * times + 7 * MARGIN, 3)
    places = np.linspace(0, 19, 16).round().astype(int)
    shown = images[places]
    assert (sheet.low, sheet.high) == (float(shown.min()), float(shown.max()))
    ninth = sheet.pixels[8 * times + MARGIN :: times, : 6 * times : times]
    expected = 255 * (shown[8] - sheet.low) / (sheet.high - sheet.low)
    np.testing.assert_allclose(ninth, expected, atol=0.51)


def test_contact_sheet_undoes_the_order_of_colours(tmp_path: Path, model: Model) -> None:
    folder = _save(Image.fromarray(PIXELS), tmp_path / "d" / "a.png")
    rgb, bgr = (contact_sheet(_load(folder, model, color=c), model) for c in ("rgb", "bgr"))
    assert rgb is not None
    assert bgr is not None
    np.testing.assert_array_equal(rgb.pixels, bgr.pixels)


def test_no_contact_sheet_without_images(place: Path) -> None:
    flat = load(build("(float[N,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"), place)
    assert contact_sheet(_load({"x": np.zeros((4, 5), np.float32)}, flat), flat) is None
    seven = _model(place, "float", 7)
    maps = {"x": np.zeros((4, 7, 8, 6), np.float32)}
    assert contact_sheet(_load(maps, seven), seven) is None


@pytest.mark.parametrize("length", [0, 5])
def test_no_contact_sheet_of_a_cache_of_keys(tmp_path: Path, length: int) -> None:
    inputs = "float[N,3,L,6] past, float[N,3,1,6] x"
    keys = "k = Concat<axis = 2>(past, x) t = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(x, t)"
    body = f"{keys} r = ReduceSum<keepdims = 0>(s) f = Add(x, r) y = MatMul(f, w)"
    model = load(build(f"({inputs}) => (float[] y) <float[6,2] w> {{ {body} }}"), tmp_path)
    past = np.zeros((20, 3, length, 6), np.float32)
    sheet = contact_sheet(
        _load({"x": np.ones((20, 3, 1, 6), np.float32), "past": past}, model), model
    )
    assert sheet is not None
    assert sheet.input == "x"


def test_no_contact_sheet_of_images_without_pixels(tmp_path: Path) -> None:
    inputs = "float[N,3,L,6] x"
    model = load(
        build(f"({inputs}) => (float[] y) <float[6,2] w> {{ y = MatMul(x, w) }}"), tmp_path
    )
    samples = _load({"x": np.zeros((20, 3, 0, 6), np.float32)}, model)
    assert contact_sheet(samples, model) is None
