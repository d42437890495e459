"""Exactness of the operators that torch computes in a recovery, beside ONNX Runtime, on the graphs of the tests."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from onnx_oamip.graph.runtime import Session

from .studies import ROOT, Row, save

COLUMNS = ("largest difference", "operators", "names")
BANDS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4)
"""Upper bounds of the rows; float32 resolves 6e-8 of a value."""


def exactness(out: Path, seed: int) -> str:
    """Save the study ``recover-operators``: operators by their largest difference.

    Args:
        out: Folder of studies.
        seed: Seed of the inputs.

    Returns:
        The table.
    """
    largest: dict[str, float] = defaultdict(float)
    for operators, error in _errors(seed):
        for operator in operators:
            largest[operator] = max(largest[operator], error)
    rows = banded(largest)
    return save(out, "recover-operators", rows, COLUMNS, seed)


def banded(largest: dict[str, float]) -> list[Row]:
    """Group operators by the bound that their difference keeps.

    Args:
        largest: Largest difference by operator.

    Returns:
        One row per bound that any operator needs.
    """
    rows: list[Row] = []
    below = -1.0
    for bound in (*BANDS, np.inf):
        names = sorted(name for name, error in largest.items() if below < error <= bound)
        if names:
            row = {"largest difference": _band(below, bound), "operators": len(names)}
            rows.append({**row, "names": ", ".join(names)})
        below = bound
    return rows


def _band(below: float, bound: float) -> str:
    if bound == 0:
        return "0"
    return f"up to {bound:.0e}" if np.isfinite(bound) else f"more than {below:.0e}"


def _errors(seed: int) -> Iterator[tuple[tuple[str, ...], float]]:
    """(operators, relative difference) of every graph that torch computes."""
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests")]
    from cases import CASES, unknown_here
    from graphs import feed, load

    from onnx_oamip.recovery import engine

    with TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            if unknown_here(case):
                continue
            place = Path(folder) / str(number)
            place.mkdir()
            model = load(case.make(), place, case.bindings)
            is_half = any(np.dtype(kind) == np.float16 for kind in model.dtypes.values())
            if is_half or not all(engine.is_supported(node) for node in model.nodes):
                continue  # 16 bits are trained in float32, which ONNX Runtime rounds
            values = feed(model, seed)
            names = [port.name for port in model.outputs]
            given = {name: engine.as_tensor(value, "cpu") for name, value in values.items()}
            try:
                found = engine.Engine(model, names).run(given)
            except engine.CannotRun:  # a form that is refused by name
                continue
            truth = Session(model.proto, "cpu", exact=True).run(values)
            pairs = zip(truth, found, strict=True)
            yield case.ops, max(_difference(old, new.detach().numpy()) for old, new in pairs)


def _difference(truth: object, found: object) -> float:
    old, new = (np.asarray(value).astype(np.float64) for value in (truth, found))
    scale = np.abs(old).max(initial=0.0) or 1.0
    return float(np.abs(new - old).max(initial=0.0) / scale)
