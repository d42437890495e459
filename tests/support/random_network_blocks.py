"""Blocks of random networks beyond layers and joins: statistics, logic, integers, sequences, fused attention."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, numpy_helper
from random_network_parts import Activation, Maker, Value

COMPARE = (("Greater", 9), ("Less", 9), ("GreaterOrEqual", 12), ("LessOrEqual", 12))
STATISTICS = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


class Elementwise(Maker):
    """Operators on values of any rank. Constants have the shape of the channels: axis 0 of images, else the last."""

    def along(self, x: Value) -> tuple[int, ...]:
        """The shape of one number a channel, as it broadcasts."""
        return (x.shape[0], 1, 1) if len(x.shape) == 3 else (x.shape[-1],)

    def per_channel(self, x: Value, low: float = -0.5, high: float = 0.5) -> str:
        return self.constant(self.rng.uniform(low, high, self.along(x)), np.float32, "c")

    def cast(self, x: Value, to: int) -> Value:
        return self.node("Cast", [x.name], x.shape, to=to)

    def block_chain(self, x: Value) -> Value:
        """Activations after one another, as fused operators are written out."""
        return self.activate(self.activate(self.activate(x)))

    def block_binary(self, x: Value) -> Value:
        ops = ("Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "Div", "Pow", "Mod")
        op = self.one_of(ops if self.opset >= 10 else ops[:-1])
        other = self.activate(x) if self.pick(2) else Value(self.per_channel(x), ())
        if op in ("Div", "Pow"):
            x = self.within("positive", x)
            return self.node(op, [x.name, self.per_channel(x, 0.5, 2.0)], x.shape)
        if op == "Mod":
            return self.node(op, [x.name, self.per_channel(x, 3.0, 4.0)], x.shape, fmod=1)
        several = [x.name] * (op in ("Max", "Min", "Mean", "Sum") and self.pick(2))
        return self.node(op, [x.name, other.name, *several], x.shape)

    def truth(self, x: Value) -> Value:
        """Truth values."""
        kind = self.pick(5)
        if kind == 0:
            return self.cast(self.node("Relu", [x.name], x.shape), TensorProto.BOOL)
        if kind == 1:
            return self.node(
                self.one_of(("IsNaN", *(["IsInf"] * (self.opset >= 10)))), [x.name], x.shape
            )
        if kind == 2 and self.opset >= 11:
            floor = self.node("Floor", [x.name], x.shape)
            return self.node(
                "Equal",
                [floor.name, self.constant(np.zeros(self.along(x)), np.float32, "z")],
                x.shape,
            )
        op = self.one_of([name for name, since in COMPARE if since <= self.opset])
        return self.node(op, [x.name, self.per_channel(x)], x.shape)

    def block_logic(self, x: Value) -> Value:
        found = self.truth(x)
        if self.pick(2):
            found = self.node("Not", [found.name], x.shape)
        if self.pick(3):
            found = self.node(
                self.one_of(("And", "Or", "Xor")), [found.name, self.truth(x).name], x.shape
            )
        if self.pick(2):
            return self.node("Where", [found.name, x.name, self.per_channel(x)], x.shape)
        return self.node("Mul", [x.name, self.cast(found, TensorProto.FLOAT).name], x.shape)

    def block_bits(self, x: Value) -> Value:
        """Codes that are shifted and masked; nothing but codes of zero stands for zero."""
        large = self.node(
            "Mul", [self.node("Abs", [x.name], x.shape).name, self.number(4.0)], x.shape
        )
        ops = ("Shift", "And", "Or", "Xor", "Not") if self.opset >= 18 else ("Shift",)
        op = self.one_of(ops)
        kind, dtype = (
            (TensorProto.UINT32, np.uint32) if op == "Shift" else (TensorProto.INT32, np.int32)
        )
        coded = self.cast(large, kind)
        other = self.constant(self.rng.integers(0, 3, self.along(x)), dtype, "k")
        if op == "Not":
            coded = self.node("BitwiseNot", [coded.name], x.shape)
        elif op == "Shift":
            direction = self.one_of(("LEFT", "RIGHT"))
            coded = self.node("BitShift", [coded.name, other], x.shape, direction=direction)
        else:
            coded = self.node(f"Bitwise{op}", [coded.name, other], x.shape)
        return self.node(
            "Mul", [self.cast(coded, TensorProto.FLOAT).name, self.number(0.25)], x.shape
        )

    def block_batch_size(self, x: Value) -> Value:
        """A size that is read at run time, of an axis that stays."""
        found = self.node("Shape", [x.name], ())
        if self.opset < 15 or self.pick(2):
            first = self.node("Gather", [found.name, self.constant(0, np.int64, "i")], ())
        else:
            first = self.node("Shape", [x.name], (), start=0, end=1)
        scaled = self.node("Cast", [first.name], (), to=TensorProto.FLOAT)
        return self.node("Div", [x.name, scaled.name], x.shape)

    def block_repeat(self, x: Value) -> Value:
        """Copies along a new axis, and their sum."""
        axis = 1 + len(x.shape)
        wide = self.unsqueeze(x, [axis], (*x.shape, 1))
        shape = (*x.shape, 3)
        if self.pick(2):
            copies = self.node("Tile", [wide.name, self.ints(*[1] * axis, 3)], shape)
        else:
            copies = self.node("Expand", [wide.name, self.ints(*[1] * axis, 3)], shape)
        copies = self.node("Mul", [copies.name, self.gain(3)], shape)
        return self.reduce("ReduceSum", copies, [axis], x.shape, keepdims=0)

    # --- quantised ----------------------------------------------------------------------------------------------

    def codes(self, *shape: int) -> str:
        """Seven bits: pairs of wider products saturate on some processors."""
        return self.constant(self.rng.integers(-60, 61, shape), np.int8, "q")

    def scales(self, count: int, fan: int) -> str:
        return self.constant(
            self.rng.uniform(0.5, 1.5, count) / (30 * np.sqrt(fan)), np.float32, "s"
        )

    def data(self) -> list[str]:
        """Scale and zero point of activations."""
        return [self.number(0.05), self.constant(self.rng.integers(100, 140), np.uint8, "z")]

    def quantise(self, x: Value, along: list[str]) -> Value:
        return self.node("QuantizeLinear", [x.name, *along], x.shape)

    def block_fake_quantised(self, x: Value) -> Value:
        """Codes and back, with a scale of its own for every channel where the opset has that."""
        along, axis = self.data(), {}
        if self.opset >= 13 and self.pick(2):
            c = self.along(x)[0]
            along = [
                self.scales(c, 1),
                self.constant(self.rng.integers(100, 140, c), np.uint8, "z"),
            ]
            axis = {"axis": 1 if len(x.shape) == 3 else len(x.shape)}
        q = self.node("QuantizeLinear", [x.name, *along], x.shape, **axis)
        return self.node("DequantizeLinear", [q.name, *along], x.shape, **axis)

    def stored(self, shape: tuple[int, ...], axis: int, fan: int) -> str:
        """A weight in codes, as exporters write it."""
        if self.opset >= 13 and self.pick(2):
            scale = self.scales(shape[axis], fan)
            return self.node("DequantizeLinear", [self.codes(*shape), scale], (), axis=axis).name
        scale = self.constant(1 / (30 * np.sqrt(fan)), np.float32, "s")
        zero = self.constant(self.rng.integers(-3, 4), np.int8, "z")
        return self.node("DequantizeLinear", [self.codes(*shape), scale, zero], ()).name

    def block_quantised(self, x: Value) -> Value:
        """A layer between codes, with weights in codes."""
        image, out, along = len(x.shape) == 3, self.channels(), self.data()
        c, first = self.along(x)[0], self.quantise(x, along)
        real = self.node("DequantizeLinear", [first.name, *along], x.shape)
        if image:
            weight = self.stored((out, c, 1, 1), 0, c)
            made = self.node("Conv", [real.name, weight], (out, *x.shape[1:]))
        else:
            weight = self.stored((c, out), 1, c)
            made = self.node("MatMul", [real.name, weight], (*x.shape[:-1], out))
        made = self.node("Relu", [made.name], made.shape) if self.pick(2) else made
        again = self.quantise(made, along)
        return self.node("DequantizeLinear", [again.name, *along], made.shape)

    def block_integers(self, x: Value) -> Value:
        """A layer of integer products, its range found as it runs."""
        image, out, c = len(x.shape) == 3, self.channels(), self.along(x)[0]
        shape = (out, *x.shape[1:]) if image else (*x.shape[:-1], out)
        q, s, z = self.outputs("DynamicQuantizeLinear", [x.name], 3)
        # ConvInteger of ONNX Runtime takes unsigned weights.
        kind = np.uint8 if image else np.int8
        low = 60 if image else 0
        codes = self.rng.integers(-60, 61, (out, c, 1, 1) if image else (c, out)) + low
        zero = self.constant(low, kind, "z")
        op = "ConvInteger" if image else "MatMulInteger"
        made = self.node(op, [q, self.constant(codes, kind, "q"), z, zero], shape)
        scale = self.node("Mul", [s, self.number(1 / (30 * np.sqrt(c)))], ())
        return self.node("Mul", [self.cast(made, TensorProto.FLOAT).name, scale.name], shape)

    def block_operators(self, x: Value) -> Value:
        """The same with scales in the operator."""
        image, out, c, along = len(x.shape) == 3, self.channels(), self.along(x)[0], self.data()
        shape = (out, *x.shape[1:]) if image else (*x.shape[:-1], out)
        several = self.pick(2) == 1
        scale = (
            self.scales(out, c)
            if several
            else self.constant(1 / (30 * np.sqrt(c)), np.float32, "s")
        )
        zero = self.constant(np.zeros(out if several else ()), np.int8, "z")
        first = self.quantise(x, along)
        if image:
            weight = self.codes(out, c, 1, 1)
            bias = [self.constant(self.rng.integers(-400, 400, out), np.int32, "b")] * self.pick(2)
            made = self.node(
                "QLinearConv", [first.name, *along, weight, scale, zero, *along, *bias], shape
            )
        else:
            made = self.node(
                "QLinearMatMul",
                [first.name, *along, self.codes(c, out), scale, zero, *along],
                shape,
            )
        return self.node("DequantizeLinear", [made.name, *along], shape)

    def block_tabular(self, x: Value) -> Value:
        """Nodes that scikit-learn's exporter puts in front of a network."""
        size = self.one_of((x.shape[-1], 1))
        offset, scale = (
            self.rng.standard_normal(size).tolist(),
            self.rng.uniform(0.5, 1.5, size).tolist(),
        )
        kind = self.pick(3)
        if kind == 0:
            return self.node("ai.onnx.ml.Scaler", [x.name], x.shape, offset=offset, scale=scale)
        if kind == 1:
            values = {"imputed_value_floats": offset, "replaced_value_float": 0.0}
            return self.node("ai.onnx.ml.Imputer", [x.name], x.shape, **values)
        away = self.within("positive", x)
        return self.node(
            "ai.onnx.ml.Normalizer", [away.name], x.shape, norm=self.one_of(("MAX", "L1", "L2"))
        )


