"""Graph cases: at least one for every operator of the registry, and the patterns that real models are made of."""

from __future__ import annotations

from importlib import import_module

from op_case import CASES, OpCase, by_tier, unknown_here

__all__ = ["CASES", "OpCase", "by_tier", "unknown_here"]

FAMILIES = (
    "cases_linear",
    "cases_normalisation",
    "cases_reductions",
    "cases_elementwise",
    "cases_reshape",
    "cases_join_split",
    "cases_patterns",
    "cases_attention",
    "cases_bodies",
    "cases_einsum",
    "cases_quantized",
    "cases_recurrent",
    "cases_shapes",
    "cases_tabular",
    "cases_indexed",
)
"""Modules that add cases when they are imported; fuzzing numbers its networks in this order."""

for _family in FAMILIES:
    import_module(_family)
