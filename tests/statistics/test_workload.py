"""Samples of measurements that run a model many times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graphs import build, load
from graphs import samples as random_samples

from onnx_oamip.data import dataset
from onnx_oamip.graph import cost
from onnx_oamip.graph.coupling import couple
from onnx_oamip.planning import sensitivity
from onnx_oamip.statistics import relevance, workload

TEXT = """(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {
    a = MatMul(x, w1)
    h = Relu(a)
    y = MatMul(h, w2)
}"""
MACS = 5 * 8 + 8 * 3


def _context(tmp_path: Path, count: int = 80) -> Any:
    model = load(build(TEXT), tmp_path)
    samples = dataset.load(random_samples(model, count), model)
    assert samples is not None
    before = cost.count(model)
    assert before.macs == MACS * max(model.batch, 1)
    return SimpleNamespace(model=model, samples=samples, before=before)


@pytest.mark.parametrize(
    ("most", "count"),
    [(1e12, 20), (20 * 10 * MACS, 20), (7.9 * 10 * MACS, 7), (10 * MACS, 2), (0, 2)],
)
def test_samples_are_bounded_by_the_work(most: float, count: int, tmp_path: Path) -> None:
    """A quarter of the 80 samples is for losses; ten passes over each."""
    assert workload.measured(_context(tmp_path), 10, most).count == count


def test_passes_count_parts_in_front_and_behind(tmp_path: Path) -> None:
    model = load(build(TEXT), tmp_path)
    coupling = couple(model)
    assert len(coupling.groups) == 1
    # The part in front of the group once, that behind it at six widths.
    assert sensitivity.passes(coupling) == 3.5
    assert sensitivity.passes(coupling, 3) == 2
    # The original, and each of the three output channels of the only consumer.
    assert relevance.passes(model, coupling) == 4
