"""Arguments of a function of the operator table: the node, and readers of its attributes and of lists of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnx_oamip.core.records import Node

Tensor: TypeAlias = Any
"""A ``torch.Tensor``; torch is an optional package, whose types are not checked."""


class UnsupportedForm(Exception):
    """A form of an operator that its function does not compute; the message is a clause about the form."""


@dataclass(frozen=True, slots=True)
class Call:
    """One node as its function sees it.

    Attributes:
        node: The node.
        type: Element type of its first output in the model, None where it is unknown.
    """

    node: Node
    type: np.dtype[Any] | None = None

    @property
    def version(self) -> int:
        """Opset version of the operator's domain."""
        return self.node.version

    @property
    def outputs(self) -> int:
        """Number of outputs up to the last that has a name."""
        named = [place for place, name in enumerate(self.node.outputs) if name]
        return named[-1] + 1 if named else 0

    def wants(self, place: int) -> bool:
        """Check whether an output is named.

        Args:
            place: Its index.

        Returns:
            True if the node has that output.
        """
        return place < len(self.node.outputs) and bool(self.node.outputs[place])

    def attr(self, name: str, default: Any = None) -> Any:
        """Read an attribute.

        Args:
            name: Its name.
            default: Value where the node has no such attribute.

        Returns:
            The value.
        """
        return self.node.attrs.get(name, default)

    def numbers(self, name: str, given: Tensor | None) -> list[int] | None:
        """Read a list of whole numbers that is an attribute in some versions and an input in others.

        Args:
            name: Name of the attribute.
            given: The input, if the node has it.

        Returns:
            The numbers, or None if there are none.
        """
        if given is not None:
            return integers(given)
        value = self.attr(name)
        return None if value is None else [int(number) for number in value]


Function: TypeAlias = Callable[..., Any]
"""``function(call, *inputs)``: one tensor, or a tuple of all outputs; an input that is left out is None."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Computation of an operator by torch.

    Attributes:
        run: The function.
        trained: Inputs that are weights where they are floating initialisers.
        trained_if_channels: Inputs that are weights if they hold one number per channel, and not one per position.
    """

    run: Function
    trained: tuple[int, ...] = ()
    trained_if_channels: tuple[int, ...] = ()


Table: TypeAlias = Mapping[tuple[str, str], Kernel]
"""Kernels by domain and name of the operator."""


def padded(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Fill up inputs that a node leaves out at the end.

    Args:
        inputs: The inputs that it has.
        count: Number of inputs of the operator.

    Returns:
        Exactly that many; those left out are None.
    """
    return (*inputs, *[None] * (count - len(inputs)))


def integers(tensor: Tensor) -> list[int]:
    """Read a tensor as a flat list of whole numbers.

    Args:
        tensor: Any tensor.

    Returns:
        Its elements.
    """
    return [int(number) for number in tensor.reshape(-1).tolist()]
