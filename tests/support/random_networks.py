"""A Hypothesis strategy for small networks of many shapes: every one of them runs, and almost all can be pruned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from random_network_blocks import Sequences
from random_network_parts import IR, OPSETS, Choose, Maker, Value, jumps


@dataclass(frozen=True)
class Network:
    """A graph, and the blocks that it was made of."""

    proto: ModelProto
    blocks: tuple[str, ...]
    opset: int

    @property
    def rounds(self) -> bool:
        """A value on the edge of a step may fall either way."""
        return any(jumps(node) for node in self.proto.graph.node)

    def __repr__(self) -> str:
        return f"Network(opset {self.opset}: {' '.join(self.blocks)})"


class Blocks(Sequences):
    """Layers, joins and moves."""

    # --- images (C, H, W) ---------------------------------------------------------------------------------------

    def conv(
        self, x: Value, out: int, kernel: int = 3, groups: int = 1, bias: bool = True
    ) -> Value:
        c, h, w = x.shape
        inputs = [
            x.name,
            self.weight(out, c // groups, kernel, kernel),
            *([self.bias(out)] if bias else []),
        ]
        pad = kernel // 2
        return self.node("Conv", inputs, (out, h, w), pads=[pad] * 4, group=groups)

    def block_conv(self, x: Value) -> Value:
        return self.activate(
            self.conv(x, self.channels(), self.one_of((1, 3)), bias=self.pick(2) == 0)
        )

    def block_batch_norm(self, x: Value) -> Value:
        c = x.shape[0]
        inputs = [x.name, self.gain(c), self.bias(c), self.bias(c), self.gain(c)]
        return self.activate(self.node("BatchNormalization", inputs, x.shape))

    def block_depthwise(self, x: Value) -> Value:
        return self.activate(
            self.conv(x, x.shape[0] * (1 + self.pick(2)), 3, x.shape[0], self.pick(2) == 0)
        )

    def block_grouped(self, x: Value) -> Value:
        wide = self.conv(x, 4 * (1 + self.pick(3)), 1)
        groups = self.one_of((2, 4))
        return self.activate(self.conv(wide, 4 * (1 + self.pick(3)), 3, groups, self.pick(2) == 0))

    def block_transposed(self, x: Value) -> Value:
        c, h, w = x.shape
        groups = c if self.pick(3) == 0 else 1
        per_group = 1 + self.pick(2) if groups > 1 else self.channels()
        inputs = [x.name, self.weight(c, per_group, 3, 3), self.bias(per_group * groups)]
        return self.node(
            "ConvTranspose", inputs, (per_group * groups, h, w), group=groups, pads=[1] * 4
        )

    def block_residual(self, x: Value) -> Value:
        inner = self.activate(self.conv(x, self.channels(), 1))
        return self.activate(
            self.node("Add", [x.name, self.conv(inner, x.shape[0], 3).name], x.shape)
        )

    def block_dense_concat(self, x: Value) -> Value:
        grown = self.activate(self.conv(x, self.channels(), 3))
        parts = [x, grown] if self.pick(2) else [grown, x, x]
        return self.node(
            "Concat",
            [p.name for p in parts],
            (sum(p.shape[0] for p in parts), *x.shape[1:]),
            axis=1,
        )

    def block_split(self, x: Value) -> Value:
        c = x.shape[0]
        first = 1 + self.pick(c - 1) if c > 1 else 0
        if not first:
            return self.activate(x)
        names = self.split(x, (first, c - first))
        left = self.activate(Value(names[0], (first, *x.shape[1:])))
        right = Value(names[1], (c - first, *x.shape[1:]))
        return self.node("Concat", [right.name, left.name], x.shape, axis=self.axis(1, 4))

    def block_gated_halves(self, x: Value) -> Value:
        wide = self.conv(x, 2 * self.channels(), 1)
        half = (wide.shape[0] // 2, *x.shape[1:])
        names = self.split(wide, half[:1] * 2)
        gate = self.node("Sigmoid", [names[0]], half)
        return self.node("Mul", [gate.name, names[1]], half)

    def block_squeeze_excite(self, x: Value) -> Value:
        pooled = self.node("GlobalAveragePool", [x.name], (x.shape[0], 1, 1))
        inner = self.activate(self.conv(pooled, self.channels(), 1))
        gate = self.node("Sigmoid", [self.conv(inner, x.shape[0], 1).name], (x.shape[0], 1, 1))
        return self.node("Mul", [x.name, gate.name], x.shape)

    def block_single_channel_gate(self, x: Value) -> Value:
        gate = self.node("Sigmoid", [self.conv(x, 1, 3).name], (1, *x.shape[1:]))
        return self.node("Mul", [gate.name, x.name], x.shape)

    def block_shuffle(self, x: Value) -> Value:
        c, h, w = x.shape
        if c % 2:
            x = self.conv(x, c + 1, 1)
            c += 1
        apart = self.node("Reshape", [x.name, self.ints(0, 2, c // 2, h, w)], (2, c // 2, h, w))
        turned = self.node("Transpose", [apart.name], (c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
        return self.node(
            "Reshape", [turned.name, self.ints(0, self.one_of((-1, c)), h, w)], (c, h, w)
        )

    def block_channels_last(self, x: Value) -> Value:
        c, h, w = x.shape
        out = self.channels()
        last = self.node("Transpose", [x.name], (h, w, c), perm=[0, 2, 3, 1])
        made = self.node("MatMul", [last.name, self.weight(c, out)], (h, w, out))
        moved = self.node("Add", [made.name, self.bias(out)], (h, w, out))
        return self.activate(self.node("Transpose", [moved.name], (out, h, w), perm=[0, 3, 1, 2]))

    def block_slice(self, x: Value) -> Value:
        c, h, w = x.shape
        if c < 3:
            return self.activate(x)
        low = self.pick(c - 2)
        high = low + 1 + self.pick(c - low)
        start, stop = (
            (low, high) if self.pick(2) else (low - c, high - c if high < c else 2**31 - 1)
        )
        return self.slice(x, start, stop, 1, (high - low, h, w))

    def block_pad_shortcut(self, x: Value) -> Value:
        c, h, w = x.shape
        before, after = self.pick(3), 1 + self.pick(2)
        out = before + c + after
        padded = self.pad(x, (0, before, 0, 0, 0, after, 0, 0), (out, h, w))
        return self.activate(
            self.node("Add", [self.conv(x, out, 3).name, padded.name], (out, h, w))
        )

    def block_gather(self, x: Value) -> Value:
        c = x.shape[0]
        low = c if self.opset >= 11 else 0
        order = [self.pick(c + low) - low for _ in range(1 + self.pick(c + 2))]
        return self.node("Gather", [x.name, self.ints(*order)], (len(order), *x.shape[1:]), axis=1)

    def block_depth_to_space(self, x: Value) -> Value:
        _, h, w = x.shape
        out = 1 + self.pick(4)
        wide = self.conv(x, 4 * out, 1)
        mode = {"mode": self.one_of(("DCR", "CRD"))} if self.opset >= 11 else {}
        spread = self.node("DepthToSpace", [wide.name], (out, 2 * h, 2 * w), blocksize=2, **mode)
        return self.node("MaxPool", [spread.name], (out, h, w), kernel_shape=[2, 2], strides=[2, 2])

    def block_space_to_depth(self, x: Value) -> Value:
        c, h, w = x.shape
        large = self.resized(x, (c, 2 * h, 2 * w))
        return self.node("SpaceToDepth", [large.name], (4 * c, h, w), blocksize=2)

    def block_pixel_shuffle(self, x: Value) -> Value:
        _, h, w = x.shape
        out = 2 + self.pick(3)
        wide = self.conv(x, 4 * out, 1)
        apart = self.node("Reshape", [wide.name, self.ints(0, out, 2, 2, h, w)], (out, 2, 2, h, w))
        turned = self.node("Transpose", [apart.name], (out, h, 2, w, 2), perm=[0, 1, 4, 2, 5, 3])
        large = self.node(
            "Reshape", [turned.name, self.ints(-1, out, 2 * h, 2 * w)], (out, 2 * h, 2 * w)
        )
        return self.node(
            "AveragePool", [large.name], (out, h, w), kernel_shape=[2, 2], strides=[2, 2]
        )

    def block_pool(self, x: Value) -> Value:
        op = self.one_of(("MaxPool", "AveragePool", "LpPool"))
        return self.node(op, [x.name], x.shape, kernel_shape=[3, 3], pads=[1] * 4)

    def block_per_channel(self, x: Value) -> Value:
        c = x.shape[0]
        op, constant = self.one_of(
            (("Mul", self.gain), ("Add", self.bias), ("PRelu", self.gain), ("Sub", self.bias))
        )
        return self.node(op, [x.name, constant(c, 1, 1)], x.shape)

    def block_lrn(self, x: Value) -> Value:
        return self.node("LRN", [x.name], x.shape, size=self.one_of((3, 5)), alpha=0.5, beta=0.75)

    def block_sum_of_channels(self, x: Value) -> Value:
        total = self.reduce("ReduceSum", x, [1], (1, *x.shape[1:]))
        return self.conv(total, self.channels(), 3)

    # --- vectors (F,) and tokens (T, F) -------------------------------------------------------------------------

    def linear(self, x: Value, out: int) -> Value:
        size = x.shape[-1]
        shape = (*x.shape[:-1], out)
        if len(x.shape) == 1 and self.pick(2):
            turned = self.pick(2)
            weight = self.weight(out, size) if turned else self.weight(size, out)
            bias = (
                [self.bias(*self.one_of(((out,), (1, out), (1,))))]
                if self.pick(3) or self.opset < 11
                else []
            )
            attrs = {"alpha": self.one_of((1.0, 0.5)), "beta": self.one_of((1.0, 2.0))}
            return self.node("Gemm", [x.name, weight, *bias], shape, transB=turned, **attrs)
        made = self.node("MatMul", [x.name, self.weight(size, out)], shape)
        return self.node("Add", [made.name, self.bias(out)], shape) if self.pick(2) else made

    def block_linear(self, x: Value) -> Value:
        return self.activate(self.linear(x, self.channels()))

    def block_linear_residual(self, x: Value) -> Value:
        inner = self.activate(self.linear(x, self.channels()))
        return self.node("Add", [self.linear(inner, x.shape[-1]).name, x.name], x.shape)

    def block_join(self, x: Value) -> Value:
        other = self.linear(x, self.channels())
        size = x.shape[-1] + other.shape[-1]
        axis = self.axis(len(x.shape), len(x.shape) + 1)
        return self.node("Concat", [other.name, x.name], (*x.shape[:-1], size), axis=axis)

    def block_regroup(self, x: Value) -> Value:
        """Features as a small table and back, turned around."""
        wide = self.activate(self.linear(x, 6))
        table = self.node(
            "Reshape", [wide.name, self.ints(*[0] * len(x.shape), 2, 3)], (*x.shape[:-1], 2, 3)
        )
        axes = list(range(len(x.shape) + 2))
        turned = self.node(
            "Transpose", [table.name], (*x.shape[:-1], 3, 2), perm=[*axes[:-2], axes[-1], axes[-2]]
        )
        return self.node(
            "Reshape", [turned.name, self.ints(*[0] * len(x.shape), 6)], (*x.shape[:-1], 6)
        )

    def block_softmax(self, x: Value) -> Value:
        x = self.linear(x, self.channels())
        return self.node(
            "Softmax",
            [x.name],
            x.shape,
            axis=self.one_of((1, self.axis(len(x.shape), len(x.shape) + 1))),
        )

    def block_attention(self, x: Value) -> Value:
        t, f = x.shape
        heads, size = 1 + self.pick(2), 2 + self.pick(2)
        parts = []
        for turn in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            flat = self.linear(x, heads * size)
            split = self.node(
                "Reshape", [flat.name, self.ints(0, t, heads, size)], (t, heads, size)
            )
            parts.append(self.node("Transpose", [split.name], (), perm=turn))
        scores = self.node("MatMul", [parts[0].name, parts[1].name], (heads, t, t))
        weights = self.node("Softmax", [scores.name], scores.shape, axis=3)
        mixed = self.node("MatMul", [weights.name, parts[2].name], (heads, t, size))
        turned = self.node("Transpose", [mixed.name], (t, heads, size), perm=[0, 2, 1, 3])
        flat = self.node("Reshape", [turned.name, self.ints(0, t, -1)], (t, heads * size))
        return self.node("Add", [x.name, self.linear(flat, f).name], x.shape)

    def block_layer_norm(self, x: Value) -> Value:
        f = x.shape[-1]
        return self.node(
            "LayerNormalization", [x.name, self.gain(f), self.bias(f)], x.shape, axis=-1
        )

    def block_place(self, x: Value) -> Value:
        return self.node("Add", [x.name, self.bias(1, *x.shape)], x.shape)

    # --- from one kind to another -------------------------------------------------------------------------------

    def to_tokens(self, x: Value) -> Value:
        c, h, w = x.shape
        flat = self.node("Reshape", [x.name, self.ints(0, c, h * w)], (c, h * w))
        return self.node("Transpose", [flat.name], (h * w, c), perm=[0, 2, 1])

    def to_vector(self, x: Value) -> Value:
        size = int(np.prod(x.shape))
        if len(x.shape) == 3 and self.pick(2):
            pooled = self.node(
                self.one_of(("GlobalAveragePool", "GlobalMaxPool")), [x.name], (x.shape[0], 1, 1)
            )
            return self.squeeze(pooled, (2, 3), x.shape[:1])
        if len(x.shape) == 2 and self.pick(2):
            return self.reduce("ReduceMean", x, [1], x.shape[1:], keepdims=0)
        if self.pick(2):
            return self.node("Flatten", [x.name], (size,))
        return self.node("Reshape", [x.name, self.ints(0, -1)], (size,))


ANY = {
    "chain": 7,
    "binary": 8,
    "logic": 9,
    "bits": 11,
    "batch_size": 7,
    "repeat": 8,
    "across": 7,
    "one_hot": 7,
    "lp_norm": 7,
    "fake_quantised": 10,
    "quantised": 10,
    "integers": 11,
    "operators": 10,
}
IMAGE = {
    "conv": 7,
    "batch_norm": 9,
    "depthwise": 7,
    "grouped": 7,
    "transposed": 7,
    "residual": 7,
    "dense_concat": 7,
    "split": 7,
    "gated_halves": 7,
    "squeeze_excite": 7,
    "single_channel_gate": 7,
    "shuffle": 7,
    "channels_last": 7,
    "slice": 7,
    "pad_shortcut": 7,
    "gather": 7,
    "depth_to_space": 7,
    "space_to_depth": 7,
    "pixel_shuffle": 7,
    "pool": 7,
    "per_channel": 7,
    "lrn": 7,
    "sum_of_channels": 7,
    "statistic": 8,
    "global": 7,
    "instance_norm": 7,
    "group_norm": 18,
    "mean_variance": 9,
    "sampled": 10,
    **ANY,
}
VECTORS = {
    "linear": 7,
    "linear_residual": 7,
    "join": 7,
    "regroup": 7,
    "softmax": 7,
    "layer_norm": 17,
    **ANY,
}
FLAT = {**VECTORS, "tabular": 7}
TOKENS = {
    **VECTORS,
    "place": 7,
    "attention": 7,
    "einsum": 12,
    "recurrent": 7,
    "packed_attention": 7,
    "multi_head": 7,
    "group_query": 10,
    "rotary": 7,
    "standard_attention": 23,
    "rms_norm": 23,
    "rows": 12,
    "token_order": 11,
}
"""Blocks by the kind of value that they take, with the first opset that has what they are made of."""
KINDS = {"image": IMAGE, "flat": FLAT, "tokens": TOKENS}
ONLY_TOKENS = tuple(name for name in TOKENS if name not in FLAT)


@cache
def known(kind: str, opset: int) -> tuple[str, ...]:
    """The blocks of a kind that an opset can write; those that only tokens have are drawn as often as all others."""
    found = tuple(name for name, since in KINDS[kind].items() if since <= opset)
    return (*found, *(name for name in found if name in ONLY_TOKENS for _ in range(2)))


def grow(make: Blocks, x: Value, steps: int, blocks: list[str]) -> Value:
    """A few blocks behind a value."""
    kind = ("flat", "tokens", "image")[len(x.shape) - 1]
    for _ in range(steps):
        # Nothing may explode: a graph that grew wide is narrowed first.
        if x.shape[0 if kind == "image" else -1] > 24:
            x = make.block_conv(x) if kind == "image" else make.block_linear(x)
        blocks.append(make.spread(known(kind, make.opset)))
        x = getattr(make, f"block_{blocks[-1]}")(x)
    return x


def alone(kind: str, name: str, opset: int, choose: Choose, seed: int) -> ModelProto:
    """A network with one block."""
    make = Blocks(choose, seed, opset)
    image = Value("x", (2, 4, 4))
    x = make.conv(image, 5)
    if kind != "image":
        x = make.to_tokens(x) if kind == "tokens" else make.linear(make.to_vector(x), 7)
    x = getattr(make, f"block_{name}")(x)
    return finished(make, make.linear(x if kind == "flat" else make.to_vector(x), 3), image)


def each() -> Iterator[tuple[str, str, int]]:
    """Kind, name and opset of every block."""
    for kind, table in KINDS.items():
        yield from (
            (kind, name, opset)
            for name, since in table.items()
            for opset in OPSETS
            if since <= opset
        )


def finished(make: Maker, result: Value, start: Value) -> ModelProto:
    """The model of what was made between an image and a vector."""
    graph = helper.make_graph(
        make.nodes,
        "random",
        [helper.make_tensor_value_info(start.name, TensorProto.FLOAT, ["N", *start.shape])],
        [helper.make_tensor_value_info(result.name, TensorProto.FLOAT, ["N", *result.shape])],
        make.constants,
    )
    domains = {"": make.opset, **{node.domain: 1 for node in make.nodes if node.domain}}
    imports = [helper.make_opsetid(name, version) for name, version in domains.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR[make.opset])


def unusual(make: Maker, proto: ModelProto, start: Value) -> ModelProto:
    """The same model as some converters leave it: not sorted, an output listed twice, an input among the outputs."""
    graph = proto.graph
    if make.pick(3) == 0:
        nodes = list(graph.node)[::-1]
        del graph.node[:]
        graph.node.extend(nodes)
    if make.pick(4) == 0:
        graph.output.append(graph.output[0])
    if make.pick(4) == 0:
        graph.output.extend(value for value in graph.input if value.name == start.name)
    return proto


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """An image passes a few blocks, maybe as tokens, then as a vector; one or two branches meet at the end."""
    make = Blocks(lambda n: draw(st.sampled_from(range(n))), draw(st.integers(0, 2**32 - 1)))
    blocks: list[str] = []
    size = 2 * (1 + make.pick(2))
    image = Value("x", (2, size, size))
    start = make.activate(make.conv(image, 6 + make.pick(6)))
    ends = [grow(make, start, 1 + make.pick(3), blocks)]
    if make.pick(3) == 0:
        ends.append(grow(make, start, 1 + make.pick(2), blocks))
    vectors = []
    for end in ends:
        if make.pick(2):
            end = grow(make, make.to_tokens(end), 1 + make.pick(3), blocks)
        vectors.append(grow(make, make.to_vector(end), make.pick(3), blocks))
    last = vectors[0]
    if len(vectors) == 2:
        widths = tuple(v.shape[-1] for v in vectors)
        last = make.node("Concat", [v.name for v in vectors], (sum(widths),), axis=1)
    proto = unusual(make, finished(make, make.linear(last, 3), image), image)
    return Network(proto, tuple(blocks), make.opset)
