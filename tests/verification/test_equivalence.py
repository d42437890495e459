"""Gates and measurements: differences are distinguished from agreement, and faults are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import objectives
import onnx
import pytest
from graphs import NETS, build, constants, load, samples
from onnx import ModelProto, numpy_helper

import onnx_oamip
from onnx_oamip.core.errors import GateFailed
from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Model,
    Objective,
    Scale,
    Term,
    Verification,
)
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.objective.metric import Metric
from onnx_oamip.verification import equivalence

ONES = Scale("auto", 1.0, np.ones(4), -1, np.ones((1, 2)))


def _changed(proto: ModelProto, name: str, value: Array) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(proto)
    for tensor in result.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return result


def _samples(model: Model, arrays: dict[str, Array]) -> Samples:
    found = dataset.load(arrays, model)
    assert found is not None
    return found


def _apart(reference: Session, other: Session, found: Samples, batch_size: int) -> float:
    return float(equivalence.differences(reference, other, found, batch_size).max())


def _compare(
    model: Model, before: ModelProto, after: ModelProto, found: Samples, batch_size: int
) -> Verification:
    model = models.rebind(model, found.bindings(model))
    objective = objectives.of_samples(model, found)
    sessions = [equivalence.watch(model, objective, "cpu", proto) for proto in (before, after)]
    return equivalence.compare(model, objective, *sessions, samples=found, batch_size=batch_size)


@pytest.fixture
def mlp(tmp_path: Path) -> Model:
    return load(build(NETS["mlp"]), tmp_path)


# -------------------------------------------------------------------------------------------------------- structure


def test_valid_graph_passes(mlp: Model) -> None:
    equivalence.structure(mlp.proto)


def test_contradictory_shapes_fail(mlp: Model) -> None:
    broken = _changed(mlp.proto, "w2", constants(mlp.proto)["w2"][:-1])
    with pytest.raises(GateFailed, match="fails the ONNX checker") as caught:
        equivalence.structure(broken)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_missing_tensor_fails(mlp: Model) -> None:
    broken = ModelProto()
    broken.CopyFrom(mlp.proto)
    del broken.graph.initializer[0]
    with pytest.raises(GateFailed):
        equivalence.structure(broken)


# ------------------------------------------------------------------------------------------------------- difference


def test_difference_is_relative_to_the_largest_output(mlp: Model) -> None:
    found = _samples(mlp, samples(mlp, 50))
    bias = constants(mlp.proto)["b3"]
    shift = np.asarray([0, 0.25, 0, -0.5], np.float32)
    other = Session(_changed(mlp.proto, "b3", bias + shift), "cpu")
    reference = Session(mlp.proto, "cpu")
    largest = np.abs(reference.run(found.feed(np.arange(50)))[0]).max()
    for batch_size in (7, 64):
        assert _apart(reference, reference, found, batch_size) == 0
        assert _apart(reference, other, found, batch_size) == pytest.approx(0.5 / largest, rel=1e-5)


def test_one_wrong_sample_fails_the_check(tmp_path: Path) -> None:
    """The largest difference counts, not an average over samples."""
    model = load(build("(float[N,3] x) => (float[N,3] y) <float[3] c> { y = Add(x, c) }"), tmp_path)
    text = """(float[N,3] x) => (float[N,3] y) <float[3] c, float limit = {90.0}, float one = {1.0}> {
        s = Add(x, c)
        far = Greater(x, limit)
        f = Cast<to = 1>(far)
        y = Add(s, f)
    }"""
    other = load(build(text), tmp_path)
    x = np.zeros((40, 3), np.float32)
    x[13, 2] = 100.0  # in the second of five batches
    apart = _apart(
        Session(model.proto, "cpu"), Session(other.proto, "cpu"), _samples(model, {"x": x}), 8
    )
    assert apart == pytest.approx(1.0 / (100.0 + constants(model.proto)["c"][2]), rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_values_never_agree(mlp: Model, value: float) -> None:
    bias = constants(mlp.proto)["b3"].copy()
    bias[1] = value
    other = Session(_changed(mlp.proto, "b3", bias), "cpu")
    found = _samples(mlp, samples(mlp, 5))
    assert _apart(Session(mlp.proto, "cpu"), other, found, 32) == float("inf")


def test_integer_outputs_must_be_equal(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,4] y, int64[N] z) <float[6,4] w>
    { y = MatMul(x, w)  z = ArgMax<axis = 1, keepdims = 0>(y) }"""
    model = load(build(text), tmp_path)
    found = _samples(model, samples(model, 30))
    reference = Session(model.proto, "cpu")
    other = Session(_changed(model.proto, "w", constants(model.proto)["w"][:, ::-1]), "cpu")
    assert _apart(reference, reference, found, 32) == 0
    assert _apart(reference, other, found, 32) == float("inf")


