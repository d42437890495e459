"""The steps of CONTRIBUTING for a data format, followed with a format of comma-separated numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.cli import main
from onnx_oamip.core.errors import DataError, EnvironmentMissing
from onnx_oamip.core.records import Model, Reading
from onnx_oamip.data import dataset, formats
from onnx_oamip.data.loaded import Format, Loaded

# ------------------------------------------------------------------------------------- step 1: the module of the format


def matches(source: str) -> bool:
    """Test for a .csv file."""
    return Path(source).suffix == ".csv"


def read_csv(source: str, model: Model, reading: Reading) -> Loaded:
    """Load rows of numbers, the class in the last column."""
    try:
        rows = np.loadtxt(source, np.float32, delimiter=",", max_rows=reading.most, ndmin=2)
    except ValueError as error:
        raise DataError(f"{source} cannot be read as CSV: {error}; write numbers.") from error
    arrays = {model.inputs[0].name: rows[:, :-1], "labels": rows[:, -1].astype(np.int64)}
    return Loaded(arrays, source)


FORMAT = Format("a .csv file", matches, read_csv)


# ------------------------------------------------------------------------------------------------- step 2: the table


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (FORMAT, *formats.FORMATS))


NET = (
    "(float[N,6] x) => (float[] y) <float[16,6] a, float[4,16] b> {"
    " h = Gemm<transB = 1>(x, a) r = Relu(h) y = Gemm<transB = 1>(r, b) }"
)


def _csv(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, 6)).astype(np.float32)
    labels = rng.integers(0, 4, 40)
    path = folder / "d.csv"
    np.savetxt(path, np.column_stack([values, labels]), "%.9g", ",")
    return path, values, labels


@pytest.mark.usefixtures("registered")
def test_new_format_gives_the_samples_of_an_npz(tmp_path: Path) -> None:
    path, values, labels = _csv(tmp_path)
    np.savez(tmp_path / "d.npz", x=values, labels=labels)
    model = load(build(NET), tmp_path)
    ours, theirs = dataset.load(path, model), dataset.load(tmp_path / "d.npz", model)
    assert ours is not None
    assert theirs is not None
    np.testing.assert_array_equal(ours.arrays["x"], theirs.arrays["x"])
    np.testing.assert_array_equal(ours.labels, theirs.labels)  # type: ignore[arg-type]
    # It has no held-out part of its own.
    assert dataset.load(path, model, dataset.EVALUATION) is None


@pytest.mark.usefixtures("registered")
def test_new_format_is_read_by_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = _csv(tmp_path)
    file = tmp_path / "m.onnx"
    file.write_bytes(build(NET).SerializeToString())
    assert main(["verify", str(file), str(file), "--data", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["samples"] == 40


@pytest.mark.usefixtures("registered")
def test_new_format_is_named_and_refused_in_one_sentence(tmp_path: Path) -> None:
    model = load(build(NET), tmp_path)
    with pytest.raises(DataError, match=r"none.xyz: no such data file; give .*a \.csv file"):
        dataset.load(tmp_path / "none.xyz", model)
    (tmp_path / "bad.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        dataset.load(tmp_path / "bad.csv", model)


def test_missing_package_of_a_format_is_reported_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(source: str) -> None:
        raise EnvironmentMissing(f"reading {source} needs a package.")

    entry = Format("a .csv file", matches, read_csv, check_extra=missing)
    monkeypatch.setattr(formats, "FORMATS", (entry, *formats.FORMATS))
    with pytest.raises(EnvironmentMissing, match=r"d\.csv needs"):
        dataset.check_extras(tmp_path / "d.csv")


def test_unregistered_format_is_refused(tmp_path: Path) -> None:
    path, _, _ = _csv(tmp_path)
    with pytest.raises(DataError, match=r"d\.csv: its format is not read; give a \.parquet file"):
        dataset.load(path, load(build(NET), tmp_path))
