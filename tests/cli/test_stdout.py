"""Stdout holds the document of a command and nothing else, and with --quiet nothing at all, in every environment.

Every command is a process of its own in which a data function, a library and compiled code print at every stage. The
processes are forked from one that has imported the libraries, so that all of them together take seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from command_line import error_document, one_sentence, perceptron, samples, without_notes
from conftest import ROOT
from onnx import numpy_helper
from safetensors.numpy import save_file

from onnx_oamip.cli import cli, main

STEPS = {
    "inspect": "model.onnx",
    "prune": "model.onnx --data DATA --macs 0.5 --force -o out.onnx --keep-map keep.safetensors",
    "score": "model.onnx --data DATA --importance oamip -o scores.npz",
    "plan": "model.onnx --data DATA --macs 0.5 -o plan.json",
    "apply": "model.onnx --data DATA --plan plan.json --force -o applied.onnx",
    "checkpoint": "--keep-map keep.safetensors --state-dict weights.safetensors -o cut.safetensors",
    "frontier": "model.onnx --data DATA --levels 0.5 -o frontier.json",
    "verify": "model.onnx out.onnx --data DATA",
    "bench": "model.onnx --data DATA --seconds 0.1 --threads 1",
    "pack": "model.onnx -o model.oamip",
    "unpack": "model.oamip -o unpacked.onnx",
    "ops": "",
    "solvers": "",
    "config": "",
    "doctor": "",
    "profile": "model.onnx -o table.json --seconds 0.1",
    "int8": "out.onnx --data DATA -o int8.onnx",
    "run": "stages.toml",
    "compare": "stages/prune.json stages/prune.json -o compare.html",
}
"""Arguments of every command; a later one may read what an earlier one has written."""
if importlib.util.find_spec("torch"):
    STEPS["recover"] = "out.onnx --original model.onnx --data DATA --recover 20 -o recovered.onnx"


def _with_option(name: str) -> list[str]:
    return [
        c
        for c in STEPS
        if c in cli.commands and any(name in p.opts for p in cli.commands[c].params)
    ]


QUIET = _with_option("--quiet")
SOLVER = _with_option("--solver")
SOLVED = ("prune", "score")
"""Commands that run with HiGHS too: budget programs and importance programs, which the others solve likewise."""
STAGES = """
model = "model.onnx"
data = "data.npz"
folder = "stages"

[prune]
macs = 0.5
force = true

[check]
seconds = 0.1
"""
LICENCE = "TYPE=ACADEMIC\nVERSION=13\nHOSTNAME=other\nHOSTID=deadbeef\nUSERNAME=u\nSOCKETS=1\nKEY=A\nCKEY=A\n"
LICENCES = {
    "missing": (None, "Unable to open Gurobi license file"),
    "expired": (f"{LICENCE}EXPIRATION=2020-01-01\n", "License expired 2020-01-01"),
    "of another host": (f"{LICENCE}EXPIRATION=2099-01-01\n", "HostID mismatch"),
}
"""The content of a Gurobi licence file, and what Gurobi answers to it."""

NOISY = '''
import atexit, os, sys
import numpy as np

WORD = "NOISE"

def speak():
    """Prints as Python code, compiled code and a child process do."""
    print(WORD, "of Python")
    print(WORD, "of Python on the original stream", file=sys.__stdout__, flush=True)
    os.write(1, f"{WORD} of descriptor 1\\n".encode())
    os.system(f"echo {WORD} of a child process")
    if os.name == "posix":
        import ctypes
        # In C's buffer until the process ends, unless stdout is a terminal.
        ctypes.CDLL(None).printf(f"{WORD} of compiled code\\n".encode())

def feeds():
    speak()
    for row in np.load("data.npz")["input"].reshape(-1, 2, 6):
        yield {"input": row}
'''
DRIVER = """
import gc, json, os, pkgutil, sys
from contextlib import suppress
from importlib import import_module

import onnx_oamip

others = ("recovery", "integrations", "executors.cluster")  # large packages that few commands import
package = [found.name for found in pkgutil.walk_packages(onnx_oamip.__path__, "onnx_oamip.")]
package = [name for name in package if not name.startswith(tuple(f"onnx_oamip.{other}" for other in others))]
for name in ("gurobipy", "highspy", "onnxruntime", "scipy.optimize", "scipy.interpolate", *package):
    with suppress(ImportError):
        import_module(name)
import atexit, ctypes, noisy
from onnx_oamip.api import proof
from onnx_oamip.cli import main
from onnx_oamip.reporting import documents
from onnx_oamip.verification import latency
from onnx_oamip.verification.latency import Ratio

