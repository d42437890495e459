"""The Markdown page and the JSON file of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import onnx_oamip
from onnx_oamip.importance.oamip.select import RELATIVE_GAP as GAP
from tools.bench.studies import environment, table

from . import auxiliary, plots
from .cells import (
    Record,
    Records,
    average,
    closed,
    label,
    losses,
    mean,
    of,
    pairs,
    percent,
    span,
    values,
    wins,
)
from .data import CLASSES, POOL, SOURCES, TITLES, Missing
from .main_table import METHODS, PER_CLASS_SHARE
from .protocol import AUXILIARY, BATCH, FINE_TUNE, NETWORKS, PUBLISHED, RATE, WEIGHT, Protocol
from .studies import RULES

TITLES_OF = {
    "fold": "constants folded, as published",
    "cut": "cut, nothing repaired",
    "refit": "least-squares refit",
}
NAMES = {
    "random": "random",
    "critical": "critical",
    "l1": "L1",
    "activation": "activation",
    "paper": "OAMIP paper",
    "exact": "OAMIP exact",
    "decoupled": "OAMIP decoupled",
    "auxiliary": "OAMIP with heads",
}
AUXILIARY_TITLE = "VGG with auxiliary heads"
DROPPED = ("scores", "keep")
"""Large parts of a record that the JSON file leaves out."""
TUNED = ("l1", "paper", "decoupled")
"""Methods whose masks are trained further, beside random ones."""
Found = dict[str, Records]


def write(out: Path, protocol: Protocol, found: Found, renewed: bool = False) -> None:
    """``results.json``, the plots and ``README.md``; ``renewed``: only the VGG with auxiliary heads is of this run."""
    kept = {
        s: {k: {p: v for p, v in r.items() if p not in DROPPED} for k, r in rs.items()}
        for s, rs in found.items()
    }
    record = {
        "environment": versions(),
        "protocol": asdict(protocol),
        "records": kept,
        "renewed": renewed,
    }
    (out / "results.json").write_text(json.dumps(_rounded(record), separators=(",", ":")) + "\n")
    if not renewed:  # no plot shows the VGG
        plots.draw(out, protocol, found)
    sections = (
        _head,
        _gone,
        _accuracy,
        _tuned,
        _exact,
        _images,
        _weights,
        _modes,
        _number,
        _transfer,
        _auxiliary,
    )
    parts = [section(protocol, found) for section in sections]
    if renewed:
        parts.insert(1, RENEWED)
    (out / "README.md").write_text("\n".join([*parts, LEFT_OUT]))


def read(out: Path, protocol: Protocol) -> Found:
    """Records of an earlier run of the same protocol. Raises Missing with one sentence where there is none."""
    path = out / "results.json"
    if not path.exists():
        raise Missing(f"{out} has no results.json to keep: run without --only-auxiliary.")
    saved = json.loads(path.read_text())
    if saved["protocol"] != json.loads(json.dumps(asdict(protocol))):
        raise Missing(f"{path} is of another protocol: run without --only-auxiliary.")
    records: Found = saved["records"]
    return records


def versions() -> dict[str, str]:
    """The environment with what these experiments use beyond it."""
    more = {p: metadata.version(p) for p in ("torch", "gurobipy", "highspy")}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set")}
    return {"onnx-oamip": onnx_oamip.__version__, **environment(), **more, **threads}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


def _section(
    title: str, rows: Sequence[Record], reading: str, note: str = "", plot: str = ""
) -> str:
    parts = [f"## {title}\n"]
    parts += [f"{note}\n"] if note else []
    parts.append(table(rows, list(rows[0])) + "\n")
    parts += [f"![{title}]({plot}.svg)\n"] if plot else []
    parts.append(f"*Reading:* {reading}\n")
    return "\n".join(parts)


def _head(protocol: Protocol, found: Found) -> str:
    seconds = sum(r.get("seconds", 0.0) for records in found.values() for r in records.values())
    seen = ", ".join(f"{k} {v}" for k, v in versions().items())
    limits = "; ".join(
        f"{n.title} ({'-'.join(map(str, n.widths))}): below {n.threshold:g}"
        for n in PUBLISHED.values()
    )
    sources = ", ".join(f"{TITLES[k]} from {SOURCES[k]}" for k in protocol.data)
    return f"""# OAMIP's published protocol on MNIST and Fashion-MNIST

