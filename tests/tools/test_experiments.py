"""Published experiments: modules of the VGG with auxiliary heads, their inputs, and their tables."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tools.experiments import auxiliary, oamip_tables, page
from tools.experiments.data import Missing
from tools.experiments.protocol import AUXILIARY, QUICK, Protocol


def _two_convolutions(path: Path) -> None:
    """A 1x1 convolution by 2, a ReLU, and a 1x1 convolution by 3."""
    factors = {"w1": 2.0, "w2": 3.0}
    weights = [
        numpy_helper.from_array(np.full((1, 1, 1, 1), value, np.float32), name)
        for name, value in factors.items()
    ]
    nodes = [
        helper.make_node("Conv", ["input", "w1"], ["first"]),
        helper.make_node("Relu", ["first"], ["between"]),
        helper.make_node("Conv", ["between", "w2"], ["output"]),
    ]
    shape = ["batch", 1, 2, 2]
    value = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("input", "output")
    ]
    graph = helper.make_graph(nodes, "two", value[:1], value[1:], weights)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)


def test_module_inputs_are_what_the_convolutions_read(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    _two_convolutions(path)
    images = np.array([0, 51, 102, 255], np.uint8).reshape(1, 1, 2, 2)
    first, second = auxiliary.module_inputs(path, images)
    np.testing.assert_allclose(first.reshape(-1), [0, 0.2, 0.4, 1], rtol=1e-6)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-6)


def _record(scores: dict[str, list[float]], own: float) -> dict[str, Any]:
    """Record of one seed with a single module; all methods but the one with heads end at 80 %."""
    module = {
        "layers": scores,
        "right": 90.0,
        "gap": 0.004,
        "proven": True,
        "variables": 7,
        "seconds": 1.0,
    }
    accuracy = dict.fromkeys(auxiliary.METHODS, dict.fromkeys(auxiliary.SHOWN, 80.0))
    accuracy["auxiliary"] = dict.fromkeys(auxiliary.SHOWN, own)
    compared = {"gone": {"units": 25.0, "parameters": 40.0}, "accuracy": accuracy}
    return {
        "reference": 85.0,
        "modules": [module],
        "compared": {auxiliary.THRESHOLD: compared, auxiliary.HALF: compared},
    }


def test_tables_of_the_vgg_count_units_below_the_threshold() -> None:
    low = AUXILIARY.threshold - 0.1
    records = {
        "seed0": _record({"conv6.weight": [1.0, low], "fc7.weight": [low, low]}, 81.0),
        "seed1": _record({"conv6.weight": [1.0, 1.0], "fc7.weight": [1.0, low]}, 82.0),
    }
    text = page._auxiliary(QUICK, {"auxiliary": records})
    assert "2 of 2 programs close" in text
    assert "1 of 4 channels of convolutions and 3 of 4 dense units" in text
    assert "| conv6, fc7 | 4 | 90 | 3, 1 |" in text
    assert "+1.50 points against random" in text
    assert f"{QUICK.epochs} epochs, from 2 seeds" in text


def test_vgg_is_scored_for_every_seed_and_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(files: auxiliary.Files, data: object, seed: int, epochs: int) -> None:
        trained.append((seed, epochs))

    def run(files: auxiliary.Files, data: object, seed: int, protocol: Protocol) -> dict[str, Any]:
        return {"whole": files.whole.name, "seed": seed}

    monkeypatch.setattr(auxiliary, "train", train)
    monkeypatch.setattr(auxiliary, "run", run)
    protocol = replace(QUICK, seeds=(0, 1, 2))
    (tmp_path / auxiliary.Files.of(tmp_path, 1, QUICK.epochs).whole.name).touch()
    sets: dict[str, Any] = {auxiliary.DATA: None}
    found = oamip_tables.Run(protocol, sets, tmp_path).auxiliary()
    again = oamip_tables.Run(protocol, sets, tmp_path).auxiliary()
    assert trained == [(0, 1), (2, 1)]
    assert {name: record["seed"] for name, record in found.items()} == {
        f"vgg-fashion-seed{seed}": seed for seed in protocol.seeds
    }
    assert again == found


def test_records_of_an_earlier_run_are_read_for_the_same_protocol_only(tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"has no results\.json"):
        page.read(tmp_path, QUICK)
    saved = {"protocol": asdict(QUICK), "records": {"main": {"a": {"reference": 1.0}}}}
    (tmp_path / "results.json").write_text(json.dumps(saved))
    assert page.read(tmp_path, QUICK) == saved["records"]
    with pytest.raises(Missing, match="another protocol"):
        page.read(tmp_path, replace(QUICK, epochs=QUICK.epochs + 1))


def test_batch_normalisation_is_folded_into_the_layer_in_front_of_it() -> None:
    torch = pytest.importorskip("torch")
    from tools.experiments import greedy

    torch.manual_seed(0)
    modules = greedy.build((3, 4, 5))
    images = torch.rand(8, 1, 28, 28)
    modules.train()
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    greedy.step(modules, optimisers, images, torch.arange(8))
    modules.eval()
    layers = greedy.network(modules)
    plain, folded = greedy.named(*layers), greedy.folded(layers)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(images), plain(images))


def test_no_gradient_passes_between_modules() -> None:
    torch = pytest.importorskip("torch")
    from tools.experiments import greedy

    found = []
    for scale in (1.0, 5.0):
        torch.manual_seed(0)
        modules = greedy.build((3, 4, 5))
        with torch.no_grad():
            modules[1].head.logits.weight.mul_(scale)
        optimisers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
        before = [module.body[0].weight.clone() for module in modules]
        images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        greedy.step(modules, optimisers, images, torch.arange(8))
        found.append([m.body[0].weight - b for m, b in zip(modules, before, strict=True)])
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][0].abs().max() > 0
    assert not torch.allclose(found[0][1], found[1][1])
