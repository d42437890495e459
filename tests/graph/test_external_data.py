"""Models whose weights stay in their files: nothing differs but the memory, and writing replaces nothing halfway."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT
from graphs import NETS, assert_exact, build, distance, feed, random_keep
from onnx import ModelProto, TensorProto, external_data_helper, numpy_helper

from onnx_oamip.api import pipeline
from onnx_oamip.artifacts import output
from onnx_oamip.core.errors import ModelError, OutputError
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import external_data
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.verification import equivalence
from tools.make_large_model import make

# A linear weight that is folded before use, and one that stays quantised.
FOLDED = """(float[N,6] x) => (float[N,4] y) <float[12,6] w1, float[12,10] w2, float[10,4] w3> {
    t = Transpose<perm = [1, 0]>(w1)
    a = MatMul(x, t)
    h = Relu(a)
    b = MatMul(h, w2)
    y = MatMul(b, w3)
}"""
# Its gain and bias are put into another order.
NORMALISED = """(float[N,4,5] x) => (float[N,4,3] y) <float[5,32] w1, float[32] gain, float[32] b, float[32,3] w2> {
    h = MatMul(x, w1)
    r = LayerNormalization(h, gain, b)
    y = MatMul(r, w2)
}"""
TEXTS = {**NETS, "folded": FOLDED, "normalised": NORMALISED}


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a large one, and every weight of 64 bytes."""
    monkeypatch.setattr(external_data, "MAPPED_MODEL_BYTES", 1)
    monkeypatch.setattr(external_data, "MAPPED_TENSOR_BYTES", 64)


def _write(proto: ModelProto, folder: Path, external: bool) -> Path:
    path = folder / "model.onnx"
    copy = ModelProto.FromString(proto.SerializeToString())
    if external:
        onnx.save_model(
            copy, path, save_as_external_data=True, location="model.bin", size_threshold=16
        )
    else:
        path.write_bytes(copy.SerializeToString())
    return path


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.usefixtures("all_large")
def test_mapped_model_equals_the_loaded_model(tmp_path: Path, name: str, external: bool) -> None:
    proto = build(TEXTS[name])
    model = models.load(_write(proto, tmp_path, external))
    assert external_data.references(model.proto)
    values = feed(model, 0, 3)
    assert (
        distance(Session(proto, "cpu").run(values), Session(model.proto, "cpu").run(values)) <= 1e-6
    )
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(1), 0.5)
    # As exact as any other, its own structure checked, and the same when written and read again.
    cut, masked = rewrite.cut(model, coupling, keep), rewrite.mask(model, coupling, keep)
    equivalence.structure(cut)
    small = Session(cut, "cpu").run(values)
    assert distance(Session(masked, "cpu").run(values), small) <= 1e-5
    digest, size = output.write(cut, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    again = models.load(tmp_path / "out.onnx")
    assert (again.sha256, again.file_bytes) == (digest, size)
    assert distance(small, Session(tmp_path / "out.onnx", "cpu").run(values)) <= 1e-6
    assert distance(small, Session(again.proto, "cpu").run(values)) <= 1e-6


@pytest.mark.usefixtures("all_large")
def test_mapped_model_is_pruned_exactly(tmp_path: Path) -> None:
    path = _write(build(NETS["mlp"]), tmp_path, external=True)
    np.savez(
        tmp_path / "data.npz",
        x=np.random.default_rng(0).standard_normal((96, 6)).astype(np.float32),
    )
    report = pipeline.prune(
        path,
        tmp_path / "data.npz",
        tmp_path / "out.onnx",
        Settings(macs=0.5, force=True, align=1, batch_size=16),
    )
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence <= 1e-5
    assert report.fits
    assert models.load(tmp_path / "out.onnx").sha256 == report.output_sha256
    assert report.after.bytes == sum(
        (tmp_path / n).stat().st_size for n in ("out.onnx", "out.onnx.data")
    )


def test_small_models_keep_weights_in_memory(tmp_path: Path) -> None:
    model = models.load(_write(build(NETS["mlp"]), tmp_path, external=True))
    assert not external_data.references(model.proto)
    coupling = couple(model)
    cut = assert_exact(model, coupling, random_keep(coupling, np.random.default_rng(0), 0.5))
    assert not external_data.references(cut)


@pytest.mark.usefixtures("all_large")
def test_every_truncation_of_a_large_file_is_refused(tmp_path: Path) -> None:
    content = build(NETS["cnn"]).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in np.linspace(1, len(content) - 1, 40).astype(int).tolist():
        path.write_bytes(content[:length])
        with pytest.raises(ModelError):
            models.load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-8"), ("offset", "99999999"), ("length", "12"), ("offset", "x"), ("location", "")],
)
def test_external_weight_without_location_is_refused(tmp_path: Path, key: str, value: str) -> None:
    path = _write(build(NETS["mlp"]), tmp_path, external=True)
    proto = onnx.load(path, load_external_data=False)
    entry = next(e for e in proto.graph.initializer[0].external_data if e.key == key)
    entry.value = value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError) as caught:
        models.load(path)
    assert "\n" not in str(caught.value)


