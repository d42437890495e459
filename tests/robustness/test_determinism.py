"""The same model, data, seed and versions give the same bytes, however the work was divided."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS
from graphs import build
from network_texts import CNN as TEXT

from onnx_oamip import (
    apply,
    couple,
    document,
    frontier,
    plan,
    prune,
    score,
)
from onnx_oamip.api import comparison
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data import feeds as feed_batches
from onnx_oamip.graph import loading as models
from onnx_oamip.graph import partial_execution
from onnx_oamip.graph.runtime import Session
from onnx_oamip.statistics import covariances

REST = ("mobilenet-fashion", "resnet20-fashion", "vgg-fashion", "vit-fashion")
WORKERS, BATCHES = (1, 2, 4), (1, 32, 512)
DIVIDED: tuple[dict[str, Any], ...] = tuple(
    {"workers": workers, "batch_size": batch} for workers, batch in product(WORKERS, BATCHES)
)
FEW_DIVIDED = tuple(
    {"workers": w, "batch_size": b} for w, b in zip(WORKERS, (32, 1, 512), strict=True)
)
"""Every number of workers and every batch once."""


def samples(name: str, count: int) -> dict[str, np.ndarray]:
    with np.load(MODELS / f"{name}.npz") as found:
        whole = {k: found[k] for k in found.files if not k.startswith("eval.")}
    return {k: v[:count] if v.ndim else v for k, v in whole.items()}


def written(model: Path, arrays: dict[str, np.ndarray], target: Path, **values: Any) -> bytes:
    settings = Settings.create(
        **{"macs": 0.5, "device": "cpu", "cache": "off", "align": 1, **values}
    )
    prune(model, arrays, target, settings)
    return target.read_bytes()


@pytest.mark.parametrize(
    ("name", "divisions", "count"),
    [
        ("lenet300-mnist", DIVIDED, 64),
        ("lenet5-mnist", FEW_DIVIDED, 48),
        pytest.param("lenet5-mnist", DIVIDED, 128, marks=pytest.mark.slow),
        pytest.param("vit-fashion", FEW_DIVIDED, 48, marks=pytest.mark.slow),
        *(pytest.param(name, DIVIDED, 512, marks=pytest.mark.slow) for name in REST),
    ],
)
def test_shipped_models_are_pruned_reproducibly(
    name: str, divisions: Sequence[Mapping[str, Any]], count: int, tmp_path: Path
) -> None:
    """The written files of every number of workers with every batch size, byte by byte."""
    arrays = samples("mnist" if name.endswith("-mnist") else "fashion-mnist", count)
    found = {
        written(MODELS / f"{name}.onnx", arrays, tmp_path / "out.onnx", **divided)
        for divided in divisions
    }
    assert len(found) == 1


CHOICES: dict[str, dict[str, Any]] = {
    "bias": {"refit": "bias", "allocate": "global", "importance": "activation"},
    "oamip": {"importance": "oamip", "mode": "decoupled"},
    "nnrelief": {"importance": "nnrelief"},
    "snacs": {"importance": "snacs", "macs": 0.9},
    "drop": {"macs": None, "max_drop": 20.0},
    "size": {"macs": None, "size": 0.7},
    "rounds": {"iterations": 2},
    "joint": {"importance": "oamip", "mode": "joint", "relax": True},
    "connections": {
        "macs": None,
        "params": 0.5,
        "granularity": "connection",
        "importance": "nnrelief",
    },
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_method_gives_the_same_bytes_for_any_division_of_work(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(build(TEXT).SerializeToString())
    images = np.random.default_rng(0).normal(size=(90, 3, 8, 8)).astype(np.float32)
    arrays = {"image": images, "labels": np.arange(90) % 5}
    found = {
        written(path, arrays, tmp_path / "out.onnx", **{**CHOICES[name], **divided})
        for divided in FEW_DIVIDED
    }
    assert len(found) == 1


def test_document_does_not_depend_on_the_division_of_work(tmp_path: Path) -> None:
    """All of the JSON but times, load, the division itself, and the last digits of a sum over batches."""
    path = tmp_path / "model.onnx"
    path.write_bytes(build(TEXT).SerializeToString())
    images = np.random.default_rng(0).normal(size=(90, 3, 8, 8)).astype(np.float32)
    arrays = {"image": images, "labels": np.arange(90) % 5}
    texts, errors = set(), []
    for divided in FEW_DIVIDED:
        settings = Settings.create(macs=0.5, device="cpu", cache="off", align=1, **divided)
        found = document(prune(path, arrays, tmp_path / "out.onnx", settings))
        assert found.pop("timings")
        found["verification"]["latency"].pop("load")
        assert {key: found["settings"].pop(key) for key in divided} == divided
        for program in found["programs"]:
            assert program.pop("seconds") >= 0
        errors.append(found["verification"].pop("output_relative_error"))
        texts.add(json.dumps(found))
    assert len(texts) == 1
    assert errors == pytest.approx([errors[0]] * len(errors), rel=1e-12)


def test_every_command_is_reproducible(tmp_path: Path) -> None:
    """Scores, plans, what is made of them, and the models of a frontier; solver times are all that differs."""
    path = tmp_path / "model.onnx"
    path.write_bytes(build(TEXT).SerializeToString())
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(90, 3, 8, 8)).astype(np.float32),
        "labels": np.arange(90) % 5,
    }
    found = []
    for i, divided in enumerate(FEW_DIVIDED):
        here = tmp_path / str(i)
        (here / "f").mkdir(parents=True)
        settings = Settings.create(macs=0.5, device="cpu", cache="off", align=1, **divided)
        score(path, arrays, here / "s.npz", settings)
        chosen = plan(path, arrays, here / "p.json", settings, scores=here / "s.npz")
        apply(path, here / "p.json", arrays, here / "o.onnx", divided)
        frontier(path, arrays, settings, (0.7, 0.4), save_dir=here / "f")
        models_made = [p.read_bytes() for p in (here / "o.onnx", *sorted((here / "f").iterdir()))]
        with np.load(here / "s.npz") as scores:
            values = {k: scores[k].tobytes() for k in scores.files if scores[k].dtype.kind == "f"}
        found.append((values, chosen.plan.keep.tobytes(), models_made))
    assert len(found[0][2]) == 3
    assert found[0][0]
    assert found[1:] == found[:1] * 2


def test_calibration_does_not_use_the_requested_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch that somebody asks for reaches a run of the model behind which something is decided."""
    path = tmp_path / "model.onnx"
    path.write_bytes(build(TEXT).SerializeToString())
    arrays = {"image": np.random.default_rng(0).normal(size=(90, 3, 8, 8)).astype(np.float32)}
    seen: dict[int, set[int]] = {}
    feed_indices = dataset.Samples.feed_indices

    def watch(self: dataset.Samples, size: int) -> Any:
        seen[batch].add(size)
        return feed_indices(self, size)

    monkeypatch.setattr(dataset.Samples, "feed_indices", watch)
    for batch in BATCHES:
        seen[batch] = set()
        settings = Settings.create(macs=0.5, device="cpu", cache="off", align=1, batch_size=batch)
        score(path, arrays, tmp_path / "s.npz", settings)
    assert seen[1] - {1} == seen[32] == seen[512] - {512} == {feed_batches.MAX_RUN_SAMPLES}


