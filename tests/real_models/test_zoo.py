"""Nine networks that people know, end to end: half of the multiply-accumulates go, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from zoo_networks import FOLDER, NAMES, image, images, with_weights

from onnx_oamip import prune
from onnx_oamip.api import proof
from onnx_oamip.core.settings import Settings
from onnx_oamip.verification.latency import Ratio

LARGE = {
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "vgg19",
    "zfnet512",
}
"""Networks with more than 100 MB of weights or about 200 layers, whose tests take long."""


def test_every_zoo_network_is_tested() -> None:
    assert {f"light_{name}.onnx" for name in NAMES} == {p.name for p in FOLDER.glob("*.onnx")}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in NAMES]
)
def test_half_of_the_units_is_cut_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(1.0, 1.0, 1.0, 1))
    proto = with_weights(name)
    source = image(proto)
    onnx.save(proto, tmp_path / "model.onnx")
    del proto
    np.savez(tmp_path / "data.npz", **{source: images(3)})
    settings = Settings.create(
        macs=0.5, importance="activation", allocate="uniform", refit="bias", align=1, device="cpu"
    )
    report = prune(tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "out.onnx", settings)
    assert 0.48 <= report.after.macs / report.before.macs <= 0.5
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence <= 1e-4
    assert report.after.bytes < 0.9 * report.before.bytes
    assert report.verification.batches == (1,)
    del report
    session = onnxruntime.InferenceSession(
        str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"]
    )
    (scores,) = session.run(None, {source: images(1)})
    assert np.isfinite(scores).all()
    assert np.ptp(scores) > 0
    # Some hundred megabytes each: pytest keeps the folders of its last runs.
    for path in tmp_path.iterdir():
        path.unlink()
