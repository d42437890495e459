"""The table of solvers: their names in settings, and the packages whose versions results record."""

from __future__ import annotations

from typing import Literal, TypeAlias

SolverName: TypeAlias = Literal["auto", "gurobi", "highs", "scip"]
"""Values of the setting ``solver``."""
PACKAGES = {"gurobi": "gurobipy", "highs": "highspy", "scip": "pyscipopt"}
"""Python package of every solver, in the order of preference under ``auto``.

The module of a solver is ``onnx_oamip/programs/solvers/NAME.py``. Its ``BACKEND`` is loaded by this name.
"""