def test_outputs_of_zero_agree(tmp_path: Path) -> None:
    model = load(
        build(
            "(float[N,3] x) => (float[N,2] y) <float[3,2] w> { m = MatMul(x, w)  y = Sub(m, m) }"
        ),
        tmp_path,
    )
    other = load(
        build("(float[N,3] x) => (float[N,2] y) <float[3,2] w> { y = MatMul(x, w) }"), tmp_path
    )
    found = _samples(model, samples(model, 4))
    nothing = Session(model.proto, "cpu")
    assert _apart(nothing, nothing, found, 32) == 0
    assert _apart(nothing, Session(other.proto, "cpu"), found, 32) == float("inf")


def test_tolerance_follows_the_precision(tmp_path: Path, mlp: Model) -> None:
    assert equivalence.tolerance(mlp) == 1e-4
    half = load(build(NETS["mlp"].replace("float", "float16")), tmp_path)
    assert 1e-3 < equivalence.tolerance(half) < 0.1
    double = load(build(NETS["mlp"].replace("float", "double")), tmp_path)
    assert equivalence.tolerance(double) == 1e-4


# ------------------------------------------------------------------------------------------------------------ prove

SATURATED = """(float[N,9] x) => (float[N,7] y) <float[9,32] w1, float[32] b1, float[32,16] w2, float[16,7] w3> {{
    m1 = MatMul(x, w1)
    a1 = Add(m1, b1)
    r1 = Relu(a1)
    m2 = MatMul(r1, w2)
    r2 = Relu(m2)
    m3 = MatMul(r2, w3)
    {0}
}}"""
ENDS = {
    "as good as nought": "far = Constant<value = float {-20.0}>()  z = Add(m3, far)  y = Sigmoid(z)",
    "near nought": "far = Constant<value = float {-14.0}>()  z = Add(m3, far)  y = Sigmoid(z)",
    "near one": "far = Constant<value = float {30.0}>()  z = Add(m3, far)  y = Sigmoid(z)",
    "certain of a class": "far = Constant<value = float {300.0}>()  z = Mul(m3, far)  y = Softmax(z)",
    # What is left of a number when a much larger one was added to it and taken away again.
    "cancelled": "far = Constant<value = float {1e4}>()  z = Add(m3, far)  y = Sub(z, far)",
}


def _proof(end: str, folder: Path) -> tuple[Model, Coupling, Bools, Samples]:
    model = load(build(SATURATED.format(ENDS[end]), seed=3), folder)
    coupling = couple(model)
    assert coupling.n_units == 48
    keep = np.random.default_rng(0).random(48) < 0.7
    assert 24 < keep.sum() < 44
    return model, coupling, keep, _samples(model, samples(model, 8192))


