"""The data format: every rule of it, every sentence with which it refuses, and how feeds are cut."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import build, load

from onnx_oamip.core.errors import DataError
from onnx_oamip.core.records import Array, Model, Reading
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import EVALUATION, Samples, evenly, hold_out, shuffle
from onnx_oamip.graph import loading as models

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((10, 3, 4, 4)).astype(np.float32)
LABELS = np.arange(10) % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """One image input with a symbolic batch."""
    return load(
        build("(float[N,3,4,4] x) => (float[] y) <float[8,3,3,3] w> { y = Conv(x, w) }"), folder
    )


@pytest.fixture(scope="module")
def pair(folder: Path) -> Model:
    """Two inputs of different types that share a batch and a length."""
    return load(
        build(
            "(int64[N,T] ids, float[N,T] mask) => (float[] y) <float[6,5] table, int64[1] at = {2}> {"
            " e = Gather(table, ids)  m = Unsqueeze(mask, at)  y = Mul(e, m) }"
        ),
        folder,
    )


@pytest.fixture(scope="module")
def fixed(folder: Path) -> Model:
    """A batch of exactly four."""
    return load(build("(float[4,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"), folder)


@pytest.fixture(scope="module")
def vector(folder: Path) -> Model:
    """One input of five values."""
    return load(build("(float[N,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"), folder)


def _load(source: object, model: Model, prefix: str = "") -> Samples:
    samples = dataset.load(source, model, prefix)
    assert samples is not None
    return samples


def _refused(source: object, model: Model, *parts: str, prefix: str = "") -> None:
    with pytest.raises(DataError) as caught:
        dataset.load(source, model, prefix)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for part in parts:
        assert part in text, text
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------------------------------------------------- sources


def test_npz_npy_and_arrays_give_the_same_samples(model: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=IMAGES, labels=LABELS)
    np.savez_compressed(tmp_path / "c.npz", x=IMAGES)
    np.save(tmp_path / "d.npy", IMAGES)
    for source in (tmp_path / "d.npz", str(tmp_path / "c.npz"), tmp_path / "d.npy", {"x": IMAGES}):
        samples = _load(source, model)
        np.testing.assert_array_equal(samples.arrays["x"], IMAGES)
        assert (samples.count, samples.whole, samples.fixed_batch) == (10, False, None)
    labels = _load(tmp_path / "d.npz", model).labels
    assert labels is not None
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, LABELS)


def test_unreadable_sources_are_refused(model: Model, tmp_path: Path) -> None:
    _refused(tmp_path / "none.npz", model, "none.npz: no such data file")
    _refused(str(tmp_path / "none.csv"), model, "none.csv: no such data file", "module:function")
    _refused(tmp_path, model, "is a folder")
    for name, content in (
        ("text.npz", b"hello"),
        ("empty.npz", b""),
        ("short.npy", b"\x93NUMPY\x01\x00"),
    ):
        (tmp_path / name).write_bytes(content)
        _refused(tmp_path / name, model, f"{name} cannot be read as numpy data", "numpy.savez")
    np.savez(tmp_path / "good.npz", x=IMAGES)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    _refused(tmp_path / "cut.npz", model, "cut.npz cannot be read as numpy data")


def test_pickled_objects_are_never_loaded(model: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", x=np.asarray([{"a": 1}], dtype=object))
    _refused(tmp_path / "o.npz", model, "o.npz cannot be read as numpy data")
    _refused({"x": np.asarray([None] * 10, dtype=object)}, model, "holds Python objects")
    _refused({"x": None}, model, "'x' is a NoneType; expected an array of numbers")


def test_npy_needs_one_input(pair: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", IMAGES)
    _refused(tmp_path / "d.npy", pair, "holds one array but the model has the inputs ids, mask")


MODULE = """
import numpy as np

def feeds():
    for i in range(3):
        yield {"x": np.full((2, 3, 4, 4), i, np.float32)}

def as_list():
    return [{"x": np.zeros((1, 3, 4, 4), np.float32)}]

class Reader:
    def __init__(self):
        self.left = list(feeds())
    def get_next(self):
        return self.left.pop(0) if self.left else None

def nothing():
    return []

