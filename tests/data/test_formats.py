"""Folders of images and Parquet files as samples."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from graphs import build, load
from PIL import Image

from onnx_oamip.cli import main
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Model, Reading
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _model(
    place: Path, signature: str, weight: str = "float[8,3,3,3] w", body: str = "y = Conv(x, w)"
) -> Model:
    return load(build(f"({signature}) => (float[] y) <{weight}> {{ {body} }}"), place)


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return _model(place, "float[N,3,16,12] x")


def _picture(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _load(source: Path, model: Model, **values: Any) -> Samples:
    samples = dataset.load(source, model, reading=Reading(**values))
    assert samples is not None
    return samples


def _refused(source: Path, model: Model, part: str, **values: Any) -> None:
    with pytest.raises(DataError) as caught:
        _load(source, model, **values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, dict[str, Array]]:
    """Two classes, PNG so that pixels survive."""
    made = {}
    for name in ("b/2.png", "a/1.png", "a/3.png"):
        made[name] = RNG.integers(0, 256, (16, 12, 3)).astype(np.uint8)
        _picture(tmp_path / "d" / name, made[name])
    return tmp_path / "d", made


def test_pixels_are_scaled_to_values(model: Model, pictures: tuple[Path, dict[str, Array]]) -> None:
    folder, made = pictures
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    samples = _load(folder, model, mean=mean, std=std)
    assert samples.arrays["x"].dtype == np.uint8
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1]
    feed = samples.feed(np.arange(3))["x"]
    expected = np.stack([made[n] for n in ("a/1.png", "a/3.png", "b/2.png")])
    expected = ((expected / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(feed, expected, atol=2e-6)
    assert dataset.load(folder, model, dataset.EVALUATION) is None


def test_colour_modes_and_layouts_are_converted(
    place: Path, model: Model, pictures: tuple[Path, dict[str, Array]]
) -> None:
    folder, made = pictures
    plain = _load(folder, model, scale=1.0).feed(np.arange(1))["x"]
    np.testing.assert_array_equal(
        _load(folder, model, scale=1.0, color="bgr").feed(np.arange(1))["x"], plain[:, ::-1]
    )
    body = "t = Transpose<perm = [0, 3, 1, 2]>(x) y = Conv(t, w)"
    last = _model(place, "float[N,16,12,3] x", body=body)
    np.testing.assert_array_equal(
        _load(folder, last, scale=1.0).feed(np.arange(1))["x"][0], made["a/1.png"]
    )
    grey = _model(place, "float[N,1,16,12] x", "float[8,1,3,3] w")
    codes = _load(folder, grey).arrays["x"]
    expected = np.asarray(Image.fromarray(made["a/1.png"]).convert("L"))
    np.testing.assert_array_equal(codes[0, 0], expected)


def test_images_are_resized_to_the_input(place: Path, tmp_path: Path, model: Model) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # only the middle is left when the sides are cut off
    _picture(tmp_path / "d" / "w.png", wide)
    square = _model(place, "float[N,3,h,w2] x")
    assert _load(tmp_path / "d", square, size=(20, 20)).arrays["x"].min() > 150
    assert _load(tmp_path / "d", square, size=(20, 20), fit="pad").arrays["x"][0, 0, 0].max() == 0
    stretched = _load(tmp_path / "d", square, size=(10, 20), fit="stretch").arrays["x"]
    assert stretched.shape == (1, 3, 10, 20)
    assert stretched[0, 0, 5, 10] > 150
    assert stretched[0, 0, 5, 1] < 50
    _refused(tmp_path / "d", square, "leaves the images' size open; say it with `image_size`")
    _refused(
        tmp_path / "d",
        model,
        "`image_size` gives a width of 20, but the model's input 'x'",
        size=(16, 20),
    )
    assert _load(tmp_path / "d", square, size=(20, 20)).labels is None


def test_surplus_images_are_sampled_evenly_over_classes(tmp_path: Path, model: Model) -> None:
    for name, count in (("few", 3), ("many", 40)):
        for i in range(count):
            _picture(tmp_path / "d" / name / f"{i:02}.png", np.full((16, 12, 3), i, np.uint8))
    samples = _load(tmp_path / "d", model, most=10)
    assert samples.count == 10
    assert samples.labels is not None
    assert np.bincount(samples.labels).tolist() == [3, 7]
    codes = samples.arrays["x"][samples.labels == 1, 0, 0, 0]
    assert codes.tolist() == np.linspace(0, 39, 7).round().tolist()
    assert "of 43 images" in samples.source


def test_invalid_image_folders_are_refused(tmp_path: Path, place: Path, model: Model) -> None:
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", model, "folder without images")
    _picture(tmp_path / "d" / "a.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "d" / "b.jpg").write_bytes(b"no image")
    _refused(tmp_path / "d", model, "b.jpg cannot be read as an image")
    (tmp_path / "d" / "b.jpg").unlink()
    _refused(
        tmp_path / "d",
        model,
        "`image_mean` has 2 values, but the input 'x' has 3 channels",
        mean=(0.1, 0.2),
    )
    flat = _model(place, "float[N,12] x", "float[12,3] w", "y = MatMul(x, w)")
    _refused(tmp_path / "d", flat, "without four axes")
    odd = _model(place, "float[N,7,16,12] x", "float[8,7,3,3] w")
    _refused(tmp_path / "d", odd, "has 7 channels; images have 1, 3 or 4")
    two = _model(
        place, "float[N,3,16,12] x, float[N,3,16,12] z", body="s = Add(x, z) y = Conv(s, w)"
    )
    _refused(tmp_path / "d", two, "the model has the inputs x, z")


def test_image_that_decompresses_to_gigabytes_is_refused(tmp_path: Path, model: Model) -> None:
    (tmp_path / "d").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "d" / "bomb.png")
    _refused(tmp_path / "d", model, "bomb.png cannot be read as an image")


# --------------------------------------------------------------------------------------------------------- parquet


def test_list_columns_and_labels_are_read(tmp_path: Path, place: Path) -> None:
    flat = _model(place, "float[N,6] x", "float[6,3] w", "y = MatMul(x, w)")
    values = RNG.normal(size=(30, 6)).astype(np.float32)
    labels = np.arange(30) % 3
    pq.write_table(
        pa.table({"x": list(values), "label": labels}), tmp_path / "d.parquet", row_group_size=7
    )
    samples = _load(tmp_path / "d.parquet", flat)
    np.testing.assert_array_equal(samples.arrays["x"], values)
    assert samples.labels is not None
    assert samples.labels.tolist() == labels.tolist()
    assert _load(tmp_path / "d.parquet", flat, most=11).count == 11
    # The only column beside the labels needs no name; one of several does.
    pq.write_table(pa.table({"features": list(values), "label": labels}), tmp_path / "e.parquet")
    np.testing.assert_array_equal(_load(tmp_path / "e.parquet", flat).arrays["x"], values)
    pq.write_table(pa.table({"a": list(values), "b": list(2 * values)}), tmp_path / "f.parquet")
    chosen = _load(tmp_path / "f.parquet", flat, column="b")
    np.testing.assert_array_equal(chosen.arrays["x"], 2 * values)
    assert not chosen.notes
    _refused(
        tmp_path / "f.parquet",
        flat,
        "several columns and none called 'x'; choose one of a, b with `column`",
    )
    _refused(tmp_path / "f.parquet", flat, "no column 'c'", column="c")


def test_lists_are_reshaped_to_the_input(tmp_path: Path, model: Model) -> None:
    values = RNG.normal(size=(4, 3 * 16 * 12))
    pq.write_table(pa.table({"x": list(values)}), tmp_path / "d.parquet")
    array = _load(tmp_path / "d.parquet", model).arrays["x"]
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, values.reshape(4, 3, 16, 12), rtol=1e-6)
    pq.write_table(
        pa.table({"x": [v.reshape(3, 16, 12).tolist() for v in values]}), tmp_path / "d.parquet"
    )
    array = _load(tmp_path / "d.parquet", model).arrays["x"]
    np.testing.assert_allclose(array, values.reshape(4, 3, 16, 12), rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_image_columns_are_decoded(tmp_path: Path, model: Model, nested: bool) -> None:
    pixels = RNG.integers(0, 256, (3, 16, 12, 3)).astype(np.uint8)
    cells = []
    for p in pixels:
        stream = io.BytesIO()
        Image.fromarray(p).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None} if nested else stream.getvalue())
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 0]}), tmp_path / "d.parquet")
    samples = _load(tmp_path / "d.parquet", model)
    np.testing.assert_array_equal(samples.arrays["x"], pixels.transpose(0, 3, 1, 2))
    assert samples.feed(np.arange(1))["x"].max() <= 1


def test_several_inputs_read_their_own_columns(tmp_path: Path, place: Path) -> None:
    pair = _model(
        place,
        "int64[N,4] ids, float[N,4] mask",
        "float[6,5] table, int64[1] at = {2}",
        "e = Gather(table, ids) m = Unsqueeze(mask, at) y = Mul(e, m)",
    )
    ids = RNG.integers(0, 6, (5, 4))
    pq.write_table(
        pa.table({"ids": list(ids), "mask": list(np.ones((5, 4)))}), tmp_path / "d.parquet"
    )
    samples = _load(tmp_path / "d.parquet", pair)
    assert samples.arrays["ids"].dtype == np.int64
    assert samples.arrays["mask"].dtype == np.float32
    pq.write_table(pa.table({"ids": list(ids)}), tmp_path / "d.parquet")
    _refused(tmp_path / "d.parquet", pair, "has no column 'mask'")


def test_invalid_tables_are_refused(tmp_path: Path, model: Model) -> None:
    _refused(tmp_path / "none.parquet", model, "no such data file")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nonsense")
    _refused(tmp_path / "d.parquet", model, "cannot be read as Parquet")
    pq.write_table(pa.table({"x": [[[1.0], [1.0, 2.0]]]}), tmp_path / "d.parquet")
    _refused(tmp_path / "d.parquet", model, "unequal shapes inside a row")
    pq.write_table(pa.table({"x": [[1.0], None]}), tmp_path / "d.parquet")
    _refused(tmp_path / "d.parquet", model, "1 empty cells")
    pq.write_table(pa.table({"x": pa.array([], pa.list_(pa.float32()))}), tmp_path / "d.parquet")
    _refused(tmp_path / "d.parquet", model, "holds no rows")


# ------------------------------------------------------------------------------------------------------ command line


def test_image_folder_can_be_calibration_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = build(
        "(float[N,3,16,16] x) => (float[] y) <float[16,3,3,3] w, float[4,16] v> {"
        " c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) y = Gemm<transB = 1>(f, v) }"
    )
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    for i in range(40):
        _picture(
            tmp_path / "d" / "abcd"[i % 4] / f"{i}.png",
            RNG.integers(0, 256, (20, 24, 3)).astype(np.uint8),
        )
    asked = ["--macs", "0.5", "--align", "1", "--force", "--device", "cpu", "-q"]
    asked += ["--image-mean", "0.5", "--image-std", "0.2"]
    given = [
        "prune",
        str(tmp_path / "m.onnx"),
        "--data",
        str(tmp_path / "d"),
        "-o",
        str(tmp_path / "o.onnx"),
        *asked,
    ]
    assert main(given) == 0, capsys.readouterr().err
    assert (tmp_path / "o.onnx").exists()
    assert main([*given, "--image-size", "20"]) == 2
    assert "--image-size gives a height of 20" in capsys.readouterr().err
    assert main([*given, "--image-std", "0"]) == 2
    assert "above 0" in capsys.readouterr().err
    assert main([*given, "--image-mean", "a,b"]) == 2
