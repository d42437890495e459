"""``python -m tools.bench STUDY [STUDY ...] [--out DIR] [--seed N] [--model NAME]``; ``all`` runs every study."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

from . import readme

STUDIES = (
    "budgets",
    "connections",
    "ablation",
    "speed",
    "coupling",
    "coverage",
    "foreign",
    "programs",
    "importance",
    "methods",
    "decoupled",
    "estimators",
    "storage",
    "large",
)
"""One module each, with a function ``run(out, seed, models)``."""


def main() -> None:
    """Run the studies that were named and put their tables into README."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("study", nargs="+", choices=[*STUDIES, "all", "readme"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", action="append", default=[], help="only this model; may be given more than once")
    chosen = parser.parse_args()
    os.environ["ONNX_OAMIP_CACHE"] = "off"  # what an earlier run found out would be neither timed nor made again
    for name in STUDIES if "all" in chosen.study else [s for s in chosen.study if s in STUDIES]:
        import_module(f"{__package__}.{name}").run(chosen.out, chosen.seed, tuple(chosen.model))
    if "readme" in chosen.study:
        readme.write(chosen.out)


if __name__ == "__main__":
    main()
