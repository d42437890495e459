"""Terms found by structure, by labels and by what the user says, on small graphs with one tail each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from graphs import build, load
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Model
from onnx_oamip.objective import (
    Objective,
    Part,
    Term,
    detect,
    detection,
    document,
)
from onnx_oamip.objective.detection import DECISIONS

TWO = """(float[N, 6] x) => (float[] a, float[] b) <float[6, 3] wa, float[6, 1] wb>
    { a = MatMul(x, wa) b = MatMul(x, wb) }"""
LOGIT = float(np.log(0.55 / 0.45))

DENSE = "(float[N, 6] x) => ({outs}) <float[6, {k}] w> {{ l = MatMul(x, w) {tail} }}"
SEQUENCE = "(float[N, 5, 6] x) => ({outs}) <float[6, {k}] w> {{ l = MatMul(x, w) {tail} }}"
MAP = "(float[N, 3, 8, 8] x) => ({outs}) <float[{k}, 3, 1, 1] w> {{ l = Conv(x, w) {tail} }}"


@dataclass(frozen=True)
class Pattern:
    """A graph, the terms that are right for it as (kind, tensor, axis), and the threshold of the last one."""

    text: str
    expected: tuple[tuple[str, str, int | None], ...]
    opset: int = 17
    threshold: float | None = None
    part: Part | None = None


def dense(
    outs: str, tail: str, *expected: tuple[str, str, int | None], k: int = 4, **more: object
) -> Pattern:
    return Pattern(DENSE.format(outs=outs, tail=tail, k=k), expected, **more)  # type: ignore[arg-type]


def sequence(
    outs: str, tail: str, *expected: tuple[str, str, int | None], k: int = 4, **more: object
) -> Pattern:
    return Pattern(SEQUENCE.format(outs=outs, tail=tail, k=k), expected, **more)  # type: ignore[arg-type]


def maps(
    outs: str, tail: str, *expected: tuple[str, str, int | None], k: int = 4, **more: object
) -> Pattern:
    return Pattern(MAP.format(outs=outs, tail=tail, k=k), expected, **more)  # type: ignore[arg-type]


NMS = """(float[1, 3, 8, 8] x) => ({outs}) <float[4, 3, 1, 1] wb, float[2, 3, 1, 1] ws, int64[3] sb = {{1, 4, -1}},
    int64[3] ss = {{1, 2, -1}}, int64[1] most = {{20}}, float[1] iou = {{0.5}}, float[1] low = {{0.55}},
    int64 two = {{2}}, int64[1] one1 = {{1}}, int64[1] zero1 = {{0}}> {{
    pb = Conv(x, wb) ps = Conv(x, ws) fb = Reshape(pb, sb) boxes0 = Transpose <perm = [0, 2, 1]> (fb)
    boxes = Sigmoid(boxes0) fs = Reshape(ps, ss) {scores}
    sel = NonMaxSuppression(boxes, scores, most, iou, low) boxid = Gather <axis = 1> (sel, two)
    bid = Squeeze(boxid, one1) flat = Squeeze(boxes, zero1) dets = Gather <axis = 0> (flat, bid) }}"""

PRODUCT = Pattern(
    "(float[N, 5, 6] x) => (float[] y) <float[6, 1] wo, float[6, 3] wc> "
    "{ o = MatMul(x, wo) c = MatMul(x, wc) p = Sigmoid(o) q = Sigmoid(c) y = Mul(p, q) }",
    (("binary", "y", 2),),
)
BOXES_AND_SCORES = Pattern(
    "(float[N, 3, 8, 8] x) => (float[] y) <float[4, 3, 1, 1] wb, float[6, 3, 1, 1] wc, int64[3] sb = {0, 4, 64}, "
    "int64[3] sc = {0, 6, 64}, float px = {640.0}> { b5 = Conv(x, wb) c5 = Conv(x, wc) b6 = Sigmoid(b5) "
    "c6 = Sigmoid(c5) b7 = Reshape(b6, sb) c7 = Reshape(c6, sc) b8 = Mul(b7, px) y = Concat <axis = 1> (b8, c7) }",
    (("values", "b8", 1), ("binary", "c5", 1)),
)
PLAIN_PARTS = Pattern(
    "(float[N, 6] x) => (float[] y) <float[6, 2] wa, float[6, 3] wb> "
    "{ a = MatMul(x, wa) b = MatMul(x, wb) y = Concat <axis = 1> (a, b) }",
    (("ambiguous", "y", 1),),
)

DISTRIBUTIONS = (
    "(float[N, 3, 3, 3] x) => (float[N, 4, 9] d) <float[20, 3, 1, 1] w, float[1, 5, 1, 1] bins, "
    "float[6, 3, 1, 1] ws, int64[3] sf = {0, 20, 9}, int64[4] ss = {0, 4, 5, 9}, int64[3] sd = {0, 4, 9}, "
    "int64[3] st = {0, 6, 9}> { l = Conv(x, w) r = Reshape(l, sf) g = Reshape(r, ss) "
    "t = Transpose <perm = [0, 2, 1, 3]> (g) p = Softmax <axis = 1> (t) e = Conv(p, bins) d = Reshape(e, sd)"
)

PATTERNS: dict[str, Pattern] = {
    # ------------------------------------------------------------------------------------------------ softmax, sigmoid
    "softmax": dense("float[] y", "y = Softmax(l)", ("classes", "l", 1)),
    "log-softmax": dense("float[] y", "y = LogSoftmax <axis = 1> (l)", ("classes", "l", 1)),
    "log of a softmax": dense("float[] y", "p = Softmax(l) y = Log(p)", ("classes", "l", 1)),
    "softmax before opset 13": dense("float[] y", "y = Softmax(l)", ("classes", "l", 1), opset=12),
    "softmax over all positions before opset 13": sequence(
        "float[] y", "y = Softmax <axis = 1> (l)", ("ambiguous", "y", 2), opset=12
    ),
    "softmax over maps": maps("float[] y", "y = Softmax <axis = 1> (l)", ("classes", "l", 1)),
    "softmax behind a transposition": maps(
        "float[] y", "t = Transpose <perm = [0, 2, 3, 1]> (l) y = Softmax(t)", ("classes", "t", 3)
    ),
    "transposed softmax": sequence(
        "float[] y", "p = Softmax(l) y = Transpose <perm = [0, 2, 1]> (p)", ("classes", "l", 2)
    ),
    "one class of a softmax": dense(
        "float[] y",
        "p = Softmax(l) i = Constant <value_ints = [1]> () y = Gather <axis = 1> (p, i)",
        ("classes", "l", 1),
    ),
    "one position of a softmax": sequence(
        "float[] y",
        "p = Softmax(l) i = Constant <value_int = 0> () y = Gather <axis = 1> (p, i)",
        ("classes", "l", 2),
        part=Part(1, 0, 1),
    ),
    "softmax written out": dense(
        "float[] y",
        "m = ReduceMax <axes = [1]> (l) d = Sub(l, m) e = Exp(d) a = Constant <value_ints = [1]> () "
        "s = ReduceSum(e, a) y = Div(e, s)",
        ("classes", "l", 1),
    ),
    "softmax written out over the whole shape": dense(
        "float[] y",
        "m = ReduceMax <axes = [1], keepdims = 0> (l) low = Constant <value_float = -1e30> () n = Max(low, m) "
        "t = Constant <value_ints = [-1, 1]> () r = Reshape(n, t) z = Shape(l) g = Expand(r, z) d = Sub(l, g) "
        "e = Exp(d) a = Constant <value_ints = [1]> () s = ReduceSum <keepdims = 0> (e, a) v = Reshape(s, t) "
        "f = Expand(v, z) y = Div(e, f)",
        ("classes", "l", 1),
    ),
    "log-softmax by the logarithm of the sum": dense(
        "float[] y",
        "m = ReduceMax <axes = [1]> (l) d = Sub(l, m) e = Exp(d) a = Constant <value_ints = [1]> () "
        "s = ReduceSum(e, a) g = Log(s) y = Sub(d, g)",
        ("classes", "l", 1),
    ),
    "log-softmax written out": dense(
        "float[] y", "s = ReduceLogSumExp <axes = [1]> (l) y = Sub(l, s)", ("classes", "l", 1)
    ),
    "softmax cast to half": dense(
        "float16[] y", "p = Softmax(l) y = Cast <to = 10> (p)", ("classes", "l", 1)
    ),
    "sigmoid": dense("float[] y", "y = Sigmoid(l)", ("binary", "l", 1)),
    "one sigmoid": dense("float[] y", "y = Sigmoid(l)", ("binary", "l", 1), k=1),
    "sigmoid over maps": maps("float[] y", "y = Sigmoid(l)", ("binary", "l", 1), k=1),
    "sigmoid over a squeezed map": maps(
        "float[] y",
        "a = Constant <value_ints = [1]> () q = Squeeze(l, a) y = Sigmoid(q)",
        ("binary", "q", None),
        k=1,
    ),
    "sigmoid over one column of all positions": maps(
        "float[] y",
        "t = Transpose <perm = [0, 2, 3, 1]> (l) s = Constant <value_ints = [0, -1]> () q = Reshape(t, s) "
        "y = Sigmoid(q)",
        ("binary", "q", None),
        k=1,
    ),
    "hard sigmoid": dense("float[] y", "y = HardSigmoid(l)", ("binary", "y", 1)),
    "sigmoid written out": dense(
        "float[] y",
        "n = Neg(l) e = Exp(n) one = Constant <value_float = 1.0> () a = Add(e, one) y = Div(one, a)",
        ("binary", "l", 1),
    ),
    "one minus a sigmoid beside it": dense(
        "float[] y",
        "p = Sigmoid(l) one = Constant <value_float = 1.0> () q = Sub(one, p) y = Concat <axis = 1> (q, p)",
        ("binary", "l", 1),
        k=1,
    ),
    "scaled sigmoid": dense(
        "float[] y",
        "p = Sigmoid(l) c = Constant <value_float = 640.0> () y = Mul(p, c)",
        ("ambiguous", "y", 1),
    ),
    "product of probabilities": PRODUCT,
    # ---------------------------------------------------------------------------------------------------- unit vectors
    "lp normalisation": dense(
        "float[] y", "y = LpNormalization <axis = 1> (l)", ("embedding", "l", 1)
    ),
    "divided by ReduceL2": dense(
        "float[] y", "d = ReduceL2 <axes = [1]> (l) y = Div(l, d)", ("embedding", "l", 1)
    ),
    "divided by ReduceL2, clipped and expanded": dense(
        "float[] y",
        "d = ReduceL2 <axes = [-1]> (l) e = Constant <value_float = 1e-12> () c = Clip(d, e) "
        "s = Shape(l) b = Expand(c, s) y = Div(l, b)",
        ("embedding", "l", 1),
    ),
    "divided by the root of squares": dense(
        "float[] y",
        "q = Mul(l, l) a = Constant <value_ints = [1]> () s = ReduceSum(q, a) e = Constant <value_float = 1e-9> () "
        "m = Max(s, e) r = Sqrt(m) y = Div(l, r)",
        ("embedding", "l", 1),
    ),
    "times the inverse root of squares": dense(
        "float[] y",
        "two = Constant <value_float = 2.0> () q = Pow(l, two) a = Constant <value_ints = [1]> () s = ReduceSum(q, a) "
        "r = Sqrt(s) i = Reciprocal(r) y = Mul(l, i)",
        ("embedding", "l", 1),
    ),
    "divided by the length of another": dense(
        "float[] y", "o = Exp(l) d = ReduceL2 <axes = [1]> (o) y = Div(l, d)", ("ambiguous", "y", 1)
    ),
    # ------------------------------------------------------------------------------------------------------- decisions
    "argmax of a tagger": sequence(
        "int64[] y", "y = ArgMax <axis = -1, keepdims = 0> (l)", ("classes", "l", 2)
    ),
    "argmax of a segmenter": maps(
        "int64[] y", "y = ArgMax <axis = 1, keepdims = 0> (l)", ("classes", "l", 1)
    ),
    "argmax of a softmax": maps(
        "int64[] y", "p = Softmax <axis = 1> (l) y = ArgMax <axis = 1> (p)", ("classes", "l", 1)
    ),
    "argmax of a sigmoid": dense(
        "int64[] y", "p = Sigmoid(l) y = ArgMax <axis = 1> (p)", ("classes", "l", 1)
    ),
    "argmin of distances": maps(
        "int64[] y", "y = ArgMin <axis = 1, keepdims = 0> (l)", ("classes", "l", 1)
    ),
    "argmax cast to a byte": maps(
        "uint8[] y",
        "i = ArgMax <axis = 1, keepdims = 0> (l) y = Cast <to = 2> (i)",
        ("classes", "l", 1),
    ),
    "argmax looked up in a table": dense(
        "float[] y",
        "t = Constant <value_floats = [1.0, 5.0, 9.0, 2.0]> () i = ArgMax <axis = 1, keepdims = 0> (l) "
        "y = Gather(t, i)",
        ("classes", "l", 1),
    ),
    "top five": dense(
        "float[] v, int64[] i",
        "k = Constant <value_ints = [2]> () v, i = TopK(l, k)",
        ("classes", "l", 1),
    ),
    "top of a softmax": dense(
        "float[] v, int64[] i",
        "p = Softmax(l) k = Constant <value_ints = [1]> () v, i = TopK(p, k)",
        ("classes", "l", 1),
    ),
    "top of sigmoids": sequence(
        "float[] v, int64[] i",
        "p = Sigmoid(l) s = Constant <value_ints = [0, -1]> () f = Reshape(p, s) k = Constant <value_ints = [3]> () "
        "v, i = TopK(f, k)",
        ("binary", "l", 2),
    ),
    "sigmoid above a threshold": dense(
        "bool[] y",
        "p = Sigmoid(l) c = Constant <value_float = 0.55> () y = Greater(p, c)",
        ("binary", "l", 1),
        threshold=LOGIT,
    ),
    "scores above a threshold": dense(
        "float[] y",
        "c = Constant <value_float = 3.0> () g = Greater(l, c) y = Cast <to = 1> (g)",
        ("binary", "l", 1),
        threshold=3.0,
    ),
    "thresholded mask": maps(
        "uint8[] y",
        "p = Sigmoid(l) c = Constant <value_float = 0.55> () g = Less(c, p) a = Constant <value_int = 255> () "
        "z = Constant <value_int = 0> () w8 = Where(g, a, z) y = Cast <to = 2> (w8)",
        ("binary", "l", 1),
        k=1,
        threshold=LOGIT,
    ),
    "rounded values": dense("int64[] y", "r = Round(l) y = Cast <to = 7> (r)", ("values", "l", 1)),
    "picture in bytes": maps(
        "uint8[] y",
        "c = Constant <value_float = 255.0> () m = Mul(l, c) y = Cast <to = 2> (m)",
        ("values", "m", 1),
        k=3,
    ),
    "leaky activation written out": dense(
        "float[] y",
        "z = Constant <value_float = 0.0> () s = Constant <value_float = 0.1> () g = Greater(l, z) m = Mul(l, s) "
        "y = Where(g, l, m)",
        ("ambiguous", "y", 1),
    ),
    "values above 0 only": dense(
        "float[] y",
        "z = Constant <value_float = 0.0> () g = Greater(l, z) c = Cast <to = 1> (g) y = Mul(l, c)",
        ("values", "l", 1),
    ),
    "suppressed boxes": Pattern(
        NMS.format(outs="float[n, 4] dets, int64[n, 3] sel", scores="scores = Sigmoid(fs)"),
        (("values", "boxes", 2), ("binary", "fs", 1)),
        threshold=LOGIT,
    ),
    "suppressed boxes by softmax": Pattern(
        NMS.format(
            outs="float[n, 4] dets, int64[n, 3] sel", scores="scores = Softmax <axis = 1> (fs)"
        ),
        (("values", "boxes", 2), ("classes", "fs", 1)),
    ),
    "suppressed boxes by plain scores": Pattern(
        NMS.format(outs="float[n, 4] dets", scores="scores = Identity(fs)"),
        (("values", "boxes", 2), ("binary", "fs", 1)),
        threshold=float(np.float32(0.55)),
    ),
    # ----------------------------------------------------------------------------------------------------------- parts
    "boxes and scores in one": BOXES_AND_SCORES,
    "concat of plain parts": PLAIN_PARTS,
    "concat of raw branches": Pattern(
        "(float[N, 5, 6] x) => (float[] y) <float[6, 4] wb, float[6, 3] wc, float px = {320.0}> "
        "{ a = MatMul(x, wb) b = Mul(a, px) c = MatMul(x, wc) y = Concat <axis = 2> (b, c) }",
        (("values", "b", 2), ("values", "c", 2)),
    ),
    "concat of one layer in two": Pattern(
        "(float[N, 5, 6] x) => (float[] y) <float[6, 4] wa, float[6, 3] wb> "
        "{ a = MatMul(x, wa) b = MatMul(x, wb) y = Concat <axis = 2> (a, b) }",
        (("ambiguous", "y", 2),),
    ),
    "scores sliced from one map": sequence(
        "float[] y",
        "p = Sigmoid(l) s4 = Constant <value_ints = [4]> () s0 = Constant <value_ints = [0]> () "
        "e = Constant <value_ints = [9]> () a = Constant <value_ints = [2]> () xy = Slice(p, s0, s4, a) "
        "c = Slice(p, s4, e, a) q = Constant <value_float = 32.0> () b = Mul(xy, q) y = Concat <axis = 2> (b, c)",
        ("values", "b", 2),
        ("binary", "l", 2),
        k=9,
        part=Part(2, 4, 9),
    ),
    # ---------------------------------------------------------------------------------------------------- plain values
    "raw scores or values": dense("float[] l", "", ("ambiguous", "l", 1)),
    "raw taggers": sequence("float[] l", "", ("ambiguous", "l", 2)),
    "one column": dense("float[] l", "", ("values", "l", 1), k=1),
    "one column behind a reshape": dense(
        "float[] y",
        "s = Constant <value_ints = [-1, 1]> () y = Reshape(l, s)",
        ("values", "y", 1),
        k=1,
    ),
    "a map of one channel": maps("float[] l", "", ("values", "l", 1), k=1),
    "picture to picture": maps("float[] l", "", ("values", "l", 1), k=3),
    "tanh": dense("float[] y", "y = Tanh(l)", ("values", "y", 1)),
    "quantised output": dense(
        "uint8[] y",
        "s = Constant <value_float = 0.1> () z = Constant <value = uint8 {0}> () y = QuantizeLinear(l, s, z)",
        ("values", "l", 1),
    ),
    # ------------------------------------------------------------------------------------------------- several outputs
    "logits beside their softmax": dense(
        "float[] l, float[] y", "y = Softmax(l)", ("classes", "l", 1)
    ),
    "logits beside their argmax": dense(
        "float[] l, int64[] y", "y = ArgMax <axis = 1> (l)", ("classes", "l", 1)
    ),
    "the same numbers twice": dense(
        "float[] y, float[] z", "y = Identity(l) z = Identity(l)", ("ambiguous", "l", 1)
    ),
    "an input among the outputs": dense(
        "float[] l, float[N, 6] x", "", ("ambiguous", "l", 1), ("ignore", "x", 1)
    ),
    "a cast of an input": (
        Pattern(
            "(float[N, 6] x, int64[N, 6] t) => (float[] l, int32[] u) <float[6, 1] w> "
            "{ l = MatMul(x, w) u = Cast <to = 6> (t) }",
            (("values", "l", 1), ("exact", "u", None)),
        )
    ),
    "mask made of the input": Pattern(
        "(float[N, 4] x, int64[N, 4] t) => (float[] y) <float[4, 4] w, int64 zero = {0}, float low = {-10000.0}> "
        "{ l = MatMul(x, w) g = Equal(t, zero) y = Where(g, low, l) }",
        (("ambiguous", "y", 1),),
    ),
    "signs of a hash": dense(
        "int8[] y",
        "t = Tanh(l) s = Sign(t) y = Cast <to = 3> (s)",
        ("binary", "t", 1),
        threshold=0.0,
    ),
    "number of detections": Pattern(
        NMS.format(outs="float[1] n", scores="scores = Sigmoid(fs)").removesuffix("}")
        + "z = Shape <start = 0, end = 1> (sel) n = Cast <to = 1> (z) }",
        (("values", "boxes", 2), ("binary", "fs", 1)),
        threshold=LOGIT,
    ),
    "boxes by distributions": Pattern(DISTRIBUTIONS + " }", (("ambiguous", "d", 1),)),
    "boxes by distributions and scores in one": Pattern(
        DISTRIBUTIONS.replace("float[N, 4, 9] d", "float[] y")
        + " s = Conv(x, ws) f = Reshape(s, st) q = Sigmoid(f) y = Concat <axis = 1> (d, q) }",
        (("values", "d", 1), ("binary", "f", 1)),
    ),
    "soft argmin of depth": Pattern(
        "(float[N, 3, 8, 8] x) => (float[N, 8, 8] d) <float[5, 3, 1, 1] w, float[1, 5, 1, 1] bins, "
        "int64[1] one = {1}> { l = Conv(x, w) p = Softmax <axis = 1> (l) e = Conv(p, bins) d = Squeeze(e, one) }",
        (("values", "d", None),),
    ),
    "sigmoid boxes of queries": sequence(
        "float[] b, float[N, 5, 4] c",
        "b = Sigmoid(l) u = Constant <value_float = 2.0> () v = Mul(x, u) i = Constant <value_ints = [0, 1, 2]> () "
        "c = Gather <axis = 2> (v, i)",
        ("values", "b", 2),
        ("ambiguous", "c", 2),
    ),
    "features that a copy gives out": Pattern(
        "(float[N, 6] x) => (float[] f, float[] y) <float[6, 8] w, float[8, 4] v> "
        "{ h = MatMul(x, w) r = Relu(h) l = MatMul(r, v) y = Softmax(l) f = Identity(r) }",
        (("values", "r", 1), ("classes", "l", 1)),
    ),
    "attention that a copy gives out": Pattern(
        "(float[N, 6] x) => (float[] a, float[] y) <float[6, 8] w, float[8, 4] v> "
        "{ h = MatMul(x, w) s = Softmax(h) l = MatMul(s, v) y = Identity(l) a = Identity(s) }",
        (("classes", "h", 1), ("ambiguous", "l", 1)),
    ),
    "mean of an ensemble": dense(
        "float[] y",
        "p = Softmax(l) n = Neg(l) q = Softmax(n) s = Add(p, q) h = Constant <value_float = 0.5> () y = Mul(s, h)",
        ("classes", "y", 1),
    ),
    "mean over views": sequence(
        "float[] y",
        "p = Softmax(l) a = Constant <value_ints = [1]> () y = ReduceMean <keepdims = 0> (p, a)",
        ("classes", "y", 1),
        opset=18,
    ),
    "layer normalisation written out": sequence(
        "float[] y",
        "m = ReduceMean <axes = [-1]> (l) d = Sub(l, m) q = Mul(d, d) v = ReduceMean <axes = [-1]> (q) "
        "e = Constant <value_float = 1e-5> () w2 = Add(v, e) r = Sqrt(w2) n = Div(d, r) "
        "g = Constant <value_floats = [1.0, 2.0, 1.0, 2.0]> () h = Mul(n, g) y = Add(h, g)",
        ("values", "y", 2),
    ),
    "RMS normalisation written out": sequence(
        "float[] y",
        "q = Mul(l, l) v = ReduceMean <axes = [-1]> (q) e = Constant <value_float = 1e-5> () w2 = Add(v, e) "
        "r = Sqrt(w2) i = Reciprocal(r) y = Mul(l, i)",
        ("values", "y", 2),
    ),
    "mean over channels": maps(
        "float[N, 8, 8] y",
        "a = Constant <value_ints = [1]> () y = ReduceMean <keepdims = 0> (l, a)",
        ("values", "y", None),
        opset=18,
    ),
    "maximum over positions": sequence(
        "float[] y",
        "a = Constant <value_ints = [1]> () y = ReduceMax <keepdims = 0> (l, a)",
        ("ambiguous", "y", 1),
        opset=18,
    ),
    "similarities of all pairs of two batches": Pattern(
        "(float[N, 6] x, float[M, 6] z) => (float[N, M] y) <float[6, 4] w> "
        "{ a = MatMul(x, w) b = MatMul(z, w) t = Transpose(b) s = MatMul(a, t) y = Identity(s) }",
        (("values", "s", None),),
    ),
    "an operator that nobody knows": Pattern(
        "(float[N, 6] x) => (float[N, 4] y) <float[6, 4] w> { l = MatMul(x, w) y = some.Thing(l) }",
        (("ambiguous", "y", 1),),
    ),
}


def model_of(pattern: Pattern, folder: Path) -> Model:
    domains = {"some": 1} if "some." in pattern.text else None
    return load(build(pattern.text, pattern.opset, domains=domains), folder)


def only(found: Objective) -> Term:
    (term,) = found.judged
    return term


@pytest.mark.parametrize("name", PATTERNS)
def test_output_patterns_are_detected(name: str, tmp_path: Path) -> None:
    pattern = PATTERNS[name]
    model = model_of(pattern, tmp_path)
    found = detect(model)
    assert tuple((t.kind, t.tensor, t.axis) for t in found.terms) == pattern.expected
    assert all(t.output in {p.name for p in model.outputs} for t in found.terms)
    last = found.terms[-1]
    if pattern.threshold is None:
        assert last.threshold is None
    else:
        assert last.threshold == pytest.approx(pattern.threshold, abs=1e-6)
    assert last.part == pattern.part
    assert len(document(found)) == len(found.terms)
    # What was assumed names the option that says otherwise.
    assert all("`outputs=" in t.assumption for t in found.terms if t.kind in ("ambiguous", "exact"))
    assert all(t.assumption in found.notes for t in found.terms if t.assumption)


# ------------------------------------------------------------------------------------------- several outputs, subgraphs


MASKED = """(float[N, 5, 6] x, bool[N, 5, 1] m) => (float[N, 5, 4] y)
<float[6, 4] w, int64[1] at = {{2}}> {{ l = MatMul(x, w) {} }}"""


@pytest.mark.parametrize(
    ("tail", "fill"),
    [
        ("y = Where(m, l, {-1e9})", -1e9),
        ("t = Where(m, l, {3e4}) y = Transpose<perm = [0, 2, 1]>(t)", 3e4),
        ("f = Cast<to = 1>(m) p = Mul(f, {-1e4}) y = Add(p, l)", -1e4),
        ("f = Cast<to = 1>(m) p = Mul(f, {1e30}) y = Sub(l, p)", -1e30),
        ("p = Where(m, {0.0}, {-6e4}) y = Add(l, p)", -6e4),
        (
            "f = Cast<to = 1>(m) p = Mul(f, {-1e4}) s = Transpose(p) u = Transpose(s) y = Add(l, u)",
            -1e4,
        ),
        (
            "f = Cast<to = 1>(m) q = Squeeze(f, at) p = Mul(q, {-1e4}) u = Unsqueeze(p, at) y = Add(l, u)",
            -1e4,
        ),
        ("y = Where(m, l, {0.0})", None),
        ("f = Cast<to = 1>(m) p = Mul(f, {2.0}) y = Add(l, p)", None),
        ("r = Relu(l) p = Mul(r, {1e4}) y = Add(l, p)", None),
    ],
)
def test_large_numbers_of_a_mask_are_no_values(
    tail: str, fill: float | None, tmp_path: Path
) -> None:
    numbers = re.findall(r"\{([^}]*)\}", tail)
    named = re.sub(r"\{([^}]*)\}", lambda found: f"c{numbers.index(found[1])}", tail)
    constants = " ".join(
        f"c{i} = Constant<value_float = {number}>()" for i, number in enumerate(numbers)
    )
    model = load(build(MASKED.format(f"{constants} {named}")), tmp_path)
    for objective in (detect(model), detect(model, task="values")):
        (term,) = objective.terms
        assert term.fill == (None if fill is None else pytest.approx(fill))


def test_parts_are_named_after_their_output(tmp_path: Path) -> None:
    found = detect(model_of(PATTERNS["boxes and scores in one"], tmp_path))
    assert [(t.name, t.output) for t in found.terms] == [("y/b8", "y"), ("y/c5", "y")]


def test_raw_branches_are_noted(tmp_path: Path) -> None:
    model = model_of(PATTERNS["concat of raw branches"], tmp_path)
    assert detect(model).notes == (
        "output 'y' joins 2 branches, which are taken for values; `outputs=y=classes` says otherwise",
    )
    stated = only(detect(model, outputs={"y": ("classes", 1.0)}))
    assert (stated.kind, stated.tensor, stated.axis) == ("classes", "y", 2)


def test_outputs_that_share_a_tensor_are_noted(tmp_path: Path) -> None:
    found = detect(model_of(PATTERNS["logits beside their softmax"], tmp_path))
    assert found.notes == ("output 'y' is measured with 'l', which holds the same numbers",)


def test_output_that_is_an_input_is_noted(tmp_path: Path) -> None:
    found = detect(model_of(PATTERNS["an input among the outputs"], tmp_path))
    assert found.tensors == ["l"]
    assert (
        "output 'x' is an input of the model, which pruning does not change: it is not measured"
        in found.notes
    )


def test_constant_output_is_noted(tmp_path: Path) -> None:
    text = "(float[N, 6] x) => (float[] l, float[3] c) <float[6, 4] w, float[3] k> { l = MatMul(x, w) c = Identity(k) }"
    found = detect(load(build(text), tmp_path))
    assert [(t.output, t.kind) for t in found.terms] == [("l", "ambiguous"), ("c", "ignore")]
    assert any("'c' is a constant" in note for note in found.notes)


def test_boxes_beside_a_softmax_are_values(tmp_path: Path) -> None:
    """The order of MTCNN's last network: box, landmarks, classes."""
    text = """(float[N, 16] x) => (float[] box, float[] marks, float[] cls)
        <float[16, 8] w1, float[8, 4] wb, float[8, 10] wm, float[8, 2] wc>
        { a = MatMul(x, w1) r = Relu(a) box = MatMul(r, wb) marks = MatMul(r, wm) l = MatMul(r, wc)
          cls = Softmax(l) }"""
    model = load(build(text), tmp_path)
    found = detect(model)
    assert [(t.output, t.kind) for t in found.terms] == [
        ("box", "values"),
        ("marks", "values"),
        ("cls", "classes"),
    ]
    labelled = detect(model, np.asarray([0, 1, 1]))
    assert [t.labelled for t in labelled.terms] == [False, False, True]


