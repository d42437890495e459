"""Files of scores: what is written is read back, says which unit is which, and fits no other model."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import CNN, MLP, RESIDUAL, build, load
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_oamip import prune, score
from onnx_oamip.api import proof
from onnx_oamip.artifacts import score_files
from onnx_oamip.artifacts.score_files import load_scores, save_scores
from onnx_oamip.core.errors import DataError, OamipError, OutputError
from onnx_oamip.core.records import (
    Array,
    Coupling,
    Model,
    Scores,
)
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple, exclude
from onnx_oamip.importance import find, names
from onnx_oamip.planning import execution
from onnx_oamip.verification.latency import Ratio

PROGRAM = {
    "purpose": "importance",
    "solver": "highs",
    "status": "optimal",
    "gap": 0.0,
    "seconds": 1.5,
    "variables": 4,
}
PROGRAMS = ({**PROGRAM, "rows": np.int64(7)},)


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, Model, Coupling, Scores]:
    """A file of random scores, and what it was made from."""
    model = load(build(CNN), tmp_path)
    coupling = couple(model)
    values = np.random.default_rng(0).random(coupling.n_units)
    scores = Scores("activation", values, PROGRAMS)
    save_scores(tmp_path / "s.npz", model, coupling, scores, settings={"seed": 3})
    return tmp_path / "s.npz", model, coupling, scores


def _arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_scores_survive_a_round_trip(scored: tuple[Path, Model, Coupling, Scores]) -> None:
    path, model, coupling, scores = scored
    found = load_scores(path, model, coupling)
    np.testing.assert_array_equal(found.values, scores.values)
    assert found.method == "activation"
    assert found.programs == ({**PROGRAM, "rows": 7},)


def test_score_file_names_every_unit(scored: tuple[Path, Model, Coupling, Scores]) -> None:
    path, model, coupling, scores = scored
    file = _arrays(path)
    assert int(file["schema_version"]) == 1
    assert str(file["model_sha256"]) == model.sha256
    assert str(file["model_path"]) == model.path
    assert str(file["method"]) == "activation"
    assert json.loads(str(file["settings"])) == {"seed": 3}
    np.testing.assert_array_equal(file["values"], scores.values)
    assert file["values"].dtype == np.float64
    axes = json.loads(str(file["group_axes"]))
    assert [str(n) for n in file["group_names"]] == ["w1", "w2"]
    assert [a[0] for a in axes] == [{"tensor": n, "axis": 0, "per_unit": 1} for n in ("w1", "w2")]
    assert {"tensor": "w3", "axis": 0, "per_unit": 16} in axes[1]
    for unit in range(coupling.n_units):
        first = axes[file["unit_group"][unit]][0]
        assert coupling.axes[first["tensor"], first["axis"]][file["unit_index"][unit]] == unit


def test_same_scores_give_the_same_bytes(scored: tuple[Path, Model, Coupling, Scores]) -> None:
    path, model, coupling, scores = scored
    again = save_scores(path.with_name("again.npz"), model, coupling, scores, settings={"seed": 3})
    assert again == path.read_bytes() == path.with_name("again.npz").read_bytes()


def test_groups_can_be_excluded_after_scoring_but_not_added(tmp_path: Path) -> None:
    model = load(build(RESIDUAL), tmp_path)
    whole = couple(model)
    fewer = exclude(model, whole, ["w1"])
    assert 0 < fewer.n_units < whole.n_units
    values = np.arange(whole.n_units, dtype=np.float64)
    save_scores(tmp_path / "s.npz", model, whole, Scores("l2", values), settings={})
    found = load_scores(tmp_path / "s.npz", model, fewer)
    (group,) = (g for g in whole.groups if g.name == "w2")
    np.testing.assert_array_equal(found.values, values[group.units])
    save_scores(tmp_path / "s.npz", model, fewer, found, settings={})
    with pytest.raises(DataError, match=r"no scores for the group 'w1'.*without `exclude`\.$"):
        load_scores(tmp_path / "s.npz", model, whole)


# ------------------------------------------------------------------------------------------------------- refusals

Change = Callable[[dict[str, Array]], object]
MISTAKES: dict[str, tuple[Change, str]] = {
    "another version": (
        lambda f: f.update(schema_version=np.int64(2)),
        "schema version 2 but this version reads 1",
    ),
    "no version": (lambda f: f.pop("schema_version"), "it has no 'schema_version'"),
    "a version that is text": (
        lambda f: f.update(schema_version=np.asarray("1")),
        "schema version None",
    ),
    "another model": (
        lambda f: f.update(model_sha256=np.asarray("f" * 64)),
        "with sha256 ffffffffffff, but",
    ),
    "a text that is a number": (lambda f: f.update(method=np.int64(4)), "'method' is no text"),
    "no values": (lambda f: f.pop("values"), "it has no 'values'"),
    "one value too few": (
        lambda f: f.update(values=f["values"][1:]),
        r"the shapes \(19,\), \(20,\) and \(20,\)",
    ),
    "values in a table": (lambda f: f.update(values=f["values"].reshape(2, 10)), "the shapes"),
    "values that are whole": (
        lambda f: f.update(values=np.arange(20)),
        "types that no scores have",
    ),
    "values that are text": (
        lambda f: f.update(values=np.asarray(["a"] * 20)),
        "types that no scores have",
    ),
    "a unit in another group": (
        lambda f: f["unit_group"].__setitem__(0, 1),
        "has 7 units in the group 'w1'",
    ),
    "a unit elsewhere": (lambda f: f["unit_index"].__setitem__(0, 5), "they are not the 8"),
    "a group of another name": (
        lambda f: f["group_names"].__setitem__(1, "v2"),
        "no scores for the group 'w2'",
    ),
    "NaN": (
        lambda f: f["values"].__setitem__(9, np.nan),
        "1 of 20 scores are NaN or infinite, the first in .*'w2'",
    ),
    "infinity": (
        lambda f: f["values"].__setitem__(0, np.inf),
        "NaN or infinite, the first in the group 'w1'",
    ),
    "programs that are no list": (
        lambda f: f.update(programs=np.asarray("7")),
        "'programs' is no JSON list",
    ),
    "programs that are no JSON": (
        lambda f: f.update(programs=np.asarray("{")),
        "'programs' is no JSON list",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_scores_that_do_not_fit_the_model_are_refused(
    scored: tuple[Path, Model, Coupling, Scores], mistake: str
) -> None:
    path, model, coupling, _ = scored
    file = _arrays(path)
    change, words = MISTAKES[mistake]
    change(file)
    np.savez(path, **file)
    with pytest.raises(DataError, match=words) as caught:
        load_scores(path, model, coupling)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"values": [1.0]}))


def _objects(path: Path) -> None:
    np.savez(path, **{**_arrays(path), "values": np.asarray([{}] * 20, object)})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no such file of scores"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "text": (lambda p: p.write_text("scores: 1 2 3"), "cannot be read"),
    "pickled": (_pickled, "cannot be read"),
    "arrays of objects": (_objects, "cannot be read"),
    "one array": (lambda p: p.write_bytes(_npy()), "it holds one array"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be read"),
    "data": (lambda p: np.savez(p, x=np.zeros(4)), "it has no 'schema_version'"),
}


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_not_a_score_file_is_refused(
    scored: tuple[Path, Model, Coupling, Scores], name: str
) -> None:
    path, model, coupling, _ = scored
    make, words = BROKEN[name]
    make(path)
    with pytest.raises(DataError, match=words):
        load_scores(path, model, coupling)


def test_any_damage_is_detected_or_harmless(tmp_path: Path) -> None:
    model = load(build(MLP), tmp_path)
    coupling = couple(model)
    values = np.random.default_rng(0).random(coupling.n_units)
    content = save_scores(tmp_path / "s.npz", model, coupling, Scores("l1", values), settings={})
    path = tmp_path / "damaged.npz"

    @settings(max_examples=150)
    @given(at=st.integers(0, len(content) - 1), to=st.integers(0, 255), cut=st.booleans())
    def holds(at: int, to: int, cut: bool) -> None:
        path.write_bytes(content[:at] if cut else content[:at] + bytes([to]) + content[at + 1 :])
        try:
            found = load_scores(path, model, coupling)
        except OamipError:
            return
        np.testing.assert_array_equal(found.values, values)

    holds()


def test_non_finite_scores_are_not_written(
    scored: tuple[Path, Model, Coupling, Scores],
) -> None:
    path, model, coupling, scores = scored
    before = path.read_bytes()
    with pytest.raises(DataError, match="2 of 20 scores are NaN"):
        save_scores(
            path,
            model,
            coupling,
            Scores("l2", np.where(np.arange(20) < 2, np.nan, scores.values)),
            settings={},
        )
    assert path.read_bytes() == before


def test_failed_write_keeps_the_old_file(
    scored: tuple[Path, Model, Coupling, Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, coupling, scores = scored
    before, names = path.read_bytes(), sorted(p.name for p in path.parent.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_files.os, "replace", full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device\.$"):
        save_scores(path, model, coupling, Scores("l2", scores.values + 1), settings={})
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == names


@pytest.mark.skipif(os.name != "posix", reason="modes are as POSIX has them")
def test_score_file_has_the_default_permissions(
    scored: tuple[Path, Model, Coupling, Scores],
) -> None:
    path = scored[0]
    path.with_name("plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.with_name("plain").stat().st_mode)


# -------------------------------------------------------------------------------------------------- score and prune


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.onnx and data.npz."""
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    (tmp_path / "model.onnx").write_bytes(build(CNN).SerializeToString())
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=images, labels=np.arange(40) % 5)
    return tmp_path


