"""The record of a graph case, the list of all cases, and the function that adds one written as text.

``units`` is counted by hand: how many channels (or sets of channels) may go. ``pinned`` is a part of the reason that
must be given for channels that may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import pytest
from graphs import RUNTIME, build
from onnx import ModelProto


@dataclass(frozen=True)
class OpCase:
    """One graph. ``ops`` are the operators it is about; they must still be there after loading."""

    name: str
    ops: tuple[str, ...]
    make: Callable[[], ModelProto]
    units: int
    pinned: tuple[str, ...] = ()
    opset: int = 17
    tolerance: float = 1e-5
    bindings: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES: list[OpCase] = []
NEED_NEWER_RUNTIME = {
    "swish": (1, 24),
    "reduce-nothing": (1, 24),
    "standard-attention-groups": (1, 24),
    "standard-attention-states-given-out": (1, 24),
    "standard-attention-mask-by-head": (1, 25),
    "qdq-weight-transposed": (1, 28),
    "deformable-convolution": (1, 32),
    "deformable-convolution-depthwise": (1, 32),
    "deformable-convolution-blocks": (1, 32),
}
"""Opset 24, a reduction over no axes, deformable convolutions, forms of Attention that are refused or answered at
random, and a transposition between a weight and its scale that is rewritten wrongly: the last release for Python 3.10
(1.23) takes none of them."""


def unknown_here(case: OpCase) -> str:
    """Why the installed onnx or ONNX Runtime cannot take a case, cut or not; empty where they can."""
    if case.name in NEED_NEWER_RUNTIME and NEED_NEWER_RUNTIME[case.name] > RUNTIME:
        return f"ONNX Runtime {'.'.join(map(str, RUNTIME))} cannot run this graph, cut or not"
    newest = onnx.defs.onnx_opset_version()
    return f"this onnx knows opsets up to {newest}" if case.opset > newest else ""


def by_tier(cases: list[OpCase]) -> list[Any]:
    """Cases as parameters of a test: the first of every operator in the default tier, the others in the slow one."""
    seen: set[str] = set()
    found = []
    for one in cases:
        marks = [] if set(one.ops) - seen else [pytest.mark.slow]
        found.append(pytest.param(one, id=one.name, marks=marks))
        seen.update(one.ops)
    return found


def case(
    name: str,
    ops: str,
    text: str,
    units: int,
    pinned: str | tuple[str, ...] = (),
    opset: int = 17,
    ir: int = 8,
    domains: Mapping[str, int] | None = None,
    tolerance: float = 1e-5,
    bindings: Mapping[str, int] | None = None,
    weights_as_inputs: bool = False,
) -> None:
    """Add a case written as text."""

    def make() -> ModelProto:
        return build(text, opset, ir, domains, weights_as_inputs=weights_as_inputs)

    reasons = (pinned,) if isinstance(pinned, str) else pinned
    CASES.append(
        OpCase(name, tuple(ops.split()), make, units, reasons, opset, tolerance, bindings or {})
    )