def test_attention_maps_and_hidden_states_beside_logits_are_no_decisions(tmp_path: Path) -> None:
    """Softmax of attention does not make values of the logits, and what further layers read is no class score."""
    text = """(float[N, 5, 6] x) => (float[] att, float[] hidden, float[] logits)
        <float[6, 6] wq, float[6, 8] wv, float[8, 3] wl>
        { q = MatMul(x, wq) k = Transpose <perm = [0, 2, 1]> (x) s = MatMul(q, k) att = Softmax(s)
          a = MatMul(att, x) hidden = MatMul(a, wv) p = ReduceMean <axes = [1], keepdims = 0> (hidden)
          logits = MatMul(p, wl) }"""
    found = detect(load(build(text), tmp_path))
    assert [(t.output, t.kind) for t in found.terms] == [
        ("att", "classes"),
        ("hidden", "values"),
        ("logits", "ambiguous"),
    ]
    assert any("'hidden'" in note and "further layers read it" in note for note in found.notes)


@pytest.mark.parametrize(
    ("outs", "tail", "kind"),
    [
        ("float[N, 3, 8, 8] y", "y = Sigmoid(l)", "values"),
        ("float[N, 3, 64] y", "p = Sigmoid(l) y = Reshape(p, flat)", "binary"),
        ("int64[N, 2] y", "p = Sigmoid(l) f = Reshape(p, all) v, y = TopK(f, two)", "binary"),
    ],
)
def test_only_an_output_like_the_input_is_a_picture(
    outs: str, tail: str, kind: str, tmp_path: Path
) -> None:
    """Scores of three classes at the input's resolution, decided by TopK or flattened, are no picture."""
    text = f"""(float[N, 3, 8, 8] x) => ({outs}) <float[3, 3, 1, 1] w, int64[3] flat = {{0, 3, 64}},
        int64[2] all = {{0, 192}}, int64[1] two = {{2}}> {{ l = Conv(x, w) {tail} }}"""
    assert only(detect(load(build(text), tmp_path))).kind == kind


