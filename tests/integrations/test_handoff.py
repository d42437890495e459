"""Consumers of a pruned model: quantisation by ONNX Runtime, the GitHub Action, the container."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from conftest import MODELS, ROOT
from graphs import RUNTIME
from onnxruntime import InferenceSession
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from onnx_oamip import Settings, load, prune
from onnx_oamip.api import proof
from onnx_oamip.cli import cli
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import EVALUATION, Samples
from onnx_oamip.verification.latency import Ratio

# ---------------------------------------------------------------------------------------------------- quantisation


class Feeds(CalibrationDataReader):
    """Samples as ONNX Runtime's calibration wants them."""

    def __init__(self, samples: Samples) -> None:
        self._feeds: Iterator[Any] = (feed for _, feed in samples.batches(32))

    def get_next(self) -> Any:
        return next(self._feeds, None)


def pruned(name: str, data_file: str, folder: Path) -> tuple[Path, Samples, Samples]:
    """A network of models/ with half of its MACs, samples to calibrate with, and samples to measure on."""
    source, out = MODELS / f"{name}.onnx", folder / f"{name}.onnx"
    settings = Settings.create(macs=0.5, importance="l2", allocate="uniform", align=4)
    model, whole = load(source), dict(np.load(MODELS / data_file))
    counts = {name: 1024 if name.startswith("eval.") else 256 for name in whole}
    few = {name: v[: counts[name]] if v.ndim else v for name, v in whole.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
        prune(source, few, out, settings)
    calibration, held = dataset.load(few, model), dataset.load(few, model, EVALUATION)
    assert calibration is not None
    assert held is not None
    return out, calibration, held


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples, Samples]:
    return pruned("lenet5-mnist", "mnist.npz", tmp_path_factory.mktemp("lenet"))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples, Samples]:
    return pruned("vit-fashion", "fashion-mnist.npz", tmp_path_factory.mktemp("vit"))


def outputs(path: Path, samples: Samples) -> np.ndarray:
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for _, feed in samples.batches(64)])


def agreement(one: Path, other: Path, samples: Samples) -> float:
    return float(np.mean(outputs(one, samples).argmax(-1) == outputs(other, samples).argmax(-1)))


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def check_quantised(before: Path, after: Path, held: Samples, least: float) -> None:
    """Every linear layer has its weight in 8 bits, as wide as it was, and the classes are those of the pruned model."""
    graph = onnx.load(before).graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    linear = {n.input[1] for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")} & set(
        shapes
    )
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    stored = {
        t.name: tuple(t.dims) for t in onnx.load(after).graph.initializer if t.data_type in integers
    }
    assert len(linear) > 1
    assert {name: stored.get(f"{name}_quantized") for name in linear} == {
        name: shapes[name] for name in linear
    }
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(after)
    assert agreement(before, after, held) >= least


def test_pruned_model_can_be_quantised_statically(
    lenet: tuple[Path, Samples, Samples], tmp_path: Path
) -> None:
    model, calibration, held = lenet
    out = tmp_path / "int8.onnx"
    quantize_static(model, out, Feeds(calibration), QuantFormat.QDQ, per_channel=True)
    check_quantised(model, out, held, 0.98)


def test_pruned_model_can_be_quantised_after_preprocessing(
    lenet: tuple[Path, Samples, Samples], tmp_path: Path
) -> None:
    pytest.importorskip("sympy", reason="quant_pre_process infers symbolic shapes with sympy")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, calibration, held = lenet
    ready, out = tmp_path / "ready.onnx", tmp_path / "int8.onnx"
    quant_pre_process(model, ready)
    assert np.allclose(outputs(ready, held), outputs(model, held), atol=1e-4)
    quantize_static(ready, out, Feeds(calibration), QuantFormat.QDQ)
    check_quantised(ready, out, held, 0.98)


def test_pruned_transformer_can_be_quantised_statically(
    transformer: tuple[Path, Samples, Samples], tmp_path: Path
) -> None:
    model, calibration, held = transformer
    out = tmp_path / "int8.onnx"
    quantize_static(model, out, Feeds(calibration), QuantFormat.QDQ, per_channel=True)
    check_quantised(model, out, held, 0.95)