class Statistics(Elementwise):
    """Normalisations and reductions. Variances are kept away from zero: there, nothing would be left but rounding."""

    def uneven(self, x: Value) -> Value:
        return self.node(
            "Add",
            [x.name, self.constant(self.rng.standard_normal(x.shape), np.float32, "u")],
            x.shape,
        )

    def block_statistic(self, x: Value) -> Value:
        """One of an image over its pixels."""
        op = self.one_of(STATISTICS)
        x = self.within("positive", x) if op in ("Prod", "LogSum") else x
        x = self.node("Mul", [x.name, self.number(0.5)], x.shape) if op == "Prod" else x
        shape = (x.shape[0], 1, 1)
        back = self.axis(2, 4)
        found = self.reduce(f"Reduce{op}", x, [back, back + 1], shape)
        if self.pick(2):
            return self.node("Add", [x.name, self.node("Tanh", [found.name], shape).name], x.shape)
        return self.node("Expand", [found.name, self.ints(1, 1, *x.shape[1:])], x.shape)

    def block_across(self, x: Value) -> Value:
        """One over channels, which more channels then read."""
        op, out = self.one_of(STATISTICS), self.channels()
        x = self.within("positive", x) if op in ("Prod", "LogSum") else x
        image = len(x.shape) == 3
        axis, rank = (1 if image else len(x.shape)), len(x.shape) + 1
        shape = (1, *x.shape[1:]) if image else (*x.shape[:-1], 1)
        found = self.node(
            "Tanh", [self.reduce(f"Reduce{op}", x, [self.axis(axis, rank)], shape).name], shape
        )
        wide = (out, *x.shape[1:]) if image else (*x.shape[:-1], out)
        return self.node("Mul", [found.name, self.gain(*((out, 1, 1) if image else (out,)))], wide)

    def block_global(self, x: Value) -> Value:
        shape = (x.shape[0], 1, 1)
        # The last as the runtime has it up to opset 21.
        ops = (
            "GlobalAveragePool",
            "GlobalMaxPool",
            "GlobalLpPool",
        )
        pooled = self.node(self.one_of(ops if self.opset < 22 else ops[:2]), [x.name], shape)
        return self.node("Add", [x.name, self.node("Tanh", [pooled.name], shape).name], x.shape)

    def block_instance_norm(self, x: Value) -> Value:
        c = x.shape[0]
        return self.node(
            "InstanceNormalization",
            [self.uneven(x).name, self.gain(c), self.bias(c)],
            x.shape,
            epsilon=0.1,
        )

    def block_group_norm(self, x: Value) -> Value:
        _, h, w = x.shape
        groups = 2 + self.pick(2)
        c = groups * (1 + self.pick(3))
        wide = self.uneven(self.node("Conv", [x.name, self.weight(c, x.shape[0], 1, 1)], (c, h, w)))
        size = c if self.opset >= 21 else groups
        inputs = [wide.name, self.gain(size), self.bias(size)]
        return self.node("GroupNormalization", inputs, wide.shape, num_groups=groups, epsilon=0.1)

    def block_mean_variance(self, x: Value) -> Value:
        """A layer of its own, all of whose channels are kept."""
        wide = self.node("Conv", [x.name, self.weight(3, x.shape[0], 1, 1)], (3, *x.shape[1:]))
        return self.node(
            "MeanVarianceNormalization", [self.uneven(wide).name], wide.shape, axes=[0, 2, 3]
        )

    def block_lp_norm(self, x: Value) -> Value:
        away = (
            self.node("Add", [x.name, self.number(3.0)], x.shape)
            if self.pick(2)
            else self.within("positive", x)
        )
        axis = self.one_of(range(1, len(x.shape) + 1))
        return self.node("LpNormalization", [away.name], x.shape, axis=axis, p=1 + self.pick(2))

    def block_rms_norm(self, x: Value) -> Value:
        return self.node(
            "RMSNormalization", [x.name, self.gain(x.shape[-1])], x.shape, axis=-1, epsilon=0.1
        )

    def block_one_hot(self, x: Value) -> Value:
        """Whatever is largest, alone or in numbers; along the channels of a layer of its own, for those stay."""
        if len(x.shape) < 3:
            x = self.node("MatMul", [x.name, self.weight(x.shape[-1], 4)], (*x.shape[:-1], 4))
        op, rank = self.one_of(("Softmax", "LogSoftmax", "Hardmax")), len(x.shape) + 1
        found = self.node(op, [x.name], x.shape, axis=self.axis(self.one_of(range(1, rank)), rank))
        return self.node("Add", [x.name, found.name], x.shape) if self.pick(2) else found


