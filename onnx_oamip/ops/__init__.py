"""The operator table: one entry per operator, in families.

To add an operator write one :class:`OpSpec` in its family's file and one case in ``tests/cases.py``; a test fails for
an entry without a case.
"""

from __future__ import annotations

from . import (
    attention,
    control,
    einsum,
    elementwise,
    lengths,
    linear,
    movement,
    norm,
    pool,
    quantize,
    recurrent,
    reshape,
    tabular,
)
from .einsum import weight_axis
from .notation import opaque
from .spec import Cuts, Edit, LabelAxis, Labels, MatrixRule, OpSpec, Refused, Terms, Total
from .windows import taps

REGISTRY: tuple[OpSpec, ...] = (
    *linear.SPECS,
    *einsum.SPECS,
    *recurrent.SPECS,
    *attention.SPECS,
    *quantize.SPECS,
    *norm.SPECS,
    *pool.SPECS,
    *elementwise.SPECS,
    *reshape.SPECS,
    *movement.SPECS,
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
    """The entry for an operator at an opset version, or None where it is not supported."""
    for spec in _TABLE.get(("" if domain == "ai.onnx" else domain, name), ()):
        if spec.since <= version <= (spec.until or version):
            return spec
    return None


__all__ = [
    "REGISTRY", "Cuts", "Edit", "LabelAxis", "Labels", "MatrixRule", "OpSpec", "Refused", "Terms", "Total", "lookup",
    "opaque", "taps", "weight_axis",
]  # fmt: skip
