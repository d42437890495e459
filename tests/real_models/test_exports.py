"""Trained classifiers as five frameworks export them: one command halves each, exactly, and it still classifies.

``tools/exports`` trained and exported them; ``made.json`` says with what.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT
from onnx import ModelProto, TensorProto, helper

import onnx_oamip
from onnx_oamip.artifacts import provenance
from onnx_oamip.cli import main
from onnx_oamip.core.records import Array
from onnx_oamip.planning import allocation
from onnx_oamip.verification.latency import Step

FOLDER = ROOT / "tests" / "exports"
DROP = {
    "flax-jax2onnx": -0.2,
    "keras-export": 2.2,
    "keras-tflite": 2.2,
    "paddle-paddle2onnx": 0.8,
    "pytorch-dynamo": 1.4,
    "pytorch-torchscript": 1.4,
    "sklearn-double": 4.2,
    "sklearn-float": 2.8,
    "tensorflow-tf2onnx": 2.2,
}
"""Points of accuracy that half of the parameters cost on 500 held-out digits, as measured (one digit is 0.2 points)."""
MARGIN = 1.0
"""Points that another processor or solver may make of it."""
SAME_NETWORK = (
    ("pytorch-dynamo", "pytorch-torchscript"),
    ("keras-export", "keras-tflite", "tensorflow-tf2onnx"),
)
NOTE = ("classes", "0 1 2 3 4 5 6 7 8 9")
"""Metadata that a user puts into a file after its export."""


@cache
def _digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "digits", ROOT / "tools" / "exports" / "digits.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Halved:
    """An export, what the command made of it, and the document it printed."""

    name: str
    before: ModelProto
    after: ModelProto
    document: dict[str, Any]


def _shape(proto: ModelProto) -> list[int]:
    """Of one sample."""
    return [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]


@cache
def _halve(name: str, folder: Path) -> Halved:
    """By the command that is the same for all, once for all tests."""
    model, data, out = folder / f"{name}.onnx", folder / f"{name}.npz", folder / f"{name}-half.onnx"
    proto = onnx.load(FOLDER / f"{name}.onnx")
    proto.metadata_props.add(key=NOTE[0], value=NOTE[1])
    onnx.save(proto, model)
    _digits().data_file(FOLDER, data, proto.graph.input[0].name, _shape(proto))
    command = [
        "prune",
        str(model),
        "--data",
        str(data),
        "--params",
        "0.5",
        "-o",
        str(out),
        "--force",
        "--json",
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        # The step that a busy machine measures decides nothing here.
        patch.setattr(allocation, "find_step", lambda _: Step(8, False, "not measured"))
        code = main(command)
    assert code == 0
    return Halved(name, proto, onnx.load(out), json.loads(printed.getvalue()))


@pytest.fixture(params=sorted(DROP))
def halved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halved:
    return _halve(request.param, tmp_path_factory.getbasetemp())


def _held_out(proto: ModelProto) -> tuple[Array, Array]:
    """(images, labels) that no network was trained on and no calibration saw, in the form of a network's input."""
    kind = helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    with np.load(FOLDER / "digits.npz") as stored:
        return (stored["eval.images"].reshape(-1, *_shape(proto)) / 16).astype(kind), stored[
            "eval.labels"
        ]


