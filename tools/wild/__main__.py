"""``python -m tools.wild fetch|run|judge|simplify|table|recovered|handover``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import fetch, manifest


def main() -> None:
    """Fetch the files, run them, judge them again, write the table, or hand pruned files over to other tools."""
    parser = argparse.ArgumentParser(prog="python -m tools.wild", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("fetch", "run", "judge", "simplify"):
        step = steps.add_parser(name)
        step.add_argument(
            "--cache", type=Path, required=True, help="folder of packages and samples"
        )
        if name == "fetch":
            continue
        step.add_argument("--out", type=Path, required=True, help="folder of records")
        if name == "simplify":
            continue
        step.add_argument(
            "--budget", type=float, action="append", help="share to keep: 0.7 and 0.5"
        )
        step.add_argument("name", nargs="*", help="files; without one, all of the manifest")
        if name == "run":
            limit = "most seconds of a command: 600"
            step.add_argument("--limit", type=float, default=600, help=limit)
            step.add_argument("--recover", metavar="EFFORT", help="recover behind the refit: 300")
    step = steps.add_parser("table")
    step.add_argument("--out", type=Path, required=True, help="folder of records")
    step.add_argument("--study", type=Path, help="folder to write the study wild.json to")
    step = steps.add_parser("recovered")
    step.add_argument("--out", type=Path, required=True, help="folder of records without recovery")
    step.add_argument("--recovered", type=Path, required=True, help="folder of records with it")
    step.add_argument("--study", type=Path, help="folder to write the study wild-recovered.json to")
    step = steps.add_parser("handover")
    step.add_argument(
        "--modules", type=Path, required=True, help="folder node_modules with onnxruntime-web"
    )
    step.add_argument("--study", type=Path, help="folder to write the study handover.json to")
    step.add_argument(
        "files", nargs="+", metavar="ORIGINAL,PRUNED,SAMPLES", help="two models, a .npz"
    )
    chosen = parser.parse_args()
    if chosen.step == "handover":
        from . import handover

        pairs = [handover.load(text) for text in chosen.files]
        print(handover.write(pairs, chosen.modules, chosen.study))
        return
    listed = manifest.load()
    if chosen.step == "fetch":
        fetch.fetch(listed, chosen.cache)
        return
    if chosen.step == "simplify":
        from . import handover

        handover.simplify_all(listed, chosen.cache, chosen.out)
        return
    if chosen.step == "table":
        from . import table

        print(table.write(listed, chosen.out, chosen.study))
        return
    if chosen.step == "recovered":
        from . import table

        print(table.write_recovered(listed, chosen.out, chosen.recovered, chosen.study))
        return
    from . import run

    if unknown := sorted(set(chosen.name) - {entry.name for entry in listed.entries}):
        parser.error(f"no file is named {unknown[0]}; manifest.toml lists them")
    places = (listed, chosen.cache, chosen.out)
    budgets = chosen.budget or run.BUDGETS
    if chosen.step == "judge":
        run.judge_all(*places, names=chosen.name, budgets=budgets)
    else:
        more = {"limit": chosen.limit, "recover": chosen.recover}
        run.run_all(*places, names=chosen.name, budgets=budgets, **more)


if __name__ == "__main__":
    main()
