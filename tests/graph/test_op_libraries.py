"""Libraries of custom operators: registered with every session, recorded, and the same on all workers."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT

import onnx_oamip
from onnx_oamip.api import proof
from onnx_oamip.api.prepare import open_context
from onnx_oamip.core.errors import EnvironmentMissing, ModelError
from onnx_oamip.core.settings import Settings
from onnx_oamip.executors import cluster
from onnx_oamip.graph import op_libraries
from onnx_oamip.graph.runtime import Session
from onnx_oamip.verification.latency import Ratio, peak_memory

NETWORK = """<ir_version: 8, opset_import: ["": 17, "test": 1]>
g (float[n, 4] x) => (float[n, 3] y) <float[4, 8] w1, float[8, 3] w2> {
    a = MatMul(x, w1)
    b = Relu(a)
    c = MatMul(b, w2)
    y = test.Triple(c)
}"""
OPTIONS = {"macs": 0.5, "task": "values", "align": 1, "cache": "off", "device": "cpu"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the operator test::Triple, which triples its input."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("library") / "triple.so"
    source = ROOT / "tests" / "data" / "custom_operator.c"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture(autouse=True)
def nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts and ends without libraries, and does not measure latency."""
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    op_libraries.use([])
    yield
    op_libraries.use([])


@pytest.fixture
def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for name, shape in (("w1", (4, 8)), ("w2", (8, 3))):
        weight = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return proto


SAMPLES = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)


def test_model_with_a_custom_operator_is_pruned(model: onnx.ModelProto, library: Path) -> None:
    result = onnx_oamip.prune(
        model, {"x": SAMPLES}, op_library=(str(library),), refit="none", **OPTIONS
    )
    (hidden,) = result.report.plan.widths
    assert hidden == 4
    assert result.report.verification.masked_equivalence < 1e-6
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    first, second = weights["w1"], weights["w2"]
    expected = 3 * np.maximum(SAMPLES @ first, 0) @ second
    (found,) = Session(result.model, "cpu").run({"x": SAMPLES})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert result.document["settings"]["op_library"] == [str(library)]


@pytest.mark.parametrize("data", [{"x": SAMPLES}, None], ids=["data", "no data"])
def test_operator_without_its_library_is_refused_with_the_option(
    model: onnx.ModelProto, data: dict[str, np.ndarray] | None
) -> None:
    without = {"importance": "l2", "allocate": "uniform", "refit": "none"} if data is None else {}
    with pytest.raises(ModelError, match=r"test:Triple.* give .* by `op_library`\.$"):
        onnx_oamip.prune(model, data, **OPTIONS, **without)


def test_inspection_requires_no_library(model: onnx.ModelProto) -> None:
    (group,) = onnx_oamip.inspect(model).document["groups"]
    assert group["units"] == 8


def test_cached_results_depend_on_the_content_of_the_library(
    model: onnx.ModelProto, library: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(library.read_bytes() + b"\0")
    digests = []
    for path in (library, other):
        settings = Settings.create(op_library=(str(path),), **OPTIONS)
        context = open_context(model, {"x": SAMPLES}, settings)
        digests += context.cache_identity["op_libraries"]
    assert digests == [hashlib.sha256(p.read_bytes()).hexdigest() for p in (library, other)]
    assert digests[0] != digests[1]


def test_peak_memory_is_measured_with_the_library(
    model: onnx.ModelProto, library: Path, tmp_path: Path
) -> None:
    feed = {"x": SAMPLES}
    op_libraries.use([str(library)])
    assert peak_memory(model, feed, "cpu") is not None


def test_unusable_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMissing, match=r"missing\.so cannot be read \(No such file"):
        op_libraries.use([str(tmp_path / "missing.so")])
    text = tmp_path / "text.so"
    text.write_text("no library")
    op_libraries.use([str(text)])
    relu = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    with pytest.raises(EnvironmentMissing, match=r"^`op_library`: ONNX Runtime cannot register"):
        Session(relu, "cpu")


def test_worker_with_another_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"ours")
    op_libraries.use([str(path)])
    ours = cluster.environment()
    assert (f"operator library {path}", hashlib.sha256(b"ours").hexdigest()[:12]) in ours
    assert cluster.mismatch(ours, "cpu") is None
    cluster.mismatch.cache_clear()
    path.write_bytes(b"theirs")
    assert f"has operator library {path} " in str(cluster.mismatch(ours, "cpu"))
    cluster.mismatch.cache_clear()
    path.unlink()
    assert str(cluster.mismatch(ours, "cpu")).startswith("lacks a file: ")
