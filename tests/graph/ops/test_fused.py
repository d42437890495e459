"""Fused operators of optimised files: written out, they compute the same and are pruned like the file before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cases_quantized import codes, gains
from graphs import assert_exact, build, distance, feed, load, random_keep

from onnx_oamip.core.records import Array
from onnx_oamip.graph import cost
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.ops.fused import _WRITERS
from onnx_oamip.graph.runtime import Session

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Network:
    """One fused node between layers, the operators that it becomes, and the units counted by hand."""

    op: str
    text: str
    parts: frozenset[str]
    units: int
    macs: int
    opset: int = 17
    domain: str = MICROSOFT

    def __str__(self) -> str:
        return f"{self.op}-{self.opset}-{'-'.join(sorted(self.parts))}"


def _image(activation: str, inputs: str = "h, wf, bf", attributes: str = "") -> str:
    return f"""(float[N,3,6,6] x) => (float[N,4,6,6] y)
    <float[8,3,3,3] w1, float[8,8,1,1] wf, float[8] bf, float[4,8,1,1] w2> {{
        h = Conv<pads = [1, 1, 1, 1]>(x, w1)
        r = com.microsoft.FusedConv<activation = "{activation}"{attributes}>({inputs})
        y = Conv(r, w2)
    }}"""


_IMAGE_MACS = 36 * (8 * 27 + 64 + 32)


def _tokens(body: str, weights: str = "") -> str:
    return f"""(float[N,4,5] x) => (float[N,4,3] y)
    <float[5,8] w1, float[5,8] w2, float[8] bias, float[8] gain, float[8] beta, float[8,3] w3{weights}> {{
        h = MatMul(x, w1)
        k = MatMul(x, w2)
        {body}
        y = MatMul(r, w3)
    }}"""


_TOKENS_MACS = 4 * (40 + 40 + 24)
_SKIP = "r = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(h, k, gain, beta, bias)"
_SKIP_SUM = """n, , , s = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(h, k, gain, beta)
    r = Add(n, s)"""
_SKIP_RMS = "r = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.001>(h, k, gain, bias)"
_EMBEDDING = """(int32[N,4] ids, int32[N,4] kinds) => (float[N,4,3] y)
<float[5,8] words, float[6,8] places, float[5,8] types, float[8] gain, float[8] beta, float[8,3] w3,
 int64[2] last = {1, 2}> {
    e, none = com.microsoft.EmbedLayerNormalization<epsilon = 0.001>(
        ids, kinds, words, places, types, gain, beta)
    f = Cast<to = 1>(none)
    n = Unsqueeze(f, last)
    r = Add(e, n)
    y = MatMul(r, w3)
}"""
_EMBEDDING_AT = """(int32[N,4] ids, int32[N,4] which, int32[N,4] mask) => (float[N,4,3] y, int32[N] lengths)
<float[5,8] words, float[6,8] places, float[8] gain, float[8] beta, float[8,3] w3, int32 one = {1}> {
    m = Min(mask, one)
    r, lengths = com.microsoft.EmbedLayerNormalization<epsilon = 0.001>(
        ids, , words, places, , gain, beta, m, which)
    y = MatMul(r, w3)
}"""
_GEMM = """(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,8] wf, float[8] bf, float[8,3] w3> {
    h = MatMul(x, w1)
    r = com.microsoft.FusedGemm<activation = "LeakyRelu", activation_alpha = 0.2, transB = 1>(h, wf, bf)
    y = MatMul(r, w3)
}"""
_NORM = frozenset({"Add", "LayerNormalization"})
_LONG = frozenset({"ReduceMean", "Sqrt", "Div"})
NETWORKS = [
    Network("FusedConv", _image("Relu"), frozenset({"Conv", "Relu"}), 8 + 8, _IMAGE_MACS),
    Network(
        "FusedConv",
        _image("Relu", "h, wf, bf, h"),
        frozenset({"Conv", "Add", "Relu"}),
        8,
        _IMAGE_MACS,
    ),
    Network(
        "FusedConv",
        _image("Clip", attributes=", activation_params = [0.0, 0.5]"),
        frozenset({"Conv", "Clip"}),
        8 + 8,
        _IMAGE_MACS,
    ),
    Network(
        "FusedConv",
        _image("LeakyRelu", "h, wf", ", activation_params = [0.3]"),
        frozenset({"Conv", "LeakyRelu"}),
        8 + 8,
        _IMAGE_MACS,
    ),
    Network("FusedGemm", _GEMM, frozenset({"Gemm", "LeakyRelu"}), 8 + 8, 40 + 64 + 24),
    Network(
        "FusedMatMul",
        _tokens("r = com.microsoft.FusedMatMul<alpha = 0.5>(h, wf)", ", float[8,8] wf"),
        frozenset({"MatMul", "Mul"}),
        8 + 8,
        4 * (40 + 64 + 24),
    ),
    Network(
        "FusedMatMul",
        _tokens("r = com.microsoft.FusedMatMul<transB = 1>(h, wf)", ", float[8,8] wf"),
        frozenset({"MatMul"}),
        8 + 8,
        4 * (40 + 64 + 24),
    ),
    Network(
        "FusedMatMul",
        _tokens(
            "l = com.microsoft.FusedMatMul<alpha = 0.25, transB = 1>(h, k)  p = Softmax(l)"
            "  v = MatMul(x, w4)  r = MatMul(p, v)",
            ", float[5,8] w4",
        ),
        frozenset({"Einsum", "Mul"}),
        # Queries and keys go together, values by themselves.
        8 + 8,
        4 * (3 * 40 + 24) + 2 * 4 * 4 * 8,
    ),
    Network("SkipLayerNormalization", _tokens(_SKIP), _NORM, 8, _TOKENS_MACS),
    Network("SkipLayerNormalization", _tokens(_SKIP_SUM), _NORM, 8, _TOKENS_MACS),
    Network("SkipLayerNormalization", _tokens(_SKIP), _LONG, 8, _TOKENS_MACS, opset=13),
    Network("SkipSimplifiedLayerNormalization", _tokens(_SKIP_RMS), _LONG, 8, _TOKENS_MACS),
    Network("EmbedLayerNormalization", _EMBEDDING, _NORM | {"Gather"}, 8, 4 * 24),
    Network("EmbedLayerNormalization", _EMBEDDING_AT, _NORM | {"Gather", "ReduceSum"}, 8, 4 * 24),
    Network(
        "BiasGelu",
        _tokens("s = com.microsoft.BiasGelu(h, bias)  r = Add(s, k)"),
        frozenset({"Add", "Gelu"}),
        8,
        _TOKENS_MACS,
    ),
    Network(
        "FastGelu",
        _tokens("s = com.microsoft.FastGelu(h, bias)  r = Add(s, k)"),
        frozenset({"Add", "FastGelu"}),
        8,
        _TOKENS_MACS,
    ),
    Network(
        "LayerNormalization",
        _tokens("s = LayerNormalization(h, gain, beta)  r = Add(s, k)"),
        _LONG,
        8,
        _TOKENS_MACS,
        opset=13,
        domain="",
    ),
    Network(
        "SimplifiedLayerNormalization",
        _tokens("s = SimplifiedLayerNormalization(h, gain)  r = Add(s, k)"),
        _LONG,
        8,
        _TOKENS_MACS,
        domain="",
    ),
]
_FORMAT = "float s = {0.02}, uint8 z = {120}, float t = {0.05}, uint8 o = {90}"


def _coded(body: str, weights: str = "") -> str:
    """Features in codes ``q`` and ``p`` between float layers; the operator gives the codes ``r``."""
    return f"""(float[N,5] x) => (float[N,3] y) <float[5,8] w1, float[5,8] w2, float[8,3] w3, {_FORMAT}{weights}> {{
        h = MatMul(x, w1)
        k = MatMul(x, w2)
        q = QuantizeLinear(h, s, z)
        p = QuantizeLinear(k, t, o)
        {body}
        d = DequantizeLinear(r, t, o)
        y = MatMul(d, w3)
    }}"""


def _coded_image(body: str) -> str:
    return f"""(float[N,3,6,6] x) => (float[N,4] y) <float[8,3,3,3] w1, float[8,4] w2, {_FORMAT}> {{
        h = Conv<pads = [1, 1, 1, 1]>(x, w1)
        q = QuantizeLinear(h, s, z)
        {body}
        d = DequantizeLinear(r, t, o)
        g = ReduceMax<axes = [2, 3], keepdims = 0>(d)
        y = MatMul(g, w2)
    }}"""


_CODED_MACS = 40 + 40 + 24
_CODES = frozenset({"QuantizeLinear", "DequantizeLinear"})
_POOLED_MACS = 36 * 8 * 27 + 32
_MATRIX = f", {codes('int8', 'wq', 8, 8)}, {codes('int32', 'bq', 8, low=-900, high=900)}"
NETWORKS += [
    Network(
        f"QLinear{op}",
        _coded(f"r = com.microsoft.QLinear{op}(q, s, z, p, t, o, t, o)"),
        _CODES | {op},
        8,
        _CODED_MACS,
    )
    for op in ("Add", "Mul")
]
NETWORKS += [
    Network(
        f"QLinear{op}",
        _coded(
            f"m = com.microsoft.QLinear{op}{attributes}(q, s, z, t, o)"
            " r = com.microsoft.QLinearAdd(m, t, o, p, t, o, t, o)"
        ),
        _CODES | {op, "Add"},
        8,
        _CODED_MACS,
    )
    for op, attributes in (("Sigmoid", ""), ("LeakyRelu", "<alpha = 0.2>"))
]
NETWORKS += [
    Network(
        "QLinearConcat",
        _coded("r = com.microsoft.QLinearConcat<axis = 1>(t, o, q, s, z, p, t, o)").replace(
            "float[8,3] w3", "float[16,3] w3"
        ),
        _CODES | {"Concat"},
        8 + 8,
        40 + 40 + 48,
    ),
    Network(
        "QLinearSoftmax",
        _coded(
            "m = com.microsoft.QLinearSoftmax<axis = -1, opset = 17>(p, t, o, f, n)"
            " r = com.microsoft.QLinearMul(q, s, z, m, f, n, t, o)",
            ", float f = {0.00390625}, uint8 n = {0}",
        ),
        _CODES | {"Softmax", "Mul"},
        0,
        _CODED_MACS,
    ),
    Network(
        "QLinearGlobalAveragePool",
        _coded_image("r = com.microsoft.QLinearGlobalAveragePool(q, s, z, t, o)"),
        _CODES | {"GlobalAveragePool"},
        8,
        _POOLED_MACS,
    ),
    Network(
        "QLinearAveragePool",
        _coded_image(
            "r = com.microsoft.QLinearAveragePool<kernel_shape = [2, 2], strides = [2, 2]>(q, s, z, t, o)"
        ),
        _CODES | {"AveragePool"},
        8,
        _POOLED_MACS,
    ),
    *(
        Network(
            "QGemm",
            _coded(
                f"g = com.microsoft.QGemm<transB = {turned}>(q, s, z, wq, v, u, bq, t, o)"
                " r = com.microsoft.QLinearAdd(g, t, o, p, t, o, t, o)",
                f"{_MATRIX}, {scales}",
            ),
            _CODES | {"Gemm", "Add"},
            8 + 8,
            _CODED_MACS + 64,
        )
        for turned, scales in (
            (0, "float v = {0.01}, int8 u = {0}"),
            (0, f"{gains('v', 8)}, {codes('int8', 'u', 8, low=0, high=0)}"),
            (1, f"{gains('v', 8)}, {codes('int8', 'u', 8, low=0, high=0)}"),
        )
    ),
    Network(
        "QGemm",
        _coded(
            "m = com.microsoft.QGemm(q, s, z, wq, v, u) r = QuantizeLinear(m, t, o)",
            f"{_MATRIX}, float v = {{0.01}}, int8 u = {{0}}",
        ).replace("k = MatMul(x, w2)", "k = Identity(h)"),
        _CODES | {"Gemm"},
        8 + 8,
        40 + 64 + 24,
    ),
]
WITHOUT_A_CPU_KERNEL = {(MICROSOFT, "BiasAdd")}


def _proto(network: Network) -> onnx.ModelProto:
    return build(network.text, network.opset, domains={MICROSOFT: 1})


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_parts_compute_the_same_and_are_pruned_like_the_layers_before_the_fusion(
    network: Network, tmp_path: Path
) -> None:
    proto = _proto(network)
    assert network.op in {node.op_type for node in proto.graph.node}
    model = load(proto, tmp_path)
    assert any(network.op in note for note in model.notes)
    kinds = {node.op for node in model.nodes}
    assert network.parts <= kinds, kinds
    assert {node.domain for node in model.nodes} <= {"", MICROSOFT}
    values = feed(model, 3, 2)
    written_out = Session(model.proto, "cpu")
    assert distance(_run_as_it_stands(proto, values), written_out.run(values)) <= 1e-5
    coupling = couple(model)
    assert coupling.n_units == network.units, [p.reason for p in coupling.pinned]
    assert cost.count(model).macs == network.macs
    assert_exact(model, coupling, random_keep(coupling, np.random.default_rng(0), 0.5))


def _run_as_it_stands(proto: onnx.ModelProto, values: dict[str, Array]) -> list[Array]:
    """Outputs without the optimiser of ONNX Runtime: that of 1.23 leaves out the sum of a FusedConv."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, values))


