"""Second moments against numpy on all rows, and the least-squares problems that consumers pose to a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from graphs import activations, build, feed, load
from onnx import ModelProto, helper, numpy_helper, save

from onnx_oamip import Settings
from onnx_oamip.api.prepare import open_context
from onnx_oamip.artifacts import cache_entries
from onnx_oamip.core.records import (
    Array,
    Consumer,
    Coupling,
    Floats,
    Gram,
    Ints,
    Model,
)
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.runtime import Session
from onnx_oamip.objective.position_weights import PositionWeights
from onnx_oamip.statistics import covariances, layer_problems, requests
from onnx_oamip.statistics.collector import collect
from onnx_oamip.statistics.layer_problems import (
    Problem,
    compensate,
    problems,
    shrinkage,
)
from onnx_oamip.statistics.relevance import weighted


@dataclass(frozen=True)
class Net:
    """A graph in which ``h`` meets the constant ``w`` in the last node, which makes ``y`` and adds nothing."""

    text: str


def _net(dims: str, before: str, constants: str, last: str) -> Net:
    return Net(f"(float[{dims}] x) => (float[] y) <{constants}> {{ {before}  y = {last} }}")


DENSE = "a = MatMul(x, w1)  h = Relu(a)"
LEFT = "a = MatMul(w1, x)  h = Relu(a)"
IMAGE = "a = Conv(x, w1)  h = Relu(a)"
NETS = {
    "gemm": _net("N,5", DENSE, "float[5,8] w1, float[8,4] w", "Gemm(h, w)"),
    "gemm scaled": _net(
        "N,5", DENSE, "float[5,8] w1, float[4,8] w", "Gemm<transB = 1, alpha = 0.3>(h, w)"
    ),
    "gemm left": _net("5,N", LEFT, "float[8,5] w1, float[4,8] w", "Gemm<alpha = 2.0>(w, h)"),
    "matmul 3d": _net("N,6,5", DENSE, "float[5,8] w1, float[8,4] w", "MatMul(h, w)"),
    "matmul left": _net("N,5,6", LEFT, "float[8,5] w1, float[4,8] w", "MatMul(w, h)"),
    "flatten": _net(
        "N,3,5,5", IMAGE + "  f = Flatten(h)", "float[8,3,3,3] w1, float[72,4] w", "Gemm(f, w)"
    ),
    "conv 1d": _net(
        "N,3,12",
        IMAGE,
        "float[8,3,3] w1, float[4,8,3] w",
        "Conv<strides = [2], pads = [0, 2], dilations = [2]>(h, w)",
    ),
    "conv 2d": _net(
        "N,3,8,7",
        IMAGE,
        "float[8,3,3,3] w1, float[4,8,3,2] w",
        "Conv<strides = [2, 1], pads = [1, 0, 2, 1]>(h, w)",
    ),
    "conv of shuffled channels": _net(
        "N,3,6,6",
        "a = Conv(x, w1)  r = Relu(a)  h = Gather<axis = 1>(r, order)",
        "float[8,3,3,3] w1, float[4,8,3,3] w, int64[8] order = {3, 0, 6, 1, 7, 2, 5, 4}",
        "Conv(h, w)",
    ),
    "conv 3d": _net("N,2,5,4,5", IMAGE, "float[6,2,2,2,2] w1, float[4,6,2,1,2] w", "Conv(h, w)"),
    "conv grouped": _net(
        "N,3,6,6",
        IMAGE,
        "float[8,3,1,1] w1, float[6,4,3,3] w",
        "Conv<group = 2, pads = [1, 1, 1, 1]>(h, w)",
    ),
    "transposed": _net(
        "N,3,5,4",
        IMAGE,
        "float[8,3,1,1] w1, float[8,4,3,2] w",
        "ConvTranspose<strides = [2, 2], pads = [1, 0, 0, 1]>(h, w)",
    ),
    "transposed grouped": _net(
        "N,3,5,4",
        IMAGE,
        "float[8,3,1,1] w1, float[8,3,2,2] w",
        "ConvTranspose<group = 2, strides = [2, 1]>(h, w)",
    ),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Model, Coupling]:
    model = load(build(NETS[request.param].text), tmp_path)
    return model, couple(model)


def _feeds(model: Model, count: int = 3, batch: int = 3) -> list[dict[str, Array]]:
    if model.inputs[0].dims[0] == 5:  # channels first: the symbol is the second dimension
        rng = np.random.default_rng(1)
        return [{"x": rng.standard_normal((5, batch + i)).astype(np.float32)} for i in range(count)]
    return [feed(model, seed, batch + seed) for seed in range(count)]


def _batch_axis(model: Model) -> int:
    return 1 if model.inputs[0].dims[0] == 5 else 0


def _read(model: Model, feeds: list[dict[str, Array]]) -> tuple[Floats, Floats]:
    """All rows that the last node reads, (groups, rows, inputs * taps), and gives, (groups, rows, outputs).

    ONNX Runtime cuts the patches: with a kernel of ones and zeros for every input and tap.
    """
    node = model.nodes[-1]
    slot = 0 if node.inputs[1] == "w" else 1
    groups = int(node.attrs.get("group", 1))
    read, given = [], []
    for values in feeds:
        held = activations(model, values, [node.inputs[slot], "y"])
        x, y = held[node.inputs[slot]], held["y"]
        if node.op in ("Conv", "ConvTranspose"):
            x, y = np.moveaxis(_patches(model, x, groups), 1, -1), np.moveaxis(y, 1, -1)
        elif slot == 1:
            x, y = np.swapaxes(x, -1, -2), np.swapaxes(y, -1, -2)
        read.append(x.reshape(-1, groups, x.shape[-1] // groups))
        given.append(y.reshape(-1, groups, y.shape[-1] // groups))
    rows, outputs = (
        np.concatenate(read).astype(np.float64),
        np.concatenate(given).astype(np.float64),
    )
    return rows.transpose(1, 0, 2), outputs.transpose(1, 0, 2)


def _patches(model: Model, x: Array, groups: int) -> Array:
    """(images, groups * inputs * taps, ...)"""
    node, kernel = model.nodes[-1], model.constants["w"].shape[2:]
    taps, ins = int(np.prod(kernel)), x.shape[1] // groups
    one_hot = np.eye(ins * taps, dtype=np.float32).reshape(ins * taps, ins, *kernel)
    weight = np.concatenate([one_hot] * groups)
    if node.op == "ConvTranspose":
        weight = np.concatenate([np.moveaxis(one_hot, 0, 1)] * groups)
    graph = helper.make_graph(
        [helper.make_node(node.op, ["x", "w"], ["y"], **node.attrs)],
        "patches",
        [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (found,) = Session(proto, "cpu").run({"x": x})
    return found


def _covariance(rows: Floats) -> Floats:
    return np.stack(
        [np.cov(block, rowvar=False, bias=True).reshape(block.shape[1], -1) for block in rows]
    )


# -------------------------------------------------------------------------------------------------------- collect


def test_covariance_covers_all_rows(net: tuple[Model, Coupling]) -> None:
    model, coupling = net
    feeds = _feeds(model)
    found = covariances.collect(model, coupling, feeds, "cpu")
    last = found[model.nodes[-1].name]
    rows, _ = _read(model, feeds)
    assert last.rows == rows.shape[1]
    truth = _covariance(rows)
    np.testing.assert_allclose(last.matrix, truth, rtol=0, atol=1e-10 * np.abs(truth).max())
    np.testing.assert_allclose(
        last.mean, rows.mean(axis=1), rtol=0, atol=1e-10 * np.abs(rows).max()
    )
    np.testing.assert_array_equal(last.columns, np.arange(rows.shape[2])[:, None])
    # Only consumers of channels that may go are looked at: nothing in front of them.
    assert set(found) == {c.node for c in coupling.consumers}


def test_weighted_covariance_is_that_of_repeated_rows(net: tuple[Model, Coupling]) -> None:
    """Samples of three times the weight count three times, however the rows of the consumer are laid out."""
    model, coupling = net
    feeds = _feeds(model)
    name = model.nodes[-1].name
    samples = [max(values.shape[_batch_axis(model)] for values in feed.values()) for feed in feeds]
    heavy = [np.where(np.arange(count) == 1, 3.0, 1.0) for count in samples]
    weights = [PositionWeights(0.0, ((1.0, values),)) for values in heavy]
    found = covariances.collect(model, coupling, feeds, "cpu", weights=weights)[name]
    repeated = [
        {
            key: np.take(value, np.repeat(np.arange(len(w)), w.astype(int)), _batch_axis(model))
            for key, value in feed.items()
        }
        for feed, w in zip(feeds, heavy, strict=True)
    ]
    rows, _ = _read(model, repeated)
    truth = _covariance(rows)
    np.testing.assert_allclose(found.matrix, truth, rtol=0, atol=1e-10 * np.abs(truth).max())
    assert found.rows < rows.shape[1]


@pytest.mark.parametrize("name", [n for n in NETS if "conv" in n or "transposed" in n])
def test_large_kernel_is_averaged_over_its_taps(name: str, tmp_path: Path) -> None:
    """Above the cap every tap of a kernel is one more observation of the channels."""
    model = load(build(NETS[name].text), tmp_path)
    coupling = couple(model)
    feeds = _feeds(model, 1)
    taps = int(np.prod(model.constants["w"].shape[2:]))
    rows, _ = _read(model, feeds)
    unknowns = rows.shape[2]
    whole = covariances.collect(model, coupling, feeds, "cpu", cap=unknowns)[model.nodes[-1].name]
    assert whole.matrix.shape[1] == unknowns
    found = covariances.collect(model, coupling, feeds, "cpu", cap=unknowns - 1)[
        model.nodes[-1].name
    ]
    channels = unknowns // taps
    assert found.columns.shape == (channels, taps)
    by_channel = (
        rows.reshape(len(rows), -1, channels, taps).swapaxes(2, 3).reshape(len(rows), -1, channels)
    )
    truth = _covariance(by_channel)
    np.testing.assert_allclose(found.matrix, truth, rtol=0, atol=1e-10 * np.abs(truth).max())
    np.testing.assert_allclose(
        found.mean, by_channel.mean(axis=1), rtol=0, atol=1e-10 * np.abs(rows).max()
    )


def test_wide_product_is_averaged_over_the_places_of_a_unit(tmp_path: Path) -> None:
    """Behind a Flatten a channel holds many columns; above the cap they are observations of one."""
    model = load(build(NETS["flatten"].text), tmp_path)
    coupling = couple(model)
    feeds = _feeds(model)
    found = covariances.collect(model, coupling, feeds, "cpu", cap=71)[model.nodes[-1].name]
    np.testing.assert_array_equal(found.columns, np.arange(72).reshape(8, 9))
    rows, _ = _read(model, feeds)
    truth = _covariance(rows.reshape(1, -1, 8, 9).transpose(0, 1, 3, 2).reshape(1, -1, 8))
    np.testing.assert_allclose(found.matrix, truth, rtol=0, atol=1e-10 * np.abs(truth).max())


def test_units_of_unequal_size_are_not_averaged(tmp_path: Path) -> None:
    """Channels of 9 places beside features of one: there is no common place."""
    text = """(float[N,3,5,5] x, float[N,5] z) => (float[] y)
    <float[8,3,3,3] w1, float[5,6] w2, float[78,4] w> {
        a = Conv(x, w1)
        f = Flatten(a)
        b = MatMul(z, w2)
        h = Concat<axis = 1>(f, b)
        y = MatMul(h, w)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    feeds = _feeds(model)
    found = covariances.collect(model, coupling, feeds, "cpu", cap=10)[model.nodes[-1].name]
    rows, _ = _read(model, feeds)
    np.testing.assert_allclose(found.matrix, _covariance(rows), atol=1e-9)


@pytest.mark.parametrize("by", ["columns", "memory"])
def test_factor_stands_for_the_matrix_of_many_columns(
    net: tuple[Model, Coupling], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows, the same covariance, the same problems and repairs; a cache entry knows its form."""
    model, coupling = net
    feeds = _feeds(model)
    whole = covariances.collect(model, coupling, feeds, "cpu")
    limit = None
    if by == "columns":
        monkeypatch.setattr(covariances, "MOST_COLUMNS", 1)
    else:
        limit = 1
        monkeypatch.setattr(covariances, "LEAST_FACTOR_ROWS", 100_000)
    found = covariances.collect(model, coupling, feeds, "cpu", limit=limit)
    assert covariances.fits(found, model, coupling, limit=limit)
    assert not covariances.fits(whole, model, coupling, limit=limit)
    assert list(found) == list(whole)
    for name, gram in found.items():
        assert gram.matrix is None
        assert gram.rows == whole[name].rows
        np.testing.assert_allclose(gram.mean, whole[name].mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            gram.values.transpose(0, 2, 1) @ gram.values, whole[name].matrix, atol=1e-12
        )
    removed = np.arange(2)
    for one, other in zip(
        problems(model, coupling, found, 0), problems(model, coupling, whole, 0), strict=True
    ):
        assert one.ridge == pytest.approx(other.ridge, rel=1e-9)
        assert one.scale == pytest.approx(other.scale, rel=1e-9)
        assert one.variance(2 * one.weight) == pytest.approx(other.variance(2 * one.weight))
        for left, right in zip(compensate(one, removed), compensate(other, removed), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-9)


def test_factor_keeps_within_memory_and_time(
    net: tuple[Model, Coupling], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, coupling = net
    feeds = _feeds(model)
    monkeypatch.setattr(covariances, "LEAST_FACTOR_ROWS", 1)
    monkeypatch.setattr(covariances, "MOST_COLUMNS", 1)
    whole = covariances.collect(model, coupling, feeds, "cpu")
    for name, gram in whole.items():
        folded = gram.columns.shape[1]
        few = covariances.collect(model, coupling, feeds, "cpu", limit=gram.values.size // 2)[name]
        assert few.rows <= max(gram.rows // 2, folded * len(feeds))
        flops = covariances.FLOPS_PER_VALUE * gram.values.size * gram.rows / 4
        monkeypatch.setattr(covariances, "MOST_FLOPS", flops)
        few = covariances.collect(model, coupling, feeds, "cpu")[name]
        assert few.rows <= max(gram.rows // 2, folded * len(feeds))


def test_large_constants_have_the_variance_zero(tmp_path: Path) -> None:
    """Their squares would lose the variance of everything else beside them."""
    text = """(float[N,3] x) => (float[] y) <float[3,4] u, float[4] b = {1e20, 1e8, 0, 0}, float[4,2] w> {
        h = MatMul(x, u)
        s = Add(h, b)
        r = Relu(s)
        y = MatMul(r, w)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    feeds = _feeds(model)
    (gram,) = covariances.collect(model, coupling, feeds, "cpu").values()
    (rows,), _ = _read(model, feeds)
    exact = rows - rows[:1]
    assert gram.matrix[0, 0].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(gram.matrix[0], np.cov(exact.T, bias=True), rtol=1e-9)
    assert gram.mean[0, 0] == np.float32(1e20)


def test_many_rows_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded number of positions, spread over the images; the same for the same seed."""
    model = load(build(NETS["conv 2d"].text), tmp_path)
    coupling = couple(model)
    feeds = _feeds(model, 4, 30)
    name = model.nodes[-1].name
    rows, _ = _read(model, feeds)
    truth = _covariance(rows)
    monkeypatch.setattr(covariances, "LEAST_ROWS", 400)
    monkeypatch.setattr(covariances, "MOST_ROWS", 1000)
    monkeypatch.setattr(covariances, "MORE_ROWS", 400)
    found = {
        seed: covariances.collect(model, coupling, feeds, "cpu", seed=seed)[name] for seed in (0, 1)
    }
    again = covariances.collect(model, coupling, feeds, "cpu", seed=0)[name]
    np.testing.assert_array_equal(found[0].matrix, again.matrix)
    assert not np.array_equal(found[0].matrix, found[1].matrix)
    for one in found.values():
        assert one.rows == covariances.ROWS_PER_UNKNOWN * 48 or one.rows == 400
        assert one.rows < rows.shape[1]
        # The error of a covariance of n rows is about sqrt(2 / n) of a variance.
        assert (
            np.abs(one.matrix - truth).max()
            < 5 * np.sqrt(2 / one.rows) * truth.diagonal(axis1=1, axis2=2).max()
        )


# ------------------------------------------------------------------------------------------------------- problems


def _problems(
    model: Model, coupling: Coupling, feeds: list[dict[str, Array]], cap: int = covariances.CAP
) -> list[Problem]:
    grams = covariances.collect(model, coupling, feeds, "cpu", cap=cap)
    (g,) = (i for i, group in enumerate(coupling.groups) if group.name == "w1")
    return problems(model, coupling, grams, g)


def test_problem_matches_weights_and_outputs_of_the_consumer(net: tuple[Model, Coupling]) -> None:
    """Its weights times all rows are the outputs; its scale is their variance; its columns are those of each unit."""
    model, coupling = net
    feeds = _feeds(model)
    found = _problems(model, coupling, feeds)
    rows, outputs = _read(model, feeds)
    assert [p.block for p in found] == list(range(len(rows)))
    width = len(coupling.groups[0].units)
    for problem, x, y in zip(found, rows, outputs, strict=True):
        np.testing.assert_allclose(x @ problem.weight.T, y, rtol=0, atol=1e-5 * np.abs(y).max())
        assert problem.scale == pytest.approx(y.var(axis=0).sum(), rel=1e-4)
        np.testing.assert_array_equal(np.sort(problem.columns.reshape(-1)), np.arange(x.shape[1]))
        assert problem.columns.shape == (width, x.shape[1] // width)
        assert problem.consumer.node == model.nodes[-1].name
        np.testing.assert_array_equal(np.linalg.eigvalsh(problem.gram) > 0, True)


def test_columns_belong_to_the_unit_that_feeds_them(net: tuple[Model, Coupling]) -> None:
    """Silence one unit in front: exactly its columns go to zero."""
    model, coupling = net
    feeds = _feeds(model)
    found = _problems(model, coupling, feeds)
    rows, _ = _read(model, feeds)
    place = site(model.nodes[0], model.constants)
    assert place is not None
    labels = coupling.axes["a", place.output_axis % len(model.shapes["a"])]
    out_axis = next(a for t, a in coupling.groups[0].multiplicity if t == "w1")
    for i, unit in enumerate(coupling.groups[0].units):
        proto = ModelProto()
        proto.CopyFrom(model.proto)
        weight = next(t for t in proto.graph.initializer if t.name == "w1")
        value = model.constants["w1"].copy()
        np.moveaxis(value, out_axis, 0)[labels == unit] = 0
        weight.CopyFrom(numpy_helper.from_array(value, "w1"))
        silent = load(proto, Path(model.path).parent)
        for problem, x, quiet in zip(found, rows, _read(silent, feeds)[0], strict=True):
            changed = np.flatnonzero((x != quiet).any(axis=0))
            assert set(changed) <= set(problem.columns[i])
            assert not quiet[:, problem.columns[i]].any()


@pytest.mark.parametrize("name", ["conv 2d", "conv grouped", "transposed grouped", "flatten"])
@pytest.mark.parametrize("folded", [False, True])
def test_unfold_inverts_the_folding(name: str, folded: bool, tmp_path: Path) -> None:
    model = load(build(NETS[name].text), tmp_path)
    coupling = couple(model)
    feeds = _feeds(model)
    rows, outputs = _read(model, feeds)
    assert len(rows) > 0
    for problem, x, y in zip(
        _problems(model, coupling, feeds, 8 if folded else covariances.CAP),
        rows,
        outputs,
        strict=True,
    ):
        assert (problem.weight.shape[0] > y.shape[1]) == folded
        shift = np.random.default_rng(0).standard_normal(len(problem.weight))
        weight, bias = problem.unfold(problem.weight, shift)
        np.testing.assert_allclose(x @ weight.T, y, rtol=0, atol=1e-5 * np.abs(y).max())
        assert bias.sum() == pytest.approx(shift.sum())
        assert bias.shape == (y.shape[1],)
        # Places (taps) of one output are next to each other.
        np.testing.assert_allclose(bias, shift.reshape(y.shape[1], -1).sum(axis=1))


def test_groups_with_a_common_consumer_have_separate_problems(tmp_path: Path) -> None:
    """Concatenated groups share a consumer: each problem knows only its own group's columns, wherever they stand."""
    text = """(float[N,3,6,6] x) => (float[] y, float[] z)
    <float[8,3,1,1] w1, float[8,3,1,1] w2, float[4,16,1,1] w4, float[5,8,1,1] w5> {
        a = Conv(x, w1)
        b = Conv(x, w2)
        c = Concat<axis = 1>(a, b)
        y = Conv(c, w4)
        z = Conv(b, w5)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    feeds = _feeds(model)
    grams = covariances.collect(model, coupling, feeds, "cpu")
    first, second = (problems(model, coupling, grams, g) for g in range(2))
    outputs = {node.name: node.outputs[0] for node in model.nodes}
    assert {outputs[p.consumer.node]: p.columns[:, 0].tolist() for p in first} == {
        "y": list(range(8))
    }
    assert {outputs[p.consumer.node]: p.columns[:, 0].tolist() for p in second} == {
        "y": list(range(8, 16)),
        "z": list(range(8)),
    }


# ----------------------------------------------------------------------------------------------------- compensate


def _random_problem(seed: int, outs: int, units: int, held: int, others: int = 0) -> Problem:
    """Columns of the units in random places, some columns of other groups between them; correlated inputs."""
    rng = np.random.default_rng(seed)
    d = units * held + others
    factor = rng.standard_normal((d, d)) * np.exp(rng.standard_normal(d))
    place = rng.permutation(d)[: units * held].reshape(units, held)
    return Problem(
        Consumer("node", 0, "x", 1, "w", 0),
        0,
        rng.standard_normal((outs, d)),
        factor @ factor.T / d + 1e-3 * np.eye(d),
        rng.standard_normal(d),
        place,
        np.arange(d)[:, None],
        1.0,
    )


@pytest.mark.parametrize("seed", range(6))
def test_compensation_equals_least_squares(seed: int) -> None:
    """min E |(W - V)(x - m)|^2 over all V with zeros at what goes, as one lstsq on a root of the covariance."""
    rng = np.random.default_rng(seed)
    problem = _random_problem(seed, 5, 6, 1 + seed % 3, seed)
    removed = rng.choice(6, 1 + seed % 5, replace=False)
    weight, shift = compensate(problem, removed)
    gone = problem.columns[removed].reshape(-1)
    stays = np.setdiff1d(np.arange(problem.weight.shape[1]), gone)
    assert not weight[:, gone].any()
    root = np.linalg.cholesky(problem.gram).T  # |root v|^2 = v' G v
    best = np.linalg.lstsq(root[:, stays], root @ problem.weight.T, rcond=None)[0].T
    np.testing.assert_allclose(weight[:, stays], best, rtol=1e-8, atol=1e-8 * np.abs(best).max())
    # The mean output stays what it was.
    np.testing.assert_allclose(
        weight @ problem.mean + shift, problem.weight @ problem.mean, rtol=1e-9, atol=1e-9
    )


def test_compensation_without_removed_or_kept_units() -> None:
    problem = _random_problem(0, 5, 6, 2, 0)
    weight, shift = compensate(problem, np.zeros(0, np.int64))
    np.testing.assert_array_equal(weight, problem.weight)
    assert not shift.any()
    weight, shift = compensate(problem, np.arange(6))
    assert not weight.any()
    np.testing.assert_allclose(shift, problem.weight @ problem.mean)


def test_copied_unit_compensates_the_removed_one(tmp_path: Path) -> None:
    """Unit 3 is twice unit 1: without it, unit 1 gets its weights twice, and the output stays."""
    text = """(float[N,3,8,8] x) => (float[] y) <float[8,3,3,3] w1, float[4,8,3,3] w> {
        a = Conv(x, w1)
        h = Relu(a)
        y = Conv(h, w)
    }"""
    proto = build(text)
    tensor = next(t for t in proto.graph.initializer if t.name == "w1")
    value = numpy_helper.to_array(tensor).copy()
    value[3] = 2 * value[1]
    tensor.CopyFrom(numpy_helper.from_array(value, "w1"))
    model = load(proto, tmp_path)
    feeds = _feeds(model, 3, 20)
    (problem,) = _problems(model, couple(model), feeds)
    (rows,), (outputs,) = _read(model, feeds)

    def left(removed: int) -> float:
        weight, shift = compensate(problem, np.asarray([removed]))
        return float(
            np.square(rows @ weight.T + shift - outputs).mean(axis=0).sum()
            / outputs.var(axis=0).sum()
        )

    assert left(3) < 4e-3  # but for the ridge
    assert left(2) > 10 * left(3)


# ------------------------------------------------------------------------------------------------------ shrinkage


@pytest.mark.parametrize(
    ("width", "rows"), [(1, 10), (2, 5), (20, 10), (20, 100), (50, 40), (50, 5000)]
)
def test_shrinkage_equals_the_published_estimate(width: int, rows: int) -> None:
    """Chen et al. 2010, equation 23."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((rows, width)) * np.geomspace(1, 5, width)
    sample = np.cov(x, rowvar=False, bias=True).reshape(width, width)
    found = shrinkage(sample, rows)
    assert found >= layer_problems.RIDGE
    assert np.isfinite(found)
    p, trace, square = width, np.trace(sample), np.trace(sample @ sample)
    spread = square - trace**2 / p
    rho = (
        1.0
        if spread <= 1e-12 * square
        else ((1 - 2 / p) * square + trace**2) / ((rows + 1 - 2 / p) * spread)
    )
    if rho < 0.9:
        assert found == pytest.approx(max(layer_problems.RIDGE, rho / (1 - rho)), rel=1e-9)
    else:
        assert found >= 0.9 / 0.1


def test_shrinkage_falls_with_rows() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((4000, 30)) @ rng.standard_normal((30, 30))
    covariance = np.cov(mixed, rowvar=False)
    found = [shrinkage(covariance, rows) for rows in (10, 30, 100, 1000, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 10 * found[2]
    assert found[-1] == layer_problems.RIDGE


def test_shrinkage_makes_repairs_from_few_rows_better() -> None:
    """Judged on 20,000 other rows: 20 rows of 30 rectified inputs promise too much without it."""
    rng = np.random.default_rng(1)
    root = rng.standard_normal((30, 30)) * np.geomspace(1, 0.1, 30)

    def draw(rows: int) -> Floats:
        return np.asarray(
            np.cov(np.maximum(rng.standard_normal((rows, 30)) @ root.T, 0), rowvar=False, bias=True)
        )

    truth = draw(20_000)
    weight = rng.standard_normal((8, 30))
    removed = np.arange(10)

    def error(ridge: float, sample: Floats) -> float:
        loaded = sample + ridge * np.trace(sample) / 30 * np.eye(30)
        columns: Ints = np.arange(30)[:, None]
        problem = Problem(
            Consumer("n", 0, "x", 1, "w", 0), 0, weight, loaded, np.zeros(30), columns, columns, 1.0
        )
        left = weight - compensate(problem, removed)[0]
        return float(np.trace(left @ truth @ left.T))

    gains = []
    for _ in range(10):
        sample = draw(20)
        gains.append(error(layer_problems.RIDGE, sample) / error(shrinkage(sample, 20), sample))
    assert np.mean(gains) > 2


def test_constant_input_gives_finite_solutions(tmp_path: Path) -> None:
    """Inputs that never change have no variance: problems stay solvable and finite."""
    model = load(build(NETS["gemm"].text), tmp_path)
    coupling = couple(model)
    feeds = [{"x": np.zeros((4, 5), np.float32)}]
    (problem,) = _problems(model, coupling, feeds)
    weight, shift = compensate(problem, np.asarray([0, 1]))
    assert np.isfinite(weight).all()
    assert np.isfinite(shift).all()
    assert problem.scale > 0


def test_only_linear_consumers_have_problems(tmp_path: Path) -> None:
    """A product of two activations has no weights that could be repaired."""
    text = """(float[N,5,6] x) => (float[] y) <float[6,8] w1, float[6,8] w2> {
        q = MatMul(x, w1)
        k = MatMul(x, w2)
        t = Transpose<perm = [0, 2, 1]>(k)
        y = MatMul(q, t)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    grams: Mapping[str, Gram] = covariances.collect(model, coupling, _feeds(model), "cpu")
    assert not grams
    assert problems(model, coupling, grams, 0) == []


# -------------------------------------------------------------------------------------------------- shared weights

SHARED = """(float[N,6] x, float[N,6] z) => (float[N,4] y, float[N,4] v)
<float[6,8] w1, float[8,4] w, float[8,4] own> {
    a = MatMul(x, w1)
    b = MatMul(z, w1)
    h = Relu(a)
    g = Tanh(b)
    u = Identity(w)
    m = MatMul(h, w)
    y = MatMul(h, own)
    n = MatMul(g, u)
    v = Add(m, n)
}"""


def _shared(tmp_path: Path) -> tuple[Model, Coupling, list[dict[str, Array]], tuple[str, str, str]]:
    """A model, three feeds, and the nodes (first use, second use, alone)."""
    model = load(build(SHARED), tmp_path)
    by_output = {node.outputs[0]: node.name for node in model.nodes}
    names = by_output["m"], by_output["n"], by_output["y"]
    return model, couple(model), [feed(model, seed, 20) for seed in range(3)], names


def test_covariance_of_a_shared_weight_is_that_of_the_rows_of_all_uses(tmp_path: Path) -> None:
    model, coupling, feeds, (first, second, alone) = _shared(tmp_path)
    grams = covariances.collect(model, coupling, feeds, "cpu")
    assert list(grams) == [n.name for n in model.nodes if n.name in {first, second, alone}]
    held = [activations(model, values, ["h", "g"]) for values in feeds]
    of_first = np.concatenate([values["h"] for values in held]).astype(np.float64)
    rows = np.concatenate([of_first, *(values["g"] for values in held)])
    shared = grams[first]
    assert grams[second] is shared
    assert shared.uses == (first, second)
    assert shared.rows == len(rows) == 120
    np.testing.assert_allclose(shared.values[0], np.cov(rows.T, bias=True), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shared.mean[0], rows.mean(axis=0), rtol=1e-6, atol=1e-9)
    assert grams[alone].uses == ()
    expected = np.cov(of_first.T, bias=True)
    np.testing.assert_allclose(grams[alone].values[0], expected, rtol=1e-6, atol=1e-9)


def test_shared_weight_is_one_problem_of_the_weight_of_its_uses(tmp_path: Path) -> None:
    model, coupling, feeds, (first, second, alone) = _shared(tmp_path)
    grams = covariances.collect(model, coupling, feeds, "cpu")
    found = problems(model, coupling, grams, 0)
    assert {p.uses: p.share for p in found} == {(first, second): 4 / 3, (alone,): 2 / 3}
    relevance = {name: np.full(4, value) for name, value in ((first, 1), (second, 3), (alone, 2))}
    shared, single = weighted(found, relevance)
    # Both have the mean relevance 2, and the shared weight has two uses.
    assert shared.share / single.share == pytest.approx(2 * shared.scale / single.scale)
    plain = {p.uses: p.variance(p.weight) for p in found}
    assert shared.scale == pytest.approx(2 * plain[first, second])


def test_covariances_of_shared_weights_survive_the_cache(tmp_path: Path) -> None:
    model, coupling, feeds, (first, second, alone) = _shared(tmp_path)
    grams = covariances.collect(model, coupling, feeds, "cpu")
    arrays = cache_entries.GRAMS.pack(grams)
    assert sum(name.startswith("values") for name in arrays) == 2
    restored = cache_entries.GRAMS.unpack(arrays)
    assert covariances.fits(restored, model, coupling)
    assert restored[first] is restored[second]
    assert not covariances.fits({**restored, second: restored[alone]}, model, coupling)
    assert not covariances.fits({**restored, second: replace(restored[second])}, model, coupling)
    apart = {name: replace(gram, uses=()) for name, gram in restored.items()}
    assert not covariances.fits(apart, model, coupling)


def test_weights_with_different_factors_have_covariances_of_their_own(tmp_path: Path) -> None:
    text = SHARED.replace("n = MatMul(g, u)", "n = Gemm<alpha = 0.5>(g, u)")
    text = text.replace("m = MatMul(h, w)", "m = Gemm(h, w)")
    model = load(build(text), tmp_path)
    coupling = couple(model)
    grams = covariances.collect(model, coupling, [feed(model, 0, 20)], "cpu")
    assert len(grams) == 3
    assert not any(gram.uses for gram in grams.values())


@pytest.mark.parametrize("shared", [False, True])
def test_memory_is_estimated_before_it_is_taken(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shared:
        model, coupling, feeds, _ = _shared(tmp_path)
    else:
        # One product with a matrix, and one with a factor of the rows that fit.
        monkeypatch.setattr(covariances, "MOST_COLUMNS", 20)
        monkeypatch.setattr(covariances, "MOST_VALUES", 1400)
        text = """(float[N,5] x) => (float[N,4] y) <float[5,16] w1, float[16,36] w2, float[36,4] w3> {
            a = MatMul(x, w1)
            h = Relu(a)
            b = MatMul(h, w2)
            r = Relu(b)
            y = MatMul(r, w3)
        }"""
        model = load(build(text), tmp_path)
        coupling, feeds = couple(model), [feed(model, 0, 100)]
    grams = covariances.collect(model, coupling, feeds, "cpu")
    held = {id(gram): gram.values.nbytes for gram in grams.values()}
    assert shared or {gram.factor is None for gram in grams.values()} == {True, False}
    assert covariances.estimated_bytes(model, coupling) == sum(held.values())


def test_covariances_of_a_large_model_share_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "COVARIANCE_BYTES", 8 * 2 * 50)
    model, _, _, names = _shared(tmp_path)
    data = feed(model, 0, 80)
    save(model.proto, tmp_path / "model.onnx")
    settings = Settings.create(macs=0.5, device="cpu", cache="off")
    context = open_context(tmp_path / "model.onnx", data, settings)
    grams = collect(context, {requests.COVARIANCE})[requests.COVARIANCE]
    assert len(grams) == len(names)
    assert all(gram.factor is not None and gram.factor.size <= 8 * 32 for gram in grams.values())
