"""Reading and normalising model files: what is refused and how, what is kept, what is simplified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import OPSET, assert_exact, build, distance, feed, keep_one, load
from onnx import (
    ModelProto,
    TensorProto,
    TypeProto,
    external_data_helper,
    helper,
    numpy_helper,
    parser,
)

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Model
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

NET = """(float[N,3,6,6] x) => (float[N,4] y) <float[8,3,3,3] w1, float[8] b1, float[128,4] w2> {
    c = Conv(x, w1, b1)
    h = Relu(c)
    f = Flatten(h)
    y = MatMul(f, w2)
}"""


def _refused(path: Path, *parts: str) -> str:
    """The one sentence with which the file is refused."""
    with pytest.raises(ModelError) as caught:
        models.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for part in (path.name, *parts):
        assert part in text
    assert caught.value.exit_code == 2
    return text


def _same_function(proto: ModelProto, model: Model) -> None:
    values = feed(model, 1, 2)
    assert (
        distance(Session(proto, "cpu").run(values), Session(model.proto, "cpu").run(values)) <= 1e-6
    )


# --------------------------------------------------------------------------------------------------------- refused


def test_missing_file_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "none.onnx", "no such file")


def test_folder_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path, "is a folder")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "holds no graph"),
        (b"PK\x03\x04 this is a zip", "not an ONNX model"),
        (b"hello, world\n" * 9, "not an ONNX model"),
        # A valid message of the right type without a graph.
        (
            helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString(),
            "holds no graph",
        ),
    ],
    ids=["empty", "zip", "text", "no nodes"],
)
def test_file_that_is_not_a_model_is_refused(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    _refused(path, part)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = build(NET).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in np.linspace(1, len(content) - 1, 60).astype(int).tolist():
        path.write_bytes(content[:length])
        _refused(path)


def test_invalid_graph_is_refused(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.node[1].input[0] = "nobody"
    path = tmp_path / "bad.onnx"
    path.write_bytes(proto.SerializeToString())
    _refused(path, "not a valid ONNX model")


@pytest.mark.parametrize("kind", [helper.make_sequence_type_proto, helper.make_optional_type_proto])
def test_input_that_is_not_a_tensor_is_refused(
    kind: Callable[[TypeProto], TypeProto], tmp_path: Path
) -> None:
    proto = build(NET)
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, [3])
    proto.graph.input.append(helper.make_value_info("several", kind(element)))
    path = tmp_path / "sequence.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="'several' is not a tensor"):
        models.load(path)


@pytest.mark.parametrize("place", ["input", "output", "value_info"])
def test_unknown_element_type_is_refused(place: str, tmp_path: Path) -> None:
    proto = build(NET)
    if place == "value_info":
        proto.graph.value_info.add().CopyFrom(proto.graph.output[0])
        proto.graph.value_info[0].name = proto.graph.node[0].output[0]
    getattr(proto.graph, place)[0].type.tensor_type.elem_type = 71
    path = tmp_path / "odd.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"^[^\n]*type 71[^\n]*\.$"):
        models.load(path)


def test_sequence_beside_a_tensor_is_kept_and_alone_is_refused(tmp_path: Path) -> None:
    proto = build(NET)
    proto.graph.node.append(helper.make_node("SequenceConstruct", ["f", "y"], ["both"]))
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    both = helper.make_value_info("both", helper.make_sequence_type_proto(element))
    proto.graph.output.append(both)
    path = tmp_path / "sequence.onnx"
    path.write_bytes(proto.SerializeToString())
    model = models.load(path)
    assert [port.name for port in model.outputs] == ["y"]
    assert [value.name for value in model.proto.graph.output] == ["y", "both"]
    assert any("'both'" in note for note in model.notes)
    assert len(Session(model.proto, "cpu").run(feed(model, 1, 2))) == 1
    del proto.graph.output[0]
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="'both' is not a tensor, and nothing else"):
        models.load(path)


# --------------------------------------------------------------------------------------------------- external data


def _external(folder: Path, location: str, payload: bool = True) -> Path:
    """A model that keeps one weight in another file."""
    proto = build(NET)
    weight = next(t for t in proto.graph.initializer if t.name == "w2")
    data = numpy_helper.to_array(weight).tobytes()
    external_data_helper.set_external_data(weight, location, length=len(data))
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    if payload:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        (folder / location).write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["weights.bin", "parts/weights.bin"])
def test_external_data_are_read_and_counted(tmp_path: Path, location: str) -> None:
    path = _external(tmp_path, location)
    model = models.load(path)
    original = build(NET)
    held = {t.name: numpy_helper.to_array(t) for t in original.graph.initializer}
    np.testing.assert_array_equal(model.constants["w2"], held["w2"])
    # The file's size counts its weights, wherever they are.
    assert model.file_bytes == path.stat().st_size + held["w2"].nbytes
    _same_function(original, model)
    before = model.sha256
    side = tmp_path / location
    values = np.frombuffer(side.read_bytes(), np.float32)
    side.write_bytes(values[::-1].tobytes())
    assert models.load(path).sha256 != before


@pytest.mark.parametrize("kind", ["above", "absolute", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, kind: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(4 * 128 * 4))
    location = {"above": "../secret.bin", "absolute": str(secret), "link": "link.bin"}[kind]
    if kind == "link":
        (inside / "link.bin").symlink_to(secret)
    _refused(_external(inside, location, payload=False), "outside its own folder")


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    _refused(_external(tmp_path, "weights.bin", payload=False), "'weights.bin', which is missing")


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    path = _external(tmp_path, "weights.bin")
    (tmp_path / "weights.bin").write_bytes(b"1234")
    _refused(path)


# ------------------------------------------------------------------------------------------------------------ kept


def _described() -> ModelProto:
    proto = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1, "ai.onnx.ml": 3]>
        net (float[rows,3,H,W] image, int64[rows] unused) => (float[rows,4,H2,W2] scores, float[rows,8,H1,W1] seen)
        <float[8,3,3,3] w1, float[6,8,3,3] w2, float[4,6,1,1] w3> {
            c = Conv(image, w1)
            seen = Relu(c)
            d = Conv(seen, w2)
            r = Relu(d)
            scores = Conv(r, w3)
        }"""
    )
    rng = np.random.default_rng(0)
    for value in proto.graph.value_info:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        weights = rng.standard_normal(shape).astype(np.float32) / 5
        proto.graph.initializer.append(numpy_helper.from_array(weights, value.name))
    del proto.graph.value_info[:]
    proto.producer_name, proto.producer_version = "somebody", "1.2.3"
    proto.domain, proto.model_version, proto.doc_string = "org.example", 7, "what the model does"
    proto.graph.name, proto.graph.doc_string = "net", "what the graph does"
    proto.graph.input[0].doc_string = "an image"
    helper.set_model_props(proto, {"labels": "cat,dog", "preprocessing": "none"})
    for i, node in enumerate(proto.graph.node):
        node.name, node.doc_string = f"layer{i}", f"what layer {i} does"
    return proto


