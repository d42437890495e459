"""Knee of a frontier."""

from __future__ import annotations

import pytest

from onnx_oamip.reporting.knee import knee
from onnx_oamip.reporting.tables.parts import knee_command


@pytest.mark.parametrize(
    ("costs", "quality", "place"),
    [
        ([1, 0.8, 0.5, 0.3, 0.1], [0.99, 0.99, 0.98, 0.9, 0.2], 3),
        ([0.1, 1, 0.5], [0.2, 0.99, 0.98], 2),
        ([1, 0.5, 0.25], [1, 0.5, 0.25], None),
        ([1, 0.5, 0.25], [0.9, 0.9, 0.9], None),
        ([1, 0.5], [1, 0.5], None),
        ([1, 0.6, 0.2], [1, 0.3, 0.2], None),
    ],
)
def test_knee_is_farthest_above_the_line_between_the_ends(
    costs: list[float], quality: list[float], place: int | None
) -> None:
    assert knee(costs, quality) == place


def test_command_of_the_knee_names_model_data_and_level() -> None:
    value = {"knee": 0.5, "settings": {"data": "d.npz"}, "model": {"path": "x/net.onnx"}}
    expected = "onnx-oamip prune x/net.onnx --data d.npz --macs 0.5 -o net-macs0.5.onnx"
    assert knee_command(value) == expected
