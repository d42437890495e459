"""Hostile and broken files: a verified model or one sentence comes out, whatever goes in, and nothing else happens."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import odd_models
import onnx
import onnx_graphsurgeon as gs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from graphs import build
from mutated_files import DATA_MODEL, ZEROS, npy, repeated_text, said, understated
from onnx import ModelProto, TensorProto, helper
from PIL import Image
from safetensors.numpy import save

from onnx_oamip.api import proof
from onnx_oamip.artifacts import keep_maps
from onnx_oamip.cli import main
from onnx_oamip.core.errors import MOST, DataError, ModelError
from onnx_oamip.core.records import Model
from onnx_oamip.data import dataset, numpy_files, parquet
from onnx_oamip.graph import (
    coupling,
    ops,
    runtime,
    shape_inference,
    subgraphs,
    symbolic_dims,
)
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.ops import OpSpec
from onnx_oamip.verification.latency import Ratio

CASES = {"model": (50, 20_000), "data": (25, 5_000), "odd": (12, 2_000)}
"""Mutated files, and odd models with odd options, by default and with --slow."""


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", CASES)
def test_hostile_files_and_odd_models_give_one_sentence_errors(
    kind: str, request: pytest.FixtureRequest
) -> None:
    few, many = CASES[kind]
    number = many if request.config.getoption("--slow") else few
    # Under pytest-xdist the other processors have tests of their own.
    alone = request.config.getoption("--slow") and "PYTEST_XDIST_WORKER" not in os.environ
    counts, bad = fuzzing.summary(kind, range(number), (os.cpu_count() or 1) if alone else 1)
    assert not bad, "\n".join(map(str, bad[:20]))
    # The files are broken enough to be refused, and whole enough to get somewhere.
    assert counts["pruned"] > 0.04 * number, counts
    assert counts["refused"] > 0.3 * number, counts


def test_unknown_lengths_written_as_minus_one_are_no_fault(tmp_path: Path) -> None:
    proto = build(
        "(float[N,3,H,W] x) => (float[N,4,H,W] y) <float[8,3,3,3] v, float[4,8,3,3] w> {"
        " a = Conv<pads=[1,1,1,1]>(x, v)  h = Relu(a)  y = Conv<pads=[1,1,1,1]>(h, w) }"
    )
    for name in ("a", "h"):
        proto.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8, -1, -1])
        )
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert models.load(tmp_path / "m.onnx").shapes["h"][1] == 8


def test_every_oddity_is_drawn() -> None:
    seen: set[str] = set()
    for number in range(250):
        odd, options = odd_models.draw(np.random.default_rng([7, number]))
        seen.update(odd.oddities, options)
        onnx.checker.check_model(odd.proto)
    wanted = {*odd_models.BASES, *odd_models.ODDITIES, *odd_models.ODD_SAMPLES, *odd_models.CHOICES}
    assert not wanted - seen


def test_difference_detects_models_that_take_no_ones_place() -> None:
    odd = odd_models.BASES["linear layers"](np.random.default_rng(0))
    assert not odd_models.difference(odd, odd.proto.SerializeToString())
    renamed, endless = ModelProto(), ModelProto()
    for proto in (renamed, endless):
        proto.CopyFrom(odd.proto)
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "other"
    bias = next(t for t in endless.graph.initializer if t.name == "b0")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(bias.dims), np.nan, "f"), "b0"))
    assert "in place of" in odd_models.difference(odd, renamed.SerializeToString())
    assert "not finite" in odd_models.difference(odd, endless.SerializeToString())


def test_crashed_fuzzing_process_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fuzzing.subprocess.Popen
    program = (
        "import os, sys\nfor x in sys.stdin:\n  if int(x) == 1: os.abort()\n"
        '  print(\'[0, "refused", ""]\', flush=True)'
    )
    monkeypatch.setattr(
        fuzzing.subprocess, "Popen", lambda args, **rest: real([args[0], "-c", program], **rest)
    )
    assert [o.kind for o in fuzzing.outcomes("model", [0, 1, 2])] == ["refused", "died", "refused"]


def test_judge_detects_forbidden_outcomes() -> None:
    assert fuzzing.judge(0, "fine\n", "") == ""
    assert fuzzing.judge(2, "", "Error: the model is broken; mend it.\n") == ""
    wrong = (
        (1, "", "Traceback\n"),
        (2, "", "Error: a\nb.\n"),
        (2, "", "Error: \x1b[31m.\n"),
        (0, "\x1b", ""),
        (139, "", ""),
        (2, "", f"Error: {'x' * 3000}.\n"),
        (2, "", "Error: std::bad_alloc.\n"),
    )
    for status, out, err in wrong:
        assert fuzzing.judge(status, out, err), err


def test_judge_detects_malformed_error_documents() -> None:
    sentence = "Error: the model is broken; export it again.\n"
    right = {
        "schema_version": 1,
        "error": "the model is broken",
        "hint": "export it again.",
        "status": 2,
    }
    document = json.dumps(right) + "\n"
    whole = json.dumps({**right, "error": "the model is broken.", "hint": None})
    assert not fuzzing.judge(2, document, sentence, as_json=True)
    assert not fuzzing.judge(2, whole, "Error: the model is broken.\n", as_json=True)
    changes: tuple[dict[str, Any], ...] = (
        {"schema_version": 2},
        {"error": "the model is whole"},
        {"error": "the model\nis broken"},
        {"error": None},
        {"error": ["the model is broken"]},
        {"hint": None},
        {"hint": ""},
        {"hint": 3},
        {"status": 1},
        {"more": 1},
    )
    wrong = [json.dumps({**right, **change}) for change in changes]
    wrong += [json.dumps({k: v for k, v in right.items() if k != name}) for name in right]
    wrong += ["", "{}", "[]", "null", document[:-3], f"note\n{document}", document * 2]
    for out in wrong:
        assert fuzzing.judge(2, out, sentence, as_json=True), out
    assert fuzzing.judge(1, document, sentence, as_json=True)
    assert fuzzing.judge(2, document, "", as_json=True)
    # Without --json, an error leaves stdout empty.
    assert fuzzing.judge(2, document, sentence)


# ------------------------------------------------------------------------------------------------- models, one by one


def _simple() -> ModelProto:
    return build(
        "(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {"
        " a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2) }"
    )


def _segmented() -> ModelProto:
    proto = _simple()
    proto.graph.initializer[0].segment.end = 40
    return proto


def _emptied() -> ModelProto:
    """A list with an empty payload of bytes beside its numbers."""
    proto = _simple()
    sizes = TensorProto(name="sizes", data_type=TensorProto.INT64, dims=[1], int64_data=[1])
    sizes.raw_data = b""
    proto.graph.initializer.append(sizes)
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["sizes"], ["made"]))
    return proto


def _untyped() -> ModelProto:
    proto = _simple()
    proto.graph.initializer[0].data_type = -1
    return proto


def _unlettered() -> ModelProto:
    """The shape inference of ONNX writes outside of its memory, and does not return."""
    proto = _simple()
    node = helper.make_node("Einsum", ["h", "w2"], ["y"], "product", equation="nc\x0f,cl")
    proto.graph.node[2].CopyFrom(node)
    return proto


def _calls(*listed: tuple[str, list[str]]) -> ModelProto:
    """The simple network with Relu replaced by the first function; each is a chain of the calls named."""
    proto = _simple()
    proto.graph.node[1].op_type, proto.graph.node[1].domain = listed[0][0], "f"
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for name, called in listed:
        nodes = [
            helper.make_node(
                c,
                ["x" if i == 0 else f"t{i}"],
                ["y" if i == len(called) - 1 else f"t{i + 1}"],
                domain="" if c == "Relu" else "f",
            )
            for i, c in enumerate(called)
        ]
        proto.functions.append(helper.make_function("f", name, ["x"], ["y"], nodes, opsets))
    proto.opset_import.append(helper.make_opsetid("f", 1))
    return proto


def _endless() -> ModelProto:
    return _calls(("a", ["b"]), ("b", ["a"]))


def _doubling() -> ModelProto:
    return _calls(*((f"f{i}", [f"f{i + 1}"] * 2) for i in range(40)), ("f40", ["Relu"]))


def _fivefold() -> ModelProto:
    return _calls(*((f"f{i}", [f"f{i + 1}"] * 5) for i in range(6)), ("f6", ["Relu"]))


def _outside(where: str, place: str) -> Callable[[], ModelProto]:
    def make() -> ModelProto:
        proto = _simple()
        tensor = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[2])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=where)
        if place == "weight":
            tensor.name = "w1"
            tensor.dims[:] = [5, 8]
            proto.graph.initializer[0].CopyFrom(tensor)
        elif place == "sparse":
            stored = proto.graph.sparse_initializer.add(dims=[8])
            stored.values.CopyFrom(tensor)
            stored.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [2], [0, 1]))
        elif place == "attribute":
            proto.graph.node.insert(0, helper.make_node("Constant", [], ["s"], value=tensor))
        else:
            sparse = onnx.SparseTensorProto(dims=[8])
            sparse.values.CopyFrom(tensor)
            sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [2], [0, 1]))
            proto.graph.node.insert(0, helper.make_node("Constant", [], ["s"], sparse_value=sparse))
        return proto

    return make


def _sparse() -> ModelProto:
    proto = _simple()
    stored = proto.graph.sparse_initializer.add(dims=[2**20, 2**20])
    stored.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
    stored.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [1], [0]))
    return proto


def _large(op: str, inputs: list[str]) -> Callable[[], ModelProto]:
    """A tensor of 4 TiB and more, made of a few numbers."""

    def make() -> ModelProto:
        proto = _simple()
        for name, dims, values in (
            ("shape", [1], [2**40]),
            ("one", [1], [1]),
            ("none", [], [0]),
            ("end", [], [2**40]),
            ("step", [], [1]),
            ("pads", [2], [0, 2**40]),
        ):
            proto.graph.initializer.append(
                helper.make_tensor(name, TensorProto.INT64, dims, values)
            )
        proto.graph.node.insert(0, helper.make_node(op, inputs, ["large"]))
        proto.graph.node.insert(1, helper.make_node("Size", ["large"], ["size"]))
        proto.graph.output.append(helper.make_tensor_value_info("size", TensorProto.INT64, []))
        return proto

    return make


def _states() -> ModelProto:
    """An LSTM whose bias has no room for its gates."""
    return build(
        "(float[4,1,5] x) => (float[4,1,1,6] y) <float[1,24,5] w, float[1,24,6] r, float[1,1] b> {"
        " y = LSTM<hidden_size=6>(x, w, r, b) }"
    )


def _flat_states() -> ModelProto:
    """An LSTM whose recurrent weights are lengths."""
    return build(
        "(float[4,1,5] x, int32[1] n) => (float[4,1,1,6] y) <float[1,24,5] w> {"
        " y = LSTM<hidden_size=6>(x, w, n) }"
    )


def _no_bias() -> ModelProto:
    proto = build(
        "(float[2,4,6] x) => (float[2,4,3] y) <float[6,24] w, float[6,8] u, float[8,3] v> {"
        " h = MatMul(x, u)  y = MatMul(h, v) }"
    )
    attention = helper.make_node(
        "Attention", ["x", "w"], ["h"], domain="com.microsoft", num_heads=4
    )
    proto.graph.node[0].CopyFrom(attention)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def _no_group(op: str) -> Callable[[], ModelProto]:
    def make() -> ModelProto:
        proto = build(
            "(float[N,3,5,5] x) => (float[N,4,5,5] y) <float[4,3,1,1] w> { y = Conv(x, w) }"
        )
        proto.graph.node[0].op_type = op
        proto.graph.node[0].attribute.append(helper.make_attribute("group", 0))
        return proto

    return make


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_no_bias, "has no bias"),
        (_no_group("Conv"), "than one group"),
        (_no_group("ConvTranspose"), "than one group"),
    ],
)
def test_models_that_crash_the_runtime_are_refused(
    make: Callable[[], ModelProto], why: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "m.onnx").write_bytes(make().SerializeToString())
    status = main(_prune(place))
    out, err = capsys.readouterr()
    assert status == 2
    assert not fuzzing.judge(status, out, err)
    assert why in err


def test_unread_list_with_an_empty_payload_is_left_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "m.onnx").write_bytes(_emptied().SerializeToString())
    status = main(_prune(place))
    out, err = capsys.readouterr()
    assert status == 0, err
    assert not fuzzing.judge(status, out, err)


def test_group_normalisation_with_a_scalar_bias_keeps_its_channels(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime runs it, although the specification asks for a list."""
    proto = build(
        "(float[N,3,6,6] x) => (float[N,4,6,6] y)"
        " <float[8,3,3,3] v, float[8] gain, float bias = {0.5}, float[4,8,1,1] w> {"
        " h = Conv<pads=[1,1,1,1]>(x, v)  r = GroupNormalization<num_groups=2>(h, gain, bias)"
        "  y = Conv(r, w) }",
        opset=21,
    )
    (place / "m.onnx").write_bytes(proto.SerializeToString())
    status = main(_prune(place))
    out, err = capsys.readouterr()
    assert status == 1, err
    assert not fuzzing.judge(status, out, err)
    assert "has a parameter that is no list" in err


