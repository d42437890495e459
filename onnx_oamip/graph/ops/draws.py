"""Random operators, written out as a fixed function of the name of the tensor and of the position in it."""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import Any
from zlib import crc32

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

FIRST_OPSET = 11
"""First opset with Range, by which positions are counted."""
FIRST_CAST_LIKE = 15
"""First opset with CastLike, for draws whose type is that of their input."""
STEP, FACTOR = 12.9898, 43758.5453
"""Constants of the hash ``frac(sin(STEP * position + phase) * FACTOR)``, which is spread evenly over 0 to 1."""
PHASES = 9973
"""Number of phases of the hash, of which the name of a tensor chooses one."""
LEAST = 1e-12
"""Added to a uniform number before its logarithm."""


def can_be_written_out(node: NodeProto, opset: int) -> bool:
    """Check that the operators of an opset suffice to compute what a node draws.

    Args:
        node: Any node.
        opset: Opset of the default domain.

    Returns:
        True for draws of uniform, normal and Bernoulli numbers whose type is known.
    """
    if node.op_type not in _WRITERS or opset < FIRST_OPSET:
        return False
    is_type_known = not node.input or any(a.name == "dtype" for a in node.attribute)
    return is_type_known or opset >= FIRST_CAST_LIKE


def written_out(node: NodeProto, unused: Callable[[str], str]) -> list[NodeProto]:
    """Write out a draw.

    Args:
        node: A node that can be written out.
        unused: Gives an unused name like the one it is called with.

    Returns:
        Nodes that compute numbers of the same distribution, the same ones in every run.
    """
    writer = _Writer(node, unused)
    value = _WRITERS[node.op_type](writer)
    result = helper.make_node("Identity", [value], [node.output[0]], name=node.name)
    return [*writer.nodes, result]


class _Writer:
    """Writes the nodes that compute the numbers of one draw, in double precision."""

    def __init__(self, node: NodeProto, unused: Callable[[str], str]) -> None:
        self.node = node
        self.nodes: list[NodeProto] = []
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._unused = unused

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output, whose name is returned."""
        name = self._unused(f"{self.node.output[0]}_{op}")
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def number(self, value: float) -> str:
        """Add a constant of one element."""
        return self.add("Constant", value=numpy_helper.from_array(np.asarray(value, np.float64)))

    def attribute(self, name: str, default: float) -> str:
        """Add a constant with the value of an attribute."""
        return self.number(float(self.attributes.get(name, default)))

    def shape(self) -> str:
        """Add the shape of the draw: an attribute, or that of the input."""
        if "shape" not in self.attributes:
            return self.add("Shape", self.node.input[0])
        return self.add(
            "Constant",
            value=numpy_helper.from_array(np.asarray(self.attributes["shape"], np.int64)),
        )

    def uniform(self, stream: int) -> str:
        """Add uniform numbers from 0 to 1 in the shape of the draw."""
        shape = self.shape()
        count = self.add("Cast", self.add("ReduceProd", shape, keepdims=0), to=TensorProto.DOUBLE)
        position = self.add("Range", self.number(0), count, self.number(1))
        phase = crc32(f"{self.node.output[0]} {stream}".encode()) % PHASES
        angle = self.add("Add", self.add("Mul", position, self.number(STEP)), self.number(phase))
        spread = self.add("Mul", self.add("Sin", angle), self.number(FACTOR))
        return self.add("Reshape", self.add("Sub", spread, self.add("Floor", spread)), shape)

    def typed(self, value: str) -> str:
        """Cast to the type of the draw: an attribute, or that of the input, or float."""
        if "dtype" in self.attributes:
            return self.add("Cast", value, to=self.attributes["dtype"])
        if self.node.input:
            return self.add("CastLike", value, self.node.input[0])
        return self.add("Cast", value, to=TensorProto.FLOAT)


def _uniform(writer: _Writer) -> str:
    low, high = writer.attribute("low", 0.0), writer.attribute("high", 1.0)
    width = writer.add("Sub", high, low)
    return writer.typed(writer.add("Add", writer.add("Mul", writer.uniform(0), width), low))


def _normal(writer: _Writer) -> str:
    """Normal numbers of two uniform ones (Box and Muller, 1958)."""
    logarithm = writer.add("Log", writer.add("Add", writer.uniform(0), writer.number(LEAST)))
    radius = writer.add("Sqrt", writer.add("Mul", logarithm, writer.number(-2.0)))
    direction = writer.add("Sin", writer.add("Mul", writer.uniform(1), writer.number(2 * pi)))
    number = writer.add("Mul", radius, direction)
    scaled = writer.add("Mul", number, writer.attribute("scale", 1.0))
    return writer.typed(writer.add("Add", scaled, writer.attribute("mean", 0.0)))


def _bernoulli(writer: _Writer) -> str:
    probability = writer.add("Cast", writer.node.input[0], to=TensorProto.DOUBLE)
    return writer.typed(writer.add("Less", writer.uniform(0), probability))


_WRITERS: dict[str, Callable[[_Writer], str]] = {
    "Bernoulli": _bernoulli,
    "RandomNormal": _normal,
    "RandomNormalLike": _normal,
    "RandomUniform": _uniform,
    "RandomUniformLike": _uniform,
}
