"""Real models from the wild: the manifest, unpacking, judges, and the runner on a toy file, without a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from tools.wild import fetch, manifest, run, samples, table, tasks

TASKS = (
    "classification",
    "object detection",
    "segmentation",
    "text detection",
    "text recognition",
    "face",
    "keypoints",
    "denoising",
    "voice activity",
    "wake word",
    "speech encoder",
    "audio to notes",
    "text embedding",
    "tagging",
    "transliteration",
    "graph network",
    "diffusion U-Net",
    "tabular",
    "time series",
    "biosignals",
)


def test_manifest_lists_at_least_forty_files_of_all_tasks() -> None:
    listed = manifest.load()
    assert len(listed.entries) >= 40
    for entry in listed.entries:
        assert entry.samples in samples.SAMPLES
        assert entry.judge in tasks.JUDGES
        assert entry.source
        assert entry.package.licence
        assert not entry.file.startswith("/")
        assert set(entry.sha256) <= set("0123456789abcdef")
    reported = " ".join(entry.task for entry in listed.entries)
    assert [task for task in TASKS if task not in reported] == []


TOY = """
[package.toys]
registry = "pypi"
version = "1.0"
licence = "MIT"

[[file]]
name = "toy"
package = "toys"
file = "toys/toy.onnx"
sha256 = "{digest}"
task = "tabular"
source = "evenly spread numbers"
samples = "synthetic"
judge = "values"
feed = {{ make = "table", name = "x", most = [1.0, 1.0, 9.0] }}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('package = "toys"', 'package = "others"', "package others has no table"),
        ('registry = "pypi"', 'registry = "cran"', "registry must be one of pypi, npm"),
        ('judge = "values"', 'judge = "values"\nbudget = "bytes"', "budget must be one of"),
        ('judge = "values"', 'judge = "values"\nlicense = "MIT"', "license"),
        ("{digest}", "12", "sha256 must have 64 digits"),
    ],
)
def test_invalid_manifest_is_refused_by_name(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "manifest.toml"
    text = TOY.replace(old, new).format(digest="0" * 64)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        manifest.load(path)


def test_repeated_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.toml"
    text = TOY.format(digest="0" * 64)
    path.write_text(text + text[text.index("[[file]]") :])
    with pytest.raises(ValueError, match="two files named toy"):
        manifest.load(path)


def test_wheels_and_source_archives_are_unpacked_to_the_same_layout(tmp_path: Path) -> None:
    wheel, source = tmp_path / "toys.whl", tmp_path / "toys.tar.gz"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("toys/toy.onnx", b"bytes")
    with tarfile.open(source, "w:gz") as packed:
        member = tarfile.TarInfo("toys-1.0/toys/toy.onnx")
        member.size = 5
        packed.addfile(member, io.BytesIO(b"bytes"))
    for archive in (wheel, source):
        place = tmp_path / f"{archive.name}-unpacked"
        fetch.unpack(archive, place)
        assert (place / "toys/toy.onnx").read_bytes() == b"bytes"


def toy(path: Path, scale: float = 1.0) -> None:
    """A product of three inputs with two outputs."""
    weight = numpy_helper.from_array(np.float32([[1, 2], [0, scale], [scale, 1]]), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [weight],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def listed(tmp_path: Path) -> manifest.Manifest:
    """A manifest of one toy file, which is in the cache."""
    place = tmp_path / "cache/packages/toys-1.0/toys/toy.onnx"
    toy(place)
    path = tmp_path / "manifest.toml"
    path.write_text(TOY.format(digest=hashlib.sha256(place.read_bytes()).hexdigest()))
    return manifest.load(path)


def test_fetch_checks_the_digest(tmp_path: Path, listed: manifest.Manifest) -> None:
    fetch.fetch(listed, tmp_path / "cache")
    toy(tmp_path / "cache/packages/toys-1.0/toys/toy.onnx", 2.0)
    with pytest.raises(RuntimeError, match="not the listed one"):
        fetch.fetch(listed, tmp_path / "cache")


def test_samples_are_reproducible_and_held_out_ones_differ(
    tmp_path: Path, listed: manifest.Manifest
) -> None:
    made = []
    for folder in ("first", "second"):
        cache = tmp_path / folder
        path = samples.write(listed.entries[0], listed, cache)
        with np.load(path) as found:
            made.append({key: found[key] for key in found})
    assert made[0]["x"].shape == made[0]["eval.x"].shape == (samples.COUNT, 3)
    np.testing.assert_array_equal(made[0]["x"], made[1]["x"])
    assert (made[0]["x"] != made[0]["eval.x"]).any()


def case(tmp_path: Path, listed: manifest.Manifest, scale: float) -> tasks.Case:
    """The toy beside a pruned file with another weight."""
    pruned = tmp_path / "pruned.onnx"
    toy(pruned, scale)
    entry, cache = listed.entries[0], tmp_path / "cache"
    return tasks.Case(entry, listed, cache, samples.write(entry, listed, cache), pruned, {})


def test_values_are_judged_by_the_worst_output(tmp_path: Path, listed: manifest.Manifest) -> None:
    assert tasks.values(case(tmp_path, listed, 1.0)).kept == 1.0
    other = case(tmp_path, listed, 0.5)
    x = samples.held_out(other.samples)["x"].astype(np.float64)
    weights = [np.array([[1, 2], [0, s], [s, 1]]) for s in (1.0, 0.5)]
    before, after = x @ weights[0], x @ weights[1]
    expected = 1 - ((before - after) ** 2).sum() / ((before - before.mean(0)) ** 2).sum()
    assert tasks.values(other).kept == pytest.approx(expected, abs=1e-5)


def test_answers_take_one_whole_feed_per_sample(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "s"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
    )
    path = tmp_path / "scaled.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    x = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    found = tasks.answers(path, {"x": x, "s": np.float32([2, 3])})["y"]
    np.testing.assert_array_equal(np.stack(found), x * np.float32([[[2]], [[3]]]))


def test_decisions_are_judged_by_f1(tmp_path: Path, listed: manifest.Manifest) -> None:
    other = case(tmp_path, listed, 0.5)
    x = samples.held_out(other.samples)["x"]
    before, after = ((x @ np.float32([[1, 2], [0, s], [s, 1]]) > 4).ravel() for s in (1.0, 0.5))
    right, wrong = (before & after).sum(), (before != after).sum()
    found = tasks.decisions(other, output="y", threshold=4)
    assert 0 < found.kept < 1
    assert found.kept == pytest.approx(2 * right / (2 * right + wrong))


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("same", "same", 0), ("ab", "ba", 2)],
)
def test_edits_count_insertions_deletions_and_substitutions(
    first: str, second: str, distance: int
) -> None:
    assert tasks.edits(first, second) == distance