def _narrow() -> ModelProto:
    """A sum of what does not broadcast."""
    proto = _simple()
    proto.graph.initializer.append(helper.make_tensor("seven", TensorProto.FLOAT, [7], [0.0] * 7))
    proto.graph.node[1].op_type = "Add"
    proto.graph.node[1].input.append("seven")
    return proto


def _never() -> ModelProto:
    """Sound to ONNX, and refused by every runtime once it runs."""
    return build(
        "(float[N,5] x) => (float[N,3] y, int64[1] z)"
        " <float[5,8] w1, float[8,3] w2, int64[2] to = {-1, 7}> {"
        " a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2)"
        "  t = Reshape(x, to)  z = Shape<end=1>(t) }"
    )


def _empty_branch() -> ModelProto:
    """A branch of an If that gives nothing."""
    proto = _simple()
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    made = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 3])
    full = helper.make_graph([helper.make_node("Relu", ["y"], ["r"])], "full", [], [made])
    full.output[0].name = "r"
    empty = helper.make_graph([], "empty", [], [])
    proto.graph.input.append(flag)
    proto.graph.node.append(
        helper.make_node("If", ["flag"], ["z"], then_branch=empty, else_branch=full)
    )
    proto.graph.output.append(made)
    return proto


def _many_axes() -> ModelProto:
    """A normalisation over a list of axes where one is expected."""
    proto = _simple()
    proto.graph.initializer.append(helper.make_tensor("scale", TensorProto.FLOAT, [8], [1.0] * 8))
    proto.graph.node[1].CopyFrom(
        helper.make_node("LayerNormalization", ["a", "scale"], ["h"], axis=[1])
    )
    return proto


