"""Commands and programs in README and docs/: they run as written, on files that exist or are named as the reader's."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import save_file

from onnx_oamip.cli import cli, main
from onnx_oamip.importance.oamip import decoupled
from onnx_oamip.planning import latency_model
from onnx_oamip.verification import latency

PAGES = (
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
INPUTS = ("--data", "--eval-data", "--plan", "--scores", "--config", "--keep-map", "--state-dict")
OUTPUTS = ("-o", "--output", "--keep-map", "--report", "--save-dir", ">")


def fences(page: str) -> list[tuple[str, str]]:
    """Language and content of the code blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str, *languages: str) -> list[list[str]]:
    """Words of every onnx-oamip command in blocks of these languages."""
    lines = [
        line
        for language, block in fences(page)
        if language in languages
        for line in block.splitlines()
    ]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("onnx-oamip ")]


WITH_COMMANDS = [page for page in PAGES if commands(page, "console")]
WITH_PROGRAMS = [page for page in PAGES if {"console", "python"} & dict(fences(page)).keys()]


NOT_RUN = {"recover"}
"""Commands that need an extra which the tests do without; pages show them in blocks that are not run."""


def test_pages_show_every_command() -> None:
    run = {words[0] for page in PAGES for words in commands(page, "console")}
    shown = {words[0] for page in PAGES for words in commands(page, "sh")}
    assert run == set(cli.commands) - NOT_RUN
    assert shown >= NOT_RUN


def files_read(words: list[str]) -> list[str]:
    """Files and folders that a command expects to exist."""
    before_options = itertools.takewhile(lambda word: not word.startswith("-"), words[1:])
    made_by_prune = words[0] in ("prune", "apply")
    named = [
        b
        for a, b in itertools.pairwise(words)
        if a in INPUTS and not (a == "--keep-map" and made_by_prune)
    ]
    return [
        *before_options,
        *(f"{name.partition(':')[0]}.py" if ":" in name else name for name in named),
    ]


def files_written(words: list[str]) -> list[str]:
    return [b for a, b in itertools.pairwise(words) if a in OUTPUTS and not b.startswith("-")]


def own_files(page: str) -> set[str]:
    """Names in the paragraphs of a page that begin with "Your own files:"."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paragraphs = re.findall(r"^Your own files: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return {name for paragraph in paragraphs for name in re.findall(r"`([^`\s]+)`", paragraph)}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "console", "sh")])
def test_commands_read_files_that_exist(page: str) -> None:
    """In the repository, written by an earlier command, shown on the page, or named there as the reader's own."""
    known = own_files(page) | {
        m[1] for _, block in fences(page) if (m := re.match(r"# (\w+\.\w+)\n", block))
    }
    for words in commands(page, "console", "sh"):
        for name in files_read(words):
            assert name in known or (ROOT / name).exists(), f"{name} of: {shlex.join(words)}"
        known |= set(files_written(words))


def materials(folder: Path, page: str) -> None:
    """Make the files that the commands of a page read: shipped ones by name, and the reader's own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (folder / "models").mkdir()
    small = ROOT / "models" / "lenet300-mnist.onnx"
    for name in set(re.findall(r"models/[\w-]+\.onnx", text)):
        assert (ROOT / name).exists()
        shutil.copy(small, folder / name)
    whole = np.load(ROOT / "models" / "mnist.npz")
    few = {k: whole[k] if k.endswith((".scale", ".offset")) else whole[k][:64] for k in whole.files}
    for name in set(re.findall(r"models/[\w-]+\.npz", text)):
        assert (ROOT / name).exists()
        np.savez(folder / name, **few)
    for name in own_files(page):
        own_file(folder / name, small, few)
    for _, block in fences(page):
        if named := re.match(r"# (\w+\.\w+)\n", block):
            (folder / named[1]).write_text(block)


def own_file(path: Path, model: Path, samples: dict[str, Any]) -> None:
    """Make a file that a page calls the reader's own, from the small model and its samples."""
    if path.name == "model.onnx":
        shutil.copy(model, path)
    elif path.name == "samples.npz":
        np.savez(path, **samples)
    elif path.name == "images":
        for i, (pixels, label) in enumerate(
            zip(samples["input"], samples["labels"].tolist(), strict=True)
        ):
            (path / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0]).save(path / str(label) / f"{i}.png")
    elif path.name == "samples.parquet":
        values = (samples["input"].reshape(64, -1) * np.float32(1 / 255)).tolist()
        pyarrow.parquet.write_table(
            pyarrow.table({"pixels": values, "label": samples["labels"]}), path
        )
    elif path.name in ("initial.safetensors", "trained.safetensors"):
        save_file(
            {t.name: numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}, path
        )


@pytest.fixture
def _unchanged_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("onnx_oamip")
    handlers, level = list(root.handlers), own.level
    yield
    root.handlers[:] = handlers
    own.setLevel(level)


@pytest.fixture
def _short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are measured and programs solved for a moment: the pages are about commands.

    The step of widths is known before.
    """
    latency.find_step("cpu")
    measure = latency.interleave

    def short(calls: Any, seconds: float, *more: Any, **named: Any) -> Any:
        return measure(calls, min(seconds, 0.05), *more, **named)

    monkeypatch.setattr(latency, "interleave", short)
    monkeypatch.setattr(latency_model, "interleave", short)
    monkeypatch.setattr(decoupled, "FLOPS_PER_GROUP", 1e8)
    monkeypatch.setattr(decoupled, "MAX_SOLVES", 1)


@pytest.mark.usefixtures("_unchanged_logging", "_short_work")
@pytest.mark.parametrize("page", WITH_PROGRAMS)
def test_commands_and_programs_of_pages_run(
    page: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    separate_registry: None,
) -> None:
    """In their order, on a small network under the names of the larger ones, with one cache, as a reader has it."""
    monkeypatch.setenv("ONNX_OAMIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache of pages"))
    monkeypatch.chdir(tmp_path)
    materials(tmp_path, page)
    before = set(sys.modules)
    names = {"__name__": "__main__"}
    try:
        for language, block in fences(page):
            if language == "console":
                run_console(block, capfd)
            elif language == "python":
                exec(compile(block, page, "exec"), names)
    finally:
        for module in set(sys.modules) - before:
            if getattr(sys.modules[module], "__file__", None) == str(tmp_path / f"{module}.py"):
                del sys.modules[module]


def run_console(block: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Run the lines of a block as a shell would, except those that install or test the package."""
    for command in (part for line in block.splitlines() for part in line.split("&&")):
        words = shlex.split(command)
        if words[0] in ("pip", "pytest", "mkdocs"):
            continue
        assert words[0] == "onnx-oamip", command
        at = words.index(">") if ">" in words else len(words)
        capfd.readouterr()
        code = main(words[1:at])
        out, err = capfd.readouterr()
        assert code == 0, (command, err)
        assert all(line.startswith("note: ") for line in err.splitlines()), (command, err)
        for target in words[at + 1 :]:
            assert json.loads(out)["schema_version"] == 1
            Path(target).write_text(out)


def test_some_pages_have_commands_to_run() -> None:
    assert sum(len(commands(page, "console")) for page in WITH_COMMANDS) >= 20
