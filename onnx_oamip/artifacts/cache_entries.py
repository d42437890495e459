"""Kinds of cache entries: the conversion of each result to plain arrays and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from onnx_oamip.artifacts import json_text
from onnx_oamip.core.records import (
    Array,
    Fit,
    Floats,
    Gram,
    Moments,
    Pruned,
    Scores,
    Sensitivity,
)
from onnx_oamip.graph.external_data import references

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One kind of entry.

    Attributes:
        name: Prefix of the file name.
        pack: Converts a result to arrays by name; None if this result cannot be stored.
        unpack: Converts arrays back; raises any exception for arrays of other content.
    """

    name: str
    pack: Callable[[T], Mapping[str, Array] | None]
    unpack: Callable[[Mapping[str, Array]], T]


def _as_text(value: Any) -> Array:
    """JSON of a value, as an array that needs no pickle."""
    return np.asarray(json.dumps(value, default=json_text.plain_number), np.str_)


def _from_text(array: Array) -> Any:
    return json.loads(str(array))


def _pack_moments(moments: Mapping[tuple[str, int], Moments]) -> dict[str, Array]:
    index = [[tensor, axis, m.count] for (tensor, axis), m in moments.items()]
    arrays: dict[str, Array] = {"index": _as_text(index)}
    for i, m in enumerate(moments.values()):
        arrays[f"mean{i}"] = m.mean
        arrays[f"square{i}"] = m.mean_square
    return arrays


def _unpack_moments(arrays: Mapping[str, Array]) -> dict[tuple[str, int], Moments]:
    moments = {}
    for i, (tensor, axis, count) in enumerate(_from_text(arrays["index"])):
        moments[tensor, axis] = Moments(arrays[f"mean{i}"], arrays[f"square{i}"], count)
    return moments


def _pack_grams(grams: Mapping[str, Gram]) -> dict[str, Array]:
    # Nodes that share a weight have one covariance, which is kept under the name of the first.
    distinct = {name: gram for name, gram in grams.items() if not gram.uses or name == gram.uses[0]}
    index = [
        [name, gram.taps, gram.rows, gram.factor is not None, *gram.uses]
        for name, gram in distinct.items()
    ]
    arrays: dict[str, Array] = {"index": _as_text(index)}
    for i, gram in enumerate(distinct.values()):
        arrays[f"values{i}"] = gram.values
        arrays[f"mean{i}"] = gram.mean
        arrays[f"columns{i}"] = gram.columns
    return arrays


def _unpack_grams(arrays: Mapping[str, Array]) -> dict[str, Gram]:
    grams: dict[str, Gram] = {}
    for i, (name, taps, rows, is_factor, *uses) in enumerate(_from_text(arrays["index"])):
        values = arrays[f"values{i}"]
        gram = Gram(
            matrix=None if is_factor else values,
            mean=arrays[f"mean{i}"],
            columns=arrays[f"columns{i}"],
            taps=taps,
            rows=rows,
            factor=values if is_factor else None,
            uses=tuple(uses),
        )
        grams |= dict.fromkeys(uses or [name], gram)
    return grams


def _pack_scores(scores: Scores) -> dict[str, Array]:
    about = {"method": scores.method, "programs": scores.programs, "notes": scores.notes}
    return {"values": scores.values, "about": _as_text(about)}


def _unpack_scores(arrays: Mapping[str, Array]) -> Scores:
    about = _from_text(arrays["about"])
    programs = tuple(about["programs"])
    return Scores(about["method"], arrays["values"], programs, tuple(about["notes"]))


def _pack_losses(losses: tuple[Sensitivity, ...]) -> dict[str, Array]:
    arrays: dict[str, Array] = {"groups": np.asarray(len(losses))}
    for i, sensitivity in enumerate(losses):
        arrays[f"widths{i}"] = sensitivity.widths
        arrays[f"loss{i}"] = sensitivity.loss
    return arrays


