"""The least-squares refit: what it restores, what it never worsens, and what it says where it cannot help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, OpCase, by_tier, unknown_here
from conftest import MODELS
from graphs import (
    ATTENTION,
    CNN,
    GROUPED,
    MLP,
    NETS,
    RESIDUAL,
    build,
    constants,
    distance,
    load,
    random_keep,
)
from graphs import samples as random_samples
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    ModelProto,
    StringStringEntryProto,
    TensorProto,
    helper,
    numpy_helper,
)
from refits import (
    change_initialiser,
    linear_sites,
    random_calibration,
    refit,
    relative_error,
    without,
)

from onnx_oamip.core.records import Array, Coupling, Floats, Model, Pruned
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import chains, partial_execution, weight_sharing
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.repair import (
    least_squares,
    node_refit,
    refit_scope,
    ridge,
    row_sampling,
    targets,
)
from onnx_oamip.repair.residual_joins import join
from onnx_oamip.repair.shared_weights import Family

pytestmark = pytest.mark.filterwarnings("error")


# ------------------------------------------------------------------------------------------------ augmented copies


IMAGES = """(float[N, 3, 8, 8] x) => (float[N, 6] y)
    <float[8, 3, 3, 3] v, float[16, 8, 3, 3] w, float[16, 6] u>
    {
        a = Conv<pads = [1, 1, 1, 1]>(x, v)
        b = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(b, w)
        d = Relu(c)
        e = ReduceMean<axes = [2, 3], keepdims = 0>(d)
        y = MatMul(e, u)
    }"""


def _mirrored(feed: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Images with axes flipped at random: for noise, these are other images."""
    axes = [axis for axis in (2, 3) if rng.random() < 0.8] or [2]
    return {name: np.ascontiguousarray(np.flip(value, axes)) for name, value in feed.items()}


def test_copies_add_rows_where_samples_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product has one row per sample, the convolutions more than they need."""
    monkeypatch.setattr(row_sampling, "MIN_ROWS", 64)
    monkeypatch.setattr(row_sampling, "ROWS_PER_UNKNOWN", 1)
    model = load(build(IMAGES), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(0), 0.6)
    samples = random_calibration(model, 24)
    sampling = least_squares.Sampling(samples=samples, device="cpu", batch_size=8)
    given = model, coupling, keep, rewrite.cut(model, coupling, keep), sampling
    short = refit_scope.short_of_samples(model, coupling, keep, samples)
    assert short == {model.nodes[-1].name}
    start = least_squares.front(*given, short=short)
    assert len(start.fits) == 1
    plain, copied, again = (
        least_squares.rest(model, coupling, keep, start, sampling, short=short, change=change)
        for change in (None, _mirrored, _mirrored)
    )
    alone = least_squares.front(*given, short=())
    assert copied.proto.SerializeToString() == again.proto.SerializeToString()
    assert plain.proto.SerializeToString() == alone.proto.SerializeToString()
    assert plain.fits == alone.fits
    few, many = ([fit.rows for fit in pruned.fits] for pruned in (plain, copied))
    assert many[-1] == few[-1] * (1 + least_squares.COPIES) == 24 * (1 + least_squares.COPIES)
    assert many[0] == few[0]
    unseen = random_calibration(model, 400, 9)
    assert relative_error(model, copied.proto, unseen) < 0.95 * relative_error(
        model, plain.proto, unseen
    )


# ------------------------------------------------------------------------------------------------ nothing removed


@pytest.mark.parametrize("net", NETS)
def test_nothing_removed_changes_nothing(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where every linear node is fitted anew; judged on other data."""
    model = load(build(NETS[net]), tmp_path)
    coupling = couple(model)
    keep = np.ones(coupling.n_units, bool)
    untouched = refit(model, coupling, keep, random_calibration(model, 64))
    assert not untouched.fits
    assert untouched.proto.SerializeToString() == untouched.raw.SerializeToString()
    families = [Family((place,)) for place in linear_sites(model)]
    monkeypatch.setattr(least_squares, "families_behind", lambda *_: (families, [], []))
    forced = refit(model, coupling, keep, random_calibration(model, 64))
    assert len(forced.fits) == len(linear_sites(model))
    feed = random_samples(model, 50, 9)
    assert (
        distance(Session(model.proto, "cpu").run(feed), Session(forced.proto, "cpu").run(feed))
        < 1e-5
    )


@pytest.mark.parametrize(
    ("name", "source", "count"),
    [
        ("lenet5-mnist", "mnist", 64),
        pytest.param("resnet20-fashion", "fashion-mnist", 24, marks=pytest.mark.slow),
    ],
)
def test_nothing_removed_changes_nothing_in_trained_models(
    name: str, source: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sampling, "MAX_ROWS", 2048)
    monkeypatch.setattr(row_sampling, "MIN_ROWS", 1024)
    model, coupling, found, held = _shipped(name, source, count)
    families = [Family((place,)) for place in linear_sites(model)]
    monkeypatch.setattr(least_squares, "families_behind", lambda *_: (families, [], []))
    keep = np.ones(coupling.n_units, bool)
    pruned = refit(model, coupling, keep, found)
    feed = held.feed(np.arange(64))
    assert (
        distance(Session(model.proto, "cpu").run(feed), Session(pruned.proto, "cpu").run(feed))
        < 1e-5
    )


def _shipped(name: str, source: str, count: int) -> tuple[Model, Coupling, Samples, Samples]:
    """(model, coupling, calibration samples, other samples)."""
    path = MODELS / f"{name}.onnx"
    if not path.exists() or not (MODELS / f"{source}.npz").exists():
        pytest.skip(f"{name} is not there")
    model = models.load(path)
    found = dataset.load(MODELS / f"{source}.npz", model)
    held = dataset.load(MODELS / f"{source}.npz", model, dataset.EVALUATION)
    assert found is not None
    assert held is not None
    return model, couple(model), found.take(np.arange(count)), held.take(np.arange(128))


