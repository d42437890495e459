"""Mixed-integer knapsack programs that several test files solve."""

from __future__ import annotations

import numpy as np

from onnx_oamip.programs import Builder, Program


def knapsack(items: int, rows: int = 1, seed: int = 0, room: float = 0.5) -> Program:
    """Multi-dimensional knapsack: many rows make it hard, one makes it easy."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(5, 100, (rows, items)).astype(float)
    value = weight.sum(axis=0) / max(rows, 1) + rng.integers(1, 30, items)
    builder = Builder()
    take = builder.variables(items, 0, 1, objective=-value, integer=True)
    builder.rows(
        rows, (np.arange(rows)[:, None], take, weight), upper=np.floor(room * weight.sum(axis=1))
    )
    return builder.build()