def test_pruned_file_keeps_metadata_and_documentation(tmp_path: Path) -> None:
    source = _described()
    model = load(source, tmp_path)
    coupling = couple(model)
    assert coupling.n_units == 6  # the eight channels of 'seen' are an output
    cut = rewrite.cut(model, coupling, keep_one(coupling, np.random.default_rng(0)))
    written = ModelProto.FromString(cut.SerializeToString())
    assert written.ir_version == source.ir_version
    assert sorted((o.domain, o.version) for o in written.opset_import) == [
        ("", 17),
        ("ai.onnx.ml", 3),
        ("com.microsoft", 1),
    ]
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(written, name) == getattr(source, name), name
    assert list(written.metadata_props) == list(source.metadata_props)
    assert (written.graph.name, written.graph.doc_string) == ("net", "what the graph does")
    # Word for word: names, types, symbolic dimensions, doc strings, inputs without consumers.
    assert list(written.graph.input) == list(source.graph.input)
    assert list(written.graph.output) == list(source.graph.output)
    assert [(n.name, n.doc_string) for n in written.graph.node] == [
        (n.name, n.doc_string) for n in source.graph.node
    ]


def test_symbolic_dimensions_are_kept(tmp_path: Path) -> None:
    model = load(_described(), tmp_path)
    assert model.port("image").dims == ("rows", 3, "H", "W")
    assert model.bindings == {"rows": 1, "H": 64, "W": 64}
    assert model.shapes["scores"] == (1, 4, 60, 60)
    assert model.batch == 1
    bound = models.rebind(model, {"rows": 5, "H": 20, "W": 30})
    assert bound.shapes["scores"] == (5, 4, 16, 26)
    assert bound.batch == 5
    assert models.rebind(bound, {"rows": 5}) is bound