def _settings(**values: object) -> Settings:
    return Settings.create(
        **{"allocate": "uniform", "refit": "bias", "align": 1, "device": "cpu", **values}
    )


@pytest.mark.parametrize("name", names())
def test_pruning_by_a_score_file_equals_pruning_by_its_scores(task: Path, name: str) -> None:
    model, source = task / "model.onnx", task / "data.npz"
    found = score(model, source, task / "s.npz", _settings(importance=name))
    assert found.output == str(task / "s.npz")
    loaded = models.load(model)
    np.testing.assert_array_equal(
        load_scores(task / "s.npz", loaded, couple(loaded)).values, found.scores.values
    )
    at_once = prune(model, source, task / "a.onnx", _settings(importance=name, macs=0.5))
    by_file = prune(model, source, task / "b.onnx", _settings(macs=0.5), scores=task / "s.npz")
    assert by_file.output_sha256 == at_once.output_sha256
    assert by_file.scores.method == at_once.scores.method
    assert (by_file.settings["importance"], by_file.settings["scores"]) == (
        name,
        str(task / "s.npz"),
    )
    assert at_once.settings["scores"] is None


def test_budget_program_accepts_scores_from_a_file(task: Path) -> None:
    model, source = task / "model.onnx", task / "data.npz"
    score(model, source, task / "s.npz", _settings(importance="l1"))
    asked = {"macs": 0.5, "allocate": "mip", "workers": 1}
    at_once = prune(model, source, task / "a.onnx", _settings(importance="l1", **asked))
    by_file = prune(model, source, task / "b.onnx", _settings(**asked), scores=task / "s.npz")
    assert by_file.output_sha256 == at_once.output_sha256