def retyped():
    return [{"x": np.zeros((1, 3, 4, 4), np.float32)}, {"x": np.zeros((1, 3, 4, 4))}]

def renamed():
    return [{"x": np.zeros((1, 3, 4, 4), np.float32)}, {"z": np.zeros((1, 3, 4, 4), np.float32)}]

def no_dicts():
    return [np.zeros((1, 3, 4, 4), np.float32)]

def broken():
    raise RuntimeError("the disk is on fire")

def breaks_later():
    yield {"x": np.zeros((1, 3, 4, 4), np.float32)}
    raise KeyError("gone")

def none():
    return None

def exits():
    raise SystemExit(3)

def exits_later():
    yield from as_list()
    raise SystemExit

def empty():
    yield from as_list()
    yield {"x": as_list()[0]["x"][:0]}

def ragged():
    yield {"x": [[1.0, 2.0], [3.0]]}

def numbered():
    yield {1: as_list()[0]["x"]}

class Unreadable(dict):
    def __iter__(self):
        raise RuntimeError("closed")

    keys = __iter__

def unreadable():
    yield Unreadable(x=1)

class NoArray:
    def __array__(self, *_, **__):
        raise RuntimeError("on another device")

def on_a_device():
    yield {"x": NoArray()}

def endless():
    while True:
        yield from feeds()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_feeds.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "made_feeds", raising=False)
    return "made_feeds"


@pytest.mark.parametrize("name", ["feeds", "Reader"])
def test_callables_give_whole_feeds(model: Model, module: str, name: str) -> None:
    samples = _load(f"{module}:{name}", model)
    assert (samples.count, samples.whole) == (3, True)
    assert samples.arrays["x"].shape == (3, 2, 3, 4, 4)
    seen = [
        (index.tolist(), float(feed["x"].mean()), feed["x"].shape)
        for index, feed in samples.batches(32)
    ]
    assert seen == [([i], float(i), (2, 3, 4, 4)) for i in range(3)]


def test_callable_may_return_a_list(model: Model, module: str) -> None:
    assert _load(f"{module}:as_list", model).count == 1


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nothing", "yielded no feeds"),
        ("no_dicts", "yielded a ndarray"),
        ("none", "returned a NoneType"),
        ("exits", "raised SystemExit: 3; call it"),
        ("exits_later", "raised SystemExit; call it"),
        ("empty", "feed 1 without samples: 'x' has shape (0, 3, 4, 4)"),
        ("ragged", "yielded 'x', which is no array"),
        ("numbered", "names are no texts"),
        ("retyped", "'x' is float32 with 4 axes in the first and float64 with 4 axes in feed 1"),
        ("renamed", "unequal names (feed 1 lacks 'x'"),
        ("broken", "the disk is on fire"),
        ("breaks_later", "gone"),
        ("absent", "expected an importable module:function"),
        ("unreadable", "raised RuntimeError: closed; call it"),
        ("on_a_device", "no array: RuntimeError: on another device; give an array"),
    ],
)
def test_invalid_callables_are_refused(model: Model, module: str, name: str, part: str) -> None:
    _refused(f"{module}:{name}", model, f"`data={module}:{name}`", part)


def test_function_without_an_end_is_read_up_to_the_limit(model: Model, module: str) -> None:
    """The note gives the number of samples and the option."""
    samples = dataset.load(f"{module}:endless", model, reading=Reading(most=5))
    assert samples is not None
    assert samples.count == 3
    (note,) = samples.notes
    assert "only the first 6 samples are used, as `samples=5` allows" in note
    exact = dataset.load(f"{module}:feeds", model, reading=Reading(most=6))
    assert exact is not None
    assert exact.count == 3
    assert not exact.notes


def test_missing_module_is_refused(model: Model) -> None:
    _refused(
        "no_such_module_here:feeds",
        model,
        "no_such_module_here",
        "expected an importable module:function",
    )


