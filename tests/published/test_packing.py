"""Codings give every bit back and keep to the published bounds; packed models are refused where they are damaged."""

from __future__ import annotations

import hashlib
import heapq
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import MODELS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_oamip import Packed, pack, unpack
from onnx_oamip.cli import main
from onnx_oamip.core.errors import ModelError, OutputError
from onnx_oamip.published.packing import (
    coding,
    container,
    entropy,
    layout,
)
from onnx_oamip.published.packing.coding import Form
from onnx_oamip.published.packing.entropy import Damaged, Reader

WORDS = tuple(np.dtype(f"u{n}") for n in (1, 2, 4, 8))


# -------------------------------------------------------------------------------------------------------------- codings


@st.composite
def tensors(draw: st.DrawFn) -> tuple[np.ndarray, Form]:
    """Words of any pattern: few values or many, mostly zeros or none, with empty rows and columns."""
    dtype = draw(st.sampled_from(WORDS))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = draw(st.sampled_from([1, 2, 3, 17, 256, 257, 1 << 16]))
    alphabet = rng.integers(0, np.iinfo(dtype).max, kinds, dtype, endpoint=True)
    words = rng.choice(alphabet, (rows, columns))
    words[rng.random(words.shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))] = 0
    words[:, rng.random(columns) < draw(st.sampled_from([0.0, 0.5]))] = 0
    form = Form(dtype, words.size, draw(st.sampled_from([0, rows])), draw(st.booleans()))
    return words.reshape(-1), form


@settings(max_examples=100)
@given(tensors())
def test_every_coding_is_lossless(case: tuple[np.ndarray, Form]) -> None:
    words, form = case
    for code in coding.candidates(words, form):
        back = coding.decode(code.method, memoryview(code.blob), form)
        assert (back.dtype, back.shape) == (words.dtype, words.shape)
        np.testing.assert_array_equal(back, words, err_msg=code.method)
    best = coding.encode(words, form)
    assert len(best.blob) <= words.nbytes
    np.testing.assert_array_equal(coding.decode(best.method, memoryview(best.blob), form), words)


def test_damaged_blobs_are_refused_or_of_the_right_size() -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=100)
    @given(tensors(), st.integers(0, 2**31), st.integers(1, 255), st.booleans())
    def check(case: tuple[np.ndarray, Form], at: int, by: int, cut: bool) -> None:
        words, form = case
        for code in coding.candidates(words, form):
            if not code.blob:
                continue
            blob = bytearray(code.blob)
            blob[at % len(blob)] ^= by
            damaged = blob[: at % len(blob)] if cut else blob
            try:
                back = coding.decode(code.method, memoryview(damaged), form)
            except Damaged:
                outcomes["refused"] += 1
                continue
            outcomes["decoded"] += 1
            assert back.nbytes == words.nbytes

    check()
    assert outcomes["refused"] > 0
    assert outcomes["decoded"] > 0


FLOATS = {
    "float16": (np.float16, 0x7E01),
    "bfloat16": (ml_dtypes.bfloat16, 0x7FC1),
    "float32": (np.float32, 0x7FC00001),
    "float64": (np.float64, 0x7FF8000000000001),
}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_nan_payloads_and_negative_zero_are_preserved(name: str, zeros: float) -> None:
    dtype, nan = FLOATS[name]
    rng = np.random.default_rng(0)
    values = rng.choice(np.asarray([1.5, -0.0, np.inf, -2.0], np.float64), (30, 20)).astype(dtype)
    words = values.view(f"u{values.itemsize}")
    words[rng.random(words.shape) < zeros] = 0
    words[0, 0] = nan
    form = Form(words.dtype, words.size, 30, True)
    methods = set()
    for code in coding.candidates(words.reshape(-1), form):
        back = coding.decode(code.method, memoryview(code.blob), form)
        assert back.tobytes() == words.tobytes()
        methods.add(code.method)
    assert methods >= {"raw", "index", "ham", "lz"}
    assert ("sham" in methods) == (zeros > 0)


