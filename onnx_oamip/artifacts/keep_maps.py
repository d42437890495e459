"""Keep-maps: the kept indices of every pruned weight, for pruning a PyTorch state dict in the same way.

A keep-map is a safetensors file with one int64 vector of kept indices for every pruned axis, named ``tensor:axis``
after the ONNX initialiser. Weights of a state dict are found by the same name or, since exporters rename and transpose,
by their content. They are pruned and not refitted: fine-tuning starts from the trained weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from onnx_oamip.core.atomic_files import write_bytes
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Ints,
    Model,
    Scores,
)

PUBLISHED_THRESHOLD = 0.1
"""Keep variable below which the published experiments on dense networks remove a unit."""
METADATA_KEY = "onnx_oamip"
KIND = "keep-map"
SCHEMA_VERSION = 1
MAX_LISTED_CHARACTERS = 80
"""Characters of the names of weights in an error."""


@dataclass(frozen=True)
class Weight:
    """One pruned initialiser.

    Attributes:
        shape: Shape before pruning.
        kept: Kept indices by axis.
        digests: Digests of its content as it is and transposed.
    """

    shape: tuple[int, ...]
    kept: Mapping[int, Ints]
    digests: tuple[str, str]


@dataclass(frozen=True)
class Cut:
    """One tensor of a state dict.

    Attributes:
        name: Name in the state dict.
        weight: Initialiser that it was matched with, None if it was left as it is.
        before: Shape before pruning.
        after: Shape after pruning.
    """

    name: str
    weight: str | None
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Result of :func:`cut`.

    Attributes:
        output: File that was written.
        sha256: Its digest.
        tensors: All tensors of the state dict.
        unmatched: Pruned initialisers that are in no tensor of the state dict.
    """

    output: str
    sha256: str
    tensors: tuple[Cut, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Mask:
    """Keep-map of the units whose scores reach a threshold.

    Attributes:
        path: File that was written.
        sha256: Its digest.
        threshold: Least score of a kept unit.
        kept: Number of kept units.
    """

    path: str
    sha256: str
    threshold: float
    kept: int


def published_mask(coupling: Coupling, scores: Scores, threshold: float) -> Bools:
    """Choose the units whose keep variables reach a threshold, as published; every group keeps its best unit.

    Args:
        coupling: Units of the model.
        scores: Scores of the units.
        threshold: Least keep variable of a kept unit.

    Returns:
        Kept units (n_units,).

    Raises:
        SettingsError: Scores are no keep variables of programs over the network.
    """
    if not scores.programs or not all("mode" in program for program in scores.programs):
        raise _no_keep_variables(f"by {scores.method}")
    keep = scores.values >= threshold
    for group in coupling.groups:
        best = group.units[np.argmax(scores.values[group.units])]
        keep[best] = True
    return np.asarray(keep, bool)


def check_mask(importance: str, mode: str, threshold: float) -> None:
    """Refuse a mask before any work is done.

    Args:
        importance: Importance method that is asked for.
        mode: Mode of its programs.
        threshold: Least keep variable of a kept unit.

    Raises:
        SettingsError: The method has no keep variables, or the threshold is no value of one.
    """
    if importance != "oamip":
        raise _no_keep_variables(f"by {importance}")
    if mode == "decoupled":
        raise _no_keep_variables("of single layers by `mode=decoupled`")
    if not 0 < threshold <= 1:
        raise SettingsError(
            f"`mask_threshold` is {threshold}; expected a keep variable, more than 0 and at most 1."
        )


def _no_keep_variables(scores: str) -> SettingsError:
    return SettingsError(
        "`save_mask` compares keep variables of programs over the whole network with a threshold, but scores "
        f"{scores} are others; score by `importance=oamip` with `mode=joint` or `mode=per-class`, or let prune choose "
        "the units and write its keep-map."
    )


def pruned_weights(
    model: Model,
    coupling: Coupling,
    keep: Bools,
) -> dict[str, Weight]:
    """Find the initialisers that lose channels.

    Args:
        model: Model to prune.
        coupling: Units of the model.
        keep: Kept units (n_units,).

    Returns:
        Kept indices by initialiser.
    """
    kept: dict[str, dict[int, Ints]] = {}
    for tensor, axis in coupling.axes:
        if not model.is_stored(tensor):
            continue
        mask = coupling.keep((tensor, axis), keep)
        if not mask.all():
            kept.setdefault(tensor, {})[axis] = np.flatnonzero(mask).astype(np.int64)
    weights = {}
    for name, axes in kept.items():
        value = model.constants[name]
        weights[name] = Weight(value.shape, axes, (_digest(value), _digest(value.T)))
    return weights


def save_keep_map(
    path: str | os.PathLike[str],
    model: Model,
    coupling: Coupling,
    keep: Bools,
) -> None:
    """Write the keep-map of a pruned model, completely or not at all.

    Args:
        path: File to write.
        model: Model that was pruned.
        coupling: Units of the model.
        keep: Kept units (n_units,).

    Raises:
        OutputError: The file cannot be written.
    """
    write_bytes(keep_map(model, coupling, keep), path)


def keep_map(model: Model, coupling: Coupling, keep: Bools) -> bytes:
    """Build the keep-map of a pruned model.

    Args:
        model: Model that was pruned.
        coupling: Units of the model.
        keep: Kept units (n_units,).

    Returns:
        Content of the file.
    """
    arrays = {}
    entries = {}
    for name, weight in pruned_weights(model, coupling, keep).items():
        entries[name] = {"shape": list(weight.shape), "digests": list(weight.digests)}
        for axis, index in weight.kept.items():
            arrays[f"{name}:{axis}"] = index
    # A single entry: the library keeps no order among several, and the same map must be the same bytes.
    metadata = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "model_sha256": model.sha256,
        "weights": entries,
    }
    return bytes(save(arrays, metadata={METADATA_KEY: json.dumps(metadata)}))


