"""Models that others made: open lengths by both exporters of torch, and text recognition as it is published.

What is asked of each: a reason for every channel that stays, 70 % of the parameters through the whole pipeline, axes
that stay open, and the same outputs at other sizes than those of the data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT
from graphs import build, distance, load

from onnx_oamip import prune
from onnx_oamip.api import proof
from onnx_oamip.core.records import Array, Coupling, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.verification.latency import Ratio

FOLDER = ROOT / "tests" / "data" / "foreign"
EXPORTERS = ("torchscript", "dynamo")
UNITS = {
    # Slots of queries and keys, of values, and the wide layer; the width of the trunk is that of the outputs.
    "embedder": 4 + 4 + 64,
    # The first convolution, the trunks of encoder and decoder, slots of three attentions, two wide layers.
    "speech": 16 + 2 * 16 + 3 * (4 + 4) + 2 * 64,
}
SIZES = ((1, 4), (3, 9), (2, 23))
"""(batch, length); the data has another length."""
OCR = {
    "ch_ppocr_mobile_v2.0_cls_infer": ((48, 192), (48, 96)),
    "ch_PP-OCRv4_det_infer": ((64, 64), (96, 128)),
    "ch_PP-OCRv4_rec_infer": ((48, 64), (48, 160)),
}
"""(height, width) of the data, and another."""


def _inputs(name: str, count: int, length: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    if name == "embedder":
        mask = np.ones((count, length), np.int64)
        mask[1::2, length - length // 3 :] = 0
        return {"tokens": rng.integers(0, 20, (count, length)), "attention_mask": mask}
    tokens = rng.integers(0, 12, (count, length))
    return {
        "spectrogram": rng.standard_normal((count, 4, 2 * length + 1), np.float32),
        "tokens": tokens,
    }


def _at(path: Path, arrays: Mapping[str, Array]) -> tuple[Model, Coupling]:
    model = models.load(path)
    samples = dataset.load(dict(arrays), model)
    assert samples is not None
    model = models.rebind(model, samples.bindings(model))
    return model, couple(model)


def _assert_exact(
    model: Model, coupling: Coupling, feeds: list[dict[str, Array]], tolerance: float = 1e-5
) -> None:
    """Half of every group goes, and the same comes out as with those channels zeroed."""
    keep = np.zeros(coupling.n_units, bool)
    for group in coupling.groups:
        keep[group.units[::2]] = True
    small = Session(rewrite.cut(model, coupling, keep), "cpu")
    masked = Session(rewrite.mask(model, coupling, keep), "cpu")
    for feed in feeds:
        assert distance(masked.run(feed), small.run(feed)) <= tolerance


def _unexplained(model: Model, coupling: Coupling) -> list[tuple[str, int]]:
    """Axes of weights some of whose channels neither may go nor are listed with a reason."""
    listed: dict[tuple[str, int], int] = {}
    for p in coupling.pinned:
        assert len(p.reason) > 10
        listed[p.tensor, p.axis] = listed.get((p.tensor, p.axis), 0) + p.count
    multiplied = {"Conv": 2, "ConvTranspose": 2, "MatMul": 9, "Gemm": 2}
    return [
        (t, a)
        for node in model.nodes
        if node.op in multiplied
        for t in node.inputs[:2]
        if t in model.constants
        for a, n in enumerate(model.shapes[t][: multiplied[node.op]])
        if n > 1
        and int((coupling.axes.get((t, a), np.zeros(0)) >= 0).sum()) + listed.get((t, a), 0) != n
    ]


@pytest.fixture(params=[f"{name}-{exporter}" for name in UNITS for exporter in EXPORTERS])
def exported(request: pytest.FixtureRequest) -> tuple[str, Path]:
    stem: str = request.param
    return stem.split("-")[0], FOLDER / f"{stem}.onnx"


def test_every_foreign_file_is_tested() -> None:
    files = list(FOLDER.iterdir())
    assert {f.name for f in files} == {
        f"{name}-{exporter}.onnx" for name in UNITS for exporter in EXPORTERS
    }
    assert sum(f.stat().st_size for f in files) < 250_000
    for file in files:
        proto = onnx.load(file)
        assert not any(n.metadata_props or n.doc_string for n in proto.graph.node), file.name


def test_heads_and_widths_are_prunable_for_every_exporter(exported: tuple[str, Path]) -> None:
    name, path = exported
    model, coupling = _at(path, _inputs(name, 4, 7))
    assert coupling.n_units == UNITS[name]
    _assert_exact(model, coupling, [_inputs(name, *size, seed=i) for i, size in enumerate(SIZES)])


def test_only_interface_and_length_axes_are_pinned(exported: tuple[str, Path]) -> None:
    name, path = exported
    model, coupling = _at(path, _inputs(name, 4, 7))
    assert not _unexplained(model, coupling)
    known = (
        "a graph input (",
        "is part of the graph output",
        "picks from it at run time",
        "bounds from a computation",
    )
    assert all(sum(k in p.reason for k in known) == 1 for p in coupling.pinned), coupling.pinned
    # Lengths alone are cut to bounds that are computed: never the channels of a table.
    tables = {p.tensor for p in coupling.pinned if "bounds" in p.reason}
    assert all(p.axis == 0 or "mask" in p.tensor for p in coupling.pinned if p.tensor in tables)


def test_pipeline_reaches_seventy_percent(
    exported: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(1.0, 1.0, 1.0, 1))
    name, path = exported
    np.savez(tmp_path / "data.npz", **_inputs(name, 40, 7))
    settings = Settings.create(
        params=0.7, importance="activation", allocate="uniform", refit="bias", device="cpu"
    )
    report = prune(path, tmp_path / "data.npz", tmp_path / "out.onnx", settings)
    assert 0.6 <= report.after.params / report.before.params <= 0.7
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence <= 1e-5
    assert report.verification.batches == (1, 2)
    before, after = (onnx.load(p).graph for p in (path, tmp_path / "out.onnx"))
    for old, new in zip(before.input, after.input, strict=True):
        assert old.type == new.type
        assert [d.dim_param for d in new.type.tensor_type.shape.dim if d.dim_param]
    original, pruned = (onnxruntime.InferenceSession(str(p)) for p in (path, tmp_path / "out.onnx"))
    for size in SIZES:
        feed = _inputs(name, *size, seed=9)
        for a, b in zip(original.run(None, feed), pruned.run(None, feed), strict=True):
            assert a.shape == b.shape
            assert 0 < np.abs(a - b).max() < np.abs(a).max()


# ------------------------------------------------------------------------------------------------ their forms, alone


def test_masked_mean_over_tokens_is_pruned_exactly(tmp_path: Path) -> None:
    """A mask that is expanded to the width of what it multiplies holds nothing back."""
    text = """(float[N,L,6] x, float[N,L] there) => (float[N,5] y)
    <float[6,16] w1, float[16,5] w2, int64[1] last = {2}, int64[3] wide = {1,1,16}, int64[1] along = {1}> {
        h = MatMul(x, w1)
        r = Relu(h)
        m = Unsqueeze(there, last)
        e = Expand(m, wide)
        p = Mul(r, e)
        s = ReduceSum<keepdims = 0>(p, along)
        c = ReduceSum<keepdims = 0>(e, along)
        d = Div(s, c)
        y = MatMul(d, w2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    assert [len(g.units) for g in coupling.groups] == [16]
    rng = np.random.default_rng(0)
    feeds: list[dict[str, Array]] = [
        {
            "x": rng.standard_normal((n, k, 6), np.float32),
            "there": rng.integers(1, 3, (n, k)).astype(np.float32),
        }
        for n, k in ((1, 3), (4, 9))
    ]
    _assert_exact(model, coupling, feeds)


@pytest.mark.parametrize("length", [3, 8, 12])
def test_short_position_table_keeps_its_length(length: int, tmp_path: Path) -> None:
    """Its length is that of the input only where both are added."""
    text = """(float[N,L,8] x) => (float[N,4,8] y, float[] z)
    <float[8,8] table, int64[1] nought = {0}, int64[1] two = {1}, int64[1] eight = {8}, int64[1] four = {4},
     float[1,1,8] one> {
        length = Shape<start = 1, end = 2>(x)
        batch = Shape<start = 0, end = 1>(x)
        rows = Slice(table, nought, length, nought)
        count = Shape<start = 0, end = 1>(rows)
        wanted = Concat<axis = 0>(count, four, eight)
        z = Expand(one, wanted)
        shape = Concat<axis = 0>(batch, four, eight)
        m = ReduceMean<axes = [1], keepdims = 1>(x)
        y = Expand(m, shape)
    }"""
    proto = build(text)
    del proto.graph.output[1].type.tensor_type.shape.dim[:]
    for _ in range(3):
        proto.graph.output[1].type.tensor_type.shape.dim.add()
    model = load(proto, tmp_path)
    feed = {"x": np.random.default_rng(0).standard_normal((2, length, 8), np.float32)}
    expected = Session(proto, "cpu").run(feed)
    assert expected[1].shape == (min(length, 8), 4, 8)
    assert distance(expected, Session(model.proto, "cpu").run(feed)) == 0


@pytest.mark.parametrize("after", ["n, h, d, k", "h, n, d, k"])
def test_keys_transposed_under_merged_axes(after: str, tmp_path: Path) -> None:
    """Test for one transpose where the merged axes are divided as before."""
    text = f"""(float[N,K,6] x) => (float[] y)
    <float[6,8] w, int64[1] h = {{2}}, int64[1] d = {{4}}, int64[1] rest = {{-1}}, float[2,8] v> {{
        m = MatMul(x, w)
        n = Shape<start = 0, end = 1>(m)
        k = Shape<start = 1, end = 2>(m)
        apart = Concat<axis = 0>(n, k, h, d)
        r = Reshape<allowzero = 1>(m, apart)
        t = Transpose<perm = [0, 2, 1, 3]>(r)
        merged = Concat<axis = 0>(rest, k, d)
        f = Reshape(t, merged)
        g = Transpose<perm = [0, 2, 1]>(f)
        divided = Concat<axis = 0>({after})
        y = Reshape(g, divided)
    }}"""
    proto = build(text)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    for _ in range(4):
        proto.graph.output[0].type.tensor_type.shape.dim.add()
    model = load(proto, tmp_path)
    turned = [
        n for n in model.nodes if n.op == "Transpose" and list(n.attrs["perm"]) == [0, 1, 3, 2]
    ]
    assert len(turned) == (after == "n, h, d, k")
    for n, k in ((3, 5), (2, 2), (1, 7)):
        feed = {"x": np.random.default_rng(n).standard_normal((n, k, 6), np.float32)}
        found = Session(model.proto, "cpu").run(feed)
        assert distance(Session(proto, "cpu").run(feed), found) <= 1e-6


def test_reshape_of_zero_samples_stays_empty(tmp_path: Path) -> None:
    """``allowzero`` goes with the computed target that needed it."""
    text = """(float[N,K,6] x) => (float[N,K,2,4] y) <float[6,8] w, int64[2] inner = {2, 4}> {
        m = MatMul(x, w)
        outer = Shape<start = 0, end = 2>(x)
        to = Concat<axis = 0>(outer, inner)
        y = Reshape<allowzero = 1>(m, to)
    }"""
    model = load(build(text), tmp_path)
    assert not any(n.op in ("Shape", "Concat") or n.attrs.get("allowzero") for n in model.nodes)
    session = Session(model.proto, "cpu")
    for n, k in ((0, 3), (2, 5)):
        assert session.run({"x": np.ones((n, k, 6), np.float32)})[0].shape == (n, k, 2, 4)


# -------------------------------------------------------------------------------------------------- text recognition


@pytest.fixture(params=OCR)
def recogniser(request: pytest.FixtureRequest) -> tuple[Path, tuple[int, int], tuple[int, int]]:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        pytest.skip("rapidocr_onnxruntime, which holds the models, is not installed")
    return Path(package.submodule_search_locations[0]) / "models" / f"{request.param}.onnx", *OCR[
        request.param
    ]


def test_text_recognition_model_is_pruned_exactly(
    recogniser: tuple[Path, tuple[int, int], tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(1.0, 1.0, 1.0, 1))
    path, size, other = recogniser
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((8, 3, *size), np.float32))
    settings = Settings.create(
        params=0.7, importance="activation", allocate="uniform", refit="bias", device="cpu"
    )
    report = prune(path, tmp_path / "data.npz", tmp_path / "out.onnx", settings)
    assert 0.6 <= report.after.params / report.before.params <= 0.7
    assert report.verification.batches == (1, 2)
    assert not _unexplained(report.model, report.coupling)
    original, pruned = (onnxruntime.InferenceSession(str(p)) for p in (path, tmp_path / "out.onnx"))
    for batch, at in ((1, size), (2, size), (3, other)):
        feed = {"x": rng.standard_normal((batch, 3, *at), np.float32)}
        ((a,), (b,)) = original.run(None, feed), pruned.run(None, feed)
        assert a.shape == b.shape
        assert np.isfinite(b).all()
