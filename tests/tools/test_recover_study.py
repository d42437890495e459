"""The study of recoveries: its figures, and a study that goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build
from onnx import numpy_helper

from onnx_oamip.data.sources import samples_of
from tools.bench import recover, recover_images, recover_operators, recover_peers

TEXT = "(float[N, 4] image) => (float[N, 3] scores) <float[4, 3] w> { scores = MatMul(image, w) }"


def linear(weights: np.ndarray) -> onnx.ModelProto:
    proto = build(TEXT)
    (held,) = proto.graph.initializer
    held.CopyFrom(numpy_helper.from_array(weights.astype(np.float32), "w"))
    return proto


def test_figures_are_those_of_the_unseen_images(tmp_path: Path) -> None:
    images = np.eye(4, dtype=np.uint8)[[0, 1, 2, 2]]
    arrays = {"input.scale": np.float32(2), "eval.input": images, "input": images[:0]}
    np.savez(tmp_path / "data.npz", **arrays, **{"eval.labels": np.array([0, 1, 2, 0])})
    first = np.vstack([np.eye(3), np.zeros(3)])
    second = first[[1, 0, 2, 3]]
    protos = [linear(first), linear(second), linear(first)]
    found = recover.judged(tmp_path / "data.npz", protos)
    assert (found["original"], found["pruned"], found["recovered"]) == (75.0, 25.0, 75.0)
    assert (found["agreement pruned"], found["agreement recovered"]) == (50.0, 100.0)
    p = np.exp([2, 0, 0]) / np.exp([2, 0, 0]).sum()
    expected = 0.5 * (p * np.log(p / p[[1, 0, 2]])).sum()  # two of four images change places
    assert float(found["divergence pruned"]) == pytest.approx(expected, abs=1e-4)
    assert found["divergence recovered"] == "0.0000"


def test_training_that_was_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def call(*arguments: object) -> dict[str, object]:
        called.append(arguments)
        document = {"recovery": {"steps": 7, "seconds": 1.5}}
        return {"stdout": json.dumps(document), "processor": 2.0, "peak_mib": 300}

    monkeypatch.setattr(recover, "_call", call)
    target = tmp_path / "net.512.recovered.onnx"
    for _ in range(2):
        record = recover._recovered(["apply", "net.onnx"], target, 7)
        assert record == {"steps": 7, "seconds": 1.5, "processor": 2.0, "peak_mib": 300}
    assert called == [("apply", "net.onnx", "--recover", 7, "--json", "-o", target)]


def test_latency_of_a_busy_machine_does_not_end_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[object, ...]] = []

    def call(*arguments: object) -> dict[str, object]:
        called.append(arguments)
        if arguments[0] == "apply":
            raise recover.Failed("stop here")
        return {}

    monkeypatch.setattr(recover, "_call", call)
    case = recover.Case("vit-fashion", 0.25, 512, 10)
    with pytest.raises(recover.Failed):
        recover._row(case, recover.paths(case.name), tmp_path / "kept", 0)
    plan, applied = called
    assert plan[plan.index("--align") + 1] == 1  # nor does it choose the widths
    assert "--force" in applied


def test_more_images_are_added_to_those_that_are_shipped(tmp_path: Path) -> None:
    more = np.arange(3 * 784, dtype=np.uint32).astype(np.uint8)
    header = b"\0" * 16
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + more.tobytes())
    case = recover.Case("vit-fashion", 0.25, 514, 10)
    model, data = recover.files_of(case, None, tmp_path, tmp_path)
    shipped = np.load(recover.paths("vit-fashion")[1])
    found = np.load(data)
    assert model.name == "vit-fashion.onnx"
    assert np.array_equal(found["input"][:512], shipped["input"])
    assert np.array_equal(found["input"][512:].reshape(2, -1), more.reshape(3, -1)[:2])
    assert "labels" not in found
    assert np.array_equal(found["eval.labels"], shipped["eval.labels"])


def test_operators_are_grouped_by_the_bound_that_they_keep() -> None:
    rows = recover_operators.banded({"Relu": 0.0, "Conv": 3e-7, "Add": 2e-7, "Cast": 1.0})
    assert [(row["largest difference"], row["names"]) for row in rows] == [
        ("0", "Relu"),
        ("up to 1e-06", "Add, Conv"),
        ("more than 1e-04", "Cast"),
    ]


def test_changed_initialisers_are_counted() -> None:
    assert recover_peers._changed(linear(np.eye(4, 3)), linear(np.eye(4, 3))) == 0
    assert recover_peers._changed(linear(np.eye(4, 3)), linear(np.ones((4, 3)))) == 1


def test_sets_of_images_share_the_judge(tmp_path: Path) -> None:
    """Pruned and judged by one split; the first images of the training part, all of them, and others behind them."""
    onnx.save(build(TEXT.replace("image", "input")), tmp_path / "net.onnx")
    images = np.arange(80, dtype=np.uint8).reshape(20, 4)
    codes = {"input.scale": np.float32(2), "input.offset": np.float32(1)}
    np.savez(tmp_path / "net.npz", input=images, **{"eval.input": images[:2]}, **codes)
    np.savez(tmp_path / "more.npz", input=images[:3] + 100, **codes)
    setting = recover_images.Setting(tmp_path / "net.onnx", tmp_path / "net.npz", 0)
    judged = setting.judged.feed(np.arange(4))["input"]
    every = setting.images(setting.training.count, None)["input"]
    assert every.shape == (16, 4)
    rows = np.concatenate([2 * every.astype(np.float32) + 1, judged])
    assert np.array_equal(np.sort(rows, axis=0), 2 * images.astype(np.float32) + 1)
    refitted, measured = samples_of(
        setting.original, setting.refit_images(), None, setting.settings
    )
    assert measured is not None
    for samples, rows in ((refitted, 2 * every.astype(np.float32) + 1), (measured, judged)):
        found = samples.feed(np.arange(samples.count))["input"]
        assert np.array_equal(np.sort(found, axis=0), np.sort(rows, axis=0))
    mixed = setting.images(5, tmp_path / "more.npz")["input"]
    assert np.array_equal(mixed, np.concatenate([every[:5], images[:3] + 100]))


def test_fine_tune_with_labels_is_chosen_by_its_held_out_fifth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its accuracy is that of the rate that is best there, after as many steps as the recovery took."""
    pytest.importorskip("torch_pruning")
    from tools.bench import finetune, rebuilt, rivals
    from tools.train_models import RECIPES

    np.savez(tmp_path / "data.npz", input=np.arange(40), labels=np.zeros(40))

    class Bench:
        data = tmp_path / "data.npz"

        def __init__(self, name: str) -> None:
            del name

        def share(self, proto: onnx.ModelProto) -> float:
            del proto
            return 0.26

        def accuracy(self, proto: onnx.ModelProto) -> float:
            return 100 * float(numpy_helper.to_array(proto.graph.initializer[0])[0, 0])

    trained: list[tuple[list[int], int]] = []
    judged: list[list[int]] = []

    def train(net: dict, recipe: object, images: np.ndarray, _labels: object, *rest: float) -> None:
        del recipe
        epochs, net["rate"], _seed = rest
        trained.append((images.tolist(), int(epochs)))

    def accuracy(net: dict, images: np.ndarray, _labels: object) -> float:
        judged.append(images.tolist())
        return -abs(net["rate"] / rate - 0.1)

    name = "resnet20-fashion"
    rate = RECIPES[name].lr
    monkeypatch.setattr(rivals, "Bench", Bench)
    monkeypatch.setattr(finetune, "theirs", lambda *_: linear(np.full((4, 3), 0.5)))
    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(finetune, "torch_accuracy", accuracy)
    monkeypatch.setattr(rebuilt, "rebuild", lambda *_: {})
    monkeypatch.setattr(rebuilt, "export", lambda net, _: linear(np.full((4, 3), net["rate"])))
    row = {"model": name, "MACs kept": 0.25, "steps": 6, "pruned": 91.0, "recovered": 93.0}
    recover_peers.with_labels(tmp_path, 0, row)
    ours = json.loads((tmp_path / "recover-labelled.json").read_text())["rows"]
    theirs = ours.pop(0)
    assert (theirs["pruned"], theirs["steps"], theirs["learning rate"]) == (
        50.0,
        6,
        f"{rate / 10:g}",
    )
    assert theirs["trained"] == pytest.approx(10 * rate, abs=0.01)
    assert [row["trained"] for row in ours] == [93.0]
    assert {epochs for _, epochs in trained} == {6}
    for (images, _), held in zip(trained, judged, strict=True):
        assert (len(images), len(held)) == (32, 8)
        assert sorted(images + held) == list(range(40))