# ---------------------------------------------------------------------------------------------------- known answers

# Nodes from h on; unit 5 in front is twice unit 2, so that without it the output can be restored exactly.
BEHIND = {
    "gemm": ("float[8,4] w, float[4] b", "y = Gemm(h, w, b)"),
    "gemm scaled": (
        "float[4,8] w, float[4] b",
        "y = Gemm<alpha = 0.4, beta = 3.0, transB = 1>(h, w, b)",
    ),
    "matmul": ("float[8,4] w", "y = MatMul(h, w)"),
    "matmul and add": ("float[8,4] w, float[4] b", "m = MatMul(h, w)  y = Add(m, b)"),
    "two layers": (
        "float[8,6] w, float[6,4] w3",
        "m = MatMul(h, w)  r = Relu(m)  y = MatMul(r, w3)",
    ),
    "two consumers": (
        "float[8,4] w, float[8,4] w3",
        "m = MatMul(h, w)  n = MatMul(h, w3)  t = Tanh(n)  y = Add(m, t)",
    ),
}
BEHIND_IMAGE = {
    "conv": ("float[4,8,3,3] w, float[4] b", "y = Conv<pads = [1, 1, 1, 1]>(h, w, b)"),
    "conv uneven": (
        "float[4,8,3,2] w",
        "y = Conv<strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 1]>(h, w)",
    ),
    "conv same": ("float[4,8,2,3] w", 'y = Conv<auto_pad = "SAME_LOWER">(h, w)'),
    "conv of shuffled channels": (
        "float[4,8,3,3] w, int64[8] order = {3, 0, 6, 1, 7, 2, 5, 4}",
        "s = Gather<axis = 1>(h, order)  y = Conv(s, w)",
    ),
    "conv after pooling": (
        "float[4,8,2,2] w",
        "p = MaxPool<kernel_shape = [2, 2]>(h)  y = Conv(p, w)",
    ),
    "transposed": (
        "float[8,4,3,3] w",
        "y = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1]>(h, w)",
    ),
    "flatten": ("float[288,4] w", "f = Flatten(h)  y = Gemm(f, w)"),
    "tokens": (
        "float[8,4] w, int64[3] to = {0, 8, 36}",
        "r = Reshape(h, to)  t = Transpose<perm = [0, 2, 1]>(r)  y = MatMul(t, w)",
    ),
    "channels first": (
        "float[4,8] w, int64[3] to = {0, 8, 36}",
        "r = Reshape(h, to)  y = MatMul(w, r)",
    ),
}


def _doubled(name: str, folder: Path, constant: bool = False) -> Model:
    """Unit 5 is twice unit 2, or (constant) always 2."""
    image = name in BEHIND_IMAGE
    declared, nodes = (BEHIND_IMAGE if image else BEHIND)[name]
    front, shape = (
        ("Conv(x, w1, b1)", "8,3,3,3") if image else ("Gemm<transB = 1>(x, w1, b1)", "8,6")
    )
    proto = build(f"""(float[N,{"3,8,8" if image else "6"}] x) => (float[] y)
    <float[{shape}] w1, float[8] b1, {declared}> {{ a = {front}  h = Relu(a)  {nodes} }}""")

    def change(value: Array) -> None:
        if constant:
            value[5] = 2.0 if value.ndim == 1 else 0.0
        else:
            value[5] = 2 * value[2]

    for weight in ("w1", "b1"):
        change_initialiser(proto, weight, change)
    return load(proto, folder)


@pytest.mark.parametrize("name", [*BEHIND, *BEHIND_IMAGE])
def test_copied_unit_replaces_the_removed_one(name: str, tmp_path: Path) -> None:
    model = _doubled(name, tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [5])
    pruned = refit(model, coupling, keep, random_calibration(model, 400))
    other = random_calibration(model, 100, 7)
    assert relative_error(model, pruned.raw, other) > 0.1
    assert relative_error(model, pruned.proto, other) < 1e-3
    assert all(f.form.startswith("least squares") for f in pruned.fits)


PADDED = ("conv", "conv uneven", "conv same", "transposed")


@pytest.mark.parametrize("name", [n for n in (*BEHIND, *BEHIND_IMAGE) if n not in PADDED])
def test_removed_constant_channel_is_folded_into_the_bias(name: str, tmp_path: Path) -> None:
    """Exactly, where there is no zero padding."""
    model = _doubled(name, tmp_path, constant=True)
    coupling = couple(model)
    keep = without(coupling, "w1", [5])
    pruned = refit(model, coupling, keep, random_calibration(model, 200))
    other = random_calibration(model, 100, 7)
    assert relative_error(model, pruned.raw, other) > 0.1
    assert relative_error(model, pruned.proto, other) < 2e-6


@pytest.mark.parametrize("slots", [False, True])
def test_copied_channel_of_a_grouped_convolution_replaces_the_removed_one(
    slots: bool, tmp_path: Path
) -> None:
    """Copies within every block: slot 1 of both blocks twice slot 0; or whole blocks behind depthwise kernels."""
    middle = (
        "Conv<group = 2, pads = [1, 1, 1, 1]>(h, w2)"
        if slots
        else "Conv<group = 8, pads = [1, 1, 1, 1]>(h, w2)"
    )
    proto = build(f"""(float[N,3,6,6] x) => (float[] y)
    <float[8,3,1,1] w1, float[8] b1, float[8,{4 if slots else 1},3,3] w2, float[4,8,1,1] w3> {{
        a = Conv(x, w1, b1)
        h = Relu(a)
        g = {middle}
        y = Conv(g, w3)
    }}""")

    def copy(value: Array) -> None:
        value[[1, 5] if slots else [5]] = 2 * value[[0, 4] if slots else [2]]

    change_initialiser(proto, "w1", copy)
    change_initialiser(proto, "b1", copy)
    if not slots:
        change_initialiser(proto, "w2", lambda v: v.__setitem__(5, v[2]))
    model = load(proto, tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [1] if slots else [5])
    pruned = refit(model, coupling, keep, random_calibration(model, 200))
    other = random_calibration(model, 50, 7)
    assert relative_error(model, pruned.raw, other) > 0.1
    assert relative_error(model, pruned.proto, other) < 1e-3


