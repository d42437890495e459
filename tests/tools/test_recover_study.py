"""The study of recoveries: its figures, and a study that goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build
from onnx import numpy_helper

from tools.bench import recover

TEXT = "(float[N, 4] image) => (float[N, 3] scores) <float[4, 3] w> { scores = MatMul(image, w) }"


def linear(weights: np.ndarray) -> onnx.ModelProto:
    proto = build(TEXT)
    (held,) = proto.graph.initializer
    held.CopyFrom(numpy_helper.from_array(weights.astype(np.float32), "w"))
    return proto


def test_figures_are_those_of_the_unseen_images(tmp_path: Path) -> None:
    images = np.eye(4, dtype=np.uint8)[[0, 1, 2, 2]]
    arrays = {"input.scale": np.float32(2), "eval.input": images, "input": images[:0]}
    np.savez(tmp_path / "data.npz", **arrays, **{"eval.labels": np.array([0, 1, 2, 0])})
    first = np.vstack([np.eye(3), np.zeros(3)])
    second = first[[1, 0, 2, 3]]
    protos = [linear(first), linear(second), linear(first)]
    found = recover.judged(tmp_path / "data.npz", protos)
    assert (found["original"], found["pruned"], found["recovered"]) == (75.0, 25.0, 75.0)
    assert (found["agreement pruned"], found["agreement recovered"]) == (50.0, 100.0)
    p = np.exp([2, 0, 0]) / np.exp([2, 0, 0]).sum()
    expected = 0.5 * (p * np.log(p / p[[1, 0, 2]])).sum()  # two of four images change places
    assert float(found["divergence pruned"]) == pytest.approx(expected, abs=1e-4)
    assert found["divergence recovered"] == "0.0000"


def test_part_that_was_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def call(*arguments: object) -> dict[str, object]:
        called.append(arguments[1])
        told = {"recovery": {"steps": 7, "seconds": 1.5}}
        return {"stdout": json.dumps(told), "processor": 2.0, "peak_mib": 300}

    monkeypatch.setattr(recover, "_call", call)
    (tmp_path / "net.1.json").write_text('{"steps": 5}')
    files = (tmp_path / "model.onnx", tmp_path / "data.npz")
    start = tmp_path / "net.onnx"
    after, records = recover._recovered("net", files, start, tmp_path, (5, 7), 0)
    assert called == [tmp_path / "net.1.onnx"]
    assert [record["steps"] for record in records] == [5, 7]
    assert after == tmp_path / "net.2.onnx"
    recover._recovered("net", files, start, tmp_path, (5, 7), 0)
    assert len(called) == 1