# ------------------------------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mean": (0.5,)}, "`image_mean` has no effect on the data"),
        ({"size": (8, 8), "column": "x"}, "`image_size`, `column` have no effect on the data"),
        ({"std": (1.0,), "most": 4}, None),
    ],
)
def test_options_without_effect_on_arrays_are_noted(
    model: Model, given: dict[str, Any], named: str | None
) -> None:
    samples = dataset.load({"x": IMAGES}, model, reading=Reading(**given))
    assert samples is not None
    expected = () if named is None else (f"{named}: its arrays are fed as they are",)
    assert samples.notes == expected


def test_names_must_match(model: Model, pair: Model) -> None:
    _refused(
        {"image": IMAGES}, model, "the data has arrays for image", "'x' (float32 [N, 3, 4, 4])"
    )
    _refused({}, model, "has arrays for nothing")
    _refused(
        {"eval.x": IMAGES},
        model,
        "for eval.x alone, which are held out",
        "none for the model's input 'x'",
    )
    _refused(
        {"x": IMAGES, "extra": IMAGES}, model, "an array 'extra' that is no input", "inputs are x"
    )
    _refused({"x": IMAGES, "y.scale": np.float32(1)}, model, "'y.scale'")
    _refused({"ids": np.zeros((4, 6), np.int64)}, pair, "'mask' (float32 [N, T])")


WANTED = "but the model expects float32 [N, 3, 4, 4]"


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (
            IMAGES.astype(np.float64),
            f"is float64 {WANTED}; convert it with array.astype('float32').",
        ),
        (IMAGES.astype(np.float16), "is float16"),
        (
            np.zeros((10, 3, 4, 4), np.uint8),
            f"is uint8 {WANTED}; convert it with array.astype('float32'), or say",
        ),
        (np.zeros((10, 3, 4, 4), bool), "is bool"),
        (np.zeros((10, 3, 4, 4), "U1"), "is <U1"),
        (IMAGES[:, 0], "axis 0 counts samples"),
        (IMAGES[None, None], "axis 0 counts samples"),
        (IMAGES[:, :2], "has shape (10, 2, 4, 4) but the model expects float32 [N, 3, 4, 4]."),
        (IMAGES[:, :, 1:], "has shape (10, 3, 3, 4)"),
        (
            IMAGES.transpose(0, 2, 3, 1),
            f"(10, 4, 4, 3) {WANTED}; the layout fits after array.transpose(0, 3, 1, 2).",
        ),
        (IMAGES[0], "for one sample write array[None]."),
        (IMAGES[:0], "holds no samples"),
        (np.float32(1.0), "has shape ()"),
    ],
    ids=[
        *("double", "half", "codes", "bool", "text", "rank low"),
        *("rank high", "channels", "height", "nhwc", "one", "empty", "0d"),
    ],
)
def test_types_and_shapes_must_match(model: Model, array: Array, part: str) -> None:
    _refused({"x": array}, model, part)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(model: Model, value: float) -> None:
    bad = IMAGES.copy()
    bad[7, 2, 3, 3] = value
    _refused({"x": bad}, model, "NaN or infinite values, first in sample 7")


def test_half_precision_values_must_be_finite(tmp_path: Path) -> None:
    half = load(
        build("(float16[N,5] x) => (float16[] y) <float16[5,3] w> { y = MatMul(x, w) }"), tmp_path
    )
    bad = np.zeros((4, 5), np.float16)
    assert _load({"x": bad}, half).count == 4
    bad[2, 0] = np.inf
    _refused({"x": bad}, half, "first in sample 2")


def test_inputs_with_different_sample_counts_are_refused(pair: Model) -> None:
    ids, mask = np.zeros((4, 6), np.int64), np.ones((4, 6), np.float32)
    assert _load({"ids": ids, "mask": mask}, pair).count == 4
    assert _load({"ids": ids[None], "mask": mask[None]}, pair).whole
    _refused({"ids": ids, "mask": mask[:3]}, pair, "unequal numbers of samples")
    _refused({"ids": ids[None], "mask": mask}, pair, "mixes layouts", "whole feed")
    _refused(
        {"ids": ids.astype(np.int32), "mask": mask},
        pair,
        "'ids' is int32 but the model expects int64 [N, T]",
    )