def test_external_location_outside_the_folder_is_refused_in_attributes(tmp_path: Path) -> None:
    proto = build(
        "(float[N,5] x) => (float[] y) <float[5,3] w> { k = Constant<value_float = 0.5>()  "
        "h = MatMul(x, w)  y = Mul(h, k) }"
    )
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(4))
    tensor = numpy_helper.from_array(np.float32(0.5), "k")
    external_data_helper.set_external_data(tensor, "../secret.bin", offset=0, length=4)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    proto.graph.node[0].attribute[0].CopyFrom(onnx.helper.make_attribute("value", tensor))
    path = tmp_path / "inside" / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside its own folder"):
        models.load(path)


# ---------------------------------------------------------------------------------------------------------- writing


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr(external_data, "MAPPED_TENSOR_BYTES", 100)


@pytest.mark.usefixtures("beside")
def test_older_output_is_replaced_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = build(NETS["cnn"], seed=1), build(NETS["cnn"], seed=2)
    target = tmp_path / "out.onnx"
    output.write(first, target)
    (tmp_path / "other.data").write_bytes(b"not ours")
    assert _names(tmp_path) == ["other.data", "out.onnx", "out.onnx.data"]
    output.write(second, target)
    assert _names(tmp_path) == ["other.data", "out.onnx", "out.onnx.1.data"]
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    np.testing.assert_array_equal(held["w3"], numpy_helper.to_array(second.graph.initializer[-2]))
    # One that fits a single file leaves no weights behind.
    monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 1 << 30)
    output.write(first, target)
    assert _names(tmp_path) == ["other.data", "out.onnx"]


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("renames", [0, 1])
def test_interrupted_write_of_two_files_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    first, second = build(NETS["cnn"], seed=1), build(NETS["cnn"], seed=2)
    target = tmp_path / "out.onnx"
    output.write(first, target)
    before = [t.SerializeToString() for t in onnx.load(target).graph.initializer]
    done = 0
    replace = os.replace

    def fail(source: Path, goal: Path) -> None:
        nonlocal done
        if done == renames:
            raise OSError(5, "Input/output error")
        done += 1
        replace(source, goal)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        output.write(second, target)
    assert [t.SerializeToString() for t in onnx.load(target).graph.initializer] == before


@pytest.mark.usefixtures("beside")
def test_graph_over_the_protobuf_limit_runs_and_is_checked(tmp_path: Path) -> None:
    proto = build(NETS["cnn"])
    path = _write(proto, tmp_path, external=False)
    values = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    assert distance(Session(path, "cpu").run(values), Session(proto, "cpu").run(values)) == 0
    equivalence.structure(proto)


# ------------------------------------------------------------------------------------------------------------ memory

MEASURE = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "onnx_oamip", "inspect", sys.argv[1], "--json"], stdout=subprocess.DEVNULL)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _inspected(path: Path) -> int:
    """Peak memory in bytes of ``inspect``."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    code, peak = (int(word) for word in done.stdout.split())
    assert code == 0
    return peak * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no peak of memory to ask for")
@pytest.mark.parametrize("external", [True, False])
def test_inspect_does_not_load_a_gigabyte_of_weights(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "large.onnx"
    size = make(path)
    assert size > 1e9
    if not external:
        whole = onnx.load(path).SerializeToString()
        path = tmp_path / "whole.onnx"
        path.write_bytes(whole)
    assert _inspected(path) < min(2.5e9, size / 2)


def test_small_copy_of_the_large_model_can_be_pruned(tmp_path: Path) -> None:
    """The tool writes a transformer that can be pruned."""
    path = tmp_path / "small.onnx"
    assert make(path, layers=1, width=32, heads=4) == sum(
        p.stat().st_size for p in tmp_path.iterdir()
    )
    model = models.load(path)
    coupling = couple(model)
    # The residual sum, places in a head, and what is between.
    assert coupling.n_units == 32 + 8 + 8 + 128
    assert_exact(
        model, coupling, random_keep(coupling, np.random.default_rng(0), 0.5), batches=(1, 2)
    )