@pytest.mark.parametrize("end", ENDS)
def test_correct_cut_is_proved_for_uninformative_outputs(end: str, tmp_path: Path) -> None:
    model, coupling, keep, found = _proof(end, tmp_path)
    masked, cut = rewrite.mask(model, coupling, keep), rewrite.cut(model, coupling, keep)
    # The same sums in another order, as another kernel may take them.
    weights = constants(cut)
    order = np.random.default_rng(1).permutation(weights["w1"].shape[1])
    for name, axis in (("w1", 1), ("b1", 0), ("w2", 0)):
        cut = _changed(cut, name, weights[name].take(order, axis))
    proof = equivalence.prove(model, masked, cut, found, 4096)
    assert proof.distance > 0
    if end == "cancelled":
        assert proof.rounding is not None
        assert (
            equivalence.TOLERANCE
            < proof.distance
            <= equivalence.ROUNDING * proof.rounding
            <= equivalence.ROUNDING_MOST
        )
    elif proof.distance > equivalence.TOLERANCE:
        assert proof.rounding is not None
        assert proof.distance <= equivalence.ROUNDING * proof.rounding
    else:
        assert proof.rounding is None


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "wrong", ["another unit", "its neighbour's bias", "rows in another order", "one weight"]
)
def test_wrong_cut_is_refused_for_uninformative_outputs(
    end: str, wrong: str, tmp_path: Path
) -> None:
    model, coupling, keep, found = _proof(end, tmp_path)
    masked, cut = rewrite.mask(model, coupling, keep), rewrite.cut(model, coupling, keep)
    if wrong == "another unit":
        other = keep.copy()
        inner = coupling.axes["w2", 0]
        gone, kept = inner[~keep[inner]][0], inner[keep[inner]][0]
        other[[gone, kept]] = [True, False]
        cut = rewrite.cut(model, coupling, other)
    elif wrong == "its neighbour's bias":
        cut = _changed(cut, "b1", np.roll(constants(cut)["b1"], 1))
    elif wrong == "rows in another order":
        cut = _changed(cut, "w3", constants(cut)["w3"][::-1])
    else:
        value = constants(cut)["w2"].copy()
        value[np.unravel_index(np.abs(value).argmax(), value.shape)] *= -1
        cut = _changed(cut, "w2", value)
    with pytest.raises(GateFailed, match="differs from the masked original") as caught:
        equivalence.prove(model, masked, cut, found, 4096)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_saturated_sigmoids_hide_a_wrong_cut(tmp_path: Path) -> None:
    """The gate needs tensors besides the outputs, which alone do not show this wrong cut."""
    model, coupling, keep, found = _proof("near one", tmp_path)
    masked, cut = rewrite.mask(model, coupling, keep), rewrite.cut(model, coupling, keep)
    wrong = _changed(cut, "w3", constants(cut)["w3"][::-1])
    assert _apart(Session(masked, "cpu"), Session(wrong, "cpu"), found, 32) <= equivalence.TOLERANCE
    with pytest.raises(GateFailed, match="scale of 'z'"):
        equivalence.prove(model, masked, wrong, found, 4096)


def test_rounding_larger_than_the_outputs_proves_nothing(tmp_path: Path) -> None:
    text = SATURATED.format(
        "far = Constant<value = float {1e8}>()  z = Add(m3, far)  y = Sub(z, far)"
    )
    model = load(build(text, seed=3), tmp_path)
    found = _samples(model, samples(model, 64))
    wrong = _changed(model.proto, "w3", constants(model.proto)["w3"][::-1])
    with pytest.raises(GateFailed, match="scale of 'y'"):
        equivalence.prove(model, model.proto, wrong, found, 32)


QUANTISED = """(float[N, 4] x) => (float[N, 3] y)
<float[4, 3] w, float s = {0.1}, uint8 z = {128}, float[3, 3] v> {
    a = MatMul(x, w)
    q = QuantizeLinear(a, s, z)
    d = DequantizeLinear(q, s, z)
    y = MatMul(d, v)
}"""


