"""Study of the cost of pruning: seconds and memory against width, depth, samples and resolution.

Plain stacks of 3 x 3 convolutions with seeded random weights, fed noise: accuracy means nothing, sizes do. One size at
a time moves, the others stay as in ``BASE``. The exponent b of seconds = start-up + a * size ** b is that between the
larger half of the sizes (``exponents``), once what ``START``, a stack of next to no work, takes is off: smaller sizes
cost more to set up than to work on. ``passes`` are the seconds in plain ONNX Runtime passes over the same data. Memory
is what a run added at its peak, in a process of its own; threads are as many as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .studies import ROOT, Row, save, store

BASE: Mapping[str, int] = {"width": 64, "depth": 4, "samples": 128, "resolution": 8}
START: Mapping[str, int] = {"width": 4, "depth": 2, "samples": 8, "resolution": 4}
SWEEPS: Mapping[str, tuple[int, ...]] = {
    "width": (32, 64, 128, 256),
    "depth": (2, 4, 8, 16),
    "samples": (128, 256, 512, 1024),
    "resolution": (4, 8, 16, 32),
}
STAGES = ("calibrate", "sensitivity", "plan and refit")
GATE = "verify"
"""The stage that holds the latency gate, which measures for a fixed time: no part of ``seconds``."""
COLUMNS = ("varied", *BASE, "seconds", "passes", *STAGES, "other stages", GATE, "peak MiB added")
CLOCKED = ("seconds", "passes", *STAGES, "other stages", GATE, "peak MiB added")
EXPONENTS = ("varied", "seconds", *STAGES, "peak MiB added")
ONE = """
import json, sys
from onnx_oamip.api import pipeline
from onnx_oamip.core.settings import Settings
from onnx_oamip.verification import latency
from tools.bench.speed import plain_pass
latency.resolve_device("cpu")  # imports the runtime
latency._forget_peak()
before = latency._resident("VmRSS")
settings = Settings.create(macs=0.5, align=1, force=True, workers=1, seed=int(sys.argv[3]), cache="off")
report = pipeline.prune(sys.argv[1], sys.argv[2], None, settings)
peak = (latency._resident("VmHWM") - before) / 2**20
print(json.dumps([report.timings, peak, plain_pass(sys.argv[1], sys.argv[2])]))
"""


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per size; ``names`` are of what varies. ``cost-exponents`` has a row for each of them."""
    rows: list[Row] = []
    chosen = {varied: values for varied, values in SWEEPS.items() if not names or varied in names}
    if not chosen:
        print(
            f"cost is about no network: --model names what varies there, of {', '.join(SWEEPS)}.",
            flush=True,
        )
        return ""
    start = {"varied": "start-up", **_measured(START, seed)}
    print(start, flush=True)
    for varied, values in chosen.items():
        for value in values:
            rows.append({"varied": varied, **_measured({**BASE, varied: value}, seed)})
            print(rows[-1], flush=True)
            store(out, "cost", rows, COLUMNS, seed, CLOCKED)
    save(out, "cost-exponents", exponents(rows, start), EXPONENTS, seed, CLOCKED)
    return save(out, "cost", [start, *rows], COLUMNS, seed, CLOCKED)


def exponents(rows: Sequence[Row], start: Mapping[str, float] | None = None) -> list[Row]:
    """For every size that varies the exponent of seconds, of each stage and of the peak memory.

    Of the larger half of the sizes, and of what is above ``start``.
    """
    found = []
    for varied in dict.fromkeys(r["varied"] for r in rows):
        here = sorted((r for r in rows if r["varied"] == varied), key=lambda r: float(r[varied]))
        here = here[min(len(here) // 2, max(len(here) - 2, 0)) :]
        sizes = [r[varied] for r in here]
        row: Row = {"varied": varied}
        for column in EXPONENTS[1:]:
            less = (start or {}).get(column, 0.0)
            row[column] = exponent(
                sizes, [None if r.get(column) is None else r[column] - less for r in here]
            )
        found.append(row)
    return found


def exponent(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """b of values = a * sizes ** b by least squares of logarithms; None for under two values above zero."""
    pairs = [(s, v) for s, v in zip(sizes, values, strict=True) if v is not None and v > 0]
    if len(pairs) < 2:
        return None
    slope, _ = np.polyfit(*np.log(np.asarray(pairs, np.float64)).T, 1)
    return round(float(slope), 2)


def _measured(size: Mapping[str, int], seed: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / "stack.onnx", Path(folder) / "noise.npz"
        rng = np.random.default_rng(seed)
        stack(model, size["width"], size["depth"], size["resolution"], rng)
        shape = (size["samples"], 3, size["resolution"], size["resolution"])
        few = rng.standard_normal((32, *shape[1:]), np.float32)
        np.savez(data, **{"x": rng.standard_normal(shape, np.float32), "eval.x": few})
        command = [sys.executable, "-c", ONE, str(model), str(data), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"pruning {dict(size)} failed: {done.stderr.strip().splitlines()[-1]}")
    timings, peak, plain = json.loads(done.stdout.splitlines()[-1])
    row: Row = {**size, "seconds": round(sum(v for k, v in timings.items() if k != GATE), 3)}
    row["passes"] = round(row["seconds"] / plain, 1)
    row |= {stage: round(timings.get(stage, 0.0), 3) for stage in STAGES}
    row["other stages"] = round(sum(v for k, v in timings.items() if k not in (*STAGES, GATE)), 3)
    row[GATE] = round(timings[GATE], 3)
    return {**row, "peak MiB added": round(peak)}


def stack(target: Path, width: int, depth: int, resolution: int, rng: np.random.Generator) -> None:
    """``depth`` convolutions with ReLU, the mean over the map, 10 outputs."""
    nodes, constants, last = [], [], "x"
    for i in range(depth):
        inner = width if i else 3
        weight = rng.standard_normal((width, inner, 3, 3)) * np.sqrt(2 / (9 * inner))
        constants.append(numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last = f"r{i}"
    head = (rng.standard_normal((10, width)) * np.sqrt(1 / width)).astype(np.float32)
    constants.append(numpy_helper.from_array(head, "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "head"], ["y"], transB=1))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, resolution, resolution])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph(nodes, "stack", [x], [y], constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), target
    )
