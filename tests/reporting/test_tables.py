"""Terminal tables: no word is broken at the widths of terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from onnx_oamip.reporting.tables import parts

PROGRAM = {
    "purpose": "importance",
    "solver": "gurobi",
    "status": "feasible",
    "limit": "time",
    "gap": 0.4094,
    "seconds": 312.02,
    "variables": 2000,
    "rows": 1999,
    "binding": ["params"],
}


def drawn(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in parts.program_rows([PROGRAM], console):
        console.print(part)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 79, 80, 120])
def test_program_table_breaks_no_word(width: int) -> None:
    text = drawn(width)
    words = {"importance", "gurobi", "feasible,", "time", "limit", "40.94", "params"}
    assert words <= set(text.split())
    assert max(map(len, text.splitlines())) <= width


def test_wide_program_table_has_sizes_and_seconds() -> None:
    assert "312.02" in drawn(80)
    assert "2,000 x 1,999" in drawn(80)
    assert "312.02" not in drawn(60)


@pytest.mark.parametrize(("width", "cells"), [(60, 4), (80, 12)])
def test_bar_is_shorter_on_narrow_terminals(width: int, cells: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    text = parts.bar(0.5, console).plain
    assert len(text.split()[0]) == cells
    assert text.endswith("50.0 %")


def test_long_name_of_a_node_leaves_room_for_the_words_beside_it() -> None:
    node = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/Dense_1/" + "MatMul" * 10
    fit = {"node": node, "form": "least squares", "error_before": 0.04, "error_after": 0.03}
    console = Console(file=io.StringIO(), width=80)
    for part in parts.fit_rows([fit]):
        console.print(part)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("largest relative error left" in line for line in lines) == 1


@pytest.mark.parametrize(("width", "tables"), [(40, 3), (60, 2), (100, 1)])
def test_table_of_numbers_is_divided_where_it_is_too_wide(width: int, tables: int) -> None:
    table = parts.grid(">MACs asked", *(f">figure {i}" for i in range(5)), "text")
    table.add_row("60.0 %", *(f"{10**i}.25 %" for i in range(5)), "some words that may be folded")
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    stream = console.file
    assert isinstance(stream, io.StringIO)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert text.count("MACs asked") == text.count("60.0 %") == tables
    assert all(text.count(f" {10**i}.25 %") == text.count(f"figure {i}") == 1 for i in range(5))
    assert all(word in text for word in ("some", "folded"))


@pytest.mark.parametrize(
    ("kinds", "rows"),
    [
        (["classes"], ["same top class as the original", "accuracy"]),
        (
            ["values", "binary"],
            ["same decisions of 'out[1]' as the original", "accuracy of 'out[1]'"],
        ),
    ],
)
def test_agreement_and_accuracy_name_their_output_where_there_are_several(
    kinds: list[str], rows: list[str]
) -> None:
    verification = {
        "masked_equivalence": None,
        "rounding": None,
        "output_relative_error": 0.1,
        "agreement": 0.926,
        "agreement_of": f"out[{len(kinds) - 1}]",
        "accuracy_before": 0.9,
        "accuracy_after": 0.8,
        "outputs": [{"kind": kind} for kind in kinds],
        "metric": None,
        "batches": [],
        "samples": 1000,
        "failures": [],
    }
    console = Console(file=io.StringIO(), width=100)
    console.print(parts.checks(verification))
    stream = console.file
    assert isinstance(stream, io.StringIO)
    found = {line.split("  ")[0].strip() for line in stream.getvalue().splitlines()}
    assert set(rows) <= found