class Indexed(Statistics):
    """Operators that read or write at places of a list, the same in every sample."""

    def in_every_sample(self, x: Value, values: np.ndarray) -> str:
        """An array with a batch axis in front: zeros of the batch size of ``x`` are added."""
        sizes = self.node("Shape", [x.name], ())
        batch = self.node("Gather", [sizes.name, self.ints(0)], ())
        lengths = self.node("Concat", [batch.name, self.ints(*values.shape)], (), axis=0)
        zero = numpy_helper.from_array(np.zeros(1, values.dtype))
        zeros = self.node("ConstantOfShape", [lengths.name], values.shape, value=zero)
        held = self.constant(values[None], values.dtype, "places")
        return self.node("Add", [zeros.name, held], values.shape).name

    def block_rows(self, x: Value) -> Value:
        """Tokens in another order, or added to others."""
        tokens = x.shape[0]
        order = self.rng.permutation(tokens).reshape(-1, 1)
        op = self.spread(("GatherND", "GatherElements", "ScatterElements", "ScatterND"))
        if op == "GatherND":
            places = self.in_every_sample(x, order)
            return self.node(op, [x.name, places], x.shape, batch_dims=1)
        if op == "ScatterND":
            turned = self.node("Transpose", [x.name], (), perm=[1, 0, 2])
            rows = Value(self.constant(order, np.int64, "rows"), ())
            read = self.node("Gather", [turned.name, self.ints(*order[:, 0].tolist())], ())
            written = self.node(op, [turned.name, rows.name, self.activate(read).name], ())
            return self.node("Transpose", [written.name], x.shape, perm=[1, 0, 2])
        places = self.in_every_sample(x, order)
        wide = self.node("Expand", [places, self.ints(1, 1, x.shape[-1])], x.shape)
        if op == "GatherElements":
            return self.node(op, [x.name, wide.name], x.shape, axis=1)
        inputs = [x.name, wide.name, self.activate(x).name]
        reduction = {"reduction": "add"} if self.opset >= 16 and self.pick(2) else {}
        return self.node(op, inputs, x.shape, axis=1, **reduction)

    def block_sampled(self, x: Value) -> Value:
        """An image that is read at some places, or boxes of the first image of a batch."""
        channels, height, width = x.shape
        # ONNX Runtime has no kernels of opset 22 for the boxes.
        boxed = ("RoiAlign", "MaxRoiPool") if self.opset < 22 else ()
        op = self.spread((*boxed, *(["GridSample"] * (self.opset >= 16))))
        if op == "GridSample":
            grid = self.rng.uniform(-1, 1, (height, width, 2)).astype(np.float32)
            return self.node(op, [x.name, self.in_every_sample(x, grid)], x.shape)
        box = np.asarray([0, 0, width - 1, height - 1], np.float32)
        shape = (channels, 2, 2)
        if op == "MaxRoiPool":
            boxes = self.in_every_sample(x, np.append(np.float32(0), box))
            return self.node(op, [x.name, boxes], shape, pooled_shape=[2, 2])
        boxes = self.in_every_sample(x, box)
        first = self.in_every_sample(x, np.asarray(0, np.int64))
        sizes = {"output_height": 2, "output_width": 2, "sampling_ratio": 1}
        return self.node(op, [x.name, boxes, first], shape, **sizes)