def _unpack_losses(arrays: Mapping[str, Array]) -> tuple[Sensitivity, ...]:
    groups = range(int(arrays["groups"]))
    return tuple(Sensitivity(arrays[f"widths{i}"], arrays[f"loss{i}"]) for i in groups)


def _pack_some_losses(losses: Mapping[int, Sensitivity]) -> dict[str, Array]:
    packed = _pack_losses(tuple(losses.values()))
    return {**packed, "numbers": np.asarray(list(losses), np.int64)}


def _unpack_some_losses(arrays: Mapping[str, Array]) -> Mapping[int, Sensitivity]:
    numbers = arrays["numbers"].tolist()
    return dict(zip(numbers, _unpack_losses(arrays), strict=True))


def _pack_refit(pruned: Pruned) -> dict[str, Array] | None:
    """All but ``raw``, which is quick to compute. None if weights are in files that belong to this process."""
    if references(pruned.proto):
        return None
    about = [pruned.notes, [dataclasses.astuple(fit) for fit in pruned.fits]]
    return {
        "proto": np.frombuffer(pruned.proto.SerializeToString(), np.uint8),
        "about": _as_text(about),
    }


def _unpack_refit(arrays: Mapping[str, Array]) -> Pruned:
    notes, fits = _from_text(arrays["about"])
    try:
        proto = onnx.ModelProto.FromString(arrays["proto"].tobytes())
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return Pruned(None, proto, tuple(notes), tuple(Fit(*fit) for fit in fits))


def _pack_outputs(outputs: Sequence[Sequence[Array]]) -> dict[str, Array] | None:
    """Outputs by batch and number. None if an output is of a type that numpy itself cannot store."""
    counts = [len(values) for values in outputs]
    arrays: dict[str, Array] = {"count": np.asarray(counts, np.int64)}
    for batch, values in enumerate(outputs):
        for i, value in enumerate(values):
            if not _is_storable(value):
                return None
            arrays[f"{batch} {i}"] = value
    return arrays


def _is_storable(value: Any) -> bool:
    """True for arrays of booleans and numbers in numpy's own types."""
    if not isinstance(value, np.ndarray):
        return False
    return value.dtype.isbuiltin == 1 and value.dtype.kind in "biuf"


def _unpack_outputs(arrays: Mapping[str, Array]) -> list[list[Array]]:
    outputs = []
    for batch, count in enumerate(arrays["count"].tolist()):
        outputs.append([arrays[f"{batch} {i}"] for i in range(count)])
    return outputs


def _pack_steps(steps: Array) -> dict[str, Array]:
    return {"steps": steps}


def _unpack_steps(arrays: Mapping[str, Array]) -> Array:
    return arrays["steps"]


MOMENTS: Kind[Mapping[tuple[str, int], Moments]] = Kind("moments", _pack_moments, _unpack_moments)
"""Means and mean squares by axis."""
GRAMS: Kind[Mapping[str, Gram]] = Kind("grams", _pack_grams, _unpack_grams)
"""Covariances by consumer."""
SCORES: Kind[Scores] = Kind("scores", _pack_scores, _unpack_scores)
"""Importance scores."""
LOSSES: Kind[tuple[Sensitivity, ...]] = Kind("losses", _pack_losses, _unpack_losses)
"""Losses by width, one entry per group."""
SOME_LOSSES: Kind[Mapping[int, Sensitivity]] = Kind(
    "some-losses", _pack_some_losses, _unpack_some_losses
)
"""Losses of the groups that an unfinished run has measured, by the number of the group."""
REFITS: Kind[Pruned] = Kind("refit", _pack_refit, _unpack_refit)
"""Refitted models."""
OUTPUTS: Kind[list[list[Array]]] = Kind("outputs", _pack_outputs, _unpack_outputs)
"""Outputs of the original model on the held-out samples."""
RELEVANCE: Kind[Mapping[str, Floats]] = Kind("relevance", dict, dict)
"""Weights of the outputs of linear consumers, by node."""
STEPS: Kind[Array] = Kind("steps", _pack_steps, _unpack_steps)
"""Alignment steps of the groups."""
