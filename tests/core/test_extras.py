"""Optional packages: nothing imports them unasked; where one is missing, the command that needs it names its extra."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from graphs import build

from onnx_oamip.core.errors import EnvironmentMissing
from onnx_oamip.core.extras import imports_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = {
    "report": ("jinja2", "matplotlib"),
    "images": ("PIL",),
    "pack": ("sklearn",),
    "parquet": ("pyarrow",),
}
EVERY = tuple(package for packages in PACKAGES.values() for package in packages)
BLOCKED = """
import gc, json, os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

names = []
sys.meta_path.insert(0, Blocked())

from onnx_oamip.api import proof
from onnx_oamip.cli import main
from onnx_oamip.verification import latency

proof.compare_latency = lambda *_, **__: latency.Ratio(0.5, 0.4, 0.6, 9)
latency.STEP_SECONDS = 0.01
gc.freeze()  # no process searches what all of them share for cycles
for names, commands in json.loads(sys.argv[1]):
    pid = os.fork()  # before any session: nothing here has threads yet
    if not pid:
        codes = [main(command) for command in commands]
        modules = sorted({name.partition(".")[0] for name in sys.modules})
        print("\\n" + json.dumps([codes, modules]), flush=True)
        os._exit(0)  # taking apart what all of them share takes longer than most commands
    os.waitpid(pid, 0)
"""
"""Program that runs commands where some packages cannot be imported.

Each group is a process forked from one that has imported the package; it prints exit codes and imported packages.
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with model.onnx, data.npz, a table of numbers, a table of images and a folder of images."""
    text = """(float[batch, 3, 8, 8] image) => (float[batch, 4] scores)
    <float[8, 3, 3, 3] w1, float[8] b1, float[4, 8] w2, float[4] b2> {
        a = Conv(image, w1, b1)
        r = Relu(a)
        g = GlobalAveragePool(r)
        f = Flatten(g)
        scores = Gemm<transB = 1>(f, w2, b2)
    }"""
    onnx.save_model(build(text), tmp_path / "model.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    images = np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images, labels=np.arange(40) % 4)
    table = pyarrow.table({"image": images.reshape(40, -1).tolist()})
    pyarrow.parquet.write_table(table, tmp_path / "numbers.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [b"picture"] * 4}), tmp_path / "pictures.parquet"
    )
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not read where Pillow is missing")
    return tmp_path


@dataclass(frozen=True)
class Group:
    """Exit codes of commands in one process, and the packages that it imported."""

    codes: list[int]
    modules: set[str]


def run(place: Path, *groups: tuple[Sequence[str], Sequence[str]]) -> tuple[list[Group], str]:
    """Run (blocked packages, commands), each group in a process of its own; all of stderr."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked as POSIX has it")
    asked = [(blocked, [command.split() for command in commands]) for blocked, commands in groups]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(asked)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(answers) == len(groups), done.stderr
    return [Group(codes, set(modules)) for codes, modules in answers], done.stderr


PRUNE = "prune broken.onnx --macs 0.5 -o out.onnx --data"
NEEDS = {
    "prune --report": ("report", f"{PRUNE} data.npz --report out.html"),
    "apply --report": (
        "report",
        "apply broken.onnx --plan p.json --data data.npz -o out.onnx --report out.html",
    ),
    "frontier --report": (
        "report",
        "frontier broken.onnx --data data.npz -o out.json --report out.html",
    ),
    "a folder of images": ("images", f"{PRUNE} images"),
    "held-out images": ("images", f"{PRUNE} data.npz --eval-data images"),
    "images to score with": ("images", "score broken.onnx --data images -o out.npz"),
    "images to verify with": ("images", "verify broken.onnx broken.onnx --data images"),
    "images to time with": ("images", "bench broken.onnx --data images"),
    "images to pack with": ("images", "pack broken.onnx --data images -o out.oamip"),
    "images in a table": (
        "images",
        "prune model.onnx --data pictures.parquet --macs 0.5 -o out.onnx",
    ),
    "a table": ("parquet", f"{PRUNE} numbers.parquet"),
    "pack --data": ("pack", "pack broken.onnx --data data.npz -o out.oamip"),
    "pack --clusters": ("pack", "pack broken.onnx --clusters 4 -o out.oamip"),
    "pack --bits": ("pack", "pack broken.onnx --bits 2 -o out.oamip"),
    "--limits snacs": ("pack", f"{PRUNE} data.npz --limits snacs"),
}
"""Features by the extra that they need. A broken model shows that the extra is looked for before any work."""


