"""Small networks with one output for each kind of a list, and how well a pruned model keeps every output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from graphs import build
from onnx import ModelProto, numpy_helper

from onnx_oamip.core.records import Array, Floats

INPUTS, FIRST, SECOND, OWN, COLUMNS = 12, 32, 64, 14, 4
"""Widths; every head depends on ``OWN`` units of the second layer, and hardly on the others."""


@dataclass(frozen=True)
class Head:
    """Nodes behind the scores of a head, and the ``kind`` that the user states; None where the structure decides."""

    tail: str
    measure: str
    statement: str | None = None
    scale: float = 1.0
    type: str = "float[]"


HEADS: Mapping[str, Head] = {
    "classes": Head("{y} = Softmax<axis = -1>({l})", "argmax", scale=3.0),
    "decided": Head(
        "{y} = ArgMax<axis = -1, keepdims = 0>({l})", "equal", scale=0.2, type="int64[]"
    ),
    "binary": Head("{y} = Sigmoid({l})", "half", scale=2.0),
    "values": Head("{y} = Identity({l})", "variance", "values", scale=100.0),
    "embedding": Head("{y} = LpNormalization<axis = -1, p = 2>({l})", "cosine", scale=0.01),
    "ambiguous": Head("{y} = Identity({l})", "argmax", scale=5.0),
}


def network(kinds: Sequence[str], seed: int = 0) -> ModelProto:
    """A trunk of two layers with the outputs ``y0``, ``y1``, ... of these kinds."""
    outs = ", ".join(f"{HEADS[kind].type} y{i}" for i, kind in enumerate(kinds))
    weights = ", ".join(f"float[{SECOND}, {COLUMNS}] w{i}" for i in range(len(kinds)))
    tails = "\n".join(
        f"l{i} = MatMul(r, w{i})\n{HEADS[kind].tail.format(y=f'y{i}', l=f'l{i}')}"
        for i, kind in enumerate(kinds)
    )
    proto = build(
        f"""(float[N, {INPUTS}] x) => ({outs})
        <float[{INPUTS}, {FIRST}] wa, float[{FIRST}] ba, float[{FIRST}, {SECOND}] wb, float[{SECOND}] bb, {weights}> {{
            a = Gemm(x, wa, ba)
            h = Relu(a)
            b = Gemm(h, wb, bb)
            r = Relu(b)
            {tails}
        }}""",
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(SECOND)
    for i, kind in enumerate(kinds):
        w = rng.standard_normal((SECOND, COLUMNS)).astype(np.float32)
        mine = np.isin(np.arange(SECOND), order[OWN * i : OWN * (i + 1)])
        w[~mine] *= 0.02
        replace_weight(proto, f"w{i}", HEADS[kind].scale * (w - w[mine].mean(axis=0)))
    return proto


def replace_weight(proto: ModelProto, name: str, value: Array) -> None:
    """Replace the value of an initializer."""
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
            return
    raise KeyError(name)


def kept(kind: str, before: Array, after: Array) -> float:
    """Fidelity of one output: an agreement, a cosine, or R2 of the worst column."""
    measure = HEADS[kind].measure
    if measure == "argmax":
        return float((before.argmax(-1) == after.argmax(-1)).mean())
    if measure == "equal":
        return float((before == after).mean())
    if measure == "half":
        return float(((before > 0.5) == (after > 0.5)).mean())
    if measure == "cosine":
        lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        return float(((before * after).sum(axis=-1) / lengths).mean())
    return float(r2(before, after).min())


def r2(before: Array, after: Array) -> Floats:
    """R2 by column."""
    error = np.square(before.astype(np.float64) - after).mean(axis=0)
    return np.asarray(1 - error / before.var(axis=0))
