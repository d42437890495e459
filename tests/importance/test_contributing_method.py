"""The steps of CONTRIBUTING.md for an importance method with a new statistic, followed by a package of one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build
from onnx import numpy_helper

from onnx_oamip.cli import main
from onnx_oamip.importance import find, names

PACKAGE = '''
"""Peaks: importance by the largest absolute activation of a unit's channels."""

import numpy as np

from onnx_oamip import Method, Request, Scores
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session

PASSES = []


def collect(context):
    """Collect the largest absolute value of every channel that a consumer reads, by axis."""
    PASSES.append(context)
    axes = sorted({(consumer.data, consumer.axis) for consumer in context.coupling.consumers})
    tensors = sorted({tensor for tensor, _ in axes})
    session = Session(with_outputs(context.model, tensors), context.device)
    peaks = {axis: 0.0 for axis in axes}
    for _, feed in context.samples.batches(context.batch):
        values = dict(zip(tensors, session.run(feed, tensors)))
        for tensor, axis in axes:
            magnitude = np.abs(np.moveaxis(values[tensor], axis, 0))
            largest = magnitude.reshape(len(magnitude), -1).max(axis=1)
            peaks[tensor, axis] = np.maximum(peaks[tensor, axis], largest)
    return peaks


PEAKS = Request("toy: peaks", collect)


def score(model, coupling, statistics, settings):
    """Score a unit by its largest peak."""
    values = np.zeros(coupling.n_units)
    for axis, peaks in statistics[PEAKS].items():
        units = coupling.axes[axis]
        np.maximum.at(values, units[units >= 0], peaks[units >= 0])
    return Scores("peaks", values)


METHOD = Method(score, "largest absolute activation", requires=frozenset({PEAKS}))
FORGETFUL = Method(score, "the same without requesting the statistic")
'''
ENTRY_POINTS = """
[onnx_oamip.importance]
peaks = toy_peaks:METHOD
forgetful = toy_peaks:FORGETFUL
"""
NETWORK = """(float[N,6] x) => (float[N,3] y) <float[6,12] a, float[12,3] b> {
    h = MatMul(x, a)
    r = Relu(h)
    y = MatMul(r, b)
}"""


@pytest.fixture
def installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate_registry: None
) -> tuple[Path, Path]:
    """A model and its data, in a Python where the package is installed."""
    site = tmp_path / "site"
    metadata = site / "toy_peaks-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "toy_peaks.py").write_text(PACKAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-peaks\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "toy_peaks", raising=False)

    model, data = tmp_path / "m.onnx", tmp_path / "data.npz"
    model.write_bytes(build(NETWORK).SerializeToString())
    np.savez(data, x=np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
    return model, data


def _prune(model: Path, data: Path, method: str, *flags: str) -> int:
    output = str(model.with_name("pruned.onnx"))
    arguments = ["prune", str(model), "--data", str(data), "-o", output, "--importance", method]
    arguments += ["--macs", "0.5", "--allocate", "uniform", "--refit", "bias", "--align", "1"]
    return main([*arguments, "--force", "--json", *flags])


def test_one_file_package_prunes_by_its_own_statistic(
    installed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = installed
    assert "peaks" in names()
    assert _prune(model, data, "peaks") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["importance"] == "peaks"

    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}
    peaks = np.maximum(np.load(data)["x"] @ weights["a"], 0).max(axis=0)
    kept = np.sort(np.argsort(-peaks)[:6])
    pruned = onnx.load(model.with_name("pruned.onnx"))
    shapes = {tuple(t.dims): numpy_helper.to_array(t) for t in pruned.graph.initializer}
    np.testing.assert_array_equal(shapes[6, 6], weights["a"][:, kept])
    assert len(sys.modules["toy_peaks"].PASSES) == 1


def test_statistic_of_a_package_is_collected_in_every_iteration(
    installed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = installed
    assert _prune(model, data, "peaks", "--iterations", "3") == 0
    assert len(sys.modules["toy_peaks"].PASSES) == 3


def test_reading_a_statistic_without_requesting_it_is_refused(
    installed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = installed
    assert _prune(model, data, "forgetful") == 2
    error = capsys.readouterr().err
    assert "reads the statistic 'toy: peaks' without requesting it" in error
    assert not model.with_name("pruned.onnx").exists()


def test_help_lists_the_method_of_a_package(
    installed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "peaks, largest absolute activation" in text
    assert "snacs, finds for every layer" in text
    assert find("peaks").summary == "largest absolute activation"
