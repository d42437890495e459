"""Accuracy by number of calibration images, and beside it with those of another domain and with noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .drawing import BLUE, INK, QUIET, accuracies, name_lines, sheet
from .studies import Row

OWN = "own domain"
LOOKS = ((INK, "o"), (BLUE, "s"))
"""Colour and mark by budget, in the order of the columns."""
STEP = 4.5
"""Each kind of other data stands so many times further right than what comes before it."""


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draw rows of the study ``calibration``, a panel a network."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    with sheet(rows, target, 7.6, 2.7 * len(models)) as figure:
        for number, model in enumerate(models):
            axes = figure.add_subplot(len(models), 1, number + 1)
            here = [r for r in rows if r["model"] == model]
            own = sorted((r for r in here if r["calibration"] == OWN), key=lambda r: r["samples"])
            other = [r for r in here if r["calibration"] != OWN]
            budgets = [key for key in here[0] if key.startswith("at ")]
            budgets.sort(key=lambda key: -float(key.split()[1].rstrip("%")))
            seen = [r[key] for r in here for key in (*budgets, "before")]
            accuracies(axes, min(seen), max(seen))
            counts = [r["samples"] for r in own]
            places = [counts[-1] * STEP ** (i + 1) for i in range(len(other))]
            axes.set(xscale="log", xlim=(counts[0] / 1.5, (places or counts)[-1] * 1.6))
            axes.set_xticks([*counts, *places], [*(f"{n:,}" for n in counts), *map(_other, other)])
            axes.set_xticks([], minor=True)
            before = here[0]["before"]
            axes.axhline(before, color=QUIET, lw=0.9, ls=":")
            names = [(before, f"original, {before:.2f}", QUIET)]
            for key, (colour, mark) in zip(budgets, LOOKS, strict=False):
                axes.plot(counts, [r[key] for r in own], color=colour, marker=mark, ms=4, lw=1.6)
                axes.plot(places, [r[key] for r in other], mark, color=colour, ms=5, mfc="white")
                names.append(((other or own)[-1][key], f"{key.removeprefix('at ')} kept", colour))
            if other:
                axes.axvline(counts[-1] * STEP**0.5, color=QUIET, lw=0.6)
            axes.set(
                title=model,
                ylabel="accuracy, %",
                xlabel="calibration images" if model == models[-1] else "",
            )
            axes.grid(alpha=0.25)
            name_lines(axes, names)


def _other(row: Row) -> str:
    kind = row["calibration"]
    kind = kind.partition("(")[2].rstrip(")") or kind
    return f"{row['samples']:,} of\n{kind}"