def test_seed_changes_the_result(tmp_path: Path) -> None:
    """Bytes are not the same because nothing was done: another seed gives others."""
    model, arrays = MODELS / "lenet5-mnist.onnx", samples("mnist", 160)
    assert written(model, arrays, tmp_path / "a.onnx") != written(
        model, arrays, tmp_path / "b.onnx", seed=1
    )


def test_run_size_follows_from_model_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(build(TEXT).SerializeToString())
    model = models.rebind(models.load(path), {"batch": 1})
    sample = 4 * (16 * 64 + 16 * 64 + 12 * 64)
    assert feed_batches.run_size(model) == feed_batches.MAX_RUN_SAMPLES
    assert feed_batches.run_size(model, 4 * 5 * sample) == 5
    assert feed_batches.run_size(model, 1) == 1
    assert feed_batches.comparison_size(model, 100) == 100
    assert feed_batches.comparison_size(model, 3, 4 * 5 * sample) == 3
    assert feed_batches.comparison_size(model, 100, 4 * 5 * sample) == 5
    found = dataset.load({"image": np.zeros((40, 3, 8, 8), np.float32)}, model)
    assert found is not None
    feeds, used = feed_batches.feeds_within_memory(
        model, found, feed_batches.run_size(model, 20 * sample), 20 * sample
    )
    assert (len(feeds), used) == (4, 20)


