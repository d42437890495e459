"""``python -m tools.bench STUDY [STUDY ...] [--out DIR] [--seed N] [--model NAME]``; ``all`` runs every study.

Every study prints its environment, its seed and a table, saves them as JSON in DIR, and beside it draws its picture, if
it has one (``figures``). It runs in a process of its own, so that none disturbs the next. One that lacks something (a
package, training images, a GPU) is left out with a sentence that says what to do; one that fails stops none of the
others. What became of each comes last, and the exit status is 1 where one failed, or none ran.

``readme`` writes docs/results.md, README's headline and the figures from the studies in ``tools/bench/results``; with
``--out DIR`` those found in DIR are copied there first. ``python -m tools.bench.agree DIR DIR`` compares two runs.

What studies need beside ``pip install -e '.[cpu,dev]'``:
  coverage, estimators, foreign, latency, programs, rivals: the extra experiments (torch, onnxsim and others)
  recover: the extra recover (torch); beside it onnxsim, where it is installed
  finetune, lottery, the larger counts of calibration and recover, further seeds of critical (torch): training images,
    --mnist DIR and --fashion DIR, folders with the four IDX files of MNIST and of Fashion-MNIST, gzipped or plain
    (models/README.md says from where)
  mutants: mutmut
  rows for CUDA in latency: the extra gpu in place of cpu, and an NVIDIA GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import readme
from .driver import drive

STUDIES = (
    "budgets",
    "connections",
    "ablation",
    "mechanisms",
    "effort",
    "branches",
    "speed",
    "coupling",
    "coverage",
    "foreign",
    "programs",
    "importance",
    "methods",
    "decoupled",
    "gaps",
    "critical",
    "lottery",
    "estimators",
    "storage",
    "large",
    "larger",
    "low_rank",
    "real",
    "rivals",
    "latency",
    "calibration",
    "cost",
    "resume",
    "determinism",
    "memory",
    "limits",
    "mutants",
    "recover",
    "finetune",
    "cuda",
)
"""One module each, with a function ``run(out, seed, models)``; some take an option of ``EXTRA`` as well."""
EXTRA = ("seeds", "fashion", "mnist", "kana", "larger", "methods", "budgets")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies that were named, and write the pages if asked to; the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    listed = f"all, readme, or some of: {', '.join(STUDIES)}"
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=raw
    )
    parser.add_argument(
        "study", nargs="+", choices=[*STUDIES, "all", "readme"], metavar="STUDY", help=listed
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON files; default for studies: results"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=3, help="of rivals: so many seeds from --seed on"
    )
    for option, title in (("--fashion", "Fashion-MNIST"), ("--mnist", "MNIST")):
        parser.add_argument(
            option,
            type=Path,
            metavar="DIR",
            help=f"IDX files of {title}: for finetune, calibration, critical, lottery",
        )
    parser.add_argument(
        "--kana",
        type=Path,
        metavar="DIR",
        help="of lottery: a third data set, which python -m tools.experiments.kana makes",
    )
    parser.add_argument(
        "--larger",
        type=Path,
        metavar="DIR",
        help="of larger, low_rank, real, mechanisms, effort, branches and recover: what "
        "tools.make_larger_models made",
    )
    parser.add_argument(
        "--model", action="append", default=[], help="only this model; may be given more than once"
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        dest="methods",
        metavar="NAME",
        help="of larger: only this method, as its table names it; may be given more than once",
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        type=float,
        dest="budgets",
        metavar="SHARE",
        help="of larger: only this share of the MACs; may be given more than once",
    )
    chosen = parser.parse_args(arguments)
    names = STUDIES if "all" in chosen.study else [s for s in chosen.study if s in STUDIES]
    extra = {key: getattr(chosen, key) for key in EXTRA}
    extra |= {key: tuple(extra[key]) for key in ("methods", "budgets")}
    status = 0
    if names:
        status = drive(
            names, chosen.out or Path("results"), chosen.seed, tuple(chosen.model), extra
        )
    if "readme" in chosen.study:
        readme.publish(chosen.out)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
