"""Cases for the preprocessing operators of exported pipelines (ai.onnx.ml), before and behind a layer."""

from __future__ import annotations

from op_case import case

_NETWORK = "float[8,3] w2> {"
for _name, _op, _attrs, _units in (
    (
        "scaler",
        "Scaler",
        "offset = [0.5, -0.25, 0.0, 1.0, 2.0], scale = [1.0, 2.0, 0.5, 3.0, 0.25]",
        8,
    ),
    ("scaler-one-number", "Scaler", "offset = [0.5], scale = [2.0]", 8),
    (
        "imputer",
        "Imputer",
        "imputed_value_floats = [1.0, 2.0, 3.0, 4.0, 5.0], replaced_value_float = 0.0",
        8,
    ),
    ("normalizer", "Normalizer", 'norm = "L2"', 8),
):
    case(
        f"{_name}-of-inputs",
        f"ai.onnx.ml.{_op}",
        f"""(float[N,5] x) => (float[N,3] y) <float[5,8] w1, {_NETWORK}
            s = ai.onnx.ml.{_op}<{_attrs}>(x)
            a = MatMul(s, w1)
            h = Relu(a)
            y = MatMul(h, w2)
        }}""",
        units=_units,
        domains={"ai.onnx.ml": 3},
    )
for _name, _op, _attrs, _units, _pinned in (
    (
        "scaler",
        "Scaler",
        "offset = [0.5, -0.2, 0.0, 1.0, 2.0, 0.1], scale = [1.0, 2.0, 0.5, 3.0, 0.2, 1.0]",
        6,
        (),
    ),
    ("scaler-one-number", "Scaler", "offset = [0.5], scale = [2.0]", 6, ()),
    (
        "imputer",
        "Imputer",
        "imputed_value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], replaced_value_float = 0.0",
        6,
        (),
    ),
    ("normalizer", "Normalizer", 'norm = "L1"', 0, "normalises over this axis"),
):
    case(
        f"{_name}-of-channels",
        f"ai.onnx.ml.{_op}",
        f"""(float[N,5] x) => (float[N,3] y) <float[5,6] w1, float[6,3] w2> {{
            a = MatMul(x, w1)
            s = ai.onnx.ml.{_op}<{_attrs}>(a)
            y = MatMul(s, w2)
        }}""",
        units=_units,
        pinned=_pinned,
        domains={"ai.onnx.ml": 3},
    )
case(
    "scaler-of-whole-numbers",
    "ai.onnx.ml.Scaler",
    """(int64[N,5] x) => (float[N,3] y) <float[5,8] w1, float[8,3] w2> {
        s = ai.onnx.ml.Scaler<offset = [0.5, -0.25, 0.0, 1.0, 2.0], scale = [1.0, 2.0, 0.5, 3.0, 0.25]>(x)
        a = MatMul(s, w1)
        h = Relu(a)
        y = MatMul(h, w2)
    }""",
    units=8,
    domains={"ai.onnx.ml": 3},
)