def test_unnamed_dimensions_get_a_name(tmp_path: Path) -> None:
    proto = build("(float[N,3,A,B] x) => (float[] y) <float[8,3,3,3] w1> { y = Conv(x, w1) }")
    for dim in (proto.graph.input[0].type.tensor_type.shape.dim[i] for i in (0, 2, 3)):
        dim.Clear()
    model = load(proto, tmp_path, {"x.2": 9})
    assert model.port("x").dims == (None, 3, None, None)
    assert model.shapes["x"] == (1, 3, 9, 64)
    assert model.shapes["y"] == (1, 8, 7, 62)


# ------------------------------------------------------------------------------------------------------ simplified


def test_nodes_get_unique_names(tmp_path: Path) -> None:
    proto = build(NET)
    # One has no name, two share one, and one has the name that an unnamed one would get.
    for node, name in zip(proto.graph.node, ("", "twice", "twice", "Conv_0"), strict=True):
        node.name = name
    model = load(proto, tmp_path)
    names = [n.name for n in model.nodes]
    assert len(set(names)) == 4
    assert all(names)
    assert names[1] == "twice"
    assert names[3] == "Conv_0"
    for node in proto.graph.node:
        node.name = ""  # ONNX Runtime itself refuses two nodes of one name
    _same_function(proto, model)


def test_constants_are_folded(tmp_path: Path) -> None:
    proto = build(
        """(float[N,5] x) => (float[] y) <float[8,5] w, float s = {3.0}, float[8,3] v> {
            half = Constant<value = float {0.5}>()
            t = Transpose<perm = [1, 0]>(w)
            u = Mul(t, s)
            scaled = Mul(u, half)
            h = MatMul(x, scaled)
            unused = Relu(h)
            same = Identity(v)
            y = MatMul(h, same)
        }"""
    )
    model = load(proto, tmp_path)
    assert [n.op for n in model.nodes] == ["MatMul", "MatMul"]
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    np.testing.assert_allclose(
        model.constants[model.nodes[0].inputs[1]], 1.5 * weights["w"].T, rtol=1e-6
    )
    _same_function(proto, model)


@pytest.mark.parametrize(
    ("attribute", "dtype"),
    [
        ("value_float = 0.5", np.float32),
        ("value_floats = [0.5]", np.float32),
        ("value_int = 2", np.int64),
        ("value_ints = [2]", np.int64),
    ],
)
def test_constant_nodes_keep_their_type(tmp_path: Path, attribute: str, dtype: type) -> None:
    cast = "k = Cast<to = 1>(c)" if dtype is np.int64 else "k = Mul(c, c)"
    proto = build(
        f"(float[N,5] x) => (float[] y) <float[5,3] w> {{ c = Constant<{attribute}>()  {cast}  "
        f"h = MatMul(x, w)  y = Mul(h, k) }}"
    )
    model = load(proto, tmp_path)
    onnx.checker.check_model(model.proto, full_check=True)
    assert all(model.dtypes[n] == np.float32 for n in model.constants)
    _same_function(proto, model)