def _run(proto: ModelProto, images: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = session.run(None, {proto.graph.input[0].name: images})
    return {o.name: np.asarray(v) for o, v in zip(session.get_outputs(), values, strict=True)}


def _accuracy(proto: ModelProto) -> float:
    """Percent of the held-out digits."""
    images, labels = _held_out(proto)
    scores = next(v for v in _run(proto, images).values() if v.ndim == 2)
    return float(100 * (scores.argmax(axis=1) == labels).mean())


def test_exporter_versions_are_recorded() -> None:
    made = json.loads((FOLDER / "made.json").read_text(encoding="utf-8"))
    assert set(made) == set(DROP) == {p.stem for p in FOLDER.glob("*.onnx")}
    assert {entry["framework"] for entry in made.values()} == {
        "pytorch",
        "keras",
        "scikit-learn",
        "jax",
        "paddle",
    }
    for name, entry in made.items():
        assert entry["exporter"]
        assert entry["versions"]
        assert all(version[0].isdigit() for version in entry["versions"].values()), name


def test_page_lists_every_export() -> None:
    text = (ROOT / "docs" / "guide" / "exports.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- exports:begin -->")[2].partition("<!-- exports:end -->")[0]
    assert {line.split("`")[1] for line in shown.splitlines() if line.startswith("| `")} == set(
        DROP
    )


def test_files_stay_small() -> None:
    sizes = [p.stat().st_size for p in FOLDER.iterdir()]
    assert max(sizes) < 60_000
    assert sum(sizes) < 400_000


def test_half_of_the_parameters_are_cut_exactly(halved: Halved) -> None:
    before, after = halved.document["before"], halved.document["after"]
    assert 0.45 <= after["params"] / before["params"] <= 0.5
    assert after["macs"] < before["macs"]
    assert after["bytes"] < 0.6 * before["bytes"]
    proof = halved.document["verification"]
    assert proof["masked_equivalence"] <= 1e-4
    assert proof["batches"] == [1, 2]
    assert proof["samples"] == len(_held_out(halved.before)[1])
    # Every layer with weights between input and output gave some away, or could have.
    assert len(halved.document["groups"]) == (2 if halved.name.startswith("sklearn") else 3)
    assert all(fit["form"].startswith("least squares") for fit in halved.document["fits"])


def test_pruned_export_runs_at_any_batch_size(halved: Halved) -> None:
    images = _held_out(halved.after)[0][:8]
    whole, parts = (
        _run(halved.after, images),
        [_run(halved.after, images[i:j]) for i, j in ((0, 1), (1, 8))],
    )
    assert whole
    for name, value in whole.items():
        assert len(value) == 8
        assert [len(p[name]) for p in parts] == [1, 7]
        joined = np.concatenate([p[name] for p in parts])
        np.testing.assert_allclose(joined, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


def test_pruned_export_still_classifies(halved: Halved) -> None:
    before, after = _accuracy(halved.before), _accuracy(halved.after)
    assert before > 90
    assert before - after <= DROP[halved.name] + MARGIN
    # The report says what anybody measures.
    proof = halved.document["verification"]
    assert [100 * proof["accuracy_before"], 100 * proof["accuracy_after"]] == pytest.approx(
        [before, after], abs=0.21
    )


def test_inputs_and_outputs_are_unchanged(halved: Halved) -> None:
    before, after = halved.before, halved.after
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    for field in (
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
        "ir_version",
    ):
        assert getattr(after, field) == getattr(before, field), field
    assert after.graph.name == before.graph.name
    # One entry is new: where the model comes from.
    assert [p for p in after.metadata_props if p.key != provenance.KEY] == list(
        before.metadata_props
    )
    assert NOTE in {(p.key, p.value) for p in after.metadata_props}
    assert {(o.domain, o.version) for o in after.opset_import} == {
        (o.domain, o.version) for o in before.opset_import
    }
    batch = after.graph.input[0].type.tensor_type.shape.dim[0]
    assert not batch.HasField("dim_value")


def test_names_of_nodes_and_tensors_are_unchanged(halved: Halved) -> None:
    """Layers and their weights are found under the names that the exporter gave, whatever characters are in them."""

    def layers(proto: ModelProto) -> set[tuple[str, str]]:
        return {
            (n.op_type, n.name) for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")
        }

    def weights(proto: ModelProto) -> dict[str, tuple[int, ...]]:
        floats = (TensorProto.FLOAT, TensorProto.DOUBLE)
        return {
            t.name: tuple(t.dims)
            for t in proto.graph.initializer
            if t.data_type in floats and len(t.dims) > 1
        }

    assert layers(halved.after) == layers(halved.before)
    old, new = weights(halved.before), weights(halved.after)
    assert set(new) == set(old)
    assert all(n <= o for name in old for n, o in zip(new[name], old[name], strict=True))
    assert old != new


@pytest.mark.parametrize("names", SAME_NETWORK, ids=str)
def test_exporters_give_the_same_pruned_network(
    names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The loss of one network does not depend on its export: layouts, folded norms, computed shapes."""
    first, *others = (_halve(name, tmp_path_factory.getbasetemp()) for name in names)
    images, _ = _held_out(first.before)
    (scores,) = _run(first.after, images).values()
    for other in others:
        assert [g["kept"] for g in other.document["groups"]] == [
            g["kept"] for g in first.document["groups"]
        ]
        assert other.document["after"]["params"] == first.document["after"]["params"]
        assert other.document["after"]["macs"] == first.document["after"]["macs"]
        (found,) = _run(other.after, images).values()
        assert np.abs(found - scores).max() <= 1e-3 * np.abs(scores).max()


def test_dictionaries_of_probabilities_are_kept_beside_the_label(tmp_path: Path) -> None:
    """Default export of a classifier by skl2onnx: a label, and ZipMap, one dictionary for every sample."""
    proto = onnx.load(FOLDER / "sklearn-float.onnx")
    proto.graph.node.append(
        helper.make_node(
            "ZipMap",
            ["probabilities"],
            ["zipped"],
            domain="ai.onnx.ml",
            classlabels_int64s=range(10),
        )
    )
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value))
    proto.graph.output[1].CopyFrom(helper.make_value_info("zipped", kind))
    data = tmp_path / "data.npz"
    _digits().data_file(FOLDER, data, "pixels", [64])
    result = onnx_oamip.prune(proto, data, params=0.5, force=True, cache="off")
    assert result.report.after.params <= 0.5 * result.report.before.params
    assert any("'zipped'" in note for note in result.report.model.notes)
    assert [o.name for o in result.model.graph.output] == [o.name for o in proto.graph.output]
    session = onnxruntime.InferenceSession(
        result.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    pixels = np.load(data)["pixels"][:5].astype(np.float32)
    label, zipped = session.run(None, {"pixels": pixels})
    assert [max(row, key=row.get) for row in zipped] == label.tolist()


def test_missing_framework_is_named(tmp_path: Path) -> None:
    (tmp_path / "digits.npz").write_bytes((FOLDER / "digits.npz").read_bytes())
    code = "import runpy, sys; sys.modules['paddle'] = None; runpy.run_module('tools.exports', run_name='__main__')"
    command = [sys.executable, "-c", code, "paddle", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("paddle: paddle is not installed")
    assert not done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["digits.npz"]