MIXED = (
    "conv",
    "conv uneven",
    "conv of shuffled channels",
    "flatten",
    "transposed",
)
SOLVED = ("gemm", "gemm scaled", "tokens")


@pytest.mark.parametrize("name", MIXED)
def test_copied_unit_replaces_the_removed_one_by_channel_mixing(name: str, tmp_path: Path) -> None:
    """The form for nodes that are too wide knows channels only, and finds the same copy."""
    model = _doubled(name, tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [5])
    pruned = refit(model, coupling, keep, random_calibration(model, 200), cap=7)
    other = random_calibration(model, 50, 7)
    assert [f.form for f in pruned.fits] == ["channel mixing"]
    assert any(
        "removed channels are mixed into kept ones" in note and "'w" not in note
        for note in pruned.notes
    )
    assert model.nodes[-1].name in pruned.notes[0]
    assert relative_error(model, pruned.raw, other) > 0.1
    assert relative_error(model, pruned.proto, other) < 1e-3


@pytest.mark.parametrize("name", SOLVED)
def test_copied_unit_replaces_the_removed_one_of_a_wide_product(name: str, tmp_path: Path) -> None:
    """One input for each channel: mixing channels would have as many unknowns as the weights."""
    model = _doubled(name, tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [5])
    pruned = refit(model, coupling, keep, random_calibration(model, 200), cap=7)
    other = random_calibration(model, 50, 7)
    assert [f.form for f in pruned.fits] == ["least squares"]
    assert relative_error(model, pruned.raw, other) > 0.1
    assert relative_error(model, pruned.proto, other) < 1e-3


# ------------------------------------------------------------------------------------------- the same by numpy


def _ridge(x: Floats, r: Floats, strength: float) -> tuple[Floats, Floats]:
    """(D, b) of min |r - x D - b|^2 + strength * mean variance sum * |D|^2, by an augmented least squares."""
    mean, offset = x.mean(axis=0), r.mean(axis=0)
    centred = x - mean
    load_ = strength * np.square(centred).sum() / x.shape[1]
    augmented = np.concatenate([centred, np.sqrt(load_) * np.eye(x.shape[1])])
    target = np.concatenate([r - offset, np.zeros((x.shape[1], r.shape[1]))])
    d = np.linalg.lstsq(augmented, target, rcond=None)[0]
    return d, offset - mean @ d


def _by_hand(
    x: Floats, y: Floats, w0: Floats, b0: Floats
) -> tuple[Floats, Floats, float | None, float, float]:
    """Weights, bias, ridge, held-out errors before and after; the strength is chosen on the last fifth of the rows."""
    cut = int(np.ceil(0.8 * len(x)))
    r = y - x @ w0 - b0
    scale = float(y.var(axis=0).sum())

    def error(d: Floats, b: Floats) -> float:
        return float(np.square(r[cut:] - x[cut:] @ d - b).mean(axis=0).sum()) / scale

    nothing = np.zeros_like(w0)
    before = error(nothing, np.zeros_like(b0))
    tried = {None: error(nothing, r[:cut].mean(axis=0))}
    tried.update({s: error(*_ridge(x[:cut], r[:cut], s)) for s in ridge.RIDGES})
    best = min(tried, key=lambda s: tried[s])
    if tried[best] >= before:
        return w0, b0, best, before, before
    d, b = (nothing, r.mean(axis=0)) if best is None else _ridge(x, r, best)
    return w0 + d, b0 + b, best, before, tried[best]