Every number on this page was measured by `python -m tools.experiments.oamip_tables`, which wrote the page as well;
`results.json` holds the same numbers and more. **No number of the paper is quoted here, and none is meant to be
reproduced to a digit**: the published code sets no seed, and these runs differ from it as listed below.

Environment: {seen}.

Seeds {", ".join(map(str, protocol.seeds))}. All parts took {seconds / 60:.0f} minutes together, on cores that other
work may have shared: seconds are rough.

- Data: {sources}; all 60,000 training images train, all 10,000 test images judge. Images stay 28 x 28 in one channel
  with values in [0, 1] (the published code resizes them).
- Training: RMSprop, rate {RATE:g}, batch {BATCH}, as published, but fewer epochs ({protocol.epochs}).
- Program: lambda {WEIGHT:g}, one image a class, all classes in one program, solved with its binaries to a gap of
  {100 * GAP:g} %. Images come from {POOL} training images, drawn by the seed: per class the one that is classified
  correctly and least surely.
- Pruned are units whose score is below the threshold ({limits}); one unit a layer stays in any case.
- The other columns remove as many units of every layer: at random without replacement (mean of
  {protocol.random_draws} draws); the ones of *highest* published score ("critical"); those of least L1 norm, and of
  least activation energy; by the exact program; by the decoupled one. L1, activation and the decoupled program read
  weights or all {POOL} images, so they know more than {CLASSES} images say.