proof.compare_latency = lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9)
latency.STEP_SECONDS = 0.01  # every fork would measure the step of widths again
gc.freeze()  # no process searches what all of them share for cycles
codes = []
for number, run in enumerate(json.load(sys.stdin)):
    pid = os.fork()  # before any session: nothing here has threads yet
    if not pid:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        if run["noise"]:
            dumps = documents.dumps
            documents.dumps = lambda document: (noisy.speak(), dumps(document))[1]
            atexit.register(noisy.speak)
        os.environ.update(run["environment"])
        sys.argv = ["onnx-oamip", *run["arguments"]]
        code = main()
        # As at the end of Python, but without taking apart what all processes share page by page.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its weights, samples, a data function that prints, and licences of Gurobi."""
    here: Path = tmp_path_factory.mktemp("stdout")
    perceptron(here / "model.onnx", hidden=6)
    weights = onnx.load(here / "model.onnx").graph.initializer
    save_file({t.name: numpy_helper.to_array(t) for t in weights}, here / "weights.safetensors")
    np.savez(here / "data.npz", input=samples(40))
    (here / "noisy.py").write_text(NOISY)
    (here / "stages.toml").write_text(STAGES)
    for name, (content, _) in LICENCES.items():
        if content is not None:
            (here / f"{name}.lic").write_text(content)
    return here


