"""Seconds and memory of ``inspect`` on a transformer of a gigabyte, weights beside the graph and inside it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from ..make_large_model import make
from .studies import ROOT, Row, save

COLUMNS = ("model", "weights", "file MB", "inspect s", "peak MB")
CLOCKED = ("inspect s", "peak MB")
LAYERS = {"transformer-20": 20}
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run([sys.executable, "-m", "onnx_oamip", "inspect", sys.argv[1]], stdout=subprocess.DEVNULL, check=True)
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000]))
"""


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per model and way of keeping its weights; the better of two runs, so that files are in the cache."""
    rows: list[Row] = []
    for name, layers in LAYERS.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            beside = Path(folder) / "beside.onnx"
            size = make(beside, layers, seed=seed)
            inside = Path(folder) / "inside.onnx"
            inside.write_bytes(onnx.load(beside).SerializeToString())
            for path, where in ((beside, "beside the graph"), (inside, "inside")):
                found = [_measure(path) for _ in range(2)]
                seconds, peak = min(f[0] for f in found), max(f[1] for f in found)
                rows.append(
                    {
                        "model": name,
                        "weights": where,
                        "file MB": round(size / 1e6),
                        "inspect s": round(seconds, 1),
                        "peak MB": round(peak),
                    }
                )
    return save(out, "large", rows, COLUMNS, seed, CLOCKED)


def _measure(path: Path) -> tuple[float, float]:
    """(seconds, peak megabytes) of one process."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    seconds, peak = json.loads(done.stdout)
    return float(seconds), float(peak)