def test_every_fused_operator_has_a_network() -> None:
    covered = {(network.domain, network.op) for network in NETWORKS}
    assert covered == _WRITERS.keys() - WITHOUT_A_CPU_KERNEL


def test_addition_of_a_bias_and_a_skip_connection_is_written_out(tmp_path: Path) -> None:
    """No kernel of ONNX Runtime's for processors runs BiasAdd: only the parts are looked at."""
    text = _tokens("r = com.microsoft.BiasAdd(h, bias, k)")
    model = load(build(text, domains={MICROSOFT: 1}), tmp_path)
    assert [node.op for node in model.nodes] == ["MatMul", "MatMul", "Add", "Add", "MatMul"]
    assert couple(model).n_units == 8


def test_unknown_activation_leaves_the_fused_node(tmp_path: Path) -> None:
    model = load(build(_image("Tan"), domains={MICROSOFT: 1}), tmp_path)
    assert "FusedConv" in {node.op for node in model.nodes}
    assert model.notes == ()


def test_half_precision_keeps_its_type(tmp_path: Path) -> None:
    text = _tokens(_SKIP).replace("float[", "float16[")
    model = load(build(text, 13, domains={MICROSOFT: 1}), tmp_path)
    assert {model.dtypes[name].name for node in model.nodes for name in node.outputs} == {"float16"}
