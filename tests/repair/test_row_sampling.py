"""Number of sampled rows."""

from __future__ import annotations

import pytest

from onnx_oamip.repair import row_sampling


@pytest.mark.parametrize(
    ("shape", "limit", "rows"),
    [
        ((1, 64, 16, 9), 1 << 30, 4096),
        ((1, 64, 64, 9), 1 << 30, 9216),
        ((1, 512, 512, 9), 1 << 30, 24576),
        ((1, 512, 512, 9), 1 << 27, (1 << 24) // (4608 + 512)),
        ((1, 50_000, 768, 1), 1 << 30, (1 << 27) // (768 + 50_000)),
        ((1, 2, 20_000, 1), 1 << 30, (1 << 25) // 20_000),
        ((1, 2, 20_000, 1), 1 << 28, (1 << 23) // 20_000),
        ((1, 20_000, 5_000, 1), 1 << 30, (1 << 25) // 20_000),
        ((1, 2, 100_000, 1), 1 << 20, 32),
        ((240, 1, 1, 25), 1 << 30, 4096),
        ((1152, 1, 1, 25), 1 << 30, (1 << 25) // (1152 * 25)),
        ((8192, 1, 1, 25), 1 << 32, 16 * 25),
    ],
)
def test_memory_limit_bounds_the_rows(
    shape: tuple[int, int, int, int], limit: int, rows: int
) -> None:
    """Inputs and outputs at the rows, or four copies of those of a wide node, fit into the limit."""
    assert row_sampling.row_limit(shape, row_sampling.GRAM_CAP, limit) == rows