- Cells are mean ± sample standard deviation over seeds, in points of test accuracy unless they say otherwise.
"""


def _gone(protocol: Protocol, found: Found) -> str:
    rows = []
    for network, name in pairs(protocol):
        records = of(found["main"], network, name)
        row: Record = {**label(network, name), "threshold": f"{NETWORKS[network].threshold:g}"}
        for key, title in (
            ("units", "units %"),
            ("zeroed", "weights % as published"),
            ("parameters", "parameters %"),
            ("macs", "multiply-adds %"),
        ):
            row[title] = mean(values(records, "gone", key), 1)
        row["removed by layer, by seed"] = "; ".join(
            ", ".join(map(str, r["removed"])) for r in records
        )
        row["gap %"] = span(map(percent, values(records, "paper", "gap")), 2)
        row["solve s"] = span(values(records, "paper", "seconds"), 1)
        rows.append(row)
    every = list(found["main"].values())
    shares = [r["gone"]["parameters"] for r in every]
    solved = sum(bool(r["paper"]["proven"]) for r in every)
    reading = (
        f"The published program closes to its gap in {solved} of {len(every)} trainings. At its threshold it takes "
        f"{min(shares):.0f} to {max(shares):.0f} % of the parameters when units are really cut out; the published "
        "figure counts only the weights that make a removed unit, not those that read it."
    )
    return _section("What the published program removes", rows, reading)


def _accuracy(protocol: Protocol, found: Found) -> str:
    parts = []
    for treatment, title in TITLES_OF.items():
        rows = []
        for network, name in pairs(protocol):
            records = of(found["main"], network, name)
            row: Record = {**label(network, name), "Ref": mean(values(records, "reference"))}
            row |= {NAMES[m]: mean(values(records, "accuracy", m, treatment)) for m in METHODS}
            rows.append(row)
        plot = "methods" if treatment == "refit" else ""
        reading = _compared(protocol, found, treatment)
        parts.append(_section(f"Accuracy at equal counts: {title}", rows, reading, "", plot))
    return "\n".join(parts)


def _compared(protocol: Protocol, found: Found, treatment: str) -> str:
    lost = {m: losses(found["main"], protocol, m, treatment) for m in METHODS}
    against = ", ".join(
        f"{NAMES[m]} in {wins(lost['paper'], lost[m], lambda a, b: a < b)}"
        for m in METHODS
        if m != "paper"
    )
    there = {m: [v for v in row if v is not None] for m, row in lost.items()}
    means = {m: float(np.mean(row)) for m, row in there.items() if row}
    points = ", ".join(
        f"{NAMES[m]} {v:.2f}" for m, v in sorted(means.items(), key=lambda item: item[1])
    )
    partial = [NAMES[m] for m, row in lost.items() if None in row]
    note = f" ({', '.join(partial)}: over the rows it has)" if partial else ""
    return (
        f"By means over seeds, OAMIP paper loses less than {against} rows. Mean points lost over the rows: "
        f"{points}{note}."
    )


def _tuned(protocol: Protocol, found: Found) -> str:
    rows = []
    for network, name in pairs(protocol):
        records = of(found["tuned"], network, name)
        row: Record = {
            **label(network, name),
            "Ref": mean(values(of(found["main"], network, name), "reference")),
        }
        row["Ref, trained further"] = mean(values(records, "all"))
        rows.append({**row, **{NAMES[m]: mean(values(records, m)) for m in ("random", *TUNED)}})
    by_row = {
        m: [average(of(found["tuned"], *p), m) for p in pairs(protocol)]
        for m in ("all", "random", *TUNED)
    }
    against = ", ".join(
        f"{title} in {wins(by_row['paper'], by_row[m], lambda a, b: a > b)}"
        for m, title in (
            ("random", "random"),
            ("l1", "L1"),
            ("decoupled", "OAMIP decoupled"),
            ("all", "the unpruned network trained as long"),
        )
    )
    apart = [r["paper"] - r["l1"] for r in found["tuned"].values()]
    reading = (
        f"By means over seeds, OAMIP paper ends above {against} rows; against L1 by {mean(apart)} points over the "
        f"{len(apart)} trainings."
    )
    note = (
        f"Cut, then trained for {FINE_TUNE} more epoch(s) at the full rate, as the published code does; random is one "
        "draw a seed."
    )
    return _section("Accuracy at equal counts: fine-tuned", rows, reading, note)


def _exact(protocol: Protocol, found: Found) -> str:
    rows = []
    for network, name in pairs(protocol):
        records = of(found["main"], network, name)
        for mode in ("joint", "per-class"):
            tried = [r["exact"]["tries"][mode] for r in records if mode in r["exact"]["tries"]]
            if not tried:
                continue
            rows.append(
                {
                    **label(network, name),
                    "mode": mode,
                    "seeds": len(tried),
                    "in the tables": sum(r["exact"]["which"] == mode for r in records),
                    "removed by layer, by seed": "; ".join(
                        ", ".join(map(str, t["removed"])) for t in tried
                    ),
                    "gap %": span((percent(t["gap"]) for t in tried), 0),
                    "variables": span((t["variables"] for t in tried), 0),
                    "solver": ", ".join(sorted({s for t in tried for s in t["solvers"]})),
                    "seconds": span((t["wall"] for t in tried), 0),
                }
            )
    every = list(found["main"].values())
    used = [r["exact"]["tries"][r["exact"]["which"]] for r in every if r["exact"]["which"]]
    reading = (
        f"{sum(bool(t['proven']) for t in used)} of the {len(used)} exact scores in the tables come from programs that "
        f"all closed to {100 * GAP:g} %; the others are incumbents, and a gap above 100 % says that nothing useful is "
        f"known about how good they are. {len(every) - len(used)} of {len(every)} trainings have no exact scores."
    )
    note = (
        "Solved jointly; where the incumbent at the time limit removes no unit, one program a class instead (scores "
        "averaged, and a unit removed below one half); where that removes none either, the column is empty, since only "
        "the tie-break by activation would speak. Later seeds take the mode that served the first. Units that the "
        "program does not remove go in the order of their activation until the counts are met. Limits: "
        f"{protocol.exact_seconds:g} s jointly, "
        f"{PER_CLASS_SHARE * protocol.exact_seconds:g} s a class, not counting the tightening of bounds. The gap is "
        "the worst of a row's programs; *open*: no bound or no incumbent yet. What is found "
        "in time depends on the machine. Programs over the limits of the size-limited Gurobi licence go to HiGHS."
    )
    return _section("The exact programs", rows, reading, note)


def _images(protocol: Protocol, found: Found) -> str:
    rows = []
    for network, name in pairs(protocol, apart=True):
        (record,) = of(found["images"], network, name)
        (main, *_) = of(found["main"], network, name)
        for rule in RULES:
            draws = closed(record[rule]["draws"])
            rows.append(
                {
                    **label(network, name),
                    "image of a class": rule,
                    "Ref": f"{main['reference']:.2f}",
                    "closed": f"{len(draws)} of {len(record[rule]['draws'])}",
                    "parameters %": mean(values(draws, "gone", "parameters"), 1),
                    "folded": mean(values(draws, "accuracy", "fold")),
                    "least folded": f"{min(_fold(draws)):.2f}" if draws else "-",
                    "refit": mean(values(draws, "accuracy", "refit")),
                    "rank correlation, all draws": mean([record[rule]["agreement"]]),
                }
            )
    drawn = [closed(r[rule]["draws"]) for r in found["images"].values() for rule in RULES]
    shares, folded, refit = (
        max((max(part(d)) - min(part(d)) for d in drawn if d), default=0.0)
        for part in (_share, _fold, _refit)
    )
    agreed = [r[rule]["agreement"] for r in found["images"].values() for rule in RULES]
    between = ""
    if None not in agreed:
        between = f"; scores of two draws correlate {min(agreed):.2f} to {max(agreed):.2f} (ranks, mean of pairs)"
    reading = (
        f"With other images of the same kind the share of parameters that goes moves by up to {shares:.1f} points, "
        f"the folded accuracy by up to {folded:.2f} and the refitted one by up to {refit:.2f}{between}."
    )
    note = (
        f"{protocol.image_draws} draws of {POOL} training images on the first seed's networks; of each, one image a "
        "class: the least sure correct one as above, or any correct one (the published code ranks groups of images by "
        f"how many are correct alone). Means over the draws whose program closed in {protocol.seconds:g} s; the others "
        "hold no point but the unpruned network."
    )
    return _section("Robustness to the choice of images", rows, reading, note, "images")


def _fold(draws: Sequence[Record]) -> list[float]:
    return [d["accuracy"]["fold"] for d in draws]


def _refit(draws: Sequence[Record]) -> list[float]:
    return [d["accuracy"]["refit"] for d in draws]


def _share(draws: Sequence[Record]) -> list[float]:
    return [d["gone"]["parameters"] for d in draws]


def _weights(protocol: Protocol, found: Found) -> str:
    rows, monotone = [], 0
    for network, name in pairs(protocol):
        (record,) = of(found["weights"], network, name)
        row: Record = label(network, name)
        for weight in protocol.weights:
            r = record[f"{weight:g}"]
            open_ = "" if r["program"]["proven"] else " *"
            row[f"lambda {weight:g}"] = (
                f"{r['gone']['parameters']:.1f} % / {r['accuracy']['fold']:.2f}{open_}"
            )
        shares = _share(closed([record[f"{w:g}"] for w in protocol.weights]))
        monotone += all(a >= b for a, b in pairwise(shares))
        rows.append(row)
    loose = (
        "" if monotone == len(rows) else ", so that lambda is no dependable handle on how much goes"
    )
    outer = [
        [r[f"{w:g}"] for w in (protocol.weights[0], protocol.weights[-1])]
        for r in found["weights"].values()
    ]
    ends = (
        np.array([_share(both) for both in outer if len(closed(both)) == len(both)])
        .reshape(-1, 2)
        .mean(axis=0)
    )
    reading = (
        f"From lambda {protocol.weights[0]:g} to {protocol.weights[-1]:g} the share of parameters that goes moves "
        f"from {ends[0]:.1f} to {ends[1]:.1f} % on average; it rises at no step in {monotone} of "
        f"{len(rows)} rows{loose}."
    )
    note = (
        "Parameters cut / accuracy with constants folded, on the first seed's networks; a larger lambda weighs the "
        "loss more. * : stopped by the time limit."
    )
    return _section("The weight of the loss", rows, reading, note, "weights")


def _modes(protocol: Protocol, found: Found) -> str:
    rows = []
    more = 0
    for network, name in pairs(protocol):
        records, main = of(found["modes"], network, name), of(found["main"], network, name)
        a, b = (
            average(main, "gone", "parameters"),
            average(records, "per-class", "gone", "parameters"),
        )
        assert a is not None
        assert b is not None
        more += b > a
        rows.append(
            {
                **label(network, name),
                "Pearson": mean(values(records, "pearson")),
                "Spearman": mean(values(records, "spearman")),
                "joint: parameters %": mean(values(main, "gone", "parameters"), 1),
                "per class: parameters %": mean(
                    values(records, "per-class", "gone", "parameters"), 1
                ),
                "joint: folded": mean(values(main, "accuracy", "paper", "fold")),
                "per class: folded": mean(values(records, "per-class", "accuracy", "fold")),
                "per class at joint's counts: folded": mean(
                    values(records, "same counts", "accuracy", "fold")
                ),
                "refit: joint": mean(values(main, "accuracy", "paper", "refit")),
                "refit: per class at its counts": mean(
                    values(records, "same counts", "accuracy", "refit")
                ),
            }
        )
    joint = [average(of(found["main"], *p), "accuracy", "paper", "fold") for p in pairs(protocol)]
    apart = [
        average(of(found["modes"], *p), "same counts", "accuracy", "fold") for p in pairs(protocol)
    ]
    correlation = [r["spearman"] for r in found["modes"].values()]
    reading = (
        f"The two agree only in part (rank correlation {min(correlation):.2f} to {max(correlation):.2f}): averages of "
        "one program a class are not the scores of one program for all. At the same threshold per-class prunes more "
        f"in {more} of {len(rows)} rows; at equal counts it is the better one in "
        f"{wins(apart, joint, lambda a, b: a > b)} rows (folded)."
    )
    return _section("One program a class against one for all", rows, reading)


def _number(protocol: Protocol, found: Found) -> str:
    rows = []
    stopped = 0
    for network, name in pairs(protocol):
        (record,) = of(found["number"], network, name)
        row: Record = label(network, name)
        for count in protocol.per_class:
            r = record[str(count)]
            stopped += not r["program"]["proven"]
            open_ = "" if r["program"]["proven"] else " *"
            row[f"{count} a class"] = (
                f"{r['gone']['parameters']:.1f} % / {r['accuracy']['fold']:.2f}{open_}"
            )
            row[f"{count}: s"] = f"{r['program']['seconds']:.1f}"
        rows.append(row)
    counts = [[r[str(c)] for c in protocol.per_class[:2]] for r in found["number"].values()]
    both = [_share(pair) for pair in counts if len(closed(pair)) == len(pair)]
    fewer = sum(b < a for a, b in both)
    better = sum(
        b["accuracy"]["fold"] > a["accuracy"]["fold"] for a, b in counts if len(closed([a, b])) > 1
    )
    reading = (
        f"With {protocol.per_class[1]} images a class instead of {protocol.per_class[0]} less is pruned at the same "
        f"threshold in {fewer} of the {len(both)} rows where both programs closed, and the accuracy is "
        f"higher in {better}."
    )
    if stopped:
        reading += (
            f" {stopped} of {len(rows) * len(protocol.per_class)} programs did not close in {protocol.seconds:g} s; "
            "where such a cell says 0.0 %, its only incumbent is the unpruned network."
        )
    note = "Parameters cut / accuracy with constants folded, first seed. * : stopped by the time limit."
    return _section("Images per class", rows, reading, note)


def _transfer(protocol: Protocol, found: Found) -> str:
    rows = []
    lead: dict[str, list[float]] = {"paper": [], "decoupled": []}
    for network, source in pairs(protocol, apart=True):
        for target in protocol.data:
            records = [
                r
                for k, r in found["transfer"].items()
                if k.startswith(f"{network}-{source}-{target}-")
            ]
            if not records:
                continue
            rows.append(
                {
                    "network": NETWORKS[network].title,
                    "mask from": TITLES[source],
                    "trained on": TITLES[target],
                    "parameters gone %": mean(values(records, "gone", "parameters"), 1),
                    "full": mean(values(records, "full")),
                    **{f"{NAMES[m]} mask": mean(values(records, m)) for m in lead},
                    "random mask": mean(values(records, "random")),
                }
            )
            for method, leads in lead.items():
                leads += [r[method] - r["random"] for r in records]
    parts = [_transferred(found["transfer"], method, leads) for method, leads in lead.items()]
    return _section("Masks on the other data set", rows, " ".join(parts), "", "transfer")


def _transferred(records: Records, method: str, leads: Sequence[float]) -> str:
    """Mean loss of the masks of a method on the other data set, and their lead over random ones."""
    drop = np.mean([r["full"] - r[method] for r in records.values()])
    spread = np.std(leads, ddof=1) if len(leads) > 1 else 0.0
    error = spread / np.sqrt(len(leads))
    verdict = "more than twice the standard error, so that it matters which units the mask keeps"
    if abs(np.mean(leads)) <= 2 * error:
        verdict = "within twice the standard error, so that these runs do not show that it matters which units are kept"
    return (
        f"{NAMES[method]}: trained from its initialisation on the other data set, what a mask leaves loses "
        f"{drop:.2f} points against the full network on average. It is {np.mean(leads):+.2f} ± {spread:.2f} points "
        f"against a random mask of the same counts, better in {sum(c > 0 for c in leads)} of {len(leads)} pairs: "
        f"{verdict}."
    )


def _auxiliary(protocol: Protocol, found: Found) -> str:
    records = list(found["auxiliary"].values())
    limit = AUXILIARY.threshold
    rows = []
    for parts in zip(*(record["modules"] for record in records), strict=True):
        row: Record = {"layers": ", ".join(k.removesuffix(".weight") for k in parts[0]["layers"])}
        scores = [np.concatenate(list(part["layers"].values())) for part in parts]
        row["units"] = len(scores[0])
        row["head right of the pool %"] = span([part["right"] for part in parts], 0)
        row[f"below {limit:g}, by seed"] = ", ".join(str(int((s < limit).sum())) for s in scores)
        row["least score"] = span([float(s.min()) for s in scores], 3)
        row["gap %"] = span([percent(part["gap"]) for part in parts], 2)
        row["variables"] = span([part["variables"] for part in parts], 0)
        row["solve s"] = span([part["seconds"] for part in parts], 1)
        rows.append(row)
    closed_programs = sum(part["proven"] for record in records for part in record["modules"])
    every = sum(len(record["modules"]) for record in records)
    maps, gone_maps = _units_below(records, limit, "conv")
    dense, gone_dense = _units_below(records, limit, "fc")
    reading = (
        f"{closed_programs} of {every} programs close. Below the threshold are {gone_maps} of {maps} channels of "
        f"convolutions and {gone_dense} of {dense} dense units."
    )
    shape = "-".join(map(str, AUXILIARY.widths[:-1]))
    seeds = "one seed" if len(records) == 1 else f"{len(records)} seeds"
    note = (
        f"Decoupled greedy learning on {TITLES[auxiliary.DATA]}: six 3x3 convolutions ({shape} channels, batch "
        f"normalisation, average pooling behind each second one) and a dense layer of {AUXILIARY.widths[-1]}. Every "
        "convolution is trained on a detached input with an auxiliary head of its own (pool, 1x1 convolution, pool, "
        "two dense layers, as in the published code; the last one with the classifier), by stochastic gradient descent "
        f"at a constant rate of 0.1, as published, on the first {auxiliary.TRAINED:,} training images for "
        f"{protocol.epochs} epochs, from {seeds}: a small and briefly trained stand-in for the published "
        "VGG-16. Each module is a file of its own, with batch normalisation folded into the layer in front of it; the "
        "published program is solved over a module and its head, on the images that the head is least sure of, and the "
        "scores of the heads are dropped. Two differences matter: the gate acts behind batch normalisation, and bounds "
        "start at the input of the module, not at the image. So they decide nearly every sign, and each unit of a head "
        "must keep its sign at every position of every image, which "
        "leaves the channels in front of it hardly any room; bounds from the image decide almost no sign in the deep "
        "modules of a VGG-16."
    )
    parts = [_section(f"The {AUXILIARY_TITLE}: programs", rows, reading, note)]
    parts.append(_auxiliary_compared(records))
    return "\n".join(parts)


def _units_below(records: Sequence[Record], limit: float, prefix: str) -> tuple[int, int]:
    """(units, units that score below a limit) of the layers of a kind, over all modules and seeds."""
    scores = [
        score
        for record in records
        for part in record["modules"]
        for weight, values in part["layers"].items()
        if weight.startswith(prefix)
        for score in values
    ]
    return len(scores), sum(score < limit for score in scores)


def _auxiliary_compared(records: Sequence[Record]) -> str:
    rows = []
    readings = []
    for counts in (auxiliary.THRESHOLD, auxiliary.HALF):
        compared = [record["compared"][counts] for record in records]
        for treatment in auxiliary.SHOWN:
            row: Record = {"counts": counts, "treatment": TITLES_OF[treatment]}
            row["units %"] = mean(values(compared, "gone", "units"), 1)
            row["parameters %"] = mean(values(compared, "gone", "parameters"), 1)
            row["Ref"] = mean(values(records, "reference"))
            for method in auxiliary.METHODS:
                row[NAMES[method]] = mean(values(compared, "accuracy", method, treatment))
            rows.append(row)
            own = average(compared, "accuracy", "auxiliary", treatment)
            assert own is not None
            leads = []
            for method in auxiliary.METHODS:
                other = average(compared, "accuracy", method, treatment)
                if method != "auxiliary" and other is not None:
                    leads.append(f"{own - other:+.2f} points against {NAMES[method]}")
            readings.append(f"{counts}, {TITLES_OF[treatment]}: {', '.join(leads)}")
    seeds = "one seed" if len(records) == 1 else f"means over {len(records)} seeds"
    reading = f"OAMIP with heads, {seeds}: {'; '.join(readings)}."
    note = (
        f"Accuracy on the first {auxiliary.JUDGED:,} test images, by counts of units per layer: those below the "
        "published threshold, and half of every layer, which shows the order of the scores: where they are all near 1, "
        "they differ by less than the gap, or only by the activation that orders equal ones. OAMIP decoupled is this "
        "package's own decoupling, in which the consumers of a layer are its head."
    )
    return _section(f"The {AUXILIARY_TITLE}: accuracy at equal counts", rows, reading, note)


RENEWED = f"""\
The {AUXILIARY_TITLE} was measured by a later run (`--only-auxiliary`), which kept the other tables as they were.
"""
LEFT_OUT = f"""\
## What is left out

- A VGG-16 of the published size, and CIFAR-10: not tried. A module of it has up to 700,000 activations over ten images,
  more than the 300,000 that a joint program takes. The {AUXILIARY_TITLE} above is smaller and briefly trained;
  bounds that start at the image, with programs whose signs are relaxed, were not tried.
- SNIP and pruning at initialisation: not tried.
- More seeds: with so few, columns that differ by less than the spreads beside them are not told apart.
"""