def test_with_scores_only_the_later_stages_need_data(task: Path) -> None:
    model, source = task / "model.onnx", task / "data.npz"
    score(model, source, task / "s.npz", _settings(importance="activation"))
    prune(model, None, task / "a.onnx", _settings(macs=0.5, refit="none"), scores=task / "s.npz")
    with pytest.raises(DataError, match=r"`refit=bias` needs calibration data"):
        prune(model, None, task / "b.onnx", _settings(macs=0.5), scores=task / "s.npz")
    with pytest.raises(OutputError, match="overwrite"):
        prune(model, None, task / "s.npz", _settings(macs=0.5, refit="none"), scores=task / "s.npz")


def test_scoring_requires_data_if_the_method_does(task: Path) -> None:
    with pytest.raises(DataError, match=r"`importance=obs` needs calibration data; give `data`\.$"):
        score(task / "model.onnx", None, task / "s.npz", _settings())
    with pytest.raises(OutputError, match="overwrite"):
        score(task / "model.onnx", None, task / "model.onnx", _settings(importance="l2"))
    found = score(task / "model.onnx", None, task / "s.npz", _settings(importance="l2"))
    assert found.notes == ()
    assert found.settings["samples"] == 0


def test_scores_of_folded_constants_require_data(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = {"l1": replace(find("l1"), keeps_bias=True)}
    monkeypatch.setattr(execution, "find", keeping.__getitem__)
    model, source = task / "model.onnx", task / "data.npz"
    published = _settings(macs=0.5, refit="none", formulation="paper")
    score(model, None, task / "s.npz", _settings(importance="l1"))
    with pytest.raises(DataError, match="give `data`"):
        prune(model, None, task / "a.onnx", published, scores=task / "s.npz")
    folded = prune(model, source, task / "a.onnx", published, scores=task / "s.npz")
    monkeypatch.undo()
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    lost = prune(model, source, task / "b.onnx", published, scores=task / "s.npz")
    assert folded.verification.masked_equivalence == lost.verification.masked_equivalence
    assert folded.output_sha256 != lost.output_sha256
    assert any("pad with zeros" in note for note in folded.notes)
