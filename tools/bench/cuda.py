"""The calibration pass on a GPU: its time against the CPU's, whether it finds the same, and what transfers cost.

Every pass runs twice and the second one counts: kernels are chosen and memory is taken in the first. ``apart`` is the
largest difference of a moment over the scale of its tensor. ``copies %`` is the share of kernel time that
ONNX Runtime's own copy nodes take (its profile); ``transfers %`` what a pass saves when feeds lie on the device before
it starts and outputs stay there (IO binding), which the package does not do: only sums leave the device. Without the
CUDA provider the study says so and is left out.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.records import (
    Axis,
    Coupling,
    Model,
    Moments,
)
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.feeds import run_size
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session, resolve_device, runtime
from onnx_oamip.statistics import calibration

from .speed import ZOO, random_weights
from .studies import MODELS, Row, paths, save, store

COLUMNS = ("model", "samples", "CPU s", "GPU s", "times faster", "apart", "copies %", "transfers %")
CLOCKED = COLUMNS[2:]
RESNET, SAMPLES = "resnet50 (random weights)", 256
COPIES = ("MemcpyToHost", "MemcpyFromHost")


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per network: those shipped, and ResNet-50 on 256 images of noise, 224 pixels a side."""
    try:
        device = resolve_device("cuda")
    except EnvironmentMissing as error:
        print(f"cuda: left out; {error}")
        return ""
    rows: list[Row] = []
    for name in names or (*MODELS, RESNET):
        with tempfile.TemporaryDirectory() as folder:
            if name in MODELS:
                model, source = paths(name)
            else:
                model, source = Path(folder) / "resnet50.onnx", Path(folder) / "noise.npz"
                random_weights(ZOO / "light_resnet50.onnx", model, seed)
                noise = np.random.default_rng(seed).standard_normal(
                    (SAMPLES, 3, 224, 224), np.float32
                )
                np.savez(source, **{"gpu_0/data_0": noise})
            rows.append({"model": name, **measured(model, source, device)})
        print(rows[-1], flush=True)
        store(out, "cuda", rows, COLUMNS, seed, CLOCKED)
    return save(out, "cuda", rows, COLUMNS, seed, CLOCKED)


def measured(path: Path, source: Path, device: str) -> Row:
    """All columns but the name, ``device`` in the GPU's place."""
    model = models.load(path)
    samples = dataset.load(source, model)
    assert samples is not None
    model = models.rebind(model, samples.bindings(model))
    coupling = couple(model)
    batch = run_size(model)
    found, seconds = {}, {}
    for where in dict.fromkeys(("cpu", device)):
        for _ in range(2):
            begun = calibration.collect(model, coupling, samples, where, batch_size=batch)
        found[where], seconds[where] = begun.moments, begun.seconds
    copies, whole = copied(profiled(model, coupling, samples, device, batch))
    plain, bound = transfers(model, coupling, samples, device, batch)
    return {
        "samples": samples.usable(),
        "CPU s": round(seconds["cpu"], 3),
        "GPU s": round(seconds[device], 3),
        "times faster": round(seconds["cpu"] / seconds[device], 2),
        "apart": apart(found["cpu"], found[device]),
        "copies %": round(100 * copies / whole, 1) if whole else 0.0,
        "transfers %": round(100 * max(0.0, 1 - bound / plain), 1),
    }


def apart(ours: Mapping[Axis, Moments], theirs: Mapping[Axis, Moments]) -> float:
    """The largest difference of a moment over the scale of its tensor (the largest mean square, for means its root).

    Infinite where not the same tensors are known.
    """
    if ours.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for axis, one in ours.items():
        other, scale = theirs[axis], float(one.mean_square.max(initial=0.0)) or 1.0
        worst = max(
            worst, float(np.abs(one.mean_square - other.mean_square).max(initial=0.0)) / scale
        )
        worst = max(worst, float(np.abs(one.mean - other.mean).max(initial=0.0)) / scale**0.5)
    return worst


def copied(events: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """(microseconds of copy nodes, of all kernels) in a profile of ONNX Runtime."""
    kernels = [
        e
        for e in events
        if e.get("cat") == "Node" and str(e.get("name", "")).endswith("_kernel_time")
    ]
    copies = [e for e in kernels if e.get("args", {}).get("op_name") in COPIES]
    return sum(float(e["dur"]) for e in copies), sum(float(e["dur"]) for e in kernels)


def profiled(
    model: Model, coupling: Coupling, samples: Samples, device: str, batch: int
) -> list[dict[str, Any]]:
    """The profile of one calibration pass."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session(_statistics(model, coupling), device, profile=Path(folder) / "pass")
        for _, feed in samples.batches(batch):
            session.run(feed)
        events: list[dict[str, Any]] = json.loads(
            Path(session.end_profile()).read_text(encoding="utf-8")
        )
    return events


def transfers(
    model: Model, coupling: Coupling, samples: Samples, device: str, batch: int
) -> tuple[float, float]:
    """Seconds of a pass with feeds from the host, and with feeds and outputs on the device; second of two passes."""
    session = Session(_statistics(model, coupling), device)
    feeds = [feed for _, feed in samples.batches(batch)]
    bindings = [_bound(session, feed, device) for feed in feeds]

    def plain() -> None:
        for feed in feeds:
            session.run(feed)

    def bound() -> None:
        for binding in bindings:
            session._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

    return _second((plain, plain)), _second((bound, bound))


def _bound(session: Session, feed: Mapping[str, Any], device: str) -> Any:
    binding = session._session.io_binding()
    for name in session.inputs:
        binding.bind_ortvalue_input(
            name, runtime().OrtValue.ortvalue_from_numpy(feed[name], device, 0)
        )
    for name in session.outputs:
        binding.bind_output(name, device)
    binding.synchronize_inputs()
    return binding


def _second(passes: Sequence[Any]) -> float:
    for once in passes:
        start = time.perf_counter()
        once()
    return time.perf_counter() - start


def _statistics(model: Model, coupling: Coupling) -> Any:
    """The graph that the calibration pass runs."""
    return calibration._instrument(model, calibration.consumed(model, coupling))
