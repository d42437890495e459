"""Paths that are no files: pipes and devices are refused before they are opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from graphs import MLP, build, load

from onnx_oamip.artifacts import plan_files
from onnx_oamip.artifacts.output import check_output
from onnx_oamip.core import toml_files
from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import DataError, OamipError, OutputError, SettingsError
from onnx_oamip.core.regular_files import refuse_special
from onnx_oamip.data import dataset

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")


@pytest.fixture(params=["pipe", "device"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "device":
        return Path("/dev/zero")
    os.mkfifo(tmp_path / "data.npz")
    return tmp_path / "data.npz"


def test_pipes_and_devices_are_refused(special: Path) -> None:
    with pytest.raises(OamipError) as error:
        refuse_special(special, "the file", DataError)
    assert str(error.value) == f"the file {special} is a pipe or a device; give a file."


def test_files_folders_and_missing_paths_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    for name in ("file", ".", "missing", "x" * 5000, "nul\0"):
        refuse_special(tmp_path / name, "the file", DataError)


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_no_file_replaces_a_pipe(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(OutputError, match="is a pipe or a device; give a file"):
        check_output("in.onnx", tmp_path / name)
    with pytest.raises(OutputError, match="is a pipe or a device; give a file"):
        write_bytes(b"a", tmp_path / name)
    assert (tmp_path / name).is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


def test_readers_do_not_open_them(special: Path, tmp_path: Path) -> None:
    """Each would wait for a writer, or read without an end."""
    with pytest.raises(SettingsError, match=r"the configuration .* is a pipe or a device"):
        toml_files.read(special)
    with pytest.raises(DataError, match=r"the data .* is a pipe or a device"):
        dataset.load(special, load(build(MLP), tmp_path))
    with pytest.raises(DataError, match=r"the plan .* is a pipe or a device"):
        plan_files.load(special)


def test_large_configuration_is_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    (tmp_path / "large.toml").write_text("#" * (toml_files.MOST_BYTES + 1))
    with pytest.raises(SettingsError, match="is larger than 1 MiB"):
        toml_files.read(tmp_path / "large.toml")
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbfmacs = 0.5\n")
    assert toml_files.read(tmp_path / "marked.toml") == {"macs": 0.5}
