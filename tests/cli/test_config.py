"""Configuration files: the command line's names, flag over file over default, one sentence for what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnx_oamip.cli import cli, main
from onnx_oamip.cli.config import options
from onnx_oamip.core.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "c.toml").write_text(text)
        return "c.toml"

    return write


def _shown(*arguments: str) -> dict[str, dict[str, object]]:
    result = CliRunner().invoke(cli, ["config", *arguments, "--json"], catch_exceptions=False)
    return json.loads(result.stdout)["options"]


def _settings(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Settings:
    """The settings that prune would be called with."""
    seen: list[Settings] = []

    def prune(*given: object, **_: object) -> None:
        seen.extend(g for g in given if isinstance(g, Settings))
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx_oamip.api.pipeline.prune", prune)
    assert main(["prune", "model.onnx", "-o", "out.onnx", *arguments]) == 130
    return seen[0]


def test_option_overrides_file_overrides_default(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file('macs = "50%"\nseed = 3\nexclude = ["a*", "b"]\nforce = true\nimportance = "l2"\n')
    found = _settings(monkeypatch, "--config", path, "--seed", "5")
    assert (found.macs, found.seed, found.exclude, found.force, found.importance) == (
        0.5,
        5,
        ("a*", "b"),
        True,
        "l2",
    )
    assert found.allocate == Settings().allocate
    assert _settings(monkeypatch, "--macs", "0.4").seed == 0
    # The place of --config among the others does not matter.
    assert _settings(monkeypatch, "--seed", "5", "--macs", "0.1", "--config", path).macs == 0.1
    with_list = _settings(monkeypatch, "--config", path, "--exclude", "z")
    assert with_list.exclude == ("z",)


def test_every_command_reads_its_own_settings_from_the_file(file: Callable[[str], str]) -> None:
    path = file('macs = 0.5\nallocate = "global"\nseed = 9\n')
    assert _shown("--config", path, "--of", "score")["seed"] == {"value": 9, "source": "file"}
    assert "macs" not in _shown("--config", path, "--of", "score")


def test_command_line_defaults_equal_settings_defaults() -> None:
    rows = _shown()
    for name, value in Settings().model_dump(mode="json").items():
        shown = rows[name.replace("_", "-")]
        assert shown["source"] == "default"
        assert shown["value"] == value, name


def test_shown_configuration_can_be_read_back(file: Callable[[str], str]) -> None:
    path = file('macs = 0.3\nexclude = ["x y", "q\\"uote"]\ndata = "d.npz"\nrelax = true\n')
    text = CliRunner().invoke(cli, ["config", "--config", path], catch_exceptions=False).stdout
    again = tomllib.loads(text)
    assert again["macs"] == 0.3
    assert again["exclude"] == ["x y", 'q"uote']
    assert "# from c.toml" in text
    before = {n: r["value"] for n, r in _shown("--config", path).items()}
    after = {n: r["value"] for n, r in _shown("--config", file(text)).items()}
    assert before == after


def test_schema_has_every_setting() -> None:
    result = CliRunner().invoke(cli, ["config", "--schema"], catch_exceptions=False)
    schema = json.loads(result.stdout)
    assert set(schema["properties"]) == {n.replace("_", "-") for n in Settings.model_fields}
    flags = {name for name, _ in options(cli.commands["prune"])}
    assert set(schema["properties"]) <= flags | {"outputs"}  # a table in files, `--output` here


WRONG = {
    "a name": (
        "mcas = 0.5",
        r"sets 'mcas', which is no option of any command; did you mean macs\?",
    ),
    "a name of nothing": ("qwertz = 1", "sets 'qwertz', which is no option"),
    "a table": ("[macs]\nx = 1", "has a table 'macs'"),
    "no TOML": ("macs = = 3", "no valid TOML: .*line 1"),
    "a list": ("macs = [0.5]", "one value, not a list"),
    "no list": ('exclude = "a"', "a list, in brackets"),
    "a switch": ("macs = true", "no switch"),
    "no switch": ('force = "yes"', "true or false"),
    "a share": ("macs = 2.0", "--macs.* not a share"),
    "a choice": ('allocate = "best"', "--allocate.*'best'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_configuration_is_one_sentence(
    file: Callable[[str], str], name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import re

    text, rule = WRONG[name]
    code = main(["prune", "model.onnx", "-o", "out.onnx", "--config", file(text)])
    err = capsys.readouterr().err
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(rule, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.toml"]


def test_missing_configuration_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "m.onnx", "-o", "o.onnx", "--config", str(tmp_path / "none.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["config", "--of", "dance"]) == 2
    assert "no command 'dance'" in capsys.readouterr().err