def test_five_softmax_heads_all_count(tmp_path: Path) -> None:
    heads = " ".join(f"l{i} = MatMul(x, w{i}) y{i} = Softmax(l{i})" for i in range(5))
    outs, weights = (
        ", ".join(f"float[] y{i}" for i in range(5)),
        ", ".join(f"float[6, {i + 2}] w{i}" for i in range(5)),
    )
    found = detect(load(build(f"(float[N, 6] x) => ({outs}) <{weights}> {{ {heads} }}"), tmp_path))
    assert [(t.tensor, t.kind) for t in found.terms] == [(f"l{i}", "classes") for i in range(5)]


def test_detection_head_of_three_scales(tmp_path: Path) -> None:
    """Decoded as YOLOv5 does: sigmoid, offsets and sizes from slices of it, scales joined along the boxes."""
    parts, weights = [], []
    for i in range(3):
        weights.append(f"float[7, 3, 1, 1] w{i}")
        parts.append(f"""c{i} = Conv(x, w{i}) r{i} = Reshape(c{i}, s) t{i} = Transpose <perm = [0, 2, 1]> (r{i})
            p{i} = Sigmoid(t{i}) xy{i}, wh{i}, o{i} = Split <axis = 2> (p{i}, sizes) m{i} = Mul(xy{i}, g)
            q{i} = Mul(wh{i}, g) v{i} = Mul(q{i}, q{i}) y{i} = Concat <axis = 2> (m{i}, v{i}, o{i})""")
    text = f"""(float[N, 3, 4, 4] x) => (float[] y) <{", ".join(weights)}, int64[3] s = {{0, 7, 16}}, float g = {{2.0}},
        int64[3] sizes = {{2, 2, 3}}> {{ {" ".join(parts)} y = Concat <axis = 1> (y0, y1, y2) }}"""
    found = detect(load(build(text), tmp_path))
    expected = []
    for i in range(3):
        expected += [
            (f"m{i}", "values", None),
            (f"v{i}", "values", None),
            (f"t{i}", "binary", Part(2, 4, 7)),
        ]
    assert [(t.tensor, t.kind, t.part) for t in found.terms] == expected


