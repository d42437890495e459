"""Number of sampled rows."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_oamip.repair import row_sampling


@pytest.mark.parametrize(
    ("shape", "limit", "rows"),
    [
        ((1, 64, 16, 9), 1 << 30, 16384),
        ((1, 64, 64, 9), 1 << 30, 36864),
        ((1, 128, 128, 9), 1 << 30, int(2.5e10 / 1152**2)),
        ((1, 256, 256, 9), 1 << 30, 24576),
        ((1, 512, 512, 9), 1 << 30, 24576),
        ((1, 512, 512, 9), 1 << 27, (1 << 24) // (4608 + 512)),
        ((1, 50_000, 768, 1), 1 << 30, (1 << 27) // (768 + 50_000)),
        ((1, 2, 20_000, 1), 1 << 30, (1 << 25) // 20_000),
        ((1, 2, 20_000, 1), 1 << 28, (1 << 23) // 20_000),
        ((1, 20_000, 5_000, 1), 1 << 30, (1 << 25) // 20_000),
        ((1, 2, 100_000, 1), 1 << 20, 32),
        ((240, 1, 1, 25), 1 << 30, (1 << 25) // (240 * 25)),
        ((1152, 1, 1, 25), 1 << 30, 64 * 25),
        ((8192, 1, 1, 25), 1 << 32, 64 * 25),
    ],
)
def test_memory_limit_bounds_the_rows(
    shape: tuple[int, int, int, int], limit: int, rows: int
) -> None:
    """Inputs and outputs at the rows, or four copies of those of a wide node, fit into the limit."""
    assert row_sampling.row_limit(shape, row_sampling.GRAM_CAP, limit) == rows


def test_outputs_of_all_nodes_fit_into_twice_the_limit() -> None:
    """Rows that do not exist need no memory, and all nodes give up the same share."""
    limits, values = np.asarray([1000, 2000, 4000]), np.asarray([10, 20, 5])
    rows = np.asarray([5000, 100, 8000])
    needed = 4 * (1000 * 10 + 100 * 20 + 4000 * 5)
    whole = row_sampling.shared_rows(limits, rows, values, memory_limit=needed // 2)
    assert np.array_equal(whole, limits)
    half = row_sampling.shared_rows(limits, rows, values, memory_limit=needed // 4)
    assert half.tolist() == [500, 50, 2000]
    least = row_sampling.shared_rows(limits, rows, values, memory_limit=8)
    assert least.tolist() == [row_sampling.FEWEST_ROWS] * 3
