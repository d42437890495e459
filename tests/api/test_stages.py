"""Stage by stage is the same as all at once; plan files are honoured or refused by line; the cache changes nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS
from graphs import build
from network_texts import RESIDUAL_CNN as TEXT

from onnx_oamip import (
    apply,
    couple,
    prune,
    score,
)
from onnx_oamip import plan as make_plan
from onnx_oamip.api import proof
from onnx_oamip.artifacts import cache, cache_entries, plan_files
from onnx_oamip.cli import main
from onnx_oamip.core.errors import DataError, GateFailed, OutputError
from onnx_oamip.core.records import Coupling, Ints, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.planning import latency_model
from onnx_oamip.verification.latency import Ratio

CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "bias": {"refit": "bias", "allocate": "uniform", "importance": "activation"},
    "none": {"refit": "none", "allocate": "global", "importance": "l2"},
    "size": {"macs": None, "size": 0.6},
    "drop": {"macs": None, "max_drop": 20.0},
    "seed": {"seed": 3, "batch_size": 16},
    "exclude": {"exclude": ("w5",)},
    "oamip": {"importance": "oamip", "mode": "decoupled"},
}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with model.onnx and data.npz."""
    (tmp_path / "model.onnx").write_bytes(build(TEXT).SerializeToString())
    rng = np.random.default_rng(0)
    images = rng.normal(size=(120, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images, labels=np.arange(120) % 5)
    return tmp_path


def asked(**values: object) -> Settings:
    return Settings.create(**{"macs": 0.5, "align": 1, "device": "cpu", "workers": 1, **values})


def _stages(task: Path, scored: bool, **values: object) -> bytes:
    model, data = task / "model.onnx", task / "data.npz"
    scores = None
    if scored:
        scores = task / "s.npz"
        score(model, data, scores, asked(**values))
        values = {k: v for k, v in values.items() if k != "importance"}
    make_plan(model, data, task / "p.json", asked(**values), scores=scores)
    apply(model, task / "p.json", data, task / "b.onnx")
    return (task / "b.onnx").read_bytes()


@pytest.mark.parametrize("name", CHOICES)
def test_prune_is_score_plan_and_apply(task: Path, name: str) -> None:
    report = prune(task / "model.onnx", task / "data.npz", task / "a.onnx", asked(**CHOICES[name]))
    assert not report.plan.keep.all()
    assert _stages(task, True, **CHOICES[name]) == (task / "a.onnx").read_bytes()
    if name == "default":
        assert _stages(task, False) == (task / "a.onnx").read_bytes()


def _by_macs(
    model: Model, coupling: Coupling, ladder: Sequence[Ints], _samples: Samples, **named: Any
) -> latency_model.Measurement:
    """Seconds that follow from the MACs, in place of measured ones."""
    costs = cost.ledger(model, coupling)
    widths = latency_model.level_widths(coupling, ladder, seed=named["seed"])
    macs = [cost.Ledger.terms(costs.macs, costs.lengths(w)) for w in widths]
    nodes = 1e-9 * np.asarray(macs, float)
    return latency_model.Measurement(widths, 1e-6 + nodes.sum(axis=1), nodes)


def test_latency_plan_is_applied(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_model, "measure", _by_macs)
    monkeypatch.setattr("onnx_oamip.planning.latency_search.latency_ratio", lambda *_, **__: 0.88)
    found = make_plan(
        task / "model.onnx", task / "data.npz", task / "p.json", asked(macs=None, latency=0.9)
    )
    report = apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    assert not found.plan.keep.all()
    np.testing.assert_array_equal(report.plan.keep, found.plan.keep)
    assert report.budget.latency == 0.9


def test_plan_file_is_reproducible_and_readable(task: Path) -> None:
    texts = []
    for _ in range(2):
        make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
        texts.append((task / "p.json").read_text())
    assert texts[0] == texts[1]
    found = json.loads(texts[0])
    model = models.load(task / "model.onnx")
    assert found["model"]["sha256"] == model.sha256
    assert {g["name"]: g["units"] for g in found["groups"]} == {
        g.name: len(g.units) for g in couple(model).groups
    }
    assert {s["reason"] for s in found["skipped"]} == {p.reason for p in couple(model).pinned}
    for group in found["groups"]:
        assert group["kept"] == len(group["keep"])
        assert group["loss"] >= 0
        assert f'"keep": {json.dumps(group["keep"])}' in texts[0], (
            "a list of units stands on one line"
        )


def test_program_without_a_solver_is_shown_and_read(task: Path) -> None:
    """A group of one unit leaves nothing to choose."""
    text = """(float[N, 4] x) => (float[N, 3] y) <float[8, 4] w1, float[1, 8] w2, float[3, 1] w3> {
        h = Gemm <transB = 1>(x, w1)
        r = Relu(h)
        h2 = Gemm <transB = 1>(r, w2)
        r2 = Relu(h2)
        y = Gemm <transB = 1>(r2, w3)
    }"""
    (task / "narrow.onnx").write_bytes(build(text).SerializeToString())
    np.savez(task / "few.npz", x=np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32))
    settings = asked(importance="oamip", mode="decoupled")
    scored = score(task / "narrow.onnx", task / "few.npz", task / "s.npz", settings)
    assert None in [program["solver"] for program in scored.scores.programs]
    make_plan(
        task / "narrow.onnx", task / "few.npz", task / "p.json", asked(), scores=task / "s.npz"
    )
    arguments = [str(task / "narrow.onnx"), "--data", str(task / "few.npz"), "--macs", "0.6"]
    arguments += ["--importance", "oamip", "--mode", "decoupled", "--align", "1", "--device", "cpu"]
    arguments += ["--report", str(task / "page.html"), "-o", str(task / "a.onnx"), "--force"]
    assert main(["prune", *arguments]) == 0


