"""Layers far wider than their inputs and outputs: time and memory stay within bounds."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
from graphs import build
from onnx import numpy_helper

from onnx_oamip import prune
from onnx_oamip.core.records import Report
from onnx_oamip.core.settings import Settings


def _prune(tmp_path: Path, width: int, **settings: object) -> Report:
    rng = np.random.default_rng(0)
    proto = build(
        f"""(float[N,4] x) => (float[N,2] y) <float[4,{width}] w1, float[{width},2] w2> {{
            h = MatMul(x, w1)
            r = Relu(h)
            y = MatMul(r, w2)
        }}"""
    )
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    samples = {"x": rng.standard_normal((24, 4)).astype(np.float32)}
    chosen = Settings.create(
        **{"macs": 0.5, "align": 1, "device": "cpu", "workers": 1, "force": True, **settings}
    )
    return prune(tmp_path / "model.onnx", samples, tmp_path / "out.onnx", chosen)


def test_hundred_thousand_units_are_pruned_in_seconds_within_the_memory(tmp_path: Path) -> None:
    """Matrices of units by units would take 80 GB, and their inverses weeks."""
    tracemalloc.start()
    began = time.process_time()
    _prune(tmp_path, 100_000, max_memory="500MB")
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500e6
    assert seconds < 60
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer
    }
    width = weights["w2"].shape[0] if "w2" in weights else weights["w1"].shape[1]
    assert 49_000 <= width <= 50_000


def test_group_too_wide_for_a_program_takes_the_order_of_obs(tmp_path: Path) -> None:
    """The report gives the reason."""
    report = _prune(tmp_path, 5000, importance="oamip", mode="decoupled")
    expected = "are too wide for a program, so scores of the order of obs stand in (w1)"
    assert [note for note in report.notes if expected in note]
