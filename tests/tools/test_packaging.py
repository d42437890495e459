"""Installation and its tests: constraints for every dependency, the workflow of hosted CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PYTHONS = [text for c in PROJECT["classifiers"] for text in re.findall(r"Python :: (3\.\d+)$", c)]
KNOWN_TO_BREAK: dict[str, str] = {}
"""Failures with the releases that a dependency's specifier excludes, by the dependency's name."""
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def required(extra: str | None = None) -> list[Requirement]:
    """The direct dependencies of an extra, or without one of the package; extras that it includes are followed."""
    found: list[Requirement] = []
    for line in (
        PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    ):
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found += [inner for name in requirement.extras for inner in required(name)]
        else:
            found.append(requirement)
    return found


def pins(python: str) -> dict[str, str]:
    """Releases by normalised name that constraints.txt holds for a version of Python."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert normal(pin.name) not in found, line
                assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
                found[normal(pin.name)] = str(pin.specifier)[2:]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_dependency_within_its_bounds(python: str) -> None:
    fixed = pins(python)
    wanted = [*required(), *required("cpu"), *required("dev")]
    assert {"numpy", "onnxruntime", "matplotlib", "pytest"} <= {r.name for r in wanted}
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert requirement.specifier.contains(fixed[normal(requirement.name)]), requirement


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_only_releases_that_are_known_to_break_are_excluded(extra: str | None) -> None:
    excluded = {r.name for r in required(extra) if any(s.operator != ">=" for s in r.specifier)}
    assert excluded <= set(KNOWN_TO_BREAK)


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


@pytest.mark.parametrize("job", ["newest", "constraints", "lowest"])
def test_every_supported_python_is_tested(workflow: dict[str, Any], job: str) -> None:
    assert workflow["jobs"][job]["strategy"]["matrix"]["python"] == PYTHONS


def test_workflow_runs_on_a_schedule_and_on_every_system(workflow: dict[str, Any]) -> None:
    assert workflow[True]["schedule"], "'on' is a boolean to YAML 1.1"
    matrix = workflow["jobs"]["newest"]["strategy"]["matrix"]
    systems = {*matrix["os"], *(row["os"] for row in matrix["include"])}
    assert systems == {"ubuntu-latest", "windows-latest", "macos-latest"}


def test_workflow_runs_existing_files(workflow: dict[str, Any]) -> None:
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    scripts = {word for command in commands for word in re.findall(r"\.ci/\w+", command)}
    assert scripts == {".ci/lowest"}
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)
    files = {word for command in commands for word in re.findall(r"-c (\S+\.txt)", command)}
    assert files == {"constraints.txt"}
    extras = {found for command in commands for found in re.findall(r"\.\[([\w,]+)\]", command)}
    assert extras == {"cpu,dev"}


@pytest.mark.skipif(os.name != "posix", reason="the job runs on Linux")
def test_quick_start_command_is_found_in_the_readme(workflow: dict[str, Any]) -> None:
    steps = workflow["jobs"]["first-command"]["steps"]
    command = next(step["run"] for step in steps if "README.md" in step.get("run", ""))
    shown = subprocess.check_output(["bash", "-c", command.partition(">")[0]], cwd=ROOT, text=True)
    assert shown.startswith("pip install -e '.[cpu]' && onnx-oamip prune ")
    assert shown.count("\n") == 1


def test_description_has_no_links_that_only_work_in_the_repository() -> None:
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    local = re.findall(r"\]\((?!https?:|#)[^)]*\)", text)
    assert local == []
    assert "[choosing a budget]" not in text
    assert "choosing a budget" in text
    assert "figures/accuracy.svg" not in text


def test_archives_hold_what_they_should() -> None:
    """All tracked files in the source archive, because the tests read them; only the package in the wheel."""
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"] == {}
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="needs hatchling")
    files = {
        file.relative_path.replace("\\", "/")
        for file in sdist.SdistBuilder(str(ROOT)).recurse_included_files()
    }
    assert {"models/mnist.npz", "CHANGELOG.md", ".github/workflows/ci.yml", "mkdocs.yml"} <= files
    assert {"constraints.txt", "tools/op_table.py", "tests/fast.json", "docs/index.md"} <= files
    weights = {path.suffix for path in (ROOT / "onnx_oamip").rglob("*") if path.is_file()}
    assert not weights & {".onnx", ".npz", ".npy", ".pb"}
