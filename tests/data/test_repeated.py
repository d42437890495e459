"""Equal samples of two sets are counted, whatever their layout, and different ones are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.data import dataset
from onnx_oamip.data import repeated as digests
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.repeated import repeated

PAIR = """(float[N,3] x, int64[N,2] t) => (float[N,2] y) <float[3,2] w> {
    h = MatMul(x, w)
    c = Cast<to = 1>(t)
    y = Add(h, c)
}"""
SEQUENCES = "(float[T,2] x) => (float[T,3] y) <float[2,3] w> { y = MatMul(x, w) }"


def _loaded(text: str, data: object, folder: Path) -> Samples:
    samples = dataset.load(data, load(build(text), folder))
    assert samples is not None
    return samples


@pytest.mark.parametrize("size", [1, 1000, digests.BATCH_BYTES])
def test_samples_are_equal_if_all_their_arrays_are(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "BATCH_BYTES", size)
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(600, 3)).astype(np.float32), rng.integers(9, size=(600, 2))
    samples = _loaded(PAIR, {"x": x, "t": t}, tmp_path)
    first, second = samples.take(np.arange(400)), samples.take(np.arange(300, 600))
    assert repeated(first, second) == repeated(second, first) == 100
    changed = t.copy()
    changed[310:330, 1] += 1
    other = _loaded(PAIR, {"x": x, "t": changed}, tmp_path)
    assert repeated(other.take(np.arange(300, 400)), first) == 80
    swapped = _loaded(PAIR, {"x": x[:, ::-1].copy(), "t": t}, tmp_path)
    assert repeated(swapped, samples) == 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_sequences_of_unequal_lengths_differ(value: float, tmp_path: Path) -> None:
    feeds = [{"x": np.full((length, 2), value, np.float32)} for length in (3, 4, 5, 3)]
    samples = _loaded(SEQUENCES, feeds, tmp_path)
    assert samples.count == 4
    assert repeated(samples.take(np.array([0, 1])), samples.take(np.array([2, 3]))) == 1
