"""Valid but unusual files: what ONNX Runtime runs is loaded, pruned and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import build, load
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_oamip import Settings, prune
from onnx_oamip.cli import main
from onnx_oamip.core.errors import BudgetNotMet, ModelError
from onnx_oamip.core.records import Array, Report
from onnx_oamip.graph import loading as models
from onnx_oamip.graph import shape_inference
from onnx_oamip.graph.coupling import couple, exclude
from onnx_oamip.graph.input_guards import inferred

NET = """(float[N,6] x) => (float[N,3] y) <float[6,12] w1, float[12,3] w2> {
    a = MatMul(x, w1)
    h = Relu(a)
    y = MatMul(h, w2)
}"""
QUICK = {
    "importance": "activation",
    "allocate": "uniform",
    "align": 1,
    "device": "cpu",
    "force": True,
    "macs": 0.5,
}
ROWS = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32)


def _pruned(proto: ModelProto, folder: Path) -> tuple[Report, ModelProto, list[Array]]:
    """Report, pruned file, and its outputs in plain ONNX Runtime."""
    source, target = folder / "net.onnx", folder / "out.onnx"
    source.write_bytes(proto.SerializeToString())
    report = prune(source, {"x": ROWS}, target, Settings(**QUICK))  # type: ignore[arg-type]
    assert report.after.macs <= 0.5 * report.before.macs
    session = onnxruntime.InferenceSession(target)
    return report, onnx.load(target), session.run(None, {"x": ROWS[:3]})


# --------------------------------------------------------------------------------------------------------- outputs


def test_output_that_is_an_input(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.output.append(helper.make_tensor_value_info("x", 1, ["N", 6]))
    _, out, values = _pruned(proto, tmp_path)
    assert [value.name for value in out.graph.output] == ["y", "x"]
    np.testing.assert_array_equal(values[1], ROWS[:3])


def test_output_listed_twice(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.output.append(proto.graph.output[0])
    _, out, values = _pruned(proto, tmp_path)
    assert [value.name for value in out.graph.output] == ["y", "y"]
    np.testing.assert_array_equal(*values)


def test_output_that_is_a_constant(tmp_path: Path) -> None:
    proto = build(NET.replace("(float[N,3] y)", "(float[N,3] y, float[2] z)"))
    proto.graph.initializer.append(helper.make_tensor("z", 1, [2], [1.5, 2.5]))
    _, _, values = _pruned(proto, tmp_path)
    np.testing.assert_array_equal(values[1], [1.5, 2.5])


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model and its data as links into a store of files by their content; the path of the model."""
    stored, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1" / "onnx"
    stored.mkdir()
    snapshot.mkdir(parents=True)
    onnx.save(
        build(NET),
        stored / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    for name, digest in (("model.onnx", "abc"), ("model.onnx_data", "def")):
        (stored / name).rename(stored / digest)
        (snapshot / name).symlink_to(Path("../../../blobs") / digest)
    return snapshot / "model.onnx"


def test_links_into_a_content_store(store: Path) -> None:
    (store.parents[3] / "blobs" / "ghi").write_bytes(b"an older result")
    blobs = {path: path.read_bytes() for path in (store.parents[3] / "blobs").iterdir()}
    expected = load(build(NET), store.parents[3])
    assert models.load(store).constants.keys() == expected.constants.keys()
    np.testing.assert_array_equal(models.load(store).constants["w2"], expected.constants["w2"])
    target = store.with_name("out.onnx")
    target.symlink_to("../../../blobs/ghi")
    prune(store, {"x": ROWS}, target, Settings(**QUICK))  # type: ignore[arg-type]
    onnxruntime.InferenceSession(target)
    assert not target.is_symlink()
    assert {path: path.read_bytes() for path in (store.parents[3] / "blobs").iterdir()} == blobs


def test_data_link_of_a_model_that_is_no_link_is_refused(store: Path) -> None:
    content = store.read_bytes()
    store.unlink()
    store.write_bytes(content)
    with pytest.raises(ModelError, match="outside its own folder"):
        models.load(store)


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        ("params['a']['b']", "params['a']['b']", True),
        ("net/layers[1]/w", "net/layers[1]/w", True),
        ("a*b", "a*b", True),
        ("w?.größe 1", "w?.größe 1", True),
        ("axb", "a*b", True),
    ],
)
def test_exact_name_is_excluded(tmp_path: Path, name: str, pattern: str, found: bool) -> None:
    proto = build(NET)
    for tensor in proto.graph.initializer:
        tensor.name = name if tensor.name == "w1" else tensor.name
    proto.graph.node[0].input[1] = name
    model = load(proto, tmp_path)
    assert (exclude(model, couple(model), [pattern]).n_units == 0) == found


