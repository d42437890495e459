"""Writes the pages that show saved studies: docs/results.md, the headline tables of README.md, and the figures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from . import figures, latency, picture, rivals
from .figures import FIGURES
from .studies import ROOT, Row, table, together

SAVED = Path(__file__).parent / "results"
"""The studies that the pages are made from, one JSON file each, as ``studies.save`` writes them."""
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
DRAWN = ROOT / "docs" / "figures"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

TEXT = {
    "budgets": (
        "Accuracy at a budget",
        (
            "Default settings, 512 unlabelled calibration images, no fine-tuning; accuracy in percent on 2,000 test "
            "images (one of them is 0.05 points)."
        ),
    ),
    "speed": (
        "Latency and cost",
        (
            "Ratios measured side by side in one run. The share of the ideal speed-up is MACs kept over latency kept; "
            "pruning is counted in plain ONNX Runtime passes over the same calibration data."
        ),
    ),
    "ablation": (
        "Ablation",
        (
            "Accuracy at half the MACs by order of removal, allocation of widths and refit (`none`, `bias`, "
            "`least-squares`), widths not aligned."
        ),
    ),
    "mechanisms": (
        "Mechanisms",
        (
            "What each mechanism of the default, and of `--effort high`, is worth: accuracy in percent, or agreement "
            "with the original, with all of them, each left out, each alone, and none; widths not aligned. Of "
            "EfficientNet-Lite0 only a row with all mechanisms has second looks, which take longer than the others."
        ),
    ),
    "effort": (
        "Effort",
        (
            "What each level of `--effort` keeps at equal MACs (accuracy in percent, or agreement with the original), "
            "and the processor time of the whole run without a cache: `low` measures the losses of widths on fewer "
            "samples and at fewer widths, `high` measures them again around the plan, twice; widths not aligned."
        ),
    ),
    "branches": (
        "Branches left out",
        (
            "Plans that keep a unit of every group, and plans that may leave out whole branches (`--empty`), at equal "
            "MACs and at equal predicted latency (one thread, one table of times per network); accuracy in percent, or "
            "agreement with the original. `auto` leaves out branches under a latency budget only. "
            "Latency budgets of the faster networks are left out here: their times vary more than branches matter "
            "unless the machine is idle."
        ),
    ),
    "importance": (
        "Unit selection",
        "Accuracy in percent with the same share of units kept in every group, by importance and refit.",
    ),
    "methods": (
        "Methods side by side",
        "Accuracy in percent by importance method, at the same budget, with widths as even as the budget allows.",
    ),
    "connections": (
        "Connections",
        (
            "Single connections pruned by NNrelief without retraining: factor of compression, and the accuracy in "
            "percent. The paper's more than 50 times (VGG, CIFAR-10) come with retraining after every round."
        ),
    ),
    "decoupled": (
        "Cost of oamip",
        "Decoupled scoring; a program has one variable per unit and one more.",
    ),
    "gaps": (
        "Gaps of the decoupled programs",
        (
            "With a least-squares refit: the loss is the sum over nine programs of the relative squared error of the "
            "consumers' outputs, and the gap is relative to it. Unproved energy: what is not proved of the outputs' "
            "energy that the kept units of a program explain, in the mean. "
            "Rows with wall-clock seconds are from before the inequalities of products, which tighten the bounds of "
            "groups of up to about 600 units; the seconds are of a machine with other work."
        ),
    ),
    "critical": (
        "Critical units",
        (
            "`--importance oamip` without a budget (decoupled), and the published threshold of 0.1 on keep variables "
            "of programs over ten images: units kept, and points of accuracy lost on 2,000 test images. "
            "Warned: the command says on stderr what the pruned model loses, where that is more than one point. "
            "Seconds are of a machine with other work."
        ),
    ),
    "lottery": (
        "Lottery tickets",
        (
            "Accuracy in percent of what a mask leaves of the initial weights, after the same training as the whole "
            "network (five epochs, one seed). All masks keep as many units of a layer as the published program at 0.1. "
            "`kana` is rendered from Japanese fonts with the ten characters of KMNIST, and is not KMNIST."
        ),
    ),
    "programs": (
        "The published program",
        (
            "LeNet-300-100 on ten images to a gap of 1 %, against the same program written in CVXPY for Clarabel. "
            "[Gaps of the decoupled programs](#gaps-of-the-decoupled-programs) has those of 20 to 2,000 units."
        ),
    ),
    "estimators": (
        "Dependence between layers",
        "Seconds, detection of true edges, and memory.",
    ),
    "storage": (
        "Packed files",
        (
            "Size in percent of each version's bytes; codebooks chosen on 1,000 test images to lose at most half a "
            "point there, accuracies on 1,000 others. Unpacked weights are dense again."
        ),
    ),
    "rivals": (
        "Against others at equal MACs",
        (
            "Accuracy in percent without retraining on the same 512 calibration images (Taylor and Hessian also get "
            "labels), all widths in steps of one channel. No file is over its budget, and a rival's is within a "
            "hundredth of it where its steps allow. Ours is the mean of three seeds, which shuffle those images, with "
            "the lowest and the highest; of each rival the best of its variants, picked row by row by the "
            "accuracy shown, which favours it. The standard error is that of the lead on the same 2,000 test images. "
            "Random has our allocation and no refit. A dash: the tool did not come down to that budget."
        ),
    ),
    "rivals-summary": (
        "Points lost at half the MACs",
        (
            "No training, the same images, the same MACs on the exported file: ours (mean of three seeds) beside the "
            "best variant of the best of onnxsim's and Torch-Pruning's methods for each model."
        ),
    ),
    "larger": (
        "Larger networks against others",
        (
            "Without retraining, on 512 calibration images (Taylor also gets labels). ResNet-56 and VGG-16 on "
            "Fashion-MNIST are judged by accuracy on 2,000 test images, EfficientNet-Lite with its published ImageNet "
            "weights by how often its first answer is the original's, on 512 crops of photographs that calibration did "
            "not see; all in percent. Divergence from the original's answers is in nats. EfficientNet-Lite1 has ours "
            "alone, of a later version than the rows of EfficientNet-Lite0."
        ),
    ),
    "larger-summary": (
        "Larger networks, summary",
        (
            "Ours and the best rival at the same MACs, picked row by row by the figure shown, which favours the rival. "
            "Random has our allocation and no refit."
        ),
    ),
    "low_rank": (
        "Low-rank factors by layer",
        (
            "Dense layers and 1x1 convolutions with at least a hundredth of the MACs: loss of the model with the layer "
            "in low-rank factors, over the least loss of a group that the layer reads or writes, narrowed until the "
            "model saves as many MACs, at three shares of the layer's MACs. Both are measured on samples that no fit "
            "used, in the default order and basis of units; losses below 0.00001 count as that."
        ),
    ),
    "low_rank-gain": (
        "Low-rank factors in the budget program",
        (
            "Loss that the budget program predicts with widths alone, the same found by the search of this study, and "
            "that with ranks as a further choice; the number of layers that a rank serves better at equal MACs; layers "
            "that the search factors, and the share of the predicted loss that this saves. Losses of single changes "
            "are added up, so that the share is what could be gained at most. Then accuracy in percent and divergence "
            "of pruned networks of the repository without and with `--factor auto`, which factors fewer layers."
        ),
    ),
    "real": (
        "Networks with published weights",
        (
            "EfficientNet-Lite with its published ImageNet weights by the command line, 512 calibration crops, without "
            "retraining: how often the first answer is the original's, in percent, on 512 crops of photographs that "
            "calibration did not see. Divergence is in nats; a pass is one run of ONNX Runtime over the calibration "
            "crops, and is counted where no earlier run had filled the cache."
        ),
    ),
    "rivals-importances": (
        "Every importance at equal MACs",
        (
            "Accuracy in percent of ours by importance, one seed, with the default allocation and refit; `obs` is the "
            "default."
        ),
    ),
    "latency": (
        "Speed-up against the ideal",
        (
            "How many times faster than the original, in ONNX Runtime. Ideal is MACs over MACs kept, predicted the "
            "additive model behind `--latency`, measured the median of paired ratios with its 95 % interval. Ours with "
            "the measured step of widths (the default), with `--align 1`, and onnxsim (L2 norm) at the same budget."
        ),
    ),
    "latency-means": (
        "Speed-up and accuracy",
        (
            "Geometric means of the speed-ups over the networks that all three bring down to the budget, and the mean "
            "points of accuracy lost there. Ours with the measured step of widths (the default), ours with "
            "`--align 1`, and onnxsim (L2 norm); predicted by the additive model behind `--latency`."
        ),
    ),
    "latency-accuracy": (
        "Accuracy behind the speed-ups",
        (
            "Accuracy in percent of the models timed above, and the nodes that pruning added; `step` is the step of "
            "widths that was measured."
        ),
    ),
    "finetune": (
        "A short fine-tune",
        "The same epochs after pruning by ours and by Torch-Pruning's L2; accuracy in percent.",
    ),
    "finetune-rates": (
        "Learning rates of the fine-tune",
        "Accuracy in percent on 8,000 other test images after one epoch, by share of the network's own learning rate.",
    ),
    "recover": (
        "Recovery without labels",
        (
            "`apply --recover` from the plan of the default pruning, beside the same plan with the refit alone, on the "
            "same unlabelled images: the 512 that are shipped, and training images more. The recovery holds a fifth of "
            "them out of refit and training, and judges by it; the original is the teacher. Accuracy and agreement "
            "with the original's first answer in percent, divergence from its answers in nats, all on images that no "
            "step has seen."
        ),
    ),
    "recover-images": (
        "Recovery of networks for a thousand classes",
        (
            "EfficientNet-Lite at a share of its MACs, refitted to four fifths of its 512 calibration images; "
            "recoveries from there on different images, judged by the last fifth. The 512 are crops of 131 "
            "photographs; composed are images of 352 stamps on crops of the same photographs. Agreement "
            "with the original's first answer in percent and divergence from its answers in nats on 512 crops of other "
            "photographs; the standard error of an agreement is about 2 points. Rows were made on several days, on "
            "which the machine's speed differed by a factor of two."
        ),
    ),
    "recover-onnxsim": (
        "Recovery beside onnxsim's finetune",
        (
            "One pruned transformer with its weights as they were, and by onnxsim's `apply_pruning_finetune`, by the "
            "refit, and by the recovery. onnxsim repairs the layers whose rows or columns alone were cut."
        ),
    ),
    "recover-labelled": (
        "Recovery beside a fine-tune with labels",
        (
            "One network cut by Torch-Pruning to the largest widths of one ratio within the MACs of ours and trained "
            "with labels, beside the recovery, which needs none: the same images, about as many steps of 32 of them. "
            "The fine-tune takes the learning rate that is best on its held-out fifth. Accuracy in percent."
        ),
    ),
    "recover-step": (
        "Cost of a step of the recovery",
        (
            "A training step of the recovery, and one of the same network written by hand in plain torch: processor "
            "time, medians of steps in turn, one thread. That of the recovery also compares features, and makes its "
            "steps in coordinates of the weights, which it averages."
        ),
    ),
    "recover-operators": (
        "Operators of the recovery",
        (
            "Largest difference of torch's outputs from ONNX Runtime's, over the largest value of the output, in the "
            "graphs of the tests. Only the parts of a network that agree are trained."
        ),
    ),
    "calibration": (
        "Calibration set size",
        "Unlabelled images of the network's own domain, of another one, and noise; accuracy in percent.",
    ),
    "cost": (
        "Cost by size",
        (
            "Seconds and memory of pruning stacks of 3 x 3 convolutions; passes are the seconds in plain ONNX Runtime "
            "passes over the same calibration data."
        ),
    ),
    "cost-exponents": (
        "Growth of the cost",
        (
            "Exponent b of seconds = start-up + a * size^b between the two largest sizes of the study above; the "
            "start-up is the time of a stack of almost no work."
        ),
    ),
    "cuda": (
        "Calibration on a GPU",
        (
            "One calibration pass on the CPU and on a GPU; moments differ by at most `apart` of their tensor's "
            "scale; shares of the GPU's time that copies between host and device take."
        ),
    ),
    "resume": (
        "Resuming",
        (
            "A run that was killed and started again with its cache (half the MACs, widths in steps of 8). All columns "
            "are processor time relative to a whole run from an empty cache: of the stage, of the killed run, of its "
            "rerun, and what both need beyond a whole run. What is done again holds the start-up (imports, reading, "
            "coupling: most of what is done before the middle of `calibrate`); what lies behind the kill no cache can "
            "save. Rows of a start are of an earlier form of the study: nothing of that stage is kept yet."
        ),
    ),
    "determinism": (
        "Determinism",
        (
            "Models pruned to half the MACs on 32 samples, with one worker and two, with the default batch and with 7 "
            "samples a run: the number of different files and of different reports (all of the JSON but times and the "
            "division of the work; measures on held-out samples to four digits, as ONNX Runtime rounds outputs of "
            "another batch size differently), and the digest of the file, which holds for one release of ONNX Runtime."
        ),
    ),
    "memory": (
        "Memory by samples",
        (
            "Peak memory of a process beyond its memory after imports: all resident pages, and its anonymous pages "
            "alone. The ratio is that of the most samples to the fewest."
        ),
    ),
    "limits": (
        "Memory by limit",
        (
            "Peak memory of `prune --macs 0.5 --max-memory 1GB` on 64 samples, libraries among it, of shipped networks "
            "and of networks with random weights that are wide, deep or long."
        ),
    ),
    "mutants": (
        "Tests that notice faults",
        (
            "Small faults put into a module one at a time (mutants), drawn at random, and shown to tests of four "
            "seconds. Between the rounds tests are added, and modules change. `no test`: no test runs the line."
        ),
    ),
    "coverage": (
        "Architectures",
        (
            "Share of the parameters kept (percent) when every group is halved, on small networks with random weights "
            "exported by PyTorch both ways; beside it the share that others keep of the same network when asked for "
            "half of the channels, or how they fail."
        ),
    ),
    "foreign": (
        "Third-party models",
        "Pruned to seven tenths of every group, with their own weights if they are distributed with any.",
    ),
    "wild": (
        "Models from the wild",
        (
            "ONNX files out of published packages, pruned by the default command to 0.7 and 0.5 of the MACs on 64 "
            "samples. Kept is the share of the model's own task, as `measure` says, with the original's answers on "
            "held-out samples as the truth: from 0.95 on the file is usable. Where inputs and outputs pin so much "
            "that a budget cannot be met, `least budget` is the smallest that can, and is judged in its place. "
            "Processor time and memory are those of the largest of the commands. Beside it onnxsim on the originals: "
            "the size of what it makes, and the largest difference of an output, relative to the largest value of that "
            "output."
        ),
    ),
    "wild-recovered": (
        "Recovery of models from the wild",
        (
            "Pruned by the default command to half the MACs on 64 samples, without and with `--recover`. Kept is the "
            "share of the model's own task. Where a recovery is refused, the file is that of the refit on four fifths "
            "of the samples alone. Processor time and memory are those of pruning and recovery together."
        ),
    ),
    "handover": (
        "Hand-over to other tools",
        (
            "Originals and files pruned to half the MACs, given to other tools: largest difference of an output from "
            "ONNX Runtime on the same file, relative to the largest value of that output. Bytes are those of what the "
            "tool made of the pruned file, over those of the original and over the pruned file. onnx2tf (TFLite) is "
            "left out: it needs TensorFlow 2.19, which is too large to install beside the other tools."
        ),
    ),
    "coupling": (
        "Coupling",
        "Seconds to find the units, on graphs of the onnx package.",
    ),
    "large": (
        "Large models",
        "`inspect` on a transformer with random weights, 250 million parameters of 4 bytes.",
    ),
}
"""Title and text of every study and of its summaries (``study-...``), in the order of the page."""

OTHERS = {"wild": "tools.wild run", "handover": "tools.wild handover"}
"""Studies of other tools, with their commands."""

SHOWN = {
    "coverage": ("network", "exporter", "kept %", "onnxsim %", "Torch-Pruning %", "cut = masked")
}
"""Columns of a study that the page shows, if not all."""


def page(results: Path) -> str:
    """Return the text of docs/results.md, from all studies found in ``results``."""
    found = {study: _read(results, study) for study in TEXT if (results / f"{study}.json").exists()}
    parts = [
        "# Results",
        (
            "Every table is written by `python -m tools.bench readme` from the studies saved in "
            "`tools/bench/results`, and every study by the command under its table; see "
            "[how to reproduce them](reproduce.md). OAMIP's published protocol has a page of its own in "
            "`tools/experiments/results`."
        ),
        "\n".join(f"- [{TEXT[study][0]}](#{_anchor(TEXT[study][0])})" for study in found),
    ]
    for study, record in found.items():
        title, text = TEXT[study]
        parts += [f"## {title}", text]
        if study in FIGURES:
            parts += [
                f"![{FIGURES[study].alt}](figures/{study}.svg)",
                f"*{FIGURES[study].caption}*",
            ]
        if study == "coverage":
            parts += [table(_compared(record), COMPARED), "By network and exporter:"]
        parts.append(table(record["rows"], SHOWN.get(study, record["columns"])))
        lines = _remarks(results, record)
        if lines:
            parts.append("\n".join(f"- {line}" for line in lines))
        parts.append(_again(record))
    return "\n\n".join(parts) + "\n"


def headline(results: Path) -> str:
    """Return the text between the markers of README.md: the tables that compare with other pruners."""
    parts = []
    records = []
    for study, rows in (("rivals-summary", _all), ("larger-summary", _halved)):
        if (results / f"{study}.json").exists():
            record = _read(results, study)
            title, text = TEXT[study]
            parts.append(f"**{title}.** {text}\n\n{table(rows(record), record['columns'])}")
            records.append(record)
    measured = together(record["environment"] for record in records)
    listed = ", ".join(f"{key} {value}" for key, value in measured.items())
    return "\n\n".join([*parts, f"Measured on {listed}."])


def updated(text: str, results: Path) -> str:
    """Return README.md with a fresh headline. Raises ValueError if it has no markers."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{headline(results)}\n{END}{tail}"


