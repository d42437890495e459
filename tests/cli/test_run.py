"""The command ``run``: stages of one file, what is run again, limits and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import check_schema, perceptron, samples
from headless_browser import Tree, assert_fetches_nothing

from onnx_oamip.api import proof, staged_run
from onnx_oamip.cli import main
from onnx_oamip.core.records import Budget
from onnx_oamip.verification import latency
from onnx_oamip.verification.latency import Ratio, Timing

RUN = """
model = "m.onnx"
data = "d.npz"
cache = "off"
importance = "l2"
seed = 3

[prune]
macs = 0.5

[int8]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small network and samples, where latency is not measured."""

    def bench(sources: list[Path], *_: object, **__: object) -> tuple[Timing, ...]:
        ratios = (Ratio(1 - i / 4, 0.9 - i / 4, 1.1 - i / 4, 9) for i in range(len(sources)))
        return tuple(Timing("m", 1.0, 2.0, 1.0, 1e3, 9, None, ratio) for ratio in ratios)

    monkeypatch.setattr(latency, "bench", bench)
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    monkeypatch.chdir(tmp_path)
    perceptron(tmp_path / "m.onnx", 64)
    np.savez(tmp_path / "d.npz", input=samples(60), labels=np.arange(60) % 4)
    return tmp_path


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict]]:
    def called(text: str, *options: str, code: int = 0) -> dict:
        (place / "p.toml").write_text(text)
        found = main(["run", "p.toml", "--json", *options])
        shown = capsys.readouterr()
        assert found == code, shown.err
        document = json.loads(shown.out)
        check_schema(document)
        return document

    return called


WRONG = {
    "no model": ('data = "d.npz"\n[prune]\n', "names no model"),
    "no data": ('model = "m.onnx"\n[prune]\n', "names no data"),
    "no stage": ('model = "m.onnx"\ndata = "d.npz"\n', "no stage is described"),
    "a name": (
        RUN.replace("macs", "mcas"),
        "in [prune] 'mcas', which is no option of prune; did you mean macs?",
    ),
    "a name at the top": ("qwertz = 1\n" + RUN, "sets 'qwertz', which is no option of a stage."),
    "a table": (RUN + "[report]\nx = 1\n", "'report' to a table; tables are prune"),
    "an option of files": (
        RUN + '[check]\noutput = "x"\n',
        "'output', which is no option of check",
    ),
    "a value": (RUN.replace("0.5", "2.0"), "--macs"),
    "a limit": (RUN + "[check]\nsize = 3\n", "--size"),
    "a model that is no text": (RUN.replace('"m.onnx"', "3"), "sets model to 3"),
    "no budget": (RUN.replace("macs = 0.5", ""), "nothing says how much to keep"),
    "a folder over the model": (RUN.replace('"m.onnx"', '"p/prune.onnx"'), "give another folder"),
    "a folder that is a file": ('folder = "m.onnx"\n' + RUN, "is a file"),
    "a model that is not there": (RUN.replace("m.onnx", "n.onnx"), "no such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_one_sentence_and_writes_nothing(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = WRONG[name]
    (place / "p.toml").write_text(text)
    assert main(["run", "p.toml"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
    assert sorted(p.name for p in place.iterdir()) == ["d.npz", "m.onnx", "p.toml"]


def test_missing_torch_is_reported_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("onnx_oamip.recovery.")]:
        if name.rpartition(".")[2] in ("engine", "losses", "training"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    (place / "p.toml").write_text(RUN + "[recover]\n")
    assert main(["run", "p.toml"]) == 2
    assert "extra 'recover'" in capsys.readouterr().err
    assert not (place / "p").exists()


def test_every_stage_is_measured_against_the_original(place: Path, run: Callable) -> None:
    found = run(RUN)
    names = [row["stage"] for row in found["stages"]]
    assert names == ["original", "prune", "int8"]
    original, pruned, quantised = found["stages"]
    assert pruned["macs"] <= 0.5 * original["macs"]
    assert quantised["macs"] == pruned["macs"]
    assert original["bytes"] == (place / "m.onnx").stat().st_size
    assert quantised["bytes"] == (place / "p" / "int8.onnx").stat().st_size
    assert original["verification"] is None
    for row in (pruned, quantised):
        assert row["verification"]["samples"] == 12
        assert row["verification"]["accuracy_after"] is not None
        assert 0 < row["zip_bytes"] < 1.1 * row["bytes"]
    assert pruned["verification"]["latency"]["median"] == 0.75
    types = {t.data_type for t in onnx.load(place / "p" / "int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types
    assert found["settings"]["prune"]["seed"] == 3
    assert found["broken"] == []


def test_pruned_model_is_that_of_the_command_prune(place: Path, run: Callable) -> None:
    run(RUN)
    options = ["--macs", "0.5", "--importance", "l2", "--seed", "3", "--cache", "off", "-q"]
    assert main(["prune", "m.onnx", "--data", "d.npz", "-o", "other.onnx", *options]) == 0
    assert (place / "other.onnx").read_bytes() == (place / "p" / "prune.onnx").read_bytes()


def test_unchanged_stages_are_not_run_again(place: Path, run: Callable) -> None:
    assert run(RUN)["reused"] == []
    first = run(RUN)
    assert first["reused"] == ["prune", "int8", "check"]
    quantised = RUN + "per-tensor = true\n"
    assert run(quantised)["reused"] == ["prune"]
    assert run(RUN, "--again")["reused"] == []
    assert run(RUN.replace("0.5", "0.4"))["reused"] == []


def test_changed_data_or_output_is_noticed(place: Path, run: Callable) -> None:
    run(RUN)
    (place / "p" / "prune.onnx").write_bytes(b"changed")
    assert run(RUN)["reused"] == ["int8", "check"]  # the same bytes came out again
    np.savez(place / "d.npz", input=samples(61), labels=np.arange(61) % 4)
    assert run(RUN)["reused"] == []


def test_record_of_another_program_is_ignored(place: Path, run: Callable) -> None:
    run(RUN)
    for text in ("{", "[]", '{"inputs": 1}'):
        (place / "p" / "prune.json").write_text(text)
        assert "prune" not in run(RUN)["reused"]


def test_broken_limits_end_with_status_1(run: Callable) -> None:
    limits = "\n[check]\nsize = 0.001\nlatency = 0.1\n"
    found = run(RUN + limits, code=1)
    assert len(found["broken"]) == 2
    assert "of the bytes, over 0.1%" in found["broken"][0]
    assert "of the time (at least 40.0%" in found["broken"][1]


def test_checks_that_do_not_hold_are_named() -> None:
    rows = [
        {"stage": "original", "verification": None},
        {"stage": "prune", "verification": {"failures": []}},
        {"stage": "int8", "verification": {"failures": ["'y' is not finite"]}},
    ]
    assert staged_run.failed(rows) == ("the model of int8 fails a check: 'y' is not finite",)


def test_budget_that_cannot_be_met_ends_with_status_1(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "p.toml").write_text(RUN.replace("0.5", "0.001"))
    assert main(["run", "p.toml"]) == 1
    assert "budget" in capsys.readouterr().err
    assert not list((place / "p").glob("*.onnx"))


def test_limits_are_checked_without_running_again(run: Callable) -> None:
    run(RUN)
    assert run(RUN + "\n[check]\nsize = 0.001\n", code=1)["reused"] == ["prune", "int8", "check"]


@pytest.mark.parametrize(
    ("metric", "outputs", "sentence"),
    [
        (None, [{"output": "y", "lost": 2.5}, {"output": "z", "lost": 0.0}], "2.50 points ('y')"),
        ({"name": "a:b", "lost": 0.3}, [], ""),
        ({"name": "a:b", "lost": 1.5}, [], "1.50 of the metric ('a:b')"),
        (None, [], "was not measured"),
    ],
)
def test_largest_loss_is_that_of_the_metric_or_of_the_worst_output(
    metric: dict | None, outputs: list, sentence: str
) -> None:
    last = {"verification": {"latency": None, "metric": metric, "outputs": outputs}}
    found = staged_run.broken({}, last, Budget(max_drop=1.0))
    assert len(found) == bool(sentence)
    assert all(sentence in text for text in found)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_table_shows_all_stages_at_every_width(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (place / "p.toml").write_text(RUN)
    assert main(["run", "p.toml"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[0] for line in shown.splitlines() if line]
    for stage in ("original", "prune", "int8"):
        assert rows.count(stage) == 2
    tables = shown.partition("zip: ")[0]
    assert max(map(len, tables.splitlines())) <= columns
    assert ("unchanged" in tables or "now" in tables) == (columns >= 80)
    assert "75.0 % (65.0-85.0 %)" in shown


def test_page_shows_every_stage_and_broken_limits(place: Path, run: Callable[..., dict]) -> None:
    run(RUN + "\n[check]\nsize = 0.001\n", "--report", "stages.html", code=1)
    content = (place / "stages.html").read_bytes()
    assert_fetches_nothing(content)
    tree = Tree(content)
    assert [row[0] for row in tree.rows["models"][1:3]] == ["prune", "int8"]
    assert "Limit broken: the last model has" in content.decode()


@pytest.mark.usefixtures("place")
def test_trained_stage_stands_between_the_others(run: Callable[..., dict]) -> None:
    pytest.importorskip("torch", reason="needs the extra 'recover'")
    found = run(f"{RUN}[recover]\nrecover = 5\n")
    assert [row["stage"] for row in found["stages"]] == ["original", "prune", "recover", "int8"]
    assert run(f"{RUN}[recover]\nrecover = 5\n")["reused"] == ["prune", "recover", "int8", "check"]
