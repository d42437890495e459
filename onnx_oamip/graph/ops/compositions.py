"""Compositions of elementary operators that stand for one: sigmoid, softmax, division by the length of a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from onnx_oamip.core.records import Node
from onnx_oamip.graph.ops.handles import Reader

LENGTH_WRAPPERS = frozenset(
    {"Identity", "Expand", "Clip", "Max", "Add", "Unsqueeze", "Reshape", "Cast"}
)
"""Operators between a vector's length and the division by it."""
MASK_VIEWS = frozenset(
    {
        "Identity",
        "Cast",
        "Expand",
        "Flatten",
        "Reshape",
        "Slice",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators through which the numbers of a mask keep their values."""
LARGE = 1e3
"""Size of a constant from which it stands for masked entries."""


def sigmoid(graph: Reader, node: Node) -> str | None:
    """Recognise a sigmoid: the operator, or ``1 / (1 + exp(-x))``.

    Args:
        graph: The graph.
        node: The node that makes the result.

    Returns:
        Name of x, or None where the node is something else.
    """
    if node.op == "Sigmoid":
        return node.inputs[0]
    if node.op == "Div" and graph.number(node.inputs[0]) == 1:
        below = graph.maker(node.inputs[1])
    elif node.op == "Reciprocal":
        below = graph.maker(node.inputs[0])
    else:
        return None
    if below is None or below.op != "Add" or all(graph.number(name) != 1 for name in below.inputs):
        return None
    power = next((graph.maker(name) for name in below.inputs if graph.op(name) == "Exp"), None)
    negated = graph.maker(power.inputs[0]) if power is not None else None
    return negated.inputs[0] if negated is not None and negated.op == "Neg" else None


def softmax(graph: Reader, node: Node) -> tuple[str, int] | None:
    """Recognise a softmax or its logarithm: the operators, or elementary operators that compute them.

    Args:
        graph: The graph.
        node: The node that makes the result.

    Returns:
        The logits and the axis, or None where the node is something else.
    """
    if node.op in ("Softmax", "LogSoftmax"):
        return _softmax(graph, node)
    if node.op == "Log":
        inner = graph.maker(node.inputs[0])
        return softmax(graph, inner) if inner is not None and inner.op != "Log" else None
    if node.op == "Sub":
        return _logarithm_of_softmax(graph, node)
    total = graph.maker(_unwrapped(graph, node.inputs[1])) if node.op == "Div" else None
    if total is None or total.op != "ReduceSum":
        return None
    axis = _one_axis(graph, total)
    if axis is None or total.inputs[0] != node.inputs[0] or graph.op(node.inputs[0]) != "Exp":
        return None
    power = graph.maker(node.inputs[0])
    assert power is not None
    return _unshifted(graph, power.inputs[0]), axis


def _logarithm_of_softmax(graph: Reader, node: Node) -> tuple[str, int] | None:
    """The logits and the axis of ``x - log(sum(exp(x)))``, or None."""
    total = graph.maker(_unwrapped(graph, node.inputs[1]))
    if total is None:
        return None
    power: Node | None = None
    if total.op == "Log":
        total = graph.maker(_unwrapped(graph, total.inputs[0]))
        power = graph.maker(total.inputs[0]) if total is not None and total.inputs else None
        if total is None or total.op != "ReduceSum" or power is None or power.op != "Exp":
            return None
    elif total.op != "ReduceLogSumExp":
        return None
    summed = total.inputs[0] if power is None else power.inputs[0]
    axis = _one_axis(graph, total)
    return (
        (_unshifted(graph, summed), axis) if summed == node.inputs[0] and axis is not None else None
    )


def _unshifted(graph: Reader, tensor: str) -> str:
    """The logits in front of the subtraction of their maximum, which changes no softmax."""
    shifted = graph.maker(tensor)
    if shifted is None or shifted.op != "Sub":
        return tensor
    largest = graph.maker(_unwrapped(graph, shifted.inputs[1]))
    is_maximum = largest is not None and largest.op == "ReduceMax"
    return shifted.inputs[0] if is_maximum else tensor


def _softmax(graph: Reader, node: Node) -> tuple[str, int] | None:
    rank = graph.rank(node.inputs[0]) or graph.rank(node.outputs[0])
    if rank is None:
        return None
    axis = int(node.attrs.get("axis", -1 if node.version >= 13 else 1)) % max(rank, 1)
    shape = graph.shape(node.inputs[0])
    last = shape is not None and all(size == 1 for size in shape[axis + 1 :])
    # One distribution over all axes from here on.
    if node.version < 13 and axis < rank - 1 and not last:
        return None
    return node.inputs[0], axis


def mixture(graph: Reader, tensor: str) -> int | None:
    """Recognise a mean of class distributions, as of an ensemble or of several views of a sample.

    Args:
        graph: The graph.
        tensor: Name of a tensor.

    Returns:
        The axis of the classes; None where the tensor is no softmax, and no sum of some over an axis of another kind.
    """
    node = graph.maker(tensor)
    if node is None:
        return None
    found = softmax(graph, node) if node.op not in ("Log", "LogSoftmax", "Sub") else None
    if found is not None:
        return found[1]
    computed = [name for name in node.inputs if name and graph.constant(name) is None]
    if node.op in ("Identity", "Mul", "Div"):
        factors = [name for name in node.inputs if graph.constant(name) is not None]
        is_scaled = all(graph.number(name) is not None for name in factors)
        return mixture(graph, computed[0]) if len(computed) == 1 and is_scaled else None
    if node.op in ("Add", "Sum", "Mean"):
        axes = {mixture(graph, name) for name in node.inputs}
        return axes.pop() if len(axes) == 1 else None
    if node.op in ("ReduceMean", "ReduceSum"):
        axis = mixture(graph, node.inputs[0])
        reduced = _one_axis(graph, node)
        if axis is None or reduced is None or reduced == axis:
            return None
        keeps = bool(node.attrs.get("keepdims", 1))
        return axis if keeps or reduced > axis else axis - 1
    return None


def mask_fill(graph: Reader, node: Node, is_learnt: Callable[[str], bool]) -> float | None:
    """Find the number that a mask puts into a tensor, or adds to it.

    Args:
        graph: The graph.
        node: The node that makes the tensor.
        is_learnt: Test for tensors that depend on a layer, which are no masks.

    Returns:
        The number, such as -1e9; None where no mask of large numbers is applied.
    """
    if node.op == "Where":
        return _large(graph, node.inputs[1:])
    if node.op not in ("Add", "Sub") or all(is_learnt(name) for name in node.inputs):
        return None
    mask = next(name for name in node.inputs[::-1] if not is_learnt(name))
    made = graph.maker(mask)
    while made is not None and made.op in MASK_VIEWS:
        made = graph.maker(made.inputs[0])
    added = _large(graph, made.inputs) if made is not None and made.op in ("Mul", "Where") else None
    is_subtracted = node.op == "Sub" and mask == node.inputs[1]
    return -added if added is not None and is_subtracted else added


def _large(graph: Reader, names: Iterable[str]) -> float | None:
    """The first constant that is one finite number too large for an activation."""
    numbers = (graph.number(name) for name in names)
    return next((n for n in numbers if n is not None and LARGE <= abs(n) < math.inf), None)


def normalised(graph: Reader, node: Node) -> bool:
    """Recognise a normalisation that is written out, with or without its gain and its shift.

    Args:
        graph: The graph.
        node: The node that makes the result.

    Returns:
        True for a quotient by the root of a mean.
    """
    found: Node | None = node
    for op in ("Add", "Mul"):
        if found is not None and found.op == op:
            computed = [name for name in found.inputs if graph.constant(name) is None]
            found = graph.maker(computed[0]) if len(computed) == 1 else found
    if found is None:
        return False
    root: Node | None = None
    if found.op == "Div":
        root = graph.maker(found.inputs[1])
    elif found.op == "Mul":
        root = graph.maker(_factors(graph, found)[1])
        if root is not None and root.op in ("Reciprocal", "Div"):
            root = graph.maker(root.inputs[-1])
    if root is None or root.op not in ("Sqrt", "Pow"):
        return False
    mean = graph.maker(_unwrapped(graph, root.inputs[0]))
    return mean is not None and mean.op == "ReduceMean"


def unit_vectors(graph: Reader, node: Node) -> tuple[str, int] | None:
    """Recognise a division of vectors by their Euclidean length.

    Args:
        graph: The graph.
        node: The node that makes the result.

    Returns:
        The vectors and their axis, or None where the node is something else.
    """
    if node.op == "LpNormalization":
        rank = graph.rank(node.inputs[0])
        euclidean = int(node.attrs.get("p", 2)) == 2
        return (
            (node.inputs[0], int(node.attrs.get("axis", -1)) % rank) if rank and euclidean else None
        )
    if node.op == "Div":
        source = node.inputs[0]
        divisor = node.inputs[1]
        inverse = False
    elif node.op == "Mul":
        source, divisor = _factors(graph, node)
        inverse = True
    else:
        return None
    axis = _length_axis(graph, divisor, source, inverse) if divisor else None
    return (source, axis) if axis is not None else None


def _factors(graph: Reader, node: Node) -> tuple[str, str]:
    """(vectors, the inverse of their length); empty where none of the factors is an inverse."""
    for source, other in (node.inputs, node.inputs[::-1]):
        made = graph.maker(_unwrapped(graph, other))
        power = graph.number(made.inputs[1]) if made is not None and made.op == "Pow" else None
        one = graph.number(made.inputs[0]) if made is not None and made.op == "Div" else None
        if made is not None and (made.op == "Reciprocal" or power == -0.5 or one == 1):
            return source, other
    return "", ""


def _unwrapped(graph: Reader, tensor: str) -> str:
    """The tensor behind small constants that keep a division from overflowing, and behind reshapes."""
    while (node := graph.maker(tensor)) is not None and node.op in LENGTH_WRAPPERS:
        others = [name for name in node.inputs[:2] if name and graph.constant(name) is None]
        computed = [name for name in others if graph.floating(name)]
        if not computed or (node.op in ("Add", "Max") and len(computed) > 1):
            break
        tensor = computed[0]
    return tensor


def _length_axis(
    graph: Reader,
    divisor: str,
    source: str,
    inverse: bool,
) -> int | None:
    """The axis of which ``divisor`` holds the Euclidean length of ``source`` (``inverse``: 1 over it)."""
    node = graph.maker(_unwrapped(graph, divisor))
    if node is None:
        return None
    if inverse and node.op == "Reciprocal":
        return _length_axis(graph, node.inputs[0], source, False)
    if inverse and node.op == "Div":
        return _length_axis(graph, node.inputs[1], source, False)
    if node.op == "ReduceL2" and not inverse:
        return _one_axis(graph, node) if _same(graph, node.inputs[0], source) else None
    power = graph.number(node.inputs[1]) if node.op == "Pow" else None
    if not (node.op == "Sqrt" and not inverse) and power != (-0.5 if inverse else 0.5):
        return None
    total = graph.maker(_unwrapped(graph, node.inputs[0]))
    if total is None:
        return None
    squares = graph.maker(total.inputs[0])
    if total.op == "ReduceSumSquare":
        return _one_axis(graph, total) if _same(graph, total.inputs[0], source) else None
    if total.op != "ReduceSum" or squares is None or not _squares(graph, squares, source):
        return None
    return _one_axis(graph, total)


def _squares(graph: Reader, node: Node, source: str) -> bool:
    """True if a node computes the squares of ``source``."""
    if node.op == "Mul":
        return all(_same(graph, name, source) for name in node.inputs)
    return (
        node.op == "Pow"
        and graph.number(node.inputs[1]) == 2
        and _same(graph, node.inputs[0], source)
    )


def _same(graph: Reader, tensor: str, source: str) -> bool:
    """True if a tensor is ``source``, or its absolute value."""
    while (
        (node := graph.maker(tensor)) is not None
        and node.op in ("Identity", "Abs")
        and tensor != source
    ):
        tensor = node.inputs[0]
    while (node := graph.maker(source)) is not None and node.op == "Identity" and tensor != source:
        source = node.inputs[0]
    return tensor == source


def _one_axis(graph: Reader, node: Node) -> int | None:
    """The axis of a reduction over one."""
    axes = graph.integers(node, 1, "axes")
    rank = graph.rank(node.inputs[0])
    if axes is None or len(axes) != 1 or not rank:
        return None
    return axes[0] % rank
