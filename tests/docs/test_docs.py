"""README and docs/: links and navigation targets exist, generated parts are fresh, listings are complete."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT

import onnx_oamip
from onnx_oamip.artifacts.plan_schema import GroupEntry
from onnx_oamip.cli import cli, main
from tools.bench import __main__ as bench
from tools.bench import picture, readme
from tools.bench.studies import digest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
ROOT_PAGES = tuple(sorted(path.name for path in ROOT.glob("*.md")))
PAGES = (*ROOT_PAGES, *DOCS, "models/README.md", "tools/experiments/results/README.md")
PACKAGE = ROOT / "onnx_oamip"
RESULTS = "docs/results.md"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """Without blocks of code, in which brackets are no links and # is no heading."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """Ids of the headings as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {f"{slug}-{i}" if i else slug for slug, count in found.items() for i in range(count)}


def links(page: str) -> list[str]:
    return re.findall(r"]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", prose(page)))


def local_links(pages: tuple[str, ...]) -> list[tuple[str, str]]:
    """Pages with each of their links to a file or heading of this repository."""
    pairs = [(page, link) for page in pages for link in links(page)]
    return [(page, link) for page, link in pairs if not link.startswith(("http://", "https://"))]


def test_local_links_name_existing_files_and_headings() -> None:
    found = local_links(PAGES)
    assert len(found) > len(PAGES)
    for page, link in found:
        path, _, anchor = unquote(link).partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_relative_to(ROOT), (page, link)
        assert target.exists(), (page, link)
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), (page, link)


def test_site_pages_link_only_inside_the_site() -> None:
    """A file outside docs/ is not part of the built site; such pages name it as code instead of linking to it."""
    found = [(page, link) for page, link in local_links(DOCS) if not link.startswith("#")]
    assert len(found) > len(DOCS)
    for page, link in found:
        target = ((ROOT / page).parent / unquote(link).partition("#")[0]).resolve()
        assert target.is_relative_to(ROOT / "docs"), (page, link)


def nav_targets(entries: list[Any]) -> list[str]:
    """Pages named in mkdocs.yml, sections included."""
    targets: list[str] = []
    for entry in entries:
        (value,) = entry.values()
        targets += [value] if isinstance(value, str) else nav_targets(value)
    return targets


def test_navigation_has_every_page_once() -> None:
    assert sorted(f"docs/{target}" for target in nav_targets(SITE["nav"])) == sorted(DOCS)