def _branches(kind: int, after: str) -> ModelProto:
    """y made in both branches of an If, from a float in front of it."""
    shape = ["N", 4] if kind == TensorProto.FLOAT else ["N"]
    graphs = []
    for name in ("then", "else"):
        attributes = {"axis": 1, "keepdims": 0} if after == "ArgMax" else {}
        node = helper.make_node(after, ["l"], [f"{name}_y"], **attributes)
        out = helper.make_tensor_value_info(f"{name}_y", kind, shape)
        graphs.append(helper.make_graph([node], name, [], [out]))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["l"]),
        helper.make_node("If", ["c"], ["y"], then_branch=graphs[0], else_branch=graphs[1]),
    ]
    weight = numpy_helper.from_array(
        np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32), "w"
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", kind, shape)], [weight]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_floats_from_a_subgraph_are_read_themselves(tmp_path: Path) -> None:
    term = only(detect(load(_branches(TensorProto.FLOAT, "Relu"), tmp_path)))
    assert (term.kind, term.tensor) == ("ambiguous", "y")


@pytest.mark.parametrize(
    ("after", "kind"), [("Sigmoid", "binary"), ("Softmax", "classes"), ("LogSoftmax", "classes")]
)
def test_branch_results_are_read_behind_the_branches(after: str, kind: str, tmp_path: Path) -> None:
    """A cascade of two detectors, the second in a branch."""
    term = only(detect(load(_branches(TensorProto.FLOAT, after), tmp_path)))
    assert (term.kind, term.tensor, term.axis, term.assumption) == (kind, "y", 1, "")


