"""The operator table: one entry per operator, in families.

Everything else that depends on an operator's name is here too: sets of operators that passes ask for (``kinds``), and
builders of the nodes that the package inserts (``build``). CONTRIBUTING.md, "Add an operator", has the steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from onnx import NodeProto

from onnx_oamip.core.errors import OamipError, RuleFailed
from onnx_oamip.core.records import Model, Node
from onnx_oamip.graph.ops import (
    attention,
    build,
    control,
    domains,
    einsum,
    elementwise,
    indexed,
    kinds,
    lengths,
    linear,
    movement,
    norm,
    pool,
    quantised_kernels,
    quantize,
    recurrent,
    reshape,
    rotary,
    tabular,
)
from onnx_oamip.graph.ops.elementwise import clamp_bounds
from onnx_oamip.graph.ops.handles import Cuts, LabelAxis, Labels, Refused, Terms
from onnx_oamip.graph.ops.matrix_view import Site
from onnx_oamip.graph.ops.norm import batch_affine, batch_scale, shift_alone
from onnx_oamip.graph.ops.notation import opaque
from onnx_oamip.graph.ops.spec import (
    Edit,
    EditRules,
    LikeInput,
    LikeOperator,
    LikeProduct,
    MatrixRule,
    OpSpec,
    Total,
    Trait,
)
from onnx_oamip.graph.ops.windows import taps

REGISTRY: tuple[OpSpec, ...] = (
    *linear.SPECS,
    *einsum.SPECS,
    *recurrent.SPECS,
    *attention.SPECS,
    *rotary.SPECS,
    *quantize.SPECS,
    *quantised_kernels.SPECS,
    *norm.SPECS,
    *pool.SPECS,
    *elementwise.SPECS,
    *reshape.SPECS,
    *movement.SPECS,
    *indexed.SPECS,
    *lengths.SPECS,
    *tabular.SPECS,
    *control.SPECS,
)


def _index(specs: tuple[OpSpec, ...]) -> dict[tuple[str, str], list[OpSpec]]:
    table: dict[tuple[str, str], list[OpSpec]] = {}
    for spec in specs:
        entries = table.setdefault((spec.domain, spec.name), [])
        for other in entries:
            if spec.since <= (other.until or 10**9) and other.since <= (spec.until or 10**9):
                raise ValueError(f"two entries for operator {spec.name} cover the same versions")
        entries.append(spec)
    return table


_TABLE = _index(REGISTRY)


def lookup(domain: str, name: str, version: int) -> OpSpec | None:
    """Find the entry of an operator.

    Args:
        domain: Domain of the operator.
        name: Its name.
        version: Opset version of the domain.

    Returns:
        The entry, or None where the operator is not supported.
    """
    for spec in _TABLE.get((domains.plain(domain), name), ()):
        if spec.since <= version <= (spec.until or version):
            return spec
    return None


def has(node: Node | NodeProto, traits: Trait) -> bool:
    """Check whether the operator of a node has a trait.

    Args:
        node: Node of a model or of a proto.
        traits: Any of these.

    Returns:
        True if the operator has one of them, at any version.
    """
    name = node.op if isinstance(node, Node) else node.op_type
    specs = _TABLE.get((domains.plain(node.domain), name), ())
    return any(spec.traits & traits for spec in specs)


@contextmanager
def rule_errors(node: Node) -> Iterator[None]:
    """Report an error in a rule as one of the package: rules rely on the definition of ONNX of an operator.

    Args:
        node: The node that a rule is run on.

    Yields:
        Nothing; run the rule inside.

    Raises:
        RuleFailed: The rule broke, other than by refusing the node.
    """
    try:
        yield
    except (OamipError, Refused):
        raise
    except Exception as error:
        raise RuleFailed(str(node), f"{type(error).__name__}: {error}") from error


def follows_bodies(node: Node) -> bool:
    """Check whether channels are followed into the subgraphs of a node.

    Args:
        node: Any node.

    Returns:
        True for nodes whose entry has a flow.
    """
    spec = lookup(node.domain, node.op, node.version)
    return spec is not None and spec.flow is not None


def consumers_by_tensor(model: Model) -> dict[str, list[Node]]:
    """Index the nodes that read each tensor, those in bodies among them.

    Args:
        model: The model.

    Returns:
        Nodes by tensor. Where bodies are followed, the nodes in them read outer tensors, and the node itself the
        outputs of its bodies.
    """
    found: dict[str, list[Node]] = defaultdict(list)
    for node in model.every:
        given = (
            [n for body in node.bodies.values() for n in body.outputs]
            if follows_bodies(node)
            else node.captures
        )
        for name in (*node.inputs, *given):
            found[name].append(node)
    return found


__all__ = [
    "REGISTRY",
    "Cuts",
    "Edit",
    "EditRules",
    "LabelAxis",
    "Labels",
    "LikeInput",
    "LikeOperator",
    "LikeProduct",
    "MatrixRule",
    "OpSpec",
    "Refused",
    "Site",
    "Terms",
    "Total",
    "Trait",
    "attention",
    "batch_affine",
    "batch_scale",
    "build",
    "clamp_bounds",
    "consumers_by_tensor",
    "follows_bodies",
    "has",
    "kinds",
    "lookup",
    "opaque",
    "rule_errors",
    "shift_alone",
    "taps",
]