def _negative_length() -> ModelProto:
    """A slice of an axis to which a list gives a negative length."""
    proto = _simple()
    for name, values in (("less", [-1]), ("eight", [8]), ("zero", [0])):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], values))
    proto.graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [1, 8], [0.0] * 8))
    proto.graph.node[1].CopyFrom(helper.make_node("Add", ["a", "cut"], ["h"]))
    added = (
        helper.make_node("Concat", ["less", "eight"], ["size"], axis=0),
        helper.make_node("Expand", ["one", "size"], ["wide"]),
        helper.make_node("Slice", ["wide", "zero", "less", "zero"], ["cut"]),
    )
    for node in reversed(added):
        proto.graph.node.insert(0, node)
    return proto


def _short_axis() -> ModelProto:
    """A slice up to the length of a convolution whose kernel is longer than the axis."""
    return build(
        "(float[N,3,6,0] x) => (float[N,4,H,W] y) <int64[1] last = {3}, int64[1] start = {1},"
        " float[8,3,3,3] w1, float[8,3,3,3] w2, float[4,8,1,1] w3> {"
        " c = Conv(x, w1)  d = Relu(c)  o = Conv(x, w2)  s = Shape(o)  end = Gather(s, last)"
        " r = Slice(d, start, end, last)  y = Conv(r, w3) }"
    )


def _latin(name: str) -> Callable[[], ModelProto]:
    """A model with a name in an encoding of one byte a character."""

    def make() -> ModelProto:
        proto = _simple()
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "length"
        content = proto.SerializeToString()
        return ModelProto.FromString(content.replace(name.encode(), b"\xe9" * len(name)))

    return make


