"""Weights that share values: codebooks near the best, a drop that was measured, documents and tables."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from command_line import Result, error_document
from conftest import MODELS
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip import (
    DataError,
    GateFailed,
    Packed,
    Settings,
    compare,
    load,
    pack,
    unpack,
)
from onnx_oamip.cli import main
from onnx_oamip.data.dataset import load as load_data
from onnx_oamip.published.packing import allocation, codebook, layout

LENET = MODELS / "lenet300-mnist.onnx"


# ------------------------------------------------------------------------------------------------------------ codebooks


def distortion(values: np.ndarray, book: np.ndarray) -> float:
    return float(np.mean(np.square(values[:, None] - book).min(axis=1)))


@pytest.mark.parametrize("k", [2, 4, 16, 64])
@pytest.mark.parametrize("kind", ["normal", "laplace", "heavy tails"])
def test_codebooks_lose_less_than_quantiles_and_uniform_grids(k: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.standard_normal(20_000),
        "laplace": rng.laplace(size=20_000),
        "heavy tails": rng.standard_t(4, 20_000),
    }[kind]
    book = codebook.cluster(codebook.histogram(values), k, 4, 0)
    assert len(book.values) == k
    found = distortion(values, book.values)
    quantiles = [part.mean() for part in np.array_split(np.sort(values), k)]
    grid = np.linspace(values.min(), values.max(), 2 * k + 1)[1::2]
    assert found <= min(distortion(values, np.asarray(quantiles)), distortion(values, grid)) * 1.001
    # What the histogram leaves out is a cell's own spread.
    width = np.ptp(values) / codebook.BINS
    assert book.error == pytest.approx(found, rel=0.02, abs=width**2)
    # Max, "Quantizing for minimum distortion", 1960: the least error for a Gaussian.
    if kind == "normal":
        best = {2: 0.3634, 4: 0.1175, 16: 0.009497}
        assert k not in best or found == pytest.approx(best[k], rel=0.05)


@settings(max_examples=60)
@given(
    st.integers(2, 12),
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.sampled_from(["f2", "f4", "f8", "bf16"]),
)
def test_entries_take_the_nearest_value(k: int, seed: int, zeros: float, kind: str) -> None:
    """Few enough values stay exact; zero stays zero where it is frequent; nothing is further off than it must be."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bf16" else kind)
    values = rng.standard_normal((32, 9)).astype(dtype)
    values[rng.random(values.shape) < zeros] = 0
    code = helper.np_dtype_to_tensor_dtype(dtype)
    place = layout.Place("w", code, values.shape, 0, 0, values.nbytes)
    words = values.view(f"u{dtype.itemsize}").reshape(-1)
    numbers = codebook.numbers(place, words)
    book = codebook.cluster(codebook.histogram(numbers), k, dtype.itemsize, 0)
    shared = codebook.numbers(place, codebook.share(place, words, book.values))
    assert len(np.unique(shared)) <= k
    if np.mean(numbers == 0) >= 1 / k:
        assert ((shared == 0) >= (numbers == 0)).all()
    if len(np.unique(numbers)) <= k:
        np.testing.assert_array_equal(shared, numbers)
    gaps = np.abs(numbers[:, None] - book.values)
    ulp = np.abs(numbers).max() * float(ml_dtypes.finfo(dtype).eps)
    assert (np.abs(shared - numbers) <= gaps.min(axis=1) + ulp).all()


def test_unsuitable_tensors_share_no_values() -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((32, 32)).astype(np.float32)
    cases = {
        "matrix": (dense, True),
        "vector": (dense.reshape(-1), False),
        "column": (dense.reshape(-1, 1), False),
        "tiny": (dense[:5, :5], False),
        "NaN": (np.where(dense > 2, np.float32(np.nan), dense), False),
        "whole numbers": (np.arange(1024).reshape(32, 32), False),
    }
    for name, (values, expected) in cases.items():
        code = helper.np_dtype_to_tensor_dtype(values.dtype)
        place = layout.Place(name, code, values.shape, 0, 0, values.nbytes)
        assert codebook.shares(place, values.reshape(-1).view(f"u{values.itemsize}")) == expected, (
            name
        )


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 2**31), st.floats(1e-4, 2))
def test_no_other_choice_is_smaller_at_the_same_loss(
    tensors: int, seed: int, allowed: float
) -> None:
    rng = np.random.default_rng(seed)
    loss = np.column_stack([-np.sort(-rng.random((tensors, 4)), axis=1), np.zeros(tensors)])
    nbytes = np.sort(rng.integers(1, 1000, (tensors, 5)), axis=1).astype(np.float64)
    levels = allocation.choose(loss, nbytes, allowed)
    rows = np.arange(tensors)
    found = loss[rows, levels].sum()
    assert found <= allowed
    for other in itertools.product(range(5), repeat=tensors):
        if loss[rows, other].sum() <= found:
            assert nbytes[rows, other].sum() >= nbytes[rows, levels].sum() - 1e-6


