"""Hand-off to training: which indices of every weight stayed, and a PyTorch state dict cut in the same way.

A keep-map is a safetensors file with one int64 vector of kept indices for every axis that was cut, called
``tensor:axis`` after the ONNX initialiser. Weights of a state dict are found by the same name or, since exporters
rename and transpose, by what they hold. They are cut and not refitted: fine-tuning starts from the trained weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Ints,
    Model,
)

KEY, KIND, VERSION = "onnx_oamip", "keep-map", 1


@dataclass(frozen=True)
class Weight:
    """One initialiser that was cut: its ``shape`` before, kept indices by axis, digests as it is and transposed."""

    shape: tuple[int, ...]
    kept: Mapping[int, Ints]
    digests: tuple[str, str]


@dataclass(frozen=True)
class Cut:
    """One tensor of a state dict: the initialiser it was matched with (None: left whole), shapes before and after."""

    name: str
    weight: str | None
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`cut` wrote. ``unmatched``: initialisers that were cut and are in no tensor of the state dict."""

    output: str
    sha256: str
    tensors: tuple[Cut, ...]
    unmatched: tuple[str, ...]


def weights(model: Model, coupling: Coupling, keep: Bools) -> dict[str, Weight]:
    """The constants of a model that lose channels when the units ``keep`` (n_units,) stay."""
    kept: dict[str, dict[int, Ints]] = {}
    for tensor, axis in coupling.axes:
        if tensor in model.constants:
            stays = coupling.keep((tensor, axis), keep)
            if not stays.all():
                kept.setdefault(tensor, {})[axis] = np.flatnonzero(stays).astype(np.int64)
    return {
        name: Weight(model.constants[name].shape, axes, _digests(model.constants[name]))
        for name, axes in kept.items()
    }


def save_keep_map(
    path: str | os.PathLike[str], model: Model, coupling: Coupling, keep: Bools
) -> None:
    """Write the keep-map of a pruned model, whole or not at all. Raises OutputError."""
    write_bytes(keep_map(model, coupling, keep), path)


def keep_map(model: Model, coupling: Coupling, keep: Bools) -> bytes:
    """The content of the keep-map of a pruned model."""
    found = weights(model, coupling, keep)
    arrays = {
        f"{name}:{axis}": index for name, w in found.items() for axis, index in w.kept.items()
    }
    about = {
        name: {"shape": list(w.shape), "digests": list(w.digests)} for name, w in found.items()
    }
    # One entry: the library keeps no order among several, and the same map should be the same bytes.
    metadata = {
        "kind": KIND,
        "schema_version": VERSION,
        "model_sha256": model.sha256,
        "weights": about,
    }
    return bytes(save(arrays, metadata={KEY: json.dumps(metadata)}))


def load_keep_map(path: str | os.PathLike[str]) -> dict[str, Weight]:
    """The weights of a keep-map by name. Raises DataError for a file that holds none."""
    arrays, metadata = _read(path, "a keep-map as `keep_map` of prune writes it")
    try:
        header = json.loads(metadata.get(KEY, "{}"))
        if header.get("kind") != KIND or header.get("schema_version") != VERSION:
            raise DataError(
                f"{path} is no keep-map of this version; write one by `keep_map` of prune."
            )
        about = header["weights"]
        kept: dict[str, dict[int, Ints]] = {name: {} for name in about}
        for key, index in arrays.items():
            name, _, axis = key.rpartition(":")
            if not axis.isdecimal():
                raise ValueError(f"an axis called {axis!r}")
            kept[name][int(axis)] = _checked(index, int(about[name]["shape"][int(axis)]))
        return {
            name: Weight(
                tuple(entry["shape"]), kept[name], (entry["digests"][0], entry["digests"][1])
            )
            for name, entry in about.items()
        }
    except (
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is a damaged keep-map ({error}); write it again.") from error


def cut(
    map_file: str | os.PathLike[str],
    state_dict: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> Checkpoint:
    """Cut the tensors of a state dict (safetensors) as a keep-map says, and write them to ``output``.

    A tensor is matched by name, else by content, as it is or transposed; one that matches nothing stays as it is.
    Raises DataError where files cannot be read, where a tensor has another shape than its weight, and where nothing
    matches; OutputError where the result cannot be written.
    """
    found = load_keep_map(map_file)
    state, metadata = _read(state_dict, "a state dict as safetensors.torch.save_file writes it")
    result: dict[str, Array] = {}
    tensors: list[Cut] = []
    matched: set[str] = set()
    for name, value in state.items():
        weight, turned = (
            (name, False) if name in found else _by_content(name, value, found, state_dict)
        )
        result[name] = value
        if weight is not None:
            matched.add(weight)
            result[name] = _cut(value, found[weight], turned, name, state_dict)
        tensors.append(Cut(name, weight, tuple(value.shape), tuple(result[name].shape)))
    if found and not matched:
        raise DataError(
            f"{state_dict} has none of the {len(found)} weights of {map_file}, neither by name "
            f"({', '.join(found)[:80]}) nor by content; give the state dict that the model was exported from."
        )
    content = save(result, metadata=metadata)
    write_bytes(content, output)
    unmatched = tuple(name for name in found if name not in matched)
    return Checkpoint(str(output), hashlib.sha256(content).hexdigest(), tuple(tensors), unmatched)


def _by_content(
    name: str, value: Array, found: Mapping[str, Weight], path: str | os.PathLike[str]
) -> tuple[str | None, bool]:
    """(weight that holds the same numbers, whether it holds them transposed); of several that whose name ends alike."""
    digest = _digest(value)
    same = [weight for weight, w in found.items() if digest in w.digests]
    if len(same) > 1:
        same = [weight for weight in same if name.endswith(weight)] or same
    if len(same) > 1:
        raise DataError(
            f"{path}: '{name}' holds the same numbers as {' and '.join(same[:2])}, so it cannot be told which of them "
            "it is; name it like one of them."
        )
    return (same[0], digest != found[same[0]].digests[0]) if same else (None, False)


def _cut(
    value: Array, weight: Weight, turned: bool, name: str, path: str | os.PathLike[str]
) -> Array:
    shape = weight.shape[::-1] if turned else weight.shape
    if value.shape != shape:
        raise DataError(
            f"{path}: '{name}' has shape {value.shape}, but the weight that was pruned has {shape}; give the state "
            "dict of the original network."
        )
    for axis, index in weight.kept.items():
        value = value.take(index, axis=len(shape) - 1 - axis if turned else axis)
    return np.ascontiguousarray(value)


def _checked(index: Array, length: int) -> Ints:
    if index.dtype != np.int64 or index.ndim != 1 or not index.size:
        raise ValueError("indices that are no vector of int64")
    if index.min() < 0 or index.max() >= length or (np.diff(index) <= 0).any():
        raise ValueError(f"indices that do not rise within 0 to {length - 1}")
    return index


def _digests(value: Array) -> tuple[str, str]:
    return _digest(value), _digest(value.T)


def _digest(value: Array) -> str:
    return hashlib.sha256(
        f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    ).hexdigest()


def _read(path: str | os.PathLike[str], what: str) -> tuple[dict[str, Array], dict[str, Any]]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give {what}.")
    try:
        with safe_open(os.fspath(path), "np") as file:
            names = file.keys()  # the file itself cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read as safetensors: {text.rstrip('.')}; give {what}."
        ) from error
