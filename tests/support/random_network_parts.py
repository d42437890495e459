"""Parts of random networks: drawn choices, seeded weights, nodes in the form an opset requires."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from graphs import OPSET, RUNTIME
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Choose = Callable[[int], int]
"""A number below the one given."""
NEWEST = OPSET if RUNTIME >= (1, 24) else 21
"""The newest opset that is drawn: what the oldest supported releases know is less than what the newest do."""
OPSETS = (NEWEST, 17, 10, 9)
IR = {NEWEST: 10 if NEWEST < 23 else 11, 17: 8, 10: 5, 9: 4}


@dataclass(frozen=True)
class Value:
    """A tensor on the way: its name and its shape without the leading batch axis."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Activation:
    """An operator that works element by element; ``domain`` is where its input must lie."""

    op: str
    domain: str = ""
    since: int = 1


def _activations() -> tuple[Activation, ...]:
    plain = "Relu Sigmoid Tanh LeakyRelu Softplus Elu Abs Selu HardSigmoid Softsign Neg Sin Cos Atan Identity Dropout"
    later = {
        "Sign": 9,
        "Erf": 9,
        "Shrink": 9,
        "ThresholdedRelu": 10,
        "Round": 11,
        "Celu": 12,
        "HardSwish": 14,
    }
    within = {
        "unit": {"Exp": 1, "Sinh": 9, "Cosh": 9, "Asinh": 9},
        "inside": {"Asin": 7, "Acos": 7, "Tan": 7, "Atanh": 9},
        "positive": {"Log": 1, "Sqrt": 1, "Reciprocal": 1},
        "above one": {"Acosh": 9},
    }
    return (
        *(Activation(op) for op in plain.split()),
        *(
            Activation(op, since=since)
            for op, since in {**later, "Mish": 18, "Gelu": 20, "Swish": 24}.items()
        ),
        *(
            Activation(op)
            for op in (
                "Floor",
                "Ceil",
                "com.microsoft.Gelu",
                "com.microsoft.QuickGelu",
                "com.microsoft.FastGelu",
                "Clip",
            )
        ),
        *(
            Activation(op, where, since)
            for where, ops in within.items()
            for op, since in ops.items()
        ),
    )


ACTIVATIONS = _activations()


STEPS = (
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Shrink",
    "ThresholdedRelu",
    "Mod",
    "Hardmax",
    "Equal",
    "Greater",
    "Less",
    "GreaterOrEqual",
    "LessOrEqual",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
)
"""Operators that jump: a difference in the last bit of what they read may be one of a whole step in what they give."""


WEIGHT_FORMS = (0.72, 0.07, 0.07, 0.04, 0.1)
"""Frequencies of weights stored as they are read, as float16, transposed, flat, and with another use."""


def jumps(node: NodeProto) -> bool:
    """True for a node of ``STEPS``, and for a cast to a type without fractions."""
    to = next((a.i for a in node.attribute if a.name == "to"), TensorProto.FLOAT)
    return node.op_type in STEPS or (node.op_type == "Cast" and to != TensorProto.FLOAT)