# --------------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped samples, fewer of them."""
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    with np.load(MODELS / "mnist.npz") as whole:
        np.savez(
            path, **{k: v[:600] if v.ndim else v for k, v in ((k, whole[k]) for k in whole.files)}
        )
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Packed:
    return pack(LENET, tmp_path_factory.mktemp("packed") / "lenet.oamip", data=data)


def test_half_a_point_of_drop_gives_a_small_file(
    packed: Packed, data: Path, tmp_path: Path
) -> None:
    assert packed.nbytes < 0.1 * LENET.stat().st_size
    assert packed.verification is not None
    assert not packed.contents.lossless
    again = unpack(packed.output, tmp_path / "again.onnx")
    assert again.contents == packed.contents
    found = compare(LENET, tmp_path / "again.onnx", data, Settings.create())
    assert found.accuracy_before is not None
    assert found.accuracy_after is not None
    assert 100 * (found.accuracy_before - found.accuracy_after) <= 0.5
    for measure in (
        "accuracy_before",
        "accuracy_after",
        "agreement",
        "output_relative_error",
        "samples",
    ):
        assert getattr(found, measure) == getattr(packed.verification, measure)
    # The graph and every vector are as they were; each matrix holds as many values as is said.
    before, after = onnx.load(LENET), onnx.load(tmp_path / "again.onnx")
    clusters = {
        p.name: c.clusters
        for p, c in zip(packed.original.places, packed.contents.codes, strict=True)
    }
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        a, b = numpy_helper.to_array(old), numpy_helper.to_array(new)
        if a.ndim == 1:
            np.testing.assert_array_equal(a, b)
        else:
            assert len(np.unique(b)) == clusters[old.name] <= 64
            assert not np.array_equal(a, b)
        old.raw_data = new.raw_data = b""
    assert before == after


def test_larger_allowed_drop_gives_a_smaller_file(
    packed: Packed, data: Path, tmp_path: Path
) -> None:
    more = pack(LENET, tmp_path / "more.oamip", data=data, max_drop=5)
    none = pack(LENET, tmp_path / "none.oamip", data=data, max_drop=0)
    assert more.nbytes < packed.nbytes < none.nbytes
    assert none.verification is not None
    assert none.verification.accuracy_after is not None
    assert none.verification.accuracy_after >= none.verification.accuracy_before


def test_without_labels_agreement_is_limited(data: Path, tmp_path: Path) -> None:
    with np.load(data) as whole:
        unlabelled = {k: whole[k] for k in whole.files if not k.endswith("labels")}
    found = pack(LENET, tmp_path / "out.oamip", data=unlabelled, max_drop=1)
    assert found.verification is not None
    assert found.verification.accuracy_after is None
    assert found.verification.agreement is not None
    assert found.verification.agreement >= 0.99


def test_too_few_values_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"points are lost on .*, more than `max_drop=0\.1`"):
        pack(LENET, tmp_path / "out.oamip", data=data, clusters=2, max_drop=0.1)
    assert list(tmp_path.iterdir()) == []
    found = pack(LENET, tmp_path / "out.oamip", data=data, clusters=2, max_drop=90)
    assert found.verification is not None
    assert {c.clusters for c in found.contents.codes} == {None, 2}


