"""Samples that stay in a file: the same values as in memory, little memory, and a sentence where a file fails."""

from __future__ import annotations

import errno
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import NETS, build, load

from onnx_oamip.artifacts import cache
from onnx_oamip.core.errors import DataError, OutputError
from onnx_oamip.core.records import Array, Model
from onnx_oamip.data import dataset, numpy_files, out_of_core
from onnx_oamip.data.dataset import Samples, hold_out
from onnx_oamip.data.out_of_core import FileArray, Spool

VALUES = np.random.default_rng(0).standard_normal((50, 3, 4)).astype(np.float32)
WIDE = 1 << 16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly anything is held."""
    for module in (out_of_core, numpy_files):
        monkeypatch.setattr(module, "IN_MEMORY_BYTES", 64)


def _npy(path: Path, value: Array) -> Path:
    np.save(path / "d.npy", value)
    return path / "d.npy"


def _npz(path: Path, value: Array) -> Path:
    np.savez(path / "d.npz", first=np.arange(3), x=value)
    return path / "d.npz"


def _packed(path: Path, value: Array) -> Path:
    np.savez_compressed(path / "d.npz", first=np.arange(3), x=value)
    return path / "d.npz"


FORMS: dict[str, Callable[[Path, Array], Path]] = {"npy": _npy, "npz": _npz, "compressed": _packed}


def _found(path: Path) -> Any:
    found = numpy_files.load(path)
    return found["x"] if isinstance(found, dict) else found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["plain", "big-endian", "columns first", "half"])
@pytest.mark.usefixtures("small")
def test_mapped_rows_equal_those_of_the_array(form: str, change: str, tmp_path: Path) -> None:
    value = {
        "plain": VALUES,
        "big-endian": VALUES.astype(">f4"),
        "columns first": np.asfortranarray(VALUES),
        "half": VALUES.astype(np.float16),
    }[change]
    found = _found(FORMS[form](tmp_path, value))
    assert isinstance(found, FileArray) == (change != "columns first")
    assert found.dtype == value.dtype.newbyteorder("=")
    assert (found.shape, found.ndim, found.size, len(found)) == (value.shape, 3, 600, 50)
    np.testing.assert_array_equal(np.asarray(found), value)
    for index in (
        np.asarray([4, 5, 6, 2, 49, 0]),
        np.zeros(0, np.int64),
        np.asarray([-1, 3]),
        slice(7, 40, 3),
        5,
        -2,
    ):
        np.testing.assert_array_equal(found[index], value[index])
    with pytest.raises(IndexError):
        found[np.asarray([50])]
    picked = out_of_core.take(found, np.arange(49, 9, -2))
    again = out_of_core.take(picked, np.asarray([3, 1, 2, 19, 18, 17]))
    np.testing.assert_array_equal(np.asarray(again), value[49:9:-2][[3, 1, 2, 19, 18, 17]])
    np.testing.assert_array_equal(np.concatenate(list(out_of_core.blocks(picked))), value[49:9:-2])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)), value)


@pytest.mark.usefixtures("small")
def test_arrays_in_memory_are_not_copied() -> None:
    picked = out_of_core.take(VALUES, np.arange(40, 0, -1))
    assert isinstance(picked, FileArray)
    np.testing.assert_array_equal(np.asarray(picked), VALUES[40:0:-1])
    assert isinstance(out_of_core.take(VALUES, np.arange(1)), np.ndarray)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(
        build("(float[N,3,4] x) => (float[] y) <float[4,2] w> { y = MatMul(x, w) }"), tmp_path
    )


@pytest.mark.parametrize("form", FORMS)
def test_feeds_do_not_depend_on_where_samples_are_stored(
    form: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.mkdir()
    np.save(path / "d.npy", VALUES)
    (np.savez_compressed if form == "compressed" else np.savez)(path / "d.npz", x=VALUES)
    source = path / ("d.npy" if form == "npy" else "d.npz")

    def feeds(samples: Samples | None) -> tuple[list[Array], Any]:
        assert samples is not None
        parts = [part.take(np.arange(9, -1, -1)) for part in hold_out(samples, 3)]
        found = [feed["x"] for part in (samples, *parts) for _, feed in part.batches(7)]
        return found, cache.identity(model, samples)

    held = feeds(dataset.load(source, model))
    monkeypatch.setattr(out_of_core, "IN_MEMORY_BYTES", 64)
    monkeypatch.setattr(numpy_files, "IN_MEMORY_BYTES", 64)
    found = feeds(dataset.load(source, model))
    assert held[1] == found[1]
    for a, b in zip(held[0], found[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("small")
def test_non_finite_value_error_names_its_sample(model: Model, tmp_path: Path) -> None:
    value = VALUES.copy()
    value[37, 1, 2] = np.nan
    with pytest.raises(DataError, match="first in sample 37"):
        dataset.load(_npy(tmp_path, value), model)


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_number_of_samples(form: str, tmp_path: Path) -> None:
    """64 MiB of samples are checked, divided and run through in the memory of a few batches."""
    net = load(
        build(f"(float[N,{WIDE}] x) => (float[] y) <float[{WIDE},2] w> {{ y = MatMul(x, w) }}"),
        tmp_path,
    )
    value = np.ones((256, WIDE), np.float32)
    path = tmp_path / ("d.npy" if form == "npy" else "d.npz")
    if form == "npy":
        np.save(path, value)
    else:
        (np.savez_compressed if form == "compressed" else np.savez)(path, x=value)
    del value
    tracemalloc.start()
    samples = dataset.load(path, net)
    assert samples is not None
    for part in hold_out(samples, 0):
        cache.identity(net, part)
        assert sum(float(feed["x"].sum()) for _, feed in part.batches(8)) == part.count * WIDE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20, f"{peak >> 20} MiB"


# ------------------------------------------------------------------------------------------------------ files that fail


@pytest.mark.usefixtures("small")
def test_file_changed_during_the_run_is_detected(model: Model, tmp_path: Path) -> None:
    samples = dataset.load(_npy(tmp_path, VALUES), model)
    assert samples is not None
    np.save(tmp_path / "d.npy", VALUES[:20])
    with pytest.raises(DataError, match=r"d\.npy was changed while it was read; leave it as it is"):
        samples.feed(np.arange(30, 40))


@pytest.mark.usefixtures("small")
def test_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = _npz(tmp_path, VALUES)
    content = bytearray(path.read_bytes())
    place = content.find(VALUES.tobytes()) + 700
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="Bad CRC-32"):
        numpy_files.load(path)


@pytest.mark.usefixtures("small")
def test_full_disk_while_unpacking_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _packed(tmp_path, VALUES)
    monkeypatch.setattr(numpy_files, "free_disk_space", lambda: 100)
    with pytest.raises(
        DataError, match=r"asks for .* of memory .* and 100 bytes for temporary files; give fewer"
    ):
        numpy_files.load(path)

    class Full:
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(out_of_core, "IN_MEMORY_BYTES", 64)
    monkeypatch.setattr(numpy_files, "IN_MEMORY_BYTES", 64)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(
        OutputError,
        match=r"d\.npz: its array 'x' is 2\.3 KiB when unpacked: there is no room for it",
    ):
        numpy_files.load(path)


def test_temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    spool = Spool("numbers")
    for part in np.arange(3 << 20).reshape(6, -1):
        spool.append(part)
    found = spool.finish((6, 1 << 19), np.dtype(np.int64))
    assert isinstance(found, FileArray)
    np.testing.assert_array_equal(found[4], np.arange(4 << 19, 5 << 19))
    assert not list((tmp_path / "t").iterdir())


def test_samples_of_functions_and_images_are_written_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_core, "IN_MEMORY_BYTES", 64)
    net = load(build(NETS["mlp"]), tmp_path)
    (tmp_path / "many_feeds.py").write_text(
        "import numpy as np\n\ndef feeds():\n    for i in range(40):\n"
        "        yield {'x': np.full((4, 6), i, np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    samples = dataset.load("many_feeds:feeds", net)
    assert samples is not None
    assert isinstance(samples.arrays["x"], FileArray)
    assert (samples.count, samples.whole) == (40, True)
    np.testing.assert_array_equal(
        samples.feed(np.asarray([7]))["x"], np.full((4, 6), 7, np.float32)
    )