class Maker:
    """Appends to a graph; every choice is that of ``choose``, every weight is seeded."""

    def __init__(self, choose: Choose, seed: int, opset: int = 0) -> None:
        self.choose = choose
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.rng = np.random.default_rng(seed)
        self.earlier: dict[tuple[int, ...], str] = {}
        self.count = 0
        self.opset = opset or self.spread((NEWEST, NEWEST, NEWEST, *OPSETS))

    # --- choosing ------------------------------------------------------------------------------------------------

    def pick(self, n: int) -> int:
        return int(self.choose(n))

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self.pick(len(options))]

    def spread(self, options: Sequence[Any]) -> Any:
        """Draw one of the strategies with equal probability; Hypothesis's own ``one_of`` repeats earlier choices."""
        return options[
            (self.pick(len(options)) + int(self.rng.integers(len(options)))) % len(options)
        ]

    def channels(self) -> int:
        return 2 + self.pick(7)

    # --- building -----------------------------------------------------------------------------------------------

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what}_{self.count}"

    def node(self, op: str, inputs: Sequence[str], shape: Sequence[int], **attrs: Any) -> Value:
        return Value(self.outputs(op, inputs, 1, **attrs)[0], tuple(shape))

    def outputs(self, op: str, inputs: Sequence[str], count: int, **attrs: Any) -> list[str]:
        """A node with several outputs; an operator of another domain has it in front."""
        domain, _, op = op.rpartition(".")
        names = [self.name(op.lower()) for _ in range(count)]
        self.nodes.append(
            helper.make_node(op, list(inputs), names, f"node_{names[0]}", domain=domain, **attrs)
        )
        return names

    def weight(self, *shape: int) -> str:
        """A new weight, or now and then one that is stored in another form, or for another node already."""
        fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        value = self.rng.standard_normal(shape) * np.sqrt(1.5 / fan)
        form = self.rng.choice(("plain", "half", "turned", "flat", "again"), p=WEIGHT_FORMS)
        if form == "again" and shape in self.earlier:
            return self.copied("Identity", self.earlier[shape])
        if form == "half" and self.opset >= 9:
            half = self.constant(value, np.float16, "w")
            return self.copied("Cast", half, to=TensorProto.FLOAT)
        if form == "flat":
            flat = self.constant(value.reshape(-1), np.float32, "w")
            return self.copied("Reshape", flat, self.ints(*shape))
        if form == "turned" and len(shape) == 2:
            turned = self.constant(value.T, np.float32, "w")
            self.earlier[shape[::-1]] = turned
            return self.copied("Transpose", turned)
        self.earlier[shape] = self.constant(value, np.float32, "w")
        return self.earlier[shape]

    def copied(self, op: str, *inputs: str, **attrs: Any) -> str:
        """A node that moves or casts a constant."""
        return self.outputs(op, inputs, 1, **attrs)[0]

    def bias(self, *shape: int) -> str:
        return self.constant(0.3 * self.rng.standard_normal(shape), np.float32, "b")

    def gain(self, *shape: int) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, shape), np.float32, "g")

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64, "i")

    def number(self, value: float) -> str:
        return self.constant(value, np.float32, "n")

    def constant(self, values: object, dtype: Any, what: str) -> str:
        name = self.name(what)
        self.constants.append(numpy_helper.from_array(np.asarray(values).astype(dtype), name))
        return name

    # --- forms that changed ---------------------------------------------------------------------------------------

    def listed(
        self,
        op: str,
        x: str,
        values: Sequence[int],
        name: str,
        since: int,
        shape: Sequence[int],
        **attrs: Any,
    ) -> Value:
        """A list of integers as an input, as it is since an opset, or as the attribute that it was before."""
        if self.opset >= since:
            return self.node(op, [x, self.ints(*values)], shape, **attrs)
        return self.node(op, [x], shape, **{name: list(values)}, **attrs)

    def reduce(
        self, op: str, x: Value, axes: Sequence[int], shape: Sequence[int], keepdims: int = 1
    ) -> Value:
        since = 13 if op == "ReduceSum" else 18
        return self.listed(op, x.name, axes, "axes", since, shape, keepdims=keepdims)

    def squeeze(self, x: Value, axes: Sequence[int], shape: Sequence[int]) -> Value:
        return self.listed("Squeeze", x.name, axes, "axes", 13, shape)

    def unsqueeze(self, x: Value, axes: Sequence[int], shape: Sequence[int]) -> Value:
        return self.listed("Unsqueeze", x.name, axes, "axes", 13, shape)

    def pad(self, x: Value, pads: Sequence[int], shape: Sequence[int]) -> Value:
        return self.listed("Pad", x.name, pads, "pads", 11, shape)

    def split(self, x: Value, sizes: Sequence[int], axis: int = 1) -> list[str]:
        if self.opset >= 18 and len(set(sizes)) == 1 and self.pick(2):
            return self.outputs("Split", [x.name], len(sizes), axis=axis, num_outputs=len(sizes))
        if self.opset >= 13:
            return self.outputs("Split", [x.name, self.ints(*sizes)], len(sizes), axis=axis)
        return self.outputs("Split", [x.name], len(sizes), axis=axis, split=list(sizes))

    def slice(self, x: Value, start: int, stop: int, axis: int, shape: Sequence[int]) -> Value:
        if self.opset < 10:
            return self.node("Slice", [x.name], shape, axes=[axis], starts=[start], ends=[stop])
        kind = (np.int64, np.int32)[self.pick(2)]  # one type for all bounds
        bounds = [self.constant([i], kind, "bound") for i in (start, stop, axis)]
        return self.node("Slice", [x.name, *bounds], shape)

    def axis(self, axis: int, rank: int) -> int:
        """Counted from the end or from the front; old operators know only the latter."""
        return axis - rank if self.opset >= 13 and self.pick(2) else axis

    def resized(self, x: Value, shape: Sequence[int], mode: str = "nearest") -> Value:
        """Twice as high and wide."""
        scales = self.constant([1, 1, 2, 2], np.float32, "by")
        if self.opset < 11:
            return self.node(
                "Upsample" if self.opset < 10 else "Resize", [x.name, scales], shape, mode=mode
            )
        return self.node("Resize", [x.name, "", scales], shape, mode=mode)

    # --- element by element -----------------------------------------------------------------------------------------

    def activate(self, x: Value) -> Value:
        known = [a for a in ACTIVATIONS if a.since <= self.opset]
        return self.apply(self.spread(known), x)

    def apply(self, found: Activation, x: Value) -> Value:
        x = self.within(found.domain, x)
        if found.op != "Clip":
            return self.node(found.op, [x.name], x.shape)
        if self.opset < 11:
            return self.node("Clip", [x.name], x.shape, min=-0.7, max=1.5)
        return self.node("Clip", [x.name, self.number(-0.7), self.number(1.5)], x.shape)

    def within(self, domain: str, x: Value) -> Value:
        """The values, brought to where an operator is defined and tame."""
        if domain in ("unit", "inside"):
            x = self.node("Tanh", [x.name], x.shape)
        if domain == "inside":
            x = self.node("Mul", [x.name, self.number(0.9)], x.shape)
        if domain in ("positive", "above one"):
            x = self.node("Softplus", [x.name], x.shape)
            x = self.node(
                "Add", [x.name, self.number(0.5 if domain == "positive" else 1.1)], x.shape
            )
        return x