def test_channels_of_unknown_layers_have_a_fixed_number(tmp_path: Path) -> None:
    """The state of a recurrent network behind an operator that is not known."""
    text = """(float[N, 6] x) => (float[2, N, 64] h, float[N, 4, T] m) <float[6, 4] w>
        { l = MatMul(x, w) h, m = some.Thing(l) }"""
    found = detect(load(build(text, domains={"some": 1}), tmp_path))
    assert [(t.output, t.axis) for t in found.terms] == [("h", 2), ("m", 1)]


@pytest.mark.parametrize(
    "tail", ["y = Add(l, b)", "z = Add(b, l) y = Identity(z)", "y = Identity(l)"]
)
def test_declared_shape_counts_where_none_is_inferred(tail: str, tmp_path: Path) -> None:
    """A batch of another name than that of the input, behind an operator that is not known."""
    text = f"""(float[N, 6] x) => (float[M, 11, 7] y) <float[5, 7] w, float[7] b>
        {{ t = some.Thing(x) l = MatMul(t, w) {tail} }}"""
    model = load(build(text, domains={"some": 1}), tmp_path)
    assert "y" not in model.shapes
    term = only(detect(model))
    assert (term.kind, term.axis) == ("ambiguous", 2)
    assert "[N, 11, 7] may hold class scores or values" in term.assumption
    labelled = only(detect(model, np.arange(22).reshape(2, 11) % 7))
    assert (labelled.kind, labelled.labelled) == ("classes", True)


