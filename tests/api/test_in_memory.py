"""Models, data and results in memory: the bytes of the command line, and nothing written unless asked for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import build
from onnx import ModelProto

import onnx_oamip
from onnx_oamip import DataError, ModelError, Planned, Report, Result, Settings, SettingsError
from onnx_oamip.api import proof, results
from onnx_oamip.cli import main
from onnx_oamip.graph import external_data
from onnx_oamip.verification.latency import Ratio

TEXT = """(float[N,1,6,6] image) => (float[N,3] scores)
<float[16,1,3,3] w1, float[16] b1, float[24,16,3,3] w2, float[3,24] w3> {
    a = Conv(image, w1, b1)
    h = Relu(a)
    b = Conv(h, w2)
    r = Relu(b)
    g = GlobalAveragePool(r)
    f = Flatten(g)
    scores = Gemm<transB = 1>(f, w3)
}"""
OPTIONS: dict[str, Any] = {
    "macs": 0.5,
    "importance": "activation",
    "allocate": "uniform",
    "align": 1,
    "device": "cpu",
    "cache": "off",
}
FLAGS = [
    *("--macs", "0.5", "--importance", "activation", "--allocate", "uniform", "--align", "1"),
    *("--device", "cpu", "--cache", "off"),
]
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return build(TEXT)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((48, 1, 6, 6)).astype(np.float32),
        "labels": rng.integers(0, 3, 48),
    }


@pytest.fixture(scope="module")
def expected(model: ModelProto, arrays: Arrays) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
        return content(onnx_oamip.prune(model, arrays, **OPTIONS))


def content(result: Result) -> bytes:
    return result.model.SerializeToString(deterministic=True)


def test_memory_and_command_line_make_the_same_bytes(
    model: ModelProto, arrays: Arrays, expected: bytes, tmp_path: Path
) -> None:
    source, target = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    np.savez(tmp_path / "d.npz", **arrays)
    status = main(
        ["prune", str(source), "--data", str(tmp_path / "d.npz"), "-o", str(target), "-q", *FLAGS]
    )
    assert status == 0
    assert target.read_bytes() == expected
    from_file = onnx_oamip.prune(source, str(tmp_path / "d.npz"), **OPTIONS)
    assert content(from_file) == expected


def test_result_is_saved_with_its_size_and_digest(
    model: ModelProto, arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results._ReportPage, "draw", lambda _, report: report.output.encode())
    result = onnx_oamip.prune(model, arrays, **OPTIONS)
    assert list(tmp_path.iterdir()) == []
    written = result.save(
        tmp_path / "o.onnx", keep_map=tmp_path / "k.safetensors", page=tmp_path / "p.html"
    )
    saved = (tmp_path / "o.onnx").read_bytes()
    assert saved == content(result)
    assert written.after.bytes == result.report.after.bytes == len(saved)
    assert written.output_sha256 == hashlib.sha256(saved).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.safetensors", "o.onnx", "p.html"]
    assert (tmp_path / "p.html").read_text() == str(tmp_path / "o.onnx")


def test_given_model_is_not_changed(model: ModelProto, arrays: Arrays) -> None:
    before = model.SerializeToString(deterministic=True)
    onnx_oamip.prune(model, arrays, **OPTIONS)
    assert model.SerializeToString(deterministic=True) == before


def test_result_cannot_be_saved_over_its_original(
    model: ModelProto, arrays: Arrays, tmp_path: Path
) -> None:
    source = tmp_path / "m.onnx"
    onnx.save(model, source)
    result = onnx_oamip.prune(source, arrays, **OPTIONS)
    with pytest.raises(onnx_oamip.OutputError, match="would overwrite the input"):
        result.save(source)


class Loader:
    """Batches of a loader: tuples without names."""

    def __init__(self, arrays: Arrays, size: int) -> None:
        self.arrays, self.size = arrays, size

    def __len__(self) -> int:
        return 1 + 47 // self.size

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for start in range(0, 48, self.size):
            part = slice(start, start + self.size)
            yield self.arrays["image"][part], self.arrays["labels"][part]


class Dataset:
    """Samples by number, without their batch axis."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return 48

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.arrays["image"][place], int(self.arrays["labels"][place])


