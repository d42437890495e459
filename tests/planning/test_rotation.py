"""Rotation: principal components of linear streams lose least, and only groups that a plan narrows have them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import ATTENTION, build, constants, distance, load
from onnx import ModelProto, numpy_helper

from onnx_oamip.api import pipeline, recovery
from onnx_oamip.api.prepare import prepare, score
from onnx_oamip.artifacts import score_files
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Array, Floats, Objective, Whole
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import linear_streams
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite
from onnx_oamip.planning import execution, iterative, rotation, search
from onnx_oamip.recovery.features import features
from onnx_oamip.reporting import documents
from onnx_oamip.statistics.context import Context

STREAM = """(float[N,6,2,2] x) => (float[N,6] y)
<float[12,6,1,1] w0, float[12] b0, float[9,12,1,1] we, float[12,9,1,1] wp, float[8,12,1,1] wh, float[8,6] wy> {
    a = Conv(x, w0, b0)
    e = Conv(a, we)
    r = Relu(e)
    p = Conv(r, wp)
    s = Add(a, p)
    h = Conv(s, wh)
    u = Relu(h)
    g = GlobalAveragePool(u)
    f = Flatten(g)
    y = Gemm(f, wy)
}"""
RANK = 4


def _low_rank(seed: int = 0) -> ModelProto:
    """A stream of 12 channels that are all mixtures of four signals."""
    proto = build(STREAM, seed=seed)
    rng = np.random.default_rng(seed)
    mixture = rng.normal(size=(12, RANK))
    for tensor in proto.graph.initializer:
        if tensor.name in ("w0", "b0", "wp"):
            old = numpy_helper.to_array(tensor)
            part = old.reshape(12, -1)[:RANK] * 2
            new = (mixture @ part).reshape(old.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    return proto


def _data(count: int = 96) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).normal(size=(count, 6, 2, 2)).astype(np.float32)}


def _pruned(tmp_path: Path, proto: ModelProto, **options: Any) -> pipeline.Result:
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    settings = Settings.create(cache="off", align=1, workers=1, force=True, **options)
    return pipeline.pruned(path, _data(), settings)


def test_components_diagonalise_moments_and_metric_and_fall() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 20, 5))
    inner, outer = a.transpose(0, 2, 1) @ a, b.transpose(0, 2, 1) @ b
    basis = rotation._components(inner, outer)
    eye = np.eye(5)
    assert np.allclose(basis.forward @ basis.inverse, eye)
    moments = basis.forward @ inner @ basis.forward.transpose(0, 2, 1)
    size = np.diagonal(moments, axis1=1, axis2=2)
    assert np.allclose(moments, size[:, :, None] * eye, atol=1e-8 * moments.max())
    assert (np.diff(size, axis=1) < 0).all()
    damped = outer / (np.trace(outer, axis1=1, axis2=2)[:, None, None] / 5) + rotation.DAMPING * eye
    seen = basis.inverse.transpose(0, 2, 1) @ damped @ basis.inverse
    assert np.allclose(seen, eye, atol=1e-8)


def _lost(weight: Floats, covariance: Floats, kept: list[int]) -> float:
    """Share of the reader's variance that the best linear map from the kept channels does not give."""
    of_kept = covariance[np.ix_(kept, kept)]
    best = covariance[:, kept] @ np.linalg.solve(of_kept, covariance[kept])
    rest = weight @ (covariance - best) @ weight.T
    return float(np.trace(rest) / np.trace(weight @ covariance @ weight.T))


@pytest.mark.parametrize("seed", range(5))
def test_first_components_lose_less_of_a_reader_than_any_choice_of_channels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    weight = rng.normal(size=(4, 6))
    covariance = np.cov(x.T)
    basis = rotation._components(covariance[None], (weight.T @ weight)[None])
    turned = basis.forward[0] @ covariance @ basis.forward[0].T
    components = _lost(weight @ basis.inverse[0], turned, [0, 1, 2])
    channels = min(_lost(weight, covariance, list(kept)) for kept in combinations(range(6), 3))
    assert components < channels


def test_low_rank_stream_is_narrowed_to_its_rank_without_loss(tmp_path: Path) -> None:
    turned, plain = (
        _pruned(tmp_path, _low_rank(), macs=0.6, rotate=rotate) for rotate in ("auto", "none")
    )
    assert turned.report.plan.rotated == ("w0",)
    assert plain.report.plan.rotated == ()
    width = turned.report.plan.widths[0]
    assert RANK <= width < 12
    after, before = (result.report.verification.output_relative_error for result in (turned, plain))
    assert after is not None
    assert before is not None
    assert after < 0.5 * before
    assert turned.report.verification.masked_equivalence < 1e-5
    assert any("principal components" in note for note in turned.report.notes)
    document = turned.document
    assert [g["rotated"] for g in document["groups"]].count(True) == 1


