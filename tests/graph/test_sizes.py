"""Sizes of symbolic dimensions: stated, assumed, and grown where a kernel would be longer than its axis."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphs import build, load

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Model
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models

AUDIO = """(float[batch,1,samples] x) => (float[batch,8,frames] y) <float[4,1,{kernel}] w1, float[8,4,1] w2> {{
    h = Conv<strides = [{stride}]>(x, w1)
    r = Relu(h)
    y = Conv(r, w2)
}}"""


def _audio(folder: Path, kernel: int = 512, stride: int = 160) -> Path:
    path = folder / "audio.onnx"
    text = AUDIO.format(kernel=kernel, stride=stride)
    path.write_bytes(build(text).SerializeToString())
    return path


@pytest.mark.parametrize(
    ("kernel", "stride", "samples"),
    [(16, 1, 16), (17, 1, 64), (64, 1, 64), (512, 160, 1024), (400, 2000, 1024)],
)
def test_assumed_length_grows_until_the_kernel_fits(
    kernel: int, stride: int, samples: int, tmp_path: Path
) -> None:
    model = models.load(_audio(tmp_path, kernel, stride))
    assert model.bindings == {"batch": 1, "samples": samples}
    assert model.assumed == ("batch", "samples")
    frames = (samples - kernel) // stride + 1
    assert cost.count(model).macs == frames * (4 * kernel + 8 * 4)
    assert cost.uncounted(model) == ()


@pytest.mark.parametrize(
    ("stated", "batch", "samples", "assumed"),
    [
        ({"x": (1, 1, 832)}, 1, 832, ()),
        ({"x": (3, 1, 832)}, 3, 832, ()),
        ({"samples": (1152,)}, 1, 1152, ("batch",)),
        ({"batch": (2,), "x": (2, 1, 672)}, 2, 672, ()),
    ],
)
def test_stated_shapes_are_counted_per_sample(
    stated: dict[str, tuple[int, ...]],
    batch: int,
    samples: int,
    assumed: tuple[str, ...],
    tmp_path: Path,
) -> None:
    model = models.load(_audio(tmp_path), stated=stated)
    assert model.bindings == {"batch": batch, "samples": samples}
    assert model.assumed == assumed
    assert cost.count(model).macs == ((samples - 512) // 160 + 1) * (4 * 512 + 8 * 4)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"x": (1, 700)}, "has 2 lengths, but the input has 3 axes"),
        ({"x": (1, 2, 700)}, "does not fit the input, which is batchx1xsamples"),
        ({"z": (5,)}, "names no input and no symbolic dimension; there are x, batch, samples"),
        ({"samples": (5, 6)}, "names no input and no symbolic dimension"),
        ({"samples": (700,), "x": (1, 1, 701)}, "gives 'samples' the length 701, another one 700"),
    ],
)
def test_stated_shape_that_does_not_fit_is_refused(
    stated: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        models.load(_audio(tmp_path), stated=stated)


def test_stated_length_below_the_kernel_is_not_counted(tmp_path: Path) -> None:
    """Sizes that were stated are not changed: what cannot run at them is named."""
    model = models.load(_audio(tmp_path), stated={"x": (1, 1, 100)})
    assert model.bindings["samples"] == 100
    assert cost.count(model).macs == 0
    assert [record.operator for record in cost.uncounted(model)] == ["Conv"]
    assert "2 x Conv" in cost.uncounted_note(model)


def test_other_sizes_keep_those_that_were_stated(tmp_path: Path) -> None:
    model = models.load(_audio(tmp_path), stated={"samples": (832,)})
    bound = models.rebind(model, {"batch": 4})
    assert bound.bindings == {"batch": 4, "samples": 832}
    assert bound.assumed == ()


def test_tensor_without_elements_at_any_size_is_no_reason_to_grow(tmp_path: Path) -> None:
    text = """(float[batch,n] x) => (float[batch,3] y)
    <float[16,3] w, int64[1] zero = {0}, int64[1] one = {1}, int64[1] width = {16}> {
        none = Slice(x, zero, zero, one)
        some = Slice(x, zero, width, one)
        both = Concat<axis = 1>(some, none)
        y = MatMul(both, w)
    }"""
    model = load(build(text), tmp_path)
    assert model.bindings["n"] == 16
    assert cost.count(model).macs == 48


def _counted(text: str, folder: Path, **domains: int) -> Model:
    return load(
        build(text, domains={name.replace("_", "."): v for name, v in domains.items()}), folder
    )


def test_operators_that_are_not_counted_are_named(tmp_path: Path) -> None:
    text = """(float[N,5] x) => (float[N,3] y, float[N,3] z) <float[5,8] w1, float[8,3] w2, float[3] v> {
        h = MatMul(x, w1)
        a = my.own.Mix(h)
        y = MatMul(a, w2)
        b = com.microsoft.SparseToDenseMatMul(h, w2)
        k = com.microsoft.Inverse(b)
        z = Add(k, v)
    }"""
    model = _counted(text, tmp_path, my_own=1, com_microsoft=1)
    found = {record.operator: record.reason for record in cost.uncounted(model)}
    assert found == {
        "my.own::Mix": "the operator is not known",
        "MatMul": "its shapes are not known before it runs",
        "com.microsoft::SparseToDenseMatMul": "the operator is not known",
    }
    note = cost.uncounted_note(model)
    assert "1 x my.own::Mix (the operator is not known)" in note
    assert "a budget of MACs bounds the rest only" in note
    assert cost.count(model).macs == 40


def test_layout_of_one_processor_is_stated_with_the_remedy(tmp_path: Path) -> None:
    text = """(float[N,8,6,6] x) => (float[N,8,6,6] y) <float[8,8,3,3] w> {
        a = com.microsoft.nchwc.ReorderInput(x)
        b = com.microsoft.nchwc.Conv<pads = [1, 1, 1, 1]>(a, w)
        y = com.microsoft.nchwc.ReorderOutput<channels = 8>(b)
    }"""
    (found,) = cost.uncounted(_counted(text, tmp_path, com_microsoft_nchwc=1))
    assert found.operator == "com.microsoft.nchwc::Conv"
    assert "optimisation level 'extended'" in found.reason


def test_operator_of_the_standard_that_reads_a_table_does_no_products(tmp_path: Path) -> None:
    text = """(float[N,5] x, bool[4] chosen) => (float[N,3] y, float[k,6] z) <float[5,3] w, float[4,6] table> {
        y = MatMul(x, w)  z = Compress <axis = 0> (table, chosen) }"""
    assert cost.uncounted(load(build(text), tmp_path)) == ()


def test_model_of_known_operators_has_nothing_to_note(tmp_path: Path) -> None:
    text = "(float[N,5] x) => (float[N,3] y) <float[5,3] w> { h = MatMul(x, w)  y = Relu(h) }"
    assert cost.uncounted_note(load(build(text), tmp_path)) == ""