class Tensor:
    """Stand-in for a tensor of PyTorch, with the members that are read."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values, self.shape = values, values.shape

    def __array__(self) -> np.ndarray[Any, Any]:
        raise TypeError("a tensor that requires a gradient")

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.values


FORMS: dict[str, Callable[[Arrays], Any]] = {
    "tuple": lambda a: (a["image"], a["labels"]),
    "tensors": lambda a: {name: Tensor(value) for name, value in a.items()},
    "loader": lambda a: Loader(a, 16),
    "loader with a smaller last batch": lambda a: Loader(a, 20),
    "generator": lambda a: iter(Loader(a, 16)),
    "list of batches": lambda a: list(Loader(a, 16)),
    "data set": Dataset,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data_give_the_same_model(
    form: str, model: ModelProto, arrays: Arrays, expected: bytes
) -> None:
    assert content(onnx_oamip.prune(model, FORMS[form](arrays), **OPTIONS)) == expected


def test_loader_is_read_up_to_the_limit(
    model: ModelProto, arrays: Arrays, caplog: pytest.LogCaptureFixture
) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield arrays["image"], arrays["labels"]

    with caplog.at_level(logging.WARNING, logger="onnx_oamip"):
        report = onnx_oamip.prune(model, endless(), samples=60, **OPTIONS).report
    assert report.verification.samples == 60 // 5
    assert "only the first 60 samples are used" in caplog.text


def test_bare_array_is_the_only_input(model: ModelProto, arrays: Arrays) -> None:
    result = onnx_oamip.prune(model, arrays["image"], task="classes", **OPTIONS)
    assert result.report.verification.accuracy_after is None
    assert result.report.verification.agreement is not None


def test_wrong_number_of_unnamed_arrays_is_refused(model: ModelProto, arrays: Arrays) -> None:
    image = arrays["image"]
    with pytest.raises(DataError, match=r"3 arrays without names .* 1 inputs"):
        onnx_oamip.prune(model, (image, image, image), **OPTIONS)


def test_plan_and_apply_equal_prune(
    model: ModelProto, arrays: Arrays, expected: bytes, tmp_path: Path
) -> None:
    planned = onnx_oamip.plan(model, arrays, **OPTIONS)
    assert isinstance(planned, Planned)
    applied = onnx_oamip.apply(model, planned, arrays, cache="off")
    assert isinstance(applied, Result)
    assert content(applied) == expected
    saved = planned.save(tmp_path / "p.json")
    assert saved.sha256 == hashlib.sha256((tmp_path / "p.json").read_bytes()).hexdigest()
    assert content(onnx_oamip.apply(model, tmp_path / "p.json", arrays, cache="off")) == expected
    assert content(onnx_oamip.apply(model, applied.plan, arrays, cache="off")) == expected


def test_verify_takes_results_and_inspect_takes_models(model: ModelProto, arrays: Arrays) -> None:
    result = onnx_oamip.prune(model, arrays, **OPTIONS)
    compared = onnx_oamip.verify(model, result, arrays)
    assert compared.failures == ()
    assert compared.samples == 48
    found = onnx_oamip.inspect(model)
    assert [(group.name, len(group.units)) for group in found.coupling.groups] == [
        ("w1", 16),
        ("w2", 24),
    ]
    assert found.document["model"]["path"] == "(model)"


def test_options_take_precedence_over_settings(model: ModelProto, arrays: Arrays) -> None:
    settings = Settings(**{**OPTIONS, "macs": 0.9})
    result = onnx_oamip.prune(model, arrays, settings=settings, macs=0.5)
    assert result.report.settings["macs"] == 0.5
    assert result.report.settings["align"] == 1
    with pytest.raises(SettingsError, match=r"there is no setting `mac`; did you mean `macs`\?"):
        onnx_oamip.prune(model, arrays, mac=0.5)


def test_earlier_signature_returns_the_report(
    model: ModelProto, arrays: Arrays, tmp_path: Path
) -> None:
    report = onnx_oamip.prune(
        path=model, source=arrays, output=tmp_path / "o.onnx", settings=Settings(**OPTIONS)
    )
    assert isinstance(report, Report)
    assert report.output_sha256 is not None
    assert onnx_oamip.prune(model, arrays, None, Settings(**OPTIONS)).output is None


def test_files_beside_the_model_need_the_model(model: ModelProto, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"Result\.save"):
        onnx_oamip.prune(model, None, keep_map=tmp_path / "k.safetensors", **OPTIONS)  # type: ignore[call-overload]


def test_weights_that_were_not_loaded_are_refused(model: ModelProto, tmp_path: Path) -> None:
    copy = ModelProto.FromString(model.SerializeToString())  # saving changes it
    onnx.save(copy, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    away = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    with pytest.raises(ModelError, match="which were not loaded"):
        onnx_oamip.inspect(away)


def test_model_too_large_for_one_file_is_refused(
    model: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_data, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(ModelError, match="more than one file of ONNX can"):
        onnx_oamip.inspect(model)


def test_records_show_themselves_in_one_line(model: ModelProto, arrays: Arrays) -> None:
    result = onnx_oamip.prune(model, arrays, **OPTIONS)
    found = onnx_oamip.inspect(model)
    report = result.report
    for shown in (result, report, result.plan, report.verification, report.plan, found):
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 300
    for shown in (result, report, result.plan, report.verification, found):
        assert shown._repr_html_().count("<table>") == shown._repr_html_().count("</table>") > 0
    assert "accuracy" in repr(result)


def test_progress_has_steps_for_objects_that_ask(model: ModelProto, arrays: Arrays) -> None:
    class Steps:
        def __init__(self) -> None:
            self.seen: list[tuple[str, int, int]] = []

        def begin(self, step: str, number: int, count: int) -> None:
            self.seen.append((step, number, count))

        def __call__(self, stage: str, done: int, total: int) -> None:
            assert stage
            assert 0 < done <= total

    steps = Steps()
    onnx_oamip.prune(model, arrays, progress=steps, **OPTIONS)
    assert [step for step, _, _ in steps.seen] == [
        *("load", "objective", "couple", "score", "sensitivity", "plan and refit", "verify")
    ]
    assert [number for _, number, _ in steps.seen] == list(range(1, 8))
    assert {count for _, _, count in steps.seen} == {8}


def test_feeds_are_the_samples_and_serve_the_quantiser(model: ModelProto, arrays: Arrays) -> None:
    found = onnx_oamip.feeds(model, (arrays["image"], arrays["labels"]), batch_size=20)
    batches = [feed["image"] for feed in found]
    assert [len(batch) for batch in batches] == [20, 20, 8]
    assert np.array_equal(np.concatenate(batches), arrays["image"])
    assert found.get_next() is None
    found.rewind()
    first = found.get_next()
    assert first is not None
    assert np.array_equal(first["image"], arrays["image"][:20])


def test_scores_and_frontier_take_models_and_settings_in_memory(
    model: ModelProto, arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scored = onnx_oamip.score(model, arrays, importance="activation", cache="off")
    assert scored.output is None
    written = onnx_oamip.score(model, arrays, "s.npz", Settings(**{**OPTIONS, "macs": None}))
    np.testing.assert_array_equal(scored.scores.values, written.scores.values)
    assert scored.sha256
    assert repr(scored) == "<Scored (model): 40 units in 2 groups by activation>"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz"]
    options = {name: value for name, value in OPTIONS.items() if name != "macs"}
    found = onnx_oamip.frontier(model, arrays, levels=[0.5], save_dir="out", **options)
    assert [point.asked for point in found.points] == [0.5]
    assert (tmp_path / "out" / "model-macs0.5.onnx").exists()


@pytest.mark.parametrize("wrong", [b"", 3, None])
def test_what_is_no_model_is_refused_in_one_sentence(wrong: Any) -> None:
    with pytest.raises(ModelError, match=r"a model is the path of an \.onnx file or an onnx"):
        onnx_oamip.inspect(wrong)
