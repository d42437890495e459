"""A request for samples, and what all makers of samples and judges share."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from .manifest import Entry, Manifest

SEED = 20241128
Array = npt.NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Draw:
    """A request for samples."""

    entry: Entry
    manifest: Manifest
    cache: Path
    part: int
    """0: for calibration; 1: held out."""
    count: int
    rng: np.random.Generator

    def package(self, name: str) -> Path:
        """Folder of an unpacked package."""
        return self.manifest.folder(self.cache, name)


def session(path: Path) -> onnxruntime.InferenceSession:
    """A plain session on the CPU with one thread, without warnings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def lone_module(path: Path) -> Any:
    """A module of an unpacked package that is run without the package around it, which may need other packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module.")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def module(folder: Path, name: str) -> Any:
    """A module of an unpacked package, imported from there."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)