@pytest.mark.parametrize(("share", "distinct"), [(0.0, 1), (1.0, 1), (0.1, 1), (0.1, 40)])
def test_sparse_coding_handles_edge_cases(share: float, distinct: int) -> None:
    """All zero, nothing zero, one value, and half of the columns empty."""
    rng = np.random.default_rng(3)
    values = rng.integers(1, 1 << 32, distinct, np.uint32)
    words = np.where(rng.random((300, 64)) < share, rng.choice(values, (300, 64)), np.uint32(0))
    if share < 1:
        words[:, ::2] = 0
    form = Form(words.dtype, words.size, 300, True)
    found = {c.method: c for c in coding.candidates(words.reshape(-1), form)}
    assert ("sham" in found or "csc" in found) == (share < 1)
    for method, code in found.items():
        back = coding.decode(method, memoryview(code.blob), form)
        np.testing.assert_array_equal(back.reshape(300, 64), words)
    if distinct > 1:
        assert found["sham"].clusters == distinct + 1


def test_constant_tensor_is_tiny_and_claims_no_more_than_is_read() -> None:
    words = np.full(1 << 22, 7, np.uint32)
    form = Form(words.dtype, words.size, 1 << 11, True)
    code = coding.encode(words, form)
    assert words.nbytes / entropy.RATIO / 2 <= len(code.blob) <= words.nbytes / 500
    np.testing.assert_array_equal(coding.decode(code.method, memoryview(code.blob), form), words)


@settings(max_examples=60)
@given(st.binary(max_size=3000), st.integers(1, 400))
def test_entropy_sections_survive_a_round_trip(data: bytes, times: int) -> None:
    """Bytes come back, and nothing else is said to be in them."""
    whole = data * times
    blob = entropy.shrink(whole)
    assert len(blob) <= len(whole) + 9
    assert entropy.within(len(whole), len(blob))
    assert Reader(memoryview(blob)).section(len(whole)) == whole
    for size in {0, len(whole) - 1, len(whole) + 1, 1 << 50} - {len(whole), -1}:
        with pytest.raises(Damaged):
            Reader(memoryview(blob)).section(size)