BROKEN: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "functions in a circle": (_endless, "f"),  # some releases of onnx see it themselves
    "tensor in segments": (_segmented, "'w1' is one segment of a tensor, which is not supported"),
    "tensor of unknown type": (_untyped, "'w1' has the element type -1, which ONNX does not have"),
    "equation of other characters": (_unlettered, r"the equation 'nc\x0f,cl' of Einsum 'product'"),
    "tensor named in Latin-1": (_latin("w1"), "in NodeProto is not UTF-8"),
    "length named in Latin-1": (_latin("length"), "in Dimension is not UTF-8"),
    "functions that double": (_doubling, "once its functions are inlined"),
    "functions that call five": (_fivefold, "once its functions are inlined"),
    "weight outside": (_outside("../secret.bin", "weight"), "outside its own folder"),
    "weight at an absolute path": (_outside("/etc/passwd", "weight"), "outside its own folder"),
    "weight behind links in a circle": (_outside("circle.bin", "weight"), "outside its own folder"),
    "weight behind a link out": (_outside("link.bin", "weight"), "outside its own folder"),
    "sparse values outside": (_outside("../secret.bin", "sparse"), "outside its own folder"),
    "constant outside": (_outside("../secret.bin", "attribute"), "outside its own folder"),
    "sparse constant outside": (
        _outside("../secret.bin", "sparse attribute"),
        "outside its own folder",
    ),
    "sparse and huge": (_sparse, "more than is sensible for this file"),
    "fill": (_large("ConstantOfShape", ["shape"]), "asks for 4.0 TiB of memory"),
    "expand": (_large("Expand", ["one", "shape"]), "asks for 8.0 TiB of memory"),
    "range": (_large("Range", ["none", "end", "step"]), "asks for 8.0 TiB of memory"),
    "tile": (_large("Tile", ["one", "shape"]), "asks for 8.0 TiB of memory"),
    "pad": (_large("Pad", ["one", "pads"]), "asks for 8.0 TiB of memory"),
    "negative length": (_negative_length, "asks for a tensor with a negative length, by 'size'"),
    "axis shorter than a kernel": (_short_axis, "gives 'c' the length -2 along axis 3"),
    "many axes": (_many_axes, "attribute 'axis' of LayerNormalization"),
    "empty branch": (_empty_branch, "has 1 outputs, and its then_branch gives 0"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a secret beside it, and no clock."""
    monkeypatch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "circle.bin").symlink_to("circle.bin")
    (folder / "link.bin").symlink_to("../secret.bin")
    return folder


def _prune(place: Path, *more: str) -> list[str]:
    return [
        "prune",
        str(place / "m.onnx"),
        "-o",
        str(place / "out.onnx"),
        "--cache",
        "off",
        *fuzzing.QUICK,
        *more,
    ]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models_are_refused_in_one_sentence(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, sentence = BROKEN[name]
    (place / "m.onnx").write_bytes(make().SerializeToString())
    for command in (_prune(place), ["inspect", str(place / "m.onnx")]):
        status = main(command)
        out, err = capsys.readouterr()
        assert status == 2, (out, err)
        assert not fuzzing.judge(status, out, err)
        assert sentence in err
        assert not (place / "out.onnx").exists()


def test_slice_along_an_axis_that_does_not_exist_is_left_to_the_runtime(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = build(
        "(float[N,5] x) => (float[N,3] y)"
        " <float[5,8] w1, float[8,3] w2, int64[2] at = {0, 0}, int64[2] along = {0, 1000000}> {"
        " a = MatMul(x, w1)  size = Shape(a)  h = Slice(a, at, size, along)  y = MatMul(h, w2) }"
    )
    (place / "m.onnx").write_bytes(proto.SerializeToString())
    status = main(_prune(place))
    out, err = capsys.readouterr()
    assert status == 2
    assert not fuzzing.judge(status, out, err)
    assert "ONNX Runtime cannot run" in err


@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_notes_spell_out_invisible_characters(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The domain of an operator may hold the end of a line."""
    proto = _simple()
    proto.graph.node[1].domain = "own\u2028\x85"
    proto.opset_import.append(helper.make_opsetid("own\u2028\x85", 1))
    (place / "m.onnx").write_bytes(proto.SerializeToString())
    main(["inspect", str(place / "m.onnx")] if command == "inspect" else _prune(place))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert any(r"own\u2028\x85::Relu" in line for line in notes)
    assert "".join(notes).isprintable()


def test_graphsurgeon_prints_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GraphSurgeon raises critical errors, and its message becomes one sentence; nothing is printed."""
    (place / "m.onnx").write_bytes(_simple().SerializeToString())
    models.load(place / "m.onnx")
    with pytest.raises(Exception, match="spam"):
        gs.logger.G_LOGGER.critical("spam")
    assert capsys.readouterr() == ("", "")


def test_recursive_function_is_refused() -> None:
    with pytest.raises(
        ModelError, match="the function 'a' of the model calls itself, which ONNX does not allow"
    ):
        subgraphs.inline(_endless())


@pytest.mark.parametrize(("make", "inspected"), [(_states, 2), (_flat_states, 2), (_narrow, 0)])
def test_node_that_does_not_fit_its_operator_is_refused(
    make: Callable[[], ModelProto], inspected: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "m.onnx").write_bytes(make().SerializeToString())
    assert main(_prune(place)) == 2
    assert "ONNX Runtime cannot" in capsys.readouterr().err
    assert main(["inspect", str(place / "m.onnx")]) == inspected
    sentence = (
        "LSTM 'LSTM_0' has inputs or attributes that do not fit its operator: ONNX Runtime cannot"
    )
    assert (sentence in capsys.readouterr().err) == (inspected == 2)


def test_failing_rule_on_a_valid_node_is_an_internal_error(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise IndexError("tuple index out of range")

    def lookup(*key: Any) -> OpSpec | None:
        spec = ops.lookup(*key)
        return replace(spec, channels=broken) if spec is not None and spec.name == "Relu" else spec

    monkeypatch.setattr(coupling, "lookup", lookup)
    (place / "m.onnx").write_bytes(_simple().SerializeToString())
    for arguments in (_prune(place), ["inspect", str(place / "m.onnx")]):
        assert main(arguments) == 2
        reported = capsys.readouterr().err
        assert (
            "RuleFailed: the rule of Relu 'Relu_1' failed: IndexError: tuple index out of range"
            in reported
        )
        assert reported.endswith(
            "Error: RuleFailed in onnx-oamip itself; please report it with the lines above.\n"
        )
    assert not (place / "out.onnx").exists()


def test_model_that_cannot_run_is_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "m.onnx").write_bytes(_never().SerializeToString())
    assert main(_prune(place)) == 2
    assert "ONNX Runtime cannot run" in capsys.readouterr().err
    assert main(["inspect", str(place / "m.onnx")]) == 0


def test_path_that_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    kinds = {
        tmp_path: "is a folder",
        tmp_path / "pipe.onnx": "is a pipe or a device",
        Path("/dev/zero"): "a device",
    }
    for path, what in kinds.items():
        with pytest.raises(ModelError, match=what):
            models.load(path)


def test_functions_called_often_are_inlined() -> None:
    proto = _calls(*((f"f{i}", [f"f{i + 1}"] * 2) for i in range(8)), ("f8", ["Relu"]))
    assert sum(n.op_type == "Relu" for n in subgraphs.inline(proto).graph.node) == 2**8


def test_long_shape_list_is_not_followed(place: Path) -> None:
    """onnx keeps each element of a list; this one has 300,000 and says nothing of a shape."""
    proto = _large("ConstantOfShape", ["shape"])()
    for tensor in proto.graph.initializer:
        if tensor.name == "shape":
            tensor.int64_data[0] = 300_000
    (place / "m.onnx").write_bytes(proto.SerializeToString())
    assert main(_prune(place)) == 0


@pytest.mark.parametrize("count", ["count", ""])
def test_endless_loop_is_aborted(
    count: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = build(
        "(float[N,5] x) => (float[N,3] y)"
        " <float[5,6] w, float[6,3] v, int64 count = {9223372036854775807}, bool go = {1}> {"
        f" h = MatMul(x, w)  s = Loop({count}, go, h) <body = step (int64 i, bool c, float[n,6] s)"
        " => (bool d, float[n,6] t) { d = Identity(c)  t = Relu(s) }>  y = MatMul(s, v) }"
    )
    (place / "m.onnx").write_bytes(proto.SerializeToString())
    monkeypatch.setattr(runtime, "PATIENCE", 0.3)
    assert main(_prune(place)) == 2
    assert (
        "after 0.3 seconds or took all memory, and it has a Loop, which may never end"
        in capsys.readouterr().err
    )
    assert not (place / "out.onnx").exists()


ODD = "w\n\x1b[31m<b>\x00\u202e"


def test_control_characters_in_names_are_spelt_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = _simple()
    for node in proto.graph.node:
        node.name = f"{node.op_type}{ODD}{node.output[0]}"
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = ODD
    proto.graph.input[0].name = proto.graph.node[0].input[0] = f"x{ODD}"
    (place / "m.onnx").write_bytes(proto.SerializeToString())
    for command in (
        _prune(place),
        ["inspect", str(place / "m.onnx")],
        ["inspect", str(place / "m.onnx"), "--json"],
    ):
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert not fuzzing.judge(0, out, err)
        assert "w\\x0a\\x1b[31m<b>\\x00\\u202e" in out or "--json" in command
    assert models.load(place / "out.onnx").inputs[0].name == f"x{ODD}"


def test_control_characters_in_names_are_harmless_in_a_page(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = _simple()
    script = "<script>alert(1)</script><img src=x onerror=alert(2)>&quot;\"'" + ODD
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = script
    for node in proto.graph.node:
        node.name = script + node.op_type
    (place / "m.onnx").write_bytes(proto.SerializeToString())
    assert main([*_prune(place), "--report", str(place / "r.html")]) == 0, capsys.readouterr().err
    page = (place / "r.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    assert not any(bad in page for bad in ("<script>alert", "<img src=x", "\x1b", "\x00", "\u202e"))


def test_errors_are_one_line_of_bounded_length() -> None:
    text = str(ModelError(f"the node '{ODD}{'n' * 10**6}' is odd; mend it."))
    assert text.isprintable()
    assert len(text) < MOST + 100
    assert text.startswith("the node 'w\\x0a\\x1b[31m")
    assert text.endswith("' is odd; mend it.")


# -------------------------------------------------------------------------------------------------- data, one by one


GOOD = np.random.default_rng(0).standard_normal((6, 3, 4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    path.write_bytes(build(DATA_MODEL).SerializeToString())
    return models.load(path)


def _zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def _bomb() -> bytes:
    """An archive whose directory says 4 GiB less one byte a member, 2000 times."""
    content = bytearray(_zipped(x=npy(GOOD), **{f"x{i}": b"\x93NUMPY" for i in range(2000)}))
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 24 : at + 28] = b"\xfe\xff\xff\xff"
        at = content.find(b"PK\x01\x02", at + 4)
    return bytes(content)


def _head(shape: str, kind: str = "'<f4'") -> bytes:
    return said(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}")


FOURTH = np.arange(6)[:, None, None, None] == 4
RECORDS = np.zeros(6, [("a", "f4"), ("b", "i8")])
BAD_DATA: dict[str, tuple[str, bytes, str]] = {
    "pickle": (".npy", b"\x80\x04\x95\x00.", "does not start as an .npy or .npz file does"),
    "pickled objects": (".npy", npy(np.asarray([object()], object)), "holds Python objects"),
    "pickled objects in an archive": (
        ".npz",
        _zipped(x=npy(np.asarray([{}], object))),
        "'x' holds Python objects",
    ),
    "records": (".npy", npy(RECORDS), "holds records of type"),
    "more than is there": (
        ".npy",
        _head("(1000000000000,)"),
        "is truncated: (1000000000000,) of float32 is 3.6 TiB",
    ),
    "lengths that overflow": (".npy", _head("(99999, 99999, 99999, 99999, 99999)"), "EiB"),
    "a negative length": (
        ".npy",
        _head("(-1, 3, 4, 4)"),
        "has the shape (-1, 3, 4, 4), which is none",
    ),
    "a length of truth": (".npy", _head("(True, 3, 4, 4)"), "which is none"),
    "no element size": (".npy", _head("(9223372036854775807,)", "'|V0'"), "holds records"),
    "large records": (".npy", _head("(100000,)", "[('a', '<f4', (1000000,))]"), "holds records"),
    "code in a header": (
        ".npy",
        said("__import__('os').system('touch owned')"),
        "the header of it is broken",
    ),
    "brackets": (".npy", said("[" * 5000), "the header of it is broken"),
    "a long header": (".npy", said(" " * 100_000), "the header of it is broken"),
    "cut off": (".npy", npy(GOOD)[:-1], "it is truncated"),
    "cut off in an archive": (".npz", _zipped(x=npy(GOOD)[:-1]), "its array 'x' is truncated"),
    "an archive cut off": (".npz", _zipped(x=npy(GOOD))[:-9], "cannot be read as numpy data"),
    "a bomb": (".npz", _bomb(), "asks for 7.8 TiB of memory and this machine has"),
    "no array": (".npz", _zipped(x=b"text"), "the header of its array 'x' is broken"),
    "not a number": (
        ".npz",
        _zipped(x=npy(np.where(FOURTH, np.float32(np.nan), GOOD))),
        "array 'x' has NaN or infinite values, first in sample 4",
    ),
    "no samples": (".npz", _zipped(x=npy(GOOD[:0])), "holds no samples"),
    "one label for all": (
        ".npz",
        _zipped(x=npy(GOOD), labels=npy(np.asarray(1))),
        "'labels' has shape ()",
    ),
    "a huge label": (
        ".npz",
        _zipped(x=npy(GOOD), labels=npy(np.full(6, 2**63, np.uint64))),
        "which exceeds int64",
    ),
    "an odd name": (
        ".npz",
        _zipped(**{"x": npy(GOOD), "../\x1b": npy(GOOD)}),
        "'../\\x1b' that is no input",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_broken_data_files_are_refused_in_one_sentence(
    name: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suffix, content, sentence = BAD_DATA[name]
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        dataset.load(path, model)
    text = str(caught.value)
    assert sentence in text
    assert text.isprintable()
    assert text.endswith(".")
    assert os.listdir(tmp_path) == [path.name]


def _png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


TABLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a row of 2^29 zeros": (lambda: ZEROS, "asks for 8.0 GiB of memory and this machine has"),
    "the same, and the footer says 1": (
        lambda: understated(ZEROS),
        "asks for 8.0 GiB of memory and this machine has",
    ),
    "a text in every row": (repeated_text, "of text in it"),
    "texts by what they share": (
        lambda: _columns(b"x" * 9, column_encoding={"x": "DELTA_BYTE_ARRAY"}, use_dictionary=False),
        "DELTA_BYTE_ARRAY",
    ),
    "pictures of one colour": (lambda: _columns(_png(9000, 9000)), "9000 x 9000 pixels in"),
    "half a picture": (lambda: _columns(_png(40, 40)[:45]), "row 0 cannot be read as an image"),
    "no picture": (lambda: _columns(b""), "row 0 cannot be read as an image: it is empty"),
    "no bytes": (lambda: _columns({"other": 1}), "records without 'bytes'"),
    "texts": (lambda: _columns("a"), "'x' holds string; expected numbers"),
    "holes": (lambda: _columns([0.5, None]), "with 6 empty places"),
}


def _columns(cell: Any, **choices: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"x": [cell] * 6}), stream, **choices)
    return stream.getvalue()


@pytest.mark.parametrize("name", TABLES)
def test_broken_tables_are_refused_in_one_sentence(
    name: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "memory", lambda: 1 << 30)
    make, sentence = TABLES[name]
    (tmp_path / "d.parquet").write_bytes(make())
    with pytest.raises(DataError) as caught:
        dataset.load(tmp_path / "d.parquet", model)
    assert sentence in str(caught.value)


def test_links_in_image_folders_are_handled(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.png").write_bytes(_png(4, 4))
    for name, where in (
        ("b", "a.png"),
        ("circle", "circle.png"),
        ("zero", "/dev/zero"),
        ("gone", "gone"),
    ):
        (folder / f"{name}.png").symlink_to(where)
    found = dataset.load(folder, model)
    assert found is not None
    assert found.count == 2
    (folder / "c.png").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"c\.png cannot be read as an image: it has no format"):
        dataset.load(folder, model)


ACCEPTED: dict[str, Any] = {
    "big-endian": GOOD.astype(">f4"),
    "Fortran order": np.asfortranarray(GOOD),
    "one sample": GOOD[:1],
    "the same sample": np.repeat(GOOD[:1], 6, axis=0),
    "constant channels": np.ones_like(GOOD),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_unusual_but_valid_data_is_read(name: str, model: Model, tmp_path: Path) -> None:
    value = ACCEPTED[name]
    np.save(tmp_path / "d.npy", value)
    np.savez_compressed(tmp_path / "d.npz", x=value)
    mapped = np.load(tmp_path / "d.npy", mmap_mode="r")
    for source in (tmp_path / "d.npy", tmp_path / "d.npz", {"x": value}, {"x": mapped}):
        samples = dataset.load(source, model)
        assert samples is not None
        assert samples.arrays["x"].dtype == np.dtype(np.float32)
        assert samples.arrays["x"].dtype.isnative
        np.testing.assert_array_equal(samples.feed(np.arange(len(value)))["x"], value)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4), (3, 2, 4)])
def test_arrays_are_read_like_numpy(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 200, shape)
    for kind in ("|u1", "<i8", ">i8", "<f2", ">f8", "|b1", "<c8", "<M8[D]", "<U3"):
        for order in ("C", "F"):
            made = np.asarray(values.astype(kind), order=order)
            np.savez(tmp_path / "a.npz", a=made, b=values)
            found = numpy_files.load(tmp_path / "a.npz")
            assert isinstance(found, dict)
            np.testing.assert_array_equal(found["a"], made)
            assert found["a"].dtype == made.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found["b"], values)


@pytest.mark.parametrize("key", [3, None, ("x",), b"x"])
def test_keys_that_are_not_input_names_are_refused(key: Any, model: Model) -> None:
    with pytest.raises(DataError, match="no name of an input"):
        dataset.load({key: GOOD}, model)


ONE, TWO = np.float32([1.0]), np.float32([2.0, 3.0])
RAGGED: dict[str, tuple[Any, str]] = {
    "Python numbers": ([[1.0], [1.0, 2.0]], "array 'x' is float64 but the model expects float32"),
    "a fixed shape": ([ONE, TWO], r"array 'x' has shape \(1,\) in sample 0 but the model expects"),
    "a length that is fixed": (
        [np.ones((1, 3, 4, 4), np.float32), np.ones((1, 3, 4, 5), np.float32)],
        r"array 'x' has shape \(1, 3, 4, 5\) in sample 1 but the model expects",
    ),
    "unequal ranks": ([ONE, TWO[:, None]], "'x' is float32 with 1 axes in the first and float32"),
    "within a sample": ([[ONE, TWO], [ONE, ONE]], "sample 0 of 'x' is no array of numbers"),
    "within a later sample": ([ONE, [ONE, TWO]], "sample 1 of 'x' is no array of numbers"),
    "texts among numbers": ([[1.0], "a"], "'x' is float64 with 1 axes in the first and <U1"),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_lists_are_refused_at_fixed_shapes(name: str, model: Model) -> None:
    value, sentence = RAGGED[name]
    with pytest.raises(DataError, match=sentence) as caught:
        dataset.load({"x": value}, model)
    text = str(caught.value)
    assert text.isprintable()
    assert text.endswith(".")


def test_ragged_lists_are_samples_of_a_dynamic_length(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(build("(float[N,T] x) => (float[N,T] y) { y = Relu(x) }").SerializeToString())
    dynamic = models.load(path)
    samples = dataset.load({"x": [list(ONE), list(TWO)]}, dynamic)
    assert samples is not None
    assert samples.count == 2
    for place, value in enumerate((ONE, TWO)):
        found = samples.feed(np.asarray([place]))["x"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, value[None])
    with pytest.raises(DataError, match="is float64 but the model expects float32"):
        dataset.load({"x": [[1.0], [1.0, 2.0]]}, dynamic)
    with pytest.raises(DataError, match="sample 0 of 'x' is no array of numbers"):
        dataset.load({"x": [[ONE, TWO]]}, dynamic)


@pytest.mark.parametrize(("kind", "factor"), [("int64", 2**62), ("int32", 2**30)])
def test_shape_values_beyond_their_type_are_not_known(kind: str, factor: int) -> None:
    """Python's integers have no end; a runtime wraps them, or fails."""
    proto = build(
        f"(float[6,5] x) => ({kind}[2] large, {kind}[2] small)"
        f" <{kind}[2] by = {{{factor},1}}, {kind}[2] one = {{1,1}}> {{"
        f" s = Shape(x)  t = Cast<to={int(TensorProto.DataType.Value(kind.upper()))}>(s)"
        " large = Mul(t, by)  small = Mul(t, one) }"
    )
    entries = shape_inference.known_values(proto).entries
    assert entries["small"].tolist() == [6, 5]
    assert not symbolic_dims.numbers(entries["large"])


def test_labels_beyond_the_classes_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "m.onnx").write_bytes(build(DATA_MODEL).SerializeToString())
    np.savez(place / "d.npz", x=GOOD, labels=[0, 1, 0, 1, 2, 0])
    assert main(_prune(place, "--data", str(place / "d.npz"))) == 2
    assert (
        "'labels' has the class 2, but the model's output 'y' has 2 classes"
        in capsys.readouterr().err
    )
    assert (
        main(
            ["verify", str(place / "m.onnx"), str(place / "m.onnx"), "--data", str(place / "d.npz")]
        )
        == 2
    )
    assert "which count from 0" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- other files, one by one