@pytest.mark.parametrize("iterations", [2, 3])
def test_low_rank_stream_is_narrowed_without_loss_in_rounds(
    tmp_path: Path, iterations: int
) -> None:
    proto = _low_rank()
    turned, plain = (
        _pruned(tmp_path, proto, macs=0.5, rotate=rotate, iterations=iterations)
        for rotate in ("auto", "none")
    )
    assert turned.report.plan.rotated == ("w0",)
    after, before = (result.report.verification.output_relative_error for result in (turned, plain))
    assert after is not None
    assert before is not None
    assert after < 0.5 * before
    assert turned.report.verification.masked_equivalence < 1e-5


def test_scores_of_channels_are_not_taken_for_those_of_components(tmp_path: Path) -> None:
    """A round that removes nothing of a stream leaves its channels, while the next one counts components."""
    path = tmp_path / "model.onnx"
    path.write_bytes(_low_rank().SerializeToString())
    settings = Settings.create(macs=0.6, cache="off", align=1, workers=1)
    ready = prepare(path, _data(), settings)
    stream = next(g for g, group in enumerate(ready.coupling.groups) if group.name == "w0")
    attempt = search.search(ready)
    assert attempt.plan.rotated == ("w0",)
    again = iterative._rescored(ready, attempt)
    of_stream = ready.coupling.unit_group == stream
    kept = of_stream & attempt.plan.keep
    assert not np.array_equal(again.scores.values[kept], ready.scores.values[kept])
    # The same round with all of the stream.
    keep = attempt.plan.keep | of_stream
    widths = np.bincount(ready.coupling.unit_group[keep], minlength=len(ready.coupling.groups))
    plan = replace(attempt.plan, keep=keep, widths=widths, rotated=())
    again = iterative._rescored(ready, execution.carry_out(ready, plan))
    assert np.array_equal(again.scores.values[of_stream], ready.scores.values[of_stream])
    others = keep & ~of_stream
    assert not np.array_equal(again.scores.values[others], ready.scores.values[others])


def test_stream_behind_batch_normalisation_has_the_components_of_the_folded_model(
    tmp_path: Path,
) -> None:
    text = STREAM.replace(
        "float[8,6] wy>",
        "float[8,6] wy, float[12] gain, float[12] shift, float[12] mean, float[12] var>",
    )
    text = text.replace(
        "h = Conv(s, wh)", "n = BatchNormalization(s, gain, shift, mean, var)\n    h = Conv(n, wh)"
    )
    proto = build(text)
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.name in ("gain", "var"):
            value = rng.uniform(0.3, 2, 12).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    model = load(proto, tmp_path)
    streams, _ = linear_streams.find(model, couple(model))
    folded = linear_streams.without_norms(model, streams)
    settings = Settings.create(macs=0.6, cache="off", align=1, workers=1)
    bases = []
    for name, made in (("normalised", model.proto), ("folded", folded.proto)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(made.SerializeToString())
        found = prepare(path, _data(), settings).rotation
        assert found is not None
        bases.append(found.bases[0][1].forward)
    # The sign of a component is arbitrary.
    np.testing.assert_allclose(np.abs(bases[0]), np.abs(bases[1]), atol=1e-3)


def test_group_at_full_width_keeps_the_weights_of_the_file(tmp_path: Path) -> None:
    proto = _low_rank()
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    settings = Settings.create(macs=0.9, cache="off", align=1, workers=1)
    ready = prepare(path, _data(), settings)
    assert ready.rotation is not None
    assert ready.rotation.distance < 1e-5
    assert not np.allclose(ready.model.constants["w0"], constants(proto)["w0"])
    plan = search.allocate(ready, *search._limits(ready))
    whole = replace(plan, rotated=())
    back = rotation.for_plan(ready, whole)
    assert all(np.array_equal(back.model.constants[n], v) for n, v in constants(proto).items())
    assert back.cache_identity != ready.cache_identity


def test_plan_with_components_is_carried_out_as_prune_does(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_low_rank().SerializeToString())
    settings = Settings.create(macs=0.6, cache="off", align=1, workers=1, force=True)
    planned = pipeline.plan(path, _data(), tmp_path / "plan.json", settings)
    entries = json.loads((tmp_path / "plan.json").read_text())["groups"]
    assert [e["name"] for e in entries if e["rotated"]] == list(planned.plan.rotated) == ["w0"]
    applied = pipeline.applied(path, tmp_path / "plan.json", _data(), {"cache": "off"})
    direct = pipeline.pruned(path, _data(), settings)
    assert applied.model.SerializeToString() == direct.model.SerializeToString()
    with pytest.raises(SettingsError, match="keep-map lists channels"):
        pipeline.apply(
            path,
            tmp_path / "plan.json",
            _data(),
            tmp_path / "o.onnx",
            keep_map=tmp_path / "k.safetensors",
        )
    with pytest.raises(DataError, match="found by running"):
        pipeline.applied(path, tmp_path / "plan.json", None, {"refit": "none", "cache": "off"})


def test_keep_map_lists_channels_so_that_nothing_is_rotated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_low_rank().SerializeToString())
    settings = Settings.create(macs=0.6, cache="off", align=1, workers=1, force=True)
    report = pipeline.prune(
        path, _data(), tmp_path / "out.onnx", settings, keep_map=tmp_path / "k.safetensors"
    )
    assert report.plan.rotated == ()
    assert report.settings["rotate"] == "none"
    expected = "not used for 1 group between linear layers: a keep-map lists channels"
    assert [note for note in report.notes if expected in note]
    assert expected in caplog.text