def test_exact_name_is_no_pattern(tmp_path: Path) -> None:
    # 'a*b' is the name of one weight, and as a pattern it would match the other one too.
    text = """(float[N,6] x) => (float[N,3] y) <float[6,12] w1, float[12,8] w2, float[8,3] w3> {
        a = MatMul(x, w1)  h = Relu(a)  b = MatMul(h, w2)  r = Relu(b)  y = MatMul(r, w3) }"""
    proto = build(text)
    for tensor, node, name in zip(
        proto.graph.initializer,
        (proto.graph.node[0], proto.graph.node[2]),
        ("a*b", "axb"),
        strict=False,
    ):
        tensor.name = node.input[1] = name
    model = load(proto, tmp_path)
    assert [g.name for g in exclude(model, couple(model), ["a*b"]).groups] == ["axb"]


# ------------------------------------------------------------------------------------------------------ own faults


def test_own_fault_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr(models, "from_proto", broken)
    with pytest.raises(TypeError, match="argument 2"):
        load(build(NET), tmp_path)


def test_fault_of_the_file_is_named_by_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr(models, "from_proto", broken)
    proto = build(NET)
    proto.graph.node[1].op_type = "Unheard"
    proto.graph.node[1].domain = "of"
    proto.opset_import.append(helper.make_opsetid("of", 1))
    with pytest.raises(ModelError, match="ONNX Runtime cannot load"):
        load(proto, tmp_path)


# ------------------------------------------------------------------------- what the checker of ONNX does not accept


def test_initialisers_of_an_old_file_need_not_be_inputs(tmp_path: Path) -> None:
    proto = build(NET, opset=8, ir=3)
    assert len(load(proto, tmp_path).constants) == 2


def test_second_spelling_of_the_default_domain(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.node[0].domain = "ai.onnx"
    model = load(proto, tmp_path)
    assert couple(model).n_units == 12
    proto.opset_import[0].domain = "ai.onnx"
    assert [o.domain for o in load(proto, tmp_path).proto.opset_import] == [""]


def test_output_without_a_shape_gets_the_inferred_one(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = load(proto, tmp_path)
    assert model.outputs[0].dims == ("N", 3)
    assert not model.notes


def test_input_without_a_shape_is_refused(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="input 'x' declares no shape"):
        load(proto, tmp_path)


@pytest.mark.parametrize("shape", [["N", 7], ["N", 3, 1], [3]])
def test_wrong_declared_output_is_corrected_with_a_note(
    tmp_path: Path, shape: list[str | int]
) -> None:
    # The shape of the target of a Reshape is followed through the declared shapes.
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,12] w1, float[12,3] w2, int64[1] k = {12}, int64 zero = {0},"
        " int64[1] first = {0}> { a = MatMul(x, w1)  s = Shape(x)  n = Gather(s, zero)  m = Unsqueeze(n, first)"
        " t = Concat<axis = 0>(m, k)  r = Reshape(a, t)  h = Relu(r)  y = MatMul(h, w2) }"
    )
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, shape))
    report, out, _ = _pruned(proto, tmp_path)
    assert report.model.outputs[0].dims == ("N", 3)
    assert any("graph computes [N, 3]" in note for note in report.model.notes)
    onnx.checker.check_model(out, full_check=True)


