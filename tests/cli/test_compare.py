"""The command ``compare``: models of one original side by side, as a table, a document and a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import check_schema, perceptron, samples
from headless_browser import (
    Tree,
    assert_fetches_nothing,
    assert_ids_are_sound,
    assert_well_laid_out,
    needs_chromium,
)

from onnx_oamip.api import proof
from onnx_oamip.cli import main
from onnx_oamip.verification.latency import Ratio

QUICK = ["--data", "d.npz", "--importance", "l2", "--refit", "none", "--cache", "off"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reports of a network pruned to half, and to a third."""
    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as place:
        patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
        place.chdir(folder)
        perceptron(folder / "m.onnx", 64)
        np.savez(folder / "d.npz", input=samples(60), labels=np.arange(60) % 4)
        for name, share in (("half", "0.5"), ("third", "0.33")):
            _report(name, "m.onnx", "--macs", share)
        perceptron(folder / "other.onnx", 32)
        _report("stranger", "other.onnx", "--macs", "0.5")
    return folder


def _report(name: str, model: str, *options: str) -> None:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["prune", model, *options, "-o", f"{name}.onnx", *QUICK, "--json"]) == 0
    Path(f"{name}.json").write_text(out.getvalue())


@pytest.fixture(autouse=True)
def _inside(reports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reports)


def test_document_has_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "half.json", "third.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    check_schema(found)
    assert [model["name"] for model in found["compared_models"]] == ["half", "third"]
    for model in found["compared_models"]:
        report = json.loads(Path(model["report"]).read_text())
        assert model["bytes"] == Path(model["path"]).stat().st_size
        assert model["shares"]["macs"] == report["after"]["macs"] / report["before"]["macs"]
        assert [g["kept"] for g in model["groups"]] == [g["kept"] for g in report["groups"]]
    assert found["differences"] == [{"setting": "macs", "values": [0.5, 0.33]}]


def test_records_of_stages_and_reports_of_runs_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = json.loads(Path("half.json").read_text())
    record = tmp_path / "prune.json"
    record.write_text(json.dumps({"stage": "prune", "document": half}))
    row = {
        "path": "m.onnx",
        "sha256": half["model"]["sha256"],
        **half["before"],
        "stage": "original",
        "verification": None,
    }
    run = {"model": half["model"], "settings": {"int8": {"macs": None}}, "broken": []}
    smaller = {**row, "stage": "int8", "bytes": 700, "verification": half["verification"]}
    (tmp_path / "run.json").write_text(json.dumps({**run, "stages": [row, smaller]}))
    assert main(["compare", str(record), str(tmp_path / "run.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["compared_models"]
    assert [model["name"] for model in found] == ["half", "run, int8"]
    assert found[1]["groups"] is None
    assert found[1]["shares"]["bytes"] == 700 / half["before"]["bytes"]


def test_models_of_one_name_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "half.json", "half.json", "third.json", "--json"]) == 0
    names = [m["name"] for m in json.loads(capsys.readouterr().out)["compared_models"]]
    assert len(set(names)) == 3
    assert names[2] == "third"


@pytest.mark.parametrize("columns", [60, 80])
def test_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["compare", "half.json", "third.json"]) == 0
    shown = capsys.readouterr().out
    assert {"half", "third"} <= set(shown.split())
    assert "50.0 % (40.0-60.0 %)" in shown
    assert max(map(len, shown.splitlines())) <= columns


def test_page_shows_what_the_reports_say(tmp_path: Path) -> None:
    page = tmp_path / "c.html"
    assert main(["compare", "half.json", "third.json", "-o", str(page), "-q"]) == 0
    content = page.read_bytes()
    assert_fetches_nothing(content)
    assert_ids_are_sound(content)
    tree = Tree(content)
    assert list(tree.rows) == ["models", "outputs", "widths", "settings"]
    widths = [g["kept"] for g in json.loads(Path("half.json").read_text())["groups"]]
    assert [int(row[2]) for row in tree.rows["widths"][1:]] == widths
    assert tree.rows["settings"][1:] == [["macs", "0.5", "0.33"]]


@needs_chromium
def test_page_is_well_laid_out(tmp_path: Path) -> None:
    page = tmp_path / "c.html"
    assert main(["compare", "half.json", "third.json", "-o", str(page), "-q"]) == 0
    assert_well_laid_out(page.read_bytes(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["half.json"], "half.json is about one model"),
        (["half.json", "stranger.json"], "is about another model"),
        (["half.json", "d.npz"], "is no JSON"),
        (["half.json", "none.json"], "cannot be read"),
        (["half.json", "empty.json"], "is no report of a pruned model"),
        (["half.json", "third.json", "-o", "half.json"], "is half.json itself"),
        (["half.json", "third.json", "-o", "no/c.html"], "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.json").write_text("{}")
    assert main(["compare", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_page_of_models_without_labels_leads_with_agreement(tmp_path: Path) -> None:
    for name in ("half", "third"):
        document = json.loads(Path(f"{name}.json").read_text())
        found = document["verification"]
        found |= {"accuracy_before": None, "accuracy_after": None}
        for measure in found["outputs"]:
            measure |= {"lost": 1.5, "measure": "agreement of decisions"}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    names = [str(tmp_path / f"{name}.json") for name in ("half", "third")]
    page = tmp_path / "c.html"
    assert main(["compare", *names, "-o", str(page), "-q"]) == 0
    head = Tree(page.read_bytes()).rows["models"][0]
    assert head[2] == "agreement"
    assert "accuracy" not in head
    assert "; every model loses 1.50 points." in page.read_text()