def load_keep_map(path: str | os.PathLike[str]) -> dict[str, Weight]:
    """Load a keep-map.

    Args:
        path: File to load.

    Returns:
        The pruned weights by name.

    Raises:
        DataError: The file holds no keep-map.
    """
    stored = _read(path, "a keep-map as `keep_map` of prune writes it")
    try:
        header = json.loads(stored.metadata.get(METADATA_KEY, "{}"))
        if header.get("kind") != KIND or header.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{path} is no keep-map of this version; write one by `keep_map` of prune."
            )
        return _weights(stored.tensors, header["weights"])
    except DataError:
        raise
    except (
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise DataError(f"{path} is a damaged keep-map ({error}); write it again.") from error


def _weights(arrays: Mapping[str, Array], entries: Mapping[str, Any]) -> dict[str, Weight]:
    """Weights from the content of a keep-map; raises various exceptions if it is damaged."""
    kept: dict[str, dict[int, Ints]] = {name: {} for name in entries}
    for key, index in arrays.items():
        name, _, axis = key.rpartition(":")
        if not axis.isdecimal():
            raise ValueError(f"an axis called {axis!r}")
        length = int(entries[name]["shape"][int(axis)])
        kept[name][int(axis)] = _checked(index, length)
    weights = {}
    for name, entry in entries.items():
        digests = (entry["digests"][0], entry["digests"][1])
        weights[name] = Weight(tuple(entry["shape"]), kept[name], digests)
    return weights


def _checked(index: Array, length: int) -> Ints:
    """Kept indices of an axis; raises ValueError unless they rise strictly within its length."""
    if index.dtype != np.int64 or index.ndim != 1:
        raise ValueError("indices that are no vector of int64")
    if not index.size:
        return index  # the group is emptied
    if index.min() < 0 or index.max() >= length or (np.diff(index) <= 0).any():
        raise ValueError(f"indices that do not rise within 0 to {length - 1}")
    return index


def cut(
    map_file: str | os.PathLike[str],
    state_dict: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> Checkpoint:
    """Prune the tensors of a state dict (safetensors) by a keep-map.

    A tensor is matched by name, else by content, as it is or transposed; one without a match is left as it is.

    Args:
        map_file: Keep-map.
        state_dict: Weights of the original network.
        output: File to write.

    Returns:
        The tensors with their matches.

    Raises:
        DataError: A file cannot be read, a tensor has another shape than its weight, or nothing matches.
        OutputError: The output cannot be written.
    """
    weights = load_keep_map(map_file)
    stored = _read(state_dict, "a state dict as safetensors.torch.save_file writes it")
    result: dict[str, Array] = {}
    tensors: list[Cut] = []
    matched: set[str] = set()
    for name, value in stored.tensors.items():
        match = _match(name, value, weights, state_dict)
        result[name] = value
        if match is not None:
            matched.add(match.weight)
            weight = weights[match.weight]
            result[name] = _prune(value, weight, match.transposed, name, state_dict)
        weight_name = None if match is None else match.weight
        tensors.append(Cut(name, weight_name, tuple(value.shape), tuple(result[name].shape)))
    if weights and not matched:
        listed = ", ".join(weights)[:MAX_LISTED_CHARACTERS]
        raise DataError(
            f"{state_dict} has none of the {len(weights)} weights of {map_file}, neither by name ({listed}) nor by "
            "content; give the state dict that the model was exported from."
        )
    content = save(result, metadata=stored.metadata)
    write_bytes(content, output)
    return Checkpoint(
        output=str(output),
        sha256=hashlib.sha256(content).hexdigest(),
        tensors=tuple(tensors),
        unmatched=tuple(name for name in weights if name not in matched),
    )


class _Match(NamedTuple):
    """Initialiser that a tensor holds, as it is or transposed."""

    weight: str
    transposed: bool


def _match(
    name: str,
    value: Array,
    weights: Mapping[str, Weight],
    path: str | os.PathLike[str],
) -> _Match | None:
    """The weight of the same name, else of the same content; of several the one whose name ends the tensor's."""
    if name in weights:
        return _Match(name, transposed=False)
    digest = _digest(value)
    equal = [key for key, weight in weights.items() if digest in weight.digests]
    if len(equal) > 1:
        equal = [key for key in equal if name.endswith(key)] or equal
    if len(equal) > 1:
        raise DataError(
            f"{path}: '{name}' holds the same numbers as {' and '.join(equal[:2])}, so it cannot be told which of them "
            "it is; name it like one of them."
        )
    if not equal:
        return None
    return _Match(equal[0], transposed=digest != weights[equal[0]].digests[0])


def _prune(
    value: Array,
    weight: Weight,
    transposed: bool,
    name: str,
    path: str | os.PathLike[str],
) -> Array:
    """The kept part of a tensor."""
    shape = weight.shape[::-1] if transposed else weight.shape
    if value.shape != shape:
        raise DataError(
            f"{path}: '{name}' has shape {value.shape}, but the weight that was pruned has {shape}; give the state "
            "dict of the original network."
        )
    for axis, index in weight.kept.items():
        own_axis = len(shape) - 1 - axis if transposed else axis
        value = value.take(index, axis=own_axis)
    return np.ascontiguousarray(value)


def _digest(value: Array) -> str:
    """Digest of type, shape and content."""
    header = f"{value.dtype}{value.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(value).tobytes()).hexdigest()


class _Stored(NamedTuple):
    """Content of a safetensors file."""

    tensors: dict[str, Array]
    metadata: dict[str, Any]


def _read(path: str | os.PathLike[str], expected: str) -> _Stored:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give {expected}.")
    try:
        with safe_open(os.fspath(path), "np") as file:
            names = file.keys()  # the file itself cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
            return _Stored(tensors, dict(file.metadata() or {}))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = str(error)
        if text:
            reason = text.splitlines()[0]
        else:
            reason = type(error).__name__
        raise DataError(
            f"{path} cannot be read as safetensors: {reason.rstrip('.')}; give {expected}."
        ) from error