def test_unknown_number_of_columns_is_taken_for_values(tmp_path: Path) -> None:
    text = "(float[N, 6] x) => (float[N, K] y) { y = some.Thing(x) }"
    term = only(detect(load(build(text, domains={"some": 1}), tmp_path)))
    assert term.kind == "values"
    assert (
        "[N, ?] is taken for values, as the number of its columns is not known" in term.assumption
    )


LSTM = """(float[T, {batch}, 3] x) => (float[] {out}) <float[2, 16, 3] w, float[2, 16, 4] r> {{
    y, h, c = LSTM <hidden_size = 4, direction = "bidirectional"> (x, w, r) {tail} }}"""


@pytest.mark.parametrize("batch", ["1", "N"])
@pytest.mark.parametrize(
    ("out", "tail", "axis", "stacked"),
    [
        ("h", "", 2, (0,)),
        ("y", "", 3, (1,)),
        ("z", "z = Concat <axis = 0> (h, c)", 2, (0,)),
        ("z", "z = Transpose <perm = [1, 0, 2]> (h)", 2, (1,)),
        # Unlike tensors, joined by samples.
        (
            "z",
            "m = Tanh(h) z = Concat <axis = 1> (m, c)",
            2,
            (),
        ),
    ],
)
def test_directions_of_a_recurrent_state_are_columns(
    batch: str, out: str, tail: str, axis: int, stacked: tuple[int, ...], tmp_path: Path
) -> None:
    term = only(detect(load(build(LSTM.format(batch=batch, out=out, tail=tail)), tmp_path)))
    assert (term.kind, term.axis, term.stacked) == (
        "values" if stacked else "ambiguous",
        axis,
        stacked,
    )
    assert document(Objective((term,)))[0]["stacked"] == stacked


