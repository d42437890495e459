"""Valid but unusual files: what ONNX Runtime runs is loaded, pruned and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import build, load
from onnx import ModelProto, helper

from onnx_oamip import Settings, prune
from onnx_oamip.api import pipeline
from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Array, Report
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple, exclude
from onnx_oamip.verification.latency import Ratio

NET = """(float[N,6] x) => (float[N,3] y) <float[6,12] w1, float[12,3] w2> {
    a = MatMul(x, w1)
    h = Relu(a)
    y = MatMul(h, w2)
}"""
QUICK = {
    "importance": "activation",
    "allocate": "uniform",
    "align": 1,
    "device": "cpu",
    "macs": 0.5,
}
ROWS = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32)


@pytest.fixture(autouse=True)
def fast_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times decide nothing here, and measuring them takes longer than the rest."""
    monkeypatch.setattr(pipeline, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))


def _pruned(proto: ModelProto, folder: Path) -> tuple[Report, ModelProto, list[Array]]:
    """Report, pruned file, and its outputs in plain ONNX Runtime."""
    source, target = folder / "net.onnx", folder / "out.onnx"
    source.write_bytes(proto.SerializeToString())
    report = prune(source, {"x": ROWS}, target, Settings(**QUICK))  # type: ignore[arg-type]
    assert report.after.macs <= 0.5 * report.before.macs
    session = onnxruntime.InferenceSession(target)
    return report, onnx.load(target), session.run(None, {"x": ROWS[:3]})


# --------------------------------------------------------------------------------------------------------- outputs


def test_output_that_is_an_input(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.output.append(helper.make_tensor_value_info("x", 1, ["N", 6]))
    _, out, values = _pruned(proto, tmp_path)
    assert [value.name for value in out.graph.output] == ["y", "x"]
    np.testing.assert_array_equal(values[1], ROWS[:3])


def test_output_listed_twice(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.output.append(proto.graph.output[0])
    _, out, values = _pruned(proto, tmp_path)
    assert [value.name for value in out.graph.output] == ["y", "y"]
    np.testing.assert_array_equal(*values)


def test_output_that_is_a_constant(tmp_path: Path) -> None:
    proto = build(NET.replace("(float[N,3] y)", "(float[N,3] y, float[2] z)"))
    proto.graph.initializer.append(helper.make_tensor("z", 1, [2], [1.5, 2.5]))
    _, _, values = _pruned(proto, tmp_path)
    np.testing.assert_array_equal(values[1], [1.5, 2.5])


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model and its data as links into a store of files by their content; the path of the model."""
    stored, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1" / "onnx"
    stored.mkdir()
    snapshot.mkdir(parents=True)
    onnx.save(
        build(NET),
        stored / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    for name, digest in (("model.onnx", "abc"), ("model.onnx_data", "def")):
        (stored / name).rename(stored / digest)
        (snapshot / name).symlink_to(Path("../../../blobs") / digest)
    return snapshot / "model.onnx"


def test_links_into_a_content_store(store: Path) -> None:
    (store.parents[3] / "blobs" / "ghi").write_bytes(b"an older result")
    blobs = {path: path.read_bytes() for path in (store.parents[3] / "blobs").iterdir()}
    expected = load(build(NET), store.parents[3])
    assert models.load(store).constants.keys() == expected.constants.keys()
    np.testing.assert_array_equal(models.load(store).constants["w2"], expected.constants["w2"])
    target = store.with_name("out.onnx")
    target.symlink_to("../../../blobs/ghi")
    prune(store, {"x": ROWS}, target, Settings(**QUICK))  # type: ignore[arg-type]
    onnxruntime.InferenceSession(target)
    assert not target.is_symlink()
    assert {path: path.read_bytes() for path in (store.parents[3] / "blobs").iterdir()} == blobs


def test_data_link_of_a_model_that_is_no_link_is_refused(store: Path) -> None:
    content = store.read_bytes()
    store.unlink()
    store.write_bytes(content)
    with pytest.raises(ModelError, match="outside its own folder"):
        models.load(store)


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        ("params['a']['b']", "params['a']['b']", True),
        ("net/layers[1]/w", "net/layers[1]/w", True),
        ("a*b", "a*b", True),
        ("w?.größe 1", "w?.größe 1", True),
        ("axb", "a*b", True),
    ],
)
def test_exact_name_is_excluded(tmp_path: Path, name: str, pattern: str, found: bool) -> None:
    proto = build(NET)
    for tensor in proto.graph.initializer:
        tensor.name = name if tensor.name == "w1" else tensor.name
    proto.graph.node[0].input[1] = name
    model = load(proto, tmp_path)
    assert (exclude(model, couple(model), [pattern]).n_units == 0) == found


def test_exact_name_is_no_pattern(tmp_path: Path) -> None:
    # 'a*b' is the name of one weight, and as a pattern it would match the other one too.
    text = """(float[N,6] x) => (float[N,3] y) <float[6,12] w1, float[12,8] w2, float[8,3] w3> {
        a = MatMul(x, w1)  h = Relu(a)  b = MatMul(h, w2)  r = Relu(b)  y = MatMul(r, w3) }"""
    proto = build(text)
    for tensor, node, name in zip(
        proto.graph.initializer,
        (proto.graph.node[0], proto.graph.node[2]),
        ("a*b", "axb"),
        strict=False,
    ):
        tensor.name = node.input[1] = name
    model = load(proto, tmp_path)
    assert [g.name for g in exclude(model, couple(model), ["a*b"]).groups] == ["axb"]


# ------------------------------------------------------------------------------------------------------ own faults


def test_own_fault_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr(models, "from_proto", broken)
    with pytest.raises(TypeError, match="argument 2"):
        load(build(NET), tmp_path)


def test_fault_of_the_file_is_named_by_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr(models, "from_proto", broken)
    proto = build(NET)
    proto.graph.node[1].op_type = "Unheard"
    proto.graph.node[1].domain = "of"
    proto.opset_import.append(helper.make_opsetid("of", 1))
    with pytest.raises(ModelError, match="ONNX Runtime cannot load"):
        load(proto, tmp_path)
