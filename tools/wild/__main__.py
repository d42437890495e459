"""``python -m tools.wild fetch|run|table --cache DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import fetch, manifest


def main() -> None:
    """Fetch the files, run them, or write the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.wild", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("fetch", "run"):
        step = steps.add_parser(name)
        step.add_argument(
            "--cache", type=Path, required=True, help="folder of packages and samples"
        )
    step.add_argument("--out", type=Path, required=True, help="folder of records")
    step.add_argument("--budget", type=float, action="append", help="share to keep: 0.7 and 0.5")
    step.add_argument("--limit", type=float, default=600, help="most seconds of a command: 600")
    step.add_argument("name", nargs="*", help="files; without one, all of the manifest")
    step = steps.add_parser("table")
    step.add_argument("--out", type=Path, required=True, help="folder of records")
    step.add_argument("--study", type=Path, help="folder to write the study wild.json to")
    chosen = parser.parse_args()
    listed = manifest.load()
    if chosen.step == "fetch":
        fetch.fetch(listed, chosen.cache)
        return
    if chosen.step == "table":
        from . import table

        print(table.write(listed, chosen.out, chosen.study))
        return
    from . import run

    if unknown := sorted(set(chosen.name) - {entry.name for entry in listed.entries}):
        parser.error(f"no file is named {unknown[0]}; manifest.toml lists them")
    run.run_all(
        listed,
        chosen.cache,
        chosen.out,
        names=chosen.name,
        budgets=chosen.budget or run.BUDGETS,
        limit=chosen.limit,
    )


if __name__ == "__main__":
    main()
