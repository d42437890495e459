"""Quantisation to int8 by ONNX Runtime, of a model file."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import onnx
from onnx import ModelProto, TensorProto

from onnx_oamip.core.atomic_files import scratch
from onnx_oamip.core.errors import ModelError, SettingsError
from onnx_oamip.core.options import QuantisationOptions
from onnx_oamip.core.records import Array
from onnx_oamip.graph import external_data
from onnx_oamip.graph.ops import domains
from onnx_oamip.graph.runtime import quantiser, runtime_errors

CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""Name of each way to choose the ranges of activations, in ONNX Runtime."""
PER_CHANNEL_OPSET = 13
"""First opset whose quantisation has scales by channel."""
INTEGERS = (TensorProto.INT8, TensorProto.UINT8)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class Reader(Protocol):
    """Calibration samples as ONNX Runtime reads them."""

    def get_next(self) -> dict[str, Array] | None:
        """Return the next feed.

        Returns:
            Arrays by input name, None after the last feed.
        """


@dataclass(frozen=True, eq=False)
class Int8Model:
    """A quantised model.

    Attributes:
        proto: The model.
        weights: Matrices and kernels that are int8.
        float_weights: Those that are still floating-point numbers.
        per_channel: True if every output channel of a weight has its own scale.
        kept: Names of the nodes that were left out as asked.
    """

    proto: ModelProto
    weights: int
    float_weights: int
    per_channel: bool
    kept: tuple[str, ...]


def quantise(
    path: Path,
    options: QuantisationOptions,
    reader: Reader | None = None,
    *,
    name: str | None = None,
) -> Int8Model:
    """Quantise a model file.

    Args:
        path: Model file.
        options: How it is quantised.
        reader: Calibration samples; only the dynamic mode does without.
        name: Name of the model in messages; its path by default.

    Returns:
        The quantised model.

    Raises:
        ModelError: ONNX Runtime cannot quantise the model, or finds no weight to quantise.
        SettingsError: A pattern of ``keep_float`` matches no node.
    """
    ort = quantiser()
    name = name or str(path)
    is_large = path.stat().st_size > external_data.PROTOBUF_LIMIT
    with scratch() as folder, _silent(), runtime_errors(f"quantise {name}"):
        prepared = folder / "prepared.onnx"
        ort.quant_pre_process(
            str(path),
            str(prepared),
            skip_symbolic_shape=True,
            save_as_external_data=is_large,
        )
        graph = onnx.load(prepared, load_external_data=False)
        if _matrices(graph, INTEGERS):
            raise ModelError(f"{name} has weights of 8 bits already; give the model before int8.")
        kept = _kept(graph, options.keep_float, name)
        per_channel = not options.per_tensor and domains.opset(graph) >= PER_CHANNEL_OPSET
        target = folder / "int8.onnx"
        common: dict[str, Any] = {
            "per_channel": per_channel,
            "reduce_range": options.reduce_range,
            "nodes_to_exclude": list(kept),
            "use_external_data_format": is_large,
        }
        if options.ranges == "dynamic":
            # Integer convolutions of ONNX Runtime take unsigned weights only.
            kind = ort.QuantType.QUInt8
            ort.quantize_dynamic(str(prepared), str(target), weight_type=kind, **common)
        else:
            method = getattr(ort.CalibrationMethod, CALIBRATIONS[options.calibration])
            ort.quantize_static(
                str(prepared), str(target), reader, calibrate_method=method, **common
            )
        proto = onnx.load(target)
    weights = _matrices(proto, INTEGERS)
    if not weights:
        advice = "leave int8 out" if options.ranges == "dynamic" else "try `ranges=dynamic`"
        raise ModelError(
            f"ONNX Runtime finds no weight of {name} to make int8, as it leaves functions and bodies of nodes alone; "
            f"{advice}."
        )
    return Int8Model(proto, weights, _matrices(proto, FLOATS), per_channel, kept)


def _kept(proto: ModelProto, patterns: tuple[str, ...], model: str) -> tuple[str, ...]:
    """Names of the nodes that match a pattern. Raises SettingsError for a pattern that matches none."""
    names = [node.name for node in proto.graph.node if node.name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingsError(
                f"`keep_float={pattern}` matches no node of {model} as ONNX Runtime simplifies it; it has nodes such "
                f"as {', '.join(names[:3])}."
            )
    return tuple(name for name in names if any(fnmatchcase(name, p) for p in patterns))


def _matrices(proto: ModelProto, types: tuple[int, ...]) -> int:
    """Number of initialisers of these types with two axes and more; scales and zero points have fewer."""
    return sum(t.data_type in types and len(t.dims) > 1 for t in proto.graph.initializer)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the remarks of ONNX Runtime's tools, which concern their own interface, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