def publish(new: Path | None = None) -> None:
    """Copy the studies found in ``new``, if given, then write both pages and the figures from all saved studies."""
    if new is not None:
        for study in TEXT:
            file = new / f"{study}.json"
            if file.exists() and file.resolve().parent != SAVED.resolve():
                shutil.copyfile(file, SAVED / file.name)
    PAGE.write_text(page(SAVED), encoding="utf-8")
    README.write_text(updated(README.read_text(encoding="utf-8"), SAVED), encoding="utf-8")
    picture.write(_read(SAVED, "rivals")["rows"], DRAWN / picture.NAME)
    for study in FIGURES:
        figures.draw(study, SAVED, DRAWN)


def _read(results: Path, study: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((results / f"{study}.json").read_text(encoding="utf-8"))
    return record


def _remarks(results: Path, record: dict[str, Any]) -> list[str]:
    """Return sentences on single rows: where onnx-oamip is behind, and why."""
    if record["study"] == "rivals":
        return rivals.remarks(record["rows"])
    if record["study"] == "latency":
        return latency.remarks(record["rows"], _read(results, "latency-accuracy")["rows"])
    return []


def _anchor(title: str) -> str:
    """Return the id that GitHub and Python-Markdown give to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _environment(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in record["environment"].items())


def _again(record: dict[str, Any]) -> str:
    study = record["study"].partition("-")[0]
    command = OTHERS.get(study, f"tools.bench {study}")
    return f"`python -m {command}`, seed {record['seed']}; {_environment(record)}."


def _all(record: dict[str, Any]) -> list[Row]:
    return list(record["rows"])


def _halved(record: dict[str, Any]) -> list[Row]:
    """Return the rows at half the MACs that have a rival."""
    return [row for row in record["rows"] if row["MACs asked"] == 0.5 and row.get("best rival")]


COMPARED = ("tool", "median kept %", "most kept %", "given", "not done")


def _compared(record: dict[str, Any]) -> list[Row]:
    """Return one row per tool: the share that it keeps over all networks."""
    rows = record["rows"]
    # Pruned before they are exported.
    networks = {row["network"]: row["Torch-Pruning %"] for row in rows}
    return [
        {"tool": "onnx-oamip", **_spread(row["kept %"] for row in rows)},
        {"tool": "onnxsim", **_spread(row["onnxsim %"] for row in rows)},
        {"tool": "Torch-Pruning (PyTorch, before the export)", **_spread(networks.values())},
    ]


def _spread(cells: Iterable[Any]) -> Row:
    """Summarise cells: a number if the tool finished, a text if it failed, "n/a" if it was not given the network."""
    given = [cell for cell in cells if cell != "n/a"]
    kept = [float(cell) for cell in given if isinstance(cell, (int, float))]
    return {
        "median kept %": f"{median(kept):.1f}",
        "most kept %": f"{max(kept):.1f}",
        "given": len(given),
        "not done": len(given) - len(kept),
    }
