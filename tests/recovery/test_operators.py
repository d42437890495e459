"""Operators in torch: equal to ONNX Runtime, with gradients that agree with finite differences."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from cases import CASES, OpCase, unknown_here
from graphs import build, feed, load
from onnx import helper, numpy_helper

from onnx_oamip.core.records import Model
from onnx_oamip.graph.ops import REGISTRY
from onnx_oamip.graph.runtime import Session

torch = pytest.importorskip("torch")

from onnx_oamip.recovery import engine  # noqa: E402
from onnx_oamip.recovery.operators import TABLE  # noqa: E402
from onnx_oamip.recovery.trainable import Trainable  # noqa: E402

NOT_COMPUTED = {
    "ConvInteger",
    "DeformConv",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "GroupQueryAttention",
    "Imputer",
    "Loop",
    "MatMulInteger",
    "MatMulNBits",
    "MaxRoiPool",
    "Normalizer",
    "QLinearConv",
    "QLinearMatMul",
    "RoiAlign",
    "Scaler",
    "Scan",
}
"""Operators that are followed by pruning and not computed by torch; a recovery trains what lies around them."""
FORMS = {
    "bitshift",
    "dequantise-in-blocks",
    "lstm-activations",
    "max-pool-with-indices",
    "ms-attention-past",
    "scatter-into-filled-rows-of-a-listed-length",
    "scatter-nd-max",
    "scatter-nd-min",
    "scatter-nd-mul",
    "standard-attention-states-given-out",
}
"""Cases with a form of a known operator that is refused by name."""
HALF = {"half-precision": 2e-3}
"""Cases of 16 bits, where ONNX Runtime rounds and torch computes in float32."""
OLD_FORMS = {
    "slice": (9, "y = Slice<axes = [1], starts = [1], ends = [-1]>(h)"),
    "split": (11, "y, z = Split<axis = 1, split = [2, 6]>(h)"),
    "squeeze": (11, "u = Unsqueeze<axes = [0, 3]>(h) y = Squeeze<axes = [0]>(u)"),
    "sum": (11, "y = ReduceSum<axes = [1], keepdims = 0>(h)"),
    "clip": (7, "y = Clip<min = -0.1, max = 0.2>(h)"),
    "softmax": (11, "u = Unsqueeze<axes = [2]>(h) y = Softmax<axis = 1>(u)"),
    "pad": (10, "y = Pad<pads = [0, 1, 0, 2], value = 0.5>(h)"),
    "upsample": (
        7,
        "u = Unsqueeze<axes = [2, 3]>(h) y = Upsample<scales = [1.0, 1.0, 2.0, 3.0]>(u)",
    ),
    "dropout": (7, "y = Dropout<ratio = 0.5>(h)"),
}
"""Forms of operators before their lists of numbers became inputs, by opset."""


def test_every_operator_is_computed_or_named() -> None:
    """Every operator that pruning follows has a function, or stands in the list of those that have none."""
    without_branch = {spec.name for spec in REGISTRY} - {"If"}
    assert without_branch - {name for _, name in TABLE} == NOT_COMPUTED


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_equals_onnx_runtime(case: OpCase, tmp_path: Path) -> None:
    reason = unknown_here(case)
    if reason:
        pytest.skip(reason)
    model = load(case.make(), tmp_path, case.bindings)
    values = feed(model, 0)
    if not all(engine.is_supported(node) for node in model.nodes):
        known = {*TABLE, ("", "If")}
        assert {(node.domain, node.op) for node in model.every} - known, "torch computes each"
        return
    names = [port.name for port in model.outputs]
    fed = {name: engine.as_tensor(value, "cpu") for name, value in values.items()}
    ours = engine.Engine(model, names)
    if case.name in FORMS:
        with pytest.raises(engine.CannotRun, match="cannot be computed by torch"):
            ours.run(fed)
        return
    _compare(model, values, ours.run(fed), HALF.get(case.name, 2e-5))


def _compare(model: Model, values: dict, found: list, tolerance: float) -> None:
    truths = Session(model.proto, "cpu", exact=True).run(values)
    assert len(found) == len(truths) > 0
    for truth, tensor in zip(truths, found, strict=True):
        ours = tensor.detach().numpy().astype(np.float64)
        theirs = np.asarray(truth).astype(np.float64)
        assert ours.shape == theirs.shape
        scale = np.abs(theirs).max(initial=0.0) or 1.0
        assert np.abs(ours - theirs).max(initial=0.0) <= tolerance * scale


@pytest.mark.parametrize("name", OLD_FORMS)
def test_old_form_equals_onnx_runtime(name: str, tmp_path: Path) -> None:
    opset, call = OLD_FORMS[name]
    text = f"""(float[N, 6] x) => (float[] y) <float[6, 8] w> {{
        h = MatMul(x, w)
        {call}
    }}"""
    model = load(build(text, opset), tmp_path)
    values = feed(model, 0)
    ours = engine.Engine(model, ["y"])
    fed = {key: engine.as_tensor(value, "cpu") for key, value in values.items()}
    _compare(model, values, ours.run(fed), 1e-5)


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16"])
def test_codes_of_every_length_equal_onnx_runtime(kind: str, tmp_path: Path) -> None:
    """Stored codes, and codes of activations, which leave the range at both ends."""
    text = """(float[N, 6] x) => (float[N, 5] y) <float scale = {0.04}> {
        w = DequantizeLinear(codes, scale, zero)
        h = MatMul(x, w)
        q = QuantizeLinear(h, fine, zero)
        y = DequantizeLinear(q, fine, zero)
    }"""
    kind_number = onnx.TensorProto.DataType.Value(kind)
    limits = ml_dtypes.iinfo(helper.tensor_dtype_to_np_dtype(kind_number))
    low, high = int(limits.min), int(limits.max)
    middle = (low + high + 1) // 2
    codes = np.random.default_rng(0).integers(middle - 8, middle + 8, 30)
    proto = build(text, opset=21, ir=10)
    for name, shape, values in (("codes", (6, 5), codes), ("zero", (), [middle])):
        proto.graph.initializer.append(helper.make_tensor(name, kind_number, shape, values))
    fine = np.float32(0.3 / (high - low))
    proto.graph.initializer.append(numpy_helper.from_array(fine, "fine"))
    model = load(proto, tmp_path)
    values = feed(model, 0)
    fed = {name: engine.as_tensor(value, "cpu") for name, value in values.items()}
    found = engine.Engine(model, ["y"]).run(fed)
    ends = fine * (np.array([low, high]) - middle)
    np.testing.assert_allclose([found[0].min(), found[0].max()], ends, rtol=1e-5)
    _compare(model, values, found, 2e-5)


SMOOTH = [
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Einsum",
    "Erf",
    "Gather",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "GRU",
    "HardSwish",
    "InstanceNormalization",
    "LayerNormalization",
    "LSTM",
    "MatMul",
    "Mul",
    "Pad",
    "Reshape",
    "Resize",
    "RNN",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Split",
    "Sum",
    "Swish",
    "Tanh",
    "Transpose",
    "com.microsoft.Attention",
    "com.microsoft.MultiHeadAttention",
    "Attention",
    "com.microsoft.RotaryEmbedding",
    "RotaryEmbedding",
]
"""Operators whose gradients are compared with finite differences."""


def _cases_of(operator: str) -> list[OpCase]:
    return [case for case in CASES if operator in case.ops and not unknown_here(case)]


@pytest.mark.parametrize("operator", SMOOTH)
def test_gradient_agrees_with_finite_differences(operator: str, tmp_path: Path) -> None:
    """The derivative along a random direction of all weights, in float64."""
    checked = 0
    for case in _cases_of(operator)[:6]:
        model = load(case.make(), tmp_path, case.bindings)
        names = [port.name for port in model.outputs if port.dtype == np.float32]
        weights = Trainable(model)(model.nodes)
        if not weights or not names or not all(engine.is_supported(n) for n in model.nodes):
            continue
        if case.name in FORMS:
            continue
        checked += _check_gradient(model, names, weights)
    assert checked, f"no case of {operator} has weights"


def _check_gradient(model: Model, names: list[str], weights: list[str]) -> int:
    """Compare one derivative; 0 where a kink or a rounding lies too near."""
    ours = engine.Engine(model, names, weights=weights)
    for name, value in ours._constants.items():
        if value.is_floating_point():
            ours._constants[name] = value.detach().double().requires_grad_(name in ours.weights)
    leaves = [ours._constants[name] for name in ours.weights]
    fed = {
        name: torch.from_numpy(value.astype(np.float64) if value.dtype.kind == "f" else value)
        for name, value in feed(model, 1).items()
    }
    rng = np.random.default_rng(2)
    factors: list = []

    def value() -> object:
        outputs = ours.run(fed)
        if not factors:
            factors.extend(torch.from_numpy(rng.normal(size=tuple(o.shape))) for o in outputs)
        return sum((o * f).sum() for o, f in zip(outputs, factors, strict=True))

    total = value()
    if not total.requires_grad:  # type: ignore[attr-defined]
        return 0
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    directions = [torch.from_numpy(rng.normal(size=tuple(w.shape))) for w in leaves]
    slope = sum(
        float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None
    )
    slopes = []
    with torch.no_grad():
        for step in (1e-6, 1e-7):
            sides = []
            for sign in (1, -2):
                for leaf, direction in zip(leaves, directions, strict=True):
                    leaf += sign * step * direction
                sides.append(float(value()))  # type: ignore[arg-type]
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += step * direction
            slopes.append((sides[0] - sides[1]) / (2 * step))
    assert slope == pytest.approx(slopes[0], rel=1e-4, abs=1e-5) or slope == pytest.approx(
        slopes[1], rel=1e-4, abs=1e-5
    )
    return 1