def test_optimised_transformer_can_be_quantised_dynamically(
    transformer: tuple[Path, Samples, Samples], tmp_path: Path
) -> None:
    """The usual way of a transformer: ONNX Runtime's optimiser, then 8-bit weights."""
    if RUNTIME < (1, 24):
        pytest.skip(
            "this ONNX Runtime has no ConvInteger with signed weights, which its own quantiser writes"
        )
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer", exc_type=ImportError)
    model, _, held = transformer
    better, out = tmp_path / "optimised.onnx", tmp_path / "int8.onnx"
    optimizer.optimize_model(str(model), model_type="vit", opt_level=0).save_model_to_file(
        str(better)
    )
    assert np.allclose(outputs(better, held), outputs(model, held), atol=1e-3)
    # Types behind fused operators are not inferred; this is how the quantiser gets them.
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(better, out, weight_type=QuantType.QInt8, extra_options=options)
    assert any("Integer" in op or op == "QAttention" for op in operators(out))
    assert out.stat().st_size < 0.6 * better.stat().st_size
    assert agreement(model, out, held) >= 0.95


# -------------------------------------------------------------------------------------------------- GitHub Action

ACTION = ROOT / "tools" / "action"
EXPRESSION = r"\$\{\{\s*([\w.-]+)\s*\}\}"


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    return yaml.safe_load((ACTION / "action.yml").read_text(encoding="utf-8"))


def flags() -> set[str]:
    return {name for parameter in cli.commands["prune"].params for name in parameter.opts}


def step(action: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in action["runs"]["steps"] if s["name"] == name)


