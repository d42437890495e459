"""The command ``int8``: quantisation by ONNX Runtime, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import check_schema, perceptron, samples

from onnx_oamip.api import quantisation
from onnx_oamip.cli import main

BODY = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2] x, bool c) => (float[N, 2] y) {
  y = If(c) <
    then_branch = t () => (float[N, 2] a) <float[2, 2] w = {1, 0, 0, 1}> { a = MatMul(x, w) },
    else_branch = e () => (float[N, 2] b) { b = Identity(x) }
  >
}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    perceptron(tmp_path / "m.onnx", 64)
    np.savez(tmp_path / "d.npz", input=samples(60), labels=np.arange(60) % 4)
    return tmp_path


@pytest.fixture
def int8(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    def called(*options: str, model: str = "m.onnx") -> dict:
        status = main(["int8", model, *options, "-o", "q.onnx", "--json"])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        document = json.loads(shown.out)
        check_schema(document)
        return document

    return called


@pytest.mark.parametrize("options", [["--data", "d.npz"], ["--ranges", "dynamic"]])
def test_quantised_model_answers_as_the_model(
    place: Path, int8: Callable[..., dict], options: list[str]
) -> None:
    found = int8(*options)
    assert found["weights"] == {"int8": 2, "float": 0}
    assert found["output"]["bytes"] == (place / "q.onnx").stat().st_size
    assert found["samples"] == (48 if "--data" in options else 0)
    feed = {"input": samples(60)}
    # Without fused kernels, whose sums saturate on some processors.
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = [
        onnxruntime.InferenceSession(name, plain).run(None, feed)[0]
        for name in ("m.onnx", "q.onnx")
    ]
    error = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
    assert 0 < error < 0.05


def test_nodes_are_left_out_as_asked(int8: Callable[..., dict]) -> None:
    found = int8("--data", "d.npz", "--keep-float", "sec*")
    assert found["kept_float"] == ["second"]
    assert found["weights"] == {"int8": 1, "float": 1}


def test_scales_by_channel_need_opset_13(place: Path, int8: Callable[..., dict]) -> None:
    model = onnx.load("m.onnx")
    model.opset_import[0].version = 11
    onnx.save(model, "old.onnx")
    found = int8("--data", "d.npz", model="old.onnx")
    assert not found["per_channel"]
    assert any("opset 13" in note for note in found["notes"])
    assert int8("--data", "d.npz")["per_channel"]
    assert not int8("--data", "d.npz", "--per-tensor")["per_channel"]


def test_weights_of_7_bits_do_not_saturate(int8: Callable[..., dict]) -> None:
    found = int8("--data", "d.npz", "--reduce-range")
    assert not any("saturate" in note for note in found["notes"])
    weights = [t for t in onnx.load("q.onnx").graph.initializer if len(t.dims) > 1]
    assert max(int(abs(onnx.numpy_helper.to_array(t).astype(int)).max()) for t in weights) <= 64


def test_saturated_sums_are_noted(
    int8: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "_differences", lambda *_: (0.12, 0.1))
    (note,) = (n for n in int8("--data", "d.npz")["notes"] if "saturate" in n)
    assert "moves the outputs by 12.0%; give --reduce-range" in note


def test_outputs_that_move_far_are_noted(
    place: Path, int8: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", "d.npz", "--reduce-range")  # no sum saturates
    assert not any("of the first samples" in note for note in int8(*options)["notes"])
    monkeypatch.setattr(quantisation, "MOVED", 1e-4)
    (note,) = (n for n in int8(*options)["notes"] if "of the first samples" in n)
    assert "try --ranges dynamic, --calibration percentile or --keep-float" in note


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "static ranges need calibration samples; give --data, or take --ranges dynamic."),
        (["--data", "d.npz", "--keep-float", "zzz"], "--keep-float zzz matches no node"),
        (["--data", "none.npz"], "none.npz"),
    ],
)
def test_refusals_are_one_sentence(
    place: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["int8", "m.onnx", *options, "-o", "q.onnx"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (place / "q.onnx").exists()


def test_models_without_a_weight_to_quantise_are_refused(
    place: Path, int8: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    int8("--data", "d.npz")
    assert main(["int8", "q.onnx", "--data", "d.npz", "-o", "r.onnx"]) == 2
    assert "has weights of 8 bits already" in capsys.readouterr().err
    onnx.save(onnx.parser.parse_model(BODY), "body.onnx")
    assert main(["int8", "body.onnx", "--ranges", "dynamic", "-o", "r.onnx"]) == 2
    assert "leave int8 out" in capsys.readouterr().err
    assert not (place / "r.onnx").exists()
