"""The frontier: every point is what ``prune`` gives at that budget, and table, page and document say the same."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import CNN, build
from headless_browser import (
    Tree,
    assert_fetches_nothing,
    assert_ids_are_sound,
    assert_well_laid_out,
    needs_chromium,
)

from onnx_oamip import Settings, prune
from onnx_oamip.api import frontier as frontiers
from onnx_oamip.api import proof
from onnx_oamip.api.frontier import frontier
from onnx_oamip.cli import main
from onnx_oamip.core.errors import (
    BudgetNotMet,
    GateFailed,
    OamipError,
    OutputError,
    SettingsError,
)
from onnx_oamip.core.records import Frontier, Group, Point
from onnx_oamip.planning import attempts, search
from onnx_oamip.reporting.documents import document
from onnx_oamip.reporting.documents import frontier as frontier_document
from onnx_oamip.reporting.html import frontier_page
from onnx_oamip.verification.latency import Ratio

LEVELS = (0.7, 0.4)
KEYS = {
    "schema_version",
    "model",
    "before",
    "groups",
    "objective",
    "points",
    "knee",
    "importance",
    "notes",
    "timings",
    "settings",
    "versions",
}
POINT = {
    "asked",
    "macs",
    "params",
    "bytes",
    "shares",
    "accuracy",
    "agreement",
    "output_relative_error",
    "outputs",
    "metric",
    "latency_ratio",
    "latency",
    "kept",
    "output",
    "sha256",
    "reason",
}


def settings(**values: object) -> Settings:
    return Settings.create(**{"align": 1, "device": "cpu", "workers": 1, **values})


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Latency is not measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network, and samples with labels."""
    path = tmp_path_factory.mktemp("frontier")
    onnx.save_model(build(CNN), path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(
        path / "data.npz",
        x=rng.normal(size=(60, 3, 8, 8)).astype(np.float32),
        labels=np.arange(60) % 5,
    )
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> Frontier:
    (folder / "saved").mkdir()
    return frontier(
        folder / "net.onnx",
        str(folder / "data.npz"),
        settings(),
        LEVELS[::-1],
        save_dir=folder / "saved",
    )


# ------------------------------------------------------------------------------------------------------------ points


@pytest.mark.parametrize("i", range(len(LEVELS)))
def test_frontier_point_equals_prune_at_the_same_budget(
    folder: Path, found: Frontier, tmp_path: Path, i: int
) -> None:
    data, asked = str(folder / "data.npz"), settings(macs=LEVELS[i])
    alone = document(prune(folder / "net.onnx", data, tmp_path / "a.onnx", asked))
    point = frontier_document(found)["points"][i]
    assert point["asked"] == LEVELS[i]
    for key in ("macs", "params", "bytes"):
        assert point[key] == alone["after"][key]
    assert point["kept"] == [g["kept"] for g in alone["groups"]]
    assert point["accuracy"] == alone["verification"]["accuracy_after"]
    for key in ("agreement", "output_relative_error", "latency_ratio"):
        assert point[key] == alone["verification"][key]
    assert point["sha256"] == alone["output"]["sha256"]
    saved = folder / "saved" / f"net-macs{LEVELS[i]}.onnx"
    assert point["output"] == str(saved)
    assert saved.read_bytes() == (tmp_path / "a.onnx").read_bytes()
    assert point["bytes"] == saved.stat().st_size
    before = {**frontier_document(found)["before"], "zip_bytes": alone["before"]["zip_bytes"]}
    assert before == {
        **alone["before"],
        "accuracy": alone["verification"]["accuracy_before"],
    }


def test_frontier_points_meet_their_shares_in_falling_order(found: Frontier) -> None:
    value = frontier_document(found)
    assert set(value) == KEYS
    assert [p["asked"] for p in value["points"]] == list(LEVELS), "widest first"
    for point in value["points"]:
        assert set(point) == POINT
        assert 0 < point["shares"]["macs"] <= point["asked"]
        for key in ("macs", "params", "bytes"):
            assert point["shares"][key] == point[key] / value["before"][key]
        assert len(point["kept"]) == len(value["groups"])
        assert all(0 < k <= g["units"] for k, g in zip(point["kept"], value["groups"], strict=True))
    assert (
        value["settings"].items()
        >= {"levels": list(LEVELS), "importance": "obs", "seed": 0}.items()
    )
    assert "macs" not in value["settings"]
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_frontier_prepares_the_model_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, budgets = [], []
    prepare, look = frontiers.prepare, search.search

    def count(*args: object, **kwargs: object) -> object:
        prepared.append(args)
        return prepare(*args, **kwargs)  # type: ignore[arg-type]

    def spy(ready: attempts.Prepared, *rest: object) -> object:
        budgets.append(ready.settings.macs)
        return look(ready, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(frontiers, "prepare", count)
    monkeypatch.setattr(search, "search", spy)
    stages: list[tuple[int, int]] = []
    frontier(
        folder / "net.onnx",
        str(folder / "data.npz"),
        settings(),
        (0.5, 0.6, 0.5),
        progress=lambda stage, done, total: (
            stages.append((done, total)) if stage == "frontier" else None
        ),
    )
    assert len(prepared) == 1
    assert budgets == [0.6, 0.5], "each share once"
    assert stages == [(1, 2), (2, 2)]


def test_unreachable_level_is_reported(folder: Path) -> None:
    run = frontier(folder / "net.onnx", str(folder / "data.npz"), settings(floor=0.5), (0.6, 0.01))
    value = frontier_document(run)
    first, last = value["points"]
    assert first["reason"] is None
    assert "macs" in last["reason"]
    assert all(last[key] is None for key in POINT - {"asked", "reason", "shares"})
    assert set(last["shares"].values()) == {None}
    text = Tree(frontier_page(run)).sections["points"]
    assert last["reason"] in text
    with pytest.raises(BudgetNotMet, match="no level can be met"):
        frontier(folder / "net.onnx", str(folder / "data.npz"), settings(floor=0.5), (0.01,))


def test_model_that_fails_a_gate_is_not_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove = proof.prove

    def fail(ready: attempts.Prepared, *rest: object) -> object:
        if ready.settings.macs == 0.4:
            raise GateFailed("it differs from the masked original.")
        return prove(ready, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "prove", fail)
    run = frontier(
        folder / "net.onnx", str(folder / "data.npz"), settings(), LEVELS, save_dir=tmp_path
    )
    assert [p.reason for p in run.points] == [None, "it differs from the masked original."]
    assert [p.name for p in tmp_path.iterdir()] == ["net-macs0.7.onnx"]


def test_frontier_keeps_models_slower_than_the_original(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Ratio(1.5, 1.4, 1.6, 9, added=2e-4)
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: slow)
    run = frontier(
        folder / "net.onnx", str(folder / "data.npz"), settings(), LEVELS, save_dir=tmp_path
    )
    assert [p["latency_ratio"] for p in frontier_document(run)["points"]] == [1.5, 1.5]
    assert len(list(tmp_path.iterdir())) == 2
    assert "150.0" in Tree(frontier_page(run)).sections["points"]


@pytest.mark.parametrize(
    ("levels", "save_dir", "error"),
    [
        ((), None, SettingsError),
        ((0.5, 1.5), None, SettingsError),
        ((0.5, 0), None, SettingsError),
        ((0.5,), "file/models", OutputError),
    ],
)
def test_invalid_input_raises_an_error(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    levels: tuple[float, ...],
    save_dir: str | None,
    error: type[OamipError],
) -> None:
    monkeypatch.setattr(frontiers, "prepare", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").write_text("no folder")
    where = None if save_dir is None else tmp_path / save_dir
    with pytest.raises(error):
        frontier(folder / "net.onnx", str(folder / "data.npz"), settings(), levels, save_dir=where)


# -------------------------------------------------------------------------------------------------------------- page


def plain(tree: Tree, section: str) -> list[list[str]]:
    return [[cell.replace("\u00a0", " ") for cell in row] for row in tree.rows[section]]


def test_page_and_document_agree(found: Frontier) -> None:
    value, tree = frontier_document(found), Tree(frontier_page(found))
    assert [a["id"] for a in tree.named("section")] == ["curve", "points", "widths", "again"]
    rows = plain(tree, "points")
    for row, point in zip(rows[1:], value["points"], strict=False):
        assert row == [
            f"{100 * point['asked']:.1f} %",
            f"{100 * point['accuracy']:.2f} %",
            f"{100 * point['latency_ratio']:.1f} % (40.0 to 60.0 %)",
            f"{100 * point['agreement']:.2f} %",
            f"{point['output_relative_error']:.3g}",
            *(f"{100 * point['shares'][k]:.1f} %" for k in ("macs", "params", "bytes")),
        ]
    widths = plain(tree, "widths")
    assert widths[0][2:] == [f"{100 * p['shares']['macs']:.0f} %" for p in value["points"]]
    for row, i in zip(widths[1:], range(len(value["groups"])), strict=True):
        group = value["groups"][i]
        assert row == [
            group["name"],
            str(group["units"]),
            *(str(p["kept"][i]) for p in value["points"]),
        ]
    assert len(tree.named("svg")) == 2
    for point in value["points"]:
        assert f"{100 * point['accuracy']:.1f}" in tree.texts
        assert point["output"] in tree.sections["points"]
    assert "onnx-oamip frontier" in tree.sections["again"]
    assert "--levels 0.7,0.4" in tree.sections["again"]


def test_page_is_silent_escaped_and_reproducible(found: Frontier) -> None:
    hostile = "<script>alert('&')</script>\x1b" + "x" * 300
    groups = tuple(Group(hostile, g.units, g.multiplicity) for g in found.coupling.groups)
    point = Point(0.9, reason=hostile)
    changed = replace(
        found,
        coupling=replace(found.coupling, groups=groups),
        points=(point, *found.points[1:]),
        notes=(hostile,),
    )
    for run in (found, changed):
        page = frontier_page(run)
        assert page == frontier_page(run)
        assert b"<script" not in page
        assert b"\x1b" not in page
        assert_fetches_nothing(page)
        assert_ids_are_sound(page)
    for section in ("widths", "points"):
        assert "<script>alert('&')</script>\\x1b" in Tree(page).sections[section]


def test_without_labels_page_shows_agreement(found: Frontier) -> None:
    points = tuple(
        replace(p, verification=replace(p.verification, accuracy_before=None, accuracy_after=None))  # type: ignore[type-var]
        for p in found.points
    )
    tree = Tree(frontier_page(replace(found, accuracy=None, points=points)))
    assert "agreement" in tree.texts
    assert "Accuracy" not in tree.sections[""]


@needs_chromium
def test_page_is_well_laid_out(found: Frontier, tmp_path: Path) -> None:
    assert_well_laid_out(frontier_page(found), tmp_path)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("net.onnx", "data.npz"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


BASE = ("frontier", "net.onnx", "--data", "data.npz", "--align", "1")


def test_command_writes_what_it_prints(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--levels", "70%,0.4", "-o", "f.json", "--report", "f.html", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert (place / "f.json").read_text() == out
    value = json.loads(out)
    assert value["schema_version"] == 1
    assert [p["asked"] for p in value["points"]] == [0.7, 0.4]
    assert "--levels 0.7,0.4" in Tree((place / "f.html").read_bytes()).sections["again"]
    assert sorted(p.name for p in place.iterdir()) == ["data.npz", "f.html", "f.json", "net.onnx"]


def test_command_prints_a_table(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*BASE, "--levels", "0.7,0.4,0.001", "--save-dir", "d"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "70.0 %" in out
    assert "50.0 %" in out, "latency"
    assert "at 0.1 %: " in out
    assert "wrote d/net-macs0.4.onnx" in out
    texts = ("at", "wrote", "note")
    assert max(len(line) for line in out.splitlines() if not line.startswith(texts)) <= 80
    assert sorted(p.name for p in (place / "d").iterdir()) == [
        "net-macs0.4.onnx",
        "net-macs0.7.onnx",
    ]


MISTAKES = {
    "no share": ("--levels", "0.5,x"),
    "share of 0": ("--levels", "0"),
    "nothing": ("--levels", ""),
    "output is the model": ("-o", "net.onnx"),
    "output is the data": ("-o", "data.npz"),
    "output in no folder": ("-o", "no/f.json"),
    "page over the model": ("--report", "net.onnx"),
    "page over the output": ("-o", "f", "--report", "f"),
    "no folder to save to": ("--save-dir", "net.onnx/models"),
    "scores and importance": ("--scores", "s.npz", "--importance", "l2"),
    "no such scores": ("--scores", "s.npz"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_usage_error_is_one_sentence(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.setattr(search, "search", lambda *_: pytest.fail("work was done"))
    assert main([*BASE, *MISTAKES[mistake]]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert sorted(p.name for p in place.iterdir()) == ["data.npz", "net.onnx"]


def test_frontier_without_reachable_level_exits_1(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "f.json").write_text("old")
    assert main([*BASE, "--levels", "0.001", "-o", "f.json", "--report", "f.html"]) == 1
    assert "no level can be met" in capfd.readouterr().err
    assert (place / "f.json").read_text() == "old"
    assert not (place / "f.html").exists()


def test_command_on_the_page_reproduces_the_point(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        main([*BASE, "--levels", "0.7,0.4", "--floor", "0.1", "--report", "f.html", "--json"]) == 0
    )
    first = json.loads(capfd.readouterr().out)
    again = Tree((place / "f.html").read_bytes()).sections["again"]
    command = again[again.index("onnx-oamip frontier") : again.index("Budget and data")]
    words = shlex.split(command.strip().replace("\\\n", " "))
    given = {word for word in words if word.startswith("--")}
    assert given == {"--data", "--levels", "--align", "--floor", "--device"}, (
        "what was asked, and the device"
    )
    assert main([*words[1:], "--json"]) == 0
    second = json.loads(capfd.readouterr().out)
    for run in (first, second):
        for point in run["points"]:
            del point["latency"]["load"]  # of the machine at that moment
    assert second["points"] == first["points"]