def test_reference_to_an_attribute_outside_a_function_is_refused(tmp_path: Path) -> None:
    proto = build(NET.replace("Relu(a)", "LeakyRelu<alpha = 0.1>(a)"))
    proto.graph.node[1].attribute[0].ref_attr_name = "slope"
    proto.graph.node[1].attribute[0].ClearField("f")
    with pytest.raises(ModelError, match=r"'alpha' of LeakyRelu .* outside of any function"):
        load(proto, tmp_path)


PACKED_WEIGHTS = (
    "(float[N, 32] x) => (float[N, 8] y) <float[32, 32] w, uint8[8, 1, 16] codes, float[8] scales> "
    "{ h = MatMul(x, w) y = com.microsoft.MatMulNBits<K = 32, N = 8, bits = 4, block_size = 32>(h, codes, scales) }"
)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [("bits", [4, 4], "INTS"), ("K", 32.0, "FLOAT"), ("block_size", "32", "STRING")],
)
def test_attributes_of_another_type_are_refused(
    tmp_path: Path, name: str, value: object, found: str
) -> None:
    """The checker of ONNX does not know the operators of ONNX Runtime."""
    proto = _with_packed_weights()
    attributes = proto.graph.node[1].attribute
    place = next(i for i, attribute in enumerate(attributes) if attribute.name == name)
    attributes[place].CopyFrom(helper.make_attribute(name, value))
    with pytest.raises(ModelError, match=rf"'{name}' of MatMulNBits .* {found}, but INT is"):
        load(proto, tmp_path)


@pytest.mark.parametrize("bits", [-1, 0, 9, 1 << 40])
def test_impossible_numbers_of_bits_are_refused(tmp_path: Path, bits: int) -> None:
    proto = _with_packed_weights()
    attribute = next(a for a in proto.graph.node[1].attribute if a.name == "bits")
    attribute.i = bits
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="ONNX Runtime cannot"):
        prune(path, macs=0.5, importance="l2", allocate="uniform", refit="none")


def _with_packed_weights() -> onnx.ModelProto:
    return build(PACKED_WEIGHTS, domains={"com.microsoft": 1})


# ----------------------------------------------------------------------------------------------- types and operators


def test_constant_output_is_not_cut(tmp_path: Path) -> None:
    proto = build(
        "(float[N,6] x) => (float[N,3] y, float[12] b1) <float[6,12] w1, float[12] b1, float[12,9] w2, float[9,3] w3> {"
        " a = Gemm(x, w1, b1)  h = Relu(a)  b = MatMul(h, w2)  r = Relu(b)  y = MatMul(r, w3) }"
    )
    model = load(proto, tmp_path)
    coupling = couple(model)
    assert coupling.n_units == 9
    assert any("'b1' is a graph output" in pin.reason for pin in coupling.pinned)


def test_bias_of_a_product_with_an_unknown_shape_is_not_cut(tmp_path: Path) -> None:
    """The rule of Gemm ties its bias to its weight, also where the weight is pinned."""
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <int64 half = {6}, float[6,12] w1, float[12,9] w2, float[9] b2,"
        " float[9,3] w3> { a = MatMul(x, w1)  s = SplitToSequence <axis = 1> (a, half)"
        " j = ConcatFromSequence <axis = 1> (s)  b = Gemm(j, w2, b2)  r = Relu(b)  y = MatMul(r, w3) }"
    )
    model = load(proto, tmp_path)
    assert model.shapes.get("j") is None
    assert couple(model).n_units == 0