def test_stream_that_cannot_be_rotated_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_low_rank().SerializeToString())
    settings = Settings.create(macs=0.6, cache="off", align=1, workers=1)
    context, scores = score(path, _data(), settings)
    file = tmp_path / "scores.npz"
    score_files.save_scores(file, context.model, context.coupling, scores, settings={})

    def note(context: Context) -> str:
        """The one note that the rotation adds, which is logged and stands with the model of the file."""
        assert context.rotation is None
        found = context.in_file[0].notes[-1]
        assert found == context.model.notes[-1]
        assert found in caplog.text
        caplog.clear()
        return found

    assert "scores names channels" in note(prepare(path, _data(), settings, scores=file))
    in_file = Whole(context.model, context.coupling, frozenset())
    assert "If node" in note(rotation.rotate(replace(context, whole=in_file)))
    monkeypatch.setattr(rotation, "MOST_CHANNELS", 11)
    assert "more than 11 channels" in note(rotation.rotate(context))
    monkeypatch.undo()
    monkeypatch.setattr(rotation, "_is_finite", lambda _: False)
    assert "not finite" in note(rotation.rotate(context))
    monkeypatch.undo()
    monkeypatch.setattr(rotation, "distance", lambda *_: 1.0)
    assert "differs by 1.00e+00" in note(rotation.rotate(context))


@pytest.mark.parametrize(
    "options",
    [
        {"importance": "l2"},
        {"refit": "bias"},
        {"allocate": "uniform"},
        {"granularity": "connection"},
        {"rotate": "none"},
    ],
)
def test_other_settings_choose_channels(options: dict[str, Any]) -> None:
    assert rotation.applies(Settings.create(macs=0.5))
    assert not rotation.applies(Settings.create(macs=0.5, **options))


def test_attention_is_balanced_within_its_heads(tmp_path: Path) -> None:
    model = load(build(ATTENTION), tmp_path)
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(96, 5, 6)).astype(np.float32)}
    settings = Settings.create(macs=0.6, cache="off", align=1, workers=1, force=True)
    ready = prepare(Path(model.path), data, settings)
    assert ready.rotation is not None
    pair = next(stream for stream, _ in ready.rotation.bases if stream.opposite is not None)
    assert pair.opposite is not None
    outputs = [next(p.weight for p in side.writers) for side in (pair.side, pair.opposite)]
    assert sorted(outputs) == ["wk", "wq"]
    values = {"x": data["x"][:4]}
    both = (Session(m.proto, "cpu", exact=True).run(values) for m in (model, ready.model))
    assert distance(*both) < 1e-5
    result = pipeline.pruned(Path(model.path), data, settings)
    assert result.report.verification.masked_equivalence < 1e-5


def test_recovery_compares_no_channels_with_components(tmp_path: Path) -> None:
    model = load(_low_rank(), tmp_path)
    coupling = couple(model)
    keep = np.ones(coupling.n_units, bool)
    group = next(group for group in coupling.groups if group.name == "w0")
    keep[group.units[8:]] = False
    pruned = models.remade(model, rewrite.cut(model, coupling, keep))
    assert "s" in {f.tensor for f in features(model, pruned, coupling, keep)}
    without = recovery._of_channels(coupling, ("w0",))
    assert "s" not in {f.tensor for f in features(model, pruned, without, keep)}


def test_inspection_states_what_fixes_the_channels(tmp_path: Path) -> None:
    model = load(_low_rank(), tmp_path)
    groups = documents.inspection(model, couple(model), Objective())["groups"]
    reasons = {group["name"]: group["fixed_basis"] for group in groups}
    assert reasons["w0"] is None
    assert "Relu" in reasons["we"]
