"""Training: losses as those of the run, never worse, the same bytes again, and all kinds of weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, load
from onnx import numpy_helper

from onnx_oamip.api.pipeline import apply, plan, prune
from onnx_oamip.api.recovery import recover
from onnx_oamip.core.errors import DataError, GateFailed, ModelError, OutputError, SettingsError
from onnx_oamip.core.options.recovery import Effort
from onnx_oamip.core.records import Objective, Plan, Recovery, Scale, Term
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import augmentation
from onnx_oamip.graph import cost, loading
from onnx_oamip.objective import compare
from onnx_oamip.planning import execution
from onnx_oamip.planning.execution import Attempt
from onnx_oamip.reporting import documents
from onnx_oamip.statistics.context import Context

torch = pytest.importorskip("torch")

from onnx_oamip.recovery import engine, losses, rates, steps, training  # noqa: E402
from onnx_oamip.recovery import recover as recovery  # noqa: E402
from onnx_oamip.recovery.judge import Judge  # noqa: E402
from onnx_oamip.recovery.parts import Part  # noqa: E402
from onnx_oamip.recovery.task import Task  # noqa: E402
from onnx_oamip.recovery.trainable import Trainable  # noqa: E402
from onnx_oamip.recovery.training import Trained  # noqa: E402

NETWORK = """(float[N, 8] x) => (float[N, 4] y)
<float[8, 24] w1, float[24] b1, float[24, 16] w2, float[16] b2, float[16, 4] w3> {
    a = Gemm(x, w1, b1)
    r = Relu(a)
    c = Gemm(r, w2, b2)
    s = Tanh(c)
    y = MatMul(s, w3)
}"""


BARE = Settings.create(macs=0.5, refit="none", force=True, task="values", align=1)
"""Settings of a pruned model that leaves much to recover."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, data.npz, plan.json, and half.onnx, pruned by the plan without a refit."""
    folder = tmp_path_factory.mktemp("recovery")
    onnx.save_model(build(NETWORK), folder / "model.onnx")
    data = np.random.default_rng(0).normal(size=(240, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=data)
    plan(folder / "model.onnx", folder / "data.npz", folder / "plan.json", BARE)
    names = ("model.onnx", "plan.json", "data.npz", "half.onnx")
    apply(*(folder / name for name in names), {"force": True})
    return folder


def settings(**changes: object) -> Settings:
    return Settings.create(**{"recover": 60, "task": "values", "device": "cpu", **changes})


def stored(path: Path) -> dict[str, np.ndarray]:
    proto = onnx.load(path)
    return {held.name: numpy_helper.to_array(held) for held in proto.graph.initializer}


def test_recovery_lowers_the_objective_and_changes_nothing_but_weights(case: Path) -> None:
    found = recover(
        case / "half.onnx",
        case / "model.onnx",
        case / "data.npz",
        settings(recover=200),
        case / "out.onnx",
    )
    recovery = found.recovery
    assert recovery.accepted
    assert recovery.after is not None
    assert recovery.after < 0.8 * recovery.before
    assert (recovery.samples, recovery.held_out) == (192, 48)
    before, after = onnx.load(case / "half.onnx"), onnx.load(case / "out.onnx")
    assert after.graph.node == before.graph.node
    assert after.metadata_props == before.metadata_props
    old, new = stored(case / "half.onnx"), stored(case / "out.onnx")
    assert {n: v.shape for n, v in new.items()} == {n: v.shape for n, v in old.items()}
    assert any(not np.array_equal(new[name], old[name]) for name in old)


def test_same_seed_gives_the_same_bytes(case: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        recover(
            case / "half.onnx",
            case / "model.onnx",
            case / "data.npz",
            settings(recover=40),
            case / name,
        )
    assert (case / "one.onnx").read_bytes() == (case / "two.onnx").read_bytes()


@pytest.fixture
def much_too_large_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "RATE", 30.0)
    monkeypatch.setattr(rates, "TENSOR_SHARE", np.inf)
    monkeypatch.setattr(rates, "STEP_SHARE", np.inf)


@pytest.mark.usefixtures("much_too_large_rate")
def test_worse_result_is_not_taken(case: Path) -> None:
    found = recover(
        case / "half.onnx",
        case / "model.onnx",
        case / "data.npz",
        settings(recover=20),
        case / "out.onnx",
    )
    assert not found.recovery.accepted
    assert "was not taken" in " ".join(found.notes)
    assert "trains behind the refit" in " ".join(found.notes)
    old, new = stored(case / "half.onnx"), stored(case / "out.onnx")
    assert all(np.array_equal(new[name], old[name]) for name in old)


@pytest.mark.usefixtures("much_too_large_rate")
def test_rate_that_is_too_large_is_divided(case: Path) -> None:
    """Training goes back to the start and on, and gets below it in the end."""
    found = recover(
        case / "half.onnx", case / "model.onnx", case / "data.npz", settings(recover=200)
    )
    assert found.recovery.slowed >= 2
    assert found.recovery.accepted
    assert max(loss for _, loss in found.recovery.curve) > training.WORSE * found.recovery.before


def test_rate_that_is_too_large_is_bounded_before_the_first_step(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "RATE", 30.0)
    found = recover(
        case / "half.onnx", case / "model.onnx", case / "data.npz", settings(recover=60)
    )
    assert found.recovery.slowed == 0
    assert found.recovery.accepted


def test_rates_are_bounded_by_the_fall_of_the_loss_that_they_predict() -> None:
    sizes, loss = [2.0, 1.0, 0.5], 3.0
    flat = rates.bounded(sizes, [0.0, 0.0, 0.0], loss)
    assert flat == [rates.RATE * size for size in sizes]
    steep = rates.bounded(sizes, [0.0, 1e3, 1e3], loss)
    assert steep[0] == flat[0]
    for rate, slope in zip(steep[1:], (1e3, 1e3), strict=True):
        assert rate * slope == pytest.approx(rates.TENSOR_SHARE * loss)
    count = 100
    many = rates.bounded([1.0] * count, [1e3] * count, loss)
    assert sum(rate * 1e3 for rate in many) == pytest.approx(rates.STEP_SHARE * loss)


def test_rates_fall_with_the_root_of_the_samples_of_a_step() -> None:
    """With a quarter of the samples, the noise of a gradient doubles, and a step is half as long."""
    usual = rates.share_of_batch(rates.USUAL_BATCH)
    assert usual == rates.share_of_batch(4 * rates.USUAL_BATCH) == 1
    assert rates.share_of_batch(rates.USUAL_BATCH // 4) == 0.5


def _full_rates(case: Path, data: object, patch: pytest.MonkeyPatch) -> list[float]:
    """Rates of all weights, which a recovery of one step begins with."""
    seen: list[list[float]] = []
    grouped = rates.groups

    def groups(weights: object, full: list[float]) -> object:
        seen.append(full)
        return grouped(weights, full)

    with patch.context() as here:
        here.setattr(rates, "groups", groups)
        recover(case / "half.onnx", case / "model.onnx", data, settings(recover=1))
    return seen[0]


def test_steps_of_few_samples_have_smaller_rates(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates of the whole batch are those at a share of 1, and follow the share of its size."""
    monkeypatch.setattr(steps, "MAX_BATCH", 8)
    smaller = _full_rates(case, case / "data.npz", monkeypatch)
    monkeypatch.setattr(rates, "USUAL_BATCH", 8)
    usual = _full_rates(case, case / "data.npz", monkeypatch)
    np.testing.assert_allclose(smaller, np.multiply(usual, 0.5), rtol=1e-6)


def test_batch_holds_no_more_samples_than_there_are(case: Path) -> None:
    with np.load(case / "data.npz") as held:
        data = {"x": held["x"][:36]}
    found = recover(case / "half.onnx", case / "model.onnx", data, settings(recover=1)).recovery
    assert found.batch == found.samples < rates.USUAL_BATCH


def test_samples_of_unequal_shapes_keep_the_full_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a step of its own, and may hold any number of rows."""
    text = NETWORK.replace("Gemm(x, w1, b1)", "MatMul(x, w1)").replace(
        "Gemm(r, w2, b2)", "MatMul(r, w2)"
    )
    text = text.replace("float[N, 8]", "float[N, T, 8]").replace("float[N, 4]", "float[N, T, 4]")
    text = text.replace(" float[24] b1,", "").replace(" float[16] b2,", "")
    onnx.save_model(build(text), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(1, 4 + i % 3, 8)).astype(np.float32)} for i in range(40)]
    files = (tmp_path / "model.onnx", data, tmp_path / "half.onnx")
    prune(*files, BARE)
    before = _full_rates(tmp_path, data, monkeypatch)
    monkeypatch.setattr(rates, "USUAL_BATCH", 1)
    assert _full_rates(tmp_path, data, monkeypatch) == before


def test_large_images_are_trained_on_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the share of feeds that are only mirrored at 1, no other change is made."""
    text = """(float[N, 3, 96, 96] x) => (float[N, 4] y)
    <float[16, 3, 4, 4] w1, float[16, 4] w2> {
        a = Conv<strides = [4, 4]>(x, w1)
        r = Relu(a)
        p = GlobalAveragePool(r)
        f = Flatten(p)
        y = MatMul(f, w2)
    }"""
    onnx.save_model(build(text), tmp_path / "model.onnx")
    data = {"x": np.random.default_rng(0).normal(size=(40, 3, 96, 96)).astype(np.float32)}
    prune(tmp_path / "model.onnx", data, tmp_path / "half.onnx", BARE)
    mirrored: list[int] = []
    mirror = augmentation.mirrored

    def counted(batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mirrored.append(len(batch))
        return mirror(batch, rng)

    def refuse(*_: object) -> None:
        raise AssertionError("an image is changed otherwise")

    monkeypatch.setattr(augmentation, "MIRRORED_ONLY", 1.0)
    monkeypatch.setattr(augmentation, "mirrored", counted)
    monkeypatch.setattr(augmentation, "images", refuse)
    recover(tmp_path / "half.onnx", tmp_path / "model.onnx", data, settings(recover=3))
    assert mirrored


def test_samples_of_tables_and_constant_sequences_are_not_changed(tmp_path: Path) -> None:
    text = """(int64[N, 2] x, int64[N, 5] z) => (float[N, 4] y)
    <float[3, 8] e, float[90, 8] f, float[9, 8] g, int64 zero = {0}, int64 one = {1}, int64[1] axis = {1},
        float[8, 24] w1, float[24, 4] w2> {
        a = Gather<axis = 1>(x, zero) b = Gather<axis = 1>(x, one)
        p = Gather(e, a) q = Gather(f, b)
        s = Gather(g, z) m = ReduceMean<axes = [1], keepdims = 0>(s)
        h = Sum(p, q, m) c = MatMul(h, w1) r = Relu(c) y = MatMul(r, w2)
    }"""
    onnx.save_model(build(text), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    data = {
        "x": np.stack([rng.integers(0, 3, 200), rng.integers(0, 90, 200)], axis=1),
        "z": np.tile([3, 1, 3, 8, 1], (200, 1)),
    }
    prune(tmp_path / "model.onnx", data, tmp_path / "half.onnx", BARE)
    found = recover(tmp_path / "half.onnx", tmp_path / "model.onnx", data, settings(recover=3))
    assert found.recovery.augment == "none"


def test_rate_rises_from_a_small_share_and_falls_to_zero() -> None:
    shares = [rates.share(progress) for progress in np.linspace(0, 1, 101)]
    peak = int(np.argmax(shares))
    assert shares[0] == rates.LEAST_RATE
    assert shares[peak] == pytest.approx(1)
    assert peak == round(100 * rates.WARM_UP)
    assert shares[-1] == pytest.approx(0, abs=1e-9)
    assert (np.diff(shares[: peak + 1]) > 0).all()
    assert (np.diff(shares[peak:]) < 0).all()


def test_infinite_loss_at_the_first_evaluation_goes_back_to_the_start(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Judge.losses
    calls = []

    def losses(judge: Judge, proto: onnx.ModelProto) -> np.ndarray:
        calls.append(None)
        found = judged(judge, proto)
        return np.full_like(found, np.inf) if len(calls) == 2 else found  # the first is the start

    monkeypatch.setattr(Judge, "losses", losses)
    found = recover(
        case / "half.onnx", case / "model.onnx", case / "data.npz", settings(recover=200)
    )
    assert found.recovery.slowed == 1
    assert found.recovery.accepted


def test_stop_ends_training_with_the_best_so_far(case: Path) -> None:
    calls = []

    def stop() -> bool:
        calls.append(None)
        return len(calls) == 25

    found = recover(
        case / "half.onnx",
        case / "model.onnx",
        case / "data.npz",
        settings(recover=1000),
        stop=stop,
    )
    assert (found.recovery.steps, found.recovery.ended) == (25, "interrupted")
    assert found.recovery.curve[-1][0] == 25, "the last weights are judged"
    assert found.output is None


@pytest.mark.parametrize("count", [1, 2, 29])
def test_too_few_samples_train_nothing(case: Path, count: int) -> None:
    data = {"x": np.load(case / "data.npz")["x"][:count]}
    found = recover(case / "half.onnx", case / "model.onnx", data, settings(), case / "few.onnx")
    recovery = found.recovery
    assert (recovery.steps, recovery.ended, recovery.accepted) == (0, "too few samples", False)
    judges = {1: "1 held-out sample,", 2: "1 held-out sample,", 29: "5 held-out samples,"}[count]
    assert (
        f"it is judged by {judges} too few to tell a gain from noise; 30 samples"
        in recovery.refusal
    )
    assert "it is no part of what is trained" not in recovery.features_left_out.values()
    old, new = stored(case / "half.onnx"), stored(case / "few.onnx")
    assert all(np.array_equal(new[name], old[name]) for name in old)


def test_feeds_that_are_too_few_judges_are_counted(tmp_path: Path) -> None:
    """Of a fixed batch along another axis of the output, every feed has one loss."""
    text = """(float[8,5,4] x) => (float[5,8,3] y) <float[4,3] w, int64[0] none> {
        t = Transpose<perm = [1, 0, 2]>(x)
        y = MatMul(t, w)
    }"""
    data = {"x": np.random.default_rng(0).normal(size=(96, 5, 4)).astype(np.float32)}
    found = recover(build(text), build(text), data, settings()).recovery
    assert found.held_out == 16
    assert "judged by 2 feeds of 8 held-out samples" in found.refusal
    assert found.refusal.endswith("; 240 samples in all are needed")


def test_every_sample_judges_where_an_output_is_one_number(tmp_path: Path) -> None:
    text = """(float[N,8] x) => (float[N,4] y, float[] loss) <float[8,24] w, float[24,4] v> {
        h = MatMul(x, w)
        r = Relu(h)
        y = MatMul(r, v)
        loss = ReduceMean<keepdims = 0>(r)
    }"""
    original = build(text)
    rng = np.random.default_rng(0)
    pruned = onnx.ModelProto()
    pruned.CopyFrom(original)
    for held in pruned.graph.initializer:
        value = numpy_helper.to_array(held)
        noise = 0.2 * value.std() * rng.normal(size=value.shape)
        held.CopyFrom(numpy_helper.from_array((value + noise).astype(np.float32), held.name))
    data = {"x": rng.normal(size=(80, 8)).astype(np.float32)}
    asked = settings(recover=40, task=None, outputs={"y": "values", "loss": "values"})
    found = recover(pruned, original, data, asked).recovery
    assert (found.steps, found.accepted) == (40, True)
    assert found.after is not None
    assert found.after < 0.5 * found.before


def test_samples_that_are_trained_on_and_judge_are_noted(case: Path) -> None:
    rows = np.load(case / "data.npz")["x"][:16]
    for copies, repeated in ((1, 0), (10, 32)):
        data = {"x": np.tile(rows, (copies, 1)) if copies > 1 else np.load(case / "data.npz")["x"]}
        found = recover(case / "half.onnx", case / "model.onnx", data, settings(recover=2))
        assert found.recovery.repeated == repeated
        noted = [note for note in found.notes if "equal samples that it trains on" in note]
        assert len(noted) == (repeated > 0)


def _diverged(*_: object) -> None:
    raise steps.Diverged


def test_refusal_gives_the_reason(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = (case / "half.onnx", case / "model.onnx", case / "data.npz")
    with monkeypatch.context() as patch:
        patch.setattr(steps.Run, "step", _diverged)
        assert recover(*paths, settings()).recovery.refusal == "its loss rose beyond all numbers"
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "losses", lambda *_: np.full(48, np.nan))
        found = recover(*paths, settings(recover=2)).recovery
        assert found.refusal == "the held-out objective of the pruned model is no finite number"
    with monkeypatch.context() as patch:
        patch.setattr(training, "trained_part", lambda _: (Part((), (), ()), ("Loop 'loop'",)))
        found = recover(*paths, settings(recover=2))
        assert found.recovery.refusal == "it has no weights that torch can train"
        assert any("trained nothing of the model" in note for note in found.notes)


def test_weights_that_were_judged_do_not_change_later(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = []

    class Noted(training.Best):
        def offer(self, step: int, found: np.ndarray, weights: dict) -> None:
            offered.append((weights, {name: value.copy() for name, value in weights.items()}))
            super().offer(step, found, weights)

    monkeypatch.setattr(training, "Best", Noted)
    recover(case / "half.onnx", case / "model.onnx", case / "data.npz", settings(recover=40))
    assert len(offered) > 1
    for weights, judged in offered:
        assert all(np.array_equal(weights[name], judged[name]) for name in judged)


def test_time_ends_training(case: Path) -> None:
    found = recover(
        case / "half.onnx", case / "model.onnx", case / "data.npz", settings(recover="0.5s")
    )
    assert found.recovery.ended in ("budget", "no improvement")
    assert 0 < found.recovery.seconds < 10


def test_narrower_tensors_are_compared_by_channels_or_by_projections(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan names the kept channels; without one, all narrower tensors are compared by combinations of channels."""
    compared = []

    def train(task: Task, effort: Effort) -> Trained:
        compared.append({f.tensor: (f.kept != (), f.projection is not None) for f in task.features})
        return real(task, effort)

    real = training.train
    monkeypatch.setattr(training, "train", train)
    arguments = (case / "half.onnx", case / "model.onnx", case / "data.npz", settings(recover=3))
    recover(*arguments, plan_file=case / "plan.json")
    recover(*arguments)
    assert compared[0] == {"a": (True, False), "c": (True, False), "s": (True, False)}
    assert compared[1] == {"a": (False, True), "c": (False, True), "s": (False, True)}


def test_plan_of_another_model_is_refused(case: Path) -> None:
    other = Settings.create(macs=0.8, refit="none", task="values", align=1)
    plan(case / "model.onnx", case / "data.npz", case / "other.json", other)
    with pytest.raises(DataError, match="was not pruned by"):
        recover(
            case / "half.onnx",
            case / "model.onnx",
            case / "data.npz",
            settings(),
            plan_file=case / "other.json",
        )


def test_models_with_other_inputs_are_refused(case: Path) -> None:
    onnx.save_model(
        build(NETWORK.replace(" x)", " z)").replace("Gemm(x", "Gemm(z")), case / "o.onnx"
    )
    with pytest.raises(GateFailed, match="different inputs"):
        recover(case / "o.onnx", case / "model.onnx", case / "data.npz", settings())


def test_model_with_other_types_is_refused(case: Path) -> None:
    onnx.save_model(build(NETWORK.replace("float", "double")), case / "o.onnx")
    with pytest.raises(
        GateFailed,
        match="the input 'x' is float32 in the original and float64 in the pruned model",
    ):
        recover(case / "o.onnx", case / "model.onnx", case / "data.npz", settings())


def test_larger_model_is_noted(case: Path) -> None:
    swapped = recover(
        case / "model.onnx", case / "half.onnx", case / "data.npz", settings(recover=2)
    )
    before, after = (cost.count(loading.load(case / name)) for name in ("half.onnx", "model.onnx"))
    assert swapped.notes[0] == (
        f"the pruned model has more parameters ({after.params:,} against {before.params:,}) and MACs "
        f"({after.macs:,} against {before.macs:,}) than the original; see whether the two are swapped"
    )
    found = recover(case / "half.onnx", case / "model.onnx", case / "data.npz", settings(recover=2))
    assert not any("swapped" in note for note in found.notes)


@pytest.mark.parametrize("is_original", [True, False])
@pytest.mark.parametrize("in_memory", [True, False])
def test_message_names_the_model_that_does_not_run(
    is_original: bool, in_memory: bool, case: Path
) -> None:
    text = NETWORK.replace("Relu(a)", "own.Unknown(a)")
    broken = build(text, domains={"own": 1})
    onnx.save_model(broken, case / "broken.onnx")
    source = broken if in_memory else case / "broken.onnx"
    pair = (case / "model.onnx", source) if is_original else (source, case / "model.onnx")
    name = "the original" if is_original else "the pruned model"
    if not in_memory:
        name += f" ({case / 'broken.onnx'})"
    with pytest.raises(ModelError, match=re.escape(f"ONNX Runtime cannot load {name}: ")):
        recover(*pair, case / "data.npz", settings())


def test_result_is_saved_with_its_digest(case: Path, tmp_path: Path) -> None:
    pair = (case / "half.onnx", case / "model.onnx")
    found = recover(*pair, case / "data.npz", settings(recover=5))
    written = found.save(tmp_path / "out.onnx")
    content = (tmp_path / "out.onnx").read_bytes()
    assert content == found.model.SerializeToString()
    assert written.output == str(tmp_path / "out.onnx")
    assert written.output_sha256 == hashlib.sha256(content).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    for source in pair:
        with pytest.raises(OutputError, match="would overwrite the input"):
            found.save(source)


def test_models_that_take_texts_are_refused(tmp_path: Path) -> None:
    text = """(string[N,2] words) => (float[N,2,4] y) <float[3,8] w1, float[8,4] w2> {
        e = ai.onnx.ml.LabelEncoder<keys_strings = ["a", "b"], values_int64s = [0, 1]>(words)
        g = Gather(w1, e)
        r = Relu(g)
        y = MatMul(r, w2)
    }"""
    onnx.save_model(build(text, domains={"ai.onnx.ml": 2}), tmp_path / "m.onnx")
    words = np.random.default_rng(0).choice(["a", "b"], (40, 2))
    with pytest.raises(SettingsError, match="the graph input 'words' takes texts"):
        recover(tmp_path / "m.onnx", tmp_path / "m.onnx", {"words": words}, settings(), None)


def test_prune_recovers_behind_the_refit(case: Path) -> None:
    chosen = Settings.create(
        macs=0.4, recover=150, force=True, task="values", align=1, device="cpu"
    )
    report = prune(case / "model.onnx", case / "data.npz", case / "out.onnx", chosen)
    assert report.recovery is not None
    assert report.recovery.accepted
    assert report.recovery.features
    (measure,) = report.verification.outputs
    assert measure.values == report.recovery.outputs[0].values


@pytest.fixture
def with_evaluation(case: Path) -> Path:
    """The data, with samples of the user's own to measure on."""
    path = case / "evaluated.npz"
    with np.load(case / "data.npz") as data:
        np.savez(path, **{"x": data["x"], "eval.x": np.flip(data["x"], 1)})
    return path


def judged_alone(**changes: object) -> Settings:
    return Settings.create(macs=0.4, force=True, task="values", align=1, device="cpu", **changes)


@pytest.mark.usefixtures("much_too_large_rate")
def test_refused_recovery_leaves_the_model_refitted_to_all_samples(
    case: Path, with_evaluation: Path
) -> None:
    model = case / "model.onnx"
    prune(model, with_evaluation, case / "plain.onnx", judged_alone())
    report = prune(model, with_evaluation, case / "refused.onnx", judged_alone(recover=20))
    assert report.recovery is not None
    assert not report.recovery.accepted
    assert (report.recovery.samples, report.recovery.held_out) == (192, 48)
    assert (case / "refused.onnx").read_bytes() == (case / "plain.onnx").read_bytes()
    assert any("refitted to all 240 samples" in note for note in report.notes)
    (measure,) = report.verification.outputs
    assert measure.values == report.recovery.outputs[0].values
    assert measure.values != report.recovery.outputs_before[0].values


@pytest.mark.parametrize("is_worse", [True, False])
def test_recovery_that_loses_more_on_evaluation_data_is_refused(
    is_worse: bool, case: Path, with_evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training starts from a refit to fewer samples, so that its own gain may be less than that of the others."""
    real = execution.carry_out

    def carry_out(ready: Context, chosen: Plan) -> Attempt:
        """The start of the training as a refit to very few samples would leave it: with noise in its weights."""
        found = real(ready, chosen)
        if not is_worse:
            return found
        proto, rng = onnx.ModelProto(), np.random.default_rng(0)
        proto.CopyFrom(found.pruned.proto)
        for held in proto.graph.initializer:
            value = numpy_helper.to_array(held)
            noise = rng.normal(size=value.shape) * value.std()
            held.CopyFrom(numpy_helper.from_array(value + noise.astype(value.dtype), held.name))
        return replace(found, pruned=replace(found.pruned, proto=proto))

    model = case / "model.onnx"
    plain = prune(model, with_evaluation, case / "plain.onnx", judged_alone())
    monkeypatch.setattr(execution, "carry_out", carry_out)
    asked = judged_alone(recover=12)
    report = prune(model, with_evaluation, case / "recovered.onnx", asked)
    assert report.recovery is not None
    assert report.recovery.after is not None
    assert report.recovery.after < report.recovery.before
    is_plain = (case / "recovered.onnx").read_bytes() == (case / "plain.onnx").read_bytes()
    assert report.recovery.accepted == (not is_worse)
    assert is_plain == is_worse
    assert any("its objective on the evaluation data" in note for note in report.notes) == is_worse
    (found,), (unrecovered,) = report.verification.outputs, plain.verification.outputs
    assert found.lost <= unrecovered.lost


@pytest.mark.usefixtures("much_too_large_rate")
def test_refused_recovery_of_a_plan_leaves_what_apply_writes(
    case: Path, with_evaluation: Path
) -> None:
    chosen = {"refit": "least-squares", "force": True, "device": "cpu"}
    arguments = (case / "model.onnx", case / "plan.json", with_evaluation)
    apply(*arguments, case / "plain.onnx", chosen)
    report = apply(*arguments, case / "refused.onnx", {**chosen, "recover": 20})
    assert report.recovery is not None
    assert not report.recovery.accepted
    assert (case / "refused.onnx").read_bytes() == (case / "plain.onnx").read_bytes()


def test_samples_that_judge_a_recovery_are_in_no_refit(
    case: Path, with_evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of the judging samples change what is measured there, and not the start of the training."""
    started = []

    def run(pair: recovery.Pair, *_: object, **__: object) -> None:
        started.append((pair.pruned.proto.SerializeToString(), _[1], _[2]))
        raise InterruptedError

    monkeypatch.setattr(recovery, "run", run)
    with np.load(with_evaluation) as data:
        arrays = dict(data)
    asked = {"refit": "least-squares", "recover": 20, "cache": "off", "device": "cpu"}
    for _ in range(2):
        with pytest.raises(InterruptedError):
            apply(case / "model.onnx", case / "plan.json", arrays, None, asked)
        judged = started[-1][2]
        arrays["x"][judged.origin] *= 3.0
    (first, trained, judged), (second, _, _) = started
    assert first == second
    assert not set(trained.origin) & set(judged.origin)
    assert set(trained.origin) | set(judged.origin) == set(range(240))


# ------------------------------------------------------------------------------------------------------- weights


def test_shared_weight_stays_one_weight(tmp_path: Path) -> None:
    text = """(float[N, 6] x) => (float[N, 6] y) <float[6, 6] w, float[6] b> {
        a = MatMul(x, w)
        r = Relu(a)
        c = MatMul(r, w)
        y = Add(c, b)
    }"""
    model = load(build(text), tmp_path)
    ours = engine.Engine(model, ["y"], weights=Trainable(model)(model.nodes))
    assert set(ours.weights) == {"w", "b"}


def test_scales_of_quantisation_and_statistics_are_not_trained(tmp_path: Path) -> None:
    text = """(float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y)
    <int8[4, 3, 3, 3] codes, float[4] gain_q, int8[4] zeros, float[4] b, float[4] gain, float[4] shift, float[4] mean,
     float[4] var, float low = {0.0}> {
        w = DequantizeLinear<axis = 0>(codes, gain_q, zeros)
        a = Conv(x, w, b)
        n = BatchNormalization(a, gain, shift, mean, var)
        y = Clip(n, low)
    }"""
    proto = build(text)
    model = load(proto, tmp_path)
    assert Trainable(model)(model.nodes) == ["b", "gain", "shift"]


def test_weight_behind_a_view_is_trained_where_it_is_stored(tmp_path: Path) -> None:
    text = """(float[N, 6] x) => (float[N, 4] y) <float[4, 6] w> {
        t = Transpose<perm = [1, 0]>(w)
        y = MatMul(x, t)
    }"""
    model = load(build(text), tmp_path)
    (name,) = Trainable(model)(model.nodes)
    ours = engine.Engine(model, ["y"], weights=[name])
    (found,) = ours.run({"x": torch.ones(2, 6)})
    found.sum().backward()
    assert ours.weights[name].grad is not None


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_precision_is_trained_and_written_back(kind: type, case: Path) -> None:
    model, half = onnx.load(case / "model.onnx"), onnx.load(case / "half.onnx")
    for proto in (model, half):
        for held in proto.graph.initializer:
            value = numpy_helper.to_array(held)
            if value.dtype == np.float32:
                held.CopyFrom(numpy_helper.from_array(value.astype(kind), held.name))
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        del proto.graph.value_info[:]
    onnx.save_model(model, case / "other.onnx")
    onnx.save_model(half, case / "other_half.onnx")
    with np.load(case / "data.npz") as data:
        np.savez(case / "other.npz", x=data["x"].astype(kind))
    found = recover(
        case / "other_half.onnx",
        case / "other.onnx",
        case / "other.npz",
        settings(recover=100),
        case / "out.onnx",
    )
    assert found.recovery.accepted
    assert {value.dtype for value in stored(case / "out.onnx").values()} == {np.dtype(kind)}


def test_masks_and_scales_of_rounded_weights_stay(tmp_path: Path) -> None:
    text = """(float[N, 8] x) => (float[N, 6] y)
    <float[8, 24] w1, float scale = {0.02}, int8 zero = {0}, float[24, 6] w2, float[6] suppressed> {
        q = QuantizeLinear(w1, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        a = MatMul(x, d)
        r = Relu(a)
        c = MatMul(r, w2)
        y = Add(c, suppressed)
    }"""
    proto = build(text)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    hiding = np.array([0, 0, -np.inf, 0, np.finfo(np.float32).min, 0], np.float32)
    held["suppressed"].CopyFrom(numpy_helper.from_array(hiding, "suppressed"))
    onnx.save_model(proto, tmp_path / "model.onnx")
    rng = np.random.default_rng(1)
    for name in ("w1", "w2"):
        value = numpy_helper.to_array(held[name])
        noise = 0.3 * value.std() * rng.normal(size=value.shape)
        held[name].CopyFrom(numpy_helper.from_array((value + noise).astype(np.float32), name))
    onnx.save_model(proto, tmp_path / "other.onnx")
    found = recover(
        tmp_path / "other.onnx",
        tmp_path / "model.onnx",
        {"x": rng.normal(size=(100, 8)).astype(np.float32)},
        settings(recover=100, task="classes"),
        tmp_path / "out.onnx",
    )
    assert found.recovery.accepted
    before, after = stored(tmp_path / "other.onnx"), stored(tmp_path / "out.onnx")
    assert {n for n in after if not np.array_equal(after[n], before[n])} == {"w1", "w2"}


def test_node_that_torch_cannot_compute_is_named_and_the_rest_is_trained(tmp_path: Path) -> None:
    text = """(float[N, 8] x) => (float[N, 4] y, float[N, 4] z)
    <float[8, 24] w1, float[24, 16] w2, float[16, 4] w3> {
        a = MatMul(x, w1)
        r = Relu(a)
        c = MatMul(r, w2)
        t = Tanh(c)
        y = MatMul(t, w3)
        z = com.microsoft.Trilu(y)
    }"""
    proto = build(text, domains={"com.microsoft": 1})
    onnx.save_model(proto, tmp_path / "model.onnx")
    rng = np.random.default_rng(1)
    for held in proto.graph.initializer:
        value = numpy_helper.to_array(held)
        noise = 0.3 * value.std() * rng.normal(size=value.shape)
        held.CopyFrom(numpy_helper.from_array((value + noise).astype(np.float32), held.name))
    onnx.save_model(proto, tmp_path / "other.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(100, 8)).astype(np.float32))
    found = recover(
        tmp_path / "other.onnx",
        tmp_path / "model.onnx",
        tmp_path / "data.npz",
        settings(recover=100),
    )
    assert any("Trilu" in text for text in found.recovery.left_out)
    assert found.recovery.weights > 0
    assert found.recovery.accepted


def test_ends_of_blocks_that_are_not_trained_are_named_with_the_reason(tmp_path: Path) -> None:
    """The part behind the node that torch cannot compute is trained, as it has more weights."""
    text = """(float[N, 8] x) => (float[N, 4] y)
    <float[8, 16] w1, float[16, 24] w2, float[24, 32] w3, float[32, 4] w4, int64[1] size = {16}> {
        a = MatMul(x, w1)
        t = CenterCropPad<axes = [1]>(a, size)
        c = MatMul(t, w2)
        r = Relu(c)
        d = MatMul(r, w3)
        s = Relu(d)
        y = MatMul(s, w4)
    }"""
    onnx.save_model(build(text, opset=18), tmp_path / "model.onnx")
    data = {"x": np.random.default_rng(1).normal(size=(60, 8)).astype(np.float32)}
    files = (tmp_path / "model.onnx", tmp_path / "model.onnx", data)
    found = recover(*files, settings(recover=2))
    assert found.recovery.features == ("c", "d", "s")
    assert found.recovery.features_left_out == {"a": "it is no part of what is trained"}
    document = documents.recovered(found)["recovery"]
    assert document["features_left_out"] == found.recovery.features_left_out


BRANCHES = """(float[N, 8] x) => (float[N, 4] y)
<float[8, 16] w1, float[16, 4] w2, float zero = {{0}}, int64[1] first = {{0}}, int64[1] last = {{4}},
 int64[1] axis = {{1}}> {{
    m = ReduceMean<keepdims = 0>(x)
    c = Greater(m, zero)
    b = MatMul(x, w1)
    y = If(c) <
        then_branch = g1 () => (float[N, 4] t) {{ r = Relu({0}) t = MatMul(r, w2) }},
        else_branch = g2 () => (float[N, 4] e) {{ {1} }}
    >
}}"""


def _recovered_by_single_samples(text: str, folder: Path) -> Recovery:
    onnx.save_model(build(text), folder / "model.onnx")
    data = {"x": np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)}
    files = (folder / "model.onnx", folder / "model.onnx", data)
    return recover(*files, settings(recover=20, batch_size=1)).recovery


def test_batch_that_depends_on_no_weight_does_no_step(tmp_path: Path) -> None:
    """The weights are in the branch that about half of the samples take."""
    text = BRANCHES.format("v", "e = Slice(x, first, last, axis)")
    text = text.replace("b = MatMul(x, w1)", "").replace("r = ", "v = MatMul(x, w1) r = ")
    found = _recovered_by_single_samples(text, tmp_path)
    assert (found.weights, found.steps, found.ended) == (2, 20, "budget")


def test_form_in_a_branch_that_the_first_sample_does_not_take_is_named(tmp_path: Path) -> None:
    """Either branch holds it, so that one of them is not taken; the layer in front of the branches is trained."""
    form = "u = Cast<to = 12>(b) f = Cast<to = 1>(u)"
    texts = (
        BRANCHES.format("b", f"{form} e = Slice(f, first, last, axis)"),
        BRANCHES.format("f", "e = Slice(b, first, last, axis)").replace("r = ", f"{form} r = "),
    )
    for text in texts:
        found = _recovered_by_single_samples(text, tmp_path)
        assert found.weights == 1
        assert "casts to a type that torch does not compute in" in found.left_out[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recovery_on_a_gpu_lowers_the_objective(case: Path) -> None:
    found = recover(
        case / "half.onnx",
        case / "model.onnx",
        case / "data.npz",
        settings(recover=2000, device="auto"),
    )
    assert found.recovery.device == "cuda"
    assert found.recovery.accepted


# --------------------------------------------------------------------------------------------------------- losses

ROWS = np.random.default_rng(3).normal(size=(2, 12, 5))
TERMS = {
    "classes": Term("y", "y", "y", "classes", axis=1),
    "probabilities": Term("y", "y", "y", "classes", axis=1),
    "rare classes": Term("y", "y", "y", "classes", axis=1),
    "distances": Term("y", "y", "y", "classes", axis=1, least=True),
    "binary": Term("y", "y", "y", "binary", axis=1),
    "scores": Term("y", "y", "y", "binary", axis=1, threshold=0.3),
    "embedding": Term("y", "y", "y", "embedding", axis=1),
    "values": Term("y", "y", "y", "values", axis=1),
    "masked values": Term("y", "y", "y", "values", axis=1, fill=-1e4),
}


@pytest.mark.parametrize("name", TERMS)
def test_loss_is_that_of_the_objective(name: str) -> None:
    forms = {"probabilities": "probabilities", "scores": "scores"}
    scale = Scale(
        form=forms.get(name, "logits"),  # type: ignore[arg-type]
        spread=0.7,
        variance=np.linspace(0.5, 2, 5),
        background=2 if name == "rare classes" else -1,
        balance=np.tile([[0.6, 2.5]], (5 if TERMS[name].kind == "binary" else 1, 1)),
    )
    term = replace(TERMS[name], scale=scale)
    old, new = ROWS
    if name == "probabilities":
        old, new = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (old, new))
    if name == "masked values":
        old, new = (np.where(np.eye(12, 5) > 0, v - 1e4, v) for v in (old, new))
    expected = compare(Objective((term,)), [old], [new]).total
    found = losses.objective_loss([term], [torch.from_numpy(old)], [torch.from_numpy(new)])
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_both_losses_of_an_ambiguous_output_are_trained() -> None:
    scale = Scale("logits", 0.7, np.linspace(0.5, 2, 5), background=-1, balance=np.ones((1, 2)))
    old, new = (torch.from_numpy(rows) for rows in ROWS)
    found = {}
    for kind in ("classes", "values", "ambiguous"):
        term = Term("y", "y", "y", kind, axis=1, scale=scale)  # type: ignore[arg-type]
        found[kind] = float(losses.objective_loss([term], [old], [new]))
    assert found["classes"] != found["values"]
    assert found["ambiguous"] == pytest.approx((found["classes"] + found["values"]) / 2)


def test_feature_loss_compares_the_channels_that_are_kept() -> None:
    old = np.arange(24.0).reshape(2, 3, 4)
    new = old[:, [0, 2]] + 1.0
    feature = losses.Feature("t", ((1, np.array([0, 2])),))
    kept = losses.kept_channels(feature, torch.from_numpy(old))
    found = losses.feature_loss([4.0], [kept], [torch.from_numpy(new)])
    assert float(found) == pytest.approx(0.25)