def test_scalar_input_needs_one_value_a_feed(tmp_path: Path) -> None:
    gate = load(
        build(
            "(float[N,5] x, float g) => (float[] y) <float[5,3] w> { h = MatMul(x, w)  y = Mul(h, g) }"
        ),
        tmp_path,
    )
    x, g = np.zeros((3, 2, 5), np.float32), np.ones(3, np.float32)
    samples = _load({"x": x, "g": g}, gate)
    assert samples.whole
    assert samples.feed(np.asarray([1]))["g"].shape == ()
    # One value for all samples leaves them batched.
    samples = _load({"x": x[0], "g": np.float32(3)}, gate)
    assert not samples.whole
    feed = samples.feed(np.arange(2))
    assert (feed["x"].shape, feed["g"].shape, float(feed["g"])) == ((2, 5), (), 3)


def test_model_without_inputs_is_refused(tmp_path: Path) -> None:
    alone = load(
        build("() => (float[] y) <float[3] b> { n = RandomNormal<shape = [3]>()  y = Add(n, b) }"),
        tmp_path,
    )
    _refused({"x": IMAGES}, alone, "no inputs")


# ----------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (LABELS.astype(np.complex64), "'labels' is complex64; expected integers"),
        (np.where(LABELS > 0, LABELS, np.nan), "'labels' has NaN or infinite values"),
        (LABELS[:9], "'labels' has shape (9,); expected (10,)"),
        (np.asarray(3), "'labels' has shape (); expected (10,)"),
        (LABELS - 1, "the negative class -1"),
    ],
)
def test_labels_must_be_numbers_for_every_sample(model: Model, labels: Array, part: str) -> None:
    _refused({"x": IMAGES, "labels": labels}, model, part)


@pytest.mark.parametrize("labels", [LABELS / 2, np.eye(10, 5) > 0, LABELS[:, None]])
def test_labels_of_any_rank_are_kept(model: Model, labels: Array) -> None:
    samples = _load({"x": IMAGES, "labels": labels}, model)
    assert samples.labels is not None
    np.testing.assert_array_equal(samples.labels, labels)
    assert samples.classes is None


def test_whole_feeds_keep_their_labels(model: Model) -> None:
    labels = LABELS.reshape(5, 2)
    samples = _load({"x": IMAGES.reshape(5, 2, 3, 4, 4), "labels": labels}, model)
    assert samples.labels is not None
    np.testing.assert_array_equal(samples.labels, labels)


def test_input_named_labels_is_supported(tmp_path: Path) -> None:
    model = load(
        build("(float[N,5] labels) => (float[] y) <float[5,3] w> { y = MatMul(labels, w) }"),
        tmp_path,
    )
    samples = _load({"labels": np.zeros((4, 5), np.float32)}, model)
    assert samples.labels is None
    assert set(samples.arrays) == {"labels"}


# ---------------------------------------------------------------------------------------------------- scale, offset

CODES = np.arange(10 * 48, dtype=np.int64).reshape(10, 3, 4, 4).astype(np.uint8)


@pytest.mark.parametrize(
    ("extra", "scale", "offset"),
    [
        ({"x.scale": np.float32(1 / 255)}, 1 / 255, 0.0),
        ({"x.scale": np.asarray([0.5]), "x.offset": np.float64(-3)}, 0.5, -3.0),
        ({"x.offset": np.int64(2)}, 1.0, 2.0),
    ],
    ids=["scale", "both", "offset"],
)
def test_integer_codes_are_dequantised(
    model: Model, extra: Mapping[str, Array], scale: float, offset: float
) -> None:
    samples = _load({"x": CODES, **extra}, model)
    # What is stored stays compact; only a batch is ever turned into floats.
    assert samples.arrays["x"].dtype == np.uint8
    feed = samples.feed(np.asarray([0, 9]))
    assert feed["x"].dtype == np.float32
    np.testing.assert_allclose(feed["x"], CODES[[0, 9]] * scale + offset, rtol=1e-6, atol=1e-6)


def test_scale_per_channel_is_applied_along_its_axis(model: Model) -> None:
    scale, offset = (
        np.asarray([1.0, 2.0, 4.0]).reshape(3, 1, 1),
        np.asarray([[[-1.0]], [[0.0]], [[1.0]]]),
    )
    feed = _load({"x": CODES, "x.scale": scale, "x.offset": offset}, model).feed(np.arange(4))
    np.testing.assert_allclose(feed["x"], CODES[:4] * scale + offset, rtol=1e-6)