def huffman_bits(counts: np.ndarray) -> int:
    """Bits of the best prefix code: the sum of all merged weights."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@pytest.mark.parametrize("k", [3, 16, 33, 256])
def test_ham_is_as_short_as_the_optimal_prefix_code(k: int) -> None:
    rng = np.random.default_rng(k)
    share = rng.dirichlet(np.full(k, 0.5))
    words = rng.choice(k, 200_000, p=share).astype(np.uint32)
    code = next(
        c
        for c in coding.candidates(words, Form(words.dtype, words.size, 0, False))
        if c.method == "ham"
    )
    best = huffman_bits(np.bincount(words)) / 8
    table = 1 + 4 * code.clusters
    assert len(code.blob) - table <= 1.01 * best + 128


# --------------------------------------------------------------------------------------------------- published bounds

SINGLE = 32
PUBLISHED = [  # share of zeros, values of the rest, psi of HAM and sHAM as computed for a large Gaussian matrix
    (0.90, 32, 0.047, 0.066),
    (0.99, 32, 0.033, 0.0067),
    (0.50, 255, 0.156, 0.375),
    (0.00, 32, 0.156, 0.656),
]


@pytest.mark.parametrize(("zeros", "k", "ham", "sham"), PUBLISHED)
def test_coded_sizes_stay_within_the_published_bounds(
    zeros: float, k: int, ham: float, sham: float
) -> None:
    """Sizes under the bounds of Marinò et al.: (1 + log2 k)/B + 6k/nm, and s (1 + log2 k + b)/B + b/nB + 6k/nm.

    Row numbers have b = 16 bits there; coded as they are here, sHAM is shorter.
    """
    n, m = 1 << 12, 48
    rng = np.random.default_rng(0)
    values = rng.standard_normal((n, m)).astype(np.float32)
    magnitude = np.abs(values)
    values[magnitude < np.quantile(magnitude, zeros)] = 0
    kept = values != 0
    edges = np.quantile(values[kept], np.linspace(0, 1, k + 1))
    cell = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, k - 1)
    means = np.bincount(cell[kept], values[kept], k) / np.bincount(cell[kept], minlength=k)
    values = np.where(kept, means.astype(np.float32)[cell], np.float32(0))
    words = values.view(np.uint32).reshape(-1)
    size, s, table = words.nbytes, 1 - zeros, 6 * k / (n * m)
    found = {
        c.method: len(c.blob) / size
        for c in coding.candidates(words, Form(words.dtype, words.size, n, True))
    }
    assert found["ham"] <= (1 + np.log2(k + (zeros > 0))) / SINGLE + table
    assert found["ham"] == pytest.approx(ham, rel=0.03)
    if zeros >= coding.SPARSE:
        bound = s * (1 + np.log2(k) + 16) / SINGLE + 16 / (n * SINGLE) + table
        nonzeros = Form(words.dtype, int(kept.sum()), 0, True)
        coded = coding.encode(words[words != 0], nonzeros)
        assert (len(coded.blob) + 2 * kept.sum() + 2 * m) / size == pytest.approx(sham, rel=0.05)
        assert found["sham"] <= min(bound, 0.85 * sham)
        assert found["sham"] < found["ham"] or zeros < 0.9


# ------------------------------------------------------------------------------------------------------- whole models


def round_trip(model: Path, folder: Path, **choices: Any) -> tuple[Packed, Path]:
    """The record of pack and the path of what comes out again."""
    found = pack(model, folder / "packed.oamip", **choices)
    (folder / "again").mkdir(exist_ok=True)
    again = unpack(folder / "packed.oamip", folder / "again" / "model.onnx")
    assert again.contents == found.contents
    assert found.nbytes == (folder / "packed.oamip").stat().st_size
    assert found.sha256 == hashlib.sha256((folder / "packed.oamip").read_bytes()).hexdigest()
    return found, folder / "again" / "model.onnx"


SHIPPED = sorted([*MODELS.glob("*.onnx"), *(ROOT / "tests" / "data").glob("*.onnx")])


@pytest.mark.parametrize("model", SHIPPED, ids=lambda p: p.stem)
def test_shipped_models_are_restored_bit_for_bit(model: Path, tmp_path: Path) -> None:
    found, again = round_trip(model, tmp_path)
    assert again.read_bytes() == model.read_bytes()
    assert found.contents.lossless
    assert found.original.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert found.nbytes < (0.85 if model.stat().st_size > 200_000 else 1) * model.stat().st_size


TYPES = (
    "FLOAT",
    "UINT8",
    "INT8",
    "UINT16",
    "INT16",
    "INT32",
    "INT64",
    "BOOL",
    "FLOAT16",
    "DOUBLE",
    "UINT32",
    "UINT64",
    "COMPLEX64",
    "COMPLEX128",
    "BFLOAT16",
    "FLOAT8E4M3FN",
    "FLOAT8E5M2",
    "UINT4",
    "INT4",
)


def everything(shape: tuple[int, ...] = (16, 33)) -> onnx.ModelProto:
    """Tensors of every type in all places where a model keeps them, in raw and typed fields."""
    rng = np.random.default_rng(0)
    held = []
    for name in TYPES:
        code = TensorProto.DataType.Value(name)
        count = int(np.prod(shape))
        size = -(-count // 2) if name.endswith("INT4") else count * layout.word_type(code).itemsize
        raw = rng.integers(0, 256, size * (2 if name == "COMPLEX128" else 1), np.uint8)
        if name == "BOOL":
            raw &= 1
        held.append(helper.make_tensor(f"{name}.raw", code, shape, raw.tobytes(), raw=True))
    for name, values in {
        "FLOAT": rng.standard_normal(shape),
        "DOUBLE": rng.standard_normal(shape),
        "INT64": rng.integers(0, 99, shape),
        "STRING": np.full(shape, b"text"),
    }.items():
        code = TensorProto.DataType.Value(name)
        held.append(helper.make_tensor(f"{name}.typed", code, shape, values.reshape(-1).tolist()))
    held.append(numpy_helper.from_array(np.zeros((0, 5), np.float32), "empty"))
    weight = numpy_helper.from_array(rng.standard_normal((40, 40)).astype(np.float32), "inner")
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["branch"])],
        "inner",
        [],
        [helper.make_tensor_value_info("branch", TensorProto.FLOAT, [40, 40])],
        [weight],
    )
    constant = numpy_helper.from_array(rng.standard_normal((30, 30)).astype(np.float32), "")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(
        nodes,
        "everything",
        [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [40, 40])],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_tensors_of_every_type_and_storage_are_restored(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(everything(), path)
    found, again = round_trip(path, tmp_path)
    assert again.read_bytes() == path.read_bytes()
    names = [p.name for p in found.original.places]
    assert {f"{t}.raw" for t in TYPES} | {"FLOAT.typed", "DOUBLE.typed"} <= set(names)
    assert (names.count("inner"), names.count("")) == (2, 1)
    proto = onnx.load(path)
    words = {p.name: found.original.words(p) for p in found.original.places}
    for tensor in proto.graph.initializer:
        if tensor.name in words and tensor.data_type not in (TensorProto.UINT4, TensorProto.INT4):
            assert words[tensor.name].tobytes() == numpy_helper.to_array(tensor).tobytes()


def external(folder: Path, name: str = "model.onnx") -> Path:
    """A model whose weights lie in two files beside it."""
    model = onnx.load(MODELS / "lenet300-mnist.onnx")
    for tensor in model.graph.initializer:
        side = "sub/weights.bin" if tensor.name.endswith("weight") else "biases.bin"
        onnx.external_data_helper.set_external_data(tensor, side)
    folder.mkdir(exist_ok=True)
    (folder / "sub").mkdir()
    onnx.save_model(model, folder / name)
    return folder / name


def test_external_data_is_restored_without_overwriting(tmp_path: Path) -> None:
    model = external(tmp_path / "in")
    found, again = round_trip(model, tmp_path)
    assert sorted(found.original.contents) == ["", "biases.bin", "sub/weights.bin"]
    assert len(found.original.places) == 5
    for name in ("model.onnx", "biases.bin", "sub/weights.bin"):
        assert (again.parent / name).read_bytes() == (model.parent / name).read_bytes()
    assert found.nbytes < 0.85 * found.original.nbytes
    # The same bytes may be there already; others stay as they are.
    unpack(tmp_path / "packed.oamip", again.parent / "other.onnx")
    (again.parent / "biases.bin").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"biases\.bin is there already"):
        unpack(tmp_path / "packed.oamip", again.parent / "third.onnx")
    assert (again.parent / "biases.bin").read_bytes() == b"mine"
    assert not (again.parent / "third.onnx").exists()
    with pytest.raises(OutputError, match="another name"):
        unpack(tmp_path / "packed.oamip", tmp_path / "biases.bin")


def test_packed_bytes_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes((MODELS / "lenet300-mnist.onnx").read_bytes())
    one = pack(MODELS / "lenet300-mnist.onnx", tmp_path / "one.oamip", clusters=8, seed=3)
    two = pack(tmp_path / "other.onnx", tmp_path / "two.oamip", clusters=8, seed=3)
    assert one.sha256 == two.sha256


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A packed model with every kind of coding."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((20, 30)).astype(np.float32)
    few = rng.choice(
        np.arange(1, 9, dtype=np.float32), (20, 200), p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05]
    )
    sparse = np.where(rng.random((40, 200)) < 0.02, few[0], 0).astype(np.float32)
    held = {"dense": dense, "few": few, "sparse": sparse}
    graph = helper.make_graph(
        [helper.make_node("Identity", [n], [f"{n}.out"]) for n in held],
        "small",
        [],
        [
            helper.make_tensor_value_info(f"{n}.out", TensorProto.FLOAT, v.shape)
            for n, v in held.items()
        ],
        [numpy_helper.from_array(v, n) for n, v in held.items()],
    )
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "small.onnx"
    )
    found = pack(folder / "small.onnx", folder / "small.oamip")
    assert [c.method for c in found.contents.codes] == ["planes", "ham", "sham"]
    return (folder / "small.oamip").read_bytes()


def refused(data: bytes, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command line refuses a file; nothing is written."""
    (folder / "bad.oamip").write_bytes(data)
    before = sorted(folder.iterdir())
    capfd.readouterr()
    code = main(["unpack", str(folder / "bad.oamip"), "-o", str(folder / "out.onnx")])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(folder.iterdir()) == before
    return err