@pytest.mark.parametrize(
    ("tail", "kind", "axis", "shape"),
    [
        ("z = Squeeze(g, a)", "ambiguous", 0, "[5]"),
        ("s = Softmax <axis = 1> (g) z = Squeeze(s, a)", "classes", 1, ""),
        ("z = Squeeze(l, zero)", "ambiguous", 0, "[5, 8, 9]"),
    ],
)
def test_squeezed_batch_leaves_the_channel_axis(
    tail: str, kind: str, axis: int, shape: str, tmp_path: Path
) -> None:
    """A vector or a map without an axis of samples: its first axis holds classes or channels."""
    text = f"""(float[1, 3, 8, 9] x) => (float[] z) <float[5, 3, 1, 1] w, int64[3] a = {{0, 2, 3}},
        int64[1] zero = {{0}}> {{ l = Conv(x, w) g = GlobalAveragePool(l) {tail} }}"""
    term = only(detect(load(build(text), tmp_path)))
    assert (term.kind, term.axis) == (kind, axis)
    assert term.assumption.startswith(f"output 'z' {shape} may hold" if shape else "")


@pytest.mark.parametrize(
    ("length", "tail"),
    [
        ("T", "h = Relu(l) s = MatMul(h, u) z = Reshape(s, flat)"),
        ("6", "h = Relu(l) s = MatMul(h, u) z = Reshape(s, flat)"),
        ("T", "z = ReduceMax <axes = [0, 2], keepdims = 0> (l)"),
    ],
)
def test_squeezed_positions_are_no_classes(length: str, tail: str, tmp_path: Path) -> None:
    """A vector of one number per position: its length varies, or a layer with one column is behind it."""
    text = f"""(float[1, {length}, 4] x) => (float[{length}] z) <float[4, 5] w, float[5, 1] u,
        int64[1] flat = {{-1}}> {{ l = MatMul(x, w) {tail} }}"""
    objective = detect(load(build(text), tmp_path, {"T": 6}))
    term = only(objective)
    assert (term.kind, term.axis) == ("values", None)
    assert term.rows(np.arange(6.0)).shape == (6, 1)
    assert "`outputs=z=binary` says otherwise" in objective.notes[0]


def test_label_belongs_to_a_vector_without_an_axis_of_samples(tmp_path: Path) -> None:
    text = """(float[1, 6] x) => (float[5] z) <float[6, 5] w, int64[1] zero = {0}> {
        l = MatMul(x, w) z = Squeeze(l, zero) }"""
    term = only(detect(load(build(text), tmp_path), np.asarray([0, 4, 2])))
    assert (term.kind, term.axis, term.labelled) == ("classes", 0, True)


def test_integers_from_a_subgraph_are_compared_for_equality(tmp_path: Path) -> None:
    found = detect(load(_branches(TensorProto.INT64, "ArgMax"), tmp_path))
    assert (only(found).kind, only(found).tensor) == ("exact", "y")
    assert "compared for equality" in found.notes[0]
    assert "`outputs=y=ignore`" in found.notes[0]


def test_long_chain_of_cheap_operators_is_followed(tmp_path: Path) -> None:
    """Doubling a tensor many times: no path is followed twice, and none for ever."""
    steps = " ".join(f"v{i + 1} = Mul(v{i}, v{i})" for i in range(400))
    text = f"(float[N, 6] x) => (float[] v400) <float[6, 4] w> {{ l = MatMul(x, w) v0 = Sigmoid(l) {steps} }}"
    assert only(detect(load(build(text), tmp_path))).tensor == "v400"


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("name", "labels", "kind"),
    [
        ("softmax", np.asarray([0, 3, 1]), "classes"),
        ("raw scores or values", np.asarray([0, 3, 1]), "classes"),
        ("raw scores or values", np.random.default_rng(0).random((3, 4)), "values"),
        ("raw taggers", np.zeros((3, 5), np.int64), "classes"),
        ("argmax of a segmenter", np.zeros((3, 8, 8), np.int64), "classes"),
        ("one sigmoid", np.asarray([0, 1, 1]), "binary"),
        ("one sigmoid", np.asarray([[0], [1], [1]]), "binary"),
        ("one column", np.asarray([0, 1, 1]), "binary"),
        ("one column", np.asarray([0.5, 0.1, 2.0]), "values"),
        ("sigmoid", np.asarray([[0, 1, 1, 0]] * 3), "binary"),
        ("sigmoid", np.asarray([3, 1, 2]), "classes"),
    ],
)
def test_labels_determine_the_kind_they_fit(
    name: str, labels: np.ndarray, kind: str, tmp_path: Path
) -> None:  # type: ignore[type-arg]
    pattern = PATTERNS[name]
    term = only(detect(model_of(pattern, tmp_path), labels))
    assert term.kind == kind
    assert term.labelled
    assert not term.assumption
    assert term.balanced == (kind != "classes")


@pytest.mark.parametrize("name", ["softmax", "raw scores or values"])
def test_label_outside_the_classes_is_refused(name: str, tmp_path: Path) -> None:
    pattern = PATTERNS[name]
    with pytest.raises(
        DataError, match=r"has the class 4, but the model's output '\w' has 4 classes, which"
    ):
        detect(model_of(pattern, tmp_path), np.asarray([1, 4]))


def test_zeros_and_ones_beside_raw_scores_are_refused(tmp_path: Path) -> None:
    """They may be independent decisions, or classes marked by a 1; the user says which."""
    model = model_of(PATTERNS["raw scores or values"], tmp_path)
    labels = np.eye(4, dtype=np.int64)[:3]
    with pytest.raises(DataError, match="give one class per sample, or `outputs=l=binary`"):
        detect(model, labels)
    assert only(detect(model, labels, task="binary")).labelled


@pytest.mark.parametrize(
    "labels", [np.zeros((3, 7), np.int64), np.zeros((3, 7)), np.asarray([0.5, 0.2])]
)
def test_labels_of_no_output_are_refused(labels: np.ndarray, tmp_path: Path) -> None:  # type: ignore[type-arg]
    with pytest.raises(
        DataError, match="fits no output of the model; expected integers, one class"
    ):
        detect(model_of(PATTERNS["softmax"], tmp_path), labels)