ONE_INFINITE = np.asarray([1.0, np.inf, 1.0]).reshape(3, 1, 1)


@pytest.mark.parametrize(
    "value", [np.asarray(np.nan), np.asarray("a"), ONE_INFINITE, np.asarray(1j)]
)
def test_scale_must_be_numbers(model: Model, value: Array) -> None:
    _refused({"x": CODES, "x.scale": value}, model, "'x.scale' must hold finite numbers")


@pytest.mark.parametrize(
    "value", [np.ones(2), np.ones(3), np.ones((3, 4)), np.ones((1, 1, 1, 2)), np.zeros(0)]
)
def test_scale_must_fit_the_sample_shape(model: Model, value: Array) -> None:
    _refused(
        {"x": CODES, "x.scale": value},
        model,
        "'x.scale' has shape",
        "does not broadcast to a sample's (3, 4, 4)",
    )


@pytest.mark.parametrize("key", ["labels", "x.scale", "x.offset"])
def test_declared_size_of_a_small_file_is_checked_before_reading(
    model: Model, tmp_path: Path, key: str
) -> None:
    """Zeros are packed a thousand times smaller than they are: a shape that is wrong is refused by the header alone."""
    path = tmp_path / "d.npz"
    np.savez_compressed(
        path, x=CODES, **{"x.scale": np.float32(1), key: np.zeros(1 << 26, np.uint8)}
    )
    assert path.stat().st_size < 1 << 17
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"has shape \(67108864,\)"):
            dataset.load(path, model)
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------- evaluation part


def test_evaluation_keys_form_a_separate_set(model: Model) -> None:
    source = {
        "x": CODES,
        "labels": LABELS,
        "eval.x": CODES[:4] + 1,
        "eval.labels": LABELS[:4],
        "x.scale": np.float32(0.1),
    }
    calibration, evaluation = _load(source, model), _load(source, model, EVALUATION)
    assert (calibration.count, evaluation.count) == (10, 4)
    np.testing.assert_array_equal(evaluation.arrays["x"], CODES[:4] + 1)
    assert evaluation.labels is not None
    np.testing.assert_array_equal(evaluation.labels, LABELS[:4])
    # The scale is said once and holds for both.
    assert evaluation.scales == calibration.scales == {"x": (pytest.approx(0.1), 0.0)}


def test_file_without_evaluation_part_has_none(model: Model) -> None:
    assert dataset.load({"x": IMAGES}, model, EVALUATION) is None


def test_evaluation_part_is_checked(model: Model) -> None:
    _refused(
        {"x": IMAGES, "eval.x": IMAGES[:, :2]}, model, "has shape (10, 2, 4, 4)", prefix=EVALUATION
    )
    _refused(
        {"x": IMAGES, "eval.labels": LABELS},
        model,
        "has arrays for eval.labels but no 'eval.x'",
        prefix=EVALUATION,
    )
    _refused(
        {"x": IMAGES, "eval.x": IMAGES, "eval.z": IMAGES},
        model,
        "an array 'eval.z' that is no input",
        prefix=EVALUATION,
    )


# ------------------------------------------------------------------------------------------------------------ feeds


@pytest.mark.parametrize("size", [1, 3, 4, 10, 32])
def test_batches_cover_every_sample_once(model: Model, size: int) -> None:
    samples = _load({"x": IMAGES}, model)
    parts = list(samples.batches(size))
    np.testing.assert_array_equal(np.concatenate([i for i, _ in parts]), np.arange(10))
    np.testing.assert_array_equal(np.concatenate([f["x"] for _, f in parts]), IMAGES)
    assert [len(i) for i, _ in parts[:-1]] == [min(size, 10)] * (len(parts) - 1)
    assert samples.usable() == 10


