"""A Hypothesis strategy for small networks of many shapes: every one of them runs, and almost all can be pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

Draw = Callable[[st.SearchStrategy], int]
ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSwish", "Softplus", "Elu", "Abs")


@dataclass(frozen=True)
class Value:
    """A tensor on the way: its name and its shape without the leading batch axis."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A graph, and the blocks that it was made of."""

    proto: ModelProto
    blocks: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Network({' '.join(self.blocks)})"


class Maker:
    """Appends blocks to a graph; every choice is drawn, every weight is seeded."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.nodes: list = []
        self.constants: list = []
        self.rng = np.random.default_rng(self.pick(1000))
        self.count = 0

    # --- drawing ------------------------------------------------------------------------------------------------

    def pick(self, n: int) -> int:
        return self.draw(st.integers(0, n - 1))

    def one_of(self, options: Sequence):
        return options[self.pick(len(options))]

    def channels(self) -> int:
        return 2 + self.pick(7)

    # --- building -----------------------------------------------------------------------------------------------

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what}_{self.count}"

    def node(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attrs) -> Value:
        out = self.name(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [out], f"node_{out}", **attrs))
        return Value(out, tuple(shape))

    def weight(self, *shape: int) -> str:
        fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        return self.constant(self.rng.standard_normal(shape) * np.sqrt(1.5 / fan), np.float32, "w")

    def bias(self, *shape: int) -> str:
        return self.constant(0.3 * self.rng.standard_normal(shape), np.float32, "b")

    def gain(self, *shape: int) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, shape), np.float32, "g")

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64, "i")

    def constant(self, values: object, dtype: type, what: str) -> str:
        name = self.name(what)
        self.constants.append(numpy_helper.from_array(np.asarray(values).astype(dtype), name))
        return name

    def activate(self, x: Value) -> Value:
        return self.node(self.one_of(ACTIVATIONS), [x.name], x.shape)

    # --- images (C, H, W) ---------------------------------------------------------------------------------------

    def conv(self, x: Value, out: int, kernel: int = 3, groups: int = 1, bias: bool = True) -> Value:
        c, h, w = x.shape
        inputs = [x.name, self.weight(out, c // groups, kernel, kernel), *([self.bias(out)] if bias else [])]
        pad = kernel // 2
        return self.node("Conv", inputs, (out, h, w), pads=[pad] * 4, group=groups)

    def block_conv(self, x: Value) -> Value:
        return self.activate(self.conv(x, self.channels(), self.one_of((1, 3)), bias=self.pick(2) == 0))

    def block_batch_norm(self, x: Value) -> Value:
        c = x.shape[0]
        inputs = [x.name, self.gain(c), self.bias(c), self.bias(c), self.gain(c)]
        return self.activate(self.node("BatchNormalization", inputs, x.shape))

    def block_depthwise(self, x: Value) -> Value:
        return self.activate(self.conv(x, x.shape[0] * (1 + self.pick(2)), 3, x.shape[0], self.pick(2) == 0))

    def block_grouped(self, x: Value) -> Value:
        wide = self.conv(x, 4 * (1 + self.pick(3)), 1)
        groups = self.one_of((2, 4))
        return self.activate(self.conv(wide, 4 * (1 + self.pick(3)), 3, groups, self.pick(2) == 0))

    def block_transposed(self, x: Value) -> Value:
        c, h, w = x.shape
        groups = c if self.pick(3) == 0 else 1
        per_group = 1 + self.pick(2) if groups > 1 else self.channels()
        inputs = [x.name, self.weight(c, per_group, 3, 3), self.bias(per_group * groups)]
        return self.node("ConvTranspose", inputs, (per_group * groups, h, w), group=groups, pads=[1] * 4)

    def block_residual(self, x: Value) -> Value:
        inner = self.activate(self.conv(x, self.channels(), 1))
        return self.activate(self.node("Add", [x.name, self.conv(inner, x.shape[0], 3).name], x.shape))

    def block_dense_concat(self, x: Value) -> Value:
        grown = self.activate(self.conv(x, self.channels(), 3))
        parts = [x, grown] if self.pick(2) else [grown, x, x]
        return self.node("Concat", [p.name for p in parts], (sum(p.shape[0] for p in parts), *x.shape[1:]), axis=1)

    def block_split(self, x: Value) -> Value:
        c = x.shape[0]
        first = 1 + self.pick(c - 1) if c > 1 else 0
        if not first:
            return self.activate(x)
        names = [self.name("part"), self.name("part")]
        node = helper.make_node("Split", [x.name, self.ints(first, c - first)], names, self.name("split"), axis=1)
        self.nodes.append(node)
        left = self.activate(Value(names[0], (first, *x.shape[1:])))
        right = Value(names[1], (c - first, *x.shape[1:]))
        return self.node("Concat", [right.name, left.name], x.shape, axis=-3)

    def block_gated_halves(self, x: Value) -> Value:
        wide = self.conv(x, 2 * self.channels(), 1)
        half = (wide.shape[0] // 2, *x.shape[1:])
        names = [self.name("half"), self.name("half")]
        self.nodes.append(helper.make_node("Split", [wide.name], names, self.name("split"), axis=1, num_outputs=2))
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
        return self.node("Reshape", [turned.name, self.ints(0, self.one_of((-1, c)), h, w)], (c, h, w))

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
        start, stop = (low, high) if self.pick(2) else (low - c, high - c if high < c else 2**62)
        inputs = [x.name, self.ints(start), self.ints(stop), self.ints(1)]
        return self.node("Slice", inputs, (high - low, h, w))

    def block_pad_shortcut(self, x: Value) -> Value:
        c, h, w = x.shape
        before, after = self.pick(3), 1 + self.pick(2)
        out = before + c + after
        padded = self.node("Pad", [x.name, self.ints(0, before, 0, 0, 0, after, 0, 0)], (out, h, w))
        return self.activate(self.node("Add", [self.conv(x, out, 3).name, padded.name], (out, h, w)))

    def block_gather(self, x: Value) -> Value:
        c = x.shape[0]
        order = [self.pick(2 * c) - c for _ in range(1 + self.pick(c + 2))]
        return self.node("Gather", [x.name, self.ints(*order)], (len(order), *x.shape[1:]), axis=1)

    def block_depth_to_space(self, x: Value) -> Value:
        _, h, w = x.shape
        out = 1 + self.pick(4)
        wide = self.conv(x, 4 * out, 1)
        mode = self.one_of(("DCR", "CRD"))
        spread = self.node("DepthToSpace", [wide.name], (out, 2 * h, 2 * w), blocksize=2, mode=mode)
        return self.node("MaxPool", [spread.name], (out, h, w), kernel_shape=[2, 2], strides=[2, 2])

    def block_space_to_depth(self, x: Value) -> Value:
        c, h, w = x.shape
        inputs = [x.name, "", self.constant([1, 1, 2, 2], np.float32, "by")]
        large = self.node("Resize", inputs, (c, 2 * h, 2 * w), mode="nearest")
        return self.node("SpaceToDepth", [large.name], (4 * c, h, w), blocksize=2)

    def block_pixel_shuffle(self, x: Value) -> Value:
        _, h, w = x.shape
        out = 2 + self.pick(3)
        wide = self.conv(x, 4 * out, 1)
        apart = self.node("Reshape", [wide.name, self.ints(0, out, 2, 2, h, w)], (out, 2, 2, h, w))
        turned = self.node("Transpose", [apart.name], (out, h, 2, w, 2), perm=[0, 1, 4, 2, 5, 3])
        large = self.node("Reshape", [turned.name, self.ints(-1, out, 2 * h, 2 * w)], (out, 2 * h, 2 * w))
        return self.node("AveragePool", [large.name], (out, h, w), kernel_shape=[2, 2], strides=[2, 2])

    def block_pool(self, x: Value) -> Value:
        op = self.one_of(("MaxPool", "AveragePool", "LpPool"))
        return self.node(op, [x.name], x.shape, kernel_shape=[3, 3], pads=[1] * 4)

    def block_per_channel(self, x: Value) -> Value:
        c = x.shape[0]
        op, constant = self.one_of((("Mul", self.gain), ("Add", self.bias), ("PRelu", self.gain), ("Sub", self.bias)))
        return self.node(op, [x.name, constant(c, 1, 1)], x.shape)

    def block_lrn(self, x: Value) -> Value:
        return self.node("LRN", [x.name], x.shape, size=self.one_of((3, 5)), alpha=0.5, beta=0.75)

    def block_sum_of_channels(self, x: Value) -> Value:
        total = self.node("ReduceSum", [x.name, self.ints(1)], (1, *x.shape[1:]))
        return self.conv(total, self.channels(), 3)

    # --- vectors (F,) and tokens (T, F) -------------------------------------------------------------------------

    def linear(self, x: Value, out: int) -> Value:
        size = x.shape[-1]
        shape = (*x.shape[:-1], out)
        if len(x.shape) == 1 and self.pick(2):
            turned = self.pick(2)
            weight = self.weight(out, size) if turned else self.weight(size, out)
            bias = [self.bias(*self.one_of(((out,), (1, out), (1,))))] if self.pick(3) else []
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
        return self.node("Concat", [other.name, x.name], (*x.shape[:-1], size), axis=-1)

    def block_regroup(self, x: Value) -> Value:
        """Features as a small table and back, turned around."""
        wide = self.activate(self.linear(x, 6))
        table = self.node("Reshape", [wide.name, self.ints(*[0] * len(x.shape), 2, 3)], (*x.shape[:-1], 2, 3))
        axes = list(range(len(x.shape) + 2))
        turned = self.node("Transpose", [table.name], (*x.shape[:-1], 3, 2), perm=[*axes[:-2], axes[-1], axes[-2]])
        return self.node("Reshape", [turned.name, self.ints(*[0] * len(x.shape), 6)], (*x.shape[:-1], 6))

    def block_softmax(self, x: Value) -> Value:
        return self.node("Softmax", [x.name], x.shape, axis=self.one_of((1, -1)))

    def block_attention(self, x: Value) -> Value:
        t, f = x.shape
        heads, size = 1 + self.pick(2), 2 + self.pick(2)
        parts = []
        for turn in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            flat = self.linear(x, heads * size)
            split = self.node("Reshape", [flat.name, self.ints(0, t, heads, size)], (t, heads, size))
            parts.append(self.node("Transpose", [split.name], (), perm=turn))
        scores = self.node("MatMul", [parts[0].name, parts[1].name], (heads, t, t))
        weights = self.node("Softmax", [scores.name], scores.shape, axis=-1)
        mixed = self.node("MatMul", [weights.name, parts[2].name], (heads, t, size))
        turned = self.node("Transpose", [mixed.name], (t, heads, size), perm=[0, 2, 1, 3])
        flat = self.node("Reshape", [turned.name, self.ints(0, t, -1)], (t, heads * size))
        return self.node("Add", [x.name, self.linear(flat, f).name], x.shape)

    def block_layer_norm(self, x: Value) -> Value:
        f = x.shape[-1]
        return self.node("LayerNormalization", [x.name, self.gain(f), self.bias(f)], x.shape, axis=-1)

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
            pooled = self.node(self.one_of(("GlobalAveragePool", "GlobalMaxPool")), [x.name], (x.shape[0], 1, 1))
            return self.node("Squeeze", [pooled.name, self.ints(2, 3)], x.shape[:1])
        if len(x.shape) == 2 and self.pick(2):
            return self.node("ReduceMean", [x.name, self.ints(1)], x.shape[1:], keepdims=0)
        if self.pick(2):
            return self.node("Flatten", [x.name], (size,))
        return self.node("Reshape", [x.name, self.ints(0, -1)], (size,))


IMAGE = tuple(
    f"block_{n}"
    for n in (
        "conv", "conv", "batch_norm", "depthwise", "grouped", "transposed", "residual", "dense_concat", "split",
        "gated_halves", "squeeze_excite", "single_channel_gate", "shuffle", "channels_last", "slice", "pad_shortcut",
        "gather", "depth_to_space", "space_to_depth", "pixel_shuffle", "pool", "per_channel", "lrn", "sum_of_channels",
    )
)  # fmt: skip
FLAT = tuple(f"block_{n}" for n in ("linear", "linear", "linear_residual", "join", "regroup", "softmax", "layer_norm"))
TOKENS = (*FLAT, "block_attention", "block_attention", "block_place")


@st.composite
def networks(draw: Draw) -> Network:
    """An image passes a few blocks, maybe as tokens, then as a vector; one or two branches meet at the end."""
    make = Maker(draw)
    blocks: list[str] = []
    size = 2 * (1 + make.pick(2))

    def grow(x: Value, table: Sequence[str], steps: int) -> Value:
        for _ in range(steps):
            block = make.one_of(table)
            # Nothing may explode: a graph that grew wide is narrowed first.
            if x.shape[0 if len(x.shape) == 3 else -1] > 24:
                x = make.block_conv(x) if len(x.shape) == 3 else make.block_linear(x)
            x = getattr(make, block)(x)
            blocks.append(block.removeprefix("block_"))
        return x

    start = make.block_conv(Value("x", (2, size, size)))
    trunk = grow(start, IMAGE, 1 + make.pick(4))
    ends = [trunk]
    if make.pick(3) == 0:
        ends.append(grow(start, IMAGE, 1 + make.pick(2)))
    vectors = []
    for end in ends:
        if make.pick(3) == 0:
            end = grow(make.to_tokens(end), TOKENS, 1 + make.pick(3))
        vectors.append(grow(make.to_vector(end), FLAT, make.pick(3)))
    last = vectors[0]
    if len(vectors) == 2:
        widths = tuple(v.shape[-1] for v in vectors)
        last = make.node("Concat", [v.name for v in vectors], (sum(widths),), axis=1)
    result = make.linear(last, 3)
    graph = helper.make_graph(
        make.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, size, size])],
        [helper.make_tensor_value_info(result.name, TensorProto.FLOAT, ["N", 3])],
        make.constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return Network(proto, tuple(blocks))