def test_half_precision_and_pruned_matrices_are_packed(tmp_path: Path) -> None:
    """Codebooks of float16 and bfloat16 weights; the zeros of a pruned matrix stay, and are left out."""
    rng = np.random.default_rng(0)
    held = {
        "half": rng.standard_normal((60, 50)).astype(np.float16),
        "brain": rng.standard_normal((60, 50)).astype(ml_dtypes.bfloat16),
        "pruned": np.where(
            rng.random((200, 100)) < 0.02, rng.standard_normal((200, 100)), 0
        ).astype(np.float32),
    }
    outputs = [
        helper.make_tensor_value_info(f"{n}.out", helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in held.items()
    ]
    nodes = [helper.make_node("Identity", [n], [f"{n}.out"]) for n in held]
    graph = helper.make_graph(
        nodes, "g", [], outputs, [numpy_helper.from_array(v, n) for n, v in held.items()]
    )
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "in.onnx"
    )
    found = pack(tmp_path / "in.onnx", tmp_path / "out.oamip", clusters=8)
    unpack(tmp_path / "out.oamip", tmp_path / "out.onnx")
    assert [c.method for c in found.contents.codes][2] == "sham"
    assert [c.clusters for c in found.contents.codes] == [8, 8, 8]
    for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer:
        value, old = numpy_helper.to_array(tensor), held[tensor.name]
        assert value.dtype == old.dtype
        assert len(np.unique(value.astype(np.float64))) == 8
        np.testing.assert_array_equal((value == 0)[old == 0], True)
        error = np.mean(np.square(value.astype(np.float64) - old.astype(np.float64)))
        assert error < 0.04 * np.mean(np.square(old.astype(np.float64)))


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple]:
    """Runs the command line in a folder with model.onnx; (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "model.onnx").write_bytes(LENET.read_bytes())

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return (code, *capfd.readouterr())

    return call


def test_pack_document_describes_the_packing(run: Callable[..., tuple], data: Path) -> None:
    code, out, err = run(
        "pack", "model.onnx", "-o", "m.oamip", "--data", data, "--report", "--json"
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert set(document) == {
        "schema_version",
        "model",
        "output",
        "unpacked",
        "before",
        "after",
        "ratio",
        "tensors",
        "rivals",
        "verification",
        "timings",
        "settings",
        "versions",
    }
    size = LENET.stat().st_size
    assert document["schema_version"] == 1
    assert document["model"] == {
        "path": "model.onnx",
        "sha256": hashlib.sha256(LENET.read_bytes()).hexdigest(),
    }
    packed = Path("m.oamip").read_bytes()
    assert document["output"] == {"path": "m.oamip", "sha256": hashlib.sha256(packed).hexdigest()}
    assert (document["before"], document["after"]) == ({"bytes": size}, {"bytes": len(packed)})
    assert document["ratio"] == len(packed) / size
    assert document["settings"] == {"lossless": False, "clusters": None, "max_drop": 0.5, "seed": 0}
    assert document["verification"]["samples"] == 600
    tensors = {t["name"]: t for t in document["tensors"]}
    assert set(tensors) == {f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")} - {
        "fc3.bias"
    }
    weight = tensors["fc1.weight"]
    assert (weight["type"], weight["shape"], weight["before"]) == ("float", [300, 784], 940_800)
    assert weight["psi"] == weight["after"] / 940_800 < 0.1
    assert (tensors["fc1.bias"]["method"], tensors["fc1.bias"]["clusters"]) == ("planes", None)
    assert sum(t["after"] for t in document["tensors"]) < len(packed)
    assert document["rivals"]["fp16"] == size - sum(t["before"] for t in document["tensors"]) / 2
    assert (
        document["rivals"]["fp16_zip"]
        < document["rivals"]["fp16"]
        < document["rivals"]["zip"]
        < size
    )
    assert weight["rivals"]["fp16"] == 470_400
    code, out, err = run("unpack", "m.oamip", "-o", "again.onnx", "--json")
    assert (code, err) == (0, "")
    again = json.loads(out)
    assert again["packed"] == {**document["output"], "bytes": len(packed)}
    sha256 = hashlib.sha256(Path("again.onnx").read_bytes()).hexdigest()
    assert again["output"] == {"path": "again.onnx", "sha256": sha256, "bytes": size}
    assert document["unpacked"] == {"sha256": sha256, "lossless": False}
    assert (again["lossless"], again["original_sha256"]) == (False, document["model"]["sha256"])
    assert load_data(data, load("again.onnx")) is not None


def test_pack_table_describes_the_packing(run: Callable[..., tuple], data: Path) -> None:
    exact = run("pack", "model.onnx", "-o", "m.oamip")
    shared = run("pack", "model.onnx", "-o", "s.oamip", "--bits", 4, "--report")
    measured = run("pack", "model.onnx", "-o", "d.oamip", "--clusters", 32, "--data", data)
    back = run("unpack", "m.oamip", "-o", "again.onnx")
    for code, out, err in (exact, shared, measured, back):
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= 80
    assert "every bit comes back" in exact[1]
    assert "fp16, zip" in shared[1]
    assert "was not measured; --data measures it" in shared[1]
    assert "accuracy" in measured[1]
    assert "bit by bit the original" in back[1]
    assert run("pack", "model.onnx", "-o", "q.oamip", "-q") == (0, "", "")
    assert Path("q.oamip").read_bytes() == Path("m.oamip").read_bytes()


MISTAKES = {
    "lossless with values": (("--lossless", "--clusters", 4), "--lossless"),
    "lossless with data": (("--lossless", "--data", "data.npz"), "--lossless"),
    "both numbers": (("--bits", 4, "--clusters", 4), "--bits"),
    "a drop without data": (("--max-drop", 1), "--data"),
    "evaluation alone": (("--eval-data", "data.npz"), "--data"),
    "one value": (("--clusters", 1), "--clusters"),
    "too many bits": (("--bits", 9), "--bits"),
    "a negative drop": (("--max-drop", -1), "--max-drop"),
    "missing data": (("--data", "none.npz"), "none.npz"),
    "other data": (("--data", "data.npz"), "input"),
    "on itself": (("-o", "model.onnx"), "overwrite"),
    "no folder": (("-o", "none/out.oamip"), "folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_usage_error_is_one_sentence(run: Callable[..., tuple], mistake: str) -> None:
    np.savez("data.npz", image=np.zeros((4, 1, 28, 28), np.float32))
    options, word = MISTAKES[mistake]
    result = Result(*run("pack", "model.onnx", "-o", "out.oamip", *options, "--json"))
    assert result.code == error_document(result)["status"] == 2
    assert result.err.startswith("Error: ")
    assert (result.err.count("\n"), word in result.err) == (1, True), result.err
    assert sorted(p.name for p in Path().iterdir()) == ["data.npz", "model.onnx"]
    assert Path("model.onnx").read_bytes() == LENET.read_bytes()


def _saved(path: Path, nodes: list[onnx.NodeProto], output: onnx.ValueInfoProto) -> None:
    """A model whose input `x` (batch, 40) is multiplied by `w` (40, 30)."""
    rng = np.random.default_rng(0)
    weights = {"w": (40, 30), "v": (30, 1)}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["s"]), *nodes],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 40])],
        [output],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, path)


def test_unmeasurable_drop_is_refused(tmp_path: Path) -> None:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])
    _saved(tmp_path / "in.onnx", [helper.make_node("MatMul", ["s", "v"], ["y"])], output)
    samples = {"x": np.zeros((50, 40), np.float32)}
    for clusters in (None, 8):
        with pytest.raises(DataError, match="cannot be measured"):
            pack(tmp_path / "in.onnx", tmp_path / "out.oamip", data=samples, clusters=clusters)
    assert not (tmp_path / "out.oamip").exists()


def test_decisions_of_an_argmax_limit_the_drop(tmp_path: Path) -> None:
    output = helper.make_tensor_value_info("y", TensorProto.INT64, ["batch", 1])
    _saved(tmp_path / "in.onnx", [helper.make_node("ArgMax", ["s"], ["y"], axis=1)], output)
    rng = np.random.default_rng(1)
    samples = {"x": rng.standard_normal((200, 40)).astype(np.float32)}
    packed = pack(tmp_path / "in.onnx", tmp_path / "out.oamip", data=samples, max_drop=5.0)
    assert packed.verification is not None
    assert packed.verification.agreement is not None
    assert packed.verification.agreement >= 0.95
