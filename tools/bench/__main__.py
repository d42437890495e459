"""``python -m tools.bench STUDY [STUDY ...] [--out DIR] [--seed N] [--model NAME]``; ``all`` runs every study.

``readme`` writes RESULTS.md, README's headline and its picture from the studies kept in ``tools/bench/results``; with
``--out DIR`` those found in DIR are taken over first.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from inspect import signature
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
    "larger",
    "rivals",
    "calibration",
    "cost",
    "resume",
    "memory",
    "finetune",
    "cuda",
)
"""One module each, with a function ``run(out, seed, models)``; some take an option of ``EXTRA`` as well."""
EXTRA = ("seeds", "fashion", "mnist", "larger")


def main() -> None:
    """Run the studies that were named, and write the pages if asked to."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, formatter_class=raw)
    parser.add_argument("study", nargs="+", choices=[*STUDIES, "all", "readme"])
    parser.add_argument("--out", type=Path, help="folder of the JSON files; default for studies: results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="of rivals: so many seeds from --seed on")
    parser.add_argument("--fashion", type=Path, metavar="DIR", help="of finetune: the IDX files of Fashion-MNIST")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="of finetune: the IDX files of MNIST")
    parser.add_argument("--larger", type=Path, metavar="DIR", help="of larger: what tools.make_larger_models made")
    parser.add_argument("--model", action="append", default=[], help="only this model; may be given more than once")
    chosen = parser.parse_args()
    os.environ["ONNX_OAMIP_CACHE"] = "off"  # what an earlier run found out would be neither timed nor made again
    for name in STUDIES if "all" in chosen.study else [s for s in chosen.study if s in STUDIES]:
        study = import_module(f"{__package__}.{name}").run
        more = {n: v for n, v in vars(chosen).items() if n in EXTRA and n in signature(study).parameters}
        study(chosen.out or Path("results"), chosen.seed, tuple(chosen.model), **more)
    if "readme" in chosen.study:
        readme.publish(chosen.out)


if __name__ == "__main__":
    main()
