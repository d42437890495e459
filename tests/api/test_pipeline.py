"""The whole way: what is reported is what was written, gates fail when they must, and then nothing is written."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import NETS, build, constants, load
from onnx import ModelProto, numpy_helper
from rich.console import Console

from onnx_oamip import compare, prune
from onnx_oamip.api import pipeline, proof
from onnx_oamip.artifacts import output, provenance
from onnx_oamip.core.errors import (
    BudgetNotMet,
    DataError,
    GateFailed,
    OutputError,
    SettingsError,
)
from onnx_oamip.core.records import Array, Report
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost, external_data
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.reporting.documents import document
from onnx_oamip.reporting.tables import show
from onnx_oamip.verification.latency import Ratio

TEXT = """(float[batch,3,8,8] image) => (float[batch,5] scores)
<float[24,3,3,3] w1, float[24] b1, float[32,24,3,3] w2, float[32] gain, float[32] b2, float[32] m, float[32] var,
 float[24,32,3,3] w3, float[40,24,1,1] w4, float[40,5] w5, float[5] b5> {
    a = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
    h = Relu(a)
    b = Conv<pads = [1, 1, 1, 1]>(h, w2)
    n = BatchNormalization(b, gain, b2, m, var)
    r = Relu(n)
    c = Conv<pads = [1, 1, 1, 1]>(r, w3)
    s = Add(h, c)
    p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(s)
    d = Conv(p, w4)
    t = Relu(d)
    g = GlobalAveragePool(t)
    f = Flatten(g)
    scores = Gemm(f, w5, b5)
}"""


def settings(**values: object) -> Settings:
    """Choices that take no time and do not depend on the machine."""
    quick = {
        "importance": "activation",
        "allocate": "uniform",
        "refit": "bias",
        "align": 1,
        "device": "cpu",
    }
    return Settings.create(**{**quick, **values})


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with model.onnx and data.npz."""
    proto = build(TEXT)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 3, 8, 8)).astype(np.uint8)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    held = rng.integers(0, 256, (25, 3, 8, 8)).astype(np.uint8)
    values = held.astype(np.float32) / np.float32(128) - np.float32(1)
    labels = session.run(None, {"image": values})[0].argmax(1)
    labels[:5] = (labels[:5] + 1) % 5
    np.savez(
        tmp_path / "data.npz",
        **{
            "image": images,
            "image.scale": np.float32(1 / 128),
            "image.offset": np.float32(-1),
            "eval.image": held,
            "eval.labels": labels,
        },
    )
    return tmp_path


def _prune(task: Path, **values: object) -> Report:
    return prune(
        task / "model.onnx",
        task / "data.npz",
        task / "out.onnx",
        settings(**{"macs": 0.5, **values}),
    )


def _untouched(task: Path, *also: str) -> None:
    """Nothing but the inputs is there: no output, no temporary files."""
    assert sorted(p.name for p in task.iterdir()) == sorted(["data.npz", "model.onnx", *also])


# -------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize(("refit", "names"), [("bias", 1), ("bias", 30), ("none", 1)])
def test_note_states_calibration_samples_of_a_single_group(
    task: Path, refit: str, names: int
) -> None:
    """Only where a refit is measured: it is measured on the group to which it was fitted."""
    with np.load(task / "data.npz") as stored:
        np.savez(task / "data.npz", **stored, groups=np.arange(60) % names)
    notes = _prune(task, refit=refit).notes
    stated = [note for note in notes if "all calibration samples are of one group" in note]
    assert len(stated) == (refit != "none" and names == 1)


def test_report_matches_the_written_file(task: Path) -> None:
    report = _prune(task)
    path = task / "out.onnx"
    written = models.load(path)
    original = models.load(task / "model.onnx")
    counted = cost.count(written)
    assert (report.after.macs, report.after.params) == (counted.macs, counted.params)
    assert report.after.bytes == path.stat().st_size
    assert report.before.macs == cost.count(original).macs
    assert report.before.bytes == (task / "model.onnx").stat().st_size
    assert report.output == str(path)
    assert report.output_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert 0.48 <= report.after.macs / report.before.macs <= 0.5
    assert report.plan.predicted.macs == report.after.macs
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence <= 1e-5
    assert report.verification.batches == (1, 2)
    assert report.verification.samples == 25
    assert report.verification.failures == ()
    assert all(seconds >= 0 for seconds in report.timings.values())
    _untouched(task, "out.onnx")


