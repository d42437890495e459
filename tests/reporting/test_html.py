"""The page of ``prune``: it says what the document says, is safe and fetches nothing, and is well laid out."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS
from graphs import CNN, build
from headless_browser import (
    Tree,
    assert_fetches_nothing,
    assert_ids_are_sound,
    assert_well_laid_out,
    needs_chromium,
)

from onnx_oamip import Settings, prune
from onnx_oamip.api import pipeline, proof
from onnx_oamip.cli import main
from onnx_oamip.core.printable import visible
from onnx_oamip.core.records import (
    Coupling,
    Fit,
    Group,
    Pinned,
    Plan,
    Report,
    Sensitivity,
    Trial,
)
from onnx_oamip.planning import attempts
from onnx_oamip.reporting.documents import document
from onnx_oamip.reporting.html import charts, prune_page, wording
from onnx_oamip.verification.latency import Ratio

SECTIONS = [
    "widths",
    "network",
    "errors",
    "sensitivity",
    "scores",
    "skipped",
    "programs",
    "outputs",
    "checks",
    "samples",
    "again",
]
HOSTILE = (
    "<script>alert(1)</script>",
    "a&b&amp;c",
    "\"'><img src=x onerror=alert(1)>",
    "$\\frac{1}{0}$ %s {{ 7*7 }}",
    "esc\x1b[31m\x07\u202eback",
    "]]>--><!--",
    "\u6f22\u5b57 \U0001f600 " + "W" * 300,
)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Latency is not measured, and the plan is that of the program, however much the random network loses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "MUCH", np.inf)
        patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network, and samples with labels."""
    path = tmp_path_factory.mktemp("report")
    onnx.save_model(build(CNN), path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(
        path / "data.npz",
        x=rng.normal(size=(60, 3, 8, 8)).astype(np.float32),
        labels=np.arange(60) % 5,
    )
    return path


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    """One run, steps of width 1."""
    settings = Settings.create(macs=0.5, align=1, device="cpu", workers=1)
    return prune(folder / "net.onnx", str(folder / "data.npz"), folder / "half.onnx", settings)


@pytest.fixture(scope="module")
def plain_page(report: Report) -> bytes:
    return prune_page(report)


@pytest.fixture(scope="module")
def hostile_page(report: Report) -> bytes:
    return prune_page(hostile(report))


@pytest.fixture(scope="module")
def large_page(report: Report) -> bytes:
    return prune_page(large(report))


def numbers_of(tree: Tree, section: str) -> list[list[str]]:
    """Body rows of a section's tables, spaces plain."""
    return [[cell.replace("\u00a0", " ") for cell in row] for row in tree.rows[section]]


# ---------------------------------------------------------------------------------------------------------- contents


def test_page_has_every_section_and_agrees_with_the_document(
    report: Report, plain_page: bytes
) -> None:
    value, tree = document(report), Tree(plain_page)
    assert [a["id"] for a in tree.named("section")] == SECTIONS
    assert [a["href"] for a in tree.named("a")] == [f"#{key}" for key in SECTIONS]
    top = tree.sections[""].replace("\u00a0", " ")
    before, after, checks = value["before"], value["after"], value["verification"]
    for key in ("macs", "params", "bytes"):
        assert f"{100 * after[key] / before[key]:.1f} % of" in top
    assert f"{100 * checks['accuracy_after']:.2f} %" in top
    assert "50.0 %2.00 times as fast; 95 % interval 40.0 to 60.0 %" in top
    assert "takes 50.0 % of the time (95 % interval 40.0 to 60.0 %)" in top
    assert "Asked to keep at most 50.0 % of the MACs." in top
    expected = [
        [
            g["name"],
            str(g["units"]),
            str(g["kept"]),
            f"{100 * g['level']:.1f} %",
            *(f"{g['score'][k]:.3g}" for k in ("min", "mean", "max")),
        ]
        for g in value["groups"]
    ]
    assert numbers_of(tree, "widths")[1:] == expected
    assert [[row[0], row[1], row[5], row[6]] for row in numbers_of(tree, "errors")[1:]] == [
        [f["node"], f["form"], f"{f['error_before']:.3g}", f"{f['error_after']:.3g}"]
        for f in value["fits"]
    ]
    drawn = {name: tree.sections[name] for name in SECTIONS}
    for group in value["groups"]:
        assert (
            f"{group['name']}{group['kept']} of {group['units']} units kept" in drawn["sensitivity"]
        )
        assert group["name"] in drawn["scores"]
        assert f"{group['units']} → {group['kept']}" in drawn["widths"]
    for skipped in value["skipped"]:
        assert skipped["reason"] in drawn["skipped"]
        assert skipped["tensor"] in drawn["skipped"]
    programs = numbers_of(tree, "programs")[1:]
    assert [(row[1], row[2]) for row in programs] == [
        (p["solver"], p["status"]) for p in value["programs"]
    ]
    again = drawn["again"]
    for key in ("model", "output"):
        assert value[key]["sha256"] in again
    for name, version in value["versions"].items():
        assert f"{name}{version or 'not installed'}" in again.replace("\n", "")
    assert f"{checks['masked_equivalence']:.3g}" in drawn["checks"]


def test_command_on_the_page_gives_the_same_model(
    folder: Path, plain_page: bytes, tmp_path: Path
) -> None:
    again = Tree(plain_page).sections["again"]
    command = again[again.index("onnx-oamip prune") : again.index("half.onnx") + len("half.onnx")]
    words = shlex.split(command.replace("\\\n", " "))
    words[-1] = str(tmp_path / "again.onnx")
    assert main([*words[1:], "-q"]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == (folder / "half.onnx").read_bytes()


def test_page_has_a_chart_for_every_group_and_node(report: Report, plain_page: bytes) -> None:
    value, tree = document(report), Tree(plain_page)
    groups = len(value["groups"])
    assert len(tree.named("svg")) == 4 + 2 * groups
    assert all(a["role"] == "img" and a["aria-label"] for a in tree.named("svg"))
    assert len(value["curves"]) == groups
    for group, curve in zip(value["groups"], value["curves"], strict=True):
        assert curve["widths"][-1] == group["units"]
        assert curve["losses"] == sorted(curve["losses"], reverse=True)
        assert curve["losses"][-1] == 0


def test_agreement_of_draws_is_drawn(report: Report) -> None:
    """Two draws: the scores of the run, and the same in reverse order, which keep different units."""
    assert report.scores is not None
    values = report.scores.values
    scores = replace(report.scores, draws=np.stack([values, values[::-1]]))
    drawn = replace(report, scores=scores)
    found = document(drawn)["draws"]
    tree = Tree(prune_page(drawn))
    assert numbers_of(tree, "draws")[1:] == [
        [g["name"], str(g["kept"]), str(g["agreed"]), f"{100 * g['spread']:.1f} %"]
        for g in found["groups"]
    ]
    agreed, kept = (sum(g[key] for g in found["groups"]) for key in ("agreed", "kept"))
    assert 0 < agreed < kept
    assert f"{agreed} of {kept}" in tree.sections["draws"]
    for group in found["groups"]:
        assert f"{group['agreed']} of {group['kept']}" in tree.sections["draws"]


def test_sections_without_content_are_left_out(folder: Path) -> None:
    settings = Settings.create(
        macs=0.5, importance="l2", allocate="uniform", refit="none", device="cpu", align=1
    )
    found = prune(folder / "net.onnx", None, None, settings)
    tree = Tree(prune_page(found))
    assert [a["id"] for a in tree.named("section")] == [
        "widths",
        "network",
        "scores",
        "skipped",
        "checks",
        "again",
    ]
    assert "(not written)" in tree.sections[""]
    assert "--data" not in tree.sections["again"]
    arrays = {"x": np.random.default_rng(0).normal(size=(20, 3, 8, 8)).astype(np.float32)}
    tree = Tree(
        prune_page(
            prune(
                folder / "net.onnx", arrays, None, Settings.create(macs=0.5, device="cpu", align=1)
            )
        )
    )
    assert "arrays in memory" in tree.sections["again"]
    assert "onnx-oamip prune" not in tree.sections["again"]


def test_page_lists_the_plans_of_the_search(folder: Path) -> None:
    settings = Settings.create(max_drop=20, align=1, device="cpu", workers=1)
    found = prune(folder / "net.onnx", str(folder / "data.npz"), None, settings)
    value, tree = document(found), Tree(prune_page(found))
    assert len(value["tried"]) >= 2
    assert any(t["macs"] == value["after"]["macs"] for t in value["tried"])
    whole = value["before"]["macs"]
    rows = numbers_of(tree, "search")[1:]
    assert len(rows) == len(value["tried"])
    assert [row for row in rows if row[2] != "no plan"] == [
        [f"{100 * t['asked']:.1f} %", f"{100 * t['macs'] / whole:.1f} %", f"{t['lost']:.2f}"]
        for t in value["tried"]
        if t["lost"] is not None
    ]
    assert "lose at most 20 points" in tree.sections[""]


def test_trial_without_a_plan_is_shown(report: Report) -> None:
    tried = (Trial(0.5, report.after.macs, 0.2), Trial(0.1, None, None))
    changed = replace(report, tried=tried, budget=replace(report.budget, max_drop=1.0))
    assert numbers_of(Tree(prune_page(changed)), "search")[2] == ["10.0 %", "–", "no plan"]  # noqa: RUF001


# ------------------------------------------------------------------------------------------------ safety, quietness


def test_page_opens_with_the_result_in_one_sentence(report: Report) -> None:
    text = prune_page(report).decode().replace("\u00a0", " ")
    share = 100 * report.after.macs / report.before.macs
    opening = text.partition('<p class="lead">')[2].partition("</p>")[0]
    assert opening.startswith(f"The pruned model has {share:.1f} % of the MACs and ")
    assert opening.endswith(".")
    accuracy = report.verification.accuracy_after
    assert accuracy is not None
    assert f"reaches {100 * accuracy:.2f} % accuracy where the original has" in opening


def test_same_report_gives_the_same_bytes(report: Report, plain_page: bytes) -> None:
    first = plain_page
    assert first == prune_page(report)
    assert first.count(b"<!--") == 0
    assert not any(
        word in first for word in (b"<dc:date", b"<metadata", b"DOCTYPE svg", b"matplotlib")
    )


def test_pages_of_two_runs_differ_in_times_only(folder: Path, report: Report) -> None:
    settings = Settings.create(macs=0.5, align=1, device="cpu", workers=2)
    again = prune(folder / "net.onnx", str(folder / "data.npz"), folder / "half.onnx", settings)

    def timeless(found: Report) -> bytes:
        programs = tuple({**p, "seconds": 0.0} for p in found.plan.programs)
        kept = {**found.settings, "workers": 1}
        return prune_page(
            replace(
                found,
                timings={},
                plan=replace(found.plan, programs=programs),
                settings=kept,
                verification=replace(found.verification, latency=None),
            )
        )

    assert timeless(again) == timeless(report)


def test_page_fetches_no_resource(plain_page: bytes) -> None:
    assert_fetches_nothing(plain_page)
    assert_ids_are_sound(plain_page)


def hostile(report: Report) -> Report:
    """A report whose every foreign text is hostile."""
    groups = tuple(
        replace(group, name=HOSTILE[i % len(HOSTILE)])
        for i, group in enumerate(report.coupling.groups * 4)
    )
    many = len(report.coupling.groups) * 4
    units = sum(len(g.units) for g in report.coupling.groups)
    shifted = tuple(
        replace(g, units=g.units + units * (i * 4 // many)) for i, g in enumerate(groups)
    )
    coupling = replace(
        report.coupling,
        groups=shifted,
        n_units=units * 4,
        pinned=tuple(Pinned(name, 0, 3, f"reason {name}") for name in HOSTILE),
    )
    plan = replace(
        report.plan, keep=np.tile(report.plan.keep, 4), widths=np.tile(report.plan.widths, 4)
    )
    return replace(
        report,
        model=replace(report.model, path=f"models/{HOSTILE[0]}.onnx"),
        output=f"{HOSTILE[1]}.onnx",
        coupling=coupling,
        scores=replace(report.scores, values=np.tile(report.scores.values, 4)),
        plan=plan,
        curves=report.curves * 4,
        fits=tuple(Fit(name, "least squares", 9, 9, None, 0.5, 0.25) for name in HOSTILE),
        notes=HOSTILE,
        settings={**report.settings, "data": HOSTILE[2], "exclude": list(HOSTILE)},
    )


def test_names_from_the_model_are_escaped(hostile_page: bytes) -> None:
    page = hostile_page
    assert_fetches_nothing(page)
    assert_ids_are_sound(page)
    text = page.decode()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert not {c for c in text if ord(c) < 32 and c != "\n"}
    assert "\u202e" not in text
    tree = Tree(page)
    for section in ("widths", "skipped", "errors", "checks"):
        for name in HOSTILE:
            assert visible(name) in tree.sections[section], section
    assert any(t.startswith("esc\\x1b[3") for t in tree.texts)
    assert "a&b&amp;c" in tree.texts, "names are texts in drawings too, and no formulas"
    assert any(t.startswith("$\\frac{1") for t in tree.texts)
    assert all(len(t) < 60 for t in tree.texts)
    assert "49" not in tree.sections["checks"].split("Remarks")[1], "a name is no template"


def test_invisible_characters_are_spelt_out() -> None:
    assert visible("a\x00b\u200bc\ud800\n") == "a\\x00b\\u200bc\\ud800\\x0a"
    assert visible("Größe 漢字 é") == "Größe 漢字 é"


@pytest.mark.parametrize(
    "name", ["layer.weight", "W" * 200, "漢" * 80, "\U0001f600" * 50, "i" * 500, "", "$x$"]
)
def test_names_are_shortened_to_the_available_width(name: str) -> None:
    found = charts.shortened(name, 150)
    assert found == name or (
        "…" in found and name.startswith(found[:1]) and name.endswith(found[-1:])
    )
    assert len(found) <= 80


def test_shortened_names_stay_distinct() -> None:
    assert charts.shortened("encoder.layer.3.weight", 200) == "encoder.layer.3.weight"
    assert (
        charts.shortened("encoder.layer.3.attention.output.dense.weight", 150)
        == "e.l.3.a.output.dense.weight"
    )
    assert (
        charts.shortened("/blocks/blocks.3/shortcut/shortcut.0/Conv", 150)
        == "/b/b.3/s/shortcut.0/Conv"
    )
    names = [
        f"decoder.{part}.{i}.mlp.fc{j}.weight"
        for part in ("up", "down")
        for i in range(40)
        for j in (1, 2)
    ]
    assert len({charts.shortened(name, 150) for name in names}) == len(names)


def test_numbers_have_units() -> None:
    texts = [
        wording.short(v, u)
        for v, u in ((15_400_000, ""), (999_960, "B"), (117_000, ""), (31e6, ""), (12, "B"))
    ]
    assert [t.replace("\u00a0", " ") for t in texts] == [
        "15.4 M",
        "1.00 MB",
        "117 k",
        "31.0 M",
        "12 B",
    ]


# ------------------------------------------------------------------------------------------------------- many groups


def large(report: Report, groups: int = 110, nodes: int = 210) -> Report:
    """A report of a network with many groups, 8 to 4096 wide."""
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.geomspace(8, 4096, groups).astype(np.int64))
    ends = np.cumsum(sizes)
    made, curves = [], []
    for i, (end, size) in enumerate(zip(ends.tolist(), sizes.tolist(), strict=True)):
        made.append(
            Group(
                f"encoder.layer.{i}.attention.output.dense.weight", np.arange(end - size, end), {}
            )
        )
        widths = np.unique(np.linspace(1, size, 6).astype(np.int64))
        curves.append(Sensitivity(widths, np.append(np.geomspace(2, 1e-5, len(widths) - 1), 0)))
    keep = rng.random(ends[-1]) < 0.5
    widths = np.add.reduceat(keep, ends - sizes)
    coupling = Coupling(int(ends[-1]), tuple(made), np.repeat(np.arange(groups), sizes), {}, (), ())
    plan = Plan(keep, widths, "mip", report.after)
    fits = tuple(
        Fit(f"/encoder/layer.{i}/output/dense/MatMul", "least squares", 4096, 100, 0.1, b, b * 0.1)
        for i, b in enumerate(rng.random(nodes).tolist())
    )
    scores = replace(report.scores, values=rng.lognormal(-4, 2, ends[-1]))
    return replace(
        report, coupling=coupling, plan=plan, curves=tuple(curves), fits=fits, scores=scores
    )


def test_page_of_many_groups_stays_readable(report: Report, large_page: bytes) -> None:
    found, page = large(report), large_page
    tree = Tree(page)
    assert len(page) < 2_000_000
    assert_ids_are_sound(page)
    assert len(tree.rows["widths"]) == 1 + 110
    assert len(tree.rows["errors"]) == 1 + 200
    assert "Showing the 200 largest of 210 nodes" in tree.sections["errors"]
    for section in ("sensitivity", "scores"):
        assert "Showing the 24 largest of 110 groups" in tree.sections[section]
    largest = sorted((len(g.units) for g in found.coupling.groups), reverse=True)[:24]
    assert all(f"of {size:,} units kept" in tree.sections["sensitivity"] for size in largest)
    names = [t for t in tree.texts if t.endswith("dense.weight")]
    assert len(set(names)) == len(names) == 110
    heights = [float(a["height"] or 0) for a in tree.named("svg")]
    assert max(heights) <= 600


@needs_chromium
@pytest.mark.parametrize("kind", ["plain_page", "hostile_page", "large_page"])
def test_page_elements_do_not_overflow_or_overlap(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    assert_well_laid_out(request.getfixturevalue(kind), tmp_path)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("net.onnx", "data.npz"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


PRUNE = (
    "prune",
    "net.onnx",
    "--data",
    "data.npz",
    "--macs",
    "0.5",
    "-o",
    "out.onnx",
    "--align",
    "1",
    "-q",
)


def test_prune_writes_a_page(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--report", "r.html"]) == 0
    assert capfd.readouterr() == ("", "")
    tree = Tree((place / "r.html").read_bytes())
    assert [a["id"] for a in tree.named("section")] == SECTIONS
    assert "out.onnx" in tree.sections[""]


def test_apply_writes_a_page(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--data", "data.npz", "--macs", "0.5", "--align", "1", "--seed", "3", "-q")
    assert main(["plan", "net.onnx", *words, "-o", "p.json"]) == 0
    made = ("--plan", "p.json", "--data", "data.npz", "-o", "a.onnx", "--report", "a.html", "-q")
    assert main(["apply", "net.onnx", *made]) == 0
    page = (place / "a.html").read_bytes()
    assert_fetches_nothing(page)
    tree = Tree(page)
    assert [a["id"] for a in tree.named("section")] == [
        "widths",
        "network",
        "errors",
        "skipped",
        "programs",
        "outputs",
        "checks",
        "samples",
        "again",
    ]
    again = tree.sections["again"]
    command = shlex.split(
        again[again.index("onnx-oamip apply") : again.index("Budget and data")].replace("\\\n", " ")
    )
    first = (place / "a.onnx").read_bytes()
    (place / "a.onnx").unlink()
    assert main([*command[1:], "-q"]) == 0
    assert (place / "a.onnx").read_bytes() == first


def test_dry_run_writes_no_page(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--dry-run", "--report", "r.html"]) == 2
    assert "--dry-run" in capfd.readouterr().err
    assert not (place / "r.html").exists()


def test_failed_run_writes_no_page(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "r.html").write_bytes(b"old")
    assert main([*PRUNE, "--report", "r.html", "--macs", "0.001"]) == 1
    assert "--macs" in capfd.readouterr().err
    assert (place / "r.html").read_bytes() == b"old"
    assert sorted(p.name for p in place.iterdir()) == ["data.npz", "net.onnx", "r.html"]


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("net.onnx", "net.onnx"),
        ("data.npz", "data.npz"),
        ("out.onnx", "out.onnx"),
        ("nowhere/r.html", "nowhere"),
        (".", "folder"),
    ],
)
def test_unwritable_page_is_refused_before_any_work(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    word: str,
) -> None:
    monkeypatch.setattr(pipeline, "prune", lambda *_, **__: pytest.fail("work was done"))
    assert main([*PRUNE, "--report", target]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert word in err
    assert not os.path.exists("out.onnx")


def test_shipped_network_has_a_page(tmp_path: Path) -> None:
    """Without labels: agreement takes the place of accuracy."""
    with np.load(MODELS / "mnist.npz") as file:
        few = {k: file[k][:40] if file[k].ndim else file[k] for k in ("input", "input.scale")}
    np.savez(tmp_path / "few.npz", **few)
    settings = Settings.create(params=0.6, device="cpu", align=1, allocate="global")
    found = prune(MODELS / "lenet300-mnist.onnx", str(tmp_path / "few.npz"), None, settings)
    tree = Tree(prune_page(found))
    assert "Agreement" in tree.sections[""]
    assert "same top class, 8 samples" in tree.sections[""]