def test_bounds_of_a_slice_keep_their_type(tmp_path: Path) -> None:
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,12] w1, float[8,3] w2, int32[1] from = {4}, int32[1] to = {12},"
        " int32[1] axis = {1}> { a = MatMul(x, w1)  h = Relu(a)  s = Slice(h, from, to, axis)  y = MatMul(s, w2) }"
    )
    _, out, _ = _pruned(proto, tmp_path)
    kinds = {t.name: t.data_type for t in out.graph.initializer}
    (node,) = [node for node in out.graph.node if node.op_type == "Slice"]
    assert [kinds[name] for name in node.input[1:]] == [TensorProto.INT32] * 3


def test_sequences_of_constants_are_not_folded(tmp_path: Path) -> None:
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,12] w1, float[12,3] w2, float[1,12] b> {"
        " a = MatMul(x, w1)  f = SplitToSequence <axis = 0> (b)  c = ConcatFromSequence<axis = 0>(f)"
        " d = Add(a, c)  h = Relu(d)  y = MatMul(h, w2) }"
    )
    assert "SplitToSequence" in [node.op for node in load(proto, tmp_path).nodes]


def test_texts_are_not_folded(tmp_path: Path) -> None:
    proto = build(NET.replace("(float[N,3] y)", "(float[N,3] y, string[N,1] z)"))
    proto.graph.initializer.append(helper.make_tensor("names", 8, [3], [b"a", b"b", b"c"]))
    proto.graph.initializer.append(helper.make_tensor("turned", 7, [3], [2, 1, 0]))
    proto.graph.node.extend(
        [
            helper.make_node("Gather", ["names", "turned"], ["listed"]),
            helper.make_node("ArgMax", ["y"], ["best"], axis=1),
            helper.make_node("Gather", ["listed", "best"], ["z"]),
        ]
    )
    _, _, values = _pruned(proto, tmp_path)
    np.testing.assert_array_equal(
        values[1], np.array(["c", "b", "a"])[values[0].argmax(1)][:, None]
    )