@pytest.mark.parametrize(("step", "holds"), [(2e-7, True), (2e-3, False)])
def test_code_near_a_tie_is_no_difference(step: float, holds: bool, tmp_path: Path) -> None:
    """A weight moved by rounding makes another code of a number between two; one moved further is a wrong cut."""
    proto = build(QUANTISED)
    weight = np.zeros((4, 3), np.float32)
    weight[0] = [0.25, 0.5, 1.0]
    proto = _changed(_changed(proto, "w", weight), "v", np.eye(3, dtype=np.float32))
    model = load(proto, tmp_path)
    x = np.zeros((6, 4), np.float32)
    x[:, 0] = np.float32(0.1) * np.asarray([1, 3, 5, 7, 9, 11], np.float32) / 2 / np.float32(0.5)
    moved = _changed(model.proto, "w", weight * np.float32(1 + step))
    found = _samples(model, {"x": x})
    sessions = [Session(p, "cpu", exact=True) for p in (model.proto, moved)]
    assert _apart(*sessions, found, 6) > 100 * equivalence.TOLERANCE  # a whole code
    if not holds:
        with pytest.raises(GateFailed, match="differs from the masked original"):
            equivalence.prove(model, model.proto, moved, found, 6)
        return
    proof = equivalence.prove(model, model.proto, moved, found, 6)
    assert proof.rounding == proof.distance > 100 * equivalence.TOLERANCE
    assert proof.is_unrounded


def test_proof_without_the_rounding_of_codes_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(build(QUANTISED), path)
    monkeypatch.setattr(
        equivalence, "prove", lambda *_, **__: equivalence.Proof(0.03, 0.03, is_unrounded=True)
    )
    x = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    without_data = {"importance": "l2", "allocate": "uniform", "refit": "none"}
    for data, settings in (({"x": x}, {}), (None, without_data)):
        caplog.clear()
        report = onnx_oamip.prune(path, data, macs=0.9, force=True, **settings).report
        (note,) = [note for note in report.notes if "rounded to codes" in note]
        assert note.startswith("the cut model differs from the masked original by 3.00e-02")
        assert note in caplog.messages


def test_every_output_is_checked_separately(tmp_path: Path) -> None:
    """A large output must not hide what is wrong in a small one."""
    text = """(float[N,6] x) => (float[N,4] y, float[N,4] z) <float[6,4] w, float[6,4] v, float far = {1e6}> {
        m = MatMul(x, w)  y = Mul(m, far)  z = MatMul(x, v)
    }"""
    model = load(build(text), tmp_path)
    found = _samples(model, samples(model, 30))
    wrong = _changed(model.proto, "v", constants(model.proto)["v"][::-1])
    with pytest.raises(GateFailed, match="scale of 'z'"):
        equivalence.prove(model, model.proto, wrong, found, 32)
    assert equivalence.prove(model, model.proto, model.proto, found, 32) == equivalence.Proof(
        0.0, None
    )


