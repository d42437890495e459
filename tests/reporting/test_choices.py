"""Explanation of a search's choice, and the table of a frontier while it runs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from command_line import perceptron, samples
from rich.console import Console

from onnx_oamip import Settings
from onnx_oamip.api import proof
from onnx_oamip.api.frontier import frontier
from onnx_oamip.cli import main
from onnx_oamip.reporting.progress import Bars
from onnx_oamip.reporting.tables.parts import drop_choice
from onnx_oamip.verification.latency import Ratio

OPTIONS = ["--importance", "l2", "--refit", "none", "--cache", "off"]


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network with samples; latency is not measured."""
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    monkeypatch.chdir(tmp_path)
    perceptron(tmp_path / "m.onnx", 64)
    np.savez(tmp_path / "d.npz", input=samples(60), labels=np.arange(60) % 4)


def trial(macs: int | None, lost: float | None) -> dict:
    return {"asked": 0.5, "macs": macs, "lost": lost, "measure": "accuracy of 'y'"}


@pytest.mark.parametrize(
    ("tried", "after", "allowed", "expected"),
    [
        ([], 50, 1.0, ""),
        ([trial(50, 0.5)], 50, None, ""),
        ([trial(None, None)], 100, 1.0, ""),
        (
            [trial(50, 0.5), trial(20, 9.0), trial(30, 2.0), trial(None, None)],
            50,
            1.0,
            (
                "`max_drop=1` keeps 50.0 % of the MACs, the fewest of 4 plans that lose at most 1 (0.50 of accuracy of "
                "'y'); the next smaller one, of 30.0 %, loses 2.00"
            ),
        ),
        (
            [trial(50, 0.5)],
            50,
            0.5,
            (
                "`max_drop=0.5` keeps 50.0 % of the MACs, the fewest of 1 plan that lose at most 0.5 "
                "(0.50 of accuracy of 'y')"
            ),
        ),
    ],
)
def test_choice_names_the_next_smaller_plan(
    tried: list, after: int, allowed: float | None, expected: str
) -> None:
    value = {"budget": {"max_drop": allowed}, "tried": tried, "before": {"macs": 100}}
    assert drop_choice({**value, "after": {"macs": after}}) == expected


def test_choice_is_explained_on_stderr_and_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", "m.onnx", "--data", "d.npz", "--max-drop", "20", "-o", "s.onnx", *OPTIONS]
    assert main([*command, "--report", "s.html"]) == 0
    noted = [line for line in capsys.readouterr().err.splitlines() if "keeps" in line]
    assert len(noted) == 1
    assert noted[0].startswith("note: --max-drop 20 keeps ")
    assert "--max-drop 20 keeps " in (tmp_path / "s.html").read_text(encoding="utf-8")
    assert main([*command, "-q"]) == 0
    assert "keeps" not in capsys.readouterr().err


def test_models_of_a_frontier_are_shown_while_it_runs() -> None:
    shown: list[int] = []

    class Watched(Bars):
        def show_point(self, point: dict) -> None:
            super().show_point(point)
            console = Console(file=io.StringIO(), width=100)
            console.print(*self._display.get_renderables())
            text = console.file.getvalue()
            shown.append(text.count("\n"))
            assert f"{100 * point['asked']:.1f} %" in text

    settings = Settings.create(importance="l2", refit="none", cache="off")
    with Watched() as bars:
        found = frontier("m.onnx", "d.npz", settings, (0.8, 0.5), progress=bars)
    assert len(shown) == len(found.points) == 2
    assert shown[1] > shown[0]


def test_point_has_the_interval_of_its_latency(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    command = ["frontier", "m.onnx", "--data", "d.npz", "--levels", "0.5", *OPTIONS, "--json"]
    assert main(command) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    assert (point["latency"]["low"], point["latency"]["high"]) == (0.4, 0.6)
    assert point["latency_ratio"] == point["latency"]["median"] == 0.5
    assert main(command[:-1]) == 0
    assert "50.0 % (40.0 to 60.0 %)" in capsys.readouterr().out