def test_fixed_batch_gets_exactly_its_size(fixed: Model) -> None:
    x = RNG.standard_normal((10, 5)).astype(np.float32)
    samples = _load({"x": x}, fixed)
    assert (samples.fixed_batch, samples.usable()) == (4, 8)
    parts = list(samples.batches(32))
    assert [f["x"].shape for _, f in parts] == [(4, 5), (4, 5)]
    np.testing.assert_array_equal(np.concatenate([f["x"] for _, f in parts]), x[:8])
    _refused({"x": x[:3]}, fixed, "holds 3 samples but the model takes 4 at a time")
    whole = _load({"x": x[:8].reshape(2, 4, 5)}, fixed)
    assert (whole.whole, whole.fixed_batch, whole.usable()) == (True, None, 2)
    _refused({"x": x[:9].reshape(3, 3, 5)}, fixed, "has shape (3, 3, 5)")


def test_bindings_come_from_the_data(pair: Model) -> None:
    ids, mask = np.zeros((4, 6), np.int64), np.ones((4, 6), np.float32)
    assert _load({"ids": ids, "mask": mask}, pair).bindings(pair) == {"N": 1, "T": 6}
    assert _load({"ids": ids[None], "mask": mask[None]}, pair).bindings(pair) == {"N": 4, "T": 6}


def test_stated_sizes_are_those_of_the_data(pair: Model, folder: Path) -> None:
    """Only the leading dimension, which counts samples, may differ."""
    samples = _load({"ids": np.zeros((4, 6), np.int64), "mask": np.ones((4, 6), np.float32)}, pair)
    path = folder / "pair.onnx"
    path.write_bytes(pair.proto.SerializeToString())
    stated = models.load(path, stated={"ids": (8, 6)})
    assert dataset.at_data(stated, samples).bindings == {"N": 1, "T": 6}
    other = models.load(path, stated={"T": (7,)})
    with pytest.raises(DataError, match=r"`shape` states the length 7 for 'T', but .* has 6"):
        dataset.at_data(other, samples)


def test_take_selects_samples(model: Model) -> None:
    samples = _load({"x": IMAGES, "labels": LABELS}, model).take(np.asarray([5, 2]))
    assert samples.count == 2
    assert samples.labels is not None
    np.testing.assert_array_equal(samples.arrays["x"], IMAGES[[5, 2]])
    np.testing.assert_array_equal(samples.labels, LABELS[[5, 2]])


# --------------------------------------------------------------------------------------------------------- hold out


def _numbered(model: Model, count: int) -> Samples:
    x = np.arange(count, dtype=np.float32)[:, None] * np.ones(5, np.float32)
    return _load({"x": x, "labels": np.arange(count)}, model)