def test_masked_logits_are_equal(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,4] y) <float[6,4] w, float[4] never = {0, -inf, 0, 0}> {
        m = MatMul(x, w)  z = Add(m, never)  y = Softmax(z)
    }""".replace("-inf", "-3.4e38")
    model = load(build(text), tmp_path)
    model = replace(
        model, proto=_changed(model.proto, "never", np.asarray([0, -np.inf, 0, 0], np.float32))
    )
    found = _samples(model, samples(model, 30))
    assert equivalence.prove(model, model.proto, model.proto, found, 32) == equivalence.Proof(
        0.0, None
    )
    wrong = _changed(model.proto, "never", np.asarray([0, 0, -np.inf, 0], np.float32))
    with pytest.raises(GateFailed):
        equivalence.prove(model, model.proto, wrong, found, 32)


@pytest.mark.parametrize(
    ("old", "new", "sound"),
    [
        (-np.inf, -np.inf, True),
        (-np.inf, -3.0, False),
        (np.inf, -np.inf, False),
        (np.inf, np.nan, False),
        (np.inf, 3e38, True),  # an overflow that just is none any more
        (np.nan, 1.0, True),
    ],
)
def test_infinity_that_becomes_finite_is_a_difference(
    old: float, new: float, sound: bool, tmp_path: Path
) -> None:
    """A class that is ruled out in the original must stay so; what was no number at all may become anything."""
    text = """(float[N,6] x) => (float[N,4] y) <float[6,4] w, float[4] never = {0, 1, 0, 0}> {
        m = MatMul(x, w)  y = Add(m, never)
    }"""
    model = load(build(text), tmp_path)
    found = _samples(model, samples(model, 30))
    before, after = (
        _changed(model.proto, "never", np.asarray([0, value, 0, 0], np.float32))
        for value in (old, new)
    )
    objective = Objective((Term("y", "y", "y", "values", 1, scale=ONES),))
    sessions = [equivalence.watch(model, objective, "cpu", proto) for proto in (before, after)]
    compared = equivalence.compare(model, objective, *sessions, samples=found, batch_size=8)
    if sound:
        equivalence.numbers(model, compared)
        assert compared.output_relative_error == 0
    else:
        with pytest.raises(GateFailed, match="or the other way round"):
            equivalence.numbers(model, compared)


def test_weights_are_moved_by_one_unit_in_the_last_place(mlp: Model) -> None:
    before, after = constants(mlp.proto), constants(equivalence.rounded(mlp, mlp.proto, 0))
    for name, value in before.items():
        if value.ndim > 1:
            moved = np.abs(after[name].astype(np.float64) - value) / np.spacing(np.abs(value))
            assert moved.max() <= 2
            assert (moved > 0).mean() > 0.9
        else:
            assert (after[name] == value).all()
    again, other = (
        constants(equivalence.rounded(mlp, mlp.proto, 0)),
        constants(equivalence.rounded(mlp, mlp.proto, 1)),
    )
    assert (again["w1"] == after["w1"]).all()
    assert (other["w1"] != after["w1"]).any()


# ---------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_compare_against_numpy(mlp: Model, batch_size: int) -> None:
    rng = np.random.default_rng(2)
    arrays = samples(mlp, 50)
    labels = rng.integers(0, 4, 50)
    found = _samples(mlp, {**arrays, "labels": labels})
    weight = constants(mlp.proto)["w3"]
    other = _changed(
        mlp.proto, "w3", weight + 0.5 * rng.standard_normal(weight.shape).astype(np.float32)
    )
    before, after = Session(mlp.proto, "cpu"), Session(other, "cpu")
    a, b = (s.run(arrays)[0].astype(np.float64) for s in (before, after))
    result = _compare(mlp, mlp.proto, other, found, batch_size)
    assert result.samples == 50
    assert result.output_relative_error == pytest.approx(
        np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-4
    )
    assert result.agreement == (a.argmax(1) == b.argmax(1)).mean()
    assert result.accuracy_before == (a.argmax(1) == labels).mean()
    assert result.accuracy_after == (b.argmax(1) == labels).mean()
    assert 0 < result.agreement < 1
    assert result.masked_equivalence is None


def test_model_agrees_with_itself(mlp: Model) -> None:
    result = _compare(mlp, mlp.proto, mlp.proto, _samples(mlp, samples(mlp, 9)), 4)
    assert (result.output_relative_error, result.agreement) == (0, 1)
    assert (result.accuracy_before, result.accuracy_after) == (None, None)


@pytest.mark.parametrize(("axes", "shape"), [("[2, 1, 4]", (5, 2, 1, 4)), ("[1, 2, 4]", (5, 2, 4))])
def test_metric_reads_one_entry_per_sample_of_a_fixed_batch(
    axes: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Axis 0 of a recurrent state counts directions: entries of several samples are not joined along it."""
    sizes = axes.strip("[]")
    text = f"""(float[1,8] x) => (float[{sizes}] y) <float[8,8] w, int64[3] s = {{{sizes}}}> {{
        a = MatMul(x, w) y = Reshape(a, s) }}"""
    model = load(build(text), tmp_path)
    seen: list[tuple[int, ...]] = []

    def shape_of(outputs: dict[str, Array], labels: Array | None) -> float:
        assert labels is None
        seen.append(outputs["y"].shape)
        return 1.0

    metric = Metric("m:shape_of", shape_of)
    found = _samples(model, {"x": np.ones((5, 8), np.float32)})
    equivalence.user_metric(metric, model, model.proto, samples=found, device="cpu", batch_size=2)
    assert seen == [shape, shape]