def _set(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **values})


def _twice(text: str) -> str:
    found = json.loads(text)
    found["groups"][0].update(units=10**5, kept=10**5, keep=[*range(10**5 - 1), 10**5 - 2])
    return json.dumps(found)


DEEP = "[" * 5000 + "]" * 5000
PLANS: dict[str, tuple[Callable[[str], str], str]] = {
    "deep": (lambda _: DEEP, "is no valid JSON"),
    "deep inside": (
        lambda text: text.replace('"settings": {', '"settings": {"a": ' + DEEP[4600:5400] + ", "),
        "limit",
    ),
    "long": (_twice, "'keep' lists unit 99998 twice"),
    "a key twice": (
        lambda text: text.replace('"kind"', '"kind": "x", "kind"'),
        "'kind' stands twice",
    ),
    "digits": (
        lambda text: text.replace('"schema_version": 1', '"schema_version": ' + "9" * 5000),
        "no valid JSON",
    ),
    "a method that is none": (
        lambda text: text.replace('"importance": "l2"', '"importance": "\\u001b"'),
        "unknown",
    ),
    "programs that are none": (
        _set(programs=[{"purpose": "a", "solver": 3}]),
        "'solver' of a program",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_broken_plans_are_refused_in_one_sentence(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = PLANS[name]
    (place / "m.onnx").write_bytes(_simple().SerializeToString())
    asked = [
        "--macs",
        "0.5",
        "--importance",
        "l2",
        "--allocate",
        "uniform",
        "--refit",
        "none",
        "--cache",
        "off",
    ]
    assert main(["plan", str(place / "m.onnx"), "-o", str(place / "p.json"), *asked]) == 0, (
        capsys.readouterr().err
    )
    capsys.readouterr()
    (place / "p.json").write_text(change((place / "p.json").read_text()))
    given = [
        "--plan",
        str(place / "p.json"),
        "-o",
        str(place / "out.onnx"),
        "--refit",
        "none",
        "--force",
    ]
    status = main(["apply", str(place / "m.onnx"), *given])
    out, err = capsys.readouterr()
    assert status == 2
    assert not fuzzing.judge(status, out, err)
    assert sentence in err
    assert not (place / "out.onnx").exists()


CONFIGS = {
    "deep": (f"macs = {DEEP}", "is no valid TOML"),
    "digits": (f"seed = {'9' * 5000}", "is no valid TOML"),
    "without end": ("seed = inf", "'inf' is not a whole number"),
    "a date": ("seed = 2020-01-01", "'2020-01-01' is not a whole number"),
    "half": ("seed = 1.5", "'1.5' is not a whole number"),
    "no name of a file": ('data = "\\u0000"', "no such data file"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_broken_configurations_are_refused_in_one_sentence(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, sentence = CONFIGS[name]
    (place / "m.onnx").write_bytes(_simple().SerializeToString())
    (place / "c.toml").write_text(text)
    status = main(_prune(place, "--config", str(place / "c.toml")))
    out, err = capsys.readouterr()
    assert status == 2
    assert not fuzzing.judge(status, out, err)
    assert sentence in err


def test_foreign_cache_entries_are_recomputed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "m.onnx").write_bytes(_simple().SerializeToString())
    np.savez(
        place / "d.npz", x=np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    )
    asked = [
        "prune",
        str(place / "m.onnx"),
        "-o",
        str(place / "out.onnx"),
        "--data",
        str(place / "d.npz"),
        "--cache",
        str(place / "cache"),
        "--macs",
        "0.5",
        "--align",
        "1",
        "--force",
        "--device",
        "cpu",
    ]
    assert main(asked) == 0, capsys.readouterr().err
    good, whole = (
        (place / "out.onnx").read_bytes(),
        {p: p.read_bytes() for p in (place / "cache").glob("*.npz")},
    )
    assert {p.name.partition("-")[0] for p in whole} >= {"grams", "scores", "steps", "losses"}

    def broken(path: Path, change: Callable[[Any], Any]) -> None:
        with np.load(path) as held:
            np.savez(path, **{name: change(held[name]) for name in held.files})

    for spoil in (
        lambda p: p.write_bytes(b"\x80\x04\x95\x00."),
        lambda p: p.write_bytes(_zipped(index=npy(np.asarray([object()], object)))),
        lambda p: p.write_bytes(whole[p][:-40]),
        lambda p: broken(p, lambda a: a[..., :-1] if a.ndim else a),
        lambda p: broken(
            p, lambda a: a * np.nan if a.dtype.kind == "f" else a - 99 if a.dtype.kind == "i" else a
        ),
        lambda p: broken(p, lambda a: np.asarray("[" * 9999) if a.dtype.kind == "U" else a[None]),
    ):
        for path in whole:
            spoil(path)
        assert main(asked) == 0, capsys.readouterr().err
        assert (place / "out.onnx").read_bytes() == good


def test_invalid_axis_in_a_keep_map_is_refused(tmp_path: Path) -> None:
    about = {"w": {"shape": [4, 5], "digests": ["", ""]}}
    for axis in ("-1", "7", "x", "9" * 5000):
        header = {"kind": "keep-map", "schema_version": 1, "weights": about}
        content = save({f"w:{axis}": np.arange(2)}, metadata={"onnx_oamip": json.dumps(header)})
        (tmp_path / "k.safetensors").write_bytes(content)
        with pytest.raises(DataError, match="damaged keep-map"):
            keep_maps.load_keep_map(tmp_path / "k.safetensors")