class Sequences(Indexed):
    """Tokens (T, F): order, equations, recurrence, fused attention."""

    def block_token_order(self, x: Value) -> Value:
        """Tokens added up along the list, or the first ones turned around."""
        tokens = x.shape[0]
        if self.pick(2):
            axis = self.constant(self.one_of((1, -2)), np.int64, "axis")
            options = {"exclusive": self.pick(2), "reverse": self.pick(2)}
            total = self.node("CumSum", [x.name, axis], x.shape, **options)
            return self.node("Mul", [total.name, self.number(1 / tokens)], x.shape)
        sizes = self.node("Shape", [x.name], ())
        batch = self.node("Gather", [sizes.name, self.ints(0)], ())
        turned = self.ints(1 + self.pick(tokens))
        lengths = self.node("Expand", [turned, batch.name], ())
        return self.node(
            "ReverseSequence", [x.name, lengths.name], x.shape, batch_axis=0, time_axis=1
        )

    def block_einsum(self, x: Value) -> Value:
        t, f = x.shape
        out = self.channels()
        kind = self.pick(5)
        if kind == 0:
            return self.node(
                "Einsum", [x.name, self.weight(f, out)], (t, out), equation="btd,do->bto"
            )
        if kind == 1:
            return self.node(
                "Einsum", [self.weight(out, f), x.name], (t, out), equation="od, ...d -> ...o"
            )
        if kind == 2:  # the tokens as matrices of their own
            return self.node(
                "Einsum", [x.name, self.weight(t, f, out)], (t, out), equation="btd,tdo->bto"
            )
        if kind == 3:
            a = self.node(
                "Einsum", [x.name, self.weight(f, 2, 3)], (t, 2, 3), equation="btd,dhk->bthk"
            )
            return self.node(
                "Einsum", [a.name, self.weight(2, 3, out)], (t, out), equation="bthk,hko->bto"
            )
        a = self.node("Einsum", [x.name, self.weight(f, out)], (t, out), equation="btd,do->bto")
        b = self.node("Einsum", [x.name, self.weight(f, out)], (t, out), equation="btd,do->bto")
        scores = self.node("Einsum", [a.name, b.name], (t, t), equation="bqd,bkd->bqk")
        scores = self.node("Softmax", [scores.name], (t, t), axis=2)
        return self.node("Einsum", [scores.name, b.name], (t, out), equation="bqk,bko->bqo")

    def block_recurrent(self, x: Value) -> Value:
        t, f = x.shape
        op, hidden, directions = self.one_of(tuple(GATES)), 2 + self.pick(4), 1 + self.pick(2)
        rows, peeps = GATES[op] * hidden, [*[""] * 3, self.bias(directions, 3 * hidden)]
        inputs = [
            self.node("Transpose", [x.name], (), perm=[1, 0, 2]).name,
            self.weight(directions, rows, f),
            self.weight(directions, rows, hidden),
            *([self.bias(directions, 2 * rows)] if self.pick(2) else []),
        ]
        if op == "LSTM" and self.pick(3) == 0:
            inputs = [*inputs, *[""] * (4 - len(inputs)), *peeps]
        way = "bidirectional" if directions == 2 else self.one_of(("forward", "reverse"))
        attrs = {"linear_before_reset": self.pick(2)} if op == "GRU" else {}
        width = directions * hidden
        if self.pick(3) == 0:  # only what is left at the end
            last = self.outputs(op, inputs, 2, hidden_size=hidden, direction=way, **attrs)
            self.nodes[-1].output[0] = ""
            turned = self.node("Transpose", [last[1]], (), perm=[1, 0, 2])
            flat = self.node("Reshape", [turned.name, self.ints(0, 1, width)], (1, width))
            return self.node("Add", [flat.name, self.bias(t, width)], (t, width))
        every = self.node(op, inputs, (), hidden_size=hidden, direction=way, **attrs)
        turned = self.node("Transpose", [every.name], (), perm=[2, 0, 1, 3])
        return self.node("Reshape", [turned.name, self.ints(0, t, width)], (t, width))

    def projected(self, x: Value, size: int) -> str:
        return self.node(
            "MatMul", [x.name, self.weight(x.shape[-1], size)], (x.shape[0], size)
        ).name

    def block_packed_attention(self, x: Value) -> Value:
        """com.microsoft.Attention, always with its bias: without, ONNX Runtime 1.31 ends with a segmentation fault."""
        t, f = x.shape
        heads, size = 1 + self.pick(3), 1 + self.pick(2)
        width = heads * size
        inputs = [x.name, self.weight(f, 3 * width), self.bias(3 * width)]
        if self.pick(3) == 0:
            inputs += ["", "", self.bias(1, heads, t, t)]
        attrs = {"unidirectional": self.pick(2)}
        return self.node("com.microsoft.Attention", inputs, (t, width), num_heads=heads, **attrs)

    def block_multi_head(self, x: Value) -> Value:
        t, _ = x.shape
        heads, size = 1 + self.pick(3), 1 + self.pick(2)
        width = heads * size
        inputs = [self.projected(x, width) for _ in range(3)]
        inputs += [self.bias(3 * width)] if self.pick(2) else []
        if self.pick(3) == 0:
            inputs += [*[""] * (5 - len(inputs)), self.bias(1, heads, t, t)]
        return self.node("com.microsoft.MultiHeadAttention", inputs, (t, width), num_heads=heads)

    def block_group_query(self, x: Value) -> Value:
        """Heads of eight: the runtime takes no others. Lengths follow the batch."""
        t, _ = x.shape
        groups, each = 1 + self.pick(2), 1 + self.pick(2)
        heads = groups * each
        q, k, v = (
            self.projected(x, 8 * heads),
            self.projected(x, 8 * groups),
            self.projected(x, 8 * groups),
        )
        batch = self.node(
            "Slice", [self.node("Shape", [x.name], ()).name, self.ints(0), self.ints(1)], ()
        )
        lengths = self.node("Expand", [self.constant([t - 1], np.int32, "t"), batch.name], ())
        total = self.constant(t, np.int32, "t")
        inputs = [q, k, v, "", "", lengths.name, total]
        attrs = {"num_heads": heads, "kv_num_heads": groups}
        return Value(
            self.outputs("com.microsoft.GroupQueryAttention", inputs, 3, **attrs)[0], (t, 8 * heads)
        )

    def block_rotary(self, x: Value) -> Value:
        """Queries and keys, rotated by their positions, in front of an attention with as many key heads."""
        t, _ = x.shape
        heads, pairs = 1 + self.pick(3), 1 + self.pick(2)
        width = 2 * pairs * heads
        angles = np.outer(np.arange(t), 0.7 ** np.arange(pairs))
        cosines, sines = (self.constant(f(angles), np.float32, "angles") for f in (np.cos, np.sin))
        q, k, v = (self.projected(x, width) for _ in range(3))
        attrs = {"interleaved": self.pick(2)}
        if self.opset < 23 or self.pick(2):
            first = self.constant([0], np.int64, "first")
            turned = [
                self.node(
                    "com.microsoft.RotaryEmbedding", [y, first, cosines, sines], (t, width), **attrs
                ).name
                for y in (q, k)
            ]
        else:
            attrs["num_heads"] = heads
            positions = self.in_every_sample(x, np.arange(t))
            turned = [
                self.node(
                    "RotaryEmbedding", [y, cosines, sines, positions], (t, width), **attrs
                ).name
                for y in (q, k)
            ]
        inputs = [*turned, v]
        return self.node("com.microsoft.MultiHeadAttention", inputs, (t, width), num_heads=heads)

    def block_standard_attention(self, x: Value) -> Value:
        t, _ = x.shape
        groups, each, size, wide = (1 + self.pick(2) for _ in range(4))
        heads = groups * each
        sizes = (heads * size, groups * size, groups * wide)
        q, k, v = (self.projected(x, n) for n in sizes)
        mask = [self.bias(*self.one_of(((t, t), (1, heads, t, t))))] * self.pick(2)
        if self.pick(2):
            attrs = {"q_num_heads": heads, "kv_num_heads": groups}
            return self.node("Attention", [q, k, v, *mask], (t, heads * wide), **attrs)
        parts = []
        for name, n, d in ((q, heads, size), (k, groups, size), (v, groups, wide)):
            apart = self.node("Reshape", [name, self.ints(0, t, n, d)], (t, n, d))
            parts.append(self.node("Transpose", [apart.name], (n, t, d), perm=[0, 2, 1, 3]).name)
        made = self.node(
            "Attention", [*parts, *mask], (heads, t, wide), is_causal=self.pick(2) * (not mask)
        )
        turned = self.node("Transpose", [made.name], (t, heads, wide), perm=[0, 2, 1, 3])
        return self.node("Reshape", [turned.name, self.ints(0, t, heads * wide)], (t, heads * wide))


__all__ = ["Activation", "Sequences"]