def run_step(
    action: dict[str, Any], folder: Path, inputs: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], Path, Path]:
    """Run the step that prunes as a runner would: expressions filled in, then bash. Gives its summary and outputs."""
    found = step(action, "Prune")
    tools = folder / "onnx-oamip" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for name, words in (
        ("onnx-oamip", f'"{sys.executable}" -m onnx_oamip'),
        ("python", f'"{sys.executable}"'),
    ):
        (tools / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (tools / name).chmod(0o755)
    values = {"runner.temp": str(folder), "github.action_path": str(ACTION)}
    for name, declared in action["inputs"].items():
        values[f"inputs.{name}"] = inputs.get(name, declared.get("default", ""))
    environment = {
        name: re.sub(EXPRESSION, lambda match: values[match[1]], text)
        for name, text in found["env"].items()
    }
    files = {"GITHUB_STEP_SUMMARY": folder / "summary.md", "GITHUB_OUTPUT": folder / "outputs"}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", found["run"]],
        env={
            **os.environ,
            "PYTHONPATH": paths,
            **environment,
            **{k: str(v) for k, v in files.items()},
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, *files.values()


def test_action_declares_inputs_outputs_and_steps(action: dict[str, Any]) -> None:
    """Names in expressions are declared and used, and no expression is inside a script."""
    text = (ACTION / "action.yml").read_text(encoding="utf-8")
    assert action["runs"]["using"] == "composite"
    assert all(
        part["description"].endswith(".")
        for kind in ("inputs", "outputs")
        for part in action[kind].values()
    )
    named = re.findall(EXPRESSION, text)
    assert text.count("${{") == len(named)
    assert {n.removeprefix("inputs.") for n in named if n.startswith("inputs.")} == set(
        action["inputs"]
    )
    assert {n for n in named if n.startswith("steps.")} == {
        f"steps.prune.outputs.{name}" for name in action["outputs"]
    }
    for part in action["runs"]["steps"]:
        assert part["shell"] == "bash"
        assert "${{" not in part["run"]
        used = set(re.findall(r"\$\{?([A-Z]+)\b", part["run"]))
        assert used == set(part["env"])
    assert set(re.findall(r"(--[a-z-]+)", step(action, "Prune")["run"])) <= flags()
    extras = re.search(r"\[([\w,]+)\]\"", step(action, "Install onnx-oamip")["run"])
    assert extras is not None
    assert all(re.search(rf"^{name} = \[", PROJECT, re.MULTILINE) for name in extras[1].split(","))


def test_action_prunes_and_reports(action: dict[str, Any], tmp_path: Path) -> None:
    inputs = {
        "model": str(MODELS / "lenet300-mnist.onnx"),
        "data": str(MODELS / "mnist.npz"),
        "budget": "--macs 0.5",
        "output": "small model.onnx",
        "arguments": "--importance l2\n--allocate global --force --cache off",
    }
    done, summary, outputs = run_step(action, tmp_path, inputs)
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(
        re.findall(
            r"^([\w-]+)<<(?:\w+)\n(.*)\n\w+$", outputs.read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    assert set(found) == set(action["outputs"])
    document = json.loads(Path(found["report"]).read_text(encoding="utf-8"))
    assert (found["model"], document["settings"]["importance"]) == ("small model.onnx", "l2")
    assert (tmp_path / found["model"]).exists()
    assert (
        float(found["macs-kept"]) == document["after"]["macs"] / document["before"]["macs"] <= 0.5
    )
    assert float(found["accuracy-after"]) == document["verification"]["accuracy_after"]
    text = summary.read_text(encoding="utf-8")
    assert (
        f"| parameters | {document['before']['params']:,} | {document['after']['params']:,} |"
        in text
    )
    assert all(group["name"] in text for group in document["groups"])


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_action_does_not_execute_text_of_its_inputs(
    each: bool, action: dict[str, Any], tmp_path: Path
) -> None:
    """All inputs at once, as the shell reads them before the program; each alone in the slow tier."""
    evil = 'a"; touch broken; "$(touch broken)`touch broken`'
    usable = {"model": "model.onnx", "data": "data.npz", "budget": "--macs 0.5"}
    for names in [[name] for name in action["inputs"]] if each else [list(action["inputs"])]:
        inputs = {**usable, **dict.fromkeys(names, evil)}
        done, summary, _ = run_step(action, tmp_path, inputs)
        assert done.returncode == 2
        assert done.stderr.startswith("Error: ")
        assert not summary.exists()
    assert not (tmp_path / "broken").exists()


# ------------------------------------------------------------------------------------------------------- container

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_dockerfile_installs_the_package() -> None:
    """Copied files exist, installed packages are declared, and it runs as a user of its own."""
    text = (
        (ROOT / "tools" / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    )
    lines = [
        line.split(maxsplit=1)
        for line in text.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    stages = [i for i, (word, _) in enumerate(lines) if word == "FROM"]
    assert stages[0] == 0
    for word, rest in lines:
        if word == "COPY" and not rest.startswith("--from="):
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras is not None
    assert all(re.search(rf"^{name} = \[", PROJECT, re.MULTILINE) for name in extras[1].split(","))
    final = lines[stages[-1] :]
    words = [word for word, _ in final]
    user = dict(final)["USER"]
    assert int(user) > 0, "a number: a cluster can see that it is not root"
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert re.search(rf"useradd .*--uid {user} ", dict(final)["RUN"])
    assert json.loads(dict(final)["ENTRYPOINT"]) == ["onnx-oamip"]
    assert 'onnx-oamip = "onnx_oamip.cli:main"' in PROJECT
    assert "ONNX_OAMIP_CACHE=" in dict(final)["ENV"]


@pytest.mark.parametrize("file", ["action/README.md", "docker/README.md"])
def test_readmes_use_existing_options_inputs_and_paths(file: str, action: dict[str, Any]) -> None:
    text = (ROOT / "tools" / file).read_text(encoding="utf-8")
    commands = re.findall(r"onnx-oamip prune (.*)$", text, re.MULTILINE)
    workflows = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    paths = re.findall(r"tools/[\w./]+\w", text)
    assert commands or workflows
    assert paths
    for line in commands:
        assert {w for w in shlex.split(line) if w.startswith("-")} <= flags()
    for block in workflows:
        given = yaml.safe_load(block)[0]["with"]
        assert set(given) <= set(action["inputs"])
        assert {n for n, declared in action["inputs"].items() if declared.get("required")} <= set(
            given
        )
        assert set(re.findall(r"steps\.prune\.outputs\.([\w-]+)", block)) <= set(action["outputs"])
        words = f"{given['budget']} {given['arguments']}".split()
        assert {w for w in words if w.startswith("-")} <= flags()
    for path in paths:
        assert (ROOT / path).exists()