def test_model_without_classes_has_no_agreement(tmp_path: Path) -> None:
    model = load(
        build(
            "(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w> { c = Conv(x, w) y = Tanh(c) }"
        ),
        tmp_path,
    )
    result = _compare(model, model.proto, model.proto, _samples(model, samples(model, 3)), 4)
    assert result.agreement is None
    assert result.output_relative_error == 0


def test_agreement_names_its_term_where_there_are_several(mlp: Model, tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[] b, float[] a) <float[6,2] v, float[6,4] w> {
        m = MatMul(x, v) b = Sigmoid(m) l = MatMul(x, w) a = Softmax(l) }"""
    model = load(build(text), tmp_path)
    found = _samples(model, samples(model, 30))
    other = _changed(model.proto, "w", constants(model.proto)["w"][::-1])
    result = _compare(model, model.proto, other, found, 8)
    assert result.agreement_of == "a"  # classes go before independent decisions
    assert result.agreement == {m.term: m.values["agreement"] for m in result.outputs}["a"]
    assert f"agreement of 'a' {result.agreement:.2%}" in result.sentence
    single = _compare(mlp, mlp.proto, mlp.proto, _samples(mlp, samples(mlp, 9)), 4)
    assert single.agreement_of == "y"
    assert "agreement 100.00%" in single.sentence


def test_labels_of_whole_feeds_count_every_row(mlp: Model) -> None:
    arrays = samples(mlp, 24)
    session = Session(mlp.proto, "cpu")
    truth = session.run(arrays)[0].argmax(1)
    whole = {"x": arrays["x"].reshape(6, 4, 6), "labels": truth.reshape(6, 4)}
    result = _compare(mlp, mlp.proto, mlp.proto, _samples(mlp, whole), 32)
    assert (result.accuracy_before, result.accuracy_after) == (1, 1)


# ---------------------------------------------------------------------------------------------------------- runs_at


def test_free_batch_is_checked_at_two_sizes(mlp: Model, tmp_path: Path) -> None:
    session = Session(mlp.proto, "cpu")
    assert equivalence.runs_at(mlp, session, _samples(mlp, samples(mlp, 5))) == (1, 2)
    # One sample is enough: it is fed twice.
    assert equivalence.runs_at(mlp, session, _samples(mlp, samples(mlp, 1))) == (1, 2)
    whole = {"x": samples(mlp, 6)["x"].reshape(2, 3, 6)}
    assert equivalence.runs_at(mlp, session, _samples(mlp, whole)) == (1,)
    fixed = load(build(NETS["mlp"].replace("N,", "4,")), tmp_path)
    four = _samples(fixed, {"x": np.zeros((9, 6), np.float32)})
    assert equivalence.runs_at(fixed, Session(fixed.proto, "cpu"), four) == (4,)


def test_lost_rows_fail(mlp: Model, tmp_path: Path) -> None:
    short = load(
        build(
            "(float[N,6] x) => (float[N,4] y)"
            " <float[6,4] w, int64[1] from = {0}, int64[1] to = {1}, int64[1] at = {0}>"
            " { m = MatMul(x, w)  y = Slice(m, from, to, at) }"
        ),
        tmp_path,
    )
    with pytest.raises(GateFailed, match="gives 1 rows in 'y' for a batch of 2"):
        equivalence.runs_at(mlp, Session(short.proto, "cpu"), _samples(mlp, samples(mlp, 5)))


def test_nan_outputs_fail(mlp: Model) -> None:
    bias = constants(mlp.proto)["b3"].copy()
    bias[0] = np.nan
    broken = Session(_changed(mlp.proto, "b3", bias), "cpu")
    with pytest.raises(GateFailed, match="NaN or infinity in 'y'"):
        equivalence.runs_at(mlp, broken, _samples(mlp, samples(mlp, 5)))


def test_checker_sees_the_final_model(mlp: Model) -> None:
    """The full check infers shapes: a declared output that cannot be is refused too."""
    broken = ModelProto()
    broken.CopyFrom(mlp.proto)
    broken.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.checker.check_model(broken)
    with pytest.raises(GateFailed):
        equivalence.structure(broken)
