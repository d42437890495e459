"""Linear streams: any change of basis leaves the model as it is, and nothing else than linear nodes is between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import ATTENTION, CNN, RESIDUAL, assert_exact, build, distance, feed, load, random_keep
from hypothesis import given, settings
from onnx import ModelProto, TensorProto, numpy_helper
from random_networks import Network, networks

from onnx_oamip.core.records import Model
from onnx_oamip.graph import linear_streams
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.linear_streams import Basis, Stream
from onnx_oamip.graph.runtime import Session

BOTTLENECKS = """(float[N,3,6,6] x) => (float[N,4] y)
<float[6,3,1,1] w0, float[6] b0, float[9,6,1,1] we, float[9,1,3,3] wd, float[6,9,1,1] wp, float[6] bp,
 float[8,6,3,3] wh, float[8,4] wy> {
    a = Conv(x, w0, b0)
    e = Conv(a, we)
    r = Relu(e)
    d = Conv<group = 9, pads = [1, 1, 1, 1]>(r, wd)
    t = Relu(d)
    p = Conv(t, wp, bp)
    s = Add(a, p)
    h = Conv<pads = [1, 1, 1, 1]>(s, wh)
    u = Relu(h)
    g = GlobalAveragePool(u)
    f = Flatten(g)
    y = MatMul(f, wy)
}"""


HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _bases(streams: tuple[Stream, ...], seed: int = 0) -> list[tuple[Stream, Basis]]:
    """Random orthogonal bases with rows of different lengths: an inverse is then no transpose."""
    rng = np.random.default_rng(seed)
    result = []
    for stream in streams:
        shape = (stream.blocks, stream.width, stream.width)
        forward = np.linalg.qr(rng.normal(size=shape))[0] * rng.uniform(0.5, 2, (*shape[:2], 1))
        result.append((stream, Basis(forward, np.linalg.inv(forward))))
    return result


def _difference(model: Model, other: Model) -> float:
    values = feed(model, 0, 3)
    return distance(*(Session(m.proto, "cpu", exact=True).run(values) for m in (model, other)))


def _found(proto: ModelProto, folder: Path) -> tuple[Model, list[str], dict[str, str]]:
    model = load(proto, folder)
    coupling = couple(model)
    streams, reasons = linear_streams.find(model, coupling)
    return model, [coupling.groups[s.group].name for s in streams], dict(reasons)


def test_residual_stream_of_bottlenecks_is_found_with_its_writers_readers_and_biases(
    tmp_path: Path,
) -> None:
    model = load(build(BOTTLENECKS), tmp_path)
    coupling = couple(model)
    (stream,), reasons = linear_streams.find(model, coupling)
    side = stream.side
    assert (stream.width, stream.blocks, stream.opposite) == (6, 1, None)
    assert sorted(place.weight for place in side.writers) == ["w0", "wp"]
    assert sorted(place.weight for place in side.readers) == ["we", "wh"]
    assert sorted(a.node.inputs[a.slot] for a in side.addends) == ["b0", "bp"]
    assert side.last == ("s", 1)
    assert len(reasons) == len(coupling.groups) - 1
    assert all("Relu" in reason for reason in reasons.values())


def test_change_of_basis_moves_every_weight_of_a_stream_and_no_other(tmp_path: Path) -> None:
    model = load(build(BOTTLENECKS), tmp_path)
    streams, _ = linear_streams.find(model, couple(model))
    (pair,) = _bases(streams)
    turned = linear_streams.rotated(model, [pair])
    forward, inverse = pair[1].forward[0], pair[1].inverse[0]
    old, new = model.constants, turned.constants
    assert np.allclose(new["b0"], forward @ old["b0"], atol=1e-6)
    assert np.allclose(new["wp"][:, :, 0, 0], forward @ old["wp"][:, :, 0, 0], atol=1e-6)
    by_tap = np.einsum("oihw,ij->ojhw", old["wh"], inverse)
    assert np.allclose(new["wh"], by_tap, atol=1e-5)
    assert all(np.array_equal(old[name], new[name]) for name in ("wd", "wy"))
    assert _difference(model, turned) < 1e-5


def test_pruned_model_equals_the_masked_one_in_the_new_basis(tmp_path: Path) -> None:
    model = load(build(BOTTLENECKS), tmp_path)
    coupling = couple(model)
    turned = linear_streams.rotated(model, _bases(linear_streams.find(model, coupling)[0]))
    again = couple(turned)
    assert list(again.axes) == list(coupling.axes)
    assert_exact(turned, again, random_keep(again, np.random.default_rng(0), 0.5))


def test_attention_has_a_stream_of_values_and_a_pair_of_queries_and_keys(tmp_path: Path) -> None:
    model = load(build(ATTENTION), tmp_path)
    coupling = couple(model)
    streams, _ = linear_streams.find(model, coupling)
    pairs = [stream for stream in streams if stream.opposite is not None]
    values = [stream for stream in streams if stream.opposite is None and stream.blocks == 3]
    assert len(pairs) == len(values) == 1
    assert pairs[0].blocks == 3
    assert {place.weight for place in values[0].side.writers} == {"wv"}
    assert {place.weight for place in values[0].side.readers} == {"wo"}
    turned = linear_streams.rotated(model, _bases(streams))
    assert not np.allclose(turned.constants["wk"], model.constants["wk"])
    assert _difference(model, turned) < 1e-5


HEAD = "h = Conv<pads = [1, 1, 1, 1]>(s, wh)"
WRITTEN = "p = Conv(t, wp, bp)"
WITH_PARAMETERS = BOTTLENECKS.replace(
    "float[8,4] wy>",
    "float[8,4] wy, float[6] g1, float[6] s1, float[6] m1, float[6] v1,"
    " float[6] g2, float[6] s2, float[6] m2, float[6] v2>",
)
NORMALISED = WITH_PARAMETERS.replace(
    HEAD, "n = BatchNormalization(s, g1, s1, m1, v1)\n    h = Conv<pads = [1, 1, 1, 1]>(n, wh)"
).replace(
    WRITTEN, "q = Conv(t, wp, bp)\n    p = BatchNormalization<epsilon = 0.1>(q, g2, s2, m2, v2)"
)


def _normalised(text: str = NORMALISED, **changes: list[float]) -> ModelProto:
    """The network with batch normalisations behind a writer and in front of a reader."""
    proto = build(text)
    rng = np.random.default_rng(3)
    for tensor in proto.graph.initializer:
        if tensor.name in ("v1", "v2", "g1", "g2"):
            value = changes.get(tensor.name, rng.uniform(0.3, 2, 6))
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), tensor.name))
    return proto


def test_batch_normalisations_beside_linear_nodes_are_part_of_a_stream(tmp_path: Path) -> None:
    model = load(_normalised(), tmp_path)
    coupling = couple(model)
    streams, _ = linear_streams.find(model, coupling)
    (stream,) = streams
    where = [(norm.node.outputs[0], norm.is_behind) for norm in stream.side.norms]
    assert sorted(where) == [("n", False), ("p", True)]
    assert linear_streams.without_norms(model, ()) is model
    plain = linear_streams.without_norms(model, streams)
    assert not np.allclose(plain.constants["wp"], model.constants["wp"])
    assert _difference(model, plain) < 1e-5
    turned = linear_streams.rotated(model, _bases(streams))
    assert _difference(model, turned) < 1e-5
    again = couple(turned)
    assert list(again.axes) == list(coupling.axes)
    assert_exact(turned, again, random_keep(again, np.random.default_rng(0), 0.5))


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (_normalised(g1=[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]), "factors near zero"),
        (
            _normalised(
                NORMALISED.replace("(n, wh)", "(nr, wh)").replace(
                    "    h = Conv", "    nr = Relu(n)\n    h = Conv"
                )
            ),
            "neither right behind a linear node",
        ),
        (_normalised(NORMALISED.replace("v2)", "v1)")), "several nodes share"),
    ],
    ids=["no factor", "before an activation", "shared parameters"],
)
def test_stream_keeps_channels_where_no_linear_node_takes_the_factors(
    proto: ModelProto, reason: str, tmp_path: Path
) -> None:
    _, streams, reasons = _found(proto, tmp_path)
    assert streams == []
    assert any(reason in found for found in reasons.values()), reasons


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOTTLENECKS.replace("s = Add(a, p)", "q = Add(a, p)\n    s = Relu(q)"), "Relu"),
        (BOTTLENECKS.replace("s = Add(a, p)", "s = Mul(a, p)"), "Mul"),
        (
            BOTTLENECKS.replace(
                "float[6,3,1,1] w0", "float[6,3,1,1] w0, float[6,1,3,3] wz"
            ).replace(
                "s = Add(a, p)",
                "q = Add(a, p)\n    s = Conv<group = 6, pads = [1, 1, 1, 1]>(q, wz)",
            ),
            "6 groups",
        ),
    ],
    ids=["activation", "product", "depthwise"],
)
def test_stream_with_another_node_between_keeps_its_channels(
    text: str, reason: str, tmp_path: Path
) -> None:
    _, streams, reasons = _found(build(text), tmp_path)
    assert streams == []
    assert reason in reasons["w0"]


def test_graph_output_and_concatenation_are_no_streams(tmp_path: Path) -> None:
    shown = BOTTLENECKS.replace("=> (float[N,4] y)", "=> (float[N,4] y, float[N,6,6,6] s)")
    _, streams, reasons = _found(build(shown), tmp_path)
    assert streams == []
    assert "w0" not in reasons  # its channels are pinned
    joined = BOTTLENECKS.replace("s = Add(a, p)", "s = Concat<axis = 1>(a, p)").replace(
        "float[8,6,3,3] wh", "float[8,12,3,3] wh"
    )
    _, streams, reasons = _found(build(joined), tmp_path)
    assert streams == []
    assert "among others" in reasons["w0"]


def test_shared_and_sparse_weights_are_left(tmp_path: Path) -> None:
    twice = "i = Conv(s, we)\n    j = Relu(i)\n    h = Conv<pads = [1, 1, 1, 1]>(j, wh)"
    shared = build(
        BOTTLENECKS.replace(HEAD, twice).replace("float[8,6,3,3] wh", "float[8,9,3,3] wh")
    )
    _, streams, reasons = _found(shared, tmp_path)
    assert streams == []
    assert "share the weight 'we'" in reasons["w0"]
    sparse = build(BOTTLENECKS)
    for tensor in sparse.graph.initializer:
        if tensor.name == "wh":
            values = numpy_helper.to_array(tensor).copy()
            values[:, :, 0] = values[:, :, 1] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, "wh"))
    _, streams, reasons = _found(sparse, tmp_path)
    assert streams == []
    assert "sparse" in reasons["w0"]


def test_half_precision_is_rotated_within_its_rounding(tmp_path: Path) -> None:
    text = BOTTLENECKS.replace("float[", "float16[")
    model = load(build(text), tmp_path)
    streams, _ = linear_streams.find(model, couple(model))
    assert len(streams) == 1
    turned = linear_streams.rotated(model, _bases(streams))
    assert turned.constants["w0"].dtype == np.float16
    assert _difference(model, turned) < 1e-2


@pytest.mark.parametrize("text", [CNN, RESIDUAL])
def test_networks_of_activations_have_no_stream(text: str, tmp_path: Path) -> None:
    assert _found(build(text), tmp_path)[1] == []


def _residual_network(seed: int) -> ModelProto:
    """Blocks with activations inside around a stream of a few channels, which other linear nodes pass."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(3, 8))
    weights = [f"float[{width},3,1,1] w", f"float[{width}] b"]
    lines = ["s0 = Conv(x, w, b)"]
    last = "s0"
    for i in range(int(rng.integers(1, 5))):
        inner = int(rng.integers(2, 9))
        kernel = int(rng.choice([1, 3]))
        pads = [kernel // 2] * 4
        weights += [
            f"float[{inner},{width},{kernel},{kernel}] e{i}",
            f"float[{width},{inner},1,1] p{i}",
            f"float[{width},1,1] a{i}",
            f"float k{i}",
        ]
        between = [
            f"o{i} = Identity(n{i})",
            f"o{i} = AveragePool<kernel_shape = [2, 2], pads = [0, 0, 1, 1]>(n{i})",
            f"o{i} = Add(a{i}, n{i})",
            f"o{i} = Mul(n{i}, k{i})",
            f"t{i} = Transpose<perm = [0, 2, 3, 1]>(n{i})\no{i} = Transpose<perm = [0, 3, 1, 2]>(t{i})",
        ]
        lines += [
            f"h{i} = Conv<pads = {pads}>({last}, e{i})",
            f"r{i} = Relu(h{i})",
            f"q{i} = Conv(r{i}, p{i})",
            f"n{i} = Add({last}, q{i})" if rng.integers(2) else f"n{i} = Add(q{i}, {last})",
            str(rng.choice(between)),
        ]
        last = f"o{i}"
    weights.append(f"float[{width},4] y0")
    lines += [f"g = GlobalAveragePool({last})", "f = Flatten(g)", "y = Gemm(f, y0)"]
    body = "\n".join(lines)
    return build(
        f"(float[N,3,4,4] x) => (float[N,4] y) <{', '.join(weights)}> {{ {body} }}", seed=seed
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_residual_networks_compute_the_same_in_any_basis(seed: int, tmp_path: Path) -> None:
    model = load(_residual_network(seed), tmp_path)
    coupling = couple(model)
    (stream,), reasons = linear_streams.find(model, coupling)
    assert len(reasons) == len(coupling.groups) - 1
    assert {place.weight for place in stream.side.writers} >= {"w", "p0"}
    assert {place.weight for place in stream.side.readers} >= {"e0", "y0"}
    turned = linear_streams.rotated(model, _bases((stream,), seed))
    assert _difference(model, turned) < 1e-5
    again = couple(turned)
    assert_exact(turned, again, random_keep(again, np.random.default_rng(seed), 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def test_random_networks_of_all_operators_compute_the_same_in_any_basis(folder: Path) -> None:
    seen = [0]

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(networks())
    def check(network: Network) -> None:
        model = load(network.proto, folder)
        streams, _ = linear_streams.find(model, couple(model))
        if streams:
            few_bits = any(w.data_type in HALF for w in network.proto.graph.initializer)
            turned = linear_streams.rotated(model, _bases(streams))
            assert _difference(model, turned) < (2e-3 if few_bits else 1e-5)
            seen[0] += len(streams)

    check()
    assert seen[0]