def test_sparse_constant_node_becomes_dense(tmp_path: Path) -> None:
    proto = build(NET)
    values = helper.make_tensor("v", 1, [2], [2.0, 3.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("i", 7, [2], [1, 10]), [12])
    proto.graph.node.insert(1, helper.make_node("Constant", [], ["mask"], sparse_value=sparse))
    proto.graph.node.insert(2, helper.make_node("Mul", ["a", "mask"], ["m"]))
    proto.graph.node[3].input[0] = "m"
    model = load(proto, tmp_path)
    np.testing.assert_array_equal(model.constants["mask"], np.eye(12)[[1, 10]].T @ [2, 3])


def test_decomposed_dynamic_int8_is_cut_exactly(tmp_path: Path) -> None:
    # Full-range codes: sums of 16 bits would saturate, and differently after a cut.
    codes = np.random.default_rng(0).integers(-127, 128, (64, 16)).astype(np.int8)
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,64] w1, float[16,3] w2, float scale = {0.01}> {"
        " a = MatMul(x, w1)  h = Relu(a)  q, s, z = DynamicQuantizeLinear(h)  i = MatMulInteger(q, codes, z, zero)"
        " f = Cast<to = 1>(i)  t = Mul(s, scale)  b = Mul(f, t)  r = Relu(b)  y = MatMul(r, w2) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(codes, "codes"))
    proto.graph.initializer.append(numpy_helper.from_array(np.int8(0), "zero"))
    report, _, _ = _pruned(proto, tmp_path)
    assert [g.name for g in report.coupling.groups] == ["w1", "codes"]
    assert report.verification.masked_equivalence == 0


def test_dropped_training_graphs_are_noted(tmp_path: Path) -> None:
    proto = build(NET)
    assert not load(proto, tmp_path).notes
    proto.training_info.add().initialization.name = "start"
    (note,) = load(proto, tmp_path).notes
    assert "training_info" in note


# ------------------------------------------------------------------------------------------------- reasons and names


@pytest.mark.parametrize("inputs", [["buffer", "r"], ["r", "buffer"]])
def test_reason_names_the_input_that_pins(tmp_path: Path, inputs: list[str]) -> None:
    # A buffer of earlier frames is joined in time: channels behind the join are those of the buffer, not of x.
    proto = build(
        "(float[N,4,9] x, float[N,6,2] buffer) => (float[N,3,9] y)"
        " <float[6,4,1] w1, float[7,6,3] w2, float[3,7,1] w3> {"
        " a = Conv(x, w1)  r = Relu(a)  c = Concat<axis = 2>(r, r)  b = Conv(c, w2)  s = Relu(b)  y = Conv(s, w3) }"
    )
    proto.graph.node[2].input[:] = inputs
    coupling = couple(load(proto, tmp_path))
    reasons = {(pin.tensor, pin.axis): pin.reason for pin in coupling.pinned}
    assert "a graph input (buffer)" in reasons["w1", 0]
    assert "a graph input (buffer)" in reasons["w2", 1]
    assert "a graph input (x)" in reasons["w1", 1]


def test_long_names_are_shortened_in_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scope = "/model/" + "scope/" * 90
    proto = build(NET)
    for node in proto.graph.node:
        node.name = f"{scope}{node.output[0]}"
    for tensor, node in zip(proto.graph.initializer, proto.graph.node[::2], strict=True):
        tensor.name = node.input[1] = f"{scope}{tensor.name}"
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    assert main(["inspect", str(tmp_path / "net.onnx")]) == 0
    shown = capsys.readouterr().out
    text = "".join(shown.split())
    assert "scope/w1" in text
    assert "scope/a'tiesit" in text
    assert "scope/" * 20 not in text


def test_message_names_what_pins_most(tmp_path: Path) -> None:
    proto = build(
        "(float[N,6] x) => (float[N,3] y) <float[6,30] w1, float[30,3] w2> {"
        " a = MatMul(x, w1)  s = SequenceConstruct(a, a)  d = Shape(x)  i = ReduceMin<keepdims = 0>(d)"
        " q = Constant<value = int64 {1}>()  j = Mod(i, q)  b = SequenceAt(s, j)  y = MatMul(b, w2) }"
    )
    with pytest.raises(BudgetNotMet, match=r"because operator SequenceConstruct .* not supported"):
        _pruned(proto, tmp_path)


def test_inference_stops_where_it_makes_no_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the large lengths by which dimensions are recognised, the sum with the table of places fails.
    calls = []

    def counted(copy: ModelProto) -> object:
        calls.append(copy)
        return inferred(copy)

    monkeypatch.setattr(shape_inference, "inferred", counted)
    layer = (
        "  s{0} = Shape(h{0})  t{0} = Concat<axis = 0>(s{0}, one)"
        "  r{0} = Reshape(h{0}, t{0})  h{1} = Squeeze(r{0}, last)"
    )
    layers = "".join(layer.format(i, i + 1) for i in range(8))
    proto = build(
        "(float[N,L,4] x) => (float[N,L,4] y) <float[1,20,4] places, int64[1] one = {1}, int64[1] last = {3},"
        " int64[1] zero = {0}, float[4,4] w> {  s = Shape<start = 1, end = 2>(x)  p = Slice(places, zero, s, one)"
        f"  h0 = Add(x, p) {layers}  y = MatMul(h8, w) }}"
    )
    load(proto, tmp_path)
    assert len(calls) < 50


def test_output_with_the_batch_behind_is_one_column(tmp_path: Path) -> None:
    proto = build(
        "(float[N,6] x) => (float[N,3] y, float[1,N] z) <float[6,12] w1, float[12,3] w2, int64[1] first = {0}> {"
        " a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2)"
        " m = ReduceMean<axes = [1], keepdims = 0>(y)  z = Unsqueeze(m, first) }"
    )
    report, _, values = _pruned(proto, tmp_path)
    np.testing.assert_allclose(values[1][0], values[0].mean(axis=1), rtol=1e-5)
    assert {term.output: term.axis for term in report.objective.terms} == {"y": 1, "z": None}
