"""The networks that ship with the sources: half of the multiply-accumulates go, exactly, on real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import MODELS

from onnx_oamip import prune
from onnx_oamip.api import proof
from onnx_oamip.core.records import Array
from onnx_oamip.core.settings import Settings
from onnx_oamip.verification.latency import Ratio

NAMES = (
    "lenet300-mnist",
    "lenet5-mnist",
    "vgg-fashion",
    "resnet20-fashion",
    "mobilenet-fashion",
    "vit-fashion",
)
LARGE = {"vgg-fashion"}
"""Networks whose tests take long."""


def _data(name: str) -> Path:
    return MODELS / ("mnist.npz" if name.endswith("mnist") else "fashion-mnist.npz")


def _held(name: str, count: int) -> dict[str, Array]:
    """The first test images, which no network was trained on."""
    with np.load(_data(name)) as stored:
        return {
            "input": stored["eval.input"][:count],
            "input.scale": stored["input.scale"],
            "labels": stored["eval.labels"][:count],
        }


def test_models_folder_holds_exactly_the_listed_files() -> None:
    assert {p.stem for p in MODELS.glob("*.onnx")} == set(NAMES)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in NAMES]
)
def test_half_of_the_units_is_cut_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Times on a busy machine decide nothing here.
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(1.0, 1.0, 1.0, 1))
    settings = Settings.create(
        macs=0.5, importance="activation", allocate="uniform", refit="bias", align=1, device="cpu"
    )
    held = _held(name, 100)
    report = prune(
        MODELS / f"{name}.onnx", _data(name), tmp_path / "out.onnx", settings, eval_data=held
    )
    assert 0.48 <= report.after.macs / report.before.macs <= 0.5
    found = report.verification
    assert found.masked_equivalence is not None
    assert found.masked_equivalence <= 1e-4
    assert found.samples == 100
    # What the README promises of the original holds on the part that is looked at here.
    assert found.accuracy_before is not None
    assert found.accuracy_before >= 0.85
    assert found.accuracy_after is not None
    session = onnxruntime.InferenceSession(
        str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"]
    )
    images = held["input"].astype(np.float32) * held["input.scale"]
    parts = [
        session.run(None, {"input": batch})[0] for batch in (images[:1], images[1:8], images[8:])
    ]
    assert [p.shape for p in parts] == [(1, 10), (7, 10), (92, 10)]
    right = (np.concatenate(parts).argmax(1) == held["labels"]).mean()
    assert right == pytest.approx(found.accuracy_after, abs=0.011)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_declare_inputs_and_outputs(name: str) -> None:
    session = onnxruntime.InferenceSession(
        str(MODELS / f"{name}.onnx"), providers=["CPUExecutionProvider"]
    )
    (source,), (result,) = session.get_inputs(), session.get_outputs()
    assert (source.name, source.type, source.shape[1:]) == ("input", "tensor(float)", [1, 28, 28])
    assert (result.name, result.shape[1:]) == ("logits", [10])
    assert isinstance(source.shape[0], str)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_shipped_data_fits_the_models(name: str) -> None:
    with np.load(MODELS / f"{name}.npz") as stored:
        assert stored["input"].shape == (512, 1, 28, 28)
        assert stored["eval.input"].shape == (2000, 1, 28, 28)
        assert stored["input"].dtype == stored["eval.input"].dtype == np.uint8
        assert float(stored["input.scale"]) == pytest.approx(1 / 255)
        for labels, count in ((stored["labels"], 512), (stored["eval.labels"], 2000)):
            assert labels.shape == (count,)
            assert set(labels.tolist()) == set(range(10))
