"""Knee of a frontier."""

from __future__ import annotations

import shlex

import pytest

from onnx_oamip.reporting.command_lines import knee_command
from onnx_oamip.reporting.knee import knee


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


def test_command_of_the_knee_has_the_options_of_the_run() -> None:
    settings = {
        "data": "d.npz",
        "eval_data": None,
        "scores": None,
        "levels": [0.5],
        "importance": "l2",
        "exclude": ["a b", "c"],
        "samples": 120,
        "seed": 0,
        "macs": None,
        "device": "cpu",
    }
    value = {"knee": 0.5, "settings": settings, "model": {"path": "x/net.onnx"}}
    words = shlex.split(knee_command(value))
    assert words[:3] == ["onnx-oamip", "prune", "x/net.onnx"]
    assert words[-2:] == ["-o", "net-macs0.5.onnx"]
    found = [tuple(words[i : i + 2]) for i in range(3, len(words) - 2, 2)]
    assert sorted(found) == [
        ("--data", "d.npz"),
        ("--exclude", "a b"),
        ("--exclude", "c"),
        ("--importance", "l2"),
        ("--macs", "0.5"),
        ("--samples", "120"),
    ]
