"""Measured latency against the ideal, and the cost of pruning in units of one plain calibration pass.

The ResNet-50 is the graph in the onnx package with seeded random weights (He scale): its accuracy means nothing, its
shapes, times and memory do.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.runtime import Session
from onnx_oamip.verification.latency import compare_latency

from .studies import Row, paths, save

COLUMNS = (
    "model",
    "budget",
    "MACs kept",
    "latency ratio",
    "share of ideal speed-up",
    "prune / plain pass",
    "peak MiB",
)
CLOCKED = COLUMNS[2:]
"""A latency budget is met by measuring, and so is the step of widths: nothing here is the same twice."""
ZOO = Path(onnx.__file__).parent / "backend/test/data/light"


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """vgg-fashion and ResNet-50 at half the MACs, vgg-fashion at 0.6 of its latency."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        vgg, fashion = paths("vgg-fashion")
        if not names or "vgg-fashion" in names:
            rows.append(_row("vgg-fashion", vgg, fashion, {"macs": 0.5, "seed": seed}))
            rows.append(_row("vgg-fashion", vgg, fashion, {"latency": 0.6, "seed": seed}))
        if not names or "resnet50" in names:
            resnet, images = Path(folder) / "resnet50.onnx", Path(folder) / "images.npz"
            random_weights(ZOO / "light_resnet50.onnx", resnet, seed)
            shape = (64, 3, 224, 224)
            np.savez(
                images,
                **{"gpu_0/data_0": np.random.default_rng(seed).standard_normal(shape, np.float32)},
            )
            rows.append(
                _row(
                    "resnet50 (random weights, 64 images)",
                    resnet,
                    images,
                    {"macs": 0.5, "seed": seed},
                )
            )
    return save(out, "speed", rows, COLUMNS, seed, CLOCKED)


def _row(name: str, model: Path, source: Path, budget: dict[str, float]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.onnx"
        plain = plain_pass(model, source)
        start = time.perf_counter()
        report = pipeline.prune(model, source, target, Settings.create(**budget))
        spent = time.perf_counter() - start
        samples = dataset.load(source, report.model)
        assert samples is not None
        ratio = compare_latency(report.model.proto, str(target), samples, "cpu", seconds=10.0)
    kept = report.after.macs / report.before.macs
    row: Row = {
        "model": name,
        "budget": ", ".join(f"{k} {v}" for k, v in budget.items() if k != "seed"),
        "MACs kept": round(kept, 4),
        "latency ratio": round(ratio.median, 3),
        "share of ideal speed-up": round(kept / ratio.median, 3),
        "prune / plain pass": round(spent / plain, 1),
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(row, {k: round(v, 1) for k, v in report.timings.items()}, flush=True)
    return row


def plain_pass(model: Path, source: Path) -> float:
    """Seconds of one ONNX Runtime pass over the calibration data, second of two."""
    loaded = models.load(model)
    samples = dataset.load(source, loaded)
    assert samples is not None
    session = Session(loaded.proto, "cpu", spin=True)
    for _ in range(2):
        start = time.perf_counter()
        for _, feed in samples.batches(32):
            session.run(feed)
    return time.perf_counter() - start


def random_weights(source: Path, target: Path, seed: int, size: int | None = None) -> None:
    """The graph with He-scaled random weights; normalisation statistics stay positive.

    ``size``: other pixels of a side; the last pool then takes the whole map, whatever its size.
    """
    rng = np.random.default_rng(seed)
    proto = models.load(source).proto
    if size is not None:
        dims = proto.graph.input[0].type.tensor_type.shape.dim
        dims[2].dim_value = dims[3].dim_value = size
        del proto.graph.value_info[:]
        last = next(n for n in reversed(proto.graph.node) if n.op_type == "AveragePool")
        last.op_type = "GlobalAveragePool"
        del last.attribute[:]
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype != np.float32 or value.ndim == 0 or value.size < 8:
            continue
        if value.ndim > 1:
            fresh = rng.standard_normal(value.shape) * np.sqrt(2 / np.prod(value.shape[1:]))
        else:
            fresh = 1 + 0.1 * rng.random(value.shape)
        tensor.CopyFrom(numpy_helper.from_array(fresh.astype(np.float32), tensor.name))
    onnx.save(proto, target)