def test_written_file_runs_in_a_plain_session(task: Path) -> None:
    _prune(task)
    session = onnxruntime.InferenceSession(
        str(task / "out.onnx"), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(1)
    for batch in (1, 7):
        (scores,) = session.run(
            None, {"image": rng.standard_normal((batch, 3, 8, 8)).astype(np.float32)}
        )
        assert scores.shape == (batch, 5)
        assert np.isfinite(scores).all()
    (port,) = session.get_inputs()
    assert (port.name, port.shape) == ("image", ["batch", 3, 8, 8])
    onnx.checker.check_model(str(task / "out.onnx"), full_check=True)


def test_measurements_match_the_written_file(task: Path) -> None:
    report = _prune(task)
    with np.load(task / "data.npz") as stored:
        images = stored["eval.image"].astype(np.float32) / np.float32(128) - np.float32(1)
        labels = stored["eval.labels"]
    before, after = (
        onnxruntime.InferenceSession(str(task / name)).run(None, {"image": images})[0]
        for name in ("model.onnx", "out.onnx")
    )
    found = report.verification
    assert found.accuracy_before == (before.argmax(1) == labels).mean() == 0.8
    assert found.accuracy_after == (after.argmax(1) == labels).mean()
    assert found.agreement == (before.argmax(1) == after.argmax(1)).mean()
    error = np.linalg.norm(before.astype(np.float64) - after) / np.linalg.norm(
        before.astype(np.float64)
    )
    assert found.output_relative_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    "chosen", [{}, {"importance": "l2", "allocate": "global"}, {"importance": "random", "seed": 3}]
)
def test_repeated_run_is_byte_identical(task: Path, chosen: dict[str, object]) -> None:
    first = _prune(task, **chosen)
    content = (task / "out.onnx").read_bytes()
    second = _prune(task, **chosen)
    assert (task / "out.onnx").read_bytes() == content
    assert first.output_sha256 == second.output_sha256
    np.testing.assert_array_equal(first.scores.values, second.scores.values)


def test_seed_changes_random_importance(task: Path) -> None:
    one, two = (_prune(task, importance="random", seed=s).output_sha256 for s in (1, 2))
    assert one != two


def test_refit_improves_the_pruned_model(task: Path) -> None:
    without, with_it = (
        _prune(task, importance="l2", refit=r).verification for r in ("none", "bias")
    )
    assert without.output_relative_error is not None
    assert with_it.output_relative_error is not None
    assert with_it.output_relative_error < 0.9 * without.output_relative_error
    # Both were proven before any refit.
    assert without.masked_equivalence == with_it.masked_equivalence


@pytest.mark.parametrize(
    "shares", [{"params": 0.4}, {"size": 0.4}, {"macs": 0.7, "params": 0.5, "size": 0.6}]
)
def test_written_file_meets_every_budget(task: Path, shares: dict[str, float]) -> None:
    report = _prune(task, **{"macs": None, **shares})
    kept = {
        "macs": report.after.macs / report.before.macs,
        "params": report.after.params / report.before.params,
        "size": report.after.bytes / report.before.bytes,
    }
    assert all(kept[name] <= share for name, share in shares.items())
    assert max(kept[name] / share for name, share in shares.items()) >= 0.96


def test_nothing_is_written_without_an_output(task: Path) -> None:
    report = prune(task / "model.onnx", task / "data.npz", None, settings(macs=0.5))
    assert (report.output, report.output_sha256) == (None, None)
    _untouched(task)


