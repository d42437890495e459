"""Layouts of arrays: batched, whole feeds, states, shared values, unequal shapes, names that look special, texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from graphs import build, load

from onnx_oamip.core.errors import DataError, ModelError
from onnx_oamip.core.records import Model, Port
from onnx_oamip.data import batching, dataset, out_of_core
from onnx_oamip.data.dataset import EVALUATION, Samples
from onnx_oamip.data.unequal import UnequalArrays
from onnx_oamip.graph import batch_symbols, cost
from onnx_oamip.graph.loading import load as load_file
from onnx_oamip.graph.loading import remade
from onnx_oamip.graph.runtime import Session

RNG = np.random.default_rng(0)
LENGTHS = (3, 5, 2, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def text(place: Path) -> Model:
    """Tokens of any length, one text at a time."""
    body = "e = Gather(table, ids) y = MatMul(e, w)"
    return load(
        build(f"(int64[1,S] ids) => (float[] y) <float[9,4] table, float[4,3] w> {{ {body} }}"),
        place,
    )


@pytest.fixture(scope="module")
def graph(place: Path) -> Model:
    """Features of nodes, and edges as pairs of them."""
    body = "s = Gather<axis = 1>(edges, i) r = Squeeze(s) g = Gather(nodes, r) y = MatMul(g, w)"
    return load(
        build(
            f"(float[V,4] nodes, int64[2,E] edges) => (float[] y) <float[4,3] w, int64[1] i = {{0}}> {{ {body} }}"
        ),
        place,
    )


@pytest.fixture(scope="module")
def recurrent(place: Path) -> Model:
    """A frame and the state of two layers."""
    body = "s = ReduceMean<axes = [0], keepdims = 0>(state) c = Concat<axis = 1>(x, s) y = MatMul(c, w)"
    return load(
        build(
            f"(float[N,5] x, float[2,N,3] state, int64 rate) => (float[] y) <float[8,4] w> {{ {body} }}"
        ),
        place,
    )


def _load(source: Any, model: Model, prefix: str = "") -> Samples:
    samples = dataset.load(source, model, prefix)
    assert samples is not None
    return samples


def _refused(source: Any, model: Model, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        dataset.load(source, model)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def _texts() -> list[np.ndarray[Any, Any]]:
    return [RNG.integers(0, 9, length) for length in LENGTHS]


# ------------------------------------------------------------------------------------------------- unequal shapes


def test_feeds_of_unequal_shapes_run_one_by_one(text: Model) -> None:
    texts = _texts()
    feeds = [{"ids": ids[None], "labels": i} for i, ids in enumerate(texts)]
    samples = _load(iter(feeds), text)
    assert (samples.count, samples.whole, samples.unequal) == (4, True, True)
    assert samples.classes is not None
    assert samples.classes.tolist() == [0, 1, 2, 3]
    seen = [feed["ids"] for _, feed in samples.batches(32)]
    assert len(seen) == 4
    for given, found in zip(texts, seen, strict=True):
        np.testing.assert_array_equal(found, given[None])
    # Costs count the sample of median length.
    assert samples.bindings(text) == {"S": 4}
    part = samples.take(np.asarray([3, 1]))
    np.testing.assert_array_equal(part.feed(np.asarray([1]))["ids"], texts[1][None])
    assert part.bindings(text) == {"S": 5}


def test_lists_object_arrays_folders_and_tables_give_the_same_samples(
    text: Model, tmp_path: Path
) -> None:
    texts = _texts()
    objects = np.empty(4, object)
    objects[:] = texts
    (tmp_path / "npz").mkdir()
    (tmp_path / "npy").mkdir()
    for i, ids in enumerate(texts):
        np.savez(tmp_path / "npz" / f"{i}.npz", ids=ids[None])
        np.save(tmp_path / "npy" / f"{i}.npy", ids)
    (tmp_path / "npy" / ".hidden.npy").write_bytes(b"")
    pq.write_table(pa.table({"ids": texts}), tmp_path / "t.parquet")
    sources = [{"ids": texts}, {"ids": objects}, tmp_path / "npz", tmp_path / "npy"]
    sources.append(tmp_path / "t.parquet")
    for source in sources:
        samples = _load(source, text)
        assert isinstance(samples.arrays["ids"], UnequalArrays)
        found = [feed["ids"].tolist() for _, feed in samples.batches(8)]
        assert found == [[ids.tolist()] for ids in texts], source


def test_unequal_samples_that_do_not_fit_are_refused(text: Model, graph: Model) -> None:
    _refused({"ids": [np.zeros(3), np.zeros(2)]}, text, "'ids' is float64", "int64 [1, S]")
    two_rows = [np.zeros((2, n), np.int64) for n in LENGTHS]
    _refused({"ids": two_rows}, text, "has shape (2, 3) in sample 0", "int64 [1, S]")
    mixed = [np.zeros(3, np.int64), np.zeros((1, 2), np.int64)]
    _refused({"ids": mixed}, text, "int64 with 1 axes in the first and int64 with 2 axes in feed 1")
    _refused({"ids": [np.zeros(3, np.int64), None]}, text, "Python objects")
    bad = [np.zeros((n, 4), np.float32) for n in LENGTHS]
    bad[2][1, 0] = np.nan
    edges = [np.zeros((2, n), np.int64) for n in LENGTHS]
    _refused({"nodes": bad, "edges": edges}, graph, "'nodes' has NaN", "first in sample 2")
    _refused({"nodes": bad[:3], "edges": edges}, graph, "unequal numbers of samples")


def test_saved_objects_are_refused_with_the_way_round(text: Model, tmp_path: Path) -> None:
    objects = np.empty(2, object)
    objects[:] = _texts()[:2]
    np.savez(tmp_path / "o.npz", ids=objects)
    _refused(tmp_path / "o.npz", text, "unequal lengths as a folder with one .npz per sample")


def test_graphs_keep_their_nodes_and_edges_together(graph: Model) -> None:
    feeds = [
        {
            "nodes": RNG.standard_normal((n, 4)).astype(np.float32),
            "edges": RNG.integers(0, n, (2, 3 * n)),
        }
        for n in LENGTHS
    ]
    samples = _load(feeds, graph)
    for (_, found), given in zip(samples.batches(8), feeds, strict=True):
        np.testing.assert_array_equal(found["nodes"], given["nodes"])
        np.testing.assert_array_equal(found["edges"], given["edges"])
    assert samples.bindings(graph) == {"V": 4, "E": 12}
    # Equal edges for all graphs.
    shared = _load({"nodes": [f["nodes"] for f in feeds], "edges": feeds[2]["edges"]}, graph)
    np.testing.assert_array_equal(shared.feed(np.asarray([1]))["edges"], feeds[2]["edges"])


@pytest.mark.parametrize("in_file", [False, True])
def test_batches_of_a_loader_are_samples(
    place: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    """The last batch is smaller, and labels come in batches too."""
    model = load(build("(float[N,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"), place)
    if in_file:
        monkeypatch.setattr(out_of_core, "IN_MEMORY_BYTES", 16)
    x, labels = RNG.standard_normal((11, 5)).astype(np.float32), np.arange(11) % 3
    cuts = (slice(0, 4), slice(4, 8), slice(8, 11))
    samples = _load([{"x": x[cut], "labels": labels[cut]} for cut in cuts], model)
    assert (samples.count, samples.whole) == (11, False)
    assert isinstance(samples.arrays["x"], out_of_core.FileArray) == in_file
    assert samples.classes is not None
    assert samples.classes.tolist() == labels.tolist()
    np.testing.assert_array_equal(samples.feed(np.asarray([9, 2]))["x"], x[[9, 2]])
    # Two sets of points of different lengths are no batches, and neither are lengths without an order.
    assert _load([{"x": x[:4]}, {"x": x[:2]}], model).count == 2
    assert _load([{"x": x[:4]}, {"x": x[:2]}, {"x": x[:3]}], model).count == 3


# ---------------------------------------------------------------------------------------------- states, shared values


@pytest.mark.parametrize("layout", ["natural", "by sample", "shared", "whole"])
def test_recurrent_states_are_read_in_any_layout(recurrent: Model, layout: str) -> None:
    x = RNG.standard_normal((6, 5)).astype(np.float32)
    by_sample = RNG.standard_normal((6, 2, 3)).astype(np.float32)
    given = {
        "natural": by_sample.transpose(1, 0, 2),
        "by sample": by_sample,
        "shared": by_sample[:1].transpose(1, 0, 2),
        "whole": by_sample[:, :, None],
    }[layout]
    samples = _load({"x": x, "state": given, "rate": np.int64(16000)}, recurrent)
    assert samples.count == 6
    assert samples.bindings(recurrent) == {"N": 1}
    index = np.asarray([4]) if samples.whole else np.asarray([4, 1])
    feed = samples.feed(index)
    expected = by_sample[[0] * len(index)] if layout == "shared" else by_sample[index]
    np.testing.assert_array_equal(feed["state"], expected.transpose(1, 0, 2))
    np.testing.assert_array_equal(feed["x"], x[index])
    assert feed["rate"] == 16000
    part = samples.take(np.asarray([5, 2]))
    np.testing.assert_array_equal(part.feed(np.asarray([0]))["x"], x[[5]])


@pytest.mark.parametrize("natural", [True, False])
def test_batch_is_the_symbol_that_all_inputs_share(place: Path, natural: bool) -> None:
    """A sequence with its time first, and the state of one layer."""
    model = load(
        build(
            "(float[T,N,5] x, float[1,N,5] h) => (float[] y) <float[5,4] w> { s = Add(x, h) y = MatMul(s, w) }"
        ),
        place,
    )
    x, h = (RNG.standard_normal((6, n, 5)).astype(np.float32) for n in (3, 1))
    arrays = {"x": x, "h": h}
    if natural:
        arrays = {name: array.transpose(1, 0, 2) for name, array in arrays.items()}
    samples = _load(arrays, model)
    assert samples.count == 6
    assert samples.bindings(model) == {"T": 3, "N": 1}
    feed = samples.feed(np.asarray([4, 2]))
    np.testing.assert_array_equal(feed["x"], x[[4, 2]].transpose(1, 0, 2))
    np.testing.assert_array_equal(feed["h"], h[[4, 2]].transpose(1, 0, 2))


TIME_MAJOR = """(float[{dims}] x) => (float[{result}] y) <float[6,5] w, int64[1] i = {{0}}> {{
    m = ReduceMean<axes = [0], keepdims = 0>(x)
    y = MatMul(m, w)
}}"""


@pytest.mark.parametrize("steps", ["T", "9"])
@pytest.mark.parametrize("is_moved", [True, False])
def test_batch_behind_another_axis_is_shown_by_the_outputs(
    place: Path, steps: str, is_moved: bool
) -> None:
    """The axis of the steps is in no output. Labels decide where both axes fit."""
    model = load(build(TIME_MAJOR.format(dims=f"{steps}, N, 6", result="N, 5")), place)
    values = RNG.normal(size=(30, 9, 6)).astype(np.float32)
    given = np.moveaxis(values, 0, 1) if is_moved else values
    samples = _load({"x": given, "labels": np.zeros(30, np.int64)}, model)
    assert samples.count == 30
    assert samples.fixed_batch is None
    assert not samples.notes
    assert np.array_equal(samples.feed(np.arange(3, 7))["x"], np.moveaxis(values[3:7], 0, 1))


def test_stated_length_of_the_batch_may_differ_from_the_data(place: Path) -> None:
    """That of the steps may not, although they stand on axis 0."""
    text = TIME_MAJOR.format(dims="T, N, 6", result="N, 5")
    path = place / "stated.onnx"
    path.write_bytes(build(text).SerializeToString())
    values = {"x": RNG.normal(size=(30, 9, 6)).astype(np.float32)}
    model = load_file(path, stated={"N": (8,)})
    assert dataset.at_data(model, _load(values, model)).shapes["x"] == (9, 1, 6)
    model = load_file(path, stated={"T": (7,)})
    with pytest.raises(DataError, match=r"states the length 7 for 'T', but .* has 9"):
        dataset.at_data(model, _load(values, model))


def test_layout_that_may_be_another_is_noted(place: Path) -> None:
    """Without labels, nothing but the greater number speaks for the axis of the batch."""
    model = load(build(TIME_MAJOR.format(dims="T, N, 6", result="N, 5")), place)
    values = RNG.normal(size=(9, 30, 6)).astype(np.float32)
    (note,) = _load({"x": values}, model).notes
    assert "(9, 30, 6) is taken for 9 samples along axis 0; if it holds 30 along axis 1" in note
    assert not _load({"x": np.moveaxis(values, 1, 0)}, model).notes


@pytest.mark.parametrize(
    ("inputs", "outputs", "symbol"),
    [
        (["T, N, 6"], ["N, 5"], "N"),
        (["T, N, 6"], ["N, 5", "2, N, 7"], "N"),
        (["7, N, 6"], ["N, 5"], "N"),
        (["seq, batch, 6"], ["seq, batch, 5"], "batch"),
        (["S, N, 6", "N, S"], ["N, 5"], "N"),
        (["N, S", "N, S"], ["N, S, 5"], "N"),
        (["N, T, 6"], ["T, N, 5"], None),
        (["N, 3, H, W"], ["N, 5"], None),
        (["3, H, W"], ["H, W"], None),
        (["H, W, 3"], ["5"], None),
        (["N, L"], ["L"], None),
        (["1, L"], ["L"], None),
        (["4, T, 6"], ["4, T, 5"], None),
        (["T, 40"], ["T, 5"], None),
    ],
)
def test_symbol_of_the_batch(inputs: list[str], outputs: list[str], symbol: str | None) -> None:
    """None where axis 0 of every input is taken as usual."""
    given, answers = (
        tuple(
            Port(
                f"p{i}",
                np.dtype(np.float32),
                tuple(int(d) if d.isdigit() else d for d in dims.split(", ")),
            )
            for i, dims in enumerate(side)
        )
        for side in (inputs, outputs)
    )
    assert batch_symbols.batch_symbol(given, answers) == symbol


def test_refused_state_names_the_layouts_that_work(recurrent: Model) -> None:
    x = np.zeros((6, 5), np.float32)
    _refused(
        {"x": x, "state": np.zeros((6, 3), np.float32), "rate": np.int64(1)},
        recurrent,
        "'state' has shape (6, 3) but the model expects float32 [2, N, 3]",
        "give (6, 2, 3) with samples along axis 0, (6, 2, N, 3) with one whole feed per index",
        "or (2, N, 3) for all samples",
    )


@pytest.mark.parametrize("order", [("x", "ref"), ("ref", "x")])
def test_batch_that_any_input_fixes_holds_for_all(place: Path, order: tuple[str, str]) -> None:
    ports = {"x": "float[N,5] x", "ref": "float[1,5] ref"}
    inputs = ", ".join(ports[name] for name in order)
    model = load(
        build(f"({inputs}) => (float[] y) <float[5,3] w> {{ s = Sub(x, ref) y = MatMul(s, w) }}"),
        place,
    )
    x, ref = (RNG.standard_normal((4, 5)).astype(np.float32) for _ in range(2))
    samples = _load({"x": x, "ref": ref}, model)
    assert (samples.fixed_batch, samples.whole) == (1, False)
    feeds = [feed for _, feed in samples.batches(32)]
    assert [feed["ref"].shape for feed in feeds] == [(1, 5)] * 4
    np.testing.assert_array_equal(feeds[2]["ref"], ref[2:3])
    # One template for all samples leaves the batch of the others free.
    shared = _load({"x": x, "ref": ref[:1]}, model)
    assert shared.fixed_batch is None
    assert shared.feed(np.arange(3))["ref"].shape == (1, 5)


def test_unequal_fixed_batches_are_refused(place: Path) -> None:
    model = load(
        build("(float[2,5] x, float[4,5] z) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"),
        place,
    )
    x = np.zeros((8, 5), np.float32)
    _refused({"x": x, "z": x}, model, "'z' has shape (8, 5)", "one whole feed per index")
    assert _load({"x": x.reshape(4, 2, 5), "z": np.zeros((4, 4, 5), np.float32)}, model).whole


# --------------------------------------------------------------------------------------------------- a batch of one


def test_model_that_takes_one_sample_runs_on_one_at_a_time(place: Path) -> None:
    model = load(
        build(
            "(float[N,6] x) => (float[] y) <int64[2] shape = {1, 6}, float[6,3] w> {"
            " r = Reshape(x, shape) y = MatMul(r, w) }"
        ),
        place,
    )
    session = Session(model.proto, "cpu")
    x = RNG.standard_normal((5, 6)).astype(np.float32)
    samples = batching.tried(session, _load({"x": x}, model), 4)
    assert samples.fixed_batch == 1
    assert batching.ALONE in samples.notes
    assert [len(feed["x"]) for _, feed in samples.batches(4)] == [1] * 5
    other = batching.alike(session, samples, _load({"x": x}, model))
    assert other is not None
    assert other.fixed_batch == 1


def test_error_of_a_run_names_the_feed(text: Model) -> None:
    session = Session(text.proto, "cpu")
    samples = _load({"ids": np.full((4, 3), 99)}, text)
    with pytest.raises(ModelError, match=r"sample 0 was fed as 'ids' \(1, 3\)"):
        batching.tried(session, samples, 4)


def test_largest_of_unequal_samples_is_tried_first(place: Path) -> None:
    """A text longer than the table of positions is named before the work starts."""
    body = "e = Gather(table, ids) s = Add(e, positions) y = MatMul(s, w)"
    model = load(
        build(
            "(int64[1,S] ids) => (float[1,S,3] y)"
            f" <float[9,4] table, float[1,5,4] positions, float[4,3] w> {{ {body} }}"
        ),
        place,
    )
    session = Session(model.proto, "cpu")
    samples = _load({"ids": [np.zeros(n, np.int64) for n in (5, 1, 7, 5)]}, model)
    with pytest.raises(ModelError, match=r"sample 2 was fed as 'ids' \(1, 7\)"):
        batching.tried(session, samples, 4)


@pytest.mark.parametrize(
    ("body", "note"),
    [
        # The batch moves into the positions, so that channels of different samples are read as one.
        ("r = Reshape(x, s) t = Transpose<perm = [0, 2, 1]>(r) y = MatMul(t, w)", batching.MIXED),
        (
            "t = Transpose<perm = [2, 0, 1]>(x) y = MatMul(t, w)",
            batching.ELSEWHERE.format("y", 1),
        ),
        # As a step of a sequence depends on those in front of it: the first sample is right.
        (
            "c = CumSum(x, z) t = Transpose<perm = [0, 2, 1]>(c) y = MatMul(t, w)",
            batching.MIXED,
        ),
        (
            "m = ReduceMean<axes = [0]>(x) t = Transpose<perm = [0, 2, 1]>(m) y = MatMul(t, w)",
            batching.UNCOUNTED.format("axis 0 of 'x'"),
        ),
        ("t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(t, w)", None),
        # Masked scores: infinite numbers do not hide that the others differ.
        (
            "t = Transpose<perm = [0, 2, 1]>(x) m = MatMul(t, w) h = Log(open) y = Add(m, h)",
            None,
        ),
        (
            "c = CumSum(x, z) t = Transpose<perm = [0, 2, 1]>(c) m = MatMul(t, w) h = Log(open) y = Add(m, h)",
            batching.MIXED,
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_samples_that_a_batch_changes_run_alone(place: Path, body: str, note: str | None) -> None:
    model = load(
        build(
            "(float[N,4,6] x) => (float[A,B,3] y) <int64[3] s = {1, 4, -1}, int64[1] z = {0}, float[4,3] w, "
            f"float[3] open = {{1, 0, 1}}> {{ {body} }}"
        ),
        place,
    )
    session = Session(model.proto, "cpu")
    x = RNG.standard_normal((5, 4, 6)).astype(np.float32)
    samples = batching.tried(session, _load({"x": x}, model), 4)
    assert samples.notes == (() if note is None else (note,))
    assert samples.fixed_batch == (None if note is None else 1)


def test_one_value_per_sample_is_a_column(place: Path) -> None:
    """Models of tables have an input [N, 1] for every column."""
    model = load(
        build(
            "(float[N,1] age, float[N,4] x) => (float[] y) <float[5,3] w> {"
            " c = Concat<axis = 1>(age, x) y = MatMul(c, w) }"
        ),
        place,
    )
    age, x = RNG.standard_normal(6).astype(np.float32), np.ones((6, 4), np.float32)
    feed = _load({"age": age, "x": x}, model).feed(np.asarray([2, 5]))
    np.testing.assert_array_equal(feed["age"], age[[2, 5], None])


# ---------------------------------------------------------------------------------------------- names of the inputs


@pytest.mark.parametrize(
    "names",
    [("img", "img.scale"), ("x", "eval.x"), ("x", "labels"), ("label", "x"), ("file", "a b")],
)
def test_name_of_an_input_is_that_input(place: Path, names: tuple[str, str]) -> None:
    proto = build(
        "(float[N,5] p, float[N,5] q) => (float[] y) <float[5,3] w> { s = Add(p, q) y = MatMul(s, w) }"
    )
    for port, name in zip(proto.graph.input, names, strict=True):
        port.name = name
    proto.graph.node[0].input[:] = names
    model = load(proto, place)
    arrays = {name: RNG.standard_normal((4, 5)).astype(np.float32) for name in names}
    samples = _load(arrays, model)
    assert samples.labels is None
    assert not samples.scales
    feed = samples.feed(np.arange(4))
    for name in names:
        np.testing.assert_array_equal(feed[name], arrays[name])
    assert dataset.load(arrays, model, EVALUATION) is None
    held = {f"eval.{name}": array[:2] for name, array in arrays.items()}
    if "eval.x" not in names:
        assert _load({**arrays, **held}, model, EVALUATION).count == 2


# --------------------------------------------------------------------------------------------------------- texts


def test_texts_are_fed_as_str(place: Path) -> None:
    model = load(
        build(
            "(string[N,2] words) => (float[N,2,4] y) <float[3,4] w> {"
            ' e = ai.onnx.ml.LabelEncoder<keys_strings = ["a", "b"], values_int64s = [0, 1]>(words)'
            " g = Gather(w, e) y = Relu(g) }",
            domains={"ai.onnx.ml": 2},
        ),
        place,
    )
    words = np.asarray([["a", "b"], ["b", "b"], ["a", "a"]])
    for given in (words, words.astype(object), words.tolist(), words.astype("S3")):
        samples = _load({"words": given}, model)
        feed = samples.feed(np.arange(3))["words"]
        assert feed.dtype == object
        assert feed.tolist() == words.tolist()
    outputs = Session(model.proto, "cpu").run(samples.feed(np.arange(3)))
    assert outputs[0].shape == (3, 2, 4)
    _refused({"words": np.zeros((3, 2), np.float32)}, model, "'words' is float32", "text [N, 2]")


@pytest.mark.parametrize(
    ("dims", "result", "shape", "batch"),
    [
        ("N, T, 6", "N, T, 5", (20, 7, 6), 1),
        ("T, N, 6", "T, N, 5", (20, 7, 1, 6), 1),
        ("T, batch, 6", "T, batch, 5", (20, 7, 6), 1),
        ("T, 6", "T, 5", (20, 7, 6), 1),
        ("4, T, 6", "4, T, 5", (20, 7, 6), 4),
        ("4, T, 6", "4, T, 5", (20, 4, 7, 6), 1),
        ("N, 6", "N, 5", (20, 7, 6), 7),
        ("H, W, 6", "H, W, 5", (20, 7, 8, 6), 1),
        ("4, 3, W, 6", "4, 3, W, 5", (20, 4, 3, 8, 6), 4),
    ],
)
def test_costs_are_those_of_a_sample(
    place: Path, dims: str, result: str, shape: tuple[int, ...], batch: int
) -> None:
    """Whatever axis 0 of the input counts; a whole feed is one sample unless an axis is shown to be a batch."""
    text = f"(float[{dims}] x) => (float[{result}] y) <float[6,5] w> {{ y = MatMul(x, w) }}"
    model = load(build(text), place)
    samples = _load({"x": np.zeros(shape, np.float32)}, model)
    at_data = dataset.at_data(model, samples)
    assert at_data.batch == batch
    rows = int(np.prod(samples.feed(np.arange(batch))["x"].shape[:-1]))
    assert cost.count(at_data).macs == 30 * rows // batch
    again = remade(at_data, at_data.proto)
    assert cost.count(again).macs == cost.count(at_data).macs


@pytest.mark.parametrize("batched", [True, False])
def test_samples_of_a_feed_are_counted_on_the_batch_axis(place: Path, batched: bool) -> None:
    """The state comes first, and its axis 0 counts layers."""
    model = load(
        build(
            "(float[2,N,3] state, float[N,3] x) => (float[] y) <float[3,4] w> {"
            " s = ReduceMean<axes = [0], keepdims = 0>(state) a = Add(s, x) y = MatMul(a, w) }"
        ),
        place,
    )
    if batched:
        arrays = {"state": np.zeros((2, 6, 3), np.float32), "x": np.zeros((6, 3), np.float32)}
        samples = _load(arrays, model)
        assert samples.feed_size(samples.feed(np.arange(5))) == 5
    else:
        samples = dataset.placeholder(model, seed=0)
        assert samples.feed_size(samples.feed(np.asarray([0]))) == model.bindings["N"]