def test_site_requests_nothing_from_other_hosts() -> None:
    assert SITE["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript"} & set(SITE)


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: a warning, about a link or a docstring for example, fails the build."""
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    pytest.importorskip("mkdocstrings", reason="needs the extra 'docs'")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prune" in (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")


def test_workflow_builds_the_site_with_the_declared_extra() -> None:
    workflow = yaml.safe_load(text(".github/workflows/docs.yml"))
    commands = [step["run"] for step in workflow["jobs"]["build"]["steps"] if "run" in step]
    assert commands == ["pip install -e '.[docs]'", "mkdocs build --strict"]
    assert re.search(
        r"^docs = \[.*mkdocs-material.*mkdocstrings\[python\]", text("pyproject.toml"), re.MULTILINE
    )


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem
)
def test_issue_forms_have_unique_fields(form: Path) -> None:
    fields = yaml.safe_load(form.read_text(encoding="utf-8"))
    names = [field["id"] for field in fields["body"]]
    assert {"name", "description", "body"} <= set(fields)
    assert names
    assert len(names) == len(set(names))
    assert all(field["attributes"]["label"] for field in fields["body"])


def test_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: onnx_oamip\.(\w+)$", text("docs/reference/api.md"), re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert set(shown) == set(onnx_oamip.__all__) - {"__version__"}


def test_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 300


def test_readme_leads_to_every_page() -> None:
    reached = {
        (ROOT / link.partition("#")[0]).resolve()
        for link in links("README.md")
        if not link.startswith("#")
    }
    home = ("README.md", "docs/index.md")  # the home page of the site, which repeats the README
    assert {(ROOT / page).resolve() for page in PAGES if page not in home} <= reached


def test_results_are_fresh() -> None:
    assert readme.updated(text("README.md"), readme.SAVED) == text("README.md"), (
        "run: python -m tools.bench readme"
    )
    assert readme.page(readme.SAVED) == text(RESULTS), "run: python -m tools.bench readme"


def test_edited_number_is_detected() -> None:
    page = text("README.md")
    begin, end = page.index(readme.BEGIN), page.index(readme.END)
    numbers = [
        found
        for found in re.finditer(r"(?<=\| )-?\d+\.\d+(?= \|)", page)
        if begin < found.start() < end
    ]
    assert len(numbers) > 30
    for found in numbers[:: len(numbers) // 7]:
        edited = f"{page[: found.start()]}{float(found[0]) + 0.01:.2f}{page[found.end() :]}"
        assert readme.updated(edited, readme.SAVED) != edited


@pytest.mark.parametrize("name", [picture.NAME.removesuffix(".svg"), *readme.FIGURES])
def test_pictures_show_the_saved_rows(name: str) -> None:
    file = readme.SAVED / f"{'rivals' if name == 'accuracy' else name}.json"
    if not file.exists():
        assert not (readme.DRAWN / f"{name}.svg").exists()
        return
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    drawn = (readme.DRAWN / f"{name}.svg").read_text(encoding="utf-8")
    assert digest(rows) in drawn, "run: python -m tools.bench readme"
    assert digest([{**rows[0], "ours": 0.0}, *rows[1:]]) != digest(rows)


def test_every_study_has_its_text_and_is_small() -> None:
    assert {name.partition("-")[0] for name in readme.TEXT} == {*bench.STUDIES, *readme.OTHERS}
    files = list(readme.SAVED.iterdir())
    assert {p.stem for p in files} <= set(readme.TEXT)
    assert sum(p.stat().st_size for p in files) < 320_000
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        assert record["study"] == file.stem
        assert record["rows"]
        assert record["environment"]


def test_publishing_copies_new_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAVED", "PAGE", "README"):
        monkeypatch.setattr(readme, name, tmp_path / name)
    new = tmp_path / "new"
    for folder in (tmp_path / "SAVED", new):
        folder.mkdir()
    for file in (ROOT / "tools/bench/results").iterdir():
        (tmp_path / "SAVED" / file.name).write_text(file.read_text())
    record = json.loads((tmp_path / "SAVED/budgets.json").read_text())
    record["rows"] = [
        {**record["rows"][0], "model": "another", "MACs kept": 0.5, "before": 98.0, "after": 12.34}
    ]
    (new / "budgets.json").write_text(json.dumps(record))
    summary = json.loads((tmp_path / "SAVED/rivals-summary.json").read_text())
    summary["rows"] = [{**summary["rows"][0], "model": "another", "lost by ours": 12.34}]
    (new / "rivals-summary.json").write_text(json.dumps(summary))
    (tmp_path / "README").write_text(f"before {readme.BEGIN} old {readme.END} after")
    drawn = []
    monkeypatch.setattr(readme, "DRAWN", tmp_path / "docs")
    monkeypatch.setattr(readme.picture, "write", lambda rivals, _: drawn.extend(rivals))
    readme.publish(new)
    shown = (tmp_path / "README").read_text()
    assert shown.startswith(f"before {readme.BEGIN}\n**Points lost")
    assert shown.endswith(f"{readme.END} after")
    assert "| another | 12.34 |" in shown
    row = r"\| another \| auto \| [\d.]+ \| 0\.50 \| [\d.]+ \| 98\.00 \| 12\.34 \|"
    assert re.search(row, (tmp_path / "PAGE").read_text())
    assert json.loads((tmp_path / "SAVED/budgets.json").read_text())["rows"] == record["rows"]
    assert drawn == json.loads((tmp_path / "SAVED/rivals.json").read_text())["rows"]
    assert {p.name for p in (tmp_path / "docs").iterdir()} == {
        f"{study}.svg" for study in readme.FIGURES if (readme.SAVED / f"{study}.json").exists()
    }


def test_missing_markers_are_reported() -> None:
    with pytest.raises(ValueError, match="results:begin"):
        readme.updated("no markers", readme.SAVED)


def test_design_page_lists_the_rooms_in_layer_order() -> None:
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("exhaustive"))
    section = text("docs/design.md").partition("\n## Rooms\n")[2].partition("\n## ")[0]
    table = section.partition("| --- | --- |\n")[2].partition("\n\n")[0]
    listed = [re.findall(r"`(\w+)/`", row.split("|")[1]) for row in table.splitlines()]
    assert listed == [layer.split(" | ") for layer in layers]
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert {room for row in listed for room in row} == folders


def test_modules_named_in_the_design_exist() -> None:
    stages = (
        text("docs/design.md").partition("| stage | function | result |\n")[2].partition("\n\n")[0]
    )
    names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", stages)
    assert len(names) > 10
    for name in names:
        assert pkgutil.resolve_name(f"onnx_oamip.{name}") is not None


def test_modules_and_names_of_the_package_in_pages_exist() -> None:
    # A key, a group, a list.
    no_modules = {
        "onnx_oamip.provenance",
        "onnx_oamip.importance",
        "onnx_oamip.__all__",
    }
    pages = [
        page
        for page in (*ROOT_PAGES, *DOCS)
        if page not in ("docs/reference/api.md", "CHANGELOG.md")
    ]
    named = {name for page in pages for name in re.findall(r"\bonnx_oamip(?:\.\w+)+", text(page))}
    assert len(named - no_modules) > 2
    for name in named - no_modules:
        # A submodule, or an attribute of a module.
        module = importlib.util.find_spec(name.rpartition(".")[0])
        assert module is not None, name
        assert importlib.util.find_spec(name) or pkgutil.resolve_name(name), name


def test_paths_named_for_contributors_exist() -> None:
    pattern = r"(?<![\w/])(?:onnx_oamip|tests|tools|\.ci)/[\w./]*\w"
    named = [path for path in re.findall(pattern, text("CONTRIBUTING.md")) if "ROOM" not in path]
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_contributing_has_a_row_for_every_room() -> None:
    table = (
        text("CONTRIBUTING.md")
        .partition("\n## Which tests for which room\n")[2]
        .partition("\n## ")[0]
    )
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    rooms = {room for row in rows for room in re.findall(r"`(\w+)/`", row[1])}
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders <= rooms
    assert all("`pytest tests/" in row[2] for row in rows)


def test_every_option_is_in_the_reference() -> None:
    tables = (
        text("docs/reference/options.md")
        .partition("\n## Budgets\n")[2]
        .partition("\n## Configuration files\n")[0]
    )
    shown = set(re.findall(r"--[a-z][a-z-]+", tables))
    for name, command in cli.commands.items():
        options = {
            o
            for p in command.params
            if p.param_type_name == "option"
            for o in p.opts
            if o.startswith("--")
        }
        assert options - {"--output", "--quiet"} <= shown, name


def test_shown_output_is_the_real_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (command, shown), *others = re.findall(
        r"^```console\nonnx-oamip ([^\n]+)\n```\n\n```text\n(.*?)^```",
        "\n".join(map(text, PAGES)),
        re.MULTILINE | re.DOTALL,
    )
    assert others == []
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.rstrip() for line in lines] == shown.splitlines()


def test_shown_plan_is_a_valid_plan() -> None:
    blocks = re.findall(
        r"^```json\n(.*?)^```", "\n".join(map(text, DOCS)), re.MULTILINE | re.DOTALL
    )
    shown = [GroupEntry.model_validate_json(block) for block in blocks if '"keep"' in block]
    assert len(shown) == 1


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_path_of_one_machine(page: str) -> None:
    assert not re.search(r"/(?:home|root|tmp|Users|work|mnt)/", text(page))
