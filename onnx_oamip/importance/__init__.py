"""Importance methods: one file each, one signature, looked up by name in the registry."""

from __future__ import annotations

from onnx_oamip.importance.registry import (
    Method,
    Requests,
    ScoreRule,
    find,
    names,
    register,
)

__all__ = ["Method", "Requests", "ScoreRule", "find", "names", "register"]
