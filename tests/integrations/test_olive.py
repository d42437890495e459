"""The pass for Olive, run by Olive itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import MODELS, ROOT

from onnx_oamip.api import pipeline, proof
from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.settings import Settings
from onnx_oamip.verification.latency import Ratio

DATA_SETS = """
import numpy as np
from olive.data.registry import Registry

@Registry.register_dataset()
def digits(file, count, labelled):
    whole = np.load(file)
    images = whole["input"][:count] * whole["input.scale"]
    labels = whole["labels"][:count] if labelled else np.zeros(count, np.int64)
    return [({"input": image.astype(np.float32)}, int(label)) for image, label in zip(images, labels)]

@Registry.register_dataset()
def arrays(count):
    return [(np.zeros(3, np.float32), 0)] * count
"""


@pytest.fixture
def olive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module with the pass; nothing is sent anywhere, and latency is not what is tested."""
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    pytest.importorskip("olive.passes", reason="olive-ai is not installed", exc_type=ImportError)
    from onnx_oamip.integrations import olive

    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_sets.py").write_text(DATA_SETS)
    return olive


def workflow(options: dict[str, Any], labelled: bool = True, **more: Any) -> dict[str, Any]:
    """A workflow on LeNet-5 with one of Olive's data sets, called digits."""
    file = {"file": str(MODELS / "mnist.npz"), "count": 64, "labelled": labelled}
    sets = [
        ("digits", {"type": "digits", "params": file}),
        ("bare", {"type": "arrays", "params": {"count": 4}}),
    ]
    quick = {"importance": "l2", "allocate": "global"}
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(MODELS / "lenet5-mnist.onnx")},
        "data_configs": [
            {
                "name": name,
                "user_script": "data_sets.py",
                "load_dataset_config": config,
                "dataloader_config": {"params": {"batch_size": 24}},
            }
            for name, config in sets
        ],
        "passes": {"prune": {"type": "OnnxOamip", **quick, **options}, **more},
        "output_dir": "out",
        "cache_dir": "cache",
        "log_severity_level": 3,
    }


def run(olive: Any, flow: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Run a workflow. Gives the model it wrote, and what the pass says about it."""
    from olive.workflows import run as start

    start(flow, package_config=olive.package_config())
    config = json.loads(Path("out/model_config.json").read_text(encoding="utf-8"))["config"]
    return onnx.load(config["model_path"]), config["model_attributes"]["onnx_oamip"]


def test_pass_prunes_in_a_workflow(olive: Any) -> None:
    """The model that a direct call gives; Olive adds its version to the metadata, and no more."""
    proto, found = run(olive, workflow({"macs": 0.5, "data": str(MODELS / "mnist.npz"), "seed": 2}))
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]
    assert found["verification"]["masked_equivalence"] <= 1e-4
    assert found["verification"]["samples"] == 2000
    settings = Settings.create(macs=0.5, importance="l2", allocate="global", seed=2, device="cpu")
    pipeline.prune(MODELS / "lenet5-mnist.onnx", MODELS / "mnist.npz", "direct.onnx", settings)
    assert proto.graph == onnx.load("direct.onnx").graph


def test_workflow_on_the_page_runs(olive: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guide" / "pipelines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    flow = next(json.loads(block) for block in blocks if "OnnxOamip" in block)
    (tmp_path / "models").symlink_to(MODELS)
    flow["passes"]["prune"].update({"importance": "l2", "allocate": "global"})
    proto, found = run(olive, {**flow, "cache_dir": "cache", "log_severity_level": 3})
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]
    assert "DynamicQuantizeLinear" in {node.op_type for node in proto.graph.node}


def test_model_is_pruned_and_quantised_on_an_olive_data_set(olive: Any) -> None:
    quantise = {"type": "OnnxStaticQuantization", "data_config": "digits", "quant_format": "QDQ"}
    flow = workflow(
        {"params": 0.6, "data_config": "digits", "save_as_external_data": True}, quantise=quantise
    )
    proto, found = run(olive, flow)
    assert found["after"]["params"] <= 0.6 * found["before"]["params"]
    assert found["verification"]["accuracy_before"] is not None
    assert found["verification"]["samples"] == 12, "a fifth of 64 is held out"
    assert "DequantizeLinear" in {node.op_type for node in proto.graph.node}


def test_uninformative_labels_are_left_out(olive: Any) -> None:
    _, found = run(olive, workflow({"macs": 0.5, "data_config": "digits"}, labelled=False))
    assert found["verification"]["accuracy_before"] is None
    assert found["verification"]["agreement"] > 0.5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"macs": 0.5, "data_config": "bare"},
            DataError,
            "data_config yields no batches by input name",
        ),
        ({"macs": 0.5, "data_config": "digits", "data": "x.npz"}, SettingsError, "both given"),
        # Olive checks the types of options itself.
        ({"macs": 1.5, "data_config": "digits"}, ValueError, "less than or equal to 1"),
        ({"data_config": "digits"}, SettingsError, "nothing says how much to keep"),
    ],
)
def test_invalid_configuration_is_reported(
    olive: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(olive, workflow(options))


def test_unreachable_budget_gives_no_model(olive: Any) -> None:
    from olive.workflows import run as start

    found = start(
        workflow({"macs": 0.0001, "data_config": "digits"}), package_config=olive.package_config()
    )
    assert not found.has_output_model()
    assert not list(Path("out").glob("**/*.onnx"))


def test_options_are_the_settings_and_budgets_can_be_searched(olive: Any) -> None:
    from olive.hardware import DEFAULT_CPU_ACCELERATOR as CPU

    options = olive.OnnxOamip.default_config(CPU)
    assert set(Settings.model_fields) - {"device"} <= set(options)
    plain = olive.OnnxOamip.generate_config(
        CPU, {"macs": 0.5, "exclude": ["conv1*"], "align": 8}, disable_search=True
    )
    assert (plain.macs, plain.align, tuple(plain.exclude), plain.params) == (
        0.5,
        8,
        ("conv1*",),
        None,
    )
    defaults = Settings.create(macs=0.5, align=8, exclude=("conv1*",))
    assert {n: getattr(plain, n) for n in olive.SETTINGS if n != "exclude"} == {
        n: getattr(defaults, n) for n in olive.SETTINGS if n != "exclude"
    }
    _, fixed, searched = olive.OnnxOamip.get_config_params(CPU, {"macs": [0.7, 0.5]})
    assert searched["macs"].get_support() == [0.7, 0.5]
    assert fixed["importance"] == "obs"


def test_package_config_adds_the_pass_and_removes_nothing(olive: Any) -> None:
    from olive.package_config import OlivePackageConfig

    found = OlivePackageConfig.model_validate(json.loads(json.dumps(olive.package_config())))
    known = OlivePackageConfig.load_default_config()
    assert set(found.passes) == {*known.passes, "onnxoamip"}
    assert found.extra_dependencies == known.extra_dependencies
    assert found.import_pass_module("OnnxOamip") is olive.OnnxOamip