def test_models_are_compared_on_as_many_samples_as_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run of ``prune`` or ``compare`` holds activations of more samples than the limit allows."""
    path, pruned = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    path.write_bytes(build(TEXT).SerializeToString())
    arrays = {"image": np.random.default_rng(0).normal(size=(60, 3, 8, 8)).astype(np.float32)}
    limit = 4 * 7 * 4 * (16 * 64 + 16 * 64 + 12 * 64)
    monkeypatch.setattr(Settings, "activation_memory_limit", property(lambda _: limit))
    taken: list[int] = []
    run = Session.run

    def watch(self: Session, feed: Any, names: Any = None) -> Any:
        taken.append(len(feed["image"]) if "image" in feed else 0)
        return run(self, feed, names)

    monkeypatch.setattr(Session, "run", watch)
    settings = Settings.create(macs=0.5, device="cpu", cache="off", align=1, batch_size=50)
    prune(path, arrays, pruned, settings)
    assert max(taken) == 7
    taken.clear()
    comparison.compare(path, pruned, arrays, settings)
    assert max(taken) == 7


def test_less_memory_gives_smaller_runs_and_matrices(tmp_path: Path) -> None:
    least = 1 << 28
    assert Settings(max_memory=least).activation_memory_limit == least // 4
    assert (
        Settings().activation_memory_limit
        == Settings(max_memory=1 << 40).activation_memory_limit
        == 1 << 30
    )
    coupling = couple(models.load(MODELS / "vgg-fashion.onnx"))
    consumers = len({c.node for c in coupling.consumers})
    assert 8 * consumers * covariances.cap(coupling, least // 4) ** 2 <= least // 4
    assert covariances.cap(coupling, 1 << 60) == covariances.CAP
    path = MODELS / "lenet5-mnist.onnx"
    assert written(path, samples("mnist", 64), tmp_path / "a.onnx", max_memory=least)


WIDE = """(float[batch, 4, 256, 256] image) => (float[batch, 5] scores)
<float[4, 4, 1, 1] w1, float[4, 4, 1, 1] w2, float[5, 4] w3> {
    a = Conv(image, w1)
    b = Relu(a)
    c = Conv(b, w2)
    d = Relu(c)
    g = GlobalAveragePool(d)
    f = Flatten(g)
    scores = Gemm<transB = 1>(f, w3)
}"""
"""Activations of a mebibyte each."""


def test_activations_and_matrices_stay_within_their_memory_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of arrays that are held at the same time by walks, runs and second moments."""
    least = 1 << 28
    lock = threading.Lock()
    most = {"frontier": 0, "runs": 0, "samples": 0, "grams": 0}
    now = 0

    def noted(what: str, size: int) -> None:
        most[what] = max(most[what], size)

    each, run, collect = partial_execution.Frontier.each, Session.run, covariances.collect

    def walked(self: Any, targets: Any, take: Any) -> Any:
        before = {id(v): v.nbytes for values in self.tensors.values() for v in values}
        found = each(self, targets, take)
        after = {id(v): v.nbytes for values in self.tensors.values() for v in values}
        noted("frontier", sum({**before, **after}.values()))
        return found

    def ran(self: Any, feed: Any, names: Any = None) -> Any:
        nonlocal now
        inside = threading.current_thread() is not threading.main_thread()
        size = sum(v.nbytes for v in feed.values())
        with lock:
            now += size
            noted("runs", now)
        try:
            found = run(self, feed, names)
        finally:
            with lock:
                now -= size
        noted("runs", size + sum(v.nbytes for v in found))
        if inside:
            noted("samples", max(len(v) for v in feed.values()))
        return found

    def collected(*args: Any, **options: Any) -> Any:
        found = collect(*args, **options)
        noted("grams", sum(g.matrix.nbytes for g in found.values()))
        return found

    monkeypatch.setattr(partial_execution.Frontier, "each", walked)
    monkeypatch.setattr(Session, "run", ran)
    monkeypatch.setattr(covariances, "collect", collected)
    path = tmp_path / "wide.onnx"
    path.write_bytes(build(WIDE).SerializeToString())
    images = np.random.default_rng(0).normal(size=(120, 4, 256, 256)).astype(np.float32)
    assert written(
        path,
        {"image": images},
        tmp_path / "a.onnx",
        max_memory=least,
        batch_size=8,
        workers=4,
        macs=0.6,
        force=True,  # this graph has fewer weights than its cut file has entries
    )
    room = least // 4
    assert most["samples"] == room // 4 // (3 << 20), (
        "as many samples as the three largest tensors of four runs leave room for"
    )
    assert 0 < most["frontier"] <= room
    assert room // 8 < most["runs"] <= room
    assert 0 < most["grams"] <= room


@pytest.mark.parametrize(
    ("text", "value"), [("2GB", 2 << 30), ("1.5 GiB", 3 << 29), ("800m", 800 << 20)]
)
def test_memory_sizes_are_parsed(text: str, value: int) -> None:
    assert Settings(max_memory=text).max_memory == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2XB", "nan", "7"])
def test_invalid_memory_sizes_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="is not an amount of memory"):
        Settings(max_memory=text)