def test_reshape_target_computed_from_shapes_becomes_constant(tmp_path: Path) -> None:
    proto = build(
        """(float[N,3,6,6] x) => (float[] y) <float[8,3,3,3] w1, int64 zero = {0}, int64[1] at = {0},
        int64[1] rest = {-1}, float[128,4] w2> {
            h = Conv(x, w1)
            s = Shape(h)
            n = Gather(s, zero)
            u = Unsqueeze(n, at)
            to = Concat<axis = 0>(u, rest)
            r = Reshape(h, to)
            y = MatMul(r, w2)
        }"""
    )
    model = load(proto, tmp_path)
    assert [n.op for n in model.nodes] == ["Conv", "Reshape", "MatMul"]
    # The batch is copied; the features may be named or left over.
    assert model.constants[model.nodes[1].inputs[1]].tolist() in ([0, 128], [0, -1])
    _same_function(proto, model)


def test_reshape_with_two_free_lengths_stays_computed(tmp_path: Path) -> None:
    proto = build(
        """(float[N,4,T] x) => (float[N,T,4] y) <int64 zero = {0}, int64 two = {2}, int64[1] at = {0},
        int64[1] four = {4}, float[4,4] w> {
            s = Shape(x)
            n = Gather(s, zero)
            t = Gather(s, two)
            n1 = Unsqueeze(n, at)
            t1 = Unsqueeze(t, at)
            to = Concat<axis = 0>(n1, t1, four)
            r = Reshape(x, to)
            y = MatMul(r, w)
        }"""
    )
    model = load(proto, tmp_path)
    # One constant target cannot name both the batch and the length: at most one may be -1.
    values = feed(model, 0, 3)
    values["x"] = np.random.default_rng(0).standard_normal((3, 4, 7)).astype(np.float32)
    assert distance(Session(proto, "cpu").run(values), Session(model.proto, "cpu").run(values)) == 0


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    proto = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17, "mine": 1]>
        net (float[N,5] x) => (float[N,3] y) <float[5,8] w, float[8,3] v> {
            h = mine.scaled_relu(x, w)
            y = MatMul(h, v)
        }
        <domain: "mine", opset_import: ["": 17]>
        scaled_relu (a, b) => (c) { m = MatMul(a, b)  c = Relu(m) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (5, 8)), ("v", (8, 3))):
        proto.graph.initializer.append(
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    del proto.graph.value_info[:]
    model = load(proto, tmp_path)
    assert [n.op for n in model.nodes] == ["MatMul", "Relu", "MatMul"]
    assert not model.proto.functions
    assert couple(model).n_units == 8
    _same_function(proto, model)


def test_constant_of_a_function_is_stored_once(tmp_path: Path) -> None:
    proto = parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17, "mine": 1]>
        net (float[N,5] x) => (float[N,5] y) { a = mine.block(x)  y = mine.block(a) }
        <domain: "mine", opset_import: ["": 17]>
        block (a) => (c) { m = MatMul(a, w)  r = Relu(m)  o = MatMul(r, v)  c = Add(a, o) }"""
    )
    rng = np.random.default_rng(0)
    weights = {"w": (5, 8), "v": (8, 5)}
    for name, shape in weights.items():
        tensor = numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32))
        proto.functions[0].node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    model = load(proto, tmp_path)
    assert sorted([*tensor.dims] for tensor in model.proto.graph.initializer) == [[5, 8], [8, 5]]
    assert couple(model).n_units == 8
    _same_function(proto, model)


def test_output_of_unknown_type_is_read(tmp_path: Path) -> None:
    text = """(float[2,2] x) => (float[2,2] y) { r = Relu(x)  i = com.microsoft.Inverse(r)  y = Identity(i) }"""
    model = load(build(text, domains={"com.microsoft": 1}), tmp_path)
    value = np.asarray([[2, 0], [1, 4]], np.float32)
    (found,) = Session(with_outputs(model, ["i"]), "cpu").run({"x": value})
    assert np.allclose(found, np.linalg.inv(value))


def test_initialisers_listed_as_inputs_are_constants(tmp_path: Path) -> None:
    proto = build(NET, opset=8, ir=3, weights_as_inputs=True)
    assert len(proto.graph.input) == 4
    model = load(proto, tmp_path)
    assert [p.name for p in model.inputs] == ["x"]
    assert [v.name for v in model.proto.graph.input] == ["x"]
    # Initialisers that are no inputs need version 4 of the format.
    assert model.proto.ir_version >= 4
    _same_function(proto, model)


def test_quantised_weights_stay_quantised(tmp_path: Path) -> None:
    codes = ", ".join(str(i - 12) for i in range(24))
    proto = build(
        f"""(float[N,3] x) => (float[N,8] y) <int8[3,8] codes = {{{codes}}}, float s = {{0.1}}> {{
            w = DequantizeLinear(codes, s)
            y = MatMul(x, w)
        }}"""
    )
    model = load(proto, tmp_path)
    assert [n.op for n in model.nodes] == ["DequantizeLinear", "MatMul"]
    assert model.constants["codes"].dtype == np.int8


# ------------------------------------------------------------------------------------------ precisions and opsets


def _exact_after_loading(proto: ModelProto, folder: Path, units: int, tolerance: float) -> Model:
    model = load(proto, folder)
    values = feed(model, 1, 2)
    apart = distance(Session(proto, "cpu").run(values), Session(model.proto, "cpu").run(values))
    assert apart <= tolerance
    coupling = couple(model)
    assert coupling.n_units == units, coupling.pinned
    assert_exact(model, coupling, keep_one(coupling, np.random.default_rng(0)), tolerance, (1, 2))
    return model


def test_half_precision_inside_single_precision(tmp_path: Path) -> None:
    proto = build(
        """(float[N,3,6,6] x) => (float[N,4] y)
        <float16[8,3,3,3] w1, float16[8] b1, float16[128,10] w2, float[10,4] w3> {
            half = Cast<to = 10>(x)
            c = Conv(half, w1, b1)
            h = Relu(c)
            f = Flatten(h)
            m = MatMul(f, w2)
            whole = Cast<to = 1>(m)
            y = MatMul(whole, w3)
        }"""
    )
    model = _exact_after_loading(proto, tmp_path, 18, 2e-2)
    kinds = {n: model.dtypes[n].name for n in ("w1", "b1", "w2", "w3")}
    assert kinds == {"w1": "float16", "b1": "float16", "w2": "float16", "w3": "float32"}


def test_bfloat16_weights_are_used_in_single_precision(tmp_path: Path) -> None:
    """Stored in half the bytes and used in single precision."""
    proto = build(
        """(float[N,5] x) => (float[N,3] y) <bfloat16[5,8] w1, bfloat16[8,3] w2> {
            v1 = Cast<to = 1>(w1)
            a = MatMul(x, v1)
            h = Relu(a)
            v2 = Cast<to = 1>(w2)
            y = MatMul(h, v2)
        }"""
    )
    _exact_after_loading(proto, tmp_path, 8, 1e-5)


@pytest.mark.parametrize("kind", ["float16", "float", "double"])
def test_constant_nodes_as_weights(tmp_path: Path, kind: str) -> None:
    proto = build(
        f"({kind}[N,5] x) => ({kind}[N,3] y) <{kind}[5,8] w1, {kind}[8] b1, {kind}[8,3] w2> {{ "
        "a = MatMul(x, w1)  c = Add(a, b1)  h = Relu(c)  y = MatMul(h, w2) }"
    )
    for tensor in list(proto.graph.initializer):
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del proto.graph.initializer[:]
    model = _exact_after_loading(proto, tmp_path, 8, 2e-2 if kind == "float16" else 1e-5)
    assert set(model.constants) == {"w1", "b1", "w2"}
    assert model.constants["w1"].dtype == model.inputs[0].dtype


@pytest.mark.parametrize("opset", range(9, OPSET + 1))
def test_every_supported_opset_loads(tmp_path: Path, opset: int) -> None:
    proto = build(NET, opset=opset, ir=3 if opset == 9 else 8, weights_as_inputs=opset == 9)
    model = _exact_after_loading(proto, tmp_path, 8, 1e-5)
    assert {o.domain: o.version for o in model.proto.opset_import}[""] == opset
    assert {n.version for n in model.nodes} == {opset}
