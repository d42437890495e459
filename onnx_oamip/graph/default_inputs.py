"""Graph inputs with a default value: initialisers of the same name, which a feed may replace.

Shapes, cuts and refits treat such an input as the constant that it is by default. Constants are not folded through it,
and the written model offers it again if its value is still the same.
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto

from onnx_oamip.core.printable import shortened
from onnx_oamip.core.records import Interface, Model
from onnx_oamip.graph import external_data

NAMED = 3
"""Inputs that a note names."""
LISTED_WEIGHTS = (
    "the file lists all its initialisers among its inputs, as some exporters do; they are constants of the result and "
    "no inputs"
)


def names(proto: ModelProto) -> set[str]:
    """Names of the inputs with a default value.

    Args:
        proto: Any model.

    Returns:
        Names that are an input and an initialiser.
    """
    inputs = {value.name for value in proto.graph.input}
    return {tensor.name for tensor in proto.graph.initializer if tensor.name in inputs}


def take(proto: ModelProto) -> Interface:
    """Finds the inputs with a default value that a feed may replace, and makes constants of all others.

    Args:
        proto: A model as it is in its file, changed in place.

    Returns:
        The inputs of the file; without any if its default values are not meant to be replaced.
    """
    listed = names(proto)
    if not listed:
        return Interface()
    if len(listed) == len(proto.graph.initializer):
        close(proto)
        return Interface(notes=(LISTED_WEIGHTS,))
    defaults = {t.name: t for t in proto.graph.initializer if t.name in listed}
    return Interface(tuple(proto.graph.input), defaults)


def close(proto: ModelProto) -> None:
    """Makes constants of all inputs with a default value.

    Args:
        proto: The model, changed in place.
    """
    listed = names(proto)
    inputs = [value for value in proto.graph.input if value.name not in listed]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)


def reopen(proto: ModelProto, model: Model) -> tuple[ModelProto, tuple[str, ...]]:
    """Offers the inputs with a default value again, in a model made of another.

    Args:
        proto: The pruned model, without such inputs.
        model: The model that it was made of.

    Returns:
        The pruned model with the inputs whose default value did not change, in the order of the file, and a note about
        the others.
    """
    if not model.interface.defaults:
        return proto, ()
    result = ModelProto()
    result.CopyFrom(proto)
    present = {tensor.name: tensor for tensor in result.graph.initializer}
    closed = set()
    for name, default in model.interface.defaults.items():
        if name not in model.constants and name not in present:  # no node reads it
            result.graph.initializer.append(default)
        elif name not in present or not _is_same(present[name], default):
            closed.add(name)
    offered = [value for value in model.interface.inputs if value.name not in closed]
    del result.graph.input[:]
    result.graph.input.extend(offered)
    return result, (_note(sorted(closed)),) if closed else ()


def _is_same(one: TensorProto, other: TensorProto) -> bool:
    if one.data_type != other.data_type or list(one.dims) != list(other.dims):
        return False
    return external_data.array(one).tobytes() == external_data.array(other).tobytes()


def _note(closed: list[str]) -> str:
    named = ", ".join(f"'{shortened(name)}'" for name in closed[:NAMED])
    if len(closed) > NAMED:
        rest = f" and {len(closed) - NAMED} more"
    else:
        rest = ""
    return (
        f"the default values of the inputs {named}{rest} were cut or refitted; they are constants of the result and no "
        "inputs"
    )
