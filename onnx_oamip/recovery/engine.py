"""Execution of an ONNX graph by torch, with the initialisers of the graph as leaves of the gradient.

Weights are read by the name of their initialiser and written back by it, so that the graph and the shapes of its
parameters stay as they are. Models of 16 bits are computed in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onnx_oamip.core.records import Array, Model, Node
from onnx_oamip.core.records.graph import Body, within
from onnx_oamip.graph.ops import Trait, has
from onnx_oamip.graph.outputs import is_float
from onnx_oamip.graph.subgraphs import BRANCHES
from onnx_oamip.recovery.operators import TABLE, Call, Kernel, UnsupportedForm, kernel_of
from onnx_oamip.recovery.operators.calls import Tensor
from onnx_oamip.recovery.operators.fusion import fused
from onnx_oamip.recovery.parts import ancestors

NARROW = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}
"""Types of whole numbers in which torch does not compute, with those that take their place."""


class CannotRun(Exception):
    """A node that torch cannot compute.

    Attributes:
        node: The node.
        reason: Why, as a clause about the node.
    """

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(f"{node} cannot be computed by torch: {reason}")
        self.node = node
        self.reason = reason


def is_supported(node: Node) -> bool:
    """Check whether torch computes the operator of a node, and those in its bodies.

    Args:
        node: Node of a model.

    Returns:
        True if each has a function; a form that the function refuses shows when it is run.
    """
    return all(has(part, Trait.BRANCHES) or kernel_of(part) is not None for part in within((node,)))


class Engine:
    """A part of a graph, run by torch.

    Attributes:
        weights: Leaves of the gradient by the name of their initialiser.
    """

    def __init__(
        self,
        model: Model,
        tensors: Sequence[str],
        *,
        given: Collection[str] = (),
        device: str = "cpu",
        weights: Collection[str] = (),
        every_branch: bool = False,
    ) -> None:
        """Read the constants of the part.

        Args:
            model: The model.
            tensors: Tensors to compute.
            given: Tensors besides the graph inputs that are fed.
            device: Device of torch.
            weights: Initialisers to train, such as :class:`~.trainable.Trainable` lists.
            every_branch: Refuse forms in branches that a condition does not take, too.
        """
        self._every_branch = every_branch
        self._tensors = list(tensors)
        nodes = ancestors(model, tensors, given)
        self._device = device
        self._constants = {
            name: as_tensor(model.constants[name], device)
            for node in within(nodes)
            for name in (*node.inputs, *_returned(node))
            if name and model.is_stored(name)
        }
        self.weights = {
            name: value.requires_grad_()
            for name, value in self._constants.items()
            if name in weights
        }
        steps = fused(model, nodes, self._tensors)
        self._dtypes = model.dtypes
        self._steps = [(node, kernel_of(node), self._call(node)) for node in steps]
        self._last = _last_uses(steps, self._tensors)

    def _call(self, node: Node) -> Call:
        return Call(node, self._dtypes.get(node.outputs[0]) if node.outputs else None)

    def run(self, feed: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute the tensors for one feed.

        Args:
            feed: Graph inputs and given tensors, by name.

        Returns:
            The tensors in the order of the constructor.

        Raises:
            CannotRun: A node has a form that torch does not compute.
        """
        values: dict[str, Any] = {**self._constants, **feed}
        for place, (node, kernel, call) in enumerate(self._steps):
            self._step(node, kernel, call, values)
            for name in self._last[place]:
                values.pop(name, None)
        return [values[name] for name in self._tensors]

    def _step(self, node: Node, kernel: Kernel | None, call: Call, values: dict[str, Any]) -> None:
        if has(node, Trait.BRANCHES):
            self._branch(node, values)
            return
        if kernel is None:
            raise CannotRun(node, "it has no function for this operator")
        inputs = [values[name] if name else None for name in node.inputs]
        if self._device != "cpu":
            inputs = self._on_one_device(inputs)
        try:
            outputs = kernel.run(call, *inputs)
        except UnsupportedForm as error:
            raise CannotRun(node, str(error)) from error
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise CannotRun(node, str(error).partition("\n")[0]) from error
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        for name, value in zip(node.outputs, outputs, strict=False):
            if name:
                values[name] = value

    def _branch(self, node: Node, values: dict[str, Any]) -> None:
        """Run the branch that the condition takes. Names are unique over all bodies."""
        is_taken = bool(values[node.inputs[0]].reshape(-1)[0])
        body: Body = node.bodies[BRANCHES[is_taken]]
        if self._every_branch:
            self._check_forms(node.bodies[BRANCHES[not is_taken]], values)
        for inner in body.nodes:
            self._step(inner, kernel_of(inner), self._call(inner), values)
        for name, result in zip(node.outputs, body.outputs, strict=True):
            values[name] = values[result]

    def _check_forms(self, body: Body, values: Mapping[str, Any]) -> None:
        """Run a branch that is not taken, to find forms that are refused.

        Its nodes need not fit these values, such as a Squeeze of an axis that is longer than 1: a node that fails for
        another reason than its form, and those that read its outputs, are passed over.
        """
        found = dict(values)
        for inner in body.nodes:
            if not all(name in found for name in (*inner.inputs, *inner.captures) if name):
                continue
            try:
                self._step(inner, kernel_of(inner), self._call(inner), found)
            except CannotRun as error:
                if isinstance(error.__cause__, UnsupportedForm):
                    raise

    def _on_one_device(self, inputs: list[Any]) -> list[Any]:
        devices = {value.device.type for value in inputs if value is not None}
        if len(devices) < 2:
            return inputs
        return [None if value is None else value.to(self._device) for value in inputs]


def _returned(node: Node) -> list[str]:
    """Outer values and constants that the bodies of a node return as they are."""
    return [name for body in node.bodies.values() for name in body.outputs]


def _last_uses(nodes: Sequence[Node], kept: Collection[str]) -> list[list[str]]:
    """Tensors by the place of the node that reads them last, so that memory is freed in time."""
    last: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in (*node.inputs, *node.captures, *node.outputs):
            last[name] = place
    freed: list[list[str]] = [[] for _ in nodes]
    for name, place in last.items():
        if name and name not in kept:
            freed[place].append(name)
    return freed


def as_tensor(array: Array, device: str) -> Tensor:
    """Copy an array to torch; floating types of 16 bits become float32, whole numbers of less than 8 bits get 8.

    Args:
        array: An array of numbers.
        device: Device of torch; whole numbers stay in main memory, where lengths are read.

    Returns:
        The tensor.
    """
    if is_float(array.dtype) and array.dtype != np.float64:
        array = array.astype(np.float32)
    elif array.dtype.name in NARROW:
        array = array.astype(NARROW[array.dtype.name])
    tensor = torch.from_numpy(np.array(array, order="C"))
    return tensor.to(device) if tensor.is_floating_point() else tensor


def as_input(array: Array, device: str) -> Tensor:
    """Copy a graph input to torch.

    Args:
        array: An array of numbers.
        device: Device of torch.

    Returns:
        The tensor. On a CPU, the channels of images lie next to each other: all layers behind keep this order, in
        which a step of a convolutional network takes a third less time.
    """
    tensor = as_tensor(array, device)
    if device == "cpu" and tensor.dim() == 4 and tensor.is_floating_point():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def operators() -> list[str]:
    """List the operators that torch computes.

    Returns:
        Names, with the domain in front where it is not the default one, in alphabetical order.
    """
    return sorted(f"{domain}.{name}" if domain else name for domain, name in TABLE)