def test_budget_of_one_changes_nothing(task: Path) -> None:
    report = _prune(task, macs=1.0)
    assert report.plan.keep.all()
    before, after = (constants(onnx.load(task / name)) for name in ("model.onnx", "out.onnx"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
    assert report.verification.output_relative_error == 0


def test_excluded_weights_keep_their_shape(task: Path) -> None:
    _prune(task, macs=0.7, exclude=("w4",))
    held = constants(onnx.load(task / "out.onnx"))
    assert held["w4"].shape == (40, 24, 1, 1)
    assert held["w2"].shape[0] < 32


def test_written_widths_are_aligned(task: Path) -> None:
    _prune(task, align=8)
    held = constants(onnx.load(task / "out.onnx"))
    assert [held[w].shape[0] % 8 for w in ("w1", "w2", "w3", "w4")] == [0, 0, 0, 0]


def test_without_data_scores_use_weights_only(task: Path) -> None:
    chosen = settings(macs=0.5, importance="l2", refit="none")
    report = prune(task / "model.onnx", None, task / "out.onnx", chosen)
    assert report.verification.masked_equivalence is not None
    assert report.verification.masked_equivalence <= 1e-5
    assert report.verification.samples == 0
    assert report.verification.accuracy_after is None


def test_separate_evaluation_data_is_used(task: Path) -> None:
    rng = np.random.default_rng(5)
    held = {"image": rng.standard_normal((9, 3, 8, 8)).astype(np.float32)}
    report = prune(task / "model.onnx", task / "data.npz", None, settings(macs=0.5), eval_data=held)
    assert report.verification.samples == 9
    assert report.verification.accuracy_before is None


def test_fifth_of_samples_is_held_out_without_evaluation_data(task: Path) -> None:
    rng = np.random.default_rng(5)
    arrays = {"image": rng.standard_normal((50, 3, 8, 8)).astype(np.float32)}
    report = prune(task / "model.onnx", arrays, None, settings(macs=0.5))
    assert report.verification.samples == 10


def test_progress_names_each_stage(task: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prune(
        task / "model.onnx",
        task / "data.npz",
        None,
        settings(macs=0.5),
        progress=lambda *s: seen.append(s),
    )
    assert {"calibrate", "verify"} <= {name for name, _, _ in seen}
    assert all(0 < done <= total for _, done, total in seen)


def test_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(
        build(NETS["mlp"].replace("N,", "4,")).SerializeToString()
    )
    rng = np.random.default_rng(0)
    report = prune(
        tmp_path / "model.onnx",
        {"x": rng.standard_normal((40, 6)).astype(np.float32)},
        tmp_path / "out.onnx",
        settings(macs=0.6),
    )
    assert report.verification.batches == (4,)
    (port,) = onnxruntime.InferenceSession(str(tmp_path / "out.onnx")).get_inputs()
    assert port.shape == [4, 6]
    # MACs are those of one sample.
    assert report.before.macs == 232


# ------------------------------------------------------------------------------------------------------- gates fail


def _corrupt(name: str, change: Callable[[Array], Array]) -> Callable[..., ModelProto]:
    genuine = rewrite.cut

    def cut(*arguments: object) -> ModelProto:
        proto = genuine(*arguments)
        for tensor in proto.graph.initializer:
            if tensor.name == name:
                value = np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy()))
                tensor.CopyFrom(numpy_helper.from_array(value, name))
        return proto

    return cut


def _bump(value: Array) -> Array:
    value.reshape(-1)[0] += 1
    return value


def _not_a_number(value: Array) -> Array:
    value.reshape(-1)[0] = np.nan
    return value


CORRUPTIONS = {
    "one weight": (_corrupt("w2", _bump), "differs from the masked original"),
    "one bias": (_corrupt("b5", _bump), "differs from the masked original"),
    "swapped channels": (_corrupt("w4", lambda v: v[:, ::-1]), "differs from the masked original"),
    "a shape": (_corrupt("w5", lambda v: v[:-1]), "fails the ONNX checker"),
    # Shape inference does not look at the channels of a convolution: it shows when the model runs.
    "a shape that shows late": (_corrupt("w4", lambda v: v[:, :-1]), "the (cut|pruned) model"),
    "a value": (_corrupt("b5", _not_a_number), "differs from the masked original by inf"),
    "nothing removed": (lambda model, *_: model.proto, "keeps 1.0000 of its MACs"),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("exists", [False, True])
def test_corrupted_cut_is_never_written(
    task: Path, monkeypatch: pytest.MonkeyPatch, kind: str, exists: bool
) -> None:
    cut, part = CORRUPTIONS[kind]
    if exists:
        (task / "out.onnx").write_bytes(b"what was there before")
    monkeypatch.setattr(rewrite, "cut", cut)
    with pytest.raises(GateFailed, match=part) as caught:
        _prune(task, refit="none")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    if exists:
        assert (task / "out.onnx").read_bytes() == b"what was there before"
    _untouched(task, *(["out.onnx"] if exists else []))


def test_model_without_batch_axis_is_never_written(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = rewrite.cut

    def cut(*arguments: object) -> ModelProto:
        proto = genuine(*arguments)
        for node in proto.graph.node:
            if node.op_type == "Flatten":
                node.ClearField("attribute")
                node.op_type = "Reshape"
                node.input.append("flat")
        width = next(t.dims[0] for t in proto.graph.initializer if t.name == "w5")
        proto.graph.initializer.append(
            numpy_helper.from_array(np.asarray([1, width], np.int64), "flat")
        )
        return proto

    monkeypatch.setattr(rewrite, "cut", cut)
    # Right at batch 1, where the shapes are known; it cannot run at any other.
    with pytest.raises(GateFailed):
        _prune(task, refit="none")
    _untouched(task)


def test_latency_is_measured_in_rounds(task: Path, measured_latency: None) -> None:
    found = _prune(task, force=True).verification.latency
    assert found is not None
    assert found.rounds >= 5
    assert 0 < found.low <= found.median <= found.high
    assert found.median != 0.5, "the constant of other tests"


def test_latency_in_doubt_is_measured_again_and_then_not_shown(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsure = Ratio(0.05, 0.02, 0.99, 9)
    seconds: list[float] = []

    def measured(*_: object, **options: float) -> Ratio:
        seconds.append(options["seconds"])
        return found.pop(0)

    monkeypatch.setattr(proof, "compare_latency", measured)
    found = [unsure, Ratio(0.5, 0.4, 0.6, 9)]
    report = _prune(task)
    assert seconds == list(proof.GATE_SECONDS)
    assert report.verification.latency_ratio == 0.5
    found = [unsure, unsure]
    report = _prune(task, force=True)
    assert report.verification.latency_ratio is None
    value = document(report)["verification"]
    assert value["latency_ratio"] is None
    assert value["latency"]["low"] == 0.02
    console = Console(file=StringIO(), width=80)
    show(document(report), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^ *latency +in doubt +- *$", text, re.MULTILINE)
    assert "latency: 2.0 to 99.0 % (95 % interval, 9 rounds, threads " in text
    assert "note: the latency is not shown: the interval from 0.02 to 0.99" in text


def test_model_slower_than_the_original_is_refused(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Ratio(1.5, 1.4, 1.6, 9, added=2e-4)
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: slow)
    with pytest.raises(GateFailed, match="measured slower than the original"):
        _prune(task)
    _untouched(task)
    report = _prune(task, force=True)
    _untouched(task, "out.onnx")
    note = "slower than the original: 1.50 of its time, 0.200 ms more per run"
    assert any(text.endswith(note) for text in report.notes)


@pytest.mark.parametrize(
    ("ratio", "is_noted"),
    [
        (Ratio(1.09, 1.05, 1.13, 99, added=3e-6), True),  # a network of 35 microseconds
        (Ratio(1.10, 0.98, 1.20, 99, added=2e-3), False),  # not shown by the interval
    ],
)
def test_slowdown_within_noise_or_overhead_is_written(
    task: Path, monkeypatch: pytest.MonkeyPatch, ratio: Ratio, is_noted: bool
) -> None:
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: ratio)
    report = _prune(task)
    _untouched(task, "out.onnx")
    notes = [text for text in report.notes if "measured slower than the original" in text]
    assert bool(notes) == is_noted
    assert all("within the overhead of calls" in text for text in notes)


NORMALISED = """(float[N,8] x) => (float[N,2] y)
<float[8,6] w0, float[6] scale, float[6] bias, float[6,2] w1> {
    s = MatMul(x, w0)
    n = LayerNormalization<axis = -1>(s, scale, bias)
    r = Relu(n)
    y = MatMul(r, w1)
}"""
"""A graph so small that the nodes which a cut inserts take more than it removes."""


def test_file_larger_than_the_original_is_written_only_if_forced(tmp_path: Path) -> None:
    proto = build(NORMALISED)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((40, 8), np.float32))
    with pytest.raises(OutputError) as caught:
        _prune(tmp_path, no_provenance=True)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    size = (tmp_path / "model.onnx").stat().st_size
    assert (
        f"more than the {size:,} of the original, because what the cut and the refit insert"
        in message
    )
    assert message.endswith("try a smaller budget, or `force` to write it anyway.")
    _untouched(tmp_path)
    report = _prune(tmp_path, no_provenance=True, force=True)
    _untouched(tmp_path, "out.onnx")
    assert report.after.bytes == (tmp_path / "out.onnx").stat().st_size > size


SMALL = """(float[N,8] x) => (float[N,2] y)
<float[8,8] w0, float[8,2] w1> {
    s = MatMul(x, w0)
    r = Relu(s)
    y = MatMul(r, w1)
}"""
"""A graph so small that the entry about provenance takes more than a cut removes."""


def test_provenance_does_not_count_in_the_comparison_of_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(build(SMALL).SerializeToString())
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((40, 8), np.float32))
    _prune(tmp_path)
    _untouched(tmp_path, "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    assert written.ByteSize() > path.stat().st_size
    whole = written.ByteSize()
    provenance.remove(written)
    assert written.ByteSize() < path.stat().st_size
    assert provenance.size(onnx.load(tmp_path / "out.onnx")) == whole - written.ByteSize()
    assert provenance.size(written) == 0


def test_slower_model_error_names_the_cut_that_added_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A normalisation has to see the zeros of what went; without its stream nothing has to be put back."""
    slow = Ratio(1.5, 1.4, 1.6, 9, added=2e-4)
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: slow)
    text = """(float[N,8] x) => (float[N,3] y)
    <float[8,12] w0, float[12] scale, float[12] bias, float[12,16] w1, float[16,3] w2> {
        s = MatMul(x, w0)
        n = LayerNormalization<axis = -1>(s, scale, bias)
        h = MatMul(n, w1)
        r = Relu(h)
        y = MatMul(r, w2)
    }"""
    (tmp_path / "model.onnx").write_bytes(build(text).SerializeToString())
    arrays = {"x": np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)}
    for exclude, said in (
        ((), "try `exclude='w0'`, where a cut adds nodes, "),
        (("w0",), "try `align` 8 or 16, "),
    ):
        wanted = settings(macs=0.6, exclude=exclude)
        with pytest.raises(GateFailed, match=said):
            prune(tmp_path / "model.onnx", arrays, tmp_path / "out.onnx", wanted)


@pytest.mark.parametrize("exists", [False, True])
def test_unreachable_budget_raises_budget_not_met(task: Path, exists: bool) -> None:
    if exists:
        (task / "out.onnx").write_bytes(b"what was there before")
    with pytest.raises(BudgetNotMet, match="the `macs` budget cannot be met") as caught:
        _prune(task, macs=1e-6)
    assert caught.value.exit_code == 1
    if exists:
        assert (task / "out.onnx").read_bytes() == b"what was there before"
    _untouched(task, *(["out.onnx"] if exists else []))


def test_model_without_removable_units_is_refused(tmp_path: Path) -> None:
    text = "(float[N,5] x) => (float[N,3] y) <float[5,3] w> { y = MatMul(x, w) }"
    (tmp_path / "model.onnx").write_bytes(build(text).SerializeToString())
    with pytest.raises(BudgetNotMet, match=r"no channel of .* can be removed, for example because"):
        prune(
            tmp_path / "model.onnx",
            {"x": np.zeros((4, 5), np.float32)},
            tmp_path / "out.onnx",
            settings(macs=0.5),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_single_channel_is_not_the_reason_why_nothing_can_be_removed(tmp_path: Path) -> None:
    text = """(float[N,4] x, float[N,8] h) => (float[N] y, float[N,8] g)
        <float[4,8] w, float[8,1] v, int64[1] last = {1}>
        { a = MatMul(x, w)  s = Add(a, h)  g = Tanh(s)  o = MatMul(g, v)  y = Squeeze(o, last) }"""
    onnx.save(build(text), tmp_path / "model.onnx")
    with pytest.raises(BudgetNotMet, match="a graph input"):
        prune(
            tmp_path / "model.onnx", None, None, settings(macs=0.5, importance="l2", refit="none")
        )


def test_excluding_every_group_is_refused(task: Path) -> None:
    with pytest.raises(BudgetNotMet, match=r"`exclude='w\*'` keeps it"):
        _prune(task, exclude=("w*",))
    _untouched(task)


# --------------------------------------------------------------------------------------------------- settings, data


def test_missing_budget_and_unknown_choices_are_refused(task: Path) -> None:
    with pytest.raises(SettingsError, match="nothing says how much to keep"):
        _prune(task, macs=None)
    with pytest.raises(SettingsError, match="`importance='magic'` is unknown; choose one of"):
        _prune(task, importance="magic")
    with pytest.raises(SettingsError, match="matches no weight and no node"):
        _prune(task, exclude=("nobody",))
    _untouched(task)


@pytest.mark.parametrize(
    ("chosen", "part"),
    [
        ({"importance": "activation"}, "`importance=activation`"),
        ({"importance": "l2", "refit": "bias"}, "`refit=bias`"),
    ],
)
def test_missing_calibration_data_is_refused_where_needed(
    task: Path, chosen: dict[str, object], part: str
) -> None:
    with pytest.raises(DataError, match=f"{part} needs calibration data"):
        prune(task / "model.onnx", None, task / "out.onnx", settings(macs=0.5, **chosen))
    _untouched(task)


# ----------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("missing/out.onnx", "does not exist"),
        ("folder", "is a folder"),
        ("model.onnx", "would overwrite the input"),
        ("data.npz", "would overwrite the input"),
        ("sub/../model.onnx", "would overwrite the input"),
    ],
)
def test_unusable_output_paths_are_refused(task: Path, name: str, part: str) -> None:
    (task / "folder").mkdir()
    (task / "sub").mkdir()
    before = {p.name: p.read_bytes() for p in task.iterdir() if p.is_file()}
    with pytest.raises(OutputError, match=part) as caught:
        prune(task / "model.onnx", task / "data.npz", task / name, settings(macs=0.5))
    assert caught.value.exit_code == 2
    assert {p.name: p.read_bytes() for p in task.iterdir() if p.is_file()} == before


def test_keep_map_may_not_be_the_output(task: Path) -> None:
    same = task / "out.onnx", task / "." / "out.onnx"
    with pytest.raises(OutputError, match="given as another file of this run too"):
        prune(task / "model.onnx", task / "data.npz", same[0], settings(macs=0.5), keep_map=same[1])
    assert not same[0].exists()


def test_output_may_not_overwrite_the_weights_of_the_input(tmp_path: Path) -> None:
    onnx.save_model(
        build(TEXT),
        str(tmp_path / "in.onnx"),
        save_as_external_data=True,
        location="out.onnx.data",
        size_threshold=0,
    )
    with pytest.raises(OutputError, match="would overwrite the input"):
        prune(
            tmp_path / "in.onnx",
            None,
            tmp_path / "out.onnx",
            settings(macs=0.5, importance="l2", refit="none"),
        )


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_failed_write_keeps_the_old_file(
    task: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (task / "out.onnx").write_bytes(b"what was there before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match="No space left on device"):
        _prune(task)
    monkeypatch.undo()
    assert (task / "out.onnx").read_bytes() == b"what was there before"
    _untouched(task, "out.onnx")


def test_large_models_store_weights_as_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr(external_data, "MAPPED_TENSOR_BYTES", 100)
    proto = build(TEXT)
    digest, size = output.write(proto, tmp_path / "large.onnx")
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["large.onnx", "large.onnx.data"]
    assert size == sum(p.stat().st_size for p in tmp_path.iterdir())
    model = models.load(tmp_path / "large.onnx")
    assert model.file_bytes == size
    assert model.sha256 == digest
    for name, value in constants(proto).items():
        np.testing.assert_array_equal(model.constants[name], value)


# ---------------------------------------------------------------------------------------------------------- compare


def test_comparison_of_files_equals_the_report_of_prune(task: Path) -> None:
    report = _prune(task)
    found = compare(task / "model.onnx", task / "out.onnx", task / "data.npz", settings())
    assert found.output_relative_error == report.verification.output_relative_error
    assert found.accuracy_after == report.verification.accuracy_after
    assert (found.samples, found.batches) == (25, (1, 2))
    same = compare(task / "model.onnx", task / "model.onnx", task / "data.npz", settings())
    assert (same.output_relative_error, same.agreement) == (0, 1)


def test_comparing_unrelated_files_is_refused(task: Path) -> None:
    (task / "other.onnx").write_bytes(build(TEXT.replace("image", "picture")).SerializeToString())
    with pytest.raises(GateFailed, match="different inputs: image against picture"):
        compare(task / "model.onnx", task / "other.onnx", task / "data.npz", settings())
    (task / "other.onnx").write_bytes(build(TEXT.replace("scores", "logits")).SerializeToString())
    with pytest.raises(GateFailed, match="different outputs: scores against logits"):
        compare(task / "model.onnx", task / "other.onnx", task / "data.npz", settings())
    (task / "other.onnx").write_bytes(build(TEXT.replace("float", "float16")).SerializeToString())
    with pytest.raises(
        GateFailed,
        match="input 'image' is float32 in the original and float16 in the pruned model; give",
    ):
        compare(task / "model.onnx", task / "other.onnx", task / "data.npz", settings())


@pytest.mark.parametrize(("weight", "noted"), [(1, False), (1000, True)])
def test_output_that_loses_nearly_everything_beside_another_is_noted(
    weight: int, noted: bool, tmp_path: Path
) -> None:
    """Half of the MACs are those of either output: with a large weight, one of them takes them all."""
    text = """(float[N,8] x) => (float[N,4] y, float[N,4] z)
        <float[8,16] w1, float[16,4] v1, float[8,16] w2, float[16,4] v2> {
        a = MatMul(x, w1) b = Relu(a) y = MatMul(b, v1)
        c = MatMul(x, w2) d = Relu(c) z = MatMul(d, v2) }"""
    (tmp_path / "model.onnx").write_bytes(build(text).SerializeToString())
    x = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    asked_for = settings(
        macs=0.54, allocate="mip", outputs={"y": "values", "z": f"values:{weight}"}
    )
    report = prune(tmp_path / "model.onnx", {"x": x}, None, asked_for)
    lost = {measure.term: measure.lost for measure in report.verification.outputs}
    found = [note for note in document(report)["notes"] if "loses nearly everything" in note]
    assert len(found) == noted
    for note in found:
        assert note.startswith(f"output 'y' loses nearly everything ({lost['y']:.1f} points: ")
        assert f"while 'z' loses {lost['z']:.1f} points" in note
        assert "`allocate=global`, `allocate=uniform`, a larger budget" in note
        assert "`outputs=y=values:4`" in note


@pytest.mark.parametrize("taken", ["mip", "global", "uniform"])
def test_allocation_that_was_taken_is_not_proposed(taken: str) -> None:
    term = SimpleNamespace(name="y", kind="values", weight=1.0)
    ready = SimpleNamespace(objective=SimpleNamespace(judged=(term,)))
    text = pipeline._other_plans(ready, SimpleNamespace(allocation=taken), "y")  # type: ignore[arg-type]
    for name in ("global", "uniform"):
        assert (f"`allocate={name}`" in text) == (name != taken)
    assert "a larger budget or more weight for it, as by `outputs=y=values:4`" in text


def test_pruned_file_can_be_pruned_again(task: Path) -> None:
    first = _prune(task)
    again = prune(task / "out.onnx", task / "data.npz", task / "twice.onnx", settings(macs=0.5))
    assert 0.23 <= again.after.macs / first.before.macs <= 0.25
    assert (
        couple(load(onnx.load(task / "twice.onnx"), task)).n_units
        < couple(models.load(task / "out.onnx")).n_units
    )