def test_every_flipped_byte_and_truncation_is_detected(small: bytes) -> None:
    rng = np.random.default_rng(0)
    for at in (*range(80), *rng.integers(80, len(small), 300).tolist()):
        damaged = bytearray(small)
        damaged[at] ^= int(rng.integers(1, 256))
        with pytest.raises(ModelError, match=r"^it "):
            container.read(bytes(damaged), "it")
    for cut in (0, 1, 7, 8, 40, 71, 72, 73, len(small) // 2, len(small) - 1):
        with pytest.raises(ModelError, match=r"^it "):
            container.read(small[:cut], "it")
    with pytest.raises(ModelError):
        container.read(small + b"\0", "it")


def resigned(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with another header, and checksums that hold again."""
    size = struct.calcsize("<8sIQQQ32s")
    magic, version, packed, plain, _, _ = struct.unpack("<8sIQQQ32s", data[:size])
    body = data[size + 4 :]
    header = json.loads(Reader(memoryview(body[:packed])).section(plain))
    change(header)
    text = json.dumps(header).encode()
    head = entropy.shrink(text)
    body = head + body[packed:]
    sha256 = hashlib.sha256(body).digest()
    preamble = struct.pack("<8sIQQQ32s", magic, version, len(head), len(text), len(body), sha256)
    return preamble + struct.pack("<I", zlib.crc32(preamble)) + body


def put(*keys: str | int, value: object) -> Callable[[dict[str, Any]], object]:
    """A change of one value of the header."""

    def change(header: dict[str, Any]) -> None:
        place: Any = header
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


LIES = {
    "a size beyond all memory": put("files", 0, "bytes", value=1 << 50),
    "a negative size": put("files", 0, "bytes", value=-1),
    "a size that is text": put("files", 0, "bytes", value="100"),
    "a size that is true": put("files", 0, "bytes", value=True),
    "a smaller file": put("files", 0, "bytes", value=100),
    "a larger file": put("files", 0, "bytes", value=200_000),
    "no files": put("files", value=[]),
    "a name for the model": put("files", 0, "name", value="model.onnx"),
    "a tensor beyond all memory": put("tensors", 0, "nbytes", value=1 << 40),
    "a tensor on another": put("tensors", 1, "offset", value=0),
    "a tensor in no file": put("tensors", 0, "file", value=3),
    "another method": put("tensors", 0, "method", value="ham"),
    "no method": put("tensors", 0, "method", value="exec"),
    "another type": put("tensors", 0, "type", value=11),
    "no type": put("tensors", 0, "type", value=999),
    "text": put("tensors", 0, "type", value=8),
    "another shape": put("tensors", 2, "shape", value=[8000, 1]),
    "a negative shape": put("tensors", 2, "shape", value=[-40, -200]),
    "another blob": put("tensors", 0, "blob", value=[0, 10, 0]),
    "a blob behind the end": put("tensors", 0, "blob", value=[1 << 40, 10, 0]),
    "a blob that is none": put("tensors", 0, "blob", value=None),
    "tensors that are none": put("tensors", value=7),
    "no such key": lambda header: header.pop("files"),
    "another sha256": put("files", 0, "sha256", value="0" * 64),
    "not the original": put("original_sha256", value="0" * 64),
}


@pytest.mark.parametrize("lie", LIES)
def test_inconsistent_headers_are_refused(
    small: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str], lie: str
) -> None:
    assert container.read(resigned(small, lambda _: None), "it") == container.read(small, "it")
    refused(resigned(small, LIES[lie]), tmp_path, capfd)


@pytest.mark.parametrize(
    "name", ["../up.bin", "/etc/passwd", "a/../../b", "C:\\x", "", "a\0b", "."]
)
def test_external_file_names_outside_the_folder_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    pack(external(tmp_path / "in"), tmp_path / "packed.oamip")
    data = (tmp_path / "packed.oamip").read_bytes()
    refused(resigned(data, put("files", 1, "name", value=name)), tmp_path, capfd)


def test_files_of_other_formats_are_refused(
    small: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "not a packed model" in refused(
        (MODELS / "mnist.npz").read_bytes()[:5000], tmp_path, capfd
    )
    assert "not a packed model" in refused(b"", tmp_path, capfd)
    newer = small[:8] + struct.pack("<I", 2) + small[12:]
    assert "schema version 2 but this version reads 1" in refused(newer, tmp_path, capfd)
    assert "72 bytes" not in refused(small[:40], tmp_path, capfd)
    for path in (tmp_path / "none.oamip", tmp_path):
        with pytest.raises(ModelError):
            unpack(path, tmp_path / "out.onnx")


def test_file_that_is_not_a_model_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes((MODELS / "lenet300-mnist.onnx").read_bytes()[:5000])
    for name in ("bad.onnx", "none.onnx"):
        with pytest.raises(ModelError):
            pack(tmp_path / name, tmp_path / "out.oamip")
    with pytest.raises(OutputError, match="overwrite"):
        pack(external(tmp_path / "in"), tmp_path / "in" / "biases.bin")
    assert not (tmp_path / "out.oamip").exists()
