"""The pictures of the studies: what they show, that nothing overlaps or is cut off, and that they are up to date."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from tools.bench import cost, drawing, driver, figures, readme, rivals_figure, studies
from tools.bench.studies import Row

SAVED = [study for study in figures.FIGURES if (readme.SAVED / f"{study}.json").exists()]


def rows_of(study: str) -> list[Row]:
    found: list[Row] = json.loads((readme.SAVED / f"{study}.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    return found


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is drawn, as it is written."""
    made: list[Figure] = []

    def figure(*args: Any, **more: Any) -> Figure:
        made.append(Figure(*args, **more))
        return made[-1]

    monkeypatch.setattr(drawing, "Figure", figure)
    return made


@cache
def drawing_of(study: str) -> tuple[bytes, Figure]:
    """The file of a study's figure, and the figure; drawn once for all tests that only look at it."""
    made: list[Figure] = []

    def figure(*args: Any, **more: Any) -> Figure:
        made.append(Figure(*args, **more))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(drawing, "Figure", figure)
        figures.draw(study, readme.SAVED, Path(folder))
        content = (Path(folder) / f"{study}.svg").read_bytes()
    (sheet,) = made
    return content, sheet


def shown(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(text, its box in pixels) of all that can be read."""
    draw, drawn = Text.draw, {}

    def note(text: Text, renderer: Any, *args: Any) -> None:
        drawn[id(text)] = (text.get_text(), text.get_window_extent(renderer))
        draw(text, renderer, *args)

    monkeypatch.setattr(Text, "draw", note)
    FigureCanvasAgg(figure).draw()
    return [(text, box) for text, box in drawn.values() if text]


def lines_of(figure: Figure, panel: int) -> dict[str, list[tuple[float, float]]]:
    """Points of a panel's named lines."""
    lines = figure.axes[panel].get_lines()
    named = {
        str(line.get_label()): line for line in lines if not str(line.get_label()).startswith("_")
    }
    return {name: [tuple(p) for p in np.asarray(line.get_xydata())] for name, line in named.items()}


@pytest.mark.parametrize("study", SAVED)
def test_figures_are_small_and_reproducible(study: str, tmp_path: Path) -> None:
    drawn, _ = drawing_of(study)
    figures.draw(study, readme.SAVED, tmp_path)
    assert drawn == (tmp_path / f"{study}.svg").read_bytes()
    assert len(drawn) < 120_000
    kept = (readme.DRAWN / f"{study}.svg").read_bytes()
    # Another release may place letters differently.
    if f"Matplotlib v{matplotlib.__version__}," in kept.decode():
        assert drawn == kept, "run: python -m tools.bench readme"


@pytest.mark.parametrize("study", SAVED)
def test_figure_elements_do_not_overlap_or_get_clipped(
    study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, figure = drawing_of(study)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        texts = shown(figure, monkeypatch)
    assert len(texts) > 10
    for text, box in texts:
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) > -1, text
    for (one, a), (other, b) in combinations(texts, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide < 1 or high < 2, (one, other)


@pytest.mark.parametrize("study", figures.FIGURES)
def test_figures_have_alternative_text_and_captions(study: str) -> None:
    _, reported, caption = figures.FIGURES[study]
    assert study in readme.TEXT
    for text in (reported, caption):
        assert text.endswith(".")
        assert not set("[]*\n") & set(text)
    if study in SAVED:
        assert f"![{reported}](figures/{study}.svg)\n\n*{caption}*\n" in readme.PAGE.read_text(
            encoding="utf-8"
        )


def test_exponents_in_the_figure_equal_the_saved_ones(tmp_path: Path, sheets: list[Figure]) -> None:
    figures.draw("cost", readme.SAVED, tmp_path)
    texts = {t.get_text() for t in sheets[0].findobj(Text)}
    rows = rows_of("cost-exponents")
    assert rows
    for row in rows:
        assert f"all stages, n^{row['seconds']:.2f}" in texts
        assert f"{row['varied']}, n^{row['peak MiB added']:.2f}" in texts
        assert {f"{stage}, n^{row[stage]:.2f}" for stage in cost.STAGES} <= texts


def test_best_variant_of_each_rival_is_drawn(tmp_path: Path, sheets: list[Figure]) -> None:
    known: Row = {"model": "a", "judged by": "agreement", "before": 90.0}
    after = {
        (0.5, "ours"): (0.49, 88.0),
        (0.5, "random"): (0.5, 20.0),
        (0.5, "onnxsim L1"): (0.4, 60.0),
        (0.5, "onnxsim L2"): (0.45, 70.0),
        (0.25, "ours"): (0.25, 80.0),
        (0.25, "random"): (0.25, 10.0),
    }
    made = [
        {**known, "MACs asked": b, "method": m, "MACs kept": x, "after": y}
        for (b, m), (x, y) in after.items()
    ]
    made.append(
        {**known, "MACs asked": 0.25, "method": "onnxsim L2", "why not": "MACs not reached"}
    )
    rivals_figure.draw_larger(made, tmp_path / "a.svg")
    lines = lines_of(sheets[0], 0)
    assert lines["ours"] == [(25.0, 80.0), (49.0, 88.0)]
    assert lines["onnxsim, best variant"] == [(45.0, 70.0)]
    assert lines["Torch-Pruning, best variant"] == []
    assert sheets[0].axes[0].get_ylabel() == "agreement, %"


@pytest.mark.parametrize(
    ("study", "fewer"),
    [
        ("cost", lambda r: r["varied"] in ("start-up", "depth")),
        ("cost", lambda r: r["varied"] == "width"),
        ("calibration", lambda r: r["model"] == "lenet5-mnist" and r["samples"] <= 512),
        ("calibration", lambda r: r["calibration"] == "own domain"),
        ("finetune", lambda r: r["MACs asked"] == 0.5),
        ("finetune", lambda r: r["method"] == "ours"),
        ("programs", lambda r: r["solver"] == "highs"),
        ("programs", lambda r: r["solver"] == "clarabel"),
        ("larger", lambda r: r["model"] == "vgg16"),
        ("memory", lambda r: r["run"] == "score"),
        ("memory", lambda r: r["stage"] == "all"),
    ],
)
def test_partial_study_is_drawn(study: str, fewer: Any, tmp_path: Path) -> None:
    kept = [row for row in rows_of(study) if fewer(row)]
    assert 0 < len(kept) < len(rows_of(study))
    figures.FIGURES[study].draw(kept, tmp_path / "part.svg")
    assert studies.digest(kept) in (tmp_path / "part.svg").read_text(encoding="utf-8")


def test_accuracies_are_spaced_by_their_error() -> None:
    axes = Figure().add_subplot()
    drawing.accuracies(axes, 20.0, 99.0)
    y = axes.transData.transform([(0, a) for a in (0, 90, 99)])[:, 1]
    assert y[1] - y[0] == pytest.approx(y[2] - y[1])
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "0",
        "50",
        "80",
        "90",
        "95",
        "98",
        "99",
    ]
    drawing.accuracies(axes, 100.0, 100.0)
    assert np.all(np.isfinite(axes.transData.transform((0, 100.0))))


def test_labels_in_the_figure_keep_apart() -> None:
    places = [98.6, 94.4, 93.5, 87.0, 86.9, 79.6]
    found = drawing.spread(places, 1.2)
    assert min(-np.diff(found)) >= 1.2 - 1e-9
    assert np.abs(np.subtract(found, places)).max() <= 0.6
    assert found[0] == 98.6


def test_shortened_svg_keeps_its_content() -> None:
    long = (
        '<g id="text_1">\n  <path d="M 1.23456 -0.0004 L 12.5 0.12349" transform="scale(0.015625)"/>\n'
        '  <use xlink:href="#DejaVuSans-14" transform="translate(63.62599 0)"/>\n rows: 0f1.5 v3.11.2</g>\n'
    )
    assert drawing._compact(long) == (
        '<g>\n<path d="M 1.23 -0 L 12.5 0.123" transform="scale(0.015625)"/>\n'
        '<use xlink:href="#g14" x="63.63"/>\nrows: 0f1.5 v3.11.2</g>\n'
    )


def test_study_run_writes_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = rows_of("programs")

    def run(out: Path, seed: int, names: tuple[str, ...]) -> str:
        return studies.save(out, "programs", kept, ["program", "seconds"], seed)

    monkeypatch.setattr(driver, "import_module", lambda _: SimpleNamespace(run=run))
    assert driver.study("programs", tmp_path, 0, (), {}) == driver.Outcome("programs", "done")
    assert studies.digest(kept) in (tmp_path / "programs.svg").read_text(encoding="utf-8")
    assert driver.study("budgets", tmp_path, 0, (), {}).what == "done"
    assert {p.name for p in tmp_path.iterdir()} == {"programs.json", "programs.svg"}
