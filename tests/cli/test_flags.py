"""Messages name parameters below the command line, and options on it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class
from click.testing import CliRunner
from conftest import ROOT
from graphs import MLP, build

from onnx_oamip import Settings, prune
from onnx_oamip.cli import cli, main
from onnx_oamip.cli.flags import Flags
from onnx_oamip.core.errors import OamipError

PACKAGE = ROOT / "onnx_oamip"
FLAGS = {
    option
    for command in cli.commands.values()
    for parameter in command.params
    for option in parameter.opts
    if option.startswith("--")
}
SHOWS_COMMANDS = {
    "reporting/command_lines.py": "writes the command that repeats a run",
    "reporting/html/page.py": "writes the command that repeats a run",
    "reporting/tables/__init__.py": "is read on a terminal only",
    "reporting/tables/parts.py": "is read on a terminal only",
}
PYTHON_ONLY = {"outputs", "requires", "task"}
"""Parameters and fields that no command has."""


def _docstrings(tree: ast.AST) -> set[ast.AST]:
    """Constants that stand alone as a statement: docstrings of modules, functions, classes and values."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


@cache
def _texts(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every string of a module but its docstrings; values in an f-string are ``{}``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = _docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(ast.walk(node))
            parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
            found.append((node.lineno, "".join(parts)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            found.append((node.lineno, node.value))
    return found


MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] != "cli"
)


def test_modules_below_the_command_line_name_no_options() -> None:
    named = [
        f"{module}:{line}: {text}"
        for module in MODULES
        if module not in SHOWS_COMMANDS
        for line, text in _texts(PACKAGE / module)
        if any(flag in FLAGS or flag == "--{}" for flag in re.findall(r"--(?:[a-z-]+|{})", text))
    ]
    assert not named, "name parameters in backticks instead: `data`, `refit=bias`"


def test_modules_listed_as_showing_commands_name_options() -> None:
    """An exception without a cause is removed from the list."""
    for module in SHOWS_COMMANDS:
        texts = [text for _, text in _texts(PACKAGE / module)]
        assert any(flag in text for flag in ("--json", "--save-dir", "--data") for text in texts)


def test_every_parameter_in_a_message_is_an_option() -> None:
    known = {flag[2:].replace("-", "_") for flag in FLAGS} | PYTHON_ONLY
    found = {
        name: f"{module}:{line}"
        for module in MODULES
        for line, text in _texts(PACKAGE / module)
        for name in re.findall(r"(?<!`)`([a-z_]+)(?:=[^`]*)?`(?!`)", text)
    }
    assert len(found) > 30
    assert {name: place for name, place in found.items() if name not in known} == {}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give `data`, or `refit=none`.", "give --data, or --refit none."),
        ("raise `max_drop`; `eval_data` is small", "raise --max-drop; --eval-data is small"),
        ("`exclude='a b*'` keeps it", "--exclude 'a b*' keeps it"),
        ("the node `data ` and `unknown`", "the node `data ` and `unknown`"),
    ],
)
def test_parameters_become_options(message: str, expected: str) -> None:
    assert Flags(cli).in_text(message) == expected


def test_only_messages_of_a_document_are_changed() -> None:
    document = {
        "notes": ["see `data`"],
        "pinned": [{"tensor": "`data`", "reason": "`exclude='w'` keeps it"}],
        "reason": None,
    }
    assert Flags(cli).in_document(document) == {
        "notes": ["see --data"],
        "pinned": [{"tensor": "`data`", "reason": "--exclude 'w' keeps it"}],
        "reason": None,
    }


def test_error_names_parameters_in_python_and_options_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(build(MLP).SerializeToString())
    with pytest.raises(OamipError) as caught:
        prune("model.onnx", None, "out.onnx", Settings(macs=0.5))
    assert str(caught.value).startswith("`importance=obs` needs calibration data; give `data`, or")
    assert main(["prune", "model.onnx", "--macs", "0.5", "-o", "out.onnx"]) == 2
    assert capsys.readouterr().err == (
        "Error: --importance obs needs calibration data; give --data, or use --importance l2, --allocate uniform and "
        "--refit none.\n"
    )


def test_help_names_options() -> None:
    shown = CliRunner().invoke(cli, ["score", "--help"], terminal_width=100).output
    assert "(see --alpha)" in " ".join(shown.split())
    assert "`" not in shown


@pytest.mark.parametrize(
    ("words", "begun", "expected"),
    [
        ([], "pr", ["prune", "profile"]),
        (["prune"], "--max-", ["--max-drop", "--max-loss", "--max-memory"]),
        (["prune", "--effort"], "h", ["high"]),
    ],
)
def test_shell_completes_commands_options_and_choices(
    words: list[str], begun: str, expected: list[str]
) -> None:
    completion = ShellComplete(cli, {}, "onnx-oamip", "_ONNX_OAMIP_COMPLETE")
    assert [item.value for item in completion.get_completions(words, begun)] == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_of_the_documentation_has_a_completion(shell: str) -> None:
    assert get_completion_class(shell) is not None
    options = Path(__file__).parents[2] / "docs" / "reference" / "options.md"
    assert f"_ONNX_OAMIP_COMPLETE={shell}_source onnx-oamip" in options.read_text("utf-8")