def test_boxes_are_matched_once() -> None:
    boxes = [np.array(box, float) for box in ((0, 0, 10, 10), (20, 20, 30, 30))]
    near = [np.array([1, 1, 11, 11], float)]
    assert tasks.overlap(boxes[0], boxes[0]) == 1
    assert tasks.overlap(boxes[0], near[0]) == pytest.approx(81 / 119)
    assert tasks.matched(boxes, near) == 1
    assert tasks.matched([boxes[0], boxes[0]], near) == 1
    assert tasks.found_alike([boxes], [near]) == pytest.approx(2 / 3)
    scores = np.array([0.9, 0.8, 0.7])
    assert len(tasks.suppressed(np.stack([*boxes, near[0]]), scores)) == 2


def test_notes_are_peaks_that_sound() -> None:
    onsets, frames = np.zeros((40, 3)), np.zeros((40, 3))
    onsets[5, 1], onsets[8, 2] = 0.9, 0.9
    frames[5:30, 1] = 0.8
    assert tasks.note_events(onsets, frames) == {(5, 1)}


def test_pitches_agree_within_a_quarter_tone(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(tones: list[float], confidence: list[float]) -> dict[str, list[Any]]:
        return {"f": [np.array([tones])], "c": [np.array([confidence])]}

    pair = (
        found([100, 200, 300, 400], [0.9, 0.9, 0.1, 0.9]),
        found([101, 220, 900, 400], [0.8, 0.8, 0.2, 0.3]),
    )
    monkeypatch.setattr(tasks, "both", lambda _: pair)
    verdict = tasks.pitch(None, frequency="f", confidence="c")  # type: ignore[arg-type]
    assert verdict.kept == 0.5
    assert verdict.detail["voicing"] == 0.75
    assert verdict.detail["near where both are voiced"] == 0.5


def test_tags_of_padding_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ([[3, 4, 0, 0], [5, 6, 7, 0]], [[3, 9, 8, 8], [5, 6, 7, 8]])
    pair = tuple({"t": [np.array([row]) for row in part]} for part in rows)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    monkeypatch.setattr(tasks, "both", lambda _: pair)
    monkeypatch.setattr(tasks, "held_out", lambda _: {"m": mask})
    case = tasks.Case(None, None, Path(), Path(), Path(), {})  # type: ignore[arg-type]
    verdict = tasks.tags(case, output="t", mask="m")
    assert (verdict.kept, verdict.detail) == (0.8, {"tags": 5.0})


def test_speech_is_where_silence_is_improbable(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tuple({"p": [np.array([[[a, 1 - a], [b, 1 - b]]])]} for a, b in ((0.1, 0.2), (0.1, 0.3)))
    monkeypatch.setattr(tasks, "both", lambda _: pair)
    verdict = tasks.silence(None, output="p", most=0.2)  # type: ignore[arg-type]
    assert verdict.kept == pytest.approx(2 / 3)
    assert verdict.detail["positive"] == 1


PRUNED: dict[str, Any] = {
    "before": {"macs": 6, "params": 6, "bytes": 200},
    "after": {"macs": 3, "params": 3, "bytes": 150},
    "verification": {},
    "notes": [],
    "timings": {},
    "settings": {},
}
INSPECTED: dict[str, Any] = {
    "cost": {"macs": 6},
    "groups": [],
    "skipped": [],
    "objective": [],
    "notes": [],
}


def test_runner_resumes_and_its_table_has_every_outcome(
    tmp_path: Path, listed: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def command(arguments: list[str], limit: float) -> run.Record:
        calls.append(arguments[0])
        record = {"status": "done", "exit": 0, "seconds": 1.5, "processor": 2.5, "peak_mib": 100}
        record["error"] = ""
        if arguments[0] == "inspect":
            return {**record, "stdout": json.dumps(INSPECTED)}
        if "0.5" in arguments:
            return {**record, "status": "refused", "error": "Error: too little.", "stdout": ""}
        toy(Path(arguments[arguments.index("-o") + 1]))
        return {**record, "stdout": json.dumps(PRUNED)}

    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(run, "_apart", here)
    out = tmp_path / "out"
    run.run_all(listed, tmp_path / "cache", out)
    assert calls == ["inspect", "prune", "prune"]
    (out / "toy-0.7.json").unlink()
    run.run_all(listed, tmp_path / "cache", out, names=["toy"])
    assert calls[3:] == ["prune"]
    record = json.loads((out / "toy-0.7.json").read_text())
    (out / "toy-0.7.json").write_text(json.dumps({**record, "kept": 0.25, "status": "not judged"}))
    run.judge_all(listed, tmp_path / "cache", out, names=["toy"])
    assert len(calls) == 4
    assert json.loads((out / "toy-0.7.json").read_text()) == record
    (row,) = table.rows(listed, out)
    assert (row["kept at 0.7"], row["kept at 0.5"]) == (1.0, "refused")
    assert (row["processor s"], row["peak MiB"], row["remark"]) == (2.5, 100, "too little.")
    written = table.write(listed, out, tmp_path)
    assert "at 0.7: 1, at 0.5: 0" in written
    assert "without a result: toy" in written
    assert json.loads((tmp_path / "wild.json").read_text())["rows"] == [row]


def test_unreachable_budget_gives_way_to_the_least(
    tmp_path: Path, listed: manifest.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def command(arguments: list[str], limit: float) -> run.Record:
        record = {"status": "done", "exit": 0, "seconds": 1.5, "processor": 2.5, "peak_mib": 100}
        record["error"] = ""
        if arguments[0] == "inspect":
            return {**record, "stdout": json.dumps(INSPECTED)}
        asked.append(float(arguments[arguments.index("--macs") + 1]))
        if asked[-1] < 0.6431:
            refusal = (
                "Error: the budget cannot be met; the least that can be met is --macs 0.6431; ask."
            )
            return {**record, "status": "refused", "error": refusal, "stdout": ""}
        toy(Path(arguments[arguments.index("-o") + 1]))
        return {**record, "stdout": json.dumps(PRUNED)}

    monkeypatch.setattr(run, "command", command)
    monkeypatch.setattr(run, "_apart", lambda function, *given: function(*given))
    run.run_all(listed, tmp_path / "cache", tmp_path)
    assert asked == [0.7, 0.5, 0.6431]
    (row,) = table.rows(listed, tmp_path)
    assert (row["kept at 0.7"], row["kept at 0.5"], row["least budget"]) == (1.0, 1.0, 0.6431)
    assert row["remark"].startswith("unreachable: 64.3% of the MACs is the smallest budget")
    written = table.write(listed, tmp_path)
    assert "at 0.7: 1, at 0.5: 0" in written
    assert "without a result: none" in written
    assert "the least is judged: toy" in written


@pytest.mark.parametrize(
    ("error", "budget", "least"),
    [
        ("Error: x; the least that can be met is --macs 0.504; ask for more", "macs", 0.504),
        ("Error: x; the least that can be met is --params 1e-03, --macs 0.2", "params", 1e-3),
        ("Error: x; the least that can be met is --params 0.3", "macs", None),
        ("Error: no channel can be removed", "macs", None),
        ("", "macs", None),
    ],
)
def test_least_budget_is_read_from_a_refusal(error: str, budget: str, least: float | None) -> None:
    assert run.least_budget(error, budget) == least


def test_file_without_a_record_keeps_its_row(tmp_path: Path, listed: manifest.Manifest) -> None:
    row = {"file": "toy", "kept at 0.7": 1.0, "kept at 0.5": 0.5, "bytes at 0.5": 0.5}
    row |= {"processor s": 1.0, "peak MiB": 100}
    unknown = {**row, "file": "no longer listed"}
    (tmp_path / "wild.json").write_text(json.dumps({"rows": [row, unknown]}))
    table.write(listed, tmp_path / "out", tmp_path)
    assert json.loads((tmp_path / "wild.json").read_text())["rows"] == [row]


def test_recovered_files_stand_beside_unrecovered_ones(
    tmp_path: Path, listed: manifest.Manifest
) -> None:
    folders = [tmp_path / name for name in ("before", "after")]
    record = {"kept": 0.8, "measure": "F1", "processor": 2.0, "peak_mib": 100}
    recovery = {"accepted": True, "before": 0.5, "after": 0.25, "steps": 9, "augment": "none"}
    for folder in folders:
        folder.mkdir()
    (folders[0] / "toy-0.5.json").write_text(json.dumps(record))
    (folders[1] / "toy-0.5.json").write_text(json.dumps(record | {"kept": 0.9}))
    assert "toy" not in table.write_recovered(listed, *folders)  # that run had no recovery
    trained = record | {"kept": 0.9, "recovery": recovery}
    (folders[1] / "toy-0.5.json").write_text(json.dumps(trained))
    assert "0.5000 | 0.2500 | 9 | none" in table.write_recovered(listed, *folders, tmp_path)
    (row,) = json.loads((tmp_path / "wild-recovered.json").read_text())["rows"]
    assert (row["kept"], row["kept recovered"]) == (0.8, 0.9)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="peak memory of one process needs wait4")
def test_command_measures_its_own_process() -> None:
    record = run.command(["--version"], 60)
    assert record["status"] == "done"
    assert record["stdout"].strip()
    assert record["processor"] > 0
    assert 10 < record["peak_mib"] < 4000