@pytest.mark.parametrize("rows", [24, 60, 500])
def test_refit_of_products_equals_numpy(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Front to back: the second product is fitted on what the first, already fitted, gives."""
    monkeypatch.setattr(node_refit, "clamp_behind", lambda *_: None)
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    rng = np.random.default_rng(3)
    keep = np.ones(coupling.n_units, bool)
    for group, gone in zip(coupling.groups, (5, 4), strict=True):
        keep[rng.choice(group.units, gone, replace=False)] = False
    found = random_calibration(model, rows)
    pruned = refit(model, coupling, keep, found)
    c = {k: v.astype(np.float64) for k, v in model.constants.items()}
    first, second = (keep[coupling.axes[t, 1]] for t in ("w1", "w2"))
    x = found.arrays["x"].astype(np.float64)
    h = np.maximum(x @ c["w1"] + c["b1"], 0)
    y2 = h @ c["w2"] + c["b2"]
    y3 = np.maximum(y2, 0) @ c["w3"] + c["b3"]
    w2, b2, ridge2, *errors2 = _by_hand(
        h[:, first], y2[:, second], c["w2"][first][:, second], c["b2"][second]
    )
    r = np.maximum(h[:, first] @ w2 + b2, 0)
    w3, b3, ridge3, *errors3 = _by_hand(r, y3, c["w3"][second], c["b3"])
    made = constants(pruned.proto)
    fits = pruned.fits
    assert [f.rows for f in fits] == [rows, rows]
    assert [f.unknowns for f in fits] == [7, 6]
    # The search walks downhill from the middle: it may stop at a hollow that is not the deepest.
    if [ridge2, ridge3] == [f.ridge for f in fits]:
        for name, value in (("w2", w2), ("b2", b2), ("w3", w3), ("b3", b3)):
            np.testing.assert_allclose(
                made[name], value, rtol=1e-4, atol=2e-5 * np.abs(value).max()
            )
        for fit, errors in zip(fits, (errors2, errors3), strict=True):
            np.testing.assert_allclose([fit.error_before, fit.error_after], errors, rtol=1e-4)
    else:
        assert rows < 60


def test_refit_with_fewer_rows_than_unknowns(tmp_path: Path) -> None:
    """The dual form gives the same solution, and the report asks for more samples."""
    text = """(float[N,30] x) => (float[N,3] y) <float[30,60] w1, float[60] b1, float[60,3] w2, float[3] b2> {
        a = Gemm(x, w1, b1)
        h = Relu(a)
        y = Gemm(h, w2, b2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", range(0, 60, 6))
    found = random_calibration(model, 40)
    pruned = refit(model, coupling, keep, found)
    (fit,) = pruned.fits
    assert any(
        f"{fit.rows} rows for {fit.unknowns} unknowns, so more calibration samples" in n
        for n in pruned.notes
    )
    assert (fit.rows, fit.unknowns) == (40, 50)
    c = {k: v.astype(np.float64) for k, v in model.constants.items()}
    stays = keep[coupling.axes["w1", 1]]
    h = np.maximum(found.arrays["x"].astype(np.float64) @ c["w1"] + c["b1"], 0)
    w, b, ridge, *_ = _by_hand(h[:, stays], h @ c["w2"] + c["b2"], c["w2"][stays], c["b2"])
    assert fit.ridge == ridge
    made = constants(pruned.proto)
    np.testing.assert_allclose(made["w2"], w, rtol=1e-4, atol=2e-5 * np.abs(w).max())
    np.testing.assert_allclose(made["b2"], b, rtol=1e-4, atol=2e-5 * np.abs(b).max())
    enough = refit(model, coupling, keep, random_calibration(model, 100))
    assert not enough.notes


def test_every_skipped_node_is_noted_with_its_reason(tmp_path: Path) -> None:
    """Rows that are no numbers do not hide that those that are left are few."""
    text = """(float[N,30] x) => (float[N,3] y) <float[30,60] w1, float[60,3] w2> {
        a = MatMul(x, w1)
        h = Relu(a)
        y = MatMul(h, w2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", range(0, 60, 6))
    found = random_calibration(model, 40)
    far = dict(found.arrays)
    far["x"] = np.asarray(far["x"]).copy()
    far["x"][:4] = 3e38
    (note,) = refit(model, coupling, keep, replace(found, arrays=far)).notes
    assert (
        "4 of 40 rows are not finite and not fitted to; 36 rows for 50 unknowns, so more calibration"
        in note
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_refit_with_a_handful_of_rows(count: int, tmp_path: Path) -> None:
    """Nothing can be held out of one row: then nothing is fitted. No division by zero in between."""
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [0, 1, 2])
    pruned = refit(model, coupling, keep, random_calibration(model, count))
    assert all(np.isfinite([v for v in constants(pruned.proto).values() for v in v.reshape(-1)]))
    assert np.isfinite(relative_error(model, pruned.proto, random_calibration(model, 50, 7)))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_refit_does_not_depend_on_the_batch_size(batch_size: int, tmp_path: Path) -> None:
    """Rows of single samples are as good as rows of batches."""
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [0, 1, 2, 3])
    pruned = refit(model, coupling, keep, random_calibration(model, 60), batch_size=batch_size)
    reference = refit(model, coupling, keep, random_calibration(model, 60), batch_size=60)
    assert [f.ridge for f in pruned.fits] == [f.ridge for f in reference.fits]
    for (name, a), b in zip(
        constants(pruned.proto).items(), constants(reference.proto).values(), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)


# ------------------------------------------------------------------------------------------ never worse, node by node


def _outputs(proto: ModelProto, names: Sequence[str], found: Samples) -> dict[str, Array]:
    copy = ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in names)
    session = Session(copy, "cpu")
    parts = [session.run(feed, list(names)) for _, feed in found.batches(64)]
    return {n: np.concatenate([p[i] for p in parts]) for i, n in enumerate(names)}


def _unfitted(pruned: Pruned, node: str) -> ModelProto:
    """The refitted model with one node as the cut left it."""
    proto = ModelProto()
    proto.CopyFrom(pruned.proto)
    mine = next(n for n in proto.graph.node if n.name == node)
    theirs = next(n for n in pruned.raw.graph.node if n.name == node)
    held = constants(pruned.raw)
    for slot, name in enumerate(theirs.input):
        if name in held:
            proto.graph.initializer.append(numpy_helper.from_array(held[name], f"raw_{name}"))
            mine.input[slot] = f"raw_{name}"
    del mine.input[len(theirs.input) :]
    # A bias that was put behind a product is silenced.
    for other in proto.graph.node:
        if mine.output[0] in other.input and mine.output[0] != theirs.output[0]:
            slot = 1 - list(other.input).index(mine.output[0])
            zero = 0 * constants(proto)[other.input[slot]]
            proto.graph.initializer.append(numpy_helper.from_array(zero, f"none_{node}"))
            other.input[slot] = f"none_{node}"
    return proto


@pytest.mark.parametrize(
    ("name", "source", "count", "share", "slack"),
    [
        ("lenet5-mnist", "mnist", 128, 0.5, 1.0),
        pytest.param("resnet20-fashion", "fashion-mnist", 48, 0.6, 1.02, marks=pytest.mark.slow),
        ("mobilenet-fashion", "fashion-mnist", 48, 0.6, 1.02),
    ],
)
def test_no_node_of_a_trained_model_gets_worse(
    name: str, source: str, count: int, share: float, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On images that the refit has not seen, every node's output is nearer to the original.

    The output is judged where the refit aims at it: at the residual sum, and behind the clamp.
    """
    monkeypatch.setattr(row_sampling, "MAX_ROWS", 4096)
    model, coupling, found, held = _shipped(name, source, count)
    rng = np.random.default_rng(0)
    keep = np.ones(coupling.n_units, bool)
    for group in coupling.groups:
        keep[rng.choice(group.units, int(len(group.units) * (1 - share)), replace=False)] = False
    pruned = refit(model, coupling, keep, found)
    assert relative_error(model, pruned.proto, held) < 0.6 * relative_error(model, pruned.raw, held)
    places = {p.node.name: p for p in linear_sites(model)}
    assert {f.node for f in pruned.fits} == {
        n for n, p in places.items() if n != linear_sites(model)[0].node.name
    }, "all linear nodes but the first"
    gains = []
    for fit in pruned.fits[:: max(1, len(pruned.fits) // 8)]:
        place = places[fit.node]
        spot = place.node.outputs[0]
        joint = join(model, place)
        if joint is not None:  # judged where it meets the other branch
            spot = next(
                n.outputs[0] for n in model.nodes if joint.other in n.inputs and n.op == "Add"
            )
        if " behind " in fit.form:
            while (consumer := chains.of_model(model).sole_consumer(spot)) is not None:
                spot = consumer.outputs[0]
                if consumer.op in ("Relu", "Clip"):
                    break
        truth = _outputs(model.proto, [spot], held)[spot]
        kept = (
            coupling.keep((spot, 1), keep)
            if (spot, 1) in coupling.axes
            else np.ones(truth.shape[1], bool)
        )
        before = _outputs(_unfitted(pruned, fit.node), [spot], held)[spot]
        after = _outputs(pruned.proto, [spot], held)[spot]
        errors = [float(np.square(truth[:, kept] - v).sum()) for v in (before, after)]
        gains.append(errors[1] / errors[0])
        assert errors[1] <= slack * errors[0], fit
    assert np.median(gains) < 0.8


@pytest.mark.parametrize("net", NETS)
def test_refit_reduces_the_error(net: str, tmp_path: Path) -> None:
    model = load(build(NETS[net]), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(1), 0.6)
    pruned = refit(model, coupling, keep, random_calibration(model, 300))
    other = random_calibration(model, 100, 7)
    assert relative_error(model, pruned.proto, other) < 0.7 * relative_error(
        model, pruned.raw, other
    )
    assert pruned.fits


def test_rows_of_removed_channels_are_left_out(tmp_path: Path) -> None:
    """Layers over the positions of every channel, as in an MLP-Mixer: a removed channel takes its rows with it."""
    text = """(float[N,4,6] x) => (float[N,4,3] y) <float[6,5] w, float[4,8] v, float[8,4] u, float[5,3] o> {
        a = MatMul(x, w)  t = Transpose <perm = [0, 2, 1]> (a)  b = MatMul(t, v)  r = Relu(b)  c = MatMul(r, u)
        d = Transpose <perm = [0, 2, 1]> (c)  y = MatMul(d, o) }"""
    proto = build(text)
    change_initialiser(proto, "o", lambda value: value.__setitem__(1, 0))
    change_initialiser(proto, "v", lambda value: value.__setitem__((slice(None), 2), value[:, 5]))
    model = load(proto, tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w", [1]) & without(coupling, "v", [2])
    found = random_calibration(model, 300)
    pruned = refit(model, coupling, keep, found)
    assert relative_error(model, pruned.raw, found) > 0.01
    assert relative_error(model, pruned.proto, found) < 1e-3  # by the ridge alone


def test_refit_that_does_not_reduce_the_error_is_discarded(tmp_path: Path) -> None:
    """The lost channel is +1 in the rows that are fitted and -1 in those held out: no repair survives that."""
    text = "(float[N,2] x) => (float[N,2] y) <float[2,2] w1, float[2,2] w> { a = MatMul(x, w1)  y = MatMul(a, w) }"
    model = load(build(text), tmp_path)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    change_initialiser(proto, "w1", lambda v: v.__setitem__(slice(None), np.eye(2)))
    model = load(proto, tmp_path)
    coupling = couple(model)
    x = np.stack([np.resize([1, -1], 100), np.repeat([1, -1], [80, 20])], axis=1).astype(np.float32)
    found = dataset.load({"x": x}, model)
    assert found is not None
    pruned = refit(model, coupling, without(coupling, "w1", [1]), found)
    (fit,) = pruned.fits
    assert fit.error_after == fit.error_before > 0
    assert pruned.proto.SerializeToString() == pruned.raw.SerializeToString()


@pytest.mark.parametrize("case", by_tier(CASES))
def test_every_operator_case_stays_valid_after_refit(case: OpCase, tmp_path: Path) -> None:
    """Valid, of the same interface, and finite, whatever stands around the linear nodes."""
    if reason := unknown_here(case):
        pytest.skip(reason)
    model = load(case.make(), tmp_path, case.bindings)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(0), 0.5)
    # Whole feeds: some graphs have inputs without a batch axis.
    feeds = [random_samples(model, 6, seed) for seed in range(3)]
    found = dataset.load({k: np.stack([f[k] for f in feeds]) for k in feeds[0]}, model)
    assert found is not None
    pruned = refit(model, coupling, keep, found)
    session = Session(pruned.proto, "cpu")
    assert session.inputs == [p.name for p in model.inputs]
    assert session.outputs == [p.name for p in model.outputs]
    for old, new in zip(
        Session(model.proto, "cpu").run(feeds[0]), session.run(feeds[0]), strict=True
    ):
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        assert (
            np.isfinite(new.astype(np.float64)).all() == np.isfinite(old.astype(np.float64)).all()
        )


# -------------------------------------------------------------------------------------------------- too wide, shared


def test_weights_read_by_a_branch_stay_unchanged(tmp_path: Path) -> None:
    """An If captures the weight: it is shared, though no other node lists it."""
    case = next(c for c in CASES if c.name == "if-reads-an-outer-weight")
    model = load(case.make(), tmp_path)
    coupling = couple(model)
    keep = np.ones(coupling.n_units, bool)
    keep[coupling.groups[0].units[:3]] = False
    feeds = [{**random_samples(model, 40, seed), "flag": np.asarray(True)} for seed in range(3)]
    found = dataset.load({k: np.stack([f[k] for f in feeds]) for k in feeds[0]}, model)
    assert found is not None
    pruned = refit(model, coupling, keep, found)
    assert any("'w3' is shared" in note for note in pruned.notes)
    assert [f.node for f in pruned.fits] == [n.name for n in model.nodes if "w2" in n.inputs]
    for flag in (True, False):
        feed = {**feeds[0], "flag": np.asarray(flag)}
        before, after = (
            Session(model.proto, "cpu").run(feed),
            Session(pruned.proto, "cpu").run(feed),
        )
        np.testing.assert_array_equal(after[1], before[1])


def test_unsupported_weight_forms_are_noted(tmp_path: Path) -> None:
    text = """(float[2,4,5] x) => (float[] y) <float[5,8] w1, float[2,8,3] w2> {
        m = MatMul(x, w1)
        h = Relu(m)
        y = MatMul(h, w2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    found = dataset.load({"x": random_samples(model, 2)["x"][None]}, model)
    assert found is not None
    pruned = refit(model, coupling, without(coupling, "w1", [1]), found)
    assert not pruned.fits
    assert ["its weight has no plain matrix form" in n for n in pruned.notes] == [True]


def test_computed_biases_are_noted(tmp_path: Path) -> None:
    text = """(float[N,5] x, float[3] c) => (float[] y) <float[5,8] w1, float[8,3] w2> {
        m = MatMul(x, w1)
        h = Relu(m)
        y = Gemm(h, w2, c)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    feeds = [{**random_samples(model, 8, s), "c": np.ones(3, np.float32)} for s in range(2)]
    found = dataset.load({k: np.stack([f[k] for f in feeds]) for k in feeds[0]}, model)
    assert found is not None
    pruned = refit(model, coupling, without(coupling, "w1", [1]), found)
    assert not pruned.fits
    assert ["its bias is not one constant per output" in n for n in pruned.notes] == [True]


def test_depthwise_convolutions_behind_a_cut_are_refitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They consume nothing, but their input has errors that they can lessen."""
    monkeypatch.setattr(
        node_refit, "clamp_behind", lambda *_: None
    )  # clamped, less is left to them
    text = """(float[N,3,8,8] x) => (float[N,4,8,8] y)
    <float[10,3,3,3] w1, float[8,10,1,1] w2, float[8,1,3,3] w3, float[4,8,1,1] w4> {
        a = Conv<pads = [1, 1, 1, 1]>(x, w1)
        h = Relu(a)
        b = Conv(h, w2)
        r = Relu(b)
        d = Conv<group = 8, pads = [1, 1, 1, 1]>(r, w3)
        t = Relu(d)
        y = Conv(t, w4)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [0, 3, 6])
    keep &= without(coupling, "w2", [2])
    pruned = refit(model, coupling, keep, random_calibration(model, 100))
    (depthwise,) = (n.name for n in model.nodes if "w3" in n.inputs)
    (fit,) = (f for f in pruned.fits if f.node == depthwise)
    assert (fit.form, fit.unknowns) == ("least squares", 9)
    assert fit.error_after < 0.95 * fit.error_before
    assert not np.array_equal(constants(pruned.proto)["w3"], constants(pruned.raw)["w3"])
    assert constants(pruned.proto)["w3"].shape == (7, 1, 3, 3)


def test_only_nodes_behind_the_cut_change(tmp_path: Path) -> None:
    model = load(build(RESIDUAL), tmp_path)
    coupling = couple(model)
    pruned = refit(model, coupling, without(coupling, "w2", [0, 2]), random_calibration(model, 50))
    before, after = constants(pruned.raw), constants(pruned.proto)
    np.testing.assert_array_equal(after["w1"], before["w1"])
    np.testing.assert_array_equal(after["w2"], before["w2"])
    assert {f.node for f in pruned.fits} == {
        n.name for n in model.nodes if set(n.inputs) & {"w3", "w4"}
    }


# ---------------------------------------------------------------------------------------------------------- joins


NORMED = """(float[N,3,6,6] x) => (float[N,8,6,6] y)
<float[8,3,3,3] w1, float[12,8,3,3] w2, float[8,12,3,3] w3, float[8] gain, float[8] b, float[8] m, float[8] var> {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    h = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(h, w2)
    r = Relu(c)
    d = Conv<pads = [1, 1, 1, 1]>(r, w3)
    n = BatchNormalization(d, gain, b, m, var)
    y = Add(n, h)
}"""


def test_gain_between_node_and_sum_is_folded_from_normalisation(tmp_path: Path) -> None:
    proto = build(NORMED)
    change_initialiser(
        proto, "gain", lambda v: v.__setitem__(slice(None), [1, -2, 0, 1e-4, 0.5, 1, 1, 1])
    )
    model = load(proto, tmp_path)
    third = linear_sites(model)[2]
    found = join(model, third)
    assert found is not None
    assert found.other == "h"
    gain = model.constants["gain"] / np.sqrt(model.constants["var"].astype(np.float64) + 1e-5)
    gain[2:4] = 0  # muted channels carry no error
    np.testing.assert_allclose(found.gain, gain, rtol=1e-6)
    for place in linear_sites(model)[:2]:
        assert join(model, place) is None
    error = np.random.default_rng(0).standard_normal((5, 7))
    kept: NDArray[np.bool_] = np.asarray([True] * 7 + [False])
    expected = np.where(gain[:7] != 0, error / np.where(gain[:7] != 0, gain[:7], 1), 0)
    np.testing.assert_allclose(found.correction(error, kept), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "other"),
    [
        ("d = MatMul(h, w2)  y = Add(d, z)", "z"),
        ("d = MatMul(h, w2)  y = Add(z, d)", "z"),
        ("d = MatMul(h, w2)  e = Add(d, b)  y = Add(e, z)", "z"),
        ("d = MatMul(h, w2)  i = Identity(d)  y = Sum(i, z)", "z"),
        ("d = MatMul(h, w2)  e = Relu(d)  y = Add(e, z)", None),
        ("d = MatMul(h, w2)  y = Add(d, d)", None),
        ("d = MatMul(h, w2)  e = Relu(d)  y = Add(e, d)", None),
        ("d = MatMul(h, w2)  e = Add(d, z)  g = Relu(d)  y = Mul(e, g)", None),
        ("d = MatMul(h, w2)  y = Add(d, one)", None),
        ("d = MatMul(h, w2)  y = Sub(z, d)", None),
    ],
)
def test_residual_join_is_recognised(nodes: str, other: str | None, tmp_path: Path) -> None:
    text = f"""(float[N,5] x, float[N,5] z, float[1,5] one) => (float[] y) <float[5,8] w1, float[8,5] w2, float[5] b> {{
        a = MatMul(x, w1)
        h = Relu(a)
        {nodes}
    }}"""
    model = load(build(text), tmp_path, {"N": 3})
    found = join(model, linear_sites(model)[1])
    assert (found.other if found else None) == other


def test_join_compensates_the_error_of_the_other_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branches with the weight u stay wrong; those beside them read what it takes to make up for that."""
    monkeypatch.setattr(
        weight_sharing.Sharing, "obstacle", lambda _, place: "kept" if place.weight == "u" else ""
    )
    proto = build("""(float[N,5] a, float[N,5] b) => (float[N,3] y, float[N,3] z)
    <float[5,8] wa, float[5,8] wb, float[8,3] u, float[8,3] va, float[8,3] vb, float[3] gain, float[3] c, float[3] m,
     float[3] var> {
        ma = MatMul(a, wa)
        mb = MatMul(b, wb)
        ra = Relu(ma)
        rb = Relu(mb)
        ua = MatMul(ra, u)
        ub = MatMul(rb, u)
        na = MatMul(ra, va)
        nb = MatMul(rb, vb)
        n = BatchNormalization(na, gain, c, m, var)
        y = Add(n, ua)
        z = Add(ub, nb)
    }""")
    for name in ("wa", "wb"):
        change_initialiser(proto, name, lambda v: v.__setitem__((slice(None), 5), 2 * v[:, 2]))
    model = load(proto, tmp_path)
    coupling = couple(model)
    keep = np.ones(coupling.n_units, bool)
    keep[coupling.axes["wa", 1][5]] = False
    found, other = random_calibration(model, 300), random_calibration(model, 100, 7)
    pruned = refit(model, coupling, keep, found)
    assert [f.node for f in pruned.fits] == [
        n.name for n in model.nodes if set(n.inputs) & {"va", "vb"}
    ]
    assert relative_error(model, pruned.proto, other) < 1e-3
    monkeypatch.setattr(targets, "join", lambda *_: None)
    assert relative_error(model, refit(model, coupling, keep, found).proto, other) > 0.1


def test_two_branches_of_one_sum_are_refitted(tmp_path: Path) -> None:
    """The branch that is fitted first must not wait for the other one: it is not fitted yet."""
    text = """(float[N,5] x) => (float[N,4] y) <float[5,8] w1, float[8,4] w2, float[8,4] w3> {
        a = MatMul(x, w1)
        h = Relu(a)
        b = MatMul(h, w2)
        c = MatMul(h, w3)
        y = Add(b, c)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", [0, 1, 2])
    found, other = random_calibration(model, 300), random_calibration(model, 100, 7)
    pruned = refit(model, coupling, keep, found)
    # Together they are one product with summed weights: no error of the sum is left to repair.
    summed = load(
        build(text.replace("c = MatMul(h, w3)\n", "").replace("Add(b, c)", "Identity(b)")), tmp_path
    )
    proto = ModelProto()
    proto.CopyFrom(summed.proto)
    change_initialiser(proto, "w2", lambda v: v.__iadd__(model.constants["w3"]))
    single = load(proto, tmp_path)
    one = refit(single, couple(single), without(couple(single), "w1", [0, 1, 2]), found)
    assert relative_error(model, pruned.proto, other) == pytest.approx(
        relative_error(single, one.proto, other), rel=0.05
    )


# ---------------------------------------------------------------------------------------------------- the same again


@pytest.mark.parametrize("net", [CNN, ATTENTION, GROUPED])
def test_two_runs_are_byte_identical(net: str, tmp_path: Path) -> None:
    model = load(build(net), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(2), 0.5)
    found = random_calibration(model, 80)
    first, second = (refit(model, coupling, keep, found, seed=3) for _ in range(2))
    assert first.proto.SerializeToString() == second.proto.SerializeToString()
    assert first.fits == second.fits
    assert first.notes == second.notes


def test_seed_selects_the_sampled_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(build(CNN), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(2), 0.5)
    monkeypatch.setattr(row_sampling, "MIN_ROWS", 300)
    monkeypatch.setattr(row_sampling, "ROWS_PER_UNKNOWN", 1)
    first, second = (
        refit(model, coupling, keep, random_calibration(model, 64), seed=s) for s in (0, 1)
    )
    assert not np.array_equal(constants(first.proto)["w2"], constants(second.proto)["w2"])
    assert first.fits[0].rows == 300 < 64 * 16


def test_number_of_rows_follows_the_unknowns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows for each of the 8 x 9 weights of an output, within bounds; as many values as were allowed if wide."""
    model = load(build(CNN), tmp_path)
    coupling = couple(model)
    keep, found = without(coupling, "w1", [1, 4]), random_calibration(model, 64)
    bounds = {"MIN_ROWS": 40, "MAX_ROWS": 300, "ROWS_PER_UNKNOWN": 4, "WIDE_VALUES": 72 * 270}

    def rows(cap: int = row_sampling.GRAM_CAP, **changed: int) -> int:
        for name, value in {**bounds, **changed}.items():
            monkeypatch.setattr(row_sampling, name, value)
        return refit(model, coupling, keep, found, cap=cap).fits[0].rows

    assert rows() == 288
    assert rows(MAX_ROWS=200) == 200
    assert rows(MIN_ROWS=400, MAX_ROWS=500) == 400
    assert rows(cap=20, MIN_ROWS=400) == 270
    assert rows(cap=20, MIN_ROWS=262) == 262
    assert rows(cap=20, WIDE_VALUES=1) == 32
    assert rows(cap=71) == 40  # 72 unknowns are wide
    assert rows(cap=72) == 288


def test_samples_limited_by_memory_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(build(CNN), tmp_path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(2), 0.5)
    found = random_calibration(model, 80)
    assert not [n for n in refit(model, coupling, keep, found).notes if "used" in n]
    sample = 4 * (8 * 64 + 8 * 64 + 12 * 16)
    limit = 5 * sample
    within = refit(model, coupling, keep, found, memory_limit=limit)
    assert not [n for n in within.notes if "used" in n]
    monkeypatch.setattr(partial_execution, "REPEATS", 0)
    notes = refit(model, coupling, keep, found, memory_limit=limit).notes
    assert len([n for n in notes if "least squares used" in n and "of 80 samples" in n]) == 1


def test_progress_counts_refitted_nodes(tmp_path: Path) -> None:
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    steps: list[tuple[str, int, int]] = []
    keep = without(coupling, "w1", [1])
    refit(
        model,
        coupling,
        keep,
        random_calibration(model, 30),
        progress=lambda *step: steps.append(step),
    )
    assert steps == [("refit", 1, 2), ("refit", 2, 2)]


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "half-precision")
    model = load(case.make(), tmp_path)
    coupling = couple(model)
    keep = without(coupling, coupling.groups[0].name, [0, 1, 2])
    found = dataset.load({"x": random_samples(model, 64)["x"]}, model)
    assert found is not None
    pruned = refit(model, coupling, keep, found)
    assert {v.dtype for v in constants(pruned.proto).values()} == {np.dtype(np.float16)}
    assert relative_error(model, pruned.proto, found) < relative_error(model, pruned.raw, found)


def test_normalisation_is_not_refitted(tmp_path: Path) -> None:
    """A node with a cut input and a gain whose name is not among those left out."""
    text = """(float[N,4,5] x) => (float[N,4,3] y) <float[5,12] w1, float[12] gain, float[12,3] w2> {
        h = MatMul(x, w1)
        r = LayerNormalization(h, gain)
        y = MatMul(r, w2)
    }"""
    model = load(build(text), tmp_path)
    pruned = refit(
        model, couple(model), without(couple(model), "w1", [1, 4]), random_calibration(model, 40)
    )
    assert len(pruned.fits) == 1
    assert not pruned.notes


# ------------------------------------------------------------------------------------------------- cache entries


def _first(proto: ModelProto, name: str) -> TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


CHANGES: dict[str, Callable[[ModelProto], object]] = {
    "an input's name": lambda p: setattr(p.graph.input[0], "name", "z"),
    "an output's name": lambda p: setattr(p.graph.output[0], "name", "z"),
    "an output more": lambda p: p.graph.output.append(p.graph.output[0]),
    "an opset": lambda p: setattr(p.opset_import[0], "version", 13),
    "a function": lambda p: p.functions.append(FunctionProto(name="f", domain="d")),
    "a shape": lambda p: _first(p, "w1").dims.reverse(),
    "a type": lambda p: setattr(_first(p, "w2"), "data_type", TensorProto.INT32),
    "data beside the file": lambda p: _first(p, "w2").external_data.append(
        StringStringEntryProto(key="location")
    ),
    "another operator": lambda p: setattr(p.graph.node[1], "op_type", "Sigmoid"),
    "a node less": lambda p: p.graph.node.pop(1),
    "another name of a tensor": lambda p: p.graph.node[1].output.__setitem__(0, "q"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graph_that_is_not_a_refit_is_refused(change: str, tmp_path: Path) -> None:
    """Other weights, a bias more, a weight of another name: that is a refit. Anything else is somebody's own file."""
    text = """(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {
        a = MatMul(x, w1)
        h = Relu(a)
        y = MatMul(h, w2)
    }"""
    model = load(build(text), tmp_path)
    coupling = couple(model)
    keep = without(coupling, "w1", range(4))
    raw = rewrite.cut(model, coupling, keep)
    samples_ = dataset.load({"x": random_samples(model, 40)["x"]}, model)
    assert samples_ is not None
    sampling = least_squares.Sampling(samples=samples_, device="cpu")
    found = least_squares.front(model, coupling, keep, raw, sampling, short=())
    assert found.proto != raw
    assert least_squares.is_valid_cache_entry(found, raw)
    assert least_squares.is_valid_cache_entry(Pruned(raw, raw), raw)
    other = ModelProto()
    other.CopyFrom(found.proto)
    CHANGES[change](other)
    assert other != found.proto
    assert not least_squares.is_valid_cache_entry(replace(found, proto=other), raw)