def test_plan_edited_by_hand_is_applied(task: Path) -> None:
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
    content = json.loads((task / "p.json").read_text())
    group = next(g for g in content["groups"] if g["name"] == "w2")
    group["keep"], group["kept"] = [1, 4, 7], 3
    (task / "p.json").write_text(json.dumps(content))
    report = apply(
        task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx", {"refit": "none"}
    )
    written = models.load(task / "b.onnx")
    original = models.load(task / "model.onnx")
    np.testing.assert_array_equal(written.constants["b2"], original.constants["b2"][[1, 4, 7]])
    assert report.after.macs == report.plan.predicted.macs
    # It now keeps more than was asked for: said, and not refused.
    whole = {g["name"]: list(range(g["units"])) for g in content["groups"]}
    for g in content["groups"]:
        g["keep"], g["kept"] = whole[g["name"]], g["units"]
    (task / "p.json").write_text(json.dumps(content))
    report = apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    assert report.plan.keep.all()
    assert any("more than the budget" in note for note in report.notes)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "kept": (lambda c: c["groups"][1].update(kept=2), "groups", "'kept' says 2, but 'keep' lists"),
    "outside": (
        lambda c: c["groups"][0].update(keep=[0, 99], kept=2),
        "groups",
        "lists unit 99, but the units",
    ),
    "negative": (lambda c: c["groups"][0].update(keep=[-1, 0], kept=2), "groups", "lists unit -1"),
    "twice": (lambda c: c["groups"][0].update(keep=[3, 3], kept=2), "groups", "lists unit 3 twice"),
    "fewer than none": (
        lambda c: c["groups"][0].update(keep=[], kept=-1),
        "kept",
        "greater than or equal to 0",
    ),
    "a word": (lambda c: c["groups"][0].update(kept="six"), "kept", "valid integer"),
    "a fraction": (lambda c: c["groups"][0]["keep"].__setitem__(0, 0.5), "keep", "valid integer"),
    "a typing error": (lambda c: c["groups"][0].update(kepe=[1]), "kepe", "Extra inputs"),
    "missing": (lambda c: c["groups"][1].pop("units"), "units", "required"),
    "another kind": (lambda c: c.update(kind="a poem"), "kind", "onnx-oamip plan"),
    "a digest": (lambda c: c["model"].update(sha256="abc"), "sha256", "pattern"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_plan_is_refused_with_line_and_rule(task: Path, name: str) -> None:
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
    change, key, rule = BROKEN[name]
    _edit(task / "p.json", change)
    with pytest.raises(DataError) as error:
        apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    text = str(error.value)
    assert rule in text
    assert "'groups' number" in text or key in text
    line = int(text.split(", line ")[1].split(",")[0])
    lines = (task / "p.json").read_text().splitlines()
    if name in ("a word", "another kind", "a digest", "fewer than none", "a typing error"):
        assert f'"{key}"' in lines[line - 1]
    elif name == "a fraction":
        assert lines[line - 1].strip().startswith("0.5")
    else:
        assert lines[line - 1].strip() == "{", "the group that is wrong begins there"
    assert not (task / "b.onnx").exists()


def test_plan_without_units_that_the_model_needs_is_refused(task: Path) -> None:
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
    _edit(task / "p.json", lambda c: c["groups"][0].update(keep=[], kept=0))
    with pytest.raises(DataError, match="keeps no unit of w1, but "):
        apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    assert not (task / "b.onnx").exists()


def test_file_that_is_not_a_plan_is_refused(task: Path) -> None:
    bad = {
        "text": ("not json", "no valid JSON, line 1"),
        "cut": ('{\n "kind": "onnx-oamip plan",\n', "no valid JSON, line 3"),
        "list": ("[1, 2]", "the whole file"),
        "newer": ('{"kind": "onnx-oamip plan", "schema_version": 9}', "schema version 9"),
        "deep": ("[" * 100_000, "no valid JSON"),
    }
    for name, (text, rule) in bad.items():
        (task / "p.json").write_text(text)
        with pytest.raises(DataError, match=rule):
            apply(task / "model.onnx", task / "p.json", None, task / f"{name}.onnx")
    (task / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="as text"):
        apply(task / "model.onnx", task / "p.json", None, task / "b.onnx")
    with pytest.raises(DataError, match="no such plan file"):
        apply(task / "model.onnx", task / "nothing.json", None, task / "b.onnx")
    with pytest.raises(OutputError, match="would overwrite"):
        make_plan(task / "model.onnx", task / "data.npz", task / "model.onnx", asked())


# ------------------------------------------------------------------------------------------------- another model


def test_plan_applies_to_a_model_with_the_same_names(task: Path) -> None:
    found = make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked(refit="none"))
    (task / "other.onnx").write_bytes(build(TEXT, seed=7).SerializeToString())
    report = apply(task / "other.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    np.testing.assert_array_equal(report.plan.keep, found.plan.keep)
    assert any("matched by name" in note for note in report.notes)


def test_plan_applies_to_the_same_graph_with_other_names(task: Path) -> None:
    found = make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked(refit="none"))
    renamed = TEXT
    for i, name in enumerate(("w1", "b1", "w2", "b2", "w3", "w4", "b4", "w5")):
        renamed = renamed.replace(name, f"other_{9 - i}")
    (task / "other.onnx").write_bytes(build(renamed, seed=3).SerializeToString())
    report = apply(task / "other.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    np.testing.assert_array_equal(report.plan.keep, found.plan.keep)
    assert any("order of the same graph" in note for note in report.notes)


def test_plan_for_another_model_is_refused(task: Path) -> None:
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
    wider = TEXT.replace(
        "float[8, 6, 3, 3] w2, float[8] b2, float[6, 8, 3, 3] w3",
        "float[9, 6, 3, 3] w2, float[9] b2, float[6, 9, 3, 3] w3",
    )
    (task / "wider.onnx").write_bytes(build(wider).SerializeToString())
    with pytest.raises(DataError, match=r"8 units in the group 'w2'.*has 9"):
        apply(task / "wider.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    (task / "other.onnx").write_bytes(build(wider.replace("w2", "v2")).SerializeToString())
    with pytest.raises(DataError, match=r"names the group 'w2', which .* does not have"):
        apply(task / "other.onnx", task / "p.json", task / "data.npz", task / "b.onnx")


def test_groups_missing_from_a_plan_keep_all_units(task: Path) -> None:
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
    _edit(task / "p.json", lambda c: c.update(groups=[g for g in c["groups"] if g["name"] != "w2"]))
    report = apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    assert models.load(task / "b.onnx").constants["b2"].shape == (8,)
    assert any("does not name 1 group" in note for note in report.notes)
    _edit(task / "p.json", lambda c: c.update(groups=c["groups"] * 2))
    with pytest.raises(DataError, match="twice"):
        apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "c.onnx")


def test_apply_runs_the_gates(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", asked())
    slow = Ratio(1.5, 1.4, 1.6, 9, added=2e-4)
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: slow)
    with pytest.raises(GateFailed, match="slower"):
        apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx")
    assert not (task / "b.onnx").exists()
    apply(task / "model.onnx", task / "p.json", task / "data.npz", task / "b.onnx", {"force": True})
    with pytest.raises(DataError, match="needs calibration data"):
        apply(task / "model.onnx", task / "p.json", None, task / "c.onnx")
    apply(
        task / "model.onnx",
        task / "p.json",
        None,
        task / "c.onnx",
        {"refit": "none", "force": True},
    )


# --------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["default", "bias", "oamip", "exclude"])
def test_cached_run_is_byte_identical(task: Path, folder: Path, name: str) -> None:
    values = CHOICES[name]
    bare = prune(task / "model.onnx", task / "data.npz", task / "a.onnx", asked(**values))
    first = prune(
        task / "model.onnx", task / "data.npz", task / "b.onnx", asked(**values, cache=str(folder))
    )
    second = prune(
        task / "model.onnx", task / "data.npz", task / "c.onnx", asked(**values, cache=str(folder))
    )
    assert (
        (task / "a.onnx").read_bytes()
        == (task / "b.onnx").read_bytes()
        == (task / "c.onnx").read_bytes()
    )
    assert not any("cache" in note for note in (*bare.notes, *first.notes))
    assert any("from the cache" in note for note in second.notes)
    assert second.scores is not None
    assert first.scores is not None
    assert second.scores.notes == first.scores.notes
    assert len(second.scores.programs) == len(first.scores.programs)


def test_another_budget_reuses_cached_statistics(
    task: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = asked(cache=str(folder))
    make_plan(task / "model.onnx", task / "data.npz", task / "p.json", kept)
    for name in (
        "statistics.calibration.collect",
        "statistics.covariances.collect",
        "planning.sensitivity.measure",
        "planning.allocation.steps",
    ):
        monkeypatch.setattr(f"onnx_oamip.{name}", lambda *_, **__: pytest.fail("learnt again"))
    other = make_plan(
        task / "model.onnx", task / "data.npz", task / "q.json", asked(macs=0.3, cache=str(folder))
    )
    assert other.plan.predicted.macs <= 0.3 * other.before.macs
    assert any("from the cache" in note for note in other.notes)


def test_changed_inputs_invalidate_cache_entries(task: Path, folder: Path) -> None:
    def taken(**values: object) -> str:
        found = make_plan(
            task / "model.onnx", task / "data.npz", None, asked(cache=str(folder), **values)
        )
        return " ".join(n for n in found.notes if "cache" in n)

    assert taken() == ""
    assert "scores" in taken()
    assert taken(seed=1) == taken(batch_size=7) == "" or "scores" not in taken(seed=2)
    assert "losses" not in taken(refit="bias")
    assert "scores" not in taken(exclude=("w5",))
    arrays = dict(np.load(task / "data.npz"))
    arrays["image"][0, 0, 0, 0] += 1
    np.savez(task / "data.npz", **arrays)
    assert "scores" not in taken()
    proto = onnx.load(task / "model.onnx")
    proto.producer_name = "somebody else"
    onnx.save_model(proto, task / "model.onnx")
    assert "scores" not in taken()


def test_broken_cache_entry_counts_as_missing(task: Path, folder: Path) -> None:
    kept = asked(cache=str(folder))
    prune(task / "model.onnx", task / "data.npz", task / "a.onnx", kept)
    for i, path in enumerate(sorted(folder.iterdir())):
        content = path.read_bytes()
        path.write_bytes(
            [b"", content[: len(content) // 2], b"\0" * 64, b"PK\x03\x04 nonsense"][i % 4]
        )
    found = prune(task / "model.onnx", task / "data.npz", task / "b.onnx", kept)
    assert not any("cache" in note for note in found.notes)
    assert (task / "a.onnx").read_bytes() == (task / "b.onnx").read_bytes()


def test_cache_stays_under_its_size_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_TOTAL_BYTES", 40_000)
    monkeypatch.setattr(cache, "MAX_ENTRY_BYTES", 20_000)
    store = cache.open_store(str(folder))
    now = time.time()
    for i in range(8):
        store.recall(
            cache_entries.STEPS, {"i": i}, lambda: np.zeros(1000, np.int64), lambda _: True
        )
        for path in folder.iterdir():
            if path.stat().st_mtime > now:
                os.utime(path, (now - 100 + i, now - 100 + i))
    sizes = [p.stat().st_size for p in folder.iterdir()]
    assert sum(sizes) <= 40_000
    assert len(sizes) == 4
    store.recall(
        cache_entries.STEPS, {"i": 7}, lambda: pytest.fail("the newest stays"), lambda _: True
    )
    store.recall(
        cache_entries.STEPS, {"large": 1}, lambda: np.zeros(10_000, np.int64), lambda _: True
    )
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 40_000


def test_cache_folder_follows_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNX_OAMIP_CACHE", str(folder))
    assert cache.open_store("auto").folder == folder
    assert cache.open_store("off").folder is None
    assert cache.open_store(str(tmp_path / "x")).folder == tmp_path / "x"
    monkeypatch.setenv("ONNX_OAMIP_CACHE", "off")
    assert cache.open_store("auto").folder is None
    monkeypatch.delenv("ONNX_OAMIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made or written"):
        cache.open_store(str(tmp_path / "file"))


def test_shipped_model_passes_all_stages(tmp_path: Path) -> None:
    model, data = MODELS / "lenet5-mnist.onnx", MODELS / "mnist.npz"
    prune(model, data, tmp_path / "a.onnx", asked(macs=0.4, samples=64))
    make_plan(model, data, tmp_path / "p.json", asked(macs=0.4, samples=64))
    apply(model, tmp_path / "p.json", data, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert plan_files.load(tmp_path / "p.json").budget["macs"] == 0.4


# --------------------------------------------------------------------------------------------------------- strict


def test_strict_accepts_axes_pinned_by_graph_inputs_and_outputs(task: Path) -> None:
    """The first layer's inputs and the last one's outputs stay in every model."""
    prune(task / "model.onnx", task / "data.npz", task / "a.onnx", asked(strict=True))
    for name in ("resnet20-fashion", "vgg-fashion", "mobilenet-fashion", "vit-fashion"):
        model = models.load(MODELS / f"{name}.onnx")
        assert all(p.given for p in couple(model).pinned), name


def test_strict_refuses_layers_that_cannot_be_pruned(task: Path) -> None:
    """A sum over an axis that the analysis cannot follow keeps the channels of the layers around."""
    proto = build(
        TEXT.replace("d = Conv(s, w5)", "q = CumSum(s, at)\n    d = Conv(q, w5)").replace(
            "float[5, 4] w4,", "float[5, 4] w4, int64 at = {1},"
        )
    )
    (task / "odd.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(
        GateFailed, match=r"`strict`: channels of \d layers cannot be removed: 'w1', because"
    ):
        prune(task / "odd.onnx", task / "data.npz", task / "b.onnx", asked(strict=True))
    assert not (task / "b.onnx").exists()
    prune(task / "odd.onnx", task / "data.npz", task / "b.onnx", asked(macs=0.8))
    pinned = {p.tensor: p for p in couple(models.load(task / "odd.onnx")).pinned}
    assert not pinned["w3"].given
    assert pinned["w4"].given
