"""Writes the table of supported operators in docs/guide/operators.md: ``python -m tools.op_table``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from onnx_oamip.graph.ops import REGISTRY, OpSpec

FILE = Path(__file__).resolve().parents[1] / "docs" / "guide" / "operators.md"
BEGIN, END = "<!-- operators:begin -->", "<!-- operators:end -->"
COLUMNS = ("operator", "channels", "repair", "cost", "encode")


def table() -> str:
    """One row for every set of operators that share their columns, by family."""
    rows: dict[tuple[str, tuple[bool, ...]], list[str]] = {}
    for spec in REGISTRY:
        family = spec.channels.__module__.rsplit(".", 1)[-1]
        has = (True, spec.edit.repair is not None, spec.cost is not None, spec.encode is not None)
        rows.setdefault((family, has), []).append(_name(spec))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for (_, has), names in rows.items():
        lines.append(
            "| " + " | ".join((_listed(names), *("yes" if x else "-" for x in has))) + " |"
        )
    return "\n".join(lines)


def _name(spec: OpSpec) -> str:
    return f"{spec.domain}.{spec.name}" if spec.domain else spec.name


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in dict.fromkeys(names))


def section() -> str:
    """Return the text between the markers, markers included."""
    return (
        f"{BEGIN}\n"
        "Channels are traced through every operator below. *repair*: attributes or constant inputs are rewritten when "
        "channels are removed; *cost*: multiply-accumulates are counted; *encode*: the importance program can contain "
        "the operator.\n\n"
        f"{table()}\n{END}"
    )


def updated(text: str) -> str:
    """Return the page with a fresh section. Raises ValueError if it has no markers."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{FILE.name} has no {BEGIN} ... {END}")
    return head + section() + tail


def main() -> None:
    """Rewrite the section."""
    FILE.write_text(updated(FILE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
