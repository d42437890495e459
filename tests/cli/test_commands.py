"""The command line as a user meets it: help, documents, exit codes, one sentence per failure."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
import onnx
import pytest
from command_line import (
    Result,
    error_document,
    one_sentence,
    perceptron,
    samples,
    without_notes,
)
from conftest import ROOT
from graphs import build
from safetensors.numpy import load_file, save_file

from onnx_oamip.cli import cli, main
from onnx_oamip.core.errors import BudgetNotMet, EnvironmentMissing
from onnx_oamip.core.settings import Settings

COMMANDS = (
    "inspect",
    "prune",
    "score",
    "plan",
    "apply",
    "recover",
    "checkpoint",
    "frontier",
    "verify",
    "bench",
    "pack",
    "unpack",
    "ops",
    "solvers",
    "config",
)
SIDES = ("macs", "params", "bytes")
PRUNE_KEYS = {
    "schema_version",
    "model",
    "output",
    "before",
    "after",
    "budget",
    "groups",
    "skipped",
    "programs",
    "fits",
    "connections",
    "verification",
    "timings",
    "settings",
    "versions",
}
VERIFICATION_KEYS = {
    "masked_equivalence",
    "rounding",
    "output_relative_error",
    "agreement",
    "accuracy_before",
    "accuracy_after",
    "latency_ratio",
}


def documented_keys() -> set[str]:
    """Top-level keys of prune's document, from the table in docs/."""
    page = (ROOT / "docs" / "reference" / "json.md").read_text(encoding="utf-8")
    table = page.split("Keys of `prune`:")[1].split("\n\n")[1]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with model.onnx and data.npz in it."""
    monkeypatch.chdir(tmp_path)
    perceptron(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", input=samples(40), labels=np.arange(40) % 4)
    return tmp_path


BASE = ("prune", "model.onnx", "--data", "data.npz", "-o", "out.onnx", "--force")
"""``--force``: so small a network is as fast when it is half, and a test is not about that."""
PRUNE = (*BASE, "--macs", "0.5")
VERSIONS = {
    "onnx_oamip",
    "onnx",
    "onnxruntime",
    "numpy",
    "python",
    "onnx_graphsurgeon",
    "gurobipy",
    "highspy",
    "pyscipopt",
}


# ------------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert "Usage: onnx-oamip" in result.out
    assert cli.commands[command].help
    for parameter in cli.commands[command].params:
        if parameter.param_type_name == "option":
            words = parameter.get_help_record(
                cli.make_context("onnx-oamip", [command], resilient_parsing=True)
            )[1]
            assert re.match(r"[A-Z].*[.\]]$", words, re.DOTALL), parameter.name


def test_help_lists_the_commands_without_heavy_imports() -> None:
    code = (
        "import sys; from onnx_oamip.cli import main; main(['--help']);"
        "print([m for m in ('numpy', 'onnx', 'scipy', 'pydantic', 'rich', 'onnxruntime') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout.splitlines()[-1] == "[]"
    assert all(re.search(rf"^  {c}  ", found.stdout, re.MULTILINE) for c in COMMANDS)


def test_missing_command_shows_help_and_exits_2(run: Run) -> None:
    result = run()
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage:")


@pytest.mark.parametrize("command", ["prune", "plan", "apply", "frontier"])
def test_help_ends_with_examples_of_existing_options(run: Run, command: str) -> None:
    shown = run(command, "--help").out.rpartition("Examples:")[2]
    examples = cli.commands[command].examples
    assert examples
    for example in examples:
        words = example.split()
        assert words[0] == "model.onnx"
        assert set(words) <= set(shown.split())
        cli.commands[command].make_context(command, words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "model.onnx", "--data", "data.npz", "--macs", "0.5", "-o", "-"),
        ("apply", "model.onnx", "--plan", "-", "-o", "out.onnx"),
        ("plan", "model.onnx", "--data", "data.npz", "--macs", "0.5", "-o", "-"),
    ],
)
def test_dash_is_no_path(run: Run, place: Path, arguments: tuple[str, ...]) -> None:
    before = sorted(place.iterdir())
    result = run(*arguments)
    assert result.code == 2
    assert "stdin and stdout hold no files here" in result.err
    assert sorted(place.iterdir()) == before


def test_few_samples_are_named_beside_the_accuracy(run: Run, place: Path) -> None:
    np.savez("one.npz", input=samples(6), labels=np.arange(6) % 4)
    result = run(
        "prune", "model.onnx", "--data", "one.npz", "--macs", "0.5", "-o", "o.onnx", "--force"
    )
    assert result.code == 0
    assert re.search(r"accuracy +\S+ % -> \S+ % of 1 sample$", result.out, re.MULTILINE)
    assert "measured on 1 sample only, where a single one counts 100 points" in result.out


def test_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "onnx_oamip", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.fullmatch(r"onnx-oamip, version \d+\.\d+\.\d+\n", found.stdout)


# ------------------------------------------------------------------------------------------------------- documents


class Pruned(NamedTuple):
    """One run of ``prune --json`` on a shipped model: its result and its two files."""

    result: Result
    model: Path
    out: Path

    @property
    def document(self) -> dict:
        return self.result.document


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    model = ROOT / "models" / "lenet300-mnist.onnx"
    data = ROOT / "models" / "mnist.npz"
    out = tmp_path_factory.mktemp("pruned") / "out.onnx"
    arguments = ["prune", model, "--data", data, "--macs", "50%", "-o", out, "--json"]
    stdout = io.StringIO()
    stderr = io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = main([str(argument) for argument in arguments])
    return Pruned(Result(code, stdout.getvalue(), stderr.getvalue()), model, out)


def test_prune_document_has_exactly_the_documented_keys(pruned: Pruned) -> None:
    assert (pruned.result.code, pruned.result.err) == (0, "")
    assert set(pruned.document) >= PRUNE_KEYS
    assert documented_keys() == set(pruned.document)
    assert pruned.document["schema_version"] == 1
    assert set(pruned.document["versions"]) == VERSIONS


def test_prune_document_names_files_by_path_and_digest(pruned: Pruned) -> None:
    for key, path in (("model", pruned.model), ("output", pruned.out)):
        assert pruned.document[key]["path"] == str(path)
        assert pruned.document[key]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_prune_document_costs_match_files_and_budget(pruned: Pruned) -> None:
    before = pruned.document["before"]
    after = pruned.document["after"]
    assert all(isinstance(costs[side], int) for costs in (before, after) for side in SIDES)
    assert before["bytes"] == pruned.model.stat().st_size
    assert after["bytes"] == pruned.out.stat().st_size
    assert 0.48 <= after["macs"] / before["macs"] <= 0.5
    assert pruned.document["budget"] == {
        "macs": 0.5,
        "params": None,
        "size": None,
        "threshold": None,
        "latency": None,
        "max_drop": None,
        "max_loss": None,
    }


def test_prune_document_lists_groups_and_skipped_axes(pruned: Pruned) -> None:
    groups = pruned.document["groups"]
    assert [(g["name"], g["units"]) for g in groups] == [("fc1.weight", 300), ("fc2.weight", 100)]
    for group in groups:
        assert set(group) == {
            "name",
            "units",
            "kept",
            "level",
            "rotated",
            "factored",
            "emptied",
            "score",
        }
        assert group["level"] == group["kept"] / group["units"]
        assert group["score"]["min"] <= group["score"]["mean"] <= group["score"]["max"]
    skipped = pruned.document["skipped"]
    axes = [{key: entry[key] for key in ("tensor", "axis", "channels")} for entry in skipped]
    assert {"tensor": "fc3.weight", "axis": 0, "channels": 10} in axes
    assert all(entry["reason"] for entry in skipped)


def test_prune_document_describes_the_budget_program(pruned: Pruned) -> None:
    program = pruned.document["programs"][-1]
    assert (program["purpose"], program["status"], program["limit"]) == ("budget", "optimal", None)
    assert program["solver"] in ("gurobi", "highs")
    assert program["reason"]
    assert program["used"].keys() == {"macs"}
    assert 0.98 <= program["used"]["macs"] <= 1


def test_prune_document_lists_refits_in_graph_order(pruned: Pruned) -> None:
    fits = pruned.document["fits"]
    assert fits
    assert [fit["node"] for fit in fits] == ["/fc2/Gemm", "/fc3/Gemm"][-len(fits) :]
    keys = {"node", "form", "rows", "unknowns", "ridge", "error_before", "error_after"}
    for fit in fits:
        assert set(fit) == keys
        assert fit["form"] in ("least squares", "least squares behind Relu")
        assert 0 <= fit["error_after"] <= fit["error_before"]
    assert any(fit["error_after"] < fit["error_before"] for fit in fits)


def test_prune_document_reports_verification(pruned: Pruned) -> None:
    verification = pruned.document["verification"]
    assert set(verification) >= VERIFICATION_KEYS
    assert verification["masked_equivalence"] <= 1e-4
    assert verification["samples"] == 2000
    assert verification["failures"] == []
    assert verification["latency_ratio"] > 0
    assert "latency_ratio" not in pruned.document
    assert 0 <= verification["accuracy_after"] <= 1
    assert verification["accuracy_after"] > verification["accuracy_before"] - 0.03


def test_prune_document_records_settings_and_timings(pruned: Pruned) -> None:
    settings = pruned.document["settings"]
    defaults = {
        "importance": "obs",
        "allocate": "mip",
        "refit": "least-squares",
        "align": "auto",
        "solver": "auto",
        "read_solutions": None,
        "write_program": None,
    }
    assert settings["macs"] == 0.5
    assert settings.items() >= defaults.items()
    timings = pruned.document["timings"]
    assert timings
    assert all(isinstance(seconds, float) for seconds in timings.values())


def test_score_writes_scores_and_states_their_method(run: Run, place: Path) -> None:
    result = run(
        "score",
        "model.onnx",
        "--data",
        "data.npz",
        "-o",
        "s.npz",
        "--importance",
        "activation",
        "--json",
    )
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert set(document) == {
        "schema_version",
        "model",
        "output",
        "mask",
        "method",
        "low",
        "groups",
        "programs",
        "objective",
        "notes",
        "timings",
        "settings",
        "versions",
    }
    assert [term["kind"] for term in document["objective"]] == ["classes"]
    assert (document["schema_version"], document["method"], document["low"]) == (
        1,
        "activation",
        0.1,
    )
    assert document["mask"] is None
    assert document["output"]["path"] == "s.npz"
    assert (
        document["output"]["sha256"] == hashlib.sha256((place / "s.npz").read_bytes()).hexdigest()
    )
    with np.load("s.npz", allow_pickle=False) as file:
        values = file["values"]
        assert str(file["model_sha256"]) == document["model"]["sha256"]
    (group,) = document["groups"]
    assert (group["name"], group["units"]) == ("first.weight", 16)
    expected = {
        "min": values.min(),
        "mean": values.mean(),
        "median": np.median(values),
        "max": values.max(),
    }
    assert group["score"] == {
        **{k: float(v) for k, v in expected.items()},
        "below": float((values < 0.1).mean()),
    }
    assert document["programs"] == []
    assert document["notes"] == [
        "scored on 32 samples; as in prune, 8 others are left for evaluation"
    ]
    assert (
        document["settings"].items()
        >= {"importance": "activation", "seed": 0, "samples": 32}.items()
    )
    assert set(document["timings"]) == {
        "load",
        "couple",
        "calibrate",
        "objective",
        "score",
        "write",
    }
    assert set(document["versions"]) == VERSIONS


def test_inspect_lists_interface_groups_and_skipped_tensors(run: Run, place: Path) -> None:
    result = run("inspect", "model.onnx", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert document["model"]["inputs"] == [
        {"name": "input", "dtype": "float32", "dims": ["batch", 6]}
    ]
    assert document["model"]["opset"] == {"ai.onnx": 17}
    assert document["cost"] == {
        "macs": 160,
        "params": 180,
        "bytes": (place / "model.onnx").stat().st_size,
    }
    (group,) = document["groups"]
    assert (group["name"], group["units"], group["consumers"]) == ("first.weight", 16, ["second"])
    assert {(a["tensor"], a["axis"]) for a in group["axes"] if a["constant"]} == {
        ("first.weight", 0),
        ("first.bias", 0),
        ("second.weight", 1),
    }
    assert {(s["tensor"], s["axis"], s["channels"]) for s in document["skipped"]} == {
        ("first.weight", 1, 6),
        ("second.weight", 0, 4),
    }


def test_verify_compares_costs_and_outputs_of_both_models(run: Run, place: Path) -> None:
    assert run(*PRUNE).code == 0
    result = run("verify", "model.onnx", "out.onnx", "--data", "data.npz", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert document["pruned"]["cost"]["macs"] <= 80 < document["original"]["cost"]["macs"] == 160
    assert document["verification"]["masked_equivalence"] is None
    assert document["verification"]["samples"] == 40
    assert document["verification"]["output_relative_error"] > 0
    (term,) = document["objective"]
    assert (term["output"], term["kind"], term["source"]) == ("logits", "classes", "labels")
    assert term["normaliser"] > 0
    assert document["notes"] == []
    same = run("verify", "model.onnx", "model.onnx", "--data", "data.npz", "--json").document[
        "verification"
    ]
    assert (same["output_relative_error"], same["agreement"]) == (0, 1)


def test_verify_of_models_with_other_outputs_exits_1(run: Run, place: Path) -> None:
    other = onnx.load("model.onnx")
    other.graph.output[0].name = other.graph.node[-1].output[0] = "elsewhere"
    onnx.save_model(other, "other.onnx")
    result = run("verify", "model.onnx", "other.onnx", "--data", "data.npz", "--json")
    assert result.code == 1
    error_document(result)
    one_sentence(result)


def test_bench_times_every_model_at_every_batch(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_oamip.verification.latency.peak_memory", lambda *_, **__: 1 << 20)
    perceptron(place / "wide.onnx", 64)
    models = ("model.onnx", "wide.onnx")
    options = (
        "--batch",
        3,
        "--batch",
        1,
        "--seconds",
        0.05,
        "--threads",
        1,
        "--device",
        "cpu",
        "--json",
    )
    result = run("bench", *models, *options)
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert set(document) == {
        "schema_version",
        "device",
        "threads",
        "batch",
        "seconds",
        "data",
        "models",
        "versions",
    }
    assert (document["device"], document["threads"], document["batch"]) == ("cpu", 1, [3, 1])
    assert (document["seconds"], document["data"]) == (0.05, None)
    assert [m["path"] for m in document["models"]] == list(models)
    assert [m["bytes"] for m in document["models"]] == [Path(m).stat().st_size for m in models]
    for model in document["models"]:
        assert [t["batch"] for t in model["timings"]] == [3, 1]
        for timing in model["timings"]:
            assert set(timing) == {
                "batch",
                "p50_ms",
                "p95_ms",
                "mean_ms",
                "throughput",
                "runs",
                "peak_bytes",
                "ratio",
            }
            assert 0 < timing["p50_ms"] <= timing["p95_ms"]
            assert timing["throughput"] == pytest.approx(timing["batch"] / timing["p50_ms"] * 1e3)
            ratio = timing["ratio"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert {t["ratio"]["median"] for t in document["models"][0]["timings"]} == {1}


def test_bench_measures_samples_of_the_data(run: Run, place: Path) -> None:
    result = run(
        "bench", "model.onnx", "--data", "data.npz", "--batch", 4, "--seconds", 0.05, "--json"
    )
    assert (result.code, result.err) == (0, "")
    assert (result.document["batch"], result.document["data"]) == ([4], "data.npz")
    (model,) = result.document["models"]
    assert model["timings"][0]["peak_bytes"] > 0


def test_bench_of_a_fixed_batch(run: Run, place: Path) -> None:
    model = onnx.load("model.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    onnx.save_model(model, "model.onnx")
    assert run("bench", "model.onnx", "--seconds", 0.05, "--json").document["batch"] == [5]
    assert run("bench", "model.onnx", "--data", "data.npz", "--seconds", 0.05, "--json").document[
        "batch"
    ] == [5]
    for data in ((), ("--data", "data.npz")):
        result = run("bench", "model.onnx", *data, "--batch", 2, "--seconds", 0.05)
        assert (result.code, result.out) == (2, "")
        one_sentence(result)
        assert "5 samples" in result.err


BENCH_MISTAKES = {
    "no model": ((), "MODEL"),
    "missing model": (("model.onnx", "other.onnx"), "other.onnx"),
    "missing data": (("model.onnx", "--data", "other.npz"), "other.npz"),
    "more than there is": (("model.onnx", "--data", "data.npz", "--batch", "64"), "40"),
    "batch of 0": (("model.onnx", "--batch", "0"), "--batch"),
    "no time": (("model.onnx", "--seconds", "0"), "--seconds"),
    "time that is NaN": (("model.onnx", "--seconds", "nan"), "--seconds"),
    "other inputs": (("model.onnx", "renamed.onnx"), "image"),
}


@pytest.mark.parametrize("mistake", BENCH_MISTAKES)
def test_bench_usage_error_is_one_sentence(run: Run, place: Path, mistake: str) -> None:
    renamed = onnx.load("model.onnx")
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "image"
    onnx.save_model(renamed, "renamed.onnx")
    arguments, word = BENCH_MISTAKES[mistake]
    result = run("bench", *arguments, "--json")
    assert result.code == 2
    error_document(result)
    one_sentence(result)
    assert word in result.err


def test_solvers_lists_every_backend_with_its_licence(run: Run) -> None:
    result = run("solvers", "--json")
    assert (result.code, result.err) == (0, "")
    found = {s["name"]: s for s in result.document["solvers"]}
    assert list(found) == ["gurobi", "highs", "scip"]
    for solver in found.values():
        assert set(solver) == {
            "name",
            "installed",
            "usable",
            "version",
            "licence",
            "variables",
            "rows",
        }
        assert solver["licence"]
    assert found["highs"]["usable"]
    assert found["highs"]["variables"] is None
    assert found["highs"]["version"] == result.document["versions"]["highspy"]


def test_ops_lists_operators_with_their_abilities(run: Run) -> None:
    result = run("ops", "--json")
    assert (result.code, result.err) == (0, "")
    table = {op["name"]: op for op in result.document["operators"]}
    assert table["Conv"]["macs"]
    assert table["Conv"]["refit"]
    assert not table["Relu"]["macs"]
    assert set(table["Relu"]) == {"name", "domain", "since", "until", "macs", "refit", "repair"}


# ---------------------------------------------------------------------------------------------------------- tables


def test_tables_fit_80_columns_and_agree_with_the_documents(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("onnx_oamip.verification.latency.peak_memory", lambda *_, **__: 1 << 20)
    pruned = run(*PRUNE, "--max-drop", 90)
    perceptron(place / "a-network-with-quite-a-long-name.onnx", 64)
    names = ("model.onnx", "out.onnx", "a-network-with-quite-a-long-name.onnx")
    found = {
        "inspect": run("inspect", "model.onnx"),
        "verify": run("verify", "model.onnx", "out.onnx", "--data", "data.npz"),
        "score": run("score", "model.onnx", "--data", "data.npz", "-o", "s.npz"),
        "bench": run(
            "bench", *names, "--seconds", 0.05, "--batch", 1, "--batch", 16, "--threads", 2
        ),
        "ops": run("ops"),
        "solvers": run("solvers"),
    }
    for result in (pruned, *found.values()):
        assert (result.code, without_notes(result.err)) == (0, "")
        assert max(map(len, without_notes(result.out).splitlines())) <= 80
    assert "note: --max-drop bounds points of accuracy of 'logits'\n" in pruned.err
    assert "model.onnx -> out.onnx" in pruned.out
    assert re.search(r"MACs +160 +\d+ +[\d.]+ % +50\.0 %", pruned.out)
    assert re.search(r"latency +[\d.]+ x as fast +[\d.]+ %", pruned.out)
    assert re.search(r"first\.weight +16 +[1-8] ", pruned.out)
    assert re.search(r"budget +(gurobi|highs) +optimal +0\.\d\d % ", pruned.out)
    assert re.search(r"nodes refitted +1 by least squares", pruned.out)
    assert re.search(r"largest drop allowed +90 points", pruned.out)
    for name in ("first.weight", "second.weight", "graph input", "graph output"):
        assert name in found["inspect"].out
    assert "same top class" in found["verify"].out
    assert re.search(r"^16 samples a run on \w+, 2 threads$", found["bench"].out, re.MULTILINE)
    assert re.search(
        r"model\.onnx +[\d.]+ +[\d.]+ +[\d,]+ +\S+ +1\.00 \(1\.00-1\.00\)", found["bench"].out
    )
    assert "model.onnx -> s.npz" in found["score"].out
    assert re.search(r"first\.weight +16 +\S+ +\S+ +\S+ +[\d.]+ %", found["score"].out)
    assert "scored by obs" in found["score"].out
    assert "ConvTranspose" in found["ops"].out
    assert re.search(r"highs +[\d.]+ +yes +any +any", found["solvers"].out)


def test_names_with_brackets_are_not_markup(run: Run, place: Path) -> None:
    model = onnx.load("model.onnx")
    for node in model.graph.node:
        node.input[:] = [n.replace("first.weight", "[red]w[/nope]") for n in node.input]
    model.graph.initializer[0].name = "[red]w[/nope]"
    onnx.save_model(model, "model.onnx")
    result = run("inspect", "model.onnx")
    assert result.code == 0
    assert "[red]w[/nope]" in result.out


def test_inspect_names_the_initialiser_of_a_folded_weight(run: Run, place: Path) -> None:
    text = """(float[n,6] x) => (float[n,2] y) <float[8,6] fc1, float[2,8] fc2> {
        t1 = Transpose<perm = [1, 0]>(fc1)
        h = MatMul(x, t1)
        r = Relu(h)
        t2 = Transpose<perm = [1, 0]>(fc2)
        y = MatMul(r, t2)
    }"""
    (place / "turned.onnx").write_bytes(build(text).SerializeToString())
    document = run("inspect", "turned.onnx", "--json").document
    assert document["folded"] == {"t1": ["fc1"], "t2": ["fc2"]}
    assert [group["name"] for group in document["groups"]] == ["t1"]
    shown = run("inspect", "turned.onnx").out
    assert "t1 (fc1)" in shown
    assert "t2 (fc2)" in shown
    assert run("inspect", "model.onnx", "--json").document["folded"] == {}


def test_inspect_states_the_sizes_that_it_assumed(run: Run, place: Path) -> None:
    text = """(float[n,1,samples] x) => (float[n,8,frames] y) <float[4,1,20] w1, float[8,4,1] w2> {
        h = Conv(x, w1)
        y = Conv(h, w2)
    }"""
    (place / "audio.onnx").write_bytes(build(text).SerializeToString())
    assert "sizes assumed: n = 1, samples = 64" in run("inspect", "audio.onnx").out
    stated = run("inspect", "audio.onnx", "--shape", "x=2x1x29")
    assert (stated.code, "sizes assumed" in stated.out) == (0, False)
    document = run("inspect", "audio.onnx", "--json", "--shape", "samples=29").document
    assert document["model"]["bindings"] == {"n": 1, "samples": 29}
    assert document["model"]["assumed"] == ["n"]
    assert document["cost"]["macs"] == 10 * (4 * 20 + 8 * 4)
    (place / "sizes.toml").write_text('shape = ["samples=39"]\n')
    from_file = run("inspect", "audio.onnx", "--json", "--config", "sizes.toml").document
    assert from_file["cost"]["macs"] == 20 * (4 * 20 + 8 * 4)


def test_plan_states_the_shape_that_apply_takes_from_it(run: Run, place: Path) -> None:
    text = """(float[n,1,samples] x) => (float[n,8,frames] y) <float[4,1,20] w1, float[8,4,1] w2> {
        h = Conv(x, w1)
        y = Conv(h, w2)
    }"""
    (place / "audio.onnx").write_bytes(build(text).SerializeToString())
    free = ("--importance", "l2", "--allocate", "uniform", "--refit", "none", "--align", 1)
    planned = run(
        "plan",
        "audio.onnx",
        "-o",
        "p.json",
        "--macs",
        0.5,
        *free,
        "--shape",
        "samples=29",
        "--json",
    )
    assert planned.document["before"]["macs"] == 1120
    applied = run("apply", "audio.onnx", "--plan", "p.json", "-o", "out.onnx", "--json", "--force")
    assert applied.document["settings"]["shape"] == ["samples=29"]
    assert applied.document["before"]["macs"] == 1120
    assert applied.document["after"]["macs"] == 560


def test_what_is_not_counted_is_noted(run: Run, place: Path) -> None:
    text = """(float[n,5] x) => (float[n,3] y, float[n,3] z) <float[5,8] w1, float[8,3] w2, float[5,3] w3> {
        h = MatMul(x, w1)
        y = MatMul(h, w2)
        m = com.microsoft.SparseToDenseMatMul(x, w3)
        z = Relu(m)
    }"""
    (place / "mixed.onnx").write_bytes(
        build(text, domains={"com.microsoft": 1}).SerializeToString()
    )
    result = run("inspect", "mixed.onnx", "--json")
    assert result.err.startswith("note: the MACs do not include 1 x com.microsoft::SparseToDense")
    (record,) = result.document["model"]["uncounted"]
    assert record["operator"] == "com.microsoft::SparseToDenseMatMul"
    assert "not in the MACs: com.microsoft::SparseToDenseMatMul (1 node)" in run(
        "inspect", "mixed.onnx"
    ).out.replace("\n", " ")


def test_output_is_plain_on_terminals_without_block_characters(place: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "onnx_oamip", *PRUNE, "--align", "1"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    assert b"######......  50.0 %" in found.stdout
    assert found.stderr == b""


def test_quiet_prints_nothing(run: Run, place: Path) -> None:
    assert run(*PRUNE, "-q") == Result(0, "", "")
    assert (place / "out.onnx").exists()
    assert run(*PRUNE, "-q", "--json").document["schema_version"] == 1


# -------------------------------------------------------------------------------------------------------- settings


def test_options_reach_the_settings(run: Run, place: Path) -> None:
    options = (
        "--params 0.9 --size 95% --latency 100% --latency-table t.csv --max-drop 99 --importance l2 "
        "--allocate mip --effort high --rotate none --empty none --factor auto "
        "--refit none --align 4 "
        "--floor 10% --exclude second --solver highs --time-limit 5 --workers 1 --device cpu --seed 3 --batch-size 8 "
        "--op-library a.so --op-library b.so "
        "--scheduler tcp://host:1 "
        "--mode joint --formulation paper --loss-weight 2 --score-budget 40% --relax --images-per-class 3 "
        "--cache off --shape x=1x2 --shape n=3 "
        "--image-size 24x32 --image-fit pad --image-scale 0.5 --image-mean 1,2,3 --image-std 4 "
        "--image-layout nhwc --image-color bgr --samples 99 --column c "
        "--alpha 0.9 --signal paper --granularity connection --iterations 2 --sparse "
        "--phi exp_weight --score-time 7 --limits snacs --protect 20% --strict --max-memory 2GB --no-provenance "
        "--task classes --output a=values:2 --output b=c=ignore --metric m:f --recover 30s --augment none"
    )
    expected = {
        "macs": 0.5,
        "params": 0.9,
        "size": 0.95,
        "threshold": None,
        "latency": 1.0,
        "max_drop": 99.0,
        "max_loss": None,
        "task": "classes",
        "outputs": {"a": "values:2", "b=c": "ignore"},
        "metric": "m:f",
        "importance": "l2",
        "draws": 1,
        "allocate": "mip",
        "effort": "high",
        "rotate": "none",
        "empty": "none",
        "factor": "auto",
        "refit": "none",
        "recover": "30s",
        "augment": "none",
        "align": 4,
        "latency_table": "t.csv",
        "floor": 0.1,
        "exclude": ("second",),
        "solver": "highs",
        "read_solutions": None,
        "write_program": None,
        "time_limit": 5.0,
        "workers": 1,
        "force": True,
        "device": "cpu",
        "op_library": ("a.so", "b.so"),
        "seed": 3,
        "batch_size": 8,
        "scheduler": "tcp://host:1",
        "mode": "joint",
        "formulation": "paper",
        "loss_weight": 2.0,
        "score_budget": 0.4,
        "relax": True,
        "images_per_class": 3,
        "cache": "off",
        "shape": ("x=1x2", "n=3"),
        "image_size": (24, 32),
        "image_fit": "pad",
        "image_scale": 0.5,
        "image_mean": (1.0, 2.0, 3.0),
        "image_std": (4.0,),
        "image_layout": "nhwc",
        "image_color": "bgr",
        "samples": 99,
        "column": "c",
        "alpha": 0.9,
        "signal": "paper",
        "granularity": "connection",
        "iterations": 2,
        "sparse": True,
        "phi": "exp_weight",
        "score_time": 7.0,
        "limits": "snacs",
        "protect": 0.2,
        "strict": True,
        "max_memory": 2 << 30,
        "no_provenance": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "onnx_oamip.api.pipeline.prune", lambda *a, **_: seen.append(a[3]) or refuse()
        )
        seen: list[Settings] = []
        assert run(*PRUNE, *options.split()).code == 1
    assert [s.model_dump() for s in seen] == [expected]


def refuse() -> None:
    raise BudgetNotMet("this is a test.")


def test_settings_reach_the_result(run: Run, place: Path) -> None:
    document = run(
        *PRUNE, "--json", "--align", 4, "--floor", "50%", "--solver", "highs", "--device", "cpu"
    ).document
    assert document["groups"][0]["kept"] == 8
    assert document["programs"][-1]["solver"] == "highs"
    expected = {
        "macs": 0.5,
        "align": 4,
        "floor": 0.5,
        "solver": "highs",
        "read_solutions": None,
        "write_program": None,
        "device": "cpu",
        "workers": None,
    }
    assert document["settings"].items() >= expected.items()


@pytest.mark.parametrize("allocate", ["uniform", "global"])
@pytest.mark.parametrize("refit", ["none", "bias", "least-squares"])
def test_other_allocations_and_refits(run: Run, place: Path, allocate: str, refit: str) -> None:
    document = run(
        *PRUNE, "--json", "--allocate", allocate, "--refit", refit, "--align", 1
    ).document
    assert (document["programs"], document["allocation"]) == ([], allocate)
    assert document["groups"][0]["kept"] == 8
    compared = document["compared"]
    assert bool(compared) == (refit != "none")
    is_better = bool(compared) and compared["refit"] <= compared["none"]
    assert bool(document["fits"]) == (refit == "least-squares" and is_better)


def test_plan_takes_scores_from_a_file(run: Run, place: Path) -> None:
    arguments = (
        "score",
        "model.onnx",
        "--data",
        "data.npz",
        "-o",
        "s.npz",
        "--importance",
        "l1",
        "-q",
    )
    assert run(*arguments) == Result(0, "", "")
    choices = ("--allocate", "uniform", "--align", 1, "--json")
    by_file = run(*PRUNE, *choices, "--scores", "s.npz").document
    at_once = run(*PRUNE, *choices, "--importance", "l1").document
    assert by_file["output"] == at_once["output"]
    assert by_file["importance"] == by_file["settings"]["importance"] == "l1"
    assert by_file["settings"]["scores"] == "s.npz"


def test_max_drop_alone_is_a_budget(run: Run, place: Path) -> None:
    """Random labels: what counts is that the promise holds on the samples that were measured."""
    verification = run(*BASE, "--json", "--align", 1, "--max-drop", 10).document["verification"]
    assert verification["accuracy_after"] >= verification["accuracy_before"] - 0.1


def test_every_setting_has_an_option_with_the_same_choices() -> None:
    options = {p.name: p for p in cli.commands["prune"].params}
    for name, field in Settings.model_fields.items():
        if name == "outputs":  # set by --output, which also takes the path
            assert name in options["output"].sets
            continue
        assert name in options
        if get_origin(field.annotation) is Literal:
            assert set(options[name].type.choices) == set(get_args(field.annotation))


def test_weight_scores_require_no_data(run: Run, place: Path) -> None:
    choices = (
        "--importance",
        "l1",
        "--allocate",
        "uniform",
        "--refit",
        "none",
        "--force",
        "--json",
    )
    result = run("prune", "model.onnx", "--macs", "0.5", "-o", "out.onnx", *choices)
    assert result.code == 0
    verification = result.document["verification"]
    assert verification["masked_equivalence"] <= 1e-4
    assert verification["agreement"] is None


def test_threshold_alone_is_a_budget(run: Run, place: Path) -> None:
    choices = ("--importance", "activation", "--allocate", "uniform", "--align", 1, "--json")
    scores = run(*PRUNE, *choices).document["groups"][0]["score"]
    arguments = (*BASE, *choices, "--threshold")
    assert run(*arguments, scores["min"]).document["groups"][0]["kept"] == 16
    assert 0 < run(*arguments, scores["mean"]).document["groups"][0]["kept"] < 16


def test_evaluation_option_replaces_held_out_samples(run: Run, place: Path) -> None:
    assert run(*PRUNE, "--json").document["verification"]["samples"] == 8
    np.savez("held.npz", input=samples(12), labels=np.zeros(12, np.int64))
    assert (
        run(*PRUNE, "--json", "--eval-data", "held.npz").document["verification"]["samples"] == 12
    )


def test_feeds_of_a_function_are_samples(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("feeds_for_a_test.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for i in range(6):\n"
        "        yield {'input': np.full((2, 6), i, np.float32)}\n"
    )
    monkeypatch.syspath_prepend(str(place))
    result = run(*PRUNE, "--data", "feeds_for_a_test:feeds", "--json")
    assert (result.code, without_notes(result.err)) == (0, "")


# -------------------------------------------------------------------------------------------------------- failures


def not_onnx() -> None:
    Path("model.onnx").write_text("this is a letter, not a network\n" * 20)


def truncated() -> None:
    whole = Path("model.onnx").read_bytes()
    Path("model.onnx").write_bytes(whole[: len(whole) // 2])


def data(**arrays: object) -> Callable[[], None]:
    return lambda: np.savez("data.npz", **arrays)


def with_nan() -> None:
    values = samples(8)
    values[5, 2] = np.nan
    np.savez("data.npz", input=values)


MISTAKES: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    "missing model": (lambda: Path("model.onnx").unlink(), (), "no such file"),
    "model is a folder": (
        lambda: (Path("model.onnx").unlink(), Path("model.onnx").mkdir()),
        (),
        "folder",
    ),
    "empty model": (lambda: Path("model.onnx").write_bytes(b""), (), "not an ONNX model"),
    "not an ONNX model": (not_onnx, (), "not an ONNX model"),
    "truncated model": (truncated, (), "truncated"),
    "missing data": (lambda: Path("data.npz").unlink(), (), "no such data file"),
    "data is no archive": (
        lambda: Path("data.npz").write_bytes(b"PK, but no archive"),
        (),
        "numpy",
    ),
    "names do not match": (data(image=samples(8)), (), "'input'"),
    "an array too many": (data(input=samples(8), weights=samples(8)), (), "'weights'"),
    "wrong type": (data(input=samples(8).astype(np.float64)), (), "float64"),
    "codes without a scale": (data(input=np.ones((8, 6), np.uint8)), (), "input.scale"),
    "wrong rank": (data(input=samples(8).reshape(-1)), (), "(48,)"),
    "wrong width": (data(input=samples(8, 7)), (), "(8, 7)"),
    "NaN in the data": (with_nan, (), "sample 5"),
    "empty data": (data(input=samples(0)), (), "no samples"),
    "labels do not match": (data(input=samples(8), labels=np.zeros(7, np.int64)), (), "labels"),
    "no such function": (lambda: None, ("--data", "json:feeds"), "feeds"),
    "budget of 0": (lambda: None, ("--macs", "0"), "--macs"),
    "budget of 0 %": (lambda: None, ("--params", "0%"), "--params"),
    "budget above 1": (lambda: None, ("--macs", "1.5"), "--macs"),
    "budget above 100 %": (lambda: None, ("--size", "101%"), "--size"),
    "budget that is no number": (lambda: None, ("--macs", "half"), "--macs"),
    "budget that is NaN": (lambda: None, ("--macs", "nan"), "--macs"),
    "threshold that is NaN": (lambda: None, ("--threshold", "nan"), "--threshold"),
    "unknown importance": (lambda: None, ("--importance", "luck"), "activation"),
    "pattern without a match": (lambda: None, ("--exclude", "third*"), "third*"),
    "alignment of 0": (lambda: None, ("--align", "0"), "--align"),
    "alignment that is no number": (lambda: None, ("--align", "some"), "--align"),
    "floor above 1": (lambda: None, ("--floor", "1.01"), "--floor"),
    "floor below 0": (lambda: None, ("--floor=-5%",), "--floor"),
    "drop below 0": (lambda: None, ("--max-drop=-1",), "--max-drop"),
    "drop of 100 points": (lambda: None, ("--max-drop", "100"), "--max-drop"),
    "drop that is NaN": (lambda: None, ("--max-drop", "nan"), "--max-drop"),
    "latency of 0": (lambda: None, ("--latency", "0"), "--latency"),
    "latency without the program": (
        lambda: None,
        ("--latency", "0.5", "--allocate", "uniform"),
        "--allocate mip",
    ),
    "unknown solver": (lambda: None, ("--solver", "cplex"), "'highs'"),
    "no time": (lambda: None, ("--time-limit", "0"), "--time-limit"),
    "time that is NaN": (lambda: None, ("--time-limit", "nan"), "--time-limit"),
    "no workers": (lambda: None, ("--workers", "0"), "--workers"),
    "output folder missing": (lambda: None, ("-o", "nowhere/out.onnx"), "nowhere"),
    "output is a folder": (lambda: Path("made").mkdir(), ("-o", "made"), "made"),
    "output is the model": (lambda: None, ("-o", "./model.onnx"), "model.onnx"),
    "output is the data": (lambda: None, ("-o", "./data.npz"), "data.npz"),
    "unknown option": (lambda: None, ("--mac", "0.5"), "--mac"),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if "__pycache__" not in p.parts
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_prune_usage_error_is_one_sentence_and_writes_nothing(
    run: Run, place: Path, mistake: str
) -> None:
    make, options, word = MISTAKES[mistake]
    make()
    before = contents(place)
    result = run(*PRUNE, "--json", *options)
    assert result.code == 2
    error_document(result)
    one_sentence(result)
    assert word in result.err
    assert contents(place) == before


def other_scores() -> None:
    perceptron(Path("other.onnx"), 12)
    assert main(["score", "other.onnx", "--importance", "l2", "-o", "s.npz", "-q"]) == 0
    Path("other.onnx").unlink()


SCORES_MISTAKES: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    "missing": (lambda: None, (), "no such file of scores"),
    "a folder": (lambda: Path("s.npz").mkdir(), (), "folder"),
    "no archive": (lambda: Path("s.npz").write_text("0.1 0.2"), (), "cannot be read as scores"),
    "pickled": (
        lambda: Path("s.npz").write_bytes(pickle.dumps([0.1, 0.2])),
        (),
        "cannot be read as scores",
    ),
    "data": (lambda: np.savez("s.npz", input=samples(8)), (), "schema_version"),
    "another model": (other_scores, (), "sha256"),
    "two ways to score": (lambda: None, ("--importance", "obs"), "--importance"),
    "two paths": (lambda: Path("s.npz").touch(), ("-o", "./s.npz"), "two paths"),
    "no kind": (lambda: Path("s.npz").touch(), ("--output", "y=values:0"), "weight above 0"),
    "two kinds": (
        lambda: Path("s.npz").touch(),
        ("--output", "y=values", "--output", "y=classes"),
        "'y=classes' contradicts 'y=values'",
    ),
}


@pytest.mark.parametrize("mistake", SCORES_MISTAKES)
def test_scores_usage_error_is_one_sentence_and_writes_nothing(
    run: Run, place: Path, mistake: str
) -> None:
    make, options, word = SCORES_MISTAKES[mistake]
    make()
    before = contents(place)
    result = run(*PRUNE, "--scores", "s.npz", "--json", *options)
    assert result.code == 2
    error_document(result)
    one_sentence(result)
    assert word in result.err
    assert contents(place) == before


def test_scores_are_not_written_over(run: Run, place: Path) -> None:
    (place / "s.npz").touch()
    options = ("--macs", "0.5", "--scores", "s.npz", "-o", "./s.npz")
    result = run("prune", "model.onnx", "--data", "data.npz", *options)
    assert (result.code, result.out) == (2, "")
    one_sentence(result)
    assert "--scores" in result.err


OAMIP_MASK = ("--importance", "oamip", "--save-mask", "k.safetensors")
SCORE_MISTAKES: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    "missing model": (lambda: Path("model.onnx").unlink(), (), "no such file"),
    "missing data": (lambda: Path("data.npz").unlink(), (), "no such data file"),
    "NaN in the data": (with_nan, (), "sample 5"),
    "unknown importance": (lambda: None, ("--importance", "luck"), "activation"),
    "pattern without a match": (lambda: None, ("--exclude", "third*"), "third*"),
    "output folder missing": (lambda: None, ("-o", "nowhere/s.npz"), "nowhere"),
    "output is a folder": (lambda: Path("made").mkdir(), ("-o", "made"), "made"),
    "output is the model": (lambda: None, ("-o", "./model.onnx"), "model.onnx"),
    "output is the data": (lambda: None, ("-o", "./data.npz"), "data.npz"),
    "a budget": (lambda: None, ("--macs", "0.5"), "--macs"),
    "mask of other scores": (lambda: None, ("--save-mask", "k.safetensors"), "--importance oamip"),
    "mask of decoupled scores": (lambda: None, (*OAMIP_MASK, "--mode", "decoupled"), "joint"),
    "threshold over 1": (lambda: None, (*OAMIP_MASK, "--mask-threshold", "2"), "--mask-threshold"),
    "mask over the model": (lambda: None, (*OAMIP_MASK[:-1], "./model.onnx"), "--save-mask"),
    "mask over the scores": (lambda: None, (*OAMIP_MASK[:-1], "./s.npz"), "s.npz"),
}


@pytest.mark.parametrize("mistake", SCORE_MISTAKES)
def test_score_usage_error_is_one_sentence_and_writes_nothing(
    run: Run, place: Path, mistake: str
) -> None:
    make, options, word = SCORE_MISTAKES[mistake]
    make()
    before = contents(place)
    result = run("score", "model.onnx", "--data", "data.npz", "-o", "s.npz", "--json", *options)
    assert result.code == 2
    error_document(result)
    one_sentence(result)
    assert word in result.err
    assert contents(place) == before


def test_saved_mask_cuts_initial_weights_to_the_units_above_the_threshold(
    run: Run, place: Path
) -> None:
    """A lottery ticket: the mask of the trained network on weights of the same names and other content."""
    joint = ("--mode", "joint", "--formulation", "paper", "--refit", "none")
    command = ("score", "model.onnx", "--data", "data.npz", "-o", "s.npz", *OAMIP_MASK, *joint)
    mask = run(*command, "--mask-threshold", "0.3", "--json").document["mask"]
    with np.load("s.npz") as scores:
        keep = scores["values"] >= 0.3
    assert 0 < keep.sum() < len(keep)
    digest = hashlib.sha256(Path("k.safetensors").read_bytes()).hexdigest()
    expected = {"path": "k.safetensors", "sha256": digest, "threshold": 0.3, "kept": keep.sum()}
    assert mask == expected
    rng = np.random.default_rng(0)
    initial = {
        tensor.name: rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
        for tensor in onnx.load("model.onnx").graph.initializer
    }
    save_file(initial, "initial.safetensors")
    files = ("--keep-map", "k.safetensors", "--state-dict", "initial.safetensors")
    assert run("checkpoint", *files, "-o", "ticket.safetensors", "-q").code == 0
    ticket = load_file("ticket.safetensors")
    np.testing.assert_array_equal(ticket["first.weight"], initial["first.weight"][keep])
    np.testing.assert_array_equal(ticket["second.weight"], initial["second.weight"][:, keep])
    shown = run(*command, "--mask-threshold", "0.3").out
    assert f"mask: {keep.sum()} of 16 units reach 0.3 -> k.safetensors" in shown


def test_score_without_data_or_output_names_the_missing_option(run: Run, place: Path) -> None:
    for arguments, word in ((("-o", "s.npz"), "--data"), (("--data", "data.npz"), "--output")):
        result = run("score", "model.onnx", *arguments)
        assert (result.code, result.out) == (2, "")
        one_sentence(result)
        assert word in result.err
    assert (
        run("score", "model.onnx", "--data", "data.npz", "--exclude", "first*", "-o", "s.npz").code
        == 1
    )
    assert not (place / "s.npz").exists()


def test_prune_without_budget_or_data_names_the_missing_option(run: Run, place: Path) -> None:
    for arguments, word in (
        (("prune", "model.onnx", "--data", "data.npz", "-o", "out.onnx"), "--macs"),
        (("prune", "model.onnx", "--macs", "0.5", "-o", "out.onnx"), "--data"),
        (
            ("prune", "model.onnx", "--macs", "0.5", "--importance", "obs", "-o", "out.onnx"),
            "--importance obs",
        ),
        (
            ("prune", "model.onnx", "--macs", "0.5", "--importance", "l2", "-o", "out.onnx"),
            "--allocate mip",
        ),
        (
            (
                "prune",
                "model.onnx",
                "--macs",
                "0.5",
                "--importance",
                "l2",
                "--allocate",
                "global",
                "-o",
                "out.onnx",
            ),
            "--refit least-squares",
        ),
    ):
        result = run(*arguments)
        assert (result.code, result.out) == (2, "")
        one_sentence(result)
        assert word in result.err
    assert not (place / "out.onnx").exists()


def test_cuda_device_without_cuda_is_refused(run: Run, place: Path) -> None:
    from onnx_oamip.graph.runtime import resolve_device

    try:
        resolve_device("cuda")
    except EnvironmentMissing:
        pass
    else:
        pytest.skip("CUDA works here")
    result = run(*PRUNE, "--device", "cuda")
    assert (result.code, result.out) == (2, "")
    one_sentence(result)
    assert not (place / "out.onnx").exists()


def test_missing_runtime_error_names_the_package_to_install(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run(*PRUNE)
    assert (result.code, result.out) == (2, "")
    one_sentence(result)
    assert "onnx-oamip[cpu]" in result.err


def test_unreachable_budget_exits_1_and_is_named(run: Run, place: Path) -> None:
    result = run(*PRUNE, "--macs", "0.01")
    assert (result.code, result.out) == (1, "")
    one_sentence(result)
    assert "--macs" in result.err
    assert not (place / "out.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("inspect", "missing.onnx"), 2),
        ((*PRUNE, "--macs", "0.01"), 1),
        ((*PRUNE, "--macs", "many"), 2),
        (("inspect", "--no-such-option"), 2),
    ],
)
def test_error_is_one_document_with_json(
    run: Run, place: Path, arguments: tuple[str, ...], status: int
) -> None:
    """Finding and way out apart; together they are the sentence on stderr."""
    result = run(*arguments, "--json")
    assert result.code == status
    one_sentence(result)
    document = error_document(result)
    assert document["status"] == status
    if "missing.onnx" in arguments:
        assert document["error"] == "missing.onnx: no such file"
        assert document["hint"] == "give the path of an .onnx model."


def test_old_output_survives_a_failure(run: Run, place: Path) -> None:
    (place / "out.onnx").write_bytes(b"old")
    assert run(*PRUNE, "--macs", "0.01").code == 1
    assert (place / "out.onnx").read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_interrupt_exits_130(place: Path) -> None:
    Path("slow_feeds.py").write_text(
        "import pathlib, time\n"
        "def feeds():\n"
        "    pathlib.Path('started').touch()\n"
        "    time.sleep(60)\n"
        "    yield {}\n"
    )
    arguments = [
        "prune",
        "model.onnx",
        "--data",
        "slow_feeds:feeds",
        "--macs",
        "0.5",
        "-o",
        "out.onnx",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "onnx_oamip", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(place)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if Path("started").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "Error: interrupted."
    assert not Path("out.onnx").exists()