@pytest.mark.parametrize("count", [2, 5, 9, 100])
def test_hold_out_is_a_partition(tmp_path: Path, count: int) -> None:
    model = load(
        build("(float[N,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"), tmp_path
    )
    samples = _numbered(model, count)
    kept, held = hold_out(samples, seed=3)
    assert held.count == max(1, count // 5)
    assert kept.labels is not None
    assert held.labels is not None
    assert sorted([*kept.labels.tolist(), *held.labels.tolist()]) == list(range(count))
    for part in (kept, held):
        assert part.labels is not None
        np.testing.assert_array_equal(part.arrays["x"][:, 0], part.labels)
    again = hold_out(samples, seed=3)[1]
    np.testing.assert_array_equal(held.arrays["x"], again.arrays["x"])
    if count == 100:
        other = hold_out(samples, seed=4)[1]
        assert not np.array_equal(held.arrays["x"], other.arrays["x"])


def test_calibration_samples_of_sorted_classes_are_in_random_order(tmp_path: Path) -> None:
    text = "(float[N,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"
    samples = _numbered(load(build(text), tmp_path), 200)
    for mixed in (shuffle(samples, seed=3), hold_out(samples, seed=3)[0]):
        assert mixed.labels is not None
        assert mixed.origin is not None
        np.testing.assert_array_equal(mixed.arrays["x"][:, 0], mixed.labels)
        np.testing.assert_array_equal(mixed.origin, mixed.labels)
        assert len(np.unique(mixed.labels)) == mixed.count
        for part in (mixed.labels[:40], mixed.labels[-40:]):
            assert len(np.unique(part // 20)) == 10  # ten classes of 20 samples, all represented
    np.testing.assert_array_equal(shuffle(samples, 3).labels, shuffle(samples, 3).labels)
    assert not np.array_equal(shuffle(samples, 3).labels, shuffle(samples, 4).labels)


def test_first_samples_fill_a_fixed_batch(fixed: Model, model: Model) -> None:
    assert _numbered(fixed, 9).first(2).count == 4
    samples = _load({"x": IMAGES}, model)
    np.testing.assert_array_equal(samples.first(3).arrays["x"], IMAGES[:3])
    assert samples.first(50) is samples


def test_single_sample_is_used_for_calibration_and_evaluation(tmp_path: Path) -> None:
    model = load(
        build("(float[N,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"), tmp_path
    )
    kept, held = hold_out(_numbered(model, 1), seed=0)
    assert kept.count == held.count == 1


@pytest.mark.parametrize(
    ("count", "expected"), [(40, (32, 8)), (9, (5, 4)), (8, (4, 4)), (7, (7, 7))]
)
def test_hold_out_respects_a_fixed_batch(
    fixed: Model, count: int, expected: tuple[int, int]
) -> None:
    kept, held = hold_out(_numbered(fixed, count), seed=0)
    assert (kept.count, held.count) == expected
    assert kept.usable() >= 4
    assert held.usable() >= 4


@pytest.mark.parametrize("rare", [1, 2, 3, 4, 7, 16])
def test_rare_samples_are_spread_evenly(rare: int) -> None:
    """Each quarter of the samples has its share of rare ones, up to one sample; the last one is first in turn."""
    rareness = np.zeros(64)
    rareness[np.random.default_rng(rare).permutation(64)[:rare]] = 1
    order = evenly(rareness)
    assert sorted(order.tolist()) == list(range(64))
    quarters = rareness[order].reshape(4, 16).sum(axis=1)
    assert quarters.max() - quarters.min() <= 1
    assert quarters[3] == np.ceil(rare / 4)


@pytest.mark.parametrize("seed", range(8))
def test_hold_out_has_its_share_of_rare_labels(tmp_path: Path, seed: int) -> None:
    text = "(float[N,5] x) => (float[] y) <float[5,3] w> { y = MatMul(x, w) }"
    samples = _numbered(load(build(text), tmp_path), 60)
    labels = np.zeros(60, np.int64)
    labels[:5] = 2
    kept, held = hold_out(replace(samples, labels=labels), seed)
    assert kept.labels is not None
    assert held.labels is not None
    # One of five belongs to the held-out fifth; the order may round up.
    assert [int((part.labels == 2).sum()) for part in (kept, held)] == [3, 2]


def _windows(model: Model, count: int, groups: Sequence[Any] | None = None) -> Samples:
    """Windows of five values over one sequence, each one value behind the last."""
    values = np.random.default_rng(0).permutation(count + 4).astype(np.float32)
    arrays: dict[str, Any] = {"x": np.lib.stride_tricks.sliding_window_view(values, 5)}
    if groups is not None:
        arrays["groups"] = groups
    return _load(arrays, model)


def test_held_out_groups_are_as_hard_as_new_ones(tmp_path: Path) -> None:
    """Errors of the nearest neighbour in the other part, relative to those on windows of new recordings."""
    text = "(float[N,40] x) => (float[] y) <float[40,3] w> { y = MatMul(x, w) }"
    model = load(build(text), tmp_path)

    def windows(rng: np.random.Generator) -> Array:
        """Windows of ten recordings, each one value behind the last."""
        noise = rng.standard_normal((10, 154))
        smooth = [np.convolve(row, np.hanning(16), "valid") for row in noise]
        each = [np.lib.stride_tricks.sliding_window_view(row, 40) for row in smooth]
        return np.concatenate(each).astype(np.float32)

    def error(known: Array, others: Array) -> float:
        apart = np.abs(others[:, None] - known[None]).mean(axis=2)
        return float(apart.min(axis=1).mean())

    groups, single = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        arrays, new = {"x": windows(rng)}, windows(rng)[::5]
        names = np.repeat(np.arange(10), 100)
        for given, found in (({"groups": names}, groups), ({}, single)):
            kept, held = hold_out(_load({**arrays, **given}, model), seed)
            rows = np.asarray(kept.arrays["x"])
            found.append(error(rows, np.asarray(held.arrays["x"])) / error(rows, new))
    assert 0.9 < np.mean(groups) < 1.1
    assert np.mean(single) < 0.6


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [int, str])
def test_groups_are_held_out_as_a_whole(vector: Model, seed: int, kind: type) -> None:
    sizes = np.random.default_rng(seed).integers(1, 15, 30)
    names = np.random.default_rng(seed).permutation(np.repeat(np.arange(30), sizes))
    samples = _windows(vector, len(names), [kind(name) for name in names])
    kept, held = hold_out(samples, seed)
    assert kept.groups is not None
    assert held.groups is not None
    assert not set(kept.groups) & set(held.groups)
    assert kept.count + held.count == samples.count
    assert abs(held.count - samples.count // 5) <= 7
    again = hold_out(shuffle(samples, 1), seed)[1]
    assert again.origin is not None
    np.testing.assert_array_equal(np.sort(again.origin), held.origin)


def test_one_large_group_is_not_held_out(vector: Model) -> None:
    samples = _windows(vector, 50, [0] * 45 + [1] * 5)
    for seed in range(8):
        assert hold_out(samples, seed)[1].count == 5
    halves = hold_out(_windows(vector, 50, [0] * 25 + [1] * 25), 0)
    assert [part.count for part in halves] == [25, 25]


def test_groups_keep_the_shares_of_classes(vector: Model) -> None:
    samples = _windows(vector, 100, np.repeat(np.arange(20), 5).tolist())
    labels = np.repeat([0, 0, 0, 1], 25)
    for seed in range(4):
        _, held = hold_out(replace(samples, labels=labels), seed)
        assert held.labels is not None
        assert int((held.labels == 1).sum()) == 5


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.zeros(20, np.int64), "all samples are of one group"),
        (np.zeros(19, np.int64), r"'groups' has \(19,\); expected \(20,\)"),
        (np.zeros((20, 2), np.int64), r"'groups' has \(20, 2\)"),
        (np.zeros(20, np.float32), "'groups' is float32; expected whole numbers or texts"),
        ([[0], [1, 2]] * 10, "'groups' has arrays of unequal shapes"),
    ],
)
def test_groups_that_divide_nothing_are_refused(vector: Model, groups: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hold_out(_windows(vector, 20, groups), 0)


def test_groups_leave_a_fixed_batch_on_both_sides(fixed: Model) -> None:
    x = np.zeros((20, 5), np.float32)
    kept, held = hold_out(_load({"x": x, "groups": np.repeat(np.arange(5), 4)}, fixed), 0)
    assert (kept.count, held.count) == (16, 4)
    samples = _load({"x": x, "groups": np.asarray([0] * 18 + [1] * 2)}, fixed)
    with pytest.raises(DataError, match="leaves the 4 samples of a batch on both sides"):
        hold_out(samples, 0)


def test_feeds_of_a_function_may_name_their_groups(vector: Model) -> None:
    feeds = [{"x": np.full((1, 5), i, np.float32), "groups": np.asarray(i // 4)} for i in range(20)]
    samples = dataset.load(iter(feeds), vector)
    assert samples is not None
    np.testing.assert_array_equal(samples.groups, np.arange(20) // 4)


def test_an_input_may_be_called_groups(tmp_path: Path) -> None:
    text = "(float[N,5] groups) => (float[] y) <float[5,3] w> { y = MatMul(groups, w) }"
    samples = _load({"groups": np.zeros((10, 5), np.float32)}, load(build(text), tmp_path))
    assert samples.groups is None


def test_placeholder_feeds_fit_the_model(pair: Model, model: Model) -> None:
    for some in (pair, model):
        samples = dataset.placeholder(some, seed=1, count=3)
        again = dataset.placeholder(some, seed=1, count=3)
        assert (samples.count, samples.whole) == (3, True)
        for port in some.inputs:
            assert samples.arrays[port.name].shape == (3, *some.shapes[port.name])
            assert samples.arrays[port.name].dtype == port.dtype
            np.testing.assert_array_equal(samples.arrays[port.name], again.arrays[port.name])