def test_classes_of_no_output_are_noted(tmp_path: Path) -> None:
    """Folders of images give classes to models that have none."""
    found = detect(load(build(TWO), tmp_path), np.asarray([0, 1]), task="values")
    assert not any(term.labelled for term in found.terms)
    assert any("fit no output" in note for note in found.notes)


def test_labels_are_assigned_to_the_output_they_fit(tmp_path: Path) -> None:
    found = detect(load(build(TWO.replace("[6, 1]", "[6, 5]")), tmp_path), np.asarray([4, 0]))
    assert [(t.kind, t.labelled) for t in found.terms] == [("ambiguous", False), ("classes", True)]


# ------------------------------------------------------------------------------------------------------------ the user


def test_user_kinds_and_weights_are_used(tmp_path: Path) -> None:
    model = load(build(TWO), tmp_path)
    found = detect(model, outputs={"a": ("embedding", 2.0), "b": ("binary", 0.5)})
    assert [(t.kind, t.weight, t.source) for t in found.terms] == [
        ("embedding", 2.0, "user"),
        ("binary", 0.5, "user"),
    ]
    assert not found.notes
    ignored = detect(model, outputs={"b": ("ignore", 1.0)})
    assert ignored.tensors == ["a"]
    assert len(ignored.terms) == 2


def test_user_kind_overrides_the_detected_kind(tmp_path: Path) -> None:
    pattern = PATTERNS["softmax"]
    model = model_of(pattern, tmp_path)
    assert (only(detect(model, task="values")).kind, only(detect(model, task="values")).tensor) == (
        "values",
        "y",
    )
    assert only(detect(model, task="classes")).tensor == "l"
    assert only(detect(model, np.asarray([0, 1]), outputs={"y": ("values", 1.0)})).kind == "values"


def test_positions_are_classes_where_the_user_states_it(tmp_path: Path) -> None:
    text = """(float[N, 5, 6] x) => (float[N, 5] y) <float[6, 1] w, int64[1] last = {2}>
        { l = MatMul(x, w) y = Squeeze(l, last) }"""
    model = load(build(text), tmp_path)
    assert "`outputs=y=classes` where one of the positions is chosen" in detect(model).notes[0]
    found = only(detect(model, outputs={"y": ("classes", 1.0)}))
    assert (found.kind, found.tensor, found.axis) == ("classes", "y", 1)


def test_user_weight_applies_to_a_part(tmp_path: Path) -> None:
    found = detect(
        model_of(PATTERNS["boxes and scores in one"], tmp_path), outputs={"y/b8": ("values", 3.0)}
    )
    assert [(t.tensor, t.kind, t.weight) for t in found.terms] == [
        ("b8", "values", 3.0),
        ("c5", "binary", DECISIONS),
    ]


def test_task_decides_ambiguous_outputs(tmp_path: Path) -> None:
    found = detect(load(build(TWO), tmp_path), task="classes")
    assert [(t.output, t.kind) for t in found.terms] == [("a", "classes"), ("b", "values")]
    argmax = PATTERNS["argmax of a tagger"]
    assert only(detect(model_of(argmax, tmp_path), task="classes")).tensor == "l"


@pytest.mark.parametrize(
    ("task", "outputs", "message"),
    [
        (None, {"c": ("values", 1.0)}, "`outputs` names 'c', but the outputs of .* are 'a', 'b'"),
        (
            None,
            {"a": ("boxes", 1.0)},
            "`outputs=a=boxes`: the kinds are classes, binary, values, embedding, ignore",
        ),
        (None, {"a": ("values", 0.0)}, "`outputs=a=values:0`: a weight is a number above 0"),
        (None, {"a": ("values", float("nan"))}, "a weight is a number above 0"),
        (None, {"b": ("classes", 1.0)}, "`outputs=b=classes` does not fit: 'b' has one column"),
        (None, {"b": ("embedding", 1.0)}, "`outputs=b=embedding` does not fit: 'b' has one column"),
        (None, {"a": ("ignore", 1.0), "b": ("ignore", 1.0)}, "every output is ignored"),
        (
            "values",
            {"a": ("values", 1.0), "b": ("values", 1.0)},
            "`task=values` and `outputs` both state",
        ),
        ("ignore", {}, "`task=ignore`: the tasks are classes, binary, values, embedding"),
        ("classes", {"a": ("ignore", 1.0)}, "`task=classes` does not fit: 'b' has one column"),
    ],
)
def test_invalid_output_settings_are_refused(
    task: str | None, outputs: dict[str, tuple[str, float]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        detect(load(build(TWO), tmp_path), task=task, outputs=outputs)


def test_integers_that_come_from_no_float_have_no_kind(tmp_path: Path) -> None:
    model = load(_branches(TensorProto.INT64, "ArgMax"), tmp_path)
    with pytest.raises(
        SettingsError, match="'y' holds int64 and comes from no single floating tensor"
    ):
        detect(model, outputs={"y": ("values", 1.0)})


def test_task_for_several_known_outputs_is_refused(tmp_path: Path) -> None:
    text = """(float[N, 6] x) => (float[] a, float[] b) <float[6, 3] wa, float[6, 2] wb>
        { l = MatMul(x, wa) m = MatMul(x, wb) a = Softmax(l) b = Sigmoid(m) }"""
    with pytest.raises(
        SettingsError, match="which of the model's 2 outputs it is about; give `outputs`"
    ):
        detect(load(build(text), tmp_path), task="values")


def test_directions_of_a_state_are_columns_of_whole_outputs_of_values_only() -> None:
    class States:
        """A graph whose tensors all are states, by direction first."""

        def state_axis(self, _: str) -> int:
            return 0

    def by_state(kind: str, axis: int | None, part: Part | None = None) -> tuple[int, ...]:
        term = Term("h", "h", "h", kind, axis, part)  # type: ignore[arg-type]
        return detection._by_state(States(), term).stacked  # type: ignore[arg-type]

    assert by_state("values", 2) == by_state("embedding", 2) == (0,)
    assert by_state("classes", 2) == ()
    assert by_state("values", None) == ()
    assert by_state("values", 2, Part(2, 0, 3)) == ()
    assert by_state("values", 0) == ()


@pytest.mark.parametrize(("columns", "offered"), [(1, False), (4, True)])
def test_positions_are_offered_as_classes_where_there_are_several(
    columns: int, offered: bool, tmp_path: Path
) -> None:
    text = f"""(float[N, {columns}, 6] x) => (float[] y) <float[6, 1] w, int64[1] last = {{2}}>
        {{ l = MatMul(x, w) y = Squeeze(l, last) }}"""
    (term,) = detect(load(build(text), tmp_path)).terms
    assert ("where one of the positions is chosen" in term.assumption) == offered
