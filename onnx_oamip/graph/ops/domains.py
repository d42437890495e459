"""The domain of ONNX's own operators, which has two names, and the version of its operators in a model."""

from __future__ import annotations

from typing import Any

STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""


def plain(domain: str) -> str:
    """Return the name of a domain under which it is compared.

    Args:
        domain: Name in a model.

    Returns:
        An empty name for the domain of ONNX's own operators, the same name for others.
    """
    return "" if domain in STANDARD else domain


def opset(proto: Any) -> int:
    """Read the version of ONNX's own operators in a model.

    Args:
        proto: A model, an ``onnx.ModelProto``.

    Returns:
        The version; 1 where the model states none, as the standard has it.
    """
    return next((entry.version for entry in proto.opset_import if entry.domain in STANDARD), 1)