def test_missing_extra_is_named_before_any_work(place: Path) -> None:
    before = sorted(place.iterdir())
    groups = [
        ([package], [command for needed, command in NEEDS.values() if needed == extra])
        for extra, packages in PACKAGES.items()
        for package in packages
    ]
    found, errors = run(place, *groups)
    assert [g.codes for g in found] == [[2] * len(commands) for _, commands in groups], errors
    lines = iter(errors.splitlines())
    for (package,), commands in groups:
        (extra,) = (name for name, packages in PACKAGES.items() if package in packages)
        for _ in commands:
            line = next(lines)
            assert line.startswith("Error: ")
            assert f"(No module named '{package}" in line
            assert line.endswith(f"install them with pip install 'onnx-oamip[{extra}]'.")
    assert not list(lines)
    assert sorted(place.iterdir()) == before


def test_core_features_work_without_the_extras(place: Path) -> None:
    data = "--data data.npz --align 1 -q"
    commands = [
        "inspect model.onnx --json",
        f"prune model.onnx {data} --macs 0.5 --force -o small.onnx --keep-map kept.safetensors",
        "score model.onnx --data data.npz -q -o scores.npz",
        f"plan model.onnx {data} --scores scores.npz --macs 0.5 -o plan.json",
        "apply model.onnx --plan plan.json --data data.npz -q --force -o again.onnx",
        f"frontier model.onnx {data} --levels 0.5 -o frontier.json",
        "verify model.onnx small.onnx --data data.npz",
        "bench model.onnx small.onnx --data data.npz --seconds 0.1",
        "pack model.onnx -q -o packed.oamip",
        "unpack packed.oamip -q -o unpacked.onnx",
        "solvers",
        "ops",
        "config",
    ]
    (found,), errors = run(place, (EVERY, commands))
    assert found.codes == [0] * len(commands), errors
    assert not found.modules & set(EVERY)
    assert (place / "small.onnx").read_bytes() == (place / "again.onnx").read_bytes()
    assert (place / "unpacked.onnx").read_bytes() == (place / "model.onnx").read_bytes()


def test_pruning_imports_no_optional_package(place: Path) -> None:
    command = "prune model.onnx --data data.npz --macs 0.5 --force -o small.onnx"
    (found,), errors = run(place, ([], [command]))
    assert found.codes == [0], errors
    assert not found.modules & {*EVERY, "yaml", "pandas"}


def test_every_optional_package_belongs_to_a_declared_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn"}
    for extra, packages in PACKAGES.items():
        assert [re.split("[>=]", line)[0] for line in declared[extra]] == [
            distributions.get(p, p) for p in packages
        ]
        assert not any(line in project["dependencies"] for line in declared[extra])
    assert declared["all"] == [f"onnx-oamip[{','.join(PACKAGES)}]"]
    assert "onnx-oamip[all]" in declared["dev"], "the tests need all of them"
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "onnx_oamip").rglob("*.py")
    )
    named = set(re.findall(r'imports_of\(\s*"(\w+)"', sources))
    assert {*PACKAGES, "mlflow", "cluster", "recover"} == named <= set(declared)


def test_broken_package_is_an_environment_error() -> None:
    sentence = r"^reading tables needs .* 'parquet' \(DLL load failed\); install them with"
    with pytest.raises(EnvironmentMissing, match=sentence), imports_of("parquet", "reading tables"):
        raise ImportError("DLL load failed.\nmore lines")


def test_import_error_of_this_package_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ImportError, match="cannot import name"), imports_of("report", "a page"):
        from onnx_oamip.core.printable import no_such_name  # noqa: F401
