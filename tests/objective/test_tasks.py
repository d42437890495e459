"""Small networks of tasks other than plain classification, pruned by the default path: no output is lost unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build
from heads import replace_weight
from onnx import ModelProto

from onnx_oamip import prune
from onnx_oamip.core.errors import BudgetNotMet, DataError
from onnx_oamip.core.records import Array, Floats, Measure, Report
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session

RNG = np.random.default_rng(5)
MAPS = RNG.standard_normal((160, 3, 8, 8)).astype(np.float32)
ROWS = RNG.standard_normal((900, 12)).astype(np.float32)

TRUNK = """a1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1, b1)
    a = Relu(a1)
    c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a, w2, b2)
    c = Relu(c1)"""
TRUNK_WEIGHTS = "float[12,3,3,3] w1, float[12] b1, float[24,12,3,3] w2, float[24] b2"


def _pruned(
    proto: ModelProto, data: Mapping[str, Array], folder: Path, **options: object
) -> Report:
    onnx.save(proto, folder / "model.onnx")
    given = {"align": 1, "device": "cpu", "workers": 1, "force": True, **options}
    if "max_drop" not in options:
        given.setdefault("macs", 0.5)
    return prune(folder / "model.onnx", data, folder / "out.onnx", Settings.create(**given))


def _both(folder: Path, feed: Mapping[str, Array], *tensors: str) -> list[tuple[Array, Array]]:
    """Tensors of the original and of the pruned model on the same samples."""
    values = []
    for name in ("model.onnx", "out.onnx"):
        model = models.load(folder / name)
        values.append(Session(with_outputs(model, list(tensors)), "cpu").run(feed, list(tensors)))
    return list(zip(*values, strict=True))


def _measure(report: Report, term: str) -> Measure:
    (found,) = (m for m in report.verification.outputs if m.term == term)
    return found


def _r2(before: Array, after: Array) -> Floats:
    """R2 by column of the last axis."""
    old = before.reshape(-1, before.shape[-1]).astype(np.float64)
    error = np.square(old - after.reshape(old.shape)).mean(axis=0)
    return np.asarray(1 - error / old.var(axis=0))


# ------------------------------------------------------------------------------------------------------- detectors


def test_detector_that_ends_in_suppression_keeps_boxes_and_scores(tmp_path: Path) -> None:
    """The number of boxes differs by image and by model, so the inputs of the suppression are compared."""
    proto = build(
        f"""(float[1,3,8,8] x) => (float[n,4] found, int64[n,3] sel)
        <{TRUNK_WEIGHTS}, float[4,24,1,1] wb, float[2,24,1,1] ws, int64[3] sb = {{1,4,16}}, int64[3] ss = {{1,2,16}},
         int64 most = {{20}}, float iou = {{0.5}}, float low = {{0.55}}, int64[1] two = {{2}}, int64[1] one = {{1}},
         int64[1] zero = {{0}}> {{
            {TRUNK}
            pb = Conv(c, wb) fb = Reshape(pb, sb) tb = Transpose <perm = [0, 2, 1]> (fb) boxes = Sigmoid(tb)
            ps = Conv(c, ws) logits = Reshape(ps, ss) scores = Sigmoid(logits)
            sel = NonMaxSuppression(boxes, scores, most, iou, low)
            id = Gather <axis = 1> (sel, two) index = Squeeze(id, one) flat = Squeeze(boxes, zero)
            found = Gather <axis = 0> (flat, index)
        }}"""
    )
    data = MAPS[:80, None]
    report = _pruned(proto, {"x": data}, tmp_path, macs=0.6)
    kinds = {term.tensor: term.kind for term in report.objective.judged}
    assert kinds == {"boxes": "values", "logits": "binary"}
    held = [_both(tmp_path, {"x": image}, "boxes", "scores") for image in MAPS[130:, None]]
    boxes, scores = (
        tuple(np.concatenate([run[i][side] for run in held]) for side in range(2)) for i in range(2)
    )
    assert _r2(*boxes).min() > 0.5
    assert ((scores[0] > 0.55) == (scores[1] > 0.55)).mean() > 0.85


@pytest.mark.parametrize("split", [False, True])
def test_scores_survive_beside_boxes_in_pixels(split: bool, tmp_path: Path) -> None:
    outs = "float[] box, float[] cls" if split else "float[N,10,16] y"
    proto = build(
        f"""(float[N,3,8,8] x) => ({outs})
        <{TRUNK_WEIGHTS}, float[16,24,3,3] wb, float[4,16,1,1] wb2, float[16,24,3,3] wc, float[6,16,1,1] wc2,
         int64[3] sb = {{0,4,16}}, int64[3] sc = {{0,6,16}}, float px = {{640.0}}> {{
            {TRUNK}
            d1 = Conv <pads = [1, 1, 1, 1]> (c, wb) d = Relu(d1) e1 = Conv(d, wb2) e2 = Sigmoid(e1)
            e3 = Reshape(e2, sb) box = Mul(e3, px)
            f1 = Conv <pads = [1, 1, 1, 1]> (c, wc) f = Relu(f1) g1 = Conv(f, wc2) g2 = Sigmoid(g1)
            cls = Reshape(g2, sc)
            {"" if split else "y = Concat <axis = 1> (box, cls)"}
        }}"""
    )
    report = _pruned(proto, {"x": MAPS[:120]}, tmp_path)
    assert sorted(term.kind for term in report.objective.judged) == ["binary", "values"]
    (box, scores) = _both(tmp_path, {"x": MAPS[120:]}, "box", "cls")
    assert _r2(*(v.transpose(0, 2, 1) for v in scores)).min() > 0.6
    assert _r2(*(v.transpose(0, 2, 1) for v in box)).min() > 0.6


def test_class_behind_a_box_is_what_agreement_is_about(tmp_path: Path) -> None:
    """Half of the units serve the class alone, half the box alone; the box is the first output [N, 4]."""
    proto = build(
        """(float[N,12] x) => (float[] box, float[] cls)
        <float[12,48] w, float[48,4] wb, float[48,2] wc> {
            a = MatMul(x, w) r = Relu(a) box = MatMul(r, wb) l = MatMul(r, wc) cls = Softmax <axis = -1> (l)
        }"""
    )
    weight = np.random.default_rng(0).standard_normal((48, 4)).astype(np.float32)
    classes = np.arange(48) < 24
    replace_weight(proto, "wb", 0.05 * weight * ~classes[:, None])
    replace_weight(proto, "wc", 2 * weight[:, :2] * classes[:, None])
    report = _pruned(proto, {"x": ROWS[:400], "eval.x": ROWS[400:]}, tmp_path)
    box, cls = _both(tmp_path, {"x": ROWS[400:]}, "box", "cls")
    same = float((cls[0].argmax(1) == cls[1].argmax(1)).mean())
    assert report.verification.agreement == pytest.approx(same, abs=1e-9)
    assert same > 0.9
    assert _r2(*box).min() > 0.5


# ------------------------------------------------------------------------------------------- decisions as whole numbers


@pytest.mark.parametrize("kind", ["map", "tokens"])
def test_argmax_at_the_end_changes_no_choice(kind: str, tmp_path: Path) -> None:
    """The same units are removed as without it, and the agreement is that of all positions."""
    kept, shares = [], []
    for tail in ("y = Identity(l)", "y = ArgMax <axis = AXIS, keepdims = 0> (l)"):
        out = "float[]" if "Identity" in tail else "int64[]"
        if kind == "map":
            text = f"""(float[N,3,8,8] x) => ({out} y) <{TRUNK_WEIGHTS}, float[5,24,1,1] w3> {{
                {TRUNK} l = Conv(c, w3) {tail} }}"""
        else:
            text = f"""(float[N,8,12] x) => ({out} y) <float[12,32] w1, float[32,48] w2, float[48,5] w3> {{
                a = MatMul(x, w1) b = Relu(a) d = MatMul(b, w2) c = Relu(d) l = MatMul(c, w3) {tail} }}"""
        axis = 1 if kind == "map" else 2
        data = MAPS if kind == "map" else ROWS.reshape(-1, 12)[:896].reshape(112, 8, 12)
        folder = tmp_path / out
        folder.mkdir()
        options = {"macs": 0.5, "outputs": {"y": "classes"} if out == "float[]" else {}}
        count = len(data) * 3 // 4
        given = {"x": data[:count], "eval.x": data[count:]}
        report = _pruned(build(text.replace("AXIS", str(axis))), given, folder, **options)
        ((before, after),) = _both(folder, {"x": data[count:]}, "l")
        shares.append(float((before.argmax(axis) == after.argmax(axis)).mean()))
        kept.append(report.plan.widths.tolist())
        assert report.verification.agreement == pytest.approx(shares[-1], abs=1e-9)
    assert kept[0] == kept[1]
    assert min(shares) > 0.7


def test_max_drop_of_a_segmenter_that_ends_in_argmax_bounds_its_pixels(tmp_path: Path) -> None:
    proto = build(
        f"""(float[N,3,8,8] x) => (int64[] y) <{TRUNK_WEIGHTS}, float[5,24,1,1] w3> {{
        {TRUNK} l = Conv(c, w3) y = ArgMax <axis = 1, keepdims = 0> (l) }}"""
    )
    report = _pruned(proto, {"x": MAPS[:120]}, tmp_path, max_drop=4)
    ((before, after),) = _both(tmp_path, {"x": MAPS[120:]}, "y")
    assert report.after.macs < report.before.macs
    assert (before == after).mean() > 0.9


# --------------------------------------------------------------------------------------------------------- regression


def test_max_drop_of_a_regression_bounds_the_error_of_every_column(tmp_path: Path) -> None:
    """Two targets of which the second is always the larger: their argmax never changes."""
    proto = build(
        """(float[N,12] x) => (float[N,2] y)
        <float[12,40] w1, float[40] b1, float[40,40] w2, float[40] b2, float[40,2] w3, float[2] b3 = {35.0, 75.0}> {
            a = Gemm(x, w1, b1) h = Relu(a) b = Gemm(h, w2, b2) r = Relu(b) l = MatMul(r, w3) y = Add(l, b3)
        }"""
    )
    report = _pruned(proto, {"x": ROWS[:600]}, tmp_path, max_drop=1)
    ((before, after),) = _both(tmp_path, {"x": ROWS[600:]}, "y")
    assert (before.argmax(1) == 1).mean() > 0.99
    assert 0.1 * report.before.macs < report.after.macs < report.before.macs
    assert _r2(before, after).min() > 0.96
    measure = _measure(report, "y")
    assert measure.lost <= 1
    assert measure.measure.startswith("error over variance")


# ---------------------------------------------------------------------------------------------- unusual types and sizes

PLAIN = """(float[N,16] x) => (float[N,5] y)
    <float[16,32] w1, float[32] b1, float[32,24] w2, float[24] b2, float[24,5] w3> {
    h1 = Gemm(x, w1, b1) r1 = Relu(h1) h2 = Gemm(r1, w2, b2) r2 = Relu(h2) y = MatMul(r2, w3) }"""
WIDE_ROWS = RNG.standard_normal((100, 16)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_any_number_of_samples_is_enough(count: int, tmp_path: Path) -> None:
    report = _pruned(build(PLAIN), {"x": WIDE_ROWS[:count]}, tmp_path)
    assert report.after.macs <= 0.5 * report.before.macs
    assert report.verification.failures == ()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (RNG.integers(0, 2, (100, 5)), "one class per sample"),
        (RNG.random(100), "integers"),
        (RNG.integers(1, 6, 100), "count from 0"),
    ],
    ids=["several per sample", "floats", "from one"],
)
def test_labels_that_fit_no_output_are_refused(labels: Array, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        _pruned(build(PLAIN), {"x": WIDE_ROWS, "labels": labels}, tmp_path)
    assert not (tmp_path / "out.onnx").exists()


def test_channels_that_go_into_a_sequence_are_refused_by_name(tmp_path: Path) -> None:
    text = PLAIN.replace(
        "h2 = Gemm(r1,",
        "k = Cast <to = 7> (half) s = SplitToSequence <axis = 1> (r1, k) j = ConcatFromSequence <axis = 1> (s)"
        " h2 = Gemm(j,",
    )
    text = text.replace("float[16,32] w1", "float half = {16.0}, float[16,32] w1")
    with pytest.raises(BudgetNotMet, match="SplitToSequence"):
        _pruned(build(text), {"x": WIDE_ROWS}, tmp_path)
    assert not (tmp_path / "out.onnx").exists()


def test_labels_of_pixels_give_an_accuracy_of_pixels(tmp_path: Path) -> None:
    proto = build(
        f"(float[N,3,8,8] x) => (float[] y) <{TRUNK_WEIGHTS}, float[4,24,1,1] w3> {{ {TRUNK} y = Conv(c, w3) }}"
    )
    labels = Session(proto, "cpu").run({"x": MAPS}, ["y"])[0].argmax(1)
    report = _pruned(proto, {"x": MAPS, "labels": labels}, tmp_path)
    assert report.verification.accuracy_before == 1.0
    assert report.verification.accuracy_after == pytest.approx(report.verification.agreement)
    assert report.verification.accuracy_after is not None
    assert 0.6 < report.verification.accuracy_after < 1.0
