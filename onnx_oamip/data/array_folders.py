"""Folders with one .npz or .npy file per sample, for samples of unequal lengths among others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Model, Reading
from onnx_oamip.data import images, numpy_files
from onnx_oamip.data.folders import visible_files
from onnx_oamip.data.loaded import Format, Loaded
from onnx_oamip.data.unequal import FeedCollector

SUFFIXES = (".npz", ".npy")


def matches(source: str) -> bool:
    """Test for a folder with .npz or .npy files.

    Args:
        source: Path.

    Returns:
        True if there is one.
    """
    path = Path(source)
    return path.is_dir() and next(visible_files(path, SUFFIXES), None) is not None


def load(source: str, model: Model, reading: Reading) -> Loaded:
    """Load the files of a folder, one feed each, in the order of their names.

    Args:
        source: Folder.
        model: Model that reads the feeds.
        reading: Largest number of samples.

    Returns:
        Arrays by input name. Where every file lacks the axis of the batch, so do the arrays.

    Raises:
        DataError: A file cannot be read, or differs from the first one in its names, types or ranks.
    """
    files = sorted(visible_files(Path(source), SUFFIXES))
    pictures = sum(1 for _ in visible_files(Path(source), images.SUFFIXES))
    if pictures:
        raise DataError(
            f"{source} holds {pictures:,} images and {len(files):,} .npz or .npy files; give a folder of one kind."
        )
    chosen = files
    where = source
    if len(files) > reading.most:
        places = np.linspace(0, len(files) - 1, reading.most).round().astype(int)
        chosen = [files[place] for place in places]
        where = f"{source} ({len(chosen):,} of {len(files):,} files)"
    collector = FeedCollector(source)
    for file in chosen:
        collector.append(_feed(file, model), file.name)
    return Loaded(collector.finish(), where)


def _feed(file: Path, model: Model) -> Mapping[str, Array]:
    loaded = numpy_files.load(file)
    if isinstance(loaded, dict):
        return {name: np.asarray(value) for name, value in loaded.items()}
    return {numpy_files.only_input(file, model): np.asarray(loaded)}


FORMAT = Format("a folder of .npz or .npy files (one feed each)", matches, load)