def _environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _runs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run by its name, in an order in which each finds what it reads."""

    def run(
        command: str, *more: str, noise: bool = True, licence: str | None = None
    ) -> dict[str, Any]:
        given = STEPS[command].replace("DATA", "noisy:feeds" if noise else "data.npz").split()
        environment = (
            {} if licence is None else {"GRB_LICENSE_FILE": str(folder / f"{licence}.lic")}
        )
        return {"arguments": [command, *given, *more], "noise": noise, "environment": environment}

    for command in STEPS:
        yield f"{command} --json", run(command, "--json")
    for command in QUIET:
        yield f"{command} -q", run(command, "-q", noise=False)
    for command in SOLVED:
        yield f"{command} --json, highs", run(command, "--json", "--solver", "highs")
        yield f"{command} -q, highs", run(command, "-q", "--solver", "highs", noise=False)
    yield "prune -q, noise", run("prune", "-q")
    for licence in LICENCES:
        yield f"auto, {licence}", run("prune", "--json", licence=licence)
        yield (
            f"gurobi, {licence}",
            run("prune", "--json", "--solver", "gurobi", noise=False, licence=licence),
        )
        yield f"-q, {licence}", run("prune", "-q", noise=False, licence=licence)


@pytest.fixture(scope="module")
def answers(folder: Path) -> Mapping[str, Answer]:
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked as POSIX has it")
    runs = dict(_runs(folder))
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(list(runs.values())),
        cwd=folder,
        env=_environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    codes = json.loads(driver.stdout)
    texts = (
        [(folder / f"{number}.{name}").read_text() for name in ("out", "err")]
        for number in range(len(codes))
    )
    return {name: Answer(code, *text) for name, code, text in zip(runs, codes, texts, strict=True)}


# ------------------------------------------------------------------------------------------------- every command


def test_stdout_tests_cover_every_command() -> None:
    # Without torch, the command that needs it can only be refused.
    assert {*STEPS, "recover"} == set(cli.commands)
    assert set(QUIET) >= {
        "prune",
        "score",
        "plan",
        "apply",
        "checkpoint",
        "frontier",
        "pack",
        "unpack",
    }
    assert set(SOLVER) >= {"prune", "score", "plan", "frontier"} > set(SOLVED)


@pytest.mark.parametrize(
    "run", [f"{c} --json" for c in STEPS] + [f"{c} --json, highs" for c in SOLVED]
)
def test_json_document_is_all_of_stdout(answers: Mapping[str, Answer], run: str) -> None:
    answer = answers[run]
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["schema_version"] == 1
    for writer in (
        "Python",
        "Python on the original stream",
        "descriptor 1",
        "a child process",
        "compiled code",
    ):
        assert f"NOISE of {writer}\n" in answer.err
    assert all(line.startswith("NOISE ") for line in without_notes(answer.err).splitlines())


@pytest.mark.parametrize("run", [f"{c} -q" for c in QUIET] + [f"{c} -q, highs" for c in SOLVED])
def test_quiet_leaves_stdout_and_stderr_empty(answers: Mapping[str, Answer], run: str) -> None:
    assert answers[run] == Answer(0, "", "")


def test_quiet_leaves_what_a_data_function_prints_on_stderr(answers: Mapping[str, Answer]) -> None:
    answer = answers["prune -q, noise"]
    assert (answer.code, answer.out) == (0, "")
    assert "NOISE of Python\n" in answer.err


# ------------------------------------------------------------------------------------------- licences of Gurobi


@pytest.fixture
def gurobi() -> None:
    if importlib.util.find_spec("gurobipy") is None:
        pytest.skip("gurobipy is not installed")


@pytest.mark.parametrize("licence", LICENCES)
def test_auto_solver_is_highs_without_a_valid_licence(
    answers: Mapping[str, Answer], gurobi: None, licence: str
) -> None:
    answer = answers[f"auto, {licence}"]
    assert answer.code == 0, answer.err
    programs = json.loads(answer.out)["programs"]
    assert programs
    for program in programs:
        assert program["solver"] == "highs"
        assert program["reason"].startswith("gurobi has no usable licence")
        assert LICENCES[licence][1] in program["reason"]
    assert answers[f"-q, {licence}"] == Answer(0, "", "")


@pytest.mark.parametrize("licence", LICENCES)
def test_gurobi_without_a_valid_licence_is_an_error(
    answers: Mapping[str, Answer], gurobi: None, licence: str
) -> None:
    answer = answers[f"gurobi, {licence}"]
    document = error_document(answer)
    assert answer.code == document["status"] == 2
    one_sentence(answer)
    assert LICENCES[licence][1] in document["error"]
    assert "--solver highs" in document["hint"]


# ---------------------------------------------------------------------------------------- streams of the process


def _program(folder: Path, *arguments: str, shell: str = "") -> Answer:
    """The program in a fresh process, without a fork; ``shell`` redirects its streams."""
    command = [sys.executable, "-m", "onnx_oamip", *arguments]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    done = subprocess.run(
        command, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def test_fresh_process_reserves_stdout_for_the_document(folder: Path) -> None:
    given = STEPS["plan"].replace("DATA", "noisy:feeds").split()
    answer = _program(folder, "plan", *given, "--align", "1", "--json", "--solver", "highs")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["programs"][-1]["solver"] == "highs"
    assert "NOISE of descriptor 1\n" in answer.err


def test_help_and_version_are_on_stdout(folder: Path) -> None:
    for words in (["--help"], ["prune", "--help"], ["--version"]):
        answer = _program(folder, *words)
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.startswith(("Usage: onnx-oamip", "onnx-oamip, version"))


@pytest.mark.skipif(os.name != "posix", reason="streams are closed as a POSIX shell does")
@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_prints_reach_no_file_if_a_stream_is_closed(folder: Path, shell: str) -> None:
    """A file would get the number of the closed stream, and everything that is printed."""
    given = [
        "model.onnx",
        "--data",
        "noisy:feeds",
        "--params",
        "0.5",
        "--importance",
        "l2",
        "--align",
        "1",
        "--refit",
        "bias",
    ]
    answer = _program(folder, "plan", *given, "--json", "-o", "closed.json", shell=shell)
    assert answer.code == 0, answer.err
    assert "NOISE" not in (folder / "closed.json").read_text()
    if ">&-" in shell.replace("2>&-", ""):
        assert answer.out == ""
    else:
        assert json.loads(answer.out)["schema_version"] == 1


@pytest.mark.skipif(os.name != "posix", reason="pipes are closed as a POSIX shell does")
@pytest.mark.parametrize(
    ("words", "redirection", "expected"),
    [
        ("ops --json", "> gone", 141),
        ("--help", "> gone", 141),
        ("inspect missing.onnx", "2> gone", 2),
        ("inspect missing.onnx --json", "> gone 2> gone", 2),
    ],
)
def test_reader_that_goes_away_ends_the_program_as_a_signal_would(
    folder: Path, words: str, redirection: str, expected: int
) -> None:
    """The reader opens the pipe and closes it without reading; errors of the command keep their status."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "onnx_oamip", *words.split()]
    done = subprocess.run(
        command,
        cwd=folder,
        env=_environment(folder),
        stdout=write_end if "> gone" in redirection.replace("2> gone", "") else subprocess.PIPE,
        stderr=write_end if "2> gone" in redirection else subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert done.returncode == expected
    assert not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_unwritable_document_is_an_error(folder: Path) -> None:
    answer = _program(folder, "ops", "--json", shell="> /dev/full")
    assert answer.code == 2
    one_sentence(answer)
    assert "No space left on device" in answer.err


# ------------------------------------------------------------------------------------------ calls from Python


def test_call_from_python_keeps_prints_out_of_the_document(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "talking.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    print('NOISE of Python')\n"
        "    yield {'input': np.ones((8, 6), np.float32)}\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    given = [
        "plan",
        "model.onnx",
        "--data",
        "talking:feeds",
        "--params",
        "0.5",
        "--importance",
        "l2",
    ]
    before = os.fstat(1).st_ino, sys.stdout
    assert main([*given, "-o", "called.json", "--json"]) == 0
    assert (os.fstat(1).st_ino, sys.stdout) == before
    out, err = capfd.readouterr()
    assert json.loads(out)["schema_version"] == 1
    assert set(without_notes(err).splitlines()) == {"NOISE of Python"}


def test_document_goes_to_the_stdout_of_the_caller() -> None:
    result = CliRunner().invoke(cli, ["ops", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["schema_version"] == 1
