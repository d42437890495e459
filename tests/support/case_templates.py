"""Networks with one operator between two layers, for cases that differ in the operator only."""

from __future__ import annotations

from collections.abc import Mapping

from op_case import case

_IMAGE = """(float[N,3,6,6] x) => (float[{out}] y) <float[8,3,3,3] w1, float[4,8,1,1] w2{constants}> {{
    h = Conv<pads = [1, 1, 1, 1]>(x, w1)
    {body}
    y = Conv(r, w2)
}}"""


def image(
    name: str,
    ops: str,
    body: str,
    units: int = 8,
    constants: str = "",
    pinned: str = "",
    opset: int = 17,
    out: str = "",
) -> None:
    """Convolution to 8 channels ``h``, the operator giving ``r``, convolution of ``r`` to 4 channels."""
    text = _IMAGE.format(constants=", " + constants if constants else "", body=body, out=out)
    case(name, ops, text, units, (pinned,) if pinned else (), opset)


_DENSE = """(float[N,5] x) => (float[{out}] y) <float[5,8] w1, float[8] b1, float[8,3] w2{constants}> {{
    h = Gemm(x, w1, b1)
    {body}
    y = MatMul(r, w2)
}}"""


def dense(
    name: str,
    ops: str,
    body: str,
    units: int = 8,
    constants: str = "",
    pinned: str = "",
    opset: int = 17,
    domains: Mapping[str, int] | None = None,
    out: str = "",
) -> None:
    """Dense layer to 8 features ``h``, the operator giving ``r``, dense layer of ``r``."""
    text = _DENSE.format(constants=", " + constants if constants else "", body=body, out=out)
    case(name, ops, text, units, (pinned,) if pinned else (), opset, domains=domains)
